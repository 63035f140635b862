"""`quantkd capture`: prompts in, a transfer set out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quantkd.cli.format import format_bytes, format_info, format_lines, say
from quantkd.cli.parsing import option, parse_options
from quantkd.data.prompts import load_examples, with_context
from quantkd.errors import refuse_unused
from quantkd.hardware import process_state
from quantkd.teacher.capture import CaptureEstimate, capture
from quantkd.teacher.filters import CorrectOnly, DropDuplicates, Filter, FinishedOnly, ResponseLength
from quantkd.teacher.teacher import GenerationSettings, RunSettings
from quantkd.transfer_set.rules import parse_storage_rule

_EXAMPLES = """examples:
  quantkd capture --model HuggingFaceTB/SmolLM2-135M-Instruct --prompts prompts.jsonl --output_dir runs/set
  quantkd capture --model MODEL --prompts openai/gsm8k:main --prompt_column question --limit 1000 --output_dir runs/set
  quantkd capture --model MODEL --prompts data.jsonl --responses given --storage topk:50 --output_dir runs/set
  quantkd capture --model MODEL --prompts data.jsonl --output_dir runs/set --auto_find_batch_size --dry_run
  quantkd capture --model MODEL --prompts openai/gsm8k:main --prompt_column question --answer_column answer \\
      --correct_only --do_sample --num_samples 4 --drop_duplicates --output_dir runs/set
  quantkd capture --model MODEL --prompts data.jsonl --output_dir runs/set --engine server \\
      --base_url http://127.0.0.1:8000/v1
  quantkd capture --config capture.yaml --output_dir runs/set
"""


@dataclass
class CaptureArguments:
    """The data, and what is kept of it; `GenerationSettings` and `RunSettings` hold the other options."""

    model: str = option("The teacher: a Hub name or a checkpoint folder.", aliases=["--model_name_or_path"])
    prompts: str = option("A .jsonl, .json, .parquet or .csv file, a folder of splits, or a Hub name.")
    output_dir: str = option("Folder of the transfer set.")
    storage: str | None = option("topk:K, nucleus:P, nucleus:P:MAX_K or sampled:N. Default: nucleus:0.95:64.", None)
    temperatures: list[float] | None = option("Those to distill at. Default: 1.0 2.0; 1.0 with other engines.", None)
    responses: Literal["generate", "given"] = option("The teacher's answers, or the data set's own.", "generate")
    prompt_column: str = option("Column of the prompt: text or messages.", "prompt")
    completion_column: str = option("Column of the given answer.", "completion")
    split: str | None = option("Split of a folder or a Hub data set. Default: train.", None)
    limit: int | None = option("At most this many prompts, from the front.", None)
    system_prompt: str | None = option("Put before every prompt whose messages bring none.", None)
    few_shot: str | None = option("File of solved examples, put before every prompt as turns.", None)
    plain_prompts: bool = option("Use no chat template, as for a base model.", False)
    finished_only: bool = option("Leave out answers that the length limit cut.", False)
    correct_only: bool = option("Leave out answers whose number after #### is not the reference's.", False)
    answer_column: str | None = option("Column of the reference answer for --correct_only. Default: completion.", None)
    min_response_tokens: int = option("Leave out shorter answers.", 1)
    max_response_tokens: int | None = option("Leave out longer answers.", None)
    drop_duplicates: bool = option("Leave out prompts that came before, and equal answers to one prompt.", False)
    dry_run: bool = option("Print the plan and stop, with nothing written.", False)


def main(argv: Sequence[str]) -> None:
    """Parse, capture, and print the plan before and what the set holds after."""
    args, generation, run = parse_options(
        [CaptureArguments, GenerationSettings, RunSettings], argv, prog="quantkd capture", examples=_EXAMPLES
    )
    is_main_process = process_state().is_main_process

    def show(estimate: CaptureEstimate) -> None:
        if is_main_process:
            # The plan is what a dry run is asked for; otherwise it goes where the bar goes.
            say(format_estimate(estimate), file=sys.stdout if args.dry_run else sys.stderr, flush=True)
        if args.dry_run:
            raise SystemExit(0)

    filters, columns = _filters(args), {"prompt_column": args.prompt_column}
    columns["completion_column"] = args.answer_column or args.completion_column
    examples = load_examples(args.prompts, limit=args.limit, split=args.split, **columns)
    shots = load_examples(args.few_shot, **columns) if args.few_shot else []
    examples = with_context(examples, system_prompt=args.system_prompt, few_shot=shots)
    what: dict[str, Any] = {name: getattr(args, name) for name in ("temperatures", "responses")}
    what |= {"storage": parse_storage_rule(args.storage) if args.storage else None, "filters": filters}
    how: dict[str, Any] = {"chat_template": not args.plain_prompts, "generation": generation, "run": run}
    transfer_set = capture(args.model, examples, args.output_dir, on_plan=show, **what, **how)
    if is_main_process:
        say(f"{args.output_dir}\n{format_info(transfer_set.info)}")


def format_estimate(estimate: CaptureEstimate) -> str:
    """What a capture will do and cost, a line each."""
    plan, most = estimate.plan, "" if estimate.is_exact else "at most "
    samples, processes = plan.generation.get("num_samples", 1), process_state().num_processes
    lines = {
        "rows": f"{plan.num_prompts}" + (f", {samples} per prompt" if samples > 1 else ""),
        "shards": f"{plan.num_shards} of up to {plan.rows_per_shard} rows, batches of {plan.batch_size}"
        + (f", shared by {processes} processes" if processes > 1 else ""),
        "tokens": f"{estimate.prompt_tokens} in prompts, {most}{estimate.response_tokens} in responses",
        "size": f"{most}{format_bytes(estimate.num_bytes)}, {format_bytes(estimate.free_bytes)} free",
    }
    text = f"plan\n{format_lines(lines)}"
    if estimate.num_bytes > estimate.free_bytes:
        text += "\n  The disk may fill up. A capture that stops so is resumed by the same command once there is room."
    return text


def _filters(args: CaptureArguments) -> list[Filter]:
    """The filters in the order in which they are asked: the cheap ones first."""
    needs = {"correct_only": "answer_column", "responses=given correct_only few_shot": "completion_column"}
    refuse_unused(args, needs)
    bounds = (args.min_response_tokens, args.max_response_tokens)
    kinds: list[tuple[bool, Filter]] = [
        (args.finished_only, FinishedOnly()),
        (bounds != (1, None), ResponseLength(*bounds)),
        (args.correct_only, CorrectOnly()),
        (args.drop_duplicates, DropDuplicates()),
    ]
    return [each for is_wanted, each in kinds if is_wanted]
