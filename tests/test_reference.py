"""The specification against an oracle that lists each query's keys, and its properties."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from problems import (
    DTYPES,
    POISON_PAGE,
    STORAGES,
    assert_close,
    assert_state,
    build_problem,
    oracle,
    rotate_as_complex_numbers,
)

from cupyattn import reference
from cupyattn.cache import PagedKVCache, PageTable
from cupyattn.rope import Rope

LENS = [0, 1, 17, 64, 97]


def check(problem, **more):
    out, lse = problem.call(reference.decode, **more)
    assert out.dtype == lse.dtype == np.float64
    assert_state(out, lse, oracle(problem), "float64", lse_tolerance=1e-12)
    return out, lse


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("group_size", [1, 4, 5, 7, 8, 16])
def test_groups_and_head_dims(group_size, head_dim):
    check(build_problem(LENS, group_size=group_size, head_dim=head_dim))


@pytest.mark.parametrize("page_size", [1, 5, 8, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("layout", "storage"), list(itertools.product(["NHD", "HND"], STORAGES)))
def test_layouts(layout, storage, dense, dtype, page_size):
    check(build_problem(LENS, layout=layout, storage=storage, dense=dense, dtype=dtype, page_size=page_size))


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8])
def test_head_counts(num_kv_heads):
    check(build_problem(LENS, num_kv_heads=num_kv_heads))


@pytest.mark.parametrize("window_left", [0, 1, 15, 16, 17, 96, 1000])
@pytest.mark.parametrize("qo_lens", [None, [3, 1, 4, 0, 20]])
def test_window(window_left, qo_lens):
    check(build_problem(LENS, window_left=window_left, qo_lens=qo_lens))


@pytest.mark.parametrize("logits_soft_cap", [0.5, 30.0])
@pytest.mark.parametrize("qo_lens", [None, [3, 1, 4, 0, 20]])
def test_soft_cap(logits_soft_cap, qo_lens):
    check(build_problem(LENS, logits_soft_cap=logits_soft_cap, qo_lens=qo_lens, sm_scale=1.0))


@pytest.mark.parametrize(
    "qo_lens",
    [[0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [0, 1, 17, 64, 97], [5, 4, 20, 70, 100]],
    ids=["some", "none", "all of the cache", "more than the cache"],
)
def test_several_queries(qo_lens):
    out, lse = check(build_problem(LENS, qo_lens=qo_lens))
    offsets = np.cumsum([0, *qo_lens])
    for b, n in enumerate(qo_lens):
        blind = slice(offsets[b], offsets[b] + max(0, n - LENS[b]))  # queries at negative positions
        assert (out[blind] == 0).all()
        assert np.isneginf(lse[blind]).all()


def test_several_queries_are_as_many_calls():
    problem = build_problem([40, 9], qo_lens=[4, 2], poison=False)
    out, lse = problem.call(reference.decode)
    for b, i, row in [(0, 0, 0), (0, 3, 3), (1, 0, 4), (1, 1, 5)]:
        kv_lens = problem.kv_lens.copy()
        kv_lens[b] += 1 + i - (4, 2)[b]
        alone = problem.replace(q=np.stack([problem.q[row]] * 2), kv_lens=kv_lens, qo_indptr=None)
        alone_out, alone_lse = alone.call(reference.decode)
        assert_close(alone_out[b], out[row], 1e-13)
        assert_close(alone_lse[b], lse[row], 1e-13)


@pytest.mark.parametrize("at_once", [1, 1000, 20_000])
@pytest.mark.parametrize("window_left", [-1, 7])
def test_long_prompts_are_taken_in_runs(monkeypatch, at_once, window_left):
    monkeypatch.setattr(reference, "_LOGITS_AT_ONCE", at_once)
    check(build_problem(LENS, qo_lens=[5, 4, 17, 50, 90], window_left=window_left))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("qo_lens", [None, []])
def test_batch_of_none(dense, qo_lens):
    out, lse = check(build_problem([], dense=dense, qo_lens=qo_lens))
    assert out.shape == (0, 8, 64)
    assert lse.shape == (0, 8)


@pytest.mark.parametrize("dense", [False, True])
def test_length_zero(dense):
    out, lse = build_problem([0, 0], dense=dense).call(reference.decode)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


def test_one_key_is_its_value():
    problem = build_problem([1, 70], window_left=0, group_size=3)
    out, lse = problem.call(reference.decode)
    k_nhd, v_nhd = problem.writable()
    for b, length in enumerate([1, 70]):
        page = problem.kv_indices[problem.kv_indptr[b] + (length - 1) // 16]
        key, value = (a[page, (length - 1) % 16].astype(np.float64) for a in (k_nhd, v_nhd))
        np.testing.assert_array_equal(out[b], value.repeat(3, axis=0))
        logits = (problem.q[b].astype(np.float64) * problem.sm_scale * key.repeat(3, axis=0)).sum(-1)
        np.testing.assert_allclose(lse[b], logits, rtol=1e-12)


def test_equal_keys_average_their_values():
    cache = PagedKVCache.allocate(3, 4, 1, 64, dtype="float32")
    cache.v_pages[[2, 0]] = np.arange(8).reshape(2, 4, 1, 1)
    pages = PageTable(np.array([0, 2], "i4"), np.array([2, 0], "i4"), np.array([7], "i4"))
    out, lse = reference.decode(np.ones((1, 2, 64), "f4"), cache, pages, sm_scale=1.0)
    np.testing.assert_allclose(out, 3.0, rtol=1e-15)
    np.testing.assert_allclose(lse, math.log(7), rtol=1e-15)


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_huge_logits_do_not_overflow(scale):
    problem = build_problem(LENS, sm_scale=scale)
    with np.errstate(over="raise", invalid="raise"):
        check(problem)


def test_the_builder_poisons_what_is_not_to_be_read():
    problem = build_problem([20, 0], window_left=2, page_size=4)
    k_nhd, _ = problem.writable()
    assert np.isnan(k_nhd.astype(np.float32)).all(axis=(2, 3)).sum() == k_nhd.shape[0] * 4 - 3
    assert problem.kv_indices.tolist()[:4] == [POISON_PAGE] * 4  # tokens 0 to 15; 17 to 19 are in the window
    assert problem.kv_indices.tolist()[5:] == [POISON_PAGE] * 2


def test_the_cache_is_only_read():
    problem = build_problem(LENS)
    for base in problem.bases:
        base.flags.writeable = False
    problem.q.flags.writeable = False
    check(problem)


def test_nan_in_a_visible_key_is_not_hidden():
    problem = build_problem([20, 20], page_size=4)
    k_nhd, _ = problem.writable()
    k_nhd[problem.kv_indices[0], 1, 0] = np.nan
    out, lse = problem.call(reference.decode)
    assert np.isnan(out[0, :4]).all()
    assert np.isnan(lse[0, :4]).all()
    assert np.isfinite(out[0, 4:]).all()
    assert np.isfinite(out[1]).all()


def test_large_page_ids_and_entries():
    """Ids are used as they are, and offsets are computed in 64 bits: a cache of 2^33 elements, untouched."""
    page_size, heads, head_dim = 64, 8, 128
    num_pages = 2**33 // (page_size * heads * head_dim)
    cache = PagedKVCache.allocate(
        num_pages, page_size, heads, head_dim, dtype="float16"
    )  # zeros are not resident
    cache.v_pages[-1] = 1
    pages = PageTable.from_dense(np.array([[num_pages - 1, POISON_PAGE]], "i4"), np.array([3], "i4"))
    out, _ = reference.decode(np.ones((1, 8, head_dim), "f2"), cache, pages, sm_scale=1.0)
    np.testing.assert_array_equal(out, 1.0)


# Rope


ROPES = [
    Rope(),
    Rope(interleaved=True),
    Rope(theta=1e6, rotary_dim=32),
    Rope(theta=500.0, rotary_dim=20, interleaved=True),
    Rope(scale=8.0),
    Rope(inv_freq=(1.0, 0.25, 0.01)),
    Rope(inv_freq=(1.0, 0.25, 0.01), interleaved=True, scale=2.0),
]


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_apply_rope(rope, dtype):
    if rope.inv_freq is not None:
        rope_dim = Rope(rotary_dim=6, inv_freq=rope.inv_freq, interleaved=rope.interleaved, scale=rope.scale)
    else:
        rope_dim = rope
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 3, 64)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    before = x.copy()
    positions = np.array([0, 1, 7, 1000, 131071, -2])
    rotated = reference.apply_rope(x, positions, rope)
    np.testing.assert_allclose(rotated, rotate_as_complex_numbers(x, positions, rope_dim), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(rotated[0], x[0].astype(np.float64))
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=-1), np.linalg.norm(x.astype(float), axis=-1))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_depends_on_distance_only(interleaved):
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, 1, 1, 64))
    rope = Rope(interleaved=interleaved)

    def logit(q_position, k_position):
        q_rotated = reference.apply_rope(q, np.array([q_position]), rope)
        return (q_rotated * reference.apply_rope(k, np.array([k_position]), rope)).sum()

    assert logit(17, 5) == pytest.approx(logit(512, 500), abs=1e-10)
    assert logit(17, 5) != pytest.approx(logit(17, 6), abs=1e-3)


def test_rope_conventions_differ_by_a_permutation():
    x = np.random.default_rng(3).standard_normal((4, 2, 8))
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # interleaved place of each half-split dimension
    positions = np.arange(4)
    half = reference.apply_rope(x, positions, Rope())
    interleaved = reference.apply_rope(x[..., order], positions, Rope(interleaved=True))
    np.testing.assert_allclose(interleaved, half[..., order], rtol=1e-14)


@pytest.mark.parametrize(
    "arguments",
    [
        {"theta": 0.0},
        {"theta": math.inf},
        {"scale": -1.0},
        {"scale": math.nan},
        {"rotary_dim": 7},
        {"rotary_dim": 0},
        {"rotary_dim": -2},
        {"inv_freq": [[1.0]]},
        {"inv_freq": [1.0, math.nan]},
        {"rotary_dim": 8, "inv_freq": [1.0]},
    ],
    ids=str,
)
def test_bad_ropes(arguments):
    with pytest.raises(ValueError, match=f"Rope: {list(arguments)[-1]} must"):
        Rope(**arguments)


def test_rope_must_fit_the_head():
    with pytest.raises(ValueError, match="rotary_dim must be even and at most head_dim = 64, got 128"):
        Rope(rotary_dim=128).inv_freq_array(64)
    with pytest.raises(ValueError, match="rotary_dim"):
        Rope(inv_freq=np.ones(33)).inv_freq_array(64)
    with pytest.raises(ValueError, match="rotary_dim"):
        Rope().inv_freq_array(63)


def test_ropes_are_dictionary_keys():
    assert {Rope(inv_freq=np.array([1.0, 0.5])): 1}[Rope(inv_freq=[1.0, 0.5])] == 1
    assert Rope() != Rope(interleaved=True)


# Append


def token_place(problem, b, position):
    """Page and slot of a token."""
    table = problem.kv_indices
    row = table[b] if problem.kv_indptr is None else table[problem.kv_indptr[b] :]
    return row[position // problem.cache.page_size], position % problem.cache.page_size


@pytest.mark.parametrize(
    "qo_lens",
    [None, [0, 1, 2, 30, 97], [0, 0, 0, 0, 0], [2, 3, 20, 64, 100]],
    ids=["one", "some", "none", "too many"],
)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("layout", "storage"), [("NHD", "separate"), ("HND", "interleaved"), ("NHD", "strided")]
)
@pytest.mark.parametrize("rope", [None, Rope(), Rope(interleaved=True, rotary_dim=32)], ids=str)
def test_append(qo_lens, dense, layout, storage, rope):
    problem = build_problem(LENS, qo_lens=qo_lens, dense=dense, layout=layout, storage=storage, page_size=8)
    expected = problem.replace(bases=tuple(base.copy() for base in problem.bases))
    k, v = np.random.default_rng(5).standard_normal((2, len(problem.q), 2, 64)).astype(np.float16)
    reference.append(k, v, problem.cache, problem.pages, qo_indptr=problem.qo_indptr, rope=rope)

    k_nhd, v_nhd = expected.writable()
    token = 0
    for b, n in enumerate([1] * 5 if qo_lens is None else qo_lens):
        for position in range(LENS[b] - n, LENS[b]):
            if position >= 0:
                place = token_place(problem, b, position)
                rotated = (
                    k[token] if rope is None else rotate_as_complex_numbers(k[[token]], [position], rope)[0]
                )
                k_nhd[place] = rotated.astype(ml_dtypes.bfloat16)
                v_nhd[place] = v[token].astype(ml_dtypes.bfloat16)
            token += 1
    for actual, wanted in zip(problem.bases, expected.bases, strict=True):
        # As bits, so that the NaN around the tokens count: nothing else may have changed.
        np.testing.assert_array_equal(actual.view(np.uint16), wanted.view(np.uint16))


def test_append_in_steps_is_append_at_once():
    at_once, in_steps = (build_problem([50, 3, 17], qo_lens=[50, 3, 17], poison=False) for _ in range(2))
    k, v = np.random.default_rng(6).standard_normal((2, 70, 2, 64))
    reference.append(k, v, at_once.cache, at_once.pages, qo_indptr=at_once.qo_indptr, rope=Rope())
    starts = at_once.qo_indptr[:-1]
    for step in range(50):
        lens = np.minimum(at_once.kv_lens, step + 1)
        pages = PageTable(in_steps.kv_indptr, in_steps.kv_indices, lens)
        rows = starts + lens - 1  # the shorter ones write their last token again and again
        reference.append(k[rows], v[rows], in_steps.cache, pages, rope=Rope())
    for a, b in zip(at_once.bases, in_steps.bases, strict=True):
        np.testing.assert_array_equal(a, b)


def test_append_then_decode_with_one_table():
    """What a model does per step: the table counts the new tokens, and serves both calls."""
    problem = build_problem([4, 30], qo_lens=[4, 5])
    k, v = np.random.default_rng(7).standard_normal((2, 9, 2, 64))
    reference.append(k, v, problem.cache, problem.pages, qo_indptr=problem.qo_indptr)
    check(problem)
