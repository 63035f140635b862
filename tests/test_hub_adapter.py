"""Adapters on the Hub: pushed by the trainer and the command line, loaded back, and a canary token in none of it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import TOKEN, FakeHub, running_hub
from hub_client import connect, disconnect
from peft import PeftModel
from test_report import LEVELS, build, make_arm
from transfer_sets import write_set
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, TransferSet, capture
from quantkd.cli.main import main
from quantkd.errors import ConfigError, DataError, HubError
from quantkd.hub import load_adapter, push_adapter
from quantkd.hub.secrets import public_name
from quantkd.student import default_quantization_config

PUSHED = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "gap.png", "quantkd.json",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as hub:
        connect(hub, monkeypatch, tmp_path / "cache")
        yield hub
        disconnect()


@pytest.fixture(scope="module")
def transfer_set(tiny_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "set"
    prompts = ["Two and two?", "Why?", "Name a colour.", "One."]
    return capture(str(tiny_model_path), prompts, folder, max_new_tokens=6, dtype="float32", progress=False)


def build_trainer(tiny_model_path, transfer_set, folder, **options):
    settings = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "model_init_kwargs": {"dtype": "float32"},
        "init": "zero",
        "disable_tqdm": True,
        **options,
    }
    args = QuantizedDistillationConfig(str(folder), **settings)
    return QuantizedDistillationTrainer(str(tiny_model_path), args, train_dataset=transfer_set)


@pytest.fixture(scope="module")
def trained_run(tiny_model_path, transfer_set, tmp_path_factory):
    """A run's folder with a report, an adapter in `student`, and what a trainer leaves beside it."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    trainer = build_trainer(tiny_model_path, transfer_set, run / "student", save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    build(run, {name: make_arm(name, *level) for name, level in LEVELS.items()})
    student = run / "student"
    torch.save({"hub_token": TOKEN}, student / "training_args.bin")
    (student / "optimizer.pt").write_text(TOKEN)
    (student / "config.yaml").write_text(f"hub_token: {TOKEN}\n")
    (student / "notes.txt").write_text(TOKEN)
    return run


@pytest.fixture
def run(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "mine")


def files_at(hub: FakeHub, name: str) -> dict[str, bytes]:
    files = hub.repositories["model", name].commits[-1].files
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def load_base(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(
        tiny_model_path, dtype=torch.float32, quantization_config=default_quantization_config(torch.float32)
    )


def test_pushed_and_loaded_back_it_gives_the_same_logits(hub, run, tiny_model_path, transfer_set, caplog):
    pushed = push_adapter(run, "user/student", licence="apache-2.0")
    repository = hub.repositories["model", "user/student"]
    assert repository.private and len(repository.commits) == 2  # the server's own, and ours
    files = files_at(hub, "user/student")
    assert set(files) == PUSHED
    assert files["adapter_model.safetensors"] == (run / "student" / "adapter_model.safetensors").read_bytes()

    with caplog.at_level("INFO", logger="quantkd.hub"):
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


def test_the_page(hub, run, transfer_set):
    push_adapter(run / "student", "user/student", licence="apache-2.0", base_model="maker/base")
    files = files_at(hub, "user/student")
    _, front, text = files["README.md"].decode().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["license"] == "apache-2.0" and metadata["base_model"] == "maker/base"
    assert set(metadata["tags"]) >= {"quantkd", "distillation", "4-bit"}
    results = metadata["model-index"][0]["results"]
    measured = {metric["name"]: metric["value"] for result in results for metric in result["metrics"]}
    report = json.loads((run / "results.json").read_text())
    expected = {report["metrics"][key]: one["value"] for key, one in report["arms"]["after"]["metrics"].items()}
    assert measured == expected and len(measured) >= 4
    for fact in (
        transfer_set.digest, "learning_rate", "0.01", "alpha", "gap recovered", "](gap.png)", "BitsAndBytesConfig",
        "bnb_4bit_compute_dtype=torch.float32", 'PeftModel.from_pretrained(base, "user/student")', "## Limits",
    ):  # fmt: skip
        assert fact in text, fact
    blocks = text.split("```python\n")[1:]
    assert blocks
    for block in blocks:
        compile(block.split("```")[0], "card", "exec")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "maker/base"


def test_the_page_of_an_adapter_without_a_report(hub, run):
    (run / "results.json").unlink()
    (run / "student" / "quantkd.json").unlink()
    push_adapter(run / "student", "user/student")
    files = files_at(hub, "user/student")
    text = files["README.md"].decode()
    assert "gap.png" not in files and "quantkd.json" not in files
    metadata = yaml.safe_load(text.split("---\n", 2)[1])
    assert "license" not in metadata and "model-index" not in metadata and "base_model" not in metadata
    assert "No evaluation was pushed" in text and "Not stated" in text and "not recorded" in text


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
    with pytest.raises(HubError, match="stopped after 8 failures in a row"):
        push_adapter(run, "user/student", licence="mit")


def test_nothing_becomes_public_by_mistake(hub, run):
    hub.make("model", "user/open", {}, private=False)
    with pytest.raises(ConfigError, match=r"user/open is public.*--public"):
        push_adapter(run, "user/open")
    assert len(hub.repositories["model", "user/open"].commits) == 1
    push_adapter(run, "user/open", private=False)


def test_a_pickled_adapter_is_not_pushed(hub, run):
    (run / "student" / "adapter_model.safetensors").rename(run / "student" / "adapter_model.bin")
    with pytest.raises(DataError, match=r"adapter_model.bin, a pickle; expected adapter_model.safetensors"):
        push_adapter(run, "user/student")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config.json", json.dumps({"note": TOKEN})),
        ("tokenizer_config.json", json.dumps({"note": "hf_" + "x" * 34})),
        ("tokenizer_config.json", json.dumps({"note": str(Path.home() / "models")})),
        ("chat_template.jinja", f"{{# {TOKEN} #}}"),
        ("quantkd.json", json.dumps({"training": {"token": TOKEN}})),
        ("adapter_config.json", json.dumps({"base_model_name_or_path": "b", "peft_type": "LORA", "x": TOKEN})),
    ],
)
def test_a_file_that_holds_a_secret_stays_here(hub, run, name, text):
    (run / "student" / name).write_text(text)
    with pytest.raises(ConfigError, match=f"{name}|README.md") as caught:
        push_adapter(run, "user/student")
    assert TOKEN not in str(caught.value)
    assert hub.requests == []


def test_the_trainer_pushes_by_name_and_into_a_private_repository(hub, tiny_model_path, transfer_set, tmp_path):
    trainer = build_trainer(
        tiny_model_path, transfer_set, tmp_path / "student", push_to_hub=True, hub_model_id="user/student",
        hub_token=TOKEN, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    assert hub.repositories["model", "user/student"].private  # made when the trainer was
    trainer.train()
    pushed = trainer.push_to_hub(licence="mit")
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
    commit = transfer_set.push_to_hub("user/set").commit
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
    main(["push", str(run), "user/student", "--licence", "mit"])
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


def test_a_canary_token_is_found_nowhere(
    hub, run, tiny_model_path, transfer_set, tmp_path, caplog, capfd, monkeypatch
):  # fmt: skip
    """In the environment, as an argument, in the training configuration, and in what the server answers."""
    monkeypatch.setenv("MY_SERVICE_API_KEY", "canary-0123456789-canary")
    caplog.set_level(logging.DEBUG)
    for name in ("quantkd.hub", "huggingface_hub", "transformers"):
        caplog.set_level(logging.DEBUG, logger=name)
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    hub.echo = f"with {TOKEN}, nor with canary-0123456789-canary"
    said = []
    faults = iter(["503", None, "429"])
    hub.fault = lambda number, method, path: next(faults, None)
    transfer_set.push_to_hub("user/set", token=TOKEN)
    trainer = build_trainer(
        tiny_model_path, transfer_set, tmp_path / "student", push_to_hub=True, hub_model_id="user/trained",
        hub_token=TOKEN, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    push_adapter(run, "user/student", token=TOKEN)
    list(TransferSet.open("user/set", token=TOKEN))
    load_adapter(load_base(tiny_model_path), "user/student", token=TOKEN)
    for fault in ("400", "403", "503"):
        hub.fault = lambda number, method, path, fault=fault: fault
        for attempt in (
            lambda: push_adapter(run, "user/student", token=TOKEN),
            lambda: transfer_set.push_to_hub("user/set", token=TOKEN, licence="mit"),
            lambda: TransferSet.open("user/none", token=TOKEN),
        ):
            with pytest.raises(HubError) as caught:
                attempt()
            said.append("".join(traceback.format_exception(caught.value)))
    assert "[secret]" in "".join(said)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError) as caught:
        main(["--traceback", "push", str(run), "user/student"])
    said.append("".join(traceback.format_exception(caught.value)))
    with pytest.raises(SystemExit):
        main(["push", str(run), "user/student"])
    assert "nor with [secret]" in "".join(said)
    captured = capfd.readouterr()
    printed = "\n".join([*said, captured.out, captured.err, *(record.getMessage() for record in caplog.records)])
    sent = b"\n".join(hub.received)
    assert len(sent) > 10**5
    for secret in (TOKEN, "canary-0123456789-canary"):
        assert secret not in printed
        assert secret.encode() not in sent
    places = [str(Path.home()) + "/", str(tmp_path), str(tiny_model_path.parent)]
    host = socket.gethostname()
    for place in [*places, *([host] if len(host) > 5 else [])]:
        assert place.encode() not in sent, place


def test_public_names():
    assert public_name("maker/model") == "maker/model"
    assert public_name("gone") == "gone"
    assert public_name("/srv/gone/models/llama-8b/") == "llama-8b"
    assert public_name("../gone/models/llama-8b") == "llama-8b"
    assert public_name("C:\\gone\\llama-8b") == "llama-8b"
