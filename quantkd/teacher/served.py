"""How near a served student is to the stored teacher, from the log-probabilities that its server gives.

A server lists the most probable tokens, and some the row's own one too. Of a stored token that it does not list, the
student's probability is at most the least of the most probable ones, and at most the mass that is not listed; so the KL
has bounds. The figures are those of the upper bound, which takes each such token at `FLOOR`, or at the most that it may
have if that is less, and the tail at what is left if all of them are as probable as they may be.
"""

from __future__ import annotations

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from quantkd.errors import ConfigError, TeacherError, printable
from quantkd.evaluation.arms import Arm, Fidelity, check_arm_name
from quantkd.evaluation.fidelity import join_rows, sum_rows
from quantkd.evaluation.stats import Floats
from quantkd.loss.reference import compute_divergence
from quantkd.models.size import ModelSize
from quantkd.names import __version__, public_name
from quantkd.teacher.logprobs import ZERO_PROBABILITY, TopLogprobs
from quantkd.teacher.model_server import ModelServer
from quantkd.transfer_set import IGNORE_INDEX, TransferSet
from quantkd.transfer_set.compatibility import check_student
from quantkd.transfer_set.documents import is_whole
from quantkd.transfer_set.topk import TopKLogprobs

logger = logging.getLogger(__name__)

FLOOR = 2.0**-30  # probability of what the server does not list, in the upper bound
_EXCESS = 1e-3  # by which a list may sum to more than 1
_SLACK = 1e-6  # of a sum of float32 probabilities
TOP_LOGPROBS = 128


def evaluate_served(
    server: ModelServer,
    held_out: TransferSet,
    run_dir: str | Path,
    *,
    arm: str,
    title: str | None = None,
    size: ModelSize | None = None,
    top_logprobs: int = TOP_LOGPROBS,
    concurrency: int = 8,
    progress: bool = True,
) -> Arm:
    """Measure a model that is being served, and write `<run_dir>/evaluation/<arm>.json`.

    Each target position is asked for with the row's own tokens before it, so nothing is generated. The settings of the
    arm's fidelity hold the bounds of its KL, `kl_bounds`, and how many stored tokens were not listed, `not_listed`.

    Args:
        server: the model, as its server is asked.
        held_out: rows of a transfer set.
        run_dir: the run's folder, which `quantkd.report.build_report` reads.
        arm: a name as in `evaluate_arm`.
        title: how the report calls it; by default the arm's name.
        size: the model's bytes; by default what the server says of them.
        top_logprobs: how many log-probabilities a token are asked for. llama.cpp is asked for more where a stored token
            is not among them, so that its bounds meet.
        concurrency: rows that are asked for at once; llama.cpp gets one at a time.
        progress: show a bar if there is a terminal.

    Returns:
        The arm.

    Raises:
        ConfigError: an arm's name that is not a file name, counts below 1, or a smaller vocabulary than the set's.
        DataError: no rows, or rows longer than the server's context.
        TeacherError: the server fails, or its answers cannot be the model's log-probabilities.
    """
    check_arm_name(arm, title)
    if not (is_whole(top_logprobs, 1, 2**31) and is_whole(concurrency, 1, 2**31)):
        asked = f"{top_logprobs!r:.80} and {concurrency!r:.80}"
        raise ConfigError(f"top_logprobs and concurrency are {asked}; expected whole numbers of at least 1.")
    known = held_out.info.vocab_size
    check_student(held_out, server.vocab_size or known, server.max_context)
    if (server.vocab_size or known) > known:
        logger.warning(
            "%s has %d tokens, the transfer set %d. That is right for a head that is padded; a model with another "
            "tokenizer would be compared token id by token id all the same.", server.where, server.vocab_size, known,
        )  # fmt: skip

    def measure(index: int, row: dict[str, Any]) -> tuple[dict[str, Floats], Floats]:
        return _measure_row(server, row, top_logprobs, f"{server.where} answered row {index} with")

    with ThreadPoolExecutor(server.limit_concurrency(concurrency), "served") as pool:
        rows = pool.map(measure, *zip(*enumerate(held_out), strict=True))  # which are read by this thread
        quiet = None if progress else True
        found: list[tuple[dict[str, Floats], Floats]] = list(
            tqdm(rows, total=len(held_out), desc=server.kind, unit="row", disable=quiet)
        )
    columns = join_rows([sums for sums, _ in found], np.arange(len(held_out)))
    lower, not_listed, mass = np.sum([facts for _, facts in found], axis=0).tolist()
    tokens = float(columns["tokens"].sum())
    settings: dict[str, Any] = {"transfer_set": held_out.digest, "quantkd_version": __version__, "engine": server.kind}
    settings |= {"top_logprobs": top_logprobs, "not_listed": int(not_listed), "not_listed_mass": mass / tokens}
    settings["kl_bounds"] = [lower / tokens, float(columns["kl_sum"].sum()) / tokens]
    fidelity = Fidelity(columns, settings)
    # Of the weights nothing is known but what they answer.
    fingerprint = hashlib.sha256(json.dumps(fidelity.to_json(), sort_keys=True).encode()).hexdigest()
    title, name = printable((title or "").strip() or arm), printable(public_name(server.name))
    size = size or ModelSize(0, 0, 0, server.size_bytes or 0, 0)
    result = Arm(arm, title, name, fingerprint, size, fidelity)
    result.write(Path(run_dir) / "evaluation")
    return result


def _measure_row(server: ModelServer, row: dict[str, Any], width: int, where: str) -> tuple[dict[str, Floats], Floats]:
    """The row's sums; and its lower bound of the KL, how many stored tokens were not listed, and their mass."""
    labels, teacher = row["labels"], row["teacher"]
    places = (labels != IGNORE_INDEX).nonzero().flatten()
    targets = labels[places]
    stored = teacher.token_ids.split(teacher.counts.tolist())
    needed = [{int(target), *ids.tolist()} for target, ids in zip(targets, stored, strict=True)]
    candidates = server.score(row["input_ids"].tolist(), places.tolist(), width, needed)
    # A server's head may be padded beyond the ids that the set knows.
    listed = _Listed(candidates, targets, max(server.vocab_size or 0, teacher.vocab_size), where)
    positions, lower, missing = listed.compare(teacher)
    mass = float(teacher.logprobs[missing].double().exp().sum())
    facts = np.array([float(lower.sum()), float(missing.sum()), mass])
    return sum_rows(labels.unsqueeze(0), positions), facts


class _Listed:
    """What a server lists at N positions, for the row's own tokens there."""

    def __init__(self, candidates: TopLogprobs, targets: Tensor, vocab_size: int, where: str) -> None:
        count = len(targets)
        owners, ids, logprobs = candidates.rank(count, vocab_size, where)
        counts = np.bincount(owners, minlength=count)
        masses = np.bincount(owners, np.exp(logprobs), count)
        for place in np.flatnonzero((counts == 0) | (masses > 1 + _EXCESS)):
            raise TeacherError(
                f"{where} {counts[place]} tokens of total probability {masses[place]:.4f} at target {place}; expected "
                "one at least, and at most 1. Ask a server that gives the softmax of all logits at temperature 1."
            )
        keys, ends = owners * vocab_size + ids, np.cumsum(counts)
        self._targets, self._vocab_size, order = targets, vocab_size, np.argsort(keys)
        self._keys, self._logprobs = torch.from_numpy(keys[order]), torch.from_numpy(logprobs[order])
        self._owners = self._keys // vocab_size
        first, is_whole = ends - counts, counts == vocab_size
        self._top, self._top_ids = torch.from_numpy(logprobs[first]).exp(), torch.from_numpy(ids[first])
        rest = np.where(is_whole, 0, np.maximum(1 - masses, 0))
        slack = np.where(is_whole, 0, np.maximum(masses - 1, _SLACK))
        self._rest, self._slack = torch.from_numpy(rest), torch.from_numpy(slack)
        self._floor = torch.from_numpy(np.where(is_whole, np.finfo(np.float64).tiny, FLOOR))
        # The own token is listed whatever its rank is, and a probability of 0 may have been a small one.
        last = first + np.bincount(owners, logprobs > ZERO_PROBABILITY, count).astype(np.int64) - 1
        last = np.maximum(last - (ids[last] == targets.numpy()), first)
        least = np.maximum(np.exp(logprobs[last]), np.finfo(np.float64).tiny)
        # The most that a token may have which is not listed, and what the upper bound takes it for.
        self._cap = torch.from_numpy(np.where(is_whole, least, np.minimum(least, rest + slack)))
        self._low = self._cap.clamp_max(FLOOR)

    def find(self, positions: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(E,) log-probabilities of tokens, whether they are listed, and where; those of others are low."""
        keys = positions * self._vocab_size + ids
        places = torch.searchsorted(self._keys, keys).clamp_max(len(self._keys) - 1)
        is_listed = (self._keys[places] == keys) & (self._logprobs[places] > ZERO_PROBABILITY)
        return torch.where(is_listed, self._logprobs[places], self._low[positions].log()), is_listed, places

    def compare(self, teacher: TopKLogprobs) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Every figure at N target positions; the lower bound of the KL (N,); which entries (E,) are not listed."""
        owners, count = teacher.positions, len(teacher)
        log_p, p_tail = (part.double() for part in teacher.at_temperature(1.0))
        log_q, is_listed, places = self.find(owners, teacher.token_ids)
        missing = ~is_listed

        def total(values: Tensor, of: Tensor) -> Tensor:
            return values.new_zeros(count).index_add_(0, owners[of], values[of])

        p, cap, absent = log_p.exp(), self._cap[owners], total(torch.ones_like(log_p), missing)
        # Of all tokens that are not stored: those that are listed, and the rest.
        others = self._logprobs.exp().index_fill(0, places[is_listed], 0)
        others = torch.zeros_like(self._rest).index_add(0, self._owners, others)
        left = (others + self._rest).clamp_min(self._floor)
        most = left + self._slack
        least = others + (self._rest - absent * self._cap - self._slack * (absent > 0)).clamp_min(0)
        q_tail, q_rest = torch.maximum(least, self._floor), torch.maximum(left - absent * self._low, self._floor)
        kl = compute_divergence(log_p, p_tail, log_q, q_tail.log(), owners, "forward_kl")
        # Two bounds from below: the missing ones and the tail as one class; each missing one as probable as it may be.
        merged = total(p, missing) + p_tail
        together = torch.xlogy(merged, merged / most)
        apart = total(p * (log_p - cap.log()), missing) + torch.xlogy(p_tail, p_tail / most)
        lower = total(p * (log_p - log_q), is_listed) + torch.maximum(together, apart)
        figures = {
            "ce": -self.find(torch.arange(count), self._targets)[0],
            "confidence": self._top,
            "correct": self._top_ids == self._targets,
            "kl": kl,
            "reverse_kl": compute_divergence(log_p, p_tail, log_q, q_rest.log(), owners, "reverse_kl"),
            "entropy": -torch.xlogy(p_tail, p_tail).index_add(0, owners, p * log_p),
            "agree": self._top_ids == teacher.top_ids,
        }
        return figures, torch.minimum(lower, kl), missing
