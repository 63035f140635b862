"""A trained student in the forms that others load: a 16-bit checkpoint, a 4-bit one, or the adapter alone.

Every form is written to a folder beside its destination and renamed when it is whole, so a folder that is there is
complete. Nothing that a pickle could hide in is written or copied.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from quantkd import __version__
from quantkd.errors import ConfigError
from quantkd.hardware import default_device, native_compute_dtype, parse_dtype
from quantkd.models.cpu_repacking import keep_trainable_on_cpu
from quantkd.models.merging import merge_adapters
from quantkd.models.provenance import name_base_model
from quantkd.models.student import default_quantization_config
from quantkd.names import find_file, naming

Form = Literal["merged", "requantized", "adapter"]
FORMS: tuple[Form, ...] = ("merged", "requantized", "adapter")
_SHARD_SIZE = "5GB"
_PROVENANCE = "quantkd.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def check_output_dir(output_dir: str | Path) -> Path:
    """Refuse a place where something lies already."""
    path = Path(output_dir)
    if path.is_dir() and not any(path.iterdir()):
        return path
    if path.exists() or path.is_symlink():
        found = "a folder that is not empty" if path.is_dir() else "no folder"
        raise ConfigError(f"{path} is {found}; an export is written to a new one. Name another --output_dir.")
    return path


def export_merged(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    dtype: str | torch.dtype = torch.bfloat16,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint in 16 bit: the dequantized weights with what the adapter adds to them."""
    path, dtype = check_output_dir(output_dir), parse_dtype(dtype)
    quantized = _describe_quantization(model)
    with _new_folder(path) as folder:
        merge_adapters(model, dtype).save_pretrained(folder, max_shard_size=_SHARD_SIZE)
        tokenizer.save_pretrained(folder)
        facts = {"form": "merged", "dtype": str(dtype).removeprefix("torch."), "dequantized_from": quantized}
        _write_provenance(folder, facts, provenance)
    return path


def export_requantized(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    quantization_config: BitsAndBytesConfig | None = None,
    dtype: str | torch.dtype = torch.bfloat16,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Merge, quantize the merged weights again, and write a bitsandbytes checkpoint in 4 bit.

    The second rounding takes part of what was learned away: measure it, see docs/export.md.
    """
    path, dtype = check_output_dir(output_dir), parse_dtype(dtype)
    quantized = _describe_quantization(model)
    config = quantization_config or _four_bit_config(model)
    with _new_folder(path) as folder:
        merged = folder / "merged"
        merge_adapters(model, dtype).save_pretrained(merged, max_shard_size=_SHARD_SIZE)
        del model
        gc.collect()
        again: Any = AutoModelForCausalLM.from_pretrained(
            merged, quantization_config=config, dtype=dtype, device_map={"": default_device()}
        )
        again.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
        shutil.rmtree(merged)
        tokenizer.save_pretrained(folder)
        facts = {"form": "requantized", "dtype": str(dtype).removeprefix("torch."), "dequantized_from": quantized}
        _write_provenance(folder, facts, provenance)
    return path


def export_adapter(adapter: str, tokenizer: PreTrainedTokenizerBase, output_dir: str | Path, *, base: str) -> Path:
    """Write the adapter as PEFT reads it, and its tokenizer; no optimizer, no training state."""
    path = check_output_dir(output_dir)
    with naming(adapter, _ADAPTER_FILES[0]):
        files = {name: find_file(adapter, name) for name in (*_ADAPTER_FILES, "README.md")}
    missing = [name for name in _ADAPTER_FILES if files[name] is None]
    if missing:
        raise ConfigError(
            f"{adapter} holds no {' and no '.join(missing)}; expected what `quantkd train` saves. Weights in a pickle "
            "are not copied: load the adapter with PEFT and save it again."
        )
    with _new_folder(path) as folder:
        for name, source in files.items():
            if source is not None:
                shutil.copyfile(source, folder / name)
        name_base_model(folder, base)
        tokenizer.save_pretrained(folder)
        _write_provenance(folder, {"form": "adapter"}, read_provenance(adapter))
    return path


def load_exported(path: str | Path) -> PreTrainedModel:
    """A merged or re-quantized checkpoint through plain transformers, on this process's own device."""
    with naming(str(path)):
        saved = getattr(AutoConfig.from_pretrained(path), "dtype", None) or torch.float32
        dtype = saved if native_compute_dtype() == torch.bfloat16 else torch.float32
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map={"": default_device()}
        )
    keep_trainable_on_cpu(model)
    return model


def read_provenance(adapter: str) -> dict[str, Any]:
    """What `quantkd.json` beside an adapter says: of which transfer set, teacher and objective it comes."""
    found = find_file(adapter, _PROVENANCE)
    if found is None:
        return {}
    try:
        facts = json.loads(found.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{found} is not JSON: {error}. Remove it, or save the adapter again.") from error
    if not isinstance(facts, dict):
        raise ConfigError(f"{found} holds a {type(facts).__name__}; expected an object. Remove it.")
    return facts


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its name when everything in it is written and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for file in [*temporary.iterdir(), temporary]:
            _sync(file)
        os.rename(temporary, path)  # over an empty folder at most: the system refuses any other
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _four_bit_config(model: PeftModel) -> BitsAndBytesConfig:
    config: Any = getattr(model.get_base_model().config, "quantization_config", None)
    return config if getattr(config, "load_in_4bit", False) else default_quantization_config()


def _describe_quantization(model: PeftModel) -> dict[str, Any] | None:
    config = getattr(model.get_base_model().config, "quantization_config", None)
    if config is None:
        return None
    facts: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return {key: value for key, value in facts.items() if not key.startswith("_")}


def _write_provenance(folder: Path, export: Mapping[str, Any], facts: Mapping[str, Any] | None) -> None:
    content = {**(facts or {}), "export": {**export, "quantkd_version": __version__}}
    (folder / _PROVENANCE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
