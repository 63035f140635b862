"""The curves of a run as a picture, drawn from what the Trainer logs, without a tracker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

CURVES_NAME = "training.png"
# Of each metric its title, its unit and a factor.
_PANELS = {
    "loss": ("loss", "nats per token", 1),
    "kl": ("KL to the teacher", "nats per token", 1),
    "ce": ("cross-entropy", "nats per token", 1),
    "top1_agreement": ("top-1 agreement with the teacher", "% of tokens", 100),
}
# Colors of Okabe and Ito, which color-blind readers can tell apart. Batches are dots: a line from one to the next would
# show the difference between their rows.
_BATCHES: dict[str, Any] = {
    "color": "#0072B2", "linestyle": "none", "marker": ".", "markersize": 5, "alpha": 0.4, "label": "training batches",
}  # fmt: skip
_SMOOTHED: dict[str, Any] = {"color": "#0072B2", "linewidth": 1.2, "alpha": 0.5, "label": "their moving mean"}
_HELD_OUT: dict[str, Any] = {
    "color": "#D55E00", "linewidth": 1.6, "marker": "D", "markersize": 5, "label": "held-out rows", "zorder": 3,
}  # fmt: skip
_FEWEST = 6  # dots that a moving mean is drawn through


def draw_curves(log_history: Sequence[dict[str, Any]], path: str | Path) -> bool:
    """Draw loss, KL, cross-entropy and agreement over steps, as far as they were logged and differ; whether any was."""
    curves = {name: (_series(log_history, name), _series(log_history, f"eval_{name}")) for name in _PANELS}
    curves = {name: pair for name, pair in curves.items() if pair[0] or pair[1]}
    loss, kl = (curves.get(name, ({}, {}))[0] for name in ("loss", "kl"))
    if loss and loss.keys() == kl.keys() and np.allclose([*loss.values()], [*kl.values()], rtol=1e-3, atol=0):
        del curves["loss"]  # which is the KL alone
    if not curves:
        return False
    from matplotlib.figure import Figure  # a second to import, and only needed here
    from matplotlib.ticker import MaxNLocator

    from quantkd.report.figures import save_figure

    rows = 2 if len(curves) == 4 else 1  # four in a row would be too small to read on a page
    columns = len(curves) // rows
    figure = Figure(figsize=(max(4.5, 3.6 * columns), 2.6 * rows + 0.4), dpi=150)
    figure.set_layout_engine("constrained", wspace=0.06, hspace=0.08)
    handles: dict[str, Any] = {}
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (name, (trained, held_out)) in zip(panels, curves.items(), strict=True):
        title, unit, factor = _PANELS[name]
        lines = [(trained, _BATCHES), (_smooth(trained), _SMOOTHED), (held_out, _HELD_OUT)]
        for points, style in lines:
            if points:
                values = [factor * value for value in points.values()]
                handles[style["label"]] = panel.plot(list(points), values, **style)[0]
        for step, side in {max(held_out): "right", min(held_out): "left"}.items() if held_out else ():
            place = (step, factor * held_out[step])
            panel.annotate(f"{place[1]:.3g}", place, (0, 6), textcoords="offset points", ha=side, fontsize=8)
        panel.set_title(title, fontsize=10)
        panel.set_ylabel(unit)
        panel.set_xlabel("optimizer step")
        panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        # From zero, so that a small wiggle looks small; the loss of a weighted row may be below zero.
        values = [*trained.values(), *held_out.values()]
        if name == "top1_agreement":
            # The rest up to 100%, and room for the lowest point.
            panel.set_ylim(max(0, 115 * min(values) - 15) if min(values) < max(values) else 0, 100)
        elif min(values) >= 0 and max(values) > 0:
            panel.set_ylim(0, 1.1 * max(values))
        if len(steps := {*trained, *held_out}) == 1:
            panel.set_xlim(min(steps) - 1, min(steps) + 1)
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.grid(True, color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, Path(path))
    return True


def _smooth(points: dict[int, float]) -> dict[int, float]:
    """The mean of a fifth of the points around each, at the ends of those that are there; none of few points."""
    values = list(points.values())
    if len(values) < _FEWEST:
        return {}
    window = np.ones(2 * max(1, len(values) // 10) + 1)
    means = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
    return dict(zip(points, means.tolist(), strict=True))


def was_evaluated(state: TrainerState) -> bool:
    """Whether held-out rows were measured at the step that training is at."""
    return state.global_step in _series(state.log_history, "eval_kl")


def _series(log_history: Sequence[dict[str, Any]], name: str) -> dict[int, float]:
    """Value by step; of several at one step, the last. The summary at the end is left out, and NaN and infinity."""
    logged = [entry for entry in log_history if name in entry and "train_runtime" not in entry]
    return {entry["step"]: entry[name] for entry in logged if math.isfinite(entry[name])}


class TrainingCurves(TrainerCallback):
    """Writes `training.png` when training ends, and at every evaluation in it and after it; before it is step 0."""

    def __init__(self) -> None:
        self._before: list[dict[str, Any]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the last step logged, whatever `logging_steps` is."""
        control.should_log |= state.global_step >= state.max_steps

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep what was measured before training; draw what came later."""
        if state.global_step == 0:
            self._before = [entry for entry in state.log_history if entry["step"] == 0]
        elif state.is_world_process_zero and args.output_dir is not None:
            # Training starts a new log, so an evaluation before it must be put back.
            before = [] if any(entry["step"] == 0 for entry in state.log_history) else self._before
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            draw_curves([*before, *state.log_history], folder / CURVES_NAME)

    on_train_end = on_evaluate
