"""Which CTA of `decode` reads which keys of which request: the partition of ``schedule.cuh``, on the host.

Kernels find their own place on the line and need nothing of this. It is here to look at a schedule, and to test the
rule without a GPU.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cupyattn import checks
from cupyattn.levels import CascadeLevels

_MAX_UNITS = 2**31 - 1  # kernels count units in an int
_MANY_Q_TILES = 7  # kMostQTiles of schedule.cuh
_STARTING_ROWS = 33  # of a query tile, from which on decode.cu lets groups start runs


@dataclass(frozen=True)
class Segment:
    """A part of one CTA's run that lies in one group: (request, KV head, tile of query rows).

    It is all that the run has of the group; with fixed splits it is one split.

    Parameters
    ----------
    cta : int
    request : int
        Index into the batch.
    kv_head : int
    q_tile : int
        Which tile of the group's query rows (query tokens x group size).
    kv_begin, kv_end : int
        Keys of the request that it reads, in tokens: ``kv_begin <= key < kv_end``. Equal where there are none.
    complete : bool
        Whether this is the whole group, whose result the CTA writes. Otherwise it leaves a partial state, to be
        merged with those of the group's other segments.
    """

    cta: int
    request: int
    kv_head: int
    q_tile: int
    kv_begin: int
    kv_end: int
    complete: bool

    @property
    def num_tokens(self) -> int:
        """Keys that it reads."""
        return self.kv_end - self.kv_begin

    @property
    def group(self) -> tuple[int, int, int]:
        """Return (request, kv_head, q_tile)."""
        return self.request, self.kv_head, self.q_tile


@dataclass(frozen=True)
class Request:
    """One request's share of the line.

    Parameters
    ----------
    qo_len : int
        Query tokens; they are the last of the request's tokens.
    kv_len : int
        Keys, the query tokens' own included.
    window_left : int
        Keys before a query's own that it sees; -1: all.
    """

    qo_len: int
    kv_len: int
    window_left: int = -1

    @property
    def kv_begin(self) -> int:
        """First key that any of the query tokens sees."""
        if self.window_left < 0:
            return 0
        return max(max(self.kv_len - self.qo_len, 0) - self.window_left, 0)

    def num_units_in_group(self, unit_size: int) -> int:
        """Units of `unit_size` keys in each group. At least one: a request without keys gets its empty state."""
        return max(_ceil_div(self.kv_len - self.kv_begin, unit_size), 1)

    def num_q_tiles(self, group_size: int, tile_q: int) -> int:
        """Tiles of `tile_q` query rows in each KV head. None without query tokens."""
        return _ceil_div(self.qo_len * group_size, tile_q)

    def num_units(
        self, num_kv_heads: int, group_size: int, tile_q: int, unit_size: int, group_overhead: int = 0
    ) -> int:
        """Units of the line: those of all its groups, `unit_size` keys each, and what is before them."""
        in_group = group_overhead + self.num_units_in_group(unit_size)
        return num_kv_heads * self.num_q_tiles(group_size, tile_q) * in_group


@dataclass(frozen=True)
class Partition:
    """The line cut into runs of `quota` units, the last one shorter.

    Parameters
    ----------
    total : int
        Units of the line.
    quota : int
        Units of every run but the last, which has what is left: at least 1, at most `quota`.
    num_ctas : int
        CTAs that have a run. None without units.

    Examples
    --------
    >>> partition = Partition.of(18, max_ctas=4)
    >>> [partition.begin(cta) for cta in range(partition.num_ctas + 1)]
    [0, 5, 10, 15, 18]

    No more CTAs than the longest run needs:

    >>> [Partition.of(total, max_ctas=264).num_ctas for total in (66, 264, 266, 1024)]
    [66, 264, 133, 256]
    """

    total: int
    quota: int
    num_ctas: int

    @classmethod
    def of(cls, total: int, max_ctas: int, least_quota: int = 1) -> Partition:
        """Cut `total` units into at most `max_ctas` runs, as short as these and `least_quota` allow."""
        quota = max(_ceil_div(total, max_ctas), least_quota)  # without any units, too: `cta_of` divides by it
        return cls(total, quota, _ceil_div(total, quota))

    def begin(self, cta: int) -> int:
        """First unit of a CTA's run, and the end of the run before; `total` for CTAs without one."""
        return min(cta * self.quota, self.total)

    def cta_of(self, unit: int) -> int:
        """Return the CTA whose run holds `unit`."""
        return unit // self.quota


@dataclass(frozen=True)
class ScheduleFigures:
    """A schedule in numbers.

    Parameters
    ----------
    num_ctas : int
        CTAs that have work.
    longest_run : int
        Keys that one CTA reads, at most; in tokens.
    num_groups : int
    num_split : int
        Groups that are cut: that lie in several runs or, with fixed splits, have several.
    num_partials : int
        Partial states, of all of these.
    longest_merge : int
        Partial states of one group, at most; 0 where nothing is split.
    """

    num_ctas: int
    longest_run: int
    num_groups: int
    num_split: int
    num_partials: int
    longest_merge: int


def decode_schedule(
    kv_lens: Sequence[int] | np.ndarray,
    *,
    num_kv_heads: int,
    group_size: int,
    tile_kv: int,
    tile_q: int,
    max_ctas: int,
    qo_lens: Sequence[int] | np.ndarray | None = None,
    window_left: int = -1,
    fixed_split_size: int | None = None,
    group_overhead: int | None = None,
    num_parts: int = 1,
    num_threads: int = 128,
) -> list[Segment]:
    """Say which CTA of a decode step reads which keys.

    Parameters
    ----------
    kv_lens : sequence of int, shape [batch_size]
        Keys of each request, in tokens.
    num_kv_heads : int
    group_size : int
        Query heads per KV head.
    tile_kv : int
        Keys of a tile, in tokens.
    tile_q : int
        Query rows of a tile.
    max_ctas : int
        How many CTAs are launched. Those that the line is too short to reach have no segments.
    qo_lens : sequence of int, shape [batch_size], optional
        Query tokens of each request; one by default. A request without any has no segments.
    window_left : int
        Keys before a query's own that it sees; -1: all.
    fixed_split_size : int, optional
        Batch-invariant mode: every group is cut each so many tokens (`tile_kv` times a power of two), counted from
        the first key that its request sees, and runs are of whole splits. So where a request is cut does not
        depend on its neighbours, nor on `max_ctas`. By default cuts are where runs end.
    group_overhead : int, optional
        Tiles that a group counts for besides its own, for its queries and its states; only without fixed splits. By
        default what `decode` chooses (see `uneven_group_overhead`), which may also have groups start runs (see
        `starting_run`); for cascades see `choose_group_overhead`.
    num_parts : int
        Parts of the KV heads, each of which has a line and an equal share of the CTAs for itself, every `num_parts`-th;
        only without fixed splits.
    num_threads : int
        Of a CTA: groups of more requests do not start runs.

    Returns
    -------
    list of Segment
        In the order of the line: by request, then KV head, then query tile, then key; so also by CTA. With
        `fixed_split_size` each is one split, and its index is that of its partial state. With parts, line by line.

    Raises
    ------
    TypeError
        A count or a length is no integer.
    ValueError
        A count is not positive, a length or `group_overhead` is negative, `window_left` is less than -1,
        `fixed_split_size` is not `tile_kv` times a power of two or comes with `group_overhead` or `num_parts`,
        `num_parts` does not divide `num_kv_heads` and `max_ctas`, `kv_lens` or `qo_lens` is not a vector, they differ
        in size, or the line has more than 2^31 - 1 tiles (or fixed splits).

    Examples
    --------
    >>> sizes = dict(num_kv_heads=1, group_size=8, tile_kv=64, tile_q=8)
    >>> for s in decode_schedule([300, 10], max_ctas=2, **sizes):
    ...     print(s.cta, s.request, s.kv_begin, s.kv_end, s.complete)
    0 0 0 192 False
    1 0 192 300 False
    1 1 0 10 True

    Fixed splits of 128 tokens are these in any company:

    >>> for s in decode_schedule([300, 10], max_ctas=2, fixed_split_size=128, **sizes):
    ...     print(s.cta, s.request, s.kv_begin, s.kv_end, s.complete)
    0 0 0 128 False
    0 0 128 256 False
    1 0 256 300 False
    1 1 0 10 True
    """
    counts = {"num_kv_heads": num_kv_heads, "group_size": group_size, "tile_q": tile_q}
    for name, count in {**counts, "tile_kv": tile_kv, "max_ctas": max_ctas, "num_parts": num_parts}.items():
        if operator.index(count) <= 0:
            raise ValueError(f"decode_schedule: {name} must be positive, got {count}")
    if operator.index(window_left) < -1:
        raise ValueError(f"decode_schedule: window_left must be -1 or more, got {window_left}")
    fixed_splits = fixed_split_size is not None
    unit_size = tile_kv if fixed_split_size is None else operator.index(fixed_split_size)
    if unit_size <= 0 or unit_size % tile_kv or (unit_size // tile_kv).bit_count() != 1:
        raise ValueError(
            f"decode_schedule: fixed_split_size must be tile_kv times a power of two, "
            f"got {unit_size} with tile_kv = {tile_kv}"
        )
    if operator.index(0 if group_overhead is None else group_overhead) < 0 or (
        fixed_splits and group_overhead
    ):
        raise ValueError(
            f"decode_schedule: group_overhead must be 0 or more, and 0 with fixed splits, got {group_overhead}"
        )
    if num_kv_heads % num_parts or max_ctas % num_parts or (fixed_splits and num_parts > 1):
        raise ValueError(
            f"decode_schedule: num_parts must divide num_kv_heads and max_ctas, and be 1 with fixed splits, got "
            f"{num_parts} with {num_kv_heads} and {max_ctas}"
        )
    if num_parts > 1:
        num_heads = num_kv_heads // num_parts
        line = decode_schedule(
            kv_lens, num_kv_heads=num_heads, group_size=group_size, tile_kv=tile_kv, tile_q=tile_q,
            max_ctas=max_ctas // num_parts, qo_lens=qo_lens, window_left=window_left, group_overhead=group_overhead,
            num_threads=num_threads,
        )  # fmt: skip
        return [
            replace(s, cta=s.cta * num_parts + part, kv_head=part * num_heads + s.kv_head)
            for part in range(num_parts)
            for s in line
        ]
    all_kv_lens = _lengths("kv_lens", kv_lens)
    all_qo_lens = [1] * len(all_kv_lens) if qo_lens is None else _lengths("qo_lens", qo_lens)
    if len(all_qo_lens) != len(all_kv_lens):
        raise ValueError(
            f"decode_schedule: qo_lens must have {len(all_kv_lens)} entries, as kv_lens has, "
            f"got {len(all_qo_lens)}"
        )

    requests = [
        Request(qo_len, kv_len, window_left) for qo_len, kv_len in zip(all_qo_lens, all_kv_lens, strict=True)
    ]
    num_units = [request.num_units(**counts, unit_size=unit_size) for request in requests]
    num_groups = sum(num_kv_heads * request.num_q_tiles(group_size, tile_q) for request in requests)
    total = sum(num_units) + (group_overhead or 0) * num_groups
    if total > _MAX_UNITS:
        units = "splits" if fixed_splits else "tiles"
        raise ValueError(f"decode_schedule: kernels count up to 2^31 - 1 {units}, got {total}")
    run_of_group = 1
    if group_overhead is None:
        q_tiles = {request.num_q_tiles(group_size, tile_q) for request in requests}
        may_start = tile_q >= _STARTING_ROWS
        knows_groups = qo_lens is None or (may_start and len(q_tiles) == 1 and max(q_tiles) < _MANY_Q_TILES)
        is_weighed = knows_groups and not fixed_splits
        if is_weighed and may_start and len(requests) <= num_threads:
            run_of_group = starting_run(num_units, num_groups, max_ctas)
        group_overhead = 0
        if is_weighed and run_of_group == 1:
            group_overhead = uneven_group_overhead(num_units, num_groups, max_ctas)
        total += group_overhead * num_groups
    if run_of_group > 1:
        total = run_of_group * _starting_runs(num_units, num_groups, run_of_group)
    partition = Partition.of(total, max_ctas, max(group_overhead + 1, run_of_group))  # every run has a tile
    segments = []
    unit = 0
    for request_idx, request in enumerate(requests):
        in_group = request.num_units_in_group(unit_size)
        num_q_tiles = request.num_q_tiles(group_size, tile_q)
        for kv_head, q_tile in itertools.product(range(num_kv_heads), range(num_q_tiles)):
            group_begin = unit + group_overhead
            unit, group_end = group_begin, group_begin + in_group
            while unit < group_end:
                cta = partition.cta_of(unit)
                end = unit + 1 if fixed_splits else min(partition.begin(cta + 1), group_end)
                kv_begin = request.kv_begin + (unit - group_begin) * unit_size
                kv_end = min(request.kv_begin + (end - group_begin) * unit_size, request.kv_len)
                complete = end - unit == in_group
                segments.append(Segment(cta, request_idx, kv_head, q_tile, kv_begin, kv_end, complete))
                unit = end
            unit = group_begin + _ceil_div(in_group, run_of_group) * run_of_group
    return segments


def cascade_schedule(
    levels: CascadeLevels,
    *,
    num_kv_heads: int,
    group_size: int,
    tile_kv: int,
    tile_q: int,
    max_ctas: int,
    window_left: int = -1,
    group_overhead: int | None = None,
    num_parts: int = 1,
    num_threads: int = 128,
) -> list[Segment]:
    """Say which CTA of a cascade reads which keys: on its line, the groups of all levels are the requests.

    Parameters
    ----------
    levels : CascadeLevels
    num_kv_heads, group_size, tile_kv, tile_q, max_ctas, window_left, group_overhead, num_parts, num_threads
        As for `decode_schedule`. With several levels, kernels know no parts, and `group_overhead` is 0 by default; a
        single one is plain decode.

    Returns
    -------
    list of Segment
        In the order of the line: ``request`` counts the groups of all levels, level by level. ``complete`` says that
        a CTA has all keys of the group, not that its state is a result: where there are groups above, it is merged.

    Raises
    ------
    TypeError, ValueError
        As `decode_schedule`.

    Examples
    --------
    Two requests share 128 keys, and have 10 and 70 of their own:

    >>> shared = PageTable(np.array([0, 2], "int32"), np.array([7, 8], "int32"), np.array([128], "int32"))
    >>> own = PageTable.from_dense(np.array([[2, 3], [4, 5]], "int32"), np.array([10, 70], "int32"))
    >>> levels = CascadeLevels([(shared, np.array([0, 2], "int32")), (own, None)])
    >>> sizes = dict(num_kv_heads=1, group_size=8, tile_kv=64, tile_q=16)
    >>> for s in cascade_schedule(levels, max_ctas=2, **sizes):
    ...     print(s.cta, s.request, s.kv_begin, s.kv_end, s.complete)
    0 0 0 128 True
    0 1 0 10 True
    1 2 0 70 True
    """
    kv_lens, qo_lens = [], []
    for number, (pages, qo_indptr) in enumerate(levels.levels, 1):
        lens = np.maximum(checks.to_host(pages.kv_lens), 0)
        tokens = np.ones_like(lens) if qo_indptr is None else np.diff(checks.to_host(qo_indptr))
        # Without keys a group is nothing, but a request's result must be written.
        qo_lens.append(tokens if number == levels.num_levels else np.where(lens > 0, tokens, 0))
        kv_lens.append(lens)
    is_plain = levels.num_levels == 1 and levels.q_indices is None
    has_offsets = not is_plain or levels.levels[0][1] is not None
    if group_overhead is None and not is_plain:
        group_overhead = 0
    return decode_schedule(
        np.concatenate(kv_lens), num_kv_heads=num_kv_heads, group_size=group_size, tile_kv=tile_kv, tile_q=tile_q,
        max_ctas=max_ctas, qo_lens=np.concatenate(qo_lens) if has_offsets else None, window_left=window_left,
        group_overhead=group_overhead, num_parts=num_parts, num_threads=num_threads,
    )  # fmt: skip


def uneven_group_overhead(num_tiles: Sequence[int], num_groups: int, max_ctas: int) -> int:
    """Return what a group of `decode` counts for besides its tiles: 1 or 0, as its kernels choose.

    All runs load queries and leave a state. One that goes on to another group does so twice, and is done later than one
    inside a long request. So where requests differ, groups count for a tile more, if no run is longer for it. (Of the
    requests' tiles of keys, kernels look at the first one's and at the sum. With `qo_indptr` they know how many groups
    there are only in tiles of more than 32 rows, and if all requests have as many.)

    Parameters
    ----------
    num_tiles : sequence of int, shape [batch_size]
        Tiles of all groups of each request.
    num_groups : int
        Of all requests, each of which has as many.
    max_ctas : int

    Returns
    -------
    int

    Examples
    --------
    Runs of 3 tiles hold up to 12; equal requests are cut where they end, if that is where runs do:

    >>> [uneven_group_overhead(num_tiles, 2, 4) for num_tiles in ([8, 2], [9, 2], [5, 5])]
    [1, 0, 0]
    """
    total = sum(num_tiles)
    quota = _ceil_div(total, max_ctas)
    is_uneven = len(num_tiles) > 0 and num_tiles[0] * len(num_tiles) != total
    return int(is_uneven and quota > 1 and total + num_groups <= min(quota * max_ctas, _MAX_UNITS))


def starting_run(num_tiles: Sequence[int], num_groups: int, max_ctas: int) -> int:
    """Return how many tiles runs of `decode` have where each group starts one, or 1 where groups do not.

    They do in tiles of more than 32 query rows, which leave large states, where requests differ: if runs of equal
    length had tiles of two groups, and there are CTAs enough for runs as long as if each group counted for a tile more.

    Parameters
    ----------
    num_tiles : sequence of int, shape [batch_size]
        Tiles of all groups of each request.
    num_groups : int
        Of all requests, each of which has as many.
    max_ctas : int

    Returns
    -------
    int

    Examples
    --------
    >>> [starting_run(num_tiles, 3, 4) for num_tiles in ([9, 2, 3], [5, 5, 1], [5, 5, 5])]
    [5, 1, 1]
    """
    total = sum(num_tiles)
    if not num_tiles or num_tiles[0] * len(num_tiles) == total:
        return 1
    overhead = uneven_group_overhead(num_tiles, num_groups, max_ctas)
    are_mixed = total + num_groups * overhead > max_ctas * (overhead + 1)
    quota = _ceil_div(total + num_groups, max_ctas)
    if not are_mixed or total + num_groups > _MAX_UNITS:
        return 1
    return quota if _starting_runs(num_tiles, num_groups, quota) <= max_ctas else 1


def _starting_runs(num_tiles: Sequence[int], num_groups: int, quota: int) -> int:
    """Return how many runs of up to `quota` tiles there are, each of one group."""
    groups_each = num_groups // len(num_tiles)
    return groups_each * sum(_ceil_div(tiles // groups_each, quota) for tiles in num_tiles)


def choose_group_overhead(cost: tuple[int, int], num_tiles: int, max_ctas: int) -> int:
    """Choose how many tiles a group of a cascade counts for besides its own.

    A run that lies in many short groups (requests' own keys) loads many queries and leaves many states, and takes
    longer than one inside a prefix. Where runs are long, that is made up for.

    Parameters
    ----------
    cost : (int, int)
        What queries and states of a group cost, in tiles; and how many tiles a run must have for each of these.
    num_tiles : int
        Tiles that all groups have room for.
    max_ctas : int

    Returns
    -------
    int
        All that it costs, or less where runs are short: what counts for no tiles must not make them longer. (By the
        room. Where there are far fewer keys, runs may have as many tiles as a group costs, and one more, all the same.)

    Examples
    --------
    >>> [choose_group_overhead((3, 8), num_tiles, 132) for num_tiles in (5120, 1088, 384)]
    [3, 1, 0]
    """
    tiles, run_tiles = cost
    return min(tiles, _ceil_div(num_tiles, max_ctas) // run_tiles)


def are_uneven(num_tiles: Sequence[int]) -> bool:
    """Return whether requests of a cascade, which have so many tiles of their own, differ as its kernels see it.

    One must have more than twice as many as another, and has, if it has four times as many.

    Examples
    --------
    >>> are_uneven([4, 8]), are_uneven([3, 8]), are_uneven([1, 4])
    (False, True, True)
    """
    sizes = [int(tiles).bit_length() for tiles in num_tiles]
    return len(sizes) > 0 and max(sizes) - min(sizes) > 1


def schedule_figures(segments: Sequence[Segment]) -> ScheduleFigures:
    """Count what a schedule costs.

    Parameters
    ----------
    segments : sequence of Segment
        As `decode_schedule` returns them.

    Returns
    -------
    ScheduleFigures
    """
    runs: dict[int, int] = {}
    partials: dict[tuple[int, int, int], int] = {}
    for s in segments:
        runs[s.cta] = runs.get(s.cta, 0) + s.num_tokens
        partials[s.group] = partials.get(s.group, 0) + (not s.complete)
    split = [count for count in partials.values() if count]
    return ScheduleFigures(
        num_ctas=len(runs),
        longest_run=max(runs.values(), default=0),
        num_groups=len(partials),
        num_split=len(split),
        num_partials=sum(split),
        longest_merge=max(split, default=0),
    )


def draw_schedule(segments: Sequence[Segment], path: str | Path, *, title: str = "") -> None:
    """Draw a schedule: a bar for each CTA, as long as the keys that it reads, in colours by request.

    A black line marks where a group is cut, also inside a bar where splits are fixed: the bar's parts there leave
    a partial state each.

    Parameters
    ----------
    segments : sequence of Segment
        As `decode_schedule` returns them.
    path : str or Path
        Where to; the suffix says the format, as ``.svg`` or ``.png``.
    title : str
        A line above the numbers.

    Raises
    ------
    ModuleNotFoundError
        There is no matplotlib.
    ValueError
        matplotlib does not know the format.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figures = schedule_figures(segments)
    # 264 bars are to stay apart, and a handful is not to become a wall.
    height = 1.6 + min(max(0.05 * figures.num_ctas, 1.5), 14)
    # Without pyplot there is no backend to choose, and no display is asked for.
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    palette = matplotlib.colormaps["tab10"]
    colours = [palette(i) for i in range(palette.N)]
    # The segments of a group follow each other on the line.
    groups = [None, *(s.group for s in segments), None]
    for cta, run in itertools.groupby(enumerate(segments, 1), lambda item: item[1].cta):
        spans, faces, cuts, x = [], [], set(), 0
        for i, s in run:
            spans.append((x, s.num_tokens))
            faces.append(colours[s.request % len(colours)])
            if groups[i - 1] == s.group:
                cuts.add(x)
            x += s.num_tokens
            if groups[i + 1] == s.group:
                cuts.add(x)
        axes.broken_barh(spans, (cta - 0.4, 0.8), facecolors=faces, edgecolor="white", linewidth=0.3)
        axes.vlines(sorted(cuts), cta - 0.45, cta + 0.45, color="black", linewidth=1.5, zorder=3)
    longest = max(figures.longest_run, 1)
    axes.set_xlim(-0.01 * longest, 1.01 * longest)  # the frame would hide cuts at 0
    axes.set_ylim(max(figures.num_ctas, 1) - 0.4, -0.6)  # CTA 0 on top
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tokens that the CTA reads, in its order")
    axes.set_ylabel("CTA")
    numbers = (
        f"{figures.num_ctas} CTAs, up to {figures.longest_run} tokens each; groups split: {figures.num_split} of "
        f"{figures.num_groups}; partial states: {figures.num_partials}; longest merge: {figures.longest_merge}"
    )
    axes.set_title(f"{title}\n{numbers}" if title else numbers, fontsize=10)
    _add_legend(figure, segments, colours)
    # The same schedule draws the same file.
    with matplotlib.rc_context({"svg.hashsalt": "cupyattn"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if Path(path).suffix == ".svg" else None)


def _add_legend(figure: Any, segments: Sequence[Segment], colours: Sequence[Any]) -> None:
    """Name the colours: of each request while all have their own, else say that they come again."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    requests = list(dict.fromkeys(s.request for s in segments))
    handles: list[Any]
    if requests and max(requests) < len(colours):
        handles = [Patch(color=colours[r], label=f"request {r}") for r in requests]
    else:
        handles = [
            Patch(color=colour, label=f"request {i}, {i + len(colours)}, ...")
            for i, colour in enumerate(colours[:2])
        ]
    handles.append(Line2D([], [], color="black", linewidth=1.5, label="a group is cut"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)


def _lengths(name: str, lens: Sequence[int] | np.ndarray) -> list[int]:
    array = np.asarray(lens)
    if array.ndim != 1:
        raise ValueError(f"decode_schedule: {name} must be a vector, got shape {list(array.shape)}")
    if array.size == 0:
        return []  # NumPy calls an empty list float64
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"decode_schedule: {name} must be integers, got {array.dtype}")
    if array.min() < 0:
        raise ValueError(f"decode_schedule: {name} must not be negative, got {array.min()}")
    return [int(n) for n in array]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
