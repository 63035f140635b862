"""The start from the quantization error: optimal in closed form, better than zero on a model, refused in words."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer
from quantkd.errors import ConfigError
from quantkd.models.initialization import compute_correction, draw_rows, initialize_from_error
from quantkd.models.original_weights import OriginalWeights
from quantkd.models.student import attach_lora, load_student
from tests.conftest import capture_set

PROMPTS = [f"What is {n} and {n + 1}, and a few words more?" for n in range(12)]


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


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("tokens", [50, 4, 1])
def test_no_other_matrix_of_the_rank_does_better(rank, tokens):
    error, inputs = random_problem(9, 7, tokens)
    up, down = compute_correction(error, inputs, rank)
    moment = shrunk_moment(inputs)
    assert weighted_error(error, up @ down, moment) == pytest.approx(least_error(error, moment, rank), rel=1e-6)
    assert up.shape == (9, rank) and down.shape == (rank, 7)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_the_randomized_iteration_in_float32_comes_within_two_percent_of_the_optimum():
    error, inputs = random_problem(200, 150, 900, torch.float32)
    up, down = compute_correction(error, inputs, 16)
    moment = shrunk_moment(inputs)
    ours = weighted_error(error.double(), (up @ down).double(), moment)
    assert least_error(error, moment, 16) <= ours * (1 + 1e-6) <= 1.02 * least_error(error, moment, 16)


def test_without_inputs_it_is_the_decomposition_of_peft_s_loftq():
    from peft.utils.loftq_utils import _low_rank_decomposition

    error, _ = random_problem(12, 9, 1)
    error[:, 0] *= 5  # a spectrum with gaps, so that the leading directions are one answer
    up, down = compute_correction(error, None, 4)
    theirs = _low_rank_decomposition(error, 4)
    torch.testing.assert_close(up @ down, theirs["L"] @ theirs["R"])


def test_full_rank_gives_back_the_whole_error_and_what_exceeds_it_is_zero():
    error, inputs = random_problem(6, 5, 20)
    up, down = compute_correction(error, inputs, 8)
    assert up.shape == (6, 8) and down.shape == (8, 5)
    torch.testing.assert_close(up @ down, error)
    assert not up[:, 5:].any() and not down[5:].any()
    for factor in compute_correction(torch.zeros(6, 5), inputs.float(), 2):
        assert not factor.any()  # nothing to correct, and no division by it


@pytest.fixture(scope="module")
def transfer_set(tiny_model_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("init") / "set"
    return capture_set(tiny_model_path, PROMPTS, path, max_new_tokens=12)


def build(tiny_model_path, transfer_set, tmp_path, model=None, **options):
    options = {"model_init_kwargs": {"dtype": "float32"}, "save_strategy": "no", "disable_tqdm": True, **options}
    kwargs = {name: options.pop(name) for name in ("peft_config", "processing_class") if name in options}
    args = QuantizedDistillationConfig(str(tmp_path / "out"), **options)
    return QuantizedDistillationTrainer(
        model or str(tiny_model_path), args, train_dataset=transfer_set, eval_dataset=transfer_set, **kwargs
    )


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def products(model):
    """B A times its scale, of every adapter."""
    return {
        name: module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


def test_covariance_is_nearer_to_the_teacher_than_loftq_and_zero(tiny_model_path, transfer_set, tmp_path):
    zero, loftq, covariance = (
        build(tiny_model_path, transfer_set, tmp_path, init=init).evaluate()["eval_kl"]
        for init in ("zero", "loftq", "covariance")
    )
    assert covariance < loftq < zero and covariance < 0.5 * zero


def test_it_is_the_same_every_time_and_draws_nothing_from_the_generators(tiny_model_path, transfer_set, tmp_path):
    first = adapters(build(tiny_model_path, transfer_set, tmp_path).model)
    torch.manual_seed(7)
    second = adapters(build(tiny_model_path, transfer_set, tmp_path).model)
    assert all(torch.equal(value, second[name]) and value.any() for name, value in first.items())
    model = attach_lora(load_student(str(tiny_model_path), dtype="float32")).train()
    state = torch.get_rng_state()
    initialize_from_error(model, OriginalWeights(str(tiny_model_path), model.get_base_model()), torch.ones(1, 3).long())
    assert torch.equal(state, torch.get_rng_state()) and model.training


def rounded(tiny_model):
    """The tiny model with every linear weight of its layers rounded to eighths: a quantized model without a library."""
    for layer in tiny_model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = (layer.weight.data * 8).round() / 8
    return attach_lora(tiny_model, LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", use_rslora=True))


def test_each_layer_is_corrected_for_the_inputs_that_the_corrected_layers_before_it_give(tiny_model, tiny_model_path):
    """Layer by layer against a reference that runs the model anew for each layer, up to that layer's inputs."""
    model = rounded(tiny_model)
    weights = OriginalWeights(str(tiny_model_path), model.get_base_model())
    ids = torch.arange(60).view(4, 15)
    assert initialize_from_error(model, weights, ids, progress=False) == 14
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


def test_rows_of_padding_do_not_count(tiny_model, tiny_model_path, transfer_set):
    model = rounded(tiny_model)
    weights = OriginalWeights(str(tiny_model_path), model.get_base_model())
    ids, mask = draw_rows(transfer_set, 4, 0)
    initialize_from_error(model, weights, ids, mask)
    plain = products(model)
    for parameter in (p for name, p in model.named_parameters() if "lora_B" in name):
        parameter.data.zero_()
    wide = nn.functional.pad(ids, (0, 30)), nn.functional.pad(mask, (0, 30))
    initialize_from_error(model, weights, *wide)
    for name, product in products(model).items():
        torch.testing.assert_close(product, plain[name], rtol=1e-3, atol=1e-4)


def test_rows_are_drawn_until_the_padded_batch_is_full():
    dataset = [{"input_ids": list(range(1, length + 1))} for length in (5, 3, 9, 40_000)]
    ids, mask = draw_rows(dataset[:3], 8, seed=0)
    assert ids.shape == (3, 9) and sorted(mask.sum(1).tolist()) == [3, 5, 9]
    assert (ids[mask == 0] == 0).all() and (ids[mask == 1] > 0).all()
    assert draw_rows(dataset[:3], 2, seed=0)[0].shape[0] == 2
    assert draw_rows(dataset[3:], 8, seed=0)[0].shape == (1, 16384)
    assert draw_rows([dataset[3]] * 5, 5, seed=0)[0].numel() <= 16384


def test_what_is_saved_is_a_plain_adapter_and_a_resumed_run_keeps_it(
    tiny_model_path, transfer_set, tmp_path, monkeypatch
):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "seed": 3}
    trainer = build(tiny_model_path, transfer_set, tmp_path, **options)
    trainer.train()
    trained = adapters(trainer.model)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    loaded = PeftModel.from_pretrained(load_student(str(tiny_model_path), dtype="float32"), checkpoint)
    assert loaded.peft_config["default"].init_lora_weights is True
    for name, value in adapters(loaded).items():
        torch.testing.assert_close(value, trained[name], msg=name)

    def refuse(*args, **kwargs):
        raise AssertionError("a resumed run computed a start")

    monkeypatch.setattr("quantkd.training.preparation.initialize_from_rows", refuse)
    options |= {"resume_from_checkpoint": str(checkpoint)}
    resumed = build(tiny_model_path, transfer_set, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))  # one step of one: nothing is left to train
    for name, value in adapters(resumed.model).items():
        torch.testing.assert_close(value, trained[name], msg=name)


def test_a_start_that_peft_s_config_asks_for_is_left_alone(tiny_model_path, transfer_set, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    model = build(tiny_model_path, transfer_set, tmp_path, peft_config=config).model
    assert all(not value.any() for name, value in adapters(model).items() if "lora_B" in name)


def test_what_cannot_be_done_starts_from_zero_and_says_so(
    tiny_model_path, tiny_tokenizer, transfer_set, tmp_path, caplog
):
    student = load_student(str(tiny_model_path), dtype="float32")
    student.config.name_or_path = str(tmp_path)
    trainer = build(tiny_model_path, transfer_set, tmp_path, student, processing_class=tiny_tokenizer)
    assert "start from zero" in caplog.text and "no safetensors weights" in caplog.text
    assert all(not value.any() for name, value in adapters(trainer.model).items() if "lora_B" in name)
    with pytest.raises(ConfigError, match="init is 'best'; expected one of covariance, loftq, zero"):
        QuantizedDistillationConfig(str(tmp_path), init="best")


def test_the_original_weights_may_lie_elsewhere(tiny_model_path, tiny_tokenizer, transfer_set, tmp_path):
    student = load_student(str(tiny_model_path), dtype="float32")
    student.config.name_or_path = str(tmp_path)
    options = {"init_from": str(tiny_model_path), "processing_class": tiny_tokenizer}
    found = adapters(build(tiny_model_path, transfer_set, tmp_path, student, **options).model)
    expected = adapters(build(tiny_model_path, transfer_set, tmp_path).model)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
