"""The specification, in NumPy and float64; also the backend for NumPy arrays.

Each function says what its kernel must compute. It reads the cache tokens that count and no others, so that
whatever lies in unused pages, in slots past a sequence's end or outside of the window cannot matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from cupyattn.cache import PagedKVCache, PagedMLACache, PageTable
from cupyattn.levels import CascadeLevels
from cupyattn.rope import Rope

# Queries are taken in runs whose logits stay below this many numbers (32 MiB), however long the sequence.
_LOGITS_AT_ONCE = 1 << 22


def decode(
    q: np.ndarray,
    cache: PagedKVCache,
    pages: PageTable,
    *,
    sm_scale: float,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    qo_indptr: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of new tokens over a paged cache.

    Token ``i`` of the ``n`` query tokens of a request stands at position ``p = kv_len - n + i`` and sees the
    keys ``j`` with ``max(0, p - window_left) <= j <= p`` (all ``j <= p`` where `window_left` is -1); with a
    negative position it sees none. For query head ``h`` and its key/value head ``g = h // group_size``::

        logit[j] = sm_scale * dot(q[h], k[j, g])
        logit[j] = cap * tanh(logit[j] / cap)              where logits_soft_cap = cap > 0
        lse      = log(sum_j exp(logit[j]))                -inf over no keys
        out      = sum_j exp(logit[j] - lse) * v[j, g]     0 over no keys

    Parameters
    ----------
    q : array, shape [batch, num_qo_heads, head_dim]
        One token per request, or [total_q, num_qo_heads, head_dim] with `qo_indptr`.
    cache : PagedKVCache
    pages : PageTable
    sm_scale : float
    window_left : int
        How many tokens before its own a query sees; 0 means its own only, -1 means all.
    logits_soft_cap : float
        0 means none.
    qo_indptr : array, shape [batch + 1], int, optional
        Request ``b`` has query tokens ``qo_indptr[b] .. qo_indptr[b + 1] - 1``.

    Returns
    -------
    out : array, shape of q, float64
    lse : array, shape of q without head_dim, float64
    """
    k_nhd, v_nhd = cache.nhd()
    return _decode(
        q,
        lambda page_ids, tokens: _gather(k_nhd, page_ids, tokens),
        lambda page_ids, tokens: _gather(v_nhd, page_ids, tokens),
        pages,
        page_size=cache.page_size,
        num_kv_heads=cache.num_kv_heads,
        value_dim=cache.head_dim,
        sm_scale=sm_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        qo_indptr=qo_indptr,
    )


def mla_decode(
    q_ckv: np.ndarray,
    q_kpe: np.ndarray,
    cache: PagedMLACache,
    pages: PageTable,
    *,
    sm_scale: float,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    qo_indptr: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Multi-head latent attention, absorbed: all heads share the keys ``(ckv, kpe)`` and the values ``ckv``.

    As `decode` with one key/value head of the concatenated row, whose first ckv_dim entries are the value::

        logit[j] = sm_scale * (dot(q_ckv[h], ckv[j]) + dot(q_kpe[h], kpe[j]))
        out      = sum_j exp(logit[j] - lse) * ckv[j]

    Parameters
    ----------
    q_ckv : array, shape [tokens, num_qo_heads, ckv_dim]
    q_kpe : array, shape [tokens, num_qo_heads, kpe_dim]
    cache : PagedMLACache
    pages, sm_scale, window_left, logits_soft_cap, qo_indptr
        As for `decode`.

    Returns
    -------
    out : array, shape of q_ckv, float64
    lse : array, shape [tokens, num_qo_heads], float64
    """
    ckv, kpe = cache.ckv_pages[:, :, None], cache.kpe_pages[:, :, None]

    def keys(page_ids: np.ndarray, tokens: slice) -> np.ndarray:
        return np.concatenate([_gather(ckv, page_ids, tokens), _gather(kpe, page_ids, tokens)], axis=-1)

    return _decode(
        np.concatenate([q_ckv, q_kpe], axis=-1),
        keys,
        lambda page_ids, tokens: _gather(ckv, page_ids, tokens),
        pages,
        page_size=cache.page_size,
        num_kv_heads=1,
        value_dim=cache.ckv_dim,
        sm_scale=sm_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        qo_indptr=qo_indptr,
    )


_Gather = Callable[[np.ndarray, slice], np.ndarray]


def _decode(
    q: np.ndarray,
    keys: _Gather,
    values: _Gather,
    pages: PageTable,
    *,
    page_size: int,
    num_kv_heads: int,
    value_dim: int,
    sm_scale: float,
    window_left: int,
    logits_soft_cap: float,
    qo_indptr: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Do the work of `decode`. ``keys(page_ids, tokens)`` is [num_kv_heads, tokens, dim] in float64, so is `values`."""
    num_qo_heads, head_dim = q.shape[1:]
    group_size = num_qo_heads // num_kv_heads
    out = np.zeros((*q.shape[:2], value_dim))
    lse = np.full(q.shape[:2], -np.inf)

    starts = range(pages.batch_size + 1) if qo_indptr is None else qo_indptr.tolist()
    kv_indptr = None if pages.kv_indptr is None else pages.kv_indptr.tolist()
    for b, kv_len in enumerate(pages.kv_lens.tolist()):
        row = pages.kv_indices[b if kv_indptr is None else slice(kv_indptr[b], kv_indptr[b + 1])]
        shift = kv_len - starts[b + 1]  # position of query token t of the batch: shift + t
        begin, end = max(starts[b], -shift), starts[b + 1]  # query tokens at positions >= 0
        while begin < end:
            first_key = 0 if window_left < 0 else max(0, shift + begin - window_left)
            # A run of queries reads the keys from the first one's window to the last one's position.
            run = max(1, _LOGITS_AT_ONCE // (num_qo_heads * (kv_len - first_key)))
            stop = min(end, begin + run)
            last_key = shift + stop - 1
            page_ids = row[first_key // page_size : last_key // page_size + 1]
            tokens = slice(first_key % page_size, first_key % page_size + last_key - first_key + 1)
            queries = q[begin:stop].reshape(-1, num_kv_heads, group_size, head_dim).swapaxes(0, 1)
            queries = queries.astype(np.float64).reshape(num_kv_heads, -1, head_dim) * sm_scale
            # Keys and values are widened in turn: one large array at a time, in memory that is warm already.
            logits = queries @ keys(page_ids, tokens).swapaxes(1, 2)
            if logits_soft_cap > 0:
                logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
            logits = logits.reshape(num_kv_heads, stop - begin, group_size, -1)
            if stop - begin > 1:
                position = np.arange(shift + begin, shift + stop)[:, None, None]
                key = np.arange(first_key, last_key + 1)
                hidden = key > position
                if window_left >= 0:
                    hidden |= key < position - window_left
                logits = np.where(hidden, -np.inf, logits)
            # Every query sees its own key at least, so the maximum is a logit and the sum is at least 1.
            top = logits.max(axis=-1, keepdims=True)
            weights = np.exp(logits - top)
            total = weights.sum(axis=-1, keepdims=True)
            weights /= total
            mixed = weights.reshape(num_kv_heads, -1, weights.shape[-1]) @ values(page_ids, tokens)
            mixed = mixed.reshape(num_kv_heads, stop - begin, group_size, value_dim)
            out[begin:stop] = mixed.swapaxes(0, 1).reshape(-1, num_qo_heads, value_dim)
            lse[begin:stop] = (top + np.log(total))[..., 0].swapaxes(0, 1).reshape(-1, num_qo_heads)
            begin = stop
    return out, lse


def _gather(pages_nhd: np.ndarray, page_ids: np.ndarray, tokens: slice) -> np.ndarray:
    """Return some tokens of some pages in a row, as float64 [num_kv_heads, tokens, head_dim]."""
    gathered: np.ndarray = pages_nhd[page_ids]
    gathered = gathered.reshape(-1, *gathered.shape[2:])[tokens].astype(np.float64)
    return gathered.swapaxes(0, 1)


def _gather_slots(pages_nhd: np.ndarray, page_ids: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Return one token of each page of a row, as `_gather` returns some of each."""
    gathered: np.ndarray = pages_nhd[page_ids, slots].astype(np.float64)
    return gathered.swapaxes(0, 1)


def cascade_decode(
    q: np.ndarray,
    cache: PagedKVCache,
    levels: CascadeLevels,
    *,
    sm_scale: float,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over keys that requests share: as `decode` where each request's keys are listed one by one.

    A request's keys are those of its groups, one level after the other; in a level where it is in no group it has
    none. They are numbered through, and its query tokens are the last of them: so causality and the window go by
    true positions, across the border of a level too.

    Parameters
    ----------
    q : array, shape [tokens, num_qo_heads, head_dim]
    cache : PagedKVCache
    levels : CascadeLevels
        Says with `q_indices` which row of `q` a token is.
    sm_scale, window_left, logits_soft_cap
        As for `decode`.

    Returns
    -------
    out : array, shape of q, float64
    lse : array, shape of q without head_dim, float64
        Rows that are nobody's token are 0 and -inf.
    """
    k_nhd, v_nhd = cache.nhd()
    return _cascade(
        q,
        lambda page_ids, slots: _gather_slots(k_nhd, page_ids, slots),
        lambda page_ids, slots: _gather_slots(v_nhd, page_ids, slots),
        levels,
        page_size=cache.page_size,
        num_kv_heads=cache.num_kv_heads,
        value_dim=cache.head_dim,
        sm_scale=sm_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
    )


def mla_cascade_decode(
    q_ckv: np.ndarray,
    q_kpe: np.ndarray,
    cache: PagedMLACache,
    levels: CascadeLevels,
    *,
    sm_scale: float,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Multi-head latent attention over keys that requests share: `cascade_decode` of what `mla_decode` is.

    Parameters
    ----------
    q_ckv : array, shape [tokens, num_qo_heads, ckv_dim]
    q_kpe : array, shape [tokens, num_qo_heads, kpe_dim]
    cache : PagedMLACache
    levels, sm_scale, window_left, logits_soft_cap
        As for `cascade_decode`.

    Returns
    -------
    out : array, shape of q_ckv, float64
    lse : array, shape [tokens, num_qo_heads], float64
        Rows that are nobody's token are 0 and -inf.
    """
    ckv, kpe = cache.ckv_pages[:, :, None], cache.kpe_pages[:, :, None]

    def keys(page_ids: np.ndarray, slots: np.ndarray) -> np.ndarray:
        return np.concatenate([_gather_slots(a, page_ids, slots) for a in (ckv, kpe)], axis=-1)

    return _cascade(
        np.concatenate([q_ckv, q_kpe], axis=-1),
        keys,
        lambda page_ids, slots: _gather_slots(ckv, page_ids, slots),
        levels,
        page_size=cache.page_size,
        num_kv_heads=1,
        value_dim=cache.ckv_dim,
        sm_scale=sm_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
    )


_GatherSlots = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _cascade(
    q: np.ndarray,
    keys: _GatherSlots,
    values: _GatherSlots,
    levels: CascadeLevels,
    *,
    page_size: int,
    num_kv_heads: int,
    value_dim: int,
    sm_scale: float,
    window_left: int,
    logits_soft_cap: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Do the work of `cascade_decode`. ``keys(page_ids, slots)`` is [num_kv_heads, slots, dim] in float64."""

    def attend(queries: np.ndarray, page_ids: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # To a page table, one request's keys are pages of one token, which go by their numbers.
        numbers, kv_len = np.arange(len(slots), dtype=np.int32), np.array([len(slots)], dtype=np.int32)
        return _decode(
            queries,
            lambda seen, _: keys(page_ids[seen], slots[seen]),
            lambda seen, _: values(page_ids[seen], slots[seen]),
            PageTable.from_dense(numbers[None], kv_len),
            page_size=1,
            num_kv_heads=num_kv_heads,
            value_dim=value_dim,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            qo_indptr=np.array([0, len(queries)]),
        )

    out = np.zeros((*q.shape[:2], value_dim))
    lse = np.full(q.shape[:2], -np.inf)
    last = levels.levels[-1][1]
    for begin, end in itertools.pairwise(range(levels.batch_size + 1) if last is None else last.tolist()):
        if begin < end:
            rows = slice(begin, end) if levels.q_indices is None else levels.q_indices[begin:end]
            out[rows], lse[rows] = attend(q[rows], *_keys_of_request(levels, begin, page_size))
    return out, lse


def _keys_of_request(levels: CascadeLevels, token: int, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return page and slot of every key of the request that has query token `token`, level after level."""
    page_ids, slots = [], []
    for pages, qo_indptr in levels.levels:
        # The last group that begins at the token or before: one that begins there too, but is empty, comes earlier.
        group = token if qo_indptr is None else int(np.searchsorted(qo_indptr, token, side="right")) - 1
        if 0 <= group < pages.batch_size:
            start = None if pages.kv_indptr is None else int(pages.kv_indptr[group])
            row = pages.kv_indices[group if start is None else slice(start, None)]
            column, slot = np.divmod(np.arange(pages.kv_lens[group]), page_size)
            page_ids.append(row[column])
            slots.append(slot)
    return np.concatenate(page_ids), np.concatenate(slots)


def merge_states(out: np.ndarray, lse: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Merge attention states over disjoint sets of keys.

    States ``(out_i, lse_i)`` merge into ``lse = log(sum_i exp(lse_i))`` and ``out = sum_i exp(lse_i - lse) *
    out_i``. This is associative and commutative. A state with ``lse = -inf`` is empty, the identity, whatever
    its `out` holds; a merge of nothing but empty states is ``(0, -inf)``.

    Parameters
    ----------
    out : array, shape [..., n, ..., head_dim]
        States stacked along `axis`.
    lse : array, shape of `out` without head_dim
    axis : int
        An axis of `lse`; negative ones count from its end.

    Returns
    -------
    out : array, shape of `out` without `axis`, float64
    lse : array, shape of `lse` without `axis`, float64
    """
    axis = axis + lse.ndim if axis < 0 else axis
    lse = lse.astype(np.float64)
    top = lse.max(axis=axis, keepdims=True, initial=-np.inf)
    empty = np.isneginf(lse)
    weights = np.exp(lse - np.where(np.isneginf(top), 0.0, top))
    total = weights.sum(axis=axis, keepdims=True)
    # The largest weight is 1, so a total below 1 means that all states are empty: divide their zeros by 1.
    weights /= np.where(total > 0, total, 1.0)
    merged = (weights[..., None] * np.where(empty[..., None], 0.0, out.astype(np.float64))).sum(axis=axis)
    with np.errstate(divide="ignore"):
        return merged, (np.where(np.isneginf(top), 0.0, top) + np.log(total)).squeeze(axis)


def token_positions(kv_lens: np.ndarray, qo_indptr: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Request and position of each new token: the new ones are the last of a request's `kv_lens` tokens.

    Parameters
    ----------
    kv_lens : array, shape [batch], int
        Tokens of each request, the new ones included.
    qo_indptr : array, shape [batch + 1], int, or None
        Offsets of each request's new tokens; None means one each.

    Returns
    -------
    request, position : arrays, shape [tokens], int64
    """
    if qo_indptr is None:
        qo_indptr = np.arange(len(kv_lens) + 1)
    ends = qo_indptr[1:].astype(np.int64)
    request = np.repeat(np.arange(len(kv_lens)), np.diff(qo_indptr))
    return request, np.arange(len(request)) + (kv_lens - ends)[request]


def apply_rope(x: np.ndarray, positions: np.ndarray, rope: Rope) -> np.ndarray:
    """Rotate each token's heads to its position.

    Each pair ``(a, b)`` of dimensions becomes ``(a cos - b sin, a sin + b cos)`` of its angle; see `Rope` for
    which dimensions make a pair and by what angle it turns.

    Parameters
    ----------
    x : array, shape [tokens, heads, head_dim]
    positions : array, shape [tokens], int
    rope : Rope

    Returns
    -------
    array, shape of x, float64
    """
    inv_freq = rope.inv_freq_array(x.shape[-1])
    half = len(inv_freq)
    angle = (positions / rope.scale)[:, None, None] * inv_freq
    cos, sin = np.cos(angle), np.sin(angle)
    if rope.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    rotated = x.astype(np.float64)
    a, b = rotated[..., first].copy(), rotated[..., second].copy()
    rotated[..., first] = a * cos - b * sin
    rotated[..., second] = a * sin + b * cos
    return rotated


def append(
    k: np.ndarray,
    v: np.ndarray,
    cache: PagedKVCache,
    pages: PageTable,
    *,
    qo_indptr: np.ndarray | None = None,
    rope: Rope | None = None,
) -> None:
    """Write new tokens into the cache, in place: the last of each request's ``pages.kv_lens`` tokens.

    A token at a negative position (a request with more new tokens than its length, such as a padding row of
    length 0) is not stored.

    Parameters
    ----------
    k, v : array, shape [tokens, num_kv_heads, head_dim]
    cache : PagedKVCache
    pages : PageTable
        With lengths that count the new tokens already.
    qo_indptr : array, shape [batch + 1], int, optional
        Request ``b`` has new tokens ``qo_indptr[b] .. qo_indptr[b + 1] - 1``; one each by default.
    rope : Rope, optional
        Rotates `k` (not `v`) by the positions before it is stored.
    """
    _append(k, v, *cache.nhd(), pages, qo_indptr, rope)


def mla_append(
    ckv: np.ndarray,
    kpe: np.ndarray,
    cache: PagedMLACache,
    pages: PageTable,
    *,
    qo_indptr: np.ndarray | None = None,
    rope: Rope | None = None,
) -> None:
    """Write new tokens' latent rows into the cache, in place, as `append` does: `kpe` is rotated, `ckv` is not.

    Parameters
    ----------
    ckv : array, shape [tokens, ckv_dim]
    kpe : array, shape [tokens, kpe_dim]
    cache : PagedMLACache
    pages, qo_indptr, rope
        As for `append`.
    """
    ckv_pages, kpe_pages = cache.ckv_pages[:, :, None], cache.kpe_pages[:, :, None]
    _append(kpe[:, None], ckv[:, None], kpe_pages, ckv_pages, pages, qo_indptr, rope)


def _append(
    k: np.ndarray,
    v: np.ndarray,
    k_nhd: np.ndarray,
    v_nhd: np.ndarray,
    pages: PageTable,
    qo_indptr: np.ndarray | None,
    rope: Rope | None,
) -> None:
    request, position = token_positions(pages.kv_lens, qo_indptr)
    k, v = k[: len(request)], v[: len(request)]  # what comes after is padding
    if rope is not None:
        k = apply_rope(k, position, rope)
    stored = position >= 0
    if not stored.all():
        request, position, k, v = request[stored], position[stored], k[stored], v[stored]
    column, slot = np.divmod(position, k_nhd.shape[1])
    if pages.kv_indptr is None:
        page_ids = pages.kv_indices[request, column]
    else:
        page_ids = pages.kv_indices[pages.kv_indptr.astype(np.int64)[request] + column]
    k_nhd[page_ids, slot] = k.astype(k_nhd.dtype, copy=False)
    v_nhd[page_ids, slot] = v.astype(v_nhd.dtype, copy=False)


def rotate_queries(
    q: np.ndarray, pages: PageTable, qo_indptr: np.ndarray | None, rope: Rope | None
) -> np.ndarray:
    """Return a copy of `q` ([tokens, heads, dim]), rotated to the new tokens' positions; padding stays as it is."""
    rotated = q.copy()
    if rope is not None:
        _, positions = token_positions(pages.kv_lens, qo_indptr)
        num_tokens = len(positions)
        rotated[:num_tokens] = apply_rope(q[:num_tokens], positions, rope).astype(q.dtype)
    return rotated
