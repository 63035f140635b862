"""One set's shards: mapped on demand, as decoded rows, or checked in full."""

from __future__ import annotations

import os
import re
import resource
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantkd.errors import ConfigError, TransferSetError
from quantkd.transfer_set.codec import Codec
from quantkd.transfer_set.index import record_to_bytes
from quantkd.transfer_set.row import TransferRow
from quantkd.transfer_set.shard import ShardMap, shard_bytes, shard_name
from quantkd.transfer_set.source import FolderSource, ShardSource, find_source

Verify = Literal["auto", "full", "off"]
_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
# Of one set; each keeps a file open, and several sets may be joined.
MAX_OPEN_MAPS = 256 if _FILES == resource.RLIM_INFINITY else max(min(256, _FILES // 8), 1)
_SHARD_FILE = re.compile(r"shard-\d+\.safetensors")


class ShardStore:
    """The shards of one set. `verify` is that of `TransferSet`; a remote source's are hashed when first touched."""

    def __init__(self, source: ShardSource, verify: Verify) -> None:
        if verify not in ("auto", "full", "off"):
            raise ConfigError(f"verify is {verify!r}; expected 'auto', 'full' or 'off'.")
        self.source = source
        self.index = source.read_index()
        self.codec = Codec(self.index.plan)
        self.row_starts = np.append(0, np.cumsum([shard.size.rows for shard in self.index.shards], dtype=np.int64))
        self._check_rows = verify != "off"
        self._maps: OrderedDict[int, ShardMap] = OrderedDict()
        self._hashed: set[int] = set()
        full = verify == "full" or (verify == "auto" and source.is_downloaded)
        for shard in range(0 if source.is_remote and not full else len(self.index.shards)):
            mapped = self.map(shard)
            if full:
                self.check_digest(shard, mapped)

    def __getstate__(self) -> dict[str, Any]:
        # Maps do not travel to another process; it opens its own.
        return {**self.__dict__, "_maps": OrderedDict()}

    @property
    def num_rows(self) -> int:
        """How many rows the shards hold."""
        return int(self.row_starts[-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of the set's files, index included; of an unfinished set, the records."""
        if self.index.complete:
            documents = len(self.index.to_bytes())
        else:
            documents = sum(len(record_to_bytes(record)) for record in self.index.shards)
        return documents + sum(shard_bytes(record.size) for record in self.index.shards)

    def table(self) -> NDArray[np.int64]:
        """(rows, 4): tokens, spans, targets and entries of every row, from the row tables alone."""
        parts = [self.map(shard).table for shard in range(len(self.index.shards))]
        return np.concatenate([np.zeros((0, 4), dtype=np.int64), *parts])

    def fetch(self, row: int) -> TransferRow:
        """A row by its number in the set."""
        shard = int(np.searchsorted(self.row_starts, row, side="right")) - 1
        return self.map(shard).read_row(row - int(self.row_starts[shard]), check=self._check_rows)

    def map(self, shard: int) -> ShardMap:
        """The shard, mapped and with its header and tables checked."""
        last = next(reversed(self._maps), shard)
        if last != shard:
            self._maps[last].block = None  # one block is open in a set, not one in each of its shards
        mapped = self._maps.get(shard)
        if mapped is None:
            mapped = ShardMap(self.locate(shard), self.codec, self.index.shards[shard].size)
            if self.source.is_remote:
                self.check_digest(shard, mapped)
            self._maps[shard] = mapped
            if len(self._maps) > MAX_OPEN_MAPS:
                self._maps.popitem(last=False)
        else:
            self._maps.move_to_end(shard)
        return mapped

    def locate(self, shard: int) -> Path:
        """The file of a shard, fetched if need be and not yet checked."""
        return self.source.locate(shard, shard_bytes(self.index.shards[shard].size))

    def check_digest(self, shard: int, mapped: ShardMap) -> None:
        """Compare a shard's sha256 with its record, once."""
        if shard not in self._hashed and (found := mapped.sha256()) != (record := self.index.shards[shard]).sha256:
            raise TransferSetError(
                f"{mapped.path} has the sha256 {found}; the index says {record.sha256}. Its rows are damaged, and "
                "`quantkd verify` names the first, or it is another shard. Get it again."
            )
        self._hashed.add(shard)


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
