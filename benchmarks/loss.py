"""What the distillation loss costs, forward and backward, from hidden states and a frozen head: time and peak memory.

Every contender runs in a process of its own on the same made-up inputs. All processes stay alive and take one step each
in turn, after a warm-up, so that a machine that slows down slows all of them; `seconds` is the median over the rounds.
On CUDA, where each keeps gigabytes, one process follows the other.

`peak_mib` is what one full step adds to the process's resident memory: the highest resident size of the first full
step less the resident size before it, when the inputs are in memory and a step of 8 positions has loaded what loads
lazily. It holds everything that the step touches: logits, gradients (also that of the hidden states), buffers of the
BLAS library.
On CUDA it is the allocator's peak less what the inputs take.

The two matrix products that nobody can avoid (hidden states times head, gradient times head) are a contender. Stored
teachers (about 10 entries a position): plain cross-entropy alone, this project's fused loss and its reference over
logits, Axolotl's chunked top-k kernel. Live teachers (hidden states and a head of the same size, so one product more):
this project's fused loss, Liger's and TRL's chunked divergences, TRL's divergence over logits.

    python benchmarks/loss.py --install-peers      # once: Axolotl and Liger into build/peers, without dependencies
    python benchmarks/loss.py

Axolotl's kernel renormalises the entries and drops the tail; it and Liger's compute the head's gradient although the
head is frozen. Neither is compiled on a CPU. A peer that is not installed is skipped with a message. With CUDA a second
table follows, in bfloat16; with --device there is the table of that device alone. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from _contenders import LIVE, PEERS, PLAIN, Inputs, make_inputs

HERE = Path(__file__).resolve().parent
GPU_GOAL = 1.35


ON_GPU = ("matmuls", "plain_ce", "fused_t1", "fused_t2", "fused_dense", "liger", "trl_chunked")


def take_turns(args: argparse.Namespace) -> None:
    """The child: build the inputs, report memory of the first step, then one timed step for every line it reads."""
    torch.set_num_threads(args.threads)
    sys.path.append(str(args.peers))
    on_gpu = args.device == "cuda"
    shape = (args.positions, args.hidden_size, args.vocab_size)
    inputs = make_inputs(*shape, args.device, args.dtype, args.contender in LIVE)
    try:
        step = PLAIN[args.contender] if args.contender in PLAIN else PEERS[args.contender](inputs)
    except ImportError as error:
        print(json.dumps({"skipped": f"{error}"}), flush=True)
        return

    def run(inputs: Inputs) -> tuple[float, float]:
        inputs.hidden.grad = None
        began = time.perf_counter()
        loss = step(inputs).item()  # waits for the loss; the backward pass is waited for below
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began, loss

    run(inputs.first(8))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    _, loss = run(inputs)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"peak_mib": (peak - before) / 2**20, "loss": loss}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": run(inputs)[0]}), flush=True)


class Child:
    """A contender in a process of its own."""

    def __init__(self, name: str, args: argparse.Namespace, device: str = "cpu", **shape: Any) -> None:
        given = {"positions": args.positions, "hidden_size": args.hidden_size, "vocab_size": args.vocab_size}
        options = {**given, "dtype": "float32", **shape, "device": device, "threads": args.threads, "peers": args.peers}
        flags = [f"--{key}={value}" for key, value in options.items()]
        command = [sys.executable, __file__, f"--contender={name}", *flags]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.name, self.first = name, self.read()

    def read(self) -> dict[str, Any]:
        """The next line that the child means for us."""
        assert self.process.stdout is not None and self.process.stderr is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        return {"skipped": self.process.stderr.read().strip().splitlines()[-1]}

    def step(self) -> float:
        """Seconds of one more step."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return float(self.read()["seconds"])

    def stop(self) -> None:
        """End the process."""
        self.process.communicate()


def compare(names: list[str], args: argparse.Namespace, device: str = "cpu", **shape: Any) -> dict[str, dict[str, Any]]:
    """Let all contenders take their turns, print the table, return what they measured."""
    results: dict[str, dict[str, Any]] = {}
    for group in [[name] for name in names] if device == "cuda" else [names]:
        children = []
        for name in group:
            child = Child(name, args, device, **shape)
            if "skipped" in child.first:
                print(f"{name} skipped: {child.first['skipped']}")
                child.stop()
            else:
                children.append(child)
        seconds: dict[str, list[float]] = {child.name: [] for child in children}
        for _ in range(args.rounds):
            for child in children:
                seconds[child.name].append(child.step())
        for child in children:
            child.stop()
            results[child.name] = {**child.first, "seconds": statistics.median(seconds[child.name])}
            print(f"{child.name}: {results[child.name]['seconds']:.4f} s", flush=True)
    ce, products = results["plain_ce"], results["matmuls"]
    print(f"{'contender':<12} {'seconds':>8} {'x matmuls':>9} {'x CE':>6} {'peak MiB':>9} {'x CE':>6}")
    for name, result in results.items():
        result["time_vs_matmuls"] = result["seconds"] / products["seconds"]
        result["time_vs_ce"] = result["seconds"] / ce["seconds"]
        result["memory_vs_ce"] = result["peak_mib"] / ce["peak_mib"]
        cells = f"{result['seconds']:8.3f} {result['time_vs_matmuls']:9.2f} {result['time_vs_ce']:6.2f}"
        print(f"{name:<12} {cells} {result['peak_mib']:9.0f} {result['memory_vs_ce']:6.2f}")
    return results


def measure_growth(args: argparse.Namespace) -> dict[str, float]:
    """Peak of the fused loss at 8 times the positions, less the gradient of the hidden states."""
    beyond = {}
    for positions in (args.positions, 8 * args.positions):
        child = Child("fused_t1", args, positions=positions)
        child.stop()
        beyond[str(positions)] = child.first["peak_mib"] - positions * args.hidden_size * 4 / 2**20
    print("fused_t1, peak MiB beyond inputs and gradient:", {key: round(value) for key, value in beyond.items()})
    return beyond


def main() -> None:
    """Parse, install the peers if asked to, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=HERE.parent / "build" / "peers", help="folder of the peers")
    parser.add_argument("--install-peers", action="store_true", help="install them there, and end")
    parser.add_argument("--contender", choices=[*PLAIN, *PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="this device alone, with the given sizes and dtype")
    parser.add_argument("--dtype", default="float32", help="with --device")
    args = parser.parse_args()
    if args.install_peers:
        requirements = str(HERE / "requirements-loss.txt")
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", str(args.peers)]
        sys.exit(subprocess.run([*pip, "-r", requirements], check=False).returncode)
    if args.contender:
        take_turns(args)
        return
    if args.device:
        print(json.dumps(compare(list(ON_GPU), args, args.device, dtype=args.dtype)))
        return
    print(f"N={args.positions} H={args.hidden_size} V={args.vocab_size} float32, {args.threads} threads, frozen head")
    results = compare([*PLAIN, *PEERS], args)
    report: dict[str, Any] = {**results, "beyond_inputs_and_gradient_mib": measure_growth(args)}
    if axolotl := results.get("axolotl"):
        report["speedup_vs_axolotl"] = axolotl["seconds"] / results["fused_t1"]["seconds"]
        report["memory_vs_axolotl"] = results["fused_t1"]["peak_mib"] / axolotl["peak_mib"]
    if torch.cuda.is_available():
        print(
            f"N=8192 H=4096 V=128256 bfloat16 on {torch.cuda.get_device_name()}; goal: fused_t1 <= {GPU_GOAL} matmuls"
        )
        shape = {"positions": 8192, "hidden_size": 4096, "vocab_size": 128_256, "dtype": "bfloat16"}
        report["cuda"] = compare(list(ON_GPU), args, "cuda", **shape)
    else:
        print(f"CUDA skipped: none here, so the goal of {GPU_GOAL} times the two products in bfloat16 is unmeasured.")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
