"""What an error of a layer's output costs at each token, and in each direction, by the curvature of the KL.

Where a model agrees with its teacher the KL has no gradient; what an error costs there is its second derivative by the
logits, diag(p) - p p^T. Random directions of that covariance go backward through the model once, all targets of a row
together, and the second moment of what arrives at a layer's output is what its errors cost (Fisher information, as in
YAQA, Tseng et al. 2025, arXiv:2505.22988). The figures are in docs/quantize.md and docs/initialization.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantkd.models.network import Runner, undisturbed
from quantkd.transfer_set import IGNORE_INDEX

_MAX_TOKENS = 2048  # of a row in the backward pass: they bound its activations
_MAX_COSTS = 2**30  # float32 values of all layers' costs; they bound how many channels of an output form a group


class Costs(NamedTuple):
    """What an error of a layer's output costs."""

    tokens: Tensor  # (N,) by token, padding left out
    outputs: list[Tensor]  # (group, group) for groups of channels one after the other: e^T H e of an error e of each


def measure_costs(
    model: Any,
    layers: Iterable[nn.Module],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    bar: tqdm[Any],
) -> dict[nn.Module, Costs]:
    """The costs of every layer that the targets depend on; those of no finite curvature are left out."""
    layers, embeddings = list(layers), model.get_input_embeddings()
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    group = max(1, _MAX_COSTS // sum(getattr(each, "out_features", 4096) for each in layers))
    tokens: dict[nn.Module, list[Tensor]] = defaultdict(list)
    outputs: dict[nn.Module, list[Tensor]] = {}
    first: list[Tensor] = []
    rest = 0  # tokens of a row that are cut off

    def add(layer: nn.Module, gradient: Tensor) -> None:
        weights = gradient.square().sum(-1)
        tokens[layer] += [weights, weights.mean().expand(rest)]  # those that are cut off weigh as the mean
        parts = gradient.tensor_split(-(-gradient.shape[-1] // group), dim=-1)
        if layer not in outputs:
            outputs[layer] = [part.T @ part for part in parts]
        else:
            for moment, part in zip(outputs[layer], parts, strict=True):
                moment.addmm_(part.T, part)

    def follow(layer: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: add(layer, gradient.float().flatten(0, -2)))

    def begin(layer: nn.Module, args: Any, output: Tensor) -> None:
        first.append(output.requires_grad_())

    runner = Runner(model)
    hooks = [layer.register_forward_hook(follow) for layer in layers]
    hooks.append(embeddings.register_forward_hook(begin))
    try:
        with torch.enable_grad(), undisturbed(model, embeddings.weight.device):
            torch.manual_seed(0)
            for number, (row, seen, own) in enumerate(zip(input_ids, mask.bool(), labels, strict=True), 1):
                bar.set_postfix_str(f"curvature of row {number} of {len(labels)}")
                rest = max(0, int(seen.sum()) - _MAX_TOKENS)
                ids, targets = (each[seen][None, :_MAX_TOKENS] for each in (row, own))
                targets = targets if bool((targets[:, 1:] != IGNORE_INDEX).any()) else ids
                batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": targets}
                logits = runner.run(batch)[0].logits()
                torch.autograd.grad(logits, first.pop(), draw_curvature(logits))  # no parameter gets a gradient
    finally:
        for hook in hooks:
            hook.remove()
    bar.set_postfix_str("")
    found = {layer: Costs(torch.cat(parts), outputs[layer]) for layer, parts in tokens.items()}
    return {layer: costs for layer, costs in found.items() if 0 < float(costs.tokens.mean()) < math.inf}


def weigh_inputs(inputs: Tensor, costs: Costs | None) -> Tensor:
    """A layer's (N, in) inputs by the root of their tokens' costs; as they are where these are not known."""
    if costs is None or len(costs.tokens) != len(inputs):  # as of an expert, which gets a part of them
        return inputs
    # Half of the weight is the same for all: few tokens have most of the rest, and other rows have others.
    shares = (costs.tokens / costs.tokens.mean() + 1) / 2
    return inputs * shares.sqrt().unsqueeze(1).to(inputs.device)


def draw_curvature(logits: Tensor) -> Tensor:
    """Random (N, V) rows whose mean outer product is the curvature of the KL, diag(p) - p p^T."""
    # Drawing tokens has the same mean and varies more: where the model is sure, most draws say nothing.
    p = logits.detach().softmax(-1)
    root = p.sqrt() * torch.randn_like(p)
    return root - p * root.sum(-1, keepdim=True)
