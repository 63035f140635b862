"""The pages that stand in front of what is pushed: each from named facts alone, never from all that a folder holds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from quantkd.errors import ConfigError
from quantkd.hub.secrets import public_name
from quantkd.transfer_set.index import Index
from quantkd.transfer_set.info import TransferSetInfo

__all__ = ["check_licence", "render_adapter_card", "render_set_card"]

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_TAGS = ["quantkd", "distillation"]
# What a student is loaded in by default, for an adapter whose maker did not say.
_NF4 = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}


def check_licence(licence: str | None) -> None:
    """Refuse a licence that the Hub would not take for one.

    Args:
        licence: such as "apache-2.0"; None if there is none to state.

    Raises:
        ConfigError: not one of the Hub's short names by its form.
    """
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise ConfigError(
            f"licence is {licence!r}; expected a short name of the Hub's list in lower case, such as apache-2.0, mit, "
            "llama3.1 or other."
        )


def render_set_card(info: TransferSetInfo, index: Index, *, repo_id: str, licence: str | None) -> str:
    """The page of a transfer set. The same set gives the same page.

    Args:
        info: of the set.
        index: of the set.
        repo_id: where it is pushed to.
        licence: of its rows.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    metadata: dict[str, Any] = {"license": licence} if licence else {}
    metadata |= {"tags": [*_TAGS, "transfer-set"], "viewer": False}
    return _environment().get_template("set_card.md.j2").render(
        metadata=_to_yaml(metadata),
        repo_id=repo_id,
        info=info,
        num_shards=len(index.shards),
        storage=_to_text(info.storage),
        generation=_to_text(info.generation),
        counters=", ".join(f"{_escape_cell(name)} {count:,}" for name, count in sorted(info.counters.items())),
        licence=licence,
    )  # fmt: skip


def render_adapter_card(
    *,
    repo_id: str,
    base: str,
    adapter: Mapping[str, Any],
    facts: Mapping[str, Any],
    licence: str | None,
    results: Mapping[str, Any] | None,
    table: str | None,
    has_chart: bool,
) -> str:
    """The page of an adapter.

    Args:
        repo_id: where it is pushed to.
        base: the base model's name.
        adapter: the fields of its adapter_config.json.
        facts: what quantkd.json says of its training.
        licence: of the adapter.
        results: of the run's report, if there is one.
        table: the report's table as text.
        has_chart: whether gap.png is pushed, too.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    facts = {**dict.fromkeys(("quantkd_version", "teacher", "transfer_set", "transfer_set_digest")), **facts}
    metadata: dict[str, Any] = {"license": licence} if licence else {}
    metadata |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": [*_TAGS, "4-bit", "lora"]}
    if _HUB_NAME.fullmatch(base):
        metadata["base_model"] = base
    source = re.match(r"([\w.-]+/[\w.-]+) at ", str(facts.get("transfer_set") or ""), re.ASCII)
    if source:
        metadata["datasets"] = [source[1]]
    if results is not None:
        metadata["model-index"] = _model_index(repo_id, results)
    recorded = facts.get("quantization")
    defaults = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "float32"}
    quantization = {"load_in_4bit": False, "load_in_8bit": False, **defaults, **(recorded or _NF4)}
    shown = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "bias")
    described = {name: adapter[name] for name in shown if adapter.get(name) not in (None, False)}
    if isinstance(described.get("target_modules"), list):
        described["target_modules"] = sorted(described["target_modules"])
    settings = {**(facts.get("objective") or {}), **(facts.get("training") or {})}
    return _environment().get_template("adapter_card.md.j2").render(
        metadata=_to_yaml(metadata),
        repo_id=repo_id,
        base=base,
        adapter={"kind": adapter.get("peft_type") or "PEFT", "text": _to_text(described)},
        facts=facts,
        quantization=quantization,
        quantization_text=_to_text(recorded or "not recorded"),
        settings=settings,
        table=table,
        has_chart=has_chart,
        licence=licence,
    )  # fmt: skip


def _model_index(repo_id: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metrics of the distilled arm in the form that the Hub reads."""
    measured = results["arms"]["after"]["metrics"]
    metrics: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for key in results["metric_order"]:
        if key in measured:
            kind = "accuracy" if key.startswith("accuracy_") else key
            entry = {"type": kind, "name": results["metrics"][key], "value": measured[key]["value"]}
            metrics[kind == "accuracy"].append(entry)
    digest = str(results.get("transfer_set_digest") or "")[:12]
    names = {True: "questions of the evaluation", False: f"held-out rows of transfer set {digest}".strip()}
    return [
        {
            "name": repo_id.split("/")[-1],
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"type": "quantkd", "name": names[is_accuracy]},
                    "metrics": found,
                }
                for is_accuracy, found in metrics.items()
                if found
            ],
        }
    ]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("quantkd", "hub"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the page is Markdown, not HTML; `cell` escapes what would break a table or add HTML
    )
    environment.filters.update(cell=_escape_cell, public_name=public_name)
    return environment


def _escape_cell(text: Any) -> str:
    escaped = " ".join(str(text).split())
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'"), ("[", "\\[")):
        escaped = escaped.replace(character, entity)
    return escaped


def _to_text(value: Any) -> str:
    """JSON on one line, without what would end a code span or a table's cell."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text.replace("`", "'").replace("|", "¦").replace("\n", " ")


def _to_yaml(metadata: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=120)
    return text.strip()
