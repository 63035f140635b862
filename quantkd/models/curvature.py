"""What an error of a layer's output costs at each token, and in each direction, by the curvature of the KL.

Random directions of the second derivative by the logits, diag(p) - p p^T, go backward through the model once, all
targets of a row together. The second moment of what arrives at a layer's output is what its errors cost (Fisher
information, as in YAQA, Tseng et al. 2025, arXiv:2505.22988). docs/quantize.md and docs/initialization.md have figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantkd.errors import ConfigError
from quantkd.models.layer_inputs import Rows, visit_layers
from quantkd.models.network import Runner, recomputed_blocks, undisturbed
from quantkd.transfer_set import IGNORE_INDEX

_MAX_TOKENS = 2048  # of a row in the backward pass: they bound its activations
_BATCH_TOKENS = 1024  # of shorter rows that go together, for each pass dequantizes every weight
_MAX_OUTPUTS = 2**29  # values of all layers' outputs in a pass; of a larger model blocks are run again instead
_MAX_COSTS = 2**30  # float32 values of all layers' costs; they bound how many channels of an output form a group
_Row = tuple[Tensor, Tensor]  # token ids and labels, (T,) each


class Costs(NamedTuple):
    """What an error of a layer's output costs."""

    tokens: Tensor  # (N,) by token, padding left out
    outputs: list[Tensor]  # (group, group) for groups of channels one after the other: e^T H e of an error e of each


def settle_layers(
    model: Any,
    layers: Mapping[Any, str],
    settle: Callable[[Any, Tensor | None, Costs | None], None],
    rows: Rows | None,
    bar: tqdm[Any],
) -> dict[str, str]:
    """Call `settle` once per layer, with its inputs and costs where the rows tell them; why it refused, by name."""
    costs = measure_costs(model, layers, rows, bar) if layers and rows is not None else {}
    refused: dict[str, str] = {}

    def visit(layer: Any, inputs: Tensor | None) -> None:
        try:
            settle(layer, inputs, costs.pop(layer, None))
        except ConfigError as error:
            refused[layers[layer]] = str(error)

    visit_layers(model, layers, visit, rows, bar)
    return refused


def measure_costs(model: Any, layers: Iterable[nn.Module], rows: Rows, bar: tqdm[Any]) -> dict[nn.Module, Costs]:
    """The costs of every layer that the targets depend on; those of no finite curvature are left out."""
    if rows.labels is None:
        return {}
    layers, embeddings = list(layers), model.get_input_embeddings()
    width = sum(getattr(each, "out_features", 4096) for each in layers)
    group = max(1, _MAX_COSTS // width)
    together = zip(rows.input_ids, rows.mask, rows.labels, strict=True)
    pairs = [(row[seen], own[seen]) for row, seen, own in together]
    ends = torch.tensor([0, *(len(row) for row, _ in pairs)]).cumsum(0).tolist()
    whole = [*pairwise(ends)]
    order = sorted(range(len(pairs)), key=lambda place: len(pairs[place][0]))  # for the least padding
    pairs = [pairs[place] for place in order]
    spans: list[tuple[int, int]] = []  # of the tokens of the rows in the pass
    found: dict[nn.Module, Costs] = {}
    first: list[Tensor] = []

    def add(layer: nn.Module, gradient: Tensor) -> None:
        # bfloat16 as it is makes the products twice as fast; float16 would overflow. Padding has zeros.
        gradient = gradient if gradient.dtype == torch.bfloat16 else gradient.float()
        parts = gradient.flatten(0, -2).tensor_split(-(-gradient.shape[-1] // group), dim=-1)
        costs = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32).square()
        if layer not in found:  # at once: what stays small between a pass's large tensors holds on to their memory
            moments = [costs.new_zeros(part.shape[-1], part.shape[-1]) for part in parts]
            found[layer] = Costs(costs.new_zeros(ends[-1]), moments)
        for moment, part in zip(found[layer].outputs, parts, strict=True):
            moment += gram(part)
        if costs.numel() != padded["labels"].numel():  # an expert's
            found[layer] = found[layer]._replace(tokens=costs.new_empty(0))
        if len(found[layer].tokens) == 0:
            return
        for weights, (start, stop) in zip(costs.view(len(spans), -1), spans, strict=True):
            kept = weights[: stop - start]
            found[layer].tokens[start : start + len(kept)] = kept
            found[layer].tokens[start + len(kept) : stop] = kept.mean()  # those that are cut off weigh as the mean

    def follow(layer: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:  # a router gives several
            output.register_hook(partial(add, layer))

    def begin(layer: nn.Module, args: Any, output: Tensor) -> None:
        first.append(output.requires_grad_())

    runner = Runner(model)
    tokens = max(_BATCH_TOKENS, min(_MAX_TOKENS, rows.input_ids.shape[1]))
    again = recomputed_blocks if width * tokens > _MAX_OUTPUTS else nullcontext
    hooks = [layer.register_forward_hook(follow) for layer in layers]
    hooks.append(embeddings.register_forward_hook(begin))
    try:
        with torch.enable_grad(), undisturbed(model, embeddings.weight.device), again(model):
            torch.manual_seed(0)
            for start, stop in _batches(pairs):
                bar.set_postfix_str(f"curvature of row {stop} of {len(pairs)}")
                spans[:] = [whole[place] for place in order[start:stop]]
                padded = _pad(pairs[start:stop])
                logits = runner.run(padded)[0].logits()
                drawn = draw_curvature(logits, (padded["labels"][:, 1:] != IGNORE_INDEX).sum(1).tolist())
                torch.autograd.grad(logits, first.pop(), drawn)  # no parameter gets a gradient
    finally:
        for hook in hooks:
            hook.remove()
    bar.set_postfix_str("")
    sums = {layer: sum(float(moment.trace()) for moment in costs.outputs) for layer, costs in found.items()}
    return {layer: costs for layer, costs in found.items() if 0 < sums[layer] < math.inf}


def gram(values: Tensor) -> Tensor:
    """x^T x, (n, n), of (N, n); what is above the diagonal is computed, and copied below it."""
    size = values.shape[1]
    step, found = max(128, -(-size // 4)), values.new_empty(size, size)
    for start in range(0, size, step):
        part = values[:, start : start + step].T @ values[:, start:]
        found[start : start + step, start:], found[start:, start : start + step] = part, part.T
    return found


def robust_cholesky(matrix: Tensor) -> Tensor:
    """The lower factor; where rounding made the matrix indefinite, of one with more on the diagonal, as it then has."""
    found, ridge = torch.linalg.cholesky_ex(matrix), 1e-6 * float(matrix.diagonal().abs().mean())
    while bool(found.info):
        matrix.diagonal().add_(ridge)
        found, ridge = torch.linalg.cholesky_ex(matrix), 10 * ridge
    lower: Tensor = found.L
    return lower


def weigh_inputs(inputs: Tensor, costs: Costs | None) -> Tensor:
    """A layer's (N, in) inputs by the root of their tokens' costs; as they are where these are not known."""
    if costs is None or len(costs.tokens) != len(inputs):  # as of an expert, which gets a part of them
        return inputs
    # Half of the weight is the same for all: few tokens have most of the rest, and other rows have others.
    shares = (costs.tokens / costs.tokens.mean() + 1) / 2
    return inputs * shares.sqrt().unsqueeze(1).to(inputs.device)


def draw_curvature(logits: Tensor, counts: Sequence[int]) -> Tensor:
    """Random (N, V) rows whose mean outer product is the curvature of the KL, diag(p) - p p^T; N sums the counts."""
    # One draw for each row of a batch: what is drawn for it does not depend on the rows beside it.
    # Drawing tokens has the same mean and varies more: where the model is sure, most draws say nothing.
    p, drawn = logits.detach().softmax(-1), torch.empty_like(logits)
    for part in drawn.split(counts):
        part.normal_()
    drawn.mul_(p.sqrt())  # in place: with a large vocabulary each of these is as large as a layer
    return drawn.addcmul_(p, drawn.sum(-1, keepdim=True), value=-1)


def _batches(rows: list[_Row]) -> Iterator[tuple[int, int]]:
    """Bounds of rows that fit together into `_BATCH_TOKENS`, one at least."""
    start = longest = 0
    for place, (row, _) in enumerate(rows):
        length = min(len(row), _MAX_TOKENS)
        longest = max(longest, length)
        if place > start and (place + 1 - start) * longest > _BATCH_TOKENS:
            yield start, place
            start, longest = place, length
    if rows:
        yield start, len(rows)


def _pad(rows: list[_Row]) -> dict[str, Tensor]:
    """A batch of token ids and labels, padded on the right; all tokens of a row without targets are its targets."""
    cut = [(row[:_MAX_TOKENS], own[:_MAX_TOKENS]) for row, own in rows]
    targets = [own if bool((own[1:] != IGNORE_INDEX).any()) else row for row, own in cut]
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    ids = [row for row, _ in cut]
    return {
        "input_ids": pad(ids),
        "attention_mask": pad([torch.ones_like(row) for row in ids]),
        "labels": pad(targets, padding_value=IGNORE_INDEX),
    }
