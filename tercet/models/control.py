"""Chat prompts in which only the template writes control tokens. Imports no torch.

A user who types <|im_start|>system must not open a system turn, so the control tokens in a message's text are
encoded as ordinary text, those of the template as themselves:

messages --hide--> their control tokens begin with a stand-in --template--> text in which every control token is the
template's --rename--> those under names that nobody can guess --encode--> by a tokenizer that knows only these names
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from tercet.errors import InvalidRequest
from tercet.models.encoding import encoded

PRIVATE_USE = range(0xE000, 0xF8FF)  # code points that mean nothing; those that no text has can stand in
EDGE = "\uf8ff"  # of a secret name: no letter, so that the text beside it is as if beside a bracket


class ControlTokens:
    def __init__(self, backend: tokenizers.Tokenizer, ids: Iterable[int]) -> None:
        """ids: added tokens of `backend` that are control tokens, one or more."""
        added = backend.get_added_tokens_decoder()
        self._texts = {i: added[i].content for i in ids}
        self._firsts = {text[0] for text in self._texts.values()}
        self._begin = _begins(self._texts.values())
        if backend.normalizer is not None and any(added[i].normalized for i in self._texts):
            self._firsts = _spellings(self._texts.values(), backend.normalizer)
            self._begin = re.compile(f"[{re.escape(''.join(self._firsts))}]")
        nonce = secrets.token_hex(8)
        names = {i: f"{EDGE}{nonce}x{i}{EDGE}" for i in self._texts}
        anything = models.WordLevel({"?": 0}, unk_token="?")  # noqa: S106 # a token, no password
        self._finder = _with_added(tokenizers.Tokenizer(anything), backend, {})
        # The model itself is shared, so this costs no memory.
        self._plain = _with_added(tokenizers.Tokenizer(backend.model), backend, names)
        self._plain.pre_tokenizer = backend.pre_tokenizer
        self._real = {self._plain.token_to_id(names.get(i, token.content)): i for i, token in added.items()}
        self._found = {self._finder.token_to_id(text): (text, names[i]) for i, text in self._texts.items()}
        self._unknown = _unknown(backend)
        self._spelled = {i: text for i, text in self._texts.items() if self._is_word(i, text)}

    def occur_in(self, value: Any) -> bool:
        """Whether some text in there could be read as a control token."""
        return bool(self._spelled) or any(self._begin.search(text) for text in _strings(value))

    def hide(self, value: Any, stand_ins: Mapping[str, str]) -> Any:
        """The value with each character that begins a control token, or may by what follows, replaced."""
        if isinstance(value, str):
            return self._begin.sub(lambda match: stand_ins[match.group()], value)
        if isinstance(value, Mapping):
            return {
                k if k.isidentifier() else self.hide(k, stand_ins): v if _is_name(k, v) else self.hide(v, stand_ins)
                for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.hide(item, stand_ins) for item in value]
        return value

    def stand_ins(self, *seen: Any) -> dict[str, str]:
        """What may begin a control token -> a character that occurs nowhere in what is seen. Raises InvalidRequest."""
        used = set[str]().union(*map(set, _strings(seen)))
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        chosen = dict(zip(sorted(self._firsts), free, strict=False))
        if len(chosen) < len(self._firsts):
            raise InvalidRequest("messages: the text uses every private-use character of Unicode's first plane")
        return chosen

    def encode(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """A rendered chat to ids; the control tokens in it are the template's."""
        text = self._renamed(text)
        for character, stand_in in stand_ins.items():
            text = text.replace(stand_in, character)
        return [real for i in encoded(self._plain, text, add_special=False).ids for real in self._real_ids(i)]

    def _real_ids(self, token_id: int) -> Sequence[int]:
        if token_id in self._real:
            return (self._real[token_id],)
        if token_id in self._spelled:
            return [t.id for character in self._spelled[token_id] for t in self._plain.model.tokenize(character)]
        return (token_id,)

    def _is_word(self, token_id: int, text: str) -> bool:
        """Whether the vocabulary has the control token's text as an ordinary word too; that must be spelled out."""
        return token_id in encoded(self._plain, text, add_special=False).ids and token_id not in self._unknown

    def _renamed(self, text: str) -> str:
        """Each control token that the tokenizer would find, under its secret name."""
        found = encoded(self._finder, text, add_special=False, offsets=True)
        pieces, at = [], 0
        for token_id, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if token_id in self._found:
                written, name = self._found[token_id]
                token = text[start:stop]  # with the spaces that it swallows, and perhaps in another spelling
                pieces += [text[at:start], token.replace(written if written in token else token.strip(), name, 1)]
                at = stop
        return "".join([*pieces, text[at:]])


def _unknown(backend: tokenizers.Tokenizer) -> set[int]:
    """What the model makes of a character that it does not know: a special token that ordinary text makes too."""
    try:
        return {token.id for token in backend.model.tokenize(EDGE)}
    except Exception:  # noqa: BLE001 # it has no such token; tokenizers raises nothing narrower
        return set()


def _is_name(key: str, value: Any) -> bool:
    """What templates compare and do not print."""
    return key in ("role", "type") and isinstance(value, str) and value.isidentifier()


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


def _begins(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches the first character of each of the tokens, and of each beginning of one that ends the text, since
    templates join texts and strip them."""
    by_first: dict[str, set[str]] = {}
    for token in tokens:
        by_first.setdefault(token[0], set()).add(token[1:])
    branches = []
    for first, rests in by_first.items():
        cut = {rest[:k] for rest in rests for k in range(len(rest))}
        branches.append(rf"{re.escape(first)}(?={_either(rests)}|{_either(cut)}\s*\Z)" if cut else re.escape(first))
    return re.compile("|".join(branches))


def _spellings(tokens: Iterable[str], normalizer: tokenizers.normalizers.Normalizer) -> set[str]:
    """Every character that may begin one of the tokens, once it is normalised: < also as in the fullwidth forms."""
    normalised = {normalizer.normalize_str(token).lstrip("▁ ")[:1] for token in tokens}
    firsts = {token[0] for token in tokens} | normalised - {""}
    letters = map(chr, chain(range(0xD800), range(0xE000, 0x20000)))  # beyond are no forms of others
    return firsts | {letter for letter in letters if not firsts.isdisjoint(normalizer.normalize_str(letter))}


def _either(words: set[str]) -> str:
    """A pattern for any of the words that looks at each character once, however many words there are."""
    rests: dict[str, set[str]] = {}
    for word in words:
        if word:
            rests.setdefault(word[0], set()).add(word[1:])
    branches = "|".join(re.escape(first) + _either(rest) for first, rest in rests.items())
    if "" in words:
        return f"(?:{branches})?" if branches else ""
    return branches if len(rests) == 1 else f"(?:{branches})"


def _strings(value: Any) -> Iterator[str]:
    """Every text in there, keys as well."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
