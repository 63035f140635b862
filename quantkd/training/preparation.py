"""The student that is trained: loaded, with adapters, and at its start."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from quantkd.data.encoding import check_ids
from quantkd.errors import ConfigError, DataError, refuse_unused
from quantkd.files import parse_object
from quantkd.foreign import commit_of, shares_weights, use_one_gpu
from quantkd.hardware import process_state
from quantkd.models.adapter_files import CONFIG, read_fields
from quantkd.models.cpu_repacking import keep_trainable_on_cpu
from quantkd.models.gguf_student import check_origin
from quantkd.models.initialization import initialize_from_rows
from quantkd.models.network import base_network, context_length
from quantkd.models.packing import row_attention, why_not_packable
from quantkd.models.provenance import Provenance, find_base
from quantkd.models.quantize import find_origin, quantize_once, read_origin
from quantkd.models.ranks import allot_ranks, with_ranks
from quantkd.models.scales import attach_scales, list_scaled_layers, refuse_dora
from quantkd.models.student import (
    attach_lora,
    check_adapters,
    default_lora_config,
    format_of,
    freeze,
    is_quantized,
    load_student,
    stored_quantization,
)
from quantkd.models.weights import head_width
from quantkd.names import HUB_ARGUMENTS, find_file, load_tokenizer, names_gguf, naming
from quantkd.training.checkpoints import find_checkpoint
from quantkd.training.config import CALIBRATED_RATE, LEARNING_RATES, QuantizedDistillationConfig
from quantkd.transfer_set import IGNORE_INDEX, TransferSet
from quantkd.transfer_set.compatibility import check_student, check_transfer_set

logger = logging.getLogger(__name__)


def check_rows(dataset: Any, tokenizer: Any, vocab_size: int) -> None:
    """Refuse rows that cannot be trained on; those of a transfer set were checked when it was read."""
    if isinstance(dataset, TransferSet) or not _can_be_indexed(dataset):
        return
    for number in range(len(dataset)):
        row = dataset[number]
        ids, labels = (np.asarray(row.get(name, ())) for name in ("input_ids", "labels"))
        if ids.dtype.kind not in "iu" or not len(ids) or labels.shape != ids.shape or labels.dtype.kind not in "iu":
            raise DataError(
                f"Row {number} has input_ids of {ids.dtype} {ids.shape} and labels of {labels.dtype} {labels.shape}; "
                "expected whole numbers, at least one, and a label for each token. Encode it anew."
            )
        targets = labels[labels != IGNORE_INDEX]
        check_ids(tokenizer, [ids.tolist(), targets.tolist()], vocab_size, [number, number])
        weight = row.get("weight")
        if weight is not None and not 0 <= weight < math.inf:
            raise DataError(f"Row {number} has the weight {weight!r:.80}; expected a finite number of at least 0.")


def take_one_gpu(args: QuantizedDistillationConfig) -> None:
    """Train on one GPU per process, where the Trainer would wrap the model in `DataParallel`."""
    if args.n_gpu > 1:
        logger.warning(
            "%d GPUs are visible to one process; training on the first. "
            "Start one process each with `accelerate launch` to use them all.",
            args.n_gpu,
        )
        use_one_gpu(args)


def check_evaluation(args: QuantizedDistillationConfig, eval_dataset: Any) -> None:
    """Refuse to evaluate during training without rows to evaluate on."""
    sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    if any(isinstance(each, IterableDataset) for each in sets) and args.world_size > 1:
        raise ConfigError(
            "eval_dataset is an IterableDataset, of which several processes count some rows twice. Give rows with a "
            "length, such as list(rows)."
        )
    strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
    asked = {"eval_strategy": strategy, "eval_on_start": args.eval_on_start}
    for name, value in asked.items():
        if value not in ("no", False) and eval_dataset is None:
            raise ConfigError(
                f"{name} is {value!r}, and there are no held-out rows. Give eval_dataset (--eval_transfer_set or "
                f"--eval_fraction), or leave {name} out."
            )


def choose_base(
    name: str,
    args: QuantizedDistillationConfig,
    dataset: Any,
    quantization_config: Any | None,
    peft_config: PeftConfig | None = None,
    **kwargs: Any,
) -> str:
    """The checkpoint to train on: with calibrated codes, written to the output folder; or `name` as it is."""
    if peft_config is None and args.train_scales and args.init != "zero":  # no adapters that could start anywhere
        refuse_unused(args, {"": "init init_rows init_from adapter_budget"})
    config = quantization_config or "nf4"
    kind = config if isinstance(config, str) else format_of(config)
    if names_gguf(name, **kwargs) or kind not in ("nf4", "fp4") or stored_quantization(name, **kwargs):
        return name
    checkpoint = find_checkpoint(args.resume_from_checkpoint, str(args.output_dir))
    facts = Provenance.read(checkpoint) if checkpoint else Provenance()
    before = (facts.training or {}).get("codes")
    if (facts.quantization or {}).get("quant_method") == "gguf":
        raise ConfigError(f"The run of {checkpoint} trained on a GGUF file. Name it again as gguf_file to go on.")
    if before == ("nearest" if args.calibrate else "calibrated") and isinstance(dataset, TransferSet):
        raise ConfigError(
            f"The run of {checkpoint} trained on the {before} codes, and its adapters fit no others; calibrate is "
            f"{args.calibrate} now. Resume with calibrate={before == 'calibrated'}, or leave resume_from_checkpoint "
            "out."
        )
    args.codes = "nearest"
    if not args.calibrate:
        return name
    if not isinstance(dataset, TransferSet) or shares_weights():
        why = "there is no train_dataset" if dataset is None else "rows that are no TransferSet have no digest"
        why = "processes share the weights" if shares_weights() else why
        logger.warning(
            "The student's codes are the nearest ones: %s. Choose them with `quantkd quantize`, and name the "
            "checkpoint that it writes as the model; or set calibrate=False.",
            why,
        )
        return name
    # What would be refused afterwards is refused before codes are chosen, which takes minutes.
    check_transfer_set(dataset, load_tokenizer(name, **kwargs), args.temperature, args.divergence)
    if peft_config is not None:
        refuse_dora(args.train_scales and getattr(peft_config, "use_dora", False))
        check_adapters(name, peft_config, **kwargs)
    folder, args.codes = Path(str(args.output_dir), "quantized"), "calibrated"
    base = find_base(Path(checkpoint), name) if checkpoint else None
    if base is not None:  # its adapters fit no other
        folder = base
    else:
        quantize_once(name, dataset, folder, quantization_config=quantization_config, seed=args.seed, **kwargs)
    if args.init != "zero" and Path(name).is_dir():
        args.init_from = args.init_from or name  # of a folder the checkpoint names the last part alone
    return str(folder)


def prepare_student(
    model: str | PreTrainedModel | PeftModel,
    args: QuantizedDistillationConfig,
    transfer_sets: list[TransferSet],
    *,
    train_dataset: Any | None = None,
    peft_config: PeftConfig | None = None,
    quantization_config: Any | None = None,
) -> PreTrainedModel | PeftModel:
    """The student that the trainer trains."""
    init_kwargs = dict(parse_object("model_init_kwargs", args.model_init_kwargs))
    name = model if isinstance(model, str) else model.config.name_or_path or ""
    is_named, is_read = isinstance(model, str), not isinstance(model, PeftModel) and not args.resume_from_checkpoint
    if args.init_from and is_read and process_state().is_main_process:  # which alone reads it
        with naming(args.init_from):
            if find_file(args.init_from, "config.json") is None:
                raise ConfigError(
                    f"init_from is {args.init_from!r}, of which no config.json was found; expected a full-precision "
                    "checkpoint, here or on the Hub."
                )
    if isinstance(model, str):
        if (name := choose_base(model, args, train_dataset, quantization_config, peft_config, **init_kwargs)) != model:
            quantization_config = None
            init_kwargs = {key: value for key, value in init_kwargs.items() if key not in HUB_ARGUMENTS}
        model = load_student(name, quantization_config=quantization_config, **init_kwargs)
    elif quantization_config is not None or init_kwargs:
        raise ConfigError(
            "quantization_config and model_init_kwargs apply to a model given by name; a loaded model is taken as it "
            "is. Pass the name, or load the model in the way that is meant and leave both out."
        )
    if isinstance(model, PeftModel):  # whose adapters are where they are
        refuse_unused(args, {"": "init_rows init_from"})
    revision = commit_of(model.config) or init_kwargs.get("revision")
    if args.adapter_budget is not None:
        peft_config = _with_budget(model, peft_config, args, train_dataset, name, revision)
    adapted = _with_adapters(model, peft_config, args)
    is_new = adapted is not model
    keep_trainable_on_cpu(adapted)
    for transfer_set in transfer_sets:
        check_student(transfer_set, head_width(adapted), context_length(adapted))
    if args.packing:
        with row_attention(adapted):
            reason = why_not_packable(adapted)
        if reason is not None:
            raise ConfigError(
                f"packing=True would let rows see each other: {reason}. Leave packing off; rows of similar length "
                "still share a batch with train_sampling_strategy='group_by_length'."
            )
    if args.train_scales:
        list_scaled_layers(adapted)  # which are refused before the start is computed
    if is_new and is_quantized(adapted):
        _start(adapted, args, train_dataset, name, revision)
    file = getattr(base_network(adapted), "gguf_file", None)
    made = read_origin(str(file.path) if file else name) if isinstance(adapted, PeftModel) else {}
    args.codes = made.get("codes") or made.get("scales") or (args.codes if is_named else None)
    _note_start(adapted, args, is_calibrated=made.get("codes") == "calibrated")
    if args.train_scales:
        attach_scales(adapted)
    return adapted


def _note_start(model: Any, args: QuantizedDistillationConfig, *, is_calibrated: bool) -> None:
    """Note the start that was made, whatever was asked for; a learning rate that was not given is the one for it."""
    if not isinstance(model, PeftModel):
        return  # trained whole, from where it is
    # PEFT starts at B = 0. Single layers may have no correction.
    factors = [
        parameter for name, parameter in model.named_parameters() if ".lora_B." in name and name.endswith("weight")
    ]
    is_zero = 2 * sum(bool(each.detach().any()) for each in factors) <= len(factors)
    corrected = CALIBRATED_RATE if is_calibrated else LEARNING_RATES["loftq"]
    facts: dict[str, Any] = {
        "init": "zero" if is_zero else args.init,
        "learning_rate": LEARNING_RATES["zero"] if is_zero else corrected,
    }
    if (checkpoint := find_checkpoint(args.resume_from_checkpoint, str(args.output_dir))) is not None:
        facts |= Provenance.read(checkpoint).training or {}
    rate = facts["learning_rate"]
    if facts["init"] not in LEARNING_RATES or type(rate) not in (int, float) or not 0 <= rate < math.inf:
        found = f"the start {facts['init']!r:.80} and the learning rate {rate!r:.80}"
        raise ConfigError(
            f"quantkd.json in {checkpoint} has {found}, which no run has. Resume from another checkpoint."
        )
    args.start = facts["init"]
    if args.follows_start:
        args.learning_rate = facts["learning_rate"]
    if args.start == "zero" != args.init:
        logger.warning("The adapters start from zero, and the learning rate is %g.", args.learning_rate)


def _start(model: Any, args: QuantizedDistillationConfig, dataset: Any, name: str, revision: str | None) -> None:
    """Set new adapters to the start that was asked for."""
    if args.init == "zero" or dataset is None or args.resume_from_checkpoint:
        return  # a checkpoint brings its own adapters
    own = [
        config for config in model.peft_config.values() if isinstance(getattr(config, "init_lora_weights", True), str)
    ]
    if own:
        logger.info("The adapters start as their PEFT config says: init_lora_weights=%r.", own[0].init_lora_weights)
    elif args.init == "covariance" and not _can_be_indexed(dataset):
        logger.warning("The adapters start from zero: init='covariance' needs a train_dataset that can be indexed.")
    else:
        how: Any = {"start": args.init, "rows": args.init_rows, "seed": args.seed}
        origin, revision = _find_original(model, args, name, revision)
        initialize_from_rows(model, dataset, origin, revision=revision, **how)


def _find_original(
    model: Any, args: QuantizedDistillationConfig, name: str, revision: str | None
) -> tuple[str, str | None]:
    """The full-precision checkpoint, and its revision; a student of `quantize` says what it was made from."""
    origin, revision = (args.init_from, None) if args.init_from else find_origin(name) or (name, revision)
    check_origin(origin, model, revision)
    return origin, revision


def _with_budget(
    model: Any, peft_config: PeftConfig | None, args: QuantizedDistillationConfig, dataset: Any, name: str,
    revision: str | None,
) -> LoraConfig:  # fmt: skip
    """The adapters' config with ranks by layer; those of the checkpoint that training resumes from."""
    config = default_lora_config() if peft_config is None else peft_config
    wrong = {
        "a model with adapters": isinstance(model, PeftModel), "a model that is not quantized": not is_quantized(model),
        "rows that cannot be indexed": not _can_be_indexed(dataset),
    }  # fmt: skip
    what = next((what for what, holds in wrong.items() if holds), None)
    if what or not isinstance(config, LoraConfig) or config.use_dora:
        what = what or "adapters that are not plain LoRA"
        raise ConfigError(f"adapter_budget does not go with {what}. Leave it out, or change that.")
    for field in ("exclude_modules", "target_parameters", "layer_replication", "rank_pattern", "alpha_pattern"):
        if getattr(config, field, None):
            raise ConfigError(f"adapter_budget decides the ranks of all target_modules; leave {field} or it out.")
    if not config.target_modules:
        raise ConfigError("adapter_budget needs target_modules, such as 'all-linear', in the LoraConfig.")
    if (checkpoint := find_checkpoint(args.resume_from_checkpoint, str(args.output_dir))) is not None:
        before = (Provenance.read(checkpoint).training or {}).get("adapter_budget")
        if before is not None and before != args.adapter_budget:
            raise ConfigError(
                f"adapter_budget is {args.adapter_budget}, and the run of {checkpoint} had {before}. Resume with that."
            )
        ranks = read_fields(Path(checkpoint, CONFIG), checkpoint).get("rank_pattern")
        if not ranks:
            raise ConfigError(f"The run of {checkpoint} had no adapter_budget. Leave it out to go on from there.")
        return with_ranks(config, ranks)
    origin, revision = _find_original(model, args, name, revision)
    rows = {"rows": args.init_rows, "seed": args.seed}
    return allot_ranks(model, config, args.adapter_budget or 0, dataset, origin, revision=revision, **rows)


def _can_be_indexed(dataset: Any) -> bool:
    is_stream = isinstance(dataset, IterableDataset)  # which inherits what it lacks
    return not is_stream and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _with_adapters(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: QuantizedDistillationConfig
) -> PreTrainedModel | PeftModel:
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ConfigError(
                "The model already carries adapters and peft_config asks for new ones. "
                "Leave peft_config out to train those, or merge_and_unload() them first."
            )
        return model
    if peft_config is None and not is_quantized(model):
        return model  # a full-precision model that the caller chose to train whole
    kwargs = parse_object("gradient_checkpointing_kwargs", args.gradient_checkpointing_kwargs)
    checkpointing = kwargs if args.gradient_checkpointing else None
    if peft_config is None and args.train_scales:
        return freeze(model, checkpointing)
    torch.manual_seed(args.seed)
    return attach_lora(model, peft_config, checkpointing)
