"""The divergence page: one HTML file with its style, script and data, which loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import itertools
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from quantkd.errors import ConfigError, printable
from quantkd.files import write_file
from quantkd.report.page import make_environment
from quantkd.view.divergence import KL_EDGES, Divergence, encode_divergence

_SCRIPTS = ("data.js", "details.js", "rows.js", "page.js")


def write_page(divergence: Divergence, path: str | Path) -> Path:
    """Write the page, one HTML file that loads nothing else; a file of that name is replaced once the new one is whole.

    Raises:
        ConfigError: the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected a file name such as {path / 'page.html'}.")
    write_file(path, render_page(divergence))
    return path


def render_page(divergence: Divergence) -> str:
    """The page's text."""
    folder = files("quantkd.view")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    script = "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)
    policy = {  # nothing is fetched, and nothing in a token could run even if it were not escaped
        "default-src": "'none'",
        "script-src": _digest(script),
        "style-src": _digest(style),
        "img-src": "data:",  # the empty icon, so that no browser asks a server for one
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    environment = make_environment("view", _escape)
    # In ASCII, so that U+2028, lone surrogates and the like stay what they are in every encoding.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": True, "allow_nan": False, "separators": (",", ":")}
    return environment.get_template("page.html.j2").render(
        divergence=divergence,
        policy="; ".join(f"{name} {source}" for name, source in policy.items()),
        style=Markup(style),
        script=Markup(script),
        data=encode_divergence(divergence),
        measures=_summarize(divergence),
        classes=_describe_classes(divergence),
    )


def _escape(value: Any) -> Any:
    return value if isinstance(value, Markup) else printable(value)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _summarize(divergence: Divergence) -> list[tuple[str, str, str, str]]:
    """The figures at the top: name, before, after, note."""
    before, after = (max(kl, 0) for kl in divergence.mean_kl)  # rounding of a stored teacher can leave a little below 0
    agree_before, agree_after = divergence.agreement
    high_before, high_after = (float(np.mean(kl >= 1)) if len(kl) else float("nan") for kl in divergence.kl)
    if before < 5e-4 and after < 5e-4:
        change = "the same as the teacher, before and after"
    else:
        change = "higher than before" if after > before else f"{100 * (1 - after / before):.0f}% lower than before"
    return [
        ("KL to the teacher", f"{before:.3f}", f"{after:.3f}", f"mean, nats per token; {change}"),
        ("Same first choice", f"{agree_before:.1%}", f"{agree_after:.1%}", "teacher and student choose the same token"),
        ("Far off", f"{high_before:.1%}", f"{high_after:.1%}", "tokens with a KL of 1 nat or more"),
    ]


def _describe_classes(divergence: Divergence) -> list[dict[str, Any]]:
    """The legend: the range of each color, and the share of tokens in it."""
    low, high = KL_EDGES[0], KL_EDGES[-1]
    names = [f"<{low:g}", *(f"{edge:g}" for edge in KL_EDGES[:-1]), f"≥{high:g}"]
    inner = [f"{start:g} to {stop:g}" for start, stop in itertools.pairwise(KL_EDGES)]
    ranges = [f"below {low:g}", *inner, f"{high:g} and more"]
    counts = [np.bincount(np.digitize(kl, KL_EDGES), minlength=len(names)) for kl in divergence.kl]
    before, after = (100 * each / max(divergence.num_tokens, 1) for each in counts)
    return [
        {"name": name, "range": span, "before": _format_percent(one), "after": _format_percent(other)}
        for name, span, one, other in zip(names, ranges, before.tolist(), after.tolist(), strict=True)
    ]


def _format_percent(percent: float) -> str:
    return f"{percent:.0f}" if percent == 0 or percent >= 9.5 else f"{percent:.1f}"
