"""teacher_model=: dense KL to a model that runs beside the student, equal to a set that stores every class."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from quantkd.errors import ConfigError, DataError
from quantkd.loss.reference import compute_distillation_loss
from quantkd.models.student import load_student
from quantkd.transfer_set.topk import TopKLogprobs
from tests.conftest import build_tiny_model, loss_and_gradient, refused, relative


@pytest.fixture
def rows(training_set):
    rows = [training_set[i] for i in range(3)]
    return Dataset.from_list([{"input_ids": r["input_ids"].tolist(), "labels": r["labels"].tolist()} for r in rows])


@pytest.fixture
def make_live(make_trainer, rows, tiny_model_path):
    def build(**options):
        return make_trainer(**{"train_dataset": rows, "teacher_model": str(tiny_model_path), **options})

    return build


def dense_loss(student, teacher, rows, temperature, **objective):
    """Row by row in float64, with every class stored; test_loss_reference holds that loss against plain arithmetic."""
    total, tokens = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor(row[name])[None] for name in ("input_ids", "labels"))
        places = (labels[0] != -100).nonzero().squeeze(1)
        stored = TopKLogprobs.from_dense(teacher(ids).logits[0, places - 1].double().detach(), (temperature,))
        how = {"temperature": temperature, "num_items": 1, **objective}
        total += compute_distillation_loss(student(ids).logits.double(), labels, stored, **how)
        tokens += len(places)
    return total / tokens


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("divergence", "temperature"), [("forward_kl", 2.0), ("reverse_kl", 1.0), ("jsd", 2.0)])
def test_equal_to_dense_kl(make_live, rows, tiny_model, divergence, temperature, fused):
    objective = {"alpha": 0.7, "temperature": temperature, "divergence": divergence}
    trainer = make_live(use_fused_loss=fused, packing=True, **objective)
    expected = dense_loss(trainer.model.train(), tiny_model, rows, **objective)
    expected.backward()
    own = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
    for packing in (True, False):
        trainer.args.packing = packing
        live, gradient = loss_and_gradient(trainer, list(rows))
        assert math.isclose(live, expected.item(), rel_tol=1e-5) and relative(gradient, own) < 1e-5
    assert not any(p.requires_grad or p.grad is not None for p in trainer.live_teacher.model.parameters())


def test_it_starts_from_the_error_trains_and_evaluates(make_live, rows, training_set):
    zero = make_live(eval_dataset=rows).evaluate()
    trainer = make_live(eval_dataset=rows, init="covariance", max_steps=8, alpha=1.0, learning_rate=1e-3)
    start = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < start["eval_kl"] < zero["eval_kl"]
    stored = make_live(eval_dataset=training_set[:3]).evaluate()
    assert stored["eval_kl"] == pytest.approx(zero["eval_kl"], rel=1e-6)  # entries are not read
    step = {"train_sampling_strategy": "sequential", "max_steps": 1}  # accelerate cuts the others into batches
    one, other = (make_live(train_dataset=each, **step).train() for each in (rows, rows.to_iterable_dataset()))
    assert other.training_loss == pytest.approx(one.training_loss, rel=1e-6)


def test_what_cannot_teach_is_refused(
    make_live, make_trainer, rows, tiny_model_path, tiny_model, tmp_path, monkeypatch
):
    LoraConfig(base_model_name_or_path=str(tiny_model_path)).save_pretrained(str(tmp_path))
    tiny_model.resize_token_embeddings(tiny_model.vocab_size + 8)
    for teacher, message in (
        ("adapter_disabled", "is the 4-bit model itself"),
        (str(tmp_path), "holds an adapter and no model"),  # transformers would load the base model that it names
        (load_student(str(tiny_model_path), dtype="float32"), "teacher_model is quantized"),
        (tiny_model, r"vocabulary has \d+ ids, the teacher_model's"),
    ):
        refused(ConfigError, message, make_live, teacher_model=teacher)
    refused(DataError, r"holds no teacher entries.*teacher_model=", make_trainer(train_dataset=rows).train)
    monkeypatch.setattr("quantkd.teacher.live.is_zero3", lambda: True)
    refused(ConfigError, "cannot run beside a student under DeepSpeed ZeRO-3", make_live)


def test_a_teacher_that_cannot_be_fused_gives_its_logits(make_live, rows, tiny_tokenizer, caplog):
    plain = loss_and_gradient(make_live(teacher_model=build_tiny_model(tiny_tokenizer)), list(rows))
    teacher = build_tiny_model(tiny_tokenizer)
    forward = teacher.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits + 1.0  # the same distribution, but not what the head says
        return output

    teacher.forward = shifted
    held = loss_and_gradient(make_live(teacher_model=teacher), list(rows))
    assert "The teacher's logits are held" in caplog.text and held[0] == pytest.approx(plain[0], rel=1e-5)
    torch.testing.assert_close(held[1], plain[1], rtol=1e-4, atol=1e-6)
