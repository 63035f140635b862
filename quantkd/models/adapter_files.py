"""The two files of an adapter, whoever wrote them: their fields and numbers are checked before anything is computed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from quantkd.errors import DataError
from quantkd.files import parse_json, read_regular, write_file
from quantkd.names import is_repository_name, public_name

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SCALES_NAME = "scales.safetensors"  # in a training checkpoint: the factors and norms as they are trained
MAX_CONFIG_BYTES = 2**20
_MAX_NAMES = 4096  # PEFT shortens longer lists when it saves them
_MAX_RANK = 2**14
_LARGEST = 65504.0  # of float16
# What shapes plain LoRA. Other fields import packages, repeat layers or read files, and are refused if they are set.
_FIELDS = (
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_bias", "lora_dropout", "modules_to_save", "r", "rank_pattern", "target_modules", "target_parameters",
    "task_type", "use_dora", "use_rslora",
)  # fmt: skip
# Notes of PEFT that change nothing here: the weights are loaded over whatever the start was, if it left the base alone;
# and `auto_mapping`, which it writes where no task type was given, names the base model's class, which is the caller's.
_NOTES = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_type", "peft_version",
    "revision",
)  # fmt: skip
_STARTS_THAT_LEAVE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_MODULE_NAME = re.compile(r"(?:\.\*\\\.)?[\w.-]{1,256}")  # PEFT itself puts `.*\.` before some
_ADAPTED = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MAX_RANK


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # False for NaN


def _all(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value of each module holds; none at all does."""
    return lambda value: value is None or (isinstance(value, dict) and all(map(holds, value.values())))


def _is_layers(value: Any) -> bool:
    return value is None or all(type(each) is int for each in (value if isinstance(value, list) else [value]))


_RANKS, _SCALES = f"whole numbers from 1 to {_MAX_RANK}", f"numbers of at most {_LARGEST:g}"
_TEXT = (lambda value: value is None or isinstance(value, str)), "a text"
_SWITCH = (lambda value: value is None or isinstance(value, bool)), "true or false"
# What a field may hold, of whatever kind the adapter is.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, _RANKS),
    "lora_alpha": (_is_scale, _SCALES),
    "lora_dropout": (lambda value: _is_scale(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "rank_pattern": (_all(_is_rank), f"{_RANKS} by module"),
    "alpha_pattern": (_all(_is_scale), f"{_SCALES} by module"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "layers_to_transform": (_is_layers, "numbers of layers"),
    **dict.fromkeys(("task_type", "base_model_name_or_path"), _TEXT),
    **dict.fromkeys(("fan_in_fan_out", "lora_bias", "use_dora", "use_rslora"), _SWITCH),
}


def check_files(place: str, holds: Callable[[str], bool]) -> None:
    """Refuse an adapter without its two files, and a training checkpoint whose scales are in a third."""
    missing = [name for name in (CONFIG, WEIGHTS) if not holds(name)]
    if WEIGHTS in missing and holds(PICKLE):
        raise DataError(
            f"{place} holds {PICKLE}, a pickle, which can run any code when it is opened; expected {WEIGHTS}. Ask its "
            "maker to save it as safetensors."
        )
    if missing:
        raise DataError(f"{place} holds no {missing[0]}; expected an adapter that PEFT saved. Check the name.")
    if holds(SCALES_NAME):
        raise DataError(
            f"{place} is a training checkpoint, and its trained scales are in {SCALES_NAME}. Name the folder that "
            "training wrote at its end, or go on with --resume_from_checkpoint."
        )


def check_adapter(folder: Path, base: str) -> None:
    """Refuse an adapter of any kind by the value that cannot be; say if it names another base model."""
    fields = read_fields(folder / CONFIG, str(folder))
    if (folder / WEIGHTS).is_file():  # FSDP and DeepSpeed may store them in parts
        read_weights(folder / WEIGHTS, str(folder))
    warn_of_another_base(str(folder), public_name(fields.get("base_model_name_or_path") or ""), public_name(base))


def read_plain_lora(folder: Path, place: str) -> tuple[LoraConfig, dict[str, Tensor], str]:
    """Plain LoRA from checked fields, its weights, and the base model that the adapter names."""
    fields = read_fields(folder / CONFIG, place)
    if problem := _find_problem(fields):
        raise DataError(f"{CONFIG} of {place} {problem}. Load it with PEFT, if you trust it.")
    try:
        config = LoraConfig(**{name: fields[name] for name in _FIELDS if name in fields})
    except (TypeError, ValueError) as error:
        raise DataError(f"{CONFIG} of {place} is not a LoRA configuration: {error}. Get the adapter anew.") from error
    weights = read_weights(folder / WEIGHTS, place, config)
    if _is_pattern(config.target_modules):  # the weights say as well which modules it means
        config.target_modules = sorted({match[1] for name in weights if (match := _ADAPTED.fullmatch(name))})
        config.exclude_modules = None
    return config, weights, public_name(fields.get("base_model_name_or_path") or "")


def read_weights(path: Path, place: str, config: LoraConfig | None = None) -> dict[str, Tensor]:
    """The weights, each of finite numbers and, of plain LoRA, of the rank that its configuration says."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{WEIGHTS} of {place} does not open: {error}. Get the adapter anew.") from error
    if not weights:
        raise DataError(f"{WEIGHTS} of {place} holds no tensor; expected factors of adapters. Get it anew.")
    for name, weight in weights.items():
        found: Any = weight.dtype
        if weight.is_floating_point():
            found = float(weight.detach().float().abs().max()) if weight.numel() else "nothing"
        if not isinstance(found, float) or not found <= _LARGEST:
            raise DataError(
                f"{name} of {place} holds {found}; expected floating-point numbers of at most {_LARGEST:g}. The "
                "adapter is broken: train it again, or get another."
            )
        # Of experts in one parameter, the ranks of all stand in one tensor.
        if config is not None and not config.target_parameters and (match := _ADAPTED.fullmatch(name)):
            ranks: Any = config.rank_pattern or {}
            found = weight.shape["AB".index(match[2])] if weight.ndim > 1 else 0  # A is (r, in), and B (out, r)
            if found != (rank := ranks.get(get_pattern_key(ranks, match[1]), config.r)):
                raise DataError(
                    f"The adapter {place} does not fit its own configuration: {name} has rank {found}, and {CONFIG} "
                    f"says {rank}. Get it anew."
                )
    return weights


def round_adapter(folder: Path, dtype: torch.dtype) -> None:
    """Round the weights of a saved adapter from 32 bits to 16."""
    if (folder / WEIGHTS).is_file():
        weights = load_file(folder / WEIGHTS)
        short = {name: each.to(dtype) if each.dtype == torch.float32 else each for name, each in weights.items()}
        write_file(folder / WEIGHTS, save(short, metadata={"format": "pt"}))


def warn_of_another_base(place: str, named: str, own: str) -> None:
    """Say that an adapter names another base model than the one it is used with; folders have a last name alone."""
    names = [named, own]
    if not all(map(is_repository_name, names)):
        names = [name.split("/")[-1] for name in names]
    if named and own and names[0] != names[1]:
        told = "The adapter %s says that it was trained on %r; it is attached to %r, which may be another model."
        logger.warning(told, place, named, own)


def _is_pattern(modules: Any) -> bool:
    """Whether modules are named by a regular expression. It is never run: one can be written that never ends."""
    return isinstance(modules, str) and not _MODULE_NAME.fullmatch(modules)


def read_fields(path: Path, place: str) -> dict[str, Any]:
    """The fields of adapter_config.json, each with a value that it may have."""
    try:
        fields = parse_json(read_regular(path.resolve(), MAX_CONFIG_BYTES))
    except ValueError as error:
        raise DataError(f"{CONFIG} of {place} is not a LoRA configuration: {error}. Get the adapter anew.") from error
    if not isinstance(fields, dict):
        raise DataError(f"{CONFIG} of {place} holds a {type(fields).__name__}; expected an object. Get it anew.")
    for name, (fits, expected) in _VALUES.items():
        if name in fields and not fits(fields[name]):
            raise DataError(f"{name} in {CONFIG} of {place} is {fields[name]!r:.80}; expected {expected}. Get it anew.")
    return fields


def _find_problem(fields: dict[str, Any]) -> str | None:
    """What in the fields of adapter_config.json is not plain LoRA."""
    if (kind := fields.get("peft_type")) != "LORA":
        return f"is of the kind {str(kind)[:80]!r}; expected LORA"
    defaults = LoraConfig().to_dict()
    strange = [name for name, value in fields.items() if value and value != defaults.get(name)]
    if strange := sorted(set(strange) - {*_FIELDS, *_NOTES}):
        return f"sets {', '.join(strange)[:200]}; expected plain LoRA, which needs none of that"
    start = fields.get("init_lora_weights")
    if start not in _STARTS_THAT_LEAVE_THE_BASE:
        return f"started with {str(start)[:80]!r}, which changes the base model's weights; expected another start"
    names = [fields.get(name) for name in ("modules_to_save", "layers_pattern", "target_parameters")]
    if not _is_pattern(fields.get("target_modules")):
        names += [fields.get("target_modules"), fields.get("exclude_modules")]
    names += [list(fields.get(pattern) or ()) for pattern in ("rank_pattern", "alpha_pattern")]
    for each in names:
        listed = [each] if isinstance(each, str) else each or []
        # PEFT takes a string for a regular expression, and one can be written that never ends.
        if not isinstance(listed, list) or not all(isinstance(n, str) and _MODULE_NAME.fullmatch(n) for n in listed):
            return f"names the modules {str(each)[:80]!r}; expected plain names such as q_proj"
        if len(listed) > _MAX_NAMES:
            return f"names {len(listed)} modules in one list; expected at most {_MAX_NAMES}"
    return None
