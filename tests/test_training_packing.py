"""Packed rows: the same loss and gradient as padded ones, and models that would mix rows are refused."""

import math

import pytest
import torch
from families import build
from pretended_device import move, pretended_device
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, BloomConfig, TrainerCallback

from quantkd.errors import ConfigError, DataError
from quantkd.foreign import attention_of
from quantkd.models.packing import why_not_packable
from quantkd.models.row_attention import ROW_ATTENTION, row_attention
from quantkd.transfer_set.collator import DistillationCollator, position_ids_of
from tests.conftest import loss_and_gradient, relative


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
    monkeypatch.setattr("quantkd.models.row_attention.is_flash_attn_2_available", lambda: found is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    model = build("Qwen2", 64, attention="sdpa").bfloat16()
    model.config.dtype = torch.bfloat16
    model.set_attn_implementation = asked.append
    with pretended_device(), row_attention(move(model)):
        assert asked == ["flash_attention_2"] * expected
    assert asked == ["flash_attention_2", "sdpa"] * expected


def test_attention_by_row_ends_with_the_training(make_trainer):
    """It is registered in transformers' global tables, which outlive every model."""

    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            names.append(attention_of(model.config))

        def on_train_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    names = []
    trainer = make_trainer(packing=True, max_steps=1, callbacks=[Seen()])
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
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]] and "teacher" not in batch
    assert position_ids_of(torch.tensor([1, 1, 2])).tolist() == [0, 0, 0, 1]
    with pytest.raises(DataError, match="1 of 2 rows hold no teacher entries"):
        DistillationCollator(0)([training_set[0], rows[0]])


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
