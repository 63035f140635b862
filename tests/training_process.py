"""One process of a distributed run, started by `torchrun` or `accelerate launch`: train, evaluate, save, report."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, TransferSet
from quantkd.models import initialization
from quantkd.training.curves import TrainingCurves

ARGUMENTS = {
    "alpha": 0.5,  # both terms
    "max_grad_norm": 1e6,  # 0 is "auto" to DeepSpeed, and that is 1
    "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 1, "logging_steps": 1,
    "save_strategy": "no", "disable_tqdm": True, "init": "zero",
    "train_sampling_strategy": "sequential", "use_cpu": True, "calibrate": False,
}  # fmt: skip


def build_student(kind, path):
    """`nf4` by name, the others loaded: the student, and adapters for it."""
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    if kind == "nf4":
        return path, LoraConfig(r=4, **options)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    whole = ["lm_head"] if kind == "lora, head" else None
    return model, None if kind == "full" else LoraConfig(r=4, modules_to_save=whole, **options)


def read_parameters(model):
    """The trainable parameters, whole, whoever holds their parts."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gathered = nullcontext()
        if hasattr(parameter, "ds_shape"):
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters([parameter])
        with gathered:
            found[name] = (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()
    return found


class KeepParameters(TrainerCallback):
    """The trainable parameters as the first step finds them; `reshard` lets FSDP2 shard the head after each pass."""

    def __init__(self, reshard):
        self.reshard = reshard

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.reshard:
            model.set_reshard_after_forward(True)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = read_parameters(model)


def main(job):
    if PartialState().process_index:
        initialization.initialize_from_error = Mock(side_effect=AssertionError("another process computed the start"))
    folder, rows = Path(job["folder"]), TransferSet(job["transfer_set"])
    student, peft_config = build_student(job["student"], job["model"])
    named = {"model_init_kwargs": {"dtype": "float32"}} if isinstance(student, str) else {}
    args = QuantizedDistillationConfig(str(folder / "run"), **{**ARGUMENTS, **named, **job["arguments"]})
    keeper = KeepParameters(job["reshard"])
    trainer = QuantizedDistillationTrainer(
        student, args, train_dataset=rows, eval_dataset=rows[:3], peft_config=peft_config, callbacks=[keeper],
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )  # fmt: skip
    trainer.remove_callback(TrainingCurves)  # a picture takes longer than the step
    adapters = [each.detach().abs().sum() for name, each in trainer.model.named_parameters() if "lora_" in name]
    starts = gather_object([float(sum(adapters))])  # before DDP makes them equal
    trainer.train()
    after = read_parameters(trainer.model)
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "saved"))
    if trainer.is_world_process_zero():
        first = next(entry for entry in trainer.state.log_history if "loss" in entry)
        model = trainer.model_wrapped
        weights = [parameter for name, parameter in model.named_parameters() if name.endswith("base_layer.weight")]
        report = {
            "logs": first, "metrics": metrics, "world_size": args.world_size, "fused": trainer.uses_fused_loss,
            "wrapper": type(model).__name__, "starts": starts,
            "sharded_base": sum(hasattr(w, "placements") or hasattr(w, "ds_shape") for w in weights),
        }  # fmt: skip
        # Of plain SGD with a rate of 1, whatever DDP, FSDP2 or DeepSpeed do with gradients.
        torch.save({name: keeper.before[name] - after[name] for name in after}, folder / "gradient.pt")
        (folder / "report.json").write_text(json.dumps(report))


def use_fsdp_on_cpu():
    """accelerate turns to DDP on CPUs, whatever its configuration asks; let it take its FSDP path there too."""
    initialize = AcceleratorState.__init__

    def initialize_with_fsdp(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialize_with_fsdp


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    if jobs["fsdp_on_cpu"]:
        use_fsdp_on_cpu()
    for job in jobs["jobs"]:
        main(job)
    PartialState().wait_for_everyone()  # gloo may abort a process that ends while another is at work
    PartialState().destroy_process_group()
