"""The device to run on, and the dtypes to compute in."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkd.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import PartialState


def has_accelerator() -> bool:
    """Whether torch sees a GPU or another accelerator."""
    return torch.accelerator.is_available()


def process_state() -> PartialState:
    """accelerate's view of this process: its device, its rank, and how many there are."""
    from accelerate import PartialState

    atexit.unregister(_leave_process_group)  # so that it is registered once
    atexit.register(_leave_process_group)
    # Without an accelerator it must be told so, or processes that `torchrun` started would not find each other.
    return PartialState(cpu=not has_accelerator())


def _leave_process_group() -> None:
    """Leave before the interpreter ends, whatever ends it: threads of a group that is left to it can abort the exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def default_device() -> torch.device:
    """This process's accelerator if there is one, else the CPU; under a launcher each process gets its own."""
    device: torch.device = process_state().device
    return device


def native_compute_dtype(device: torch.device | None = None) -> torch.dtype:
    """bfloat16 if `device` multiplies it natively, else float32."""
    # Emulated bfloat16 was measured at a seventh of float32's speed for a forward pass on a CPU.
    device = device or default_device()
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        # Before torch 2.11 it cannot be asked for.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        has_bfloat16 = any("bf16" in name and bool(found) for name, found in capabilities.items())
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return torch.bfloat16 if device.type in ("xpu", "npu", "hpu") else torch.float32


def chunk_bytes(device: torch.device) -> int:
    """Memory for the logits of one chunk, with every copy that exists beside them."""
    # Smaller chunks read the head more often: a CPU's products with 128,256 tokens slow down below some 250 rows, and
    # an accelerator needs several hundred to be as busy with arithmetic as with reading.
    return (192 if device.type == "cpu" else 512) * 2**20


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype to sum in: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def copies_from_pinned_memory(device: torch.device) -> bool:
    """Whether the host can go on while a copy from page-locked memory is on its way to `device`."""
    return device.type in ("cuda", "xpu")


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. Without pinned memory the host would wait until the device has done all work before."""
    if tensor.device.type == "cpu" and copies_from_pinned_memory(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def parse_dtype(name: str | torch.dtype | None, device: torch.device | None = None) -> torch.dtype:
    """A dtype from its name; None or "auto" follows the hardware."""
    if name is None or name == "auto":
        return native_compute_dtype(device)
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"Expected a dtype of float32, bfloat16, float16 or auto, found {name!r}.")
    return dtype
