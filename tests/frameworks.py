"""torch and JAX in tests: how arrays go in and out."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

from cupyattn import PagedKVCache, PagedMLACache, PageTable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take three quarters of the GPU
bfloat16 = np.dtype(ml_dtypes.bfloat16)


class Framework:
    """One framework on one device: how arrays go in and out."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device
        self.module = pytest.importorskip(name)
        if device == "gpu":
            self.need_gpu()

    def need_gpu(self) -> None:
        if self.name == "torch" and not self.module.cuda.is_available():
            pytest.skip("torch sees no GPU")
        if self.name == "jax":
            try:
                self.module.devices("gpu")
            except RuntimeError as error:
                pytest.skip(f"JAX sees no GPU: {error}".partition("\n")[0])

    def array(self, a):
        """Copy a NumPy array."""
        if a is None:
            return None
        if self.name == "jax":
            return self.module.device_put(a.copy(), self.module.devices(self.device)[0])
        if a.dtype == bfloat16:
            tensor = self.module.from_numpy(a.view(np.int16).copy()).view(self.module.bfloat16)
        else:
            tensor = self.module.from_numpy(a.copy())
        return tensor.cuda() if self.device == "gpu" else tensor

    def numpy(self, a):
        assert self.owns(a)
        if self.name == "jax":
            return np.asarray(a)
        a = a.cpu()
        return (
            a.view(self.module.int16).numpy().view(bfloat16) if a.dtype == self.module.bfloat16 else a.numpy()
        )

    def owns(self, a) -> bool:
        if self.name == "jax":
            return isinstance(a, self.module.Array) and {d.platform for d in a.devices()} == {self.device}
        return isinstance(a, self.module.Tensor) and a.is_cuda == (self.device == "gpu")


def arguments(framework, problem, *, pair=False):
    """(q, cache, pages), options of `problem` as arrays of the framework."""
    parts = (
        (problem.k_pages, problem.v_pages)
        if problem.ckv_dim is None
        else (problem.ckv_pages, problem.kpe_pages)
    )
    first, second = (framework.array(np.ascontiguousarray(a)) for a in parts)
    if problem.ckv_dim is not None:
        cache = PagedMLACache(first, second)
    else:
        cache = (first, second) if pair else PagedKVCache(first, second, layout=problem.layout)
    pages = PageTable(*map(framework.array, (problem.kv_indptr, problem.kv_indices, problem.kv_lens)))
    options = problem.options | {"qo_indptr": framework.array(problem.qo_indptr)}
    return (framework.array(problem.q), cache, pages), options
