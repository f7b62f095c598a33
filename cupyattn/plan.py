"""Arguments are checked once per signature; the calls after that only pack pointers and launch.

A *signature* is all of a call that its checks and its launch configuration depend on, apart from values in
device memory: types, shapes, strides, dtypes and devices of the arrays. Behind it stands the *plan* that was
made when the signature was first seen. *Operands* of a call are arrays, groups of arrays, and None; the *place*
of a call is where in memory its arrays lie.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from cupyattn import checks

_MAX_PLANS = 4096  # of changing shapes; a plan is about 1 KiB
_MAX_PLACES = 4096  # addresses that calls came with, about 0.5 KiB each
_NUMPY_TYPES = (np.ndarray, np.generic)


class ArrayGroup:
    """Arrays that are passed as one. Immutable, so that their signature and addresses are found only once.

    Parameters
    ----------
    arrays : dict of str to array or None
        Become attributes, as settings do.
    **settings
        Hashable.
    """

    __slots__ = ("_arrays", "_seen", "_settings")

    _arrays: tuple[Any, ...]
    _settings: tuple[Any, ...]
    _seen: tuple[Any, tuple[int, ...]] | None

    def __init__(self, arrays: dict[str, Any], **settings: Any) -> None:
        for name, value in {**arrays, **settings}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_arrays", tuple(arrays.values()))
        object.__setattr__(self, "_settings", tuple(settings.values()))
        object.__setattr__(self, "_seen", None)

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self).__name__
        raise AttributeError(f"{kind} is immutable: cannot set {name} (its arrays may be written in place)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot delete {name}")

    def _look(self) -> tuple[Any, tuple[int, ...]]:
        signatures, place = look(self._arrays)
        seen = _number((type(self), self._settings, signatures)), place
        object.__setattr__(self, "_seen", seen)
        return seen


_numbers: dict[Any, int] = {}
_next_number = itertools.count(1)


def _number(key: Any) -> int:
    """Return a number for `key`, which hashes faster. No number is ever used twice, so old ones do no harm."""
    if len(_numbers) >= _MAX_PLANS:
        _numbers.clear()
    return _numbers.setdefault(key, next(_next_number))


def look(operands: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Return the signature of each operand, hashable, and the address of each array of `flatten(operands)`.

    None has the signature None and the address 0. Both are found in one loop, because every call waits for it.

    Raises
    ------
    AttributeError
        An operand is no array. The checks themselves say that better.
    """
    signatures: list[Any] = []
    place: list[int] = []
    for a in operands:
        if a is None:
            signatures.append(None)
            place.append(0)
        elif isinstance(a, ArrayGroup):
            number, addresses = a._seen or a._look()
            signatures.append(number)
            place += addresses
        elif isinstance(a, _NUMPY_TYPES):
            signatures.append((a.shape, a.strides, a.dtype))
            place.append(checks.data_pointer(a))
        else:
            memory = a.data
            signatures.append((a.shape, a.strides, a.dtype, memory.device_id))
            place.append(memory.ptr)
    return tuple(signatures), tuple(place)


def flatten(operands: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arrays of all operands, those of groups one by one."""
    found: list[Any] = []
    for a in operands:
        found += a._arrays if isinstance(a, ArrayGroup) else (a,)
    return tuple(found)


class Plan:
    """What one signature settles. An operation has a subclass for what its backends have in common.

    Attributes
    ----------
    caller : str
        The public function, for messages.
    operand_names : tuple of str or tuple of str
        The arguments, in order; a group's entry names its arrays.
    array_names : tuple of str
        The same for `flatten(operands)`.
    written : tuple of str
        Those of them that the operation writes.
    apart : tuple of (str, str)
        Arrays that must not share memory, the first of each pair being written.
    may_coincide : tuple of (str, str)
        Pairs among them, of one shape and dtype, that may be the very same memory.
    device : int or None
        Of the arrays; None on NumPy.
    xp : module
        ``numpy`` or ``cupy``.
    """

    caller: ClassVar[str]
    operand_names: ClassVar[tuple[str | tuple[str, ...], ...]]
    written: ClassVar[tuple[str, ...]]
    apart: ClassVar[tuple[tuple[str, str], ...]]
    may_coincide: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __init__(self, operands: Sequence[Any]) -> None:
        named: dict[str, Any] = {}
        for names, a in zip(self.operand_names, operands, strict=True):
            named |= {names: a} if isinstance(names, str) else dict(zip(names, a._arrays, strict=True))
        checks.check_same_framework(self.caller, named)
        self.array_names = tuple(named)
        self.device: int | None = None
        self.xp: Any = np
        if checks.framework_of(operands[0]) != "numpy":
            self.device = checks.check_same_device(self.caller, named)
            import cupy

            self.xp = cupy
        index = {name: i for i, name in enumerate(self.array_names) if named[name] is not None}
        self._written = [index[name] for name in self.written if name in index]
        self._apart = []
        for a, b in self.apart:
            if a in index and b in index:
                or_same = (a, b) in self.may_coincide and named[a].strides == named[b].strides
                self._apart.append((index[a], index[b], or_same))
        arrays = tuple(named.values())
        self._extents = {i: _extent(arrays[i]) for *pair, _ in self._apart for i in pair}

    def run(self, operands: Sequence[Any], place: tuple[int, ...], *settings: Any) -> Any:
        """Do the operation with operands of this plan's signature, which lie at `place`, on their device."""
        if self.device is None:
            arrays = flatten(operands)
            for i in self._written:
                checks.check_writable(f"{self.caller}: {self.array_names[i]}", arrays[i])
        elif self.device != self.xp.cuda.runtime.getDevice():
            with self.xp.cuda.Device(self.device):
                return self.run(operands, place, *settings)
        if (self, place) not in _places:  # shapes and strides are the plan's, so addresses decide
            self.check_addresses(flatten(operands), place)
            if len(_places) >= _MAX_PLACES:
                _places.clear()
            _places.add((self, place))
        return self._run(operands, place, *settings)

    def check_addresses(self, arrays: Sequence[Any], place: Sequence[int]) -> None:
        """Raise ValueError if a written array shares memory with one that it must not share it with.

        Byte ranges come first; only where they meet are the elements themselves looked at.
        """
        ranges = {i: (place[i] + low, place[i] + high) for i, (low, high) in self._extents.items()}
        for i, j, or_same in self._apart:
            meet = ranges[i][0] < ranges[j][1] and ranges[j][0] < ranges[i][1]
            if meet and not (or_same and place[i] == place[j]):
                name = f"{self.caller}: {self.array_names[i]}"
                checks.check_overlap(name, arrays[i], self.array_names[j], arrays[j])

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


_places: set[tuple[Plan, tuple[int, ...]]] = set()  # that `check_addresses` has passed
_Plan = TypeVar("_Plan", bound=Plan)


class PlanCache(Generic[_Plan]):
    """Plans of one operation by signature. Threads may make the same plan twice; the later one stays."""

    def __init__(self, numpy_plan: type[_Plan], cupy_plan: type[_Plan]) -> None:
        self._backends = numpy_plan, cupy_plan
        self._plans: dict[Any, _Plan] = {}

    def find(self, operands: Sequence[Any], *settings: Any) -> tuple[_Plan, tuple[int, ...]]:
        """Return the plan for these operands and (hashable) settings, which its class gets too, and the place."""
        try:
            signatures, place = look(operands)
            key = settings, signatures
            plan = self._plans.get(key)
        except (AttributeError, TypeError):  # something is no array of NumPy or CuPy: the checks say what
            self._make(operands, *settings)
            raise
        if plan is None:
            plan = self._make(operands, *settings)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan, place

    def _make(self, operands: Sequence[Any], *settings: Any) -> _Plan:
        numpy_plan, cupy_plan = self._backends
        first = operands[0]
        checks.check_is_array(f"{numpy_plan.caller}: {numpy_plan.operand_names[0]}", first)
        backend = numpy_plan if checks.framework_of(first) == "numpy" else cupy_plan
        return backend(operands, *settings)


def _extent(a: Any) -> tuple[int, int]:
    """Return the byte offsets, from an array's data pointer, of its first byte and past its last one."""
    low = high = 0
    for size, stride in zip(a.shape, a.strides, strict=True):
        if size == 0:
            return 0, 0
        span = (size - 1) * stride
        low, high = low + min(span, 0), high + max(span, 0)
    return low, high + a.dtype.itemsize
