"""LoRA from the quantization error: a start that gives back most of what rounding took, before the first step.

With E = W - dequantize(Q(W)) and C the second moment of a layer's inputs, the rank-r correction D that least disturbs
the layer's output, min E_x |(E - D) x|^2, is the rank-r SVD of E C^(1/2), with C^(1/2) undone on the right (EoRA, Liu
et al. 2024, arXiv:2410.21271; QERA, Zhang et al. 2024, arXiv:2410.06040).

The moments come from one forward pass over a few rows. A decoder layer is corrected as soon as its own forward pass is
over, and run once more, so that the next layer sees corrected inputs; only one layer's moments exist at a time, and
original weights are read from the checkpoint one by one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from quantkd.cpu_packing import unpack
from quantkd.errors import ConfigError

__all__ = ["OriginalWeights", "compute_correction", "initialize_from_error", "initialize_from_rows"]

logger = logging.getLogger(__name__)

# With few tokens a moment's small eigenvalues are noise; this share of their mean is added to all of them.
_SHRINKAGE = 1e-2
_OVERSAMPLING, _POWER_ITERATIONS = 8, 4


class OriginalWeights:
    """The full-precision weights of a checkpoint, read one at a time from its safetensors files.

    Args:
        name_or_path: a checkpoint folder, or a Hub name that `from_pretrained` has loaded.
        revision: of a Hub name.

    Raises:
        ConfigError: the checkpoint has no safetensors files.
    """

    def __init__(self, name_or_path: str, revision: str | None = None) -> None:
        def find(file: str) -> str | None:
            found: str | None = cached_file(
                name_or_path, file, revision=revision, _raise_exceptions_for_missing_entries=False
            )
            return found

        index, single = find(SAFE_WEIGHTS_INDEX_NAME), find(SAFE_WEIGHTS_NAME)
        if index is not None:
            places: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            self._find: Callable[[str], str | None] = find
            self._files = places
        elif single is not None:
            with safe_open(single, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
            self._find = find
        else:
            raise ConfigError(
                f"{name_or_path} has no safetensors weights to compare the quantized ones with. "
                "Convert the checkpoint, or start from zero with init='zero'."
            )

    def read(self, module_name: str) -> Tensor | None:
        """The weight of a linear layer by its module name in the base model; None if the checkpoint names none so."""
        key = f"{module_name}.weight"
        for candidate in (key, key.removeprefix("model."), f"model.{key}"):
            if candidate in self._files and (path := self._find(self._files[candidate])) is not None:
                with safe_open(path, framework="pt") as file:
                    weight: Tensor = file.get_tensor(candidate)
                return weight
        return None


def compute_correction(error: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the rank-r matrix D = B A that minimises `trace((E - D) C (E - D)^T)`.

    Args:
        error: E (out, in), float32 or float64.
        moment: C (in, in), symmetric, not negative; a share of its mean eigenvalue is added before it is inverted.
        rank: r, at most min(out, in).

    Returns:
        B (out, r) and A (r, in); each pair of a column of B and a row of A has equal norms.
    """
    size = moment.shape[0]
    values, vectors = torch.linalg.eigh(moment + moment.diagonal().mean() * _SHRINKAGE * torch.eye(size).to(moment))
    roots = values.clamp_min(torch.finfo(moment.dtype).tiny).sqrt()
    weighted = (error @ vectors) * roots  # E C^(1/2), up to a rotation on the right that the SVD does not see
    wide = min(rank + _OVERSAMPLING, *weighted.shape)
    with torch.random.fork_rng(devices=[weighted.device] if weighted.device.type == "cuda" else []):
        torch.manual_seed(0)  # the randomized SVD must not differ between processes
        left, sigma, right = torch.svd_lowrank(weighted, q=wide, niter=_POWER_ITERATIONS)
    up = left[:, :rank] * sigma[:rank]
    down = (right[:, :rank].T / roots) @ vectors.T
    balance = (down.norm(dim=1) / up.norm(dim=0).clamp_min(torch.finfo(up.dtype).tiny)).sqrt()
    return up * balance, down / balance.unsqueeze(1).clamp_min(torch.finfo(up.dtype).tiny)


def initialize_from_error(
    model: Any, input_ids: Tensor, attention_mask: Tensor, weights: OriginalWeights, *, progress: bool = True
) -> int:
    """Set every LoRA adapter of a quantized model to the best correction of its layer's quantization error.

    Args:
        model: a quantized model with LoRA attached by PEFT.
        input_ids: (B, T) calibration rows.
        attention_mask: (B, T), 0 at padding.
        weights: the checkpoint that the model was quantized from.
        progress: show a bar over decoder layers, if there is a terminal.

    Returns:
        How many adapters were set; the others keep their zero start.
    """
    layers = _decoder_layers(model)
    names = {module: name for name, module in model.get_base_model().named_modules()}
    mask = attention_mask.bool()
    bar = tqdm(total=len(layers), desc="initialization", unit="layer", disable=None if progress else True)
    handles, done = [], [0]

    def attend(layer: nn.Module) -> None:
        targets = {m: names[m] for m in layer.modules() if isinstance(m, LoraLayer)}
        moments = _Moments(mask)
        hooks: list[Any] = []

        def before(module: nn.Module, args: Any) -> None:
            hooks.extend(target.register_forward_pre_hook(moments.add) for target in targets)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            for hook in hooks:
                hook.remove()
            done[0] += sum(_correct(target, name, moments.of(target), weights) for target, name in targets.items())
            bar.update()
            return module.forward(*args, **kwargs)

        handles.append(layer.register_forward_pre_hook(before))
        handles.append(layer.register_forward_hook(after, with_kwargs=True))

    for layer in layers:
        attend(layer)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), bar:
            device = model.device
            model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return done[0]


def initialize_from_rows(
    model: Any, dataset: Any, name_or_path: str, *, revision: str | None = None, rows: int = 32, seed: int = 0
) -> None:
    """`initialize_from_error` on rows of a data set; where it cannot be done, the zero start stays, with a warning.

    Args:
        model: a quantized model with LoRA attached by PEFT.
        dataset: a `TransferSet`, or any sized data set whose rows hold `input_ids`.
        name_or_path: the checkpoint that the model was quantized from.
        revision: of a Hub name.
        rows: how many rows to look at, drawn at random.
        seed: which.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:rows]
    chosen = [torch.as_tensor(dataset[row]["input_ids"]) for row in order.tolist()]
    input_ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    lengths = torch.tensor([len(row) for row in chosen])
    mask = (torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)).long()
    try:
        weights = OriginalWeights(name_or_path, revision)
        initialize_from_error(model, input_ids, mask, weights)
    except (ConfigError, OSError) as error:
        logger.warning("The adapters start from zero: %s", error)


class _Moments:
    """Second moments of inputs, without padding; layers that share an input share its moment."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.last: tuple[Tensor, Tensor] | None = None
        self.by_module: dict[nn.Module, Tensor] = {}

    def add(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0]
        if self.last is None or self.last[0] is not inputs:
            rows = inputs[self.mask.to(inputs.device)] if inputs.shape[:-1] == self.mask.shape else inputs
            rows = rows.reshape(-1, rows.shape[-1]).float()
            self.last = (inputs, rows.T @ rows / len(rows))
        self.by_module[module] = self.last[1]

    def of(self, module: nn.Module) -> Tensor | None:
        return self.by_module.pop(module, None)


def _correct(target: Any, name: str, moment: Tensor | None, weights: OriginalWeights) -> bool:
    original = weights.read(name)
    adapters = [adapter for adapter in target.active_adapters if adapter in target.lora_A]
    if moment is None or original is None or len(adapters) != 1:
        logger.warning("The adapter of %s starts from zero: %s.", name, _why(moment, original))
        return False
    (adapter,) = adapters
    base = target.get_base_layer()
    unpack(base)
    error = original.to(moment.device).float() - dequantize_module_weight(base).float()
    up, down = compute_correction(error, moment, target.r[adapter])
    down_weight, up_weight = target.lora_A[adapter].weight, target.lora_B[adapter].weight
    up_weight.data.copy_(up / target.scaling[adapter])
    down_weight.data.copy_(down)
    return True


def _why(moment: Tensor | None, original: Tensor | None) -> str:
    if moment is None:
        return "its layer was not run"
    return "the checkpoint has no weight of its name" if original is None else "it has not one active adapter"


def _decoder_layers(model: Any) -> list[nn.Module]:
    """The modules of the longest list that holds LoRA layers: the decoder layers of any transformer."""

    def lists() -> Iterator[nn.ModuleList]:
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and any(isinstance(child, LoraLayer) for child in module.modules()):
                yield module

    found = max(lists(), key=len, default=None)
    if found is None:
        raise ConfigError("The model has no list of decoder layers with LoRA adapters; start from zero instead.")
    return list(found)
