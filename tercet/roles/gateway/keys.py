"""Who may call: API keys, of which the file has digests only.

    keys:
      - name: team-a                  # who it is, in metrics and logs
        sha256: 5e88...               # of the key; `tercet keys add` draws keys and writes this
        requests_per_minute: 600      # these three are optional
        tokens_per_minute: 200000     # of prompts and answers together
        concurrent: 16

A key has 256 random bits, so a plain digest of it tells nobody what it is.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tercet.errors import SpecError, Unauthenticated
from tercet.spec.base import Name, Positive
from tercet.watched import Watched

MOST_BYTES = 1 << 20  # of the file: some 10,000 keys
MOST_DEEP = 16  # lists and maps within each other: what builds them, in C, would overflow the stack
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C if it is there: ten times as fast
SCHEMES = "Authorization: Bearer KEY"


class Key(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    concurrent: Positive | None = None  # requests


class KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    keys: list[Key] = Field(default_factory=list)


Keys = dict[str, Key]  # digest -> key


class KeyRing:
    """Any thread. The file is read again when it changes."""

    def __init__(self, path: str) -> None:
        """Raises SpecError."""
        self._keys = Watched([path], lambda: by_digest(read_keys(Path(path)), path))

    def owner(self, authorization: bytes, *, from_page: bool = False) -> Key:
        """The key that a header `Authorization` has. from_page: of a page of ours, for which a browser asks its user.
        Raises Unauthenticated."""
        given = _given(authorization, from_page)
        if not given:
            raise Unauthenticated(f"an API key is needed: {SCHEMES}")
        key = self._keys.value.get(digest(given))
        if key is None:
            raise Unauthenticated("this API key is not known here")
        return key


def digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """Raises SpecError."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise SpecError(f"{path}: more than {MOST_BYTES} bytes")
        _refuse_deep(data, path)
        return KeyFile.model_validate(yaml.load(data, LOADER) or {}).keys  # noqa: S506  # it is a safe one
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: is no YAML: {str(error).splitlines()[0]}") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]  # what was given may be a key
        where = ".".join(map(str, first["loc"]))
        raise SpecError(f"{path}: {where}: {first['msg']}") from error
    except ValueError as error:  # a date that is none
        raise SpecError(f"{path}: is no YAML: {type(error).__name__}") from error


def _refuse_deep(data: bytes, path: Path) -> None:
    """Raises SpecError, YAMLError."""
    depth = 0
    for event in yaml.parse(data, LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MOST_DEEP:
            raise SpecError(f"{path}: is nested too deeply")


def by_digest(keys: list[Key], path: str) -> Keys:
    """Raises SpecError if two have one name, or one digest."""
    for found in (Counter(key.name for key in keys), Counter(key.sha256 for key in keys)):
        if twice := [each for each, times in found.items() if times > 1]:
            raise SpecError(f"{path}: {twice[0]} is there twice")
    return {key.sha256: key for key in keys}


def _given(authorization: bytes, from_page: bool) -> bytes:
    scheme, _, value = authorization.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic" and from_page:
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
