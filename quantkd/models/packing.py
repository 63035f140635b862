"""Rows packed into one sequence: which models keep them apart, and attention that computes one row at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils.import_utils import is_flash_attn_2_available

from quantkd.foreign import attention_of, registered_attention
from quantkd.models.network import base_network, undisturbed
from quantkd.transfer_set.batch import position_ids_of

ROW_ATTENTION = "quantkd_rows"


def why_not_packable(model: Any) -> str | None:
    """Why rows packed into one sequence would not stay apart in this model, tried on two; None if they do."""
    # Attention follows the position ids in transformers; recurrent layers, ALiBi and some others do not.
    device = model.get_input_embeddings().weight.device
    positions = position_ids_of(torch.tensor([5, 6], device=device)).unsqueeze(0)
    second = torch.arange(1, 7, device=device).unsqueeze(0)
    both = [torch.cat([torch.full((1, 5), token, device=device), second], dim=1) for token in (0, 7)]
    try:
        with torch.no_grad(), undisturbed(model, device):
            alone = model(input_ids=second, use_cache=False).logits[0]
            packed = [model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 5:] for ids in both]
    except TypeError:
        return "its forward pass takes no position_ids"
    scale = alone.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
    if float((packed[0] - packed[1]).float().norm() / scale) > 1e-6:
        return "a packed row changes with the row before it"
    # Looser: shapes differ, and so do the kernels and their rounding in bfloat16.
    if float((packed[0] - alone).float().norm() / scale) > 5e-2:
        return "a packed row does not give the logits that it gives alone"
    return None


@contextmanager
def row_attention(model: Any) -> Iterator[None]:
    """Inside, a model with SDPA attends by row where its batches are packed, if it can."""
    # SDPA with one mask over all rows computes what it masks. On a CPU packed batches in `benchmarks/step.py` gain 1.4
    # to 1.7 times in tokens per second. With checkpointing the backward pass runs the attention again, so it belongs
    # inside too.
    network = base_network(model)
    chosen = _choose_attention(network)
    with registered_attention(ROW_ATTENTION, attend_by_row) if chosen == ROW_ATTENTION else nullcontext():
        try:
            if chosen is not None:
                network.set_attn_implementation(chosen)
        except (ImportError, ValueError):  # transformers has no FlashAttention for this model
            chosen = None
        try:
            yield
        finally:
            if chosen is not None:
                network.set_attn_implementation("sdpa")


def _choose_attention(network: Any) -> str | None:
    config, device = network.config.get_text_config(), network.get_input_embeddings().weight.device
    if attention_of(config) != "sdpa":
        return None
    if device.type == "cuda":
        is_narrow = config.dtype in (torch.float16, torch.bfloat16)
        can = is_narrow and is_flash_attn_2_available() and torch.cuda.get_device_capability(device) >= (8, 0)
        return "flash_attention_2" if can else None
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = kinds == {"full_attention"} and not getattr(config, "attention_chunk_size", None)
    return ROW_ATTENTION if plain and device.type == "cpu" else None


def attend_by_row(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, or a causal call per packed row that `position_ids` tell: (B, T, heads, D)."""
    position_ids, lengths = options.get("position_ids"), None
    is_whole = query.shape[0] == 1 and query.shape[2] == key.shape[2]
    if is_whole and position_ids is not None and options.get("sliding_window") is None:
        lengths = _row_lengths(position_ids[0])
    if lengths is None:
        sdpa: Any = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    how: dict[str, Any] = {"is_causal": True, "enable_gqa": query.shape[1] != key.shape[1]}
    how |= {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling")}
    rows = zip(*(each.split(lengths, 2) for each in (query, key, value)), strict=True)
    parts = [nn.functional.scaled_dot_product_attention(*row, **how) for row in rows]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _row_lengths(position_ids: Tensor) -> list[int] | None:
    """Tokens of each packed row; None for a single one."""
    starts = (position_ids == 0).nonzero().flatten()
    if starts.numel() < 2 or int(starts[0]) != 0:
        return None
    ends = torch.cat([starts[1:], starts.new_tensor([position_ids.numel()])])
    return [int(length) for length in ends - starts]
