"""A capture from the command line on several processes, killed and resumed: always the bytes of one process."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import processes
import pytest

from quantkd import TransferSet

pytestmark = pytest.mark.skipif(os.name != "posix", reason="stops and kills processes")
PROMPTS = 40
DEADLINE = 240


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": "Add one to " + "9" * (n % 7 + 1)}) + "\n" for n in range(PROMPTS)))
    return path


def start(model: Path, prompts: Path, out: Path, count: int, *words: str) -> list[BaseProcess]:
    """The command, each of whose processes computes in one thread."""
    options = ["--model", model, "--prompts", prompts, "--output_dir", out, "--dtype", "float32"]
    options += ["--max_new_tokens", "60", "--rows_per_shard", "2", "--batch_size", "2", *words]
    return processes.start(["-m", "quantkd", "capture", *options], out.with_suffix(".txt"), count)


def committed(out: Path) -> int:
    return PROMPTS if (out / "index.json").exists() else len(list(out.glob("shard-*.json")))


def kill(family: list[BaseProcess]) -> None:
    for process in family:
        os.kill(process.pid, signal.SIGSTOP)  # so that none acts on the death of another
    for process in family:
        process.kill()
        process.join()


def wait_for(condition, family: list[BaseProcess]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition() and all(process.is_alive() for process in family):
        assert time.monotonic() < deadline, "the capture is stuck"
        time.sleep(0.01)


def digest(out: Path) -> str:
    left = {file.name for file in out.iterdir() if not file.name.endswith(".safetensors")}
    assert left == {"index.json"}
    return TransferSet.open(out).digest


@pytest.fixture(scope="module")
def expected(tiny_model_path, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "s"
    processes.finish(start(tiny_model_path, prompts, out, 1), out.with_suffix(".txt"))
    return digest(out)


def test_two_processes_of_which_all_are_killed_once(tiny_model_path, prompts, expected, tmp_path):
    out = tmp_path / "s"
    process = start(tiny_model_path, prompts, out, 2)
    wait_for(lambda: committed(out) >= 3, process)
    kill(process)
    assert 3 <= committed(out) < PROMPTS // 2
    processes.finish(start(tiny_model_path, prompts, out, 2), out.with_suffix(".txt"))
    assert digest(out) == expected


def test_a_second_launch_on_the_same_folder_is_refused(tiny_model_path, prompts, expected, tmp_path):
    out = tmp_path / "s"
    first = start(tiny_model_path, prompts, out, 1)
    wait_for(lambda: committed(out) >= 1, first)
    os.kill(first[0].pid, signal.SIGSTOP)
    stranger = start(tiny_model_path, prompts, out, 1)
    stranger[0].join(DEADLINE)
    os.kill(first[0].pid, signal.SIGCONT)
    assert stranger[0].exitcode == 1 and "Another writer is at work" in out.with_suffix(".txt").read_text()
    processes.finish(first, out.with_suffix(".txt"))
    assert digest(out) == expected


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_killed_at_random_until_it_is_done(tiny_model_path, prompts, expected, tmp_path, count):
    draw, out, kills = random.Random(count), tmp_path / "s", 0
    while True:
        # Every second time the number of processes is another one.
        process = start(tiny_model_path, prompts, out, count if kills % 2 == 0 else draw.choice([1, 2, 3]))
        target = committed(out) + draw.randint(1, 6)
        wait_for(lambda: committed(out) >= target, process)  # noqa: B023
        if all(one.is_alive() for one in process) and kills < 5:
            time.sleep(draw.random() * 0.2)
            kill(process)
            kills += 1
            continue
        processes.finish(process, out.with_suffix(".txt"))
        break
    assert kills >= 2
    assert digest(out) == expected
