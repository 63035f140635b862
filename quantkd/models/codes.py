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
from quantkd.models.curvature import Costs, robust_cholesky, weigh_inputs

# The measured choice of docs/quantize.md.
DAMPING, OUTPUT_DAMPING = 1e-2, 1.0
_COLUMNS = 128  # that are rounded before the rest of a matrix is updated by one product
_PARTS = 6  # of a layer's rows, each of which is chosen together


class Moment:
    """A second moment, of a layer's inputs or of the gradients of its outputs, and what choosing codes needs of it."""

    def __init__(self, matrix: Tensor, *, damping: float = DAMPING) -> None:
        if not bool(torch.isfinite(matrix).all()):
            raise ConfigError("its inputs are not finite.")
        self.order = matrix.diagonal().argsort(descending=True)
        self.matrix = matrix[self.order][:, self.order]  # largest first
        damped = self.matrix.flip(0, 1)
        damped.diagonal().add_(damping * float(matrix.diagonal().mean()) or 1.0)  # for directions that no token took
        # The moment is U U^T with U upper triangular, so an error e costs |U^T e|^2, whose k-th part vanishes where
        # e_k = -sum_j<k U_jk / U_kk e_j: row j says how the error of column j goes to the later ones.
        self.feedback = robust_cholesky(damped).flip(0, 1)
        self.feedback /= self.feedback.diagonal().clone()


def moments_of(inputs: Tensor, costs: Costs | None = None) -> tuple[Moment, list[Moment]]:
    """The moment of a layer's (N, in) inputs, by what they cost, and those of its groups of outputs."""
    inputs = weigh_inputs(inputs, costs)
    outputs = [] if costs is None else costs.outputs
    return Moment(inputs.T @ inputs / len(inputs)), [Moment(each, damping=OUTPUT_DAMPING) for each in outputs]


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
    divisors = torch.where(scales == 0, torch.ones_like(scales), scales)  # a block of zeros takes any code
    nearest = places[torch.bucketize((weight / divisors).contiguous(), edges)]
    if inputs is None:
        return nearest
    # A row that gains nothing keeps its codes from before.
    before = nearest if before is None else before
    errors, found = torch.zeros_like(weight), torch.empty_like(nearest)
    ends = torch.tensor([0, *(len(group.order) for group in outputs)]).cumsum(0).tolist()
    orders = [first + group.order for first, group in zip(ends[:-1], outputs, strict=True)]
    everything = torch.arange(len(weight), device=weight.device)
    longest = max(map(len, orders), default=1)
    size = -(-longest // _PARTS)
    for start in range(0, longest, size):
        parts = [order[start : start + size] for order in orders] or [everything]
        rows = torch.cat(parts)  # of all groups, which do not depend on each other
        targets = [weight[part] for part in parts]
        for target, group, order in zip(targets, outputs, orders, strict=False):
            # As for columns, of blocks: e_b = -V_bb^-T V_ab^T e_a of all rows a before block b.
            feedback = group.feedback[:, start : start + len(target)]
            made_up = feedback[:start].T @ errors[order[:start]]
            own = feedback[start : start + len(target)].T
            target += torch.linalg.solve_triangular(own, made_up, upper=False, unitriangular=True)
        found[rows] = _choose_columns(torch.cat(targets), scales[rows], divisors[rows], grid, edges, inputs)
        errors[rows] = weight[rows] - grid[found[rows]] * scales[rows]
    chosen = places[found]
    both = ((weight - levels[each] * scales)[:, inputs.order] for each in (chosen, before))
    ours, theirs = (((error @ inputs.matrix) * error).sum(1) for error in both)  # e C e^T of each row
    # By a margin, for the comparison is itself rounded.
    return torch.where((ours < theirs * (1 - 1e-5)).unsqueeze(1), chosen, before)


def _choose_columns(
    weight: Tensor, scales: Tensor, divisors: Tensor, grid: Tensor, edges: Tensor, moment: Moment
) -> Tensor:
    """(out, in) places in the grid, column by column, each of which makes up for the errors of those before it."""
    # Columns become rows, which are contiguous.
    weight, scales, divisors = (each.T[moment.order].contiguous() for each in (weight, scales, divisors))
    targets, found = weight.clone(), torch.empty(weight.shape, dtype=torch.long, device=weight.device)
    for start in range(0, len(weight), _COLUMNS):
        end = start + _COLUMNS
        errors, feedback = torch.empty_like(weight[start:end]), moment.feedback[start:end, start:end]
        parts = (each[start:end] for each in (weight, targets, scales, divisors, found))
        columns = zip(*parts, errors, feedback, strict=True)
        for done, (column, target, scale, divisor, code, error, onward) in enumerate(columns, 1):
            torch.bucketize(target / divisor, edges, out=code)
            torch.addcmul(column, grid.take(code), scale, value=-1, out=error)
            targets[start + done : end].addr_(onward[done:], error)
        targets[end:].addmm_(moment.feedback[start:end, end:].T, errors)
    return found[moment.order.argsort()].T


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
