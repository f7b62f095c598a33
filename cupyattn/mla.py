"""Multi-head latent attention (MLA, DeepSeek) over a paged cache of latent rows: decode, and appending to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cupyattn import checks, interop, kernels, reference
from cupyattn.append import AppendPlan, refuse_jax, store
from cupyattn.attention import OUTPUTS, TABLES, AttentionPlan, attend
from cupyattn.cache import PagedMLACache, PageTable
from cupyattn.plan import PlanCache
from cupyattn.rope import Rope
from cupyattn.runs import Runs, max_units
from cupyattn.runtime.device import device_properties
from cupyattn.runtime.registry import get_kernel
from cupyattn.runtime.tensor_map import KeyBoxes


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
    q_ckv, q_kpe = query_parts("mla_decode", q)
    if interop.is_foreign(q_ckv):
        return interop.call(
            mla_decode, q_ckv, q, cache, pages, sm_scale=sm_scale, qo_indptr=qo_indptr, window_left=window_left,
            logits_soft_cap=logits_soft_cap, return_lse=return_lse, out=out, lse=lse, workspace=workspace, pdl=pdl,
            fixed_split_size=fixed_split_size, validate=validate,
        )  # fmt: skip
    check_cache("mla_decode", cache)
    operands = (q_ckv, q_kpe, cache, qo_indptr, pages, out, lse, workspace)
    return attend(
        plans, operands, fixed_split_size, sm_scale, window_left, logits_soft_cap, return_lse, pdl, validate
    )


def query_parts(caller: str, q: Any) -> tuple[Any, Any]:
    """Return (q_ckv, q_kpe), or (q, None) for one array."""
    if not isinstance(q, tuple | list):
        return q, None
    if len(q) != 2:
        raise TypeError(f"{caller}: q must be an array or a pair (q_ckv, q_kpe), got {len(q)} arrays")
    if q[1] is None:
        raise TypeError(f"{caller}: q_kpe must be an array, got None")
    return q[0], q[1]


def split_query(q: Any, q_kpe: Any, cache: PagedMLACache) -> tuple[Any, Any]:
    """Return (q_ckv, q_kpe) of what `query_parts` returned, as views."""
    return (q[..., : cache.ckv_dim], q[..., cache.ckv_dim :]) if q_kpe is None else (q, q_kpe)


def check_cache(caller: str, cache: Any) -> None:
    """Raise TypeError unless it is a PagedMLACache."""
    if not isinstance(cache, PagedMLACache):
        raise TypeError(f"{caller}: cache must be a PagedMLACache, got {type(cache).__name__}")


class MLAPlan(AttentionPlan):
    """What a signature of `mla_decode` settles."""

    caller = "mla_decode"
    operand_names = ("q", "q_kpe", ("ckv_pages", "kpe_pages"), "qo_indptr", TABLES, *OUTPUTS)

    def _check(self, operands: tuple[Any, ...], cache: PagedMLACache, tokens: str) -> None:
        q, q_kpe, out = *operands[:2], operands[-3]
        sizes = {"ckv_dim": cache.ckv_dim, "kpe_dim": cache.kpe_dim}
        if q_kpe is None:
            sizes["row_dim"] = cache.ckv_dim + cache.kpe_dim
            queries = {"q": (q, f"{tokens} num_qo_heads row_dim")}
        else:
            queries = {
                "q_ckv": (q, f"{tokens} num_qo_heads ckv_dim"),
                "q_kpe": (q_kpe, f"{tokens} num_qo_heads kpe_dim"),
            }
        self._check_shapes(operands, queries, f"{tokens} num_qo_heads ckv_dim", sizes)
        for name, (a, _) in queries.items():
            self._check_rows(name, a, "ckv_pages", cache.ckv_pages)
        self._check_rows("out", out, "ckv_pages", cache.ckv_pages)
        if 0 in q.shape[1:]:
            raise ValueError(f"{self.caller}: q must have at least one head, got shape {list(q.shape)}")
        self.out_shape = (*q.shape[:2], cache.ckv_dim)
        self.q_kpe_offset = cache.ckv_dim * q.dtype.itemsize  # from q on, where that is one array

    def _check_dims(self, cache: PagedMLACache) -> None:
        ckv_dim, kpe_dim = kernels.MLA_DIMS
        if (cache.ckv_dim, cache.kpe_dim) != kernels.MLA_DIMS:
            raise ValueError(
                f"{self.caller}: cache must have ckv_dim = {ckv_dim} and kpe_dim = {kpe_dim} on a GPU, "
                f"got {cache.ckv_dim} and {cache.kpe_dim}"
            )

    def _prepare(
        self, q: Any, q_kpe: Any, cache: PagedMLACache, pages: PageTable, single: bool, out: Any, lse: Any
    ) -> None:
        num_tokens, num_qo_heads, ckv_dim = self.out_shape
        batch_size = pages.batch_size
        if num_tokens > 0 and batch_size > 0:
            # As decode chooses: by the rows of a request on average; with fixed splits, of one token.
            size = self.fixed_split_size
            rows = num_qo_heads if size else -(-num_tokens // batch_size) * num_qo_heads
            arch, dtype = device_properties(self.device).arch, checks.dtype_name(q)
            config: kernels.MLAConfig | kernels.MLASm90Config
            cluster = 1
            if kernels.MLA_SM90_DECODE.supports(arch) and size is None:
                num_sms = device_properties(self.device).num_sms
                num_tiles = max_units(64, batch_size, True, 1, cache.page_size, pages)
                config = kernels.mla_sm90_config(rows, num_tiles, num_sms, batch_size)
                cluster = kernels.mla_sm90_cluster(config, rows, num_tiles, num_sms)
            else:
                config = kernels.mla_config(arch, rows, size is not None)
            if isinstance(config, kernels.MLAConfig):
                template = kernels.mla_template(dtype, config, size is not None)
                kernel = get_kernel("mla", *template, device=self.device)
            else:
                kernel = get_kernel("mla_sm90", kernels.CUDA_TYPES[dtype], config.tile_q, device=self.device)
            self.runs = Runs(
                self.caller, kernel, config, config.shared_bytes, ckv_dim, num_rows=num_tokens * num_qo_heads,
                single=single, num_kv_heads=1, page_size=cache.page_size, pages=pages, fixed_split_size=size,
                cluster=cluster,
            )  # fmt: skip
            self.runs.fix(*self._arguments(q, q_kpe, cache, out, lse, batch_size))
            self._map_keys(self.runs, config, cache)

    def _arguments(
        self, q: Any, q_kpe: Any, cache: PagedMLACache, out: Any, lse: Any, batch_size: int
    ) -> tuple[int, ...]:
        """Return the kernel's arguments that no table decides, but for `batch_size`."""
        q_strides = checks.element_strides(q)[:2]
        return (
            *q_strides, *(q_strides if q_kpe is None else checks.element_strides(q_kpe)[:2]),
            *checks.element_strides(cache.ckv_pages)[:2], *checks.element_strides(cache.kpe_pages)[:2],
            *self._output_strides(out, lse), batch_size, *kernels.divisor(q.shape[1]),
            *kernels.divisor(cache.page_size), cache.num_pages,
        )  # fmt: skip

    def _map_keys(
        self, runs: Runs, config: kernels.MLAConfig | kernels.MLASm90Config, cache: PagedMLACache
    ) -> None:
        """Set `key_boxes` if the kernel takes KeyMaps."""
        if isinstance(config, kernels.MLASm90Config):
            runs.num_structs += 1
            arrays = (cache.ckv_pages, cache.kpe_pages)
            self.key_boxes = KeyBoxes(
                [(a.shape[::-1], a.strides[1::-1]) for a in arrays], config.most_box_rows
            )

    def bind(self, arrays: Sequence[Any], place: tuple[int, ...]) -> tuple[Any, ...]:
        """Return what `AttentionPlan.bind` does; where the queries are one array, two pointers into it."""
        q, q_kpe, *others = super().bind(arrays, place)
        return (q, q_kpe or q + self.q_kpe_offset, *others)

    def _reference(self, operands: tuple[Any, ...], **options: Any) -> tuple[Any, Any]:
        q, q_kpe, cache, qo_indptr, pages, *_ = operands
        q, q_kpe = split_query(q, q_kpe, cache)
        return reference.mla_decode(q, q_kpe, cache, pages, qo_indptr=qo_indptr, **options)


plans: PlanCache[AttentionPlan] = PlanCache(MLAPlan)


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
        refuse_jax("mla_append", ckv)
        return interop.call(
            mla_append, ckv, ckv, kpe, cache, pages, qo_indptr=qo_indptr, rope=rope, q_kpe=q_kpe,
            q_kpe_out=q_kpe_out, validate=validate,
        )  # fmt: skip
    check_cache("mla_append", cache)
    return store(_append_plans, (ckv, kpe, cache, q_kpe, q_kpe_out, qo_indptr, pages), rope, validate)


class _MLAAppendPlan(AppendPlan):
    """The kernel's keys, which it rotates, are kpe, and its values are ckv, of one head."""

    caller = "mla_append"
    row_names = ("ckv", "kpe")
    row_patterns = ("ckv_dim", "kpe_dim")
    page_names = ("ckv_pages", "kpe_pages")
    query_names = ("q_kpe", "q_kpe_out")
    query_dim = "kpe_dim"

    def _layout(self, rows: list[Any], cache: PagedMLACache) -> tuple[tuple[int, ...], int, int]:
        ckv_stride, kpe_stride = (checks.element_strides(a)[0] for a in rows)
        ckv_pages, kpe_pages = (checks.element_strides(a)[:2] for a in (cache.ckv_pages, cache.kpe_pages))
        return (kpe_stride, 0, ckv_stride, 0, *kpe_pages, 0, *ckv_pages, 0), 1, cache.ckv_dim

    def bind(self, arrays: Sequence[Any], place: tuple[int, ...]) -> tuple[Any, ...]:
        ckv, kpe, ckv_pages, kpe_pages, *others = super().bind(arrays, place)
        return (kpe, ckv, kpe_pages, ckv_pages, *others)

    def _reference(self, operands: tuple[Any, ...]) -> None:
        ckv, kpe, cache, _, _, qo_indptr, pages = operands
        reference.mla_append(ckv, kpe, cache, pages, qo_indptr=qo_indptr, rope=self.rope)


_append_plans: PlanCache[AppendPlan] = PlanCache(_MLAAppendPlan)
