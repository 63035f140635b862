"""Trainable block constants of 4-bit layers: one factor per quantization block, and the norms with them.

The codes stay, each constant gets a factor that starts at 1, and what is computed with is always what is stored, an
ordinary bitsandbytes checkpoint: constants times factors, double-quantized where the student's are. The gradient passes
through that rounding as if it were not there (Bengio et al. 2013, arXiv:1308.3432). See docs/scales.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_blockwise
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantkd.errors import ConfigError
from quantkd.foreign import float32_modules, keep_saveable, lora_variant_of, shares_weights
from quantkd.hardware import parse_dtype
from quantkd.models.adapter_files import SCALES_NAME
from quantkd.models.codes import read_constants
from quantkd.models.cpu_repacking import restore_weight
from quantkd.models.network import base_network

SCALED_NAME = "scaled"  # beside an adapter: the folder of the folded checkpoint that it belongs to
_LEAST_SCALE = 0.01  # of a norm that is all zeros, as a bias
_MAX_PIECE = 2**23  # weights that the backward pass holds dequantized at a time


def list_scaled_layers(model: Any) -> list[Any]:
    """The 4-bit layers whose block constants can be trained: all but the head; refused where there are none."""
    network = base_network(model)
    if shares_weights():
        raise ConfigError(
            "train_scales is on, and FSDP or ZeRO-3 would shard the factors apart from their blocks. Train with one "
            "whole copy per process (DDP), or leave train_scales off."
        )
    head, layers = network.get_output_embeddings(), list[Any]()
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            refuse_dora(any(lora_variant_of(layer, each) for each in layer.active_adapters))
        if isinstance(layer, Linear4bit) and layer is not head:
            layers.append(layer)
    if not layers:
        raise ConfigError(
            "train_scales is on, and the student has no 4-bit layer of bitsandbytes. Train nf4 or fp4, or leave it off."
        )
    return layers


def attach_scales(model: Any) -> None:
    """Make the block constants of a model's 4-bit layers and its norms trainable, in place; the head stays as it is."""
    for layer in list_scaled_layers(model):
        if isinstance(layer, ScaledLinear4bit):
            continue  # a model that is trained on
        restore_weight(layer)
        state = layer.weight.quant_state
        count = math.ceil(math.prod(state.shape) / state.blocksize)
        layer.__class__ = ScaledLinear4bit
        layer.scales = nn.Parameter(torch.ones(count, device=layer.weight.device))
    for parameter in scale_parameters(model).values():
        parameter.requires_grad_(True)
    keep_saveable(base_network(model))


def refuse_dora(is_used: bool) -> None:
    """Refuse DoRA beside trained scales."""
    if is_used:
        raise ConfigError("train_scales takes plain LoRA; DoRA's norms would miss the factors. Set use_dora=False.")


def scale_parameters(model: Any) -> dict[str, nn.Parameter]:
    """What `attach_scales` makes trainable, by the names of a model without adapters."""
    return {
        f"{name}.{key}".replace(".base_layer", ""): parameter
        for name, module in base_network(model).named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if (key == "scales" and isinstance(module, ScaledLinear4bit)) or "norm" in type(module).__name__.lower()
    }


def group_by_scale(parameters: dict[str, nn.Parameter]) -> list[tuple[list[nn.Parameter], float]]:
    """Factors, and each norm, with what their learning rate is multiplied by."""
    # Adam's steps are of one length, and norms differ a hundredfold in size: in SmolLM2 from 0.03 to 1.8.
    groups: list[tuple[list[nn.Parameter], float]] = [
        ([each], max(_LEAST_SCALE, float(each.detach().abs().mean())))
        for name, each in parameters.items()
        if not name.endswith(".scales")
    ]
    return [([each for name, each in parameters.items() if name.endswith(".scales")], 1.0), *groups]


class ScaledLinear4bit(Linear4bit):
    """bitsandbytes' layer with a factor for each block."""

    scales: nn.Parameter
    weight: Any  # its `quant_state` has the constants that the factors multiply

    def folded_state(self) -> QuantState:
        """The quantization state with the factors in its constants."""
        return fold(self.weight.quant_state, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """As bitsandbytes computes it, with the folded constants."""
        product: Any = _ScaledProduct.apply
        dtype = self.compute_dtype or x.dtype
        output: Tensor = product(x, self.scales, self.weight, self.weight.quant_state, dtype)
        return (output if self.bias is None else output + self.bias.to(dtype)).to(x.dtype)


@torch.no_grad()
def fold(state: QuantState, scales: Tensor) -> QuantState:
    """The state with each block's constant multiplied, and double-quantized as `quantize_4bit` does if it was."""
    folded, constants = copy.copy(state), read_constants(state) * scales
    if not state.nested:
        folded.absmax = constants
        return folded
    folded.offset = constants.mean()
    folded.absmax, folded.state2 = quantize_blockwise(constants - folded.offset, blocksize=state.state2.blocksize)
    return folded


class _ScaledProduct(torch.autograd.Function):
    """`x @ W.T` for W of folded constants. Of W only packed codes are kept; the backward pass unpacks pieces."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, scales: Tensor, weight: Tensor, state: QuantState, dtype: torch.dtype
    ) -> Tensor:
        """(..., in) to (..., out) in `dtype`."""
        # The inputs are kept as they came: layers side by side and their adapters keep the same tensor.
        ctx.save_for_backward(inputs, weight)
        ctx.state, ctx.folded = state, fold(state, scales)
        dense = _unpack(weight.view(torch.uint8), read_constants(ctx.folded), state, dtype, state.shape)
        return nn.functional.linear(inputs.to(dtype), dense)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs and, through the double quantization as if it were exact, of the factors."""
        inputs, weight = ctx.saved_tensors
        state, packed = ctx.state, weight.view(torch.uint8).flatten()
        constants, folded = read_constants(state), read_constants(ctx.folded)
        (rows, columns), size = state.shape, state.blocksize
        x, g = inputs.reshape(-1, columns).to(grad.dtype), grad.reshape(-1, rows)
        grad_inputs, grad_scales = torch.zeros_like(x), torch.empty_like(constants)
        # Pieces are whole rows and, as blocks run along the flattened weight, begin where a block does.
        whole = size // math.gcd(size, columns)
        step = max(1, _MAX_PIECE // (whole * columns)) * whole
        for first in range(0, rows, step):
            part = g[:, first : first + step]
            blocks = slice(first * columns // size, math.ceil((first + part.shape[1]) * columns / size))
            shape, codes = (part.shape[1], columns), packed[blocks.start * size // 2 : blocks.stop * size // 2]
            if ctx.needs_input_grad[0]:
                grad_inputs += part @ _unpack(codes, folded[blocks], state, x.dtype, shape)
            if ctx.needs_input_grad[1]:
                products = (part.T @ x).float() * _unpack(codes, constants[blocks], state, torch.float32, shape)
                filled = nn.functional.pad(products.flatten(), (0, -products.numel() % size))
                grad_scales[blocks] = filled.view(-1, size).sum(1)
        found = grad_inputs.view_as(inputs).to(inputs.dtype), grad_scales
        asked = zip(found, ctx.needs_input_grad, strict=False)
        return *(each if needed else None for each, needed in asked), None, None, None


def _unpack(codes: Tensor, constants: Tensor, state: QuantState, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Packed codes as a matrix of `shape`, which begins with a block."""
    # One row for each block: bitsandbytes' kernel for CPUs takes the wrong constants where rows are no whole blocks.
    size, plain = state.blocksize, copy.copy(state)
    plain.shape, plain.dtype, plain.nested, plain.absmax = torch.Size((len(constants), size)), dtype, False, constants
    filled = nn.functional.pad(codes.flatten(), (0, len(constants) * size // 2 - codes.numel()))
    unpacked: Tensor = dequantize_4bit(filled.view(-1, 1), plain)
    return unpacked.flatten()[: math.prod(shape)].view(shape)


@contextmanager
def folded_scales(model: Any) -> Iterator[None]:
    """Inside, the model is what is saved: ordinary layers with folded constants, in the dtype that it was loaded in."""
    network = base_network(model)
    dtype, kept = parse_dtype(network.config.dtype), float32_modules(network)
    layers: list[Any] = [(each, each.scales, each.weight.quant_state) for each in scaled_layers(network)]
    # PEFT prepares in float32 what is not quantized.
    plain = {name: each for name, each in network.named_parameters() if type(each) is nn.Parameter}
    cast = [
        (each, each.data)
        for name, each in plain.items()
        if each.is_floating_point() and ".lora_" not in name and kept.isdisjoint(name.split("."))
    ]
    try:
        for layer, *_ in layers:
            state = layer.folded_state()
            del layer.scales
            layer.__class__ = Linear4bit
            layer.weight.quant_state = layer.quant_state = state
        for parameter, data in cast:
            parameter.data = data.to(dtype)
        yield
    finally:
        for layer, scales, state in layers:
            layer.__class__, layer.scales = ScaledLinear4bit, scales
            layer.weight.quant_state = layer.quant_state = state
        for parameter, data in cast:
            parameter.data = data


def scaled_layers(network: Any) -> list[ScaledLinear4bit]:
    """The layers with factors."""
    return [each for each in network.modules() if isinstance(each, ScaledLinear4bit)]


def save_base(model: Any, folder: Path) -> None:
    """Write what is below the adapters of a folded model as an ordinary checkpoint."""
    network = base_network(model)
    # transformers takes no state dict for a quantized model, so the adapters step aside; wrappers of them come later.
    named = list(network.named_modules())
    adapted: list[Any] = [(name, each) for name, each in named if isinstance(each, BaseTunerLayer)]
    adapted += [(name, each) for name, each in named if isinstance(each, ModulesToSaveWrapper)]
    try:
        for name, each in adapted:
            network.set_submodule(name, each.original_module if hasattr(each, "original_module") else each.base_layer)
        network.save_pretrained(folder)
    finally:
        for name, each in adapted:
            network.set_submodule(name, each)


def save_scales(model: Any, folder: Path) -> None:
    """Write the factors and norms as they are trained."""
    tensors = {name: each.detach().cpu().contiguous() for name, each in scale_parameters(model).items()}
    save_file(tensors, folder / SCALES_NAME)


def load_scales(model: Any, folder: Path) -> None:
    """Go on with the factors and norms of a checkpoint."""
    path, own = folder / SCALES_NAME, scale_parameters(model)
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read, so factors cannot go on where they stopped: {error}. Name a checkpoint of a run "
            "with train_scales, or leave resume_from_checkpoint out."
        ) from error
    shapes, expected = ({name: each.shape for name, each in found.items()} for found in (stored, own))
    if shapes != expected:
        wrong = min(name for name in shapes | expected if shapes.get(name) != expected.get(name))
        raise ConfigError(
            f"{path} has {wrong} of shape {shapes.get(wrong)}, the student {expected.get(wrong)}. Resume with the "
            "student of the run, or leave resume_from_checkpoint out."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])
