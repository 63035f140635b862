"""A stranger's adapter: the base model is the caller's, no pickle is opened, no code of theirs runs."""

import json
import pickle
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save
from transfer_sets import write_set

from quantkd import TransferSet
from quantkd.errors import ConfigError, DataError, HubError
from quantkd.hub import load_adapter
from quantkd.models.student import load_student
from quantkd.teacher import load_teacher
from tests.conftest import build_tiny_model

pytest_plugins = ["hub_runs"]


class PickleWatch:
    """An audit hook that notes what pickle looks up, and modules that are imported, while it is on."""

    def __init__(self):
        self.on = False
        sys.addaudithook(self.hear)

    def hear(self, event, args):
        if self.on and event == "pickle.find_class":
            self.found.append(str(args))
        if self.on and event == "import":
            self.imported.append(str(args[0]))

    def __enter__(self):
        self.found, self.imported, self.on = [], [], True

    def __exit__(self, *error):
        self.on = False


@pytest.fixture(scope="module")
def watch():
    return PickleWatch()


@pytest.fixture(scope="module")
def files(tiny_tokenizer, tmp_path_factory):
    """The two files of a small, honest adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(build_tiny_model(tiny_tokenizer), config).save_pretrained(folder)
    fields = json.loads((folder / "adapter_config.json").read_text())
    config = json.dumps({**fields, "base_model_name_or_path": "maker/tiny"}).encode()
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return {"adapter_config.json": config, "adapter_model.safetensors": weights}


@pytest.fixture
def attach(hub, files, tiny_model):
    """Put an adapter on the Hub, with changes to its configuration or its files, and load it."""
    tiny_model.config.name_or_path = "/models/tiny"

    def attach(changed=None, **changes):
        config = {"adapter_config.json": json.dumps({**json.loads(files["adapter_config.json"]), **changes}).encode()}
        hub.make("model", "user/adapter", {**files, **config, **(changed or {})}, private=False)
        return load_adapter(tiny_model, "user/adapter")

    return attach


def assert_holds(loaded, files):
    """The model has the file's weights, and no others, in its adapter."""
    expected = load(files["adapter_model.safetensors"])
    state = {name.replace(".default", ""): value for name, value in loaded.state_dict().items() if "lora_" in name}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


class Trap:
    """Opened as a pickle, it would raise from inside the unpickler."""

    def __reduce__(self):
        return (exec, ("raise AssertionError('a pickle was opened')",))


PICKLE = pickle.dumps(Trap())
TRAPS = dict.fromkeys(("adapter_model.bin", "training_args.bin", "optimizer.pt", "pytorch_model.bin"), PICKLE)


def test_no_pickle_is_opened(hub, files, attach, watch, tmp_path):
    with watch, pytest.raises(AssertionError, match="a pickle was opened"):
        pickle.loads(PICKLE)
    assert watch.found  # the watch sees one
    write_set(tmp_path / "set")
    folder = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    hub.make("dataset", "user/trap", {**folder, **TRAPS, "set.py": b"raise AssertionError"}, private=False)
    with watch:
        loaded = attach(TRAPS)
        rows = list(TransferSet.open("user/trap"))
    assert watch.found == [] and len(rows) == 10
    assert_holds(loaded, files)
    assert not [path for verb, path in hub.requests if path.endswith((".bin", ".pt", ".py"))]


@pytest.mark.parametrize("load_model", [load_teacher, load_student])
def test_an_adapter_s_own_base_model_is_not_followed(hub, files, load_model):
    hub.make("model", "user/adapter", files, private=False)
    hub.make("model", "maker/tiny", {"config.json": b"{}"}, private=False)
    with pytest.raises(ConfigError, match="user/adapter holds an adapter and no model"):
        load_model("user/adapter")
    assert not [path for verb, path in hub.requests if "maker/tiny" in path]


@pytest.mark.parametrize("place", ["hub", "folder"])
def test_an_adapter_that_is_a_pickle_is_refused(hub, files, watch, tiny_model, tmp_path, place):
    trapped = {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": PICKLE}
    hub.make("model", "user/trap", trapped, private=False)
    for name, data in trapped.items():
        (tmp_path / name).write_bytes(data)
    with watch, pytest.raises(DataError, match=r"adapter_model.bin, a pickle, which can run any code"):
        load_adapter(tiny_model, "user/trap" if place == "hub" else tmp_path)
    assert watch.found == []
    assert hub.count("GET", r"\.bin$") == 0


@pytest.mark.parametrize(("named", "warned"), [
    ("evil/model", "it was trained on 'evil/model'; it is attached to 'tiny'"), ("maker/tiny", ""), ("", ""),
    ("m\x1b[31m\r\nred", "it was trained on 'm\\x1b[31m\\r\\nred'"),
])  # fmt: skip
def test_the_base_model_that_it_names_is_compared_and_never_loaded(hub, attach, caplog, named, warned):
    loaded = attach(base_model_name_or_path=named)
    assert ("trained on" in caplog.text) == bool(warned) and warned in caplog.text
    assert loaded.hub_revision.startswith("user/adapter at ")
    assert not [path for verb, path in hub.requests if "evil" in path or "maker" in path]


def test_a_base_model_by_name_runs_no_remote_code(hub, files, tiny_model_path, monkeypatch):
    asked = {}

    def load_base(name, **kwargs):
        asked.update(kwargs, name=name)
        raise KeyboardInterrupt

    monkeypatch.setattr("quantkd.hub.adapters.load_student", load_base)
    hub.make("model", "user/fine", files, private=False)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(str(tiny_model_path), "user/fine")
    assert asked == {"name": str(tiny_model_path), "trust_remote_code": False}


@pytest.mark.parametrize(("changes", "message"), [
    ({"megatron_config": {"a": 1}}, "sets megatron_config"), ({"megatron_core": "os"}, "sets megatron_core"),
    ({"layer_replication": [[0, 10**9]]}, "sets layer_replication"),
    ({"something_new": {"path": "/etc/passwd"}}, "sets something_new"),
    ({"init_lora_weights": "pissa"}, "started with 'pissa', which changes the base model's weights"),
    ({"init_lora_weights": "loftq"}, "started with 'loftq'"), ({"init_lora_weights": 7}, "started with '7'"),
    ({"target_modules": ["(a+)+$"]}, "plain names"), ({"rank_pattern": {"(a+)+$": 3}}, "plain names"),
    ({"target_modules": {"q_proj": 1}}, "plain names"), ({"modules_to_save": ["x" * 999]}, "plain names"),
    ({"peft_type": "PROMPT_TUNING"}, "of the kind 'PROMPT_TUNING'"), ({"peft_type": None}, "expected LORA"),
    ({"target_modules": ["q_proj"]}, "fit"),
    ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "does not fit its own configuration: 4 weights"),
    ({"target_modules": ["no_such_module"]}, "does not fit the base model"),
])  # fmt: skip
def test_configurations_that_ask_for_more_or_for_what_cannot_be(attach, watch, changes, message):
    with watch, pytest.raises(DataError, match=message):
        attach(**changes)
    assert watch.found == []


def test_the_class_that_an_adapter_names_is_not_imported(attach, files, watch):
    """PEFT writes it where the maker gave no task type."""
    with watch:
        loaded = attach(task_type=None, auto_mapping={"base_model_class": "Trap", "parent_library": "trap_library"})
    assert watch.found == [] and "trap_library" not in watch.imported
    assert_holds(loaded, files)


def test_a_regular_expression_is_not_run(attach, files):
    """PEFT saves one where the maker gave one; the weights tell which modules it meant."""
    loaded = attach(target_modules="(x+x+)+y|.*\\.(q|v)_proj", exclude_modules="(x+x+)+y")
    assert_holds(loaded, files)
    assert all(name.count(".") > 2 for name in loaded.peft_config["default"].target_modules)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 10**5])
def test_a_configuration_that_is_none(attach, text):
    with pytest.raises(DataError, match=r"is not a LoRA configuration|holds a list; expected an object"):
        attach({"adapter_config.json": text})


@pytest.mark.parametrize("size", [0, 7, 100, None])
def test_weights_that_are_cut_or_of_other_shapes(attach, files, size):
    weights = load(files["adapter_model.safetensors"])
    wide = save({**weights, sorted(weights)[0]: torch.zeros(2, 999)})
    data = wide if size is None else files["adapter_model.safetensors"][:size]
    with pytest.raises(DataError, match="does not fit the base model" if size is None else "does not open"):
        attach({"adapter_model.safetensors": data})


def test_files_that_are_missing_or_huge(hub, files, attach, tiny_model, tmp_path):
    with pytest.raises(HubError, match="expected at most 1048576"):
        attach({"adapter_config.json": b" " * (2**20 + 1)})
    assert hub.count("GET", "user/adapter/.*json") == 0
    hub.make("model", "user/empty", {"README.md": b"hello"}, private=False)
    with pytest.raises(DataError, match=r"holds no adapter_config.json"):
        load_adapter(tiny_model, "user/empty")
    with pytest.raises(DataError, match="expected an adapter that PEFT saved"):
        load_adapter(tiny_model, tmp_path)
    with pytest.raises(HubError, match="user/absent"):
        load_adapter(tiny_model, "user/absent")
