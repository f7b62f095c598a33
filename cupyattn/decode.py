"""Decode attention over a paged KV cache: MHA, MQA and GQA."""

from __future__ import annotations

import math
from typing import Any

from cupyattn import checks, interop, kernels, mla, reference
from cupyattn.attention import OUTPUTS, TABLES, AttentionPlan, attend
from cupyattn.cache import PagedKVCache, PagedMLACache, PageTable, as_cache, as_operand
from cupyattn.plan import PlanCache
from cupyattn.runs import Runs, as_split_size, max_units
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
    a captured CUDA graph stays right when they change in place (their shapes must not). The first call with
    arrays of some shapes and dtype may compile or load a kernel: make it before a capture. Without `fixed_split_size`,
    which kernel that is, and with it the rounding, depends on the batch, on what the page table has room for, and on
    the cache's strides.

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
        Every launch may start while the kernel before it on the stream is still finishing (programmatic dependent
        launch, from compute capability 9.0 on). What it has read before that one has finished, it reads again. With
        `pdl`, `kv_lens`, `kv_indptr`, `kv_indices` and `qo_indptr` are read before, once: the caller promises that the
        immediately preceding kernel does not write them. It may write `q` and the cache. (If that is a kernel of yours
        that starts early itself, it must wait for the one before it: ours take it that all before it has finished.)
        No effect on NumPy, which has no stream.
    fixed_split_size : int, optional
        Batch-invariant mode: keys are cut every so many tokens (a power of two, at least 64; 2048 is a good
        one), whoever shares the batch, so that a request's result does not depend on its neighbours, bitwise. By
        default cuts are where the GPU is loaded evenly. Each cut leaves a partial state, some 2 bytes a query head
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
    operands = (q, as_operand("decode", cache), qo_indptr, pages, out, lse, workspace)
    return attend(
        _plans, operands, fixed_split_size, sm_scale, window_left, logits_soft_cap, return_lse, pdl, validate
    )


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
    tile of query rows (8 for up to 8 query heads a KV head): 19 MB for 64 requests of up to 32768 tokens, 8 KV heads
    of 128 dimensions, splits of 2048. If `decode_workspace` has no room for them, they lie behind it.

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
    others = (qo_indptr, pages, None, None, None)
    if isinstance(cache, PagedMLACache):
        plans = mla.plans
        operands: tuple[Any, ...] = (*mla.query_parts("decode_workspace_bytes", q), cache, *others)
    else:
        plans, operands = _plans, (q, as_operand("decode_workspace_bytes", cache), *others)
    return plans.make(operands, (as_split_size(plans.caller, fixed_split_size),)).needed_bytes


def has_pairs(cache: PagedKVCache) -> bool:
    """Say whether each even KV head's rows and the next one's lie side by side, as those of NHD pages do."""
    head_strides = cache.k_strides[2], cache.v_strides[2]
    return cache.num_kv_heads % 2 == 0 and head_strides == (cache.head_dim, cache.head_dim)


class DecodePlan(AttentionPlan):
    """What a signature of `decode` settles."""

    caller = "decode"
    operand_names = ("q", ("k_pages", "v_pages"), "qo_indptr", TABLES, *OUTPUTS)

    def _check(self, operands: tuple[Any, ...], cache: PagedKVCache, tokens: str) -> None:
        q, out = operands[0], operands[-3]
        sizes = self._check_shapes(
            operands,
            {"q": (q, f"{tokens} num_qo_heads head_dim")},
            " ".join(map(str, q.shape)),
            {"head_dim": cache.head_dim},
        )
        self._check_rows("q", q, "k_pages", cache.k_pages)
        checks.check_divisible(
            f"{self.caller}: num_qo_heads", sizes["num_qo_heads"], "num_kv_heads", cache.num_kv_heads
        )
        self._check_rows("out", out, "q", q)
        self.out_shape = q.shape
        self.sm_scale = 1.0 / math.sqrt(cache.head_dim)

    def _check_dims(self, cache: PagedKVCache) -> None:
        if cache.head_dim not in kernels.DECODE_HEAD_DIMS:
            supported = ", ".join(map(str, kernels.DECODE_HEAD_DIMS))
            raise ValueError(
                f"{self.caller}: head_dim must be one of {supported} on a GPU, got {cache.head_dim}"
            )

    def _prepare(
        self, q: Any, cache: PagedKVCache, pages: PageTable, single: bool, out: Any, lse: Any
    ) -> None:
        num_tokens, num_qo_heads, head_dim = q.shape
        batch_size, group_size = pages.batch_size, num_qo_heads // cache.num_kv_heads
        if num_tokens > 0 and batch_size > 0:
            # Rows that a KV head's tile holds on average; the device finds the true counts. Any choice is right, but
            # another one rounds differently: a batch-invariant one must not depend on the batch.
            size = self.fixed_split_size
            rows = group_size if size else -(-num_tokens // batch_size) * group_size
            properties = device_properties(self.device)
            num_tiles = None
            if size is None:
                num_tiles = cache.num_kv_heads * max_units(64, batch_size, True, 1, cache.page_size, pages)
            config = kernels.decode_config(
                properties.arch, head_dim, rows, num_tiles, properties.num_sms,
                single and has_pairs(cache), batch_size * cache.num_kv_heads,
            )  # fmt: skip
            template = kernels.decode_template(checks.dtype_name(q), head_dim, config, size is not None)
            num_kv_heads = cache.num_kv_heads // config.heads
            num_ctas = config.ctas_per_sm * properties.num_sms
            num_parts = kernels.choose_num_parts(num_kv_heads, num_tiles or 0, num_ctas, properties.num_sms)
            self.runs = Runs(
                "decode", get_kernel("decode", *template, device=self.device), config,
                config.shared_bytes(head_dim), head_dim, num_rows=num_tokens * group_size * config.heads,
                single=single, num_kv_heads=num_kv_heads, page_size=cache.page_size, pages=pages,
                fixed_split_size=size, multiple=num_parts,
            )  # fmt: skip
            self.runs.fix(*self._arguments(q, cache, out, lse, batch_size, config.heads, num_parts))

    def _arguments(
        self, q: Any, cache: PagedKVCache, out: Any, lse: Any, batch_size: int, heads: int = 1,
        num_parts: int = 1,
    ) -> tuple[int, ...]:  # fmt: skip
        """Return the kernel's arguments that no table decides, but for `batch_size`.

        With `heads` of 2, a KV head is a pair of the cache's. `num_parts` is a power of two.
        """
        num_kv_heads = cache.num_kv_heads // heads
        k_strides, v_strides = ((*a[:2], heads * a[2]) for a in (cache.k_strides, cache.v_strides))
        return (
            *checks.element_strides(q)[:2], *k_strides, *v_strides, *self._output_strides(out, lse), batch_size,
            num_kv_heads // num_parts, num_parts.bit_length() - 1,
            *kernels.divisor(q.shape[1] // num_kv_heads), *kernels.divisor(cache.page_size), cache.num_pages,
        )  # fmt: skip

    def _reference(self, operands: tuple[Any, ...], **options: Any) -> tuple[Any, Any]:
        q, cache, qo_indptr, pages, *_ = operands
        return reference.decode(q, as_cache(cache), pages, qo_indptr=qo_indptr, **options)


_plans: PlanCache[AttentionPlan] = PlanCache(DecodePlan)
