"""`merge_states` on the device: any axis, size and dtype, pairs, in place; empty states hold NaN."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from device import capture, poison, unused_stream
from problems import DTYPES, Guarded, build_problem, to_host

import cupyattn
from cupyattn import reference

# One rounding to the dtype; float32 arithmetic on top, with exponents of up to some tens.
TOLERANCE = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0}
ARITHMETIC = 1e-5


def random_states(xp, lse_shape, head_dim, dtype, *, scale=3.0, empty=0.25, seed=0):
    """Host and device arrays. A share `empty` of the states is empty: lse = -inf, out = NaN."""
    rng = np.random.default_rng(seed)
    lse = (rng.standard_normal(lse_shape) * scale).astype(np.float32)
    out = rng.standard_normal((*lse_shape, head_dim), dtype=np.float32).astype(DTYPES[dtype])
    hole = rng.random(lse_shape) < empty
    lse[hole], out[hole] = -np.inf, np.nan
    return (out, lse), (xp.array(out), xp.array(lse))


def assert_merged(actual, expected, dtype):
    out, lse = (to_host(a) for a in actual)
    wanted, wanted_lse = expected
    assert out.shape == wanted.shape
    assert lse.shape == wanted_lse.shape
    assert lse.dtype == np.float32
    assert str(out.dtype) == dtype
    empty = np.isneginf(wanted_lse)
    assert (np.isneginf(lse) == empty).all()
    assert not out[empty].any()  # exactly 0
    np.testing.assert_allclose(lse[~empty], wanted_lse[~empty], rtol=1e-6, atol=1e-5)
    error = np.abs(out.astype(np.float64) - wanted)
    bad = ~(error <= TOLERANCE[dtype] * np.abs(wanted) + ARITHMETIC)
    assert not bad.any(), f"{bad.sum()} of {bad.size} wrong, by up to {np.nanmax(error)}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_axes(xp, axis, dtype):
    for shape, head_dim in (((3, 5, 7), 64), ((2, 1, 9), 5), ((1, 4, 1), 8)):
        host, states = random_states(xp, shape, head_dim, dtype)
        assert_merged(cupyattn.merge_states(*states, axis), reference.merge_states(*host, axis), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_head_dim(xp, dtype):
    for head_dim in (*range(1, 34), 63, 64, 65, 80, 100, 127, 128, 129, 255, 256, 257, 384, 511, 512):
        host, states = random_states(xp, (3, 6), head_dim, dtype, seed=head_dim)
        assert_merged(cupyattn.merge_states(*states), reference.merge_states(*host), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 31, 32, 33, 64, 65, 70])
def test_any_number_of_states(xp, n, dtype):
    for axis, empty in itertools.product((0, 1), (0.0, 0.5, 1.0)):
        shape = (n, 11) if axis == 0 else (11, n)
        host, states = random_states(xp, shape, 128, dtype, empty=empty)
        assert_merged(cupyattn.merge_states(*states, axis), reference.merge_states(*host, axis), dtype)


@pytest.mark.parametrize("axis", [0, 1])
def test_128_heads_of_512(xp, axis):
    tokens = 64 if xp is not np else 3
    host, states = random_states(xp, (5, tokens, 128) if axis == 0 else (tokens, 5, 128), 512, "bfloat16")
    assert_merged(cupyattn.merge_states(*states, axis), reference.merge_states(*host, axis), "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_magnitudes(xp, scale, dtype):
    host, states = random_states(xp, (9, 50), 64, dtype, scale=scale)
    assert_merged(cupyattn.merge_states(*states), reference.merge_states(*host), dtype)


@pytest.mark.parametrize("top", [1e4, -1e4])
def test_far_from_zero(xp, top):
    """Differences of lse are exact in float32; their common offset must not cost precision."""
    (out, lse), _ = random_states(xp, (4, 50), 64, "float32", empty=0)
    lse = (lse + np.float32(top)).astype(np.float32)
    merged = cupyattn.merge_states(xp.asarray(out), xp.asarray(lse))
    assert_merged(merged, reference.merge_states(out, lse), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_sequences(xp, n, dtype):
    for head_dim in (64, 7):
        host, (out, lse) = random_states(xp, (n, 4, 9), head_dim, dtype)
        outs, lses = [xp.array(a) for a in out], [xp.array(a) for a in lse]
        assert_merged(cupyattn.merge_states(outs, lses), reference.merge_states(*host), dtype)
        assert_merged(cupyattn.merge_states(tuple(outs), tuple(lses)), reference.merge_states(*host), dtype)


def test_one_row(xp):
    """Arrays without any axis but head_dim: lse is 0-d."""
    host, (out, lse) = random_states(xp, (2,), 64, "float32", empty=0)
    merged = cupyattn.merge_states(
        [xp.array(out[0]), xp.array(out[1])], [lse[0].reshape(()), lse[1].reshape(())]
    )
    assert_merged(merged, reference.merge_states(*host), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 33])
def test_into(xp, head_dim, dtype):
    """Into other arrays, guarded; then into each of the states themselves."""
    host, (out, lse) = random_states(xp, (3, 20, 4), head_dim, dtype)
    expected = reference.merge_states(*host)
    guards = Guarded((20, 4, head_dim), out.dtype, xp), Guarded((20, 4), np.float32, xp)
    into = tuple(guard.array for guard in guards)
    merged = cupyattn.merge_states(out, lse, into=into)
    assert merged[0] is into[0]
    assert merged[1] is into[1]
    assert_merged(merged, expected, dtype)
    for guard in guards:
        guard.assert_intact()
    for i in range(3):
        states, sums = out.copy(), lse.copy()
        merged = cupyattn.merge_states(states, sums, into=(states[i], sums[i]))
        assert_merged(merged, expected, dtype)
        for j in {0, 1, 2} - {i}:  # the others are as they were
            assert to_host(states[j]).tobytes() == to_host(out[j]).tobytes()
            assert to_host(sums[j]).tobytes() == to_host(lse[j]).tobytes()


@pytest.mark.parametrize("i", [0, 1])
def test_pairs_in_place(xp, i):
    host, (out, lse) = random_states(xp, (2, 33), 128, "bfloat16")
    outs, lses = [xp.array(a) for a in out], [xp.array(a) for a in lse]
    merged = cupyattn.merge_states(outs, lses, into=(outs[i], lses[i]))
    assert merged[0] is outs[i]
    assert_merged(merged, reference.merge_states(*host), "bfloat16")


@pytest.mark.parametrize("axis", [1, 2])
def test_into_a_state_between_other_axes(xp, axis):
    """A state along an inner axis is not contiguous."""
    host, (out, lse) = random_states(xp, (4, 3, 5), 16, "float16")
    pick = (slice(None),) * axis + (1,)
    merged = cupyattn.merge_states(out, lse, axis, into=(out[pick], lse[pick]))
    assert_merged(merged, reference.merge_states(*host, axis), "float16")


def test_strided_inputs(xp):
    host, (out, lse) = random_states(xp, (6, 10, 4), 48, "bfloat16")
    expected = reference.merge_states(host[0][::2, ::-1, :, :40], host[1][::2, ::-1])
    assert_merged(cupyattn.merge_states(out[::2, ::-1, :, :40], lse[::2, ::-1]), expected, "bfloat16")
    expected = reference.merge_states(host[0].swapaxes(0, 1), host[1].swapaxes(0, 1))
    assert_merged(cupyattn.merge_states(out.swapaxes(0, 1), lse.swapaxes(0, 1)), expected, "bfloat16")


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_unaligned_inputs(xp, offset):
    """Rows of 16 bytes at addresses that are not: no vector loads."""
    host, (out, lse) = random_states(xp, (3, 7), 64, "float16")
    flat = xp.empty(out.size + 8, out.dtype)
    moved = flat[offset : offset + out.size].reshape(out.shape)
    moved[...] = out
    assert_merged(cupyattn.merge_states(moved, lse), reference.merge_states(*host), "float16")


@pytest.mark.parametrize("shape", [(2, 0), (2, 0, 5), (3, 1)])
def test_no_rows_and_no_head_dim(xp, shape):
    for head_dim in (8, 0):
        (out, lse) = xp.zeros((*shape, head_dim), np.float16), xp.zeros(shape, np.float32)
        merged, total = cupyattn.merge_states(out, lse)
        assert merged.shape == (*shape[1:], head_dim)
        assert total.shape == shape[1:]
        assert np.allclose(to_host(total), np.log(shape[0]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decode_over_parts_of_the_keys(xp, dtype):
    """Attention over runs of pages, merged, is attention over all of them."""
    problem = build_problem(
        [640] * 3, page_size=16, group_size=4, dense=True, dtype=dtype, poison=False, xp=xp
    )
    whole, whole_lse = problem.call(cupyattn.decode, return_lse=True)
    outs, lses = [], []
    for begin, end in itertools.pairwise((0, 16, 160, 160, 640)):
        table = xp.ascontiguousarray(problem.kv_indices[:, begin // 16 :])
        part = problem.replace(kv_indices=table, kv_lens=xp.full(3, end - begin, np.int32))
        out, lse = part.call(cupyattn.decode, return_lse=True)
        outs.append(out)
        lses.append(lse)
    merged, total = cupyattn.merge_states(outs, lses)
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3}[dtype]
    np.testing.assert_allclose(to_host(merged).astype("f4"), to_host(whole).astype("f4"), atol=tolerance)
    np.testing.assert_allclose(to_host(total), to_host(whole_lse), atol=1e-4)


def test_graph(xp):
    _, (out, lse) = random_states(xp, (4, 30), 64, "bfloat16")
    into = xp.empty((30, 64), out.dtype), xp.empty(30, np.float32)
    cupyattn.merge_states(out, lse, into=into)  # loads the kernel
    stream = unused_stream(xp)
    if xp is not np:
        xp.cuda.Device().synchronize()
    replay = capture(xp, stream, lambda: cupyattn.merge_states(out, lse, into=into), "Global")
    for seed in range(10):
        host, _ = random_states(np, (4, 30), 64, "bfloat16", seed=seed)
        with stream:
            out[...], lse[...] = xp.asarray(host[0]), xp.asarray(host[1])
            for a in into:
                poison(a)
            replay()
            assert_merged(into, reference.merge_states(*host), "bfloat16")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_into_without_rows_or_head_dim(xp, shape):
    rows, head_dim = shape
    out, lse = xp.zeros((2, rows, head_dim), np.float16), xp.zeros((2, rows), np.float32)
    into = (xp.zeros((rows, head_dim), np.float16), xp.zeros(rows, np.float32))
    merged, total = cupyattn.merge_states(out, lse, into=into)
    assert merged is into[0]
    assert total is into[1]
    assert np.allclose(to_host(total), np.log(2.0))
