"""One experiment on the tiny model: every arm is measured, and the control leaves no trace in the distilled student."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from quantkd import QuantizedDistillationConfig
from quantkd.data.arithmetic import generate_problems
from quantkd.pipeline import Experiment, run_experiment


@pytest.fixture
def run(tiny_model_path, tmp_path):
    def go(name, control):
        rows = generate_problems(8, 0)
        experiment = Experiment(
            model=str(tiny_model_path), run_dir=tmp_path / name, train_rows=rows[:5], held_out_rows=rows[5:],
            capture={"max_new_tokens": 8}, dtype="float32", control=control,
        )  # fmt: skip
        args = QuantizedDistillationConfig(
            str(tmp_path / name / "student"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, alpha=1.0,
            init="zero", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        run_experiment(experiment, args)
        return tmp_path / name

    return go


def test_the_control_is_an_arm_of_its_own(run):
    with_control, without = run("a", True), run("b", False)
    results = json.loads((with_control / "results.json").read_text())
    assert results["arm_order"] == ["teacher", "before", "after", "control"]
    arms = results["arms"]
    assert arms["control"]["title"] == "4-bit, cross-entropy alone"
    assert arms["control"]["metrics"]["kl"]["value"] != arms["after"]["metrics"]["kl"]["value"]
    assert arms["after"]["gap_recovered"]["kl"]["value"] > 0
    plain = json.loads((without / "results.json").read_text())["arms"]
    assert plain.keys() == {"teacher", "before", "after"}
    assert plain["after"]["metrics"]["kl"]["value"] == pytest.approx(arms["after"]["metrics"]["kl"]["value"], rel=1e-6)
    ours, alone = (load_file(path / "student" / "adapter_model.safetensors") for path in (with_control, without))
    for name, tensor in ours.items():
        assert tensor.allclose(alone[name], rtol=1e-5, atol=1e-8), name
