"""4-bit codes by error feedback, in bitsandbytes' storage: the same constants, bytes and kernels, other codes.

Columns are rounded one after the other, and each makes up for the errors of those before it (GPTQ, Frantar et al. 2022,
arXiv:2210.17323), by the triangular factor of the inputs' second moment, which gives what its inverse does (QuIP, Chee
et al. 2023, arXiv:2307.13304); so do rows, by that of the outputs' gradients (YAQA, Tseng et al. 2025,
arXiv:2505.22988). docs/quantize.md has the derivation and the figures.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantkd.errors import ConfigError
from quantkd.models.cpu_repacking import forget_repacked, restore_weight
from quantkd.models.curvature import Costs, gram, robust_cholesky, weigh_inputs

# The measured choice of docs/quantize.md.
DAMPING, OUTPUT_DAMPING = 1e-2, 1.0
_COLUMNS = 64  # that are rounded before the rest of a matrix is updated by one product
_PARTS = 6  # of a layer's rows, each of which is chosen together


class Moment:
    """A second moment, of a layer's inputs or of the gradients of its outputs, and what choosing codes needs of it."""

    def __init__(self, matrix: Tensor, *, damping: float = DAMPING) -> None:
        if not bool(torch.isfinite(matrix.diagonal()).all()):  # no value is above the largest of these
            raise ConfigError("its inputs are not finite.")
        self.matrix = matrix
        self.order = matrix.diagonal().argsort(descending=True)
        backward = self.order.flip(0)
        damped = matrix.index_select(0, backward).index_select(1, backward)
        damped.diagonal().add_(damping * float(matrix.diagonal().mean()) or 1.0)  # for directions that no token took
        # The moment is U U^T with U upper triangular, so an error e costs |U^T e|^2, whose k-th part vanishes where
        # e_k = -sum_j<k U_jk / U_kk e_j: row j says how the error of column j goes to the later ones.
        self.feedback = robust_cholesky(damped).flip(0, 1)
        self.feedback /= self.feedback.diagonal().clone()


def moments_of(inputs: Tensor, costs: Costs | None = None) -> tuple[Moment, list[Moment]]:
    """The moment of a layer's (N, in) inputs, by what they cost, and those of its groups of outputs."""
    inputs = weigh_inputs(inputs, costs)
    outputs = [] if costs is None else costs.outputs
    return Moment(gram(inputs) / len(inputs)), [Moment(each, damping=OUTPUT_DAMPING) for each in outputs]


def choose_codes(
    weight: Tensor,
    scales: Tensor,
    levels: Tensor,
    inputs: Moment | None,
    outputs: Sequence[Moment] = (),
    before: Tensor | None = None,
) -> Tensor:
    """Places in `levels` for which `levels[codes] * scales`, all (out, in), gives outputs near those of the weight."""
    grid, places = levels.sort()  # FP4's are in no order
    edges = (grid[1:] + grid[:-1]) / 2
    if inputs is None or before is None:
        before = places[torch.bucketize((weight / _divisors(scales)).contiguous(), edges)]  # the nearest
    if inputs is None:
        return before
    chosen = places[_feed_back(weight, scales, grid, edges, inputs, outputs).long()]
    # Of each row, e C e^T before less that of now: it keeps its codes unless it gains more than rounding makes.
    theirs, ours = (weight - levels[each] * scales for each in (before, chosen))
    gains = ((theirs - ours) @ inputs.matrix) * (theirs + ours)
    return torch.where((gains.sum(1) > 1e-5 * gains.abs().sum(1)).unsqueeze(1), chosen, before)


def _divisors(scales: Tensor) -> Tensor:
    """The scales, and 1 for those of a block of zeros, which takes any code."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _feed_back(
    weight: Tensor, scales: Tensor, grid: Tensor, edges: Tensor, inputs: Moment, outputs: Sequence[Moment]
) -> Tensor:
    """(out, in) places in the grid, each of which makes up for errors of the columns and of the parts of rows before.

    A block of columns in a part of the rows waits for the same block in the parts before, and for the blocks before in
    the same part. So all whose numbers have the same sum are rounded together, column by column.
    """
    parts, blocks = _PARTS if outputs else 1, -(-weight.shape[1] // _COLUMNS)
    blank = blocks * _COLUMNS - weight.shape[1]
    feedback = nn.functional.pad(inputs.feedback, (0, blank, 0, blank))
    by_block = feedback.view(blocks, _COLUMNS, blocks, _COLUMNS)
    orders, spans, row_feedback = [], [], []  # by group of outputs, which do not depend on each other
    first = width = 0
    everything = torch.arange(len(weight), device=weight.device)
    for group in outputs or (None,):
        order = everything if group is None else group.order + first
        size = -(-len(order) // parts)
        spans.append(slice(width, width + size))
        first, width, missing = first + len(order), width + size, size * parts - len(order)
        orders.append(nn.functional.pad(order, (0, missing), value=len(weight)).view(parts, size))
        if group is not None:
            # As for columns, of blocks: e_b = -V_bb^-T V_ab^T e_a of all rows a before part b.
            padded = nn.functional.pad(group.feedback, (0, missing, 0, missing)).T
            cuts = [slice(start, start + size) for start in range(0, size * parts, size)]
            both = ((padded[cut, cut], padded[cut, : cut.start]) for cut in cuts)
            row_feedback.append(
                [torch.linalg.solve_triangular(*each, upper=False, unitriangular=True) for each in both]
            )
    rows = torch.cat(orders, dim=1).flatten()

    def arrange(values: Tensor) -> Tensor:
        """(blocks, columns, parts, rows of a part) of (out, in)."""
        taken = nn.functional.pad(values, (0, 0, 0, 1)).index_select(0, rows).T.contiguous()
        return nn.functional.pad(taken[inputs.order], (0, 0, 0, blank)).view(blocks, _COLUMNS, parts, width)

    weight, scales = arrange(weight), arrange(scales)
    bases, errors, found = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.uint8)
    for number in range(blocks + parts - 1):
        places = [(number - part, part) for part in range(parts) if 0 <= number - part < blocks]
        for block, part in places:
            for span, onward in zip(spans, row_feedback, strict=False):
                at = block, slice(None), slice(part), span
                bases[block, :, part, span] += (errors[at] - bases[at] + weight[at]).flatten(1) @ onward[part].T
        taken = ([each[block, :, part] for block, part in places] for each in (bases, scales))
        base, scale = (torch.stack(each, dim=1) for each in taken)
        code, error, target = torch.empty_like(base, dtype=torch.long), torch.empty_like(base), base.clone()
        for place, (block, part) in enumerate(places):
            before, own = slice(block * _COLUMNS), slice(block * _COLUMNS, (block + 1) * _COLUMNS)
            target[:, place] += feedback[before, own].T @ errors[:block, :, part].flatten(0, 1)
        steps = torch.stack([by_block[block, :, block] for block, _ in places], dim=2).unsqueeze(3)
        columns = zip(base, target, scale, _divisors(scale), code, error, steps, strict=True)
        for done, (column, wanted, constant, by, chosen, left, onward) in enumerate(columns, 1):
            torch.bucketize(wanted / by, edges, out=chosen)
            torch.addcmul(column, grid.take(chosen), constant, value=-1, out=left)
            target[done:].addcmul_(onward[done:], left)
        for place, (block, part) in enumerate(places):
            found[block, :, part], errors[block, :, part] = code[:, place], error[:, place]
    flat = found.new_empty(first + 1, len(inputs.order))
    flat[rows] = found.view(-1, len(rows))[inputs.order.argsort()].T
    return flat[:-1]


def read_constants(state: Any) -> Tensor:
    """A 4-bit weight's block constants in float32, one for each block of its flattened values."""
    if not state.nested:
        return state.absmax.float()  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_blockwise

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()  # type: ignore[no-any-return]


def read_scales(packed: Tensor, state: Any) -> Tensor:
    """A 4-bit weight's constants, one for each value; refused where this device's kernel takes others."""
    from bitsandbytes.functional import dequantize_4bit

    scales = read_constants(state).repeat_interleave(state.blocksize)[: state.shape.numel()].reshape(state.shape)
    whole, one = copy.copy(state), int(state.code.argmax())  # the level 1
    whole.dtype = torch.float32
    taken = dequantize_4bit(torch.full_like(packed.view(torch.uint8), 17 * one).view(packed.dtype), whole)
    if not torch.allclose(taken, scales):
        raise ConfigError(
            f"bitsandbytes' kernel on {packed.device} takes other constants for the shape {tuple(state.shape)} than "
            f"it stored in blocks of {state.blocksize} (seen on CPUs with bitsandbytes 0.50, where in_features is not "
            "a multiple of the block). The weight is right on a GPU; use one."
        )
    return scales


def calibrate_layer(layer: Any, original: Tensor, inputs: Moment | None, outputs: Sequence[Moment] = ()) -> None:
    """Choose the codes of bitsandbytes' 4-bit layer anew, for the inputs it gets; its constants stay."""
    restore_weight(layer)
    packed, state = layer.weight.data, layer.weight.quant_state
    weight = original.to(packed.device, torch.float32)
    pairs = packed.view(torch.uint8).flatten()
    # bitsandbytes' order in a byte; an odd last half is not used.
    before = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: weight.numel()].view(weight.shape).long()
    codes = choose_codes(weight, read_scales(packed, state), state.code.float(), inputs, outputs, before)
    halves = nn.functional.pad(codes.flatten().to(torch.uint8), (0, codes.numel() % 2))
    both = (halves[0::2] << 4) | halves[1::2]
    packed.copy_(both.view(packed.dtype).reshape(packed.shape))
    forget_repacked(layer)
