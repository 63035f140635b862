"""Weights of joined sets: loss and gradient of a row's targets times its weight, in both paths; evaluation without."""

from __future__ import annotations

import pytest
import torch

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, capture
from quantkd.errors import ConfigError
from quantkd.loss.fused import DenseTeacher, compute_fused_loss
from quantkd.loss.objective import compute_terms
from quantkd.loss.reference import compute_position_terms
from quantkd.models.network import Head
from quantkd.transfer_set import concatenate
from quantkd.transfer_set.collator import DistillationCollator
from quantkd.transfer_set.rules import Nucleus, select_entries
from quantkd.transfer_set.topk import TopKLogprobs

PROMPTS = ["Two and two?", "Name a colour, and then another one.", "How many legs?", "Why?"]
OBJECTIVE = {"alpha": 0.7, "temperature": 2.0, "divergence": "forward_kl", "beta": 0.5}


@pytest.fixture(scope="module")
def sets(tiny_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return [
        capture(str(tiny_model_path), prompts, folder / name, max_new_tokens=8, dtype="float32", progress=False)
        for name, prompts in (("one", PROMPTS[:2]), ("two", PROMPTS[2:]))
    ]


@pytest.fixture
def make_trainer(tiny_model_path, tmp_path):
    def build(rows, **kwargs):
        args = QuantizedDistillationConfig(
            str(tmp_path / "out"), per_device_train_batch_size=4, init="zero", report_to=[], disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"}, temperature=2.0, alpha=0.7, **kwargs,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = QuantizedDistillationTrainer(str(tiny_model_path), args, train_dataset=rows)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zero at first, where A gets no gradient
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        return trainer

    return build


def make(positions=9, vocab=31):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, head, teacher = (
        normal(positions, 8),
        Head(normal(vocab, 8), normal(vocab), 0.5, 2.0),
        normal(positions, vocab),
    )
    labels = torch.randint(vocab, (positions,), generator=generator)
    weights = torch.rand(positions, generator=generator, dtype=torch.float64) * 3
    entries = select_entries(teacher, Nucleus(0.8, 20), (1.0, 2.0))
    return hidden, head, labels, TopKLogprobs(**{**vars(entries), "logprobs": entries.logprobs.double()}), weights


@pytest.mark.parametrize("chunk_rows", [1, 4, None])
def test_fused_loss_and_every_gradient_are_those_of_the_weighted_reference(chunk_rows):
    hidden, head, labels, entries, weights = make()
    leaves = [tensor.requires_grad_() for tensor in (hidden, head.weight, head.bias)]
    terms = compute_position_terms(head.logits(hidden), labels, entries, temperature=2.0)
    expected = sum(float(w) * (0.3 * terms.ce[i] + 0.7 * 4 * terms.kl[i]) for i, w in enumerate(weights))
    fused = compute_fused_loss(hidden, head, labels, entries, weights=weights, chunk_rows=chunk_rows, **OBJECTIVE)
    torch.testing.assert_close(fused.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fused.ce, terms.ce.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fused.kl, terms.kl.detach(), rtol=1e-9, atol=1e-12)
    grads = zip(torch.autograd.grad(fused.loss, leaves), torch.autograd.grad(expected, leaves), strict=True)
    for ours, theirs in grads:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_the_path_over_logits_and_a_dense_teacher_weigh_alike():
    hidden, head, labels, entries, weights = make()
    hidden.requires_grad_()
    fused = compute_terms(hidden, labels, entries, head, weights=weights, **OBJECTIVE)
    logits = compute_terms(head.logits(hidden), labels, entries, None, weights=weights, **OBJECTIVE)
    torch.testing.assert_close(fused.loss, logits.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fused.kl, logits.kl, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(terms.loss, hidden)[0] for terms in (fused, logits)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)
    teacher = DenseTeacher(torch.randn(9, 4, dtype=torch.float64), Head(torch.randn(31, 4, dtype=torch.float64)))
    dense = compute_fused_loss(hidden, head, labels, teacher, weights=weights, **OBJECTIVE)
    alone = []
    for place in range(9):
        one = slice(place, place + 1)
        own = teacher.select(torch.tensor([place]))
        alone.append(compute_fused_loss(hidden[one], head, labels[one], own, **OBJECTIVE))
    torch.testing.assert_close(dense.loss, sum(w * part.loss for w, part in zip(weights, alone, strict=True)))


def test_weights_of_another_length_are_refused():
    hidden, head, labels, entries, weights = make()
    with pytest.raises(ConfigError, match=r"one weight for each of 9 target positions, found the shape \(8,\)"):
        compute_fused_loss(hidden, head, labels, entries, weights=weights[1:])
    with pytest.raises(ConfigError, match="one weight for each of 9"):
        compute_terms(head.logits(hidden), labels, entries, None, weights=weights[1:], **OBJECTIVE)


@pytest.mark.parametrize("packing", [False, True])
def test_the_batch_holds_one_weight_a_target_only_where_a_row_has_one(sets, packing):
    collator = DistillationCollator(0, packing=packing)
    joined = concatenate(sets, weights=[0.5, 2.0])
    targets = [int((row["labels"] != -100).sum()) for row in joined]
    expected = torch.repeat_interleave(torch.tensor([0.5, 0.5, 2.0, 2.0]), torch.tensor(targets))
    for rows in (joined.__getitems__([0, 1, 2, 3]), [joined[index] for index in range(4)]):
        torch.testing.assert_close(collator(rows)["weights"], expected)
    assert "weights" not in collator(concatenate(sets).__getitems__([0, 3]))
    assert "weights" not in collator([sets[0][0], sets[1][0]])
    mixed = collator([sets[0][0], joined[2]])["weights"]
    assert mixed.tolist() == [1.0] * targets[0] + [2.0] * targets[2]


def loss_and_gradient(trainer, rows):
    trainer.model.zero_grad()
    trainer.model.eval()  # dropout off; weights count whatever the mode
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kwargs", [{}, {"use_fused_loss": False}, {"packing": True}])
def test_the_trainer_multiplies_loss_and_gradient_and_divides_by_the_number_of_targets(sets, make_trainer, kwargs):
    joined = concatenate(sets, weights=[0.5, 2.0])
    trainer = make_trainer(joined, **kwargs)
    weighted = loss_and_gradient(trainer, joined.__getitems__([0, 1, 2, 3]))
    parts = [loss_and_gradient(trainer, each.__getitems__([0, 1])) for each in sets]
    counts = [sum(int((row["labels"] != -100).sum()) for row in each) for each in sets]
    for whole, one, two in zip(weighted, *parts, strict=True):
        expected = (0.5 * counts[0] * one + 2.0 * counts[1] * two) / sum(counts)
        torch.testing.assert_close(whole, expected, rtol=2e-5, atol=1e-6)
    assert abs(float(parts[0][0] - parts[1][0])) > 1e-3  # else the weights could not be told apart


def test_evaluation_ignores_weights(sets, make_trainer):
    joined = concatenate(sets, weights=[0.5, 2.0])
    trainer = make_trainer(joined)
    weighted, plain = trainer.evaluate(joined), trainer.evaluate(concatenate(sets))
    names = [name for name in plain if not name.endswith(("runtime", "per_second"))]
    assert {name: weighted[name] for name in names} == {name: plain[name] for name in names}
