"""Synthetic pictures and questions about them, from a seed: shapes, colours, counts, positions, digits."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIDE = 64  # pixels
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
NUMBERS = ("one", "two", "three", "four")
PLACES = (
    *("upper left", "top", "upper right"),
    *("left", "middle", "right"),
    *("lower left", "bottom", "lower right"),
)


@dataclass(frozen=True)
class Scene:
    """One shape somewhere, several equal ones, or a digit."""

    kind: str  # one of SHAPES, or "digit"
    colour: str
    count: int = 1
    place: str | None = None  # of a single shape
    digit: int | None = None


def scene(random: random.Random) -> Scene:
    colour, draw = random.choice([*COLOURS]), random.random()
    if draw < 0.25:
        return Scene("digit", colour, digit=random.randrange(10))
    if draw < 0.55:
        return Scene(random.choice(SHAPES), colour, random.randint(2, 4))
    return Scene(random.choice(SHAPES), colour, place=random.choice(PLACES))


def picture(scene: Scene, random: random.Random) -> Image.Image:
    paper = tuple(random.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (SIDE, SIDE), paper)
    draw, ink = ImageDraw.Draw(image), _shade(COLOURS[scene.colour], random)
    if scene.digit is not None:
        font = ImageFont.load_default(random.uniform(34, 56))
        at = (SIDE / 2 + random.uniform(-6, 6), SIDE / 2 + random.uniform(-4, 4))
        draw.text(at, str(scene.digit), ink, font, anchor="mm")
    elif scene.place is not None:
        row, column = divmod(PLACES.index(scene.place), 3)
        radius = random.uniform(7.5, 10)
        centre = [SIDE * (i + 0.5) / 3 + random.uniform(-2, 2) for i in (column, row)]
        _shape(draw, scene.kind, centre[0], centre[1], radius, ink, random)
    else:
        for cell in random.sample(range(4), scene.count):
            row, column = divmod(cell, 2)
            centre = [SIDE * (i + 0.5) / 2 + random.uniform(-4, 4) for i in (column, row)]
            _shape(draw, scene.kind, centre[0], centre[1], random.uniform(7, 11), ink, random)
    return image


def question(scene: Scene, random: random.Random) -> tuple[str, str, str]:
    """-> what is asked for, the question, the answer."""
    many = scene.count > 1
    thing = "digit" if scene.digit is not None else f"{scene.kind}{'s' if many else ''}"
    asked = [("what", ["What is in the picture?", "What do you see?", "Describe the picture."], what(scene))]
    asked.append(("colour", [f"What colour {'are' if many else 'is'} the {thing}?"], f"{scene.colour.capitalize()}."))
    if scene.digit is not None:
        asked.append(("digit", ["Which digit is it?", "What digit is in the picture?"], f"{scene.digit}."))
    else:
        asked.append(
            ("shape", ["Which shape is it?" if not many else "Which shapes are they?"], f"{thing.capitalize()}.")
        )
        number = NUMBERS[scene.count - 1].capitalize()
        asked.append(("count", ["How many shapes are there?", "How many are there?"], f"{number}."))
    if scene.place is not None:
        asked.append(("place", [f"Where is the {thing}?"], f"{scene.place.capitalize()}."))
    about, questions, answer = random.choice(asked)
    return about, random.choice(questions), answer


def what(scene: Scene) -> str:
    if scene.digit is not None:
        return f"The digit {scene.digit} in {scene.colour}."
    if scene.count > 1:
        return f"{NUMBERS[scene.count - 1].capitalize()} {scene.colour} {scene.kind}s."
    article = "An" if scene.colour[0] in "aeiou" else "A"
    return f"{article} {scene.colour} {scene.kind}."


def _shade(colour: tuple[int, int, int], random: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + random.randint(-14, 14))) for value in colour)


def _shape(
    draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, ink: tuple[int, ...], random: random.Random
) -> None:
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        return
    points, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (5, 0.42)}[kind]
    turn = {"square": math.pi / 4, "triangle": -math.pi / 2, "star": -math.pi / 2}[kind] + random.uniform(-0.2, 0.2)
    corners = []
    for i in range(points * (2 if inner < 1 else 1)):
        size = radius * 1.25 * (inner if inner < 1 and i % 2 else 1)
        angle = turn + 2 * math.pi * i / (points * (2 if inner < 1 else 1))
        corners.append((x + size * math.cos(angle), y + size * math.sin(angle)))
    draw.polygon(corners, fill=ink)
