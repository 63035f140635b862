"""From an engine's top log-probabilities to the rows of a transfer set, under a storage rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from quantkd.errors import ConfigError, TeacherError, TransferSetError
from quantkd.transfer_set import TransferRow
from quantkd.transfer_set.rules import Nucleus, Sampled, StorageRule, TopK, keep_entries, max_entries

# What vLLM's server writes for a probability of 0, for JSON has no infinity.
ZERO_PROBABILITY = -9999.0
_ROUNDING = 1e-3  # nats above 0 that a float16 teacher reaches, and between two that are one


@dataclass(frozen=True)
class TopLogprobs:
    """What an engine said about R targets: ragged candidates in any order, doubles allowed."""

    counts: NDArray[np.int64]  # (R,)
    token_ids: NDArray[np.int64]  # (E,)
    logprobs: NDArray[np.float64]  # (E,) nats at temperature 1

    @classmethod
    def from_pairs(cls, targets: Sequence[Sequence[tuple[int, float]]]) -> TopLogprobs:
        """Join the candidates of every target."""
        for logprob in (logprob for target in targets for _, logprob in target):
            if isinstance(logprob, bool) or not isinstance(logprob, (int, float)):
                raise ValueError(f"{logprob!r:.80} is not a log-probability")
        return cls(
            counts=np.asarray([len(target) for target in targets], dtype=np.int64),
            token_ids=np.asarray([token for target in targets for token, _ in target], dtype=np.int64),
            logprobs=np.asarray([logprob for target in targets for _, logprob in target], dtype=np.float64),
        )

    @classmethod
    def join(cls, parts: Sequence[TopLogprobs]) -> TopLogprobs:
        """The targets of each, one after the other."""
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    def select(self, targets: NDArray[np.int64] | Sequence[int]) -> TopLogprobs:
        """The targets (M,) named by their places, in that order; those beyond the end come without candidates."""
        counts = np.append(self.counts, 0)
        starts = np.cumsum(counts) - counts
        targets = np.minimum(targets, len(self.counts))
        chosen = counts[targets]
        within = np.arange(chosen.sum()) - np.repeat(np.cumsum(chosen) - chosen, chosen)
        entries = np.repeat(starts[targets], chosen) + within
        return TopLogprobs(chosen, self.token_ids[entries], self.logprobs[entries])

    def rank(
        self, targets: int, head_size: int, where: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """(E,) targets, ids and log-probabilities, checked: doubles joined, each target's most probable one first."""
        ids, logprobs = self.token_ids, self.logprobs
        if len(self.counts) != targets:
            raise TeacherError(f"{where} log-probabilities of {len(self.counts)} tokens; expected {targets}.")
        for token in ids[(ids < 0) | (ids >= head_size)]:
            raise _out_of_vocabulary(where, token, head_size)
        for logprob in logprobs[np.isnan(logprobs) | (logprobs > _ROUNDING)]:
            raise TeacherError(
                f"{where} the log-probability {logprob}; expected finite numbers of at most 0. "
                "Check the model's dtype and weights."
            )
        # The sampled token comes in addition to the most probable ones and may be one of them.
        owners = np.repeat(np.arange(targets, dtype=np.int64), self.counts)
        _, first, same = np.unique(owners * head_size + ids, return_index=True, return_inverse=True)
        for token in ids[~np.isclose(logprobs, logprobs[first][same], rtol=0, atol=_ROUNDING)]:
            raise TeacherError(f"{where} two log-probabilities of the token {token} in one place; expected one.")
        owners, ids, logprobs = owners[first], ids[first], np.minimum(logprobs[first], 0.0)
        order = np.lexsort((-logprobs, owners))  # stable: equal probabilities stay in the order of their ids
        return owners[order], ids[order], logprobs[order]


def _out_of_vocabulary(where: str, token: int, head_size: int) -> TeacherError:
    return TeacherError(
        f"{where} the token id {token}, and the vocabulary ends at {head_size}. Check that the tokenizer "
        "is the model's; if its logits are wider than that, name their width with vocab_size."
    )


def check_rule(rule: StorageRule, temperatures: Sequence[float], engine: str) -> TopK | Nucleus:
    """Refuse a storage rule, and temperatures, that take the whole vocabulary's logits."""
    if isinstance(rule, Sampled):
        raise ConfigError(
            f"{engine} gives the most probable tokens alone, and {rule} draws from the whole distribution. "
            "Store nucleus or topk entries, or capture with the transformers engine."
        )
    if {float(temperature) for temperature in temperatures} != {1.0}:
        raise ConfigError(
            f"{engine} gives log-probabilities at temperature 1.0 alone; temperatures "
            f"{[float(t) for t in temperatures]} need all logits: --temperatures 1.0, or the transformers engine."
        )
    return rule


@dataclass(frozen=True)
class RowBuilder:
    """Makes rows from an engine's top log-probabilities."""

    engine: str  # its name, for errors
    rule: TopK | Nucleus
    vocab_size: int  # the ids that can be a token; candidates beyond that count to the tail
    head_size: int  # the width of the teacher's logits

    def __post_init__(self) -> None:
        if isinstance(self.rule, TopK) and self.rule.k > self.vocab_size:
            raise ConfigError(f"{self.rule} exceeds the teacher's vocabulary of {self.vocab_size}; choose a smaller k.")

    @property
    def width(self) -> int:
        """How many candidates a target must come with for the rule to choose from."""
        return max_entries(self.rule, self.vocab_size)

    def build(
        self, index: int, input_ids: Sequence[int], spans: NDArray[np.int64], candidates: TopLogprobs, *, finished: bool
    ) -> TransferRow:
        """One row, with the candidates cut to what the rule keeps: sorted, doubles joined, at least one per target."""
        targets = int((spans[:, 1] - spans[:, 0]).sum())
        where, head_size = f"{self.engine} answered prompt {index} with", max(self.head_size, self.vocab_size)
        for token in (token for token in input_ids if not 0 <= token < self.vocab_size):
            raise _out_of_vocabulary(where, token, head_size)
        owners, ids, logprobs = candidates.rank(targets, head_size, where)
        counts = np.bincount(owners, minlength=targets)
        keep = keep_entries(logprobs, counts, self.rule) & (logprobs > ZERO_PROBABILITY) & (ids < self.vocab_size)
        complete = counts >= self.width
        if isinstance(self.rule, Nucleus):
            complete |= np.bincount(owners, weights=np.exp(logprobs), minlength=targets) >= self.rule.p
        kept = np.bincount(owners[keep], minlength=targets)
        for target in np.flatnonzero(~complete | (kept == 0)):
            raise TeacherError(
                f"{where} {counts[target]} log-probabilities at token {target} of the answer, where {self.rule} "
                f"needs {self.width}. Raise the engine's limit (vLLM: --max-logprobs), or choose a smaller rule."
            )
        row = TransferRow(
            input_ids=np.asarray(input_ids, dtype=np.int64),
            spans=spans,
            counts=kept,
            token_ids=ids[keep],
            logprobs=logprobs[keep].astype(np.float32),
            log_normalizers=np.zeros((targets, 1), dtype=np.float32),
            finished=finished,
        )
        try:
            row.validate(self.vocab_size)
        except TransferSetError as error:
            raise TeacherError(f"{self.engine}'s answer to prompt {index}: {error}") from error
        return row
