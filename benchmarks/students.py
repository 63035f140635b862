"""What each format of a student costs and keeps: memory, KL to the teacher before training, speed of training.

The formats of `STUDENT_FORMATS`, HQQ by its own library and torchao's int8 by its config are loaded from the same
full-precision checkpoint, measured on the same held-out rows of a transfer set (KL at temperature 1, nats per target
token), and trained for a few steps with LoRA of rank 16 on all linear layers, on the same rows in each step. Memory is
that of all weights with their scales, before adapters are attached. Seconds are of processor time on a CPU (set
OMP_NUM_THREADS=1), else of the wall. A checkpoint that is quantized already (GPTQ, AWQ) is measured by naming it with
`--checkpoint`. A format that cannot run on this machine gives the reason instead. Each has its ratio to NF4.

    python benchmarks/students.py

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from _sources import add_sources, parse
from torch import Tensor
from transformers import AutoModelForCausalLM, TorchAoConfig, TrainerCallback

from quantkd import (
    GenerationSettings,
    QuantizedDistillationConfig,
    QuantizedDistillationTrainer,
    TransferSet,
    capture,
)
from quantkd.data.arithmetic import generate_problems
from quantkd.data.gsm8k import build_prompt
from quantkd.errors import QuantKDError
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.hardware import default_device, parse_dtype
from quantkd.models.student import STUDENT_FORMATS, load_student

FORMATS = [*STUDENT_FORMATS, "hqq", "torchao-int8"]


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step, without the time between steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = read_clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(read_clock() - self.started)


def read_clock() -> float:
    """Seconds: of this process's threads on a CPU, so that other work does not count; else those of the wall."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def count_bytes(model: Any) -> int:
    """Bytes of a model's weights and of their scales, each storage once.

    `get_memory_footprint` sees only parameters: not the constants of bitsandbytes and HQQ, and torchao's weights at the
    size of the dtype that they stand for.
    """
    storages: dict[int, int] = {}

    def add(tensor: Any) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
        elif isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()

    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            add(tensor.data if type(tensor.data) is Tensor else tensor)
            state = getattr(tensor, "quant_state", None)
            for constant in [] if state is None else state.as_dict(packed=True).values():
                add(constant)
            add(getattr(tensor, "SCB", None))
        constants = getattr(module, "meta", None)  # HQQ's
        for constant in constants.values() if isinstance(constants, dict) else ():
            add(constant)
    return sum(storages.values())


def train(model: Any, rows: TransferSet, batch_size: int, steps: int) -> tuple[float, list[float]]:
    """Real tokens a second in the median step after the first, if there are several, and the loss of every step."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        args = QuantizedDistillationConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-4,
            alpha=1.0,
            init="zero",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        batch = rows.select(range(batch_size))  # the same rows in every step, so that the losses compare
        trainer = QuantizedDistillationTrainer(model, args, train_dataset=batch, callbacks=[times])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return int(batch.lengths.sum()) / statistics.median(times.seconds[1:] or times.seconds), losses


def load(name: str, format_: str | None, dtype: str) -> Any:
    """A student in a format by name, or a checkpoint as it is stored."""
    if format_ == "hqq":
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel

        compute = parse_dtype(dtype)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=compute)
        config = BaseQuantizeConfig(nbits=4, group_size=64)
        return AutoHQQHFModel.quantize_model(model, config, compute_dtype=compute, device=str(default_device()))
    config: Any = format_
    if format_ == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    return load_student(name, quantization_config=config, dtype=dtype)


def measure(name: str, format_: str | None, args: argparse.Namespace, rows: TransferSet) -> dict[str, Any]:
    """One format's figures, or why there are none."""
    found: dict[str, Any] = {"format": format_ or name}
    gc.collect()  # a trained model and its adapters hold each other
    try:
        started = read_clock()
        model = load(name, format_, args.dtype)
        found["load_seconds"] = round(read_clock() - started, 1)
        found["memory_mb"] = round(count_bytes(model) / 1e6, 1)
        found["kl"] = round(evaluate_fidelity(model, rows, batch_size=4, progress=False).means["kl"], 4)
        tokens, losses = train(model, rows, args.batch_size, args.steps)
        found["tokens_per_second"] = round(tokens, 1)
        found["losses"] = [round(loss, 4) for loss in losses]
    except (ImportError, QuantKDError) as error:
        found["refused"] = str(error)
    return found


def main() -> None:
    """Measure, print a table, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_sources(parser, gsm8k=False)
    parser.add_argument("--held_out", help="transfer set of that model's own answers; to word problems if not given")
    parser.add_argument("--rows", type=int, default=8, help="held-out rows to look at (8)")
    parser.add_argument("--formats", nargs="*", default=FORMATS, help="which formats (all)")
    parser.add_argument("--checkpoint", nargs="*", default=[], help="checkpoints that are quantized already")
    parser.add_argument("--batch_size", type=int, default=4, help="rows a training step (4)")
    parser.add_argument("--steps", type=int, default=4, help="training steps (4)")
    parser.add_argument("--dtype", default="float32", help="what is computed in (float32)")
    args = parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        rows = TransferSet.open(args.held_out) if args.held_out else _answer(args, folder)
        rows = rows.select(range(min(args.rows, len(rows))))
        _measure_all(args, rows)


def _answer(args: argparse.Namespace, folder: str) -> TransferSet:
    """The model's answers to as many of the built-in word problems as rows are asked for."""
    prompts = [build_prompt(row["question"]) for row in generate_problems(args.rows, seed=0)]
    return capture(args.model, prompts, folder, generation=GenerationSettings(64))


def _measure_all(args: argparse.Namespace, rows: TransferSet) -> None:
    results = []
    for name, format_ in [(args.model, f) for f in args.formats] + [(path, None) for path in args.checkpoint]:
        results.append(measure(name, format_, args, rows))
        print(json.dumps(results[-1]), flush=True)
    print(f"\n| format | loads in s | memory, MB | KL before | training, tokens/s |\n|{' --- |' * 5}")
    for found in results:
        cells = [found.get(key, "") for key in ("load_seconds", "memory_mb", "kl", "tokens_per_second")]
        print(f"| {found['format']} | {' | '.join(map(str, cells))} |")
    print()
    nf4 = next((found for found in results if found["format"] == "nf4"), None)
    for found in results if nf4 is not None else []:
        for key in ("memory_mb", "kl", "tokens_per_second"):
            if key in found and key in nf4:
                found[f"{key}_vs_nf4"] = round(found[key] / nf4[key], 3)
    print(json.dumps({"rows": len(rows), "dtype": args.dtype, "students": results}))


if __name__ == "__main__":
    main()
