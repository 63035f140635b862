"""How rows make batches: packed, weighted, in groups of like length; loss and gradient do not depend on it."""

import math
from itertools import pairwise
from unittest.mock import Mock

import pytest
import torch
from families import build
from hypothesis import given, settings, strategies as st
from pretended_device import move, pretended_device
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, BloomConfig, TrainerCallback

from quantkd.errors import ConfigError, DataError
from quantkd.foreign import attention_of
from quantkd.models.packing import ROW_ATTENTION, row_attention, why_not_packable
from quantkd.training.order import LengthGroupedBatches, row_lengths
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.batch import DistillationCollator, position_ids_of
from tests.conftest import loss_and_gradient, refused, relative

sets = pytest.fixture(lambda training_set: [training_set[:2], training_set[2:4]])


@pytest.mark.parametrize("fused", [True, False])
def test_packing_changes_nothing_but_the_layout(make_trainer, training_set, fused):
    rows = training_set.__getitems__([0, 1, 2, 3, 4])
    padded, packed = make_trainer(use_fused_loss=fused), make_trainer(use_fused_loss=fused, packing=True)
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in (padded, packed)]
    assert batches[0]["input_ids"].shape == (8, int(training_set.lengths.max()))
    assert batches[1]["input_ids"].shape == (1, int(training_set.lengths.sum())) and "attention_mask" not in batches[1]
    expected, gradient = loss_and_gradient(padded, rows)
    loss, packed_gradient = loss_and_gradient(packed, rows)
    assert math.isclose(loss, expected, rel_tol=1e-5) and relative(packed_gradient, gradient) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_by_row_equals_one_masked_attention(make_trainer, training_set, checkpointing):
    rows = training_set.__getitems__([0, 1, 2, 3, 4])
    trainer = make_trainer(packing=True, gradient_checkpointing=checkpointing)
    with row_attention(trainer.model):
        assert attention_of(trainer.model.config) == ROW_ATTENTION
        loss, gradient = loss_and_gradient(trainer, rows)
    assert attention_of(trainer.model.config) == "sdpa"
    expected, masked_gradient = loss_and_gradient(trainer, rows)
    assert math.isclose(loss, expected, rel_tol=1e-5) and relative(gradient, masked_gradient) < 1e-5


@pytest.mark.parametrize("found, expected", [((8, 0), True), ((7, 5), False), (None, False)])
def test_a_gpu_that_has_flash_attention_uses_it_for_a_loaded_student_too(found, expected, monkeypatch):
    asked = []
    monkeypatch.setattr("quantkd.models.packing.is_flash_attn_2_available", lambda: found is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    model = build("Qwen2", 64, attention="sdpa").bfloat16()
    model.config.dtype = torch.bfloat16
    model.set_attn_implementation = asked.append
    with pretended_device(), row_attention(move(model)):
        assert asked == ["flash_attention_2"] * expected
    assert asked == ["flash_attention_2", "sdpa"] * expected


def test_attention_by_row_ends_with_the_training(make_trainer):
    """It is registered in transformers' global tables, which outlive every model."""
    names, seen = [], TrainerCallback()
    seen.on_step_end = lambda *args, model, **kwargs: names.append(attention_of(model.config))
    seen.on_train_end = Mock(side_effect=KeyboardInterrupt)
    trainer = make_trainer(packing=True, max_steps=1, callbacks=[seen])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert names == [ROW_ATTENTION] and attention_of(trainer.model.config) == "sdpa"
    assert ROW_ATTENTION not in AttentionInterface() and ROW_ATTENTION not in AttentionMaskInterface()


def test_sliding_windows_and_unpacked_batches_keep_their_mask():
    model = build("Mistral", 64, attention="sdpa", sliding_window=3)
    padded = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3])}
    packed = {"input_ids": torch.arange(12)[None], "position_ids": position_ids_of(torch.tensor([7, 5]))[None]}
    with torch.no_grad():
        expected = [model(**batch, use_cache=False).logits for batch in (padded, packed)]
        with row_attention(model):
            for batch, logits in zip((padded, packed), expected, strict=True):
                torch.testing.assert_close(model(**batch, use_cache=False).logits, logits)


def test_a_packed_run_trains_and_evaluates_like_a_padded_one(make_trainer, training_set):
    logs, metrics = [], []
    for packing in (False, True):
        options = {"max_steps": 3, "per_device_train_batch_size": 2, "eval_dataset": training_set[:5]}
        trainer = make_trainer(packing=packing, **options)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        metrics.append([trainer.evaluate()[name] for name in ("eval_kl", "eval_ce", "eval_top1_agreement")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    # Some CPUs evaluate 4-bit layers in bfloat16, which enlarges the last bit of difference in the adapters.
    assert metrics[0] == pytest.approx(metrics[1], rel=2e-3)


def test_a_rows_first_token_is_never_the_target_of_the_row_before(training_set):
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    batch = DistillationCollator(0, packing=True)(rows)
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]] and batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]] and "teacher" not in batch
    assert position_ids_of(torch.tensor([1, 1, 2])).tolist() == [0, 0, 0, 1]
    refused(DataError, "1 of 2 rows hold no teacher entries", DistillationCollator(0), [training_set[0], rows[0]])


@pytest.mark.parametrize("family", ["Qwen2", "Mistral", "GPT-2", "Bloom", "Mamba"])
def test_models_that_mix_packed_rows_are_found(family):
    options = {"sliding_window": 3} if family == "Mistral" else {}
    reason = why_not_packable(build(family, 64, attention=None, **options))
    assert (reason is None) == (family not in ("Bloom", "Mamba")), reason


def test_what_cannot_be_packed_is_refused_before_the_first_step(make_trainer, tiny_tokenizer):
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=len(tiny_tokenizer))
    model = AutoModelForCausalLM.from_config(config)  # of small weights: that a row changes at all must be enough
    with pytest.raises(ConfigError, match=r"packing=True would let rows see each other.*group_by_length"):
        make_trainer(model, packing=True, processing_class=tiny_tokenizer)
    with pytest.raises(ConfigError, match="packs with a DistillationCollator, found the data_collator function"):
        make_trainer(packing=True, data_collator=lambda rows: rows)


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


def order_of(lengths, group, seed, epoch=0):
    sampler = LengthGroupedBatches(lengths, group, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert order == list(sampler) and len(sampler) == len(lengths)
    return order


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 5))
def test_every_row_comes_once_and_the_longest_first(lengths, group, epoch):
    order = order_of(lengths, group, 3, epoch)
    assert sorted(order) == list(range(len(lengths))) and lengths[order[0]] == max(lengths)


def test_epochs_and_seeds_differ_and_batches_hold_little_padding():
    lengths = [(37 * i) % 301 + 20 for i in range(400)]
    order, *others = (order_of(lengths, 8, seed, epoch) for seed in (0, 1) for epoch in (0, 1))
    assert len({tuple(each) for each in (order, *others)}) >= 3 and order_of(lengths, 8, 0, 1) == others[0]
    batches = [order[i : i + 8] for i in range(0, 400, 8)]
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert sum(lengths) / padded > 0.9
    starts = [max(lengths[row] for row in batch) for batch in batches[1:-1]]
    assert sum(a > b for a, b in pairwise(starts)) < 0.8 * len(starts)  # not sorted any more
    assert row_lengths([{"input_ids": [1, 2, 3]}, {"input_ids": [1]}]) == [3, 1] and row_lengths(iter([])) is None
