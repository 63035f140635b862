"""The trainer: its loss is the sum over tokens over the global count, however the batch is split, padded or resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import processes
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, TopK
from quantkd.errors import ConfigError, DataError, TransferSetError
from quantkd.loss.reference import compute_distillation_loss
from quantkd.models.student import default_quantization_config, load_student
from quantkd.transfer_set.collator import DistillationCollator
from tests.conftest import capture_set

PROMPTS = [
    "Two and two?",
    "Name a colour, and then another one.",
    "How many legs?",
    "What is the sum of three and four, in words, please?",
    "Why?",
    "Tell me about the sea.",
    "One.",
    "Count from one to nine and back again.",
]


@pytest.fixture(scope="module")
def set_path(tmp_path_factory):
    return tmp_path_factory.mktemp("sets") / "set"


@pytest.fixture(scope="module")
def transfer_set(tiny_model_path, set_path):
    return capture_set(tiny_model_path, PROMPTS, set_path, max_new_tokens=10)


@pytest.fixture
def make_trainer(tiny_model_path, transfer_set, tmp_path):
    def build(model=None, transfer=transfer_set, callbacks=None, trainer_kwargs=None, **kwargs):
        options = {
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "lr_scheduler_type": "constant",
            "model_init_kwargs": {"dtype": "float32"},
            "init": "zero",
            "disable_tqdm": True,
            **kwargs,
        }
        args = QuantizedDistillationConfig(str(tmp_path / "out"), **options)
        return QuantizedDistillationTrainer(
            model or str(tiny_model_path), args, train_dataset=transfer, callbacks=callbacks, **(trainer_kwargs or {})
        )

    return build


class KeepGradients(TrainerCallback):
    """Copies the gradient of every trainable parameter just before the first optimizer step."""

    def __init__(self):
        self.first: torch.Tensor | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
            self.first = torch.cat(grads).clone()


def run(trainer, keeper):
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return keeper.first, logs


def relative(a, b):
    return float((a - b).norm() / b.norm())


SPLITS = {
    "batch 2 x accumulation 4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "batch 1 x accumulation 8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "batch 3 x accumulation 3": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_loss_and_gradient_do_not_depend_on_the_split(make_trainer, split, divergence):
    options = {"temperature": 2.0, "divergence": divergence, "max_grad_norm": 0.0}
    keeper, split_keeper = KeepGradients(), KeepGradients()
    gradient, logs = run(make_trainer(callbacks=[keeper], **options), keeper)
    split_gradient, split_logs = run(make_trainer(callbacks=[split_keeper], **options, **SPLITS[split]), split_keeper)
    assert relative(split_gradient, gradient) < 1e-5
    assert math.isclose(split_logs[0]["loss"], logs[0]["loss"], rel_tol=1e-5)
    for name in ("ce", "kl"):
        assert math.isclose(split_logs[0][name], logs[0][name], rel_tol=1e-5)


def test_padding_changes_nothing(make_trainer, tiny_tokenizer):
    keeper, padded_keeper = KeepGradients(), KeepGradients()
    gradient, logs = run(make_trainer(callbacks=[keeper], max_grad_norm=0.0), keeper)
    wide = {"data_collator": DistillationCollator(tiny_tokenizer.pad_token_id, pad_to_multiple_of=128)}
    trainer = make_trainer(callbacks=[padded_keeper], max_grad_norm=0.0, trainer_kwargs=wide)
    padded_gradient, padded_logs = run(trainer, padded_keeper)
    assert relative(padded_gradient, gradient) < 1e-5
    assert math.isclose(padded_logs[0]["loss"], logs[0]["loss"], rel_tol=1e-5)


def test_two_processes_give_the_same_loss_and_gradient(make_trainer, transfer_set, set_path, tiny_model_path, tmp_path):
    keeper = KeepGradients()
    gradient, logs = run(make_trainer(callbacks=[keeper], max_grad_norm=0.0), keeper)
    script = tmp_path / "two.py"
    script.write_text(
        f"""
import json, torch
from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, TransferSet
from transformers import TrainerCallback
torch.set_num_threads(1)
class Keep(TrainerCallback):
    first = None
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            self.first = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).clone()
keep = Keep()
args = QuantizedDistillationConfig({str(tmp_path / "ddp")!r}, per_device_train_batch_size=2,
    gradient_accumulation_steps=2, learning_rate=1e-2, max_steps=2, logging_steps=1, save_strategy="no",
    lr_scheduler_type="constant", max_grad_norm=0.0,
    model_init_kwargs={{"dtype": "float32"}}, init="zero", disable_tqdm=True, use_cpu=True)
trainer = QuantizedDistillationTrainer({str(tiny_model_path)!r}, args, callbacks=[keep],
    train_dataset=TransferSet({str(set_path)!r}), eval_dataset=TransferSet({str(set_path)!r})[:3])
trainer.train()
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    torch.save({{"gradient": keep.first}}, {str(tmp_path / "gradient.pt")!r})
    open({str(tmp_path / "logs.json")!r}, "w").write(json.dumps([logs, metrics, trainer.args.world_size]))
"""
    )
    processes.run([script], tmp_path / "out.txt", 2)
    two_logs, metrics, world_size = json.loads((tmp_path / "logs.json").read_text())
    two_gradient = torch.load(tmp_path / "gradient.pt", weights_only=True)["gradient"]
    assert world_size == 2
    assert relative(two_gradient, gradient) < 1e-5
    for name in ("loss", "ce", "kl"):
        assert math.isclose(two_logs[0][name], logs[0][name], rel_tol=1e-5)
        assert math.isclose(two_logs[1][name], logs[1][name], rel_tol=1e-4)
    # 3 rows on 2 processes: the loader repeats one to fill the last batch, and it must not count twice.
    trainer = make_trainer(max_grad_norm=0.0, trainer_kwargs={"eval_dataset": transfer_set[:3]})
    trainer.train()
    expected = trainer.evaluate()
    for name in ("eval_kl", "eval_ce", "eval_top1_agreement", "eval_loss"):
        # Some CPUs evaluate 4-bit layers in bfloat16, whose rounding (2^-8) falls otherwise in batches of other shapes.
        assert math.isclose(metrics[name], expected[name], rel_tol=2**-8), name


def test_logged_terms_add_up_to_the_logged_loss(make_trainer):
    trainer = make_trainer(alpha=0.3, temperature=2.0, max_steps=4, logging_steps=2, per_device_train_batch_size=3)
    trainer.train()
    for entry in [entry for entry in trainer.state.log_history if "loss" in entry]:
        assert math.isclose(entry["loss"], 0.7 * entry["ce"] + 0.3 * 4.0 * entry["kl"], rel_tol=1e-4)


def test_evaluation_gives_token_means_at_temperature_one(make_trainer, transfer_set):
    trainer = make_trainer(
        alpha=0.3,
        temperature=2.0,
        divergence="reverse_kl",
        per_device_eval_batch_size=3,
        trainer_kwargs={"eval_dataset": transfer_set},
    )
    metrics = trainer.evaluate()
    kl = ce = agree = objective = tokens = 0.0
    for row in transfer_set:
        with torch.inference_mode():
            logits = trainer.model(input_ids=row["input_ids"].unsqueeze(0)).logits
        labels = row["labels"].unsqueeze(0)
        n = len(row["teacher"])
        for name, options in {
            "kl": {"alpha": 1.0},
            "ce": {"alpha": 0.0},
            "objective": {"alpha": 0.3, "temperature": 2.0, "divergence": "reverse_kl"},
        }.items():
            value = float(compute_distillation_loss(logits, labels, row["teacher"], num_items=1, **options))
            kl, ce, objective = (
                kl + value * (name == "kl"),
                ce + value * (name == "ce"),
                objective + value * (name == "objective"),
            )
        places = (row["labels"] != -100).nonzero().squeeze(1)
        agree += int((logits[0, places - 1].argmax(-1) == row["teacher"].top_ids).sum())
        tokens += n
    assert math.isclose(metrics["eval_kl"], kl / tokens, rel_tol=1e-4)
    assert math.isclose(metrics["eval_ce"], ce / tokens, rel_tol=1e-4)
    assert math.isclose(metrics["eval_perplexity"], math.exp(ce / tokens), rel_tol=1e-4)
    assert math.isclose(metrics["eval_top1_agreement"], agree / tokens, rel_tol=1e-6)
    assert math.isclose(metrics["eval_loss"], objective / tokens, rel_tol=1e-4)


def test_it_learns_and_the_saved_adapter_gives_the_same_logits(make_trainer, transfer_set, tiny_model_path, tmp_path):
    trainer = make_trainer(max_steps=30, alpha=0.9, trainer_kwargs={"eval_dataset": transfer_set})
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_kl"] < 0.5 * before["eval_kl"]
    trainer.save_model()
    out = Path(trainer.args.output_dir)
    assert (out / "adapter_config.json").is_file() and (out / "adapter_model.safetensors").is_file()
    assert json.loads((out / "quantkd.json").read_text())["transfer_set_digest"] == transfer_set.digest
    assert not [file for file in out.rglob("*") if file.suffix in (".bin", ".pkl")]
    trainer.create_model_card()
    for file in out.iterdir():
        assert file.is_dir() or str(tiny_model_path.parent).encode() not in file.read_bytes(), file.name

    base = AutoModelForCausalLM.from_pretrained(
        tiny_model_path, dtype=torch.float32, quantization_config=default_quantization_config(torch.float32)
    )
    loaded = PeftModel.from_pretrained(base, out).eval()
    batch = transfer_set[0]["input_ids"].unsqueeze(0)
    with torch.inference_mode():
        torch.testing.assert_close(
            loaded(input_ids=batch).logits, trainer.model.eval()(input_ids=batch).logits, atol=1e-5, rtol=1e-5
        )


def test_a_resumed_run_ends_like_an_uninterrupted_one(make_trainer, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 3}
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a, b, msg=name)
    assert resumed.state.global_step == 6
    assert [e["kl"] for e in resumed.state.log_history if "kl" in e] == pytest.approx(
        [e["kl"] for e in whole.state.log_history if "kl" in e], rel=1e-4
    )


def test_a_loaded_model_is_taken_as_it_is(make_trainer, tiny_model, tiny_tokenizer, tiny_model_path):
    trainer = make_trainer(model=tiny_model, trainer_kwargs={"processing_class": tiny_tokenizer})
    assert trainer.model is tiny_model and all(p.requires_grad for p in tiny_model.parameters())
    quantized = load_student(str(tiny_model_path), dtype="float32")
    assert isinstance(make_trainer(model=quantized).model, PeftModel)
    adapted = make_trainer(model=load_student(str(tiny_model_path), dtype="float32")).model
    assert make_trainer(model=adapted).model is adapted


def test_several_held_out_sets_are_named_apart(make_trainer, transfer_set):
    sets = {"easy": transfer_set[:2], "hard": transfer_set[2:]}
    metrics = make_trainer(trainer_kwargs={"eval_dataset": sets}).evaluate()
    assert {"eval_easy_kl", "eval_hard_kl", "eval_hard_top1_agreement"} <= set(metrics)


@pytest.mark.parametrize("rows", [[], "an empty transfer set"])
def test_evaluation_without_rows_is_refused(make_trainer, transfer_set, rows):
    trainer = make_trainer()
    with pytest.raises(DataError, match=r"\(eval\) holds no rows; expected at least one"):
        trainer.evaluate(transfer_set[:0] if rows else rows)


def test_what_does_not_fit_is_refused_before_the_first_step(make_trainer, transfer_set, tiny_model, tiny_tokenizer):
    with pytest.raises(ConfigError, match=r"temperatures 1.0, 2.0; training asked for 4.0.*--temperatures 4.0"):
        make_trainer(temperature=4.0)
    with pytest.raises(ConfigError, match="alpha"):
        make_trainer(alpha=-1)
    with pytest.raises(ConfigError, match="loaded model is taken as it is"):
        make_trainer(
            model=tiny_model,
            trainer_kwargs={"processing_class": tiny_tokenizer, "quantization_config": default_quantization_config()},
        )
    adapted = make_trainer().model
    with pytest.raises(ConfigError, match="already carries adapters"):
        make_trainer(model=adapted, trainer_kwargs={"peft_config": LoraConfig()})


def test_a_set_of_another_tokenizer_is_refused_and_the_difference_named(make_trainer, tiny_tokenizer):
    from copy import deepcopy

    other = deepcopy(tiny_tokenizer)
    other.chat_template = other.chat_template.replace("assistant", "model")
    with pytest.raises(TransferSetError, match=r"the chat template differ .* pass the teacher's tokenizer as proc"):
        make_trainer(trainer_kwargs={"processing_class": other})
    other = deepcopy(tiny_tokenizer)
    other.add_tokens(["<new>"])
    with pytest.raises(TransferSetError, match=r"the vocabulary differ .* distils TRL's GOLDTrainer"):
        make_trainer(trainer_kwargs={"processing_class": other})


def test_a_student_of_another_vocabulary_or_a_shorter_context_is_refused(make_trainer, tiny_model, tiny_tokenizer):
    tiny_model.config.max_position_embeddings = 16
    with pytest.raises(DataError, match="the student's context holds 16"):
        make_trainer(model=tiny_model, trainer_kwargs={"processing_class": tiny_tokenizer})
    tiny_model.config.max_position_embeddings = 512
    tiny_model.resize_token_embeddings(len(tiny_tokenizer) - 8)
    with pytest.raises(ConfigError, match=r"head has \d+ rows, and the transfer set's entries may have ids up to"):
        make_trainer(model=tiny_model, trainer_kwargs={"processing_class": tiny_tokenizer})


def test_sampled_sets_refuse_reverse_kl(make_trainer, tiny_model, tiny_tokenizer, tmp_path):
    from quantkd import Sampled

    sampled = capture_set(
        tiny_model, PROMPTS, tmp_path / "s", storage=Sampled(10), max_new_tokens=4, tokenizer=tiny_tokenizer,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="reverse KL is infinite"):
        make_trainer(transfer=sampled, divergence="reverse_kl")
    make_trainer(transfer=sampled, max_steps=1).train()


def test_top_k_of_the_whole_vocabulary_trains_like_dense_kl(make_trainer, tiny_model, tiny_tokenizer, tmp_path):
    size = len(tiny_tokenizer)
    dense = capture_set(
        tiny_model, PROMPTS[:2], tmp_path / "d", storage=TopK(size), max_new_tokens=4, tokenizer=tiny_tokenizer,
    )  # fmt: skip
    trainer = make_trainer(transfer=dense, alpha=1.0, max_steps=1)
    batch = trainer.data_collator(dense.__getitems__([0, 1]))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    expected, tokens = 0.0, 0
    for row in dense:
        places = (row["labels"] != -100).nonzero().squeeze(1) - 1
        with torch.inference_mode():
            log_p = tiny_model(row["input_ids"][None]).logits[0, places].double().log_softmax(-1)
            log_q = trainer.model(row["input_ids"][None]).logits[0, places].double().log_softmax(-1)
        expected += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += len(places)
    assert math.isclose(float(loss), expected / tokens, rel_tol=2e-2)  # the store rounds log-probabilities
