"""Which settings: one at a time away from a base recipe, on two domains.

The teacher answers GSM8K *training* questions and built-in word problems, once each; some of its answers are learned
from, others are held out to measure on. GSM8K's test questions are not touched, so that settings chosen here can be
reported there. Every trial is a fresh 4-bit student, and differs in one thing from the base recipe. KL is forward KL to
the teacher in nats per token, with a 95% bootstrap interval over held-out rows; `recovered` is the share of the KL of
the student without adapters that is gone. `vs base` is the ratio of a trial's KL to the base recipe's, with a paired
interval over the same rows: where it contains 1, the two do not differ as far as these rows can tell.

    python benchmarks/recipes.py --cache runs/recipes

What was captured and tried is kept in --cache, trial by trial, and found again there. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _sources import add_sources, find_gsm8k, parse
from peft import LoraConfig

from quantkd import (
    GenerationSettings,
    Nucleus,
    QuantizedDistillationConfig,
    QuantizedDistillationTrainer,
    RunSettings,
    TopK,
    TransferSet,
    capture,
)
from quantkd.data.arithmetic import generate_problems
from quantkd.data.gsm8k import build_prompt, load_gsm8k
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.evaluation.stats import RowSums, bootstrap_interval
from quantkd.hardware import native_compute_dtype
from quantkd.models.student import load_student
from quantkd.teacher import load_teacher
from quantkd.transfer_set import convert
from quantkd.transfer_set.rules import parse_storage_rule

DOMAINS = ("gsm8k", "arithmetic")
QUESTIONS = 256
MAX_NEW_TOKENS = {"gsm8k": 160, "arithmetic": 128}


@dataclass(frozen=True)
class Recipe:
    """What is chosen. The defaults are the base recipe."""

    init: str = "covariance"
    r: int = 32
    lora_alpha: int | None = None  # 2 * r
    lora_dropout: float = 0.0
    learning_rate: float = 3e-5
    lr_scheduler_type: str = "cosine"
    alpha: float = 1.0
    temperature: float = 1.0
    epochs: float = 1
    rows: int = 64
    storage: str = "nucleus:0.95:64"
    optim: str = "adamw_torch"


BASE = Recipe()
TRIALS = (
    BASE,
    *(replace(BASE, learning_rate=rate) for rate in (1e-5, 1e-4, 3e-4)),
    *(replace(BASE, r=r) for r in (16, 64)),
    *(replace(BASE, alpha=alpha) for alpha in (0.0, 0.5)),
    replace(BASE, temperature=2.0),
    replace(BASE, lr_scheduler_type="linear"),
    replace(BASE, epochs=3),
    replace(BASE, rows=192),
    replace(BASE, storage="topk:4"),
    replace(BASE, init="loftq"),
    replace(BASE, init="zero", learning_rate=3e-4),
    # The paper's preset as it is.
    Recipe("zero", 4, 8, 0.2, 5e-8, "linear", 0.5, epochs=2, optim="sgd"),
)


def load_sets(domain: str, args: argparse.Namespace) -> tuple[TransferSet, TransferSet]:
    """Rows to learn from and rows to measure on, captured if the cache has none."""
    # The demo's problems come from seeds 0, 1 and 2.
    if domain == "gsm8k":
        rows = load_gsm8k(find_gsm8k(args.gsm8k), "train", QUESTIONS)
    else:
        rows = generate_problems(QUESTIONS, 1000)
    folder = Path(args.cache) / domain
    if not (folder / "index.json").is_file():
        teacher, tokenizer = load_teacher(args.model)
        capture(
            teacher, [build_prompt(row["question"]) for row in rows], folder, tokenizer=tokenizer,
            storage=Nucleus(0.95, max_k=64), generation=GenerationSettings(MAX_NEW_TOKENS[domain]),
            run=RunSettings(batch_size=32),
        )  # fmt: skip
    answers, learned = TransferSet.open(folder), max(recipe.rows for recipe in TRIALS)
    return answers[:learned], answers[learned : learned + args.held_out_rows]


def trimmed(train: TransferSet, storage: str, folder: Path) -> TransferSet:
    """The same rows with the entries that a storage rule keeps."""
    if storage == BASE.storage:
        return train
    rule = parse_storage_rule(storage)
    if not isinstance(rule, TopK | Nucleus):
        raise SystemExit(f"Entries of {storage} cannot be made of stored ones.")
    if not (folder / "index.json").is_file():
        convert(train, folder, rule)
    return TransferSet.open(folder)


def run_trial(domain: str, recipe: Recipe | None, args: argparse.Namespace) -> dict[str, Any]:
    """One student's figures after training, or before any without a recipe."""
    train, held_out = load_sets(domain, args)
    student = load_student(args.model)
    if recipe is None:
        return measure(student, held_out)
    rows = trimmed(train, recipe.storage, Path(args.cache) / f"{domain}-{recipe.storage.replace(':', '-')}")
    arguments = QuantizedDistillationConfig(
        str(Path(args.cache) / "student"), learning_rate=recipe.learning_rate, init=recipe.init, packing=True,
        lr_scheduler_type=recipe.lr_scheduler_type, warmup_steps=0 if recipe.optim == "sgd" else 4,
        alpha=recipe.alpha, temperature=recipe.temperature, num_train_epochs=recipe.epochs, optim=recipe.optim,
        optim_args="momentum=0.9" if recipe.optim == "sgd" else None, per_device_train_batch_size=8,
        save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(
        r=recipe.r, lora_alpha=recipe.lora_alpha or 2 * recipe.r, lora_dropout=recipe.lora_dropout,
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    began = time.perf_counter()
    trainer = QuantizedDistillationTrainer(student, arguments, train_dataset=rows[: recipe.rows], peft_config=lora)
    trainer.train()
    seconds = time.perf_counter() - began
    figures = measure(trainer.model, held_out)
    return {**figures, "seconds": seconds, "steps": trainer.state.global_step}


def measure(model: Any, held_out: TransferSet) -> dict[str, Any]:
    """Every figure of the fidelity, and KL and tokens of every held-out row."""
    found = evaluate_fidelity(model, held_out, batch_size=16, progress=False)
    return {**found.means, **{key: found.columns[key].tolist() for key in ("kl_sum", "tokens")}}


def kept_trial(domain: str, recipe: Recipe | None, args: argparse.Namespace) -> dict[str, Any]:
    """A trial's figures, from the cache if they are there."""
    settings = {"domain": domain, "recipe": recipe and asdict(recipe), "held_out_rows": args.held_out_rows}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(args.cache) / "trials" / f"{domain}-{digest}.json"
    if not path.exists():
        found = run_trial(domain, recipe, args)
        gc.collect()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps({**settings, **found}))
        os.replace(path.with_suffix(".tmp"), path)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def describe(recipe: Recipe) -> str:
    """How a recipe differs from the base."""
    if recipe == BASE:
        return "**base**"
    if recipe.optim == "sgd":
        return "the paper's preset"
    own, base = asdict(recipe), asdict(BASE)
    return ", ".join(f"`{name}={value}`" for name, value in own.items() if value != base[name])


def main() -> None:
    """Try, print the tables, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--cache", default="runs/recipes", help="where everything is kept and found again")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--held_out_rows", type=int, default=32)
    args = parse(parser)
    best: dict[str, Any] = {}
    for domain in args.domains:
        before = kept_trial(domain, None, args)
        base = kept_trial(domain, BASE, args)
        print(f"\n{domain}: KL before {before['kl']:.4f}\n", flush=True)
        print("| Setting | KL | 95% interval | Recovered | vs base | Top-1 |\n" + "| --- " * 6 + "|")
        shares = {}
        for recipe in TRIALS:
            found = kept_trial(domain, recipe, args)
            low, high = bootstrap_interval(RowSums(found["kl_sum"], found["tokens"]))
            own, others = sum(found["kl_sum"]), sum(base["kl_sum"])
            least, most = bootstrap_interval(RowSums(found["kl_sum"], base["kl_sum"]))
            shares[describe(recipe)] = round(1 - found["kl"] / before["kl"], 4)
            print(
                f"| {describe(recipe)} | {found['kl']:.4f} | [{low:.4f}, {high:.4f}] | {shares[describe(recipe)]:.1%} "
                f"| {own / others:.2f} [{least:.2f}, {most:.2f}] | {found['top1_agreement']:.3f} |",
                flush=True,
            )
        best[domain] = shares
    print("\n" + json.dumps({"recovered": best, "dtype": str(native_compute_dtype()).removeprefix("torch.")}))


if __name__ == "__main__":
    main()
