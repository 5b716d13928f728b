"""Tokens as texts, for log-probabilities, and as bytes, for grammars."""

from __future__ import annotations

import re
from collections.abc import Iterable

from jaxlm.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"


class Spelling:
    """The bytes that each token stands for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        space = tokenizer.id_of("Ġ")
        self._letters = _byte_letters() if space is not None and "Ġ" not in tokenizer.decode([space]) else None
        self._known: dict[int, bytes] = {}

    def spelled(self, index: int) -> bytes:
        """What a token adds to a text; nothing for an id beyond the vocabulary."""
        if index not in self._known:
            self._known[index] = self._bytes(index)
        return self._known[index]

    def _bytes(self, index: int) -> bytes:
        tokenizer = self._tokenizer
        if index >= tokenizer.vocab_size:
            return b""
        piece = tokenizer.token(index)
        if index in tokenizer.special_ids:
            return piece.encode()
        if self._letters is not None:
            known = [self._letters.get(letter) for letter in piece]
            return piece.encode() if None in known else bytes(byte for byte in known if byte is not None)
        match = _BYTE.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece.replace(_SPACE, " ").encode()

    def text(self, index: int) -> str:
        """A token's text; of one that holds part of a character its bytes, as OpenAI writes them."""
        spelled = self.spelled(index)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def keyed(self, scored: Iterable[tuple[int, float]]) -> dict[str, float]:
        """Log-probabilities by text; a token whose text another one has too is named `token_id:NUMBER`."""
        result: dict[str, float] = {}
        seen: set[int] = set()
        for index, logprob in scored:
            if index not in seen:
                text = self.text(index)
                result[text if text not in result else f"token_id:{index}"] = logprob
            seen.add(index)
        return result


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte (GPT-2's `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}
