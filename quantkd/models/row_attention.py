"""Attention over packed rows one row at a time, where SDPA with one mask over all rows computes what it masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils.import_utils import is_flash_attn_2_available

from quantkd.foreign import attention_of, registered_attention
from quantkd.models.network import base_network

ROW_ATTENTION = "quantkd_rows"


@contextmanager
def row_attention(model: Any) -> Iterator[None]:
    """Inside, a model with SDPA attends by row where its batches are packed, if it can."""
    # On a CPU packed batches in `benchmarks/step.py` gain 1.4 to 1.7 times in tokens per second. With checkpointing the
    # backward pass runs the attention again, so it belongs inside too.
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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, or a causal call per packed row that `position_ids` tell: (B, T, heads, D)."""
    lengths = None
    if sliding_window is None and position_ids is not None and query.shape[0] == 1 and query.shape[2] == key.shape[2]:
        lengths = _row_lengths(position_ids[0])
    if lengths is None:
        kwargs |= {"dropout": dropout, "scaling": scaling, "position_ids": position_ids}
        sdpa: Any = AttentionInterface()["sdpa"]
        output: tuple[Tensor, None] = sdpa(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs
        )
        return output
    parts = [
        nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _row_lengths(position_ids: Tensor) -> list[int] | None:
    """Tokens of each packed row; None for a single one."""
    starts = (position_ids == 0).nonzero().flatten()
    if starts.numel() < 2 or int(starts[0]) != 0:
        return None
    ends = torch.cat([starts[1:], starts.new_tensor([position_ids.numel()])])
    return [int(length) for length in ends - starts]
