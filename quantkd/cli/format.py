"""Plain text for a terminal, from what the library returns."""

from __future__ import annotations

from quantkd.transfer_set import TransferSetInfo

__all__ = ["format_bytes", "format_info"]


def format_bytes(count: float) -> str:
    """A byte count in the largest unit that keeps it above 1, such as `1.4 MB` (powers of 1000).

    Args:
        count: bytes.
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_info(info: TransferSetInfo) -> str:
    """What a transfer set holds, a line each.

    Args:
        info: from `TransferSet.info`.
    """
    storage = ", ".join(f"{key}={value}" for key, value in info.storage.items() if key != "kind")
    revision = f" @ {info.teacher_revision[:12]}" if info.teacher_revision else ""
    cut = info.counters.get("responses_cut", 0)
    lines = {
        "teacher": f"{info.teacher_name}{revision} ({info.teacher_dtype})",
        "rows": f"{info.num_rows} of {info.num_prompts} prompts" + (f", {cut} cut by the length limit" if cut else ""),
        "tokens": f"{info.num_tokens}, of which {info.num_response_tokens} in responses",
        "storage": f"{info.storage['kind']}({storage}), profile {info.profile}",
        "entries": f"{info.mean_entries:.2f} a response token",
        "size": f"{format_bytes(info.num_bytes)}, {info.bytes_per_response_token:.1f} bytes a response token",
        "temperatures": ", ".join(map(str, info.temperatures)),
        "responses": f"{info.responses} {info.generation}",
        "digest": info.digest + ("" if info.complete else " (unfinished)"),
    }
    return "\n".join(f"  {name:<13} {value}" for name, value in lines.items())
