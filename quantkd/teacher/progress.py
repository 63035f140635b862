"""What a person sees of a capture: the plan before it, a bar during it, a table after it."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from quantkd.hardware import process_state

if TYPE_CHECKING:
    from quantkd.teacher.plan import CaptureEstimate
    from quantkd.transfer_set import TransferSetInfo


@dataclass(frozen=True)
class CaptureSummary:
    """What a capture did, in this process and in all.

    Args:
        info: of the finished set.
        tokens: response tokens that this process computed, filtered ones included; 0 where nothing was left to do.
        seconds: how long it was at work.
    """

    info: TransferSetInfo
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Response tokens a second of this process."""
        return self.tokens / self.seconds if self.seconds else 0.0


class CaptureObserver:
    """Is told of a capture's steps, in every process; does nothing itself. What it raises ends the capture."""

    def planned(self, estimate: CaptureEstimate) -> None:
        """The plan is fixed, and nothing is written yet."""

    def finished(self, summary: CaptureSummary) -> None:
        """The set is complete."""


@dataclass
class Progress:
    """The bar, and the counts behind it.

    Args:
        bar: a tqdm bar over rows.
    """

    bar: Any
    tokens: int = 0
    counters: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def over(cls, num_rows: int, *, show: bool) -> Progress:
        """A bar on the main process's terminal, if there is one."""
        wanted = show and process_state().is_main_process
        return cls(tqdm(total=num_rows, desc="capture", unit="row", file=sys.stderr, disable=None if wanted else True))

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def batch(self, rows: int, tokens: int) -> None:
        """A batch is done."""
        self.tokens += tokens
        self.bar.update(rows)
        self._show()

    def shard(self, rows: int, counters: Counter[str]) -> None:
        """A shard is committed."""
        self.rows += rows
        self.counters.update(counters)
        self._show()

    def _show(self) -> None:
        text = f"{self.tokens / max(self.seconds, 1e-9):.0f} tokens/s"
        filtered = sum(number for name, number in self.counters.items() if name.startswith("filtered_"))
        if filtered:
            text += f", {self.rows} kept, {filtered} filtered"
        self.bar.set_postfix_str(text, refresh=False)
