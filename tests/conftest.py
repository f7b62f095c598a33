"""Shared fixtures. Problems, poison, oracle and tolerances are in problems.py, the rest of it in device.py."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import hypothesis
import pytest
from device import Pool, size
from frameworks import Framework

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")


@lru_cache
def why_no_gpu() -> str:
    """Why GPU tests cannot run here; empty if they can."""
    try:
        import cupy
    except ImportError as error:
        return f"needs CuPy: {error}"
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "needs a GPU: CuPy finds no device"
        cupy.zeros(1)
    except Exception as error:  # whatever a broken or missing driver raises
        return f"needs a GPU: {type(error).__name__}: {error}"
    return ""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on a CUDA device; skipped where there is none")
    config.addinivalue_line("markers", "alone: measures times, or holds SMs: wants the device for itself")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in getattr(
            item, "fixturenames", ()
        ):  # or `-m gpu`, which is what is recorded, would leave it out
            item.add_marker("gpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and (reason := why_no_gpu()):
        pytest.skip(reason)


@pytest.fixture
def gpu() -> ModuleType:
    """The cupy module; skips the test where there is no GPU."""
    if reason := why_no_gpu():
        pytest.skip(reason)
    import cupy

    return cupy


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest) -> ModuleType:
    """Each array module in turn."""
    return pytest.importorskip(request.param)


@pytest.fixture(scope="session")
def pools():
    """Random pages by (module, dtype), made once."""
    made = {}

    def pool(xp, dtype):
        key = (xp.__name__, dtype)
        if key not in made:
            made[key] = Pool(xp, dtype, size(xp, 1 << 26, 1 << 20))
        return made[key]

    yield pool
    made.clear()


@pytest.fixture(
    params=[
        ("torch", "cpu"), pytest.param(("torch", "gpu"), marks=pytest.mark.gpu),
        ("jax", "cpu"), pytest.param(("jax", "gpu"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)  # fmt: skip
def framework(request: pytest.FixtureRequest) -> Framework:
    """Each framework that is not NumPy or CuPy, on each device."""
    return Framework(*request.param)


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def torch(request: pytest.FixtureRequest) -> Framework:
    """Torch, on each device."""
    return Framework("torch", request.param)
