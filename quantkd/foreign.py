"""What quantkd uses of other libraries that they do not document: a function for each name, sorted by library."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any

from torch import Tensor, nn

from quantkd.errors import MissingDependencyError

# The releases that these functions were last tried with.
_TRIED = {"transformers": "5.24", "peft": "0.21", "bitsandbytes": "0.50", "lm_eval": "0.4.9"}


def _moved(name: str, need: str) -> MissingDependencyError:
    library = name.split(".")[0]
    found = next((each.version for each in metadata.distributions(name=library)), "(not installed)")
    return MissingDependencyError(
        f"{library} {found} has no {name}, which {need} needs; expected {library} {_TRIED[library]}. Install that "
        "release, and report the change to quantkd."
    )


def _find(path: str, name: str, need: str, owner: Any = None) -> Any:
    """An attribute of the module `path`, or of an `owner` whose class that is, or an error that says what needs it."""
    try:
        return getattr(import_module(path) if owner is None else owner, name)
    except (ImportError, AttributeError) as error:
        raise _moved(f"{path}.{name}", need) from error


def attention_of(config: Any) -> str | None:
    """The attention implementation of a model. The public `set_attn_implementation` has no counterpart."""
    return getattr(config, "_attn_implementation", None)


@contextmanager
def registered_attention(name: str, attention: Callable[..., Any]) -> Iterator[None]:
    """Inside, `attention` is an attention implementation of transformers that takes the masks of "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface

    interfaces: list[Any] = [AttentionInterface, AttentionMaskInterface]
    interfaces[0].register(name, attention)
    interfaces[1].register(name, interfaces[1]()["sdpa"])
    try:
        yield
    finally:
        for interface in interfaces:  # a name is registered publicly, and has no public way out
            getattr(interface, "_global_mapping", {}).pop(name, None)


def commit_of(config: Any) -> str:
    """The commit that a model was loaded from; empty for a local folder, or if `keep_commit` was not called."""
    return str(getattr(config, "_commit_hash", None) or "")


def keep_commit(config: Any, revision: str | None) -> None:
    """Note in the config of a model that was just loaded which commit that is, as transformers did before 5.24."""
    from huggingface_hub import try_to_load_from_cache

    if not commit_of(config) and not os.path.exists(name := config.name_or_path):
        found = try_to_load_from_cache(name, "config.json", revision=revision)  # its folder's name is the commit
        config._commit_hash = os.path.basename(os.path.dirname(found)) if isinstance(found, str) else None


def is_trainable(model: Any) -> bool:
    """Whether transformers trains adapters on the format that a model was loaded in."""
    return bool(getattr(getattr(model, "hf_quantizer", None), "is_trainable", True))


@contextmanager
def trainable_without_adapters(model: Any) -> Iterator[None]:
    """Inside, the Trainer takes a quantized model that has no adapters, and trains other parameters of its own."""
    marked = _find("transformers.PreTrainedModel", "is_quantized", "train_scales without adapters", model)
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = marked


def keep_saveable(model: Any) -> None:
    """Let transformers save a model again that was stored quantized: it fails to undo what it did to load it."""
    conversions = getattr(model, "_weight_conversions", None) or []
    undoable = [each for each in conversions if "Deserialize" not in str(getattr(each, "operations", None))]
    if len(undoable) < len(conversions):
        model._weight_conversions = undoable  # the parts of packed weights are saved under the names that they have


def remove_quantization(model: Any) -> None:
    """Let transformers save a model whose layers were all dequantized as an ordinary one."""
    if quantizer := getattr(model, "hf_quantizer", None):
        _find("transformers.quantizers.HfQuantizer", "remove_quantization_config", "a merge", quantizer)(model)
    for flag in {"is_loaded_in_4bit", "is_loaded_in_8bit"} & vars(model).keys():
        setattr(model, flag, False)
    vars(model).pop("gguf_file", None)
    if hasattr(model, "hf_device_map"):  # a model on the CPU would be taken for an offloaded one
        del model.hf_device_map


def untie_weights(model: Any) -> None:
    """Save embeddings and head as two weights: `save_pretrained` follows this mapping and not the config."""
    _find("transformers.PreTrainedModel", "all_tied_weights_keys", "a merge into embeddings", model)
    model.all_tied_weights_keys = {}


def float32_modules(model: Any) -> set[str]:
    """Parts of module names whose weights transformers keeps in float32, whatever dtype is asked for."""
    return set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())


def map_checkpoint(keys: Sequence[str], model: Any) -> tuple[dict[str, str], set[str]]:
    """The key of a checkpoint for each weight of a model, and the weights that are split or merged while loading."""
    need = "reading a checkpoint's weights one at a time"
    names = ("WeightRenaming", "WeightConverter", "rename_source_key")
    renaming, converter, rename = (_find("transformers.core_model_loading", name, need) for name in names)
    transforms = _find("transformers.conversion_mapping", "get_model_conversion_mapping", need)(model)
    renamings = [each for each in transforms if isinstance(each, renaming)]
    converters = [each for each in transforms if isinstance(each, converter)]
    wanted = {f"{name}.weight": True for name, _ in model.named_modules()}
    found, converted = dict[str, str](), set[str]()
    for key in keys:
        name, pattern = rename(key, renamings, converters, model.base_model_prefix, wanted)
        if pattern is None:
            found[name] = key
            continue
        for each in (each for each in converters if pattern in each.source_patterns):
            converted.update(name.replace(each.target_patterns[0], target) for target in each.target_patterns)
    return found, converted


def is_plain_cache(cache: Any) -> bool:
    """Whether a cache can be repeated for several prompts; False, so that none is, where transformers does not say."""
    plain = getattr(import_module("transformers.cache_utils"), "DynamicLayer", None)
    return hasattr(cache, "batch_repeat_interleave") and all(type(layer) is plain for layer in cache.layers)


def use_one_gpu(args: Any) -> None:
    """Keep the Trainer from wrapping the model in `DataParallel`, which no public argument does."""
    args._n_gpu = 1
    if args.n_gpu != 1:
        raise _moved("transformers.TrainingArguments._n_gpu", "training on one of several visible GPUs")


def installed_trackers() -> list[str]:
    """What `report_to` can name on this machine."""
    return list(_find("transformers.integrations", "get_available_reporting_integrations", "report_to")())


def is_zero3() -> bool:
    """Whether DeepSpeed ZeRO-3 partitions the weights."""
    return bool(_find("transformers.integrations", "is_deepspeed_zero3_enabled", "training")())


def shares_weights() -> bool:
    """Whether the launcher shares the weights out over the processes: FSDP, or DeepSpeed ZeRO-3."""
    # accelerate says so in the environment alone until an Accelerator is created, and models are loaded before.
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") or is_zero3()


def mixed_precision(without_launcher: str = "no") -> str:
    """What `accelerate launch` was told: no, bf16, fp16 or fp8."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", without_launcher)


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The shape of the whole parameter. Where ZeRO-3 has partitioned it, its own shape is (0,)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def lora_variant_of(layer: Any, adapter: str) -> Any:
    """DoRA or its like, which adds more than `B @ A` to a layer; None for plain LoRA."""
    return _find("peft.tuners.lora.LoraLayer", "lora_variant", "an adapter's start or merge", layer).get(adapter)


def merge_lora(layer: Any, adapter: str, weight: Tensor) -> Tensor | None:
    """The layer's full-precision weight with what the adapter adds; None where PEFT has no merge for the layer."""
    if not hasattr(layer, "get_delta_weight"):  # the public `merge()` would round the sum into the quantized weight
        return None
    if (variant := lora_variant_of(layer, adapter)) is None:
        delta: Tensor = layer.get_delta_weight(adapter)
        return weight + delta.float()
    merge: Callable[..., Tensor] = _find("peft.tuners.lora.LoraVariant", "merge_safe", "a merge", variant)
    return merge(layer, adapter, weight)


def unwrap_trained_module(module: nn.Module) -> nn.Module | None:
    """The trained copy of a module that PEFT trains whole or by rows (`modules_to_save`, `trainable_token_indices`)."""
    if not isinstance(module, _find("peft.utils.other", "AuxiliaryTrainingWrapper", "a merge")):
        return None
    name = "unload_and_optionally_merge_module"
    unload = _find("peft.utils.other.AuxiliaryTrainingWrapper", name, "a merge", module)
    return unload(merge=True, safe_merge=True, adapter_names=None)  # type: ignore[no-any-return]


def repacks_on_cpu(layer: Any) -> bool:
    """Whether a 4-bit layer rewrites its weight for inference on this CPU; releases without the flag never do."""
    return bool(getattr(layer, "support_avx512bf16_for_cpu", False))


def keep_from_repacking(layer: Any) -> None:
    """Let a 4-bit layer evaluate with the weight that it trains with."""
    layer.support_avx512bf16_for_cpu = False


def is_repacked(quant_state: Any) -> bool:
    """Whether a 4-bit weight is in the CPU's inference layout, which `dequantize_4bit` cannot read."""
    return bool(getattr(quant_state, "packing_format_for_cpu", False))


def find_unpacking() -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """bitsandbytes' own way out of the inference layout, for data and state; it rounds the quantization constants."""
    name = "_convert_weight_packed_for_cpu_inverse"
    return _find("bitsandbytes.functional", name, "a repacked 4-bit layer")  # type: ignore[no-any-return]


def int8_scales(layer: Any) -> Tensor:
    """The scales of an int8 layer, which move from the weight to the layer's state at the first forward pass."""
    found = [getattr(place, "SCB", None) for place in (layer.weight, getattr(layer, "state", None))]
    for scales in (each for each in found if each is not None):
        return scales  # type: ignore[no-any-return]
    raise _moved("bitsandbytes.nn.Int8Params.SCB", "dequantizing an int8 layer")


def spread_harness(harnessed: Any, accelerator: Any) -> None:
    """Let every process evaluate its share of lm-eval's items. HFLM does so only for a model that it loads itself."""
    place = accelerator.process_index, accelerator.num_processes
    harnessed.accelerator, (harnessed._rank, harnessed._world_size) = accelerator, place
    if (harnessed.rank, harnessed.world_size) != place:  # each process would evaluate everything, unnoticed
        raise _moved("lm_eval.models.huggingface.HFLM._rank", "an evaluation over several processes")
