"""What a task of lm-evaluation-harness gave: its figures, the verdict on each item, and the files that keep both."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from quantkd.errors import DataError


@dataclass(frozen=True)
class TaskResult:
    """One name of `HarnessTasks.names`, measured.

    Args:
        figures: for the task, or for each of a group's and for the group itself, the harness' metrics by its own key,
            such as "acc,none": `value`, `stderr` (None where it gives none) and `n`, the number of items.
        verdicts: for each metric that is 0 or 1 on every item, under a title such as "lm-eval arc_easy, 0-shot, acc",
            `{"id", "correct_flexible"}` an item: an arm's accuracy, as the report reads it. A group's items are pooled.
        items: what the model was asked, and how: arms are compared where these are the same.
    """

    figures: dict[str, dict[str, dict[str, Any]]]
    verdicts: dict[str, list[dict[str, Any]]]
    items: dict[str, Any]


def number_items(samples: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The harness' samples as records, one an item and filter."""
    records, start = [], 0
    for task, logged in samples.items():
        ordered = sorted(logged, key=lambda sample: sample["doc_id"])  # stable, so filters keep their order
        places = {doc: start + place for place, doc in enumerate(dict.fromkeys(s["doc_id"] for s in ordered))}
        for sample in ordered:
            kept = {key: sample[key] for key in ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps")}
            metrics = {metric: _plain(sample[metric]) for metric in sample["metrics"]}
            record = {"id": places[sample["doc_id"]], "task": task, "filter": sample["filter"], "metrics": metrics}
            records.append({**record, **kept})
        start += len(places)
    return records


def read_figures(found: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """The metrics of one task or group, as `TaskResult.figures` holds them."""
    values = found["results"][task]
    count = found["n-samples"].get(task, {}).get("effective", values.get("sample_len"))
    figures = {}
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        items = (values.get("sample_count") or {}).get(key, count)  # of a group, whose tasks need not all have it
        error = _finite(values.get(f"{metric}_stderr,{filter_name}"))
        figures[key] = {"value": _finite(value), "stderr": error, "n": items}
    return figures


def read_verdicts(
    records: Sequence[Mapping[str, Any]], title: str, figures: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, list[dict[str, Any]]]:
    """The items of every metric that is 0 or 1 on each of them."""
    values: dict[tuple[str, str], list[tuple[int, Any]]] = {}
    for record in records:
        for metric, value in record["metrics"].items():
            values.setdefault((metric, record["filter"]), []).append((record["id"], value))
    num_items = len({record["id"] for record in records})
    verdicts = {}
    for (metric, filter_name), items in values.items():
        if len(items) != num_items or not all(_is_verdict(value) for _, value in items):
            continue
        if figures is not None:
            reported = figures.get(f"{metric},{filter_name}", {}).get("value")
            mean = sum(float(value) for _, value in items) / len(items)
            if reported is None or not math.isclose(reported, mean, abs_tol=1e-9):
                continue
        setting = f"{title}, {metric}" + (f", {filter_name}" if filter_name != "none" else "")
        verdicts[setting] = [{"id": place, "correct_flexible": bool(value)} for place, value in sorted(items)]
    return verdicts


def _is_verdict(value: Any) -> bool:
    return isinstance(value, Real) and float(value) in (0.0, 1.0)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def read_kept(path: Path, settings: Mapping[str, Any]) -> TaskResult | None:
    """A result that was written before."""
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        found, figures, verdicts = dict(kept["settings"]), dict(kept["figures"]), dict(kept["verdicts"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error!r}. Ask for a rerun.") from error
    differing = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    if differing:
        pairs = ", ".join(f"{key} is {found.get(key)!r}, not {settings.get(key)!r}" for key in differing)
        raise DataError(f"{path} holds another evaluation: {pairs}. Ask for a rerun, or choose another arm.")
    return TaskResult(figures, verdicts, describe_items(settings))


def describe_items(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a task's settings must be the same for two models that are compared."""
    return {key: value for key, value in settings.items() if key != "model"}


def write_result(
    path: Path, settings: Mapping[str, Any], result: TaskResult, records: Iterable[Mapping[str, Any]]
) -> None:
    """Write the records beside `path` and then the result: one that lies there says that the task is finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with path.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
        file.writelines(to_line(record) + "\n" for record in records)
    temporary = path.with_suffix(".json.tmp")
    content = {"settings": dict(settings), "figures": result.figures, "verdicts": result.verdicts}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def to_line(value: Any) -> str:
    """JSON on one line, the same in every process."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return re.sub(r" at 0x[0-9a-f]+", "", text)  # where a function lies in memory


def _plain(value: Any) -> Any:
    """A number of NumPy as Python's, which JSON and `Real` know."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
