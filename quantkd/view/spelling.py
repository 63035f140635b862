"""The text of single tokens with their leading space, or their bytes where they are not whole characters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece spells a byte


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of some ids, including special tokens and spaces."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def spell_tokens(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, str | bytes]:
    """The text of each id by itself, or its bytes if it is a part of a character, such as an emoji."""
    # Some decoders drop the space at the start of a text, so decode after another token and remove that one's text.
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = decode_text(tokenizer, anchor)
    spelled: dict[int, str | bytes] = {}
    for index in sorted(set(ids)):
        name: Any = tokenizer.convert_ids_to_tokens(index)  # annotated as a list too, which one id never gives
        if name is None:
            spelled[index] = f"<id {index}>"
            continue
        text = decode_text(tokenizer, [*anchor, index])
        text = text[len(before) :] if text.startswith(before) else decode_text(tokenizer, [index])
        spelled[index] = _spell_bytes(name) if "\ufffd" in text else text or name
    return spelled


def _spell_bytes(name: str) -> str | bytes:
    """The bytes of a token's name in the vocabulary, as text if they are text; the name if it has no bytes."""
    alphabet = _byte_alphabet()
    if found := _BYTE_TOKEN.fullmatch(name):
        raw = bytes([int(found[1], 16)])
    elif all(character in alphabet for character in name):
        raw = bytes(alphabet[character] for character in name)
    else:
        return name
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters for the 256 bytes (Radford et al. 2019): printable ones map to themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + n): byte for n, byte in enumerate(others)}}
