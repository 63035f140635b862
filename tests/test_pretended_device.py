"""Every torch path on a pretended GPU: it refuses nothing, gives what the CPU gives, and hardly waits."""

import copy
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from gguf_files import write_gguf
from peft import LoraConfig, PeftModel
from pretended_device import DEVICE, DeviceTensor, move, pretended_device
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

import quantkd
from quantkd import Nucleus, Sampled, TopK, TransferSet
from quantkd.cli.verify import main as verify
from quantkd.data.arithmetic import generate_problems
from quantkd.evaluation.accuracy import evaluate_gsm8k, generate_greedy
from quantkd.evaluation.arms import EvaluationSettings
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.foreign import keep_from_repacking
from quantkd.models.export import export_checkpoint
from quantkd.models.layer_inputs import draw_rows
from quantkd.models.merging import merge_adapters
from quantkd.models.original_weights import OriginalWeights
from quantkd.models.quantize import calibrate
from quantkd.models.student import attach_lora, load_student
from quantkd.models.weights import dequantize_weight, is_quantized_layer
from quantkd.training.curves import TrainingCurves
from quantkd.training.selftest import run_selftest
from quantkd.view.collect import collect_divergence
from tests.conftest import TRAINING_PROMPTS, build_tiny_model, capture_set, refused

FACTS = re.compile("time|second|flos|epoch|step")
PACKAGE = str(Path(quantkd.__file__).parent)
GIVEN = [{"prompt": prompt, "completion": f"It is {place}."} for place, prompt in enumerate(TRAINING_PROMPTS)]
HEAD = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
PATHS = {
    "fused": {}, "unfused": {"use_fused_loss": False}, "packed": {"packing": True, "gradient_checkpointing": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "weights": (1.0, 0.5)},
    "dense": {"live": True, "alpha": 0.7},
    "dense jsd": {"live": True, "divergence": "jsd", "temperature": 2.0, "use_fused_loss": False},
    "reverse": {"divergence": "reverse_kl", "alpha": 0.3}, "jsd": {"divergence": "jsd", "temperature": 2.0},
    "head": {"peft_config": HEAD, "float": True, "temperature": 2.0},
    "float": {"peft_config": LoraConfig(target_modules="all-linear"), "float": True},
    "scales": {"train_scales": True}, "scales beside LoRA": {"train_scales": True, "peft_config": LoraConfig(r=2)},
    "loftq": {"init": "loftq"}, "covariance": {"init": "covariance"},
    "gguf": {"gguf": True}, "gguf covariance": {"gguf": True, "init": "covariance"},
}  # fmt: skip


# One layer is every layer to a device that counts waits.
build_model = partial(build_tiny_model, layers=1)
tiny_model = pytest.fixture(lambda tiny_tokenizer: build_model(tiny_tokenizer))


@pytest.fixture
def waits():
    with pretended_device() as found:
        yield found


def own(waits):
    """Those of our lines; a library's line that called torch is not ours, nor what it waits for."""
    return [each for each in waits if each.startswith(PACKAGE)]


def check_refusals(there, error):
    """What CUDA refuses of a tensor of three ones, and what it takes."""
    for wrong in (
        lambda: there + torch.ones(3), lambda: torch.ones(3)[there.long()], there.numpy,
        lambda: there.gather(0, torch.zeros(1, dtype=torch.long)),
        lambda: torch.multinomial(there, 1, generator=torch.Generator()),
    ):  # fmt: skip
        refused(error, r"device|numpy", wrong)
    assert (there + torch.tensor(1.0))[torch.tensor([0])].cpu().tolist() == [2.0]


def test_it_refuses_what_cuda_refuses_and_counts_waits(waits):
    there = torch.ones(3, device="cuda")
    assert isinstance(there, DeviceTensor) and there.device == DEVICE
    check_refusals(there, RuntimeError)
    assert torch.multinomial(there, 1, generator=torch.Generator(device="cuda")).device == DEVICE
    here = torch.ones(3, requires_grad=True)
    (here.to("cuda") * 2).cpu().sum().backward()
    assert type(here.grad) is torch.Tensor and here.grad.tolist() == [2.0] * 3
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    for wait in (
        there.sum().item, there.cpu, there.nonzero, there.tolist, lambda: there[there > 0], lambda: bool(there[0]),
        lambda: there[torch.tensor([0])], lambda: here.to("cuda"), lambda: here.copy_(there), lambda: there.copy_(here),
        lambda: torch.tensor([1], device="cuda"), lambda: torch.where(there > 0, there, 0),
    ):  # fmt: skip
        waits.clear()
        wait()
        assert len(waits) == 1 and waits[0].startswith(__file__), waits
    waits.clear()
    there[:1] = 5
    there.to("cuda").mul_(2).masked_fill(there > 0, 0).sum()
    here.pin_memory().to("cuda", non_blocking=True)
    assert waits == []


@pytest.mark.parametrize("rule", [Nucleus(0.9), TopK(4), Sampled(6)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("mode", ["greedy", "sampled", "given"])
def test_capture(tiny_model, tiny_tokenizer, tmp_path, mode, rule):
    def run(model, name, tokens):
        options = {"do_sample": True, "top_k": 20, "top_p": 0.9} if mode == "sampled" else {}
        options |= {"responses": "given"} if mode == "given" else {"max_new_tokens": tokens}
        prompts = GIVEN if mode == "given" else TRAINING_PROMPTS
        return capture_set(model, prompts, tmp_path / name, storage=rule, tokenizer=tiny_tokenizer, **options).digest

    expected = run(tiny_model, "here", 9)
    with pretended_device() as waits:
        move(tiny_model)
        assert run(tiny_model, "there", 9) == expected
        few = len(own(waits))
        if mode != "given":
            run(tiny_model, "short", 3)
            assert len(own(waits)) == 2 * few  # none per token
    assert few <= 6


@pytest.fixture
def load(one_layer_path, tmp_path):
    """A student in a format of bitsandbytes, or in a GGUF file."""

    def load(kind):
        options = {"quantization_config": kind}
        if kind == "Q4_0":
            full = AutoModelForCausalLM.from_pretrained(one_layer_path)
            options = {"gguf_file": str(write_gguf(full, tmp_path / "model.gguf", kind))}
        return load_student(str(one_layer_path), dtype="float32", **options)

    return load


@pytest.fixture
def nf4(one_layer_path):
    """Two equal students, loaded on the CPU, that evaluate with the weights that they train with, as on a GPU."""
    model = load_student(str(one_layer_path), dtype="float32")
    for layer in model.modules():
        if hasattr(layer, "quant_state"):
            keep_from_repacking(layer)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("path", PATHS)
def test_training(make_trainer, load, nf4, one_layer_path, tiny_tokenizer, training_set, path):
    options = dict(PATHS[path])
    students = [build_model(tiny_tokenizer) for _ in nf4] if options.pop("float", False) else nf4
    students = [load("Q4_0"), load("Q4_0")] if options.pop("gguf", False) else students
    is_live, weights = options.pop("live", False), options.pop("weights", None)
    rows = TransferSet.concatenate([training_set[:4], training_set[4:]], weights=weights) if weights else training_set
    if is_live:  # without stored entries
        rows = Dataset.from_list([{key: row[key].tolist() for key in ("input_ids", "labels")} for row in rows])

    def run(place, student, waits):
        seen, steps = [], TrainerCallback()  # how often we had waited at the end of each step
        steps.on_step_end = lambda *args, **kwargs: seen.append(len(own(waits)))
        teacher = {"teacher_model": place(build_model(tiny_tokenizer))} if is_live else {}
        origin = {"init_from": str(one_layer_path)} if "init" in options else {}
        trainer = make_trainer(
            place(student), train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer,
            max_steps=3, logging_steps=3, callbacks=[steps],
            per_device_eval_batch_size=4, **teacher, **origin, **options,
        )  # fmt: skip
        trainer.remove_callback(TrainingCurves)  # drawing takes longer than training
        logs = [trainer.evaluate(), trainer.train().metrics]
        before = len(own(waits))
        logs += [*trainer.state.log_history, trainer.evaluate()]
        figures = [{name: each for name, each in log.items() if not FACTS.search(name)} for log in logs]
        return figures, seen, len(own(waits)) - before

    expected, _, _ = run(lambda model: model, students[0], [])
    with pretended_device() as waits:
        found, steps, evaluation = run(move, students[1], waits)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-7)
    assert steps[2] - steps[1] == is_live, own(waits)
    assert evaluation == 1 + 2 * is_live, own(waits)  # for two batches


@pytest.mark.parametrize("has_labels", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "Q4_0"])
def test_calibrated_codes(load, one_layer_path, training_set, kind, has_labels):
    rows, students = draw_rows(training_set, 8, 0), [load(kind), load(kind)]
    rows = rows if has_labels else rows._replace(labels=None)

    def run(student):
        torch.manual_seed(0)
        layers = {name: each for name, each in student.named_modules() if is_quantized_layer(each)}
        nearest = {name: dequantize_weight(each).clone() for name, each in layers.items()}
        weights = OriginalWeights(str(one_layer_path), student)
        assert calibrate(student, weights, rows, progress=False) == len(layers) > 0
        return nearest, {name: dequantize_weight(each).cpu() for name, each in layers.items()}

    nearest, expected = run(students[0])
    with pretended_device():
        _, found = run(move(students[1]))
    for name, weight in expected.items():
        assert not torch.equal(weight, nearest[name]), name
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0, msg=name)


def test_evaluation(nf4, tiny_tokenizer, training_set):
    rows, settings = generate_problems(3, 0), EvaluationSettings(max_new_tokens=12, batch_size=2)

    def run(place, model):
        model, teacher = place(model), place(build_model(tiny_tokenizer))
        columns = evaluate_fidelity(model, training_set, teacher=teacher, batch_size=4).columns
        answers = evaluate_gsm8k(model, tiny_tokenizer, rows, settings=settings)
        return columns, [answer.output for answer in answers]

    expected, answers = run(lambda model: model, nf4[0])
    with pretended_device() as waits:
        found, same = run(move, nf4[1])
    assert same == answers and found.keys() == expected.keys()
    for name, column in expected.items():
        np.testing.assert_allclose(found[name], column, rtol=1e-5, atol=1e-7, err_msg=name)
    assert sum("fidelity.py" in each for each in own(waits)) == 2, own(waits)  # one per batch


def test_stop_text_is_found_where_a_cpu_finds_it(tiny_model, tiny_tokenizer):
    prompts, tokens = tiny_tokenizer(TRAINING_PROMPTS[:4])["input_ids"], 20
    answer = partial(generate_greedy, tiny_model, tiny_tokenizer, prompts, [[0, 1, 2, 3]], tokens)
    whole = [each.text for batch in answer() for each in batch]
    stops = [whole[0][1:4], whole[1][9:12]]
    expected = [list(answer(stop)) for stop in stops]
    assert any(each.text != text for found in expected for each, text in zip(found[0], whole, strict=True))
    with pretended_device() as waits:
        move(tiny_model)
        assert [list(answer(stop)) for stop in stops] == expected
    assert len(own(waits)) <= len(stops) * (1 + tokens // 8), waits


def test_what_is_saved_and_exported(build_trainer, nf4, tiny_tokenizer, tmp_path):
    """The tensors of an adapter and of a merged checkpoint. Loading onto the device is not pretended."""

    def run(place, model, folder):
        torch.manual_seed(0)
        trainer = build_trainer(
            folder, attach_lora(place(model), LoraConfig(target_modules="all-linear", init_lora_weights=False)),
            processing_class=tiny_tokenizer, max_steps=1, save_strategy="steps", save_steps=1,
        )  # fmt: skip
        trainer.train()
        trainer.save_model(str(folder / "adapter"))
        export_checkpoint(trainer.model, tiny_tokenizer, folder / "merged", dtype="float32")
        return {str(path.relative_to(folder)): load_file(path) for path in folder.rglob("*.safetensors")}

    expected = run(lambda model: model, nf4[0], tmp_path / "here")
    with pretended_device():
        found = run(move, nf4[1], tmp_path / "there")
    assert found.keys() == expected.keys() and len(found) == 3
    for name, tensors in expected.items():
        torch.testing.assert_close(found[name], tensors, rtol=1e-3, atol=1e-6, msg=name)


def test_what_compares_and_merges(nf4, tiny_tokenizer, training_set, monkeypatch, capsys):
    def run(place, model):
        torch.manual_seed(0)
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        student: PeftModel = attach_lora(place(model), config)
        shown = collect_divergence(student, training_set, tiny_tokenizer, rows=3)
        teacher = place(build_tiny_model(tiny_tokenizer))
        monkeypatch.setattr("quantkd.teacher.load_teacher", lambda *args, **kwargs: (teacher, tiny_tokenizer))
        verify([str(training_set.sources[0].path), "--teacher", "it"])
        checks = [check.passed for check in run_selftest(teacher, tiny_tokenizer, max_new_tokens=4)]
        merged = merge_adapters(student, torch.float32)
        weights = {name: weight.detach().cpu() for name, weight in merged.named_parameters()}
        return shown.rows, capsys.readouterr().out, checks, weights

    rows, text, _, expected = run(lambda model: model, nf4[0])
    with pretended_device():
        found, same, checks, weights = run(move, nf4[1])
    assert same == text and "passed: no row differs" in text and all(checks) and len(checks) == 7
    for mine, theirs in zip(found, rows, strict=True):
        np.testing.assert_allclose(mine.kl_after, theirs.kl_after, rtol=1e-4, atol=1e-7)
        np.testing.assert_array_equal(mine.top_before, theirs.top_before)
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, msg=name)
