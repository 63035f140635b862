"""The page in front of an adapter: right, honest, and its snippet runs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from hub_runs import files_at, load_base
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from quantkd.hub import load_adapter, push_adapter

pytest_plugins = ["hub_runs"]


def test_the_page(hub, run, transfer_set):
    push_adapter(run / "student", "user/student", license="apache-2.0", base_model="maker/base")
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
        'bnb_4bit_compute_dtype="float32"', 'PeftModel.from_pretrained(base, "user/student")', "## Limits",
    ):  # fmt: skip
        assert fact in text, fact
    blocks = text.split("```python\n")[1:]
    assert blocks
    for block in blocks:
        compile(block.split("```")[0], "card", "exec")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "maker/base"


def test_the_page_is_what_the_hub_s_own_reader_takes(hub, run):
    push_adapter(run / "student", "user/student", license="apache-2.0", base_model="maker/base")
    card = ModelCard(files_at(hub, "user/student")["README.md"].decode())
    report = json.loads((run / "results.json").read_text())["arms"]["after"]["metrics"]
    found = [(one.task_type, one.metric_value) for one in card.data.eval_results]
    assert sorted(found) == sorted(("text-generation", one["value"]) for one in report.values())
    assert card.data.library_name == "peft" and card.data.license == "apache-2.0"


def test_the_snippet_runs_and_gives_the_student_that_was_evaluated(
    hub, run, tiny_model_path, transfer_set, capsys, monkeypatch
):  # fmt: skip
    push_adapter(run / "student", "user/student", base_model="maker/base")
    text = files_at(hub, "user/student")["README.md"].decode()
    (snippet,) = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    monkeypatch.chdir(run.parent)
    shutil.copytree(tiny_model_path, run.parent / "maker" / "base")
    names: dict = {}
    exec(compile(snippet, "card", "exec"), names)
    ids = transfer_set[0]["input_ids"].unsqueeze(0)
    with torch.inference_mode():
        expected = load_adapter(load_base(tiny_model_path), run / "student")(input_ids=ids).logits
        assert torch.equal(names["model"](input_ids=ids).logits, expected)
    assert names["tokenizer"].get_vocab() == AutoTokenizer.from_pretrained(tiny_model_path).get_vocab()
    assert names["inputs"]["input_ids"].shape[1] > 10  # the chat template's marks are there
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("quantization", "tags", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {"8-bit"}, "load_in_8bit=True,"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, {"4-bit"}, "quantization_config = ..."),
        ({"quant_method": "torchao"}, set(), "quantization_config = ..."),
        (None, {"4-bit"}, "was not recorded; this is quantkd's default"),
    ],
)
def test_the_page_says_how_many_bits(hub, run, quantization, tags, words):
    facts = json.loads((run / "student" / "quantkd.json").read_text())
    (run / "student" / "quantkd.json").write_text(json.dumps({**facts, "quantization": quantization}))
    push_adapter(run / "student", "user/student")
    _, front, text = files_at(hub, "user/student")["README.md"].decode().split("---\n", 2)
    assert set(yaml.safe_load(front)["tags"]) & {"4-bit", "8-bit"} == tags
    assert words in text and f"**{next(iter(tags), 'quantized')}**" in text
    assert ("4-bit" in text) == ("4-bit" in tags)


def test_without_a_tokenizer_and_a_name_the_page_says_so(hub, run, tiny_model_path, caplog):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (run / "student" / name).unlink()
    push_adapter(run / "student", "user/student")
    text = files_at(hub, "user/student")["README.md"].decode()
    base = tiny_model_path.name
    assert f"names the base model {base!r}" in caplog.text and "--base_model" in caplog.text
    assert f'AutoTokenizer.from_pretrained("{base}")' in text and "apply_chat_template" not in text
    assert f"name on the Hub was not given. {base} is the name of a local folder" in " ".join(text.split())


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
