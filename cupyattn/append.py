"""Appending new tokens to a paged KV cache, with rotary embedding on the way."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cupyattn import checks, interop, kernels, reference
from cupyattn.cache import PagedKVCache, PageTable, as_cache, as_operand
from cupyattn.plan import Plan, PlanCache
from cupyattn.rope import Rope
from cupyattn.runtime.registry import get_kernel
from cupyattn.runtime.workspace import constant

NO_ROPE, HALF_SPLIT, INTERLEAVED = range(3)  # RopeMode of append.cu


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
    held = as_operand("append", cache)
    if not isinstance(pages, PageTable):
        raise TypeError(f"append: pages must be a PageTable, got {type(pages).__name__}")
    if rope is not None and not isinstance(rope, Rope):
        raise TypeError(f"append: rope must be a Rope, got {type(rope).__name__}")
    operands = (k, v, held, q, q_out, qo_indptr, pages)
    plan, place = _plans.find(operands, rope)
    if validate:
        cache = as_cache(held)
        checks.validate_pages(
            "append", pages, page_size=cache.page_size, num_pages=cache.num_pages, qo_indptr=qo_indptr,
            num_tokens=k.shape[0],
        )  # fmt: skip
    return plan.run(operands, place)


class _AppendPlan(Plan):
    caller = "append"
    operand_names = (
        "k", "v", ("k_pages", "v_pages"), "q", "q_out", "qo_indptr", ("kv_indptr", "kv_indices", "kv_lens"),
    )  # fmt: skip
    written = ("k_pages", "v_pages", "q_out")
    apart = (
        ("k_pages", "k"), ("k_pages", "v"), ("k_pages", "q"),
        ("v_pages", "k"), ("v_pages", "v"), ("v_pages", "q"),
        ("q_out", "k"), ("q_out", "v"), ("q_out", "k_pages"), ("q_out", "v_pages"), ("q_out", "q"),
    )  # fmt: skip
    may_coincide = (("q_out", "q"),)

    def __init__(self, operands: tuple[Any, ...], rope: Rope | None) -> None:
        super().__init__(operands)
        k, v, cache, q, q_out, qo_indptr, pages = operands
        cache = as_cache(cache)
        if q is None and q_out is not None:
            raise ValueError("append: q_out needs q, got None")
        tokens = "batch" if qo_indptr is None else "total_tokens"
        signature = {
            "k": (k, f"{tokens} num_kv_heads head_dim"),
            "v": (v, f"{tokens} num_kv_heads head_dim"),
            "kv_lens": (pages.kv_lens, "batch"),
        }
        for name, a, pattern in (
            ("qo_indptr", qo_indptr, "batch+1"),
            ("q", q, f"{tokens} num_qo_heads head_dim"),
            ("q_out", q_out, f"{tokens} num_qo_heads head_dim"),
        ):
            if a is not None:
                signature[name] = (a, pattern)
        settled = {"num_kv_heads": cache.num_kv_heads, "head_dim": cache.head_dim}
        checks.check_arrays("append", signature, settled)
        for name in ("k", "v", "q", "q_out"):
            if name in signature:
                checks.check_same_dtype(f"append: {name}", signature[name][0], "k_pages", cache.k_pages)
                checks.check_last_axis_contiguous(f"append: {name}", signature[name][0])
        if qo_indptr is not None:
            checks.check_dtype("append: qo_indptr", qo_indptr, "int32")
            checks.check_last_axis_contiguous("append: qo_indptr", qo_indptr)
        if rope is not None:
            rope.inv_freq_array(cache.head_dim)  # raises if it does not fit
        self.rope = rope
        self._prepare(k, v, cache, q, q_out, pages)

    def _prepare(self, k: Any, v: Any, cache: PagedKVCache, q: Any, q_out: Any, pages: PageTable) -> None:
        """Settle what only this backend needs. No array may be kept: a plan outlives them."""


class _NumpyPlan(_AppendPlan):
    def _run(self, operands: tuple[Any, ...], place: tuple[int, ...]) -> Any:
        k, v, cache, q, q_out, qo_indptr, pages = operands
        reference.append(k, v, as_cache(cache), pages, qo_indptr=qo_indptr, rope=self.rope)
        if q is None:
            return None
        rotated = reference.rotate_queries(q, pages, qo_indptr, self.rope)
        if q_out is None:
            return rotated
        q_out[...] = rotated
        return q_out


class _CupyPlan(_AppendPlan):
    device: int

    def _prepare(self, k: Any, v: Any, cache: PagedKVCache, q: Any, q_out: Any, pages: PageTable) -> None:
        checks.check_dtype("append: k", k, kernels.DECODE_DTYPES)
        head_dim = cache.head_dim
        if head_dim % 2 or head_dim > 512:
            raise ValueError(f"append: head_dim must be even and at most 512 on a GPU, got {head_dim}")
        mode, self.inv_freq_ptr, rotary_dim = NO_ROPE, 0, 0
        if self.rope is not None:
            mode = INTERLEAVED if self.rope.interleaved else HALF_SPLIT
            inv_freq = turns_on_device(self.rope, head_dim, self.device)
            self.inv_freq_ptr, rotary_dim = inv_freq.data.ptr, 2 * inv_freq.shape[0]
        self.launcher = None
        if k.shape[0]:
            kernel = get_kernel("append", kernels.CUDA_TYPES[checks.dtype_name(k)], device=self.device)
            self.launcher = kernel.prepare(k.shape[0], kernels.APPEND_THREADS)
        num_qo_heads = 0 if q is None else q.shape[1]
        q_strides = checks.element_strides(q)[:2] if q is not None else (0, 0)
        q_out_strides = (
            checks.element_strides(q_out)[:2] if q_out is not None else (num_qo_heads * head_dim, head_dim)
        )
        table_row_stride = checks.element_strides(pages.kv_indices)[0] if pages.is_dense else 0
        self.constants = (
            *checks.element_strides(k)[:2], *checks.element_strides(v)[:2], *cache.k_strides, *cache.v_strides,
            *q_strides, *q_out_strides, pages.batch_size, cache.num_kv_heads, num_qo_heads, head_dim, head_dim,
            cache.page_size, table_row_stride, rotary_dim, mode,
        )  # fmt: skip

    def _run(self, operands: tuple[Any, ...], place: tuple[int, ...]) -> Any:
        _, _, _, q, q_out, _, _ = operands
        if q is not None and q_out is None:
            q_out = self.xp.empty(q.shape, q.dtype)
        if self.launcher is not None:
            inputs, tables = place[:5], place[6:]  # q_out, which may be new, comes between them
            q_out_ptr = 0 if q_out is None else q_out.data.ptr
            self.launcher((*inputs, q_out_ptr, *tables, self.inv_freq_ptr, *self.constants))
        return q_out


_plans: PlanCache[_AppendPlan] = PlanCache(_NumpyPlan, _CupyPlan)


@functools.cache  # without bound: captured graphs hold the addresses
def turns_on_device(rope: Rope, head_dim: int, device: int) -> Any:
    """Return the turns per position of each pair, float64; made once, as a copy from the host is slow."""
    return constant(rope.inv_freq_array(head_dim) / (2.0 * np.pi * rope.scale), device)
