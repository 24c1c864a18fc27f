"""Small requests to the gateway: whether it is ready, and that of `helm test`.

    ask.py get URL                 exit code 0 if the answer is 200
    ask.py chat URL QUESTION       asks it of the model that the gateway serves, prints the answer; 0 if there is one

API_KEY: sent as a Bearer key. CA: file of authorities; without it the certificate is not checked, as the kubelet does.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import urllib.request

TIMEOUT_S = {"get": 4.0, "chat": 300.0}


def main() -> None:
    action, url, *words = sys.argv[1:]
    if action == "get":
        send(url, None, TIMEOUT_S["get"])
        return
    models = json.loads(send(f"{url}/v1/models", None, TIMEOUT_S["chat"]))
    body = {
        "model": models["data"][0]["id"],
        "messages": [{"role": "user", "content": " ".join(words)}],
        "temperature": 0,
        "max_tokens": 32,
    }
    answer = json.loads(send(f"{url}/v1/chat/completions", body, TIMEOUT_S["chat"]))
    text = answer["choices"][0]["message"]["content"]
    print(text)
    sys.exit(0 if text.strip() else 1)


def send(url: str, body: object | None, timeout_s: float) -> bytes:
    """The body of a 200. Raises urllib.error.URLError."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust()))
    with direct.open(request, timeout=timeout_s) as answer:
        return bytes(answer.read())


def trust() -> ssl.SSLContext:
    ca = os.environ.get("CA")
    context = ssl.create_default_context(cafile=ca)
    if ca is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


if __name__ == "__main__":
    main()
