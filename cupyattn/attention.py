"""What `decode` and `mla_decode` share: what their plans settle, and how a call runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np

from cupyattn import checks, kernels, runs
from cupyattn.cache import PageTable, as_cache
from cupyattn.plan import Plan, PlanCache, flatten
from cupyattn.runs import Runs, as_split_size, check_options
from cupyattn.runtime.launch import BoundLaunch
from cupyattn.runtime.tensor_map import KeyBoxes

TABLES = ("kv_indptr", "kv_indices", "kv_lens")
OUTPUTS = ("out", "lse", "workspace")

_MAX_LAUNCHES = 16  # kept of one place, some 2 KiB each: of several streams, or with other options

Patterns: TypeAlias = dict[str, tuple[Any, str]]  # as `checks.check_arrays` takes them


def attend(
    plans: PlanCache[AttentionPlan],
    operands: tuple[Any, ...],
    fixed_split_size: int | None,
    sm_scale: float | None,
    window_left: int,
    logits_soft_cap: float,
    return_lse: bool,
    pdl: bool,
    validate: bool,
) -> Any:
    """Do the work of `decode` or `mla_decode`; `operands` are those of their plans."""
    pages = operands[-4]
    if not isinstance(pages, PageTable):
        raise TypeError(f"{plans.caller}: pages must be a PageTable, got {type(pages).__name__}")
    plan, pointers, launches = plans.find(operands, (as_split_size(plans.caller, fixed_split_size),))
    if sm_scale is None:
        sm_scale = plan.sm_scale
    sm_scale, window_left, logits_soft_cap = check_options(
        plan.caller, sm_scale, window_left, logits_soft_cap, pdl
    )
    if validate:
        q, *_, cache, qo_indptr, _, _, _, workspace = operands
        runs.validate(plan.caller, q, as_cache(cache), pages, qo_indptr, workspace, window_left)
    options = window_left, sm_scale, logits_soft_cap, bool(return_lse), pdl
    out, lse = plan.run(operands, pointers, options, launches)
    return (out, lse) if return_lse else out


class AttentionPlan(Plan):
    """Operands: queries (one array or two), cache, `qo_indptr`, page table, as kernels take them, and `OUTPUTS`."""

    written = ("out", "lse")
    table_names: ClassVar[tuple[str, ...]] = ("qo_indptr", *TABLES)

    out_shape: tuple[int, ...]
    sm_scale: float | None = None  # where a call gives none
    needed_bytes = 0  # of workspace
    runs: Runs | None = None  # None where there is no work
    key_boxes: KeyBoxes | None = None  # of a kernel that takes KeyMaps

    def __init_subclass__(cls) -> None:
        names: list[str] = []
        for operand in getattr(cls, "operand_names", ()):  # none of a class that others build on
            names += (operand,) if isinstance(operand, str) else operand
        cls.apart = tuple((a, b) for i, a in enumerate(names) if a in OUTPUTS for b in names[:i])

    def __init__(self, operands: tuple[Any, ...], fixed_split_size: int | None) -> None:
        super().__init__(operands)
        *queries, cache, qo_indptr, pages, out, lse, workspace = operands
        cache = as_cache(cache)
        self.fixed_split_size = fixed_split_size
        self._check(operands, cache, self._tokens(qo_indptr, pages))
        self._check_offsets(qo_indptr)
        if lse is not None:
            checks.check_dtype(f"{self.caller}: lse", lse, "float32")
        if self.device is None:
            if workspace is not None:
                raise TypeError(f"{self.caller}: workspace is for CUDA arrays, got one with NumPy arrays")
            return
        checks.check_dtype(f"{self.caller}: q", queries[0], kernels.DECODE_DTYPES)
        self._check_dims(cache)
        self._aligned = [name for name in self.array_names if name not in (*self.table_names, "lse")]
        for name, a in zip(self.array_names, flatten(operands), strict=True):
            if a is not None and name in self._aligned and name != "workspace":
                checks.check_aligned_strides(f"{self.caller}: {name}", a)
        self._prepare(*queries, cache, pages, qo_indptr is None, out, lse)
        self.needed_bytes = self.runs.needed_bytes if self.runs else runs.workspace_bytes(self.device)
        runs.check_workspace(self.caller, workspace, self.needed_bytes)

    def _tokens(self, qo_indptr: Any, pages: Any) -> str:
        """Return what patterns call the first axis of queries and `out`."""
        return "batch" if qo_indptr is None else "total_q"

    def _check(self, operands: tuple[Any, ...], cache: Any, tokens: str) -> None:
        """Check queries and `out`, and set `out_shape`; `tokens` is what patterns call their first axis."""
        raise NotImplementedError

    def _check_dims(self, cache: Any) -> None:
        """Raise ValueError if there is no kernel for the cache's dimensions."""
        raise NotImplementedError

    def _prepare(self, *args: Any) -> None:
        """Set `runs` where there is work. No array may be kept: a plan outlives them.

        Parameters are the queries, cache, pages, whether every request has one query token, out and lse.
        """
        raise NotImplementedError

    def _reference(self, operands: tuple[Any, ...], **options: Any) -> tuple[Any, Any]:
        """Compute out and lse in NumPy and float64."""
        raise NotImplementedError

    def _check_shapes(
        self, operands: tuple[Any, ...], queries: Patterns, out_pattern: str, sizes: dict[str, int]
    ) -> dict[str, int]:
        *_, qo_indptr, pages, out, lse, _ = operands
        patterns = {
            **queries,
            "kv_lens": (pages.kv_lens, "batch"),
            "qo_indptr": (qo_indptr, "batch+1"),
            "out": (out, out_pattern),
            "lse": (lse, out_pattern.rpartition(" ")[0]),
        }
        return self._check_arrays(patterns, sizes)

    def _output_strides(self, out: Any, lse: Any) -> tuple[int, ...]:
        """Return the strides of tokens and heads of `out` and `lse`, also where a call is to make them."""
        num_qo_heads, dim = self.out_shape[1:]
        return (
            *(checks.element_strides(out)[:2] if out is not None else (num_qo_heads * dim, dim)),
            *(checks.element_strides(lse) if lse is not None else (num_qo_heads, 1)),
        )

    def check_addresses(self, arrays: Sequence[Any], place: Sequence[int]) -> None:
        """Raise ValueError also where an array is not aligned to what the kernel moves at once."""
        super().check_addresses(arrays, place)
        if self.runs is not None:
            for name, address in zip(self.array_names, place, strict=True):
                if name in self._aligned and address % 16:
                    raise ValueError(
                        f"{self.caller}: {name} must be aligned to 16 bytes, got address {address:#x}"
                    )

    def bind(self, arrays: Sequence[Any], place: tuple[int, ...]) -> tuple[Any, ...]:
        """Return pointers to the inputs, as the kernel takes them; then KeyMaps, if it takes those."""
        pointers = super().bind(arrays, place)[: -len(OUTPUTS)]
        if self.key_boxes is None:
            return pointers
        keys = next(i for i, name in enumerate(self.array_names) if name.endswith("_pages"))
        packed = self.key_boxes.pack(pointers[keys : keys + 2])
        if self.key_boxes.rows and not packed:  # perhaps in a thread that has not used CUDA yet
            with self.xp.cuda.Device(self.device):
                self.xp.cuda.runtime.free(0)
                packed = self.key_boxes.pack(pointers[keys : keys + 2])
            if not packed:
                self.key_boxes.rows = 0  # refused for good: nothing but addresses changes
        return (*pointers, packed.ljust(kernels.KEY_MAPS_BYTES, b"\0"))

    def _run(
        self,
        operands: tuple[Any, ...],
        pointers: tuple[Any, ...],
        options: tuple[int, float, float, bool, bool],
        launches: dict[Any, BoundLaunch | None],
    ) -> tuple[Any, Any]:
        out, lse, workspace = operands[-3:]
        key = options, 0
        if self.runs is not None:
            key = options, self.current_stream().ptr
            launch = launches.get(key)
            if launch is not None:  # as in earlier calls, where all was given
                launch()
                return out, lse
        window_left, sm_scale, logits_soft_cap, return_lse, pdl = options
        all_given = out is not None and workspace is not None and (lse is not None or not return_lse)
        if out is None:
            out = self.xp.empty(self.out_shape, operands[0].dtype)
        if lse is None and return_lse:
            lse = self.xp.empty(self.out_shape[:2], np.float32)
        if self.device is None:
            result, result_lse = self._reference(
                operands, window_left=window_left, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap
            )
            out[...] = result.astype(out.dtype)
            if lse is not None:
                lse[...] = result_lse
        elif self.runs is not None:
            arguments = (
                (*pointers, out.data.ptr, 0 if lse is None else lse.data.ptr),
                workspace,
                (window_left, sm_scale, logits_soft_cap),
                key[1],
                pdl,
            )
            if all_given and key in launches:  # a launch to keep takes 30 us to make, so not for one call
                launch = launches[key] = self.runs.bind(*arguments)
                launch()
                return out, lse
            if all_given:
                if len(launches) >= _MAX_LAUNCHES:
                    launches.clear()
                launches[key] = None
            self.runs.launch(*arguments)
        return out, lse
