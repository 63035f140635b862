"""The sweep: what it searches, that every trial begins anew, and that it goes on after a stop as if there was none."""

import json
import sys

import pytest

pytest.importorskip("optuna", reason="optuna is not installed: pip install optuna")

import torch
from peft import LoraConfig

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer
from quantkd.errors import ConfigError
from quantkd.models.student import load_student
from quantkd.training.sweep import parse_space, run_sweep
from tests.conftest import refused

pytestmark = pytest.mark.usefixtures("no_pictures")
SPACE = ("learning_rate=1e-4:1e-2:log", "lora_r=2,4", "temperature=1.0,2.0")
# One loaded model for all tests: a sweep leaves it as it was.
student = pytest.fixture(lambda one_layer_path: load_student(str(one_layer_path), dtype="float32"), scope="module")
sets = pytest.fixture(lambda training_set: training_set[:6].split(0.34, seed=0), scope="module")


def lora(rank=4):
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def arguments(folder, **options):
    own = {"max_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True, "report_to": "none", "init": "zero"}
    return QuantizedDistillationConfig(str(folder), **{**own, **options})


def search(student, sets, folder, *, space=SPACE, n_trials=3, **options):
    """Params and values of the trials, in the order in which they were run."""
    trials = run_sweep(
        student, arguments(folder, **options), parse_space(space), lora(),
        train_dataset=sets[0], eval_dataset=sets[1], n_trials=n_trials,
    )  # fmt: skip
    assert [trial.value for trial in trials] == sorted(trial.value for trial in trials)
    return [(trial.params, trial.value) for trial in sorted(trials, key=lambda trial: trial.number)]


def test_each_trial_is_a_training_of_its_own(student, sets, tmp_path, one_layer_path):
    """A trial's figure is that of a plain training with the same arguments, whatever was trained before it."""
    before = {name: value.clone() for name, value in student.state_dict().items() if value.is_floating_point()}
    trials = search(student, sets, tmp_path / "sweep", init="covariance")
    assert len({value for _, value in trials}) == len({params["lora_r"] for params, _ in trials}) + 1 == 3
    assert not list((tmp_path / "sweep").rglob("*.safetensors"))  # trials are not saved
    assert not hasattr(student, "peft_config") and all("lora" not in name for name, _ in student.named_modules())
    assert all(torch.equal(before[name], student.state_dict()[name]) for name in before)
    for params, value in trials:
        params = dict(params)
        rank = params.pop("lora_r")
        args = arguments(tmp_path / "plain", init="covariance", save_strategy="no", **params)
        trainer = QuantizedDistillationTrainer(
            load_student(str(one_layer_path), dtype="float32"), args,
            train_dataset=sets[0], eval_dataset=sets[1], peft_config=lora(rank),
        )  # fmt: skip
        trainer.train()
        assert value == pytest.approx(trainer.evaluate()["eval_kl"], rel=1e-5)


def test_a_stopped_sweep_goes_on_as_if_it_had_not_been(student, sets, tmp_path, monkeypatch):
    whole = search(student, sets, tmp_path / "whole", n_trials=3)
    steps, original = [], QuantizedDistillationTrainer.compute_loss

    def stop(self, *words, **options):
        steps.append(self.model.training)
        return sys.exit() if sum(steps) == 4 else original(self, *words, **options)  # amid the second training

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(QuantizedDistillationTrainer, "compute_loss", stop)
        search(student, sets, tmp_path / "stopped", n_trials=3)
    assert search(student, sets, tmp_path / "stopped", n_trials=2) == whole[:2]
    assert search(student, sets, tmp_path / "stopped", n_trials=3) == whole
    monkeypatch.setattr(QuantizedDistillationTrainer, "train", lambda self, **_: pytest.fail("trained"))
    assert search(student, sets, tmp_path / "stopped", n_trials=2) == whole
    with pytest.raises(pytest.fail.Exception):  # another search in the same folder is another study
        search(student, sets, tmp_path / "stopped", n_trials=1, alpha=0.7)


def test_a_training_that_diverges_is_counted_and_comes_last(student, sets, tmp_path, monkeypatch):
    original, values = QuantizedDistillationTrainer.evaluate, iter([{"eval_kl": float("nan")}, {}])
    evaluate = lambda *a, **k: {**original(*a, **k), **next(values)}  # noqa: E731
    monkeypatch.setattr(QuantizedDistillationTrainer, "evaluate", evaluate)
    first, second = search(student, sets, tmp_path, n_trials=2)
    assert first[1] == float("inf") > second[1]


@pytest.mark.parametrize(("space", "said"), [
    (["temperature=1.0,4.0"], "temperature takes choices of the captured ones, 1.0, 2.0"),
    (["beta=0.1:0.9"], "beta has no effect without divergence=jsd"),
    (["alpha=0.5,1.5"], "alpha is 1.5"), (["divergence=forward_kl,kl"], "divergence"),
    (["num_train_epochs=1:3"], "max_steps overrides num_train_epochs"),
    (["learning_rate"], "Found 'learning_rate'; expected NAME=LOW:HIGH"),
    (["rate=1:2"], "Found 'rate' to search; expected each of alpha, "), (["lora_r=8,2.5"], "expected NAME=LOW:HIGH"),
    (["alpha=0:1", "alpha=0.5,0.7"], "Found 'alpha' to search; expected .* at most once"),
])  # fmt: skip
def test_what_would_fail_in_a_trial_is_refused_before_the_first(student, sets, tmp_path, space, said):
    refused(ConfigError, said, search, student, sets, tmp_path / "sweep", space=space)
    assert not (tmp_path / "sweep").exists()


def test_the_command(one_layer_path, training_set, tmp_path, cli, monkeypatch):
    options = {"model_name_or_path": str(one_layer_path), "transfer_set": str(training_set.sources[0]), "init": "zero"}
    options |= {"space": ["learning_rate=1e-4,1e-3", "num_train_epochs=0.5:2", "lora_r=2:4"], "n_trials": 2}
    (tmp_path / "sweep.yaml").write_text(json.dumps({**options, "output_dir": str(tmp_path / "out")}))
    words = ["sweep", "--config", str(tmp_path / "sweep.yaml")]
    out = cli.ok(*words, "--eval_fraction", "0.34")
    lines = [line.split() for line in out.splitlines() if line.startswith("held-out KL ")]
    assert len(lines) == 2 and float(lines[0][2]) <= float(lines[1][2])
    cli.fails("needs held-out rows", *words)
    monkeypatch.setitem(sys.modules, "optuna", None)
    cli.fails("pip install optuna", *words, "--eval_fraction", "0.34")
