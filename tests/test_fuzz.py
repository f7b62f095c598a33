"""Random problems through the public calls, against the oracle and against a cache filled by hand.

On a GPU some of the same problems run through the kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from problems import (
    Guarded,
    assert_close,
    assert_state,
    build_problem,
    oracle,
    to_backend,
    to_host,
)
from strategies import FIXED_SPLIT_SIZES, problem_arguments, ropes

import cupyattn
from cupyattn import reference

GPU_CASES = 200  # here by way of all calls and checks; test_decode_gpu.py runs thousands through the kernel
GPU_DTYPES = ("float16", "bfloat16")
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def check_decode(arguments, xp, given_out=False, as_pair=False, fixed_split_size=None):
    """One problem through `decode`, into poisoned and guarded arrays or new ones."""
    problem = build_problem(**arguments)
    expected = oracle(problem)
    problem = to_backend(problem, xp)
    cache = (problem.k_pages, problem.v_pages) if as_pair and problem.layout == "NHD" else problem.cache
    options = problem.options | {"return_lse": True, "validate": True, "fixed_split_size": fixed_split_size}
    if given_out:
        guards = [Guarded(problem.q.shape, problem.q.dtype, xp), Guarded(problem.q.shape[:2], np.float32, xp)]
        options |= {"out": guards[0].array, "lse": guards[1].array}
    out, lse = cupyattn.decode(problem.q, cache, problem.pages, **options)
    assert type(out) is type(lse) is xp.ndarray
    assert (out.dtype, lse.dtype) == (problem.q.dtype, np.float32)
    if given_out:
        assert out is options["out"]
        assert lse is options["lse"]
        for guard in guards:
            guard.assert_intact()
    assert_state(out, lse, expected, arguments["dtype"])
    empty = np.isneginf(to_host(lse))
    assert not to_host(out)[empty].any()  # exactly 0


def check_append(arguments, rope, xp, rotate_q, in_place):
    """One problem's tokens through `append`; but for their slots no bit may change, not that of a NaN."""
    problem = build_problem(**(arguments | {"window_left": -1}))
    rng = np.random.default_rng(arguments["seed"])
    k, v = (
        rng.standard_normal((len(problem.q), problem.num_kv_heads, problem.head_dim)).astype(problem.q.dtype)
        for _ in range(2)
    )
    moved = to_backend(problem, xp)
    q = xp.array(moved.q) if rotate_q else None
    q_out = q if in_place else None
    before = [to_host(base).copy() for base in moved.bases]
    result = cupyattn.append(
        xp.asarray(k), xp.asarray(v), moved.cache, moved.pages,
        qo_indptr=moved.qo_indptr, rope=rope, q=q, q_out=q_out, validate=True,
    )  # fmt: skip

    request, positions = reference.token_positions(problem.kv_lens, problem.qo_indptr)
    tolerance = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-6}[arguments["dtype"]]  # an ulp or two

    def rotated(x):
        return x.astype(np.float64) if rope is None else reference.apply_rope(x, positions, rope)

    if rotate_q:
        assert result.dtype == moved.q.dtype
        assert_close(result, rotated(problem.q), tolerance, "q")
        assert not in_place or result is q_out
    else:
        assert result is None

    # Lift the new tokens out of the cache, then put back what was there: it must be as it was.
    after = problem.replace(bases=tuple(to_host(base).copy() for base in moved.bases))
    held = positions >= 0
    column, slot = np.divmod(positions[held], problem.cache.page_size)
    if problem.kv_indptr is None:
        place = problem.kv_indices[request[held], column], slot
    else:
        place = problem.kv_indices[problem.kv_indptr[request[held]] + column], slot
    old = problem.replace(bases=tuple(before))
    for actual, restored, wanted, exact in zip(
        after.writable(), old.writable(), (rotated(k), v), (rope is None, True), strict=True
    ):
        assert_close(actual[place], wanted[held].astype(np.float64), 0.0 if exact else tolerance, "cache")
        actual[place] = restored[place]
    for base, wanted in zip(after.bases, before, strict=True):
        np.testing.assert_array_equal(base.view(np.uint8), wanted.view(np.uint8))


@settings(max_examples=400, suppress_health_check=QUIET)
@given(problem_arguments(), st.booleans(), st.booleans(), FIXED_SPLIT_SIZES)
@example({"kv_lens": []}, True, False, 64)
@example({"kv_lens": [0, 0], "qo_lens": [0, 3]}, False, False, None)
def test_decode(arguments, given_out, as_pair, fixed_split_size):
    check_decode({"dtype": "bfloat16"} | arguments, np, given_out, as_pair, fixed_split_size)


@settings(max_examples=250, suppress_health_check=QUIET)
@given(problem_arguments(), ropes(), st.booleans(), st.booleans())
def test_append(arguments, rope, rotate_q, in_place):
    check_append(arguments, rope, np, rotate_q, in_place)


@pytest.mark.gpu
@settings(max_examples=GPU_CASES, suppress_health_check=QUIET)
@given(problem_arguments(dtypes=GPU_DTYPES, max_qo_len=70, max_len=1100), st.booleans(), st.booleans())
def test_decode_on_the_device(gpu, arguments, given_out, as_pair):
    check_decode(arguments, gpu, given_out, as_pair)


@pytest.mark.gpu
@settings(max_examples=GPU_CASES, suppress_health_check=QUIET)
@given(problem_arguments(dtypes=GPU_DTYPES, max_qo_len=70), ropes(), st.booleans(), st.booleans())
def test_append_on_the_device(gpu, arguments, rope, rotate_q, in_place):
    check_append(arguments, rope, gpu, rotate_q, in_place)
