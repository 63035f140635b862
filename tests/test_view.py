"""The divergence page: its data against float64 passes, how tokens are spelt and escaped, what it may load."""

import base64
import hashlib
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from quantkd import TransferSet
from quantkd.errors import ConfigError, DataError, TransferSetError
from quantkd.transfer_set.fingerprint import compute_fingerprint
from quantkd.transfer_set.row import TransferRow
from quantkd.view import collect_divergence, render_page, write_page
from quantkd.view.divergence import KL_EDGES
from quantkd.view.spelling import decode_text, spell_tokens
from tests.conftest import build_tiny_model, build_tiny_tokenizer, refused
from tests.divergence_pages import HOSTILE, Reader, make_divergence, make_page_divergence, make_row
from tests.teacher_rows import add_noise, dense_logprobs, sparse_divergences
from tests.transfer_sets import make_plan, make_row as make_set_row, write_rows

BYTE_LEVEL = build_tiny_tokenizer()


@pytest.fixture
def student():
    """The teacher with noise on its weights, which stands for quantization, and an adapter that does something."""
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(add_noise(build_tiny_model(BYTE_LEVEL)), lora)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_number_equals_a_plain_pass(held_out, student, batch_size):
    found = collect_divergence(student, held_out, BYTE_LEVEL, alternatives=3, batch_size=batch_size)
    assert [row.index for row in found.rows] == list(range(5))
    assert found.num_rows == 5 and found.digest == held_out.digest
    student.eval()
    kls = []
    for row in found.rows:
        item = held_out[row.index]
        with student.disable_adapter():
            before = dense_logprobs(student, item)
        after = dense_logprobs(student, item)
        expected = item["labels"][item["labels"] != -100], before.argmax(-1), after.argmax(-1)
        for mine, theirs in zip((row.token_ids, row.top_before, row.top_after), expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        kls.append([sparse_divergences(item["teacher"], dense)[0] for dense in (before, after)])
        np.testing.assert_allclose([row.kl_before, row.kl_after], kls[-1], rtol=0, atol=2e-4)
        teacher = item["teacher"]
        entries = list(zip(teacher.token_ids.tolist(), teacher.logprobs.tolist(), strict=True))
        for place, (start, stop) in enumerate(itertools.pairwise(teacher.offsets.tolist())):
            stored, known = dict(entries[start:stop]), row.alternatives
            own = slice(known.offsets[place], known.offsets[place + 1])
            ids = known.token_ids[own].tolist()
            ranked = sorted(stored, key=lambda token: -stored[token])[:3]
            extra = {int(row.token_ids[place]), int(before[place].argmax()), int(after[place].argmax())}
            assert ids[: len(ranked)] == ranked and sorted(ids) == sorted({*ranked, *extra})
            np.testing.assert_allclose(known.teacher[own], [stored.get(each, math.nan) for each in ids], atol=1e-6)
            np.testing.assert_allclose(known.before[own], before[place, ids], atol=2e-4)
            np.testing.assert_allclose(known.after[own], after[place, ids], atol=2e-4)
    means = np.concatenate(kls, axis=1).mean(1)
    assert found.mean_kl == pytest.approx(tuple(means), abs=1e-4)
    assert min(means) > 0.05  # so that a mistake would be seen


def test_the_page_holds_the_same_numbers(held_out, student):
    found = collect_divergence(student, held_out, BYTE_LEVEL)
    data = Reader(render_page(found)).data
    assert data["edges"] == list(KL_EDGES)
    for row, packed in zip(found.rows, data["rows"], strict=True):
        item = held_out[row.index]
        text = BYTE_LEVEL.decode(item["input_ids"])
        pieces = [data["strings"][place] for place in packed["tokens"]]
        response = b"".join(bytes(piece) if isinstance(piece, list) else piece.encode() for piece in pieces)
        assert packed["contexts"] == [[0, text[: text.index("assistant\n") + len("assistant\n")]]]
        assert text == packed["contexts"][0][1] + response.decode(errors="replace")
        np.testing.assert_allclose(packed["before"], row.kl_before, rtol=5e-3)
        np.testing.assert_allclose(packed["after"], row.kl_after, rtol=5e-3)
        assert sum(packed["counts"]) == len(packed["ids"]) == len(packed["p_teacher"])
        after = np.exp(np.array(packed["p_after"]) / -1e4)
        np.testing.assert_allclose(after, np.exp(row.alternatives.after), rtol=1e-4)
        stored = np.array(packed["p_teacher"], dtype=float)
        np.testing.assert_array_equal(stored == -1, np.isnan(row.alternatives.teacher))
        starts = np.append(0, np.cumsum(packed["counts"]))[:-1]
        names = [data["strings"][packed["ids"][at]] for at in (starts + packed["first_after"]).tolist()]
        spelled = [found.tokens[int(token)] for token in row.top_after]
        assert names == [list(name) if isinstance(name, bytes) else name for name in spelled]


def test_a_row_without_targets_shows_its_text(student, tmp_path):
    plan = make_plan(tokenizer_fingerprint=compute_fingerprint(BYTE_LEVEL), vocab_size=len(BYTE_LEVEL), num_prompts=2)
    ids, none = np.array(BYTE_LEVEL.encode("No answer")), np.zeros(0, np.int64)
    empty = TransferRow(ids, none.reshape(0, 2), none, none, none.astype(np.float32), np.zeros((0, 2), np.float32))
    write_rows(tmp_path / "set", plan, lambda prompt: make_set_row(plan, prompt) if prompt else empty)
    found = collect_divergence(student, TransferSet.open(tmp_path / "set"), BYTE_LEVEL)
    assert found.rows[0].contexts == ((0, "No answer"),) and len(found.rows[0].token_ids) == 0
    assert found.num_tokens == len(found.rows[1].token_ids) > 0
    assert Reader(render_page(found)).data["rows"][0]["tokens"] == []


@pytest.mark.parametrize("frozen", [False, True])
def test_rows_are_limited_and_the_model_is_as_it_was(held_out, student, frozen):
    student.train()
    student.get_base_model().model.norm.eval()  # a layer's own mode returns too
    modes = [module.training for module in student.modules()]
    if frozen:  # as PeftModel.from_pretrained loads one; PEFT's switch would leave it trainable
        student.requires_grad_(False)
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    trained = [parameter.requires_grad for parameter in student.parameters()]
    found = collect_divergence(student, held_out, BYTE_LEVEL, rows=2)
    assert [row.index for row in found.rows] == [0, 1] and found.num_rows == 5
    assert modes == [module.training for module in student.modules()]
    assert trained == [parameter.requires_grad for parameter in student.parameters()] and any(trained) != frozen
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())


def test_what_cannot_be_shown_is_refused(held_out, student):
    refused(ConfigError, "expected a PeftModel", collect_divergence, student.get_base_model(), held_out, BYTE_LEVEL)
    for wrong in ({"rows": 0}, {"rows": -1}, {"alternatives": 0}):
        refused(ConfigError, "expected at least 1", collect_divergence, student, held_out, BYTE_LEVEL, **wrong)
    refused(DataError, "no rows to show", collect_divergence, student, held_out[:0], BYTE_LEVEL)
    other = PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL._tokenizer, eos_token="<|pad|>")
    refused(TransferSetError, "tokenizer", collect_divergence, student, held_out, other)
    with torch.no_grad():
        student.get_base_model().model.norm.weight.fill_(math.nan)
    refused(DataError, r"KL at row \d is not finite", collect_divergence, student, held_out, BYTE_LEVEL)


def test_the_command_writes_the_page(cli, tmp_path, held_out, tiny_model_path, student):
    student.save_pretrained(tmp_path / "adapter")
    words = f"view --held_out {held_out.sources[0]} --model_name_or_path {tiny_model_path} --dtype float32".split()
    page, adapter = tmp_path / "page.html", ["--adapter", tmp_path / "adapter"]
    out = cli.ok(*words, *adapter, "--output", page, "--rows", 3, "--alternatives", 2)
    assert f"{page}: 3 rows, " in out
    text = page.read_text(encoding="utf-8")
    rows = Reader(text).data["rows"]
    means = [np.mean([kl for row in rows for kl in row[name]]) for name in ("before", "after")]
    printed = re.search(r"KL ([\d.]+) before, ([\d.]+) after", out)
    assert printed and [float(each) for each in printed.groups()] == pytest.approx(means, rel=5e-3)
    assert str(tmp_path) not in text and str(Path.home()) not in text  # no local path
    cli.fails("expected a file name that ends in .html", *words, "--output", "page.txt", *adapter)
    cli.fails("--rows is 0; expected at least 1", *words, "--output", page, "--rows", 0, *adapter)
    assert page.read_text(encoding="utf-8") == text


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_the_pieces_of_a_text_are_its_bytes(text):
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    spelled = spell_tokens(BYTE_LEVEL, ids)
    pieces = [spelled[each] for each in ids]
    assert b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces) == text.encode()
    for piece in pieces:
        if isinstance(piece, bytes):  # whatever is text by itself is shown as text
            with pytest.raises(UnicodeDecodeError):
                piece.decode()


def test_sentencepiece_tokens_keep_their_space_and_bytes_and_unknown_ids_have_a_name():
    """A vocabulary as Llama 2's: ▁ for a space, <0xNN> for bytes, and a decoder that drops the first space."""
    texts = {"▁a": " a", "▁": " ", "▁the": " the", "a": "a", "é": "é", "<0xF0>": b"\xf0", "<0x0A>": "\n", "<0x41>": "A"}
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "▁the", "é"]
    ids = {name: place for place, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(ids, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    for name, text in texts.items():
        assert spell_tokens(wrapped, [ids[name]]) == {ids[name]: text}
    end = BYTE_LEVEL.convert_tokens_to_ids("<|im_end|>")
    assert spell_tokens(BYTE_LEVEL, [end, 5000, end]) == {end: "<|im_end|>", 5000: "<id 5000>"}
    assert decode_text(BYTE_LEVEL, [end, *BYTE_LEVEL.encode(" a , b", add_special_tokens=False)]) == "<|im_end|> a , b"


def test_the_page_needs_nothing_from_outside_and_is_the_same_bytes_each_time(tmp_path):
    found = make_page_divergence()
    path = write_page(found, tmp_path / "new" / "page.html")
    first = path.read_bytes()
    path.write_text("old")
    assert write_page(found, str(path)).read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    refused(ConfigError, "is a folder; expected a file name", write_page, found, tmp_path)
    page = render_page(make_divergence(found.rows[:1], ["a"] * 40))
    reader = Reader(page)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", page.split('type="application/json"')[0])
    assert "http" not in reader.texts["script"][1] and "http" not in reader.texts["style"][0]
    links = [value for _, attributes in reader.tags for name, value in attributes.items() if name in {"src", "href"}]
    assert links == ["data:,", "#rows"]
    policies = [attributes["content"] for tag, attributes in reader.tags if attributes.get("http-equiv")]
    assert len(policies) == 1 and policies[0] is not None
    policy = dict(part.split(" ", 1) for part in policies[0].split("; "))
    assert policy["default-src"] == "'none'" and policy["base-uri"] == "'none'" and policy["form-action"] == "'none'"
    for name, text in (("script-src", reader.texts["script"][1]), ("style-src", reader.texts["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'"
    loading = [tag for tag, _ in reader.tags if tag in {"script", "style", "link", "iframe", "img", "object"}]
    assert loading == ["link", "style", "script", "script"]


def test_hostile_tokens_and_names_stay_text():
    tokens = [*HOSTILE, *(f"word{number}" for number in range(20))]

    def render(row_tokens, name):
        row = make_row(np.random.default_rng(0), 0, range(len(HOSTILE)), len(tokens), prompt=row_tokens[0])
        names = dict.fromkeys(("teacher", "student", "adapter", "digest"), name)
        return render_page(make_divergence([row], row_tokens, **names))

    page = render(tokens, "".join(HOSTILE) + "\u200b")
    hostile, harmless = Reader(page), Reader(render([f"word{number}" for number in range(len(tokens))], "x"))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert hostile.texts["script"][1] == harmless.texts["script"][1]
    strings = hostile.data["strings"]
    assert set(HOSTILE) <= set(strings) and hostile.data["rows"][0]["contexts"] == [[0, HOSTILE[0]]]
    raw = hostile.texts["script"][0]
    assert raw.isascii() and not set("<>&") & set(raw) and not re.search("[\u202e\x1b\u200b\u3164]", page)


@pytest.mark.parametrize(("before", "after", "said"), [
    (0.2, 0.05, "75% lower than before"), (0.1, 0.3, "higher than before"), (0.2, -1e-9, "100% lower than before"),
    (1e-9, 1e-9, "the same as the teacher, before and after"), (-1e-9, 5.0, "higher than before"),
])  # fmt: skip
def test_the_summary_says_how_the_kl_changed(before, after, said):
    row = make_row(np.random.default_rng(0), 0, [0, 1], 40)
    row.kl_before[:], row.kl_after[:] = before, after
    summary = render_page(make_divergence([row], ["a"] * 40)).split("<main>")[1].split('<div class="toolbar"')[0]
    text = " ".join(re.sub(r"<[^>]*>", " ", summary).split())
    assert said in text and "-0.000" not in text and "nan" not in text and f"before {max(before, 0):.3f}" in text
