"""The clock: what a launch costs on the device and on the host, and the two roofs it is measured against.

Each figure is the median of several readings, in microseconds per launch:

cold    a CUDA graph of launches that rotate over input sets which together exceed the L2 cache 2.2 times,
        so that each launch finds its input in HBM; a variant of the launch (`pdl`, `fixed`, of a cascade `plain` and
        `cascade`) is read in the same way
warm    a CUDA graph of launches over one set
eager   a plain Python loop over the sets, wall clock, so host time counts where it is longer than device time
host    the same loop without the wait at its end: what a call costs the host that makes it (of a cascade `levels`);
        of `decode` in the quietest of 40 spells

Graphs are replayed back to back, with one pair of events around each replay. One that holds few launches is
padded with further rounds of the same rotation, because the start of a graph costs microseconds of its own.
"""

from __future__ import annotations

import importlib
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

try:
    cupy: Any = importlib.import_module("cupy")
except ImportError:
    cupy = None

Launch = Callable[[], Any]

REPLAYS = 17
L2_ROTATION = 2.2
_GRAPH_LAUNCHES = 16  # a graph holds about so many launches ...
_GRAPH_BYTES = 8e9  # ... unless that would read more than this (2.7 ms on an H100)

_KERNELS = r"""
// Reads n16 16-byte words and keeps nothing: all CTAs stride over the whole array, eight loads a thread.
extern "C" __global__ void __launch_bounds__(256)
read_stream(const uint4* __restrict__ src, unsigned long long n16, unsigned* sink) {
  const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
  unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned acc = 0;
  for (; i + 7 * stride < n16; i += 8 * stride) {
    uint4 word[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) word[j] = __ldcs(src + i + j * stride);
#pragma unroll
    for (int j = 0; j < 8; ++j) acc += word[j].x ^ word[j].y ^ word[j].z ^ word[j].w;
  }
  for (; i < n16; i += stride) acc += src[i].x ^ src[i].y ^ src[i].z ^ src[i].w;
  if (acc == 0x9e3779b9u) *sink = acc;  // one thread in 4e9: enough to keep the loads alive
}

// Fills n pairs of 16-bit floats with nearly normal numbers (mean 0, deviation 1): a pair from a 64-bit hash
// (SplitMix64) of seed and position, an element from four bytes, whose sum has mean 510 and deviation 147.8.
extern "C" __global__ void
fill_normal(unsigned* dst, unsigned long long n, unsigned long long seed, int is_half) {
  const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
  for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
    unsigned long long z = seed + (i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    unsigned pair = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j, z >>= 32) {
      const int sum = int(z & 255) + int(z >> 8 & 255) + int(z >> 16 & 255) + int(z >> 24 & 255);
      const float x = (sum - 510) * (1.0f / 147.8f);
      unsigned short half;
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
      const unsigned bits = __float_as_uint(x);
      const unsigned brain = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // bfloat16, rounded to nearest even
      pair |= (is_half ? half : brain) << 16 * j;
    }
    dst[i] = pair;
  }
}
"""


def missing_gpu() -> str | None:
    """Why nothing can be timed on a device here, or None where something can."""
    if cupy is None:
        return "CuPy is not installed"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device: {error}"
    return None if count else "no CUDA device"


def _driver_version() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return f"CUDA {cupy.cuda.runtime.driverGetVersion()}"


def environment() -> dict[str, Any]:
    """Device, driver, date and versions: the head of every record."""
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "device": properties["name"].decode(),
        "driver": _driver_version(),
        "date": time.strftime("%Y-%m-%d"),
        "num_sms": properties["multiProcessorCount"],
        "l2_bytes": properties["l2CacheSize"],
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "cupy": cupy.__version__,
            "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
            "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        },
    }


def device_slug(name: str) -> str:
    """The short name that records carry: 'NVIDIA H100 80GB HBM3' -> 'h100'."""
    words = [word for word in re.split(r"[\s-]+", name.lower()) if any(c.isdigit() for c in word)]
    return words[0] if words else "gpu"


class Runner(Protocol):
    """How one framework queues work on `stream` and records it into a graph."""

    stream: Any

    def current(self) -> AbstractContextManager[Any]:
        """Makes `stream` the framework's current stream."""
        ...

    def capture(self, launches: Sequence[Launch]) -> Launch:
        """Records the launches, in order, into one graph; returns what replays it."""
        ...


class CupyRunner:
    def __init__(self) -> None:
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def current(self) -> Any:
        return self.stream

    def capture(self, launches: Sequence[Launch]) -> Launch:
        self.stream.begin_capture()
        try:
            for launch in launches:
                launch()
        finally:  # a stream left capturing would fail every row after this one
            graph = self.stream.end_capture()
        return lambda: graph.launch(self.stream)


@dataclass
class Problem:
    """Something to time: equal launches over different input sets, what each moves and computes, and a check.

    `poison` spoils the outputs; `check` raises AssertionError unless the launches have filled them rightly,
    and returns the errors it saw. `variants` are other ways to launch the same sets, by the name of the figure
    that each one's cold time becomes; they fill the same outputs. `host` are calls that prepare launches, by the name
    of the figure that their host time becomes; `facts` is what a row says besides.
    """

    key: str
    num_bytes: int
    flops: int
    launches: Sequence[Launch]
    poison: Launch
    check: Callable[[], dict[str, float]]
    variants: Mapping[str, Sequence[Launch]] = field(default_factory=dict)
    host: Mapping[str, Launch] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def num_sets(bytes_per_set: int, l2_bytes: int, most: int = 256) -> int:
    """Input sets that a cold measurement rotates over; at least two, however large one is."""
    return min(most, max(2, -int(-L2_ROTATION * l2_bytes // bytes_per_set)))


def _rounds(num_launches: int, bytes_per_launch: int) -> int:
    """How often a graph goes round its sets."""
    by_count = -(-_GRAPH_LAUNCHES // num_launches)
    by_bytes = int(_GRAPH_BYTES // (num_launches * bytes_per_launch))
    return max(1, min(by_count, by_bytes))


def replay_us(replay: Launch, stream: Any, replays: int = REPLAYS) -> float:
    """Median device time of one replay."""
    events = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(replays)]
    replay()
    for start, stop in events:
        start.record(stream)
        replay()
        stop.record(stream)
    stream.synchronize()
    return statistics.median([1e3 * float(cupy.cuda.get_elapsed_time(*pair)) for pair in events])


def eager_us(launches: Sequence[Launch], stream: Any, calls: int, loops: int = 5, wait: bool = True) -> float:
    """Median over `loops` of the wall clock per call of a Python loop, with one synchronisation at its end.

    Without `wait` the clock stops before that. Keep `calls` well below the thousand or so launches that the
    driver queues, or the host waits for the device all the same.
    """
    times = []
    for _ in range(loops):
        stream.synchronize()
        start = time.perf_counter()
        for i in range(calls):
            launches[i % len(launches)]()
        if wait:
            stream.synchronize()
        times.append((time.perf_counter() - start) * 1e6 / calls)
    stream.synchronize()
    return statistics.median(times)


def host_us(launches: Sequence[Launch], stream: Any, calls: int, spells: int = 40) -> tuple[float, float]:
    """Host time per call: of the quietest of `spells`, a tenth of a second apart, and of the one in the middle.

    What others do on the host makes calls take half as long again, or twice as long, for tenths of a second.
    """
    times = []
    for _ in range(spells):
        times.append(eager_us(launches, stream, calls, wait=False))
        time.sleep(0.1)
    return min(times), statistics.median(times)


def _checked_cold_us(
    problem: Problem, launches: Sequence[Launch], runner: Runner
) -> tuple[float, dict[str, float]]:
    """Cold time per launch, and the errors that the check saw in what the very graph that is timed has left."""
    for launch in launches:  # loads modules and makes the allocations that a capture may not make
        launch()
    runner.stream.synchronize()
    rotation = list(launches) * _rounds(len(launches), problem.num_bytes)
    cold = runner.capture(rotation)
    problem.poison()
    cold()
    runner.stream.synchronize()
    errors = problem.check()
    return replay_us(cold, runner.stream) / len(rotation), errors


def measure(problem: Problem, runner: Runner, only_cold: bool = False) -> dict[str, Any]:
    """Checks the problem and reads its cold time, then that of its variants, and warm, eager and host time.

    Raises AssertionError, before the launches in question are timed, where a check fails.
    """
    launches, stream = list(problem.launches), runner.stream
    with runner.current():
        cold_us, errors = _checked_cold_us(problem, launches, runner)
        times = {"cold_us": cold_us}
        if not only_cold:
            for name, variant in problem.variants.items():
                times[name], _ = _checked_cold_us(problem, variant, runner)
            same = launches[:1] * _rounds(1, problem.num_bytes)
            times["warm_us"] = replay_us(runner.capture(same), stream) / len(same)
            calls = int(min(200, max(10, 2e4 / cold_us)))
            times["eager_us"] = eager_us(launches, stream, calls)
            for name, call in problem.host.items():
                times[name] = eager_us([call], stream, calls=3, wait=False)
    return {
        **{name: round(us, 2) for name, us in times.items()},
        "gbs": round(problem.num_bytes / cold_us * 1e-3, 1),
        "tflops": round(problem.flops / cold_us * 1e-6, 2),
        "num_sets": len(launches),
        **errors,
    }


@dataclass(frozen=True)
class Roof:
    """The two ceilings, as measured in this run."""

    read_gbs: float
    matmul_tflops: float

    def floor_us(self, num_bytes: int, flops: int, matmul_share: float = 1.0) -> float:
        return max(num_bytes / self.read_gbs * 1e-3, flops / (matmul_share * self.matmul_tflops) * 1e-6)


class DeviceKernels:
    """The two kernels of this module, compiled for the current device."""

    def __init__(self) -> None:
        module = cupy.RawModule(code=_KERNELS)
        self._read = module.get_function("read_stream")
        self._fill = module.get_function("fill_normal")
        self._num_sms = cupy.cuda.Device().attributes["MultiProcessorCount"]
        self._sink = cupy.zeros(1, np.uint32)

    def read_stream(self, words: Any, ctas_per_sm: int) -> None:
        grid = (self._num_sms * ctas_per_sm,)
        self._read(grid, (256,), (words, np.uint64(words.nbytes // 16), self._sink))

    def fill_normal(self, bits: Any, seed: int, dtype: str) -> None:
        """Fills contiguous uint16 `bits`, an even number, with patterns of `dtype` (bfloat16 or float16)."""
        pairs = bits.view(np.uint32)
        grid = (self._num_sms * 8,)
        self._fill(
            grid, (256,), (pairs, np.uint64(pairs.size), np.uint64(seed), np.int32(dtype == "float16"))
        )


def read_roof_gbs(kernels: DeviceKernels, buffer: Any, runner: Runner) -> float:
    """Best rate of a read-only stream over `buffer` (>= 2 GiB), by halves, over several numbers of CTAs."""
    halves = (buffer[: buffer.size // 2], buffer[buffer.size // 2 :])
    best = 0.0
    with runner.current():
        for ctas_per_sm in (4, 8, 16):
            launches = [partial(kernels.read_stream, half, ctas_per_sm) for half in halves] * 2
            us = replay_us(runner.capture(launches), runner.stream) / len(launches)
            best = max(best, halves[0].nbytes / us * 1e-3)
    return best


def matmul_tflops(stream: Any, n: int = 8192) -> float:
    """Rate of an n^3 matrix product in a short burst: bfloat16 through torch, else float16 through CuPy."""
    try:
        import torch

        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in "ab")
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda.synchronize()
            us = replay_us(lambda: torch.matmul(a, b), stream, replays=7)
    except ImportError:
        with stream:
            a, b = (cupy.random.standard_normal((n, n), dtype=np.float32).astype(np.float16) for _ in "ab")
            us = replay_us(lambda: cupy.matmul(a, b), stream, replays=7)
    return 2 * n**3 / us * 1e-6
