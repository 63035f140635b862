"""Greedy generation: the same answers in any batch, with a shared prefix or without, whatever the model's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import GenerationConfig

from quantkd.data.arithmetic import generate_problems
from quantkd.data.encoding import encode_prompt
from quantkd.errors import ConfigError, DataError
from quantkd.evaluation import generation
from quantkd.evaluation.generation import Generated, generate_greedy

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ROWS = generate_problems(7, seed=0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def prompts(tiny_tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [
        encode_prompt(tiny_tokenizer, "What all begin with. " + row["question"][: 5 + 9 * i])
        for i, row in enumerate(ROWS)
    ]


def answer(model: Any, tokenizer: Any, prompts: list[list[int]], **options: Any) -> list[Generated]:
    batches = generate_greedy(model, tokenizer, prompts, **{"max_new_tokens": 12, **options})
    return sorted((one for batch in batches for one in batch), key=lambda one: one.index)


def greedy_by_hand(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> tuple[str, bool, int]:
    """The reference: no cache, no batch, no padding, the whole sequence through the model for every token."""
    ids = list(prompt)
    for count in range(1, max_new_tokens + 1):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True), True, count
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True), False, max_new_tokens


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("share_prefix", [False, True])
def test_equals_greedy_by_hand(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    batch_size: int,
    share_prefix: bool,
) -> None:
    assert len(generation._find_shared_prefix(prompts)) >= 16  # else there is nothing to share in this test
    model = tiny_model.double()
    found = answer(model, tiny_tokenizer, prompts, batch_size=batch_size, share_prefix=share_prefix)
    expected = [greedy_by_hand(model, tiny_tokenizer, prompt, 12) for prompt in prompts]
    assert [(one.text, one.finished, one.num_tokens) for one in found] == expected
    assert [one.index for one in found] == list(range(len(prompts)))


def test_end_token_finishes_and_the_limit_does_not(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    tiny_model.double()
    long = answer(tiny_model, tiny_tokenizer, prompts, max_new_tokens=40)
    for one, prompt in zip(long, prompts, strict=True):
        assert (one.text, one.finished, one.num_tokens) == greedy_by_hand(tiny_model, tiny_tokenizer, prompt, 40)
    # Let the third token of the first answer be an end token of the model: that answer is then three tokens long.
    ids = tiny_model.generate(torch.tensor([prompts[0]]), max_new_tokens=3, do_sample=False)[
        0, len(prompts[0]) :
    ].tolist()
    first = ids.index(ids[2]) + 1
    tiny_model.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, ids[2]]
    one = answer(tiny_model, tiny_tokenizer, prompts)[0]
    assert one.finished and one.num_tokens == first


def test_stop_text_ends_an_answer(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    free = answer(tiny_model, tiny_tokenizer, prompts, max_new_tokens=20)
    whole = next(one for one in free if len(one.text) > 8 and one.text[4:6] not in one.text[:5])
    stop = whole.text[4:6]
    found = answer(tiny_model, tiny_tokenizer, prompts, max_new_tokens=20, stop=stop)
    assert found[whole.index].text == whole.text[:4] and found[whole.index].finished
    assert found[whole.index].num_tokens < whole.num_tokens
    for before, after in zip(free, found, strict=True):
        assert after.text == before.text.split(stop)[0]


def test_the_models_own_generation_settings_are_set_aside_and_put_back(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    expected = answer(tiny_model, tiny_tokenizer, prompts)
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1,
                           suppress_tokens=list(range(60)), eos_token_id=tiny_tokenizer.eos_token_id)  # fmt: skip
    tiny_model.generation_config = own
    for layer in tiny_model.model.layers:
        layer.self_attn.attention_dropout = 0.9  # felt in training mode alone
    tiny_model.train()
    assert answer(tiny_model, tiny_tokenizer, prompts) == expected
    assert tiny_model.generation_config is own and tiny_model.training


def test_lora_model_answers_with_its_adapter(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    from peft import LoraConfig, get_peft_model

    plain = answer(tiny_model, tiny_tokenizer, prompts)
    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted = answer(model, tiny_tokenizer, prompts)
    assert [one.text for one in adapted] != [one.text for one in plain]
    with model.disable_adapter():
        assert answer(model, tiny_tokenizer, prompts) == plain
    model.merge_and_unload()


def test_a_cache_that_cannot_be_shared_is_not(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                      num_attention_heads=2, num_key_value_heads=1, sliding_window=8)
    ).double().eval()  # fmt: skip
    prompts = [encode_prompt(tiny_tokenizer, row["question"]) for row in ROWS[:2]]
    assert generation._compute_prefix_cache(model, prompts[0]) is None
    expected = [greedy_by_hand(model, tiny_tokenizer, prompt, 6) for prompt in prompts]
    found = answer(model, tiny_tokenizer, prompts, max_new_tokens=6)
    assert [(one.text, one.finished, one.num_tokens) for one in found] == expected


def test_limits_are_checked_before_work(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    good = encode_prompt(tiny_tokenizer, "one")
    with pytest.raises(DataError, match=r"Row 1 has a prompt of 500 tokens; with 13 .* context of 512"):
        answer(tiny_model, tiny_tokenizer, [good, [5] * 500], max_new_tokens=13)
    with pytest.raises(DataError, match="Row 1 has a prompt without tokens"):
        answer(tiny_model, tiny_tokenizer, [good, []])
    with pytest.raises(ConfigError, match="batch_size=0"):
        answer(tiny_model, tiny_tokenizer, [good], batch_size=0)
