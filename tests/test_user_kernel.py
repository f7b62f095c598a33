"""Kernels of users: headers compile by themselves, the example is right, the registry takes their spec."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from problems import assert_close

import cupyattn
from cupyattn import reference
from cupyattn.examples import fused_sink
from cupyattn.runtime import compiler, get_spec, registry, source

TOLERANCE = {"float16": 1e-3, "bfloat16": 1e-2}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Kernels that a test registers are gone after it."""
    registry.list_kernels()
    monkeypatch.setattr(registry, "_specs", dict(registry._specs))
    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("type_", fused_sink.TYPES.values())
def test_compiles_with_nothing_but_the_include_path(arch, type_):
    """What any NVRTC user passes; cupyattn's own options are not needed."""
    code = source.read_source(fused_sink.SOURCE)
    options = ("-std=c++17", f"-arch={arch}", "--ptxas-options=-v", "-I" + cupyattn.get_include())
    _, symbol, _, log = compiler.nvrtc().compile(code, f"sink_decode<{type_}, 128>", options)
    assert compiler.parse_resources(log, symbol).spills == 0, log
    assert "warning" not in log.lower(), log


@pytest.mark.parametrize(
    "header", sorted(source.kernels_root().glob("include/cupyattn/*.cuh")), ids=lambda p: p.name
)
def test_each_header_stands_alone(tmp_path, header):
    kernel = tmp_path / "kernel.cu"
    kernel.write_text(f"#include <cupyattn/{header.name}>\n__global__ void kernel() {{}}\n")
    options = ("-std=c++17", "-arch=sm_80", "-I" + cupyattn.get_include())
    _, symbol, _, log = compiler.nvrtc().compile(source.read_source(kernel), "kernel", options)
    assert symbol
    assert "error" not in log.lower()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_registers(arch):
    """The arguments of the spec are those that the compiler saw; all of its instances build."""
    cupyattn.register_kernel(fused_sink.SPEC)
    with pytest.raises(ValueError, match="sink_decode"):
        cupyattn.register_kernel(fused_sink.SPEC)
    spec = get_spec("sink_decode")
    for instance in spec.instances_for(arch):
        build = spec.build(instance, arch)
        assert build.resources.spills == 0, build.log


def test_expected_is_decode_merged_with_the_sink():
    """Without ALiBi: the sink as a state; with sinks of -inf: `decode` itself."""
    q, cache, pages, sinks, slopes, sm_scale = fused_sink.random_problem("float16")
    out, lse = reference.decode(q, cache, pages, sm_scale=sm_scale)
    states = np.stack([out, np.zeros_like(out)]), np.stack([lse, np.broadcast_to(sinks, lse.shape)])
    merged, _ = reference.merge_states(*states)
    assert_close(fused_sink.expected(q, cache, pages, sinks, 0 * slopes, sm_scale), merged, 1e-12)


def test_needs_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert fused_sink.main() == 2
    assert "needs CuPy and a GPU" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("compile_", [fused_sink.compile_with_cupy, fused_sink.compile_with_registry])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_on_the_device(gpu, head_dim, dtype, compile_):
    problem = fused_sink.random_problem(dtype, head_dim, seed=head_dim)
    launch = compile_(fused_sink.TYPES[dtype], head_dim)
    out = fused_sink.sink_decode(launch, *fused_sink.to_device(*problem))
    assert_close(out, fused_sink.expected(*problem), TOLERANCE[dtype])
    assert not out[1].any()  # only the sink: 0


@pytest.mark.gpu
def test_other_strides_and_a_dense_table(gpu):
    """Interleaved HND pages, a dense table: other numbers, the same kernel."""
    from problems import build_problem, to_backend

    host = build_problem([40, 3, 170], layout="HND", storage="interleaved", dense=True, dtype="float16")
    rng = np.random.default_rng(0)
    extra = rng.standard_normal(8).astype("f4"), np.full(8, 0.1, "f4"), 1 / math.sqrt(64)
    there = to_backend(host, gpu)
    launch = fused_sink.compile_with_registry(fused_sink.TYPES["float16"], 64)
    out = fused_sink.sink_decode(
        launch, there.q, there.cache, there.pages, *map(gpu.asarray, extra[:2]), extra[2]
    )
    assert_close(out, fused_sink.expected(host.q, host.cache, host.pages, *extra), TOLERANCE["float16"])


@pytest.mark.gpu
def test_wrong_arguments_are_named(gpu):
    problem = fused_sink.to_device(*fused_sink.random_problem("float16"))
    launch = fused_sink.compile_with_registry(fused_sink.TYPES["float16"], 128)
    with pytest.raises(TypeError, match="sinks"):
        fused_sink.sink_decode(launch, *problem[:3], 1.5, *problem[4:])


@pytest.mark.gpu
def test_the_example_runs(gpu):
    run = subprocess.run(
        [sys.executable, "-m", "cupyattn.examples.fused_sink"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(" ok") == 6
