"""QuantizedDistillationConfig: TrainingArguments plus what distillation needs to know."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from quantkd.errors import ConfigError, refuse_unused
from quantkd.files import parse_object
from quantkd.foreign import mixed_precision
from quantkd.hardware import copies_from_pinned_memory, has_accelerator, native_compute_dtype
from quantkd.loss.reference import Objective
from quantkd.teacher.teacher import option

# The starts of new adapters, and the best learning rate measured from each (docs/recipes.md): the steps that a start
# from zero needs lead a start near the optimum away from it.
LEARNING_RATES = {"covariance": 3e-5, "loftq": 3e-5, "zero": 3e-4}
CALIBRATED_RATE = 1e-4  # from a correction of codes that `quantize` chose
STARTS = tuple(LEARNING_RATES)
_COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_LEAST = {**dict.fromkeys(_COUNTS, 1), **dict.fromkeys(("neftune_noise_alpha", "weight_decay", "max_grad_norm"), 0)}


@dataclass
class QuantizedDistillationConfig(TrainingArguments):
    """Arguments of `QuantizedDistillationTrainer`; everything of `transformers.TrainingArguments` is here too.

    Args:
        alpha: weight of the soft loss, in [0, 1]: `loss = (1 - alpha) * ce + alpha * temperature**2 * divergence`.
            With the teacher's own answers, hard labels lower the fidelity (docs/recipes.md); use less than 1 where the
            given answers are better than the teacher's.
        temperature: distillation temperature, one that the transfer set was captured with.
        divergence: `forward_kl`, `reverse_kl` or `jsd`, over the stored entries and the tail.
        beta: the teacher's share of the mixture in `jsd`, in (0, 1).
        calibrate: choose the codes of a student that is given by name in nf4 or fp4 for the inputs of its layers
            (docs/quantize.md), and train on that checkpoint, `quantized` in the output folder. Needs a `TransferSet`;
            a student that is given loaded is taken as it is.
        init: where new adapters on a quantized student start: `covariance`, at the best correction of each layer's
            quantization error for the inputs that rows of the transfer set give it; `loftq`, at the best one without
            regard to inputs; or `zero`, at no correction. With `resume_from_checkpoint` the checkpoint's adapters
            are used.
        init_rows: rows of the transfer set that `covariance` looks at.
        adapter_budget: bytes of new LoRA adapters in 16 bits, as a share of the bytes of the quantized layers, such as
            0.1. Each layer gets the rank that takes most off the loss for them, in place of `r`, and the scale
            `lora_alpha / r` (docs/initialization.md).
        init_from: the full-precision checkpoint that quantized weights are compared with, a folder or a Hub name; the
            student's own if None. Needed for a student that was saved quantized, such as GPTQ and AWQ checkpoints.
        train_scales: train one factor for each quantization block of the 4-bit layers, and the norms; when saved they
            are part of an ordinary 4-bit checkpoint. Adapters are trained beside them if `peft_config` is given.
        scales_learning_rate: peak learning rate of those, without weight decay.
        use_fused_loss: compute the loss from hidden states in chunks, without holding logits. For models whose head
            cannot be separated, logits are held instead, and a warning says why.
        packing: concatenate the rows of a batch into one sequence without padding; rows do not attend to each other.
            Needs a model whose attention follows position ids, which is tested; fastest with FlashAttention.
        model_init_kwargs: further arguments of `from_pretrained` when the student is given by name, such as
            `{"revision": ..., "dtype": ...}`. `dtype` is also what the 4-bit layers compute in: bfloat16 where the
            hardware has it, else float32, if it is not given. `trust_remote_code` is off unless set here.
        teacher_model_init_kwargs: the same for the trainer's `teacher_model`, if that is given by name.

    Six defaults differ from `TrainingArguments`: `bf16` (on where an accelerator has bfloat16, unless `fp16` is on or
    `accelerate launch` or DeepSpeed decides), `learning_rate` (1e-4 where adapters start at a correction of calibrated
    codes, 3e-5 of others, 3e-4 from zero), `logging_steps` (10), `logging_first_step` (on), `remove_unused_columns`
    (off, because rows carry the teacher's entries) and `train_sampling_strategy` (`group_by_length`: rows of similar
    length share a batch, which reduces padding).

    Raises:
        ConfigError: an objective that has no meaning, or an unknown start.
    """

    alpha: float = option(1.0, "Weight of the soft loss, in [0, 1]; the rest is cross-entropy.")
    temperature: float = option(1.0, "Distillation temperature; one that the transfer set was captured with.")
    divergence: str = option(
        "forward_kl", "Soft loss over the stored entries and the tail: forward_kl, reverse_kl or jsd."
    )
    beta: float = option(0.5, "The teacher's share of the mixture in jsd, in (0, 1).")
    calibrate: bool = option(
        True, "Choose an nf4 or fp4 student's codes for its inputs first; that checkpoint is OUTPUT_DIR/quantized."
    )
    init: str = option(
        "covariance",
        "Start of new adapters: covariance (from the quantization error and the inputs), loftq (from the quantization "
        "error alone) or zero.",
    )
    init_rows: int = option(64, "Rows of the transfer set that init=covariance looks at.")
    adapter_budget: float | None = option(
        None, "Adapter bytes as a share of the quantized layers'; ranks by layer, in place of one rank."
    )
    init_from: str | None = option(
        None, "Full-precision checkpoint to compare quantized weights with; the student's own if not given."
    )
    train_scales: bool = option(
        False, "Train the 4-bit layers' block constants and the norms; with use_peft false, nothing else."
    )
    scales_learning_rate: float = option(3e-4, "Peak learning rate of what train_scales trains.")
    use_fused_loss: bool = option(True, "Compute the loss from hidden states in chunks, without holding logits.")
    packing: bool = option(False, "Concatenate the rows of a batch into one sequence, without padding.")
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Further arguments of from_pretrained for a student given by name, as JSON."
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Further arguments of from_pretrained for a teacher_model given by name, as JSON."
    )
    hub_private_repo: bool | None = option(None, "Whether the repository on the Hub is private; it is if not given.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint's folder, or `true` for the last in output_dir.")
    learning_rate: float | None = option(  # type: ignore[assignment]  # a number once the start is known
        None,
        "Peak learning rate; if not given, 1e-4 where adapters start at a correction of calibrated codes, 3e-5 of "
        "other codes, and 3e-4 from zero.",
    )
    bf16: bool | None = option(  # type: ignore[assignment]  # a bool once the hardware is known
        None,
        "Mixed precision in bfloat16; if not given, on where an accelerator has it, unless fp16 is on or `accelerate "
        "launch` or DeepSpeed decides. On a CPU it is off.",
    )
    logging_steps: float = option(10, "Log every this many optimizer steps; below 1, a share of all steps.")
    logging_first_step: bool = option(True, "Log the first step too, so that curves have a beginning.")
    train_sampling_strategy: str = option(
        "group_by_length",
        "Order of the training rows: group_by_length (rows of similar length share a batch), random, sequential, or "
        "batch_rebalance.",
        choices=["random", "sequential", "group_by_length", "batch_rebalance"],
    )
    remove_unused_columns: bool = option(
        False, "Leave off: rows carry the teacher's entries beside the model's inputs."
    )

    def __post_init__(self) -> None:
        if self.init not in STARTS:
            raise ConfigError(f"init is {self.init!r}; expected one of {', '.join(STARTS)}.")
        refuse_unused(self, {"init=covariance init=loftq": "init_from", "init=covariance": "init_rows adapter_budget"})
        refuse_unused(self, {"train_scales": "scales_learning_rate"})
        # A default follows the start that is really made, as `prepare_student` finds it.
        self.follows_start, self.start = self.learning_rate is None, self.init
        self.codes: str | None = None  # of a student given by name: "calibrated" or "nearest", as `choose_base` notes
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.init]
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            setattr(self, name, parse_object(name, getattr(self, name)) or None)
        # The Trainer takes every metric but a loss for one that should grow.
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith(("kl", "ce", "perplexity")):
            self.greater_is_better = False
        # Without it the processes of `torchrun` on CPUs would not find each other.
        self.use_cpu = self.use_cpu or not has_accelerator()
        if self.bf16 is None:
            decided = self.fp16 or self.use_cpu or self.deepspeed or mixed_precision("")
            self.bf16 = not decided and native_compute_dtype(torch.accelerator.current_accelerator()) == torch.bfloat16
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except TypeError as error:  # a nested option that is none, as in accelerator_config
            raise ConfigError(f"An option cannot be read: {error}. Leave it out, or see transformers' docs.") from error
        accelerator: Any = copy(self.accelerator_config)  # which may be the caller's
        self.accelerator_config = accelerator
        if accelerator.dispatch_batches:
            raise ConfigError(
                "accelerator_config has dispatch_batches=True, which cuts all tensors of a batch to its number of "
                "rows; a batch has more targets than rows. Leave it out."
            )
        accelerator.dispatch_batches = False  # None would dispatch an IterableDataset's
        if self.push_to_hub and self.train_scales:
            raise ConfigError(
                "push_to_hub uploads an adapter, and train_scales changes the student below it. Leave one of them off; "
                "`quantkd push` uploads an adapter with its student, and `hf upload` a student alone."
            )
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ConfigError(
                f"hub_strategy is {self.hub_strategy}, which uploads optimizer and random states; expected 'end' or "
                "'every_save', which upload the adapter."
            )
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None and not value >= least:  # nor NaN
                raise ConfigError(f"{name} is {value}; expected at least {least}.")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ConfigError(
                f"Nothing would be trained: num_train_epochs is {self.num_train_epochs}, max_steps {self.max_steps}. "
                "Set one of them above 0."
            )
        if self.remove_unused_columns:
            raise ConfigError("remove_unused_columns is on, and would remove the teacher's entries. Leave it off.")
        if self.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; the teacher's distribution takes the place "
                "of smoothed labels. Leave it at 0."
            )
        self.objective()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns of it in every epoch
        elif copies_from_pinned_memory(self.device):
            accelerator.non_blocking |= self.dataloader_pin_memory  # or each batch waits for the steps before it
        if self.adapter_budget is not None and (self.adapter_budget is True or not 0 < self.adapter_budget <= 16):
            raise ConfigError(
                f"adapter_budget is {self.adapter_budget}; expected a share above 0 and of at most 16, such as 0.1."
            )
        if self.init_rows < 1:
            raise ConfigError(f"init_rows must be at least 1, found {self.init_rows}.")

    def objective(self) -> Objective:
        """What the loss minimizes."""
        return Objective(self.alpha, self.temperature, self.divergence, self.beta)
