"""The fused loss against the readable reference: value and every gradient, for all shapes and objectives."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode

from quantkd.errors import ConfigError
from quantkd.loss.fused import DenseTeacher, compute_fused_loss
from quantkd.loss.reference import compute_position_terms
from quantkd.models.network import Head
from quantkd.transfer_set.rules import Nucleus, Sampled, TopK, select_entries
from quantkd.transfer_set.topk import TopKLogprobs

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 0.5, "softcap": 2.0},
}


def make(positions, vocab, hidden_size=8, *, dtype=torch.float64, seed=0, bias=False, scale=1.0, softcap=None):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(positions, hidden_size).to(dtype), normal(vocab, hidden_size).to(dtype)
    head = Head(weight, normal(vocab).to(dtype) if bias else None, scale, softcap)
    labels = torch.randint(vocab, (positions,), generator=generator)
    return hidden, head, labels, normal(positions, vocab) * 2


def reference(hidden, head, labels, entries, alpha, temperature, **objective):
    terms = compute_position_terms(head.logits(hidden), labels, entries, temperature=temperature, **objective)
    return terms.mix(alpha, temperature).sum(), terms


def assert_equal_in_float64(fused, expected, terms, leaves):
    torch.testing.assert_close(fused.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fused.ce, terms.ce.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fused.kl, terms.kl.detach(), rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(gradients(fused.loss, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, [tensor for tensor in tensors if tensor is not None])


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("divergence", "temperature"), list(itertools.product(DIVERGENCES, (1.0, 2.0, 3.5))))
def test_equal_to_the_reference_in_float64(divergence, temperature, kind):
    hidden, head, labels, teacher = make(7, 31, **HEADS[kind])
    entries = select_entries(teacher, Nucleus(0.8, 20), (1.0, 2.0, 3.5))
    entries = TopKLogprobs(**{**vars(entries), "logprobs": entries.logprobs.double()})
    leaves = [tensor.requires_grad_() for tensor in (hidden, head.weight, head.bias) if tensor is not None]
    objective = {"divergence": divergence, "beta": 0.3}
    expected, terms = reference(hidden, head, labels, entries, 0.7, temperature, **objective)
    fused = compute_fused_loss(
        hidden, head, labels, entries, alpha=0.7, temperature=temperature, chunk_rows=3, **objective
    )
    assert_equal_in_float64(fused, expected, terms, leaves)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_rule_and_chunk(data):
    positions, vocab = data.draw(st.integers(0, 9)), data.draw(st.integers(2, 40))
    k = data.draw(st.integers(1, vocab))
    rule = data.draw(st.sampled_from([TopK(k), TopK(vocab), Nucleus(0.9, k), Sampled(k)]))
    divergence = data.draw(st.sampled_from(DIVERGENCES))
    temperature = 1.0 if isinstance(rule, Sampled) else data.draw(st.sampled_from([1.0, 2.0]))
    chunk_rows = data.draw(st.integers(1, 10))
    alpha = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    hidden, head, labels, teacher = make(positions, vocab, seed=data.draw(st.integers(0, 99)))
    hidden.requires_grad_()
    uniforms = (
        torch.rand(positions, k, generator=torch.Generator().manual_seed(1)) if isinstance(rule, Sampled) else None
    )
    entries = select_entries(teacher, rule, (temperature,), uniforms)
    entries = TopKLogprobs(**{**vars(entries), "logprobs": entries.logprobs.double()})
    objective = {"divergence": divergence, "beta": 0.5}
    expected, _ = reference(hidden, head, labels, entries, alpha, temperature, **objective)
    fused = compute_fused_loss(
        hidden, head, labels, entries, alpha=alpha, temperature=temperature, chunk_rows=chunk_rows, **objective
    )
    torch.testing.assert_close(fused.loss, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(*(gradients(loss, hidden)[0] for loss in (fused.loss, expected)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_float32_is_as_exact_as_the_reference(temperature):
    hidden, head, labels, teacher = make(40, 3000, 32, dtype=torch.float32)
    entries = select_entries(teacher, TopK(20), (1.0, 2.0))
    hidden.requires_grad_()
    fused = compute_fused_loss(hidden, head, labels, entries, temperature=temperature)
    wide = hidden.detach().double().requires_grad_()
    expected, _ = reference(wide, Head(head.weight.double()), labels, entries, 0.5, temperature)
    assert abs(float(fused.loss / expected) - 1) < 1e-5
    ours, theirs = gradients(fused.loss, hidden)[0].double(), gradients(expected, wide)[0]
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def errors_and_naive_errors(hidden, head, labels, teacher, entries, **objective):
    """Error norms of CE, divergence and gradients against the same inputs in float64: ours, then the naive way's."""

    def run(hidden, weight, compute):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss, terms = compute(leaves[0], Head(leaves[1]))
        return [part.detach().double() for part in (terms.ce, terms.kl, *gradients(loss, *leaves))]

    def naive(hidden, head):
        return reference(hidden, head, labels, entries, 0.5, **objective)

    def fused(hidden, head):
        terms = compute_fused_loss(hidden, head, labels, teacher, chunk_rows=7, **objective)
        return terms.loss, terms

    with torch.autocast("cpu", enabled=False):
        truth = run(hidden.double(), head.weight.double(), naive)
    for compute in (fused, naive):
        yield [float((part - true).norm()) for part, true in zip(run(hidden, head.weight, compute), truth, strict=True)]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_bfloat16_is_no_worse_than_the_naive_way(data):
    positions, vocab = data.draw(st.integers(1, 30)), data.draw(st.integers(30, 600))
    hidden, head, labels, teacher = make(positions, vocab, 32, dtype=torch.bfloat16, seed=data.draw(st.integers(0, 99)))
    entries = select_entries(teacher, TopK(data.draw(st.sampled_from([1, 20, vocab]))), (1.0, 2.0))
    objective = {
        "divergence": data.draw(st.sampled_from(DIVERGENCES)),
        "temperature": data.draw(st.sampled_from([1.0, 2.0])),
    }
    ours, naive = errors_and_naive_errors(hidden, head, labels, entries, entries, **objective)
    assert all(error <= 1.5 * bound for error, bound in zip(ours, naive, strict=True)), (ours, naive)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("hidden_dtype", "head_dtype"), [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")]
)
def test_autocast_is_no_worse_than_the_naive_way(dense, hidden_dtype, head_dtype):
    hidden, head, labels, logits = make(40, 3000, 32, dtype=torch.float32)
    hidden, head = hidden.to(getattr(torch, hidden_dtype)), Head(head.weight.to(getattr(torch, head_dtype)))
    teacher = entries = select_entries(logits, TopK(20), (1.0,))
    with torch.autocast("cpu", torch.bfloat16):
        if dense:
            teacher = DenseTeacher(hidden.flip(1), head)
            entries = TopKLogprobs.from_dense(head.logits(hidden.flip(1)))
        ours, naive = errors_and_naive_errors(hidden, head, labels, teacher, entries, temperature=1.0)
        loss = compute_fused_loss(hidden.requires_grad_(), head, labels, teacher).loss
    loss.backward()
    assert hidden.grad.dtype == hidden.dtype
    assert all(error <= 1.5 * bound for error, bound in zip(ours, naive, strict=True)), (ours, naive)


def test_far_apart_logits_stay_finite():
    """The tail lies 200 nats below the entries: exponentials under one common maximum would all be 0."""
    hidden = torch.eye(2, dtype=torch.float32) * torch.tensor([1.0, 1.0])
    weight = torch.full((50, 2), -200.0)
    weight[3] = 0.0
    entries = select_entries(torch.randn(2, 50, generator=torch.Generator().manual_seed(0)), TopK(5), (1.0, 2.0))
    entries = TopKLogprobs(**{**vars(entries), "token_ids": torch.tensor([3, 4, 5, 6, 7] * 2)})
    for temperature in (1.0, 2.0):
        leaf = hidden.clone().requires_grad_()
        fused = compute_fused_loss(leaf, Head(weight), torch.tensor([3, 9]), entries, temperature=temperature)
        expected, _ = reference(leaf, Head(weight), torch.tensor([3, 9]), entries, 0.5, temperature)
        torch.testing.assert_close(fused.loss, expected)
        torch.testing.assert_close(gradients(fused.loss, leaf)[0], gradients(expected, leaf)[0], rtol=2e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    hidden, head, labels, teacher = make(5, 31)
    entries = select_entries(teacher, TopK(5), (1.0,))
    product = 2 * 5 * 31 * 8  # floating point operations of one matrix product

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            compute_fused_loss(hidden, head, labels, entries)
        return counter.get_total_flops()

    assert count() == product
    hidden.requires_grad_()
    assert count() == 2 * product
    compute_fused_loss(hidden, head, labels, entries).loss.backward()
    assert head.weight.grad is None and hidden.grad is not None
    head.weight.requires_grad_()
    assert count() == 3 * product
    with torch.no_grad():
        assert not compute_fused_loss(hidden, head, labels, entries).loss.requires_grad
        assert count() == product


def test_gradcheck():
    hidden, head, labels, teacher = make(4, 11, 5)
    entries = select_entries(teacher, TopK(4), (1.0, 2.0))
    hidden.requires_grad_()
    head.weight.requires_grad_()

    def loss(hidden, weight):
        return compute_fused_loss(hidden, Head(weight), labels, entries, temperature=2.0, chunk_rows=3).loss

    assert torch.autograd.gradcheck(loss, (hidden, head.weight))


def test_mismatches_are_refused_in_words():
    hidden, head, labels, teacher = make(5, 31)
    with pytest.raises(ConfigError, match="each of 5 target positions, found 4"):
        compute_fused_loss(hidden, head, labels, select_entries(teacher[:4], TopK(3), (1.0,)))
    wide = select_entries(torch.randn(5, 60), TopK(60), (1.0,))
    with pytest.raises(ConfigError, match="reach id 59, the student's vocabulary ends at 30"):
        compute_fused_loss(hidden, head, labels, wide)
    with pytest.raises(ConfigError, match="alpha"):
        compute_fused_loss(hidden, head, labels, select_entries(teacher, TopK(3), (1.0,)), alpha=2)


def dense_teacher(positions, vocab, hidden_size=6, *, seed=1, **kind):
    """A teacher of its own width, and its logits."""
    hidden, head, _, _ = make(positions, vocab, hidden_size, seed=seed, **kind)
    return DenseTeacher(hidden, head), head.logits(hidden)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("divergence", "temperature"), list(itertools.product(DIVERGENCES, (1.0, 2.0, 3.5))))
def test_a_dense_teacher_equals_its_whole_distribution_in_float64(divergence, temperature, kind):
    hidden, head, labels, _ = make(7, 31, **HEADS[kind])
    teacher, teacher_logits = dense_teacher(7, 31, **HEADS[kind])
    entries = TopKLogprobs.from_dense(teacher_logits, temperatures=(temperature,))
    leaves = [tensor.requires_grad_() for tensor in (hidden, head.weight, head.bias) if tensor is not None]
    objective = {"divergence": divergence, "beta": 0.3}
    expected, terms = reference(hidden, head, labels, entries, 0.7, temperature, **objective)
    fused = compute_fused_loss(
        hidden, head, labels, teacher, alpha=0.7, temperature=temperature, chunk_rows=3, **objective
    )
    assert_equal_in_float64(fused, expected, terms, leaves)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_dense_teacher_of_any_shape(data):
    positions, vocab = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 40))
    divergence, alpha = data.draw(st.sampled_from(DIVERGENCES)), data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    temperature = data.draw(st.floats(0.5, 4))
    seed = data.draw(st.integers(0, 99))
    hidden, head, labels, _ = make(positions, vocab, seed=seed)
    teacher, teacher_logits = dense_teacher(positions, vocab, data.draw(st.integers(1, 9)), seed=seed + 1)
    hidden.requires_grad_()
    objective = {"divergence": divergence, "beta": data.draw(st.floats(0.1, 0.9))}
    entries = TopKLogprobs.from_dense(teacher_logits, (temperature,))
    expected, _ = reference(hidden, head, labels, entries, alpha, temperature, **objective)
    chunk_rows = data.draw(st.integers(1, 10))
    fused = compute_fused_loss(
        hidden, head, labels, teacher, alpha=alpha, temperature=temperature, chunk_rows=chunk_rows, **objective
    )
    torch.testing.assert_close(fused.loss, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(*(gradients(loss, hidden)[0] for loss in (fused.loss, expected)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_against_a_dense_teacher(divergence):
    hidden, head, labels, _ = make(4, 11, 5, bias=True)
    teacher, _ = dense_teacher(4, 11)
    leaves = tuple(tensor.requires_grad_() for tensor in (hidden, head.weight, head.bias))

    def loss(hidden, weight, bias):
        return compute_fused_loss(
            hidden, Head(weight, bias), labels, teacher, temperature=1.5, divergence=divergence, chunk_rows=3
        ).loss

    assert torch.autograd.gradcheck(loss, leaves)


def test_a_dense_teacher_is_selected_and_checked():
    hidden, head, labels, _ = make(5, 31)
    teacher, _ = dense_teacher(5, 31)
    index = torch.tensor([3, 0])
    assert len(teacher) == 5 and len(teacher.select(index)) == 2
    assert len(teacher.select(torch.tensor([True, False, True, True, False]))) == 3
    teacher.head.weight.requires_grad_()
    whole = compute_fused_loss(hidden, head, labels, teacher)
    assert not whole.loss.requires_grad
    part = compute_fused_loss(hidden[index], head, labels[index], teacher.select(index))
    torch.testing.assert_close(part.kl, whole.kl[index])
    with pytest.raises(ConfigError, match="each of 5 target positions, found 2"):
        compute_fused_loss(hidden, head, labels, teacher.select(index))
    with pytest.raises(ConfigError, match="teacher's head has 32 tokens, the student's 31"):
        compute_fused_loss(hidden, head, labels, dense_teacher(5, 32)[0])
