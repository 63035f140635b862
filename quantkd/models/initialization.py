"""LoRA from the quantization error: a start that gives back most of what rounding took, before the first step.

The best rank-r correction of E = W - dequantize(Q(W)) for inputs of second moment C (EoRA, Liu et al. 2024,
arXiv:2410.21271; QERA, Zhang et al. 2024, arXiv:2410.06040) is U U^T E, where U holds the r leading eigenvectors of
E C E^T: C is neither factorised nor inverted. Where H says what an error costs in each direction of the output
(`curvature.py`), the same is done for L E, with H = L^T L. docs/initialization.md has the derivation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm import tqdm

from quantkd.errors import ConfigError
from quantkd.foreign import lora_variant_of
from quantkd.hardware import process_state
from quantkd.models.curvature import Costs, robust_cholesky, settle_layers
from quantkd.models.layer_inputs import Rows, draw_rows
from quantkd.models.network import base_network
from quantkd.models.original_weights import OriginalWeights, read_original
from quantkd.models.weights import dequantize_weight, is_sharded

logger = logging.getLogger(__name__)

# The measured choice of docs/initialization.md.
SHRINKAGE, OUTPUT_SHRINKAGE = 1e-2, 0.1
_OVERSAMPLING, _POWER_ITERATIONS = 8, 2
_MAX_INPUTS = 4096  # tokens that one correction looks at: they bound its time


def compute_correction(
    error: Tensor, inputs: Tensor | None, rank: int, *, shrinkage: float = SHRINKAGE, costs: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Factors of the rank-r D that minimises `trace(H (E - D) C (E - D)^T)`; H is I, or has `costs` as its blocks."""
    _, up, error, roots = find_directions(error, inputs, rank, shrinkage=shrinkage, costs=costs)
    down = up.T @ error
    if roots:
        solved = zip(roots, up.split([len(root) for root in roots]), strict=True)
        up = torch.cat([torch.linalg.solve_triangular(root, part, upper=True) for root, part in solved])
    balance = (down.norm(dim=1) / up.norm(dim=0)).sqrt()
    up, down = up * balance, down / balance.unsqueeze(1).clamp_min(torch.finfo(down.dtype).tiny)
    missing = rank - up.shape[1]
    return nn.functional.pad(up, (0, missing)), nn.functional.pad(down, (0, 0, 0, missing))


def find_directions(
    error: Tensor, inputs: Tensor | None, rank: int, *, shrinkage: float = SHRINKAGE, costs: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """By the leading directions of a layer's output error: what they take off it, themselves, L E, and parts of L."""
    # C is X^T X / N plus a share of its mean eigenvalue on the diagonal, for directions that no token took. The leading
    # eigenvectors come from randomized subspace iteration (Halko et al. 2011, arXiv:0909.4061) with a fixed start.
    ridge = 1.0 if inputs is None else shrinkage * float(inputs.square().mean())
    roots = [robust_cholesky(block.clone()).T for block in costs]
    if roots:
        parts = error.split([len(root) for root in roots])
        error = torch.cat([root @ part for root, part in zip(roots, parts, strict=True)])

    def apply(block: Tensor) -> Tensor:  # E C E^T, on (out, q)
        back = error.T @ block
        through = ridge * back
        if inputs is not None:
            through += inputs.T @ (inputs @ back) / len(inputs)
        return error @ through

    rows, columns = error.shape
    wide = min(rank + _OVERSAMPLING, rows, columns)
    start = torch.randn(rows, wide, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(apply(start.to(error))).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(apply(basis)).Q
    values, vectors = torch.linalg.eigh(basis.T @ apply(basis))  # ascending
    return values.flip(0)[:rank], basis @ vectors.flip(1)[:, :rank], error, roots


def initialize_from_error(
    model: Any, weights: OriginalWeights, rows: Rows | None, *, shrinkage: float = SHRINKAGE, progress: bool = True
) -> int:
    """Set every LoRA adapter to the best correction of its layer's error; how many were, and others start from zero."""
    network = base_network(model)
    adapted: dict[Any, str] = {each: name for name, each in network.named_modules() if isinstance(each, LoraLayer)}

    def settle(layer: Any, inputs: Tensor | None, costs: Costs | None) -> None:
        _correct(layer, weights, adapted[layer], inputs, shrink_costs(costs), shrinkage)

    bar = tqdm(total=len(adapted), desc="initialization", unit="adapter", disable=None if progress else True)
    refused = settle_layers(model, adapted, settle, rows, bar)
    if refused:
        name, reason = next(iter(refused.items()))
        logger.warning("%d of %d adapters start from zero. That of %s: %s", len(refused), len(adapted), name, reason)
    for name, reason in refused.items():
        logger.info("The adapter of %s starts from zero: %s", name, reason)
    return len(adapted) - len(refused)


def initialize_from_rows(
    model: Any,
    dataset: Any,
    name_or_path: str,
    *,
    start: str = "covariance",
    revision: str | None = None,
    rows: int = 64,
    seed: int = 0,
) -> None:
    """`initialize_from_error` on rows of a data set, by the main process; where that cannot be done, from zero."""
    adapters = [p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]
    if any(is_sharded(parameter) for parameter in model.parameters()):
        logger.warning("The adapters start from zero: the weights are shared out over processes already.")
        return
    state = process_state()
    if state.is_main_process:
        try:
            weights = OriginalWeights(name_or_path, base_network(model), revision)
            drawn = draw_rows(dataset, rows, seed, model) if start == "covariance" else None
            initialize_from_error(model, weights, drawn)
        except (ConfigError, OSError) as error:
            logger.warning("The adapters start from zero: %s", error)
    if state.num_processes > 1:
        for parameter in adapters:
            parameter.data.copy_(broadcast(parameter.data.to(state.device)))


def read_error(weights: OriginalWeights, name: str, layer: Any, inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a layer's weight lost when it was quantized, and as many of its inputs as are looked at."""
    quantized = dequantize_weight(layer)
    if inputs is not None:
        inputs = inputs[:: -(-len(inputs) // _MAX_INPUTS)]
        if not bool(torch.isfinite(inputs).all()):
            raise ConfigError("its inputs are not finite.")
    return read_original(weights, name, layer).to(quantized.device, torch.float32) - quantized.float(), inputs


def shrink_costs(costs: Costs | None) -> list[Tensor]:
    """What errors of a layer's output cost, as a share of the mean, and a part that is the same in all directions."""
    if costs is None:
        return []
    mean = torch.cat([block.diagonal() for block in costs.outputs]).mean()
    return [block / mean + OUTPUT_SHRINKAGE * torch.eye(len(block), device=block.device) for block in costs.outputs]


def _correct(
    layer: Any, weights: OriginalWeights, name: str, inputs: Tensor | None, costs: list[Tensor], shrinkage: float
) -> None:
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(adapters) != 1:
        raise ConfigError(f"it has {len(adapters)} active adapters; expected one.")
    (adapter,) = adapters
    if lora_variant_of(layer, adapter) is not None or not isinstance(layer.lora_A[adapter], nn.Linear):
        raise ConfigError("its adapter is not a plain LoRA of a linear layer (DoRA, say).")
    error, inputs = read_error(weights, name, layer.get_base_layer(), inputs)
    up, down = compute_correction(error, inputs, layer.r[adapter], shrinkage=shrinkage, costs=costs)
    layer.lora_B[adapter].weight.data.copy_(up / layer.scaling[adapter])
    # Where there is nothing to correct, PEFT's own start stays: with both factors at zero neither gets a gradient.
    used = down.any(dim=1, keepdim=True)
    start = layer.lora_A[adapter].weight
    start.data.copy_(torch.where(used, down.to(start.dtype), start))
