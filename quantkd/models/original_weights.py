"""The full-precision weights of a checkpoint, read one at a time under the names that the loaded model gives them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from quantkd.errors import ConfigError, MissingDependencyError
from quantkd.files import read_object
from quantkd.foreign import map_checkpoint
from quantkd.models.weights import FULL_PRECISION, dequantize_weight
from quantkd.names import find_file

logger = logging.getLogger(__name__)


class OriginalWeights:
    """The full-precision weights of a checkpoint's linear layers, by the names of the model's modules."""

    # Named as transformers renames what it loads. A weight that it converts (splits, merges, permutes) is not read.

    def __init__(self, name_or_path: str, model: Any, revision: str | None = None) -> None:
        self.name_or_path, self.revision = name_or_path, revision
        self._files = self._list_files()
        self._keys, self._converted, self._loaded = dict[str, str](), set[str](), dict[str, Tensor]()
        try:
            self._keys, self._converted = map_checkpoint(list(self._files), model)
        except MissingDependencyError as error:
            logger.warning("The checkpoint is loaded whole, which takes its size in memory: %s", error)
            self._loaded = type(model).from_pretrained(name_or_path, revision=revision, dtype="auto").state_dict()

    def read(self, module_name: str) -> Tensor:
        """The weight of a linear layer."""
        name = f"{module_name}.weight"
        if name in self._converted:
            raise ConfigError(f"{name} is made of other tensors of {self.name_or_path} when it is loaded.")
        if (key := self._keys.get(name)) is not None:
            path = self._find(self._files[key])
            if path is None:
                raise ConfigError(f"{self._files[key]} of {self.name_or_path} is not there.")
            with safe_open(path, framework="pt") as file:
                weight: Tensor = file.get_tensor(key)
        elif name in self._loaded:
            weight = self._loaded[name]
        elif f"{module_name}.qweight" in self._files:
            raise ConfigError(
                f"{module_name} of {self.name_or_path} is packed, as by GPTQ or AWQ; expected full precision. "
                "Name the full-precision checkpoint as init_from."
            )
        else:
            raise ConfigError(f"{self.name_or_path} has no tensor for {name}.")
        if weight.dtype not in FULL_PRECISION:
            raise ConfigError(
                f"{name} of {self.name_or_path} is stored as {weight.dtype}, quantized already; expected one of "
                f"{', '.join(map(str, FULL_PRECISION))}. Name the full-precision checkpoint as init_from."
            )
        return weight

    def _find(self, file: str) -> Path | None:
        return find_file(self.name_or_path, file, revision=self.revision)

    def _list_files(self) -> dict[str, str]:
        """The file of each tensor."""
        if (index := self._find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
            places: dict[str, str] = read_object(index)["weight_map"]
            return places
        if (single := self._find(SAFE_WEIGHTS_NAME)) is not None:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        raise ConfigError(
            f"{self.name_or_path} has no safetensors weights to compare the quantized ones with. "
            "Convert the checkpoint, name another as init_from, or start from zero with init='zero'."
        )


def read_original(weights: OriginalWeights, name: str, layer: Any) -> Tensor:
    """The weight that a quantized layer was made from, (out, in); refuses one that it was not made from."""
    quantized, original = dequantize_weight(layer), weights.read(name)
    if issubclass(getattr(layer, "source_cls", type(layer)), Conv1D):  # GPT-2's, stored as (in, out)
        original = original.T
    if original.shape != quantized.shape:
        raise ConfigError(f"its checkpoint's weight is {tuple(original.shape)}, and its own {tuple(quantized.shape)}.")
    original = original.to(quantized.device)
    if (original.float() - quantized.float()).norm() > original.float().norm():
        raise ConfigError("its weight is farther from the checkpoint's than zero is: it was not quantized from it.")
    return original
