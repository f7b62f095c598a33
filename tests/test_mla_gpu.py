"""`mla_decode` on the device: FlashInfer's grid, FlashMLA's lengths, edges, determinism, graphs, streams, fuzz.

All but what needs a device by nature runs on NumPy too, in small, so that the tests themselves are tested.
"""

from __future__ import annotations

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from device import (
    QUERIES,
    Changing,
    assert_neighbours_change_no_bit,
    assert_right,
    attend,
    bits_of_requests,
    capture,
    check,
    check_where_another_kernel_holds_the_sms,
    decode_bytes,
    freed,
    mla_shape,
    new_stream,
    pick,
    poison,
    relative_error,
    replay_often,
    replay_pairs,
    size,
    unused_stream,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import (
    MLA_STORAGES,
    POISON_PAGE,
    build_mla_problem,
    build_problem,
    to_backend,
    to_float64,
    to_host,
)
from strategies import FIXED_SPLIT_SIZES, MLA_DIMS, mla_arguments

import cupyattn
from cupyattn import PagedMLACache, Rope, kernels, mla_append, mla_decode
from cupyattn.runs import is_zeroed, workspace_layout
from cupyattn.runtime.device import device_properties

FUZZ_CASES = int(os.environ.get("CUPYATTN_FUZZ_CASES", "2000")) // 5
DTYPES = ("float16", "bfloat16")


def build(xp, kv_lens, **arguments):
    """`build_mla_problem` with rows as the GPU takes them; on NumPy with short ones, which cost little."""
    return build_mla_problem(kv_lens, **size(xp, {}, {"ckv_dim": 32, "kpe_dim": 8}), **arguments, xp=xp)


def rows_of(xp):
    """The same for the problems of a `Pool`."""
    return {"num_kv_heads": 1} | size(xp, {"head_dim": 576, "ckv_dim": 512}, {"head_dim": 40, "ckv_dim": 32})


# -- FlashInfer's grid --


@pytest.mark.parametrize("qo_len", [1, 3, 7, 17])
@pytest.mark.parametrize("page_size", [1, 16, 32, 64])
def test_grid_of_flashinfer(xp, pools, page_size, qo_len):
    """Batch x length x heads, causal; the reference is computed once for 128 heads.

    Of its tolerances, the relative error is the stricter one.
    """
    batches, lengths, heads = size(
        xp,
        ((1, 3, 17, 157), (0, 17, 33, 96, 97, 114, 514, 1024, 8736), (16, 64, 128)),
        ((1, 3), (0, 17, 97), (16, 64)),
    )
    parity = (1, 16, 32, 64).index(page_size) + (1, 3, 7, 17).index(qo_len)
    with freed(xp):
        for i, (batch, kv_len) in enumerate(itertools.product(batches, lengths)):
            dtype = DTYPES[(i + parity) % 2]
            every = pools(xp, dtype).problem(
                [kv_len] * batch, page_size=page_size, group_size=heads[-1], dense=i % 3 == 0, seed=i,
                qo_lens=None if qo_len == 1 else [qo_len] * batch, **rows_of(xp),
            )  # fmt: skip
            wanted, wanted_lse = attend(every, 4e9)
            for num_heads in heads:
                some = every.replace(q=xp.ascontiguousarray(every.q[:, :num_heads]))
                expected = wanted[:, :num_heads], wanted_lse[:, :num_heads]
                out = poison(xp.empty(some.out_shape, some.q.dtype))
                lse = poison(xp.empty(some.q.shape[:2], np.float32))
                some.call(mla_decode, out=out, lse=lse)
                what = f"{batch=} {kv_len=} {qo_len=} {num_heads=} {page_size=} {dtype}"
                assert_right(out, lse, expected, dtype, what)
                assert relative_error(out, expected[0]) <= 3e-3, what
                with np.errstate(invalid="ignore"):
                    error = xp.where(lse == expected[1], 0.0, xp.abs(lse - expected[1]))
                assert float(error.max()) <= 1e-3, what


# -- FlashMLA's lengths --


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qo_len", [1, 2])
@pytest.mark.parametrize("num_heads", [64, 128])
def test_ragged_lengths(xp, num_heads, qo_len, dtype):
    """Normally distributed, some 0; NaN past each end, the table's rows poisoned from there on; pages of 64."""
    rng = np.random.default_rng(num_heads + qo_len)
    batch, mean = size(xp, (128, 4096), (5, 90))
    kv_lens = np.maximum(rng.normal(mean, mean / 2, batch).astype(int), 0)
    kv_lens[rng.permutation(batch)[: batch // 5]] = 0
    with freed(xp):
        problem = build(
            xp, kv_lens, qo_lens=None if qo_len == 1 else [qo_len] * batch, num_heads=num_heads, page_size=64,
            dtype=dtype, dense=True, spare_entries=3,
        )  # fmt: skip
        out, lse = check(problem, (num_heads, qo_len, dtype))
        empty = to_host(problem.kv_lens)[np.arange(len(problem.q)) // qo_len] == 0
        assert not to_host(out)[empty].any()  # exactly 0
        assert np.isneginf(to_host(lse)[empty]).all()


# -- every shape of the kernels --

SHAPES = {
    "one-token": {"kv_lens": [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 700], "num_heads": 16},
    "one-token-64-rows": {"kv_lens": [0, 1, 63, 64, 65, 700], "num_heads": 64},
    "one-token-128-rows": {"kv_lens": [300, 0, 64, 1], "num_heads": 128},
    "few-tokens": {"kv_lens": [1, 64, 200, 5, 0], "qo_lens": [1, 4, 3, 0, 4], "num_heads": 5},
    "few-tokens-of-one-head": {"kv_lens": [300, 64, 1, 0], "qo_lens": [7, 12, 1, 3], "num_heads": 1},
    "window": {"kv_lens": [0, 3, 64, 65, 400, 900], "num_heads": 33, "window_left": 63},
    "own-token": {"kv_lens": [1, 17, 300], "num_heads": 16, "window_left": 0},
    "soft-cap": {"kv_lens": [40, 300, 2], "num_heads": 40, "logits_soft_cap": 5.0, "sm_scale": 1.0},
    "many-rows": {"kv_lens": [64, 130, 1, 40, 7], "qo_lens": [64, 33, 1, 0, 5], "num_heads": 17},
    "chunk": {
        "kv_lens": [300, 64, 90], "qo_lens": [64, 64, 17], "num_heads": 16, "window_left": 70,
        "logits_soft_cap": 30.0,
    },
    "more-tokens-than-keys": {"kv_lens": [3, 0, 20], "qo_lens": [5, 4, 21], "num_heads": 7},
}  # fmt: skip


def room(xp, shape):
    """Entries of each row that nobody reads: it decides which kernel serves up to 64 rows."""
    return size(xp, 80_000 // max(len(shape["kv_lens"]), 1), 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(xp, name, dtype):
    """Storage, table, page size and the form of q in turn."""
    shape = SHAPES[name]
    kinds = itertools.product(MLA_STORAGES, (False, True))
    queries, pages = itertools.cycle(QUERIES), itertools.cycle((1, 16, 3, 64))
    for i, (storage, dense) in enumerate(kinds):
        arguments = shape | {"storage": storage, "dense": dense, "page_size": next(pages)}
        if i in (1, 2, 4):
            arguments["spare_entries"] = room(xp, shape)
        query = next(queries) if i < 3 else "one-array"
        problem = build(xp, dtype=dtype, seed=i, **arguments)
        check(problem, (name, dtype, query, arguments), decode=QUERIES[query])


@pytest.mark.parametrize("num_heads", [5, 40, 128])
@pytest.mark.parametrize(
    "config", kernels.mla_plain_configs("sm_90a"), ids=lambda c: f"{type(c).__name__}-{c.tile_q}"
)
def test_every_shape_also_where_it_would_not_be_chosen(xp, config, num_heads):
    """Several tiles of rows read the same keys; many CTAs leave partial states; the bits are the same each time."""
    if xp is not np and device_properties().arch != "sm_90a":
        pytest.skip("there, one kernel has all shapes")
    kv_lens = size(xp, [4100, 0, 257, 64, 1, 9000], [41, 0, 25, 6, 1])
    with mla_shape(config):
        for i, qo_lens in enumerate((None, [3, 1, 0, 2, 1, 5][: len(kv_lens)])):
            problem = build(
                xp, kv_lens, qo_lens=qo_lens, num_heads=size(xp, num_heads, 4), page_size=(64, 1)[i],
                window_left=(-1, 700)[i], dtype=DTYPES[i], seed=i,
            )  # fmt: skip
            check(problem, (config, num_heads, i))
            assert len({decode_bytes(problem) for _ in range(size(xp, 30, 2))}) == 1


@pytest.mark.parametrize("num_heads", [1, 2, 5, 7, 17, 31, 33, 40, 65, 100, 127])
def test_any_number_of_heads(xp, num_heads):
    """With little and with much room in the table, one query token and several."""
    shape = {"kv_lens": size(xp, [0, 1, 64, 100, 1000, 5000], [0, 1, 100])}
    for i, (roomy, qo_lens) in enumerate(itertools.product((False, True), (None, [2, 3, 1, 0, 5, 1]))):
        more = {"spare_entries": room(xp, shape)} if roomy else {}
        if qo_lens is not None:
            more["qo_lens"] = qo_lens[: len(shape["kv_lens"])]
        problem = build(xp, num_heads=num_heads, dtype=DTYPES[i % 2], **shape, **more)
        check(problem, (num_heads, more))
        if not roomy:
            check(problem, (num_heads, more, "fixed splits"), fixed_split_size=256)


@pytest.mark.parametrize(
    "window_left", [0, 1, 30, 31, 32, 33, 46, 47, 48, 49, 62, 63, 64, 65, 500, 2**31 - 1]
)
def test_windows_around_tile_edges(xp, window_left):
    for num_heads, qo_lens in itertools.product((16, 128), (None, [1, 2, 0, 64, 1, 5, 9])):
        kv_lens = [1, 2, 0, 64, 128, 129, 2]  # the last has fewer keys than queries, if several
        problem = build(
            xp, kv_lens, qo_lens=qo_lens, num_heads=num_heads, window_left=window_left, page_size=4
        )
        check(problem, (num_heads, window_left, qo_lens))


@pytest.mark.parametrize("storage", MLA_STORAGES)
def test_q_and_outputs_of_any_strides(xp, storage):
    """Heads and tokens strided, transposed and reversed; lse as a column of something else."""
    problem = build_mla_problem([70, 300, 5], num_heads=8, storage=storage, xp=xp)
    expected = attend(problem)
    tokens, heads, _ = problem.q.shape
    for shape_of, turn in (
        (lambda dim: (tokens, heads, dim + 16), lambda a: a[..., :-16]),
        (lambda dim: (heads, tokens, dim), lambda a: a.swapaxes(0, 1)),
        (lambda dim: (2 * tokens, heads, dim), lambda a: a[::-2]),
        (lambda dim: (tokens, 3 * heads, dim), lambda a: a[:, 1::3]),
    ):
        q = turn(xp.zeros(shape_of(576), problem.q.dtype))
        q[...] = problem.q
        q_ckv, q_kpe = (turn(xp.zeros(shape_of(dim), q.dtype)) for dim in (512, 64))
        q_ckv[...], q_kpe[...] = problem.q[..., :512], problem.q[..., 512:]
        for query in (q, (q[..., :512], q[..., 512:]), (q_ckv, q_kpe), (problem.q[..., :512], q_kpe)):
            out = turn(poison(xp.empty(shape_of(512), q.dtype)))
            lse = poison(xp.empty((heads, tokens, 2), np.float32))[..., 1].swapaxes(0, 1)
            mla_decode(query, problem.cache, problem.pages, **problem.options, out=out, lse=lse)
            assert_right(out, lse, expected, problem.dtype, (storage, q.strides))


@pytest.mark.parametrize("batch", [127, 128, 129, 300, 1100])
@pytest.mark.parametrize("ragged", [False, True])
def test_more_requests_than_threads(xp, batch, ragged):
    rng = np.random.default_rng(batch)
    batch = size(xp, batch, batch // 10)
    kv_lens = rng.integers(0, 80, batch)
    kv_lens[:: 1 + batch // 7] = 0
    qo_lens = rng.integers(0, 3, batch) if ragged else None
    for num_heads in size(xp, (16, 128), (4,)):
        check(build(xp, kv_lens, qo_lens=qo_lens, num_heads=num_heads), (batch, num_heads))


@pytest.mark.parametrize("window_left", [-1, 150])
@pytest.mark.parametrize(
    ("num_heads", "qo_len"), [(16, 1), (32, 1), (64, 1), (128, 1), (64, 2), (320, 1), (150, 3)]
)
def test_requests_that_differ(xp, num_heads, qo_len, window_left):
    """Groups count for more tiles than they have, up to half of a run's, if all requests have as many of them.

    Or each starts a run.
    """
    rng = np.random.default_rng(num_heads + qo_len)
    sizes = [(2, 3000), (9, 300), (9, 3000), (40, 1000), (150, 300), (400, 200)]
    for batch, longest in size(xp, sizes, [(3, 100)]):
        kv_lens = rng.integers(0, longest, batch)
        problem = build(
            xp, kv_lens, num_heads=size(xp, num_heads, 4), seed=batch, window_left=window_left,
            qo_lens=None if qo_len == 1 else [qo_len] * batch, page_size=(16, 64)[batch % 2],
        )  # fmt: skip
        check(problem, (batch, longest))


@pytest.mark.parametrize("num_heads", [32, 64, 128, 192, 256])
def test_groups_that_start_runs(xp, num_heads):
    """With more than 16 rows each group of requests that differ starts a run, if there are CTAs for all of them."""
    rng = np.random.default_rng(num_heads)
    for batch in size(xp, (2, 3, 5, 8, 12, 16, 24, 33, 66, 132), (3,)):
        kv_lens = rng.integers(0, max(40_000 // batch, 200), batch)
        problem = build(
            xp, kv_lens, num_heads=size(xp, num_heads, 4), seed=batch, page_size=(16, 64)[batch % 2]
        )
        check(problem, (batch, kv_lens))
        assert decode_bytes(problem) == decode_bytes(problem)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "most"), [(32, 115), (64, 115), (128, 49)])
def test_which_groups_start_runs(gpu, num_heads, most):
    """For up to `most` requests of three tiles beside a long one there are SMs enough.

    Then it alone goes on in another CTA, in one for each tile of rows, which leaves its state in an odd place
    (schedule.cuh); else short ones do, too.
    """
    if (device_properties().arch, device_properties().num_sms) != ("sm_90a", 132):
        pytest.skip("of 132 SMs of sm_90a")
    workspace = cupyattn.decode_workspace()
    layout = workspace_layout(workspace.device.id)
    tile_q = min(num_heads, 64)
    for num_short in (43, most, most + 1):
        problem = build(gpu, [64 * 132] + [150] * num_short, num_heads=num_heads)
        check(problem, num_short)
        states = workspace[layout.scratch : layout.end]
        states[...] = 0xFF
        decode_bytes(problem, workspace=workspace)
        num_places = len(states) // (1024 * tile_q)
        is_written = (states[: 1024 * tile_q * num_places].reshape(num_places, -1) != 0xFF).any(axis=1)
        num_left = int(is_written[1::2].sum())
        assert (num_left == num_heads // tile_q) == (num_short <= most), (num_short, num_left)
        assert is_zeroed(workspace)


@pytest.mark.parametrize("only", [0, 128, 700, 1023])
def test_one_request_with_work_among_idle_ones(xp, only):
    qo_lens = np.zeros(1024, int)
    qo_lens[only] = 3
    kv_lens = np.full(1024, size(xp, 9, 1))
    kv_lens[only] = 500
    check(build(xp, kv_lens, qo_lens=qo_lens, page_size=8, num_heads=size(xp, 64, 4)), only)


@pytest.mark.parametrize("num_heads", [16, 64, 128])
def test_one_long_request_beside_short_ones(xp, pools, num_heads):
    kv_lens = [*range(1, 32), size(xp, 65536, 200), *range(32)]
    problem = pools(xp, "bfloat16").problem(
        kv_lens, page_size=16, group_size=num_heads, dense=False, **rows_of(xp)
    )
    check(problem)


@pytest.mark.parametrize("window_left", [-1, 1000])
@pytest.mark.parametrize("page_size", [1, 64])
def test_hundreds_of_thousands_of_tokens(xp, pools, page_size, window_left):
    """One group over all CTAs."""
    with freed(xp):
        for num_heads in size(xp, (16, 128), (2,)):
            problem = pools(xp, "float16").problem(
                [size(xp, 300_003, 10_003)], page_size=page_size, group_size=num_heads,
                window_left=window_left, **rows_of(xp),
            )  # fmt: skip
            check(problem, (page_size, num_heads))


@pytest.mark.parametrize("page_size", [1, 8, 24, 48, 64, 128])
@pytest.mark.parametrize(("num_heads", "qo_len"), [(16, 1), (64, 1), (128, 1), (64, 4), (192, 1), (128, 3)])
def test_runs_of_many_tiles(xp, num_heads, qo_len, page_size):
    """Whole pages are copied in boxes, to both CTAs that need them, where runs are long; the ends of requests are not.

    192 rows are an odd number of query tiles; windows begin inside of boxes.
    """
    storage = MLA_STORAGES[(page_size + num_heads) % len(MLA_STORAGES)]
    for kv_lens, window_left in (([30_000, 9_000, 700], -1), ([44_000], size(xp, 43_210, 100))):
        problem = build(
            xp, size(xp, kv_lens, [n // 100 for n in kv_lens]), num_heads=size(xp, num_heads, 2),
            qo_lens=None if qo_len == 1 else [qo_len] * len(kv_lens), page_size=page_size, storage=storage,
            window_left=window_left, seed=page_size,
        )  # fmt: skip
        check(problem, (num_heads, qo_len, page_size, kv_lens))


FORMS = {  # a cache of the same rows: in other places, with strides that maps of boxes may not have
    "tokens-outermost": lambda xp, a: xp.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1),
    "pages-reversed": lambda xp, a: xp.ascontiguousarray(a[::-1])[::-1],
    "tokens-reversed": lambda xp, a: xp.ascontiguousarray(a[:, ::-1])[:, ::-1],
    "odd-rows": lambda xp, a: xp.concatenate([a, a[..., :8]], axis=-1)[..., : a.shape[-1]],
}


@pytest.mark.parametrize("form", FORMS)
def test_caches_of_any_strides(xp, form):
    """Long runs, whose tiles are copied in boxes where strides allow it."""
    problem = build(xp, [size(xp, 50_000, 300)], num_heads=size(xp, 128, 2), page_size=16)
    arrays = (FORMS[form](xp, a) for a in (problem.ckv_pages, problem.kpe_pages))
    out, lse = mla_decode(
        problem.q, PagedMLACache(*arrays), problem.pages, **problem.options, return_lse=True
    )
    assert_right(out, lse, attend(problem), problem.dtype, form)


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("is_known", [False, True])
def test_a_thread_that_has_not_used_the_device(xp, is_known, num_heads):
    """Its first call: of a shape that is known or not, with a cache that is not."""
    length = size(xp, 50_000, 300) + num_heads + is_known
    problem = build(xp, [length], num_heads=size(xp, num_heads, 2), page_size=64, storage="mla-pair")
    caches = [PagedMLACache(problem.ckv_pages.copy(), problem.kpe_pages.copy()) for _ in range(2)]

    def call(cache):
        return to_host(mla_decode(problem.q, cache, problem.pages, **problem.options))

    known = [call(caches[0])] if is_known else []
    if xp is not np:
        xp.cuda.Device().synchronize()
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(call, caches[1]).result(timeout=60)
    for out in known or [call(caches[0])]:
        assert out.tobytes() == result.tobytes()


@pytest.mark.parametrize("num_heads", [5, 16, 32, 64, 100, 128])
def test_merges(xp, pools, num_heads):
    """Groups over 1, 2, ... some hundred CTAs: states that one CTA merges, that several share, or all do."""
    for step, ragged in itertools.product(size(xp, (64, 448, 2048, 12000), (64,)), (False, True)):
        kv_lens = [step * (i + 1) + i for i in range(5)] + [0]
        problem = pools(xp, "bfloat16").problem(
            kv_lens, page_size=8, group_size=size(xp, num_heads, 4), seed=step,
            qo_lens=[1, 3, 2, 0, 5, 2] if ragged else None, **rows_of(xp),
        )  # fmt: skip
        for _ in range(size(xp, 3, 1)):
            check(problem, (num_heads, step, ragged))
    one = pools(xp, "bfloat16").problem(
        [size(xp, 4160, 100)], page_size=8, group_size=size(xp, num_heads, 4), dense=True, **rows_of(xp)
    )
    check(one, num_heads)


@pytest.mark.parametrize("num_heads", [3, 20, 32, 61, 64])
@pytest.mark.parametrize("tile_q", [32, 64])
def test_states_in_rounds(xp, tile_q, num_heads):
    """One long request, alone and beside another: from some states of a group to as many as there are CTAs.

    A CTA merges whole lines, of which there are seldom as many for each, and where states are many only some at once.
    What states lie in is spoilt before each launch: who takes them before they are there, does not take the last ones.
    """
    if xp is not np and device_properties().arch != "sm_90a":
        pytest.skip("there, one kernel has all shapes")
    config = next(c for c in kernels.MLA_SM90_CONFIGS if c.tile_q == tile_q)
    workspace = None if xp is np else cupyattn.decode_workspace()
    with mla_shape(config):
        for num_tiles in size(xp, (5, 31, 32, 33, 65, 85, 100, 127, 128, 129, 131, 132, 150), (1, 2)):
            for other in (None, 3, num_tiles + 1):
                kv_lens = [64 * n - 5 for n in (num_tiles, other) if n is not None]
                problem = build(xp, kv_lens, num_heads=num_heads, page_size=16, seed=num_tiles)
                check(problem, (tile_q, num_heads, kv_lens))
                results = set()
                for _ in range(size(xp, 4, 2)):
                    if workspace is not None:
                        layout = workspace_layout(workspace.device.id)
                        workspace[layout.scratch : layout.end] = 0xFF
                    results.add(decode_bytes(problem, workspace=workspace))
                    assert workspace is None or is_zeroed(workspace)
                assert results == {decode_bytes(problem)}


@pytest.mark.parametrize("num_heads", [16, 32, 64, 128])
@pytest.mark.parametrize("values", ["huge", "tiny", "zero", "infinite", "infinite-alone"])
@pytest.mark.parametrize("few_keys", [False, True])
def test_values_that_float16_cannot_hold(xp, values, num_heads, few_keys):
    """Partial states are packed into float16, with a factor; an infinity stays in its column.

    Values are keys too: queries make up for their size, and a cap makes infinite logits finite.
    """
    factor = {"huge": 2.0**114, "tiny": 2.0**-100, "infinite": 1.0}.get(values, 0.0)
    is_infinite = values.startswith("infinite")
    # Few enough for mla.cu, but with 128 rows, or too many.
    few = [9000 if num_heads == 16 else 1000, 700, 0]
    kv_lens, spare_entries = (few, 0) if few_keys else ([20_000, 700, 0], 12_000)
    problem = build(
        xp, size(xp, kv_lens, [100, 30, 0]), num_heads=size(xp, num_heads, -(-num_heads // 32)),
        logits_soft_cap=5.0 if is_infinite else 0.0, spare_entries=spare_entries,
    )  # fmt: skip
    ckv, q_ckv = problem.ckv_pages, problem.q[..., : problem.ckv_dim]
    scaled = ckv.astype(np.float32) * factor
    if is_infinite:
        for request, column, value in ((0, -1, math.inf), (1, 3, -math.inf)):
            scaled[int(problem.kv_indices[int(problem.kv_indptr[request])]), 5, column] = value
    ckv[...] = scaled.astype(ckv.dtype)
    q_ckv[...] = (q_ckv.astype(np.float32) / (factor or 1.0)).astype(q_ckv.dtype)
    out, lse = problem.call(mla_decode, return_lse=True)
    wanted, wanted_lse = attend(problem)
    finite, actual = xp.isfinite(wanted), to_float64(out)
    assert int((~finite).sum()) == (2 * problem.q.shape[1] if is_infinite else 0)
    assert (actual[~finite] == wanted[~finite]).all()
    # Back to ordinary sizes, which tolerances are for.
    actual, wanted = (xp.where(finite, a, 0.0) / (factor or 1.0) for a in (actual, wanted))
    assert_right(actual, lse, (wanted, wanted_lse), problem.dtype, (values, num_heads))


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads", [16, 128])
def test_offsets_beyond_32_bits(gpu, num_heads):
    """A cache of 2.4e9 elements (4.8 GB); only its end and the pages about element 2^31 are touched."""
    page_size, num_pages = 64, 65_000
    page = page_size * 576
    with freed(gpu):
        base = gpu.empty((num_pages, page_size, 576), np.float16)
        assert base.size > 2**31 + 2**27
        for first in (2**31 // page - 40, num_pages - 80):
            ids = np.random.default_rng(first).permutation(80)
            near = build(
                gpu, [0, 1333, 600, 1], num_heads=num_heads, page_size=page_size, dtype="float16", dense=True,
                spare_pages=17,
            )  # fmt: skip
            size_of_near = len(near.bases[0])
            assert size_of_near <= 80
            touched = base[first : first + 80]
            touched.fill(np.nan)
            touched[gpu.asarray(ids[:size_of_near])] = near.bases[0]
            table = near.kv_indices.copy()
            held = table != POISON_PAGE
            table[held] = first + gpu.asarray(ids)[table[held]]
            far = near.replace(bases=(base,), kv_indices=table)
            for more in ({}, {"fixed_split_size": 256}):
                out, lse = far.call(mla_decode, return_lse=True, **more)
                assert_right(out, lse, attend(near), "float16", (first, more))
            # Two arrays: ckv and kpe each far apart in memory.
            cache = cupyattn.PagedMLACache(base[..., :512], base.copy()[..., 512:])
            out, lse = mla_decode(near.q, cache, far.pages, return_lse=True, **near.options)
            assert_right(out, lse, attend(near), "float16", (first, "two arrays"))
        del base, touched, far, cache


@pytest.mark.gpu
def test_append_beyond_32_bits(gpu):
    page_size, num_pages = 64, 65_000
    with freed(gpu):
        base = gpu.empty((num_pages, page_size, 576), np.float16)
        last = base[-40:]
        last.fill(7.0)
        rows = gpu.random.default_rng(0).standard_normal((2, 576), dtype=np.float32).astype(np.float16)
        table = gpu.asarray(np.array([[num_pages - 1], [num_pages - 30]], np.int32))
        pages = cupyattn.PageTable.from_dense(table, gpu.asarray(np.array([64, 3], np.int32)))
        cache = cupyattn.PagedMLACache.from_concatenated(base)
        mla_append(rows[:, :512], rows[:, 512:], cache, pages)
        assert (last[-1, 63] == rows[0]).all()
        assert (last[-30, 2] == rows[1]).all()
        assert int((last != 7.0).any(axis=2).sum()) == 2
        del base, last, cache


# -- the same bits every time --


def workspace_for(problem, fixed_split_size=None):
    """A workspace that serves, or None on NumPy."""
    if problem.xp is np:
        return None
    num_bytes = cupyattn.decode_workspace_bytes(
        problem.q,
        problem.cache,
        problem.pages,
        qo_indptr=problem.qo_indptr,
        fixed_split_size=fixed_split_size,
    )
    return cupyattn.decode_workspace(num_bytes=num_bytes)


@pytest.mark.parametrize("fixed_split_size", [None, 2048])
@pytest.mark.parametrize("qo_lens", [None, [3, 40, 0, 1]])
@pytest.mark.parametrize("num_heads", [5, 16, 40, 64, 128])
def test_the_same_bits_every_time(xp, num_heads, qo_lens, fixed_split_size):
    """The workspace is back at zero after every call, whatever was left in it."""
    kv_lens = size(xp, [9000, 77, 300, 40000], [100, 77, 30, 50])
    problem = build(xp, kv_lens, qo_lens=qo_lens, num_heads=num_heads)
    other = build(xp, [500, 3], num_heads=size(xp, 100, 2))
    mode = {"fixed_split_size": fixed_split_size, "workspace": workspace_for(problem, fixed_split_size)}
    check(problem, (num_heads, qo_lens, fixed_split_size), **mode)
    first = decode_bytes(problem, **mode)
    for i in range(size(xp, 10, 2)):
        if i % 3 == 0:
            other.call(mla_decode, workspace=mode["workspace"])  # other partials in the same places
        assert decode_bytes(problem, **mode) == first, f"run {i}"
        assert mode["workspace"] is None or is_zeroed(mode["workspace"]), f"run {i}"
    stream = new_stream(xp)
    out = xp.empty(problem.out_shape, problem.q.dtype)
    lse = xp.empty(problem.q.shape[:2], np.float32)
    if xp is not np:
        xp.cuda.Device().synchronize()
    replay = capture(xp, stream, lambda: problem.call(mla_decode, out=out, lse=lse, **mode))
    for _ in range(5):
        with stream:
            poison(out)
            replay()
        stream.synchronize()
        assert to_host(out).tobytes() + to_host(lse).tobytes() == first


@pytest.mark.parametrize(("batch", "kv_len"), [(1, 65536), (8, 8192), (32, 4096), (128, 4096)])
@pytest.mark.parametrize("num_heads", [16, 32, 64, 128])
def test_the_same_bits_in_hundreds_of_launches(xp, pools, num_heads, batch, kv_len):
    """What is overwritten while a warp may still be reading it spoils some launches: a bug had 1 in 2 to 1 in 400.

    There are enough keys for mla_sm90.cu to serve 16 heads too. Nothing waits between launches: differing numbers are
    counted on the device.
    """
    kv_lens = size(xp, [kv_len] * batch, [kv_len // 500] * min(batch, 3))
    problem = pools(xp, "bfloat16").problem(
        kv_lens, page_size=64, group_size=size(xp, num_heads, 4), dense=False, **rows_of(xp)
    )
    what = f"{batch} x {kv_len}, {num_heads} heads"
    times = size(xp, 300, 3)
    with freed(xp):
        first = poison(xp.empty(problem.out_shape, problem.q.dtype))
        first_lse = poison(xp.empty(problem.q.shape[:2], np.float32))
        problem.call(mla_decode, out=first, lse=first_lse)
        assert_right(first, first_lse, attend(problem, 3e8), problem.dtype, what)
        out, lse = xp.empty_like(first), xp.empty_like(first_lse)
        counts = xp.zeros(times, np.int64)
        for i in range(times):
            problem.call(mla_decode, out=poison(out), lse=poison(lse))
            differing = (out.view(np.uint16) != first.view(np.uint16)).sum()
            counts[i] = differing + (lse.view(np.uint32) != first_lse.view(np.uint32)).sum()
        wrong = np.flatnonzero(to_host(counts))
        assert not len(wrong), f"{what}: {len(wrong)} of {times} launches differ, the first is {wrong[0]}"


@pytest.mark.parametrize("num_heads", [16, 128])
def test_the_form_of_q_changes_no_bit(xp, num_heads):
    problem = build(xp, size(xp, [9000, 0, 300], [90, 0, 30]), num_heads=size(xp, num_heads, 4))
    found = set()
    for query in QUERIES.values():
        out, lse = problem.call(query, return_lse=True)
        found.add(to_host(out).tobytes() + to_host(lse).tobytes())
    assert len(found) == 1


# -- fixed splits: a request's bits are its own --


@pytest.mark.parametrize("fixed_split_size", [64, 128, 1024])
@pytest.mark.parametrize("num_heads", [1, 8, 16, 17, 32, 64, 128])
def test_fixed_splits(xp, num_heads, fixed_split_size):
    """Lengths about the cuts."""
    around = [cut + i for cut in (fixed_split_size, 3 * fixed_split_size) for i in (-1, 0, 1)]
    if xp is np:
        around = around[:2]
    for i, dtype in enumerate(DTYPES):
        more = {"window_left": fixed_split_size + 70, "logits_soft_cap": 30.0} if i else {}
        problem = build(
            xp, [0, 1, *around], num_heads=num_heads, dtype=dtype, dense=bool(i), page_size=(16, 3)[i], seed=i,
            storage=MLA_STORAGES[(num_heads + i) % 3], **more,
        )  # fmt: skip
        check(problem, (num_heads, dtype), fixed_split_size=fixed_split_size)


@pytest.mark.parametrize("fixed_split_size", [64, 512])
@pytest.mark.parametrize("name", SHAPES)
def test_fixed_splits_of_every_shape(xp, name, fixed_split_size):
    check(build(xp, **SHAPES[name], page_size=16), name, fixed_split_size=fixed_split_size)


@pytest.mark.parametrize(
    ("num_heads", "fixed_split_size", "ragged", "options"),
    [
        (16, 64, False, {}),
        (16, 512, True, {}),
        (128, 64, False, {}),
        (128, 512, True, {}),
        (5, 64, True, {"window_left": 600}),
        (40, 512, False, {"logits_soft_cap": 20.0}),
    ],
)
def test_neighbours_change_no_bit(xp, num_heads, fixed_split_size, ragged, options):
    """Each request alone, then in batches of 3 and of 40, at other places beside other neighbours."""
    rng = np.random.default_rng(num_heads)
    kv_lens = [
        size(xp, 3000, 100),
        size(xp, 2, 1) * fixed_split_size,
        0,
        *rng.integers(1, size(xp, 600, 40), 37),
    ]
    qo_lens = [2, 3, 1, *rng.integers(0, 4, 37)] if ragged else None
    every = build(xp, kv_lens, qo_lens=qo_lens, num_heads=num_heads, **options)
    assert_neighbours_change_no_bit(every, fixed_split_size)


@pytest.mark.parametrize("num_heads", [16, 128])
def test_a_token_beside_prompts_is_the_token_alone(xp, num_heads):
    """One query token a request without `qo_indptr`, and among requests that have many with it."""
    every = build(
        xp, size(xp, [3000, 70, 500], [300, 70, 50]), qo_lens=[1, 70, 33], num_heads=size(xp, num_heads, 2)
    )
    together = bits_of_requests(every, fixed_split_size=1024)
    alone = pick(every, [0]).replace(qo_indptr=None)
    assert bits_of_requests(alone, fixed_split_size=1024) == together[:1]


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "qo_lens"), [(128, None), (16, [3, 1, 20])])
def test_workspace_of_fixed_splits(gpu, num_heads, qo_lens):
    """Nothing past its end is written; it serves calls of both modes in turn."""
    problem = build(gpu, [40_000, 0, 3000], qo_lens=qo_lens, num_heads=num_heads)

    def num_bytes(size, q=None):
        operands = problem.q if q is None else q, problem.cache, problem.pages
        return cupyattn.decode_workspace_bytes(*operands, qo_indptr=problem.qo_indptr, fixed_split_size=size)

    ordinary, needed = cupyattn.decode_workspace(), num_bytes(64)
    assert num_bytes(None) <= ordinary.nbytes < needed
    assert num_bytes(1024) <= needed
    assert num_bytes(64, (problem.q[..., :512], problem.q[..., 512:])) == needed
    with pytest.raises(
        ValueError, match=f"workspace must .*at least {needed} bytes .*decode_workspace_bytes"
    ):
        problem.call(mla_decode, workspace=ordinary, fixed_split_size=64)
    memory = gpu.full(needed + 4096, 0xFF, np.uint8)  # what lies behind it must stay as it is
    memory[:needed] = 0
    for workspace in (memory[:needed], cupyattn.decode_workspace(num_bytes=needed)):
        assert workspace.nbytes == needed
        for fixed_split_size in (64, None, 64, 1024, None):
            check(problem, fixed_split_size, workspace=workspace, fixed_split_size=fixed_split_size)
            assert is_zeroed(workspace), fixed_split_size
    assert (memory[needed:] == 0xFF).all()


@pytest.mark.gpu
def test_one_workspace_serves_decode_and_mla_decode(gpu):
    workspace = cupyattn.decode_workspace()
    for i in range(6):
        mla = build(gpu, [9000, 3, 500], num_heads=(16, 40, 128)[i % 3])
        check(mla, i, workspace=workspace)
        assert is_zeroed(workspace)
        check(build_problem([9000, 3, 500], head_dim=(64, 128, 256)[i % 3], xp=gpu), i, workspace=workspace)
        assert is_zeroed(workspace)


# -- CUDA graphs --

GRAPHS = {
    "csr": {"dense": False, "ragged": False, "group_size": 16},
    "dense": {"dense": True, "ragged": False, "group_size": 128},
    "ragged": {"dense": False, "ragged": True, "group_size": 64},
    "window": {"dense": True, "ragged": True, "group_size": 5, "window_left": 200},
    "fixed": {"dense": False, "ragged": True, "group_size": 16, "fixed_split_size": 1024},
}


def changing_problem(xp, pools, kind):
    return Changing(xp, pools(xp, "bfloat16"), **GRAPHS[kind], **rows_of(xp))


@pytest.mark.parametrize("own_workspace", [False, True])
@pytest.mark.parametrize("kind", GRAPHS)
def test_graph_replays_follow_changes(xp, pools, kind, own_workspace):
    """Captured once; without a workspace as the stream's first call: one is made during the capture."""
    changing = changing_problem(xp, pools, kind)
    changing.change()
    changing.call()  # loads the kernel, on another stream
    workspace = changing.workspace() if own_workspace and xp is not np else None
    stream = unused_stream(xp)
    if xp is not np:
        xp.cuda.Device().synchronize()
    replay = capture(xp, stream, lambda: changing.call(workspace=workspace))
    replay_often(xp, changing, stream, replay, size(xp, 100, 5))


@pytest.mark.parametrize("kind", ["csr", "dense", "ragged", "fixed"])
def test_thousands_of_replays(xp, pools, kind, record_property):
    """Of two launches each, the second of which reads tables while the first is finishing (`pdl`)."""
    changing = changing_problem(xp, pools, kind)
    times = size(xp, 2000, 10)
    replay_pairs(xp, changing, times, num_states=size(xp, 30, 3))
    record_property("replays", times)


@pytest.mark.parametrize("fixed_split_size", [None, 64])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_dependent_launches_wait_for_what_they_read(xp, num_heads, fixed_split_size):
    """mla_append writes the rows and queries that mla_decode reads; decodes share a workspace."""
    mode = {"fixed_split_size": fixed_split_size}
    problem = build_mla_problem(
        size(xp, [9000, 1, 300, 4000], [100, 1, 30, 50]),
        num_heads=size(xp, num_heads, 2),
        poison=False,
        xp=xp,
    )
    rng = xp.random.default_rng(1)
    new = [
        (rng.standard_normal((4, 576), dtype=np.float32) * scale).astype(problem.q.dtype)
        for scale in (3.0, 1.0, 2.0)
    ]
    host_q = problem.q.copy()
    wanted = []
    for pdl in (False, True):
        results = []
        for rows in new:
            problem.q[...] = host_q
            q_kpe = problem.q[..., 512:]
            mla_append(
                rows[:, :512], rows[:, 512:], problem.cache, problem.pages, rope=Rope(interleaved=True),
                q_kpe=q_kpe, q_kpe_out=q_kpe,
            )  # fmt: skip
            for _ in range(3):
                results.append(problem.call(mla_decode, pdl=pdl, **mode))  # noqa: PERF401
        wanted.append([to_host(out).tobytes() for out in results])
    assert wanted[0] == wanted[1]
    assert len(set(wanted[0])) == 3


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(("num_heads", "qo_len"), [(16, 1), (128, 1), (128, 2), (5, 4)])
def test_generation_as_one_graph(xp, num_heads, qo_len, pdl):
    """A step: lengths grow on the device, append with rope (q in place), decode. Replayed, checked at each step."""
    batch, steps = 3, size(xp, 40, 4)
    start = np.array([0, 15, 200])
    problem = build_mla_problem(
        start + qo_len * steps, qo_lens=[qo_len] * batch, num_heads=size(xp, num_heads, 3), page_size=16,
        poison=False, xp=xp,
    )  # fmt: skip
    lens, q = problem.kv_lens, problem.q
    lens[...] = xp.asarray(start.astype(np.int32))
    rows = xp.zeros((len(q), 576), q.dtype)
    out, lse = xp.empty(problem.out_shape, q.dtype), xp.empty(q.shape[:2], np.float32)

    def step():
        xp.add(lens, qo_len, out=lens)
        mla_append(
            rows[:, :512], rows[:, 512:], problem.cache, problem.pages, qo_indptr=problem.qo_indptr,
            rope=Rope(theta=1e6, interleaved=True), q_kpe=q[..., 512:], q_kpe_out=q[..., 512:],
        )  # fmt: skip
        problem.call(mla_decode, out=out, lse=lse, pdl=pdl)

    step()  # loads the kernels
    xp.subtract(lens, qo_len, out=lens)
    stream = unused_stream(xp)
    if xp is not np:
        xp.cuda.Device().synchronize()
    replay = capture(xp, stream, step)
    seen = []
    for i in range(steps):
        rng = np.random.default_rng(i)
        new_rows, new_q = (xp.asarray(rng.standard_normal(a.shape).astype(a.dtype)) for a in (rows, q))
        if xp is not np:
            xp.cuda.Device().synchronize()  # made on another stream
        with stream:
            rows[...], q[...] = new_rows, new_q
            poison(out)
            replay()
            assert_right(out, lse, attend(problem), problem.dtype, f"step {i}")
            seen.append(to_host(out).tobytes())
    assert to_host(lens).tolist() == (start + qo_len * steps).tolist()
    assert len(set(seen)) == steps


@pytest.mark.gpu
def test_one_graph_of_many_calls(gpu, pools):
    """Layer after layer in one graph: the calls share a workspace, which each leaves at zero."""
    layers = [
        Changing(gpu, pools(gpu, "bfloat16"), batch=3 + i, **shape, **rows_of(gpu))
        for i, shape in enumerate(GRAPHS.values())
    ]
    for layer in layers:
        layer.change()
        layer.call()
    stream = unused_stream(gpu)
    gpu.cuda.Device().synchronize()
    replay = capture(gpu, stream, lambda: [layer.call(pdl=True) for _ in range(3) for layer in layers])
    for i in range(20):
        with stream:
            for layer in layers:
                layer.change()
            replay()
            counts = [int(layer.misses()) for layer in layers]
        assert not any(counts), (i, counts)


# -- streams, other kernels --


@pytest.mark.parametrize("fixed_split_size", [None, 256])
def test_two_streams_at_once(xp, fixed_split_size):
    """Each with a workspace of its own."""
    problems = [
        build(xp, size(xp, [9000, 64, 9], [30, 9, 0]), num_heads=size(xp, 16, 2), seed=1),
        build(
            xp, size(xp, [4000, 700, 9], [40, 7, 9]), qo_lens=[2, 1, 5], num_heads=size(xp, 128, 3),
            dtype="float16", seed=2,
        ),
    ]  # fmt: skip
    modes = [
        {"fixed_split_size": fixed_split_size, "workspace": workspace_for(p, fixed_split_size)}
        for p in problems
    ]
    expected = [decode_bytes(p, **mode) for p, mode in zip(problems, modes, strict=True)]
    streams = [new_stream(xp) for _ in problems]
    if xp is not np:
        xp.cuda.Device().synchronize()
    results = [[], []]
    for _ in range(size(xp, 100, 3)):
        for stream, problem, mode, result in zip(streams, problems, modes, results, strict=True):
            with stream:
                result.append(problem.call(mla_decode, return_lse=True, **mode))
    for stream, wanted, result in zip(streams, expected, results, strict=True):
        stream.synchronize()
        assert {to_host(out).tobytes() + to_host(lse).tobytes() for out, lse in result} == {wanted}
    for mode in modes:
        assert mode["workspace"] is None or is_zeroed(mode["workspace"])


@pytest.mark.alone
@pytest.mark.gpu
@pytest.mark.parametrize("fixed_split_size", [None, 256])
@pytest.mark.parametrize("num_heads", [16, 32, 64, 128])
def test_where_another_kernel_holds_the_sms(gpu, num_heads, fixed_split_size):
    """CTAs that end before all have started leave their lines to those that end later: the bits are the same."""
    # With 64 heads, one CTA has lines of both long requests to merge.
    problem = build(gpu, [20_300, 3000, 0, 700], num_heads=num_heads)
    # A cluster of two starts where two SMs of one GPC are free, of which there are eight at most.
    num_free = 10 if num_heads > 64 and fixed_split_size is None else 1
    check_where_another_kernel_holds_the_sms(gpu, problem, fixed_split_size, num_free)


@pytest.mark.alone
@pytest.mark.gpu
def test_nothing_is_allocated_or_waited_for(gpu):
    """With outputs given, a warm call takes no memory; it returns while the stream is still busy."""
    problem = build(gpu, [100, 2000])
    out, lse = gpu.empty(problem.out_shape, problem.q.dtype), gpu.empty(problem.q.shape[:2], np.float32)
    operands = problem.q, problem.cache, problem.pages
    options = problem.options | {"out": out, "lse": lse}
    mla_decode(*operands, **options)
    pool = gpu.get_default_memory_pool()
    stream = gpu.cuda.get_current_stream()
    stream.synchronize()
    busy = gpu.empty((1 << 14, 1 << 14), np.float32)
    used = pool.used_bytes()
    for _ in range(100):
        busy.fill(1.0)  # 1 GB each: about 0.4 ms
    mla_decode(*operands, **options)
    assert not stream.done, "the call waited"
    assert pool.used_bytes() == used
    stream.synchronize()


# -- fuzz --


def test_fuzz_gpu(xp, record_property):
    """Random problems, built and compared on the host, run on the device. Counts the cases that ran."""
    cases = 0
    target = size(xp, FUZZ_CASES, 20)
    strategy = mla_arguments(
        dtypes=DTYPES, max_qo_len=size(xp, 24, 4), max_len=size(xp, 400, 100),
        dims=(size(xp, MLA_DIMS, (32, 8)),),
    )  # fmt: skip

    @settings(
        max_examples=target, deadline=None, derandomize=False, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy, FIXED_SPLIT_SIZES, st.sampled_from(list(QUERIES)))
    def fuzz(arguments, fixed_split_size, query):
        nonlocal cases
        cases += 1
        problem = build_mla_problem(**arguments)
        expected = attend(problem)
        out, lse = to_backend(problem, xp).call(
            QUERIES[query], return_lse=True, fixed_split_size=fixed_split_size
        )
        assert_right(
            to_host(out), to_host(lse), expected, problem.dtype, (arguments, fixed_split_size, query)
        )

    fuzz()
    if xp is not np:
        record_property("fuzz_cases", cases)
    assert cases >= target
