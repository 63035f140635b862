"""A device that is not there: tensors on the CPU that say `cuda:0`, and refuse what CUDA refuses.

Inside `PretendedDevice()`, `device="cuda"`, `.to("cuda")` and `.cuda()` give `DeviceTensor`s. Their data stay on the
CPU, so values can be compared, but a plain CPU tensor beside one raises as on a GPU, and each wait of the host for the
device is recorded in `waits`. A GPU's kernels, rounding, memory and speed are not pretended.
"""

from __future__ import annotations

import os
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import TrainingArguments

import quantkd

DEVICE = torch.device("cuda", 0)
_PACKAGE = str(Path(quantkd.__file__).parent)
_BETWEEN_DEVICES = {"copy_", "_to_copy", "_foreach_copy_"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal"}


class DeviceTensor(Tensor):
    """A tensor whose data are on the CPU and whose Python `device` is `cuda:0`."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> DeviceTensor:
        made = {"dtype": inner.dtype, "layout": inner.layout, "device": inner.device, "requires_grad": requires_grad}
        place_of = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        self = Tensor._make_wrapper_subclass(cls, inner.size(), **place_of, **made)
        self.inner = inner
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # classes between this one and Tensor have initializers of their own

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        return memo.setdefault(id(self), place(self.inner.clone(), like=self))  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return place, (self.inner.detach(),)

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # stands before that of a parameter's class
        with torch._C.DisableTorchFunction():
            return _to(self, *args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, leaves = func.overloadpacket.__name__, tree_leaves((args, kwargs or {}))
        wrappers = {id(each.inner): each for each in leaves if isinstance(each, DeviceTensor)}
        _check(name, args, kwargs or {}, leaves)
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs or {}))
        if name == "detach":  # keeps a parameter's class, or nobody could make a Parameter of it again
            return place(result, like=args[0], requires_grad=False)
        new = tree_map(lambda each: DeviceTensor(each) if isinstance(each, Tensor) else each, result)
        return tree_map(
            lambda given, made: wrappers.get(id(given), made) if isinstance(given, Tensor) else made, result, new
        )


class PretendedDevice(TorchFunctionMode):
    """Inside it the device is there; `waits` tells where the host waited for it."""

    current: PretendedDevice | None = None

    def __enter__(self) -> PretendedDevice:
        self.waits: list[str] = []
        self._stack = ExitStack()
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        self._stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.data =` cannot take another class
        self._stack.enter_context(patch.dict(os.environ, ACCELERATE_TORCH_DEVICE=str(DEVICE)))
        for target, name, value in (
            (TrainingArguments, "device", property(lambda self: DEVICE)),
            (torch, "Generator", _Generator),
            (torch.cuda, "get_rng_state", lambda device=None: torch.random.get_rng_state()),
            (torch.cuda, "set_rng_state", lambda state, device=None: torch.random.set_rng_state(state)),
            (torch, "inference_mode", lambda mode=True: torch.no_grad()),  # wrappers do not go with it
            (nn.Module, "to", _module_to),
            (PretendedDevice, "current", self),
        ):
            self._stack.enter_context(patch.object(target, name, value))
        AcceleratorState._reset_state(reset_partial_state=True)
        self._stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._stack.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu) or (func is torch.as_tensor and isinstance(args[0], Tensor)):
            named = {Tensor.cuda: (DEVICE,), Tensor.cpu: ("cpu",)}.get(func, args[1:])
            return _to(args[0], *named, **kwargs)
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], DeviceTensor):
            if func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
            return _to(args[0], "cpu").tolist()
        device = kwargs.pop("device", args[0].device if func is Tensor.new_tensor else None)
        here = device is not None and torch.device(device).type == "cuda"
        if kwargs.get("generator") is not None:
            wanted = here or any(isinstance(each, DeviceTensor) for each in tree_leaves(args))
            if wanted != getattr(kwargs["generator"], "is_pretended", False):
                raise RuntimeError(f"Expected a '{'cuda' if wanted else 'cpu'}' device type for generator")
        if device is None:
            return func(*args, **kwargs)
        made = func(*tree_map(_inner, args), **kwargs, device="cpu")
        return place(made) if here else made


class _Generator(torch.Generator):
    """A generator of the CPU that may say it is the device's."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        self = super().__new__(cls, device="cpu")
        self.is_pretended = torch.device(device).type == "cuda"
        return self

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()


class _Move(torch.autograd.Function):
    """A copy to the other device; its gradient comes back to this one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.inner.clone() if isinstance(value, DeviceTensor) else DeviceTensor(value.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.inner if isinstance(grad, DeviceTensor) else DeviceTensor(grad)


def place(value: Tensor, like: Tensor | None = None, requires_grad: bool | None = None) -> Any:
    """`value` on the device; a parameter's stays a parameter, with what else hangs on it."""
    like, kind = value if like is None else like, type(value if like is None else like)
    if kind in (Tensor, nn.Parameter):
        kind = DeviceTensor
    elif not issubclass(kind, DeviceTensor):
        kind = type(f"Device{kind.__name__}", (DeviceTensor, kind), {})
    placed = DeviceTensor.__new__(kind, value.detach(), like.requires_grad if requires_grad is None else requires_grad)
    placed.__dict__.update({name: each for name, each in like.__dict__.items() if name != "inner"})
    if isinstance(like, nn.Parameter):
        placed._is_param = True
    return placed


def move(model: nn.Module) -> nn.Module:
    """The model with parameters, buffers and constants of 4-bit weights on the device."""
    done: dict[int, Any] = {}
    for module in model.modules():
        states = [getattr(each, "quant_state", None) for each in (module, *module.parameters(recurse=False))]
        states += [getattr(each, "state2", None) for each in states]
        constants = [vars(each) for each in states if each is not None]
        for store in (module._parameters, module._buffers, *constants):
            for name, value in list(store.items()):
                if isinstance(value, Tensor) and not isinstance(value, DeviceTensor):
                    store[name] = done[id(value)] if id(value) in done else done.setdefault(id(value), place(value))
    return model


def _module_to(module: nn.Module, *args: Any, to: Any = nn.Module.to, **kwargs: Any) -> nn.Module:
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type != "cuda":
        return to(module, *args, **kwargs)  # type: ignore[no-any-return]
    return move(module if dtype is None else to(module, dtype))


def _to(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    copy = kwargs.pop("copy", False)
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and (device.type == "cuda") != isinstance(value, DeviceTensor):
        if device.type != "cuda":
            _wait("copy to the CPU")
        value = _Move.apply(value)
    if dtype in (None, value.dtype) and memory_format is None and not copy:
        return value
    with torch._C.DisableTorchFunction():
        return Tensor.to(value, dtype or value.dtype, copy=copy, memory_format=memory_format or torch.preserve_format)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, DeviceTensor) else value


def _check(name: str, args: Any, kwargs: Any, leaves: list[Any]) -> None:
    """Refuse a CPU tensor with dimensions beside the device's, and note what the host waits for."""
    is_index = name.startswith("index_put") or name in ("index", "_unsafe_index", "_index_put_impl_")
    if is_index and isinstance(args[0], DeviceTensor):  # its indices may be on the CPU
        leaves = [each for each in leaves if not any(each is index for index in args[1])]
    on_cpu = [each for each in leaves if isinstance(each, Tensor) and not isinstance(each, DeviceTensor) and each.dim()]
    if name not in _BETWEEN_DEVICES and on_cpu:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! (in {name})")
    masked = is_index and any(isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1])
    counted = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name in _WAITS or masked or counted or (name == "copy_" and not isinstance(args[0], DeviceTensor)):
        _wait(name)


def _wait(what: str) -> None:
    """Note a wait with the line of the package that asked for it; `elsewhere` if no line of it did."""
    if PretendedDevice.current is not None:
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_PACKAGE)]
        where = f"{frames[-1].filename.removeprefix(_PACKAGE)[1:]}:{frames[-1].lineno}" if frames else "elsewhere"
        PretendedDevice.current.waits.append(f"{where}: {what}")
