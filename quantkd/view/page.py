"""The divergence page: one HTML file with style, script and data inside, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from quantkd.errors import ConfigError
from quantkd.view.divergence import Divergence
from quantkd.view.encode import KL_EDGES, count_classes, encode_divergence, escape_script_json

_SCRIPTS = ("data.js", "details.js", "rows.js", "page.js")


def write_page(divergence: Divergence, path: str | Path) -> Path:
    """Write the page; a file of that name is replaced once the new one is whole."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected a file name such as {path / 'page.html'}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(render_page(divergence), encoding="utf-8", newline="\n")
    temporary.replace(path)
    return path


def render_page(divergence: Divergence) -> str:
    """The page's text.

    Its policy names the digests of the one script and the one style, and forbids all else: nothing is fetched, and
    nothing that a token holds could run even if it were not escaped.
    """
    folder = files("quantkd.view")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    script = "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)
    policy = {
        "default-src": "'none'",
        "script-src": _digest(script),
        "style-src": _digest(style),
        "img-src": "data:",  # the empty icon, so that no browser asks a server for one
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    environment = Environment(
        loader=PackageLoader("quantkd", "view"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=True,
    )
    return environment.get_template("page.html.j2").render(
        divergence=divergence,
        policy="; ".join(f"{name} {source}" for name, source in policy.items()),
        style=Markup(style),
        script=Markup(script),
        data=Markup(escape_script_json(encode_divergence(divergence))),
        measures=_summarize(divergence),
        classes=_describe_classes(divergence),
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _summarize(divergence: Divergence) -> list[dict[str, str]]:
    """The figures at the top."""
    (kl_before, kl_after), (agree_before, agree_after) = divergence.mean_kl, divergence.agreement
    high = [
        float(np.mean(np.concatenate([np.zeros(0), *parts]) >= 1)) if divergence.num_tokens else float("nan")
        for parts in ([row.kl_before for row in divergence.rows], [row.kl_after for row in divergence.rows])
    ]
    return [
        {
            "name": "KL to the teacher",
            "before": f"{max(kl_before, 0):.3f}",  # rounding of a stored teacher can leave a little less than 0
            "after": f"{max(kl_after, 0):.3f}",
            "note": f"mean, nats a token; {_describe_change(kl_before, kl_after)}",
        },
        {
            "name": "Same first choice",
            "before": f"{100 * agree_before:.1f}%",
            "after": f"{100 * agree_after:.1f}%",
            "note": "how often both would choose the same token",
        },
        {
            "name": "Far off",
            "before": f"{100 * high[0]:.1f}%",
            "after": f"{100 * high[1]:.1f}%",
            "note": "how often the KL is 1 nat or more",
        },
    ]


def _describe_change(before: float, after: float) -> str:
    """What became of the distance to the teacher."""
    if before < 5e-4 and after < 5e-4:
        return "both as the teacher"
    if after > before:
        return "farther than before"
    return f"{100 * (1 - max(after, 0) / before):.0f}% of it closed"


def _describe_classes(divergence: Divergence) -> list[dict[str, Any]]:
    """The legend: each colour's range, and the share of tokens in it."""
    total = max(divergence.num_tokens, 1)
    before, after = (
        sum((count_classes(kl) for kl in column), np.zeros(len(KL_EDGES) + 1))
        for column in ([row.kl_before for row in divergence.rows], [row.kl_after for row in divergence.rows])
    )
    names = [f"<{KL_EDGES[0]:g}", *(f"{low:g}" for low in KL_EDGES)]
    ranges = [f"below {KL_EDGES[0]:g}"]
    ranges += [f"{low:g} to {high:g}" for low, high in itertools.pairwise(KL_EDGES)]
    ranges += [f"{KL_EDGES[-1]:g} and more"]
    names[-1] = f"≥{KL_EDGES[-1]:g}"
    return [
        {"name": name, "range": span, "before": 100 * one / total, "after": 100 * other / total}
        for name, span, one, other in zip(names, ranges, before.tolist(), after.tolist(), strict=True)
    ]
