"""Strangers' text, templates and tokenizers: a table of each, and what none of them may do."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, strategies as st

from quantkd.cli.format import format_info, say
from quantkd.cli.main import _Printable
from quantkd.data.encoding import encode_prompts
from quantkd.errors import ConfigError, DataError, HubError, code_span, markdown, printable
from quantkd.hub.cards import render_adapter_card, render_set_card
from quantkd.models.provenance import Provenance
from quantkd.names import load_tokenizer
from quantkd.report import format_table
from quantkd.training.checkpoints import find_checkpoint
from tests.conftest import refused
from tests.report_arms import build, make_arms, make_verdicts

MarkdownIt = pytest.importorskip("markdown_it", reason="no markdown-it-py; it comes with rich").MarkdownIt
pytest_plugins = ["hub_runs"]

TEXTS = [
    "\x1b[31mred\x1b]0;title\x07", "\x9b31m\x85",
    "\u202egnp.exe\u202c", "a\u200bb\u2066c\u2069\ufeff\xad", "\u3164\u2800", "a\ufe0fb\U000e0101\u180b",
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
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
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


def test_what_github_reads_in_addition_is_text_too_and_errors_are_cut():
    text = "_x_ __y__ a_b ~~z~~ https://a.example www.b.example a@c.example @d"
    assert markdown(text) == (
        r"\_x\_ \_\_y\_\_ a_b \~\~z\~\~ https\://a.example www\.b.example a@<!-- -->c.example @<!-- -->d"
    )
    error = DataError(f"Found {'x' * 10**6!r}. Remove it.")
    assert len(str(error)) < 4000 and str(error).startswith("Found 'xxx") and str(error).endswith("xxx'. Remove it.")


@given(st.text(st.sampled_from("[]()!<>&;#*`|\\:-=+1.~ \n\u202e\x1bjx_@/w")))
def test_any_text_in_markdown_renders_as_itself(text):
    tags, page = render(f"| a |\n|---|\n| x{markdown(text)}y |\n")
    assert " ".join(tags) == TABLE
    cell = re.search(r"<td>(.*)</td>", page)[1].replace("@<!-- -->", "@")
    for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        cell = cell.replace(entity, sign)
    assert cell == f"x{printable(' '.join(text.split()))}y"


def test_reports(tmp_path):
    arms = make_arms()
    # Matplotlib reads $...$ as mathematics and hides what begins with an underscore; a table ends at a line's end.
    for arm, title in zip(arms.values(), (ALL, "costs $5 \\frac{ $", "_hidden"), strict=True):
        arm |= {"title": title, "model": ALL}
        arm["questions"][ALL] = make_verdicts(90)
        arm["questions"][ALL]["settings"]["shots"] = ALL
        arm["fidelity"]["settings"]["transfer_set"] = ALL
    results, page = build(tmp_path, arms)
    tags, _ = render(page)
    assert set(tags) <= PAGE
    assert re.findall(r"<img[^>]*src=\"([^\"]*)", render(page)[1]) == ["gap.png", "kl_bits.png", "kl_bins.png"]
    assert is_shown_as_it_is(page) and is_shown_as_it_is(format_table(results))
    assert format_table(results).splitlines()[0].endswith("gap recovered") and (tmp_path / "gap.png").exists()


def test_cards(tmp_path, small_set, monkeypatch):
    monkeypatch.setattr("quantkd.report.figures.save_figure", lambda figure, path: path.touch())  # not looked at here
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
        assert set(tags) <= PAGE and re.findall(r"<img[^>]*src=\"([^\"]*)", page) in ([], ["gap.png"])
        code = re.search(r"```python\n(.*?)\n```\n", text, re.DOTALL)[1]
        compile(code, "card", "exec")
    assert is_shown_as_it_is(format_info(info))


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
@pytest.mark.parametrize("content", [
    "", "[]", "5", "{", '{"added_tokens_decoder": {"0": 1}}', "[" * 10**5, '{"a":' * 10**5,
    '{"tokenizer_class": [1]}', "\ud800",
])  # fmt: skip
def test_tokenizer_files_that_are_none(tiny_tokenizer, tmp_path, file, content):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / file).write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(tmp_path))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("content", [b"[" * 10**5, b"\xff"])
def test_a_trainer_state_that_is_none(tmp_path, content):
    (tmp_path / "trainer_state.json").write_bytes(content)
    refused(ConfigError, "is not a complete checkpoint", find_checkpoint, str(tmp_path), tmp_path)
