"""What a stored teacher costs in bytes, and what it loses in the direction of the student's gradient.

The teacher answers GSM8K training questions greedily. These stores of its distributions are compared: transfer sets of
nucleus 0.98 and 0.90; the same entries as plain CSR in safetensors (ids in uint16 or uint32, log-probabilities in
float16), with and without zstd; and the peers' practice of a parquet table with the renormalised top 50. For each:

- bytes per response token of all files on disk: prompts, ids, values, counts, normalizers, index and headers;
- the angle between the gradient of the forward KL from what is stored and from the full distribution, over the LoRA
  matrices of an NF4 student whose `lora_B` is not zero. The gradient of the full distribution is taken in closed form,
  softmax(student) - softmax(teacher), so it shares no code with the loss that the stored forms go through.

    python benchmarks/storage.py

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from _sources import add_sources, find_gsm8k, parse
from datasets import Dataset
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkd import GenerationSettings, RunSettings, capture
from quantkd.data.gsm8k import load_gsm8k
from quantkd.loss.reference import compute_position_terms
from quantkd.models.student import attach_lora, load_student
from quantkd.transfer_set import TransferSet, convert
from quantkd.transfer_set.rules import Nucleus, select_entries
from quantkd.transfer_set.topk import TopKLogprobs

TOP_K = 50
RULES = {"nucleus_0.98": Nucleus(0.98, max_k=64), "nucleus_0.90": Nucleus(0.90, max_k=64)}


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


def save_csr(rows: list[dict[str, Tensor]], parts: list[TopKLogprobs]) -> dict[str, int]:
    """Bytes of plain CSR tensors in one safetensors file, as it is and with each tensor through zstd."""
    entries = TopKLogprobs.concatenate(parts)
    ids = torch.uint16 if entries.vocab_size <= 2**16 else torch.uint32
    tensors = {
        "lengths": torch.tensor([len(row["input_ids"]) for row in rows]).to(torch.uint32),
        "prompt_lengths": torch.tensor([int((row["labels"] == -100).sum()) for row in rows]).to(torch.uint32),
        "input_ids": torch.cat([row["input_ids"] for row in rows]).to(ids),
        "counts": entries.counts.to(torch.uint8),
        "token_ids": entries.token_ids.to(ids),
        "logprobs": entries.logprobs.half(),
        "log_normalizers": entries.log_normalizers[:, 1:].half(),
    }
    codec = pyarrow.Codec("zstd", compression_level=19)
    packed = {
        name: torch.frombuffer(bytearray(codec.compress(tensor.numpy().tobytes(), asbytes=True)), dtype=torch.uint8)
        for name, tensor in tensors.items()
    }
    return {"": len(save(tensors)), "_zstd": len(save(packed))}


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


def measure(
    args: argparse.Namespace, sets: dict[str, TransferSet], table: list[dict[str, Any]]
) -> tuple[dict[str, float], dict[str, int]]:
    """The angle of each store, and the bytes of the CSR ones; also fills `table` with the peers' rows."""
    teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    student = make_student(args.model, args.seed)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    names = ["full", *sets, *(f"{name}_csr" for name in sets), "top50_renormalised"]
    sums = {name: [torch.zeros_like(p, dtype=torch.float64) for p in parameters] for name in names}
    rows, exact = [], {name: [] for name in sets}
    for number in range(args.rows):
        row = sets["nucleus_0.98"][number]
        rows.append(row)
        input_ids, is_target = row["input_ids"], row["labels"] != -100
        before = torch.nonzero(is_target).squeeze(1) - 1
        with torch.no_grad():
            logits = teacher(input_ids[None]).logits[0, before]
        top = renormalised_top(logits, TOP_K)
        ids, values = top.token_ids.view(-1, TOP_K), top.logprobs.view(-1, TOP_K)
        table.append({"input_ids": input_ids.tolist(), "token_ids": ids.tolist(), "top_values": values.tolist()})
        stored = {"top50_renormalised": top}
        for name, transfer_set in sets.items():
            exact[name].append(select_entries(logits, RULES[name], (1.0, 2.0)))
            stored[name] = transfer_set[number]["teacher"]
            stored[f"{name}_csr"] = replace(exact[name][-1], logprobs=exact[name][-1].logprobs.half().float())
        if number >= args.angle_rows:
            continue
        student_logits = student(input_ids[None]).logits[0, before]
        leaf = student_logits.detach().requires_grad_()
        upstream = {"full": student_logits.detach().softmax(-1) - logits.softmax(-1)}
        for name, entries in stored.items():
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
    angles = {name: compute_angle(sums["full"], sums[name]) for name in names[1:]}
    sizes = {}
    for name, parts in exact.items():
        index = len(sets[name].whole_store.index.to_bytes())  # theirs would need one, too
        for suffix, size in save_csr(rows, parts).items():
            sizes[f"{name}_csr{suffix}"] = size + index
            angles.setdefault(f"{name}_csr{suffix}", angles[f"{name}_csr"])
    return angles, sizes


def main() -> None:
    """Capture, convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--angle_rows", type=int, default=64, help="rows whose gradient is measured")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--output", type=Path, default=None, help="keep the sets here, and go on from them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    args = parse(parser)
    if args.threads:
        torch.set_num_threads(args.threads)
    output = args.output or Path(tempfile.mkdtemp())
    questions = [row["question"] for row in load_gsm8k(find_gsm8k(args.gsm8k), "train", limit=args.rows)]
    large, small = RULES
    sets = {
        large: capture(
            args.model, questions, output / large, storage=RULES[large],
            generation=GenerationSettings(max_new_tokens=args.max_new_tokens),
            run=RunSettings(rows_per_shard=args.rows, dtype="float32"),
        )
    }  # fmt: skip
    convert(sets[large], output / small, RULES[small])
    sets[small] = TransferSet(output / small, verify="full")
    table: list[dict[str, Any]] = []
    angles, sizes = measure(args, sets, table)
    tokens = sets[large].info.num_response_tokens
    parquet = output / "top50.parquet"
    peers = Dataset.from_list(table)
    peers = peers.cast_column("token_ids", _lists("int32")).cast_column("top_values", _lists("float32"))
    peers.to_parquet(parquet)
    sizes |= {name: each.info.num_bytes for name, each in sets.items()} | {"top50_renormalised": parquet.stat().st_size}
    results = {
        name: {"bytes_per_token": round(sizes[name] / tokens, 3), "angle_degrees": round(angles[name], 3)}
        for name in angles
    }
    for name, each in sets.items():
        results[name]["mean_entries"] = round(each.info.mean_entries, 2)
    prompt_share = np.round(sets[large].info.num_tokens / tokens - 1, 2)
    print(f"{args.rows} rows, {tokens} response tokens, {prompt_share} prompt tokens each")
    print(json.dumps({**results, "rows": args.rows, "angle_rows": args.angle_rows, "response_tokens": tokens}))


def _lists(dtype: str) -> Any:
    from datasets import List, Value

    return List(List(Value(dtype)))


if __name__ == "__main__":
    main()
