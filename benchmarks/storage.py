"""What a stored teacher costs in bytes, and what it loses in the direction of the student's gradient.

The teacher answers GSM8K training questions greedily. Three stores of its distributions are compared: the two profiles
of a transfer set, and the peers' practice of a parquet table with the renormalised top 50. For each:

- bytes per response token of all files on disk: prompts, ids, values, counts, normalizers, index and headers;
- the angle between the gradient of the forward KL from what is stored and from the full distribution, over the LoRA
  matrices of an NF4 student whose `lora_B` is not zero. The gradient of the full distribution is taken in closed form,
  softmax(student) - softmax(teacher), so it shares no code with the loss that the stored forms go through.

    python benchmarks/storage.py --model HuggingFaceTB/SmolLM2-135M-Instruct --gsm8k data/gsm8k

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkd import GenerationSettings, RunSettings, capture
from quantkd.data.gsm8k import load_gsm8k
from quantkd.loss.reference import compute_position_terms
from quantkd.models.student import attach_lora, load_student
from quantkd.transfer_set import PROFILES, TransferSet, convert
from quantkd.transfer_set.topk import TopKLogprobs

TOP_K = 50


def compute_angle(first: list[Tensor], second: list[Tensor]) -> float:
    """The angle between two lists of tensors taken as one vector each, in degrees."""
    dot = sum(float((a * b).sum()) for a, b in zip(first, second, strict=True))
    norms = [math.sqrt(sum(float((a * a).sum()) for a in tensors)) for tensors in (first, second)]
    return math.degrees(math.acos(min(1.0, dot / (norms[0] * norms[1]))))


def renormalised_top(logits: Tensor, k: int) -> TopKLogprobs:
    """The top k of `logits` (N, V), scaled to hold all mass: what Axolotl trains on."""
    values, ids = torch.log_softmax(logits, -1).topk(k, -1)
    values = values - values.logsumexp(-1, keepdim=True)
    offsets = torch.arange(len(logits) + 1) * k
    return TopKLogprobs(offsets, ids.flatten(), values.flatten(), torch.zeros(len(logits), 1), (1.0,), logits.shape[-1])


def make_student(model: str, seed: int) -> Any:
    """An NF4 student with LoRA on all linear layers and a `lora_B` that is not zero.

    The weights are quantized and then kept dequantized: the same function, several times faster on a CPU.
    """
    torch.manual_seed(seed)
    student = attach_lora(load_student(model, dtype="float32").dequantize())
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return student


def measure_angles(
    args: argparse.Namespace, sets: dict[str, TransferSet], table: list[dict[str, Any]]
) -> dict[str, float]:
    """Accumulate the gradients row by row; also fills `table` with the peers' rows."""
    teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    student = make_student(args.model, args.seed)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    names = ["full", *sets, "top50_renormalised"]
    sums = {name: [torch.zeros_like(p, dtype=torch.float64) for p in parameters] for name in names}
    for number in range(len(sets["faithful"])):
        row = sets["faithful"][number]
        input_ids, is_target = row["input_ids"], row["labels"] != -100
        before = torch.nonzero(is_target).squeeze(1) - 1
        with torch.no_grad():
            logits = teacher(input_ids[None]).logits[0, before]
        top = renormalised_top(logits, TOP_K)
        ids, values = top.token_ids.view(-1, TOP_K), top.logprobs.view(-1, TOP_K)
        table.append({"input_ids": input_ids.tolist(), "token_ids": ids.tolist(), "top_values": values.tolist()})
        if number >= args.angle_rows:
            continue
        student_logits = student(input_ids[None]).logits[0, before]
        leaf = student_logits.detach().requires_grad_()
        stored = {name: transfer_set[number]["teacher"] for name, transfer_set in sets.items()}
        upstream = {"full": student_logits.detach().softmax(-1) - logits.softmax(-1)}
        for name, entries in {**stored, "top50_renormalised": top}.items():
            kl = compute_position_terms(leaf, input_ids[is_target], entries).kl.sum()
            (upstream[name],) = torch.autograd.grad(kl, leaf)
        for name, gradient in upstream.items():
            for total, part in zip(
                sums[name], torch.autograd.grad(student_logits, parameters, gradient, retain_graph=True), strict=True
            ):
                total += part
        if number % 8 == 7:
            so_far = {name: round(compute_angle(sums["full"], sums[name]), 2) for name in names[1:]}
            print(f"{number + 1} rows: degrees {so_far}", flush=True)
    return {name: compute_angle(sums["full"], sums[name]) for name in names[1:]}


def main() -> None:
    """Capture, convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--gsm8k", default=None, help="folder with train.jsonl; from the Hub without it")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--angle_rows", type=int, default=64, help="rows whose gradient is measured")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--output", type=Path, default=None, help="keep the sets here, and go on from them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    output = args.output or Path(tempfile.mkdtemp())
    questions = [row["question"] for row in load_gsm8k(args.gsm8k, "train", limit=args.rows)]
    faithful = capture(
        args.model, questions, output / "faithful", storage=PROFILES["faithful"].storage,
        generation=GenerationSettings(args.max_new_tokens), run=RunSettings(rows_per_shard=args.rows, dtype="float32"),
    )  # fmt: skip
    convert(faithful, output / "compact", "compact")
    sets = {"compact": TransferSet(output / "compact", verify="full"), "faithful": faithful}
    table: list[dict[str, Any]] = []
    angles = measure_angles(args, sets, table)
    tokens = faithful.info.num_response_tokens
    parquet = output / "top50.parquet"
    peers = Dataset.from_list(table)
    peers.cast_column("token_ids", _lists("int32")).cast_column("top_values", _lists("float32")).to_parquet(parquet)
    sizes = {name: each.info.num_bytes for name, each in sets.items()} | {"top50_renormalised": parquet.stat().st_size}
    results = {
        name: {"bytes_per_token": round(sizes[name] / tokens, 3), "angle_degrees": round(angles[name], 3)}
        for name in angles
    }
    for name, each in sets.items():
        results[name]["mean_entries"] = round(each.info.mean_entries, 2)
    print(
        f"{args.rows} rows, {tokens} response tokens, {np.round(faithful.info.num_tokens / tokens - 1, 2)} prompt each"
    )
    print(json.dumps({**results, "rows": args.rows, "angle_rows": args.angle_rows, "response_tokens": tokens}))


def _lists(dtype: str) -> Any:
    from datasets import List, Value

    return List(List(Value(dtype)))


if __name__ == "__main__":
    main()
