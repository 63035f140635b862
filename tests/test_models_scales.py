"""Trainable block constants: gradients against autograd through the dense weight, folding, saving and resuming."""

import copy
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from quantkd.errors import ConfigError
from quantkd.models import scales
from quantkd.models.codes import read_constants
from quantkd.models.provenance import Provenance
from quantkd.models.quantize import find_origin
from quantkd.models.scales import ScaledLinear4bit, fold, folded_scales, scale_parameters
from quantkd.models.stored_weights import describe_weights, list_adapter_parameters
from quantkd.models.student import load_student
from quantkd.models.weights import dequantize_weight
from quantkd.names import load_tokenizer

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
WAYS = {"scales alone": None, "beside LoRA": LORA}


def scaled_layer(rows, columns, *, kind="nf4", double=True, bias=False, dtype=torch.float32):
    """A layer with factors around 1."""
    torch.manual_seed(0)
    layer = Linear4bit(columns, rows, bias=bias, compute_dtype=dtype, compress_statistics=double, quant_type=kind)
    layer = layer.to("cpu")
    layer.__class__ = ScaledLinear4bit
    layer.scales = nn.Parameter(1 + 0.1 * torch.randn(-(-rows * columns // 64)))
    return layer


def codes_of(state, packed):
    """What the packed codes mean, in float64 and without constants: the higher half of a byte comes first."""
    halves = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: state.shape.numel()]
    return state.code.double()[halves.long()].view(state.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("rows", "columns", "bias"), [
    (64, 128, False), (7, 96, True), (1, 40, False), (5, 33, True), (130, 20, False),
])  # fmt: skip
def test_gradients_are_those_of_the_dense_weight(monkeypatch, kind, double, rows, columns, bias):
    layer = scaled_layer(rows, columns, kind=kind, double=double, bias=bias)
    state, codes = layer.weight.quant_state, codes_of(layer.weight.quant_state, layer.weight.data)
    stored = read_constants(fold(state, layer.scales)).double()
    factors = layer.scales.detach().double().requires_grad_()
    constants = read_constants(state).double() * factors
    constants = constants + (stored - constants).detach()  # rounded, and derived as if they were not
    dense = codes * constants.repeat_interleave(64)[: codes.numel()].view_as(codes)
    inputs, weights = torch.randn(2, 3, columns), torch.randn(2, 3, rows)
    x, reference = inputs.clone().requires_grad_(), inputs.double().requires_grad_()
    expected = reference @ dense.T + (layer.bias.double() if bias else 0)
    (expected * weights.double()).sum().backward()
    for most in (2**23, 1):  # in one piece, and in pieces as small as blocks allow
        monkeypatch.setattr(scales, "_MAX_PIECE", most)
        x.grad = layer.scales.grad = None
        found = layer(x)
        (found * weights).sum().backward()
        for mine, theirs in ((found, expected), (x.grad, reference.grad), (layer.scales.grad, factors.grad)):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


def test_the_backward_pass_keeps_no_dequantized_weight():
    layer, kept = scaled_layer(256, 512), []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 512, requires_grad=True)).sum()
    sizes = [each.nbytes for each in kept if each.data_ptr() != layer.weight.data_ptr()]
    assert sizes == [2 * 512 * 4] and len(kept) == 2  # the inputs, beside the packed codes


@pytest.mark.parametrize("double", [True, False])
def test_factors_of_one_change_nothing_and_others_stay_within_a_rounding(double):
    layer = scaled_layer(96, 128, double=double)
    state = layer.weight.quant_state
    before = read_constants(state)
    stored = read_constants(fold(state, layer.scales)).repeat_interleave(64).view(96, 128)
    torch.testing.assert_close(dequantize_weight(layer), codes_of(state, layer.weight.data).float() * stored)
    for factors in (torch.ones_like(layer.scales), layer.scales.detach()):
        folded, expected = fold(state, factors), before * factors
        assert folded.nested == double and folded.absmax.dtype == state.absmax.dtype
        far = (read_constants(folded) - expected).abs().max()
        spread = (expected - expected.mean()).abs().max()
        assert far <= (0.008 * spread if double else 0)  # half a step of the 8-bit map


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [
    {}, {"packing": True}, {"use_fused_loss": False}, {"gradient_checkpointing": True}
], ids=str)  # fmt: skip
def test_what_is_saved_is_an_ordinary_checkpoint(make_trainer, one_layer_path, training_set, way, options):
    options = {"scales_learning_rate": 1e-2, "max_steps": 8, "peft_config": copy.deepcopy(WAYS[way]), **options}
    trainer = make_trainer(str(one_layer_path), train_scales=True, **options)
    model, row = trainer.model, training_set[0]["input_ids"][None]
    assert trainer.uses_fused_loss == ("use_fused_loss" not in options)
    before = trainer.evaluate(training_set)["eval_kl"]
    trainer.train()
    assert trainer.evaluate(training_set)["eval_kl"] < 0.8 * before
    assert all((each.detach() != 1).any() for each in scale_parameters(model).values())
    trainer.save_model()
    out = Path(trainer.args.output_dir)
    base = out if WAYS[way] is None else out / "scaled"
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if base != out:
        loaded = PeftModel.from_pretrained(loaded, out)
        assert loaded.peft_config["default"].base_model_name_or_path == "scaled"
    made = Provenance.read(base)
    assert made.weights == describe_weights(loaded) == Provenance.read(out).weights
    assert find_origin(str(base)) is None and made.export["quantized_from"] == one_layer_path.name
    load_tokenizer(str(base))
    with torch.inference_mode():
        for each in list_adapter_parameters(model):
            each.copy_(each.bfloat16())  # as they are saved
        raw = model.eval()(row).logits
        with folded_scales(model):
            torch.testing.assert_close(loaded.eval()(row).logits, model.eval()(row).logits, rtol=0, atol=0)
        assert torch.equal(model(row).logits, raw)  # training can go on
    assert not [file.name for file in out.rglob("scales*")]


def test_a_checkpoint_has_the_dtype_and_size_of_bitsandbytes(make_trainer, tiny_model_path, tiny_tokenizer, tmp_path):
    plain = load_student(str(tiny_model_path), dtype="bfloat16")
    plain.save_pretrained(tmp_path / "plain")
    student = load_student(str(tmp_path / "plain"), dtype="bfloat16")
    trainer = make_trainer(model=student, processing_class=tiny_tokenizer, train_scales=True, max_steps=1)
    assert {each.dtype for each in scale_parameters(trainer.model).values()} == {torch.float32}
    trainer.train()
    trainer.save_model()
    own, ours = (folder / "model.safetensors" for folder in (tmp_path / "plain", Path(trainer.args.output_dir)))
    assert abs(ours.stat().st_size - own.stat().st_size) <= 256  # numbers in the states' JSON
    assert AutoModelForCausalLM.from_pretrained(trainer.args.output_dir).dtype == torch.bfloat16


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_ends_like_an_uninterrupted_one(make_trainer, one_layer_path, way):
    def build():
        saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 3}
        saving["peft_config"] = copy.deepcopy(WAYS[way])
        return make_trainer(str(one_layer_path), train_scales=True, **saving)

    whole = build()
    whole.train()
    checkpoint = Path(whole.args.output_dir) / "checkpoint-3"
    assert (checkpoint / "scales.safetensors").is_file() and not list(checkpoint.glob("model*"))
    resumed = build()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    resumed.state.best_model_checkpoint = str(checkpoint)
    resumed._load_best_model()
    halfway = load_file(checkpoint / "scales.safetensors")
    for name, each in scale_parameters(resumed.model).items():
        assert torch.equal(each, halfway[name]) and (each.detach() != scale_parameters(whole.model)[name]).any()
    with pytest.raises(ConfigError, match=r"train_scales was on in the run of .*, and is off now"):
        make_trainer(str(one_layer_path), peft_config=copy.deepcopy(LORA)).train(resume_from_checkpoint=str(checkpoint))


def test_factors_and_norms_have_their_own_learning_rate_and_no_decay(make_trainer):
    lora = {"peft_config": copy.deepcopy(LORA), "weight_decay": 0.1, "learning_rate": 3e-5}
    for options, first in (({}, []), (lora, [(3e-5, 0.1)])):
        trainer = make_trainer(train_scales=True, **options)
        own = scale_parameters(trainer.model)
        with torch.no_grad():
            for size, name in ((0.1, "model.norm.weight"), (0.0, "model.layers.1.input_layernorm.weight")):
                own[name].mul_(size)
        groups = trainer.create_optimizer().param_groups
        rates = {id(each): (group["lr"], group["weight_decay"]) for group in groups for each in group["params"]}
        sizes = {"model.norm.weight": 3e-5, "model.layers.1.input_layernorm.weight": 3e-6}
        for name, each in own.items():
            assert rates[id(each)] == (pytest.approx(sizes.get(name, 3e-4)), 0.0), name
        assert [(group["lr"], group["weight_decay"]) for group in groups[: len(first)]] == first
        assert len(own) == 2 * 7 + 5
        trained = {id(each) for each in trainer.model.parameters() if each.requires_grad}
        assert {id(each) for group in groups for each in group["params"]} == trained
