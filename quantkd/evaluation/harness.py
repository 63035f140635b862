"""Any task of lm-evaluation-harness on a loaded model, through its own API; the verdict on each item is kept.

The harness builds the prompts, runs the model and scores. Here its figures are put beside the verdicts that a paired
test needs, and kept, so that a finished task is not run again.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from quantkd.errors import ConfigError, DataError, MissingDependencyError
from quantkd.evaluation.kept import compute_arm_fingerprint
from quantkd.evaluation.task_results import (
    TaskResult,
    describe_items,
    number_items,
    read_figures,
    read_kept,
    read_verdicts,
    to_line,
    write_result,
)
from quantkd.hardware import has_accelerator, process_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class HarnessTasks:
    """Which tasks to run, and how. The names are those of `lm-eval run`.

    Args:
        names: tasks, groups or tags that the harness knows, or YAML files of tasks.
        include_path: a folder with task files of one's own.
        num_fewshot: solved examples before each item; each task's own number if None. The harness leaves a task at 0
            that says 0 itself.
        limit: at most this many items a task, from the front; all if None.
        apply_chat_template: put each prompt into the chat template, the examples as earlier turns.
        rerun: run also what was finished before.
    """

    names: Sequence[str]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    rerun: bool = False

    @cached_property
    def manager(self) -> Any:
        """The harness' own list of tasks, read once; every name is looked up, so asking for it is a check."""
        return _load_manager(self)


def evaluate_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: HarnessTasks,
    folder: str | Path,
    *,
    batch_size: int = 8,
    share: bool = False,
) -> dict[str, TaskResult]:
    """Run tasks of lm-evaluation-harness on a model."""
    manager = tasks.manager
    fingerprint = compute_arm_fingerprint(model)
    results = {}
    for name in tasks.names:
        path = Path(folder) / (re.sub(r"[^\w.-]+", "_", name) + ".json")
        with _quiet():
            settings = _describe(manager.load([name])["tasks"], name, tasks, fingerprint)
            result = None if tasks.rerun else _read_once(path, settings, share)
            if result is None:
                found = _run(model, tokenizer, manager, name, tasks, batch_size, share)
                if found is None:
                    continue  # another process holds the result
                result = TaskResult(found.figures, found.verdicts, describe_items(settings))
                write_result(path, settings, result, found.records)
        if not share or process_state().is_main_process:
            results[name] = result
    return results


def _describe(leaves: Mapping[str, Any], name: str, tasks: HarnessTasks, fingerprint: str) -> dict[str, Any]:
    """What decides the result of one name, as JSON."""
    return {
        "task": name,
        "versions": {leaf: str(task.VERSION) for leaf, task in leaves.items()},
        "items": _digest_items(leaves, tasks.limit),
        "num_fewshot": tasks.num_fewshot,
        "limit": tasks.limit,
        "apply_chat_template": tasks.apply_chat_template,
        "model": fingerprint,
        "lm_eval": version("lm_eval"),
    }


def _load_manager(tasks: HarnessTasks) -> Any:
    """The harness' list of tasks, with every name looked up."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError(
            f"Tasks of lm-evaluation-harness need the package lm-eval: {error}. `pip install quantkd[eval]`."
        ) from error
    if not tasks.names or not all(tasks.names):
        raise ConfigError(f"Expected names of tasks such as gsm8k or arc_easy, found {list(tasks.names)}.")
    if tasks.limit is not None and tasks.limit < 1:
        raise ConfigError(f"The limit of items a task is {tasks.limit}; expected at least 1.")
    if tasks.include_path is not None and not Path(tasks.include_path).is_dir():
        raise ConfigError(f"There is no folder {tasks.include_path}; expected one that holds task files (*.yaml).")
    with _quiet():
        if tasks.include_path is not None:
            # The harness' own fifteen thousand files take ten seconds to list. A group may need them, a task does not.
            manager = TaskManager(include_path=tasks.include_path, include_defaults=False)
            if all(name in manager.all_subtasks for name in tasks.names):
                return manager
        manager = TaskManager(include_path=tasks.include_path)
    for name in tasks.names:
        if name not in manager.all_tasks and not (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
            close = difflib.get_close_matches(name, manager.all_tasks)
            raise ConfigError(
                f"lm-eval knows no task {name!r}{f'; near it are {close}' if close else ''}. `lm-eval ls tasks` lists "
                "all, and include_path takes a folder with your own."
            )
    return manager


class _Run(NamedTuple):
    figures: dict[str, dict[str, dict[str, Any]]]
    verdicts: dict[str, list[dict[str, Any]]]
    records: list[dict[str, Any]]


def _run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    manager: Any,
    name: str,
    tasks: HarnessTasks,
    batch_size: int,
    share: bool,
) -> _Run | None:
    """One name, measured; None in other processes than the main one."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harnessed = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    state = process_state()
    if share and state.num_processes > 1:
        # A loaded model's processes are left to the caller; these are what HFLM sets when it loads one itself.
        harnessed.accelerator = Accelerator(cpu=not has_accelerator())
        harnessed._rank, harnessed._world_size = state.process_index, state.num_processes
    training = model.training
    try:
        found = simple_evaluate(
            harnessed,
            tasks=[name],
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            apply_chat_template=tasks.apply_chat_template,
            fewshot_as_multiturn=tasks.apply_chat_template,
            task_manager=manager,
            log_samples=True,
        )
    finally:
        model.train(training)
    if found is None:
        return None
    records = number_items(found["samples"])
    figures = {task: read_figures(found, task) for task in found["results"]}
    shots = sorted({int(found["n-shot"][task]) for task in found["samples"]})
    title = f"lm-eval {name}, {'/'.join(map(str, shots))}-shot" + ", chat" * tasks.apply_chat_template
    verdicts = read_verdicts(records, title, figures.get(name) if len(found["samples"]) == 1 else None)
    return _Run(figures, verdicts, records)


def _digest_items(leaves: Mapping[str, Any], limit: int | None) -> str:
    """A digest of the tasks' settings and items, so that another version of a local file is another evaluation."""
    digest = hashlib.sha256()
    for name, task in leaves.items():
        digest.update(to_line({name: task.dump_config()}).encode())
        for item in islice(task.eval_docs, limit):
            digest.update(to_line(item).encode())
    return digest.hexdigest()[:16]


def _read_once(path: Path, settings: Mapping[str, Any], share: bool) -> TaskResult | None:
    """What the main process reads, in all processes, so that all run a task or none does."""
    if not share or process_state().num_processes == 1:
        return read_kept(path, settings)
    answer: list[Any] = [None, None]
    if process_state().is_main_process:
        try:
            answer[0] = read_kept(path, settings)
        except DataError as error:
            answer[1] = str(error)
    result: TaskResult | None
    result, refusal = broadcast_object_list(answer)
    if refusal is not None:
        raise DataError(refusal)
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness' remarks on defaults, of which there are several a task."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
