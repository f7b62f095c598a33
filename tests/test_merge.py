"""The merge of attention states in NumPy: its algebra, its numbers, and that it undoes a split of keys."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from problems import DTYPES, Guarded, assert_close, assert_state, build_problem, to_host

import cupyattn
from cupyattn import reference


def random_states(*shape, head_dim=8, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((*shape, head_dim)), rng.standard_normal(shape) * scale


def merge_in_longdouble(out, lse):
    """Along axis 0, pair by pair with `logaddexp`, in 80 bits."""
    out, lse = out.astype(np.longdouble), lse.astype(np.longdouble)
    total, mixed = lse[0], out[0]
    for o, s in zip(out[1:], lse[1:], strict=True):
        both = np.logaddexp(total, s)
        mixed = np.exp(total - both)[..., None] * mixed + np.exp(s - both)[..., None] * o
        total = both
    return mixed, total


@pytest.mark.parametrize("n", [1, 2, 3, 17, 300])
@pytest.mark.parametrize("scale", [1.0, 30.0, 5000.0])
def test_against_longdouble(n, scale):
    out, lse = random_states(n, 5, 3, seed=n, scale=scale)
    merged, total = reference.merge_states(out, lse)
    expected, expected_total = merge_in_longdouble(out, lse)
    assert merged.dtype == total.dtype == np.float64
    np.testing.assert_allclose(merged, expected.astype(float), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(total, expected_total.astype(float), rtol=1e-14, atol=1e-14)


# Subnormal differences aside, any finite lse and empty states among them.
LSE = st.one_of(st.just(-np.inf), st.floats(-1e4, 1e4))


@given(hnp.arrays(np.float64, st.integers(3, 6), elements=LSE), st.integers(0, 2**16), st.data())
def test_associative_and_commutative(lse, seed, data):
    out, _ = random_states(len(lse), seed=seed)
    at_once = reference.merge_states(out, lse)
    cut = data.draw(st.integers(1, len(lse) - 1))
    head, tail = reference.merge_states(out[:cut], lse[:cut]), reference.merge_states(out[cut:], lse[cut:])
    nested = reference.merge_states(np.stack([head[0], tail[0]]), np.stack([head[1], tail[1]]))
    order = data.draw(st.permutations(range(len(lse))))
    shuffled = reference.merge_states(out[order], lse[order])
    for other in (nested, shuffled):
        assert_close(other[0], at_once[0], 1e-12)
        assert_close(other[1], at_once[1], 1e-12, "lse")


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e300, 0.0])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_empty_state_is_the_identity(garbage, place):
    out, lse = random_states(2, 4, seed=1)
    expected = reference.merge_states(out, lse)
    empty_out = np.insert(out, place, np.full((4, 8), garbage), axis=0)
    empty_lse = np.insert(lse, place, np.full(4, -np.inf), axis=0)
    for actual, wanted in zip(reference.merge_states(empty_out, empty_lse), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_one_state_is_itself():
    out, lse = random_states(1, 4, scale=1e4)
    merged, total = reference.merge_states(out, lse)
    np.testing.assert_array_equal(merged, out[0])
    np.testing.assert_array_equal(total, lse[0])


@pytest.mark.parametrize("n", [0, 1, 4])
def test_nothing_but_empty_states(n):
    with np.errstate(all="raise"):
        merged, total = reference.merge_states(np.full((n, 3, 8), np.nan), np.full((n, 3), -np.inf))
    np.testing.assert_array_equal(merged, np.zeros((3, 8)))
    np.testing.assert_array_equal(total, np.full(3, -np.inf))


def test_empty_rows_beside_others():
    out, lse = random_states(2, 3)
    lse[0, 0] = lse[:, 1] = -np.inf
    merged, total = reference.merge_states(out, lse)
    np.testing.assert_array_equal(merged[0], out[1, 0])
    np.testing.assert_array_equal(merged[1], 0.0)
    assert np.isneginf(total).tolist() == [False, True, False]


@pytest.mark.parametrize("top", [1e4, -1e4])
def test_far_from_zero(top):
    out, _ = random_states(2, 3)
    merged, total = reference.merge_states(out, np.full((2, 3), top))
    np.testing.assert_allclose(merged, out.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(total, top + np.log(2), rtol=1e-14)


def test_nan_in_a_state_with_keys_is_not_hidden():
    out, lse = random_states(2, 3)
    out[0, 1] = np.nan
    assert np.isnan(reference.merge_states(out, lse)[0]).any(axis=-1).tolist() == [False, True, False]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_axes(axis):
    out, lse = random_states(4, 5, 6)
    first = axis % 3
    expected = reference.merge_states(np.moveaxis(out, first, 0), np.moveaxis(lse, first, 0))
    for actual, wanted in zip(reference.merge_states(out, lse, axis), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-14)


@pytest.mark.parametrize("shape", [(2, 0), (2, 0, 5), (3,), (2, 3, 4, 5)])
def test_shapes(shape):
    out, lse = random_states(*shape)
    merged, total = reference.merge_states(out, lse)
    assert merged.shape == (*shape[1:], 8)
    assert total.shape == shape[1:]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_low_precision_states(dtype):
    out, lse = random_states(3, 4)
    out = out.astype(np.float32).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    merged, total = reference.merge_states(out, lse.astype(np.float32))
    expected, expected_total = merge_in_longdouble(out.astype(np.float64), lse.astype(np.float32))
    np.testing.assert_allclose(merged, expected.astype(float), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(total, expected_total.astype(float), rtol=1e-13)


@pytest.mark.parametrize("cuts", [[], [16], [16, 48, 80], list(range(16, 97, 16))])
def test_splitting_the_keys_changes_nothing(cuts):
    """Attention over whole pages of a request, run by run, merges into attention over all of them."""
    problem = build_problem([97], page_size=16)
    expected = problem.call(reference.decode)
    states = []
    for begin, end in itertools.pairwise([0, *cuts, 97]):
        part = problem.replace(kv_indices=problem.kv_indices[begin // 16 :])
        part = part.replace(kv_lens=np.array([end - begin], "i4"))
        states.append(part.call(reference.decode))
    merged = reference.merge_states(*(np.stack(parts) for parts in zip(*states, strict=True)))
    for actual, wanted in zip(merged, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-14)


# The public call, on every array module


def check_public(xp, out, lse, dtype="float16", **options):
    """`merge_states` of arrays on `xp` against the reference."""
    out, lse = out.astype(DTYPES[dtype]), lse.astype(np.float32)
    expected = reference.merge_states(out, lse, options.get("axis", 0))
    merged, total = cupyattn.merge_states(xp.asarray(out), xp.asarray(lse), **options)
    assert type(merged) is type(total) is xp.ndarray
    assert (merged.dtype, total.dtype) == (out.dtype, np.float32)
    assert_state(merged, total, expected, dtype)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_public_axes(xp, axis, dtype):
    out, lse = random_states(4, 5, 6, head_dim=64, scale=3)
    lse[1, 2] = lse[:, 3, 4] = -np.inf
    out[np.isneginf(lse)] = np.nan
    check_public(xp, out, lse, dtype, axis=axis)


SHAPES = [(2, 40, 128, 512), (7, 3, 5, 80), (1, 3, 2, 64), (300, 2, 4, 8), (2, 9, 1), (2, 0, 8, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_public_shapes(xp, shape):
    check_public(xp, *random_states(*shape[:-1], head_dim=shape[-1], scale=3))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("container", [list, tuple])
def test_public_sequences(xp, n, container):
    out, lse = random_states(n, 3, 4, head_dim=64)
    out, lse = out.astype(np.float32), lse.astype(np.float32)
    expected = reference.merge_states(out, lse)
    merged, total = cupyattn.merge_states(container(map(xp.asarray, out)), container(map(xp.asarray, lse)))
    assert_close(merged, expected[0], 1e-5)
    assert_close(total, expected[1], 1e-5, "lse")


@pytest.mark.parametrize("target", [0, 1, "new"])
@pytest.mark.parametrize("stacked", [False, True])
def test_public_into(xp, target, stacked):
    """Into arrays of one's own, or into one of the states themselves."""
    out, lse = random_states(2, 30, 8, head_dim=128)
    out, lse = out.astype(np.float16), lse.astype(np.float32)
    expected = reference.merge_states(out, lse)
    out, lse = xp.asarray(out), xp.asarray(lse)
    states = (out, lse) if stacked else ((out[0], out[1]), (lse[0], lse[1]))
    guards = [Guarded(out.shape[1:], out.dtype, xp), Guarded(lse.shape[1:], lse.dtype, xp)]
    into = tuple(guard.array for guard in guards) if target == "new" else (out[target], lse[target])
    other = None if target == "new" else (out[1 - target].copy(), lse[1 - target].copy())
    merged = cupyattn.merge_states(*states, into=into)
    assert merged[0] is into[0]
    assert merged[1] is into[1]
    assert_state(*into, expected, "float16")
    for guard in guards:
        guard.assert_intact()
    if other is not None:
        np.testing.assert_array_equal(to_host(out[1 - target]), to_host(other[0]))
        np.testing.assert_array_equal(to_host(lse[1 - target]), to_host(other[1]))


def test_public_strides(xp):
    out, lse = random_states(3, 8, 4, head_dim=128)
    out, lse = xp.asarray(out.astype(np.float32)), xp.asarray(lse.astype(np.float32))
    views = out[:, ::2, :, :64], lse[:, ::2]
    expected = reference.merge_states(*map(to_host, views))
    assert_state(*cupyattn.merge_states(*views), expected, "float32", lse_tolerance=1e-5)
