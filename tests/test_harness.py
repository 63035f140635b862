"""lm-evaluation-harness through its own API: figures and verdicts as the harness gives them, and its GSM8K grader."""

import copy
import json
import random
import re
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import processes
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from quantkd.data.gsm8k import is_correct
from quantkd.errors import DataError, MissingDependencyError
from quantkd.evaluation.arms import EvaluationSettings
from quantkd.evaluation.harness import HarnessTasks
from quantkd.evaluation.measure import evaluate_arm
from quantkd.report import build_report
from tests.conftest import refused

pytestmark = pytest.mark.usefixtures("no_pictures")
MEAN = {"aggregation": "mean", "higher_is_better": True}
FIRST = {"function": "take_first"}
CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
    "doc_to_target": "label", "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm"}],
    "metadata": {"version": 1.0},
}  # fmt: skip
# Two of the same kind in a group, one that writes, one of likelihoods.
TASKS = {
    "sums_one": CHOICE,
    "sums_two": CHOICE,
    "written": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "filter_list": [
            {"name": "letters", "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, FIRST]},
            {"name": "all", "filter": [FIRST]},
        ],
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "likely": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}  # fmt: skip
POOLED = [{"metric": "acc", "weight_by_size": True}]
GROUP = {"group": "sums", "task": ["sums_one", "sums_two"], "aggregate_metric_list": POOLED}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def task_dir(tmp_path):
    """Task files, which are YAML and so may be JSON, with their items beside them."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    docs = [
        {"question": f"{a} + {b} =", "choices": [str(a + b), str(a * b), "no"], "label": 0, "answer": "abc"[a % 3]}
        for a, b in [(1, 2), (3, 4), (5, 6), (7, 8), (9, 1)]
    ]
    write_lines(folder / "docs.jsonl", docs)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}}
    for name, task in TASKS.items():
        write_lines(folder / f"{name}.yaml", [{"task": name, **data, "test_split": "test", **task}])
    write_lines(folder / "group.yaml", [GROUP])
    return folder


@pytest.fixture
def measure(tiny_model, tiny_tokenizer, tmp_path):
    def measure(tasks, batch_size=8):
        settings = EvaluationSettings(batch_size, progress=False)
        go = partial(evaluate_arm, tiny_model, tiny_tokenizer, tmp_path, arm="x", model_name="tiny")
        return go(tasks=tasks, settings=settings).tasks

    return measure


def run_harness(tokenizer, task_dir, names, batch_size=2, **options):
    """What the harness gives when it loads a model by itself, as `lm-eval run --model hf --model_args ...` does."""
    model_args = {"pretrained": str(tokenizer), "tokenizer": str(tokenizer), "dtype": "float32"}
    model_args |= {key: options.pop(key) for key in ("pretrained", "peft") if key in options}
    manager = TaskManager(include_path=str(task_dir), include_defaults=False)
    return lm_eval.simple_evaluate(
        "hf", model_args=model_args, tasks=names, batch_size=batch_size, device="cpu", task_manager=manager, **options
    )


@pytest.mark.parametrize("chat", [False, True])
def test_figures_are_those_of_the_harness(tiny_model, tiny_tokenizer, tiny_model_path, task_dir, measure, chat):
    tasks = HarnessTasks(["sums_one", "written", "likely"], str(task_dir), limit=4, apply_chat_template=chat)
    padding = tiny_tokenizer.padding_side
    results = measure(tasks, batch_size=2)
    assert tiny_tokenizer.padding_side == padding and not tiny_model.training
    options = {"limit": 4, "apply_chat_template": chat, "fewshot_as_multiturn": chat}
    expected = run_harness(tiny_model_path, task_dir, tasks.names, **options)["results"]
    assert list(results) == list(tasks.names)
    for name in tasks.names:
        (figures,) = results[name].figures.values()
        wanted = {key: value for key, value in expected[name].items() if "," in key}
        assert figures.keys() == {key for key in wanted if "_stderr" not in key}
        for key, figure in figures.items():
            error = wanted[key.replace(",", "_stderr,")]
            assert figure == {"value": wanted[key], "n": 4, "stderr": None if error == "N/A" else error}
    way = "0-shot, chat" if chat else "0-shot"
    kinds = {"sums_one": ("acc", "acc_norm"), "written": ("exact_match, letters", "exact_match, all"), "likely": ()}
    for name, titles in kinds.items():  # a likelihood is no verdict
        assert results[name].verdicts.keys() == {f"lm-eval {name}, {way}, {title}" for title in titles}


def test_a_template_with_a_date_keeps_it_over_midnight(clock, tiny_model, tiny_tokenizer, task_dir, tmp_path):
    tokenizer, kept = copy.deepcopy(tiny_tokenizer), []
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + tokenizer.chat_template
    for arm, clock.day in (("x", "2025-12-31"), ("x", "2026-01-01"), ("y", "2026-01-02")):
        tasks = HarnessTasks(["written"], str(task_dir), limit=1, apply_chat_template=True, rerun=True)
        evaluate_arm(tiny_model, tokenizer, tmp_path, arm=arm, model_name="tiny", tasks=tasks)
        kept.append((tmp_path / "evaluation" / "lm-eval" / arm / "written.jsonl").read_text())
    assert len(set(kept)) == 1 and "31 Dec 2025 " in kept[0]


def test_every_item_is_kept(task_dir, tmp_path, measure):
    result = measure(HarnessTasks(["written"], str(task_dir)))["written"]
    records = read_lines(tmp_path / "evaluation" / "lm-eval" / "x" / "written.jsonl")
    assert [(r["id"], r["filter"]) for r in records] == [(i, f) for i in range(5) for f in ("letters", "all")]
    for record in records:
        assert record["doc"]["question"] == record["arguments"][0][0] and record["resps"] and record["filtered_resps"]
    rows = result.verdicts["lm-eval written, 0-shot, exact_match, letters"]
    for row, record in zip(rows, records[::2], strict=True):
        letter = re.search("[a-z]", record["resps"][0][0])
        assert row == bool(letter and letter[0] == record["target"])
    figure = result.figures["written"]["exact_match,letters"]
    assert figure["value"] == pytest.approx(sum(rows) / 5)


def test_a_group_pools_its_items(task_dir, measure):
    results = measure(HarnessTasks(["sums", "sums_one"], str(task_dir)))
    alone = results["sums_one"].verdicts["lm-eval sums_one, 0-shot, acc"]
    assert results["sums"].verdicts["lm-eval sums, 0-shot, acc"] == [*alone, *alone] and len(alone) == 5
    assert set(results["sums"].figures) == {"sums", "sums_one", "sums_two"}
    assert results["sums"].figures["sums"]["acc,none"]["n"] == 10
    assert results["sums"].figures["sums"]["acc,none"]["value"] == pytest.approx(sum(alone) / 5)


def test_a_finished_task_is_not_run_again(tiny_model, task_dir, tmp_path, measure, monkeypatch):
    run = Mock(side_effect=lm_eval.simple_evaluate)
    monkeypatch.setattr(lm_eval, "simple_evaluate", run)

    def evaluate(**options):
        return measure(HarnessTasks(["sums_one"], str(task_dir), **{"limit": 3, **options}))["sums_one"]

    first = evaluate()
    assert evaluate() == first and run.call_count == 1
    assert evaluate(rerun=True) == first and run.call_count == 2
    refused(DataError, "limit is 3, not 4", evaluate, limit=4)
    lines = (task_dir / "docs.jsonl").read_text()
    (task_dir / "docs.jsonl").write_text(lines.replace("1 + 2", "2 + 1"))
    refused(DataError, "another evaluation: items is", evaluate)
    (task_dir / "docs.jsonl").write_text(lines)
    assert evaluate() == first and run.call_count == 2
    # Its items are there, but the process ended before the figures were written.
    (tmp_path / "evaluation" / "x.json").unlink()
    assert evaluate() == first and run.call_count == 3
    tiny_model.lm_head.weight.data.mul_(0.5)
    refused(DataError, "another evaluation: model is", evaluate)
    assert evaluate(rerun=True).settings == first.settings


def test_a_killed_task_is_run_again(task_dir, tmp_path, measure, monkeypatch):
    """It leaves its settings, and no items that could pass for all of them."""
    tasks = HarnessTasks(["sums_one"], str(task_dir))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(lm_eval, "simple_evaluate", Mock(side_effect=KeyboardInterrupt))
        measure(tasks)
    kept = [path.name for path in (tmp_path / "evaluation" / "lm-eval" / "x").iterdir()]
    assert kept == ["sums_one.jsonl.settings.json"] and measure(tasks)["sums_one"].verdicts


@pytest.mark.parametrize(("words", "said"), [
    ("--tasks sums_one,", "Expected names of tasks"), ("--tasks ,", "Expected names of tasks"),
    ("--tasks gsm8k --task_limit 0", "is 0; expected at least 1"),
    ("--tasks gsm8k --include_path nowhere", "There is no folder nowhere"),
    ("--tasks gsm8l", "lm-eval knows no task 'gsm8l'; near it are .*'gsm8k'"),
])  # fmt: skip
def test_wrong_tasks_are_refused_before_a_model_is_loaded(tmp_path, cli, words, said):
    base = f"evaluate --arm x --model_name_or_path no/model --run_dir {tmp_path} "
    code, _, error = cli(*(base + words).split())
    assert code == 1 and re.search(said, error.splitlines()[-1])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingDependencyError, match="pip install lm-eval"):
        HarnessTasks(["gsm8k"]).manager  # noqa: B018


@pytest.fixture
def evaluate(cli, task_dir, tiny_model_path):
    def evaluate(arm, run_dir, *words, model=tiny_model_path, tasks="sums_one,written"):
        options = ["--run_dir", run_dir, "--tasks", tasks, "--include_path", task_dir, "--dtype", "float32", *words]
        cli.ok("evaluate", "--arm", arm, "--model_name_or_path", model, *options)
        return options

    return evaluate


def test_the_report_shows_tasks_with_intervals_and_paired_tests(evaluate, tmp_path):
    run_dir = tmp_path / "run"
    for arm in ("teacher", "before", "after"):
        evaluate(arm, run_dir, *["--full_precision"] * (arm == "teacher"))
    page = build_report(run_dir).read_text()
    results = json.loads((run_dir / "results.json").read_text())
    arm = json.loads((run_dir / "evaluation" / "before.json").read_text())
    key = "accuracy_lm_eval_sums_one_0_shot_acc"
    assert results["metrics"][key] == "Accuracy, lm-eval sums_one, 0-shot, acc" and results["metrics"][key] in page
    assert not any(name.endswith("_strict") for name in results["metrics"])
    task, measured = arm["tasks"]["sums_one"], results["arms"]["before"]["metrics"][key]
    share = sum(task["verdicts"]["lm-eval sums_one, 0-shot, acc"]) / 5
    assert measured["value"] == task["figures"]["sums_one"]["acc,none"]["value"] == share
    test = results["arms"]["after"]["mcnemar"][key]["before"]
    assert 0 <= test["p_value"] <= 1
    # Two loads of one student give one answer.
    assert test["only_this"] == 0


def test_processes_share_the_items_and_give_the_same_figures(evaluate, tiny_model_path, tmp_path):
    # One item a batch, otherwise other batches, and another rounding of the last digits.
    options = evaluate("x", tmp_path / "alone", "--full_precision", "--batch_size", "1")
    words = ["-m", "quantkd", "evaluate", "--arm", "x", "--model_name_or_path", tiny_model_path, *options]
    processes.run([*words, "--run_dir", tmp_path / "shared"], tmp_path / "out.txt", 2)
    alone, shared = (tmp_path / way / "evaluation" for way in ("alone", "shared"))
    assert (alone / "x.json").read_bytes() == (shared / "x.json").read_bytes()
    for name in ("sums_one", "written"):
        one, other = (read_lines(folder / "lm-eval" / "x" / f"{name}.jsonl") for folder in (alone, shared))
        for record in (*one, *other):
            del record["resps"]  # the harness repeats a last item so that all processes have as many
        assert one == other


class Scripted(LM):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def generate_until(self, requests, disable_tqdm=False):
        return [self.outputs[request.doc_id] for request in requests]

    loglikelihood = loglikelihood_rolling = None


PIECES = [
    "#### ", "####", "### ", "#### # ", "= ", "**", "$", "-", "\u00a3", "+", " ", ",", ".", "...", "%", "!", "\n", "0",
    "\u00b2", "\u0663", " dollars", "At 3:45 they pay 6.50", "1. Step", "<<3*4=12>>12", "$x$", "So, we get:",
]  # fmt: skip
NUMBERS = ["{n}", "{n:,}", "{n}.", "{n}.00", "{n}.5", "{n:,}.0", "0{n}", "${n}", "-{n}"]


def write_output(rng, gold):
    """An answer as models write them, from the well-behaved to the odd."""
    number = rng.choice(NUMBERS[:2] * 4 + NUMBERS).format(n=rng.choice([gold] * 6 + [rng.randrange(2000)]))
    parts = [*rng.choices(PIECES, k=rng.randrange(6)), rng.choice(["\n#### "] * 3 + ["= ", "####"]) + number]
    return "".join(parts + rng.choices(PIECES, k=rng.choice([0, 0, 0, 1, 3])))


def test_the_harness_and_we_grade_gsm8k_alike(tmp_path):
    """500 outputs through the harness' own gsm8k task: its filters, its metric, and what the metric ignores."""
    rng = random.Random(0)
    golds = [rng.choice([rng.randrange(20), rng.randrange(1000), rng.randrange(10**6)]) for _ in range(500)]
    outputs = [write_output(rng, gold) for gold in golds]
    rows = [{"question": f"Q{i}?", "answer": f"so <<1+1=2>>2\n#### {gold:,}"} for i, gold in enumerate(golds)]
    write_lines(tmp_path / "gsm8k.jsonl", rows)
    task = {"include": str(Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"), "task": "gsm8k_here"}
    task |= {"dataset_path": "json", "dataset_name": None, "num_fewshot": 0}
    files = dict.fromkeys(("train", "test"), str(tmp_path / "gsm8k.jsonl"))
    write_lines(tmp_path / "gsm8k.yaml", [{**task, "dataset_kwargs": {"data_files": files}}])
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(Scripted(outputs), tasks=["gsm8k_here"], task_manager=manager)
    samples = found["samples"]["gsm8k_here"]
    counts = {}
    for name, mode in (("strict-match", "strict"), ("flexible-extract", "flexible")):
        theirs = {sample["doc_id"]: bool(sample["exact_match"]) for sample in samples if sample["filter"] == name}
        ours = {i: is_correct(outputs[i], rows[i]["answer"], mode) for i in range(500)}
        assert {i: outputs[i] for i in ours if ours[i] != theirs[i]} == {}
        counts[mode] = sum(ours.values())
    assert all(100 < count < 400 for count in counts.values()), counts  # both verdicts are common, or nothing is shown
