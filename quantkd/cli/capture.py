"""`quantkd capture`: prompts in, a transfer set out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from quantkd.cli.format import format_info
from quantkd.cli.parsing import parse_options
from quantkd.hardware import process_state
from quantkd.storage import parse_storage_rule
from quantkd.teacher import capture

__all__ = ["CaptureArguments", "main"]

_EXAMPLES = """examples:
  quantkd capture --model HuggingFaceTB/SmolLM2-135M-Instruct --prompts prompts.jsonl --output_dir runs/set
  quantkd capture --model MODEL --prompts openai/gsm8k:main --prompt_column question --limit 1000 --output_dir runs/set
  quantkd capture --model MODEL --prompts data.jsonl --responses given --storage topk:50 --output_dir runs/set
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
        default=None, metadata={"help": "Distillation temperatures to keep log-normalizers for. Default: 1.0 2.0."}
    )
    responses: Literal["generate", "given"] = field(
        default="generate", metadata={"help": "Let the teacher answer, or take the data set's own answers."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Length limit of an answer."})
    do_sample: bool = field(default=False, metadata={"help": "Sample the answers instead of decoding greedily."})
    generation_temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from this mass of most probable tokens."})
    top_k: int = field(default=0, metadata={"help": "Sample from this many most probable tokens; 0 for all."})
    seed: int = field(default=0, metadata={"help": "Seed of sampled answers and sampled entries."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompt: text or messages."})
    completion_column: str = field(default="completion", metadata={"help": "Column of the given answer."})
    split: str = field(default="train", metadata={"help": "Split of a folder or a Hub data set."})
    limit: int | None = field(default=None, metadata={"help": "At most this many prompts, from the front."})
    plain_prompts: bool = field(default=False, metadata={"help": "Use no chat template, as for a base model."})
    batch_size: int = field(default=8, metadata={"help": "Prompts a batch."})
    rows_per_shard: int | None = field(default=None, metadata={"help": "Prompts a shard."})
    profile: Literal["faithful", "compact"] | None = field(
        default=None, metadata={"help": "Precision on disk, and the storage rule that goes with it."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Teacher's dtype; bfloat16 where the hardware has it, else float32."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the teacher."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of the teacher, such as sdpa."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the teacher's repository."})


def main(argv: Sequence[str]) -> None:
    """Parse, capture, and print what the set holds.

    Args:
        argv: the arguments after `quantkd capture`.
    """
    (args,) = parse_options([CaptureArguments], argv, prog="quantkd capture", examples=_EXAMPLES)
    init_kwargs = {
        name: value
        for name in ("revision", "attn_implementation", "trust_remote_code")
        if (value := getattr(args, name))
    }
    transfer_set = capture(
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
        seed=args.seed,
        prompt_column=args.prompt_column,
        completion_column=args.completion_column,
        split=args.split,
        limit=args.limit,
        chat_template=not args.plain_prompts,
        batch_size=args.batch_size,
        rows_per_shard=args.rows_per_shard,
        profile=args.profile,
        dtype=args.dtype,
        model_init_kwargs=init_kwargs,
    )

    if process_state().is_main_process:
        print(f"{args.output_dir}\n{format_info(transfer_set.info)}")
