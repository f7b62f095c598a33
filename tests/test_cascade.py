"""`cascade_decode`, its levels and its specification, against the plain problem over each request's listed keys.

What runs through the kernels is in test_cascade_gpu.py.
"""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from bad_cases import cases, check, part, read_only
from cascade_problems import STRUCTURES, build_cascade, cascade_bytes, check_cascade, map_levels
from hypothesis import HealthCheck, example, given, settings
from problems import TOLERANCE, assert_close, assert_state, build_mla_problem, build_problem, oracle
from strategies import MLA_HEADS, cascade_arguments

import cupyattn
from cupyattn import PagedKVCache, PagedMLACache, PageTable, reference
from cupyattn.levels import MAX_LEVELS, CascadeLevels

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
SHORT_ROWS = {"mla": True, "num_heads": 5, "ckv_dim": 32, "kpe_dim": 8}
KINDS = {"gqa": {}, "mla": SHORT_ROWS}


def build(name, **arguments):
    return build_cascade(**(STRUCTURES[name] | arguments))


# -- the specification --


def assert_reference(cascade):
    out, lse = cascade.reference()
    assert out.dtype == lse.dtype == np.float64
    assert_state(out[cascade.rows], lse[cascade.rows], oracle(cascade.plain), "float64", lse_tolerance=1e-12)
    others = np.setdiff1d(np.arange(len(out)), cascade.rows)
    assert not out[others].any()
    assert np.isneginf(lse[others]).all()
    return out, lse


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_reference(name, kind):
    assert_reference(build(name, **KINDS[kind]))


@pytest.mark.parametrize("group_size", [1, 4, 5, 8])
@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize(
    ("layout", "storage"), [("NHD", "interleaved"), ("HND", "separate"), ("HND", "strided")]
)
def test_reference_of_layouts(layout, storage, page_size, group_size):
    names = ("groups-in-groups", "window-of-tokens", "permuted-tokens")
    for name, dtype in zip(names, TOLERANCE, strict=False):
        assert_reference(
            build(
                name, layout=layout, storage=storage, page_size=page_size, group_size=group_size, dtype=dtype
            )
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window_left", [0, 1, 8, 63, 64, 65, 90, 1000])
def test_reference_of_windows_across_levels(window_left, kind):
    for name in (
        "eight-levels",
        "not-nested",
        "in-no-group",
        "several-tokens",
        "tokens-before-their-own-keys",
    ):
        assert_reference(build(name, window_left=window_left, page_size=4, **KINDS[kind]))


def test_reference_of_prompts_is_taken_in_runs(monkeypatch):
    monkeypatch.setattr(reference, "_LOGITS_AT_ONCE", 1000)
    for name in ("many-tokens", "window-of-tokens"):
        assert_reference(build(name))


@pytest.mark.parametrize("kind", KINDS)
def test_reference_of_one_level_is_decode(kind):
    problem_of = build_mla_problem if KINDS[kind] else build_problem
    sizes = {name: value for name, value in KINDS[kind].items() if name != "mla"}
    for dense, qo_lens, window_left in itertools.product((False, True), (None, [1, 3, 70, 0]), (-1, 20)):
        p = problem_of([70, 0, 97, 5], dense=dense, qo_lens=qo_lens, window_left=window_left, **sizes)
        levels = CascadeLevels([(p.pages, p.qo_indptr)])
        options = {name: value for name, value in p.options.items() if name != "qo_indptr"}
        if p.ckv_dim is None:
            expected, state = (
                p.call(reference.decode),
                reference.cascade_decode(p.q, p.cache, levels, **options),
            )
        else:
            parts = p.q[..., : p.ckv_dim], p.q[..., p.ckv_dim :]
            expected = reference.mla_decode(*parts, p.cache, p.pages, **p.options)
            state = reference.mla_cascade_decode(*parts, p.cache, levels, **options)
        for actual, wanted in zip(state, expected, strict=True):
            assert_close(actual, wanted, 1e-14)


@pytest.mark.parametrize("window_left", [-1, 3, 30])
@pytest.mark.parametrize("qo_lens", [None, [3, 9, 1]])
def test_reference_where_each_table_is_cut_into_levels(qo_lens, window_left):
    """What needs no plain problem of these tests: rows of a page table, cut at any pages, are levels."""
    p = build_problem(
        [37, 60, 4], page_size=4, dense=True, qo_lens=qo_lens, window_left=window_left, poison_window=False
    )
    tokens = np.arange(4, dtype=np.int32) if qo_lens is None else p.qo_indptr
    tables = []
    for begin, end in itertools.pairwise((0, 3, 4, 9, 16)):
        lens = np.clip(p.kv_lens - 4 * begin, 0, 4 * (end - begin)).astype(np.int32)
        tables.append((PageTable.from_dense(p.kv_indices[:, begin:end], lens), tokens))
    options = {name: value for name, value in p.options.items() if name != "qo_indptr"}
    state = reference.cascade_decode(p.q, p.cache, CascadeLevels(tables), **options)
    for actual, wanted in zip(state, oracle(p), strict=True):
        assert_close(actual, wanted, 1e-12)


def test_reference_is_the_merge_of_its_levels():
    """Also without it: one token that sees all keys has the states of its groups, merged."""
    cascade = build("not-nested")
    p, states = cascade.problem, []
    for pages, qo_indptr in cascade.levels.levels:
        alone = [np.zeros(p.q.shape), np.full(p.q.shape[:2], -np.inf)]
        bounds = range(7) if qo_indptr is None else qo_indptr
        for group, (begin, end) in enumerate(itertools.pairwise(bounds)):
            ids = pages.kv_indices[pages.kv_indptr[group] : pages.kv_indptr[group + 1]]
            table = np.tile(ids, (end - begin, 1))
            same = PageTable.from_dense(table, np.full(end - begin, pages.kv_lens[group]))
            alone[0][begin:end], alone[1][begin:end] = reference.decode(
                p.q[begin:end], p.cache, same, sm_scale=p.sm_scale
            )
        states.append(alone)
    out, lse = reference.merge_states(*map(np.stack, zip(*states, strict=True)))
    expected = assert_reference(cascade)
    assert_close(out, expected[0], 1e-13)
    assert_close(lse, expected[1], 1e-13, "lse")


# -- the call on NumPy --


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_values(name, kind, dtype):
    cascade = build(name, dtype=dtype, **KINDS[kind])
    out, lse = check_cascade(cascade, name, validate=cascade.problem.window_left < 0)
    empty = np.isneginf(lse)
    assert not out[empty].any()  # exactly 0


@pytest.mark.parametrize("name", [name for name in STRUCTURES if "window_left" in STRUCTURES[name]])
def test_validate_looks_at_no_page_before_the_window(name):
    """They may be gone: as in `decode`, entries of the table that no query needs may hold anything."""
    check_cascade(build(name, page_size=4), name, validate=True)


@pytest.mark.parametrize("group_size", [1, 4, 5, 8])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_head_counts(num_kv_heads, group_size):
    for name in ("groups-in-groups", "permuted-tokens"):
        check_cascade(build(name, num_kv_heads=num_kv_heads, group_size=group_size), (name, group_size))


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_new_arrays_or_those_given(kind):
    cascade = build("several-tokens", dtype="float16", **KINDS[kind])
    p, expected = cascade.problem, cascade.reference()
    alone = cascade.call()
    assert (alone.dtype, alone.shape) == (np.float16, p.out_shape)
    out, lse = cascade.call(return_lse=True)
    assert (lse.dtype, lse.shape) == (np.float32, p.q.shape[:2])
    assert out.tobytes() == alone.tobytes()
    assert_close(out, expected[0], TOLERANCE["float16"])
    assert_close(lse, expected[1], 1e-3, "lse")
    given, given_lse = np.full_like(out, np.nan), np.full_like(lse, np.nan)
    assert cascade.call(out=given) is given
    assert given.tobytes() == out.tobytes()
    assert cascade.call(lse=given_lse) is not given  # written though not returned, as in `decode`
    assert given_lse.tobytes() == lse.tobytes()
    given[...], given_lse[...] = np.nan, np.nan
    result = cascade.call(out=given, lse=given_lse, return_lse=True)
    assert result[0] is given
    assert result[1] is given_lse
    assert given.tobytes() + given_lse.tobytes() == out.tobytes() + lse.tobytes()


def test_forms_of_arguments():
    """Levels as pairs, a cache as a pair, the query of MLA in two arrays, `pdl`: the same bits."""
    cascade = build("groups-in-groups")
    p, expected = cascade.problem, cascade_bytes(cascade)
    pairs = list(cascade.levels.levels)
    for levels in (pairs, tuple(pairs), [list(pair) for pair in pairs]):
        out, lse = cupyattn.cascade_decode(p.q, p.cache, levels, return_lse=True)
        assert out.tobytes() + lse.tobytes() == expected
    out, lse = cupyattn.cascade_decode(p.q, (p.k_pages, p.v_pages), pairs, return_lse=True)
    assert out.tobytes() + lse.tobytes() == expected
    assert cascade_bytes(cascade, pdl=True) == cascade_bytes(cascade, sm_scale=None) == expected

    cascade = build("permuted", **SHORT_ROWS)
    p, expected = cascade.problem, cascade_bytes(cascade)
    pair = p.q[..., : p.ckv_dim], p.q[..., p.ckv_dim :]
    for parts in (pair, list(pair), tuple(map(np.ascontiguousarray, pair))):
        out, lse = cupyattn.cascade_decode(parts, p.cache, cascade.levels, return_lse=True, **cascade.options)
        assert out[cascade.rows].tobytes() + lse[cascade.rows].tobytes() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_one_level_is_decode(kind):
    problem_of = build_mla_problem if KINDS[kind] else build_problem
    sizes = {name: value for name, value in KINDS[kind].items() if name != "mla"}
    for qo_lens, window_left in itertools.product((None, [1, 3, 60, 0]), (-1, 20)):
        p = problem_of([70, 0, 97, 5], qo_lens=qo_lens, window_left=window_left, **sizes)
        options = {name: value for name, value in p.options.items() if name != "qo_indptr"}
        levels = [(p.pages, p.qo_indptr)]
        in_order = np.arange(len(p.q), dtype=np.int32)  # with it, the cascade's own way
        for made in (levels, CascadeLevels(levels), CascadeLevels(levels, q_indices=in_order)):
            out, lse = cupyattn.cascade_decode(p.q, p.cache, made, return_lse=True, validate=True, **options)
            assert_state(out, lse, oracle(p), p.dtype)
        wanted, wanted_lse = p.call(p.decode, return_lse=True)
        assert_close(out, wanted.astype(np.float64), TOLERANCE[p.dtype] / 2)
        assert_close(lse, wanted_lse.astype(np.float64), 1e-6, "lse")


def test_order_of_q_changes_nothing():
    cascade = build("permuted-tokens")
    p = cascade.problem
    sorted_q = p.q[cascade.rows]
    expected = cupyattn.cascade_decode(sorted_q, p.cache, cascade.levels.levels, return_lse=True)
    actual = cascade.call(return_lse=True)
    for a, wanted in zip(actual, expected, strict=True):
        assert a[cascade.rows].tobytes() == wanted.tobytes()


def test_inputs_are_only_read():
    cascade = build("permuted-tokens", poison=False)
    p = cascade.problem
    arrays = [a for a in (p.q, *p.bases, *cascade.levels._arrays) if a is not None]
    before = [a.tobytes() for a in arrays]
    for a in arrays:
        a.flags.writeable = False
    cascade.call()
    assert [a.tobytes() for a in arrays] == before


def test_queries_of_any_strides():
    cascade = build("several-tokens")
    p, expected = cascade.problem, oracle(cascade.plain)
    tokens, heads, dim = p.q.shape
    q = np.zeros((heads, 2 * tokens, dim + 16), p.q.dtype)[:, ::-2, :dim].swapaxes(0, 1)
    q[...] = p.q
    out = np.zeros((tokens, heads, dim + 16), p.q.dtype)[..., :dim]
    lse = np.zeros((heads, tokens, 2), np.float32)[..., 1].swapaxes(0, 1)
    cupyattn.cascade_decode(q, p.cache, cascade.levels, out=out, lse=lse)
    assert_state(out, lse, expected, p.dtype)


# -- other frameworks --


@pytest.mark.parametrize("name", ["groups-in-groups", "several-tokens", "permuted"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_frameworks(framework, name, kind):
    sizes = SHORT_ROWS if framework.device == "cpu" else {"mla": True, "num_heads": 5}
    cascade = build(name, dtype="float16", **(sizes if KINDS[kind] else {}))
    p, expected = cascade.problem, oracle(cascade.plain)
    array = framework.array
    if p.ckv_dim is None:
        cache = PagedKVCache(*(array(np.ascontiguousarray(a)) for a in (p.k_pages, p.v_pages)))
    else:
        cache = PagedMLACache(*(array(np.ascontiguousarray(a)) for a in (p.ckv_pages, p.kpe_pages)))
    levels = map_levels(cascade.levels, array)
    forms = [levels] if levels.q_indices is not None else [levels, list(levels.levels)]
    for form in forms:
        q = array(p.q)
        out, lse = cupyattn.cascade_decode(q, cache, form, return_lse=True, **cascade.options)
        assert out.dtype == q.dtype
        assert_close(framework.numpy(out)[cascade.rows], expected[0], TOLERANCE["float16"])
        assert_close(framework.numpy(lse)[cascade.rows], expected[1], 1e-3, "lse")
    if p.ckv_dim is not None:
        parts = array(p.q[..., : p.ckv_dim].copy()), array(p.q[..., p.ckv_dim :].copy())
        out = cupyattn.cascade_decode(parts, cache, levels, **cascade.options)
        assert_close(framework.numpy(out)[cascade.rows], expected[0], TOLERANCE["float16"])


def test_torch_writes_where_it_is_told(torch):
    cascade = build("permuted-tokens")
    p, expected = cascade.problem, oracle(cascade.plain)
    cache = tuple(torch.array(np.ascontiguousarray(a)) for a in (p.k_pages, p.v_pages))
    q, levels = torch.array(p.q), map_levels(cascade.levels, torch.array)
    out = torch.module.full_like(q, float("nan"))
    lse = torch.module.full(q.shape[:2], float("nan"), device=q.device)
    result = cupyattn.cascade_decode(q, cache, levels, out=out, lse=lse, return_lse=True, **cascade.options)
    assert result[0] is out
    assert result[1] is lse
    assert_state(torch.numpy(out)[cascade.rows], torch.numpy(lse)[cascade.rows], expected, p.dtype)


# -- random cascades --


def check_random(arguments):
    cascade = build_cascade(**arguments)
    assert_reference(cascade)
    out, lse = check_cascade(cascade, arguments, validate=cascade.problem.window_left < 0)
    empty = np.isneginf(lse[cascade.rows])
    assert not out[cascade.rows][empty].any()


@settings(max_examples=200, suppress_health_check=QUIET)
@given(cascade_arguments())
@example({"own_lens": [], "shared": [([], []), ([0], [3])]})
@example({"own_lens": [0, 1], "shared": [([2], [0])] * 7, "qo_lens": [3, 0]})
def test_random(arguments):
    check_random(arguments)


@settings(max_examples=100, suppress_health_check=QUIET)
@given(cascade_arguments(mla=True, dims=((32, 8), (48, 16)), num_heads=MLA_HEADS[:9]))
def test_random_mla(arguments):
    check_random(arguments)


# -- levels --


def table(xp, *lens, dense=False):
    """A page table of one page a row."""
    batch = len(lens)
    ids = xp.zeros((batch, 1) if dense else batch, np.int32)
    return PageTable(None if dense else xp.arange(batch + 1, dtype=np.int32), ids, xp.array(lens, np.int32))


def int32(xp, *values):
    return xp.array(values, np.int32)


def test_levels_hold_what_they_are_given(xp):
    shared, own, bounds, order = table(xp, 4), table(xp, 3, 1, dense=True), int32(xp, 0, 2), int32(xp, 1, 0)
    levels = CascadeLevels([[shared, bounds], (own, None)], q_indices=order)
    assert levels.levels == ((shared, bounds), (own, None))
    assert levels.q_indices is order
    assert (levels.num_levels, levels.batch_size) == (2, 2)
    assert repr(levels) == f"CascadeLevels(groups=[1, 2], {xp.__name__} int32)"
    assert levels._arrays[0] is bounds
    names = CascadeLevels.names_of(2)
    assert len(names) == len(set(names)) == 9
    by_name = dict(zip(names, levels._arrays, strict=True))
    assert by_name["kv_lens[1]"] is own.kv_lens
    assert by_name["kv_indptr[1]"] is None
    assert by_name["q_indices"] is order
    assert cupyattn.get_array_module(levels) is xp
    with pytest.raises(AttributeError, match="CascadeLevels is immutable: cannot set q_indices"):
        levels.q_indices = None
    with pytest.raises(AttributeError, match="immutable"):
        del levels.levels


def test_levels_are_pickled():
    levels = build("permuted-tokens").levels
    copy = pickle.loads(pickle.dumps(levels))
    assert copy.num_levels == levels.num_levels
    for a, b in zip(copy._arrays, levels._arrays, strict=True):
        np.testing.assert_array_equal(a, b)


def test_as_many_levels_as_there_may_be():
    level = table(np, 1, 2), int32(np, 0, 1, 2)
    assert CascadeLevels([level] * MAX_LEVELS).num_levels == 8
    with pytest.raises(ValueError, match="CascadeLevels: levels must be 1 to 8 pairs, got 9"):
        CascadeLevels([level] * 9)


_OWN, _SHARED = (table(np, 1, 2), None), (table(np, 4), int32(np, 0, 2))


@pytest.mark.parametrize(
    ("levels", "error", "pattern"),
    [
        ([], ValueError, "levels must be 1 to 8 pairs, got 0"),
        (None, TypeError, "levels must be .*got NoneType"),
        (_OWN[0], TypeError, "levels must be .*got PageTable"),
        (_OWN, TypeError, r"levels\[0\] must be a pair \(PageTable, qo_indptr\), got PageTable"),
        ([_OWN[0]], TypeError, r"levels\[0\] must be a pair .*got PageTable"),
        ([_SHARED, (_OWN[0],)], TypeError, r"levels\[1\] must be a pair .*got \(PageTable\)"),
        ([_SHARED, (*_OWN, None)], TypeError, r"levels\[1\] must be .*got \(PageTable, NoneType, NoneType\)"),
        ([(_SHARED[1], _SHARED[0])], TypeError, r"levels\[0\] must be .*got \(ndarray, PageTable\)"),
        ([_OWN, _OWN], TypeError, r"qo_indptr of levels\[0\] must be an array, got None"),
        ([(_OWN[0], [0, 1, 2])], TypeError, r"qo_indptr of levels\[0\] must be an array .*got list"),
        ([(_OWN[0], 2)], TypeError, r"qo_indptr of levels\[0\] must be an array"),
        ([(_OWN[0], np.arange(3.0))], TypeError, r"qo_indptr of levels\[0\] must have dtype int32, got float64"),
        ([_SHARED, (_OWN[0], np.arange(3))], TypeError, r"qo_indptr of levels\[1\] .*int32, got int64"),
        ([(_OWN[0], int32(np, 0, 2))], ValueError, r"qo_indptr of levels\[0\] must have shape \[3\].*got \[2\]"),
        ([(_OWN[0], np.zeros((3, 1), "i4"))], ValueError, r"qo_indptr of levels\[0\] must be a vector"),
        ([(_OWN[0], np.zeros(6, "i4")[::2])], ValueError, r"qo_indptr of levels\[0\] must be contiguous"),
    ],
)  # fmt: skip
def test_bad_levels(levels, error, pattern):
    with pytest.raises(error, match=f"^CascadeLevels: {pattern}") as caught:
        CascadeLevels(levels)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("q_indices", "error", "pattern"),
    [
        ([0, 1], TypeError, "must be an array .*got list"),
        (np.arange(2), TypeError, "must have dtype int32, got int64"),
        (np.zeros((2, 1), "i4"), ValueError, r"must be a vector, got shape \[2, 1\]"),
        (np.zeros(4, "i4")[::2], ValueError, "must be contiguous"),
    ],
)
def test_bad_q_indices(q_indices, error, pattern):
    with pytest.raises(error, match=f"^CascadeLevels: q_indices {pattern}"):
        CascadeLevels([_OWN], q_indices=q_indices)


# -- bad arguments --


@pytest.fixture
def arguments(xp):
    """Good ones: two groups, 3 requests of one token each."""
    cascade = build_cascade(
        [9, 20, 3], [([3], [16]), ([1, 2], [8, 11])], page_size=8, dtype="float16", dense=[True, False, True],
        permuted=True, poison=False, xp=xp,
    )  # fmt: skip
    return {
        "q": cascade.problem.q, "cache": cascade.problem.cache, "levels": cascade.levels,
        "out": xp.zeros((3, 8, 64), "f2"), "lse": xp.zeros((3, 8), "f4"),
    }  # fmt: skip


def changed(name, **entries):
    """Levels in which some entries of an array are others, to `validate`; the name as in `names_of`."""

    def change(a):
        arrays = [None if array is None else array.copy() for array in a.levels._arrays]
        names = CascadeLevels.names_of(a.levels.num_levels)
        for where, value in entries["entries"].items():
            arrays[names.index(name)][where] = value
        *tables, q_indices = arrays
        levels = [(PageTable(*tables[i + 1 : i + 4]), tables[i]) for i in range(0, len(tables), 4)]
        return {"levels": CascadeLevels(levels, q_indices=q_indices), "validate": True}

    return change


def several(*offsets, upper=(0, 3)):
    """Last level's qo_indptr, to `validate`; one group above."""
    return lambda a: {
        "levels": [
            (a.levels.levels[0][0], int32(a.xp, *upper)), (a.levels.levels[2][0], int32(a.xp, *offsets)),
        ],
        "validate": True,
    }  # fmt: skip


@cases(
    # Shapes and dtypes
    ("q of rank 2", ValueError, "q must have 3 dimensions", lambda a: {"q": a.q[0]}),
    ("q of another head_dim", ValueError, "q must have shape .*head_dim = 64",
     lambda a: {"q": a.zeros(3, 8, 128)}),
    ("heads not divisible", ValueError, "num_qo_heads must be .*num_kv_heads = 2, got 7",
     lambda a: {"q": a.q[:, :7]}),
    ("no query heads", ValueError, "num_qo_heads must be .*got 0", lambda a: {"q": a.q[:, :0]}),
    ("out too short", ValueError, "out must have shape", lambda a: {"out": a.out[:2]}),
    ("out of rank 2", ValueError, "out must have 3 dimensions", lambda a: {"out": a.out[0]}),
    ("lse transposed", ValueError, "lse must have shape", lambda a: {"lse": a.lse.T}),
    ("q of another dtype", TypeError, "q must have the dtype of k_pages, float16, got float32",
     lambda a: {"q": a.q.astype("f4")}),
    ("out of another dtype", TypeError, "out must have the dtype of .*float16, got float32",
     lambda a: {"out": a.out.astype("f4")}),
    ("lse of float64", TypeError, "lse must have dtype float32, got float64",
     lambda a: {"lse": a.lse.astype("f8")}),
    # Things that are something else
    ("q a list", TypeError, "q must be an array .*got list", lambda a: {"q": [[1.0]]}),
    ("q None", TypeError, "q must be an array .*got NoneType", lambda a: {"q": None}),
    ("q a pair", TypeError, "q must be an array .*got tuple", lambda a: {"q": (a.q, a.q)}),
    ("out a list", TypeError, "out must be an array", lambda a: {"out": [0.0]}),
    ("lse a number", TypeError, "lse must be an array", lambda a: {"lse": 0.0}),
    ("cache one array", TypeError, "cache must be a", lambda a: {"cache": a.q}),
    ("cache of three", TypeError, "cache must be a", lambda a: {"cache": (a.q,) * 3}),
    ("levels None", TypeError, "levels must be .*got NoneType", lambda a: {"levels": None}),
    ("levels a page table", TypeError, "levels must be .*got PageTable",
     lambda a: {"levels": a.levels.levels[0][0]}),
    ("no levels", ValueError, "levels must be .*got 0", lambda a: {"levels": []}),
    ("levels without offsets", TypeError, r"qo_indptr of levels\[0\] must be an array",
     lambda a: {"levels": [(a.levels.levels[0][0], None), a.levels.levels[2]]}),
    # Strides and overlap
    ("q not contiguous", ValueError, "q must be contiguous along its last axis",
     lambda a: {"q": a.zeros(3, 8, 128)[..., ::2]}),
    ("out not contiguous", ValueError, "out must be contiguous along its last axis",
     lambda a: {"out": a.zeros(3, 64, 8).swapaxes(1, 2)}),
    ("out is q", ValueError, "out must not overlap q", lambda a: {"out": a.q}),
    ("out within V", ValueError, "out must not overlap v_pages",
     lambda a: {"out": part(a.v_pages, 64, 3, 8, 64)}),
    ("lse within out", ValueError, "lse must not overlap out",
     lambda a: {"lse": part(a.out.view("f4"), 0, 3, 8)}),
    ("lse within a table", ValueError, "lse must not overlap kv_indices",
     lambda a: (lambda b: {
         "lse": b.view("f4"),
         "levels": [*a.levels.levels[:2], (PageTable.from_dense(b, a.levels.levels[2][0].kv_lens), None)],
     })(a.xp.zeros((3, 8), "i4"))),
    # Numbers
    ("window_left of -2", ValueError, "window_left must be within -1.*got -2", lambda a: {"window_left": -2}),
    ("window_left of 1.5", TypeError, "window_left must be an integer", lambda a: {"window_left": 1.5}),
    ("soft cap negative", ValueError, "logits_soft_cap must be at least 0", lambda a: {"logits_soft_cap": -1}),
    ("sm_scale NaN", ValueError, "sm_scale must be finite", lambda a: {"sm_scale": np.nan}),
    ("sm_scale a string", TypeError, "sm_scale must be a number", lambda a: {"sm_scale": "auto"}),
    ("pdl a number", TypeError, "pdl must be a bool, got int", lambda a: {"pdl": 1}),
    # Values, with validate
    ("length negative", ValueError, "kv_lens.*must be at least 0",
     changed("kv_lens[1]", entries={1: -1})),
    ("length too large", ValueError, r"kv_lens.* needs 10 pages of 8 tokens",
     changed("kv_lens[0]", entries={0: 73})),
    ("own length too large", ValueError, r"kv_lens.* needs 10 pages of 8 tokens",
     changed("kv_lens[2]", entries={1: 73})),
    ("page id negative", ValueError, "kv_indices.* must be within", changed("kv_indices[1]", entries={0: -1})),
    ("page id too large", ValueError, "kv_indices.* must be within",
     changed("kv_indices[2]", entries={(1, 2): 999})),
    ("kv_indptr decreasing", ValueError, "kv_indptr.* must not decrease",
     changed("kv_indptr[1]", entries={1: 99})),
    ("offsets decreasing", ValueError, "qo_indptr.* must not decrease",
     changed("qo_indptr[1]", entries={1: 4})),
    ("offsets past the tokens", ValueError, "qo_indptr", changed("qo_indptr[0]", entries={1: 4})),
    ("offsets negative", ValueError, "qo_indptr", changed("qo_indptr[0]", entries={0: -1})),
    ("last offsets past the tokens", ValueError, "qo_indptr", several(0, 1, 2, 4)),
    ("a group that cuts a request", ValueError, "qo_indptr", several(0, 2, 2, 3, upper=(0, 1))),
    ("q_indices negative", ValueError, "q_indices", changed("q_indices", entries={1: -1})),
    ("q_indices too large", ValueError, "q_indices", changed("q_indices", entries={1: 3})),
    ("a row twice", ValueError, "q_indices", lambda a: changed("q_indices", entries={0: a.levels.q_indices[1]})(a)),
)  # fmt: skip
def test_bad_arguments(case, arguments, xp):
    check(cupyattn.cascade_decode, arguments, case, xp)


@cases(
    ("workspace", TypeError, "workspace is for CUDA arrays", lambda a: {"workspace": np.zeros(1 << 20, "u1")}),
    ("out read-only", ValueError, "out must be writable", lambda a: {"out": read_only(a.out)}),
    ("lse read-only", ValueError, "lse must be writable", lambda a: {"lse": read_only(a.lse)}),
    ("q too short", ValueError, "(q|kv_lens)", lambda a: {
        "q": a.q[:2], "out": a.out[:2], "lse": a.lse[:2], "levels": list(a.levels.levels)}),
)  # fmt: skip
def test_bad_arguments_on_numpy(case):
    cascade = build_cascade([9, 20, 3], [([3], [16])], dtype="float16", poison=False)
    good = {"q": cascade.problem.q, "cache": cascade.problem.cache, "levels": cascade.levels}
    good |= {"out": np.zeros((3, 8, 64), "f2"), "lse": np.zeros((3, 8), "f4")}
    check(cupyattn.cascade_decode, good, case, np)


@cases(
    ("no sm_scale", TypeError, "sm_scale", lambda a: {"sm_scale": None}),
    ("q without kpe", ValueError, "q must have shape .*40", lambda a: {"q": a.q[..., :32]}),
    ("q of three", TypeError, "q must be an array or a pair", lambda a: {"q": (a.q,) * 3}),
    ("q_kpe None", TypeError, "q_kpe must be an array", lambda a: {"q": (a.q[..., :32], None)}),
    ("q_kpe too wide", ValueError, "q_kpe must have shape", lambda a: {"q": (a.q[..., :32], a.q)}),
    ("out of rows", ValueError, "out must have shape", lambda a: {"out": a.q + 1}),
    ("no heads", ValueError, "q", lambda a: {"q": a.q[:, :0]}),
)  # fmt: skip
def test_bad_arguments_of_mla(case):
    cascade = build_cascade([9, 20], [([2], [16])], dtype="float16", poison=False, **SHORT_ROWS)
    good = {"q": cascade.problem.q, "cache": cascade.problem.cache, "levels": cascade.levels, "sm_scale": 0.1}
    good |= {"out": np.zeros((2, 5, 32), "f2"), "lse": np.zeros((2, 5), "f4")}
    check(cupyattn.cascade_decode, good, case, np)
