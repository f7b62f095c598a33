"""What the GPU tests share: a vectorised reference, checks on the device, graphs. All takes NumPy too."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
from problems import (
    DTYPES,
    LSE_TOLERANCE,
    NORM_TOLERANCE,
    POISON_PAGE,
    TOLERANCE,
    Guarded,
    Problem,
    assert_state,
    to_float64,
    to_host,
)

import cupyattn

_ROW_SLACK = 2  # one row's relative error may be so many times that of all rows together


def attend(problem: Problem, max_bytes: float = 1e9) -> tuple[Any, Any]:
    """What `decode` must give, in float64 on the problem's own device; shares no code with the library.

    Requests are padded to one length and computed together, as many as fit into `max_bytes`; sorted, so that
    a long one does not pad short ones.
    """
    xp, q = problem.xp, problem.q
    k_pages, v_pages = problem.k_pages, problem.v_pages
    if problem.layout == "HND":
        k_pages, v_pages = k_pages.swapaxes(1, 2), v_pages.swapaxes(1, 2)
    page_size, num_kv_heads, head_dim = k_pages.shape[1:]
    group = q.shape[1] // num_kv_heads
    lens = to_host(problem.kv_lens).astype(np.int64)
    ends = np.arange(len(lens) + 1) if problem.qo_indptr is None else to_host(problem.qo_indptr)
    begins, num_q = ends[:-1].astype(np.int64), np.diff(ends).astype(np.int64)
    first = np.zeros_like(lens)
    if problem.window_left >= 0:
        first = np.maximum(lens - num_q - problem.window_left, 0)
    widths = np.where(num_q > 0, np.maximum(lens - first, 0), 0)
    table = problem.kv_indices.reshape(-1)
    if problem.kv_indptr is None:
        rows = np.arange(len(lens)) * problem.kv_indices.shape[1]
    else:
        rows = to_host(problem.kv_indptr).astype(np.int64)

    out = xp.zeros(q.shape, np.float64)
    lse = xp.full(q.shape[:2], -math.inf)
    todo = np.argsort(widths, kind="stable")[::-1]
    todo = todo[widths[todo] > 0]
    while len(todo):
        width, most_q = int(widths[todo[0]]), 0
        for count, b in enumerate(todo):
            most_q = max(most_q, int(num_q[b]))
            row_bytes = 8 * num_kv_heads * (2 * head_dim + 2 * most_q * group)
            if count and (count + 1) * width * row_bytes > max_bytes:
                todo, rest = todo[:count], todo[count:]
                break
        else:
            rest = todo[:0]
        n = int(num_q[todo].max())
        length, begin, size, oldest, row = (
            xp.asarray(a[todo])[:, None] for a in (lens, begins, num_q, first, rows)
        )
        key = oldest + xp.arange(width)  # [requests, keys]
        token = xp.arange(n)
        position = (length - size + token)[..., None]  # [requests, queries, 1]
        seen = (key[:, None] <= position) & (token < size)[..., None]
        if problem.window_left >= 0:
            seen &= key[:, None] >= position - problem.window_left
        needed = seen.any(axis=1)
        ids = xp.where(needed, table[xp.where(needed, row + key // page_size, 0)], 0)
        # [requests, kv_heads, keys, head_dim]; what nobody sees may be NaN
        k, v = (
            xp.where(needed[..., None, None], to_float64(a[ids, key % page_size]), 0.0).swapaxes(1, 2)
            for a in (k_pages, v_pages)
        )
        tokens = xp.where(token < size, begin + token, 0)
        grouped = to_float64(q[tokens]).reshape(len(todo), n, num_kv_heads, group, head_dim).swapaxes(1, 2)
        logits = grouped.reshape(len(todo), num_kv_heads, n * group, head_dim) @ k.swapaxes(2, 3)
        logits *= problem.sm_scale
        if problem.logits_soft_cap:
            logits = problem.logits_soft_cap * xp.tanh(logits / problem.logits_soft_cap)
        logits = logits.reshape(len(todo), num_kv_heads, n, group, width)
        logits = xp.where(seen[:, None, :, None], logits, -math.inf)
        top = logits.max(axis=-1, keepdims=True)
        weights = xp.exp(logits - xp.where(xp.isinf(top), 0.0, top))
        total = weights.sum(axis=-1, keepdims=True)
        weights = (weights / xp.where(total > 0, total, 1.0)).reshape(len(todo), num_kv_heads, -1, width)
        mixed = (weights @ v).reshape(len(todo), num_kv_heads, n, group, head_dim).swapaxes(1, 2)
        with np.errstate(divide="ignore"):
            sums = (top + xp.log(total))[..., 0].swapaxes(1, 2)
        place = xp.broadcast_to(token < size, (len(todo), n))
        out[tokens[place]] = mixed[place].reshape(-1, num_kv_heads * group, head_dim)
        lse[tokens[place]] = sums[place].reshape(-1, num_kv_heads * group)
        todo = rest
    return out, lse


def misses(out: Any, lse: Any, expected: tuple[Any, Any], dtype: str, xp: ModuleType) -> Any:
    """How many numbers are wrong, as a 0-d array on the device: elementwise, in the norm of each row, in lse.

    The norm is what tells at long lengths, where every element of `out` is smaller than the tolerance.
    """
    wanted, wanted_lse = expected
    actual = to_float64(out)
    with np.errstate(invalid="ignore"):
        error = xp.abs(actual - wanted)
        bad = (~(error <= TOLERANCE[dtype] * (1 + xp.abs(wanted)))).sum()
        limit = _ROW_SLACK * NORM_TOLERANCE[dtype] * xp.sqrt((wanted * wanted).sum(axis=-1))
        bad = bad + (~(xp.sqrt((error * error).sum(axis=-1)) <= limit)).sum()
        if lse is not None:
            actual_lse = lse.astype(np.float64)
            error = xp.where(actual_lse == wanted_lse, 0.0, xp.abs(actual_lse - wanted_lse))
            # A finite number for -inf is infinitely wrong, and must not be measured by an infinite tolerance.
            limit = LSE_TOLERANCE * (1 + xp.where(xp.isinf(wanted_lse), 0.0, xp.abs(wanted_lse)))
            bad = bad + (~(error <= limit)).sum()
    return bad


def assert_right(out: Any, lse: Any, expected: tuple[Any, Any], dtype: str, what: object = "") -> None:
    """`misses` must count none; `what` names the problem in the message."""
    xp = np if isinstance(out, np.ndarray) else __import__("cupy")
    count = int(misses(out, lse, expected, dtype, xp))
    if count:
        assert_state(out, lse, (to_host(expected[0]), to_host(expected[1])), dtype)  # says where
        raise AssertionError(f"{count} rows or numbers are wrong: {what}")


def check(problem: Problem, what: object = "", **more: Any) -> tuple[Any, Any]:
    """Run `decode` into poisoned, guarded arrays; check every row, and that nothing beside is written."""
    outs = Guarded(problem.q.shape, problem.q.dtype, problem.xp)
    lses = Guarded(problem.q.shape[:2], np.float32, problem.xp)
    out, lse = problem.call(cupyattn.decode, out=outs.array, lse=lses.array, return_lse=True, **more)
    assert out is outs.array
    assert lse is lses.array
    try:
        assert_right(out, lse, attend(problem), problem.dtype, what)
        outs.assert_intact()
        lses.assert_intact()
    except AssertionError as error:
        error.add_note(f"problem: {what}")
        raise
    return out, lse


def poison(a: Any) -> Any:
    """Fill an array with NaN, by its bits."""
    a.view(f"u{a.dtype.itemsize}").fill({2: 0x7FFF, 4: 0x7FFFFFFF}[a.dtype.itemsize])
    return a


def random_numbers(xp: ModuleType, dtype: str, size: int, seed: int = 0) -> Any:
    """`size` nearly normal numbers of `dtype`, made on the device in pieces."""
    values = xp.empty(size, DTYPES[dtype])
    rng = xp.random.default_rng(seed)
    for at in range(0, size, 1 << 24):
        values[at : at + (1 << 24)] = rng.standard_normal(min(size - at, 1 << 24), dtype=np.float32).astype(
            DTYPES[dtype]
        )
    return values


class Pool:
    """Random keys and values that problems of any shape view as their pages; requests may share pages."""

    def __init__(self, xp: ModuleType, dtype: str, size: int) -> None:
        self.xp, self.dtype = xp, dtype
        self.flat = [random_numbers(xp, dtype, size, seed) for seed in (1, 2)]

    def problem(
        self,
        kv_lens: Any,
        *,
        page_size: int,
        num_kv_heads: int,
        group_size: int,
        head_dim: int,
        layout: str = "NHD",
        qo_lens: Any = None,
        num_pages: int | None = None,
        dense: bool = True,
        window_left: int = -1,
        seed: int = 0,
    ) -> Problem:
        xp, rng = self.xp, np.random.default_rng(seed)
        lens = np.asarray(kv_lens, np.int64)
        inner = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
        fit = self.flat[0].size // math.prod((*inner, head_dim))
        num_pages = fit if num_pages is None else min(num_pages, fit)
        used = num_pages * math.prod((*inner, head_dim))
        held = -(-lens // page_size)
        width = int(held.max(initial=0)) + 1
        table = rng.integers(0, num_pages, (len(lens), width), dtype=np.int32)
        table[np.arange(width) >= held[:, None]] = POISON_PAGE
        indptr = None
        if not dense:
            table = table[np.arange(width) <= held[:, None]]  # one entry more than needed, poisoned
            indptr = xp.asarray(np.concatenate([[0], np.cumsum(held + 1)]).astype(np.int32))
        num_q = np.ones(len(lens), np.int64) if qo_lens is None else np.asarray(qo_lens)
        q_shape = (int(num_q.sum()), num_kv_heads * group_size, head_dim)
        q = xp.random.default_rng(seed).standard_normal(q_shape, dtype=np.float32).astype(DTYPES[self.dtype])
        return Problem(
            q=q,
            bases=tuple(flat[:used].reshape(num_pages, *inner, head_dim) for flat in self.flat),
            kv_indptr=indptr,
            kv_indices=xp.asarray(table),
            kv_lens=xp.asarray(lens.astype(np.int32)),
            qo_indptr=None
            if qo_lens is None
            else xp.asarray(np.concatenate([[0], np.cumsum(num_q)]).astype(np.int32)),
            storage="separate",
            layout=layout,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            sm_scale=1 / math.sqrt(head_dim),
            window_left=window_left,
            logits_soft_cap=0.0,
        )


# -- streams and graphs; on NumPy everything is done at once --


def new_stream(xp: ModuleType) -> Any:
    """A stream as a context manager, with `synchronize`."""
    return _NoStream() if xp is np else xp.cuda.Stream(non_blocking=True)


class _NoStream(contextlib.nullcontext):  # type: ignore[type-arg]
    def synchronize(self) -> None:
        pass


def unused_stream(xp: ModuleType) -> Any:
    """A stream for which no default workspace has been made. (The driver hands out old handles again.)"""
    from cupyattn.runtime import workspace

    streams = [new_stream(xp)]
    while xp is not np and any(streams[-1].ptr == ptr for _, ptr, _ in workspace._defaults):
        streams.append(new_stream(xp))
    return streams[-1]


def capture(xp: ModuleType, stream: Any, call: Callable[[], Any], mode: str = "Relaxed") -> Callable[[], Any]:
    """Record `call` on `stream` into a graph; return what replays it there. On NumPy: `call` itself."""
    if xp is np:
        return call
    with stream:
        stream.begin_capture(getattr(xp.cuda.runtime, f"streamCaptureMode{mode}"))
        try:
            call()
        finally:  # a stream left capturing would spoil the tests after this one
            graph = stream.end_capture()
    return lambda: graph.launch(stream)


@contextlib.contextmanager
def freed(xp: ModuleType) -> Iterator[None]:
    """Give the memory of a large test back to the device at its end."""
    try:
        yield
    finally:
        if xp is not np:
            xp.get_default_memory_pool().free_all_blocks()
