"""TopKLogprobs: a teacher's next-token distributions, sparse. The one value that travels from teacher to loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quantkd.errors import ConfigError
from quantkd.hardware import send, wide_dtype


@dataclass(frozen=True)
class TopKLogprobs:
    """Teacher distributions at N positions: ragged entries per position, and all other mass as one tail class.

    Position n owns the entries `offsets[n]:offsets[n + 1]`. A sure position holds one entry, an unsure one many; the
    mass that no entry holds is the tail, and is never stored because it follows from the entries.

    Args:
        offsets: (N + 1,) int64, monotone, `offsets[0] == 0` and `offsets[N] == E`.
        token_ids: (E,) int64 vocabulary ids, unique within a position, the most probable one first.
        logprobs: (E,) float, natural log of the teacher's probability at temperature 1 (nats, at most 0).
        log_normalizers: (N, len(temperatures)) float, `A_T = log sum_v exp(logprob_v / T)` over the whole vocabulary,
            one column a temperature. `A_1` is 0.
        temperatures: the distillation temperatures that `log_normalizers` covers.
        vocab_size: V, the width of the teacher's logits.

    Example:
        >>> import torch
        >>> teacher = TopKLogprobs.from_dense(torch.tensor([[2.0, 1.0, 0.0]]), temperatures=(1.0, 2.0))
        >>> len(teacher), teacher.counts.tolist()
        (1, [3])
        >>> logprobs, tail = teacher.at_temperature(2.0)
        >>> round(float(logprobs.exp().sum() + tail.sum()), 6)
        1.0
    """

    offsets: Tensor
    token_ids: Tensor
    logprobs: Tensor
    log_normalizers: Tensor
    temperatures: tuple[float, ...]
    vocab_size: int

    @classmethod
    def from_dense(cls, logits: Tensor, temperatures: Sequence[float] = (1.0,)) -> TopKLogprobs:
        """Store every class of `logits` (N, V): k = V, so the tail is empty and the loss is the dense one.

        Args:
            logits: (N, V) raw teacher logits; computed in float32, or float64 if they are float64.
            temperatures: the distillation temperatures to keep log-normalizers for.
        """
        logprobs = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
        positions, vocab_size = logprobs.shape
        token_ids = torch.arange(vocab_size, device=logits.device).repeat(positions, 1)
        top = logprobs.argmax(-1, keepdim=True)
        token_ids.scatter_(-1, top, 0)  # the most probable one and id 0 change places
        token_ids[:, :1] = top
        return cls(
            offsets=torch.arange(positions + 1, device=logits.device) * vocab_size,
            token_ids=token_ids.flatten(),
            logprobs=logprobs.gather(-1, token_ids).flatten(),
            log_normalizers=torch.stack([(logprobs / t).logsumexp(-1) for t in temperatures], dim=-1),
            temperatures=tuple(temperatures),
            vocab_size=vocab_size,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[TopKLogprobs]) -> TopKLogprobs:
        """Join several values end to end; all must share temperatures and vocabulary size.

        Raises:
            ConfigError: no parts, or parts of different temperatures or vocabulary sizes.
        """
        kinds = {(part.temperatures, part.vocab_size) for part in parts}
        if len(kinds) != 1:
            raise ConfigError(
                f"Expected one set of temperatures and one vocabulary size, found {sorted(kinds)}. "
                "Capture all parts with the same teacher and temperatures."
            )
        return replace(
            parts[0],
            offsets=offsets_of(torch.cat([part.counts for part in parts])),
            token_ids=torch.cat([part.token_ids for part in parts]),
            logprobs=torch.cat([part.logprobs for part in parts]),
            log_normalizers=torch.cat([part.log_normalizers for part in parts]),
        )

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def counts(self) -> Tensor:
        """(N,) int64: the number of entries of each position."""
        return self.offsets.diff()

    @property
    def positions(self) -> Tensor:
        """(E,) int64: the position that each entry belongs to."""
        return torch.repeat_interleave(self.counts, output_size=self.token_ids.numel())

    @property
    def top_ids(self) -> Tensor:
        """(N,) int64: the teacher's most probable token at each position."""
        return self.token_ids[self.offsets[:-1]]

    @cached_property
    def borders(self) -> list[int]:
        """The offsets as numbers. Reading them waits for the device, so `to` takes along what it knows of them."""
        return self.offsets.tolist()

    def select(self, index: Tensor | slice) -> TopKLogprobs:
        """The positions named by `index` ((M,) int64, (N,) bool, or a slice without a step), in that order."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            offsets = self.offsets[start : stop + 1] - self.offsets[start]
            entries: Tensor | slice = slice(self.borders[start], self.borders[stop])
        else:
            index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
            counts = self.counts[index]
            offsets = offsets_of(counts)
            shift = torch.repeat_interleave(self.offsets[:-1][index] - offsets[:-1], counts)
            entries = torch.arange(shift.numel(), device=shift.device) + shift
        return replace(
            self,
            offsets=offsets,
            token_ids=self.token_ids[entries],
            logprobs=self.logprobs[entries],
            log_normalizers=self.log_normalizers[index],
        )

    def at_temperature(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the entries, and the mass outside them, at a distillation temperature.

        Args:
            temperature: one of `self.temperatures`, or 1.0, where the normalizer is 0.

        Returns:
            (E,) log-probabilities in nats, and (N,) tail masses in [0, 1]. The tail is exactly 0 where a position
            stores the whole vocabulary.

        Raises:
            ConfigError: the temperature was not declared at capture, so its normalizer is unknown.
        """
        if temperature != 1.0 and temperature not in self.temperatures:
            raise ConfigError(
                f"The teacher's log-normalizers are known for temperatures {list(self.temperatures)}; "
                f"{temperature} was asked for. Use one of those, or capture again with --temperatures {temperature}."
            )
        positions = self.positions
        # 1 - sum cancels: in float32 a tail of 1e-7 would be noise. The entries are few, so float64 costs nothing.
        wide = wide_dtype(self.logprobs.device)
        logprobs = self.logprobs.to(wide) / temperature
        if temperature != 1.0:
            logprobs -= self.log_normalizers[:, self.temperatures.index(temperature)].to(wide)[positions]
        covered = torch.zeros(len(self), dtype=wide, device=logprobs.device).index_add_(0, positions, logprobs.exp())
        tail = (1 - covered).clamp_min(0).masked_fill(self.counts == self.vocab_size, 0)
        dtype = self.logprobs.dtype if self.logprobs.dtype == torch.float64 else torch.float32
        return logprobs.to(dtype), tail.to(dtype)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TopKLogprobs:
        """The same value with its tensors on `device`; `accelerate` calls this when it places a batch.

        Args:
            device: where to.
            non_blocking: not used; copies to a GPU go through pinned memory, and nobody waits for them.
        """
        moved = self._map(lambda tensor: send(tensor, torch.device(device)))
        vars(moved)["borders"] = self.borders
        return moved

    def pin_memory(self) -> TopKLogprobs:
        """The same value in page-locked memory; `DataLoader(pin_memory=True)` calls this."""
        return self._map(lambda tensor: tensor.pin_memory())  # pragma: no cover - needs a GPU

    def _map(self, function: Callable[[Tensor], Tensor]) -> TopKLogprobs:
        mapped: dict[str, Any] = {name: function(value) for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **mapped)


def offsets_of(counts: Tensor) -> Tensor:
    """(N + 1,) int64 offsets of ragged values of (N,) counts."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
