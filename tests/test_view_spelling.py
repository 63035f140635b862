"""How single tokens read: spaces kept, pieces of characters as bytes, in byte-level and SentencePiece vocabularies."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from quantkd.view.spelling import decode_text, spell_tokens
from tests.conftest import build_tiny_tokenizer

BYTE_LEVEL = build_tiny_tokenizer()


def build_sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary as Llama 2's: ▁ for a space, <0xNN> for bytes, and a decoder that drops the first space."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "▁the", "é"]
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_the_pieces_of_a_text_are_its_bytes(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    spelled = spell_tokens(BYTE_LEVEL, ids)
    pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in map(spelled.__getitem__, ids)]
    assert b"".join(pieces) == text.encode()
    for piece in map(spelled.__getitem__, ids):
        if isinstance(piece, bytes):  # whatever is text by itself is shown as text
            with pytest.raises(UnicodeDecodeError):
                piece.decode()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("▁a", " a"), ("▁", " "), ("▁the", " the"), ("a", "a"), ("é", "é"), ("<0xF0>", b"\xf0"), ("<0x0A>", "\n"),
     ("<0x41>", "A")],
)  # fmt: skip
def test_sentencepiece_tokens_keep_their_space_and_bytes(name: str, expected: str | bytes) -> None:
    tokenizer = build_sentencepiece_tokenizer()
    index = tokenizer.convert_tokens_to_ids(name)
    assert spell_tokens(tokenizer, [index]) == {index: expected}


def test_special_and_unknown_ids_have_a_name() -> None:
    end = BYTE_LEVEL.convert_tokens_to_ids("<|im_end|>")
    assert spell_tokens(BYTE_LEVEL, [end, 5000, end]) == {end: "<|im_end|>", 5000: "<id 5000>"}
    assert decode_text(BYTE_LEVEL, [end, *BYTE_LEVEL.encode(" a , b", add_special_tokens=False)]) == "<|im_end|> a , b"
