"""An evaluation shared by two processes gives what one process gives, and goes on from what another number began."""

import json
import os
import signal
import subprocess
import sys

import processes
import pytest

from quantkd.data.arithmetic import generate_problems
from quantkd.errors import ConfigError
from quantkd.evaluation.sharing import deal_batches, gather_rounds

LEAVE = """
import atexit, sys
import torch
from quantkd.hardware import process_state

atexit.register(lambda: print("in a group:", torch.distributed.is_initialized(), flush=True))  # runs last
state = process_state()
assert state.num_processes == 2 and torch.distributed.is_initialized()
raise [ValueError, KeyboardInterrupt][state.process_index]("the end")
"""


def test_two_processes_give_what_one_gives(tiny_model_path, held_out, tmp_path):
    rows = generate_problems(7, seed=0)
    assert len({len(row["question"]) for row in rows}) > 3  # or changed places would not show
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"-m quantkd evaluate --arm before --model_name_or_path {tiny_model_path} --full_precision --dtype float32"
    words = f"{words} --held_out {held_out.sources[0]} --gsm8k {tmp_path}/test.jsonl --shots 0 --batch_size 2"
    words = [*words.split(), "--max_new_tokens", 6, "--run_dir"]
    for count in (1, 2):  # of the two, only the first says what it wrote
        said = processes.run([*words, tmp_path / str(count)], tmp_path / f"{count}.txt", count)
        assert said.count("before.json: KL ") == 1
    arms = [json.loads((tmp_path / name / "evaluation" / "before.json").read_text()) for name in ("1", "2")]
    assert len(arms[0]["fidelity"]["rows"]["tokens"]) == 5
    assert len(arms[0]["questions"]["0-shot"]["correct_strict"]) == 7
    assert arms[0] == arms[1]
    answers = [(tmp_path / name / "evaluation" / "before-0-shot.jsonl") for name in ("1", "2")]
    assert answers[0].read_text() == answers[1].read_text()
    # What one process left behind, two go on from: the answers that are there are not made again.
    lines = answers[1].read_text().splitlines()
    changed = json.loads(lines[3])
    changed["output"] += " kept"  # without another number, so the verdict stays
    answers[1].write_text("\n".join([*lines[:3], json.dumps(changed)]) + "\n")
    processes.run([*words, tmp_path / "2"], tmp_path / "again.txt", 2)
    after = [json.loads(line) for line in answers[1].read_text().splitlines()]
    outputs = [json.loads(line)["output"] for line in lines]
    assert [record["output"] for record in after] == [*outputs[:3], f"{outputs[3]} kept", *outputs[4:]]


def test_batches_are_dealt_in_turn(monkeypatch):
    lengths = [5, 9, 1, 9, 7]
    assert deal_batches(lengths, 2, share=False) == [[1, 3], [4, 0], [2]]

    class State:
        num_processes, process_index = 2, 0

    monkeypatch.setattr("quantkd.evaluation.sharing.process_state", State)
    assert deal_batches(lengths, 2, share=True) == [[1, 3], [2]]
    monkeypatch.setattr(State, "process_index", 1)
    assert deal_batches(lengths, 2, share=True) == [[4, 0]]
    assert deal_batches([], 2, share=True) == []
    with pytest.raises(ConfigError, match="batch_size is -2"):
        deal_batches(lengths, -2, share=False)
    # The process with fewer batches joins the last round with nothing, so that nobody waits for it.
    rounds: list[list[str]] = []
    monkeypatch.setattr("quantkd.evaluation.sharing.gather_object", lambda mine: rounds.append(mine) or mine)
    assert list(gather_rounds(iter([["a", "b"]]), 3, share=True)) == [["a", "b"], []] == rounds


def test_processes_leave_their_group_after_an_error_and_after_ctrl_c():
    """In interpreters of their own: a fork ends without what an exit runs."""
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    group["MASTER_PORT"] = processes.free_port()
    family = [
        subprocess.Popen([sys.executable, "-c", LEAVE], env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]  # fmt: skip
    for process, code in zip(family, (1, -signal.SIGINT), strict=True):
        out, err = process.communicate(timeout=120)
        assert process.returncode == code and "the end" in err and out == "in a group: False\n"
