"""Shared fixtures. Problems, poison, oracle and tolerances are in problems.py."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import hypothesis
import pytest

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
