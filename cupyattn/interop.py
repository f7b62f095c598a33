"""Arrays of any framework: which one they are of, and the way in and out of NumPy and CuPy.

The library works on NumPy and CuPy arrays. Others come in through DLPack without a copy, ordered on the
caller's stream, and results go back the same way.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from cupyattn.cache import PagedKVCache, PagedMLACache, PageTable
from cupyattn.checks import framework_of
from cupyattn.levels import CascadeLevels


def get_array_module(*args: Any) -> Any:
    """Return the array module of the arguments, in the manner of `cupy.get_array_module`.

    Parameters
    ----------
    *args : objects
        Arrays, caches and page tables of one of `cupyattn`'s backends, or anything else.

    Returns
    -------
    module
        ``cupy`` if any argument is (or holds) a CuPy array, else ``numpy``.

    Examples
    --------
    >>> get_array_module(np.zeros(3)).__name__
    'numpy'
    """
    cupy = sys.modules.get("cupy")  # whoever holds a CuPy array has imported it
    if cupy is not None:
        for a in args:
            a = _some_array(a)
            if isinstance(a, cupy.ndarray):
                return cupy
    return np


def _some_array(a: Any) -> Any:
    if isinstance(a, PagedKVCache):
        return a.k_pages
    if isinstance(a, PagedMLACache):
        return a.ckv_pages
    if isinstance(a, PageTable):
        return a.kv_lens
    if isinstance(a, CascadeLevels):
        return a.levels[0][0].kv_lens
    return a


def is_foreign(a: Any) -> bool:
    """Tell whether `a` is an array that must be converted: not NumPy's or CuPy's, but able to speak DLPack."""
    return framework_of(a) not in ("numpy", "cupy") and hasattr(a, "__dlpack__")


def call(function: Callable[..., Any], like: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `function` on arrays of the framework of `like`, on its current stream; results are its arrays.

    Arguments may be arrays, caches, page tables, levels of them, and tuples or lists of arrays; anything else passes
    through.
    An argument that comes back as a result (``out=``) is the caller's own object.

    Raises
    ------
    TypeError
        A JAX array would be written to: they are immutable.
    """
    framework = framework_of(like)
    with _stream_of(like, framework):
        originals: dict[int, Any] = {}

        def native(a: Any) -> Any:
            if isinstance(a, PagedKVCache):
                return PagedKVCache(native(a.k_pages), native(a.v_pages), layout=a.layout)
            if isinstance(a, PagedMLACache):
                return PagedMLACache(native(a.ckv_pages), native(a.kpe_pages))
            if isinstance(a, PageTable):
                return PageTable(native(a.kv_indptr), native(a.kv_indices), native(a.kv_lens))
            if isinstance(a, CascadeLevels):
                return CascadeLevels(native(a.levels), q_indices=native(a.q_indices))
            if isinstance(a, tuple | list):
                return tuple(native(x) for x in a)
            if isinstance(a, np.generic) or not (hasattr(a, "shape") and hasattr(a, "dtype")):
                return a
            if framework_of(a) != framework:
                raise TypeError(
                    f"{function.__name__}: arrays must be of one framework, got {framework} and {framework_of(a)}"
                )
            converted = to_native(a)
            originals[id(converted)] = (a, converted)  # kept alive, so that the id stays its own
            return converted

        def foreign(a: Any) -> Any:
            if isinstance(a, tuple):
                return tuple(foreign(x) for x in a)
            if isinstance(a, int):
                return a
            if id(a) in originals:
                return originals[id(a)][0]
            return from_native(a, framework)

        if framework == "jax":
            for name in ("out", "lse", "into", "q_out", "q_kpe_out"):
                if kwargs.get(name) is not None:
                    raise TypeError(f"{function.__name__}: {name} cannot be a JAX array: they are immutable")
        native_kwargs = {name: a if name == "workspace" else native(a) for name, a in kwargs.items()}
        result = function(*(native(a) for a in args), **native_kwargs)
        return None if result is None else foreign(result)


def _stream_of(like: Any, framework: str) -> contextlib.AbstractContextManager[Any]:
    """Make the stream on which the caller's framework is working CuPy's current one."""
    if framework != "torch" or not like.is_cuda:
        return contextlib.nullcontext()
    import cupy
    import torch

    stack = contextlib.ExitStack()
    stack.enter_context(cupy.cuda.Device(like.device.index))
    handle = _StreamHandle(torch.cuda.current_stream(like.device).cuda_stream)
    stack.enter_context(cupy.cuda.Stream.from_external(handle))
    return stack


class _StreamHandle:
    """An address of a CUDA stream, in the protocol that `cupy.cuda.Stream.from_external` takes."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


def to_native(a: Any) -> Any:
    """View a foreign array as a NumPy or CuPy array."""
    framework = framework_of(a)
    if framework == "torch":
        a = a.detach()
        if not a.is_cuda:
            import ml_dtypes
            import torch

            # NumPy's DLPack knows no bfloat16: pass the bits.
            if a.dtype == torch.bfloat16:
                return a.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return a.numpy()
    if framework == "jax" and next(iter(a.devices())).platform == "cpu":
        return np.asarray(a)
    import cupy

    return cupy.from_dlpack(a)


def from_native(a: Any, framework: str) -> Any:
    """View a NumPy or CuPy array as an array of `framework`."""
    if framework == "torch":
        import torch

        if isinstance(a, np.ndarray):
            if a.dtype.name == "bfloat16":
                return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(a)
        return torch.from_dlpack(a)
    if framework == "jax":
        import jax

        return jax.numpy.asarray(a) if isinstance(a, np.ndarray) else jax.dlpack.from_dlpack(a)
    return a  # a framework that we cannot make arrays of gets CuPy's, which speak DLPack
