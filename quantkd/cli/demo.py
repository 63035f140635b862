"""`quantkd demo`: capture, train, evaluate and report with a small real model, on a CPU, in minutes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkd.cli.format import say, say_results
from quantkd.cli.parsing import plain_parser
from quantkd.data.arithmetic import generate_problems
from quantkd.data.demo_model import load_demo_model
from quantkd.experiment import Experiment, run_experiment
from quantkd.models.export import CHECKPOINT_FORMS
from quantkd.models.student import STUDENT_FORMATS, default_lora_config
from quantkd.teacher import GenerationSettings, RunSettings
from quantkd.training.config import QuantizedDistillationConfig

_CURVE_ROWS = 8  # six seconds on one core each time that they are measured
_EXAMPLES = """examples:
  quantkd demo
  quantkd demo --control ce --exports merged requantized
  quantkd demo --train_rows 256 --epochs 2 --output_dir runs/longer
"""


def main(argv: Sequence[str]) -> None:
    """Capture, train, evaluate and report on generated word problems, then print the table."""
    parser = plain_parser("quantkd demo", _EXAMPLES)
    parser.add_argument("--output_dir", default="runs/demo", help="where everything is written (runs/demo)")
    parser.add_argument("--train_rows", type=int, default=64, help="problems to learn from (64)")
    parser.add_argument("--held_out_rows", type=int, default=32, help="problems to measure fidelity on (32)")
    parser.add_argument("--test_rows", type=int, default=32, help="problems to solve before and after training (32)")
    parser.add_argument("--epochs", type=float, default=1, help="passes over the transfer set (1)")
    parser.add_argument("--student_format", default="nf4", choices=STUDENT_FORMATS, help="student's format (nf4)")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank (16)")
    control = "also train a student with cross-entropy only, for comparison (ce)"
    parser.add_argument("--control", default="ce", choices=["ce", "none"], help=control)
    exports = "also export the student in these forms and measure them"
    parser.add_argument("--exports", nargs="+", default=[], choices=CHECKPOINT_FORMS, help=exports)
    parser.add_argument("--force", action="store_true", help="measure again what was measured before")
    parser.add_argument("--seed", type=int, default=0, help="seed of problems and training (0)")
    args = parser.parse_args(argv)
    train = generate_problems(args.train_rows, args.seed)
    held_out = generate_problems(args.held_out_rows, args.seed + 1, exclude=train)
    test = generate_problems(args.test_rows, args.seed + 2, exclude=[*train, *held_out])
    curve = generate_problems(_CURVE_ROWS, args.seed + 3, exclude=[*train, *held_out, *test])
    run_dir = Path(args.output_dir)
    report = run_experiment(
        Experiment(
            model=str(load_demo_model()),
            run_dir=run_dir,
            train_rows=train,
            held_out_rows=held_out,
            test_rows=test,
            curve_rows=curve,
            generation=GenerationSettings(128),
            run=RunSettings(batch_size=32),
            quantization_config=args.student_format,
            peft_config=default_lora_config(args.rank),
            eval_batch_size=32,
            control=args.control == "ce",
            exports=args.exports,
            force=args.force,
        ),
        QuantizedDistillationConfig(
            str(run_dir / "student"),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            alpha=1.0,
            packing=True,
            logging_steps=2,
            save_strategy="no",
            seed=args.seed,
        ),
    )
    say_results(run_dir)
    say(f"\nThe report is {report}, with results.json and the chart next to it. The adapter is in {run_dir}/student.")
