"""Attention problems to test with: a builder, poison, an oracle of its own, tolerances. Any array module."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

import cupyattn
from cupyattn.cache import PagedKVCache, PagedMLACache, PageTable
from cupyattn.rope import Rope

#: What lies in table entries that nobody may follow.
POISON_PAGE = 2147480000
#: Elementwise, absolute plus relative. In float32 it is exponentials on a GPU that set the limit.
TOLERANCE = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-5, "float64": 1e-12}
#: ||actual - expected|| / ||expected||.
NORM_TOLERANCE = {"float16": 1e-3, "bfloat16": 5e-3, "float32": 1e-5, "float64": 1e-12}
LSE_TOLERANCE = 1e-3
#: Relative, of rounding to nearest.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
STORAGES = ("separate", "interleaved", "strided")
#: Of latent rows: one array with ckv and kpe side by side, two arrays, or two with different paddings.
MLA_STORAGES = ("mla", "mla-pair", "mla-strided")


def to_host(a: Any) -> np.ndarray:
    return a if isinstance(a, np.ndarray) else a.get()


def to_float64(a: Any) -> Any:
    """Widen on the array's own device."""
    return a.astype(np.float32).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Arguments of one `decode` call, on one array module; of one `mla_decode` call if there is a `ckv_dim`.

    `bases` own the cache's memory; `k_pages` and `v_pages` are views into them, as `storage` says:
    two arrays, one array that holds both, or two arrays with different paddings. So are `ckv_pages` and
    `kpe_pages`, whose rows are one KV head's keys of `head_dim`, and values in their first `ckv_dim` columns.
    """

    q: Any
    bases: tuple[Any, ...]
    kv_indptr: Any
    kv_indices: Any
    kv_lens: Any
    qo_indptr: Any
    storage: str
    layout: str
    num_kv_heads: int
    head_dim: int
    sm_scale: float
    window_left: int
    logits_soft_cap: float
    ckv_dim: int | None = None

    @property
    def k_pages(self) -> Any:
        return self.bases[0][:, 0] if self.storage == "interleaved" else self.bases[0][..., : self.head_dim]

    @property
    def v_pages(self) -> Any:
        if self.storage == "interleaved":
            return self.bases[0][:, 1]
        head_axis = slice(self.num_kv_heads)
        return self.bases[1][:, :, head_axis] if self.layout == "NHD" else self.bases[1][:, head_axis]

    @property
    def ckv_pages(self) -> Any:
        base = self.bases[0]
        return (base[:, :, 0] if self.storage == "mla-strided" else base)[..., : self.ckv_dim]

    @property
    def kpe_pages(self) -> Any:
        if self.storage == "mla":
            return self.bases[0][..., self.ckv_dim : self.head_dim]
        return self.bases[1][..., : self.head_dim - (self.ckv_dim or 0)]

    @property
    def cache(self) -> PagedKVCache | PagedMLACache:
        if self.ckv_dim is not None:
            return PagedMLACache(self.ckv_pages, self.kpe_pages)
        return PagedKVCache(self.k_pages, self.v_pages, layout=self.layout)

    @property
    def page_size(self) -> int:
        return self.cache.page_size

    @property
    def value_dim(self) -> int:
        """Size of the values, and so of the result."""
        return self.head_dim if self.ckv_dim is None else self.ckv_dim

    @property
    def out_shape(self) -> tuple[int, int, int]:
        return (*self.q.shape[:2], self.value_dim)

    @property
    def decode(self) -> Callable[..., Any]:
        """The public function that these are arguments of."""
        return cupyattn.decode if self.ckv_dim is None else cupyattn.mla_decode

    def gather(self, page_ids: Any, slots: Any) -> tuple[Any, Any]:
        """Keys and values of some slots, [..., num_kv_heads, dim] in float64 where the problem lives."""
        if self.ckv_dim is None:
            k_pages, v_pages = self.k_pages, self.v_pages
            if self.layout == "HND":
                k_pages, v_pages = k_pages.swapaxes(1, 2), v_pages.swapaxes(1, 2)
            return to_float64(k_pages[page_ids, slots]), to_float64(v_pages[page_ids, slots])
        parts = [to_float64(a[page_ids, slots]) for a in (self.ckv_pages, self.kpe_pages)]
        keys = self.xp.concatenate(parts, axis=-1)[..., None, :]
        return keys, keys[..., : self.ckv_dim]

    @property
    def pages(self) -> PageTable:
        return PageTable(self.kv_indptr, self.kv_indices, self.kv_lens)

    @property
    def xp(self) -> ModuleType:
        return np if isinstance(self.q, np.ndarray) else __import__("cupy")

    @property
    def dtype(self) -> str:
        return str(self.q.dtype)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `decode` and of `reference.decode`."""
        return {
            "qo_indptr": self.qo_indptr,
            "sm_scale": self.sm_scale,
            "window_left": self.window_left,
            "logits_soft_cap": self.logits_soft_cap,
        }

    def call(self, decode: Callable[..., Any], **more: Any) -> Any:
        """``decode(q, cache, pages, ...)`` with this problem's arguments, `more` besides or instead."""
        return decode(self.q, self.cache, self.pages, **(self.options | more))

    def replace(self, **changes: Any) -> Problem:
        return dataclasses.replace(self, **changes)

    def writable(self) -> tuple[Any, Any]:
        """K and V (kpe and ckv) as writable [num_pages, page_size, num_kv_heads, dim] views."""
        if self.ckv_dim is not None:  # what `append` rotates comes first
            return self.kpe_pages[:, :, None], self.ckv_pages[:, :, None]
        return self.cache.nhd()


def to_backend(problem: Problem, xp: ModuleType) -> Problem:
    """The same problem with its arrays on NumPy or on CuPy (strides are kept)."""

    def move(a: Any) -> Any:
        return None if a is None else to_host(a) if xp is np else xp.asarray(a)

    arrays = ("q", "kv_indptr", "kv_indices", "kv_lens", "qo_indptr")
    moved = {name: move(getattr(problem, name)) for name in arrays}
    return problem.replace(bases=tuple(map(move, problem.bases)), **moved)


def build_problem(
    kv_lens: Sequence[int],
    *,
    page_size: int = 16,
    num_kv_heads: int = 2,
    group_size: int = 4,
    head_dim: int = 64,
    ckv_dim: int | None = None,
    dtype: str = "bfloat16",
    layout: str = "NHD",
    storage: str = "separate",
    dense: bool = False,
    qo_lens: Sequence[int] | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sm_scale: float | None = None,
    shuffle: bool = True,
    poison: bool = True,
    poison_window: bool = True,
    spare_pages: int = 3,
    spare_entries: int = 1,
    seed: int = 0,
    xp: ModuleType = np,
) -> Problem:
    """A random paged problem.

    Parameters
    ----------
    kv_lens, qo_lens : sequence of int
        Cache and query tokens of each request; without `qo_lens`, one query token each and no `qo_indptr`.
    ckv_dim : int, optional
        Makes it a problem of `mla_decode`, whose rows have `head_dim`; see `build_mla_problem`.
    storage : {"separate", "interleaved", "strided"}, or one of `MLA_STORAGES`
    dense : bool
        A table [batch, max_pages] instead of CSR.
    shuffle : bool
        Deal pages in random order.
    poison : bool
        NaN in every slot past a request's end, in unused pages and in padding; `POISON_PAGE` in every entry
        of the table past a request's last page.
    poison_window : bool
        With `poison`: the same for what no query can see because it lies before the window.
    spare_pages : int
        Pages that no request holds.
    spare_entries : int
        Entries of each row of the table that no token needs.
    xp : module
        ``numpy`` or ``cupy``: the large arrays are made there.
    """
    rng = np.random.default_rng(seed)
    lens = np.array(kv_lens, np.int64)
    batch = len(lens)
    num_q = np.ones(batch, np.int64) if qo_lens is None else np.array(qo_lens, np.int64)
    held = -(-lens // page_size)
    num_pages = int(held.sum()) + spare_pages
    ids = rng.permutation(num_pages) if shuffle else np.arange(num_pages)

    # Token ranges that somebody sees: [first, lens) of each request.
    first = np.zeros(batch, np.int64)
    if window_left >= 0 and poison_window:
        first = np.clip(lens - num_q - window_left, 0, lens)
    request = np.repeat(np.arange(batch), held)
    column = np.arange(len(request)) - np.repeat(np.cumsum(held) - held, held)
    slot = column[:, None] * page_size + np.arange(page_size)  # token position of each slot of each held page
    seen = np.zeros((num_pages, page_size), bool)
    seen[ids[: len(request)]] = (slot >= first[request][:, None]) & (slot < lens[request][:, None])

    widths = held + spare_entries
    max_pages = int(widths.max(initial=spare_entries))
    if dense:
        widths[:] = max_pages
    starts = np.concatenate([[0], np.cumsum(widths)])
    table = np.full(starts[-1], POISON_PAGE if poison else 0, np.int64)
    entries = starts[request] + column
    needed = (column + 1) * page_size > first[request] if poison else np.ones(len(request), bool)
    table[entries[needed]] = ids[: len(request)][needed]

    array_rng = xp.random.default_rng(seed)

    def pages_of(*before: int, dim: int = head_dim, pad_heads: int = 0, pad_dim: int = 0) -> Any:
        heads = num_kv_heads + pad_heads
        inner = (page_size, heads) if layout == "NHD" else (heads, page_size)
        values = array_rng.standard_normal((num_pages, *before, *inner, dim + pad_dim), dtype=np.float32)
        if poison:
            mask = (
                xp.asarray(~seen)[:, :, None, None]
                if layout == "NHD"
                else xp.asarray(~seen)[:, None, :, None]
            )
            xp.copyto(values, math.nan, where=mask[:, None] if before else mask)
            values[..., dim:] = np.nan
            if ckv_dim is not None:
                values[:, :, num_kv_heads:] = np.nan
        return values.astype(DTYPES[dtype])

    if ckv_dim is not None:
        assert storage in MLA_STORAGES
        assert num_kv_heads == 1
        assert layout == "NHD"
    if storage == "mla":
        bases: tuple[Any, ...] = (pages_of()[:, :, 0],)
    elif storage == "mla-pair":
        bases = (pages_of(dim=ckv_dim)[:, :, 0], pages_of(dim=head_dim - ckv_dim)[:, :, 0])
    elif storage == "mla-strided":
        bases = (
            pages_of(dim=ckv_dim, pad_heads=1, pad_dim=16), pages_of(dim=head_dim - ckv_dim, pad_dim=8)[:, :, 0],
        )  # fmt: skip
    elif storage == "interleaved":
        bases = (pages_of(2),)
    elif storage == "strided":
        bases = (pages_of(pad_dim=16), pages_of(pad_heads=1))
    else:
        bases = (pages_of(), pages_of())
    q = array_rng.standard_normal((int(num_q.sum()), num_kv_heads * group_size, head_dim), dtype=np.float32)
    return Problem(
        q=q.astype(DTYPES[dtype]),
        bases=bases,
        kv_indptr=None if dense else xp.asarray(starts.astype(np.int32)),
        kv_indices=xp.asarray(table.astype(np.int32).reshape((batch, max_pages) if dense else -1)),
        kv_lens=xp.asarray(lens.astype(np.int32)),
        qo_indptr=None
        if qo_lens is None
        else xp.asarray(np.concatenate([[0], np.cumsum(num_q)]).astype(np.int32)),
        storage=storage,
        layout=layout,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        sm_scale=1 / math.sqrt(head_dim) if sm_scale is None else sm_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        ckv_dim=ckv_dim,
    )


def build_mla_problem(
    kv_lens: Sequence[int],
    *,
    num_heads: int = 16,
    ckv_dim: int = 512,
    kpe_dim: int = 64,
    storage: str = "mla",
    **arguments: Any,
) -> Problem:
    """A random problem of `mla_decode`; `arguments` as for `build_problem`."""
    return build_problem(
        kv_lens, num_kv_heads=1, group_size=num_heads, head_dim=ckv_dim + kpe_dim, ckv_dim=ckv_dim,
        storage=storage, **arguments,
    )  # fmt: skip


def oracle(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """What `decode` must give, in float64, by the definition: the keys of each query token are listed.

    Shares no code with the library. Computes where the problem lives, returns NumPy arrays.
    """
    p, xp = problem, problem.xp
    num_qo_heads = p.q.shape[1]
    group_size = num_qo_heads // p.num_kv_heads
    page_size = p.page_size
    table, lens = to_host(p.kv_indices), to_host(p.kv_lens)
    out = np.zeros(p.out_shape)
    lse = np.full(p.q.shape[:2], -np.inf)
    offsets = np.arange(len(lens) + 1) if p.qo_indptr is None else to_host(p.qo_indptr)
    for b, kv_len in enumerate(lens):
        row = table[b] if p.kv_indptr is None else table[int(p.kv_indptr[b]) :]
        for token in range(offsets[b], offsets[b + 1]):
            position = int(kv_len) - int(offsets[b + 1]) + token
            oldest = 0 if p.window_left == -1 else position - p.window_left
            visible = np.array(list(range(max(0, oldest), position + 1)), np.int64)
            if len(visible) == 0:
                continue
            ids, slots = xp.asarray(row[visible // page_size]), xp.asarray(visible % page_size)
            # [kv_heads, keys, dim], [kv_heads, group, head_dim]
            keys, values = (a.transpose(1, 0, 2) for a in p.gather(ids, slots))
            query = to_float64(p.q[token]).reshape(p.num_kv_heads, group_size, p.head_dim)
            logits = query @ keys.transpose(0, 2, 1) * p.sm_scale
            if p.logits_soft_cap:
                logits = p.logits_soft_cap * xp.tanh(logits / p.logits_soft_cap)
            weights = xp.exp(logits - logits.max(axis=-1, keepdims=True))
            total = weights.sum(axis=-1, keepdims=True)
            out[token] = to_host(weights @ values / total).reshape(num_qo_heads, p.value_dim)
            lse[token] = to_host(logits.max(axis=-1) + xp.log(total[..., 0])).reshape(num_qo_heads)
    return out, lse


def rotate_as_complex_numbers(x: np.ndarray, positions: Any, rope: Rope | None) -> np.ndarray:
    """Each token of `x` ([tokens, heads, dim]) rotated: pairs as complex numbers, times exp(i * angle)."""
    if rope is None:
        return x.astype(np.float64)
    dim = rope.rotary_dim or x.shape[-1]
    freq = (
        np.array(rope.inv_freq) if rope.inv_freq is not None else rope.theta ** (-np.arange(0, dim, 2) / dim)
    )
    turn = np.exp(1j * np.multiply.outer(np.asarray(positions) / rope.scale, freq))[:, None]
    x = x.astype(np.float64)
    rotated = x.copy()
    if rope.interleaved:
        z = (x[..., 0:dim:2] + 1j * x[..., 1:dim:2]) * turn
        rotated[..., 0:dim:2], rotated[..., 1:dim:2] = z.real, z.imag
    else:
        z = (x[..., : dim // 2] + 1j * x[..., dim // 2 : dim]) * turn
        rotated[..., :dim] = np.concatenate([z.real, z.imag], axis=-1)
    return rotated


def assert_close(actual: Any, expected: np.ndarray, tolerance: float, what: str = "out") -> None:
    """Elementwise ``|actual - expected| <= tolerance * (1 + |expected|)``; infinities agree, NaN fails."""
    actual = to_host(actual).astype(np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert not np.isnan(actual).any(), f"{what}: {np.isnan(actual).sum()} NaN of {actual.size}"
    with np.errstate(invalid="ignore"):
        error = np.where(actual == expected, 0.0, np.abs(actual - expected))
        bad = ~(error <= tolerance * (1 + np.abs(expected))) | (np.isinf(expected) & (actual != expected))
    assert not bad.any(), (
        f"{what}: {bad.sum()} of {bad.size} differ by more than {tolerance} * (1 + |expected|), the first at "
        f"{[int(i[0]) for i in np.nonzero(bad)]}: {actual[bad][0]} for {expected[bad][0]}; "
        f"largest difference {np.nanmax(error)}"
    )


def assert_rounded(actual: Any, expected: np.ndarray, dtype: str, what: object) -> None:
    """Every number is `expected` (float64) rounded to `dtype`, or off by what float32 arithmetic may add."""
    actual = to_host(actual).astype(np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    error = np.abs(actual - expected)
    bad = ~(error <= ROUNDING[dtype] * np.abs(expected) + 3e-6)
    assert not bad.any(), f"{what}: {bad.sum()} of {bad.size} wrong, by up to {np.nanmax(error)}"


def assert_state(
    out: Any,
    lse: Any,
    expected: tuple[np.ndarray, np.ndarray],
    dtype: str,
    *,
    lse_tolerance: float = LSE_TOLERANCE,
) -> None:
    """Check a state against the oracle's, with the tolerances for results that were computed in `dtype`."""
    expected_out, expected_lse = expected
    assert_close(out, expected_out, TOLERANCE[dtype], "out")
    norm = np.linalg.norm(expected_out)
    difference = np.linalg.norm(to_host(out).astype(np.float64) - expected_out)
    assert difference <= NORM_TOLERANCE[dtype] * norm, (
        f"out: relative error {difference / norm:.2e} in the norm"
    )
    if lse is not None:
        assert_close(lse, expected_lse, min(lse_tolerance, 10 * TOLERANCE[dtype]), "lse")


class Guarded:
    """An array inside of a larger one, full of NaN, that shows whether anything beside it was written."""

    CANARY = 1536.0  # exact in every dtype
    MARGIN = 512  # elements on either side; keeps the array aligned

    def __init__(self, shape: Sequence[int], dtype: Any, xp: ModuleType = np) -> None:
        size = math.prod(shape)
        base = xp.full(size + 2 * self.MARGIN, self.CANARY, dtype=np.float32)
        base[self.MARGIN : self.MARGIN + size] = np.nan
        self._base = base.astype(dtype)
        self.array = self._base[self.MARGIN : self.MARGIN + size].reshape(shape)

    def assert_intact(self) -> None:
        """Nothing outside of the array was written."""
        margins = to_host(self._base).astype(np.float32)
        assert (margins[: self.MARGIN] == self.CANARY).all(), "written before the array"
        assert (margins[-self.MARGIN :] == self.CANARY).all(), "written past the array"

    def assert_untouched(self) -> None:
        """Nothing at all was written."""
        self.assert_intact()
        assert np.isnan(to_host(self.array).astype(np.float32)).all(), "the array was written"
