"""Merging attention states over disjoint sets of keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupyattn import checks, interop, kernels, reference
from cupyattn.plan import Plan, PlanCache
from cupyattn.runtime.registry import get_kernel

_ROWS_PER_CTA = 4  # one warp each


def merge_states(
    out: Any, lse: Any, axis: int = 0, *, into: tuple[Any, Any] | None = None
) -> tuple[Any, Any]:
    """Merge states ``(out, lse)`` of the same queries over disjoint sets of keys into the state over all.

    ``lse = log(sum_i exp(lse_i))``, ``out = sum_i exp(lse_i - lse) * out_i``: associative, commutative, with
    the identity ``lse = -inf`` (whatever `out` holds then). One kernel launch on a GPU.

    Parameters
    ----------
    out : array, shape [..., n, ..., head_dim], float16, bfloat16 or float32
        States stacked along `axis`; any number of other axes, any head_dim. Or a sequence of n arrays of one
        shape [..., head_dim], one a state (two take one launch; more are stacked first).
    lse : array, shape of `out` without head_dim, float32, natural logarithm
        Or a sequence of n arrays.
    axis : int
        Where the states are stacked, as an axis of `lse` (negative: from its end). 0 for sequences.
    into : pair of arrays (out, lse), optional
        Where to write the result. May be one of the states themselves.

    Returns
    -------
    out : array, shape of `out` without `axis`, dtype of `out`
    lse : array, shape of `lse` without `axis`, float32

    Raises
    ------
    TypeError
        A dtype or framework does not fit.
    ValueError
        A shape, device or `axis` does not fit, or there are no states. Nothing is written.

    Notes
    -----
    The merge of Flash-Decoding and of FlashInfer's cascade attention (Ye et al., arXiv:2501.01005, section 2.2).

    Examples
    --------
    >>> out = np.array([[1.0], [3.0]], "float32")
    >>> merged, lse = merge_states(out, np.log(np.array([1, 3], "float32")))
    >>> merged.tolist(), round(float(np.exp(lse)), 5)
    ([2.5], 4.0)
    """
    first = out[0] if isinstance(out, tuple | list) and out else out
    if interop.is_foreign(first):
        merged: tuple[Any, Any] = interop.call(merge_states, first, out, lse, axis, into=into)
        return merged
    if isinstance(out, tuple | list) or isinstance(lse, tuple | list):
        outs, lses = _as_states("out", out), _as_states("lse", lse)
        if len(outs) != len(lses):
            raise ValueError(
                f"merge_states: lse must have as many states as out, {len(outs)}, got {len(lses)}"
            )
        if axis != 0:
            raise ValueError(f"merge_states: axis must be 0 for sequences of states, got {axis}")
        if len(outs) > 2:
            for i in range(1, len(outs)):
                _check_pair(outs[0], outs[i], lses[0], lses[i])
            xp = interop.get_array_module(outs[0])
            return merge_states(xp.stack(outs), xp.stack(lses), into=into)
        out, rest_out, lse, rest_lse = outs[0], outs[-1], lses[0], lses[-1]
        settings: tuple[int, int | None] = (len(outs), None)
    else:
        rest_out = rest_lse = None
        settings = (0, axis)
    if into is not None and not (isinstance(into, tuple | list) and len(into) == 2):
        raise TypeError(f"merge_states: into must be a pair (out, lse), got {type(into).__name__}")
    into_out, into_lse = (None, None) if into is None else into
    arrays = (out, lse, rest_out, rest_lse, into_out, into_lse)
    plan, place, _ = _plans.find(arrays, settings)
    state: tuple[Any, Any] = plan.run(arrays, place)
    return state


def _as_states(name: str, a: Any) -> tuple[Any, ...]:
    if not isinstance(a, tuple | list) or not a:
        raise ValueError(
            f"merge_states: {name} must be a sequence of at least one state as the other is, got {a!r:.60}"
        )
    return tuple(a)


def _check_pair(out: Any, other_out: Any, lse: Any, other_lse: Any) -> None:
    for name, a, b in (("out", out, other_out), ("lse", lse, other_lse)):
        checks.check_is_array(f"merge_states: {name}", a)
        checks.check_is_array(f"merge_states: {name}", b)
        if a.shape != b.shape:
            raise ValueError(
                f"merge_states: {name} must have one shape, {list(a.shape)}, got {list(b.shape)}"
            )
        checks.check_same_dtype(f"merge_states: {name}", b, f"{name}[0]", a)


class _MergePlan(Plan):
    """`axis` is None where the states are separate arrays, one or two."""

    caller = "merge_states"
    operand_names = ("out", "lse", "out[1]", "lse[1]", "into[0]", "into[1]")
    written = ("into[0]", "into[1]")
    apart = (("into[1]", "into[0]"),)

    def __init__(self, arrays: tuple[Any, ...], num_states: int, axis: int | None) -> None:
        super().__init__(arrays)
        out, lse, rest_out, rest_lse, into_out, into_lse = arrays
        checks.check_dtype("merge_states: out", out, tuple(kernels.CUDA_TYPES))
        checks.check_dtype("merge_states: lse", lse, "float32")
        if out.ndim < 1 or tuple(out.shape[:-1]) != tuple(lse.shape):
            raise ValueError(
                f"merge_states: lse must have the shape of out without head_dim, {list(out.shape[:-1])}, "
                f"got {list(lse.shape)}"
            )
        if axis is None:
            _check_pair(out, rest_out, lse, rest_lse)
            self.shape = tuple(lse.shape)
        else:
            if not -lse.ndim <= axis < lse.ndim:
                raise ValueError(
                    f"merge_states: axis must be an axis of lse, which has {lse.ndim}, got {axis}"
                )
            axis %= lse.ndim
            num_states = lse.shape[axis]
            if num_states == 0:
                raise ValueError(
                    f"merge_states: out must hold at least one state along axis {axis}, got none"
                )
            self.shape = (*lse.shape[:axis], *lse.shape[axis + 1 :])
        self.num_states, self.axis, self.head_dim = num_states, axis, out.shape[-1]
        if into_out is not None or into_lse is not None:
            sizes = " ".join(map(str, self.shape))
            checks.check_arrays(
                "merge_states",
                {"into[0]": (into_out, f"{sizes} {self.head_dim}"), "into[1]": (into_lse, sizes)},
            )
            checks.check_same_dtype("merge_states: into[0]", into_out, "out", out)
            checks.check_dtype("merge_states: into[1]", into_lse, "float32")


class _NumpyPlan(_MergePlan):
    def _run(self, arrays: tuple[Any, ...], pointers: Any) -> tuple[Any, Any]:
        out, lse, rest_out, rest_lse, into_out, into_lse = arrays
        if self.axis is None:
            out, lse = (
                np.stack((out, rest_out)[: self.num_states]),
                np.stack((lse, rest_lse)[: self.num_states]),
            )
        merged, merged_lse = reference.merge_states(out, lse, self.axis or 0)
        if into_out is None:
            return merged.astype(out.dtype), np.asarray(merged_lse, dtype=np.float32)
        into_out[...] = merged.astype(out.dtype)
        into_lse[...] = merged_lse
        return into_out, into_lse


class _CupyPlan(_MergePlan):
    device: int

    def __init__(self, arrays: tuple[Any, ...], num_states: int, axis: int | None) -> None:
        super().__init__(arrays, num_states, axis)
        out, *_, into_out, into_lse = arrays
        # Rows are (outer, inner): the axes before the states' and those after it.
        split = 0 if self.axis is None else self.axis
        self.num_inner = math.prod(self.shape[split:])
        self.num_rows = math.prod(self.shape)
        states_between = 1 if self.axis is None else self.num_states
        self.outer_stride = self.num_inner * states_between
        self.in_place = into_out is not None and into_out.flags.c_contiguous and into_lse.flags.c_contiguous
        self.dtype = checks.dtype_name(out)
        self.launchers: dict[int, Any] = {}

    def _launcher(self, aligned: bool) -> Any:
        vec = kernels.merge_vector(self.dtype, self.head_dim, aligned)
        if vec not in self.launchers:
            kernel = get_kernel("merge_states", kernels.CUDA_TYPES[self.dtype], vec, device=self.device)
            self.launchers[vec] = kernel.prepare(
                -(-self.num_rows // _ROWS_PER_CTA), 32 * _ROWS_PER_CTA, pdl=True
            )
        return self.launchers[vec]

    def _rows_meet(self, arrays: tuple[Any, ...]) -> bool:
        """Whether each row of `into` lies on that very row of one state, or apart from all states.

        Then the kernel may write there: a warp reads a row of every state before it writes it.
        """
        *states, into_out, into_lse = arrays
        for base, target, rows_bytes in (
            (states[0], into_out, self.num_rows * self.head_dim * into_out.itemsize),
            (states[1], into_lse, self.num_rows * 4),
        ):
            rest = states[2] if target is into_out else states[3]
            for source in (base, rest):
                if source is None:
                    continue
                begin, offset = source.data.ptr, target.data.ptr - source.data.ptr
                apart = offset >= source.nbytes or target.data.ptr + rows_bytes <= begin
                same_row = self.num_inner == self.num_rows and offset % rows_bytes == 0 and offset >= 0
                if not (apart or (same_row and source.flags.c_contiguous)):
                    return False
        return True

    def _run(self, arrays: tuple[Any, ...], pointers: Any) -> tuple[Any, Any]:
        cupy = self.xp
        out, lse, rest_out, rest_lse, into_out, into_lse = (
            a if a is None or i >= 4 else cupy.ascontiguousarray(a) for i, a in enumerate(arrays)
        )
        target_out, target_lse = into_out, into_lse
        direct = self.in_place and (not self.num_rows or not self.head_dim or self._rows_meet(arrays))
        if not direct:
            target_out = cupy.empty((*self.shape, self.head_dim), out.dtype)
            target_lse = cupy.empty(self.shape, np.float32)
        if self.num_rows:
            first_out, first_lse = out.data.ptr, lse.data.ptr
            if self.axis is None:
                second_out, second_lse = rest_out.data.ptr, rest_lse.data.ptr
            else:
                second_out = first_out + self.num_inner * self.head_dim * out.itemsize
                second_lse = first_lse + 4 * self.num_inner
            aligned = (first_out | second_out | target_out.data.ptr) % 16 == 0
            self._launcher(aligned)(
                (
                    first_out, first_lse, second_out, second_lse, target_out.data.ptr, target_lse.data.ptr,
                    self.num_rows, self.num_states, self.head_dim, self.num_inner, self.num_inner,
                    self.outer_stride, self.num_inner,
                )
            )  # fmt: skip
        if into_out is None or direct:
            return target_out, target_lse
        into_out[...] = target_out
        into_lse[...] = target_lse
        return into_out, into_lse


_plans: PlanCache[_MergePlan] = PlanCache(_NumpyPlan, _CupyPlan)
