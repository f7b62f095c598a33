"""Multi-head latent attention: the specification, `mla_decode`, `mla_append`, `PagedMLACache`, what they refuse.

What needs a device by nature, and what takes long on NumPy, is in test_mla_gpu.py.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bad_cases import bits, cases, misaligned, part, read_only
from bad_cases import check as check_bad
from device import QUERIES, assert_right, attend, check
from frameworks import arguments
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from problems import (
    DTYPES,
    MLA_STORAGES,
    POISON_PAGE,
    TOLERANCE,
    Guarded,
    assert_close,
    assert_rounded,
    assert_state,
    build_mla_problem,
    build_problem,
    oracle,
    rotate_as_complex_numbers,
    to_backend,
    to_host,
)
from strategies import FIXED_SPLIT_SIZES, mla_arguments, ropes

import cupyattn
from cupyattn import (
    PageAllocator,
    PagedKVCache,
    PagedMLACache,
    PageTable,
    Rope,
    mla_append,
    mla_decode,
    reference,
)
from cupyattn.plan import look

LENS = [0, 1, 17, 64, 97]
SMALL = {"ckv_dim": 32, "kpe_dim": 8}  # on NumPy any dimensions do
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def i4(*values):
    return np.array(values, np.int32)


# -- the specification --


def by_reference(q, cache, pages, **options):
    return reference.mla_decode(q[..., : cache.ckv_dim], q[..., cache.ckv_dim :], cache, pages, **options)


def check_reference(problem):
    out, lse = problem.call(by_reference)
    assert out.dtype == lse.dtype == np.float64
    assert_state(out, lse, oracle(problem), "float64", lse_tolerance=1e-12)
    return out, lse


@pytest.mark.parametrize("num_heads", [1, 5, 16])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("dense", [False, True])
def test_specification(dense, page_size, num_heads):
    for storage, dtype in zip(MLA_STORAGES, DTYPES, strict=True):
        check_reference(
            build_mla_problem(
                LENS,
                num_heads=num_heads,
                page_size=page_size,
                dense=dense,
                storage=storage,
                dtype=dtype,
                **SMALL,
            )
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", MLA_STORAGES)
def test_specification_of_deepseek_dimensions(storage, dtype):
    check_reference(build_mla_problem(LENS, num_heads=5, storage=storage, dtype=dtype))


@pytest.mark.parametrize(
    "qo_lens",
    [[0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [0, 1, 17, 64, 97], [5, 4, 20, 70, 100]],
    ids=["some", "none", "all of the cache", "more than the cache"],
)
@pytest.mark.parametrize("window_left", [-1, 0, 16])
def test_specification_of_several_queries(window_left, qo_lens):
    problem = build_mla_problem(LENS, qo_lens=qo_lens, num_heads=3, window_left=window_left, **SMALL)
    out, lse = check_reference(problem)
    offsets = np.cumsum([0, *qo_lens])
    for b, n in enumerate(qo_lens):
        blind = slice(offsets[b], offsets[b] + max(0, n - LENS[b]))  # queries at negative positions
        assert (out[blind] == 0).all()
        assert np.isneginf(lse[blind]).all()


def test_one_key_is_its_latent_vector():
    problem = build_mla_problem([1, 70], window_left=0, num_heads=3)
    out, lse = problem.call(by_reference)
    for b, length in enumerate([1, 70]):
        place = problem.kv_indices[problem.kv_indptr[b] + (length - 1) // 16], (length - 1) % 16
        ckv, kpe = (a[place].astype(np.float64) for a in (problem.ckv_pages, problem.kpe_pages))
        np.testing.assert_array_equal(out[b], ckv[None].repeat(3, axis=0))
        logits = problem.q[b].astype(np.float64) @ np.concatenate([ckv, kpe]) * problem.sm_scale
        np.testing.assert_allclose(lse[b], logits, rtol=1e-12)


def test_it_is_decode_of_one_head_with_concatenated_keys():
    """Where the values have the size of the keys: filled up with zeros."""
    problem = build_mla_problem(
        [33, 0, 70], qo_lens=[2, 1, 5], num_heads=4, dtype="float32", poison=False, **SMALL
    )
    k_pages = problem.bases[0][:, :, None]
    v_pages = k_pages.copy()
    v_pages[..., SMALL["ckv_dim"] :] = 0
    wanted, wanted_lse = cupyattn.decode(
        problem.q, (k_pages, v_pages), problem.pages, return_lse=True, **problem.options
    )
    out, lse = problem.call(mla_decode, return_lse=True)
    np.testing.assert_array_equal(out, wanted[..., : SMALL["ckv_dim"]])
    np.testing.assert_array_equal(lse, wanted_lse)


@settings(max_examples=40)
@given(
    mla_arguments(dims=((32, 8), (5, 3)), num_heads=(1, 3, 8), max_qo_len=12),
    st.sampled_from([1.0, 1e5, 1e9]),
)
def test_the_vectorised_reference_is_the_oracle(arguments, max_bytes):
    problem = build_mla_problem(**arguments)
    (out, lse), (expected, expected_lse) = attend(problem, max_bytes), oracle(problem)
    assert_close(out, expected, 1e-12)
    assert_close(lse, expected_lse, 1e-12, "lse")
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))


def test_the_builder_poisons_what_is_not_to_be_read():
    for storage in MLA_STORAGES:
        problem = build_mla_problem([20, 0], window_left=2, page_size=4, storage=storage, **SMALL)
        for pages in (problem.ckv_pages, problem.kpe_pages):
            nan = np.isnan(pages.astype(np.float32))
            assert nan.all(axis=2).sum() == len(pages) * 4 - 3
            assert nan.any(axis=2).sum() == len(pages) * 4 - 3
        assert (
            problem.kv_indices.tolist()[:4] == [POISON_PAGE] * 4
        )  # tokens 0 to 15; 17 to 19 are in the window
        assert problem.kv_indices.tolist()[5:] == [POISON_PAGE] * 2


# -- mla_decode --

SHAPES = {
    "one-token": {"kv_lens": [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 300], "num_heads": 16},
    "few-tokens": {"kv_lens": [1, 64, 200, 5, 0], "qo_lens": [1, 4, 3, 0, 4], "num_heads": 5},
    "one-head": {"kv_lens": [300, 64, 1, 0], "qo_lens": [7, 12, 1, 3], "num_heads": 1},
    "window": {"kv_lens": [0, 3, 64, 65, 400], "num_heads": 5, "window_left": 63},
    "own-token": {"kv_lens": [1, 17, 300], "qo_lens": [1, 2, 9], "num_heads": 16, "window_left": 0},
    "soft-cap": {"kv_lens": [40, 300, 2], "num_heads": 16, "logits_soft_cap": 5.0, "sm_scale": 1.0},
    "more-tokens-than-keys": {"kv_lens": [3, 0, 20], "qo_lens": [5, 4, 21], "num_heads": 5},
}


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("storage", MLA_STORAGES)
def test_decode(xp, storage, query):
    """Every shape; table, page size and dtype in turn."""
    kinds = itertools.cycle(itertools.product((False, True), (1, 16, 3, 64)))
    dtypes = itertools.cycle(DTYPES if xp is np else ("float16", "bfloat16"))
    for i, (name, shape) in enumerate(SHAPES.items()):
        dense, page_size = next(kinds)
        more = shape | {"dense": dense, "page_size": page_size, "dtype": next(dtypes), "storage": storage}
        check(
            build_mla_problem(seed=i, xp=xp, **more),
            (name, query, more),
            decode=QUERIES[query],
            validate=True,
        )


@pytest.mark.parametrize("dims", [(32, 8), (5, 3), (1, 1), (576, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dimensions_on_numpy(dtype, dims):
    ckv_dim, kpe_dim = dims
    for query in QUERIES:
        problem = build_mla_problem([40, 0, 9], num_heads=2, dtype=dtype, ckv_dim=ckv_dim, kpe_dim=kpe_dim)
        check(problem, (dims, query), decode=QUERIES[query])


def test_what_is_returned(xp):
    problem = build_mla_problem([9, 0, 40], num_heads=5, xp=xp)
    expected = attend(problem)
    alone = problem.call(mla_decode)
    out, lse = problem.call(mla_decode, return_lse=True)
    assert type(alone) is type(out) is type(lse) is xp.ndarray
    assert (out.dtype, lse.dtype) == (problem.q.dtype, np.float32)
    assert bits(alone) == bits(out)
    assert_right(out, lse, expected, problem.dtype)
    given_out, given_lse = xp.zeros_like(out), xp.zeros_like(lse)
    assert problem.call(mla_decode, out=given_out, lse=given_lse) is given_out  # lse is written all the same
    assert bits(given_out) == bits(out)
    assert bits(given_lse) == bits(lse)


@pytest.mark.parametrize(
    ("kv_lens", "qo_lens"),
    [([], None), ([], []), ([0], None), ([0, 0, 0], None), ([5, 70], [0, 0]), ([0, 5], [3, 0]), ([1], [1])],
)
@pytest.mark.parametrize("dense", [False, True])
def test_little_or_nothing(xp, kv_lens, qo_lens, dense):
    problem = to_backend(build_mla_problem(kv_lens, qo_lens=qo_lens, dense=dense), xp)
    for query in QUERIES.values():
        check(problem, decode=query)
    out, lse = problem.call(mla_decode, return_lse=True)
    assert out.shape == problem.out_shape
    assert lse.shape == problem.q.shape[:2]
    if not sum(kv_lens):
        assert not to_host(out).any()  # exactly 0
        assert np.isneginf(to_host(lse)).all()


@pytest.mark.parametrize("query", QUERIES)
def test_tokens_of_nobody(xp, query):
    """A batch padded for a graph has more tokens than its offsets say; what they hold must not matter."""
    problem = build_mla_problem([9, 5, 0, 40], qo_lens=[2, 3, 1, 7], num_heads=5, xp=xp)
    num_tokens = len(problem.q)
    padding = xp.full((3, *problem.q.shape[1:]), 0x7FFF, np.uint16)  # NaN
    padded_q = xp.concatenate([problem.q.view(np.uint16), padding]).view(problem.q.dtype)
    out, lse = problem.replace(q=padded_q).call(QUERIES[query], return_lse=True)
    assert out.shape == (num_tokens + 3, 5, 512)
    assert_right(out[:num_tokens], lse[:num_tokens], attend(problem), problem.dtype)


def test_fixed_splits_change_nothing_on_numpy():
    problem = build_mla_problem([0, 63, 64, 200], qo_lens=[1, 2, 3, 0], **SMALL)
    out = problem.call(mla_decode)
    for size in (64, np.int64(128)):
        assert bits(problem.call(mla_decode, fixed_split_size=size)) == bits(out)


def test_the_cache_is_only_read():
    problem = build_mla_problem(LENS, **SMALL)
    for a in (*problem.bases, problem.q):
        a.flags.writeable = False
    check(problem)


@pytest.mark.parametrize("kv_len", [20, 3000])  # in one part, in several
@pytest.mark.parametrize("part_of_row", ["ckv", "kpe"])
def test_nan_in_a_visible_key_is_not_hidden(xp, part_of_row, kv_len):
    problem = build_mla_problem([kv_len, kv_len], page_size=4, num_heads=3, dtype="float16", xp=xp)
    pages = problem.ckv_pages if part_of_row == "ckv" else problem.kpe_pages
    pages[int(problem.kv_indices[0]), 1, 7] = math.nan
    out, lse = (to_host(x) for x in problem.call(mla_decode, return_lse=True))
    assert np.isnan(out[0]).all()  # a logit is NaN, and with it all weights
    assert np.isnan(lse[0]).all()
    assert np.isfinite(out[1]).all()
    assert np.isfinite(lse[1]).all()


def test_sm_scale_is_required():
    problem = build_mla_problem([9], **SMALL)
    with pytest.raises(
        TypeError, match=r"mla_decode\(\) missing 1 required keyword-only argument: 'sm_scale'"
    ):
        mla_decode(problem.q, problem.cache, problem.pages)


# -- folding a layer's weights --


def test_folded_attention_is_multi_head_attention():
    """One step of a DeepSeek layer, as `mla_decode` computes it and as the paper defines it; these are equal.

    DeepSeek-V2 (arXiv:2405.04434), section 2.1. A token's cache row is a latent vector `ckv` of 512 numbers and a
    rotated key part `kpe` of 64. Each head would expand them to a key and a value of its own::

        k[h] = concat(W_uk[h] @ ckv, kpe)     128 + 64 numbers
        v[h] = W_uv[h] @ ckv                  128 numbers

    Instead of expanding every row of the cache, fold the weights into the one new query and into the result::

        q[h] . k[h] = q_nope[h] . (W_uk[h] @ ckv) + q_kpe[h] . kpe = (W_uk[h].T @ q_nope[h]) . ckv + q_kpe[h] . kpe
        sum_j w[j] v[h, j] = W_uv[h] @ sum_j w[j] ckv[j]
    """
    num_heads, nope_dim, kpe_dim, value_dim, ckv_dim = 4, 128, 64, 128, 512
    sm_scale = 1 / math.sqrt(nope_dim + kpe_dim)  # of a head's key before folding, not of 512 + 64
    rope = Rope(interleaved=True)
    rng = np.random.default_rng(0)

    def randn(*shape):
        return rng.standard_normal(shape, np.float32)

    w_uk = randn(num_heads, nope_dim, ckv_dim) / math.sqrt(ckv_dim)
    w_uv = randn(num_heads, value_dim, ckv_dim) / math.sqrt(ckv_dim)

    # Prompts of 5 and of 37 tokens are in the cache already ...
    cache = PagedMLACache.allocate(num_pages=8, page_size=16, dtype="float32")
    allocator = PageAllocator(num_pages=8, page_size=16)
    seqs = [allocator.alloc(n) for n in (5, 37)]
    prompts = [(randn(n, ckv_dim), randn(n, kpe_dim)) for n in (5, 37)]
    ckv, kpe = (np.concatenate(parts) for parts in zip(*prompts, strict=True))
    mla_append(ckv, kpe, cache, allocator.page_table(seqs), qo_indptr=i4(0, 5, 42), rope=rope)

    # ... and each request has one new token: its row, and its query for each head.
    new_ckv, new_kpe = randn(2, ckv_dim), randn(2, kpe_dim)
    q_nope, q_kpe = randn(2, num_heads, nope_dim), randn(2, num_heads, kpe_dim)

    # Folded: rows are appended as they are, and all heads share them.
    for seq in seqs:
        allocator.extend(seq)
    pages = allocator.page_table(seqs)
    q_kpe_rotated = mla_append(new_ckv, new_kpe, cache, pages, rope=rope, q_kpe=q_kpe)
    q_ckv = np.einsum("bhn,hnc->bhc", q_nope, w_uk)
    latent = mla_decode((q_ckv, q_kpe_rotated), cache, pages, sm_scale=sm_scale)
    out = np.einsum("bhc,hvc->bhv", latent, w_uv)

    # Expanded: plain multi-head attention over every head's own keys and values.
    for b, (ckv, kpe) in enumerate(prompts):
        ckv, kpe = np.concatenate([ckv, new_ckv[b : b + 1]]), np.concatenate([kpe, new_kpe[b : b + 1]])
        positions = np.arange(len(ckv))
        kpe = rotate_as_complex_numbers(kpe[:, None], positions, rope)[:, 0]  # shared by all heads
        q_rotated = rotate_as_complex_numbers(q_kpe[b : b + 1], positions[-1:], rope)[0]
        for h in range(num_heads):
            keys = np.concatenate([ckv @ w_uk[h].T, kpe], axis=-1)
            values = ckv @ w_uv[h].T
            weights = np.exp(keys @ np.concatenate([q_nope[b, h], q_rotated[h]]) * sm_scale)
            assert_close(out[b, h], weights @ values / weights.sum(), 1e-5)


# -- mla_append --

ROPES = {
    "none": None,
    "interleaved": Rope(interleaved=True),
    "half-split": Rope(theta=1e6),
    "partial": Rope(rotary_dim=32, interleaved=True, scale=4.0),
}
Q_MODES = ("", "new", "out", "in-place")


def new_rows(problem, seed=1):
    """Random latent rows of the problem's new tokens, as ckv and kpe side by side, on the host."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((len(problem.q), problem.head_dim)).astype(problem.q.dtype)


def check_append(problem, rope, *, q_mode="new", validate=False):
    """Rows land in their slots, and no bit changes beside; `q_mode` as `Q_MODES`: whose array the queries go to.

    Tokens of `problem.q` past its offsets belong to nobody.
    """
    xp, ckv_dim = problem.xp, problem.ckv_dim
    host = to_backend(problem, np)
    before = [base.copy() for base in map(to_host, problem.bases)]
    rows = new_rows(host)
    on_device = xp.array(rows)
    q = xp.array(host.q)
    given: dict[str, Any] = {}
    if q_mode:
        given["q_kpe"] = q[..., ckv_dim:]
    if q_mode == "out":
        guard = Guarded((*q.shape[:2], q.shape[2] - ckv_dim), q.dtype, xp)
        given["q_kpe_out"] = guard.array
    elif q_mode == "in-place":
        given["q_kpe_out"] = given["q_kpe"]
    result = mla_append(
        on_device[:, :ckv_dim], on_device[:, ckv_dim:], problem.cache, problem.pages, qo_indptr=problem.qo_indptr,
        rope=rope, validate=validate, **given,
    )  # fmt: skip

    offsets = range(len(host.kv_lens) + 1) if host.qo_indptr is None else host.qo_indptr
    rotated_q = host.q[..., ckv_dim:].astype(np.float64)
    after = host.replace(bases=tuple(to_host(base).copy() for base in problem.bases))
    old = host.replace(bases=tuple(before))
    for b, kv_len in enumerate(host.kv_lens):
        row = host.kv_indices[b] if host.kv_indptr is None else host.kv_indices[host.kv_indptr[b] :]
        for token in range(offsets[b], offsets[b + 1]):
            position = int(kv_len) - int(offsets[b + 1]) + token
            rotated_q[token] = rotate_as_complex_numbers(rotated_q[token][None], [position], rope)[0]
            if position < 0:
                continue
            place = row[position // host.page_size], position % host.page_size
            kpe = rotate_as_complex_numbers(rows[None, token, None, ckv_dim:], [position], rope)[0, 0]
            assert bits(after.ckv_pages[place]) == bits(rows[token, :ckv_dim]), (
                "ckv must be copied bit by bit"
            )
            assert_rounded(after.kpe_pages[place], kpe, problem.dtype, "kpe")
            for pages, restored in ((after.ckv_pages, old.ckv_pages), (after.kpe_pages, old.kpe_pages)):
                pages[place] = restored[place]
    # With what was there put back into the new tokens' slots, not a bit may differ, padding and NaN included.
    assert [bits(base) for base in after.bases] == [bits(base) for base in before]

    used = int(offsets[-1])
    if q_mode:
        assert type(result) is xp.ndarray
        assert result.dtype == q.dtype
        assert_rounded(result[:used], rotated_q[:used], problem.dtype, "q_kpe")
        assert "q_kpe_out" not in given or result is given["q_kpe_out"]
    else:
        assert result is None
    if q_mode == "out":
        guard.assert_intact()
    if q_mode == "in-place":
        assert bits(q[..., :ckv_dim]) == bits(host.q[..., :ckv_dim])
        assert bits(q[used:]) == bits(host.q[used:]), "queries of nobody"
    else:
        assert bits(q) == bits(host.q)


@pytest.mark.parametrize("q_mode", Q_MODES)
@pytest.mark.parametrize("rope", ROPES)
def test_append(xp, rope, q_mode):
    """Requests without new tokens, with nothing else, and with more of them than their length."""
    kinds = itertools.cycle(itertools.product((False, True), MLA_STORAGES))
    pages = itertools.cycle((1, 16, 3, 64))
    dtypes = itertools.cycle(DTYPES if xp is np else ("bfloat16", "float16"))
    for qo_lens in (None, [0, 1, 2, 30, 97], [0, 0, 0, 0, 0], [2, 3, 20, 64, 100]):
        dense, storage = next(kinds)
        problem = build_mla_problem(
            LENS, qo_lens=qo_lens, dense=dense, storage=storage, page_size=next(pages), dtype=next(dtypes),
            num_heads=5, xp=xp,
        )  # fmt: skip
        check_append(problem, ROPES[rope], q_mode=q_mode, validate=True)


@pytest.mark.parametrize("storage", MLA_STORAGES)
def test_append_of_other_dimensions(xp, storage):
    for dims in ((32, 8), (6, 2), (512, 128)):
        ckv_dim, kpe_dim = dims
        problem = build_mla_problem(
            [9, 4], num_heads=3, ckv_dim=ckv_dim, kpe_dim=kpe_dim, storage=storage, xp=xp
        )
        check_append(problem, Rope(interleaved=True), q_mode="in-place")


@pytest.mark.parametrize(
    ("kv_lens", "qo_lens"), [([], None), ([0, 0], None), ([], []), ([3], [0]), ([0], [2])]
)
def test_append_of_little_or_nothing(xp, kv_lens, qo_lens):
    for q_mode in Q_MODES:
        check_append(to_backend(build_mla_problem(kv_lens, qo_lens=qo_lens), xp), Rope(), q_mode=q_mode)


@pytest.mark.parametrize("q_mode", Q_MODES)
def test_append_leaves_tokens_of_nobody(xp, q_mode):
    """A batch padded for a graph has more tokens than its offsets say."""
    problem = build_mla_problem([9, 5], qo_lens=[2, 6], num_heads=3, dtype="float16", xp=xp)
    padded = problem.replace(q=xp.concatenate([problem.q, problem.q[:3]]))
    check_append(padded, Rope(interleaved=True), q_mode=q_mode)


@pytest.mark.parametrize("rope", ROPES)
def test_append_in_steps_then_decode(xp, rope):
    """A request's rows come in pieces, its newest queries are rotated in place: attention over all of its tokens."""
    steps = [[3, 37, 0, 16], [0, 1, 0, 1], [4, 2, 1, 1]]
    lens = np.sum(steps, axis=0)
    problem = build_mla_problem(
        lens, qo_lens=steps[-1], num_heads=5, page_size=8, dtype="float32" if xp is np else "float16", xp=xp
    )
    rng = np.random.default_rng(2)
    rows = [rng.standard_normal((n, 576)).astype(problem.q.dtype) for n in lens]
    host_q = to_host(problem.q).copy()
    done = np.zeros(4, int)
    for step in steps:
        new = xp.asarray(np.concatenate([r[d : d + n] for r, d, n in zip(rows, done, step, strict=True)]))
        done += step
        pages = PageTable(problem.kv_indptr, problem.kv_indices, xp.asarray(done.astype(np.int32)))
        qo_indptr = xp.asarray(np.concatenate([[0], np.cumsum(step)]).astype(np.int32))
        more = {}
        if step is steps[-1]:
            more = {"q_kpe": problem.q[..., 512:], "q_kpe_out": problem.q[..., 512:]}
        mla_append(
            new[:, :512], new[:, 512:], problem.cache, pages, qo_indptr=qo_indptr, rope=ROPES[rope], **more
        )
    out = to_host(problem.call(mla_decode)).astype(np.float64)

    token = 0
    for row, kv_len, qo_len in zip(rows, lens, steps[-1], strict=True):
        ckv = row[:, :512].astype(np.float64)
        kpe = rotate_as_complex_numbers(row[:, None, 512:], np.arange(kv_len), ROPES[rope])[:, 0]
        for position in range(kv_len - qo_len, kv_len):
            q_kpe = rotate_as_complex_numbers(host_q[token, None, :, 512:], [position], ROPES[rope])[0]
            seen = slice(position + 1)
            logits = host_q[token, :, :512].astype(np.float64) @ ckv[seen].T + q_kpe @ kpe[seen].T
            weights = np.exp(logits * problem.sm_scale)
            wanted = weights @ ckv[seen] / weights.sum(axis=1, keepdims=True)
            assert_close(out[token], wanted, 1e-5 if xp is np else 3e-3)
            token += 1


# -- fuzz --


@settings(max_examples=150, suppress_health_check=QUIET)
@given(
    mla_arguments(dims=((32, 8), (24, 16)), num_heads=(1, 2, 5, 16)), st.sampled_from(list(QUERIES)),
    FIXED_SPLIT_SIZES, st.booleans(),
)  # fmt: skip
@example({"kv_lens": [], "num_heads": 2}, "two-arrays", 64, True)
@example({"kv_lens": [0, 0], "qo_lens": [0, 3], "num_heads": 2}, "views", None, False)
def test_fuzz_decode(arguments, query, fixed_split_size, given_out):
    problem = build_mla_problem(**arguments)
    options = {"fixed_split_size": fixed_split_size, "validate": True}
    if given_out:
        check(problem, arguments, decode=QUERIES[query], **options)
    else:
        out, lse = problem.call(QUERIES[query], return_lse=True, **options)
        assert_right(out, lse, attend(problem), problem.dtype, arguments)


@settings(max_examples=100, suppress_health_check=QUIET)
@given(mla_arguments(dims=((32, 64),), num_heads=(1, 2, 5)), ropes(), st.sampled_from(Q_MODES))
def test_fuzz_append(arguments, rope, q_mode):
    check_append(build_mla_problem(**(arguments | {"window_left": -1})), rope, q_mode=q_mode, validate=True)


@pytest.mark.gpu
@settings(max_examples=100, suppress_health_check=QUIET)
@given(
    mla_arguments(dtypes=("float16", "bfloat16"), num_heads=(1, 5, 16), max_qo_len=40), ropes(),
    st.sampled_from(Q_MODES),
)  # fmt: skip
def test_fuzz_append_on_the_device(gpu, arguments, rope, q_mode):
    problem = build_mla_problem(**(arguments | {"window_left": -1}))
    check_append(to_backend(problem, gpu), rope, q_mode=q_mode, validate=True)


# -- PagedMLACache --


def pages_of(*shape, dtype=np.float16):
    return np.zeros(shape, dtype)


def test_cache_sizes():
    ckv, kpe = pages_of(7, 16, 512), pages_of(7, 16, 64)
    cache = PagedMLACache(ckv, kpe)
    assert cache.ckv_pages is ckv  # held, not copied
    assert cache.kpe_pages is kpe
    assert (cache.num_pages, cache.page_size, cache.ckv_dim, cache.kpe_dim) == (7, 16, 512, 64)
    assert cache.dtype == np.float16
    assert cache.nbytes == 7 * 16 * (512 + 64) * 2


def test_cache_of_one_array():
    pages = np.arange(3 * 4 * 40, dtype=np.float32).reshape(3, 4, 40)
    cache = PagedMLACache.from_concatenated(pages, ckv_dim=32)
    np.testing.assert_array_equal(cache.ckv_pages, pages[..., :32])
    np.testing.assert_array_equal(cache.kpe_pages, pages[..., 32:])
    cache.ckv_pages[0] = -1
    cache.kpe_pages[0] = -1
    assert (pages[0] == -1).all()
    assert PagedMLACache.from_concatenated(pages_of(2, 4, 576)).kpe_dim == 64


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", ml_dtypes.bfloat16, np.dtype("f2")])
def test_allocate(xp, dtype):
    cache = PagedMLACache.allocate(6, 16, ckv_dim=128, kpe_dim=32, dtype=dtype, xp=xp)
    assert type(cache.ckv_pages) is type(cache.kpe_pages) is xp.ndarray
    assert (cache.num_pages, cache.page_size, cache.ckv_dim, cache.kpe_dim) == (6, 16, 128, 32)
    assert cache.dtype == np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert cache.ckv_pages.strides == cache.kpe_pages.strides  # a token's row is in one piece
    assert not to_host(cache.ckv_pages).any()
    assert not to_host(cache.kpe_pages).any()


def test_allocate_gives_rows_of_deepseek_by_default():
    cache = PagedMLACache.allocate(1, 1)
    assert (cache.ckv_dim, cache.kpe_dim, cache.dtype) == (512, 64, ml_dtypes.bfloat16)


def test_cache_repr():
    assert repr(PagedMLACache.allocate(256, 64)) == (
        "PagedMLACache(256 pages x 64 tokens, ckv_dim=512, kpe_dim=64, bfloat16, numpy, 18 MiB)"
    )


def test_cache_is_immutable():
    cache = PagedMLACache.allocate(2, 4)
    for name in ("ckv_pages", "kpe_pages", "other"):
        with pytest.raises(AttributeError, match=f"PagedMLACache is immutable: cannot set {name}"):
            setattr(cache, name, cache.kpe_pages)
    with pytest.raises(AttributeError, match="cannot delete kpe_pages"):
        del cache.kpe_pages
    cache.ckv_pages[0] = 1  # its arrays are the caller's


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_cache_survives_copying(again):
    cache = PagedMLACache.allocate(2, 4, ckv_dim=8, kpe_dim=2)
    cache.ckv_pages[1], cache.kpe_pages[0] = 1, 2
    look((cache,))  # what was seen of the arrays is not copied
    other = again(cache)
    assert type(other) is PagedMLACache
    assert np.array_equal(other.ckv_pages, cache.ckv_pages)
    assert np.array_equal(other.kpe_pages, cache.kpe_pages)
    assert look((other,)) == look((PagedMLACache(other.ckv_pages, other.kpe_pages),))


@pytest.mark.parametrize("storage", MLA_STORAGES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_copy_pages(xp, storage, dtype):
    problem = build_mla_problem([100], page_size=8, storage=storage, dtype=dtype, poison=False, xp=xp)
    expected = [to_host(base).copy() for base in problem.bases]
    views = problem.replace(bases=tuple(expected))
    for pages in (views.ckv_pages, views.kpe_pages):
        pages[7], pages[0] = pages[2].copy(), pages[11].copy()
    problem.cache.copy_pages([2, 11], (7, 0))
    for base, wanted in zip(problem.bases, expected, strict=True):
        np.testing.assert_array_equal(to_host(base), wanted)


@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "message"),
    [
        ([1], [1, 2], "of one length"),
        ([1], [4], r"dst_ids must be within 0\.\.3, got 4"),
        ([-1], [2], r"src_ids must be within 0\.\.3, got -1"),
        ([0, 1], [2, 2], "distinct"),
        ([0, 1], [1, 2], "not among src_ids"),
    ],
)
def test_bad_copies(src_ids, dst_ids, message):
    cache = PagedMLACache.allocate(4, 1, ckv_dim=8, kpe_dim=2, dtype="float32")
    cache.ckv_pages[...] = cache.kpe_pages[..., :1] = before = np.arange(4, dtype="f4").reshape(4, 1, 1)
    with pytest.raises(ValueError, match=message):
        cache.copy_pages(src_ids, dst_ids)
    assert (cache.ckv_pages == before).all()
    assert (cache.kpe_pages[..., :1] == before).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PagedMLACache([1], pages_of(7, 16, 64)), TypeError, "ckv_pages must be an array .*got list"),
        (lambda: PagedMLACache(pages_of(7, 16, 512), None), TypeError, "kpe_pages must be an array .*got NoneType"),
        (
            lambda: PagedMLACache(pages_of(7, 16, 1, 512), pages_of(7, 16, 64)), ValueError,
            r"ckv_pages must have 3 dimensions \[num_pages, page_size, ckv_dim\], got 4",
        ),
        (
            lambda: PagedMLACache(pages_of(7, 16, 512), pages_of(7, 8, 64)), ValueError,
            r"kpe_pages must have shape \[num_pages, page_size, kpe_dim\] with .*page_size = 16 \(from ckv_pages\), "
            r"got \[7, 8, 64\]",
        ),
        (
            lambda: PagedMLACache(pages_of(7, 16, 512), pages_of(8, 16, 64)), ValueError,
            "kpe_pages must have shape .*num_pages = 7",
        ),
        (
            lambda: PagedMLACache(pages_of(7, 0, 512), pages_of(7, 0, 64)), ValueError,
            r"ckv_pages must have page_size and dimensions of at least 1, got shape \[7, 0, 512\]",
        ),
        (
            lambda: PagedMLACache(pages_of(7, 16, 512), pages_of(7, 16, 0)), ValueError,
            "kpe_pages must have page_size and dimensions of at least 1",
        ),
        (
            lambda: PagedMLACache(pages_of(7, 16, 512, dtype="f8"), pages_of(7, 16, 64)), TypeError,
            "ckv_pages must have dtype .*bfloat16.*got float64",
        ),
        (
            lambda: PagedMLACache(pages_of(7, 16, 512, dtype="u1"), pages_of(7, 16, 64, dtype="u1")), TypeError,
            "ckv_pages must have dtype .*got uint8",
        ),
        (
            lambda: PagedMLACache(pages_of(7, 16, 512), pages_of(7, 16, 64, dtype="f4")), TypeError,
            "kpe_pages must have the dtype of ckv_pages, float16, got float32",
        ),
        (
            lambda: PagedMLACache(pages_of(7, 16, 1024)[..., ::2], pages_of(7, 16, 64)), ValueError,
            "ckv_pages must be contiguous along its last axis",
        ),
        (
            lambda: PagedMLACache(pages_of(7, 16, 512), pages_of(7, 64, 16).swapaxes(1, 2)), ValueError,
            "kpe_pages must be contiguous along its last axis",
        ),
        (
            lambda: PagedMLACache.from_concatenated(pages_of(7, 16, 512)), ValueError,
            r"from_concatenated: ckv_dim must be within 1\.\.511, got 512",
        ),
        (
            lambda: PagedMLACache.from_concatenated(pages_of(7, 16, 576), ckv_dim=0), ValueError,
            r"ckv_dim must be within 1\.\.575, got 0",
        ),
        (
            lambda: PagedMLACache.from_concatenated(pages_of(7, 576)), ValueError,
            r"from_concatenated: pages must have 3 dimensions \[num_pages, page_size, row_dim\], got 2",
        ),
        (lambda: PagedMLACache.from_concatenated(None), TypeError, "pages must be an array .*got NoneType"),
        (
            lambda: PagedMLACache.allocate(1, 1, dtype="int8"), TypeError,
            "allocate: dtype must be one of .*, got int8",
        ),
        (lambda: PagedMLACache.allocate(1, 0), ValueError, "ckv_pages must have page_size"),
        (lambda: PagedMLACache.allocate(1, 1, kpe_dim=0), ValueError, "ckv_dim must be within"),
    ],
)  # fmt: skip
def test_bad_caches(make, error, message):
    with pytest.raises(error, match=f"^PagedMLACache.*{message}"):
        make()


# -- bad arguments of mla_decode --


def problem_of(xp, **changes):
    return build_mla_problem(
        [5, 0, 33], **({"num_heads": 4, "page_size": 8, "dtype": "float16"} | changes), xp=xp
    )


def table(xp, **changes):
    """The page table of the good arguments with some values replaced: ``kv_lens={2: -1}``."""
    good = problem_of(np, dense=changes.pop("dense", False))
    for name, values in changes.items():
        for place, value in values.items():
            getattr(good, name)[place] = value
    return to_backend(good, xp).pages


def ragged(*values):
    return lambda a: {"qo_indptr": a.xp.asarray(i4(*values)), "validate": True}


def validated(**changes):
    return lambda a: {"pages": table(a.xp, **changes), "validate": True}


def pair(a):
    """The good query as two arrays."""
    return a.q[..., :512], a.q[..., 512:]


def roomy(a, num_pages):
    """The page table of the good arguments with room for so many pages of 8 tokens a request."""
    return PageTable.from_dense(a.xp.zeros((3, num_pages), "i4"), a.pages.kv_lens)


def good_decode_arguments(xp):
    good = problem_of(xp)
    out, lse = (Guarded(shape, dtype, xp).array for shape, dtype in (((3, 4, 512), "f2"), ((3, 4), "f4")))
    return {"q": good.q, "cache": good.cache, "pages": good.pages, "sm_scale": 0.1, "out": out, "lse": lse}


def test_the_arguments_are_good_otherwise(xp):
    offsets = {"qo_indptr": xp.asarray(i4(0, 1, 1, 3))}
    for more in ({}, {"validate": True}, offsets, offsets | {"validate": True}):
        for as_pair in (False, True):
            good = good_decode_arguments(xp)
            if as_pair:
                good["q"] = [good["q"][..., :512], good["q"][..., 512:]]  # a list does too
            out = mla_decode(**good, **more)
            assert out is good["out"]
            assert np.isfinite(to_host(out)).all()


@cases(
    # Ranks and shapes
    ("q of rank 2", ValueError, r"q must have 3 dimensions \[batch, num_qo_heads, row_dim\], got 2",
     lambda a: {"q": a.q[0]}),
    ("q of rank 4", ValueError, "q must have 3 dimensions .*got 4", lambda a: {"q": a.q[None]}),
    ("q of another batch", ValueError, r"kv_lens must have shape \[batch\] with batch = 2 \(from q\)",
     lambda a: {"q": a.q[:2]}),
    ("q of ckv alone", ValueError, r"q must have shape .*row_dim = 576, got \[3, 4, 512\]",
     lambda a: {"q": a.q[..., :512]}),
    ("no query heads", ValueError, r"q must have at least one head, got shape \[3, 0, 576\]",
     lambda a: {"q": a.q[:, :0]}),
    ("no query heads in a pair", ValueError, "q must have at least one head",
     lambda a: {"q": tuple(x[:, :0] for x in pair(a))}),
    ("q_ckv of rank 2", ValueError, "q_ckv must have 3 dimensions .*got 2",
     lambda a: {"q": (a.q[0, :, :512], pair(a)[1])}),
    ("q_ckv of another dimension", ValueError, r"q_ckv must have shape .*ckv_dim = 512, got \[3, 4, 576\]",
     lambda a: {"q": (a.q, pair(a)[1])}),
    ("q_kpe of rank 2", ValueError, "q_kpe must have 3 dimensions .*got 2",
     lambda a: {"q": (pair(a)[0], a.q[:, 0, 512:])}),
    ("q_kpe of another dimension", ValueError, r"q_kpe must have shape .*kpe_dim = 64, got \[3, 4, 32\]",
     lambda a: {"q": (pair(a)[0], a.q[..., 544:])}),
    ("q_kpe of other heads", ValueError, r"q_kpe must have shape .*num_qo_heads = 4 \(from q_ckv\)",
     lambda a: {"q": (pair(a)[0], a.q[:, :2, 512:])}),
    ("q_kpe of other tokens", ValueError, r"q_kpe must have shape .*batch = 3 \(from q_ckv\)",
     lambda a: {"q": (pair(a)[0], a.q[:2, :, 512:])}),
    ("the pair the wrong way round", ValueError, "q_ckv must have shape", lambda a: {"q": pair(a)[::-1]}),
    ("out of rank 2", ValueError, "out must have 3 dimensions", lambda a: {"out": a.out[0]}),
    ("out as wide as q", ValueError, r"out must have shape .*ckv_dim = 512, got \[3, 4, 576\]",
     lambda a: {"out": a.zeros(3, 4, 576)}),
    ("out too short", ValueError, "out must have shape .*batch = 3", lambda a: {"out": a.out[:2]}),
    ("out of other heads", ValueError, "out must have shape .*num_qo_heads = 4", lambda a: {"out": a.out[:, :3]}),
    ("lse of rank 3", ValueError, "lse must have 2 dimensions", lambda a: {"lse": a.lse[..., None]}),
    ("lse transposed", ValueError, r"lse must have shape .*got \[4, 3\]", lambda a: {"lse": a.lse.T}),
    ("qo_indptr of rank 2", ValueError, "qo_indptr must have 1 dimensions",
     lambda a: {"qo_indptr": a.xp.zeros((1, 4), "i4")}),
    ("qo_indptr too short", ValueError, r"qo_indptr must have shape \[batch \+ 1\] with batch = 3",
     lambda a: {"qo_indptr": a.xp.zeros(3, "i4")}),
    # Dtypes
    ("q of another dtype", TypeError, "q must have the dtype of ckv_pages, float16, got float32",
     lambda a: {"q": a.q.astype("f4")}),
    ("q_ckv of another dtype", TypeError, "q_ckv must have the dtype of ckv_pages, float16, got float32",
     lambda a: {"q": (pair(a)[0].astype("f4"), pair(a)[1])}),
    ("q_kpe of another dtype", TypeError, "q_kpe must have the dtype of ckv_pages, float16, got float32",
     lambda a: {"q": (pair(a)[0], pair(a)[1].astype("f4"))}),
    ("q of integers", TypeError, "q must have the dtype of", lambda a: {"q": a.q.astype("i2")}),
    ("out of another dtype", TypeError, "out must have the dtype of ckv_pages, float16, got float32",
     lambda a: {"out": a.out.astype("f4")}),
    ("lse of float64", TypeError, "lse must have dtype float32, got float64", lambda a: {"lse": a.lse.astype("f8")}),
    ("lse of float16", TypeError, "lse must have dtype float32, got float16", lambda a: {"lse": a.lse.astype("f2")}),
    ("qo_indptr of int64", TypeError, "qo_indptr must have dtype int32, got int64",
     lambda a: {"qo_indptr": a.xp.arange(4)}),
    # Things that are not arrays
    ("q None", TypeError, "q must be an array .*got NoneType", lambda a: {"q": None}),
    ("q a number", TypeError, "q must be an array .*got float", lambda a: {"q": 1.0}),
    ("q of one", TypeError, r"q must be an array or a pair \(q_ckv, q_kpe\), got 1 arrays", lambda a: {"q": (a.q,)}),
    ("q of three", TypeError, "q must be an array or a pair .*got 3 arrays", lambda a: {"q": [a.q] * 3}),
    ("q of nothing", TypeError, "q must be an array or a pair .*got 0 arrays", lambda a: {"q": ()}),
    ("q a pair of lists", TypeError, "q must be an array .*got list", lambda a: {"q": ([1.0], [2.0])}),
    ("q_kpe None", TypeError, "q_kpe must be an array, got None", lambda a: {"q": (pair(a)[0], None)}),
    ("q_kpe a list", TypeError, "q_kpe must be an array .*got list", lambda a: {"q": (pair(a)[0], [1.0])}),
    ("q_kpe a page table", TypeError, "q_kpe must be an array .*got PageTable",
     lambda a: {"q": (pair(a)[0], a.pages)}),
    ("out a list", TypeError, "out must be an array", lambda a: {"out": [0.0]}),
    ("out a pair", TypeError, "out must be an array .*got tuple", lambda a: {"out": (a.out, a.lse)}),
    ("out a page table", TypeError, "out must be an array .*got PageTable", lambda a: {"out": a.pages}),
    ("lse a number", TypeError, "lse must be an array", lambda a: {"lse": 0.0}),
    ("workspace a pair", TypeError, "workspace must be an array .*got tuple",
     lambda a: {"workspace": (a.lse, a.lse)}),
    ("qo_indptr a list", TypeError, "qo_indptr must be an array", lambda a: {"qo_indptr": [0, 1, 2, 3]}),
    ("pages a tuple", TypeError, "pages must be a PageTable, got tuple", lambda a: {"pages": (1, 2, 3)}),
    ("cache a pair", TypeError, "cache must be a PagedMLACache, got tuple",
     lambda a: {"cache": (a.ckv_pages, a.kpe_pages)}),
    ("cache of keys and values", TypeError, "cache must be a PagedMLACache, got PagedKVCache",
     lambda a: {"cache": PagedKVCache(*[a.ckv_pages[:, :, None]] * 2)}),
    ("cache None", TypeError, "cache must be a PagedMLACache, got NoneType", lambda a: {"cache": None}),
    # Strides
    ("q not contiguous", ValueError, "q must be contiguous along its last axis",
     lambda a: {"q": a.zeros(3, 4, 1152)[..., ::2]}),
    ("q_ckv not contiguous", ValueError, "q_ckv must be contiguous along its last axis",
     lambda a: {"q": (a.zeros(3, 4, 1024)[..., ::2], pair(a)[1])}),
    ("q_kpe not contiguous", ValueError, "q_kpe must be contiguous along its last axis",
     lambda a: {"q": (pair(a)[0], a.zeros(3, 64, 4).swapaxes(1, 2))}),
    ("out not contiguous", ValueError, "out must be contiguous along its last axis",
     lambda a: {"out": a.zeros(3, 512, 4).swapaxes(1, 2)}),
    ("qo_indptr not contiguous", ValueError, "qo_indptr must be contiguous",
     lambda a: {"qo_indptr": a.xp.zeros(8, "i4")[::2]}),
    # Overlap
    ("out is part of q", ValueError, "out must not overlap q", lambda a: {"out": a.q[..., :512]}),
    ("out is q_ckv", ValueError, "out must not overlap q ",
     lambda a: (lambda b: {"q": (b, pair(a)[1]), "out": b})(a.zeros(3, 4, 512))),
    ("out overlaps q_ckv in part", ValueError, "out must not overlap q ",
     lambda a: (lambda b: {"q": (b[:3], pair(a)[1]), "out": b[2:]})(a.zeros(5, 4, 512))),
    ("out overlaps q_kpe", ValueError, "out must not overlap q_kpe",
     lambda a: (lambda b: {"q": (pair(a)[0], b[..., 64:128]), "out": b})(a.zeros(3, 4, 512))),
    ("out within ckv", ValueError, "out must not overlap ckv_pages", lambda a: {"out": a.ckv_pages[:3, :4]}),
    ("out within kpe", ValueError, "out must not overlap kpe_pages",
     lambda a: (lambda b: {"cache": PagedMLACache(a.zeros(9, 8, 512), b[..., :64]), "out": b[:3, :4]})(
         a.zeros(9, 8, 512))),
    ("lse within out", ValueError, "lse must not overlap out", lambda a: {"lse": part(a.out.view("f4"), 0, 3, 4)}),
    ("lse within q", ValueError, "lse must not overlap q", lambda a: {"lse": part(a.q.view("f4"), 0, 3, 4)}),
    ("lse within the table", ValueError, "lse must not overlap kv_indices",
     lambda a: (lambda b: {"lse": b.view("f4"), "pages": PageTable.from_dense(b, a.pages.kv_lens)})(
         a.xp.zeros((3, 4), "i4"))),
    # Numbers
    ("window_left of -2", ValueError, "window_left must be within -1.*got -2", lambda a: {"window_left": -2}),
    ("window_left of 2^31", ValueError, "window_left must be within", lambda a: {"window_left": 2**31}),
    ("window_left of 1.5", TypeError, "window_left must be an integer", lambda a: {"window_left": 1.5}),
    ("soft cap negative", ValueError, "logits_soft_cap must be at least 0, got -1", lambda a: {"logits_soft_cap": -1}),
    ("soft cap NaN", ValueError, "logits_soft_cap must be finite", lambda a: {"logits_soft_cap": np.nan}),
    ("sm_scale None", TypeError, "sm_scale must be a number, got NoneType", lambda a: {"sm_scale": None}),
    ("sm_scale NaN", ValueError, "sm_scale must be finite, got nan", lambda a: {"sm_scale": np.nan}),
    ("sm_scale infinite", ValueError, "sm_scale must be finite", lambda a: {"sm_scale": -np.inf}),
    ("sm_scale a string", TypeError, "sm_scale must be a number, got str", lambda a: {"sm_scale": "auto"}),
    ("fixed splits of 96", ValueError, "fixed_split_size must be a power of two of at least 64, got 96",
     lambda a: {"fixed_split_size": 96}),
    ("fixed splits of 32", ValueError, "fixed_split_size must be .*got 32", lambda a: {"fixed_split_size": 32}),
    ("fixed splits of 64.0", TypeError, "fixed_split_size must be an integer, got float",
     lambda a: {"fixed_split_size": 64.0}),
    ("pdl a number", TypeError, "pdl must be a bool, got int", lambda a: {"pdl": 1}),
    # Values, with validate
    ("length negative", ValueError, r"kv_lens must be at least 0, got kv_lens\[2\] = -1",
     validated(kv_lens={2: -1})),
    ("length too large", ValueError, r"kv_lens\[0\] = 17 needs 3 pages of 8 tokens, but its row .* has 2",
     validated(kv_lens={0: 17})),
    ("length too large for a dense row", ValueError, r"kv_lens\[2\] = 49 needs 7 pages .* has 6",
     validated(kv_lens={2: 49}, dense=True)),
    ("page id negative", ValueError, r"kv_indices must be within 0\.\.8, got -1 as page 0 of request 0",
     validated(kv_indices={0: -1})),
    ("page id too large", ValueError, r"kv_indices must be within 0\.\.8, got 9 as page 0 of request 0",
     validated(kv_indices={0: 9})),
    ("page id far too large", ValueError, f"got {POISON_PAGE} as page 4 of request 2",
     validated(kv_indices={(2, 4): POISON_PAGE}, dense=True)),
    ("kv_indptr decreasing", ValueError, "kv_indptr must not decrease", validated(kv_indptr={1: 4})),
    ("kv_indptr past the entries", ValueError, r"kv_indptr\[-1\] must be at most the number of entries, 9",
     validated(kv_indptr={3: 10})),
    ("qo_indptr past the tokens", ValueError, r"qo_indptr\[-1\] must be the number of tokens, 3, got 4",
     ragged(0, 1, 2, 4)),
    ("qo_indptr from 1", ValueError, r"qo_indptr\[0\] must be 0, got 1", ragged(1, 1, 2, 3)),
    ("qo_indptr decreasing", ValueError, "qo_indptr must not decrease", ragged(0, 4, 2, 3)),
)  # fmt: skip
def test_bad_decode(case, xp):
    check_bad(mla_decode, good_decode_arguments(xp), case, xp)


@cases(
    ("workspace", TypeError, "workspace is for CUDA arrays", lambda a: {"workspace": np.zeros(1 << 20, "u1")}),
    ("out read-only", ValueError, "out must be writable", lambda a: {"out": read_only(a.out)}),
    ("lse read-only", ValueError, "lse must be writable", lambda a: {"lse": read_only(a.lse)}),
)  # fmt: skip
def test_bad_decode_of_numpy_arrays(case):
    check_bad(mla_decode, good_decode_arguments(np), case, np)


@cases(
    ("q on the host", TypeError, "must be a (numpy|cupy) array", lambda a: {"q": to_host(a.q)}),
    ("q_kpe on the host", TypeError, "q_kpe must be a cupy array",
     lambda a: {"q": (pair(a)[0], to_host(pair(a)[1]))}),
    ("out on the host", TypeError, "out must be a cupy array", lambda a: {"out": to_host(a.out)}),
    ("kpe on the host", TypeError, "kpe_pages must be a cupy array",
     lambda a: {"cache": PagedMLACache(a.ckv_pages, to_host(a.kpe_pages))}),
    ("lengths on the host", TypeError, "kv_(lens|indptr|indices) must be a cupy array",
     lambda a: {"pages": problem_of(np).pages}),
    ("float32", TypeError, "q must have dtype float16 or bfloat16, got float32",
     lambda a: (lambda p: {"q": p.q, "cache": p.cache})(problem_of(a.xp, dtype="float32"))),
    ("ckv_dim of 256", ValueError, "cache must have ckv_dim = 512 and kpe_dim = 64 on a GPU, got 256 and 64",
     lambda a: (lambda p: {"q": p.q, "cache": p.cache})(problem_of(a.xp, ckv_dim=256))),
    ("kpe_dim of 32", ValueError, "cache must have .* on a GPU, got 512 and 32",
     lambda a: (lambda p: {"q": p.q, "cache": p.cache})(problem_of(a.xp, kpe_dim=32))),
    ("q misaligned", ValueError, "q must be aligned to 16 bytes", lambda a: {"q": misaligned(a.q)}),
    ("q_ckv misaligned", ValueError, "q must be aligned to 16 bytes",
     lambda a: {"q": (misaligned(pair(a)[0]), pair(a)[1])}),
    ("q_kpe misaligned", ValueError, "q_kpe must be aligned to 16 bytes",
     lambda a: {"q": (pair(a)[0], misaligned(pair(a)[1]))}),
    ("ckv misaligned", ValueError, "ckv_pages must be aligned to 16 bytes",
     lambda a: {"cache": PagedMLACache(misaligned(a.ckv_pages), a.kpe_pages)}),
    ("kpe misaligned", ValueError, "kpe_pages must be aligned to 16 bytes",
     lambda a: {"cache": PagedMLACache(a.ckv_pages, misaligned(a.kpe_pages))}),
    ("out misaligned", ValueError, "out must be aligned to 16 bytes", lambda a: {"out": misaligned(a.out)}),
    ("rows of ckv misaligned", ValueError, "ckv_pages must have strides that are multiples of 16",
     lambda a: {"cache": PagedMLACache(a.zeros(9, 8, 516)[..., :512], a.kpe_pages)}),
    ("rows of kpe misaligned", ValueError, "kpe_pages must have strides that are multiples of 16",
     lambda a: {"cache": PagedMLACache(a.ckv_pages, a.zeros(9, 8, 68)[..., :64])}),
    ("rows of q misaligned", ValueError, "q must have strides that are multiples of 16",
     lambda a: {"q": a.zeros(3, 4, 580)[..., :576]}),
    ("rows of q_kpe misaligned", ValueError, "q_kpe must have strides that are multiples of 16",
     lambda a: {"q": (pair(a)[0], a.zeros(3, 4, 68)[..., :64])}),
    ("rows of out misaligned", ValueError, "out must have strides that are multiples of 16",
     lambda a: {"out": a.zeros(3, 4, 516)[..., :512]}),
    ("workspace too small", ValueError, "workspace must be .*at least",
     lambda a: {"workspace": a.xp.zeros(1024, "u1")}),
    ("workspace of another dtype", TypeError, "workspace must have dtype uint8",
     lambda a: {"workspace": cupyattn.decode_workspace().view("f4")}),
    ("workspace of rank 2", ValueError, "workspace must", lambda a: {"workspace": cupyattn.decode_workspace()[None]}),
    ("workspace misaligned", ValueError, "workspace must be aligned to 16 bytes",
     lambda a: {"workspace": a.xp.zeros(1 << 27, "u1")[8:]}),
    ("workspace used for something else", ValueError, "workspace must be all zeros",
     lambda a: {"workspace": a.xp.ones(1 << 27, "u1"), "validate": True}),
    ("workspace too small for fixed splits", ValueError, "workspace must be .*see decode_workspace_bytes",
     lambda a: {"workspace": cupyattn.decode_workspace(), "fixed_split_size": 64, "pages": roomy(a, 1 << 14)}),
    ("too many fixed splits", ValueError, "fixed_split_size = 64 makes up to 196608 splits .*more than 131072",
     lambda a: {"fixed_split_size": 64, "pages": roomy(a, 1 << 19)}),
    ("workspace within out", ValueError, "workspace must not overlap out",
     lambda a: (lambda b: {"workspace": b, "out": part(b.view("f2"), 0, 3, 4, 512)})(
         a.xp.zeros(1 << 27, "u1"))),
)  # fmt: skip
def test_bad_decode_on_the_device(case, gpu):
    arguments = good_decode_arguments(gpu)
    arguments |= {"out": gpu.zeros((3, 4, 512), "f2"), "lse": gpu.zeros((3, 4), "f4")}
    check_bad(mla_decode, arguments, case, gpu)


def test_decode_workspace_bytes_of_numpy_arrays():
    good = problem_of(np)
    for q, pattern in (
        (good.q, "q must be a CuPy array, got ndarray"),
        ((good.q[..., :512], good.q[..., 512:]), "q must be a CuPy array, got ndarray"),
        ([1.0], "q must be an array .*got float"),
        ((), "q must be an array .*got tuple"),
    ):
        with pytest.raises(TypeError, match=f"^decode_workspace_bytes: {pattern}"):
            cupyattn.decode_workspace_bytes(q, good.cache, good.pages)


# -- bad arguments of mla_append --


def good_append_arguments(xp):
    good = problem_of(xp)
    rows = xp.asarray(new_rows(problem_of(np)))
    return {
        "ckv": rows[:, :512], "kpe": rows[:, 512:], "cache": good.cache, "pages": good.pages,
        "rope": Rope(interleaved=True), "q_kpe": good.q[..., 512:],
        "q_kpe_out": Guarded((3, 4, 64), "f2", xp).array,
    }  # fmt: skip


def test_the_arguments_of_append_are_good_otherwise(xp):
    good = good_append_arguments(xp)
    assert mla_append(**good, validate=True) is good["q_kpe_out"]
    assert np.isfinite(to_host(good["q_kpe_out"])).all()


@cases(
    ("ckv of rank 3", ValueError, r"ckv must have 2 dimensions \[batch, ckv_dim\], got 3",
     lambda a: {"ckv": a.ckv[:, None]}),
    ("ckv of another batch", ValueError, r"(kpe|kv_lens) must have shape .*batch = 2 \(from ckv\)",
     lambda a: {"ckv": a.ckv[:2]}),
    ("ckv of another dimension", ValueError, r"ckv must have shape .*ckv_dim = 512, got \[3, 256\]",
     lambda a: {"ckv": a.ckv[:, :256]}),
    ("kpe of rank 1", ValueError, "kpe must have 2 dimensions", lambda a: {"kpe": a.kpe[0]}),
    ("kpe of other tokens", ValueError, "kpe must have shape .*batch = 3", lambda a: {"kpe": a.kpe[:2]}),
    ("kpe of another dimension", ValueError, r"kpe must have shape .*kpe_dim = 64, got \[3, 32\]",
     lambda a: {"kpe": a.kpe[:, :32]}),
    ("q_kpe of rank 2", ValueError, "q_kpe must have 3 dimensions", lambda a: {"q_kpe": a.kpe}),
    ("q_kpe of other tokens", ValueError, "q_kpe must have shape", lambda a: {"q_kpe": a.q_kpe[:2]}),
    ("q_kpe of another dimension", ValueError, "q_kpe must have shape .*kpe_dim = 64",
     lambda a: {"q_kpe": a.q_kpe[..., :32]}),
    ("q_kpe_out of other heads", ValueError, r"q_kpe_out must have shape .*num_qo_heads = 4 \(from q_kpe\)",
     lambda a: {"q_kpe_out": a.q_kpe_out[:, :2]}),
    ("qo_indptr too short", ValueError, "qo_indptr must have shape", lambda a: {"qo_indptr": a.xp.zeros(2, "i4")}),
    ("ckv of another dtype", TypeError, "ckv must have the dtype of ckv_pages, float16, got float32",
     lambda a: {"ckv": a.ckv.astype("f4")}),
    ("kpe of another dtype", TypeError, "kpe must have the dtype of ckv_pages", lambda a: {"kpe": a.kpe.astype("f4")}),
    ("q_kpe of another dtype", TypeError, "q_kpe must have the dtype of ckv_pages",
     lambda a: {"q_kpe": a.q_kpe.astype("f4")}),
    ("q_kpe_out of another dtype", TypeError, "q_kpe_out must have the dtype of ckv_pages",
     lambda a: {"q_kpe_out": a.q_kpe_out.astype("f4")}),
    ("qo_indptr of int64", TypeError, "qo_indptr must have dtype int32, got int64",
     lambda a: {"qo_indptr": a.xp.arange(4)}),
    ("ckv a list", TypeError, "ckv must be an array .*got list", lambda a: {"ckv": [1.0]}),
    ("ckv a pair", TypeError, "ckv must be an array .*got tuple", lambda a: {"ckv": (a.ckv, a.kpe)}),
    ("kpe None", TypeError, "kpe must be an array .*got NoneType", lambda a: {"kpe": None}),
    ("q_kpe a pair", TypeError, "q_kpe must be an array .*got tuple", lambda a: {"q_kpe": (a.q_kpe,) * 2}),
    ("q_kpe_out a page table", TypeError, "q_kpe_out must be an array .*got PageTable",
     lambda a: {"q_kpe_out": a.pages}),
    ("qo_indptr a list", TypeError, "qo_indptr must be an array", lambda a: {"qo_indptr": [0, 1, 2, 3]}),
    ("pages an array", TypeError, "pages must be a PageTable, got", lambda a: {"pages": a.pages.kv_indices}),
    ("cache a pair", TypeError, "cache must be a PagedMLACache, got tuple",
     lambda a: {"cache": (a.ckv_pages, a.kpe_pages)}),
    ("cache of keys and values", TypeError, "cache must be a PagedMLACache, got PagedKVCache",
     lambda a: {"cache": PagedKVCache(*[a.ckv_pages[:, :, None]] * 2)}),
    ("rope a number", TypeError, "rope must be a Rope, got float", lambda a: {"rope": 10000.0}),
    ("rope too wide", ValueError, "rotary_dim must be even and at most head_dim = 64, got 128",
     lambda a: {"rope": Rope(rotary_dim=128)}),
    ("ckv not contiguous", ValueError, "ckv must be contiguous along its last axis",
     lambda a: {"ckv": a.zeros(3, 1024)[:, ::2]}),
    ("kpe not contiguous", ValueError, "kpe must be contiguous along its last axis",
     lambda a: {"kpe": a.zeros(64, 3).T}),
    ("q_kpe not contiguous", ValueError, "q_kpe must be contiguous along its last axis",
     lambda a: {"q_kpe": a.zeros(3, 4, 128)[..., ::2]}),
    ("q_kpe_out not contiguous", ValueError, "q_kpe_out must be contiguous along its last axis",
     lambda a: {"q_kpe_out": a.zeros(3, 64, 4).swapaxes(1, 2)}),
    ("qo_indptr not contiguous", ValueError, "qo_indptr must be contiguous",
     lambda a: {"qo_indptr": a.xp.zeros(8, "i4")[::2]}),
    ("q_kpe_out without q_kpe", ValueError, "q_kpe_out needs q_kpe, got None", lambda a: {"q_kpe": None}),
    ("q_kpe_out overlaps q_kpe in part", ValueError, "q_kpe_out must not overlap q_kpe",
     lambda a: (lambda b: {"q_kpe": b[:3], "q_kpe_out": b[1:]})(a.zeros(4, 4, 64))),
    ("q_kpe_out is q_kpe of other strides", ValueError, "q_kpe_out must not overlap q_kpe",
     lambda a: (lambda b: {"q_kpe": b[:3], "q_kpe_out": b[2::-1]})(a.zeros(4, 4, 64))),
    ("q_kpe_out within kpe", ValueError, "q_kpe_out must not overlap kpe_pages",
     lambda a: {"q_kpe_out": a.kpe_pages[:3, :4]}),
    ("q_kpe_out within ckv", ValueError, "q_kpe_out must not overlap ckv_pages",
     lambda a: {"q_kpe_out": a.ckv_pages[:3, :4, 64:128]}),
    ("q_kpe_out on new kpe", ValueError, "q_kpe_out must not overlap kpe ",
     lambda a: (lambda b: {"kpe": b[:, 1], "q_kpe_out": b})(a.zeros(3, 4, 64))),
    ("q_kpe_out on new ckv", ValueError, "q_kpe_out must not overlap ckv ",
     lambda a: (lambda b: {"ckv": b[:, 1], "q_kpe_out": b[..., :64]})(a.zeros(3, 4, 512))),
    ("ckv within the cache", ValueError, "ckv_pages must not overlap ckv ", lambda a: {"ckv": a.ckv_pages[0, :3]}),
    ("kpe within the cache", ValueError, "kpe_pages must not overlap kpe ", lambda a: {"kpe": a.kpe_pages[0, :3]}),
    ("q_kpe within the cache", ValueError, "kpe_pages must not overlap q_kpe",
     lambda a: {"q_kpe": a.kpe_pages[:3, :4]}),
    ("page id too large", ValueError, r"kv_indices must be within 0\.\.8, got 9", validated(kv_indices={0: 9})),
    ("page id negative", ValueError, "kv_indices must be within", validated(kv_indices={0: -1})),
    ("length negative", ValueError, "kv_lens must be at least 0", validated(kv_lens={2: -1})),
    ("length too large", ValueError, r"kv_lens\[0\] = 17 needs 3 pages", validated(kv_lens={0: 17})),
    ("qo_indptr short of the tokens", ValueError, r"qo_indptr\[-1\] must be the number of tokens, 3, got 2",
     ragged(0, 1, 2, 2)),
)  # fmt: skip
def test_bad_append(case, xp):
    check_bad(mla_append, good_append_arguments(xp), case, xp)


@pytest.mark.parametrize("name", ["ckv_pages", "kpe_pages", "q_kpe_out"])
def test_append_to_read_only_arrays(name):
    good = good_append_arguments(np)
    before = [bits(a) for a in (good["cache"].ckv_pages, good["cache"].kpe_pages, good["q_kpe_out"])]
    if name == "q_kpe_out":
        good[name] = read_only(good[name])
    else:
        parts = {part: getattr(good["cache"], part) for part in ("ckv_pages", "kpe_pages")}
        parts[name] = read_only(parts[name])
        good["cache"] = PagedMLACache(**parts)
    with pytest.raises(ValueError, match=f"^mla_append: {name} must be writable"):
        mla_append(**good)
    assert [bits(a) for a in (good["cache"].ckv_pages, good["cache"].kpe_pages, good["q_kpe_out"])] == before


@cases(
    ("ckv on the host", TypeError, "must be a (numpy|cupy) array", lambda a: {"ckv": to_host(a.ckv)}),
    ("kpe on the host", TypeError, "kpe must be a cupy array", lambda a: {"kpe": to_host(a.kpe)}),
    ("float32", TypeError, "ckv must have dtype float16 or bfloat16, got float32",
     lambda a: {"ckv": a.ckv.astype("f4"), "kpe": a.kpe.astype("f4"), "q_kpe": None, "q_kpe_out": None,
                "cache": problem_of(a.xp, dtype="float32").cache}),
    ("ckv_dim of 513", ValueError, "ckv_dim must be even and at most 512 on a GPU, got 513",
     lambda a: {"ckv": a.zeros(3, 513), "cache": PagedMLACache(a.zeros(9, 8, 513), a.zeros(9, 8, 64))}),
    ("ckv_dim of 576", ValueError, "ckv_dim must be even and at most 512 on a GPU, got 576",
     lambda a: {"ckv": a.zeros(3, 576), "cache": PagedMLACache(a.zeros(9, 8, 576), a.zeros(9, 8, 64))}),
)  # fmt: skip
def test_bad_append_on_the_device(case, gpu):
    check_bad(mla_append, good_append_arguments(gpu), case, gpu)


def test_arrays_on_two_devices(gpu):
    if gpu.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    here = good_decode_arguments(gpu)
    with gpu.cuda.Device(1):
        elsewhere = good_decode_arguments(gpu)
    with pytest.raises(ValueError, match="mla_decode: ckv_pages must be on device"):
        mla_decode(**(here | {"cache": elsewhere["cache"]}))
    with gpu.cuda.Device(0):
        out = mla_decode(**elsewhere)  # on the arrays' device, whatever the current one is
        assert out.device.id == 1


# -- torch and JAX --

PROBLEMS = {
    "csr": {"kv_lens": [0, 5, 300, 64], "dtype": "float16"},
    "dense": {"kv_lens": [3, 170], "dense": True, "dtype": "bfloat16", "storage": "mla-pair"},
    "ragged": {"kv_lens": [9, 40, 0], "qo_lens": [2, 9, 1], "window_left": 7, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_decode_of_a_framework(framework, name, validate):
    problem = build_mla_problem(**PROBLEMS[name], num_heads=5, poison_window=False)
    expected, expected_lse = oracle(problem)
    (q, cache, pages), options = arguments(framework, problem)
    parts = [framework.array(np.ascontiguousarray(a)) for a in (problem.q[..., :512], problem.q[..., 512:])]
    for query in (q, tuple(parts), parts):
        out, lse = mla_decode(query, cache, pages, **options, return_lse=True, validate=validate)
        assert out.dtype == q.dtype
        assert_close(framework.numpy(out), expected, TOLERANCE[problem.dtype])
        assert_close(framework.numpy(lse), expected_lse, 1e-3, "lse")
    alone = mla_decode(q, cache, pages, **options)
    assert framework.numpy(alone).tobytes() == framework.numpy(out).tobytes()
    split = mla_decode(q, cache, pages, **options, fixed_split_size=64)
    assert_close(framework.numpy(split), expected, TOLERANCE[problem.dtype])


def test_decode_workspace_bytes_of_a_framework(framework):
    problem = build_mla_problem([0, 5, 300, 64], dtype="float16")
    (q, cache, pages), _ = arguments(framework, problem)
    parts = tuple(
        framework.array(np.ascontiguousarray(a)) for a in (problem.q[..., :512], problem.q[..., 512:])
    )
    if framework.device == "cpu":
        for query in (q, parts):
            with pytest.raises(
                TypeError, match=r"^decode_workspace_bytes: q must be a CuPy array, got ndarray"
            ):
                cupyattn.decode_workspace_bytes(query, cache, pages, fixed_split_size=64)
        return
    import cupy

    native = to_backend(problem, cupy)
    expected = cupyattn.decode_workspace_bytes(native.q, native.cache, native.pages, fixed_split_size=64)
    for query in (q, parts):
        assert cupyattn.decode_workspace_bytes(query, cache, pages, fixed_split_size=64) == expected


def test_decode_writes_where_it_is_told(torch):
    """The cache and q are views of one tensor each, and so is out."""
    problem = build_mla_problem([70, 0, 130], num_heads=5, dtype="bfloat16")
    (q, _, pages), options = arguments(torch, problem)
    cache = PagedMLACache.from_concatenated(torch.array(problem.bases[0]))
    wide = torch.module.zeros((3, 7, 640), dtype=q.dtype, device=q.device)
    wide[:, :5, :576] = q
    out = torch.module.full((5, 3, 512), float("nan"), dtype=q.dtype, device=q.device).transpose(0, 1)
    lse = torch.module.full((3, 5), float("nan"), device=q.device)
    for query in (wide[:, :5, :576], (wide[:, :5, :512], wide[:, :5, 512:576])):
        result = mla_decode(query, cache, pages, **options, out=out, lse=lse, return_lse=True)
        assert result[0] is out
        assert result[1] is lse
        expected, expected_lse = oracle(problem)
        assert_close(torch.numpy(out), expected, TOLERANCE["bfloat16"])
        assert_close(torch.numpy(lse), expected_lse, 1e-3, "lse")
        out.fill_(float("nan"))
        lse.fill_(float("nan"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_append_of_torch(torch, dtype):
    """The cache is written where it lies, and equals what NumPy makes of it; queries rotate in place in q."""
    problem = build_mla_problem([5, 33, 0], qo_lens=[2, 30, 0], num_heads=3, dtype=dtype, poison=False)
    rows = new_rows(problem)
    (q, _, pages), options = arguments(torch, problem)
    base = torch.array(problem.bases[0])
    cache = PagedMLACache.from_concatenated(base)
    new = torch.array(rows)
    common = {"qo_indptr": options["qo_indptr"], "rope": Rope(theta=1e6, interleaved=True)}
    q_kpe = q[..., 512:]
    rotated = mla_append(new[:, :512], new[:, 512:], cache, pages, **common, q_kpe=q_kpe)

    host = common | {"qo_indptr": problem.qo_indptr}
    wanted = mla_append(
        rows[:, :512], rows[:, 512:], problem.cache, problem.pages, **host, q_kpe=problem.q[..., 512:]
    )
    tolerance = {"float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    assert_close(torch.numpy(rotated), wanted.astype(np.float64), tolerance, "q_kpe")
    assert_close(torch.numpy(base), problem.bases[0].astype(np.float64), tolerance, "cache")
    np.testing.assert_array_equal(torch.numpy(base)[..., :512], problem.bases[0][..., :512])

    assert (
        mla_append(new[:, :512], new[:, 512:], cache, pages, **common, q_kpe=q_kpe, q_kpe_out=q_kpe) is q_kpe
    )
    np.testing.assert_array_equal(torch.numpy(q[..., 512:]), torch.numpy(rotated))
    np.testing.assert_array_equal(torch.numpy(q[..., :512]), problem.q[..., :512])
    assert mla_append(new[:, :512], new[:, 512:], cache, pages, **common) is None


def test_jax_arrays_are_immutable(framework):
    if framework.name != "jax":
        pytest.skip("JAX alone has immutable arrays")
    problem = build_mla_problem([9], num_heads=2, dtype="float16")
    (q, cache, pages), options = arguments(framework, problem)
    for name in ("out", "lse"):
        with pytest.raises(
            TypeError, match=rf"^mla_decode: {name} cannot be a JAX array: they are immutable"
        ):
            mla_decode(q, cache, pages, **options, **{name: q})
    ckv, kpe = (framework.array(np.zeros((1, n), np.float16)) for n in (512, 64))
    with pytest.raises(TypeError, match=r"^mla_append: cache cannot be of JAX arrays, which are immutable"):
        mla_append(ckv, kpe, cache, pages)


def test_mixed_frameworks_raise(torch):
    problem = problem_of(np)
    (q, cache, pages), options = arguments(torch, problem)
    ckv, kpe = torch.array(np.zeros((3, 512), np.float16)), np.zeros((3, 64), np.float16)
    for call in (
        lambda: mla_decode(q, problem.cache, pages, **options),
        lambda: mla_decode(problem.q, cache, problem.pages, sm_scale=1.0),
        lambda: mla_decode((q[..., :512], problem.q[..., 512:]), cache, pages, **options),
        lambda: mla_decode((problem.q[..., :512], q[..., 512:]), problem.cache, problem.pages, sm_scale=1.0),
        lambda: mla_decode(q, cache, problem.pages, **options),
        lambda: mla_append(ckv, kpe, cache, pages),
        lambda: mla_append(ckv, ckv[:, :64], problem.cache, pages),
        lambda: mla_append(kpe, kpe, cache, pages),
    ):
        with pytest.raises(
            TypeError, match=r"^mla_(decode|append): .*(framework|must be a numpy array|a cupy array)"
        ):
            call()


def test_get_array_module(xp):
    cache = PagedMLACache.allocate(1, 1, dtype="float16", xp=xp)
    assert cupyattn.get_array_module(cache, np.zeros(1)) is xp


def test_decode_refuses_a_cache_of_latent_rows():
    mla, ordinary = problem_of(np), build_problem([5, 0, 33], dtype="float16")
    with pytest.raises(TypeError, match=r"^decode: cache must be a PagedKVCache or a pair"):
        cupyattn.decode(ordinary.q, mla.cache, ordinary.pages)
