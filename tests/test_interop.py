"""torch and JAX arrays in, the same framework out: values, identity, no copies, the caller's stream."""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType

import numpy as np
import pytest
from frameworks import Framework, arguments, bfloat16
from problems import TOLERANCE, assert_close, build_problem, oracle, to_backend

import cupyattn
from cupyattn import PagedKVCache, PageTable, Rope, checks, interop, reference

PROBLEMS = {
    "csr": {"kv_lens": [0, 5, 300, 64], "dtype": "float16"},
    "dense": {"kv_lens": [3, 170], "dense": True, "layout": "HND", "dtype": "bfloat16"},
    "ragged": {"kv_lens": [9, 40, 0], "qo_lens": [2, 9, 1], "window_left": 7, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_decode(framework, name, validate):
    problem = build_problem(**PROBLEMS[name], poison_window=False)
    expected, expected_lse = oracle(problem)
    args, options = arguments(framework, problem, pair=problem.layout == "NHD")
    out, lse = cupyattn.decode(*args, **options, return_lse=True, validate=validate)
    assert out.dtype == args[0].dtype
    assert_close(framework.numpy(out), expected, TOLERANCE[problem.dtype])
    assert_close(framework.numpy(lse), expected_lse, 1e-3, "lse")
    alone = cupyattn.decode(*args, **options)
    assert framework.numpy(alone).tobytes() == framework.numpy(out).tobytes()
    split = cupyattn.decode(*args, **options, fixed_split_size=64)
    assert_close(framework.numpy(split), expected, TOLERANCE[problem.dtype])


@pytest.mark.parametrize("name", PROBLEMS)
def test_decode_workspace_bytes(framework, name):
    problem = build_problem(**PROBLEMS[name])
    args, options = arguments(framework, problem)
    size = {"qo_indptr": options["qo_indptr"], "fixed_split_size": 64}
    if framework.device == "cpu":
        with pytest.raises(TypeError, match=r"^decode_workspace_bytes: q must be a CuPy array, got ndarray"):
            cupyattn.decode_workspace_bytes(*args, **size)
        return
    import cupy

    native = to_backend(problem, cupy)
    size["qo_indptr"] = native.qo_indptr
    expected = cupyattn.decode_workspace_bytes(native.q, native.cache, native.pages, **size)
    size["qo_indptr"] = options["qo_indptr"]
    assert cupyattn.decode_workspace_bytes(*args, **size) == expected


def test_numbers_come_back_as_they_are(framework):
    array = framework.array(np.ones(3, np.float32))
    assert interop.call(lambda a: a.size, array, array) == 3


@pytest.mark.parametrize("name", PROBLEMS)
def test_decode_writes_where_it_is_told(torch, name):
    problem = build_problem(**PROBLEMS[name])
    args, options = arguments(torch, problem)
    out = torch.module.full_like(args[0], float("nan"))
    lse = torch.module.full(args[0].shape[:2], float("nan"), device=args[0].device)
    result = cupyattn.decode(*args, **options, out=out, lse=lse, return_lse=True)
    assert result[0] is out
    assert result[1] is lse
    expected, expected_lse = oracle(problem)
    assert_close(torch.numpy(out), expected, TOLERANCE[problem.dtype])
    assert_close(torch.numpy(lse), expected_lse, 1e-3, "lse")
    assert cupyattn.decode(*args, **options, out=out) is out


def test_strided_views_of_one_tensor(torch):
    """K and V interleaved, HND, q a slice of a fused projection, out a transposed one."""
    problem = build_problem([70, 9, 130], storage="interleaved", layout="HND", dense=True, dtype="float16")
    q, kv = torch.array(problem.q), torch.array(problem.bases[0])
    fused = torch.module.zeros((3, 12, 64), dtype=q.dtype, device=q.device)
    fused[:, :8] = q
    out = torch.module.empty((8, 3, 64), dtype=q.dtype, device=q.device).transpose(0, 1)
    cache = PagedKVCache.from_interleaved(kv, layout="HND")
    pages = PageTable.from_dense(torch.array(problem.kv_indices), torch.array(problem.kv_lens))
    assert cupyattn.decode(fused[:, :8], cache, pages, out=out) is out
    assert_close(torch.numpy(out), oracle(problem)[0], TOLERANCE["float16"])


def test_gradients_are_not_asked_for(torch):
    problem = build_problem([20], dtype="float16")
    (q, cache, pages), options = arguments(torch, problem)
    out = cupyattn.decode(q.requires_grad_(), cache, pages, **options)
    assert not out.requires_grad
    assert_close(torch.numpy(out), oracle(problem)[0], TOLERANCE["float16"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_append(torch, dtype):
    """The cache is written where it lies, and equals what NumPy makes of it."""
    problem = build_problem([5, 33, 0], qo_lens=[2, 30, 0], dtype=dtype, poison=False)
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((32, 2, 64)).astype(problem.q.dtype) for _ in range(2))
    (q, cache, pages), options = arguments(torch, problem)
    addresses = cache.k_pages.data_ptr(), cache.v_pages.data_ptr()
    rope = Rope(theta=1e6, interleaved=True)
    common = {"qo_indptr": options["qo_indptr"], "rope": rope}
    rotated = cupyattn.append(torch.array(k), torch.array(v), cache, pages, **common, q=q)
    assert (cache.k_pages.data_ptr(), cache.v_pages.data_ptr()) == addresses
    _, positions = reference.token_positions(problem.kv_lens, problem.qo_indptr)
    tolerance = {"float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    assert_close(torch.numpy(rotated), reference.apply_rope(problem.q, positions, rope), tolerance, "q")
    reference.append(k, v, problem.cache, problem.pages, qo_indptr=problem.qo_indptr, rope=rope)
    assert_close(torch.numpy(cache.k_pages), problem.k_pages.astype(np.float64), tolerance, "k_pages")
    assert torch.numpy(cache.v_pages).tobytes() == np.ascontiguousarray(problem.v_pages).tobytes()

    q_out = torch.module.empty_like(q)
    result = cupyattn.append(torch.array(k), torch.array(v), cache, pages, **common, q=q, q_out=q_out)
    assert result is q_out
    assert torch.numpy(q_out).tobytes() == torch.numpy(rotated).tobytes()
    assert cupyattn.append(torch.array(k), torch.array(v), cache, pages, **common, q=q, q_out=q) is q
    assert torch.numpy(q).tobytes() == torch.numpy(rotated).tobytes()
    assert cupyattn.append(torch.array(k), torch.array(v), cache, pages, **common) is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_merge(framework, dtype):
    rng = np.random.default_rng(0)
    host_out = rng.standard_normal((3, 4, 16), dtype=np.float32).astype(
        dtype if dtype != "bfloat16" else bfloat16
    )
    host_lse = rng.standard_normal((3, 4), dtype=np.float32)
    host_lse[1, 2] = -np.inf
    out, lse = framework.array(host_out), framework.array(host_lse)
    for axis in (0, 1):
        expected = reference.merge_states(host_out, host_lse, axis)
        merged = cupyattn.merge_states(out, lse, axis)
        assert merged[0].dtype == out.dtype
        assert_close(framework.numpy(merged[0]), expected[0], max(TOLERANCE[dtype], 1e-5))
        assert_close(framework.numpy(merged[1]), expected[1], 1e-5, "lse")
    for n in (1, 2, 3):
        expected = reference.merge_states(host_out[:n], host_lse[:n])
        outs, lses = [out[i] for i in range(n)], [lse[i] for i in range(n)]
        merged = cupyattn.merge_states(outs, lses)
        assert_close(framework.numpy(merged[0]), expected[0], max(TOLERANCE[dtype], 1e-5))
        assert_close(framework.numpy(merged[1]), expected[1], 1e-5, "lse")


def test_merge_into(torch):
    host_out, host_lse = (
        np.random.default_rng(0).standard_normal((2, 4, 16)).astype("f4"),
        np.zeros((2, 4), "f4"),
    )
    expected = reference.merge_states(host_out, host_lse)
    outs, lses = [torch.array(a) for a in host_out], [torch.array(a) for a in host_lse]
    merged = cupyattn.merge_states(outs, lses, into=(outs[1], lses[1]))
    assert merged[0] is outs[1]
    assert merged[1] is lses[1]
    assert_close(torch.numpy(outs[1]), expected[0], 1e-5)
    assert_close(torch.numpy(lses[1]), expected[1], 1e-5)


# -- no copies --


def test_arrays_are_views(framework):
    for dtype in ("float16", "float32", "int32", bfloat16):
        a = framework.array(np.arange(24).reshape(2, 3, 4).astype(dtype))
        native = interop.to_native(a)
        assert interop.framework_of(native) == ("numpy" if framework.device == "cpu" else "cupy")
        assert native.dtype == dtype
        assert checks.data_pointer(native) == checks.data_pointer(a)
        if framework.name == "torch":  # JAX has the right to copy what it did not allocate itself
            back = interop.from_native(native, "torch")
            assert back.dtype == a.dtype
            assert back.data_ptr() == a.data_ptr()
            view = interop.to_native(a[:, 1:].transpose(0, 1))
            assert checks.data_pointer(view) == a[:, 1:].data_ptr()
            assert checks.element_strides(view) == (4, 12, 1)


# -- JAX arrays cannot be written --


def test_immutable(framework):
    if framework.name != "jax":
        pytest.skip("JAX alone has immutable arrays")
    problem = build_problem([9], dtype="float16")
    (q, cache, pages), _ = arguments(framework, problem)
    for name in ("out", "lse"):
        with pytest.raises(TypeError, match=rf"{name}.*immutable"):
            cupyattn.decode(q, cache, pages, **{name: q})
    new = framework.array(np.zeros((1, 2, 64), np.float16))
    with pytest.raises(TypeError, match=r"cache.*immutable"):
        cupyattn.append(new, new, cache, pages)
    out, lse = framework.array(np.zeros((2, 4), "f4")), framework.array(np.zeros(2, "f4"))
    with pytest.raises(TypeError, match=r"into.*immutable"):
        cupyattn.merge_states(out, lse, into=(out[0], lse[0]))


# -- frameworks do not mix --


def kinds(request) -> dict[str, ModuleType]:
    """Conversions from NumPy into every framework that is there."""
    found = {"numpy": np.asarray}
    for name in ("torch", "jax"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        found[name] = module.from_numpy if name == "torch" else module.numpy.asarray
    if request.node.get_closest_marker("gpu"):
        found["cupy"] = importlib.import_module("cupy").asarray
    return found


@pytest.mark.parametrize("where", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_mixed_frameworks_raise(request, where):
    problem = build_problem([9, 4], dtype="float16")
    found = kinds(request)
    if len(found) < 2:
        pytest.skip("only NumPy is here")
    parts = (
        problem.q,
        problem.k_pages,
        problem.v_pages,
        problem.kv_indptr,
        problem.kv_indices,
        problem.kv_lens,
    )
    new = np.zeros((2, 2, 64), np.float16)
    states = np.zeros((2, 4), "f4"), np.zeros(2, "f4")
    accepted = []

    def must_raise(what, call):
        try:
            call()
        except TypeError:
            return
        except Exception as error:
            what += f" ({type(error).__name__}: {error})"
        accepted.append(what)

    for (first, to_first), (second, to_second) in itertools.permutations(found.items(), 2):
        for odd, name in enumerate(("q", "k_pages", "v_pages", "kv_indptr", "kv_indices", "kv_lens")):
            q, k, v, *table = (to_second(a) if i == odd else to_first(a) for i, a in enumerate(parts))
            must_raise(
                f"decode of {first} with {name} of {second}",
                lambda q=q, k=k, v=v, table=table: cupyattn.decode(q, PagedKVCache(k, v), PageTable(*table)),
            )
        k, table = to_first(new), PageTable(*map(to_first, parts[3:]))
        cache = tuple(map(to_second, parts[1:3]))
        must_raise(
            f"append of {first} to {second}", lambda k=k, c=cache, t=table: cupyattn.append(k, k, c, t)
        )
        out, lse = to_first(states[0]), to_second(states[1])
        must_raise(
            f"merge of {first} out with {second} lse", lambda o=out, s=lse: cupyattn.merge_states(o, s)
        )
    assert not accepted


@pytest.mark.gpu
def test_mixed_devices_raise(gpu):
    torch = Framework("torch", "gpu")
    problem = build_problem([9, 4], dtype="float16")
    (q, cache, pages), options = arguments(torch, problem)
    for bad in ((q.cpu(), cache, pages), (q, (cache.k_pages.cpu(), cache.v_pages.cpu()), pages)):
        with pytest.raises((TypeError, ValueError)):
            cupyattn.decode(*bad, **options)
    with pytest.raises((TypeError, ValueError)):
        cupyattn.decode(
            q, cache, PageTable(pages.kv_indptr, pages.kv_indices, pages.kv_lens.cpu()), **options
        )


@pytest.mark.parametrize("thing", [None, [1, 2], "q", 3.0])
def test_things_that_are_no_arrays(thing):
    problem = build_problem([9], dtype="float16")
    with pytest.raises(TypeError):
        cupyattn.decode(thing, problem.cache, problem.pages)
    with pytest.raises(TypeError):
        cupyattn.decode(problem.q, (thing, thing), problem.pages)


# -- get_array_module --


def test_get_array_module(xp):
    a = xp.zeros(3, np.float32)
    cache = PagedKVCache.allocate(1, 1, 1, 64, dtype="float16", xp=xp)
    pages = PageTable.from_dense(xp.zeros((1, 1), np.int32), xp.ones(1, np.int32))
    for things in ((a,), (None, a), (1.0, np.zeros(1), a), (cache,), (pages,), (cache, np.zeros(1))):
        assert cupyattn.get_array_module(*things) is xp, things
    for things in ((), (None,), (np.zeros(1), 2.0), ("text", [1])):
        assert cupyattn.get_array_module(*things) is np, things
    if xp is not np:
        assert cupyattn.get_array_module(a, np.zeros(1)) is xp.get_array_module(a, np.zeros(1))


# -- the caller's stream --


def slow(torch, milliseconds=30):
    """A producer that takes its time."""
    torch.cuda._sleep(int(milliseconds * 1.7e6))  # cycles


@pytest.mark.alone
@pytest.mark.gpu
def test_torch_stream_order(gpu):
    """Inputs come late on the caller's stream, outputs are read at once on it: no wait, nothing stale."""
    torch = Framework("torch", "gpu")
    problem = build_problem([500, 64, 9], dtype="float16")
    (q, cache, pages), options = arguments(torch, problem)
    late = torch.module.full_like(q, float("nan"))
    k_late, v_late = (torch.module.full_like(a, float("nan")) for a in (cache.k_pages, cache.v_pages))
    lens_late = torch.module.zeros_like(pages.kv_lens)
    cupyattn.decode(q, cache, pages, **options)  # loads the kernel
    torch.module.cuda.synchronize()
    for stream in (
        torch.module.cuda.Stream(),
        torch.module.cuda.Stream(),
        torch.module.cuda.default_stream(),
    ):
        with torch.module.cuda.stream(stream):
            cupyattn.decode(q, cache, pages, **options, return_lse=True)  # allocates what a stream needs once
            late.fill_(float("nan"))
            lens_late.zero_()
        torch.module.cuda.synchronize()
        with torch.module.cuda.stream(stream):
            slow(torch.module)
            late.copy_(q)
            k_late.copy_(cache.k_pages)
            v_late.copy_(cache.v_pages)
            lens_late.copy_(pages.kv_lens)
            out, lse = cupyattn.decode(
                late, (k_late, v_late), PageTable(pages.kv_indptr, pages.kv_indices, lens_late), **options,
                return_lse=True,
            )  # fmt: skip
            read = out.clone()
            late.fill_(float("nan"))  # must not overtake
            assert not stream.query(), "the call waited for the stream"
        stream.synchronize()
        assert_close(torch.numpy(read), oracle(problem)[0], TOLERANCE["float16"])
        assert_close(torch.numpy(lse), oracle(problem)[1], 1e-3, "lse")


@pytest.mark.gpu
def test_torch_streams_survive(gpu):
    """The wrappers around the caller's streams do not destroy them."""
    torch = Framework("torch", "gpu")
    (q, cache, pages), options = arguments(torch, build_problem([50], dtype="float16"))
    stream = torch.module.cuda.Stream()
    for _ in range(20):
        with torch.module.cuda.stream(stream):
            out = cupyattn.decode(q, cache, pages, **options)
    stream.synchronize()
    assert stream.query()
    assert bool(torch.module.isfinite(out).all())
    assert gpu.cuda.get_current_stream() == gpu.cuda.Stream.null  # CuPy's own choice is as it was


@pytest.mark.alone
@pytest.mark.gpu
def test_append_and_merge_on_the_stream_of_torch(gpu):
    torch = Framework("torch", "gpu")
    new, into = (torch.array(np.ones((1, 2, 64), np.float16)) for _ in range(2))
    cache = PagedKVCache(*(torch.array(np.zeros((2, 4, 2, 64), np.float16)) for _ in range(2)))
    pages = PageTable.from_dense(torch.array(np.ones((1, 1), np.int32)), torch.array(np.ones(1, np.int32)))
    lse = torch.array(np.zeros((1, 2), np.float32))
    cupyattn.append(new, new, cache, pages)
    cupyattn.merge_states([new, new], [lse, lse])
    cache.k_pages.zero_()
    torch.module.cuda.synchronize()
    stream = torch.module.cuda.Stream()
    with torch.module.cuda.stream(stream):
        slow(torch.module)
        new.fill_(3.0)
        cupyattn.append(new, new, cache, pages)
        merged, _ = cupyattn.merge_states([new, new], [lse, lse], into=(into, lse.clone()))
        copies = cache.k_pages.clone(), merged.clone()
        assert not stream.query(), "a call waited for the stream"
    stream.synchronize()
    assert (torch.numpy(copies[0])[1, 0] == 3.0).all()
    assert (torch.numpy(copies[1]) == 3.0).all()


@pytest.mark.gpu
def test_jax_order(gpu):
    """JAX computes asynchronously on streams of its own."""
    jax = Framework("jax", "gpu")
    jnp = jax.module.numpy
    problem = build_problem([500, 64, 9], dtype="float16")
    (q, cache, pages), options = arguments(jax, problem)
    big = jax.array(np.full((4096, 4096), 1e-4, np.float32))
    for _ in range(3):
        busy = big
        for _ in range(10):
            busy = busy @ big
        late = q + (busy[0, 0] * 0).astype(q.dtype)
        out = cupyattn.decode(late, cache, pages, **options)
        assert_close(jax.numpy(jnp.asarray(out)), oracle(problem)[0], TOLERANCE["float16"])


def test_numpy_scalars_are_no_arrays():
    torch = pytest.importorskip("torch")
    k = torch.zeros(1, 4, 2, 64, dtype=torch.float16)
    q = torch.zeros(1, 2, 64, dtype=torch.float16)
    pages = cupyattn.PageTable.from_dense(
        torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    )
    out = cupyattn.decode(q, (k, k), pages, sm_scale=np.float64(0.125), window_left=np.int64(3))
    assert isinstance(out, torch.Tensor)
