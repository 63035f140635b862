"""The plan of a transfer set, which fixes every row's place before the first token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from quantkd.errors import TransferSetError
from quantkd.transfer_set.documents import canonical_json, is_sha256, is_whole, require_fields
from quantkd.transfer_set.rules import StorageRule, storage_rule_from_dict

FORMAT_VERSION = 2
MAX_SHARD_ROWS = 2**16
MAX_SHARDS = 8192  # their records stay below MAX_DOCUMENT_BYTES in one index
MAX_VOCAB_SIZE = 2**24
MAX_TEMPERATURES = 16
MAX_PLAN_BYTES = 2**18
_LIMITS = {"vocab_size": MAX_VOCAB_SIZE, "num_prompts": 2**40, "rows_per_shard": MAX_SHARD_ROWS, "batch_size": 2**24}


@dataclass(frozen=True)
class Plan:
    """Everything that decides a transfer set's bytes, fixed before the first token. Same plan, same bytes."""

    teacher_name: str
    teacher_revision: str
    teacher_dtype: str
    tokenizer_fingerprint: str
    vocab_size: int
    storage: dict[str, Any]
    temperatures: tuple[float, ...]
    responses: str
    generation: dict[str, Any]
    prompts_digest: str
    num_prompts: int
    rows_per_shard: int
    batch_size: int
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check("teacher_name teacher_revision teacher_dtype", _is_name, "a short name")
        self._check("tokenizer_fingerprint prompts_digest", is_sha256, "64 lower-case hexadecimal digits")
        for name, limit in _LIMITS.items():
            self._check(name, partial(is_whole, low=1, high=limit), f"a whole number from 1 to {limit}")
        self._check("responses", ("generate", "given").__contains__, "generate or given")
        self._check("generation extra", lambda value: isinstance(value, dict), "a dictionary")
        self._check("temperatures", _are_temperatures, f"1 to {MAX_TEMPERATURES} ascending floats from 0.001 to 1000")
        fewest = -(-self.num_prompts // MAX_SHARDS)
        expected = f"at most {MAX_SHARDS} shards, so at least {fewest} rows a shard"
        self._check("rows_per_shard", lambda rows: rows >= fewest, expected)
        storage_rule_from_dict(self.storage)
        size = len(canonical_json(self.to_json()))
        _require(size <= MAX_PLAN_BYTES, "extra", f"part of a plan of {size} bytes", f"at most {MAX_PLAN_BYTES} in all")

    def _check(self, names: str, is_good: Callable[[Any], bool], expected: str) -> None:
        for name in names.split():
            value = getattr(self, name)
            _require(is_good(value), name, value, expected)

    @property
    def num_shards(self) -> int:
        """How many shards the prompts fill; the last may be partial."""
        return -(-self.num_prompts // self.rows_per_shard)

    @property
    def rule(self) -> StorageRule:
        """The storage rule as an object."""
        return storage_rule_from_dict(self.storage)

    def prompt_range(self, shard: int) -> tuple[int, int]:
        """The prompts `[start, stop)` of a shard."""
        start = shard * self.rows_per_shard
        return start, min(start + self.rows_per_shard, self.num_prompts)

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return {**vars(self), "temperatures": list(self.temperatures)}

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """The inverse of `to_json`, with every field checked."""
        fields = require_fields(value, "The plan", cls.__dataclass_fields__)
        temperatures = fields["temperatures"]
        _require(isinstance(temperatures, list), "temperatures", temperatures, "a list")
        return cls(**{**fields, "temperatures": tuple(temperatures)})


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096 and value.isprintable()


def _are_temperatures(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and 1 <= len(value) <= MAX_TEMPERATURES
        and all(isinstance(t, float) and math.isfinite(t) and 1e-3 <= t <= 1e3 for t in value)
        and list(value) == sorted(set(value))
    )


def check_counters(counters: Any) -> dict[str, int]:
    """`counters`, checked to map printable names to counts."""
    _require(
        isinstance(counters, Mapping)
        and len(counters) <= 256
        and all(isinstance(name, str) and len(name) <= 256 and name.isprintable() for name in counters)
        and all(is_whole(number, 0, 2**62) for number in counters.values()),
        "counters",
        counters,
        "at most 256 names, each with a whole number of at least 0",
    )
    return dict(counters)


def _require(condition: bool, name: str, found: object, expected: str) -> None:
    if not condition:
        raise TransferSetError(f"`{name}` is {found!a:.200}; expected {expected}.")
