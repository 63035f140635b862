"""What the blocks of README and docs are run with: a tiny random model for each that they name, and what is given.

A page says with `<!-- given: NAME -->` what it takes for granted. The folder is empty otherwise, there is no network,
and data sets of the Hub are a few rows of the same columns.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from fake_hub import running_hub
from fake_openai_server import FakeServer
from test_transfer_set_importers import axolotl_rows, compressed_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = re.compile(
    r"(?:HuggingFaceTB|~/\.cache/quantkd)/SmolLM2-135M-Instruct|meta-llama/Llama-3\.\d-\d+B-Instruct|Qwen/Qwen2\.5-[\d.]+B-Instruct|\bMODEL\b"
)
SERVER = "http://127.0.0.1:8000/v1"
# Twenty trials of fifty steps show no more than two of two.
FEWER = [(r"\bn_trials( |=|: )20\b", r"n_trials\g<1>2"), (r"\bmax_steps( |=|: )50\b", r"max_steps\g<1>2")]
PENS = "A box holds {n} pens. How many pens are in {m} boxes?"


def _prompts(numbers: range) -> list[dict[str, Any]]:
    return [{"prompt": PENS.format(n=n, m=n + 1)} for n in numbers]


# Files that a page speaks of as the reader's own, by name.
FILES: dict[str, list[dict[str, Any]]] = {
    "prompts.jsonl": _prompts(range(20)),
    "held_out.jsonl": _prompts(range(20, 26)),
    "data.jsonl": [{**row, "completion": f"{n * (n + 1)} pens."} for n, row in enumerate(_prompts(range(4)))],
    "tasks/items.jsonl": [{"question": f"{n} + 2 =", "choices": [str(n + 2), str(n)], "label": 0} for n in range(3)],
}
# What the Hub's data sets hold, as far as the pages read it.
SUMS = [{"question": f"{n} + 2?", "answer": f"#### {n + 2}"} for n in range(9)]
CHOICES = [
    {"question": f"{n} + 2?", "choices": {"text": [str(n), str(n + 2)], "label": ["A", "B"]}, "answerKey": "B"}
    for n in range(2)
]
ENDINGS = [{"ctx_a": "A", "ctx_b": "b", "activity_label": "C", "endings": ["d", "e", "f", "g"], "label": "1"}] * 2
HUB_DATA = {"openai/gsm8k": SUMS, "allenai/ai2_arc": CHOICES, "Rowan/hellaswag": ENDINGS}


def load_hub_data(name: str, *arguments: Any, split: str | None = None, **options: Any) -> Any:
    """`datasets.load_dataset`, with a few rows in place of what the Hub would give."""
    name = options.pop("path", name)
    if name not in HUB_DATA:
        return _LOAD_DATASET(name, *arguments, split=split, **options)
    rows = HUB_DATA[name]
    whole = DatasetDict({part: Dataset.from_list(rows) for part in ("train", "validation", "test")})
    return whole if split is None else whole[split]


_LOAD_DATASET = datasets.load_dataset


class StandIns:
    """What a page's blocks are run with; `made` has `runs/set`, `runs/held`, `runs/train` and `runs/student`."""

    def __init__(self, model_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.model_path, self.made, self.cache = model_path, made, cache
        self.monkeypatch, self.open = monkeypatch, ExitStack()
        self.server_url, self.given = SERVER, set[str]()
        monkeypatch.setattr(datasets, "load_dataset", load_hub_data)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")

    def replace(self, code: str) -> str:
        """A block's text with the tiny model, the server that is there, and fewer trials and steps."""
        code = MODELS.sub(self.model_path.as_posix(), code).replace(SERVER, self.server_url)
        for pattern, text in FEWER:
            code = re.sub(pattern, text, code)
        return code

    def give(self, name: str) -> None:
        """Put what a page names into the current folder, or start it; what it was given before is there."""
        if name in self.given:
            return
        self.given.add(name)
        if name in FILES:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text("".join(json.dumps(row) + "\n" for row in FILES[name]), encoding="utf-8")
        elif name.startswith("runs/"):
            source, _, target = name.partition(" as ")
            shutil.copytree(self.made / source, target or source)
        else:
            makers: dict[str, Callable[[], None]] = {
                "captured/": self._give_distillkit_table,
                "last_run_prepared/0123abcd": self._give_axolotl_table,
                "hub": self._give_hub,
                "server": self._give_server,
            }
            if name not in makers:
                raise ValueError(
                    f"`given: {name}` is none of {[*FILES, *makers]}, nor runs/NAME, nor runs/NAME as PATH"
                )
            makers[name]()

    def _give_distillkit_table(self) -> None:
        compressed_folder(Path("captured"), [[-0.5, -1.5], [-0.25, -2.5]], [[4, 8], [5, 9]])

    def _give_axolotl_table(self) -> None:
        Dataset.from_list(axolotl_rows()).save_to_disk("last_run_prepared/0123abcd")

    def _give_hub(self) -> None:
        self.open.enter_context(running_hub(self.monkeypatch, self.cache / "hub"))

    def _give_server(self) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.model_path)
        ends = [AutoTokenizer.from_pretrained(self.model_path).eos_token_id]
        server = self.open.enter_context(FakeServer(model, ends))
        server.name, self.server_url = str(self.model_path), server.url
