"""Records of an evaluation: one JSON object a line, written as answers come in, and taken up again after a stop."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from quantkd.errors import DataError
from quantkd.models.cpu_repacking import unpack_kept
from quantkd.models.network import base_network

_SAMPLES_PER_WEIGHT = 64
# What a config holds that no forward pass depends on, or that the weights and `compute_arm_fingerprint` say.
_IDLE_CONFIG = {"architectures", "dtype", "quantization_config", "transformers_version", "use_cache", "pad_token_id"}


class RecordFile:
    """A JSONL file of records with the key `id`, and a small file beside it that says what they are answers to.

    The settings in `<name>.settings.json` name the model and the items. Records are taken up only under the same
    settings: an old file must not pass for the answers of a newly trained model.

    Args:
        path: the JSONL file; its folder is made.
        settings: JSON values that together decide the answers.

    Raises:
        DataError: the file holds records of other settings, records without settings, or a damaged line that is not
            the last one.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.existing: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        settings_path = path.with_name(path.name + ".settings.json")
        if path.exists():
            _check_settings(path, settings_path, settings)
            self.existing = _read_records(path)
            self._write(self.existing)  # without a last line that was cut off
        temporary = settings_path.with_name(settings_path.name + ".tmp")
        temporary.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, settings_path)  # records without settings would be lost

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records at the end, so that they survive the end of this process."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(_to_line(record) for record in records)

    def sort(self, records: Iterable[dict[str, Any]]) -> None:
        """Replace the file by all records in the order of their ids: the same bytes whatever the batches were."""
        self._write(sorted(records, key=lambda record: record["id"]))

    def _write(self, records: Iterable[dict[str, Any]]) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_to_line(record) for record in records)
        os.replace(temporary, self.path)


def compute_prompts_digest(prompts: Sequence[Sequence[int]]) -> str:
    """A digest of tokenised prompts, in order."""
    return hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()


def compute_model_fingerprint(model: Any) -> str:
    """A digest of what decides a model's answers: samples of every weight, its config, and its adapters' state.

    Training moves all weights of an adapter, so a few samples of each tell two trainings apart, and the 16 GB of a
    model need not be hashed. An adapter's scaling is no weight, nor are the positions' frequencies of a model.
    """
    unpack_kept(model)  # the same model before its first answer and after it
    digest = hashlib.sha256(_describe_config(model).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta" and parameter.numel():
            flat = parameter.detach().reshape(-1)
            samples = flat[:: max(1, flat.numel() // _SAMPLES_PER_WEIGHT)].cpu().contiguous()
            digest.update(samples.view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            digest.update(f"{name} {module.disable_adapters} {module.active_adapters}".encode())
            scaling = getattr(module, "scaling", {})
            digest.update(f"{sorted((each, scaling.get(each)) for each in module.active_adapters)}".encode())
    return digest.hexdigest()[:16]


def _describe_config(model: Any) -> str:
    config: Any = getattr(base_network(model), "config", None)
    facts = config.to_dict() if hasattr(config, "to_dict") else {}
    facts = {key: value for key, value in facts.items() if key not in _IDLE_CONFIG and not key.startswith("_")}
    return json.dumps(facts, sort_keys=True, default=str)


def _check_settings(path: Path, settings_path: Path, settings: dict[str, Any]) -> None:
    if not settings_path.exists():
        raise DataError(f"{path} holds records, and {settings_path.name} beside it is missing, so what they answer is "
                        "unknown. Remove the file, or give another one.")  # fmt: skip
    try:
        found = json.loads(settings_path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, found {type(found).__name__}")
    except ValueError as error:  # of which JSON's and Unicode's errors are kinds
        raise DataError(f"{settings_path} is damaged: {error}. So what {path.name} answers is unknown. Remove both "
                        "(`quantkd evaluate --force` does) to evaluate anew.") from error  # fmt: skip
    differing = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    if differing:
        pairs = ", ".join(f"{key} is {found.get(key)!r}, not {settings.get(key)!r}" for key in differing)
        raise DataError(f"{path} holds records of another evaluation: {pairs}. Remove the file "
                        "(`quantkd evaluate --force` does), or give another one.")  # fmt: skip


def _read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file whose last line may be cut off."""
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line else None
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the process ended while it wrote this line
                break
            raise DataError(f"{path}, line {number} is damaged: {error}. Remove the file to evaluate anew.") from error
        if record is not None:
            records.append(record)
    return records


def _to_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
