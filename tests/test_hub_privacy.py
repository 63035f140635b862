"""What must not leave: tokens, home folders, host names; in nothing that is pushed, printed or kept."""

import json
import logging
import socket
import traceback
from pathlib import Path

import pytest
from fake_hub import TOKEN

from quantkd import TransferSet
from quantkd.cli.main import main
from quantkd.errors import ConfigError, HubError
from quantkd.hub import load_adapter, push_adapter, push_transfer_set
from quantkd.models.provenance import name_base_model
from quantkd.names import public_name
from quantkd.remote import check_shareable, find_secrets
from tests.conftest import refused

pytest_plugins = ["hub_runs"]
HOME = str(Path.home())


@pytest.mark.parametrize(("name", "text"), [
    ("chat_template.jinja", f"{{# {TOKEN} #}}"), ("quantkd.json", json.dumps({"training": {"token": TOKEN}})),
    ("adapter_config.json", json.dumps({"base_model_name_or_path": "b", "peft_type": "LORA", "x": TOKEN})),
    *(("tokenizer_config.json", json.dumps({"note": note})) for note in (TOKEN, "hf_" + "x" * 34, HOME + "/models")),
])  # fmt: skip
def test_a_file_that_holds_a_secret_stays_here(hub, run, name, text):
    (run / "student" / name).write_text(text)
    error = refused(ConfigError, f"{name}|README.md", push_adapter, run, "user/student")
    assert TOKEN not in str(error) and hub.requests == []


def test_a_canary_token_is_found_nowhere(
    hub, run, build_trainer, load_base, tiny_model_path, training_set, tmp_path, caplog, capfd, monkeypatch
):  # fmt: skip
    """In the environment, as an argument, in the training configuration, and in what the server answers."""
    monkeypatch.setenv("MY_SERVICE_API_KEY", "canary-0123456789-canary")
    caplog.set_level(logging.DEBUG)
    for name in ("quantkd.remote", "quantkd.hub", "huggingface_hub", "transformers"):
        caplog.set_level(logging.DEBUG, logger=name)
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    hub.echo = f"with {TOKEN}, nor with canary-0123456789-canary"
    said = []
    hub.fail("503", None, "429")
    push_transfer_set(training_set, "user/set", token=TOKEN)
    saving = {"push_to_hub": True, "hub_token": TOKEN, "save_strategy": "steps", "save_steps": 1}
    trainer = build_trainer(tmp_path / "student", hub_model_id="user/trained", **saving)
    trainer.train()
    trainer.push_to_hub()
    push_adapter(run, "user/student", token=TOKEN)
    list(TransferSet.open("user/set", token=TOKEN))
    load_adapter(load_base(), "user/student", token=TOKEN)
    for fault in ("400", "403", "503"):
        hub.fault = lambda number, method, path, fault=fault: fault
        for attempt in (
            lambda: push_adapter(run, "user/student", token=TOKEN),
            lambda: push_transfer_set(training_set, "user/set", token=TOKEN, license="mit"),
            lambda: TransferSet.open("user/none", token=TOKEN),
        ):
            said += traceback.format_exception(refused(HubError, "Could not", attempt))
    assert "[secret]" in "".join(said)
    monkeypatch.chdir(tmp_path)
    words = ["push", str(run), "user/student"]
    said += traceback.format_exception(refused(HubError, "Could not", main, ["--traceback", *words]))
    refused(SystemExit, "1", main, words)
    assert "nor with [secret]" in "".join(said)
    captured = capfd.readouterr()
    printed = "\n".join([*said, captured.out, captured.err, *(record.getMessage() for record in caplog.records)])
    sent = b"\n".join(hub.received)
    assert len(sent) > 10**5
    secrets, host = [TOKEN, "canary-0123456789-canary"], socket.gethostname()
    assert [secret for secret in secrets if secret in printed] == []
    secrets += [HOME + "/", str(tmp_path), str(tiny_model_path.parent), *([host] if len(host) > 5 else [])]
    assert [secret for secret in secrets if secret.encode() in sent] == []


@pytest.mark.parametrize(("name", "value", "is_secret"), [
    ("MY_CREDENTIALS", "abcdef123456", True), ("DEPLOY_KEY", "abcdef123456", True), ("GH_PAT", "abcdef123456", True),
    ("DB_PASSWORD", "correcthorsebatterystaple", True), ("TOKENIZERS_PARALLELISM", "abcdef123456", False),
    ("MAX_TOKENS", "1000000000", False), ("TOKEN_STYLE", "capitalised", False), ("KEYBOARD", "abcdef123456", False),
    ("API_KEY_FILE", "/run/secrets/key", False), ("AWS_SECRET_ACCESS_KEY", "/wJalrXUtnFEMI", True),
    ("SLACK_SECRET_PATH", "T000aaaa/B000bbbb", True), ("MY_CREDENTIALS", "/usr/lib", False),
])  # fmt: skip
def test_which_variables_hold_a_secret(monkeypatch, name, value, is_secret):
    monkeypatch.setenv(name, value)
    assert (value in find_secrets()) == is_secret


def test_a_secret_and_a_home_folder_are_found_as_json_spells_them(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", 'caf\u00e9"horse')
    monkeypatch.setenv("HOME", "/data/j\u00fcrgen")
    for value, said in (('caf\u00e9"horse', "the value of DB_PASSWORD"), ("/data/j\u00fcrgen/x", "names your home")):
        refused(ConfigError, said, check_shareable, "a.json", json.dumps({"a": value}).encode(), find_secrets())


@pytest.mark.parametrize(("name", "public"), [
    ("maker/model", "maker/model"), ("maker/model@v2", "maker/model@v2"), ("qwen2.5:7b", "qwen2.5:7b"),
    ("gone", "gone"), ("", ""), ("/srv/gone/models/llama-8b/", "llama-8b"), ("../gone/llama-8b", "llama-8b"),
    ("~/llama-8b", "llama-8b"), ("a/b/c", "c"), ("C:\\gone\\llama-8b", "llama-8b"), ("C:/gone", "gone"),
])  # fmt: skip
def test_public_names(name, public, tmp_path, monkeypatch):
    assert public_name(name) == public
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maker" / "model").mkdir(parents=True)
    assert public_name("maker/model") == "model" and public_name("maker/..") == tmp_path.name


def test_a_base_model_s_folder_is_named_alone_also_where_json_escapes_its_letters(tmp_path):
    (tmp_path / "README.md").write_text("base_model: /data/jürgen/llama-8b")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/data/jürgen/llama-8b"}))
    name_base_model(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {"base_model_name_or_path": "llama-8b"}
    assert (tmp_path / "README.md").read_text() == "base_model: llama-8b"
