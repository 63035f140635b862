"""GSM8K accuracy as an `evaluate.Metric`, from the class and from its file, without network."""

import processes
import pytest

from quantkd.errors import DataError
from quantkd.evaluation import metric
from quantkd.evaluation.metric import GSM8KAccuracy
from quantkd.evaluation.stats import wilson_interval

PREDICTIONS = ["so\n#### 3", "it is 4.", "#### 9", "none"]
REFERENCES = ["#### 3", "#### 4", "#### 5", "#### 6"]


def test_metric():
    scores = GSM8KAccuracy().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert (scores["accuracy"], scores["accuracy_strict"], scores["num_answers"]) == (0.5, 0.25, 4)
    for correct, suffix in ((2, ""), (1, "_strict")):
        assert (scores[f"ci95_low{suffix}"], scores[f"ci95_high{suffix}"]) == wilson_interval(correct, 4)
    with pytest.raises(DataError, match="no predictions"):
        GSM8KAccuracy().compute(predictions=[], references=[])


def test_metric_loads_from_its_file_without_network(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, socket\n"
        "def refuse(*args): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        f"os.environ['HF_HOME'] = {str(tmp_path)!r}\n"
        "import evaluate\n"
        f"scores = evaluate.load({metric.__file__!r}).compute(predictions={PREDICTIONS!r}, references={REFERENCES!r})\n"
        "print(scores['accuracy'], scores['accuracy_strict'])"
    )
    assert processes.run([tmp_path / "script.py"], tmp_path / "out").splitlines()[-1] == "0.5 0.25"
