"""Ranks by a budget of bytes: where they take most off the loss, within the budget, as plain PEFT reads them."""

from functools import partial
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm

from quantkd.errors import ConfigError
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.models.curvature import measure_costs
from quantkd.models.initialization import OUTPUT_SHRINKAGE, SHRINKAGE, find_directions
from quantkd.models.layer_inputs import draw_rows, visit_layers
from quantkd.models.original_weights import OriginalWeights, read_original
from quantkd.models.ranks import with_ranks
from quantkd.models.stored_weights import compute_size
from quantkd.models.student import default_lora_config, load_student
from quantkd.models.weights import dequantize_weight
from tests.conftest import refused


@pytest.fixture
def build(make_trainer, training_set):
    options = {"init": "covariance", "adapter_budget": 0.3, "peft_config": default_lora_config(8)}
    return partial(make_trainer, eval_dataset=training_set, **options)


def ranks_of(model):
    return model.peft_config["default"].rank_pattern


def test_values_are_what_the_directions_take_off_the_error():
    generator = torch.Generator().manual_seed(0)
    error, inputs, gradients = (
        torch.randn(*shape, generator=generator).double() for shape in ((9, 7), (50, 7), (30, 9))
    )
    cost, moment = gradients.T @ gradients, inputs.T @ inputs / 50
    moment += 1e-2 * moment.diagonal().mean() * torch.eye(7)
    roots = torch.linalg.cholesky(cost).T, torch.linalg.cholesky(moment)
    expected = torch.linalg.svdvals(roots[0] @ error @ roots[1]).square()
    torch.testing.assert_close(find_directions(error, inputs, 5, costs=[cost])[0], expected[:5])


def test_the_budget_is_spent_where_it_takes_most_off_the_loss(build, training_set, tiny_model_path, tmp_path):
    trainer = build()
    model, ranks = trainer.model, ranks_of(trainer.model)
    size = compute_size(model)
    adapted = {name: each for name, each in model.get_base_model().named_modules() if hasattr(each, "lora_A")}
    assert ranks.keys() == adapted.keys() and len(set(ranks.values())) > 1
    assert {each.scaling["default"] for each in adapted.values()} == {2.0}
    prices = {name: 2 * (each.in_features + each.out_features) for name, each in adapted.items()}
    budget = 0.3 * (size.codes + size.constants)
    assert budget - max(prices.values()) < sum(ranks[name] * prices[name] for name in ranks) <= budget
    # No rank that was left out takes more off the loss, for its bytes, than one that was given.
    name = model.get_base_model().config.name_or_path
    student, rows = load_student(name, dtype="float32"), draw_rows(training_set, 64, 0)
    layers = {layer: name for name, layer in student.named_modules() if name in ranks}
    costs = measure_costs(student, layers, rows, tqdm(disable=True))
    weights, gains = OriginalWeights(str(tiny_model_path), student), {}

    def visit(layer, inputs):
        error = read_original(weights, layers[layer], layer).double() - dequantize_weight(layer).double()
        (cost,), inputs = costs[layer].outputs, inputs.double()
        cost = cost.double() + OUTPUT_SHRINKAGE * cost.diagonal().mean() * torch.eye(len(cost))
        moment = inputs.T @ inputs / len(inputs)
        moment += SHRINKAGE * moment.diagonal().mean() * torch.eye(len(moment))
        values = torch.linalg.svdvals(torch.linalg.cholesky(cost).T @ error @ torch.linalg.cholesky(moment)).square()
        gains[layers[layer]] = torch.cat([values, torch.zeros(1)]) / prices[layers[layer]]

    visit_layers(student, layers, visit, rows, tqdm(disable=True))
    given = min(gains[name][rank - 1] for name, rank in ranks.items() if rank > 1)
    assert given >= 0.999 * max(gains[name][rank] for name, rank in ranks.items() if rank < len(gains[name]))
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(student, tmp_path / "saved")
    found, expected = (evaluate_fidelity(each, training_set).means["kl"] for each in (loaded, model))
    assert found == pytest.approx(expected, rel=1e-2)


def test_a_resumed_run_keeps_its_ranks(build, tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "peft_config": default_lora_config(8)}
    trainer = build(**options)
    trainer.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    monkeypatch.setattr("quantkd.training.preparation.allot_ranks", Mock(side_effect=AssertionError("measured anew")))
    resumed = build(**options, resume_from_checkpoint=checkpoint)
    assert ranks_of(resumed.model) == ranks_of(trainer.model)
    resumed.train(resume_from_checkpoint=checkpoint)
    other = partial(build, adapter_budget=0.9)
    refused(ConfigError, "had 0.3. Resume with that", other, **options, resume_from_checkpoint=checkpoint)
    refused(
        ConfigError, "have rank_pattern", build(**options, adapter_budget=None).train, resume_from_checkpoint=checkpoint
    )


def test_rslora_keeps_its_scale():
    config = with_ranks(LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear"), {"a": 9})
    assert config.alpha_pattern["a"] / 9**0.5 == pytest.approx(8 / 4**0.5)


@pytest.mark.parametrize(("options", "message"), [
    ({"adapter_budget": 0.001}, "rank 1 in each of"), ({"adapter_budget": -1.0}, "expected a share above 0"),
    ({"adapter_budget": float("nan")}, "expected a share above 0"), ({"init": "loftq"}, "no effect without init"),
    ({"adapter_budget": True}, "expected a share above 0"), ({"peft_config": LoraConfig(r=8)}, "needs target_modules"),
    *(({"peft_config": LoraConfig(target_modules="all-linear", **field)}, "adapter_budget decides the ranks")
      for field in ({"exclude_modules": ["q_proj"]}, {"rank_pattern": {"q_proj": 2}})),
    ({"peft_config": LoraConfig(target_modules=["q_proj", "lm_head"])}, "lm_head is not quantized"),
    ({"peft_config": LoraConfig(use_dora=True, target_modules="all-linear")}, "not plain LoRA"),
])  # fmt: skip
def test_what_has_no_budget_is_refused(build, options, message):
    refused(ConfigError, message, build, **options)


def test_models_that_have_adapters_or_full_precision_are_refused(
    build, tiny_model, tiny_model_path, tiny_tokenizer, tmp_path
):
    build = partial(build, processing_class=tiny_tokenizer)
    refused(ConfigError, "a model that is not quantized", build, model=tiny_model)
    adapted = get_peft_model(load_student(str(tiny_model_path)), default_lora_config(2))
    refused(ConfigError, "a model with adapters", build, model=adapted, peft_config=None)
    tiny_model.config.save_pretrained(tmp_path / "nowhere")  # without weights
    missing = {"init_from": str(tmp_path / "nowhere"), "model": load_student(str(tiny_model_path))}
    refused(ConfigError, "adapter_budget cannot be allotted: .*nowhere", build, **missing)
