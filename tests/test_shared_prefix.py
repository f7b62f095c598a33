"""The example of shared prefixes: a running batch over levels of fixed shapes, against plain decode."""

from __future__ import annotations

import numpy as np
import pytest

import cupyattn
from cupyattn import PagedKVCache, PrefixTree
from cupyattn.examples import shared_prefix
from cupyattn.examples.shared_prefix import Engine, allocate_levels, refill


def test_steps_agree_and_share(xp):
    engine = Engine(xp, seed=1)
    arrays = [id(a) for pages, _ in engine.levels.levels for a in (pages.kv_indptr, pages.kv_indices)]
    steps = []
    for _ in range(60):
        steps.append(engine.step())
        engine.tree.check()
        engine.allocator.check()
    assert max(step.difference for step in steps) <= shared_prefix.TOLERANCE
    assert {step.is_new for step in steps} == {True, False}
    assert {len(step.groups) for step in steps} >= {1, 2}
    assert max(step.num_requests for step in steps) == shared_prefix.MOST_REQUESTS
    assert all(step.num_read <= step.num_tokens for step in steps)
    assert sum(step.num_read for step in steps) < sum(step.num_tokens for step in steps) / 2
    assert arrays == [id(a) for pages, _ in engine.levels.levels for a in (pages.kv_indptr, pages.kv_indices)]


def test_refilled_levels_are_those_that_were_made():
    """Whatever was there before, and with fewer levels, groups and requests than there is room for."""
    rng = np.random.default_rng(0)
    k_pages, v_pages = rng.standard_normal((2, 40, 4, 1, 8), "float32")
    cache = PagedKVCache(k_pages, v_pages)
    q = rng.standard_normal((6, 2, 8), "float32")
    room = allocate_levels(np, num_levels=3, max_groups=3, batch=6, max_pages=40)
    batches = [
        ([0, 1, 2, 10], [0, 1, 3, 11, 12], [0, 4, 13], [20], [0, 1, 2, 14], [21, 22]),
        ([30],),
        ([5, 10], [6, 11], [5, 12], [7], [5, 13]),  # not in the order of q
        (),
        ([8, 9, 1], [8, 9, 2]),
    ]
    for batch in batches:
        tree = PrefixTree(page_size=4)
        for i, pages in enumerate(batch):
            tree.add(i, pages, 4 * len(pages) - i % 3)
        made = tree.levels(choose=lambda *numbers: 1.0, max_levels=3).levels
        refill(room, made)
        out, lse = cupyattn.cascade_decode(q, cache, room, return_lse=True, validate=True)
        if batch:
            expected = cupyattn.cascade_decode(q[: len(batch)], cache, made)
            np.testing.assert_allclose(out[: len(batch)], expected, rtol=1e-6)
        assert not out[len(batch) :].any()
        assert np.isneginf(lse[len(batch) :]).all()


def test_command(capsys):
    assert shared_prefix.main(["--backend", "numpy", "--steps", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert all(line.endswith(" ok") for line in lines[2:])
    with pytest.raises(SystemExit):
        shared_prefix.main(["--steps", "0"])


def test_command_says_what_is_wrong(capsys, monkeypatch):
    decode = cupyattn.decode
    monkeypatch.setattr(cupyattn, "decode", lambda *args, **kwargs: decode(*args, **kwargs) + 1)
    assert shared_prefix.main(["--backend", "numpy", "--steps", "2"]) == 1
    assert capsys.readouterr().out.count(" WRONG") == 2


@pytest.mark.gpu
def test_command_on_a_gpu(gpu, capsys):
    assert shared_prefix.main([]) == 0
    assert capsys.readouterr().out.startswith("on cupy")
