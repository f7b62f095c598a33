"""The page allocator: a state machine that keeps every sequence's tokens, and the cases that matter."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from cupyattn.cache import OutOfPages, PageAllocator, PagedKVCache


class Books(RuleBasedStateMachine):
    """Tokens are written to a cache of integers as the allocator says, and read back through page tables."""

    seqs = Bundle("seqs")

    @initialize(num_pages=st.integers(0, 12), page_size=st.integers(1, 5))
    def start(self, num_pages, page_size):
        self.allocator = PageAllocator(num_pages, page_size)
        self.slots = np.full((num_pages, page_size), -1)
        self.tokens: dict[int, list[int]] = {}
        self.clock = 0

    def state(self):
        a = self.allocator
        return a.num_free, {s: (a.length(s), a.pages(s)) for s in self.tokens}

    def pages_for(self, count):
        return -(-count // self.allocator.page_size)

    def expect_out_of_pages(self, needed, call):
        before = self.state()
        with pytest.raises(OutOfPages) as caught:
            call()
        assert (caught.value.needed, caught.value.free) == (needed, self.allocator.num_free)
        assert self.state() == before

    def write(self, seq, count):
        """Write `count` fresh tokens at the end of `seq`, where the allocator made room for them."""
        new = list(range(self.clock, self.clock + count))
        self.clock += count
        pages = self.allocator.pages(seq)
        for token in new:
            page, slot = divmod(len(self.tokens[seq]), self.allocator.page_size)
            self.slots[pages[page], slot] = token
            self.tokens[seq].append(token)

    @rule(target=seqs, count=st.integers(0, 12))
    def alloc(self, count):
        needed = self.pages_for(count)
        if needed > self.allocator.num_free:
            self.expect_out_of_pages(needed, lambda: self.allocator.alloc(count))
            return -1
        seq = self.allocator.alloc(count)
        assert seq not in self.tokens
        self.tokens[seq] = []
        self.write(seq, count)
        return seq

    @rule(seq=seqs, count=st.integers(0, 8))
    def extend(self, seq, count):
        if seq not in self.tokens:
            with pytest.raises(KeyError):
                self.allocator.extend(seq, count)
            return
        pages, length = self.allocator.pages(seq), len(self.tokens[seq])
        partial = count > 0 and length % self.allocator.page_size > 0
        shared = partial and any(pages[-1] in self.allocator.pages(s) for s in self.tokens if s != seq)
        needed = self.pages_for(length + count) - len(pages) + shared
        if needed > self.allocator.num_free:
            self.expect_out_of_pages(needed, lambda: self.allocator.extend(seq, count))
            return
        copies = self.allocator.extend(seq, count)
        assert [src for src, _ in copies] == ([pages[-1]] if shared else [])
        for src, dst in copies:
            self.slots[dst] = self.slots[src]
        self.write(seq, count)

    @rule(target=seqs, seq=seqs)
    def fork(self, seq):
        if seq not in self.tokens:
            with pytest.raises(KeyError):
                self.allocator.fork(seq)
            return seq
        free = self.allocator.num_free
        child = self.allocator.fork(seq)
        assert child not in self.tokens
        assert self.allocator.num_free == free
        self.tokens[child] = self.tokens[seq].copy()
        return child

    @rule(seq=seqs, data=st.data())
    def truncate(self, seq, data):
        if seq in self.tokens:
            length = data.draw(st.integers(0, len(self.tokens[seq])))
            self.allocator.truncate(seq, length)
            del self.tokens[seq][length:]

    @rule(seq=consumes(seqs))
    def free(self, seq):
        if seq in self.tokens:
            self.allocator.free(seq)
            del self.tokens[seq]
        with pytest.raises(KeyError, match="freed already"):  # freeing twice is an error
            self.allocator.free(seq)

    @invariant()
    def every_token_is_where_it_was_written(self):
        if hasattr(self, "allocator"):
            table = self.allocator.page_table(list(self.tokens))
            assert table.kv_lens.tolist() == [len(tokens) for tokens in self.tokens.values()]
            for b, tokens in enumerate(self.tokens.values()):
                pages = table.kv_indices[table.kv_indptr[b] : table.kv_indptr[b + 1]]
                assert self.slots[pages].reshape(-1)[: len(tokens)].tolist() == tokens

    @invariant()
    def the_books_balance(self):
        if hasattr(self, "allocator"):
            self.allocator.check()
            held = {page for seq in self.tokens for page in self.allocator.pages(seq)}
            assert self.allocator.num_free == self.allocator.num_pages - len(held)
            assert len(self.allocator) == len(self.tokens)


Books.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBooks = Books.TestCase


def test_pages_have_one_owner():
    allocator = PageAllocator(10, 4)
    a, b = allocator.alloc(9), allocator.alloc(5)
    assert set(allocator.pages(a)).isdisjoint(allocator.pages(b))
    assert allocator.num_free == 5
    assert len(allocator) == 2
    assert a in allocator
    allocator.free(a)
    assert a not in allocator
    assert allocator.num_free == 8


def test_extend_takes_pages_when_they_are_needed():
    allocator = PageAllocator(10, 4)
    seq = allocator.alloc()
    assert allocator.pages(seq) == []
    held = []
    for _ in range(9):
        assert allocator.extend(seq) == []
        held.append(len(allocator.pages(seq)))
    assert held == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert allocator.length(seq) == 9


def test_copy_on_write_of_the_last_page():
    allocator = PageAllocator(10, 4)
    parent = allocator.alloc(6)
    child = allocator.fork(parent)
    first, last = allocator.pages(parent)
    ((src, dst),) = allocator.extend(child, 3)
    assert src == last
    assert allocator.pages(parent) == [first, last]
    assert allocator.pages(child)[:2] == [first, dst]
    assert len(allocator.pages(child)) == 3
    assert allocator.extend(parent) == []  # the parent is alone on its last page now


def test_a_full_last_page_is_not_copied():
    allocator = PageAllocator(10, 4)
    parent = allocator.alloc(8)
    child = allocator.fork(parent)
    assert allocator.extend(child) == []
    assert allocator.pages(child)[:2] == allocator.pages(parent)


def test_extending_by_nothing_copies_nothing():
    allocator = PageAllocator(2, 4)
    child = allocator.fork(allocator.alloc(6))
    assert allocator.extend(child, 0) == []
    assert allocator.num_free == 0


def test_out_of_pages_by_the_copy_alone():
    allocator = PageAllocator(2, 4)
    parent = allocator.alloc(6)
    child = allocator.fork(parent)
    with pytest.raises(OutOfPages, match="1 pages needed, 0 free") as caught:
        allocator.extend(child)
    assert (caught.value.needed, caught.value.free) == (1, 0)
    assert allocator.pages(child) == allocator.pages(parent)
    assert allocator.length(child) == 6
    allocator.free(parent)
    assert allocator.extend(child) == []


def test_out_of_pages_survives_pickling():
    error = pickle.loads(pickle.dumps(OutOfPages(3, 1)))
    assert (error.needed, error.free, str(error)) == (3, 1, "3 pages needed, 1 free")
    assert isinstance(error, RuntimeError)


def test_copies_keep_the_parents_tokens(xp):
    cache = PagedKVCache.allocate(4, 2, 1, 8, dtype="bfloat16", xp=xp)
    allocator = PageAllocator(4, 2)
    parent = allocator.alloc(3)
    cache.k_pages[...] = xp.arange(4, dtype="float32").reshape(4, 1, 1, 1)
    child = allocator.fork(parent)
    copies = allocator.extend(child)
    cache.copy_pages(*zip(*copies, strict=True))
    for seq in (parent, child):
        values = cache.k_pages[allocator.pages(seq)].astype("float32")
        assert values[:, 0, 0, 0].tolist() == allocator.pages(parent)


def test_page_table(xp):
    allocator = PageAllocator(10, 4)
    a, b, c = allocator.alloc(5), allocator.alloc(0), allocator.alloc(4)
    table = allocator.page_table([c, a, b, a], xp=xp)
    assert type(table.kv_indices) is xp.ndarray
    assert table.kv_indptr.tolist() == [0, 1, 3, 3, 5]
    assert table.kv_indices.tolist() == [*allocator.pages(c), *allocator.pages(a) * 2]
    assert table.kv_lens.tolist() == [4, 5, 0, 5]
    # The table is a copy: it does not hold the allocator's memory.
    allocator.extend(c)
    assert table.kv_lens.tolist() == [4, 5, 0, 5]
    assert allocator.page_table([]).batch_size == 0
    allocator.free(b)
    with pytest.raises(KeyError, match=f"no sequence has handle {b}"):
        allocator.page_table([a, b])


def test_freed_pages_come_back_in_order():
    allocator = PageAllocator(6, 1)
    seq = allocator.alloc(4)
    pages = allocator.pages(seq)
    allocator.free(seq)
    assert allocator.pages(allocator.alloc(4)) == pages


def test_a_huge_pool_costs_nothing():
    allocator = PageAllocator(2**31 - 1, 1)
    seq = allocator.alloc(1000)
    assert allocator.num_free == 2**31 - 1001
    assert repr(allocator) == "PageAllocator(2147482647 of 2147483647 pages free, page_size=1, 1 sequences)"
    allocator.free(seq)
    allocator.check()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, _: a.alloc(-1), "alloc: num_tokens must be at least 0, got -1"),
        (lambda a, s: a.extend(s, -1), "extend: num_tokens must be at least 0, got -1"),
        (lambda a, s: a.truncate(s, 6), r"truncate: length must be within 0\.\.5, got 6"),
        (lambda a, s: a.truncate(s, -1), "truncate: length"),
        (lambda *_: PageAllocator(-1, 4), "num_pages must be within"),
        (lambda *_: PageAllocator(2**31, 4), "num_pages must be within"),
        (lambda *_: PageAllocator(4, 0), "page_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments(call, message):
    allocator = PageAllocator(4, 4)
    seq = allocator.alloc(5)
    with pytest.raises(ValueError, match=message):
        call(allocator, seq)
    assert allocator.length(seq) == 5
    allocator.check()


@pytest.mark.parametrize("name", ["extend", "fork", "free", "length", "pages"])
def test_unknown_handles(name):
    allocator = PageAllocator(4, 4)
    allocator.alloc(5)
    with pytest.raises(KeyError, match="no sequence has handle 7"):
        getattr(allocator, name)(7)
    allocator.check()


def test_check_notices():
    allocator = PageAllocator(4, 4)
    seq = allocator.alloc(5)
    allocator._refcount[allocator.pages(seq)[0]] += 1
    with pytest.raises(AssertionError, match="refcounts"):
        allocator.check()
