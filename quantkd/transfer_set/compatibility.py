"""What must agree between a transfer set and whatever is trained on it, checked before the first step."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from quantkd.errors import ConfigError, DataError
from quantkd.transfer_set.fingerprint import check_fingerprint
from quantkd.transfer_set.reader import TransferSet


def check_transfer_set(
    transfer_set: TransferSet, tokenizer: PreTrainedTokenizerBase, temperature: float, divergence: str
) -> None:
    """Refuse a set that another tokenizer wrote, or that the objective cannot be computed from."""
    info = transfer_set.info
    what = f"The transfer set of teacher {info.teacher_name}"
    check_fingerprint(info.tokenizer_fingerprint, tokenizer, what=what)
    if temperature != 1.0 and temperature not in info.temperatures:
        raise ConfigError(
            f"{what} holds log-normalizers for temperatures {', '.join(map(str, info.temperatures))}; training asked "
            f"for {temperature}. Train with one of those, or capture again with --temperatures {temperature}."
        )
    if divergence == "reverse_kl" and any(rule["kind"] == "sampled" for rule in transfer_set.storage_rules):
        raise ConfigError(
            f"{what} stores sampled entries, which leave no mass to the tail, so reverse KL is infinite. "
            "Use forward_kl or jsd, or capture Nucleus or TopK entries."
        )


def check_student(transfer_set: TransferSet, head_width: int, context_length: int | None) -> None:
    """Refuse a student whose vocabulary or context does not hold the set's rows."""
    if not len(transfer_set):
        raise DataError("The transfer set holds 0 rows; expected at least one. Capture some, or select others.")
    if head_width < transfer_set.info.vocab_size:
        raise ConfigError(
            f"The student's head has {head_width} rows, and the transfer set's entries may have ids up to "
            f"{transfer_set.info.vocab_size - 1}. Distil into a student of the same vocabulary; if the tokenizer has "
            "fewer ids than that, the set was captured with the padding of the teacher's head: capture it again."
        )
    longest = int(transfer_set.lengths.max())
    if context_length is not None and longest > context_length:
        raise DataError(
            f"A row of the transfer set has {longest} tokens, the student's context holds {context_length}. "
            "Capture with shorter prompts or fewer new tokens, or leave out long rows with transfer_set.select(...)."
        )
