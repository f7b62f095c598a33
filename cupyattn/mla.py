"""Multi-head latent attention (MLA, DeepSeek) over a paged cache of latent rows: decode, and appending to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyattn import checks, interop, kernels, reference, runs
from cupyattn.append import HALF_SPLIT, INTERLEAVED, NO_ROPE, turns_on_device
from cupyattn.cache import PagedMLACache, PageTable
from cupyattn.plan import Plan, PlanCache
from cupyattn.rope import Rope
from cupyattn.runs import Runs, as_split_size, check_options
from cupyattn.runtime.device import device_properties
from cupyattn.runtime.registry import get_kernel


def mla_decode(
    q: Any,
    cache: PagedMLACache,
    pages: PageTable,
    *,
    sm_scale: float,
    qo_indptr: Any = None,
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
    """Multi-head latent attention, absorbed, of each request's newest tokens over its rows in a paged cache.

    All query heads share the keys ``(ckv, kpe)`` and the values ``ckv``. One kernel launch on the current stream; no
    synchronization. Lengths and tables are read on the device, as `decode` does.

    Parameters
    ----------
    q : array, shape [batch, num_qo_heads, ckv_dim + kpe_dim], or pair (q_ckv, q_kpe), float16 or bfloat16
        The query of one token per request (float32 too on NumPy): its part for the latent vector, with the key's
        up-projection folded in (see Notes), and its rotated part, in one array or in two. With `qo_indptr`,
        [total_q, ...].
    cache : PagedMLACache
        Of the dtype and framework of `q`. On a GPU, ckv_dim is 512 and kpe_dim 64.
    pages : PageTable
        `kv_lens` counts the tokens of `q` too: their rows are in the cache already (see `mla_append`).
    sm_scale : float
        Factor of the logits. Required: it follows from the head size before folding (``1 / sqrt(128 + 64)`` in
        DeepSeek-V2 and V3, times YaRN's factor), of which nothing here knows.
    qo_indptr, window_left, logits_soft_cap, return_lse, lse, workspace, pdl, fixed_split_size, validate
        As for `decode`.
    out : array, shape [batch or total_q, num_qo_heads, ckv_dim], dtype of `q`, optional
        Where to write the result. Must not overlap an input.

    Returns
    -------
    out : array, shape [batch or total_q, num_qo_heads, ckv_dim], dtype of `q`
        Latent: the value's up-projection comes after.
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
    DeepSeek-V2, arXiv:2405.04434, section 2.1.2. A head's key is ``k = (W_uk @ ckv, kpe)`` and its value
    ``v = W_uv @ ckv``. Since ``q_nope . (W_uk @ ckv) = (W_uk.T @ q_nope) . ckv``, the up-projections can be folded:
    ``q_ckv = W_uk.T @ q_nope`` before, and ``W_uv @ out`` after. Then a token costs ckv_dim + kpe_dim numbers for all
    heads together.

    Examples
    --------
    One head of two, unfolded: keys and values of 2 dimensions from latent vectors of 4.

    >>> rng = np.random.default_rng(0)
    >>> w_uk, w_uv, ckv, kpe = (rng.standard_normal(shape, "float32") for shape in ((2, 4), (2, 4), (3, 4), (3, 2)))
    >>> cache = PagedMLACache(ckv[None], kpe[None])  # one page of three tokens
    >>> pages = PageTable.from_dense(np.array([[0]], "int32"), np.array([3], "int32"))
    >>> q_nope, q_kpe = rng.standard_normal((2, 2), "float32")
    >>> out = mla_decode(((w_uk.T @ q_nope)[None, None], q_kpe[None, None]), cache, pages, sm_scale=0.5)
    >>> weights = np.exp(0.5 * (ckv @ w_uk.T @ q_nope + kpe @ q_kpe))
    >>> bool(np.allclose(w_uv @ out[0, 0], weights @ (ckv @ w_uv.T) / weights.sum(), atol=1e-5))
    True
    """
    q_ckv, q_kpe = _query_parts(q)
    if interop.is_foreign(q_ckv):
        return interop.call(
            mla_decode, q_ckv, q, cache, pages, sm_scale=sm_scale, qo_indptr=qo_indptr, window_left=window_left,
            logits_soft_cap=logits_soft_cap, return_lse=return_lse, out=out, lse=lse, workspace=workspace, pdl=pdl,
            fixed_split_size=fixed_split_size, validate=validate,
        )  # fmt: skip
    _check_groups("mla_decode", cache, pages)
    operands = (q_ckv, q_kpe, cache, pages, qo_indptr, out, lse, workspace)
    plan, place = _plans.find(operands, as_split_size("mla_decode", fixed_split_size))
    sm_scale, window_left, logits_soft_cap = check_options(
        "mla_decode", sm_scale, window_left, logits_soft_cap, pdl
    )
    if validate:
        runs.validate("mla_decode", q_ckv, cache, pages, qo_indptr, workspace, window_left)
    out, lse = plan.run(operands, place, sm_scale, window_left, logits_soft_cap, return_lse, pdl)
    return (out, lse) if return_lse else out


def needed_workspace_bytes(
    q: Any, cache: PagedMLACache, pages: PageTable, qo_indptr: Any, fixed_split_size: int | None
) -> int:
    """Do the work of `decode_workspace_bytes`, for `mla_decode`."""
    operands = (*_query_parts(q), cache, pages, qo_indptr, None, None, None)
    plan, _ = _plans.find(operands, as_split_size("mla_decode", fixed_split_size))
    return plan.needed_bytes


def _query_parts(q: Any) -> tuple[Any, Any]:
    """Return (q_ckv, q_kpe), or (q, None) for one array."""
    if not isinstance(q, tuple | list):
        return q, None
    if len(q) != 2:
        raise TypeError(f"mla_decode: q must be an array or a pair (q_ckv, q_kpe), got {len(q)} arrays")
    if q[1] is None:
        raise TypeError("mla_decode: q_kpe must be an array, got None")
    return q[0], q[1]


def _check_groups(caller: str, cache: Any, pages: Any) -> None:
    if not isinstance(cache, PagedMLACache):
        raise TypeError(f"{caller}: cache must be a PagedMLACache, got {type(cache).__name__}")
    if not isinstance(pages, PageTable):
        raise TypeError(f"{caller}: pages must be a PageTable, got {type(pages).__name__}")


_TABLES = ("kv_indptr", "kv_indices", "kv_lens")
_INPUTS = ("q", "q_kpe", "ckv_pages", "kpe_pages", *_TABLES, "qo_indptr")
_OUTPUTS = ("out", "lse", "workspace")


class _MLAPlan(Plan):
    caller = "mla_decode"
    operand_names = ("q", "q_kpe", ("ckv_pages", "kpe_pages"), _TABLES, "qo_indptr", *_OUTPUTS)
    written = ("out", "lse")
    apart = tuple((a, b) for i, a in enumerate(_OUTPUTS) for b in (*_INPUTS, *_OUTPUTS[:i]))

    needed_bytes = 0  # of workspace

    def __init__(self, operands: tuple[Any, ...], fixed_split_size: int | None) -> None:
        super().__init__(operands)
        q, q_kpe, cache, pages, qo_indptr, out, lse, workspace = operands
        self.fixed_split_size = fixed_split_size
        tokens = "batch" if qo_indptr is None else "total_q"
        settled = {"ckv_dim": cache.ckv_dim, "kpe_dim": cache.kpe_dim}
        if q_kpe is None:
            settled["row_dim"] = cache.ckv_dim + cache.kpe_dim
            signature = {"q": (q, f"{tokens} num_qo_heads row_dim")}
        else:
            signature = {
                "q_ckv": (q, f"{tokens} num_qo_heads ckv_dim"),
                "q_kpe": (q_kpe, f"{tokens} num_qo_heads kpe_dim"),
            }
        for name, a in signature.items():
            checks.check_is_array(f"mla_decode: {name}", a[0])
        signature["kv_lens"] = (pages.kv_lens, "batch")
        if qo_indptr is not None:
            signature["qo_indptr"] = (qo_indptr, "batch+1")
        if out is not None:
            signature["out"] = (out, f"{tokens} num_qo_heads ckv_dim")
        if lse is not None:
            signature["lse"] = (lse, f"{tokens} num_qo_heads")
        checks.check_arrays("mla_decode", signature, settled)
        for name in ("q", "q_ckv", "q_kpe", "out"):
            if name in signature:
                a = signature[name][0]
                checks.check_same_dtype(f"mla_decode: {name}", a, "ckv_pages", cache.ckv_pages)
                checks.check_last_axis_contiguous(f"mla_decode: {name}", a)
        if 0 in q.shape[1:]:
            raise ValueError(f"mla_decode: q must have at least one head, got shape {list(q.shape)}")
        if qo_indptr is not None:
            checks.check_dtype("mla_decode: qo_indptr", qo_indptr, "int32")
            checks.check_last_axis_contiguous("mla_decode: qo_indptr", qo_indptr)
        if lse is not None:
            checks.check_dtype("mla_decode: lse", lse, "float32")
        self.out_shape = (*q.shape[:2], cache.ckv_dim)
        self._prepare(q, q_kpe, cache, pages, qo_indptr is None, out, lse, workspace)

    def _prepare(
        self, q: Any, q_kpe: Any, cache: PagedMLACache, pages: PageTable, single: bool, out: Any, lse: Any,
        workspace: Any,
    ) -> None:  # fmt: skip
        """Settle what only this backend needs. No array may be kept: a plan outlives them."""
        raise NotImplementedError


class _NumpyPlan(_MLAPlan):
    def _prepare(
        self, q: Any, q_kpe: Any, cache: PagedMLACache, pages: PageTable, single: bool, out: Any, lse: Any,
        workspace: Any,
    ) -> None:  # fmt: skip
        if workspace is not None:
            raise TypeError("mla_decode: workspace is for CUDA arrays, got one with NumPy arrays")

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
        q, q_kpe, cache, pages, qo_indptr, out, lse, _ = operands
        if q_kpe is None:
            q, q_kpe = q[..., : cache.ckv_dim], q[..., cache.ckv_dim :]
        result, result_lse = reference.mla_decode(
            q,
            q_kpe,
            cache,
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


class _CupyPlan(_MLAPlan):
    device: int

    def _prepare(
        self, q: Any, q_kpe: Any, cache: PagedMLACache, pages: PageTable, single: bool, out: Any, lse: Any,
        workspace: Any,
    ) -> None:  # fmt: skip
        checks.check_dtype("mla_decode: q", q, kernels.DECODE_DTYPES)
        ckv_dim, kpe_dim = kernels.MLA_DIMS
        if (cache.ckv_dim, cache.kpe_dim) != kernels.MLA_DIMS:
            raise ValueError(
                f"mla_decode: cache must have ckv_dim = {ckv_dim} and kpe_dim = {kpe_dim} on a GPU, "
                f"got {cache.ckv_dim} and {cache.kpe_dim}"
            )
        named = {
            "q": q,
            "q_kpe": q_kpe,
            "ckv_pages": cache.ckv_pages,
            "kpe_pages": cache.kpe_pages,
            "out": out,
        }
        for name, a in named.items():
            if a is not None:
                checks.check_aligned_strides(f"mla_decode: {name}", a)
        self.needed_bytes = runs.workspace_bytes(self.device)
        num_tokens, num_qo_heads = q.shape[:2]
        batch_size = pages.batch_size
        self.runs: Runs | None = None
        if num_tokens > 0 and batch_size > 0:
            # As decode chooses: by the rows of a request on average; with fixed splits, of one token.
            size = self.fixed_split_size
            rows = num_qo_heads if size else -(-num_tokens // batch_size) * num_qo_heads
            arch, dtype = device_properties(self.device).arch, checks.dtype_name(q)
            config: kernels.MLAConfig | kernels.MLASm90Config | None = None
            if kernels.MLA_SM90_DECODE.supports(arch) and size is None:
                num_tiles = runs.max_units(64, batch_size, True, 1, cache.page_size, pages)
                config = kernels.mla_sm90_config(rows, num_tiles, device_properties(self.device).num_sms)
                rows = min(rows, 16)
            if config is not None:
                kernel = get_kernel("mla_sm90", kernels.CUDA_TYPES[dtype], config.tile_q, device=self.device)
            else:
                config = kernels.mla_config(arch, rows, size is not None)
                template = kernels.mla_template(dtype, config, size is not None)
                kernel = get_kernel("mla", *template, device=self.device)
            self.runs = Runs(
                "mla_decode", kernel, config, config.shared_bytes, ckv_dim, num_rows=num_tokens * num_qo_heads,
                single=single, num_kv_heads=1, page_size=cache.page_size, pages=pages, fixed_split_size=size,
            )  # fmt: skip
            self.needed_bytes = self.runs.needed_bytes
            strides_of_q = checks.element_strides(q)[:2]
            strides_of_q_kpe = strides_of_q if q_kpe is None else checks.element_strides(q_kpe)[:2]
            strides_of_out = (
                checks.element_strides(out)[:2] if out is not None else (num_qo_heads * ckv_dim, ckv_dim)
            )
            strides_of_lse = checks.element_strides(lse) if lse is not None else (num_qo_heads, 1)
            self.constants = (
                *strides_of_q, *strides_of_q_kpe, *checks.element_strides(cache.ckv_pages)[:2],
                *checks.element_strides(cache.kpe_pages)[:2], *strides_of_out, *strides_of_lse, batch_size,
                *kernels.divisor(num_qo_heads), *kernels.divisor(cache.page_size), *self.runs.table_arguments,
            )  # fmt: skip
        self.q_kpe_offset = ckv_dim * q.dtype.itemsize  # from q on, where that is one array
        runs.check_workspace("mla_decode", workspace, self.needed_bytes)

    def check_addresses(self, arrays: Sequence[Any], place: Sequence[int]) -> None:
        super().check_addresses(arrays, place)
        if self.runs is not None:
            for name, address in zip(self.array_names, place, strict=True):
                if name in ("q", "q_kpe", "ckv_pages", "kpe_pages", "out", "workspace") and address % 16:
                    raise ValueError(
                        f"mla_decode: {name} must be aligned to 16 bytes, got address {address:#x}"
                    )

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
        q, _, _, _, _, out, lse, workspace = operands
        cupy = self.xp
        if out is None:
            out = cupy.empty(self.out_shape, q.dtype)
        if lse is None and return_lse:
            lse = cupy.empty(self.out_shape[:2], np.float32)
        if self.runs is not None:
            (
                q_ptr,
                q_kpe_ptr,
                ckv_ptr,
                kpe_ptr,
                kv_indptr_ptr,
                kv_indices_ptr,
                kv_lens_ptr,
                qo_indptr_ptr,
                *_,
            ) = place
            self.runs(
                (
                    q_ptr, q_kpe_ptr or q_ptr + self.q_kpe_offset, ckv_ptr, kpe_ptr, qo_indptr_ptr, kv_indptr_ptr,
                    kv_indices_ptr, kv_lens_ptr, out.data.ptr, 0 if lse is None else lse.data.ptr,
                ),
                workspace,
                (*self.constants, window_left, sm_scale, logits_soft_cap),
                cupy.cuda.get_current_stream().ptr,
                pdl,
            )  # fmt: skip
        return out, lse


_plans: PlanCache[_MLAPlan] = PlanCache(_NumpyPlan, _CupyPlan)


def mla_append(
    ckv: Any,
    kpe: Any,
    cache: PagedMLACache,
    pages: PageTable,
    *,
    qo_indptr: Any = None,
    rope: Rope | None = None,
    q_kpe: Any = None,
    q_kpe_out: Any = None,
    validate: bool = False,
) -> Any:
    """Write the newest tokens' latent rows into their pages; rotate their `kpe`, and their queries' if asked for.

    One kernel launch on the current stream; no synchronization. Positions follow from `pages` as for `append`.

    Parameters
    ----------
    ckv : array, shape [batch, ckv_dim], dtype of the cache
        One token per request; with `qo_indptr`, [total_tokens, ckv_dim].
    kpe : array, shape [batch or total_tokens, kpe_dim], dtype of the cache
    cache : PagedMLACache
        Written in place.
    pages, qo_indptr, validate
        As for `append`.
    rope : Rope, optional
        Rotates `kpe` by its positions before it is stored, and `q_kpe`. DeepSeek's is interleaved.
    q_kpe : array, shape [batch or total_tokens, num_qo_heads, kpe_dim], dtype of the cache, optional
        The rotated part of the new tokens' queries, to be rotated in the same launch; any strides, such as a view of
        the last kpe_dim columns of `q`.
    q_kpe_out : array, shape and dtype of `q_kpe`, optional
        Where to write it; may be `q_kpe` itself.

    Returns
    -------
    array, shape and dtype of `q_kpe`, or None without `q_kpe`
        It rotated (a copy without `rope`).

    Raises
    ------
    TypeError
        A dtype or framework does not fit; the cache is of immutable (JAX) arrays.
    ValueError
        A shape, stride or device does not fit, `q_kpe_out` without `q_kpe`, or, with `validate`, a value out of
        range. Nothing is written.

    Examples
    --------
    >>> cache = PagedMLACache.allocate(4, 16, dtype="float16")
    >>> pages = PageTable.from_dense(np.array([[2, 0]], "int32"), np.array([17], "int32"))
    >>> mla_append(np.ones((1, 512), "float16"), np.ones((1, 64), "float16"), cache, pages, rope=Rope())
    >>> float(cache.ckv_pages[0, 0, 0])  # the 17th token: slot 0 of page 0
    1.0
    """
    if interop.is_foreign(ckv):
        if checks.framework_of(ckv) == "jax":
            raise TypeError(
                "mla_append: cache cannot be of JAX arrays, which are immutable; keep it in CuPy or NumPy"
            )
        return interop.call(
            mla_append, ckv, ckv, kpe, cache, pages, qo_indptr=qo_indptr, rope=rope, q_kpe=q_kpe,
            q_kpe_out=q_kpe_out, validate=validate,
        )  # fmt: skip
    _check_groups("mla_append", cache, pages)
    if rope is not None and not isinstance(rope, Rope):
        raise TypeError(f"mla_append: rope must be a Rope, got {type(rope).__name__}")
    operands = (ckv, kpe, cache, q_kpe, q_kpe_out, qo_indptr, pages)
    plan, place = _append_plans.find(operands, rope)
    if validate:
        checks.validate_pages(
            "mla_append", pages, page_size=cache.page_size, num_pages=cache.num_pages, qo_indptr=qo_indptr,
            num_tokens=ckv.shape[0],
        )  # fmt: skip
    return plan.run(operands, place)


class _AppendPlan(Plan):
    caller = "mla_append"
    operand_names = ("ckv", "kpe", ("ckv_pages", "kpe_pages"), "q_kpe", "q_kpe_out", "qo_indptr", _TABLES)
    written = ("ckv_pages", "kpe_pages", "q_kpe_out")
    apart = (
        *((a, b) for a in ("ckv_pages", "kpe_pages") for b in ("ckv", "kpe", "q_kpe")),
        *(("q_kpe_out", b) for b in ("ckv", "kpe", "ckv_pages", "kpe_pages", "q_kpe")),
    )
    may_coincide = (("q_kpe_out", "q_kpe"),)

    def __init__(self, operands: tuple[Any, ...], rope: Rope | None) -> None:
        super().__init__(operands)
        ckv, kpe, cache, q_kpe, q_kpe_out, qo_indptr, pages = operands
        if q_kpe is None and q_kpe_out is not None:
            raise ValueError("mla_append: q_kpe_out needs q_kpe, got None")
        tokens = "batch" if qo_indptr is None else "total_tokens"
        signature = {
            "ckv": (ckv, f"{tokens} ckv_dim"),
            "kpe": (kpe, f"{tokens} kpe_dim"),
            "kv_lens": (pages.kv_lens, "batch"),
        }
        for name, a, pattern in (
            ("qo_indptr", qo_indptr, "batch+1"),
            ("q_kpe", q_kpe, f"{tokens} num_qo_heads kpe_dim"),
            ("q_kpe_out", q_kpe_out, f"{tokens} num_qo_heads kpe_dim"),
        ):
            if a is not None:
                signature[name] = (a, pattern)
        checks.check_arrays("mla_append", signature, {"ckv_dim": cache.ckv_dim, "kpe_dim": cache.kpe_dim})
        for name in ("ckv", "kpe", "q_kpe", "q_kpe_out"):
            if name in signature:
                checks.check_same_dtype(
                    f"mla_append: {name}", signature[name][0], "ckv_pages", cache.ckv_pages
                )
                checks.check_last_axis_contiguous(f"mla_append: {name}", signature[name][0])
        if qo_indptr is not None:
            checks.check_dtype("mla_append: qo_indptr", qo_indptr, "int32")
            checks.check_last_axis_contiguous("mla_append: qo_indptr", qo_indptr)
        if rope is not None:
            rope.inv_freq_array(cache.kpe_dim)  # raises if it does not fit
        self.rope = rope
        self._prepare(ckv, kpe, cache, q_kpe, q_kpe_out, pages)

    def _prepare(
        self, ckv: Any, kpe: Any, cache: PagedMLACache, q_kpe: Any, q_kpe_out: Any, pages: PageTable
    ) -> None:
        """Settle what only this backend needs. No array may be kept: a plan outlives them."""


class _NumpyAppendPlan(_AppendPlan):
    def _run(self, operands: tuple[Any, ...], place: tuple[int, ...]) -> Any:
        ckv, kpe, cache, q_kpe, q_kpe_out, qo_indptr, pages = operands
        reference.mla_append(ckv, kpe, cache, pages, qo_indptr=qo_indptr, rope=self.rope)
        if q_kpe is None:
            return None
        rotated = reference.rotate_queries(q_kpe, pages, qo_indptr, self.rope)
        if q_kpe_out is None:
            return rotated
        q_kpe_out[...] = rotated
        return q_kpe_out


class _CupyAppendPlan(_AppendPlan):
    device: int

    def _prepare(
        self, ckv: Any, kpe: Any, cache: PagedMLACache, q_kpe: Any, q_kpe_out: Any, pages: PageTable
    ) -> None:
        checks.check_dtype("mla_append: ckv", ckv, kernels.DECODE_DTYPES)
        ckv_dim, kpe_dim = cache.ckv_dim, cache.kpe_dim
        for name, dim in (("ckv_dim", ckv_dim), ("kpe_dim", kpe_dim)):
            if dim % 2 or dim > 512:
                raise ValueError(f"mla_append: {name} must be even and at most 512 on a GPU, got {dim}")
        mode, self.inv_freq_ptr, rotary_dim = NO_ROPE, 0, 0
        if self.rope is not None:
            mode = INTERLEAVED if self.rope.interleaved else HALF_SPLIT
            inv_freq = turns_on_device(self.rope, kpe_dim, self.device)
            self.inv_freq_ptr, rotary_dim = inv_freq.data.ptr, 2 * inv_freq.shape[0]
        self.launcher = None
        if ckv.shape[0]:
            kernel = get_kernel("append", kernels.CUDA_TYPES[checks.dtype_name(ckv)], device=self.device)
            self.launcher = kernel.prepare(ckv.shape[0], kernels.APPEND_THREADS)
        num_qo_heads = 0 if q_kpe is None else q_kpe.shape[1]
        q_strides = checks.element_strides(q_kpe)[:2] if q_kpe is not None else (0, 0)
        q_out_strides = (
            checks.element_strides(q_kpe_out)[:2]
            if q_kpe_out is not None
            else (num_qo_heads * kpe_dim, kpe_dim)
        )
        table_row_stride = checks.element_strides(pages.kv_indices)[0] if pages.is_dense else 0
        # The append kernel's keys, which it rotates, are kpe, and its values are ckv, of one head.
        self.constants = (
            checks.element_strides(kpe)[0], 0, checks.element_strides(ckv)[0], 0,
            *checks.element_strides(cache.kpe_pages)[:2], 0, *checks.element_strides(cache.ckv_pages)[:2], 0,
            *q_strides, *q_out_strides, pages.batch_size, 1, num_qo_heads, kpe_dim, ckv_dim,
            cache.page_size, table_row_stride, rotary_dim, mode,
        )  # fmt: skip

    def _run(self, operands: tuple[Any, ...], place: tuple[int, ...]) -> Any:
        _, _, _, q_kpe, q_kpe_out, _, _ = operands
        if q_kpe is not None and q_kpe_out is None:
            q_kpe_out = self.xp.empty(q_kpe.shape, q_kpe.dtype)
        if self.launcher is not None:
            ckv_ptr, kpe_ptr, ckv_pages_ptr, kpe_pages_ptr, q_kpe_ptr, _, *tables = place
            q_kpe_out_ptr = 0 if q_kpe_out is None else q_kpe_out.data.ptr
            self.launcher(
                (
                    kpe_ptr, ckv_ptr, kpe_pages_ptr, ckv_pages_ptr, q_kpe_ptr, q_kpe_out_ptr, *tables,
                    self.inv_freq_ptr, *self.constants,
                )
            )  # fmt: skip
        return q_kpe_out


_append_plans: PlanCache[_AppendPlan] = PlanCache(_NumpyAppendPlan, _CupyAppendPlan)
