"""The inputs of a model's layers, by one forward pass over a few rows: each layer is shown its own before it runs.

What is done to a layer then, such as choosing its codes or its adapter, is seen by all that come after it, and one
layer's inputs are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantkd.models.network import base_network, undisturbed
from quantkd.transfer_set import IGNORE_INDEX

# Padded tokens of the forward pass, by a model whose widest layer reads `_WIDTH` values, as of a Llama of 8 billion
# parameters; they bound the memory, and a narrower model takes more.
_MAX_TOKENS, _WIDTH = 16384, 14336


class Rows(NamedTuple):
    """Rows of tokens, (rows, T) each; without a mask none is padding."""

    input_ids: Tensor
    attention_mask: Tensor | None = None
    labels: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """True where no padding is."""
        mask = torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask
        return mask.bool()


def visit_layers(
    model: Any,
    layers: Iterable[nn.Module],
    visit: Callable[[Any, Tensor | None], None],
    rows: Rows | None,
    bar: tqdm[Any],
) -> None:
    """Call `visit` once per layer, with its (N, in) inputs in float32, without padding; None if no token reaches it."""
    waiting: dict[Any, Any] = dict.fromkeys(layers)
    # Layers that read the same states (query, key and value) come one after the other, and are shown one tensor.
    last: tuple[Tensor | None, Tensor | None] = None, None

    def before(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal last
        waiting.pop(layer).remove()
        if args[0] is not last[0]:
            tokens = args[0].reshape(-1, args[0].shape[-1])
            if len(tokens) == mask.numel():  # else a part of them, as an expert gets it
                tokens = tokens[mask.flatten().to(tokens.device)]
            last = args[0], tokens.float() if len(tokens) else None
        visit(layer, last[1])
        bar.update()

    with torch.no_grad(), bar:
        if rows is not None:
            mask = rows.mask
            device = model.get_input_embeddings().weight.device
            for layer in waiting:
                waiting[layer] = layer.register_forward_pre_hook(before)
            try:
                with undisturbed(model, device):
                    # Without the head, whose logits over all rows could be gigabytes.
                    inputs = {"input_ids": rows.input_ids.to(device), "attention_mask": mask.long().to(device)}
                    base_network(model).base_model(**inputs, use_cache=False)
            finally:
                last = None, None
                for hook in waiting.values():
                    hook.remove()
        for layer in waiting:
            visit(layer, None)
            bar.update()


def draw_rows(dataset: Any, rows: int, seed: int, model: Any = None) -> Rows:
    """Rows drawn at random, as many as asked for or memory allows."""
    modules = () if model is None else base_network(model).modules()
    widest = max((each.in_features for each in modules if hasattr(each, "in_features")), default=_WIDTH)
    most = max(_MAX_TOKENS, _MAX_TOKENS * _WIDTH // widest)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:rows]
    chosen: list[list[Tensor]] = []
    longest = 0
    for number in order.tolist():
        row = dataset[number]
        parts = [torch.as_tensor(row[name])[:_MAX_TOKENS] for name in ("input_ids", "labels") if name in row]
        longest_now = max(longest, len(parts[0]))
        # The mask of the attention has `longest` entries for each token, whatever the width.
        if (len(chosen) + 1) * longest_now > min(most, _MAX_TOKENS**2 // longest_now):
            break
        chosen.append(parts)
        longest = longest_now
    lengths = torch.tensor([len(parts[0]) for parts in chosen])
    ids, labels = (
        nn.utils.rnn.pad_sequence([parts[place] for parts in chosen], batch_first=True, padding_value=padding)
        for place, padding in ((0, 0), (-1, IGNORE_INDEX))
    )
    return Rows(ids, (torch.arange(longest) < lengths.unsqueeze(1)).long(), labels)
