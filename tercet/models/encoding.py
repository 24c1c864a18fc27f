"""One text to ids, beside other threads."""

from __future__ import annotations

import os

import tokenizers

from tercet.errors import InvalidRequest

# A text is then encoded in the thread that asks. The library's own pool has as many threads as cores and takes texts
# in order: a short one would wait until two long ones are done.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def encoded(backend: tokenizers.Tokenizer, text: str, add_special: bool) -> tokenizers.Encoding:
    """Without offsets. `encode_batch` lets go of the GIL, `encode` does not. Raises InvalidRequest."""
    try:
        return backend.encode_batch_fast([text], add_special_tokens=add_special)[0]
    except (TypeError, UnicodeEncodeError) as error:  # half a surrogate pair
        raise InvalidRequest("the text is not valid Unicode") from error
