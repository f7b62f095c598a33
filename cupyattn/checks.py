"""Arguments are checked as a symbolic signature; an error shows the pattern, the sizes and what came.

All of it works on whatever has ``shape`` and ``dtype`` (NumPy, CuPy, torch, JAX) and imports NumPy alone.
Only `validate_pages` looks at values; all else looks at metadata and never synchronises a device.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cupyattn.cache import PageTable

_DIM = re.compile(r"(?P<size>\d+)|(?P<name>[A-Za-z_]\w*)(?:\+(?P<plus>\d+))?")


def dtype_name(a: Any) -> str:
    """Name of an array's dtype (or of a dtype), the same for every framework: ``"bfloat16"``, say."""
    dtype = getattr(a, "dtype", a)
    return str(getattr(dtype, "name", dtype)).rpartition(".")[2]  # torch prints "torch.bfloat16"


def element_strides(a: Any) -> tuple[int, ...]:
    """Strides of an array in elements, whatever the framework.

    Raises
    ------
    ValueError
        A byte stride is not a multiple of the item size (a field of a structured array, say).
    """
    strides = getattr(a, "strides", None)
    if strides is not None:  # NumPy and CuPy: in bytes
        itemsize = a.dtype.itemsize
        if any(s % itemsize for s in strides):
            raise ValueError(
                f"strides must be multiples of the item size {itemsize}, got {list(strides)} bytes"
            )
        return tuple(s // itemsize for s in strides)
    if callable(getattr(a, "stride", None)):  # torch: in elements
        return tuple(a.stride())
    return tuple(math.prod(a.shape[axis + 1 :]) for axis in range(len(a.shape)))  # JAX: always in C order


def _is_array(a: Any) -> bool:
    return hasattr(a, "shape") and hasattr(a, "dtype")


def check_is_array(name: str, a: Any) -> None:
    """Raise TypeError unless `a` looks like an array (has ``shape`` and ``dtype``)."""
    if not _is_array(a):
        raise TypeError(f"{name} must be an array (of NumPy, CuPy, torch or JAX), got {type(a).__name__}")


@lru_cache(maxsize=256)
def _parse(pattern: str) -> tuple[tuple[str, int], ...]:
    """``"batch+1 2 d"`` -> ``(("batch", 1), ("", 2), ("d", 0))``: a name and what is added, or a literal."""
    dims = []
    for word in pattern.split():
        match = _DIM.fullmatch(word)
        if match is None:
            raise ValueError(f"bad dimension {word!r} in pattern {pattern!r}")
        dims.append((match["name"] or "", int(match["size"] or match["plus"] or 0)))
    return tuple(dims)


def _show(pattern: str) -> str:
    return "[" + ", ".join(pattern.replace("+", " + ").split(" ")).replace(", +, ", " + ") + "]"


def check_arrays(
    caller: str, arguments: Mapping[str, tuple[Any, str]], sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Check the shapes of several arrays against patterns that share names.

    Parameters
    ----------
    caller : str
        Name of the public function, for messages.
    arguments : mapping of str to (array, str)
        Argument name to the array and its pattern: words for its axes, in order. A word is a literal size
        (``2``), a name, or a name plus a number (``batch+1``). A name has one size over all the arguments.
    sizes : mapping of str to int, optional
        Names whose sizes are settled already.

    Returns
    -------
    dict of str to int
        The size of each name.

    Raises
    ------
    TypeError
        An argument is not an array.
    ValueError
        A rank or a size differs from the pattern; the message names the argument and shows pattern, sizes
        (and which argument settled them) and the actual shape.

    Examples
    --------
    >>> q, k = np.zeros((3, 8, 64)), np.zeros((9, 16, 2, 64))
    >>> check_arrays("decode", {"q": (q, "batch heads d"), "k_pages": (k, "num_pages size kv_heads d")})["d"]
    64
    """
    bound = dict(sizes or {})
    origin: dict[str, str] = {}
    for argument, (a, pattern) in arguments.items():
        if not _is_array(a):
            check_is_array(f"{caller}: {argument}", a)
        dims, shape = _parse(pattern), a.shape
        if len(shape) != len(dims):
            raise ValueError(
                f"{caller}: {argument} must have {len(dims)} dimensions {_show(pattern)}, "
                f"got {len(shape)} dimensions {list(shape)}"
            )
        for axis, (name, number) in enumerate(dims):
            actual = shape[axis]
            if name and name not in bound and actual >= number:
                bound[name] = actual - number
                origin[name] = argument
            elif actual != (bound.get(name, 0) if name else 0) + number:
                known = [
                    f"{n} = {bound[n]}" + (f" (from {origin[n]})" if n in origin else "")
                    for n, _ in dims
                    if n in bound
                ]
                where = f" with {', '.join(known)}" if known else ""
                raise ValueError(
                    f"{caller}: {argument} must have shape {_show(pattern)}{where}, got {list(shape)}"
                )
    return bound


def check_dtype(name: str, a: Any, allowed: str | Sequence[str]) -> None:
    """Raise TypeError unless the dtype of `a` is one of `allowed` (names, as `dtype_name` gives them)."""
    allowed = (allowed,) if isinstance(allowed, str) else allowed
    actual = dtype_name(a)
    if actual not in allowed:
        raise TypeError(f"{name} must have dtype {' or '.join(allowed)}, got {actual}")


def check_same_dtype(name_a: str, a: Any, name_b: str, b: Any) -> None:
    """Raise TypeError unless `a` and `b` have one dtype."""
    if dtype_name(a) != dtype_name(b):
        raise TypeError(f"{name_a} must have the dtype of {name_b}, {dtype_name(b)}, got {dtype_name(a)}")


def check_last_axis_contiguous(name: str, a: Any) -> None:
    """Raise ValueError unless consecutive elements of the last axis of `a` are neighbours in memory."""
    if a.shape[-1] > 1 and math.prod(a.shape):
        strides = element_strides(a)
        if strides[-1] != 1:
            raise ValueError(
                f"{name} must be contiguous along its last axis, got strides {list(strides)} (in elements) "
                f"for shape {list(a.shape)}"
            )


def check_writable(name: str, a: Any) -> None:
    """Raise ValueError if `a` is a read-only NumPy array (or a broadcast one: its elements share memory)."""
    if getattr(getattr(a, "flags", None), "writeable", True) is False:
        raise ValueError(f"{name} must be writable, got a read-only array")


def check_divisible(name_a: str, a: int, name_b: str, b: int) -> None:
    """Raise ValueError unless the count `a` is a positive multiple of the count `b`."""
    if a <= 0 or b <= 0 or a % b:
        raise ValueError(f"{name_a} must be a positive multiple of {name_b} = {b}, got {a}")


def as_finite(name: str, value: Any) -> float:
    """Return `value` as a finite float, or raise: TypeError for no number, ValueError for no finite one."""
    if type(value) is float and -math.inf < value < math.inf:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def as_index(name: str, value: Any) -> int:
    """Return `value` as an int, or raise TypeError: numbers with a fraction are not rounded."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if type(value) is not bool:
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def data_pointer(a: Any) -> int:
    """Address of the first element of a NumPy, CuPy, torch or JAX array."""
    if isinstance(a, np.ndarray):
        return int(a.__array_interface__["data"][0])
    if isinstance(a, np.generic):
        return 0  # a value, which shares memory with nothing
    try:
        return int(a.data.ptr)  # CuPy
    except AttributeError:
        pass
    if callable(getattr(a, "data_ptr", None)):  # torch
        return int(a.data_ptr())
    return int(a.unsafe_buffer_pointer())  # JAX


class _Extent:
    """An array's footprint for NumPy's overlap solver: addresses only, so device memory serves as well."""

    def __init__(self, a: Any) -> None:
        itemsize = a.dtype.itemsize
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(a.shape),
            "typestr": f"|V{itemsize}",
            "strides": tuple(s * itemsize for s in element_strides(a)),
            "data": (data_pointer(a), True),
        }


def shares_memory(a: Any, b: Any) -> bool:
    """Whether two arrays of one memory space have an element in common; exact, strides and all."""
    if 0 in a.shape or 0 in b.shape:
        return False
    # Nothing is dereferenced: NumPy compares address ranges and then solves for a common address.
    extent_a, extent_b = np.asarray(_Extent(a)), np.asarray(_Extent(b))
    try:
        return np.shares_memory(extent_a, extent_b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def check_overlap(name_a: str, a: Any, name_b: str, b: Any) -> None:
    """Raise ValueError if `a`, which will be written, has memory in common with `b`."""
    if shares_memory(a, b):
        raise ValueError(f"{name_a} must not overlap {name_b} in memory, got arrays that share elements")


def to_host(a: Any) -> np.ndarray:
    """Copy the values of any array to a NumPy array (waits for the device)."""
    if isinstance(a, np.ndarray):
        return a
    if callable(getattr(a, "get", None)):  # CuPy
        a = a.get()
    elif callable(getattr(a, "cpu", None)):  # torch
        a = a.detach().cpu().numpy()
    return np.asarray(a)


def _first(bad: np.ndarray) -> int:
    return int(np.flatnonzero(bad)[0])


def check_indptr(
    name: str, indptr: np.ndarray, *, total: int | None = None, at_most: int | None = None
) -> None:
    """Check the values of an offsets array on the host: never falling, ending at `total` or by `at_most`.

    Raises
    ------
    ValueError
        With the first offending entry.
    """
    first, last = (int(indptr[0]), int(indptr[-1])) if len(indptr) else (0, 0)
    if first < 0 or (total is not None and first != 0):
        raise ValueError(f"{name}[0] must be {'0' if total is not None else 'at least 0'}, got {first}")
    falls = np.diff(indptr.astype(np.int64)) < 0
    if falls.any():
        i = _first(falls)
        raise ValueError(
            f"{name} must not decrease, got {indptr[i]} followed by {indptr[i + 1]} at index {i}"
        )
    if total is not None and last != total:
        raise ValueError(f"{name}[-1] must be the number of tokens, {total}, got {last}")
    if at_most is not None and last > at_most:
        raise ValueError(f"{name}[-1] must be at most the number of entries, {at_most}, got {last}")


def validate_pages(
    caller: str,
    pages: PageTable,
    *,
    page_size: int,
    num_pages: int,
    qo_indptr: Any = None,
    num_tokens: int | None = None,
    window_left: int = -1,
    first_keys: np.ndarray | None = None,
) -> None:
    """Check the values of a page table (and of `qo_indptr`) on the host: the work of ``validate=True``.

    Parameters
    ----------
    caller : str
        Name of the public function, for messages.
    pages : PageTable
    page_size, num_pages : int
        Of the cache that the table points into.
    qo_indptr : array, shape [batch + 1], integer, optional
        Offsets of each request's tokens.
    num_tokens : int, optional
        What `qo_indptr` must end at.
    window_left : int
        Pages that lie before the window of a request's first query are not in use.
    first_keys : array, shape [batch], integer, optional
        What follows from `window_left` and `qo_indptr` where it is not this: of each request the first key in use.

    Raises
    ------
    ValueError
        A length is negative or needs more pages than its row of the table has; a page in use is not in
        ``0 .. num_pages - 1``; offsets decrease or end in the wrong place. Entries past a request's last page
        in use may hold anything.
    """
    kv_lens = to_host(pages.kv_lens).astype(np.int64)
    kv_indices = to_host(pages.kv_indices)
    num_queries = np.ones_like(kv_lens)
    if qo_indptr is not None:
        qo_indptr = to_host(qo_indptr).astype(np.int64)
        check_indptr(f"{caller}: qo_indptr", qo_indptr, total=num_tokens)
        num_queries = np.diff(qo_indptr)
    if (kv_lens < 0).any():
        i = _first(kv_lens < 0)
        raise ValueError(f"{caller}: kv_lens must be at least 0, got kv_lens[{i}] = {kv_lens[i]}")

    num_needed = -(-kv_lens // page_size)
    first = np.zeros_like(kv_lens)  # page in use, per request
    if first_keys is None and window_left >= 0:
        first_keys = kv_lens - num_queries - window_left
    if first_keys is not None:
        first = np.where(first_keys < kv_lens, np.maximum(first_keys, 0) // page_size, num_needed)
    if pages.kv_indptr is None:
        num_held = np.full(len(kv_lens), kv_indices.shape[1], dtype=np.int64)
        starts = np.arange(len(kv_lens), dtype=np.int64) * kv_indices.shape[1]
    else:
        kv_indptr = to_host(pages.kv_indptr).astype(np.int64)
        check_indptr(f"{caller}: kv_indptr", kv_indptr, at_most=len(kv_indices))
        num_held, starts = np.diff(kv_indptr), kv_indptr[:-1]
    if (num_needed > num_held).any():
        i = _first(num_needed > num_held)
        raise ValueError(
            f"{caller}: kv_lens[{i}] = {kv_lens[i]} needs {num_needed[i]} pages of {page_size} tokens, "
            f"but its row of the page table has {num_held[i]}"
        )

    num_used = num_needed - first
    request = np.repeat(np.arange(len(kv_lens)), num_used)
    column = first[request] + np.arange(len(request)) - np.repeat(np.cumsum(num_used) - num_used, num_used)
    ids = kv_indices.reshape(-1)[starts[request] + column]
    bad = (ids < 0) | (ids >= num_pages)
    if bad.any():
        i = _first(bad)
        raise ValueError(
            f"{caller}: kv_indices must be within 0..{num_pages - 1}, got {ids[i]} as page {column[i]} of "
            f"request {request[i]}"
        )


def framework_of(a: Any) -> str:
    """Name the framework of an array: "numpy", "cupy", "torch", "jax", or where else its type comes from."""
    name = _frameworks.get(type(a))
    if name is None:
        modules = [base.__module__.partition(".")[0] for base in type(a).__mro__]  # subclasses count
        known = (name for name in modules if name in ("numpy", "cupy", "torch", "jax", "jaxlib"))
        name = _frameworks[type(a)] = next(known, modules[0]).replace("jaxlib", "jax")
    return name


_frameworks: dict[type, str] = {}


def check_same_framework(caller: str, arrays: Mapping[str, Any]) -> None:
    """Raise TypeError unless all arrays (None is skipped) are of the framework of the first."""
    first: tuple[str, str] | None = None
    for name, a in arrays.items():
        if a is None:
            continue
        check_is_array(f"{caller}: {name}", a)
        framework = framework_of(a)
        if first is None:
            first = (name, framework)
        elif framework != first[1]:
            raise TypeError(
                f"{caller}: {name} must be a {first[1]} array as {first[0]} is, got a {framework} array"
            )


def check_same_device(caller: str, arrays: Mapping[str, Any]) -> int:
    """Return the device id of some CuPy arrays (None is skipped); raise ValueError unless it is one."""
    first: tuple[str, int] | None = None
    for name, a in arrays.items():
        if a is None:
            continue
        device = int(a.data.device_id)
        if first is None:
            first = (name, device)
        elif device != first[1]:
            raise ValueError(
                f"{caller}: {name} must be on device {first[1]} as {first[0]} is, got device {device}"
            )
    if first is None:
        raise ValueError(f"{caller}: no arrays")
    return first[1]


def check_aligned_strides(name: str, a: Any, nbytes: int = 16) -> None:
    """Raise ValueError unless all strides but the last are multiples of `nbytes`: kernels move that many."""
    bad = [
        axis
        for axis, (size, stride) in enumerate(zip(a.shape[:-1], a.strides[:-1], strict=True))
        if size > 1 and stride % nbytes
    ]
    if bad:
        raise ValueError(
            f"{name} must have strides that are multiples of {nbytes} bytes, got {list(a.strides)} bytes"
        )


def as_pair(caller: str, cache: Any) -> tuple[Any, Any]:
    """Unpack a plain pair (k_pages, v_pages), or raise TypeError."""
    if not isinstance(cache, tuple | list) or len(cache) != 2:
        got = type(cache).__name__
        raise TypeError(f"{caller}: cache must be a PagedKVCache or a pair (k_pages, v_pages), got {got}")
    return cache[0], cache[1]
