"""A stranger's adapter: the base model is the caller's, no pickle is opened, no code of theirs runs."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
import torch
from fake_hub import running_hub
from hub_client import connect, disconnect
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save
from transfer_sets import write_set

from quantkd import TransferSet
from quantkd.errors import ConfigError, DataError, HubError
from quantkd.hub import load_adapter
from quantkd.models.student import load_student
from quantkd.teacher import load_teacher


class PickleWatch:
    """An audit hook that notes what pickle looks up, and modules that are imported, while it is on."""

    def __init__(self) -> None:
        self.on, self.found, self.imported = False, list[str](), list[str]()
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple) -> None:
        if self.on and event == "pickle.find_class":
            self.found.append(str(args))
        if self.on and event == "import":
            self.imported.append(str(args[0]))

    def __enter__(self) -> PickleWatch:
        self.found, self.imported, self.on = [], [], True
        return self

    def __exit__(self, *error: object) -> None:
        self.on = False


@pytest.fixture(scope="module")
def watch():
    return PickleWatch()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as hub:
        connect(hub, monkeypatch, tmp_path / "cache")
        yield hub
        disconnect()


@pytest.fixture(scope="module")
def files(tiny_tokenizer, tmp_path_factory):
    """The two files of a small, honest adapter."""
    from conftest import build_tiny_model

    folder = tmp_path_factory.mktemp("adapter")
    model = build_tiny_model(tiny_tokenizer)
    model.config.name_or_path = "maker/tiny"
    torch.manual_seed(0)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


def with_config(files, **changes):
    fields = {**json.loads(files["adapter_config.json"]), **changes}
    return {**files, "adapter_config.json": json.dumps(fields).encode()}


class Trap:
    """Opened as a pickle, it would raise from inside the unpickler."""

    def __reduce__(self):
        return (exec, ("raise AssertionError('a pickle was opened')",))


def test_the_watch_sees_a_pickle(watch):
    data = pickle.dumps(Trap())
    with watch, pytest.raises(AssertionError, match="a pickle was opened"):
        pickle.loads(data)
    assert watch.found


def test_no_pickle_is_opened(hub, files, watch, tiny_model, tmp_path):
    trap = pickle.dumps(Trap())
    traps = {"adapter_model.bin": trap, "training_args.bin": trap, "optimizer.pt": trap, "pytorch_model.bin": trap}
    hub.make("model", "user/trap", {**files, **traps}, private=False)
    write_set(tmp_path / "set")
    folder = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    hub.make("dataset", "user/trap", {**folder, **traps, "set.py": b"raise AssertionError"}, private=False)
    with watch:
        loaded = load_adapter(tiny_model, "user/trap")
        rows = list(TransferSet.open("user/trap"))
    assert watch.found == [] and len(rows) == 10
    expected = load_file_bytes(files["adapter_model.safetensors"], tmp_path)
    state = {name.replace(".default", ""): value for name, value in loaded.state_dict().items() if "lora_" in name}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not [path for verb, path in hub.requests if path.endswith((".bin", ".pt", ".py"))]


@pytest.mark.parametrize("load", [load_teacher, load_student])
def test_an_adapter_s_own_base_model_is_not_followed(hub, files, load):
    hub.make("model", "user/adapter", with_config(files, base_model_name_or_path="user/trap"), private=False)
    hub.make("model", "user/trap", {"config.json": b"{}"}, private=False)
    with pytest.raises(ConfigError, match="user/adapter holds an adapter and no model"):
        load("user/adapter")
    assert not [path for verb, path in hub.requests if "user/trap" in path]


def load_file_bytes(data, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(data)
    return load_file(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("place", ["hub", "folder"])
def test_an_adapter_that_is_a_pickle_is_refused_in_words(hub, files, watch, tiny_model, tmp_path, place):
    trapped = {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": pickle.dumps(Trap())}
    hub.make("model", "user/trap", trapped, private=False)
    (tmp_path / "trap").mkdir()
    for name, data in trapped.items():
        (tmp_path / "trap" / name).write_bytes(data)
    with watch, pytest.raises(DataError, match=r"adapter_model.bin, a pickle, which can run any code"):
        load_adapter(tiny_model, "user/trap" if place == "hub" else tmp_path / "trap")
    assert watch.found == []
    assert hub.count("GET", r"\.bin$") == 0


def test_the_base_model_that_it_names_is_compared_and_never_loaded(hub, files, tiny_model, caplog):
    hub.make("model", "user/other", with_config(files, base_model_name_or_path="evil/model"), private=False)
    tiny_model.config.name_or_path = "maker/tiny"
    loaded = load_adapter(tiny_model, "user/other")
    assert "it was trained on 'model'; it is attached to 'tiny'" in " ".join(caplog.text.split())
    assert loaded.hub_revision.startswith("user/other at ")
    assert not [path for verb, path in hub.requests if "evil" in path]
    caplog.clear()
    hub.make("model", "user/same", files, private=False)
    del loaded
    load_adapter(tiny_model_again(tiny_model), "user/same")
    assert "trained on" not in caplog.text


def tiny_model_again(model):
    model = model.__class__(model.config)
    model.config.name_or_path = "/models/tiny"
    return model


def test_a_base_model_by_name_runs_no_remote_code(hub, files, tiny_model_path, monkeypatch):
    import quantkd.hub.adapters as adapters

    asked = {}

    def load(name, **kwargs):
        asked.update(kwargs, name=name)
        raise KeyboardInterrupt

    monkeypatch.setattr(adapters, "load_student", load)
    hub.make("model", "user/fine", files, private=False)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(str(tiny_model_path), "user/fine")
    assert asked == {"name": str(tiny_model_path), "trust_remote_code": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"megatron_config": {"a": 1}}, "sets megatron_config"),
        ({"megatron_core": "os"}, "sets megatron_core"),
        ({"layer_replication": [[0, 10**9]]}, "sets layer_replication"),
        ({"something_new": {"path": "/etc/passwd"}}, "sets something_new"),
        ({"init_lora_weights": "pissa"}, "started with 'pissa', which changes the base model's weights"),
        ({"init_lora_weights": "loftq"}, "started with 'loftq'"),
        ({"init_lora_weights": 7}, "started with '7'"),
        ({"target_modules": ["(a+)+$"]}, "expected plain names"),
        ({"rank_pattern": {"(a+)+$": 3}}, "expected plain names"),
        ({"target_modules": {"q_proj": 1}}, "expected plain names"),
        ({"modules_to_save": ["x" * 999]}, "expected plain names"),
        ({"peft_type": "PROMPT_TUNING"}, "of the kind 'PROMPT_TUNING'"),
        ({"peft_type": None}, "expected LORA"),
        ({"r": -1}, "fit|is no LoRA"),
        ({"r": 3}, "does not fit"),
        ({"target_modules": ["q_proj"]}, "fit"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "does not fit its own configuration: 4 weights"),
        ({"target_modules": ["no_such_module"]}, "does not fit the base model"),
    ],
)  # fmt: skip
def test_configurations_that_ask_for_more_or_for_what_cannot_be(hub, files, tiny_model, watch, changes, message):
    hub.make("model", "user/strange", with_config(files, **changes), private=False)
    with watch, pytest.raises(DataError, match=message):
        load_adapter(tiny_model, "user/strange")
    assert watch.found == []


def test_the_class_that_an_adapter_names_is_not_imported(hub, files, tiny_model, watch, tmp_path):
    """PEFT writes it where the maker gave no task type."""
    named = {"base_model_class": "Trap", "parent_library": "trap_library"}
    hub.make("model", "user/untyped", with_config(files, task_type=None, auto_mapping=named), private=False)
    with watch:
        loaded = load_adapter(tiny_model, "user/untyped")
    assert watch.found == [] and "trap_library" not in watch.imported
    expected = load_file_bytes(files["adapter_model.safetensors"], tmp_path)
    state = {name.replace(".default", ""): value for name, value in loaded.state_dict().items() if "lora_" in name}
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_a_regular_expression_is_not_run(hub, files, tiny_model, tmp_path):
    """PEFT saves one where the maker gave one; the weights tell which modules it meant."""
    fields = {"target_modules": "(x+x+)+y|.*\\.(q|v)_proj", "exclude_modules": "(x+x+)+y"}
    hub.make("model", "user/pattern", with_config(files, **fields), private=False)
    loaded = load_adapter(tiny_model, "user/pattern")
    expected = load_file_bytes(files["adapter_model.safetensors"], tmp_path)
    state = {name.replace(".default", ""): value for name, value in loaded.state_dict().items() if "lora_" in name}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert all(name.count(".") > 2 for name in loaded.peft_config["default"].target_modules)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 10**5])
def test_a_configuration_that_is_none(hub, files, tiny_model, text):
    hub.make("model", "user/broken", {**files, "adapter_config.json": text}, private=False)
    with pytest.raises(DataError, match=r"is not a LoRA configuration|of the kind 'list'"):
        load_adapter(tiny_model, "user/broken")


@pytest.mark.parametrize("size", [0, 7, 100])
def test_weights_that_are_cut(hub, files, tiny_model, size):
    data = files["adapter_model.safetensors"][:size]
    hub.make("model", "user/cut", {**files, "adapter_model.safetensors": data}, private=False)
    with pytest.raises(DataError, match="does not fit the base model"):
        load_adapter(tiny_model, "user/cut")


def test_weights_of_other_shapes_or_names(hub, files, tiny_model, tmp_path):
    weights = load_file_bytes(files["adapter_model.safetensors"], tmp_path)
    name = sorted(weights)[0]
    wide = save({**weights, name: torch.zeros(2, 999)})
    hub.make("model", "user/wide", {**files, "adapter_model.safetensors": wide}, private=False)
    with pytest.raises(DataError, match="does not fit the base model"):
        load_adapter(tiny_model, "user/wide")


def test_files_that_are_missing_or_huge(hub, files, tiny_model, tmp_path):
    hub.make("model", "user/empty", {"README.md": b"hello"}, private=False)
    with pytest.raises(DataError, match=r"holds no adapter_config.json"):
        load_adapter(tiny_model, "user/empty")
    huge = {**files, "adapter_config.json": b" " * (2**20 + 1)}
    hub.make("model", "user/huge", huge, private=False)
    with pytest.raises(HubError, match="expected at most 1048576"):
        load_adapter(tiny_model, "user/huge")
    assert hub.count("GET", "user/huge/.*json") == 0
    with pytest.raises(DataError, match="expected an adapter that PEFT saved"):
        load_adapter(tiny_model, tmp_path)
    with pytest.raises(HubError, match="user/absent"):
        load_adapter(tiny_model, "user/absent")


def test_a_name_in_a_stranger_s_words_cannot_write_to_the_terminal(hub, files, tiny_model, caplog):
    hub.make("model", "user/loud", with_config(files, base_model_name_or_path="m\x1b[31m\r\nred"), private=False)
    tiny_model.config.name_or_path = "maker/tiny"
    load_adapter(tiny_model, "user/loud")
    assert "\x1b" not in caplog.text and "\\x1b" not in caplog.text
