"""Fetches models from Hugging Face's hub into its cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from tqdm.auto import tqdm

from tercet.core import Loading
from tercet.errors import ModelFileMissing
from tercet.models.progress import Hear, unheard

if TYPE_CHECKING:
    Tqdm = tqdm[Any]
else:
    Tqdm = tqdm  # takes no parameters at run time

FILES = ("*.json", "*.jinja", "*.model", "merges.txt")


def fetched(repo: str, weights: Hear | None) -> Path:
    """-> the directory of the model. weights: fetch them, too, and tell how far they are. Raises ModelFileMissing."""
    patterns = [*FILES, "*.safetensors"] if weights else list(FILES)
    bar = _bar(weights or unheard)
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns, tqdm_class=bar))
    except (OSError, HFValidationError) as error:  # its HTTP and offline errors are OSErrors
        reason = str(error).splitlines()[0]
        raise ModelFileMissing(f"{repo}: is no local path and cannot be fetched from the hub: {reason}") from error


def _bar(hear: Hear) -> type[Tqdm]:
    """A progress bar for the hub's library, which draws nothing. Of those that count bytes, on their way or on the
    disk, the one that is further is told of."""
    most = 0

    class Bar(Tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})
            self._bytes = 0 if options.get("unit") == "B" else None

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal most
            if self._bytes is not None:
                self._bytes += int(n or 0)
                if self._bytes > most:
                    most = self._bytes
                    hear(Loading("bytes fetched", most, max(most, int(self.total or 0))))
            return None

    return Bar
