"""What capture costs over generation alone, in time and in memory, and what the usual way costs beside it.

Every contender answers the same prompts greedily in the same batches, with the model's own settings out of the way:

- `generate`: transformers' `generate`, which gives the tokens and nothing else;
- `capture`: `quantkd.capture` as a user calls it, from prompts to a transfer set on disk, with the entries of
  `Nucleus(0.95, max_k=64)` and the log-normalizers of temperatures 1 and 2;
- `usual`: `generate(output_logits=True, return_dict_in_generate=True)`, then top-64 and log-normalizers of each step.

Time: the contenders take turns in one process, in another order each round; the ratios are medians over the rounds.

Memory: the batch of the longest prompts, each contender in processes of its own: the peak over what there was before the
batch, as torch allocates it on a GPU, else the resident set, where every block of 64 kB or more is mapped for itself
(`MALLOC_MMAP_THRESHOLD_`), so that holes of the heap do not count. `extra` is the peak over that of `generate`, and
`memory_vs_step_logits` is the extra as a share of one step's (batch, vocabulary) logits in float32.

    python benchmarks/capture.py --model HuggingFaceTB/SmolLM2-135M-Instruct --gsm8k data/gsm8k

The last line is one JSON object. Without --gsm8k the prompts are quantkd's own word problems.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _metering import MIB, Memory
from transformers import GenerationConfig, PreTrainedTokenizerBase

from quantkd import capture
from quantkd.data.arithmetic import generate_problems
from quantkd.data.gsm8k import load_gsm8k
from quantkd.data.prompts import encode_prompt
from quantkd.generation import build_generation_config, generation_mode
from quantkd.teacher import load_teacher

CONTENDERS = ("generate", "capture", "usual")
MAX_K = 64
TEMPERATURES = (1.0, 2.0)
NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class Bench:
    """The teacher, the prompts longest first, and the ways to answer them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model: Any
        self.tokenizer: PreTrainedTokenizerBase
        self.model, self.tokenizer = load_teacher(args.model, dtype=args.dtype)
        self.config = build_generation_config(self.model, self.tokenizer, args.max_new_tokens)
        rows = load_gsm8k(args.gsm8k, "train", args.prompts) if args.gsm8k else generate_problems(args.prompts, seed=0)
        # The order in which capture takes them: batches pad alike for every contender.
        self.prompts = sorted(
            (row["question"] for row in rows), key=lambda prompt: -len(encode_prompt(self.tokenizer, prompt))
        )

    def generate(self, prompts: list[str], **kwargs: Any) -> tuple[Any, list[int]]:
        """transformers' own generation, batch by batch; the last batch's output and the length of each answer."""
        lengths, output = [], None
        for start in range(0, len(prompts), self.args.batch_size):
            inputs = self._pad([encode_prompt(self.tokenizer, p) for p in prompts[start : start + self.args.batch_size]])
            with generation_mode(self.model, self.config), torch.inference_mode():
                output = self.model.generate(**inputs, generation_config=self.config, **kwargs)
            tokens = output if isinstance(output, torch.Tensor) else output.sequences
            lengths += _lengths(tokens[:, inputs["input_ids"].shape[1] :], self.config)
            if not isinstance(output, torch.Tensor):
                self._reduce(output.logits)
        return output, lengths

    def capture(self, prompts: list[str]) -> list[int]:
        """quantkd's whole call; the length of each answer."""
        with tempfile.TemporaryDirectory() as folder:
            found = capture(
                self.model, prompts, Path(folder) / "set", tokenizer=self.tokenizer, progress=False,
                max_new_tokens=self.args.max_new_tokens, batch_size=self.args.batch_size,
                rows_per_shard=len(prompts), temperatures=TEMPERATURES,
            )  # fmt: skip
            return [int((row["labels"] != -100).sum()) for row in found]

    def run(self, name: str, prompts: list[str]) -> list[int]:
        """One contender over the prompts; the length of each answer."""
        if name == "capture":
            return self.capture(prompts)
        kwargs = {} if name == "generate" else {"output_logits": True, "return_dict_in_generate": True}
        return self.generate(prompts, **kwargs)[1]

    def _pad(self, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.config.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    @staticmethod
    def _reduce(steps: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, ...]]:
        """Top-k and normalizers a step at a time, which is the kindest to this way's memory."""
        return [
            (*(part.cpu() for part in logits.float().topk(MAX_K)), *((logits / t).logsumexp(-1) for t in TEMPERATURES))
            for logits in steps
        ]


def _lengths(tokens: torch.Tensor, config: GenerationConfig) -> list[int]:
    ends = torch.isin(tokens, torch.tensor(config.eos_token_id, device=tokens.device))
    length = torch.where(ends.any(1), ends.long().argmax(1) + 1, tokens.shape[1])
    return [int(each) for each in length]


def measure_time(bench: Bench) -> dict[str, Any]:
    """Seconds of every contender in every round."""
    for name in CONTENDERS:  # warm-up
        with _shorter(bench, 4):
            bench.run(name, bench.prompts[: bench.args.batch_size])
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    lengths: list[int] | None = None
    for turn in range(bench.args.rounds):
        shift = turn % len(CONTENDERS)
        for name in (*CONTENDERS[shift:], *CONTENDERS[:shift]):
            began = time.perf_counter()
            found = bench.run(name, bench.prompts)
            seconds[name].append(time.perf_counter() - began)
            print(f"round {turn + 1} {name}: {seconds[name][-1]:.2f} s, {sum(found)} tokens", flush=True)
            if lengths is not None and found != lengths:
                raise SystemExit(f"{name} answered with other lengths than the contenders before it.")
            lengths = found
    assert lengths is not None
    return {"seconds": seconds, "tokens": sum(lengths), "steps_per_batch": bench.args.max_new_tokens}


def measure_memory(name: str, bench: Bench) -> dict[str, Any]:
    """Peak of one contender over one batch."""
    prompts = bench.prompts[: bench.args.batch_size]
    with _shorter(bench, 4):
        bench.run(name, prompts)
    memory = Memory()
    memory.settle()
    memory.reset()
    before = memory.now()
    bench.run(name, prompts)
    return {"peak": memory.peak() - before, "step_logits": 4 * len(prompts) * int(bench.model.config.vocab_size)}


class _shorter:
    """Answers of a few tokens while it lasts."""

    def __init__(self, bench: Bench, tokens: int) -> None:
        self.bench, self.tokens, self.own = bench, tokens, bench.args.max_new_tokens

    def __enter__(self) -> None:
        self._set(self.tokens)

    def __exit__(self, *error: object) -> None:
        self._set(self.own)

    def _set(self, tokens: int) -> None:
        self.bench.args.max_new_tokens = self.bench.config.max_new_tokens = tokens


def run_alone(name: str, given: list[str]) -> dict[str, Any]:
    """Memory of one contender in a process of its own."""
    command = [sys.executable, __file__, "--only", name, *given]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **NO_HOLES})
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    print(f"memory {name}: {result['peak'] / MIB:.1f} MiB", flush=True)
    return result


def main() -> None:
    """Memory in processes, then time in turns, then the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--gsm8k", default=None, help="folder with train.jsonl; built-in word problems without it")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--dtype", default=None, help="as in quantkd capture")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing")
    parser.add_argument("--processes", type=int, default=1, help="of the memory, of each contender")
    parser.add_argument("--only", choices=CONTENDERS, help="the memory of this contender alone, in this process")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure_memory(args.only, Bench(args))))
        return
    given = [
        f"--{key}={value}"
        for key in ("model", "gsm8k", "prompts", "batch_size", "max_new_tokens", "dtype")
        if (value := getattr(args, key)) is not None
    ]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(args.processes):
        for name in CONTENDERS:
            runs[name].append(run_alone(name, given))
    peaks = {name: statistics.median(run["peak"] for run in found) for name, found in runs.items()}
    step_logits = runs["generate"][0]["step_logits"]
    bench = Bench(args)
    timed = measure_time(bench)
    seconds = timed["seconds"]
    result: dict[str, Any] = {}
    print(f"\n{'contender':<10} {'seconds':>8} {'x generate':>10} {'peak MiB':>9} {'extra MiB':>9} {'x step logits':>13}")
    for name in CONTENDERS:
        ratio = statistics.median(own / plain for own, plain in zip(seconds[name], seconds["generate"], strict=True))
        extra = peaks[name] - peaks["generate"]
        cells = f"{statistics.median(seconds[name]):8.2f} {ratio:10.3f} {peaks[name] / MIB:9.1f} {extra / MIB:9.1f}"
        print(f"{name:<10} {cells} {extra / step_logits:13.2f}")
        if name != "generate":
            prefix = "" if name == "capture" else "usual_"
            result[f"{prefix}time_vs_generate"] = round(ratio, 3)
            result[f"{prefix}memory_vs_step_logits"] = round(extra / step_logits, 2)
    result |= {"seconds": {name: round(statistics.median(found), 2) for name, found in seconds.items()}}
    result |= {"peak_mib": {name: round(peak / MIB, 1) for name, peak in peaks.items()}, "tokens": timed["tokens"]}
    result |= {"step_logits_mib": round(step_logits / MIB, 2), "dtype": str(bench.model.dtype).removeprefix("torch.")}
    print(json.dumps(result | {"device": str(bench.model.device)}))


if __name__ == "__main__":
    main()
