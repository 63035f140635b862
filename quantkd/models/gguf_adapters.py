"""A LoRA adapter as a GGUF file, which llama.cpp applies to a quantized base model: `llama-server -m BASE --lora FILE`.

The tensors are those of llama.cpp's own `convert_lora_to_gguf.py`, byte for byte. That one reads `lora_alpha`
alone, so an adapter with rsLoRA, or with other alphas for some layers, comes out of it with other scales than PEFT's.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantkd.errors import ConfigError, DataError, printable
from quantkd.files import new_folder
from quantkd.models.adapter_files import check_files, read_plain_lora, warn_of_another_base
from quantkd.models.export import check_output_dir
from quantkd.models.gguf_files import architecture_of, map_modules, order_rows
from quantkd.models.provenance import Provenance
from quantkd.names import __version__, naming, public_name

logger = logging.getLogger(__name__)

OUTTYPES = ("q8_0", "f16", "f32")
FILE_NAME = "adapter.gguf"
_SUFFIX = ".lora_{}.weight"


@dataclass(frozen=True)
class _Factors:
    """One layer's part of an adapter."""

    name: str  # of the base model's tensor in GGUF
    a: Tensor  # (r, in)
    b: Tensor  # (out, r), its rows as the base model's are stored
    scale: float  # of b a, as PEFT multiplies it


def export_gguf_adapter(
    adapter: str, output_dir: str | Path, *, base: str | PreTrainedModel, outtype: str = "q8_0"
) -> Path:
    """Write `<output_dir>/adapter.gguf`, which `llama-cli --lora` and `llama-server --lora` read.

    Of a base model given by name its config is enough; a loaded one must be that of the adapter's training. The file's
    metadata hold the provenance as JSON (`quantkd.provenance`) and the digest of the base model's quantized weights
    (`quantkd.base.sha256`).

    Args:
        adapter: folder of an adapter that PEFT saved.
        output_dir: a new folder.
        base: the checkpoint that the base model's GGUF file was made from, by name; or the loaded student.
        outtype: `q8_0`, `f16` or `f32`. Of `q8_0`, tensors whose rows are no multiple of 32 are stored as `f16`, as
            llama.cpp's converter does: with ranks below 32 that is the second factor of every layer.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder is not empty, an unknown `outtype`, or an architecture that is not known here.
        DataError: not plain LoRA on linear layers (DoRA, `modules_to_save`, biases), not one of this base model,
            trained on a base in another format than GGUF, or a loaded base with other quantized weights.
    """
    path = check_output_dir(output_dir)
    if outtype not in OUTTYPES:
        raise ConfigError(f"outtype is {outtype!r}; expected one of {', '.join(OUTTYPES)}.")
    source = Path(adapter)
    check_files(adapter, lambda name: (source / name).is_file())
    config, weights, named = read_plain_lora(source, adapter)
    facts = Provenance.read(adapter)
    trained_on = (facts.quantization or {}).get("quant_method")
    # A library that quantizes in its own way may have left no name; a student that is loaded is compared below.
    unnamed = trained_on is None and isinstance(base, str) and (facts.quantization or facts.weights)
    if trained_on not in (None, "gguf") or unnamed:
        method = printable(str(trained_on or "another format"))
        raise DataError(
            f"The adapter {adapter} was trained on a base model in {method:.50} "
            f"({printable(str(facts.quantization)):.200}) and corrects the errors of exactly those weights; on a GGUF "
            "file it makes the model worse. Train one with --gguf_file FILE, or use --form merged and convert that."
        )
    if isinstance(base, str):
        if trained_on is not None:
            logger.warning(
                "The adapter %s is right for the GGUF file that it was trained on alone. Name that file (--gguf_file) "
                "to have it checked; llama.cpp does not check it.", adapter,
            )  # fmt: skip
        with naming(base):
            base_config = AutoConfig.from_pretrained(base)
        base_name = public_name(base)
    else:
        facts.check_weights(base, adapter)
        base_config, base_name = base.config, public_name(base.config.name_or_path or "")
    warn_of_another_base(adapter, named, base_name)
    _refuse_others(config, adapter)
    layers = list(_read_layers(config, weights, base_config, adapter))
    import gguf  # that it is installed was seen while the layers were read

    # llama.cpp multiplies by alpha over the rank: where layers differ in it, their second factor takes the rest.
    alpha = layers[0].scale * len(layers[0].a)
    if not alpha:
        raise DataError(f"lora_alpha of {adapter} is 0, which llama.cpp reads as 1. Train with another one.")
    kinds = gguf.LlamaFileType
    with new_folder(path) as folder:
        writer = gguf.GGUFWriter(folder / FILE_NAME, architecture_of(base_config))
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type({"q8_0": kinds.MOSTLY_Q8_0, "f16": kinds.MOSTLY_F16, "f32": kinds.ALL_F32}[outtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_name)
        export = {"form": "gguf_adapter", "outtype": outtype, "quantkd_version": __version__}
        facts = replace(facts, export=export)
        writer.add_string("quantkd.provenance", json.dumps(asdict(facts), sort_keys=True))
        if facts.weights is not None:
            writer.add_string("quantkd.base.sha256", facts.weights["sha256"])
        for layer in layers:
            factor = layer.scale * len(layer.a) / alpha
            b = layer.b if math.isclose(factor, 1, rel_tol=1e-6) else layer.b * factor
            for name, tensor in ((f"{layer.name}.lora_a", layer.a), (f"{layer.name}.lora_b", b)):
                data, kind = _pack(tensor, outtype)
                writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        facts.write(folder)
    return path


def _pack(tensor: Tensor, outtype: str) -> tuple[Any, Any]:
    import gguf

    kind = gguf.GGMLQuantizationType[outtype.upper()]
    if outtype == "q8_0" and tensor.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    data = gguf.quants.quantize(tensor.contiguous().numpy(), kind)
    if not np.isfinite(gguf.quants.dequantize(data, kind)).all():
        raise DataError(f"The adapter's numbers do not fit {kind.name}: the largest is {float(tensor.abs().max()):g}.")
    return data, kind


def _refuse_others(config: LoraConfig, place: str) -> None:
    """llama.cpp adds the product of two matrices to a linear layer's output, and nothing else."""
    others = ("use_dora", "modules_to_save", "lora_bias", "target_parameters", "fan_in_fan_out")
    found = [name for name in others if getattr(config, name, None)]
    if config.bias != "none":
        found.append(f"bias={config.bias}")
    if found:
        raise DataError(
            f"The adapter {place} has {', '.join(found)}; a GGUF adapter holds plain LoRA on linear layers. Use "
            "--form merged, and convert that."
        )


def _read_layers(config: LoraConfig, weights: dict[str, Tensor], base_config: Any, place: str) -> Iterator[_Factors]:
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(base_config)
    names = map_modules(network)
    modules = dict(network.named_modules())
    head = [name for name, each in modules.items() if each is network.get_output_embeddings()]
    found = {key.removeprefix("base_model.model."): weight.float() for key, weight in weights.items()}
    for key in [key for key in found if key.endswith(_SUFFIX.format("A"))]:
        module = key.removesuffix(_SUFFIX.format("A"))
        a, b = found.pop(key), found.pop(module + _SUFFIX.format("B"), None)
        if module in head and base_config.get_text_config().tie_word_embeddings:
            raise DataError(
                f"The adapter {place} is on the head, which is tied to the embeddings: llama.cpp has no tensor of its "
                "own for it. Train without it, or use --form merged."
            )
        layer = modules.get(module)
        shape = tuple(layer.weight.shape) if isinstance(layer, nn.Linear) else None
        if b is None or module not in names or shape != (len(b), a.shape[1]) or b.shape[1] != len(a):
            other = "no second factor" if b is None else f"factors for a layer of {len(b)} x {a.shape[1]}"
            raise DataError(
                f"The adapter {place} has {other} at {module}, where the base model has "
                f"{'no linear layer' if shape is None else f'one of {shape[0]} x {shape[1]}'}. Name the base model "
                "that it was trained on."
            )
        if module in head:  # which PEFT saves with its adapter, as it is in the base model
            copied = found.pop(f"{module}.base_layer.weight", None)
            if copied is not None and tuple(copied.shape) != shape:
                raise DataError(f"The adapter {place} has a head of shape {tuple(copied.shape)}; expected {shape}.")
        name = f"{names[module]}.weight"
        order = order_rows(base_config, name, len(b))
        alphas: Any = config.alpha_pattern or {}
        alpha = float(alphas.get(get_pattern_key(alphas, module), config.lora_alpha))
        scale = alpha / (math.sqrt(len(a)) if config.use_rslora else len(a))
        yield _Factors(name, a, b if order is None else b[order], scale)
    if found:
        listed = ", ".join(list(found)[:3])
        raise DataError(f"The adapter {place} has {listed} beside the factors of linear layers. Use --form merged.")
