"""Pushes that fail on the way: 100 seeded sequences of failures, and every revision that they leave behind."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections import Counter

import numpy as np
import pytest
from fake_hub import FakeHub, Repository, running_hub
from hub_client import Killed, connect, disconnect
from transfer_sets import make_plan, write_set

from quantkd import TransferSet
from quantkd.errors import HubError, TransferSetError
from quantkd.hub import push_transfer_set

NAME = "user/set"
FAULTS = ("429", "500", "503", "504", "reset", "lost", "kill", "kill after")
SEQUENCES = 100
SMALL_COMMIT = 2500  # bytes: one or two of these shards


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """One set that lies on the Hub, and what may take its place: fewer shards, more, and the same with more behind."""
    folder = tmp_path_factory.mktemp("sets")
    plans = {
        "old": make_plan(num_prompts=12),
        "smaller": make_plan(num_prompts=8, prompts_digest="2" * 64, temperatures=(1.0,)),
        "larger": make_plan(num_prompts=20, prompts_digest="3" * 64, temperatures=(1.0,)),
        "grown": make_plan(num_prompts=20, prompts_digest="4" * 64),
    }
    for name, plan in plans.items():
        write_set(folder / name, plan)
    opened = {name: TransferSet.open(folder / name) for name in plans}
    for shard in range(3):  # so that growth is what it says
        same = [(folder / name / f"shard-{shard:05d}.safetensors").read_bytes() for name in ("old", "grown")]
        assert same[0] == same[1]
    return opened


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    with running_hub() as hub:
        connect(hub, patch, tmp_path_factory.mktemp("cache"), seconds=0.5)
        yield hub
        disconnect()
        patch.undo()


@pytest.fixture
def fresh(hub):
    """The Hub without repositories, requests and faults."""
    for held in (hub.repositories, hub.blobs, hub.requests, hub.received):
        held.clear()
    hub.fault, hub.killed, hub.pid = lambda number, method, path: None, False, None
    return hub


class Reader:
    """What a reader gets at each revision; equal trees are read once."""

    def __init__(self, sets: dict[str, TransferSet]) -> None:
        self.names = {opened.digest: name for name, opened in sets.items()}
        self.known: dict[str, str] = {}

    def read(self, repository: Repository) -> list[str]:
        states = []
        for commit in repository.commits:
            tree = json.dumps(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in commit.files.items()))
            if tree not in self.known:
                self.known[tree] = self.open(commit.sha)
            states.append(self.known[tree])
        return states

    def open(self, sha: str) -> str:
        try:
            opened = TransferSet.open(NAME, revision=sha, verify="full")
        except TransferSetError as error:
            assert "incomplete" in str(error), error
            return "incomplete"
        assert sum(1 for _ in opened) == len(opened)
        return self.names[opened.digest]


@pytest.fixture(scope="module")
def reader(sets):
    return Reader(sets)


def place(hub: FakeHub, opened: TransferSet) -> None:
    """The set on the Hub, as an earlier push left it."""
    push_transfer_set(opened, NAME)
    hub.requests.clear()


def without_repeats(states: list[str]) -> list[str]:
    return [state for place, state in enumerate(states) if place == 0 or states[place - 1] != state]


def schedule(seed: int):
    """Faults for one sequence: each request may meet one, until a budget is spent."""
    rng = np.random.default_rng([seed, 7])
    left, rate = int(rng.integers(1, 14)), rng.uniform(0.05, 0.5)
    holds = seed % 6 == 0

    def fault(number: int, method: str, path: str) -> str | None:
        nonlocal left, holds
        if left == 0 or rng.random() > rate:
            return None
        left -= 1
        if holds:
            holds = False
            return "hold"
        return FAULTS[rng.integers(len(FAULTS))]

    return fault


def push_in_processes(hub: FakeHub, opened: TransferSet) -> int:
    """As `push_until_done`, each start a process of its own, which the Hub ends by SIGKILL; returns the kills."""
    kills = 0
    for _ in range(60):
        process = multiprocessing.get_context("fork").Process(target=_push_in_child, args=(opened,))
        with hub.lock:  # no request is looked at before the Hub knows whom to kill
            process.start()
            hub.pid = process.pid
        process.join(60)
        hub.pid = None
        if process.exitcode == 0:
            return kills
        kills += process.exitcode == -9
    raise AssertionError("the push does not converge")


def push_until_done(hub: FakeHub, opened: TransferSet) -> int:
    """Start the push again whenever it died or gave up; returns how often it was started."""
    for start in range(1, 60):
        try:
            push_transfer_set(opened, NAME, max_commit_bytes=SMALL_COMMIT)
            return start
        except (Killed, HubError):
            hub.killed = False
    raise AssertionError("the push does not converge")


@pytest.mark.parametrize("block", range(10))  # the first of them in processes of their own
def test_seeded_failures_converge_and_every_revision_is_whole_or_says_that_it_is_not(fresh, sets, reader, block):
    kills = 0
    for seed in range(block * SEQUENCES // 10, (block + 1) * SEQUENCES // 10):
        for held in (fresh.repositories, fresh.blobs):
            held.clear()
        begin = ("", "old", "old", "old")[seed % 4]
        target = ("old", "smaller", "larger", "grown")[seed % 4]
        if begin:
            place(fresh, sets[begin])
        fresh.fault = schedule(seed)
        if block == 0:
            kills += push_in_processes(fresh, sets[target])
        else:
            push_until_done(fresh, sets[target])
        fresh.fault = lambda number, method, path: None
        repository = fresh.repositories["dataset", NAME]
        assert repository.private
        states = reader.read(repository)
        path = without_repeats(states)
        allowed = {
            "old": ["incomplete", "old"],
            "smaller": ["incomplete", "old", "incomplete", "smaller"],
            "larger": ["incomplete", "old", "incomplete", "larger"],
            "grown": ["incomplete", "old", "grown"],  # old shards stay, so there is always a whole set
        }[target]
        assert path == allowed, (seed, [(c.title, s) for c, s in zip(repository.commits, states, strict=True)])
        index_commit = repository.commits[-1]
        before = repository.commits[-2].files
        assert {n for n in index_commit.files if index_commit.files[n] != before.get(n)} == {"index.json"}
        shards = sorted(name for name in index_commit.files if name.startswith("shard-"))
        assert shards == [f"shard-{i:05d}.safetensors" for i in range(sets[target].plan.num_shards)]
    assert (kills > 5) == (block == 0)


def test_a_resumed_push_sends_no_shard_twice(fresh, sets):
    """Killed after every single request in turn, as if each were the last that arrived."""
    sent: Counter[str] = Counter()
    asked = 0

    def fault(number: int, method: str, path: str) -> str | None:
        nonlocal asked
        asked += 1
        if method == "PUT":
            sent[path] += 1
        return "kill after" if asked % 9 == 0 or path.startswith("/api/datasets/user/set/commit") else None

    fresh.fault = fault
    starts = push_until_done(fresh, sets["larger"])
    assert starts > 5
    assert len(sent) == 5 and set(sent.values()) == {1}
    fresh.fault = lambda number, method, path: None
    assert TransferSet.open(NAME).digest == sets["larger"].digest


def _push_in_child(opened: TransferSet) -> None:
    push_transfer_set(opened, NAME, max_commit_bytes=SMALL_COMMIT)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("when", ["kill", "kill after"])
def test_a_process_that_is_really_killed_at_a_commit(fresh, sets, reader, nth, when):
    place(fresh, sets["old"])
    commits = 0

    def fault(number: int, method: str, path: str) -> str | None:
        nonlocal commits
        commits += "/commit/" in path
        return when if commits == nth and "/commit/" in path else None

    process = multiprocessing.get_context("fork").Process(target=_push_in_child, args=(sets["smaller"],))
    fresh.fault = fault
    process.start()
    fresh.pid = process.pid
    process.join(60)
    assert process.exitcode == -9
    fresh.pid, fresh.fault = None, lambda number, method, path: None
    assert set(reader.read(fresh.repositories["dataset", NAME])) <= {"old", "incomplete", "smaller"}
    push_until_done(fresh, sets["smaller"])
    assert reader.read(fresh.repositories["dataset", NAME])[-1] == "smaller"


def test_somebody_else_commits_in_between(fresh, sets, reader):
    """A step that was decided on an old listing is refused by the Hub and decided anew."""
    place(fresh, sets["old"])
    repository = fresh.repositories["dataset", NAME]
    meddled = False

    def fault(number: int, method: str, path: str) -> str | None:
        nonlocal meddled
        if "/commit/" in path and not meddled and len(repository.commits) > 3:
            meddled = True
            # Another process has finished the old set once more.
            whole = next(c for c in reversed(repository.commits) if "index.json" in c.files)
            repository.add("meddle", dict(whole.files))
        return None

    fresh.fault = fault
    push_transfer_set(sets["smaller"], NAME, max_commit_bytes=SMALL_COMMIT)
    assert meddled
    states = reader.read(repository)
    assert without_repeats(states)[-2:] == ["incomplete", "smaller"]


def test_a_push_gives_up_in_words_and_goes_on_later(fresh, sets):
    fresh.fault = lambda number, method, path: "503" if method == "PUT" else None
    with pytest.raises(HubError, match=r"failed 8 times in a row; the same call goes on"):
        push_transfer_set(sets["old"], NAME)
    fresh.fault = lambda number, method, path: None
    push_transfer_set(sets["old"], NAME)
    assert TransferSet.open(NAME).digest == sets["old"].digest


def test_a_refusal_is_not_tried_again(fresh, sets):
    place(fresh, sets["old"])
    fresh.fault = lambda number, method, path: "403" if "/commit/" in path else None
    with pytest.raises(HubError, match="403"):
        push_transfer_set(sets["smaller"], NAME)
    assert fresh.count("POST", "/commit/") == 1
