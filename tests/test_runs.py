"""The host's side of runs, and the shapes of the kernels that walk them: none of it needs a GPU."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import build_problem

from cupyattn import kernels, runs
from cupyattn.cache import PageTable
from cupyattn.decode import DecodePlan, has_pairs
from cupyattn.runtime import CI_ARCHS
from cupyattn.schedule import Request

ROWS = (1, 8, 16, 17, 32, 33, 64, 128, 2176)


@st.composite
def steps(draw: st.DrawFn):
    """Lengths, query tokens of each request, rows a token, page size, entries that no token needs."""
    lens = draw(st.lists(st.integers(0, 3000), min_size=1, max_size=6))
    single = draw(st.booleans())
    tokens = [1 if single else draw(st.integers(0, 40)) for _ in lens]
    group_size = draw(st.sampled_from((1, 5, 16, 128)))
    page_size = draw(st.sampled_from((1, 3, 16, 64)))
    return lens, tokens, single, group_size, page_size, draw(st.integers(0, 3)), draw(st.booleans())


@given(steps(), st.sampled_from((32, 64, 256)), st.sampled_from((8, 16, 64)))
def test_max_units_bounds_every_step(step, size, tile_q):
    """Fewer slots than fixed splits would end in a trap on the device."""
    lens, tokens, single, group_size, page_size, spare, dense = step
    held = [-(-n // page_size) + spare for n in lens]
    if dense:
        table = np.zeros((len(lens), max(held)), np.int32)
        pages = PageTable.from_dense(table, np.array(lens, np.int32))
    else:
        indptr = np.concatenate([[0], np.cumsum(held)]).astype(np.int32)
        pages = PageTable(indptr, np.zeros(indptr[-1], np.int32), np.array(lens, np.int32))
    requests = [Request(t, n) for t, n in zip(tokens, lens, strict=True)]
    needed = sum(request.num_units(1, group_size, tile_q, size) for request in requests)
    bound = runs.max_units(size, sum(tokens) * group_size, single, tile_q, page_size, pages)
    assert bound >= needed


def test_max_units_of_equal_requests_is_exact():
    pages = PageTable.from_dense(np.zeros((8, 64), np.int32), np.full(8, 1024, np.int32))
    assert runs.max_units(64, 8 * 16, True, 16, 16, pages) == 8 * 16
    assert runs.max_units(64, 8 * 128, True, 64, 16, pages) == 8 * 16 * 2


def test_small_steps_have_tiles_of_fewer_rows():
    def tile_q(rows, num_tiles, head_dim=128):
        return kernels.decode_config("sm_90a", head_dim, rows, num_tiles, 132).tile_q

    assert [tile_q(rows, 10**6) for rows in (1, 8, 9, 16, 17, 32, 33)] == [8, 8, 16, 16, 32, 32, 64]
    assert [tile_q(32, num_tiles) for num_tiles in (33, 34, 66, 67)] == [8, 16, 16, 32]  # 4 x 33 = 132 SMs
    assert [tile_q(17, num_tiles, 64) for num_tiles in (66, 67)] == [16, 32]
    assert [tile_q(16, num_tiles) for num_tiles in (66, 67)] == [8, 16]
    assert [tile_q(64, num_tiles) for num_tiles in (16, 17, 33, 34)] == [8, 16, 16, 32]
    assert [tile_q(64, num_tiles) for num_tiles in (132, 133)] == [32, 64]  # 2 CTAs an SM
    assert [tile_q(32, num_tiles, 256) for num_tiles in (33, 34, 133)] == [8, 16, 32]
    assert tile_q(8, 1) == tile_q(1, 1) == 8


def test_warps_have_rows_of_their_own_from_nine_or_from_17_on():
    def shape(rows, head_dim=128, arch="sm_90a"):
        config = kernels.decode_config(arch, head_dim, rows)
        return config.warps_q, config.row_blocks, config.warps_kv, config.num_stages, config.ctas_per_sm

    assert [shape(rows) for rows in (8, 9, 17, 33)] == [
        (1, 1, 4, 2, 2), (2, 1, 2, 2, 2), (4, 1, 1, 2, 2), (4, 2, 1, 2, 2)
    ]  # fmt: skip
    assert [shape(rows, 64) for rows in (8, 9, 17, 33)] == [
        (1, 1, 4, 2, 4), (2, 1, 2, 3, 2), (4, 1, 1, 3, 2), (4, 2, 1, 3, 2)
    ]  # fmt: skip
    assert shape(17, 96) == shape(17, arch="sm_100a") == (2, 2, 2, 2, 2)  # no warpgroups
    assert [shape(rows, 256) for rows in (8, 9, 17)] == [(1, 1, 4, 2, 1), (1, 2, 4, 2, 1), (4, 1, 1, 2, 1)]


def test_tiles_of_128_keys_where_there_are_many():
    def tile_kv(rows, num_tiles, head_dim, arch="sm_90a", **more):
        return kernels.decode_config(arch, head_dim, rows, num_tiles, 132, **more).tile_kv

    assert [tile_kv(8, num_tiles, 64) for num_tiles in (None, 12 * 132 - 1, 12 * 132)] == [64, 64, 128]
    assert [tile_kv(9, num_tiles, 64) for num_tiles in (None, 6 * 132 - 1, 6 * 132)] == [64, 64, 128]
    assert [tile_kv(rows, 10**6, 64) for rows in (1, 16, 17, 33)] == [128, 128, 64, 64]
    assert [tile_kv(8, 10**6, head_dim) for head_dim in kernels.DECODE_HEAD_DIMS] == [128] + [64] * 6
    assert [tile_kv(16, 1024, 64, num_groups=n) for n in (1, 128, 129)] == [128, 128, 64]  # of 8 tiles each
    assert tile_kv(8, 10**6, 64, has_pairs=True) == 64
    assert tile_kv(16, 10**6, 64, arch="sm_120a") < 128  # has not the memory
    assert all(config.tile_kv <= 64 for config in kernels.cascade_configs("sm_90a", 64))


def test_long_steps_of_few_rows_have_three_stages():
    def stages(num_tiles, rows=8, head_dim=128, arch="sm_90a"):
        return kernels.decode_config(arch, head_dim, rows, num_tiles, 132).num_stages

    assert [stages(num_tiles) for num_tiles in (None, 1, 128 * 132, 128 * 132 + 1)] == [2, 2, 2, 3]
    assert stages(10**6, rows=9) == stages(10**6, head_dim=64) == 2
    assert stages(10**6, head_dim=96) == 3
    assert stages(10**6, arch="sm_80") == 2  # 164 KiB
    wide = {"head_dim": 256}
    assert [stages(num_tiles, **wide) for num_tiles in (None, 1, 48 * 132, 48 * 132 + 1)] == [2, 2, 2, 3]
    assert [stages(10**6, rows, **wide) for rows in (16, 17)] == [3, 2]
    assert [stages(10**6, **wide, arch=arch) for arch in CI_ARCHS] == [2, 3, 3, 2]


def test_large_steps_have_tiles_of_two_kv_heads():
    def heads(rows=8, num_tiles=8 * 132, head_dim=64, has_pairs=True, arch="sm_90a"):
        return kernels.decode_config(arch, head_dim, rows, num_tiles, 132, has_pairs).heads

    assert [heads(rows) for rows in (1, 7, 8, 9, 16)] == [2, 2, 2, 1, 1]
    assert heads(num_tiles=8 * 132 - 1) == heads(num_tiles=None) == heads(has_pairs=False) == 1
    assert [heads(head_dim=head_dim) for head_dim in kernels.DECODE_HEAD_DIMS] == [2, 1, 1, 1, 1, 1, 1]
    assert [heads(arch=arch) for arch in CI_ARCHS] == [2, 2, 2, 1]  # two CTAs do not fit into 100 KiB
    config = kernels.decode_config("sm_90a", 64, 4, 10**6, 132, True)
    assert (config.tile_q, config.num_stages, config.ctas_per_sm) == (16, 2, 2)  # a block of 8 rows a head


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, True),
        ({"storage": "interleaved"}, True),
        ({"layout": "HND"}, False),
        ({"layout": "HND", "page_size": 1}, True),  # the same memory as NHD
        ({"storage": "strided"}, False),  # K has gaps between heads
        ({"num_kv_heads": 3}, False),
        ({"num_kv_heads": 1}, False),
    ],
)
def test_which_caches_have_pairs(arguments, expected):
    assert has_pairs(build_problem([40], **({"num_kv_heads": 4} | arguments)).cache) == expected


@pytest.mark.parametrize(
    ("changes", "heads", "num_parts"),
    [
        ({}, 2, 1),
        ({"num_kv_heads": 16}, 2, 8),
        ({"layout": "HND"}, 1, 4),
        ({"num_kv_heads": 3}, 1, 1),
        ({"group_size": 9}, 1, 4),
        ({"head_dim": 128}, 1, 4),
        ({"head_dim": 128, "num_kv_heads": 2}, 1, 1),
        ({"head_dim": 128, "num_kv_heads": 8}, 1, 8),
        ({"qo_lens": [1, 1]}, 1, 4),
        ({"spare_entries": 1}, 1, 1),
    ],
)
def test_a_plan_passes_pairs_and_parts_of_kv_heads(monkeypatch, changes, heads, num_parts):
    problem = build_problem([40, 3], **({"num_kv_heads": 4, "spare_entries": 20_000} | changes))
    found = {}

    class FakeRuns:
        def __init__(self, caller, kernel, config, *sizes, **more):
            found.update(more, kernel=kernel, config=config)

        def fix(self, *arguments):
            found["arguments"] = arguments

    module = sys.modules[DecodePlan.__module__]
    properties = SimpleNamespace(arch="sm_90a", num_sms=132)
    monkeypatch.setattr(module, "Runs", FakeRuns)
    monkeypatch.setattr(module, "get_kernel", lambda name, *template, device: template)
    monkeypatch.setattr(module, "device_properties", lambda device: properties)
    plan = object.__new__(DecodePlan)
    plan.device, plan.fixed_split_size, plan.out_shape = 0, None, problem.q.shape
    plan._prepare(problem.q, problem.cache, problem.pages, problem.qo_indptr is None, None, None)
    assert found["config"].heads == heads
    assert found["kernel"][kernels.DECODE.template.index("kHeads")] == heads
    num_kv_heads, group_size = problem.num_kv_heads // heads, problem.q.shape[1] // problem.num_kv_heads
    assert found["num_kv_heads"] == num_kv_heads
    assert found["num_rows"] == 2 * group_size * heads
    names = [name for name, kind in kernels.DECODE.args if kind != "ptr"]
    arguments = dict(zip(names, found["arguments"], strict=False))
    assert arguments["num_kv_heads"] << arguments["part_shift"] == num_kv_heads
    assert found["multiple"] == 1 << arguments["part_shift"] == num_parts
    assert arguments["group_size"] == group_size * heads
    for kv, strides in (("k", problem.cache.k_strides), ("v", problem.cache.v_strides)):
        in_memory = tuple(arguments[f"{kv}_stride_{axis}"] for axis in ("page", "token", "head"))
        assert in_memory == (*strides[:2], heads * strides[2])


def test_parts_of_kv_heads():
    many = 16 * 132
    found = {heads: kernels.choose_num_parts(heads, many, 264, 132) for heads in (1, 2, 4, 6, 8, 12, 32, 40)}
    assert found == {1: 1, 2: 1, 4: 4, 6: 1, 8: 8, 12: 4, 32: 8, 40: 8}
    assert kernels.choose_num_parts(8, many - 1, 264, 132) == 1
    assert kernels.choose_num_parts(8, many, 3 * 132, 132) == 4  # 396 CTAs are no eight equal shares
    assert kernels.choose_num_parts(8, many, 33, 132) == 1


@pytest.mark.parametrize("arch", CI_ARCHS)
def test_every_choice_of_decode_is_compiled_ahead(arch):
    instances = set(kernels.DECODE.instances_for(arch))
    for dtype, head_dim in itertools.product(kernels.DECODE_DTYPES, kernels.DECODE_HEAD_DIMS):
        for rows, num_tiles, pairs in itertools.product(ROWS, (None, 10, 1000, 10**6), (False, True)):
            config = kernels.decode_config(arch, head_dim, rows, num_tiles, 132, pairs)
            assert config in kernels.decode_configs(arch, head_dim)
            assert config.shared_bytes_per_sm(head_dim) <= kernels.shared_bytes_per_sm(arch)
            assert kernels.decode_template(dtype, head_dim, config) in instances
            if num_tiles is None:
                assert kernels.decode_template(dtype, head_dim, config, True) in instances


@pytest.mark.parametrize("arch", CI_ARCHS)
def test_every_shape_of_the_mla_kernel_fits(arch):
    for rows, fixed_splits in itertools.product(ROWS, (False, True)):
        config = kernels.mla_config(arch, rows, fixed_splits)
        assert config in kernels.mla_configs(arch, fixed_splits)
        assert config.shared_bytes + 3 * 1024 <= kernels.shared_bytes_per_sm(arch)
        assert 64 % config.tile_kv == 0  # a fixed split is whole tiles


def test_shapes_of_the_sm90_kernel():
    small = kernels.mla_config("sm_90a", 16)  # of mla.cu
    assert kernels.mla_sm90_config(16, 86, 132) == small  # 1 x 4096, 16 heads
    assert kernels.mla_sm90_config(17, 86, 132).tile_q == 32
    assert kernels.mla_sm90_config(16, 9 * 33, 132) == small
    assert kernels.mla_sm90_config(16, 9 * 33 + 1, 132) == kernels.MLA_SM90_CONFIGS[0]
    assert [kernels.mla_sm90_config(rows, 10**6, 132).tile_q for rows in (1, 16, 17, 32, 33, 64, 65, 256)] == [
        16, 16, 32, 32, 64, 64, 64, 64,
    ]  # fmt: skip
    instances = set(kernels.MLA_SM90_DECODE.instances_for("sm_90a"))
    for rows in ROWS:
        config = kernels.mla_sm90_config(rows, 10**6, 132)
        assert config in kernels.MLA_SM90_CONFIGS
        assert config.flags_states == (config.tile_q > 16)
        assert config.shared_bytes + 4 * 1024 <= kernels.shared_bytes_per_sm("sm_90a")
        assert all((kernels.CUDA_TYPES[dtype], config.tile_q) in instances for dtype in kernels.DECODE_DTYPES)
    assert not kernels.MLA_SM90_DECODE.supports("sm_100a")
    # Clusters for more rows than a tile of 64, where there are more tiles than CTAs.
    for rows in ROWS:
        config = kernels.mla_sm90_config(rows, 10**6, 132)
        assert kernels.mla_sm90_cluster(config, rows, 10**6, 132) == (1 if rows <= 64 else 2)
    for config in (small, *kernels.MLA_SM90_CONFIGS):
        found = [kernels.mla_sm90_cluster(config, 128, num_tiles, 132) for num_tiles in (65, 66, 67)]
        assert found == ([1, 1, 2] if config is kernels.MLA_SM90_CONFIGS[2] else [1, 1, 1])


MLA_CU, MLA_SM90 = kernels.MLAConfig, kernels.MLASm90Config


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("lens", "rows", "kind", "tile_q"),
    [
        ([2048], 32, MLA_CU, 16),
        ([4096], 32, MLA_CU, 16),
        ([2048], 64, MLA_CU, 16),
        ([1024], 128, MLA_CU, 16),
        ([256] * 4, 128, MLA_CU, 16),
        ([256] * 16, 64, MLA_CU, 32),
        ([512] * 16, 64, MLA_SM90, 32),
        ([8192], 64, MLA_SM90, 32),
        ([2048] * 4, 64, MLA_SM90, 32),
        ([4096], 128, MLA_SM90, 32),
        ([1024] * 4, 128, MLA_SM90, 32),
        ([4096], 64, MLA_SM90, 64),
        ([2048] * 2, 64, MLA_SM90, 64),
        ([16384], 64, MLA_SM90, 64),
        ([2048], 128, MLA_SM90, 64),
        ([8192], 128, MLA_SM90, 64),
    ],
)
def test_tiles_of_fewer_rows_for_small_mla_steps(lens, rows, kind, tile_q, dense):
    """As timed, see bench/NOTES.md."""
    pages = np.cumsum([0, *(n // 64 for n in lens)], dtype=np.int32)
    indices, kv_lens = np.arange(pages[-1], dtype=np.int32), np.array(lens, np.int32)
    if dense:
        table = PageTable.from_dense(indices.reshape(len(lens), -1), kv_lens)
    else:
        table = PageTable(pages, indices, kv_lens)
    num_tiles = runs.max_units(64, len(lens), True, 1, 64, table)
    config = kernels.mla_sm90_config(rows, num_tiles, 132, len(lens))
    assert (type(config), config.tile_q) == (kind, tile_q)


def test_shapes_for_cascades():
    """What is there in (tiles of keys, rows) of each level decides; see the times in bench/NOTES.md."""

    def tile_q(*levels, num_kv_heads=1, head_dim=128):
        return kernels.cascade_config("sm_90a", head_dim, levels, num_kv_heads, 132).tile_q

    assert tile_q((129, 512), (320, 8)) == 128  # 64 x (8192 + 256), 8/1: nearly all is shared
    assert tile_q((129, 512), (320, 8), head_dim=256) == 32
    assert tile_q((33, 2048), (768, 8)) == 128  # 256 x (2048 + 128), 8/1
    assert tile_q((65, 128), (160, 4), num_kv_heads=8) == 128  # 32 x (4096 + 256), 32/8
    assert tile_q((129, 64), (320, 1), num_kv_heads=8) == 64  # 64 x (8192 + 256), 8/8
    assert tile_q((32, 256), (96, 8)) == 128  # 32 x (2000 + 128), 8/1: one tile of 128 rows for an SM
    assert tile_q((32, 128), (64, 8)) == 64  # fewer
    assert tile_q((147, 248), (7230, 8)) == 128  # the tool-agent batch: memory is the limit
    assert tile_q((147, 31), (7230, 1), num_kv_heads=32) == 32  # the same, 32/32: one tile of 32 rows has all
    assert tile_q((147, 124), (7230, 4), num_kv_heads=8) == 128  # 32/8
    assert tile_q((33, 256), (768, 1), num_kv_heads=8) == 128  # 256 x (2048 + 128), 8/8
    assert tile_q((64, 64), (128, 1), num_kv_heads=8) == 128  # 64 x (4096 + 128), 8/8: it is not
    assert tile_q((9, 64), (84, 4)) == 32  # 16 x (512 + 256), 32/8
    assert tile_q((63, 8), (24, 1)) == 16  # one tile of rows has all
    assert tile_q((63, 17), (24, 1)) == 32
    mla = kernels.mla_sm90_cascade_config
    assert mla([(128, 2048), (1024, 16)], 132).tile_q == 64  # 128 x (8192 + 512), 16 heads
    assert mla([(136, 384), (7580, 16)], 132).tile_q == 64  # the tool-agent batch, with the groups that pay
    assert mla([(9, 512), (6326, 16)], 132).tile_q == 32  # 32 conversations: nearly nothing is shared
    assert mla([(9, 16), (6326, 16)], 132).tile_q == 16
    assert mla([(10, 16), (10, 16)], 132) is None  # few enough for mla.cu
    assert mla([(10, 16), (10, 17)], 132).tile_q > 16
    for levels in ([(128, 2048), (1024, 16)], [(9, 512), (6326, 16)]):
        assert mla(levels, 132).is_cascade
        assert not mla(levels, 132).flags_states


def test_the_merge_of_latents_knows_what_groups_count_for():
    """It makes its problem anew, of Levels alone (mla_sm90.cu)."""
    assert kernels.MLASm90Config.uneven_overhead == kernels.MLASm90Config.group_overhead


@pytest.mark.parametrize("arch", CI_ARCHS)
def test_every_choice_of_a_cascade_is_compiled_ahead(arch):
    instances = {
        spec.name: set(spec.instances_for(arch) if spec.supports(arch) else ())
        for spec in (kernels.DECODE_CASCADE, kernels.DECODE_SM90_CASCADE)
    }
    chosen = set()
    for dtype, head_dim in itertools.product(kernels.DECODE_DTYPES, kernels.DECODE_HEAD_DIMS):
        for own, rows in itertools.product((0, 10, 10**5), (1, 16, 17, 32, 33, 64, 4096)):
            config = kernels.cascade_config(arch, head_dim, [(100, rows), (own, 1)], 1, 132)
            assert config in kernels.cascade_configs(arch, head_dim)
            name, template = kernels.cascade_kernel(dtype, head_dim, config)
            assert template in instances[name]
            chosen.add(name)
    assert chosen == {name for name in instances if instances[name]}


def test_shape_of_the_sm90_decode_kernel():
    config = kernels.DecodeSm90Config()
    for head_dim in kernels.DECODE_SM90_HEAD_DIMS:
        assert config.shared_bytes(head_dim) + 4 * 1024 <= kernels.shared_bytes_per_sm("sm_90a")
    assert not kernels.DECODE_SM90_CASCADE.supports("sm_100a")


@pytest.mark.parametrize("arch", CI_ARCHS)
def test_every_choice_of_mla_decode_is_compiled_ahead(arch):
    instances = set(kernels.MLA_DECODE.instances_for(arch))
    for dtype, rows in itertools.product(kernels.DECODE_DTYPES, ROWS):
        assert kernels.mla_template(dtype, kernels.mla_config(arch, rows)) in instances
        assert kernels.mla_template(dtype, kernels.mla_config(arch, rows, True), True) in instances


@pytest.mark.parametrize(
    ("workspace", "error", "pattern"),
    [
        (np.zeros(100, np.int32), TypeError, "workspace must have dtype uint8, got int32"),
        (np.zeros(99, np.uint8), ValueError, r"at least 100 bytes .*got shape \[99\]"),
        (np.zeros((2, 100), np.uint8), ValueError, r"got shape \[2, 100\]"),
        (np.zeros(400, np.uint8)[::2], ValueError, "workspace must be contiguous"),
    ],
)
def test_bad_workspaces(workspace, error, pattern):
    with pytest.raises(error, match=f"^who: .*{pattern}"):
        runs.check_workspace("who", workspace, 100)


def test_good_workspaces():
    runs.check_workspace("who", None, 100)
    runs.check_workspace("who", np.zeros(100, np.uint8), 100)


@pytest.mark.parametrize(
    ("size", "error"),
    [(63, ValueError), (96, ValueError), (0, ValueError), (-64, ValueError), (64.0, TypeError)],
)
def test_bad_split_sizes(size, error):
    with pytest.raises(error, match=r"^who: fixed_split_size must be"):
        runs.as_split_size("who", size)


def test_good_split_sizes():
    assert runs.as_split_size("who", None) is None
    assert runs.as_split_size("who", np.int64(64)) == 64


@pytest.mark.parametrize(
    ("changes", "error", "pattern"),
    [
        ({"sm_scale": None}, TypeError, "sm_scale"),
        ({"sm_scale": float("nan")}, ValueError, "sm_scale"),
        ({"window_left": -2}, ValueError, r"window_left must be within -1..2\*\*31 - 1, got -2"),
        ({"window_left": 2**31}, ValueError, "window_left"),
        ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap must be at least 0, got -1.0"),
        ({"pdl": 1}, TypeError, "pdl"),
    ],
)
def test_bad_options(changes, error, pattern):
    good = {"sm_scale": 0.1, "window_left": -1, "logits_soft_cap": 0.0, "pdl": False}
    assert runs.check_options("who", **good) == (0.1, -1, 0.0)
    with pytest.raises(error, match=f"^who: {pattern}"):
        runs.check_options("who", **(good | changes))
