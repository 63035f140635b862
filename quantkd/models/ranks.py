"""Ranks of adapters by a budget of bytes: each further rank goes to the layer where it takes most off the loss.

A layer's rank k takes the k-th eigenvalue of L E C E^T L^T off the squared error of its output, weighed by what such an
error costs (`initialization.py`). It takes 2 (in + out) bytes in 16 bits. docs/initialization.md has the figures.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from tqdm import tqdm

from quantkd.errors import ConfigError
from quantkd.hardware import process_state
from quantkd.models.curvature import Costs, settle_layers
from quantkd.models.initialization import find_directions, read_error, shrink_costs
from quantkd.models.layer_inputs import Rows, draw_rows
from quantkd.models.network import base_network
from quantkd.models.original_weights import OriginalWeights
from quantkd.models.stored_weights import compute_size
from quantkd.models.weights import is_quantized_layer, is_sharded

logger = logging.getLogger(__name__)

_MOST = 128  # ranks of a layer
_BYTES = 2  # of a value of an adapter, as it is saved


def allot_ranks(
    model: Any,
    config: LoraConfig,
    budget: float,
    dataset: Any,
    origin: str,
    *,
    revision: str | None,
    rows: int,
    seed: int,
) -> LoraConfig:
    """The config with a rank for each layer, of `budget` times the bytes of the 4-bit layers; its scale stays."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ConfigError("adapter_budget looks at whole weights, and processes share these. Give a rank instead.")
    state = process_state()
    found: list[Any] = [None]
    if state.is_main_process:
        try:
            weights = OriginalWeights(origin, model, revision)
            found = [_measure(model, config, budget, weights, draw_rows(dataset, rows, seed, model))]
        except (ConfigError, OSError) as error:  # which the other processes wait to hear
            found = [error]
    if state.num_processes > 1:
        found = broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise ConfigError(f"adapter_budget cannot be allotted: {found[0]}") from found[0]
    return with_ranks(config, found[0])


def with_ranks(config: LoraConfig, ranks: dict[str, int]) -> LoraConfig:
    """A config with these ranks, by the layer's name, and the scale that it has."""
    power = 0.5 if config.use_rslora else 1.0
    alphas = {name: config.lora_alpha * (rank / config.r) ** power for name, rank in ranks.items()}
    return dataclasses.replace(config, rank_pattern=ranks, alpha_pattern=alphas)


def _measure(model: Any, config: LoraConfig, budget: float, weights: OriginalWeights, rows: Rows) -> dict[str, int]:
    named, is_all = dict[Any, str](), config.target_modules == "all-linear"
    for name, layer in base_network(model).named_modules():
        is_target = is_all or bool(check_target_module_exists(config, name))
        if is_target and is_quantized_layer(layer):
            named[layer] = name
        elif is_target and not is_all and isinstance(layer, nn.Linear | nn.Embedding):
            raise ConfigError(
                f"{name} is not quantized, and has no share of the budget. Take it out of target_modules."
            )
    prices = {name: _BYTES * (layer.in_features + layer.out_features) for layer, name in named.items()}
    size = compute_size(model)
    left = budget * (size.codes + size.constants) - sum(prices.values())
    if not named or left < 0:
        least = sum(prices.values()) / max(1, size.codes + size.constants)
        raise ConfigError(
            f"adapter_budget is {budget}, and rank 1 in each of {len(named)} quantized layers takes {least:.4f} of the "
            "bytes of such layers. Give more, or a rank."
        )
    gains: list[tuple[float, str]] = []

    def settle(layer: Any, inputs: Tensor | None, costs: Costs | None) -> None:
        if costs is None:
            raise ConfigError("what its errors cost is not known.")
        error, inputs = read_error(weights, named[layer], layer, inputs)
        values = find_directions(error, inputs, _MOST, costs=shrink_costs(costs))[0]
        mean = torch.cat([block.diagonal() for block in costs.outputs]).mean()
        gains.extend((value, named[layer]) for value in (values * mean / prices[named[layer]]).tolist()[1:])

    bar = tqdm(total=len(named), desc="ranks", unit="layer", disable=None)
    if refused := settle_layers(model, named, settle, rows, bar):
        name, reason = next(iter(refused.items()))
        logger.warning("%d of %d layers get rank 1. That of %s: %s", len(refused), len(named), name, reason)
    ranks = dict.fromkeys(prices, 1)
    for _, name in sorted(gains, reverse=True):
        if prices[name] > left:
            break
        ranks[name], left = ranks[name] + 1, left - prices[name]
    return ranks
