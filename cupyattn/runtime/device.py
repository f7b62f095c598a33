"""What a CUDA device is and what it offers, asked once."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceProperties:
    """Facts about one device. Sizes are in bytes."""

    id: int
    name: str
    arch: str  # what its kernels are compiled for: "sm_80", "sm_90a"
    num_sms: int
    max_shared_per_block: int  # with opt-in, static and dynamic together
    max_shared_per_sm: int
    l2_bytes: int

    @property
    def has_pdl(self) -> bool:
        """Whether kernels can start while the one before them is finishing: from compute capability 9.0 on."""
        return int("".join(filter(str.isdigit, self.arch))) >= 90


def arch_of(major: int, minor: int) -> str:
    """Name the target of a compute capability; from 9.0 on with the features of that very chip (``a``).

    >>> arch_of(8, 9), arch_of(9, 0), arch_of(12, 0)
    ('sm_89', 'sm_90a', 'sm_120a')
    """
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def device_properties(device: int | None = None) -> DeviceProperties:
    """Return the properties of a device by id, of the current one by default. No synchronization."""
    import cupy

    return _properties(cupy.cuda.runtime.getDevice() if device is None else device)


@functools.cache
def _properties(device: int) -> DeviceProperties:
    import cupy

    raw = cupy.cuda.runtime.getDeviceProperties(device)
    return DeviceProperties(
        id=device,
        name=raw["name"].decode(),
        arch=arch_of(raw["major"], raw["minor"]),
        num_sms=raw["multiProcessorCount"],
        max_shared_per_block=raw["sharedMemPerBlockOptin"],
        max_shared_per_sm=raw["sharedMemPerMultiprocessor"],
        l2_bytes=raw["l2CacheSize"],
    )


def num_devices() -> int:
    """Return how many CUDA devices CuPy can use: 0 without CuPy, without a driver or without a device."""
    try:
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount())
    except (ImportError, RuntimeError):  # CUDARuntimeError is a RuntimeError
        return 0
