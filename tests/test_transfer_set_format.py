"""The format is what docs/transfer-set-format.md says: golden sets, byte for byte, and the page's own reader."""

from __future__ import annotations

import json
import math
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transfer_sets import make_plan, make_row, write_rows, write_set

from quantkd.transfer_set import Plan, TransferRow, TransferSet, verify
from quantkd.transfer_set.plan import FORMAT_VERSION

GOLDEN = Path(__file__).parent / "golden"
PAGE = Path(__file__).parent.parent / "docs" / "transfer-set-format.md"
READER = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[-1]
PLANS = {
    # 70,000 ids need 17 bits; temperatures below and above 1.
    "wide": make_plan(vocab_size=70_000, temperatures=(0.5, 1.0, 2.0), num_prompts=3, rows_per_shard=2),
    "narrow": make_plan(
        vocab_size=300, temperatures=(1.0,), num_prompts=3, rows_per_shard=2,
        storage={"kind": "topk", "k": 300}, responses="given", generation={}, extra={"note": "caf\u00e9"},
    ),
}  # fmt: skip


def golden_rows(plan: Plan) -> list[TransferRow]:
    """Rows written out by hand: two spans, labels in and outside the entries, a sure target, and a row without any."""
    high = plan.vocab_size - 1
    probabilities = [[0.6, 0.25, 0.1], [1.0], [0.3, 0.3, 0.2, 0.1, 0.05], [0.97], [0.5, 0.5], [0.9, 0.06]]
    ids = [[high, 0, 17], [5], [9, 200, 7, high, 8], [299], [1, 0], [2, 250]]
    tables = {0.5: [-0.8, 0.0, -1.4, -0.06, -0.69, -0.2], 1.0: [0.0] * 6, 2.0: [1.5, 0.2, 2.5, 0.6, 0.9, 0.7]}
    normalizers = np.array([tables[t] for t in plan.temperatures], dtype=np.float32).T

    def row(input_ids: list[int], spans: list[list[int]], targets: slice, finished: bool) -> TransferRow:
        chosen = probabilities[targets]
        return TransferRow(
            input_ids=np.array(input_ids),
            spans=np.array(spans, dtype=np.int64).reshape(-1, 2),
            counts=np.array([len(part) for part in chosen], dtype=np.int64),
            token_ids=np.array([i for part in ids[targets] for i in part], dtype=np.int64),
            logprobs=np.array([math.log(p) for part in chosen for p in part], dtype=np.float32),
            log_normalizers=normalizers[targets],
            finished=finished,
        )

    return [
        row([10, high, 0, 5, 200, 3], [[1, 2], [3, 5]], slice(0, 3), True),
        row([high], [], slice(0, 0), False),
        row([7, 8, 299, 4, 2], [[2, 5]], slice(3, 6), True),
    ]


def compare_by_the_page(folder: Path) -> None:
    """Read a set by the page's reader, and by quantkd."""
    namespace: dict[str, Any] = {}
    exec(compile(READER, str(PAGE), "exec"), namespace)
    found, transfer_set = list(namespace["read_set"](folder)), TransferSet(folder)
    assert len(found) == len(transfer_set)
    for (input_ids, targets, finished), row in zip(found, transfer_set.rows(range(len(transfer_set))), strict=True):
        np.testing.assert_array_equal(input_ids, row.input_ids)
        assert [target[0] for target in targets] == [t for start, stop in row.spans for t in range(start, stop)]
        assert [i for target in targets for i in target[1]] == row.token_ids.tolist()
        assert [len(target[1]) for target in targets] == row.counts.tolist()
        np.testing.assert_allclose(np.concatenate([[], *(t[2] for t in targets)]), row.logprobs, rtol=1e-6)
        expected = np.array([t[3] for t in targets]).reshape(row.log_normalizers.shape)
        np.testing.assert_allclose(expected, row.log_normalizers, rtol=1e-6)
        assert finished == row.finished


def opened(folder: Path) -> dict[str, bytes]:
    """Every file of a set, with the blocks of shards decompressed: another build of zlib may pack them otherwise."""
    content = {}
    for file in folder.iterdir():
        content[file.name] = file.read_bytes()
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            ends = np.cumsum(tensors["blocks"][:, 1])
            blocks = np.split(tensors["data"], ends[:-1])
            content[file.name] = tensors["rows"].tobytes() + b"".join(zlib.decompress(b.tobytes()) for b in blocks)
    index = json.loads(content.pop("index.json"))
    for shard in index["shards"]:
        del shard["bytes"], shard["sha256"]
    return {**content, "index.json": json.dumps([index["plan"], index["shards"], index["counters"]]).encode()}


@pytest.mark.parametrize("name", PLANS)
def test_golden_sets_byte_for_byte(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "set", PLANS[name], golden_rows(PLANS[name]).__getitem__)
    assert opened(tmp_path / "set") == opened(GOLDEN / name)
    assert sum(file.stat().st_size for file in (GOLDEN / name).iterdir()) < 5000


@pytest.mark.parametrize("name", PLANS)
def test_golden_sets_hold_what_was_written_by_hand(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / "set"))
    for path in (*folder.iterdir(), folder):
        path.chmod(0o500)  # nothing is written to read a set
    assert verify(folder).rows == 3
    transfer_set = TransferSet(folder, verify="full")
    for wanted, found in zip(golden_rows(PLANS[name]), transfer_set.rows(range(3)), strict=True):
        np.testing.assert_array_equal(found.input_ids, wanted.input_ids)
        np.testing.assert_array_equal(found.spans, wanted.spans)
        assert found.finished == wanted.finished
        written = dict(zip(_keys(wanted), wanted.logprobs, strict=True))
        for key, logprob in zip(_keys(found), found.logprobs, strict=True):
            assert abs(written[key] - logprob) <= 2**-11 * abs(written[key])
        np.testing.assert_allclose(found.log_normalizers, wanted.log_normalizers, rtol=2**-11)


def _keys(row: TransferRow) -> list[tuple[int, int]]:
    return list(zip(np.repeat(np.arange(len(row.counts)), row.counts).tolist(), row.token_ids.tolist(), strict=True))


@pytest.mark.parametrize("name", PLANS)
def test_the_reader_in_the_docs_reads_the_golden_sets(name: str) -> None:
    compare_by_the_page(GOLDEN / name)


@pytest.mark.parametrize("vocab_size", [200, 1000, 70_000])
def test_the_reader_in_the_docs_reads_other_sets(tmp_path: Path, vocab_size: int) -> None:
    plan = make_plan(vocab_size=vocab_size, num_prompts=11, rows_per_shard=11)  # two blocks
    write_set(tmp_path / "set", plan, label_rank=None)
    compare_by_the_page(tmp_path / "set")


def test_the_reader_in_the_docs_is_short() -> None:
    assert len([line for line in READER.splitlines() if line.strip()]) <= 60
    assert f"version {FORMAT_VERSION}" in PAGE.read_text(encoding="utf-8").splitlines()[0]


def test_any_safetensors_reader_opens_a_shard(tmp_path: Path) -> None:
    plan = make_plan()
    write_set(tmp_path / "set", plan)
    tensors = load_file(tmp_path / "set" / "shard-00002.safetensors")
    assert tensors["rows"][:, 0].tolist() == [len(make_row(plan, prompt).input_ids) for prompt in (8, 9)]
    header = (tmp_path / "set" / "shard-00002.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    fields = json.loads(header[8 : 8 + length])
    assert "__metadata__" not in fields
    for name, field in fields.items():  # aligned, so that a map can be read in place
        assert (8 + length + field["data_offsets"][0]) % tensors[name].itemsize == 0
