"""Whether a model.source is a path, and which. Light: the command line reads specs with it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tercet.errors import ModelFileMissing

PACKAGE = "package:"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PATH_STARTS = ("/", "./", "../", "~")


def as_path(source: str) -> Path | None:
    """The absolute path, if the source is one or looks like one; the hub is then never asked for it."""
    if source.startswith(PACKAGE):
        return None
    path = os.path.abspath(os.path.expanduser(source))
    looks_so = source.startswith(PATH_STARTS) or source.endswith(".gguf") or source in (".", "..")
    return Path(path) if looks_so or os.path.exists(path) else None


def tower_path(vision: str) -> Path:
    """The absolute path of the directory that a spec's model.vision names. Raises ModelFileMissing."""
    path = Path(os.path.abspath(os.path.expanduser(vision)))
    if not (path / "config.json").is_file():
        missing = "has no config.json" if path.is_dir() else "there is no such directory"
        raise ModelFileMissing(f"{path}: {missing}; a vision tower is a directory with config.json")
    return path


def source_path(source: str) -> Path | None:
    """The file or directory that a source names; None for a package or a hub id. Raises ModelFileMissing."""
    path = as_path(source)
    if path is None:
        if not source.startswith(PACKAGE) and HUB_ID.fullmatch(source) is None:
            raise ModelFileMissing(f"{source}: is no hub id (owner/name), and {os.path.abspath(source)} does not exist")
        return None
    if path.suffix == ".gguf" and not path.is_file():
        raise ModelFileMissing(f"{path}: there is no such file")
    if path.suffix != ".gguf" and not (path / "config.json").is_file():
        missing = "has no config.json" if path.is_dir() else "there is no such directory"
        raise ModelFileMissing(f"{path}: {missing}; a model is a .gguf file or a directory with config.json")
    return path
