"""Does a transfer set hold what its teacher says? A random sample of its rows, computed again.

A format check cannot see poisoned distributions: they are as valid as any others. With the teacher at hand they are
seen, for a row computed again differs from the stored one by rounding alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quantkd.errors import ConfigError
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.transfer_set import IGNORE_INDEX, TransferSet

# Nats. In bfloat16, logits of 16 to 32 lie an eighth apart: two such may change places in a second pass.
_TIE = 0.25


@dataclass(frozen=True)
class Audit:
    """What was found in the sample.

    Args:
        rows: places in the set, ascending.
        kl: of each row the mean KL from the stored to the computed distributions, in nats a token.
        agreement: of each row the share of tokens whose most probable token is the same.
        greedy: share of all response tokens that are the stored most probable one, or tie with it as far as bfloat16
            can tell; None where the set was not captured from greedy answers of the teacher's own.
        tolerance: the `kl` above which a row is suspect.
    """

    rows: list[int]
    kl: list[float]
    agreement: list[float]
    greedy: float | None
    tolerance: float

    @property
    def suspects(self) -> list[int]:
        """The rows that their teacher would not have written."""
        return [row for row, kl in zip(self.rows, self.kl, strict=True) if not kl <= self.tolerance]

    @property
    def passed(self) -> bool:
        """Whether no row is suspect, and greedy answers are greedy but for ties that rounding decides."""
        return not self.suspects and (self.greedy is None or self.greedy >= 0.99)


def audit(
    transfer_set: TransferSet,
    model: Any,
    *,
    num_rows: int = 32,
    seed: int = 0,
    tolerance: float = 0.01,
    batch_size: int = 4,
    progress: bool = True,
) -> Audit:
    """Compute a random sample of a set's rows again with the teacher that it names.

    n rows without a suspect say that, with 95% confidence, at most 3 / n of the set's rows are wrong (the rule of
    three, Hanley and Lippman-Hand 1983). A row is judged by its mean, so one changed token in a long row can stay below
    the tolerance; take a lower one where teacher and set are in float32.
    """
    if transfer_set.info.storage["kind"] == "sampled":
        raise ConfigError(
            "The set stores sampled entries, random draws that a second computation does not repeat; expected nucleus "
            "or topk entries. Capture the sample again and compare digests."
        )
    if num_rows < 1 or not len(transfer_set):
        raise ConfigError(f"{num_rows} of {len(transfer_set)} rows were asked for; expected at least one.")
    order = torch.randperm(len(transfer_set), generator=torch.Generator().manual_seed(seed))
    rows = sorted(order[:num_rows].tolist())
    sample = transfer_set.select(rows)
    sums = evaluate_fidelity(model, sample, batch_size=batch_size, progress=progress).to_json()["rows"]
    kl, agreement = ([row[name] / row["tokens"] for row in sums] for name in ("kl_sum", "agree"))
    return Audit(rows, kl, agreement, _greedy_share(sample), tolerance)


def _greedy_share(sample: TransferSet) -> float | None:
    info = sample.info
    if info.responses != "generate" or info.generation.get("do_sample"):
        return None
    greedy, tokens = 0, 0
    for row in sample:
        answer, teacher = row["input_ids"][row["labels"] != IGNORE_INDEX], row["teacher"]
        entries = teacher.positions
        behind = teacher.logprobs[teacher.offsets[:-1]][entries] - teacher.logprobs
        greedy += int(((teacher.token_ids == answer[entries]) & (behind <= _TIE)).sum())
        tokens += len(answer)
    return greedy / tokens
