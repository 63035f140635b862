"""From a name to a teacher: which engine runs it, its tokenizer, and an adapter on it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from quantkd.errors import ConfigError
from quantkd.foreign import keep_commit
from quantkd.hardware import default_device, parse_dtype
from quantkd.models.adapter_files import read_plain_lora
from quantkd.models.provenance import Provenance
from quantkd.models.student import stored_quantization
from quantkd.names import load_tokenizer, naming, plain_name, public_name, refuse_adapter
from quantkd.teacher.teacher import GenerationSettings, RunSettings, Teacher
from quantkd.teacher.transformers import TransformersTeacher
from quantkd.transfer_set.rules import DEFAULT_STORAGE, Sampled, StorageRule


def load_teacher(
    name_or_path: str, *, dtype: str | None = None, **model_init_kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer in 16 bit, or in float32 where bfloat16 is not native."""
    kwargs = {"dtype": parse_dtype(dtype), "device_map": {"": default_device()}, "trust_remote_code": False}
    with naming(name_or_path):
        refuse_adapter(name_or_path, **model_init_kwargs)
        tokenizer = load_tokenizer(name_or_path, **model_init_kwargs)
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **{**kwargs, **model_init_kwargs})
    keep_commit(model.config, model_init_kwargs.get("revision"))
    return model, tokenizer


def build_teacher(
    model: str | os.PathLike[str] | PreTrainedModel | Teacher,
    tokenizer: PreTrainedTokenizerBase | None,
    storage: StorageRule | None,
    temperatures: Sequence[float] | None,
    generation: GenerationSettings | None,
    run: RunSettings,
) -> Teacher:
    """A teacher on any engine, from its name or a loaded model; one that is built already is checked."""
    model = plain_name(model)
    if isinstance(model, Teacher):
        _refuse_loading(run, "a Teacher")
        for name, asked, found in (
            ("storage", storage, model.rule),
            ("temperatures", None if temperatures is None else tuple(map(float, temperatures)), model.temperatures),
            ("the generation settings", generation, model.settings),
        ):
            if asked is not None and asked != found:
                raise ConfigError(
                    f"The teacher was built with {name} {found}, and the call asks for {asked}. Leave that out of the "
                    "call, or build the teacher with it."
                )
        return model
    if not isinstance(model, str):
        _refuse_loading(replace(run, teacher_adapter=None), f"a loaded {type(model).__name__}")
    named = {key: getattr(run, key) for key in ("revision", "attn_implementation", "trust_remote_code")}
    init_kwargs: dict[str, Any] = {key: value for key, value in named.items() if value}
    rule, settings = storage or DEFAULT_STORAGE, generation or GenerationSettings()
    plain = isinstance(rule, Sampled) or run.engine != "transformers"
    kept = temperatures or ((1.0,) if plain else (1.0, 2.0))
    if run.engine == "transformers":
        network: Any = model
        adapter: dict[str, str] = {}
        # First: to load a model takes minutes.
        folder = _find_adapter(run.teacher_adapter, model, **init_kwargs) if run.teacher_adapter else None
        if isinstance(model, str):
            network, own = load_teacher(model, dtype=run.dtype, **init_kwargs)
            tokenizer = tokenizer or own
        tokenizer = tokenizer or load_tokenizer(network)
        if folder is not None:
            network, adapter = _attach_adapter(network, folder, str(run.teacher_adapter))
        return TransformersTeacher(network, tokenizer, rule, kept, settings, adapter=adapter)
    name, kwargs = str(model), run.engine_arguments()
    # A server may use any name for its model; then the tokenizer is named in addition.
    tokenizer = tokenizer or load_tokenizer(kwargs.pop("tokenizer", name), **init_kwargs)
    if run.dtype is not None:
        kwargs.setdefault("dtype", run.dtype)
    if run.engine == "vllm":
        from quantkd.teacher.vllm import VLLMTeacher

        return VLLMTeacher(name, tokenizer, rule, kept, settings, **{**init_kwargs, **kwargs})
    from quantkd.teacher.model_server import naming_engine_kwargs
    from quantkd.teacher.server import ServerTeacher

    with naming_engine_kwargs():
        return ServerTeacher(str(run.base_url), name, tokenizer, rule, kept, settings, **kwargs)


def _refuse_loading(run: RunSettings, found: str) -> None:
    """Refuse settings that say how a teacher given by name is loaded, where one is loaded already."""
    if run != replace(
        run, engine="transformers", base_url=None, engine_kwargs=None, dtype=None, revision=None,
        attn_implementation=None, trust_remote_code=False, teacher_adapter=None,
    ):  # fmt: skip
        raise ConfigError(
            "engine, base_url, engine_kwargs, dtype, revision, attn_implementation, trust_remote_code and "
            f"teacher_adapter apply to a teacher given by name; found {found}. Leave them out, or pass the name."
        )


def _find_adapter(adapter: str, model: Any, **model_init_kwargs: Any) -> Path:
    """The folder of an adapter, refused if no model, or not this one that is named and not loaded, can take it."""
    from quantkd.hub.adapters import fetch_adapter  # the trainer imports this module, and must not load the Hub's

    folder = fetch_adapter(adapter)
    read_plain_lora(folder, adapter)
    if isinstance(model, str):
        with naming(model):
            if not stored_quantization(model, **model_init_kwargs):
                Provenance.read(folder).check_weights(nn.Module(), adapter)  # none of the model's is quantized
    return folder


def _attach_adapter(model: Any, folder: Path, name: str) -> tuple[Any, dict[str, str]]:
    """The model with a PEFT adapter in its layers, unmerged, so that no weight is rounded."""
    from peft import get_peft_model_state_dict

    from quantkd.hub.adapters import load_adapter

    wrapped = load_adapter(model, folder)
    digest = hashlib.sha256()
    for key, tensor in sorted(get_peft_model_state_dict(wrapped).items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return wrapped.get_base_model(), {"name": public_name(name), "sha256": digest.hexdigest()}
