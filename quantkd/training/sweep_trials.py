"""The trials of a sweep, as they are kept: Optuna's study in an SQLite file, and a JSON file for everybody else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkd.errors import DataError

STUDY = "quantkd"
OBJECTIVE = "eval_kl"


@dataclass(frozen=True)
class Trial:
    """One trained student.

    Args:
        place: 0 for the first.
        params: what was tried.
        value: held-out KL to the teacher, nats per token; None if the training diverged.
        seconds: how long training and measuring took.
        metrics: further figures on the held-out rows.
    """

    place: int
    params: dict[str, Any]
    value: float | None
    seconds: float
    metrics: dict[str, float]


def open_study(path: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The study in the folder, new or gone on with; what an ended process left running counts as failed."""
    import optuna

    storage = optuna.storages.RDBStorage(f"sqlite:///{path.resolve().as_posix()}")
    study = optuna.create_study(storage=storage, study_name=STUDY, direction="minimize", load_if_exists=True)
    found = study.user_attrs.get("settings")
    if found is None:
        study.set_user_attr("settings", settings)
    else:
        differing = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
        if differing:
            pairs = ", ".join(f"{key} is {found.get(key)!r}, not {settings.get(key)!r}" for key in differing)
            raise DataError(f"{path} holds another sweep: {pairs}. Choose another output_dir, or remove the file.")
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study, storage


def read_trials(study: Any) -> list[Trial]:
    """The finished trials of a study."""
    import optuna

    found = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    return [
        Trial(
            place=place,
            params=dict(trial.params),
            value=trial.value if math.isfinite(trial.value) else None,
            seconds=round(trial.duration.total_seconds(), 3),
            metrics=trial.user_attrs.get("metrics", {}),
        )
        for place, trial in enumerate(found)
    ]


def write_trials(folder: Path, settings: dict[str, Any], trials: Sequence[Trial]) -> None:
    """Write `sweep.json`."""
    measured = [trial for trial in trials if trial.value is not None]
    best = min(measured, key=lambda trial: trial.value or 0.0, default=None)
    result = {
        "format_version": 1,
        "objective": OBJECTIVE,
        "settings": settings,
        "best": best and best.place,
        "trials": [asdict(trial) for trial in trials],
    }
    temporary = folder / "sweep.json.tmp"
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "sweep.json")


def to_json(value: Any) -> Any:
    """Sets in order, and enums by their value; adapters' configurations hold both."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    value = getattr(value, "value", value)
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Without Optuna's line on each study that is opened and each trial that ends."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
