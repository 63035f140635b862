"""What `quantkd train` leaves behind: the whole configuration, a picture, and how to go on after an interruption."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from quantkd.cli.main import main

CANARY = "hf_canaryCANARYcanaryCANARY"


@pytest.fixture
def words(tiny_model_path, training_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(f"learning_rate: 0.003\nlora_r: 4\nseed: 5\nlogging_steps: 1\nhub_token: {CANARY}\n")
    base = ["--model_name_or_path", str(tiny_model_path), "--transfer_set", str(training_set.sources[0])]
    return ["train", "--config", "base.yaml", *base, "--dtype", "float32", "--report_to", "none"]


def losses(folder):
    (state,) = Path(folder).glob("checkpoint-*/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def test_a_run_is_repeated_from_its_own_configuration(words, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    words += ["--eval_fraction", "0.25", "--max_steps", "3", "--seed", "7", "--lr_scheduler_type", "cosine"]
    words += ["--lr_scheduler_kwargs", '{"num_cycles": 0.4}', "--hub_token", CANARY]
    main([*words, "--output_dir", "first"])
    options = yaml.safe_load(Path("first/config.yaml").read_text())
    assert (options["learning_rate"], options["lora_r"], options["seed"], options["alpha"]) == (0.003, 4, 7, 1.0)
    assert "hub_token" not in options
    main(["train", "--config", "first/config.yaml", "--output_dir", "second"])
    assert len(losses("first")) == 3 and losses("first") == losses("second")
    again = yaml.safe_load(Path("second/config.yaml").read_text())
    assert {**again, "output_dir": "first"} == options
    weights = [Path(folder, "adapter_model.safetensors").read_bytes() for folder in ("first", "second")]
    assert weights[0] == weights[1] and Path("first/training.png").is_file()
    kept = [file for folder in ("first", "second") for file in Path(folder).rglob("*") if file.is_file()]
    assert [file for file in kept if CANARY.encode() in file.read_bytes()] == []


def test_commands_find_the_checkpoint_that_an_adapter_was_trained_on(words, held_out, tiny_model_path, cli):
    cli.ok(*words, "--output_dir", "o", "--max_steps", "2")
    measured = ["evaluate", "--run_dir", "r", "--held_out", held_out.sources[0], "--adapter", "o", "--dtype", "float32"]
    after = [*measured, "--arm", "after", "--model_name_or_path", tiny_model_path]
    cli.ok(*after)
    cli.ok(*measured, "--arm", "same", "--model_name_or_path", "o/quantized")
    found = [json.loads(Path(f"r/evaluation/{arm}.json").read_text())["fidelity"]["rows"] for arm in ("after", "same")]
    assert found[0] == found[1]
    shutil.rmtree("o/quantized")
    cli.fails("The base model has quantized weights of digest", *after)


def test_no_home_path_is_kept(words, tiny_model_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tiny_model_path.parent)
    main([*words, "--output_dir", "o", "--max_steps", "1"])
    text = Path("o/config.yaml").read_text()
    assert yaml.safe_load(text)["model_name_or_path"] == os.path.relpath(tiny_model_path)
    assert str(tiny_model_path.parent) not in text


def test_bars_are_quiet_where_there_is_no_terminal(tiny_model_path, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "One?"}\n')
    words = [sys.executable, "-m", "quantkd", "capture", "--model", tiny_model_path, "--prompts", tmp_path / "p.jsonl"]
    words += ["--output_dir", tmp_path / "s", "--max_new_tokens", "4"]
    said = subprocess.run(words, capture_output=True, text=True, timeout=240, check=True).stderr
    assert "it/s]" not in said and "%|" not in said and "\r" not in said and "plan" in said.splitlines()
