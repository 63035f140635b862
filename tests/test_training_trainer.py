"""The trainer: its loss is the sum over tokens over the global count, however the batch is split, padded or resumed."""

import copy
import inspect
import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.utils.data import ConcatDataset, IterableDataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, Sampled, TransferSet
from quantkd.errors import ConfigError, DataError, TransferSetError
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.loss.metrics import compute_row_metrics
from quantkd.loss.reference import compute_distillation_loss
from quantkd.loss.states import TargetStates
from quantkd.models import quantize as quantize_module
from quantkd.models.provenance import find_base
from quantkd.models.student import default_quantization_config, load_student
from quantkd.transfer_set.batch import DistillationCollator
from tests.conftest import TRAINING_PROMPTS, build_tiny_model, capture_set, refused, relative, save_tiny_model


@pytest.fixture
def make_calibrated(make_trainer, one_layer_path):
    """Trainers that choose their codes first; of one layer, for that takes its time."""
    return partial(make_trainer, model=str(one_layer_path), calibrate=True)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_loss_and_gradient_depend_neither_on_the_split_nor_on_padding(make_trainer, tiny_tokenizer, divergence):
    def run(**options):
        def keep(*args, model, **kwargs):
            kept.extend(p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None)

        objective = {"alpha": 0.5, "temperature": 2.0, "divergence": divergence}
        kept, keeper = [], TrainerCallback()
        keeper.on_pre_optimizer_step = keep
        trainer = make_trainer(max_grad_norm=0.0, max_steps=1, callbacks=[keeper], **objective, **options)
        trainer.train()
        return torch.cat(kept), trainer.state.log_history[0]

    gradient, logs = run()
    wide = {"data_collator": DistillationCollator(tiny_tokenizer.pad_token_id, pad_to_multiple_of=128)}
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    for options in (*(dict(zip(names, split, strict=True)) for split in ((2, 4), (1, 8), (3, 3))), wide):
        split_gradient, split_logs = run(**options)
        assert relative(split_gradient, gradient) < 1e-5, options
        assert all(math.isclose(split_logs[name], logs[name], rel_tol=1e-5) for name in ("loss", "ce", "kl")), options


def test_targets_are_found_anew_where_a_batch_was_changed(make_trainer, training_set, tiny_model):
    trainer = make_trainer()
    batch = trainer.data_collator([training_set[0], training_set[1]])
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    wider = {key: nn.functional.pad(batch[key], (0, 3), value=value) for key, value in padding.items()}
    without = {key: value for key, value in batch.items() if key != "targets"}
    expected = trainer.compute_loss(trainer.model, batch)
    for changed in ({**batch, **wider}, without):
        assert torch.allclose(trainer.compute_loss(trainer.model, changed), expected, rtol=1e-5)
        trainer.prediction_step(trainer.model, changed, True)
    # A collator around the library's own that masks a target keeps all entries, which is refused.
    around = make_trainer(data_collator=lambda rows: trainer.data_collator(rows))
    masked = {**batch, "labels": batch["labels"].clone()}
    masked["labels"].view(-1)[batch["targets"][0]] = -100
    refused(ConfigError, "truncated", around.compute_loss, around.model, masked)
    live = make_trainer(teacher_model=tiny_model)
    batch["labels"][:, batch["labels"].shape[1] // 2 :] = -100  # the entries of a set are not read beside a teacher
    plain = {key: batch[key] for key in padding}
    assert torch.equal(*(live.compute_loss(live.model, each) for each in (batch, plain)))


def test_logged_terms_add_up_to_the_logged_loss(make_trainer):
    trainer = make_trainer(alpha=0.3, temperature=2.0, max_steps=4, logging_steps=2, per_device_train_batch_size=3)
    trainer.train()
    for entry in [entry for entry in trainer.state.log_history if "loss" in entry]:
        assert math.isclose(entry["loss"], 0.7 * entry["ce"] + 0.3 * 4.0 * entry["kl"], rel_tol=1e-4)


def test_evaluation_gives_token_means_at_temperature_one(make_trainer, training_set):
    objective = {"alpha": 0.3, "temperature": 2.0, "divergence": "reverse_kl"}
    trainer = make_trainer(per_device_eval_batch_size=3, eval_dataset=training_set, **objective)
    metrics = trainer.evaluate()
    sums = dict.fromkeys(("kl", "ce", "loss", "top1_agreement"), 0.0)
    for row in training_set:
        with torch.inference_mode():
            logits = trainer.model(input_ids=row["input_ids"].unsqueeze(0)).logits
        for name, options in (("kl", {"alpha": 1.0}), ("ce", {"alpha": 0.0}), ("loss", objective)):
            value = compute_distillation_loss(logits, row["labels"][None], row["teacher"], num_items=1, **options)
            sums[name] += float(value)
        places = (row["labels"] != -100).nonzero().squeeze(1)
        sums["top1_agreement"] += int((logits[0, places - 1].argmax(-1) == row["teacher"].top_ids).sum())
    means = {name: value / sum(len(row["teacher"]) for row in training_set) for name, value in sums.items()}
    for name, value in {**means, "perplexity": math.exp(means["ce"])}.items():
        assert math.isclose(metrics[f"eval_{name}"], value, rel_tol=1e-4), name


def test_it_learns_and_the_saved_adapter_gives_the_same_logits(make_trainer, training_set, tiny_model_path, tmp_path):
    trainer = make_trainer(max_steps=16, learning_rate=2e-2, alpha=0.9, eval_dataset=training_set)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_kl"] < 0.5 * before["eval_kl"]
    trainer.save_model()
    out = Path(trainer.args.output_dir)
    assert (out / "adapter_config.json").is_file() and (out / "adapter_model.safetensors").is_file()
    assert json.loads((out / "quantkd.json").read_text())["transfer_set_digest"] == training_set.digest
    assert not [file for file in out.rglob("*") if file.suffix in (".bin", ".pkl")]
    trainer.create_model_card()
    for file in out.iterdir():
        assert file.is_dir() or str(tiny_model_path.parent).encode() not in file.read_bytes(), file.name
    options = {"dtype": torch.float32, "quantization_config": default_quantization_config(torch.float32)}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path, **options), out)
    for each in (each for each in trainer.model.parameters() if each.requires_grad):
        each.data = each.bfloat16().float()  # as it is saved
    with torch.inference_mode():
        found, expected = (model.eval()(training_set[0]["input_ids"][None]).logits for model in (loaded, trainer.model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_originals_that_are_not_there_are_refused_before_codes_are_chosen(make_calibrated, one_layer_path, tmp_path):
    for missing, said in (
        (str(tmp_path / "nowhere"), "There is no folder"), (str(tmp_path), "holds no config.json"),
        ("nowhere", "of which no config.json was found"), ("no name", "of which no config.json was found"),
    ):  # fmt: skip
        refused(ConfigError, said, make_calibrated, init="covariance", init_from=missing)
    assert not list(tmp_path.rglob("quantized"))
    original = shutil.copytree(one_layer_path, tmp_path / "original")
    options = {"init": "covariance", "init_from": str(original), "save_strategy": "steps", "save_steps": 1}
    make_calibrated(max_steps=1, **options).train()
    shutil.rmtree(original)  # which a run that goes on does not read again
    checkpoint = str(next(tmp_path.rglob("checkpoint-1")))
    make_calibrated(max_steps=2, resume_from_checkpoint=checkpoint, **options).train(checkpoint)


def test_a_name_is_trained_on_calibrated_codes(make_calibrated, training_set, one_layer_path, caplog):
    options = {"init": "covariance", "save_strategy": "steps", "save_steps": 1}
    trainer = make_calibrated(init_from=None, **options)
    assert trainer.args.init_from == str(one_layer_path) and trainer.args.start == "covariance"
    trainer.train()
    trainer.save_model()
    out = Path(trainer.args.output_dir)
    assert find_base(out) == find_base(out, f"/elsewhere/{one_layer_path.name}") == out / "quantized"
    assert find_base(out, "another") is None
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out / "quantized"), out)
    kept = evaluate_fidelity(loaded, training_set, progress=False).means["kl"]
    assert kept == pytest.approx(trainer.evaluate(training_set)["eval_kl"], rel=0.02)  # saved in 16 bit
    written = (out / "quantized" / "model.safetensors").stat().st_mtime_ns
    where = str(out / "checkpoint-1")  # from whose codes training goes on, whatever the seed is now
    make_calibrated(seed=1, max_steps=2, resume_from_checkpoint=where).train(where)
    make_calibrated()  # again: what is there is kept
    assert (out / "quantized" / "model.safetensors").stat().st_mtime_ns == written
    make_calibrated(seed=1)
    assert (out / "quantized" / "model.safetensors").stat().st_mtime_ns != written
    for rows, why in (([training_set[0]], "rows that are no TransferSet have no digest"), (None, "no train_dataset")):
        make_calibrated(train_dataset=rows)
        assert f"{why}. Choose them with `quantkd quantize`" in caplog.text


def test_calibrated_codes_are_those_of_the_model_that_is_named(make_trainer, tiny_tokenizer, tmp_path, caplog):
    for seed, folder in enumerate(("one", "two")):
        model = save_tiny_model(tiny_tokenizer, tmp_path / folder / "model", seed=seed)
        last = make_trainer(model=str(model), calibrate=True)
    expected = build_tiny_model(tiny_tokenizer, 1).get_input_embeddings().weight
    assert torch.equal(last.model.get_input_embeddings().weight, expected) and "quantized is replaced" in caplog.text


def test_codes_of_other_layers_are_other_codes(make_calibrated):
    for skipped in (None, ["down_proj", "lm_head"], None):
        config = default_quantization_config(torch.float32)
        config.llm_int8_skip_modules = skipped
        layer = make_calibrated(quantization_config=config).model.base_model.model.model.layers[0].mlp
        assert hasattr(layer.gate_proj.weight, "quant_state")
        assert hasattr(layer.down_proj.weight, "quant_state") == (skipped is None)


def test_codes_that_another_process_has_chosen_meanwhile_are_kept(make_calibrated, tmp_path, monkeypatch, caplog):
    out, quantize = tmp_path / "out", quantize_module.quantize

    def choose(model, transfer_set, folder, **kwargs):
        quantize(model, transfer_set, folder, **kwargs)
        shutil.copytree(folder, out / "quantized")

    monkeypatch.setattr(quantize_module, "quantize", choose)
    make_calibrated()
    assert [path.name for path in out.iterdir()] == ["quantized"] and "is replaced" not in caplog.text


def test_codes_of_a_run_that_was_killed_are_taken_up(make_calibrated, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    out, rename = tmp_path / "out", Path.rename

    def kill(path, target):
        if target == out / "quantized":
            raise Killed
        return rename(path, target)

    for seed in (0, 1):  # of the second the folder of the first is gone already
        monkeypatch.setattr(Path, "rename", kill)
        with pytest.raises(Killed):
            make_calibrated(seed=seed)
        monkeypatch.setattr(Path, "rename", rename)
        (left,) = out.glob(".*")
        written = (left / "model.safetensors").stat().st_mtime_ns
        make_calibrated(seed=seed)
        assert [path.name for path in out.iterdir()] == ["quantized"]
        assert (out / "quantized" / "model.safetensors").stat().st_mtime_ns == written
    monkeypatch.setattr(Path, "rename", kill)
    with pytest.raises(Killed):
        make_calibrated(seed=2)
    monkeypatch.setattr(Path, "rename", rename)
    make_calibrated(seed=3)  # whose codes they are not
    assert [path.name for path in out.iterdir()] == ["quantized"]


@pytest.mark.parametrize("before", [True, False])
def test_a_run_goes_on_with_the_codes_that_it_had(make_trainer, before):
    trainer = make_trainer(calibrate=before, save_strategy="steps", save_steps=1)
    trainer.train()
    where = str(Path(trainer.args.output_dir) / "checkpoint-1")
    with pytest.raises(ConfigError, match=f"calibrate is {not before} now. Resume with calibrate={before}"):
        make_trainer(calibrate=not before, resume_from_checkpoint=where)


def test_a_checkpoint_without_a_tokenizer_says_how_to_get_one(make_trainer, tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    for options in ({}, {"processing_class": tiny_tokenizer}):
        with pytest.raises(ConfigError, match=r"holds no tokenizer_config.json.*tokenizer.save_pretrained"):
            make_trainer(model=str(tmp_path / "model"), calibrate=True, **options)


def test_a_folder_that_no_run_made_stays(make_trainer, tmp_path):
    (tmp_path / "out" / "quantized").mkdir(parents=True)
    mine = tmp_path / "out" / "quantized" / "quantkd.json"
    mine.write_text('{"export": {"form": "merged"}}')  # as `export` writes it
    refused(ConfigError, "a folder that is not empty", make_trainer, calibrate=True)
    assert mine.is_file()


def test_a_loaded_model_is_taken_as_it_is(make_trainer, tiny_model, tiny_tokenizer, tiny_model_path, training_set):
    trainer = make_trainer(model=tiny_model, processing_class=tiny_tokenizer)
    assert trainer.model is tiny_model and all(p.requires_grad for p in tiny_model.parameters())
    adapted = make_trainer(model=load_student(str(tiny_model_path), dtype="float32")).model
    assert isinstance(adapted, PeftModel) and make_trainer(model=adapted).model is adapted
    for name, value in (("init_rows", 4), ("init_from", "m")):  # its adapters are where they are
        options = {"init": "covariance", name: value}
        refused(ConfigError, f"{name} has no effect here", make_trainer, model=adapted, **options)
    args = QuantizedDistillationConfig(make_trainer().args.output_dir, report_to="none")
    QuantizedDistillationTrainer(str(tiny_model_path), args, train_dataset=training_set)
    assert args.init_from is None


def test_several_held_out_sets_are_named_apart_and_empty_ones_refused(make_trainer, training_set):
    trainer = make_trainer(eval_dataset={"easy": training_set[:2], "hard": training_set[2:]})
    assert {"eval_easy_kl", "eval_hard_kl", "eval_hard_top1_agreement"} <= set(trainer.evaluate())
    for rows in ([], training_set[:0]):
        refused(DataError, r"\(eval\) holds no rows; expected at least one", trainer.evaluate, rows)


def test_what_does_not_fit_is_refused_before_the_first_step(make_trainer, tiny_model, tiny_tokenizer):
    loaded = {"model": tiny_model, "processing_class": tiny_tokenizer}
    template, vocabulary = copy.deepcopy(tiny_tokenizer), copy.deepcopy(tiny_tokenizer)
    template.chat_template = template.chat_template.replace("assistant", "model")
    vocabulary.add_tokens(["<new>"])
    short, small = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    short.config.max_position_embeddings = 16
    small.resize_token_embeddings(len(tiny_tokenizer) - 8)
    for error, options, message in (
        (ConfigError, {"temperature": 4.0}, r"temperatures 1.0, 2.0; training asked for 4.0.*--temperatures 4.0"),
        (ConfigError, {"alpha": -1}, "alpha"),
        (ConfigError, {**loaded, "quantization_config": default_quantization_config()}, "model is taken as it is"),
        (ConfigError, {"model": make_trainer().model, "peft_config": LoraConfig()}, "already carries adapters"),
        (TransferSetError, {"processing_class": template}, r"chat template differ .* the teacher's tokenizer as proc"),
        (TransferSetError, {"processing_class": vocabulary}, r"vocabulary differ .* distils TRL's GOLDTrainer"),
        (DataError, {**loaded, "model": short}, "the student's context holds 16"),
        (ConfigError, {**loaded, "model": small}, r"head has \d+ rows, and the transfer set's entries may have ids up"),
    ):
        refused(error, message, make_trainer, **options)


def test_sampled_sets_refuse_reverse_kl(make_trainer, tiny_model_path, tmp_path):
    options = {"storage": Sampled(10), "max_new_tokens": 4}
    sampled = capture_set(tiny_model_path, TRAINING_PROMPTS, tmp_path / "s", **options)
    alike = {"temperatures": (1.0,), "max_new_tokens": 4}
    plain = capture_set(tiny_model_path, TRAINING_PROMPTS[:2], tmp_path / "p", **alike)
    for rows in (sampled, TransferSet.concatenate([plain, sampled])):
        refused(ConfigError, "reverse KL is infinite", make_trainer, train_dataset=rows, divergence="reverse_kl")
    make_trainer(train_dataset=TransferSet.concatenate([sampled, plain])[len(sampled) :], divergence="reverse_kl")
    make_trainer(train_dataset=sampled, max_steps=1).train()


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter([self.rows[place] for place in range(len(self.rows))])


def test_a_stream_of_rows_trains_and_is_evaluated_as_they_are(make_trainer, training_set):
    """accelerate would cut the tensors of its batches to their number of rows, and the targets with them."""
    kl, weights = [], []
    for rows in (Stream(training_set), training_set):
        trainer = make_trainer(train_dataset=rows, max_steps=2, train_sampling_strategy="sequential")
        kl.append(trainer.evaluate(rows)["eval_kl"])
        trainer.train()
        weights.append([each.detach().clone() for each in trainer.model.parameters() if each.requires_grad])
    assert kl[0] == pytest.approx(kl[1], rel=1e-6)
    torch.testing.assert_close(*weights)
    batch = trainer.data_collator([training_set[0], training_set[1]])
    cut = batch["labels"].clone()
    cut[0] = -100
    states = TargetStates(torch.zeros(*cut.shape, training_set.info.vocab_size))
    with pytest.raises(ConfigError, match="one teacher distribution and one label for each"):
        compute_row_metrics(states, cut, batch["teacher"], trainer.args.objective())


def test_rows_that_are_no_transfer_set_are_trained_on(make_trainer, training_set):
    Sized = type("Sized", (Stream,), {"__len__": lambda self: len(self.rows)})
    for rows in (ConcatDataset([training_set]), Sized(training_set)):
        trainer = make_trainer(train_dataset=rows, max_steps=1)
        assert math.isfinite(trainer.train().training_loss) and trainer.state.global_step == 1


def test_a_stream_is_not_evaluated_by_several_processes(make_trainer, training_set, monkeypatch):
    monkeypatch.setattr(QuantizedDistillationConfig, "world_size", 2)
    streams = {"held": Stream(training_set)}
    refused(ConfigError, "is an IterableDataset, of which several processes", make_trainer, eval_dataset=streams)


def test_outputs_beside_the_loss_have_logits_or_none(make_trainer, training_set):
    for use_fused_loss in (True, False):
        trainer = make_trainer(use_fused_loss=use_fused_loss)
        batch = trainer.data_collator([training_set[0]])
        _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        shape = None if use_fused_loss else (*batch["labels"].shape, training_set.info.vocab_size)
        assert (None if outputs.logits is None else tuple(outputs.logits.shape)) == shape


def test_what_the_trainer_overrides_is_still_called_by_transformers():
    source = inspect.getsource(Trainer)
    private = {"_get_train_sampler", "_get_eval_sampler", "_save", "_push_from_checkpoint"}
    overridden = private | {"compute_loss", "prediction_step", "evaluation_loop", "log", "train"}
    assert overridden <= vars(QuantizedDistillationTrainer).keys()
    for name in private | {"_prepare_inputs", "loss_is_scaled_for_ga", "model_accepts_loss_kwargs", "push_in_progress"}:
        assert f"self.{name}" in source, f"the Trainer of transformers does not use {name} any more"
