"""How the fused loss's cost grows with positions and with the vocabulary: the exponents of time and memory, and a plot.

One of the two sizes varies, the other stays. An exponent is the slope of a straight line through log cost over log
size: 1 is linear, 2 quadratic, 0 no growth. Each size runs in a process of its own, once to warm up and measure memory,
then `--rounds` times; time is the fastest of these, because a neighbour can only add to it. `peak_mib` is that of
loss.py less the gradient of the hidden states. Memory grows up to one chunk, and stays there.

    python benchmarks/scaling.py --plot runs/scaling.png

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from loss import HERE, Child
from matplotlib.figure import Figure

POSITIONS = (512, 1024, 2048, 4096)
VOCABULARIES = (16_384, 32_768, 65_536, 131_072)


def measure(args: argparse.Namespace, positions: int, vocab_size: int) -> dict[str, float]:
    """Seconds and peak memory of the fused loss at one size."""
    child = Child("fused_t1", args, positions=positions, vocab_size=vocab_size)
    seconds = min(child.step() for _ in range(args.rounds))
    child.stop()
    gradient = positions * args.hidden_size * 4 / 2**20
    return {"seconds": seconds, "peak_mib": child.first["peak_mib"] - gradient}


def fit_exponent(sizes: tuple[int, ...], costs: list[float]) -> float:
    """The slope of log cost over log size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def draw(results: dict[str, Any], path: Path) -> None:
    """Time and memory over positions and vocabulary, both axes logarithmic."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (name, result) in zip(figure.subplots(1, 2), results.items(), strict=True):
        axes.loglog(result["sizes"], result["seconds"], "o-", label=f"time, exponent {result['time_exponent']:.2f}")
        axes.set(xlabel=name.replace("_", " "), ylabel="seconds")
        axes.set_xticks(result["sizes"], [f"{size:,}" for size in result["sizes"]])
        axes.minorticks_off()
        memory = axes.twinx()
        label = f"memory, exponent {result['memory_exponent']:.2f}"
        memory.loglog(result["sizes"], result["peak_mib"], "s--", color="C1", label=label)
        memory.set(ylabel="peak MiB beyond inputs and gradient", ylim=(10, 1000))
        axes.legend(handles=[*axes.lines, *memory.lines], loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Vary one size after the other, fit, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=512, help="while the vocabulary varies")
    parser.add_argument("--vocab_size", type=int, default=32_768, help="while the positions vary")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path, default=HERE.parent / "runs" / "scaling.png")
    args = parser.parse_args()
    args.peers = HERE
    results: dict[str, Any] = {}
    for name, sizes in {"positions": POSITIONS, "vocab_size": VOCABULARIES}.items():
        fixed = {"positions": args.positions, "vocab_size": args.vocab_size}
        measured = [measure(args, **{**fixed, name: size}) for size in sizes]
        result: dict[str, Any] = {"sizes": sizes}
        for cost in ("seconds", "peak_mib"):
            result[cost] = [point[cost] for point in measured]
        result["time_exponent"] = fit_exponent(sizes, result["seconds"])
        result["memory_exponent"] = fit_exponent(sizes, result["peak_mib"])
        results[name] = result
        print(f"{name:<10} {'seconds':>8} {'MiB':>6}")
        for size, point in zip(sizes, measured, strict=True):
            print(f"{size:>10} {point['seconds']:8.3f} {point['peak_mib']:6.0f}")
        print(f"exponents  {result['time_exponent']:8.2f} {result['memory_exponent']:6.2f}")
    draw(results, args.plot)
    print(f"Plot: {args.plot}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
