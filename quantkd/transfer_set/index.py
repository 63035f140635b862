"""The index of a finished set, the records of an unfinished one, and the root digest that names a set."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkd.errors import TransferSetError
from quantkd.files import read_regular
from quantkd.transfer_set.codec import ShardSize
from quantkd.transfer_set.documents import (
    MAX_DOCUMENT_BYTES,
    canonical_json,
    is_sha256,
    parse_canonical_json,
    require_fields,
)
from quantkd.transfer_set.plan import FORMAT_VERSION, Plan, check_counters

INDEX_NAME = "index.json"
PLAN_NAME = "plan.json"
FORMAT_NAME = "quantkd transfer set"
_MARK = {"format": FORMAT_NAME, "version": FORMAT_VERSION}


def record_name(index: int) -> str:
    """The file name of the record that marks shard `index` as committed."""
    return f"shard-{index:05d}.json"


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a committed shard: its size, its file's sha256, and what its capture counted."""

    size: ShardSize
    sha256: str
    counters: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record as it stands in an index, without counters."""
        return {**vars(self.size), "sha256": self.sha256}

    @classmethod
    def from_json(cls, value: Any, name: str) -> ShardRecord:
        """The inverse of `to_json`, with every number checked."""
        sizes = dict(require_fields(value, name, (*ShardSize.__dataclass_fields__, "sha256")))
        sha256 = sizes.pop("sha256")
        size = ShardSize(**sizes)
        if not size.is_possible() or not is_sha256(sha256):
            raise TransferSetError(f"{name} holds impossible sizes or digests: {value!a:.200}. Get the set again.")
        return cls(size, sha256)


@dataclass(frozen=True)
class Index:
    """A whole set: its plan, one record a shard, and the summed counters."""

    plan: Plan
    shards: tuple[ShardRecord, ...]
    counters: dict[str, int]
    complete: bool = True

    @classmethod
    def from_records(cls, plan: Plan, records: Sequence[ShardRecord]) -> Index:
        """The index over the first `len(records)` shards of a plan."""
        total: Counter[str] = Counter()
        for record in records:
            total.update(record.counters)
        return cls(plan, tuple(records), check_counters(total), complete=len(records) == plan.num_shards)

    def _content(self) -> dict[str, Any]:
        shards = [record.to_json() for record in self.shards]
        return {**_MARK, "plan": self.plan.to_json(), "shards": shards, "counters": self.counters}

    def digest(self) -> str:
        """The root digest: sha256 of the canonical JSON of everything else in the index, in hexadecimal."""
        return hashlib.sha256(canonical_json(self._content())).hexdigest()

    def to_bytes(self) -> bytes:
        """The content of index.json."""
        return canonical_json({**self._content(), "digest": self.digest()})


def read_index(folder: Path) -> Index:
    """The index of a finished set."""
    return parse_index(_read(folder, INDEX_NAME))


def parse_index(data: bytes) -> Index:
    """The index that the content of an index.json describes."""
    value = parse_canonical_json(data, INDEX_NAME)
    _check_fields(value, INDEX_NAME, "plan", "shards", "counters", "digest")
    plan = Plan.from_json(value["plan"])
    shards = value["shards"]
    if not isinstance(shards, list) or len(shards) != plan.num_shards:
        raise TransferSetError(
            f"{INDEX_NAME} lists {len(shards) if isinstance(shards, list) else ascii(shards)[:200]} shards; "
            f"its plan has {plan.num_shards}. Get the set again."
        )
    records = tuple(ShardRecord.from_json(shard, f"Shard {i} of {INDEX_NAME}") for i, shard in enumerate(shards))
    for shard, record in enumerate(records):
        start, stop = plan.prompt_range(shard)
        if record.size.rows > stop - start:
            raise TransferSetError(
                f"Shard {shard} of {INDEX_NAME} has {record.size.rows} rows for {stop - start} prompts. Get it again."
            )
    index = Index(plan, records, check_counters(value["counters"]))
    if index.digest() != value["digest"]:
        raise TransferSetError(
            f"{INDEX_NAME} has the digest {index.digest()} but states {value['digest']!a:.200}. "
            "The index was changed or damaged; get the set again."
        )
    return index


def plan_to_bytes(plan: Plan) -> bytes:
    """The content of plan.json."""
    return canonical_json({**_MARK, "plan": plan.to_json()})


def read_plan(folder: Path) -> Plan:
    """The plan of an unfinished set."""
    value = parse_canonical_json(_read(folder, PLAN_NAME), PLAN_NAME)
    _check_fields(value, PLAN_NAME, "plan")
    return Plan.from_json(value["plan"])


def read_begun_plan(folder: Path) -> Plan | None:
    """The plan of the set that is in a folder, finished or not; None if there is none."""
    if (folder / INDEX_NAME).exists():
        return read_index(folder).plan
    return read_plan(folder) if (folder / PLAN_NAME).exists() else None


def record_to_bytes(record: ShardRecord) -> bytes:
    """The content of a record file."""
    return canonical_json({"shard": record.to_json(), "counters": record.counters})


def read_record(folder: Path, index: int) -> ShardRecord:
    """The record of shard `index` of an unfinished set."""
    name = record_name(index)
    fields = require_fields(parse_canonical_json(_read(folder, name), name), name, ("shard", "counters"))
    return replace(ShardRecord.from_json(fields["shard"], name), counters=check_counters(fields["counters"]))


def _read(folder: Path, name: str) -> bytes:
    return read_regular(folder / name, MAX_DOCUMENT_BYTES, error=TransferSetError)


def _check_fields(value: dict[str, Any], name: str, *fields: str) -> None:
    if value.get("format") != FORMAT_NAME or value.get("version") != FORMAT_VERSION:
        raise TransferSetError(
            f"{name} is of format {value.get('format')!a:.200}, version {value.get('version')!a:.200}; this quantkd "
            f"reads {FORMAT_NAME!r}, version {FORMAT_VERSION}. Upgrade quantkd, or convert the set with the one that "
            "wrote it."
        )
    require_fields(value, name, (*_MARK, *fields))
