"""Hypothesis strategies for problems: they draw arguments of `build_problem` and its like, which print and shrink."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import strategies as st
from problems import MLA_STORAGES, STORAGES

from cupyattn.rope import Rope

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
MLA_DIMS = (512, 64)  # of ckv and kpe: what a GPU takes
MLA_HEADS = (1, 2, 3, 5, 7, 8, 16, 17, 31, 32, 33, 40, 64, 65, 100, 127, 128)
FIXED_SPLIT_SIZES = st.sampled_from((None, None, None, 64, 128))


@st.composite
def problem_arguments(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32"),
    head_dims: tuple[int, ...] = HEAD_DIMS,
    max_batch: int = 4,
    max_len: int = 200,
    max_qo_len: int = 8,
) -> dict[str, Any]:
    """Arguments of `build_problem`: every layout, storage, table, length and option that `decode` takes."""
    page_size = draw(st.sampled_from((1, 2, 3, 8, 16, 64)))
    # Lengths around page and tile edges are where mistakes are.
    edges = st.sampled_from([n for e in (page_size, 2 * page_size, 64, 128) for n in (e - 1, e, e + 1)])
    length = st.one_of(st.just(0), st.integers(0, max_len), edges.map(lambda n: min(n, max_len)))
    kv_lens = draw(st.lists(length, min_size=0, max_size=max_batch))
    ragged = draw(st.booleans())
    batch = len(kv_lens)
    qo_len = st.integers(0, max_qo_len)
    return {
        "kv_lens": kv_lens,
        "qo_lens": draw(st.lists(qo_len, min_size=batch, max_size=batch)) if ragged else None,
        "page_size": page_size,
        "num_kv_heads": draw(st.integers(1, 4)),
        "group_size": draw(st.sampled_from((1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 32))),
        "head_dim": draw(st.sampled_from(head_dims)),
        "dtype": draw(st.sampled_from(dtypes)),
        "layout": draw(st.sampled_from(("NHD", "HND"))),
        "storage": draw(st.sampled_from(STORAGES)),
        "dense": draw(st.booleans()),
        "window_left": draw(st.one_of(st.just(-1), st.just(0), st.integers(0, max_len))),
        "logits_soft_cap": draw(st.sampled_from((0.0, 0.0, 1.0, 30.0))),
        "sm_scale": draw(st.sampled_from((None, 0.25, 1.0))),
        "spare_entries": draw(st.integers(0, 2)),
        "seed": draw(st.integers(0, 2**16)),
    }


@st.composite
def mla_arguments(
    draw: st.DrawFn,
    *,
    dims: tuple[tuple[int, int], ...] = (MLA_DIMS,),
    num_heads: tuple[int, ...] = MLA_HEADS,
    **limits: Any,
) -> dict[str, Any]:
    """Arguments of `build_mla_problem`; `limits` as for `problem_arguments`."""
    arguments = draw(problem_arguments(**limits))
    for name in ("num_kv_heads", "group_size", "head_dim", "layout"):
        del arguments[name]
    ckv_dim, kpe_dim = draw(st.sampled_from(dims))
    return arguments | {
        "storage": draw(st.sampled_from(MLA_STORAGES)),
        "num_heads": draw(st.sampled_from(num_heads)),
        "ckv_dim": ckv_dim,
        "kpe_dim": kpe_dim,
    }


@st.composite
def cascade_arguments(
    draw: st.DrawFn,
    *,
    mla: bool = False,
    max_requests: int = 7,
    max_shared: int = 4,
    **limits: Any,
) -> dict[str, Any]:
    """Arguments of `build_cascade`; `limits` as for `problem_arguments` or `mla_arguments`."""
    arguments = draw(mla_arguments(**limits) if mla else problem_arguments(**limits))
    for name in ("kv_lens", "qo_lens", "dense"):
        del arguments[name]
    max_len, max_qo_len = limits.get("max_len", 200), limits.get("max_qo_len", 8)
    length = st.one_of(st.just(0), st.integers(0, max_len), st.integers(0, max_len), st.integers(1, 3))
    batch = draw(st.integers(0, max_requests))

    shared = []
    for _ in range(draw(st.one_of(st.integers(0, max_shared), st.just(7)))):
        cuts = sorted(draw(st.lists(st.integers(0, batch), max_size=5)))
        if draw(st.booleans()):  # every request is in a group
            cuts = [0, *cuts, batch]
        sizes = [b - a for a, b in itertools.pairwise(cuts)]
        lens = draw(st.lists(length, min_size=len(sizes), max_size=len(sizes)))
        shared.append((sizes, lens, cuts[0] if cuts else 0))

    ragged, permuted = draw(st.booleans()), draw(st.booleans())
    qo_len = st.one_of(st.just(1), st.integers(0, max_qo_len))
    num_levels = len(shared) + 1
    return arguments | {
        "own_lens": draw(st.lists(length, min_size=batch, max_size=batch)),
        "shared": shared,
        "qo_lens": draw(st.lists(qo_len, min_size=batch, max_size=batch)) if ragged else None,
        "dense": draw(st.lists(st.booleans(), min_size=num_levels, max_size=num_levels)),
        "one_table": draw(st.booleans()),
        "permuted": permuted,
        "padding": draw(st.integers(0, 3)) if ragged or permuted else 0,
        "lead": draw(st.sampled_from((0, 0, 2))) if ragged else 0,
        "mla": mla,
    }


@st.composite
def ropes(draw: st.DrawFn, *, head_dim: int = min(HEAD_DIMS)) -> Rope | None:
    """None, or a `Rope` that suits every head of at least `head_dim`."""
    if draw(st.booleans()):
        return None
    rotary_dim = draw(st.sampled_from((None, 2, 32, head_dim)))
    inv_freq = None
    if rotary_dim is not None and draw(st.booleans()):
        inv_freq = draw(st.lists(st.floats(0, 1), min_size=rotary_dim // 2, max_size=rotary_dim // 2))
    return Rope(
        theta=draw(st.sampled_from((1e4, 1e6))),
        rotary_dim=rotary_dim,
        interleaved=draw(st.booleans()),
        scale=draw(st.sampled_from((1.0, 8.0))),
        inv_freq=inv_freq,
    )
