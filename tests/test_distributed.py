"""One step on two processes is one step on one: DDP, FSDP2 and DeepSpeed, whole or in shards, whatever is trained."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from quantkd.errors import ConfigError
from quantkd.models.provenance import Provenance
from quantkd.models.stored_weights import describe_weights
from quantkd.models.student import default_quantization_config, load_student
from tests.conftest import TRAINING_PROMPTS, capture_set, refused, relative

CONFIGS = Path(__file__).resolve().parent.parent / "examples" / "accelerate_configs"
PROCESS = Path(__file__).with_name("training_process.py")
# Answers of unlike length, so that processes and micro-batches hold unlike counts of targets.
ANSWERS = [
    "Four.", "Red comes first, and then I would say green.", "Two or four", "It is seven, of course.", "No.",
    "It is wide and deep, and nobody has seen all of it.", "Two, three.", "1 2 3 4 5 6 7 8 9 8 7 6 5 4 3 2 1",
]  # fmt: skip
TWO_BY_TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
ONE_ROW = {"per_device_train_batch_size": 1}
# Scales beside adapters, and a start that the main process alone computes.
SPECIAL = {"scales": {"train_scales": True, "scales_learning_rate": 1.0}, "start": {"init": "covariance"}}
STUDENTS = ["nf4", "lora", "lora, head", "full"]
# A process that writes down what a launcher has set for it.
SHOW = """
import json, os, sys

json.dump(dict(os.environ), open(os.path.join(sys.argv[1], os.environ["RANK"] + ".json"), "w"))
"""


def train(student, arguments=TWO_BY_TWO, reshard=False):
    return {"student": student, "arguments": arguments, "reshard": reshard}


STEPS = {student: train(student) for student in STUDENTS}


@pytest.fixture(scope="module")
def given_set(tiny_model_path, tmp_path_factory):
    rows = [{"prompt": each[0], "completion": each[1]} for each in zip(TRAINING_PROMPTS, ANSWERS, strict=True)]
    return capture_set(tiny_model_path, rows, tmp_path_factory.mktemp("given") / "set", responses="given")


@pytest.fixture(scope="module")
def launch(tiny_model_path, given_set, tmp_path_factory):
    """Train one step a job, a student with what is special about it; the report of each job, with the gradient."""

    def go(jobs, launcher=(), count=1, fsdp_on_cpu=False, variables=None):
        folder = tmp_path_factory.mktemp("jobs")
        common = {"model": str(tiny_model_path), "transfer_set": str(given_set.sources[0])}
        jobs = {name: {**common, "folder": str(folder / name), **job} for name, job in jobs.items()}
        for name in jobs:
            (folder / name).mkdir()
        (folder / "jobs.json").write_text(json.dumps({"jobs": list(jobs.values()), "fsdp_on_cpu": fsdp_on_cpu}))
        words = [str(PROCESS), str(folder / "jobs.json")]
        if launcher:
            result = subprocess.run(
                [sys.executable, *launcher, *words], capture_output=True, text=True, timeout=240,
                env={**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert result.returncode == 0, result.stderr[-4000:]
        else:
            processes.run(words, folder / "output.txt", count, variables)
        reports = {name: json.loads((folder / name / "report.json").read_text()) for name in jobs}
        for name, report in reports.items():
            report |= {"gradient": torch.load(folder / name / "gradient.pt"), "folder": folder / name}
        return reports

    return go


@pytest.fixture(scope="module")
def alone(launch):
    jobs = {student: train(student, {"per_device_train_batch_size": 8}) for student in STUDENTS}
    for name, options in SPECIAL.items():
        jobs[name] = train("nf4", {"per_device_train_batch_size": 8, **options})
    rows = {"one row": ONE_ROW, "two rows": {"per_device_train_batch_size": 2}}
    return launch({**jobs, **{name: train("lora", arguments) for name, arguments in rows.items()}})


@pytest.fixture(scope="module")
def ddp(launch):
    """The reports of two processes, as `torchrun` and `accelerate launch` with cpu.yaml start them."""
    rows = {"one row": ONE_ROW, "one row, by process": {**ONE_ROW, "average_tokens_across_devices": False}}
    jobs = {name: train("lora", arguments) for name, arguments in rows.items()}
    special = {name: train("nf4", {**TWO_BY_TWO, **options}) for name, options in SPECIAL.items()}
    return launch({**STEPS, **jobs, **special}, count=2)


@pytest.fixture(scope="module")
def fsdp2(launch, tmp_path_factory):
    """The same with each weight in shards; "again" where FSDP2 shards the head after each forward pass, too."""
    again = {f"{student} again": train(student, reshard=True) for student in STUDENTS}
    folder = tmp_path_factory.mktemp("fsdp2")
    (folder / "show.py").write_text(SHOW)
    processes.run([*accelerate_launch("fsdp2.yaml", folder), folder / "show.py", folder], folder / "output.txt")
    launched = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert {each["WORLD_SIZE"] for each in launched} == {"2"}
    # Forks need not import anything; what the launcher itself serves, such as a port, ended with it.
    chosen = {name: value for name, value in launched[0].items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    # accelerate takes its FSDP path on GPUs only, so the process is told to take it here too; gloo does the rest.
    return launch({**STEPS, **again}, count=2, fsdp_on_cpu=True, variables=chosen)


def accelerate_launch(name, folder, **changes):
    """The shipped configuration with what a machine without GPUs must change."""
    config = {**yaml.safe_load((CONFIGS / name).read_text()), "use_cpu": True, "mixed_precision": "no", **changes}
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file", str(path)]


def assert_equal(report, expected):
    assert report["gradient"].keys() == expected["gradient"].keys()
    names = list(expected["gradient"])
    found, wanted = (torch.cat([r["gradient"][name].flatten() for name in names]) for r in (report, expected))
    assert relative(found, wanted) < 1e-5
    for name in ("loss", "ce", "kl"):
        assert math.isclose(report["logs"][name], expected["logs"][name], rel_tol=1e-5, abs_tol=1e-7), name
    for name in ("eval_loss", "eval_kl", "eval_ce", "eval_top1_agreement"):
        assert math.isclose(report["metrics"][name], expected["metrics"][name], rel_tol=1e-4), name


def check_digest(report, model_path):
    """The digest of the quantized weights is of all of them, whole, whatever dtype they are packed in."""
    found = Provenance.read(report["folder"] / "saved").weights
    assert found == describe_weights(load_student(str(model_path), dtype="float32"))


@pytest.mark.parametrize("student", [*STUDENTS, *SPECIAL])
def test_ddp(ddp, alone, tiny_model_path, student):
    report = ddp[student]
    assert (report["world_size"], report["wrapper"], report["fused"]) == (2, "DistributedDataParallel", True)
    assert_equal(report, alone[student])
    if student == "start":
        assert report["starts"] == alone[student]["starts"] * 2
    if student == "nf4":
        check_digest(report, tiny_model_path)


@pytest.mark.parametrize("student", STUDENTS)
def test_fsdp2(fsdp2, alone, tiny_model_path, student):
    report, again = fsdp2[student], fsdp2[f"{student} again"]
    assert report["world_size"] == 2 and report["wrapper"].startswith("FSDP") and report["fused"]
    assert student == "full" or report["sharded_base"] > 0
    # A trained head whose weight is in shards has no place for the gradient that the fused loss computes.
    assert again["fused"] == (student in ("nf4", "lora"))
    for each in (report, again):
        assert_equal(each, alone[student])
    if student == "lora":
        check_saved_adapter(report, tiny_model_path)
    if student == "nf4":
        check_digest(report, tiny_model_path)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed package")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(launch, alone, stage, tiny_model_path, tmp_path):
    zero = {"stage": stage}
    if stage == 3:
        # All of this model is small enough to be kept everywhere, and then nothing would be tried.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    automatic = ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "gradient_clipping")
    settings = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False, **dict.fromkeys(automatic, "auto")}
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    config = {"deepspeed_config_file": str(tmp_path / "deepspeed.json"), "zero3_init_flag": False}
    changes = {"deepspeed_config": config, "mixed_precision": None}  # of which DeepSpeed is asked in its own file
    launcher = accelerate_launch(f"deepspeed_zero{stage}.yaml", tmp_path, **changes)
    reports = launch(STEPS, launcher)
    for student, report in reports.items():
        assert report["world_size"] == 2 and report["wrapper"] == "DeepSpeedEngine"
        assert report["fused"] == (stage == 2 or student in ("nf4", "lora"))
        assert_equal(report, alone[student])
    check_saved_adapter(reports["lora"], tiny_model_path)


def check_saved_adapter(report, model_path):
    """What was saved is what the processes trained, whole."""
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, report["folder"] / "saved").state_dict()
    for name, change in report["gradient"].items():
        if "lora_B" in name:  # which started at zero
            saved = loaded[name.removeprefix("module.")]
            torch.testing.assert_close(saved, -change, rtol=2**-8, atol=0, msg=name)  # in 16 bit


def test_without_average_tokens_each_process_averages_its_own(alone, ddp, given_set):
    """Documented meaning: the mean over processes of each one's loss by its own count of targets."""
    counts = [len(given_set[row]["teacher"]) for row in range(2)]
    assert counts[0] != counts[1], "rows of unequal length, or the test cannot tell"
    first, both = (alone[name]["logs"]["loss"] for name in ("one row", "two rows"))
    second = (both * sum(counts) - first * counts[0]) / counts[1]
    on, by_process = ddp["one row"]["logs"]["loss"], ddp["one row, by process"]["logs"]
    assert math.isclose(on, both, rel_tol=1e-5) and math.isclose(by_process["loss"], (first + second) / 2, rel_tol=1e-5)
    assert math.isclose(by_process["loss"], 0.5 * by_process["ce"] + 0.5 * by_process["kl"], rel_tol=1e-5)
    assert not math.isclose(on, by_process["loss"], rel_tol=1e-3)


def test_weights_that_are_sharded_are_stored_so_that_they_can_be(monkeypatch, tiny_model_path):
    assert default_quantization_config(torch.float32).bnb_4bit_quant_storage == torch.uint8
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert default_quantization_config(torch.float32).bnb_4bit_quant_storage == torch.float32
    model = load_student(str(tiny_model_path), dtype="float32")
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.float32
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert default_quantization_config(torch.float32).bnb_4bit_quant_storage == torch.bfloat16
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.float32)
    said = r"float32.*gathered in torch.bfloat16.*Set bnb_4bit_quant_storage"
    refused(ConfigError, said, load_student, str(tiny_model_path), quantization_config=stored)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_is_one_that_accelerate_reads(path):
    config = ClusterConfig.from_yaml_file(str(path))
    assert config.num_processes == 2
    fsdp, deepspeed = config.fsdp_config, config.deepspeed_config
    assert ("fsdp" in path.name, "deepspeed" in path.name) == (bool(fsdp), bool(deepspeed))
    if fsdp:
        assert fsdp["fsdp_version"] == 2 and fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"
