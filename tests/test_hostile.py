"""Strangers' text, adapters, templates and tokenizers: a table of each, and what none of them may do."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from quantkd.cli.format import format_info, say
from quantkd.cli.main import _Printable
from quantkd.data.encoding import encode_prompts
from quantkd.errors import ConfigError, DataError, HubError, code_span, markdown, printable
from quantkd.hub import load_adapter
from quantkd.hub.cards import render_adapter_card, render_set_card
from quantkd.models.export import export_adapter
from quantkd.models.provenance import Provenance
from quantkd.names import load_tokenizer
from quantkd.report import format_table
from quantkd.training.checkpoints import find_checkpoint
from quantkd.view import render_page
from tests.conftest import build_tiny_model
from tests.divergence_pages import Reader, make_divergence, make_page_divergence
from tests.report_arms import build, make_arms, make_verdicts

MarkdownIt = pytest.importorskip("markdown_it", reason="no markdown-it-py; it comes with rich").MarkdownIt
pytest_plugins = ["hub_runs"]

TEXTS = [
    "\x1b[31mred\x1b]0;title\x07", "\x9b31m\x85",
    "\u202egnp.exe\u202c", "a\u200bb\u2066c\u2069\ufeff\xad", "\u3164\u2800",
    "\U000e0041\U000e0042", "a\r\nb\tc\x00\x7f", "<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>",
    "[x](javascript:alert(1))", "![x](https://a.example/p.png)", "[x][y]", "[a]: javascript:alert(1)", "a|b|`c`*d*",
    "\\[x](y)", "&#106;avascript", "\n---\nlicense: mit\n---\n", "# h", "1. x", "- x", "---", "===", "``` x", "<!-- x",
    "{{ 7 * 7 }}{% raw %}", "<javascript:alert(1)>",
]  # fmt: skip
ALL = " ".join(TEXTS)
TABLE = "table thead tr th th tr thead tbody tr td td tr tbody table"
PAGE = {"h1", "h2", "p", "ul", "li", "strong", "blockquote", "code", "pre", "img", *TABLE.split()}


def is_shown_as_it_is(text):
    """No character of it moves, hides or reorders others; said in another way than `printable` does."""
    return not re.search(r"[^\n -~\xa1-\xac\xae-\u034e\u0350-\u115e]", text.replace("¦", ""))


def render(text):
    """The tags and the text that CommonMark with GitHub's tables makes of it."""
    page = MarkdownIt("commonmark").enable("table").render(text)
    return re.findall(r"</?(\w+)", page), page


@pytest.mark.parametrize("text", [*TEXTS, "\ud800", ALL])
def test_a_text_is_text_wherever_it_goes(text, capsys):
    plain = printable(text)
    assert is_shown_as_it_is(plain) and printable(plain) == plain and "\n" not in plain
    assert json.loads(printable(json.dumps(text))) == text or not text.isascii()
    for error in (DataError(text), HubError(text), OSError(DataError(text))):
        assert is_shown_as_it_is(str(error))
    say(text)
    assert is_shown_as_it_is(capsys.readouterr().out)
    record = logging.LogRecord("quantkd", logging.WARNING, "", 0, "%s", (text,), None)
    assert is_shown_as_it_is(_Printable().format(record))
    tags, _ = render(f"| a |\n|---|\n| {markdown(text)} |\n\n- {markdown(text)}\n\n`{code_span(text)}`\n")
    assert " ".join(tags) == f"{TABLE} ul li li ul p code code p"


@given(st.text(st.sampled_from("[]()!<>&;#*`|\\:-=+1.~ \n\u202e\x1bjx")))
def test_any_text_in_markdown_renders_as_itself(text):
    tags, page = render(f"| a |\n|---|\n| x{markdown(text)}y |\n")
    assert " ".join(tags) == TABLE
    cell = re.search(r"<td>(.*)</td>", page)[1]
    for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        cell = cell.replace(entity, sign)
    assert cell == f"x{printable(' '.join(text.split()))}y"


def test_reports(tmp_path):
    arms = make_arms()
    for arm in arms.values():
        arm |= {"title": ALL, "model": ALL}
        arm["questions"][ALL] = make_verdicts(90)
        arm["questions"][ALL]["settings"]["shots"] = ALL
        arm["fidelity"]["settings"]["transfer_set"] = ALL
    results, page = build(tmp_path, arms)
    tags, _ = render(page)
    assert set(tags) <= PAGE
    assert re.findall(r"<img[^>]*src=\"([^\"]*)", render(page)[1]) == ["gap.png", "kl_bins.png"]
    assert is_shown_as_it_is(page) and is_shown_as_it_is(format_table(results))


def test_cards(tmp_path, small_set):
    results, _ = build(tmp_path, make_arms())
    results["arms"]["after"]["title"] = results["transfer_set_digest"] = ALL
    results["metrics"] = {key: f"{title}{ALL}" for key, title in results["metrics"].items()}
    recorded = {"load_in_4bit": True, "bnb_4bit_quant_type": ALL, "bnb_4bit_x\n": 1, "quant_method": ALL}
    facts = Provenance(ALL, ALL, ALL, ALL, {ALL: ALL, "divergence": ALL}, {"seed": ALL}, recorded)
    adapter = {"base_model_name_or_path": ALL, "peft_type": ALL, "r": ALL, "target_modules": [ALL], "bias": {ALL: ALL}}
    has = {"chart": True, "tokenizer": True, "chat_template": True}
    info = replace(small_set.info, teacher_name=ALL, teacher_revision=ALL, engine=ALL, counters={ALL: 1}, digest=ALL,
                   storage={"kind": ALL}, generation={ALL: ALL}, teacher_dtype=ALL)  # fmt: skip
    for card in (
        render_adapter_card(f"user/{ALL}", adapter, facts, results, license="mit", **has),
        render_set_card(info, 1, repo_id=f"user/{ALL}", license="mit"),
    ):
        _, front, text = card.split("---\n", 2)
        assert yaml.safe_load(front)["license"] == "mit" and is_shown_as_it_is(card)
        tags, page = render(text)
        assert set(tags) <= PAGE
        assert re.findall(r"<img[^>]*src=\"([^\"]*)", page) in ([], ["gap.png"])
        code = re.search(r"```python\n(.*?)\n```\n", text, re.DOTALL)[1]
        compile(code, "card", "exec")
    assert is_shown_as_it_is(format_info(info))


def test_the_divergence_page():
    rows = make_page_divergence().rows[:1]
    names = dict.fromkeys(("teacher", "student", "adapter", "digest"), ALL)
    pages = [render_page(make_divergence(rows, ["a"] * 40, **each)) for each in (names, dict.fromkeys(names, "x"))]
    hostile, harmless = ([tag for tag, _ in Reader(page).tags] for page in pages)
    assert hostile == harmless and not re.search("[\u202e\x1b\u200b\u3164]", pages[0])


@pytest.fixture(scope="module")
def adapter_folder(tiny_tokenizer, tmp_path_factory):
    """A small, honest adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(build_tiny_model(tiny_tokenizer), config).save_pretrained(folder)
    return folder


def change(source, folder, name=None, value=None, weight=None):
    """A copy of an adapter with another value in a field, or another tensor in place of its first one."""
    fields = json.loads((source / "adapter_config.json").read_text())
    fields |= {"base_model_name_or_path": "maker/tiny"} | ({name: value} if name else {})
    weights = load_file(source / "adapter_model.safetensors")
    if weight is not None:
        weights[min(weights)] = weight(weights[min(weights)])
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


FIELDS = [
    ("lora_alpha", 1e308), ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("lora_alpha", "16"),
    ("lora_alpha", True), ("lora_alpha", [16]), ("lora_alpha", None), ("lora_dropout", -0.1), ("lora_dropout", 1),
    ("lora_dropout", {"a": 1}), ("r", True), ("r", 0), ("r", 2**40), ("r", -1), ("r", 2.0), ("r", [2]), ("r", "2"),
    ("rank_pattern", {"q_proj": True}), ("rank_pattern", {"q_proj": {"a": 1}}), ("rank_pattern", [["q_proj", 2]]),
    ("alpha_pattern", {"q_proj": float("nan")}), ("alpha_pattern", "q_proj"), ("bias", ["all"]), ("bias", "some"),
    ("use_dora", "yes"), ("use_rslora", 1), ("fan_in_fan_out", {}), ("layers_to_transform", [[0]]),
    ("layers_to_transform", {"0": 1}), ("task_type", {"a": 1}), ("base_model_name_or_path", ["a"]),
]  # fmt: skip
WEIGHTS = {
    "nan": lambda w: w.index_fill(0, torch.tensor(0), torch.nan),
    "inf": lambda w: w * torch.inf,
    "1048576.0": lambda w: torch.full_like(w, 2.0**20),
    "torch.int64": lambda w: w.long(),
    "nothing": lambda w: w[:0],
}


@pytest.mark.parametrize(("name", "value"), FIELDS)
def test_a_field_that_cannot_be_is_refused_by_name_and_value(adapter_folder, tiny_model, tmp_path, name, value):
    folder = change(adapter_folder, tmp_path / "adapter", name, value)
    said = rf"{name} in adapter_config.json of .* is {re.escape(repr(value)[:80])}; expected"
    with pytest.raises(DataError, match=said):
        load_adapter(tiny_model, folder)
    assert not isinstance(tiny_model, PeftModel) and not any("lora" in key for key in tiny_model.state_dict())


@pytest.mark.parametrize("found", WEIGHTS)
def test_weights_that_cannot_be_are_refused(adapter_folder, tiny_model, tiny_tokenizer, tmp_path, found, hub):
    folder = change(adapter_folder, tmp_path / "adapter", weight=WEIGHTS[found])
    said = rf"lora_A.weight of .* holds {re.escape(found)}; expected floating-point numbers"
    hub.make("model", "user/adapter", {path.name: path.read_bytes() for path in folder.iterdir()}, private=False)
    for place in (folder, "user/adapter"):
        with pytest.raises(DataError, match=said):
            load_adapter(tiny_model, place)
    with pytest.raises(DataError, match=said):
        export_adapter(str(folder), tiny_tokenizer, tmp_path / "export", base="maker/tiny")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("r", 3, "has rank 2, and adapter_config.json says 3"), ("rank_pattern", {"q_proj": 2**14}, "says 16384"),
     ("target_modules", [f"m{number}" for number in range(20_000)], "names 20000 modules in one list"),
     ("target_modules", [["q_proj"]], "expected plain names"), ("exclude_modules", {"a": 1}, "expected plain names")],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_itself(adapter_folder, tiny_model, tmp_path, name, value, said):
    with pytest.raises(DataError, match=said):
        load_adapter(tiny_model, change(adapter_folder, tmp_path / "adapter", name, value))


@pytest.mark.parametrize(
    ("own", "is_said"), [("maker/tiny", False), ("other/tiny", True), ("/models/tiny", False), ("/models/big", True)]
)
def test_another_base_model_is_said(adapter_folder, tiny_model, tiny_tokenizer, tmp_path, caplog, own, is_said):
    folder = change(adapter_folder, tmp_path / "adapter")
    tiny_model.config.name_or_path = own
    load_adapter(tiny_model, folder)
    export_adapter(str(folder), tiny_tokenizer, tmp_path / "export", base=own)
    assert caplog.text.count("says that it was trained on 'maker/tiny'") == 2 * is_said


def test_a_checkpoint_is_checked_before_it_is_resumed(make_trainer, caplog):
    make_trainer(save_strategy="steps", save_steps=1).train()
    checkpoint = Path(make_trainer().args.output_dir) / "checkpoint-1"
    change(checkpoint, checkpoint)
    make_trainer(max_steps=3).train(resume_from_checkpoint=str(checkpoint))
    assert "says that it was trained on 'maker/tiny'" in caplog.text
    for options, said in (
        ({"name": "lora_alpha", "value": "x"}, "lora_alpha in"),
        ({"name": "lora_alpha", "value": 32, "weight": WEIGHTS["nan"]}, "nan"),
    ):
        change(checkpoint, checkpoint, **options)
        with pytest.raises(DataError, match=said):
            make_trainer(max_steps=3).train(resume_from_checkpoint=str(checkpoint))


TEMPLATES = {
    "{{ ''.__class__.__mro__ }}": "unsafe|undefined",
    "{{ messages.append(1) }}": "not safely callable|unsafe",
    "{% for i in range(10 ** 7) %}{% endfor %}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ 1 / 0 }}": "division",
    "{{ messages + 1 }}": "can only concatenate",
    "{{ 'x' * 10 ** 15 }}": "MemoryError",
    "{{ messages | sum }}": "unsupported operand",
    "{% for": "Expected|unexpected|end of template",
    "{{ raise_exception('\x1b[31m') }}": r"\\u001b\[31m",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_fails_is_one_refusal(tiny_tokenizer, monkeypatch, template):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    with pytest.raises(DataError, match=rf"^Row 0: The chat template refuses .*({TEMPLATES[template]})"):
        encode_prompts(tiny_tokenizer, ["Why?"])


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "5",
        "{",
        '{"added_tokens_decoder": {"0": 1}}',
        "[" * 10**5,
        '{"a":' * 10**5,
        '{"tokenizer_class": [1]}',
        "\ud800",
    ],
)
def test_tokenizer_files_that_are_none(tiny_tokenizer, tmp_path, file, content):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / file).write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises((ConfigError, ValueError, OSError)) as error:
        load_tokenizer(str(tmp_path))
    assert isinstance(error.value, ConfigError) and len(str(error.value)) < 1000


@pytest.mark.parametrize("content", [b"[" * 10**5, b'{"a":' * 10**5, b"\xff", b"{", b'{"a": ' + b"1" * 5000 + b"}"])
def test_json_beside_an_adapter_that_is_none(tmp_path, content):
    for name in ("quantkd.json", "trainer_state.json"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="is not JSON"):
        Provenance.read(tmp_path)
    with pytest.raises(ConfigError, match="is not a complete checkpoint"):
        find_checkpoint(str(tmp_path), tmp_path)
