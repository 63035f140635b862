"""Plain text for a terminal, from what the library returns."""

from __future__ import annotations

import itertools

from quantkd.report.histograms import Histograms
from quantkd.transfer_set import TransferSetInfo


def format_bytes(count: float) -> str:
    """A byte count in the largest unit that keeps it above 1, such as `1.4 MB` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_histograms(histograms: Histograms) -> str:
    """Entries and entropy per response token as bars of text."""
    edges = [1, 2, 3, 5, 9, 17, 33, len(histograms.entries)]
    entries = [
        (f"{low}" if high == low + 1 else f"{low}-{high - 1}", int(histograms.entries[low:high].sum()))
        for low, high in itertools.pairwise(edges)
        if low < high
    ]
    step = 4  # bins of a quarter nat, joined
    entropy = [
        (f"{histograms.entropy_edges[low]:.0f}-{histograms.entropy_edges[low] + 1:.0f} nats", int(part.sum()))
        for low in range(0, len(histograms.entropy), step)
        if (part := histograms.entropy[low : low + step]).sum()
    ]
    lines = ["  entries per token", *_bars(entries)]
    lines += ["  the teacher's entropy, the tail counted as one token", *_bars(entropy)]
    return "\n".join(lines)


def _bars(counts: list[tuple[str, int]]) -> list[str]:
    total = max(sum(count for _, count in counts), 1)
    return [f"    {name:<10} {100 * count / total:5.1f} %  {'#' * round(40 * count / total)}" for name, count in counts]


def format_info(info: TransferSetInfo) -> str:
    """What a transfer set holds, a line each."""
    storage = ", ".join(f"{key}={value}" for key, value in info.storage.items() if key != "kind")
    revision = f" @ {info.teacher_revision[:12]}" if info.teacher_revision else ""
    reasons = {name.removeprefix("filtered_"): n for name, n in info.counters.items() if name.startswith("filtered_")}
    cut, rescaled = info.counters.get("responses_cut", 0), info.counters.get("targets_rescaled", 0)
    lines = {
        "teacher": f"{info.teacher_name}{revision} ({', '.join(filter(None, (info.teacher_dtype, info.engine)))})",
        "rows": f"{info.num_rows} of {info.num_prompts} prompts"
        + (f", {cut} cut by the length limit" if cut else "")
        + "".join(f", {n} {name} left out" for name, n in reasons.items() if n),
        "tokens": f"{info.num_tokens}, of which {info.num_response_tokens} in responses",
        "storage": f"{info.storage['kind']}({storage})",
        "entries": f"{info.mean_entries:.2f} per response token"
        + (f", {rescaled} targets scaled back to a mass of 1" if rescaled else ""),
        "size": f"{format_bytes(info.num_bytes)}, {info.bytes_per_response_token:.1f} bytes per response token",
        "temperatures": ", ".join(map(str, info.temperatures)),
        "responses": f"{info.responses}({', '.join(f'{key}={value}' for key, value in info.generation.items())})",
        "digest": info.digest + ("" if info.complete else " (unfinished)"),
    }
    return "\n".join(f"  {name:<13} {value}" for name, value in lines.items())
