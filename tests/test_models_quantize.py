"""Calibrated codes: never worse than the nearest ones, in bitsandbytes' own bytes, as an ordinary checkpoint."""

import logging
import shutil

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig

from quantkd import quantize
from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.models import codes
from quantkd.models.codes import Moment, calibrate_layer, choose_codes, moments_of, read_constants
from quantkd.models.curvature import Costs, gram
from quantkd.models.layer_inputs import Rows, draw_rows
from quantkd.models.original_weights import OriginalWeights
from quantkd.models.provenance import Provenance
from quantkd.models.quantize import calibrate, find_origin
from quantkd.models.stored_weights import describe_weights
from quantkd.models.student import load_student
from quantkd.models.weights import dequantize_weight
from tests.conftest import TRAINING_PROMPTS, capture_set, refused


def random_problem(rows, columns, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(-1, 1, columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs


def quantized(weight, *, kind="nf4", nested=True, blocksize=64, storage=torch.uint8):
    """What bitsandbytes makes of a weight, as a layer that computes in float32."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, columns = weight.shape
    layer = Linear4bit(columns, rows, bias=False, compute_dtype=torch.float32, quant_type=kind, quant_storage=storage)
    options = {"compress_statistics": nested, "blocksize": blocksize, "quant_storage": storage}
    packed, state = bnb.quantize_4bit(weight, quant_type=kind, **options)
    layer.weight = Params4bit(packed, requires_grad=False, quant_state=state, quant_type=kind, bnb_quantized=True)
    return layer


def output_errors(weight, layer, inputs):
    """The squared output error of each row, in float64, from the inputs themselves."""
    error = weight.double().numpy() - dequantize_weight(layer).double().numpy()
    return np.square(inputs.double().numpy() @ error.T).sum(0)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.sampled_from([3, 33, 64, 99, 128, 192]), st.sampled_from([1, 5, 300]),
       st.sampled_from(["nf4", "fp4"]), st.booleans(), st.integers(0, 9))  # fmt: skip
@example(6, 33, 300, "nf4", True, 3)  # bitsandbytes' codes, by constants that it has not quantized yet, are better
def test_no_row_is_worse_than_with_the_nearest_codes(rows, columns, tokens, kind, nested, seed):
    weight, inputs = random_problem(rows, columns, tokens, seed)
    inputs[:, columns // 2] = 0  # a dead input
    layer = quantized(weight, kind=kind, nested=nested)
    before = output_errors(weight, layer, inputs)
    gradients = random_problem(rows, rows, 5, seed)[1]
    costs = [each.T @ each for each in gradients.tensor_split(2, dim=1) if each.shape[1]] * (seed % 2)
    calibrate_layer(layer, weight, moments_of(inputs)[0], [codes.Moment(each) for each in costs])
    assert (output_errors(weight, layer, inputs) <= before * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_inputs_without_a_preference_give_the_nearest_codes(kind, nested):
    weight, _ = random_problem(7, 91, 1)
    inputs = torch.eye(91) * 91**0.5
    layers = [quantized(weight, kind=kind, nested=nested) for _ in range(3)]
    nearest = dequantize_weight(layers[0])
    for layer, moment in zip(layers[1:], (None, moments_of(inputs)[0]), strict=True):
        calibrate_layer(layer, weight, moment)
        if nested:  # bitsandbytes rounds before it quantizes the constants, and so on other ones
            assert (weight - dequantize_weight(layer)).abs().max() <= (weight - nearest).abs().max()
        else:
            assert torch.equal(dequantize_weight(layer), nearest)
    assert torch.equal(layers[1].weight, layers[2].weight)


def test_feedback_is_that_of_the_textbook():
    """Optimal brain quantization, which forms the inverse of what is left at every column."""
    weight, inputs = random_problem(3, 40, 200)
    layer = quantized(weight, nested=False)
    state = layer.weight.quant_state
    scales = read_constants(state).repeat_interleave(64)[:120].reshape(3, 40)
    moment = moments_of(inputs)[0]
    left, matrix, levels = weight.double(), moment.matrix.double()[moment.order][:, moment.order], state.code.double()
    matrix = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(40)
    left, divisors = left[:, moment.order], scales.double()[:, moment.order]
    expected = torch.empty(3, 40, dtype=torch.long)
    for column in range(40):
        inverse = torch.linalg.inv(matrix[column:, column:])
        expected[:, column] = (left[:, column] / divisors[:, column]).unsqueeze(1).sub(levels).abs().argmin(1)
        error = (left[:, column] - levels[expected[:, column]] * divisors[:, column]) / inverse[0, 0]
        left[:, column:] -= torch.outer(error, inverse[0])
    found = choose_codes(weight, scales, state.code, moment)
    assert (found[:, moment.order] == expected).double().mean() > 0.98  # ties aside


@pytest.mark.parametrize("block, columns", [(1, 64), (4, 16), (4, 24), (2, 5)])
def test_feedback_between_rows_is_that_of_the_textbook(block, columns, monkeypatch):
    """The rows to come make up for an error by their best change, from the inverse of what is left of the moment."""
    monkeypatch.setattr(codes, "_PARTS", 24 // block)
    monkeypatch.setattr(codes, "_COLUMNS", columns)
    weight, inputs = random_problem(24, 64, 200)
    gradients = random_problem(24, 24, 60)[1]
    scales, levels = torch.full_like(weight, weight.abs().max()), quantized(weight).weight.quant_state.code
    own, costs = moments_of(inputs)[0], Moment(gradients.T @ gradients, damping=0.5)
    damped, order = costs.matrix.double(), costs.order
    damped = damped[order][:, order] + 0.5 * damped.diagonal().mean() * torch.eye(24)
    left, expected = weight.double(), torch.empty(24, 64, dtype=torch.long)
    for start in range(0, 24, block):
        now, later = order[start : start + block], order[start + block :]
        inverse = torch.linalg.inv(damped[start:, start:])
        expected[now] = choose_codes(left[now].float(), scales[now], levels, own)
        error = left[now] - levels[expected[now]].double() * scales[now].double()
        left[later] -= inverse[block:, :block] @ torch.linalg.solve(inverse[:block, :block], error)
    found = choose_codes(weight, scales, levels, own, [costs])
    assert (found == expected).double().mean() > 0.98  # ties aside

    def cost(chosen):
        error = weight - levels[chosen] * scales
        return float((costs.matrix @ error @ own.matrix * error).sum())

    nearest, alone = (choose_codes(weight, scales, levels, each) for each in (None, own))
    assert cost(found) < 0.95 * cost(alone) < 0.5 * cost(nearest)


@pytest.mark.parametrize("size", [1, 5, 300, 700])
def test_a_gram_matrix_is_the_whole_product(size):
    values = random_problem(40, size, 1)[0]
    torch.testing.assert_close(gram(values), values.T @ values)


def test_groups_of_outputs_are_chosen_apart():
    weight, inputs = random_problem(12, 64, 200)
    costs = [each.T @ each for each in (random_problem(6, 6, 9)[1], random_problem(6, 6, 7)[1])]
    scales, levels = torch.ones_like(weight) * weight.abs().max(), quantized(weight).weight.quant_state.code
    own, groups = moments_of(inputs, Costs(torch.ones(len(inputs)), costs))
    whole = choose_codes(weight, scales, levels, own, groups)
    parts = [choose_codes(weight[rows], scales[rows], levels, own, [group])
             for rows, group in zip((slice(6), slice(6, 12)), groups, strict=True)]  # fmt: skip
    assert torch.equal(whole, torch.cat(parts))


def test_storage_constants_and_odd_layers():
    weight, inputs = random_problem(4, 33, 50)
    weight[0] = 0
    for storage in (torch.uint8, torch.bfloat16):
        layer = quantized(weight, storage=storage)
        state, shape, dtype = layer.weight.quant_state, layer.weight.shape, layer.weight.dtype
        constants = read_constants(state).clone()
        calibrate_layer(layer, weight, moments_of(inputs)[0])
        assert layer.weight.quant_state is state and (layer.weight.shape, layer.weight.dtype) == (shape, dtype)
        assert torch.equal(read_constants(state), constants) and torch.isfinite(dequantize_weight(layer)).all()
    layer.weight.quant_state.quant_type = "fp4"  # so that a kernel makes other values of the codes
    refused(ConfigError, "takes other constants", calibrate_layer, layer, weight, None)
    Moment(torch.zeros(6, 6))  # a layer that gets zeros alone
    refused(ConfigError, "inputs are not finite", moments_of, torch.tensor([[torch.inf, 1.0]]))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_checkpoint_that_plain_transformers_loads(kind, tiny_model_path, held_out, tmp_path):
    # Longer answers than those of `training_set`, whose few tokens say too little of a random model in fp4.
    training_set = capture_set(tiny_model_path, TRAINING_PROMPTS, tmp_path / "set", max_new_tokens=40)
    options = {"quantization_config": kind, "dtype": "float32"}
    folder = quantize(tiny_model_path, training_set, tmp_path / "4bit", **options)
    plain = load_student(tiny_model_path, **options)
    plain.save_pretrained(tmp_path / "plain")
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "plain"))
    shapes = [{name: (each.shape, each.dtype) for name, each in tensors.items()} for tensors in (ours, theirs)]
    assert shapes[0] == shapes[1]
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed and all(name.endswith("proj.weight") for name in changed)  # codes alone, no constant
    before = evaluate_fidelity(plain, held_out).means["kl"]
    calibrate(plain, OriginalWeights(tiny_model_path, plain), draw_rows(training_set, 24, 0), progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert Provenance.read(folder).weights == describe_weights(loaded) == describe_weights(plain)
    after = evaluate_fidelity(loaded, held_out).means["kl"]
    assert after == evaluate_fidelity(plain, held_out).means["kl"] < 0.9 * before
    again = quantize(tiny_model_path, training_set, tmp_path / "again", **options)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_what_was_made_names_its_origin_and_what_cannot_be_is_refused(
    tiny_model_path, training_set, tmp_path, cli, monkeypatch
):
    shutil.copytree(tiny_model_path, tmp_path / "model")
    words = ["--output_dir", tmp_path / "4bit", "--rows", "2", "--dtype", "float32"]
    words = ["quantize", tmp_path / "model", "--transfer_set", training_set.sources[0], *words]
    assert "calibrated codes" in cli.ok(*words)
    files = [file for file in (tmp_path / "4bit").glob("*.json") if file.name != "tokenizer.json"]
    assert files and str(tmp_path) not in "".join(file.read_text(encoding="utf-8") for file in files)
    assert find_origin(str(tmp_path / "4bit")) == (str(tmp_path / "model"), None)
    monkeypatch.chdir(tmp_path / "4bit")
    assert find_origin("") is None  # a loaded model may have no name
    shutil.rmtree(tmp_path / "model")
    assert find_origin(str(tmp_path / "4bit")) is None is find_origin(tiny_model_path)
    make, folder, new = {"rows": 2, "dtype": "float32"}, tmp_path / "4bit", tmp_path / "none"
    refused(ConfigError, "not empty", quantize, tiny_model_path, training_set, folder, **make)
    refused(ConfigError, "stored in nf4", quantize, folder, training_set, new, **make)
    int8 = {"quantization_config": "int8", **make}
    refused(ConfigError, "nf4 and fp4", quantize, tiny_model_path, training_set, new, **int8)
    refused(ConfigError, "rows is 0", quantize, tiny_model_path, training_set, new, rows=0)
    refused((ConfigError, DataError), "0 rows", quantize, tiny_model_path, training_set[:0], new, **make)
    assert [path.name for path in tmp_path.iterdir()] == ["4bit"]


def test_experts_stay_as_they_are(tiny_tokenizer, tmp_path, cli):
    config = Qwen3MoeConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=64, moe_intermediate_size=64, num_hidden_layers=1, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for each in (model, tiny_tokenizer):
        each.save_pretrained(tmp_path / "model")
    capture_set(model, TRAINING_PROMPTS, tmp_path / "set", tokenizer=tiny_tokenizer, max_new_tokens=4)
    words = ["--transfer_set", tmp_path / "set", "--output_dir", tmp_path / "4bit", "--dtype", "float32"]
    cli.ok("quantize", tmp_path / "model", *words)
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("model", "4bit"))
    assert any(".experts." in name for name in before)
    assert all(torch.equal(each, after[name]) for name, each in before.items() if ".experts." in name)


def test_turned_layers_and_layers_without_tokens(tmp_path, caplog):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    student = load_student(str(tmp_path / "gpt2"), dtype="float32")
    rows = Rows(torch.arange(60).view(2, 30))
    count = calibrate(student, OriginalWeights(str(tmp_path / "gpt2"), student), rows)
    assert count == 8
    layer = student.transformer.h[0].mlp.c_fc
    layer.register_forward_pre_hook(lambda *_: (torch.full((2, 30, 64), torch.nan),))
    with caplog.at_level(logging.WARNING):
        calibrate(student, OriginalWeights(str(tmp_path / "gpt2"), student), rows)
    assert "keep their nearest codes. That of transformer.h.0.mlp" in caplog.text
