"""An audit sees what no format check can: distributions and answers that the teacher would not have given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quantkd import Nucleus, Sampled, TopK, TransferSet
from quantkd.cli.main import main
from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.audit import audit
from quantkd.teacher import GenerationSettings
from quantkd.teacher.transformers import TransformersTeacher
from quantkd.transfer_set import verify
from tests.conftest import build_tiny_model, capture_set

PROMPTS = [f"What is {a} + {b}?" for a in range(4) for b in range(4)]
POISONED = 5


class Poisoner(TransformersTeacher):
    """Tells the truth but for one row."""

    def __init__(self, model, tokenizer, poison, rule=None):
        super().__init__(model, tokenizer, rule or Nucleus(0.95, 64), (1.0,), GenerationSettings(max_new_tokens=12))
        self.poison = poison

    def answer(self, prompts):
        rows = super().answer(prompts)
        return [
            self.poison(row) if prompt.index == POISONED else row for prompt, row in zip(prompts, rows, strict=True)
        ]


def other_token(row):
    """One target's most probable token is made out to be another one."""
    ids = row.token_ids.copy()
    start = int(row.counts[:4].sum())
    used = set(ids[start : start + int(row.counts[4])].tolist())
    ids[start] = next(token for token in range(20, 60) if token not in used)
    return replace(row, token_ids=ids)


def flatter(row):
    return replace(row, logprobs=(row.logprobs - np.float32(0.5)).astype(np.float32))


def other_answer(row):
    ids = row.input_ids.copy()
    ids[int(row.spans[0, 0]) :] = 30
    return replace(row, input_ids=ids)


def write(model, tokenizer, path, poison):
    teacher = Poisoner(model, tokenizer, poison)
    return capture_set(teacher, PROMPTS, path, batch_size=4, tokenizer=tokenizer)


def test_an_honest_set_passes_in_any_batch(tiny_model, tiny_tokenizer, tmp_path):
    honest = write(tiny_model, tiny_tokenizer, tmp_path / "s", lambda row: row)
    found = audit(honest, tiny_model, num_rows=99, batch_size=3, progress=False)
    assert found.passed and found.rows == list(range(16)) and found.greedy == 1.0
    assert max(found.kl) < 1e-4 and min(found.agreement) == 1.0
    drawn = audit(honest, tiny_model, num_rows=5, seed=3, progress=False)
    assert len(set(drawn.rows)) == 5 and drawn.rows != audit(honest, tiny_model, num_rows=5, progress=False).rows


def tied(row):
    """The answer's last token comes second by an eighth of a nat, as far as two logits in bfloat16 lie apart."""
    ids, logprobs = row.token_ids.copy(), row.logprobs.copy()
    start = int(row.counts[:-1].sum())
    ids[start : start + 2] = ids[start : start + 2][::-1]
    logprobs[start : start + 2] = np.float32(-1.2), np.float32(-1.325)
    logprobs[start + 2 :] -= np.float32(2)
    return replace(row, token_ids=ids, logprobs=logprobs)


def test_answers_that_rounding_decided_count_as_greedy(tiny_model, tiny_tokenizer, tmp_path):
    poisoned = write(tiny_model, tiny_tokenizer, tmp_path / "s", tied)
    assert (poisoned[POISONED]["input_ids"][-1] != poisoned[POISONED]["teacher"].top_ids[-1]).item()
    assert audit(poisoned, tiny_model, num_rows=99, progress=False).greedy == 1.0


@pytest.mark.parametrize("poison", [other_token, flatter, other_answer])
def test_a_poisoned_row_is_named(tiny_model, tiny_tokenizer, tmp_path, poison):
    poisoned = write(tiny_model, tiny_tokenizer, tmp_path / "s", poison)
    verify(tmp_path / "s")  # its form is perfect
    found = audit(poisoned, tiny_model, num_rows=16, progress=False)
    assert not found.passed
    assert found.suspects == [POISONED]


def test_another_teacher_is_seen(tiny_model, tiny_tokenizer, tmp_path):
    honest = write(tiny_model, tiny_tokenizer, tmp_path / "s", lambda row: row)
    found = audit(honest, build_tiny_model(tiny_tokenizer, seed=1), num_rows=4, progress=False)
    assert len(found.suspects) == 4


def test_a_teacher_that_is_not_finite_does_not_pass(tiny_model, tiny_tokenizer, tmp_path):
    honest = write(tiny_model, tiny_tokenizer, tmp_path / "s", lambda row: row)
    with torch.no_grad():
        tiny_model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        audit(honest, tiny_model, num_rows=2, progress=False)


def test_what_cannot_be_audited(tiny_model, tiny_tokenizer, tmp_path):
    options = {"tokenizer": tiny_tokenizer, "max_new_tokens": 4, "progress": False}
    sampled = capture_set(tiny_model, PROMPTS[:2], tmp_path / "s", storage=Sampled(8), **options)
    with pytest.raises(ConfigError, match="random draws that a second computation does not repeat"):
        audit(sampled, tiny_model)
    warm = capture_set(tiny_model, PROMPTS[:2], tmp_path / "w", storage=TopK(5), do_sample=True, **options)
    assert audit(warm, tiny_model, progress=False).greedy is None
    with pytest.raises(ConfigError, match="0 of 2 rows were asked for"):
        audit(warm, tiny_model, num_rows=0)


def test_command(capsys, tiny_model_path, tiny_tokenizer, tmp_path):
    honest = capture_set(tiny_model_path, PROMPTS[:6], tmp_path / "s", max_new_tokens=6)
    main(["audit", str(tmp_path / "s"), "--teacher", str(tiny_model_path), "--rows", "4"])
    out = capsys.readouterr().out
    assert (
        "rows        4 of 6, drawn with seed 0" in out
        and "passed: no row differs" in out
        and "greedy      100.0%" in out
    )
    build_tiny_model(tiny_tokenizer, seed=2).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit) as stop:
        main(["audit", str(tmp_path / "s"), "--teacher", str(tmp_path / "other")])
    assert stop.value.code == 1 and "FAILED: 6 rows differ by more than 0.01 nats a token" in capsys.readouterr().err
    assert len(TransferSet.open(tmp_path / "s")) == len(honest)
