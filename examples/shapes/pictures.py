"""Synthetic pictures: one shape somewhere, several equal ones, or a digit, in one colour.

    python -m examples.shapes.pictures FOLDER [--count 2]

writes some that the training did not see, and says what each shows.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 256  # pixels of a picture; the model sees it four times smaller
COLOURS = {
    "red": (214, 38, 40),
    "green": (38, 150, 56),
    "blue": (36, 84, 204),
    "yellow": (236, 206, 32),
    "purple": (134, 50, 172),
    "orange": (244, 128, 22),
    "black": (24, 24, 24),
}
SHAPES = ("circle", "square", "triangle", "star")
DIGITS = tuple("0123456789")
NUMBERS = ("one", "two", "three", "four")
PLACES = (
    *("upper left", "top", "upper right"),
    *("left", "middle", "right"),
    *("lower left", "bottom", "lower right"),
)
SEVERAL = "several places"
HELD_OUT = 10**9  # the seeds of pictures from here on are not trained with


@dataclass(frozen=True)
class Scene:
    thing: str  # of SHAPES or DIGITS
    colour: str  # of COLOURS
    number: str = "one"  # of NUMBERS
    place: str = "middle"  # of PLACES, or SEVERAL


def scene(chance: random.Random) -> Scene:
    colour, kind = chance.choice([*COLOURS]), chance.random()
    if kind < 0.3:
        return Scene(chance.choice(DIGITS), colour)
    if kind < 0.6:
        return Scene(chance.choice(SHAPES), colour, chance.choice(NUMBERS[1:]), SEVERAL)
    return Scene(chance.choice(SHAPES), colour, place=chance.choice(PLACES))


def picture(scene: Scene, chance: random.Random) -> Image.Image:
    """Sizes, turns, shades and places vary a little."""
    paper = tuple(chance.randint(225, 255) for _ in range(3))
    ink = tuple(min(255, max(0, value + chance.randint(-14, 14))) for value in COLOURS[scene.colour])
    image = Image.new("RGB", (SIDE, SIDE), paper)
    draw = ImageDraw.Draw(image)
    if scene.thing in DIGITS:
        font = ImageFont.load_default(SIDE * chance.uniform(0.55, 0.85))
        at = [SIDE * chance.uniform(0.42, 0.58) for _ in "xy"]
        draw.text((at[0], at[1]), scene.thing, ink, font, anchor="mm")
        return image
    single = scene.number == "one"
    across = 3 if single else 2
    cells = [PLACES.index(scene.place)] if single else chance.sample(range(4), NUMBERS.index(scene.number) + 1)
    for cell in cells:
        row, column = divmod(cell, across)
        x, y = (SIDE * ((i + 0.5) / across + chance.uniform(-0.04, 0.04)) for i in (column, row))
        _shape(draw, scene.thing, (x, y), SIDE * chance.uniform(0.11, 0.16), ink, chance)
    return image


def _shape(
    draw: ImageDraw.ImageDraw,
    kind: str,
    centre: tuple[float, float],
    radius: float,
    ink: tuple[int, ...],
    chance: random.Random,
) -> None:
    x, y = centre
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        return
    # The distance of each corner from the centre, in radii, going round
    corners = {"square": [1.2] * 4, "triangle": [1.25] * 3, "star": [1.25, 0.5] * 5}[kind]
    turn = chance.uniform(-0.2, 0.2) - math.pi / (4 if kind == "square" else 2)
    angles = [turn + 2 * math.pi * i / len(corners) for i in range(len(corners))]
    away = [radius * corner for corner in corners]
    draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(away, angles, strict=True)], fill=ink)


def seen(seed: int) -> tuple[Scene, Image.Image]:
    """The scene and the picture of a seed."""
    chance = random.Random(seed)  # noqa: S311  # no secrets
    what = scene(chance)
    return what, picture(what, chance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=2)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.count):
        what, image = seen(HELD_OUT + number)
        image.save(path := arguments.folder / f"{number + 1}.png")
        print(f"{path}: {what.number} {what.colour} {what.thing}, {what.place}")


if __name__ == "__main__":
    main()
