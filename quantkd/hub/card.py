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

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_TAGS = ["quantkd", "distillation"]
# What a student is loaded in by default, for an adapter whose maker did not say.
_NF4 = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}


def check_licence(licence: str | None) -> None:
    """Refuse a licence that the Hub would not take for one."""
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise ConfigError(
            f"licence is {licence!r}; expected a short name of the Hub's list in lower case, such as apache-2.0, mit, "
            "llama3.1 or other."
        )


def is_hub_name(name: str) -> bool:
    """Whether a model's name has the form that others can load it by."""
    return _HUB_NAME.fullmatch(name) is not None


def render_set_card(info: TransferSetInfo, index: Index, *, repo_id: str, licence: str | None) -> str:
    """The page of a transfer set. The same set gives the same page."""
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
    has_chart: bool,
    has_tokenizer: bool,
    has_chat_template: bool,
) -> str:
    """The page of an adapter."""
    facts = {**dict.fromkeys(("quantkd_version", "teacher", "transfer_set", "transfer_set_digest")), **facts}
    recorded = facts.get("quantization")
    bits = _bits(recorded or _NF4)
    metadata: dict[str, Any] = {"license": licence} if licence else {}
    metadata |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    metadata["tags"] = [*_TAGS, *([bits] if bits else []), "lora"]
    if is_hub_name(base):
        metadata["base_model"] = base
    source = re.match(r"([\w.-]+/[\w.-]+) at ", str(facts.get("transfer_set") or ""), re.ASCII)
    if source:
        metadata["datasets"] = [source[1]]
    table, notes = [], []
    if results is not None:
        from quantkd.report.page import list_notes, tabulate  # its package imports scipy

        table, notes = tabulate(dict(results)), list_notes(dict(results))
        notes += [
            f"{arm['title']}: fidelity over {arm['num_rows']:,} held-out rows with {arm['num_tokens']:,} target tokens."
            for name, arm in results["arms"].items()
            if name == results.get("subject", "after") and arm["num_rows"]
        ]
        metadata |= _model_index(repo_id, results)
    defaults = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "float32"}
    quantization = {"load_in_4bit": False, "load_in_8bit": False, **defaults, **(recorded or _NF4)}
    shown = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "bias")
    kind = str(adapter.get("peft_type") or "PEFT")
    described = {name: adapter[name] for name in shown if adapter.get(name) not in (None, False)}
    if isinstance(described.get("target_modules"), list):
        described["target_modules"] = sorted(described["target_modules"])
    settings = {**(facts.get("objective") or {}), **(facts.get("training") or {})}
    if settings.get("divergence") != "jsd":
        settings.pop("beta", None)
    if settings.get("max_steps") == -1:  # the Trainer's word for "as many as the epochs take"
        del settings["max_steps"]
    return _environment().get_template("adapter_card.md.j2").render(
        metadata=_to_yaml(metadata),
        repo_id=repo_id,
        base=base,
        base_is_named=is_hub_name(base),
        bits=bits or "quantized",
        adapter={"kind": "LoRA" if kind == "LORA" else kind, "text": _to_text(described)},
        facts=facts,
        quantization=quantization,
        quantization_is_recorded=recorded is not None,
        quantization_text=_to_text(recorded or "not recorded"),
        settings=settings,
        table=table,
        notes=notes,
        has_chart=has_chart,
        has_tokenizer=has_tokenizer,
        has_chat_template=has_chat_template,
        licence=licence,
    )  # fmt: skip


def _bits(quantization: Mapping[str, Any]) -> str | None:
    """ "4-bit" or "8-bit", as the Hub's tags have it; None if the settings do not say."""
    if quantization.get("load_in_4bit") or 4 in (quantization.get("bits"), quantization.get("nbits")):
        return "4-bit"
    if quantization.get("load_in_8bit") or 8 in (quantization.get("bits"), quantization.get("nbits")):
        return "8-bit"
    return None


def _model_index(repo_id: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of the distilled arm in the form that the Hub reads; nothing if that was not evaluated."""
    if "after" not in results["arms"]:
        return {}
    measured = results["arms"]["after"]["metrics"]
    metrics: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for key in results["metric_order"]:
        if key in measured:
            kind = "accuracy" if key.startswith("accuracy_") else key
            entry = {"type": kind, "name": results["metrics"][key], "value": measured[key]["value"]}
            metrics[kind == "accuracy"].append(entry)
    digest = str(results.get("transfer_set_digest") or "")[:12]
    names = {True: "questions of the evaluation", False: f"held-out rows of transfer set {digest}".strip()}
    found = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": "quantkd", "name": names[is_accuracy]},
            "metrics": entries,
        }
        for is_accuracy, entries in metrics.items()
        if entries
    ]
    return {"model-index": [{"name": repo_id.split("/")[-1], "results": found}]} if found else {}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("quantkd", "hub"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the page is Markdown, not HTML; `cell` escapes what would break a table or add HTML
    )
    environment.filters.update(
        cell=_escape_cell, code=_to_code, public_name=public_name, word=lambda text: re.sub(r"[^\w.]", "", text)
    )
    return environment


def _escape_cell(text: Any) -> str:
    escaped = " ".join(str(text).split())
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'"), ("[", "\\[")):
        escaped = escaped.replace(character, entity)
    return escaped


def _to_code(value: Any) -> str:
    """A value as Python writes it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _to_text(value: Any) -> str:
    """JSON on one line, without what would end a code span or a table's cell."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text.replace("`", "'").replace("|", "¦").replace("\n", " ")


def _to_yaml(metadata: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=120)
    return text.strip()
