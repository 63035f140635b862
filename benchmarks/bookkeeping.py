"""What a capture spends on everything but the teacher: planning, claiming, batching, checking, writing.

100,000 short prompts go through `quantkd.capture` and a teacher that has its rows ready: no model runs, so what is left
is the price of the pass itself. Its seconds are put beside those that a teacher of `--tokens_per_second` would take for
the same tokens, in one process; 8,000 is an assumption, much for one process of a small model on a data-centre GPU:

- `planning`: reading and tokenizing the prompts and fixing the plan;
- `bookkeeping`: claiming shards, sorting and batching, counters, progress, the index;
- `storing`: checking, encoding and writing the rows, every shard fsynced. That is the set itself, and is listed apart.

Memory: the resident set when a tenth of the shards is committed, and when all are.

    python benchmarks/bookkeeping.py

Of the model the tokenizer alone is loaded. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _metering import MIB, Memory
from _sources import add_sources, parse
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantkd import Nucleus, RunSettings, capture
from quantkd.teacher import EncodedPrompt, GenerationSettings, Teacher
from quantkd.transfer_set import TransferRow, TransferSetWriter


class ReadyTeacher(Teacher):
    """Answers with rows that are computed from nothing but the row's number, and counts the time it takes for that."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: int, entries: int) -> None:
        settings, size = GenerationSettings(), len(tokenizer)
        super().__init__("ready", tokenizer, Nucleus(0.95), (1.0, 2.0), settings, vocab_size=size, dtype="float32")
        self.tokens, self.seconds, self.answered = tokens, 0.0, 0
        draw = np.random.default_rng(0)
        self.parts = []
        for _ in range(64):
            counts = draw.integers(1, 2 * entries, tokens)
            mass = [draw.dirichlet(np.ones(count + 1))[:-1] for count in counts]
            ids = [draw.choice(self.vocab_size, count, replace=False) for count in counts]
            self.parts.append(
                (
                    np.asarray([row[0] for row in ids]),
                    counts,
                    np.concatenate(ids),
                    np.log(np.concatenate([np.sort(row)[::-1] for row in mass])).astype(np.float32),
                    np.tile(np.float32([0.0, 3.0]), (tokens, 1)),
                )
            )

    def describe(self) -> dict[str, Any]:
        return {"engine": "ready"}

    def answer(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        started = time.perf_counter()
        rows = []
        for prompt in prompts:
            answer, counts, ids, logprobs, normalizers = self.parts[prompt.index % len(self.parts)]
            start = len(prompt.prompt_ids)
            rows.append(
                TransferRow(
                    input_ids=np.concatenate([np.asarray(prompt.prompt_ids), answer]),
                    spans=np.asarray([[start, start + self.tokens]]),
                    counts=counts,
                    token_ids=ids,
                    logprobs=logprobs,
                    log_normalizers=normalizers,
                    finished=True,
                )
            )
        self.answered += len(rows) * self.tokens
        self.seconds += time.perf_counter() - started
        return rows

    def score(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        return self.answer(prompts)


class Timed:
    """Adds up the seconds of a method while inside a `with`, and calls a function after each call."""

    def __init__(self, owner: type, name: str, after: Callable[[], None]) -> None:
        self.owner, self.name, self.after, self.seconds = owner, name, after, 0.0

    def __enter__(self) -> Timed:
        original = self.original = getattr(self.owner, self.name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            value = original(*args, **kwargs)
            self.seconds += time.perf_counter() - started
            self.after()
            return value

        setattr(self.owner, self.name, timed)
        return self

    def __exit__(self, *error: object) -> None:
        setattr(self.owner, self.name, self.original)


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser, gsm8k=False)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--entries", type=int, default=9, help="of each position, on average")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--tokens_per_second", type=float, default=8000, help="of the teacher that is assumed")
    args = parse(parser)

    teacher = ReadyTeacher(AutoTokenizer.from_pretrained(args.model), args.tokens, args.entries)
    memory, resident, planned = Memory(), [], []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with Timed(TransferSetWriter, "commit", lambda: resident.append(memory.now())) as storing:
            prompts = [f"What is {number} + {number % 97}?" for number in range(args.prompts)]
            path = Path(folder) / "set"
            run = RunSettings(batch_size=args.batch_size, progress=False)
            done = capture(teacher, prompts, path, run=run, on_plan=lambda _: planned.append(time.perf_counter()))
        total = time.perf_counter() - started
        rows, size = len(done), done.info.num_bytes
    planning = planned[0] - started
    bookkeeping = total - planning - teacher.seconds - storing.seconds
    assumed = teacher.answered / args.tokens_per_second
    table = {"planning": planning, "bookkeeping": bookkeeping, "storing": storing.seconds, "rows made": teacher.seconds}
    print(f"{rows} rows, {teacher.answered} response tokens, {size / MIB:.0f} MiB, {len(resident)} shards")
    for name, seconds in table.items():
        print(f"{name:<12} {seconds:7.1f} s   {1e6 * seconds / rows:7.1f} us a row")
    tenth = resident[len(resident) // 10]
    print(f"memory       {tenth / MIB:.0f} MiB after a tenth of the shards, {resident[-1] / MIB:.0f} MiB after all")
    print(f"a teacher of {args.tokens_per_second:.0f} tokens/s would take {assumed:.0f} s")
    result = {
        "planning_and_bookkeeping_share": (planning + bookkeeping) / (planning + bookkeeping + assumed),
        "with_storing_share": (total - teacher.seconds) / (total - teacher.seconds + assumed),
        "memory_growth": resident[-1] / tenth - 1,
        **{f"{name.replace(' ', '_')}_seconds": round(seconds, 2) for name, seconds in table.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
