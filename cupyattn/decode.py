"""Decode attention over a paged KV cache: MHA, MQA and GQA."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyattn import checks, interop, kernels, reference
from cupyattn.cache import PagedKVCache, PageTable, as_cache, as_operand
from cupyattn.plan import Plan, PlanCache
from cupyattn.runtime.device import device_properties
from cupyattn.runtime.launch import Launcher
from cupyattn.runtime.registry import get_kernel
from cupyattn.runtime.workspace import default_workspace, zeroed

# What comes first in a workspace: Departures<TileInfo>::Memory of partials.cuh.
_MAX_CTAS = 4096
_TILE_INFO_BYTES = 64
_DEPARTURES_BYTES = 16 + _MAX_CTAS * (8 + 2 * _TILE_INFO_BYTES)
_MAX_SLOTS = 2**17  # partial states, with fixed splits: several GB


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
    plan, place = _plans.find(operands, _split_size(fixed_split_size))
    sm_scale = plan.sm_scale if sm_scale is None else checks.as_finite("decode: sm_scale", sm_scale)
    logits_soft_cap = checks.as_finite("decode: logits_soft_cap", logits_soft_cap)
    if logits_soft_cap < 0:
        raise ValueError(f"decode: logits_soft_cap must be at least 0, got {logits_soft_cap}")
    window_left = checks.as_index("decode: window_left", window_left)
    if not -1 <= window_left < 2**31:
        raise ValueError(f"decode: window_left must be within -1..2**31 - 1, got {window_left}")
    checks.check_bool("decode: pdl", pdl)
    if validate:
        _validate(q, as_cache(held), pages, qo_indptr, workspace, window_left)
    out, lse = plan.run(operands, place, sm_scale, window_left, logits_soft_cap, return_lse, pdl)
    return (out, lse) if return_lse else out


def decode_workspace(device: int | None = None, *, num_bytes: int = 0) -> Any:
    """Allocate a workspace for `decode`, large enough for every call on that device without `fixed_split_size`.

    All of it must be zero between launches; `decode` leaves it so. Launches that overlap in time must not share one:
    they would take each other's partial states, and may end in an error of the device.

    Parameters
    ----------
    device : int, optional
        Device id; the current one by default.
    num_bytes : int
        Its size at least. Calls with `fixed_split_size` may need more: `decode_workspace_bytes` says how much.

    Returns
    -------
    cupy.ndarray, uint8
        About 19 MB on an H100.

    Raises
    ------
    TypeError, ValueError
        `num_bytes` is not an integer of at least 0.
    """
    properties = device_properties(device)
    num_bytes = checks.as_index("decode_workspace: num_bytes", num_bytes)
    if num_bytes < 0:
        raise ValueError(f"decode_workspace: num_bytes must be at least 0, got {num_bytes}")
    return zeroed(max(_workspace_bytes(properties.id), num_bytes), properties.id)


def decode_workspace_bytes(
    q: Any,
    cache: PagedKVCache | tuple[Any, Any],
    pages: PageTable,
    *,
    qo_indptr: Any = None,
    fixed_split_size: int | None = None,
) -> int:
    """Say how large a workspace must be for calls of `decode` with arrays like these.

    With `fixed_split_size` it has a slot for every split that the page table has room for, each with the states of a
    tile of query rows (8 for up to 8 query heads a KV head): 36 MB for 64 requests of up to 32768 tokens, 8 KV heads
    of 128 dimensions, splits of 2048.

    Parameters
    ----------
    q, cache, pages, qo_indptr, fixed_split_size
        As for `decode`; CUDA arrays of CuPy, torch or JAX. Nothing is read or written.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    TypeError, ValueError
        As `decode` does; TypeError for arrays that are not on a GPU.
    """
    if interop.is_foreign(q):
        return int(
            interop.call(
                decode_workspace_bytes,
                q,
                q,
                cache,
                pages,
                qo_indptr=qo_indptr,
                fixed_split_size=fixed_split_size,
            )
        )
    checks.check_is_array("decode_workspace_bytes: q", q)
    if checks.framework_of(q) != "cupy":
        raise TypeError(f"decode_workspace_bytes: q must be a CuPy array, got {type(q).__name__}")
    if not isinstance(pages, PageTable):
        raise TypeError(f"decode_workspace_bytes: pages must be a PageTable, got {type(pages).__name__}")
    operands = (q, as_operand("decode_workspace_bytes", cache), pages, qo_indptr, None, None, None)
    plan, _ = _plans.find(operands, _split_size(fixed_split_size))
    return plan.needed_bytes


def _split_size(fixed_split_size: int | None) -> int | None:
    """Return it as an int: 64.0 would find the plan of 64."""
    if fixed_split_size is None:
        return None
    return checks.as_index("decode: fixed_split_size", fixed_split_size)


def _validate(
    q: Any, cache: PagedKVCache, pages: PageTable, qo_indptr: Any, workspace: Any, window_left: int
) -> None:
    checks.validate_pages(
        "decode", pages, page_size=cache.page_size, num_pages=cache.num_pages, qo_indptr=qo_indptr,
        num_tokens=q.shape[0], window_left=window_left,
    )  # fmt: skip
    if workspace is not None and checks.to_host(workspace).any():
        raise ValueError("decode: workspace must be all zeros between launches, got others")


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
        size = self.fixed_split_size = fixed_split_size
        if size is not None and (size < 64 or size & (size - 1)):
            raise ValueError(f"decode: fixed_split_size must be a power of two of at least 64, got {size}")
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
        self.needed_bytes = _workspace_bytes(self.device)
        num_tokens, num_qo_heads, head_dim = q.shape
        batch_size, group_size = pages.batch_size, num_qo_heads // cache.num_kv_heads
        self.has_work = num_tokens > 0 and batch_size > 0
        if not self.has_work:
            self._check_workspace(workspace)
            return
        # Rows that a KV head's tile holds on average; the device finds the true counts. Any choice is right, but
        # another one rounds differently: a batch-invariant one must not depend on the batch.
        rows = group_size if self.fixed_split_size else -(-num_tokens // batch_size) * group_size
        config = kernels.decode_config(device_properties(self.device).arch, head_dim, rows)
        size = self.fixed_split_size
        template = kernels.decode_template(checks.dtype_name(q), head_dim, config, size is not None)
        kernel = get_kernel("decode", *template, device=self.device)
        num_ctas, shared_bytes = _grid(kernel, config, head_dim)
        # CTAs without work only delay the next launch.
        max_units = self._max_units(
            size or config.tile_kv, num_tokens * group_size, single, config.tile_q, cache, pages
        )
        num_ctas = min(num_ctas, max_units)
        split_shift, max_splits, num_slots = 0, 0, 2 * num_ctas
        if size is not None:
            split_shift = (size // config.tile_kv).bit_length() - 1
            max_splits = num_slots = max_units
            if max_splits > _MAX_SLOTS:
                raise ValueError(
                    f"decode: fixed_split_size = {size} makes up to {max_splits} splits of what the "
                    f"page table has room for, more than {_MAX_SLOTS}"
                )
        self.lse_offset = _DEPARTURES_BYTES + num_slots * config.tile_q * head_dim * 4
        self.needed_bytes = max(
            self.needed_bytes, _DEPARTURES_BYTES + num_slots * _state_bytes(config.tile_q, head_dim)
        )
        self._check_workspace(workspace)
        self.prepare = functools.partial(
            kernel.prepare, num_ctas, config.num_threads, shared_mem=shared_bytes
        )
        self.launchers: dict[bool, Launcher] = {}  # with and without pdl
        strides_of_out = (
            checks.element_strides(out)[:2] if out is not None else (num_qo_heads * head_dim, head_dim)
        )
        strides_of_lse = checks.element_strides(lse) if lse is not None else (num_qo_heads, 1)
        table_row_stride = 0 if pages.kv_indptr is not None else checks.element_strides(pages.kv_indices)[0]
        # Entries that the kernel may prefetch from the table's start on: of a table that lies there in one piece.
        in_one_piece = not pages.is_dense or table_row_stride >= pages.kv_indices.shape[1]
        num_table_entries = min(pages.kv_indices.size, 2**31 - 1) if in_one_piece else 0
        self.constants = (
            *checks.element_strides(q)[:2], *cache.k_strides, *cache.v_strides, *strides_of_out, *strides_of_lse,
            batch_size, cache.num_kv_heads, *kernels.divisor(group_size), *kernels.divisor(cache.page_size),
            table_row_stride, num_table_entries, split_shift, max_splits,
        )  # fmt: skip

    @staticmethod
    def _max_units(
        size: int, rows: int, single: bool, tile_q: int, cache: PagedKVCache, pages: PageTable
    ) -> int:
        """Bound the tiles or fixed splits (of `size` keys) of a step from shapes alone.

        In each group of a KV head there are those of its request.
        `rows` are all requests' query rows of a KV head. With one query token a request (`single`) all have as many
        tiles of them. Else a request has rows // tile_q tiles, rounded down, and one more at most; and the products
        of tiles and splits add up to at most the product of the sums.
        """
        batch_size, tokens = pages.batch_size, int(pages.kv_indices.size) * cache.page_size
        num_q_tiles = batch_size * -(-rows // batch_size // tile_q) if single else rows // tile_q + batch_size
        if pages.is_dense:  # no request has more than a row of the table
            bound = num_q_tiles * max(-(-tokens // batch_size // size), 1)
        elif single:
            bound = num_q_tiles // batch_size * (tokens // size + batch_size)
        else:
            bound = rows // tile_q * (tokens // size) + num_q_tiles + tokens // size
        return cache.num_kv_heads * bound

    def _check_workspace(self, workspace: Any) -> None:
        if workspace is None:
            return
        checks.check_dtype("decode: workspace", workspace, "uint8")
        if workspace.ndim != 1 or workspace.nbytes < self.needed_bytes or workspace.strides[0] != 1:
            raise ValueError(
                f"decode: workspace must be contiguous, of at least {self.needed_bytes} bytes (see "
                f"decode_workspace_bytes), got shape {list(workspace.shape)}"
            )

    def check_addresses(self, arrays: Sequence[Any], place: Sequence[int]) -> None:
        super().check_addresses(arrays, place)
        if self.has_work:
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
        if not self.has_work:
            return out, lse
        launcher = self.launchers.get(pdl)
        if launcher is None:
            launcher = self.launchers[pdl] = self.prepare(pdl=pdl)
        stream = cupy.cuda.get_current_stream().ptr
        if workspace is None:
            workspace = default_workspace(self.needed_bytes, self.device, stream)
        scratch = workspace.data.ptr
        q_ptr, k_ptr, v_ptr, kv_indptr_ptr, kv_indices_ptr, kv_lens_ptr, qo_indptr_ptr, *_ = place
        launcher(
            (
                q_ptr,
                k_ptr,
                v_ptr,
                qo_indptr_ptr,
                kv_indptr_ptr,
                kv_indices_ptr,
                kv_lens_ptr,
                out.data.ptr,
                0 if lse is None else lse.data.ptr,
                scratch + _DEPARTURES_BYTES,
                scratch + self.lse_offset,
                scratch,
                *self.constants,
                window_left,
                sm_scale,
                logits_soft_cap,
            ),
            stream,
        )
        return out, lse


_plans: PlanCache[_DecodePlan] = PlanCache(_NumpyPlan, _CupyPlan)


def _grid(kernel: Any, config: kernels.DecodeConfig, head_dim: int) -> tuple[int, int]:
    """Return as many CTAs as the device holds at once, and the shared memory of each."""
    shared_bytes = config.shared_bytes(head_dim)
    per_sm = kernel.max_active_blocks(config.num_threads, shared_bytes)
    return min(per_sm * device_properties(kernel.device).num_sms, _MAX_CTAS), shared_bytes


@functools.cache
def _workspace_bytes(device: int) -> int:
    """Return the bytes that the hungriest shape of the kernel needs: two partial states a CTA.

    The number of CTAs is bounded by shared memory alone here, so that nothing is compiled to find it.
    """
    properties = device_properties(device)
    most = 0
    for head_dim in kernels.DECODE_HEAD_DIMS:
        for config in kernels.decode_configs(properties.arch, head_dim):
            per_sm = properties.max_shared_per_sm // config.shared_bytes(head_dim)
            num_ctas = min(per_sm * properties.num_sms, _MAX_CTAS)
            most = max(most, 2 * num_ctas * _state_bytes(config.tile_q, head_dim))
    return _DEPARTURES_BYTES + most


def _state_bytes(tile_q: int, head_dim: int) -> int:
    """Return the bytes of one partial state: its rows, and each row's lse once for every 16 columns."""
    return 4 * tile_q * (head_dim + head_dim // 16)
