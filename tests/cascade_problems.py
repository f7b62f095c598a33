"""Cascades to test with: a builder on top of `build_problem`, their plain problems, checks. Any array module."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
from device import Pool, assert_right, attend, misses, poison
from problems import POISON_PAGE, Guarded, Problem, build_mla_problem, build_problem, to_backend, to_host

import cupyattn
from cupyattn import cascade as cascade_module
from cupyattn import kernels, reference, runs
from cupyattn.cache import PageTable
from cupyattn.levels import CascadeLevels


@contextlib.contextmanager
def tile_rows(tile_q: int | None) -> Iterator[None]:
    """Have `cascade_decode` take tiles of so many query rows, whatever it would choose (MLA: None for mla.cu)."""
    chosen = kernels.cascade_config, kernels.mla_sm90_cascade_config
    configs = kernels.cascade_configs
    kernels.cascade_config = lambda arch, head_dim, *_: next(
        config for config in configs(arch, head_dim) if config.tile_q == tile_q
    )
    kernels.mla_sm90_cascade_config = lambda levels, num_sms: (
        None if tile_q is None else kernels.MLASm90Config(tile_q, is_cascade=True)
    )
    cascade_module._plans.cache_clear()
    try:
        yield
    finally:
        kernels.cascade_config, kernels.mla_sm90_cascade_config = chosen
        cascade_module._plans.cache_clear()


@contextlib.contextmanager
def group_overhead(tiles: int, uneven: int | None = None) -> Iterator[None]:
    """Have groups count for so many tiles besides their own, also where runs are short.

    Where requests differ, for `uneven`, but in mla_sm90.cu, where both must be equal.
    """
    choose = mock.patch.object(runs, "choose_group_overhead", lambda cost, num_tiles, max_ctas: cost)
    shapes = kernels.DecodeConfig, kernels.DecodeSm90Config, kernels.MLAConfig, kernels.MLASm90Config
    with contextlib.ExitStack() as patches:
        patches.callback(cascade_module._plans.cache_clear)
        patches.enter_context(choose)
        for shape in shapes:
            is_one = uneven is None or shape is kernels.MLASm90Config
            costs = {"group_overhead": tiles, "uneven_overhead": tiles if is_one else uneven}
            patches.enter_context(mock.patch.multiple(shape, **costs))
        cascade_module._plans.cache_clear()
        yield


@dataclasses.dataclass(frozen=True)
class Cascade:
    """Arguments of one `cascade_decode` call, on one array module.

    `problem` has q, the cache and the options. Its own table is not that of any request.
    """

    problem: Problem
    levels: CascadeLevels

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `cascade_decode` and of `reference.cascade_decode`."""
        p = self.problem
        return {
            "sm_scale": p.sm_scale,
            "window_left": p.window_left,
            "logits_soft_cap": p.logits_soft_cap,
        }

    def call(self, decode: Callable[..., Any] | None = None, **more: Any) -> Any:
        """`cascade_decode` (or another function) with these arguments, `more` besides or instead."""
        decode = decode or cupyattn.cascade_decode
        return decode(self.problem.q, self.problem.cache, self.levels, **(self.options | more))

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        p = self.problem
        if p.ckv_dim is None:
            return self.call(reference.cascade_decode)
        parts = p.q[..., : p.ckv_dim], p.q[..., p.ckv_dim :]
        return reference.mla_cascade_decode(*parts, p.cache, self.levels, **self.options)

    @functools.cached_property
    def token_bases(self) -> tuple[Any, ...]:
        """The cache as pages of one token each, of a problem in storage "separate" or "mla-pair"."""
        p = self.problem
        if p.ckv_dim is not None:
            return tuple(a.reshape(-1, 1, a.shape[-1]) for a in (p.ckv_pages, p.kpe_pages))
        return tuple(a.reshape(-1, 1, *a.shape[2:]) for a in p.cache.nhd())

    @functools.cached_property
    def plain(self) -> Problem:
        """The same as a problem of `decode`: the keys of each request in one row of a table.

        Where a level's length is no multiple of `page_size` no table of the same pages can say that, so pages are
        those of `token_bases`. Its query tokens are those of the requests, in their order.
        """
        p, xp, page_size = self.problem, self.problem.xp, self.problem.page_size
        host = [(*map(host_or_none, pages._arrays), host_or_none(qo)) for pages, qo in self.levels.levels]
        starts = self.starts

        @functools.cache
        def keys_of(level: int, group: int) -> np.ndarray:
            kv_indptr, kv_indices, kv_lens, _ = host[level]
            row = kv_indices[group] if kv_indptr is None else kv_indices[int(kv_indptr[group]) :]
            column, slot = np.divmod(np.arange(kv_lens[group], dtype=np.int64), page_size)
            ids = row[column].astype(np.int64)
            return np.where(ids == POISON_PAGE, POISON_PAGE, ids * page_size + slot)

        rows: list[np.ndarray] = []
        for begin, end in itertools.pairwise(starts):
            parts = [np.zeros(0, np.int64)]
            if begin < end:
                for level, (*_, qo_indptr) in enumerate(host):
                    if qo_indptr is None:
                        groups = np.array([begin])
                    else:
                        groups = np.flatnonzero((qo_indptr[:-1] <= begin) & (begin < qo_indptr[1:]))
                    assert len(groups) <= 1
                    parts += [keys_of(level, int(group)) for group in groups]
            rows.append(np.concatenate(parts))
        kv_indptr, kv_indices = table_of(rows, dense=False)
        return p.replace(
            q=p.q[self.rows],
            bases=self.token_bases,
            kv_indptr=xp.asarray(kv_indptr),
            kv_indices=xp.asarray(kv_indices),
            kv_lens=xp.asarray(np.array([len(row) for row in rows], np.int32)),
            qo_indptr=xp.asarray((starts - starts[0]).astype(np.int32)),
            storage="separate" if p.ckv_dim is None else "mla-pair",
            layout="NHD",
        )

    @property
    def starts(self) -> np.ndarray:
        """The first token of each request, and the end of the last one."""
        qo_indptr = self.levels.levels[-1][1]
        return np.arange(self.levels.batch_size + 1) if qo_indptr is None else to_host(qo_indptr)

    @property
    def rows(self) -> Any:
        """The row of q of each query token of `plain`."""
        tokens = np.arange(self.starts[0], self.starts[-1])
        if self.levels.q_indices is not None:
            tokens = to_host(self.levels.q_indices)[tokens]
        return self.problem.xp.asarray(tokens)

    def moved(self, xp: ModuleType) -> Cascade:
        """The same with its arrays on NumPy or on CuPy."""
        move = to_host if xp is np else xp.asarray
        return Cascade(to_backend(self.problem, xp), map_levels(self.levels, move))


def host_or_none(a: Any) -> Any:
    return None if a is None else to_host(a)


def map_levels(levels: CascadeLevels, convert: Callable[[Any], Any]) -> CascadeLevels:
    """The same levels with every array converted."""

    def moved(a: Any) -> Any:
        return None if a is None else convert(a)

    return CascadeLevels(
        [(PageTable(*map(moved, pages._arrays)), moved(qo_indptr)) for pages, qo_indptr in levels.levels],
        q_indices=moved(levels.q_indices),
    )


def table_of(
    rows: Sequence[np.ndarray], *, dense: bool, capacity: int | None = None
) -> tuple[np.ndarray | None, np.ndarray]:
    """`kv_indptr` and `kv_indices` of rows of page ids, poisoned up to so many columns (entries, if not dense)."""
    widths = np.array([len(row) for row in rows], np.int64)
    if dense:
        table = np.full(
            (len(rows), max(widths, default=1) if capacity is None else capacity), POISON_PAGE, np.int32
        )
        for entries, row in zip(table, rows, strict=True):
            entries[: len(row)] = row
        return None, table
    table = np.full(widths.sum() if capacity is None else capacity, POISON_PAGE, np.int32)
    table[: widths.sum()] = np.concatenate([np.zeros(0, np.int32), *rows])
    return np.concatenate([[0], np.cumsum(widths)]).astype(np.int32), table


#: Of a level above the requests: how many requests each group has, in order, and how many keys. Requests that are
#: left over at the end are in no group; so are the first few, if a third entry says how many.
Shared = Sequence[tuple[Any, ...]]


def build_cascade(
    own_lens: Sequence[int],
    shared: Shared = (),
    *,
    qo_lens: Sequence[int] | None = None,
    dense: bool | Sequence[bool] = False,
    one_table: bool = False,
    permuted: bool = False,
    padding: int = 0,
    lead: int = 0,
    mla: bool = False,
    window_left: int = -1,
    seed: int = 0,
    xp: ModuleType = np,
    **arguments: Any,
) -> Cascade:
    """A random cascade, poisoned: nothing but what some query sees is a number.

    Parameters
    ----------
    own_lens, qo_lens : sequence of int
        Keys of each request that are its own (its group's in the last level), and its query tokens; without
        `qo_lens`, one each and no `qo_indptr` in the last level.
    shared : sequence of (sizes, lens) or (sizes, lens, skip)
        See `Shared`; groups need not nest.
    dense : bool, or one for each level
    one_table : bool
        Levels in CSR share one `kv_indices`, in which each begins where the one before ends.
    permuted : bool
        Tokens lie in `q` in random order: with `q_indices`, whose entries of nobody's tokens are poisoned.
    padding, lead : int
        Rows of nobody; tokens of nobody before the first request's. Without `qo_lens`, `padding` needs `permuted`.
    mla : bool
        For `build_mla_problem`, else for `build_problem`, are other arguments.
    """
    rng = np.random.default_rng(seed)
    batch = len(own_lens)
    num_q = np.ones(batch, np.int64) if qo_lens is None else np.asarray(qo_lens, np.int64)
    starts = lead + np.concatenate([[0], np.cumsum(num_q)])  # of each request's tokens
    assert qo_lens is not None or (not lead and (permuted or not padding))

    # Of each level: group of each request (-1: none), lengths, offsets of tokens.
    levels: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for sizes, lens, *skip in (*shared, (np.ones(batch, int), own_lens)):
        bounds = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))]) + sum(skip)
        assert bounds[-1] <= batch
        group = np.full(batch, -1)
        group[bounds[0] : bounds[-1]] = np.repeat(np.arange(len(lens)), sizes)
        levels.append((group, np.asarray(lens, np.int64), starts[bounds]))

    num_groups = [len(lens) for _, lens, _ in levels]
    problem = (build_mla_problem if mla else build_problem)(
        np.concatenate([lens for _, lens, _ in levels]), qo_lens=[0] * sum(num_groups[:-1]) + list(num_q),
        window_left=window_left, poison_window=False, seed=seed, xp=xp, **arguments,
    )  # fmt: skip
    ends = to_host(problem.kv_indptr)
    entries = to_host(problem.kv_indices).copy()

    # What nobody sees of a group, because none of its requests has a token or a window that reaches so far.
    total = sum(np.where(group >= 0, np.append(lens, 0)[group], 0) for group, lens, _ in levels)
    oldest = np.maximum(total - num_q - window_left, 0) if window_left >= 0 else np.zeros(batch, np.int64)
    before = np.zeros(batch, np.int64)  # keys of the levels above
    unseen: list[tuple[np.ndarray, np.ndarray]] = []
    row, page_size = 0, problem.page_size
    for group, lens, _ in levels:
        for g, kv_len in enumerate(lens):
            members = group == g
            first = np.clip(oldest - before, 0, kv_len)
            column, slot = np.divmod(np.arange(first[members & (num_q > 0)].min(initial=kv_len)), page_size)
            unseen.append((entries[ends[row] + column], slot))
            if members.any():  # all of its requests' pages count as in use: `validate` looks at them
                entries[ends[row] : ends[row] + first[members].min() // page_size] = POISON_PAGE
            row += 1
        before += np.where(group >= 0, np.append(lens, 0)[group], 0)
    places = tuple(xp.asarray(np.concatenate(parts)) for parts in zip(*unseen, strict=True)) if unseen else ()
    for pages in problem.writable() if unseen else ():
        pages.view(f"u{pages.dtype.itemsize}")[places] = {2: 0x7FFF, 4: 0x7FFFFFFF}[pages.dtype.itemsize]

    tables: list[tuple[PageTable, Any]] = []
    every = xp.asarray(entries)
    row = 0
    for i, (_, lens, qo_indptr) in enumerate(levels):
        rows = [entries[ends[j] : ends[j + 1]] for j in range(row, row + len(lens))]
        if dense if isinstance(dense, bool) else dense[i]:
            kv_indptr, kv_indices = table_of(rows, dense=True)
        elif one_table:
            kv_indptr, kv_indices = ends[row : row + len(lens) + 1].copy(), every
        else:
            kv_indptr, kv_indices = table_of(rows, dense=False)
        none = i + 1 == len(levels) and qo_lens is None
        row += len(lens)
        tables.append(
            (
                PageTable(
                    None if kv_indptr is None else xp.asarray(kv_indptr),
                    xp.asarray(kv_indices),
                    xp.asarray(lens.astype(np.int32)),
                ),
                None if none else xp.asarray(qo_indptr.astype(np.int32)),
            )
        )

    num_rows = int(starts[-1]) + padding
    place = rng.permutation(num_rows) if permuted else np.arange(num_rows)
    used = place[starts[0] : starts[-1]]
    q = poison(xp.empty((num_rows, *problem.q.shape[1:]), problem.q.dtype))
    word = f"u{q.dtype.itemsize}"
    q.view(word)[xp.asarray(used)] = problem.q.view(word)
    q_indices = None
    if permuted:
        # As many entries as q has rows; with one token a request, as many as there are requests.
        q_indices = np.full(num_rows if qo_lens is not None else batch, POISON_PAGE, np.int32)
        q_indices[starts[0] : starts[-1]] = used
        q_indices = xp.asarray(q_indices)
    return Cascade(problem.replace(q=q), CascadeLevels(tables, q_indices=q_indices))


def check_cascade(cascade: Cascade, what: object = "", **more: Any) -> tuple[Any, Any]:
    """Run `cascade_decode` into poisoned, guarded arrays; check every token, and that nothing beside is written."""
    p = cascade.problem
    outs = Guarded(p.out_shape, p.q.dtype, p.xp)
    lses = Guarded(p.q.shape[:2], np.float32, p.xp)
    out, lse = cascade.call(out=outs.array, lse=lses.array, return_lse=True, **more)
    assert out is outs.array
    assert lse is lses.array
    try:
        assert_right(out[cascade.rows], lse[cascade.rows], attend(cascade.plain), p.dtype, what)
        outs.assert_intact()
        lses.assert_intact()
    except AssertionError as error:
        error.add_note(f"cascade: {what}")
        raise
    return out, lse


def cascade_bytes(cascade: Cascade, **more: Any) -> bytes:
    """All that the call gives the tokens of the requests, in bytes."""
    out, lse = cascade.call(return_lse=True, **more)
    return to_host(out[cascade.rows]).tobytes() + to_host(lse[cascade.rows]).tobytes()


class ChangingCascade:
    """A cascade whose offsets, lengths, tables, order and queries are rewritten in place, within fixed shapes.

    Parameters
    ----------
    num_groups : sequence of int
        Of each level; the last are the requests.
    longest : sequence of int
        Keys that a group of each level has at most.
    dense : sequence of bool
        Of each level.
    qo_len : int, optional
        A request has so many query tokens on average, and any number of them; without, one and no `qo_indptr`.
    permuted : bool
        With `q_indices`.
    """

    page_size = 16

    def __init__(
        self,
        xp: ModuleType,
        pool: Pool,
        *,
        num_groups: Sequence[int],
        longest: Sequence[int],
        dense: Sequence[bool],
        qo_len: int | None = None,
        permuted: bool = False,
        head_dim: int,
        group_size: int,
        num_kv_heads: int = 2,
        ckv_dim: int | None = None,
        window_left: int = -1,
    ) -> None:
        self.xp, self.rng = xp, np.random.default_rng(sum(num_groups))
        self.longest, self.dense, self.qo_len = longest, dense, qo_len
        batch = num_groups[-1]
        problem = pool.problem(
            [1] * batch, page_size=self.page_size, num_kv_heads=num_kv_heads, group_size=group_size,
            head_dim=head_dim, ckv_dim=ckv_dim, qo_lens=None if qo_len is None else [qo_len] * batch,
            window_left=window_left,
        )  # fmt: skip
        self.widths = [most // self.page_size + 2 for most in longest]
        tables = []
        for i, (groups, width, is_dense) in enumerate(zip(num_groups, self.widths, dense, strict=True)):
            pages = PageTable(
                None if is_dense else xp.zeros(groups + 1, np.int32),
                xp.zeros((groups, width) if is_dense else groups * width, np.int32),
                xp.zeros(groups, np.int32),
            )
            last = i + 1 == len(num_groups)
            tables.append((pages, None if last and qo_len is None else xp.zeros(groups + 1, np.int32)))
        q_indices = xp.zeros(len(problem.q), np.int32) if permuted else None
        self.cascade = Cascade(problem, CascadeLevels(tables, q_indices=q_indices))
        self.out = xp.empty(problem.out_shape, problem.q.dtype)
        self.lse = xp.empty(problem.q.shape[:2], np.float32)

    @property
    def dtype(self) -> str:
        return self.cascade.problem.dtype

    def call(self, **more: Any) -> None:
        self.cascade.call(**({"out": self.out, "lse": self.lse} | more))

    def arrays(self) -> list[Any]:
        """Everything that `change` writes but for the results."""
        levels = self.cascade.levels
        return [a for a in (*levels._arrays, self.cascade.problem.q) if a is not None]

    def change(self) -> None:
        p, xp, rng = self.cascade.problem, self.xp, self.rng
        levels = self.cascade.levels.levels
        batch, num_tokens = self.cascade.levels.batch_size, len(p.q)
        starts = np.arange(batch + 1)
        if self.qo_len is not None:  # any split of at most as many tokens; the rest is padding
            used = num_tokens if rng.random() < 0.5 else int(rng.integers(num_tokens + 1))
            cuts = np.sort(rng.integers(0, used + 1, batch - 1))
            starts = np.concatenate([[0], cuts, [used]])
        for i, (pages, qo_indptr) in enumerate(levels):
            groups, longest, width = pages.batch_size, self.longest[i], self.widths[i]
            scale = int(rng.choice([0, 1, 64, 300, longest]))  # all empty, tiny, ..., as long as may be
            lens = rng.integers(0, min(scale, longest) + 1, groups)
            lens[rng.random(groups) < 0.2] = 0
            lens[rng.random(groups) < 0.1] = longest
            held = -(-lens // self.page_size)
            rows = [rng.integers(0, len(p.bases[0]), n).astype(np.int32) for n in held]
            capacity = width if self.dense[i] else groups * width
            kv_indptr, kv_indices = table_of(rows, dense=self.dense[i], capacity=capacity)
            pages.kv_lens[...] = xp.asarray(lens.astype(np.int32))
            pages.kv_indices[...] = xp.asarray(kv_indices)
            if kv_indptr is not None:
                pages.kv_indptr[...] = xp.asarray(kv_indptr)
            bounds = np.arange(batch + 1)
            if i + 1 < len(levels):  # now and then in no group, or all in one
                bounds = np.sort(rng.integers(0, batch + 1, groups + 1))
                if rng.random() < 0.7:
                    bounds[0], bounds[-1] = 0, batch
                if rng.random() < 0.2:
                    bounds[1:] = batch
            if qo_indptr is not None:
                qo_indptr[...] = xp.asarray(starts[bounds].astype(np.int32))
        if self.cascade.levels.q_indices is not None:
            order = rng.permutation(num_tokens).astype(np.int32)
            order[starts[-1] :] = POISON_PAGE
            self.cascade.levels.q_indices[...] = xp.asarray(order)
        p.q[...] = xp.random.default_rng(int(rng.integers(2**31))).standard_normal(
            p.q.shape, dtype=np.float32
        ).astype(p.q.dtype)  # fmt: skip
        poison(self.out)
        poison(self.lse)

    def expected(self) -> tuple[Any, tuple[Any, Any]]:
        """Rows of the tokens as the arrays are now, and their state."""
        fresh = Cascade(self.cascade.problem, self.cascade.levels)
        fresh.__dict__["token_bases"] = self.cascade.token_bases  # a copy of the pool, if it is one
        return fresh.rows, attend(fresh.plain)

    def misses(self) -> Any:
        rows, expected = self.expected()
        return misses(self.out[rows], self.lse[rows], expected, self.dtype, self.xp)


#: Small structures with every edge: arguments of `build_cascade`.
STRUCTURES: dict[str, dict[str, Any]] = {
    "one-level": {"own_lens": [5, 0, 64, 130]},
    "one-group": {"own_lens": [5, 0, 17, 64], "shared": [([4], [40])]},
    "unequal-groups": {"own_lens": [5, 0, 17, 64, 1, 80], "shared": [([1, 3, 2], [70, 130, 5])]},
    "groups-in-groups": {
        "own_lens": [3, 70, 0, 1, 16, 17],
        "shared": [([6], [100]), ([2, 4], [17, 64]), ([1, 1, 2, 2], [3, 0, 9, 65])],
    },
    "eight-levels": {
        "own_lens": [3, 1, 0, 20, 7],
        "shared": [
            ([5], [33]), ([5], [1]), ([4, 1], [64, 7]), ([4, 1], [0, 5]), ([2, 2, 1], [9, 8, 7]),
            ([1, 1, 2, 1], [5, 6, 7, 8]), ([1] * 5, [1, 2, 3, 4, 5]),
        ],
        "one_table": True,
    },
    "not-nested": {
        "own_lens": [9, 1, 0, 30, 2, 65],
        "shared": [([3, 3], [50, 20]), ([2, 4], [7, 40]), ([1, 4, 1], [64, 3, 10])],
    },
    "in-no-group": {
        "own_lens": [9, 1, 0, 30, 2],
        "shared": [([2], [50], 1), ([1, 1], [20, 7], 3), ([], []), ([3], [66])],
    },
    "no-requests-in-groups": {"own_lens": [4, 0, 33], "shared": [([0, 2, 0, 0, 1, 0], [9, 40, 3, 0, 70, 5])]},
    "no-own-keys": {"own_lens": [0, 0, 0, 0], "shared": [([4], [70]), ([2, 2], [5, 0])]},
    "no-shared-keys": {"own_lens": [7, 0, 65, 1], "shared": [([4], [0]), ([2, 2], [0, 0])]},
    "no-keys": {"own_lens": [0, 0, 0], "shared": [([3], [0])]},
    "nothing-in-common": {"own_lens": [7, 0, 65], "shared": [([1, 1, 1], [100, 16, 0])]},
    "no-requests": {"own_lens": [], "shared": [([], []), ([0, 0], [5, 0])]},
    "several-tokens": {
        "own_lens": [9, 5, 64, 1, 30], "qo_lens": [3, 1, 8, 0, 2], "shared": [([5], [70]), ([2, 3], [20, 3])],
    },
    "tokens-before-their-own-keys": {  # the first of them stand among the shared keys
        "own_lens": [2, 0, 1, 0], "qo_lens": [5, 3, 1, 2], "shared": [([2, 2], [30, 65]), ([4], [3])],
    },
    "more-tokens-than-keys": {
        "own_lens": [2, 0, 1], "qo_lens": [7, 3, 4], "shared": [([1, 2], [3, 2])],
    },
    "many-tokens": {"own_lens": [70, 40, 0], "qo_lens": [33, 17, 5], "shared": [([3], [90])]},
    "padding": {
        "own_lens": [5, 30, 0, 2], "qo_lens": [1, 2, 0, 1], "shared": [([3], [40])], "padding": 3, "dense": True,
    },
    "permuted": {
        "own_lens": [5, 0, 17, 64, 1], "shared": [([2, 3], [40, 66])], "permuted": True, "dense": [True, False],
    },
    "permuted-among-others": {
        "own_lens": [5, 0, 17, 64, 1], "shared": [([2, 3], [40, 66])], "permuted": True, "padding": 4,
    },
    "permuted-tokens": {
        "own_lens": [5, 3, 17, 64, 1], "qo_lens": [2, 1, 0, 4, 1], "shared": [([2, 3], [40, 66])],
        "permuted": True, "padding": 3, "dense": [False, True],
    },
    "after-tokens-of-nobody": {
        "own_lens": [5, 3, 17], "qo_lens": [2, 1, 1], "shared": [([3], [40]), ([1, 2], [4, 30])], "lead": 2,
        "one_table": True,
    },
    "window": {"own_lens": [5, 0, 17, 64, 1], "shared": [([5], [90]), ([2, 3], [10, 20])], "window_left": 30},
    "window-of-own-keys": {"own_lens": [5, 9, 17], "shared": [([3], [90])], "window_left": 3},
    "window-of-tokens": {
        "own_lens": [5, 2, 17, 40], "qo_lens": [3, 4, 1, 20], "shared": [([4], [80]), ([2, 2], [3, 66])],
        "window_left": 18,
    },
    "own-token": {"own_lens": [1, 0, 17], "shared": [([3], [64])], "window_left": 0},
    "soft-cap": {
        "own_lens": [40, 3, 2], "shared": [([3], [100])], "logits_soft_cap": 5.0, "sm_scale": 1.0,
    },
}  # fmt: skip
