"""The paged cache: where tokens live, and who has which page (`PageTable`, `PageAllocator`).

Token ``t`` of request ``b`` lives in slot ``t % page_size`` of the page that entry ``t // page_size`` of the
request's row of the page table names. Page ids and table entries are int32; offsets into a cache are 64-bit.
"""

from __future__ import annotations

import functools
import itertools
import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from cupyattn import checks
from cupyattn.plan import ArrayGroup

_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


class PageTable(ArrayGroup):
    """Which pages hold each request's tokens, and how many there are.

    Immutable; arrays are held as given. Their values may change in place, their shapes, strides and addresses
    must not: calls look at those once.

    Parameters
    ----------
    kv_indptr : array, shape [batch + 1], int32, or None
        Request ``b`` has entries ``kv_indptr[b] .. kv_indptr[b + 1] - 1`` of `kv_indices`. None if dense.
    kv_indices : array, shape [num_entries], int32
        Page ids; ``[batch, max_pages]``, rows of any stride, where `kv_indptr` is None. Entries past a
        request's last page in use may hold anything.
    kv_lens : array, shape [batch], int32
        Tokens of each request; 0 is allowed.

    Raises
    ------
    TypeError
        An argument is not an array, or not int32.
    ValueError
        Shapes do not go together, or a last axis is not contiguous. Values are not looked at: they may live
        on a device and change between calls (see ``validate=True`` of `decode`).

    Examples
    --------
    Request 0 has 5 tokens in pages 7 and 2, request 1 has 3 tokens in page 4 (`page_size` 4).

    >>> csr = PageTable(np.array([0, 2, 3], "int32"), np.array([7, 2, 4], "int32"), np.array([5, 3], "int32"))
    >>> dense = PageTable.from_dense(np.array([[7, 2], [4, -1]], "int32"), np.array([5, 3], "int32"))
    >>> csr.batch_size, csr.is_dense, dense.is_dense
    (2, False, True)
    """

    __slots__ = ("kv_indices", "kv_indptr", "kv_lens")

    kv_indptr: Any
    kv_indices: Any
    kv_lens: Any

    def __init__(self, kv_indptr: Any, kv_indices: Any, kv_lens: Any) -> None:
        signature = {"kv_lens": (kv_lens, "batch")}
        if kv_indptr is None:
            signature["kv_indices"] = (kv_indices, "batch max_pages")
        else:
            signature["kv_indptr"] = (kv_indptr, "batch+1")
            signature["kv_indices"] = (kv_indices, "num_entries")
        checks.check_arrays("PageTable", signature)
        for name, (a, _) in signature.items():
            checks.check_dtype(f"PageTable: {name}", a, "int32")
            checks.check_last_axis_contiguous(f"PageTable: {name}", a)
        super().__init__({"kv_indptr": kv_indptr, "kv_indices": kv_indices, "kv_lens": kv_lens})

    @classmethod
    def from_dense(cls, page_table: Any, kv_lens: Any) -> PageTable:
        """Make a table with one row per request: `page_table` has shape [batch, max_pages], int32."""
        return cls(None, page_table, kv_lens)

    def __reduce__(self) -> tuple[Any, ...]:
        return PageTable, (self.kv_indptr, self.kv_indices, self.kv_lens)

    @property
    def batch_size(self) -> int:
        """Number of requests."""
        return int(self.kv_lens.shape[0])

    @property
    def is_dense(self) -> bool:
        """Whether the table has one row per request instead of offsets."""
        return self.kv_indptr is None

    def __repr__(self) -> str:  # shapes only: printing must not wait for a device
        module = type(self.kv_lens).__module__.partition(".")[0]
        entries = (
            f"max_pages={self.kv_indices.shape[1]}"
            if self.is_dense
            else f"entries={self.kv_indices.shape[0]}"
        )
        kind = "dense" if self.is_dense else "CSR"
        return f"PageTable({kind}, batch_size={self.batch_size}, {entries}, {module} int32)"


class PagedKVCache(ArrayGroup):
    """Keys and values of one layer, in pages. Wraps existing arrays without copying.

    Immutable. The arrays' values may change in place, their shapes, strides and addresses must not: calls look
    at those once.

    Parameters
    ----------
    k_pages, v_pages : array, shape [num_pages, page_size, num_kv_heads, head_dim], float16/bfloat16/float32
        ``[num_pages, num_kv_heads, page_size, head_dim]`` with ``layout="HND"``. Any strides, different ones
        for K and V if need be, as long as the last axis is contiguous. float32 works on NumPy only.
    layout : {"NHD", "HND"}
        Order of the token and head axes.

    Raises
    ------
    TypeError
        An argument is not an array, or its dtype is not supported, or K and V differ in dtype.
    ValueError
        A shape, a stride or `layout` is wrong.
    """

    __slots__ = ("k_pages", "k_strides", "layout", "v_pages", "v_strides")

    k_pages: Any
    v_pages: Any
    layout: str
    #: Strides in elements over (page, token, head), whatever the layout.
    k_strides: tuple[int, int, int]
    v_strides: tuple[int, int, int]

    def __init__(self, k_pages: Any, v_pages: Any, *, layout: str = "NHD") -> None:
        if layout not in ("NHD", "HND"):
            raise ValueError(f"PagedKVCache: layout must be 'NHD' or 'HND', got {layout!r}")
        inner = "page_size num_kv_heads" if layout == "NHD" else "num_kv_heads page_size"
        pattern = f"num_pages {inner} head_dim"
        checks.check_arrays("PagedKVCache", {"k_pages": (k_pages, pattern), "v_pages": (v_pages, pattern)})
        checks.check_dtype("PagedKVCache: k_pages", k_pages, tuple(_DTYPES))
        checks.check_same_dtype("PagedKVCache: v_pages", v_pages, "k_pages", k_pages)
        checks.check_last_axis_contiguous("PagedKVCache: k_pages", k_pages)
        checks.check_last_axis_contiguous("PagedKVCache: v_pages", v_pages)
        if 0 in k_pages.shape[1:]:
            raise ValueError(
                f"PagedKVCache: k_pages must have page_size, num_kv_heads and head_dim of at least 1, "
                f"got shape {list(k_pages.shape)}"
            )
        super().__init__(
            {"k_pages": k_pages, "v_pages": v_pages},
            layout=layout,
            k_strides=_page_token_head(checks.element_strides(k_pages), layout),
            v_strides=_page_token_head(checks.element_strides(v_pages), layout),
        )

    @classmethod
    def from_interleaved(cls, kv_pages: Any, *, layout: str = "NHD") -> PagedKVCache:
        """Wrap one array ``[num_pages, 2, ...]``: K is ``kv_pages[:, 0]`` and V is ``kv_pages[:, 1]``."""
        inner = "page_size num_kv_heads" if layout == "NHD" else "num_kv_heads page_size"
        pattern = f"num_pages 2 {inner} head_dim"
        checks.check_arrays("PagedKVCache.from_interleaved", {"kv_pages": (kv_pages, pattern)})
        return cls(kv_pages[:, 0], kv_pages[:, 1], layout=layout)

    @classmethod
    def allocate(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: Any = "bfloat16",
        layout: str = "NHD",
        interleaved: bool = False,
        xp: Any = np,
    ) -> PagedKVCache:
        """Make a cache of zeros.

        Parameters
        ----------
        num_pages, page_size, num_kv_heads, head_dim : int
        dtype : {"bfloat16", "float16", "float32"} or dtype
        layout : {"NHD", "HND"}
        interleaved : bool
            Keep K and V of a page side by side in one array (see `from_interleaved`), else in two arrays.
        xp : module
            ``numpy`` or ``cupy``.

        Raises
        ------
        ValueError, TypeError
            As the constructor.
        """
        name = checks.dtype_name(np.dtype(dtype) if isinstance(dtype, type) else dtype)
        if name not in _DTYPES:
            raise TypeError(f"PagedKVCache.allocate: dtype must be one of {', '.join(_DTYPES)}, got {name}")
        if layout not in ("NHD", "HND"):
            raise ValueError(f"PagedKVCache.allocate: layout must be 'NHD' or 'HND', got {layout!r}")
        inner = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
        if interleaved:
            return cls.from_interleaved(
                xp.zeros((num_pages, 2, *inner, head_dim), _DTYPES[name]), layout=layout
            )
        shape = (num_pages, *inner, head_dim)
        return cls(xp.zeros(shape, _DTYPES[name]), xp.zeros(shape, _DTYPES[name]), layout=layout)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(PagedKVCache, layout=self.layout), (self.k_pages, self.v_pages)

    @property
    def num_pages(self) -> int:
        """Number of pages."""
        return int(self.k_pages.shape[0])

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return int(self.k_pages.shape[1 if self.layout == "NHD" else 2])

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads."""
        return int(self.k_pages.shape[2 if self.layout == "NHD" else 1])

    @property
    def head_dim(self) -> int:
        """Size of one head's vectors."""
        return int(self.k_pages.shape[3])

    @property
    def dtype(self) -> Any:
        """Dtype of the pages, as their framework has it."""
        return self.k_pages.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of K and V together."""
        return 2 * int(math.prod(self.k_pages.shape)) * int(self.dtype.itemsize)

    def nhd(self) -> tuple[Any, Any]:
        """K and V as views of shape [num_pages, page_size, num_kv_heads, head_dim], whatever the layout."""
        if self.layout == "NHD":
            return self.k_pages, self.v_pages
        return self.k_pages.swapaxes(1, 2), self.v_pages.swapaxes(1, 2)

    def copy_pages(self, src_ids: Sequence[int], dst_ids: Sequence[int]) -> None:
        """Copy page ``src_ids[i]`` onto page ``dst_ids[i]``, K and V, for every ``i`` at once.

        Parameters
        ----------
        src_ids, dst_ids : sequence of int
            As `PageAllocator.extend` returns them.

        Raises
        ------
        ValueError
            The two differ in length, an id is not in ``0 .. num_pages - 1``, a destination comes twice or is
            a source too (then the order would matter).
        """
        _copy_pages((self.k_pages, self.v_pages), src_ids, dst_ids)

    def __repr__(self) -> str:
        module = type(self.k_pages).__module__.partition(".")[0]
        return (
            f"PagedKVCache({self.num_pages} pages x {self.page_size} tokens, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"{checks.dtype_name(self.dtype)}, {self.layout}, {module}, {_readable(self.nbytes)})"
        )


class PagedMLACache(ArrayGroup):
    """Latent rows of one layer of multi-head latent attention (DeepSeek), in pages. Wraps arrays without copying.

    A token's row is its compressed latent vector `ckv`, which is key and value of all heads, and the part of the key
    that carries the position, `kpe`. Immutable, as `PagedKVCache` is.

    Parameters
    ----------
    ckv_pages : array, shape [num_pages, page_size, ckv_dim], float16/bfloat16/float32
        Any strides, as long as the last axis is contiguous. On a GPU `ckv_dim` is 512, and float32 does not work.
    kpe_pages : array, shape [num_pages, page_size, kpe_dim]
        Of the same dtype; rotated. On a GPU `kpe_dim` is 64.

    Raises
    ------
    TypeError
        An argument is not an array, or its dtype is not supported, or the two differ in dtype.
    ValueError
        A shape or a stride is wrong.

    Notes
    -----
    DeepSeek-V2, arXiv:2405.04434, section 2.1.

    Examples
    --------
    >>> cache = PagedMLACache.allocate(4, 16, dtype="float16")
    >>> cache.ckv_pages.shape, cache.kpe_pages.shape, cache.nbytes
    ((4, 16, 512), (4, 16, 64), 73728)
    """

    __slots__ = ("ckv_pages", "kpe_pages")

    ckv_pages: Any
    kpe_pages: Any

    def __init__(self, ckv_pages: Any, kpe_pages: Any) -> None:
        checks.check_arrays(
            "PagedMLACache",
            {
                "ckv_pages": (ckv_pages, "num_pages page_size ckv_dim"),
                "kpe_pages": (kpe_pages, "num_pages page_size kpe_dim"),
            },
        )
        checks.check_dtype("PagedMLACache: ckv_pages", ckv_pages, tuple(_DTYPES))
        checks.check_same_dtype("PagedMLACache: kpe_pages", kpe_pages, "ckv_pages", ckv_pages)
        for name, a in (("ckv_pages", ckv_pages), ("kpe_pages", kpe_pages)):
            checks.check_last_axis_contiguous(f"PagedMLACache: {name}", a)
            if 0 in a.shape[1:]:
                raise ValueError(
                    f"PagedMLACache: {name} must have page_size and dimensions of at least 1, got shape {list(a.shape)}"
                )
        super().__init__({"ckv_pages": ckv_pages, "kpe_pages": kpe_pages})

    @classmethod
    def from_concatenated(cls, pages: Any, *, ckv_dim: int = 512) -> PagedMLACache:
        """Wrap one array [num_pages, page_size, ckv_dim + kpe_dim], a token's ckv and kpe side by side."""
        checks.check_arrays(
            "PagedMLACache.from_concatenated", {"pages": (pages, "num_pages page_size row_dim")}
        )
        if not 0 < ckv_dim < pages.shape[2]:
            raise ValueError(
                f"PagedMLACache.from_concatenated: ckv_dim must be within 1..{pages.shape[2] - 1}, got {ckv_dim}"
            )
        return cls(pages[..., :ckv_dim], pages[..., ckv_dim:])

    @classmethod
    def allocate(
        cls,
        num_pages: int,
        page_size: int,
        *,
        ckv_dim: int = 512,
        kpe_dim: int = 64,
        dtype: Any = "bfloat16",
        xp: Any = np,
    ) -> PagedMLACache:
        """Make a cache of zeros, in one array, with a token's ckv and kpe side by side.

        Parameters
        ----------
        num_pages, page_size, ckv_dim, kpe_dim : int
        dtype : {"bfloat16", "float16", "float32"} or dtype
        xp : module
            ``numpy`` or ``cupy``.

        Raises
        ------
        ValueError, TypeError
            As the constructor.
        """
        name = checks.dtype_name(np.dtype(dtype) if isinstance(dtype, type) else dtype)
        if name not in _DTYPES:
            raise TypeError(f"PagedMLACache.allocate: dtype must be one of {', '.join(_DTYPES)}, got {name}")
        pages = xp.zeros((num_pages, page_size, ckv_dim + kpe_dim), _DTYPES[name])
        return cls.from_concatenated(pages, ckv_dim=ckv_dim)

    def __reduce__(self) -> tuple[Any, ...]:
        return PagedMLACache, (self.ckv_pages, self.kpe_pages)

    @property
    def num_pages(self) -> int:
        """Number of pages."""
        return int(self.ckv_pages.shape[0])

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return int(self.ckv_pages.shape[1])

    @property
    def ckv_dim(self) -> int:
        """Size of the latent vectors."""
        return int(self.ckv_pages.shape[2])

    @property
    def kpe_dim(self) -> int:
        """Size of the rotated part of the key."""
        return int(self.kpe_pages.shape[2])

    @property
    def dtype(self) -> Any:
        """Dtype of the pages, as their framework has it."""
        return self.ckv_pages.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.num_pages * self.page_size * (self.ckv_dim + self.kpe_dim) * int(self.dtype.itemsize)

    def copy_pages(self, src_ids: Sequence[int], dst_ids: Sequence[int]) -> None:
        """Copy page ``src_ids[i]`` onto page ``dst_ids[i]`` for every ``i`` at once; see `PagedKVCache.copy_pages`."""
        _copy_pages((self.ckv_pages, self.kpe_pages), src_ids, dst_ids)

    def __repr__(self) -> str:
        module = type(self.ckv_pages).__module__.partition(".")[0]
        return (
            f"PagedMLACache({self.num_pages} pages x {self.page_size} tokens, ckv_dim={self.ckv_dim}, "
            f"kpe_dim={self.kpe_dim}, {checks.dtype_name(self.dtype)}, {module}, {_readable(self.nbytes)})"
        )


def _copy_pages(arrays: Sequence[Any], src_ids: Sequence[int], dst_ids: Sequence[int]) -> None:
    num_pages = int(arrays[0].shape[0])
    src, dst = [int(i) for i in src_ids], [int(i) for i in dst_ids]
    if len(src) != len(dst):
        raise ValueError(
            f"copy_pages: src_ids and dst_ids must be of one length, got {len(src)} and {len(dst)}"
        )
    for name, ids in (("src_ids", src), ("dst_ids", dst)):
        bad = next((i for i in ids if not 0 <= i < num_pages), None)
        if bad is not None:
            raise ValueError(f"copy_pages: {name} must be within 0..{num_pages - 1}, got {bad}")
    if len(set(dst)) < len(dst) or not set(src).isdisjoint(dst):
        raise ValueError(f"copy_pages: dst_ids must be distinct and not among src_ids, got {src} -> {dst}")
    if not src:
        return
    for pages in arrays:
        # Copied as bits where views allow, which needs no bfloat16 support of the framework.
        bits = pages.view(np.uint16) if hasattr(pages, "strides") and pages.dtype.itemsize == 2 else pages
        bits[dst] = bits[src]


def _readable(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"


def _page_token_head(strides: tuple[int, ...], layout: str) -> tuple[int, int, int]:
    page, token, head, _ = strides
    return (page, token, head) if layout == "NHD" else (page, head, token)


class PagePair(ArrayGroup):
    """What a caller gave as a plain pair (k_pages, v_pages); not checked yet."""

    __slots__ = ("k_pages", "v_pages")

    k_pages: Any
    v_pages: Any


def as_operand(caller: str, cache: PagedKVCache | tuple[Any, Any]) -> PagedKVCache | PagePair:
    """Return `cache` itself, or a plain pair as one operand, which a plan checks once per signature."""
    if isinstance(cache, PagedKVCache):
        return cache
    k_pages, v_pages = checks.as_pair(caller, cache)
    return PagePair({"k_pages": k_pages, "v_pages": v_pages})


def as_cache(operand: PagedKVCache | PagedMLACache | PagePair) -> Any:
    """Return the operand as a cache; a pair is in NHD layout, and is checked now."""
    return PagedKVCache(operand.k_pages, operand.v_pages) if isinstance(operand, PagePair) else operand


class OutOfPages(RuntimeError):
    """There are too few free pages; nothing has changed.

    Attributes
    ----------
    needed, free : int
        Pages that the call needed, and pages that are free.
    """

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} pages needed, {free} free")
        self.needed = needed
        self.free = free

    def __reduce__(self) -> tuple[Any, ...]:
        return OutOfPages, (self.needed, self.free)


class _Sequence:
    __slots__ = ("length", "pages")

    def __init__(self, pages: array[int], length: int) -> None:
        self.pages = pages
        self.length = length


class PageAllocator:
    """Deals pages to sequences, on the host. It holds no tensors: the caches of all layers can share it.

    A page belongs to one sequence, or to several after `fork`. A page that is shared is never written: a
    sequence whose last, partly filled page is shared gets one of its own when it grows (`extend` says what to
    copy). Handles name sequences: integers that are never used twice. Not for several threads at once.

    Parameters
    ----------
    num_pages, page_size : int
        Of the caches it serves.

    Examples
    --------
    >>> allocator = PageAllocator(num_pages=8, page_size=4)
    >>> a = allocator.alloc(6)  # a prompt of 6 tokens takes pages 0 and 1
    >>> b = allocator.fork(a)  # shares both
    >>> allocator.extend(b, 1)  # the 7th token of b: page 1 must first be copied to page 2
    [(1, 2)]
    >>> allocator.page_table([a, b]).kv_indices.tolist(), allocator.num_free
    ([0, 1, 0, 2], 5)
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if not 0 <= num_pages < 2**31:
            raise ValueError(
                f"PageAllocator: num_pages must be within 0..2**31 - 1 (ids are int32), got {num_pages}"
            )
        if page_size < 1:
            raise ValueError(f"PageAllocator: page_size must be at least 1, got {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._sequences: dict[int, _Sequence] = {}
        self._refcount: dict[int, int] = {}  # of pages in use
        # Free pages are those in _returned, which have been in use, and _untouched .. num_pages - 1.
        self._returned: list[int] = []
        self._untouched = 0
        self._next_handle = 0

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self.num_pages - len(self._refcount)

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, seq: object) -> bool:
        return seq in self._sequences

    def __repr__(self) -> str:
        return (
            f"PageAllocator({self.num_free} of {self.num_pages} pages free, page_size={self.page_size}, "
            f"{len(self)} sequences)"
        )

    def _get(self, seq: int) -> _Sequence:
        try:
            return self._sequences[seq]
        except KeyError:
            raise KeyError(f"no sequence has handle {seq!r} (freed already?)") from None

    def _take(self, count: int) -> array[int]:
        if count > self.num_free:
            raise OutOfPages(count, self.num_free)
        reused = min(count, len(self._returned))
        pages = array("i", (self._returned.pop() for _ in range(reused)))
        pages.extend(range(self._untouched, self._untouched + count - reused))
        self._untouched += count - reused
        self._refcount.update(dict.fromkeys(pages, 1))
        return pages

    def _drop(self, pages: Iterable[int]) -> None:
        for page in pages:
            if self._refcount[page] == 1:
                del self._refcount[page]
                self._returned.append(page)
            else:
                self._refcount[page] -= 1

    def _add(self, sequence: _Sequence) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._sequences[handle] = sequence
        return handle

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def alloc(self, num_tokens: int = 0) -> int:
        """Start a sequence with room for `num_tokens` tokens and return its handle.

        Raises
        ------
        OutOfPages
            Too few pages are free.
        ValueError
            `num_tokens` is negative.
        """
        if num_tokens < 0:
            raise ValueError(f"alloc: num_tokens must be at least 0, got {num_tokens}")
        return self._add(_Sequence(self._take(self._pages_for(num_tokens)), num_tokens))

    def extend(self, seq: int, num_tokens: int = 1) -> list[tuple[int, int]]:
        """Make room for `num_tokens` more tokens of `seq`.

        Returns
        -------
        list of (src_page, dst_page)
            Page copies that every cache has to make before the new tokens are written
            (`PagedKVCache.copy_pages`): one where the last page is partly filled and shared, else none.

        Raises
        ------
        OutOfPages
            Too few pages are free; the sequence is as before.
        KeyError
            `seq` is not a sequence.
        ValueError
            `num_tokens` is negative.
        """
        if num_tokens < 0:
            raise ValueError(f"extend: num_tokens must be at least 0, got {num_tokens}")
        sequence = self._get(seq)
        partial = sequence.length % self.page_size > 0
        copied = num_tokens > 0 and partial and self._refcount[sequence.pages[-1]] > 1
        length = sequence.length + num_tokens
        fresh = self._take(self._pages_for(length) - len(sequence.pages) + copied)
        copies = []
        if copied:
            src = sequence.pages.pop()
            self._drop((src,))
            copies.append((src, fresh[0]))
        sequence.pages.extend(fresh)
        sequence.length = length
        return copies

    def truncate(self, seq: int, length: int) -> None:
        """Forget the tokens of `seq` from position `length` on (drafts that were rejected, say).

        Raises
        ------
        KeyError
            `seq` is not a sequence.
        ValueError
            `length` is negative or more than the sequence has.
        """
        sequence = self._get(seq)
        if not 0 <= length <= sequence.length:
            raise ValueError(f"truncate: length must be within 0..{sequence.length}, got {length}")
        keep = self._pages_for(length)
        self._drop(reversed(sequence.pages[keep:]))
        del sequence.pages[keep:]
        sequence.length = length

    def fork(self, seq: int) -> int:
        """Start a sequence with the same tokens in the same pages, and return its handle; needs no free page.

        Raises
        ------
        KeyError
            `seq` is not a sequence.
        """
        sequence = self._get(seq)
        for page in sequence.pages:
            self._refcount[page] += 1
        return self._add(_Sequence(sequence.pages[:], sequence.length))

    def free(self, seq: int) -> None:
        """Give a sequence's pages back; its handle is gone for good.

        Raises
        ------
        KeyError
            `seq` is not a sequence (it was freed before, say).
        """
        self._drop(reversed(self._get(seq).pages))  # reversed: the next alloc gets them in order
        del self._sequences[seq]

    def length(self, seq: int) -> int:
        """Count the tokens of `seq`; KeyError if there is no such sequence."""
        return self._get(seq).length

    def pages(self, seq: int) -> list[int]:
        """List the page ids of `seq`, in order; KeyError if there is no such sequence."""
        return self._get(seq).pages.tolist()

    def page_table(self, seqs: Sequence[int], *, xp: Any = np) -> PageTable:
        """Make the table (CSR) of a batch of sequences, with their lengths as they are now.

        Parameters
        ----------
        seqs : sequence of int
            Handles, in batch order; any number, repeats allowed.
        xp : module
            ``numpy`` or ``cupy``: where the arrays go.

        Raises
        ------
        KeyError
            One of `seqs` is not a sequence.
        """
        batch = [self._get(seq) for seq in seqs]
        kv_indptr = np.zeros(len(batch) + 1, np.int32)
        np.cumsum([len(s.pages) for s in batch], out=kv_indptr[1:])
        kv_indices = np.concatenate(
            [np.empty(0, np.int32), *(np.frombuffer(s.pages, np.int32) for s in batch)]
        )
        kv_lens = np.array([s.length for s in batch], np.int32)
        return PageTable(xp.asarray(kv_indptr), xp.asarray(kv_indices), xp.asarray(kv_lens))

    def check(self) -> None:
        """Check that every page is accounted for, in time linear in the pages used; for tests and debugging.

        Raises
        ------
        AssertionError
            The books do not balance: a bug of this class.
        """
        counts: dict[int, int] = {}
        for page in itertools.chain.from_iterable(s.pages for s in self._sequences.values()):
            counts[page] = counts.get(page, 0) + 1
        free = set(self._returned)
        ok = {
            "refcounts": counts == self._refcount,
            "free list": len(free) == len(self._returned) and free.isdisjoint(counts),
            "every page": len(free) + len(counts) == self._untouched <= self.num_pages,
            "ids": all(0 <= page < self._untouched for page in free | counts.keys()),
            "lengths": all(len(s.pages) == self._pages_for(s.length) for s in self._sequences.values()),
            "no repeats": all(len(set(s.pages)) == len(s.pages) for s in self._sequences.values()),
        }
        wrong = [name for name, holds in ok.items() if not holds]
        if wrong:
            raise AssertionError(f"PageAllocator: {', '.join(wrong)} out of balance")
