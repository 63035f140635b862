"""A served student's figures are those of the same model in this process; what a server does not list is bounded."""

import json
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from quantkd.errors import ConfigError, DataError, TeacherError
from quantkd.evaluation.arms import Arm
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.report import build_report
from quantkd.teacher.logprobs import TopLogprobs
from quantkd.teacher.model_server import ModelServer
from quantkd.teacher.served import FLOOR, _Listed, evaluate_served
from quantkd.transfer_set.topk import TopKLogprobs
from tests.conftest import build_tiny_model, refused
from tests.fake_openai_server import FakeServer
from tests.teacher_rows import KINDS, add_noise, dense_logprobs

pytestmark = pytest.mark.usefixtures("no_pictures", "few_draws")
student = pytest.fixture(lambda tiny_tokenizer: add_noise(build_tiny_model(tiny_tokenizer)), scope="module")


@pytest.fixture
def serve(student):
    with ExitStack() as running:
        yield lambda **kwargs: running.enter_context(FakeServer(student, [], max_logprobs=320, **kwargs))


@pytest.fixture
def evaluate(held_out, tmp_path):
    def run(server, rows=held_out, **kwargs):
        asked = ModelServer(server.url, backoff_seconds=0.001, vocab_size=320)
        return evaluate_served(asked, rows, tmp_path, **{"arm": "served", "progress": False, **kwargs})

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_served_model_is_an_arm_with_its_figures_here(serve, evaluate, student, held_out, tmp_path, kind):
    server = serve(kind=kind)
    server.faults = [] if kind == "vllm" else [503, "reset", "malformed"]
    arm = evaluate(server, top_logprobs=320, title="Served")
    assert Arm.read(tmp_path / "evaluation" / "served.json").fidelity.means == arm.fidelity.means
    expected = evaluate_fidelity(student, held_out, progress=False)
    for name, sums in expected.columns.items():
        np.testing.assert_allclose(arm.fidelity.columns[name], sums, rtol=1e-4, atol=1e-5, err_msg=name)
    low, high = arm.fidelity.settings["kl_bounds"]
    assert low == pytest.approx(high, abs=1e-7) and arm.fidelity.settings["not_listed"] == 0
    text = (tmp_path / "evaluation" / "served.json").read_text().replace('"served"', '"before"')
    (tmp_path / "evaluation" / "before.json").write_text(text)
    build_report(tmp_path)
    assert "Served" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("width", [1, 2, 8])
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_what_is_not_listed_is_bounded_from_both_sides(serve, evaluate, student, held_out, kind, width):
    exact = evaluate_fidelity(student, held_out, progress=False).means["kl"]
    found = evaluate(serve(kind=kind), top_logprobs=width).fidelity
    low, high = found.settings["kl_bounds"]
    assert low < exact < high == pytest.approx(found.means["kl"])
    missing = mass = tail = 0
    for row in held_out:
        stored, dense = row["teacher"], dense_logprobs(student, row)
        labels = row["labels"][row["labels"] != -100]
        for place, (start, stop) in enumerate(zip(stored.offsets, stored.offsets[1:], strict=False)):
            listed = {*dense[place].topk(width).indices.tolist(), int(labels[place])}
            absent = [each for each in range(start, stop) if int(stored.token_ids[each]) not in listed]
            missing, mass = missing + len(absent), mass + float(stored.logprobs[absent].exp().sum())
            tail += 1 - float(stored.logprobs[start:stop].exp().sum())
    tokens = found.tokens.sum()
    # The last token of a row is generated, so it is listed where it is the most probable one alone.
    assert missing <= found.settings["not_listed"] <= missing + len(held_out)
    assert found.settings["not_listed_mass"] == pytest.approx(mass / tokens, abs=len(held_out) / tokens)
    assert high - low <= (found.settings["not_listed_mass"] + tail / tokens) * -np.log(FLOOR)


def list_probable(student, width, *own):
    """What a server lists of (V,) probabilities, with the row's own token."""
    top = np.argsort(-student, kind="stable")[:width]
    top = np.unique([*top, *own])
    return TopLogprobs(np.array([len(top)]), top, np.log(student[top]))


@pytest.mark.parametrize(("stored", "likely", "width"), [
    ({0: 0.9, 1: 0.001}, {0: 0.9, 1: 0.0999999}, 1),  # all that is not listed is on the stored token
    ({0: 0.9, 1: 0.03, 2: 0.02}, {0: 0.5, **dict.fromkeys(range(30, 49), 0.02), 1: 0.0599999, 2: 0.0599999}, 20),
    ({0: 0.5, 1: 0.3, 2: 0.1}, {0: 0.2, 1: 0.7}, 2),
    ({0: 0.5, 1: 0.2, 2: 0.2, 5: 0.05}, {0: 0.5, 1: 0.2, 2: 0.15, 5: 1e-6}, 2),
    ({0: 0.88, 2: 0.01, 1: 1e-6}, {0: 0.9, 1: 0.0999, 2: 1e-7}, 1),
])  # fmt: skip
def test_the_bounds_hold_wherever_the_mass_is_that_is_not_listed(stored, likely, width):
    student = np.full(320, (1 - sum(likely.values())) / (320 - len(likely)))
    student[list(likely)] = list(likely.values())
    p, q = np.array(list(stored.values())), student[list(stored)]
    exact = (p * np.log(p / q)).sum() + (1 - p.sum()) * np.log((1 - p.sum()) / (1 - q.sum()))
    ids, logs = torch.tensor(list(stored)), torch.tensor(np.log(p), dtype=torch.float32)
    teacher = TopKLogprobs(torch.tensor([0, len(p)]), ids, logs, torch.zeros(1, 1), (1.0,), 320)
    for own in stored:  # which is listed even if others are more probable
        listed = _Listed(list_probable(student, width, own), torch.tensor([own]), 320, "server")
        figures, low, _ = listed.compare(teacher)
        assert float(low) - 1e-6 <= exact <= float(figures["kl"]) + 1e-6


def test_what_is_not_listed_is_at_most_the_least_that_is():
    ids, p = torch.arange(3), torch.tensor([0.5, 0.3, 0.1])
    teacher = TopKLogprobs(torch.tensor([0, 3]), ids, p.log(), torch.zeros(1, 1), (1.0,), 320)
    # All mass is listed, down to 1e-13, and two stored tokens are not: they have less, or a probability of 0.
    for extra in ([], [-9999.0]):
        listed = TopLogprobs(np.array([3 + len(extra)]), np.array([0, 10, 11, 1][: 3 + len(extra)]), np.array(
            [np.log(0.4), np.log(0.6), np.log(1e-13), *extra]))  # fmt: skip
        figures, low, _ = _Listed(listed, torch.tensor([0]), 320, "server").compare(teacher)
        least = (
            0.5 * np.log(0.5 / 0.4) + 0.3 * np.log(0.3 / 1e-13) + 0.1 * np.log(0.1 / 1e-13) + 0.1 * np.log(0.1 / 0.6)
        )
        assert float(low) == pytest.approx(least, abs=1e-4) and float(figures["kl"]) >= least - 1e-6
    # Many are not listed, and together they have what is left at most: the tail is known to have 0.38.
    shares = np.array([0.6, *[0.019] * 20]) * 0.99
    listed = TopLogprobs(np.array([21]), np.array([0, *range(100, 120)]), np.log(shares))
    stored = torch.tensor([0.5, *[0.01] * 40])
    teacher = TopKLogprobs(torch.tensor([0, 41]), torch.arange(41), stored.log(), torch.zeros(1, 1), (1.0,), 320)
    figures, _, _ = _Listed(listed, torch.tensor([0]), 320, "server").compare(teacher)
    worst = 0.5 * np.log(0.5 / shares[0]) + 0.4 * np.log(0.01 / FLOOR) + 0.1 * np.log(0.1 / shares[1:].sum())
    assert float(figures["kl"]) == pytest.approx(worst, abs=1e-3)


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_listed_tokens_count_as_they_are_however_improbable(tiny_tokenizer, evaluate, held_out, kind):
    sharp = add_noise(build_tiny_model(tiny_tokenizer))
    sharp.lm_head.weight.data *= 16
    with FakeServer(sharp, [], max_logprobs=320, kind=kind) as server:
        found = evaluate(server, top_logprobs=320).fidelity.means
    expected = evaluate_fidelity(sharp, held_out, progress=False).means
    assert expected["kl"] > 20 and found["kl"] == pytest.approx(expected["kl"], rel=0.01)


def test_llama_cpp_is_asked_for_more_and_goes_on_inside_a_character(serve, evaluate, student, held_out):
    server, rows = serve(kind="llama.cpp"), held_out[:2]
    plain = evaluate(server, rows, top_logprobs=320).fidelity.means
    bodies = [body for _, _, body in server.requests if body]
    assert all(body["cache_prompt"] and body["n_predict"] == 1 and "logit_bias" not in body for body in bodies)
    assert len(bodies) == evaluate(server, rows, top_logprobs=320).fidelity.tokens.sum()
    server.halves = {int(dense_logprobs(student, held_out[0])[3].argmax())}
    narrow = evaluate(server, rows, top_logprobs=1).fidelity
    assert narrow.means == pytest.approx(plain) and narrow.settings["not_listed"] == 0
    assert {1, 16, 256} <= {body["n_probs"] for _, _, body in server.requests if body}
    assert any("logit_bias" in body for _, _, body in server.requests if body)
    server.halves = set(range(320))
    refused(TeacherError, r"gave no log-probabilities after \d+ tokens of a row", evaluate, server, rows)


def in_prompt(change):
    """What changes the log-probabilities of a prompt in an answer, place by place."""

    def mangle(body):
        change(body["choices"][0]["prompt_logprobs"])
        return body

    return mangle


def put(token, logprob):
    return in_prompt(lambda listed: listed[-1].update({str(token): {"logprob": logprob}}))


def replace_all(listed):
    listed[1:] = [{"319": {"logprob": -0.01}}] * (len(listed) - 1)


def between(body):
    meta = body["meta_info"]
    meta["input_token_logprobs"] = [[value, token + 0.9, text] for value, token, text in meta["input_token_logprobs"]]
    return body


def flatten(body):
    for each in body["completion_probabilities"][0]["top_logprobs"]:
        each["logprob"] = -1.0
    return body


@pytest.mark.parametrize(("kind", "mangle", "message"), [
    *(("vllm", in_prompt(each), r"another shape.*zip\(\) argument 2")
      for each in (list.pop, lambda listed: listed.insert(0, None))),  # one too few, and one more in front
    ("vllm", in_prompt(replace_all), "prompt_logprobs are those of other tokens"),
    ("vllm", put(token=5, logprob=float("nan")), "row 0 with the log-probability nan"),
    ("vllm", put(token=5, logprob=0.5), r"log-probability 0\.5; expected"),
    ("vllm", put(token=999, logprob=-1.0), "the token id 999, and the vocabulary ends at 320"),
    ("vllm", put(token=-1, logprob=-1.0), "the token id -1"),
    ("llama.cpp", lambda body: {**body, "tokens_evaluated": 1}, r"another shape.*it read 1 tokens of a prompt"),
    ("llama.cpp", lambda body: {**body, "completion_probabilities": "none"}, "another shape"),
    ("llama.cpp", flatten, r"of total probability \d+\.\d+ at target 0; expected"),
    ("sglang", lambda body: {**body, "meta_info": {}}, "another shape"),
    *(("vllm", put(token=5, logprob=each), "is not a log-probability") for each in (False, "-1.0", None)),
    *(("vllm", put(token=each, logprob=-1.0), "is not a token id") for each in (" 5", "05", "5.9")),
    ("sglang", between, "is not a token id"),
])  # fmt: skip
def test_a_server_that_lies_is_refused(serve, evaluate, kind, mangle, message):
    refused(TeacherError, message, evaluate, serve(kind=kind, mangle=mangle))


def test_what_a_server_cannot_hold_or_does_not_name_is_refused_before_it_is_asked(serve, evaluate, held_out):
    server = serve()
    refused(DataError, "0 rows", evaluate, server, held_out[:0])
    refused(ConfigError, "top_logprobs and concurrency are 0 and 8", evaluate, server, top_logprobs=0)
    refused(ConfigError, "concurrency are 128 and 'x'; expected whole", evaluate, server, concurrency="x")
    with pytest.raises(ConfigError, match="head has 100 rows"):
        evaluate_served(ModelServer(server.url, vocab_size=100), held_out, "x", arm="served")
    assert not [body for _, _, body in server.requests if body]
    server = serve()
    server.cards = ["tiny", "other"]
    refused(ConfigError, "serves 'tiny', 'other', and no name was given", evaluate, server)
    server = serve()
    server.card = {"max_model_len": 2**70, "meta": {"n_vocab": 2**62, "n_ctx": True, "size": 2**60}}
    told = ModelServer(server.url)  # what cannot be is as if it were not said
    assert (told.vocab_size, told.max_context, told.size_bytes) == (None, None, None)
    for each in ("x", 400.5, 2**70, True):
        refused(ConfigError, "vocab_size is .*; expected a whole number", ModelServer, server.url, vocab_size=each)
    server.cards = ["x" * 300]
    assert ModelServer(server.url).name == "x" * 300
    for name in (" ", "/", "models/ "):  # the last part is what an arm's file calls it
        server.cards = [name]
        refused(ConfigError, f"serves '{name}', and no name was given", evaluate, server)


def test_the_command_measures_a_server_and_prints_its_bounds(serve, cli, held_out, tmp_path):
    server, where = serve(kind="sglang"), held_out.sources[0].path
    words = ["evaluate", "--engine", "server", "--base_url", server.url, "--held_out", where]
    words += ["--run_dir", tmp_path, "--arm", "served", "--engine_kwargs", '{"vocab_size": 320}', "--top_logprobs", 2]
    assert "stored entries were not listed, so its KL is from 0." in cli.ok(*words)
    file = json.loads((tmp_path / "evaluation" / "served.json").read_text())
    assert file["model"] == "tiny" and file["fidelity"]["settings"]["engine"] == "sglang"
    assert server.url.split("/")[2] not in json.dumps(file)
    cli.fails("serves 'tiny', and 'huge' was asked for", *words, "--model_name_or_path", "huge")
    cli.fails("gsm8k has no effect without engine=transformers", *words, "--gsm8k", "hub")
    cli.fails("student_format has no effect here", *words, "--student_format", "nf4")
    cli.fails("engine_kwargs:", *words, "--engine_kwargs", '{"colour": 1}')
    cli.fails("give --base_url and --held_out", *words[:3], *words[5:])
    words = ["evaluate", "--held_out", where, "--run_dir", tmp_path, "--arm", "x"]
    cli.fails("required: --model_name_or_path", *words)
