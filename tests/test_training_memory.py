"""What saves memory changes nothing else: gradient checkpointing, 8-bit optimizers, bf16 and fp16."""

import copy

import pytest
import torch
from packed_checkpoints import load_in
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from quantkd import QuantizedDistillationConfig
from quantkd.loss.states import Head
from quantkd.models.student import load_student
from tests.conftest import build_tiny_model, loss_and_gradient

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
    assert "bitsandbytes" in type(trainer.optimizer.optimizer).__module__ and sum(losses[-2:]) < 0.5 * sum(losses[:2])


# The format, and whether what is not quantized has 16 bits too.
FORMATS = [("nf4", False), ("nf4", True), ("fp4", True), ("hqq", True), ("torchao-int8", True), ("gptq", False)]
FORMATS += [("awq", False), ("plain", False), ("plain", True)]
PATHS = {"fused": {}, "unfused": {"use_fused_loss": False}, "packed": {"packing": True}, "dense": {"alpha": 0.9}}
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


truths = pytest.fixture(lambda: {}, scope="module")  # of each format, by path: KL, loss and gradient in float32


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "in_16_bits"), FORMATS)
def test_every_format_trains_in_mixed_precision(make_trainer, training_set, one_layer_path, tiny_tokenizer, tmp_path,
                                                monkeypatch, truths, name, in_16_bits, precision):  # fmt: skip
    dtypes, product = [], Head.logits
    monkeypatch.setattr(Head, "logits", lambda head, hidden: dtypes.append(hidden.dtype) or product(head, hidden))

    def load(dtype):
        if name == "plain":
            return AutoModelForCausalLM.from_pretrained(one_layer_path, dtype=dtype)
        return load_in(name, one_layer_path, tmp_path / "packed", dtype)

    def run(model, path, *, mixed):
        """The KL of an evaluation before any step, the loss of a batch, and its gradient."""
        teacher = {"teacher_model": build_tiny_model(tiny_tokenizer, layers=1)} if path == "dense" else {}
        trainer = make_trainer(
            copy.deepcopy(model), processing_class=tiny_tokenizer, eval_dataset=training_set, max_steps=1,
            peft_config=copy.copy(LORA), bf16=mixed and precision == "bfloat16", **PATHS[path], **teacher,
        )  # fmt: skip
        if mixed and precision == "float16":  # accelerate leaves it off on a CPU, where torch has it
            trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "fp16"
        dtypes.clear()
        kl = trainer.evaluate()["eval_kl"]
        loss, gradient = loss_and_gradient(trainer, training_set.__getitems__(range(8)))
        if not mixed or precision == "bfloat16":
            trainer.train()
            assert trainer.evaluate()["eval_kl"] < kl
        return torch.tensor([kl, loss]), gradient

    mixed = load(precision if in_16_bits else "float32")
    if name not in truths:
        exact = load("float32")
        truths[name] = {path: run(exact, path, mixed=False) for path in ("fused", "dense")}
    for path in PATHS:
        expected, true_gradient = truths[name].get(path, truths[name]["fused"])
        found, gradient = run(mixed, path, mixed=True)
        assert torch.allclose(found, expected, rtol=0.05, atol=0), (path, found, expected)
        assert torch.isfinite(gradient).all() and set(dtypes) <= {getattr(torch, precision)}
        assert torch.nn.functional.cosine_similarity(gradient, true_gradient, dim=0) > 0.9, path


@pytest.mark.parametrize(("options", "environment", "native", "expected"), [
    ({}, {}, True, True), ({}, {}, False, False), ({"bf16": False}, {}, True, False), ({"fp16": True}, {}, True, False),
    ({"use_cpu": True}, {}, True, False), ({}, {"ACCELERATE_MIXED_PRECISION": "no"}, True, False),
])  # fmt: skip
def test_bf16_is_on_where_an_accelerator_has_it(monkeypatch, tmp_path, options, environment, native, expected):
    assert QuantizedDistillationConfig(str(tmp_path)).bf16 is False  # on a CPU
    monkeypatch.setattr("quantkd.training.config.has_accelerator", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: native)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda", 0))
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    args = QuantizedDistillationConfig(str(tmp_path), **options)
    assert args.bf16 is expected and args.accelerator_config.non_blocking is args.dataloader_pin_memory
