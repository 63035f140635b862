"""A run's curves as a picture, from what the Trainer logs anyway: no tracker is needed to see how training went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["CURVES_NAME", "TrainingCurves", "draw_curves"]

CURVES_NAME = "training.png"
_BLUE, _ORANGE = "#0072B2", "#E69F00"  # of Okabe and Ito, apart for colour-blind readers
_PANELS = {
    "loss": "loss",
    "kl": "KL to the teacher, nats a token",
    "ce": "cross-entropy, nats a token",
    "top1_agreement": "top-1 agreement with the teacher",
}


def draw_curves(log_history: Sequence[dict[str, Any]], path: str | Path) -> bool:
    """Draw loss, KL, cross-entropy and agreement over steps: of training a line, of held-out rows points.

    Args:
        log_history: `trainer.state.log_history`, or the same from a checkpoint's trainer_state.json.
        path: the PNG file.

    Returns:
        False, with nothing written, where nothing was logged.
    """
    curves = {name: (_series(log_history, name), _series(log_history, f"eval_{name}")) for name in _PANELS}
    curves = {name: pair for name, pair in curves.items() if pair[0] or pair[1]}
    if not curves:
        return False
    from matplotlib.figure import Figure  # a second to import, and only needed here

    figure = Figure(figsize=(4.0 * len(curves), 3.0), dpi=150, layout="constrained")
    for panel, (name, (trained, held_out)) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(),
                                                  strict=True):  # fmt: skip
        if trained:
            panel.plot(*zip(*trained, strict=True), color=_BLUE, linewidth=1.5, label="training")
        if held_out:
            panel.plot(*zip(*held_out, strict=True), color=_ORANGE, marker="o", markersize=4, label="held out")
        panel.set_title(_PANELS[name], fontsize=9)
        panel.set_xlabel("optimizer step")
        if name != "loss":  # the loss of reverse KL or of a weighted row may be anything
            panel.set_ylim(
                bottom=0 if name != "top1_agreement" else None, top=1.0 if name == "top1_agreement" else None
            )
        panel.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for panel in figure.axes for handle, label in zip(*panel.get_legend_handles_labels(),
                                                                               strict=True)}  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})
    return True


class TrainingCurves(TrainerCallback):
    """Writes `training.png` to the output folder when training ends, on the main process."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw what was logged.

        Args:
            args: whose output folder is taken.
            state: with the log history.
            control: unused.
            **kwargs: unused.
        """
        if state.is_world_process_zero and args.output_dir is not None:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            draw_curves(state.log_history, folder / CURVES_NAME)


def _series(log_history: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Step and value of every entry that has it."""
    return [(entry["step"], entry[name]) for entry in log_history if name in entry and "train_runtime" not in entry]
