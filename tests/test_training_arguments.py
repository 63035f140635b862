"""Arguments that transformers' Trainer would pass over, or trip over deep inside: honoured, or refused in one line."""

import shutil
from pathlib import Path

import pytest
from peft import LoraConfig

from quantkd import QuantizedDistillationConfig
from quantkd.errors import ConfigError

RESUMED = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns is on, and would remove the teacher's entries"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1; the teacher's distribution takes the place"),
    ],
)
def test_refused_by_the_configuration(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        QuantizedDistillationConfig(str(tmp_path), **options)


def test_dropping_the_last_batch_leaves_one_to_train_on_and_every_row_to_evaluate(make_trainer, training_set):
    trainer = make_trainer(dataloader_drop_last=True, per_device_train_batch_size=9)
    with pytest.raises(ConfigError, match=r"No batch is left to train on: 8 rows, 9 per batch on each of 1 devices"):
        trainer.train()
    options = {"per_device_eval_batch_size": 5, "eval_dataset": training_set}
    kept, dropped = (make_trainer(dataloader_drop_last=drop, **options).evaluate() for drop in (False, True))
    assert dropped["eval_kl"] == pytest.approx(kept["eval_kl"], rel=1e-5)


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
    for name, file in (
        ("optimizer", "optimizer.pt"),
        ("scheduler", "scheduler.pt"),
        ("random numbers", "rng_state.pth"),
    ):
        shutil.copytree(checkpoint, tmp_path / name)
        (tmp_path / name / file).unlink()
        with pytest.raises(ConfigError, match=f"{name} lacks the state of {name}, so training would not"):
            trainer.train(resume_from_checkpoint=str(tmp_path / name))
    with pytest.raises(ConfigError, match="which is not a complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    assert trainer.train(resume_from_checkpoint=True).global_step == 2
    assert Path(trainer.args.output_dir).is_dir()
