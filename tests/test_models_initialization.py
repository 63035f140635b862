"""The start from the quantization error: optimal in closed form, better than zero on a model, refused with a reason."""

import copy
import math
import sys
import weakref
from functools import partial
from importlib import import_module
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from datasets import IterableDataset
from families import FAMILIES, build as build_family
from packed_checkpoints import load_in
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.core_model_loading import Chunk, WeightConverter
from transformers.pytorch_utils import Conv1D

from quantkd.errors import ConfigError
from quantkd.models import curvature, initialization
from quantkd.models.curvature import Costs, measure_costs, weigh_inputs
from quantkd.models.initialization import _MAX_INPUTS, compute_correction, initialize_from_error
from quantkd.models.layer_inputs import Rows, draw_rows
from quantkd.models.network import base_network, recomputed_blocks
from quantkd.models.original_weights import OriginalWeights
from quantkd.models.provenance import Provenance
from quantkd.models.quantize import quantize
from quantkd.models.student import attach_lora, load_student
from quantkd.models.weights import dequantize_weight
from quantkd.transfer_set import IGNORE_INDEX
from tests.conftest import refused

IDS = torch.arange(120).view(6, 20)
load = pytest.fixture(lambda tiny_model_path: partial(load_student, str(tiny_model_path), dtype="float32"))


def weighted_error(error, correction, moment):
    left = error - correction
    return float((left @ moment @ left.T).trace())


def random_problem(rows, columns, tokens, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs *= torch.logspace(-1, 1, columns, dtype=torch.float64)
    return error.to(dtype), inputs.to(dtype)


def shrunk_moment(inputs):
    inputs = inputs.double()
    moment = inputs.T @ inputs / len(inputs)
    return moment + moment.diagonal().mean() * 1e-2 * torch.eye(len(moment), dtype=torch.float64)


def least_error(error, moment, rank):
    """The least weighted error of any matrix of the rank, by a dense SVD of E times a Cholesky root (Eckart-Young)."""
    root = torch.linalg.cholesky(moment)
    left, sigma, right = torch.linalg.svd(error.double() @ root, full_matrices=False)
    best = (left[:, :rank] * sigma[:rank]) @ right[:rank] @ torch.linalg.inv(root)
    least = weighted_error(error.double(), best, moment)
    assert least == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-6, abs=1e-9)
    return least


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("shape", "rank", "dtype", "limit"), [
    *(((9, 7, tokens), rank, torch.float64, 1 + 2e-6) for tokens in (50, 4, 1) for rank in (1, 3, 6)),
    ((200, 150, 900), 16, torch.float32, 1.02),  # by the randomized iteration
])  # fmt: skip
def test_no_other_matrix_of_the_rank_does_better(shape, rank, dtype, limit, weighed):
    error, inputs = random_problem(*shape, dtype)
    gradients = random_problem(shape[0], shape[0], 40, dtype)[1]
    groups = gradients.tensor_split(2, dim=1) if weighed else ()
    costs = [each.T @ each / 40 + 0.1 * torch.eye(each.shape[1], dtype=dtype) for each in groups]
    up, down = compute_correction(error, inputs, rank, costs=costs)
    moment = shrunk_moment(inputs)
    whole = torch.block_diag(*costs).double() if weighed else torch.eye(shape[0], dtype=torch.float64)
    root = torch.linalg.cholesky(whole).T
    least = least_error(root @ error.double(), moment, rank)
    found = weighted_error(root @ error.double(), root @ (up @ down).double(), moment)
    assert least <= found * (1 + 1e-6) <= limit * least
    assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1])
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_without_inputs_it_is_peft_s_loftq_and_full_rank_gives_back_the_whole_error():
    error, _ = random_problem(12, 9, 1)
    error[:, 0] *= 5  # a spectrum with gaps, so that the leading directions are one answer
    up, down = compute_correction(error, None, 4)
    theirs = _low_rank_decomposition(error, 4)
    torch.testing.assert_close(up @ down, theirs["L"] @ theirs["R"])
    error, inputs = random_problem(6, 5, 20)
    up, down = compute_correction(error, inputs, 8)
    assert up.shape == (6, 8) and down.shape == (8, 5)
    torch.testing.assert_close(up @ down, error)
    assert not up[:, 5:].any() and not down[5:].any()  # what exceeds the rank
    for factor in compute_correction(torch.zeros(6, 5), inputs.float(), 2):
        assert not factor.any()  # nothing to correct, and no division by it
    indefinite = torch.eye(6) - 1.2 / 6 * torch.ones(6, 6)  # by the rounding of bfloat16, say
    for factor in compute_correction(torch.ones(6, 5), None, 2, costs=[indefinite]):
        assert factor.isfinite().all()


@pytest.fixture
def build(make_trainer, training_set):
    return partial(make_trainer, init="covariance", eval_dataset=training_set)


def adapters(model, factor="lora_"):
    return {name: p.detach().clone() for name, p in model.named_parameters() if factor in name}


def products(model):
    """B A times its scale, of every adapter."""
    return {
        name: module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


def correct(model, path, ids=IDS, mask=None):
    """Start the model's adapters from its error against the checkpoint at `path`; how many were set."""
    weights = OriginalWeights(str(path), model.get_base_model())
    return initialize_from_error(model, weights, Rows(ids, mask), progress=False)


def test_it_is_near_to_the_teacher_the_same_every_time_and_draws_from_no_generator(tiny_model_path, build, load):
    made = {init: build(init=init) for init in ("zero", "loftq", "covariance")}
    zero, loftq, covariance = (trainer.evaluate()["eval_kl"] for trainer in made.values())
    assert covariance < loftq < zero and covariance < 0.5 * zero
    first = adapters(made["covariance"].model)
    torch.manual_seed(7)
    torch.testing.assert_close(adapters(build().model), first, rtol=0, atol=0)
    assert all(value.any() for value in first.values())
    model = attach_lora(load()).train()
    state = torch.get_rng_state()
    correct(model, tiny_model_path, torch.ones(1, 3).long())
    assert torch.equal(state, torch.get_rng_state()) and model.training


def rounded(tiny_model):
    """The tiny model with every linear weight of its layers rounded to eighths: a quantized model without a library."""
    for layer in tiny_model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = (layer.weight.data * 8).round() / 8
    return tiny_model


def adapted(tiny_model):
    config = LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", use_rslora=True)
    return attach_lora(rounded(tiny_model), config)


def test_each_layer_is_corrected_for_the_inputs_that_the_corrected_layers_before_it_give(tiny_model, tiny_model_path):
    """Layer by layer against a reference that runs the model anew for each layer, up to that layer's inputs."""
    model, ids = adapted(tiny_model), torch.arange(60).view(4, 15)
    assert correct(model, tiny_model_path, ids) == 14
    weights = OriginalWeights(str(tiny_model_path), model.get_base_model())
    found = {name: product.detach() for name, product in products(model).items()}
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if name in found}
    set_to = {name: layer.lora_B["default"].weight.detach().clone() for name, layer in layers.items()}
    for layer in layers.values():
        layer.lora_B["default"].weight.data.zero_()
    for name, layer in layers.items():
        seen = []
        hook = layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        model.eval()(ids)
        hook.remove()
        original = weights.read(name)
        error = (original - layer.get_base_layer().weight).detach().double()
        moment = shrunk_moment(seen[0].reshape(-1, original.shape[1]))
        ours = weighted_error(error, found[name].double(), moment)
        assert ours <= 1.02 * least_error(error, moment, 3), name
        layer.lora_B["default"].weight.data.copy_(set_to[name])


def test_rows_of_padding_do_not_count(tiny_model, tiny_model_path, training_set):
    model = adapted(tiny_model)
    ids, mask, _ = draw_rows(training_set, 4, 0)
    correct(model, tiny_model_path, ids, mask)
    plain = products(model)
    for name, parameter in model.named_parameters():
        parameter.data *= "lora_B" not in name
    correct(model, tiny_model_path, *(nn.functional.pad(each, (0, 30)) for each in (ids, mask)))
    torch.testing.assert_close(products(model), plain, rtol=1e-3, atol=1e-4)


def test_an_error_costs_what_it_changes_the_loss_by_token_and_direction(tiny_model, training_set, monkeypatch):
    """Against the gradients that autograd keeps, row by row; what is drawn, and every parameter, stays as it was."""
    drawn, seen = draw_rows(training_set, 3, 0), {}
    ids, mask, labels = drawn
    layers = [each for each in tiny_model.model.layers.modules() if isinstance(each, nn.Linear)]
    state = torch.get_rng_state()
    bar = tqdm(disable=True)
    monkeypatch.setattr(curvature, "_MAX_COSTS", 50 * sum(each.out_features for each in layers))
    found = measure_costs(tiny_model.train(), layers, drawn, bar)
    assert torch.equal(state, torch.get_rng_state()) and tiny_model.training
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    expected = {layer: [] for layer in layers}
    torch.manual_seed(0)
    for row, kept, own in zip(ids, mask.bool(), labels, strict=True):
        hooks = [each.register_forward_hook(lambda layer, _, out: seen.update({layer: out})) for each in layers]
        logits = tiny_model.eval()(row[kept][None]).logits[0]
        at = (own[kept][1:] != IGNORE_INDEX).nonzero().flatten()
        p = logits[at].detach().softmax(-1)
        root = p.sqrt() * torch.randn_like(p)
        loss = (logits[at] * (root - p * root.sum(1, keepdim=True))).sum()
        for layer, grad in zip(layers, torch.autograd.grad(loss, [seen[each] for each in layers]), strict=True):
            expected[layer].append(grad[0])
        [hook.remove() for hook in hooks]
    for layer in layers:
        gradients = torch.cat(expected[layer])
        tokens = gradients.square().sum(-1)
        torch.testing.assert_close(found[layer].tokens, tokens, rtol=1e-4, atol=1e-9)
        # Half of what the inputs count is weighted so.
        inputs, weights = torch.randn(len(tokens), 5), (tokens / tokens.mean() + 1) / 2
        scaled = weigh_inputs(inputs, found[layer])
        torch.testing.assert_close(scaled.T @ scaled, (weights[:, None] * inputs).T @ inputs, rtol=1e-4, atol=1e-4)
        # In groups, which are as equal as they can be.
        parts = gradients.tensor_split(math.ceil(gradients.shape[1] / 50), dim=1)
        for block, part in zip(found[layer].outputs, parts, strict=True):
            torch.testing.assert_close(block, part.T @ part, rtol=1e-4, atol=1e-4 * float(block.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_run_again_change_no_cost(family, monkeypatch):
    """In a large model the pass holds the inputs of blocks alone; what was set on blocks and config is as before."""
    model, runs = build_family(family, 120), []
    layers = [each for each in base_network(model).base_model.modules() if isinstance(each, nn.Linear | Conv1D)]
    state = model.config.to_dict()
    hooks = [each.register_forward_pre_hook(lambda *_: runs.append(1)) for each in layers]
    plain, once = measure_costs(model, layers, Rows(IDS, labels=IDS), tqdm(disable=True)), len(runs)
    monkeypatch.setattr(curvature, "_MAX_OUTPUTS", 0)
    found = measure_costs(model, layers, Rows(IDS, labels=IDS), tqdm(disable=True))
    [each.remove() for each in hooks]
    assert model.config.to_dict() == state and not any("forward" in vars(each) for each in model.modules())
    assert found.keys() == plain.keys() and len(runs) > 2 * once
    for layer, costs in found.items():
        for mine, its in zip((costs.tokens, *costs.outputs), (plain[layer].tokens, *plain[layer].outputs), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5 * float(its.abs().max()))


def test_a_block_that_a_model_has_twice_runs_again_and_is_left_as_it_was(tiny_model):
    tiny_model.model.layers.append(tiny_model.model.layers[0])
    first, own = tiny_model.model.layers[0], tiny_model.model.layers[1].forward
    tiny_model.model.layers[1].forward = own  # as accelerate's hooks leave it
    with recomputed_blocks(tiny_model):
        assert "forward" in vars(first)
    assert "forward" not in vars(first) and tiny_model.model.layers[1].forward is own


def test_a_router_that_gives_several_outputs_has_no_costs():
    model = attach_lora(build_family("Qwen3-MoE", 320), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    layers = {each: name for name, each in model.named_modules() if isinstance(each, LoraLayer)}
    found = measure_costs(model, layers, Rows(IDS, labels=IDS), tqdm(disable=True))
    assert sorted(layers[each].rpartition(".")[2] for each in layers.keys() - found) == ["gate"] * 2
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_what_is_drawn_has_the_curvature_of_the_kl():
    p = torch.tensor([0.7, 0.2, 0.05, 0.05])
    drawn = curvature.draw_curvature(p.log().expand(200_000, 4), [100_000] * 2)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), p.diag() - p.outer(p), rtol=0.02, atol=1e-3)


def test_rows_are_drawn_until_the_padded_batch_is_full_and_a_long_one_is_weighed_in_part(tiny_model, monkeypatch):
    dataset = [{"input_ids": list(range(1, length + 1))} for length in (5, 3, 9, 40_000)]
    ids, mask, _ = draw_rows(dataset[:3], 8, seed=0)
    assert ids.shape == (3, 9) and sorted(mask.sum(1).tolist()) == [3, 5, 9]
    assert (ids[mask == 0] == 0).all() and (ids[mask == 1] > 0).all()
    assert draw_rows(dataset[:3], 2, seed=0)[0].shape[0] == 2
    assert draw_rows(dataset[3:], 8, seed=0)[0].shape == (1, 16384)
    assert draw_rows([dataset[3]] * 5, 5, seed=0)[0].numel() <= 16384
    # Of a model whose layers read 128 values at most, more tokens; no more entries of the attention's mask.
    for length, shape in ((1000, (200, 1000)), (2048, (64, 2048)), (40_000, (1, 16384))):
        rows = [{"input_ids": list(range(1, length + 1))}] * 200
        assert draw_rows(rows, 200, 0, tiny_model)[0].shape == shape
    monkeypatch.setattr(curvature, "_MAX_TOKENS", 6)
    layer, ids = tiny_model.model.layers[0].mlp.up_proj, torch.arange(1, 21).view(2, 10)
    weights = measure_costs(tiny_model, [layer], Rows(ids, labels=ids), tqdm(disable=True))[layer].tokens.view(2, 10)
    torch.testing.assert_close(weights[:, 6:], weights[:, :6].mean(1, keepdim=True).expand(2, 4))


def test_rows_that_share_a_pass_cost_what_they_cost_alone(tiny_model, training_set, monkeypatch):
    """Also those that are cut, and those without targets, of which all tokens count."""
    monkeypatch.setattr(curvature, "_MAX_TOKENS", 30)
    ids, mask, labels = draw_rows(training_set, 6, seed=0)
    labels[2] = -100
    assert len(set(mask.sum(1).tolist())) > 1 and int(mask.sum(1).max()) > 30
    layers = [tiny_model.model.layers[0].mlp.up_proj, tiny_model.model.layers[1].self_attn.o_proj]
    found = []
    for tokens in (1, 70, 1024):  # a row, two and all of them in a pass
        monkeypatch.setattr(curvature, "_BATCH_TOKENS", tokens)
        found.append(measure_costs(tiny_model, layers, Rows(ids, mask, labels), tqdm(disable=True)))
    for layer in layers:
        alone, *together = (each[layer] for each in found)
        assert len(alone.tokens) == mask.sum()
        for costs in together:
            torch.testing.assert_close(costs.tokens, alone.tokens, rtol=1e-3, atol=1e-4 * float(alone.tokens.max()))
            whole = alone.outputs[0]
            torch.testing.assert_close(costs.outputs[0], whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_what_is_saved_is_a_plain_adapter_and_a_resumed_run_keeps_it(load, tmp_path, monkeypatch, build):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "seed": 3}
    trainer = build(**options)
    trainer.train()
    trained = adapters(trainer.model)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    loaded = PeftModel.from_pretrained(load(), checkpoint)
    assert loaded.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(adapters(loaded), trained)
    refuse = Mock(side_effect=AssertionError("a resumed run computed a start"))
    monkeypatch.setattr("quantkd.training.preparation.initialize_from_rows", refuse)
    resumed = build(**options, resume_from_checkpoint=str(checkpoint))
    resumed.train(resume_from_checkpoint=str(checkpoint))  # one step of one: nothing is left to train
    torch.testing.assert_close(adapters(resumed.model), trained)


def test_what_cannot_be_done_is_said(load, tiny_model_path, tiny_tokenizer, tmp_path, caplog, build):
    own = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")  # left alone, and nothing said
    assert not any(factor.any() for factor in adapters(build(peft_config=own).model, "lora_B").values())
    student, named = load(), load()
    student.config.name_or_path = named.config.name_or_path = str(tmp_path)
    trainer = build(student, processing_class=tiny_tokenizer)
    assert "start from zero" in caplog.text and "no safetensors weights" in caplog.text
    assert not any(factor.any() for factor in adapters(trainer.model, "lora_B").values())
    found = adapters(build(named, processing_class=tiny_tokenizer, init_from=str(tiny_model_path)).model)
    torch.testing.assert_close(found, adapters(build().model), rtol=0, atol=0)


def start(model, path, ids=IDS, rank=32):
    """The model with adapters of a high rank, set; how many were."""
    model = attach_lora(model, LoraConfig(r=rank, target_modules="all-linear"))
    return model, correct(model, path, ids)


def logit_error(model, teacher):
    with torch.no_grad():
        return float((model(IDS).logits.float() - teacher(IDS).logits).norm())


@pytest.mark.parametrize("config", ["nf4", "fp4", "hqq", "torchao-int8", "gptq", "awq", "int8"])
def test_every_format_comes_nearer_to_the_teacher(tiny_model, tiny_model_path, tmp_path, config):
    student = load_in(config, tiny_model_path, tmp_path / "packed")
    before = logit_error(student.eval(), tiny_model)
    model, count = start(student, tiny_model_path)
    left = 0.8 if config == "int8" else 0.6  # LLM.int8 rounds its inputs too, which no correction of weights can mend
    assert count == 14 and logit_error(model.eval(), tiny_model) < left * before


def test_gpt2_s_weights_lie_the_other_way_round(tmp_path):
    """Its square projections would fit either way; the right one leaves little of the error."""
    teacher = build_family("GPT-2", 128)
    teacher.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    student = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    model = attach_lora(student, LoraConfig(r=64, target_modules="all-linear", fan_in_fan_out=False))
    assert correct(model, tmp_path) == 8
    for name, product in products(model).items():
        error = teacher.get_submodule(name).weight.T - dequantize_weight(model.get_base_model().get_submodule(name))
        assert (error - product).norm() < 0.1 * error.norm(), name


def test_an_expert_without_tokens_is_corrected_without_inputs(tiny_model, tmp_path):
    tiny_model.model.layers[1].mlp.idle = nn.Linear(64, 64, bias=False)  # which its forward pass does not call
    tiny_model.save_pretrained(tmp_path)
    model, count = start(rounded(tiny_model), tmp_path, rank=64)
    assert count == 15
    name = "model.layers.1.mlp.idle"
    corrected = model.get_base_model().get_submodule(name).get_base_layer().weight + products(model)[name]
    original = load_file(tmp_path / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(corrected, original, atol=1e-4, rtol=1e-4)


def test_a_tied_head_and_modules_saved_whole_stay_as_they_are(tiny_model, tmp_path):
    tiny_model.config.tie_word_embeddings = True
    tiny_model.tie_weights()
    tiny_model.save_pretrained(tmp_path)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = attach_lora(load_student(str(tmp_path), dtype="float32"), config)
    head = model.get_output_embeddings().weight.clone()
    assert correct(model, tmp_path) == 4 and torch.equal(model.get_output_embeddings().weight, head)


@pytest.mark.parametrize(("part", "change", "kept", "reason"), [
    ("proj", torch.randn_like, 0, "it was not quantized from it"),
    ("down_proj", lambda value: value[..., :-1].contiguous(), 12, "(64, 127), and its own (64, 128)"),
])  # fmt: skip
def test_a_checkpoint_of_another_model_is_noticed(load, tiny_model, tmp_path, caplog, part, change, kept, reason):
    tensors = {name: change(value) if part in name else value for name, value in tiny_model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model, count = start(load(), tmp_path, rank=4)
    assert count == kept and f"{14 - kept} of 14 adapters start from zero" in caplog.text and reason in caplog.text
    assert not any(factor.any() for name, factor in adapters(model, "lora_B").items() if part in name)


def test_an_exact_layer_keeps_a_start_that_can_be_trained_and_dora_its_own(tiny_model, tiny_model_path, caplog):
    """An unquantized layer, and ranks above a layer's own: B is zero there, and A is not."""
    model = attach_lora(tiny_model, LoraConfig(r=80, target_modules=["q_proj", "k_proj"]))
    model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight.data.mul_(1.01)
    own = adapters(model, "lora_A")
    assert correct(model, tiny_model_path) == 4
    for name, parameter in adapters(model).items():
        changed = "layers.0.self_attn.q_proj" in name
        if "lora_A" in name:
            assert torch.equal(parameter[64:], own[name][64:]) and torch.equal(parameter, own[name]) != changed
        else:
            assert bool(parameter.any()) == changed
    dora = attach_lora(rounded(model.unload()), LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    assert correct(dora, tiny_model_path) == 0 and "not a plain LoRA" in caplog.text


def test_one_layer_is_held_at_a_time(load, tiny_model_path, monkeypatch):
    """What is alive at each correction: one original weight, and at most `_MAX_INPUTS` inputs of one layer."""
    alive, most = weakref.WeakSet(), []
    read, compute = OriginalWeights.read, initialization.compute_correction

    def watched_read(self, name):
        weight = read(self, name)
        alive.add(weight.untyped_storage())
        return weight

    def watched_compute(error, inputs, rank, **options):
        most.append((len(alive), len(inputs), inputs.numel() + error.numel()))
        return compute(error, inputs, rank, **options)

    monkeypatch.setattr(OriginalWeights, "read", watched_read)
    monkeypatch.setattr(initialization, "compute_correction", watched_compute)
    start(load(), tiny_model_path, torch.arange(15_000).view(30, 500) % 300, rank=4)
    weights, tokens, numbers = (max(each) for each in zip(*most, strict=True))
    assert len(most) == 14 and weights <= 1 and tokens <= _MAX_INPUTS
    assert numbers <= (_MAX_INPUTS + 64) * 128  # the widest layer's


def test_the_learning_rate_follows_the_start_that_was_made(one_layer_path, tmp_path, build, training_set):
    def lora(**options):
        return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)

    load = partial(load_student, str(one_layer_path), dtype="float32")
    load().save_pretrained(tmp_path / "nf4")
    stored = {"model": str(tmp_path / "nf4"), "processing_class": AutoTokenizer.from_pretrained(one_layer_path)}
    quantize(str(one_layer_path), training_set, tmp_path / "codes", progress=False)
    codes, default = {**stored, "model": str(tmp_path / "codes")}, {"model": str(one_layer_path), "learning_rate": None}
    for options, rate in (
        ({}, 3e-5),
        ({"init": "loftq"}, 3e-5),
        ({"init": "zero"}, 3e-4),
        ({**codes, "init_from": str(one_layer_path)}, 1e-4),
        ({**codes, "init": "zero"}, 3e-4),
        ({"learning_rate": 7e-5, "init": "zero"}, 7e-5),
        (stored, 3e-4),  # without originals beside it
        ({**stored, "learning_rate": 3e-5}, 3e-5),
        ({**stored, "init_from": str(one_layer_path)}, 3e-5),
        ({"peft_config": lora(init_lora_weights="gaussian")}, 3e-4),
        ({"peft_config": lora(use_dora=True)}, 3e-4),
        ({"peft_config": lora(lora_bias=True)}, 3e-5),
        ({"peft_config": IA3Config(task_type="CAUSAL_LM")}, 3e-4),
        ({"train_dataset": None}, 3e-4),
        ({"train_dataset": IterableDataset.from_generator(lambda: iter(training_set))}, 3e-4),
        ({"model": get_peft_model(load(), lora())}, 3e-4),
        ({"model": build(str(one_layer_path), init="loftq").model}, 3e-5),  # adapters that were trained before
        ({"model": build(**codes, init_from=str(one_layer_path)).model}, 1e-4),
        ({"model": AutoModelForCausalLM.from_pretrained(one_layer_path)}, 3e-5),  # trained whole
    ):
        assert build(**{**default, **options}).args.learning_rate == rate, options
    saving = {**stored, "learning_rate": None, "save_strategy": "steps", "save_steps": 1}
    trainer = build(**saving)
    trainer.train()
    trainer.save_model()
    assert Provenance.read(tmp_path / "out").training["init"] == "zero"
    resumed = build(**saving, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert (resumed.args.learning_rate, resumed.args.start) == (3e-4, "zero")


NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(("saved", "read", "size"), [
    ("", "", "50GB"), ("", "", "100KB"),  # one file, and many
    ("model", "", "50GB"), ("", "model", "50GB"),  # keys without `model.`, and with it for a model without a head
])  # fmt: skip
def test_every_linear_layer_is_read(tiny_model, tmp_path, saved, read, size):
    tiny_model.get_submodule(saved).save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or size == "50GB"
    model = tiny_model.get_submodule(read)
    weights = OriginalWeights(str(tmp_path), model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name != "lm_head" or not saved):
            assert torch.equal(weights.read(name), module.weight), name
    if saved:
        refused(ConfigError, r"has no tensor for lm_head\.weight", weights.read, "lm_head")


def test_names_follow_the_mapping_of_transformers_or_all_is_loaded(tmp_path, tiny_model, monkeypatch, caplog):
    """A Mixtral checkpoint as Mistral published it: its experts are merged when it is loaded, its attention is not."""
    model = build_family("Mixtral", 64)
    model.save_pretrained(tmp_path)
    assert any("block_sparse_moe.experts.0.w1" in key for key in load_file(tmp_path / "model.safetensors"))
    weights = OriginalWeights(str(tmp_path), model)
    for name in ("self_attn.q_proj", "mlp.gate"):  # the latter is `block_sparse_moe.gate` in the file
        name = f"model.layers.0.{name}"
        assert torch.equal(weights.read(name), model.get_submodule(name).weight)
    assert "model.layers.0.mlp.experts.gate_up_proj" in weights._converted
    tiny_model.save_pretrained(tmp_path / "tiny")
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", ModuleType("transformers.conversion_mapping"))
    weights = OriginalWeights(str(tmp_path / "tiny"), tiny_model)
    assert "The checkpoint is loaded whole" in caplog.text and "has no transformers.conversion_mapping" in caplog.text
    assert torch.equal(weights.read(NAME), tiny_model.get_submodule(NAME).weight)
    refused(ConfigError, r"has no tensor for nothing\.weight", weights.read, "nothing")


def test_a_weight_that_is_made_of_others_is_refused(tmp_path):
    """transformers 5 splits or permutes some families' linear layers; the mapping's own words say which."""
    mapping = import_module("transformers.conversion_mapping")
    converter = WeightConverter("qkv_proj.weight", ["q_proj.weight", "k_proj.weight", "v_proj.weight"], [Chunk(dim=0)])
    model, names = nn.Module(), ("q_proj", "k_proj", "v_proj")
    model.base_model_prefix = "model"
    model.attn = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in names})
    save_file({"attn.qkv_proj.weight": torch.ones(12, 4)}, tmp_path / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "get_model_conversion_mapping", lambda model: [converter])
        weights = OriginalWeights(str(tmp_path), model)
    for name in names:
        refused(ConfigError, "is made of other tensors", weights.read, f"attn.{name}")


def test_what_is_quantized_already_is_no_original(tiny_model, tiny_model_path, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tiny_model_path, quantization_config=config).save_pretrained(tmp_path / "nf4")
    tensors = {key: value.to(torch.float8_e4m3fn) for key, value in tiny_model.state_dict().items()}
    (tmp_path / "fp8").mkdir()
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    for name, found in (("nf4", r"stored as torch\.uint8, quantized already"), ("fp8", "float8_e4m3fn")):
        refused(ConfigError, found, OriginalWeights(str(tmp_path / name), tiny_model).read, NAME)


class Experts(nn.ModuleList):
    """A layer's work done by copies of it, each on a part of the tokens."""

    def forward(self, inputs):
        parts = inputs.flatten(0, 1).tensor_split([7])
        return torch.cat([expert(part) for expert, part in zip(self, parts, strict=True)]).view(*inputs.shape[:2], -1)


def test_costs_of_experts_that_see_a_part_of_the_tokens(tiny_model, training_set):
    rows = draw_rows(training_set, 4, seed=0)
    mlp = tiny_model.model.layers[0].mlp
    [whole] = measure_costs(tiny_model, [mlp.up_proj], rows, tqdm(disable=True)).values()
    mlp.up_proj = Experts(copy.deepcopy(mlp.up_proj) for _ in range(2))
    parts = measure_costs(tiny_model, mlp.up_proj, rows, tqdm(disable=True))
    assert len(parts) == 2 and all(len(costs.tokens) == 0 for costs in parts.values())
    total = sum(costs.outputs[0] for costs in parts.values())
    torch.testing.assert_close(total, whole.outputs[0], rtol=1e-4, atol=1e-4 * float(total.abs().max()))


def test_inputs_count_alike_where_no_cost_can_be_known(tiny_model, monkeypatch):
    inputs, layer, ids = torch.randn(3, 2), tiny_model.model.layers[0].mlp.up_proj, torch.arange(8).view(1, 8)
    assert weigh_inputs(inputs, None) is inputs
    assert weigh_inputs(inputs, Costs(torch.ones(4), [])) is inputs  # of an expert, a part of the tokens
    for value in (0.0, math.nan, math.inf):  # no loss depends on it, or a gradient overflowed
        monkeypatch.setattr(curvature, "draw_curvature", lambda logits, _, value=value: torch.full_like(logits, value))
        assert not measure_costs(tiny_model, [layer], Rows(ids, labels=ids), tqdm(disable=True))
