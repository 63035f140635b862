"""What the chunks of the loss and of the metrics really hold, copies included, and what float16 keeps of a gradient."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from pretended_device import pretended_device
from torch.profiler import ProfilerActivity, profile

from quantkd.loss.fused import compute_fused_loss
from quantkd.loss.metrics import compute_row_metrics
from quantkd.loss.reference import Objective, compute_position_terms
from quantkd.loss.states import Head, TargetStates
from quantkd.transfer_set.rules import TopK, select_entries

N, H, V = 36, 16, 2048
BUDGET = 12 * 4 * 8 * V  # twelve positions of the loss that holds most


def peak_bytes(run):
    """The most that torch held at once beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        held += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, held)
    return most


def make_states(softcap, dtype, *shape):
    head = Head(torch.randn(V, H, dtype=dtype), softcap=softcap)
    return TargetStates(torch.randn(*shape, H, dtype=dtype), head)


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    for name in ("fused.chunk_bytes", "metrics.chunk_bytes"):
        monkeypatch.setattr(f"quantkd.loss.{name}", lambda device: BUDGET)
    monkeypatch.setattr("quantkd.loss.fused._CPU_BLOCK_BYTES", 4 * V)  # a position
    torch.manual_seed(0)
    with pretended_device() if request.param == "cuda" else nullcontext():
        yield request.param


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_chunk_of_the_loss_stays_within_its_memory(device, softcap, divergence, dense):
    most = 0
    for temperature, dtype in ((1.0, torch.bfloat16), (2.0, torch.float32), (3.0, torch.float32)):
        states, beside = (make_states(softcap, dtype, N).to(torch.device(device)) for _ in range(2))
        stored = select_entries(beside.logits(), TopK(8), (1.0, temperature))
        labels = torch.randint(0, V, (N,)).to(device)
        objective = Objective(0.5, temperature, divergence)
        states.values.requires_grad_()
        run = partial(compute_fused_loss, states, labels, beside if dense else stored, objective)
        most = max(most, peak_bytes(run))
    assert BUDGET / 2 < most < 1.1 * BUDGET + 4 * V * H  # a 16-bit head may be copied for a product


@pytest.mark.parametrize("dense", [False, True])
def test_a_chunk_of_the_metrics_stays_within_its_memory(device, dense):
    states, beside = (make_states(None, torch.float32, 4, N // 4).to(torch.device(device)) for _ in range(2))
    labels = torch.randint(0, V, (4, N // 4)).to(device)
    teacher, _ = beside.at_targets(labels)
    if not dense:
        teacher = select_entries(teacher.logits(), TopK(8), (1.0,))
    most = peak_bytes(lambda: compute_row_metrics(states, labels, teacher, Objective(1.0)))
    assert BUDGET / 2 < most < 1.1 * BUDGET


def test_float16_keeps_of_a_gradient_what_the_loss_scale_saves():
    """The scale multiplies after the product with the head, and half of the gradient would be below float16 by then."""
    torch.manual_seed(0)
    scale, width = 2.0**16, 128_256
    hidden, weight = torch.randn(4, 64) * 0.3, torch.randn(width, 64) * 0.3
    teacher = select_entries(torch.randn(4, width) * 3, TopK(8), (1.0, 2.0))
    labels, objective = torch.randint(0, width, (4,)), Objective(1.0, 2.0)

    def gradients(fused, dtype):
        leaves = [each.half().to(dtype).requires_grad_() for each in (hidden, weight)]
        if fused:
            loss, _ = compute_fused_loss(TargetStates(leaves[0], Head(leaves[1])), labels, teacher, objective)
        else:
            logits = leaves[0] @ leaves[1].T
            loss = compute_position_terms(logits, labels, teacher, temperature=2.0).mix(1.0, 2.0).sum()
        (loss / 1000 * scale).backward()
        return [each.grad.double() / scale for each in leaves]

    ways = (True, torch.float16), (False, torch.float16), (True, torch.float64)
    for ours, naive, truth in zip(*(gradients(*way) for way in ways), strict=True):
        assert (ours - truth).norm() <= 1.5 * (naive - truth).norm() and (ours - truth).norm() < 0.01 * truth.norm()
