"""A small synchronous client of the OpenAI endpoint, by the standard library alone.

    client = tercet.Client("http://127.0.0.1:8000")
    client.chat("What is the capital of France?", max_tokens=20).text
    with client.stream("Tell me more.") as answer:
        for piece in answer: ...
    answer.result.timings

Every failure is one of tercet.errors: the gateway's own by its code, NoWorkers if nothing answers at the address.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit

from rich.console import Console

from tercet.errors import DeadlineExceeded, InvalidRequest, NoWorkers, TercetError, WorkerLost, from_wire

Messages = str | Sequence[Mapping[str, Any]]  # a text stands for one message of the user
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OTHER_NAME = {62, 64}  # OpenSSL's codes: the certificate is for another host or address
UNKNOWN_AUTHORITY = {2, 18, 19, 20, 21}
NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}  # its reasons, by version


@dataclass(frozen=True)
class Result:
    """A whole answer. `timings` is what the gateway says of the request's stages, seconds and bytes."""

    text: str
    finish_reason: str | None
    token_ids: tuple[int, ...] = ()  # if asked for with return_token_ids=True
    usage: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)


class Stream:
    """Iterate for pieces of text; `result` stands once it is exhausted. Closing it early aborts the request."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self._text: list[str] = []
        self._ids: list[int] = []
        self._finish_reason: str | None = None
        self.result: Result | None = None

    def __iter__(self) -> Iterator[str]:
        with self:
            for chunk in self._chunks():
                yield from self._take(chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._response.close()
        self._connection.close()

    def _chunks(self) -> Iterator[dict[str, Any]]:
        """Chunks until [DONE]. Raises the error that the gateway sent, WorkerLost if the stream just ends."""
        with _cut("stream"):
            for line in self._response:
                data = line.strip().removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                if data:
                    yield _checked(json.loads(data))
        raise WorkerLost("the stream ended before the answer did")

    def _take(self, chunk: dict[str, Any]) -> Iterator[str]:
        for choice in chunk["choices"]:
            text = choice["delta"]["content"] if "delta" in choice else choice["text"]
            self._ids.extend(choice.get("token_ids", ()))
            self._finish_reason = choice["finish_reason"]
            if text:
                self._text.append(text)
                yield text
        if "timings" in chunk:
            text = "".join(self._text)
            self.result = Result(text, self._finish_reason, tuple(self._ids), chunk["usage"], chunk["timings"])


class Client:
    """Opens one connection a request; may be used from many threads."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        timeout_s: float = 300.0,
        api_key: str | None = None,
        ca: str | Path | None = None,
    ) -> None:
        """timeout_s: the longest silence of the gateway. api_key: by default what TERCET_API_KEY says. ca: authorities
        (PEM) that an https gateway's certificate may be of; None: the system's. Raises InvalidRequest."""
        self._url = _parsed(base_url)
        self._timeout_s = timeout_s
        key = api_key or os.environ.get("TERCET_API_KEY")
        self._headers = {"Content-Type": "application/json"} | _authorization(key)
        self._tls = _trusting(ca) if self._url.scheme == "https" else None

    def chat(self, messages: Messages, *, images: Sequence[str | Path] = (), **params: Any) -> Result:
        """images: files that are shown with a text. params: as in the OpenAI API and vLLM. Raises TercetError."""
        choice, body = self._whole(CHAT, {"messages": _messages(messages, images)} | params)
        return _result(choice["message"]["content"], choice, body)

    def generate(self, prompt: str | Sequence[int], **params: Any) -> Result:
        """Completion of a text or of token ids. Raises TercetError."""
        choice, body = self._whole(COMPLETIONS, {"prompt": _prompt(prompt)} | params)
        return _result(choice["text"], choice, body)

    def stream(self, messages: Messages, *, images: Sequence[str | Path] = (), **params: Any) -> Stream:
        """`chat`, piece by piece. Raises TercetError, here or while it is iterated."""
        return self._stream(CHAT, {"messages": _messages(messages, images)} | params)

    def stream_generate(self, prompt: str | Sequence[int], **params: Any) -> Stream:
        """`generate`, piece by piece. Raises TercetError, here or while it is iterated."""
        return self._stream(COMPLETIONS, {"prompt": _prompt(prompt)} | params)

    def models(self) -> list[str]:
        return [model["id"] for model in self._json("GET", "/v1/models")["data"]]

    def is_ready(self) -> bool:
        """Whether a real request has passed through a live pair. Raises NoWorkers if nothing answers."""
        response, _ = self._answer("GET", "/ready")
        return response.status == 200

    def get(self, path: str) -> dict[str, Any]:
        """What the gateway answers at a path, as JSON. Raises TercetError."""
        return self._json("GET", path)

    def _whole(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if body.get("n", 1) != 1:
            raise InvalidRequest(f"n must be 1 for this client, got {body['n']}; use the openai client for more")
        answer = self._json("POST", path, body)
        return answer["choices"][0], answer

    def _stream(self, path: str, body: dict[str, Any]) -> Stream:
        asked = {"stream": True, "stream_options": {"include_usage": True}}
        connection, response = self._open("POST", path, body | asked)
        if response.status != 200:
            with closing(connection), _cut("answer"):
                raise _failure(response.status, response.read())
        return Stream(connection, response)

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        response, content = self._answer(method, path, body)
        if response.status != 200:
            raise _failure(response.status, content)
        return _checked(json.loads(content))

    def _answer(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection, response = self._open(method, path, body)
        with closing(connection), _cut("answer"):
            return response, response.read()

    def _open(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        host, port = self._url.hostname or "", self._url.port
        if self._tls is None:
            connection = http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        else:
            connection = http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=self._tls)
        content = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, self._url.path.rstrip("/") + path, content, self._headers)
            return connection, connection.getresponse()
        except TimeoutError as error:
            connection.close()
            raise DeadlineExceeded(f"{self._url.geturl()} did not answer within {self._timeout_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise NoWorkers(
                f"cannot reach {self._url.geturl()}: {error}; {_advice(self._url.scheme, error)}"
            ) from error


def image_part(path: Path) -> dict[str, Any]:
    """An image file as a part of a message's content, for models that see. Raises InvalidRequest."""
    try:
        content = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror}") from error
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/{path.suffix[1:].lower() or 'png'};base64,{content}"},
    }


def chat_loop(
    client: Client, console: Console | None = None, question: str = "", images: Sequence[Path] = (), **params: Any
) -> bool:
    """Read a line, stream the answer, remember both; an empty line or the end of input ends it. question: the one line
    that is asked. images: shown with the first line.

    -> whether every line was answered.
    """
    answered = True
    console = console or Console()
    history: list[dict[str, Any]] = []
    shown = [image_part(path) for path in images]
    if not question:
        console.print("Chat with the model; an empty line ends it.", style="dim")
    lines = [question] if question else iter(partial(_ask, console), "")
    for line in lines:
        first = [*shown, {"type": "text", "text": line}] if shown and not history else line
        history.append({"role": "user", "content": first})
        try:
            history.append({"role": "assistant", "content": _say(client, console, history, params)})
        except TercetError as error:
            history.pop()
            console.print(f"{error.code()}: {error}", style="red", markup=False)
            answered = False
    return answered


def _ask(console: Console) -> str:
    try:
        return console.input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()  # behind the prompt
        return ""


def _say(client: Client, console: Console, history: Messages, params: Mapping[str, Any]) -> str:
    """Ctrl-C ends the answer, not the chat."""
    pieces: list[str] = []
    with client.stream(history, **params) as stream:
        try:
            for piece in stream:
                pieces.append(piece)
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" [stopped]", style="dim", markup=False)
    console.print()
    return "".join(pieces)


@contextmanager
def _cut(what: str) -> Iterator[None]:
    """Errors while a body is read, as ours."""
    try:
        yield
    except TimeoutError as error:
        raise DeadlineExceeded("the gateway sent nothing for too long") from error
    except (OSError, http.client.HTTPException) as error:
        raise WorkerLost(f"the {what} was cut: {error}") from error


def _parsed(base_url: str) -> SplitResult:
    try:
        url = urlsplit(base_url)
        if url.scheme in ("http", "https") and url.hostname and url.port != 0 and not re.search(r"\s", base_url):
            return url
    except ValueError:  # of brackets, or of a port that is no number or out of range
        pass
    raise InvalidRequest(f"base_url must look like http://host:port, got {base_url!r}")


def _authorization(api_key: str | None) -> dict[str, str]:
    if not api_key:
        return {}
    if not api_key.isascii() or not api_key.isprintable():
        raise InvalidRequest("api_key has characters that no header can carry")
    return {"Authorization": f"Bearer {api_key}"}


def _trusting(ca: str | Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"ca: {ca} has no certificates of authorities: {error}") from error


def _advice(scheme: str, error: Exception) -> str:
    """What to do about a gateway that cannot be reached."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in OTHER_NAME:
            return "ask it by a name that its certificate has"
        if error.verify_code in UNKNOWN_AUTHORITY:
            return "the certificate is not trusted: name its authority by --ca FILE (in Python ca=FILE)"
        return "the gateway needs another certificate"
    if isinstance(error, ssl.SSLError) and error.reason in NO_TLS:
        return "the port may speak no TLS: try http://"
    if scheme == "http" and isinstance(error, ConnectionResetError | http.client.BadStatusLine):
        return "the port may speak TLS: try https://"
    return "is `tercet serve` running?"


def _messages(messages: Messages, images: Sequence[str | Path]) -> list[Mapping[str, Any]]:
    """Raises InvalidRequest."""
    if not isinstance(messages, str):
        if images:
            raise InvalidRequest("images are shown with a text; in messages they are parts (image_part)")
        return list(messages)
    if not images:
        return [{"role": "user", "content": messages}]
    shown = [image_part(Path(path)) for path in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": messages}]}]


def _prompt(prompt: str | Sequence[int]) -> str | list[int]:
    return prompt if isinstance(prompt, str) else list(prompt)


def _result(text: str, choice: Mapping[str, Any], body: Mapping[str, Any]) -> Result:
    return Result(text, choice["finish_reason"], tuple(choice.get("token_ids", ())), body["usage"], body["timings"])


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise from_wire(answer["error"]["code"], answer["error"]["message"])
    return answer


def _failure(status: int, content: bytes) -> TercetError:
    """The gateway's error; what stands between may answer in no known shape."""
    try:
        error = json.loads(content)["error"]
        return from_wire(error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        return TercetError(f"HTTP {status}: {content[:200]!r}")
