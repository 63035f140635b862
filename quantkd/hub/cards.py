"""The pages of what is pushed: each from named facts, never from all that a folder holds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from markupsafe import Markup

from quantkd.errors import ConfigError, printable
from quantkd.models.provenance import Provenance
from quantkd.models.student import bits_of
from quantkd.names import is_repository_name, public_name
from quantkd.report.page import describe_held_out, list_notes, make_environment, tabulate
from quantkd.transfer_set.info import TransferSetInfo

CARD_NAME = "README.md"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_TAGS = ["quantkd", "distillation"]
# The fields of adapter_config.json that the page shows.
_ADAPTER_FIELDS = ("bias", "lora_alpha", "lora_dropout", "r", "target_modules", "use_dora", "use_rslora")
# What a student is loaded in by default, for an adapter that does not say it.
_NF4 = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}  # fmt: skip


def check_license(license: str | None) -> None:
    """Refuse a license that the Hub would not accept."""
    if license is not None and not _LICENSE.fullmatch(license):
        raise ConfigError(f"license is {license!r}; expected a short name of the Hub's list, such as apache-2.0.")


def render_set_card(info: TransferSetInfo, num_shards: int, *, repo_id: str, license: str | None) -> str:
    """The page of a transfer set. The same set gives the same page."""
    metadata = DatasetCardData(license=license, tags=[*_TAGS, "transfer-set"], viewer=False)
    return _render("set_card", metadata, repo_id=repo_id, info=info, num_shards=num_shards, license=license)


def render_checkpoint_card(repo_id: str, facts: Provenance, *, license: str | None) -> str:
    """The page of a 4-bit checkpoint."""
    made = facts.export or {}
    origin = str(made.get("quantized_from"))
    metadata = ModelCardData(
        license=license, library_name="transformers", pipeline_tag="text-generation",
        tags=[*_TAGS, "4-bit", "bitsandbytes"], base_model=origin if is_repository_name(origin) else None,
        base_model_relation="quantized" if is_repository_name(origin) else None,
    )  # fmt: skip
    return _render("checkpoint_card", metadata, repo_id=repo_id, origin=origin, made=made, facts=facts, license=license)


def render_adapter_card(
    repo_id: str,
    adapter: Mapping[str, Any],
    facts: Provenance,
    results: dict[str, Any] | None,
    *,
    license: str | None,
    **has: bool,
) -> str:
    """The page of an adapter from its three JSON files; `has`: a chart, a tokenizer and a chat template, or not."""
    base = str(adapter["base_model_name_or_path"] or "BASE_MODEL")
    recorded = facts.quantization
    bits, is_named = bits_of(recorded or _NF4), is_repository_name(base)
    # The settings that the snippet repeats; one of 8 bits has settings of 4 bits that mean nothing.
    snippet = r"load_in_4bit|bnb_4bit_\w+" if (recorded or _NF4).get("load_in_4bit") else "load_in_8bit"
    measured = [] if results is None else _list_measured(results)
    source = re.match(r"([\w.-]+/[\w.-]+) at ", facts.transfer_set or "", re.ASCII)
    metadata = ModelCardData(
        license=license, library_name="peft", pipeline_tag="text-generation",
        tags=[*_TAGS, *([f"{bits}-bit"] if bits else []), "lora"], base_model=base if is_named else None,
        datasets=[source[1]] if source else None, model_name=repo_id.split("/")[-1] if measured else None,
        eval_results=measured or None,
    )  # fmt: skip
    described = {name: adapter[name] for name in _ADAPTER_FIELDS if adapter.get(name) not in (None, False)}
    if isinstance(described.get("target_modules"), list):
        described["target_modules"] = sorted(described["target_modules"])
    settings = {**(facts.objective or {}), **(facts.training or {})}
    if settings.get("divergence") != "jsd":
        settings.pop("beta", None)
    if settings.get("max_steps") == -1:  # the Trainer's value for "as many as the epochs take"
        del settings["max_steps"]
    return _render(
        "adapter_card", metadata, repo_id=repo_id, base=base, base_is_named=is_named,
        bits=f"{bits}-bit" if bits else str((recorded or {}).get("format") or "quantized"),
        gguf=(recorded or {}).get("gguf_file"), revision=adapter.get("revision"),
        kind="LoRA" if adapter.get("peft_type") == "LORA" else adapter.get("peft_type"),
        adapter=described, facts=facts, recorded=recorded, settings=settings,
        bitsandbytes={name: value for name, value in (recorded or _NF4).items() if re.fullmatch(snippet, name)},
        table=[] if results is None else tabulate(results),
        notes=[] if results is None else [*list_notes(results), f"Fidelity: {describe_held_out(results)}."],
        license=license, **has,
    )  # fmt: skip


def _list_measured(results: dict[str, Any]) -> list[EvalResult]:
    """The metrics of the distilled arm as the Hub reads them."""
    held_out, found, measured = describe_held_out(results), [], results["arms"].get("after", {}).get("metrics", {})
    for key in [each for each in results["metric_order"] if each in measured]:
        asked, name = key.startswith(("accuracy_", "agreement_")), results["metrics"][key]
        data, kind = ("questions of the evaluation", key.split("_")[0]) if asked else (held_out, key)
        found.append(EvalResult("text-generation", "quantkd", data, kind, measured[key]["value"], metric_name=name))
    return found


def _render(template: str, card: ModelCardData | DatasetCardData, **values: Any) -> str:
    environment = make_environment("hub")
    environment.filters.update(code=_to_code, public_name=public_name)
    metadata = Markup(printable(card.to_yaml(), lines=True))
    return environment.get_template(f"{template}.md.j2").render(metadata=metadata, **values)


def _to_code(value: Any) -> Markup:
    """A value as Python writes it."""
    return Markup(printable(json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)))
