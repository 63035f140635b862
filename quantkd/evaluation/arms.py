"""The arm file: everything that was measured of one model, as `evaluation/<arm>.json` holds it.

An `Arm` is what writes the file and what reads it. Reading checks every field, and an error names the file, the field
and the value, so whoever gets an `Arm` can use it as it is.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.records import read_json
from quantkd.evaluation.stats import CalibrationSums, Floats, RowStatistic, RowSums, compute_value
from quantkd.files import write_file

# Lower edges of the bins; the last bin has no end. Octaves, because an answer's first tokens differ most.
POSITION_EDGES = (0, 8, 16, 32, 64, 128, 256, 512)
# Nats. At half of its tokens a trained teacher is nearly certain, so the steps are finer there.
ENTROPY_EDGES = (0.0, 0.01, 0.1, 0.3, 1.0, 2.0)
# Equal widths over (0, 1], as many as Guo et al. 2017 (arXiv:1706.04599) take.
CONFIDENCE_BINS = 15

ROWS = ("tokens", "kl_sum", "reverse_kl_sum", "ce_sum", "agree")
DENSE_ROWS = ("dense_kl_sum", "dense_reverse_kl_sum", "dense_agree")
EDGES: dict[str, tuple[float, ...]] = {
    "position": POSITION_EDGES,
    "entropy": ENTROPY_EDGES,
    "confidence": tuple(round(place / CONFIDENCE_BINS, 6) for place in range(CONFIDENCE_BINS)),
    "dense_position": POSITION_EDGES,
    "dense_entropy": ENTROPY_EDGES,
}
BINNED = {kind: ("tokens", "kl_sum") for kind in EDGES} | {"confidence": ("tokens", "confidence_sum", "correct")}
_COUNTS = ("tokens", "agree", "dense_agree", "correct")  # of tokens, so never more than a row's
_LARGEST = 1e12  # no sum of nats or tokens of a row comes near it
_ROUNDING = 1e-3  # nats per token by which the KL over stored entries may fall below 0

_LONGEST_NAME = 100


@dataclass(frozen=True)
class Fidelity:
    """How near a model is to its teacher: sums per held-out row, and per row and bin.

    Args:
        columns: float64 arrays over the rows of the set, in its order: (R,) such as "kl_sum", and (R, bins) such as
            "position/kl_sum". Those over the whole vocabulary begin with "dense_" and may be missing.
        settings: what was measured, and how: `transfer_set` is the digest of the held-out rows.
    """

    columns: Mapping[str, Floats]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> Floats:
        """(R,) target tokens."""
        return self.columns["tokens"]

    @property
    def transfer_set(self) -> str:
        """The digest of the held-out rows."""
        return str(self.settings["transfer_set"])

    @property
    def statistics(self) -> dict[str, RowStatistic]:
        """Every figure by its name: "kl", "reverse_kl", "ce", "perplexity", "top1_agreement", "ece", and the dense."""
        sums, tokens = self.columns, self.tokens
        figures: dict[str, RowStatistic] = {
            "kl": RowSums(sums["kl_sum"], tokens),
            "top1_agreement": RowSums(sums["agree"], tokens),
            "ce": RowSums(sums["ce_sum"], tokens),
            "perplexity": RowSums(sums["ce_sum"], tokens, "exp"),
            "reverse_kl": RowSums(sums["reverse_kl_sum"], tokens),
            "ece": CalibrationSums(*(sums[f"confidence/{key}"] for key in ("confidence_sum", "correct", "tokens"))),
        }
        if DENSE_ROWS[0] in sums:
            figures["dense_kl"] = RowSums(sums["dense_kl_sum"], tokens)
            figures["dense_reverse_kl"] = RowSums(sums["dense_reverse_kl_sum"], tokens)
            figures["dense_top1_agreement"] = RowSums(sums["dense_agree"], tokens)
        return figures

    @property
    def means(self) -> dict[str, float]:
        """Every figure over all rows."""
        return {name: compute_value(statistic) for name, statistic in self.statistics.items()}

    def list_bins(self, kind: str) -> list[tuple[float, float | None, Floats, Floats]] | None:
        """By "position", "entropy", "dense_position" or "dense_entropy": start and end of each bin, KL and tokens."""
        if f"{kind}/kl_sum" not in self.columns:
            return None
        edges, parts = EDGES[kind], (self.columns[f"{kind}/kl_sum"].T, self.columns[f"{kind}/tokens"].T)
        return list(zip(edges, [*edges[1:], None], *parts, strict=True))

    def to_json(self) -> dict[str, Any]:
        """JSON values; `means` is for people, and is not read."""
        rows: dict[str, Any] = {}
        bins: dict[str, dict[str, Any]] = {}
        for name, sums in self.columns.items():
            kind, _, key = name.rpartition("/")
            values = (sums.astype(np.int64) if key in _COUNTS else sums).tolist()
            if kind:
                bins.setdefault(kind, {"edges": list(EDGES[kind])})[key] = values
            else:
                rows[key] = values
        return {"settings": dict(self.settings), "means": self.means, "rows": rows, "bins": bins}

    @classmethod
    def from_json(cls, data: Any, where: str) -> Fidelity:
        """Read it back; `where` is the file, for the message of an error."""
        found = _read_object(data, where, ("settings", "means", "rows", "bins"))
        rows = _read_object(found["rows"], f"{where}, rows", ROWS, optional=DENSE_ROWS)
        tokens = _read_numbers(rows["tokens"], f"{where}, rows/tokens", (np.size(rows["tokens"]),), 0, _LARGEST)
        if not tokens.sum() > 0:
            raise _refuse(f"{where}, rows/tokens", "no target token", "rows with answers")
        columns = {"tokens": tokens} | {
            key: _read_sums(rows[key], f"{where}, rows/{key}", tokens) for key in rows if key != "tokens"
        }
        kinds = [kind for kind in BINNED if DENSE_ROWS[0] in rows or not kind.startswith("dense_")]
        bins = _read_object(found["bins"], f"{where}, bins", kinds)
        for kind in kinds:
            place, edges, keys = f"{where}, bins/{kind}", EDGES[kind], BINNED[kind]
            binned = _read_object(bins[kind], place, ("edges", *keys))
            if binned["edges"] != list(edges):
                raise _refuse(f"{place}/edges", binned["edges"], f"{list(edges)}")
            shape = (len(tokens), len(edges))
            counts = _read_numbers(binned["tokens"], f"{place}/tokens", shape, 0, _LARGEST)
            if (counts.sum(1) != tokens).any():
                raise _refuse(f"{place}/tokens", "sums that differ from rows/tokens", "each row's tokens in its bins")
            columns |= {f"{kind}/{key}": _read_sums(binned[key], f"{place}/{key}", counts) for key in keys[1:]}
            columns[f"{kind}/tokens"] = counts
        return cls(columns, _read_object(found["settings"], f"{where}, settings", ("transfer_set",), None))


@dataclass(frozen=True)
class Accuracy:
    """The verdicts on one list of questions.

    Args:
        verdicts: (N,) one list by grader, in the order of the questions: GSM8K's "correct_flexible" and
            "correct_strict", or "correct" of a task of lm-evaluation-harness.
        settings: what was asked, and how; arms are compared where these are the same.
    """

    verdicts: Mapping[str, Sequence[bool]]
    settings: Mapping[str, Any]

    @property
    def count(self) -> int:
        """How many questions."""
        return len(next(iter(self.verdicts.values())))

    @property
    def statistics(self) -> dict[str, RowSums]:
        """The share of correct answers: the main verdict under "", GSM8K's strict one under "_strict"."""
        names = {"correct": "", "correct_flexible": "", "correct_strict": "_strict"}
        return {names[grader]: RowSums(np.asarray(found)) for grader, found in self.verdicts.items()}

    @classmethod
    def from_json(cls, data: Any, where: str) -> Accuracy:
        """Read GSM8K's verdicts back."""
        found = _read_object(data, where, ("settings", "correct_flexible", "correct_strict"))
        settings = _read_object(found["settings"], f"{where}, settings", (), None)
        flexible = _read_verdicts(found["correct_flexible"], f"{where}, correct_flexible")
        strict = _read_verdicts(found["correct_strict"], f"{where}, correct_strict", len(flexible))
        return cls({"correct_flexible": flexible, "correct_strict": strict}, settings)


@dataclass(frozen=True)
class TaskResult:
    """One name given to lm-evaluation-harness, measured.

    Args:
        settings: what decides the result besides the model; a finished task is run again if they differ.
        figures: for the task, or for each of a group's and for the group itself, the harness' metrics by its own key,
            such as "acc,none": `value`, `stderr` (None where it gives none) and `n`, the number of items.
        verdicts: for each metric that is 0 or 1 on every item, under a title such as "lm-eval arc_easy, 0-shot, acc",
            whether each item is correct. A group's items are pooled.
    """

    settings: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    verdicts: Mapping[str, Sequence[bool]]

    @classmethod
    def from_json(cls, data: Any, where: str) -> TaskResult:
        """Read it back."""
        found = _read_object(data, where, ("settings", "figures", "verdicts"))
        for task, metrics in _read_object(found["figures"], f"{where}, figures", (), None).items():
            for metric, figure in _read_object(metrics, f"{where}, figures/{task}", (), None).items():
                place = f"{where}, figures/{task}/{metric}"
                values = _read_object(figure, place, ("value", "stderr", "n")).values()
                given = [0, *(value for value in values if value is not None)]
                _read_numbers(given, place, (len(given),), -_LARGEST, _LARGEST)
        for title, verdicts in _read_object(found["verdicts"], f"{where}, verdicts", (), None).items():
            _read_verdicts(verdicts, f"{where}, verdicts/{title}")
        _read_object(found["settings"], f"{where}, settings", (), None)
        return cls(**found)


@dataclass(frozen=True)
class Arm:
    """One model of a comparison, and everything that was measured of it.

    Args:
        name: the file's name, such as "before".
        title: what the report calls it.
        model: the model's name.
        fingerprint: a digest of the model; figures are kept only for the very same one.
        memory_bytes: its memory footprint.
        fidelity: how near it is to its teacher; None if that was not evaluated.
        questions: for each setting, such as "0-shot", the verdicts on GSM8K's questions.
        tasks: what lm-evaluation-harness gave, by the name that was asked for.
    """

    name: str
    title: str
    model: str
    fingerprint: str
    memory_bytes: int
    fidelity: Fidelity | None = None
    questions: Mapping[str, Accuracy] = field(default_factory=dict)
    tasks: Mapping[str, TaskResult] = field(default_factory=dict)

    @property
    def accuracy(self) -> dict[str, Accuracy]:
        """All verdicts, by setting."""
        tasks = {
            title: Accuracy({"correct": verdicts}, task.settings)
            for task in self.tasks.values()
            for title, verdicts in task.verdicts.items()
        }
        return {**self.questions, **tasks}

    def write(self, folder: Path) -> None:
        """Write `<folder>/<name>.json`, all of it or nothing."""
        content = {
            "arm": self.name,
            "title": self.title,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "memory_bytes": self.memory_bytes,
            "fidelity": self.fidelity and self.fidelity.to_json(),
            "questions": {key: {"settings": one.settings, **one.verdicts} for key, one in self.questions.items()},
            "tasks": {name: vars(one) for name, one in self.tasks.items()},
        }
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
        # Plain numbers go on one line: the sums would take one each.
        text = re.sub(r"\[\n[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"
        write_file(folder / f"{self.name}.json", text)

    @classmethod
    def read(cls, path: Path) -> Arm:
        """Read an arm's file and check everything in it.

        Raises:
            DataError: a file that is not an arm's; the message names the field and its value.
        """
        where = str(path)
        texts = ("arm", "title", "model", "fingerprint")
        found = _read_object(read_json(path), where, (*texts, "memory_bytes", "fidelity", "questions", "tasks"))
        for key in texts:
            if not isinstance(found[key], str) or not found[key]:
                raise _refuse(f"{where}, {key}", found[key], "a text")
        if found["arm"] != path.stem:
            raise _refuse(f"{where}, arm", found["arm"], f"{path.stem!r}, the file's name")
        memory = found["memory_bytes"]
        if type(memory) is not int or not 0 <= memory < 2**53:
            raise _refuse(f"{where}, memory_bytes", memory, "a number of bytes")
        fidelity = found["fidelity"] and Fidelity.from_json(found["fidelity"], f"{where}, fidelity")
        tasks = {
            name: TaskResult.from_json(one, f"{where}, tasks/{name}")
            for name, one in _read_object(found["tasks"], f"{where}, tasks", (), None).items()
        }
        questions = {
            setting: Accuracy.from_json(one, f"{where}, questions/{setting}")
            for setting, one in _read_object(found["questions"], f"{where}, questions", (), None).items()
        }
        title = " ".join(found["title"].split())
        return cls(path.stem, title, found["model"], found["fingerprint"], memory, fidelity or None, questions, tasks)


def check_arm_name(name: str) -> None:
    """Refuse a name that would not be a plain file name."""
    # Of ASCII: other letters make other file names under another locale or file system.
    if len(name) > _LONGEST_NAME or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(
            f"An arm's name is a file name of 1 to {_LONGEST_NAME} of a-z, A-Z, 0-9, - and _, found {name!r}. "
            "Choose another; --title takes any text."
        )


def discard_arm(folder: Path, name: str) -> None:
    """Remove an arm's figures and records."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    # Not `name-*-shot`: that is also a file of the arm "name-2".
    own = re.compile(rf"{re.escape(name)}-(\d+-shot|prompts)\.jsonl(\.settings\.json|\.tmp)?")
    for records in folder.glob(f"{name}-*.jsonl*"):
        if own.fullmatch(records.name):
            records.unlink()
    shutil.rmtree(folder / "lm-eval" / name, ignore_errors=True)


def _refuse(place: str, found: Any, expected: str) -> DataError:
    return DataError(f"{place}: expected {expected}, found {found!r:.120}. Evaluate this arm again.")


def _read_object(data: Any, place: str, keys: Sequence[str], optional: Sequence[str] | None = ()) -> dict[str, Any]:
    """An object with these keys; `optional` names more that it may have, None takes any."""
    if not isinstance(data, dict):
        raise _refuse(place, data, "an object")
    if not set(keys) <= set(data) or (optional is not None and not set(data) <= {*keys, *optional}):
        raise _refuse(place, sorted(data), f"the keys {', '.join(keys)}")
    return data


def _read_numbers(data: Any, place: str, shape: tuple[int, ...], low: Any, high: Any) -> Floats:
    """Nested lists of this shape, each number from `low` to `high`."""
    try:
        values = np.array(data)
    except ValueError:  # lists of different lengths
        values = np.array(None)
    # Of other kinds are texts, null, and whole numbers of more than 64 bits.
    if values.dtype.kind not in "iuf" or values.shape != shape or not values.size:
        raise _refuse(place, data, f"numbers of shape {shape}")
    wrong = ~((values >= low) & (values <= high))
    if wrong.any():
        index = tuple(np.argwhere(wrong)[0].tolist())
        bounds = [float(np.broadcast_to(bound, shape)[index]) for bound in (low, high)]
        raise _refuse(f"{place}{list(index)}", values[index].item(), f"a number from {bounds[0]:g} to {bounds[1]:g}")
    return values.astype(np.float64)


def _read_sums(data: Any, place: str, tokens: Floats) -> Floats:
    """Sums over tokens: counts and probabilities of at most 1 each, nats of at least 0, but for rounding."""
    if place.endswith(("agree", "correct")):
        return _read_numbers(data, place, tokens.shape, 0, tokens)
    if place.endswith("confidence_sum"):
        return _read_numbers(data, place, tokens.shape, 0, tokens * (1 + _ROUNDING))
    return _read_numbers(data, place, tokens.shape, -_ROUNDING * np.maximum(tokens, 1), _LARGEST)


def _read_verdicts(data: Any, place: str, count: int | None = None) -> list[bool]:
    if not isinstance(data, list) or not data or not all(isinstance(one, bool) for one in data):
        raise _refuse(place, data, "a list of true and false")
    if count not in (None, len(data)):
        raise _refuse(place, f"{len(data)} verdicts", f"{count}, one per question")
    return data
