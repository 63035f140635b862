"""A stranger's adapter: the base model is the caller's, no pickle is opened, no code of theirs runs."""

import json
import pickle
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save
from transfer_sets import write_set

from quantkd import TransferSet
from quantkd.errors import ConfigError, DataError, HubError
from quantkd.hub import load_adapter, push_adapter
from quantkd.models.export import export_adapter
from quantkd.models.student import load_student
from quantkd.names import refuse_adapter
from quantkd.teacher import load_teacher
from tests.conftest import build_tiny_model, refused, save_adapter

pytest_plugins = ["hub_runs"]


@pytest.fixture(scope="module")
def audited():
    """What pickle looks up, and modules that are imported; an audit hook cannot be taken back, so there is one."""
    heard = {"pickle.find_class": [], "import": []}

    def hear(event, args):
        if event in heard:
            heard[event].append(str(args[0]))

    sys.addaudithook(hear)
    return heard


@pytest.fixture
def watch(audited):
    for names in audited.values():
        names.clear()
    return audited


@pytest.fixture(scope="module")
def files(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(build_tiny_model(tiny_tokenizer), folder, r=2, target_modules=["q_proj", "v_proj"])
    fields = json.loads((folder / "adapter_config.json").read_text())
    config = json.dumps({**fields, "base_model_name_or_path": "maker/tiny"}).encode()
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return {"adapter_config.json": config, "adapter_model.safetensors": weights}


def alter(files, weight=None, **changes):
    """The files with other fields in the configuration, and another tensor in place of the first one."""
    weights = load(files["adapter_model.safetensors"])
    if weight is not None:
        weights[min(weights)] = weight(weights[min(weights)])
    config = json.dumps({**json.loads(files["adapter_config.json"]), **changes})
    return {"adapter_config.json": config.encode(), "adapter_model.safetensors": save(weights)}


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def attach(hub, files, tiny_model):
    tiny_model.config.name_or_path = "/models/tiny"

    def attach(changed=None, **changes):
        hub.make("model", "user/adapter", {**files, **alter(files, **changes), **(changed or {})})
        return load_adapter(tiny_model, "user/adapter")

    return attach


def assert_holds(loaded, files):
    """The model has the file's weights, and no others, in its adapter."""
    expected = load(files["adapter_model.safetensors"])
    state = {name.replace(".default", ""): value for name, value in loaded.state_dict().items() if "lora_" in name}
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


class Trap:
    """Opened as a pickle, it would raise from inside the unpickler."""

    def __reduce__(self):
        return (exec, ("raise AssertionError('a pickle was opened')",))


PICKLE = pickle.dumps(Trap())
TRAPS = dict.fromkeys(("adapter_model.bin", "training_args.bin", "optimizer.pt", "pytorch_model.bin"), PICKLE)


def test_no_pickle_is_opened(hub, files, attach, watch, tmp_path):
    refused(AssertionError, "a pickle was opened", pickle.loads, PICKLE)
    assert watch["pickle.find_class"].pop() and not watch["pickle.find_class"]  # the watch sees one
    write_set(tmp_path / "set")
    folder = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    hub.make("dataset", "user/trap", {**folder, **TRAPS, "set.py": b"raise AssertionError"})
    loaded = attach(TRAPS)
    rows = list(TransferSet.open("user/trap"))
    assert watch["pickle.find_class"] == [] and len(rows) == 10
    assert_holds(loaded, files)
    assert not [path for verb, path in hub.requests if path.endswith((".bin", ".pt", ".py"))]


@pytest.mark.parametrize("load_model", [load_teacher, load_student])
def test_an_adapter_s_own_base_model_is_not_followed(hub, files, load_model):
    hub.make("model", "user/adapter", files)
    hub.make("model", "maker/tiny", {"config.json": b"{}"})
    refused(ConfigError, "user/adapter holds an adapter and no model", load_model, "user/adapter")
    assert not [path for verb, path in hub.requests if "maker/tiny" in path]


def test_a_model_in_a_subfolder_is_none_of_the_adapter_beside_it(hub, files):
    hub.make("model", "user/both", {**files, "model/config.json": b"{}"})
    refuse_adapter("user/both", subfolder="model")
    refused(ConfigError, "user/both holds an adapter and no model", refuse_adapter, "user/both")


@pytest.mark.parametrize("way", ["hub", "folder", "push"])
def test_an_adapter_that_is_a_pickle_is_refused(hub, files, watch, tiny_model, tmp_path, way):
    trapped = {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": PICKLE}
    hub.make("model", "user/trap", trapped)
    write(tmp_path, trapped)
    said = r"adapter_model.bin, a pickle, which can run any code.*expected adapter_model.safetensors"
    if way == "push":
        refused(DataError, said, push_adapter, tmp_path, "user/student")
    else:
        refused(DataError, said, load_adapter, tiny_model, "user/trap" if way == "hub" else tmp_path)
    assert watch["pickle.find_class"] == [] and (way == "hub" or hub.requests == [])
    assert hub.count("GET", r"\.bin$") == 0


@pytest.mark.parametrize(("named", "own", "warned"), [
    ("evil/model", "/models/tiny", "it was trained on 'evil/model'; it is attached to 'tiny'"),
    ("m\x1b[31m\r\nred", "/models/tiny", "it was trained on 'm\\x1b[31m\\r\\nred'"), ("maker/tiny", "/models/tiny", ""),
    ("maker/tiny", "maker/tiny", ""), ("maker/tiny", "other/tiny", "says that it was trained on 'maker/tiny'"),
    ("maker/tiny", "/models/big", "says that it was trained on 'maker/tiny'"), ("", "/models/tiny", ""),
])  # fmt: skip
def test_named_bases_are_compared(hub, attach, files, tiny_model, tiny_tokenizer, tmp_path, caplog, named, own, warned):
    tiny_model.config.name_or_path = own
    loaded = attach(base_model_name_or_path=named)
    assert loaded.hub_revision.startswith("user/adapter at ")
    assert not [path for verb, path in hub.requests if "evil" in path or "maker" in path]
    folder = write(tmp_path / "adapter", alter(files, base_model_name_or_path=named))
    export_adapter(str(folder), tiny_tokenizer, tmp_path / "export", base=own)
    assert caplog.text.count("trained on") == 2 * bool(warned) and warned in caplog.text


def test_a_base_model_by_name_runs_no_remote_code(hub, files, tiny_model_path, monkeypatch):
    load_base = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("quantkd.hub.adapters.load_student", load_base)
    hub.make("model", "user/fine", files)
    refused(KeyboardInterrupt, "^$", load_adapter, str(tiny_model_path), "user/fine")
    load_base.assert_called_once_with(str(tiny_model_path), trust_remote_code=False)


@pytest.mark.parametrize(("changes", "message"), [
    ({"megatron_config": {"a": 1}}, "sets megatron_config"), ({"megatron_core": "os"}, "sets megatron_core"),
    ({"layer_replication": [[0, 10**9]]}, "sets layer_replication"),
    ({"something_new": {"path": "/etc/passwd"}}, "sets something_new"), ({"target_modules": ["q_proj"]}, "fit"),
    ({"init_lora_weights": "pissa"}, "started with 'pissa', which changes the base model's weights"),
    ({"init_lora_weights": "loftq"}, "started with 'loftq'"), ({"init_lora_weights": 7}, "started with '7'"),
    ({"target_modules": ["(a+)+$"]}, "plain names"), ({"rank_pattern": {"(a+)+$": 3}}, "plain names"),
    ({"target_modules": {"q_proj": 1}}, "plain names"), ({"modules_to_save": ["x" * 999]}, "plain names"),
    ({"peft_type": "PROMPT_TUNING"}, "of the kind 'PROMPT_TUNING'"), ({"peft_type": None}, "expected LORA"),
    ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "does not fit its own configuration: 4 weights"),
    ({"target_modules": ["no_such_module"]}, "does not fit the base model"),
    ({"r": 3}, "has rank 2, and adapter_config.json says 3"), ({"rank_pattern": {"q_proj": 2**14}}, "says 16384"),
    ({"target_modules": [f"m{number}" for number in range(20_000)]}, "names 20000 modules in one list"),
    ({"target_modules": [["q_proj"]]}, "plain names"), ({"exclude_modules": {"a": 1}}, "plain names"),
])  # fmt: skip
def test_configurations_that_ask_for_more_or_for_what_cannot_be(attach, watch, changes, message):
    refused(DataError, message, attach, **changes)
    assert watch["pickle.find_class"] == []


@pytest.mark.parametrize(("name", "value"), [
    ("lora_alpha", 1e308), ("lora_alpha", "16"),
    ("lora_alpha", True), ("lora_alpha", [16]), ("lora_alpha", None), ("lora_dropout", -0.1), ("lora_dropout", 1),
    ("lora_dropout", {"a": 1}), ("r", True), ("r", 0), ("r", 2**40), ("r", -1), ("r", 2.0), ("r", [2]), ("r", "2"),
    ("rank_pattern", {"q_proj": True}), ("rank_pattern", {"q_proj": {"a": 1}}), ("rank_pattern", [["q_proj", 2]]),
    ("alpha_pattern", "q_proj"), ("bias", ["all"]), ("bias", "some"),
    ("use_dora", "yes"), ("use_rslora", 1), ("fan_in_fan_out", {}), ("layers_to_transform", [[0]]),
    ("layers_to_transform", {"0": 1}), ("task_type", {"a": 1}), ("base_model_name_or_path", ["a"]),
])  # fmt: skip
def test_a_field_that_cannot_be_is_refused_by_name_and_value(attach, tiny_model, name, value):
    said = rf"{name} in adapter_config.json of .* is {re.escape(repr(value)[:80])}; expected"
    refused(DataError, said, attach, **{name: value})
    assert not isinstance(tiny_model, PeftModel) and not any("lora" in key for key in tiny_model.state_dict())


WEIGHTS = {
    "nan": lambda w: w.index_fill(0, torch.tensor(0), torch.nan),
    "inf": lambda w: w * torch.inf,
    "1048576.0": lambda w: torch.full_like(w, 2.0**20),
    "torch.int64": lambda w: w.long(),
    "nothing": lambda w: w[:0],
}


@pytest.mark.parametrize("found", WEIGHTS)
def test_weights_that_cannot_be_are_refused(attach, files, tiny_model, tiny_tokenizer, tmp_path, found):
    folder = write(tmp_path / "adapter", alter(files, weight=WEIGHTS[found]))
    for load_or_export in (
        lambda: attach(weight=WEIGHTS[found]),
        lambda: load_adapter(tiny_model, folder),
        lambda: export_adapter(str(folder), tiny_tokenizer, tmp_path / "export", base="maker/tiny"),
    ):
        refused(DataError, rf"lora_A.weight of .* holds {found}; expected floating-point numbers", load_or_export)
    assert not (tmp_path / "export").exists()
    empty = {"adapter_model.safetensors": save({})}
    refused(DataError, "holds no tensor; expected factors", attach, empty)


def test_a_checkpoint_is_checked_before_it_is_resumed(make_trainer, caplog):
    make_trainer(save_strategy="steps", save_steps=1).train()
    trainer = make_trainer(max_steps=3)
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-1"
    saved = {name: (checkpoint / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    write(checkpoint, alter(saved, base_model_name_or_path="maker/tiny"))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "says that it was trained on 'maker/tiny'" in caplog.text
    for changes, said in (({"lora_alpha": "x"}, "lora_alpha in"), ({"weight": WEIGHTS["nan"]}, "nan")):
        write(checkpoint, alter(saved, **changes))
        refused(DataError, said, make_trainer(max_steps=3).train, resume_from_checkpoint=str(checkpoint))


def test_a_class_is_not_imported_and_a_regular_expression_not_run(attach, files, watch):
    """PEFT writes a class where the maker gave no task type, and the expression of modules that the maker gave."""
    trap = {"task_type": None, "auto_mapping": {"base_model_class": "Trap", "parent_library": "trap_library"}}
    loaded = attach(target_modules="(x+x+)+y|.*\\.(q|v)_proj", exclude_modules="(x+x+)+y", **trap)
    assert watch["pickle.find_class"] == [] and "trap_library" not in watch["import"]
    assert_holds(loaded, files)  # the weights tell which modules were meant
    assert all(name.count(".") > 2 for name in loaded.peft_config["default"].target_modules)


NONE = r"is not a LoRA configuration|holds a list; expected an object"


@pytest.mark.parametrize(("name", "change", "message"), [
    *(("config.json", lambda data, text=text: text, NONE) for text in (b"", b"[]", b'{"r": 2, "r": 2}')),
    *(("model.safetensors", lambda data, size=size: data[:size], "does not open") for size in (0, 7, 100)),
    *(("model.safetensors", lambda data, part=part, shape=shape: save(
        {name: torch.ones(shape) if part in name else each for name, each in load(data).items()}
    ), "has rank 0, .* says 2") for part in ("lora_A", "lora_B") for shape in ((), 2)),
    ("model.safetensors", lambda data: save({name: torch.zeros(2, 2) for name in load(data)}), "not fit the base"),
])  # fmt: skip
def test_files_that_are_none_are_cut_or_do_not_fit(attach, files, name, change, message):
    refused(DataError, message, attach, {f"adapter_{name}": change(files[f"adapter_{name}"])})


def test_files_that_are_missing_or_huge(hub, files, attach, tiny_model, tmp_path):
    refused(HubError, "expected at most 1048576", attach, {"adapter_config.json": b" " * (2**20 + 1)})
    assert hub.count("GET", "user/adapter/.*json") == 0
    hub.make("model", "user/empty", {"README.md": b"hello"})
    refused(DataError, r"holds no adapter_config.json", load_adapter, tiny_model, "user/empty")
    refused(DataError, "expected an adapter that PEFT saved", load_adapter, tiny_model, tmp_path)
    refused(HubError, "user/absent", load_adapter, tiny_model, "user/absent")
