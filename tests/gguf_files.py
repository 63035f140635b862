"""GGUF files of tiny models, and of any text model that llama.cpp converts without more than names, rows and norms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

PERMUTED = {"llama", "smollm3", "granite"}
SHIFTED = {"gemma", "gemma2", "gemma3"}


def write_gguf(
    model: Any, path: Path, kind: str = "Q4_0", *, architecture: str = "llama", tokenizer: Any = None,
    leave_out: str = "", extra: Any = None, **kinds: str,
) -> Path:  # fmt: skip
    """A file of the model's weights, in `kind` where rows are whole blocks of it and F32 elsewhere.

    `kinds` are other types by a part of tensors' names, such as ffn_down="Q8_0"; `extra` are further tensors.
    """
    import gguf

    config = model.config.get_text_config()
    writer = gguf.GGUFWriter(path, architecture)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, value in {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size, "layer_norm_rms_eps": getattr(config, "rms_norm_eps", 1e-5),
        **dict.fromkeys(("rope_dimension_count", "key_length", "value_length"), width),
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(rope.get("full_attention", rope).get("rope_theta", 10000.0))
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer)
    for name, values in {**stored_weights(model, architecture), **(extra or {})}.items():
        if name == leave_out:
            continue
        chosen = next((each for part, each in kinds.items() if part in name.split(".")), kind)
        whole = gguf.GGMLQuantizationType[chosen]
        if values.ndim < 2 or values.shape[-1] % gguf.GGML_QUANT_SIZES[whole][0]:
            whole = gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, encode(values, whole), raw_dtype=whole)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def add_tokenizer(writer: Any, tokenizer: Any) -> None:
    """A byte-level BPE as llama.cpp stores it."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = [each if isinstance(each, str) else " ".join(each) for each in described["model"]["merges"]]
    types = [3 if each in tokenizer.all_special_tokens else 1 for each in tokens]
    for name, value in {
        "tokenizer_model": "gpt2", "tokenizer_pre": "default", "token_list": tokens, "token_types": types,
        "token_merges": merges, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "chat_template": tokenizer.chat_template,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)


def stored_weights(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """The weights of a model in float32 under llama.cpp's names and in its order."""
    import gguf

    config = model.config.get_text_config()
    (number,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    stored = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values, new = tensor.float().numpy(), names.get_name(name, try_suffixes=(".weight", ".bias"))
        if architecture in PERMUTED and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            pairs = values.reshape(heads, 2, len(values) // heads // 2, -1)
            values = pairs.swapaxes(1, 2).reshape(values.shape)  # each half of a head, value by value
        if architecture in SHIFTED and name.endswith("norm.weight"):
            values = values + 1
        stored[new] = values
    return stored


def encode(values: np.ndarray, kind: Any) -> np.ndarray:
    """The blocks of a type; of those that `gguf` only reads, random ones of about the size of the values."""
    import gguf

    try:
        return gguf.quants.quantize(np.ascontiguousarray(values), kind)
    except NotImplementedError:
        per_block, size = gguf.GGML_QUANT_SIZES[kind]
        seed = int(torch.from_numpy(values.copy()).abs().sum() * 1000) % 2**32
        blocks = np.random.default_rng(seed).integers(0, 256, (values.size // per_block, size), dtype=np.uint8)
        places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
        for place in places:  # the constants of a block, in float16
            blocks[:, place : place + 2] = np.array([values.std() / 500], np.float16).view(np.uint8)
        return blocks.reshape(*values.shape[:-1], -1)
