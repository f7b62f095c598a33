"""What of the bench needs no GPU: keys, byte counts, checks, the clock's order, records and their report."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import configs, record, report, rows, rules, timing
from bench.configs import AppendConfig, CascadeConfig, DecodeConfig, MergeConfig, MLAConfig
from cupyattn.runtime import device

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    configs.equal(2, 40, 8, 2),
    configs.equal(2, 40, 8, 2, page_size=1, layout="HND", dtype="float16"),
    DecodeConfig((5, 33, 1, 16), 4, 1, head_dim=64, lens_name="ragged"),
    configs.equal(1, 8192, 8, 1),  # batch-invariant too
    configs.mla(2, 40, 4),
    MLAConfig((5, 33, 3, 16), 3, num_query_tokens=3, page_size=1, dtype="float16", lens_name="ragged"),
    configs.sharing(configs.equal(3, 56, 8, 2), 32),
    configs.sharing(configs.equal(8, 1152, 8, 8), 1024),  # so much that `auto` shares it
    CascadeConfig(
        DecodeConfig((40, 33, 64, 5), 4, 1, head_dim=64, lens_name="tree"), ((7, 3), (7,), (7, 3), ()), 16
    ),
    CascadeConfig(MLAConfig((9, 5, 2, 3), 3, page_size=1, lens_name="tree"), ((0, 1), (0,), (), (0,)), 2),
    MergeConfig(3, 2, 4),
    AppendConfig(3, 1, 2),
    AppendConfig(2, 5, 2, rope=True),
]

SKEWED = configs.MLA_SKEWED
# (key, peer, cold us, GB/s, TFLOP/s) as the peers' bench gave them; `peers_h100.json` has the times.
MLA_PEERS = [
    ("b1 ctx4096 h16 sq1 p64", "flashinfer-fa3", 20.0, 238.2, 7.1),
    ("b128 ctx8192 h16 sq1 p64", "flashinfer-fa3", 409.1, 2963.6, 89.2),
    ("b1 ctx65536 h64 sq1 p64", "flashmla", 64.8, 1166.9, 140.8),
    ("b32 ctx4096 h64 sq1 p64", "flashmla", 68.5, 2270.3, 266.6),
    ("b128 ctx4096 h128 sq1 p64", "flashmla", 250.2, 2556.9, 583.8),
    ("b32 ctx8192 h128 sq2 p64", "flashinfer-fa3", 236.2, 1354.0, 618.2),
    ("b32 ctx8192 h128 sq2 p64", "flashmla", 225.8, 1416.1, 646.6),
    ("b128 ctx4096 h16 sq1 p1", "flashinfer-fa3", 221.0, 2753.7, 82.6),
    ("b128 ctx4096 h128 sq1 p1", "flashinfer-fa3", 286.6, 2232.0, 509.6),
]


CASCADE_PEERS = [
    ("b8 ctx4128 8q/1kv d128 p16 shared4000", "flashinfer-cascade", 70.6, 36.9, 1.9),
    ("b64 ctx8448 8q/1kv d128 p16 shared8192", "flashinfer-tc", 47.5, 270.5, 46.6),
    ("b256 ctx2176 8q/8kv d128 p16 shared2048", "fa3", 480.0, 299.3, 4.8),
    ("mooncake_conversat@100 b32 8q/1kv sum418k uniq402k", "flashinfer-tc", 83.2, 2478.4, 20.6),
    ("mooncake_conversat@700 b128 32q/8kv sum1861k uniq1789k", "fa3", 2429.6, 3018.0, 12.6),
]


def cascade_of(key: str) -> CascadeConfig:
    (config,) = (config for config in configs.CASCADE_GRID if config.key == key)
    return config


SEED = cascade_of("b8 ctx4128 8q/1kv d128 p16 shared4000")  # few KV heads, where sharing gains little
TOOLS = cascade_of("mooncake_toolagent@0 b93 32q/8kv sum727k uniq465k")
CHAT = cascade_of("mooncake_conversat@100 b32 32q/8kv sum418k uniq402k")


def small_problem(config: configs.Config, seed: int = 0) -> tuple[timing.Problem, rows.DecodeInputs | None]:
    return rows.Pool(np, [config], l2_bytes=0, seed=seed).problem(config)


# --- configurations ---


def test_grid_keys_are_unique_and_stable() -> None:
    keys = [config.key for config in configs.GRID]
    assert len(set(keys)) == len(keys)
    assert set(keys) >= configs.QUICK_KEYS
    assert configs.equal(8, 1024, 32, 8).key == "b8 ctx1024 32q/8kv d128 p16"
    assert configs.equal(1, 64, 4, 1, 256, 1, "HND", "float16").key == "b1 ctx64 4q/1kv d256 p1 HND fp16"
    assert configs.mla(128, 4096, 16).key == "b128 ctx4096 h16 sq1 p64"
    assert SKEWED.key == "b16 32768+15x1024 h128 sq1 p64"
    assert MLAConfig((5,), 8, 2, 1, "float16", "one").key == "b1 one h8 sq2 p1 fp16"
    assert set(rules.earlier_peers("h100")) <= set(keys)
    assert configs.HOST_KEY in keys


def test_bytes_count_every_needed_byte_once() -> None:
    config = configs.equal(8, 1000, 32, 8)
    token = 8 * 128 * 2  # bytes of one token's K
    assert config.kv_bytes == 8 * 1000 * 2 * token
    assert config.num_bytes == config.kv_bytes + 2 * 8 * 32 * 128 * 2
    assert config.cache_elements == 8 * 63 * 16 * 8 * 128  # 1000 tokens take 63 pages of 16
    assert config.flops == 2 * 2 * 8 * 1000 * 32 * 128
    assert MergeConfig(2, 1, 1, head_dim=64).num_bytes == 3 * (64 * 2 + 4)
    assert AppendConfig(3, 2, 1, head_dim=64).num_bytes == 2 * 2 * (3 * 2 * 64 * 2)


def test_mla_counts_bytes_and_operations() -> None:
    config = configs.mla(4, 1000, 128, num_query_tokens=2)
    assert config.num_rows == 256
    assert config.num_bytes == 2 * (4 * 1000 * 576 + 4 * 2 * 128 * (576 + 512))
    assert config.flops == 2 * 128 * (576 + 512) * 4 * (999 + 1000)  # causal
    assert config.cache_elements == 4 * 16 * 64 * 576  # 1000 tokens take 16 pages of 64
    assert sorted(SKEWED.lens) == [1024] * 15 + [32768]
    assert SKEWED.num_bytes == 2 * (48128 * 576 + 16 * 128 * (576 + 512))


@pytest.mark.parametrize(("key", "name", "us", "gbs", "tflops"), MLA_PEERS)
def test_mla_peers_count_as_we_do(key: str, name: str, us: float, gbs: float, tflops: float) -> None:
    """Their rates follow from our counts and their time; all have one decimal."""
    (config,) = (config for config in configs.MLA_GRID if config.key == key)
    assert rules.earlier_peers("h100")[key][name] == us
    for count, rate in ((config.num_bytes * 1e-3, gbs), (config.flops * 1e-6, tflops)):
        assert count / (us + 0.05) - 0.05 <= rate <= count / (us - 0.05) + 0.05


def test_mla_grid_is_the_peers_and_twins() -> None:
    keys = {config.key for config in configs.MLA_GRID}
    peers = {key for key in rules.earlier_peers("h100") if " sq" in key}
    assert len(peers) == 18
    assert keys - peers == {
        "b8 ctx8192 h16 sq1 p64",
        "b8 ctx8192 h16 sq1 p1",
        "b1 ctx65536 h16 sq1 p1",
        "b32 ctx4096 h64 sq1 p1",
        SKEWED.key,
        *(f"b64 lognormal2048 h{heads} sq1 p64" for heads in (16, 64, 128)),
        *(f"b16 lognormal1024 h{heads} sq1 p64" for heads in (16, 64, 128)),
    }
    assert configs.GROUPS["mla"] == configs.MLA_GRID
    assert {c.page_size for c in configs.MLA_GRID} == {1, 64}


def test_cascade_keys_are_those_of_the_peers() -> None:
    keys = {config.key for config in configs.CASCADE_GRID}
    peers = {key for key in rules.earlier_peers("h100") if "shared" in key or "mooncake" in key}
    assert len(peers) == 10
    assert peers < keys
    assert {key for key in keys - peers if not key.startswith("mooncake")} == {
        "b8 ctx4128 32q/8kv d128 p16 shared4000",
        "b128 ctx8704 h16 sq1 p64 shared8192",
        "b32 ctx4352 h128 sq1 p64 shared4096",
        "b256 2048+lognormal128 8q/1kv d128 p16 shared2048",
        "b256 2048+lognormal128 8q/8kv d128 p16 shared2048",
    }
    moments = {(c.moment, c.step.heads) for c in configs.CASCADE_GRID if c.moment}
    batches = ("mooncake_toolagent@0", *(f"mooncake_conversat@{start}" for start in (100, 700, 3000)))
    heads = ("8q/1kv", "32q/8kv", "32q/32kv", "h16", "h128")
    assert moments == {(m, h) for m in batches for h in heads} - {("mooncake_conversat@3000", "32q/32kv")}
    assert {c.step.page_size for c in configs.CASCADE_GRID if isinstance(c.step, MLAConfig)} == {64}
    assert max(c.num_bytes for c in configs.CASCADE_GRID) < configs.MOST_BYTES
    assert set(rules.CASCADE_LIMITS_US) | {rules.CASCADE_MLA_KEY} < keys


@pytest.mark.parametrize(("key", "name", "us", "gbs", "tflops"), CASCADE_PEERS)
def test_cascade_peers_count_as_we_do(key: str, name: str, us: float, gbs: float, tflops: float) -> None:
    config = cascade_of(key)
    assert rules.earlier_peers("h100")[key][name] == us
    for count, rate in ((config.num_bytes * 1e-3, gbs), (config.flops * 1e-6, tflops)):
        assert count / (us + 0.05) - 0.05 <= rate <= count / (us - 0.05) + 0.05


def test_cascade_counts_shared_keys_once() -> None:
    step = configs.equal(8, 4128, 8, 1)
    assert configs.sharing(step, 4000) == SEED
    assert SEED.repeated_tokens == 7 * 4000
    assert SEED.num_bytes == (4000 + 8 * 128) * 512 + 2 * 8 * 8 * 256
    assert SEED.flops == step.flops
    assert SEED.num_pages == 250 + 8 * 8
    mla = configs.sharing(configs.mla(128, 8704, 16), 8192)
    assert mla.num_bytes == 2 * ((8192 + 128 * 512) * 576 + 128 * 16 * (576 + 512))
    assert mla.cache_elements == (8192 + 128 * 512) * 576


def test_cascade_pages_are_shared_block_by_block() -> None:
    tree = CascadeConfig(DecodeConfig((70, 33, 64, 5), 4, 1), ((7, 3), (7,), (7, 3), ()), 32)
    expected = [[0, 1, 2, 3, 4], [0, 1, 5], [0, 1, 2, 3], [6]]
    assert tree.page_numbers() == [page for pages in expected for page in pages]
    assert tree.num_pages == 7
    assert tree.repeated_tokens == 3 * 32
    for config in configs.CASCADE_GRID[::7]:
        numbers = config.page_numbers()
        assert len(numbers) == config.step.num_pages
        assert set(numbers) == set(range(config.num_pages))


def test_every_promise_has_rows() -> None:
    large = {config.group_size for config in configs.DECODE_GRID if configs.is_large(config)}
    latency = {config.batch for config in configs.DECODE_GRID if configs.is_latency(config)}
    assert large == {1, 4, 8}
    assert latency == {1, 8}
    assert configs.is_large(configs.equal(64, 1024, 32, 8))  # exactly 256 MiB
    assert not configs.is_large(configs.equal(64, 1023, 32, 8))


def test_grid_spans_what_the_rules_speak_of() -> None:
    grid = [config for config in configs.DECODE_GRID if config.equal_lens]
    shapes = {(config.head_dim, config.group_size) for config in grid}
    assert shapes >= {(head_dim, group) for head_dim in (64, 128, 256) for group in (1, 4, 7, 8, 16)}
    assert {config.page_size for config in grid} == {1, 16, 64}
    assert {config.layout for config in grid} == {"NHD", "HND"}
    assert {min(c.batch for c in grid), max(c.batch for c in grid)} == {1, 256}
    assert {min(c.lens[0] for c in grid), max(c.lens[0] for c in grid)} >= {256, 131072}
    spoken_of = synthetic_record([{**synthetic_row(config), "host_us": 1.0} for config in grid])
    ragged = [synthetic_row(config) for config in configs.DECODE_GRID if not config.equal_lens]
    spoken_of["rows"] += ragged + [synthetic_row(config) for config in configs.MLA_GRID]
    spoken_of["rows"] += [cascade_row(config, 9.0, 9.0, 9.0) for config in configs.CASCADE_GRID]
    num_rows = {one["rule"]: one["num_rows"] for one in rules.verdicts(spoken_of)["rules"]}
    assert num_rows["must"] == num_rows["goal"] == len(configs.DECODE_GRID)
    assert num_rows["p1/p64"] >= 2
    assert num_rows["HND/NHD"] >= 2
    assert num_rows["ragged"] >= 4
    peers = set(rules.earlier_peers("h100"))
    assert num_rows["paged"] == len(peers & {config.key for config in configs.DECODE_GRID})
    assert num_rows["peer"] == len(peers)
    assert num_rows["MLA must"] == num_rows["MLA goal"] == 19
    assert num_rows["FlashMLA"] == num_rows["FlashMLA goal"] == 6
    assert num_rows["MLA b1-32"] == 4
    assert num_rows["MLA p1/p64"] == 5
    assert num_rows["MLA skewed"] == 1
    cascades = len(configs.CASCADE_GRID)
    assert num_rows["auto/plain"] == num_rows["auto/forced"] == num_rows["cascade must"] == cascades == 30
    assert num_rows["named"] == 4
    assert num_rows["MLA/plain"] == 1
    assert num_rows["tool-agent"] == 4  # not of 128 latent heads, which operations bind
    assert num_rows["conversation"] == 14


def test_xformers_grid_is_theirs() -> None:
    grid = configs.GROUPS["xformers"]
    shapes = {(c.batch, c.lens[0], c.num_kv_heads) for c in grid if isinstance(c, DecodeConfig)}
    assert shapes == {(max(1, 2 ** (16 - i)), 2**i, kv) for i in range(8, 18) for kv in (1, 2)}


def test_heads_group_compares_the_same_steps() -> None:
    grid = [config for config in configs.GROUPS["heads"] if isinstance(config, DecodeConfig)]
    steps = {kv: {config.lens for config in grid if config.num_kv_heads == kv} for kv in (32, 8, 1)}
    assert steps[32] == steps[8] == steps[1]
    assert sum(map(len, steps.values())) == len(grid)


def test_invariant_rows_are_timed_with_fixed_splits() -> None:
    chosen = configs.GROUPS["invariant"]
    assert {config.batch for config in chosen if isinstance(config, DecodeConfig)} == {1, 8, 64}
    for config in SMALL:
        problem, _ = small_problem(config)
        assert ("fixed_us" in problem.variants) == (config in chosen)
        for launch in problem.variants.get("fixed_us", ()):
            assert launch.keywords["fixed_split_size"] == configs.FIXED_SPLIT_SIZE


# --- traces ---


@pytest.mark.parametrize(
    ("trace", "start", "batch", "tokens", "first"),
    [
        (configs.AZURE, 100, 32, 42243, (1229, 1509, 1068)),
        (configs.AZURE, 700, 128, 152323, (4117, 103, 1233)),
        (configs.MOONCAKE, 100, 32, 418566, (3402, 9068, 1742)),
        (configs.MOONCAKE, 700, 128, 1861369, (8433, 72794, 2158)),
    ],
)
def test_running_batches_are_those_of_the_peers(
    trace: str, start: int, batch: int, tokens: int, first: tuple[int, ...]
) -> None:
    lens = configs.running_lens(trace, start, batch)
    assert (len(lens), sum(lens)) == (batch, tokens)
    assert lens[:3] == first


@pytest.mark.parametrize(
    ("trace", "start", "batch", "tokens", "unique"),
    [
        (configs.MOONCAKE, 100, 32, 418566, 402694),
        (configs.MOONCAKE, 700, 128, 1861369, 1789689),
        (configs.MOONCAKE, 3000, 512, 7052146, 6129010),
        (configs.TOOLAGENT, 0, 93, 727470, 465326),
    ],
)
def test_running_batches_share_as_the_traces_say(
    trace: str, start: int, batch: int, tokens: int, unique: int
) -> None:
    step = DecodeConfig(configs.running_lens(trace, start, batch), 8, 1)
    config = configs.running_sharing(trace, start, step)
    assert sum(step.lens) == tokens
    assert tokens - config.repeated_tokens == unique
    # Blocks say all that comes before them.
    before = {(i, block): blocks[:i] for blocks in config.blocks for i, block in enumerate(blocks)}
    assert all(before[i, b] == blocks[:i] for blocks in config.blocks for i, b in enumerate(blocks))
    assert len({block for _, block in before}) == len(before)


def test_the_last_block_of_a_prompt_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = {i: configs._Request(n, 100, (5, 6)) for i, n in enumerate((600, 1024, 1025, 512))}
    monkeypatch.setattr(configs, "_requests", lambda trace: requests)
    assert configs.running_blocks("a trace", 0, 4) == ((5,), (5,), (5, 6), ())


def test_trace_keys_are_those_of_the_peers() -> None:
    keys = {config.key for config in configs.GROUPS["trace"]}
    peers = {key for key in rules.earlier_peers("h100") if key.startswith("azure")}
    assert peers == {
        f"azure_llm_conv_202@{moment} {heads} sum{tokens}k uniq{tokens}k"
        for moment, tokens in (("100 b32", 42), ("700 b128", 152))
        for heads in ("32q/8kv", "8q/1kv")
    }
    assert peers < keys
    assert "mooncake_conversat@100 b32 28q/4kv sum418k unshared" in keys  # the cascade's keys say uniq402k
    assert len(keys) == 12


def test_trace_samples_hold_the_rows_that_are_used() -> None:
    moments = [*range(100, 132), *range(700, 828)]
    used = {
        configs.AZURE: moments,
        configs.MOONCAKE: [*moments, *range(3000, 3512)],
        configs.TOOLAGENT: [*range(93)],
    }
    readme = (configs.TRACES / "README.md").read_text()
    assert {path.stem for path in configs.TRACES.glob("*.csv")} == set(used)
    for trace, numbers in used.items():
        with (configs.TRACES / f"{trace}.csv").open(newline="") as file:
            assert [int(row["row"]) for row in csv.DictReader(file)] == numbers
        assert f"{trace}.csv" in readme
    assert "CC-BY-4.0" in readme
    assert "Apache-2.0" in readme
    with pytest.raises(KeyError):
        configs.running_lens(configs.AZURE, 132, 1)


def test_lognormal_lens_are_the_same_everywhere() -> None:
    lens = configs.lognormal_lens(64, 2048)
    assert lens == configs.lognormal_lens(64, 2048)
    assert sorted(lens)[31] < 2048 < sorted(lens)[32]
    assert min(lens) == 183
    assert max(lens) == 22975


def test_cold_sets_exceed_the_cache() -> None:
    l2_bytes = 50 << 20
    for config in configs.GRID:
        sets = timing.num_sets(config.num_bytes, l2_bytes)
        assert sets >= 2
        assert sets * config.num_bytes >= 2.2 * l2_bytes


# --- rows: inputs and checks, run by the NumPy backend ---


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.key)
def test_rows_check_what_ran(config: configs.Config) -> None:
    problem, _ = small_problem(config)
    for launch in problem.launches:
        launch()
    assert problem.check()["rel_err"] < 5e-3
    problem.poison()
    with pytest.raises(AssertionError):
        problem.check()
    for launches in problem.variants.values():
        for launch in launches:
            launch()
        assert problem.check()["rel_err"] < 5e-3
        problem.poison()
    for launch in problem.launches[:-1]:  # one launch has not run
        launch()
    with pytest.raises(AssertionError):
        problem.check()


def test_check_sees_one_wrong_head() -> None:
    config = configs.equal(2, 40, 8, 2)
    _, inputs = small_problem(config)
    assert inputs is not None
    out = np.zeros((2, 8, 128), np.uint16)
    with pytest.raises(AssertionError, match=r"= 1\.00e\+00"):
        inputs.check(lambda _: out)


def test_mla_check_sees_one_wrong_token_and_head() -> None:
    config = configs.mla(2, 40, 4, num_query_tokens=3)
    problem, _ = small_problem(config)
    for launch in problem.launches:
        launch()
    limits = problem.check()
    assert 0 < limits["rel_err"] < 3e-3
    out = problem.launches[-1].keywords["out"]  # type: ignore[attr-defined]
    for token, head in ((0, 0), (4, 3), (5, 1)):
        right = out[token, head].copy()
        out[token, head] *= np.float32(1.02).astype(out.dtype)
        with pytest.raises(AssertionError, match=r"limit 3e-03"):
            problem.check()
        out[token, head] = right
    assert problem.check() == limits


def test_mla_reads_what_its_floor_counts() -> None:
    config = configs.mla(2, 40, 4, page_size=16)
    problem, inputs = small_problem(config)
    assert inputs is None  # no peer is timed beside it yet
    q, cache, pages = problem.launches[0].args  # type: ignore[attr-defined]
    assert q.shape == (2, 4, 576)
    assert cache.ckv_pages.strides == cache.kpe_pages.strides == (16 * 1152, 1152, 2)  # one array
    assert cache.num_pages == len(pages.kv_indices) == 6
    assert sorted(pages.kv_indices) == list(range(6))
    assert not np.array_equal(pages.kv_indices, problem.launches[1].args[2].kv_indices)  # type: ignore[attr-defined]
    assert set(problem.variants) == {"pdl_us"}


@pytest.mark.parametrize("config", [c for c in SMALL if isinstance(c, CascadeConfig)], ids=lambda c: c.key)
def test_cascade_variants_read_the_same_pages(config: CascadeConfig) -> None:
    problem, inputs = small_problem(config)
    assert inputs is None  # no peer is timed beside it
    assert set(problem.variants) == {"plain_us", "cascade_us"}
    auto, plain, forced = (x[0] for x in (problem.launches, *problem.variants.values()))
    assert auto.args[:2] == plain.args[:2] == forced.args[:2]  # type: ignore[attr-defined]
    assert plain.args[2].kv_lens.tolist() == list(config.step.lens)  # type: ignore[attr-defined]
    levels = forced.args[2].levels  # type: ignore[attr-defined]
    unique = sum(config.step.lens) - config.repeated_tokens
    assert sum(int(pages.kv_lens.sum()) for pages, _ in levels) == unique
    assert len(set(plain.args[2].kv_indices.tolist())) == config.num_pages  # type: ignore[attr-defined]
    assert problem.facts["cascade_groups"] == [pages.batch_size for pages, _ in levels]
    groups = problem.facts["groups"]
    assert groups == [pages.batch_size for pages, _ in auto.args[2].levels]  # type: ignore[attr-defined]
    assert (len(groups) > 1) == (problem.facts["saving_us"] > 0) == (config.step.batch == 8)
    # All there is to share is launched once more, not from arrays of its own.
    assert (problem.variants["cascade_us"] is problem.launches) == (groups == problem.facts["cascade_groups"])
    assert repr(problem.host["levels_us"]().levels) == repr(auto.args[2])  # type: ignore[attr-defined]


def test_cascade_checks_more_requests() -> None:
    assert len(rows.chosen_requests(TOOLS)) >= 10
    assert rows.chosen_requests(TOOLS) > rows.chosen_requests(TOOLS.step)
    problem, _ = small_problem(configs.sharing(configs.equal(8, 40, 2, 1), 32))
    for launch in problem.launches:
        launch()
    problem.check()
    out = problem.launches[-1].keywords["out"]  # type: ignore[attr-defined]
    out[5] = out[4]  # neither the first nor the last
    with pytest.raises(AssertionError, match=r"limit 5e-03"):
        problem.check()


def test_largest_rows_have_one_set() -> None:
    pool = rows.Pool(np, [SEED], l2_bytes=0, seed=0)
    pool.l2_bytes = 50 << 20
    large = [config for config in configs.PAGED_GRID if pool._most_sets(config) == 1]
    assert {config.key for config in large} == {
        "mooncake_conversat@700 b128 32q/32kv sum1861k uniq1789k",
        "mooncake_conversat@3000 b512 32q/8kv sum7052k uniq6129k",
    }
    assert max(4 * pool._elements(config) for config in configs.GRID) < configs.MOST_BYTES


def test_dense_inputs_are_the_same_memory() -> None:
    _, inputs = small_problem(configs.equal(2, 40, 8, 2))
    assert inputs is not None
    assert inputs.as_dense("NHD").k_bits.shape == (2, 2, 40, 2, 128)
    dense = inputs.as_dense("HND")
    assert dense.k_bits.shape == (2, 2, 2, 40, 128)
    assert np.shares_memory(dense.k_bits, inputs.k_bits)

    def attention(i: int) -> Any:
        q, k, v = (rows.to_float64(x[i], "bfloat16") for x in (dense.q_bits, dense.k_bits, dense.v_bits))
        k, v = k.repeat(4, axis=1), v.repeat(4, axis=1)
        logits = np.einsum("bhd,bhnd->bhn", q, k) / 128**0.5
        weights = np.exp(logits)
        out = np.einsum("bhn,bhnd->bhd", weights, v) / weights.sum(axis=2, keepdims=True)
        return out.astype(rows._DTYPES["bfloat16"]).view(np.uint16)

    assert dense.check(attention)["rel_err"] < 5e-3


def test_pool_is_fresh_for_every_row() -> None:
    config = configs.equal(1, 16, 1, 1)
    pool = rows.Pool(np, [config], l2_bytes=0, seed=7)
    (_, first), k_bits = pool.decode(config), pool.k_bits.copy()
    (_, second) = pool.decode(config)
    assert not np.array_equal(first.q_bits, second.q_bits)
    assert not np.array_equal(k_bits, pool.k_bits)
    again = rows.Pool(np, [config], l2_bytes=0, seed=7).decode(config)[1]
    assert np.array_equal(again.q_bits, first.q_bits)


# --- the clock, with a graph that is a list and a device that says how long it took ---


class FakeCuda:
    """Stands for cupy: events that lie one millisecond apart."""

    class Event:
        def record(self, stream: Any) -> None:
            pass

    def __init__(self) -> None:
        self.cuda = self

    @staticmethod
    def get_elapsed_time(start: Any, stop: Any) -> float:
        return 1.0


class FakeRunner:
    def __init__(self) -> None:
        self.stream = self

    def synchronize(self) -> None:
        pass

    def current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def capture(self, launches: Any) -> timing.Launch:
        return lambda: [launch() for launch in launches]


def fake_problem(calls: list[Any], check: Any) -> timing.Problem:
    launches = [partial(calls.append, i) for i in range(3)]
    return timing.Problem("fake", 10**6, 10**6, launches, partial(calls.append, "poison"), check)


def test_measure_checks_the_graph_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cupy", FakeCuda())
    calls: list[Any] = []
    seen: list[list[Any]] = []

    def check() -> dict[str, float]:
        seen.append(list(calls))
        return {"rel_err": 1e-3}

    figures = timing.measure(fake_problem(calls, check), FakeRunner())
    rotation = [0, 1, 2] * 6  # 16 launches at least, in whole rounds
    assert seen == [[0, 1, 2, "poison", *rotation]]
    assert figures["cold_us"] == pytest.approx(1000 / 18, abs=0.01)
    assert figures["warm_us"] == 1000 / 16
    assert figures["gbs"] == pytest.approx(1e6 / (1000 / 18) * 1e-3, abs=0.1)
    assert figures["num_sets"] == 3
    assert figures["rel_err"] == 1e-3
    only_cold = timing.measure(fake_problem(calls, check), FakeRunner(), only_cold=True)
    assert "cold_us" in only_cold
    assert not {"warm_us", "eager_us"} & set(only_cold)


def test_measure_checks_variants_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cupy", FakeCuda())
    calls: list[Any] = []
    seen: list[list[Any]] = []

    def check() -> dict[str, float]:
        seen.append(calls[calls.index("poison") + 1 :])
        calls.clear()
        if len(seen) > 2:
            raise AssertionError("wrong")
        return {"rel_err": len(seen) * 1e-3}

    problem = fake_problem(calls, check)
    problem.variants = {"pdl_us": [partial(calls.append, f"pdl {i}") for i in range(3)]}
    figures = timing.measure(problem, FakeRunner())
    assert seen == [[0, 1, 2] * 6, ["pdl 0", "pdl 1", "pdl 2"] * 6]
    assert figures["pdl_us"] == figures["cold_us"]
    assert figures["rel_err"] == 1e-3  # of the plain launches
    with pytest.raises(AssertionError, match="wrong"):
        timing.measure(problem, FakeRunner())


def test_measure_reads_host_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cupy", FakeCuda())
    calls: list[Any] = []
    problem = fake_problem(calls, lambda: {"rel_err": 0.0})
    problem.host = {"levels_us": partial(calls.append, "levels")}
    assert timing.measure(problem, FakeRunner())["levels_us"] >= 0
    assert calls.count("levels") == 15
    assert "levels_us" not in timing.measure(problem, FakeRunner(), only_cold=True)


def test_host_time_does_not_wait_for_the_device() -> None:
    events: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            events.append("wait")

    def launch() -> None:
        events.append("launch")

    assert timing.eager_us([launch], Stream(), calls=3, loops=2, wait=False) >= 0
    assert events == ["wait", *["launch"] * 3] * 2 + ["wait"]


def test_host_time_is_that_of_the_quietest_spell(monkeypatch: pytest.MonkeyPatch) -> None:
    spells, waits = iter([9.0, 15.0, 8.0, 14.0, 10.0]), []

    def eager_us(launches: Any, stream: Any, calls: int, wait: bool) -> float:
        assert (launches, stream, calls, wait) == (["launch"], "stream", 7, False)
        return next(spells)

    monkeypatch.setattr(timing, "eager_us", eager_us)
    monkeypatch.setattr(timing.time, "sleep", waits.append)
    launches: Any = ["launch"]
    assert timing.host_us(launches, "stream", calls=7, spells=5) == (8.0, 10.0)
    assert waits == [0.1] * 5


def test_measure_times_nothing_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cupy", None)  # any look at a clock would fail otherwise

    def check() -> dict[str, float]:
        raise AssertionError("wrong")

    with pytest.raises(AssertionError, match="wrong"):
        timing.measure(fake_problem([], check), FakeRunner())


def test_roof_takes_the_larger_of_both_floors() -> None:
    roof = timing.Roof(read_gbs=3000.0, matmul_tflops=800.0)
    assert roof.floor_us(3 * 10**9, 1) == pytest.approx(1000)
    assert roof.floor_us(1, 8 * 10**11) == pytest.approx(1000)
    assert roof.floor_us(1, 8 * 10**11, matmul_share=0.5) == pytest.approx(2000)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Device", "gpu"),
    ],
)
def test_device_slug(name: str, slug: str) -> None:
    assert timing.device_slug(name) == slug


# --- records ---


def test_a_run_whose_sources_change_is_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = iter("aabc")
    monkeypatch.setattr(record, "source_sha256", lambda: next(hashes))
    with record.unchanged_sources() as sha:
        assert sha == "a"
    with pytest.raises(SystemExit, match="sources changed during the run"), record.unchanged_sources():
        pass


def test_source_sha256_is_as_defined(tmp_path: Path) -> None:
    files = {
        "cupyattn/a.py": b"a = 1\n",
        "cupyattn/runtime/z.py": b"",
        "cupyattn.py": b"beside the package",
        "kernels_cu/decode.cu": b"// \xff\n",
        "kernels_cu/include/cupyattn/state.cuh": b"state",
        "kernels_cu/include/cupyattn/plain.h": b"plain",
        "cupyattn/py.typed": b"no source",
        "tests/test_a.py": b"no source of ours",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    expected = (
        b"cupyattn/a.py\0a = 1\n\0"
        b"cupyattn/runtime/z.py\0\0"
        b"kernels_cu/decode.cu\0// \xff\n\0"
        b"kernels_cu/include/cupyattn/plain.h\0plain\0"
        b"kernels_cu/include/cupyattn/state.cuh\0state\0"
    )
    assert record.source_sha256(tmp_path) == hashlib.sha256(expected).hexdigest()


JUNIT = """<testsuites><testsuite name="pytest">
  <properties><property name="fuzz_cases" value="1500"/><property name="gpu" value="H100"/></properties>
  <testcase classname="tests.test_decode" name="test_a[1]" time="1.5">
    <properties><property name="fuzz_cases" value="600"/></properties></testcase>
  <testcase classname="tests.test_decode" name="test_a[2]" time="0.25"/>
  <testcase classname="tests.test_decode" name="test_b" time="0.5"><failure>trace</failure></testcase>
  <testcase classname="tests.test_decode" name="test_c" time="0"><skipped message="one GPU"/></testcase>
  <testcase classname="tests.test_merge" name="test_d" time="0.1"/>
  <testcase classname="tests.test_merge" name="test_d" time="0.1"><error message="in teardown"/></testcase>
</testsuite></testsuites>"""


def test_junit_counts_and_sums(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    counts = record.parse_junit(path)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (2, 2, 1)
    assert counts["properties"] == {"fuzz_cases": 2100}
    assert counts["failures"] == ["tests.test_decode::test_b", "tests.test_merge::test_d"]
    assert counts["skip_reasons"] == ["one GPU"]
    assert next(iter(counts["slowest"])) == "tests.test_decode::test_a[1]"
    assert counts["seconds"] == pytest.approx(2.45, abs=0.06)


def test_files_of_tests_run_side_by_side_and_some_alone(tmp_path: Path, capsys: Any) -> None:
    mark = "import pytest\n@pytest.mark.gpu\n"
    files = {
        "test_right.py": f"{mark}@pytest.mark.parametrize('i', [0, 1])\ndef test_it(i): pass\n",
        "test_wrong.py": f"{mark}def test_it(): assert 1 == 2\n",
        "test_none.py": "def test_it(): pass\n",
        "test_both.py": f"{mark}@pytest.mark.alone\ndef test_it(): pass\n{mark}def test_more(): pass\n",
    }
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n gpu\n alone\n")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, reports = record.run_all_tests([tmp_path / name for name in files], tmp_path, 2)
    counts = record.parse_junit(*reports)
    assert (code, counts["passed"], counts["failed"]) == (1, 4, 1)
    assert len(reports) == len(files) + 1
    shown = capsys.readouterr().out
    assert "test_right: 2 passed" in shown
    assert "test_both: 1 passed, 1 deselected" in shown
    assert shown.index("test_both: 1 passed") < shown.index("alone: 1 passed")
    assert "assert 1 == 2" in shown
    (tmp_path / "test_wrong.py").unlink()
    files.pop("test_wrong.py")
    assert record.run_all_tests([tmp_path / name for name in files], tmp_path, 1)[0] == 0
    # A process that a signal ends has a negative status, and leaves no report.
    killed = tmp_path / "test_killed.py"
    killed.write_text(f"import os, signal\n{mark}def test_it(): os.kill(os.getpid(), signal.SIGKILL)\n")
    code, reports = record.run_all_tests([tmp_path / "test_right.py", killed], tmp_path, 2)
    assert code == -signal.SIGKILL
    assert [report.exists() for report in reports] == [True, False, True]


@pytest.mark.parametrize(("code", "refused"), [(0, False), (record.NO_TESTS, False), (1, True)])
def test_no_record_of_kernels_that_ci_would_refuse(
    code: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, code if "pytest" in command else 0, "a warning")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(device, "device_properties", lambda: SimpleNamespace(arch="sm_90a"))
    with pytest.raises(SystemExit, match="a warning\nCI would refuse") if refused else nullcontext():
        record.precompile()
    assert commands == [
        ["cupyattn", "precompile"], ["pytest", "-q", "tests/test_kernels_compile.py", "-k", "sm_90a"]
    ]  # fmt: skip


def test_no_record_without_all_reports(monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(record, "precompile", lambda: None)
    monkeypatch.setattr(record, "run_all_tests", lambda files, scratch, jobs: (-9, [scratch / "test_a.xml"]))
    assert record.record_tests(tmp_path / "gpu_tests.json", 1) == -9
    assert "no report of test_a; nothing recorded" in capsys.readouterr().out
    assert not (tmp_path / "gpu_tests.json").exists()


def synthetic_row(config: configs.Config, of_roof: float = 0.9, sdpa: float | None = None) -> dict[str, Any]:
    """As a run writes it, at a roof of 3000 GB/s; `sdpa` is our time over torch's."""
    cold_us = config.num_bytes / (3000 * of_roof) * 1e-3
    row: dict[str, Any] = {
        "key": config.key,
        "num_bytes": config.num_bytes,
        "flops": config.flops,
        "cold_us": cold_us,
        "warm_us": cold_us,
        "eager_us": cold_us + 10,
        "gbs": 3000 * of_roof,
        "of_roof": of_roof,
        "floor_us": cold_us * of_roof,
        "over_floor": 1 / of_roof,
        "peers": {"flashinfer": {"skipped": "not installed"}},
    }
    if sdpa:
        row["peers"]["torch-sdpa"] = {"cold_us": cold_us / sdpa}
    return row


def timed_row(config: configs.Config, cold_us: float, **figures: Any) -> dict[str, Any]:
    return {**synthetic_row(config, of_roof=config.num_bytes / 3e6 / cold_us), **figures}


def cascade_row(config: configs.Config, auto: float, plain: float, forced: float) -> dict[str, Any]:
    return timed_row(config, auto, plain_us=plain, cascade_us=forced, levels_us=500.0, groups=[1, 8])


def synthetic_record(found: list[dict[str, Any]], device: str = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    return {
        "kind": "decode bench",
        "device": device,
        "driver": "580.1",
        "date": "2026-11-22",
        "source_sha256": "0" * 64,
        "read_roof_gbs": 3000.0,
        "matmul_tflops": 800.0,
        "peers": {"torch-sdpa": "2.11"},
        "rows": found,
    }


def verdict(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    both = rules.verdicts(synthetic_record(found))
    (one,) = [v for v in both["rules"] + both["foundation"] if v["rule"] == name]
    return one


def test_foundation_verdicts_name_the_worst_row() -> None:
    good, bad = configs.equal(64, 1024, 32, 8), configs.equal(64, 8192, 32, 8)
    assert verdict([synthetic_row(good)], "large, group 4")["ok"] is True
    both = verdict([synthetic_row(good), synthetic_row(bad, of_roof=0.8)], "large, group 4")
    assert (both["ok"], both["worst"], both["row"], both["num_rows"]) == (False, 0.8, bad.key, 2)
    assert both["num_met"] == 1
    assert verdict([synthetic_row(good)], "large, group 8")["ok"] is None
    small = configs.equal(8, 1024, 32, 8)
    assert verdict([synthetic_row(small)], "batch 8")["ok"] is True  # 33.7 MB at 2.7 TB/s: 12.5 us
    assert verdict([synthetic_row(small, of_roof=0.5)], "batch 8")["ok"] is False
    assert verdict([synthetic_row(small, sdpa=1.9)], "2 x SDPA")["ok"] is True
    assert verdict([synthetic_row(small, sdpa=2.1)], "2 x SDPA")["ok"] is False
    failed = verdict([synthetic_row(small), {"key": good.key, "error": "wrong"}], "checks")
    assert (failed["ok"], failed["row"]) == (False, good.key)


def test_must_and_goal_are_judged_by_plain_time() -> None:
    config = configs.equal(8, 1024, 32, 8)
    floor_us = config.num_bytes / 3e6
    must, goal = 1.06 * floor_us + 5, 1.03 * floor_us + 3.5
    for cold_us, names in (
        (goal, []),
        (goal + 0.01, ["goal"]),
        (must, ["goal"]),
        (must + 0.01, ["must", "goal"]),
    ):
        row = timed_row(config, cold_us * (1 - 1e-12))
        missed = [name for name in ("must", "goal") if verdict([row], name)["ok"] is False]
        assert missed == names
    slow = timed_row(config, must + 1, pdl_us=goal - 1)
    one = verdict([slow, timed_row(configs.equal(64, 8192, 8, 1), 90.0, pdl_us=95.0)], "must")
    assert (one["ok"], one["num_met"], one["num_met_pdl"], one["num_rows"]) == (False, 1, 2, 2)
    assert one["row"] == config.key
    assert one["worst"] == pytest.approx((must + 1) / must, abs=1e-3)
    assert "num_met_pdl" not in verdict([timed_row(config, must)], "must")  # a record without PDL times


def test_fastest_peer_of_all_and_sdpa_of_this_run() -> None:
    config = configs.equal(8, 1024, 32, 8)  # earlier: xqa 18.8, torch-sdpa 18.2 and slower ones
    earlier = rules.earlier_peers("h100")[config.key]
    best = min(earlier.values())
    assert verdict([timed_row(config, best)], "peer")["ok"] is True
    assert verdict([timed_row(config, best + 0.1)], "peer")["ok"] is False
    assert verdict([timed_row(config, best)], "SDPA")["num_rows"] == 0  # an earlier SDPA is not of this run
    row = timed_row(
        config, best, peers={"torch-sdpa": {"cold_us": best - 1}, "flashinfer": {"skipped": "no"}}
    )
    assert verdict([row], "SDPA")["ok"] is verdict([row], "peer")["ok"] is False


def test_paged_peers_are_judged_by_the_geometric_mean() -> None:
    chosen = configs.equal(8, 1024, 32, 8), configs.equal(64, 8192, 8, 1)
    best = [
        min(us for name, us in rules.earlier_peers("h100")[c.key].items() if name != "torch-sdpa")
        for c in chosen
    ]

    def faster(first: float, second: float) -> dict[str, Any]:
        found = [timed_row(c, us / by) for c, us, by in zip(chosen, best, (first, second), strict=True)]
        assert not rules.judged(rules.cases(synthetic_record(found))[0])["paged"][1]  # None: no row is judged
        return verdict(found, "paged")

    assert faster(1.5, 1.0)["mean"] == pytest.approx(math.sqrt(1.5), abs=1e-3)
    assert (faster(1.5, 1.0)["ok"], faster(1.5, 1.0)["row"]) == (True, chosen[1].key)
    assert faster(1.5, 0.9)["ok"] is False


def test_twins_and_ragged_rows() -> None:
    page_1, page_64 = (configs.equal(8, 1024, 32, 8, page_size=size) for size in (1, 64))
    hnd, nhd = configs.equal(8, 1024, 32, 8, layout="HND"), configs.equal(8, 1024, 32, 8)
    assert verdict([timed_row(page_1, 10.3), timed_row(page_64, 10.0)], "p1/p64")["ok"] is True
    assert verdict([timed_row(page_1, 10.4), timed_row(page_64, 10.0)], "p1/p64")["row"] == page_1.key
    assert verdict([timed_row(page_1, 10.4), timed_row(page_64, 10.0)], "p1/p64")["ok"] is False
    assert verdict([timed_row(page_1, 10.4)], "p1/p64")["ok"] is None  # its twin was not run
    assert verdict([timed_row(page_1, 10.4), {"key": page_64.key, "error": "wrong"}], "p1/p64")["ok"] is None
    assert verdict([timed_row(hnd, 9.0), timed_row(nhd, 10.0)], "HND/NHD")["ok"] is True
    assert verdict([timed_row(hnd, 11.0), timed_row(nhd, 10.0)], "HND/NHD")["ok"] is False
    ragged = {c.kv_bytes >= 256e6: c for c in configs.DECODE_GRID if c.lens_name.startswith("65536")}
    assert (
        verdict([synthetic_row(ragged[True], 0.93), synthetic_row(ragged[False], 0.1)], "ragged")["num_rows"]
        == 1
    )
    assert verdict([synthetic_row(ragged[True], 0.93)], "ragged")["ok"] is True
    assert verdict([synthetic_row(ragged[True], 0.91)], "ragged")["ok"] is False
    assert verdict([synthetic_row(configs.equal(64, 8192, 32, 8), 0.5)], "ragged")["ok"] is None


def test_mla_rows_have_rules_of_their_own() -> None:
    few, many = configs.mla(32, 4096, 64), configs.mla(128, 4096, 128)
    floor_us = few.num_bytes / 3e6
    must, goal = 1.05 * floor_us + 7, 1.03 * floor_us + 4
    for us, met in ((goal - 0.01, (True, True)), (must - 0.01, (True, False)), (must + 0.01, (False, False))):
        assert tuple(verdict([timed_row(few, us)], name)["ok"] for name in ("MLA must", "MLA goal")) == met
    for name in ("must", "goal", "paged", "p1/p64", "ragged", "SDPA", "host"):
        assert verdict([timed_row(few, 60.0), timed_row(many, 1.0)], name)["ok"] is None
    assert verdict([timed_row(many, 400.0)], "MLA must")["ok"] is None
    assert verdict([timed_row(few, 68.5)], "peer")["ok"] is True  # FlashMLA 68.5, FlashInfer 69.5
    assert verdict([timed_row(few, 68.6)], "peer")["ok"] is False
    with_pdl = [timed_row(few, must + 1, pdl_us=must - 1)]
    assert (verdict(with_pdl, "MLA must")["num_met"], verdict(with_pdl, "MLA must")["num_met_pdl"]) == (0, 1)


def test_mla_of_many_rows_is_held_to_flashmla_and_the_matrix_rate() -> None:
    many, few_requests = configs.mla(128, 4096, 128), configs.mla(1, 4096, 128)
    (case,) = rules.cases(synthetic_record([timed_row(many, 250.0)]))
    assert many.flops / 800e6 < many.num_bytes / 3e6 == pytest.approx(case.floor_us)
    two = configs.mla(32, 8192, 128, num_query_tokens=2)
    (case,) = rules.cases(synthetic_record([timed_row(two, 200.0)]))
    assert two.num_bytes / 3e6 < two.flops / 800e6 == pytest.approx(case.floor_us)
    assert verdict([timed_row(many, 250.2)], "FlashMLA")["ok"] is True
    assert verdict([timed_row(many, 250.3)], "FlashMLA")["ok"] is False
    assert verdict([timed_row(many, 250.2 / 1.101)], "FlashMLA goal")["ok"] is True
    assert verdict([timed_row(many, 250.2 / 1.099)], "FlashMLA goal")["ok"] is False
    assert verdict([timed_row(many, 250.2)], "MLA b1-32")["ok"] is None
    assert (
        verdict([timed_row(few_requests, 19.7 / 1.21)], "MLA b1-32")["ok"] is True
    )  # the fastest: FlashInfer
    assert verdict([timed_row(few_requests, 19.7 / 1.19)], "MLA b1-32")["ok"] is False
    paged = configs.mla(128, 4096, 128, page_size=1)
    assert verdict([timed_row(paged, 250.0)], "FlashMLA")["ok"] is None  # it has no pages of 1


def test_mla_twins_and_skewed_row() -> None:
    page_1, page_64 = (configs.mla(32, 4096, 64, page_size=size) for size in (1, 64))
    for us, ok in ((62.9, True), (63.1, False)):
        assert verdict([timed_row(page_1, us), timed_row(page_64, 60.0)], "MLA p1/p64")["ok"] is ok
    assert verdict([timed_row(SKEWED, 45.0), timed_row(page_64, 60.0)], "MLA skewed")["ok"] is True
    assert verdict([timed_row(SKEWED, 45.1)], "MLA skewed")["ok"] is False
    row = timed_row(SKEWED, 45.1)
    record.judge(found := synthetic_record([row]))
    assert found["rows"][0]["missed"] == ["MLA skewed"]


def test_cascades_are_held_to_plain_and_forced() -> None:
    for auto, plain, ok in ((10.3, 10.0, True), (10.31, 10.0, False)):
        assert verdict([cascade_row(SEED, auto, plain, 10.0)], "auto/plain")["ok"] is ok
    for auto, forced, ok in ((10.5, 10.0, True), (10.51, 10.0, False)):
        assert verdict([cascade_row(SEED, auto, 20.0, forced)], "auto/forced")["ok"] is ok
    chat = [cascade_row(CHAT, 103.1, 100.0, 100.0), cascade_row(TOOLS, 110.0, 100.0, 110.0)]
    assert verdict(chat, "conversation")["row"] == CHAT.key
    assert verdict(chat, "conversation")["num_rows"] == 1
    assert verdict(chat, "auto/plain")["num_met"] == 0
    for name in ("must", "goal", "paged", "SDPA", "ragged", "MLA must", "host"):
        assert verdict(chat, name)["ok"] is None
    assert verdict([timed_row(SEED, 8.0)], "auto/plain")["ok"] is None  # a record without the variants


def test_cascades_have_limits_of_their_own() -> None:
    floor_us = SEED.num_bytes / 3e6
    for us, ok in ((1.2 * floor_us + 7.99, True), (1.2 * floor_us + 8.01, False)):
        assert verdict([timed_row(SEED, us)], "cascade must")["ok"] is ok
    named = zip(rules.CASCADE_LIMITS_US, (8.0, 14.0, 16.0, 48.0), strict=True)
    for key, us in named:
        assert verdict([timed_row(cascade_of(key), us - 1e-3)], "named")["ok"] is True
        assert verdict([timed_row(cascade_of(key), us + 0.1)], "named")["ok"] is False
    mla = cascade_of(rules.CASCADE_MLA_KEY)
    assert verdict([cascade_row(mla, 100.0, 301.0, 100.0)], "MLA/plain")["ok"] is True
    assert verdict([cascade_row(mla, 100.0, 299.0, 100.0)], "MLA/plain")["ok"] is False
    assert verdict([timed_row(SEED, 13.5)], "peer")["ok"] is True  # the fastest decodes without a cascade
    assert verdict([timed_row(SEED, 13.6)], "peer")["ok"] is False


def test_cascade_floor_is_unique_bytes_or_half_the_matrix_rate() -> None:
    (case,) = rules.cases(synthetic_record([timed_row(TOOLS, 900.0)]))
    assert case.floor_us == pytest.approx(TOOLS.num_bytes / 3e6)
    mla = cascade_of(rules.CASCADE_MLA_KEY)
    (case,) = rules.cases(synthetic_record([timed_row(mla, 900.0)]))
    assert case.floor_us == pytest.approx(mla.flops / 400e6)
    for of_roof, ok in ((0.86, True), (0.84, False)):
        assert verdict([synthetic_row(TOOLS, of_roof)], "tool-agent")["ok"] is ok
    many_heads = cascade_of("mooncake_toolagent@0 b93 h128 sum727k uniq465k")
    assert verdict([synthetic_row(many_heads, 0.3), synthetic_row(CHAT, 0.3)], "tool-agent")["ok"] is None


def test_host_time_has_a_limit() -> None:
    config = configs.equal(1, 1024, 8, 1)
    assert verdict([timed_row(config, 5.0)], "host")["ok"] is None
    assert verdict([timed_row(config, 5.0, host_us=11.9)], "host")["ok"] is True
    assert verdict([timed_row(config, 5.0, host_us=12.1)], "host")["ok"] is False


def test_other_devices_have_no_earlier_peers() -> None:
    found = synthetic_record([synthetic_row(configs.equal(8, 1024, 32, 8))], device="NVIDIA A100-SXM4-80GB")
    (one,) = [v for v in rules.verdicts(found)["rules"] if v["rule"] == "peer"]
    assert one["ok"] is None


def test_bench_record_survives_a_failing_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[configs.Config] = [
        configs.equal(8, 1024, 32, 8),
        configs.equal(64, 1024, 32, 8),
        configs.GROUPS["merge"][0],
    ]

    class FakeBench:
        environment = {"device": "NVIDIA H100 80GB HBM3", "driver": "580.1", "date": "2026-11-22"}  # noqa: RUF012
        roof = timing.Roof(3000.0, 800.0)
        peer_versions = {"torch-sdpa": "2.11"}  # noqa: RUF012

        def __init__(self, *_: Any) -> None:
            pass

        def row(self, config: configs.Config) -> dict[str, Any]:
            if config is chosen[1]:
                raise AssertionError("out is wrong")
            return synthetic_row(config)

    monkeypatch.setattr(rows, "Bench", FakeBench)
    path = tmp_path / "results" / "decode_h100.json"
    assert record.record_bench(chosen, path, seed=3, with_peers=False) == 1
    written = json.loads(path.read_text())
    assert [row["key"] for row in written["rows"]] == [config.key for config in chosen]
    assert written["rows"][1]["error"] == "AssertionError: out is wrong"
    assert written["source_sha256"] == record.source_sha256()
    assert written["seed"] == 3
    assert written["rows"][0]["missed"] == []
    assert [one["rule"] for one in written["rules"]] == [rule.name for rule in rules.RULES]
    assert len([line for line in path.read_text().splitlines() if '"key"' in line]) == 3  # a row to a line


def test_record_without_a_gpu_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "missing_gpu", lambda: "no CUDA device")
    assert record.main(["bench"]) == 2
    assert record.main(["tests"]) == 2


def test_runs_as_a_file() -> None:
    for script in ("record.py", "report.py"):
        command = [sys.executable, str(ROOT / "bench" / script), "--help"]
        assert "usage" in subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout


# --- the report ---


def test_report_writes_tables_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    gemma = configs.equal(8, 8192, 16, 8, head_dim=256)
    chosen: list[configs.Config] = [configs.equal(8, 1024, 32, 8), gemma, configs.GROUPS["append"][0]]
    found = [synthetic_row(config, sdpa=1.5) for config in chosen]
    found[0]["pdl_us"] = 11.0
    found.append({"key": "b1 broken", "error": "out is wrong"})
    path = tmp_path / "decode_h100.json"
    record.write(synthetic_record(found), path)
    written = report.report(path, tmp_path / "plots")
    assert [file.suffix for file in written] == [".md", ".png", ".svg"]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in written[2].read_text()
    text = written[0].read_text()
    assert (
        "| b8 ctx1024 32q/8kv d128 p16 | 33.7 | 11.2 | 12.5 | 11.0 | 12.5 | 22.5 | 2700 | 90% | 8.3 | 18.8 xqa * "
        "| 0.738 | 0.828 | **1.500** | **1.500** | 1.507 |" in text
    )
    assert "| b1 broken | failed: out is wrong |" in text
    assert "measured earlier" in text
    assert "| must | time / (1.06 floor + 5 us) | 1.0 | 1 of 2 (1 with PDL) | 1.021 | " in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 6  # rules, decode, append, others, KV heads, foundation
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    before = written[2].read_bytes()
    report.report(path, tmp_path / "plots")
    assert written[2].read_bytes() == before


def test_report_of_a_record_without_newer_figures() -> None:
    row = synthetic_row(configs.equal(8, 1024, 32, 8))
    text = report.markdown(synthetic_record([row]))
    assert "PDL us" not in text
    assert "| host | host us of a call, in the quietest of 40 spells | 12.0 | 0 of 0 |  |  | no row |" in text


def test_heads_table_is_tokens_and_memory() -> None:
    chosen = [configs.equal(8, 1024, 32, kv) for kv in (32, 8, 1)]
    rows = [timed_row(config, us) for config, us in zip(chosen, (50.0, 20.0, 10.0), strict=True)]
    table = report.heads_table(synthetic_record(rows))
    titles = [f"MiB, {kv} KV heads ({kib} KiB a token)" for kv, kib in ((32, "16"), (8, "4"), (1, "0.5"))]
    assert all(title in table[6] for title in titles)
    assert table[8] == "| 8 x 1024 | 160,000 | 400,000 | 800,000 | 128 | 32 | 4 |"
    assert report.heads_table(synthetic_record([])) == []


def test_invariant_table_is_a_ratio() -> None:
    first, second = configs.GROUPS["invariant"][:2]
    assert isinstance(first, DecodeConfig)
    assert isinstance(second, DecodeConfig)
    found = synthetic_record([timed_row(first, 10.0, fixed_us=46.7), timed_row(second, 90.0)])
    table = report.invariant_table(found)
    assert f"fixed_split_size={configs.FIXED_SPLIT_SIZE}" in table[2]
    assert [line for line in table if line.startswith("| b")] == [f"| {first.key} | 10.0 | 46.7 | 4.67 |"]
    text = report.markdown(found)
    assert "\n".join(table) in text
    assert text.index("## Rows that are timed in") < text.index("## Batch-invariant mode")
    assert report.invariant_table(synthetic_record([timed_row(second, 90.0)])) == []


def test_mla_table_stands_beside_the_peers() -> None:
    found = synthetic_record([timed_row(configs.mla(32, 4096, 128), 60.0), timed_row(SKEWED, 44.0)])
    text = report.markdown(found)
    table = [part.splitlines() for part in text.split("\n\n") if part.startswith("| configuration")]
    assert len(table) == 1
    titles, _, first, skewed = ([cell.strip() for cell in line.strip("|").split("|")] for line in table[0])
    assert titles[titles.index("of roof") + 1 :] == [
        "TFLOP/s", "FlashMLA us", "best paged peer us", "peer", "FlashMLA", "FlashMLA goal", "MLA b1-32", "MLA skewed",
    ]  # fmt: skip
    assert first[titles.index("TFLOP/s") :] == [
        "608", "76.8 *", "76.8 flashmla *", "0.781", "1.280", "1.280", "1.280", "",
    ]  # fmt: skip
    assert skewed[-1] == "44.000"


def test_cascade_table_has_all_three_times() -> None:
    found = synthetic_record([cascade_row(SEED, 7.5, 7.6, 8.0), cascade_row(TOOLS, 700.0, 1000.0, 690.0)])
    text = report.markdown(found)
    (table,) = [part.splitlines() for part in text.split("\n\n") if part.startswith("| configuration")]
    titles, _, seed, tools = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    row = dict(zip(titles, seed, strict=True))
    times = {title: row[title] for title in ("cold us", "plain us", "forced us", "levels us")}
    assert times == {"cold us": "7.5", "plain us": "7.6", "forced us": "8.0", "levels us": "500.0"}
    assert (row["groups"], row["TFLOP/s"]) == ("1 + 8", "18")
    assert row["best paged peer us"] == "13.5 flashinfer-tc *"
    assert (row["auto/plain"], row["auto/forced"], row["named"]) == ("0.987", "0.938", "0.938")
    assert "conversation" not in titles  # of no row
    assert tools[titles.index("tool-agent")] == "0.908"
    assert " cold     7.5 plain     7.6 cascade     8.0" in record.line(found["rows"][0])


def test_every_group_is_reported() -> None:
    found = [timed_row(c, 9.0) if isinstance(c, DecodeConfig) else synthetic_row(c) for c in configs.GRID]
    text = report.markdown(synthetic_record(found))
    assert all(f"| {config.key} |" in text for config in configs.GRID)


def test_sanitizer_runs_every_instance_once() -> None:
    from bench.sanitize import decode_problems
    from cupyattn import kernels
    from cupyattn.schedule import starting_run

    seen = []
    all_instances = set(kernels.DECODE.instances_for("sm_90a"))
    for name, problem, mode in decode_problems():
        head_dim = problem.q.shape[2]
        shape = kernels.decode_config("sm_90a", head_dim, 1)  # what `decode` would take now
        template = kernels.decode_template(problem.dtype, head_dim, shape, bool(mode))
        assert template in all_instances
        seen.append((template, *name.split()[5:]))
        if "many" in name:  # runs use a stage again
            assert shape.num_stages * shape.ctas_per_sm * 132 < 600 * 3
        if "starts" in name:
            num_tiles = [-(-kv_len // shape.tile_kv) for kv_len in problem.pages.kv_lens.tolist()]
            assert starting_run(num_tiles, 2, shape.ctas_per_sm * 132) > 1
    plain = {kind for kind in seen if "fixed" not in kind}
    instances = {t for t in kernels._decode_instances("sm_90a") if not t[-1]}
    bfloat16 = {t for t in instances if t[0] == kernels.CUDA_TYPES["bfloat16"]}
    kinds = {(template, kind) for template in instances for kind in ("short", "long")}
    kinds |= {(template, "many") for template in bfloat16}
    shapes = {t: kernels.DecodeConfig(*t[2:-1]) for t in bfloat16}
    starts = {(template, "starts") for template, shape in shapes.items() if shape.tile_q > 32}
    assert len(starts) == sum(head_dim <= 128 for head_dim in kernels.DECODE_HEAD_DIMS)
    assert plain == kinds | starts
    assert len(seen) == len(plain) + 2 * 2 * 3
    assert kernels.decode_config("sm_90a", 128, 4) != kernels.decode_config("sm_90a", 128, 64)  # chosen again


def test_sanitizer_mla_problems_are_right_on_numpy() -> None:
    from device import attend, misses

    import cupyattn
    from bench.sanitize import mla_problems
    from cupyattn import kernels
    from cupyattn.runs import max_units

    names = set()
    heads = set()
    problems = []
    for name, problem, mode in mla_problems():
        names.add(name)
        if not mode:
            problems.append(problem)
        heads.add(problem.q.shape[1])
        if mode or problem.dtype != "bfloat16":
            continue  # NumPy has one path
        cache = cupyattn.PagedMLACache.from_concatenated(problem.bases[0][:, :, 0])
        out, lse = cupyattn.mla_decode(problem.q, cache, problem.pages, return_lse=True, **problem.options)
        wanted, wanted_lse = attend(problem)
        assert not misses(out, lse, (wanted[..., :512], wanted_lse), problem.dtype, np), name
    assert heads == {16, 24, 32, 40, 64, 128}
    shapes = {
        kernels.mla_sm90_config(
            -(-problem.q.shape[0] // len(problem.kv_lens)) * problem.q.shape[1],
            max_units(64, len(problem.kv_lens), True, 1, problem.page_size, problem.pages),
            132,
            len(problem.kv_lens),
        )
        for problem in problems
    }
    assert shapes == {*kernels.mla_configs("sm_90a"), *kernels.MLA_SM90_CONFIGS}
    assert len(names) == 2 * 5 * (2 * 2 + 2) + 5


def test_sanitizer_cascades_run_every_instance() -> None:
    from device import attend, misses

    from bench.sanitize import cascade_problems
    from cupyattn import kernels, runs
    from cupyattn.schedule import are_uneven

    per_sm = kernels.shared_bytes_per_sm("sm_90a")
    seen = set()
    for name, cascade in cascade_problems():
        problem, levels = cascade.problem, cascade.levels
        kind = next(kind for kind in ("short", "long", "many", "rows", "states", "uneven") if kind in name)
        node_bytes = 16 * sum(pages.batch_size for pages, _ in levels.levels)
        if problem.ckv_dim is None:
            config = kernels.cascade_config("sm_90a", problem.head_dim, ())
            kernel, template = kernels.cascade_kernel(problem.dtype, problem.head_dim, config)
            instance = kernel, *template[:-1]
            each = config.shared_bytes(problem.head_dim) + kernels._STATIC_SHARED_BYTES + 1024
            used = config.ctas_per_sm * (each + node_bytes)
            # Half of an SM is left beside the one CTA that it has.
            fits = isinstance(config, kernels.DecodeSm90Config) and problem.head_dim == 64
        else:
            mla = kernels.mla_sm90_cascade_config((), 132)
            if mla is None:
                mla = kernels.mla_config("sm_90a", 16)
                instance = "mla_cascade", *kernels.mla_template(problem.dtype, mla)
            else:
                instance = "mla_sm90_cascade", kernels.CUDA_TYPES[problem.dtype], mla.tile_q
            used, fits = mla.shared_bytes + kernels._STATIC_SHARED_BYTES + 1024 + node_bytes, False
        assert (used > per_sm) == (kind == "many" and not fits), name  # nodes lie in global memory then
        if kind in ("rows", "states"):  # of each CTA, by three teams
            rows_each = problem.q.shape[0] * problem.q.shape[1] // 132
            assert 32 < rows_each <= 90, name
        if kind == "states":  # of the first CTA
            shared, own = (pages.kv_lens.tolist() for pages, _ in levels.levels)
            num_tiles = -(-shared[0] // 64)
            num_runs = num_tiles // -(-(num_tiles + len(own)) // 132)
            assert rows_each * num_runs > 1024, name
        seen.add((instance, kind))
        if kind == "uneven":
            own_lens = levels.levels[-1][0].kv_lens.tolist()
            assert are_uneven([-(-kv_len // 64) for kv_len in own_lens])
            assert problem.ckv_dim or runs.choose_group_overhead(config.uneven_overhead, 1, 132) == 1
        if kind == "short" and problem.dtype == "bfloat16":
            out, lse = (a[cascade.rows] for a in cascade.call(return_lse=True))
            assert not misses(out, lse, attend(cascade.plain), problem.dtype, np), name
    instances = {
        (spec.name, *template[:-1])
        for spec, arch in (
            (kernels.DECODE_CASCADE, "sm_90a"),
            (kernels.DECODE_SM90_CASCADE, "sm_90a"),
            (kernels.MLA_CASCADE, "sm_90a"),
            (kernels.MLA_SM90_CASCADE, "sm_90a"),
        )
        for template in spec.instances(arch)
    }
    bfloat16 = kernels.CUDA_TYPES["bfloat16"]
    many = {one for one in instances if one[1] == bfloat16 and one[0] != "mla_cascade"}
    kinds = {(one, "short") for one in instances}
    kinds |= {(one, kind) for one in instances if one[1] == bfloat16 for kind in ("long", "uneven")}
    rows = {(one, "rows") for one in many if one[0] == "decode_sm90_cascade"}
    assert len(rows) == len(kernels.DECODE_SM90_HEAD_DIMS)
    states = {(one, "states") for one, _ in rows}
    assert seen == kinds | rows | states | {(one, "many") for one in many}


def test_sanitizer_parts_make_a_whole() -> None:
    from bench.sanitize import Part, sum_of

    assert list(Part().pick(range(7))) == list(range(7))
    assert sorted(x for i in range(3) for x in Part(i, 3).pick(range(7))) == list(range(7))
    right = {
        "tool": "racecheck",
        "exit_code": 0,
        "summary": "0",
        "problems": 5,
        "findings": {},
        "wall_s": 3.0,
    }
    wrong = right | {
        "exit_code": None,
        "summary": "stopped",
        "problems": 1,
        "findings": {"a": 2},
        "wall_s": 9.0,
    }
    assert sum_of([right, right]) == right | {"problems": 10}
    assert sum_of([right, wrong, wrong]) == wrong | {
        "summary": "0; stopped",
        "problems": 7,
        "findings": {"a": 4},
    }


def test_sanitizer_findings_are_counted_by_kernel() -> None:
    from bench.sanitize import findings_of, summary_of

    one, two = (
        "void cupyattn::decode_kernel<cupyattn::half_t, (int)64>(const T1 *)",
        "void cupyattn::append_kernel<T>()",
    )
    log = "\n".join([
        "decode: 84 problems right, 6.5 s",
        f"========= Warning: Race reported between Write access at {one}+0x2c30",
        f"=========     and Read access at {one}+0x4ac0 [2240 hazards]",
        f"=========     and Read access at {one}+0x4b00 [2560 hazards]",
        "=========",
        f"========= Error: Race reported between Write access at {one}+0x10",
        f"=========     and Read access at {two}+0x20 [1 hazards]",
        "=========",
        "========= RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)",
    ])  # fmt: skip
    assert findings_of(log) == {"decode_kernel<cupyattn::half_t, 64>": 2, "append_kernel<T>": 1}
    assert summary_of(log) == "RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)"
    assert findings_of("========= ERROR SUMMARY: 0 errors") == {}
