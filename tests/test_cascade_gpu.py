"""`cascade_decode` on the device: structures small and large, poison, determinism, CUDA graphs, streams, fuzz.

All but what needs a device by nature runs on NumPy too, in small, so that the tests themselves are tested.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cascade_problems import (
    STRUCTURES,
    ChangingCascade,
    build_cascade,
    cascade_bytes,
    check_cascade,
    group_overhead,
    tile_rows,
)
from device import (
    assert_right,
    attend,
    beside_another_kernel,
    capture,
    check,
    freed,
    misses,
    new_stream,
    poison,
    replay_often,
    size,
    unused_stream,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import STORAGES, build_mla_problem, build_problem, to_float64, to_host
from strategies import MLA_DIMS, cascade_arguments

import cupyattn
from cupyattn import cascade as cascade_module
from cupyattn.cache import PageTable
from cupyattn.levels import CascadeLevels
from cupyattn.runs import is_zeroed
from cupyattn.schedule import are_uneven

FUZZ_CASES = int(os.environ.get("CUPYATTN_FUZZ_CASES", "2000")) // 16
DTYPES = ("float16", "bfloat16")
HEAD_DIMS = (64, 80, 128, 256)
GROUPS = (1, 4, 8, 5)
PAGE_SIZES = (1, 16, 64)
KINDS = ("gqa", "mla")


def sizes(xp, kind, **arguments):
    """Arguments for GQA, or for MLA with rows as the GPU takes them; on NumPy with short ones, which cost little."""
    if kind == "gqa":
        return {"head_dim": size(xp, 128, 64)} | arguments
    return {"mla": True} | size(xp, {}, {"ckv_dim": 32, "kpe_dim": 8}) | arguments


def build(xp, name, **arguments):
    return build_cascade(**(STRUCTURES[name] | arguments), xp=xp)


def workspace_for(*cascades):
    """One that serves them all; None on NumPy."""
    if cascades[0].problem.xp is np:
        return None
    sizes = (cupyattn.cascade_workspace_bytes(c.problem.q, c.problem.cache, c.levels) for c in cascades)
    return cupyattn.decode_workspace(num_bytes=max(sizes))


# -- every structure --


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_structure(xp, head_dim, dtype):
    kinds = itertools.cycle(itertools.product(("NHD", "HND"), STORAGES, (1, 16, 3, 64)))
    groups = itertools.cycle(GROUPS + GROUPS[:1])  # not in step with the structures of each dtype
    for _ in range(HEAD_DIMS.index(head_dim) + 2 * DTYPES.index(dtype)):
        next(groups)
    for i, name in enumerate(STRUCTURES):
        layout, storage, page_size = next(kinds)
        arguments = {
            "head_dim": head_dim, "dtype": dtype, "layout": layout, "storage": storage,
            "page_size": page_size, "group_size": next(groups), "seed": i,
        }  # fmt: skip
        check_cascade(build(xp, name, **arguments), (name, arguments))


@pytest.mark.parametrize("group_size", [1, 4, 5, 8, 33])
def test_every_structure_with_every_group_size(xp, group_size):
    for i, name in enumerate(STRUCTURES):
        cascade = build(xp, name, group_size=group_size, num_kv_heads=1 + i % 2, head_dim=size(xp, 128, 64))
        check_cascade(cascade, (name, group_size))


@pytest.mark.parametrize("factor", [2.0**114, 2.0**-100])
@pytest.mark.parametrize("head_dim", [64, 112])
def test_values_that_float16_cannot_hold(xp, head_dim, factor):
    """Partial states are float16 numbers with a factor for several lines."""
    for name in STRUCTURES:
        cascade = build(xp, name, group_size=8, head_dim=head_dim, dtype="bfloat16")
        v = cascade.problem.writable()[1]
        v[...] = (v.astype(np.float32) * factor).astype(v.dtype)
        out, lse = (a[cascade.rows] for a in cascade.call(return_lse=True))
        wanted, wanted_lse = attend(cascade.plain)  # back to ordinary sizes, which tolerances are for:
        assert_right(to_float64(out) / factor, lse, (wanted / factor, wanted_lse), "bfloat16", (name, factor))


@pytest.mark.parametrize("qo_len", [1, 2])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_every_structure_of_mla(xp, num_heads, qo_len):
    pages = itertools.cycle((1, 16, 64))
    num_heads = size(xp, num_heads, num_heads // 8)
    for i, name in enumerate(STRUCTURES):
        arguments = sizes(xp, "mla", num_heads=num_heads, dtype=DTYPES[i % 2], page_size=next(pages), seed=i)
        if qo_len == 2 and STRUCTURES[name].get("qo_lens") is None:
            arguments["qo_lens"] = [2] * len(STRUCTURES[name]["own_lens"])
        check_cascade(build(xp, name, **arguments), (name, arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("tile_q", [16, 32, 64, 128])
def test_every_tile(gpu, tile_q, head_dim):
    """The same whatever shape is chosen: fewer rows a tile than a group has, or more."""
    if (head_dim > 128 and tile_q > 32) or (head_dim == 80 and tile_q > 64):
        pytest.skip("there is no such shape")
    with tile_rows(tile_q):
        for i, name in enumerate(STRUCTURES):
            check_cascade(build(gpu, name, head_dim=head_dim, dtype=DTYPES[i % 2], seed=i), (name, tile_q))
        if head_dim == 128:
            for name, arguments in large(gpu).items():
                check_cascade(build_cascade(**arguments, xp=gpu), (name, tile_q))


@pytest.mark.gpu
@pytest.mark.parametrize("tile_q", [None, 16, 32, 64])
def test_every_tile_of_mla(gpu, tile_q):
    with tile_rows(tile_q):
        for i, name in enumerate(STRUCTURES):
            arguments = sizes(gpu, "mla", num_heads=(8, 16, 24)[i % 3], dtype=DTYPES[i % 2], seed=i)
            check_cascade(build(gpu, name, **arguments), (name, tile_q))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", [1, 3])
def test_groups_that_count_for_more_than_their_tiles(gpu, tiles, kind):
    """Runs begin and end elsewhere, before groups' first tiles too."""
    with tile_rows(64), group_overhead(tiles):
        for i, name in enumerate(STRUCTURES):
            check_cascade(build(gpu, name, **sizes(gpu, kind, dtype=DTYPES[i % 2], seed=i)), (name, tiles))
        for name, arguments in large(gpu).items():
            if kind == "gqa":
                check_cascade(build_cascade(**arguments, xp=gpu), (name, tiles))


@pytest.mark.gpu
@pytest.mark.parametrize(("equal", "uneven"), [(0, 1), (2, 0)])
@pytest.mark.parametrize("tile_q", [16, 32, 64, 128])
def test_groups_that_count_for_more_where_requests_differ(gpu, tile_q, equal, uneven):
    """Then units are added up twice; also where nodes lie in the workspace, and several are a thread's."""
    rng = np.random.default_rng(tile_q)
    with tile_rows(tile_q), group_overhead(equal, uneven):
        for i, (name, structure) in enumerate(STRUCTURES.items()):
            if len(structure["own_lens"]) > 1:
                first, *others = structure["own_lens"]
                longer = structure | {"own_lens": [first + 500, *others]}
                assert are_uneven([-(-n // 64) or 1 for n in longer["own_lens"]]), name
                cascade = build_cascade(
                    **longer, head_dim=128, num_kv_heads=2, group_size=4, dtype=DTYPES[i % 2], seed=i, xp=gpu
                )
                check_cascade(cascade, (name, tile_q))
        nearly_equal, one_long, many = [130, 190, 250] * 22, [130] * 65 + [2000], rng.integers(1, 400, 900)
        for own_lens, differ in ((nearly_equal, False), (one_long, True), (many, True)):
            assert are_uneven([-(-n // 64) for n in own_lens]) == differ
            pairs = [2] * (len(own_lens) // 2)
            shared = [([len(own_lens)], [1000]), (pairs, rng.integers(0, 90, len(pairs)))]
            cascade = build_cascade(own_lens, shared, num_kv_heads=2, group_size=4, xp=gpu)
            check_cascade(cascade, (own_lens, tile_q))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [4, 8, 16, 24, 64, 128])
def test_pages_of_the_widest_tile(gpu, page_size):
    """It copies whole tiles of pages in boxes, where these divide pages; the ends of groups, and others, row by row."""
    kinds = list(itertools.product(("NHD", "HND"), STORAGES))
    names = ("many-share-one", "hundreds-of-groups", "short-own", "window", "permuted-tokens", "long-own")
    shapes = {name: large(gpu)[name] for name in names}
    # The first key that anybody sees is in the middle of a box, of a tile that begins where boxes do.
    shapes["in-a-box"] = {
        "own_lens": list(range(200, 392, 3)), "shared": [([64], [512])], "window_left": 500,
    }  # fmt: skip
    rows_of_boxes = math.gcd(page_size, 32)
    with tile_rows(128):
        for i, (name, shape) in enumerate(shapes.items()):
            layout, storage = kinds[(page_size + i) % len(kinds)]
            arguments = {
                "head_dim": (64, 128)[i % 2], "dtype": DTYPES[page_size // 8 % 2], "num_kv_heads": 1 + i // 3,
                "layout": layout, "storage": storage, "page_size": page_size, "seed": i,
            }  # fmt: skip
            cascade = build_cascade(**shape, **arguments, xp=gpu)
            assert box_rows(cascade, cascade.problem.cache) == (rows_of_boxes if rows_of_boxes >= 8 else 0)
            check_cascade(cascade, (name, arguments))


def box_rows(cascade, cache):
    """What KeyMaps say that the kernel is given for this cache."""
    levels, operands = cascade_module._operands(
        "test", cascade.problem.q, cache, cascade.levels, None, None, None
    )
    _, pointers, _ = cascade_module._plans(False, levels.num_levels).find(operands)
    key_maps = next(x for x in pointers if isinstance(x, bytes))
    return struct.unpack_from("<i", key_maps, 2 * 128)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [8, 64])
def test_boxes_and_rows_have_the_same_bits(gpu, page_size):
    """Pages in the opposite order, from the last one down, have strides that no map of boxes has."""
    with tile_rows(128):
        for head_dim in (64, 128):
            arguments = {"head_dim": head_dim, "page_size": page_size, "num_kv_heads": 2}
            cascade = build_cascade(**large(gpu)["many-share-one"], **arguments, xp=gpu)
            p, expected = cascade.problem, cascade_bytes(cascade)
            reversed_cache = tuple(gpu.ascontiguousarray(a[::-1])[::-1] for a in p.cache.nhd())
            assert box_rows(cascade, p.cache) == min(page_size, 32)
            assert box_rows(cascade, reversed_cache) == 0
            out, lse = cupyattn.cascade_decode(
                p.q, reversed_cache, cascade.levels, return_lse=True, **cascade.options
            )
            assert to_host(out[cascade.rows]).tobytes() + to_host(lse[cascade.rows]).tobytes() == expected


# -- large ones --


def large(xp):
    """Arguments of `build_cascade`; `s` is what is left of a number on NumPy."""

    def s(number):
        return size(xp, number, -(-number // 16))

    rng = np.random.default_rng(0)
    few, some, many = s(64), s(512), s(900)
    tree = s(128)
    return {
        "many-share-one": {"own_lens": [s(128)] * few, "shared": [([few], [s(4000)])]},
        "512-in-groups-of-8": {
            "own_lens": rng.integers(0, s(300), some), "shared": [([8] * (some // 8), [s(500)] * (some // 8))],
        },
        "three-share-much": {"own_lens": [s(100), 1, s(700)], "shared": [([3], [s(30_000)])]},
        "one-request": {"own_lens": [10], "shared": [([1], [s(5000)])]},
        "hundreds-of-groups": {
            "own_lens": rng.integers(0, 60, 2 * s(200)),
            "shared": [
                ([2 * s(200)], [s(700)]), ([1, 3] * (s(200) // 2), rng.integers(0, s(200), s(200) // 2 * 2)),
            ],
        },
        "thousands-of-groups": {
            "own_lens": rng.integers(0, 30, many),
            "shared": [
                ([2] * (many // 2), rng.integers(0, 80, many // 2)), ([1] * many, rng.integers(0, 20, many)),
            ],
        },
        "nothing-in-common": {
            "own_lens": rng.integers(0, s(500), s(100)),
            "shared": [([1] * s(100), rng.integers(0, s(500), s(100)))],
        },
        "short-own": {"own_lens": [30] * s(300), "shared": [([s(300)], [200])]},
        "long-own": {"own_lens": [s(20_000), 3, s(15_000)], "shared": [([3], [s(1000)])]},
        "all-shared": {"own_lens": [0] * few, "shared": [([few], [s(9000)])]},
        "long-in-the-middle": {
            "own_lens": [20] * few,
            "shared": [([few], [50]), ([few // 4, few - few // 4], [s(6000), 7]), ([few], [64])],
        },
        "tree-of-eight-levels": {
            "own_lens": rng.integers(0, s(300), tree),
            "shared": [
                ([tree * (i + 1) // 2**level - tree * i // 2**level for i in range(2**level)],
                 rng.integers(0, s(600), 2**level))
                for level in range(7)
            ],
        },
        "many-tokens": {
            "own_lens": [s(200)] * s(40), "qo_lens": rng.integers(0, 11, s(40)),
            "shared": [([s(40)], [s(3000)]), ([1, s(40) - 1], [s(500), 40])],
        },
        "a-prompt-among-tokens": {
            "own_lens": [100, s(400), 70], "qo_lens": [1, s(300), 2], "shared": [([3], [s(2000)])],
        },
        "window": {
            "own_lens": rng.integers(0, s(400), few), "shared": [([few], [s(2000)])], "window_left": s(500),
        },
        "window-of-tokens": {
            "own_lens": [s(100)] * s(40), "qo_lens": [3] * s(40), "shared": [([s(40)], [s(3000)])],
            "window_left": s(700),
        },
        "permuted": {
            "own_lens": rng.integers(0, s(100), s(200)), "permuted": True, "padding": 9,
            "shared": [([s(200) // 3, s(200) // 2], [s(2000), s(900)])],
        },
        "permuted-tokens": {
            "own_lens": rng.integers(0, s(100), s(100)), "permuted": True, "padding": 9, "lead": 3,
            "qo_lens": rng.integers(0, 5, s(100)), "shared": [([s(100)], [s(4000)])],
        },
    }  # fmt: skip


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", large(np))
def test_large(xp, name, head_dim):
    shape, i = large(xp)[name], list(large(np)).index(name)
    j = HEAD_DIMS.index(head_dim)
    arguments = {
        "head_dim": head_dim, "dtype": DTYPES[(i + j) % 2], "group_size": GROUPS[(i + j) % 4],
        "page_size": PAGE_SIZES[(i + j) % 3], "num_kv_heads": 1 + (i + j // 2) % 2, "layout": ("NHD", "HND")[j % 2],
        "dense": (i + j) % 5 == 0, "seed": i,
    }  # fmt: skip
    with freed(xp):
        check_cascade(build_cascade(**shape, **arguments, xp=xp), (name, arguments))


@pytest.mark.parametrize("group_size", [1, 4, 8, 5])
def test_many_share_one_with_every_group_size(xp, group_size):
    for head_dim, dtype in itertools.product((64, 128), DTYPES):
        arguments = {"group_size": group_size, "head_dim": head_dim, "dtype": dtype}
        check_cascade(build_cascade(**large(xp)["many-share-one"], **arguments, xp=xp), arguments)


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize(
    "name",
    [
        "many-share-one", "three-share-much", "hundreds-of-groups", "thousands-of-groups", "nothing-in-common",
        "long-own", "tree-of-eight-levels", "many-tokens", "window-of-tokens", "permuted",
    ],
)  # fmt: skip
def test_large_of_mla(xp, name, num_heads):
    shape, i = large(xp)[name], list(large(np)).index(name)
    arguments = sizes(
        xp, "mla", num_heads=size(xp, num_heads, 2), dtype=DTYPES[i % 2], page_size=PAGE_SIZES[i % 3]
    )
    with freed(xp):
        check_cascade(build_cascade(**shape, **arguments, xp=xp), (name, arguments))
        if name == "many-share-one":
            few = len(shape["own_lens"])
            check_cascade(build_cascade(**shape, **arguments, qo_lens=[2] * few, xp=xp), (name, arguments))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window_left", [0, 1, 62, 63, 64, 65, 500, 2**31 - 1])
def test_windows_around_borders_and_tile_edges(xp, window_left, kind):
    for qo_lens in (None, [1, 2, 0, 64, 1, 5]):
        cascade = build_cascade(
            [1, 64, 0, 70, 128, 3], [([6], [129]), ([2, 4], [64, 1])], qo_lens=qo_lens, window_left=window_left,
            page_size=4, **sizes(xp, kind), xp=xp,
        )  # fmt: skip
        check_cascade(cascade, (window_left, qo_lens))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_len", [20, 3000])  # in one part, in several
def test_nan_in_a_visible_key_is_not_hidden(xp, kv_len, kind):
    """It is all its readers', and nobody else's."""
    cascade = build_cascade(
        [5, 0, 9, 70], [([2, 2], [kv_len, kv_len])], **sizes(xp, kind), dtype="float16", xp=xp
    )
    pages = cascade.levels.levels[0][0]
    cascade.problem.writable()[0][int(pages.kv_indices[0]), 1, 0, 7] = math.nan
    out, lse = (to_host(a).astype(np.float32) for a in cascade.call(return_lse=True))
    heads = slice(None if kind == "mla" else out.shape[1] // cascade.problem.num_kv_heads)
    assert np.isnan(out[:2, heads]).all()
    assert np.isnan(lse[:2, heads]).all()
    for state in (out, lse):
        assert np.isfinite(state[2:]).all()
        if kind == "gqa":
            assert np.isfinite(state[:2, heads.stop :]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_empty_rows_are_zero(xp, kind):
    for name in ("no-keys", "no-shared-keys", "more-tokens-than-keys", "one-level"):
        out, lse = (to_host(a) for a in build(xp, name, **sizes(xp, kind)).call(return_lse=True))
        empty = np.isneginf(lse)
        assert empty.any()
        assert not out[empty].any()  # exactly 0


@pytest.mark.gpu
def test_as_many_groups_as_there_may_be(gpu):
    cascade = build(gpu, "one-level")
    p, (own, _) = cascade.problem, cascade.levels.levels[0]

    def levels(num_groups):
        """All of them are of no requests, of no keys, or both."""
        ends = gpu.full(num_groups - own.batch_size + 1, len(p.q), np.int32)
        ends[: len(p.q)] = gpu.arange(len(p.q))
        none = gpu.zeros(len(ends), np.int32)
        return [(PageTable(none, own.kv_indices, none[1:]), ends), (own, None)]

    out, lse = cupyattn.cascade_decode(p.q, p.cache, levels(2**15), return_lse=True)
    assert_right(out, lse, attend(cascade.plain), p.dtype)
    with pytest.raises(ValueError, match="levels must have at most 32768 groups in all, got 32769"):
        cupyattn.cascade_decode(p.q, p.cache, levels(2**15 + 1))


# -- one level, the form of arguments --


@pytest.mark.parametrize("kind", KINDS)
def test_one_level_is_decode(xp, kind):
    for qo_lens, window_left, kv_len in itertools.product((None, [1, 3, 60]), (-1, 50), (200, 5000)):
        problem_of = build_problem if kind == "gqa" else build_mla_problem
        shape = {name: value for name, value in sizes(xp, kind).items() if name != "mla"}
        p = problem_of(
            [size(xp, kv_len, 97), 70, 0], qo_lens=qo_lens, window_left=window_left, xp=xp, **shape
        )

        def one_level(q, cache, pages, *, qo_indptr, **options):
            return cupyattn.cascade_decode(q, cache, [(pages, qo_indptr)], **options)

        def in_order(q, cache, pages, *, qo_indptr, **options):
            levels = CascadeLevels([(pages, qo_indptr)], q_indices=xp.arange(len(q), dtype=np.int32))
            return cupyattn.cascade_decode(q, cache, levels, **options)

        check(p, (qo_lens, window_left, kv_len), decode=one_level)
        check(p, (qo_lens, window_left, kv_len), decode=in_order)


def test_forms_of_the_query_of_mla(xp):
    for name in ("groups-in-groups", "permuted-tokens"):
        cascade = build(xp, name, **sizes(xp, "mla"))
        p, expected = cascade.problem, cascade_bytes(cascade)
        views = p.q[..., : p.ckv_dim], p.q[..., p.ckv_dim :]
        for pair in (views, tuple(map(xp.ascontiguousarray, views))):
            out, lse = cupyattn.cascade_decode(
                pair, p.cache, cascade.levels, return_lse=True, **cascade.options
            )
            assert to_host(out[cascade.rows]).tobytes() + to_host(lse[cascade.rows]).tobytes() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_q_changes_no_bit(xp, kind):
    for name in ("permuted", "permuted-tokens"):
        cascade = build_cascade(**large(xp)[name], **sizes(xp, kind), xp=xp)
        p, num_tokens = cascade.problem, len(cascade.rows)
        # With as many rows, of which as many belong to nobody: the launch has the same shape.
        q = xp.zeros_like(p.q)
        begin = int(cascade.starts[0])
        q[begin : begin + num_tokens] = p.q[cascade.rows]
        order = np.arange(begin, begin + num_tokens, dtype=np.int32)
        q_indices = cascade.levels.q_indices.copy()
        q_indices[begin : begin + num_tokens] = xp.asarray(order)
        levels = CascadeLevels(cascade.levels.levels, q_indices=q_indices)
        out, lse = cupyattn.cascade_decode(q, p.cache, levels, return_lse=True, **cascade.options)
        rows = slice(begin, begin + num_tokens)
        assert to_host(out[rows]).tobytes() + to_host(lse[rows]).tobytes() == cascade_bytes(cascade), name


def test_q_and_outputs_of_any_strides(xp):
    """Heads and tokens strided, transposed and reversed; lse as a column of something else."""
    cascade = build(xp, "several-tokens", head_dim=64)
    p, expected = cascade.problem, attend(cascade.plain)
    tokens, heads, dim = p.q.shape
    for q_base, turn in (
        (xp.zeros((tokens, heads, dim + 16), p.q.dtype), lambda a: a[..., :dim]),
        (xp.zeros((heads, tokens, dim), p.q.dtype), lambda a: a.swapaxes(0, 1)),
        (xp.zeros((2 * tokens, heads, dim), p.q.dtype), lambda a: a[::-2]),
    ):
        q, out = turn(q_base), turn(poison(xp.empty_like(q_base)))
        q[...] = p.q
        lse = poison(xp.empty((heads, tokens, 2), np.float32))[..., 1].swapaxes(0, 1)
        cupyattn.cascade_decode(q, p.cache, cascade.levels, out=out, lse=lse, **cascade.options)
        assert_right(out, lse, expected, p.dtype, q.strides)


# -- workspaces, the same bits every time --


def test_workspace_is_left_zero(xp):
    """One for all, `decode` and `mla_decode` too."""
    names = ("many-share-one", "long-own", "tree-of-eight-levels", "permuted-tokens", "thousands-of-groups")
    cascades = [
        build_cascade(**shape, **sizes(xp, kind, seed=i), xp=xp)
        for i, (shape, kind) in enumerate(
            itertools.product([*STRUCTURES.values(), *(large(xp)[name] for name in names)], KINDS)
        )
    ]
    others = [
        build_problem([size(xp, 9000, 90), 70, 0], xp=xp),
        build_mla_problem([size(xp, 9000, 90), 70, 0], xp=xp, **size(xp, {}, {"ckv_dim": 32, "kpe_dim": 8})),
    ]
    workspace = workspace_for(*cascades)
    for i, cascade in enumerate(cascades):
        check_cascade(cascade, i, workspace=workspace)
        assert workspace is None or is_zeroed(workspace), i
        if i % 4 < 2:
            check(others[i % 4], i, workspace=workspace)
            assert workspace is None or is_zeroed(workspace), i


@pytest.mark.parametrize(("kind", "tile_q"), [("gqa", None), ("gqa", 64), ("gqa", 128), ("mla", None)])
@pytest.mark.parametrize("shared_len", [40, 9000])
def test_a_group_may_have_tokens_of_nobody(xp, kind, tile_q, shared_len):
    """They leave states too (in homes, and in slots), which must not stay for the next launch."""
    with contextlib.nullcontext() if tile_q is None else tile_rows(tile_q):
        check_tokens_of_nobody(xp, kind, shared_len)


def check_tokens_of_nobody(xp, kind, shared_len):
    shared = [([3], [size(xp, shared_len, 40)])]
    cascade = build_cascade(
        [5, 300, 0, 2], shared, qo_lens=[1, 2, 0, 1], lead=2, padding=3, **sizes(xp, kind), xp=xp
    )
    workspace = workspace_for(cascade)
    expected = cascade_bytes(cascade, workspace=workspace)
    qo_indptr = cascade.levels.levels[0][1]
    bounds = to_host(qo_indptr).tolist()
    qo_indptr[0], qo_indptr[-1] = 0, len(cascade.problem.q)
    for _ in range(3):
        out, lse = cascade.call(return_lse=True, workspace=workspace)
        assert workspace is None or is_zeroed(workspace)
        assert_right(out[cascade.rows], lse[cascade.rows], attend(cascade.plain), cascade.problem.dtype, kind)
    qo_indptr[0], qo_indptr[-1] = bounds[0], bounds[-1]
    assert cascade_bytes(cascade, workspace=workspace) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("requests_per_sm", [9, 13])
def test_more_states_or_rows_than_are_listed(gpu, requests_per_sm, head_dim):
    """In tiles of 128 rows: with 9 some 75 rows a CTA, and 25 states each of the first one's; with 13 too many rows."""
    num_sms = gpu.cuda.Device().attributes["MultiProcessorCount"]
    with tile_rows(128):
        cascade = build_cascade(
            [20] * (requests_per_sm * num_sms), [([16], [20_000])], num_kv_heads=1, group_size=8,
            head_dim=head_dim, xp=gpu,
        )  # fmt: skip
        workspace = workspace_for(cascade)
        for _ in range(2):
            check_cascade(cascade, workspace=workspace)
            assert is_zeroed(workspace)


@pytest.mark.gpu
def test_nothing_is_written_past_the_workspace(gpu):
    cascades = [
        build_cascade(**large(gpu)[name], xp=gpu) for name in ("many-share-one", "tree-of-eight-levels")
    ]
    needed = workspace_for(*cascades).nbytes
    memory = gpu.full(needed + 4096, 0xFF, np.uint8)
    memory[:needed] = 0
    for cascade in cascades:
        check_cascade(cascade, workspace=memory[:needed])
    assert (memory[needed:] == 0xFF).all()
    with pytest.raises(ValueError, match=r"workspace must .*at least"):
        cascades[0].call(workspace=gpu.zeros(1 << 16, np.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        "many-share-one",
        "three-share-much",
        "long-own",
        "tree-of-eight-levels",
        "many-tokens",
        "hundreds-of-groups",
    ],
)
def test_the_same_bits_every_time(xp, name, kind):
    """Over 100 launches, among others that leave other partials in the workspace, and as a graph."""
    for head_dim in (64, 128, 256) if kind == "gqa" else (None,):
        shape = sizes(xp, kind) | ({} if head_dim is None else {"head_dim": head_dim})
        cascade = build_cascade(**large(xp)[name], **shape, xp=xp)
        other = build(xp, "groups-in-groups", **sizes(xp, kind))
        out = poison(xp.empty(cascade.problem.out_shape, cascade.problem.q.dtype))
        lse = xp.empty(cascade.problem.q.shape[:2], np.float32)
        first = cascade_bytes(cascade)
        launches = size(xp, 100, 3)
        for i in range(launches):
            if i % 3 == 0:
                other.call()
            cascade.call(out=out, lse=lse)
            assert to_host(out).tobytes() + to_host(lse).tobytes() == first, f"{head_dim=} run {i}"
            poison(out)
        stream = new_stream(xp)
        replay = capture(xp, stream, lambda c=cascade, o=out, s=lse: c.call(out=o, lse=s))
        for i in range(5):
            with stream:
                poison(out)
                replay()
            stream.synchronize()
            assert to_host(out).tobytes() + to_host(lse).tobytes() == first, f"{head_dim=} replay {i}"


#: Writes `pattern` all over an SM's shared memory.
FILL = """
extern "C" __global__ void fill(unsigned pattern, int num_words, unsigned* last) {
  extern __shared__ unsigned words[];
  for (int i = threadIdx.x; i < num_words; i += blockDim.x) words[i] = pattern;
  __syncthreads();
  if (threadIdx.x == 0) last[blockIdx.x] = words[num_words - 1];
}
"""


PATTERNS = (0, 0x7FC07FC0, 0x7E7F7E7F, 0x40404040, 0xC0A0C0A0)  # in bfloat16: 0, NaN, huge, 3, -5


@pytest.mark.gpu
@pytest.mark.parametrize("tile_q", [16, 32, 64, 128])
def test_what_lay_in_shared_memory_changes_no_bit(gpu, tile_q):
    """Neither numbers nor NaN, in rows that a tile has room for and a group has not."""
    fill = gpu.RawKernel(FILL, "fill")
    num_bytes = fill.max_dynamic_shared_size_bytes = 220 * 1024
    num_sms = gpu.cuda.Device().attributes["MultiProcessorCount"]
    last = gpu.zeros(num_sms, np.uint32)
    with tile_rows(tile_q):
        for group_size in (8, 3, 1):
            cascade = build_cascade([700, 300, 40] * 20, [([60], [3000])], group_size=group_size, xp=gpu)
            found = set()
            for pattern in PATTERNS:
                arguments = np.uint32(pattern), np.int32(num_bytes // 4), last
                fill((num_sms,), (1024,), arguments, shared_mem=num_bytes)
                found.add(cascade_bytes(cascade))
                assert (last == pattern).all()
            assert len(found) == 1, group_size


# -- CUDA graphs --

GRAPHS = {
    "one-prefix": {"num_groups": (1, 11), "longest": (5000, 400), "dense": (True, False)},
    "tree": {"num_groups": (1, 3, 12), "longest": (2000, 900, 300), "dense": (False, True, False), "qo_len": 3},
    "permuted": {
        "num_groups": (5, 23), "longest": (1500, 700), "dense": (False, False), "qo_len": 2, "permuted": True,
        "head_dim": 64,
    },
    "eight-levels": {
        "num_groups": (1, 2, 3, 4, 5, 6, 7, 8), "longest": (900, 800, 700, 600, 500, 400, 300, 200),
        "dense": (True, False) * 4, "permuted": True,
    },
    "many-rows": {
        "num_groups": (1, 40), "longest": (5000, 400), "dense": (False, False), "qo_len": 2, "group_size": 8,
    },
    "window": {
        "num_groups": (2, 9), "longest": (3000, 300), "dense": (True, True), "qo_len": 4, "window_left": 200,
        "head_dim": 256, "group_size": 8,
    },
    "mla-16": {"num_groups": (1, 3, 10), "longest": (3000, 700, 300), "dense": (True, False, True), "num_heads": 16},
    "mla-128": {
        "num_groups": (2, 6), "longest": (2000, 400), "dense": (False, True), "qo_len": 2, "permuted": True,
        "num_heads": 128,
    },
}  # fmt: skip


def changing_cascade(xp, pools, kind, dtype="bfloat16"):
    shape = {"head_dim": 128, "group_size": 4} | GRAPHS[kind]
    shape["longest"] = [size(xp, most, most // 20) for most in shape["longest"]]
    if "num_heads" in shape:
        shape["group_size"] = size(xp, shape.pop("num_heads"), 2)
        dims = size(xp, {"head_dim": 576, "ckv_dim": 512}, {"head_dim": 40, "ckv_dim": 32})
        shape |= {"num_kv_heads": 1} | dims
    return ChangingCascade(xp, pools(xp, dtype), **shape)


@pytest.mark.parametrize("own_workspace", [False, True])
@pytest.mark.parametrize("kind", GRAPHS)
def test_graph_replays_follow_changes(xp, pools, kind, own_workspace):
    """Captured once; without a workspace as the stream's first call: one is made during the capture."""
    changing = changing_cascade(xp, pools, kind)
    changing.change()
    changing.call()  # loads the kernel, on another stream
    workspace = workspace_for(changing.cascade) if own_workspace else None
    stream = unused_stream(xp)
    if xp is not np:
        xp.cuda.Device().synchronize()
    replay = capture(xp, stream, lambda: changing.call(workspace=workspace))
    replay_often(xp, changing, stream, replay, size(xp, 15, 4))
    assert workspace is None or is_zeroed(workspace)


@pytest.mark.parametrize("kind", GRAPHS)
def test_hundreds_of_replays(xp, pools, kind, record_property):
    """Of two launches each, the second of which reads tables while the first is finishing (`pdl`)."""
    changing = changing_cascade(xp, pools, kind, "float16")
    arrays, states = changing.arrays(), []
    for _ in range(size(xp, 10, 3)):
        changing.change()
        states.append(([a.copy() for a in arrays], *changing.expected()))
    other_out, other_lse = xp.empty_like(changing.out), xp.empty_like(changing.lse)

    def launch_twice():
        changing.call()
        changing.call(out=other_out, lse=other_lse, pdl=True)

    launch_twice()
    stream, times = new_stream(xp), size(xp, 300, 6)
    if xp is not np:
        xp.cuda.Device().synchronize()
    replay = capture(xp, stream, launch_twice)
    with stream:
        counts = xp.zeros(times, np.int64)
        for i, pick in enumerate(np.random.default_rng(0).integers(len(states), size=times)):
            values, rows, expected = states[pick]
            for a, value in zip(arrays, values, strict=True):
                a[...] = value
            for a in (changing.out, changing.lse, other_out, other_lse):
                poison(a)
            replay()
            out, lse = changing.out[rows], changing.lse[rows]
            counts[i] = misses(out, lse, expected, changing.dtype, xp)
            counts[i] += (out.view(np.uint16) != other_out[rows].view(np.uint16)).sum()
            counts[i] += (lse != other_lse[rows]).sum()
    stream.synchronize()
    wrong = np.flatnonzero(to_host(counts))
    assert not len(wrong), f"{len(wrong)} of {times} replays are wrong, the first is {wrong[0]}"
    record_property("replays", times)


@pytest.mark.gpu
def test_one_graph_of_many_calls(gpu, pools):
    """Layer after layer in one graph: the calls share a workspace, which each leaves at zero."""
    layers = [changing_cascade(gpu, pools, kind) for kind in GRAPHS]
    plain = build_problem([3000, 70], xp=gpu)
    out = gpu.empty_like(plain.q)
    for layer in layers:
        layer.change()
        layer.call()
    plain.call(cupyattn.decode, out=out)
    stream = unused_stream(gpu)
    gpu.cuda.Device().synchronize()

    def launch():
        for _ in range(3):
            for layer in layers:
                layer.call(pdl=True)
                plain.call(cupyattn.decode, out=out, pdl=True)

    replay = capture(gpu, stream, launch)
    expected = attend(plain)
    for i in range(5):
        with stream:
            for layer in layers:
                layer.change()
            poison(out)
            replay()
            counts = [int(layer.misses()) for layer in layers]
            counts.append(int(misses(out, None, expected, plain.dtype, gpu)))
        assert not any(counts), (i, counts)


@pytest.mark.parametrize(
    ("head_dim", "tile_q"), [(64, None), (128, None), (256, None), (64, 128), (128, 128)]
)
def test_dependent_launches_wait_for_what_they_read(xp, head_dim, tile_q):
    """`append` writes the keys and queries that `cascade_decode` reads; launches share a workspace.

    The widest tile reads the first request's last keys, a whole tile of 64, in boxes.
    """
    with contextlib.nullcontext() if tile_q is None else tile_rows(tile_q):
        check_dependent_launches(xp, head_dim)


def check_dependent_launches(xp, head_dim):
    cascade = build_cascade(
        [size(xp, 3008, 64), 1, 40], [([3], [size(xp, 5000, 50)])], head_dim=head_dim, poison=False, xp=xp
    )
    p, own = cascade.problem, cascade.levels.levels[-1][0]
    rng = xp.random.default_rng(1)
    new = [
        (rng.standard_normal((2, 3, 2, head_dim), dtype=np.float32) * scale).astype(p.q.dtype)
        for scale in (3.0, 1.0, 2.0)
    ]
    wanted = []
    for pdl in (False, True):
        results = []
        for k, v in new:
            q = cupyattn.append(k, v, p.cache, own, rope=cupyattn.Rope(), q=p.q)
            for _ in range(3):
                results.append(cupyattn.cascade_decode(q, p.cache, cascade.levels, pdl=pdl))  # noqa: PERF401
        wanted.append([to_host(out).tobytes() for out in results])
    assert wanted[0] == wanted[1]
    assert len(set(wanted[0])) == 3


# -- streams, threads, other kernels --


def many_cascades(xp, count):
    names = itertools.cycle(large(np))
    return [
        build_cascade(**large(xp)[next(names)], **sizes(xp, KINDS[i % 4 == 3], seed=i), xp=xp)
        for i in range(count)
    ]


@pytest.mark.parametrize("own_workspaces", [False, True])
def test_two_streams_at_once(xp, own_workspaces):
    cascades = many_cascades(xp, 4)
    expected = [cascade_bytes(c) for c in cascades]
    workspaces = [workspace_for(c) if own_workspaces else None for c in cascades]
    streams = [new_stream(xp) for _ in cascades]
    if xp is not np:
        xp.cuda.Device().synchronize()
    results = [[] for _ in cascades]
    for _ in range(size(xp, 60, 2)):
        for stream, cascade, workspace, result in zip(streams, cascades, workspaces, results, strict=True):
            with stream:
                result.append(cascade.call(return_lse=True, workspace=workspace))
    for stream, wanted, result, workspace in zip(streams, expected, results, workspaces, strict=True):
        stream.synchronize()
        assert {to_host(out).tobytes() + to_host(lse).tobytes() for out, lse in result} == {wanted}
        assert workspace is None or is_zeroed(workspace)


def test_many_threads_at_once(xp):
    """Each thread with its own cascade; the first use of each shape races too."""
    cascades = many_cascades(xp, 8)
    start = threading.Barrier(len(cascades))
    if xp is not np:
        xp.cuda.Device().synchronize()

    def work(cascade):
        stream = new_stream(xp)
        start.wait(timeout=60)
        with stream:
            results = [cascade.call(return_lse=True) for _ in range(size(xp, 40, 2))]
            stream.synchronize()
            return {to_host(out).tobytes() + to_host(lse).tobytes() for out, lse in results}

    with ThreadPoolExecutor(len(cascades)) as pool:
        results = list(pool.map(work, cascades))
    for i, (result, cascade) in enumerate(zip(results, cascades, strict=True)):
        wanted = cascade_bytes(cascade)
        assert result == {wanted}, f"thread {i}: {len(result - {wanted})} wrong results"


@pytest.mark.alone
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["many-share-one", "long-own", "tree-of-eight-levels"])
@pytest.mark.parametrize(
    "arguments", [{"group_size": 8}, {"mla": True}, {"mla": True, "num_heads": 128}], ids=str
)
def test_where_another_kernel_holds_the_sms(gpu, name, arguments):
    """CTAs that end before all have started must not wait for those that cannot start: the bits are the same."""
    check_beside_another_kernel(gpu, name, arguments)


@pytest.mark.alone
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["many-share-one", "long-own", "tree-of-eight-levels"])
@pytest.mark.parametrize("tile_q", [64, 128])
def test_tiles_where_another_kernel_holds_the_sms(gpu, name, tile_q):
    with tile_rows(tile_q):
        check_beside_another_kernel(gpu, name, {"group_size": 8})


def check_beside_another_kernel(gpu, name, arguments):
    cascade = build_cascade(**large(gpu)[name], **arguments, xp=gpu)
    workspace = workspace_for(cascade)
    expected = cascade_bytes(cascade, workspace=workspace)
    out = poison(gpu.empty(cascade.problem.out_shape, cascade.problem.q.dtype))
    lse = gpu.empty(cascade.problem.q.shape[:2], np.float32)
    # With 128 heads, one SM alone would take about as long as the other kernel holds the rest.
    for nobody_waited in beside_another_kernel(
        gpu,
        lambda: cascade.call(out=out, lse=lse, workspace=workspace),
        num_free=10 if "num_heads" in arguments else 1,
    ):
        assert nobody_waited
        assert to_host(out).tobytes() + to_host(lse).tobytes() == expected
        assert is_zeroed(workspace)
        poison(out)


@pytest.mark.alone
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_allocated_or_waited_for(gpu, kind):
    """With outputs given, a warm call takes no memory; it returns while the stream is still busy."""
    cascade = build(gpu, "permuted-tokens", **sizes(gpu, kind))
    out = gpu.empty(cascade.problem.out_shape, cascade.problem.q.dtype)
    lse = gpu.empty(cascade.problem.q.shape[:2], np.float32)
    cascade.call(out=out, lse=lse)
    operands = cascade.problem.q, cascade.problem.cache, cascade.levels
    options = cascade.options | {"out": out, "lse": lse}
    pool = gpu.get_default_memory_pool()
    stream = gpu.cuda.get_current_stream()
    stream.synchronize()
    busy = gpu.empty((1 << 14, 1 << 14), np.float32)
    used = pool.used_bytes()
    for _ in range(100):
        busy.fill(1.0)  # 1 GB each: about 0.4 ms
    cupyattn.cascade_decode(*operands, **options)
    assert not stream.done, "the call waited"
    assert pool.used_bytes() == used
    stream.synchronize()


# -- fuzz --


@pytest.mark.parametrize("kind", KINDS)
def test_fuzz_gpu(xp, kind, record_property):
    """Random cascades, built and compared on the host, run on the device. Counts the cases that ran."""
    cases, mla = 0, kind == "mla"
    target = size(xp, FUZZ_CASES // (4 if mla else 1), 20)
    limits = {"dims": (size(xp, MLA_DIMS, (32, 8)),)} if mla else {}
    strategy = cascade_arguments(
        mla=mla, dtypes=DTYPES, max_requests=size(xp, 12, 5), max_qo_len=size(xp, 12, 4),
        max_len=size(xp, 300 if mla else 500, 90), **limits,
    )  # fmt: skip

    @settings(
        max_examples=target, deadline=None, derandomize=False, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy, st.booleans())
    def fuzz(arguments, roomy):
        nonlocal cases
        cases += 1
        if roomy:  # else steps are small, and tiles have 8 or 16 rows
            arguments = arguments | {"spare_entries": 20000 // arguments["page_size"], "one_table": True}
        cascade = build_cascade(**arguments)
        expected = attend(cascade.plain)
        out, lse = cascade.moved(xp).call(return_lse=True)
        rows = cascade.rows
        assert_right(to_host(out)[rows], to_host(lse)[rows], expected, cascade.problem.dtype, arguments)

    fuzz()
    if xp is not np:
        record_property("fuzz_cases", cases)
    assert cases >= target
