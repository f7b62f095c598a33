"""Signatures and addresses: what tells calls apart, and what is looked at only once."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from problems import build_problem

import cupyattn
from cupyattn import PagedKVCache, PageTable
from cupyattn.plan import look, split


class DeviceArray:
    """An array on a device, as far as signatures and checks go; counts what it is asked for."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str, device: int = 0) -> None:
        self.asked: Counter[str] = Counter()
        memory = SimpleNamespace(ptr=address, device_id=device)
        host = np.empty(shape, dtype)
        self._facts = {"shape": shape, "strides": host.strides, "dtype": host.dtype, "data": memory}

    def __getattr__(self, name: str) -> Any:
        try:
            fact = self._facts[name]
        except KeyError:
            raise AttributeError(name) from None
        self.asked[name] += 1
        return fact


def cache_at(address: int, num_pages: int = 4, device: int = 0, layout: str = "NHD") -> PagedKVCache:
    k_pages, v_pages = (DeviceArray(a, (num_pages, 2, 2, 8), "f2", device) for a in (address, 2 * address))
    return PagedKVCache(k_pages, v_pages, layout=layout)


def seen(*operands: Any) -> Any:
    """Key, signature and place."""
    key = look(operands)
    return key, *split(operands, key)


def test_wrapped_arrays_are_looked_at_once():
    arrays = [DeviceArray(64 * i, (3,), "i4") for i in range(1, 3)]
    table = PageTable(None, DeviceArray(192, (3, 5), "i4"), arrays[0])
    cache = cache_at(4096)
    first = seen(cache, table)
    held = (cache.k_pages, cache.v_pages, table.kv_indices, table.kv_lens)
    before = [Counter(a.asked) for a in held]
    assert seen(cache, table) == first
    assert [a.asked for a in held] == before
    assert first[2] == (4096, 8192, 0, 192, 64)


def test_equal_wrappers_have_one_signature_and_their_own_addresses():
    key, one, place = seen(cache_at(4096))
    other_key, other, other_place = seen(cache_at(1 << 20))
    assert one == other
    assert (place, other_place) == ((4096, 8192), (1 << 20, 2 << 20))
    assert key == look((cache_at(4096),)) != other_key


@pytest.mark.parametrize("change", [{"layout": "HND"}, {"num_pages": 5}, {"device": 1}])
def test_what_checks_depend_on_is_in_the_signature(change):
    (key, good, _), (other_key, changed, _) = seen(cache_at(4096)), seen(cache_at(4096, **change))
    assert good != changed
    assert key != other_key


def test_addresses_of_a_known_signature_are_checked_too():
    problem = build_problem([5, 0, 33], page_size=8, dtype="float16")
    memory = np.zeros((2, *problem.q.shape), np.float16)
    q = memory[0]
    q[...] = problem.q
    for _ in range(2):
        cupyattn.decode(q, problem.cache, problem.pages, out=memory[1])
        with pytest.raises(ValueError, match="out must not overlap q"):
            cupyattn.decode(q, problem.cache, problem.pages, out=q)
    assert np.array_equal(q, problem.q)


def test_new_addresses_make_no_new_plan(monkeypatch):
    """However many there are: numbers of signatures outlast those of addresses."""
    from cupyattn import plan

    monkeypatch.setattr(plan, "_MAX_PLACES", 50)
    made = []
    make = plan.Plan.__init__
    monkeypatch.setattr(plan.Plan, "__init__", lambda self, *a: (made.append(self), make(self, *a))[1])
    q, kv = np.ones((1, 1, 24), np.float32), np.ones((1, 4, 1, 24), np.float32)
    cache = cupyattn.PagedKVCache(kv, kv)
    tables = [
        cupyattn.PageTable.from_dense(np.zeros((1, 1), np.int32), np.ones(1, np.int32)) for _ in range(200)
    ]
    for pages in tables:
        cupyattn.decode(q, cache, pages)
    assert len(made) == 1
