"""PageTable and PagedKVCache: what they hold, what they refuse, what they say."""

from __future__ import annotations

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest
from problems import STORAGES, build_problem, to_host

from cupyattn.cache import PagedKVCache, PageTable
from cupyattn.plan import look


def i4(*values):
    return np.array(values, np.int32)


class TorchLike:
    """The little of a torch tensor that wrapping looks at: strides are a method and count elements."""

    def __init__(self, *shape, strides, dtype="torch.bfloat16"):
        self.shape, self._strides, self.dtype = shape, strides, TorchLike.DType(dtype)

    class DType:
        itemsize = 2

        def __init__(self, text):
            self.text = text

        def __str__(self):
            return self.text

    def stride(self):
        return self._strides


# PageTable


def test_csr_table():
    kv_indptr, kv_indices, kv_lens = i4(0, 2, 2, 3), i4(5, 1, 4), i4(7, 0, 2)
    table = PageTable(kv_indptr, kv_indices, kv_lens)
    assert table.kv_indptr is kv_indptr  # held, not copied
    assert table.kv_indices is kv_indices
    assert table.kv_lens is kv_lens
    assert table.batch_size == 3
    assert not table.is_dense
    assert repr(table) == "PageTable(CSR, batch_size=3, entries=3, numpy int32)"


def test_dense_table():
    page_table, kv_lens = np.zeros((4, 9), np.int32), i4(1, 2, 3, 0)
    table = PageTable.from_dense(page_table, kv_lens)
    assert table.kv_indices is page_table
    assert table.kv_indptr is None
    assert table.is_dense
    assert repr(table) == "PageTable(dense, batch_size=4, max_pages=9, numpy int32)"


def test_a_dense_table_may_be_part_of_a_larger_one():
    PageTable.from_dense(np.zeros((4, 9), np.int32)[::2, :5], i4(1, 2))


@pytest.mark.parametrize("max_pages", [0, 5])
def test_empty_tables(max_pages):
    assert PageTable.from_dense(np.zeros((0, max_pages), np.int32), i4()).batch_size == 0
    assert PageTable(i4(0), i4(), i4()).batch_size == 0


def test_a_table_is_immutable():
    table = PageTable(i4(0, 1), i4(3), i4(2))
    for name in ("kv_indptr", "kv_lens", "other"):
        with pytest.raises(AttributeError, match=f"PageTable is immutable: cannot set {name}"):
            setattr(table, name, i4(1))
    with pytest.raises(AttributeError, match="cannot delete kv_lens"):
        del table.kv_lens
    table.kv_lens[0] = 1  # its arrays are the caller's


def test_a_cache_is_immutable():
    cache = PagedKVCache.allocate(2, 4, 1, 8)
    for name in ("k_pages", "layout", "other"):
        with pytest.raises(AttributeError, match=f"PagedKVCache is immutable: cannot set {name}"):
            setattr(cache, name, cache.v_pages)
    cache.k_pages[0] = 1  # its arrays are the caller's


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_a_cache_survives_copying(again):
    cache = PagedKVCache.allocate(2, 4, 3, 8, layout="HND")
    cache.k_pages[1] = 1
    look((cache,))  # what was seen of the arrays is not copied
    other = again(cache)
    assert (other.layout, other.k_strides, other.v_strides) == ("HND", cache.k_strides, cache.v_strides)
    assert np.array_equal(other.k_pages, cache.k_pages)
    assert look((other,)) == look((PagedKVCache(other.k_pages, other.v_pages, layout="HND"),))


def test_a_table_survives_pickling():
    table = pickle.loads(pickle.dumps(PageTable(i4(0, 1), i4(3), i4(2))))
    assert (table.kv_indptr.tolist(), table.kv_indices.tolist(), table.kv_lens.tolist()) == ([0, 1], [3], [2])


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ((i4(0, 1), i4(3), [2]), TypeError, "PageTable: kv_lens must be an array .* got list"),
        (([0, 1], i4(3), i4(2)), TypeError, "PageTable: kv_indptr must be an array"),
        ((i4(0, 1), None, i4(2)), TypeError, "PageTable: kv_indices must be an array .* got NoneType"),
        ((i4(0, 1), i4(3), np.array([2])), TypeError, "kv_lens must have dtype int32, got int64"),
        (
            (i4(0, 1), i4(3).astype(np.uint32), i4(2)),
            TypeError,
            "kv_indices must have dtype int32, got uint32",
        ),
        ((i4(0, 1).astype(float), i4(3), i4(2)), TypeError, "kv_indptr must have dtype int32, got float64"),
        (
            (i4(0, 1, 2), i4(3), i4(2)),
            ValueError,
            r"kv_indptr must have shape \[batch \+ 1\] with batch = 1 \(from kv_lens\), got \[3\]",
        ),
        ((i4(), i4(3), i4()), ValueError, r"kv_indptr must have shape \[batch \+ 1\] with batch = 0"),
        (
            (i4(0, 1), i4(3)[None], i4(2)),
            ValueError,
            r"kv_indices must have 1 dimensions \[num_entries\], got 2",
        ),
        ((None, i4(3), i4(2)), ValueError, r"kv_indices must have 2 dimensions \[batch, max_pages\], got 1"),
        (
            (None, np.zeros((3, 2), "i4"), i4(2)),
            ValueError,
            r"kv_indices must have shape \[batch, max_pages\]",
        ),
        (
            (i4(0, 1), i4(3), i4(2)[None]),
            ValueError,
            r"kv_lens must have 1 dimensions \[batch\], got 2 .*\[1, 1\]",
        ),
        (
            (i4(0, 1, 2), i4(3, 4), i4(2, 9, 2, 9)[::2]),
            ValueError,
            "kv_lens must be contiguous along its last",
        ),
        ((None, np.zeros((2, 8), "i4")[:, ::2], i4(2, 2)), ValueError, "kv_indices must be contiguous along"),
    ],
)
def test_bad_tables(arrays, error, message):
    with pytest.raises(error, match=message):
        PageTable(*arrays)


# PagedKVCache


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_sizes(layout):
    shape = (7, 16, 2, 64) if layout == "NHD" else (7, 2, 16, 64)
    k_pages, v_pages = np.zeros((2, *shape), np.float16)
    cache = PagedKVCache(k_pages, v_pages, layout=layout)
    assert cache.k_pages is k_pages
    assert cache.v_pages is v_pages
    assert (cache.num_pages, cache.page_size, cache.num_kv_heads, cache.head_dim) == (7, 16, 2, 64)
    assert cache.dtype == np.float16
    assert cache.nbytes == 2 * 7 * 16 * 2 * 64 * 2
    assert cache.k_strides == ((2048, 128, 64) if layout == "NHD" else (2048, 64, 1024))
    for view, pages in zip(cache.nhd(), (k_pages, v_pages), strict=True):
        assert view.shape == (7, 16, 2, 64)
        assert np.shares_memory(view, pages)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("storage", STORAGES)
def test_strides_address_every_element(layout, storage):
    cache = build_problem(
        [40], page_size=8, storage=storage, layout=layout, dtype="float32", poison=False
    ).cache
    for pages, strides, view in zip(
        (cache.k_pages, cache.v_pages), (cache.k_strides, cache.v_strides), cache.nhd(), strict=True
    ):
        base = pages.base.reshape(-1)
        start = (pages.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // 4
        for index in [(0, 0, 0), (3, 0, 0), (0, 5, 0), (0, 0, 1), (2, 7, 1)]:
            offset = start + sum(i * s for i, s in zip(index, strides, strict=True))
            np.testing.assert_array_equal(base[offset : offset + 64], view[index])


def test_strides_may_differ():
    cache = build_problem([40], storage="strided").cache
    assert cache.k_strides != cache.v_strides


def test_strides_of_torch_tensors():
    k, v = (
        TorchLike(7, 2, 16, 64, strides=(2048, 1024, 64, 1)),
        TorchLike(7, 2, 16, 64, strides=(4096, 2048, 64, 1)),
    )
    cache = PagedKVCache(k, v, layout="HND")
    assert cache.k_strides == (2048, 64, 1024)
    assert cache.v_strides == (4096, 64, 2048)
    assert cache.nbytes == 2 * 7 * 2 * 16 * 64 * 2
    with pytest.raises(ValueError, match="v_pages must be contiguous along its last axis"):
        PagedKVCache(k, TorchLike(7, 2, 16, 64, strides=(2048, 1024, 1, 16)), layout="HND")


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_interleaved(layout):
    kv_pages = np.arange(3 * 2 * 4 * 5 * 8, dtype=np.float32).reshape(3, 2, 4, 5, 8)
    cache = PagedKVCache.from_interleaved(kv_pages, layout=layout)
    np.testing.assert_array_equal(cache.k_pages, kv_pages[:, 0])
    np.testing.assert_array_equal(cache.v_pages, kv_pages[:, 1])
    cache.k_pages[0] = -1
    assert (kv_pages[0, 0] == -1).all()
    assert cache.page_size == (4 if layout == "NHD" else 5)
    assert cache.k_strides[0] == 2 * 4 * 5 * 8


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", ml_dtypes.bfloat16, np.dtype("f2")])
def test_allocate(xp, layout, interleaved, dtype):
    cache = PagedKVCache.allocate(6, 16, 2, 64, dtype=dtype, layout=layout, interleaved=interleaved, xp=xp)
    assert type(cache.k_pages) is xp.ndarray
    assert cache.layout == layout
    assert (cache.num_pages, cache.page_size, cache.num_kv_heads, cache.head_dim) == (6, 16, 2, 64)
    assert cache.dtype == np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert cache.nbytes == 2 * 6 * 16 * 2 * 64 * cache.dtype.itemsize
    assert cache.k_strides[0] == (2 if interleaved else 1) * 16 * 2 * 64
    assert not to_host(cache.k_pages).any()
    assert not to_host(cache.v_pages).any()


def test_allocate_gives_bfloat16_by_default():
    assert PagedKVCache.allocate(1, 1, 1, 8).dtype == ml_dtypes.bfloat16


def test_repr():
    cache = PagedKVCache.allocate(256, 16, 8, 128)
    assert repr(cache) == (
        "PagedKVCache(256 pages x 16 tokens, num_kv_heads=8, head_dim=128, bfloat16, NHD, numpy, 16 MiB)"
    )
    assert repr(PagedKVCache.allocate(1, 1, 1, 64)).endswith("256 B)")
    assert repr(PagedKVCache.allocate(3, 1, 1, 512)).endswith("6 KiB)")


def k(shape=(7, 16, 2, 64), dtype=np.float16):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: PagedKVCache(k(), k(), layout="NDH"),
            ValueError,
            "layout must be 'NHD' or 'HND', got 'NDH'",
        ),
        (lambda: PagedKVCache([1], k()), TypeError, "k_pages must be an array"),
        (lambda: PagedKVCache(k(), None), TypeError, "v_pages must be an array"),
        (lambda: PagedKVCache(k((7, 16, 64)), k()), ValueError, "k_pages must have 4 dimensions"),
        (
            lambda: PagedKVCache(k(), k((7, 8, 2, 64))),
            ValueError,
            r"v_pages must have shape \[num_pages, page_size, num_kv_heads, head_dim\] with .*"
            r"page_size = 16 \(from k_pages\).*, got \[7, 8, 2, 64\]",
        ),
        (lambda: PagedKVCache(k(), k((8, 16, 2, 64))), ValueError, "v_pages must have shape"),
        (lambda: PagedKVCache(k(), k((7, 16, 4, 64))), ValueError, "v_pages must have shape"),
        (lambda: PagedKVCache(k(), k((7, 16, 2, 128))), ValueError, "v_pages must have shape"),
        (lambda: PagedKVCache(k((7, 0, 2, 64)), k((7, 0, 2, 64))), ValueError, "k_pages must have page_size"),
        (
            lambda: PagedKVCache(k(dtype="f8"), k()),
            TypeError,
            "k_pages must have dtype .*bfloat16.*got float64",
        ),
        (lambda: PagedKVCache(k(dtype="u1"), k(dtype="u1")), TypeError, "k_pages must have dtype"),
        (
            lambda: PagedKVCache(k(), k(dtype="f4")),
            TypeError,
            "v_pages must have the dtype of k_pages, float16",
        ),
        (
            lambda: PagedKVCache(k((7, 16, 2, 128))[..., ::2], k()),
            ValueError,
            "k_pages must be contiguous along its last axis",
        ),
        (
            lambda: PagedKVCache(k(), k((7, 16, 64, 2)).swapaxes(2, 3)),
            ValueError,
            "v_pages must be contiguous",
        ),
        (lambda: PagedKVCache.from_interleaved(k((7, 3, 16, 2, 64))), ValueError, "kv_pages must have shape"),
        (lambda: PagedKVCache.from_interleaved(k()), ValueError, "kv_pages must have 5 dimensions"),
        (
            lambda: PagedKVCache.allocate(1, 1, 1, 8, dtype="int8"),
            TypeError,
            "dtype must be one of .*, got int8",
        ),
        (lambda: PagedKVCache.allocate(1, 1, 1, 8, layout="nhd"), ValueError, "layout must be"),
        (lambda: PagedKVCache.allocate(1, 0, 1, 8), ValueError, "page_size"),
    ],
)
def test_bad_caches(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_copy_pages(xp, layout, storage, dtype):
    problem = build_problem(
        [100], page_size=8, layout=layout, storage=storage, dtype=dtype, poison=False, xp=xp
    )
    expected = [to_host(base).copy() for base in problem.bases]
    for pages in [
        problem.replace(bases=tuple(expected)).k_pages,
        problem.replace(bases=tuple(expected)).v_pages,
    ]:
        pages[7], pages[0] = pages[2].copy(), pages[11].copy()
    problem.cache.copy_pages([2, 11], (7, 0))
    for base, wanted in zip(problem.bases, expected, strict=True):
        np.testing.assert_array_equal(to_host(base), wanted)


def test_copy_no_pages():
    PagedKVCache.allocate(0, 4, 1, 8).copy_pages([], [])


@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "message"),
    [
        ([1], [1, 2], "of one length"),
        ([1], [4], r"dst_ids must be within 0\.\.3, got 4"),
        ([-1], [2], r"src_ids must be within 0\.\.3, got -1"),
        ([0, 1], [2, 2], "distinct"),
        ([0, 1], [1, 2], "not among src_ids"),
        ([1], [1], "not among src_ids"),
    ],
)
def test_bad_copies(src_ids, dst_ids, message):
    cache = PagedKVCache.allocate(4, 1, 1, 8, dtype="float32")
    cache.k_pages[...] = before = np.arange(4, dtype="f4").reshape(4, 1, 1, 1)
    with pytest.raises(ValueError, match=message):
        cache.copy_pages(src_ids, dst_ids)
    assert (cache.k_pages == before).all()
