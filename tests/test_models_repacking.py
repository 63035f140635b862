"""A 4-bit layer that was evaluated trains as one that was not, also where bitsandbytes repacks it for inference."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from quantkd.hub.adapters import load_adapter
from quantkd.models.cpu_repacking import keep_trainable_on_cpu
from quantkd.models.student import attach_lora, load_student


def gradient(model, input_ids):
    model.train()
    model.zero_grad()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_evaluation_leaves_gradients_bit_for_bit_as_they_were(tiny_model_path, guard):
    torch.manual_seed(0)
    model = attach_lora(load_student(str(tiny_model_path), dtype="float32"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    input_ids = torch.randint(0, 300, (2, 12))
    before = gradient(model, input_ids)
    for _ in range(2):
        model.eval()
        with guard():
            model(input_ids=input_ids)
        model.state_dict()  # as a checkpoint does
        assert torch.equal(gradient(model, input_ids), before)


@pytest.mark.parametrize("attach", [attach_lora, get_peft_model])
def test_dora_is_evaluated_on_the_weight_that_it_was_trained_on(tiny_model_path, tmp_path, attach):
    """In every forward pass DoRA dequantizes the base layer itself; of a repacked one it would get nonsense."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False)
    model = attach(load_student(str(tiny_model_path), dtype="float32"), config)
    if attach is get_peft_model:
        model.save_pretrained(tmp_path)
        model = load_adapter(load_student(str(tiny_model_path), dtype="float32"), tmp_path)
    input_ids = torch.randint(0, 300, (2, 12))
    with torch.no_grad():
        expected, found = model.train()(input_ids).logits, model.eval()(input_ids).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_evaluation_gives_what_a_plainly_loaded_model_gives(tiny_model_path):
    from transformers import AutoModelForCausalLM

    from quantkd.models.student import default_quantization_config

    plain = AutoModelForCausalLM.from_pretrained(
        tiny_model_path, dtype=torch.float32, quantization_config=default_quantization_config(torch.float32)
    ).eval()
    ours = load_student(str(tiny_model_path), dtype="float32")
    keep_trainable_on_cpu(ours)  # twice is once
    input_ids = torch.randint(0, 300, (2, 12))
    with torch.no_grad():
        assert torch.equal(plain(input_ids=input_ids).logits, ours.eval()(input_ids=input_ids).logits)
