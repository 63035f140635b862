"""Plain text for a terminal, from what the library returns."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from quantkd.errors import printable

if TYPE_CHECKING:
    from quantkd.transfer_set import TransferSetInfo


def say(text: Any = "", *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print for people: whatever a model, a set or a server wrote, no escape sequence reaches the terminal."""
    print(printable(text, lines=True), file=file, flush=flush)


def say_results(run_dir: Path) -> None:
    """Print the table of a report, as wide as the terminal; in a file with all arms side by side."""
    from quantkd.report import format_table

    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    say(format_table(results, shutil.get_terminal_size((sys.maxsize, 0)).columns))


def format_bytes(count: float) -> str:
    """A byte count in the largest unit that keeps it above 1, such as `1.4 MB` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_lines(lines: Mapping[str, str]) -> str:
    """Names and values below each other."""
    return "\n".join(f"  {name:<13} {printable(value)}" for name, value in lines.items())


def format_info(info: TransferSetInfo) -> str:
    """What a transfer set holds, a line each."""
    counters = {"cut by the length limit": info.counters.get("responses_cut", 0)}
    filters = [name.removeprefix("filtered_") for name in info.counters if name.startswith("filtered_")]
    counters |= {f"{name} left out": info.counters[f"filtered_{name}"] for name in filters}
    kept = [f"{info.num_rows} of {info.num_prompts} prompts", *(f"{n} {what}" for what, n in counters.items() if n)]
    revision = f" @ {info.teacher_revision[:12]}" if info.teacher_revision else ""
    rescaled = info.counters.get("targets_rescaled", 0)
    lines = {
        "teacher": f"{info.teacher_name}{revision} ({', '.join(filter(None, (info.teacher_dtype, info.engine)))})",
        "rows": ", ".join(kept),
        "tokens": f"{info.num_tokens}, of which {info.num_response_tokens} in responses",
        "storage": f"{info.storage['kind']}({_join(info.storage)})",
        "entries": f"{info.mean_entries:.2f} per response token"
        + (f", {rescaled} targets scaled back to a mass of 1" if rescaled else ""),
        "size": f"{format_bytes(info.num_bytes)}, {info.bytes_per_response_token:.1f} bytes per response token",
        "temperatures": ", ".join(map(str, info.temperatures)),
        "responses": f"{info.responses}({_join(info.generation)})",
        "digest": info.digest + ("" if info.complete else " (unfinished)"),
    }
    return format_lines(lines)


def _join(options: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items() if key != "kind")
