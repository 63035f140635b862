"""Weights of joined sets: loss and gradient of a row's targets times its weight, in both paths; evaluation without."""

import pytest
import torch

from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.collator import DistillationCollator
from tests.conftest import loss_and_gradient


@pytest.fixture
def sets(training_set):
    return [training_set[:2], training_set[2:4]]


@pytest.fixture
def make_weighted(make_trainer):
    def build(rows, **options):
        trainer = make_trainer(train_dataset=rows, temperature=2.0, alpha=0.7, **options)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zero at first, where A gets no gradient
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        return trainer

    return build


@pytest.mark.parametrize("packing", [False, True])
def test_the_batch_holds_one_weight_a_target_only_where_a_row_has_one(sets, packing):
    collator = DistillationCollator(0, packing=packing)
    joined = TransferSet.concatenate(sets, weights=[0.5, 2.0])
    targets = [int((row["labels"] != -100).sum()) for row in joined]
    expected = torch.repeat_interleave(torch.tensor([0.5, 0.5, 2.0, 2.0]), torch.tensor(targets))
    for rows in (joined.__getitems__([0, 1, 2, 3]), [joined[index] for index in range(4)]):
        torch.testing.assert_close(collator(rows)["weights"], expected)
    assert "weights" not in collator(TransferSet.concatenate(sets).__getitems__([0, 3]))
    assert "weights" not in collator([sets[0][0], sets[1][0]])
    mixed = collator([sets[0][0], joined[2]])["weights"]
    assert mixed.tolist() == [1.0] * targets[0] + [2.0] * targets[2]


@pytest.mark.parametrize("kwargs", [{}, {"use_fused_loss": False}, {"packing": True}])
def test_the_trainer_multiplies_loss_and_gradient_and_divides_by_the_number_of_targets(sets, make_weighted, kwargs):
    joined = TransferSet.concatenate(sets, weights=[0.5, 2.0])
    trainer = make_weighted(joined, **kwargs)
    weighted = loss_and_gradient(trainer, joined.__getitems__([0, 1, 2, 3]), train=False)
    parts = [loss_and_gradient(trainer, each.__getitems__([0, 1]), train=False) for each in sets]
    counts = [sum(int((row["labels"] != -100).sum()) for row in each) for each in sets]
    for whole, one, two in zip(weighted, *parts, strict=True):
        expected = (0.5 * counts[0] * one + 2.0 * counts[1] * two) / sum(counts)
        torch.testing.assert_close(torch.as_tensor(whole), torch.as_tensor(expected), rtol=2e-5, atol=1e-6)
    assert abs(float(parts[0][0] - parts[1][0])) > 1e-3  # else the weights could not be told apart


def test_evaluation_ignores_weights(sets, make_weighted):
    joined = TransferSet.concatenate(sets, weights=[0.5, 2.0])
    trainer = make_weighted(joined)
    weighted, plain = trainer.evaluate(joined), trainer.evaluate(TransferSet.concatenate(sets))
    names = [name for name in plain if not name.endswith(("runtime", "per_second"))]
    assert {name: weighted[name] for name in names} == {name: plain[name] for name in names}
