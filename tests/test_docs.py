"""Examples in docstrings and numbers in the README are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import cupyattn

MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(cupyattn.__path__, "cupyattn.")
    if not name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs=vars(cupyattn) | {"np": importlib.import_module("numpy")})
    assert failed == 0


def test_examples_in_notes() -> None:
    notes = Path(__file__).resolve().parent.parent / "bench" / "CASCADE.md"
    failed, tried = doctest.testfile(str(notes), module_relative=False, globs=dict(vars(cupyattn)))
    assert tried
    assert failed == 0


def test_public_names_have_docstrings() -> None:
    for name in cupyattn.__all__:
        assert (getattr(cupyattn, name).__doc__ or "").strip(), name


def test_readme_lists_the_head_dims_that_there_are() -> None:
    from cupyattn.kernels import DECODE_HEAD_DIMS

    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    row = re.search(r"\| head_dim \| any \| ([\d, ]+) \|", readme)
    assert row is not None
    assert tuple(int(n) for n in row[1].split(",")) == DECODE_HEAD_DIMS
