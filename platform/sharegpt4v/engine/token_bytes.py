"""What a token adds to a text, in bytes: some tokens are a part of a character."""

import json
from functools import lru_cache

from transformers import PreTrainedTokenizerFast


class TokenBytes:
    """Looks tokens up in a tokenizer: byte-level BPE, or SentencePiece with its byte tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._control = frozenset(tokenizer.all_special_ids)
        self._is_byte_level = '"ByteLevel"' in json.dumps(
            json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
        )

    def __call__(self, token: int) -> bytes:
        """Returns the UTF-8 bytes of a token; none for a control token and for an id without a token."""
        piece = None if token in self._control else self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""
        if self._is_byte_level:
            table = _bytes_by_letter()
            if all(letter in table for letter in piece):
                return bytes(table[letter] for letter in piece)
        elif piece.startswith("<0x") and piece.endswith(">") and len(piece) == 6:
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode("utf-8", "replace")


@lru_cache(1)
def _bytes_by_letter() -> dict[str, int]:
    """Returns the byte that each letter of a byte-level vocabulary is.

    Printable bytes of Latin-1 are their own letters; the others, in order, are the letters from U+0100 on
    (GPT-2's tokenizer).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
