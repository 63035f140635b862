"""Arguments that transformers' Trainer would pass over, or trip over deep inside: honoured, or refused in one line."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from quantkd import QuantizedDistillationConfig
from quantkd.errors import ConfigError, DataError
from quantkd.models.network import run_model, why_not_fusable
from tests.conftest import refused

RESUMED = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(("options", "said"), [
    ({"remove_unused_columns": True}, "remove_unused_columns is on, and would remove the teacher's entries"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1; the teacher's distribution takes the place"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; expected at least 1"),
    ({"weight_decay": math.nan}, "weight_decay is nan; expected at least 0"),
    ({"neftune_noise_alpha": -1.0}, "neftune_noise_alpha is -1.0; expected at least 0"),
    ({"accelerator_config": {"foo": 1}}, "An option cannot be read: .* unexpected keyword argument 'foo'"),
    ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True, which cuts all tensors"),
    ({"init": "zero", "init_from": "m"}, "init_from has no effect without init=covariance or init=loftq"),
    ({"init": "loftq", "init_rows": 4}, "init_rows has no effect without init=covariance"),
    ({"init": "best"}, "init is 'best'; expected one of covariance, loftq, zero"),
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


class EvaluateEachStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = True


def train_from(make_trainer, training_set, **options):
    """A trainer after training, its KL by evaluation, and whether it left its start."""
    options = {
        "eval_dataset": training_set, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "metric_for_best_model": "kl", "eval_on_start": True,
        "load_best_model_at_end": True, "max_steps": 2, **options,
    }  # fmt: skip
    trainer = make_trainer(**options)
    before = {name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad}
    trainer.train(trainer.args.resume_from_checkpoint)
    own = dict(trainer.model.named_parameters())
    kls = [entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry]
    return trainer, kls, any(not torch.equal(own[name], each) for name, each in before.items())


WORSE, BETTER = {"learning_rate": 0.5}, {"learning_rate": 1e-2}


@pytest.mark.parametrize("options", [
    {}, {"train_scales": True, "scales_learning_rate": 0.5}, {"save_strategy": "no"}, {"save_total_limit": 1},
    {"save_strategy": "best"}, {"save_steps": 2},
], ids=str)  # fmt: skip
def test_the_start_is_kept_where_training_makes_it_worse(make_trainer, training_set, caplog, options):
    if options.get("save_strategy") == "no":  # which transformers takes with eval_strategy alone
        options = {**options, "eval_strategy": "no", "callbacks": [EvaluateEachStep()]}
    trainer, kls, has_moved = train_from(make_trainer, training_set, **WORSE, **options)
    assert len(kls) == 3 and kls[0] < min(kls[1:]) and not has_moved and trainer.state.best_metric == kls[0]
    assert trainer.evaluate()["eval_kl"] == pytest.approx(kls[0]) and "The start is kept: eval_kl is" in caplog.text
    assert not (Path(trainer.args.output_dir) / "quantkd-start").exists() and "raised" not in caplog.text


@pytest.mark.parametrize("options", [
    BETTER,
    {**BETTER, "eval_strategy": "no", "save_strategy": "no"}, {**WORSE, "eval_delay": 9},  # what is left is not known
    {**BETTER, "max_steps": 4, "save_steps": 3},
], ids=str)  # fmt: skip
def test_what_is_trained_is_kept_where_it_is_better_or_not_evaluated(make_trainer, training_set, caplog, options):
    trainer, _, has_moved = train_from(make_trainer, training_set, **options)
    assert has_moved and not caplog.text and not (Path(trainer.args.output_dir) / "quantkd-start").exists()


def test_a_start_is_found_again_by_a_run_that_resumes(make_trainer, training_set):
    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_from(make_trainer, training_set, **WORSE, callbacks=[Stop()])
    _, _, has_moved = train_from(make_trainer, training_set, **WORSE, resume_from_checkpoint="true")
    assert not has_moved


def test_a_kl_that_training_raises_is_said(make_trainer, training_set, caplog):
    plain = {"load_best_model_at_end": False, "save_strategy": "no"}
    for options in (BETTER, {**WORSE, "eval_on_start": False}, {**WORSE, "alpha": 0.0}):
        assert train_from(make_trainer, training_set, **plain, **options)[2] and "raised" not in caplog.text
    _, kls, _ = train_from(make_trainer, training_set, **plain, **WORSE)
    assert f"Training raised the KL on the held-out rows from {kls[0]:.4f} to {kls[-1]:.4f}." in caplog.text


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
