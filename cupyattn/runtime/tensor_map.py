"""CUtensorMap: what the tensor memory accelerator of sm_90 and up must know of an array, to be passed by value."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence

from .launch import driver

_TENSOR_MAP_BYTES = 128
_ALIGNMENT = 64  # of the struct that the driver writes
_UINT16 = 1  # CU_TENSOR_MAP_DATA_TYPE_UINT16: only bits are moved
_SWIZZLE_128B = 3
_PROMOTE_TO_256B = 3  # of a miss in L2
_MAX_STRIDE = 1 << 40
_STRIDE_UNIT = 16
_BOX_COLUMNS = 64  # as many as the swizzle knows
_MIN_BOX_ROWS = 8  # which it goes by


def can_map(byte_strides: Sequence[int]) -> bool:
    """Whether `encode_tensor_map` takes these strides."""
    return all(0 < stride < _MAX_STRIDE and stride % _STRIDE_UNIT == 0 for stride in byte_strides)


def encode_tensor_map(
    address: int, shape: Sequence[int], byte_strides: Sequence[int], box: Sequence[int]
) -> bytes | None:
    """Return the map of an array of 16-bit numbers, whose boxes lie in shared memory with the 128-byte swizzle.

    None if the driver refuses: what it takes is not documented to the last stride. Call it with a CUDA context.

    Parameters
    ----------
    address : int
        Of its first element; a multiple of 16.
    shape : sequence of int
        Fastest axis first, which is contiguous.
    byte_strides : sequence of int
        Of the other axes; see `can_map`.
    box : sequence of int
        Elements of a copy, along each axis; at most 64 along the first.
    """
    rank = len(shape)
    memory = ctypes.create_string_buffer(_TENSOR_MAP_BYTES + _ALIGNMENT)
    start = -ctypes.addressof(memory) % _ALIGNMENT
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(memory) + start),
        _UINT16,
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*shape),
        (ctypes.c_uint64 * (rank - 1))(*byte_strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,  # not interleaved
        _SWIZZLE_128B,
        _PROMOTE_TO_256B,
        0,  # zeros outside
    )
    return None if status else memory.raw[start : start + _TENSOR_MAP_BYTES]


class KeyBoxes:
    """The boxes in which a kernel copies pages of two arrays of 16-bit numbers: what KeyMaps of tma.cuh says of them.

    There are none where pages are no multiple of eight tokens, or an array's strides are none that maps can have.

    Parameters
    ----------
    arrays : pair of (shape, byte_strides)
        As for `encode_tensor_map`; the second axis is the tokens of a page.
    most_rows : int
        Tokens of a box at most; a power of two.
    """

    def __init__(self, arrays: Sequence[tuple[Sequence[int], Sequence[int]]], most_rows: int) -> None:
        self.rows = math.gcd(most_rows, *(shape[1] for shape, _ in arrays))
        if self.rows < _MIN_BOX_ROWS or not all(can_map(strides) and all(shape) for shape, strides in arrays):
            self.rows = 0
        self._arrays = arrays

    def pack(self, addresses: Sequence[int]) -> bytes:
        """Return KeyMaps of arrays that lie there, of no boxes if there are none or the driver refuses."""
        maps = [
            encode_tensor_map(address, shape, strides, (_BOX_COLUMNS, self.rows, *(1 for _ in shape[2:])))
            for address, (shape, strides) in zip(addresses, self._arrays, strict=True)
            if self.rows
        ]
        packed = b"".join(filter(None, maps))
        if len(packed) < len(self._arrays) * _TENSOR_MAP_BYTES:
            return b""
        return packed + struct.pack("<i", self.rows)
