"""What a distillation step costs beside an SFT step, and beside peers that keep the teacher in memory.

Every contender trains the same NF4 student (LoRA 16 on all linear layers; loaded and adapted by the same functions; the
same optimizer and precision) on the same 8 rows of GSM8K in every step, each in processes of its own:

- `sft`: `transformers.Trainer` and its collator, cross-entropy from the model's own loss;
- `quantkd_t1`, `quantkd_t2`: `QuantizedDistillationTrainer` at temperatures 1 and 2, from stored entries;
- `quantkd_scales`: the first of these with `train_scales`, so that block constants and norms are trained beside LoRA;
- `live_teacher`: the plainest distillation, a `Trainer` with both models' logits, dense KL and CE at the targets;
- `gkd`: TRL's `GKDTrainer` with `lmbda=0` and `beta=0` (no generation, forward KL), given the same token ids. It rounds
  adapters to bfloat16; they are put back to the precision of the others.

Time: from the end of one step to the end of the next, median after warm-up; the first three take turns over the rounds.

Memory: what torch allocates on a GPU, else the resident set, in a second process. There every block of 64 kB or more is
mapped for itself (`MALLOC_MMAP_THRESHOLD_`), which is slow and leaves no holes: glibc's holes are gigabytes here, and
say nothing about a method. `step` memory, which the ratios compare, is the peak over what there was once the student
was loaded with its adapters: gradients, optimizer state, activations, loss, and a teacher if one is kept. `whole` is
the peak itself, interpreter and all, and `resident` the peak of the timed process, holes and all.

Batches: real tokens a second of one epoch, 8 rows a batch, padded in random order, grouped by length, and packed.

    python benchmarks/step.py

The last line is one JSON object. `time_vs_*` and `memory_vs_*` are quantkd at temperature 1 as a share of the other,
and `scales_*_vs_lora` the step with `train_scales` as a share of the same without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _metering import MIB, Memory, Meter
from _sources import add_sources, find_gsm8k, parse
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, RunSettings, TransferSet
from quantkd.hardware import default_device, native_compute_dtype
from quantkd.models.student import attach_lora, load_student

BATCH_SIZE = 8
STEPS = ("sft", "quantkd_t1", "quantkd_scales", "quantkd_t2", "live_teacher", "gkd")
BATCHES: dict[str, dict[str, Any]] = {
    "random": {"train_sampling_strategy": "random"},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "packed": {"train_sampling_strategy": "random", "packing": True},
}
NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class LiveTeacherTrainer(Trainer):
    """Both models' logits, dense KL and CE at the targets."""

    teacher: Any

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        at = labels != -100
        student = model(**inputs).logits[:, :-1][at].float().log_softmax(-1)
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits[:, :-1][at].float().log_softmax(-1)
        kl = nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
        ce = nn.functional.nll_loss(student, labels[at], reduction="sum")
        return (0.5 * kl + 0.5 * ce) / num_items_in_batch


def load_teacher(model: str) -> Any:
    """The teacher of the contenders that run one: full weights in the hardware's own precision."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=native_compute_dtype()).eval().to(default_device())


def shared_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Training arguments of every contender."""
    return {
        "output_dir": args.scratch, "per_device_train_batch_size": BATCH_SIZE, "learning_rate": 2e-4,
        "lr_scheduler_type": "constant", "logging_strategy": "no", "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "remove_unused_columns": False, "bf16": args.autocast,
        "use_cpu": default_device().type == "cpu",
    }  # fmt: skip


def build_trainer(name: str, args: argparse.Namespace, model: Any, order: list[int]) -> Trainer:
    """A contender on batches of the rows in `order`."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="right")
    rows = TransferSet(args.set).select(order)
    shared = shared_arguments(args)
    shared |= {"max_steps": len(order) // BATCH_SIZE, "train_sampling_strategy": "sequential"}
    if name.startswith("quantkd"):
        options = {"temperature": 2.0 if name == "quantkd_t2" else 1.0, "train_scales": name == "quantkd_scales"}
        arguments = QuantizedDistillationConfig(**shared, **options, init="zero")
        return QuantizedDistillationTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    plain = [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()} for row in rows]
    if name == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        for row in plain:
            row["completion_mask"] = [int(label != -100) for label in row.pop("labels")]
            row["prompt"] = ""  # asked for, and not used where there are ids and a mask
        trainer = GKDTrainer(
            model, load_teacher(args.model),
            GKDConfig(**shared, lmbda=0.0, beta=0.0, max_length=None, gradient_checkpointing=False),
            train_dataset=Dataset.from_list(plain), processing_class=tokenizer,
        )  # fmt: skip
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return trainer
    kind = Trainer if name == "sft" else LiveTeacherTrainer
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = kind(model, TrainingArguments(**shared), data_collator=collator, train_dataset=plain)
    if name == "live_teacher":
        trainer.teacher = load_teacher(args.model)
    return trainer


def measure_step(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one contender in this process, for its time or for its memory."""
    memory = Memory()
    torch.manual_seed(0)
    model = attach_lora(load_student(args.model))
    memory.settle()
    loaded = memory.now()
    batch = list(range(BATCH_SIZE))
    shortest = int(TransferSet(args.set).lengths.argmin())
    # For memory the first step is there for the optimizer's state alone.
    order = [shortest] * BATCH_SIZE + batch if args.parts else batch * (args.warm_up + args.steps)
    trainer = build_trainer(name, args, model, order)
    meter = Meter(trainer, memory, count_saved=args.parts)
    trainer.train()
    result: dict[str, Any] = {
        "batch": meter.batch, "peak_mib": meter.peak / MIB, "step_mib": (meter.peak - loaded) / MIB,
    }  # fmt: skip
    if not args.parts:
        return {**result, "seconds": meter.seconds[args.warm_up :]}
    return {**result, "parts_mib": meter.parts_mib(trainer.optimizer)}


def measure_batches(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Real tokens a second of one epoch with one way to make batches."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = TransferSet(args.set)[: args.rows]
    arguments = QuantizedDistillationConfig(**shared_arguments(args), num_train_epochs=1, init="zero", **BATCHES[name])
    torch.manual_seed(0)
    model = attach_lora(load_student(args.model))
    trainer = QuantizedDistillationTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    model.train()
    first = trainer._prepare_inputs(trainer.data_collator(rows.__getitems__(range(BATCH_SIZE))))
    trainer.compute_loss(model, first).backward()  # warm-up
    model.zero_grad()
    meter = Meter(trainer, Memory())
    trainer.train()
    return {"tokens_per_second": int(rows.lengths.sum()) / sum(meter.seconds), "rows": len(rows)}


def run_alone(name: str, arguments: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """One contender in a process of its own; its last line is its result."""
    command = [sys.executable, __file__, "--only", name, *arguments]
    process = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **(environment or {})}
    )
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def capture_rows(args: argparse.Namespace, folder: str) -> None:
    """A transfer set over GSM8K's own answers."""
    from quantkd import capture
    from quantkd.data.gsm8k import load_gsm8k

    rows = load_gsm8k(find_gsm8k(args.gsm8k), "train", limit=args.rows)
    examples = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    capture(args.model, examples, folder, responses="given", run=RunSettings(rows_per_shard=args.rows))


def run_all(args: argparse.Namespace, given: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Every contender's time and memory, and the rate of every way to make batches."""
    steps: dict[str, dict[str, Any]] = {}
    for name in [*[name for _ in range(args.rounds - 1) for name in STEPS[:3]], *STEPS]:
        result = run_alone(name, given)
        print(f"{name}: {' '.join(f'{seconds:.2f}' for seconds in result['seconds'])} s", flush=True)
        seen = steps.setdefault(name, {"seconds": [], "resident_mib": 0.0})
        seen["seconds"] += result["seconds"]
        seen["resident_mib"] = max(seen["resident_mib"], result["peak_mib"])
        seen["batch"] = result["batch"]
    for name, seen in steps.items():
        result = run_alone(name, [*given, "--parts"], NO_HOLES)
        print(f"{name}: {result['step_mib']:.0f} MiB", flush=True)
        seen["step_mib"], seen["whole_mib"], seen["parts_mib"] = (
            result[key] for key in ("step_mib", "peak_mib", "parts_mib")
        )
        seen["median"] = statistics.median(seen["seconds"])
        if not seen["batch"] == result["batch"] == steps["sft"]["batch"]:
            raise SystemExit(f"{name} trained on {result['batch']}, sft on {steps['sft']['batch']}: not the same rows.")
    runs: dict[str, list[float]] = {name: [] for name in BATCHES}
    for _ in range(args.rounds):
        for name, found in runs.items():
            found.append(run_alone(name, given)["tokens_per_second"])
    # The best of the rounds: what else the machine does only ever slows an epoch down.
    rates = {name: max(found) for name, found in runs.items()}
    for name, found in runs.items():
        print(f"batches {name}: {', '.join(f'{rate:.1f}' for rate in found)} real tokens/s", flush=True)
    return steps, rates


def print_tables(steps: dict[str, dict[str, Any]]) -> None:
    """Time and memory of a step, and the memory by part."""
    batch = steps["sft"]["batch"]
    print(f"\n{BATCH_SIZE} rows padded to {batch['width']} tokens, {batch['targets']} targets")
    print(f"{'':13}{'seconds':>8}{'step MiB':>10}{'whole MiB':>11}{'resident MiB':>14}")
    for name, seen in steps.items():
        numbers = f"{seen['median']:8.2f}{seen['step_mib']:10.0f}{seen['whole_mib']:11.0f}{seen['resident_mib']:14.0f}"
        print(f"{name:13}{numbers}")
    print(f"\n{'MiB of a step':21}" + "".join(f"{name:>13}" for name in steps))
    for part in steps["sft"]["parts_mib"]:
        print(f"{part:21}" + "".join(f"{seen['parts_mib'][part]:13.1f}" for seen in steps.values()))
    print(
        "'kept' is what autograd holds for the backward pass. A phase's 'peak' is over the phase's own start; 'head and"
    )
    print("loss' ends with the gradient at the head's input, and a live teacher runs in it.\n")


def summarize(steps: dict[str, dict[str, Any]], rates: dict[str, float]) -> dict[str, Any]:
    """The JSON line."""

    def ratio(key: str, over: str, under: str) -> float:
        return round(steps[over][key] / steps[under][key], 3)

    summary: dict[str, Any] = {
        "time_vs_sft": ratio("median", "quantkd_t1", "sft"),
        "memory_vs_sft": ratio("step_mib", "quantkd_t1", "sft"),
        "speedup_vs_gkd": ratio("median", "gkd", "quantkd_t1"),
        "memory_vs_gkd": ratio("step_mib", "quantkd_t1", "gkd"),
        "packing_speedup": round(max(rates["grouped"], rates["packed"]) / rates["random"], 3),
        "scales_time_vs_lora": ratio("median", "quantkd_scales", "quantkd_t1"),
        "scales_memory_vs_lora": ratio("step_mib", "quantkd_scales", "quantkd_t1"),
        "time_vs_sft_t2": ratio("median", "quantkd_t2", "sft"),
        "speedup_vs_live_teacher": ratio("median", "live_teacher", "quantkd_t1"),
        "memory_vs_live_teacher": ratio("step_mib", "quantkd_t1", "live_teacher"),
    }
    for key in ("whole", "resident"):
        for other in ("sft", "gkd"):
            summary[f"{key}_memory_vs_{other}"] = ratio(f"{key}_mib", "quantkd_t1", other)
    for key in ("median", "step_mib", "whole_mib", "resident_mib"):
        summary[key.replace("median", "seconds")] = {name: round(seen[key], 2) for name, seen in steps.items()}
    summary["tokens_per_second"] = {name: round(rate, 1) for name, rate in rates.items()}
    batch = steps["sft"]["batch"]
    summary |= {"width": batch["width"], "targets": batch["targets"]}
    return summary | {"dtype": str(native_compute_dtype()).removeprefix("torch."), "device": str(default_device())}


def main() -> None:
    """Capture if need be, run every contender, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--set", default=None, help="a transfer set to take rows from; captured without it")
    parser.add_argument("--cache", default=None, help="where to keep the captured set, and find it again")
    parser.add_argument("--rows", type=int, default=48, help="rows of the epoch that batches are compared on")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--warm_up", type=int, default=1, help="steps before them")
    parser.add_argument(
        "--rounds", type=int, default=2, help="timed processes of sft, quantkd_t1 and quantkd_scales each"
    )
    parser.add_argument("--quick", action="store_true", help="one round of one timed step, and 16 rows")
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--only", choices=(*STEPS, *BATCHES), help="this contender alone, in this process")
    parser.add_argument("--parts", action="store_true", help="with --only: its memory in place of its time")
    parser.add_argument("--scratch", default="step_output", help=argparse.SUPPRESS)
    args = parse(parser)
    if args.quick:
        args.rows, args.steps, args.rounds = 16, 1, 1
    if args.only:
        measure = measure_batches if args.only in BATCHES else measure_step
        print(json.dumps(measure(args.only, args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.set or args.cache or str(Path(scratch) / "set")
        if args.set is None:
            capture_rows(args, folder)
        given = ["--model", args.model, "--set", folder, "--scratch", str(Path(scratch) / "output")]
        given += ["--rows", str(args.rows), "--steps", str(args.steps), "--warm_up", str(args.warm_up)]
        given += ["--autocast" if args.autocast else "--no-autocast"]
        steps, rates = run_all(args, given)
    print_tables(steps)
    print(json.dumps(summarize(steps, rates)))


if __name__ == "__main__":
    main()
