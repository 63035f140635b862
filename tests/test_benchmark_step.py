"""benchmarks/step.py measures what it says: the same rows for every contender, and memory by part that adds up."""

import argparse
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("no_pictures")
RANK, HIDDEN, INNER, KEYS, LAYERS, VOCABULARY = 16, 64, 128, 32, 2, 320


@pytest.fixture
def step(monkeypatch):
    if not Path("/proc/self/clear_refs").exists() and not torch.cuda.is_available():
        pytest.skip("peak memory is read from /proc, or from a GPU")
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import step

    return step


@pytest.fixture
def make_args(tiny_model_path, training_set, tmp_path):
    paths = {"model": str(tiny_model_path), "set": str(training_set.sources[0]), "scratch": str(tmp_path / "out")}
    settings = {"steps": 1, "warm_up": 1, "rows": 8, "parts": True, "autocast": False}
    return lambda **options: argparse.Namespace(**paths, **{**settings, **options})


def test_every_contender_trains_the_same_student_on_the_same_rows(step, make_args, training_set):
    rows = list(training_set)[: step.BATCH_SIZE]
    found = {name: step.measure_step(name, make_args()) for name in step.STEPS}

    targets = [row["labels"][row["labels"] != -100] for row in rows]
    batch = {
        "width": max(len(row["input_ids"]) for row in rows),
        "targets": sum(len(each) for each in targets),
        "checksum": int(torch.cat(targets).sum()),
    }
    assert {name: result["batch"] for name, result in found.items()} == dict.fromkeys(found, batch)

    shapes = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, KEYS)] * 2 + [(HIDDEN, INNER)] * 3  # in and out, of either order
    adapters = LAYERS * sum(RANK * (a + b) for a, b in shapes) * 4 / step.MIB
    scales = (LAYERS * sum(a * b // 64 for a, b in shapes) + (2 * LAYERS + 1) * HIDDEN) * 4 / step.MIB  # and norms
    for name, result in found.items():
        parts, trained = result["parts_mib"], adapters + scales * (name == "quantkd_scales")
        assert parts["adapters"] == pytest.approx(trained)
        assert parts["gradients"] == pytest.approx(trained)
        assert parts["optimizer state"] == pytest.approx(2 * trained, rel=0.02)  # and a step count a tensor

    logits = step.BATCH_SIZE * batch["width"] * VOCABULARY * 4 / step.MIB
    kept = {name: result["parts_mib"]["head and loss, kept"] for name, result in found.items()}
    assert kept["sft"] >= logits
    assert kept["quantkd_t1"] < logits / 4
    activations = {name: result["parts_mib"]["activations, kept"] for name, result in found.items()}
    assert activations["quantkd_t1"] == pytest.approx(activations["sft"], rel=0.02)


def test_times_exclude_the_warm_up_and_batches_count_real_tokens(step, make_args):
    result = step.measure_step("quantkd_t1", make_args(parts=False, steps=3, warm_up=2))
    assert len(result["seconds"]) == 3 and min(result["seconds"]) > 0
    for name in ("random", "grouped", "packed"):
        result = step.measure_batches(name, make_args())
        assert result["rows"] == 8 and result["tokens_per_second"] > 0


def test_peak_sees_an_allocation_that_is_gone(step):
    memory, size = step.Memory(), 256 * step.MIB
    memory.settle()
    memory.reset()
    before = memory.now()
    torch.ones(size // 4, device="cuda" if memory.on_gpu else "cpu")
    assert memory.peak() - before == pytest.approx(size, rel=0.05)
    memory.reset()
    assert memory.peak() - before < size / 4
