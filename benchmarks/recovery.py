"""How much of what 4 bits took comes back, what training adds to the start, and other trainers from the same start.

The teacher answers training questions and test questions, once. All students have the same rows, adapters of one rank
on all linear layers, batch size and optimizer steps, and each is trained in a process of its own:

- `start`: NF4 with calibrated codes (`quantkd quantize`) and adapters at their covariance start, before any step;
- `quantkd-0`, `quantkd-1`, ...: that start, distilled from the stored distributions with `train_scales`, by seed;
- `nearest_start`, `nearest`: the same from NF4's nearest codes; `nearest_zero`: from these and adapters at zero;
- `ce_control`: as `quantkd-0`, by cross-entropy alone (`alpha=0`), without the distributions;
- `gkd`, `gkd_zero`: TRL's `GKDTrainer` with the teacher in memory, `lmbda=0` and `beta=0` (the given answers, forward
  KL), on the same codes, with the same trainable parameters and learning rates; from that start, and from zero. It
  rounds adapters to bfloat16; they are put back to the precision of the others.

Every student is measured as it is saved, by one function, on the test questions' answers: forward KL to the teacher at
every answer token, with 95% bootstrap intervals over rows. `before` is NF4 to the nearest code. Bits per weight count
codes, constants and adapters of the linear layers.

Seconds are those of the steps; `start_seconds` those of codes and adapters, which all but `gkd_zero` need. Memory is
the peak of the process, on a GPU that of the card.

    python benchmarks/recovery.py
    python benchmarks/recovery.py --domain arithmetic

`--domain arithmetic` asks the built-in word problems in place of GSM8K, `python_docs` for examples of Python's own
functions, as examples/python_docs.py does. What was captured, trained and measured is kept in --cache, arm by arm, and
found again there. The last line is one JSON object. `training_share_of_rest` is how much of the KL that the start
leaves training takes, from the mean over seeds; `kl_vs_*` and `time_vs_gkd` are `quantkd-0`'s as a share of the
other's. The learning rates were chosen on training questions (docs/recipes.md).
"""

from __future__ import annotations

import argparse
import json
import resource
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
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
from quantkd.data.arithmetic import generate_problems
from quantkd.data.gsm8k import build_prompt, load_gsm8k
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.evaluation.stats import RowSums, bootstrap_interval, compute_gap_recovered
from quantkd.hardware import default_device, native_compute_dtype
from quantkd.models.adapter_files import round_adapter
from quantkd.models.provenance import Provenance
from quantkd.models.quantize import ROWS, quantize_once
from quantkd.models.scales import attach_scales, folded_scales, group_by_scale, save_base, scale_parameters
from quantkd.models.stored_weights import compute_size, describe_weights
from quantkd.models.student import attach_lora, default_lora_config, load_student, short_dtype
from quantkd.teacher import load_teacher
from quantkd.training.config import CALIBRATED_RATE, LEARNING_RATES

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "python_docs.py"
LOADED = ("teacher", "before")
STARTS = ("start", "nearest_start")
OTHERS = ("nearest", "nearest_zero", "ce_control", "gkd", "gkd_zero")
FROM_ZERO = ("nearest_zero", "gkd_zero")
# What an arm's figures depend on, beside its name; a cached arm is found again by it.
SETTINGS = (
    "model", "gsm8k", "domain", "rows", "held_out_rows", "max_new_tokens", "storage_mass", "rank", "epochs",
    "batch_size", "learning_rate", "scales_learning_rate",
)  # fmt: skip
OF_TRAINING = ("epochs", "batch_size", "learning_rate", "scales_learning_rate")


def question_prompts(args: argparse.Namespace, name: str) -> list[str]:
    """The prompts of the training or of the held-out set."""
    count, trained = count_rows(args, name), count_rows(args, "train")
    is_train = name == "train"
    if args.domain == "python_docs":
        prompts: list[str] = runpy.run_path(str(EXAMPLE))["collect_prompts"]()
        if len(prompts) < (needed := trained + (1 + args.choose) * args.held_out_rows):
            raise SystemExit(f"{needed} functions were asked for, and the standard library has {len(prompts)}.")
        return prompts[:trained] if is_train else prompts[trained:][:count] if args.choose else prompts[-count:]
    if args.domain == "arithmetic":
        train = generate_problems(trained, seed=0)
        rows = train if is_train else generate_problems(count, seed=2 if args.choose else 1, exclude=train)
    elif args.choose and not is_train:
        rows = load_gsm8k(find_gsm8k(args.gsm8k), "train", trained + count)[trained:]
    else:
        rows = load_gsm8k(find_gsm8k(args.gsm8k), "train" if is_train else "test", count)
    return [build_prompt(row["question"]) for row in rows]


def count_rows(args: argparse.Namespace, name: str) -> int:
    """The questions that are answered; of those for training the first `rows` are used."""
    return max(args.capture_rows, args.rows) if name == "train" else args.held_out_rows


def set_folder(args: argparse.Namespace, name: str) -> Path:
    """Where the answers to the training or the held-out questions are kept."""
    kind = f"choosing-{count_rows(args, 'train')}" if args.choose and name == "held_out" else name
    return Path(args.cache) / f"{kind}-{count_rows(args, name)}-{args.max_new_tokens}-{args.storage_mass}"


def open_train(args: argparse.Namespace) -> TransferSet:
    """The answers that students are made from."""
    found = TransferSet(set_folder(args, "train"))
    return found[: args.rows] if len(found) > args.rows else found


def open_trained(args: argparse.Namespace) -> TransferSet:
    """The answers that students are trained on; with `--unseen` those that codes and start did not see."""
    return open_train(args)[ROWS:] if args.unseen else open_train(args)


def limit_rows(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of codes and starts, which see no more rows than `quantize` takes."""
    if args.rows <= ROWS:
        return args
    return argparse.Namespace(**{**vars(args), "rows": ROWS, "capture_rows": count_rows(args, "train")})


def capture_sets(args: argparse.Namespace) -> None:
    """The teacher's own answers to both; what is there already is left as it is."""
    teacher, tokenizer = load_teacher(args.model)
    for name in ("train", "held_out"):
        capture(
            teacher, question_prompts(args, name), set_folder(args, name), tokenizer=tokenizer,
            storage=Nucleus(args.storage_mass, max_k=64), generation=GenerationSettings(args.max_new_tokens),
            run=RunSettings(batch_size=32), chat_template=tokenizer.chat_template is not None,
        )  # fmt: skip
    del teacher
    clear_device_cache(garbage_collection=True)  # the arms run in processes of their own, on the same card


def rows_folder(args: argparse.Namespace) -> Path:
    """Where the students of these rows are kept."""
    return Path(args.cache) / "students" / f"{args.rows}-{args.max_new_tokens}-{args.storage_mass}"


def student_folder(args: argparse.Namespace, name: str) -> Path:
    """Where a start is kept, or what an arm trained."""
    if name in STARTS:
        return rows_folder(limit_rows(args)) / f"{name}-{args.rank}"
    return rows_folder(args) / f"{name}-{args.rank}-{args.epochs:g}{'-unseen' * args.unseen}"


def choose_base(args: argparse.Namespace, kind: str) -> str:
    """The student's name: with calibrated codes, made once, or the model's, put into NF4 as it is loaded."""
    args = limit_rows(args)
    folder = rows_folder(args) / "codes"
    if kind == "codes":
        quantize_once(args.model, open_train(args), folder)
    return str(folder) if kind == "codes" else args.model


def shared_arguments(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Training arguments of every contender."""
    return {
        "output_dir": str(student_folder(args, name).with_suffix(".run")), "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": choose_rate(args, name),
        "lr_scheduler_type": "cosine", "warmup_steps": 4, "logging_steps": 10, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "remove_unused_columns": False, "bf16": torch.cuda.is_available(),
        "use_cpu": default_device().type == "cpu",
    }  # fmt: skip


def choose_rate(args: argparse.Namespace, name: str) -> float:
    """The adapters' learning rate: the default of the start, on the nearest codes."""
    defaults = {"nearest": LEARNING_RATES["covariance"], "nearest_zero": LEARNING_RATES["zero"]}
    return defaults.get(name, float(args.learning_rate))


def load_base(base: str, start: Path | None) -> Any:
    """The student without its adapter, which must be the one that a start was made for."""
    student = load_student(base)
    if start is not None:
        Provenance.read(start).check_weights(student, str(start))
    return student


def build_quantkd(name: str, args: argparse.Namespace, base: str, start: Path | None) -> Trainer:
    """This library's trainer: the whole loss soft, or for the control all of it hard."""
    corrected = {"init": "zero"} if name == "nearest_zero" else {"init_from": args.model} if start is None else {}
    arguments = QuantizedDistillationConfig(
        **shared_arguments(args, name), **corrected, alpha=0.0 if name == "ce_control" else 1.0, packing=True,
        calibrate=False, train_scales=True, scales_learning_rate=args.scales_learning_rate,
        seed=int(name.partition("-")[2] or 0),
    )  # fmt: skip
    student = load_base(base, start)
    return QuantizedDistillationTrainer(
        student if start is None else PeftModel.from_pretrained(student, start, is_trainable=True), arguments,
        train_dataset=open_trained(args), processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=default_lora_config(args.rank) if start is None else None,
    )  # fmt: skip


def build_gkd(name: str, args: argparse.Namespace, base: str, start: Path | None) -> Trainer:
    """TRL's trainer, given the same token ids and trainable parameters, with the teacher in memory."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    torch.manual_seed(0)
    model = attach_lora(load_base(base, start), default_lora_config(args.rank))
    if start is not None:
        model.load_adapter(str(start), "default", is_trainable=True)
    attach_scales(model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side = "right"
    plain = [
        {
            "input_ids": row["input_ids"].tolist(),
            "completion_mask": (row["labels"] != -100).int().tolist(),
            "prompt": "",  # asked for, and not used where there are ids and a mask
        }
        for row in open_trained(args)
    ]
    teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype=native_compute_dtype()).eval().to(default_device())
    arguments = GKDConfig(
        **shared_arguments(args, name), lmbda=0.0, beta=0.0, max_length=None, gradient_checkpointing=False,
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer = GKDTrainer(model, teacher, arguments, train_dataset=Dataset.from_list(plain), processing_class=tokenizer)
    own = scale_parameters(model)
    adapters = [each for key, each in model.named_parameters() if ".lora_" in key]
    for parameter in (*adapters, *own.values()):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    groups = [{"params": adapters}]
    groups += [{"params": each, "lr": args.scales_learning_rate * scale} for each, scale in group_by_scale(own)]
    trainer.optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=0.0)
    return trainer


def run_arm(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One arm in this process: train it if it is trained, and measure it."""
    if name in LOADED:
        return measure(load_teacher(args.model)[0] if name == "teacher" else load_student(args.model), args)
    args = limit_rows(args) if name in STARTS else args
    nearest, folder = name.startswith("nearest"), student_folder(args, name)
    start = student_folder(args, needed := "nearest_start" if nearest else "start")
    if name not in (*STARTS, *FROM_ZERO) and not start.exists():
        raise SystemExit(f"{name} trains from {start}, which is not there. Run --arms {needed} first.")
    began = time.perf_counter()
    base = choose_base(args, "nearest" if nearest else "codes")
    if name in STARTS:
        model = build_quantkd(name, args, base, None).model
        seconds = {"start_seconds": time.perf_counter() - began}
    else:
        build = build_gkd if name.startswith("gkd") else build_quantkd
        trainer = build(name, args, base, None if name in FROM_ZERO else start)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        trainer.train()
        seconds = {"seconds": time.perf_counter() - began, "steps": trainer.state.global_step, "memory": peak_memory()}
        model = trainer.accelerator.unwrap_model(trainer.model)
        with folded_scales(model):
            save_base(model, folder / "scaled")
        # So that `quantkd evaluate` takes it.
        AutoTokenizer.from_pretrained(args.model).save_pretrained(folder / "scaled")
        base = str(folder / "scaled")
        del trainer
    model.save_pretrained(folder)
    round_adapter(folder, short_dtype(model))
    Provenance(weights=describe_weights(model)).write(folder)
    del model
    return seconds | measure(PeftModel.from_pretrained(load_student(base), folder), args)


def peak_memory() -> int:
    """Bytes: the card's peak, or the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Every figure of the fidelity, KL and tokens of every held-out row, and bits per weight of the linear layers."""
    found = evaluate_fidelity(model, TransferSet(set_folder(args, "held_out")), batch_size=16)
    return {
        **found.means,
        **{key: found.columns[key].tolist() for key in ("kl_sum", "tokens")},
        "bits": compute_size(model).bits_per_weight,
    }


def cached_arm(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """An arm's figures: from the cache, or from a process of its own."""
    args = limit_rows(args) if name in STARTS else args
    without = OF_TRAINING if name in STARTS else (*OF_TRAINING, "rows", "rank") if name in LOADED else ()
    settings = {key: str(getattr(args, key)) for key in SETTINGS if key not in without} | {"name": name}
    settings |= {} if without else {"learning_rate": str(choose_rate(args, name))}
    settings |= {"measured on": str(set_folder(args, "held_out"))} if args.choose else {}
    settings |= {"unseen": "True"} if args.unseen and name not in (*LOADED, *STARTS) else {}

    def run() -> dict[str, Any]:
        keys = (*SETTINGS, "cache", "capture_rows")
        given = [f"--{key}={value}" for key, value in vars(args).items() if key in keys and value]
        command = [sys.executable, __file__, "--only", name, *given, *(["--choose"] if args.choose else [])]
        command += ["--unseen"] if args.unseen and name not in STARTS else []
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
        return found

    result = keep_figures(args.cache, name, settings, run)
    print(f"{name}: KL {result['kl']:.4f} nats per token", flush=True)
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


def ratio(arm: dict[str, Any], other: dict[str, Any]) -> tuple[float, list[float]]:
    """One arm's KL as a share of another's, with the interval of a paired bootstrap over rows."""
    interval = bootstrap_interval(RowSums(arm["kl_sum"], other["kl_sum"]))
    return round(sum(arm["kl_sum"]) / sum(other["kl_sum"]), 4), [round(bound, 4) for bound in interval]


def join_seeds(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The mean KL, row by row, of the runs from the calibrated start."""
    seeds = [arm for name, arm in arms.items() if name.startswith("quantkd-")]
    return {"kl_sum": np.mean([arm["kl_sum"] for arm in seeds], axis=0).tolist(), "tokens": seeds[0]["tokens"]}


def training_share(arm: dict[str, Any], start: dict[str, Any]) -> tuple[float, list[float]]:
    """How much of the KL that a start leaves training takes, with its interval."""
    left, (low, high) = ratio(arm, start)
    return round(1 - left, 4), [round(1 - high, 4), round(1 - low, 4)]


def summarize(arms: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """The table, and the JSON line."""
    columns = f"{'arm':14}{'bits':>6}{'KL':>8}  {'95% interval':18}{'recovered':>10}"
    print(f"\n{columns}{'top-1':>8}{'seconds':>9}{'steps':>7}{'GB':>6}")
    for name, arm in arms.items():
        low, high = bootstrap_interval(sums(arm))
        share = "" if name in LOADED else f"{gap_recovered(arms, name)[0]:.1%}"
        steps, gigabytes = str(arm.get("steps", "")), f"{arm['memory'] / 1e9:.1f}" if "memory" in arm else ""
        seconds = f"{arm[key]:.0f}" if (key := "start_seconds" if name in STARTS else "seconds") in arm else ""
        print(
            f"{name:14}{arm['bits']:6.2f}{arm['kl']:8.4f}  {f'[{low:.4f}, {high:.4f}]':18}{share:>10}"
            f"{arm['top1_agreement']:8.3f}{seconds:>9}{steps:>7}{gigabytes:>6}"
        )
    if len({arm["steps"] for arm in arms.values() if "steps" in arm}) > 1:
        raise SystemExit("The arms took different numbers of optimizer steps; nothing can be compared.")
    seeds = [arm for name, arm in arms.items() if name.startswith("quantkd-")]
    own = seeds[0]
    summary: dict[str, Any] = {"bits_per_weight": round(own["bits"], 3)}
    summary["kl_gap_recovered"], summary["kl_gap_recovered_ci95"] = gap_recovered(arms, "quantkd-0")
    pairs = {
        "training_share_of_rest": (join_seeds(arms), "start"),
        "nearest.training_share_of_rest": (arms["nearest"], "nearest_start"),
        "nearest_zero.training_share": (arms["nearest_zero"], "before"),
    }
    for key, (arm, other) in pairs.items():
        summary[key], summary[f"{key}_ci95"] = training_share(arm, arms[other])
    summary["training_share_of_rest_by_seed"] = [training_share(arm, arms["start"])[0] for arm in seeds]
    for other in ("gkd", "gkd_zero", "ce_control"):
        summary[f"kl_vs_{other}"], summary[f"kl_vs_{other}_ci95"] = ratio(own, arms[other])
    summary["time_vs_gkd"] = round(own["seconds"] / arms["gkd"]["seconds"], 3)
    summary["memory_vs_gkd"] = round(own["memory"] / arms["gkd"]["memory"], 3)
    summary["kl"] = {name: round(arm["kl"], 5) for name, arm in arms.items()}
    summary |= {"steps": own["steps"]} | {key: getattr(args, key) for key in SETTINGS if key not in ("model", "gsm8k")}
    return summary | {"dtype": str(native_compute_dtype()).removeprefix("torch."), "device": str(default_device())}


def build_parser() -> argparse.ArgumentParser:
    """The options; `curves.py` takes their defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    domains = ("gsm8k", "arithmetic", "python_docs")
    parser.add_argument("--domain", choices=domains, default="gsm8k", help="which questions")
    parser.add_argument("--cache", default="runs/recovery", help="where everything is kept and found again")
    parser.add_argument("--rows", type=int, default=256, help="training questions")
    parser.add_argument("--capture_rows", type=int, default=0, help="answered for training, if more than --rows")
    parser.add_argument("--held_out_rows", type=int, default=128, help="test questions to measure on")
    parser.add_argument("--max_new_tokens", type=int, default=160, help="length limit of an answer")
    parser.add_argument("--storage_mass", type=float, default=0.95, help="of the nucleus that is stored")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=8, help="rows an optimizer step")
    parser.add_argument(
        "--learning_rate", type=float, default=CALIBRATED_RATE, help="of the adapters on calibrated codes"
    )
    parser.add_argument("--scales_learning_rate", type=float, default=3e-4, help="of block constants and norms")
    parser.add_argument("--seeds", type=int, default=3, help="runs from the calibrated start")
    parser.add_argument(
        "--choose", action="store_true", help="measure on other training questions, which no table reports"
    )
    parser.add_argument(
        "--unseen", action="store_true", help=f"train without the first {ROWS} rows, which codes and start see"
    )
    parser.add_argument("--quick", action="store_true", help="16 rows, 8 held out, rank 8: for a look at the figures")
    parser.add_argument("--arms", nargs="+", help="run these alone; the figures need all")
    parser.add_argument("--only", help="this arm alone, in this process; the sets and its start must be there")
    return parser


def complete(args: argparse.Namespace, **changed: Any) -> argparse.Namespace:
    """The arguments of another script, some of them changed, with the defaults of this one's that it lacks."""
    return argparse.Namespace(**{**vars(build_parser().parse_args([])), **vars(args), **changed})


def main() -> None:
    """Capture, run every arm, print."""
    args = parse(parser := build_parser())
    if args.quick:
        args.rows, args.held_out_rows, args.max_new_tokens, args.rank, args.seeds = 16, 8, 64, 8, 1
    if args.domain != "gsm8k" and not args.only:
        args.cache = f"{args.cache}-{args.domain}"
    if args.unseen and args.rows <= ROWS:
        parser.error(f"--rows is {args.rows}; --unseen leaves out the first {ROWS}.")
    if args.seeds < 1:
        parser.error(f"--seeds is {args.seeds}; expected at least 1.")
    everything = (*LOADED, *STARTS, *(f"quantkd-{seed}" for seed in range(args.seeds)), *OTHERS)
    for name in (*(args.arms or ()), *([args.only] if args.only else ())):
        if name not in everything:
            parser.error(f"The arm is {name!r}; expected one of {', '.join(everything)}.")
    if args.only:
        print("\n" + json.dumps(run_arm(args.only, args)))
        return
    capture_sets(args)
    arms = {name: cached_arm(name, args) for name in everything if not args.arms or name in args.arms}
    if len(arms) == len(everything):
        print(json.dumps(summarize(arms, args)))
    else:
        keys = ("kl", "top1_agreement", "seconds", "memory")
        print(json.dumps({name: {key: arm[key] for key in keys if key in arm} for name, arm in arms.items()}))


if __name__ == "__main__":
    main()
