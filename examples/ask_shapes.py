"""Ask a served cluster about pictures that the training did not see, and count the right answers.

    tercet serve configs/local-vision.yaml
    python -m examples.ask_shapes [--pictures 300] [--url http://127.0.0.1:8000]

Every kind of question is asked about every picture, in words drawn by chance. An answer is right if it is, letter by
letter, the one that the training would want.
"""

from __future__ import annotations

import argparse
import base64
import io
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from examples.shapes.pictures import HELD_OUT, seen
from examples.shapes.questions import QUESTIONS, answer, asked
from tercet import Client

AT_ONCE = 4  # questions


def message(image: Image.Image, question: str) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}],
    }


def is_right(client: Client, kind: str, seed: int) -> bool:
    """Asks a question of this kind about the picture of this seed."""
    scene, image = seen(seed)
    words = random.Random(f"{kind} {seed}").randrange(len(QUESTIONS[kind]))  # noqa: S311
    said = client.chat([message(image, asked(kind, words, scene))], temperature=0, max_tokens=40)
    return said.text == answer(kind, scene)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    client, seeds = Client(arguments.url), range(HELD_OUT, HELD_OUT + arguments.pictures)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for kind in QUESTIONS:
            answers = pool.map(partial(is_right, client, kind), seeds)
            right = sum(track(answers, kind, total=len(seeds), console=Console(stderr=True), transient=True))
            print(f"{kind:7} {right:4} of {len(seeds)}  {right / len(seeds):6.1%}")


if __name__ == "__main__":
    main()
