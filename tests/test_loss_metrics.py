"""Sums per row against explicit tables in float64: stored and live teachers, with and without a head."""

import numpy as np
import pytest
import torch

from quantkd.loss.metrics import compute_row_metrics, cut_positions, summarize_rows
from quantkd.loss.reference import Objective
from quantkd.loss.states import Head, TargetStates
from quantkd.transfer_set.rules import TopK, select_entries
from tests.test_loss_reference import ids_of, kl64, merged_classes, softmax64

VOCAB = 37
# Nothing predicts a first token, so the 7 is not a target; the last row has none.
LABELS = torch.tensor([[-100, 3, -100, 36, 5], [7, -100, -100, -100, 0], [-100] * 5])
TARGETS = [(0, 1), (0, 3), (0, 4), (1, 4)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(("divergence", "temperature"), [("forward_kl", 1.0), ("forward_kl", 2.0), ("reverse_kl", 1.0)])
def test_rows_hold_sums_over_their_targets(fused, in_memory, divergence, temperature):
    generator = torch.Generator().manual_seed(5)
    states = TargetStates(
        torch.randn(*LABELS.shape, 8, generator=generator, dtype=torch.float64),
        Head(torch.randn(VOCAB, 8, generator=generator, dtype=torch.float64)),
    )
    teacher_logits = torch.randn(4, VOCAB, generator=generator, dtype=torch.float64) * 2
    stored = select_entries(teacher_logits, TopK(5), (1.0, 2.0))
    ids = [np.arange(VOCAB)] * 4 if in_memory else ids_of(stored)
    student = states if fused else TargetStates(states.logits())
    teacher = TargetStates(teacher_logits) if in_memory else stored
    found = compute_row_metrics(student, LABELS, teacher, Objective(0.7, temperature, divergence))
    logits, expected = states.logits().numpy(), np.zeros((3, 5))
    for place, (row, position) in enumerate(TARGETS):
        student, teacher = logits[row, position - 1], teacher_logits[place].numpy()

        def kl(temperature, divergence, place=place, teacher=teacher, student=student):
            p, q = (merged_classes(softmax64(each, temperature), ids[place]) for each in (teacher, student))
            return kl64(p, q) if divergence == "forward_kl" else kl64(q, p)

        ce = -np.log(softmax64(student, 1.0)[LABELS[row, position]])
        loss = 0.3 * ce + 0.7 * temperature**2 * kl(temperature, divergence)
        expected[row] += [1, kl(1.0, "forward_kl"), ce, student.argmax() == teacher.argmax(), loss]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    means = summarize_rows(found)
    assert means["perplexity"] == pytest.approx(np.exp(expected[:, 2].sum() / expected[:, 0].sum()), rel=1e-5)


def test_positions_are_cut_into_parts_that_fit_and_there_is_one_at_least():
    narrow, wide = torch.empty(5, VOCAB, device="meta"), torch.empty(5, 2**24, device="meta")
    assert cut_positions(TargetStates(narrow), dense=True) == [slice(0, 5)]
    assert cut_positions(TargetStates(narrow[:0]), dense=True) == [slice(0, 0)]
    # 512 MiB on an accelerator: two positions of this width with their copies, one where two models are compared.
    assert cut_positions(TargetStates(wide), dense=False) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert len(cut_positions(TargetStates(wide), dense=True)) == 5


def test_no_target_at_all_makes_sums_of_zero():
    states = TargetStates(torch.randn(2, 3, VOCAB))
    nothing = torch.full((2, 3), -100)
    entries = select_entries(torch.randn(0, VOCAB), TopK(2), (1.0,))
    rows = compute_row_metrics(states, nothing, entries, Objective(1.0))
    assert rows.shape == (2, 5) and not rows.any() and summarize_rows(rows)["perplexity"] == 1
