"""Encodes one text without holding the GIL."""

from __future__ import annotations

import os

import tokenizers

from tercet.errors import InvalidRequest

# A text is then encoded in the thread that asks. The library's own pool has as many threads as cores and takes texts
# in order: a short one would wait until two long ones are done.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def encoded(backend: tokenizers.Tokenizer, text: str, add_special: bool, offsets: bool = False) -> tokenizers.Encoding:
    """A batch of one, since `encode_batch` releases the GIL and `encode` does not; without offsets unless they
    are asked for, to save time. Raises InvalidRequest."""
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    try:
        return encode([text], add_special_tokens=add_special)[0]
    except (TypeError, UnicodeEncodeError) as error:  # half a surrogate pair
        raise InvalidRequest("the text is not valid Unicode") from error
