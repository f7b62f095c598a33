"""Every registered instance of every kernel compiles for each generation of chips: no spills, no serial products."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import pytest

from cupyattn.kernels import _STATIC_SHARED_BYTES, DecodeConfig, DecodeSm90Config, MLASm90Config
from cupyattn.runtime import CI_ARCHS, Build, get_spec, list_kernels

pytestmark = pytest.mark.slow

Instance: TypeAlias = tuple[str, str, tuple[Any, ...]]  # arch, kernel, template arguments

INSTANCES: list[Instance] = [
    (arch, spec.name, args)
    for arch in CI_ARCHS
    for spec in list_kernels()
    for args in spec.instances_for(arch)
]


def build(instance: Instance) -> Build:
    arch, name, args = instance
    return get_spec(name).build(args, arch)


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> Iterator[Callable[[Instance], Build]]:
    """Compile what this run has selected, on all cores and ahead of the tests that wait for it."""
    selected = [
        item.callspec.params["instance"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_compiles_without_spills.__name__
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {instance: pool.submit(build, instance) for instance in selected}
        yield lambda instance: futures[instance].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda i: f"{i[0]}-{get_spec(i[1]).expression(i[2])}")
def test_compiles_without_spills(instance: Instance, built: Callable[[Instance], Build]) -> None:
    result = built(instance)
    assert result.resources.spills == 0, result.log
    if instance[1] in ("mla_sm90", "mla_sm90_cascade"):  # which take an SM alone
        config = MLASm90Config(int(instance[2][1]))
        assert result.resources.static_smem + config.shared_bytes <= 227 * 1024
    elif instance[1] == "decode_sm90_cascade":  # this too
        shared_bytes = DecodeSm90Config().shared_bytes(int(instance[2][1]))
        assert result.resources.static_smem + shared_bytes <= 227 * 1024
    elif instance[1] in ("decode", "decode_cascade"):  # this instead of notes has where rows stand
        shape = DecodeConfig(*map(int, instance[2][2:9]))
        assert result.resources.static_smem <= shape.static_shared_bytes
    else:
        assert result.resources.static_smem <= _STATIC_SHARED_BYTES
    assert "warning" not in result.log.lower(), result.log
    # What ptxas says of products that it must not let overlap, and of waits that it had to add.
    assert not re.search(r"wgmma.*serialized|wait is injected", result.log), result.log


def test_every_kernel_has_instances_for_every_arch_it_supports() -> None:
    for spec in list_kernels():
        for arch in CI_ARCHS:
            assert bool(spec.instances_for(arch)) == spec.supports(arch), (spec.name, arch)
            assert len(set(spec.instances_for(arch))) == len(spec.instances_for(arch)), (spec.name, arch)
