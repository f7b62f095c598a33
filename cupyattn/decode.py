"""Decode attention over a paged KV cache: MHA, MQA and GQA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyattn import checks, interop, kernels, mla, reference, runs
from cupyattn.cache import PagedKVCache, PagedMLACache, PageTable, as_cache, as_operand
from cupyattn.plan import Plan, PlanCache
from cupyattn.runs import Runs, as_split_size, check_options
from cupyattn.runtime.device import device_properties
from cupyattn.runtime.registry import get_kernel


def decode(
    q: Any,
    cache: PagedKVCache | tuple[Any, Any],
    pages: PageTable,
    *,
    qo_indptr: Any = None,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    workspace: Any = None,
    pdl: bool = False,
    fixed_split_size: int | None = None,
    validate: bool = False,
) -> Any:
    """Attention of each request's newest tokens over its keys and values in a paged cache.

    One kernel launch on the current stream; no synchronization. Lengths and tables are read on the device, so
    a captured CUDA graph stays right when they change in place (their shapes must not). The first call with a
    head_dim and dtype compiles or loads a kernel: make it before a capture.

    Parameters
    ----------
    q : array, shape [batch, num_qo_heads, head_dim], float16 or bfloat16 (float32 too on NumPy)
        The query of one token per request; with `qo_indptr`, [total_q, num_qo_heads, head_dim]. `num_qo_heads`
        is a multiple of the cache's `num_kv_heads`. NumPy, CuPy, or any array that speaks DLPack (torch, JAX).
    cache : PagedKVCache, or pair of arrays (k_pages, v_pages) in NHD layout
        Of the dtype and framework of `q`. On a GPU, head_dim is one of 64, 80, 96, 112, 128, 192, 256.
    pages : PageTable
        `kv_lens` counts the tokens of `q` too: their keys are in the cache already (see `append`).
    qo_indptr : array, shape [batch + 1], int32, optional
        Request ``b`` has the query tokens ``qo_indptr[b] .. qo_indptr[b + 1] - 1``, the last of its `kv_lens`
        tokens, each of which sees the keys up to its own (speculative decoding, chunked prefill). Rows from
        ``qo_indptr[-1]`` on (padding, in a captured graph) belong to nobody; what `out` holds there is undefined.
    sm_scale : float, optional
        Factor of the logits; ``1 / sqrt(head_dim)`` by default.
    window_left : int
        How many keys before its own a query sees: 0 only its own, -1 all. Pages outside are not read.
    logits_soft_cap : float
        Logits become ``cap * tanh(logit / cap)``; 0 for none.
    return_lse : bool
        Return the log-sum-exp of the logits too.
    out : array, shape and dtype of `q`, optional
        Where to write the result. Must not overlap an input. Without it, memory comes from CuPy's (or torch's)
        pool, which a capture in CUDA's "global" mode only allows while the pool has room: give it there.
    lse : array, shape [batch or total_q, num_qo_heads], float32, optional
        Where to write the log-sum-exp.
    workspace : array, uint8, optional
        From `decode_workspace`. By default each stream has one, made at the first call. Launches that may
        overlap in time need one each: pass your own if a captured graph is replayed on another stream.
    pdl : bool
        Programmatic dependent launch: the kernel may start while the one before it on the stream is still
        finishing. The caller promises that that kernel, the immediately preceding one, does not write `kv_lens`,
        `kv_indptr`, `kv_indices` or `qo_indptr`. It may write `q` and the cache: those are read when it has
        finished. No effect on NumPy, which has no stream.
    fixed_split_size : int, optional
        Batch-invariant mode: keys are cut every so many tokens (a power of two, at least 64; 2048 is a good
        one), whoever shares the batch, so that a request's result does not depend on its neighbours, bitwise. By
        default cuts are where the GPU is loaded evenly. Each cut leaves a partial state of 4 bytes a query head
        and dimension: see `decode_workspace_bytes`. On NumPy every request is computed on its own anyway.
    validate : bool
        Check the values of tables, lengths and offsets, which needs a copy to the host and waits for it.
        Takes padding rows for a mistake: `qo_indptr` must end at the number of tokens.

    Returns
    -------
    out : array, shape and dtype of `q`
    lse : array, float32, natural logarithm
        Only with `return_lse`. A request without keys has out = 0 and lse = -inf.

    Raises
    ------
    TypeError
        A dtype or framework does not fit.
    ValueError
        A shape, stride, alignment, device or number does not fit, `out` overlaps an input, or the tables have
        room for more than 2^17 fixed splits; with `validate`, a length, page id or offset is out of range.
        Nothing is written.

    Notes
    -----
    Online softmax: Milakov and Gimelshein, arXiv:1805.02867. Split along the keys and merged by log-sum-exp:
    Dao et al., Flash-Decoding, 2023.

    Examples
    --------
    >>> cache = PagedKVCache.allocate(4, 16, num_kv_heads=2, head_dim=64, dtype="float16")
    >>> pages = PageTable.from_dense(np.array([[2, 0]], "int32"), np.array([20], "int32"))
    >>> decode(np.ones((1, 8, 64), "float16"), cache, pages).shape
    (1, 8, 64)
    """
    if interop.is_foreign(q):
        return interop.call(
            decode, q, q, cache, pages, qo_indptr=qo_indptr, sm_scale=sm_scale, window_left=window_left,
            logits_soft_cap=logits_soft_cap, return_lse=return_lse, out=out, lse=lse, workspace=workspace,
            pdl=pdl, fixed_split_size=fixed_split_size, validate=validate,
        )  # fmt: skip
    held = as_operand("decode", cache)
    if not isinstance(pages, PageTable):
        raise TypeError(f"decode: pages must be a PageTable, got {type(pages).__name__}")
    operands = (q, held, pages, qo_indptr, out, lse, workspace)
    plan, place = _plans.find(operands, as_split_size("decode", fixed_split_size))
    if sm_scale is None:
        sm_scale = plan.sm_scale
    sm_scale, window_left, logits_soft_cap = check_options(
        "decode", sm_scale, window_left, logits_soft_cap, pdl
    )
    if validate:
        runs.validate("decode", q, as_cache(held), pages, qo_indptr, workspace, window_left)
    out, lse = plan.run(operands, place, sm_scale, window_left, logits_soft_cap, return_lse, pdl)
    return (out, lse) if return_lse else out


def decode_workspace_bytes(
    q: Any,
    cache: PagedKVCache | PagedMLACache | tuple[Any, Any],
    pages: PageTable,
    *,
    qo_indptr: Any = None,
    fixed_split_size: int | None = None,
) -> int:
    """Say how large a workspace must be for calls of `decode`, or of `mla_decode`, with arrays like these.

    With `fixed_split_size` it has a slot for every split that the page table has room for, each with the states of a
    tile of query rows (8 for up to 8 query heads a KV head): 36 MB for 64 requests of up to 32768 tokens, 8 KV heads
    of 128 dimensions, splits of 2048.

    Parameters
    ----------
    q, cache, pages, qo_indptr, fixed_split_size
        As for the call; CUDA arrays of CuPy, torch or JAX. Nothing is read or written.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    TypeError, ValueError
        As the call does; TypeError for arrays that are not on a GPU.
    """
    first = q[0] if isinstance(cache, PagedMLACache) and isinstance(q, tuple | list) and q else q
    if interop.is_foreign(first):
        return int(
            interop.call(
                decode_workspace_bytes,
                first,
                q,
                cache,
                pages,
                qo_indptr=qo_indptr,
                fixed_split_size=fixed_split_size,
            )
        )
    checks.check_is_array("decode_workspace_bytes: q", first)
    if checks.framework_of(first) != "cupy":
        raise TypeError(f"decode_workspace_bytes: q must be a CuPy array, got {type(first).__name__}")
    if not isinstance(pages, PageTable):
        raise TypeError(f"decode_workspace_bytes: pages must be a PageTable, got {type(pages).__name__}")
    if isinstance(cache, PagedMLACache):
        return mla.needed_workspace_bytes(q, cache, pages, qo_indptr, fixed_split_size)
    operands = (q, as_operand("decode_workspace_bytes", cache), pages, qo_indptr, None, None, None)
    plan, _ = _plans.find(operands, as_split_size("decode", fixed_split_size))
    return plan.needed_bytes


_TABLES = ("kv_indptr", "kv_indices", "kv_lens")
_INPUTS = ("q", "k_pages", "v_pages", *_TABLES, "qo_indptr")
_OUTPUTS = ("out", "lse", "workspace")


class _DecodePlan(Plan):
    caller = "decode"
    operand_names = ("q", ("k_pages", "v_pages"), _TABLES, "qo_indptr", *_OUTPUTS)
    written = ("out", "lse")
    apart = tuple((a, b) for i, a in enumerate(_OUTPUTS) for b in (*_INPUTS, *_OUTPUTS[:i]))

    needed_bytes = 0  # of workspace

    def __init__(self, operands: tuple[Any, ...], fixed_split_size: int | None) -> None:
        super().__init__(operands)
        q, cache, pages, qo_indptr, out, lse, workspace = operands
        self.fixed_split_size = fixed_split_size
        cache = as_cache(cache)
        signature = {
            "q": (q, "batch num_qo_heads head_dim" if qo_indptr is None else "total_q num_qo_heads head_dim"),
            "kv_lens": (pages.kv_lens, "batch"),
        }
        if qo_indptr is not None:
            signature["qo_indptr"] = (qo_indptr, "batch+1")
        if out is not None:
            signature["out"] = (out, " ".join(str(n) for n in q.shape))
        if lse is not None:
            signature["lse"] = (lse, " ".join(str(n) for n in q.shape[:2]))
        sizes = checks.check_arrays("decode", signature, {"head_dim": cache.head_dim})
        checks.check_same_dtype("decode: q", q, "k_pages", cache.k_pages)
        checks.check_last_axis_contiguous("decode: q", q)
        checks.check_divisible(
            "decode: num_qo_heads", sizes["num_qo_heads"], "num_kv_heads", cache.num_kv_heads
        )
        if qo_indptr is not None:
            checks.check_dtype("decode: qo_indptr", qo_indptr, "int32")
            checks.check_last_axis_contiguous("decode: qo_indptr", qo_indptr)
        if out is not None:
            checks.check_same_dtype("decode: out", out, "q", q)
            checks.check_last_axis_contiguous("decode: out", out)
        if lse is not None:
            checks.check_dtype("decode: lse", lse, "float32")
        self.sm_scale = 1.0 / math.sqrt(cache.head_dim)
        self._prepare(q, cache, pages, qo_indptr is None, out, lse, workspace)

    def _prepare(
        self, q: Any, cache: PagedKVCache, pages: PageTable, single: bool, out: Any, lse: Any, workspace: Any
    ) -> None:
        """Settle what only this backend needs. No array may be kept: a plan outlives them."""
        raise NotImplementedError


class _NumpyPlan(_DecodePlan):
    def _prepare(
        self, q: Any, cache: PagedKVCache, pages: PageTable, single: bool, out: Any, lse: Any, workspace: Any
    ) -> None:
        if workspace is not None:
            raise TypeError("decode: workspace is for CUDA arrays, got one with NumPy arrays")

    def _run(
        self,
        operands: tuple[Any, ...],
        place: tuple[int, ...],
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float,
        return_lse: bool,
        pdl: bool,
    ) -> tuple[Any, Any]:
        q, cache, pages, qo_indptr, out, lse, _ = operands
        result, result_lse = reference.decode(
            q,
            as_cache(cache),
            pages,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            qo_indptr=qo_indptr,
        )
        if out is None:
            out = result.astype(q.dtype)
        else:
            out[...] = result.astype(q.dtype)
        if lse is None:
            lse = result_lse.astype(np.float32) if return_lse else None
        else:
            lse[...] = result_lse
        return out, lse


class _CupyPlan(_DecodePlan):
    device: int

    def _prepare(
        self, q: Any, cache: PagedKVCache, pages: PageTable, single: bool, out: Any, lse: Any, workspace: Any
    ) -> None:
        checks.check_dtype("decode: q", q, kernels.DECODE_DTYPES)
        if cache.head_dim not in kernels.DECODE_HEAD_DIMS:
            supported = ", ".join(map(str, kernels.DECODE_HEAD_DIMS))
            raise ValueError(f"decode: head_dim must be one of {supported} on a GPU, got {cache.head_dim}")
        for name, a in (("q", q), ("k_pages", cache.k_pages), ("v_pages", cache.v_pages), ("out", out)):
            if a is not None:
                checks.check_aligned_strides(f"decode: {name}", a)
        self.needed_bytes = runs.workspace_bytes(self.device)
        num_tokens, num_qo_heads, head_dim = q.shape
        batch_size, group_size = pages.batch_size, num_qo_heads // cache.num_kv_heads
        self.runs: Runs | None = None
        if num_tokens > 0 and batch_size > 0:
            # Rows that a KV head's tile holds on average; the device finds the true counts. Any choice is right, but
            # another one rounds differently: a batch-invariant one must not depend on the batch.
            size = self.fixed_split_size
            rows = group_size if size else -(-num_tokens // batch_size) * group_size
            config = kernels.decode_config(device_properties(self.device).arch, head_dim, rows)
            template = kernels.decode_template(checks.dtype_name(q), head_dim, config, size is not None)
            self.runs = Runs(
                "decode", get_kernel("decode", *template, device=self.device), config,
                config.shared_bytes(head_dim), head_dim, num_rows=num_tokens * group_size, single=single,
                num_kv_heads=cache.num_kv_heads, page_size=cache.page_size, pages=pages, fixed_split_size=size,
            )  # fmt: skip
            self.needed_bytes = self.runs.needed_bytes
            strides_of_out = (
                checks.element_strides(out)[:2] if out is not None else (num_qo_heads * head_dim, head_dim)
            )
            strides_of_lse = checks.element_strides(lse) if lse is not None else (num_qo_heads, 1)
            self.constants = (
                *checks.element_strides(q)[:2], *cache.k_strides, *cache.v_strides, *strides_of_out,
                *strides_of_lse, batch_size, cache.num_kv_heads, *kernels.divisor(group_size),
                *kernels.divisor(cache.page_size), *self.runs.table_arguments,
            )  # fmt: skip
        runs.check_workspace("decode", workspace, self.needed_bytes)

    def check_addresses(self, arrays: Sequence[Any], place: Sequence[int]) -> None:
        super().check_addresses(arrays, place)
        if self.runs is not None:
            for name, address in zip(self.array_names, place, strict=True):
                if name in ("q", "k_pages", "v_pages", "out", "workspace") and address % 16:
                    raise ValueError(f"decode: {name} must be aligned to 16 bytes, got address {address:#x}")

    def _run(
        self,
        operands: tuple[Any, ...],
        place: tuple[int, ...],
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float,
        return_lse: bool,
        pdl: bool,
    ) -> tuple[Any, Any]:
        q, _, _, _, out, lse, workspace = operands
        cupy = self.xp
        if out is None:
            out = cupy.empty(q.shape, q.dtype)
        if lse is None and return_lse:
            lse = cupy.empty(q.shape[:2], np.float32)
        if self.runs is not None:
            q_ptr, k_ptr, v_ptr, kv_indptr_ptr, kv_indices_ptr, kv_lens_ptr, qo_indptr_ptr, *_ = place
            lse_ptr = 0 if lse is None else lse.data.ptr
            self.runs(
                (
                    q_ptr,
                    k_ptr,
                    v_ptr,
                    qo_indptr_ptr,
                    kv_indptr_ptr,
                    kv_indices_ptr,
                    kv_lens_ptr,
                    out.data.ptr,
                    lse_ptr,
                ),
                workspace,
                (*self.constants, window_left, sm_scale, logits_soft_cap),
                cupy.cuda.get_current_stream().ptr,
                pdl,
            )
        return out, lse


_plans: PlanCache[_DecodePlan] = PlanCache(_NumpyPlan, _CupyPlan)
