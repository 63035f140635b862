"""`quantkd.json`, which stands beside a saved adapter or export: where it comes from, and no local path."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from quantkd.errors import DataError, printable
from quantkd.files import read_object, write_file
from quantkd.foreign import commit_of
from quantkd.models.network import base_network
from quantkd.models.stored_weights import are_close, describe_weights
from quantkd.models.student import describe_quantization, is_quantized
from quantkd.names import __version__, find_file, hide_home, is_repository_name, public_name
from quantkd.transfer_set import TransferSet

logger = logging.getLogger(__name__)

PROVENANCE_NAME = "quantkd.json"
# Named one by one: the arguments of a Trainer also hold folders, tokens and whatever a caller passes on.
_TRAINING_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay", "max_grad_norm", "seed",
    "bf16", "fp16", "packing", "init", "init_rows", "adapter_budget", "codes", "train_scales", "scales_learning_rate",
)  # fmt: skip


@dataclass(frozen=True)
class Provenance:
    """The content of `quantkd.json`. What is not known is None."""

    quantkd_version: str | None = None  # that trained the adapter
    transfer_set: str | None = None  # of a set on the Hub its repository and commit
    transfer_set_digest: str | None = None  # of the set's rows
    teacher: str | None = None  # its name
    objective: dict[str, Any] | None = None  # alpha, temperature, divergence and beta
    training: dict[str, Any] | None = None  # the arguments that decide what is learned, and the number of processes
    quantization: dict[str, Any] | None = None  # of the base model that was trained on, as its config names it
    weights: dict[str, Any] | None = None  # the quantized weights that it is right for, as `describe_weights` says
    export: dict[str, Any] | None = None  # form, dtype and version of a checkpoint that was made from the adapter

    @classmethod
    def of_training(
        cls, transfer_set: TransferSet | None, objective: dict[str, Any], args: Any, num_processes: int, model: Any
    ) -> Provenance:
        """Of an adapter that was just trained with a Trainer's `args`."""
        values = {name: getattr(args, name, None) for name in _TRAINING_ARGUMENTS}
        values["init"] = getattr(args, "start", None)  # the one that was made
        plain = {name: getattr(value, "value", value) for name, value in values.items() if value is not None}
        sources = [] if transfer_set is None else [str(source) for source in transfer_set.sources if source.is_remote]
        return cls(
            quantkd_version=__version__,
            transfer_set=", ".join(dict.fromkeys(sources)) or None,
            transfer_set_digest=None if transfer_set is None else transfer_set.digest,
            teacher=None if transfer_set is None else public_name(transfer_set.info.teacher_name),
            objective=objective,
            training={**plain, "num_processes": num_processes},
            quantization=describe_quantization(model),
            weights=describe_weights(model),
        )

    def of_scales(self, model: Any) -> Provenance:
        """Of a checkpoint whose block constants were trained; what its codes were made from, it keeps saying."""
        config = base_network(model).config
        name, version = config.name_or_path or "", __version__
        before = Provenance.read(name).export if name and Path(name).is_dir() else None
        made = {"form": "quantized", "quantized_from": public_name(name), "commit": commit_of(config), **(before or {})}
        facts = {"scales": "trained", "quantization": self.quantization, "quantkd_version": version}
        return replace(self, export={**made, **facts})

    @classmethod
    def read(cls, name_or_path: str | Path) -> Provenance:
        """What stands beside an adapter, in a folder or a repository; everything is None if there is no such file."""
        path = find_file(str(name_or_path), PROVENANCE_NAME)
        if path is None:
            return cls()
        facts = read_object(path)
        found: dict[str, Any] = {field.name: facts.get(field.name) for field in fields(cls)}
        for name, value in found.items():
            expected = str if name in ("quantkd_version", "transfer_set", "transfer_set_digest", "teacher") else dict
            if value is not None and not isinstance(value, expected):
                raise DataError(f"{name} in {path} is {value!r:.80}; expected a {expected.__name__}. Get it again.")
        weights = found["weights"] or {"sha256": "", "sums": []}
        if not isinstance(weights.get("sha256"), str) or not isinstance(weights.get("sums"), list):
            raise DataError(f"weights in {path} is {weights!r:.80}; expected a sha256 and sums. Get it again.")
        return cls(**{**found, "teacher": found["teacher"] and public_name(found["teacher"])})

    @property
    def has_chosen_codes(self) -> bool:
        """Whether it is for a GGUF file whose codes `quantize` chose, which keeps the name of the file before."""
        is_file = (self.quantization or {}).get("quant_method") == "gguf"
        return is_file and (self.training or {}).get("codes") == "calibrated"

    @property
    def has_scales(self) -> bool:
        """Whether block constants were trained with it."""
        return bool((self.training or {}).get("train_scales"))

    @property
    def has_own_base(self) -> bool:
        """Whether no checkpoint that `load_student` makes fits: its base has calibrated codes or trained scales."""
        is_own = self.has_scales or (self.training or {}).get("codes") not in (None, "nearest")
        return bool(self.weights) and is_own and not self.has_chosen_codes

    def check_weights(self, model: Any, place: str) -> None:
        """Refuse a base model with other quantized weights than those that the adapter at `place` corrects."""
        if self.weights is None:
            return
        found, recorded = describe_weights(model), self.weights["sha256"]
        if found is None and is_quantized(model):
            return  # shared out over processes
        if found is not None and found["sha256"] == recorded:
            return
        expected = f"those of digest {printable(recorded):.12}, on which it was trained ({self.quantization!s:.300})"
        if found is not None and are_close(found, self.weights):
            # The same model, quantized on another machine: constants that are averaged differ in their last bits.
            logger.info("The base model's quantized weights differ by rounding from what %s was trained on.", place)
            return
        digest = "no quantized weights" if found is None else f"quantized weights of digest {found['sha256']:.12}"
        where = (
            "Load the checkpoint that it was trained on, in the same format and dtype; `train` writes it to OUTPUT_DIR/"
            "quantized, with train_scales OUTPUT_DIR/scaled, an experiment to RUN_DIR/quantized, `push` to NAME-4bit."
        )
        if (self.quantization or {}).get("quant_method") == "gguf":
            where = "Name the GGUF file that it was trained on as gguf_file."
        raise DataError(
            f"The base model has {digest}; expected for the adapter {place}: {expected}. It corrects the errors of "
            f"exactly those. {where}"
        )

    def to_json(self) -> str:
        """The text of the file."""
        facts = {name: value for name, value in asdict(self).items() if name != "export" or value is not None}
        return json.dumps(facts, indent=2, sort_keys=True) + "\n"

    def write(self, folder: Path) -> None:
        """Write the file into a folder."""
        write_file(folder / PROVENANCE_NAME, self.to_json())


def find_base(
    adapter: Path, name: str | None = None, *, given: str | None = None, scaled: bool = False, beside: bool = True
) -> Path | None:
    """The 4-bit checkpoint, of the model `name`, that an adapter was trained on: beside it, or `given` if that is it.

    With `scaled`, the codes without their trained scales, which a training checkpoint stands beside, are not it.
    """
    weights, places = (Provenance.read(adapter).weights or {}).get("sha256"), list[Path]()
    for folder in dict.fromkeys((Path(os.path.abspath(adapter)), adapter.resolve())):  # where a link is, and leads
        # An experiment's stands above the folder of its training.
        places += [folder / "scaled", *(each / "quantized" for each in (folder, *folder.parents[:2]))]
    places = [place for place in places if beside and weights and (place / "config.json").is_file()]
    for place in [*places, *([Path(given)] if given and weights else [])]:
        with suppress(OSError):  # of a name on the Hub that is not there, or cannot be asked for
            facts = Provenance.read(place)
            made = facts.export or {}
            is_it = (facts.weights or {}).get("sha256") == weights and (not scaled or made.get("scales") == "trained")
            if is_it and (name is None or made.get("quantized_from") == public_name(name)):
                return place
    return None


def require_base(adapter: Path, given: str | None = None, *, beside: bool = True) -> Path | None:
    """`find_base`, where one is needed: an adapter whose base has codes or scales of its own is refused without it.

    None where none is needed, or where the adapter names one on the Hub and `given` is no other.
    """
    made = Provenance.read(adapter)
    found = find_base(adapter, given=given, scaled=made.has_scales, beside=beside)
    if found or not made.has_own_base:
        return found
    named = str(read_object(adapter / "adapter_config.json").get("base_model_name_or_path") or "")
    if is_repository_name(named) and given in (None, named):
        return None
    lacking = "which is not beside it" if given is None else f"and {given} is not known to be it"
    remedy = "Take the folder that training wrote, or name that checkpoint: with base_model (--base_model) in a push, "
    remedy += "as the model in an export."
    if not beside and (own := find_base(adapter, scaled=made.has_scales)) is not None:
        remedy = f"It is {hide_home(str(own))}, and is found if base_model is left out."
    raise DataError(
        f"{adapter} holds an adapter for the 4-bit checkpoint {printable(public_name(named))!r:.80} with codes or "
        f"scales of its own, {lacking}. {remedy}"
    )


def name_base_model(folder: Path, base: str | None = None) -> None:
    """Name the base model in an adapter's files as `base`, or as PEFT wrote it; of a local folder the name alone."""
    file, card = folder / "adapter_config.json", folder / "README.md"
    if not file.is_file():
        return
    config = read_object(file)
    written = config.get("base_model_name_or_path") or ""
    config["base_model_name_or_path"] = public_name(base or written)
    if config["base_model_name_or_path"] != public_name(written):
        config["revision"] = None  # is of the other
    write_file(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if card.is_file() and public_name(written) != written:
        text = card.read_text(encoding="utf-8")
        write_file(card, text.replace(written, public_name(written)))
