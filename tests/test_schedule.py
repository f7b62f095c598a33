"""The partition in Python: it covers every key once, in runs of equal cost but for the last, as in ``schedule.cuh``."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import cupyattn
from cupyattn import CascadeLevels, PageTable
from cupyattn.__main__ import main
from cupyattn.kernels import decode_config
from cupyattn.schedule import (
    Partition,
    Request,
    Segment,
    are_uneven,
    cascade_schedule,
    choose_group_overhead,
    decode_schedule,
    draw_schedule,
    schedule_figures,
    starting_run,
    uneven_group_overhead,
)

SIZES = {"num_kv_heads": 1, "group_size": 8, "tile_kv": 64, "tile_q": 8}


def num_units(segment: Segment, unit_size: int) -> int:
    return max(-(-segment.num_tokens // unit_size), 1)


@st.composite
def problems(draw: st.DrawFn, *, always_fixed: bool = False) -> dict[str, Any]:
    tile_kv = draw(st.sampled_from((1, 32, 64)))
    edges = st.sampled_from([n * tile_kv + d for n in (1, 2, 5) for d in (-1, 0, 1)])
    kv_lens = draw(st.lists(st.one_of(st.just(0), edges, st.integers(0, 40 * tile_kv)), max_size=8))
    batch = len(kv_lens)
    split_sizes = st.sampled_from([tile_kv * 2**shift for shift in (0, 1, 2, 4, 10)])
    return {
        "kv_lens": kv_lens,
        "qo_lens": draw(st.none() | st.lists(st.integers(0, 9), min_size=batch, max_size=batch)),
        "num_kv_heads": draw(st.integers(1, 4)),
        "group_size": draw(st.sampled_from((1, 3, 8, 16))),
        "tile_kv": tile_kv,
        "tile_q": draw(st.sampled_from((8, 16, 64))),
        "max_ctas": draw(st.one_of(st.integers(1, 20), st.just(264))),
        "window_left": draw(st.one_of(st.just(-1), st.integers(0, 6 * tile_kv))),
        "fixed_split_size": draw(split_sizes if always_fixed else st.none() | split_sizes),
    }


@given(problems())
def test_every_key_of_every_group_is_read_once_and_in_order(problem: dict[str, Any]) -> None:
    segments = decode_schedule(**problem)
    qo_lens = problem["qo_lens"] or [1] * len(problem["kv_lens"])
    expected_groups = []
    for request, (qo_len, kv_len) in enumerate(zip(qo_lens, problem["kv_lens"], strict=True)):
        rows = qo_len * problem["group_size"]
        q_tiles = range(0, rows, problem["tile_q"])
        for kv_head in range(problem["num_kv_heads"]):
            expected_groups += [(request, kv_head, q_tile, kv_len, qo_len) for q_tile in range(len(q_tiles))]

    found = [(group, list(parts)) for group, parts in itertools.groupby(segments, lambda s: s.group)]
    assert [group for group, _ in found] == [expected[:3] for expected in expected_groups]
    for (_, parts), (*_, kv_len, qo_len) in zip(found, expected_groups, strict=True):
        # What the first query token sees, and all that come after it.
        window, first_query = problem["window_left"], max(kv_len - qo_len, 0)
        assert parts[0].kv_begin == (0 if window < 0 else max(first_query - window, 0))
        assert parts[-1].kv_end == kv_len
        for before, after in itertools.pairwise(parts):
            assert before.kv_end == after.kv_begin
            assert before.num_tokens > 0
            assert before.num_tokens % problem["tile_kv"] == 0
        assert parts[-1].num_tokens > 0 or len(parts) == 1
        assert [s.complete for s in parts] == [len(parts) == 1] * len(parts)


@given(problems())
def test_runs_of_as_many_tiles_but_for_the_last_and_none_is_empty(problem: dict[str, Any]) -> None:
    segments = decode_schedule(**problem, group_overhead=0)
    runs = [list(run) for _, run in itertools.groupby(segments, lambda s: s.cta)]
    assert [run[0].cta for run in runs] == list(range(len(runs)))
    assert len(runs) <= problem["max_ctas"]
    fixed = problem["fixed_split_size"]
    sizes = [sum(num_units(s, fixed or problem["tile_kv"]) for s in run) for run in runs]
    if sizes:
        quota = -(-sum(sizes) // problem["max_ctas"])  # with fewer units, runs would need more CTAs
        assert sizes[:-1] == [quota] * (len(sizes) - 1)
        assert 1 <= sizes[-1] <= quota
    for run in runs if fixed is None else ():
        # Entered halfway, or left halfway: nothing between is partial.
        assert all(s.complete for s in run[1:-1])
        assert sum(not s.complete for s in run) <= 2


@given(problems(always_fixed=True))
def test_fixed_splits_are_at_multiples_of_their_size(problem: dict[str, Any]) -> None:
    segments = decode_schedule(**problem)
    size = problem["fixed_split_size"]
    for _, group in itertools.groupby(segments, lambda s: s.group):
        splits = list(group)
        begin, end = splits[0].kv_begin, splits[-1].kv_end
        assert [s.kv_begin for s in splits] == list(range(begin, max(end, begin + 1), size))
        assert [s.kv_end for s in splits[:-1]] == [s.kv_begin + size for s in splits[:-1]]
        assert splits[-1].num_tokens <= size

    figures = schedule_figures(segments)
    parts = [s for s in segments if not s.complete]
    assert figures.num_partials == len(parts)
    assert figures.num_split == len({s.group for s in parts})
    assert figures.num_groups == figures.num_split + len(segments) - len(parts)
    assert figures.num_ctas == len({s.cta for s in segments})


@given(problems(always_fixed=True), st.integers(1, 20))
def test_fixed_splits_of_a_request_do_not_depend_on_its_neighbours(
    problem: dict[str, Any], max_ctas: int
) -> None:
    def cuts(segments: list[Segment], request: int) -> list[tuple[int, int, int, int, bool]]:
        mine = [s for s in segments if s.request == request]
        return [(s.kv_head, s.q_tile, s.kv_begin, s.kv_end, s.complete) for s in mine]

    together = decode_schedule(**problem)
    for request, kv_len in enumerate(problem["kv_lens"]):
        qo_lens = problem["qo_lens"] and problem["qo_lens"][request : request + 1]
        changed = {"kv_lens": [kv_len], "qo_lens": qo_lens, "max_ctas": max_ctas}
        alone = decode_schedule(**(problem | changed))
        assert cuts(alone, 0) == cuts(together, request)


def test_without_fixed_splits_neighbours_move_the_cuts() -> None:
    alone = decode_schedule([640], max_ctas=2, **SIZES)
    together = decode_schedule([640, 64, 64], max_ctas=2, **SIZES)
    assert [s.kv_end for s in alone] == [320, 640]
    assert [s.kv_end for s in together if s.request == 0] == [384, 640]


def test_fixed_splits_are_dealt_out_whole() -> None:
    segments = decode_schedule([1000, 128, 0, 300], max_ctas=4, fixed_split_size=256, **SIZES)
    assert [(s.cta, s.request, s.kv_begin, s.kv_end, s.complete) for s in segments] == [
        (0, 0, 0, 256, False),
        (0, 0, 256, 512, False),
        (1, 0, 512, 768, False),
        (1, 0, 768, 1000, False),
        (2, 1, 0, 128, True),
        (2, 2, 0, 0, True),
        (3, 3, 0, 256, False),
        (3, 3, 256, 300, False),
    ]
    figures = schedule_figures(segments)
    assert (figures.num_ctas, figures.longest_run) == (4, 512)
    assert (figures.num_groups, figures.num_split) == (4, 2)
    assert (figures.num_partials, figures.longest_merge) == (6, 4)
    # From the first key that the request sees, not from its key 0.
    windowed = decode_schedule([1000], max_ctas=4, window_left=299, fixed_split_size=256, **SIZES)
    assert [(s.cta, s.kv_begin, s.kv_end) for s in windowed] == [(0, 700, 956), (1, 956, 1000)]


@given(problems(), st.integers(1, 5))
def test_groups_that_count_for_more_than_their_tiles(problem: dict[str, Any], overhead: int) -> None:
    problem.pop("fixed_split_size")
    segments = decode_schedule(**problem, group_overhead=overhead)
    tile_kv = problem["tile_kv"]

    def keys(schedule: list[Segment]) -> dict[Any, list[tuple[int, int]]]:
        tiles: dict[Any, list[tuple[int, int]]] = {}
        for s in schedule:
            starts = range(s.kv_begin, max(s.kv_end, s.kv_begin + 1), tile_kv)
            tiles.setdefault(s.group, []).extend((t, min(t + tile_kv, s.kv_end)) for t in starts)
        return tiles

    assert keys(segments) == keys(decode_schedule(**problem))  # the same tiles in the same order
    ctas = [s.cta for s in segments]
    assert ctas == sorted(ctas)
    assert set(ctas) == set(range(len(set(ctas))))  # no run has nothing but what counts for no tiles
    assert len(set(ctas)) <= problem["max_ctas"]
    num_tiles = sum(map(len, keys(segments).values()))
    quota = max(-(-(num_tiles + overhead * len(keys(segments))) // problem["max_ctas"]), overhead + 1)
    first_parts = {s.group: s for s in reversed(segments)}
    for _, run in itertools.groupby(segments, lambda s: s.cta):
        first, *others = run
        weights = [num_units(first, tile_kv)]
        weights += [num_units(s, tile_kv) + overhead * (s is first_parts[s.group]) for s in others]
        assert sum(weights) <= quota


@given(problems(), st.integers(0, 3000), st.integers(1, 12))
def test_groups_count_for_a_tile_more_where_requests_differ_and_no_run_is_longer_for_it(
    problem: dict[str, Any], kv_len: int, batch: int
) -> None:
    problem |= {"qo_lens": None, "fixed_split_size": None, "tile_q": min(problem["tile_q"], 32)}
    plain = decode_schedule(**problem, group_overhead=0)
    chosen = decode_schedule(**problem)
    assert chosen in (plain, decode_schedule(**problem, group_overhead=1))

    def longest(segments: list[Segment]) -> int:
        tiles = [(s.cta, num_units(s, problem["tile_kv"])) for s in segments]
        runs = itertools.groupby(tiles, lambda item: item[0])
        return max((sum(count for _, count in run) for _, run in runs), default=0)

    assert longest(chosen) <= longest(plain)
    equal = problem | {"kv_lens": [kv_len] * batch}
    assert decode_schedule(**equal) == decode_schedule(**equal, group_overhead=0)
    # With qo_indptr, kernels do not know how many groups come before.
    assert decode_schedule(**(problem | {"qo_lens": [1] * len(problem["kv_lens"])})) == plain


@given(
    st.data(),
    st.lists(st.integers(1, 60), min_size=2, max_size=9),
    st.integers(1, 3),
    st.sampled_from([1, 3]),
)
def test_groups_of_many_rows_start_runs(
    data: st.DataObject, num_tiles: list[int], num_kv_heads: int, qo_len: int
) -> None:
    """Then no run has tiles of two groups, and none is longer than if each group counted for a tile more."""
    groups_each = num_kv_heads * (1 if qo_len == 1 else 2)
    num_groups = groups_each * len(num_tiles)
    run = data.draw(st.integers(2, 20))  # that there are CTAs for
    max_ctas = groups_each * sum(-(-n // run) for n in num_tiles) + data.draw(st.integers(0, 3))
    all_tiles = [groups_each * n for n in num_tiles]
    quota = starting_run(all_tiles, num_groups, max_ctas)
    assume(quota > 1)
    problem: dict[str, Any] = {
        "kv_lens": [64 * n - 1 for n in num_tiles],
        "qo_lens": [qo_len] * len(num_tiles),
        "num_kv_heads": num_kv_heads,
        "group_size": 40,
        "tile_kv": 64,
        "tile_q": 64,
        "max_ctas": max_ctas,
    }
    segments = decode_schedule(**problem)
    assert len({s.group for s in segments}) == num_groups
    assert [s.cta for s in segments] == list(range(len(segments)))
    assert len(segments) <= max_ctas
    assert quota == -(-(sum(all_tiles) + num_groups) // max_ctas)
    assert max(num_units(s, 64) for s in segments) <= quota
    for _, parts in itertools.groupby(segments, lambda s: s.group):
        assert all(num_units(s, 64) == quota for s in list(parts)[:-1])
    # Not where a thread has several requests, in tiles of fewer rows, or where requests have other numbers of groups.
    counted = [decode_schedule(**problem, group_overhead=n) for n in (0, 1)]
    assert decode_schedule(**problem, num_threads=len(num_tiles) - 1) in counted
    if qo_len == 1:
        problem["tile_q"], problem["group_size"] = 32, 20
        assert decode_schedule(**problem) == counted[0]
        problem |= {"tile_q": 64, "qo_lens": [*problem["qo_lens"][1:], 9]}
        assert decode_schedule(**problem) == decode_schedule(**problem, group_overhead=0)


@pytest.mark.parametrize(
    ("num_tiles", "num_groups", "max_ctas", "expected"),
    [
        ([], 0, 4, 1),
        ([9, 2, 3], 3, 4, 5),
        ([18, 4, 6], 6, 8, 5),
        ([5, 5, 1], 3, 4, 1),
        ([5, 5], 2, 4, 1),
        ([2, 1], 2, 4, 1),
    ],
)
def test_which_groups_start_runs(num_tiles: list[int], num_groups: int, max_ctas: int, expected: int) -> None:
    assert starting_run(num_tiles, num_groups, max_ctas) == expected


@pytest.mark.parametrize(
    ("num_tiles", "expected"),
    [([], False), ([7], False), ([4, 7, 8, 15], False), ([3, 4, 8], True), ([1, 4], True)],
)
def test_which_requests_of_a_cascade_differ(num_tiles: list[int], expected: bool) -> None:
    assert are_uneven(num_tiles) == expected


def test_runs_in_short_requests_have_fewer_tiles() -> None:
    """A long request and 15 short ones on 264 CTAs: no run goes on from one to the next after its first tiles."""
    lens = [65536] + [256] * 15
    segments = {n: decode_schedule(lens, max_ctas=264, group_overhead=n, **SIZES) for n in (0, None)}
    runs = {n: [list(run) for _, run in itertools.groupby(s, lambda s: s.cta)] for n, s in segments.items()}
    assert {n: max(map(len, of)) for n, of in runs.items()} == {0: 2, None: 1}
    assert {n: len(of) for n, of in runs.items()} == {0: 217, None: 220}


@pytest.mark.parametrize(
    ("num_tiles", "num_groups", "max_ctas", "expected"),
    [([], 0, 4, 0), ([3, 1], 2, 4, 0), ([8, 2], 2, 4, 1), ([9, 2], 2, 4, 0), ([7, 7], 2, 4, 0)],
)
def test_the_choice_for_requests_that_differ(
    num_tiles: list[int], num_groups: int, max_ctas: int, expected: int
) -> None:
    assert uneven_group_overhead(num_tiles, num_groups, max_ctas) == expected


@given(problems(), st.integers(1, 3), st.integers(1, 8), st.sampled_from([2, 4, 8]))
def test_parts_are_lines_of_their_own(problem: dict[str, Any], heads: int, ctas: int, num_parts: int) -> None:
    """Each has its heads, in runs as those of a smaller model, by the CTAs whose number has its remainder."""
    problem["fixed_split_size"] = None
    whole = problem | {"num_kv_heads": heads * num_parts, "max_ctas": ctas * num_parts}
    segments = decode_schedule(**whole, num_parts=num_parts)
    alone = decode_schedule(**(problem | {"num_kv_heads": heads, "max_ctas": ctas}))
    for part in range(num_parts):
        own = [s for s in segments if s.kv_head // heads == part]
        assert {s.cta % num_parts for s in own} <= {part}
        moved = [replace(s, cta=s.cta // num_parts, kv_head=s.kv_head % heads) for s in own]
        assert moved == alone


@pytest.mark.parametrize(
    "changes", [{"num_kv_heads": 6}, {"max_ctas": 10}, {"num_parts": 0}, {"fixed_split_size": 64}]
)
def test_parts_that_cannot_be(changes: dict[str, int]) -> None:
    good = SIZES | {"num_kv_heads": 8, "max_ctas": 12, "num_parts": 4}
    assert len(decode_schedule([64], **good)) == 8
    with pytest.raises(ValueError, match="num_parts must"):
        decode_schedule([64], **(good | changes))


def test_short_groups_weigh_as_much_as_a_long_one() -> None:
    """128 requests with 8 tiles of their own, and 32 tiles of rows of a prefix of 128 tiles, on 132 CTAs."""
    problem = {"num_kv_heads": 1, "group_size": 16, "tile_kv": 64, "tile_q": 64, "max_ctas": 132}
    lens, rows = [8192] + [512] * 128, [128] + [1] * 128
    overhead = choose_group_overhead((2, 8), 32 * 128 + 128 * 8, 132)
    assert overhead == 2
    segments = {n: decode_schedule(lens, qo_lens=rows, group_overhead=n, **problem) for n in (0, overhead)}
    own = {n: [s.cta for s in segments[n] if s.request > 0] for n in segments}
    most = {n: max(own[n].count(cta) for cta in own[n]) for n in own}
    assert most == {0: 6, 2: 5}
    assert choose_group_overhead((2, 8), 384, 132) == 0


@pytest.mark.parametrize("options", [{"group_overhead": -1}, {"group_overhead": 1, "fixed_split_size": 64}])
def test_group_overhead_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="group_overhead must be 0 or more, and 0 with fixed splits, got"):
        decode_schedule([64], max_ctas=4, **SIZES, **options)


@given(st.integers(0, 5000), st.integers(1, 600))
def test_cta_of_inverts_begin(total: int, max_ctas: int) -> None:
    partition = Partition.of(total, max_ctas)
    assert partition.total == total
    assert partition.num_ctas <= max_ctas
    assert partition.begin(0) == 0
    last = partition.num_ctas - 1
    for cta in range(partition.num_ctas):
        begin, end = partition.begin(cta), partition.begin(cta + 1)
        assert end - begin == partition.quota or cta == last
        assert 1 <= end - begin <= partition.quota
        assert [partition.cta_of(unit) for unit in range(begin, end)] == [cta] * (end - begin)
    # In a kernel, CTAs without a run ask too.
    assert {partition.begin(cta) for cta in range(partition.num_ctas, max_ctas + 1)} == {total}


@given(st.integers(1, 5000), st.integers(1, 600))
def test_a_longest_run_of_one_unit_less_would_need_more_ctas(total: int, max_ctas: int) -> None:
    partition = Partition.of(total, max_ctas)
    assert (partition.quota - 1) * max_ctas < total <= partition.quota * partition.num_ctas
    assert partition.quota * (partition.num_ctas - 1) < total


def test_few_units_are_spread_one_a_cta() -> None:
    assert Partition.of(264, 264) == Partition(total=264, quota=1, num_ctas=264)
    assert Partition.of(266, 264) == Partition(total=266, quota=2, num_ctas=133)
    assert Partition.of(64, 16) == Partition(total=64, quota=4, num_ctas=16)
    assert Partition.of(0, 16) == Partition(total=0, quota=1, num_ctas=0)
    (alone,) = decode_schedule([64], max_ctas=4, **SIZES)
    assert alone.complete
    assert [s.cta for s in decode_schedule([192], max_ctas=4, **SIZES)] == [0, 1, 2]


def test_the_last_run_has_what_the_others_leave() -> None:
    partition = Partition.of(25, 8)
    assert partition == Partition(total=25, quota=4, num_ctas=7)
    assert [partition.begin(cta) for cta in range(9)] == [0, 4, 8, 12, 16, 20, 24, 25, 25]
    segments = decode_schedule([25 * 64], max_ctas=8, **SIZES)
    assert [num_units(s, 64) for s in segments] == [4, 4, 4, 4, 4, 4, 1]


def test_the_example_of_the_header() -> None:
    segments = decode_schedule([7 * 64, 4 * 64, 7 * 64], max_ctas=4, **SIZES)
    runs = [[s for s in segments if s.cta == cta] for cta in range(4)]
    assert [sum(num_units(s, 64) for s in run) for run in runs] == [5, 5, 5, 3]
    assert [[s.request for s in run] for run in runs] == [[0], [0, 1], [1, 2], [2]]
    figures = schedule_figures(segments)
    assert (figures.num_groups, figures.num_split, figures.num_partials) == (3, 3, 6)
    assert (figures.num_ctas, figures.longest_run, figures.longest_merge) == (4, 320, 2)
    text = re.sub(r"\s+", " ", header())
    assert "7 + 4 + 7 = 18 units on 4 CTAs: 5 + 5 + 5 + 3" in text
    assert "1024 units on 264 CTAs are 256 runs of 4" in text
    assert Partition.of(1024, 264) == Partition(total=1024, quota=4, num_ctas=256)


def header() -> str:
    return (Path(cupyattn.get_include()) / "cupyattn" / "schedule.cuh").read_text()


def test_requests_without_keys_or_queries() -> None:
    assert decode_schedule([], max_ctas=4, **SIZES) == []
    assert decode_schedule([0], max_ctas=4, **SIZES) == [Segment(0, 0, 0, 0, 0, 0, True)]
    segments = decode_schedule([100, 0, 100], qo_lens=[0, 1, 0], max_ctas=4, **SIZES)
    assert [(s.request, s.kv_begin, s.kv_end) for s in segments] == [(1, 0, 0)]
    assert schedule_figures([]).longest_run == 0


def test_a_window_cuts_the_keys_that_no_query_token_sees() -> None:
    assert Request(qo_len=1, kv_len=1000, window_left=99).kv_begin == 900  # 99 before the query's own
    assert Request(qo_len=3, kv_len=1000, window_left=99).kv_begin == 898
    assert Request(qo_len=9, kv_len=4, window_left=0).kv_begin == 0
    (segment,) = decode_schedule([1000], max_ctas=1, window_left=99, **SIZES)
    assert (segment.kv_begin, segment.kv_end, segment.complete) == (900, 1000, True)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"tile_kv": 0}, ValueError, "tile_kv must be positive, got 0"),
        ({"max_ctas": -1}, ValueError, "max_ctas must be positive, got -1"),
        ({"num_kv_heads": 1.5}, TypeError, "integer"),
        ({"window_left": -2}, ValueError, "window_left must be -1 or more, got -2"),
        ({"kv_lens": [3, -1]}, ValueError, "kv_lens must not be negative, got -1"),
        ({"kv_lens": [3.5, 1]}, TypeError, "kv_lens must be integers, got float64"),
        ({"kv_lens": [[3, 1]]}, ValueError, r"kv_lens must be a vector, got shape \[1, 2\]"),
        ({"qo_lens": [1]}, ValueError, "qo_lens must have 2 entries, as kv_lens has, got 1"),
        ({"kv_lens": [2**31 * 64, 1]}, ValueError, r"up to 2\^31 - 1 tiles, got 2147483649"),
        (
            {"kv_lens": [2**31 * 128, 1], "fixed_split_size": 128},
            ValueError,
            r"up to 2\^31 - 1 splits, got 2147483649",
        ),
        ({"fixed_split_size": 128.0}, TypeError, "integer"),
        *(
            (
                {"fixed_split_size": size},
                ValueError,
                rf"fixed_split_size must be tile_kv times a power of two, got {size} with tile_kv = 64",
            )
            for size in (-64, 0, 32, 100, 192)
        ),
    ],
)
def test_errors_name_the_argument(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decode_schedule(**({"kv_lens": [3, 1], "max_ctas": 4, **SIZES} | changed))


# -- the command line --

LENS = ("schedule", "--lens", "65536", *["256"] * 64)


@pytest.mark.parametrize(("options", "ctas"), [([], 64), (["--fixed-split-size", "64"], 16)])
def test_cli_cuts_rows_as_decode_does(
    options: list[str], ctas: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """32 rows are 4 tiles of 8 in so small a step; but one with fixed splits, which must not depend on the batch."""
    assert main(["schedule", "--lens", "1000", "--num-qo-heads", "32", *options]) == 0
    assert re.search(rf"^CTAs +{ctas} of ", capsys.readouterr().out, re.MULTILINE)


@given(problems(), st.lists(st.lists(st.integers(0, 600), max_size=4), max_size=3), st.data())
def test_a_cascade_is_the_schedule_of_its_groups(
    problem: dict[str, Any], shared_lens: list[list[int]], data: st.DataObject
) -> None:
    def level(lens: list[int], qo_indptr: list[int] | None) -> tuple[PageTable, np.ndarray | None]:
        arrays = (np.array(a, np.int32) for a in ([0] * (len(lens) + 1), [], lens))
        return PageTable(*arrays), None if qo_indptr is None else np.array(qo_indptr, np.int32)

    kv_lens, qo_lens = problem.pop("kv_lens"), problem.pop("qo_lens")
    problem.pop("fixed_split_size")
    ends = [0, *itertools.accumulate(qo_lens or [1] * len(kv_lens))]
    levels, all_kv_lens, all_qo_lens = [], [], []
    for lens in shared_lens:
        borders = sorted(data.draw(st.sampled_from(ends)) for _ in range(len(lens) + 1))
        levels.append(level(lens, borders))
        all_kv_lens += lens
        all_qo_lens += [
            b - a if kv_len else 0 for (a, b), kv_len in zip(itertools.pairwise(borders), lens, strict=True)
        ]
    levels.append(level(kv_lens, None if qo_lens is None else ends))
    lens = {"kv_lens": all_kv_lens + kv_lens, "qo_lens": all_qo_lens + (qo_lens or [1] * len(kv_lens))}
    if not shared_lens and qo_lens is None:
        lens["qo_lens"] = None
    # Alone, it is plain decode, whose groups may count for a tile more.
    expected = decode_schedule(**lens, **problem, group_overhead=0 if shared_lens else None)
    assert cascade_schedule(CascadeLevels(levels), **problem) == expected


def test_cli_says_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(LENS)) == 0
    rows = dict(re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines())
    config = decode_config("sm_90a", 128, 8)
    figures = schedule_figures(
        decode_schedule(
            [65536] + [256] * 64,
            num_kv_heads=1,
            group_size=8,
            tile_kv=config.tile_kv,
            tile_q=config.tile_q,
            max_ctas=132 * config.ctas_per_sm,
        )
    )
    assert rows == {
        "CTAs": f"{figures.num_ctas} of {132 * config.ctas_per_sm}",
        "longest run": f"{figures.longest_run} tokens",
        "groups split": f"{figures.num_split} of 65",
        "partial states": str(figures.num_partials),
        "longest merge": str(figures.longest_merge),
    }
    assert figures.num_partials == figures.longest_merge + 2 * (
        figures.num_split - 1
    )  # the long one, others in 2


def test_cli_has_pairs_of_kv_heads(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--num-qo-heads", "16", "--num-kv-heads", "4", "--head-dim", "64")
    assert main(["schedule", "--lens", *["8192"] * 4, *sizes]) == 0
    rows = dict(re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines())
    assert rows["CTAs"] == "256 of 264"  # 4 x 2 groups of 128 tiles
    assert rows["groups split"] == "8 of 8"


@pytest.mark.parametrize(
    "lens",
    [
        LENS,
        (*LENS, "--fixed-split-size", "2048"),
        ("schedule", "--lens", "900", "0", "300"),
        ("schedule", "--lens", "0"),
    ],
)
def test_cli_draws(lens: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in (first, second):
        assert main([*lens, "--num-sms", "2", "--out", str(path)]) == 0
    assert "<svg" in first.read_text()
    assert first.read_bytes() == second.read_bytes()
    assert main([*lens, "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr() == ("", "")


def test_cli_with_fixed_splits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LENS, "--fixed-split-size", "2048"]) == 0
    rows = dict(re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines())
    assert rows == {
        "CTAs": "96 of 264",  # 32 splits of the long one, 64 others
        "longest run": "2048 tokens",
        "groups split": "1 of 65",
        "partial states": "32",
        "longest merge": "32",
    }


def test_drawing_marks_every_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn: list[list[int]] = []
    monkeypatch.setattr(axes, "vlines", lambda self, x, *args, **kwargs: drawn.append(list(x)))
    lens = [1000, 128, 300]
    draw_schedule(decode_schedule(lens, max_ctas=2, **SIZES), tmp_path / "a.svg")
    assert drawn == [[768], [0]]  # 16 + 2 + 5 tiles in runs of 12 + 11
    drawn.clear()
    segments = decode_schedule(lens, max_ctas=2, fixed_split_size=256, **SIZES)
    draw_schedule(segments, tmp_path / "b.svg")
    assert drawn == [[256, 512, 768], [384]]  # 4 + 1 + 2 splits in runs of 4 + 3


def test_cli_names_the_extra_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*LENS, "--out", str(tmp_path / "x.svg")]) == 2
    assert "pip install 'cupyattn[bench]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-qo-heads", "6", "--num-kv-heads", "4"), "--num-qo-heads must be a positive multiple"),
        (("--num-sms", "0"), "max_ctas must be positive"),
        (("--fixed-split-size", "100"), "fixed_split_size must be tile_kv times a power of two, got 100"),
        (("--arch", "ampere"), "--arch must look like sm_90a, got ampere"),
        (("--out", "x.txt"), "--out must end in .svg or .png, got x.txt"),
    ],
)
def test_cli_errors(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LENS, *options]) == 2
    assert message in capsys.readouterr().err


def test_cli_says_where_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main([*LENS, "--out", str(tmp_path / "missing" / "x.svg")]) == 2
    assert "cannot write" in capsys.readouterr().err
