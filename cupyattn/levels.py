"""Who shares which keys: the levels of a cascade."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cupyattn import checks
from cupyattn.cache import PageTable
from cupyattn.plan import ArrayGroup

MAX_LEVELS = 8  # kMaxLevels of cascade.cuh
_PARTS = ("qo_indptr", "kv_indptr", "kv_indices", "kv_lens")


class CascadeLevels(ArrayGroup):
    """Which keys which query tokens see, level by level: the tables of `cascade_decode`.

    The groups of a level are runs of query tokens; all tokens of a group see the keys that its row of the page table
    names. A token's keys are those of its groups in all levels, one level after the other: first what many share,
    last what is its request's own. Immutable; arrays are held as given. Their values may change in place, their
    shapes, strides and addresses must not.

    Parameters
    ----------
    levels : sequence of (PageTable, array or None), 1 to 8
        Of each level the keys of its groups, and `qo_indptr`, shape [groups + 1], int32: group ``i`` has the tokens
        ``qo_indptr[i] .. qo_indptr[i + 1] - 1``. The last level's groups are the *requests*; None there means one
        token each. The tokens of a request are in the same groups everywhere. Tokens before ``qo_indptr[0]`` or from
        ``qo_indptr[-1]`` on see nothing of the level (in the last level they belong to nobody: padding); so do groups
        of length 0.
    q_indices : array, shape [tokens], int32, optional
        The row of `q` (and `out`, `lse`) that holds each token, each row once at most. So a batch need not be sorted
        by what is shared. By default token ``t`` is row ``t``.

    Raises
    ------
    TypeError
        `levels` is no list, a table is not a PageTable, or an array is not int32.
    ValueError
        There are no levels or more than 8, or shapes do not go together. Values are not looked at (see
        ``validate=True`` of `cascade_decode`).

    Examples
    --------
    Two requests share page 7; the first has 3 tokens more in page 2, the second 1 in page 4 (`page_size` 4).

    >>> shared = PageTable(np.array([0, 1], "int32"), np.array([7], "int32"), np.array([4], "int32"))
    >>> own = PageTable.from_dense(np.array([[2], [4]], "int32"), np.array([3, 1], "int32"))
    >>> CascadeLevels([(shared, np.array([0, 2], "int32")), (own, None)])
    CascadeLevels(groups=[1, 2], numpy int32)
    """

    __slots__ = ("levels", "q_indices")

    levels: tuple[tuple[PageTable, Any], ...]
    q_indices: Any

    def __init__(self, levels: Sequence[tuple[PageTable, Any]], *, q_indices: Any = None) -> None:
        if not isinstance(levels, tuple | list):
            raise TypeError(f"CascadeLevels: levels must be a list of pairs, got {type(levels).__name__}")
        if not 1 <= len(levels) <= MAX_LEVELS:
            raise ValueError(f"CascadeLevels: levels must be 1 to {MAX_LEVELS} pairs, got {len(levels)}")
        arrays: list[Any] = []
        for i, level in enumerate(levels):
            if not (isinstance(level, tuple | list) and len(level) == 2 and isinstance(level[0], PageTable)):
                got = type(level).__name__
                if isinstance(level, tuple | list):
                    got = f"({', '.join(type(x).__name__ for x in level)})"
                raise TypeError(
                    f"CascadeLevels: levels[{i}] must be a pair (PageTable, qo_indptr), got {got}"
                )
            pages, qo_indptr = level
            if qo_indptr is None and i + 1 < len(levels):
                raise TypeError(
                    f"CascadeLevels: qo_indptr of levels[{i}] must be an array, got None (which only the last may be)"
                )
            if qo_indptr is not None:
                name = f"CascadeLevels: qo_indptr of levels[{i}]"
                _check_vector(name, qo_indptr)
                if qo_indptr.shape[0] != pages.batch_size + 1:
                    raise ValueError(
                        f"{name} must have shape [{pages.batch_size + 1}], one more than its table has rows, "
                        f"got {list(qo_indptr.shape)}"
                    )
            arrays += (qo_indptr, pages.kv_indptr, pages.kv_indices, pages.kv_lens)
        if q_indices is not None:
            _check_vector("CascadeLevels: q_indices", q_indices)
        self._hold((*arrays, q_indices))
        object.__setattr__(self, "levels", tuple((pages, qo_indptr) for pages, qo_indptr in levels))
        object.__setattr__(self, "q_indices", q_indices)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.levels, self.q_indices)

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return len(self.levels)

    @property
    def batch_size(self) -> int:
        """Number of requests: groups of the last level."""
        return self.levels[-1][0].batch_size

    @staticmethod
    def names_of(num_levels: int) -> tuple[str, ...]:
        """Names of the arrays of so many levels, in the order in which a plan gets them."""
        return (*(f"{part}[{i}]" for i in range(num_levels) for part in _PARTS), "q_indices")

    def __repr__(self) -> str:
        groups = [pages.batch_size for pages, _ in self.levels]
        module = type(self.levels[0][0].kv_lens).__module__.partition(".")[0]
        return f"CascadeLevels(groups={groups}, {module} int32)"


def _restore(levels: Any, q_indices: Any) -> CascadeLevels:
    return CascadeLevels(levels, q_indices=q_indices)


def _check_vector(name: str, a: Any) -> None:
    checks.check_is_array(name, a)
    checks.check_dtype(name, a, "int32")
    if a.ndim != 1:
        raise ValueError(f"{name} must be a vector, got shape {list(a.shape)}")
    checks.check_last_axis_contiguous(name, a)
