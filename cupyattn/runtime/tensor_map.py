"""CUtensorMap: what the tensor memory accelerator of sm_90 and up must know of an array, to be passed by value."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from .launch import driver

_TENSOR_MAP_BYTES = 128
_ALIGNMENT = 64  # of the struct that the driver writes
_UINT16 = 1  # CU_TENSOR_MAP_DATA_TYPE_UINT16: only bits are moved
_SWIZZLE_128B = 3
_PROMOTE_TO_256B = 3  # of a miss in L2
_MAX_STRIDE = 1 << 40
_STRIDE_UNIT = 16


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
