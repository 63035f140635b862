"""`quantkd capture`: prompts in, a transfer set out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from quantkd.cli.format import format_info
from quantkd.cli.format_capture import format_estimate, format_summary
from quantkd.cli.parsing import parse_options
from quantkd.data.prompts import Example, load_examples
from quantkd.errors import ConfigError
from quantkd.hardware import process_state
from quantkd.teacher import capture
from quantkd.teacher.filters import CorrectOnly, DropDuplicates, Filter, FinishedOnly, ResponseLength
from quantkd.teacher.plan import CaptureEstimate
from quantkd.teacher.progress import CaptureObserver, CaptureSummary
from quantkd.transfer_set.rules import parse_storage_rule

_EXAMPLES = """examples:
  quantkd capture --model HuggingFaceTB/SmolLM2-135M-Instruct --prompts prompts.jsonl --output_dir runs/set
  quantkd capture --model MODEL --prompts openai/gsm8k:main --prompt_column question --limit 1000 --output_dir runs/set
  quantkd capture --model MODEL --prompts data.jsonl --responses given --storage topk:50 --output_dir runs/set
  quantkd capture --model MODEL --prompts data.jsonl --output_dir runs/set --batch_size auto --dry_run
  quantkd capture --model MODEL --prompts openai/gsm8k:main --prompt_column question --answer_column answer \\
      --correct_only --do_sample --num_samples 4 --drop_duplicates --output_dir runs/set
  quantkd capture --model MODEL --prompts more.jsonl --output_dir runs/set --extend
  quantkd capture --model MODEL --prompts data.jsonl --output_dir runs/set --engine server \\
      --base_url http://127.0.0.1:8000/v1
  quantkd capture --config capture.yaml --output_dir runs/set
"""


@dataclass
class CaptureArguments:
    """What `quantkd.capture` takes, by the same names."""

    model: str = field(metadata={"help": "The teacher: a Hub name or a checkpoint folder."})
    prompts: str = field(
        metadata={"help": "A .jsonl, .json, .parquet or .csv file, a folder of splits, or a Hub name."}
    )
    output_dir: str = field(metadata={"help": "Folder of the transfer set."})
    storage: str | None = field(
        default=None,
        metadata={
            "help": "Which entries to keep: topk:K, nucleus:P, nucleus:P:MAX_K or sampled:N. "
            "Default: the profile's rule, or nucleus:0.95:64 without a profile."
        },
    )
    temperatures: list[float] | None = field(
        default=None,
        metadata={
            "help": "Distillation temperatures to keep log-normalizers for. Default: 1.0 2.0; 1.0 with other engines."
        },
    )
    responses: Literal["generate", "given"] = field(
        default="generate", metadata={"help": "Let the teacher answer, or take the data set's own answers."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Length limit of an answer."})
    do_sample: bool = field(default=False, metadata={"help": "Sample the answers instead of decoding greedily."})
    generation_temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from this mass of most probable tokens."})
    top_k: int = field(default=0, metadata={"help": "Sample from this many most probable tokens; 0 for all."})
    num_samples: int = field(default=1, metadata={"help": "Answers a prompt, each a row; needs --do_sample."})
    seed: int = field(default=0, metadata={"help": "Seed of sampled answers and sampled entries."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompt: text or messages."})
    completion_column: str = field(default="completion", metadata={"help": "Column of the given answer."})
    split: str = field(default="train", metadata={"help": "Split of a folder or a Hub data set."})
    limit: int | None = field(default=None, metadata={"help": "At most this many prompts, from the front."})
    system_prompt: str | None = field(
        default=None, metadata={"help": "Put before every prompt whose messages bring none."}
    )
    few_shot: str | None = field(
        default=None,
        metadata={"help": "Solved examples, in a file with the same columns, put before every prompt as turns."},
    )
    plain_prompts: bool = field(default=False, metadata={"help": "Use no chat template, as for a base model."})
    finished_only: bool = field(default=False, metadata={"help": "Leave out answers that the length limit cut."})
    correct_only: bool = field(
        default=False, metadata={"help": "Leave out answers whose number after #### is not the reference's."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Column of the reference answer for --correct_only. Default: completion."}
    )
    min_response_tokens: int | None = field(default=None, metadata={"help": "Leave out shorter answers."})
    max_response_tokens: int | None = field(default=None, metadata={"help": "Leave out longer answers."})
    drop_duplicates: bool = field(
        default=False, metadata={"help": "Leave out prompts that came before, and equal answers to one prompt."}
    )
    extend: bool = field(default=False, metadata={"help": "Add the prompts to the finished set in --output_dir."})
    join: bool = field(
        default=False, metadata={"help": "Share the work with the same command on other machines; give it to each."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and stop, with nothing written."})
    batch_size: str = field(
        default="8", metadata={"help": "Prompts a batch, or auto to probe once what fits into memory and pays."}
    )
    rows_per_shard: int | None = field(default=None, metadata={"help": "Prompts a shard."})
    profile: Literal["faithful", "compact"] | None = field(
        default=None, metadata={"help": "Precision on disk, and the storage rule that goes with it."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Teacher's dtype; bfloat16 where the hardware has it, else float32."}
    )
    teacher_adapter: str | None = field(
        default=None, metadata={"help": "LoRA adapter on the teacher: a folder, or user/name on the Hub."}
    )
    engine: Literal["transformers", "vllm", "server"] = field(
        default="transformers", metadata={"help": "What runs the teacher."}
    )
    base_url: str | None = field(default=None, metadata={"help": "Address of the server engine's server, with /v1."})
    engine_kwargs: str | None = field(
        default=None,
        metadata={"help": "Further arguments of vLLM or the server engine, as JSON: '{\"tensor_parallel_size\": 2}'."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the teacher."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of the teacher, such as sdpa."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the teacher's repository."})


class _Printer(CaptureObserver):
    """Prints the plan and the summary on the main process; a dry run ends after the plan."""

    def __init__(self, output_dir: str, dry_run: bool) -> None:
        self.output_dir, self.dry_run = output_dir, dry_run

    def planned(self, estimate: CaptureEstimate) -> None:
        """Print the plan; a dry run ends here."""
        if process_state().is_main_process:
            # The plan is what a dry run is asked for; otherwise it goes where the bar goes.
            print(format_estimate(estimate), file=sys.stdout if self.dry_run else sys.stderr, flush=True)
        if self.dry_run:
            raise SystemExit(0)

    def finished(self, summary: CaptureSummary) -> None:
        """Print what was done."""
        if process_state().is_main_process:
            print(f"{self.output_dir}\n{format_info(summary.info)}\n{format_summary(summary)}".rstrip())


def main(argv: Sequence[str]) -> None:
    """Parse, capture, and print the plan before and what the set holds after."""
    (args,) = parse_options([CaptureArguments], argv, prog="quantkd capture", examples=_EXAMPLES)
    init_kwargs = {
        name: value
        for name in ("revision", "attn_implementation", "trust_remote_code")
        if (value := getattr(args, name))
    }
    capture(
        args.model,
        args.prompts,
        args.output_dir,
        storage=parse_storage_rule(args.storage) if args.storage else None,
        temperatures=args.temperatures,
        responses=args.responses,
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        generation_temperature=args.generation_temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        num_samples=args.num_samples,
        seed=args.seed,
        prompt_column=args.prompt_column,
        completion_column=args.answer_column or args.completion_column,
        split=args.split,
        limit=args.limit,
        chat_template=not args.plain_prompts,
        system_prompt=args.system_prompt,
        few_shot=_few_shot(args),
        filters=_filters(args),
        extend=args.extend,
        join=args.join,
        batch_size=_batch_size(str(args.batch_size)),
        rows_per_shard=args.rows_per_shard,
        profile=args.profile,
        dtype=args.dtype,
        model_init_kwargs=init_kwargs,
        teacher_adapter=args.teacher_adapter,
        engine=args.engine,
        base_url=args.base_url,
        engine_kwargs=_engine_kwargs(args.engine_kwargs),
        observer=_Printer(args.output_dir, args.dry_run),
    )


def _few_shot(args: CaptureArguments) -> list[Example]:
    """The solved examples of the file, all of them."""
    if args.few_shot is None:
        return []
    return load_examples(
        args.few_shot,
        prompt_column=args.prompt_column,
        completion_column=args.answer_column or args.completion_column,
        split=args.split,
    )


def _filters(args: CaptureArguments) -> list[Filter]:
    """The filters in the order in which they are asked: the cheap ones first."""
    if args.answer_column is not None and not args.correct_only:
        raise ConfigError(
            f"--answer_column {args.answer_column} names the reference of --correct_only, which is off. Give both; a "
            "given answer's column is --completion_column."
        )
    filters: list[Filter] = []
    if args.finished_only:
        filters.append(FinishedOnly())
    if args.min_response_tokens is not None or args.max_response_tokens is not None:
        least = 1 if args.min_response_tokens is None else args.min_response_tokens
        filters.append(ResponseLength(least, args.max_response_tokens))
    if args.correct_only:
        filters.append(CorrectOnly())
    if args.drop_duplicates:
        filters.append(DropDuplicates())
    return filters


def _batch_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"--batch_size is {text!r}; expected a whole number, or auto.") from error


def _engine_kwargs(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--engine_kwargs is {text!r}; expected a JSON object ({error}).") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--engine_kwargs is a JSON {type(value).__name__}; expected an object.")
    return value
