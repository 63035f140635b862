"""The order of training rows: rows of like length share a batch, and the order follows from the seed and the epoch."""

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
    """Rows in groups of like length, the groups in random order and the one with the longest row first.

    As transformers does it, whose own sampler leaves a run of groups sorted from long to short, and takes its random
    numbers from a state that a resumed run does not have in a later epoch.

    Args:
        lengths: tokens per row.
        group: rows that belong together: those of one optimizer step over all processes.
        seed: with the epoch, decides the order.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self._lengths, self._group, self._seed, self._epoch = list(lengths), group, seed, 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """accelerate's data loader calls this at the start of every epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        # Rows are sorted within windows of this many groups. transformers' own choice, a quarter of the rows, leaves a
        # few hundred rows all but unsorted.
        window = min(50, max(len(self._lengths) // (4 * self._group), 8))
        size, rows = window * self._group, torch.randperm(len(self._lengths), generator=generator).tolist()
        for start in range(0, len(rows), size):
            rows[start : start + size] = sorted(rows[start : start + size], key=lambda row: -self._lengths[row])
        longest = max(range(0, len(rows), size), key=lambda place: self._lengths[rows[place]], default=0)
        rows[:1], rows[longest : longest + 1] = rows[longest : longest + 1], rows[:1]
        groups = [rows[start : start + self._group] for start in range(0, len(rows), self._group)]
        # The first stays: it has the longest row, so that too little memory shows at once. The last may be short.
        inner = groups[1:-1]
        shuffled = [inner[i] for i in torch.randperm(len(inner), generator=generator).tolist()]
        ordered = [groups[0], *shuffled, *groups[len(groups) - 1 :]] if len(groups) > 1 else groups
        return iter([row for group in ordered for row in group])


def order_for_training(dataset: Any, args: TrainingArguments) -> LengthGroupedBatches | None:
    """Rows of like length together, in groups of one optimizer step; None for the Trainer's own order."""
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
