"""GSM8K accuracy as an `evaluate.Metric`, from the class and from its file, without network."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkd.errors import DataError
from quantkd.evaluation import GSM8KAccuracy, metric, wilson_interval

PREDICTIONS = ["so\n#### 3", "it is 4.", "#### 9", "none"]
REFERENCES = ["#### 3", "#### 4", "#### 5", "#### 6"]


def test_metric() -> None:
    scores = GSM8KAccuracy().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert (scores["accuracy"], scores["accuracy_strict"], scores["num_answers"]) == (0.5, 0.25, 4)
    assert (scores["ci95_low"], scores["ci95_high"]) == wilson_interval(2, 4)
    assert (scores["ci95_low_strict"], scores["ci95_high_strict"]) == wilson_interval(1, 4)
    assert all(math.isfinite(value) for value in scores.values())
    with pytest.raises(DataError, match="no predictions"):
        GSM8KAccuracy()._compute([], [])


def test_metric_loads_from_its_file_without_network(tmp_path: Path) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*args): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import evaluate\n"
        f"scores = evaluate.load({metric.__file__!r}).compute(predictions={PREDICTIONS!r}, references={REFERENCES!r})\n"
        "print(scores['accuracy'], scores['accuracy_strict'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path)}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0.5", "0.25"]
