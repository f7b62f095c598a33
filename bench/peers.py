"""Peers timed beside us, on the same bits, by the same clock, and checked against the same float64 reference.

torch-sdpa      torch's scaled_dot_product_attention over dense, contiguous K and V: no paging, equal lengths
flashinfer      BatchDecodeWithPagedKVCacheWrapper on CUDA cores; one plan, made outside the timed region
flashinfer-tc   the same on tensor cores
xformers        memory_efficient_attention_forward, the kernel its own choice, over dense K and V as in its own
                benchmark_attn_decoding.py; equal lengths, and only where several query heads share a KV head

Every peer reads the very memory that our row read, viewed as its own layout.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import timing
from bench.timing import Launch, Problem

if TYPE_CHECKING:
    from bench.rows import DecodeInputs

NAN = float("nan")
_MODULES = {
    "torch-sdpa": "torch",
    "flashinfer": "flashinfer",
    "flashinfer-tc": "flashinfer",
    "xformers": "xformers",
}
_DENSE = ("torch-sdpa", "xformers")


class UnsupportedError(Exception):
    """The peer has no such configuration."""


class TorchRunner:
    """Queues torch's work on a CuPy stream and captures it there, in torch's own graph (and memory pool)."""

    def __init__(self, stream: Any) -> None:
        import torch

        self.stream, self._torch = stream, torch
        self._external = torch.cuda.ExternalStream(stream.ptr)

    def current(self) -> Any:
        return self._torch.cuda.stream(self._external)

    def capture(self, launches: Sequence[Launch]) -> Launch:
        graph = self._torch.cuda.CUDAGraph()
        self._torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for launch in launches:
                launch()
        finally:
            graph.capture_end()
        replay: Launch = graph.replay
        return replay


def _to_torch(bits: Any, dtype: str) -> Any:
    """uint16 bits as a torch tensor of `dtype` in the same memory."""
    import torch

    return torch.from_dlpack(bits.view(np.int16)).view(getattr(torch, dtype))


def _to_bits(tensor: Any) -> Any:
    import torch

    return timing.cupy.from_dlpack(tensor.detach().contiguous().view(torch.int16)).view(np.uint16)


def _problem(name: str, inputs: DecodeInputs, launches: Sequence[Launch], outs: list[Any]) -> Problem:
    config = inputs.config
    shape = (config.batch, config.num_qo_heads, config.head_dim)

    def poison() -> None:
        for out in outs:
            out.fill_(NAN)

    def check() -> dict[str, float]:
        return inputs.check(lambda i: _to_bits(outs[i]).reshape(shape))

    return Problem(f"{name} {config.key}", config.num_bytes, config.flops, launches, poison, check)


def _dense(inputs: DecodeInputs, layout: str) -> DecodeInputs:
    if not inputs.config.equal_lens:
        raise UnsupportedError("lengths differ")
    return inputs.as_dense(layout)


def _torch_sdpa(inputs: DecodeInputs) -> Problem:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    config = inputs.config
    dense = _dense(inputs, "HND")
    q, k, v = (_to_torch(x, config.dtype) for x in (dense.q_bits, dense.k_bits, dense.v_bits))
    q = q[:, :, :, None]  # [num_sets, batch, num_qo_heads, 1, head_dim]
    # A captured launch leaves here the tensor that a replay writes.
    outs: list[Any] = [None] * inputs.num_sets
    enable_gqa = config.group_size > 1

    def launch(i: int) -> Launch:
        def run() -> None:
            with torch.no_grad():
                outs[i] = scaled_dot_product_attention(q[i], k[i], v[i], enable_gqa=enable_gqa)

        return run

    return _problem("torch-sdpa", dense, [launch(i) for i in range(inputs.num_sets)], outs)


def _flashinfer(inputs: DecodeInputs, use_tensor_cores: bool) -> Problem:
    import flashinfer
    import torch

    config = inputs.config
    indices = np.tile(inputs.indices[0], (inputs.num_sets, 1))
    inputs = replace(inputs, indices=indices)  # one plan: every set is read through the first one's table
    q, k, v = (_to_torch(x, config.dtype) for x in (inputs.q_bits, inputs.k_bits, inputs.v_bits))
    outs = list(torch.empty_like(q))
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, config.layout, use_tensor_cores=use_tensor_cores
    )
    last_page_len = [(n - 1) % config.page_size + 1 for n in config.lens]
    wrapper.plan(
        torch.from_numpy(inputs.indptr).cuda(),
        torch.from_numpy(indices[0].copy()).cuda(),
        torch.tensor(last_page_len, dtype=torch.int32, device="cuda"),
        config.num_qo_heads,
        config.num_kv_heads,
        config.head_dim,
        config.page_size,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )

    def launch(i: int) -> Launch:
        return lambda: wrapper.run(q[i], (k[i], v[i]), out=outs[i])

    name = "flashinfer-tc" if use_tensor_cores else "flashinfer"
    return _problem(name, inputs, [launch(i) for i in range(inputs.num_sets)], outs)


def _xformers(inputs: DecodeInputs) -> Problem:
    from xformers.ops import memory_efficient_attention_forward

    config = inputs.config
    if config.group_size == 1:
        raise UnsupportedError("one query head a KV head")
    dense = _dense(inputs, "NHD")
    q, k, v = (_to_torch(x, config.dtype) for x in (dense.q_bits, dense.k_bits, dense.v_bits))
    # [num_sets, batch, tokens, num_kv_heads, group_size, head_dim]: keys are broadcast over the group
    q = q.unflatten(2, (config.num_kv_heads, config.group_size))[:, :, None]
    k, v = (x[:, :, :, :, None].expand(-1, -1, -1, -1, config.group_size, -1) for x in (k, v))
    if config.num_kv_heads == 1:
        q, k, v = (x[:, :, :, 0] for x in (q, k, v))
    outs: list[Any] = [None] * inputs.num_sets

    def launch(i: int) -> Launch:
        def run() -> None:
            outs[i] = memory_efficient_attention_forward(q[i], k[i], v[i])

        return run

    return _problem("xformers", dense, [launch(i) for i in range(inputs.num_sets)], outs)


_BUILDERS: dict[str, Callable[[DecodeInputs], Problem]] = {
    "torch-sdpa": _torch_sdpa,
    "flashinfer": lambda inputs: _flashinfer(inputs, use_tensor_cores=False),
    "flashinfer-tc": lambda inputs: _flashinfer(inputs, use_tensor_cores=True),
    "xformers": _xformers,
}


class Peers:
    """Those peers that can be imported here. `versions` says of each its version, or why it is left out."""

    def __init__(self, stream: Any) -> None:
        self.versions: dict[str, str] = {}
        self._names = []
        for name, module in _MODULES.items():
            try:
                self.versions[name] = importlib.import_module(module).__version__
                self._names.append(name)
            except Exception as error:  # a broken installation is a reason too, whatever it raises
                self.versions[name] = f"skipped: {error!r}"
        self._runner: Any = TorchRunner(stream) if self._names else None  # FlashInfer is torch too
        self._timed_dense: dict[tuple[Any, ...], dict[str, Any]] = {}

    def time(self, inputs: DecodeInputs) -> dict[str, dict[str, Any]]:
        """{name: cold figures or {"skipped": reason}}. What has no pages or layouts runs once a shape."""
        result = {}
        config = inputs.config
        shape = (config.lens, config.num_qo_heads, config.num_kv_heads, config.head_dim, config.dtype)
        for name in self._names:
            if (name, shape) in self._timed_dense:
                result[name] = self._timed_dense[name, shape]
                continue
            try:
                result[name] = timing.measure(_BUILDERS[name](inputs), self._runner, only_cold=True)
            except Exception as error:  # a peer that fails must not cost us our own row
                result[name] = {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            if name in _DENSE:
                self._timed_dense[name, shape] = result[name]
        return result
