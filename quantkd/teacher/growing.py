"""Where a capture writes: into its folder, or, to extend a finished set, beside it until all is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkd.errors import TransferSetError
from quantkd.hardware import process_state
from quantkd.transfer_set import Plan
from quantkd.transfer_set.extension import (
    EXTENSION_FOLDER,
    extended_plan,
    is_last_segment,
    merge_extension,
)
from quantkd.transfer_set.index import INDEX_NAME, read_index


@dataclass(frozen=True)
class Opening:
    """Where rows are written, and what the set that they are added to fixes.

    Args:
        folder: of the writer.
        base: plan of the finished set; None for a new one.
    """

    folder: Path
    base: Plan | None = None

    @property
    def first_row(self) -> int:
        """Index of the first row, from which its random draws come."""
        return self.base.num_shards * self.base.rows_per_shard if self.base else 0

    @property
    def rows_per_shard(self) -> int | None:
        """What an extension must keep to."""
        return self.base.rows_per_shard if self.base else None

    @property
    def batch_size(self) -> int | None:
        """What an extension must keep to."""
        return self.base.batch_size if self.base else None

    def check(self, plan: Plan) -> bool:
        """Refuse a plan whose rows do not fit the set."""
        if self.base is None:
            return True
        if is_last_segment(self.base, plan) and not (self.folder / INDEX_NAME).exists():
            return False
        extended_plan(self.base, plan)
        return True


def opening(folder: Path, *, extend: bool) -> Opening:
    """Where a capture writes."""
    occupied = next((part for part in (folder, *folder.parents) if part.exists()), folder)
    if occupied.exists() and not occupied.is_dir():
        raise TransferSetError(f"{occupied} is a file; the set needs a folder. Name another output_dir, or remove it.")
    if not extend:
        return Opening(folder)
    if not (folder / INDEX_NAME).exists():
        raise TransferSetError(
            f"There is no finished transfer set at {folder} to extend. Finish it first, by its own command, or leave "
            "extend out."
        )
    staging = folder / EXTENSION_FOLDER
    if (staging / INDEX_NAME).exists():
        # A finished extension that was killed before its shards had all moved. Done with it, the same command is told
        # so, and another one adds its own rows. Every process does this, behind one lock.
        merge_extension(folder)
    return Opening(staging, read_index(folder).plan)


def grow(folder: Path) -> None:
    """Take the finished extension into the set, once every process of this launch has closed it."""
    state = process_state()
    state.wait_for_everyone()
    if state.is_main_process:
        merge_extension(folder)
    state.wait_for_everyone()
