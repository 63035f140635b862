"""DistillKit's compressed log-probabilities: what its `sample_logits_vllm` writes, decoded to plain numbers.

Of each position the k most probable tokens are kept: their ids in as few bits as the vocabulary needs, and their
log-probabilities as the first `exact_k` in plain floats, then a polynomial in the rank, then residuals in few bits.
Which of these there are stands in the `compression_config.yaml` beside the table.

Reference:
    `distillkit/compression` in github.com/arcee-ai/DistillKit. What is here is written anew, after what that does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from quantkd.errors import DataError
from quantkd.transfer_set.plan import MAX_VOCAB_SIZE, is_whole

_FLOAT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_SPECIAL_TERMS = {"sqrt": np.sqrt, "exp": np.exp}
_MAX_BITS = 32  # wider codes than an id needs are of no use


@dataclass(frozen=True)
class ResidualBin:
    """A run of residuals that share one scale.

    Args:
        scale_dtype: the float type of the scale.
        element_bits: bits of each residual.
        num_elements: residuals in the run.
    """

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True)
class CompressedLayout:
    """How the bytes of one position are laid out; the fields are named as in DistillKit's file.

    Args:
        d: size of the vocabulary, which decides the bits of an id.
        k: entries a position.
        exact_k: how many of them, from the most probable on, are plain floats.
        exact_dtype: their type.
        polynomial_terms: powers of the rank, or "sqrt" and "exp" of it, whose sum stands for the others.
        term_dtype: the type of the coefficients.
        residual_bins: corrections to that sum, from the first approximated entry on.
        delta_encoding: each number is the difference to the one before it.
        normalize_t: the rank runs from 0 to 1 instead of 0, 1, 2, ...
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[ResidualBin, ...] = ()
    delta_encoding: bool = True
    normalize_t: bool = False

    @classmethod
    def load(cls, path: Path) -> CompressedLayout:
        """Read a `compression_config.yaml`."""
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(
                f"{path}, which says how DistillKit compressed the table, cannot be read: {error}. "
                "Expected the YAML file that its capture wrote; copy it beside the table."
            ) from error
        try:
            layout = cls._from_fields(value)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path} is not a compression configuration of DistillKit: {error}. "
                "Expected the YAML file that its capture wrote; copy it beside the table."
            ) from error
        return layout

    @classmethod
    def _from_fields(cls, value: Mapping[str, Any]) -> CompressedLayout:
        """A layout from the fields of a file; ValueError and its like for what makes no sense."""
        fields = {name: field for name, field in value.items() if name != "error_diffusion"}  # of no use to a reader
        fields["polynomial_terms"] = tuple(fields.get("polynomial_terms") or ())
        fields["residual_bins"] = tuple(ResidualBin(**part) for part in fields.get("residual_bins") or ())
        layout = cls(**fields)
        floats = [layout.exact_dtype, layout.term_dtype, *(part.scale_dtype for part in layout.residual_bins)]
        _require(all(name in _FLOAT_BYTES for name in floats), f"dtypes {floats}, expected {', '.join(_FLOAT_BYTES)}")
        _require(is_whole(layout.d, 1, MAX_VOCAB_SIZE), f"d is {layout.d!r}")
        _require(is_whole(layout.k, 1, layout.d), f"k is {layout.k!r}, expected 1 to d = {layout.d}")
        _require(is_whole(layout.exact_k, 0, layout.k), f"exact_k is {layout.exact_k!r}, expected 0 to k")
        for part in layout.residual_bins:
            _require(is_whole(part.element_bits, 1, _MAX_BITS), f"element_bits is {part.element_bits!r}")
            _require(is_whole(part.num_elements, 1, layout.k), f"num_elements is {part.num_elements!r}")
        corrected = sum(part.num_elements for part in layout.residual_bins)
        _require(corrected <= layout.k - layout.exact_k, f"{corrected} residuals, expected at most k - exact_k")
        for term in layout.polynomial_terms:
            _require(term in _SPECIAL_TERMS or is_whole(term, 0, 64), f"the polynomial term {term!r}")
        return layout

    @property
    def id_bits(self) -> int:
        """Bits of one token id."""
        return (self.d - 1).bit_length()

    def decode_ids(self, data: ArrayLike) -> NDArray[np.int64]:
        """Token ids from `bytepacked_indices`.

        Shapes: returns (T, k).
        """
        table = np.asarray(data, dtype=np.uint8)
        expected = -(-self.k * self.id_bits // 8)
        if table.ndim != 2 or table.shape[1] != expected:
            raise ValueError(f"ids of shape {table.shape}, expected {expected} bytes a position")
        return _unpack(table, self.id_bits, self.k)

    def decode_logprobs(self, data: ArrayLike) -> NDArray[np.float64]:
        """Log-probabilities from `compressed_logprobs`.

        Shapes: data (T, B), returns (T, k).
        """
        table = np.asarray(data, dtype=np.uint8)
        if table.ndim != 2 or table.shape[1] != self._num_bytes():
            raise ValueError(f"log-probabilities of shape {table.shape}, expected {self._num_bytes()} bytes a position")
        exact, table = _take_floats(table, self.exact_k, self.exact_dtype)
        coefficients, table = _take_floats(table, len(self.polynomial_terms), self.term_dtype)
        rest = self.k - self.exact_k
        approximate = coefficients @ self._powers(rest)  # (T, rest)
        start = 0
        for part in self.residual_bins:
            scale, table = _take_floats(table, 1, part.scale_dtype)
            width = -(-part.element_bits * part.num_elements // 8)
            codes = _unpack(table[:, :width], part.element_bits, part.num_elements)
            # One bit is a sign; more are a whole number around 0.
            steps = 2 * codes - 1 if part.element_bits == 1 else codes - 2 ** (part.element_bits - 1)
            approximate[:, start : start + part.num_elements] += steps * scale
            start, table = start + part.num_elements, table[:, width:]
        logprobs = np.concatenate([exact, approximate], axis=1)
        return np.cumsum(logprobs, axis=1) if self.delta_encoding else logprobs

    def _powers(self, count: int) -> NDArray[np.float64]:
        """(terms, count): each term at each rank."""
        rank = np.linspace(0.0, 1.0, count) if self.normalize_t else np.arange(count, dtype=np.float64)
        rows = [_SPECIAL_TERMS[t](rank) if isinstance(t, str) else rank**t for t in self.polynomial_terms]
        return np.stack(rows) if rows else np.zeros((0, count))

    def _num_bytes(self) -> int:
        floats = (
            self.exact_k * _FLOAT_BYTES[self.exact_dtype] + len(self.polynomial_terms) * _FLOAT_BYTES[self.term_dtype]
        )
        bins = sum(
            _FLOAT_BYTES[part.scale_dtype] - (-part.element_bits * part.num_elements // 8)
            for part in self.residual_bins
        )  # fmt: skip
        return floats + bins


def _unpack(table: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """(T, count) whole numbers of `bits` bits each, the highest bit first, from (T, B) bytes."""
    if not bits:  # a vocabulary of one token
        return np.zeros((len(table), count), dtype=np.int64)
    flat = np.unpackbits(table, axis=1)[:, : bits * count].reshape(len(table), count, bits)
    return flat.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def _take_floats(table: NDArray[np.uint8], count: int, dtype: str) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """The first `count` little-endian floats of each position as float64, and the bytes after them."""
    size = count * _FLOAT_BYTES[dtype]
    raw = np.ascontiguousarray(table[:, :size])
    if dtype == "bfloat16":  # the upper half of a float32
        values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.view(f"<f{_FLOAT_BYTES[dtype]}")
    return values.astype(np.float64).reshape(len(table), count), table[:, size:]


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise ValueError(found)
