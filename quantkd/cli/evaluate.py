"""`quantkd evaluate`: one model on held-out rows and on GSM8K, as an arm of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkd.cli.arguments import StudentArguments, load_student_from
from quantkd.cli.parsing import parse_options
from quantkd.data.gsm8k import load_gsm8k
from quantkd.data.prompts import Example, load_examples
from quantkd.errors import ConfigError
from quantkd.evaluation.accuracy import Questions, evaluate_prompts
from quantkd.evaluation.arms import Arm, EvaluationSettings, check_arm_name
from quantkd.evaluation.harness import HarnessTasks
from quantkd.evaluation.measure import evaluate_arm
from quantkd.hardware import process_state
from quantkd.hub.adapters import load_adapter
from quantkd.names import load_tokenizer
from quantkd.teacher import load_teacher
from quantkd.transfer_set import TransferSet

_EXAMPLES = """examples:
  quantkd evaluate --arm teacher --full_precision --model_name_or_path MODEL --held_out runs/held --run_dir runs/x
  quantkd evaluate --arm before --model_name_or_path MODEL --held_out runs/held --run_dir runs/x
  quantkd evaluate --arm after --model_name_or_path MODEL --adapter runs/student --held_out runs/held --run_dir runs/x
  quantkd evaluate --arm before --model_name_or_path MODEL --teacher MODEL --held_out runs/held --run_dir runs/x
  quantkd evaluate --arm after --model_name_or_path MODEL --adapter runs/student --gsm8k hub --run_dir runs/x
  quantkd evaluate --arm after --model_name_or_path MODEL --prompts my.jsonl --run_dir runs/x
  quantkd evaluate --arm after --model_name_or_path MODEL --adapter runs/student --tasks gsm8k,arc_easy --run_dir runs/x
  accelerate launch -m quantkd evaluate --arm before --model_name_or_path MODEL --held_out runs/held --run_dir runs/x
"""


@dataclass
class EvaluationArguments:
    """What to measure, on what, and where to write it."""

    run_dir: str = field(metadata={"help": "The run's folder; results go to its evaluation/ folder."})
    arm: str = field(metadata={"help": "teacher, before, after, or a name of your own."})
    title: str | None = field(default=None, metadata={"help": "How the report calls this arm."})
    full_precision: bool = field(default=False, metadata={"help": "Load the model unquantized, as the teacher is."})
    adapter: str | None = field(
        default=None, metadata={"help": "Folder of a trained adapter, or user/name or user/name@revision on the Hub."}
    )
    held_out: str | None = field(default=None, metadata={"help": "Transfer set to measure the fidelity on."})
    teacher: str | None = field(
        default=None, metadata={"help": "The teacher's checkpoint, to measure fidelity over the whole vocabulary too."}
    )
    gsm8k: str | None = field(default=None, metadata={"help": "Folder with train.jsonl and test.jsonl, or `hub`."})
    shots: list[int] = field(default_factory=lambda: [0, 8], metadata={"help": "Numbers of shots."})
    prompts: str | None = field(default=None, metadata={"help": "Any other data: a file, folder or Hub name."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompt in --prompts."})
    completion_column: str = field(default="completion", metadata={"help": "Column of the answer in --prompts."})
    split: str = field(default="test", metadata={"help": "Split of --prompts."})
    limit: int = field(default=100, metadata={"help": "At most this many questions, from the front."})
    tasks: str | None = field(default=None, metadata={"help": "Tasks of lm-evaluation-harness, with commas between."})
    include_path: str | None = field(default=None, metadata={"help": "Folder with task files of your own for --tasks."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Shots of --tasks; each task's own if left out."})
    task_limit: int | None = field(default=None, metadata={"help": "At most this many items of each of --tasks."})
    apply_chat_template: bool = field(default=False, metadata={"help": "Put --tasks into the chat template."})
    rerun_tasks: bool = field(default=False, metadata={"help": "Run --tasks anew that were finished before."})
    force: bool = field(default=False, metadata={"help": "Measure again what was measured of this very model."})
    batch_size: int = field(default=8, metadata={"help": "Rows or questions a batch."})
    max_new_tokens: int = field(default=256, metadata={"help": "Length limit of an answer."})
    plain_prompts: bool = field(default=False, metadata={"help": "Use no chat template, as for a base model."})


def main(argv: Sequence[str]) -> None:
    """Parse, measure, write."""
    kinds = [EvaluationArguments, StudentArguments]
    args, student = parse_options(kinds, argv, prog="quantkd evaluate", examples=_EXAMPLES)
    if not (args.held_out or args.gsm8k or args.prompts or args.tasks):
        raise ConfigError("There is nothing to measure: give --held_out, --gsm8k, --prompts or --tasks.")
    check_arm_name(args.arm)
    if args.teacher and not args.held_out:
        raise ConfigError("--teacher is compared with on the rows of --held_out; give those, too.")
    tasks = _tasks_from(args)
    if not student.model_name_or_path:
        raise ConfigError("Which model? Give --model_name_or_path, the teacher's own checkpoint.")
    # Errors in the data are reported before a model is loaded.
    if tasks is not None:
        tasks.manager  # noqa: B018
    held_out = TransferSet.open(args.held_out) if args.held_out else None
    examples, questions = _load_prompts(args), _load_questions(args)
    model: Any
    if args.full_precision:
        model, tokenizer = load_teacher(
            student.model_name_or_path,
            dtype=_plain_dtype(student),
            revision=student.model_revision,
            trust_remote_code=student.trust_remote_code,
        )
    else:
        model = load_student_from(student)
        tokenizer = load_tokenizer(
            student.model_name_or_path,
            revision=student.model_revision,
            trust_remote_code=student.trust_remote_code,
        )
    if args.adapter:
        model = load_adapter(model, args.adapter)
    teacher = None
    if args.teacher:
        is_teacher = args.full_precision and not args.adapter and args.teacher == student.model_name_or_path
        teacher = model if is_teacher else _load_teacher(args.teacher, student)
    settings = EvaluationSettings(
        args.batch_size, args.max_new_tokens, not args.plain_prompts, force=args.force, share=True
    )
    folder, is_main = Path(args.run_dir) / "evaluation", process_state().is_main_process
    if args.held_out or args.gsm8k or args.tasks:
        arm = evaluate_arm(
            model,
            tokenizer,
            args.run_dir,
            arm=args.arm,
            title=args.title,
            model_name=student.model_name_or_path,
            held_out=held_out,
            teacher=teacher,
            questions=questions,
            tasks=tasks,
            settings=settings,
        )
        if is_main:
            print(f"{folder / args.arm}.json{_describe(arm)}")
    if args.prompts:
        path = folder / f"{args.arm}-prompts.jsonl"
        if args.force and is_main:
            path.unlink(missing_ok=True)
        process_state().wait_for_everyone()
        records = evaluate_prompts(model, tokenizer, examples, settings=settings, records_path=path)
        graded = [record.correct for record in records if record.correct is not None]
        if is_main:
            print(f"{path}: {len(records)} answers" + (f", {sum(graded)} of {len(graded)} exact" if graded else ""))


def _describe(arm: Arm) -> str:
    """What was measured on the held-out rows, for one line."""
    if arm.fidelity is None:
        return ""
    found = arm.fidelity.means
    return (
        f": KL {found['kl']:.4f} nats per token, perplexity {found['perplexity']:.2f}, top-1 agreement "
        f"{found['top1_agreement']:.1%} on {len(arm.fidelity.tokens)} rows"
    )


def _load_questions(args: EvaluationArguments) -> Questions | None:
    if not args.gsm8k:
        return None
    source, most = None if args.gsm8k == "hub" else args.gsm8k, max(args.shots)
    few_shot = load_gsm8k(source, "train", most) if most else ()
    return Questions(load_gsm8k(source, "test", args.limit), few_shot, args.shots)


def _load_prompts(args: EvaluationArguments) -> list[Example]:
    if not args.prompts:
        return []
    return load_examples(
        args.prompts,
        prompt_column=args.prompt_column,
        completion_column=args.completion_column,
        split=args.split,
        limit=args.limit,
    )


def _plain_dtype(student: StudentArguments) -> str | None:
    return None if student.dtype == "auto" else student.dtype


def _load_teacher(name_or_path: str, student: StudentArguments) -> Any:
    """The teacher beside the model, in the dtype that the model computes in."""
    teacher = load_teacher(
        name_or_path,
        dtype=_plain_dtype(student),
        revision=student.model_revision if name_or_path == student.model_name_or_path else "main",
        trust_remote_code=student.trust_remote_code,
    )[0]
    return teacher.requires_grad_(False)


def _tasks_from(args: EvaluationArguments) -> HarnessTasks | None:
    if not args.tasks:
        return None
    return HarnessTasks(
        [name.strip() for name in args.tasks.split(",")],
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.task_limit,
        apply_chat_template=args.apply_chat_template,
        rerun=args.rerun_tasks,
    )
