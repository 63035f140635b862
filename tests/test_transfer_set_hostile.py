"""Sets that a stranger made to do harm: each is read, or refused with TransferSetError, in little time and memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_sets import SHARD, hostile_sets, reshard, seal, tensor_changes
from hypothesis import HealthCheck, given, settings, strategies as st
from sandbox import Watch, in_sandbox
from transfer_sets import make_plan, write_set

from quantkd.errors import TransferSetError
from quantkd.transfer_set import Plan, TransferSet, verify

SECONDS = 2.0


def read_all(folder: Path) -> None:
    transfer_set = TransferSet(folder)
    transfer_set.__getitems__(range(len(transfer_set)))
    str(transfer_set.info)
    verify(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", make_plan(num_prompts=3, vocab_size=60), label_rank=1)
    return tmp_path / "set"


MESSAGES = {
    "counts-zero": "Row 0 of .* `counts` must be from 1 to 16",
    "counts-more": "Row 0 of .* `counts` sum to",
    "ids-large": "Row 0 of .* the vocabulary ends at 60",
    "mass": "Row 0 of .* hold a mass of",
    "logprobs-nan": "Row 0 of .* must be finite",
    "normalizers": "Row 0 of .* at temperature 2.0",
    "span-empty": "Row 0 of .* `spans` must be ascending",
    "stream-short": "Rows 0 to 2 of .* its content is not one stream of",
    "stream-wrong-sum": "Rows 0 to 2 of .* incorrect data check",
    "rows-0-0": "Row 0 of .* cannot have the sizes",
    "blocks-empty": "A block of .* holds no row",
    "shards-0": "lists 0 shards; its plan has 1",
    "shards.rows-4": "has 4 rows for 3 prompts",
    "plan.generation-6": "nests deeper than 16 levels",
    "blocks-rows": "sum to 2 rows; the index says 3",
    "index-link": "it is a symbolic link",
    "index-folder": "not a plain file",
    "shard-fifo": "not a plain file",
    "too-large": "is larger than 2097152 bytes",
    "list": "holds a JSON list",
    "nan": "NaN is not a JSON number",
    "deep-objects": "nests deeper than 16 levels",
    "raw-escape": "is not JSON",
    "duplicate-keys": "not in canonical form",
}


def test_hand_made_hostile_sets(folder: Path, tmp_path: Path) -> None:
    def attack(watch: Watch) -> None:
        watch.run(lambda: read_all(folder), 60)
        reshard(folder, lambda tensors: None)
        read_all(folder)  # so the sets below fail for what was changed, not for a wrong seal
        names = []
        for name, path in hostile_sets(folder, tmp_path / "scratch"):
            try:
                watch.run(lambda path=path: read_all(path), SECONDS)
            except TransferSetError as error:
                assert str(error).replace("\n", "").isprintable() and str(error).isascii(), name
                assert len(str(error)) < 2000, name
                assert re.search(MESSAGES.get(name, ""), str(error)), f"{name}: {error}"
                names.append(name)
            except BaseException as error:
                raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
            else:
                raise AssertionError(f"{name} was accepted")
        assert len(names) >= 150 and set(MESSAGES) <= set(names)

    in_sandbox(attack, tmp_path)


MUTATIONS: dict[str, Callable[[bytes, int, bytes], bytes]] = {
    "flip": lambda data, at, value: data[:at] + bytes([data[at] ^ (value[0] or 1)]) + data[at + 1 :],
    "set": lambda data, at, value: data[:at] + value + data[at + len(value) :],
    "insert": lambda data, at, value: data[:at] + value + data[at:],
    "delete": lambda data, at, value: data[:at] + data[at + len(value) :],
    "copy": lambda data, at, value: data[:at] + data[at // 2 : at // 2 + 64] + data[at:],
    "cut": lambda data, at, value: data[:at],
    "number": lambda data, at, value: re.sub(
        rb"(?s)(.{%d}\D*)\d" % at, rb"\g<1>%d" % int.from_bytes(value, "little"), data, count=1
    ),
}
MUTATION = st.tuples(
    st.sampled_from(sorted(MUTATIONS)), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)
)


def reseal(folder: Path, data: bytes, name: str) -> None:
    """Make the digests fit again, where the mutated index can still be read."""
    try:
        index = json.loads(data if name == "index.json" else (folder / "index.json").read_bytes())
        index["shards"][0]["sha256"] = hashlib.sha256((folder / SHARD).read_bytes()).hexdigest()
        (folder / "index.json").write_bytes(seal(index))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        (folder / "index.json").write_bytes(data if name == "index.json" else (folder / "index.json").read_bytes())


@pytest.mark.parametrize("examples", [250, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_sets(folder: Path, tmp_path: Path, examples: int) -> None:
    originals = {name: (folder / name).read_bytes() for name in ("index.json", SHARD)}

    def attack(watch: Watch) -> None:
        read_all(folder)

        @settings(
            max_examples=examples, deadline=None, database=None, derandomize=True, print_blob=False,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.sampled_from(sorted(originals)), st.lists(MUTATION, min_size=1, max_size=4), st.booleans())
        def run(name: str, mutations: list[Any], sealed: bool) -> None:
            for each, data in originals.items():
                (folder / each).write_bytes(data)
            data = originals[name]
            for kind, where, value in mutations:
                data = MUTATIONS[kind](data, int(where * len(data)), value) or b"0"
            (folder / name).write_bytes(data)
            if sealed:
                reseal(folder, data, name)
            with contextlib.suppress(TransferSetError):
                watch.run(lambda: read_all(folder), SECONDS)

        run()

    in_sandbox(attack, tmp_path)


def test_damage_is_named_in_a_batch_of_good_rows(folder: Path) -> None:
    reshard(folder, tensor_changes()["mass"])
    with pytest.raises(TransferSetError, match="Row 2 of"):
        TransferSet(folder).__getitems__([2, 0, 1])
    TransferSet(folder, verify="off").__getitems__([2, 0, 1])  # told to trust, it does


def test_what_a_plan_says_reaches_the_terminal_harmlessly() -> None:
    with pytest.raises(TransferSetError) as caught:
        make_plan(teacher_name="\x1b]0;owned\x07\u202e")
    assert "\\x1b]0;owned" in str(caught.value)
    assert str(caught.value).isascii()
    with pytest.raises(TransferSetError, match="control character"):
        make_plan(generation={"stop": ["ok\n\t", "\x9b31m"]})
    assert isinstance(make_plan(generation={"stop": ["ok\n\t"]}), Plan)
