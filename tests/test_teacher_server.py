"""A server of each kind as a teacher: its rows are those of a dense float64 pass and of the transformers teacher."""

import numpy as np
import pytest
from teacher_rows import KINDS, SETTINGS, assert_entries

from quantkd import Nucleus, TopK
from quantkd.errors import ConfigError, TeacherError
from quantkd.teacher import EncodedPrompt, GenerationSettings, TransformersTeacher
from quantkd.teacher.server_dialects import DIALECTS, Completion

pytest_plugins = ["teacher_servers"]


@pytest.mark.parametrize("rule", [TopK(1), TopK(40), Nucleus(0.8, max_k=30)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_gives_what_transformers_gives(serve, connect, prompts, tiny_model, tiny_tokenizer, kind, rule):
    teacher = connect(serve(kind=kind), rule)
    rows = teacher.answer(prompts)
    own = TransformersTeacher(tiny_model, tiny_tokenizer, rule, (1.0,), SETTINGS).answer(prompts)
    for row, expected in zip(rows, own, strict=True):
        row.validate(teacher.vocab_size)
        assert_entries(row, tiny_model, rule)
        for name in ("input_ids", "spans", "counts", "finished"):
            np.testing.assert_array_equal(getattr(row, name), getattr(expected, name), err_msg=name)
        np.testing.assert_allclose(row.logprobs, expected.logprobs, atol=1e-4)
    assert (teacher.describe()["engine"], teacher.temperatures, teacher.max_context) == ("server", (1.0,), 512)


@pytest.mark.parametrize("kind", KINDS)
def test_given_answers_are_scored_turn_by_turn(serve, connect, tiny_model, kind):
    rule = Nucleus(0.7, max_k=20)
    teacher = connect(serve(kind=kind), rule)
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


def test_what_a_kind_of_server_cannot_do(serve, connect):
    settings = GenerationSettings(8, do_sample=True, generation_temperature=0.7)
    with pytest.raises(ConfigError, match="after the sampling temperature"):
        connect(serve(kind="sglang"), settings=settings)


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
        assert row.finished
        assert row.input_ids[len(prompts[0].prompt_ids) :].tolist() == greedy[: greedy.index(end) + 1]
        assert_entries(row, tiny_model, TopK(5))


def test_a_server_that_drops_the_end_token_is_refused(serve, connect, prompts):
    def drop(body):
        if len(body["choices"][0]["logprobs"]["tokens"]) > 1:
            body["choices"][0]["finish_reason"] = "stop"
        return body

    with pytest.raises(TeacherError, match="without one of the end tokens"):
        connect(serve(mangle=drop)).answer(prompts)


def test_tokens_inside_a_character_are_left_out_of_the_targets(serve, connect, prompts, tiny_model, caplog):
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


def test_a_token_whose_place_is_not_certain_is_left_out():
    completion = Completion("tiny", [1], 1, SETTINGS, 0, [2])
    for ids, tokens, places in (
        ([7, 3, 8], [7, 3, 3, 8], [0, 3]),  # candidates for 7, one of the threes, and 8
        ([1, 2, 3], [1, 2, 3], [0, 1, 2]),
    ):
        steps = [{"id": token, "top_logprobs": [{"id": token, "logprob": -0.5}]} for token in ids]
        body = {"tokens": tokens, "completion_probabilities": steps, "stop_type": "limit", "tokens_evaluated": 1}
        answer = DIALECTS["llama.cpp"].read(body, completion)
        assert answer.places == places
        assert answer.candidates.token_ids.tolist() == [tokens[place] for place in places]


def test_rows_keep_their_order_and_run_at_once(serve, connect, prompts):
    server = serve()
    teacher = connect(server, concurrency=3)
    server.delay_seconds = 0.05
    many = [EncodedPrompt(index, prompts[index % 4].prompt_ids) for index in range(9)]
    for row, prompt in zip(teacher.answer(many), many, strict=True):
        assert row.input_ids[: len(prompt.prompt_ids)].tolist() == prompt.prompt_ids
    assert server.most_active == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_samples_the_same_in_any_batch_and_is_stored_unscaled(serve, connect, prompts, tiny_model, kind):
    temperature = 1.0 if kind == "sglang" else 1.7
    settings = GenerationSettings(8, do_sample=True, generation_temperature=temperature, top_p=0.9, top_k=7, seed=3)
    server = serve(kind=kind)
    teacher = connect(server, settings=settings)
    rows, alone = teacher.answer(prompts), teacher.answer(prompts[2:3])[0]
    assert alone.input_ids.tolist() == rows[2].input_ids.tolist()
    for row in rows:
        assert_entries(row, tiny_model, TopK(5))  # although the sampled token is often none of the five
    sent = server.requests[-1][2]
    sampling = sent.get("sampling_params", sent)
    assert (sampling["temperature"], sampling["top_p"], sampling["top_k"]) == (temperature, 0.9, 7)
