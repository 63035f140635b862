"""Commands that are stopped end in one line; stopped or killed, they go on to what they would have given anyway."""

import json
import os
import signal
from pathlib import Path
from unittest.mock import Mock

import processes
import pytest
from transformers import Trainer

from quantkd.errors import ConfigError
from quantkd.training.checkpoints import find_checkpoint
from tests.conftest import capture_set, refused
from tests.transfer_sets import hashes

PROMPTS = [f"What is {number} + 3?" for number in range(32)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, prompts in (("p.jsonl", PROMPTS), ("few.jsonl", PROMPTS[:12])):
        Path(name).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return tmp_path


def stop(words, seen, sent):
    """Start a command, and send it a signal as soon as a file is there; its exit code and what it said."""
    (process,) = processes.start(["-m", "quantkd", *words], "output")
    processes.wait_until(Path(seen).exists, [process], Path("output"))
    os.kill(process.pid, sent)
    return processes.end(process, 60), Path("output").read_text()


@pytest.mark.parametrize(("sent", "seen", "words"), [
    (signal.SIGTERM, "s/shard-00001.safetensors",
     ["capture", "--prompts", "p.jsonl", "--rows_per_shard", 4, "--model", "MODEL", "--output_dir"]),
    (signal.SIGINT, "s/evaluation/x-prompts.jsonl",
     ["evaluate", "--prompts", "few.jsonl", "--arm", "x", "--batch_size", 1, "--model_name_or_path", "MODEL",
      "--run_dir"]),
])  # fmt: skip
def test_a_stopped_command_goes_on_to_the_same_bytes(cli, folder, one_layer_path, sent, seen, words):
    """SIGTERM, which a scheduler sends, ends the program as Ctrl-C does."""
    name, *words = [one_layer_path if word == "MODEL" else word for word in words]
    words = [name, "--max_new_tokens", 24, "--dtype", "float32", *words]
    code, said = stop([*words, "s"], seen, sent)
    assert code == 130 and said.endswith(f"quantkd {name}: interrupted. Run the same command again to go on.\n")
    stopped = hashes(Path(seen).parent)
    assert cli(*words, "s")[0] == cli(*words, "whole")[0] == 0
    assert hashes(Path(seen).parent) == hashes(Path("whole", *Path(seen).parts[1:-1])) != stopped


@pytest.fixture(scope="module")
def train(one_layer_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "set"
    capture_set(one_layer_path, PROMPTS[:16], folder, max_new_tokens=8)
    words = f"train --model_name_or_path {one_layer_path} --transfer_set {folder} --dtype float32 --report_to none "
    words += "--per_device_train_batch_size 2 --num_train_epochs 2 --save_steps 4 --output_dir"
    return words.split()


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The weights of a training that was not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    processes.run(["-m", "quantkd", *train, folder], folder / "output")
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("sent", "seen"), [(signal.SIGINT, "trainer_state.json"), (signal.SIGKILL, "optimizer.pt")])
def test_train_goes_on_to_the_same_weights(folder, train, whole, sent, seen):
    """After Ctrl-C, and killed amid a checkpoint; as many threads in each process, for they decide sums of floats."""
    code, said = stop([*train, "o"], f"o/checkpoint-8/{seen}", sent)
    assert code == (130 if sent == signal.SIGINT else -9) and "Traceback" not in said
    go_on = "quantkd train: interrupted. Run the same command with --resume_from_checkpoint true"
    assert (go_on in said) == (sent == signal.SIGINT) and not Path("o/adapter_model.safetensors").exists()
    processes.run(["-m", "quantkd", *train, "o", "--resume_from_checkpoint", "true"], folder / "output")
    assert Path("o/adapter_model.safetensors").read_bytes() == whole
    # Once more from its configuration, which knows nothing of the checkpoint.
    assert "resume_from_checkpoint" not in Path("o/config.yaml").read_text()


@pytest.mark.usefixtures("folder")
def test_a_checkpoint_that_was_cut_off_over_an_older_one_is_not_resumed(cli, train, monkeypatch):
    words = [*train, "o", "--max_steps", "4", "--calibrate", "false"]
    assert cli(*words)[0] == 0 and find_checkpoint("true", "o") == "o/checkpoint-4"
    monkeypatch.setattr(Trainer, "_save_rng_state", Mock(side_effect=SystemExit(9)))
    assert cli(*words, "--seed", "1")[0] == 9
    refused(ConfigError, "holds no checkpoint to resume from", find_checkpoint, "true", "o")


def test_a_worker_that_dies_ends_the_others_with_a_message(folder, train):
    words = ["-m", "quantkd", *train, "o", "--num_train_epochs", "200", "--calibrate", "false"]
    family = processes.start(words, folder / "output", 2)
    processes.wait_until(Path("o/checkpoint-4/trainer_state.json").exists, family, Path("output"))
    family[1].kill()
    code, said = processes.end(family[0], 60), Path("output").read_text()
    assert code == 1 and "quantkd train: another process of this launch ended, and its own" in said, said
    assert "Traceback" not in said


def test_what_only_reads_says_that_nothing_was_changed(cli, monkeypatch):
    monkeypatch.setattr("quantkd.cli.verify.main", Mock(side_effect=KeyboardInterrupt))
    cli.fails("quantkd verify: interrupted. Nothing was changed.\n", "verify", "s", code=130)


def test_the_last_whole_checkpoint_is_found(tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"glob'), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-99.txt").write_text("no folder")
    last, named = str(tmp_path / "checkpoint-10"), str(tmp_path / "checkpoint-2")
    asked = {"true": last, "True": last, True: last, named: named, None: None, "false": None}
    assert {each: find_checkpoint(each, tmp_path) for each in asked} == asked
    for where in ("checkpoint-2", "nowhere"):
        refused(ConfigError, "holds no checkpoint to resume from", find_checkpoint, "true", tmp_path / where)
    cut = str(tmp_path / "checkpoint-12")
    refused(ConfigError, "which is not a complete checkpoint", find_checkpoint, cut, tmp_path)


def test_two_captures_at_once_that_are_killed_go_on_to_the_bytes_of_one(folder, one_layer_path):
    words = ["-m", "quantkd", "capture", "--model", one_layer_path, "--prompts", "p.jsonl", "--dtype", "float32"]
    words += ["--max_new_tokens", 30, "--rows_per_shard", 2, "--batch_size", 2, "--output_dir"]
    family = processes.start([*words, "s"], folder / "output", 2)
    processes.wait_until(lambda: len([*Path("s").glob("shard-*.json")]) >= 3, family, folder / "output")
    for process in family:
        os.kill(process.pid, signal.SIGSTOP)  # so that neither acts on the death of the other
    for process in family:
        process.kill()
        processes.end(process)
    assert 3 <= len([*Path("s").glob("shard-*.json")]) < 8
    for name, count in (("s", 2), ("whole", 1)):
        processes.run([*words, name], folder / "output", count)
    assert hashes(Path("s")) == hashes(Path("whole")) and len(hashes(Path("s"))) == 17
