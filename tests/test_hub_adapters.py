"""Adapters on the Hub: pushed by the trainer and the command line, with a page that is right, and loaded back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fake_hub import TOKEN
from hub_runs import PUSHED, read_page
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from quantkd import QuantizedDistillationTrainer, TransferSet
from quantkd.cli.arguments import StudentArguments, load_adapted_from
from quantkd.errors import ConfigError, DataError
from quantkd.files import read_object
from quantkd.hub import load_adapter, push_adapter, push_transfer_set
from quantkd.hub.adapters import fetch_adapter, list_adapter_files
from quantkd.hub.checkpoints import push_checkpoint
from quantkd.models.export import export_adapter
from quantkd.models.provenance import Provenance, find_base, require_base
from quantkd.models.quantize import find_origin, quantize, read_origin
from quantkd.models.student import default_lora_config, load_student
from tests.conftest import refused
from tests.report_arms import read_tables

pytest_plugins = ["hub_runs"]


def test_pushed_and_loaded_back_it_gives_the_same_logits(hub, run, load_base, training_set, caplog):
    pushed = push_adapter(run, "student", license="apache-2.0")  # the owner is the token's
    repository = hub.repositories["model", "user/student"]
    assert repository.private and len(repository.commits) == 2  # the server's own, and ours
    files = hub.files("model", "user/student")
    assert set(files) == PUSHED
    assert files["adapter_model.safetensors"] == (run / "student" / "adapter_model.safetensors").read_bytes()
    with caplog.at_level("INFO", logger="quantkd.remote"):
        ours = load_adapter(load_base(), "user/student")
    assert f"Adapter user/student at {pushed.commit}" in caplog.text
    assert ours.hub_revision == f"user/student at {pushed.commit}"
    plain = PeftModel.from_pretrained(load_base(), "user/student", revision=pushed.commit).eval()
    local = PeftModel.from_pretrained(load_base(), run / "student").eval()
    with torch.inference_mode():
        logits = [model(training_set[0]["input_ids"][None]).logits for model in (local, ours, plain, load_base())]
    assert [torch.equal(each, logits[0]) for each in logits[1:]] == [True, True, False]
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    trainable = load_adapter(load_base(), "user/student", is_trainable=True)
    assert any(parameter.requires_grad for parameter in trainable.parameters())


def test_the_checkpoint_that_a_run_made_goes_along(hub, run, build_trainer, training_set, cli):
    build_trainer(run / "student", calibrate=True).save_model()
    config = run / "student" / "tokenizer_config.json"
    kept = config.read_text()
    config.write_text(json.dumps({"note": TOKEN}))  # of an adapter that is refused no base is pushed
    refused(ConfigError, "holds the Hub's token", push_adapter, run / "student", "user/student")
    assert not hub.repositories
    config.write_text(kept)
    push_adapter(run / "student", "user/student", license="mit")
    page, _ = read_page(hub.files("model", "user/student"))
    assert page["base_model"] == "user/student-4bit"
    base_page, text = read_page(hub.files("model", "user/student-4bit"))
    assert base_page["license"] == "mit" and "bitsandbytes" in text
    logits = []
    for base, adapter in (("user/student-4bit", "user/student"), (run / "student" / "quantized", run / "student")):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        logits.append(model(training_set[0]["input_ids"][None]).logits)
    assert torch.equal(*logits)
    refused(DataError, "is not a checkpoint of `quantkd quantize`", push_checkpoint, run, "user/other")
    listed = [name for name, _ in list_adapter_files(run / "student")]
    assert {"adapter_model.safetensors", "NAME-4bit/model.safetensors"} < set(listed)
    made = run / "student" / "quantized"
    cli.fails("full precision was asked for", "selftest", made)
    (made / "model.safetensors").rename(made / "model-00001-of-00001.safetensors")
    (made / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    push_checkpoint(made, "user/student-4bit")
    there = set(hub.files("model", "user/student-4bit"))
    assert "model.safetensors" not in there and "model.safetensors.index.json" in there


def test_an_adapter_stays_with_the_checkpoint_that_its_run_made(
    hub, run, build_trainer, tiny_tokenizer, tmp_path, monkeypatch
):
    build_trainer(run / "student", calibrate=True).save_model()
    alone = export_adapter(str(run / "student"), tiny_tokenizer, tmp_path / "alone", base="org/model")
    assert read_object(alone / "adapter_config.json")["base_model_name_or_path"] == "quantized"
    lost = "the 4-bit checkpoint 'quantized' with codes or scales of its own, "
    refused(DataError, f"{lost}which is not beside it", push_adapter, alone, "user/alone")
    refused(DataError, f"{lost}which is not beside it", list_adapter_files, alone)
    other = f"{lost}and org/model is not known to be it"
    refused(DataError, other, export_adapter, str(alone), tiny_tokenizer, tmp_path / "again", base="org/model")
    hub.make("model", "org/model", {"config.json": b"{}"})
    found = f"{other}. It is .*student/quantized, and is found if base_model is left out"
    refused(DataError, found, push_adapter, run / "student", "user/wrong", base_model="org/model")
    assert "NAME-4bit/model.safetensors" in dict(list_adapter_files(run / "student", base_model=""))  # a shell's
    (tmp_path / "made").symlink_to(run / "student" / "quantized")
    again = export_adapter(str(alone), tiny_tokenizer, tmp_path / "again", base=str(tmp_path / "made"))
    assert read_object(again / "adapter_config.json")["base_model_name_or_path"] == "quantized"
    hub.make("model", "user/full", {"config.json": b"{}"}, private=True)
    refused(ConfigError, "user/full holds config.json, and no adapter", push_adapter, run / "student", "user/full")
    assert not [name for _, name in hub.repositories if "4bit" in name]
    push_adapter(run / "student", "user/student", revision="v2")
    base = hub.repositories["model", "user/student-4bit"].commits[-1].sha
    files = hub.files("model", "user/student")
    assert f'"user/student-4bit", revision="{base}",\n' in files["README.md"].decode()
    assert json.loads(files["adapter_config.json"])["revision"] == base
    other = {"base_model": "user/student-4bit"}  # it is on the branch alone
    monkeypatch.chdir(run)
    assert "NAME-4bit/model.safetensors" in dict(list_adapter_files(alone, base_model="student/quantized"))
    refused(DataError, "and user/student-4bit is not known to be it", push_adapter, alone, "user/alone", **other)
    push_adapter(run / "student", "user/student")
    with monkeypatch.context() as patched:
        patched.delenv("HF_TOKEN")  # a private base is asked for with the token, and twice
        hub.fail("503")
        push_adapter(alone, "user/alone", token=TOKEN, **other)
    for folder, name, revision in ((alone, "user/student-4bit", None), (fetch_adapter("user/student@v2"), None, base)):
        push_adapter(folder, "user/alone", base_model=name)  # the latter says itself where its base is
        assert json.loads(hub.files("model", "user/alone")["adapter_config.json"])["revision"] == revision
    push_adapter(fetch_adapter("user/student@v2"), "user/alone", base_model="user/student-4bit")
    assert json.loads(hub.files("model", "user/alone")["adapter_config.json"])["revision"] == base
    fetched = str(fetch_adapter("user/student@v2"))
    lost = "user/other is not known"
    refused(DataError, lost, export_adapter, fetched, tiny_tokenizer, tmp_path / "lost", base="user/other")
    moved = export_adapter(fetched, tiny_tokenizer, tmp_path / "moved", base=str(tmp_path / "made"))
    assert read_object(moved / "adapter_config.json")["revision"] is None


def test_a_checkpoint_of_trained_scales_is_not_an_adapter_on_the_codes_before(
    hub, run, build_trainer, tiny_tokenizer, monkeypatch
):
    options = {"calibrate": True, "train_scales": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    shutil.rmtree(run / "student")
    trainer = build_trainer(run / "student", peft_config=default_lora_config(2), **options)
    trainer.train()
    trainer.save_model()
    part = run / "student" / "checkpoint-1"
    said, codes = "is a training checkpoint, and its trained scales are in", run / "student" / "quantized"
    for base in (str(codes), "org/model"):
        refused(DataError, said, export_adapter, str(part), tiny_tokenizer, run / "out", base=base)
        refused(DataError, f"codes or scales of its own, and {base} is not known to be it", require_base, part, base)
    refused(DataError, said, load_adapter, str(codes), part)
    refused(DataError, said, push_adapter, part, "user/part")
    hub.make("model", "user/part", {each.name: each.read_bytes() for each in part.iterdir()}, private=True)
    for _ in range(2):
        refused(DataError, said, load_adapter, str(codes), "user/part")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_base(part) == run / "student" / "quantized"  # from which training goes on
    assert require_base(run / "student") == run / "student" / "scaled"
    (codes / "quantkd.json").write_text(json.dumps({"export": {"scales": "trained"}}))  # without calibrated codes
    next_one = build_trainer(run / "next", model=load_student(str(codes)), peft_config=default_lora_config(2))
    next_one.save_model()
    assert Provenance.read(run / "next").has_own_base


def test_an_experiment_s_adapter_stays_with_its_codes(
    hub, tiny_model_path, training_set, make_trainer, tmp_path, caplog
):
    quantize(tiny_model_path, training_set, tmp_path / "my4")
    trainer = make_trainer(load_student(str(tmp_path / "my4")), init="zero", peft_config=default_lora_config(2))
    trainer.save_model(str(tmp_path / "adapter"))
    assert trainer.args.codes == "calibrated"
    refused(DataError, "the 4-bit checkpoint 'my4' with codes", push_adapter, tmp_path / "adapter", "user/lost")
    pushed = {"push_to_hub": True, "hub_model_id": "user/lost", "save_strategy": "steps", "save_steps": 1}
    options = {"max_steps": 2, "peft_config": default_lora_config(2), "init": "zero", **pushed}
    trainer = make_trainer(load_student(str(tmp_path / "my4")), **options)
    trainer.train()  # a push that is refused does not end it
    assert trainer.state.global_step == 2 and "with codes or scales of its own" in caplog.text
    trainer = make_trainer(load_student(str(tiny_model_path)), init="zero", peft_config=default_lora_config(2))
    assert trainer.args.codes is None


def test_what_a_push_of_a_checkpoint_refuses(hub, run, build_trainer, monkeypatch, caplog):
    build_trainer(run / "student", calibrate=True).save_model()
    made = run / "student" / "quantized"
    shutil.copytree(run / "student", part := run / "other" / "student" / "checkpoint-1")
    (part / "quantized").rename(run / "other" / "quantized")
    assert find_base(part) == run / "other" / "quantized"  # of an experiment
    (part.parent / "linked").symlink_to(run / "student", target_is_directory=True)
    assert find_base(part.parent / "linked") == part.parent / "linked" / "quantized"
    part.rename(run / "disk")  # and of a folder that is elsewhere
    part.symlink_to(run / "disk", target_is_directory=True)
    assert find_base(part) == run / "other" / "quantized"
    shutil.rmtree(run / "other")
    shutil.rmtree(run / "disk")
    monkeypatch.chdir(run / "student")
    assert find_base(Path()) == made
    hub.make("model", "user/student-4bit", {"config.json": b"{}", "model.safetensors": b"x"}, private=True)
    own = {name: b"{}" for name in ("adapter_config.json", "quantkd.json")}
    hub.make("model", "user/adapter", own, private=True)
    for name, said in (
        ("student-4bit", "config.json, model.safetensors"),
        ("adapter", "adapter_config.json, quantkd.json"),
    ):
        refused(ConfigError, f"holds {said}, and no checkpoint", push_checkpoint, made, f"user/{name}")
    (run / "student" / "results.json").write_text('{"a": 1}')
    refused(DataError, "holds no results.json of `quantkd report`", push_adapter, run / "student", "user/new")
    (run / "student" / "results.json").unlink()
    (made / "generation_config.json").write_text('{"a": "hf_abcdefghijklmnopqrst"}')
    refused(ConfigError, "generation_config.json holds", push_adapter, run / "student", "user/new")
    (made / "generation_config.json").unlink()
    (made / "model.safetensors").rename(kept := run / "kept")
    refused(DataError, "holds no model.safetensors", push_adapter, run / "student", "user/new")
    (made / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    refused(DataError, "holds no model-2.safetensors", push_adapter, run / "student", "user/new")
    (made / "model.safetensors.index.json").unlink()
    assert ("model", "user/new") not in hub.repositories
    kept.rename(made / "model.safetensors")
    load, seen, origin = "quantkd.cli.arguments.load_student", [], read_origin(str(made))["quantized_from"]
    monkeypatch.setattr(load, lambda name, **given: seen.append(given) or load_student(name))
    with caplog.at_level("INFO", logger="quantkd.remote"):
        load_adapted_from(StudentArguments(origin, trust_remote_code=True), run / "student")
    assert "student/quantized, which is beside the adapter" in caplog.text
    assert seen[0]["trust_remote_code"] is False  # the model that is named is trusted, and not this folder
    config = made / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoConfig": "evil.Config"}}))
    arguments = StudentArguments(origin, trust_remote_code=True)
    refused(ConfigError, "has code of its own.*name it as the model", load_adapted_from, arguments, run / "student")


def test_a_report_above_two_adapters_belongs_to_neither(hub, run):
    shutil.copytree(run / "student", run / "other")
    refused(DataError, "the adapters other, student; expected one", push_adapter, run, "user/student")
    push_adapter(run / "student", "user/student")
    assert "gap.png" not in hub.files("model", "user/student")
    push_adapter(run / "student", "user/student", run_dir=run)
    assert "gap.png" in hub.files("model", "user/student")
    # A later push takes away what it does not bring, and nothing of somebody else.
    hub.repositories["model", "user/student"].commits[-1].files["mine.txt"] = b"kept"
    push_adapter(run / "student", "user/student")
    assert set(hub.files("model", "user/student")) == PUSHED - {"gap.png"} | {"mine.txt"}


def test_a_repository_that_holds_something_else_is_left_alone(hub, run, small_set):
    files = {"README.md": b"mine", "config.json": b"{}", "data/x.bin": b"1"}
    for kind in ("model", "dataset"):
        hub.make(kind, "user/other", files, private=True)
        hub.make(kind, "user/blank", {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT"}, private=True)
    hub.make("dataset", "user/folder", {"data/x.parquet": b"1"}, private=True)
    held = "user/other holds config.json, data/x.bin, and no"
    refused(ConfigError, f"{held} adapter; .*Choose another name", push_adapter, run, "user/other")
    refused(ConfigError, f"{held} transfer set", push_transfer_set, small_set, "user/other")
    held = "user/folder holds data/x.parquet, and no transfer set"
    refused(ConfigError, held, push_transfer_set, small_set, "user/folder")
    assert all(len(hub.repositories[kind, "user/other"].commits) == 2 for kind in ("model", "dataset"))
    push_adapter(run, "user/blank")
    push_transfer_set(small_set, "user/blank")
    assert TransferSet.open("user/blank").digest == small_set.digest


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_nothing_becomes_public_by_mistake(hub, run, small_set, kind):
    def push(name, **options):
        return push_adapter(run, name, **options) if kind == "model" else push_transfer_set(small_set, name, **options)

    hub.make(kind, "user/open", {})
    refused(ConfigError, r"user/open is public.*--public", push, "user/open")
    assert len(hub.repositories[kind, "user/open"].commits) == 1
    for name in ("user/open", "user/new"):
        assert not push(name, private=False).private and not hub.repositories[kind, name].private
    push("user/closed")
    assert push("user/closed", private=False).private  # stays as it is


def test_the_trainer_pushes_and_makes_nothing_public_by_mistake(hub, build_trainer, tmp_path, training_set, caplog):
    hub.make("model", "user/open", {})
    refused(ConfigError, "is public", build_trainer, tmp_path / "s", push_to_hub=True, hub_model_id="user/open")
    trainer = build_trainer(tmp_path / "s", hub_model_id="user/open", hub_private_repo=False)
    assert not trainer.push_to_hub().private
    unsafe = {"push_to_hub": True, "hub_strategy": "all_checkpoints"}
    refused(ConfigError, "optimizer and random states", build_trainer, tmp_path / "s", **unsafe)
    commit = push_transfer_set(training_set, "user/set").commit
    options = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_model_id": "user/student"}
    trainer = build_trainer(tmp_path / "student", train_dataset=TransferSet.open("user/set"), **options)
    repository = hub.repositories["model", "user/student"]
    assert repository.private  # made when the trainer was
    trainer.train()
    refused(TypeError, "unexpected keyword argument 'dataset_name'", trainer.push_to_hub, dataset_name="gsm8k")
    pushed = trainer.push_to_hub(license="mit")
    steps = [f"Training in progress, step {step}" for step in (1, 2)]
    assert [each.title for each in repository.commits] == ["initial commit", *steps, "End of training"]
    assert pushed.commit == repository.commits[-1].sha
    assert set().union(*(each.files for each in repository.commits)) <= {*PUSHED, ".gitattributes"}
    files = hub.files("model", "user/student")
    metadata, _ = read_page(files)
    assert json.loads(files["quantkd.json"])["transfer_set"] == f"user/set at {commit}"
    assert (metadata["license"], metadata["datasets"]) == ("mit", ["user/set"])
    trainer.create_model_card(license="apache-2.0")
    assert "license: apache-2.0" in (tmp_path / "student" / "README.md").read_text()
    # A push that fails does not end the training.
    trainer = build_trainer(tmp_path / "other", **options)
    hub.fault = lambda number, method, path: "503"
    trainer.train()
    assert trainer.state.global_step == 2 and "Training goes on" in caplog.text


def test_every_saved_folder_has_its_own_page_and_no_pickle(build_trainer, training_set, tmp_path, monkeypatch):
    """People upload such folders by hand. The arguments go also where the Trainer does not call `_save`."""
    trainer = build_trainer(tmp_path / "student", save_strategy="steps", save_steps=1, hub_token="hf_x")
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "student", tmp_path / "student" / "checkpoint-1"):
        page = (folder / "README.md").read_text()
        assert "More Information Needed" not in page and training_set.digest in page and str(tmp_path) not in page
        assert not (folder / "training_args.bin").exists()
    monkeypatch.setattr(QuantizedDistillationTrainer, "_save", Trainer._save)
    trainer = build_trainer(tmp_path / "other", save_strategy="steps", save_steps=2)
    trainer.train()
    assert (tmp_path / "other" / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert not list((tmp_path / "other").rglob("training_args.bin"))


def test_the_page_and_its_snippet(hub, run, training_set, load_base, tiny_model_path, monkeypatch):
    push_adapter(run / "student", "user/student", license="apache-2.0", base_model="maker/base")
    files = hub.files("model", "user/student")
    metadata, text = read_page(files)
    assert set(metadata["tags"]) >= {"quantkd", "distillation", "4-bit"}
    report = json.loads((run / "results.json").read_text())
    expected = {report["metrics"][key]: one["value"] for key, one in report["arms"]["after"]["metrics"].items()}
    card = ModelCard(files["README.md"].decode()).data  # as the Hub reads it
    assert {one.metric_name: one.metric_value for one in card.eval_results} == expected and len(expected) >= 4
    assert {one.task_type for one in card.eval_results} == {"text-generation"}
    assert (card.license, card.base_model, card.library_name) == ("apache-2.0", "maker/base", "peft")
    facts = [training_set.digest, "learning_rate", "0.01", "alpha", "gap recovered", "](gap.png)", "BitsAndBytesConfig"]
    facts += [json.loads(files["quantkd.json"])["weights"]["sha256"], "Plain PEFT does not check this"]
    facts += ['bnb_4bit_compute_dtype="float32"', 'PeftModel.from_pretrained(base, "user/student")', "## Limits"]
    assert [fact for fact in facts if fact not in text] == []
    assert [len(cells) for cells in read_tables(text)] == [1, 1]  # the lines of a table are equally long
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "maker/base"
    (block,) = text.split("```python\n")[1:]
    monkeypatch.chdir(run.parent)
    shutil.copytree(tiny_model_path, run.parent / "maker" / "base")
    names: dict = {}
    exec(compile(block.split("```")[0], "card", "exec"), names)
    models = load_adapter(load_base(), run / "student"), names["model"]
    with torch.inference_mode():
        assert torch.equal(*(model(training_set[0]["input_ids"][None]).logits for model in models))
    assert names["tokenizer"].get_vocab() == AutoTokenizer.from_pretrained(tiny_model_path).get_vocab()
    assert names["inputs"]["input_ids"].shape[1] > 10  # the chat template's marks are there
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]


@pytest.mark.parametrize(("quantization", "tags", "words"), [
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {"8-bit"}, "load_in_8bit=True,"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, {"4-bit"}, "quantization_config = ..."),
    ({"quant_method": "torchao"}, set(), "quantization_config = ..."),
    (None, {"4-bit"}, "was not recorded; this is quantkd's default"),
])  # fmt: skip
def test_the_page_says_how_many_bits(hub, run, quantization, tags, words):
    facts = json.loads((run / "student" / "quantkd.json").read_text())
    (run / "student" / "quantkd.json").write_text(json.dumps({**facts, "quantization": quantization}))
    push_adapter(run / "student", "user/student")
    metadata, text = read_page(hub.files("model", "user/student"))
    assert set(metadata["tags"]) & {"4-bit", "8-bit"} == tags
    assert words in text and f"**{next(iter(tags), 'quantized')}**" in text and ("4-bit" in text) == ("4-bit" in tags)


def test_what_is_not_known_is_said_on_the_page(hub, run, tiny_model_path, caplog):
    (run / "results.json").unlink()
    for name in ("quantkd.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (run / "student" / name).unlink()
    push_adapter(run / "student", "user/student")
    files = hub.files("model", "user/student")
    metadata, text = read_page(files)
    assert "gap.png" not in files and "quantkd.json" not in files
    assert not {"license", "model-index", "base_model"} & set(metadata)
    base = tiny_model_path.name
    assert find_origin("user/student") is None is find_origin("user/gone")
    assert f"names the base model {base!r}" in caplog.text and "--base_model" in caplog.text
    assert f'AutoTokenizer.from_pretrained("{base}")' in text and "apply_chat_template" not in text
    assert f"name on the Hub was not given. {base} is the name of a local folder" in " ".join(text.split())
    assert "No evaluation was pushed" in text and "Not stated" in text and "not recorded" in text
