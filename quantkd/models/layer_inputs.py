"""The inputs of a model's layers, by one forward pass over a few rows: each layer is shown its own before it runs.

What is done to a layer then, such as choosing its codes or its adapter, is seen by all that come after it, and one
layer's inputs are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantkd.models.network import base_network, undisturbed

_MAX_TOKENS = 16384  # padded tokens of the forward pass: they bound the memory


def visit_layers(
    model: Any,
    layers: Iterable[nn.Module],
    visit: Callable[[Any, Tensor | None], None],
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    bar: tqdm[Any],
) -> None:
    """Call `visit` once per layer, with its (N, in) inputs without padding; with None where no token reaches it."""
    waiting: dict[Any, Any] = dict.fromkeys(layers)
    # Layers that read the same states (query, key and value) come one after the other, and are shown one tensor.
    last: tuple[Tensor | None, Tensor | None] = None, None

    def before(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal last
        waiting.pop(layer).remove()
        if args[0] is not last[0]:
            last = args[0], _tokens(args[0], mask.bool())
        visit(layer, last[1])
        bar.update()

    with torch.no_grad(), bar:
        if input_ids is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            device = model.get_input_embeddings().weight.device
            for layer in waiting:
                waiting[layer] = layer.register_forward_pre_hook(before)
            try:
                with undisturbed(model, device):
                    # Without the head, whose logits over all rows could be gigabytes.
                    base_network(model).base_model(
                        input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False
                    )
            finally:
                last = None, None
                for hook in waiting.values():
                    hook.remove()
        for layer in waiting:
            visit(layer, None)
            bar.update()


def draw_rows(dataset: Any, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Calibration rows: drawn at random, as many as asked for or as memory allows."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:rows]
    chosen: list[Tensor] = []
    longest = 0
    for row in order.tolist():
        ids = torch.as_tensor(dataset[row]["input_ids"])[:_MAX_TOKENS]
        if (len(chosen) + 1) * max(longest, len(ids)) > _MAX_TOKENS:
            break
        chosen.append(ids)
        longest = max(longest, len(ids))
    lengths = torch.tensor([len(ids) for ids in chosen])
    return nn.utils.rnn.pad_sequence(chosen, batch_first=True), (torch.arange(longest) < lengths.unsqueeze(1)).long()


def _tokens(inputs: Tensor, mask: Tensor) -> Tensor | None:
    """(N, in): a layer's inputs without padding, in float32; None where there are none."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    if len(rows) == mask.numel():  # else a part of the tokens, as an expert gets them
        rows = rows[mask.flatten().to(rows.device)]
    return rows.float() if len(rows) else None
