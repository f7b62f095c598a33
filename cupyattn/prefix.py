"""Which requests begin with the same keys: a tree of their pages, and from it the levels of a cascade."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from cupyattn import checks
from cupyattn.cache import PageTable
from cupyattn.levels import MAX_LEVELS, CascadeLevels

_ALIGNMENT = 32  # of an array in the packed buffer, in int32: 128 bytes


@dataclass(frozen=True)
class CascadeCost:
    """What a group of shared keys saves and costs, in microseconds of an idle H100, roughly.

    Without a group, each of its readers reads the keys for itself: once from HBM, then from L2 while they fit there.
    With it they are read once, and each query token has one more partial state to write and merge. Either way the
    products take their time too, which binds where there are many query rows a key (multi-head latent attention)::

        saving = max(read(readers), matmul) - max(read(1), matmul) - num_qo_tokens * partial_bytes / partial_rate
        read(readers) = bytes / hbm_rate + (readers - 1) * bytes / (l2_rate if bytes <= l2_bytes else hbm_rate)
        matmul = num_qo_tokens * num_tokens * flops_per_token / matmul_rate

    A group is used if it saves more than 0, and a cascade if its groups together save more than `own_us` for each token
    in no group and `fixed_us`, or a part of that where no group has many query rows: two fifths with up to 16 for a KV
    head, three quarters with up to 32. (What has 64 rows at once also has more instructions to fetch, and leaves more
    to merge.)

    Parameters
    ----------
    bytes_per_token : float
        Of a token's keys and values, all KV heads of a layer.
    flops_per_token : float
        Of a query token, all its heads, and one key: both products.
    partial_bytes : float
        Moved for one more partial state of a query token, all its heads: 16 bits a column and 64 for every 32, written
        and read.
    partial_rate : float
        Bytes per microsecond of these.
    own_us : float
        By which a token that a request has for itself takes longer in a cascade: its tiles are made for many rows
        (latents), or plain decode reads its keys 1.5% faster, of four or eight KV heads side by side, and 3% of fewer
        (`gqa`; for other sizes than the default ones it is to be given).
    hbm_rate, l2_rate : float
        Bytes per microsecond of keys that are read for the first time, and of those read again while in L2.
    l2_bytes : float
        Shared keys of a group up to which they are still in L2 for the next reader.
    matmul_rate : float
        Floating-point operations per microsecond with many query rows.
    fixed_us : float
        What a cascade adds to a launch whose groups have many rows.
    rows_per_token : int
        Query rows of a KV head for each query token: its query heads.

    Raises
    ------
    ValueError
        A number is negative or not finite, or a rate is 0.

    Notes
    -----
    The defaults are 64 query heads, 8 KV heads, head_dim 128 and 2 bytes an element: 4096 bytes a token, and 36864 of
    a partial state, as many as 9 tokens. Of r requests one by one with n tokens, sharing saves ``(r - 1) * n`` tokens
    from L2 and costs ``9 * r`` from HBM: it pays from 16 r / (r - 1) tokens on, 33 for two requests and 17 for many.

    Examples
    --------
    Of 8 requests with 4000 tokens in common and 8 query heads per KV head. 8 KV heads: 7 * 16.4 MB at 5.5e6 bytes/us
    take 20.85 us, 8 partial states 0.10 us. One KV head: an eighth of both, less than what a cascade of 64 rows costs.

    >>> cost, small = CascadeCost.gqa(64, 8, 128), CascadeCost.gqa(8, 1, 128)
    >>> round(cost.saving_us(8, 4000, 8), 2), round(small.saving_us(8, 4000, 8), 2), small.launch_us(8)
    (20.76, 2.59, 5.0)

    2 requests with 16 tokens in common: 65.5 KB from L2 take 0.012 us, 2 partial states 0.024 us.

    >>> round(cost.saving_us(2, 16, 2), 3)
    -0.012

    Latents with 128 heads: the products take 1.19 us per query and 1000 keys, reading these from L2 takes 0.32 us.

    >>> CascadeCost.mla(128).saving_us(8, 4000, 8) < 0 < CascadeCost.mla(16).saving_us(8, 4000, 8)
    True

    The numbers are from runs of decode and cascade side by side (bench/NOTES.md).
    """

    bytes_per_token: float = 4096.0
    flops_per_token: float = 32768.0
    partial_bytes: float = 36864.0
    partial_rate: float = 3.05e6
    hbm_rate: float = 3.05e6
    l2_rate: float = 5.5e6
    l2_bytes: float = 30e6
    matmul_rate: float = 300e6
    fixed_us: float = 5.0
    own_us: float = 0.02e-3
    rows_per_token: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = checks.as_finite(f"CascadeCost: {field.name}", getattr(self, field.name))
            if value < 0 or (value == 0 and field.name.endswith("_rate")):
                at_least = "more than 0" if field.name.endswith("_rate") else "at least 0"
                raise ValueError(f"CascadeCost: {field.name} must be {at_least}, got {value}")

    @classmethod
    def gqa(cls, num_qo_heads: int, num_kv_heads: int, head_dim: int, itemsize: int = 2) -> CascadeCost:
        """Make the cost of `cascade_decode`, with `itemsize` bytes an element of the cache.

        Raises
        ------
        ValueError
            `num_qo_heads` is not a positive multiple of `num_kv_heads`.
        """
        if num_kv_heads < 1 or num_qo_heads < 1 or num_qo_heads % num_kv_heads:
            raise ValueError(
                f"CascadeCost.gqa: num_qo_heads must be a positive multiple of num_kv_heads = {num_kv_heads}, "
                f"got {num_qo_heads}"
            )
        bytes_per_token = 2 * num_kv_heads * head_dim * itemsize
        return cls(
            bytes_per_token=bytes_per_token,
            own_us=cls.own_us * (1 if num_kv_heads % 4 == 0 else 2) * bytes_per_token / cls.bytes_per_token,
            flops_per_token=4 * num_qo_heads * head_dim,
            partial_bytes=cls._partial_bytes(num_qo_heads, head_dim),
            rows_per_token=num_qo_heads // num_kv_heads,
        )

    @classmethod
    def mla(cls, num_qo_heads: int, ckv_dim: int = 512, kpe_dim: int = 64, itemsize: int = 2) -> CascadeCost:
        """Make the cost of multi-head latent attention: a token's latent is its key and its value."""
        return cls(
            bytes_per_token=(ckv_dim + kpe_dim) * itemsize,
            flops_per_token=2 * num_qo_heads * (2 * ckv_dim + kpe_dim),
            partial_bytes=cls._partial_bytes(num_qo_heads, ckv_dim),
            partial_rate=0.3e6,
            l2_rate=3.6e6,
            matmul_rate=235e6,
            fixed_us=12.0,
            own_us=0.03e-3,
            rows_per_token=num_qo_heads,
        )

    @staticmethod
    def _partial_bytes(num_heads: int, num_dims: int) -> float:
        return 2 * num_heads * num_dims * (2 + 8 / 32)

    def read_us(self, num_readers: int, num_tokens: int) -> float:
        """Return how long the keys take to be read by so many readers, one by one."""
        num_bytes = num_tokens * self.bytes_per_token
        again = self.l2_rate if num_bytes <= self.l2_bytes else self.hbm_rate
        return num_bytes / self.hbm_rate + (num_readers - 1) * num_bytes / again

    def saving_us(self, num_readers: int, num_tokens: int, num_qo_tokens: int) -> float:
        """Return what a group saves: less than 0 if it costs more.

        Parameters
        ----------
        num_readers : int
            Who would read the keys without it: requests, or groups that share more.
        num_tokens : int
            Keys of the group.
        num_qo_tokens : int
            Query tokens of all its requests.
        """
        matmul_us = num_qo_tokens * num_tokens * self.flops_per_token / self.matmul_rate
        one_by_one = max(self.read_us(num_readers, num_tokens), matmul_us)
        once = max(self.read_us(1, num_tokens), matmul_us)
        return one_by_one - once - num_qo_tokens * self.partial_bytes / self.partial_rate

    def launch_us(self, num_qo_tokens: int, num_own_tokens: int = 0) -> float:
        """Return what a cascade adds to a launch.

        Parameters
        ----------
        num_qo_tokens : int
            Query tokens of its largest group.
        num_own_tokens : int
            Keys in no group, of all requests.
        """
        rows = num_qo_tokens * self.rows_per_token
        part = 0.4 if rows <= 16 else 0.75 if rows <= 32 else 1.0
        return self.fixed_us * part + num_own_tokens * self.own_us


class PrefixLevels(NamedTuple):
    """What `PrefixTree.levels` makes of a batch.

    Attributes
    ----------
    levels : CascadeLevels
        For `cascade_decode`. With one level it is plain `decode` of ``levels.levels[0][0]``.
    order : array, shape [batch], int32, on the host
        ``order[i]`` is the row of the batch whose request is the ``i``-th of the last level.
    saving_us : float
        By which the cascade should be faster than plain decode, as `choose` says; 0 if it is plain.
    """

    levels: CascadeLevels
    order: np.ndarray
    saving_us: float


#: What `PrefixTree.levels` asks of each group: ``(num_readers, num_tokens, num_qo_tokens) -> saving``.
Choose = Callable[[int, int, int], float]


class _Request:
    """What a tree knows of a request. Its arrays have room to grow."""

    __slots__ = ("hashes", "kv_len", "node", "num_hashes", "num_keys", "num_pages", "pages", "unit")

    node: _Node

    def __init__(self, unit: int, hashed: bool) -> None:
        self.pages = np.empty(0, np.int32)
        self.num_pages = 0
        self.hashes = np.empty(0, object) if hashed else None
        self.num_hashes = 0
        self.kv_len = 0
        self.num_keys = 0  # what the tree has of it
        self.unit = unit  # pages of a key

    @property
    def keys(self) -> np.ndarray:
        """What it is compared by."""
        return self.pages if self.hashes is None else self.hashes


class _Node:
    """A run of keys, from `start` to `end`, that the requests in and below it have in common.

    The keys themselves are those of one of these requests, the owner.
    """

    __slots__ = ("children", "end", "ending", "owner", "parent", "start")

    owner: _Request  # a root has none

    def __init__(self, start: int, end: int, parent: _Node | None, owner: Any) -> None:
        self.start = start
        self.end = end
        self.parent = parent  # None: a root
        self.owner = owner
        self.children: dict[Hashable, _Node] = {}  # by first key
        self.ending: dict[_Request, None] = {}  # requests whose last key is that of this node


class _Group:
    """Requests of a batch that share their pages up to `end`; those up to its parent's end are the parent's."""

    __slots__ = (
        "children", "end", "height", "num_qo_tokens", "num_requests", "owner", "parent", "rows", "value",
    )  # fmt: skip

    owner: _Request

    def __init__(self, end: int, owner: Any) -> None:
        self.end = end
        self.owner = owner
        self.parent: _Group | None = (
            None  # of those without, there is one, which is no group but what is left
        )
        self.children: dict[_Group, None] = {}
        self.rows: list[int] = []  # requests that are in no child
        self.num_requests = 0
        self.num_qo_tokens = 0
        self.value = 0.0
        self.height = 0

    def adopt(self, child: _Group) -> None:
        self.children[child] = None
        child.parent = self

    def dissolve(self) -> _Group:
        """Leave the keys to the children and requests, which become the parent's."""
        parent = self.parent
        assert parent is not None
        del parent.children[self]
        for child in self.children:
            parent.adopt(child)
        parent.rows += self.rows
        self.parent = None
        return parent

    def below(self) -> list[_Group]:
        """All groups below, parents first."""
        found = list(self.children)
        for group in found:  # while it grows
            found += group.children
        return found


class PrefixTree:
    """Which of the running requests begin with the same pages: a radix tree, on the host.

    It follows requests as they come, grow and go, and makes the levels of `cascade_decode` for a batch of them. Two
    requests share the pages that lead both their lists, as far as the same ids come in the same order and the pages
    are full in both; the last, partly filled one is never shared. The work of a call is that of the request's own
    pages, however many other requests there are. Not for several threads at once.

    Instead of by ids, requests may be compared by hashes of their tokens (of a block *and all before it*, as caches of
    prefixes have them): then equal hashes stand for equal keys, whatever the pages, and all requests of a group read
    the pages of one request that has them and has not been removed. (Where equal blocks are in equal pages anyway, that
    is no matter.) Requests with hashes share with requests with hashes only, others with others.

    Parameters
    ----------
    page_size : int
        Of the caches.
    block_size : int, optional
        Tokens a hash stands for: a multiple of `page_size`, which is the default.

    Raises
    ------
    TypeError, ValueError
        A size is not an integer of at least 1, or `block_size` no multiple.

    Examples
    --------
    Two requests share pages 7 and 8; a third shares nothing. With every group used that there is:

    >>> tree = PrefixTree(page_size=4)
    >>> tree.add("a", [7, 8, 2], kv_len=11)
    >>> tree.add("b", [5], kv_len=3)
    >>> tree.add("c", [7, 8, 4], kv_len=9)
    >>> levels, order, _ = tree.levels(choose=lambda num_readers, num_tokens, num_qo_tokens: 1.0)
    >>> (shared, qo_indptr), (own, _) = levels.levels
    >>> shared.kv_indices.tolist(), shared.kv_lens.tolist(), qo_indptr.tolist()
    ([7, 8], [8], [0, 2])
    >>> own.kv_indices.tolist(), own.kv_lens.tolist(), order.tolist(), levels.q_indices.tolist()
    ([2, 4, 5], [3, 1, 3], [0, 2, 1], [0, 2, 1])

    8 tokens are not worth it: as `CascadeCost` sees it, this is plain decode.

    >>> tree.levels().levels
    CascadeLevels(groups=[3], numpy int32)
    """

    def __init__(self, page_size: int, *, block_size: int | None = None) -> None:
        self.page_size = checks.as_index("PrefixTree: page_size", page_size)
        if self.page_size < 1:
            raise ValueError(f"PrefixTree: page_size must be at least 1, got {page_size}")
        self.block_size = self.page_size
        if block_size is not None:
            self.block_size = checks.as_index("PrefixTree: block_size", block_size)
            if self.block_size < 1 or self.block_size % self.page_size:
                raise ValueError(
                    f"PrefixTree: block_size must be a multiple of page_size = {page_size}, got {block_size}"
                )
        self._requests: dict[Hashable, _Request] = {}
        self._by_page = _Node(0, 0, None, None)
        self._by_hash = _Node(0, 0, None, None)

    @property
    def requests(self) -> list[Hashable]:
        """The requests in order of addition: the rows of `levels` by default."""
        return list(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: object) -> bool:
        return request in self._requests

    def __repr__(self) -> str:
        block = f", block_size={self.block_size}" if self.block_size != self.page_size else ""
        return f"PrefixTree({len(self)} requests, page_size={self.page_size}{block})"

    def _get(self, caller: str, request: Hashable) -> _Request:
        try:
            return self._requests[request]
        except KeyError:
            raise KeyError(f"{caller}: there is no request {request!r} (removed already?)") from None

    def add(
        self, request: Hashable, pages: Any, kv_len: int, *, hashes: Iterable[Hashable] | None = None
    ) -> None:
        """Begin to follow a request.

        Parameters
        ----------
        request : hashable
            Its name.
        pages : sequence or NumPy array of int
            Its page ids, in order; there may be more than its tokens need.
        kv_len : int
            Tokens in the cache.
        hashes : iterable of hashable, optional
            Of its leading blocks, one each. Those of blocks that are not full yet count once they are; a block without
            one is not shared, nor is any after it. Without `hashes` the page ids are compared.

        Raises
        ------
        TypeError
            `pages` are not integers, `kv_len` is none, or something is not hashable.
        ValueError
            The request is there already, a page id is not in ``0 .. 2**31 - 1``, or `kv_len` is negative or more than
            the pages hold. Nothing has changed.
        """
        if request in self._requests:
            raise ValueError(f"add: request {request!r} is there already")
        new_pages, new_hashes = _as_pages("add", pages), _as_hashes("add", hashes)
        kv_len = self._as_length("add", kv_len, len(new_pages))
        hashed = hashes is not None
        entry = _Request(self.block_size // self.page_size if hashed else 1, hashed)
        self._write(entry, 0, new_pages, 0, new_hashes, kv_len)
        self._attach(entry, self._by_hash if hashed else self._by_page)
        self._requests[request] = entry

    def extend(
        self,
        request: Hashable,
        pages: Any = (),
        kv_len: int | None = None,
        *,
        hashes: Iterable[Hashable] = (),
        num_kept: int | None = None,
    ) -> None:
        """Say what a request has become. `levels` goes by it from then on; levels that exist do not change.

        Parameters
        ----------
        request : hashable
        pages : sequence or NumPy array of int
            Page ids behind those it has.
        kv_len : int, optional
            Its tokens now; fewer than before too (drafts that were rejected).
        hashes : iterable of hashable
            Of blocks behind those whose hashes it has.
        num_kept : int, optional
            Leading pages that stay; `pages` replace the others, and `hashes` those of the blocks that these are in. All
            by default. ``num_kept=len(pages) - 1, pages=[page]`` follows a copy-on-write of the last page.

        Raises
        ------
        KeyError
            There is no such request.
        TypeError, ValueError
            As `add`; or `num_kept` is not within its pages, or it was added without hashes. Nothing has changed.
        """
        entry = self._get("extend", request)
        new_pages, new_hashes = _as_pages("extend", pages), _as_hashes("extend", hashes)
        if len(new_hashes) and entry.hashes is None:
            raise ValueError(
                f"extend: hashes must be empty, as request {request!r} was added without, got {len(new_hashes)}"
            )
        if num_kept is None:
            num_kept = entry.num_pages
        num_kept = checks.as_index("extend: num_kept", num_kept)
        if not 0 <= num_kept <= entry.num_pages:
            raise ValueError(f"extend: num_kept must be within 0..{entry.num_pages}, got {num_kept}")
        kv_len = self._as_length(
            "extend", entry.kv_len if kv_len is None else kv_len, num_kept + len(new_pages)
        )
        hashes_kept = entry.num_hashes
        if num_kept < entry.num_pages:
            hashes_kept = min(hashes_kept, num_kept // entry.unit)
        num_keys = kv_len // (self.page_size * entry.unit)
        if entry.hashes is not None:
            num_keys = min(num_keys, hashes_kept + len(new_hashes))
        # What the tree has of it stays as it is, or else comes anew.
        stays = entry.num_keys <= min(num_kept // entry.unit, num_keys)
        if not stays:
            self._detach(entry)
        before = entry.num_keys
        self._write(entry, num_kept, new_pages, hashes_kept, new_hashes, kv_len)
        if not stays:
            self._attach(entry, self._by_page if entry.hashes is None else self._by_hash)
        elif entry.num_keys > before:
            self._grow(entry)

    def remove(self, request: Hashable) -> None:
        """Forget a request; its pages may be used for others then.

        Raises
        ------
        KeyError
            There is no such request.
        """
        self._detach(self._get("remove", request))
        del self._requests[request]

    def levels(
        self,
        rows: Sequence[Hashable] | None = None,
        *,
        num_qo_tokens: Any = 1,
        min_shared_tokens: int = 1,
        max_levels: int = MAX_LEVELS,
        reserve_pages: int = 0,
        choose: CascadeCost | Choose | None = None,
        xp: Any = np,
    ) -> PrefixLevels:
        """Make the levels of a batch for `cascade_decode`: of shared keys, each group's; last, each request's own.

        Groups are runs of query tokens, so requests are put in another order, where those that share most are
        neighbours and those that share nothing come last; `q_indices` leads from it to the rows of `q`. It is None,
        and the order that of `rows`, if they lie right already, or if no group is worth its cost.

        The last level's table has all pages that a request was given, those without tokens yet as well. So the levels
        last for many steps: requests grow by ``levels.levels[-1][0].kv_lens[...] += 1``, in place (on the device, in
        a captured graph), as long as they have pages; mind that they lie in the new order. `extend` and new levels are
        needed when a request comes or goes, and to share what has become full since.

        Parameters
        ----------
        rows : sequence of hashable, optional
            The batch: the request of each row. By default `requests`.
        num_qo_tokens : int, or sequence or NumPy array of int, shape [batch]
            Query tokens of every request or of each; `q` has one row after the other's. They are the last of its
            `kv_len` tokens.
        min_shared_tokens : int
            Fewer than so many are not worth a group.
        max_levels : int
            1 to 8. Where groups lie in groups more often, those that save least are left out; their keys are read with
            the groups and requests inside.
        reserve_pages : int
            Entries to keep free in the last level's table behind each request's pages, for ids that the caller writes
            there in place. They hold -1 until then.
        choose : CascadeCost, or callable (num_readers, num_tokens, num_qo_tokens) -> float, optional
            What a group saves; see `CascadeCost.saving_us`. Groups that save nothing are left out, those that save
            least first, after which others, with their keys, may save more. Of a callable, every group that is left is
            used. By default ``CascadeCost()``: give it the heads of the model.
        xp : module
            ``numpy`` or ``cupy``: where the arrays go. CuPy's are views of one buffer, which is copied once, from
            pinned memory, on the current stream; nothing waits for it.

        Returns
        -------
        PrefixLevels
            (levels, order, saving_us).

        Raises
        ------
        KeyError
            A row is no request.
        TypeError
            A number is not an integer, or `choose` can not be called.
        ValueError
            A request comes twice, `num_qo_tokens` has another shape than [batch], or a number is out of range.
        """
        batch = list(self._requests.values())
        if rows is not None:
            rows = list(rows)
            batch = [self._get("levels", request) for request in rows]
            if len(set(batch)) < len(batch):
                twice = next(request for i, request in enumerate(rows) if request in rows[:i])
                raise ValueError(f"levels: rows must be different requests, got {twice!r} twice")
        qo_lens = _as_qo_lens(num_qo_tokens, len(batch))
        min_shared_tokens = _within("min_shared_tokens", min_shared_tokens, 0, 2**31 - 1)
        max_levels = _within("max_levels", max_levels, 1, MAX_LEVELS)
        reserve_pages = _within("reserve_pages", reserve_pages, 0, 2**31 - 1)
        if choose is None:
            choose = CascadeCost()
        saving: Any = choose
        if isinstance(choose, CascadeCost):
            saving = choose.saving_us
        elif not callable(choose):
            raise TypeError(f"levels: choose must be a CascadeCost or callable, got {type(choose).__name__}")

        top = self._groups(batch, qo_lens)
        selection = _Selection(top, self.page_size, saving, min_shared_tokens)
        selection.drop_unprofitable()
        selection.flatten(max_levels - 1)
        saving_us = selection.saving_us()
        if isinstance(choose, CascadeCost):
            num_own = sum(request.kv_len for request in batch) - selection.num_shared()
            most = max((group.num_qo_tokens for group in top.below()), default=0)
            saving_us -= choose.launch_us(most, num_own)
        if isinstance(choose, CascadeCost) and saving_us <= 0:
            for group in top.below():
                group.dissolve()
        if not top.children:
            saving_us = 0.0
        return PrefixLevels(
            *self._arrays(top, batch, qo_lens, num_qo_tokens, reserve_pages, xp), float(saving_us)
        )

    def check(self) -> None:
        """Check that the tree is what its requests are, in time linear in their pages; for tests and debugging.

        Raises
        ------
        AssertionError
            It is not: a bug of this class.
        """
        wrong = set()
        for root in (self._by_page, self._by_hash):
            nodes = [root]
            for node in nodes:  # while it grows
                nodes += node.children.values()
                if node is root:
                    continue
                if len(node.children) + bool(node.ending) < (1 if node.ending else 2):
                    wrong.add("single children")
                path: _Node | None = node.owner.node
                while path is not None and path is not node:
                    path = path.parent
                if path is None:
                    wrong.add("owners")
                if not node.start < node.end:
                    wrong.add("runs")
                for key, child in node.children.items():
                    if child.parent is not node or child.start != node.end or _first_key(child) != key:
                        wrong.add("children")
        for entry in self._requests.values():
            if entry not in entry.node.ending or entry.node.end != entry.num_keys:
                wrong.add("ends")
            above = entry.node
            while above.parent is not None:
                run = slice(above.start, above.end)
                if (entry.keys[run] != above.owner.keys[run]).any() or above.owner.num_keys < above.end:
                    wrong.add("keys")
                above = above.parent
        if wrong:
            raise AssertionError(f"PrefixTree: {', '.join(sorted(wrong))} are wrong")

    def _as_length(self, caller: str, kv_len: Any, num_pages: int) -> int:
        length = checks.as_index(f"{caller}: kv_len", kv_len)
        if not 0 <= length <= num_pages * self.page_size:
            raise ValueError(
                f"{caller}: kv_len must be within 0..{num_pages * self.page_size}, what {num_pages} pages of "
                f"{self.page_size} tokens hold, got {length}"
            )
        return length

    def _write(
        self, entry: _Request, num_kept: int, pages: np.ndarray, hashes_kept: int, hashes: np.ndarray, kv_len: int
    ) -> None:  # fmt: skip
        entry.pages = _put(entry.pages, num_kept, pages)
        entry.num_pages = num_kept + len(pages)
        entry.kv_len = kv_len
        entry.num_keys = kv_len // (self.page_size * entry.unit)
        if entry.hashes is not None:
            entry.hashes = _put(entry.hashes, hashes_kept, hashes)
            entry.num_hashes = hashes_kept + len(hashes)
            entry.num_keys = min(entry.num_keys, entry.num_hashes)

    def _attach(self, entry: _Request, node: _Node) -> None:
        """Find the way down from `node`, whose keys the request has, to where its keys end."""
        keys, end = entry.keys, entry.num_keys
        while node.end < end:
            key = keys.item(node.end)
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = _Node(node.end, end, node, entry)
            else:
                run = child.owner.keys[child.start : child.end]
                common = child.start + _num_common(keys[child.start : end], run)
                if common < child.end:
                    child = _split(child, common)
            node = child
        node.ending[entry] = None
        entry.node = node

    def _grow(self, entry: _Request) -> None:
        node = entry.node
        if node.parent is not None and not node.children and len(node.ending) == 1:
            node.end = entry.num_keys
            return
        del node.ending[entry]
        self._attach(entry, node)
        _tidy(node)

    def _detach(self, entry: _Request) -> None:
        node: _Node | None = entry.node
        assert node is not None
        del node.ending[entry]
        if node.parent is not None and not node.ending and not node.children:
            del node.parent.children[_first_key(node)]
            node = node.parent
        node = _tidy(node)
        while node is not None:  # what it owns on its way, another of its requests does now
            if node.owner is entry:
                node.owner = (
                    next(iter(node.ending)) if node.ending else next(iter(node.children.values())).owner
                )
            node = node.parent

    def _groups(self, batch: list[_Request], qo_lens: np.ndarray) -> _Group:
        """Make the tree of what requests of the batch share: two or more each, and more than in any child."""
        top = _Group(0, None)
        groups: dict[_Node, _Group] = {self._by_page: top, self._by_hash: top}
        for row, entry in enumerate(batch):
            # Without a query token, it reads nothing.
            node: _Node | None = entry.node if qo_lens[row] else self._by_page
            below: _Group | None = None
            while node is not None:  # up to where others have been
                group = groups.get(node)
                found = group is not None
                if group is None:
                    # Read from a request of this batch: pages of others may be gone while levels are in use.
                    group = groups[node] = _Group(node.end * entry.unit, entry)
                if below is None:
                    group.rows.append(row)
                else:
                    group.adopt(below)
                if found:
                    break
                below, node = group, node.parent
        for group in (*reversed(top.below()), top):
            group.num_requests = len(group.rows) + sum(c.num_requests for c in group.children)
            group.num_qo_tokens = int(qo_lens[group.rows].sum())
            group.num_qo_tokens += sum(c.num_qo_tokens for c in group.children)
            shares_more = not group.rows and len(group.children) == 1
            if group is not top and (group.num_requests == 1 or shares_more):
                group.dissolve()
        return top

    def _arrays(
        self, top: _Group, batch: list[_Request], qo_lens: np.ndarray, num_qo_tokens: Any, reserve_pages: int, xp: Any
    ) -> tuple[CascadeLevels, np.ndarray]:  # fmt: skip
        order, runs = _lay_out(top)
        num_shared = np.zeros(len(batch), np.int64)  # pages, of the requests in the new order
        offsets = np.zeros(len(batch) + 1, np.int64)  # of their query tokens
        np.cumsum(qo_lens[order], out=offsets[1:])
        tokens = offsets.tolist()
        none = np.empty(0, np.int32)
        pieces: list[list[np.ndarray]] = []  # each becomes an array
        for level in runs:
            qo_indptr: list[int] = []
            tables: list[np.ndarray] = []
            lens: list[int] = []
            for group, begin, end in level:
                start = 0 if group.parent is None else group.parent.end
                if qo_indptr and qo_indptr[-1] != tokens[begin]:  # some tokens between are in no group
                    tables.append(none)
                    lens.append(0)
                    qo_indptr.append(tokens[begin])
                if not qo_indptr:
                    qo_indptr.append(tokens[begin])
                qo_indptr.append(tokens[end])
                tables.append(group.owner.pages[start : group.end])
                lens.append((group.end - start) * self.page_size)
                num_shared[begin:end] = group.end
            pieces += [*_table(tables, lens), [np.array(qo_indptr, np.int32)]]

        ordered = [batch[row] for row in order]
        tables = [r.pages[start : r.num_pages] for r, start in zip(ordered, num_shared.tolist(), strict=True)]
        kv_lens = np.array([r.kv_len for r in ordered], np.int64) - num_shared * self.page_size
        spare = np.broadcast_to(np.int32(-1), reserve_pages)
        pieces += _table(tables, kv_lens, spare)
        one_each = np.ndim(num_qo_tokens) == 0 and num_qo_tokens == 1
        if not one_each:
            pieces.append([offsets.astype(np.int32)])
        sorted_already = bool((order == np.arange(len(batch))).all())
        if not sorted_already:
            # Of token t of the new order: where its request's begin in `q`, and which of them it is.
            starts = (np.cumsum(qo_lens) - qo_lens)[order] - offsets[:-1]
            pieces.append([(np.repeat(starts, qo_lens[order]) + np.arange(offsets[-1])).astype(np.int32)])

        arrays = iter(_pack(pieces, xp))
        levels: list[tuple[PageTable, Any]] = [
            (PageTable(next(arrays), next(arrays), next(arrays)), next(arrays)) for _ in runs
        ]
        own = PageTable(next(arrays), next(arrays), next(arrays))
        levels.append((own, None if one_each else next(arrays)))
        return CascadeLevels(levels, q_indices=None if sorted_already else next(arrays)), order


class _Selection:
    """Which groups are worth it. All are at first; leaving one out can only make others worth more."""

    def __init__(self, top: _Group, page_size: int, saving: Choose, min_shared_tokens: int) -> None:
        self._top = top
        self._page_size = page_size
        self._saving = saving
        self._min_shared_tokens = min_shared_tokens
        self._heap: list[tuple[float, int, _Group]] = []
        self._num_pushed = 0
        for group in top.below():
            self._push(group)

    def _num_tokens(self, group: _Group) -> int:
        assert group.parent is not None
        return (group.end - group.parent.end) * self._page_size

    def _push(self, group: _Group) -> None:
        num_tokens, num_readers = self._num_tokens(group), len(group.rows) + len(group.children)
        group.value = -math.inf
        if num_tokens >= self._min_shared_tokens:
            group.value = float(self._saving(num_readers, num_tokens, group.num_qo_tokens))
            if math.isnan(group.value):
                raise ValueError("levels: choose must return a number, got nan")
        self._num_pushed += 1
        heapq.heappush(self._heap, (group.value, self._num_pushed, group))

    def _drop(self, group: _Group) -> _Group:
        children = list(group.children)
        parent = group.dissolve()
        for changed in children if parent is self._top else (parent, *children):
            self._push(changed)
        return parent

    def _least(self) -> _Group | None:
        """Return the group that saves least, now at the head of the heap."""
        while self._heap:
            value, _, group = self._heap[0]
            if group.parent is not None and group.value == value:
                return group
            heapq.heappop(self._heap)  # it has gone, or lies elsewhere in the heap with another value
        return None

    def drop_unprofitable(self) -> None:
        """Leave out what saves nothing, the least first: its keys may make its children worth it."""
        while (group := self._least()) is not None and group.value <= 0:
            heapq.heappop(self._heap)
            self._drop(group)

    def flatten(self, max_depth: int) -> None:
        """Leave out, the least first, what is part of more than `max_depth` groups in one another."""
        for group in (*reversed(self._top.below()), self._top):
            group.height = _height(group)
        while self._top.height > max_depth and (least := self._least()) is not None:
            heapq.heappop(self._heap)
            depth, above = 0, least
            while above.parent is not None:
                depth, above = depth + 1, above.parent
            if depth + least.height <= max_depth:
                continue  # and so it will be
            changed: _Group | None = self._drop(least)
            while changed is not None and (height := _height(changed)) != changed.height:
                changed.height, changed = height, changed.parent

    def num_shared(self) -> int:
        """Return how many keys requests have in groups, counted once for each request."""
        return sum(group.num_requests * self._num_tokens(group) for group in self._top.below())

    def saving_us(self) -> float:
        """Return what the groups save together, compared with every request reading all its keys."""
        return sum(
            float(self._saving(group.num_requests, self._num_tokens(group), group.num_qo_tokens))
            for group in self._top.below()
        )


def _height(group: _Group) -> int:
    """Count the groups in one another below."""
    return max((child.height + 1 for child in group.children), default=0)


def _lay_out(top: _Group) -> tuple[np.ndarray, list[list[tuple[_Group, int, int]]]]:
    """Return the rows in their new order, and of each level the groups with the requests they run from and to."""
    first: dict[_Group, int] = {}
    for group in reversed(top.below()):
        first[group] = min((*group.rows, *(first[child] for child in group.children)))
    order: list[int] = []
    runs: list[list[tuple[_Group, int, int]]] = []

    def visit(group: _Group, depth: int) -> None:
        if depth > len(runs):
            runs.append([])
        begin = len(order)
        for child in sorted(group.children, key=first.__getitem__):
            visit(child, depth + 1)
        order.extend(sorted(group.rows))
        if depth:
            runs[depth - 1].append((group, begin, len(order)))

    visit(top, 0)
    return np.array(order, np.int32), runs


def _table(
    tables: Sequence[np.ndarray], lens: Any, spare: np.ndarray | None = None
) -> list[list[np.ndarray]]:
    """Return kv_indptr, kv_indices and kv_lens, each in pieces."""
    num_spare = 0 if spare is None else len(spare)
    kv_indptr = np.zeros(len(tables) + 1, np.int64)
    np.cumsum([len(table) + num_spare for table in tables], out=kv_indptr[1:])
    if kv_indptr[-1] >= 2**31:
        raise ValueError(f"levels: the table must have fewer than 2**31 entries, got {kv_indptr[-1]}")
    rows = list(tables)
    if spare is not None and num_spare:
        rows = [part for table in tables for part in (table, spare)]
    return [[kv_indptr.astype(np.int32)], rows, [np.array(lens, np.int32)]]


def _pack(pieces: Sequence[Collection[np.ndarray]], xp: Any) -> list[Any]:
    """Concatenate each of them; all lie in one buffer, which goes to `xp` in one copy."""
    sizes = [sum(len(piece) for piece in array) for array in pieces]
    places, place = [], 0
    for size in sizes:
        places.append(slice(place, place + size))
        place += -(-size // _ALIGNMENT) * _ALIGNMENT
    buffer = np.zeros(place, np.int32)
    for array, where in zip(pieces, places, strict=True):
        if array:
            np.concatenate(list(array), out=buffer[where])
    # CuPy copies it to pinned memory, which it holds until the copy from there is done.
    packed = xp.asarray(buffer)
    return [packed[where] for where in places]


def _first_key(node: _Node) -> Hashable:
    key: Hashable = node.owner.keys.item(node.start)
    return key


def _num_common(a: np.ndarray, b: np.ndarray) -> int:
    """Count the leading elements that are equal."""
    shortest = min(len(a), len(b))
    differ = a[:shortest] != b[:shortest]
    first = int(differ.argmax()) if shortest else 0
    return first if shortest and differ[first] else shortest


def _split(node: _Node, at: int) -> _Node:
    """Cut a node in two, and return the new one: the upper."""
    parent = node.parent
    assert parent is not None
    upper = parent.children[_first_key(node)] = _Node(node.start, at, parent, node.owner)
    node.start, node.parent = at, upper
    upper.children[_first_key(node)] = node
    return upper


def _tidy(node: _Node) -> _Node:
    """Merge a node where nothing ends with its only child, if it has but one; return what is in its place."""
    if node.parent is None or node.ending or len(node.children) != 1:
        return node
    (child,) = node.children.values()
    key = _first_key(node)
    child.start, child.parent = node.start, node.parent
    node.parent.children[key] = child
    return child


def _put(array: np.ndarray, count: int, new: np.ndarray) -> np.ndarray:
    """Write `new` behind the first `count` elements, into a longer array if need be."""
    if count + len(new) > len(array):
        longer = np.empty(max(count + len(new), 2 * len(array)), array.dtype)
        longer[:count] = array[:count]
        array = longer
    array[count : count + len(new)] = new
    return array


def _as_pages(caller: str, pages: Any) -> np.ndarray:
    ids = np.asarray(pages)
    if ids.ndim != 1:
        raise ValueError(f"{caller}: pages must be a vector, got shape {list(ids.shape)}")
    if not len(ids):
        return np.empty(0, np.int32)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{caller}: pages must be integers, got {ids.dtype}")
    for id_ in (ids.min(), ids.max()):
        if not 0 <= id_ < 2**31:
            raise ValueError(f"{caller}: pages must be within 0..2**31 - 1, got {id_}")
    return ids.astype(np.int32)


def _as_hashes(caller: str, hashes: Iterable[Hashable] | None) -> np.ndarray:
    try:
        found = [] if hashes is None else list(hashes)
        set(found)  # all hashable
    except TypeError as error:
        raise TypeError(f"{caller}: hashes must be an iterable of hashable objects: {error}") from None
    return np.fromiter(found, object, len(found))


def _as_qo_lens(num_qo_tokens: Any, batch_size: int) -> np.ndarray:
    lens = np.asarray(num_qo_tokens)
    if lens.size and lens.dtype.kind not in "iu":
        raise TypeError(f"levels: num_qo_tokens must be an integer or integers, got {lens.dtype}")
    if lens.ndim and lens.shape != (batch_size,):
        raise ValueError(f"levels: num_qo_tokens must have shape [{batch_size}], got {list(lens.shape)}")
    if lens.size and not 0 <= lens.min() <= lens.max() < 2**31:
        wrong = lens.min() if lens.min() < 0 else lens.max()
        raise ValueError(f"levels: num_qo_tokens must be within 0..2**31 - 1, got {wrong}")
    return np.broadcast_to(lens.astype(np.int64), (batch_size,))


def _within(name: str, value: Any, least: int, most: int) -> int:
    number = checks.as_index(f"levels: {name}", value)
    if not least <= number <= most:
        raise ValueError(f"levels: {name} must be within {least}..{most}, got {number}")
    return number
