"""The plan of a transfer set, which fixes every row's place before the first token."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quantkd.errors import ConfigError, TransferSetError
from quantkd.transfer_set.documents import canonical_json, quote, require_fields
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
        for name in ("teacher_name", "teacher_revision", "teacher_dtype"):
            value = getattr(self, name)
            _require(isinstance(value, str) and len(value) <= 4096 and value.isprintable(), name, value, "a short name")
        for name in ("tokenizer_fingerprint", "prompts_digest"):
            _require(is_sha256(getattr(self, name)), name, getattr(self, name), "64 lower-case hexadecimal digits")
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            _require(is_whole(value, 1, limit), name, value, f"a whole number from 1 to {limit}")
        _require(self.responses in ("generate", "given"), "responses", self.responses, "generate or given")
        for name in ("generation", "extra"):
            _require(isinstance(getattr(self, name), dict), name, getattr(self, name), "a dictionary")
        _require(
            isinstance(self.temperatures, tuple)
            and 1 <= len(self.temperatures) <= MAX_TEMPERATURES
            and all(isinstance(t, float) and math.isfinite(t) and 1e-3 <= t <= 1e3 for t in self.temperatures)
            and list(self.temperatures) == sorted(set(self.temperatures)),
            "temperatures",
            self.temperatures,
            f"1 to {MAX_TEMPERATURES} ascending floats from 0.001 to 1000",
        )
        _require(
            self.num_shards <= MAX_SHARDS,
            "rows_per_shard",
            self.rows_per_shard,
            f"at most {MAX_SHARDS} shards, so at least {-(-self.num_prompts // MAX_SHARDS)} rows a shard",
        )
        parse_storage(self.storage)
        size = len(canonical_json(self.to_json()))
        _require(size <= MAX_PLAN_BYTES, "extra", f"part of a plan of {size} bytes", f"at most {MAX_PLAN_BYTES} in all")

    @property
    def num_shards(self) -> int:
        """How many shards the prompts fill; the last may be partial."""
        return -(-self.num_prompts // self.rows_per_shard)

    @property
    def rule(self) -> StorageRule:
        """The storage rule as an object."""
        return parse_storage(self.storage)

    def prompt_range(self, shard: int) -> tuple[int, int]:
        """The prompts `[start, stop)` of a shard."""
        start = shard * self.rows_per_shard
        return start, min(start + self.rows_per_shard, self.num_prompts)

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return {**asdict(self), "temperatures": list(self.temperatures)}

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """The inverse of `to_json`, with every field checked."""
        fields = require_fields(value, "The plan", cls.__dataclass_fields__)
        temperatures = fields["temperatures"]
        _require(isinstance(temperatures, list), "temperatures", temperatures, "a list")
        return cls(**{**fields, "temperatures": tuple(temperatures)})

    def digest(self) -> str:
        """sha256 of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    def differences(self, other: Plan) -> list[str]:
        """The names of the fields in which two plans differ."""
        return [name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(other, name)]


def parse_storage(value: Any) -> StorageRule:
    """A storage rule from its JSON, with every field checked."""
    try:
        rule = storage_rule_from_dict(value)
    except (ConfigError, TypeError, AttributeError) as error:
        raise TransferSetError(f"The storage rule is {quote(value)}: {quote(error)} Get the set again.") from error
    for name, number in value.items():
        good = name == "kind" or is_whole(number, 1, 2**24) or (name == "p" and isinstance(number, float))
        _require(good, "storage", value, "positive whole numbers up to 2**24 for k, n and max_k")
    return rule


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether `value` is an int (no bool) from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_sha256(value: object) -> bool:
    """Whether `value` is 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


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
        raise TransferSetError(f"`{name}` is {quote(found)}; expected {expected}.")
