"""`quantkd evaluate`: one model on held-out rows and on GSM8K, as an arm of a report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from quantkd.cli.arguments import FORMAT, StudentArguments, load_adapted_from, load_student_from, load_tokenizer_from
from quantkd.cli.format import say
from quantkd.cli.parsing import option, parse_options
from quantkd.data.gsm8k import load_gsm8k
from quantkd.data.prompts import load_examples
from quantkd.errors import ConfigError, DataError, refuse_unused
from quantkd.evaluation.accuracy import Questions, evaluate_prompts
from quantkd.evaluation.agreement import compare_accuracy
from quantkd.evaluation.arms import Arm, EvaluationSettings, check_arm_name
from quantkd.evaluation.harness import HarnessTasks
from quantkd.evaluation.measure import evaluate_arm
from quantkd.files import parse_object
from quantkd.hardware import process_state
from quantkd.hub.adapters import fetch_adapter, load_adapter
from quantkd.models.stored_weights import compute_file_size
from quantkd.models.student import refuse_quantized
from quantkd.names import naming
from quantkd.teacher import load_teacher
from quantkd.teacher.model_server import ModelServer, naming_engine_kwargs
from quantkd.teacher.served import TOP_LOGPROBS, evaluate_served
from quantkd.transfer_set import TransferSet

logger = logging.getLogger(__name__)

_LIMIT = 100  # questions by default
_NEEDS = {
    "held_out": "teacher",
    "gsm8k": "shots",
    "prompts": "prompt_column completion_column split",
    "gsm8k prompts": "limit max_new_tokens plain_prompts",
    "tasks": "include_path num_fewshot task_limit apply_chat_template rerun_tasks",
    "held_out gsm8k tasks": "title",
    "engine=transformers": "full_precision adapter teacher gsm8k prompts tasks force batch_size",
    "engine=server": "base_url top_logprobs engine_kwargs served_files",
}
_EXAMPLES = """examples:
  quantkd evaluate --arm teacher --full_precision --model_name_or_path MODEL --held_out runs/held --run_dir runs/x
  quantkd evaluate --arm before --model_name_or_path MODEL --held_out runs/held --run_dir runs/x
  quantkd evaluate --arm after --model_name_or_path MODEL --adapter runs/student --held_out runs/held --run_dir runs/x
  quantkd evaluate --arm before --model_name_or_path MODEL --teacher MODEL --held_out runs/held --run_dir runs/x
  quantkd evaluate --arm after --model_name_or_path MODEL --adapter runs/student --gsm8k hub --run_dir runs/x
  quantkd evaluate --arm after --model_name_or_path MODEL --prompts my.jsonl --run_dir runs/x
  quantkd evaluate --arm after --model_name_or_path MODEL --adapter runs/student --tasks gsm8k,arc_easy --run_dir runs/x
  quantkd evaluate --engine server --base_url http://127.0.0.1:8080 --held_out runs/held --arm served --run_dir runs/x
  accelerate launch -m quantkd evaluate --arm before --model_name_or_path MODEL --held_out runs/held --run_dir runs/x
"""


@dataclass
class EvaluationArguments:
    """What to measure, on what, and where to write it."""

    run_dir: str = option("The run's folder; results go to its evaluation/ folder.")
    arm: str = option("teacher, before, after, or a name of your own.")
    title: str | None = option("How the report calls this arm.", None)
    full_precision: bool = option("Load the model unquantized, as the teacher is.", False)
    adapter: str | None = option("Folder of a trained adapter, or user/name or user/name@revision on the Hub.", None)
    held_out: str | None = option("Transfer set to measure the fidelity on.", None)
    teacher: str | None = option("The teacher's checkpoint, to measure fidelity over the whole vocabulary too.", None)
    gsm8k: str | None = option("Folder with train.jsonl and test.jsonl, `hub`, or a file with --shots 0.", None)
    shots: list[int] = option("Numbers of shots.", [0, 8])
    prompts: str | None = option("Any other data: a file, folder or Hub name.", None)
    prompt_column: str = option("Column of the prompt in --prompts.", "prompt")
    completion_column: str = option("Column of the answer in --prompts.", "completion")
    split: str | None = option("Split of --prompts, where that has splits. Default: test.", None)
    limit: int | None = option("At most this many questions, from the front. Default: 100.", None)
    tasks: str | None = option("Tasks of lm-evaluation-harness, with commas between.", None)
    include_path: str | None = option("Folder with task files of your own for --tasks.", None)
    num_fewshot: int | None = option("Shots of --tasks; each task's own if left out.", None)
    task_limit: int | None = option("At most this many items of each of --tasks.", None)
    apply_chat_template: bool = option("Put --tasks into the chat template.", False)
    rerun_tasks: bool = option("Run --tasks anew that were finished before.", False)
    force: bool = option("Measure again what was measured of this very model.", False)
    batch_size: int = option("Rows or questions a batch.", 8)
    max_new_tokens: int = option("Length limit of an answer.", 256)
    plain_prompts: bool = option("Use no chat template, as for a base model.", False)
    engine: Literal["transformers", "server"] = option(
        "What runs the model; server: one that runs already.", "transformers"
    )
    base_url: str | None = option("Address of the server engine's server.", None)
    top_logprobs: int = option("Log-probabilities a token that a server is asked for.", TOP_LOGPROBS)
    served_files: list[str] | None = option("GGUF files that the server runs, model and adapter, for its size.", None)
    engine_kwargs: str | None = option(
        'Further arguments of the server engine, as JSON: \'{"dialect": "vllm"}\'.', None
    )


@dataclass
class MeasuredStudent(StudentArguments):
    """The model to measure; of a server, the name that it uses."""

    model_name_or_path: str | None = option(  # type: ignore[assignment]
        "The model: a Hub name or a folder. Of a server its name there; the only one if left out.", None
    )


def main(argv: Sequence[str]) -> None:
    """Parse, measure, write."""
    kinds = [EvaluationArguments, MeasuredStudent]
    args, student = parse_options(kinds, argv, prog="quantkd evaluate", examples=_EXAMPLES)
    if student.model_name_or_path is None and args.engine != "server":
        raise ConfigError("One option is required: --model_name_or_path, the model to measure, or --engine server.")
    if not (args.held_out or args.gsm8k or args.prompts or args.tasks):
        raise ConfigError("There is nothing to measure: give --held_out, --gsm8k, --prompts or --tasks.")
    refuse_unused(args, _NEEDS)
    check_arm_name(args.arm, args.title)
    if args.engine == "server":
        return _evaluate_served(args, student)
    student.refuse()
    student.refuse(f"gguf_file {FORMAT}" * args.full_precision)
    # Errors in the data are reported before a model is loaded.
    given: dict[str, Any] = {"model_name": student.model_name_or_path, "title": args.title}
    if args.tasks:
        names = [name.strip() for name in args.tasks.split(",")]
        how = (args.include_path, args.num_fewshot, args.task_limit, args.apply_chat_template, args.rerun_tasks)
        given["tasks"] = HarnessTasks(names, *how)
        given["tasks"].manager  # noqa: B018
    if args.held_out:
        given["held_out"] = TransferSet.open(args.held_out)
    columns = {"prompt_column": args.prompt_column, "completion_column": args.completion_column}
    examples: list[Any] = []
    limit = _LIMIT + 1 if args.limit is None else args.limit
    if args.prompts:
        split = args.split or (None if Path(args.prompts).is_file() else "test")
        examples = _cut(load_examples(args.prompts, split=split, limit=limit, **columns), args, args.prompts)
    if args.gsm8k:
        source, most = None if args.gsm8k == "hub" else args.gsm8k, max(args.shots)
        is_file = source is not None and Path(source).is_file()
        if is_file and most:
            raise ConfigError(
                f"{source} is one file, and {most} shots would be its own questions with their answers. Give the "
                "folder that holds train.jsonl and test.jsonl, or --shots 0."
            )
        few_shot = load_gsm8k(source, "train", most) if most else ()
        asked = load_gsm8k(source, None if is_file else "test", limit)
        given["questions"] = Questions(_cut(asked, args, args.gsm8k), few_shot, args.shots)
    adapter = fetch_adapter(args.adapter) if args.adapter else None
    tokenizer = load_tokenizer_from(student)
    if args.full_precision:
        model: Any = _load_teacher(student)
        model = load_adapter(model, adapter) if adapter else model
    else:
        model = load_adapted_from(student, adapter) if adapter else load_student_from(student)
    if args.teacher:
        is_teacher = args.full_precision and not args.adapter and args.teacher == student.model_name_or_path
        given["teacher"] = model if is_teacher else _load_teacher(student, args.teacher)
    settings = EvaluationSettings(args.batch_size, args.max_new_tokens, not args.plain_prompts, args.force, share=True)
    folder, is_main = Path(args.run_dir) / "evaluation", process_state().is_main_process
    if args.held_out or args.gsm8k or args.tasks:
        arm = evaluate_arm(model, tokenizer, args.run_dir, arm=args.arm, settings=settings, **given)
        if is_main:
            say("\n".join([f"{folder / args.arm}.json{_describe(arm)}", *_describe_answers(arm, folder)]))
    if args.prompts:
        path = folder / f"{args.arm}-prompts.jsonl"
        if args.force and is_main:
            path.unlink(missing_ok=True)
        process_state().wait_for_everyone()
        records = evaluate_prompts(model, tokenizer, examples, settings=settings, records_path=path)
        graded = [record.correct for record in records if record.correct is not None]
        if is_main:
            say(f"{path}: {len(records)} answers" + (f", {sum(graded)} of {len(graded)} exact" if graded else ""))


def _evaluate_served(args: EvaluationArguments, student: MeasuredStudent) -> None:
    """Measure a model behind a server."""
    options = " ".join(each.name for each in fields(StudentArguments) if each.name != "model_name_or_path")
    refuse_unused(student, {"": options}, vars(MeasuredStudent()))
    if args.base_url is None or args.held_out is None:
        raise ConfigError("--engine server measures a served model on held-out rows: give --base_url and --held_out.")
    kwargs = parse_object("engine_kwargs", args.engine_kwargs)
    how = {"concurrency": kwargs.pop("concurrency")} if "concurrency" in kwargs else {}
    held_out = TransferSet.open(args.held_out)
    with naming_engine_kwargs():
        server = ModelServer(args.base_url, student.model_name_or_path, **kwargs)
    how["size"] = compute_file_size(args.served_files) if args.served_files else None
    how |= {"arm": args.arm, "title": args.title, "top_logprobs": args.top_logprobs}
    arm = evaluate_served(server, held_out, args.run_dir, **how)
    settings: Any = arm.fidelity and arm.fidelity.settings
    low, high = settings["kl_bounds"]
    said = f"; {settings['not_listed']} stored entries were not listed, so its KL is from {low:.6f} to {high:.6f}"
    say(f"{Path(args.run_dir) / 'evaluation' / args.arm}.json{_describe(arm)}{said}")


def _describe(arm: Arm) -> str:
    if arm.fidelity is None:
        return ""
    found, rows = arm.fidelity.means, len(arm.fidelity.tokens)
    said = f": KL {found['kl']:.4f} nats per token, perplexity {found['perplexity']:.2f}, "
    return said + f"top-1 agreement {found['top1_agreement']:.1%} on {rows} rows"


def _describe_answers(arm: Arm, folder: Path) -> list[str]:
    """A line for each number of shots: what was solved, and how the answers differ from the teacher's."""
    teacher, why = None, "the arm teacher did not answer the same questions"
    if arm.name != "teacher" and (path := folder / "teacher.json").is_file():
        try:
            teacher = Arm.read(path)
        except DataError as error:
            why = str(error)
    lines = []
    for setting, own in arm.questions.items():
        line = f"{setting}: {sum(own.verdicts['correct_flexible'])} of {own.count} solved"
        theirs = teacher.questions.get(setting) if teacher else None
        found = compare_accuracy(own, theirs) if theirs and not own.list_differences(theirs) else None
        if found is not None:
            share, (low, high), _ = found.agreement
            line += f", answer agreement with the teacher {share:.1%} [{low:.1%}, {high:.1%}], flips: "
            line += f"{found.right_to_wrong.sum()} right to wrong, {found.wrong_to_right.sum()} wrong to right"
        elif arm.name != "teacher":
            line += f"; no answer agreement: {why}"
        lines.append(line)
    return lines


def _load_teacher(student: StudentArguments, other: str | None = None) -> Any:
    """A model in full precision, in the dtype that the student computes in."""
    name = other or student.model_name_or_path
    revision = student.model_revision if name == student.model_name_or_path else "main"
    with naming(name):
        refuse_quantized(name, revision=revision)
    kwargs = {"trust_remote_code": student.trust_remote_code, "attn_implementation": student.attn_implementation}
    return load_teacher(name, dtype=student.dtype, revision=revision, **kwargs)[0]


def _cut(rows: list[Any], args: EvaluationArguments, name: str) -> list[Any]:
    """The rows that are asked; a line says where the limit by default leaves some out."""
    if args.limit is None and len(rows) > _LIMIT and process_state().is_main_process:
        logger.warning("%s has more than %d rows; the first %d are asked. --limit asks more.", name, _LIMIT, _LIMIT)
    return rows[: args.limit or _LIMIT]
