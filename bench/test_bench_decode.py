"""The grid under pytest-benchmark: `pytest bench --benchmark-only`.

The time that pytest-benchmark shows is one call's wall clock, synchronisation included. What a GPU row is
judged by (cold, warm and eager time, bandwidth, roof, floor, peers) is measured as in a record and put into
`extra_info`. A failed check fails its row; a slow row does not fail: speed is judged by `record.py bench`.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pytest

from bench import configs, timing
from bench.configs import AppendConfig, Config, DecodeConfig, MergeConfig, MLAConfig
from bench.rows import Bench, Pool

NUMPY_GRID: tuple[Config, ...] = (
    configs.equal(1, 256, 32, 8),
    configs.equal(8, 128, 32, 8),
    configs.equal(8, 128, 32, 8, page_size=1, layout="HND", dtype="float16"),
    configs.equal(1, 512, 4, 1, head_dim=256),
    DecodeConfig((1, 700, 64, 33), 8, 2, lens_name="ragged"),
    configs.mla(2, 256, 16),
    MLAConfig((1, 300, 64), 8, num_query_tokens=1, page_size=1, dtype="float16", lens_name="ragged"),
    configs.mla(1, 128, 16, num_query_tokens=2),
    configs.sharing(configs.equal(8, 1152, 8, 8), 1024),
    configs.sharing(configs.mla(16, 1088, 4), 1024),
    MergeConfig(4, 8, 32),
    AppendConfig(8, 1, 8, rope=True),
)


def key(config: Config) -> str:
    return config.key


@pytest.mark.parametrize("config", NUMPY_GRID, ids=key)
def test_numpy(benchmark: Any, config: Config) -> None:
    pool = Pool(np, [config], l2_bytes=0, seed=secrets.randbits(32))
    problem, _ = pool.problem(config)
    problem.poison()
    for launch in problem.launches:
        launch()
    errors = problem.check()
    benchmark.pedantic(problem.launches[0], rounds=5, warmup_rounds=1)
    if benchmark.enabled:
        us = 1e6 * benchmark.stats.stats.median
        benchmark.extra_info.update(eager_us=us, gbs=problem.num_bytes / us * 1e-3, **errors)


@pytest.fixture(scope="module")
def bench() -> Bench:
    if reason := timing.missing_gpu():
        pytest.skip(reason)
    return Bench(configs.GRID, seed=secrets.randbits(32))


@pytest.mark.parametrize("config", configs.GRID, ids=key)
def test_gpu(benchmark: Any, bench: Bench, config: Config) -> None:
    row = bench.row(config)
    for name, peer in row.pop("peers", {}).items():
        row[name] = peer
        if "cold_us" in peer:
            row[f"over_{name}"] = row["cold_us"] / peer["cold_us"]
    benchmark.extra_info.update(
        row, read_roof_gbs=bench.roof.read_gbs, matmul_tflops=bench.roof.matmul_tflops
    )
    problem, _ = bench.pool.problem(config)

    def call() -> None:
        problem.launches[0]()
        bench.runner.stream.synchronize()

    with bench.runner.current():
        timing.cupy.cuda.Device().synchronize()
        benchmark.pedantic(call, rounds=20, warmup_rounds=2)
