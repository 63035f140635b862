"""Pushes that fail on the way: 100 seeded sequences of failures, and every revision that they leave behind."""

import contextlib
import hashlib
import itertools
import json

import numpy as np
import pytest
from fake_hub import Killed, running_hub
from transfer_sets import make_plan, write_set

from quantkd import TransferSet
from quantkd.errors import HubError, TransferSetError
from quantkd.hub import push_transfer_set
from tests.conftest import refused

NAME = "user/set"
FAULTS = ("429", "500", "503", "504", "reset", "lost", "kill", "kill after")
SEQUENCES = 100
SMALL_COMMIT = 2500  # bytes: one or two of these shards


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """One set that is on the Hub, and what may take its place: fewer shards, more, and the same with more behind."""
    folder = tmp_path_factory.mktemp("sets")
    plans = {
        "old": make_plan(num_prompts=12),
        "smaller": make_plan(num_prompts=8, prompts_digest="2" * 64, temperatures=(1.0,)),
        "larger": make_plan(num_prompts=20, prompts_digest="3" * 64, temperatures=(1.0,)),
        "grown": make_plan(num_prompts=20, prompts_digest="4" * 64),
    }
    opened = {name: write_set(folder / name, plan) for name, plan in plans.items()}
    for shard in range(3):  # so that growth is what it says
        same = [(folder / name / f"shard-{shard:05d}.safetensors").read_bytes() for name in ("old", "grown")]
        assert same[0] == same[1]
    return opened


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch, running_hub(patch, cache, seconds=0.5) as hub:
        yield hub


@pytest.fixture(scope="module")
def read(sets):
    """What a reader gets at each revision of a repository, repeats left out; equal trees are read once."""
    names = {opened.digest: name for name, opened in sets.items()}
    known = {}

    def open_at(sha):
        try:
            opened = TransferSet.open(NAME, revision=sha, verify="full")
        except TransferSetError as error:
            assert "incomplete" in str(error), error
            return "incomplete"
        assert sum(1 for _ in opened) == len(opened)
        return names[opened.digest]

    def read(repository):
        states = []
        for commit in repository.commits:
            tree = json.dumps(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in commit.files.items()))
            if tree not in known:
                known[tree] = open_at(commit.sha)
            states += [known[tree]] if states[-1:] != [known[tree]] else []
        return states

    return read


def schedule(seed: int):
    """Faults for one sequence: each request may meet one, until a budget is spent."""
    rng = np.random.default_rng([seed, 7])
    left, rate = int(rng.integers(1, 14)), rng.uniform(0.05, 0.5)
    faults = itertools.chain(["hold"] * (seed % 6 == 0), (FAULTS[rng.integers(len(FAULTS))] for _ in range(left)))
    return lambda number, method, path: next(faults, None) if rng.random() <= rate else None


@pytest.mark.parametrize("block", range(10))
def test_seeded_failures_converge_and_every_revision_is_whole_or_says_that_it_is_not(hub, sets, read, block):
    kills = 0
    for seed in range(block * SEQUENCES // 10, (block + 1) * SEQUENCES // 10):
        hub.empty()
        target, path = [
            ("old", ["incomplete", "old"]),
            ("smaller", ["incomplete", "old", "incomplete", "smaller"]),
            ("larger", ["incomplete", "old", "incomplete", "larger"]),
            ("grown", ["incomplete", "old", "grown"]),  # old shards stay, so there is always a whole set
        ][seed % 4]
        if target != "old":
            push_transfer_set(sets["old"], NAME)
        hub.fault = schedule(seed)
        for _ in range(60):  # the push is started again whenever it died or gave up
            with contextlib.suppress(Killed, HubError):
                push_transfer_set(sets[target], NAME, max_commit_bytes=SMALL_COMMIT)
                break
            kills, hub.killed = kills + hub.killed, False
        else:
            raise AssertionError("the push does not converge")
        hub.fail()
        repository = hub.repositories["dataset", NAME]
        assert repository.private
        assert read(repository) == path, (seed, [commit.title for commit in repository.commits])
        before, last = (commit.files for commit in repository.commits[-2:])
        assert {name for name in last if last[name] != before.get(name)} == {"index.json"}
        shards = sorted(name for name in last if name.startswith("shard-"))
        assert shards == [f"shard-{i:05d}.safetensors" for i in range(sets[target].plan.num_shards)]
    assert kills > 3


def test_a_push_gives_up_and_goes_on_later_and_a_refusal_is_not_tried_again(hub, sets):
    hub.empty()
    hub.fault = lambda number, method, path: "503" if method == "PUT" else None
    refused(HubError, r"After 8 attempts: .*The same call goes on", push_transfer_set, sets["old"], NAME)
    hub.fail()
    push_transfer_set(sets["old"], NAME)
    assert TransferSet.open(NAME).digest == sets["old"].digest
    hub.requests.clear()
    hub.fault = lambda number, method, path: "403" if "/commit/" in path else None
    refused(HubError, "403", push_transfer_set, sets["smaller"], NAME)
    assert hub.count("POST", "/commit/") == 1
