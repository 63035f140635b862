"""What the tests of teachers share: the entries of a row by a dense float64 pass."""

import itertools

import numpy as np
import torch

from quantkd import Nucleus, TopK

KINDS = ["vllm", "sglang", "llama.cpp"]


def dense_logprobs(model, row) -> torch.Tensor:
    """(R, V) float64 at the targets of a row, stored or not, from one unpadded pass: no batch, no cache, no padding."""
    if isinstance(row, dict):
        ids, targets = row["input_ids"], (row["labels"] != -100).nonzero().squeeze(1)
    else:
        ids, targets = torch.tensor(row.input_ids), torch.cat([torch.arange(*span) for span in row.spans.tolist()])
    with torch.inference_mode():
        return model(input_ids=ids[None]).logits[0, targets - 1].double().log_softmax(-1)


def add_noise(model):
    """Noise on every weight, which stands for quantization."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def sparse_divergences(teacher, log_q) -> np.ndarray:
    """(2, R) forward and reverse KL to `log_q` (R, V) over a row's stored entries, and the rest as one class."""
    found = []
    for (start, stop), dense in zip(itertools.pairwise(teacher.offsets.tolist()), log_q, strict=True):
        p = teacher.logprobs[start:stop].double().exp()
        q = dense.exp()[teacher.token_ids[start:stop]]
        p, q = (torch.cat([kept, 1 - kept.sum(0, keepdim=True)]) for kept in (p, q))
        found.append((float((p * (p / q).log()).sum()), float((q * (q / p).log()).sum())))
    return np.array(found).T


def assert_stored(stored: torch.Tensor, exact: torch.Tensor) -> None:
    """`stored` is `exact` (log-probabilities) but for what float16 rounds, as docs/transfer-set-format.md bounds it."""
    exact, stored = exact.double(), stored.double()
    error = (stored.exp() - exact.exp()).abs()
    bound = exact.exp() * (exact.abs() + 2**-14) / 1024 + 2e-5  # for float32 sums taken in another order
    assert bool((error <= bound).all()), (error - bound).max()


def assert_entries(row, model, rule) -> None:
    """The entries are those that the rule keeps of the dense distribution, found one target at a time."""
    dense, place = dense_logprobs(model, row), 0
    assert len(dense) == len(row.counts)
    for target, count in zip(dense, row.counts.tolist(), strict=True):
        ranked = sorted(target.tolist(), reverse=True)
        expected = rule.k if isinstance(rule, TopK) else 1
        if isinstance(rule, Nucleus):
            while expected < rule.max_k and sum(np.exp(ranked[:expected])) < rule.p:
                expected += 1
        assert count == expected
        ids, values = row.token_ids[place : place + count], row.logprobs[place : place + count]
        np.testing.assert_allclose(values, ranked[:count], atol=1e-4)
        np.testing.assert_allclose(values, target[torch.from_numpy(ids)], atol=1e-4)
        place += count
    assert place == len(row.token_ids) and not row.log_normalizers.any()
