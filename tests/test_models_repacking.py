"""A 4-bit layer that was evaluated trains as one that was not, also where bitsandbytes repacks it for inference."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from quantkd.hub.adapters import load_adapter
from quantkd.models.student import attach_lora, load_student

IDS = torch.arange(24).view(2, 12)


def gradient(model):
    model.train().zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_evaluation_leaves_gradients_bit_for_bit_as_they_were(tiny_model_path, guard):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = attach_lora(load_student(str(tiny_model_path), dtype="float32"), config)
    before = gradient(model)
    for _ in range(2):
        with guard():
            model.eval()(IDS)
        model.state_dict()  # as a checkpoint does
        assert torch.equal(gradient(model), before)


@pytest.mark.parametrize("guards", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_whoever_reads_a_weight_after_an_evaluation_reads_its_own(tiny_model_path, guards):
    """PEFT's merge and transformers' dequantization know nothing of the inference layout."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    fresh, used = (attach_lora(load_student(str(tiny_model_path), dtype="float32"), config).eval() for _ in range(2))
    with pytest.raises(RuntimeError):
        used(torch.ones(1, 2, 3, 64, dtype=torch.long))  # a pass that fails changes nothing
    with torch.no_grad():
        used(IDS)
    used.load_state_dict(fresh.state_dict(), strict=False)  # writes into the weights
    with guards[0]():
        first = used(IDS).logits
    with guards[1]():
        assert torch.equal(used(IDS).logits, first)
    for read in (lambda model: model.merge_and_unload(), lambda model: model.dequantize()):
        found, expected = read(used), read(fresh)
        with torch.no_grad():
            torch.testing.assert_close(found(IDS).logits, expected(IDS).logits)
        fresh, used = (load_student(str(tiny_model_path), dtype="float32").eval() for _ in range(2))
        with guards[0]():
            used(IDS)


@pytest.mark.parametrize("attach", [attach_lora, get_peft_model])
def test_dora_is_evaluated_on_the_weight_that_it_was_trained_on(tiny_model_path, tmp_path, attach):
    """In every forward pass DoRA dequantizes the base layer itself; of a repacked one it would get nonsense."""
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False)
    model = attach(load_student(str(tiny_model_path), dtype="float32"), config)
    if attach is get_peft_model:
        model.save_pretrained(tmp_path)
        model = load_adapter(load_student(str(tiny_model_path), dtype="float32"), tmp_path)
    with torch.no_grad():
        expected, found = model.train()(IDS).logits, model.eval()(IDS).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-4
