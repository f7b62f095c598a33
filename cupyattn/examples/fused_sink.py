"""A kernel of one's own on cupyattn's device headers: attention with a sink and ALiBi, from plain CuPy.

    python -m cupyattn.examples.fused_sink

The kernel (fused_sink.cu) takes the page walk and the online softmax from ``cupyattn.get_include()`` and adds
what `cupyattn.decode` has not: a learned sink logit per head (as gpt-oss has) and ALiBi's linear bias. It is
compiled in two ways, by ``cupy.RawModule`` and through cupyattn's registry, and checked against float64.

The sink alone needs no kernel: it is the state ``(out = 0, lse = sink)``, and `cupyattn.merge_states` merges it
into the result of `cupyattn.decode`. That must give the same, so it is checked too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import cupyattn
from cupyattn import KernelSpec, PagedKVCache, PageTable

SOURCE = Path(__file__).with_suffix(".cu")
TYPES = {"float16": "cupyattn::half_t", "bfloat16": "cupyattn::bfloat16_t"}

SPEC = KernelSpec(
    name="sink_decode",
    source=SOURCE,
    symbol="sink_decode",
    template=("T", "kHeadDim"),
    args=(
        *((name, "ptr") for name in ("q", "k_pages", "v_pages", "kv_indptr", "kv_indices", "kv_lens")),
        *((name, "ptr") for name in ("sinks", "slopes", "out")),
        *((f"{kv}_stride_{axis}", "i64") for kv in "kv" for axis in ("page", "token", "head")),
        *((name, "i32") for name in ("num_qo_heads", "group_size", "page_size", "table_row_stride")),
        ("sm_scale", "f32"),
    ),
    instances=lambda arch: [(type_, 128) for type_ in TYPES.values()],
)

# Launches a kernel: grid, block, arguments.
Launch = Callable[[int, int, tuple[Any, ...]], None]


def compile_with_cupy(type_: str, head_dim: int) -> Launch:
    """Compile as any CuPy user does: RawModule, with cupyattn's headers on the include path."""
    import cupy

    # CuPy's disk cache does not look into headers: the version makes it compile again after an update.
    code = f"// cupyattn {cupyattn.__version__}\n{SOURCE.read_text(encoding='utf-8')}"
    name = f"sink_decode<{type_}, {head_dim}>"
    options = ("-std=c++17", "-I" + cupyattn.get_include())
    kernel = cupy.RawModule(code=code, options=options, name_expressions=(name,)).get_function(name)
    # RawKernel takes Python numbers as 64-bit ones and null only as an integer: say each type.
    c_types = {"ptr": np.uintp, "i64": np.int64, "i32": np.int32, "f32": np.float32}

    def launch(grid: int, block: int, args: tuple[Any, ...]) -> None:
        typed = (
            a if hasattr(a, "data") else c_types[kind](0 if a is None else a)
            for a, (_, kind) in zip(args, SPEC.args, strict=True)
        )
        kernel((grid,), (block,), tuple(typed))

    return launch


def compile_with_registry(type_: str, head_dim: int) -> Launch:
    """Compile through cupyattn: arguments are checked, edits of headers are noticed."""
    cupyattn.register_kernel(SPEC, replace=True)
    return cupyattn.get_kernel(SPEC.name, type_, head_dim).launch


def sink_decode(
    launch: Launch, q: Any, cache: PagedKVCache, pages: PageTable, sinks: Any, slopes: Any, sm_scale: float
) -> Any:
    """Run the kernel on CuPy arrays: `q` as for `decode`, `sinks` and `slopes` [num_qo_heads], float32."""
    batch, num_qo_heads, _ = q.shape
    out = q.copy()
    row_stride = pages.kv_indices.shape[1] if pages.is_dense else 0
    args = (
        q, cache.k_pages, cache.v_pages, pages.kv_indptr, pages.kv_indices, pages.kv_lens, sinks, slopes, out,
        *cache.k_strides, *cache.v_strides,
        num_qo_heads, num_qo_heads // cache.num_kv_heads, cache.page_size, row_stride, sm_scale,
    )  # fmt: skip
    launch(batch * num_qo_heads, 32, args)
    return out


def expected(
    q: np.ndarray,
    cache: PagedKVCache,
    pages: PageTable,
    sinks: np.ndarray,
    slopes: np.ndarray,
    sm_scale: float,
) -> np.ndarray:
    """Compute the same in NumPy and float64, by the definition, from NumPy arrays."""
    out = np.zeros(q.shape)
    group_size = q.shape[1] // cache.num_kv_heads
    k_pages, v_pages = cache.nhd()
    for b, kv_len in enumerate(pages.kv_lens):
        token = np.arange(kv_len)
        row = pages.kv_indices[b] if pages.is_dense else pages.kv_indices[pages.kv_indptr[b] :]
        place = row[token // cache.page_size], token % cache.page_size
        # [keys, num_qo_heads, head_dim]
        k, v = (a[place].astype(np.float64).repeat(group_size, axis=1) for a in (k_pages, v_pages))
        logits = np.einsum("hd,thd->ht", q[b].astype(np.float64), k) * sm_scale
        logits -= slopes[:, None] * (kv_len - 1 - token)
        weights = np.exp(np.concatenate([logits, sinks[:, None]], axis=1, dtype=np.float64))
        out[b] = np.einsum("ht,thd->hd", weights[:, :-1], v) / weights.sum(axis=1)[:, None]
    return out


def random_problem(dtype: str, head_dim: int = 128, seed: int = 0) -> tuple[Any, ...]:
    """Three requests, one of them empty, in pages of 16: NumPy arguments of `expected`."""
    rng = np.random.default_rng(seed)
    allocator = cupyattn.PageAllocator(num_pages=32, page_size=16)
    pages = allocator.page_table([allocator.alloc(n) for n in (5, 0, 300)])
    cache = PagedKVCache.allocate(32, 16, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
    for array in (cache.k_pages, cache.v_pages):
        array[...] = rng.standard_normal(array.shape)
    q = rng.standard_normal((3, 8, head_dim)).astype(cache.dtype)
    sinks = rng.standard_normal(8).astype(np.float32)
    slopes = (2.0 ** -np.arange(1, 9)).astype(np.float32)
    return q, cache, pages, sinks, slopes, 1 / math.sqrt(head_dim)


def to_device(q: np.ndarray, cache: PagedKVCache, pages: PageTable, *rest: Any) -> tuple[Any, ...]:
    """Copy the arguments of `expected` to CuPy arrays."""
    import cupy

    def move(a: Any) -> Any:
        return cupy.asarray(a) if isinstance(a, np.ndarray) else a

    return (
        move(q),
        PagedKVCache(move(cache.k_pages), move(cache.v_pages), layout=cache.layout),
        PageTable(move(pages.kv_indptr), move(pages.kv_indices), move(pages.kv_lens)),
        *map(move, rest),
    )


def main() -> int:
    """Check both ways of compiling, and the merge; 0 if all is right."""
    try:
        import cupy

        device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["name"].decode()
    except (ImportError, RuntimeError) as error:
        print(f"This example needs CuPy and a GPU: {error}")
        return 2
    print(f"{SOURCE.name} on {device}; largest errors against float64:")
    right = True
    for dtype, tolerance in (("float16", 1e-3), ("bfloat16", 1e-2)):
        problem = random_problem(dtype)
        host_q, host_cache, host_pages, host_sinks, host_slopes, _ = problem
        q, cache, pages, sinks, slopes, sm_scale = to_device(*problem)
        results = {}
        for way in (compile_with_cupy, compile_with_registry):
            out = sink_decode(way(TYPES[dtype], 128), q, cache, pages, sinks, slopes, sm_scale)
            results[way.__name__] = (out, expected(*problem))
        plain, lse = cupyattn.decode(q, cache, pages, sm_scale=sm_scale, return_lse=True)
        sink_state = cupy.zeros_like(q), cupy.ascontiguousarray(cupy.broadcast_to(sinks, lse.shape))
        merged, _ = cupyattn.merge_states((plain, sink_state[0]), (lse, sink_state[1]))
        results["decode + merge_states, no ALiBi"] = (
            merged,
            expected(host_q, host_cache, host_pages, host_sinks, 0 * host_slopes, sm_scale),
        )
        for name, (actual, wanted) in results.items():
            worst = float(np.abs(actual.get().astype(np.float64) - wanted).max())
            right &= worst <= tolerance
            print(f"  {dtype:<9} {name:<32} {worst:.1e} {'ok' if worst <= tolerance else 'WRONG'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
