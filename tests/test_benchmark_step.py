"""benchmarks/step.py measures what it says: the same rows for every contender, and memory by part that adds up."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from quantkd import TransferSet
from tests.conftest import capture_set

PROMPTS = ["Two and two?", "Name a colour, then one more.", "Why?", "Tell me of the sea.", "One.", "A", "B?", "C D"]
RANK, HIDDEN, INNER, KEYS, LAYERS, VOCABULARY = 16, 64, 128, 32, 2, 320


@pytest.fixture
def step(monkeypatch):
    if not Path("/proc/self/clear_refs").exists() and not torch.cuda.is_available():
        pytest.skip("peak memory is read from /proc, or from a GPU")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import step

    return step


@pytest.fixture(scope="module")
def set_path(tiny_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "set"
    capture_set(tiny_model_path, PROMPTS, folder, max_new_tokens=10)
    return folder


@pytest.fixture
def make_args(tiny_model_path, set_path, tmp_path):
    def make(**kwargs):
        settings = {"steps": 1, "warm_up": 1, "rows": 8, "parts": True, "autocast": False, **kwargs}
        return argparse.Namespace(
            model=str(tiny_model_path), set=str(set_path), scratch=str(tmp_path / "out"), **settings
        )

    return make


def test_every_contender_trains_the_same_student_on_the_same_rows(step, make_args, set_path):
    rows = list(TransferSet(set_path))[: step.BATCH_SIZE]
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
    for result in found.values():
        parts = result["parts_mib"]
        assert parts["adapters"] == pytest.approx(adapters)
        assert parts["gradients"] == pytest.approx(adapters)
        assert parts["optimizer state"] == pytest.approx(2 * adapters, rel=0.02)  # and a step count a tensor

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
        assert result["rows"] == len(PROMPTS) and result["tokens_per_second"] > 0


def test_peak_sees_an_allocation_that_is_gone(step):
    memory, size = step.Memory(), 256 * step.MIB
    memory.settle()
    memory.reset()
    before = memory.now()
    torch.ones(size // 4, device="cuda" if memory.on_gpu else "cpu")
    assert memory.peak() - before == pytest.approx(size, rel=0.05)
    memory.reset()
    assert memory.peak() - before < size / 4
