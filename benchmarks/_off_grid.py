"""A teacher whose weights are on no quantization grid, made of one whose weights are on one.

The demo's model comes from a Q4_1 file: in each block of 32 inputs a linear layer's weights are its minimum plus 0 to
15 steps. A format that finds such a grid again loses less than it would on other models. So every linear weight gets
uniform noise N of up to a step to either side, and each layer is then fitted in full precision to its own output from
before: with C the second moment of its inputs, the ridge regression that adds -N C (C + r I)^-1 leaves

    N r (C + r I)^-1,

all of the noise where no input goes, and little where the inputs are. The KL to the model from before is measured on
training questions that are not looked at, and must be below `TARGET_KL`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkd import TransferSet
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.files import new_folder
from quantkd.models.layer_inputs import draw_rows, visit_layers

__all__ = ["leave_grid"]

BLOCK, LEVELS = 32, 16  # of Q4_1
RIDGE = 0.03  # of the inputs' mean square
TARGET_KL = 0.01  # nats per token
_ROWS, _HELD_OUT_ROWS = 48, 32


def leave_grid(name_or_path: str, rows: TransferSet, folder: Path) -> None:
    """Write the model off its grid to `folder`, with its figures in off_grid.json."""
    began = time.perf_counter()
    fitted, held_out = rows[:-_HELD_OUT_ROWS], rows[-_HELD_OUT_ROWS:]
    model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32).requires_grad_(False)
    head, generator = model.get_output_embeddings(), torch.Generator().manual_seed(0)
    layers = [each for each in model.modules() if isinstance(each, nn.Linear) and each is not head]
    before, after = [], []  # distances from the grid, in steps

    def visit(layer: Any, inputs: Tensor) -> None:
        low, step = read_grid(layer.weight)
        before.append(measure_distance(layer.weight, low, step))
        noise = (2 * torch.rand(layer.weight.shape, generator=generator) - 1) * step.repeat_interleave(BLOCK, dim=1)
        moment = inputs.T @ inputs / len(inputs)
        ridge = RIDGE * moment.diagonal().mean()
        layer.weight += ridge * torch.linalg.solve(moment + ridge * torch.eye(len(moment)), noise, left=False)
        after.append(measure_distance(layer.weight, low, step))

    with tqdm(total=len(layers), desc="off the grid", unit="layer", disable=None) as bar:
        visit_layers(model, layers, visit, draw_rows(fitted, _ROWS, seed=0), bar)
    kl = evaluate_fidelity(model, held_out).means["kl"]
    figures = {"kl": round(kl, 5), "seconds": round(time.perf_counter() - began, 1), "transfer_set": rows.digest}
    for when, distances in (("before", before), ("after", after)):
        found = torch.cat(distances)
        figures[f"on_grid_{when}"] = round(float((found < 0.01).float().mean()), 4)  # 0.02 of random weights
        figures[f"rms_distance_{when}"] = round(float(found.square().mean().sqrt()), 4)  # 0.289 of random weights
    print(f"off the grid: {figures}", flush=True)
    if kl >= TARGET_KL:
        raise SystemExit(f"The model off the grid is {kl:.4f} nats per token from its own; expected {TARGET_KL}.")
    with new_folder(folder) as new:
        model.save_pretrained(new)
        AutoTokenizer.from_pretrained(name_or_path).save_pretrained(new)
        (new / "off_grid.json").write_text(json.dumps(figures, indent=1) + "\n")


def read_grid(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) weights on a Q4_1 grid -> each block's lowest point and step, (out, in / 32)."""
    low, high = weight.unflatten(1, (-1, BLOCK)).aminmax(dim=2)
    return low, (high - low) / (LEVELS - 1)


def measure_distance(weight: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Of each weight to the nearest point of the grid, carried on to both sides, in steps."""
    places = (weight.unflatten(1, (-1, BLOCK)) - low.unsqueeze(2)) / step.unsqueeze(2)
    return (places - places.round()).abs().flatten()
