"""`quantkd export`: a trained student as a 16-bit checkpoint, a 4-bit one, or the adapter alone."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from quantkd.cli.arguments import StudentArguments, load_student_from
from quantkd.cli.parsing import parse_options
from quantkd.errors import ConfigError
from quantkd.evaluation.arms import EvaluationSettings
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.evaluation.measure import evaluate_arm
from quantkd.hardware import process_state
from quantkd.hub.adapters import fetch_adapter, load_adapter
from quantkd.models.export import (
    FORMS,
    check_output_dir,
    export_adapter,
    export_checkpoint,
    load_exported,
)
from quantkd.models.provenance import Provenance
from quantkd.names import load_tokenizer
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.fingerprint import check_fingerprint

_EXAMPLES = """examples:
  quantkd export --form merged --model_name_or_path MODEL --adapter runs/student --output_dir runs/merged
  quantkd export --form merged --model_name_or_path MODEL --adapter runs/student --output_dir runs/merged \\
      --held_out runs/held --run_dir runs/x
  quantkd export --form requantized --model_name_or_path MODEL --adapter runs/student --output_dir runs/4bit \\
      --held_out runs/held
  quantkd export --form adapter --model_name_or_path MODEL --adapter runs/student/checkpoint-40 --output_dir runs/a
"""


@dataclass
class ExportArguments:
    """What to export, in which form, and what to score it on."""

    adapter: str = field(
        metadata={"help": "Folder of a trained adapter, or user/name or user/name@revision on the Hub."}
    )
    output_dir: str = field(metadata={"help": "A new folder for the export."})
    form: str = field(
        metadata={"help": "merged: 16 bit; requantized: merged and rounded to 4 bit again; adapter: PEFT's files."}
    )
    save_dtype: str = field(
        default="bfloat16",
        metadata={"help": "Dtype of merged weights.", "choices": ["bfloat16", "float16", "float32"]},
    )
    held_out: str | None = field(default=None, metadata={"help": "Transfer set to score on, before and after."})
    run_dir: str | None = field(default=None, metadata={"help": "Write the scores into this run's report, as arms."})
    accept_loss: bool = field(
        default=False, metadata={"help": "Let --form requantized lose some of what was learned, without a measurement."}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows a batch while scoring."})


def main(argv: Sequence[str]) -> None:
    """Parse, export, score."""
    args, student = parse_options([ExportArguments, StudentArguments], argv, prog="quantkd export", examples=_EXAMPLES)
    _check(args, student)
    held_out = TransferSet.open(args.held_out) if args.held_out else None
    adapter = str(fetch_adapter(args.adapter))
    tokenizer = _load_tokenizer(args.adapter, student)
    if held_out is not None:
        what = f"The held-out set of teacher {held_out.info.teacher_name}"
        check_fingerprint(held_out.info.tokenizer_fingerprint, tokenizer, what=what, parts=("vocabulary",))
    score = _Scores(args, student, tokenizer, held_out)
    if args.form == "adapter":
        path = export_adapter(adapter, tokenizer, args.output_dir, base=student.model_name_or_path)
        if held_out is not None:
            score.measure("after", _load_adapted(student, str(path)))
    else:
        model = _load_adapted(student, adapter)
        if held_out is not None:
            score.measure("after", model)
        facts = Provenance.read(adapter)
        path = export_checkpoint(
            model, tokenizer, args.output_dir, form=args.form, dtype=args.save_dtype, provenance=facts
        )
        del model
        gc.collect()
        if held_out is not None:
            score.measure(args.form, load_exported(path))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(f"{path}: {args.form}, {size / 1e6:,.1f} MB.")
    score.show()


def _check(args: ExportArguments, student: StudentArguments) -> None:
    if args.form not in FORMS:
        raise ConfigError(f"form is one of {', '.join(FORMS)}, found {args.form!r}.")
    if not student.model_name_or_path:
        raise ConfigError("Which model? Give --model_name_or_path, the teacher's own checkpoint.")
    if process_state().num_processes > 1:
        raise ConfigError("An export is written by one process. Run it without a launcher.")
    if args.run_dir and not args.held_out:
        raise ConfigError("--run_dir takes scores, and there is nothing to score on. Give --held_out, too.")
    if args.form == "requantized" and not (args.accept_loss or args.held_out):
        raise ConfigError(
            "A merge straight into 4 bit rounds a second time and loses part of what was learned. Give --held_out SET "
            "to see how much, or --accept_loss to take it unseen; --form merged and --form adapter lose next to none."
        )
    check_output_dir(args.output_dir)


def _load_tokenizer(adapter: str, student: StudentArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that was trained with, where it lies beside the adapter; else the base model's."""
    if (Path(adapter) / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter)
    return load_tokenizer(str(student.model_name_or_path), revision=student.model_revision)


def _load_adapted(student: StudentArguments, adapter: str) -> PeftModel:
    return load_adapter(load_student_from(student), adapter)


class _Scores:
    """KL of each form that was measured, and where it is written."""

    def __init__(
        self,
        args: ExportArguments,
        student: StudentArguments,
        tokenizer: PreTrainedTokenizerBase,
        held_out: TransferSet | None,
    ) -> None:
        self.args, self.student, self.tokenizer, self.held_out = args, student, tokenizer, held_out
        self.kl: dict[str, float] = {}

    def measure(self, arm: str, model: Any) -> None:
        """Score one form on the held-out rows; into the run's folder if there is one."""
        assert self.held_out is not None and self.student.model_name_or_path
        size = self.args.batch_size
        if self.args.run_dir is None:
            self.kl[arm] = evaluate_fidelity(model, self.held_out, batch_size=size).means["kl"]
            return
        fidelity = evaluate_arm(
            model,
            self.tokenizer,
            self.args.run_dir,
            arm=arm,
            model_name=self.student.model_name_or_path,
            held_out=self.held_out,
            settings=EvaluationSettings(size),
        ).fidelity
        assert fidelity is not None
        self.kl[arm] = fidelity.means["kl"]

    def show(self) -> None:
        """Print what was measured, and warn of what a second rounding costs."""
        if self.args.form == "requantized" and self.held_out is None:
            print("quantkd export: warning: what the second rounding costs was not measured.", file=sys.stderr)
        if self.held_out is None:
            return
        names = {"after": "adapter", "merged": "merged", "requantized": "merged and quantized again"}
        figures = ", ".join(f"{names[arm]} {kl:.6f}" for arm, kl in self.kl.items())
        print(f"KL to the teacher on {len(self.held_out)} rows, nats a token: {figures}.")
        if "requantized" in self.kl:
            before, after = self.kl["after"], self.kl["requantized"]
            print(
                f"quantkd export: warning: the second rounding took part of what was learned away: KL {before:.4f} "
                f"with the adapter, {after:.4f} in this checkpoint. --form merged and --form adapter do without it.",
                file=sys.stderr,
            )
