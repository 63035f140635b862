"""The full-precision weights of a checkpoint, read one at a time under the names that the loaded model gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from quantkd.errors import ConfigError
from quantkd.names import find_file

_FULL_PRECISION = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class OriginalWeights:
    """The weights of a checkpoint's linear layers, by the names of the model's modules.

    transformers renames, and for some families converts, what it loads; the same mapping is asked here. A weight that
    it converts (splits, merges, permutes) is not read.

    Args:
        name_or_path: a checkpoint folder, or a Hub name that `from_pretrained` has loaded.
        model: the model of transformers that the names belong to, with or without adapters inside.
        revision: of a Hub name.

    Raises:
        ConfigError: the checkpoint has no safetensors files.
    """

    def __init__(self, name_or_path: str, model: Any, revision: str | None = None) -> None:
        self.name_or_path, self.revision = name_or_path, revision
        self._files = self._list_files()
        self._keys, self._converted = _map_keys(list(self._files), model)

    def read(self, module_name: str) -> Tensor:
        """The weight of a linear layer."""
        name = f"{module_name}.weight"
        if name in self._converted:
            raise ConfigError(f"{name} is made of other tensors of {self.name_or_path} when it is loaded.")
        if name not in self._keys and f"{module_name}.qweight" in self._files:
            raise ConfigError(
                f"{module_name} of {self.name_or_path} is packed, as by GPTQ or AWQ; expected full precision. "
                "Name the full-precision checkpoint as init_from."
            )
        if name not in self._keys:
            raise ConfigError(f"{self.name_or_path} has no tensor for {name}.")
        path = self._find(self._files[self._keys[name]])
        if path is None:
            raise ConfigError(f"{self._files[self._keys[name]]} of {self.name_or_path} is not there.")
        with safe_open(path, framework="pt") as file:
            weight: Tensor = file.get_tensor(self._keys[name])
        if weight.dtype not in _FULL_PRECISION:
            raise ConfigError(
                f"{name} of {self.name_or_path} is stored as {weight.dtype}, quantized already; expected one of "
                f"{', '.join(map(str, _FULL_PRECISION))}. Name the full-precision checkpoint as init_from."
            )
        return weight

    def _find(self, file: str) -> Path | None:
        return find_file(self.name_or_path, file, revision=self.revision)

    def _list_files(self) -> dict[str, str]:
        """The file of each tensor."""
        if (index := self._find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
            places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return places
        if (single := self._find(SAFE_WEIGHTS_NAME)) is not None:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        raise ConfigError(
            f"{self.name_or_path} has no safetensors weights to compare the quantized ones with. "
            "Convert the checkpoint, name another as init_from, or start from zero with init='zero'."
        )


def _map_keys(keys: list[str], model: Any) -> tuple[dict[str, str], set[str]]:
    """Keys of the checkpoint by names of the model's weights, and the names whose weights are converted."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    wanted = {f"{name}.weight": True for name, _ in model.named_modules()}
    found: dict[str, str] = {}
    converted: set[str] = set()
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        if pattern is None:
            found[name] = key
        else:
            matched = [converter for converter in converters if pattern in converter.source_patterns]
            converted.update(
                name.replace(converter.target_patterns[0], target)
                for converter in matched
                for target in converter.target_patterns
            )
    return found, converted
