"""Bad arguments of the public calls: the right error, naming the argument, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bad_cases import bits, cases, check, misaligned, part, read_only
from problems import POISON_PAGE, Guarded, build_problem, to_backend, to_host

import cupyattn
from cupyattn import PagedKVCache, PageTable, Rope


def problem(xp: Any, **changes: Any) -> Any:
    return build_problem([5, 0, 33], **({"page_size": 8, "dtype": "float16"} | changes), xp=xp)


def table(xp: Any, **changes: Any) -> PageTable:
    """The page table of the good arguments with some values replaced: ``kv_lens={2: -1}``."""
    good = problem(np, dense=changes.pop("dense", False))
    for name, values in changes.items():
        for place, value in values.items():
            getattr(good, name)[place] = value
    return to_backend(good, xp).pages


def ragged(values: list[int]) -> Callable[[Any], dict[str, Any]]:
    return lambda a: {"qo_indptr": a.xp.asarray(np.array(values, np.int32)), "validate": True}


def validated(**changes: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda a: {"pages": table(a.xp, **changes), "validate": True}


# decode


@pytest.fixture
def decode_arguments(xp):
    good = problem(xp)
    out, lse = (Guarded(shape, dtype, xp).array for shape, dtype in (((3, 8, 64), "f2"), ((3, 8), "f4")))
    return {"q": good.q, "cache": good.cache, "pages": good.pages, "out": out, "lse": lse}


def test_the_arguments_are_good_otherwise(xp, decode_arguments):
    offsets = {"qo_indptr": xp.asarray(np.array([0, 1, 1, 3], "i4"))}
    for more in ({}, {"validate": True}, offsets, offsets | {"validate": True}):
        out = cupyattn.decode(**decode_arguments, **more)
        assert out is decode_arguments["out"]
        assert np.isfinite(to_host(out)).all()


@cases(
    # Ranks and shapes
    ("q of rank 2", ValueError, r"q must have 3 dimensions .*got 2", lambda a: {"q": a.q[0]}),
    ("q of rank 4", ValueError, r"q must have 3 dimensions .*got 4", lambda a: {"q": a.q[None]}),
    ("q of another batch", ValueError, r"kv_lens must have shape \[batch\] with batch = 2",
     lambda a: {"q": a.q[:2]}),
    ("q of another head_dim", ValueError, r"q must have shape .*head_dim = 64",
     lambda a: {"q": a.zeros(3, 8, 128)}),
    ("heads not divisible", ValueError, "num_qo_heads must be a positive multiple of num_kv_heads = 2, got 7",
     lambda a: {"q": a.q[:, :7]}),
    ("fewer query heads than heads", ValueError, "num_qo_heads must be .*got 1", lambda a: {"q": a.q[:, :1]}),
    ("no query heads", ValueError, "num_qo_heads must be .*got 0", lambda a: {"q": a.q[:, :0]}),
    ("out of rank 2", ValueError, "out must have 3 dimensions", lambda a: {"out": a.out[0]}),
    ("out too short", ValueError, "out must have shape", lambda a: {"out": a.out[:2]}),
    ("out too long", ValueError, "out must have shape", lambda a: {"out": a.zeros(4, 8, 64)}),
    ("lse of rank 3", ValueError, "lse must have 2 dimensions", lambda a: {"lse": a.lse[..., None]}),
    ("lse transposed", ValueError, "lse must have shape", lambda a: {"lse": a.lse.T}),
    ("qo_indptr of rank 2", ValueError, "qo_indptr must have 1 dimensions",
     lambda a: {"qo_indptr": a.xp.zeros((1, 4), "i4")}),
    ("qo_indptr too short", ValueError, r"qo_indptr must have shape \[batch \+ 1\]",
     lambda a: {"qo_indptr": a.xp.zeros(3, "i4")}),
    # Dtypes
    ("q of another dtype", TypeError, "q must have the dtype of k_pages, float16, got float32",
     lambda a: {"q": a.q.astype("f4")}),
    ("q of integers", TypeError, "q must have", lambda a: {"q": a.q.astype("i2")}),
    ("out of another dtype", TypeError, "out must have the dtype of q, float16, got float32",
     lambda a: {"out": a.out.astype("f4")}),
    ("lse of float64", TypeError, "lse must have dtype float32, got float64",
     lambda a: {"lse": a.lse.astype("f8")}),
    ("lse of float16", TypeError, "lse must have dtype float32, got float16",
     lambda a: {"lse": a.lse.astype("f2")}),
    ("qo_indptr of int64", TypeError, "qo_indptr must have dtype int32, got int64",
     lambda a: {"qo_indptr": a.xp.arange(4)}),
    ("cache of float64", TypeError, "k_pages must have dtype",
     lambda a: {"cache": tuple(p.astype("f8") for p in (a.k_pages, a.v_pages))}),
    # Things that are not arrays
    ("q a list", TypeError, "q must be an array .*got list", lambda a: {"q": [[1.0]]}),
    ("q None", TypeError, "q must be an array .*got NoneType", lambda a: {"q": None}),
    ("out a list", TypeError, "out must be an array", lambda a: {"out": [0.0]}),
    ("out a pair", TypeError, "out must be an array .*got tuple", lambda a: {"out": (a.out, a.lse)}),
    ("out a page table", TypeError, "out must be an array .*got PageTable", lambda a: {"out": a.pages}),
    ("lse a pair", TypeError, "lse must be an array .*got tuple", lambda a: {"lse": (a.lse, a.lse)}),
    ("workspace a pair", TypeError, "workspace must be an array .*got tuple",
     lambda a: {"workspace": (a.lse, a.lse)}),
    ("qo_indptr a page table", TypeError, "qo_indptr must be an array .*got PageTable",
     lambda a: {"qo_indptr": a.pages}),
    ("lse a number", TypeError, "lse must be an array", lambda a: {"lse": 0.0}),
    ("qo_indptr a list", TypeError, "qo_indptr must be an array", lambda a: {"qo_indptr": [0, 1, 2, 3]}),
    ("pages a tuple", TypeError, "pages must be a PageTable, got tuple", lambda a: {"pages": (1, 2, 3)}),
    ("cache of three", TypeError, "cache must be a PagedKVCache or a pair", lambda a: {"cache": (a.q,) * 3}),
    ("cache one array", TypeError, "cache must be a PagedKVCache or a pair", lambda a: {"cache": a.q}),
    ("cache of lists", TypeError, "k_pages must be an array", lambda a: {"cache": ([1], [2])}),
    # K and V
    ("page sizes differ", ValueError, "v_pages must have shape .*page_size = 8",
     lambda a: {"cache": (a.k_pages, a.zeros(9, 4, 2, 64))}),
    ("numbers of pages differ", ValueError, "v_pages must have shape .*num_pages = 9",
     lambda a: {"cache": (a.k_pages, a.v_pages[1:])}),
    ("head counts of K and V differ", ValueError, "v_pages must have shape",
     lambda a: {"cache": (a.k_pages, a.v_pages[:, :, :1])}),
    ("dtypes of K and V differ", TypeError, "v_pages must have the dtype of k_pages",
     lambda a: {"cache": (a.k_pages, a.v_pages.astype("f4"))}),
    ("K of rank 3", ValueError, "k_pages must have 4 dimensions",
     lambda a: {"cache": (a.k_pages[0], a.v_pages)}),
    # Strides
    ("q not contiguous", ValueError, "q must be contiguous along its last axis",
     lambda a: {"q": a.zeros(3, 8, 128)[..., ::2]}),
    ("q backwards", ValueError, "q must be contiguous along its last axis", lambda a: {"q": a.q[..., ::-1]}),
    ("out not contiguous", ValueError, "out must be contiguous along its last axis",
     lambda a: {"out": a.zeros(3, 64, 8).swapaxes(1, 2)}),
    ("K not contiguous", ValueError, "k_pages must be contiguous along its last axis",
     lambda a: {"cache": (a.zeros(9, 8, 2, 128)[..., ::2], a.v_pages)}),
    ("qo_indptr not contiguous", ValueError, "qo_indptr must be contiguous",
     lambda a: {"qo_indptr": a.xp.zeros(8, "i4")[::2]}),
    # Overlap
    ("out is q", ValueError, "out must not overlap q", lambda a: {"out": a.q}),
    ("out is a view of q", ValueError, "out must not overlap q", lambda a: {"out": a.q[:]}),
    ("out overlaps q in part", ValueError, "out must not overlap q",
     lambda a: (lambda b: {"q": b[:3], "out": b[2:]})(a.zeros(5, 8, 64))),
    ("out within K", ValueError, "out must not overlap k_pages",
     lambda a: {"out": part(a.k_pages, 64, 3, 8, 64)}),
    ("out within V", ValueError, "out must not overlap v_pages",
     lambda a: {"out": part(a.v_pages, 64, 3, 8, 64)}),
    ("lse within out", ValueError, "lse must not overlap out",
     lambda a: {"lse": part(a.out.view("f4"), 0, 3, 8)}),
    ("lse within the table", ValueError, "lse must not overlap kv_indices",
     lambda a: (lambda b: {"lse": b.view("f4"), "pages": PageTable.from_dense(b, a.pages.kv_lens)})(
         a.xp.zeros((3, 8), "i4"))),
    # Numbers
    ("window_left of -2", ValueError, "window_left must be within -1.*got -2", lambda a: {"window_left": -2}),
    ("window_left of 2^31", ValueError, "window_left must be within", lambda a: {"window_left": 2**31}),
    ("window_left of 1.5", TypeError, "window_left must be an integer", lambda a: {"window_left": 1.5}),
    ("soft cap negative", ValueError, "logits_soft_cap must be at least 0, got -1",
     lambda a: {"logits_soft_cap": -1}),
    ("soft cap infinite", ValueError, "logits_soft_cap must be finite",
     lambda a: {"logits_soft_cap": np.inf}),
    ("soft cap NaN", ValueError, "logits_soft_cap must be finite", lambda a: {"logits_soft_cap": np.nan}),
    ("sm_scale NaN", ValueError, "sm_scale must be finite", lambda a: {"sm_scale": np.nan}),
    ("sm_scale infinite", ValueError, "sm_scale must be finite", lambda a: {"sm_scale": -np.inf}),
    ("sm_scale a string", TypeError, "sm_scale must be a number, got str", lambda a: {"sm_scale": "auto"}),
    ("fixed splits of 32", ValueError, "fixed_split_size must be a power of two of at least 64, got 32",
     lambda a: {"fixed_split_size": 32}),
    ("fixed splits of 96", ValueError, "fixed_split_size must be a power of two of at least 64, got 96",
     lambda a: {"fixed_split_size": 96}),
    ("fixed splits of 0", ValueError, "fixed_split_size must be .*got 0", lambda a: {"fixed_split_size": 0}),
    ("fixed splits of -64", ValueError, "fixed_split_size must be .*got -64",
     lambda a: {"fixed_split_size": -64}),
    ("fixed splits of 64.0", TypeError, "fixed_split_size must be an integer, got float",
     lambda a: {"fixed_split_size": 64.0}),
    ("fixed splits a string", TypeError, "fixed_split_size must be an integer, got str",
     lambda a: {"fixed_split_size": "auto"}),
    ("pdl a number", TypeError, "pdl must be a bool, got int", lambda a: {"pdl": 1}),
    ("pdl None", TypeError, "pdl must be a bool, got NoneType", lambda a: {"pdl": None}),
    # Values, with validate
    ("length negative", ValueError, r"kv_lens must be at least 0, got kv_lens\[2\] = -1",
     validated(kv_lens={2: -1})),
    ("length too large", ValueError, r"kv_lens\[0\] = 17 needs 3 pages of 8 tokens, but its row .* has 2",
     validated(kv_lens={0: 17})),
    ("length too large for int32", ValueError, r"kv_lens\[0\] = 2147483647 needs 268435456 pages",
     validated(kv_lens={0: 2**31 - 1})),
    ("length too large for a dense row", ValueError, r"kv_lens\[2\] = 49 needs 7 pages .* has 6",
     validated(kv_lens={2: 49}, dense=True)),
    ("page id negative", ValueError, r"kv_indices must be within 0\.\.8, got -1 as page 0 of request 0",
     validated(kv_indices={0: -1})),
    ("page id too large", ValueError, r"kv_indices must be within 0\.\.8, got 9 as page 0 of request 0",
     validated(kv_indices={0: 9})),
    ("page id far too large", ValueError, f"got {POISON_PAGE} as page 4 of request 2",
     validated(kv_indices={(2, 4): POISON_PAGE}, dense=True)),
    ("kv_indptr decreasing", ValueError, "kv_indptr must not decrease", validated(kv_indptr={1: 4})),
    ("kv_indptr negative", ValueError, r"kv_indptr\[0\] must be at least 0, got -1",
     validated(kv_indptr={0: -1})),
    ("kv_indptr past the entries", ValueError, r"kv_indptr\[-1\] must be at most the number of entries, 9",
     validated(kv_indptr={3: 10})),
    ("qo_indptr past the tokens", ValueError, r"qo_indptr\[-1\] must be the number of tokens, 3, got 4",
     ragged([0, 1, 2, 4])),
    ("qo_indptr short of the tokens", ValueError, r"qo_indptr\[-1\] must be the number of tokens, 3, got 2",
     ragged([0, 1, 2, 2])),
    ("qo_indptr from 1", ValueError, r"qo_indptr\[0\] must be 0, got 1", ragged([1, 1, 2, 3])),
    ("qo_indptr decreasing", ValueError, "qo_indptr must not decrease", ragged([0, 4, 2, 3])),
)  # fmt: skip
def test_decode(case, decode_arguments, xp):
    check(cupyattn.decode, decode_arguments, case, xp)


@cases(
    ("workspace", TypeError, "workspace is for CUDA arrays",
     lambda a: {"workspace": np.zeros(1 << 20, "u1")}),
    ("out read-only", ValueError, "out must be writable", lambda a: {"out": read_only(a.out)}),
    ("lse read-only", ValueError, "lse must be writable", lambda a: {"lse": read_only(a.lse)}),
)  # fmt: skip
def test_decode_of_numpy_arrays(case):
    good = problem(np)
    arguments = {"q": good.q, "cache": good.cache, "pages": good.pages}
    arguments |= {"out": np.zeros((3, 8, 64), "f2"), "lse": np.zeros((3, 8), "f4")}
    check(cupyattn.decode, arguments, case, np)


def roomy(a: Any, num_pages: int) -> PageTable:
    """The page table of the good arguments with room for so many pages of 8 tokens a request."""
    return PageTable.from_dense(a.xp.zeros((3, num_pages), "i4"), a.pages.kv_lens)


@cases(
    ("q on the host", TypeError, "must be a (numpy|cupy) array", lambda a: {"q": to_host(a.q)}),
    ("out on the host", TypeError, "out must be a cupy array", lambda a: {"out": to_host(a.out)}),
    ("lse on the host", TypeError, "lse must be a cupy array", lambda a: {"lse": to_host(a.lse)}),
    ("qo_indptr on the host", TypeError, "qo_indptr must be a cupy array",
     lambda a: {"qo_indptr": np.arange(4, dtype="i4")}),
    ("V on the host", TypeError, "v_pages must be a cupy array",
     lambda a: {"cache": (a.k_pages, to_host(a.v_pages))}),
    ("lengths on the host", TypeError, "kv_(lens|indptr|indices) must be a cupy array",
     lambda a: {"pages": problem(np).pages}),
    ("float32", TypeError, "q must have dtype float16 or bfloat16, got float32",
     lambda a: (lambda p: {"q": p.q, "cache": p.cache})(problem(a.xp, dtype="float32"))),
    ("head_dim of 72", ValueError, "head_dim must be one of .*got 72",
     lambda a: (lambda p: {"q": p.q, "cache": p.cache})(problem(a.xp, head_dim=72))),
    ("q misaligned", ValueError, "q must be aligned to 16 bytes", lambda a: {"q": misaligned(a.q)}),
    ("K misaligned", ValueError, "k_pages must be aligned to 16 bytes",
     lambda a: {"cache": (misaligned(a.k_pages), a.v_pages)}),
    ("V misaligned", ValueError, "v_pages must be aligned to 16 bytes",
     lambda a: {"cache": (a.k_pages, misaligned(a.v_pages))}),
    ("out misaligned", ValueError, "out must be aligned to 16 bytes", lambda a: {"out": misaligned(a.out)}),
    ("rows of K misaligned", ValueError, "k_pages must have strides that are multiples of 16",
     lambda a: {"cache": (a.zeros(9, 8, 2, 65)[..., :64], a.v_pages)}),
    ("rows of q misaligned", ValueError, "q must have strides that are multiples of 16",
     lambda a: {"q": a.zeros(3, 8, 68)[..., :64]}),
    ("workspace too small", ValueError, "workspace must be .*at least",
     lambda a: {"workspace": a.xp.zeros(1024, "u1")}),
    ("workspace of another dtype", TypeError, "workspace must have dtype uint8",
     lambda a: {"workspace": cupyattn.decode_workspace().view("f4")}),
    ("workspace of rank 2", ValueError, "workspace must",
     lambda a: {"workspace": cupyattn.decode_workspace()[None]}),
    ("workspace misaligned", ValueError, "workspace must",
     lambda a: {"workspace": a.xp.zeros(1 << 27, "u1")[8:]}),
    ("workspace used for something else", ValueError, "workspace must be all zeros",
     lambda a: {"workspace": a.xp.ones(1 << 27, "u1"), "validate": True}),
    ("workspace too small for fixed splits", ValueError, "workspace must be .*see decode_workspace_bytes",
     lambda a: {"workspace": cupyattn.decode_workspace(), "fixed_split_size": 64, "pages": roomy(a, 1 << 15)}),
    ("too many fixed splits", ValueError, "fixed_split_size = 64 makes up to 196608 splits .*more than 131072",
     lambda a: {"fixed_split_size": 64, "pages": roomy(a, 1 << 18)}),
    ("workspace within out", ValueError, "workspace must not overlap out",
     lambda a: (lambda b: {"workspace": b, "out": part(b.view("f2"), 0, 3, 8, 64)})(
         a.xp.zeros(1 << 26, "u1"))),
)  # fmt: skip
def test_decode_on_the_device(case, gpu):
    good = problem(gpu)
    arguments = {"q": good.q, "cache": good.cache, "pages": good.pages}
    arguments |= {"out": gpu.zeros((3, 8, 64), "f2"), "lse": gpu.zeros((3, 8), "f4")}
    check(cupyattn.decode, arguments, case, gpu)


def test_decode_workspace_bytes_of_numpy_arrays():
    good = problem(np)
    for q, pattern in (
        (good.q, "q must be a CuPy array, got ndarray"),
        ([1.0], "q must be an array .*got list"),
    ):
        with pytest.raises(TypeError, match=f"^decode_workspace_bytes: {pattern}"):
            cupyattn.decode_workspace_bytes(q, good.cache, good.pages)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "error", "pattern"),
    [(96, ValueError, "a power of two of at least 64, got 96"), ("64", TypeError, "an integer, got str")],
)
def test_decode_workspace_bytes_of_bad_splits(gpu, size, error, pattern):
    good = problem(gpu)
    with pytest.raises(error, match=f"fixed_split_size must be {pattern}"):
        cupyattn.decode_workspace_bytes(good.q, good.cache, good.pages, fixed_split_size=size)


@pytest.mark.gpu
def test_decode_workspace_of_no_number(gpu):
    with pytest.raises(TypeError, match="decode_workspace: num_bytes must be an integer, got float"):
        cupyattn.decode_workspace(num_bytes=1e6)
    with pytest.raises(ValueError, match="decode_workspace: num_bytes must be at least 0, got -1"):
        cupyattn.decode_workspace(num_bytes=-1)


@pytest.mark.gpu
def test_decode_workspace_bytes_without_a_page_table(gpu):
    good = problem(gpu)
    with pytest.raises(TypeError, match=r"^decode_workspace_bytes: pages must be a PageTable, got tuple"):
        cupyattn.decode_workspace_bytes(good.q, good.cache, (good.pages.kv_indices, good.pages.kv_lens))


def test_arrays_on_two_devices(gpu):
    if gpu.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    here = problem(gpu)
    with gpu.cuda.Device(1):
        elsewhere = problem(gpu)
    with pytest.raises(ValueError, match="must be on device"):
        cupyattn.decode(here.q, elsewhere.cache, here.pages)
    with pytest.raises(ValueError, match="must be on device"):
        cupyattn.append(here.k_pages[:3, 0], here.v_pages[:3, 0], elsewhere.cache, here.pages)


# append


@pytest.fixture
def append_arguments(xp):
    good = problem(xp)
    k, v = (xp.asarray(a) for a in np.random.default_rng(1).standard_normal((2, 3, 2, 64)).astype("f2"))
    q_out = Guarded((3, 8, 64), "f2", xp).array
    written = {"cache": good.cache, "q_out": q_out}
    return {"k": k, "v": v, "pages": good.pages, "rope": Rope(), "q": good.q} | written


def test_the_arguments_of_append_are_good_otherwise(append_arguments):
    assert cupyattn.append(**append_arguments, validate=True) is append_arguments["q_out"]
    assert np.isfinite(to_host(append_arguments["q_out"])).all()


@cases(
    ("k of rank 2", ValueError, "k must have 3 dimensions", lambda a: {"k": a.k[0]}),
    ("k of another batch", ValueError, "(v|kv_lens) must have shape .*= 2", lambda a: {"k": a.k[:2]}),
    ("k of other heads", ValueError, "k must have shape .*num_kv_heads = 2", lambda a: {"k": a.k[:, :1]}),
    ("k of another head_dim", ValueError, "k must have shape .*head_dim = 64",
     lambda a: {"k": a.k[..., :32]}),
    ("v of another shape", ValueError, "v must have shape", lambda a: {"v": a.v[:2]}),
    ("q of other tokens", ValueError, "q must have shape", lambda a: {"q": a.q[:2]}),
    ("q of another head_dim", ValueError, "q must have shape", lambda a: {"q": a.q[..., :32]}),
    ("q_out of another shape", ValueError, "q_out must have shape", lambda a: {"q_out": a.q_out[:, :4]}),
    ("qo_indptr too short", ValueError, "qo_indptr must have shape",
     lambda a: {"qo_indptr": a.xp.zeros(2, "i4")}),
    ("k of another dtype", TypeError, "k must have the dtype of k_pages, float16, got float32",
     lambda a: {"k": a.k.astype("f4")}),
    ("v of another dtype", TypeError, "v must have the dtype of k_pages", lambda a: {"v": a.v.astype("f4")}),
    ("q of another dtype", TypeError, "q must have the dtype of k_pages", lambda a: {"q": a.q.astype("f4")}),
    ("q_out of another dtype", TypeError, "q_out must have the dtype of k_pages",
     lambda a: {"q_out": a.q_out.astype("f4")}),
    ("qo_indptr of int64", TypeError, "qo_indptr must have dtype int32",
     lambda a: {"qo_indptr": a.xp.arange(4)}),
    ("k a list", TypeError, "k must be an array", lambda a: {"k": [1.0]}),
    ("v None", TypeError, "v must be an array", lambda a: {"v": None}),
    ("q_out a list", TypeError, "q_out must be an array", lambda a: {"q_out": [1.0]}),
    ("k a pair", TypeError, "k must be an array .*got tuple", lambda a: {"k": (a.k, a.v)}),
    ("q a pair", TypeError, "q must be an array .*got tuple", lambda a: {"q": (a.q, a.q)}),
    ("q_out a page table", TypeError, "q_out must be an array .*got PageTable", lambda a: {"q_out": a.pages}),
    ("qo_indptr a pair", TypeError, "qo_indptr must be an array .*got tuple",
     lambda a: {"qo_indptr": (a.k, a.v)}),
    ("pages an array", TypeError, "pages must be a PageTable", lambda a: {"pages": a.pages.kv_indices}),
    ("cache None", TypeError, "cache must be a PagedKVCache or a pair", lambda a: {"cache": None}),
    ("rope a number", TypeError, "rope must be a Rope, got float", lambda a: {"rope": 10000.0}),
    ("rope too wide", ValueError, "rotary_dim must be even and at most head_dim = 64, got 128",
     lambda a: {"rope": Rope(rotary_dim=128)}),
    ("k not contiguous", ValueError, "k must be contiguous along its last axis",
     lambda a: {"k": a.zeros(3, 2, 128)[..., ::2]}),
    ("v not contiguous", ValueError, "v must be contiguous along its last axis",
     lambda a: {"v": a.zeros(3, 64, 2).swapaxes(1, 2)}),
    ("q not contiguous", ValueError, "q must be contiguous along its last axis",
     lambda a: {"q": a.zeros(3, 8, 128)[..., ::2]}),
    ("q_out not contiguous", ValueError, "q_out must be contiguous along its last axis",
     lambda a: {"q_out": a.zeros(3, 8, 128)[..., ::2]}),
    ("q_out without q", ValueError, "q_out needs q", lambda a: {"q": None}),
    ("q_out overlaps q in part", ValueError, "q_out must .*overlap q",
     lambda a: (lambda b: {"q": b[:3], "q_out": b[1:]})(a.zeros(4, 8, 64))),
    ("q_out within K", ValueError, "q_out must not overlap k_pages",
     lambda a: {"q_out": part(a.k_pages, 64, 3, 8, 64)}),
    ("q_out is v", ValueError, "q_out must not overlap v",
     lambda a: (lambda b: {"v": b[:, :2], "q_out": b})(a.zeros(3, 8, 64))),
    ("k within K", ValueError, "k must not overlap k_pages|k_pages must not overlap k",
     lambda a: {"k": a.k_pages[0, :3]}),
    ("page id too large", ValueError, "kv_indices must be within", validated(kv_indices={0: 9})),
    ("page id negative", ValueError, "kv_indices must be within", validated(kv_indices={0: -1})),
    ("length negative", ValueError, "kv_lens must be at least 0", validated(kv_lens={2: -1})),
    ("length too large", ValueError, r"kv_lens\[0\] = 17 needs 3 pages", validated(kv_lens={0: 17})),
    ("qo_indptr short of the tokens", ValueError, r"qo_indptr\[-1\] must be the number of tokens, 3, got 2",
     ragged([0, 1, 2, 2])),
)  # fmt: skip
def test_append(case, append_arguments, xp):
    check(cupyattn.append, append_arguments, case, xp)


def test_append_to_a_read_only_cache():
    good = problem(np)
    cache = PagedKVCache(good.k_pages, read_only(good.v_pages))
    new = np.ones((3, 2, 64), "f2")
    before = bits(good.k_pages)
    with pytest.raises(ValueError, match="append: v_pages must be writable"):
        cupyattn.append(new, new, cache, good.pages)
    assert bits(good.k_pages) == before


# merge_states


@pytest.fixture
def merge_arguments(xp):
    rng = np.random.default_rng(2)
    out, lse = rng.standard_normal((4, 3, 8, 64)).astype("f2"), rng.standard_normal((4, 3, 8)).astype("f4")
    into = tuple(Guarded(shape, dtype, xp).array for shape, dtype in (((3, 8, 64), "f2"), ((3, 8), "f4")))
    return {"out": xp.asarray(out), "lse": xp.asarray(lse), "into": into}


def test_the_arguments_of_merge_are_good_otherwise(merge_arguments):
    out, lse = cupyattn.merge_states(**merge_arguments)
    assert out is merge_arguments["into"][0]
    assert lse is merge_arguments["into"][1]
    assert np.isfinite(to_host(out)).all()


@cases(
    ("lse of another shape", ValueError, "lse must have the shape of out without head_dim",
     lambda a: {"lse": a.lse[:3]}),
    ("lse with head_dim", ValueError, "lse must have the shape of out without head_dim",
     lambda a: {"lse": a.out.astype("f4")}),
    ("out without head_dim", ValueError, "lse must have the shape of out without head_dim",
     lambda a: {"out": a.out[..., 0]}),
    ("lse of float64", TypeError, "lse must have dtype float32, got float64",
     lambda a: {"lse": a.lse.astype("f8")}),
    ("out of float64", TypeError, "out must have dtype", lambda a: {"out": a.out.astype("f8")}),
    ("out of integers", TypeError, "out must have dtype", lambda a: {"out": a.out.astype("i4")}),
    ("out a number", TypeError, "out must be an array", lambda a: {"out": 1.0}),
    ("lse None", TypeError, "lse must", lambda a: {"lse": None}),
    ("axis 3", ValueError, "axis must be an axis of lse", lambda a: {"axis": 3}),
    ("axis -4", ValueError, "axis must be an axis of lse", lambda a: {"axis": -4}),
    ("no states", ValueError, "out must hold at least one state",
     lambda a: {"out": a.out[:0], "lse": a.lse[:0]}),
    ("sequences of none", ValueError, "out must be", lambda a: {"out": (), "lse": ()}),
    ("a sequence and an array", ValueError, "lse must be", lambda a: {"out": (a.out[0],)}),
    ("an array and a sequence", ValueError, "out must be", lambda a: {"lse": (a.lse[0],)}),
    ("sequences of other lengths", ValueError, "lse must have as many states as out, 2, got 1",
     lambda a: {"out": (a.out[0], a.out[1]), "lse": (a.lse[0],)}),
    ("sequences along an axis", ValueError, "axis must be 0 for sequences",
     lambda a: {"out": tuple(a.out), "lse": tuple(a.lse), "axis": 1}),
    ("states of two shapes", ValueError, "out must have one shape",
     lambda a: {"out": (a.out[0], a.out[1, :2]), "lse": (a.lse[0], a.lse[1, :2])}),
    ("states of two dtypes", TypeError, "out must have the dtype of",
     lambda a: {"out": (a.out[0], a.out[1].astype("f4")), "lse": tuple(a.lse[:2])}),
    ("three states of two shapes", ValueError, "lse must have one shape",
     lambda a: {"out": tuple(a.out[:3]), "lse": (*a.lse[:2], a.lse[2, :2])}),
    ("into of another shape", ValueError, r"into\[0\] must have shape",
     lambda a: {"into": (a.into[0][:2], a.into[1])}),
    ("into's lse of another shape", ValueError, r"into\[1\] must have shape",
     lambda a: {"into": (a.into[0], a.into[1][:2])}),
    ("into of another dtype", TypeError, r"into\[0\] must have the dtype of out",
     lambda a: {"into": (a.into[0].astype("f4"), a.into[1])}),
    ("into's lse of another dtype", TypeError, r"into\[1\] must have dtype float32",
     lambda a: {"into": (a.into[0], a.into[1].astype("f2"))}),
    ("into without lse", TypeError, r"into\[1\] must be an array", lambda a: {"into": (a.into[0], None)}),
    ("into of pairs", TypeError, r"into\[0\] must be an array .*got tuple",
     lambda a: {"into": (a.into, a.into)}),
    ("into one array", TypeError, "into must be a pair", lambda a: {"into": a.into[0]}),
    ("into of three", TypeError, "into must be a pair", lambda a: {"into": (*a.into, a.into[0])}),
    ("into's lse within its out", ValueError, r"into\[1\] must not overlap into\[0\]",
     lambda a: {"into": (a.into[0], part(a.into[0].view("f4"), 0, 3, 8))}),
)  # fmt: skip
def test_merge_states(case, merge_arguments, xp):
    check(cupyattn.merge_states, merge_arguments, case, xp)
