"""The codes of GGUF's block formats: where they are in a block, and the choice of others on the grid of the file.

A block holds constants and the codes of its values, and every value is `lowest + code * step` with both per value. The
constants are what the file stores; lowest and step are read off what the package `gguf` makes of the block with all
codes at their lowest and at their highest. So here is only where codes are stored (ggml's ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkd.errors import ConfigError
from quantkd.models.codes import Moment, choose_codes
from quantkd.models.gguf_files import GgufTensor, order_rows

# By the name of the format: the number of codes, and by their first byte the parts of a block that hold them. A part
# has `bits` bits of each value, from `shift` on, and one byte of it those of values that are `stride` apart.
_FORMATS: dict[str, tuple[int, dict[int, tuple[int, int, int]]]] = {  # shift, bits, stride
    "Q4_0": (16, {2: (0, 4, 16)}),
    "Q4_1": (16, {4: (0, 4, 16)}),
    "Q5_0": (32, {2: (4, 1, 1), 6: (0, 4, 16)}),
    "Q5_1": (32, {4: (4, 1, 1), 8: (0, 4, 16)}),
    "Q8_0": (255, {2: (0, 8, 1)}),
    "Q2_K": (4, {16: (0, 2, 32)}),
    "Q3_K": (8, {0: (2, 1, 32), 32: (0, 2, 32)}),
    "Q4_K": (16, {16: (0, 4, 32)}),
    "Q5_K": (32, {16: (4, 1, 32), 48: (0, 4, 32)}),
    "Q6_K": (64, {0: (0, 4, 64), 128: (4, 2, 32)}),
}


def with_codes(tensor: GgufTensor, codes: NDArray[Any]) -> GgufTensor:
    """A tensor with other codes, (rows, columns) from the lowest value, and the constants that it has."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    blocks = np.array(tensor.blocks).reshape(-1, size)
    codes = np.broadcast_to(codes, tensor.shape).astype(np.uint8).reshape(-1, values)
    if tensor.format == "Q8_0":
        codes -= 127  # stored with their sign
    for first, (shift, bits, stride) in _FORMATS[tensor.format][1].items():
        part = (codes >> shift & 2**bits - 1).reshape(len(codes), -1, 8 // bits, stride)
        places = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, 1)
        joined = np.bitwise_or.reduce(part << places, axis=2).reshape(len(codes), -1)
        blocks[:, first : first + joined.shape[1]] = joined
    return replace(tensor, blocks=blocks.reshape(tensor.blocks.shape))


def split_blocks(tensor: GgufTensor) -> dict[str, Tensor]:
    """The bytes of codes and those of the blocks' constants; all are codes in a format that is not known here."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    blocks = torch.from_numpy(np.array(tensor.blocks)).view(-1, size)
    if tensor.format not in _FORMATS:
        return {"codes": blocks}
    constant = torch.ones(size, dtype=torch.bool)
    for first, (_, bits, _) in _FORMATS[tensor.format][1].items():
        constant[first : first + values * bits // 8] = False
    return {"codes": blocks[:, ~constant], "constants": blocks[:, constant]}


def calibrate_gguf_layer(
    layer: Any, config: Any, original: Tensor, inputs: Moment | None, outputs: Sequence[Moment] = ()
) -> None:
    """Choose the codes of a layer's tensor anew, for the inputs it gets, in the file's bytes and in the layer."""
    tensor: GgufTensor = layer.gguf_tensor
    if tensor.format not in _FORMATS:
        raise ConfigError(f"it is stored as {tensor.format}; codes are chosen for {', '.join(_FORMATS)}.")
    order = order_rows(config, tensor.name, len(original))
    stored = torch.arange(len(original)) if order is None else order
    back, weight, count = stored.argsort(), original.float(), _FORMATS[tensor.format][0]
    ends = (with_codes(tensor, np.array(code)).dequantize() for code in (0, count - 1))
    lowest, highest = (values[back].to(weight) for values in ends)
    step = (highest - lowest) / (count - 1)
    before = ((tensor.dequantize()[back].to(weight) - lowest) / step).nan_to_num().round().long()
    codes = choose_codes(weight - lowest, step, torch.arange(count).to(weight), inputs, outputs, before).cpu()
    tensor.blocks[...] = with_codes(tensor, codes[stored].numpy()).blocks
    layer.weight.data.copy_(tensor.dequantize()[back])
