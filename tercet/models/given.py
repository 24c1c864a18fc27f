"""What a client says, as a chat template gets it: blanks that are compared, searched and cut as the text itself.

A template joins its own text with the client's, and in the prompt nobody can tell them apart. Rendered with blanks it
takes the same turns and makes a prompt of the same length, which shows of each character whose it is. Whatever becomes
of a blank, it is no letter of the template's: what is not known here errs on the safe side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self, SupportsIndex

LETTER, SYMBOL = "ƻ", "¤"  # blanks that no case or normalizer changes; two, since tokenizers look whether a word ends
BLANK, OWN = re.compile(f"[{LETTER}{SYMBOL}]"), re.compile(f"[^{LETTER}{SYMBOL}]+")
KEPT = " \"'\\"  # no blanks for these, nor for what does not print: JSON and Python write some of them as two or more


class Given(str):
    """A text that is the client's, or in part: blanks to all that print or join it, itself to all that ask about it."""

    __slots__ = ("_plain",)
    _plain: str

    def __new__(cls, shown: str, plain: str | None = None) -> Self:
        """shown: `plain` with blanks in the place of what is the client's. plain: None for what Jinja has made of one,
        of which nothing else is known."""
        self = super().__new__(cls, shown)
        self._plain = shown if plain is None else plain
        return self

    def __str__(self) -> str:
        return self

    def __hash__(self) -> int:
        return hash(self._plain)

    def __getitem__(self, at: SupportsIndex | slice) -> Given:
        return Given(super().__getitem__(at), self._plain[at])

    def __iter__(self) -> Iterator[Given]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: str) -> Given:
        return _woven([self, other])

    def __radd__(self, other: str) -> Given:
        return _woven([other, self])

    def lstrip(self, chars: str | None = None) -> Given:
        return self[len(self) - len(self._plain.lstrip(_plain(chars))) :]

    def rstrip(self, chars: str | None = None) -> Given:
        return self[: len(self._plain.rstrip(_plain(chars)))]

    def strip(self, chars: str | None = None) -> Given:
        return self.rstrip(chars).lstrip(chars)

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Given]:  # type: ignore[override]
        pieces, at = [], 0
        for piece in self._plain.split(_plain(sep), maxsplit):
            at = self._plain.index(piece, at) if sep is None else at
            pieces.append(self[at : at + len(piece)])
            at += len(piece) + len(sep or "")
        return pieces

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Given:
        if not old:
            return _all_of_it(self._plain.replace(old, _plain(new), count))
        return _woven([*self.split(old, count)], new)


def _as_plain(name: str) -> Callable[..., Any]:
    """The method of the text itself; what it makes of it is the client's."""

    def method(self: Given, *args: Any, **kwargs: Any) -> Any:
        return given(getattr(self._plain, name)(*map(_plain, args), **kwargs))

    return method


COMPARED = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__"}
PRINTED = {"encode", "format", "format_map", "join", "maketrans", "translate"}  # these see blanks
for _name in COMPARED | {name for name in dir(str) if not name.startswith("_")} - PRINTED - vars(Given).keys():
    setattr(Given, _name, _as_plain(_name))


def given(value: Any) -> Any:
    """The value with every text of it as Given, keys as well. Roles are left out: templates make tokens of them."""
    if isinstance(value, str):
        return value if isinstance(value, Given) else _all_of_it(value)
    if isinstance(value, Mapping):
        return {given(key): item if _is_role(key, item) else given(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [given(item) for item in value]
    return value


def said(value: Any) -> Iterator[str]:
    """Every text that `given` would blank."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from said(key)
            yield from () if _is_role(key, item) else said(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from said(item)


def joined(pieces: Iterable[str], between: str = "") -> str:
    """The pieces as one text, each with its own blanks, if any has some."""
    pieces = list(pieces)
    blanked = any(isinstance(piece, Given) for piece in (between, *pieces))
    return _woven(pieces, between) if blanked else between.join(pieces)


def fits(shown: str, text: str) -> bool:
    """Whether a prompt with blanks differs from the prompt in those alone."""
    if _plain(shown) == text:
        return True
    return len(shown) == len(text) and all(text.startswith(run.group(), run.start()) for run in OWN.finditer(shown))


def _woven(pieces: list[str], between: str = "") -> Given:
    return Given(str.join(between, pieces), _plain(between).join(map(_plain, pieces)))


def _all_of_it(text: str) -> Given:
    blanks = {
        ord(character): LETTER if character.isalnum() or character == "_" else SYMBOL
        for character in set(text)
        if character.isprintable() and character not in KEPT
    }
    return Given(text.translate(blanks), text)


def _is_role(key: str, value: Any) -> bool:
    return key == "role" and isinstance(value, str) and value.isidentifier()


def _plain(value: Any) -> Any:
    return value._plain if isinstance(value, Given) else value
