"""`quantkd train`: train a quantized student on a transfer set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkd.cli.arguments import ADAPTERS, StudentArguments, load_base_from, peft_config_from
from quantkd.cli.format import say
from quantkd.cli.parsing import option, parse_options, save_options
from quantkd.errors import ConfigError
from quantkd.foreign import installed_trackers
from quantkd.training.checkpoints import find_checkpoint
from quantkd.training.config import QuantizedDistillationConfig
from quantkd.training.preparation import check_evaluation
from quantkd.training.trainer import QuantizedDistillationTrainer
from quantkd.transfer_set import TransferSet

_EXAMPLES = """examples:
  quantkd train --model_name_or_path MODEL --transfer_set runs/set --output_dir runs/student
  quantkd train --model_name_or_path MODEL --transfer_set runs/set --eval_fraction 0.1 --lora_r 32 --alpha 0.9
  quantkd train --config train.yaml --output_dir runs/student
  quantkd train --config runs/student/config.yaml --output_dir runs/again          the same run once more
  quantkd train --config train.yaml --output_dir runs/student --control ce     writes to runs/student-control
  accelerate launch -m quantkd train --config train.yaml --output_dir runs/student
"""


@dataclass
class DataArguments:
    """What to learn from."""

    transfer_set: str = option("The transfer set to learn from: a folder, or a name on the Hub.")
    eval_transfer_set: str | None = option("Held-out rows: a folder, or a name on the Hub.", None)
    eval_fraction: float | None = option("Or: hold out this fraction of the rows of --transfer_set.", None)
    control: str | None = option(
        "Train a student with cross-entropy only, for comparison, into OUTPUT_DIR-control.", None, choices=["ce"]
    )


def main(argv: Sequence[str]) -> None:
    """Parse, train, save."""
    kinds = [DataArguments, StudentArguments, QuantizedDistillationConfig]
    data, student, config = parse_options(kinds, argv, prog="quantkd train", examples=_EXAMPLES)
    _check(config)
    if data.control and config.push_to_hub:
        raise ConfigError("A control is for comparison, not to be published. Leave push_to_hub off.")
    if data.control:
        config.alpha, config.output_dir = 0.0, f"{config.output_dir}-control"
    config.resume_from_checkpoint = find_checkpoint(config.resume_from_checkpoint, str(config.output_dir))
    rows, held_out = open_rows(data, config)
    if config.init_from and student.model_name_or_path.endswith(".gguf"):  # that of a checkpoint
        student.gguf_file, student.model_name_or_path = student.model_name_or_path, config.init_from
    lora = peft_config_from(student) if student.use_peft or not config.train_scales else None
    student.refuse(ADAPTERS if lora is None else "lora_r" * (config.adapter_budget is not None))
    check_evaluation(config, held_out)
    model = load_base_from(student, config, rows, lora)
    sets: dict[str, Any] = {"train_dataset": rows, "eval_dataset": held_out}
    trainer = QuantizedDistillationTrainer(model, config, peft_config=lora, **sets)
    if trainer.is_world_process_zero():
        save_options(kinds, argv, Path(config.output_dir) / "config.yaml", prog="quantkd train")
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    if held_out is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        what = "student" if lora is None else "adapter"
        say(f"The {what} is stored in {config.output_dir}.")


def open_rows(data: DataArguments, config: QuantizedDistillationConfig) -> tuple[TransferSet, TransferSet | None]:
    """The rows to learn from, and the held-out ones if there are any."""
    if config.model_init_kwargs or config.teacher_model_init_kwargs:
        raise ConfigError(
            "model_init_kwargs and teacher_model_init_kwargs are for models that Python code gives by name. Use "
            "--dtype, --model_revision, --attn_implementation and --trust_remote_code instead."
        )
    if data.eval_transfer_set and data.eval_fraction:
        raise ConfigError("Give eval_transfer_set or eval_fraction, not both.")
    rows = TransferSet.open(data.transfer_set)
    if data.eval_fraction:
        return rows.split(data.eval_fraction, seed=config.seed)
    return rows, TransferSet.open(data.eval_transfer_set) if data.eval_transfer_set else None


def _check(config: QuantizedDistillationConfig) -> None:
    """Refuse what the Trainer would trip over once the model is loaded."""
    installed = installed_trackers()
    # transformers does not look for Flyte, which its jobs bring along.
    missing = [name for name in config.report_to or () if name not in (*installed, "flyte")]
    if missing:
        raise ConfigError(
            f"--report_to names {', '.join(missing)}; installed here: {', '.join(installed) or 'none'}. Install the "
            "tracker's package, or leave --report_to out: training.png in the output folder has the curves."
        )
