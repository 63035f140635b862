"""Checking a transfer set in full, and naming the first thing that is wrong with it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from quantkd.errors import TransferSetError
from quantkd.transfer_set.encoded import CHECKSUM
from quantkd.transfer_set.extension import EXTENSION_FOLDER
from quantkd.transfer_set.index import ShardRecord
from quantkd.transfer_set.shard import ShardMap, shard_name
from quantkd.transfer_set.source import find_source
from quantkd.transfer_set.store import ShardStore

_ROWS_AT_ONCE = 64
_SHARD_FILE = re.compile(r"shard-\d+\.safetensors")


@dataclass(frozen=True)
class Verification:
    """What `verify` found good.

    Args:
        digest: the root digest.
        shards: shards checked.
        rows: rows checked.
        num_bytes: bytes of the set's files.
    """

    digest: str
    shards: int
    rows: int
    num_bytes: int


def verify(path: str | Path, *, allow_incomplete: bool = False) -> Verification:
    """Check everything: the index and its digest, every shard's size, header and sha256, and every row's content."""
    source = find_source(path, None, None)
    store = ShardStore(source, "auto", allow_incomplete, hash_downloads=False)
    if isinstance(source, Path):
        _refuse_strays(source, store)
    for shard, record in enumerate(store.index.shards):
        _verify_digest(store.map(shard), record)
        start = int(store.row_starts[shard])
        stop = start + record.size.rows
        for first in range(start, stop, _ROWS_AT_ONCE):
            store.fetch(range(first, min(first + _ROWS_AT_ONCE, stop)))
    return Verification(store.index.digest(), len(store.index.shards), store.num_rows, store.num_bytes)


def _refuse_strays(folder: Path, store: ShardStore) -> None:
    expected = {shard_name(shard) for shard in range(store.index.plan.num_shards)}
    # While a set is extended, further shards move in before the index names them.
    growing = (folder / EXTENSION_FOLDER).is_dir()
    for entry in [] if growing else sorted(os.listdir(folder)):
        if _SHARD_FILE.fullmatch(entry) and entry not in expected:
            raise TransferSetError(f"{folder / entry} is no shard of the index. Remove it, or get the set anew.")


def _verify_digest(mapped: ShardMap, record: ShardRecord) -> None:
    """Refuse a shard whose sha256 is wrong, and name the row that the damage lies in."""
    digest = mapped.sha256()
    if digest == record.sha256:
        return
    where = "not inside a row: it holds the rows of another shard"
    for row in range(mapped.size.rows):
        codes = mapped.fetch(row, row + 1)
        if codes.checksum() != int(codes.rows[0, CHECKSUM]):
            first, last = mapped.byte_range(row)
            where = f"in row {row}, whose parts lie between the bytes {first} and {last}"
            break
    raise TransferSetError(
        f"{mapped.path} has the sha256 {digest}; the index says {record.sha256}. "
        f"The first difference is {where}. Get the shard anew."
    )
