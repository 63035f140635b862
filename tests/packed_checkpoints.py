"""Students in every format, and GPTQ and AWQ checkpoints whose true weight is known without their library."""

# 4-bit integers in groups of 32 inputs, rounded to nearest, as AutoGPTQ (version 1) and AutoAWQ (GEMM) store them.

import copy
import json
import shutil
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TorchAoConfig

from quantkd.models.student import load_student

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's eight nibbles, the lowest first
NEEDS = {"hqq": "hqq", "torchao-int8": "torchao", "gptq": "gptqmodel", "awq": "gptqmodel"}
_BITS = {"bits": 4, "group_size": GROUP}
CONFIGS = {
    "gptq": {"quant_method": "gptq", **_BITS, "desc_act": False, "sym": False, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", **_BITS, "zero_point": True, "version": "gemm"},
}


def require_package(name):
    """Skip the test where the package of a student's format is not installed."""
    pytest.importorskip(NEEDS.get(name, "torch"), reason=f"{name} needs the package {NEEDS.get(name)}")


def load_in(name, path, folder=None, dtype="float32"):
    """A student of a full-precision checkpoint; a packed checkpoint is written to `folder` first."""
    require_package(name)
    config: Any = name
    if name == "hqq":
        return copy.deepcopy(_quantize_with_hqq(path, getattr(torch, dtype)))
    if name in CONFIGS and folder is not None:
        if not folder.exists():
            write_packed_checkpoint(name, path, folder)
        path, config = folder, None
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    return load_student(str(path), quantization_config=config, dtype=dtype)


@cache
def _quantize_with_hqq(path, dtype):
    """It takes seconds to find its scales."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return AutoHQQHFModel.quantize_model(model, config, compute_dtype=dtype, device="cpu")


def write_packed_checkpoint(method, source, folder):
    """Write `source` with its projections packed; what they stand for by module name, (out, in) in float64."""
    shutil.copytree(source, folder)
    tensors, truth = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "_proj." not in name:
            tensors[name] = tensor
            continue
        module = name.removesuffix(".weight")
        q, scales, zeros, truth[module] = _round(tensor.double())
        if method == "gptq":  # along the inputs; the zeros less one; the group of each input
            tensors[f"{module}.qweight"] = _to_words(q).T.contiguous()
            tensors[f"{module}.qzeros"] = _to_words(zeros.T - 1)
            tensors[f"{module}.g_idx"] = (torch.arange(q.shape[1]) // GROUP).int()
        else:  # along the outputs, in an order of its own
            tensors[f"{module}.qweight"] = _to_words(q.T, AWQ_ORDER)
            tensors[f"{module}.qzeros"] = _to_words(zeros.T, AWQ_ORDER)
        tensors[f"{module}.scales"] = scales.T.half().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIGS[method]}))
    return truth


def _round(weight):
    """q (out, in), scales and zeros (out, groups), and what they stand for."""
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).half().double()
    zeros = (-low / scales).round().clamp(1, 15)
    q = (groups / scales.unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, 15)
    stands_for = (q - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    return q.view_as(weight).long(), scales, zeros.long(), stands_for.view_as(weight)


def _to_words(nibbles, order=tuple(range(8))):
    """(..., 8 n) integers below 16 to (..., n) int32, one nibble each."""
    eights = nibbles.unflatten(-1, (-1, 8))
    words = sum(eights[..., index] << (4 * place) for place, index in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()
