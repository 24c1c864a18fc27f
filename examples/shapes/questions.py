"""What is asked about a picture, and the one right answer."""

from __future__ import annotations

from .pictures import DIGITS, Scene

QUESTIONS = {  # kind -> in other words; {it}: the thing's name
    "what": ("What is in the picture?", "What do you see?", "What does the picture show?", "Describe the picture."),
    "shape": ("What shape is it?", "Which shape is it?", "What shape is in the picture?"),
    "colour": ("What colour is it?", "What color is it?", "Which colour is it?", "What colour is the {it}?"),
    "number": ("How many are there?", "How many shapes are there?", "How many {it}s are there?"),
    "place": ("Where is it?", "Where is the {it}?", "Where in the picture is it?"),
    "digit": ("Which digit is it?", "What digit is it?", "Which number is it?", "What digit is in the picture?"),
}


def asked(kind: str, words: int, scene: Scene) -> str:
    """words: which of QUESTIONS[kind]."""
    return QUESTIONS[kind][words].format(it=_name(scene))


def answer(kind: str, scene: Scene) -> str:
    single, name = scene.number == "one", _name(scene)
    many = name if single else f"{name}s"
    beginning = "It is" if single else "They are"
    match kind:
        case "what" if scene.thing in DIGITS:
            return f"There is the digit {scene.thing} in {scene.colour}."
        case "what" if single:
            return f"There is {_a(scene.colour)} {scene.colour} {name} in the {scene.place}."
        case "what":
            return f"There are {scene.number} {scene.colour} {many}."
        case "shape":
            return f"{beginning} {f'{_a(name)} {name}' if single else many}."
        case "colour":
            return f"{beginning} {scene.colour}."
        case "number":
            return f"There {'is' if single else 'are'} {scene.number} {many}."
        case "place":
            return f"{beginning} in {'the ' if single else ''}{scene.place}."
        case "digit" if scene.thing in DIGITS:
            return f"It is the digit {scene.thing}."
        case _:
            return "There is no digit."


def _name(scene: Scene) -> str:
    return "digit" if scene.thing in DIGITS else scene.thing


def _a(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
