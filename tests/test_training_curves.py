"""The picture of a run: what it shows is what was logged."""

import math
import re

import pytest
from conftest import REPOSITORY
from matplotlib.figure import Figure
from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from quantkd.training.curves import draw_curves

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


def shown(figure):
    lines = {panel.get_title(): panel.get_lines() for panel in figure.axes}
    return {title: {line.get_label(): line.get_xydata().tolist() for line in each} for title, each in lines.items()}


def test_lines_are_what_was_logged_and_bytes_are_repeated(tmp_path, drawn):
    for name in ("t.png", "again.png"):
        assert draw_curves(HISTORY, tmp_path / name)
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "t.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    lines = shown(drawn[0])
    assert lines["loss"] == {"training batches": [[2, 0.7], [4, 0.5]], "held-out rows": [[3, 0.6]]}
    assert lines["KL to the teacher"] == {"training batches": [[2, 0.2], [4, 0.1]], "held-out rows": [[3, 0.15]]}
    assert lines["top-1 agreement with the teacher"] == {"held-out rows": [[3, 90]]}
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["training batches", "held-out rows"]
    units = {panel.get_title(): panel.get_ylabel() for panel in drawn[0].axes}
    assert set(units.values()) == {"nats per token", "% of tokens"} and all(p.get_xlabel() for p in drawn[0].axes)
    assert all(panel.get_ylim()[0] == 0 for panel in drawn[0].axes if "nats" in panel.get_ylabel())
    assert not draw_curves([{"step": 1, "train_runtime": 1.0}], tmp_path / "u.png")
    assert not (tmp_path / "u.png").exists()
    draw_curves([{"step": step, "loss": loss} for step, loss in ((1, 0.5), (2, -0.5))], tmp_path / "u.png")
    assert drawn[-1].axes[0].get_ylim()[0] < -0.5
    same = [{"step": step, "loss": 0.5 / step, "kl": 0.50001 / step, "ce": 1.0} for step in (1, 2)]
    draw_curves(same, tmp_path / "u.png")
    assert list(shown(drawn[-1])) == ["KL to the teacher", "cross-entropy"]  # without a second picture of the KL
    diverged = [{"step": step, "kl": 0.5 / step, "eval_kl": 0.5} for step in range(1, 8)]
    diverged += [{"step": 8, "kl": math.nan}, {"step": 9, "kl": math.inf, "eval_kl": math.inf}]
    draw_curves(diverged, tmp_path / "u.png")
    assert len(shown(drawn[-1])["KL to the teacher"]["training batches"]) == 7
    assert not draw_curves([{"step": 1, "kl": math.inf}], tmp_path / "v.png")


def test_batches_are_dots_with_their_mean_and_the_ends_of_the_held_out_line_are_written(tmp_path, drawn):
    losses = [0.9, 0.3, 0.6, 0.6, 0.0, 0.3]
    history = [{"step": 2 * place, "kl": loss} for place, loss in enumerate(losses, start=1)]
    history += [{"step": step, "eval_kl": kl} for step, kl in ((0, 0.5), (6, 0.25), (12, 0.125))]
    draw_curves(history, tmp_path / "t.png")
    (panel,) = drawn[0].axes
    dots, mean, line = panel.get_lines()
    assert (dots.get_linestyle(), line.get_linestyle()) == ("None", "-") and dots.get_alpha() < 0.5
    assert mean.get_ydata().tolist() == pytest.approx([0.6, 0.6, 0.5, 0.4, 0.3, 0.15])  # of itself and its neighbors
    assert mean.get_label() == "their moving mean" and mean.get_xdata().tolist() == [2, 4, 6, 8, 10, 12]
    assert line.get_xydata().tolist() == [[0, 0.5], [6, 0.25], [12, 0.125]]
    assert [text.get_text() for text in panel.texts] == ["0.125", "0.5"]
    draw_curves(history[:5], tmp_path / "t.png")
    assert len(drawn[1].axes[0].get_lines()) == 1  # of few dots there is no mean


def test_a_run_leaves_a_picture_and_trackers_get_the_same_names(make_trainer, training_set, tmp_path, drawn):
    names, tracker = set(), TrainerCallback()
    tracker.on_log = lambda *args, logs, **kwargs: names.update(logs)
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": training_set}
    trainer = make_trainer(curves=True, callbacks=[tracker], **evaluated)
    trainer.evaluate()
    assert not (tmp_path / "out" / "training.png").exists()  # nothing was trained
    trainer.train()
    trainer.evaluate()
    assert (tmp_path / "out" / "training.png").is_file() and len(drawn[-1].axes) == 3
    steps = [step for step, _ in shown(drawn[-1])["KL to the teacher"]["held-out rows"]]
    assert steps == [0, 1, 2]  # before, during and after
    assert {"loss", "ce", "kl", "eval_kl", "eval_ce", "eval_top1_agreement", "eval_perplexity"} <= names
    # TensorBoard, wandb and trackio all get what this makes of it, and the page on the command line lists it.
    sent = set(rewrite_logs(dict.fromkeys(names, 0.0)))
    page = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`((?:train|eval)/\w+)`", page))
    assert {"train/kl", "eval/kl"} <= listed <= sent
    make_trainer(curves=True, max_steps=3, logging_steps=10).train()
    steps = [step for step, _ in shown(drawn[-1])["KL to the teacher"]["training batches"]]
    assert steps == [1, 3]  # the first and the last
