"""Seconds and peak memory of a Trainer's steps, by part of a step; for the scripts beside this file."""

from __future__ import annotations

import ctypes
import gc
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

__all__ = ["MIB", "Memory", "Meter", "count_weights"]

MIB = 2**20


class Memory:
    """Bytes this process holds now and at its peak: on a GPU as torch allocates them, else the resident set."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        if not self.on_gpu and not Path("/proc/self/clear_refs").exists():
            raise SystemExit("Without a GPU the peak is read from /proc/self/clear_refs, which only Linux has.")

    def settle(self) -> None:
        """Give freed memory back, so that what follows is not served from it unseen."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
        if trim is not None:
            trim(0)

    def now(self) -> int:
        """Bytes held now."""
        return torch.cuda.memory_allocated() if self.on_gpu else self._status("VmRSS")

    def peak(self) -> int:
        """Most bytes held since `reset`."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else self._status("VmHWM")

    def reset(self) -> None:
        """Forget the peak."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class Meter(TrainerCallback):
    """Ends of steps, and the peak memory of each phase of a step.

    Phases: `forward`, the body up to the head's input; `loss`, head and loss and the gradient back to the head's input;
    `backward`, the body's backward pass; `optimizer`.

    Args:
        trainer: is hooked into, and gets this as a callback.
        memory: what to read.
        count_saved: in the last step, also add up the tensors that autograd keeps for the backward pass.
    """

    def __init__(self, trainer: Trainer, memory: Memory, count_saved: bool = False) -> None:
        self.memory, self.count_saved = memory, count_saved
        self.ends: list[float] = []
        self.batch: dict[str, int] = {}
        self.gradients = 0
        self.peak = 0
        self.rises: dict[str, int] = defaultdict(int)  # phase -> most bytes over its start, in any step
        self.saved: dict[str, dict[int, int]] = defaultdict(dict)  # phase -> storage -> bytes
        self.model: Any = trainer.accelerator.unwrap_model(trainer.model)
        self._counting = False
        self._known = {t.untyped_storage().data_ptr() for t in [*self.model.parameters(), *self.model.buffers()]}
        self.model.get_output_embeddings().register_forward_pre_hook(self._at_head)
        self._compute_loss = trainer.compute_loss
        trainer.compute_loss = self._metered_loss  # type: ignore[method-assign]
        trainer.add_callback(self)
        memory.settle()
        memory.reset()
        self._phase, self._start = "between", memory.now()

    @property
    def seconds(self) -> list[float]:
        """Of each step, data loading and all, from the end of the one before."""
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]

    def parts_mib(self, optimizer: Any) -> dict[str, float]:
        """Where a step's memory goes."""
        state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        sizes = {
            **count_weights(self.model),
            "gradients": self.gradients,
            "optimizer state": state,
            "activations, kept": sum(self.saved["forward"].values()),
            "head and loss, kept": sum(self.saved["loss"].values()),
            "head and loss, peak": self.rises["loss"],
            "backward pass, peak": self.rises["backward"],
            "optimizer, peak": self.rises["optimizer"],
        }
        return {name: size / MIB for name, size in sizes.items()}

    def _enter(self, phase: str) -> None:
        peak = self.memory.peak()
        self.peak = max(self.peak, peak)
        self.rises[self._phase] = max(self.rises[self._phase], peak - self._start)
        self.memory.reset()
        self._phase, self._start = phase, self.memory.now()

    def _at_head(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].requires_grad:
            self._enter("loss")
            args[0].register_hook(lambda gradient: self._enter("backward"))

    def _metered_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        input_ids, is_target = inputs["input_ids"], inputs["labels"] != -100
        self.batch = {
            "width": input_ids.shape[1],
            "targets": int(is_target[:, 1:].sum()),
            "checksum": int(input_ids[is_target].sum()),
        }
        self._enter("forward")
        if not self._counting:
            return self._compute_loss(model, inputs, *args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            return self._compute_loss(model, inputs, *args, **kwargs)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._known and not any(key in kept for kept in self.saved.values()):
            self.saved[self._phase][key] = storage.nbytes()
        return tensor

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._counting = self.count_saved and state.global_step + 1 == state.max_steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._enter("optimizer")
        self.gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.memory.on_gpu:
            torch.cuda.synchronize()
        self._enter("between")
        self.ends.append(time.perf_counter())


def count_weights(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's parameters: quantized ones with their constants, others with the buffers, and adapters."""
    sizes = {"weights, quantized": 0, "weights, unquantized": 0, "adapters": 0}
    sizes["weights, unquantized"] += sum(buffer.nbytes for buffer in model.buffers())
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            constants = state.as_dict(packed=True).values()
            sizes["weights, quantized"] += parameter.nbytes + sum(t.nbytes for t in constants if isinstance(t, Tensor))
        else:
            sizes["adapters" if parameter.requires_grad else "weights, unquantized"] += parameter.nbytes
    return sizes
