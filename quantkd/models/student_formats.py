"""The formats that a student can be quantized in: names, what each needs to run, and its weight in full precision."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import AwqConfig, BitsAndBytesConfig, GPTQConfig, HqqConfig, PreTrainedConfig, TorchAoConfig
from transformers.utils.quantization_config import AwqBackend

from quantkd.errors import ConfigError, MissingDependencyError
from quantkd.models.cpu_repacking import unpack

STUDENT_FORMATS = ("nf4", "fp4", "int8", "hqq4", "torchao-int4", "torchao-int8")

# By quantization method: the packages, in the oldest versions that transformers or PEFT take.
_PACKAGES = {
    "hqq": {"hqq": "0.2.1"},
    "torchao": {"torchao": "0.16"},
    "gptq": {"gptqmodel": "7.0", "optimum": "1.24"},
    "awq": {"gptqmodel": "7.0", "optimum": "1.24"},
}
# What a weight can be computed with in; float8 is stored with scales beside it.
_FULL_PRECISION = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def build_quantization_config(
    name: str, compute_dtype: torch.dtype, storage_dtype: torch.dtype = torch.uint8
) -> BitsAndBytesConfig | HqqConfig | TorchAoConfig:
    """The quantization config of transformers that a format's name stands for."""
    if name not in STUDENT_FORMATS:
        raise ConfigError(f"Expected a student format of {', '.join(STUDENT_FORMATS)}, found {name!r}.")
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "hqq4":
        _check_packages("hqq")
        return HqqConfig(nbits=4, group_size=64)
    if name.startswith("torchao"):
        _check_packages("torchao")
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

        # The one layout of torchao's int4 that needs no further package.
        int4 = {"group_size": 32, "int4_packing_format": "tile_packed_to_4d"}
        return TorchAoConfig(Int4WeightOnlyConfig(**int4) if name == "torchao-int4" else Int8WeightOnlyConfig())
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage_dtype,
    )


def format_of(quantization_config: Any) -> str:
    """What a quantization config is called here."""
    method = _method(quantization_config)
    if method == "bitsandbytes":
        if _get(quantization_config, "load_in_8bit"):
            return "int8"
        return str(_get(quantization_config, "bnb_4bit_quant_type") or "fp4")
    if method == "hqq":
        layers: Any = _get(quantization_config, "quant_config") or {}
        return f"hqq{layers.get('weight_quant_params', {}).get('nbits', '')}"
    if method == "torchao":
        kind: Any = _get(quantization_config, "quant_type")
        # In a config.json it is {"default": {"_type": "Int8WeightOnlyConfig", ...}}.
        name = kind.get("default", {}).get("_type", "") if isinstance(kind, dict) else type(kind).__name__
        return {"Int4WeightOnlyConfig": "torchao-int4", "Int8WeightOnlyConfig": "torchao-int8"}.get(name, "torchao")
    return method


def stored_quantization(name_or_path: str, **model_init_kwargs: Any) -> dict[str, Any] | None:
    """The quantization that a checkpoint is stored in already, from its config alone."""
    if "gguf_file" in model_init_kwargs:
        return None
    where = {key: value for key, value in model_init_kwargs.items() if key in _HUB_ARGUMENTS}
    config, _ = PreTrainedConfig.get_config_dict(name_or_path, **where)
    stored: dict[str, Any] | None = config.get("quantization_config")
    return stored


def choose_kernel(stored: dict[str, Any], device: torch.device) -> GPTQConfig | AwqConfig | None:
    """What must be said of a quantized checkpoint so that it can be trained.

    Most of gptqmodel's kernels for a CPU have no gradient, or lose it for good at the first pass without one. They are
    passed over in evaluation too, so that a student is measured with the kernel that it is trained with.
    """
    method, bits, is_cpu = _method(stored), stored.get("bits", 4), device.type == "cpu"
    # "auto_trainable" would take ATen's packed kernel on a CPU (gptqmodel 7.7), which is one that loses the gradient.
    if method == "gptq":
        return GPTQConfig(bits=bits, backend="torch" if is_cpu else "auto_trainable")
    if method == "awq":
        return AwqConfig(bits=bits, backend=AwqBackend.TORCH_AWQ if is_cpu else AwqBackend.AUTO_TRAINABLE)
    return None


def check_format(
    quantization_config: Any,
    *,
    device: torch.device,
    trainable: bool,
    shared: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse a format that cannot run here, before any weight is read."""
    name = format_of(quantization_config)
    _check_packages(_method(quantization_config))
    if shared and name not in ("nf4", "fp4"):
        raise ConfigError(
            f"The student is in {name}, and FSDP or ZeRO-3 would share its weights out; that is known to keep only nf4 "
            "and fp4 intact. Train it with one whole copy a process (DDP), or take nf4."
        )
    if name == "torchao-int4" and trainable:
        raise ConfigError(
            "The student is in torchao-int4, which transformers does not train. Train nf4, fp4, int8, hqq4 or "
            "torchao-int8; torchao-int4 can be evaluated, on a CUDA GPU."
        )
    if name == "torchao-int4" and device.type != "cuda":
        raise ConfigError(
            f"The student is in torchao-int4, whose kernels need a CUDA GPU; the device here is {device.type}. "
            "Take nf4, fp4, int8, hqq4 or torchao-int8."
        )
    if name == "torchao-int4" and dtype not in (None, torch.bfloat16):
        raise ConfigError(
            f"The student is in torchao-int4, whose kernels compute in bfloat16; {dtype} was asked for, or follows "
            "from this GPU. Set dtype='bfloat16' on a GPU of compute capability 8.0 or higher, or take another format."
        )


def dequantize_weight(module: nn.Module) -> Tensor:
    """The weight that a linear layer of any format computes with, in floating point."""
    layer: Any = module
    if hasattr(layer, "get_base_layer"):
        layer = layer.get_base_layer()
    with torch.no_grad():
        weight = _dequantize(layer)
    if weight is None or weight.dim() != 2 or weight.dtype not in _FULL_PRECISION:
        raise ConfigError(
            f"{type(layer).__module__}.{type(layer).__name__} gives no full-precision weight; expected a linear layer "
            "of bitsandbytes, HQQ, torchao, GPTQ or AWQ, or an ordinary one."
        )
    return weight.detach()


def _dequantize(layer: Any) -> Tensor | None:
    if hasattr(layer, "W_q"):  # HQQ
        return layer.dequantize()  # type: ignore[no-any-return]
    if hasattr(layer, "qweight"):  # GPTQ and AWQ, whose layers differ in how they pack, and agree in what they compute
        return _through_identity(layer, layer.scales.dtype)
    weight = getattr(layer, "weight", None)
    if weight is None:
        return None
    if type(weight).__name__ == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        # The scales move from the parameter to the layer's state at the first forward pass.
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        whole: Tensor = int8_vectorwise_dequant(weight.data, scales.to(weight.device))
        return whole
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        unpack(layer)
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if type(weight).__module__.startswith("torchao."):
        # Not every layout can be dequantized by name.
        has_name = type(weight).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor")
        return weight.dequantize() if has_name else _through_identity(layer, weight.dtype)
    return weight  # type: ignore[no-any-return]


def _through_identity(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight as the layer's own kernel sees it: what it makes of the unit vectors, less its bias."""
    device = next(tensor.device for tensor in (*layer.parameters(), *layer.buffers()))
    outputs: Tensor = layer(torch.eye(layer.in_features, dtype=dtype, device=device))
    bias = getattr(layer, "bias", None)
    return (outputs if bias is None else outputs - bias).T


def _check_packages(method: str) -> None:
    for package, oldest in _PACKAGES.get(method, {}).items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise MissingDependencyError(
                f"A student in {method} needs {package}, which is not installed: pip install '{package}>={oldest}'"
            ) from None
        if Version(found) < Version(oldest):
            raise MissingDependencyError(
                f"A student in {method} needs {package} {oldest} or newer, found {found}: "
                f"pip install '{package}>={oldest}'"
            )


def _method(quantization_config: Any) -> str:
    method = _get(quantization_config, "quant_method")
    if method is None and (_get(quantization_config, "load_in_4bit") or _get(quantization_config, "load_in_8bit")):
        return "bitsandbytes"  # checkpoints of old do not name it
    return str(getattr(method, "value", method))


def _get(quantization_config: Any, name: str) -> Any:
    if isinstance(quantization_config, dict):
        return quantization_config.get(name)
    return getattr(quantization_config, name, None)
