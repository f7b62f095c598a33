"""Arguments are checked once per signature; the calls after that only pack pointers and launch.

A *signature* is all of a call that its checks and its launch configuration depend on, apart from values in
device memory: types, shapes, strides, dtypes and devices of the arrays. Behind it stands the *plan* that was
made when the signature was first seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

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


def extent(a: Any) -> tuple[int, int]:
    """Return the byte offsets, from an array's data pointer, of its first byte and past its last one."""
    low = high = 0
    for size, stride in zip(a.shape, a.strides, strict=True):
        if size == 0:
            return 0, 0
        span = (size - 1) * stride
        low, high = low + min(span, 0), high + max(span, 0)
    return low, high + a.dtype.itemsize
