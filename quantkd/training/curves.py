"""A run's curves as a picture, from what the Trainer logs anyway: no tracker is needed to see how training went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

CURVES_NAME = "training.png"
_BLUE, _ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito, apart for colour-blind readers
# Of each metric its title and its unit.
_PANELS = {
    "loss": ("loss", "nats a token"),
    "kl": ("KL to the teacher", "nats a token"),
    "ce": ("cross-entropy", "nats a token"),
    "top1_agreement": ("top-1 agreement with the teacher", "% of tokens"),
}


def draw_curves(log_history: Sequence[dict[str, Any]], path: str | Path) -> bool:
    """Draw loss, KL, cross-entropy and agreement over steps: of training a line, of held-out rows points."""
    curves = {name: (_series(log_history, name), _series(log_history, f"eval_{name}")) for name in _PANELS}
    curves = {name: pair for name, pair in curves.items() if pair[0] or pair[1]}
    if not curves:
        return False
    from matplotlib.figure import Figure  # a second to import, and only needed here
    from matplotlib.ticker import MaxNLocator

    rows = 2 if len(curves) == 4 else 1  # a row of four would be too small to read on a page
    columns = len(curves) // rows
    figure = Figure(figsize=(max(4.5, 3.6 * columns), 2.6 * rows + 0.4), dpi=150)
    figure.set_layout_engine("constrained", wspace=0.06, hspace=0.08)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (name, (trained, held_out)) in zip(panels, curves.items(), strict=True):
        scale = 100 if name == "top1_agreement" else 1
        for points, style in ((trained, _TRAINED), (held_out, _HELD_OUT)):
            if points:
                panel.plot([step for step, _ in points], [scale * value for _, value in points], **style)
        title, unit = _PANELS[name]
        panel.set_title(title, fontsize=10)
        panel.set_ylabel(unit)
        panel.set_xlabel("optimizer step")
        panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        # Zero is the teacher, or perfection, so that a small wiggle looks small; a weighted row's loss may lie below.
        values = [value for _, value in trained + held_out]
        if name == "top1_agreement":
            panel.set_ylim(top=100)
        elif 0 <= min(values) < max(values):
            panel.set_ylim(0, 1.1 * max(values))
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.grid(True, color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
    handles = {label: handle for panel in figure.axes for handle, label in zip(*panel.get_legend_handles_labels(),
                                                                               strict=True)}  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})
    return True


# Marked too, for a short run logs a single point, which is no line.
_TRAINED: dict[str, Any] = {"color": _BLUE, "linewidth": 1.5, "marker": ".", "markersize": 5, "label": "training"}
_HELD_OUT: dict[str, Any] = {
    "color": _ORANGE, "linewidth": 1.2, "linestyle": "--", "marker": "D", "markersize": 5, "label": "held-out rows",
}  # fmt: skip


class TrainingCurves(TrainerCallback):
    """Writes `training.png` to the output folder, when training ends and at every evaluation of it and after it.

    The last step is always logged. An evaluation before training, as of `trainer.evaluate()`, is drawn at step 0.
    """

    def __init__(self) -> None:
        self._before: list[dict[str, Any]] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Have the last step logged, wherever `logging_steps` falls."""
        if state.global_step >= state.max_steps:
            control.should_log = True
        return control

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep what was measured before training; draw what came later."""
        if state.global_step == 0:
            self._before = [entry for entry in state.log_history if entry["step"] == 0]
        else:
            self._draw(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw what was logged."""
        self._draw(args, state)

    def _draw(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.is_world_process_zero or args.output_dir is None:
            return
        before = [] if any(entry["step"] == 0 for entry in state.log_history) else self._before
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        draw_curves([*before, *state.log_history], folder / CURVES_NAME)


def _series(log_history: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Step and value of every entry that has it; of several at one step, as of two evaluations, the last."""
    return list(
        {entry["step"]: entry[name] for entry in log_history if name in entry and "train_runtime" not in entry}.items()
    )
