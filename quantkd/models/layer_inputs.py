"""The inputs of a model's layers, by one forward pass over a few rows: each layer is shown its own before it runs.

What is done to a layer then, such as choosing its codes or its adapter, is seen by all that come after it, and one
layer's inputs are held at a time. An error does not cost the same at every token, so inputs are weighted by what it
does to the loss, by a backward pass before. The figures are in docs/quantize.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantkd.models.network import Runner, base_network, undisturbed
from quantkd.transfer_set import IGNORE_INDEX

# Padded tokens of the forward pass, by a model whose widest layer reads `_WIDTH` values, as of a Llama of 8 billion
# parameters; they bound the memory, and a narrower model takes more.
_MAX_TOKENS, _WIDTH = 16384, 14336
_MAX_WEIGHED = 2048  # tokens of a row in the backward pass: they bound its activations


def visit_layers(
    model: Any,
    layers: Iterable[nn.Module],
    visit: Callable[[Any, Tensor | None], None],
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    bar: tqdm[Any],
    labels: Tensor | None = None,
) -> None:
    """Call `visit` once per layer, with its (N, in) inputs without padding; with None where no token reaches it.

    With labels, inputs are scaled by token, so that what they cost by `weigh_tokens` counts in their second moment.
    """
    waiting: dict[Any, Any] = dict.fromkeys(layers)
    weights: dict[Any, Tensor] = {}
    if input_ids is not None and labels is not None:
        weights = weigh_tokens(model, waiting, input_ids, attention_mask, labels, bar)
    # Layers that read the same states (query, key and value) come one after the other, and are shown one tensor.
    last: tuple[Tensor | None, Tensor | None] = None, None

    def before(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal last
        waiting.pop(layer).remove()
        if args[0] is not last[0]:
            last = args[0], _tokens(args[0], mask.bool())
        visit(layer, _scale(last[1], weights.pop(layer, None)))
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


def weigh_tokens(
    model: Any,
    layers: Iterable[nn.Module],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    bar: tqdm[Any],
) -> dict[nn.Module, Tensor]:
    """(N,) for each layer: how much an error of its output at each token costs, padding left out.

    It is the squared gradient, by that output, of the logits at the rows' targets times `_draw_curvature`: its mean is
    the curvature of the KL to the model's own distribution, summed over the targets (Fisher information).
    """
    found: dict[nn.Module, list[Tensor]] = defaultdict(list)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    embeddings = model.get_input_embeddings()
    first: list[Tensor] = []

    def follow(layer: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: found[layer].append(grad.float().square().sum(-1).flatten()))

    def begin(layer: nn.Module, args: Any, output: Tensor) -> None:
        first.append(output.requires_grad_())

    runner = Runner(model)
    hooks = [layer.register_forward_hook(follow) for layer in layers]
    hooks.append(embeddings.register_forward_hook(begin))
    try:
        with torch.enable_grad(), undisturbed(model, embeddings.weight.device):
            torch.manual_seed(0)
            for number, (row, seen, own) in enumerate(zip(input_ids, mask.bool(), labels, strict=True), 1):
                bar.set_postfix_str(f"token weights of row {number} of {len(labels)}")
                length = int(seen.sum())
                ids, targets = (each[seen][None, :_MAX_WEIGHED] for each in (row, own))
                targets = targets if bool((targets[:, 1:] != IGNORE_INDEX).any()) else ids
                batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": targets}
                logits = runner.run(batch)[0].logits()
                torch.autograd.grad(logits, first.pop(), _draw_curvature(logits))  # no parameter gets a gradient
                for parts in found.values() if length > _MAX_WEIGHED else ():  # the others weigh as the mean
                    parts.append(parts[-1].mean().expand(length - _MAX_WEIGHED))
    finally:
        for hook in hooks:
            hook.remove()
    bar.set_postfix_str("")
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def draw_rows(dataset: Any, rows: int, seed: int, model: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and labels, (rows, T) each, of rows drawn at random, as many as asked for or memory allows."""
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
    return ids, (torch.arange(longest) < lengths.unsqueeze(1)).long(), labels


def _draw_curvature(logits: Tensor) -> Tensor:
    """Random (N, V) rows whose mean outer product is the curvature of the KL, diag(p) - p p^T."""
    # Drawing tokens has the same mean and varies more: where the model is sure, most draws say nothing.
    p = logits.detach().softmax(-1)
    root = p.sqrt() * torch.randn_like(p)
    return root - p * root.sum(-1, keepdim=True)


def _tokens(inputs: Tensor, mask: Tensor) -> Tensor | None:
    """(N, in): a layer's inputs without padding, in float32; None where there are none."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    if len(rows) == mask.numel():  # else a part of the tokens, as an expert gets them
        rows = rows[mask.flatten().to(rows.device)]
    return rows.float() if len(rows) else None


def _scale(inputs: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """Inputs by the root of their tokens' weights; as they are where no weight is known, as of an expert's part."""
    if inputs is None or weights is None or len(weights) != len(inputs):
        return inputs
    if not 0 < float(weights.mean()) < math.inf:  # no loss depends on them, or a gradient overflowed
        return inputs
    # Half of the weight is the same for all: few tokens have most of the rest, and other rows have others.
    shares = (weights / weights.mean() + 1) / 2
    return inputs * shares.sqrt().unsqueeze(1).to(inputs.device)
