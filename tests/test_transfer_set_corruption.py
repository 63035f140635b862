"""Whatever happens to a set's bytes, `verify` sees it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transfer_sets import make_plan, make_row, write_rows, write_set

from quantkd.errors import TransferSetError
from quantkd.transfer_set import TransferSet, verify

FILES = ["index.json", "shard-00000.safetensors", "shard-00001.safetensors"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "set"
    write_set(folder, make_plan(vocab_size=65_537, num_prompts=3, rows_per_shard=2), tokens=3)
    return folder


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(small, tmp_path / "copy"))


def flip(path: Path) -> Iterator[int]:
    """Flip one bit of each byte in turn, then put the file right."""
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        yield at
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_every_byte(copy: Path, name: str) -> None:
    """`verify` finds it; reading finds it, or it changes nothing."""
    wanted = [vars(row) for row in TransferSet(copy).rows(range(3))]
    for at in flip(copy / name):
        with pytest.raises(TransferSetError):
            verify(copy)
        try:
            found = [vars(row) for row in TransferSet(copy).rows(range(3))]
        except TransferSetError:
            continue
        for before, after in zip(wanted, found, strict=True):
            for field in before:
                np.testing.assert_array_equal(after[field], before[field], err_msg=f"byte {at}, {field}")
    assert verify(copy).rows == 3


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_appended_bytes(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    for length in reversed(range(len(data))):
        os.truncate(copy / name, length)
        with pytest.raises(TransferSetError):
            verify(copy)
    for extra in (b"\0", b"\n", data):
        (copy / name).write_bytes(data + extra)
        with pytest.raises(TransferSetError):
            verify(copy)


def test_swapped_missing_and_foreign_shards(copy: Path, tmp_path: Path) -> None:
    first, second = copy / FILES[1], copy / FILES[2]
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(TransferSetError, match=FILES[2]):
        verify(copy)
    shutil.copy(first, second)
    with pytest.raises(TransferSetError, match=FILES[2]):
        verify(copy)
    second.write_bytes(kept)
    (copy / "shard-00002.safetensors").write_bytes(kept)
    with pytest.raises(TransferSetError, match=r"shard-00002.safetensors is not a shard of the index"):
        verify(copy)


def test_a_shard_of_the_same_size_from_another_set(tmp_path: Path) -> None:
    # The same rows in the other order: every number of the index agrees, only the digest does not.
    plan = make_plan(num_prompts=2, rows_per_shard=1, vocab_size=10)
    rows = [make_row(plan, prompt, tokens=2) for prompt in (0, 0)]
    rows[1].input_ids[0] ^= 1
    write_rows(tmp_path / "a", plan, rows.__getitem__)
    write_rows(tmp_path / "b", plan, rows[::-1].__getitem__)
    shutil.copy(tmp_path / "b" / FILES[1], tmp_path / "a" / FILES[1])
    TransferSet(tmp_path / "a")[0]  # cheap checks do not hash
    with pytest.raises(TransferSetError, match="another shard"):
        verify(tmp_path / "a")
    with pytest.raises(TransferSetError, match="sha256"):
        TransferSet(tmp_path / "a", verify="full")


def test_damage_is_named_by_rows_and_bytes(tmp_path: Path) -> None:
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
        with pytest.raises(TransferSetError, match="Rows 8 to 15"):
            damaged[row]


def test_downloaded_sets_are_hashed_when_opened(copy: Path) -> None:
    data = (copy / FILES[1]).read_bytes()
    (copy / FILES[1]).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    TransferSet(copy)
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    with pytest.raises(TransferSetError, match="sha256"):
        TransferSet(copy)
