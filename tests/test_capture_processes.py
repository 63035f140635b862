"""A capture from the command line on several processes, killed and resumed: always the bytes of one process."""

import json
import os
import random
import signal
import time

import processes
import pytest

from quantkd import TransferSet

pytestmark = pytest.mark.skipif(os.name != "posix", reason="stops and kills processes")
PROMPTS = 40


@pytest.fixture
def out(tmp_path):
    return tmp_path / "s"


@pytest.fixture(scope="module")
def start(tiny_model_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": "Add one to " + "9" * (n % 7 + 1)}) + "\n" for n in range(PROMPTS)))

    def go(out, count=1):
        options = ["--model", tiny_model_path, "--prompts", path, "--output_dir", out, "--dtype", "float32"]
        options += ["--max_new_tokens", "60", "--rows_per_shard", "2", "--batch_size", "2"]
        return processes.start(["-m", "quantkd", "capture", *options], out.with_suffix(".txt"), count)

    return go


def committed(out):
    return PROMPTS if (out / "index.json").exists() else len(list(out.glob("shard-*.json")))


def kill(family):
    for process in family:
        os.kill(process.pid, signal.SIGSTOP)  # so that none acts on the death of another
    for process in family:
        process.kill()
        processes.end(process)


def wait_for(out, shards, family):
    deadline = time.monotonic() + 240
    while committed(out) < shards and all(process.is_alive() for process in family):
        assert time.monotonic() < deadline, "the capture is stuck"
        time.sleep(0.01)


def finish(family, out):
    """Wait until they end; the digest of the set."""
    processes.finish(family, out.with_suffix(".txt"))
    assert {file.name for file in out.iterdir() if not file.name.endswith(".safetensors")} == {"index.json"}
    return TransferSet.open(out).digest


@pytest.fixture(scope="module")
def expected(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "s"
    return finish(start(out), out)


def test_two_processes_of_which_all_are_killed_once(start, out, expected):
    family = start(out, 2)
    wait_for(out, 3, family)
    kill(family)
    assert 3 <= committed(out) < PROMPTS // 2
    assert finish(start(out, 2), out) == expected


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_killed_at_random_until_it_is_done(start, out, expected, count):
    draw, kills = random.Random(count), 0
    while True:
        # Every second time the number of processes is another one.
        family = start(out, count if kills % 2 == 0 else draw.choice([1, 2, 3]))
        wait_for(out, committed(out) + draw.randint(1, 6), family)
        if kills == 5 or not all(process.is_alive() for process in family):
            break
        time.sleep(draw.random() * 0.2)
        kill(family)
        kills += 1
    assert finish(family, out) == expected
    assert kills >= 2
