"""`verify --teacher` sees what no format check can: distributions and answers that the teacher would not have given."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from quantkd import Nucleus, Sampled, TopK
from quantkd.teacher import GenerationSettings, TransformersTeacher
from tests.conftest import build_tiny_model, capture_set

PROMPTS = [f"What is {a} + {b}?" for a in range(4) for b in range(4)]
POISONED = 5


class Poisoner(TransformersTeacher):
    """Tells the truth but for one row."""

    def __init__(self, model, tokenizer, poison):
        super().__init__(model, tokenizer, Nucleus(0.95, 64), (1.0,), GenerationSettings(max_new_tokens=12))
        self.poison = poison

    def answer(self, prompts):
        rows = zip(prompts, super().answer(prompts), strict=True)
        return [self.poison(row) if prompt.index == POISONED else row for prompt, row in rows]


@pytest.fixture
def write(tiny_model, tiny_tokenizer, tmp_path):
    """Capture a set at `tmp_path / "s"` of which one row is poisoned."""

    def go(poison):
        teacher = Poisoner(tiny_model, tiny_tokenizer, poison)
        return capture_set(teacher, PROMPTS, tmp_path / "s", batch_size=4, tokenizer=tiny_tokenizer)

    return go


def other_token(row):
    """One target's most probable token is made out to be another one."""
    ids, start = row.token_ids.copy(), int(row.counts[:4].sum())
    ids[start] = min({*range(20, 100)} - {*ids[start : start + int(row.counts[4])].tolist()})
    return replace(row, token_ids=ids)


def other_answer(row):
    ids = row.input_ids.copy()
    ids[int(row.spans[0, 0]) :] = 30
    return replace(row, input_ids=ids)


def tied(row):
    """The answer's last token comes second by an eighth of a nat, as far as two logits in bfloat16 lie apart."""
    ids, logprobs, start = row.token_ids.copy(), row.logprobs.copy(), int(row.counts[:-1].sum())
    ids[start : start + 2] = ids[start : start + 2][::-1]
    logprobs[start : start + 2] = np.float32(-1.2), np.float32(-1.325)
    logprobs[start + 2 :] -= np.float32(2)
    return replace(row, token_ids=ids, logprobs=logprobs)


@pytest.fixture
def check(cli, tmp_path, tiny_model_path):
    def check(*words, teacher=tiny_model_path, name="s"):
        return cli("verify", tmp_path / name, "--teacher", teacher, "--dtype", "float32", *words)

    return check


def test_an_honest_set_passes_in_any_batch_and_answers_that_rounding_decided_count_as_greedy(write, check, tmp_path):
    write(lambda row: row)
    code, out, _ = check("--rows", "99", "--batch_size", "3")
    assert code == 0 and "rows        16 of 16, drawn with seed 0" in out
    assert "top token   the same at 100.0%" in out and "greedy      100.0%" in out
    assert "passed: no row differs by more than 0.01 nats per token" in out
    assert float(re.search(r"on average, ([^ ]+) in the worst row", out)[1]) < 1e-4
    _, out, _ = check("--rows", "5", "--seed", "3")
    assert "rows        5 of 16, drawn with seed 3" in out
    shutil.rmtree(tmp_path / "s")
    row = write(tied)[POISONED]
    assert (row["input_ids"][-1] != row["teacher"].top_ids[-1]).item()
    assert "greedy      100.0%" in check("--rows", "99")[1]


@pytest.mark.parametrize("poison", [
    other_token, other_answer, lambda row: replace(row, logprobs=(row.logprobs - np.float32(0.5)).astype(np.float32)),
], ids=["token", "answer", "flatter"])  # fmt: skip
def test_a_poisoned_row_is_named(check, cli, write, tmp_path, poison):
    write(poison)
    assert cli("verify", tmp_path / "s")[0] == 0  # its form is perfect
    code, _, error = check("--rows", "16")
    assert code == 1 and f"FAILED: 1 rows differ by more than 0.01 nats per token, the first is row {POISONED}" in error


@pytest.mark.parametrize(("weight", "said"), [(None, "FAILED: 4 rows differ"), (float("nan"), "4 of 4 rows are not")])
def test_another_teacher_is_seen(check, tiny_tokenizer, write, tmp_path, weight, said):
    write(lambda row: row)
    other = build_tiny_model(tiny_tokenizer, seed=1)
    if weight is not None:
        other.lm_head.weight.data.fill_(weight)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    code, out, error = check("--rows", "4", teacher=tmp_path / "other")
    assert code == 1 and said in error and "passed" not in out


def test_sampled_entries_cannot_be_computed_again(check, tiny_model_path, tmp_path):
    for name, options in (("s", {"storage": Sampled(8)}), ("w", {"storage": TopK(5), "do_sample": True})):
        capture_set(tiny_model_path, PROMPTS[:2], tmp_path / name, max_new_tokens=4, **options)
    code, _, error = check()
    assert code == 1 and "random draws that a second computation does not repeat" in error
    code, out, _ = check(name="w")
    assert code == 0 and "greedy" not in out  # sampled answers need not be
