"""Appending new tokens to a paged KV cache, with rotary embedding on the way."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cupyattn import checks, interop, kernels, reference
from cupyattn.cache import PagedKVCache, PageTable
from cupyattn.plan import OverlapGuard, PlanCache
from cupyattn.rope import Rope
from cupyattn.runtime.registry import get_kernel
from cupyattn.runtime.workspace import constant

_NO_ROPE, _HALF_SPLIT, _INTERLEAVED = range(3)  # RopeMode of append.cu


def append(
    k: Any,
    v: Any,
    cache: PagedKVCache | tuple[Any, Any],
    pages: PageTable,
    *,
    qo_indptr: Any = None,
    rope: Rope | None = None,
    q: Any = None,
    q_out: Any = None,
    validate: bool = False,
) -> Any:
    """Write the newest tokens' keys and values into their pages; rotate keys and queries if asked for.

    One kernel launch on the current stream; no synchronization. The page table is the one that `decode` takes
    in the same step: its lengths count the new tokens already, so the ``n`` new tokens of a request of length
    ``kv_len`` take positions ``kv_len - n .. kv_len - 1``.

    Parameters
    ----------
    k, v : array, shape [batch, num_kv_heads, head_dim], dtype of the cache
        One token per request; with `qo_indptr`, [total_tokens, num_kv_heads, head_dim].
    cache : PagedKVCache, or pair of arrays (k_pages, v_pages) in NHD layout
        Written in place. float16 or bfloat16; float32 too on NumPy.
    pages : PageTable
        The pages of the new positions must belong to one request each.
    qo_indptr : array, shape [batch + 1], int32, optional
        Request ``b`` has the new tokens ``qo_indptr[b] .. qo_indptr[b + 1] - 1``. Tokens from ``qo_indptr[-1]`` on
        (padding, in a captured graph) belong to nobody: they are not stored, and what is returned for their
        queries is undefined.
    rope : Rope, optional
        Rotates `k` by its positions before it is stored, and `q`. Angles are computed in double precision.
    q : array, shape [tokens, num_qo_heads, head_dim], dtype of the cache, optional
        The new tokens' queries, to be rotated in the same launch.
    q_out : array, shape and dtype of `q`, optional
        Where to write the rotated queries; may be `q` itself.
    validate : bool
        Check the values of tables, lengths and offsets, which needs a copy to the host and waits for it.
        Takes padding rows for a mistake: `qo_indptr` must end at the number of tokens.

    Returns
    -------
    array, shape and dtype of `q`, or None without `q`
        The rotated queries (a copy of `q` without `rope`).

    Raises
    ------
    TypeError
        A dtype or framework does not fit; the cache is of immutable (JAX) arrays.
    ValueError
        A shape, stride or device does not fit, `q_out` without `q`, or, with `validate`, a value out of range.
        Nothing is written.

    Notes
    -----
    Rotary embedding: Su et al., arXiv:2104.09864.

    Examples
    --------
    >>> cache = PagedKVCache.allocate(4, 16, num_kv_heads=2, head_dim=64, dtype="float16")
    >>> pages = PageTable.from_dense(np.array([[2, 0]], "int32"), np.array([17], "int32"))
    >>> new = np.ones((1, 2, 64), "float16")
    >>> append(new, new, cache, pages, rope=Rope())  # the 17th token: slot 0 of page 0
    >>> float(cache.v_pages[0, 0, 0, 0])
    1.0
    """
    if interop.is_foreign(k):
        if checks.framework_of(k) == "jax":
            raise TypeError(
                "append: cache cannot be of JAX arrays, which are immutable; keep it in CuPy or NumPy"
            )
        return interop.call(
            append, k, k, v, cache, pages, qo_indptr=qo_indptr, rope=rope, q=q, q_out=q_out, validate=validate
        )
    if isinstance(cache, PagedKVCache):
        k_pages, v_pages, layout = cache.k_pages, cache.v_pages, cache.layout
    else:
        k_pages, v_pages, layout = *checks.as_pair("append", cache), "NHD"
    if not isinstance(pages, PageTable):
        raise TypeError(f"append: pages must be a PageTable, got {type(pages).__name__}")
    if rope is not None and not isinstance(rope, Rope):
        raise TypeError(f"append: rope must be a Rope, got {type(rope).__name__}")
    arrays = (k, v, k_pages, v_pages, q, q_out, qo_indptr, pages.kv_indptr, pages.kv_indices, pages.kv_lens)
    plan = _plans.get(arrays, layout, rope)
    if validate:
        checks.validate_pages(
            "append", pages, page_size=plan.page_size, num_pages=plan.num_pages, qo_indptr=qo_indptr,
            num_tokens=k.shape[0],
        )  # fmt: skip
    return plan.run(arrays)


class _Plan:
    """What one signature settles: the checks have passed, the sizes are known."""

    def __init__(self, arrays: tuple[Any, ...], layout: str, rope: Rope | None) -> None:
        k, v, k_pages, v_pages, q, q_out, qo_indptr, *_, kv_lens = arrays
        checks.check_same_framework("append", dict(zip(_ARRAY_NAMES, arrays, strict=True)))
        cache = PagedKVCache(k_pages, v_pages, layout=layout)
        if q is None and q_out is not None:
            raise ValueError("append: q_out needs q, got None")
        tokens = "batch" if qo_indptr is None else "total_tokens"
        signature = {
            "k": (k, f"{tokens} num_kv_heads head_dim"),
            "v": (v, f"{tokens} num_kv_heads head_dim"),
            "kv_lens": (kv_lens, "batch"),
        }
        for name, a, pattern in (
            ("qo_indptr", qo_indptr, "batch+1"),
            ("q", q, f"{tokens} num_qo_heads head_dim"),
            ("q_out", q_out, f"{tokens} num_qo_heads head_dim"),
        ):
            if a is not None:
                signature[name] = (a, pattern)
        sizes = checks.check_arrays(
            "append", signature, {"num_kv_heads": cache.num_kv_heads, "head_dim": cache.head_dim}
        )
        for name in ("k", "v", "q", "q_out"):
            if name in signature:
                checks.check_same_dtype(f"append: {name}", signature[name][0], "k_pages", k_pages)
                checks.check_last_axis_contiguous(f"append: {name}", signature[name][0])
        if qo_indptr is not None:
            checks.check_dtype("append: qo_indptr", qo_indptr, "int32")
            checks.check_last_axis_contiguous("append: qo_indptr", qo_indptr)
        if rope is not None:
            rope.inv_freq_array(cache.head_dim)  # raises if it does not fit
        written = [("k_pages", name) for name in ("k", "v", "q")] + [
            ("v_pages", name) for name in ("k", "v", "q")
        ]
        written += [("q_out", name) for name in ("k", "v", "k_pages", "v_pages")]
        self.overlaps = OverlapGuard("append", _ARRAY_NAMES, arrays, written)
        self.q_overlap = OverlapGuard("append", _ARRAY_NAMES, arrays, [("q_out", "q")])
        self.layout = layout
        self.rope = rope
        self.batch_size = sizes["batch"]
        self.num_qo_heads = sizes.get("num_qo_heads", 0)
        self.page_size = cache.page_size
        self.num_pages = cache.num_pages
        self.head_dim = cache.head_dim

    def check_overlaps(self, arrays: tuple[Any, ...]) -> None:
        self.overlaps.check(arrays)
        q, q_out = arrays[_ARRAY_NAMES.index("q")], arrays[_ARRAY_NAMES.index("q_out")]
        in_place = q is q_out or (
            q_out is not None
            and checks.data_pointer(q) == checks.data_pointer(q_out)
            and q.strides == q_out.strides
        )
        if not in_place:
            self.q_overlap.check(arrays)

    def run(self, arrays: tuple[Any, ...]) -> Any:
        raise NotImplementedError


class _NumpyPlan(_Plan):
    def run(self, arrays: tuple[Any, ...]) -> Any:
        k, v, k_pages, v_pages, q, q_out, qo_indptr, kv_indptr, kv_indices, kv_lens = arrays
        for name, target in (("k_pages", k_pages), ("v_pages", v_pages), ("q_out", q_out)):
            if target is not None:
                checks.check_writable(f"append: {name}", target)
        self.check_overlaps(arrays)
        cache = PagedKVCache(k_pages, v_pages, layout=self.layout)
        pages = PageTable(kv_indptr, kv_indices, kv_lens)
        reference.append(k, v, cache, pages, qo_indptr=qo_indptr, rope=self.rope)
        if q is None:
            return None
        rotated = q
        if self.rope is not None:
            _, positions = reference.token_positions(kv_lens, qo_indptr)
            num_tokens = len(positions)
            rotated = q.copy()
            rotated[:num_tokens] = reference.apply_rope(q[:num_tokens], positions, self.rope).astype(q.dtype)
        if q_out is None:
            return rotated.copy() if rotated is q else rotated
        q_out[...] = rotated
        return q_out


class _CupyPlan(_Plan):
    def __init__(self, arrays: tuple[Any, ...], layout: str, rope: Rope | None) -> None:
        super().__init__(arrays, layout, rope)
        k, v, k_pages, v_pages, q, q_out, _, kv_indptr, kv_indices, _ = arrays
        self.device = checks.check_same_device("append", dict(zip(_ARRAY_NAMES, arrays, strict=True)))
        checks.check_dtype("append: k", k, kernels.DECODE_DTYPES)
        if self.head_dim % 2 or self.head_dim > 512:
            raise ValueError(f"append: head_dim must be even and at most 512 on a GPU, got {self.head_dim}")
        cache = PagedKVCache(k_pages, v_pages, layout=layout)
        mode, self.inv_freq, rotary_dim = _NO_ROPE, None, 0
        if rope is not None:
            mode = _INTERLEAVED if rope.interleaved else _HALF_SPLIT
            self.inv_freq = _turns_on_device(rope, self.head_dim, self.device)
            rotary_dim = 2 * self.inv_freq.shape[0]
        self.launcher = None
        if k.shape[0]:
            kernel = get_kernel("append", kernels.CUDA_TYPES[checks.dtype_name(k)], device=self.device)
            self.launcher = kernel.prepare(k.shape[0], kernels.APPEND_THREADS)
        no_q = (0, 0)
        q_strides = checks.element_strides(q)[:2] if q is not None else no_q
        q_out_strides = checks.element_strides(q_out)[:2] if q_out is not None else no_q
        if q is not None and q_out is None:
            q_out_strides = (q.shape[1] * q.shape[2], q.shape[2])
        table_row_stride = 0 if kv_indptr is not None else checks.element_strides(kv_indices)[0]
        self.constants = (
            *checks.element_strides(k)[:2], *checks.element_strides(v)[:2], *cache.k_strides, *cache.v_strides,
            *q_strides, *q_out_strides, self.batch_size, cache.num_kv_heads, self.num_qo_heads, self.head_dim,
            self.page_size, table_row_stride, rotary_dim, mode,
        )  # fmt: skip

    def run(self, arrays: tuple[Any, ...]) -> Any:
        import cupy

        if self.device != cupy.cuda.runtime.getDevice():
            with cupy.cuda.Device(self.device):
                return self.run(arrays)
        self.check_overlaps(arrays)
        k, v, k_pages, v_pages, q, q_out, qo_indptr, kv_indptr, kv_indices, kv_lens = arrays
        if q is not None and q_out is None:
            q_out = cupy.empty(q.shape, q.dtype)
        if self.launcher is not None:
            pointers = (
                k,
                v,
                k_pages,
                v_pages,
                q,
                q_out,
                qo_indptr,
                kv_indptr,
                kv_indices,
                kv_lens,
                self.inv_freq,
            )
            self.launcher((*(a.data.ptr if a is not None else 0 for a in pointers), *self.constants))
        return q_out


_ARRAY_NAMES = (
    "k",
    "v",
    "k_pages",
    "v_pages",
    "q",
    "q_out",
    "qo_indptr",
    "kv_indptr",
    "kv_indices",
    "kv_lens",
)


def _make_plan(arrays: tuple[Any, ...], layout: str, rope: Rope | None) -> _Plan:
    checks.check_is_array("append: k", arrays[0])
    plan = _NumpyPlan if checks.framework_of(arrays[0]) == "numpy" else _CupyPlan
    return plan(arrays, layout, rope)


_plans = PlanCache(_make_plan)


@functools.cache  # without bound: captured graphs hold the addresses
def _turns_on_device(rope: Rope, head_dim: int, device: int) -> Any:
    """Return the turns per position of each pair, float64; made once, as a copy from the host is slow."""
    return constant(rope.inv_freq_array(head_dim) / (2.0 * np.pi * rope.scale), device)
