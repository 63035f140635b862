"""Arguments that transformers' Trainer would pass over, or trip over deep inside: honoured, or refused in one line."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from quantkd import QuantizedDistillationConfig
from quantkd.errors import ConfigError, DataError
from quantkd.models.network import run_model, why_not_fusable
from quantkd.training.checkpoints import check_resumable, find_checkpoint
from tests.conftest import refused

RESUMED = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(("options", "said"), [
    ({"remove_unused_columns": True}, "remove_unused_columns is on, and would remove the teacher's entries"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1; the teacher's distribution takes the place"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; expected at least 1"),
    ({"weight_decay": math.nan}, "weight_decay is nan; expected at least 0"),
    ({"neftune_noise_alpha": -1.0}, "neftune_noise_alpha is -1.0; expected at least 0"),
    ({"accelerator_config": {"foo": 1}}, "An option cannot be read: .* unexpected keyword argument 'foo'"),
    ({"init": "zero", "init_from": "m"}, "init_from has no effect without init=covariance or init=loftq"),
    ({"init": "loftq", "init_rows": 4}, "init_rows has no effect without init=covariance"),
    ({"num_train_epochs": -1}, "Nothing would be trained: num_train_epochs is -1, max_steps -1"),
])  # fmt: skip
def test_refused_by_the_configuration(tmp_path, options, said):
    refused(ConfigError, said, QuantizedDistillationConfig, str(tmp_path), **options)


def test_dropping_the_last_batch_leaves_one_to_train_on_and_every_row_to_evaluate(make_trainer, training_set):
    trainer = make_trainer(dataloader_drop_last=True, per_device_train_batch_size=9)
    refused(ConfigError, r"No batch is left to train on: 8 rows, 9 per batch on each of 1 devices", trainer.train)
    options = {"per_device_eval_batch_size": 5, "eval_dataset": training_set}
    kept, dropped = (make_trainer(dataloader_drop_last=drop, **options).evaluate() for drop in (False, True))
    assert dropped["eval_kl"] == pytest.approx(kept["eval_kl"], rel=1e-5)


@pytest.mark.parametrize(("changed", "said"), [
    ({"input_ids": [5, -3, 7]}, "the token id -3; expected numbers from 0 on"), ({"weight": -3.0}, "the weight -3.0"),
    ({"labels": [-100, -1, 7]}, "the token id -1"), ({"input_ids": [5.5, 6.0, 7.0]}, "input_ids of float64"),
    ({"input_ids": [5, 6, 400]}, "the token id 400, None, and the model has ids up to 319"),
    ({"labels": [-100, 400, 7]}, "the token id 400, None, and the model has ids up to 319"),
    ({"labels": [-100, 7]}, r"labels of int64 \(2,\); expected whole numbers, at least one, and a label for each"),
    ({"labels": None}, "expected whole numbers"), ({"input_ids": [], "labels": []}, "at least one"),
    ({"weight": float("nan")}, "the weight nan; expected a finite number of at least 0"),
])  # fmt: skip
def test_rows_that_cannot_be_trained_on_are_refused(make_trainer, tiny_model_path, changed, said):
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    with pytest.raises(DataError, match=f"Row 1 has .*{said}"):
        make_trainer(train_dataset=[row, {**row, **changed}], teacher_model=str(tiny_model_path))


@pytest.mark.parametrize("metric", ["eval_kl", "ce", "perplexity", "top1_agreement"])
def test_the_best_checkpoint_is_the_one_nearest_to_the_teacher(make_trainer, training_set, metric):
    trainer = make_trainer(
        eval_dataset=training_set, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        max_steps=3, load_best_model_at_end=True, metric_for_best_model=metric, learning_rate=0.1,
    )  # fmt: skip
    trainer.train()
    name, best = "eval_" + metric.removeprefix("eval_"), max if metric == "top1_agreement" else min
    assert trainer.state.best_metric == best(entry[name] for entry in trainer.state.log_history if name in entry)


@pytest.mark.parametrize("scales", [False, True])
def test_the_start_can_be_the_best_checkpoint(make_trainer, training_set, tmp_path, caplog, scales):
    def trained(**options):
        trainer = make_trainer(
            eval_dataset=training_set, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
            metric_for_best_model="kl", eval_on_start=True, save_total_limit=1, max_steps=2, train_scales=scales,
            **options,
        )  # fmt: skip
        before = {name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad}
        trainer.train()
        own = dict(trainer.model.named_parameters())
        return trainer, [name for name, each in before.items() if not torch.equal(own[name], each)]

    rates = {"scales_learning_rate": 0.5} if scales else {}
    trainer, moved = trained(load_best_model_at_end=True, learning_rate=0.5, **rates)
    history = [entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry]
    assert len(history) == 3 and trainer.state.best_metric == history[0] < min(history[1:]) and not moved
    assert trainer.evaluate()["eval_kl"] == pytest.approx(history[0])
    folder = Path(trainer.args.output_dir)
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-0")
    assert not [*folder.rglob("training_args.bin")] and "raised the KL" not in caplog.text
    check_resumable(find_checkpoint("true", folder), trainer.model)
    _, moved = trained(load_best_model_at_end=False, learning_rate=0.5, **rates)
    assert moved and "Training raised the KL on the held-out rows from" in caplog.text
    trainer, moved = trained(load_best_model_at_end=True, learning_rate=1e-5)  # which lowers it
    assert moved and trainer.state.best_model_checkpoint != str(folder / "checkpoint-0")


def test_options_that_only_a_later_step_reads_are_one_line_too(make_trainer, training_set, tiny_model, tiny_tokenizer):
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs is .*unexpected keyword argument 'foo'"):
        make_trainer(lr_scheduler_type="cosine", lr_scheduler_kwargs={"foo": 1}).train()
    for message, options in (
        ("init_lora_weights is 'pissa', which PEFT does not", {"peft_config": lora(init_lora_weights="pissa")}),
        ("init_lora_weights is 'orthogonal'", {"peft_config": lora(init_lora_weights="orthogonal"), "calibrate": True}),
        ("lora_alpha is 0, with which adapters have no effect", {"peft_config": lora(lora_alpha=0)}),
        ("compute_loss_func would take the place of distillation's own loss", {"compute_loss_func": print}),
        ("metric_for_best_model is 'foo'; expected one of loss, kl, ce, perplexity, top1",
         {"eval_dataset": training_set, "metric_for_best_model": "foo"}),
        ("beta has no effect without divergence=jsd", {"beta": 0.3}),
        ("is for a teacher_model given by name", {"teacher_model_init_kwargs": {"dtype": "float32"}}),
        ("model_init_kwargs apply to a model given by name",
         {"model": tiny_model, "processing_class": tiny_tokenizer, "model_init_kwargs": {"dtype": "float32"}}),
    ):  # fmt: skip
        refused(ConfigError, message, make_trainer, **options)


def test_a_compiled_student_has_no_length(make_trainer, training_set):
    """`torch_compile` wraps the model in a module whose `len` raises, and so whose truth is not defined."""
    trainer = make_trainer()

    class Compiled(torch.nn.Module):
        def forward(self, **inputs):
            return trainer.model(**inputs)

        def __len__(self):
            raise TypeError("PeftModelForCausalLM does not support len()")

    batch = trainer.data_collator([training_set[0]])
    with run_model(trainer.model, batch, fused=True, forward=Compiled()) as (states, _):
        assert states.values.shape[-1] == 64
    assert why_not_fusable(trainer.model, Compiled()) is None


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def test_a_checkpoint_that_does_not_fit_is_refused(make_trainer, tmp_path):
    make_trainer(**RESUMED, peft_config=lora()).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    for options, said in (
        ({"r": 8}, "have r 4, the student's 8. Resume with the arguments of the run"),
        ({"lora_alpha": 4}, "have lora_alpha 8, the student's 4"),
        ({"target_modules": ["q_proj"]}, r"have target_modules .*, the student's \['q_proj'\]"),
        ({"use_rslora": True}, "have use_rslora None, the student's True"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_trainer(**RESUMED, peft_config=lora(**options)).train(resume_from_checkpoint=str(checkpoint))
    trainer = make_trainer(**RESUMED, peft_config=lora())
    files = (("optimizer", "optimizer.pt"), ("scheduler", "scheduler.pt"), ("random numbers", "rng_state.pth"))
    for name, file in files:
        shutil.copytree(checkpoint, tmp_path / name)
        (tmp_path / name / file).unlink()
        with pytest.raises(ConfigError, match=f"{name} lacks the state of {name}, so training would not"):
            trainer.train(resume_from_checkpoint=str(tmp_path / name))
    with pytest.raises(ConfigError, match="which is no checkpoint; expected true"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    assert trainer.train(resume_from_checkpoint=True).global_step == 2
