"""TransferSet: the rows of a transfer set as a torch dataset, mapped from disk and decoded on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from quantkd.errors import ConfigError, TransferSetError
from quantkd.transfer_set.batch import RowBatch
from quantkd.transfer_set.documents import canonical_json
from quantkd.transfer_set.info import TransferSetInfo, describe_stores
from quantkd.transfer_set.plan import Plan
from quantkd.transfer_set.row import TransferRow
from quantkd.transfer_set.source import FolderSource, ShardSource, find_source
from quantkd.transfer_set.store import ShardStore, Verify


class TransferSet(Dataset[dict[str, Any]]):
    """Rows with the teacher's distributions. Indexing decodes one row, `__getitems__` a batch, slices are lazy views.

    A set can be pickled, forked and spawned: each process maps the files for itself. Nothing in it is executed, and no
    file outside its folder is opened. Do not cut a set's files while it is open.

    Args:
        path: the set's folder; `TransferSet.open` also takes the name of one on the Hub.
        verify: "auto" hashes downloaded sets in full and otherwise compares sizes and headers now and each row when it
            is first read; "full" always hashes; "off" trusts all but sizes and structure.
        allow_incomplete: accept an unfinished set and read its committed prefix.

    Raises:
        TransferSetError: not a set, unfinished, or damaged.

    Example:
        transfer_set = TransferSet("runs/gsm8k")
        row = transfer_set[0]                    # {"input_ids", "labels", "teacher", "finished"}
        train, held_out = transfer_set.split(0.1, seed=0)
    """

    def __init__(
        self, path: str | Path | ShardSource, *, verify: Verify = "auto", allow_incomplete: bool = False
    ) -> None:
        source = FolderSource(Path(path), allow_incomplete) if isinstance(path, str | Path) else path
        store = ShardStore(source, verify)
        self._sources: tuple[tuple[ShardStore, float | None], ...] = ((store, None),)
        self._starts = np.array([0, store.num_rows], dtype=np.int64)
        self._rows: NDArray[np.int64] | range = range(store.num_rows)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        digest: str | None = None,
        token: str | None = None,
        verify: Verify = "auto",
        allow_incomplete: bool = False,
    ) -> TransferSet:
        """The set in a folder, or in a dataset repository on the Hub, whose shards are fetched when first touched.

        Args:
            path: the set's folder; or `user/name` on the Hub, if there is no such folder here.
            revision: of the repository: a branch, tag or commit. It is pinned to its commit now.
            digest: the root digest that the set must have.
            token: for a private repository; else that of `hf auth login` or HF_TOKEN.
            verify: "auto", "full" or "off". What comes from the Hub is hashed under each of them.
            allow_incomplete: accept an unfinished set in a folder.

        Returns:
            The set.

        Raises:
            TransferSetError: not a set, unfinished, damaged, or of another digest.
            ConfigError: a revision of a folder.
            HubError: the Hub could not be reached, and the set is not in the cache.
        """
        source = find_source(path, revision=revision, token=token, allow_incomplete=allow_incomplete)
        opened = cls(source, verify=verify)
        if digest not in (None, opened.digest):
            raise TransferSetError(
                f"The transfer set at {opened.sources[0]} has the digest {opened.digest}; expected {digest}. It is "
                "another set, or was changed: name the folder or revision that holds the one you want."
            )
        return opened

    @classmethod
    def concatenate(cls, sets: Sequence[TransferSet], weights: Sequence[float] | None = None) -> TransferSet:
        """Several sets or views one after the other, without copying.

        Args:
            sets: of the same tokenizer, vocabulary size and temperatures.
            weights: what the loss of each set's rows is multiplied by; rows carry none if None.

        Returns:
            The joined view.

        Raises:
            ConfigError: no sets, sets that do not fit together, or weights that are not finite and above 0.

        Example:
            mixed = TransferSet.concatenate([TransferSet("runs/gsm8k"), TransferSet("runs/chat")], weights=[1.0, 0.5])
        """
        if not sets:
            raise ConfigError("concatenate needs at least one transfer set.")
        if len(sets) == 1 and weights is None:
            return sets[0]
        if weights is not None and (len(weights) != len(sets) or not all(0 < w < float("inf") for w in weights)):
            raise ConfigError(f"weights are {list(weights)} for {len(sets)} sets; give each a finite number above 0.")
        plans = [store.index.plan for each in sets for store, _ in each._sources]
        for name in ("tokenizer_fingerprint", "vocab_size", "temperatures"):
            found = list(dict.fromkeys(getattr(plan, name) for plan in plans))
            if len(found) > 1:
                raise ConfigError(
                    f"The sets differ in {name}: {found[0]} and {found[1]}. Capture them alike to join them."
                )
        sources: list[tuple[ShardStore, float | None]] = []
        rows: list[NDArray[np.int64]] = []
        shift = 0
        for position, each in enumerate(sets):
            rows.append(np.asarray(each._rows, dtype=np.int64) + shift)
            for store, weight in each._sources:
                sources.append((store, weight if weights is None else (weight or 1.0) * weights[position]))
                shift += store.num_rows
        return cls._over(sources, np.concatenate(rows))

    @classmethod
    def _over(cls, sources: Sequence[tuple[ShardStore, float | None]], rows: NDArray[np.int64] | range) -> TransferSet:
        """Some rows of stores that are open already, which no path names."""
        view = cls.__new__(cls)
        view._sources = tuple(sources)
        view._starts = np.append(0, np.cumsum([store.num_rows for store, _ in sources], dtype=np.int64))
        view._rows = rows
        return view

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> TransferSet: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | TransferSet:
        """One row as a dict of tensors and its `TopKLogprobs`, or a view of a slice."""
        if isinstance(index, slice):
            return self._over(self._sources, self._rows[index])
        batch = self.__getitems__([index])
        row = {
            "input_ids": batch.input_ids,
            "labels": batch.labels,
            "teacher": batch.teacher,
            "finished": bool(batch.finished[0]),
        }
        if batch.weights is not None:
            row["weight"] = float(batch.weights[0])
        return row

    def __getitems__(self, indices: Sequence[int]) -> RowBatch:
        """Several rows at once, decoded together; DataLoader calls this and hands the result to its `collate_fn`."""
        weights = [self._sources[source][1] for source, _ in self._locate(indices)]
        codec = self._sources[0][0].codec
        return RowBatch.from_rows(self.rows(indices), codec.temperatures, codec.vocab_size, weights)

    def row(self, index: int) -> TransferRow:
        """One row as numpy arrays; see `rows`."""
        return self.rows([index])[0]

    def rows(self, indices: Sequence[int]) -> list[TransferRow]:
        """Several rows as numpy arrays.

        Args:
            indices: their places; negative from the end.

        Returns:
            The rows, in the order of `indices`.

        Raises:
            IndexError: no such row.
            TransferSetError: a row is damaged.
        """
        return [self._sources[source][0].fetch(row) for source, row in self._locate(indices)]

    def select(self, indices: Sequence[int] | NDArray[Any]) -> TransferSet:
        """A view of some rows, in the order asked for.

        Args:
            indices: integers, negative from the end; or one bool a row.

        Returns:
            The view.

        Raises:
            ConfigError: a mask of another length.
            IndexError: no such row.
        """
        chosen = np.asarray(indices)
        if chosen.dtype == bool:
            if len(chosen) != len(self):
                raise ConfigError(f"The mask has {len(chosen)} values for {len(self)} rows; give one a row.")
            chosen = np.flatnonzero(chosen)
        return self._over(self._sources, np.array(self._resolve(chosen.tolist()), dtype=np.int64))

    def split(self, fraction: float, seed: int) -> tuple[TransferSet, TransferSet]:
        """Two disjoint views in the old order; the second has `round(fraction * len(self))` rows.

        Args:
            fraction: the share to hold out, between 0 and 1.
            seed: of the choice.

        Returns:
            `rest` and `held_out`.

        Raises:
            ConfigError: one of the two would be empty.
        """
        size = round(fraction * len(self)) if 0 < fraction < 1 else 0
        if not 0 < size < len(self):
            raise ConfigError(
                f"A split of {fraction} of {len(self)} rows leaves one part empty. Choose a fraction between 0 and 1 "
                "that leaves at least one row on either side."
            )
        if seed < 0:
            raise ConfigError(f"seed is {seed}; expected a number of at least 0.")
        # The raw output of a bit generator never changes between numpy releases; that of `permutation` may.
        keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(self))
        order = np.argsort(np.asarray(keys), kind="stable")
        return self.select(np.sort(order[size:])), self.select(np.sort(order[:size]))

    @property
    def plan(self) -> Plan:
        """The plan of the set, or of the first one of joined sets."""
        return self._sources[0][0].index.plan

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) tokens of every row, read from the row tables without decoding."""
        return self._table[:, 0].copy()

    @property
    def digest(self) -> str:
        """The root digest; of a view or of joined sets, a digest over theirs, the weights and the chosen rows."""
        if (store := self.whole_store) is not None:
            return store.index.digest()
        rows = np.asarray(self._rows, dtype="<i8").tobytes()
        sources = [[store.index.digest(), weight] for store, weight in self._sources]
        view = {"sources": sources, "rows": hashlib.sha256(rows).hexdigest()}
        return hashlib.sha256(canonical_json(view)).hexdigest()

    @cached_property
    def info(self) -> TransferSetInfo:
        """What the set is and what it costs."""
        table = self._table if self.whole_store is None else None
        return describe_stores([store for store, _ in self._sources], table, self.digest)

    @property
    def whole_store(self) -> ShardStore | None:
        """The store of one whole set; None for a view and for joined sets."""
        is_whole = isinstance(self._rows, range) and self._rows == range(self._starts[-1])  # joined sets hold arrays
        return self._sources[0][0] if is_whole else None

    @property
    def sources(self) -> tuple[ShardSource, ...]:
        """Where the set is, or each of joined sets; as text a folder, or a repository on the Hub and its commit."""
        return tuple(store.source for store, _ in self._sources)

    @property
    def storage_rules(self) -> list[dict[str, Any]]:
        """The storage rule of each source that has rows at hand."""
        used = np.unique(np.searchsorted(self._starts, np.asarray(self._rows, dtype=np.int64), side="right") - 1)
        return [self._sources[number][0].index.plan.storage for number in used.tolist()]

    @property
    def _table(self) -> NDArray[np.int64]:
        return np.concatenate([store.table() for store, _ in self._sources])[np.asarray(self._rows, dtype=np.int64)]

    def _resolve(self, indices: Sequence[int]) -> list[int]:
        length = len(self._rows)
        for index in indices:
            if not -length <= index < length:
                raise IndexError(f"Row {index} was asked for; the transfer set has {length} rows.")
        return [int(self._rows[index]) for index in indices]

    def _locate(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Of each row the number of its source, and its place there."""
        rows = np.asarray(self._resolve(indices), dtype=np.int64)
        sources = np.searchsorted(self._starts, rows, side="right") - 1
        return list(zip(sources.tolist(), (rows - self._starts[sources]).tolist(), strict=True))
