"""A device that is not there: tensors on the CPU that say `cuda:0`, refuse what CUDA refuses, and count waits for it.

Inside `pretended_device()` what goes to `cuda` becomes a `DeviceTensor`; rounding, memory and speed are the CPU's.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import TrainingArguments

DEVICE = torch.device("cuda", 0)
_BETWEEN_DEVICES = {"copy_", "_to_copy", "_foreach_copy_"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal"}
_waits: list[str] = []


class DeviceTensor(Tensor):
    """A tensor whose data are on the CPU and whose Python `device` is `cuda:0`."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def untyped_storage(self) -> torch.UntypedStorage:  # by which savers find tensors that share memory
        return self.inner.untyped_storage()  # type: ignore[no-any-return]

    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> DeviceTensor:
        made = {"dtype": inner.dtype, "layout": inner.layout, "device": inner.device, "requires_grad": requires_grad}
        self = Tensor._make_wrapper_subclass(cls, inner.size(), inner.stride(), inner.storage_offset(), **made)
        self.inner = inner
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # classes between this one and Tensor have initializers of their own

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        return memo.setdefault(id(self), place(self.inner.clone(), like=self))  # type: ignore[no-any-return]

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # stands before that of a parameter's class
        with torch._C.DisableTorchFunction():
            return _to(self, *args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, known = func.overloadpacket.__name__, {}

        def unwrap(each: Tensor) -> Tensor:
            inner = _inner(each)
            known[id(inner)] = each
            return inner

        plain = _map(args, unwrap), {key: _map(value, unwrap) for key, value in (kwargs or {}).items()}
        _check(name, args, kwargs or {}, [*known.values()])
        result = func(*plain[0], **plain[1])
        if name == "detach":  # keeps a parameter's class, or nobody could make a Parameter of it again
            return place(result, like=args[0], requires_grad=False)
        return _map(result, lambda each: known[id(each)] if id(each) in known else DeviceTensor(each))


@contextmanager
def pretended_device() -> Iterator[list[str]]:
    """Inside, the device is there. The list tells which lines waited for it, those that called torch."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, ACCELERATE_TORCH_DEVICE=str(DEVICE)))
        for target, name, value in (
            (TrainingArguments, "device", property(lambda self: DEVICE)),
            (torch, "Generator", _Generator),
            (torch.cuda, "get_rng_state", lambda device=None: torch.random.get_rng_state()),
            (torch.cuda, "set_rng_state", lambda state, device=None: torch.random.set_rng_state(state)),
            (torch, "inference_mode", lambda mode=True: torch.no_grad()),  # wrappers do not go with it
            (nn.Module, "to", _module_to),
        ):
            stack.enter_context(patch.object(target, name, value))
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.data =` cannot take another class
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        AcceleratorState._reset_state(reset_partial_state=True)
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        stack.enter_context(_Mode())
        _waits.clear()
        yield _waits


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            return args[0]
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu) or (func is torch.as_tensor and isinstance(args[0], Tensor)):
            return _to(args[0], *{Tensor.cuda: (DEVICE,), Tensor.cpu: ("cpu",)}.get(func, args[1:]), **kwargs)
        if func is Tensor.tolist:
            return func(_to(args[0], "cpu"))
        device = kwargs.pop("device", args[0].device if func is Tensor.new_tensor else None)
        here = device is not None and torch.device(device).type == "cuda"
        if kwargs.get("generator") is not None:
            wanted = here or any(isinstance(each, DeviceTensor) for each in args)
            if wanted != getattr(kwargs["generator"], "is_pretended", False):
                raise RuntimeError(f"Expected a '{'cuda' if wanted else 'cpu'}' device type for generator")
        if device is None:
            return func(*args, **kwargs)
        if here and func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            _wait("copy to the device")
        made = func(*_map(args, _inner), **kwargs, device="cpu")
        return place(made) if here else made


class _Generator(torch.Generator):  # of the CPU; it may say that it is the device's
    def __new__(cls, device: Any = "cpu") -> _Generator:
        self = super().__new__(cls, device="cpu")
        self.is_pretended = torch.device(device).type == "cuda"
        return self


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
    like = value if like is None else like
    kind = DeviceTensor if type(like) in (Tensor, nn.Parameter) else type(like)
    if not issubclass(kind, DeviceTensor):
        kind = type(f"Device{kind.__name__}", (DeviceTensor, kind), {})
    placed = DeviceTensor.__new__(kind, value.detach(), like.requires_grad if requires_grad is None else requires_grad)
    placed.__dict__.update({name: each for name, each in like.__dict__.items() if name != "inner"})
    placed._is_param = isinstance(like, nn.Parameter)
    return placed


def move(model: nn.Module) -> nn.Module:
    """The model with parameters, buffers and constants of 4-bit weights on the device."""
    done: dict[int, Any] = {}
    for module in model.modules():
        states = [getattr(each, "quant_state", None) for each in (module, *module.parameters(recurse=False))]
        states += [getattr(each, "state2", None) for each in states]
        for store in (module._parameters, module._buffers, *(vars(each) for each in states if each is not None)):
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
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and (device.type == "cuda") != isinstance(value, DeviceTensor):
        if device.type != "cuda" or not non_blocking:  # what does not block is taken to come from pinned memory
            _wait(f"copy to the {'device' if device.type == 'cuda' else 'CPU'}")
        value = _Move.apply(value)
    if dtype in (None, value.dtype) and memory_format is None and not copy:
        return value
    with torch._C.DisableTorchFunction():
        return Tensor.to(value, dtype or value.dtype, copy=copy, memory_format=memory_format or torch.preserve_format)


def _inner(value: Tensor) -> Tensor:
    return value.inner if isinstance(value, DeviceTensor) else value


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` for every tensor, also in lists and tuples; torch.utils._pytree takes most of a test's time."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_map(each, change) for each in value) if type(value) in (list, tuple) else value


def _check(name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
    """Refuse a CPU tensor with dimensions beside the device's, and note what the host waits for."""
    on_cpu = [each for each in tensors if not isinstance(each, DeviceTensor)]
    is_index = name.startswith("index_put") or name in ("index", "_unsafe_index", "_index_put_impl_")
    indices = [each for each in args[1] if isinstance(each, Tensor)] if is_index else []
    allowed = {id(each) for each in indices} if isinstance(args[0], DeviceTensor) else set()  # copied on the way
    if name not in _BETWEEN_DEVICES and any(each.dim() and id(each) not in allowed for each in on_cpu):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! (in {name})")
    copied = on_cpu and (name == "where" or (name in _BETWEEN_DEVICES and args[2:3] != (True,)))
    indexed = any(each.dtype == torch.bool or not isinstance(each, DeviceTensor) for each in indices)
    if name in _WAITS or copied or indexed or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _wait(name)


def _wait(what: str) -> None:
    places = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None))
    own = __file__, str(Path(torch.__file__).parent)
    file, line = next(each for each in places if not each[0].startswith(own))
    _waits.append(f"{file}:{line}: {what}")
