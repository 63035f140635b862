"""GSM8K accuracy as an `evaluate.Metric`, from the class and from its file, without network."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quantkd.errors import DataError
from quantkd.evaluation import metric
from quantkd.evaluation.metric import GSM8KAccuracy

PREDICTIONS = ["so\n#### 3", "it is 4.", "#### 9", "none"]
REFERENCES = ["#### 3", "#### 4", "#### 5", "#### 6"]


def test_metric():
    scores = GSM8KAccuracy().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert (scores["accuracy"], scores["accuracy_strict"], scores["num_answers"]) == (0.5, 0.25, 4)
    for share, suffix in ((0.5, ""), (0.25, "_strict")):  # Wilson's bounds solve (p - x)^2 = z^2 x (1 - x) / n
        low, high = scores[f"ci95_low{suffix}"], scores[f"ci95_high{suffix}"]
        assert 0 < low < share < high < 1
        for bound in (low, high):
            assert (share - bound) ** 2 == pytest.approx(1.959963985**2 * bound * (1 - bound) / 4)
    with pytest.raises(DataError, match="no predictions"):
        GSM8KAccuracy().compute(predictions=[], references=[])


def test_metric_loads_from_its_file_without_network(tmp_path):
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
