"""The codes of GGUF's block formats: where they are in a block, and the choice of others on the grid of the file.

A block holds constants and the codes of its values, and every value is `lowest + code * step` with both per value. The
constants are what the file stores; lowest and step are read off what the package `gguf` makes of the block with all
codes at their lowest and at their highest. So here is only where codes are stored (ggml's ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkd.errors import ConfigError
from quantkd.models.codes import Moment, choose_codes
from quantkd.models.gguf_files import GgufTensor, order_rows

Blocks = NDArray[np.uint8]  # (blocks, bytes) or codes (blocks, values)


def _halves(codes: Blocks, groups: int) -> Blocks:
    """The low four bits of two halves of each group in one byte."""
    low = (codes & 15).reshape(len(codes), groups, 2, -1)
    both: Blocks = (low[:, :, 0] | low[:, :, 1] << 4).astype(np.uint8)
    return both.reshape(len(codes), -1)


def _bits(codes: Blocks, shift: int, bits: int) -> Blocks:
    """The bits from `shift` on of values that are 32 apart, `bits` of each in one byte of 32."""
    high = (codes >> shift & (2**bits - 1)).reshape(len(codes), -1, 8 // bits, 32).astype(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, 1)
    joined: Blocks = np.bitwise_or.reduce(high << shifts, axis=2)
    return joined.reshape(len(codes), -1)


def _row_bits(codes: Blocks) -> Blocks:
    """The fifth bit of 32 neighbours in four bytes."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


# By the name of the format: the number of codes, and the parts of a block that hold them, as first byte and bytes.
_FORMATS: dict[str, tuple[int, dict[int, Callable[[Blocks], Blocks]]]] = {
    "Q4_0": (16, {2: lambda codes: _halves(codes, 1)}),
    "Q4_1": (16, {4: lambda codes: _halves(codes, 1)}),
    "Q5_0": (32, {2: _row_bits, 6: lambda codes: _halves(codes, 1)}),
    "Q5_1": (32, {4: _row_bits, 8: lambda codes: _halves(codes, 1)}),
    "Q8_0": (255, {2: lambda codes: (codes.astype(np.int16) - 127).astype(np.int8).view(np.uint8)}),
    "Q2_K": (4, {16: lambda codes: _bits(codes, 0, 2)}),
    "Q3_K": (8, {0: lambda codes: _bits(codes, 2, 1), 32: lambda codes: _bits(codes, 0, 2)}),
    "Q4_K": (16, {16: lambda codes: _halves(codes, 4)}),
    "Q5_K": (32, {16: lambda codes: _bits(codes, 4, 1), 48: lambda codes: _halves(codes, 4)}),
    "Q6_K": (64, {0: lambda codes: _halves(codes, 2), 128: lambda codes: _bits(codes, 4, 2)}),
}


def has_codes(tensor: GgufTensor) -> bool:
    """Whether the codes of a tensor's format are known here."""
    return tensor.format in _FORMATS


def with_codes(tensor: GgufTensor, codes: NDArray[Any]) -> Blocks:
    """A tensor's blocks with other codes, (rows, columns) from the lowest value, and the constants that they have."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    blocks = np.array(tensor.blocks).reshape(-1, size)
    codes = np.broadcast_to(codes, tensor.shape).astype(np.uint8).reshape(-1, values)
    for first, pack in _FORMATS[tensor.format][1].items():
        part = pack(codes)
        blocks[:, first : first + part.shape[1]] = part
    return blocks.reshape(tensor.blocks.shape)


def split_blocks(tensor: GgufTensor) -> dict[str, Tensor]:
    """The bytes of codes and those of the blocks' constants; all are codes in a format that is not known here."""
    import gguf

    size = gguf.GGML_QUANT_SIZES[tensor.kind][1]
    blocks = torch.from_numpy(np.array(tensor.blocks)).view(-1, size)
    if not has_codes(tensor):
        return {"codes": blocks}
    constant = torch.ones(size, dtype=torch.bool)
    for first, pack in _FORMATS[tensor.format][1].items():
        constant[first : first + pack(np.zeros((1, gguf.GGML_QUANT_SIZES[tensor.kind][0]), np.uint8)).shape[1]] = False
    return {"codes": blocks[:, ~constant], "constants": blocks[:, constant]}


def calibrate_gguf_layer(
    layer: Any, config: Any, original: Tensor, inputs: Moment | None, outputs: Sequence[Moment] = ()
) -> None:
    """Choose the codes of a layer's tensor anew, for the inputs it gets, in the file's bytes and in the layer."""
    tensor: GgufTensor = layer.gguf_tensor
    if not has_codes(tensor):
        raise ConfigError(f"it is stored as {tensor.format}; codes are chosen for {', '.join(_FORMATS)}.")
    order = order_rows(config, tensor.name, len(original))
    stored = torch.arange(len(original)) if order is None else order
    back, weight, count = stored.argsort(), original.float(), _FORMATS[tensor.format][0]
    lowest, highest = (
        tensor.replace_blocks(with_codes(tensor, np.array(code))).dequantize()[back].to(weight)
        for code in (0, count - 1)
    )
    step = (highest - lowest) / (count - 1)
    before = ((tensor.dequantize()[back].to(weight) - lowest) / step).nan_to_num().round().long()
    codes = choose_codes(weight - lowest, step, torch.arange(count).to(weight), inputs, outputs, before).cpu()
    tensor.blocks[...] = with_codes(tensor, codes[stored].numpy())
    layer.weight.data.copy_(tensor.dequantize()[back])
