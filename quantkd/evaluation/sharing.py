"""The items of an evaluation, cut into batches and dealt to the processes of a launcher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from accelerate.utils import gather_object

from quantkd.errors import ConfigError
from quantkd.hardware import process_state


def deal_batches(lengths: Sequence[int], batch_size: int, share: bool) -> list[list[int]]:
    """This process's batches. They are the same batches on any number of processes, so the answers are, too."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected at least 1.")
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[process_state().process_index :: process_state().num_processes] if share else batches


def gather_rounds(batches: Iterable[list[Any]], num_batches: int, share: bool) -> Iterator[list[Any]]:
    """What all processes made, round by round: each gives one batch a round, or nothing if it has no more."""
    if not share or process_state().num_processes == 1:
        yield from batches
        return
    own = iter(batches)
    for _ in range(-(-num_batches // process_state().num_processes)):
        yield gather_object([result for batch in islice(own, 1) for result in batch])
