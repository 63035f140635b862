"""How fast one worker on one core reads rows, decodes them and collates a padded batch.

Beside it, in the same run: the same rows as lists of ints and floats in a `datasets` table, the layout that Axolotl and
DistillKit read, collated into padded tensors of the top k the way their collators do. Batches are drawn in a shuffled
order; both are timed in this process, which does what one worker of a DataLoader does.

    python benchmarks/loader.py

The last line is one JSON object. `tokens_per_second` is the best epoch's rate per second of processor time: on an idle
core that is wall time, and on a shared machine it leaves the neighbours out; `wall_tokens_per_second` is beside it.
`first_epoch_tokens_per_second` includes the checks of rows that are read for the first time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from quantkd.transfer_set import Plan, RowBatch, TransferRow, TransferSet, TransferSetWriter


def make_rows(plan: Plan, rows: int, prompt_tokens: int, response_tokens: int, entries: float) -> list[TransferRow]:
    """Rows like those of a real capture: greedy labels, and as many entries a target as asked for on average."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(rows):
        counts = np.clip(rng.geometric(1 / entries, response_tokens), 1, 64)
        token_ids = np.concatenate([rng.choice(plan.vocab_size, count, replace=False) for count in counts])
        starts = np.cumsum(counts) - counts
        weights = rng.exponential(size=len(token_ids)) + 1e-6
        logprobs = np.log(0.95 * weights / np.repeat(np.add.reduceat(weights, starts), counts))
        input_ids = rng.integers(0, plan.vocab_size, prompt_tokens + response_tokens)
        input_ids[prompt_tokens:] = token_ids[starts]
        normalizers = np.stack([np.zeros(response_tokens), 0.5 * np.log(counts + 1) + 0.1], -1)
        made.append(
            TransferRow(
                input_ids=input_ids,
                spans=np.array([[prompt_tokens, len(input_ids)]]),
                counts=counts,
                token_ids=token_ids,
                logprobs=logprobs.astype(np.float32),
                log_normalizers=normalizers.astype(np.float32),
            )
        )
    return made


def collate(batch: RowBatch) -> dict[str, Any]:
    """A right-padded batch by index arithmetic alone, with the entries of all rows side by side."""
    width = int(batch.lengths.max())
    rows = torch.repeat_interleave(torch.arange(len(batch)), batch.lengths)
    starts = batch.lengths.cumsum(0) - batch.lengths
    at = rows * width + torch.arange(len(rows)) - starts[rows]
    padded = {}
    for name, flat, padding in (("input_ids", batch.input_ids, 0), ("labels", batch.labels, -100)):
        padded[name] = torch.full((len(batch) * width,), padding).index_copy_(0, at, flat).view(len(batch), width)
    mask = torch.zeros(len(batch) * width, dtype=torch.long).index_fill_(0, at, 1).view(len(batch), width)
    return {**padded, "attention_mask": mask, "teacher": batch.teacher}


def collate_lists(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad nested lists of top-k ids and log-probabilities, position by position."""
    length = max(len(row["input_ids"]) for row in rows)
    width = max(len(entries) for row in rows for entries in row["token_ids"])
    columns: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "token_ids", "logprobs", "mask")}
    for row in rows:
        missing = length - len(row["input_ids"])
        columns["input_ids"].append(row["input_ids"] + [0] * missing)
        columns["labels"].append(row["labels"] + [-100] * missing)
        ids, values, mask = [], [], []
        for entry_ids, entry_values in zip(row["token_ids"], row["logprobs"], strict=True):
            short = width - len(entry_ids)
            ids.append(entry_ids + [0] * short)
            values.append(entry_values + [-1e9] * short)
            mask.append([1] * len(entry_ids) + [0] * short)
        columns["token_ids"].append(ids)
        columns["logprobs"].append(values)
        columns["mask"].append(mask)
    targets = max(len(ids) for ids in columns["token_ids"])
    for name, filler in (("token_ids", 0), ("logprobs", -1e9), ("mask", 0)):
        columns[name] = [part + [[filler] * width] * (targets - len(part)) for part in columns[name]]
    return {name: torch.tensor(values) for name, values in columns.items()}


def make_table(transfer_set: TransferSet) -> Dataset:
    """The rows as the peers keep them: one list of ids and one of values a target."""
    table: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "token_ids", "logprobs")}
    for row in transfer_set.rows(range(len(transfer_set))):
        cuts = np.cumsum(row.counts)[:-1]
        table["input_ids"].append(row.input_ids.tolist())
        labels = np.full(len(row.input_ids), -100)
        labels[row.spans[0, 0] :] = row.input_ids[row.spans[0, 0] :]
        table["labels"].append(labels.tolist())
        table["token_ids"].append([part.tolist() for part in np.split(row.token_ids, cuts)])
        table["logprobs"].append([part.tolist() for part in np.split(row.logprobs, cuts)])
    return Dataset.from_dict(table)


def time_epochs(
    dataset: Any, function: Callable[[Any], Any], batch_size: int, epochs: int
) -> list[tuple[float, float]]:
    """Processor and wall seconds of each epoch, in this process: what one worker of a DataLoader does."""
    seconds = []
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(dataset)).tolist()
        began, began_wall = time.process_time(), time.perf_counter()
        for start in range(0, len(order), batch_size):
            function(dataset.__getitems__(order[start : start + batch_size]))
        seconds.append((time.process_time() - began, time.perf_counter() - began_wall))
    return seconds


def main() -> None:
    """Make rows, read them both ways, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=95)
    parser.add_argument("--response_tokens", type=int, default=100)
    parser.add_argument("--entries", type=float, default=5.0)
    parser.add_argument("--vocab_size", type=int, default=49_152)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(
        teacher_name="made up", teacher_revision="", teacher_dtype="float32", tokenizer_fingerprint="0" * 64,
        vocab_size=args.vocab_size, storage={"kind": "nucleus", "p": 0.95, "max_k": 64},
        temperatures=(1.0, 2.0), responses="generate", generation={}, prompts_digest="0" * 64,
        num_prompts=args.rows, rows_per_shard=256, batch_size=8,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        with TransferSetWriter.open(Path(folder) / "set", plan) as writer:
            rows = make_rows(plan, 256, args.prompt_tokens, args.response_tokens, args.entries)
            for task in writer.claim():
                writer.commit(task, rows[: task.stop - task.start])
            writer.finalize()
        transfer_set = TransferSet(Path(folder) / "set")
        tokens = transfer_set.info.num_response_tokens
        seconds = time_epochs(transfer_set, collate, args.batch_size, args.epochs)
        part = transfer_set[: max(args.rows // 8, args.batch_size)]
        lists = time_epochs(make_table(part), collate_lists, args.batch_size, 3)
        rate = tokens / min(cpu for cpu, _ in seconds[1:])
        wall_rate = tokens / min(wall for _, wall in seconds[1:])
        first_rate = tokens / seconds[0][0]
        rate_of_lists = part.info.num_response_tokens / min(cpu for cpu, _ in lists)
    print(f"transfer set: {rate:,.0f} response tokens/s; wall clock {wall_rate:,.0f}, first epoch {first_rate:,.0f}")
    print(f"lists in a datasets table: {rate_of_lists:,.0f} response tokens/s")
    print(
        json.dumps(
            {
                "tokens_per_second": round(rate),
                "ratio_to_lists": round(rate / rate_of_lists, 2),
                "wall_tokens_per_second": round(wall_rate),
                "first_epoch_tokens_per_second": round(first_rate),
                "lists_tokens_per_second": round(rate_of_lists),
                "entries_per_token": round(transfer_set.info.mean_entries, 2),
                "batch_size": args.batch_size,
            }
        )
    )


if __name__ == "__main__":
    main()
