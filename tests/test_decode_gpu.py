"""`decode` on the device: FlashInfer's grid, edges, poison, determinism, fixed splits, CUDA graphs, streams, fuzz.

All but what needs a device by nature runs on NumPy too, in small, so that the tests themselves are tested.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from device import (
    Changing,
    assert_heads,
    assert_neighbours_change_no_bit,
    assert_right,
    attend,
    bits_of_requests,
    capture,
    check,
    check_where_another_kernel_holds_the_sms,
    decode_bytes,
    decode_shape,
    freed,
    misses,
    new_stream,
    pick,
    poison,
    replay_often,
    replay_pairs,
    size,
    unused_stream,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import (
    POISON_PAGE,
    STORAGES,
    assert_close,
    build_mla_problem,
    build_problem,
    oracle,
    to_backend,
    to_float64,
    to_host,
)
from strategies import FIXED_SPLIT_SIZES, HEAD_DIMS, problem_arguments

import cupyattn
from cupyattn import kernels
from cupyattn.runs import is_zeroed
from cupyattn.runtime.device import device_properties
from cupyattn.schedule import uneven_group_overhead

FUZZ_CASES = int(os.environ.get("CUPYATTN_FUZZ_CASES", "2000"))
DTYPES = ("float16", "bfloat16")
GROUPS = (1, 4, 5, 7, 8, 16)


# -- the reference of these tests, against the oracle of all tests --


@settings(max_examples=40)
@given(problem_arguments(max_qo_len=12), st.sampled_from([1.0, 1e5, 1e9]))
def test_the_vectorised_reference_is_the_oracle(arguments, max_bytes):
    problem = build_problem(**arguments)
    (out, lse), (expected, expected_lse) = attend(problem, max_bytes), oracle(problem)
    assert_close(out, expected, 1e-12)
    assert_close(lse, expected_lse, 1e-12, "lse")
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))


@pytest.mark.parametrize("spoil", ["element", "row", "nan", "lse", "swap"])
def test_misses_counts(spoil):
    problem = build_problem([2000, 2000, 0], head_dim=64, dtype="float16")
    expected = attend(problem)
    out, lse = expected[0].astype(np.float16), expected[1].astype(np.float32)
    assert misses(out, lse, expected, "float16", np) == 0
    if spoil == "element":
        out[0, 0, 0] += 0.01
    elif spoil == "row":
        out[0, 0] *= np.float16(1.01)  # by less than the elementwise tolerance
    elif spoil == "nan":
        out[2, 0, 5] = np.nan
    elif spoil == "lse":
        lse[2, 1] = 0
    else:
        out[:2] = out[1::-1].copy()
    assert misses(out, lse, expected, "float16", np) > 0


# -- FlashInfer's grid --


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [1, 8, 16, 64])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_grid_of_flashinfer(xp, pools, layout, page_size, head_dim):
    """Batch x length x group; the reference is computed once for the heads of all groups together."""
    batches, lengths = size(xp, ((12, 17, 128), (54, 97, 512, 2048, 16384)), ((3,), (54, 97)))
    for i, (batch, kv_len) in enumerate(itertools.product(batches, lengths)):
        dtype = DTYPES[(i + head_dim // 64 + page_size) % 2]
        num_kv_heads = 4 if kv_len <= 2048 else 2 if batch < 100 else 1
        every = pools(xp, dtype).problem(
            [kv_len] * batch, page_size=page_size, num_kv_heads=num_kv_heads, group_size=sum(GROUPS),
            head_dim=head_dim, layout=layout, dense=i % 3 == 0, seed=i,
        )  # fmt: skip
        wanted, wanted_lse = attend(every)
        by_group = (batch, num_kv_heads, sum(GROUPS))
        q = every.q.reshape(*by_group, head_dim)
        wanted, wanted_lse = wanted.reshape(*by_group, head_dim), wanted_lse.reshape(by_group)
        for begin, group in zip(itertools.accumulate((0, *GROUPS)), GROUPS, strict=False):
            heads = slice(begin, begin + group)
            part = every.replace(q=xp.ascontiguousarray(q[:, :, heads]).reshape(batch, -1, head_dim))
            out = poison(xp.empty(part.q.shape, part.q.dtype))
            lse = poison(xp.empty(part.q.shape[:2], np.float32))
            part.call(cupyattn.decode, out=out, lse=lse)
            expected = wanted[:, :, heads].reshape(out.shape), wanted_lse[:, :, heads].reshape(lse.shape)
            what = f"{batch=} {kv_len=} {page_size=} {group=} {head_dim=} {layout} {dtype} {num_kv_heads=}"
            assert_right(out, lse, expected, dtype, what)


# -- every shape of the kernel --

SHAPES = {
    # group_size x query tokens up to 32 rows (16 in the widest heads): all warps on the same rows; beyond: rows of
    # their own
    "one-token": {"kv_lens": [0, 1, 15, 16, 17, 63, 64, 65, 129, 700], "group_size": 4},
    "few-rows": {"kv_lens": [1, 64, 200, 5, 0], "qo_lens": [1, 4, 3, 0, 4], "group_size": 4},
    "one-token-32-rows": {"kv_lens": [0, 1, 64, 65, 700], "group_size": 20, "num_kv_heads": 1},
    "few-tokens-32-rows": {"kv_lens": [300, 64, 1, 0], "qo_lens": [7, 12, 1, 3], "group_size": 5},
    "window": {"kv_lens": [0, 3, 64, 65, 400, 900], "group_size": 3, "window_left": 63},
    "own-token": {"kv_lens": [1, 17, 300], "group_size": 2, "window_left": 0},
    "soft-cap": {"kv_lens": [40, 300, 2], "group_size": 8, "logits_soft_cap": 5.0, "sm_scale": 1.0},
    "many-rows": {"kv_lens": [64, 130, 1, 40, 7], "qo_lens": [64, 33, 1, 0, 5], "group_size": 5},
    "wide-group": {"kv_lens": [100, 0, 333], "group_size": 33, "num_kv_heads": 1},
    "chunk": {
        "kv_lens": [300, 64, 90], "qo_lens": [64, 64, 17], "group_size": 2, "window_left": 70,
        "logits_soft_cap": 30.0,
    },
    "more-tokens-than-keys": {"kv_lens": [3, 0, 20], "qo_lens": [5, 4, 21], "group_size": 7},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(xp, head_dim, dtype):
    kinds = itertools.cycle(itertools.product(("NHD", "HND"), STORAGES, (False, True)))
    pages = itertools.cycle((1, 16, 3, 64))
    for i, (name, shape) in enumerate(SHAPES.items()):
        for large in size(xp, (False, True, False), (False,)):
            layout, storage, dense = next(kinds)
            arguments = shape | {"layout": layout, "storage": storage, "dense": dense}
            arguments["page_size"] = next(pages)
            if large:  # entries that nobody reads: the table's size tells how much there is to read at most
                page_bytes = 4 * 2 * head_dim * arguments["page_size"]
                arguments["spare_entries"] = (65 << 20) // (page_bytes * len(shape["kv_lens"])) + 1
            problem = build_problem(head_dim=head_dim, dtype=dtype, seed=i, xp=xp, **arguments)
            check(problem, (name, head_dim, dtype, arguments))


@pytest.mark.parametrize("group_size", [2, 3, 6, 12, 17, 20, 24, 25, 31, 32, 33, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_any_group_size(xp, group_size, head_dim):
    kv_lens = size(xp, [0, 1, 100, 1000, 5000], [0, 1, 100])
    for spare_entries in (1, 12_000):  # with room for little, tiles have fewer rows
        problem = build_problem(
            kv_lens,
            num_kv_heads=1,
            group_size=group_size,
            head_dim=head_dim,
            spare_entries=spare_entries,
            xp=xp,
        )
        check(problem, (group_size, spare_entries))


@pytest.mark.parametrize("window_left", [0, 1, 62, 63, 64, 65, 500, 2**31 - 1])
def test_windows_around_tile_edges(xp, window_left):
    # With room for little, tiles have fewer rows.
    for qo_lens, spare_entries in itertools.product((None, [1, 2, 0, 64, 1, 5, 9]), (1, 3000)):
        kv_lens = [1, 2, 0, 64, 128, 129, 2]  # the last has fewer keys than queries, if several
        problem = build_problem(
            kv_lens, qo_lens=qo_lens, group_size=4, window_left=window_left, page_size=4,
            spare_entries=spare_entries, xp=xp,
        )  # fmt: skip
        check(problem, (window_left, qo_lens, spare_entries))


@pytest.mark.parametrize(
    ("kv_lens", "qo_lens"),
    [([], None), ([], []), ([0], None), ([0, 0, 0], None), ([5, 70], [0, 0]), ([0, 5], [3, 0]), ([1], [1])],
)
@pytest.mark.parametrize("dense", [False, True])
def test_little_or_nothing(xp, kv_lens, qo_lens, dense):
    problem = to_backend(build_problem(kv_lens, qo_lens=qo_lens, dense=dense), xp)
    check(problem)
    out, lse = problem.call(cupyattn.decode, return_lse=True)
    assert out.shape == problem.q.shape
    assert lse.shape == problem.q.shape[:2]
    if not sum(kv_lens):
        assert not to_host(out).any()  # exactly 0
        assert np.isneginf(to_host(lse)).all()


@pytest.mark.parametrize("head_dim", [64, 80, 112, 128, 256])
@pytest.mark.parametrize("group_size", [1, 12, 32, 40])
@pytest.mark.parametrize("values", ["huge", "tiny", "uneven", "zero", "infinite", "infinite-alone"])
def test_values_that_float16_cannot_hold(xp, values, group_size, head_dim):
    """Partial states are float16 numbers with a factor for several lines; an infinity stays in its column."""
    factor = {"huge": 2.0**114, "tiny": 2.0**-100, "zero": 0.0, "infinite-alone": 0.0}.get(values, 1.0)
    ordinary_size = factor or 1.0
    if values == "uneven":  # from line to line
        factor = ordinary_size = xp.asarray(2.0 ** (-20 * (np.arange(head_dim) // 32 % 2)), np.float32)
    problem = build_problem(
        size(xp, [20_000, 700, 0], [100, 30, 0]), page_size=16, num_kv_heads=1, group_size=group_size,
        head_dim=head_dim, dtype="bfloat16", xp=xp,
    )  # fmt: skip
    v = problem.writable()[1]
    scaled = v.astype(np.float32) * factor
    is_infinite = values.startswith("infinite")
    if is_infinite:  # in the first key, and in the last
        for request, key, column, value in (
            (0, 0, -1, math.inf),
            (1, int(problem.kv_lens[1]) - 1, 3, -math.inf),
        ):
            entry = int(problem.kv_indptr[request]) + key // problem.page_size
            scaled[int(problem.kv_indices[entry]), key % problem.page_size, 0, column] = value
    v[...] = scaled.astype(v.dtype)
    wanted, wanted_lse = attend(problem)
    finite = xp.isfinite(wanted)
    assert int((~finite).sum()) == (2 * group_size if is_infinite else 0)
    for fixed_split_size in (None, 256):
        out, lse = problem.call(cupyattn.decode, return_lse=True, fixed_split_size=fixed_split_size)
        actual = to_float64(out)
        assert (actual[~finite] == wanted[~finite]).all()
        # Back to ordinary sizes, which tolerances are for.
        ordinary = [xp.where(finite, a, 0.0) / ordinary_size for a in (actual, wanted)]
        what = (values, group_size, head_dim, fixed_split_size)
        assert_right(ordinary[0], lse, (ordinary[1], wanted_lse), problem.dtype, what)


@pytest.mark.parametrize("kv_len", [20, 3000])  # in one part, in several
@pytest.mark.parametrize("head_dim", [64, 256])
def test_nan_in_a_visible_key_is_not_hidden(xp, head_dim, kv_len):
    problem = build_problem([kv_len, kv_len], page_size=4, head_dim=head_dim, dtype="float16", xp=xp)
    problem.writable()[0][int(problem.kv_indices[0]), 1, 0, 7] = math.nan
    out, lse = (to_host(x) for x in problem.call(cupyattn.decode, return_lse=True))
    group_size = out.shape[1] // problem.num_kv_heads
    assert np.isnan(out[0, :group_size]).all()  # a logit is NaN, and with it all weights
    assert np.isnan(lse[0, :group_size]).all()
    for state in (out, lse):
        assert np.isfinite(state[0, group_size:]).all()
        assert np.isfinite(state[1]).all()


@pytest.mark.parametrize("batch", [127, 128, 129, 300, 1100])
@pytest.mark.parametrize("ragged", [False, True])
def test_more_requests_than_threads(xp, batch, ragged):
    """The scheduler takes 128 requests at a time."""
    rng = np.random.default_rng(batch)
    kv_lens = rng.integers(0, 80, batch)
    kv_lens[:: 1 + batch // 7] = 0
    qo_lens = rng.integers(0, 3, batch) if ragged else None
    for head_dim in (64, 192) if ragged else (64,):
        problem = build_problem(
            kv_lens, qo_lens=qo_lens, head_dim=head_dim, num_kv_heads=1, group_size=8, xp=xp
        )
        check(problem, (batch, head_dim))


@pytest.mark.parametrize("qo_len", [None, 1, 3])
@pytest.mark.parametrize("window_left", [-1, 150])
@pytest.mark.parametrize(
    ("num_kv_heads", "group_size", "head_dim"), [(1, 8, 128), (2, 5, 256), (3, 40, 64), (1, 1, 80)]
)
def test_requests_that_differ(xp, num_kv_heads, group_size, head_dim, window_left, qo_len):
    """With qo_indptr, groups count for more in tiles of more than 32 rows, if all requests have as many tiles."""
    rng = np.random.default_rng(group_size)
    sizes = [(2, 3000), (3, 300), (9, 3000), (40, 300), (129, 3000), (300, 300)]
    for batch, longest in size(xp, sizes, [(3, 300)]):
        kv_lens = rng.integers(0, longest, batch)
        kv_lens[0] = 64 * rng.integers(1, 40)
        qo_lens = None if qo_len is None else np.full(batch, qo_len)
        if qo_lens is not None and batch == 40:
            qo_lens[20] = 30
        problem = build_problem(
            kv_lens, num_kv_heads=num_kv_heads, group_size=group_size, head_dim=head_dim, xp=xp,
            window_left=window_left, dense=batch % 2 == 0, seed=batch,
            qo_lens=qo_lens,
        )  # fmt: skip
        check(problem, (batch, longest))


@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "head_dim"),
    [(2, 1, 128), (9, 1, 128), (129, 1, 128), (257, 1, 128), (2, 2, 256), (60, 2, 256)],
)
def test_groups_that_count_for_a_tile_more_if_there_is_room(xp, batch, num_kv_heads, head_dim):
    """The last run is shorter than the others by what all groups count for, or not quite."""
    rng = np.random.default_rng(batch)
    num_sms = 132 if xp is np else device_properties().num_sms
    max_ctas = num_sms * kernels.decode_config("sm_90a", head_dim, 8).ctas_per_sm
    num_groups = num_kv_heads * batch
    for expected in (1, 0):
        room = num_groups - (0 if expected else num_kv_heads)
        num_tiles = rng.integers(1, 4, batch)
        quota = num_kv_heads * num_tiles.sum() // max_ctas + 2
        num_tiles[1] += (quota * max_ctas - room) // num_kv_heads - num_tiles.sum()
        assert uneven_group_overhead(num_kv_heads * num_tiles, num_groups, max_ctas) == expected
        kv_lens = 64 * num_tiles - rng.integers(0, 64, batch)
        check(
            build_problem(kv_lens, num_kv_heads=num_kv_heads, group_size=8, head_dim=head_dim, xp=xp),
            expected,
        )


@pytest.mark.parametrize(
    ("num_kv_heads", "group_size", "head_dim", "qo_len"),
    [
        (1, 64, 128, None),
        (2, 33, 64, None),
        (1, 100, 256, None),
        (3, 50, 96, None),
        (1, 32, 128, 2),
        (2, 11, 64, 7),
    ],
)
def test_groups_that_start_runs(xp, num_kv_heads, group_size, head_dim, qo_len):
    """With more than 32 rows a tile each group of requests that differ starts a run, if there are CTAs for all.

    Not of more requests than a CTA has threads, 128; with 256 columns tiles have 32 rows.
    """
    rng = np.random.default_rng(group_size)
    sizes = [
        (2, 40_000),
        (3, 20_000),
        (8, 16_000),
        (17, 8_000),
        (33, 3000),
        (64, 2000),
        (128, 1500),
        (129, 1500),
    ]
    for batch, longest in size(xp, sizes, [(3, 300)]):
        kv_lens = rng.integers(0, longest // num_kv_heads, batch)
        problem = build_problem(
            kv_lens, num_kv_heads=num_kv_heads, group_size=group_size, head_dim=head_dim, xp=xp, seed=batch,
            dense=False, qo_lens=None if qo_len is None else [qo_len] * batch,
        )  # fmt: skip
        check(problem, (batch, kv_lens))
        assert decode_bytes(problem) == decode_bytes(problem)


@pytest.mark.parametrize("only", [0, 128, 700, 1023])
def test_one_request_with_work_among_idle_ones(xp, only):
    qo_lens = np.zeros(1024, int)
    qo_lens[only] = 3
    kv_lens = np.full(1024, 9)
    kv_lens[only] = 500
    check(build_problem(kv_lens, qo_lens=qo_lens, page_size=8, num_kv_heads=1, xp=xp), only)


def test_one_long_request_beside_short_ones(xp, pools):
    kv_lens = [*range(1, 32), size(xp, 65536, 3000), *range(32)]
    for group_size, head_dim in ((4, 128), (32, 64)):
        problem = pools(xp, "bfloat16").problem(
            kv_lens, page_size=16, num_kv_heads=2, group_size=group_size, head_dim=head_dim, dense=False
        )
        check(problem)


@pytest.mark.parametrize("window_left", [-1, 1000])
@pytest.mark.parametrize("page_size", [1, 64])
def test_a_million_tokens(xp, pools, page_size, window_left):
    """One group over all CTAs: on an H100, 521 partial states."""
    with freed(xp):
        problem = pools(xp, "float16").problem(
            [size(xp, 1_000_003, 10_003)], page_size=page_size, num_kv_heads=1, group_size=8, head_dim=64,
            window_left=window_left,
        )  # fmt: skip
        check(problem)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_merges(xp, pools, head_dim):
    """Groups over 1, 2, ... some hundred CTAs, which share the lines of their states."""
    for step, rows in itertools.product(size(xp, (64, 448, 2048, 12000), (64,)), (1, 12, 20, 32, 40)):
        kv_lens = [step * (i + 1) + i for i in range(5)] + [0]
        problem = pools(xp, "bfloat16").problem(
            kv_lens, page_size=8, num_kv_heads=1, group_size=rows, head_dim=head_dim, seed=step
        )
        for _ in range(size(xp, 3, 1)):
            check(problem, (head_dim, step, rows))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_offsets_beyond_32_bits(gpu, layout):
    """Interleaved K and V of 2.4e9 elements; only its end and the pages about element 2^31 are touched."""
    page_size, num_kv_heads, head_dim, num_pages = 16, 8, 128, 73_000
    inner = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
    page = 2 * page_size * num_kv_heads * head_dim
    with freed(gpu):
        base = gpu.empty((num_pages, 2, *inner, head_dim), np.float16)
        assert base.size > 2**31 + 2**27
        for first in (2**31 // page - 40, num_pages - 80):
            ids = np.random.default_rng(first).permutation(80)
            near = build_problem(
                [0, 333, 600, 1], layout=layout, storage="interleaved", num_kv_heads=num_kv_heads,
                head_dim=head_dim, dtype="float16", dense=True, spare_pages=17, xp=gpu,
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
            out, lse = far.call(cupyattn.decode, return_lse=True)
            assert_right(out, lse, attend(near), "float16", (layout, first))
        del base, touched, far


# -- every shape, also where it would not be chosen --


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_shape_of_the_kernel(xp, head_dim):
    arch = "sm_90a" if xp is np else device_properties().arch
    for config in kernels.decode_configs(arch, head_dim):
        num_kv_heads = 2 if config.heads == 2 else 3
        for i, (group_size, qo_lens) in enumerate(((1, None), (3, None), (4, [1, 2, 0, 5, 1, 20, 1, 1]))):
            if qo_lens is not None and config.heads == 2:
                continue
            problem = build_problem(
                size(xp, [0, 64, 129, 700, 9000, 257, 63, 128], [0, 64, 129, 7, 90, 25, 63, 128]),
                qo_lens=qo_lens, num_kv_heads=num_kv_heads, group_size=group_size, head_dim=head_dim,
                page_size=(16, 1, 64)[i], layout="NHD" if config.heads == 2 else ("NHD", "HND")[i % 2],
                window_left=(-1, -1, 150)[i], dtype=DTYPES[i % 2], seed=i, xp=xp,
            )  # fmt: skip
            with decode_shape(config):
                check(problem, (config, group_size))


# -- parts of the KV heads --

PARTS_ROOM = 64 * kernels._PART_TILES_PER_SM * 160  # tokens of a KV head that are many for any GPU


def assert_parts(problem, most):
    """On a GPU: as many parts are chosen as its CTAs can be dealt out to, and on an H100 with two an SM the most."""
    if problem.xp is np:
        return
    operands = problem.q, problem.cache, problem.qo_indptr, problem.pages, None, None, None
    launcher = sys.modules["cupyattn.decode"]._plans.make(operands, (None,)).runs._launchers[0]
    (field,) = (field for field in launcher.fixed_layout.fields if field.name == "part_shift")
    part_shift = int.from_bytes(launcher.fixed_args[field.offset : field.offset + 4], "little")
    num_ctas = launcher.grid[0]
    assert 1 << part_shift == next(n for n in (8, 4, 1) if problem.num_kv_heads % n == num_ctas % n == 0)
    assert 1 << part_shift == most or num_ctas != 264


@pytest.mark.parametrize(("num_kv_heads", "num_parts"), [(4, 4), (8, 8), (12, 4), (32, 8)])
@pytest.mark.parametrize(("head_dim", "group_size"), [(128, 1), (128, 8), (96, 16), (256, 3), (128, 40)])
def test_parts_of_kv_heads(xp, head_dim, group_size, num_kv_heads, num_parts):
    kv_lens = size(xp, [0, 1, 63, 64, 65, 700, 8000, 301], [0, 1, 65])
    qo_lens = [1, 3, 0, 2, 1, 9, 2, 1][: len(kv_lens)]
    for i, lens in enumerate((None, qo_lens)):
        problem = build_problem(
            kv_lens, qo_lens=lens, num_kv_heads=num_kv_heads, group_size=group_size, head_dim=head_dim,
            spare_entries=size(xp, PARTS_ROOM // (16 * num_kv_heads), 1), window_left=(-1, 300)[i],
            layout=("NHD", "HND")[i], dtype=DTYPES[i], seed=i, xp=xp,
        )  # fmt: skip
        assert_parts(problem, num_parts)
        check(problem, (head_dim, group_size, num_kv_heads, i))


@pytest.mark.alone
@pytest.mark.gpu
def test_parts_where_another_kernel_holds_the_sms(gpu):
    """A CTA may merge what one of another part has left."""
    problem = build_problem(
        [20_000, 3000, 0, 700], num_kv_heads=8, group_size=8, head_dim=128, spare_entries=PARTS_ROOM // 128,
        xp=gpu,
    )  # fmt: skip
    assert_parts(problem, 8)  # or fewer on other devices
    check_where_another_kernel_holds_the_sms(gpu, problem, None)


# -- tiles of two neighbouring KV heads --

ROOM = 64 * kernels._PAIR_TILES_PER_SM * 160  # tokens of two KV heads that are many for any GPU


def roomy(kv_lens, *, page_size=16, xp, **arguments):
    """A problem of head_dim 64 whose table has room for so many tiles that pairs of KV heads pay."""
    spare_entries = size(xp, ROOM // page_size, 1)
    return build_problem(kv_lens, page_size=page_size, spare_entries=spare_entries, xp=xp, **arguments)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("num_kv_heads", [2, 8])
@pytest.mark.parametrize("group_size", [1, 2, 4, 7, 8])
def test_pairs_of_kv_heads(xp, group_size, num_kv_heads, page_size):
    kv_lens = size(xp, [0, 1, 15, 63, 64, 65, 129, 700, 20_000, 3001], [0, 1, 65, 130])
    options = itertools.product((-1, 0, 100), (0.0, 5.0))
    for i, (window_left, logits_soft_cap) in enumerate(options):
        storage, dense, dtype = ("separate", "interleaved")[i % 2], i % 3 == 0, DTYPES[(i + page_size) % 2]
        problem = roomy(
            kv_lens, group_size=group_size, num_kv_heads=num_kv_heads, page_size=page_size, storage=storage,
            dense=dense, dtype=dtype, window_left=window_left, logits_soft_cap=logits_soft_cap, seed=i, xp=xp,
        )  # fmt: skip
        assert_heads(problem, 2)
        check(problem, (group_size, num_kv_heads, page_size, i))


def test_pairs_of_more_requests_than_threads(xp):
    rng = np.random.default_rng(0)
    for batch in (127, 300, 1100):
        problem = build_problem(rng.integers(0, 200, batch), num_kv_heads=8, group_size=5, xp=xp)
        assert_heads(problem, 2)
        check(problem, batch)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"num_kv_heads": 3}, {}),
        ({"num_kv_heads": 1}, {}),
        ({"layout": "HND"}, {}),
        ({"storage": "strided"}, {}),
        ({"group_size": 9}, {}),
        ({"head_dim": 80}, {}),
        ({"qo_lens": [1, 1, 1, 1]}, {}),
        ({}, {"fixed_split_size": 512}),
    ],
)
def test_what_has_no_pairs(xp, changes, settings):
    arguments = {"num_kv_heads": 4, "group_size": 4} | changes
    problem = roomy([0, 70, 1, 3000], xp=xp, **arguments)
    assert_heads(problem, 1, **settings)
    check(problem, changes, **settings)


@pytest.mark.parametrize(
    ("kv", "value"), [(0, math.nan), (1, math.nan), (1, math.inf)]
)  # of a key, of a value
@pytest.mark.parametrize("head", [0, 1, 2, 3])
def test_a_pair_keeps_its_heads_apart(xp, head, kv, value):
    """Whatever one head's keys and values are, its neighbour has the same bits."""
    for kv_len, group_size in itertools.product(size(xp, (20, 20_000), (20,)), (1, 7, 8)):
        arguments = {"num_kv_heads": 4, "group_size": group_size, "dtype": "float16", "page_size": 4}
        problem = roomy([kv_len, 50], xp=xp, **arguments)
        assert_heads(problem, 2)
        before = [to_host(a) for a in problem.call(cupyattn.decode, return_lse=True)]
        problem.writable()[kv][int(problem.kv_indices[0]), 1, head, 7] = value
        after = [to_host(a) for a in problem.call(cupyattn.decode, return_lse=True)]
        own = slice(head * group_size, (head + 1) * group_size)
        assert not np.isfinite(after[0][0, own]).all(axis=-1).any()
        for a, b in zip(before, after, strict=True):
            for state in (a, b):
                state[0, own] = 0
            assert a.tobytes() == b.tobytes()


def test_pairs_give_the_same_bits_every_time(xp):
    """In turns with calls that have other tiles, in one workspace, which is left as it was."""
    workspace = None if xp is np else cupyattn.decode_workspace()
    kv_lens = size(xp, [9000, 77, 0, 40_000], [300, 77])
    problem = roomy(kv_lens, num_kv_heads=8, group_size=7, xp=xp)
    assert_heads(problem, 2)
    others = [
        problem.replace(qo_indptr=xp.arange(len(kv_lens) + 1, dtype="i4")),
        roomy(kv_lens[::-1], num_kv_heads=2, group_size=8, xp=xp),
        build_problem([500, 3], num_kv_heads=2, head_dim=128, xp=xp),
    ]  # fmt: skip
    check(problem)
    first = decode_bytes(problem, workspace=workspace)
    for i in range(20):
        others[i % len(others)].call(cupyattn.decode, workspace=workspace)
        assert decode_bytes(problem, workspace=workspace) == first, f"run {i}"
    assert workspace is None or is_zeroed(workspace)


# -- the same bits every time --


@pytest.mark.parametrize("group_size", [1, 2, 3, 4])
def test_lines_that_all_warps_share(xp, group_size):
    """More states than a warp's lanes take, of one line a CTA: none is cleared while others still wait for it."""
    for num_tiles in size(xp, range(30, 66, 3), (3,)):
        problem = build_problem(
            [64 * num_tiles], num_kv_heads=1, group_size=group_size, head_dim=256, seed=num_tiles, xp=xp
        )
        first = decode_bytes(problem)
        check(problem, num_tiles)
        assert all(decode_bytes(problem) == first for _ in range(size(xp, 50, 2))), num_tiles


@pytest.mark.parametrize("fixed_split_size", [None, 512])
@pytest.mark.parametrize("qo_lens", [None, [3, 40, 0, 1]])
@pytest.mark.parametrize("head_dim", [80, 128, 256])  # rows of partials of 12, 16 and 32 lanes
def test_the_same_bits_every_time(xp, head_dim, qo_lens, fixed_split_size):
    mode = {"fixed_split_size": fixed_split_size}
    kv_lens = size(xp, [9000, 77, 300, 40000], [300, 77, 30, 100])
    problem = build_problem(kv_lens, qo_lens=qo_lens, head_dim=head_dim, xp=xp)
    other = build_problem([500, 3], head_dim=64, xp=xp)
    first = decode_bytes(problem, **mode)
    for i in range(20):
        if i % 3 == 0:
            other.call(cupyattn.decode)  # leaves other partials in the workspace
        assert decode_bytes(problem, **mode) == first, f"run {i}"
    stream = new_stream(xp)
    out, lse = xp.empty_like(problem.q), xp.empty(problem.q.shape[:2], np.float32)
    replay = capture(xp, stream, lambda: problem.call(cupyattn.decode, out=out, lse=lse, **mode))
    for _ in range(5):
        with stream:
            poison(out)
            replay()
        stream.synchronize()
        assert to_host(out).tobytes() + to_host(lse).tobytes() == first


@pytest.mark.parametrize("fixed_split_size", [None, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group_size", [8, 16, 32])
def test_large_merges_whoever_comes_last(xp, pools, group_size, head_dim, fixed_split_size):
    """One group over nearly all CTAs: on an H100, of 2112 tiles, 132 to 528 states, 2100 with fixed splits.

    Which CTAs share them varies; the bits must not.
    """
    problem = pools(xp, "bfloat16").problem(
        [700, size(xp, 134_400, 3000), 40], page_size=16, num_kv_heads=1, group_size=group_size,
        head_dim=head_dim, dense=False,
    )  # fmt: skip
    check(problem, (group_size, head_dim), fixed_split_size=fixed_split_size)
    first = decode_bytes(problem, fixed_split_size=fixed_split_size)
    for i in range(size(xp, 50, 1)):
        assert decode_bytes(problem, fixed_split_size=fixed_split_size) == first, f"run {i}"


# -- fixed splits: a request's bits are its own --


@pytest.mark.parametrize("fixed_split_size", [64, 128, 1024])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_fixed_splits(xp, head_dim, fixed_split_size):
    """Every shape of the kernel, and lengths about the cuts; the other dtype of each head_dim is left to the fuzz."""
    dtype = DTYPES[HEAD_DIMS.index(head_dim) % 2]
    kinds = itertools.cycle(itertools.product(("NHD", "HND"), (False, True)))
    pages = itertools.cycle((1, 16, 64))
    around = [cut + i for cut in (fixed_split_size, 3 * fixed_split_size) for i in (-1, 0, 1)]
    groups = {
        f"group {n}": {"kv_lens": [0, 1, *around], "num_kv_heads": 1, "group_size": n} for n in (1, 8, 16, 32)
    }
    for i, (name, shape) in enumerate((SHAPES | groups).items()):
        layout, dense = next(kinds)
        arguments = shape | {"layout": layout, "dtype": dtype, "dense": dense, "page_size": next(pages)}
        if name in groups and i % 2:
            arguments |= {"window_left": fixed_split_size + 70, "logits_soft_cap": 30.0}
        problem = build_problem(head_dim=head_dim, seed=i, xp=xp, **arguments)
        check(problem, (name, head_dim, arguments), fixed_split_size=fixed_split_size)


def test_fixed_splits_change_nothing_on_numpy():
    problem = build_problem([0, 63, 64, 200], qo_lens=[1, 2, 3, 0])
    assert decode_bytes(problem, fixed_split_size=64) == decode_bytes(problem)
    assert decode_bytes(problem, fixed_split_size=np.int64(128)) == decode_bytes(problem)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("fixed_split_size", [64, 512])
@pytest.mark.parametrize(
    ("group_size", "head_dim", "options"),
    [
        (1, 80, {}),
        (4, 128, {}),
        (8, 256, {"window_left": 600}),
        (16, 64, {"logits_soft_cap": 20.0}),
        (32, 128, {}),
        (40, 64, {}),
    ],
)
def test_neighbours_change_no_bit(xp, group_size, head_dim, options, fixed_split_size, ragged):
    """Each request alone, then in batches of 3 and of 40, at other places beside other neighbours."""
    rng = np.random.default_rng(group_size)
    kv_lens = [size(xp, 3000, 400), 2 * fixed_split_size, 0, *rng.integers(1, size(xp, 600, 150), 37)]
    qo_lens = [2, 3, 1, *rng.integers(0, 4, 37)] if ragged else None
    every = build_problem(
        kv_lens, qo_lens=qo_lens, group_size=group_size, num_kv_heads=1, head_dim=head_dim, xp=xp, **options
    )
    assert_neighbours_change_no_bit(every, fixed_split_size)


def test_a_token_beside_prompts_is_the_token_alone(xp):
    """One query token a request without `qo_indptr`, and among requests that have many with it."""
    every = build_problem([3000, 70, 500], qo_lens=[1, 70, 33], group_size=4, xp=xp)
    together = bits_of_requests(every, fixed_split_size=256)
    alone = pick(every, [0]).replace(qo_indptr=None)
    assert bits_of_requests(alone, fixed_split_size=256) == together[:1]


@pytest.mark.gpu
@pytest.mark.parametrize(("num_kv_heads", "qo_lens"), [(8, None), (2, [3, 1, 20])])
def test_workspace_of_fixed_splits(gpu, num_kv_heads, qo_lens):
    """Nothing past its end is written; it serves calls of both modes in turn."""
    problem = build_problem(
        [80_000, 0, 3000], qo_lens=qo_lens, num_kv_heads=num_kv_heads, head_dim=128, xp=gpu
    )

    def num_bytes(size):
        operands = problem.q, problem.cache, problem.pages
        return cupyattn.decode_workspace_bytes(*operands, qo_indptr=problem.qo_indptr, fixed_split_size=size)

    ordinary, needed = cupyattn.decode_workspace(), num_bytes(64)
    assert num_bytes(None) <= ordinary.nbytes < needed
    assert num_bytes(1024) <= needed
    assert cupyattn.decode_workspace(num_bytes=1).nbytes == ordinary.nbytes
    with pytest.raises(
        ValueError, match=f"workspace must .*at least {needed} bytes .*decode_workspace_bytes"
    ):
        problem.call(cupyattn.decode, workspace=ordinary, fixed_split_size=64)
    memory = gpu.full(needed + 4096, 0xFF, np.uint8)  # what lies behind it must stay as it is
    memory[:needed] = 0
    for workspace in (memory[:needed], cupyattn.decode_workspace(num_bytes=needed)):
        assert workspace.nbytes == needed
        for fixed_split_size in (64, None, 64, 1024, None):
            check(problem, fixed_split_size, workspace=workspace, fixed_split_size=fixed_split_size)
            assert is_zeroed(workspace), fixed_split_size
    assert (memory[needed:] == 0xFF).all()


# -- CUDA graphs --


GRAPHS = {
    "dense": {"dense": True, "ragged": False, "head_dim": 128, "group_size": 4},
    "csr": {"dense": False, "ragged": False, "head_dim": 64, "group_size": 16},
    "ragged": {"dense": False, "ragged": True, "head_dim": 128, "group_size": 4},
    "window": {"dense": True, "ragged": True, "head_dim": 256, "group_size": 8, "window_left": 200},
    "fixed": {"dense": False, "ragged": True, "head_dim": 128, "group_size": 4, "fixed_split_size": 512},
    "parts": {"dense": True, "ragged": True, "head_dim": 128, "group_size": 4, "num_kv_heads": 8},
}


@pytest.mark.parametrize("mode", ["Relaxed", "Global", "ThreadLocal"])
@pytest.mark.parametrize("own_workspace", [False, True])
@pytest.mark.parametrize("kind", GRAPHS)
def test_graph_replays_follow_changes(xp, pools, kind, own_workspace, mode):
    """Captured once; without a workspace as the stream's first call: one is made during the capture."""
    changing = Changing(xp, pools(xp, "bfloat16"), **GRAPHS[kind])
    changing.change()
    changing.call()  # loads the kernel, on another stream
    workspace = changing.workspace() if own_workspace and xp is not np else None
    stream = unused_stream(xp)
    if xp is not np:
        xp.cuda.Device().synchronize()
    replay = capture(xp, stream, lambda: changing.call(workspace=workspace), mode)
    replay_often(xp, changing, stream, replay, size(xp, 200 if mode == "Relaxed" else 20, 8))


@pytest.mark.parametrize("kind", ["csr", "ragged", "fixed"])
def test_ten_thousand_replays(xp, pools, kind, record_property):
    """Of two launches each, the second of which reads tables while the first is finishing (`pdl`)."""
    changing = Changing(xp, pools(xp, "bfloat16"), **GRAPHS[kind])
    times = size(xp, 5000, 20)
    replay_pairs(xp, changing, times, num_states=size(xp, 50, 5))
    record_property("replays", times)


@pytest.mark.parametrize("fixed_split_size", [None, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dependent_launches_wait_for_what_they_read(xp, head_dim, fixed_split_size):
    """append writes the keys and queries that decode reads; decodes share a workspace."""
    mode = {"fixed_split_size": fixed_split_size}
    problem = build_problem(
        size(xp, [9000, 1, 300, 4000], [300, 1, 30, 100]), head_dim=head_dim, poison=False, xp=xp
    )
    rng = xp.random.default_rng(1)
    new = [
        (rng.standard_normal((3, 4, 2, head_dim), dtype=np.float32) * scale).astype(problem.q.dtype)
        for scale in (3.0, 1.0)
    ]
    wanted = []
    for pdl in (False, True):
        results = []
        for k, v in zip(*new, strict=True):
            q = cupyattn.append(k, v, problem.cache, problem.pages, rope=cupyattn.Rope(), q=problem.q)
            for _ in range(3):
                results.append(cupyattn.decode(q, problem.cache, problem.pages, pdl=pdl, **mode))  # noqa: PERF401
        wanted.append([to_host(out).tobytes() for out in results])
    assert wanted[0] == wanted[1]
    assert len(set(wanted[0])) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("own_workspace", [False, True])
@pytest.mark.parametrize("kind", ["csr", "ragged"])
def test_torch_graph_replays_follow_changes(gpu, pools, kind, own_workspace):
    torch = pytest.importorskip("torch")
    changing = Changing(gpu, pools(gpu, "float16"), **GRAPHS[kind])
    changing.change()
    changing.call()
    gpu.cuda.Device().synchronize()
    workspace = cupyattn.decode_workspace() if own_workspace else None
    p = changing.problem

    def tensor(a):
        return None if a is None else torch.from_dlpack(a)

    cache = cupyattn.PagedKVCache(tensor(p.k_pages), tensor(p.v_pages))
    pages = cupyattn.PageTable(tensor(p.kv_indptr), tensor(p.kv_indices), tensor(p.kv_lens))
    out, lse, q = map(tensor, (changing.out, changing.lse, p.q))
    options = p.options | {"qo_indptr": tensor(p.qo_indptr), "out": out, "lse": lse}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cupyattn.decode(q, cache, pages, workspace=workspace, **options)
    stream = gpu.cuda.Stream.null

    def replay():
        stream.synchronize()
        graph.replay()
        torch.cuda.synchronize()

    replay_often(gpu, changing, stream, replay, 200)


@pytest.mark.gpu
def test_one_graph_of_many_calls(gpu, pools):
    """Layer after layer in one graph: the calls share a workspace, whose counters each leaves at zero."""
    pool = pools(gpu, "bfloat16")
    layers = [Changing(gpu, pool, batch=3 + i, **GRAPHS[kind]) for i, kind in enumerate(GRAPHS)]
    for layer in layers:
        layer.change()
        layer.call()
    stream = unused_stream(gpu)
    gpu.cuda.Device().synchronize()
    replay = capture(gpu, stream, lambda: [layer.call() for _ in range(3) for layer in layers])
    for i in range(20):
        with stream:
            for layer in layers:
                layer.change()
            replay()
            counts = [int(layer.misses()) for layer in layers]
        assert not any(counts), (i, counts)


# -- streams, threads, devices --


def many_problems(xp, count):
    return [
        build_problem(
            size(xp, [3000 + 500 * i, 64 * i, 9], [30 + 5 * i, 9, 0]), qo_lens=None if i % 2 else [i, 1, 5],
            group_size=1 + 7 * (i % 3), head_dim=HEAD_DIMS[i % len(HEAD_DIMS)], dtype=DTYPES[i % 2], seed=i,
            xp=xp,
        )
        for i in range(count)
    ]  # fmt: skip


def test_two_streams_at_once(xp):
    problems = many_problems(xp, 2)
    expected = [decode_bytes(p) for p in problems]
    streams = [new_stream(xp) for _ in problems]
    if xp is not np:
        xp.cuda.Device().synchronize()
    results = [[], []]
    for _ in range(size(xp, 100, 3)):
        for stream, problem, result in zip(streams, problems, results, strict=True):
            with stream:
                result.append(problem.call(cupyattn.decode, return_lse=True))
    for stream, wanted, result in zip(streams, expected, results, strict=True):
        stream.synchronize()
        assert {to_host(out).tobytes() + to_host(lse).tobytes() for out, lse in result} == {wanted}


@pytest.mark.parametrize("streams", ["own", "per-thread-default", "default"])
def test_many_threads_at_once(xp, streams):
    """Each thread with its own problem; the first use of each shape races too."""
    problems = many_problems(xp, 8)
    start = threading.Barrier(len(problems))
    if xp is not np:
        xp.cuda.Device().synchronize()

    def work(problem):
        stream = new_stream(xp)
        if xp is not np and streams != "own":
            stream = xp.cuda.Stream.ptds if streams == "per-thread-default" else xp.cuda.Stream.null
        start.wait(timeout=60)
        with stream:
            results = [problem.call(cupyattn.decode, return_lse=True) for _ in range(size(xp, 200, 3))]
            stream.synchronize()
            return {to_host(out).tobytes() + to_host(lse).tobytes() for out, lse in results}

    with ThreadPoolExecutor(len(problems)) as pool:
        results = list(pool.map(work, problems))
    for i, (result, problem) in enumerate(zip(results, problems, strict=True)):
        wanted = decode_bytes(problem)
        assert result == {wanted}, f"thread {i}: {len(result - {wanted})} wrong results"


@pytest.mark.parametrize("heads", [None, 24])
def test_the_same_arrays_again_with_other_options(xp, heads):
    """Where outputs and workspace are given, a second call of a kind keeps its launch for the third, on each stream."""
    kv_lens = size(xp, [700, 3000, 64], [70, 9, 64])
    if heads is None:
        problem = build_problem(kv_lens, group_size=4, xp=xp)
    else:
        problem = build_mla_problem(kv_lens, num_heads=heads, xp=xp)
    if xp is not np:
        problem = problem.replace(kv_lens=xp.asarray(problem.kv_lens))
    all_options = [{}, {"window_left": 33}, {"logits_soft_cap": 2.0}, {"sm_scale": 0.03}]
    all_options += [{"window_left": 40 + i} for i in range(20)]  # more than are kept
    streams = [new_stream(xp), new_stream(xp)]
    given = []
    for _ in streams:
        out, lse = xp.empty(problem.out_shape, problem.q.dtype), xp.empty(problem.q.shape[:2], np.float32)
        given.append({"out": out, "lse": lse, "workspace": None if xp is np else cupyattn.decode_workspace()})
    for cut in (0, 8, 0):  # lengths change, in place
        problem.kv_lens[:] -= cut
        for options in (*all_options[:4] * 3, *all_options[4:], *all_options[:4]):
            expected = attend(problem.replace(**options))
            for pdl, return_lse in ((False, True), (True, True), (False, False)):
                for stream, arrays in zip(streams, given, strict=True):
                    arrays["out"].fill(np.nan), arrays["lse"].fill(np.nan)
                    if xp is not np:
                        xp.cuda.Device().synchronize()
                    with stream:
                        result = problem.call(
                            problem.decode, **arrays, **options, pdl=pdl, return_lse=return_lse
                        )
                    assert (result[0] if return_lse else result) is arrays["out"]
                for stream, arrays in zip(streams, given, strict=True):
                    stream.synchronize()
                    assert_right(arrays["out"], arrays["lse"], expected, problem.dtype, (options, pdl, cut))


def test_threads_with_the_very_same_arrays(xp):
    problem = build_problem(size(xp, [3000, 100], [30, 9]), group_size=8, xp=xp)
    expected = attend(problem)
    out, lse = xp.empty(problem.out_shape, problem.q.dtype), xp.empty(problem.q.shape[:2], np.float32)
    arrays = {"out": out, "lse": lse, "workspace": None if xp is np else cupyattn.decode_workspace()}
    with ThreadPoolExecutor(8) as pool:  # on one stream, in any order
        for i in range(size(xp, 50, 2)):
            poison(out), poison(lse)
            list(pool.map(lambda _: problem.call(cupyattn.decode, **arrays), range(8)))
            assert_right(out, lse, expected, problem.dtype, i)


@pytest.mark.gpu
def test_streams_have_workspaces_of_their_own(gpu):
    from cupyattn.runtime.workspace import _defaults

    problem = build_problem([100], xp=gpu)
    streams = [unused_stream(gpu)]
    with streams[0]:
        problem.call(cupyattn.decode)
    streams.append(unused_stream(gpu))
    with streams[1]:
        problem.call(cupyattn.decode)
    first, second = (_defaults[gpu.cuda.runtime.getDevice(), stream.ptr, 0] for stream in streams)
    assert first.data.ptr != second.data.ptr
    gpu.cuda.Device().synchronize()
    assert not first.any()  # back at zero


@pytest.mark.alone
@pytest.mark.gpu
@pytest.mark.parametrize("fixed_split_size", [None, 256])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_where_another_kernel_holds_the_sms(gpu, fixed_split_size, num_kv_heads):
    """CTAs that end before all have started leave their lines to those that end later: the bits are the same.

    Those that waited instead would hold the few places that are left for as long as the other kernel runs.
    """
    problem = build_problem(
        [20_000, 3000, 0, 700], num_kv_heads=num_kv_heads, group_size=8, head_dim=128, xp=gpu
    )
    check_where_another_kernel_holds_the_sms(gpu, problem, fixed_split_size)


@pytest.mark.alone
@pytest.mark.gpu
def test_nothing_is_allocated_or_waited_for(gpu):
    """With outputs given, a warm call takes no memory; it returns while the stream is still busy."""
    problem = build_problem([100, 2000], xp=gpu)
    out, lse = gpu.empty_like(problem.q), gpu.empty(problem.q.shape[:2], np.float32)
    problem.call(cupyattn.decode, out=out, lse=lse)
    pool = gpu.get_default_memory_pool()
    stream = gpu.cuda.get_current_stream()
    stream.synchronize()
    busy = gpu.empty((1 << 14, 1 << 14), np.float32)
    used = pool.used_bytes()
    for _ in range(100):
        busy.fill(1.0)  # 1 GB each: about 0.4 ms
    problem.call(cupyattn.decode, out=out, lse=lse)
    assert not stream.done, "the call waited"
    assert pool.used_bytes() == used
    stream.synchronize()


@pytest.mark.gpu
def test_arrays_on_another_device(gpu):
    if gpu.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices")
    with gpu.cuda.Device(1):
        there = build_problem([100, 0, 700], xp=gpu)
    with gpu.cuda.Device(0):
        out, lse = there.call(cupyattn.decode, return_lse=True)
        assert gpu.cuda.runtime.getDevice() == 0
        here = build_problem([100, 0, 700], xp=gpu)
        with pytest.raises(ValueError, match="device"):
            cupyattn.decode(here.q, there.cache, here.pages)
    assert out.device.id == lse.device.id == 1
    with gpu.cuda.Device(1):
        assert_right(out, lse, attend(there), there.dtype)


# -- bad input on the device --


def test_overlap_and_alignment(xp):
    problem = build_problem([40, 9], dtype="float16", xp=xp)
    flat = xp.zeros(problem.q.size + 64, np.float16)
    shifted = flat[8 : 8 + problem.q.size].reshape(problem.q.shape)
    overlapping = flat[: problem.q.size].reshape(problem.q.shape)
    with pytest.raises(ValueError, match="out must not overlap"):
        problem.replace(q=shifted).call(cupyattn.decode, out=overlapping)
    with pytest.raises(ValueError, match="out must not overlap"):
        problem.call(cupyattn.decode, out=problem.q)
    assert not to_host(flat).any()
    if xp is not np:
        with pytest.raises(ValueError, match="16 bytes"):
            problem.replace(q=flat[1 : 1 + problem.q.size].reshape(problem.q.shape)).call(cupyattn.decode)
        with pytest.raises(ValueError, match="workspace"):
            problem.call(cupyattn.decode, workspace=xp.zeros(1 << 16, np.uint8))
        with pytest.raises(TypeError, match="dtype"):
            problem.call(cupyattn.decode, workspace=xp.zeros(1 << 25, np.int8))


def test_q_and_outputs_of_any_strides(xp):
    """Heads and tokens strided, transposed and reversed; lse as a column of something else."""
    problem = build_problem([70, 300, 5], head_dim=64, num_kv_heads=2, group_size=4, xp=xp)
    expected = attend(problem)
    tokens, heads, dim = problem.q.shape
    for q_base, turn in (
        (xp.zeros((tokens, heads, dim + 16), problem.q.dtype), lambda a: a[..., :dim]),
        (xp.zeros((heads, tokens, dim), problem.q.dtype), lambda a: a.swapaxes(0, 1)),
        (xp.zeros((2 * tokens, heads, dim), problem.q.dtype), lambda a: a[::-2]),
    ):
        q, out = turn(q_base), turn(poison(xp.empty_like(q_base)))
        q[...] = problem.q
        lse = poison(xp.empty((heads, tokens, 2), np.float32))[..., 1].swapaxes(0, 1)
        problem.replace(q=q).call(cupyattn.decode, out=out, lse=lse)
        assert_right(out, lse, expected, problem.dtype, q.strides)


# -- fuzz --


def test_fuzz_gpu(xp, record_property):
    """Random problems, built and compared on the host, run on the device. Counts the cases that ran."""
    cases = 0
    target = size(xp, FUZZ_CASES, 40)
    strategy = problem_arguments(dtypes=DTYPES, max_qo_len=size(xp, 24, 8), max_len=size(xp, 500, 200))

    @settings(
        max_examples=target, deadline=None, derandomize=False, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy, FIXED_SPLIT_SIZES, st.booleans())
    def fuzz(arguments, fixed_split_size, roomy):
        nonlocal cases
        cases += 1
        if roomy and fixed_split_size is None:  # else steps are small, and tiles have 8 or 16 rows
            arguments = arguments | {"spare_entries": 20000 // arguments["page_size"]}
        problem = build_problem(**arguments)
        expected = attend(problem)
        out, lse = to_backend(problem, xp).call(
            cupyattn.decode, return_lse=True, fixed_split_size=fixed_split_size
        )
        assert_right(to_host(out), to_host(lse), expected, problem.dtype, (arguments, fixed_split_size))

    fuzz()
    if xp is not np:
        record_property("fuzz_cases", cases)
    assert cases >= target
