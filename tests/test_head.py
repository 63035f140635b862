"""The fused loss in the trainer: equal to the logits path on every family, or refused in words."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
)

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, capture
from quantkd.head import find_head, hidden_states_as_logits, why_not_fusable

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {}),
    "gemma2, soft-capped": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "cohere, scaled": (CohereConfig, {"logit_scale": 0.25}),
    "granite, scaled": (GraniteConfig, {"logits_scaling": 4.0}),
    "phi, with bias": (PhiConfig, {"num_key_value_heads": 4}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}


def build(family, vocab_size):
    kind, options = FAMILIES[family]
    sizes = {} if kind is GPT2Config else SIZES
    torch.manual_seed(0)
    config = kind(vocab_size=vocab_size, **{**sizes, **options})
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def transfer_set(tiny_model_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "set"
    prompts = ["One and one?", "A longer question, which has more words?", "Why?"]
    return capture(str(tiny_model_path), prompts, path, max_new_tokens=8, dtype="float32", progress=False)


def loss_and_gradient(model, transfer_set, tokenizer, tmp_path, fused, **kwargs):
    args = QuantizedDistillationConfig(
        str(tmp_path), use_fused_loss=fused, temperature=2.0, alpha=0.6, save_strategy="no", **kwargs
    )
    trainer = QuantizedDistillationTrainer(model, args, train_dataset=transfer_set, processing_class=tokenizer)
    batch = trainer.data_collator(transfer_set.__getitems__(range(len(transfer_set))))
    trainer.model.eval()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    grads = [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad and p.grad is not None]
    return trainer, float(loss), torch.cat(grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_equal_the_logits_path(family, transfer_set, tiny_tokenizer, tmp_path):
    model = build(family, len(tiny_tokenizer))
    assert why_not_fusable(model) is None
    trainer, fused, fused_gradient = loss_and_gradient(model, transfer_set, tiny_tokenizer, tmp_path, True)
    assert trainer._fused
    trainer, plain, plain_gradient = loss_and_gradient(model, transfer_set, tiny_tokenizer, tmp_path, False)
    assert not trainer._fused
    assert fused == pytest.approx(plain, rel=1e-5)
    assert float((fused_gradient - plain_gradient).norm() / plain_gradient.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family, tiny_tokenizer):
    model = build(family, len(tiny_tokenizer))
    tokens = torch.arange(6).unsqueeze(0)
    before = model(input_ids=tokens).logits
    with hidden_states_as_logits(model):
        hidden = model(input_ids=tokens).logits
    torch.testing.assert_close(model(input_ids=tokens).logits, before)
    torch.testing.assert_close(find_head(model).logits(hidden[0]), before[0])
    with pytest.raises(RuntimeError), hidden_states_as_logits(model):
        raise RuntimeError
    torch.testing.assert_close(model(input_ids=tokens).logits, before)


def test_an_adapter_on_the_head_falls_back_to_logits_with_the_reason(transfer_set, tiny_tokenizer, tmp_path, caplog):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    args = QuantizedDistillationConfig(str(tmp_path), max_steps=1, save_strategy="no")
    with caplog.at_level(logging.WARNING, logger="quantkd"):
        trainer = QuantizedDistillationTrainer(
            build("llama", len(tiny_tokenizer)), args, train_dataset=transfer_set, processing_class=tiny_tokenizer,
            peft_config=config,
        )  # fmt: skip
    assert "The fused loss is off for this model" in caplog.text and "not a plain linear layer" in caplog.text
    trainer.train()


def test_a_model_that_does_more_to_its_logits_is_not_fused(tiny_tokenizer):
    model = build("llama", len(tiny_tokenizer))
    forward = model.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    assert "not what its head makes" in why_not_fusable(model)
