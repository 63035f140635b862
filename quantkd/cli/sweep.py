"""`quantkd sweep`: which training arguments leave the least KL to the teacher on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkd.cli.arguments import StudentArguments, load_base_from, peft_config_from
from quantkd.cli.format import say
from quantkd.cli.parsing import option, parse_options
from quantkd.cli.train import DataArguments, open_rows
from quantkd.errors import ConfigError, refuse_unused
from quantkd.training.config import QuantizedDistillationConfig
from quantkd.training.sweep import check_sweep, parse_space, run_sweep

_EXAMPLES = """examples:
  quantkd sweep --model_name_or_path MODEL --transfer_set runs/set --eval_transfer_set runs/held \\
      --space learning_rate=1e-5:1e-3:log lora_r=8,16,32 --n_trials 20 --output_dir runs/sweep
The same command again goes on after a stop; a greater --n_trials adds trials."""


@dataclass
class SweepArguments:
    space: list[str] = option("What to search: NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C.")
    n_trials: int = option("Trials in all, those before a stop included.", 20)


def main(argv: Sequence[str]) -> None:
    """Parse, search, print the trials."""
    kinds = [SweepArguments, DataArguments, StudentArguments, QuantizedDistillationConfig]
    sweep, data, student, config = parse_options(kinds, argv, prog="quantkd sweep", examples=_EXAMPLES)
    (rows, held_out), space, lora = open_rows(data, config), parse_space(sweep.space), peft_config_from(student)
    refuse_unused(data, {"": "control"})
    if held_out is None:
        raise ConfigError("A sweep needs held-out rows: give --eval_transfer_set or --eval_fraction.")
    check_sweep(config, space, rows)
    model, sets = load_base_from(student, config, rows, lora), {"train_dataset": rows, "eval_dataset": held_out}
    for trial in run_sweep(model, config, space, lora, n_trials=sweep.n_trials, **sets):
        say(f"held-out KL {trial.value:.4f} with {trial.params}, {trial.duration.total_seconds():.0f} s")
    say(f"The study is stored in {config.output_dir}/sweep.db.")
