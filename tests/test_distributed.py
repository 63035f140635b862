"""One step on two processes is one step on one: DDP, FSDP2 and DeepSpeed, whole or in shards, whatever is trained."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from quantkd import capture
from quantkd.errors import ConfigError
from quantkd.student import default_quantization_config, load_student

CONFIGS = Path(__file__).resolve().parent.parent / "examples" / "accelerate_configs"
PROCESS = Path(__file__).with_name("training_process.py")
PROMPTS = [
    "Two and two?",
    "Name a colour, and then another one.",
    "How many legs?",
    "What is the sum of three and four, in words, please?",
    "Why?",
    "Tell me about the sea.",
    "One.",
    "Count from one to nine and back again.",
]
ONE_BATCH = {"per_device_train_batch_size": 8}
TWO_BY_TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
STUDENTS = ["nf4", "lora", "lora, head", "full"]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed package"
)


@pytest.fixture(scope="module")
def set_path(tiny_model_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed") / "set"
    capture(str(tiny_model_path), PROMPTS, path, max_new_tokens=10, dtype="float32", progress=False)
    return path


@pytest.fixture(scope="module")
def run(tiny_model_path, set_path, tmp_path_factory):
    """Train one step in processes of their own; the report of the first, with the gradient."""

    def start(student, launcher=(), arguments=ONE_BATCH, fsdp_on_cpu=False):
        folder = tmp_path_factory.mktemp("job")
        job = {
            "folder": str(folder), "model": str(tiny_model_path), "transfer_set": str(set_path), "student": student,
            "arguments": arguments, "fsdp_on_cpu": fsdp_on_cpu,
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job))
        result = subprocess.run(
            [sys.executable, *launcher, str(PROCESS), str(folder / "job.json")],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, result.stderr[-4000:]
        gradient = torch.load(folder / "gradient.pt", weights_only=True)
        return {**json.loads((folder / "report.json").read_text()), "gradient": gradient, "folder": folder}

    return start


@pytest.fixture(scope="module")
def alone(run):
    """The report of one process, computed once for each student."""
    reports = {}

    def get(student):
        if student not in reports:
            reports[student] = run(student)
        return reports[student]

    return get


def torchrun():
    return ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


def accelerate_launch(name, folder, **changes):
    """The shipped configuration with what a machine without GPUs must change."""
    config = {**yaml.safe_load((CONFIGS / name).read_text()), "use_cpu": True, "mixed_precision": "no", **changes}
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file", str(path)]


def assert_equal(report, expected):
    assert report["gradient"].keys() == expected["gradient"].keys()
    difference = torch.cat([(report["gradient"][name] - g).flatten() for name, g in expected["gradient"].items()])
    gradient = torch.cat([g.flatten() for g in expected["gradient"].values()])
    assert float(difference.norm() / gradient.norm()) < 1e-5
    for name in ("loss", "ce", "kl"):
        assert math.isclose(report["logs"][name], expected["logs"][name], rel_tol=1e-5), name
    for name in ("eval_loss", "eval_kl", "eval_ce", "eval_top1_agreement"):
        assert math.isclose(report["metrics"][name], expected["metrics"][name], rel_tol=1e-4), name


@pytest.mark.parametrize("student", STUDENTS)
def test_ddp_under_torchrun(run, alone, student):
    report = run(student, torchrun(), TWO_BY_TWO)
    assert (report["world_size"], report["wrapper"], report["fused"]) == (2, "DistributedDataParallel", True)
    assert_equal(report, alone(student))


def test_ddp_under_accelerate_launch(run, alone, tmp_path):
    report = run("nf4", accelerate_launch("cpu.yaml", tmp_path), TWO_BY_TWO)
    assert (report["world_size"], report["wrapper"], report["fused"]) == (2, "DistributedDataParallel", True)
    assert_equal(report, alone("nf4"))


@pytest.mark.parametrize("student", STUDENTS)
def test_fsdp2(run, alone, student, tmp_path):
    # accelerate takes its FSDP path on GPUs only, so the process is told to take it here too; gloo does the rest.
    report = run(student, accelerate_launch("fsdp2.yaml", tmp_path), TWO_BY_TWO, fsdp_on_cpu=True)
    assert report["world_size"] == 2 and report["wrapper"].startswith("FSDP") and report["fused"]
    assert student == "full" or report["sharded_base"] > 0
    assert_equal(report, alone(student))


def test_an_adapter_trained_under_fsdp2_is_saved_whole(run, tiny_model_path, tmp_path):
    report = run("lora", accelerate_launch("fsdp2.yaml", tmp_path), TWO_BY_TWO, fsdp_on_cpu=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, report["folder"] / "saved").state_dict()
    for name, change in report["gradient"].items():
        if "lora_B" in name:  # which started at zero
            torch.testing.assert_close(loaded[name], -change, msg=name)


@needs_deepspeed
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(run, alone, student, stage, tmp_path):
    name = f"deepspeed_zero{stage}.yaml"
    settings = {
        "zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})},
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
    }
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    changes = {
        "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "deepspeed.json"), "zero3_init_flag": False}
    }
    launcher = accelerate_launch(name, tmp_path, **changes)
    report = run(student, launcher, TWO_BY_TWO)
    assert report["world_size"] == 2 and report["wrapper"] == "DeepSpeedEngine"
    # A trained head whose weight is in shards has no place for the gradient that the fused loss computes.
    assert report["fused"] == (stage == 2 or student in ("nf4", "lora"))
    assert_equal(report, alone(student))


def test_without_average_tokens_each_process_averages_its_own(run, set_path):
    """Documented meaning: the mean over processes of each one's loss by its own count of targets."""
    off = {"average_tokens_across_devices": False}
    halves = [run("lora", (), {**off, "per_device_train_batch_size": 1, "max_steps": 1})]
    two = run("lora", torchrun(), {**off, "per_device_train_batch_size": 1})
    on = run("lora", torchrun(), {"per_device_train_batch_size": 1})
    from quantkd import TransferSet

    counts = [len(TransferSet(set_path)[row]["teacher"]) for row in range(2)]
    assert counts[0] != counts[1], "rows of unequal length, or the test cannot tell"
    first = halves[0]["logs"]["loss"]
    second = 2 * two["logs"]["loss"] - first
    assert math.isclose(on["logs"]["loss"], (first * counts[0] + second * counts[1]) / sum(counts), rel_tol=1e-5)
    assert not math.isclose(on["logs"]["loss"], two["logs"]["loss"], rel_tol=1e-3)


def test_weights_that_are_sharded_are_stored_so_that_they_can_be(monkeypatch, tiny_model_path):
    assert default_quantization_config(torch.float32).bnb_4bit_quant_storage == torch.uint8
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert default_quantization_config(torch.float32).bnb_4bit_quant_storage == torch.float32
    model = load_student(str(tiny_model_path), dtype="float32")
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.float32
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert default_quantization_config(torch.float32).bnb_4bit_quant_storage == torch.bfloat16
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.float32)
    with pytest.raises(ConfigError, match=r"float32.*gathered in torch.bfloat16.*Set bnb_4bit_quant_storage"):
        load_student(str(tiny_model_path), quantization_config=stored)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_is_one_that_accelerate_reads(path):
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(str(path))
    assert config.num_processes == 2
    plugin = {**config.fsdp_config, **config.deepspeed_config}
    assert ("fsdp" in path.name) == bool(config.fsdp_config) and ("deepspeed" in path.name) == bool(
        config.deepspeed_config
    )
    if "fsdp" in path.name:
        assert plugin["fsdp_version"] == 2 and plugin["fsdp_state_dict_type"] == "FULL_STATE_DICT"
