"""TargetStates: what a model gives at the target positions of a batch, as hidden states with a head or as logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkd.errors import ConfigError
from quantkd.transfer_set.batch import find_targets


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: `cap * tanh(scale * (hidden @ weight.T + bias) / cap)`."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0  # a factor on the logits (Cohere, Granite)
    softcap: float | None = None  # the final soft-capping (Gemma 2)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V), in float32, or float64 if the product is."""
        logits = _widen(torch.nn.functional.linear(hidden, self.weight, self.bias))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = logits / self.softcap  # step by step, so that no more than two are in memory
            logits = torch.tanh(logits)
            logits = self.softcap * logits
        return logits


@dataclass(frozen=True)
class TargetStates:
    """What a model gives at N positions: its last hidden states and the head that reads them, or its logits."""

    # Logits are held only by models whose head cannot be separated (`models.network.why_not_fusable`).
    values: Tensor
    head: Head | None = None

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        return self.values.shape[-1] if self.head is None else self.head.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    def logits(self, part: slice = slice(None)) -> Tensor:
        """(n, V) logits of some positions in float32 or float64, never shared: the caller may overwrite them."""
        values = self.values[part]
        if self.head is not None:
            return self.head.logits(values)
        wide = _widen(values)
        return wide.clone() if wide is values else wide

    def at_targets(self, labels: Tensor, targets: Tensor | None = None) -> tuple[TargetStates, Tensor]:
        """Of states (B, T, ·), those that predict a target, and the (N,) labels there.

        Shapes: labels (B, T), unshifted; targets (N,), those of `find_targets`, which waits for the device.
        """
        # This is the one place where the causal shift happens: position t predicts the label of t + 1.
        if self.values.shape[:2] != labels.shape:
            raise ConfigError(
                f"The model gives states of {tuple(self.values.shape[:2])} positions for labels of "
                f"{tuple(labels.shape)}; expected one per label. Train adapters that add no tokens, such as LoRA."
            )
        targets = find_targets(labels) if targets is None else targets
        values = self.values.flatten(0, 1).index_select(0, targets - 1)
        return replace(self, values=values), labels.flatten().index_select(0, targets)

    def for_products(self) -> TargetStates:
        """The states in the dtype of autocast, if it is on: cast once, where the product of each part would do it."""
        device = self.device.type
        if self.head is None or self.head.weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
            return self
        return self.to(torch.get_autocast_dtype(device))

    def select(self, index: Tensor | slice) -> TargetStates:
        """The positions named by `index`, in that order."""
        return replace(self, values=self.values[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> TargetStates:
        """The same states with all tensors changed, those of the head, too."""
        head = self.head
        if head is not None:
            head = replace(head, weight=function(head.weight), bias=None if head.bias is None else function(head.bias))
        return TargetStates(function(self.values), head)

    def to(self, target: torch.device | torch.dtype) -> TargetStates:
        """The same states on a device or in a dtype."""
        return self.map(lambda tensor: tensor.to(target))


def _widen(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
