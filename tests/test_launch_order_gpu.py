"""Kernels start before those in front of them are done (launch.cuh): they rely on nothing that these may still write.

What each operation reads is written at the last moment: by a kernel that lets the next one start at once and then
takes its time, by a copy after it, or on another stream; launched one by one, and as a graph. Before, there are numbers
that make no sense, and some that could be true.
"""

from __future__ import annotations

import numpy as np
import pytest
from cascade_problems import build_cascade
from device import assert_heads, capture, new_stream, poison
from problems import build_mla_problem, build_problem

import cupyattn

pytestmark = pytest.mark.alone

_LATE = r"""
extern "C" __global__ void write_late(char* to, const char* from, long long num_bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  for (const long long begin = clock64(); clock64() - begin < 400000;) {}  // 200 us and more, which hosts take too
  for (long long i = threadIdx.x; i < num_bytes; i += blockDim.x) to[i] = from[i];
}
"""


def tables_of(p):
    arrays = {name: getattr(p, name) for name in ("kv_lens", "kv_indptr", "kv_indices", "qo_indptr")}
    return {name: array for name, array in arrays.items() if array is not None}


def decode_case(gpu, lens=(3000, 1, 700, 64), **arguments):
    p = build_problem(lens, poison=False, xp=gpu, **arguments)
    out, lse = gpu.empty(p.out_shape, p.q.dtype), gpu.empty(p.q.shape[:2], np.float32)
    arrays = {"q": p.q, "pages": p.bases[0], **tables_of(p)}
    return arrays, (out, lse), lambda **more: p.call(cupyattn.decode, out=out, lse=lse, **more)


def strided_table_case(gpu, row_stride, **arguments):
    """A dense table whose rows begin `row_stride` entries apart: more than a row's width, or less, as rows overlap."""
    lens = [3000, 700, 64, 1]
    p = build_problem(lens, poison=False, xp=gpu, dense=True, head_dim=128, num_kv_heads=8, **arguments)
    batch, width = p.kv_indices.shape
    assert row_stride != width
    memory = gpu.arange((batch - 1) * row_stride + width, dtype=np.int32) * 7 % p.bases[0].shape[0]
    table = gpu.lib.stride_tricks.as_strided(memory, (batch, width), (4 * row_stride, 4))
    p = p.replace(kv_indices=table)
    out, lse = gpu.empty(p.out_shape, p.q.dtype), gpu.empty(p.q.shape[:2], np.float32)
    arrays = {"q": p.q, "pages": p.bases[0], "kv_lens": p.kv_lens, "kv_indices": memory}
    return arrays, (out, lse), lambda **more: p.call(cupyattn.decode, out=out, lse=lse, **more)


def mla_case(gpu, lens, **arguments):
    p = build_mla_problem(lens, poison=False, xp=gpu, **arguments)
    out, lse = gpu.empty(p.out_shape, p.q.dtype), gpu.empty(p.q.shape[:2], np.float32)
    arrays = {"q": p.q, "pages": p.bases[0], **tables_of(p)}
    return arrays, (out, lse), lambda **more: p.call(cupyattn.mla_decode, out=out, lse=lse, **more)


def cascade_case(gpu, own_lens=(300, 1, 40), shared=(([3], [2000]),), **arguments):
    cascade = build_cascade(own_lens, shared, poison=False, xp=gpu, **arguments)
    p = cascade.problem
    out, lse = gpu.empty(p.out_shape, p.q.dtype), gpu.empty(p.q.shape[:2], np.float32)
    (shared, offsets), (own, _) = cascade.levels.levels
    arrays = {"q": p.q, "kv_lens": own.kv_lens, "shared lens": shared.kv_lens, "offsets": offsets}
    for name, pages in (("own", own), ("shared", shared)):
        arrays[f"{name} indices"] = pages.kv_indices
        if pages.kv_indptr is not None:
            arrays[f"{name} indptr"] = pages.kv_indptr
    return arrays, (out, lse), lambda **more: cascade.call(out=out, lse=lse, **more)


def append_case(gpu):
    p = build_problem([30, 1, 70], poison=False, xp=gpu)
    new = {name: gpu.ones((3, 2, p.head_dim), p.q.dtype) for name in ("k", "v")}
    cache = [gpu.empty_like(a) for a in p.bases]
    pages = p.replace(bases=tuple(cache)).cache
    arrays = {**new, "kv_lens": p.kv_lens, "kv_indices": p.kv_indices}
    return arrays, cache, lambda: cupyattn.append(new["k"], new["v"], pages, p.pages)


def merge_case(gpu):
    rng = np.random.default_rng(0)
    out = gpu.asarray(rng.standard_normal((4, 50, 2, 64)).astype(np.float16))
    lse = gpu.asarray(rng.standard_normal((4, 50, 2)).astype(np.float32))
    into = gpu.empty((50, 2, 64), np.float16), gpu.empty((50, 2), np.float32)
    return {"out": out, "lse": lse}, into, lambda: cupyattn.merge_states(out, lse, into=into)


def pairs_case(gpu):
    arguments = {"num_kv_heads": 4, "head_dim": 64, "dense": True, "spare_entries": 2000}
    assert_heads(build_problem([3000], poison=False, xp=gpu, **arguments), 2)
    return decode_case(gpu, **arguments)


CASES = {
    "decode": lambda gpu: decode_case(gpu, group_size=4),
    "decode, many rows": lambda gpu: decode_case(gpu, group_size=40, head_dim=128),
    "decode, parts": lambda gpu: decode_case(
        gpu, num_kv_heads=8, head_dim=128, dense=True, spare_entries=2000
    ),
    "decode, pairs of heads": pairs_case,
    "decode, table with wide rows": lambda gpu: strided_table_case(gpu, 200),
    "decode, table with rows in common": lambda gpu: strided_table_case(gpu, 1),
    "decode, parts, table with rows in common": lambda gpu: strided_table_case(gpu, 3, spare_entries=2000),
    "decode, 16 rows of a window": lambda gpu: decode_case(
        gpu, [3000, 0, 700, 64, 0], group_size=12, head_dim=128, window_left=40
    ),
    "decode, many requests": lambda gpu: decode_case(gpu, list(range(1, 200))),
    "decode, more tokens": lambda gpu: decode_case(gpu, qo_lens=[2, 1, 3, 0]),
    "mla_decode": lambda gpu: mla_case(gpu, [3000, 1, 700], num_heads=16),
    "mla_decode, long runs": lambda gpu: mla_case(gpu, [40_000, 0, 1000], num_heads=16),
    "mla_decode, 32 rows of a window": lambda gpu: mla_case(
        gpu, [3000, 0, 700], num_heads=20, window_left=500
    ),
    "mla_decode, short requests of 64 rows": lambda gpu: mla_case(gpu, [700, 1, 0, 64], num_heads=64),
    "mla_decode, 64 rows": lambda gpu: mla_case(gpu, [9000, 1, 0, 64], num_heads=64, dense=True),
    "mla_decode, pairs": lambda gpu: mla_case(gpu, [40_000, 1000], num_heads=128),
    "mla_decode, 128 rows of short runs": lambda gpu: mla_case(gpu, [3000, 700], num_heads=128),
    "mla_decode, many requests": lambda gpu: mla_case(gpu, list(range(1, 200)), num_heads=64),
    "mla_decode, more tokens": lambda gpu: mla_case(gpu, [3000, 1, 700], num_heads=40, qo_lens=[2, 0, 3]),
    "cascade_decode": cascade_case,
    "cascade_decode, several nodes a thread": lambda gpu: cascade_case(
        gpu, list(range(300)), [([100] * 3, [1000, 64, 0])], group_size=4
    ),
    "cascade_decode, a window": lambda gpu: cascade_case(gpu, window_left=500),
    "cascade_decode, nodes in memory": lambda gpu: cascade_case(gpu, [5] * 1600, [([16] * 100, [64] * 100)]),
    "cascade_decode, MLA": lambda gpu: cascade_case(gpu, mla=True, num_heads=16),
    "cascade_decode, MLA, 64 rows": lambda gpu: cascade_case(
        gpu, [300, 1, 40] * 20, [([30, 15, 15], [4000, 100, 3000])], mla=True, num_heads=16
    ),
    "append": append_case,
    "merge_states": merge_case,
}


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("way", ["kernel", "copy", "other stream"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_last_is_what_counts(gpu, case, way, in_graph):
    arrays, results, call = CASES[case](gpu)
    for result in results:
        poison(result)
    call()
    wanted = [result.get().tobytes() for result in results]
    late = gpu.RawKernel(_LATE, "write_late")
    stream, other = new_stream(gpu), new_stream(gpu)
    forked, joined = (gpu.cuda.Event(disable_timing=True) for _ in range(2))
    rng = np.random.default_rng(0)
    for name, array in arrays.items():
        assert array.flags.c_contiguous, name
        right, staging = array.copy(), gpu.empty_like(array)
        stale = [np.full(array.nbytes, byte, np.uint8) for byte in (0, 0x13, 0xFF)]
        if array.dtype == np.int32:  # and what might be true, or is the largest number
            stale += [right.get(), np.maximum(right.get() - 1, 0), rng.permuted(right.get(), axis=-1)]
            stale.append(np.full_like(right.get(), 2**31 - 1))
        for before in map(gpu.asarray, stale):

            def step(array=array, right=right, staging=staging, before=before):
                array.data.copy_from_device_async(before.data, array.nbytes)
                if way == "other stream":
                    forked.record(stream)
                    other.wait_event(forked)
                    with other:
                        late((1,), (256,), (array, right, np.int64(array.nbytes)))
                        joined.record(other)
                for result in results:
                    poison(result)
                if way == "other stream":
                    stream.wait_event(joined)
                else:
                    target = array if way == "kernel" else staging
                    late((1,), (256,), (target, right, np.int64(array.nbytes)))
                    if way == "copy":
                        array.data.copy_from_device_async(staging.data, array.nbytes)
                call()

            gpu.cuda.Device().synchronize()
            with stream:
                step()  # loads the kernels, and allocates what a capture must not
            gpu.cuda.Device().synchronize()
            run = capture(gpu, stream, step) if in_graph else step
            for i in range(2):
                with stream:
                    run()
                stream.synchronize()
                assert [result.get().tobytes() for result in results] == wanted, (name, i)


ATTENTION = [case for case in CASES if "decode" in case]


@pytest.mark.parametrize("case", ATTENTION)
def test_tables_that_are_read_early_do_not_let_keys_be(gpu, case):
    """With `pdl`, the kernel before may write q and the cache."""
    arrays, results, call = CASES[case](gpu)
    call()
    wanted = [result.get().tobytes() for result in results]
    late = gpu.RawKernel(_LATE, "write_late")
    for name in {"q", "pages"} & set(arrays):
        array, right = arrays[name], arrays[name].copy()
        for _ in range(5):
            array.view(f"u{array.dtype.itemsize}").fill(0)
            for result in results:
                poison(result)
            late((1,), (256,), (array, right, np.int64(array.nbytes)))
            call(pdl=True)
            assert [result.get().tobytes() for result in results] == wanted, name


@pytest.mark.parametrize("between", ["append", "merge_states", "decode", "mla_decode", "cascade_decode"])
@pytest.mark.parametrize("case", ATTENTION)
def test_who_waits_for_a_kernel_waits_for_all_before(gpu, case, between):
    """Tables are written before another of our kernels, and read early (`pdl`) beside that one."""
    arrays, results, call = CASES[case](gpu)
    _, _, call_between = CASES[between](gpu)
    call(), call_between()
    wanted = [result.get().tobytes() for result in results]
    late = gpu.RawKernel(_LATE, "write_late")
    for name in set(arrays) - {"q", "pages"}:
        array, right = arrays[name], arrays[name].copy()
        for _ in range(3):
            array.fill(0)
            for result in results:
                poison(result)
            late((1,), (256,), (array, right, np.int64(array.nbytes)))
            call_between()
            call(pdl=True)
            assert [result.get().tobytes() for result in results] == wanted, name
