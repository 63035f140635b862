"""Every format of a student on a CPU: what it computes with, its gradients, its adapters on disk, its start."""

import copy

import pytest
import torch
from packed_checkpoints import load_in, require_package, write_packed_checkpoint
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from scipy.stats import norm
from torch import nn

from quantkd.hub.adapters import load_adapter
from quantkd.models.student import attach_lora, is_quantized, load_student
from quantkd.models.weights import dequantize_weight

IDS = torch.arange(120).view(6, 20)
FORMATS = ("nf4", "fp4", "int8", "hqq", "torchao-int8", "gptq", "awq")
# What the layers' own arithmetic may add: int8 rounds the inputs too, gptqmodel computes in float16.
SLACK = {"int8": 2e-2, "awq": 1e-3, "gptq": 1e-3}
# bitsandbytes' kernel for evaluation on some CPUs computes in bfloat16, with constants that are rounded to it.
EVALUATION_SLACK = {**SLACK, "nf4": 6e-3, "fp4": 6e-3}


@pytest.fixture(params=FORMATS)
def student(request, tiny_model_path, tmp_path):
    """The format's name, and a function that loads a fresh student in it."""
    require_package(request.param)
    return request.param, lambda: load_in(request.param, tiny_model_path, tmp_path / "packed")


def projections(model):
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def dequantize_bitsandbytes(layer, codebook):
    """Appendix of QLoRA: a code times its block's maximum, which is an 8-bit code itself."""
    state, nested = layer.weight.quant_state, layer.weight.quant_state.state2
    blocks = torch.arange(len(state.absmax)) // nested.blocksize
    absmax = nested.code.double()[state.absmax.long()] * nested.absmax.double()[blocks] + state.offset.double()
    packed = layer.weight.data.flatten().long()  # the high nibble first
    codes = codebook[torch.stack([packed >> 4, packed & 15], dim=1)].view(-1, state.blocksize)
    return (codes * absmax.unsqueeze(1)).view(state.shape)


def normal_float_codebook():
    """Equally likely bins of a normal distribution, with an exact zero (Dettmers et al. 2023, section 3)."""
    most = 0.9677083
    above = norm.ppf(torch.linspace(most, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    below = -norm.ppf(torch.linspace(most, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    values = torch.tensor([*above, 0.0, *below], dtype=torch.float64).sort().values
    return values / values.max()


def four_bit_float_codebook():
    """Sign, two bits of exponent, one of mantissa, in the order of bitsandbytes' codes, and a tiny one by itself."""
    half = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3], dtype=torch.float64) / 12
    return torch.cat([half, -half])


def dequantize_hqq(layer):
    """Two halves of the groups in a byte's two halves; (q - zero) * scale."""
    packed = layer.W_q.data.long()
    q = torch.cat([packed >> 4, packed & 15]).double()
    return ((q - layer.meta["zero"].double()) * layer.meta["scale"].double()).view(layer.meta["shape"])


REFERENCES = {
    "nf4": lambda layer: dequantize_bitsandbytes(layer, normal_float_codebook()),
    "fp4": lambda layer: dequantize_bitsandbytes(layer, four_bit_float_codebook()),
    "int8": lambda layer: layer.weight.data.double() * layer.weight.SCB.double().unsqueeze(1) / 127,
    "hqq": dequantize_hqq,
    "torchao-int8": lambda layer: layer.weight.qdata.double() * layer.weight.scale.double().view(-1, 1),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_the_weight_is_what_the_stored_numbers_say(name, tiny_model, tiny_model_path):
    model = load_in(name, tiny_model_path)
    layers = projections(model)
    assert len(layers) == 14 and is_quantized(model)
    for path, layer in layers.items():
        weight, expected = dequantize_weight(layer), REFERENCES[name](layer)
        assert weight.is_floating_point() and not weight.requires_grad
        torch.testing.assert_close(weight.double(), expected, atol=2e-6, rtol=1e-5)
        original = tiny_model.get_submodule(path).weight.detach().double()
        error = float((expected - original).norm() / original.norm())
        assert (0.001 < error < 0.012) if "int8" in name else (0.04 < error < 0.2), path


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_packed_checkpoint_trains_by_name(method, tiny_model_path, make_trainer, training_set, tmp_path, caplog):
    """And its weights are those that were packed."""
    require_package(method)
    truth = write_packed_checkpoint(method, tiny_model_path, tmp_path / method)
    layers = projections(load_student(str(tmp_path / method), dtype="float32"))
    assert layers.keys() == truth.keys()
    for path, layer in layers.items():
        torch.testing.assert_close(dequantize_weight(layer).double(), truth[path], atol=1e-3, rtol=2e-3)
    options = {"init": "covariance", "learning_rate": 1e-3, "eval_dataset": training_set}
    kl = {}
    for source in (None, str(tiny_model_path)):
        trainer = make_trainer(str(tmp_path / method), init_from=source, **options)
        kl[source] = trainer.evaluate()["eval_kl"]
        trainer.train()
    assert "14 of 14 adapters start from zero" in caplog.text and "as init_from" in caplog.text
    assert kl[source] < 0.8 * kl[None] and trainer.evaluate()["eval_kl"] < kl[source]


@pytest.mark.parametrize("training", [True, False])
def test_the_weight_is_what_the_layer_computes_with(student, training):
    name, load = student
    model = load().train(training)
    slack = SLACK if training else EVALUATION_SLACK
    for path, layer in projections(model).items():
        with torch.no_grad():
            inputs = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
            outputs, expected = layer(inputs).float(), inputs @ dequantize_weight(layer).float().T
        assert (outputs - expected).norm() <= slack.get(name, 1e-5) * expected.norm(), path


def gradients(model):
    model.train().zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def test_gradients_are_those_of_the_dequantized_model(student, tiny_model):
    name, load = student
    model = load()
    for path, layer in projections(model).items():
        tiny_model.get_submodule(path).weight.data = dequantize_weight(layer).float().clone()
    with torch.no_grad():
        model.eval()(IDS)  # kernels for inference must not stay in the way
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ours, reference = attach_lora(model, copy.copy(config)), attach_lora(tiny_model, copy.copy(config))
    set_peft_model_state_dict(ours, get_peft_model_state_dict(reference))
    found, expected = gradients(ours), gradients(reference)
    assert found.keys() == expected.keys() and len(found) == 28
    for key, value in found.items():
        cosine = nn.functional.cosine_similarity(value.flatten().double(), expected[key].flatten().double(), dim=0)
        assert cosine > (0.98 if name == "int8" else 0.9999), (key, float(cosine))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_evaluation_leaves_gradients_bit_for_bit_as_they_were(tiny_model_path, guard):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = attach_lora(load_student(str(tiny_model_path), dtype="float32"), config)
    before = gradients(model)
    for _ in range(2):
        with guard():
            model.eval()(IDS)
        model.state_dict()  # as a checkpoint does
        torch.testing.assert_close(gradients(model), before, rtol=0, atol=0)


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
