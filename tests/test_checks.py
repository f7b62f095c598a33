"""Argument checks: what passes, what is refused, and that a message names argument, pattern and what came."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from problems import POISON_PAGE, build_problem

from cupyattn import checks
from cupyattn.cache import PageTable


def a(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def i4(*values):
    return np.array(values, np.int32)


# check_arrays


def test_sizes_are_bound_across_arguments():
    sizes = checks.check_arrays(
        "decode",
        {
            "q": (a(3, 8, 64), "batch heads head_dim"),
            "k_pages": (a(9, 16, 2, 64), "num_pages page_size kv_heads head_dim"),
            "kv_indptr": (a(4), "batch+1"),
            "kv": (a(3, 2, 64), "batch 2 head_dim"),
        },
    )
    assert sizes == {
        "batch": 3,
        "heads": 8,
        "head_dim": 64,
        "num_pages": 9,
        "page_size": 16,
        "kv_heads": 2,
    }


def test_given_sizes():
    assert checks.check_arrays("f", {"x": (a(3, 4), "n d")}, {"d": 4}) == {"n": 3, "d": 4}
    with pytest.raises(
        ValueError, match=r"f: x must have shape \[n, d\] with n = 3 \(from x\), d = 5, got \[3, 4\]"
    ):
        checks.check_arrays("f", {"x": (a(3, 4), "n d")}, {"d": 5})


def test_a_sum_may_bind_the_name():
    assert checks.check_arrays("f", {"indptr": (a(1), "batch+1"), "lens": (a(0), "batch")}) == {"batch": 0}


def test_a_repeated_name_within_one_pattern():
    assert checks.check_arrays("f", {"x": (a(5, 5), "n n")}) == {"n": 5}
    with pytest.raises(ValueError, match=r"x must have shape \[n, n\] with n = 5"):
        checks.check_arrays("f", {"x": (a(5, 6), "n n")})


def test_scalars_and_no_arguments():
    assert checks.check_arrays("f", {"x": (np.zeros(()), "")}) == {}
    assert checks.check_arrays("f", {}) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"q": (a(3, 8, 64), "batch heads d"), "out": (a(3, 8, 128), "batch heads d")},
            r"decode: out must have shape \[batch, heads, d\] with "
            r"batch = 3 \(from q\), heads = 8 \(from q\), d = 64 \(from q\), got \[3, 8, 128\]",
        ),
        (
            {"q": (a(3, 8), "batch heads d")},
            r"q must have 3 dimensions \[batch, heads, d\], got 2 dimensions \[3, 8\]",
        ),
        ({"q": (a(), "n")}, r"q must have 1 dimensions \[n\], got 0 dimensions \[\]"),
        ({"kv": (a(3, 3), "n 2")}, r"kv must have shape \[n, 2\] with n = 3 \(from kv\), got \[3, 3\]"),
        ({"kv": (a(3), "2")}, r"kv must have shape \[2\], got \[3\]"),
        ({"indptr": (a(0), "batch+1")}, r"indptr must have shape \[batch \+ 1\], got \[0\]"),
        (
            {"lens": (a(2), "b"), "indptr": (a(2), "b+1")},
            r"indptr must have shape \[b \+ 1\] with b = 2 \(from lens\)",
        ),
    ],
)
def test_wrong_shapes(arguments, message):
    with pytest.raises(ValueError, match=message):
        checks.check_arrays("decode", arguments)


@pytest.mark.parametrize("thing", [None, [1.0], 3, "q"])
def test_not_an_array(thing):
    with pytest.raises(TypeError, match=rf"decode: q must be an array .* got {type(thing).__name__}"):
        checks.check_arrays("decode", {"q": (thing, "n")})


def test_bad_patterns_are_noticed():
    with pytest.raises(ValueError, match="bad dimension '-1'"):
        checks.check_arrays("f", {"x": (a(3), "-1")})


# Dtypes


class TorchDtype:
    itemsize = 2

    def __str__(self):
        return "torch.bfloat16"


class Torch:
    shape = (2, 3)
    dtype = TorchDtype()

    def stride(self):
        return (4, 1)


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (a(1), "float32"),
        (a(1, dtype=ml_dtypes.bfloat16), "bfloat16"),
        (a(1, dtype=">f4"), "float32"),
        (np.dtype(ml_dtypes.bfloat16), "bfloat16"),
        (np.dtype("i4"), "int32"),
        (a(1, dtype=bool), "bool"),
        (Torch(), "bfloat16"),
        (Torch.dtype, "bfloat16"),
        ("float16", "float16"),
    ],
)
def test_dtype_name(thing, name):
    assert checks.dtype_name(thing) == name


def test_check_dtype():
    checks.check_dtype("q", a(1), "float32")
    checks.check_dtype("q", Torch(), ("float16", "bfloat16"))
    with pytest.raises(TypeError, match=r"^decode: q must have dtype float16 or bfloat16, got float32$"):
        checks.check_dtype("decode: q", a(1), ("float16", "bfloat16"))
    checks.check_same_dtype("q", a(1), "k", a(2))
    with pytest.raises(TypeError, match="q must have the dtype of k, float16, got float32"):
        checks.check_same_dtype("q", a(1), "k", a(2, dtype="f2"))


# Strides


def test_element_strides():
    assert checks.element_strides(a(2, 3, 4)) == (12, 4, 1)
    assert checks.element_strides(a(2, 3, 4)[:, ::2].swapaxes(0, 2)) == (1, 8, 12)
    assert checks.element_strides(a(4, dtype="f2")[::-1]) == (-1,)
    assert checks.element_strides(Torch()) == (4, 1)
    no_strides = type("Jax", (), {"shape": (2, 3, 4)})
    assert checks.element_strides(no_strides()) == (12, 4, 1)
    field = np.zeros(3, np.dtype([("x", "f4"), ("y", "i1")]))["x"]
    with pytest.raises(ValueError, match=r"multiples of the item size 4, got \[5\]"):
        checks.element_strides(field)


def test_last_axis_contiguous():
    checks.check_last_axis_contiguous("q", a(2, 3)[::2])
    checks.check_last_axis_contiguous("q", a(3, 1, 2).swapaxes(0, 2)[:, :, :1])  # one element is contiguous
    checks.check_last_axis_contiguous("q", a(0, 4)[:, ::2])  # so is none
    for bad in (a(2, 6)[:, ::2], a(2, 3).T, a(3, 4)[:, ::-1]):
        with pytest.raises(ValueError, match=r"q must be contiguous along its last axis, got strides \["):
            checks.check_last_axis_contiguous("q", bad)


def test_writable():
    checks.check_writable("out", a(3))
    checks.check_writable("out", Torch())
    with pytest.raises(ValueError, match="out must be writable, got a read-only array"):
        checks.check_writable("out", np.broadcast_to(a(1), 3))


def test_divisible():
    checks.check_divisible("num_qo_heads", 12, "num_kv_heads", 4)
    with pytest.raises(
        ValueError, match="num_qo_heads must be a positive multiple of num_kv_heads = 4, got 10"
    ):
        checks.check_divisible("num_qo_heads", 10, "num_kv_heads", 4)
    with pytest.raises(ValueError, match="num_kv_heads = 0"):
        checks.check_divisible("num_qo_heads", 10, "num_kv_heads", 0)
    with pytest.raises(ValueError, match="got 0"):
        checks.check_divisible("num_qo_heads", 0, "num_kv_heads", 4)


# Overlap

BUFFER = a(8, 6)


@pytest.mark.parametrize(
    ("x", "y", "shared"),
    [
        (BUFFER, BUFFER, True),
        (BUFFER, a(8, 6), False),
        (BUFFER[:4], BUFFER[4:], False),
        (BUFFER[:5], BUFFER[4:], True),
        (BUFFER[:, :3], BUFFER[:, 3:], False),  # ranges intersect, elements do not
        (BUFFER[:, :4], BUFFER[:, 3:], True),
        (BUFFER[::2], BUFFER[1::2], False),
        (BUFFER[::-1], BUFFER[:1], True),
        (BUFFER[:0], BUFFER, False),
        (BUFFER, BUFFER.view(np.int16), True),
        (BUFFER[:, :1], BUFFER.view(np.int16)[:, 2:4], False),
    ],
)
def test_overlap(x, y, shared):
    assert checks.shares_memory(x, y) is shared
    assert checks.shares_memory(y, x) is shared
    if shared:
        with pytest.raises(ValueError, match="decode: out must not overlap q in memory"):
            checks.check_overlap("decode: out", x, "q", y)
    else:
        checks.check_overlap("decode: out", x, "q", y)


def test_overlap_is_found_by_address_alone():
    """As for arrays on a device, whose memory the host cannot read."""

    class Device:
        def __init__(self, pointer, *shape):
            self.shape, self.dtype = shape, np.dtype("f2")
            self.strides = (shape[1] * 2, 2)
            self.data = type("Pointer", (), {"ptr": pointer})()

    assert checks.shares_memory(Device(0x7F0000000000, 4, 8), Device(0x7F0000000000 + 62, 1, 8))
    assert not checks.shares_memory(Device(0x7F0000000000, 4, 8), Device(0x7F0000000000 + 64, 1, 8))


def test_overlap_on_the_device(gpu):
    buffer = gpu.zeros((8, 6), "f2")
    assert checks.shares_memory(buffer[:, :4], buffer[:, 3:])
    assert not checks.shares_memory(buffer[:, :3], buffer[:, 3:])


# validate_pages

SIZES = {"page_size": 4, "num_pages": 10}


def tables(rows, lens):
    """The same table both ways."""
    indptr = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    width = max(map(len, rows), default=0)
    dense = np.array([[*row, *[POISON_PAGE] * (width - len(row))] for row in rows], np.int32).reshape(
        len(rows), width
    )
    flat = np.array([page for row in rows for page in row], np.int32)
    return [PageTable(indptr, flat, i4(*lens)), PageTable.from_dense(dense, i4(*lens))]


@pytest.mark.parametrize(
    ("rows", "lens"),
    [
        ([], []),
        ([[]], [0]),
        ([[0, 9]], [8]),
        ([[0, 9]], [5]),
        ([[0, 9, POISON_PAGE]], [8]),
        ([[-1]], [0]),
        ([[3], [], [3, 4]], [4, 0, 7]),
    ],
)
def test_good_pages(rows, lens):
    for pages in tables(rows, lens):
        checks.validate_pages("decode", pages, **SIZES)


@pytest.mark.parametrize(
    ("rows", "lens", "message"),
    [
        ([[3], [4]], [1, -1], r"decode: kv_lens must be at least 0, got kv_lens\[1\] = -1"),
        (
            [[3, 4], [4]],
            [2, 5],
            r"kv_lens\[1\] = 5 needs 2 pages of 4 tokens, but its row of the page table has",
        ),
        ([[]], [1], r"kv_lens\[0\] = 1 needs 1 pages"),
        ([[3, 4]], [2**31 - 1], r"needs 536870912 pages"),
        ([[3, 10]], [5], r"kv_indices must be within 0\.\.9, got 10 as page 1 of request 0"),
        ([[3], [1, -1]], [1, 5], r"kv_indices must be within 0\.\.9, got -1 as page 1 of request 1"),
        ([[3], [POISON_PAGE, 1]], [1, 5], f"got {POISON_PAGE} as page 0 of request 1"),
    ],
)
def test_bad_pages(rows, lens, message):
    for pages in tables(rows, lens):
        if pages.is_dense and "but its row" in message and len(rows) > 1:
            continue  # a dense table has room for the longest row in every row
        with pytest.raises(ValueError, match=message):
            checks.validate_pages("decode", pages, **SIZES)


@pytest.mark.parametrize(
    ("kv_indptr", "message"),
    [
        ((0, 2, 1), "kv_indptr must not decrease, got 2 followed by 1 at index 1"),
        ((-1, 0, 1), r"kv_indptr\[0\] must be at least 0, got -1"),
        ((0, 1, 9), r"kv_indptr\[-1\] must be at most the number of entries, 3, got 9"),
    ],
)
def test_bad_kv_indptr(kv_indptr, message):
    with pytest.raises(ValueError, match=message):
        checks.validate_pages("decode", PageTable(i4(*kv_indptr), i4(1, 2, 3), i4(0, 0)), **SIZES)


def test_a_slice_of_a_csr_table_is_good():
    checks.validate_pages("decode", PageTable(i4(1, 2, 3), i4(POISON_PAGE, 2, 3), i4(4, 1)), **SIZES)


@pytest.mark.parametrize(
    ("qo_indptr", "message"),
    [
        ((0, 2, 5), r"append: qo_indptr\[-1\] must be the number of tokens, 4, got 5"),
        ((0, 2, 3), r"qo_indptr\[-1\] must be the number of tokens, 4, got 3"),
        ((1, 2, 4), r"qo_indptr\[0\] must be 0, got 1"),
        ((0, 5, 4), "qo_indptr must not decrease"),
    ],
)
def test_bad_qo_indptr(qo_indptr, message):
    pages = PageTable(i4(0, 1, 2), i4(1, 2), i4(3, 3))
    checks.validate_pages("append", pages, **SIZES, qo_indptr=i4(0, 2, 4), num_tokens=4)
    with pytest.raises(ValueError, match=message):
        checks.validate_pages("append", pages, **SIZES, qo_indptr=i4(*qo_indptr), num_tokens=4)


@pytest.mark.parametrize("qo_lens", [None, [3, 1, 2, 70]])
def test_pages_before_the_window_may_be_gone(qo_lens):
    """A sliding-window cache gives its old pages back; their entries are stale."""
    problem = build_problem([100, 0, 17, 64], window_left=9, page_size=4, qo_lens=qo_lens)
    sizes = {"page_size": 4, "num_pages": problem.cache.num_pages}
    queries = {"qo_indptr": problem.qo_indptr, "num_tokens": len(problem.q)} if qo_lens else {}
    checks.validate_pages("decode", problem.pages, **sizes, **queries, window_left=9)
    with pytest.raises(ValueError, match=f"got {POISON_PAGE} as page 2[12] of request 0"):
        checks.validate_pages("decode", problem.pages, **sizes, **queries, window_left=13)


def test_the_window_of_the_first_query_counts():
    """8 queries at positions 92 to 99 with 9 keys before them see tokens from 83 on: page 20 of 4 tokens."""
    kv_indices = np.zeros((1, 25), np.int32)
    pages = PageTable.from_dense(kv_indices, i4(100))
    queries = {"qo_indptr": i4(0, 8), "num_tokens": 8, "window_left": 9}
    kv_indices[0, :20] = POISON_PAGE
    checks.validate_pages("decode", pages, **SIZES, **queries)
    kv_indices[0, 20] = POISON_PAGE
    with pytest.raises(ValueError, match=f"got {POISON_PAGE} as page 20 of request 0"):
        checks.validate_pages("decode", pages, **SIZES, **queries)


def test_validate_on_the_device(gpu):
    pages = PageTable(gpu.asarray(i4(0, 2)), gpu.asarray(i4(3, 10)), gpu.asarray(i4(5)))
    with pytest.raises(ValueError, match="got 10 as page 1"):
        checks.validate_pages("decode", pages, **SIZES)


# Frameworks, pairs


def test_same_framework():
    checks.check_same_framework("decode", {"q": a(1), "out": None, "k_pages": a(2)})
    with pytest.raises(
        TypeError, match="decode: k_pages must be a numpy array as q is, got a test_checks array"
    ):
        checks.check_same_framework("decode", {"q": a(1), "out": None, "k_pages": Torch()})
    with pytest.raises(TypeError, match="decode: q must be an array"):
        checks.check_same_framework("decode", {"q": [1.0]})


def test_aligned_strides():
    checks.check_aligned_strides("k_pages", a(3, 2, 8, dtype="f2"))
    checks.check_aligned_strides(
        "k_pages", a(3, 1, 12, dtype="f2")[:1, :, :8]
    )  # strides of single rows are free
    with pytest.raises(
        ValueError, match=r"k_pages must have strides that are multiples of 16 bytes, got \[48, 24, 2\]"
    ):
        checks.check_aligned_strides("k_pages", a(3, 2, 12, dtype="f2")[..., :8])


@pytest.mark.parametrize("pair", [(1,), (1, 2, 3), a(2, 3), None])
def test_not_a_pair(pair):
    assert checks.as_pair("decode", (1, 2)) == (1, 2)
    assert checks.as_pair("decode", [1, 2]) == (1, 2)
    with pytest.raises(
        TypeError, match=r"decode: cache must be a PagedKVCache or a pair \(k_pages, v_pages\), got"
    ):
        checks.as_pair("decode", pair)


def test_same_device(gpu):
    assert checks.check_same_device("decode", {"q": gpu.zeros(1), "out": None}) == gpu.cuda.Device().id
    if gpu.cuda.runtime.getDeviceCount() > 1:
        with gpu.cuda.Device(1):
            elsewhere = gpu.zeros(1)
        with pytest.raises(ValueError, match="decode: k_pages must be on device 0 as q is, got device 1"):
            checks.check_same_device("decode", {"q": gpu.zeros(1), "k_pages": elsewhere})
