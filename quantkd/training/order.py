"""The order of training rows: rows of similar length share a batch; the order follows from the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainingArguments

from quantkd.transfer_set import TransferSet


def row_lengths(dataset: Any) -> list[int] | None:
    """Tokens per row; None for a data set without a length, whose order is its own."""
    if isinstance(dataset, TransferSet):
        return [int(length) for length in dataset.lengths]
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return None
    if isinstance(dataset, Dataset):  # a column is read without the others
        return [len(ids) for ids in dataset["input_ids"]]
    return [len(dataset[row]["input_ids"]) for row in range(len(dataset))]


class LengthGroupedBatches(Sampler[int]):
    """Rows in groups of similar length: the one with the longest row first, the others in random order."""

    # transformers' own sampler leaves a run of groups sorted from long to short, and draws from a random state that a
    # resumed run does not have in a later epoch.

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self._lengths, self._group, self._seed, self._epoch = list(lengths), group, seed, 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """accelerate's data loader calls this at the start of every epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        rows = torch.randperm(len(self._lengths), generator=generator).tolist()
        # Sorted within windows of shuffled rows, so that each epoch has other groups.
        size = self._group * min(50, max(len(rows) // (4 * self._group), 8))
        windows = [rows[start : start + size] for start in range(0, len(rows), size)]
        rows = [row for window in windows for row in sorted(window, key=lambda row: -self._lengths[row])]
        # The longest row comes first, so that too little memory shows at once. The last group may be short and stays.
        longest = max(range(len(rows)), key=lambda place: self._lengths[rows[place]], default=0)
        rows[:1], rows[longest : longest + 1] = rows[longest : longest + 1], rows[:1]
        groups = [rows[start : start + self._group] for start in range(0, len(rows), self._group)]
        inner = [groups[1 + place] for place in torch.randperm(max(len(groups) - 2, 0), generator=generator).tolist()]
        return iter([row for group in [*groups[:1], *inner, *groups[1:][-1:]] for row in group])


def order_for_training(dataset: Any, args: TrainingArguments) -> LengthGroupedBatches | None:
    """Rows of similar length together, in groups of one optimizer step; None for the Trainer's own order."""
    lengths = row_lengths(dataset) if args.train_sampling_strategy == "group_by_length" else None
    if lengths is None:
        return None
    group = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return LengthGroupedBatches(lengths, group, args.seed if args.data_seed is None else args.data_seed)


def order_for_evaluation(dataset: Any) -> list[int] | None:
    """The longest rows first, for metrics that are sums over rows; None for the data set's own order."""
    if not isinstance(dataset, TransferSet):
        return None
    lengths = dataset.lengths
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])
