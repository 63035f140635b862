"""The student: the teacher's own model quantized, NF4 unless asked otherwise, with LoRA on all its linear layers."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AwqConfig,
    BitsAndBytesConfig,
    GPTQConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from quantkd.errors import ConfigError
from quantkd.foreign import is_trainable, keep_commit, mixed_precision, shape_of, shares_weights
from quantkd.hardware import default_device, native_compute_dtype, parse_dtype, process_state
from quantkd.models.cpu_repacking import keep_trainable_on_cpu
from quantkd.models.gguf_student import find_gguf, load_gguf
from quantkd.models.network import base_network
from quantkd.models.weights import is_quantized_layer
from quantkd.names import hub_arguments, names_gguf, refuse_adapter

logger = logging.getLogger(__name__)  # also says how much of a model is quantized; the command line prints it

STUDENT_FORMATS = ("nf4", "fp4", "int8")
_LEAST_SHARE = 0.5  # of the weights; with fewer, memory and what is learned are not what a 4-bit student promises
# What decides the numbers of a quantization, as transformers' configs call it.
_SETTINGS = (
    "quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype", "nbits", "bits", "group_size",
)  # fmt: skip


def default_lora_config(r: int = 16) -> LoraConfig:
    """LoRA of rank `r` on all linear layers but the head, scaled by 2 (`lora_alpha = 2 * r`), without dropout."""
    return LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def default_quantization_config(compute_dtype: torch.dtype | None = None, name: str = "nf4") -> BitsAndBytesConfig:
    """The config for `nf4`, `fp4` (double quantization, Dettmers et al. 2023, arXiv:2305.14314) or `int8`."""
    if name not in STUDENT_FORMATS:
        raise ConfigError(
            f"The student's format is {name!r}; expected one of {', '.join(STUDENT_FORMATS)}. Pass a quantization "
            "config of transformers for others, or a loaded model."
        )
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = compute_dtype or native_compute_dtype()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=shard_dtype(dtype) if shares_weights() else torch.uint8,
    )


def shard_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """What packed 4-bit weights must be stored in where they are sharded: the dtype of the parameters beside them."""
    # FSDP shards floating-point parameters only, and packed bits survive no cast to another dtype when it gathers them.
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision(), compute_dtype)


def format_of(quantization_config: Any) -> str:
    """The name of a quantization: one of `STUDENT_FORMATS`, or the method (gptq, awq, torchao, ...)."""
    method = _get(quantization_config, "quant_method")
    if method is None and (_get(quantization_config, "load_in_4bit") or _get(quantization_config, "load_in_8bit")):
        method = "bitsandbytes"  # old checkpoints do not name it
    method = str(getattr(method, "value", method))
    if method != "bitsandbytes":
        return method
    four_bit = _get(quantization_config, "bnb_4bit_quant_type") or "fp4"
    return "int8" if _get(quantization_config, "load_in_8bit") else str(four_bit)


def bits_of(quantization_config: Any) -> int | None:
    """Bits per weight; None where the config does not say."""
    known = {"nf4": 4, "fp4": 4, "int8": 8}.get(format_of(quantization_config))
    return known or _get(quantization_config, "bits") or _get(quantization_config, "nbits")


def describe_quantization(model: Any) -> dict[str, Any] | None:
    """How a model is quantized, in the words of its config, as JSON; None for a model in full precision."""
    network = base_network(model)
    if (file := getattr(network, "gguf_file", None)) is not None:
        return {"quant_method": "gguf", "format": file.format, "gguf_file": file.path.name}
    config = getattr(network.config, "quantization_config", None)
    return None if config is None else describe_config(config)


def describe_config(config: Any) -> dict[str, Any]:
    """What decides the numbers of a quantization, as JSON."""
    settings = config if isinstance(config, dict) else config.to_dict()
    return {name: settings[name] for name in _SETTINGS if settings.get(name) not in (None, False)}


def short_dtype(model: Any) -> torch.dtype:
    """The 16 bits that a model's adapters are saved in: float16 if its layers compute in that, else bfloat16."""
    computed = (describe_quantization(model) or {}).get("bnb_4bit_compute_dtype") or base_network(model).config.dtype
    return torch.float16 if str(computed).removeprefix("torch.") == "float16" else torch.bfloat16


def is_quantized(model: Any) -> bool:
    """Whether a loaded model is quantized, by transformers or by its format's own library, with adapters or without."""
    network = base_network(model)
    return bool(getattr(network, "is_quantized", False)) or any(map(is_quantized_layer, network.modules()))


def name_format(model: Any) -> str:
    """What a loaded model's weights are in, such as "4-bit"; the name of a format whose bits are not known."""
    network = base_network(model)
    if (file := getattr(network, "gguf_file", None)) is not None:
        return str(file.format)
    config = getattr(network.config, "quantization_config", None)
    if config is None and is_quantized(model):
        return "quantized"  # by its format's own library, which leaves no config
    bits = bits_of(config) if config else 8 * model.dtype.itemsize
    return f"{bits}-bit" if bits else format_of(config)


def stored_quantization(name_or_path: str, **model_init_kwargs: Any) -> dict[str, Any] | None:
    """The quantization that a checkpoint is stored in already, from its config alone."""
    if names_gguf(str(name_or_path), **model_init_kwargs):
        return None
    config, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub_arguments(model_init_kwargs))
    stored: dict[str, Any] | None = config.get("quantization_config")
    return stored


def refuse_quantized(name_or_path: str, **model_init_kwargs: Any) -> None:
    """Refuse a checkpoint that is stored quantized where the full-precision model is meant."""
    if stored := stored_quantization(name_or_path, **model_init_kwargs):
        raise ConfigError(
            f"{name_or_path} is stored in {format_of(stored)}, and full precision was asked for. Name the checkpoint "
            "that it was made from, or measure it as a student."
        )


def load_student(
    name_or_path: str,
    *,
    quantization_config: Any | None = None,
    dtype: str | torch.dtype | None = None,
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """Load a model quantized, on this process's own device.

    Args:
        name_or_path: a Hub name or a checkpoint folder; one that is stored quantized is taken as it is.
        quantization_config: nf4, fp4 or int8, or any quantization config of transformers; NF4 if None.
        dtype: what the quantized layers compute in; bfloat16 where the hardware has it, else float32, if None.
        **model_init_kwargs: further arguments of `from_pretrained`, such as `gguf_file` and `revision`.

    Raises:
        ConfigError: a format that cannot be loaded, that is not the stored one, or that does not fit the launcher.
    """
    file = find_gguf(name_or_path, quantization_config=quantization_config, **model_init_kwargs)
    model_init_kwargs = {"trust_remote_code": False, **model_init_kwargs}
    if not shares_weights():
        model_init_kwargs.setdefault("device_map", {"": default_device()})
    if file is not None:
        if quantization_config is not None and format_of(quantization_config) != "gguf":
            raise ConfigError(
                f"The student is the GGUF file {file.path.name} as it is stored, and another format was asked for. "
                "Leave one of the two out."
            )
        _check_shared("GGUF")
        held_in = torch.float32 if dtype in (None, "auto") else parse_dtype(dtype)
        model: PreTrainedModel = load_gguf(name_or_path, file, held_in, **model_init_kwargs)
    else:
        compute_dtype = parse_dtype(dtype)
        refuse_adapter(name_or_path, **model_init_kwargs)
        stored = stored_quantization(name_or_path, **model_init_kwargs)
        config = _choose_config(name_or_path, quantization_config, stored, compute_dtype)
        kind = format_of(stored or config)
        _check_shared(kind)
        if kind == "hqq":  # transformers 5 reads an HqqConfig, and leaves out the quantizing that it asks for
            raise ConfigError(
                "The student is in HQQ, which transformers 5 neither quantizes nor reads. Quantize the model with "
                "hqq's own library and pass it loaded, or use nf4."
            )
        if shares_weights():
            _check_storage(stored or config, shard_dtype(compute_dtype), is_stored=stored is not None)
        if config is not None:
            model_init_kwargs["quantization_config"] = config
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=compute_dtype, **model_init_kwargs)
        keep_trainable_on_cpu(model)
    keep_commit(model.config, model_init_kwargs.get("revision"))
    _say_share(model, "are quantized")
    return model


def _say_share(model: Any, what: str) -> None:
    """Say how many weights are quantized or adapted; bitsandbytes leaves experts in 3-D parameters out, for example."""
    network, count, rest, adapted = base_network(model), 0, dict[str, int](), set[nn.Module]()
    apart = {network.get_input_embeddings(), network.get_output_embeddings()}
    for name, layer in network.named_modules():
        if hasattr(layer, "get_base_layer"):
            adapted.add(layer.get_base_layer())
        elif layer not in apart and ".lora_" not in name:
            is_packed = is_quantized_layer(layer)
            size = sum(math.prod(shape_of(parameter)) for parameter in layer.parameters(recurse=False))
            if is_packed and hasattr(layer, "in_features"):
                size = layer.in_features * layer.out_features
            if is_packed if what == "are quantized" else layer in adapted:
                count += size
            else:
                rest[name] = size
    share = count / max(count + sum(rest.values()), 1)
    text, level = f"{share:.0%} of the student's weights, embeddings and head aside, {what}", logging.INFO
    if share < _LEAST_SHARE:
        largest = max(rest, key=rest.__getitem__)
        text, level = f"Only {text}; the largest rest is {largest}, {rest[largest]:,} weights", logging.WARNING
    if process_state().is_main_process:
        logger.log(level, "%s.", text)


def _choose_config(name_or_path: str, wanted: Any, stored: dict[str, Any] | None, compute_dtype: torch.dtype) -> Any:
    """The config to load with; None for a checkpoint whose own says all."""
    if stored is None:
        wanted = "nf4" if wanted is None else wanted
        return default_quantization_config(compute_dtype, wanted) if isinstance(wanted, str) else wanted
    if wanted is None:
        return choose_kernel(stored, default_device())
    found, asked = format_of(stored), wanted if isinstance(wanted, str) else format_of(wanted)
    if found != asked:
        raise ConfigError(
            f"{name_or_path} is stored in {found} already; a student in {asked} was asked for. Leave the format out to "
            "load the checkpoint as it is, or give the full-precision one that it was made from."
        )
    return choose_kernel(stored, default_device()) if isinstance(wanted, str) else wanted


def choose_kernel(stored: dict[str, Any], device: torch.device) -> GPTQConfig | AwqConfig | None:
    """The config with which a GPTQ or AWQ checkpoint can be trained, and is evaluated, too."""
    # Most of gptqmodel's kernels for a CPU have no gradient, or lose it for good at the first pass without one; among
    # them is what "auto_trainable" chooses there (gptqmodel 7.7).
    method, bits = format_of(stored), stored.get("bits", 4)
    kernel: Any = {"gptq": "torch", "awq": "torch_awq"}.get(method) if device.type == "cpu" else "auto_trainable"
    if method == "gptq":
        return GPTQConfig(bits=bits, backend=kernel)
    return AwqConfig(bits=bits, backend=kernel) if method == "awq" else None


def _check_shared(name: str) -> None:
    if shares_weights() and name not in ("nf4", "fp4"):
        raise ConfigError(
            f"The student is in {name}, and FSDP or ZeRO-3 would shard its weights; only nf4 and fp4 are known to "
            "survive that. Train with one whole copy per process (DDP), or use nf4."
        )


def _check_storage(quantization_config: Any, expected: torch.dtype, *, is_stored: bool) -> None:
    """Refuse 4-bit weights in another floating-point dtype than they are gathered in."""
    storage = _get(quantization_config, "bnb_4bit_quant_storage")
    storage = getattr(torch, storage) if isinstance(storage, str) else storage
    if storage is not None and storage.is_floating_point and storage != expected:
        remedy = f"Set bnb_4bit_quant_storage={expected}, or leave it out."
        if is_stored:
            remedy = "The checkpoint is stored so; load the full-precision one that it was made from."
        raise ConfigError(
            f"bnb_4bit_quant_storage is {storage}, and the sharded parameters are gathered in {expected}: the cast "
            f"would destroy the packed weights. {remedy}"
        )


def check_trainable(model: Any) -> None:
    """Refuse a loaded model whose format cannot be trained, or not under this launcher."""
    network = base_network(model)
    if not is_quantized(network):
        return
    config = getattr(network.config, "quantization_config", None)
    name = "the format of another library" if config is None else format_of(config)
    _check_shared(name)
    if not is_trainable(network):
        raise ConfigError(
            f"The student is in {name}, which transformers does not train. Train nf4, fp4 or int8, or only evaluate "
            "this one."
        )


def freeze(model: PreTrainedModel, checkpointing: dict[str, Any] | None) -> PreTrainedModel:
    """A quantized model with all frozen, and in float32 what is not quantized; checkpointing is off if it is None."""
    check_trainable(model)
    kwargs = {"use_reentrant": False, **(checkpointing or {})}
    if hasattr(model, "gguf_file"):  # PEFT would hold in float32 what was asked for in 16 bits
        model.requires_grad_(False)
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        return model
    prepared: PreTrainedModel = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing is not None, gradient_checkpointing_kwargs=kwargs
    )
    return prepared


def attach_lora(
    model: PreTrainedModel, peft_config: PeftConfig | None = None, checkpointing: dict[str, Any] | None = None
) -> PeftModel:
    """Freeze the model and attach trainable adapters; a quantized one is prepared by PEFT first."""
    if getattr(peft_config, "lora_alpha", 1) == 0:
        raise ConfigError(
            "lora_alpha is 0, with which adapters have no effect. Set it above 0; twice the rank is usual."
        )
    if is_quantized(model):
        _refuse_start(peft_config)
        model = freeze(model, checkpointing)
    adapted = get_peft_model(model, _name_linear_layers(model, peft_config or default_lora_config()))
    keep_trainable_on_cpu(adapted)
    _say_share(adapted, "have adapters")
    return adapted


def check_adapters(name_or_path: str, peft_config: PeftConfig, **kwargs: Any) -> None:
    """Refuse adapters that PEFT would not attach to a checkpoint, by the outline of its model."""
    _refuse_start(peft_config)
    trusted = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    stored = AutoConfig.from_pretrained(name_or_path, **hub_arguments(kwargs), **trusted)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(stored, **trusted)
    config: Any = copy.copy(_name_linear_layers(outline, peft_config))
    config.init_lora_weights, config.use_dora = False, False  # they compute with weights, and an outline has none
    get_peft_model(outline, config)


def _refuse_start(peft_config: PeftConfig | None) -> None:
    """Refuse starts that PEFT computes from a weight in floating point, and a 4-bit layer has none."""
    start = getattr(peft_config, "init_lora_weights", True)
    if isinstance(start, str) and (start.startswith("pissa") or start == "orthogonal"):
        raise ConfigError(
            f"init_lora_weights is {start!r}, which PEFT does not compute for a quantized layer. Leave it out: "
            "init='covariance' corrects the quantization error."
        )


def _name_linear_layers(model: PreTrainedModel, peft_config: PeftConfig) -> PeftConfig:
    """What "all-linear" means for HQQ, GPTQ and AWQ, whose layers PEFT adapts but does not count as linear."""
    if getattr(peft_config, "target_modules", None) != "all-linear":
        return peft_config
    modules = {name: module for name, module in model.named_modules() if module is not model.get_output_embeddings()}
    packed = {name for name, module in modules.items() if hasattr(module, "W_q") or hasattr(module, "qweight")}
    if not packed:
        return peft_config
    named: Any = copy.copy(peft_config)
    named.target_modules = packed | {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    return named  # type: ignore[no-any-return]


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)
