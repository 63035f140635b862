"""GGUF files: opened with every number checked, and their tensors by the names of transformers' modules.

The readers of `gguf` and transformers follow whatever counts and offsets a file states. Here a file is refused before
they see it if it is truncated, or if a count, a size or an offset in it does not fit (llama.cpp's docs/gguf.md).
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkd.errors import ConfigError, MissingDependencyError
from quantkd.models.network import base_network

_MAX_TENSORS, _MAX_FIELDS, _MAX_DIMENSIONS = 2**16, 2**14, 4
_MAX_TEXT = 2**24  # bytes of one text
_MAX_ITEMS = 2**21  # of all arrays together: for a vocabulary of 262,144 tokens 1.3 million, merges included
_ALIGNMENT = 32
# GGUF's types of values that have a fixed size, as `struct` names them; 8 is a text and 9 an array.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _ARRAY = 8, 9

# The architectures whose conversion by llama.cpp is known here, by transformers' model type.
_ARCHITECTURES = {
    "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3", "granite": "granite",
    "llama": "llama", "mistral": "llama", "olmo2": "olmo2", "phi3": "phi3", "qwen2": "qwen2",
    "qwen3": "qwen3", "smollm3": "smollm3", "starcoder2": "starcoder2",
}  # fmt: skip
_PERMUTED = ("granite", "llama", "smollm3")  # their queries and keys are stored in the order of GGML's rotation
_SHIFTED = ("gemma", "gemma2", "gemma3")  # their norms are stored with 1 added
# What a file may hold without a counterpart in transformers: frequencies, which transformers computes from the config.
COMPUTED_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """A tensor as it is stored, in the file's order of rows."""

    name: str
    kind: Any  # a gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # as torch counts, rows first
    blocks: NDArray[np.uint8]  # (..., bytes of a row), a view of the file

    @property
    def format(self) -> str:
        """The name of its type, such as `Q4_0`."""
        return str(self.kind.name)

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    def dequantize(self) -> Tensor:
        """The values in float32, as the package `gguf` defines them."""
        try:
            values = _gguf().quants.dequantize(np.asarray(self.blocks), self.kind)
        except NotImplementedError as error:
            raise ConfigError(
                f"{self.name} is stored in {self.format}, which the package gguf does not read."
            ) from error
        found = torch.from_numpy(np.array(values, dtype=np.float32).reshape(self.shape))
        if not bool(torch.isfinite(found).all()):
            raise ConfigError(f"{self.name} of the GGUF file has values that are not finite. Get the file anew.")
        return found

    def __deepcopy__(self, memo: Any) -> GgufTensor:
        return self  # a copy of a model reads the same file


@dataclass(frozen=True, eq=False)
class GgufFile:
    """An opened file. It is mapped, so its bytes are there as long as this is, also if the file is removed."""

    path: Path
    architecture: str
    metadata: dict[str, Any]  # numbers and texts; of an array its length
    arrays: set[str]  # which of them are arrays
    tensors: dict[str, GgufTensor]
    data: NDArray[np.uint8] = field(repr=False)  # all bytes; what is written into them stays in this process

    @property
    def format(self) -> str:
        """The name of its quantization, such as `q4_0` or `q4_k_m`, in small letters."""
        kinds, sizes = _gguf().LlamaFileType, dict[str, int]()
        for tensor in self.tensors.values():
            sizes[tensor.format] = sizes.get(tensor.format, 0) + tensor.blocks.nbytes
        most, stated = max(sizes, key=lambda name: sizes[name]).lower(), self.metadata.get("general.file_type")
        name = str(kinds(stated).name).split("_", 1)[-1].lower() if stated in iter(kinds) else most
        # A tool that quantizes may leave the type of the file that it read.
        return most if name in ("f32", "f16", "bf16", "guessed") else name

    def __deepcopy__(self, memo: Any) -> GgufFile:
        return self


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Map a file, once every count, size and offset in its header was checked against its length."""
    _gguf()
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no file {path}. Give a GGUF file.")
    if path.stat().st_size < 24:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes, too few for a GGUF file. Get the file anew.")
    data = np.memmap(path, mode="c")
    header = _Header(data, path)
    count, metadata = header.read_metadata()
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise header.broken("does not name its architecture (general.architecture)")
    if metadata.get("split.count", 1) not in (0, 1):
        raise ConfigError(
            f"{path} is one of {metadata['split.count']} parts of a model; expected the whole one. Join them with "
            "`llama-gguf-split --merge`."
        )
    blocks = metadata.get(f"{architecture}.block_count", 0)
    # Lists of this length are made before a tensor is looked up.
    if type(blocks) is not int or not 0 <= blocks <= count:
        raise header.broken(f"states {blocks!r:.40} layers and {count} tensors; expected more tensors than layers")
    tensors = header.read_tensors(count, metadata.get("general.alignment", _ALIGNMENT))
    return GgufFile(path, architecture, metadata, header.arrays, tensors, data)


class _Header:
    """Reads the header of a file from its front, and no byte that is not there."""

    def __init__(self, data: NDArray[np.uint8], path: Path) -> None:
        self._file, self._data, self._path = data, data.data, path
        self._place = self._items = 0
        self.arrays = set[str]()

    def broken(self, what: str) -> ConfigError:
        """An error that names the file."""
        return ConfigError(f"{self._path} {what}. It is broken, or no GGUF file; get it anew.")

    def read_metadata(self) -> tuple[int, dict[str, Any]]:
        """The number of tensors, and the metadata."""
        magic, version = struct.unpack_from("<4sI", self._data)
        self._place = 8
        if magic != b"GGUF":
            raise self.broken(f"starts with {magic!r}; expected b'GGUF'")
        if version not in (2, 3):
            reason = "is big-endian" if version and version % 2**16 == 0 else f"is of GGUF version {version}"
            raise ConfigError(f"{self._path} {reason}; expected version 2 or 3, little-endian. Convert the model anew.")
        tensors, fields = self._number("Q"), self._number("Q")
        for found, most, what in ((tensors, _MAX_TENSORS, "tensors"), (fields, _MAX_FIELDS, "metadata keys")):
            if found > most:
                raise self.broken(f"states {found:,} {what}; expected at most {most:,}")
        metadata = dict[str, Any]()
        for _ in range(fields):
            if (key := self._text()) in metadata:
                raise self.broken(f"has {key[:80]!r} twice in its metadata; expected each key once")
            metadata[key] = self._value(kind := self._number("I"))
            if kind == _ARRAY:
                self.arrays.add(key)
        return tensors, metadata

    def read_tensors(self, count: int, alignment: Any) -> dict[str, GgufTensor]:
        """The tensors, whose entries follow the metadata."""
        if type(alignment) is not int or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
            raise self.broken(f"states the alignment {alignment!r:.40}; expected a power of two")
        sizes, read = {int(kind): (kind, *each) for kind, each in _gguf().GGML_QUANT_SIZES.items()}, []
        for _ in range(count):
            name, dimensions = self._text(), self._number("I")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise self.broken(f"gives {name[:80]!r} {dimensions} dimensions; expected 1 to {_MAX_DIMENSIONS}")
            shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
            number, offset = self._number("I"), self._number("Q")
            if number not in sizes:
                raise self.broken(
                    f"stores {name[:80]!r} in type {number}, which the installed package gguf does not know"
                )
            kind, block, size = sizes[number]
            if 0 in shape or shape[-1] % block or offset % alignment:
                raise self.broken(
                    f"has {name[:80]!r} of shape {shape} at offset {offset}; expected rows of whole blocks of {block} "
                    f"({kind.name}), at a multiple of {alignment}"
                )
            read.append((offset, name, kind, shape, shape[-1] // block * size))
        last = start = -(-self._place // alignment) * alignment
        found = dict[str, GgufTensor]()
        for offset, name, kind, shape, row in sorted(read, key=lambda each: each[0]):
            first = start + offset
            end = first + math.prod(shape[:-1]) * row
            if end > len(self._data):
                raise ConfigError(
                    f"{self._path} is truncated: {name} ends at byte {end:,}, and the file has {len(self._data):,}. "
                    "Get the file anew."
                )
            if first < last or name in found:
                raise self.broken(f"has {name[:80]!r} where another tensor is, or twice")
            last = end
            found[name] = GgufTensor(name, kind, shape, self._file[first:end].reshape(*shape[:-1], row))
        return found

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            raise self.broken(f"has metadata of type {kind}, which GGUF does not have")
        kind, count = self._number("I"), self._number("Q")
        self._items += count
        if self._items > _MAX_ITEMS:
            raise self.broken(f"has arrays of {self._items:,} items in its metadata; expected at most {_MAX_ITEMS:,}")
        if kind in _NUMBERS:
            self._skip(count * struct.calcsize(_NUMBERS[kind]))
        elif kind == _TEXT:
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            raise self.broken(f"has an array of type {kind} in its metadata; expected numbers or texts")
        return count

    def _number(self, code: str) -> Any:
        first = self._place
        self._skip(struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self._data, first)[0]

    def _text(self) -> str:
        length = self._number("Q")
        if length > _MAX_TEXT:
            raise self.broken(f"states a text of {length:,} bytes; expected at most {_MAX_TEXT:,}")
        first = self._place
        self._skip(length)
        try:
            return bytes(self._data[first : self._place]).decode()
        except UnicodeDecodeError as error:
            raise self.broken("has a text that is not UTF-8") from error

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self._place:
            raise self.broken(f"ends within its header, at byte {len(self._data):,}")
        self._place += count


def architecture_of(config: Any) -> str:
    """GGUF's name of a model's architecture; refused where llama.cpp's conversion of it is not known here."""
    kind = config.get_text_config().model_type
    if kind not in _ARCHITECTURES:
        raise ConfigError(
            f"The model is of the type {kind}, whose GGUF files quantkd does not read; expected one of "
            f"{', '.join(sorted(_ARCHITECTURES))}. Use another format, such as nf4."
        )
    return _ARCHITECTURES[kind]


def map_modules(model: Any) -> dict[str, str]:
    """The names in GGUF of modules with a weight, such as `blk.0.attn_q` of `model.layers.0.self_attn.q_proj`."""
    gguf, network = _gguf(), base_network(model)
    architecture = architecture_of(network.config)
    (number,) = [each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(number, network.config.get_text_config().num_hidden_layers)
    with_weight = [name for name, module in network.named_modules() if hasattr(module, "weight")]
    found = {name: names.get_name(name.replace("model.language_model.", "model.")) for name in with_weight}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def order_rows(config: Any, name: str, rows: int) -> Tensor | None:
    """(rows,) the order in which a tensor's rows are stored, `weight[order]`; None where it is transformers' own."""
    # llama.cpp rotates pairs of neighbours, and transformers the two halves of a head.
    config, part = config.get_text_config(), name.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
    if architecture_of(config) not in _PERMUTED or part not in ("attn_q", "attn_k"):
        return None
    heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()


def read_values(config: Any, tensor: GgufTensor) -> Tensor:
    """A tensor's values as the parameter of transformers has them, in float32."""
    values = tensor.dequantize()
    if architecture_of(config) in _SHIFTED and tensor.name.endswith("norm.weight"):
        values -= 1
    order = order_rows(config, tensor.name, len(values))
    return values if order is None else values[order.argsort()]


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            "GGUF files need the package gguf, which is not installed. Run: pip install gguf"
        ) from error
    return gguf
