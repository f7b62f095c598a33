"""`append` on the device: values to the rounding of the dtype, and not one bit changed anywhere else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from device import assert_right, attend, capture, freed, poison, unused_stream
from problems import DTYPES, POISON_PAGE, STORAGES, assert_rounded, build_problem, to_backend, to_host

import cupyattn
from cupyattn import Rope, reference

ROPES = {
    "none": None,
    "half-split": Rope(),
    "interleaved": Rope(interleaved=True),
    "partial": Rope(rotary_dim=32, theta=1e6),
    "partial-interleaved": Rope(rotary_dim=48, interleaved=True, scale=4.0),
    "one-pair": Rope(rotary_dim=2),
    "given": Rope(inv_freq=np.linspace(1.0, 1e-6, 24) ** 2, scale=0.5),
    "given-interleaved": Rope(inv_freq=np.linspace(1.0, 0.0, 16), interleaved=True),
}


def new_tokens(problem, fused=False, seed=1):
    """Random k, v and q on the problem's device; `fused`: slices of one array, as of a fused projection."""
    tokens, num_qo_heads, head_dim = problem.q.shape
    heads = (problem.num_kv_heads, problem.num_kv_heads, num_qo_heads)
    rng = np.random.default_rng(seed)
    everything = rng.standard_normal((tokens, sum(heads), head_dim)).astype(DTYPES[problem.dtype])
    ends = np.cumsum((0, *heads))
    parts = [everything[:, begin:end] for begin, end in itertools.pairwise(ends)]
    if fused:
        on_device = problem.xp.array(everything)
        return parts, [on_device[:, begin:end] for begin, end in itertools.pairwise(ends)]
    return parts, [problem.xp.array(part) for part in parts]


def check_append(problem, rope, *, q_mode="out", fused=False):
    """`q_mode`: "" for no q, "new" for a returned array, "out" for a given one, "in-place"."""
    (k, v, q), (dev_k, dev_v, dev_q) = new_tokens(problem, fused)
    before = [to_host(base).copy() for base in problem.bases]
    given = {}
    if q_mode:
        given["q"] = dev_q
    if q_mode == "out":
        given["q_out"] = poison(problem.xp.empty_like(problem.q))
    elif q_mode == "in-place":
        given["q_out"] = dev_q
    result = cupyattn.append(
        dev_k, dev_v, problem.cache, problem.pages, qo_indptr=problem.qo_indptr, rope=rope, **given
    )

    host = to_backend(problem, np)
    request, position = reference.token_positions(host.kv_lens, host.qo_indptr)

    def rotated(x):
        return x.astype(np.float64) if rope is None else reference.apply_rope(x, position, rope)

    if q_mode:
        assert_rounded(result, rotated(q), problem.dtype, "q")
        assert "q_out" not in given or result is given["q_out"]
        if q_mode != "in-place":
            assert to_host(dev_q).tobytes() == np.ascontiguousarray(q).tobytes()
    else:
        assert result is None

    stored = position >= 0
    column, slot = np.divmod(position[stored], host.cache.page_size)
    request = request[stored]
    if host.kv_indptr is None:
        ids = host.kv_indices[request, column]
    else:
        ids = host.kv_indices[host.kv_indptr[request] + column]
    after = host.replace(bases=tuple(to_host(base).copy() for base in problem.bases))
    k_after, v_after = after.writable()
    assert_rounded(k_after[ids, slot], rotated(k)[stored], problem.dtype, "k")
    assert (v_after[ids, slot].view(np.uint16) == v[stored].view(np.uint16)).all(), (
        "v must be copied bit by bit"
    )
    # With what was there put back into the new tokens' slots, not a bit may differ, padding and NaN included.
    old = host.replace(bases=tuple(before))
    for new_view, old_view in zip((k_after, v_after), old.writable(), strict=True):
        new_view[ids, slot] = old_view[ids, slot]
    for base, base_before in zip(after.bases, before, strict=True):
        assert base.tobytes() == base_before.tobytes(), "something beside the new tokens' slots was written"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rope", ROPES)
def test_rope(xp, rope, dtype):
    kinds = itertools.cycle(itertools.product(("NHD", "HND"), STORAGES, (False, True)))
    q_modes = itertools.cycle(("out", "in-place", "new", ""))
    for fused in (False, True):
        for qo_lens in (None, [1, 5, 0, 17]):
            layout, storage, dense = next(kinds)
            problem = build_problem(
                [1, 40, 3, 17],
                qo_lens=qo_lens,
                layout=layout,
                storage=storage,
                dense=dense,
                dtype=dtype,
                xp=xp,
            )
            check_append(problem, ROPES[rope], q_mode=next(q_modes), fused=fused)


@pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 112, 130, 256, 512])
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_even_head_dim(xp, head_dim, interleaved):
    problem = build_problem([9, 4], head_dim=head_dim, num_kv_heads=3, group_size=2, page_size=5, xp=xp)
    check_append(problem, Rope(interleaved=interleaved), q_mode="in-place")


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_ragged_batches(xp, page_size, layout, storage):
    """Requests without new tokens, with nothing else, and with more of them than their length."""
    for dense in (False, True):
        problem = build_problem(
            [0, 7, 64, 3, 100, 2, 1], qo_lens=[0, 0, 64, 5, 1, 2, 1], page_size=page_size, layout=layout,
            storage=storage, dense=dense, xp=xp,
        )  # fmt: skip
        check_append(problem, Rope())
        check_append(problem, None, q_mode="")


@pytest.mark.parametrize(
    ("kv_lens", "qo_lens"), [([], None), ([0, 0], None), ([], []), ([3], [0]), ([0], [2])]
)
def test_little_or_nothing(xp, kv_lens, qo_lens):
    check_append(to_backend(build_problem(kv_lens, qo_lens=qo_lens), xp), Rope())


def test_many_requests(xp):
    rng = np.random.default_rng(0)
    qo_lens = rng.integers(0, 4, 1500)
    problem = build_problem(
        qo_lens + rng.integers(0, 9, 1500), qo_lens=qo_lens, page_size=4, num_kv_heads=1, group_size=2, xp=xp
    )
    check_append(problem, Rope())


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rope", ["half-split", "partial-interleaved", "given"])
def test_positions_up_to_a_million(xp, rope, dense):
    """Only the last page of each row may be looked up: all other entries are poison."""
    lens = np.array([1_000_000, 999_937, 65, 131_072])
    problem = build_problem([64, 64, 64, 64], qo_lens=[3, 1, 2, 1], page_size=64, dense=True, xp=xp)
    held = -(-lens // 64)
    table = np.full((4, held.max()), POISON_PAGE, np.int32)
    ids = iter(np.random.default_rng(0).permutation(7))  # the problem has 4 pages and 3 spare ones
    for row, pages in zip(table, held, strict=True):
        row[pages - 1] = next(ids)
    table[2, 0] = next(ids)  # the first of its two new tokens is the last of the page before
    if dense:
        problem = problem.replace(kv_indices=xp.asarray(table))
    else:
        rows = np.concatenate([row[:pages] for row, pages in zip(table, held, strict=True)])
        indptr = np.concatenate([[0], np.cumsum(held)]).astype(np.int32)
        problem = problem.replace(kv_indices=xp.asarray(rows), kv_indptr=xp.asarray(indptr))
    check_append(problem.replace(kv_lens=xp.asarray(lens.astype(np.int32))), ROPES[rope])


@pytest.mark.gpu
def test_offsets_beyond_32_bits(gpu):
    page_size, num_kv_heads, head_dim, num_pages = 16, 8, 128, 132_000
    with freed(gpu):
        base = gpu.empty((num_pages, page_size, num_kv_heads, head_dim), np.float16)
        assert base.size > 2**31
        other = gpu.zeros((1, page_size, num_kv_heads, head_dim), np.float16)
        v_pages = gpu.ndarray(base.shape, np.float16, other.data, strides=(0, *other.strides[1:]))
        last = base[-40:]
        last.fill(7.0)
        k = (
            gpu.random.default_rng(0)
            .standard_normal((2, num_kv_heads, head_dim), dtype=np.float32)
            .astype("e")
        )
        table = gpu.asarray(np.array([[num_pages - 1], [num_pages - 30]], np.int32))
        pages = cupyattn.PageTable.from_dense(table, gpu.asarray(np.array([16, 3], np.int32)))
        cupyattn.append(k, gpu.zeros_like(k), (base, v_pages), pages)
        assert (last[-1, 15] == k[0]).all()
        assert (last[-30, 2] == k[1]).all()
        assert int((last != 7.0).any(axis=(2, 3)).sum()) == 2
        del base, last


@pytest.mark.gpu
def test_tokens_of_nobody(gpu):
    """A batch padded for a graph has more tokens than its offsets say: they are left alone."""
    problem = build_problem([9, 5], qo_lens=[2, 3], xp=gpu)
    _, (k, v, q) = new_tokens(problem)
    expected, actual = (problem.replace(bases=tuple(base.copy() for base in problem.bases)) for _ in range(2))
    q_out = cupyattn.append(
        k, v, expected.cache, problem.pages, qo_indptr=problem.qo_indptr, rope=Rope(), q=q
    )
    padded = [gpu.concatenate([a.view(np.uint16), a[:3].view(np.uint16)]).view(a.dtype) for a in (k, v, q)]
    padded_out = poison(gpu.empty_like(padded[2]))
    cupyattn.append(
        *padded[:2], actual.cache, problem.pages, qo_indptr=problem.qo_indptr, rope=Rope(), q=padded[2],
        q_out=padded_out,
    )  # fmt: skip
    assert to_host(padded_out[:5]).tobytes() == to_host(q_out).tobytes()
    assert np.isnan(to_host(padded_out[5:]).astype(np.float32)).all()
    for a, b in zip(actual.bases, expected.bases, strict=True):
        assert to_host(a).tobytes() == to_host(b).tobytes()


# -- CUDA graphs --


@pytest.mark.parametrize("mode", ["Relaxed", "Global"])
def test_graph_replays_follow_changes(xp, mode):
    """Captured with a rope never used before: its frequencies go to the device during the capture."""
    problem = build_problem([40] * 5, qo_lens=[2] * 5, page_size=8, dense=True, xp=xp)
    (_, _, _), (k, v, q) = new_tokens(problem)
    check_append(problem, Rope())  # loads the kernel
    rope = Rope(theta=12345.0 + (mode == "Global"), rotary_dim=48)
    q_out = xp.empty_like(q)
    options = {"qo_indptr": problem.qo_indptr, "rope": rope, "q": q, "q_out": q_out}
    stream = unused_stream(xp)
    if xp is not np:
        xp.cuda.Device().synchronize()
    replay = capture(xp, stream, lambda: cupyattn.append(k, v, problem.cache, problem.pages, **options), mode)
    rng = np.random.default_rng(0)
    for _ in range(20):
        with stream:
            # Other lengths, another split of the tokens; each row of the table holds 5 pages.
            problem.kv_lens[...] = xp.asarray(rng.integers(10, 41, 5).astype(np.int32))
            cuts = np.sort(rng.integers(0, 11, 4))
            problem.qo_indptr[...] = xp.asarray(np.concatenate([[0], cuts, [10]]).astype(np.int32))
            numbers = rng.standard_normal((3, *q.shape))
            host_k, host_q = numbers[0][:, : k.shape[1]].astype(k.dtype), numbers[1].astype(q.dtype)
            k[...], q[...] = xp.asarray(host_k), xp.asarray(host_q)
            poison(q_out)
            replay()
            host = to_backend(problem, np)
        request, position = reference.token_positions(host.kv_lens, host.qo_indptr)
        ids = host.kv_indices[request, position // 8]
        stored = host.writable()[0][ids, position % 8]
        assert_rounded(stored, reference.apply_rope(host_k, position, rope), problem.dtype, "k")
        with stream:
            assert_rounded(q_out, reference.apply_rope(host_q, position, rope), problem.dtype, "q")


@pytest.mark.parametrize("qo_len", [1, 4])
def test_generation_as_one_graph(xp, qo_len):
    """A step: lengths grow on the device, append with rope, decode. Replayed, checked at each step."""
    batch, steps = 3, 40
    start = np.array([0, 15, 200])
    room = start + qo_len * steps
    problem = build_problem(room, qo_lens=[qo_len] * batch, page_size=16, head_dim=128, poison=False, xp=xp)
    lens = problem.kv_lens
    lens[...] = xp.asarray(start.astype(np.int32))
    rope = Rope(theta=1e6)
    _, (k, v, q) = new_tokens(problem)
    q_rotated, out = xp.empty_like(q), xp.empty_like(q)
    lse = xp.empty(q.shape[:2], np.float32)
    rotated = problem.replace(q=q_rotated)

    def step():
        xp.add(lens, qo_len, out=lens)
        cupyattn.append(
            k, v, problem.cache, problem.pages, qo_indptr=problem.qo_indptr, rope=rope, q=q, q_out=q_rotated
        )
        rotated.call(cupyattn.decode, out=out, lse=lse)

    step()  # loads the kernels
    xp.subtract(lens, qo_len, out=lens)
    stream = unused_stream(xp)
    if xp is not np:
        xp.cuda.Device().synchronize()
    replay = capture(xp, stream, step)
    for i in range(steps):
        _, fresh = new_tokens(problem, seed=i)
        if xp is not np:
            xp.cuda.Device().synchronize()  # made on another stream
        with stream:
            for array, values in zip((k, v, q), fresh, strict=True):
                array[...] = values
            poison(out)
            replay()
            assert_right(out, lse, attend(rotated), problem.dtype, f"step {i}")
