"""Engines that give log-probabilities: servers of each kind, and vLLM in this process.

Their rows are held against a dense float64 pass and transformers; what they cannot give or do is refused.
"""

import json
import logging
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from fake_openai_server import FakeServer, sampled_and_top
from teacher_rows import KINDS, assert_entries

from quantkd import Nucleus, Sampled, TopK
from quantkd.errors import ConfigError, MissingDependencyError, TeacherError
from quantkd.teacher import EncodedPrompt, GenerationSettings, TransformersTeacher
from quantkd.teacher.logprobs import RowBuilder, TopLogprobs
from quantkd.teacher.server import ServerTeacher
from quantkd.teacher.server_dialects import DIALECTS, Completion
from quantkd.teacher.vllm import VLLMTeacher
from tests.conftest import capture_set, refused

TEXTS = ["What is two plus three?", "Name a colour.", "user", "She has 3 + 4 apples and a train travels 60 miles."]
SETTINGS, RULE = GenerationSettings(max_new_tokens=10), TopK(5)
IN_PROCESS = ["flat", "dictionaries"]  # the two shapes of vLLM's log-probabilities


@pytest.fixture
def prompts(tiny_tokenizer):
    return [EncodedPrompt(index, tiny_tokenizer.encode(text)) for index, text in enumerate(TEXTS)]


@pytest.fixture
def serve(tiny_model, tiny_tokenizer):
    with ExitStack() as running:
        ends = [tiny_tokenizer.eos_token_id]
        yield lambda **kwargs: running.enter_context(FakeServer(tiny_model, ends, **kwargs))


@pytest.fixture
def connect(tiny_tokenizer):
    def build(server, rule=RULE, settings=SETTINGS, **kwargs):
        kwargs = {"backoff_seconds": 0.001, "vocab_size": len(tiny_tokenizer), **kwargs}
        url = server if isinstance(server, str) else server.url
        return ServerTeacher(url, "tiny", tiny_tokenizer, rule, (1.0,), settings, **kwargs)

    return build


class FakeLLM:
    """vLLM's `LLM`, which answers from a model in either of its two shapes."""

    def __init__(self, model, *, shape, engine, **kwargs):
        self.shape, self.engine, self.kwargs = shape, engine, kwargs
        self.model_config = SimpleNamespace(
            hf_config=SimpleNamespace(_commit_hash="abc", name_or_path=""), revision=None, dtype=torch.float32,
            max_model_len=512, get_vocab_size=lambda: engine.model.vocab_size,
            try_get_generation_config=lambda: {"eos_token_id": [1, 2]},
        )  # fmt: skip

    def put(self, targets):
        if self.shape == "dictionaries":
            named = [[(token, SimpleNamespace(logprob=value)) for token, value in target or ()] for target in targets]
            return [dict(each) or None for each in named]
        stops = np.cumsum([len(target or ()) for target in targets]).tolist()
        flat = [pair for target in targets for pair in target or ()]
        ids, logprobs = ([pair[part] for pair in flat] for part in (0, 1))
        return SimpleNamespace(start_indices=[0, *stops[:-1]], end_indices=stops, token_ids=ids, logprobs=logprobs)

    def generate(self, inputs, parameters, use_tqdm):
        outputs = []
        for each, setting in zip(inputs, parameters, strict=True):
            prompt, ends, seed = each["prompt_token_ids"], setting.stop_token_ids, getattr(setting, "seed", 0)
            tokens, steps = self.engine.generate(prompt, setting.max_tokens, ends, setting.temperature, seed)
            targets = [sampled_and_top(*pair, setting.logprobs) for pair in zip(steps, tokens, strict=True)]
            output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=self.put(targets))])
            if count := getattr(setting, "prompt_logprobs", None):
                output.prompt_logprobs = self.put([None, *self.engine.list_prompt(prompt, count)])
            outputs.append(output)
        return outputs


@pytest.fixture
def run_engine(serve, connect, monkeypatch, tiny_model, tiny_tokenizer):
    """A teacher of a kind of server, or by vLLM in this process."""

    def build(kind, rule=RULE, settings=SETTINGS):
        if kind in KINDS:
            return connect(serve(kind=kind), rule, settings)
        module = ModuleType("vllm")
        module.LLM = partial(FakeLLM, shape=kind, engine=FakeServer(tiny_model, []))
        module.SamplingParams = SimpleNamespace
        monkeypatch.setitem(sys.modules, "vllm", module)
        return VLLMTeacher("tiny", tiny_tokenizer, rule, (1.0,), settings, dtype="float32")

    return build


@pytest.mark.parametrize("rule", [TopK(1), TopK(40), Nucleus(0.8, max_k=30)], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, *IN_PROCESS])
def test_an_engine_gives_what_transformers_gives(run_engine, prompts, tiny_model, tiny_tokenizer, kind, rule):
    teacher = run_engine(kind, rule)
    rows = teacher.answer(prompts)
    own = TransformersTeacher(tiny_model, tiny_tokenizer, rule, (1.0,), SETTINGS).answer(prompts)
    for row, expected in zip(rows, own, strict=True):
        row.validate(teacher.vocab_size)
        assert_entries(row, tiny_model, rule)
        for name in ("input_ids", "spans", "counts", "finished"):
            np.testing.assert_array_equal(getattr(row, name), getattr(expected, name), err_msg=name)
        np.testing.assert_allclose(row.logprobs, expected.logprobs, atol=1e-4)
    engine = "vllm" if kind in IN_PROCESS else "server"
    assert (teacher.describe()["engine"], teacher.temperatures, teacher.max_context) == (engine, (1.0,), 512)


def test_what_vllm_says_of_its_model_and_is_asked(run_engine, tiny_tokenizer):
    teacher = run_engine("flat")
    assert (teacher.revision, teacher.dtype) == ("abc", "float32")
    assert teacher.ends == sorted({1, 2, tiny_tokenizer.eos_token_id})
    assert teacher.llm.kwargs == {"logprobs_mode": "raw_logprobs", "max_logprobs": 64, "dtype": "float32"}


@pytest.mark.parametrize("kind", [*KINDS, *IN_PROCESS])
def test_given_answers_are_scored_turn_by_turn(run_engine, prompts, tiny_model, kind):
    rule = Nucleus(0.7, max_k=20)
    teacher = run_engine(kind, rule)
    answered = teacher.answer(prompts[:2])
    pairs = zip(prompts[:2], answered, strict=True)
    own = [replace(each, completion_ids=row.input_ids[len(each.prompt_ids) :].tolist()) for each, row in pairs]
    for row, expected in zip(teacher.score(own), answered, strict=True):
        assert row.finished == expected.finished and row.input_ids.tolist() == expected.input_ids.tolist()
        assert row.token_ids.tolist() == expected.token_ids.tolist()
    given = [
        EncodedPrompt(0, [5, 6, 7], [40]),
        EncodedPrompt(1, [9], list(range(50, 62)), ((1, 3), (6, 7), (10, 13))),
        EncodedPrompt(2, [5, 6], [30, 31, teacher.ends[0]]),
    ]
    rows = teacher.score(given)
    for row, prompt in zip(rows, given, strict=True):
        assert_entries(row, tiny_model, rule)
        assert row.input_ids.tolist() == prompt.prompt_ids + prompt.completion_ids
    assert rows[1].spans.tolist() == [[1, 3], [6, 7], [10, 13]]
    assert [row.finished for row in rows] == [False, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_with_its_end_token(serve, connect, prompts, tiny_model, tiny_tokenizer, kind):
    greedy = connect(serve()).answer(prompts[:1])[0].input_ids[len(prompts[0].prompt_ids) :].tolist()
    end = next(token for place, token in enumerate(greedy) if place >= 2 and token not in greedy[:place])
    for own_ends in ([end], []):  # llama.cpp ends at its own alone, so it goes past another one
        server = serve(kind=kind)
        server.ends = own_ends
        teacher = connect(server)
        teacher.ends = [end]
        (row,) = teacher.answer(prompts[:1])
        assert row.finished and row.input_ids[len(prompts[0].prompt_ids) :].tolist() == greedy[: greedy.index(end) + 1]
        assert_entries(row, tiny_model, TopK(5))


def test_dropped_end_tokens_and_too_few_logprobs_are_refused(serve, connect, prompts):
    def drop(body):
        if len(body["choices"][0]["logprobs"]["tokens"]) > 1:
            body["choices"][0]["finish_reason"] = "stop"
        return body

    refused(TeacherError, "without one of the end tokens", connect(serve(mangle=drop)).answer, prompts)

    def cut(body):
        for target in body["choices"][0]["logprobs"]["top_logprobs"]:
            for token in list(target)[3:]:
                del target[token]
        return body

    refused(TeacherError, r"with 3 log-probabilities at token 0 .* TopK\(k=5\) needs 5", connect, serve(mangle=cut))
    refused(TeacherError, "max-logprobs", connect, serve(max_logprobs=4))
    connect(serve(mangle=cut), Nucleus(1e-6, max_k=5))  # three are more than it keeps


def test_tokens_of_no_certain_place_are_left_out(serve, connect, prompts, tiny_model, caplog):
    def drop(body):
        if len(body["completion_probabilities"]) > 4:
            del body["completion_probabilities"][2:4]
        return body

    whole = connect(serve(kind="llama.cpp")).answer(prompts[:1])[0]
    start, stop = whole.spans[0]
    before, *left_out, after = whole.input_ids[start + 1 : start + 5].tolist()
    assert not {before, after} & {*left_out}, "the case of the next test"
    (row,) = connect(serve(kind="llama.cpp", mangle=drop)).answer(prompts[:1])
    assert row.input_ids.tolist() == whole.input_ids.tolist()
    assert row.spans.tolist() == [[start, start + 2], [start + 4, stop]]
    assert_entries(row, tiny_model, TopK(5))
    assert "left out of the targets" in caplog.text
    completion = Completion("tiny", [1], 1, SETTINGS, 0, [2])
    for ids, tokens, places in (
        ([7, 3, 8], [7, 3, 3, 8], [0, 3]),  # candidates for 7, one of the threes, and 8
        ([1, 2, 3], [1, 2, 3], [0, 1, 2]),
    ):
        steps = [{"id": token, "top_logprobs": [{"id": token, "logprob": -0.5}]} for token in ids]
        body = {"tokens": tokens, "completion_probabilities": steps, "stop_type": "limit", "tokens_evaluated": 1}
        answer = DIALECTS["llama.cpp"].read(body, completion)
        assert answer.places == places and answer.candidates.token_ids.tolist() == [tokens[place] for place in places]


def test_rows_keep_their_order_and_run_at_once(serve, connect, prompts):
    server = serve()
    teacher = connect(server, concurrency=3)
    server.delay_seconds = 0.05
    many = [EncodedPrompt(index, prompts[index % 4].prompt_ids) for index in range(9)]
    for row, prompt in zip(teacher.answer(many), many, strict=True):
        assert row.input_ids[: len(prompt.prompt_ids)].tolist() == prompt.prompt_ids
    assert server.most_active == 3


@pytest.mark.parametrize("kind", [*KINDS, *IN_PROCESS])
def test_a_row_samples_the_same_in_any_batch_and_is_stored_unscaled(run_engine, prompts, tiny_model, kind):
    temperature = 1.0 if kind == "sglang" else 1.7
    settings = GenerationSettings(8, do_sample=True, generation_temperature=temperature, top_p=0.9, top_k=7, seed=3)
    teacher = run_engine(kind, settings=settings)
    rows, alone = teacher.answer(prompts), teacher.answer(prompts[2:3])[0]
    assert alone.input_ids.tolist() == rows[2].input_ids.tolist()
    for row in rows:
        assert_entries(row, tiny_model, TopK(5))  # although the sampled token is often none of the five
    others = run_engine(kind, settings=replace(settings, seed=4)).answer(prompts)
    assert [row.input_ids.tolist() for row in others] != [row.input_ids.tolist() for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_is_asked_for_every_sampling_setting(serve, connect, prompts, kind):
    server, temperature = serve(kind=kind), 1.0 if kind == "sglang" else 1.7
    settings = GenerationSettings(2, do_sample=True, generation_temperature=temperature, top_p=0.9, top_k=7)
    connect(server, settings=settings).answer(prompts[:1])
    sent = server.requests[-1][2]
    sampling = sent.get("sampling_params", sent)
    assert (sampling["temperature"], sampling["top_p"], sampling["top_k"]) == (temperature, 0.9, 7)


def test_what_no_engine_of_log_probabilities_can_give(connect, tiny_tokenizer, monkeypatch):
    for build in (VLLMTeacher, partial(ServerTeacher, "http://h")):
        with pytest.raises(ConfigError, match=r"Sampled\(n=8\) draws from the whole distribution"):
            build("tiny", tiny_tokenizer, Sampled(8), (1.0,), SETTINGS)
        with pytest.raises(ConfigError, match=r"temperature 1.0 alone; .* \[1.0, 2.0\]"):
            build("tiny", tiny_tokenizer, TopK(5), (1.0, 2.0), SETTINGS)
    refused(ConfigError, "exceeds the teacher's vocabulary", connect, "http://127.0.0.1:9", TopK(321))
    for option, message in (
        ({"max_logprobs": 20}, "max_logprobs=20 allows fewer"), ({"logprobs_mode": "raw_logits"}, "logprobs_mode"),
    ):  # fmt: skip
        refused(ConfigError, message, VLLMTeacher, "tiny", tiny_tokenizer, TopK(50), (1.0,), SETTINGS, **option)
    monkeypatch.setitem(sys.modules, "vllm", None)
    refused(MissingDependencyError, "pip install vllm", VLLMTeacher, "tiny", tiny_tokenizer, TopK(5), (1.0,), SETTINGS)


def row_of(pairs, rule, vocab_size=10, targets=None, first=0):
    length = 1 + (targets or len(pairs))
    ids, spans = [first] + [0] * (length - 1), np.array([[1, length]])
    builder = RowBuilder("The engine", rule, vocab_size, 10)
    return builder.build(4, ids, spans, TopLogprobs.from_pairs(pairs), finished=True)


def test_candidates_are_sorted_joined_and_cut():
    log = np.log
    pairs = [
        [(7, log(0.1)), (2, log(0.5)), (7, log(0.1)), (3, log(0.2))],  # the sampled token twice
        [(9, log(0.001)), (1, log(0.25)), (0, log(0.25)), (5, log(0.25))],  # the sampled token beyond the top
        [(4, 0.0), (6, -9999.0), (8, -np.inf)],  # nothing but one token is possible
    ]
    for rule, vocab_size, counts, ids in (
        (TopK(3), 10, [3, 3, 1], [2, 3, 7, 0, 1, 5, 4]),
        (Nucleus(0.45, max_k=3), 10, [1, 2, 1], [2, 0, 1, 4]),
        (TopK(3), 7, [2, 3, 1], [2, 3, 0, 1, 5, 4]),  # 7 to the tail
    ):
        row = row_of(pairs, rule, vocab_size)
        assert (row.counts.tolist(), row.token_ids.tolist()) == (counts, ids)
        row.validate(vocab_size)
    assert row_of([[(1, 5e-4)]], TopK(1)).logprobs.tolist() == [0.0]  # a float16 teacher's rounding


@pytest.mark.parametrize(("pairs", "options", "message"), [
    ([[(1, float("nan"))]], {}, "prompt 4 with the log-probability nan"), ([[(1, 0.5)]], {}, "log-probability 0.5"),
    ([[(10, -1.0)]], {}, "token id 10, and the vocabulary ends at 10"), ([[(-1, -1.0)]], {}, "token id -1"),
    ([[]], {}, "0 log-probabilities at token 0"), ([[(1, -1.0)], [(1, -9999.0)]], {}, "at token 1"),
    ([[(1, -1.0)]], {"targets": 2}, "1 tokens; expected 2"),
    ([[(1, -1.0)]], {"first": 10}, "token id 10, and the vocabulary ends"),
    ([[(1, -1.0), (1, -2.0)]], {}, "two log-probabilities of the token 1 in one place"),
    ([[(1, -0.1), (2, -0.1)]], {}, r"answer to prompt 4: The entries of target 0 hold a mass of 1\.8"),
])  # fmt: skip
def test_what_cannot_be_stored(pairs, options, message):
    refused(TeacherError, message, row_of, pairs, TopK(len(pairs[0]) or 1), **options)


KEY = "sk-secret-0123456789"


def put(body, token):
    """The body with another first token, whose candidate it is, too."""
    logprobs = body["choices"][0]["logprobs"]
    logprobs["tokens"][0] = token
    logprobs["top_logprobs"][0] = {token: -0.5}
    return body


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_is_tried_again(serve, connect, prompts, kind, caplog):
    caplog.set_level(logging.INFO, "quantkd")
    expected = connect(serve(kind=kind)).answer(prompts)
    server = serve(kind=kind)
    teacher = connect(server, concurrency=2)
    server.faults = [429, 500, "reset", "malformed", "truncated", 503]
    rows = teacher.answer(prompts)
    assert not server.faults and [r.token_ids.tolist() for r in rows] == [r.token_ids.tolist() for r in expected]
    for word in ("HTTP 429", "HTTP 500", "not JSON", "IncompleteRead"):
        assert word in caplog.text


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(("start", "part"), [
    (b"", HEAD[:1]), (b"", b"HTTP/1.1 100 Continue\r\n\r\n"), (HEAD, b"x"),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1"), (HEAD + b"Content-Length: 500\r\n\r\n", b"{"),
    (b"HTTP/1.1 503 Busy\r\nContent-Length: 500\r\n\r\n", b"x"),
])  # fmt: skip
def test_an_answer_that_drips_ends_in_time(serve, connect, prompts, start, part):
    server = serve()
    teacher = connect(server, timeout_seconds=0.3, max_retries=0)
    server.drip = [start, *[part] * 100]  # no single wait is long, and all together take 2 seconds
    refused(TeacherError, r"timed out|TimeoutError", teacher.answer, prompts[:1])


def test_bodies_are_bounded_and_a_server_that_stays_down_or_is_slow_is_one_line(serve, connect, prompts, monkeypatch):
    server = serve()
    teacher = connect(server, max_retries=0)
    server.respond = lambda path, body: (200, "[" * 200_000)
    refused(TeacherError, "nested too deeply", teacher.answer, prompts[:1])
    server.respond = lambda path, body: (200, '{"choices": "' + "x" * 5000)
    monkeypatch.setattr("quantkd.teacher.server_client._MAX_AGAIN_BYTES", 4000)
    refused(TeacherError, "with 5013 bytes that are not JSON", teacher.answer, prompts[:1])
    monkeypatch.setattr("quantkd.teacher.server_client.MAX_BODY_BYTES", 1000)
    refused(TeacherError, "more than 1000 bytes", teacher.answer, prompts[:1])
    server = serve()
    teacher, hasty = connect(server, max_retries=3), connect(server, timeout_seconds=0.2, max_retries=1)
    server.faults = [500] * 4
    refused(TeacherError, r"did not answer /v1/completions after 4 attempts.*HTTP 500", teacher.answer, prompts[:1])
    server.delay_seconds = 0.6
    refused(TeacherError, r"2 attempts.*(timed out|TimeoutError)", hasty.answer, prompts[:1])
    server.__exit__()
    refused(TeacherError, "ConnectionRefusedError", connect, server)


@pytest.mark.parametrize(("kind", "mangle", "message"), [
    ("other", None, "names tokens by their text"), ("vllm", lambda body: [], "another shape than expected"),
    ("vllm", lambda body: {"choices": [{**body["choices"][0], "logprobs": None}]}, "no log-probabilities"),
    ("vllm", lambda body: {"error": "what"}, "another shape than expected"),
    ("vllm", lambda body: put(body, "token_id:" + "9" * 30), "another shape than expected"),
    ("vllm", lambda body: put(body, "token_id:1_0"), "names tokens by their text"),
    ("llama.cpp", lambda body: {**body, "tokens": [5] * 50}, "gave 50 tokens|another shape"),
    ("vllm", lambda body: put(body, "token_id:5000"), "the token id 5000, and the vocabulary ends at 320"),
    ("sglang", lambda body: {"text": "hello"}, "another shape than expected"),
    ("llama.cpp", lambda body: {**body, "tokens": []}, "another shape than expected"),
])  # fmt: skip
def test_answers_that_cannot_be_stored_are_refused_before_any_work(serve, connect, kind, mangle, message):
    refused(TeacherError, message, connect, serve(kind=kind, mangle=mangle))


def test_another_model_and_addresses_that_cannot_be(serve, connect, tiny_tokenizer):
    server = serve()
    with pytest.raises(ConfigError, match=r"serves 'tiny', and 'huge' was asked for"):
        ServerTeacher(server.url, "huge", tiny_tokenizer, TopK(5), (1.0,), SETTINGS)
    for url, options, message in (
        *((url, {}, "base_url") for url in ("ftp://host/v1", "127.0.0.1:8000", "http://host/v1?key=1", "")),
        ("http://[::1/v1", {}, "is not an address"),
        ("http://user:hunter2@host/v1", {}, "OPENAI_API_KEY"),
        (server, {"dialect": "tgi"}, "dialect is one of"),
        ("http://a..b/v1", {}, r"cannot be asked .*Check base_url"),
        (server, {"timeout_seconds": 1e300}, r"cannot be asked .*timeout_seconds"),
        *((server, {"timeout_seconds": each}, "timeout_seconds is") for each in (-1, "soon", True)),
        *((server, {name: "3"}, f"{name} is '3'") for name in ("max_retries", "backoff_seconds")),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            connect(url, **options)
        assert "hunter2" not in str(caught.value)
    connect(server.url.removesuffix("/v1") + "/")
    settings = GenerationSettings(8, do_sample=True, generation_temperature=0.7)
    refused(ConfigError, "after the sampling temperature", connect, serve(kind="sglang"), settings=settings)


def test_the_key_is_sent_and_never_shown(serve, connect, prompts, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    caplog.set_level(logging.DEBUG)
    server = serve(error_body=json.dumps({"error": f"Incorrect API key provided: {KEY}"}))
    teacher = connect(server, max_retries=1)
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.requests)
    teacher.answer(prompts)
    errors = []
    for faults in ([401], [500, 500], ["reset", "malformed"]):
        server.faults = list(faults)
        with pytest.raises(TeacherError) as failed:
            teacher.answer(prompts[:1])
        error = failed.value
        while error is not None:
            errors.append(f"{error!r} {error}")
            error = error.__cause__
    assert "OPENAI_API_KEY" in errors[0]
    assert KEY not in "".join(errors) + caplog.text + repr(teacher) + repr(vars(teacher))
    other = serve()
    server.redirect_to = other.url + "/models"  # which is not followed
    refused(TeacherError, "redirects", connect, server)
    assert other.requests == []
    monkeypatch.setenv("OPENAI_API_KEY", "line\r\nbreak-hunter2")
    with pytest.raises(ConfigError, match="cannot be sent") as caught:
        connect(server)
    assert "hunter2" not in str(caught.value)


def test_a_capture_resumes_and_stores_no_secret(serve, prompts, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve()
    kwargs = {
        "tokenizer": tiny_tokenizer, "engine": "server", "base_url": server.url, "storage": TopK(8),
        "engine_kwargs": {"vocab_size": len(tiny_tokenizer), "backoff_seconds": 0.001, "max_retries": 1},
        "max_new_tokens": 6, "batch_size": 2, "rows_per_shard": 2, "chat_template": False,
    }  # fmt: skip
    answered = server.respond
    # The probe, the first shard's two prompts, and then the server is down.
    server.respond = lambda *asked: answered(*asked) if len(server.requests) <= 4 else (503, KEY)
    refused(TeacherError, "HTTP 503", capture_set, "tiny", TEXTS, tmp_path / "set", **kwargs)
    server.respond = answered
    before = len(server.requests)
    transfer_set = capture_set("tiny", TEXTS, tmp_path / "set", **kwargs)
    assert len(server.requests) - before == 4  # the model's card, the probe, and the second shard alone
    assert transfer_set.info.engine == "server"
    own = TransformersTeacher(tiny_model, tiny_tokenizer, TopK(8), (1.0,), GenerationSettings(6)).answer(prompts)
    for row, expected in zip(transfer_set, own, strict=True):
        assert row["input_ids"].tolist() == expected.input_ids.tolist()
        assert {*row["teacher"].token_ids.tolist()} == {*expected.token_ids.tolist()}
    content = b"".join(file.read_bytes() for file in (tmp_path / "set").iterdir())
    port = server.url.split(":")[-1].removesuffix("/v1")
    assert not any(word.encode() in content for word in (KEY, f":{port}", "127.0.0.1"))
