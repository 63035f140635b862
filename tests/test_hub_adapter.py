"""Adapters on the Hub: pushed by the trainer and the command line, and loaded back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import TOKEN, FakeHub
from hub_runs import PUSHED, build_trainer, files_at, load_base
from peft import PeftModel
from transfer_sets import make_plan, write_set
from transformers import AutoTokenizer

from quantkd import TransferSet
from quantkd.cli.main import main
from quantkd.errors import ConfigError, DataError, HubError
from quantkd.hub import load_adapter, push_adapter, push_transfer_set

pytest_plugins = ["hub_runs"]


def test_pushed_and_loaded_back_it_gives_the_same_logits(hub, run, tiny_model_path, transfer_set, caplog):
    pushed = push_adapter(run, "user/student", license="apache-2.0")
    repository = hub.repositories["model", "user/student"]
    assert repository.private and len(repository.commits) == 2  # the server's own, and ours
    files = files_at(hub, "user/student")
    assert set(files) == PUSHED
    assert files["adapter_model.safetensors"] == (run / "student" / "adapter_model.safetensors").read_bytes()

    with caplog.at_level("INFO", logger="quantkd.remote"):
        ours = load_adapter(load_base(tiny_model_path), "user/student")
    assert f"Adapter user/student at {pushed.commit}" in caplog.text
    assert ours.hub_revision == f"user/student at {pushed.commit}"
    local = PeftModel.from_pretrained(load_base(tiny_model_path), run / "student").eval()
    plain = PeftModel.from_pretrained(load_base(tiny_model_path), "user/student", revision=pushed.commit).eval()
    ids = transfer_set[0]["input_ids"].unsqueeze(0)
    with torch.inference_mode():
        expected = local(input_ids=ids).logits
        assert torch.equal(ours(input_ids=ids).logits, expected)
        assert torch.equal(plain(input_ids=ids).logits, expected)
        assert not torch.equal(load_base(tiny_model_path)(input_ids=ids).logits, expected)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    trainable = load_adapter(load_base(tiny_model_path), "user/student", is_trainable=True)
    assert any(parameter.requires_grad for parameter in trainable.parameters())
    tokenizer = AutoTokenizer.from_pretrained(Path(ours_folder(hub, files, run)))
    messages = [{"role": "user", "content": "Why?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).startswith(
        "<|im_start|>"
    )


def ours_folder(hub: FakeHub, files: dict[str, bytes], run: Path) -> Path:
    folder = run.parent / "fetched"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_report_above_two_adapters_belongs_to_neither(hub, run):
    shutil.copytree(run / "student", run / "other")
    with pytest.raises(DataError, match="the adapters other, student; expected one"):
        push_adapter(run, "user/student")
    push_adapter(run / "student", "user/student")
    assert "gap.png" not in files_at(hub, "user/student")
    push_adapter(run / "student", "user/student", run_dir=run)
    assert "gap.png" in files_at(hub, "user/student")


def test_a_later_push_takes_what_it_does_not_bring(hub, run):
    push_adapter(run, "user/student")
    hub.repositories["model", "user/student"].commits[-1].files["mine.txt"] = b"kept"
    (run / "results.json").unlink()
    push_adapter(run, "user/student")
    assert set(files_at(hub, "user/student")) == PUSHED - {"gap.png"} | {"mine.txt"}


def test_failures_on_the_way(hub, run):
    faults = iter(["503", "reset", "429", None, "lost", None, None, "lost", None, "reset"])
    hub.fault = lambda number, method, path: next(faults, None)
    pushed = push_adapter(run, "user/student")
    assert set(files_at(hub, "user/student")) == PUSHED
    assert pushed.commit == hub.repositories["model", "user/student"].commits[-1].sha
    hub.fault = lambda number, method, path: "503"
    with pytest.raises(HubError, match="failed 8 times in a row"):
        push_adapter(run, "user/student", license="mit")


def test_nothing_becomes_public_by_mistake(hub, run):
    hub.make("model", "user/open", {}, private=False)
    with pytest.raises(ConfigError, match=r"user/open is public.*--public"):
        push_adapter(run, "user/open")
    assert len(hub.repositories["model", "user/open"].commits) == 1
    push_adapter(run, "user/open", private=False)


def test_a_repository_that_holds_something_else_is_left_alone(hub, run, tmp_path):
    files = {"README.md": b"mine", "config.json": b"{}", "data/x.bin": b"1"}
    for kind in ("model", "dataset"):
        hub.make(kind, "user/other", files)
        hub.make(kind, "user/blank", {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT"})
    hub.make("dataset", "user/folder", {"data/x.parquet": b"1"})
    write_set(tmp_path / "set")
    opened = TransferSet(tmp_path / "set")
    with pytest.raises(
        ConfigError, match=r"user/other holds config.json, data/x.bin, and no adapter; .*Choose another name"
    ):
        push_adapter(run, "user/other")
    with pytest.raises(ConfigError, match=r"user/other holds config.json, data/x.bin, and no transfer set"):
        push_transfer_set(opened, "user/other")
    with pytest.raises(ConfigError, match=r"user/folder holds data/x.parquet, and no transfer set"):
        push_transfer_set(opened, "user/folder")
    assert all(len(hub.repositories[kind, "user/other"].commits) == 2 for kind in ("model", "dataset"))
    push_adapter(run, "user/blank")
    push_transfer_set(opened, "user/blank")
    assert TransferSet.open("user/blank").digest == opened.digest


def test_a_branch_of_its_own(hub, run, tmp_path):
    write_set(tmp_path / "set")
    opened = TransferSet(tmp_path / "set")
    push_transfer_set(opened, "user/set")
    write_set(tmp_path / "other", make_plan(prompts_digest="2" * 64, num_prompts=5))
    other = TransferSet(tmp_path / "other")
    pushed = push_transfer_set(other, "user/set", revision="v2")
    assert TransferSet.open("user/set").digest == opened.digest
    assert TransferSet.open("user/set", revision="v2").digest == TransferSet.open("user/set@v2").digest == other.digest
    assert str(TransferSet.open("user/set@v2").sources[0]) == f"user/set at {pushed.commit}"
    with pytest.raises(ConfigError, match="names one revision"):
        TransferSet.open("user/set@v2", revision="main")
    assert push_adapter(run, "user/student", revision="v2").commit
    branches = hub.repositories["model", "user/student"].branches
    assert set(branches["v2"].files) - {".gitattributes"} == PUSHED and set(branches["main"].files) == {
        ".gitattributes"
    }


def test_without_a_token_it_says_what_to_do(hub, run, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    write_set(tmp_path / "set")
    for words in (
        ["push", str(tmp_path / "set"), "user/set"],
        ["push", str(run), "user/student"],
        ["push", str(run), "s"],
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert "no token to push to" in (said := capsys.readouterr().err) and "`hf auth login`, or set HF_TOKEN" in said
    assert hub.requests == []


def test_a_pickled_adapter_is_not_pushed(hub, run):
    (run / "student" / "adapter_model.safetensors").rename(run / "student" / "adapter_model.bin")
    with pytest.raises(DataError, match=r"adapter_model.bin, a pickle.*expected adapter_model.safetensors"):
        push_adapter(run, "user/student")
    assert hub.requests == []


def test_the_trainer_pushes_by_name_and_into_a_private_repository(hub, tiny_model_path, transfer_set, tmp_path):
    trainer = build_trainer(
        tiny_model_path, transfer_set, tmp_path / "student", push_to_hub=True, hub_model_id="user/student",
        hub_token=TOKEN, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    assert hub.repositories["model", "user/student"].private  # made when the trainer was
    trainer.train()
    with pytest.raises(TypeError, match="unexpected keyword argument 'dataset_name'"):
        trainer.push_to_hub(dataset_name="gsm8k")
    pushed = trainer.push_to_hub(license="mit")
    repository = hub.repositories["model", "user/student"]
    titles = [commit.title for commit in repository.commits]
    assert titles == [
        "initial commit",
        "Training in progress, step 1",
        "Training in progress, step 2",
        "End of training",
    ]
    assert pushed.commit == repository.commits[-1].sha
    for commit in repository.commits:
        assert set(commit.files) <= {*PUSHED, ".gitattributes"}
    assert b"license: mit" in repository.commits[-1].files["README.md"]


def test_a_failed_push_does_not_end_the_training(hub, tiny_model_path, transfer_set, tmp_path, caplog):
    trainer = build_trainer(
        tiny_model_path, transfer_set, tmp_path / "student", push_to_hub=True, hub_model_id="user/student",
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    hub.fault = lambda number, method, path: "503"
    trainer.train()
    assert trainer.state.global_step == 2
    assert "Training goes on" in caplog.text


def test_strategies_that_upload_optimizer_states_are_refused(hub, tiny_model_path, transfer_set, tmp_path):
    with pytest.raises(ConfigError, match="optimizer and random states"):
        build_trainer(
            tiny_model_path, transfer_set, tmp_path / "s", push_to_hub=True, hub_strategy="all_checkpoints"
        )  # fmt: skip


def test_the_trainer_s_default_is_private_and_public_needs_saying(hub, tiny_model_path, transfer_set, tmp_path):
    hub.make("model", "user/open", {}, private=False)
    with pytest.raises(ConfigError, match="is public"):
        build_trainer(tiny_model_path, transfer_set, tmp_path / "s", push_to_hub=True, hub_model_id="user/open")
    trainer = build_trainer(
        tiny_model_path, transfer_set, tmp_path / "s", hub_model_id="user/open", hub_private_repo=False
    )  # fmt: skip
    assert not trainer.push_to_hub().private


def test_what_was_learned_from_a_set_on_the_hub_is_named_with_its_commit(
    hub, tiny_model_path, transfer_set, tmp_path
):  # fmt: skip
    commit = push_transfer_set(transfer_set, "user/set").commit
    trainer = build_trainer(tiny_model_path, TransferSet.open("user/set"), tmp_path / "student")
    trainer.train()
    trainer.push_to_hub()
    files = files_at(hub, "user/student")
    assert json.loads(files["quantkd.json"])["transfer_set"] == f"user/set at {commit}"
    assert yaml.safe_load(files["README.md"].decode().split("---\n", 2)[1])["datasets"] == ["user/set"]


def test_the_command_line(hub, run, tmp_path, capsys, monkeypatch):
    write_set(tmp_path / "set")
    main(["push", str(run), "user/student", "--dry_run"])
    listed = capsys.readouterr().out
    assert {line.split()[-1] for line in listed.splitlines()[:-1]} == PUSHED
    assert "would go to user/student (private)" in listed
    main(["push", str(tmp_path / "set"), "user/set", "--dry_run", "--public"])
    assert "5 files" in (text := capsys.readouterr().out) and "(public)" in text
    assert hub.requests == []
    main(["push", str(run), "user/student", "--license", "mit"])
    main(["push", str(tmp_path / "set"), "user/set", "--public"])
    said = capsys.readouterr().out
    assert (
        f"{hub.endpoint}/user/student at {hub.repositories['model', 'user/student'].commits[-1].sha} (private)" in said
    )
    assert not hub.repositories["dataset", "user/set"].private
    with pytest.raises(SystemExit) as stop:
        main(["push", str(tmp_path / "set"), "user/set"])
    assert stop.value.code == 1 and "--public" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["push", str(tmp_path / "set"), "user/set", "--base_model", "x"])
    with pytest.raises(SystemExit):
        main(["push", str(tmp_path), "user/set"])
    assert "expected one adapter" in capsys.readouterr().err
    main(["inspect", "user/set", "--rows", "0"])
    assert f"user/set at {hub.repositories['dataset', 'user/set'].commits[-1].sha}" in capsys.readouterr().err


def test_the_command_line_in_a_process_of_its_own(hub, tmp_path):
    """With the environment that a user sets, and nothing patched."""
    write_set(tmp_path / "set")
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    environment = {**os.environ, **settings, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    command = [sys.executable, "-m", "quantkd", "push", str(tmp_path / "set"), "user/set"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert hub.repositories["dataset", "user/set"].commits[-1].sha in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert TransferSet.open("user/set").digest == TransferSet(tmp_path / "set").digest
