"""The tree of prefixes: its levels expand to what the requests have, and it is the same however it came about."""

from __future__ import annotations

import csv
import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cupyattn import reference
from cupyattn.cache import PageAllocator, PagedKVCache
from cupyattn.levels import MAX_LEVELS
from cupyattn.prefix import CascadeCost, PrefixTree

TRACES = Path(__file__).resolve().parent.parent / "bench" / "traces"


def always(num_readers, num_tokens, num_qo_tokens):
    """Every group is worth it."""
    return 1.0


def as_lists(levels):
    """Of each level: kv_indptr, kv_indices, kv_lens, qo_indptr."""
    return [
        (t.kv_indptr.tolist(), t.kv_indices.tolist(), t.kv_lens.tolist(), None if i is None else i.tolist())
        for t, i in levels.levels
    ]


def expand(result, page_size, qo_lens):
    """Read levels as `cascade_decode` does: each row's [(page ids of a group in use, its kv_len), ...]."""
    batch = len(qo_lens)
    levels = as_lists(result.levels)
    num_tokens = sum(qo_lens)
    q_indices = result.levels.q_indices
    q_indices = list(range(num_tokens)) if q_indices is None else q_indices.tolist()
    assert sorted(q_indices) == list(range(num_tokens))
    row_of = [row for row, n in enumerate(qo_lens) for _ in range(n)]
    seen = [[] for _ in range(num_tokens)]  # by row of q
    for kv_indptr, kv_indices, kv_lens, qo_indptr in levels:
        if qo_indptr is None:
            qo_indptr = list(range(num_tokens + 1))
        assert len(kv_indptr) == len(qo_indptr) == len(kv_lens) + 1
        assert 0 <= qo_indptr[0] <= qo_indptr[-1] <= num_tokens
        assert kv_indptr[0] == 0
        assert kv_indptr[-1] <= len(kv_indices)
        for group, kv_len in enumerate(kv_lens):
            pages = kv_indices[kv_indptr[group] : kv_indptr[group + 1]]
            assert 0 <= kv_len <= len(pages) * page_size
            used = pages[: -(-kv_len // page_size)]
            assert qo_indptr[group] <= qo_indptr[group + 1]
            for token in range(qo_indptr[group], qo_indptr[group + 1]):
                seen[q_indices[token]].append((used, kv_len))
    rows = [[] for _ in range(batch)]
    for row, groups in zip(row_of, seen, strict=True):
        assert rows[row] in ([], groups), "tokens of a request see the same keys"
        rows[row] = groups
    return rows


def check_levels(result, tree, requests, qo_lens, max_levels=MAX_LEVELS):
    """`requests`: of each row (pages, kv_len). Says which rows are in a group, and from and to which page."""
    page_size = tree.page_size
    levels = as_lists(result.levels)
    assert 1 <= len(levels) <= max_levels
    assert sorted(result.order.tolist()) == list(range(len(requests)))
    for (pages, kv_len), groups, qo_len in zip(
        requests, expand(result, page_size, qo_lens), qo_lens, strict=True
    ):
        if qo_len:
            assert sum(n for _, n in groups) == kv_len
            assert [page for used, _ in groups for page in used] == list(pages)[: -(-kv_len // page_size)]
    # Own keys are in the order that is said, with all pages there are.
    _, own_indices, own_lens, own_qo = levels[-1]
    ordered = [requests[row] for row in result.order]
    assert (own_qo or list(range(len(requests) + 1))) == [
        0, *np.cumsum([qo_lens[r] for r in result.order]).tolist()
    ]  # fmt: skip
    kv_indptr = levels[-1][0]
    for i, ((pages, kv_len), own_len) in enumerate(zip(ordered, own_lens, strict=True)):
        own = own_indices[kv_indptr[i] : kv_indptr[i + 1]]
        assert (kv_len - own_len) % page_size == 0
        assert own == list(pages)[(kv_len - own_len) // page_size :]
    # Groups of shared keys: of two requests at least, or of none to fill a gap, which is never at the end.
    groups = set()
    row_of = [row for row in result.order.tolist() for _ in range(qo_lens[row])]
    starts = [0] * len(requests)
    for kv_indptr, _, kv_lens, qo_indptr in levels[:-1]:
        for group, kv_len in enumerate(kv_lens):
            rows = sorted(set(row_of[qo_indptr[group] : qo_indptr[group + 1]]))
            assert rows
            if kv_len == 0:
                assert 0 < group < len(kv_lens) - 1
                continue
            num_pages = kv_indptr[group + 1] - kv_indptr[group]
            assert kv_len == num_pages * page_size
            assert len(rows) >= 2
            (start,) = {starts[row] for row in rows}
            groups.add((frozenset(rows), start, start + num_pages))
            for row in rows:
                starts[row] += num_pages
    return groups


def shared_by_force(keys):
    """All groups there are: of each set of rows that share a prefix, from where fewer do to where all still do."""
    members = {}
    for row, mine in enumerate(keys):
        for end in range(1, len(mine) + 1):
            members.setdefault(tuple(mine[:end]), []).append(row)
    ends = {}
    for prefix, rows in members.items():
        if len(rows) >= 2:
            ends[frozenset(rows)] = max(ends.get(frozenset(rows), 0), len(prefix))
    return {
        (rows, max((e for others, e in ends.items() if others > rows), default=0), end)
        for rows, end in ends.items()
    }


def shape(tree):
    """The tree as nested lists of runs and what ends there: equal for equal trees, whoever owns the nodes."""
    names = {entry: name for name, entry in tree._requests.items()}

    def visit(node):
        run = () if node.parent is None else tuple(node.owner.keys[node.start : node.end].tolist())
        below = sorted((visit(child) for child in node.children.values()), key=repr)
        return run, sorted(map(repr, (names[entry] for entry in node.ending))), below

    return visit(tree._by_page), visit(tree._by_hash)


# --- in agreement with force ---------------------------------------------------------------------------------------


@st.composite
def families(draw, max_requests=8):
    """Lists of pages of which some begin as others do, with lengths: (page_size, [(pages, kv_len)])."""
    page_size = draw(st.integers(1, 4))
    fresh = itertools.count(100)
    requests = []
    for _ in range(draw(st.integers(0, max_requests))):
        pages = []
        if requests and draw(st.booleans()):
            parent = draw(st.sampled_from(requests))[0]
            pages = parent[: draw(st.integers(0, len(parent)))]
        pages = pages + [next(fresh) for _ in range(draw(st.integers(0, 4)))]
        requests.append((pages, draw(st.integers(0, len(pages) * page_size))))
    return page_size, requests


@settings(max_examples=300, deadline=None)
@given(family=families(), data=st.data())
def test_levels_are_what_the_requests_have(family, data):
    page_size, requests = family
    tree = PrefixTree(page_size)
    for i, (pages, kv_len) in enumerate(requests):
        tree.add(i, data.draw(st.sampled_from((list, np.array)))(pages or np.empty(0, "int64")), kv_len)
    tree.check()
    rows = data.draw(st.permutations(range(len(requests))))
    rows = rows[: data.draw(st.integers(0, len(rows)))]
    qo_lens = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    if data.draw(st.booleans()):
        qo_lens = [1] * len(rows)
    result = tree.levels(rows, num_qo_tokens=qo_lens, choose=always)
    batch = [requests[i] for i in rows]
    groups = check_levels(result, tree, batch, qo_lens)
    # As many groups as there can be: rows without queries are in none.
    keys = [
        pages[: kv_len // page_size] if n else [] for (pages, kv_len), n in zip(batch, qo_lens, strict=True)
    ]
    expected = shared_by_force(keys)
    depth = max((sum(row in g for g, _, _ in expected) for row in range(len(rows))), default=0)
    if depth < MAX_LEVELS:
        assert groups == expected

    # Fewer levels, and only what is worth it, cover the same; and the numbers are true.
    max_levels = data.draw(st.integers(1, MAX_LEVELS))
    check_levels(
        tree.levels(rows, num_qo_tokens=qo_lens, choose=always, max_levels=max_levels),
        tree, batch, qo_lens, max_levels,
    )  # fmt: skip
    cost = CascadeCost(
        fixed_us=data.draw(st.sampled_from((0.0, 1e-3))), partial_bytes=data.draw(st.integers(0, 20000))
    )
    result = tree.levels(rows, num_qo_tokens=qo_lens, choose=cost, max_levels=max_levels)
    groups = check_levels(result, tree, batch, qo_lens, max_levels)
    saving = sum(
        cost.saving_us(len(g), (end - start) * page_size, sum(qo_lens[r] for r in g))
        for g, start, end in groups
    )
    most = max((sum(qo_lens[r] for r in g) for g, _, _ in groups), default=0)
    num_own = int(result.levels.levels[-1][0].kv_lens.sum())
    assert result.saving_us == pytest.approx(saving - cost.launch_us(most, num_own) if groups else 0)
    assert (result.saving_us > 0) == bool(groups)


def test_groups_that_are_left_are_worth_it():
    """Of random trees: leaving one more group out would not save time, and none is found in vain."""
    rng = random.Random(0)
    cost = CascadeCost(fixed_us=0)
    num_groups = 0
    for _ in range(60):
        tree = PrefixTree(16)
        fresh = itertools.count()
        lists = [[]]
        for i in range(24):
            parent = rng.choice(lists)
            pages = parent[: rng.randint(0, len(parent))] + list(
                itertools.islice(fresh, rng.choice((1, 2, 9, 40)))
            )
            lists.append(pages)
            tree.add(i, pages, len(pages) * 16)
        result = tree.levels(choose=cost)
        groups = check_levels(result, tree, [(p, len(p) * 16) for p in lists[1:]], [1] * 24)
        num_groups += len(groups)
        for rows, start, end in groups:
            inner = [g for g, s, _ in groups if s == end and g < rows]
            num_readers = len(inner) + len(rows.difference(*inner))
            assert cost.saving_us(num_readers, (end - start) * 16, len(rows)) > 0
    assert num_groups > 60


class Changes(RuleBasedStateMachine):
    """Requests come, grow, shrink, fork and go; the tree is always that of what is there."""

    @initialize(page_size=st.integers(1, 3), blocks=st.integers(1, 2))
    def start(self, page_size, blocks):
        self.page_size, self.block = page_size, blocks * page_size
        self.tree = PrefixTree(page_size, block_size=self.block)
        self.requests: dict[int, tuple[list[int], int, list[str] | None]] = {}
        self.names = itertools.count()

    def some(self, data):
        return data.draw(st.sampled_from(sorted(self.requests)))

    def draw_pages(self, data, hashed):
        # Few ids, so that lists are alike; with hashes pages are all others, so that it shows whose are read.
        return data.draw(st.lists(st.integers(0, 2**20 if hashed else 2), max_size=4))

    @rule(data=st.data(), hashed=st.booleans())
    def add(self, data, hashed):
        pages = self.draw_pages(data, hashed)
        if self.requests and data.draw(st.booleans()):
            parent = self.requests[self.some(data)][0]
            pages = parent[: data.draw(st.integers(0, len(parent)))] + pages
        room = len(pages) * self.page_size
        kv_len = data.draw(st.one_of(st.just(room), st.integers(0, room)))
        hashes = data.draw(st.lists(st.sampled_from("ab"), max_size=4)) if hashed else None
        name = next(self.names)
        self.tree.add(name, pages, kv_len, hashes=hashes)
        self.requests[name] = (pages, kv_len, hashes)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def extend(self, data):
        name = self.some(data)
        pages, kv_len, hashes = self.requests[name]
        more = self.draw_pages(data, hashes is not None)
        num_kept = data.draw(st.one_of(st.none(), st.integers(0, len(pages))))
        kept = len(pages) if num_kept is None else num_kept
        more_hashes = []
        if hashes is not None:
            more_hashes = data.draw(st.lists(st.sampled_from("ab"), max_size=2))
            if kept < len(pages):  # those of blocks that are all in what is kept
                hashes = hashes[: kept * self.page_size // self.block]
            hashes = hashes + more_hashes
        pages = pages[:kept] + more
        room = len(pages) * self.page_size
        new_len = data.draw(st.one_of(st.just(room), st.integers(0, room)))
        if kv_len <= room and data.draw(st.booleans()):
            self.tree.extend(name, more, hashes=more_hashes, num_kept=num_kept)
        else:
            kv_len = new_len
            self.tree.extend(name, more, kv_len, hashes=more_hashes, num_kept=num_kept)
        self.requests[name] = (pages, kv_len, hashes)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def remove(self, data):
        name = self.some(data)
        self.tree.remove(name)
        del self.requests[name]
        assert name not in self.tree
        with pytest.raises(KeyError, match="removed already"):
            self.tree.remove(name)

    @invariant()
    def the_tree_is_that_of_its_requests(self):
        if not hasattr(self, "tree"):
            return
        self.tree.check()
        assert self.tree.requests == list(self.requests)
        assert len(self.tree) == len(self.requests)
        fresh = PrefixTree(self.page_size, block_size=self.block)
        for name, (pages, kv_len, hashes) in self.requests.items():
            fresh.add(name, pages, kv_len, hashes=hashes)
        assert shape(self.tree) == shape(fresh)
        result, again = self.tree.levels(choose=always), fresh.levels(choose=always)
        qo_lens = [1] * len(self.requests)
        assert [level[2:] for level in as_lists(result.levels)] == [
            level[2:] for level in as_lists(again.levels)
        ]
        if all(hashes is None for _, _, hashes in self.requests.values()):
            assert as_lists(result.levels) == as_lists(again.levels)
            check_levels(result, self.tree, [(p, n) for p, n, _ in self.requests.values()], qo_lens)
        rows = expand(result, self.page_size, qo_lens)
        for row, (pages, kv_len, hashes) in zip(rows, self.requests.values(), strict=True):
            assert sum(n for _, n in row) == kv_len
            read = [page for used, _ in row for page in used]
            assert len(read) == -(-kv_len // self.page_size)
            for i, page in enumerate(read):
                same = self.with_the_same(hashes, i) if hashes is not None else []
                assert page in {pages[i], *same}

    def with_the_same(self, hashes, i):
        """The ``i``-th pages of requests that have the same hashes as far as there."""
        blocks = i * self.page_size // self.block + 1
        return [
            others[i]
            for others, kv_len, theirs in self.requests.values()
            if theirs is not None
            and len(theirs[:blocks]) == blocks <= kv_len // self.block
            and theirs[:blocks] == hashes[:blocks]
        ]


Changes.TestCase.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
TestChanges = Changes.TestCase


# --- cases that matter ---------------------------------------------------------------------------------------------


def test_a_request_alone_is_plain():
    tree = PrefixTree(4)
    tree.add("a", [3, 1], 7)
    levels, order, saving_us = tree.levels(choose=always)
    assert as_lists(levels) == [([0, 2], [3, 1], [7], None)]
    assert levels.q_indices is None
    assert order.tolist() == [0]
    assert saving_us == 0


def test_no_request():
    tree = PrefixTree(4)
    for result in (tree.levels(), tree.levels([], num_qo_tokens=[], choose=always)):
        assert result.levels.batch_size == 0
        assert result.levels.num_levels == 1
        assert result.order.tolist() == []
    tree.add("a", [3, 1], 7)
    assert tree.levels([]).levels.batch_size == 0
    tree.remove("a")
    tree.check()
    assert not tree._by_page.children


def test_ids_that_are_equal_but_do_not_lead():
    tree = PrefixTree(1)
    tree.add(0, [9, 1, 2, 3], 4)
    tree.add(1, [8, 1, 2, 3], 4)
    tree.add(2, [1, 2, 3], 3)
    assert tree.levels(choose=always).levels.num_levels == 1
    tree.add(3, [9, 2, 1, 3], 4)  # equal again after another
    (_, indices, lens, qo_indptr), _ = as_lists(tree.levels(choose=always).levels)
    assert (indices, lens, qo_indptr) == ([9], [1], [0, 2])


def test_a_partly_filled_page_is_not_shared():
    tree = PrefixTree(4)
    tree.add(0, [5, 6], 8)
    tree.add(1, [5, 6], 7)
    assert as_lists(tree.levels(choose=always).levels) == [
        ([0, 1], [5], [4], [0, 2]),
        ([0, 1, 2], [6, 6], [4, 3], None),
    ]
    tree.extend(1, kv_len=8)
    assert as_lists(tree.levels(choose=always).levels) == [
        ([0, 2], [5, 6], [8], [0, 2]),
        ([0, 0, 0], [], [0, 0], None),
    ]
    tree.extend(1, kv_len=3)  # drafts were rejected
    assert tree.levels(choose=always).levels.num_levels == 1


def test_requests_that_are_identical():
    """Parallel sampling: the prompt's full pages are shared, its last one is copied when a sample grows."""
    allocator, tree = PageAllocator(64, 4), PrefixTree(4)
    seqs = [allocator.alloc(22)]
    seqs += [allocator.fork(seqs[0]) for _ in range(3)]
    for seq in seqs:
        tree.add(seq, allocator.pages(seq), allocator.length(seq))
    prompt = allocator.pages(seqs[0])
    for _ in range(6):
        for seq in seqs:
            copies = allocator.extend(seq)
            num_kept = 5 if copies else tree._requests[seq].num_pages
            tree.extend(seq, allocator.pages(seq)[num_kept:], allocator.length(seq), num_kept=num_kept)
        tree.check()
        levels = tree.levels(choose=always).levels
        (_, indices, lens, qo_indptr), (_, _, own_lens, _) = as_lists(levels)
        assert (indices, lens, qo_indptr) == (prompt[:5], [20], [0, 4])
        assert own_lens == [allocator.length(seq) - 20 for seq in seqs]
        assert levels.q_indices is None


def test_groups_in_groups_and_a_gap():
    tree = PrefixTree(1)
    lists = {
        "x": [7],
        "a": [1, 2, 3, 10],
        "c": [1, 4, 11],
        "b": [1, 2, 3, 12],
        "y": [5, 6, 8],
        "z": [5, 6, 9],
    }
    for name, pages in lists.items():
        tree.add(name, pages, len(pages))
    levels, order, _ = tree.levels(choose=always)
    assert order.tolist() == [1, 3, 2, 4, 5, 0]  # a b c, y z, x
    assert levels.q_indices.tolist() == order.tolist()
    assert as_lists(levels) == [
        ([0, 1, 3], [1, 5, 6], [1, 2], [0, 3, 5]),
        ([0, 2], [2, 3], [2], [0, 2]),
        ([0, 1, 2, 4, 5, 6, 7], [10, 12, 4, 11, 8, 9, 7], [1, 1, 2, 1, 1, 1], None),
    ]
    # With "d" beside, c lies between two groups of the second level: a group of length 0 there.
    tree.add("d", [5, 6, 8, 13], 4)
    assert as_lists(tree.levels(choose=always).levels)[1] == (
        [0, 2, 2, 3],
        [2, 3, 8],
        [2, 0, 1],
        [0, 2, 3, 5],
    )
    # Another batch, in another order, with more queries each.
    levels, order, _ = tree.levels(["x", "b", "a"], num_qo_tokens=[2, 1, 3], choose=always)
    assert order.tolist() == [1, 2, 0]
    assert levels.q_indices.tolist() == [2, 3, 4, 5, 0, 1]
    assert as_lists(levels) == [
        ([0, 3], [1, 2, 3], [3], [0, 4]),
        ([0, 1, 2, 3], [12, 10, 7], [1, 1, 1], [0, 1, 4, 6]),
    ]


@pytest.mark.parametrize("max_levels", range(1, MAX_LEVELS + 1))
def test_groups_deeper_than_there_may_be_levels(max_levels):
    """A request has the keys of all before it, and more: of 31 groups those are left that save nearly the most."""
    rng = random.Random(0)
    tree, requests, base = PrefixTree(16), [], []
    for i in range(32):
        base += range(len(base), len(base) + rng.choice((1, 1, 1, 20, 50)))
        requests.append((base[:], len(base) * 16))
        tree.add(i, base, len(base) * 16)

    def choose(num_readers, num_tokens, num_qo_tokens):
        return (num_readers - 1) * num_tokens

    result = tree.levels(choose=choose, max_levels=max_levels)
    groups = check_levels(result, tree, requests, [1] * 32, max_levels)
    assert result.levels.num_levels == max_levels
    assert len(groups) == max_levels - 1

    # By force: the most that so many groups save, of which the innermost is that of requests i to 31.
    best = [0] * 32
    for _ in range(max_levels - 1):
        ends = [n for _, n in requests]
        best = [
            max(best[j] + (31 - i) * (ends[i] - ends[j]) for j in range(i)) if i else 0 for i in range(32)
        ]
        best = [max(best[i], (31 - i) * ends[i]) for i in range(32)]
    assert 0.85 * max(best) <= result.saving_us <= max(best)


def test_only_groups_in_too_many_others_are_left_out():
    """Of four long runs in one another two go, for there to be 3 levels; two short ones, which save less, stay."""
    tree = PrefixTree(1)
    long, short = [*range(40)], [100, 101]
    lists = [long[:10], long[:20], long[:30], long, long, short[:1], short, short]
    for i, pages in enumerate(lists):
        tree.add(i, pages, len(pages))
    levels = tree.levels(choose=lambda num_readers, num_tokens, _: num_tokens, max_levels=3).levels
    (_, outer, outer_lens, _), (_, inner, inner_lens, _), (_, _, own_lens, _) = as_lists(levels)
    assert (outer_lens[1:], inner_lens[-1:]) == ([1], [1])
    assert (outer[-1:], inner[-1:]) == ([100], [101])
    assert 20 <= outer_lens[0] + inner_lens[0] == 40 - max(own_lens[:2])
    assert len(own_lens) == 8


def test_a_request_grows_into_another():
    tree = PrefixTree(2)
    tree.add("a", [1], 2)
    tree.add("b", [1, 2, 3], 6)
    tree.extend("a", [2], 4)
    tree.check()
    tree.extend("a", [3, 4], 8)
    tree.check()
    fresh = PrefixTree(2)
    fresh.add("b", [1, 2, 3], 6)
    fresh.add("a", [1, 2, 3, 4], 8)
    assert shape(tree) == shape(fresh)


def test_keys_of_a_group_that_is_left_out_go_to_those_inside():
    """One page of all 8 is not worth a group; with it, two groups of 4 have 101 pages each."""
    tree = PrefixTree(16)
    for i in range(8):
        tree.add(i, [0, *range(1000 * (i // 4 + 1), 1000 * (i // 4 + 1) + 100), 10 + i], 102 * 16)
    levels = tree.levels().levels
    (_, indices, lens, qo_indptr), (_, _, own_lens, _) = as_lists(levels)
    assert lens == [101 * 16] * 2
    assert (indices[0], indices[101]) == (0, 0)
    assert qo_indptr == [0, 4, 8]
    assert own_lens == [16] * 8
    assert tree.levels(min_shared_tokens=101 * 16).levels.num_levels == 2
    assert tree.levels(min_shared_tokens=101 * 16 + 1).levels.num_levels == 1


def test_pages_without_tokens_and_reserved_entries():
    tree = PrefixTree(4)
    tree.add(0, [1, 2, 3, 4], 6)
    tree.add(1, [1, 5], 5)
    _, own = as_lists(tree.levels(choose=always, reserve_pages=2).levels)
    assert own[:3] == ([0, 5, 8], [2, 3, 4, -1, -1, 5, -1, -1], [2, 1])
    # Lengths advance in place; the levels are as if they were made now, but for pages that have become full.
    levels, order, _ = tree.levels(choose=always)
    for _ in range(3):
        levels.levels[-1][0].kv_lens[...] += 1
        for name in (0, 1):
            tree.extend(name, kv_len=tree._requests[name].kv_len + 1)
    assert as_lists(levels) == as_lists(tree.levels(choose=always).levels)
    assert order.tolist() == [0, 1]


def test_the_order_is_that_of_the_batch_where_it_can_be():
    tree = PrefixTree(1)
    for i, first in enumerate((3, 3, 1, 1, 1, 7, 8)):
        tree.add(i, [first, 100 + i], 2)
    assert tree.levels(choose=always).levels.q_indices is None
    assert tree.levels(range(6, -1, -1), choose=always).order.tolist() == [2, 3, 4, 5, 6, 0, 1]


# --- block hashes --------------------------------------------------------------------------------------------------


def test_pages_of_requests_outside_the_batch_are_not_read():
    """With equal hashes pages differ; those of a request that is not in the batch may be gone by then."""
    tree = PrefixTree(4)
    for number, name in enumerate("abc"):
        tree.add(name, [10 * number, 10 * number + 1, 10 * number + 2], 9, hashes=["x", "y"])
    for rows, pages in (("abc", [0, 1]), ("bc", [10, 11]), ("cb", [20, 21])):
        (shared, _), _ = tree.levels(rows, choose=always).levels.levels
        assert shared.kv_indices.tolist() == pages


def test_hashes_of_blocks():
    tree = PrefixTree(2, block_size=4)
    tree.add("a", [0, 1, 2, 3, 4], 9, hashes=[b"x", b"y"])
    tree.add("b", [10, 11, 12, 13], 8, hashes=[b"x", b"z"])
    tree.add("c", [20, 21, 22], 5, hashes=(h for h in [b"x", b"y"]))  # its second block is not full yet
    tree.add("d", [0, 1, 2, 3], 8)  # without hashes: only with others without
    (_, indices, lens, qo_indptr), (_, own, own_lens, _) = as_lists(tree.levels(choose=always).levels)
    assert (indices, lens, qo_indptr) == ([0, 1], [4], [0, 3])
    assert own == [2, 3, 4, 12, 13, 22, 0, 1, 2, 3]
    assert own_lens == [5, 4, 1, 8]

    tree.extend("c", [23], 8)
    (_, _, lens, _), (_, indices, _, qo_indptr), _ = as_lists(tree.levels(choose=always).levels)
    assert lens == [4]
    assert (indices, qo_indptr) == ([2, 3], [0, 2])
    tree.extend("c", [24, 25], 12, hashes=[b"w"])
    tree.check()

    # The pages of "a" may be gone now: others' are read.
    tree.remove("a")
    tree.check()
    (_, indices, lens, qo_indptr), (_, own, own_lens, _) = as_lists(tree.levels(choose=always).levels)
    assert (lens, qo_indptr) == ([4], [0, 2])
    assert indices in ([10, 11], [20, 21])
    assert own == [12, 13, 22, 23, 24, 25, 0, 1, 2, 3]
    assert own_lens == [4, 8, 8]


@pytest.mark.parametrize(
    "hashes", [[1, 2], [(1, 2), (3, 4)], ["x", "y"], [None, 2.5], np.array([1, 2], "uint64"), [2**64, -1]]
)
def test_anything_hashable_is_a_hash(hashes):
    tree = PrefixTree(1)
    tree.add(0, [1, 2, 3], 3, hashes=hashes)
    tree.add(1, [4, 5, 6], 3, hashes=list(hashes))
    tree.add(2, [7, 8], 2, hashes=hashes[:1])
    tree.check()
    assert as_lists(tree.levels(choose=always).levels) == [
        ([0, 1], [1], [1], [0, 3]),
        ([0, 1], [2], [1], [0, 2]),
        ([0, 1, 2, 3], [3, 6, 8], [1, 1, 1], None),
    ]


def test_equal_pages_with_hashes_of_their_own():
    """Where a cache keeps equal blocks in equal pages, hashes and ids find the same."""
    rng = random.Random(1)
    by_page, by_hash = PrefixTree(4), PrefixTree(4)
    lists = [[]]
    for i in range(40):
        parent = rng.choice(lists)
        pages = parent[: rng.randint(0, len(parent))] + [1000 * i + k for k in range(rng.randint(1, 6))]
        lists.append(pages)
        by_page.add(i, pages, len(pages) * 4 - 1)
        by_hash.add(i, pages, len(pages) * 4 - 1, hashes=[f"block {page}" for page in pages])
    results = [tree.levels(choose=always) for tree in (by_page, by_hash)]
    assert as_lists(results[0].levels) == as_lists(results[1].levels)
    assert results[0].order.tolist() == results[1].order.tolist()


# --- what is worth it ----------------------------------------------------------------------------------------------


def family(num_requests, shared, own, page_size=16):
    tree = PrefixTree(page_size)
    assert shared % page_size == 0
    num_own = -(-own // page_size)
    for i in range(num_requests):
        pages = [*range(shared // page_size), *range(10**6 * (i + 1), 10**6 * (i + 1) + num_own)]
        tree.add(i, pages, shared + own)
    return tree


def test_what_pays():
    small, large = CascadeCost.gqa(8, 1, 128), CascadeCost.gqa(64, 8, 128)
    assert CascadeCost() == large
    assert (small.bytes_per_token, large.bytes_per_token) == (512, 4096)
    assert CascadeCost.mla(16).bytes_per_token == 1152

    tree = family(8, 4000, 128)
    result = tree.levels(choose=large)
    assert result.levels.num_levels == 2
    # 7 * 4000 * 4096 bytes from L2, less 8 partial states of 64 * 128 columns written and read, less what 64 rows cost,
    # and own keys.
    saving = 7 * 4000 * 4096 / 5.5e6 - 8 * 36864 / 3.05e6
    assert result.saving_us == pytest.approx(saving - 5 - 8 * 128 * 0.02e-3)
    assert small.saving_us(8, 4000, 8) == pytest.approx(saving / 8)
    # Own keys of one head take longer by twice as much as of eight heads side by side.
    assert small.launch_us(8, 10**6) == pytest.approx(small.launch_us(8) + 1e6 * 0.04e-3 / 8)
    assert tree.levels(choose=small).levels.num_levels == 1
    # Up to 16 rows a KV head cost two fifths of it, up to 32 three quarters.
    assert [small.launch_us(n) for n in (2, 3, 4, 5)] == [2, 3.75, 3.75, 5]
    assert family(2, 4000, 128).levels(choose=large).levels.num_levels == 2
    assert family(5, 1504, 128).levels(choose=large).levels.num_levels == 1
    assert family(4, 2000, 128).levels(choose=CascadeCost.gqa(32, 8, 128)).levels.num_levels == 2

    assert large.saving_us(2, 16, 2) < 0
    tree = family(2, 16, 128)
    assert tree.levels(choose=large).levels.num_levels == 1
    assert tree.levels(choose=small).levels.num_levels == 1
    assert tree.levels(choose=lambda *_: True).levels.num_levels == 2
    # A group pays here, but not the launch's merge.
    tree = family(2, 1600, 128)
    assert small.saving_us(2, 1600, 2) > 0
    assert tree.levels(choose=small).levels.num_levels == 1
    assert tree.levels(choose=replace(small, fixed_us=0)).levels.num_levels == 2

    # Too large for L2: the next reader comes from HBM again, and even two share.
    per_byte = large.saving_us(2, 7000, 0) / (7000 * 4096), large.saving_us(2, 8000, 0) / (8000 * 4096)
    assert per_byte == pytest.approx((1 / 5.5e6, 1 / 3.05e6))
    # Products bind: 128 heads of latents save nothing by reading less.
    assert CascadeCost.mla(128).saving_us(64, 4096, 64) < 0 < CascadeCost.mla(16).saving_us(64, 4096, 64)


def test_own_keys_of_latents_cost_too():
    """A prefix that pays for few keys of the requests' own does not beside many."""
    cost = CascadeCost.mla(16)
    assert cost.launch_us(128, 128 * 512) == pytest.approx(12 + 128 * 512 * 0.03e-3)
    few, many = (family(128, 4096, own, page_size=64).levels(choose=cost) for own in (512, 32768))
    assert (few.levels.num_levels, many.levels.num_levels) == (2, 1)
    free = replace(cost, own_us=0)
    saved = family(128, 4096, 512, page_size=64).levels(choose=free).saving_us
    assert saved - few.saving_us == pytest.approx(128 * 512 * 0.03e-3)


def test_the_cost_of_a_group_grows_with_its_query_tokens():
    cost = CascadeCost()
    assert cost.saving_us(4, 100, 4) > 0 > cost.saving_us(4, 100, 32)
    tree = family(4, 96, 10)
    cheap = CascadeCost(fixed_us=0)
    assert tree.levels(choose=cheap).levels.num_levels == 2
    assert tree.levels(choose=cheap, num_qo_tokens=8).levels.num_levels == 1
    assert tree.levels(choose=cheap, num_qo_tokens=[0, 8, 0, 8]).levels.num_levels == 1


def test_choose_is_asked_for_readers():
    """Of 6 requests, 3 share more: the outer group's readers are that group and 3 requests."""
    tree = PrefixTree(2)
    for i in range(6):
        pages = [0, 1, *((2, 3, 4) if i < 3 else ()), 10 + i]
        tree.add(i, pages, 2 * len(pages))
    asked = set()

    def choose(num_readers, num_tokens, num_qo_tokens):
        asked.add((num_readers, num_tokens, num_qo_tokens))
        return 1

    tree.levels(choose=choose, num_qo_tokens=2)
    assert asked >= {(4, 4, 12), (3, 6, 6)}


def test_a_batch_of_a_trace():
    """Lengths of real requests, with prefixes as of tool traffic: many have one, some a longer, some a short one."""
    with (TRACES / "mooncake_conversation.csv").open() as file:
        lens = [int(row["input_tokens"]) for row in csv.DictReader(file)][:93]
    prefixes = [(40, 6144), (52, 2560), (93, 512)]  # up to which request, and of how many tokens
    allocator, tree, requests, at = iter(range(10**6)), PrefixTree(16), [], 0
    pages_of = [list(itertools.islice(allocator, n // 16)) for _, n in prefixes]
    for i, own in enumerate(lens):
        at += i == prefixes[at][0]
        pages = pages_of[at] + list(itertools.islice(allocator, -(-own // 16)))
        requests.append((pages, prefixes[at][1] + own))
    names = list(range(93))
    random.Random(0).shuffle(names)  # they do not come in that order
    for name in names:
        tree.add(name, *requests[name])
    result = tree.levels()
    groups = check_levels(result, tree, [requests[name] for name in names], [1] * 93)
    assert sorted((len(rows), end * 16) for rows, _, end in groups) == [(12, 2560), (40, 6144), (41, 512)]
    read = sum(sum(lens) for _, _, lens, _ in as_lists(result.levels))
    assert read == sum(lens) + 6144 + 2560 + 512
    # Halfway through, two thirds of them have gone.
    for name in names[::3] + names[1::3]:
        tree.remove(name)
    tree.check()
    rest = [requests[name] for name in tree.requests]
    check_levels(tree.levels(), tree, rest, [1] * len(rest))


# --- arrays --------------------------------------------------------------------------------------------------------


def test_arrays_of_either_module(xp):
    tree = PrefixTree(1)
    for i, pages in enumerate(([1, 2, 10], [7, 8], [1, 2, 11], [7, 9])):
        tree.add(i, pages, len(pages))
    expected = tree.levels(num_qo_tokens=[1, 2, 0, 3], choose=always)
    result = tree.levels(num_qo_tokens=[1, 2, 0, 3], choose=always, xp=xp)
    assert as_lists(result.levels) == as_lists(expected.levels)
    assert result.levels.q_indices.tolist() == expected.levels.q_indices.tolist()
    arrays = [a for t, i in result.levels.levels for a in (t.kv_indptr, t.kv_indices, t.kv_lens, i)]
    arrays.append(result.levels.q_indices)
    assert all(type(a) is xp.ndarray and a.dtype == np.int32 for a in arrays)
    bases = {id(a.base) for a in arrays if a.base is not None}
    assert len(bases) == 1  # views of one buffer
    pointers = [a.data.ptr if xp is not np else a.ctypes.data for a in arrays]
    assert len({p % 128 for p in pointers}) == 1
    result.levels.levels[-1][0].kv_lens[...] += 1
    after = as_lists(result.levels)
    assert after[:-1] == as_lists(expected.levels)[:-1]
    assert after[-1][2] == [n + 1 for n in as_lists(expected.levels)[-1][2]]


@pytest.mark.parametrize("qo_lens", [[1] * 7, [2, 1, 3, 1, 1, 0, 4]])
def test_attention_over_the_levels_is_that_of_the_tables(qo_lens):
    rng = np.random.default_rng(0)
    allocator, tree = PageAllocator(200, 4), PrefixTree(4)
    first = allocator.alloc(37)
    seqs = [first, *(allocator.fork(first) for _ in range(3)), allocator.alloc(9), allocator.alloc(50)]
    seqs.insert(2, allocator.fork(seqs[-1]))
    for n, seq in enumerate(seqs):
        allocator.extend(seq, 3 * n + 2)
    for seq in seqs:
        tree.add(seq, allocator.pages(seq), allocator.length(seq))
    result = tree.levels(num_qo_tokens=qo_lens, choose=always)
    assert result.levels.num_levels == 2
    assert len(as_lists(result.levels)[0][2]) == 2

    cache = PagedKVCache(*rng.standard_normal((2, 200, 4, 2, 8), "float32"))
    q = rng.standard_normal((sum(qo_lens), 4, 8), "float32")
    qo_indptr = np.array([0, *np.cumsum(qo_lens)], np.int32)
    expected = reference.decode(q, cache, allocator.page_table(seqs), qo_indptr=qo_indptr, sm_scale=0.3)
    out = reference.cascade_decode(q, cache, result.levels, sm_scale=0.3)
    for got, right in zip(out, expected, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-9, atol=1e-12)


# --- what is wrong is said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: PrefixTree(0), ValueError, "PrefixTree: page_size must be at least 1, got 0"),
        (lambda t: PrefixTree(2.0), TypeError, "PrefixTree: page_size must be an integer, got float"),
        (lambda t: PrefixTree(4, block_size=6), ValueError, "block_size must be a multiple of page_size = 4, got 6"),
        (lambda t: PrefixTree(4, block_size=0), ValueError, "block_size must be a multiple of page_size = 4, got 0"),
        (lambda t: t.add("a", [1], 1), ValueError, "add: request 'a' is there already"),
        (lambda t: t.add([], [1], 1), TypeError, "unhashable"),
        (lambda t: t.add("n", [1.0], 1), TypeError, "add: pages must be integers, got float64"),
        (lambda t: t.add("n", [[1]], 1), ValueError, r"add: pages must be a vector, got shape \[1, 1\]"),
        (lambda t: t.add("n", [1, -2], 1), ValueError, r"add: pages must be within 0\.\.2\*\*31 - 1, got -2"),
        (lambda t: t.add("n", [2**31], 1), ValueError, r"pages must be within 0\.\.2\*\*31 - 1, got 2147483648"),
        (lambda t: t.add("n", [1], 5), ValueError, r"kv_len must be within 0\.\.4, what 1 pages of 4 .* got 5"),
        (lambda t: t.add("n", [1], -1), ValueError, r"add: kv_len must be within 0\.\.4"),
        (lambda t: t.add("n", [1], 1.5), TypeError, "add: kv_len must be an integer, got float"),
        (lambda t: t.add("n", [1], 1, hashes=3), TypeError, "add: hashes must be an iterable of hashable objects"),
        (lambda t: t.add("n", [1], 1, hashes=[[]]), TypeError, "add: hashes must be an iterable of hashable objects"),
        (lambda t: t.extend("n", [1], 1), KeyError, "extend: there is no request 'n'"),
        (lambda t: t.extend("a", [], 13), ValueError, r"extend: kv_len must be within 0\.\.12, .* got 13"),
        (lambda t: t.extend("a", num_kept=1), ValueError, r"extend: kv_len must be within 0\.\.4, .* got 9"),
        (lambda t: t.extend("a", num_kept=4), ValueError, r"extend: num_kept must be within 0\.\.3, got 4"),
        (lambda t: t.extend("a", num_kept=-1), ValueError, r"extend: num_kept must be within 0\.\.3, got -1"),
        (lambda t: t.extend("a", hashes=["x"]), ValueError, "hashes must be empty, as request 'a' was added without"),
        (lambda t: t.extend("a", ["x"]), TypeError, "extend: pages must be integers"),
        (lambda t: t.remove("n"), KeyError, "remove: there is no request 'n'"),
        (lambda t: t.levels(["a", "n"]), KeyError, "levels: there is no request 'n'"),
        (lambda t: t.levels(["a", "b", "a"]), ValueError, "levels: rows must be different requests, got 'a' twice"),
        (lambda t: t.levels(num_qo_tokens=[1]), ValueError, r"num_qo_tokens must have shape \[2\], got \[1\]"),
        (lambda t: t.levels(num_qo_tokens=1.0), TypeError, "num_qo_tokens must be an integer or integers, got float64"),
        (lambda t: t.levels(num_qo_tokens=[1, -1]), ValueError, r"num_qo_tokens must be within 0\.\..*, got -1"),
        (lambda t: t.levels(max_levels=0), ValueError, r"levels: max_levels must be within 1\.\.8, got 0"),
        (lambda t: t.levels(max_levels=9), ValueError, r"levels: max_levels must be within 1\.\.8, got 9"),
        (lambda t: t.levels(min_shared_tokens=-1), ValueError, r"levels: min_shared_tokens must be within"),
        (lambda t: t.levels(reserve_pages=-1), ValueError, r"levels: reserve_pages must be within"),
        (lambda t: t.levels(reserve_pages=2**30), ValueError, r"must have fewer than 2\*\*31 entries, got 214748365"),
        (lambda t: t.levels(choose=3), TypeError, "levels: choose must be a CascadeCost or callable, got int"),
        (lambda t: t.levels(choose=lambda *_: float("nan")), ValueError, "choose must return a number, got nan"),
        (lambda t: CascadeCost.gqa(8, 0, 128), ValueError, "num_qo_heads must be .* multiple of num_kv_heads = 0"),
        (lambda t: CascadeCost.gqa(8, 3, 128), ValueError, "num_kv_heads = 3, got 8"),
        (lambda t: CascadeCost(l2_rate=0), ValueError, "CascadeCost: l2_rate must be more than 0, got 0"),
        (lambda t: CascadeCost(fixed_us=-1), ValueError, "CascadeCost: fixed_us must be at least 0, got -1"),
        (lambda t: CascadeCost(hbm_rate=float("inf")), ValueError, "CascadeCost: hbm_rate must be"),
        (lambda t: CascadeCost(matmul_rate="x"), TypeError, "CascadeCost: matmul_rate must be"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, message):
    tree = PrefixTree(4)
    tree.add("a", [1, 2, 3], 9)
    tree.add("b", [1, 2, 4], 9)
    before = shape(tree), as_lists(tree.levels(choose=always).levels)
    with pytest.raises(error, match=message):
        call(tree)
    tree.check()
    assert (shape(tree), as_lists(tree.levels(choose=always).levels)) == before


def test_what_it_looks_like():
    tree = PrefixTree(4, block_size=16)
    tree.add("a", [], 0)
    assert repr(tree) == "PrefixTree(1 requests, page_size=4, block_size=16)"
    assert "a" in tree
    assert "b" not in tree


def test_check_notices():
    tree = PrefixTree(4)
    tree.add("a", [1, 2, 3], 9)
    tree.add("b", [1, 5, 3], 9)
    tree._requests["a"].pages[0] = 7
    with pytest.raises(AssertionError, match="keys"):
        tree.check()
