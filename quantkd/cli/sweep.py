"""`quantkd sweep`: which training arguments leave the least KL to the teacher on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkd.cli.arguments import StudentArguments, load_student_from, peft_config_from
from quantkd.cli.parsing import parse_options
from quantkd.cli.train import DataArguments
from quantkd.errors import ConfigError
from quantkd.training.config import QuantizedDistillationConfig
from quantkd.training.search_space import parse_space
from quantkd.training.sweep import run_sweep
from quantkd.training.sweep_trials import Trial
from quantkd.transfer_set import TransferSet

_EXAMPLES = """examples:
  quantkd sweep --model_name_or_path MODEL --transfer_set runs/set --eval_transfer_set runs/held \\
      --space learning_rate=1e-5:1e-3:log lora_r=8,16,32 --n_trials 20 --output_dir runs/sweep
  quantkd sweep --model_name_or_path MODEL --transfer_set runs/set --eval_fraction 0.1 \\
      --space learning_rate=5e-5,2e-4 alpha=0.2:1 temperature=1.0,2.0 --max_steps 50 --output_dir runs/sweep
  quantkd sweep --config sweep.yaml
A stopped sweep goes on when the same command is given again; a greater --n_trials adds trials.
"""


@dataclass
class SweepArguments:
    """What to search, and how long."""

    space: list[str] = field(
        metadata={"help": "What to search: NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C, one or several."}
    )
    n_trials: int = field(default=20, metadata={"help": "Trials in all, those before a stop included."})


def main(argv: Sequence[str]) -> None:
    """Parse, search, print the table."""
    kinds = [SweepArguments, DataArguments, StudentArguments, QuantizedDistillationConfig]
    sweep, data, student, config = parse_options(kinds, argv, prog="quantkd sweep", examples=_EXAMPLES)
    space = parse_space(sweep.space)
    if bool(data.eval_transfer_set) == bool(data.eval_fraction):
        raise ConfigError("A sweep is decided on held-out rows: give eval_transfer_set or eval_fraction.")
    rows = TransferSet.open(data.transfer_set)
    if data.eval_transfer_set:
        held_out = TransferSet.open(data.eval_transfer_set)
    else:
        rows, held_out = rows.split(data.eval_fraction, seed=config.seed)
    trials = run_sweep(
        load_student_from(student),
        config,
        space,
        train_dataset=rows,
        eval_dataset=held_out,
        n_trials=sweep.n_trials,
        peft_config=peft_config_from(student),
        on_trial=lambda trial: print(f"trial {trial.place + 1} of {sweep.n_trials}: {_describe(trial)}", flush=True),
    )
    print(_format_table(trials, [dimension.name for dimension in space]))
    print(f"\nThe sweep lies in {Path(str(config.output_dir)) / 'sweep.json'}, with a picture beside it.")


def _describe(trial: Trial) -> str:
    params = ", ".join(f"{name} {_format(value)}" for name, value in trial.params.items())
    return f"KL {'diverged' if trial.value is None else f'{trial.value:.4f}'} with {params}, {trial.seconds:.0f} s"


def _format_table(trials: Sequence[Trial], names: Sequence[str]) -> str:
    """The trials, the best first."""
    ordered = sorted(trials, key=lambda trial: (trial.value is None, trial.value))
    rows = [["trial", "held-out KL", *names, "seconds"]]
    for trial in ordered:
        value = "diverged" if trial.value is None else f"{trial.value:.4f}"
        rows.append(
            [str(trial.place + 1), value, *(_format(trial.params[name]) for name in names), f"{trial.seconds:.1f}"]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["", lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
