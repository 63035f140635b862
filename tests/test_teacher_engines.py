"""Engines that give log-probabilities: from these to rows, what they cannot give, and vLLM's interface."""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from fake_openai_server import FakeServer, sampled_and_top
from teacher_rows import SETTINGS, assert_entries

from quantkd import Nucleus, Sampled, TopK
from quantkd.errors import ConfigError, MissingDependencyError, TeacherError
from quantkd.teacher import EncodedPrompt, GenerationSettings
from quantkd.teacher.logprobs import RowBuilder, TopLogprobs
from quantkd.teacher.server import ServerTeacher
from quantkd.teacher.vllm import VLLMTeacher
from tests.conftest import refused

pytest_plugins = ["teacher_servers"]


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
    ([[(1, -0.1), (2, -0.1)]], {}, r"answer to prompt 4: The entries of target 0 hold a mass of 1\.8"),
])  # fmt: skip
def test_what_cannot_be_stored(pairs, options, message):
    refused(TeacherError, message, row_of, pairs, TopK(len(pairs[0]) or 1), **options)


@pytest.fixture(params=["flat", "dictionaries"])
def fake_vllm(request, monkeypatch, tiny_model, tiny_tokenizer):
    """A module `vllm` whose LLM answers from the tiny model in either of vLLM's two shapes."""
    server = FakeServer(tiny_model, [])

    def shape(targets):
        if request.param == "dictionaries":
            named = [[(token, SimpleNamespace(logprob=value)) for token, value in target or ()] for target in targets]
            return [dict(each) or None for each in named]
        stops = np.cumsum([len(target or ()) for target in targets]).tolist()
        flat = [pair for target in targets for pair in target or ()]
        ids, logprobs = ([pair[part] for pair in flat] for part in (0, 1))
        return SimpleNamespace(start_indices=[0, *stops[:-1]], end_indices=stops, token_ids=ids, logprobs=logprobs)

    class LLM:
        def __init__(self, model, **kwargs):
            self.kwargs = kwargs
            self.model_config = SimpleNamespace(
                hf_config=SimpleNamespace(_commit_hash="abc", name_or_path=""), revision=None, dtype=torch.float32,
                max_model_len=512, get_vocab_size=lambda: len(tiny_tokenizer),
                try_get_generation_config=lambda: {"eos_token_id": [1, 2]},
            )  # fmt: skip

        def generate(self, inputs, parameters, use_tqdm):
            outputs = []
            for each, setting in zip(inputs, parameters, strict=True):
                prompt, ends, seed = each["prompt_token_ids"], setting.stop_token_ids, getattr(setting, "seed", 0)
                tokens, steps = server.generate(prompt, setting.max_tokens, ends, setting.temperature, seed)
                targets = [sampled_and_top(*pair, setting.logprobs) for pair in zip(steps, tokens, strict=True)]
                output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=shape(targets))])
                if count := getattr(setting, "prompt_logprobs", None):
                    given = zip(server.distributions(prompt), prompt[1:], strict=False)
                    output.prompt_logprobs = shape([None, *(sampled_and_top(*pair, count) for pair in given)])
                outputs.append(output)
            return outputs

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.mark.parametrize("rule", [TopK(5), Nucleus(0.8, max_k=30)], ids=str)
def test_vllm_answers_and_scores(fake_vllm, prompts, tiny_model, tiny_tokenizer, rule):
    teacher = VLLMTeacher("tiny", tiny_tokenizer, rule, (1.0,), SETTINGS, dtype="float32")
    assert (teacher.describe()["engine"], teacher.revision) == ("vllm", "abc")
    assert (teacher.dtype, teacher.max_context) == ("float32", 512)
    assert teacher.ends == sorted({1, 2, tiny_tokenizer.eos_token_id})
    assert teacher.llm.kwargs == {"logprobs_mode": "raw_logprobs", "max_logprobs": 64, "dtype": "float32"}
    rows = teacher.answer(prompts)
    given = []
    for row, prompt in zip(rows, prompts, strict=True):
        assert_entries(row, tiny_model, rule)
        given.append(EncodedPrompt(prompt.index, prompt.prompt_ids, row.input_ids[len(prompt.prompt_ids) :].tolist()))
    for row, scored in zip(rows, teacher.score(given), strict=True):
        assert scored.finished == row.finished and scored.input_ids.tolist() == row.input_ids.tolist()
        assert scored.token_ids.tolist() == row.token_ids.tolist()
    (turns,) = teacher.score([EncodedPrompt(0, [9], list(range(50, 62)), ((1, 3), (6, 7), (10, 13)))])
    assert_entries(turns, tiny_model, rule)


def test_vllm_samples_by_the_rows_own_seed(fake_vllm, prompts, tiny_model, tiny_tokenizer):
    settings = GenerationSettings(8, do_sample=True, generation_temperature=1.7, seed=3)
    teacher = VLLMTeacher("tiny", tiny_tokenizer, TopK(5), (1.0,), settings)
    rows, alone = teacher.answer(prompts), teacher.answer(prompts[2:3])[0]
    assert alone.input_ids.tolist() == rows[2].input_ids.tolist()
    assert_entries(alone, tiny_model, TopK(5))
    other = VLLMTeacher("tiny", tiny_tokenizer, TopK(5), (1.0,), GenerationSettings(8, True, 1.7, seed=4))
    assert [row.input_ids.tolist() for row in other.answer(prompts)] != [row.input_ids.tolist() for row in rows]
