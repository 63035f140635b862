"""The picture of a run: what it shows is what was logged."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, capture
from quantkd.curves import draw_curves

HISTORY = [
    {"step": 2, "loss": 0.7, "ce": 1.3, "kl": 0.2, "learning_rate": 1e-4},
    {"step": 3, "eval_loss": 0.6, "eval_ce": 1.1, "eval_kl": 0.15, "eval_top1_agreement": 0.9},
    {"step": 4, "loss": 0.5, "ce": 1.2, "kl": 0.1},
    {"step": 4, "train_runtime": 3.0, "train_loss": 0.6, "loss": 9.0},
]


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return figures


def test_lines_are_what_was_logged(tmp_path, drawn):
    assert draw_curves(HISTORY, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    lines = {
        panel.get_title().split(",")[0]: {line.get_label(): line.get_xydata().tolist() for line in panel.get_lines()}
        for panel in drawn[0].axes
    }
    assert lines["loss"] == {"training": [[2, 0.7], [4, 0.5]], "held out": [[3, 0.6]]}
    assert lines["KL to the teacher"] == {"training": [[2, 0.2], [4, 0.1]], "held out": [[3, 0.15]]}
    assert lines["top-1 agreement with the teacher"] == {"held out": [[3, 0.9]]}
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["training", "held out"]


def test_nothing_logged_draws_nothing(tmp_path):
    assert not draw_curves([{"step": 1, "train_runtime": 1.0}], tmp_path / "t.png")
    assert not (tmp_path / "t.png").exists()


def test_the_same_history_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw_curves(HISTORY, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_run_without_a_tracker_leaves_a_picture_and_every_tracker_gets_the_same_names(
    tiny_model, tiny_model_path, tiny_tokenizer, tmp_path, drawn
):
    from transformers import TrainerCallback

    names = set()

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            names.update(logs or {})

    transfer_set = capture(
        tiny_model, ["One?", "Two?", "Three?"], tmp_path / "s", max_new_tokens=6, tokenizer=tiny_tokenizer,
        progress=False,
    )  # fmt: skip
    args = QuantizedDistillationConfig(
        str(tmp_path / "o"), max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = QuantizedDistillationTrainer(
        str(tiny_model_path), args, train_dataset=transfer_set, eval_dataset=transfer_set, callbacks=[Tracker()]
    )
    trainer.train()
    assert (tmp_path / "o" / "training.png").is_file() and len(drawn[0].axes) == 4
    assert {"loss", "ce", "kl", "eval_kl", "eval_ce", "eval_top1_agreement", "eval_perplexity"} <= names
