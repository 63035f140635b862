"""A tokenizer's fingerprint: what must agree between the teacher that wrote a set and the student that reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import TYPE_CHECKING

from quantkd.errors import TransferSetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where each part's digest is in the 64 hexadecimal digits, so that a mismatch can say which part differs.
_PARTS = {"vocabulary": slice(0, 24), "special tokens": slice(24, 40), "chat template": slice(40, 64)}


def compute_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of ids and strings, special tokens and chat template; not of the padding token, which trainers move."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    specials = {
        "added": sorted(
            (index, str(token)) for index, token in tokenizer.added_tokens_decoder.items() if token.special
        ),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }
    values = (vocabulary, specials, tokenizer.chat_template)
    digests = (hashlib.sha256(json.dumps(value).encode()).hexdigest() for value in values)
    return "".join(digest[part] for digest, part in zip(digests, _PARTS.values(), strict=True))


def count_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the greatest id that the tokenizer knows; a head is often padded beyond it, by model size."""
    return max(tokenizer.get_vocab().values()) + 1


def check_fingerprint(
    found: str, tokenizer: PreTrainedTokenizerBase, *, what: str, parts: Collection[str] = tuple(_PARTS)
) -> None:
    """Refuse a transfer set that another tokenizer wrote."""
    expected = compute_fingerprint(tokenizer)
    differing = [name for name, part in _PARTS.items() if name in parts and found[part] != expected[part]]
    if not differing:
        return
    remedy = "To train on the teacher's layout of a chat, pass the teacher's tokenizer as processing_class."
    if "vocabulary" in differing:
        remedy = (
            "Distil into a student of the teacher's own tokenizer, or capture again; from one tokenizer to another "
            "distils TRL's GOLDTrainer (trl.experimental.gold)."
        )
    raise TransferSetError(
        f"{what} was written with another tokenizer than the student's: the {' and the '.join(differing)} differ "
        f"(found {found}, expected {expected}). {remedy}"
    )
