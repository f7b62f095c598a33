"""A running batch whose requests begin alike: each step reads what they share once.

    python -m cupyattn.examples.shared_prefix --steps 24

Every request begins with the same system prompt, most go on with one of a few headers of examples, and then with a
prompt of their own. Requests come and go; `cupyattn.PrefixTree` follows them, and makes the levels for
`cupyattn.cascade_decode`, whose result is compared with plain `cupyattn.decode` in each step. There is no model: keys,
values and queries are random. `Engine.step` is the part to read. The levels that it passes always have the same shapes
and addresses, as a captured CUDA graph needs them; `allocate_levels` and `refill` make that of any others.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import cupyattn
from cupyattn import CascadeLevels, PageTable
from cupyattn.runtime import num_devices

PAGE_SIZE = 16
NUM_PAGES = 512
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
DTYPE = "float16"
SYSTEM = 5 * PAGE_SIZE  # tokens; only full pages are shared
HEADERS = (0, 6 * PAGE_SIZE, 10 * PAGE_SIZE)  # none for some
MOST_OWN, MOST_OUTPUT = 40, 30  # of a request: its prompt's own tokens, tokens written
MOST_REQUESTS, MOST_GROUPS = 10, 4  # at a time; in a level
MOST_LEVELS = 3  # the system prompt, a header, a request's own
# An engine takes the cost as it is. Without what a cascade costs as such, steps as small as these are worth one.
COST = dataclasses.replace(cupyattn.CascadeCost.gqa(NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM), fixed_us=0.0)
TOLERANCE = 2e-3  # of float16 results: some of their last bits


def allocate_levels(xp: Any, num_levels: int, max_groups: int, batch: int, max_pages: int) -> CascadeLevels:
    """Make levels with room for any others: of so many levels, groups in each, requests, and pages in each.

    Tiles of query rows are chosen by how many tokens each group would have on average: room for many more groups than
    there will be is not free.
    """

    def table(num_groups: int) -> PageTable:
        sizes = num_groups + 1, max_pages, num_groups
        return PageTable(*(xp.zeros(size, np.int32) for size in sizes))

    shared = [(table(max_groups), xp.zeros(max_groups + 1, np.int32)) for _ in range(num_levels - 1)]
    return CascadeLevels([*shared, (table(batch), None)], q_indices=xp.arange(batch, dtype=np.int32))


def refill(room: CascadeLevels, levels: CascadeLevels) -> None:
    """Write `levels`, of one query token a request, into `room`, on the current stream.

    Groups that are too many get no tokens, levels and requests no keys; the results of such requests are zeros.
    """
    xp = cupyattn.get_array_module(room.q_indices)
    *shared, (own, _) = levels.levels
    *shared_room, (own_room, _) = room.levels
    for pages, _ in shared_room:
        pages.kv_lens[...] = 0
    for (into, into_qo), (pages, qo_indptr) in zip(shared_room, shared, strict=False):
        _put(into, pages)
        into_qo[: len(qo_indptr)] = qo_indptr
        into_qo[len(qo_indptr) :] = qo_indptr[-1:]
    own_room.kv_lens[...] = 0
    _put(own_room, own)
    room.q_indices[...] = xp.arange(len(room.q_indices), dtype=np.int32)
    if levels.q_indices is not None:
        room.q_indices[: len(levels.q_indices)] = levels.q_indices


def _put(into: PageTable, pages: PageTable) -> None:
    size = pages.batch_size
    into.kv_indices[: len(pages.kv_indices)] = pages.kv_indices
    into.kv_indptr[: size + 1] = pages.kv_indptr
    into.kv_indptr[size + 1 :] = pages.kv_indptr[-1:]
    into.kv_lens[:size] = pages.kv_lens


@dataclass(frozen=True)
class Step:
    """What one step did."""

    num_requests: int
    groups: list[int]  # of each level that the tree made, but the last, whose groups are the requests
    is_new: bool  # whether it had to make them
    num_read: int  # tokens of all levels' groups
    num_tokens: int  # of all requests
    difference: float  # the largest, of `cascade_decode` and `decode`


class Engine:
    """Holds the cache and the running requests: what an engine has, as small as it goes.

    Parameters
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    seed : int
    """

    def __init__(self, xp: Any, seed: int = 0) -> None:
        self.xp = xp
        self.rng = np.random.default_rng(seed)
        self.cache = cupyattn.PagedKVCache.allocate(
            NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE, xp=xp
        )
        self.allocator = cupyattn.PageAllocator(NUM_PAGES, PAGE_SIZE)
        self.tree = cupyattn.PrefixTree(PAGE_SIZE)
        self.left: dict[int, int] = {}  # of each running request, the tokens that it has yet to write
        self.levels = allocate_levels(xp, MOST_LEVELS, MOST_GROUPS, MOST_REQUESTS, NUM_PAGES)
        self.groups: list[int] = []
        system = self._extended(self.allocator.alloc(), SYSTEM)
        # Each header's pages come after the system prompt's, which all of them hold.
        self.prefixes = [self._extended(self.allocator.fork(system), tokens) for tokens in HEADERS]

    def step(self) -> Step:
        """Let requests come and go, and write one token for each that runs."""
        is_new = self._go() | self._come()
        requests = list(self.left)
        for request in requests:
            num_pages = len(self.allocator.pages(request))
            self.allocator.extend(request, 1)
            pages = self.allocator.pages(request)
            self.tree.extend(request, pages[num_pages:], self.allocator.length(request))
            is_new |= len(pages) > num_pages
            self.left[request] -= 1
        if is_new:
            made = self.tree.levels(requests, max_levels=MOST_LEVELS, choose=COST, xp=self.xp).levels
            self.groups = [pages.batch_size for pages, _ in made.levels[:-1]]
            refill(self.levels, made)
        else:
            own, _ = self.levels.levels[-1]
            own.kv_lens[: len(requests)] += 1  # in place

        # From here on, what a model does in each layer.
        pages_of_all = self.allocator.page_table(requests, xp=self.xp)
        k, v = (self._random(len(requests), NUM_KV_HEADS) for _ in "kv")
        cupyattn.append(k, v, self.cache, pages_of_all)
        q = self._random(MOST_REQUESTS, NUM_QO_HEADS)  # the last rows may be nobody's
        out = cupyattn.cascade_decode(q, self.cache, self.levels)[: len(requests)]
        expected = cupyattn.decode(q[: len(requests)], self.cache, pages_of_all)
        difference = abs(out.astype(np.float32) - expected.astype(np.float32)).max()
        return Step(
            num_requests=len(requests),
            groups=self.groups,
            is_new=is_new,
            num_read=sum(int(pages.kv_lens.sum()) for pages, _ in self.levels.levels),
            num_tokens=int(pages_of_all.kv_lens.sum()),
            difference=float(difference),
        )

    def _go(self) -> bool:
        """Free the requests that are done; say whether there were any."""
        done = [request for request, left in self.left.items() if not left]
        for request in done:
            self.tree.remove(request)
            self.allocator.free(request)
            del self.left[request]
        return bool(done)

    def _come(self) -> bool:
        """Start some requests now and then, and if none runs; say whether there were any."""
        count = 0
        if not self.left or self.rng.random() < 0.3:
            count = min(int(self.rng.integers(1, 6)), MOST_REQUESTS - len(self.left))
        for _ in range(count):
            prefix = self.prefixes[int(self.rng.integers(len(self.prefixes)))]
            request = self._extended(self.allocator.fork(prefix), int(self.rng.integers(1, MOST_OWN)))
            self.tree.add(request, self.allocator.pages(request), self.allocator.length(request))
            self.left[request] = int(self.rng.integers(1, MOST_OUTPUT))
        return count > 0

    def _extended(self, request: int, num_tokens: int) -> int:
        """Write so many tokens behind those that a request has."""
        # No page is copied: what requests are forked from ends where a page does.
        self.allocator.extend(request, num_tokens)
        pages = self.allocator.page_table([request], xp=self.xp)
        k, v = (self._random(num_tokens, NUM_KV_HEADS) for _ in "kv")
        qo_indptr = self.xp.asarray([0, num_tokens], dtype=np.int32)
        cupyattn.append(k, v, self.cache, pages, qo_indptr=qo_indptr)
        return request

    def _random(self, *shape: int) -> Any:
        return self.xp.asarray(self.rng.standard_normal((*shape, HEAD_DIM)).astype(DTYPE))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all results agree."""
    parser = argparse.ArgumentParser(
        prog="python -m cupyattn.examples.shared_prefix", description="Shared prefixes are read once."
    )
    add = parser.add_argument
    add("--steps", type=int, default=24, metavar="N", help="(default: 24)")
    add("--backend", choices=("numpy", "cupy"), help="default: cupy if there is a GPU")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    backend = args.backend or ("cupy" if num_devices() else "numpy")
    engine = Engine(importlib.import_module(backend))
    print(f"on {backend}: {NUM_QO_HEADS}/{NUM_KV_HEADS} heads, {DTYPE}, pages of {PAGE_SIZE}")
    print("step  requests  groups, by level  levels  tokens read / all  difference")
    right = True
    for number in range(args.steps):
        step = engine.step()
        groups = " ".join(map(str, step.groups)) or "-"
        levels = "new" if step.is_new else "kept"
        read = f"{step.num_read} / {step.num_tokens}"
        right &= step.difference <= TOLERANCE
        mark = "ok" if step.difference <= TOLERANCE else "WRONG"
        print(
            f"{number:4}  {step.num_requests:8}  {groups:>16}  {levels:>6}  {read:>17}  "
            f"{step.difference:.1e} {mark}"
        )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
