"""How much of what 4 bits took comes back on GSM8K, beside a control without the teacher and beside TRL's GKDTrainer.

The teacher answers training questions (at most 512) and 128 test questions, once. On the training answers three
trainers train the same student, each in a process of its own: the model in NF4, LoRA of one rank on all linear layers,
the same rows, batch size and number of optimizer steps:

- `quantkd`: `QuantizedDistillationTrainer` on the stored distributions, from its covariance start, rows packed;
- `ce_control`: the same trainer, start and steps by cross-entropy alone (`alpha=0`), without the distributions;
- `gkd`: TRL's `GKDTrainer` with the teacher in memory, `lmbda=0` and `beta=0` (the given answers, forward KL). It
  rounds adapters to bfloat16; they are put back to the precision of the others.

Every student is then measured by one function on the test questions' answers: forward KL to the teacher at every
answer token, with 95% bootstrap intervals over rows. `before` is the student without adapters, `start` the covariance
start before the first step.

Time is what a trainer takes from the loaded student to the trained one: quantkd's start and training, GKD's teacher and
training. The answers cost all of them the same.

The learning rates come from runs on built-in word problems, which share no question with GSM8K: 2e-5 and 5e-5 were the
best of four from the covariance start, and from a zero start 3e-4 and 1e-3 did not differ (docs/recipes.md).

    python benchmarks/recovery.py --cache runs/recovery

What was captured, trained and measured is kept in --cache, arm by arm, and found again there. The last line is one JSON
object. `kl_vs_*` and `time_vs_*` are quantkd's as a share of the other's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _cache import keep_figures
from _sources import add_sources, find_gsm8k, parse
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from quantkd import (
    GenerationSettings,
    Nucleus,
    QuantizedDistillationConfig,
    QuantizedDistillationTrainer,
    RunSettings,
    TransferSet,
    capture,
)
from quantkd.data.gsm8k import build_prompt, load_gsm8k
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.evaluation.stats import RowSums, bootstrap_interval, compute_gap_recovered
from quantkd.hardware import default_device, native_compute_dtype
from quantkd.models.student import attach_lora, default_lora_config, load_student
from quantkd.teacher import load_teacher

ARMS = ("teacher", "before", "quantkd", "ce_control", "gkd")
TRAINED = ("quantkd", "ce_control", "gkd")
LEARNING_RATES = {"quantkd": 3e-5, "ce_control": 3e-5, "gkd": 2e-4}
# What an arm's figures depend on, beside its name; a cached arm is found again by it.
SETTINGS = ("model", "gsm8k", "rows", "held_out_rows", "max_new_tokens", "rank", "epochs", "batch_size", "storage_mass")


def question_prompts(args: argparse.Namespace, name: str) -> list[str]:
    """The prompts of the training or of the held-out set."""
    if name == "train":
        rows = load_gsm8k(find_gsm8k(args.gsm8k), "train", args.rows)
    else:
        rows = load_gsm8k(find_gsm8k(args.gsm8k), "test", args.held_out_rows)
    return [build_prompt(row["question"]) for row in rows]


def set_folder(args: argparse.Namespace, name: str) -> Path:
    """Where the answers to the training or the held-out questions are kept."""
    count = args.rows if name == "train" else args.held_out_rows
    return Path(args.cache) / f"{name}-{count}-{args.max_new_tokens}-{args.storage_mass}"


def capture_sets(args: argparse.Namespace) -> None:
    """The teacher's own answers to both; what is there already is left as it is."""
    teacher, tokenizer = load_teacher(args.model)
    for name in ("train", "held_out"):
        capture(
            teacher, question_prompts(args, name), set_folder(args, name), tokenizer=tokenizer,
            storage=Nucleus(args.storage_mass, max_k=64), generation=GenerationSettings(args.max_new_tokens),
            run=RunSettings(batch_size=32),
        )  # fmt: skip
    del teacher
    clear_device_cache(garbage_collection=True)  # the arms run in processes of their own, on the same card


def shared_arguments(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Training arguments of every contender."""
    return {
        "output_dir": str(Path(args.cache) / "students" / name), "per_device_train_batch_size": args.batch_size,
        "num_train_epochs": args.epochs, "learning_rate": LEARNING_RATES.get(name, 1e-4),
        "lr_scheduler_type": "cosine", "warmup_steps": 4, "logging_steps": 10, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "remove_unused_columns": False, "bf16": torch.cuda.is_available(),
        "use_cpu": default_device().type == "cpu",
    }  # fmt: skip


def build_quantkd(name: str, args: argparse.Namespace, student: Any, rows: TransferSet, tokenizer: Any) -> Trainer:
    """This library's trainer: the whole loss soft, or for the control all of it hard."""
    arguments = QuantizedDistillationConfig(
        **shared_arguments(args, name), alpha=0.0 if name == "ce_control" else 1.0, packing=True
    )
    return QuantizedDistillationTrainer(
        student, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=default_lora_config(args.rank)
    )


def build_gkd(name: str, args: argparse.Namespace, student: Any, rows: TransferSet, tokenizer: Any) -> Trainer:
    """TRL's trainer, given the same token ids, with the teacher in memory."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    torch.manual_seed(0)
    model = attach_lora(student, default_lora_config(args.rank))
    tokenizer.padding_side = "right"
    plain = [
        {
            "input_ids": row["input_ids"].tolist(),
            "completion_mask": (row["labels"] != -100).int().tolist(),
            "prompt": "",  # asked for, and not used where there are ids and a mask
        }
        for row in rows
    ]
    teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype=native_compute_dtype()).eval().to(default_device())
    arguments = GKDConfig(
        **shared_arguments(args, name), lmbda=0.0, beta=0.0, max_length=None, gradient_checkpointing=False,
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer = GKDTrainer(model, teacher, arguments, train_dataset=Dataset.from_list(plain), processing_class=tokenizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def run_arm(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train one arm in this process if it is trained, and measure it."""
    held_out = TransferSet(set_folder(args, "held_out"))
    if name not in TRAINED:
        model = load_teacher(args.model)[0] if name == "teacher" else load_student(args.model)
        return measure(model, held_out)
    tokenizer, student = AutoTokenizer.from_pretrained(args.model), load_student(args.model)
    build = build_gkd if name == "gkd" else build_quantkd
    began = time.perf_counter()
    trainer = build(name, args, student, TransferSet(set_folder(args, "train")), tokenizer)
    start_seconds = time.perf_counter() - began
    result = {"start": measure_adapter(trainer.model, "start", held_out, args)} if name == "quantkd" else {}
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - began
    result |= {"peak_mib": torch.cuda.max_memory_allocated() / 2**20} if on_gpu else {}
    result |= {"start_seconds": start_seconds, "train_seconds": train_seconds}
    result |= {"seconds": start_seconds + train_seconds, "steps": trainer.state.global_step}
    return result | measure_adapter(trainer.model, name, held_out, args)


def measure_adapter(model: Any, name: str, held_out: TransferSet, args: argparse.Namespace) -> dict[str, Any]:
    """Fidelity of the adapter on a student as others load it: while one trains, its norms and head are in float32."""
    folder = Path(args.cache) / "students" / f"{name}-{args.rank}-{args.rows}-{args.epochs}"
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(load_student(args.model), folder)
    return measure(loaded, held_out)


def measure(model: Any, held_out: TransferSet) -> dict[str, Any]:
    """Every figure of the fidelity, and KL and tokens of every held-out row."""
    found = evaluate_fidelity(model, held_out, batch_size=16)
    return {**found.means, **{key: found.columns[key].tolist() for key in ("kl_sum", "tokens")}}


def cached_arm(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """An arm's figures: from the cache, or from a process of its own."""
    settings = {key: str(getattr(args, key)) for key in SETTINGS}
    settings |= {"name": name, "learning_rate": str(LEARNING_RATES.get(name))}

    def run() -> dict[str, Any]:
        given = [f"--{key}={value}" for key, value in vars(args).items() if key in (*SETTINGS, "cache") and value]
        command = [sys.executable, __file__, "--only", name, *given]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
        return found

    result = keep_figures(args.cache, name, settings, run)
    timed = f", {result['seconds']:.0f} s, {result['steps']} steps" if name in TRAINED else ""
    print(f"{name}: KL {result['kl']:.4f} nats per token{timed}", flush=True)
    return result


def sums(arm: dict[str, Any]) -> RowSums:
    """KL and tokens of every held-out row."""
    return RowSums(arm["kl_sum"], arm["tokens"])


def gap_recovered(arms: dict[str, dict[str, Any]], name: str) -> tuple[float, list[float]]:
    """The share of the teacher's gap in KL that an arm closes, with its interval."""
    share = compute_gap_recovered(sums(arms["teacher"]), sums(arms["before"]), sums(arms[name]), higher_is_better=False)
    if share.value is None or share.interval is None:
        raise SystemExit(f"The gap is not measurable on {len(arms['before']['tokens'])} rows: {share.reason}.")
    return round(share.value, 4), [round(bound, 4) for bound in share.interval]


def ratio(arms: dict[str, dict[str, Any]], name: str, other: str) -> tuple[float, list[float]]:
    """One arm's KL as a share of another's, with the interval of a paired bootstrap over rows."""
    own, others = (sums(arms[each]).to_columns()[:, 0] for each in (name, other))
    interval = bootstrap_interval(RowSums(own, others))
    return round(float(own.sum() / others.sum()), 4), [round(bound, 4) for bound in interval]


def summarize(arms: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """The table, and the JSON line."""
    print(f"\n{'':12}{'KL':>8}  {'95% interval':18}{'recovered':>10}{'top-1':>8}{'seconds':>9}{'steps':>7}")
    for name, arm in arms.items():
        low, high = bootstrap_interval(sums(arm))
        share = "" if name in ("teacher", "before") else f"{gap_recovered(arms, name)[0]:.1%}"
        seconds, steps = (f"{arm[key]:.0f}" if key in arm else "" for key in ("seconds", "steps"))
        print(
            f"{name:12}{arm['kl']:8.4f}  {f'[{low:.4f}, {high:.4f}]':18}{share:>10}{arm['top1_agreement']:8.3f}"
            f"{seconds:>9}{steps:>7}"
        )
    if len({arms[name]["steps"] for name in TRAINED}) > 1:
        raise SystemExit("The arms took different numbers of optimizer steps; nothing can be compared.")
    summary: dict[str, Any] = {}
    summary["kl_gap_recovered"], summary["kl_gap_recovered_ci95"] = gap_recovered(arms, "quantkd")
    for key, other in (("kl_vs_ce_control", "ce_control"), ("kl_vs_gkd", "gkd")):
        summary[key], summary[f"{key}_ci95"] = ratio(arms, "quantkd", other)
    summary["time_vs_gkd"] = round(arms["quantkd"]["seconds"] / arms["gkd"]["seconds"], 3)
    summary["kl"] = {name: round(arm["kl"], 5) for name, arm in arms.items()}
    summary["seconds"] = {name: round(arms[name]["seconds"], 1) for name in TRAINED}
    summary |= {"steps": arms["quantkd"]["steps"], "learning_rates": LEARNING_RATES}
    summary |= {key: getattr(args, key) for key in ("rows", "held_out_rows", "rank", "epochs", "batch_size")}
    return summary | {"dtype": str(native_compute_dtype()).removeprefix("torch."), "device": str(default_device())}


def gather(arm: dict[str, Any]) -> dict[str, Any]:
    """What one arm says without the others."""
    found = {key: round(arm[key], 5) for key in ("kl", "top1_agreement", "seconds", "peak_mib") if key in arm}
    return found | ({"start_kl": round(arm["start"]["kl"], 5)} if "start" in arm else {})


def main() -> None:
    """Capture, run every arm, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--cache", default="runs/recovery", help="where everything is kept and found again")
    parser.add_argument("--rows", type=int, default=256, help="training questions, at most 512")
    parser.add_argument("--held_out_rows", type=int, default=128, help="test questions to measure on")
    parser.add_argument("--max_new_tokens", type=int, default=160, help="length limit of an answer")
    parser.add_argument("--storage_mass", type=float, default=0.95, help="of the nucleus that is stored")
    parser.add_argument("--rank", type=int, default=128, help="of the adapters")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=8, help="rows an optimizer step")
    parser.add_argument("--quick", action="store_true", help="16 rows, 8 held out, rank 8: for a look at the figures")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="run these alone; the figures need all")
    parser.add_argument("--only", choices=ARMS, help="this arm alone, in this process; the sets must be there")
    args = parse(parser)
    if args.quick:
        args.rows, args.held_out_rows, args.max_new_tokens, args.rank = 16, 8, 64, 8
    if args.rows > 512:
        parser.error(f"The comparison is over at most 512 training questions, found {args.rows}.")
    if args.only:
        print("\n" + json.dumps(run_arm(args.only, args)))
        return
    capture_sets(args)
    arms = {name: cached_arm(name, args) for name in ARMS if name in args.arms}
    if len(arms) == len(ARMS):
        arms = {"teacher": arms["teacher"], "before": arms["before"], "start": arms["quantkd"]["start"], **arms}
        print(json.dumps(summarize(arms, args)))
    else:
        print(json.dumps({name: gather(arm) for name, arm in arms.items()}))


if __name__ == "__main__":
    main()
