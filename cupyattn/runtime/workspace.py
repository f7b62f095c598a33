"""Scratch memory of kernels: zeroed once, kept for as long as the process lives."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

from .launch import driver

_RELAXED_CAPTURE = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

_defaults: dict[tuple[int, int], Any] = {}
_retired: list[Any] = []  # outgrown, but captured graphs may still write to them
_lock = threading.Lock()


def zeroed(nbytes: int, device: int) -> Any:
    """Allocate `nbytes` on `device`, zero them and wait for that; also while a graph is being captured.

    A memset on the caller's stream would be captured with everything else, and the memory would not be
    zero before the graph's first replay. So it runs on a stream of its own, with this thread's view of
    captures relaxed, as allocations during a capture need it anyway.
    """
    import cupy

    with cupy.cuda.Device(device), _relaxed_capture(), cupy.cuda.Stream(non_blocking=True) as stream:
        memory = cupy.zeros(nbytes, cupy.uint8)
        stream.synchronize()
    return memory


def default_workspace(nbytes: int, device: int, stream: int) -> Any:
    """Return the workspace of a stream, made or grown at need. Work on one stream is ordered, so it can share."""
    key = (device, stream)
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
def _relaxed_capture() -> Iterator[None]:
    mode = ctypes.c_int(_RELAXED_CAPTURE)
    driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
