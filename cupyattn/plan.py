"""Arguments are checked once per signature; the calls after that only pack pointers and launch.

A *signature* is all of a call that its checks and its launch configuration depend on, apart from values in
device memory: types, shapes, strides, dtypes and devices of the arrays. Behind it stands the *plan* that was
made when the signature was first seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from cupyattn import checks

Plan = TypeVar("Plan")

_MAX_PLANS = 4096  # of changing shapes; a plan is about 1 KiB


def signature(a: Any) -> Any:
    """Return what checks may know of an array, hashable; None for None.

    Raises
    ------
    AttributeError
        `a` is no array. The checks themselves say that better.
    """
    if a is None:
        return None
    if type(a) is np.ndarray:
        return (a.shape, a.strides, a.dtype)
    return (a.shape, a.strides, a.dtype, a.data.device_id)


class PlanCache(Generic[Plan]):
    """Plans by signature. Threads may make the same plan twice; the later one stays."""

    def __init__(self, make: Callable[..., Plan]) -> None:
        self._make = make
        self._plans: dict[Any, Plan] = {}

    def get(self, arrays: tuple[Any, ...], *settings: Any) -> Plan:
        """Return the plan for these arrays and (hashable) settings; `make` gets the same arguments."""
        try:
            key = (settings, *map(signature, arrays))
            plan = self._plans.get(key)
        except (AttributeError, TypeError):  # something is no array: let the checks say what
            return self._make(arrays, *settings)
        if plan is None:
            plan = self._make(arrays, *settings)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan


class OverlapGuard:
    """Pairs of arrays of one call that must not share memory, the first of each pair being written.

    Shapes and strides are the plan's; addresses are compared at each call. Byte ranges come first, which costs
    two comparisons; only where they meet are the elements themselves looked at.
    """

    def __init__(
        self, caller: str, names: Sequence[str], arrays: Sequence[Any], pairs: Iterable[tuple[str, str]]
    ) -> None:
        self._caller = caller
        self._names = names
        index = {name: i for i, name in enumerate(names)}
        both = ((index[written], index[other]) for written, other in pairs)
        self._pairs = [(i, j) for i, j in both if arrays[i] is not None and arrays[j] is not None]
        self._extents = {i: _extent(arrays[i]) for pair in self._pairs for i in pair}

    def check(self, arrays: Sequence[Any]) -> None:
        """Raise ValueError if a written array shares memory with one that it must not share it with."""
        if not self._pairs:
            return
        ranges = {}
        for i, (low, high) in self._extents.items():
            address = checks.data_pointer(arrays[i])
            ranges[i] = (address + low, address + high)
        for i, j in self._pairs:
            if ranges[i][0] < ranges[j][1] and ranges[j][0] < ranges[i][1]:
                checks.check_overlap(
                    f"{self._caller}: {self._names[i]}", arrays[i], self._names[j], arrays[j]
                )


def _extent(a: Any) -> tuple[int, int]:
    """Return the byte offsets, from an array's data pointer, of its first byte and past its last one."""
    low = high = 0
    for size, stride in zip(a.shape, a.strides, strict=True):
        if size == 0:
            return 0, 0
        span = (size - 1) * stride
        low, high = low + min(span, 0), high + max(span, 0)
    return low, high + a.dtype.itemsize
