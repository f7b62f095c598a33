"""Decode attention over levels of shared keys: every key is read once for all who share it, in one launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from cupyattn import checks, interop, kernels, mla, reference
from cupyattn.attention import AttentionPlan
from cupyattn.cache import PagedKVCache, PagedMLACache, PageTable, as_cache, as_operand
from cupyattn.decode import DecodePlan, decode
from cupyattn.levels import CascadeLevels
from cupyattn.plan import PlanCache
from cupyattn.runs import CascadeRuns, check_options, check_zeroed, level_sizes
from cupyattn.runtime.device import device_properties
from cupyattn.runtime.registry import get_kernel
from cupyattn.runtime.tensor_map import KeyBoxes

Levels = CascadeLevels | Sequence[tuple[PageTable, Any]]


def cascade_decode(
    q: Any,
    cache: PagedKVCache | PagedMLACache | tuple[Any, Any],
    levels: Levels,
    *,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    workspace: Any = None,
    pdl: bool = False,
    validate: bool = False,
) -> Any:
    """Attention of each request's newest tokens over keys that it shares, level by level, and its own.

    The result is that of `decode` (or, for a `PagedMLACache`, `mla_decode`) over each request's keys of all levels,
    one after the other. But keys that several requests share are read once for all of them. One kernel launch on the
    current stream, with no synchronization; as there, a captured graph stays right when lengths, tables, offsets and
    `q_indices` change in place.

    Parameters
    ----------
    q : array, shape [tokens, num_qo_heads, head_dim], float16 or bfloat16 (float32 too on NumPy)
        As for `decode` or `mla_decode`: for the latter also a pair. Row ``t`` is the token ``t`` of `levels`, or with
        `q_indices` what these say.
    cache : PagedKVCache, pair of arrays (k_pages, v_pages), or PagedMLACache
        Of the dtype and framework of `q`. All levels' pages lie in it.
    levels : CascadeLevels, or sequence of pairs (PageTable, qo_indptr)
        A sequence makes a `CascadeLevels` in every call; one made before saves some microseconds. `PrefixTree` makes
        them.
    sm_scale : float, optional
        Factor of the logits; ``1 / sqrt(head_dim)`` by default. Required for a `PagedMLACache`.
    window_left : int
        How many keys before its own a query sees: 0 only its own, -1 all. Positions count through all levels.
    logits_soft_cap : float
        Logits become ``cap * tanh(logit / cap)``; 0 for none.
    return_lse : bool
        Return the log-sum-exp of the logits too.
    out : array, shape of `q` (MLA: its last axis ckv_dim), dtype of `q`, optional
        Where to write the result. Must not overlap an input.
    lse : array, shape [tokens, num_qo_heads], float32, optional
        Where to write the log-sum-exp.
    workspace : array, uint8, optional
        From `decode_workspace`; by default each stream has one. See `decode`. Large batches need more than its default:
        every level has some 2 bytes for each element of `out`, behind the rest. So does MLA with more than 16 query
        rows a group. `cascade_workspace_bytes` says how much.
    pdl : bool
        As for `decode`: all arrays of `levels` are read early, so the kernel before must not write any.
    validate : bool
        Check the values of all tables, lengths, offsets and indices, which needs a copy to the host and waits for it.

    Returns
    -------
    out : array, shape of `q` (MLA: its last axis ckv_dim), dtype of `q`
        Rows of no request are undefined.
    lse : array, float32, natural logarithm
        Only with `return_lse`. A request without keys has out = 0 and lse = -inf.

    Raises
    ------
    TypeError
        A dtype or framework does not fit, or `levels` is no such sequence.
    ValueError
        A shape, stride, alignment, device or number does not fit, `out` overlaps an input, or there are more than
        2^15 groups; with `validate`, a value is out of range, offsets decrease, or a group ends inside of a request.
        Nothing is written.

    Notes
    -----
    States of disjoint sets of keys merge by log-sum-exp (see `merge_states`). Cascade inference: Ye et al., 2024, and
    Hydragen (Juravsky et al., arXiv:2402.05099), which take a launch for each level and each merge.

    Examples
    --------
    Two requests share page 7; the first has 3 tokens more in page 2, the second 1 in page 4.

    >>> rng = np.random.default_rng(0)
    >>> k_pages, v_pages = rng.standard_normal((2, 8, 4, 2, 64), "float32")
    >>> q = rng.standard_normal((2, 8, 64), "float32")
    >>> shared = PageTable(np.array([0, 1], "int32"), np.array([7], "int32"), np.array([4], "int32"))
    >>> own = PageTable.from_dense(np.array([[2], [4]], "int32"), np.array([3, 1], "int32"))
    >>> out = cascade_decode(q, (k_pages, v_pages), [(shared, np.array([0, 2], "int32")), (own, None)])
    >>> pages = PageTable.from_dense(np.array([[7, 2], [7, 4]], "int32"), np.array([7, 5], "int32"))
    >>> bool(np.allclose(out, decode(q, (k_pages, v_pages), pages), atol=1e-6))
    True
    """
    is_mla = isinstance(cache, PagedMLACache)
    first = q[0] if is_mla and isinstance(q, tuple | list) and q else q
    if interop.is_foreign(first):
        return interop.call(
            cascade_decode, first, q, cache, levels, sm_scale=sm_scale, window_left=window_left,
            logits_soft_cap=logits_soft_cap, return_lse=return_lse, out=out, lse=lse, workspace=workspace, pdl=pdl,
            validate=validate,
        )  # fmt: skip
    if not isinstance(levels, CascadeLevels):
        levels = CascadeLevels(levels)
    if levels.num_levels == 1 and levels.q_indices is None:
        # Nothing is shared but by the tokens of a request: what `decode` does in its own way.
        (pages, qo_indptr), decode_one = levels.levels[0], cast(Any, mla.mla_decode if is_mla else decode)
        if validate:
            operand = (
                cache if isinstance(cache, PagedMLACache) else as_cache(as_operand("cascade_decode", cache))
            )
            _validate(operand, levels, first.shape[0], workspace, window_left)
        return decode_one(
            q, cache, pages, qo_indptr=qo_indptr, sm_scale=sm_scale, window_left=window_left,
            logits_soft_cap=logits_soft_cap, return_lse=return_lse, out=out, lse=lse, workspace=workspace, pdl=pdl,
        )  # fmt: skip
    levels, operands = _operands("cascade_decode", q, cache, levels, out, lse, workspace)
    if is_mla and sm_scale is None:
        raise TypeError("cascade_decode: sm_scale must be a number for a PagedMLACache, got None")
    plan, pointers, launches = _plans(is_mla, levels.num_levels).find(operands)
    if sm_scale is None:
        sm_scale = plan.sm_scale
    sm_scale, window_left, logits_soft_cap = check_options(
        plan.caller, sm_scale, window_left, logits_soft_cap, pdl
    )
    if validate:
        _validate(as_cache(operands[-6]), levels, first.shape[0], workspace, window_left)
    options = window_left, sm_scale, logits_soft_cap, bool(return_lse), pdl
    out, lse = plan.run(operands, pointers, options, launches)
    return (out, lse) if return_lse else out


def cascade_workspace_bytes(
    q: Any, cache: PagedKVCache | PagedMLACache | tuple[Any, Any], levels: Levels
) -> int:
    """Say how large a workspace must be for calls of `cascade_decode` with arrays like these.

    Where `decode_workspace` has no room for them, partial states lie behind it: for each level some 2 bytes for every
    element of the result among them.

    Parameters
    ----------
    q, cache, levels
        As for the call; CUDA arrays of CuPy, torch or JAX. Nothing is read or written.

    Returns
    -------
    int
        Bytes, for ``decode_workspace(num_bytes=...)``.

    Raises
    ------
    TypeError, ValueError
        As the call does; TypeError for arrays that are not on a GPU.
    """
    first = q[0] if isinstance(cache, PagedMLACache) and isinstance(q, tuple | list) and q else q
    if interop.is_foreign(first):
        return int(interop.call(cascade_workspace_bytes, first, q, cache, levels))
    checks.check_is_array("cascade_workspace_bytes: q", first)
    if checks.framework_of(first) != "cupy":
        raise TypeError(f"cascade_workspace_bytes: q must be a CuPy array, got {type(first).__name__}")
    levels, operands = _operands("cascade_workspace_bytes", q, cache, levels, None, None, None)
    return _plans(isinstance(cache, PagedMLACache), levels.num_levels).make(operands).needed_bytes


def _operands(
    caller: str, q: Any, cache: Any, levels: Levels, *outputs: Any
) -> tuple[CascadeLevels, tuple[Any, ...]]:
    """Return the levels and what `_plans` take."""
    if not isinstance(levels, CascadeLevels):
        levels = CascadeLevels(levels)
    if isinstance(cache, PagedMLACache):
        return levels, (*mla.query_parts(caller, q), cache, None, levels, *outputs)
    return levels, (q, as_operand(caller, cache), None, levels, *outputs)


class _CascadePlan(AttentionPlan):
    """Where other plans have a page table, there are the levels; what they have as `qo_indptr` is None."""

    caller = "cascade_decode"

    def __init__(self, operands: tuple[Any, ...]) -> None:
        super().__init__(operands, None)

    def _tokens(self, qo_indptr: Any, levels: Any) -> str:
        one_each = levels.levels[-1][1] is None and levels.q_indices is None
        return "batch" if one_each else "total_q"

    def _check_shapes(
        self, operands: tuple[Any, ...], queries: Any, out_pattern: str, sizes: dict[str, int]
    ) -> dict[str, int]:
        *_, levels, out, lse, _ = operands
        pages, qo_indptr = levels.levels[-1]
        patterns = {
            **queries,
            "out": (out, out_pattern),
            "lse": (lse, out_pattern.rpartition(" ")[0]),
        }
        if qo_indptr is None:
            patterns["kv_lens of the last level"] = (pages.kv_lens, "batch")
            patterns["q_indices"] = (levels.q_indices, "batch")
        return self._check_arrays(patterns, sizes)

    def bind(self, arrays: Sequence[Any], place: tuple[int, ...]) -> tuple[Any, ...]:
        """Return pointers as the kernel takes them, null for the one table that it has else, and Levels."""
        bound: tuple[Any, ...] = super().bind(arrays, place)
        if isinstance(self.runs, CascadeRuns):
            addresses = [x for x in bound if isinstance(x, int)]
            before = len(addresses) - len(self.table_names)
            structs = bound[len(addresses) :]
            bound = (*addresses[:before], 0, 0, 0, 0, *structs, self.runs.pack(addresses[before + 1 :]))
        return bound


class _DecodePlan(_CascadePlan, DecodePlan):
    def _prepare(self, q: Any, cache: PagedKVCache, levels: Any, single: bool, out: Any, lse: Any) -> None:
        num_tokens = _num_tokens(q, levels)
        group_size = q.shape[1] // cache.num_kv_heads
        if not num_tokens or not levels.batch_size:
            return
        properties = device_properties(self.device)
        config = kernels.cascade_config(
            properties.arch, cache.head_dim,
            level_sizes(64, num_tokens * group_size, cache.page_size, levels),
            cache.num_kv_heads, properties.num_sms,
        )  # fmt: skip
        name, template = kernels.cascade_kernel(checks.dtype_name(q), cache.head_dim, config)
        self.runs = CascadeRuns(
            self.caller, get_kernel(name, *template, device=self.device), config,
            config.shared_bytes(cache.head_dim), cache.head_dim, group_size=group_size, num_tokens=num_tokens,
            num_kv_heads=cache.num_kv_heads, page_size=cache.page_size, levels=levels,
        )  # fmt: skip
        self.runs.fix(*self._arguments(q, cache, out, lse, 0))
        if isinstance(config, kernels.DecodeSm90Config):
            self.runs.num_structs += 1
            shape = (cache.head_dim, cache.page_size, cache.num_kv_heads, cache.num_pages)
            self.key_boxes = KeyBoxes(
                [
                    (shape, [2 * stride for stride in (token, head, page)])
                    for page, token, head in (cache.k_strides, cache.v_strides)
                ],
                config.most_box_rows,
            )

    def _reference(self, operands: tuple[Any, ...], **options: Any) -> tuple[Any, Any]:
        q, cache, _, levels, *_ = operands
        return reference.cascade_decode(q, as_cache(cache), levels, **options)


class _MLAPlan(_CascadePlan, mla.MLAPlan):
    def _prepare(
        self, q: Any, q_kpe: Any, cache: PagedMLACache, levels: Any, single: bool, out: Any, lse: Any
    ) -> None:
        num_tokens, num_qo_heads = _num_tokens(q, levels), q.shape[1]
        if not num_tokens or not levels.batch_size:
            return
        properties, dtype = device_properties(self.device), checks.dtype_name(q)
        config: kernels.MLAConfig | kernels.MLASm90Config | None = None
        num_rows = num_tokens * num_qo_heads
        if kernels.MLA_SM90_CASCADE.supports(properties.arch):
            sizes = level_sizes(64, num_rows, cache.page_size, levels)
            config = kernels.mla_sm90_cascade_config(sizes, properties.num_sms)
        if config is not None:
            kernel = get_kernel(
                "mla_sm90_cascade",
                kernels.CUDA_TYPES[dtype],
                config.tile_q,
                kernels.LEVELS,
                device=self.device,
            )
        else:
            most_rows = max(rows for _, rows in level_sizes(64, num_rows, cache.page_size, levels))
            config = kernels.mla_config(properties.arch, most_rows)
            template = kernels.mla_template(dtype, config)
            kernel = get_kernel("mla_cascade", *template, kernels.LEVELS, device=self.device)
        self.runs = CascadeRuns(
            self.caller, kernel, config, config.shared_bytes, cache.ckv_dim, group_size=num_qo_heads,
            num_tokens=num_tokens, num_kv_heads=1, page_size=cache.page_size, levels=levels,
        )  # fmt: skip
        self.runs.fix(*self._arguments(q, q_kpe, cache, out, lse, 0))
        self._map_keys(self.runs, config, cache)

    def _reference(self, operands: tuple[Any, ...], **options: Any) -> tuple[Any, Any]:
        q, q_kpe, cache, _, levels, *_ = operands
        q, q_kpe = mla.split_query(q, q_kpe, cache)
        return reference.mla_cascade_decode(q, q_kpe, cache, levels, **options)


@functools.cache
def _plans(is_mla: bool, num_levels: int) -> PlanCache[AttentionPlan]:
    """Return the plans for so many levels; a class for each number, whose operands are named for messages."""
    plan: type[_CascadePlan] = _MLAPlan if is_mla else _DecodePlan
    *before, _, _, out, lse, workspace = plan.operand_names
    table_names = CascadeLevels.names_of(num_levels)
    names = (*before, "qo_indptr", table_names, out, lse, workspace)
    return PlanCache(
        type(plan.__name__, (plan,), {"operand_names": names, "table_names": ("qo_indptr", *table_names)})
    )


def _num_tokens(q: Any, levels: CascadeLevels) -> int:
    return int((q if levels.q_indices is None else levels.q_indices).shape[0])


def _validate(cache: Any, levels: CascadeLevels, num_rows: int, workspace: Any, window_left: int) -> None:
    """Check values in memory, on the host. ValueError if one is wrong."""
    num_tokens = num_rows if levels.q_indices is None else len(levels.q_indices)
    offsets = [
        np.arange(pages.batch_size + 1) if a is None else checks.to_host(a).astype(np.int64)
        for pages, a in levels.levels
    ]
    borders = offsets[-1]
    for i, groups in enumerate(offsets):
        name = f"cascade_decode: qo_indptr[{i}]"
        checks.check_indptr(name, groups)
        if groups[-1] > num_tokens:
            raise ValueError(
                f"{name}[-1] must be at most the number of tokens, {num_tokens}, got {groups[-1]}"
            )
        inside = ~np.isin(groups, borders) & (groups > borders[0]) & (groups < borders[-1])
        if inside.any():
            raise ValueError(
                f"{name} must have borders of requests alone, got {groups[inside][0]} inside of one"
            )
    # Backwards: where the first token of each request stands, from its group's first key on.
    position = -np.diff(borders)
    for i, (groups, (pages, _)) in reversed(list(enumerate(zip(offsets, levels.levels, strict=True)))):
        first_keys = None
        if window_left >= 0:
            group = np.searchsorted(groups, borders[:-1], side="right") - 1
            inside = (group >= 0) & (group < pages.batch_size) & (np.diff(borders) > 0)
            group = group[inside]
            position[inside] += np.maximum(checks.to_host(pages.kv_lens), 0)[group]
            first_keys = np.full(pages.batch_size, np.iinfo(np.int64).max)
            np.minimum.at(first_keys, group, position[inside] - window_left)
        checks.validate_pages(
            f"cascade_decode: level {i}", pages, page_size=cache.page_size, num_pages=cache.num_pages,
            first_keys=first_keys,
        )  # fmt: skip
    if levels.q_indices is not None:
        indices = checks.to_host(levels.q_indices)[borders[0] : borders[-1]]
        if len(indices) and not 0 <= indices.min() <= indices.max() < num_rows:
            raise ValueError(
                f"cascade_decode: q_indices must be within 0..{num_rows - 1}, got {indices.min()}..{indices.max()}"
            )
        if len(np.unique(indices)) < len(indices):
            raise ValueError("cascade_decode: q_indices must name a row once at most, got one twice")
    check_zeroed("cascade_decode", workspace)
