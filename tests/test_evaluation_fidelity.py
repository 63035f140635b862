"""Fidelity against float64 expressions over the logits of plain forward passes, on a set that the tiny model wrote."""

import json
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkd.cli.evaluate import main
from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.arms import CONFIDENCE_BINS, ENTROPY_EDGES, POSITION_EDGES, find_bins
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.report import build_report
from tests.conftest import build_tiny_model, refused, save_tiny_model
from tests.teacher_rows import add_noise, dense_logprobs, sparse_divergences

pytestmark = pytest.mark.usefixtures("no_pictures", "few_draws")
student = pytest.fixture(lambda tiny_model: add_noise(tiny_model))


@pytest.fixture(scope="module")
def teacher(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path).eval()


def dense_rows(model, held_out):
    """Per row the (n, V) float64 log-probabilities at its targets, from one unpadded pass, and the targets."""
    return [(dense_logprobs(model, item), item["labels"][item["labels"] != -100]) for item in held_out]


def test_figures_equal_float64_expressions(student, teacher, held_out):
    found = evaluate_fidelity(student, held_out, teacher=teacher, batch_size=2, progress=False)
    sparse = evaluate_fidelity(student, held_out, batch_size=3, progress=False)
    assert "dense_kl" not in sparse.means and sparse.list_bins("dense_position") is None
    tokens = 0
    rows = zip(dense_rows(student, held_out), dense_rows(teacher, held_out), strict=True)
    for place, ((log_q, targets), (log_p, _)) in enumerate(rows):
        row = {name: column[place] for name, column in found.columns.items()}
        forward = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
        backward = torch.nn.functional.kl_div(log_p, log_q, reduction="sum", log_target=True)
        assert row["dense_kl_sum"] == pytest.approx(float(forward), rel=1e-4, abs=1e-5)
        assert row["dense_reverse_kl_sum"] == pytest.approx(float(backward), rel=1e-4, abs=1e-5)
        ce = torch.nn.functional.nll_loss(log_q, targets, reduction="sum")
        assert row["ce_sum"] == pytest.approx(float(ce), rel=1e-5)
        assert row["dense_agree"] == row["agree"] == int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
        assert row["tokens"] == len(targets)
        tokens += len(targets)
        expected = sparse_divergences(held_out[place]["teacher"], log_q).sum(1)
        for each in (found, sparse):
            sums = [each.columns[name][place] for name in ("kl_sum", "reverse_kl_sum")]
            np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-5)
    figures = found.means
    assert figures["perplexity"] == pytest.approx(math.exp(float(found.columns["ce_sum"].sum()) / tokens))
    assert 0.01 < figures["kl"] <= figures["dense_kl"] + 1e-6  # merging classes into a tail loses KL, never adds


def test_bins_add_up_and_hold_what_they_say(student, teacher, held_out):
    found = evaluate_fidelity(student, held_out, teacher=teacher, progress=False)
    for kind in ("position", "entropy", "confidence", "dense_position", "dense_entropy"):
        np.testing.assert_array_equal(found.columns[f"{kind}/tokens"].sum(1), found.columns["tokens"])
        if kind != "confidence":
            total = "dense_kl_sum" if kind.startswith("dense") else "kl_sum"
            np.testing.assert_allclose(found.columns[f"{kind}/kl_sum"].sum(1), found.columns[total])
    student_rows, teacher_rows = dense_rows(student, held_out), dense_rows(teacher, held_out)
    for place, ((log_q, targets), (log_p, _)) in enumerate(zip(student_rows, teacher_rows, strict=True)):
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
        spots = np.searchsorted(POSITION_EDGES, np.arange(len(kl)), side="right") - 1
        expected = [kl[spots == one].sum() for one in range(len(POSITION_EDGES))]
        np.testing.assert_allclose(found.columns["dense_position/kl_sum"][place], expected, rtol=1e-4, atol=1e-5)
        entropy = -(log_p.exp() * log_p).sum(-1).numpy()
        counts = np.histogram(entropy, [*ENTROPY_EDGES, np.inf])[0]
        assert found.columns["dense_entropy/tokens"][place].tolist() == counts.tolist()
        confidence, top = log_q.exp().max(-1)
        counts = np.histogram(-confidence, -np.linspace(1, 0, CONFIDENCE_BINS + 1))[0][::-1]  # (a, b], as in the paper
        assert found.columns["confidence/tokens"][place].tolist() == counts.tolist()
        assert float(found.columns["confidence/confidence_sum"][place].sum()) == pytest.approx(float(confidence.sum()))
        assert int(found.columns["confidence/correct"][place].sum()) == int((top == targets).sum())
    assert found.columns["position/tokens"].sum(0)[2] > 0  # answers that reach the third bin


def test_teacher_against_itself_is_at_zero(tiny_model, held_out):
    tiny_model.train()
    tiny_model.model.layers[0].eval()  # as someone who trains only a part has it
    figures = evaluate_fidelity(tiny_model, held_out, teacher=tiny_model, progress=False).means
    assert figures["dense_kl"] == figures["dense_reverse_kl"] == 0 and figures["dense_top1_agreement"] == 1
    assert abs(figures["kl"]) < 1e-3 and figures["top1_agreement"] == 1  # the store rounds its entries
    assert 0 <= figures["ece"] < 1
    assert tiny_model.training and not tiny_model.model.layers[0].mlp.training and tiny_model.lm_head.training
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())


def test_a_chunk_a_batch_and_a_wrapped_head_change_nothing(student, held_out, teacher, monkeypatch):
    expected = evaluate_fidelity(student, held_out, teacher=teacher, batch_size=5, progress=False)

    def check(found):
        assert found.columns.keys() == expected.columns.keys()
        for name, sums in found.columns.items():
            np.testing.assert_allclose(sums, expected.columns[name], rtol=1e-4, atol=1e-4, err_msg=name)

    monkeypatch.setattr("quantkd.loss.metrics.chunk_bytes", lambda device: 4 * 320 * 3)  # three positions
    monkeypatch.setattr("quantkd.loss.fused._CPU_BLOCK_BYTES", 4 * 320 * 2)
    check(evaluate_fidelity(student, held_out, teacher=teacher, batch_size=1, progress=False))
    monkeypatch.setattr("quantkd.models.network.why_not_fusable", lambda model: "a test says so")
    check(evaluate_fidelity(student, held_out, teacher=teacher, batch_size=2, progress=False))


def test_modes_return_after_an_error(student, held_out, tiny_tokenizer):
    teacher = build_tiny_model(tiny_tokenizer).train()
    student.train().model.layers[0].eval()
    student.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(DataError, match="5 of 5 rows are not finite: the logits hold NaN"):
        evaluate_fidelity(student, held_out, teacher=teacher, progress=False)

    student.model.layers[1].register_forward_hook(Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate_fidelity(student, held_out, teacher=teacher, progress=False)
    assert teacher.training and student.training and student.lm_head.training
    assert not student.model.layers[0].training and not student.model.layers[0].mlp.training


def test_what_cannot_be_compared_is_refused(tiny_model, held_out, tiny_tokenizer):
    large, small = build_tiny_model(tiny_tokenizer), build_tiny_model(tiny_tokenizer)
    large.resize_token_embeddings(330)
    small.resize_token_embeddings(300)
    for model, rows, teacher, message in (
        (tiny_model, held_out, large, "vocabulary has 320 ids, the teacher's 330"),
        (small, held_out, None, r"head has 300 rows, .* up to 319"),
        (tiny_model, held_out[:0], None, "holds 0 rows; expected at least one"),
    ):
        refused((ConfigError, DataError), message, evaluate_fidelity, model, rows, teacher=teacher, progress=False)


def test_bin_borders():
    places = np.array([0, 7, 8, 15, 16, 511, 512, 9000])
    assert find_bins("position", places).tolist() == [0, 0, 1, 1, 2, 6, 7, 7]
    assert find_bins("entropy", np.array([-1e-9, 0.0, 0.01, 5.0])).tolist() == [0, 0, 1, 5]
    confidences = np.array([1e-9, 0.2, 0.2 + 1e-9, 0.5, 1.0])
    assert find_bins("confidence", confidences).tolist() == [0, 2, 3, 7, 14]  # a bin has its upper end: 0.2 is 3/15


def test_arms_with_the_teacher_at_hand_make_a_report(tiny_model_path, tiny_tokenizer, held_out, tmp_path):
    """From the command line to the page: calibration of the teacher too, and the same bytes from the kept records."""
    other = save_tiny_model(tiny_tokenizer, tmp_path / "other", seed=1)
    shared = f"--held_out {held_out.sources[0]} --run_dir {tmp_path}/run --teacher {tiny_model_path} --dtype float32"
    for arm, model in (("teacher", tiny_model_path), ("before", other), ("after", tiny_model_path)):
        main(f"--arm {arm} --model_name_or_path {model} --full_precision {shared}".split())
    page = build_report(tmp_path / "run")
    written = (page.parent / "results.json").read_bytes()
    results = json.loads(written)
    teacher, before, after = (results["arms"][name] for name in ("teacher", "before", "after"))
    assert 0 <= teacher["metrics"]["ece"]["value"] == after["metrics"]["ece"]["value"] <= 1
    assert teacher["metrics"]["dense_kl"]["value"] == 0 < before["metrics"]["dense_kl"]["value"]
    assert results["gap_recovered"]["dense_kl"] == 1 and "whole vocabulary: entropy (nats)" in page.read_text()
    main(f"--arm after --model_name_or_path {tiny_model_path} --full_precision {shared}".split())
    build_report(tmp_path / "run")
    assert (page.parent / "results.json").read_bytes() == written
    arm = (page.parent / "evaluation" / "before.json").read_text()
    assert len(arm.splitlines()) < 40 * len(held_out)
    with pytest.raises(ConfigError, match="teacher has no effect without held_out"):
        main(["--arm", "after", "--model_name_or_path", "x", "--run_dir", "r", "--prompts", "p", "--teacher", "y"])
