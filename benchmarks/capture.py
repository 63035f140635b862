"""What capture costs over generation alone, in time and in memory, and what the usual way costs beside it.

Every contender answers the same prompts greedily in the same batches, with the model's own settings out of the way:

- `generate`: transformers' `generate`, which gives the tokens and nothing else;
- `capture`: `quantkd.capture` as a user calls it, from prompts to a transfer set on disk, with the entries of
  `Nucleus(0.95, max_k=64)` and the log-normalizers of temperatures 1 and 2;
- `usual`: `generate(output_logits=True, return_dict_in_generate=True)`, then top-64 and log-normalizers of each step.

Time: in one process the contenders take turns at every batch, in another order each time, `capture` with a set of its
own for each; the ratios are medians over the batches of all rounds.

Memory: the batch of the longest prompts: the peak over what there was before the batch. On a GPU it is what torch
allocates; else the resident set, each contender in processes of its own, where every block of 64 kB or more is mapped
for itself (`MALLOC_MMAP_THRESHOLD_`), so that holes of the heap do not count. `extra` is the peak over that of
`generate`, and `memory_vs_step_logits` that as a share of one step's (batch, vocabulary) logits in float32.

    python benchmarks/capture.py

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _metering import MIB, Memory
from _sources import add_sources, find_gsm8k, parse
from transformers import GenerationConfig, PreTrainedTokenizerBase

from quantkd import GenerationSettings, RunSettings, capture
from quantkd.data.encoding import encode_prompts
from quantkd.data.gsm8k import load_gsm8k
from quantkd.models.generation import build_generation_config, generation_mode
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
        rows = load_gsm8k(args.gsm8k, "train", args.prompts)
        # The order in which capture takes them: batches pad alike for every contender.
        self.prompts = sorted(
            (row["question"] for row in rows), key=lambda prompt: -len(encode_prompts(self.tokenizer, [prompt])[0])
        )

    def generate(self, prompts: list[str], **kwargs: Any) -> list[int]:
        """transformers' own generation, batch by batch, and top-k if it gives logits; the length of each answer."""
        lengths: list[int] = []
        config = copy.deepcopy(self.config)
        config.update(**kwargs)
        for start in range(0, len(prompts), self.args.batch_size):
            inputs = self._pad(encode_prompts(self.tokenizer, prompts[start : start + self.args.batch_size]))
            with generation_mode(self.model, config), torch.inference_mode():
                output = self.model.generate(**inputs, generation_config=config)
            tokens = output if isinstance(output, torch.Tensor) else output.sequences
            lengths += _lengths(tokens[:, inputs["input_ids"].shape[1] :], self.config)
            if not isinstance(output, torch.Tensor):
                self._reduce(output.logits)
        return lengths

    def capture(self, prompts: list[str]) -> list[int]:
        """quantkd's whole call; the length of each answer."""
        with tempfile.TemporaryDirectory() as folder:
            found = capture(
                self.model,
                prompts,
                Path(folder) / "set",
                tokenizer=self.tokenizer,
                temperatures=TEMPERATURES,
                generation=GenerationSettings(max_new_tokens=self.args.max_new_tokens),
                run=RunSettings(batch_size=self.args.batch_size, rows_per_shard=len(prompts), progress=False),
            )
            return [int((row["labels"] != -100).sum()) for row in found]

    def run(self, name: str, prompts: list[str]) -> list[int]:
        """One contender over the prompts; the length of each answer."""
        if name == "capture":
            return self.capture(prompts)
        kwargs = {} if name == "generate" else {"output_logits": True, "return_dict_in_generate": True}
        return self.generate(prompts, **kwargs)

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
        with _Shorter(bench, 4):
            bench.run(name, bench.prompts[: bench.args.batch_size])
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    tokens, size = 0, bench.args.batch_size
    batches = [bench.prompts[start : start + size] for start in range(0, len(bench.prompts), size)]
    for turn in range(bench.args.rounds * len(batches)):
        shift = turn % len(CONTENDERS)
        lengths: list[int] | None = None
        for name in (*CONTENDERS[shift:], *CONTENDERS[:shift]):
            began = time.perf_counter()
            found = bench.run(name, batches[turn % len(batches)])
            seconds[name].append(time.perf_counter() - began)
            print(f"batch {turn + 1} {name}: {seconds[name][-1]:.2f} s, {sum(found)} tokens", flush=True)
            if lengths is not None and found != lengths:
                raise SystemExit(f"{name} answered with other lengths than the contenders before it.")
            lengths = found
        tokens += sum(lengths or [])
    return {"seconds": seconds, "tokens": tokens}


def measure_memory(name: str, bench: Bench) -> dict[str, Any]:
    """Peak of one contender over one batch."""
    prompts = bench.prompts[: bench.args.batch_size]
    with _Shorter(bench, 4):
        bench.run(name, prompts)
    memory = Memory()
    memory.settle()
    memory.reset()
    before = memory.now()
    bench.run(name, prompts)
    return {"peak": memory.peak() - before, "step_logits": 4 * len(prompts) * int(bench.model.config.vocab_size)}


class _Shorter:
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
    """Memory in processes, then time in turns, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--dtype", default=None, help="as in quantkd capture")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing; 0 leaves it out")
    parser.add_argument("--processes", type=int, default=1, help="of the memory, of each contender; 0 leaves it out")
    parser.add_argument("--only", choices=CONTENDERS, help="the memory of this contender alone, in this process")
    args = parse(parser)
    args.gsm8k = find_gsm8k(args.gsm8k)
    if args.only:
        print(json.dumps(measure_memory(args.only, Bench(args))))
        return
    given = [
        f"--{key}={value}"
        for key in ("model", "gsm8k", "prompts", "batch_size", "max_new_tokens", "dtype")
        if (value := getattr(args, key)) is not None
    ]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    bench = Bench(args) if torch.cuda.is_available() else None
    for _ in range(args.processes):
        for name in CONTENDERS:
            runs[name].append(measure_memory(name, bench) if bench else run_alone(name, given))
    result: dict[str, Any] = {}
    if args.processes:
        result |= summarize_memory(runs)
    if args.rounds:
        bench = bench or Bench(args)
        result |= summarize_time(measure_time(bench), len(bench.prompts))
        result |= {"dtype": str(bench.model.dtype).removeprefix("torch."), "device": str(bench.model.device)}
    print(json.dumps(result))


def summarize_memory(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Peaks, and the extra over `generate` in units of one step's logits."""
    peaks = {name: statistics.median(run["peak"] for run in found) for name, found in runs.items()}
    step = runs["generate"][0]["step_logits"]
    extra = {name: round((peaks[name] - peaks["generate"]) / step, 2) for name in CONTENDERS}
    print(f"\n{'contender':<10} {'peak MiB':>9} {'extra, in logits of one step':>28}")
    for name in CONTENDERS:
        print(f"{name:<10} {peaks[name] / MIB:9.1f} {extra[name]:28.2f}")
    return {
        "memory_vs_step_logits": extra["capture"],
        "usual_memory_vs_step_logits": extra["usual"],
        "step_logits_mib": round(step / MIB, 2),
        "peak_mib": {name: round(peak / MIB, 1) for name, peak in peaks.items()},
    }


def summarize_time(timed: dict[str, Any], prompts: int) -> dict[str, Any]:
    """Seconds of all prompts, and the median ratio to `generate`."""
    seconds: dict[str, list[float]] = timed["seconds"]
    ratios = {
        name: statistics.median(own / plain for own, plain in zip(found, seconds["generate"], strict=True))
        for name, found in seconds.items()
    }
    print(f"\n{'contender':<10} {'seconds':>9} {'x generate':>10}")
    for name in CONTENDERS:
        print(f"{name:<10} {sum(seconds[name]):9.2f} {ratios[name]:10.3f}")
    return {
        "time_vs_generate": round(ratios["capture"], 3),
        "usual_time_vs_generate": round(ratios["usual"], 3),
        "seconds": {name: round(sum(found), 2) for name, found in seconds.items()},
        "tokens": timed["tokens"],
        "prompts": prompts,
    }


if __name__ == "__main__":
    main()
