"""What must agree between a transfer set, the objective and the student, checked before the first step."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantkd.errors import ConfigError, DataError
from quantkd.models.weights import count_rows
from quantkd.training.config import QuantizedDistillationConfig
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.collator import DistillationCollator
from quantkd.transfer_set.fingerprint import check_fingerprint


def find_transfer_sets(train_dataset: Any, eval_dataset: Any) -> list[TransferSet]:
    """The transfer sets among the trainer's data."""
    held_out = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    return [dataset for dataset in (train_dataset, *held_out) if isinstance(dataset, TransferSet)]


def check_transfer_set(
    transfer_set: TransferSet, tokenizer: PreTrainedTokenizerBase, args: QuantizedDistillationConfig
) -> None:
    """Refuse a set that another tokenizer wrote, or that the objective cannot be computed from."""
    info = transfer_set.info
    what = f"The transfer set of teacher {info.teacher_name}"
    check_fingerprint(info.tokenizer_fingerprint, tokenizer, what=what)
    if args.temperature != 1.0 and args.temperature not in info.temperatures:
        raise ConfigError(
            f"{what} holds log-normalizers for temperatures {', '.join(map(str, info.temperatures))}; training asked "
            f"for {args.temperature}. Train with one of those, or capture again with --temperatures {args.temperature}."
        )
    if info.storage["kind"] == "sampled" and args.divergence == "reverse_kl":
        raise ConfigError(
            f"{what} stores sampled entries, which leave no mass to the tail, so reverse KL is infinite. "
            "Use forward_kl or jsd, or capture Nucleus or TopK entries."
        )


def check_collator(collator: Any, args: QuantizedDistillationConfig) -> None:
    """Refuse packing with a collator that does not know how."""
    if args.packing and not isinstance(collator, DistillationCollator):
        raise ConfigError(
            f"packing=True packs with a DistillationCollator, found the data_collator {type(collator).__name__}. "
            "Leave data_collator out, or pack in your own and leave packing off."
        )


def check_student(transfer_set: TransferSet, model: PreTrainedModel | PeftModel) -> None:
    """Refuse a student whose vocabulary or context does not hold the set's rows."""
    if not len(transfer_set):
        raise DataError("The transfer set holds 0 rows; expected at least one. Capture some, or select others.")
    config = model.config.get_text_config()
    width = count_rows(model.get_output_embeddings().weight)
    if width < transfer_set.info.vocab_size:
        raise ConfigError(
            f"The student's head has {width} rows, and the transfer set's entries may have ids up to "
            f"{transfer_set.info.vocab_size - 1}. Distil into a student of the same vocabulary; if the tokenizer has "
            "fewer ids than that, the set was captured with the padding of the teacher's head: capture it again."
        )
    context = getattr(config, "max_position_embeddings", None)
    longest = int(transfer_set.lengths.max())
    if context is not None and longest > context:
        raise DataError(
            f"A row of the transfer set has {longest} tokens, the student's context holds {context}. "
            "Capture with shorter prompts or fewer new tokens, or leave out long rows with transfer_set.select(...)."
        )
