"""One experiment on the tiny model: every arm is measured, in the form that others load, and once."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from quantkd import GenerationSettings, QuantizedDistillationConfig, TransferSet
from quantkd.cli.main import main
from quantkd.data.arithmetic import generate_problems
from quantkd.errors import ConfigError
from quantkd.evaluation import arms
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.experiment import Experiment, run_experiment
from quantkd.models.student import default_quantization_config

Run = Callable[..., Path]


@pytest.fixture
def run(tiny_model_path: Path, tmp_path: Path) -> Run:
    def go(name: str, *, max_steps: int = 3, **options: Any) -> Path:
        rows = generate_problems(8, 0)
        experiment = Experiment(
            model=str(tiny_model_path), run_dir=tmp_path / name, train_rows=rows[:5], held_out_rows=rows[5:],
            capture={"generation": GenerationSettings(8)}, dtype="float32", **options,
        )  # fmt: skip
        args = QuantizedDistillationConfig(
            str(tmp_path / name / "student"), max_steps=max_steps, per_device_train_batch_size=2, learning_rate=1e-3,
            alpha=1.0, init="zero", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        run_experiment(experiment, args)
        return tmp_path / name

    return go


def count_models() -> int:
    return sum(isinstance(thing, LlamaForCausalLM) for thing in gc.get_objects())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every fidelity that is really measured; no other model is in memory then."""
    counts: list[int] = []
    others = count_models()

    def measure(model: Any, rows: TransferSet, **options: Any) -> Any:
        counts.append(len(rows))
        assert count_models() == others + 1
        return evaluate_fidelity(model, rows, **options)

    monkeypatch.setattr(arms, "evaluate_fidelity", measure)
    return counts


def test_the_control_is_an_arm_of_its_own(run: Run) -> None:
    with_control, without = run("a", control=True), run("b")
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
    control = load_file(with_control / "student-control" / "adapter_model.safetensors")
    for name, tensor in ours.items():
        assert tensor.allclose(alone[name], rtol=1e-5, atol=1e-8), name
    assert any(not tensor.allclose(control[name]) for name, tensor in ours.items())
    objective = json.loads((with_control / "student-control" / "quantkd.json").read_text())["objective"]
    assert objective["alpha"] == 0.0


def test_exported_forms_are_arms_and_every_arm_loads_with_its_figures(run: Run, tiny_model_path: Path) -> None:
    folder = run("a", exports=("merged", "requantized"))
    results = json.loads((folder / "results.json").read_text())
    assert results["arm_order"] == ["teacher", "before", "after", "merged", "requantized"]
    titles = {name: results["arms"][name]["title"] for name in ("merged", "requantized")}
    assert titles == {"merged": "16-bit, distilled and merged", "requantized": "4-bit, merged and quantized again"}
    assert "16-bit, distilled and merged" in (folder / "report.md").read_text()

    def load(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32, **options)

    four_bit = {"quantization_config": default_quantization_config(torch.float32)}
    plainly = {
        "teacher": load(),
        "before": load(**four_bit),
        "after": PeftModel.from_pretrained(load(**four_bit), folder / "student"),
        "merged": AutoModelForCausalLM.from_pretrained(folder / "merged"),
        "requantized": AutoModelForCausalLM.from_pretrained(folder / "requantized"),
    }
    held_out = TransferSet.open(folder / "held_out")
    for name, model in plainly.items():
        found = evaluate_fidelity(model, held_out, progress=False).to_json()
        reported = json.loads((folder / "evaluation" / f"{name}.json").read_text())["fidelity"]
        assert reported == json.loads(json.dumps(found)), name


def test_an_unknown_export_is_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"exports are of merged, requantized; found \['half'\]"):
        run("a", exports=("half",))


def test_what_was_measured_of_the_same_model_is_not_measured_again(run: Run, measured: list[int]) -> None:
    questions = {"test_rows": generate_problems(2, 9)}
    folder = run("a", exports=("merged",), **questions)
    assert len(measured) == 4
    report = (folder / "results.json").read_bytes()
    evaluation = {path.name: path.read_bytes() for path in (folder / "evaluation").iterdir()}
    run("a", exports=("merged",), **questions)
    assert len(measured) == 4
    assert (folder / "results.json").read_bytes() == report
    assert {path.name: path.read_bytes() for path in (folder / "evaluation").iterdir()} == evaluation
    run("a", max_steps=1, exports=("merged",), **questions)  # another adapter: teacher and before stay
    assert len(measured) == 6
    assert (folder / "results.json").read_bytes() != report
    run("a", max_steps=1, force=True, **questions)
    assert len(measured) == 9


def test_the_train_command_makes_a_control_beside_the_student(
    run: Run, tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("a", control=True)
    words = [
        "train", "--model_name_or_path", str(tiny_model_path), "--transfer_set", str(folder / "transfer_set"),
        "--output_dir", str(tmp_path / "s"), "--max_steps", "3", "--per_device_train_batch_size", "2",
        "--learning_rate", "1e-3", "--alpha", "0.7", "--init", "zero", "--save_strategy", "no", "--dtype", "float32",
        "--lora_alpha", "32", "--control", "ce",
    ]  # fmt: skip
    main(words)
    assert not (tmp_path / "s").exists()
    assert "s-control" in capsys.readouterr().out
    ours, expected = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "s-control", folder / "student-control")
    )
    for name, tensor in ours.items():
        assert tensor.allclose(expected[name], rtol=1e-4, atol=1e-6), name
    with pytest.raises(SystemExit):
        main([*words, "--push_to_hub", "true"])
    assert "not to be published" in capsys.readouterr().err
