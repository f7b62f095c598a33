"""Decode attention over a paged KV cache: MHA, MQA and GQA."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import numpy as np

from cupyattn import checks, interop, kernels, reference
from cupyattn.cache import PagedKVCache, PageTable
from cupyattn.plan import OverlapGuard, PlanCache
from cupyattn.runtime.device import device_properties
from cupyattn.runtime.registry import get_kernel
from cupyattn.runtime.workspace import default_workspace, zeroed

# Arrival counters come first in a workspace and are zero between launches. Their region has one size, so
# that calls of every shape can share a workspace: no call's partial states lie where another's counters do.
_MAX_CTAS = 4096
_MAX_MERGE_LEVELS = 3  # 24^3 CTAs
_COUNTER_BYTES = 4 * _MAX_MERGE_LEVELS * 2 * _MAX_CTAS


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
        A shape, stride, alignment, device or number does not fit, or `out` overlaps an input; with
        `validate`, a length, page id or offset is out of range. Nothing is written.

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
            validate=validate,
        )  # fmt: skip
    if isinstance(cache, PagedKVCache):
        k_pages, v_pages, layout = cache.k_pages, cache.v_pages, cache.layout
    else:
        k_pages, v_pages, layout = *checks.as_pair("decode", cache), "NHD"
    if not isinstance(pages, PageTable):
        raise TypeError(f"decode: pages must be a PageTable, got {type(pages).__name__}")
    arrays = (
        q, k_pages, v_pages, pages.kv_indptr, pages.kv_indices, pages.kv_lens, qo_indptr, out, lse, workspace,
    )  # fmt: skip
    plan = _plans.get(arrays, layout)
    sm_scale = plan.sm_scale if sm_scale is None else _finite("sm_scale", sm_scale)
    logits_soft_cap = _finite("logits_soft_cap", logits_soft_cap)
    if logits_soft_cap < 0:
        raise ValueError(f"decode: logits_soft_cap must be at least 0, got {logits_soft_cap}")
    try:
        window_left = operator.index(window_left)
    except TypeError:
        raise TypeError(f"decode: window_left must be an integer, got {type(window_left).__name__}") from None
    if not -1 <= window_left < 2**31:
        raise ValueError(f"decode: window_left must be within -1..2**31 - 1, got {window_left}")
    if validate:
        plan.validate(pages, qo_indptr, workspace, window_left)
    out, lse = plan.run(arrays, sm_scale, window_left, logits_soft_cap, return_lse)
    return (out, lse) if return_lse else out


def decode_workspace(device: int | None = None) -> Any:
    """Allocate a workspace for `decode`, large enough for every call on that device.

    Its first bytes are counters that must be zero between launches; `decode` leaves them so.

    Parameters
    ----------
    device : int, optional
        Device id; the current one by default.

    Returns
    -------
    cupy.ndarray, uint8
        About 18 MB on an H100.
    """
    properties = device_properties(device)
    return zeroed(_workspace_bytes(properties.id), properties.id)


def _finite(name: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"decode: {name} must be a number, got {type(value).__name__}") from None
    if not math.isfinite(number):
        raise ValueError(f"decode: {name} must be finite, got {number}")
    return number


class _Plan:
    """What one signature settles: the checks have passed, the sizes are known."""

    def __init__(self, arrays: tuple[Any, ...], layout: str) -> None:
        q, k_pages, v_pages, _, _, kv_lens, qo_indptr, out, lse, _ = arrays
        checks.check_same_framework("decode", dict(zip(_ARRAY_NAMES, arrays, strict=True)))
        cache = PagedKVCache(k_pages, v_pages, layout=layout)
        signature = {
            "q": (q, "batch num_qo_heads head_dim" if qo_indptr is None else "total_q num_qo_heads head_dim"),
            "kv_lens": (kv_lens, "batch"),
        }
        if qo_indptr is not None:
            signature["qo_indptr"] = (qo_indptr, "batch+1")
        settled = {"head_dim": cache.head_dim}
        if out is not None:
            signature["out"] = (out, " ".join(str(n) for n in q.shape))
        if lse is not None:
            signature["lse"] = (lse, " ".join(str(n) for n in q.shape[:2]))
        sizes = checks.check_arrays("decode", signature, settled)
        checks.check_same_dtype("decode: q", q, "k_pages", k_pages)
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
        self.layout = layout
        self.batch_size = sizes["batch"]
        self.group_size = sizes["num_qo_heads"] // cache.num_kv_heads
        self.page_size = cache.page_size
        self.num_pages = cache.num_pages
        self.num_tokens = q.shape[0]
        self.sm_scale = 1.0 / math.sqrt(cache.head_dim)
        self.overlaps = OverlapGuard(
            "decode",
            _ARRAY_NAMES,
            arrays,
            [
                (written, other)
                for written in ("out", "lse", "workspace")
                for other in _ARRAY_NAMES[: _ARRAY_NAMES.index(written)]
            ],
        )

    def validate(self, pages: PageTable, qo_indptr: Any, workspace: Any, window_left: int) -> None:
        checks.validate_pages(
            "decode", pages, page_size=self.page_size, num_pages=self.num_pages, qo_indptr=qo_indptr,
            num_tokens=self.num_tokens, window_left=window_left,
        )  # fmt: skip
        if workspace is not None and checks.to_host(workspace)[:_COUNTER_BYTES].any():
            raise ValueError(
                f"decode: workspace must have zeros in its first {_COUNTER_BYTES} bytes, got others"
            )

    def run(
        self,
        arrays: tuple[Any, ...],
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float,
        return_lse: bool,
    ) -> tuple[Any, Any]:
        raise NotImplementedError


class _NumpyPlan(_Plan):
    def __init__(self, arrays: tuple[Any, ...], layout: str) -> None:
        super().__init__(arrays, layout)
        if arrays[-1] is not None:
            raise TypeError("decode: workspace is for CUDA arrays, got one with NumPy arrays")

    def run(
        self,
        arrays: tuple[Any, ...],
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float,
        return_lse: bool,
    ) -> tuple[Any, Any]:
        q, k_pages, v_pages, kv_indptr, kv_indices, kv_lens, qo_indptr, out, lse, _ = arrays
        for name, target in (("out", out), ("lse", lse)):
            if target is not None:
                checks.check_writable(f"decode: {name}", target)
        self.overlaps.check(arrays)
        result, result_lse = reference.decode(
            q,
            PagedKVCache(k_pages, v_pages, layout=self.layout),
            PageTable(kv_indptr, kv_indices, kv_lens),
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


class _CupyPlan(_Plan):
    def __init__(self, arrays: tuple[Any, ...], layout: str) -> None:
        super().__init__(arrays, layout)
        q, k_pages, v_pages, kv_indptr, kv_indices, _, _, out, lse, workspace = arrays
        cache = PagedKVCache(k_pages, v_pages, layout=layout)
        checks.check_dtype("decode: q", q, kernels.DECODE_DTYPES)
        if cache.head_dim not in kernels.DECODE_HEAD_DIMS:
            supported = ", ".join(map(str, kernels.DECODE_HEAD_DIMS))
            raise ValueError(f"decode: head_dim must be one of {supported} on a GPU, got {cache.head_dim}")
        named = dict(zip(_ARRAY_NAMES, arrays, strict=True))
        self.device = checks.check_same_device("decode", named)
        for name in ("q", "k_pages", "v_pages", "out"):
            if named[name] is not None:
                checks.check_aligned_strides(f"decode: {name}", named[name])

        # Rows that a KV head's tile holds on average; the device finds the true counts. Any choice is right.
        rows = -(-self.num_tokens // max(self.batch_size, 1)) * self.group_size
        kv_bytes = kv_indices.size * (cache.nbytes // max(cache.num_pages, 1))
        config = kernels.decode_config(device_properties(self.device).arch, cache.head_dim, rows, kv_bytes)
        self.needed_bytes = _workspace_bytes(self.device)
        if workspace is not None:
            checks.check_dtype("decode: workspace", workspace, "uint8")
            if workspace.ndim != 1 or workspace.nbytes < self.needed_bytes or workspace.strides[0] != 1:
                raise ValueError(
                    f"decode: workspace must be contiguous, of at least {self.needed_bytes} bytes (see "
                    f"decode_workspace), got shape {list(workspace.shape)}"
                )
        self.launcher = None
        if self.num_tokens and self.batch_size:
            kernel = get_kernel(
                "decode",
                *kernels.decode_template(checks.dtype_name(q), cache.head_dim, config),
                device=self.device,
            )
            num_ctas, shared_bytes = _grid(kernel, config, cache.head_dim)
            self.lse_offset = _COUNTER_BYTES
            self.out_offset = self.lse_offset + 4 * _MAX_MERGE_LEVELS * 2 * num_ctas * config.tile_q
            self.launcher = kernel.prepare(num_ctas, config.num_threads, shared_mem=shared_bytes)
        strides_of_out = checks.element_strides(out)[:2] if out is not None else _c_strides(q.shape)
        strides_of_lse = checks.element_strides(lse) if lse is not None else (q.shape[1], 1)
        table_row_stride = 0 if kv_indptr is not None else checks.element_strides(kv_indices)[0]
        # Entries that the kernel may prefetch from the table's start on: of a table that lies there in one piece.
        in_one_piece = kv_indptr is not None or table_row_stride >= kv_indices.shape[1]
        num_table_entries = min(kv_indices.size, 2**31 - 1) if in_one_piece else 0
        self.constants = (
            *checks.element_strides(q)[:2], *cache.k_strides, *cache.v_strides, *strides_of_out, *strides_of_lse,
            self.batch_size, cache.num_kv_heads, *kernels.divisor(self.group_size), *kernels.divisor(self.page_size),
            table_row_stride, num_table_entries,
        )  # fmt: skip

    def run(
        self,
        arrays: tuple[Any, ...],
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float,
        return_lse: bool,
    ) -> tuple[Any, Any]:
        import cupy

        q, k_pages, v_pages, kv_indptr, kv_indices, kv_lens, qo_indptr, out, lse, workspace = arrays
        if self.device != cupy.cuda.runtime.getDevice():
            with cupy.cuda.Device(self.device):
                return self.run(arrays, sm_scale, window_left, logits_soft_cap, return_lse)
        self.overlaps.check(arrays)
        if out is None:
            out = cupy.empty(q.shape, q.dtype)
        if lse is None and return_lse:
            lse = cupy.empty(q.shape[:2], np.float32)
        if self.launcher is None:
            return out, lse
        stream = cupy.cuda.get_current_stream().ptr
        if workspace is None:
            workspace = default_workspace(self.needed_bytes, self.device, stream)
        scratch = workspace.data.ptr
        q_ptr, k_ptr, v_ptr, out_ptr = q.data.ptr, k_pages.data.ptr, v_pages.data.ptr, out.data.ptr
        if (q_ptr | k_ptr | v_ptr | out_ptr | scratch) % 16:
            self._report_misaligned(arrays)
        self.launcher(
            (
                q_ptr,
                k_ptr,
                v_ptr,
                qo_indptr.data.ptr if qo_indptr is not None else 0,
                kv_indptr.data.ptr if kv_indptr is not None else 0,
                kv_indices.data.ptr,
                kv_lens.data.ptr,
                out_ptr,
                lse.data.ptr if lse is not None else 0,
                scratch + self.out_offset,
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

    def _report_misaligned(self, arrays: tuple[Any, ...]) -> None:
        for name, a in zip(_ARRAY_NAMES, arrays, strict=True):
            if name in ("q", "k_pages", "v_pages", "out", "workspace") and a is not None and a.data.ptr % 16:
                raise ValueError(f"decode: {name} must be aligned to 16 bytes, got address {a.data.ptr:#x}")


_ARRAY_NAMES = (
    "q", "k_pages", "v_pages", "kv_indptr", "kv_indices", "kv_lens", "qo_indptr", "out", "lse", "workspace",
)  # fmt: skip


def _make_plan(arrays: tuple[Any, ...], layout: str) -> _Plan:
    checks.check_is_array("decode: q", arrays[0])
    plan = _NumpyPlan if checks.framework_of(arrays[0]) == "numpy" else _CupyPlan
    return plan(arrays, layout)


_plans = PlanCache(_make_plan)


def _c_strides(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[1] * shape[2], shape[2]


def _grid(kernel: Any, config: kernels.DecodeConfig, head_dim: int) -> tuple[int, int]:
    """Return as many CTAs as the device holds at once, and the shared memory of each."""
    shared_bytes = config.shared_bytes(head_dim)
    per_sm = kernel.max_active_blocks(config.num_threads, shared_bytes)
    return min(per_sm * device_properties(kernel.device).num_sms, _MAX_CTAS), shared_bytes


@functools.cache
def _workspace_bytes(device: int) -> int:
    """Return the bytes that the hungriest shape of the kernel needs: counters, then two states a CTA.

    The number of CTAs is bounded by shared memory alone here, so that nothing is compiled to find it.
    """
    properties = device_properties(device)
    most = 0
    for head_dim in kernels.DECODE_HEAD_DIMS:
        for config in kernels.decode_configs(properties.arch, head_dim):
            per_sm = properties.max_shared_per_sm // config.shared_bytes(head_dim)
            num_ctas = min(per_sm * properties.num_sms, _MAX_CTAS)
            most = max(most, 4 * 2 * num_ctas * config.tile_q * (head_dim + _MAX_MERGE_LEVELS))
    return _COUNTER_BYTES + most
