"""What saves memory changes nothing else: gradient checkpointing with adapters, and bitsandbytes' 8-bit optimizers."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from quantkd.models.student import load_student

CHECKPOINTING = {
    "by default": {"gradient_checkpointing": True},
    "under its new name": {"activation_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.fixture
def make_student(make_trainer, tiny_model_path, training_set):
    def build(student="by name", **options):
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        settings = {"max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.0}
        model, settings["train_dataset"] = None, training_set[:4]
        if student == "by name":
            settings["peft_config"] = lora
        else:
            load = load_student if "quantized" in student else AutoModelForCausalLM.from_pretrained
            model = get_peft_model(load(str(tiny_model_path), dtype="float32"), lora)
        return make_trainer(model, **{**settings, **options})

    return build


def first_step(trainer):
    """Loss, gradient of the adapters (read off SGD with a rate of 1), and the bytes that the graph held at its end."""
    assert isinstance(trainer.model, PeftModel)
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    held, compute_loss = {}, trainer.compute_loss

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def counted(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return compute_loss(*args, **kwargs)

    trainer.compute_loss = counted
    trainer.train()
    gradient = {name: before[name] - parameter.detach() for name, parameter in trained.items()}
    return trainer.state.log_history[0]["loss"], gradient, sum(held[place] for place in held.keys() - parameters)


@pytest.mark.parametrize("student", ["by name", "adapted, quantized", "adapted"])
def test_checkpointing_keeps_loss_and_gradient_and_holds_less(make_student, student):
    loss, gradient, held = first_step(make_student(student))
    # B starts at zero, so the first gradient of every A is zero: what must have one is B.
    assert all(value.any() for name, value in gradient.items() if "lora_B" in name)
    for how, options in CHECKPOINTING.items():
        again, gradient_again, held_again = first_step(make_student(student, **options))
        assert again == pytest.approx(loss, rel=1e-6) and held_again < 0.6 * held, how
        torch.testing.assert_close(gradient_again, gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_of_bitsandbytes_train(make_student, optim):
    trainer = make_student(optim=optim, learning_rate=3e-2, max_steps=8, logging_steps=1, alpha=0.9)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert "bitsandbytes" in type(trainer.optimizer.optimizer).__module__
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2])
