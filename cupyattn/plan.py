"""Arguments are checked once per signature; the calls after that only pack pointers and launch.

A *signature* is all of a call that its checks and its launch configuration depend on, apart from values in
device memory: types, shapes, strides, dtypes and devices of the arrays. Behind it stands the *plan* that was
made when the signature was first seen. *Operands* of a call are arrays, groups of arrays, and None; the *place*
of a call is where in memory its arrays lie.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from cupyattn import checks

_MAX_PLANS = 4096  # of changing shapes; a plan is about 1 KiB
_MAX_PLACES = 4096  # that calls came with, about 1 KiB each, and some 2 KiB for each launch that is kept
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

    __slots__ = ("_arrays", "_key", "_place", "_settings", "_signature")

    _arrays: tuple[Any, ...]
    _settings: tuple[Any, ...]
    _key: int  # 0 until they have been looked at
    _signature: int
    _place: tuple[int, ...]

    def __init__(self, arrays: dict[str, Any], **settings: Any) -> None:
        for name, value in {**arrays, **settings}.items():
            object.__setattr__(self, name, value)
        self._hold(tuple(arrays.values()), tuple(settings.values()))

    def _hold(self, arrays: tuple[Any, ...], settings: tuple[Any, ...] = ()) -> None:
        """Remember what the group consists of; where attributes are others than the arrays, this is called alone."""
        object.__setattr__(self, "_arrays", arrays)
        object.__setattr__(self, "_settings", settings)
        object.__setattr__(self, "_key", 0)

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self).__name__
        raise AttributeError(f"{kind} is immutable: cannot set {name} (its arrays may be written in place)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot delete {name}")

    def _look(self) -> int:
        key = look(self._arrays)
        signature, place = split(self._arrays, key)
        object.__setattr__(self, "_signature", _number(_signatures, (type(self), self._settings, signature)))
        object.__setattr__(self, "_place", place)
        object.__setattr__(self, "_key", _number(_places, (self._signature, place)))
        return self._key


# Apart: addresses that change must not drop the numbers of signatures, and with them their plans.
_signatures: dict[Any, int] = {}
_places: dict[Any, int] = {}
_next_number = itertools.count(1)


def _number(numbers: dict[Any, int], key: Any) -> int:
    """Return a number for `key`, which hashes faster. No number is ever used twice, so old ones do no harm."""
    if len(numbers) >= _MAX_PLACES:
        numbers.clear()
    return numbers.setdefault(key, next(_next_number))


def look(operands: Sequence[Any]) -> tuple[Any, ...]:
    """Return what is hashable and the same for operands of one signature and place. Every call waits for this.

    Raises
    ------
    AttributeError
        An operand is no array. The checks themselves say that better.
    """
    key: list[Any] = []
    for a in operands:
        if a is None:
            key.append(None)
        elif isinstance(a, ArrayGroup):
            key.append(a._key or a._look())
        elif isinstance(a, _NUMPY_TYPES):
            key.append((a.shape, a.strides, a.dtype, checks.data_pointer(a)))
        else:
            memory = a.data
            key.append((a.shape, a.strides, a.dtype, memory.device_id, memory.ptr))
    return tuple(key)


def split(operands: Sequence[Any], key: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Return the signature, hashable, and the place, with 0 for None, of operands of which `look` has made `key`."""
    signature: list[Any] = []
    place: list[int] = []
    for a, seen in zip(operands, key, strict=True):
        if a is None:
            signature.append(None)
            place.append(0)
        elif isinstance(a, ArrayGroup):
            signature.append(a._signature)
            place += a._place
        else:
            signature.append(seen[:-1])
            place.append(seen[-1])
    return tuple(signature), tuple(place)


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
            self.current_device = cupy.cuda.runtime.getDevice
            self.current_stream = cupy.cuda.get_current_stream
        index = {name: i for i, name in enumerate(self.array_names) if named[name] is not None}
        self._written = [index[name] for name in self.written if name in index]
        self._apart = []
        for a, b in self.apart:
            if a in index and b in index:
                or_same = (a, b) in self.may_coincide and named[a].strides == named[b].strides
                self._apart.append((index[a], index[b], or_same))
        arrays = tuple(named.values())
        self._extents = {i: _extent(arrays[i]) for *pair, _ in self._apart for i in pair}

    def _check_arrays(
        self, patterns: Mapping[str, tuple[Any, str]], sizes: Mapping[str, int]
    ) -> dict[str, int]:
        """Do as `checks.check_arrays`, without those that are None."""
        given = {name: pattern for name, pattern in patterns.items() if pattern[0] is not None}
        return checks.check_arrays(self.caller, given, sizes)

    def _check_rows(self, name: str, a: Any, like_name: str, like: Any) -> None:
        """Raise unless `a` is None, or has the dtype of `like` and a contiguous last axis."""
        if a is not None:
            checks.check_same_dtype(f"{self.caller}: {name}", a, like_name, like)
            checks.check_last_axis_contiguous(f"{self.caller}: {name}", a)

    def _check_offsets(self, qo_indptr: Any) -> None:
        if qo_indptr is not None:
            checks.check_dtype(f"{self.caller}: qo_indptr", qo_indptr, "int32")
            checks.check_last_axis_contiguous(f"{self.caller}: qo_indptr", qo_indptr)

    def bind(self, arrays: Sequence[Any], place: tuple[int, ...]) -> tuple[Any, ...]:
        """Check where the arrays lie, and return the pointers that `_run` needs: in this class, to all of them."""
        self.check_addresses(arrays, place)
        return place

    def run(self, operands: Sequence[Any], pointers: tuple[Any, ...], *options: Any) -> Any:
        """Do the operation with operands of this plan's signature, on their device; `pointers` are from `bind`."""
        if self.device is None:
            arrays = flatten(operands)
            for i in self._written:
                checks.check_writable(f"{self.caller}: {self.array_names[i]}", arrays[i])
        elif self.device != self.current_device():
            with self.xp.cuda.Device(self.device):
                return self._run(operands, pointers, *options)
        return self._run(operands, pointers, *options)

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

    def _run(self, operands: Any, pointers: Any, *options: Any) -> Any:
        raise NotImplementedError


_Plan = TypeVar("_Plan", bound=Plan)


class PlanCache(Generic[_Plan]):
    """Plans of one operation by signature: one class for both backends, or two.

    Threads may make the same plan twice; the later one stays.
    """

    def __init__(self, numpy_plan: type[_Plan], cupy_plan: type[_Plan] | None = None) -> None:
        self._backends = numpy_plan, cupy_plan or numpy_plan
        self._plans: dict[Any, _Plan] = {}
        self._places: dict[Any, tuple[_Plan, tuple[Any, ...], dict[Any, Any]]] = {}
        self.caller = numpy_plan.caller

    def find(
        self, operands: Sequence[Any], settings: tuple[Any, ...] = ()
    ) -> tuple[_Plan, tuple[Any, ...], dict[Any, Any]]:
        """Return the plan for these operands and (hashable) settings, which its class gets too, and what it bound.

        And what calls have left behind for those that come with the same again, empty at first.
        """
        try:
            key = settings, look(operands)
            found = self._places.get(key)
        except (AttributeError, TypeError):  # something is no array of NumPy or CuPy: the checks say what
            self.make(operands, settings)
            raise
        return found or self._bind(operands, *key)

    def _bind(
        self, operands: Sequence[Any], settings: tuple[Any, ...], key: tuple[Any, ...]
    ) -> tuple[_Plan, tuple[Any, ...], dict[Any, Any]]:
        signature, place = split(operands, key)
        plan = self._plans.get((settings, signature))
        if plan is None:
            plan = self.make(operands, settings)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[settings, signature] = plan
        found: tuple[_Plan, tuple[Any, ...], dict[Any, Any]] = plan, plan.bind(flatten(operands), place), {}
        if len(self._places) >= _MAX_PLACES:
            self._places.clear()
        self._places[settings, key] = found
        return found

    def clear(self) -> None:
        """Forget all plans."""
        self._plans.clear()
        self._places.clear()

    def make(self, operands: Sequence[Any], settings: tuple[Any, ...] = ()) -> _Plan:
        """Return a new plan; TypeError or ValueError if the operands do not fit."""
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
