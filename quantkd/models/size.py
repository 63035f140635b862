"""The size of a model in bytes, and in bits per weight: codes, block constants and adapters of its linear layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSize:
    """The bytes of a model, and how many weights its quantized linear layers have, or all of them if none is."""

    codes: int
    constants: int  # of the blocks
    adapters: int
    rest: int  # embeddings, norms, head
    linear_weights: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.codes + self.constants + self.adapters + self.rest

    @property
    def bits_per_weight(self) -> float | None:
        """Of the linear layers with their adapters; None for a model without them."""
        return 8 * (self.total - self.rest) / self.linear_weights if self.linear_weights else None
