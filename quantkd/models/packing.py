"""Rows packed into one sequence: which models keep them apart."""

from __future__ import annotations

from typing import Any

import torch

from quantkd.models.network import undisturbed
from quantkd.transfer_set.collator import position_ids_of


def why_not_packable(model: Any) -> str | None:
    """Why rows packed into one sequence would not stay apart in this model, tried on two; None if they do."""
    # Attention follows the position ids in transformers; recurrent layers, ALiBi and some others do not.
    device = model.get_input_embeddings().weight.device
    lengths = torch.tensor([5, 6], device=device)
    positions = position_ids_of(lengths).unsqueeze(0)
    second = torch.arange(1, 7, device=device)
    try:
        with torch.no_grad(), undisturbed(model, device):
            alone = model(input_ids=second.unsqueeze(0), use_cache=False).logits[0]
            packed = [
                model(
                    input_ids=torch.cat([torch.full((5,), token, device=device), second]).unsqueeze(0),
                    position_ids=positions,
                    use_cache=False,
                ).logits[0, 5:]
                for token in (0, 7)
            ]
    except TypeError:
        return "its forward pass takes no position_ids"
    scale = alone.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
    if float((packed[0] - packed[1]).float().norm() / scale) > 1e-6:
        return "a packed row changes with the row before it"
    # Looser: shapes differ, and so do the kernels and their rounding in bfloat16.
    if float((packed[0] - alone).float().norm() / scale) > 5e-2:
        return "a packed row does not give the logits that it gives alone"
    return None
