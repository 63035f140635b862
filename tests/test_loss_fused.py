"""The fused loss against the readable reference: value and every gradient, for all shapes, teachers and objectives."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode

from quantkd.errors import ConfigError
from quantkd.loss.fused import compute_fused_loss
from quantkd.loss.reference import Objective, compute_position_terms
from quantkd.loss.states import Head, TargetStates
from quantkd.transfer_set.rules import Nucleus, Sampled, TopK, select_entries
from quantkd.transfer_set.topk import TopKLogprobs

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
HEADS = {
    "no head": None, "plain": {}, "bias": {"bias": True}, "scale": {"scale": 0.25}, "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 0.5, "softcap": 2.0},
}  # fmt: skip
MIXED = Objective(0.5)


def make(positions, vocab, width=8, *, dtype=torch.float64, seed=0, bias=False, scale=1.0, softcap=None):
    """A student's states, labels, and other logits for a stored teacher."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values, weight = normal(positions, width).to(dtype), normal(vocab, width).to(dtype)
    head = Head(weight, normal(vocab).to(dtype) if bias else None, scale, softcap)
    labels = torch.randint(vocab, (positions,), generator=generator)
    return TargetStates(values, head), labels, normal(positions, vocab) * 2


def make_kind(kind, positions=7, vocab=31, **options):
    states, labels, logits = make(positions, vocab, **{**(HEADS[kind] or {}), **options})
    return (TargetStates(states.logits()) if HEADS[kind] is None else states), labels, logits


def store(logits, rule, temperatures=(1.0,), uniforms=None):
    """Entries in float64, so that the comparison is not one of their rounding."""
    entries = select_entries(logits, rule, temperatures, uniforms)
    return replace(entries, logprobs=entries.logprobs.double())


def leaves_of(states):
    head = () if states.head is None else (states.head.weight, states.head.bias)
    return [tensor.requires_grad_() for tensor in (states.values, *head) if tensor is not None]


def reference(states, labels, entries, objective, weights=None):
    options = {name: getattr(objective, name) for name in ("temperature", "divergence", "beta")}
    terms = compute_position_terms(states.logits(), labels, entries, **options)
    mixed = terms.mix(objective.alpha, objective.temperature)
    return (mixed if weights is None else mixed * weights).sum(), terms


def assert_equal_in_float64(ours, theirs, leaves):
    found, true = ([loss, terms.ce, terms.kl, *torch.autograd.grad(3 * loss, leaves)] for loss, terms in (ours, theirs))
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(("divergence", "temperature"), list(itertools.product(DIVERGENCES, (1.0, 2.0, 3.5))))
def test_equal_to_the_reference_in_float64(divergence, temperature, in_memory, kind):
    states, labels, logits = make_kind(kind)
    if in_memory:  # of its own width
        teacher, _, _ = make_kind(kind, width=6, seed=1)
        entries = TopKLogprobs.from_dense(teacher.logits(), (temperature,))
    else:
        teacher = entries = store(logits, Nucleus(0.8, 20), (1.0, 2.0, 3.5))
    objective = Objective(0.7, temperature, divergence, beta=0.3)
    weights = torch.rand(7, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3
    leaves = leaves_of(states)
    ours = compute_fused_loss(states, labels, teacher, objective, weights, chunk_rows=3)
    assert_equal_in_float64(ours, reference(states, labels, entries, objective, weights), leaves)
    one_chunk, _ = compute_fused_loss(states, labels, teacher, objective, weights)
    torch.testing.assert_close(one_chunk, ours[0])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_shape_teacher_and_chunk(data):
    positions, vocab, seed = data.draw(st.integers(0, 9)), data.draw(st.integers(2, 40)), data.draw(st.integers(0, 99))
    kind = data.draw(st.sampled_from(["no head", "plain"]))
    states, labels, logits = make_kind(kind, positions, vocab, seed=seed)
    k = data.draw(st.integers(1, vocab))
    rule = data.draw(st.sampled_from([TopK(k), TopK(vocab), Nucleus(0.9, k), Sampled(k), "in memory"]))
    temperature = 1.0 if isinstance(rule, Sampled) else data.draw(st.sampled_from([1.0, 2.0]))
    if rule == "in memory":
        temperature = data.draw(st.floats(0.5, 4))
        teacher, _, _ = make_kind(kind, positions, vocab, width=data.draw(st.integers(1, 9)), seed=seed + 1)
        entries = TopKLogprobs.from_dense(teacher.logits(), (temperature,))
    else:
        uniforms = torch.rand(positions, k, generator=torch.Generator().manual_seed(1))
        teacher = entries = store(logits, rule, (temperature,), uniforms if isinstance(rule, Sampled) else None)
    alpha, beta = data.draw(st.sampled_from([0.0, 0.5, 1.0])), data.draw(st.floats(0.1, 0.9))
    objective = Objective(alpha, temperature, data.draw(st.sampled_from(DIVERGENCES)), beta)
    leaves = leaves_of(states)[:1]
    ours = compute_fused_loss(states, labels, teacher, objective, chunk_rows=data.draw(st.integers(1, 10)))
    assert_equal_in_float64(ours, reference(states, labels, entries, objective), leaves)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_float32_is_as_exact_as_the_reference(temperature):
    states, labels, logits = make(40, 3000, 32, dtype=torch.float32)
    entries, objective = select_entries(logits, TopK(20), (1.0, 2.0)), Objective(0.5, temperature)
    wide = states.to(torch.float64)
    leaves = [each.values.requires_grad_() for each in (states, wide)]
    loss, _ = compute_fused_loss(states, labels, entries, objective)
    expected, _ = reference(wide, labels, entries, objective)
    ours, theirs = (torch.autograd.grad(value, leaf)[0] for value, leaf in zip((loss, expected), leaves, strict=True))
    assert abs(float((loss / expected).detach()) - 1) < 1e-5
    assert float((ours.double() - theirs).norm() / theirs.norm()) < 1e-5


def errors_and_naive_errors(states, labels, teacher, entries, objective):
    """Error norms of CE, divergence and gradients against the same inputs in float64: ours, then the naive way's."""

    def run(states, compute):
        states = states.map(lambda tensor: tensor.detach().requires_grad_())
        loss, terms = compute(states)
        gradients = torch.autograd.grad(loss, leaves_of(states))
        return [part.detach().double() for part in (terms.ce, terms.kl, *gradients)]

    def naive(states):
        return reference(states, labels, entries, objective)

    def fused(states):
        return compute_fused_loss(states, labels, teacher, objective, chunk_rows=7)

    with torch.autocast("cpu", enabled=False):
        truth = run(states.to(torch.float64), naive)
    for compute in (fused, naive):
        # A sixteenth of bfloat16's rounding counts as none: roundings of a single position may cancel in the naive way.
        yield [
            max(float((part - true).norm()), torch.finfo(torch.bfloat16).eps / 16 * float(true.norm()))
            for part, true in zip(run(states, compute), truth, strict=True)
        ]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_bfloat16_is_no_worse_than_the_naive_way(data):
    positions, vocab = data.draw(st.integers(1, 30)), data.draw(st.integers(30, 600))
    states, labels, logits = make(positions, vocab, 32, dtype=torch.bfloat16, seed=data.draw(st.integers(0, 99)))
    entries = select_entries(logits, TopK(data.draw(st.sampled_from([1, 20, vocab]))), (1.0, 2.0))
    objective = Objective(0.5, data.draw(st.sampled_from([1.0, 2.0])), data.draw(st.sampled_from(DIVERGENCES)))
    ours, naive = errors_and_naive_errors(states, labels, entries, entries, objective)
    assert all(error <= 1.5 * bound for error, bound in zip(ours, naive, strict=True)), (ours, naive)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")])
def test_autocast_is_no_worse_than_the_naive_way(in_memory, dtypes):
    hidden_dtype, head_dtype = (getattr(torch, name) for name in dtypes)
    states, labels, logits = make(40, 3000, 32, dtype=torch.float32)
    head = Head(states.head.weight.to(head_dtype))
    states = TargetStates(states.values.to(hidden_dtype), head)
    teacher = entries = select_entries(logits, TopK(20), (1.0,))
    with torch.autocast("cpu", torch.bfloat16):
        if in_memory:
            teacher = TargetStates(states.values.flip(1), head)
            entries = TopKLogprobs.from_dense(teacher.logits())
        ours, naive = errors_and_naive_errors(states, labels, teacher, entries, MIXED)
        states.values.requires_grad_()
        loss, _ = compute_fused_loss(states, labels, teacher, MIXED)
    loss.backward()
    assert states.values.grad.dtype == states.values.dtype
    assert all(error <= 1.5 * bound for error, bound in zip(ours, naive, strict=True)), (ours, naive)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_far_apart_logits_stay_finite(temperature):
    """The tail is 200 nats below the entries: exponentials under one common maximum would all be 0."""
    weight = torch.full((50, 2), -200.0)
    weight[3] = 0.0
    states = TargetStates(torch.eye(2).requires_grad_(), Head(weight))
    labels = torch.tensor([3, 9])
    entries = select_entries(torch.randn(2, 50, generator=torch.Generator().manual_seed(0)), TopK(5), (1.0, 2.0))
    entries = replace(entries, token_ids=torch.tensor([3, 4, 5, 6, 7] * 2))
    objective = Objective(0.5, temperature)
    loss, _ = compute_fused_loss(states, labels, entries, objective)
    expected, _ = reference(states, labels, entries, objective)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, states.values)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    states, labels, logits = make(5, 31)
    entries = select_entries(logits, TopK(5), (1.0,))
    product = 2 * 5 * 31 * 8  # floating point operations of one matrix product

    def count():
        with FlopCounterMode(display=False) as counter:
            compute_fused_loss(states, labels, entries, MIXED)
        return counter.get_total_flops()

    assert count() == product
    states.values.requires_grad_()
    assert count() == 2 * product
    compute_fused_loss(states, labels, entries, MIXED)[0].backward()
    assert states.head.weight.grad is None and states.values.grad is not None
    states.head.weight.requires_grad_()
    assert count() == 3 * product
    states.values.requires_grad_(False)
    assert count() == 2 * product
    with torch.no_grad():
        assert not compute_fused_loss(states, labels, entries, MIXED)[0].requires_grad and count() == product


def test_states_are_selected_and_a_teacher_gets_no_gradient():
    states, labels, _ = make(5, 31)
    teacher, _, _ = make(5, 31, 6, seed=1)
    index = torch.tensor([3, 0])
    assert len(teacher) == 5 and len(teacher.select(index)) == 2
    assert len(teacher.select(torch.tensor([True, False, True, True, False]))) == 3
    leaves_of(teacher)
    loss, whole = compute_fused_loss(states, labels, teacher, MIXED)
    assert not loss.requires_grad
    _, part = compute_fused_loss(states.select(index), labels[index], teacher.select(index), MIXED)
    torch.testing.assert_close(part.kl, whole.kl[index])


@pytest.mark.parametrize("kind", ["plain", "no head"])
def test_the_callers_logits_stay_and_what_does_not_fit_is_refused(kind):
    states, labels, logits = make_kind(kind)
    teacher, _, _ = make_kind(kind, seed=1)
    before = states.values.clone(), teacher.values.clone()
    states.logits().zero_(), states.logits(slice(2)).zero_()
    compute_fused_loss(states, labels, teacher, MIXED)
    compute_fused_loss(states, labels, store(logits, TopK(3)), MIXED)
    assert torch.equal(states.values, before[0]) and torch.equal(teacher.values, before[1])
    states, labels, logits = make_kind(kind, 5, 31)
    entries, wide = (TopKLogprobs.from_dense(each) for each in (logits[:4], torch.randn(5, 60)))
    teacher, wide_teacher = make_kind(kind, 5, 31)[0], make_kind(kind, 5, 32)[0]
    for given_teacher, weights, message in (
        (entries, None, "each of 5 target positions, found 4"),
        (wide, None, "reach id 59, the student's vocabulary ends at 30"),
        (teacher.select(slice(2)), None, "each of 5 target positions, found 2"),
        (wide_teacher, None, "teacher's head has 32 tokens, the student's 31"),
        (teacher, torch.ones(4), r"one weight for each of 5 target positions, found the shape \(4,\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            compute_fused_loss(states, labels, given_teacher, MIXED, weights)
