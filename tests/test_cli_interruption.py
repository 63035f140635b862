"""Ctrl-C and SIGTERM amid a command: it ends in one line, and goes on to what it would have given anyway."""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import processes
import pytest
from transformers import Trainer

from quantkd import TransferSet
from quantkd.errors import ConfigError
from quantkd.training.checkpoints import find_checkpoint
from tests.conftest import capture_set

PROMPTS = [f"What is {number} + 3?" for number in range(32)]


@pytest.fixture(autouse=True)
def heeded():
    """Ctrl-C as at a terminal; a shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return tmp_path


@contextmanager
def stopped_when(is_time):
    """Send this process Ctrl-C as soon as something is on the disk."""
    over = threading.Event()

    def watch():
        while not over.wait(0.002):
            if is_time():
                os.kill(os.getpid(), signal.SIGINT)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def interrupted(cli, words, is_time):
    """The last line on standard error of a command that a signal stopped."""
    with stopped_when(is_time):
        code, _, err = cli(*words)
    assert code == 130 and "Traceback" not in err
    return err[err.rindex("quantkd ") :].rstrip()  # a bar may stand before it


def test_capture_goes_on_to_the_same_bytes(cli, folder, tiny_model_path):
    """SIGTERM, which a scheduler sends, ends the program as Ctrl-C does."""
    words = ["capture", "--model", tiny_model_path, "--prompts", folder / "p.jsonl", "--max_new_tokens", "24",
             "--dtype", "float32", "--rows_per_shard", "4", "--output_dir"]  # fmt: skip
    (process,) = processes.start(["-m", "quantkd", *words, folder / "s"], folder / "output")
    while not Path("s/shard-00001.safetensors").exists():
        assert process.is_alive(), Path("output").read_text()
        time.sleep(0.002)
    process.terminate()
    process.join(60)
    last = Path("output").read_text().splitlines()[-1]
    assert process.exitcode == 130 and last == "quantkd capture: interrupted. Run the same command again to go on."
    assert not Path("s/index.json").exists()
    assert cli(*words, "s")[0] == cli(*words, "whole")[0] == 0
    assert TransferSet.open("s").digest == TransferSet.open("whole").digest


@pytest.fixture
def train(folder, tiny_model_path):
    capture_set(tiny_model_path, PROMPTS, "set", max_new_tokens=8)
    return ["train", "--model_name_or_path", str(tiny_model_path), "--transfer_set", "set", "--dtype", "float32",
            "--report_to", "none", "--per_device_train_batch_size", "2", "--num_train_epochs", "2",
            "--save_steps", "4", "--output_dir"]  # fmt: skip


def test_train_goes_on_to_the_same_weights(cli, train):
    is_time = Path("o/checkpoint-8/trainer_state.json").exists
    said = interrupted(cli, [*train, "o"], is_time)
    assert said.startswith("quantkd train: interrupted. Run the same command with --resume_from_checkpoint true")
    assert not Path("o/adapter_model.safetensors").exists()
    assert cli(*train, "o", "--resume_from_checkpoint", "true")[0] == cli(*train, "whole")[0] == 0
    one, other = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("o", "whole"))
    assert one == other
    # Once more from its configuration, which knows nothing of the checkpoint.
    assert "resume_from_checkpoint" not in Path("o/config.yaml").read_text()


def test_a_train_that_is_killed_goes_on_to_the_same_weights_in_another_process(folder, train):
    """Amid a checkpoint; with as many threads in each process, for the sums of floats depend on them."""
    words = ["-m", "quantkd", *train]
    (process,) = processes.start([*words, "o"], folder / "output")
    while not Path("o/checkpoint-8/optimizer.pt").exists():
        assert process.is_alive(), Path("output").read_text()
        time.sleep(0.0005)
    process.kill()
    process.join()
    processes.run([*words, "o", "--resume_from_checkpoint", "true"], folder / "output")
    processes.run([*words, "whole"], folder / "output")
    one, other = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("o", "whole"))
    assert one == other


def test_a_checkpoint_that_was_cut_off_over_an_older_one_is_not_resumed(cli, train, monkeypatch):
    assert cli(*train, "o", "--max_steps", "4")[0] == 0
    assert find_checkpoint("true", "o") == "o/checkpoint-4"

    def die(*_):
        raise SystemExit(9)

    monkeypatch.setattr(Trainer, "_save_rng_state", die)
    assert cli(*train, "o", "--max_steps", "4", "--seed", "1")[0] == 9
    with pytest.raises(ConfigError, match="holds no checkpoint to resume from"):
        find_checkpoint("true", "o")


def test_a_worker_that_dies_ends_the_others_with_a_message(folder, train):
    family = processes.start(["-m", "quantkd", *train, "o", "--num_train_epochs", "200"], folder / "output", 2)
    while not Path("o/checkpoint-4/trainer_state.json").exists():
        assert family[0].is_alive() and family[1].is_alive(), Path("output").read_text()
        time.sleep(0.01)
    family[1].kill()
    family[0].join(60)
    said = Path("output").read_text()
    assert family[0].exitcode == 1 and "quantkd train: another process of this launch ended, and its own" in said, said
    assert "Traceback" not in said


def test_evaluate_goes_on_to_the_same_answers(cli, folder, tiny_model_path):
    words = ["evaluate", "--model_name_or_path", tiny_model_path, "--arm", "x", "--prompts", "p.jsonl", "--batch_size",
             "1", "--max_new_tokens", "24", "--dtype", "float32", "--run_dir"]  # fmt: skip
    records = Path("r/evaluation/x-prompts.jsonl")

    def is_time():
        return records.exists() and len(records.read_text().splitlines()) >= 3

    said = interrupted(cli, [*words, "r"], is_time)
    assert said == "quantkd evaluate: interrupted. Run the same command again to go on."
    kept = records.read_text().splitlines()
    assert 3 <= len(kept) < len(PROMPTS)
    assert cli(*words, "r")[0] == cli(*words, "whole")[0] == 0
    assert set(kept) <= set(records.read_text().splitlines())  # not answered again
    assert records.read_text() == Path("whole/evaluation/x-prompts.jsonl").read_text()


def test_what_only_reads_says_that_nothing_was_changed(cli, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("quantkd.cli.verify.main", interrupted)
    code, _, err = cli("verify", "s")
    assert code == 130 and err == "quantkd verify: interrupted. Nothing was changed.\n"


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
        with pytest.raises(ConfigError, match="holds no checkpoint to resume from"):
            find_checkpoint("true", tmp_path / where)
    with pytest.raises(ConfigError, match="which is not a complete checkpoint"):
        find_checkpoint(str(tmp_path / "checkpoint-12"), tmp_path)
