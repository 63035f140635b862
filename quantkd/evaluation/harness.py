"""Any task of lm-evaluation-harness on a loaded model, through its own API; the verdict on each item is kept."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from quantkd.errors import ConfigError, MissingDependencyError
from quantkd.evaluation.arms import Arm, EvaluationSettings, TaskResult
from quantkd.evaluation.records import RecordFile, date_prompts
from quantkd.evaluation.sharing import is_writer
from quantkd.foreign import spread_harness
from quantkd.hardware import has_accelerator, process_state
from quantkd.models.network import evaluation_mode


@dataclass(frozen=True)
class HarnessTasks:
    """Which tasks to run, and how, in the names of `lm-eval run`; docs/harness.md describes each."""

    names: Sequence[str]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    rerun: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Those that the harness takes by the same name."""
        return {name: getattr(self, name) for name in ("num_fewshot", "limit", "apply_chat_template")}

    @cached_property
    def manager(self) -> Any:
        """The harness' list of tasks, read once; every name is looked up, so asking for it is a check."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingDependencyError(
                f"Tasks of lm-evaluation-harness need the package lm-eval: {error}. `pip install lm-eval`."
            ) from error
        if not self.names or not all(self.names):
            raise ConfigError(f"Expected names of tasks such as gsm8k or arc_easy, found {list(self.names)}.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"The limit of items per task is {self.limit}; expected at least 1.")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ConfigError(f"There is no folder {self.include_path}; expected one that holds task files (*.yaml).")
        with _quiet():
            if self.include_path is not None:
                # The harness' own 15,000 files take ten seconds to list. A group may need them, a task does not.
                manager = TaskManager(include_path=self.include_path, include_defaults=False)
                if all(name in manager.all_subtasks for name in self.names):
                    return manager
            manager = TaskManager(include_path=self.include_path)
        for name in self.names:
            if name not in manager.all_tasks and not (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
                close = difflib.get_close_matches(name, manager.all_tasks)
                raise ConfigError(
                    f"lm-eval knows no task {name!r}{f'; near it are {close}' if close else ''}. `lm-eval ls tasks` "
                    "lists all, and include_path takes a folder with your own."
                )
        return manager

    def measure(self, model: Any, tokenizer: Any, arm: Arm, place: Path, settings: EvaluationSettings) -> Iterator[Arm]:
        """Yield the arm after each task; one that is finished with the same settings is not run again."""
        for name in self.names:
            path = place / "lm-eval" / arm.name / (re.sub(r"[^\w.-]+", "_", name) + ".jsonl")
            dating, dated = date_prompts(tokenizer, path, self.apply_chat_template, settings.share, depth=1)
            facts = {**self._describe(name), **dated}
            if self.rerun and is_writer(settings.share):
                path.unlink(missing_ok=True)
            file = RecordFile(path, {**facts, "model": arm.fingerprint}, share=settings.share)
            if not self.rerun and name in arm.tasks and arm.tasks[name].settings == facts:
                yield arm
                continue
            found = self._run(model, dating, name, settings)
            if found is not None:  # otherwise another process has the result
                items = _number_items(found["samples"])
                file.replace(items)
                figures = {task: _read_figures(found, task) for task in found["results"]}
                shots = sorted({int(found["n-shot"][task]) for task in found["samples"]})
                title = f"lm-eval {name}, {'/'.join(map(str, shots))}-shot" + ", chat" * self.apply_chat_template
                verdicts = _read_verdicts(items, title, figures.get(name) if len(found["samples"]) == 1 else None)
                arm = replace(arm, tasks={**arm.tasks, name: TaskResult(facts, figures, verdicts)})
                yield arm

    def _describe(self, name: str) -> dict[str, Any]:
        """What, apart from the model, decides the result of one name, as JSON."""
        with _quiet():
            leaves = self.manager.load([name])["tasks"]
        digest = hashlib.sha256()  # another version of a local file is another evaluation
        for leaf, task in leaves.items():
            for value in ({leaf: task.dump_config()}, *islice(task.eval_docs, self.limit)):
                line = json.dumps(value, ensure_ascii=False, default=str)
                digest.update(re.sub(r" at 0x[0-9a-f]+", "", line).encode())  # a function's place in memory
        return {
            "task": name,
            "versions": {leaf: str(task.VERSION) for leaf, task in leaves.items()},
            "items": digest.hexdigest()[:16],
            **self.options,
            "lm_eval": version("lm_eval"),
        }

    def _run(self, model: Any, tokenizer: Any, name: str, settings: EvaluationSettings) -> dict[str, Any] | None:
        """What the harness gives for one name; None in other processes than the main one."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with evaluation_mode(model), _quiet():
            harnessed = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=settings.batch_size)
            if settings.share and process_state().num_processes > 1:
                spread_harness(harnessed, Accelerator(cpu=not has_accelerator()))
            how = {**self.options, "fewshot_as_multiturn": self.apply_chat_template, "task_manager": self.manager}
            found: dict[str, Any] | None = simple_evaluate(harnessed, tasks=[name], log_samples=True, **how)
        return found


def _number_items(samples: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
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


def _read_figures(found: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
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


def _read_verdicts(
    records: Sequence[Mapping[str, Any]], title: str, figures: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, list[bool]]:
    """The items of every metric that is 0 or 1 on each of them."""
    values: dict[tuple[str, str], list[tuple[int, Any]]] = {}
    for record in records:
        for metric, value in record["metrics"].items():
            values.setdefault((metric, record["filter"]), []).append((record["id"], value))
    num_items = len({record["id"] for record in records})
    verdicts = {}
    for (metric, filter_name), items in values.items():
        if len(items) != num_items or not all(isinstance(value, Real) and value in (0, 1) for _, value in items):
            continue
        if figures is not None:
            reported = figures.get(f"{metric},{filter_name}", {}).get("value")
            mean = sum(float(value) for _, value in items) / len(items)
            if reported is None or not math.isclose(reported, mean, abs_tol=1e-9):
                continue
        setting = f"{title}, {metric}" + (f", {filter_name}" if filter_name != "none" else "")
        verdicts[setting] = [bool(value) for _, value in sorted(items)]
    return verdicts


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """A number of NumPy as Python's, which JSON and `Real` know."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness' remarks on defaults, several per task."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
