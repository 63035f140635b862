"""Experiments and the demo on the tiny model: every arm is measured, in the form that others load, and once."""

import gc
import json
import runpy
import sys
from dataclasses import replace
from unittest.mock import Mock

import processes
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig, LlamaForCausalLM

from quantkd import GenerationSettings, Nucleus, QuantizedDistillationConfig, RunSettings, TransferSet
from quantkd.cli import demo
from quantkd.data.arithmetic import generate_problems
from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.experiment import Experiment, run_experiment
from quantkd.hardware import native_compute_dtype
from quantkd.models.student import default_quantization_config, load_student
from quantkd.training import preparation
from tests.conftest import REPOSITORY, refused
from tests.gguf_files import write_gguf

pytestmark = pytest.mark.usefixtures("no_pictures", "few_draws")
FEW = ["--train_rows", "6", "--held_out_rows", "3", "--test_rows", "2", "--rank", "2"]


def run(model, folder, *, max_steps=3, init="zero", train_scales=False, calibrate=True, **options):
    rows = generate_problems(8, 0)
    experiment = Experiment(
        model=str(model), run_dir=folder, train_rows=rows[:5], held_out_rows=rows[5:],
        generation=GenerationSettings(8), dtype="float32", **options,
    )  # fmt: skip
    args = QuantizedDistillationConfig(
        str(folder / "student"), max_steps=max_steps, per_device_train_batch_size=2, learning_rate=1e-3,
        alpha=1.0, init=init, save_strategy="no", disable_tqdm=True, train_scales=train_scales,
        calibrate=calibrate,
    )  # fmt: skip
    run_experiment(experiment, args)
    assert args.eval_strategy == "no"  # the caller's stay as they are
    return folder


@pytest.fixture(scope="module")
def whole(one_layer_path, tmp_path_factory):
    options = {"exports": ("merged", "requantized"), "curve_rows": generate_problems(2, 5)}
    return run(one_layer_path, tmp_path_factory.mktemp("whole"), control=True, **options)


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def read_adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def curves(monkeypatch):
    """By folder, the steps at which held-out rows were measured, as the last picture shows them."""
    steps = {}

    def draw(history, path):
        steps[path.parent.name] = [entry["step"] for entry in history if "eval_kl" in entry]

    monkeypatch.setattr("quantkd.training.curves.draw_curves", draw)
    return steps


def test_the_control_is_an_arm_of_its_own(whole, one_layer_path, tmp_path):
    results, plain = read_results(whole), read_results(run(one_layer_path, tmp_path, start=False))
    assert results["arm_order"] == ["teacher", "before", "codes", "start", "after", "control", "merged", "requantized"]
    assert plain["arm_order"] == ["teacher", "before", "codes", "after"]
    arms = results["arms"]["control"], results["arms"]["after"], plain["arms"]["after"]
    control, after, alone = (arm["metrics"]["kl"]["value"] for arm in arms)
    assert control != after == pytest.approx(alone, rel=1e-6)
    assert results["arms"]["after"]["gap_recovered"]["kl"]["value"] > 0
    ours, theirs = read_adapter(whole / "student"), read_adapter(whole / "student-control")
    for name, tensor in read_adapter(tmp_path / "student").items():
        assert tensor.allclose(ours[name], rtol=1e-2, atol=1e-6), name
    assert any(not tensor.allclose(theirs[name]) for name, tensor in ours.items())
    assert json.loads((whole / "student-control" / "quantkd.json").read_text())["objective"]["alpha"] == 0.0


TWICE = """
import sys, time
from pathlib import Path
from quantkd import QuantizedDistillationTrainer as Trainer
from quantkd.evaluation import stats
from quantkd.report import figures
from test_experiment import run

figures.save_figure, stats.RESAMPLES = lambda figure, path: path.touch(), 100
save = Trainer._save
Trainer._save = lambda *args, **kwargs: [time.sleep(0.5), save(*args, **kwargs)]
run(sys.argv[1], Path(sys.argv[2]))
"""


def test_two_processes_share_an_experiment(whole, one_layer_path, tmp_path):
    """The adapter, which process 0 writes late, is loaded by both."""
    (tmp_path / "twice.py").write_text(TWICE)
    processes.run([tmp_path / "twice.py", one_layer_path, tmp_path / "run"], tmp_path / "said.txt", 2)
    one, two = (read_results(folder)["arms"] for folder in (whole, tmp_path / "run"))
    before, same, after = (arm["metrics"]["kl"]["value"] for arm in (one["before"], two["before"], two["after"]))
    assert same == pytest.approx(before, rel=1e-5) and after < same


def test_exported_forms_are_arms_and_every_arm_loads_with_its_figures(whole, one_layer_path):
    titles, page = (each["title"] for each in read_results(whole)["arms"].values()), (whole / "report.md").read_text()
    assert [title for title in titles if title not in page] == []
    dtype = native_compute_dtype()  # float32 where bfloat16 is emulated, also of a checkpoint in 16 bits
    stored = {"dtype": "auto" if dtype == torch.bfloat16 else dtype}
    load, full = AutoModelForCausalLM.from_pretrained, {"dtype": torch.float32}
    four_bit = {"quantization_config": default_quantization_config(torch.float32), **full}
    plainly = {"teacher": load(one_layer_path, **full), "before": load(one_layer_path, **four_bit)}
    for arm, folder in (("codes", "quantized"), ("merged", "merged"), ("requantized", "requantized")):
        plainly[arm] = load(whole / folder, **stored)
    for arm, folder in (("start", "student-start"), ("after", "student")):
        plainly[arm] = PeftModel.from_pretrained(load(whole / "quantized", **stored), whole / folder)
    held_out = TransferSet.open(whole / "held_out")
    for name, model in plainly.items():
        found = evaluate_fidelity(model, held_out, progress=False)
        reported = json.loads((whole / "evaluation" / f"{name}.json").read_text())["fidelity"]
        assert reported["rows"] == found.to_json()["rows"] and reported["means"] == found.means, name


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, target_modules="all-linear")], ids=["alone", "beside LoRA"])
def test_trained_scales_are_measured_as_they_load(one_layer_path, tmp_path, lora):
    run(one_layer_path, tmp_path, train_scales=True, peft_config=lora, init="covariance")
    arms, folder = read_results(tmp_path)["arms"], tmp_path / "student"
    loaded = AutoModelForCausalLM.from_pretrained(folder if lora is None else folder / "scaled")
    loaded = loaded if lora is None else PeftModel.from_pretrained(loaded, folder)
    found = evaluate_fidelity(loaded, TransferSet.open(tmp_path / "held_out"), progress=False).means["kl"]
    assert found == pytest.approx(arms["after"]["metrics"]["kl"]["value"], rel=1e-6)
    assert arms["after"]["metrics"]["kl"]["value"] != arms["start"]["metrics"]["kl"]["value"]


def test_the_start_is_what_training_began_with_and_does_not_change_it(one_layer_path, tmp_path, monkeypatch):
    starts = Mock(side_effect=preparation.initialize_from_rows)
    monkeypatch.setattr(preparation, "initialize_from_rows", starts)
    how = {"init": "covariance", "control": True}
    folder, other = (run(one_layer_path, tmp_path / str(x), start=x, **how) for x in (True, False))
    assert starts.call_count == 2  # the control's is the student's
    ours, theirs = (json.loads((folder / each / "quantkd.json").read_text()) for each in ("student", "student-control"))
    assert ours["training"]["init"] == theirs["training"]["init"] == "covariance"
    ours, theirs = read_adapter(folder / "student"), read_adapter(other / "student")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and not (other / "student-start").exists()
    first, arms = read_adapter(folder / "student-start"), read_results(folder)["arms"]
    assert any(not torch.equal(first[name], ours[name]) for name in ours)
    kl = {name: arm["metrics"]["kl"]["value"] for name, arm in arms.items()}
    assert kl["start"] < 0.7 * kl["before"] and kl["start"] != kl["after"]
    assert arms["start"]["differences"]["after"]["kl"]["value"] == pytest.approx(kl["start"] - kl["after"], abs=1e-9)
    assert arms["start"]["bytes"] == arms["after"]["bytes"] and arms["before"]["bytes"]["adapters"] == 0
    assert {each.dtype for adapter in (first, ours) for each in adapter.values()} == {torch.bfloat16}


def test_the_curve_is_of_rows_of_its_own_and_has_its_end(curves, one_layer_path, tmp_path):
    rows = generate_problems(10, 0)[8:]
    run(one_layer_path, tmp_path, max_steps=5, curve_rows=rows, start=False, calibrate=False)
    assert curves == {"student": [0, 2, 4, 5]}
    sets = {name: {tuple(row["input_ids"]) for row in TransferSet.open(tmp_path / name)}
            for name in ("transfer_set", "held_out", "curve")}  # fmt: skip
    assert [len(each) for each in sets.values()] == [5, 3, 2] and len(set.union(*sets.values())) == 10
    assert read_results(tmp_path)["arms"]["after"]["metrics"]["kl"]["n"] == 3


def test_what_would_spoil_the_figures_is_refused_before_the_teacher_answers(one_layer_path, tmp_path):
    def refuse(error, said, model="nowhere", **options):
        refused(error, said, run, model, tmp_path, **options)

    rows, gguf = generate_problems(2, 0), r"full-precision checkpoint as model.*GgufConfig\(gguf_file=FILE\)"
    refuse(ConfigError, r"exports are of merged, requantized; found \['half'\]", exports=("half",))
    refuse(DataError, "example 0 is the question of row 0", test_rows=rows, few_shot_rows=rows, shots=(1,))
    refuse(ConfigError, r"exports is \('merged',\), which merge an adapter", train_scales=True, exports=("merged",))
    refuse(ConfigError, gguf, model="base.gguf")
    refuse(ConfigError, gguf, model_init_kwargs={"gguf_file": "base.gguf"})
    load_student(str(one_layer_path), dtype="float32").save_pretrained(tmp_path / "nf4")
    refuse(ConfigError, "is stored in nf4, and full precision was asked for", model=tmp_path / "nf4")


def test_what_was_measured_of_the_same_model_is_not_measured_again(one_layer_path, tmp_path, monkeypatch):
    """The rows of every fidelity that is really measured are counted; no other model is in memory then."""

    def count_models():
        return sum(type(thing) is LlamaForCausalLM for thing in gc.get_objects())

    def count(model, rows, **options):
        measured.append(len(rows))
        assert count_models() == others + 1
        return evaluate_fidelity(model, rows, **options)

    measured, others = [], count_models()
    monkeypatch.setattr("quantkd.evaluation.fidelity.evaluate_fidelity", count)

    def go(**options):
        run(one_layer_path, tmp_path, test_rows=generate_problems(2, 9), **options)
        return len(measured)

    def read():
        files = [tmp_path / "results.json", *(tmp_path / "evaluation").iterdir()]
        return {path.name: path.read_bytes() for path in files}

    assert go(exports=("merged",)) == 6
    first, written = read(), (tmp_path / "quantized" / "quantkd.json").stat().st_mtime_ns
    assert go(exports=("merged",)) == 6 and read() == first
    assert go(max_steps=1, exports=("merged",)) == 8  # another adapter: teacher, before, codes and start stay
    assert read()["results.json"] != first["results.json"]
    codes = tmp_path / "quantized" / "quantkd.json"
    assert codes.stat().st_mtime_ns == written  # the same checkpoint is kept
    made = codes.read_bytes()
    once = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    run(one_layer_path, tmp_path, test_rows=generate_problems(2, 9), quantization_config=once, start=False)
    assert codes.read_bytes() != made  # another quantization under the same name is made anew
    del measured[8:]
    assert go(max_steps=1, force=True) == 13


def test_the_train_command_makes_a_control_beside_the_student(whole, one_layer_path, tmp_path, cli):
    words = f"train --model_name_or_path {whole}/quantized --transfer_set {whole}/transfer_set --max_steps 3 "
    words += f"--output_dir {tmp_path}/s --per_device_train_batch_size 2 --learning_rate 1e-3 --alpha 0.7 --init zero "
    words += "--save_strategy no --dtype float32 --lora_alpha 32 --control ce"
    assert "s-control" in cli.ok(*words.split()) and not (tmp_path / "s").exists()
    expected = read_adapter(whole / "student-control")
    for name, tensor in read_adapter(tmp_path / "s-control").items():
        assert tensor.allclose(expected[name], rtol=1e-2, atol=1e-6), name
    cli.fails("not to be published", *words.split(), "--push_to_hub", "true")


@pytest.mark.parametrize("control", [True, False])
def test_the_demo_runs_what_it_was_asked_for(control, curves, one_layer_path, tmp_path, monkeypatch, capsys):
    def run_short(experiment, args):
        short = replace(experiment, generation=GenerationSettings(8), run=RunSettings())
        return run_experiment(short, replace(args, disable_tqdm=True))

    monkeypatch.setattr(demo, "load_demo_model", lambda: one_layer_path)
    monkeypatch.setattr(demo, "run_experiment", run_short)
    demo.main(["--output_dir", str(tmp_path), *FEW, *([] if control else ["--control", "none"])])
    arms = read_results(tmp_path)["arms"]
    assert arms.keys() == {"teacher", "before", "codes", "start", "after", *(["control"] if control else [])}
    assert (tmp_path / "student-control").exists() == control
    for arm in arms.values():
        low, high = arm["metrics"]["kl"]["interval"]
        assert low <= arm["metrics"]["kl"]["value"] <= high and arm["metrics"]["kl"]["n"] == 3
    printed = capsys.readouterr().out
    assert str(tmp_path / "report.md") in printed and (arms["after"]["title"] in printed)
    assert "Answer agreement, 0-shot" in printed and "Bits per weight" in printed
    assert curves == {"student": [0, 1], **({"student-control": []} if control else {})}
    assert PeftConfig.from_pretrained(tmp_path / "student").r == 2
    assert [len(TransferSet(tmp_path / name)) for name in ("transfer_set", "held_out", "curve")] == [6, 3, 8]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What would be run: the experiment and the training's configuration; nothing is."""
    runner = Mock(side_effect=KeyboardInterrupt)
    for place in ("cli.demo", "experiment"):
        monkeypatch.setattr(f"quantkd.{place}.run_experiment", runner)
    monkeypatch.setattr(demo, "load_demo_model", lambda: tmp_path)
    return lambda place=0: runner.call_args.args[place]


@pytest.mark.parametrize("seed", ["0", "5"])
def test_no_problem_of_the_demo_is_in_two_sets(asked, tmp_path, seed):
    words = ["--output_dir", str(tmp_path), "--seed", seed, "--train_rows", "400", "--test_rows", "300"]
    refused(KeyboardInterrupt, "^$", demo.main, words)
    sets = [asked().train_rows, asked().held_out_rows, asked().test_rows, asked().curve_rows]
    assert [len(rows) for rows in sets] == [400, 32, 300, 8]
    assert len({row["question"] for rows in sets for row in rows}) == 740


def test_the_example_passes_its_options_on(monkeypatch, asked, tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in generate_problems(9, 0)))
    words = ["gsm8k.py", "--preset", "paper", "--dataset_path", str(tmp_path), "--batch_size", "3"]
    monkeypatch.setattr(sys, "argv", words)
    example = str(REPOSITORY / "examples" / "gsm8k.py")
    refused(KeyboardInterrupt, "^$", runpy.run_path, example, run_name="__main__")
    assert (asked().model, asked().generation.max_new_tokens) == ("meta-llama/Llama-3.1-8B-Instruct", 512)
    assert asked().run.batch_size == 3 and asked().storage == Nucleus(0.95, 64)
    assert asked(1).learning_rate == 5e-8 and not asked(1).calibrate  # the paper's student is plain NF4


def test_a_gguf_file_is_a_student(one_layer_path, tmp_path):
    pytest.importorskip("gguf")
    tiny = AutoModelForCausalLM.from_pretrained(one_layer_path)
    file = write_gguf(tiny, tmp_path / "tiny-Q4_0.gguf", "Q4_0")
    how = {"quantization_config": GgufConfig(gguf_file=str(file)), "exports": ("merged", "requantized")}
    run(one_layer_path, tmp_path / "run", init="covariance", **how)
    results = read_results(tmp_path / "run")
    assert results["arm_order"] == ["teacher", "before", "start", "after", "merged", "requantized"]
    kl = {arm: found["metrics"]["kl"]["value"] for arm, found in results["arms"].items()}
    assert kl["after"] < kl["start"] < kl["before"]
    before, held_out = results["arms"]["before"], TransferSet.open(tmp_path / "run" / "held_out")
    assert before["title"] == "q4_0, before" and before["bytes"]["total"] == file.stat().st_size
    student = load_student(str(one_layer_path), gguf_file=str(file))
    assert evaluate_fidelity(student, held_out, progress=False).means["kl"] == pytest.approx(kl["before"], rel=1e-6)
    adapted = PeftModel.from_pretrained(student, tmp_path / "run" / "student")
    assert evaluate_fidelity(adapted, held_out, progress=False).means["kl"] == pytest.approx(kl["after"], rel=1e-6)
