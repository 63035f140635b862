"""Transfer sets on the Hub: the real client against the small Hub of fake_hub.py."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from fake_hub import TOKEN
from hostile_sets import seal
from hub_runs import damage, read_page
from huggingface_hub import constants, get_session
from transfer_sets import make_plan, write_set

from quantkd import TransferSet
from quantkd.errors import ConfigError, HubError, TransferSetError
from quantkd.hub import push_transfer_set
from quantkd.remote import TransientHubError, hub_errors
from quantkd.transfer_set import verify
from tests.conftest import refused

pytest_plugins = ["hub_runs"]


def files_of(opened):
    return {file.name: file.read_bytes() for file in opened.sources[0].path.iterdir() if file.is_file()}


def assert_equal(first, second):
    assert first.digest == second.digest
    np.testing.assert_equal(*([vars(row) for row in each.rows(range(len(each)))] for each in (first, second)))


def test_pushed_and_opened_again_it_is_the_same_set(hub, small_set, caplog):
    pushed = push_transfer_set(small_set, "set", license="mit")  # the owner is the token's
    repository = hub.repositories["dataset", "user/set"]
    assert pushed.repo_id == "user/set" and repository.private and pushed.private
    assert pushed.commit == repository.commits[-1].sha and pushed.commit in str(pushed)
    stored = hub.files("dataset", "user/set")
    assert '"user/set"' in stored.pop("README.md").decode() and stored == files_of(small_set)
    with caplog.at_level("INFO", logger="quantkd.remote"):
        opened = TransferSet.open("user/set", digest=small_set.digest)
    assert f"user/set at {pushed.commit}, digest {small_set.digest}" in caplog.text
    assert str(opened.sources[0]) == f"user/set at {pushed.commit}"
    assert_equal(opened, small_set)
    assert opened.info == small_set.info and verify("user/set").digest == small_set.digest


def test_shards_come_when_they_are_touched_and_the_token_stays_here(hub, small_set):
    commit = push_transfer_set(small_set, "user/set").commit
    hub.requests.clear()
    opened = TransferSet.open("user/set", token=TOKEN)
    assert len(opened) == 10 and opened.info.num_tokens == small_set.info.num_tokens
    assert hub.count("GET", r"\.safetensors$") == 0
    opened[5], opened[4], opened[6]
    assert hub.count("GET", r"\.safetensors$") == 1 == hub.count("GET", f"user/set/resolve/{commit}/shard-00001.safe")
    data = pickle.dumps(opened)  # as it travels to other processes
    assert TOKEN.encode() not in data
    assert_equal(pickle.loads(data), small_set)


def test_the_revision_is_fixed_when_the_set_is_opened(hub, small_set, tmp_path):
    first = push_transfer_set(small_set, "user/set").commit
    opened = TransferSet.open("user/set")
    other = write_set(tmp_path / "other", make_plan(prompts_digest="2" * 64, num_prompts=5))
    push_transfer_set(other, "user/set")
    assert_equal(opened, small_set)  # read after the branch has moved on
    assert_equal(TransferSet.open("user/set"), other)
    assert_equal(TransferSet.open("user/set", revision=first), small_set)
    digests = f"has the digest {other.digest}; expected {small_set.digest}"
    refused(TransferSetError, digests, TransferSet.open, "user/set", digest=small_set.digest)
    pushed = push_transfer_set(small_set, "user/set", revision="v2")  # a branch of its own
    assert TransferSet.open("user/set").digest == other.digest
    assert TransferSet.open("user/set", revision="v2").digest == small_set.digest
    assert str(TransferSet.open("user/set@v2").sources[0]) == f"user/set at {pushed.commit}"
    refused(ConfigError, "names one revision", TransferSet.open, "user/set@v2", revision="main")
    refused(HubError, r"no folder 'user/absent' here. On the Hub", TransferSet.open, "user/absent")
    refused(HubError, "Revision", TransferSet.open, "user/set", revision="v9")


def test_offline_or_while_the_hub_is_down_it_comes_from_the_cache(hub, small_set, monkeypatch, caplog):
    commit = push_transfer_set(small_set, "user/set").commit
    list(TransferSet.open("user/set"))
    hub.fault = lambda number, method, path: "503"
    assert_equal(TransferSet.open("user/set"), small_set)
    assert "from the cache" in caplog.text
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        opened = TransferSet.open("user/set", revision=revision)
        assert str(opened.sources[0]) == f"user/set at {commit}"
        assert_equal(opened, small_set)
    assert hub.requests == []
    refused(HubError, r"no folder 'user/other' here.*HF_HUB_OFFLINE", TransferSet.open, "user/other")


def test_the_page(hub, small_set):
    push_transfer_set(small_set, "user/set")
    repository = hub.repositories["dataset", "user/set"]
    page = hub.files("dataset", "user/set")["README.md"].decode()
    assert "license" not in page.split("---\n", 2)[1] and "Not stated" in page
    commits = len(repository.commits)
    push_transfer_set(small_set, "user/set")  # pushed again, nothing changes
    assert len(repository.commits) == commits
    push_transfer_set(small_set, "user/set", license="mit")  # the page alone
    assert len(repository.commits) == commits + 1
    assert repository.commits[-1].files["index.json"] == repository.commits[-2].files["index.json"]
    metadata, text = read_page(hub.files("dataset", "user/set"))
    assert metadata["license"] == "mit" and {"quantkd", "distillation"} <= set(metadata["tags"])
    size = f"{small_set.info.num_bytes:,} bytes"
    for fact in (small_set.digest, "contains its training text", "tiny-teacher", "nucleus", "0" * 64, size):
        assert fact in text
    refused(ConfigError, "short name of the Hub's list", push_transfer_set, small_set, "user/set", license="My Own!")


def test_a_folder_wins_and_only_whole_and_sound_sets_are_pushed(hub, small_set, tmp_path, monkeypatch):
    shutil.copytree(tmp_path / "small", tmp_path / "user" / "set")
    monkeypatch.chdir(tmp_path)
    assert_equal(TransferSet.open("user/set", digest=small_set.digest), small_set)
    refused(ConfigError, "only a repository on the Hub has one", TransferSet.open, "user/set", revision="main")
    for view in (small_set[:5], small_set[::-1], TransferSet.concatenate([small_set, small_set])):
        refused(ConfigError, "cannot be pushed", push_transfer_set, view, "user/set")
    shard = tmp_path / "small" / "shard-00001.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    refused(TransferSetError, "damaged", push_transfer_set, small_set, "user/set")
    told = write_set(tmp_path / "told", make_plan(teacher_name=str(Path.home() / "models" / "llama")))
    refused(ConfigError, r"index\.json names your home folder", push_transfer_set, told, "user/set")
    assert hub.requests == []


SHARD = "shard-0000{}.safetensors"


def test_a_changed_shard_or_index_is_refused(hub, small_set):
    name, files = SHARD.format(1), files_of(small_set)
    hub.make("dataset", "user/bad", {**files, name: damage(files[name])})
    opened = TransferSet.open("user/bad", verify="off")
    opened[0]
    for touch in (lambda: verify("user/bad"), lambda: opened[5], lambda: TransferSet.open("user/bad", verify="full")):
        refused(TransferSetError, "sha256", touch)
    index = json.loads(files["index.json"])
    index["counters"]["responses_cut"] = 0
    plain = json.dumps(index, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    hub.make("dataset", "user/changed", {**files, "index.json": plain})
    refused(TransferSetError, "changed or damaged", TransferSet.open, "user/changed")
    # A forger puts the digest right, too; only who knows the digest notices.
    hub.make("dataset", "user/forged", {**files, "index.json": seal(index)})
    assert TransferSet.open("user/forged").digest != small_set.digest
    refused(TransferSetError, f"expected {small_set.digest}", TransferSet.open, "user/forged", digest=small_set.digest)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"index.json": b" " * (2**21 + 1)}, HubError, "expected at most 2097152"),
    ({SHARD.format(1): bytes(10**6)}, HubError, r"has 1000000 bytes; expected at most 1\d\d\d\."),
    ({SHARD.format(2): None}, TransferSetError, "holds no shard-00002.safetensors, which its index lists"),
    ({"index.json": None}, TransferSetError, "user/bad at main is incomplete"),
])  # fmt: skip
def test_what_is_too_large_is_not_fetched_and_what_is_missing_is_named(hub, small_set, changes, error, message):
    files = {**files_of(small_set), **changes}
    hub.make("dataset", "user/bad", {name: data for name, data in files.items() if data is not None})
    refused(error, message, lambda: list(TransferSet.open("user/bad")))
    assert hub.count("GET", next(iter(changes))) == 0


def test_a_connection_that_fails_is_worth_another_try_and_a_bug_or_a_full_disk_is_not(hub):
    """As the client's HTTP library raises it, and as an upload wraps it."""
    for error in (TypeError("a bug"), RuntimeError("a bug"), OSError(28, "No space left on device")):
        with pytest.raises(type(error)) as caught, hub_errors("push"):
            raise error
        assert caught.value is error
    for wrapped in (False, True):
        with pytest.raises(TransientHubError, match="Could not push: "), hub_errors("push"):
            try:
                get_session().get("http://127.0.0.1:9")
            except Exception as error:
                raise (RuntimeError("Error while uploading 'x' to the Hub.") if wrapped else error) from error
