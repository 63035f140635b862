"""A CUDA card gives what a CPU gives, within its memory, and is not waited for. Marked `gpu`; `make gpu` runs them.

`pytest -m gpu tests/test_gpu.py --device cpu` tries the tests themselves where there is no card.
"""

import copy
import warnings

import pytest
import torch
from teacher_rows import dense_logprobs, sparse_divergences
from transformers import AutoModelForCausalLM

from quantkd import Nucleus, quantize
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.hardware import chunk_bytes
from quantkd.loss.fused import compute_fused_loss
from quantkd.loss.reference import Objective, compute_position_terms
from quantkd.loss.states import Head, TargetStates
from quantkd.models.export import export_checkpoint
from quantkd.models.stored_weights import are_close, describe_weights
from quantkd.models.student import load_student
from quantkd.models.weights import dequantize_weight, is_quantized_layer
from quantkd.transfer_set.rules import TopK, select_entries
from tests.conftest import TRAINING_PROMPTS, build_tiny_model, capture_set, loss_and_gradient, relative
from tests.test_pretended_device import PATHS, check_refusals, own

pytestmark = pytest.mark.gpu


@pytest.fixture
def device(request):
    name = request.config.getoption("device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


@pytest.fixture
def card(device):
    if device.type != "cuda":
        pytest.skip("what a CPU does not have")
    return device


def plain_copy(student, tiny_tokenizer):
    """The same weights on the CPU, in float32 and unquantized."""
    copied = build_tiny_model(tiny_tokenizer)
    layers = dict(copied.named_modules())
    with torch.no_grad():
        for name, layer in student.named_modules():
            if is_quantized_layer(layer):
                layers[name].weight.copy_(dequantize_weight(layer).float())
            elif getattr(layer, "weight", None) is not None:
                layers[name].weight.copy_(layer.weight)
    return copied


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_in_bfloat16_is_no_worse_than_over_logits(device, temperature, divergence):
    torch.manual_seed(0)
    hidden, weight, beside = torch.randn(40, 64), torch.randn(4096, 64) * 0.3, torch.randn(4096, 64) * 0.3
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    stored = select_entries(hidden.float() @ beside.T, TopK(8), (1.0, 2.0))
    labels, objective = torch.randint(0, 4096, (40,)), Objective(0.5, temperature, divergence)

    def run(device, dtype, fused):
        values = hidden.to(device, dtype).requires_grad_()
        states = TargetStates(values, Head(weight.to(device, dtype)))
        if fused:
            loss, _ = compute_fused_loss(states, labels.to(device), stored.to(device), objective)
        else:
            terms = compute_position_terms(
                states.logits(), labels.to(device), stored.to(device), temperature=temperature, divergence=divergence
            )
            loss = terms.mix(0.5, temperature).sum()
        loss.backward()
        return loss.item(), values.grad.double().cpu()

    loss, gradient = run("cpu", torch.float64, fused=False)
    found, own_gradient = run(device, torch.bfloat16, fused=True)
    _, plain = run(device, torch.bfloat16, fused=False)
    assert found == pytest.approx(loss, rel=1e-2)
    assert relative(own_gradient, gradient) <= 1.1 * relative(plain, gradient) + 1e-3


def test_the_loss_stays_within_a_chunk(card):
    hidden = torch.randn(2048, 256, device=card, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128_256, 256, device=card, dtype=torch.bfloat16)
    teacher = select_entries(torch.randn(2048, 128_256, device=card), TopK(8), (1.0,))
    states, labels = TargetStates(hidden, Head(weight)), torch.zeros(2048, dtype=torch.long, device=card)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compute_fused_loss(states, labels, teacher, Objective(0.5))[0].backward()
    assert torch.cuda.max_memory_allocated() - before < 1.2 * chunk_bytes(card)


@pytest.mark.parametrize("rule", [Nucleus(0.9), TopK(4)], ids=lambda rule: type(rule).__name__)
def test_capture_gives_the_rows_of_a_cpu(device, tiny_model, tiny_tokenizer, tmp_path, rule):
    found, expected = (
        capture_set(
            copy.deepcopy(tiny_model).to(place), TRAINING_PROMPTS, tmp_path / name, tokenizer=tiny_tokenizer,
            storage=rule, max_new_tokens=12,
        )
        for place, name in ((device, "there"), ("cpu", "here"))
    )  # fmt: skip
    for own_row, row in zip(found, expected, strict=True):
        assert torch.equal(own_row["input_ids"], row["input_ids"])
        kl = sparse_divergences(own_row["teacher"], dense_logprobs(tiny_model, row))
        assert abs(kl).max() < 1e-2 and len(own_row["teacher"]) == len(row["teacher"])


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_student_is_measured_as_on_a_cpu(device, tiny_model_path, tiny_tokenizer, held_out, kind):
    student = load_student(str(tiny_model_path), quantization_config=kind, dtype="float32")
    assert student.device.type == device.type
    found = evaluate_fidelity(student, held_out, progress=False).means["kl"]
    expected = evaluate_fidelity(plain_copy(student, tiny_tokenizer), held_out, progress=False).means["kl"]
    # Kernels round: that of int8 its inputs, that for 4 bits on some CPUs its products.
    assert found == pytest.approx(expected, rel=3e-2, abs=1e-2 if kind == "int8" else 0)


@pytest.mark.parametrize("path", PATHS)
def test_every_way_to_train(device, make_trainer, tiny_model_path, tiny_tokenizer, training_set, path):
    options = dict(PATHS[path])
    if options.pop("weights", None):
        options["gradient_accumulation_steps"] = 2
    student = build_tiny_model(tiny_tokenizer).to(device) if options.pop("float", False) else None
    if options.pop("live", False):
        options["teacher_model"] = build_tiny_model(tiny_tokenizer).to(device)
    torch.manual_seed(0)
    trainer = make_trainer(
        student, eval_dataset=training_set, processing_class=tiny_tokenizer, max_steps=6,
        learning_rate=1e-3, save_strategy="no", **options,
    )  # fmt: skip
    rows = training_set[:4]
    found = {}
    chosen = trainer.uses_fused_loss
    for trainer.uses_fused_loss in (False, True):
        found[trainer.uses_fused_loss] = loss_and_gradient(trainer, rows)
    trainer.uses_fused_loss = chosen
    assert found[True][1].device.type == device.type and found[True][1].norm() > 0
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-2, abs=1e-6)
    assert relative(found[True][1], found[False][1]) < 5e-2
    trainer.model.zero_grad()
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before or student is not None  # a student in full precision begins as its teacher


def test_a_step_does_not_wait_for_the_card(card, make_trainer, training_set):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    batch = trainer._prepare_inputs(trainer.data_collator(training_set[:4]))
    trainer.compute_loss(trainer.model, dict(batch)).backward()  # what is compiled and looked up at first
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.compute_loss(trainer.model, dict(batch)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert own([f"{each.filename}:{each.lineno}: {each.message}" for each in caught]) == []


def test_codes_are_better_than_the_nearest_and_load_anywhere(
    device, tiny_model_path, tiny_tokenizer, training_set, held_out, tmp_path
):
    quantize(str(tiny_model_path), training_set, tmp_path / "codes", dtype="float32", progress=False)
    student = load_student(str(tmp_path / "codes"), dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "codes", device_map={"": device}, dtype=torch.float32)
    ids = held_out[0]["input_ids"][None].to(device)
    with torch.inference_mode():
        assert torch.equal(student(input_ids=ids).logits, plain(input_ids=ids).logits)
    nearest = load_student(str(tiny_model_path), dtype="float32")
    own_kl, kl = (evaluate_fidelity(each, held_out, progress=False).means["kl"] for each in (student, nearest))
    assert own_kl < kl
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "codes", device_map={"": "cpu"}, dtype=torch.float32)
    assert are_close(describe_weights(student), describe_weights(there))


def test_what_is_merged_and_exported_is_what_was_trained(device, make_trainer, tiny_tokenizer, held_out, tmp_path):
    trainer = make_trainer(max_steps=2, processing_class=tiny_tokenizer)
    trainer.train()
    kl = evaluate_fidelity(trainer.model, held_out, progress=False).means["kl"]
    export_checkpoint(trainer.model, tiny_tokenizer, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").to(device)
    assert evaluate_fidelity(merged, held_out, progress=False).means["kl"] == pytest.approx(kl, rel=2e-2)


def test_the_pretended_device_refuses_what_this_one_refuses(card):
    check_refusals(torch.ones(3, device=card), (RuntimeError, TypeError))
