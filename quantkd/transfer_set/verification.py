"""Checking a transfer set in full, and naming the first thing that is wrong with it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from quantkd.errors import TransferSetError
from quantkd.transfer_set.shard import shard_name
from quantkd.transfer_set.source import FolderSource, find_source
from quantkd.transfer_set.store import ShardStore

_SHARD_FILE = re.compile(r"shard-\d+\.safetensors")


@dataclass(frozen=True)
class Verification:
    """What `verify` found good: the root digest, and how many shards, rows and bytes of files it covers."""

    digest: str
    shards: int
    rows: int
    num_bytes: int


def verify(path: str | Path, *, allow_incomplete: bool = False) -> Verification:
    """Check everything: the index and its digest, every shard's size, header and sha256, and every row's content."""
    source = find_source(path, allow_incomplete=allow_incomplete)
    store = ShardStore(source, "off")  # what that leaves out is done below, and names the row
    if isinstance(source, FolderSource):
        expected = {shard_name(shard) for shard in range(store.index.plan.num_shards)}
        for entry in sorted(os.listdir(source.path)):
            if _SHARD_FILE.fullmatch(entry) and entry not in expected:
                raise TransferSetError(
                    f"{source.path / entry} is not a shard of the index. Remove it, or get the set again."
                )
    for shard in range(len(store.index.shards)):
        mapped = store.map(shard)
        for row in range(len(mapped.table)):
            mapped.read_row(row)  # first, for it names damage by its row
        store.check_digest(shard, mapped)
    return Verification(store.index.digest(), len(store.index.shards), store.num_rows, store.num_bytes)
