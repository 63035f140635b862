"""The loss against a dense float64 reference built another way: explicit (k + 1)-class tables, no logsumexp tricks."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from quantkd.errors import ConfigError
from quantkd.hardware import wide_dtype
from quantkd.loss.metrics import compute_row_metrics, cut_positions, summarize_rows
from quantkd.loss.reference import Objective, compute_distillation_loss, compute_position_terms
from quantkd.loss.states import TargetStates
from quantkd.transfer_set.rules import Nucleus, Sampled, TopK, select_entries
from quantkd.transfer_set.topk import TopKLogprobs
from tests.conftest import refused

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def softmax64(logits, temperature):
    wide = logits.astype(np.float64) / temperature
    weights = np.exp(wide - wide.max())
    return weights / weights.sum()


def merged_classes(probabilities, ids):
    """(k + 1,) the stored classes and, last, the summed mass of all others."""
    others = np.setdiff1d(np.arange(probabilities.size), ids)
    return np.append(probabilities[ids], probabilities[others].sum() if others.size else 0.0)


def kl64(p, q):
    live = p > 0
    return float((p[live] * np.log(p[live] / q[live])).sum())


def reference(teacher, student, labels, ids_per_position, alpha, temperature, divergence, beta):
    total = 0.0
    for teacher_row, student_row, label, ids in zip(teacher, student, labels, ids_per_position, strict=True):
        p = merged_classes(softmax64(teacher_row, temperature), ids)
        q = merged_classes(softmax64(student_row, temperature), ids)
        m = beta * p + (1 - beta) * q
        jsd = beta * kl64(p, m) + (1 - beta) * kl64(q, m)
        soft = {"forward_kl": kl64(p, q), "reverse_kl": kl64(q, p), "jsd": jsd}[divergence]
        total += (1 - alpha) * -np.log(softmax64(student_row, 1.0)[label]) + alpha * temperature**2 * soft
    return total


@pytest.mark.parametrize(
    ("divergence", "temperature", "rule"),
    list(itertools.product(DIVERGENCES, (1.0, 2.0), (TopK(1), TopK(5), TopK(22), TopK(23), Nucleus(0.9, 8), "dense"))),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_match_the_dense_reference(divergence, temperature, rule, dtype):
    generator = torch.Generator().manual_seed(7)
    positions, vocab, alpha, beta = 3, 23, 0.7, 0.3
    teacher = torch.randn(positions, vocab, generator=generator, dtype=torch.float64) * 2
    student = (teacher + torch.randn(positions, vocab, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(vocab, (positions,), generator=generator)
    dense = rule == "dense"
    entries = TopKLogprobs.from_dense(teacher, (1.0, 2.0)) if dense else select_entries(teacher, rule, (1.0, 2.0))
    ids = [each.numpy() for each in entries.token_ids.split(entries.counts.tolist())]
    student.requires_grad_()
    terms = compute_position_terms(student, labels, entries, temperature=temperature, divergence=divergence, beta=beta)
    loss = terms.mix(alpha, temperature).sum()
    loss.backward()

    def expected(moved):
        return reference(teacher.numpy(), moved, labels.numpy(), ids, alpha, temperature, divergence, beta)

    wide = student.detach().double().numpy()
    assert loss.item() == pytest.approx(expected(wide), rel=1e-5)
    # Central differences in float64, so that not even the reference's own derivative is trusted.
    gradient, step = np.zeros_like(wide), 1e-5
    for index in np.ndindex(*wide.shape):
        moved = np.zeros_like(wide)
        moved[index] = step
        gradient[index] = (expected(wide + moved) - expected(wide - moved)) / (2 * step)
    assert np.linalg.norm(student.grad.numpy() - gradient) <= 1e-5 * np.linalg.norm(gradient)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 40), st.data())
def test_teacher_equal_to_student_gives_no_divergence(positions, vocab, data):
    k = data.draw(st.integers(1, vocab))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits = torch.randn(positions, vocab, generator=generator, dtype=torch.float64) * 4
    labels = torch.zeros(positions, dtype=torch.long)
    entries, exact = select_entries(logits, TopK(k), (1.0, 2.0)), logits.log_softmax(-1)
    entries = replace(  # without the rounding to float32, which a small tail would show
        entries,
        logprobs=exact[entries.positions, entries.token_ids],
        log_normalizers=torch.stack([exact.logsumexp(-1), (exact / 2).logsumexp(-1)], -1),
    )
    for temperature, divergence in itertools.product((1.0, 2.0), DIVERGENCES):
        terms = compute_position_terms(logits, labels, entries, temperature=temperature, divergence=divergence)
        # Reverse KL takes a tail p below 2^-24 for 2^-24, which moves q log(q / p) by at most 2^-24 / e.
        assert terms.kl.abs().max() < (2.0**-24 / math.e if divergence == "reverse_kl" else 0) + 1e-12


def test_tail_survives_where_one_minus_the_sum_would_be_noise():
    """Teacher and student hold all but 1e-9 of their mass in one entry: the tail's gradient keeps its digits."""
    teacher, student = torch.full((1, 1000), -25.0), torch.full((1, 1000), -20.0)
    teacher[0, 0] = student[0, 0] = 0.0
    student.requires_grad_()
    entries = select_entries(teacher, TopK(1), (1.0,))
    compute_position_terms(student, torch.tensor([0]), entries).kl.sum().backward()
    q = softmax64(student.detach().numpy()[0], 1.0)
    p_tail = 1 - float(entries.logprobs.double().exp())
    expected = q[1:] * (1 - p_tail / q[1:].sum())
    np.testing.assert_allclose(student.grad[0, 1:].numpy(), expected, rtol=1e-4)


def test_sums_are_in_float64_where_the_device_has_it():
    assert [wide_dtype(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [*[torch.float64] * 2, torch.float32]


def test_batch_loss_shifts_once_and_ignores_padding():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 6, 9, generator=generator)
    labels = torch.tensor([[-100, -100, 3, 4, 5, -100], [-100, 1, -100, -100, -100, -100]])
    predicting = torch.cat([logits[0, 1:4], logits[1, 0:1]])  # the logits one place to the left of each label
    targets = torch.tensor([3, 4, 5, 1])
    entries = select_entries(torch.randn(4, 9, generator=generator), TopK(3), (1.0,))
    loss = compute_distillation_loss(logits, labels, entries, alpha=0.5)
    terms = compute_position_terms(predicting, targets, entries)
    torch.testing.assert_close(loss, terms.mix(0.5, 1.0).mean())
    padded = torch.cat([logits, torch.randn(2, 3, 9, generator=generator)], dim=1)
    padded_labels = torch.cat([labels, torch.full((2, 3), -100)], dim=1)
    torch.testing.assert_close(compute_distillation_loss(padded, padded_labels, entries, alpha=0.5), loss)


def test_nothing_to_learn_gives_zero_and_a_zero_gradient():
    logits, nothing = torch.randn(2, 3, 9, requires_grad=True), torch.full((2, 3), -100)
    empty = select_entries(torch.randn(0, 9), TopK(3), (1.0,))
    loss = compute_distillation_loss(logits, nothing, empty, alpha=0.5)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0
    rows = compute_row_metrics(TargetStates(logits.detach()), nothing, empty, Objective(1.0))
    assert rows.shape == (2, 5) and not rows.any() and summarize_rows(rows)["perplexity"] == 1


def test_sampled_entries_estimate_the_dense_gradient_without_bias():
    generator = torch.Generator().manual_seed(11)
    teacher, student = torch.randn(1, 12, generator=generator), torch.randn(1, 12, generator=generator)
    mean = torch.zeros(12)
    for _ in range(400):
        entries = select_entries(teacher, Sampled(50), (1.0,), uniforms=torch.rand(1, 50, generator=generator))
        logits = student.clone().requires_grad_()
        compute_position_terms(logits, torch.tensor([0]), entries).kl.sum().backward()
        mean += logits.grad[0] / 400
    expected = student.softmax(-1)[0] - teacher.softmax(-1)[0]
    assert (mean - expected).abs().max() < 6e-3  # 400 * 50 draws: a standard error of about 3e-3 at most


@pytest.mark.parametrize(("change", "message"), [
    ({"alpha": 1.5}, r"alpha is 1.5; expected .*\[0, 1\]"), ({"divergence": "kl"}, "forward_kl, reverse_kl, jsd"),
    ({"temperature": 0.0}, "temperature is 0.0; expected a finite number above 0"),
    ({"temperature": 4.0}, r"known for temperatures \[1.0, 2.0\]; 4.0 was asked for.*--temperatures 4.0"),
    ({"divergence": "jsd", "beta": 1.0}, "beta is 1.0; jsd needs 0 < beta < 1"),
    ({"labels": torch.tensor([[-100, 1, -100]])}, "each of 1 target positions, found 2"),
    ({"logits": torch.zeros(1, 3, 9)}, "reach id 29, the student's vocabulary ends at 8"),
    ({"labels": torch.tensor([[-100, 1]])}, r"states of \(1, 3\) positions for labels of \(1, 2\)"),
])  # fmt: skip
def test_refusals_say_what_to_do(change, message):
    teacher = select_entries(torch.randn(2, 30), TopK(30), (1.0, 2.0))
    fine = {"logits": torch.randn(1, 3, 30), "labels": torch.tensor([[-100, 1, 2]]), "teacher": teacher, "alpha": 0.5}
    refused(ConfigError, message, compute_distillation_loss, **{**fine, **change})


def test_positions_are_cut_into_parts_that_fit_and_there_is_one_at_least():
    narrow, wide = torch.empty(5, 37, device="meta"), torch.empty(5, 2**24, device="meta")
    assert cut_positions(TargetStates(narrow), dense=True) == [slice(0, 5)]
    assert cut_positions(TargetStates(narrow[:0]), dense=True) == [slice(0, 0)]
    # 512 MiB on an accelerator: two positions of this width with their copies, one where two models are compared.
    assert cut_positions(TargetStates(wide), dense=False) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert len(cut_positions(TargetStates(wide), dense=True)) == 5
