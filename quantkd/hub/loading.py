"""A stranger's adapter on a base model of one's own: no code, no pickle, no base model of the stranger's choice."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from quantkd.errors import ConfigError, DataError, HubError
from quantkd.hub.adapter import ADAPTER_CONFIG as _CONFIG, ADAPTER_WEIGHTS
from quantkd.hub.reading import HubFiles
from quantkd.hub.secrets import public_name
from quantkd.models.student import load_student
from quantkd.transfer_set.source import split_revision

logger = logging.getLogger(__name__)

_PICKLE = "adapter_model.bin"
_MAX_CONFIG_BYTES = 2**20
_MAX_WEIGHTS_BYTES = 2**36
# What shapes plain LoRA. Other fields import packages, repeat layers or read files, and are refused if they are set.
_FIELDS = (
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
)
# Notes of PEFT that change nothing here: the weights are loaded over whatever the start was, if it left the base alone;
# and `auto_mapping`, which it writes where no task type was given, names the base model's class, which is the caller's.
_NOTES = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_type", "peft_version",
    "revision",
)  # fmt: skip
_STARTS_THAT_LEAVE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_MODULE_NAME = re.compile(r"[\w.-]{1,256}")
_ADAPTED = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?A(?:\.weight)?")
# Of an adapter on the Hub, what else an export copies or reads.
_DESCRIPTIONS = ("README.md", "quantkd.json")


@dataclass(frozen=True)
class _Found:
    """Where an adapter lies: as it is printed, its folder, its two files; and the repository if it is on the Hub."""

    place: str
    folder: Path
    config: Path
    weights: Path
    files: HubFiles | None


def load_adapter(
    base: PreTrainedModel | str,
    adapter: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    is_trainable: bool = False,
    **model_kwargs: Any,
) -> PeftModel:
    """Attach a LoRA adapter from the Hub or a folder to a base model that the caller chose.

    The base model that the adapter names is compared and never loaded. Only safetensors are read. The commit is logged,
    and stands as `hub_revision` on the model.

    Args:
        base: a loaded model; or its name or folder, loaded in NF4 without remote code.
        adapter: a folder; or `user/name` or `user/name@revision` on the Hub, if there is no such folder here.
        revision: of the repository: a branch, tag or commit. It is pinned to its commit now.
        token: for a private repository.
        is_trainable: keep the adapter trainable.
        **model_kwargs: for a base given by name, what `load_student` takes.

    Returns:
        The model with the adapter.

    Raises:
        DataError: no adapter there, a pickle, a configuration that asks for more than plain LoRA, or one that does not
            fit the base model.
        ConfigError: a revision of a folder.
        HubError: the Hub could not be reached, and the adapter is not in the cache.
    """
    found = _find(str(adapter), revision, token)
    place = found.place
    config, named_base = _read_config(found.config, place)
    model = load_student(base, **{"trust_remote_code": False, **model_kwargs}) if isinstance(base, str) else base
    own = str(getattr(model.config, "_name_or_path", "") or "")
    if named_base and own and _last_part(named_base) != _last_part(own):
        logger.warning(
            "The adapter %s says that it was trained on %r; it is attached to %r. If that is another model, its "
            "answers mean nothing.",
            place,
            _last_part(named_base),
            _last_part(own),
        )
    config.inference_mode = not is_trainable
    try:
        weights = load_file(found.weights)
        if _is_pattern(config.target_modules):  # the weights say as well which modules it means
            config.target_modules = sorted({match[1] for name in weights if (match := _ADAPTED.fullmatch(name))})
            config.exclude_modules = None
        loaded: Any = get_peft_model(model, config)
        result: Any = set_peft_model_state_dict(loaded, weights)
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:500]
        raise DataError(
            f"The adapter {place} does not fit the base model {_last_part(own) or type(model).__name__}: {reason}. "
            "Load it on the model that it was trained on."
        ) from error
    lacking = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or lacking:
        raise DataError(
            f"The adapter {place} does not fit its own configuration: {len(lacking)} weights are missing and "
            f"{len(result.unexpected_keys)} have no place, first {[*lacking, *result.unexpected_keys][0]!r}. Get it "
            "anew, or ask its maker."
        )
    if found.files is not None:
        logger.info("Adapter %s", place)
    loaded.hub_revision = place
    if not is_trainable:
        loaded.eval()
    attached: PeftModel = loaded
    return attached


def fetch_adapter(adapter: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """A folder with an adapter's files: the one that is named, or what the Hub's cache holds of a repository.

    Nothing is loaded. The commit is logged.
    """
    found = _find(str(adapter), revision, token)
    if found.files is not None:
        for name in _DESCRIPTIONS:
            found.files.fetch(name, max_bytes=_MAX_CONFIG_BYTES)
        logger.info("Adapter %s", found.place)
    return found.folder


def _find(adapter: str, revision: str | None, token: str | None) -> _Found:
    name, revision = split_revision(adapter, revision)
    files = None
    if name is None:
        if revision is not None:
            raise ConfigError(
                f"revision is {revision!r}, and {adapter} is a folder; only an adapter on the Hub has revisions."
            )
        place, folder = adapter, Path(adapter)
        config, weights = (path if path.is_file() else None for path in (folder / _CONFIG, folder / ADAPTER_WEIGHTS))
        has_pickle = (folder / _PICKLE).is_file()
    else:
        files = HubFiles(name, "model", revision, token)
        try:
            config = files.fetch(_CONFIG, max_bytes=_MAX_CONFIG_BYTES)
            weights = files.fetch(ADAPTER_WEIGHTS, max_bytes=_MAX_WEIGHTS_BYTES)
        except HubError as error:
            raise type(error)(f"There is no folder {adapter!r} here. On the Hub: {error}") from error
        has_pickle = weights is None and files.holds(_PICKLE)
        place, folder = str(files), files.folder
    if config is None or weights is None:
        if has_pickle:
            raise DataError(
                f"{place} holds {_PICKLE}, a pickle, which can run any code when it is opened; expected "
                f"{ADAPTER_WEIGHTS}. Ask its maker to save it as safetensors."
            )
        if files is None and not folder.is_dir():
            raise DataError(f"There is no folder {adapter!r}. Give an adapter's folder, or its name on the Hub.")
        missing = _CONFIG if config is None else ADAPTER_WEIGHTS
        raise DataError(f"{place} holds no {missing}; expected an adapter that PEFT saved. Check the name.")
    return _Found(place, folder, config, weights, files)


def _read_config(path: Path, place: str) -> tuple[LoraConfig, str]:
    """Plain LoRA from checked fields, and the base model that the adapter names."""
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise DataError(f"{_CONFIG} of {place} has {path.stat().st_size} bytes; expected {_MAX_CONFIG_BYTES} at most.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{_CONFIG} of {place} is not JSON: {error}. Get the adapter anew.") from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        found = fields.get("peft_type") if isinstance(fields, dict) else type(fields).__name__
        raise DataError(f"{place} is of the kind {found!r}; expected LORA. Load it with PEFT, if you trust it.")
    defaults = LoraConfig().to_dict()
    strange = sorted(
        name for name, value in fields.items()
        if name not in (*_FIELDS, *_NOTES) and value and value != defaults.get(name)
    )  # fmt: skip
    if strange:
        raise DataError(
            f"{_CONFIG} of {place} sets {', '.join(strange)[:200]}; expected plain LoRA, which needs none of that. "
            "Load it with PEFT, if you trust it."
        )
    start = fields.get("init_lora_weights")
    if not any(start is each or (isinstance(start, str) and start == each) for each in _STARTS_THAT_LEAVE_THE_BASE):
        raise DataError(
            f"{place} started with {str(start)[:80]!r}, which changes the base model's weights as well; expected one "
            "that leaves them alone. Ask its maker to convert it (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion)."
        )
    names = [fields.get("modules_to_save")]
    if not _is_pattern(fields.get("target_modules")):
        names += [fields.get("target_modules"), fields.get("exclude_modules")]
    names += [list(fields.get(pattern) or ()) for pattern in ("rank_pattern", "alpha_pattern")]
    names += [fields.get("layers_pattern")]
    for each in names:
        listed = [each] if isinstance(each, str) else each or []
        # PEFT takes a string for a regular expression, and one can be written that never ends.
        if not isinstance(listed, list) or not all(isinstance(n, str) and _MODULE_NAME.fullmatch(n) for n in listed):
            raise DataError(
                f"{_CONFIG} of {place} names the modules {str(each)[:80]!r}; expected plain names such as q_proj. Load "
                "it with PEFT, if you trust it."
            )
    try:
        config = LoraConfig(**{name: fields[name] for name in _FIELDS if name in fields})
    except (TypeError, ValueError) as error:
        raise DataError(f"{_CONFIG} of {place} is no LoRA configuration: {error}. Get the adapter anew.") from error
    return config, str(fields.get("base_model_name_or_path") or "")


def _is_pattern(modules: Any) -> bool:
    """Whether modules are named by a regular expression. It is never run: one can be written that never ends."""
    return isinstance(modules, str) and not _MODULE_NAME.fullmatch(modules)


def _last_part(name_or_path: str) -> str:
    """Of a path or a Hub name the last part, printable: a stranger's words go to a terminal."""
    name = public_name(name_or_path).split("/")[-1][:100]
    return "".join(character if character.isprintable() else "?" for character in name)
