"""The arm file: everything that was measured of one model, as `evaluation/<arm>.json` holds it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkd.errors import ConfigError, DataError, printable
from quantkd.evaluation.stats import CalibrationSums, Floats, RowStatistic, RowSums, compute_value
from quantkd.files import read_object, write_file
from quantkd.models.size import ModelSize

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
_SHARES = (*_COUNTS, "confidence_sum")  # at most 1 for each token
_LARGEST = 1e12  # no sum of nats or tokens of a row comes near it
_ROUNDING = 1e-3  # nats per token by which the KL over stored entries may fall below 0
_LONGEST_NAME, _LONGEST_TEXT = 100, 1000

# The file: an object of these keys or, with `str`, of any; a list of one kind, of texts with null too; a text, by its
# most characters; a number between two, or null; and `Any`, which is not read.
_ANY = {str: Any}
_GSM8K = {"settings": _ANY, "correct_flexible": [bool], "correct_strict": [bool], "answers": [str]}
_POSITIVE = (0, _LARGEST)
_FIGURE = {"value": (-_LARGEST, _LARGEST), "stderr": _POSITIVE, "n": _POSITIVE}
_TASK = {"settings": _ANY, "figures": {str: {str: _FIGURE}}, "verdicts": {str: [bool]}}
_ARM = {
    "arm": _LONGEST_NAME, "title": _LONGEST_TEXT, "model": _LONGEST_TEXT, "fingerprint": _LONGEST_TEXT,
    "size": {**dict.fromkeys((each.name for each in fields(ModelSize)), int), "bits_per_weight": _POSITIVE},
    "fidelity": Any, "questions": {str: _GSM8K}, "tasks": {str: _TASK},
}  # fmt: skip


def list_sums(dense: bool) -> dict[str, tuple[str, ...]]:
    """The sums of a `Fidelity`, first its tokens: per row under "", and per row and bin under each kind of bin."""
    rows = {"": (*ROWS, *DENSE_ROWS) if dense else ROWS}
    return rows | {kind: keys for kind, keys in BINNED.items() if dense or not kind.startswith("dense_")}


def find_bins(kind: str, values: NDArray[Any]) -> NDArray[np.int64]:
    """(N,) values -> (N,) bins: each holds its lower edge, those of confidence their upper one; below all, bin 0."""
    if kind == "confidence":
        return np.asarray(np.digitize(values, np.arange(1, CONFIDENCE_BINS) / CONFIDENCE_BINS, right=True))
    return np.asarray(np.digitize(values, EDGES[kind][1:]))


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is measured.

    Args:
        batch_size: rows or questions per batch; results depend on it only by floating-point rounding.
        max_new_tokens: length limit of an answer.
        chat_template: False prompts with plain text, for a base model.
        force: measure again what was measured of this very model, and drop the records that are there.
        replace_other: drop what was measured of another model; otherwise its records are refused.
        share: deal rows and questions to all processes of the launcher (`accelerate launch`, `torchrun`), each of
            which holds the whole model and must make this same call; the main process writes.
        progress: show bars if there is a terminal.
    """

    batch_size: int = 8
    max_new_tokens: int = 256
    chat_template: bool = True
    force: bool = False
    replace_other: bool = False
    share: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Fidelity:
    """How near a model is to its teacher: sums over the held-out rows, in their order."""

    # (R,) such as "kl_sum", or "dense_kl_sum" over the whole vocabulary; (R, bins) such as "position/kl_sum".
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
        dense = dict(zip(("dense_kl", "dense_reverse_kl", "dense_top1_agreement"), DENSE_ROWS, strict=True))
        return figures | {name: RowSums(sums[key], tokens) for name, key in dense.items() if key in sums}

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
            (bins.setdefault(kind, {"edges": list(EDGES[kind])}) if kind else rows)[key] = values
        return {"settings": dict(self.settings), "means": self.means, "rows": rows, "bins": bins}

    @classmethod
    def from_json(cls, data: Any, place: str) -> Fidelity:
        """Read it back; `place` is where it is, for the message of an error."""
        found = _check(data, place, {"settings": _ANY, "means": _ANY, "rows": _ANY, "bins": _ANY})
        _check(found["settings"].get("transfer_set"), f"{place}/settings/transfer_set", _LONGEST_TEXT)
        sums = list_sums(dense=DENSE_ROWS[0] in found["rows"])
        _check(found["bins"], f"{place}/bins", dict.fromkeys([kind for kind in sums if kind], Any))
        columns: dict[str, Floats] = {}
        for kind, keys in sums.items():
            part, where = (found["bins"][kind], f"{place}/bins/{kind}") if kind else (found["rows"], f"{place}/rows")
            _check(part, where, dict.fromkeys((*keys, "edges") if kind else keys, Any))
            if kind and part["edges"] != list(EDGES[kind]):
                raise _refuse(f"{where}/edges", part["edges"], f"{list(EDGES[kind])}")
            count = len(part["tokens"]) if isinstance(part["tokens"], list) else 1
            shape = (len(columns["tokens"]), len(EDGES[kind])) if kind else (count,)
            largest = np.full(shape, _LARGEST)
            tokens = _read_numbers(part["tokens"], f"{where}/tokens", np.zeros(shape), largest, whole=True)
            if not tokens.sum() > 0:
                raise _refuse(f"{where}/tokens", "no target token", "rows with answers")
            if kind and (tokens.sum(1) != columns["tokens"]).any():
                raise _refuse(f"{where}/tokens", "sums that differ from rows/tokens", "each row's tokens in its bins")
            for key in keys:
                bounds = -_ROUNDING * np.maximum(tokens, 1), largest  # nats
                if key in _SHARES:
                    bounds = np.zeros(shape), tokens if key in _COUNTS else tokens * (1 + _ROUNDING)
                sums_of_key = _read_numbers(part[key], f"{where}/{key}", *bounds, whole=key in _COUNTS)
                columns[f"{kind}/{key}".lstrip("/")] = sums_of_key
        return cls(columns, found["settings"])


@dataclass(frozen=True)
class Accuracy:
    """The verdicts on one list of questions."""

    verdicts: Mapping[str, Sequence[bool]]  # (N,) by grader, such as GSM8K's "correct_flexible" and "correct_strict"
    settings: Mapping[str, Any]  # what was asked and how; arms are compared where they are the same
    answers: Sequence[str | None] | None = None  # (N,) the last number of each answer to GSM8K; None where it has none

    @property
    def count(self) -> int:
        """How many questions."""
        return len(next(iter(self.verdicts.values())))

    @property
    def statistics(self) -> dict[str, RowSums]:
        """The share of correct answers: the main verdict under "", GSM8K's strict one under "_strict"."""
        names = {"correct": "", "correct_flexible": "", "correct_strict": "_strict"}
        return {names[grader]: RowSums(np.asarray(found)) for grader, found in self.verdicts.items()}

    def list_differences(self, other: Accuracy) -> list[str]:
        """In what the questions, or how they were asked, differ; nothing where arms can be compared."""
        keys = sorted({*self.settings, *other.settings})
        differing = [key for key in keys if self.settings.get(key) != other.settings.get(key)]
        return differing or ["their number"] * (self.count != other.count)


@dataclass(frozen=True)
class TaskResult:
    """One name given to lm-evaluation-harness, measured; it is run again if the settings differ."""

    settings: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, Mapping[str, float | None]]]  # by task, and by the harness' key, as "acc,none"
    verdicts: Mapping[str, Sequence[bool]]  # of each metric that is 0 or 1, as "lm-eval arc_easy, 0-shot, acc"


@dataclass(frozen=True)
class Arm:
    """One model of a comparison, and everything that was measured of it; `fingerprint` is a digest of the model."""

    name: str
    title: str
    model: str
    fingerprint: str
    size: ModelSize
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
        content: dict[str, Any] = {key: getattr(self, key) for key in ("title", "model", "fingerprint")}
        content |= {
            "arm": self.name,
            "size": {**asdict(self.size), "bits_per_weight": self.size.bits_per_weight},
            "fidelity": self.fidelity and self.fidelity.to_json(),
            "questions": {
                key: {"settings": one.settings, **one.verdicts, "answers": one.answers}
                for key, one in self.questions.items()
            },
            "tasks": {name: vars(one) for name, one in self.tasks.items()},
        }
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
        # Plain numbers go on one line: the sums would take one each.
        text = re.sub(r"\[\n[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"
        write_file(folder / f"{self.name}.json", text)

    @classmethod
    def read(cls, path: Path) -> Arm:
        """Read an arm's file and check everything in it; an error names the field and its value."""
        found = _check(read_object(path), f"{path}, ", _ARM)
        if found["arm"] != path.stem:
            raise _refuse(f"{path}, arm", found["arm"], f"{path.stem!r}, the file's name")
        measured = found["fidelity"]
        fidelity = None if measured is None else Fidelity.from_json(measured, f"{path}, fidelity")
        questions = {}
        for setting, one in found["questions"].items():
            verdicts = {key: one[key] for key in ("correct_flexible", "correct_strict")}
            counts = [len(each) for each in (*verdicts.values(), one["answers"])]
            if len(set(counts)) > 1:
                found_counts = "{} and {} verdicts, {} answers".format(*counts)
                raise _refuse(f"{path}, questions/{setting}", found_counts, "two verdicts and an answer a question")
            for number, (answer, *right) in enumerate(zip(one["answers"], *verdicts.values(), strict=True)):
                if answer is None and any(right):
                    raise _refuse(
                        f"{path}, questions/{setting}/answers/{number}", answer, "an answer, for it is correct"
                    )
            questions[setting] = Accuracy(verdicts, one["settings"], one["answers"])
        tasks = {name: TaskResult(**one) for name, one in found["tasks"].items()}
        title = " ".join(found["title"].split())
        size = ModelSize(**{key: value for key, value in found["size"].items() if key != "bits_per_weight"})
        return cls(path.stem, title, found["model"], found["fingerprint"], size, fidelity, questions, tasks)


def check_arm_name(name: str, title: str | None = None) -> None:
    """Refuse a name that would not be a plain file name, and a title that `Arm.read` would not take."""
    # Of ASCII: other letters make other file names under another locale or file system.
    if len(name) > _LONGEST_NAME or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(
            f"An arm's name is a file name of 1 to {_LONGEST_NAME} of a-z, A-Z, 0-9, - and _, found {name!r}. "
            "Choose another; --title takes any text."
        )
    if (length := len(printable(title or ""))) > _LONGEST_TEXT:
        raise ConfigError(f"The title has {length} characters; expected at most {_LONGEST_TEXT}. Choose a shorter one.")


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
    return DataError(f"{place.removesuffix(', ')}: expected {expected}, found {found!r:.120}. Evaluate this arm again.")


def _check(data: Any, place: str, kind: Any) -> Any:
    """Refuse what is not of this kind; `_ARM` shows how kinds are written."""
    if isinstance(kind, dict):
        if not isinstance(data, dict):
            raise _refuse(place, data, "an object")
        if str not in kind and data.keys() != kind.keys():
            raise _refuse(place, sorted(data), f"the keys {', '.join(kind)}")
        for key, value in data.items():
            if len(key) > _LONGEST_TEXT:
                raise _refuse(place, key, f"keys of at most {_LONGEST_TEXT} characters")
            inner = f"{place}{key}" if place.endswith(" ") else f"{place}/{key}"
            _check(value, inner, kind[str if str in kind else key])
    elif kind == [bool] and not (isinstance(data, list) and data and all(isinstance(one, bool) for one in data)):
        raise _refuse(place, data, "a list of true and false")
    elif kind == [str] and not (isinstance(data, list) and data and {type(one) for one in data} <= {str, type(None)}):
        raise _refuse(place, data, "a list of texts and null")
    elif isinstance(kind, int) and not (isinstance(data, str) and data.strip() and len(data) <= kind):
        raise _refuse(place, data, f"a text of at most {kind} characters")
    elif kind is int and not (type(data) is int and 0 <= data < 2**53):
        raise _refuse(place, data, "a number of bytes")
    elif isinstance(kind, tuple) and data is not None:
        _read_numbers(data, place, *map(np.array, kind))
    return data


def _read_numbers(data: Any, place: str, low: Floats, high: Floats, *, whole: bool = False) -> Floats:
    """Nested lists of the shape of the bounds, each number from `low` to `high`."""
    try:
        values = np.array(data)
    except ValueError:  # lists of different lengths
        values = np.array(None)
    # Of other kinds are texts, null, and whole numbers of more than 64 bits.
    is_fit = values.dtype.kind in ("iu" if whole else "iuf") and values.shape == low.shape and values.size
    if not is_fit or bool in map(type, np.array(data, dtype=object).flat):  # among numbers NumPy takes true for 1
        raise _refuse(place, data, f"{'whole ' * whole}numbers of shape {low.shape}")
    wrong = np.argwhere(~((values >= low) & (values <= high)))
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise _refuse(f"{place}{list(at)}", values[at].item(), f"a number from {low[at]:g} to {high[at]:g}")
    return values.astype(np.float64)
