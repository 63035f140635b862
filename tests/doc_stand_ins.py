"""What the blocks of README and docs are run with: a tiny random model for each that they name, and what is given.

A page says with `<!-- given: NAME -->` what it takes for granted. The folder is empty otherwise, there is no network,
and data sets of the Hub are a few rows of the same columns.
"""

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from fake_hub import running_hub
from fake_openai_server import FakeServer
from gguf_files import write_gguf
from test_transfer_set_importers import axolotl_rows, compressed_folder
from transformers import AutoModelForCausalLM

MODELS = re.compile(
    r"(?:HuggingFaceTB|~/\.cache/quantkd)/SmolLM2-135M-Instruct|meta-llama/Llama-3\.\d-\d+B-Instruct|Qwen/Qwen2\.5-[\d.]+B-Instruct|\bMODEL\b"
)
SERVER = "http://127.0.0.1:8000/v1"
# Twenty trials of fifty steps show no more than two of two.
FEWER = [(r"\bn_trials( |=|: )20\b", r"n_trials\g<1>2"), (r"\bmax_steps( |=|: )50\b", r"max_steps\g<1>2")]
PROMPTS = [{"prompt": f"A box holds {n} pens. How many pens are in {n + 1} boxes?"} for n in range(26)]
# Files that a page speaks of as the reader's own, by name.
FILES: dict[str, list[dict[str, Any]]] = {
    "prompts.jsonl": PROMPTS[:20],
    "held_out.jsonl": PROMPTS[20:],
    "data.jsonl": [{**row, "completion": f"{n * (n + 1)} pens."} for n, row in enumerate(PROMPTS[:4])],
    "tasks/items.jsonl": [{"question": f"{n} + 2 =", "choices": [str(n + 2), str(n)], "label": 0} for n in range(3)],
}
# What the Hub's data sets hold, as far as the pages read it.
SUMS = [{"question": f"{n} + 2?", "answer": f"#### {n + 2}"} for n in range(18)]
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
    parts = {"train": rows[len(rows) // 2 :], **dict.fromkeys(("validation", "test"), rows[: len(rows) // 2])}
    whole = DatasetDict({part: Dataset.from_list(own) for part, own in parts.items()})
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
        elif name.endswith(".gguf"):
            write_gguf(AutoModelForCausalLM.from_pretrained(self.model_path), Path(name), name[-9:-5])
        elif name == "captured/":
            compressed_folder(Path(name), [[-0.5, -1.5], [-0.25, -2.5]], [[4, 8], [5, 9]])
        elif name == "last_run_prepared/0123abcd":
            Dataset.from_list(axolotl_rows()).save_to_disk(name)
        elif name == "hub":
            self.open.enter_context(running_hub(self.monkeypatch, self.cache / "hub"))
        elif name == "server":
            model = AutoModelForCausalLM.from_pretrained(self.model_path)
            server = self.open.enter_context(FakeServer(model, [model.config.eos_token_id], max_logprobs=128))
            server.name, self.server_url = str(self.model_path), server.url
        else:
            raise ValueError(f"`given: {name}` is none of the names here, nor runs/NAME, nor runs/NAME as PATH")
