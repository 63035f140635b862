"""QuantizedDistillationTrainer: the Hugging Face Trainer with a stored teacher and a quantized student."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, HubStrategy, SaveStrategy, has_length

from quantkd.errors import ConfigError, DataError, QuantKDError, refuse_unused
from quantkd.files import parse_object
from quantkd.foreign import trainable_without_adapters
from quantkd.loss.fused import compute_fused_loss
from quantkd.loss.metrics import compute_row_metrics, summarize_rows
from quantkd.loss.states import TargetStates
from quantkd.models.adapter_files import round_adapter
from quantkd.models.gguf_student import load_student_tokenizer
from quantkd.models.network import Runner, run_model, why_not_fusable
from quantkd.models.packing import row_attention
from quantkd.models.provenance import Provenance, name_base_model
from quantkd.models.scales import (
    SCALED_NAME,
    folded_scales,
    group_by_scale,
    load_scales,
    save_base,
    save_scales,
    scale_parameters,
)
from quantkd.models.stored_weights import describe_weights
from quantkd.models.student import short_dtype
from quantkd.models.weights import embedding_rows
from quantkd.names import plain_name
from quantkd.teacher.live import load_live_teacher
from quantkd.training.checkpoints import check_resumable, find_checkpoint
from quantkd.training.config import QuantizedDistillationConfig
from quantkd.training.curves import TrainingCurves
from quantkd.training.order import order_for_evaluation, order_for_training
from quantkd.training.preparation import check_evaluation, check_rows, prepare_student, take_one_gpu
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.batch import DistillationCollator, find_targets
from quantkd.transfer_set.compatibility import check_transfer_set
from quantkd.transfer_set.topk import TopKLogprobs

logger = logging.getLogger(__name__)


_SHARED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
_METRICS = ("loss", "kl", "ce", "perplexity", "top1_agreement")


class QuantizedDistillationTrainer(Trainer):
    """Distil a stored teacher into a quantized student.

    Args:
        model: a Hub name or checkpoint folder, put into NF4 with calibrated codes (`args.calibrate`) and adapters;
            or a loaded model, which is taken as it is; adapters are attached if it is quantized and has none, or
            `peft_config` is given.
        args: the training arguments; defaults with output in `quantkd_output` if None.
        train_dataset: a `TransferSet`, or rows with `input_ids`, `labels` and, without a `teacher_model`, `teacher`.
        eval_dataset: held-out rows of the same kind, or a dict of several.
        processing_class: the student's tokenizer; loaded from the model's name if None.
        peft_config: adapters to attach; if None, rank 16 on all linear layers, and none with `train_scales`.
        quantization_config: for a model given by name, any quantization config of transformers; NF4 if None.
        teacher_model: a full-precision model, or its name, that runs beside the student; stored entries are not read.
        data_collator: a `DistillationCollator` for the tokenizer if None.
        **trainer_kwargs: everything else that `transformers.Trainer` takes (callbacks, optimizers, ...).

    Logs `loss`, `ce` and `kl` (nats per target token, `kl` without the factor T^2). Evaluation adds `eval_kl` (forward
    KL to the teacher at temperature 1, whatever is trained), `eval_ce`, `eval_perplexity` and `eval_top1_agreement`.
    Weights of rows (`concatenate`) enter the training loss alone. `training.png` in the output folder has the curves.

    Raises:
        ConfigError: arguments that do not fit each other or the transfer set.
        TransferSetError: a set that another tokenizer wrote.
        DataError: rows longer than the student's context.

    Reference: docs/loss.md; Hinton et al. 2015 (arXiv:1503.02531).
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the count of the whole accumulated, distributed batch
    args: QuantizedDistillationConfig

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel | PeftModel,
        args: QuantizedDistillationConfig | None = None,
        train_dataset: Any | None = None,
        eval_dataset: Any | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any | None = None,
        teacher_model: str | os.PathLike[str] | PreTrainedModel | None = None,
        data_collator: Any | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        args = args or QuantizedDistillationConfig("quantkd_output")
        best = (args.metric_for_best_model or "loss").removeprefix("eval_")
        if best not in _METRICS and not isinstance(eval_dataset, dict) and not trainer_kwargs.get("compute_metrics"):
            raise ConfigError(f"metric_for_best_model is {best!r}; expected one of {', '.join(_METRICS)}.")
        if trainer_kwargs.get("compute_loss_func") is not None:
            raise ConfigError("compute_loss_func would take the place of distillation's own loss. Leave it out.")
        refuse_unused(args, {"divergence=jsd": "beta"})
        check_evaluation(args, eval_dataset)
        if args.teacher_model_init_kwargs and not isinstance(teacher_model, (str, os.PathLike)):
            raise ConfigError("teacher_model_init_kwargs is for a teacher_model given by name. Leave it out.")
        take_one_gpu(args)
        student, teacher = plain_name(model), plain_name(teacher_model)
        if isinstance(student, str):
            args = copy(args)  # the student's origin is noted in it, and the caller may train another one next
        processing_class = processing_class or load_student_tokenizer(
            student, **parse_object("model_init_kwargs", args.model_init_kwargs)
        )
        datasets = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
        self.transfer_sets = [dataset for dataset in datasets if isinstance(dataset, TransferSet)]
        for transfer_set in self.transfer_sets:
            check_transfer_set(transfer_set, processing_class, args.temperature, args.divergence)
        how = {"peft_config": peft_config, "quantization_config": quantization_config}
        model = prepare_student(student, args, self.transfer_sets, train_dataset=train_dataset, **how)
        self.live_teacher: Runner | None = None
        if teacher is not None:
            options = parse_object("teacher_model_init_kwargs", args.teacher_model_init_kwargs)
            self.live_teacher = load_live_teacher(teacher, model, **options)
        data_collator = data_collator or DistillationCollator.for_tokenizer(processing_class, embedding_rows(model))
        if args.packing and not isinstance(data_collator, DistillationCollator):
            raise ConfigError(
                "packing=True packs with a DistillationCollator, found the data_collator "
                f"{type(data_collator).__name__}. Leave data_collator out, or pack in your own and leave packing off."
            )
        for dataset in datasets:
            check_rows(dataset, processing_class, embedding_rows(model))
        given: Any = {
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
        }
        with trainable_without_adapters(model) if args.train_scales else nullcontext():
            super().__init__(model, args, data_collator, **given, **trainer_kwargs)
        self.add_callback(TrainingCurves())
        self.add_callback(_ArgumentsRemoved())
        # So that the Trainer counts the target tokens of the accumulated batch, which `compute_loss` divides by.
        self.model_accepts_loss_kwargs = True
        self.uses_fused_loss: bool | None = None if args.use_fused_loss else False  # None: still to be tried
        # Where processes share the weights, only the wrapper's forward pass has them whole: tried at the first one.
        shared = self.accelerator.distributed_type in _SHARED
        if self.uses_fused_loss is None and not shared:
            self._try_fused_loss(model, None)
        # While they are whole: where processes share them, no save has all of them.
        self._weights = describe_weights(model) if shared and self.args.should_save else None
        self._train_terms = torch.zeros(3, device=self.args.device)  # summed ce, summed kl, optimizer steps
        self._eval_rows: list[Tensor] = []
        self._is_checkpoint = False  # what is being saved

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """`sum over targets of (1 - alpha) * ce + alpha * T^2 * divergence`, over the targets of the global batch.

        The weight of a row multiplies its targets' part of the sum, and does not change what the sum is divided by.

        Args:
            model: the student, wrapped or not.
            inputs: a batch of `DistillationCollator`.
            return_outputs: also return the model's outputs; under the fused loss they have no logits
                (`use_fused_loss=False` keeps them).
            num_items_in_batch: targets in all accumulated micro-batches of all processes; those here if None.

        Returns:
            The scalar loss in nats, or `(loss, outputs)`.
        """
        inputs = self._with_targets(inputs)
        with self._run(model, inputs) as (states, teacher, outputs):
            found = states.at_targets(inputs["labels"], inputs["targets"])
            loss, terms = compute_fused_loss(*found, teacher, self.args.objective(), inputs.get("weights"))
        if num_items_in_batch is None:
            scale: Tensor | float = 1.0 / max(len(teacher), 1)
        else:
            # Data-parallel wrappers average gradients over processes; the count is over all of them.
            world = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            scale = world / num_items_in_batch
        loss = loss * scale
        if model.training:
            # Kept on the device, because reading them would wait for it in every step.
            step = torch.stack([terms.ce.sum(), terms.kl.sum()]).float() * scale
            self._train_terms = self._train_terms.to(step.device)
            self._train_terms[:2] += step
            self._train_terms[2] += float(self.accelerator.sync_gradients)
        if return_outputs and self.uses_fused_loss:  # in place of the logits there are hidden states
            outputs = type(outputs)(**{key: value for key, value in outputs.items() if key != "logits"})
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def _run(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> Iterator[tuple[TargetStates, TopKLogprobs | TargetStates, Any]]:
        """The student's states at all positions, the teacher's distributions at the N targets, and all outputs."""
        # Under autocast, also what is done inside: accelerate puts it around the student's forward pass alone.
        device = inputs["labels"].device
        if self.live_teacher is None and "teacher" not in inputs:
            raise DataError(
                "The batch holds no teacher entries. Train on a TransferSet, or on rows with a `teacher` each, or pass "
                "teacher_model= to run the teacher beside the student."
            )
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if self.uses_fused_loss is None:
            # In one of its own, because autocast keeps weights that were cast, here without a graph.
            with self.accelerator.autocast():
                self._try_fused_loss(unwrapped, model)
        with self.accelerator.autocast():
            if self.live_teacher is not None:
                with torch.no_grad():
                    computed, _ = self.live_teacher.run(inputs)
                teacher: TopKLogprobs | TargetStates = computed.to(device)
            else:
                teacher = inputs["teacher"].to(device)
            with run_model(unwrapped, inputs, fused=bool(self.uses_fused_loss), forward=model) as (states, outputs):
                yield states, teacher, outputs

    def _with_targets(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with its `targets`: the collator's, unless labels may have been changed or cut since then."""
        # Stored entries cannot be cut, and a live teacher has none that would show it. To find targets waits for the
        # device.
        is_ours = type(self.data_collator) is DistillationCollator and self.live_teacher is None
        is_whole = inputs.get("targets_of") == tuple(inputs["labels"].shape)
        if is_ours and is_whole and "targets" in inputs and "teacher" in inputs:
            return inputs
        return {**inputs, "targets": find_targets(inputs["labels"])}

    def _try_fused_loss(self, unwrapped: Any, forward: Any) -> None:
        reason = why_not_fusable(unwrapped, forward)
        if reason is not None:
            logger.warning("The fused loss is off for this model, for %s; its logits are held instead.", reason)
        self.uses_fused_loss = reason is None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `ce` and `kl`, averaged over the steps since the last log, to the Trainer's `loss`."""
        if "loss" in logs and self._train_terms[2] > 0:
            mean = self.accelerator.reduce(self._train_terms.to(self.args.device), "mean").tolist()
            logs["ce"], logs["kl"] = (total / mean[2] for total in mean[:2])
            self._train_terms.zero_()
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any | None = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        order = order_for_training(dataset, self.args)
        return super()._get_train_sampler(dataset) if order is None else order

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return order_for_evaluation(eval_dataset)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, packed if asked for. Evaluation is not: its metrics are sums over the rows of a batch."""
        trainer = self
        if self.args.packing and isinstance(self.data_collator, DistillationCollator):  # no other, as was checked
            trainer = copy(self)  # the loader is built from a trainer's collator, and evaluation keeps this one's
            trainer.data_collator = replace(self.data_collator, packing=True)
        loader = Trainer.get_train_dataloader(trainer)
        if has_length(loader) and not len(loader):
            raise ConfigError(
                f"No batch is left to train on: {self.num_examples(loader)} rows, {self._train_batch_size} per batch "
                f"on each of {self.args.world_size} devices, and dataloader_drop_last drops what fills none. Lower "
                "per_device_train_batch_size, or leave dataloader_drop_last off."
            )
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's; what `train_scales` trains has a learning rate of its own and no weight decay."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if not is_new or not self.args.train_scales:
            return optimizer
        own, groups = scale_parameters(self.model), optimizer.param_groups
        moved = {id(each) for each in own.values()}
        for group in groups:
            group["params"] = [each for each in group["params"] if id(each) not in moved]
        groups[:] = [group for group in groups if group["params"]]
        for parameters, scale in group_by_scale(own):
            rate = self.args.scales_learning_rate * scale
            optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; an argument that the schedule does not take is refused."""
        try:
            return super().create_scheduler(*args, **kwargs)
        except TypeError as error:
            raise ConfigError(f"lr_scheduler_kwargs is {self.args.lr_scheduler_kwargs}: {error}.") from error

    def get_eval_dataloader(self, eval_dataset: Any | None = None) -> DataLoader[Any]:
        """The Trainer's, of all rows: `dataloader_drop_last` is for training."""
        trainer = self
        if self.args.dataloader_drop_last:
            trainer = copy(self)
            trainer.args = copy(self.args)
            trainer.args.dataloader_drop_last = False
        return Trainer.get_eval_dataloader(trainer, eval_dataset)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's `train`, from a checkpoint that fits; on a CPU, packed batches attend row by row meanwhile."""
        checkpoint = find_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        if checkpoint is not None:
            check_resumable(checkpoint, self.model)
        with row_attention(self.model) if self.args.packing else nullcontext():
            output = super().train(checkpoint, *args, **kwargs)
        self._compare_with_start()
        return output

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's; with `eval_on_start` and `load_best_model_at_end`, the start is kept for the comparison."""
        metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        if self.state.global_step == 0 and self._keeps_start:
            with self._saving_checkpoint():
                self.save_model(str(self._start_folder), _internal_call=True)
        return metrics

    @contextmanager
    def _saving_checkpoint(self) -> Iterator[None]:
        self._is_checkpoint = True
        try:
            yield
        finally:
            self._is_checkpoint = False

    @property
    def _start_folder(self) -> Path:
        return Path(str(self.args.output_dir), "quantkd-start")

    @property
    def _keeps_start(self) -> bool:
        asked = self.args.eval_on_start and self.args.load_best_model_at_end
        return asked and self.accelerator.distributed_type not in _SHARED

    def _compare_with_start(self) -> None:
        """Put the student back to its start, if that is better than what training leaves; or say that it is."""
        steps: dict[float, dict[str, Any]] = {}
        for entry in self.state.log_history:
            steps.setdefault(entry["step"], {}).update(entry)
        best = Path(self.state.best_model_checkpoint or "").name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        is_loaded = self.args.load_best_model_at_end and best.isdecimal()
        start, left = (steps.get(step, {}) for step in (0, int(best) if is_loaded else self.state.global_step))
        metric = f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if self._keeps_start:
            if metric in start and metric in left and self._start_folder.is_dir():
                before, after = start[metric], left[metric]
                if not (after >= before if self.args.greater_is_better else after <= before):  # so also if it is NaN
                    logger.warning("The start is kept: %s is %.4f, and %.4f after training.", metric, before, after)
                    self.state.best_metric, self.state.best_model_checkpoint = before, str(self._start_folder)
                    self._load_best_model()
                    self.state.best_model_checkpoint = None  # it is removed
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                shutil.rmtree(self._start_folder, ignore_errors=True)  # the student is not saved yet
        elif self.args.alpha and self.args.should_save and left.get("eval_kl", 0.0) > start.get("eval_kl", math.inf):
            logger.warning(
                "Training raised the KL on the held-out rows from %.4f to %.4f. Lower learning_rate, or keep the start "
                "where it is better: load_best_model_at_end=True.",
                start["eval_kl"],
                left["eval_kl"],
            )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """One evaluation batch: its loss, logits and labels; sums per row are kept for the metrics of the epoch."""
        inputs = self._with_targets(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            with self._run(model, inputs) as (states, teacher, _):
                found = inputs["labels"], teacher, self.args.objective(), inputs["targets"]
                rows = compute_row_metrics(states, *found)
                logits = None if prediction_loss_only else states.logits()
            # By row, so that rows that fill up the last batch of the processes are not counted twice.
            self._eval_rows.append(self.accelerator.gather_for_metrics(rows))
            loss = (rows[:, -1].sum() / rows[:, 0].sum().clamp_min(1)).float()
        return loss, logits, None if prediction_loss_only else inputs["labels"]

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's loop, with the metrics of `prediction_step` added; its loss is per target token."""
        self._eval_rows = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if not self._eval_rows:
            raise DataError(
                f"The evaluation data set ({metric_key_prefix}) holds no rows; expected at least one. Give rows, or "
                "leave eval_dataset out."
            )
        means = summarize_rows(torch.cat(self._eval_rows).cpu())
        named = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint of an earlier run in its place counts as unfinished from the first byte that is replaced."""
        if self.args.should_save:
            place = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (place / TRAINER_STATE_NAME).unlink(missing_ok=True)
        with self._saving_checkpoint():
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.args.train_scales or isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.train_scales:
            load_scales(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if not self.args.train_scales or isinstance(self.model, PeftModel):
            super()._load_best_model()
        if self.args.train_scales:
            load_scales(self.model, Path(str(self.state.best_model_checkpoint)))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder, model = Path(output_dir or str(self.args.output_dir)), self.accelerator.unwrap_model(self.model)
        if not self.args.train_scales:
            super()._save(output_dir, state_dict)
            self._describe(folder)
        elif self._is_checkpoint:
            folder.mkdir(parents=True, exist_ok=True)
            if isinstance(model, PeftModel):
                super()._save(output_dir, state_dict)
            if self.args.should_save:
                save_scales(model, folder)
            self._describe(folder)
        else:
            place = folder / SCALED_NAME if isinstance(model, PeftModel) else folder
            with folded_scales(model):
                super()._save(output_dir, state_dict)
                self._describe(folder, str(place))
                if not self.args.should_save:
                    return
                if place != folder:
                    save_base(model, place)
                    if self.processing_class is not None:
                        self.processing_class.save_pretrained(place)
                Provenance.read(folder).of_scales(model).write(place)

    def _describe(self, folder: Path, base: str | None = None) -> None:
        """Say beside what was saved where it comes from, and of an adapter what it belongs to."""
        if not self.args.should_save:
            return
        _remove_arguments(folder)
        trained_on = self.train_dataset if isinstance(self.train_dataset, TransferSet) else None
        objective, count = asdict(self.args.objective()), self.accelerator.num_processes
        facts = Provenance.of_training(trained_on, objective, self.args, count, self.model)
        replace(facts, weights=facts.weights or self._weights).write(folder)
        name_base_model(folder, base)
        if isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            if not self._is_checkpoint:  # from which training goes on as if it had not stopped
                round_adapter(folder, short_dtype(self.model))
            self._write_card(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the adapter's page into the output folder, from what is known of the run, with `license`."""
        if self.is_world_process_zero():
            self._write_card(Path(str(self.args.output_dir)), kwargs.get("license"))

    def _write_card(self, folder: Path, license: str | None = None) -> None:
        from quantkd.hub.adapters import write_card

        write_card(folder, self.hub_model_id or Path(str(self.args.output_dir)).resolve().name, license)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository of `args.hub_model_id`, private unless `args.hub_private_repo` is False."""
        if self.is_world_process_zero():
            from quantkd.hub.repository import PUSH_ATTEMPTS, HubRepository
            from quantkd.remote import retry

            name = self.args.hub_model_id or Path(str(self.args.output_dir)).resolve().name
            repository = HubRepository(name, "model", self._is_private(private), token or self.args.hub_token)
            retry(repository.ensure, PUSH_ATTEMPTS)
            self.hub_model_id = repository.repo_id  # type: ignore[assignment]
            self.push_in_progress = None  # the Trainer waits for it at the end; pushes here are done when they return

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **options: Any,
    ) -> Any:
        """Save the adapter and upload it with its tokenizer, chat template and page, as `quantkd push` does.

        Nothing else is uploaded; the Trainer's own method uploads the whole folder.

        Args:
            commit_message: the commit's title.
            blocking: True; an adapter is small, and its upload is waited for.
            token: with write permission; that of `args`, of `hf auth login` or HF_TOKEN if None.
            revision: the branch; that of `args`, or "main", if None.
            private: False to create a public repository, or to push to one; that of `args`, or True, if None.
            **options: `license`, `base_model` and `run_dir` of `quantkd.hub.push_adapter`.

        Returns:
            The repository and its commit (`quantkd.hub.PushedRepository`); None in all processes but the first.

        Raises:
            ConfigError: a public repository without `private=False`, or a file that holds a secret.
            HubError: the Hub could not be reached, or refused.
        """
        if not blocking:
            raise ConfigError("blocking is False; an adapter is small, and its upload is waited for. Leave it out.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        options |= {"commit_message": commit_message or "Upload adapter", "revision": revision}
        return self._push(str(self.args.output_dir), private, token, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer calls it after each save. A failed push does not end the training.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        progress = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch or 0)}"
        try:
            self._push(checkpoint_folder, commit_message=f"Training in progress, {progress}", attempts=2)
        except QuantKDError as error:
            logger.warning("The adapter of %s was not pushed. %s Training goes on.", progress, error)

    def _push(self, folder: str, private: bool | None = None, token: str | None = None, **options: Any) -> Any:
        from quantkd.hub.adapters import push_adapter

        options |= {"private": self._is_private(private), "token": token or self.args.hub_token}
        options["revision"] = options.get("revision") or self.args.hub_revision
        return push_adapter(folder, str(self.hub_model_id), **options)

    def _is_private(self, private: bool | None) -> bool:
        return (self.args.hub_private_repo if private is None else private) is not False


class _ArgumentsRemoved(TrainerCallback):
    """Removes the pickled arguments after each save, also where the Trainer does not call `_save`."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir))
        _remove_arguments(folder)
        _remove_arguments(folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _remove_arguments(folder: Path) -> None:
    # It is a pickle, can hold a Hub token, and nothing reads it back.
    (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
