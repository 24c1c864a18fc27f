"""Bytes as GPT-2's vocabularies write them: one printable character each."""

from __future__ import annotations


def _character_of() -> dict[int, str]:
    """Printable Latin-1 stands for itself, the 68 other bytes for U+0100 and on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


CHARACTER_OF = _character_of()  # byte -> character
_BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}


def token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; one with any other character is plain text, encoded as UTF-8."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()
