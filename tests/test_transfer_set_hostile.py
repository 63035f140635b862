"""Sets that chance or a stranger changed: refused with TransferSetError, in little time and memory."""

import contextlib
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from hostile_sets import SHARD, hostile_sets, reshard, seal
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.numpy import load_file
from sandbox import in_sandbox
from transfer_sets import make_plan, make_row, write_rows, write_set

from quantkd.errors import TransferSetError
from quantkd.transfer_set import TransferSet, verify
from tests.conftest import refused

SECONDS = 2.0
FILES = ["index.json", "shard-00000.safetensors", "shard-00001.safetensors"]
MESSAGES = {
    "counts-zero": "Row 0 of .* `counts` must be from 1 to 16", "counts-more": "Row 0 of .* `counts` sum to",
    "ids-large": "Row 0 of .* the vocabulary ends at 60", "mass": "Row 0 of .* hold a mass of",
    "logprobs-nan": "Row 0 of .* must be finite", "normalizers": "Row 0 of .* at temperature 2.0",
    "span-empty": "Row 0 of .* `spans` must be ascending", "rows-0-0": "Row 0 of .* cannot have the sizes",
    "stream-short": "Rows 0 to 2 of .* its content is not one stream of",
    "stream-wrong-sum": "Rows 0 to 2 of .* incorrect data check", "blocks-empty": "A block of .* holds no row",
    "shards-0": "lists 0 shards; its plan has 1", "shards.rows-4": "has 4 rows for 3 prompts",
    "blocks-rows": "sum to 2 rows; the index says 3", "index-link-/etc/passwd": "it is a symbolic link",
    "index-folder": "not a plain file", "shard-fifo": "not a plain file", "list": "holds a JSON list",
    "too-large": "is larger than 2097152 bytes", "nan": "plain JSON with finite numbers", "raw-escape": "is not JSON",
    "plan-only": r"it has no index\.json", "duplicate-keys": "not in canonical form",
    **dict.fromkeys(("plan.generation-6", "deep-objects", "deep-lists"), "nests deeper than 16 levels"),
}  # fmt: skip
MUTATIONS = {
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
PLACE, VALUE = st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)
MUTATION = st.tuples(st.sampled_from(sorted(MUTATIONS)), PLACE, VALUE)


def read_all(folder):
    transfer_set = TransferSet(folder)
    transfer_set.__getitems__(range(len(transfer_set)))
    str(transfer_set.info)
    verify(folder)


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path / "set", make_plan(num_prompts=3, vocab_size=60), label_rank=1)
    return tmp_path / "set"


def test_hand_made_hostile_sets(folder, tmp_path):
    def attack(watch):
        watch.run(lambda: read_all(folder), 60)
        reshard(folder, lambda tensors: None)
        read_all(folder)  # so the sets below fail for what was changed, not for a wrong seal
        names, left = [], dict(MESSAGES)
        for name, path in hostile_sets(folder, tmp_path / "scratch"):
            try:
                watch.run(lambda path=path: read_all(path), SECONDS)
            except TransferSetError as error:
                assert str(error).replace("\n", "").isprintable() and str(error).isascii(), name
                assert len(str(error)) < 2000 and re.search(left.pop(name, ""), str(error)), (name, str(error))
                names.append(name)
            except BaseException as error:
                raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
            else:
                raise AssertionError(f"{name} was accepted")
        assert len(names) >= 150 and not left

    in_sandbox(attack, tmp_path)


def reseal(folder):
    """Make the digests fit again, where the mutated index can still be read."""
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        index = json.loads((folder / "index.json").read_bytes())
        index["shards"][0]["sha256"] = hashlib.sha256((folder / SHARD).read_bytes()).hexdigest()
        (folder / "index.json").write_bytes(seal(index))


@pytest.mark.parametrize("examples", [250, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_sets(folder, tmp_path, examples):
    originals = {name: (folder / name).read_bytes() for name in ("index.json", SHARD)}

    def attack(watch):
        read_all(folder)

        checks = list(HealthCheck)

        @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=checks)
        @given(st.sampled_from(sorted(originals)), st.lists(MUTATION, min_size=1, max_size=4), st.booleans())
        def run(name, mutations, sealed):
            for each, data in originals.items():
                (folder / each).write_bytes(data)
            data = originals[name]
            for kind, where, value in mutations:
                data = MUTATIONS[kind](data, int(where * len(data)), value) or b"0"
            (folder / name).write_bytes(data)
            if sealed:
                reseal(folder)
            with contextlib.suppress(TransferSetError):
                watch.run(lambda: read_all(folder), SECONDS)

        run()

    in_sandbox(attack, tmp_path)


@pytest.fixture
def copy(tmp_path):
    write_set(tmp_path / "copy", make_plan(vocab_size=65_537, num_prompts=3, rows_per_shard=2), tokens=3)
    return tmp_path / "copy"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_every_byte_and_every_truncation(copy, name):
    """`verify` finds it; reading finds it, or it changes nothing."""
    wanted = [vars(row) for row in TransferSet(copy).rows(range(3))]
    data = (copy / name).read_bytes()
    for at, byte in enumerate(data):
        (copy / name).write_bytes(data[:at] + bytes([byte ^ (1 << at % 8)]) + data[at + 1 :])
        refused(TransferSetError, ".", verify, copy)
        with contextlib.suppress(TransferSetError):
            found = [vars(row) for row in TransferSet(copy).rows(range(3))]
            np.testing.assert_equal(found, wanted, err_msg=f"byte {at}")
    for changed in (*(data[:length] for length in range(len(data))), data + b"\0", data + b"\n", data * 2):
        (copy / name).write_bytes(changed)
        refused(TransferSetError, ".", verify, copy)


def test_missing_swapped_and_foreign_shards(copy, tmp_path):
    first, second = copy / FILES[1], copy / FILES[2]
    kept = second.read_bytes()
    for harm in (second.unlink, lambda: shutil.copy(first, second)):
        harm()
        refused(TransferSetError, FILES[2], verify, copy)
    second.write_bytes(kept)
    shutil.copy(first, copy / "shard-00002.safetensors")
    refused(TransferSetError, r"shard-00002.safetensors is not a shard of the index", verify, copy)
    # The same rows in the other order: every number of the index agrees, only the digest does not.
    plan = make_plan(num_prompts=2, rows_per_shard=1, vocab_size=10)
    rows = [make_row(plan, prompt, tokens=2) for prompt in (0, 0)]
    rows[1].input_ids[0] ^= 1
    write_rows(tmp_path / "a", plan, rows.__getitem__)
    write_rows(tmp_path / "b", plan, rows[::-1].__getitem__)
    shutil.copy(tmp_path / "b" / FILES[1], tmp_path / "a" / FILES[1])
    TransferSet(tmp_path / "a")[0]  # cheap checks do not hash
    refused(TransferSetError, "another shard", verify, tmp_path / "a")
    refused(TransferSetError, "sha256", TransferSet, tmp_path / "a", verify="full")


def test_damage_is_named_by_rows_and_bytes(tmp_path):
    write_set(tmp_path / "set", make_plan(num_prompts=20, rows_per_shard=20))
    shard = tmp_path / "set" / FILES[1]
    data = bytearray(shard.read_bytes())
    blocks = load_file(shard)["blocks"].tolist()
    assert [rows for rows, _ in blocks] == [8, 8, 4]
    at = len(data) - blocks[2][1] - blocks[1][1] // 2  # in the middle of the second block
    data[at] ^= 1
    shard.write_bytes(data)
    with pytest.raises(TransferSetError, match=r"Rows 8 to 15 of .* bytes (\d+) to (\d+), are damaged") as caught:
        verify(tmp_path / "set")
    first, last = map(int, re.search(r"bytes (\d+) to (\d+)", str(caught.value)).groups())  # type: ignore[union-attr]
    assert first <= at <= last
    damaged = TransferSet(tmp_path / "set")
    damaged.rows([*range(8), *range(16, 20)])
    for row in range(8, 16):
        refused(TransferSetError, "Rows 8 to 15", damaged.__getitem__, row)


def test_downloaded_sets_are_hashed_when_opened(copy):
    data = (copy / FILES[1]).read_bytes()
    (copy / FILES[1]).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    TransferSet(copy)
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    refused(TransferSetError, "sha256", TransferSet, copy)
