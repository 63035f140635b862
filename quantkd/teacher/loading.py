"""From a name to a teacher: which engine runs it, its tokenizer, and an adapter on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from quantkd.errors import ConfigError
from quantkd.hardware import default_device, parse_dtype
from quantkd.names import naming, public_name, refuse_adapter
from quantkd.teacher.teacher import GenerationSettings, Teacher
from quantkd.teacher.transformers import TransformersTeacher
from quantkd.transfer_set.rules import StorageRule

if TYPE_CHECKING:
    from collections.abc import Sequence


Engine = Literal["transformers", "vllm", "server"]
_ENGINES = ("transformers", "vllm", "server")


def load_teacher(
    name_or_path: str, *, dtype: str | None = None, **model_init_kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer in 16 bit, or in float32 where bfloat16 is not native."""
    with naming(name_or_path):
        refuse_adapter(name_or_path, **model_init_kwargs)
    tokenizer = load_tokenizer(name_or_path, model_init_kwargs)
    kwargs = {"dtype": parse_dtype(dtype), "device_map": {"": default_device()}, "trust_remote_code": False}
    with naming(name_or_path):
        return AutoModelForCausalLM.from_pretrained(name_or_path, **{**kwargs, **model_init_kwargs}), tokenizer


def load_tokenizer(name_or_path: str, model_init_kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    kwargs = {key: model_init_kwargs[key] for key in ("revision", "token") if key in model_init_kwargs}
    remote = bool(model_init_kwargs.get("trust_remote_code", False))
    with naming(name_or_path):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=remote, **kwargs
        )
    return tokenizer


def is_teacher(model: object) -> bool:
    """Whether `model` can be asked as a `Teacher`, and is not a bare model or its name."""
    return all(hasattr(model, name) for name in ("answer", "score", "engine"))


def check_engine(
    model: Any, engine: str, base_url: str | None, engine_kwargs: Mapping[str, Any] | None, adapter: str | None
) -> None:
    """Refuse arguments that belong to another engine."""
    if engine not in _ENGINES:
        raise ConfigError(f"engine is one of {', '.join(_ENGINES)}, found {engine!r}.")
    if is_teacher(model):
        if engine != "transformers" or base_url or engine_kwargs or adapter:
            raise ConfigError(
                "engine, base_url, engine_kwargs and teacher_adapter apply to a teacher given by name; a teacher "
                "object is taken as it is. Leave them out."
            )
        return
    if engine != "transformers" and not isinstance(model, str):
        raise ConfigError(f"engine={engine!r} loads the model itself; found a loaded {type(model).__name__}. Name it.")
    if (engine == "server") != (base_url is not None):
        found = "none" if base_url is None else repr(base_url)
        raise ConfigError(
            f"base_url is the address of the server engine; found {found} with engine={engine!r}. "
            "Give both engine='server' and base_url, or neither."
        )
    if engine == "transformers" and engine_kwargs:
        raise ConfigError(
            f"engine_kwargs {sorted(engine_kwargs)} go to vLLM or to the server engine; the transformers engine takes "
            "model_init_kwargs. Name the engine, or move them."
        )
    if engine != "transformers" and adapter:
        raise ConfigError(
            f"teacher_adapter is attached by the transformers engine alone, found engine={engine!r}. "
            "Merge the adapter into a checkpoint (PEFT's merge_and_unload), and name that."
        )


def attach_adapter(model: Any, adapter: str) -> tuple[Any, dict[str, str]]:
    """The model with a PEFT adapter in its layers, unmerged, so that no weight is rounded."""
    from peft import get_peft_model_state_dict

    from quantkd.hub.adapters import load_adapter  # it imports the student, which a teacher on a server does without

    wrapped = load_adapter(model, adapter)
    digest = hashlib.sha256()
    for name, tensor in sorted(get_peft_model_state_dict(wrapped).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return wrapped.get_base_model(), {"name": public_name(adapter), "sha256": digest.hexdigest()}


def build_teacher(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    rule: StorageRule,
    temperatures: Sequence[float],
    settings: GenerationSettings,
    *,
    engine: str = "transformers",
    base_url: str | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    dtype: str | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Teacher, PreTrainedTokenizerBase, dict[str, str]]:
    """A teacher on any engine, from a name or a loaded model."""
    extra = dict(model_init_kwargs or {})
    if engine == "transformers":
        described: dict[str, str] = {}
        network, tokenizer = _resolve_network(model, tokenizer, dtype, extra)
        if adapter:
            network, described = attach_adapter(network, adapter)
        return TransformersTeacher(network, tokenizer, rule, temperatures, settings), tokenizer, described
    assert isinstance(model, str)  # by check_engine
    kwargs = dict(engine_kwargs or {})
    if engine == "vllm":
        from quantkd.teacher.vllm import VLLMTeacher

        tokenizer = tokenizer or load_tokenizer(model, extra)
        if dtype is not None:
            kwargs.setdefault("dtype", dtype)
        own = {key: value for key, value in extra.items() if key in ("revision", "trust_remote_code")}
        vllm = VLLMTeacher(model, tokenizer, rule, temperatures, settings, **{**own, **kwargs})
        return vllm, tokenizer, {}
    from quantkd.teacher.server import ServerTeacher

    # A server may use any name for its model; then the tokenizer is named beside it.
    tokenizer = tokenizer or load_tokenizer(kwargs.pop("tokenizer", model), extra)
    if dtype is not None:
        kwargs.setdefault("dtype", dtype)
    assert base_url is not None  # by check_engine
    return ServerTeacher(base_url, model, tokenizer, rule, temperatures, settings, **kwargs), tokenizer, {}


def _resolve_network(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, dtype: str | None, model_init_kwargs: Mapping[str, Any]
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and its tokenizer, loaded where only a name is given."""
    if isinstance(model, str):
        loaded, own = load_teacher(model, dtype=dtype, **model_init_kwargs)
        return loaded, tokenizer or own
    if dtype is not None or model_init_kwargs:
        raise ConfigError(
            "dtype and model_init_kwargs apply to a teacher given by name; a loaded model is taken as it is. "
            "Leave them out, or pass the name."
        )
    if tokenizer is None:
        if not model.config.name_or_path:
            raise ConfigError("The loaded teacher does not say where its tokenizer is; pass it as tokenizer.")
        tokenizer = load_tokenizer(model.config.name_or_path, {})
    return model, tokenizer
