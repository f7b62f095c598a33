"""Scratch memory of kernels: zeroed once, kept for as long as the process lives."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from .launch import driver

_RELAXED_CAPTURE = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_PER_THREAD_STREAM = 2  # CU_STREAM_PER_THREAD

_defaults: dict[tuple[int, int, int], Any] = {}
_retired: list[Any] = []  # outgrown, but captured graphs may still write to them
_lock = threading.Lock()


def zeroed(nbytes: int, device: int) -> Any:
    """Allocate `nbytes` of zeros on `device`; also while a graph is being captured (see `constant`)."""
    import cupy

    with _apart_from_captures(device):
        return cupy.zeros(nbytes, cupy.uint8)


def constant(values: np.ndarray, device: int) -> Any:
    """Copy an array to `device` and wait for that; also while a graph is being captured.

    On the caller's stream the copy would be captured with everything else, and the memory would not hold
    the values before the graph's first replay. So it runs on a stream of its own, with this thread's view of
    captures relaxed, as allocations during a capture need it anyway.
    """
    import cupy

    with _apart_from_captures(device):
        return cupy.asarray(values)


def default_workspace(nbytes: int, device: int, stream: int) -> Any:
    """Return the workspace of a stream, made or grown at need. Work on one stream is ordered, so it can share.

    A stream that is destroyed while its work is still under way may pass its handle, and so its workspace, on.
    """
    # Each thread has a default stream of its own under the one handle.
    thread = threading.get_ident() if stream == _PER_THREAD_STREAM else 0
    key = (device, stream, thread)
    memory = _defaults.get(key)
    if memory is None or memory.nbytes < nbytes:
        with _lock:
            memory = _defaults.get(key)
            if memory is None or memory.nbytes < nbytes:
                if memory is not None:
                    _retired.append(memory)
                memory = _defaults[key] = zeroed(nbytes, device)
    return memory


@contextlib.contextmanager
def _apart_from_captures(device: int) -> Iterator[None]:
    """Run the body on a stream of its own on `device`, whatever this thread is capturing, and wait for it."""
    import cupy

    with cupy.cuda.Device(device):
        mode = ctypes.c_int(_RELAXED_CAPTURE)
        driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            with cupy.cuda.Stream(non_blocking=True) as stream:
                yield
                stream.synchronize()
        finally:
            driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
