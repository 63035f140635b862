"""A capture from the command line on several processes, killed and resumed: always the bytes of one process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
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


def start(model: Path, prompts: Path, out: Path, processes: int, *words: str) -> subprocess.Popen[bytes]:
    """The command, each of whose processes computes in one thread."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    options = ["--model", model, "--prompts", prompts, "--output_dir", out, "--dtype", "float32"]
    options += ["--max_new_tokens", "60", "--rows_per_shard", "2", "--batch_size", "2", *words]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "quantkd", "capture", *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def committed(out: Path) -> int:
    return PROMPTS if (out / "index.json").exists() else len(list(out.glob("shard-*.json")))


def kill(process: subprocess.Popen[bytes]) -> None:
    """The launcher and its workers, which have sessions of their own, all at once."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.suspend()  # so that none acts on the death of another
    for one in family:
        one.kill()
    process.communicate()
    psutil.wait_procs(family[1:], timeout=30)


def wait_for(condition, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "the capture is stuck"
        time.sleep(0.01)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err.decode()[-2000:]


def digest(out: Path) -> str:
    left = {file.name for file in out.iterdir() if not file.name.endswith(".safetensors")}
    assert left == {"index.json"}
    return TransferSet.open(out).digest


@pytest.fixture(scope="module")
def expected(tiny_model_path, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "s"
    finish(start(tiny_model_path, prompts, out, 1))
    return digest(out)


def test_two_processes_of_which_all_are_killed_once(tiny_model_path, prompts, expected, tmp_path):
    out = tmp_path / "s"
    process = start(tiny_model_path, prompts, out, 2)
    wait_for(lambda: committed(out) >= 3, process)
    kill(process)
    assert 3 <= committed(out) < PROMPTS // 2
    finish(start(tiny_model_path, prompts, out, 2))
    assert digest(out) == expected


def test_a_late_joiner_helps_and_a_stranger_is_told_how(tiny_model_path, prompts, expected, tmp_path):
    out = tmp_path / "s"
    first = start(tiny_model_path, prompts, out, 1, "--join")
    wait_for(lambda: committed(out) >= 1, first)
    first.send_signal(signal.SIGSTOP)  # it holds a shard, and is as slow as can be
    stranger = start(tiny_model_path, prompts, out, 1)
    _, err = stranger.communicate(timeout=DEADLINE)
    assert stranger.returncode == 1 and b"Another writer is at work" in err and b"--join" in err
    second = start(tiny_model_path, prompts, out, 1, "--join")
    wait_for(lambda: committed(out) >= PROMPTS // 2 - 1, second)
    first.send_signal(signal.SIGCONT)
    finish(first)
    finish(second)
    assert digest(out) == expected


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_killed_at_random_until_it_is_done(tiny_model_path, prompts, expected, tmp_path, processes):
    draw, out, kills = random.Random(processes), tmp_path / "s", 0
    while True:
        # Every second time the number of processes is another one.
        process = start(tiny_model_path, prompts, out, processes if kills % 2 == 0 else draw.choice([1, 2, 3]))
        target = committed(out) + draw.randint(1, 6)
        wait_for(lambda: committed(out) >= target, process)  # noqa: B023
        if process.poll() is None and kills < 5:
            time.sleep(draw.random() * 0.2)
            kill(process)
            kills += 1
            continue
        finish(process)
        break
    assert kills >= 2
    assert digest(out) == expected
