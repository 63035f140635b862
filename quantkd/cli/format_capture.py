"""A capture's plan and its summary as plain text for a terminal."""

from __future__ import annotations

from quantkd.cli.format import format_bytes
from quantkd.teacher.plan import CaptureEstimate
from quantkd.teacher.progress import CaptureSummary


def format_estimate(estimate: CaptureEstimate) -> str:
    """What a capture will do and cost, a line each."""
    plan, most = estimate.plan, "" if estimate.is_exact else "at most "
    samples = plan.generation.get("num_samples", 1)
    processes = f", shared by {estimate.num_processes} processes" if estimate.num_processes > 1 else ""
    lines = {
        "rows": f"{plan.num_prompts}" + (f", {samples} a prompt" if samples > 1 else ""),
        "shards": f"{plan.num_shards} of up to {plan.rows_per_shard} rows, batches of {plan.batch_size}{processes}",
        "tokens": f"{estimate.prompt_tokens} in prompts, {most}{estimate.response_tokens} in responses",
        "time": most + format_seconds(estimate.seconds)
        if estimate.seconds is not None
        else "known after the first batch",
        "size": f"{most}{format_bytes(estimate.num_bytes)}, {format_bytes(estimate.free_bytes)} free",
    }
    text = "\n".join(f"  {name:<13} {value}" for name, value in lines.items())
    if estimate.num_bytes > estimate.free_bytes:
        text += "\n  The disk may fill up. A capture that stops so goes on by the same command once there is room."
    return f"plan\n{text}"


def format_summary(summary: CaptureSummary) -> str:
    """What a capture did beyond what the set says: what was filtered, and how fast it went."""
    lines = {}
    counters = summary.info.counters
    reasons = {name.removeprefix("filtered_"): n for name, n in counters.items() if name.startswith("filtered_") and n}
    if reasons:
        lines["filtered"] = f"{sum(reasons.values())}: " + ", ".join(f"{n} {name}" for name, n in reasons.items())
    if summary.tokens:
        lines["speed"] = (
            f"{summary.tokens_per_second:.0f} response tokens/s in this process, {format_seconds(summary.seconds)}"
        )
    return "\n".join(f"  {name:<13} {value}" for name, value in lines.items())


def format_seconds(seconds: float) -> str:
    """A time in words, such as `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
