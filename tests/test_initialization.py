"""The start from the quantization error: optimal in closed form, exact at full rank, better than zero on a model."""

from __future__ import annotations

import pytest
import torch

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, capture
from quantkd.errors import ConfigError
from quantkd.initialization import OriginalWeights, compute_correction

PROMPTS = [f"What is {n} and {n + 1}, and a few words more?" for n in range(12)]


def weighted_error(error, correction, moment):
    left = error - correction
    return float((left @ moment @ left.T).trace())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_no_other_matrix_of_the_rank_does_better(rank):
    """Against numpy's dense SVD of E times a Cholesky root, a different root than the one in use."""
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    inputs = torch.randn(50, 7, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 7)
    moment = inputs.T @ inputs / 50
    shrunk = moment + moment.diagonal().mean() * 1e-2 * torch.eye(7, dtype=torch.float64)
    up, down = compute_correction(error, moment, rank)
    root = torch.linalg.cholesky(shrunk)
    left, sigma, right = torch.linalg.svd(error @ root, full_matrices=False)
    best = (left[:, :rank] * sigma[:rank]) @ right[:rank] @ torch.linalg.inv(root)
    ours = weighted_error(error, up @ down, shrunk)
    assert ours == pytest.approx(weighted_error(error, best, shrunk), rel=1e-6)
    assert ours == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-6)
    assert up.shape == (9, rank) and down.shape == (rank, 7)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_full_rank_gives_back_the_whole_error():
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    inputs = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    up, down = compute_correction(error, inputs.T @ inputs, 5)
    torch.testing.assert_close(up @ down, error)


@pytest.fixture(scope="module")
def transfer_set(tiny_model_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("init") / "set"
    return capture(str(tiny_model_path), PROMPTS, path, max_new_tokens=12, dtype="float32", progress=False)


def build(tiny_model_path, transfer_set, tmp_path, **options):
    options = {"model_init_kwargs": {"dtype": "float32"}, "save_strategy": "no", "disable_tqdm": True, **options}
    args = QuantizedDistillationConfig(str(tmp_path / "out"), **options)
    return QuantizedDistillationTrainer(
        str(tiny_model_path), args, train_dataset=transfer_set, eval_dataset=transfer_set
    )


def test_it_is_nearer_to_the_teacher_than_zero_and_the_same_every_time(tiny_model_path, transfer_set, tmp_path):
    zero = build(tiny_model_path, transfer_set, tmp_path, init="zero").evaluate()["eval_kl"]
    first = build(tiny_model_path, transfer_set, tmp_path)
    second = build(tiny_model_path, transfer_set, tmp_path)
    assert first.evaluate()["eval_kl"] < 0.5 * zero
    for (name, a), (_, b) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        if "lora_" in name:
            assert torch.equal(a, b) and a.abs().max() > 0, name


def test_rows_of_padding_do_not_count(tiny_model_path, transfer_set, tmp_path):
    """A batch of rows and the same batch with padding appended give the same adapters."""
    from quantkd.collator import DistillationCollator
    from quantkd.initialization import initialize_from_error
    from quantkd.student import attach_lora, load_student

    weights = OriginalWeights(str(tiny_model_path))
    found = []
    for multiple in (None, 64):
        batch = DistillationCollator(5, pad_to_multiple_of=multiple)(transfer_set.__getitems__(range(4)))
        torch.manual_seed(0)
        model = attach_lora(load_student(str(tiny_model_path), dtype="float32"))
        model.train()  # without bitsandbytes' bfloat16 kernel, whose sums differ with the width
        assert initialize_from_error(model, batch["input_ids"], batch["attention_mask"], weights) == 14
        up_down = [m.lora_B["default"].weight @ m.lora_A["default"].weight for m in model.modules() if _is_lora(m)]
        found.append(torch.cat([product.flatten() for product in up_down]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.05


def _is_lora(module):
    return hasattr(module, "lora_A") and "default" in module.lora_A


def test_what_cannot_be_done_starts_from_zero_and_says_so(tiny_model_path, transfer_set, tmp_path, caplog):
    from quantkd.student import load_student

    student = load_student(str(tiny_model_path), dtype="float32")
    student.config._name_or_path = str(tmp_path)
    tokenizer = build(tiny_model_path, transfer_set, tmp_path, init="zero").processing_class
    args = QuantizedDistillationConfig(str(tmp_path / "out"), save_strategy="no")
    trainer = QuantizedDistillationTrainer(student, args, train_dataset=transfer_set, processing_class=tokenizer)
    assert "start from zero" in caplog.text and "no safetensors weights" in caplog.text
    assert all(p.abs().max() == 0 for name, p in trainer.model.named_parameters() if "lora_B" in name)
    with pytest.raises(ConfigError, match="init is 'covariance' or 'zero', found 'best'"):
        QuantizedDistillationConfig(str(tmp_path), init="best")
