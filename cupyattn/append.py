"""Appending new tokens to a paged KV cache, with rotary embedding on the way."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import numpy as np

from cupyattn import checks, interop, kernels, reference
from cupyattn.attention import TABLES
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
        refuse_jax("append", k)
        return interop.call(
            append, k, k, v, cache, pages, qo_indptr=qo_indptr, rope=rope, q=q, q_out=q_out, validate=validate
        )
    return store(_plans, (k, v, as_operand("append", cache), q, q_out, qo_indptr, pages), rope, validate)


def refuse_jax(caller: str, rows: Any) -> None:
    """Raise TypeError for a JAX array: its cache would be of them too."""
    if checks.framework_of(rows) == "jax":
        raise TypeError(
            f"{caller}: cache cannot be of JAX arrays, which are immutable; keep it in CuPy or NumPy"
        )


def store(plans: PlanCache[AppendPlan], operands: tuple[Any, ...], rope: Rope | None, validate: bool) -> Any:
    """Do the work of `append` or `mla_append`; `operands` are those of their plans."""
    rows, _, cache, _, _, qo_indptr, pages = operands
    if not isinstance(pages, PageTable):
        raise TypeError(f"{plans.caller}: pages must be a PageTable, got {type(pages).__name__}")
    if rope is not None and not isinstance(rope, Rope):
        raise TypeError(f"{plans.caller}: rope must be a Rope, got {type(rope).__name__}")
    plan, pointers, _ = plans.find(operands, (rope,))
    if validate:
        cache = as_cache(cache)
        checks.validate_pages(
            plan.caller, pages, page_size=cache.page_size, num_pages=cache.num_pages, qo_indptr=qo_indptr,
            num_tokens=rows.shape[0],
        )  # fmt: skip
    return plan.run(operands, pointers)


class AppendPlan(Plan):
    """Operands: two arrays of new rows, the cache, queries, where to write those, `qo_indptr`, the page table."""

    row_names: ClassVar[tuple[str, str]]
    row_patterns: ClassVar[tuple[str, str]]  # of one token, in sizes of the cache
    page_names: ClassVar[tuple[str, str]]
    query_names: ClassVar[tuple[str, str]]
    query_dim: ClassVar[str]  # which of the sizes is rotated

    def __init_subclass__(cls) -> None:
        rows, pages, (q, q_out) = cls.row_names, cls.page_names, cls.query_names
        cls.operand_names = (*rows, pages, q, q_out, "qo_indptr", TABLES)
        cls.written = (*pages, q_out)
        cls.apart = (
            *((a, b) for a in pages for b in (*rows, q)),
            *((q_out, b) for b in (*rows, *pages, q)),
        )
        cls.may_coincide = ((q_out, q),)

    def __init__(self, operands: tuple[Any, ...], rope: Rope | None) -> None:
        super().__init__(operands)
        *rows, cache, q, q_out, qo_indptr, pages = operands
        cache = as_cache(cache)
        q_name, q_out_name = self.query_names
        if q is None and q_out is not None:
            raise ValueError(f"{self.caller}: {q_out_name} needs {q_name}, got None")
        tokens = "batch" if qo_indptr is None else "total_tokens"
        query_pattern = f"{tokens} num_qo_heads {self.query_dim}"
        patterns = {}
        for name, a, pattern in zip(self.row_names, rows, self.row_patterns, strict=True):
            checks.check_is_array(f"{self.caller}: {name}", a)
            patterns[name] = (a, f"{tokens} {pattern}")
        patterns["kv_lens"] = (pages.kv_lens, "batch")
        patterns["qo_indptr"] = (qo_indptr, "batch+1")
        patterns[q_name], patterns[q_out_name] = (q, query_pattern), (q_out, query_pattern)
        sizes = {name: getattr(cache, name) for name in " ".join(self.row_patterns).split()}
        self._check_arrays(patterns, sizes)
        like = self.page_names[0]
        for name in (*self.row_names, *self.query_names):
            self._check_rows(name, patterns[name][0], like, getattr(cache, like))
        self._check_offsets(qo_indptr)
        if rope is not None:
            rope.inv_freq_array(sizes[self.query_dim])  # raises if it does not fit
        self.rope = rope
        if self.device is not None:
            self._prepare(rows, cache, q, q_out, pages, sizes)

    def _prepare(
        self, rows: list[Any], cache: Any, q: Any, q_out: Any, pages: PageTable, sizes: dict[str, int]
    ) -> None:
        """Settle the launch. No array may be kept: a plan outlives them."""
        checks.check_dtype(f"{self.caller}: {self.row_names[0]}", rows[0], kernels.DECODE_DTYPES)
        for name, size in sizes.items():
            if name.endswith("_dim") and (size % 2 or size > 512):
                raise ValueError(f"{self.caller}: {name} must be even and at most 512 on a GPU, got {size}")
        query_dim = sizes[self.query_dim]
        mode, inv_freq_ptr, rotary_dim = NO_ROPE, 0, 0
        if self.rope is not None:
            mode = INTERLEAVED if self.rope.interleaved else HALF_SPLIT
            inv_freq = turns_on_device(self.rope, query_dim, self.device)
            inv_freq_ptr, rotary_dim = inv_freq.data.ptr, 2 * inv_freq.shape[0]
        num_qo_heads = 0 if q is None else q.shape[1]
        q_strides = checks.element_strides(q)[:2] if q is not None else (0, 0)
        q_out_strides = (
            checks.element_strides(q_out)[:2] if q_out is not None else (num_qo_heads * query_dim, query_dim)
        )
        table_row_stride = checks.element_strides(pages.kv_indices)[0] if pages.is_dense else 0
        strides, num_kv_heads, v_dim = self._layout(rows, cache)
        arguments = (
            *(None,) * 10, inv_freq_ptr, *strides, *q_strides, *q_out_strides, pages.batch_size, num_kv_heads,
            num_qo_heads, query_dim, v_dim, cache.page_size, table_row_stride, rotary_dim, mode,
        )  # fmt: skip
        num_tokens = rows[0].shape[0]
        self.launcher = None
        if num_tokens:
            kernel = get_kernel("append", kernels.CUDA_TYPES[checks.dtype_name(rows[0])], device=self.device)
            self.launcher = kernel.prepare(num_tokens, kernels.APPEND_THREADS, pdl=True, arguments=arguments)

    def _layout(self, rows: list[Any], cache: Any) -> tuple[tuple[int, ...], int, int]:
        """Return the kernel's strides of rows and pages, the number of KV heads, and `v_head_dim`."""
        raise NotImplementedError

    def _reference(self, operands: tuple[Any, ...]) -> None:
        """Store the rows, in NumPy."""
        raise NotImplementedError

    def _run(self, operands: tuple[Any, ...], pointers: tuple[int, ...]) -> Any:
        _, _, _, q, q_out, qo_indptr, pages = operands
        if q is not None and q_out is None:
            q_out = self.xp.empty(q.shape, q.dtype)
        if self.device is None:
            self._reference(operands)
            if q is not None:
                q_out[...] = reference.rotate_queries(q, pages, qo_indptr, self.rope)
        elif self.launcher is not None:
            q_out_ptr = 0 if q_out is None else q_out.data.ptr
            self.launcher.launch_plain((*pointers[:5], q_out_ptr, *pointers[6:]), self.current_stream().ptr)
        return q_out


class _AppendPlan(AppendPlan):
    caller = "append"
    row_names = ("k", "v")
    row_patterns = ("num_kv_heads head_dim", "num_kv_heads head_dim")
    page_names = ("k_pages", "v_pages")
    query_names = ("q", "q_out")
    query_dim = "head_dim"

    def _layout(self, rows: list[Any], cache: PagedKVCache) -> tuple[tuple[int, ...], int, int]:
        k_strides, v_strides = (checks.element_strides(a)[:2] for a in rows)
        return (
            (*k_strides, *v_strides, *cache.k_strides, *cache.v_strides),
            cache.num_kv_heads,
            cache.head_dim,
        )

    def _reference(self, operands: tuple[Any, ...]) -> None:
        k, v, cache, _, _, qo_indptr, pages = operands
        reference.append(k, v, as_cache(cache), pages, qo_indptr=qo_indptr, rope=self.rope)


_plans: PlanCache[AppendPlan] = PlanCache(_AppendPlan)


@functools.cache  # without bound: captured graphs hold the addresses
def turns_on_device(rope: Rope, head_dim: int, device: int) -> Any:
    """Return the turns per position of each pair, float64; made once, as a copy from the host is slow."""
    return constant(rope.inv_freq_array(head_dim) / (2.0 * np.pi * rope.scale), device)
