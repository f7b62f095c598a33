"""What the tests of bad arguments share: cases, and a check that the call raises and writes nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from problems import to_host

import cupyattn
from cupyattn.plan import ArrayGroup


@dataclass
class Case:
    """`change` makes arguments to replace some of the good ones with; the message is to match `pattern`."""

    name: str
    error: type[Exception]
    pattern: str
    change: Callable[[Any], dict[str, Any]]


def cases(*rows):
    return pytest.mark.parametrize("case", [pytest.param(Case(*row), id=row[0]) for row in rows])


def bits(a: Any) -> bytes:
    return np.ascontiguousarray(to_host(a)).tobytes()


def arrays_of(value: Any) -> list[Any]:
    """All arrays reachable from an argument."""
    if isinstance(value, ArrayGroup):
        return arrays_of(list(value._arrays))
    if isinstance(value, list | tuple):
        return [a for item in value for a in arrays_of(item)]
    return [value] if hasattr(value, "shape") and hasattr(value, "dtype") else []


def check(function: Callable[..., Any], good: dict[str, Any], case: Case, xp: Any) -> None:
    """`function` must raise what `case` says, and write nothing into any of its arguments."""
    a = SimpleNamespace(**good, xp=xp, zeros=lambda *shape: xp.zeros(shape, "f2"))
    for name in ("k_pages", "v_pages", "ckv_pages", "kpe_pages"):
        if hasattr(good.get("cache"), name):
            setattr(a, name, getattr(good["cache"], name))
    change = case.change(a)
    arguments = good | change
    if function.__name__.endswith("decode") and "q" in change:
        # The outputs may no longer suit, and are not the point.
        arguments = {
            name: arguments[name] for name in arguments if name in change or name not in ("out", "lse")
        }
    arrays = arrays_of(list(arguments.values())) + arrays_of(list(good.values()))
    before = [bits(a) for a in arrays]
    with pytest.raises(case.error, match=case.pattern) as caught:
        function(**arguments)
    assert type(caught.value) is case.error
    assert re.match(
        rf"{function.__name__}: |PagedKVCache|PagedMLACache|CascadeLevels|Rope", str(caught.value)
    ), "says who complains"
    assert [bits(a) for a in arrays] == before, "something was written"


def part(a: Any, begin: int, *shape: int) -> Any:
    """Elements of `a` from `begin` on, as an array of that shape."""
    return a.reshape(-1)[begin : begin + math.prod(shape)].reshape(shape)


def read_only(a: Any) -> Any:
    view = a.view()
    view.flags.writeable = False
    return view


def misaligned(a: Any) -> Any:
    """A copy of `a` that starts 2 bytes off."""
    copy = cupyattn.get_array_module(a).zeros(a.size + 1, a.dtype)[1:].reshape(a.shape)
    copy[...] = a
    return copy
