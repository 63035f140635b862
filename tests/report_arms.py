"""Arm files with made-up figures, for the tests of the report."""

import json
from collections.abc import Callable, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap

from quantkd.evaluation.arms import BINNED, EDGES, Fidelity
from quantkd.report import build_report

TOKENS = [10, 20, 30, 40]
SIZES = {name: {"adapters": 84_000} for name in ("start", "after", "control")}
SIZES |= {name: {"codes": 2_000_000} for name in ("teacher", "merged")}
LEVELS = {"teacher": (0.0, 90), "before": (0.4, 50), "after": (0.1, 80)}  # KL per token, questions solved of 100


def bootstrap_by_scipy(columns: Sequence[ArrayLike], statistic: Callable[..., Any]) -> tuple[float, float]:
    """scipy's own interval over rows, which are drawn together in all columns."""
    found = bootstrap(
        columns, statistic, paired=True, vectorized=True, n_resamples=2000, batch=256, method="percentile",
        random_state=np.random.default_rng(0),
    )  # fmt: skip
    return tuple(found.confidence_interval)


def make_fidelity(
    tokens: ArrayLike, kl: ArrayLike, ce: ArrayLike, agree: ArrayLike, dense: bool = False, **bins: ArrayLike
) -> dict[str, Any]:
    """Sums per row; of bins that are not given, such as `position_kl_sum`, the first holds everything."""
    rows = {"tokens": tokens, "kl_sum": kl, "reverse_kl_sum": 1.5 * np.asarray(kl), "ce_sum": ce, "agree": agree}
    if dense:
        rows |= {"dense_kl_sum": 1.1 * np.asarray(kl), "dense_reverse_kl_sum": 1.7 * np.asarray(kl)}
        rows["dense_agree"] = tokens
    columns = {key: np.asarray(values, dtype=np.float64) for key, values in rows.items()}
    for kind, keys in BINNED.items():
        plain = kind.removeprefix("dense_")
        for key in keys if kind == plain or dense else ():
            sums = np.zeros((len(columns["tokens"]), len(EDGES[kind])))
            given = np.asarray(bins.get(f"{plain}_{key}", columns["kl_sum" if key == "kl_sum" else "tokens"][:, None]))
            sums[:, : given.shape[1]] = given
            columns[f"{kind}/{key}"] = sums * (1.1 if kind != plain and key == "kl_sum" else 1)
    return Fidelity(columns, {"transfer_set": "abc"}).to_json()


def make_verdicts(solved: int, strict: int | None = None) -> dict[str, Any]:
    """The first of 100 questions are solved; to the others each arm has a number of its own."""
    flexible = [place < solved for place in range(100)]
    strictly = [place < (solved if strict is None else strict) for place in range(100)]
    settings = {"prompts": "aa", "golds": "bb", "max_new_tokens": 256}
    answers = [f"{place}" if right else f"{place}.{solved}" for place, right in enumerate(flexible)]
    return {"settings": settings, "correct_flexible": flexible, "correct_strict": strictly, "answers": answers}


def make_arm(name: str, level: float, solved: int) -> dict[str, Any]:
    """The JSON of an arm, of a million weights in linear layers; KL grows with the row's number."""
    tokens = np.array(TOKENS)
    kl = tokens * level * (1 + 0.1 * np.arange(4))
    parts = {"codes": 500_000, "constants": 16_000, "adapters": 0, "rest": 500_000, **SIZES.get(name, {})}
    bits = 8e-6 * (sum(parts.values()) - parts["rest"])
    return {
        "arm": name, "title": f"The {name} | arm", "model": "tiny", "fingerprint": name, "tasks": {},
        "size": {**parts, "linear_weights": 1_000_000, "bits_per_weight": bits},
        "fidelity": make_fidelity(tokens, kl, tokens * (0.3 + level), np.round(tokens * (1 - level / 2))),
        "questions": {setting: make_verdicts(solved, solved - 5) for setting in ("8-shot", "0-shot")},
    }  # fmt: skip


def make_arms() -> dict[str, dict[str, Any]]:
    return {name: make_arm(name, *level) for name, level in LEVELS.items()}


def build(run: Path, arms: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """Write the arms, and build the report: its results and its page, the tables of which must be well-formed."""
    (run / "evaluation").mkdir(parents=True, exist_ok=True)
    for name, arm in arms.items():
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(arm))
    assert build_report(run) == run / "report.md"
    page = (run / "report.md").read_text()
    assert all(len(widths) == 1 for widths in read_tables(page)) and "\n\n\n" not in page and not page.startswith("\n")
    return json.loads((run / "results.json").read_text()), page


def read_tables(page: str) -> list[set[int]]:
    """How many cells the lines of each table have."""
    blocks = [[line for line in block.splitlines() if line.startswith("|")] for block in page.split("\n\n")]
    return [{line.replace("\\|", "").count("|") for line in lines} for lines in blocks if lines]


def spoil(arm: dict[str, Any], path: str, value: Any) -> None:
    """Set one value inside an arm, such as that of "fidelity/rows/kl_sum/2"."""
    *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    reduce(getitem, keys, arm)[last] = value
