"""The sweep: what it searches, that every trial begins anew, and that it goes on after a stop as if there was none."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("optuna", reason="optuna is not installed: pip install quantkd[sweep]")

import torch
from peft import LoraConfig

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, TransferSet, capture
from quantkd.cli.main import main
from quantkd.errors import ConfigError, DataError, MissingDependencyError
from quantkd.models.student import load_student
from quantkd.training.search_space import parse_space
from quantkd.training.sweep import run_sweep

PROMPTS = [f"What is the sum of {a} and {b}?" for a, b in [(1, 2), (3, 4), (5, 6), (7, 8), (9, 1), (2, 6)]]
SPACE = ("learning_rate=1e-4:1e-2:log", "lora_r=2,4", "temperature=1.0,2.0")


@pytest.fixture(scope="module")
def set_path(tiny_model_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "set"
    capture(str(tiny_model_path), PROMPTS, path, max_new_tokens=6, dtype="float32", progress=False)
    return path


@pytest.fixture(scope="module")
def sets(set_path):
    return TransferSet.open(set_path).split(0.34, seed=0)


@pytest.fixture(scope="module")
def student(tiny_model_path):
    """One loaded model for all tests: a sweep leaves it as it was."""
    return load_student(str(tiny_model_path), dtype="float32")


def arguments(folder, **options: Any) -> QuantizedDistillationConfig:
    own = {"max_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True, "report_to": "none", "init": "zero"}
    return QuantizedDistillationConfig(str(folder), **{**own, **options})


def search(student, sets, folder, *, space=SPACE, n_trials=3, seen=None, **options: Any):
    return run_sweep(
        student,
        arguments(folder, **options),
        parse_space(space),
        train_dataset=sets[0],
        eval_dataset=sets[1],
        n_trials=n_trials,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        on_trial=None if seen is None else seen.append,
    )


def without_times(trials):
    return [(trial.place, trial.params, trial.value, trial.metrics) for trial in trials]


def check_what_is_written(folder, trials, sets):
    found = json.loads((folder / "sweep.json").read_text())
    best = min(trials, key=lambda trial: trial.value)
    assert found["best"] == best.place and found["objective"] == "eval_kl"
    assert [trial["value"] for trial in found["trials"]] == [trial.value for trial in trials]
    assert all(
        trial["seconds"] > 0 and set(trial["params"]) == {s.split("=")[0] for s in SPACE} for trial in found["trials"]
    )
    assert found["settings"]["train"] == [sets[0].digest, len(sets[0])]
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.safetensors"))  # trials are not saved


@pytest.mark.parametrize("init", ["zero", "covariance"])
def test_each_trial_is_a_training_of_its_own(student, sets, tmp_path, tiny_model_path, init):
    """A trial's figure is that of a plain training with the same arguments, whatever was trained before it."""
    before = {name: value.clone() for name, value in student.state_dict().items() if value.is_floating_point()}
    seen: list[Any] = []
    trials = search(student, sets, tmp_path / "sweep", seen=seen, init=init)
    assert [trial.place for trial in trials] == [0, 1, 2] and seen == trials
    assert len({trial.value for trial in trials}) == 3
    check_what_is_written(tmp_path / "sweep", trials, sets)
    assert not hasattr(student, "peft_config") and all("lora" not in name for name, _ in student.named_modules())
    assert all(torch.equal(before[name], student.state_dict()[name]) for name in before)
    for trial in trials:
        params = dict(trial.params)
        rank = params.pop("lora_r")
        trainer = QuantizedDistillationTrainer(
            load_student(str(tiny_model_path), dtype="float32"),
            arguments(tmp_path / "plain", init=init, save_strategy="no", **params),
            train_dataset=sets[0],
            eval_dataset=sets[1],
            peft_config=LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
            ),
        )
        trainer.train()
        metrics = trainer.evaluate()
        assert trial.value == pytest.approx(metrics["eval_kl"], rel=1e-5) == trial.metrics["eval_kl"]
        assert trial.metrics["eval_ce"] == pytest.approx(metrics["eval_ce"], rel=1e-5)


def test_a_stopped_sweep_goes_on_as_if_it_had_not_been(student, sets, tmp_path, monkeypatch):
    whole = search(student, sets, tmp_path / "whole", n_trials=3)

    # Ended in the middle of the second training, as a kill does: the trial stays open in the file.
    steps = []
    original = QuantizedDistillationTrainer.compute_loss

    def stop(self, *words, **options):
        steps.append(self.model.training)
        if sum(steps) == 4:
            raise SystemExit
        return original(self, *words, **options)

    with monkeypatch.context() as patched:
        patched.setattr(QuantizedDistillationTrainer, "compute_loss", stop)
        with pytest.raises(SystemExit):
            search(student, sets, tmp_path / "stopped", n_trials=3)
    assert len(json.loads((tmp_path / "stopped" / "sweep.json").read_text())["trials"]) == 1
    detach(student)

    seen: list[Any] = []
    assert without_times(search(student, sets, tmp_path / "stopped", n_trials=2, seen=seen)) == without_times(whole[:2])
    assert [trial.place for trial in seen] == [1]
    assert without_times(search(student, sets, tmp_path / "stopped", n_trials=3)) == without_times(whole)
    # Nothing is left to do, and nothing is done.
    monkeypatch.setattr(QuantizedDistillationTrainer, "train", lambda self, **_: pytest.fail("trained"))
    assert len(search(student, sets, tmp_path / "stopped", n_trials=2)) == 3


def detach(student):
    """What a process that ends leaves behind is gone; here the model lives on."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(student.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(student.get_submodule(parent), child, module.get_base_layer())
    vars(student).pop("peft_config", None)


def test_another_sweep_in_the_folder_is_refused(student, sets, tmp_path):
    search(student, sets, tmp_path, n_trials=1)
    with pytest.raises(DataError, match=r"holds another sweep: alpha is 1\.0, not 0\.7"):
        search(student, sets, tmp_path, n_trials=2, alpha=0.7)
    with pytest.raises(DataError, match=r"holds another sweep: space is .*Choose another output_dir"):
        search(student, sets, tmp_path, n_trials=2, space=SPACE[:2])


def test_a_training_that_diverges_is_counted_and_not_the_best(student, sets, tmp_path, monkeypatch):
    original = QuantizedDistillationTrainer.evaluate
    values = iter([float("nan"), None])

    def evaluate(self, *words, **options):
        metrics = original(self, *words, **options)
        value = next(values)
        return {**metrics, "eval_kl": metrics["eval_kl"] if value is None else value}

    monkeypatch.setattr(QuantizedDistillationTrainer, "evaluate", evaluate)
    trials = search(student, sets, tmp_path, n_trials=2)
    assert trials[0].value is None and trials[1].value is not None
    found = json.loads((tmp_path / "sweep.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert found["best"] == 1


@pytest.mark.parametrize(
    ("space", "options", "said"),
    [
        (["temperature=1.0,4.0"], {}, "temperatures 1.0, 2.0; training asked for 4.0"),
        (["temperature=1:2"], {}, "the captured ones, 1.0, 2.0: give it as choices"),
        (["alpha=0.5,1.5"], {}, r"alpha weighs the soft loss and lies in \[0, 1\], found 1.5"),
        (["divergence=forward_kl,kl"], {}, "divergence"),
        (["lr_scheduler_type=cosine,cosin"], {}, "lr_scheduler_type=cosin cannot be"),
        (["num_train_epochs=1:3"], {}, "max_steps decides over num_train_epochs"),
        (["lora_r=2,4"], {"n_trials": 0}, "n_trials is 0; expected at least 1"),
    ],
)
def test_what_would_fail_in_a_trial_is_refused_before_the_first(student, sets, tmp_path, space, options, said):
    with pytest.raises(ConfigError, match=said):
        search(student, sets, tmp_path / "sweep", space=space, **options)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ([], "There is nothing to search"),
        (["learning_rate"], "Found 'learning_rate'; expected NAME=LOW:HIGH"),
        (["learning_rate="], "expected NAME=LOW:HIGH"),
        (["rate=1:2"], "Found 'rate' to search; expected one of learning_rate, "),
        (["learning_rate=1:2:3"], "expected NAME=LOW:HIGH"),
        (["learning_rate=a:b"], "'a' is no float"),
        (["lora_r=8,2.5"], "'2.5' is no int"),
        (["learning_rate=2:1"], "lower end is not below"),
        (["weight_decay=0:1:log"], "a logarithmic range begins above 0"),
        (["learning_rate=0:1"], "would be 0; expected a number above 0"),
        (["weight_decay=-1:1"], "would be -1; expected a number at least 0"),
        (["learning_rate=nan,1"], "would be nan"),
        (["lora_r=8,8"], "names a choice more than once"),
        (["divergence=a:b"], "expected NAME=LOW:HIGH"),
        (["alpha=0:1", "alpha=0.5,0.7"], "names alpha more than once"),
    ],
)
def test_a_space_that_cannot_be_is_refused(space, said):
    with pytest.raises(ConfigError, match=said):
        parse_space(space)


def test_a_space_is_drawn_as_it_says():
    trial = SimpleNamespace(
        suggest_categorical=lambda name, choices: ("of", name, choices),
        suggest_int=lambda name, low, high, log: ("int", name, low, high, log),
        suggest_float=lambda name, low, high, log: ("float", name, low, high, log),
    )
    texts = ["learning_rate=1e-5:1e-3:log", "max_steps=10:20", "alpha=0:1", "lora_r=8,16", "divergence=jsd,forward_kl"]
    space = parse_space(texts)
    assert [dimension.suggest(trial) for dimension in space] == [
        ("float", "learning_rate", 1e-5, 1e-3, True),
        ("int", "max_steps", 10, 20, False),
        ("float", "alpha", 0.0, 1.0, False),
        ("of", "lora_r", (8, 16)),
        ("of", "divergence", ("jsd", "forward_kl")),
    ]
    assert parse_space([dimension.to_text() for dimension in space]) == space


def test_a_missing_package_is_named(student, sets, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install quantkd\[sweep\]"):
        search(student, sets, tmp_path)


def test_the_command(tiny_model_path, set_path, tmp_path, capsys):
    config = tmp_path / "sweep.yaml"
    config.write_text("space: ['learning_rate=1.0e-4,1.0e-3', 'num_train_epochs=0.5:2', 'lora_r=2:4']\nn_trials: 2\n")
    words = ["sweep", "--config", config, "--model_name_or_path", tiny_model_path, "--output_dir", tmp_path / "out"]
    words += ["--transfer_set", set_path, "--eval_fraction", 0.34, "--init", "zero", "--disable_tqdm", "true"]
    main([str(word) for word in words])
    out = capsys.readouterr().out
    assert "trial 1 of 2: KL 0." in out and "held-out KL" in out
    table = [line.split() for line in out[out.index("held-out KL") :].splitlines()[2:4]]
    assert float(table[0][1]) <= float(table[1][1])
    main([*map(str, words), "--n_trials", "3"])
    out = capsys.readouterr().out
    assert "trial 3 of 3" in out and "trial 2 of" not in out
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words[:-6]), "--transfer_set", str(set_path)])
    assert stop.value.code == 1 and "decided on held-out rows" in capsys.readouterr().err
