"""Does accuracy come back? The paper's question, on a model and problems where 4 bits cost answers that can be counted.

1. A small model is fine-tuned whole, by an ordinary `transformers.Trainer`, on built-in word problems until it solves
   most unseen ones: that is the teacher.
2. It is quantized to 4 bits, with bitsandbytes' FP4 or NF4 (--quantization): `before`.
3. It answers other problems. From these the codes are chosen anew (`codes`), and an adapter on them begins where it
   corrects most of their error (`start`). From there it is trained from the stored distributions (`after`), and in as
   many steps on the same answers by cross-entropy alone (`control`).
4. All solve the same test problems, greedily; the last number must stand after `####`.

The three sets of problems share no question. The figures: `teacher`, `before`, `codes`, `start`, `after` and `control`
are shares of test problems solved; `bits_per_weight` counts codes, constants and adapters of the linear layers;
`p_value` is McNemar's exact test of teacher against before; `accuracy_gap_recovered` is (after - before) / (teacher -
before), with a paired bootstrap interval over problems, and `codes.`, `start.` and `control.accuracy_gap_recovered` the
same of these. `answer_agreement` is the share of answers that end in the teacher's own number, right or wrong, and
`agreement.only_after_vs_*` counts the problems on which only `after` agrees with the teacher, and only the other arm.

    python benchmarks/accuracy.py --cache runs/accuracy

The fine-tuned model, the transfer set, the adapter and every answer are kept in --cache, and found again there; what
was cut off is taken up. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from _sources import add_sources, parse
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from quantkd import (
    GenerationSettings,
    QuantizedDistillationConfig,
    QuantizedDistillationTrainer,
    RunSettings,
    TransferSet,
    capture,
)
from quantkd.data.arithmetic import generate_problems
from quantkd.data.encoding import encode_completion, encode_prompts
from quantkd.data.gsm8k import build_prompt
from quantkd.evaluation.accuracy import AnswerRecord, evaluate_gsm8k
from quantkd.evaluation.agreement import compare_answers
from quantkd.evaluation.arms import EvaluationSettings
from quantkd.evaluation.stats import RowSums, compute_gap_recovered, mcnemar_exact, wilson_interval
from quantkd.hardware import default_device, native_compute_dtype
from quantkd.models.quantize import quantize_once
from quantkd.models.stored_weights import compute_size
from quantkd.models.student import default_lora_config, load_student
from quantkd.teacher import load_teacher

# Without a chat template: half the tokens, and the model is fine-tuned to the plain prompt.
CHAT_TEMPLATE = False
MAX_NEW_TOKENS = 96

Problems = list[dict[str, str]]


def make_problems(args: argparse.Namespace) -> dict[str, Problems]:
    """Problems to test, to distil and to fine-tune on; no question is in two of them."""
    test = generate_problems(args.test_rows, args.seed, max_steps=args.max_steps)
    distill = generate_problems(args.distill_rows, args.seed + 1, exclude=test, max_steps=args.max_steps)
    tune = generate_problems(args.tune_rows, args.seed + 2, exclude=[*test, *distill], max_steps=args.max_steps)
    return {"test": test, "distill": distill, "tune": tune}


def fine_tune(problems: Problems, args: argparse.Namespace) -> Path:
    """The teacher: the model fine-tuned whole on the problems' written solutions, once."""
    folder = Path(args.cache) / "teacher"
    if (folder / "config.json").is_file():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = []
    for problem in problems:
        (prompt,) = encode_prompts(tokenizer, [build_prompt(problem["question"])], chat_template=CHAT_TEMPLATE)
        answer = encode_completion(tokenizer, problem["answer"])
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    checkpoints = str(folder) + "-checkpoints"
    arguments = TrainingArguments(
        checkpoints, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=args.tune_learning_rate,
        lr_scheduler_type="cosine", warmup_steps=20, logging_steps=10, save_steps=args.save_steps, save_total_limit=1,
        report_to=[], disable_tqdm=True, use_cpu=default_device().type == "cpu", seed=args.seed,
        bf16=native_compute_dtype() == torch.bfloat16,  # autocast: the weights stay in float32
    )  # fmt: skip
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), arguments, train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if Path(checkpoints).is_dir() else None)
    tokenizer.save_pretrained(folder)
    trainer.model.save_pretrained(folder)
    return folder


def quantization_config(args: argparse.Namespace) -> BitsAndBytesConfig:
    """4 bits of the kind asked for."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=args.quantization, bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=native_compute_dtype(),
    )  # fmt: skip


def choose_codes(teacher: Path, problems: Problems, args: argparse.Namespace) -> tuple[TransferSet, Path]:
    """The teacher's answers, and where the 4-bit copy with chosen codes is; what the cache lacks is made."""
    cache = Path(args.cache)
    base = cache / f"codes-{args.quantization}-{args.codes}-{args.distill_rows}"
    rows = capture(
        str(teacher),
        [build_prompt(problem["question"]) for problem in problems],
        cache / f"transfer_set-{args.distill_rows}",
        chat_template=CHAT_TEMPLATE,
        generation=GenerationSettings(max_new_tokens=MAX_NEW_TOKENS),
        run=RunSettings(batch_size=32),
    )
    if args.codes == "calibrated":
        quantize_once(str(teacher), rows, base, quantization_config=quantization_config(args))
    return rows, base


def train_adapter(arm: str, teacher: Path, rows: TransferSet, base: Path, args: argparse.Namespace) -> Path:
    """The folder of the start, or of what it became by the distributions or by the control; made if it is not there."""
    kind = f"{args.quantization}-{args.codes}-{args.distill_rows}-{args.rank}"
    folder = Path(args.cache) / (f"start-{kind}" if arm == "start" else f"{arm}-{kind}-{args.epochs}")
    if (folder / "adapter_config.json").is_file():
        return folder
    student = load_base(teacher, base, args)
    if arm != "start":
        start = train_adapter("start", teacher, rows, base, args)
        student = PeftModel.from_pretrained(student, start, is_trainable=True)
    trainer = QuantizedDistillationTrainer(
        student,
        QuantizedDistillationConfig(
            str(folder), num_train_epochs=args.epochs, per_device_train_batch_size=8, learning_rate=args.learning_rate,
            alpha=0.0 if arm == "control" else 1.0, lr_scheduler_type="cosine", warmup_steps=4, packing=True,
            save_strategy="no", report_to=[], disable_tqdm=True, seed=args.seed,
            init_from=str(teacher) if arm == "start" else None,
        ),
        train_dataset=rows,
        peft_config=default_lora_config(args.rank) if arm == "start" else None,
    )  # fmt: skip
    if arm != "start":
        trainer.train()
    trainer.save_model()
    return folder


def load_base(teacher: Path, base: Path, args: argparse.Namespace) -> Any:
    """The 4-bit copy, with chosen codes or with the nearest."""
    if args.codes == "calibrated":
        return load_student(str(base))
    return load_student(str(teacher), quantization_config=quantization_config(args))


def solve(arm: str, model: Any, tokenizer: Any, problems: Problems, args: argparse.Namespace) -> list[AnswerRecord]:
    """A model's answers to the test problems, each of which is kept."""
    settings = EvaluationSettings(args.eval_batch_size, MAX_NEW_TOKENS, CHAT_TEMPLATE)
    path = Path(args.cache) / "records" / f"{arm}.jsonl"
    records = evaluate_gsm8k(model, tokenizer, problems, settings=settings, records_path=path)
    solved = sum(record.correct_strict for record in records)
    low, high = wilson_interval(solved, len(records))
    print(f"{arm:24} {solved / len(records):6.1%} of {len(records)} [{low:.1%}, {high:.1%}]", flush=True)
    return records


def summarize(answers: dict[str, list[AnswerRecord]], bits: float | None, args: argparse.Namespace) -> dict[str, Any]:
    """The JSON line."""
    solved = {arm: [record.correct_strict for record in records] for arm, records in answers.items()}
    agrees = {arm: compare_answers(records, answers["teacher"]).agrees for arm, records in answers.items()}
    drop = mcnemar_exact(solved["teacher"], solved["before"])
    left = mcnemar_exact(solved["teacher"], solved["after"])
    sums = {arm: RowSums([float(verdict) for verdict in verdicts]) for arm, verdicts in solved.items()}
    summary: dict[str, Any] = {arm: round(sum(verdicts) / len(verdicts), 4) for arm, verdicts in solved.items()}
    summary["bits_per_weight"] = None if bits is None else round(bits, 3)
    prefixes = {"after": "", **{arm: f"{arm}." for arm in ("codes", "start", "control") if arm in answers}}
    for arm, prefix in prefixes.items():
        share = compute_gap_recovered(sums["teacher"], sums["before"], sums[arm], higher_is_better=True, binary=True)
        if share.value is None:
            print(f"Nothing to recover can be seen: {share.reason}. Use more problems, or coarser --quantization.")
        summary[f"{prefix}accuracy_gap_recovered"] = None if share.value is None else round(share.value, 4)
        interval = share.interval and [round(bound, 4) for bound in share.interval]
        summary[f"{prefix}accuracy_gap_recovered_ci95"] = interval
    summary["answer_agreement"] = {
        arm: round(float(found.mean()), 4) for arm, found in agrees.items() if arm != "teacher"
    }
    for other in agrees.keys() - {"teacher", "after"}:
        found = mcnemar_exact(agrees["after"], agrees[other])
        summary[f"agreement.p_value_after_vs_{other}"] = found.p_value
        summary[f"agreement.only_after_vs_{other}"] = [found.only_a, found.only_b]
    return {
        **summary,
        "p_value": drop.p_value,
        "only_teacher_vs_before": [drop.only_a, drop.only_b],
        "p_value_teacher_vs_after": left.p_value,
        "only_teacher_vs_after": [left.only_a, left.only_b],
        "dtype": str(native_compute_dtype()).removeprefix("torch."),
        **{
            key: getattr(args, key)
            for key in ("test_rows", "distill_rows", "tune_rows", "max_steps", "quantization", "rank")
        },
    }


def main() -> None:
    """Fine-tune, distil, solve, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser, gsm8k=False)
    parser.add_argument("--cache", default="runs/accuracy", help="where everything is kept and found again")
    parser.add_argument("--quantization", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument("--codes", choices=("calibrated", "nearest"), default="calibrated", help="that are trained on")
    parser.add_argument("--test_rows", type=int, default=600, help="problems to solve")
    parser.add_argument("--distill_rows", type=int, default=512, help="problems whose answers are learned from")
    parser.add_argument("--tune_rows", type=int, default=2000, help="problems that the teacher is fine-tuned on")
    parser.add_argument("--max_steps", type=int, default=1, choices=(1, 2, 3), help="the most steps of a problem")
    parser.add_argument("--tune_learning_rate", type=float, default=1e-4)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--epochs", type=float, default=1.0, help="of the distillation")
    parser.add_argument("--learning_rate", type=float, help="of the distillation; the library's default if left out")
    parser.add_argument("--eval_batch_size", type=int, default=50)
    parser.add_argument("--save_steps", type=int, default=100, help="fine-tuning steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few rows of everything: that it runs, not a result")
    args = parse(parser)
    if args.quick:
        args.test_rows, args.distill_rows, args.tune_rows, args.rank = 16, 16, 64, 8
    problems = make_problems(args)
    started = time.perf_counter()
    teacher = fine_tune(problems["tune"], args)
    print(f"fine-tuning: {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
    model, tokenizer = load_teacher(str(teacher))
    answers: dict[str, list[AnswerRecord]] = {}

    def test(arm: str, model: Any) -> None:
        name = arm if arm == "teacher" else f"{arm}-{args.quantization}"
        name += "" if arm in ("teacher", "before") else f"-{args.codes}"
        answers[arm] = solve(name, model, tokenizer, problems["test"], args)

    test("teacher", model)
    del model
    gc.collect()
    test("before", load_student(str(teacher), quantization_config=quantization_config(args)))
    started = time.perf_counter()
    rows, base = choose_codes(teacher, problems["distill"], args)
    adapters = {arm: train_adapter(arm, teacher, rows, base, args) for arm in ("start", "after", "control")}
    print(f"capture, codes and distillation: {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
    if args.codes == "calibrated":
        test("codes", load_base(teacher, base, args))
    for arm, adapter in adapters.items():
        test(arm, student := PeftModel.from_pretrained(load_base(teacher, base, args), adapter))
    print(json.dumps(summarize(answers, compute_size(student).bits_per_weight, args)))


if __name__ == "__main__":
    main()
