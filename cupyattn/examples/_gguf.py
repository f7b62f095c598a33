"""Reads a GGUF file: metadata, and tensors dequantised to float32.

``gguf.GGUFReader`` wraps every string of the vocabulary in arrays of its own, which takes 20 s for Gemma's
262144. The header is simple enough to walk here, in under half a second; the quantised formats are left to
``gguf.quants``.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

try:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize
except ImportError as error:
    raise ImportError(f'{error}; the examples need: pip install "cupyattn[examples]"') from error

# GGUF numbers its value types: scalars of these dtypes, a string and an array.
_SCALARS = ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", "", "", "u8", "i8", "f8"]
_STRING, _ARRAY = 8, 9


class GGUFFile:
    """A GGUF file, memory-mapped.

    Attributes
    ----------
    metadata : dict
        Scalars as Python values, arrays of numbers as NumPy arrays, arrays of strings as lists.
    tensors : dict of str to (shape, GGMLQuantizationType, offset)
        Shapes in NumPy order (the last axis is contiguous, so a weight is ``[out_features, in_features]``).
    """

    def __init__(self, path: str | Path) -> None:
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, num_tensors, num_metadata = struct.unpack_from("<4sIQQ", self._bytes, 0)
        if magic != b"GGUF" or version < 2:
            raise ValueError(f"{path}: expected GGUF of version 2 or later, got {magic!r}, version {version}")
        self._at = 24
        self.metadata: dict[str, Any] = {}
        for _ in range(num_metadata):
            name = self._string()
            self.metadata[name] = self._value(self._scalar("u4"))
        self.tensors: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
        for _ in range(num_tensors):
            name = self._string()
            shape = tuple(int(n) for n in self._numbers("u8", self._scalar("u4"))[::-1])
            qtype = GGMLQuantizationType(self._scalar("u4"))
            self.tensors[name] = (shape, qtype, self._scalar("u8"))
        alignment = self.metadata.get("general.alignment", 32)
        self._data_start = -(-self._at // alignment) * alignment

    def tensor(self, name: str) -> np.ndarray:
        """Read one tensor, dequantised to float32."""
        shape, qtype, offset = self.tensors[name]
        values_per_block, bytes_per_block = GGML_QUANT_SIZES[qtype]
        nbytes = int(np.prod(shape)) // values_per_block * bytes_per_block
        data = np.frombuffer(self._bytes, np.uint8, nbytes, self._data_start + offset)
        # gguf dequantises 16 rows at a time. Blocks never straddle rows, so rows may be folded together: 16
        # into one makes the 262144 rows of the embedding 2.5 times as fast.
        num_rows = shape[0] // 16 if len(shape) > 1 and shape[0] % 16 == 0 else 1
        values: np.ndarray = dequantize(data.reshape(num_rows, -1), qtype)
        return values.reshape(shape)

    # The cursor: each call reads what is at self._at and moves past it.

    def _scalar(self, dtype: str) -> Any:
        return self._numbers(dtype, 1)[0].item()

    def _numbers(self, dtype: str, count: int) -> np.ndarray:
        numbers = np.frombuffer(self._bytes, dtype, count, self._at)
        self._at += numbers.nbytes
        return numbers

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._bytes, self._at)
        start = self._at + 8
        self._at = start + length
        return str(self._bytes[start : self._at], "utf-8")

    def _value(self, value_type: int) -> Any:
        if value_type == _STRING:
            return self._string()
        if value_type == _ARRAY:
            item_type, count = self._scalar("u4"), self._scalar("u8")
            if dtype := _SCALARS[item_type]:
                return self._numbers(dtype, count)
            return [self._value(item_type) for _ in range(count)]
        return self._scalar(_SCALARS[value_type])
