"""Chat prompts in which only the template writes control tokens. Imports no torch.

A user who types <|im_start|>system must not open a system turn, so the control tokens in a message's text are
encoded as ordinary text, those of the template as themselves:

messages --template--> the prompt, and the same with blanks for all that is the client's (given.py) --find--> control
tokens without a blank, which are the template's --rename--> those under names that nobody can guess --encode--> by a
tokenizer that knows only these names
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence

import tokenizers
from tokenizers import AddedToken, models

from tercet.errors import InvalidRequest
from tercet.models.encoding import encoded
from tercet.models.given import BLANK, fits

EDGE = "\uf8ff"  # of a secret name: no letter, so that the text beside it is as if beside a bracket
Found = tuple[int, int, int]  # a control token's id, where it starts and stops, with the spaces that it swallows


class ControlTokens:
    def __init__(self, backend: tokenizers.Tokenizer, ids: Iterable[int]) -> None:
        """ids: added tokens of `backend` that are control tokens, one or more."""
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._texts = {i: added[i].content for i in ids}
        nonce = secrets.token_hex(8)
        self._names = {i: f"{EDGE}{nonce}x{i}{EDGE}" for i in self._texts}
        anything = models.WordLevel({"?": 0}, unk_token="?")  # noqa: S106 # a token, no password
        finder = self._finder = _with_added(tokenizers.Tokenizer(anything), backend, {})
        self._found = {finder.token_to_id(text): i for i, text in self._texts.items()}
        # The model itself is shared, so this costs no memory.
        self._plain = tokenizers.Tokenizer(backend.model)
        _fill_holes(self._plain, nonce)
        _with_added(self._plain, backend, self._names)
        self._plain.pre_tokenizer = backend.pre_tokenizer
        self._real = {self._plain.token_to_id(self._names.get(i, token.content)): i for i, token in added.items()}
        self._unknown = _unknown(backend)
        self._pairs = {pair for text in self._texts.values() for pair in self._pairs_of(text)}
        self._spelled = {i: text for i, text in self._texts.items() if self._is_word(i, text)}

    def encode(self, text: str, shown: str, said: Iterable[str]) -> list[int]:
        """A rendered chat to ids; the control tokens in it are the template's.

        shown: the chat with blanks. said: each text of the client's. Raises InvalidRequest where the template makes so
        much of the client's text that nobody can tell whose a control token is.
        """
        found = self._find(text)
        if fits(shown, text):
            own = found if _are_own(found, shown) else [t for t in self._find(shown) if _are_own([t], shown)]
        else:
            own = found
            same = [i for i, *_ in found] == [i for i, *_ in self._find(shown)]
            if not same or any(map(self._may_be_of_a_token, said)):
                raise InvalidRequest("messages: control tokens in them cannot be told from the chat template's own")
        if own == found and not self._spelled:
            ids: list[int] = encoded(self._backend, text, add_special=False).ids
            return ids
        renamed = encoded(self._plain, self._renamed(text, own), add_special=False)
        return [real for i in renamed.ids for real in self._real_ids(i)]

    def _find(self, text: str) -> list[Found]:
        """Each control token that the tokenizer would find."""
        every = encoded(self._finder, text, add_special=False, offsets=True)
        places = zip(every.ids, every.offsets, strict=True)
        return [(self._found[i], *place) for i, place in places if i in self._found]

    def _renamed(self, text: str, found: list[Found]) -> str:
        pieces, at = [], 0
        for token_id, start, stop in found:
            written, token = self._texts[token_id], text[start:stop]  # perhaps in another spelling
            spelled = written if written in token else token.strip()
            pieces += [text[at:start], token.replace(spelled, self._names[token_id], 1)]
            at = stop
        return "".join([*pieces, text[at:]])

    def _real_ids(self, token_id: int) -> Sequence[int]:
        if token_id in self._real:
            return (self._real[token_id],)
        if token_id in self._spelled:
            return [t.id for character in self._spelled[token_id] for t in self._plain.model.tokenize(character)]
        return (token_id,)

    def _may_be_of_a_token(self, text: str) -> bool:
        """Whether a template that slices and joins strings could form a control token from this text or part of it."""
        return any(pair in spelling for spelling in self._spellings(text) for pair in self._pairs)

    def _pairs_of(self, text: str) -> Iterator[str]:
        """Adjacent characters in a control token that are rare in other text; for a plain word, the whole word."""
        for spelling in self._spellings(text):
            pairs = [a + b for a, b in itertools.pairwise(spelling) if not (_is_wordlike(a) and _is_wordlike(b))]
            yield from pairs or [spelling]

    def _spellings(self, text: str) -> tuple[str, ...]:
        normalizer = self._backend.normalizer
        return (text,) if normalizer is None else (text, normalizer.normalize_str(text))

    def _is_word(self, token_id: int, text: str) -> bool:
        """Whether the vocabulary also has the control token's text as an ordinary token, which must not be produced."""
        return token_id in encoded(self._plain, text, add_special=False).ids and token_id not in self._unknown


def _is_wordlike(character: str) -> bool:
    return character.isalnum() or character == "_"


def _are_own(found: list[Found], shown: str) -> bool:
    return not any(BLANK.search(shown, start, stop) for _, start, stop in found)


def _unknown(backend: tokenizers.Tokenizer) -> set[int]:
    """The unknown token: it is special, but ordinary text may produce it."""
    try:
        return {token.id for token in backend.model.tokenize(EDGE)}
    except Exception:  # noqa: BLE001 # it has no such token; tokenizers raises nothing narrower
        return set()


def _fill_holes(tokenizer: tokenizers.Tokenizer, nonce: str) -> None:
    """Until the next added token gets an id that no word has: the library counts from the vocabulary's size on."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    missing = max(vocabulary.values(), default=-1) + 1 - len(vocabulary)
    tokenizer.add_tokens([f"{EDGE}{nonce}h{i}{EDGE}" for i in range(missing)])


def _with_added(
    tokenizer: tokenizers.Tokenizer, backend: tokenizers.Tokenizer, names: Mapping[int, str]
) -> tokenizers.Tokenizer:
    """`tokenizer` with the normalizer and the added tokens of `backend`, some of them under other names."""
    if backend.normalizer is not None:
        tokenizer.normalizer = backend.normalizer
    added = sorted(backend.get_added_tokens_decoder().items())
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    tokenizer.add_tokens(
        [AddedToken(names.get(i, t.content), **{flag: getattr(t, flag) for flag in flags}) for i, t in added]
    )
    return tokenizer
