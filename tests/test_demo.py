"""`quantkd demo` on the tiny model: what it trains, what it compares with, and that no problem is in two sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from quantkd import GenerationSettings, TransferSet
from quantkd.cli import demo
from quantkd.experiment import Experiment, run_experiment

Run = Callable[..., Path]
FEW = ["--train_rows", "6", "--held_out_rows", "3", "--test_rows", "2", "--rank", "2"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tiny_model_path: Path) -> list[tuple[Experiment, Any]]:
    """What the demo asked to be run; it is run, too, with answers of a few tokens."""
    calls: list[tuple[Experiment, Any]] = []

    def run(experiment: Experiment, args: Any) -> Path:
        calls.append((experiment, args))
        assert isinstance(experiment.capture, dict)
        experiment.capture["generation"] = GenerationSettings(max_new_tokens=8)
        args.disable_tqdm = True
        return run_experiment(experiment, args)

    monkeypatch.setattr(demo, "load_demo_model", lambda: tiny_model_path)
    monkeypatch.setattr(demo, "run_experiment", run)
    return calls


def test_the_report_holds_the_control_and_every_arm_has_an_interval(
    seen: list[tuple[Experiment, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.main(["--output_dir", str(tmp_path), *FEW])
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert arms.keys() == {"teacher", "before", "after", "control"}
    for arm in arms.values():
        low, high = arm["metrics"]["kl"]["interval"]
        assert low <= arm["metrics"]["kl"]["value"] <= high
        assert arm["metrics"]["kl"]["n"] == 3
    printed = capsys.readouterr().out
    assert "4-bit, cross-entropy alone" in printed
    assert str(tmp_path / "report.md") in printed

    alphas = {}
    for name in ("student", "student-control"):
        assert PeftConfig.from_pretrained(tmp_path / name).r == 2
        objective = json.loads((tmp_path / name / "quantkd.json").read_text())["objective"]
        alphas[name] = objective["alpha"]
    assert alphas == {"student": 1.0, "student-control": 0.0}
    assert len(TransferSet(tmp_path / "transfer_set")) == 6
    assert len(TransferSet(tmp_path / "held_out")) == 3


@pytest.mark.parametrize("seed", [0, 5])
def test_no_problem_is_in_two_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int) -> None:
    calls: list[Experiment] = []

    def stop(experiment: Experiment, args: Any) -> Path:
        assert args.seed == seed
        calls.append(experiment)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "load_demo_model", lambda: tmp_path)
    monkeypatch.setattr(demo, "run_experiment", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.main(["--output_dir", str(tmp_path), "--seed", str(seed), "--train_rows", "400", "--test_rows", "300"])
    (experiment,) = calls
    sets = [[row["question"] for row in rows] for rows in (
        experiment.train_rows, experiment.held_out_rows, experiment.test_rows
    )]  # fmt: skip
    assert [len(rows) for rows in sets] == [400, 32, 300]
    assert len({question for rows in sets for question in rows}) == 732
