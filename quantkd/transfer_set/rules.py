"""Storage rules: which entries of a teacher's distribution are kept, and how they are picked from the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkd.errors import ConfigError, TransferSetError
from quantkd.hardware import wide_dtype
from quantkd.transfer_set.documents import is_whole
from quantkd.transfer_set.topk import TopKLogprobs, offsets_of

_MOST = 2**24  # entries, as many as a vocabulary may have


@dataclass(frozen=True)
class TopK:
    """Keep the `k` most probable tokens of every position.

    Raises:
        ConfigError: `k` is below 1.
    """

    k: int

    def __post_init__(self) -> None:
        _require(is_whole(self.k, 1, _MOST), f"TopK needs a whole k from 1 to {_MOST}, found {self.k!r}.")


@dataclass(frozen=True)
class Nucleus:
    """Keep the fewest most probable tokens that together hold at least the mass `p`, and never more than `max_k`.

    A sure position costs one entry, an unsure one up to `max_k`.

    Raises:
        ConfigError: `p` is outside (0, 1], or `max_k` is below 1.
    """

    p: float
    max_k: int = 64

    def __post_init__(self) -> None:
        _require(not isinstance(self.p, bool) and 0 < self.p <= 1, f"Nucleus needs 0 < p <= 1, found p={self.p!r}.")
        _require(
            is_whole(self.max_k, 1, _MOST), f"Nucleus needs a whole max_k from 1 to {_MOST}, found {self.max_k!r}."
        )


@dataclass(frozen=True)
class Sampled:
    """Keep the distinct tokens of `n` draws with replacement, each weighing its share of the draws.

    The stored distribution is an unbiased estimate of the teacher's at temperature 1, and only there.

    Reference:
        Anshumann et al. 2025, Sparse Logit Sampling (arXiv:2503.16870).

    Raises:
        ConfigError: `n` is below 1.
    """

    n: int

    def __post_init__(self) -> None:
        _require(is_whole(self.n, 1, _MOST), f"Sampled needs a whole n from 1 to {_MOST}, found {self.n!r}.")


StorageRule = TopK | Nucleus | Sampled
_KINDS: dict[str, Callable[..., StorageRule]] = {"topk": TopK, "nucleus": Nucleus, "sampled": Sampled}


def storage_rule_to_dict(rule: StorageRule) -> dict[str, Any]:
    """The rule as JSON, such as `{"kind": "nucleus", "p": 0.95, "max_k": 64}`."""
    return {"kind": type(rule).__name__.lower(), **asdict(rule)}


def storage_rule_from_dict(value: Any) -> StorageRule:
    """The inverse of `storage_rule_to_dict`, of what a stranger may have written."""
    try:
        fields = dict(value)
        return _KINDS[fields.pop("kind")](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise TransferSetError(
            f"The storage rule is {value!a:.200}: {error!a:.200}. Expected one of the kinds {', '.join(_KINDS)}. "
            "Get the set again."
        ) from error


def parse_storage_rule(text: str) -> StorageRule:
    """A rule from the command line: `topk:50`, `nucleus:0.95`, `nucleus:0.95:64` or `sampled:50`."""
    kind, _, rest = text.partition(":")
    try:
        numbers = [float(part) if "." in part or "e" in part else int(part) for part in rest.split(":")]
        return _KINDS[kind](*numbers)
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"Cannot read the storage rule {text!r}; write topk:50, nucleus:0.95, nucleus:0.95:64 or sampled:50."
        ) from error


def max_entries(rule: StorageRule, vocab_size: int) -> int:
    """The most entries that a position can hold under `rule`."""
    limit = rule.k if isinstance(rule, TopK) else rule.max_k if isinstance(rule, Nucleus) else rule.n
    return min(limit, vocab_size)


def narrow(stored: StorageRule, wanted: StorageRule) -> StorageRule:
    """The rule that entries follow once those stored under `stored` were cut to `wanted`."""
    match stored, wanted:
        case Sampled(), Sampled():
            if stored == wanted:
                return stored
        case Nucleus(), Nucleus():
            return Nucleus(min(stored.p, wanted.p), min(stored.max_k, wanted.max_k))
        case TopK(), TopK():
            return TopK(min(stored.k, wanted.k))
        case TopK(), Nucleus():
            return Nucleus(wanted.p, min(stored.k, wanted.max_k))
        case Nucleus(), TopK():
            return Nucleus(stored.p, min(stored.max_k, wanted.k))
    raise ConfigError(
        f"Rows stored under {stored} cannot be trimmed to {wanted}: draws would lose their balance. "
        f"Convert with storage={stored}, or capture again."
    )


def in_nucleus(mass: Any, p: float) -> Any:
    """Which of (..., W) descending probabilities, a tensor or an array, a nucleus of mass `p` keeps."""
    return mass.cumsum(-1) - mass < p  # the mass before an entry, so the first always stays


def keep_entries(logprobs: NDArray[Any], counts: NDArray[np.int64], rule: StorageRule) -> NDArray[np.bool_]:
    """(E,) which entries `rule` keeps, those of each of (N,) positions in descending order. `Sampled` keeps all."""
    owners = np.repeat(np.arange(len(counts)), counts)
    rank = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    if isinstance(rule, TopK):
        return rank < rule.k
    if isinstance(rule, Sampled):
        return np.ones(len(owners), dtype=bool)
    mass = np.zeros((len(counts), int(counts.max(initial=0))))
    mass[owners, rank] = np.exp(logprobs.astype(np.float64))
    kept: NDArray[np.bool_] = in_nucleus(mass, rule.p)[owners, rank] & (rank < rule.max_k)
    return kept


def check_temperatures(rule: StorageRule, temperatures: Sequence[float]) -> tuple[float, ...]:
    """The temperatures as a tuple, sorted and checked against the rule."""
    values = tuple(sorted({float(t) for t in temperatures}))
    _require(bool(values) and values[0] > 0, f"Temperatures must be above 0, found {list(temperatures)}.")
    _require(
        not isinstance(rule, Sampled) or values == (1.0,),
        f"Sampled entries estimate the teacher at temperature 1.0 only, found {list(values)}. "
        "Capture with temperatures=(1.0,), or store Nucleus or TopK entries.",
    )
    return values


@dataclass(frozen=True)
class PickedEntries:
    """Candidates of equal width at every position, on the logits' device, before they are cut to a ragged value."""

    token_ids: Tensor  # (N, W) int64, most probable first
    logprobs: Tensor  # (N, W) float32, nats at temperature 1
    keep: Tensor  # (N, W) bool, which candidates the rule keeps; at least the first
    log_normalizers: Tensor  # (N, len(temperatures)) float32
    is_finite: Tensor  # (N,) bool, whether the logits had a finite normalizer at all; entries of others mean nothing


def pick_entries(
    logits: Tensor, rule: StorageRule, temperatures: Sequence[float], uniforms: Tensor | None = None
) -> PickedEntries:
    """Pick the entries that `rule` keeps from (N, V) logits, with the whole vocabulary's log-normalizers."""
    # Nothing here waits for the device, so it can run after every generated token.
    logits = logits.float()
    vocab_size = logits.shape[-1]
    log_z = logits.logsumexp(-1)  # (N,)
    columns = [torch.zeros_like(log_z) if t == 1.0 else (logits / t).logsumexp(-1) - log_z / t for t in temperatures]
    if isinstance(rule, Sampled):
        if uniforms is None:
            raise ConfigError(f"{rule} needs uniforms of shape (N, {rule.n}).")
        token_ids, logprobs, keep = _draw(logits - log_z.unsqueeze(-1), uniforms)
    else:
        width = rule.k if isinstance(rule, TopK) else max_entries(rule, vocab_size)
        _require(width <= vocab_size, f"{rule} exceeds the teacher's vocabulary of {vocab_size}; choose a smaller k.")
        top, token_ids = logits.topk(width, dim=-1)  # (N, width), descending
        logprobs = (top - log_z.unsqueeze(-1)).clamp_max(0)  # rounding can leave a sure token above 0
        keep = torch.isfinite(logprobs)  # a vocabulary that is masked with -inf may have fewer than `width` tokens
        if isinstance(rule, Nucleus):
            keep &= in_nucleus(logprobs.exp(), rule.p)
    return PickedEntries(token_ids, logprobs, keep, torch.stack(columns, dim=-1), log_z.isfinite())


def select_entries(
    logits: Tensor, rule: StorageRule, temperatures: Sequence[float], uniforms: Tensor | None = None
) -> TopKLogprobs:
    """`pick_entries`, cut to a ragged value: N positions, each with its entries most probable first."""
    picked = pick_entries(logits, rule, temperatures, uniforms)
    return TopKLogprobs(
        offsets=offsets_of(picked.keep.sum(-1)),
        token_ids=picked.token_ids[picked.keep],
        logprobs=picked.logprobs[picked.keep],
        log_normalizers=picked.log_normalizers,
        temperatures=tuple(temperatures),
        vocab_size=logits.shape[-1],
    )


def _draw(logprobs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw by inverse transform; returns ids, log of each id's share of the draws, and which of them are distinct."""
    wide = wide_dtype(logprobs.device)
    cumulative = logprobs.exp().to(wide).cumsum(-1)
    draws = torch.searchsorted(cumulative, uniforms.to(wide) * cumulative[:, -1:], right=True)
    draws = draws.clamp_max(logprobs.shape[-1] - 1).sort(-1).values  # (N, n), equal ids side by side
    shares = (draws.unsqueeze(-1) == draws.unsqueeze(-2)).sum(-1) / draws.shape[-1]
    first = torch.ones_like(draws, dtype=torch.bool)
    first[:, 1:] = draws[:, 1:] != draws[:, :-1]
    order = shares.masked_fill(~first, -1).argsort(dim=-1, descending=True, stable=True)
    return draws.gather(-1, order), shares.gather(-1, order).log(), first.gather(-1, order)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


DEFAULT_STORAGE = Nucleus(0.95, max_k=64)
