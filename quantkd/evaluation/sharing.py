"""An evaluation shared by the processes of a launcher: who measures what, and how all learn what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from quantkd.errors import ConfigError, QuantKDError
from quantkd.hardware import process_state

Found = TypeVar("Found")


def is_writer(share: bool) -> bool:
    """Whether this process writes files and shows bars."""
    return not share or bool(process_state().is_main_process)


def ask_main(share: bool, ask: Callable[[], Found]) -> Found:
    """What the main process finds, in every process; an error that it raises is raised in all of them."""
    if not share or process_state().num_processes == 1:
        return ask()
    answer: list[Any] = [None, None]
    if process_state().is_main_process:
        try:
            answer[0] = ask()
        except QuantKDError as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    found: Found = answer[0]
    return found


def deal_batches(lengths: Sequence[int], batch_size: int, share: bool) -> list[list[int]]:
    """This process's batches, longest first. They are the same batches on any number of processes."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected at least 1.")
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[process_state().process_index :: process_state().num_processes] if share else batches


def gather_rounds(batches: Iterable[list[Any]], num_batches: int, share: bool) -> Iterator[list[Any]]:
    """What all processes made, round by round: each gives one batch per round, or nothing if it has no more."""
    if not share or process_state().num_processes == 1:
        yield from batches
        return
    own = iter(batches)
    for _ in range(-(-num_batches // process_state().num_processes)):
        yield gather_object([result for batch in islice(own, 1) for result in batch])
