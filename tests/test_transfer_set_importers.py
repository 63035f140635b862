"""In from Axolotl's and DistillKit's tables."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset

from quantkd.errors import DataError, TransferSetError
from quantkd.transfer_set import TransferSet, verify
from quantkd.transfer_set.fingerprint import compute_fingerprint
from quantkd.transfer_set.importers import CompressedLayout, import_table
from tests.conftest import refused

FACTS = {"vocab_size": 100, "teacher_name": "peer", "tokenizer_fingerprint": "a" * 64}
axolotl = partial(import_table, toolkit="axolotl", **FACTS)
distillkit = partial(import_table, toolkit="distillkit", **FACTS)
RESIDUALS = ("float16", 3, 3), ("float32", 1, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def axolotl_rows():
    """Three of five tokens are targets; the second target has one entry, and padding as its collator writes it."""
    padding, none = [-1e9], [-math.inf, -math.inf]
    logprobs = [none, none, [math.log(0.75), math.log(0.25)], [0.0, *padding], [math.log(0.4), math.log(0.6)]]
    return [
        {
            "input_ids": [3, 4, 5, 6, 7], "labels": [-100, -100, 5, 6, 7], "target_logprobs": logprobs,
            "target_token_ids": [[0, 1], [0, 1], [5, 9], [6, 0], [8, 7]],
            "target_mask": [[0, 0], [0, 0], [1, 1], [1, 0], [1, 1]],
        },
        {
            "input_ids": [1, 2, 3], "labels": [1, -100, 3], "target_logprobs": [[math.log(0.5)] * 2] * 3,
            "target_token_ids": [[1, 2]] * 3, "target_mask": [[1, 1]] * 3,
        },
    ]  # fmt: skip


def test_axolotl(tmp_path):
    Dataset.from_list(axolotl_rows()).to_parquet(tmp_path / "rows.parquet")
    digest = axolotl(tmp_path / "rows.parquet", tmp_path / "set")
    assert digest == axolotl([str(tmp_path / "rows.parquet")], tmp_path / "again")
    transfer_set = TransferSet(tmp_path / "set")
    assert transfer_set.info.storage == {"kind": "topk", "k": 2}
    first, second = transfer_set.rows([0, 1])
    assert first.spans.tolist() == [[2, 5]] and first.counts.tolist() == [2, 1, 2]
    assert first.token_ids.tolist() == [5, 9, 6, 7, 8]
    np.testing.assert_allclose(np.exp(first.logprobs), [0.75, 0.25, 1.0, 0.6, 0.4], atol=0.003)
    assert second.spans.tolist() == [[2, 3]], "nothing predicts the token at position 0"


def test_distillkit(tmp_path):
    values = [[math.log(0.5), math.log(0.25)], [math.log(0.9), -math.inf], [math.log(0.3), math.log(0.2)]]
    row = {"input_ids": [3, 4, 5], "token_ids": [[4, 8], [5, 0], [1, 2]], "top_values": values}
    # DistillKit's capture drops the last position, its live teacher keeps it.
    for number, cut in enumerate((3, 2)):
        rows = [{**row, "token_ids": row["token_ids"][:cut], "top_values": values[:cut]}]
        distillkit(Dataset.from_list(rows), tmp_path / str(number))
        found = TransferSet(tmp_path / str(number)).row(0)
        assert found.spans.tolist() == [[1, 3]] and found.counts.tolist() == [2, 1]
        assert found.token_ids.tolist() == [4, 8, 5]
        np.testing.assert_allclose(np.exp(found.logprobs), [0.5, 0.25, 0.9], atol=0.003)
    distillkit(Dataset.from_list([{**row, "labels": [-100, -100, 5]}]), tmp_path / "labels")
    assert TransferSet(tmp_path / "labels").row(0).spans.tolist() == [[2, 3]]


@pytest.mark.parametrize(("column", "values", "found"), [
    ("labels", [-100] * 3, "None of the 1 rows has a target"), ("target_logprobs", [[0.0, -0.1]] * 3, "hold a mass of"),
    ("target_mask", [[1, 1]], "Row 0 has lists that do not fit together"),
    ("target_mask", None, r"lacks the columns \['target_mask'\]"),
])  # fmt: skip
def test_tables_that_cannot_be_imported(tmp_path, column, values, found):
    row = {name: value for name, value in {**axolotl_rows()[1], column: values}.items() if value is not None}
    refused((DataError, TransferSetError), found, axolotl, Dataset.from_list([row]), tmp_path / "set")


def to_bytes(values, dtype):
    return torch.tensor(values, dtype=getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()


def to_bits(numbers, bits):
    """Whole numbers one after the other, the highest bit first, filled up with zeros to whole bytes."""
    text = "".join(format(number, f"0{bits}b") for number in numbers)
    length = -(-len(text) // 8)
    return int(text.ljust(8 * length, "0"), 2).to_bytes(length, "big")


def layout(d, k, exact_k, *residuals, **options):
    names = ("scale_dtype", "element_bits", "num_elements")
    bins = tuple(dict(zip(names, each, strict=True)) for each in residuals)
    return CompressedLayout(d, k, exact_k, **{"delta_encoding": False, **options}, residual_bins=bins or None)


LAYOUTS = {
    "floats alone": layout(100, 3, 3, exact_dtype="float16"),
    "a polynomial": layout(70_000, 6, 2, polynomial_terms=(0, 1, 2, "sqrt"), term_dtype="float64"),
    "ranks from 0 to 1": layout(128, 5, 1, polynomial_terms=(1, "exp"), normalize_t=True),
    "residuals": layout(300, 7, 1, *RESIDUALS, exact_dtype="bfloat16", polynomial_terms=(0, 1), delta_encoding=True),
    "no floats, no polynomial": layout(2, 2, 0, ("float32", 8, 2)),
}


def write_position(layout, rng):
    """One position's bytes, and the log-probabilities that they stand for, by plain loops."""
    exact = [float(x) for x in -np.sort(rng.integers(4, 32, layout.exact_k)) / 8]  # the same in every dtype
    coefficients = [float(x) for x in rng.integers(-8, -1, len(layout.polynomial_terms or ())) / 8]
    data = to_bytes(exact, layout.exact_dtype) + to_bytes(coefficients, layout.term_dtype)
    rest, numbers = layout.k - layout.exact_k, list(exact)
    for place in range(rest):
        rank = place / (rest - 1) if layout.normalize_t else place
        terms = [getattr(math, t)(rank) if isinstance(t, str) else rank**t for t in layout.polynomial_terms or ()]
        numbers.append(sum(c * term for c, term in zip(coefficients, terms, strict=True)))
    place = layout.exact_k
    for part in layout.residual_bins or ():
        bits, codes = part["element_bits"], rng.integers(0, 2 ** part["element_bits"], part["num_elements"]).tolist()
        data += to_bytes([0.25], part["scale_dtype"]) + to_bits(codes, bits)
        for at, code in enumerate(codes, place):
            numbers[at] += 0.25 * ((-1, 1)[code] if bits == 1 else code - 2 ** (bits - 1))
        place += len(codes)
    if layout.delta_encoding:
        numbers = [sum(numbers[: stop + 1]) for stop in range(len(numbers))]
    return data, numbers


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_compressed_positions_are_decoded(layout):
    rng = np.random.default_rng(0)
    positions = [write_position(layout, rng) for _ in range(4)]
    found = layout.decode_logprobs([list(data) for data, _ in positions])
    # Eighths are exact in every dtype, so that only the powers round: a few ulps of float64, far below 1e-12.
    np.testing.assert_allclose(found, [numbers for _, numbers in positions], rtol=1e-12)
    ids = [[int(x) for x in rng.choice(layout.d, layout.k, replace=False)] for _ in range(4)]
    bits = math.ceil(math.log2(layout.d))
    np.testing.assert_array_equal(layout.decode_ids([list(to_bits(row, bits)) for row in ids]), ids)
    for decode, wrong in ((layout.decode_logprobs, [[*positions[0][0], 0]]), (layout.decode_ids, [[0] * 99])):
        refused(ValueError, "bytes per position", decode, wrong)


def compressed_folder(folder, logprobs, ids):
    """One row as `distillkit.sample_logits_vllm` leaves it, in `data_0.parquet` with its configuration beside it."""
    config = {"d": 100, "k": 2, "exact_k": 2, "exact_dtype": "bfloat16", "polynomial_terms": None, "residual_bins": []}
    config |= {"term_dtype": "float32", "delta_encoding": False, "error_diffusion": False, "normalize_t": False}
    folder.mkdir()
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    row = {"input_ids": [*range(3, 4 + len(ids))], "bytepacked_indices": [list(to_bits(values, 7)) for values in ids]}
    row["compressed_logprobs"] = [list(to_bytes(values, "bfloat16")) for values in logprobs]
    Dataset.from_list([row]).to_parquet(folder / "data_0.parquet")
    return row


def test_distillkit_compressed(tmp_path):
    # ln 0.6 in bfloat16 is -0.5117, which is 0.5995; the second position's mass, 1.098, is scaled back to 1.
    compressed_folder(tmp_path / "table", [[math.log(0.6), math.log(0.25)], [-0.25, -1.125]], [[4, 99], [5, 0]])
    distillkit(tmp_path / "table", tmp_path / "set")
    transfer_set = TransferSet(tmp_path / "set")
    assert verify(tmp_path / "set").rows == 1 and transfer_set.info.counters == {"targets_rescaled": 1}
    row = transfer_set.row(0)
    assert row.spans.tolist() == [[1, 3]] and row.token_ids.tolist() == [4, 99, 5, 0]
    total = math.exp(-0.25) + math.exp(-1.125)
    wanted = [0.6, 0.25, math.exp(-0.25) / total, math.exp(-1.125) / total]
    # A bfloat16 of 1 to 2 nats is off by 2**-8.
    np.testing.assert_allclose(np.exp(row.logprobs), wanted, rtol=2**-8 + 2**-10)
    row = compressed_folder(tmp_path / "bad", [[-0.5, -2.0]], [[4, 99]])
    Dataset.from_list([{**row, "bytepacked_indices": [[1]]}]).to_parquet(tmp_path / "bad" / "data_0.parquet")
    for name in ("empty", "text"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "a.parquet").write_text("no")
    for source, found in (
        (Dataset.from_list([row]), "a table in memory does not say how"),
        (tmp_path / "bad", "Row 0 has lists that do not fit together: ids of shape"),
        (tmp_path / "nothing", "nothing cannot be read"),
        (tmp_path / "empty", r"holds no \*.parquet"),
        (tmp_path / "text", r"a\.parquet cannot be read"),
    ):
        refused(DataError, found, distillkit, source, tmp_path / "new")


@pytest.mark.parametrize(("change", "found"), [
    ({"exact_k": 3}, "exact_k 3"), ({"k": True}, "k is True"), ({"exact_dtype": "int8"}, "int8"),
    ({"residual_bins": [{"scale_dtype": "float32", "element_bits": 4, "num_elements": 1}]}, "with 1 residuals"),
    ({"residual_bins": [{"bits": 4}]}, "scale_dtype"), ({"colour": 1}, "colour"), (None, "argument after"),
])  # fmt: skip
def test_layouts_that_make_no_sense(tmp_path, change, found):
    file = tmp_path / "compression_config.yaml"
    file.write_text(yaml.safe_dump({"d": 9, "k": 2, "exact_k": 2, "residual_bins": [], **change} if change else [1]))
    refused(DataError, found, CompressedLayout.beside, tmp_path)
    file.write_text("a: [")
    refused(DataError, "does not say how", CompressedLayout.beside, tmp_path)


@pytest.mark.parametrize("toolkit", ["axolotl", "distillkit"])
def test_convert_from_the_command_line(toolkit, tmp_path, tiny_model_path, tiny_tokenizer, cli):
    if toolkit == "axolotl":  # a prepared data set, as `save_to_disk` leaves it
        Dataset.from_list(axolotl_rows()).save_to_disk(tmp_path / "table")
    else:
        compressed_folder(tmp_path / "table", [[-0.5, -2.0]], [[4, 99]])
    words = ["convert", "--from", toolkit, tmp_path / "table", tmp_path / "set"]
    assert "topk(k=2)" in cli(*words, "--model", tiny_model_path)[1]
    info = TransferSet(tmp_path / "set").info
    assert (info.teacher_name, info.vocab_size) == (tiny_model_path.name, len(tiny_tokenizer))
    assert info.tokenizer_fingerprint == compute_fingerprint(tiny_tokenizer)
    for wrong in (words, [*words, "--model", "x", "--storage", "topk:1"], ["convert", "a", "b"]):
        assert cli(*wrong)[0] == 2
