"""A trained student in the forms that others load: a 16-bit checkpoint, a 4-bit one, or the adapter alone.

A folder that exists is complete (`files.new_folder`). Nothing that a pickle could hide in is written or copied.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from quantkd.errors import ConfigError
from quantkd.files import new_folder
from quantkd.hardware import default_device, native_compute_dtype, parse_dtype
from quantkd.models.adapter_files import CONFIG, WEIGHTS, check_adapter, check_files
from quantkd.models.cpu_repacking import keep_trainable_on_cpu
from quantkd.models.generation import find_end_tokens
from quantkd.models.merging import merge_adapters
from quantkd.models.provenance import Provenance, name_base_model, require_base
from quantkd.models.stored_weights import describe_weights
from quantkd.models.student import default_quantization_config, describe_quantization
from quantkd.names import __version__, naming

CHECKPOINT_FORMS = ("merged", "requantized")
_SHARD_SIZE = "5GB"


def check_output_dir(output_dir: str | Path) -> Path:
    """Refuse a path that exists already, unless it is an empty folder."""
    path = Path(output_dir)
    if path.is_dir() and not any(path.iterdir()):
        return path
    if path.exists() or path.is_symlink():
        found = "a folder that is not empty" if path.is_dir() else "not a folder"
        raise ConfigError(f"{path} is {found}; an export is written to a new one. Name another --output_dir.")
    return path


def export_checkpoint(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    form: str = "merged",
    dtype: str | torch.dtype = torch.bfloat16,
    provenance: Provenance | None = None,
) -> Path:
    """Write the adapter merged into the dequantized weights, in 16 bit or quantized again. The model is used up."""
    if form not in CHECKPOINT_FORMS:
        raise ConfigError(f"form is {form!r}; expected one of {', '.join(CHECKPOINT_FORMS)}.")
    path, dtype = check_output_dir(output_dir), parse_dtype(dtype)
    quantization = describe_quantization(model)
    config: Any = getattr(model.get_base_model().config, "quantization_config", None)
    if not getattr(config, "load_in_4bit", False):
        config = default_quantization_config()
    made = {"form": form, "dtype": str(dtype).removeprefix("torch."), "dequantized_from": quantization}
    with new_folder(path) as folder:
        merged = folder / "merged" if form == "requantized" else folder
        network: Any = merge_adapters(model, dtype)
        own = network.generation_config
        if own is not None and len(ends := find_end_tokens(tokenizer, own.eos_token_id)) > 1:
            own.eos_token_id = ends  # wherever it is loaded, it stops where the answers that it learned end
        network.save_pretrained(merged, max_shard_size=_SHARD_SIZE)
        if form == "requantized":
            network.to("meta")  # the caller's reference would keep its weights in memory beside the next model's
            clear_device_cache(garbage_collection=True)
            again: Any = AutoModelForCausalLM.from_pretrained(
                merged, quantization_config=config, dtype=dtype, device_map={"": default_device()}
            )
            again.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
            shutil.rmtree(merged)
            network = again
        facts = replace(provenance or Provenance(), weights=describe_weights(network))
        _finish(folder, tokenizer, facts, made)
    return path


def export_adapter(adapter: str, tokenizer: PreTrainedTokenizerBase, output_dir: str | Path, *, base: str) -> Path:
    """Write the adapter as PEFT reads it, and its tokenizer; no optimizer, no training state."""
    path = check_output_dir(output_dir)
    source = Path(adapter)
    check_files(adapter, lambda name: (source / name).is_file())
    base = str(require_base(source, base) or base)
    check_adapter(source, base)
    with new_folder(path) as folder:
        for name in (CONFIG, WEIGHTS, "README.md"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        name_base_model(folder, base)
        _finish(folder, tokenizer, Provenance.read(adapter), {"form": "adapter"})
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


def _finish(folder: Path, tokenizer: PreTrainedTokenizerBase, provenance: Provenance, made: dict[str, Any]) -> None:
    tokenizer.save_pretrained(folder)
    replace(provenance, export={**made, "quantkd_version": __version__}).write(folder)
