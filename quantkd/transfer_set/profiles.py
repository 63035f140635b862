"""The two profiles: how precisely numbers are stored, and which storage rule goes with that precision."""

from __future__ import annotations

from dataclasses import dataclass

from quantkd.transfer_set.rules import Nucleus


@dataclass(frozen=True)
class Profile:
    """A precision, and the storage rule whose own error it matches.

    Args:
        levels: codes of the first entry and of the log-normalizers, 256 (one byte) or 65,536 (two).
        storage: the rule that `capture` and `convert` use if none is given.
    """

    levels: int
    storage: Nucleus


# benchmarks/storage.py measures what each costs in bytes, and in degrees of the LoRA gradient.
PROFILES = {
    "faithful": Profile(levels=2**16, storage=Nucleus(0.98, max_k=64)),
    "compact": Profile(levels=2**8, storage=Nucleus(0.90, max_k=64)),
}
