"""The text of a report: the Markdown page, and the plain table for a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from quantkd.errors import code_span, markdown, printable
from quantkd.report.results import order_results

_PERCENT = ("accuracy_", "agreement_", "top1_agreement", "dense_top1_agreement", "gap_recovered")
_PARTS = {
    "codes": "Linear layers",
    "constants": "Block constants",
    "adapters": "Adapters",
    "rest": "Embeddings, norms, head",
    "total": "Size",
}
_TITLES = {
    "position": ("KL by position in the answer", "Token"),
    "entropy": ("KL by the teacher's entropy", "Entropy (nats)"),
}


def tabulate(results: dict[str, Any]) -> list[list[str]]:
    """The results as the cells of a table: a line a metric, a column an arm, and the gap recovered by the subject."""
    results = order_results(results)
    arms = results["arms"]
    shares = arms[results["subject"]]["gap_recovered"] if results["subject"] else {}
    rows = [["", *(arm["title"] for arm in arms.values()), "gap recovered" if shares else ""]]
    for key, title in results["metrics"].items():
        cells = [_format_figure(key, arm["metrics"].get(key)) for arm in arms.values()]
        rows.append([title, *cells, _format_share(shares[key], short=True) if shares else ""])
        if key.startswith("agreement_"):
            for way in ("right_to_wrong", "wrong_to_right"):
                found = {name: arm["flips"].get(key, {}).get(way) for name, arm in arms.items()}
                cells = ["" if name == "teacher" else _format_figure(key, each) for name, each in found.items()]
                rows.append([f"Flips{title.removeprefix('Answer agreement')}, {way.replace('_', ' ')}", *cells, ""])
    bits = [arm["bits_per_weight"] for arm in arms.values()]
    rows.append(["Bits per weight", *("none" if each is None else f"{each:.2f}" for each in bits), ""])
    for part, title in _PARTS.items():
        rows.append([title, *(_format_bytes(arm, part, arms.get("teacher")) for arm in arms.values()), ""])
    return rows


def list_told_apart(results: dict[str, Any]) -> dict[str, bool]:
    """Whether a paired test tells two arms apart, by accuracy and agreement; strict accuracies are left out."""
    level, arms = 1 - results["confidence"], results["arms"].values()
    return {
        key: any(test["p_value"] < level for arm in arms for test in arm["mcnemar"][key].values())
        for key in results["metrics"]
        if key.startswith(("accuracy_", "agreement_")) and not key.endswith("_strict")
    }


def list_notes(results: dict[str, Any]) -> list[str]:
    """Notes below the table: what brackets are, what could not be measured and why, what is missing."""
    results = order_results(results)
    reasons = [f"{results['metrics'][key]}: not measurable: {why}." for key, why in results["not_measurable"].items()]
    return [f"Brackets: {results['confidence']:.0%} intervals.", *reasons, *results["missing"]]


def describe_held_out(results: dict[str, Any]) -> str:
    """The rows that fidelity was measured on."""
    rows, tokens = max((arm["num_rows"], arm["num_tokens"]) for arm in results["arms"].values())
    return f"{rows:,} held-out rows, {tokens:,} target tokens, of set {str(results['transfer_set_digest'])[:12]}"


def format_table(results: dict[str, Any], width: int | None = None) -> str:
    """The results as a plain-text table with notes below it; arms beyond the width, in characters, follow below."""
    rows = [[printable(cell) for cell in row] for row in tabulate(results)]
    first, *arms = ([cell.ljust(max(map(len, column))) for cell in column] for column in zip(*rows, strict=True))
    tables = [[first]]
    for column in arms:
        longest = sum(len(each[0]) + 2 for each in tables[-1]) + len(column[0])
        if width is not None and len(tables[-1]) > 1 and longest > width:
            tables.append([first])
        tables[-1].append(column)
    blocks = []
    for columns in tables:
        lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
        lines.insert(1, "  ".join("-" * len(column[0]) for column in columns).rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, "\n".join(map(printable, list_notes(results)))])


@cache
def make_environment(package: str, finalize: Callable[[Any], Any] | None = None) -> Environment:
    """The templates of a package of quantkd; every value but `Markup` goes in as text, by default that of Markdown."""
    environment = Environment(
        loader=PackageLoader("quantkd", package),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=True,  # which leaves `Markup` alone
        finalize=finalize or _escape,
    )
    environment.filters.update(text=_to_code_span, table=_to_table)
    return environment


def _escape(value: Any) -> Markup:
    return value if isinstance(value, Markup) else Markup(markdown(value))


def _to_code_span(value: Any) -> Markup:
    return Markup(code_span(value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)))


def _to_table(rows: Sequence[Sequence[Any]]) -> Markup:
    """A table, whose first row is its head."""
    head, *lines = (f"| {' | '.join(map(_escape, cells))} |" for cells in rows)
    return Markup("\n".join([head, "|" + "---|" * len(rows[0]), *lines]))


def render_page(
    results: dict[str, Any], figure_name: str | None, breakdown_name: str | None = None, bits_name: str | None = None
) -> str:
    """The Markdown page of a report."""
    environment = make_environment("report")
    environment.filters["share"] = _format_share
    arms = results["arms"]
    every = [cells[:-1] for cells in tabulate(results)]
    every[-1][0] += " (of the teacher's)" * ("teacher" in arms)
    every.append(["Model", *(arm["model"] for arm in arms.values())])
    students = [(arm["title"], arm["gap_recovered"]) for name, arm in arms.items() if name not in ("teacher", "before")]
    return environment.get_template("report.md.j2").render(
        results,
        figure_name=figure_name,
        breakdown_name=breakdown_name,
        bits_name=bits_name,
        start=_describe_start(arms),
        agreement=any(key.startswith("agreement_") for key in results["metrics"]),
        not_drawn=[results["metrics"][key] for key, told in list_told_apart(results).items() if not told],
        every=every,
        shares=_tabulate_metrics(results, students, lambda _, share: _format_share(share)),
        breakdowns=[_tabulate_bins(arms, found) for kind in _TITLES if (found := tabulate_breakdown(results, kind))],
        differences=_tabulate_differences(results),
        tests=_tabulate_tests(results),
    )


def _describe_start(arms: dict[str, Any]) -> dict[str, str] | None:
    """What the start alone recovered of the KL, and what training added to it."""
    found = arms["start"]["differences"].get("after", {}).get("kl") if "start" in arms else None
    if found is None:
        return None
    share = _format_share(arms["start"]["gap_recovered"]["kl"])
    return {"share": share, "difference": _format_figure("kl", found, sign="+"), "title": arms["start"]["title"]}


def _tabulate_metrics(results: dict[str, Any], columns: Sequence[tuple[str, Any]], form: Any) -> list[list[str]]:
    """A line a metric; a column a pair of its title and the figures by metric, which `form` writes."""
    lines = [[title, *(form(key, found.get(key)) for _, found in columns)] for key, title in results["metrics"].items()]
    return [["", *(title for title, _ in columns)], *lines]


def tabulate_breakdown(results: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """KL by one kind of bin, arm beside arm: over the whole vocabulary if every arm has that, else over the entries."""
    students = {name: arm for name, arm in results["arms"].items() if name != "teacher"}
    dense = all(f"dense_kl_by_{kind}" in arm for arm in students.values())
    key = f"dense_kl_by_{kind}" if dense else f"kl_by_{kind}"
    arms = {name: arm[key] for name, arm in students.items() if key in arm}
    if not arms:
        return None
    title, label = _TITLES[kind]
    first = next(iter(arms.values()))
    # By entropy an arm can have a token in another bin: each computes the teacher anew.
    held = [place for place, bins in enumerate(zip(*arms.values(), strict=True)) if any(one["tokens"] for one in bins)]
    return {
        "title": title + (", whole vocabulary" if dense else ""),
        "label": label,
        "names": [_name_bin(first[place], whole=kind == "position") for place in held],
        "tokens": [first[place]["tokens"] for place in held],
        "arms": {name: [bins[place] for place in held] for name, bins in arms.items()},
    }


def _name_bin(found: Mapping[str, Any], *, whole: bool) -> str:
    """A bin as a range, such as "9 to 16" of tokens counted from 1, or "0.1 to 0.3" of nats."""
    start, stop = found["from"], found["to"]
    if whole:
        return f"{int(start) + 1} and on" if stop is None else f"{int(start) + 1} to {int(stop)}"
    return f"{start:g} and above" if stop is None else f"{start:g} to {stop:g}"


def _tabulate_bins(arms: dict[str, Any], table: dict[str, Any]) -> list[list[Any]]:
    head = [f"{table['title']}: {table['label'].lower()}", "Tokens", *(arms[name]["title"] for name in table["arms"])]
    columns = [
        [_format_figure("kl", one) if one["tokens"] else "no token" for one in bins] for bins in table["arms"].values()
    ]
    return [head, *map(list, zip(table["names"], table["tokens"], *columns, strict=True))]


def _tabulate_differences(results: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """The subject less each other arm, and each further arm less "after": what an export cost."""
    arms, after = results["arms"], results["arms"].get("after")
    shown = arms.get(results["subject"] or "before")
    sections = []
    if shown and shown["differences"]:
        columns = [(f"less {arms[other]['title']}", found) for other, found in shown["differences"].items()]
        sections.append((f'"{shown["title"]}" less another arm:', columns))
    further = [(arm["title"], arm["differences"]["after"]) for arm in arms.values() if "after" in arm["differences"]]
    if further:
        what = "of the start, this is what training gave, and of an exported form, this is what the change of form cost"
        sections.append((f'Another arm less "{after["title"]}"; {what}:', further))
    form = partial(_format_figure, sign="+")
    return [(caption, _tabulate_metrics(results, columns, form)) for caption, columns in sections]


def _tabulate_tests(results: dict[str, Any]) -> list[list[Any]]:
    """Every paired test once: the teacher's is that of "before" the other way round."""
    rows = [["Metric", "Arm", "Against", "Only the arm", "Only the other", "p", "Questions needed"]]
    for key, title in results["metrics"].items():
        for name, arm in results["arms"].items():
            for other, test in arm["mcnemar"].get(key, {}).items() if name != "teacher" else ():
                p = Markup("< 0.0001") if test["p_value"] < 0.0001 else f"{test['p_value']:.4f}"
                needed = f"{test['questions_needed']:,}" if test["questions_needed"] else "no difference"
                titles = (title, arm["title"], results["arms"][other]["title"])
                rows.append([*titles, test["only_this"], test["only_other"], p, needed])
    return rows


def _format_figure(key: str, found: dict[str, Any] | None, sign: str = "") -> str:
    if found is None:
        return "not evaluated"
    scale, digits, unit = (100, 1, " points" if sign else "%") if key.startswith(_PERCENT) else (1, 4, "")
    value, *bounds = (f"{scale * number:{sign}.{digits}f}" for number in (found["value"], *(found["interval"] or ())))
    return value + unit + (f" [{', '.join(bounds)}]" if bounds else "")


def _format_share(share: dict[str, Any], short: bool = False) -> str:
    if share["value"] is None:
        return "not measurable" if short else f"not measurable: {share['reason']}"
    return _format_figure("gap_recovered", share)


def _format_bytes(arm: dict[str, Any], part: str, teacher: dict[str, Any] | None) -> str:
    text = f"{arm['bytes'][part] / 1e6:,.1f} MB"
    if part != "total" or teacher is None or not teacher["bytes"]["total"]:
        return text
    return f"{text} ({arm['bytes']['total'] / teacher['bytes']['total']:.0%})"
