"""What the GPU tests share: a vectorised reference, checks on the device, graphs. All takes NumPy too."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import sys
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
from cupyattn import kernels, mla
from cupyattn.plan import PlanCache
from cupyattn.runs import is_zeroed, workspace_layout
from cupyattn.runtime.device import num_devices

_ROW_SLACK = 2  # one row's relative error may be so many times that of all rows together


def size(xp: ModuleType, on_device: Any, on_host: Any) -> Any:
    """How much of a test runs on a GPU, and how little on NumPy."""
    return on_host if xp is np else on_device


def attend(problem: Problem, max_bytes: float = 1e9) -> tuple[Any, Any]:
    """What `decode` must give, in float64 on the problem's own device; shares no code with the library.

    Requests are padded to one length and computed together, as many as fit into `max_bytes`; sorted, so that
    a long one does not pad short ones.
    """
    xp, q = problem.xp, problem.q
    page_size, num_kv_heads, head_dim = problem.page_size, problem.num_kv_heads, problem.head_dim
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

    out = xp.zeros(problem.out_shape, np.float64)
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
        # [requests, kv_heads, keys, dim]; what nobody sees may be NaN
        k, v = (
            xp.where(needed[..., None, None], a, 0.0).swapaxes(1, 2)
            for a in problem.gather(ids, key % page_size)
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
        mixed = (weights @ v).reshape(len(todo), num_kv_heads, n, group, problem.value_dim).swapaxes(1, 2)
        with np.errstate(divide="ignore"):
            sums = (top + xp.log(total))[..., 0].swapaxes(1, 2)
        place = xp.broadcast_to(token < size, (len(todo), n))
        out[tokens[place]] = mixed[place].reshape(-1, num_kv_heads * group, problem.value_dim)
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


def relative_error(actual: Any, expected: Any) -> float:
    """``||actual - expected|| / ||expected||``; 0 only for zeros where all of `expected` is 0."""
    actual = to_float64(actual)
    norm, difference = (float((a * a).sum()) ** 0.5 for a in (expected, actual - expected))
    return difference / norm if norm else math.inf * difference if difference else 0.0


def assert_right(out: Any, lse: Any, expected: tuple[Any, Any], dtype: str, what: object = "") -> None:
    """`misses` must count none; `what` names the problem in the message."""
    xp = np if isinstance(out, np.ndarray) else __import__("cupy")
    count = int(misses(out, lse, expected, dtype, xp))
    if count:
        assert_state(out, lse, (to_host(expected[0]), to_host(expected[1])), dtype)  # says where
        raise AssertionError(f"{count} rows or numbers are wrong: {what}")


def check(
    problem: Problem, what: object = "", *, decode: Callable[..., Any] | None = None, **more: Any
) -> tuple[Any, Any]:
    """Run `decode` into poisoned, guarded arrays; check every row, and that nothing beside is written.

    With another `decode` than the problem's own, that is called in its place, with the same arguments.
    """
    outs = Guarded(problem.out_shape, problem.q.dtype, problem.xp)
    lses = Guarded(problem.q.shape[:2], np.float32, problem.xp)
    out, lse = problem.call(decode or problem.decode, out=outs.array, lse=lses.array, return_lse=True, **more)
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


def _pair_of_views(q: Any, cache: Any, pages: Any, **options: Any) -> Any:
    return cupyattn.mla_decode((q[..., : cache.ckv_dim], q[..., cache.ckv_dim :]), cache, pages, **options)


def _pair_of_arrays(q: Any, cache: Any, pages: Any, **options: Any) -> Any:
    xp = cupyattn.get_array_module(q)
    pair = [xp.ascontiguousarray(a) for a in (q[..., : cache.ckv_dim], q[..., cache.ckv_dim :])]
    return cupyattn.mla_decode(pair, cache, pages, **options)


#: The ways in which `mla_decode` takes the query of a problem.
QUERIES = {"one-array": cupyattn.mla_decode, "views": _pair_of_views, "two-arrays": _pair_of_arrays}


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
        ckv_dim: int | None = None,
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
        bases = tuple(flat[:used].reshape(num_pages, *inner, head_dim) for flat in self.flat)
        if ckv_dim is not None:
            bases = (bases[0].reshape(num_pages, page_size, head_dim),)
        q = xp.random.default_rng(seed).standard_normal(q_shape, dtype=np.float32).astype(DTYPES[self.dtype])
        return Problem(
            q=q,
            bases=bases,
            kv_indptr=indptr,
            kv_indices=xp.asarray(table),
            kv_lens=xp.asarray(lens.astype(np.int32)),
            qo_indptr=None
            if qo_lens is None
            else xp.asarray(np.concatenate([[0], np.cumsum(num_q)]).astype(np.int32)),
            storage="separate" if ckv_dim is None else "mla",
            layout=layout,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            sm_scale=1 / math.sqrt(head_dim),
            window_left=window_left,
            logits_soft_cap=0.0,
            ckv_dim=ckv_dim,
        )


# -- the bits of results --


def decode_bytes(problem: Problem, **more: Any) -> bytes:
    """All that the call gives, in bytes."""
    out, lse = problem.call(problem.decode, return_lse=True, **more)
    return to_host(out).tobytes() + to_host(lse).tobytes()


def pick(problem: Problem, requests: Any) -> Problem:
    """The batch of these requests of a problem with a CSR table, in this order."""
    xp = problem.xp

    def rows(values: Any, indptr: Any) -> tuple[Any, Any]:
        begins = to_host(indptr)
        picked = np.concatenate([np.arange(begins[b], begins[b + 1]) for b in requests])
        ends = np.cumsum(np.diff(begins)[requests])
        return values[xp.asarray(picked)], xp.asarray(np.concatenate([[0], ends]).astype(np.int32))

    kv_indices, kv_indptr = rows(problem.kv_indices, problem.kv_indptr)
    chosen = problem.replace(
        kv_indptr=kv_indptr, kv_indices=kv_indices, kv_lens=problem.kv_lens[xp.asarray(requests)]
    )
    if problem.qo_indptr is None:
        return chosen.replace(q=problem.q[xp.asarray(requests)])
    q, qo_indptr = rows(problem.q, problem.qo_indptr)
    return chosen.replace(q=q, qo_indptr=qo_indptr)


def bits_of_requests(problem: Problem, **more: Any) -> list[bytes]:
    """What the call gives each request of a batch, in bytes."""
    out, lse = (to_host(a) for a in problem.call(problem.decode, return_lse=True, **more))
    begins = range(len(out) + 1) if problem.qo_indptr is None else to_host(problem.qo_indptr)
    return [out[a:b].tobytes() + lse[a:b].tobytes() for a, b in itertools.pairwise(begins)]


def assert_neighbours_change_no_bit(every: Problem, fixed_split_size: int) -> None:
    """Each of 40 requests alone, then in batches of 3 and of 40, at other places beside other neighbours."""
    mode, kv_lens = {"fixed_split_size": fixed_split_size}, to_host(every.kv_lens)
    alone = [bits_of_requests(pick(every, [b]), **mode)[0] for b in range(40)]
    threes = ([0, 1, 2], [2, 0, 30], [17, 5, 0], [1, 1, 1])
    for batch in map(list, (*threes, range(40), range(39, -1, -1), np.random.default_rng(0).permutation(40))):
        found = bits_of_requests(pick(every, batch), **mode)
        for place, (b, bits) in enumerate(zip(batch, found, strict=True)):
            assert bits == alone[b], f"request {b} of {kv_lens[b]} keys, at place {place} of {len(batch)}"


# -- streams and graphs; on NumPy everything is done at once --


@contextlib.contextmanager
def _chosen(name: str, config: Any, plans: PlanCache[Any]) -> Iterator[None]:
    for device in range(num_devices()):
        workspace_layout(device)  # is kept, and must be that of all shapes
    chosen = getattr(kernels, name)
    setattr(kernels, name, lambda *args: config)
    plans.clear()
    try:
        yield
    finally:
        setattr(kernels, name, chosen)
        plans.clear()


def decode_shape(config: kernels.DecodeConfig) -> Any:
    """A context in which `decode` takes this shape, whatever it would choose."""
    return _chosen("decode_config", config, sys.modules["cupyattn.decode"]._plans)  # type: ignore[attr-defined]


def mla_shape(config: kernels.MLAConfig | kernels.MLASm90Config) -> Any:
    """The same for `mla_decode` without fixed splits on sm_90a."""
    return _chosen("mla_sm90_config", config, mla.plans)


def new_stream(xp: ModuleType) -> Any:
    """A stream as a context manager, with `synchronize`. It waits for no other: all that is under way is done first."""
    if xp is np:
        return _NoStream()
    xp.cuda.Device().synchronize()
    return xp.cuda.Stream(non_blocking=True)


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


# -- replays that follow changes --


class Changing:
    """A problem whose lengths, tables and queries are rewritten in place, at random, within fixed shapes."""

    def __init__(
        self,
        xp: ModuleType,
        pool: Pool,
        *,
        dense: bool,
        ragged: bool,
        head_dim: int,
        group_size: int,
        num_kv_heads: int = 2,
        ckv_dim: int | None = None,
        window_left: int = -1,
        fixed_split_size: int | None = None,
        batch: int = 11,
    ) -> None:
        self.mode = {"fixed_split_size": fixed_split_size}
        self.xp, self.rng, self.page_size = xp, np.random.default_rng(batch), 16
        self.longest, self.dense, self.ragged = size(xp, 6000, 150), dense, ragged
        self.problem = pool.problem(
            [self.longest] * batch, page_size=self.page_size, num_kv_heads=num_kv_heads, group_size=group_size,
            head_dim=head_dim, ckv_dim=ckv_dim, dense=dense, qo_lens=[6] * batch if ragged else None,
            window_left=window_left,
        )  # fmt: skip
        self.out = xp.empty(self.problem.out_shape, self.problem.q.dtype)
        self.lse = xp.empty(self.problem.q.shape[:2], np.float32)

    def call(self, **more: Any) -> None:
        p = self.problem
        p.call(p.decode, **({"out": self.out, "lse": self.lse} | self.mode | more))

    def workspace(self) -> Any:
        p = self.problem
        num_bytes = cupyattn.decode_workspace_bytes(p.q, p.cache, p.pages, qo_indptr=p.qo_indptr, **self.mode)
        return cupyattn.decode_workspace(num_bytes=num_bytes)

    def change(self) -> None:
        p, xp, rng = self.problem, self.xp, self.rng
        batch = len(p.kv_lens)
        scale = rng.choice([0, 1, 64, 300, self.longest])  # all empty, tiny, ..., from one CTA to all
        lens = rng.integers(0, min(scale, self.longest) + 1, batch)
        lens[rng.random(batch) < 0.2] = 0
        lens[rng.random(batch) < 0.1] = self.longest
        table = rng.integers(0, len(p.bases[0]), (batch, -(-self.longest // self.page_size) + 1))
        table[np.arange(table.shape[1]) >= -(-lens // self.page_size)[:, None]] = POISON_PAGE
        if self.dense:
            p.kv_indices[...] = xp.asarray(table.astype(np.int32))
        else:  # the rows packed anew: offsets change too
            held = -(-lens // self.page_size)
            packed = np.full(p.kv_indices.shape, POISON_PAGE, np.int32)
            rows = table[np.arange(table.shape[1]) < held[:, None]]
            packed[: len(rows)] = rows
            p.kv_indices[...] = xp.asarray(packed)
            p.kv_indptr[...] = xp.asarray(np.concatenate([[0], np.cumsum(held)]).astype(np.int32))
        p.kv_lens[...] = xp.asarray(lens.astype(np.int32))
        if self.ragged:  # another split of the same number of tokens
            cuts = np.sort(rng.integers(0, len(p.q) + 1, batch - 1))
            p.qo_indptr[...] = xp.asarray(np.concatenate([[0], cuts, [len(p.q)]]).astype(np.int32))
        p.q[...] = xp.random.default_rng(int(rng.integers(2**31))).standard_normal(
            p.q.shape, dtype=np.float32
        ).astype(p.q.dtype)  # fmt: skip
        poison(self.out)
        poison(self.lse)

    def misses(self) -> Any:
        return misses(self.out, self.lse, attend(self.problem), self.problem.dtype, self.xp)


def replay_often(
    xp: ModuleType, changing: Changing, stream: Any, replay: Callable[[], Any], times: int
) -> None:
    """Change, replay, compare; only the counts of misses come back, at the end."""
    counts = []
    for _ in range(times):
        with stream:
            changing.change()
            replay()
            counts.append(changing.misses())
    stream.synchronize()
    wrong = [i for i, count in enumerate(counts) if int(count)]
    assert not wrong, f"{len(wrong)} of {times} replays are wrong, the first is {wrong[0]}"


def replay_pairs(xp: ModuleType, changing: Changing, times: int, num_states: int) -> None:
    """Replay two launches `times` times, the second of which reads tables while the first is finishing (`pdl`).

    Before each replay one of `num_states` states is put into the arrays; both results are compared on the device.
    """
    p = changing.problem
    names = [
        name
        for name in ("q", "kv_indptr", "kv_indices", "kv_lens", "qo_indptr")
        if getattr(p, name) is not None
    ]
    states = []
    for _ in range(num_states):
        changing.change()
        states.append(([getattr(p, name).copy() for name in names], attend(p)))
    other_out, other_lse = xp.empty_like(changing.out), xp.empty_like(changing.lse)

    def launch_twice() -> None:
        changing.call()
        changing.call(out=other_out, lse=other_lse, pdl=True)

    launch_twice()  # loads the kernel, on another stream
    stream = new_stream(xp)
    if xp is not np:
        xp.cuda.Device().synchronize()
    replay = capture(xp, stream, launch_twice)
    with stream:
        counts = xp.zeros(times, np.int64)
        for i, pick in enumerate(np.random.default_rng(0).integers(len(states), size=times)):
            values, expected = states[pick]
            for name, value in zip(names, values, strict=True):
                getattr(p, name)[...] = value
            for a in (changing.out, changing.lse, other_out, other_lse):
                poison(a)
            replay()
            counts[i] = misses(changing.out, changing.lse, expected, p.dtype, xp)
            counts[i] += (changing.out.view(np.uint16) != other_out.view(np.uint16)).sum()
            counts[i] += (changing.lse != other_lse).sum()
    stream.synchronize()
    wrong = np.flatnonzero(to_host(counts))
    assert not len(wrong), f"{len(wrong)} of {times} replays are wrong, the first is {wrong[0]}"


# -- beside another kernel --

_HOG = r"""
extern "C" __global__ void hog(long long num_clocks) {  // all of an SM that a block can take
  for (const long long begin = clock64(); clock64() - begin < num_clocks;) {}
}
"""


def beside_another_kernel(gpu: ModuleType, launch: Callable[[], Any], num_free: int = 1) -> Iterator[bool]:
    """Launch while another kernel holds all SMs but `num_free`, then half, then an eighth of them.

    Says each time whether the launch ended before that kernel did.
    """
    properties = gpu.cuda.runtime.getDeviceProperties(gpu.cuda.runtime.getDevice())
    num_sms, shared = properties["multiProcessorCount"], properties["sharedMemPerBlockOptin"]
    hog = gpu.RawKernel(_HOG, "hog")
    hog.max_dynamic_shared_size_bytes = shared
    streams = [unused_stream(gpu), unused_stream(gpu)]
    for held in (num_sms - num_free, num_sms // 2, num_sms // 8):
        gpu.cuda.Device().synchronize()
        with streams[0]:
            hog((held,), (32,), (np.int64(50_000_000),), shared_mem=shared)  # 25 to 30 ms
        with streams[1]:
            launch()
        streams[1].synchronize()
        nobody_waited = not streams[0].done
        gpu.cuda.Device().synchronize()
        yield nobody_waited


def check_where_another_kernel_holds_the_sms(
    gpu: ModuleType, problem: Problem, fixed_split_size: int | None, num_free: int = 1
) -> None:
    """CTAs that end before all have started must not wait for those that cannot start: the bits are the same."""
    operands = problem.q, problem.cache, problem.pages
    mode: dict[str, Any] = {"fixed_split_size": fixed_split_size}
    workspace = cupyattn.decode_workspace(num_bytes=cupyattn.decode_workspace_bytes(*operands, **mode))
    mode["workspace"] = workspace
    expected = decode_bytes(problem, **mode)
    out = poison(gpu.empty(problem.out_shape, problem.q.dtype))
    lse = gpu.empty(problem.q.shape[:2], np.float32)
    for nobody_waited in beside_another_kernel(
        gpu, lambda: problem.call(problem.decode, out=out, lse=lse, **mode), num_free
    ):
        assert nobody_waited
        assert to_host(out).tobytes() + to_host(lse).tobytes() == expected
        assert is_zeroed(workspace)
        poison(out)


def assert_heads(problem: Problem, heads: int, **settings: Any) -> None:
    """On a GPU: the kernel that is chosen has tiles of so many KV heads."""
    if problem.xp is np:
        return
    operands = problem.q, problem.cache, problem.qo_indptr, problem.pages, None, None, None
    plan = sys.modules["cupyattn.decode"]._plans.make(operands, (settings.get("fixed_split_size"),))
    template = re.search("<(.*)>", plan.runs._kernel.name)[1].split(", ")
    assert int(template[kernels.DECODE.template.index("kHeads")]) == heads
