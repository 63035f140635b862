"""A GGUF file as the student: its exact values in floating point, frozen, and its own bytes beside them.

transformers keeps a GGUF file packed for inference only. What is trained against here is what the file dequantizes to.
"""

from __future__ import annotations

import logging
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from quantkd.errors import ConfigError
from quantkd.models.gguf_files import (
    COMPUTED_TENSORS,
    GgufFile,
    GgufTensor,
    architecture_of,
    map_modules,
    open_gguf,
    read_values,
)
from quantkd.models.network import base_network
from quantkd.models.original_weights import OriginalWeights, read_original
from quantkd.names import HUB_ARGUMENTS, find_file, hub_arguments, load_tokenizer, naming

_POSITIVE = (
    ".embedding_length", ".feed_forward_length", ".head_count", ".head_count_kv", ".rope.dimension_count",
    ".rope.freq_base", ".key_length", ".value_length", "_epsilon", ".context_length",
)  # fmt: skip
_MAX_BLOCKS = 1024
_FEW_ITEMS, _ITEMS_A_TOKEN = 2**16, 4  # of an array that stands alone, and beside the embeddings of its tokens

logger = logging.getLogger(__name__)  # says how much memory a file takes; the command line prints it


def find_gguf(
    name_or_path: str | os.PathLike[str],
    gguf_file: str | None = None,
    quantization_config: Any = None,
    **model_init_kwargs: Any,
) -> GgufFile | None:
    """The GGUF file that a student is given as: a path, or a file of the folder or repository; None for another."""
    name_or_path = os.fspath(name_or_path)
    gguf_file = gguf_file or getattr(quantization_config, "gguf_file", None)
    if gguf_file is None:
        return open_gguf(name_or_path) if name_or_path.endswith(".gguf") else None
    where = hub_arguments(model_init_kwargs)
    path = Path(gguf_file) if Path(gguf_file).is_file() else find_file(name_or_path, str(gguf_file), **where)
    if path is None:
        raise ConfigError(
            f"gguf_file is {str(gguf_file)!r}, which is no file here and none of {name_or_path}. Give the path of a "
            "GGUF file, or its name in the model's folder or repository."
        )
    return open_gguf(path)


def load_gguf(name_or_path: str, file: GgufFile, dtype: torch.dtype, **model_init_kwargs: Any) -> PreTrainedModel:
    """The model of a file, with the config of the checkpoint `name_or_path`, or that in the file if there is none."""
    options = {key: value for key, value in model_init_kwargs.items() if key not in (*HUB_ARGUMENTS, "gguf_file")}
    trusted = {"trust_remote_code": options.pop("trust_remote_code", False)}
    checkpoint = _is_checkpoint(name_or_path, file, model_init_kwargs)
    config = _read_config(name_or_path if checkpoint else None, file, {**hub_arguments(model_init_kwargs), **trusted})
    try:
        with torch.device("meta"):
            outline: Any = AutoModelForCausalLM.from_config(config, **trusted)
    except Exception as error:
        if checkpoint:
            raise
        raise ConfigError(_unread(file, "config", error)) from error  # of numbers that do not go together
    tensors = _match(file, outline)
    count = sum(tensor.size for tensor in tensors.values())
    logger.info(
        "%s, %s: its %s weights are held in %s, which takes %.2f GB of memory.",
        file.path.name, file.format, f"{count:,}", str(dtype).removeprefix("torch."), count * dtype.itemsize / 1e9,
    )  # fmt: skip
    values = {name: read_values(config, tensor).to(dtype) for name, tensor in tensors.items()}
    model: Any = type(outline).from_pretrained(None, config=config, state_dict=values, dtype=dtype, **options)
    model.name_or_path = model.config.name_or_path = name_or_path  # PEFT writes the former into an adapter's config
    model.gguf_file = file
    head = model.get_output_embeddings()
    layers: list[Any] = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    for name, layer in layers:
        if layer is not head:
            layer.gguf_tensor = tensors[f"{name}.weight"]
    if checkpoint:
        with suppress(OSError):  # there is none
            model.generation_config = GenerationConfig.from_pretrained(name_or_path, **hub_arguments(model_init_kwargs))
        if Path(name_or_path).is_dir():
            check_origin(name_or_path, model)
    return model  # type: ignore[no-any-return]


def load_student_tokenizer(student: Any, **model_init_kwargs: Any) -> Any:
    """The tokenizer of a student, by name or loaded: its checkpoint's, or that in the GGUF file if there is none."""
    if isinstance(student, str):
        name, file = student, find_gguf(student, **model_init_kwargs)
    else:
        name, file = student.config.name_or_path or "", getattr(base_network(student), "gguf_file", None)
    if file is None or _is_checkpoint(name, file, model_init_kwargs):
        return load_tokenizer(student, **model_init_kwargs)
    _check_alone(file)
    try:
        return AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as error:  # of any type, where transformers does not know the kind of tokenizer
        raise ConfigError(_unread(file, "tokenizer", error)) from error


def _read_config(checkpoint: str | None, file: GgufFile, options: dict[str, Any]) -> Any:
    """The config of a checkpoint, or as transformers reads it from the file."""
    if checkpoint is not None:
        with naming(checkpoint):
            config = AutoConfig.from_pretrained(checkpoint, **options)
        if config.get_text_config() is not config:
            raise ConfigError(
                f"{checkpoint} is of more than text ({config.model_type}), and students in GGUF are text models. Save "
                "its language model as a checkpoint of its own, and name that."
            )
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigError(
                f"{checkpoint} is quantized, and the student is {file.path.name}. Name the full-precision checkpoint "
                "that the file was made from."
            )
    else:
        held = (*file.metadata, *file.tensors)
        scaled = [key for key in held if ".rope.scaling." in key or key in COMPUTED_TENSORS]
        if scaled:  # transformers would leave it out, and every answer be another one
            raise ConfigError(_unread(file, "config", ValueError(f"it scales positions, {scaled[0]}")))
        _check_alone(file)
        try:
            config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
        except Exception as error:
            raise ConfigError(_unread(file, "config", error)) from error
        logger.warning(
            "The config comes from %s, of which transformers reads the common fields alone. To use that of the "
            "full-precision checkpoint, name it as the model and the file as gguf_file.",
            file.path.name,
        )
    if (expected := architecture_of(config)) != file.architecture:
        raise ConfigError(
            f"{file.path.name} has the architecture {file.architecture}; expected {expected}, that of the model "
            f"{checkpoint or config.model_type}. Name the checkpoint that the file was made from."
        )
    is_tied = "output.weight" not in file.tensors  # llama.cpp knows it by that alone
    if checkpoint is not None:
        if is_tied and not config.tie_word_embeddings:
            raise ConfigError(f"{file.path.name} has no output.weight, the head of {checkpoint}. {_REMEDY}")
        _compare_metadata(config, file, checkpoint)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = is_tied
    return config


def _compare_metadata(config: Any, file: GgufFile, checkpoint: str) -> None:
    """Say what the file's metadata, which llama.cpp goes by, have otherwise than the config that is trained with."""
    rope = getattr(config, "rope_parameters", None) or {}
    own = {
        "rope.freq_base": rope.get("full_attention", rope).get("rope_theta"),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }
    for key, value in own.items():
        found = file.metadata.get(name := f"{file.architecture}.{key}")
        if not value or not isinstance(found, (int, float)) or name in file.arrays:
            continue
        if not math.isclose(found, value, rel_tol=1e-4):
            logger.warning(
                "%s has %s of %g, and %s of %g. llama.cpp goes by the file, and the student is trained with the "
                "latter: name the checkpoint that the file was made from.",
                file.path.name, name, found, checkpoint, value,
            )  # fmt: skip


def _check_alone(file: GgufFile) -> None:
    """Refuse metadata that a model of this file cannot have, before anything is built from it."""
    rows = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0
    blocks = file.metadata.get(f"{file.architecture}.block_count")
    found = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    wrong = [
        f"{name} has {file.metadata[name]:,} items for {rows:,} tokens"
        for name in file.arrays
        if file.metadata[name] > max(_FEW_ITEMS, _ITEMS_A_TOKEN * rows)
    ]
    wrong += [
        f"{name} is {value!r:.80}; expected a number above 0"
        for name, value in file.metadata.items()
        if name.endswith(_POSITIVE) and not (type(value) in (int, float) and 0 < value < math.inf)
    ]
    heads, groups, width = (
        None if name in file.arrays else file.metadata.get(name)  # by layer in some families
        for name in (f"{file.architecture}.attention.{key}" for key in ("head_count", "head_count_kv", "key_length"))
    )
    if not wrong and type(heads) is type(groups) is int and heads % groups:
        wrong.append(f"it has {heads} attention heads in groups of {groups}; expected a multiple")
    if not wrong and type(width) is int and width % 2:
        wrong.append(f"attention.key_length is {width}; expected an even number")
    if type(blocks) is not int or not 0 < blocks <= _MAX_BLOCKS or found != set(map(str, range(blocks))):
        wrong.append(f"block_count is {blocks!r:.80}, and there are tensors of {len(found):,} blocks")
    if wrong:
        raise ConfigError(f"{file.path.name}: {wrong[0]}. It is broken; get it anew.")


def _match(file: GgufFile, outline: Any) -> dict[str, GgufTensor]:
    """The tensor of each of the model's parameters; refused unless all are there, all are used, and all fit."""
    names, found = map_modules(outline), dict[str, GgufTensor]()
    is_tied = outline.config.get_text_config().tie_word_embeddings
    tied = id(outline.get_output_embeddings()) if is_tied else None
    for module_name, module in outline.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            if id(module) == tied:
                continue
            name, stored = f"{module_name}.{part}", f"{names.get(module_name)}.{part}"
            if stored not in file.tensors:
                raise ConfigError(f"{file.path.name} has no tensor for {name} ({stored}). {_REMEDY}")
            if file.tensors[stored].shape != tuple(parameter.shape):
                raise ConfigError(
                    f"{stored} of {file.path.name} has the shape {file.tensors[stored].shape}; expected "
                    f"{tuple(parameter.shape)}, that of {name}. {_REMEDY}"
                )
            found[name] = file.tensors[stored]
    used = {tensor.name for tensor in found.values()}
    if unused := sorted(file.tensors.keys() - used - COMPUTED_TENSORS):
        raise ConfigError(
            f"{file.path.name} has {unused[0]}, which the model {type(outline).__name__} has no weight for. {_REMEDY}"
        )
    return found


_REMEDY = "Name the checkpoint that the file was made from, or get the file anew."


def check_origin(checkpoint: str, student: Any, revision: str | None = None) -> None:
    """Refuse a student of a GGUF file that was not made from a checkpoint, by its first and its last layer."""
    network = base_network(student)
    named = network.named_modules()
    layers = [(name.replace(".base_layer", ""), each) for name, each in named if hasattr(each, "gguf_tensor")]
    if not layers:
        return  # of another format
    try:
        weights = OriginalWeights(checkpoint, network, revision)
    except (ConfigError, OSError):
        return  # without weights in full precision
    for name, layer in (layers[0], layers[-1]):
        try:
            read_original(weights, name, layer)
        except ConfigError as error:
            file = network.gguf_file.path.name
            raise ConfigError(f"{file} does not fit {checkpoint}. {name}: {error} {_REMEDY}") from error


def _is_checkpoint(name_or_path: str, file: GgufFile, model_init_kwargs: dict[str, Any]) -> bool:
    """Whether a checkpoint is named, and not the GGUF file itself, or a folder or repository of such files."""
    if Path(name_or_path).is_file():
        return False
    where = hub_arguments(model_init_kwargs)
    files = (find_file(name_or_path, each, **where) for each in ("config.json", file.path.name))
    return next(files) is not None or next(files) is None


def _unread(file: GgufFile, what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return (
        f"transformers cannot read the {what} of {file.path.name} ({reason}). Name the full-precision checkpoint that "
        "it was made from as the model, and the file as gguf_file."
    )
