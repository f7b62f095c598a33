"""What of bench/counters.py needs neither a GPU nor ncu: the child's launches, ncu's table, the record."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import configs, counters, record, rows, timing

HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size",'
    '"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
KERNEL = "void decode_kernel<bfloat16_t, 128, 1, 1, 4, 64, 3, 2>(const T1 *, const T1 *, int)"
LAUNCHES = (  # in the order of METRICS: base units, prefixed ones, the older spelling
    "7,552 ns|566,272 byte|1,024 byte|3.41 %|29,952 sector|19,968 sector|81,234 inst|128 register/thread"
    "|103,424 byte/block|12.31 %",
    "15.87 us|33.72 Mbyte|98.30 Kbyte|71.05 %|1,577,304 sector|1,051,536 sector|1,500,312 inst"
    "|128 register/thread|103.42 Kbyte/block|12.44 %",
    "718,016 nsecond|2.16 Gbyte|0 byte|89.6 %|100,993,024 sector|67,328,683 sector|88,604,160 inst"
    "|128 register/thread|103,424 byte/block|12.49 %",
)


def ncu_log(launches: tuple[str, ...] = LAUNCHES) -> str:
    """What ncu and its child print: the child's lines and progress first, then the table."""
    checked = [f"{config.key}: rel_err 0.00213" for config in counters.CASES]
    progress = [
        f'==PROF== Profiling "decode_kernel" - {i}: 0%....50%....100% - 8 passes'
        for i in range(len(launches))
    ]
    both = [line for pair in zip(progress, checked, strict=False) for line in pair]
    table = [
        f'"{i}","4711","python3.12","127.0.0.1","{KERNEL}","1","7","(128, 1, 1)","(264, 1, 1)","0","9.0",'
        f'"Command line profiler metrics","{metric}","{unit}","{value}"'
        for i, launch in enumerate(launches)
        for metric, (value, unit) in zip(
            counters.METRICS.values(), (cell.split(" ") for cell in launch.split("|")), strict=True
        )
    ]
    head = "==PROF== Connected to process 4711 (/usr/bin/python3.12)"
    return "\n".join([head, *both, "==PROF== Disconnected from process 4711", HEADER, *table, ""])


def test_cases_are_rows_of_the_bench() -> None:
    assert [config.key for config in counters.CASES] == [
        "b1 ctx1024 8q/1kv d128 p16",
        "b8 ctx1024 32q/8kv d128 p16",
        "b64 ctx8192 32q/8kv d128 p16",
    ]
    assert set(counters.CASES) <= set(configs.DECODE_GRID)


def test_table_is_parsed_to_bytes_and_microseconds() -> None:
    first, second, third = counters.parse_table(ncu_log())
    assert set(first) == set(counters.METRICS.values())
    assert first["gpu__time_duration.sum"] == pytest.approx(7.552)
    assert second["gpu__time_duration.sum"] == pytest.approx(15.87)
    assert third["gpu__time_duration.sum"] == pytest.approx(718.016)
    assert first["dram__bytes_read.sum"] == 566272
    assert second["dram__bytes_read.sum"] == pytest.approx(33.72e6)
    assert second["launch__shared_mem_per_block_dynamic"] == pytest.approx(103420)
    assert third["smsp__inst_executed.sum"] == 88604160
    assert counters.parse_table("==ERROR== ERR_NVGPUCTRPERM\n") == []


@pytest.mark.parametrize(
    ("value", "unit", "wanted"),
    [
        ("1,234", "byte", 1234),
        ("0.5", "Kbyte/block", 500),
        ("2.5", "Mbyte", 2.5e6),
        ("2,000", "Gbyte", 2e12),
        ("500", "ns", 0.5),
        ("500", "nsecond", 0.5),
        ("1.5", "us", 1.5),
        ("1,500.25", "usecond", 1500.25),
        ("2", "ms", 2000),
        ("1e-3", "second", 1000),
        ("12.5", "%", 12.5),
        ("168", "register/thread", 168),
        ("7", "", 7),
    ],
)
def test_units(value: str, unit: str, wanted: float) -> None:
    row = {"Metric Name": "m", "Metric Unit": unit, "Metric Value": value}
    assert counters.value_of(row) == pytest.approx(wanted)


@pytest.mark.parametrize(("value", "unit"), [("n/a", ""), ("5", "furlong"), ("", "byte")])
def test_what_cannot_be_read_is_named(value: str, unit: str) -> None:
    row = {"Metric Name": "dram__bytes_read.sum", "Metric Unit": unit, "Metric Value": value}
    with pytest.raises(ValueError, match=rf"dram__bytes_read\.sum: cannot read '{value}' with unit '{unit}'"):
        counters.value_of(row)


def test_rows_hold_bytes_read_over_bytes_needed() -> None:
    first, second, third = counters.rows_of(ncu_log())
    assert first["key"] == counters.CASES[0].key
    assert first["needed_bytes"] == (2 * 1024 + 8) * 128 * 2  # K, V and q
    assert first["read_over_needed"] == pytest.approx(566272 / first["needed_bytes"], abs=1e-4)
    assert (first["l2_read_bytes"], first["l2_sm_read_bytes"]) == (29952 * 32, 19968 * 32)
    assert "l2_read_sectors" not in first
    assert second["dram_gbs"] == pytest.approx((33.72e6 + 98.3e3) / 15.87e-6 * 1e-9, rel=1e-6)
    assert third["needed_bytes"] == 64 * (2 * 8192 * 8 + 32) * 128 * 2
    assert (third["registers"], third["shared_bytes"], third["rel_err"]) == (128, 103424, 0.00213)


def test_a_case_that_was_not_checked_or_not_profiled_is_no_evidence() -> None:
    with pytest.raises(SystemExit, match="3 of 3 cases checked, 0 profiled"):
        counters.rows_of(ncu_log().partition(HEADER)[0])
    with pytest.raises(SystemExit, match="2 of 3 cases checked, 3 profiled"):
        counters.rows_of(ncu_log().replace(f"{counters.CASES[1].key}: ", "Traceback: "))


def test_the_last_launch_alone_is_profiled_and_all_are_checked() -> None:
    config = configs.equal(2, 40, 8, 2)
    problem, _ = rows.Pool(np, [config], l2_bytes=2 * config.num_bytes, seed=1).decode(config)
    seen: list[str] = []
    launches = list(problem.launches)
    assert len(launches) > 2

    @contextlib.contextmanager
    def profiling() -> Iterator[None]:
        seen.append("start")
        yield
        seen.append("stop")

    problem.launches = [lambda run=run: (seen.append("launch"), run()) for run in launches]
    assert 0 < counters.launch_and_check(problem, profiling) < 5e-3
    assert seen == ["launch"] * (len(launches) - 1) + ["start", "launch", "stop"]
    problem.launches = [*launches[:-1], lambda: None]
    with pytest.raises(AssertionError, match="never written"):
        counters.launch_and_check(problem, profiling)


# --- the command, with a stand-in for ncu that prints what ncu prints ---


def stand_in(folder: Path, log: str, exit_code: int = 0) -> str:
    (folder / "log").write_text(log)
    script = folder / "ncu"
    script.write_text(f"""#!{sys.executable}
import sys
if sys.argv[1:] == ["--version"]:
    print("NVIDIA (R) Nsight Compute Command Line Profiler\\nVersion 2025.3.1.0 (build 36398880)")
    sys.exit()
assert sys.argv[-1] == "--child" and "--cache-control=all" in sys.argv
print(open({str(folder / "log")!r}).read())
sys.exit({exit_code})
""")
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    environment = {"device": "NVIDIA H100 80GB HBM3", "driver": "580.1", "date": "2026-11-24"}
    monkeypatch.setattr(timing, "missing_gpu", lambda: None)
    monkeypatch.setattr(timing, "environment", lambda: environment)
    return environment


def test_record_names_device_sources_and_ncu(
    gpu: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(tmp_path, ncu_log())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert counters.main(["--record"]) == 0
    written = json.loads((tmp_path / "counters_h100.json").read_text())
    assert {name: written[name] for name in gpu} == gpu
    assert written["source_sha256"] == record.source_sha256()
    assert written["ncu_version"] == "2025.3.1.0"
    assert "--clock-control=none" in written["command"]
    assert written["rows"] == counters.rows_of(ncu_log())
    table = capsys.readouterr().out.splitlines()[-4:]
    assert len({len(line) for line in table}) == 1
    assert table[1].split()[:10] == [
        *counters.CASES[0].key.split(), "7.6", "0.53", "0.57", "1.076", "75",
    ]  # fmt: skip
    (tmp_path / "counters_h100.json").unlink()
    assert counters.main([]) == 0
    assert not (tmp_path / "counters_h100.json").exists()


def test_failure_of_ncu_is_shown(
    gpu: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "==ERROR== ERR_NVGPUCTRPERM - no permission to access performance counters", 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"(?s)ERR_NVGPUCTRPERM.*ncu ended with 1"):
        counters.main([])


def test_without_a_gpu_or_ncu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "missing_gpu", lambda: "no CUDA device")
    assert counters.main(["--record"]) == 2
    assert capsys.readouterr().out == "no CUDA device: nothing to profile\n"
    monkeypatch.setattr(timing, "missing_gpu", lambda: None)
    monkeypatch.setattr(counters.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match=r"ncu .* was not found"):
        counters.main([])


def test_runs_as_a_file() -> None:
    command = [sys.executable, counters.__file__, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout
    assert "--record [FILE]" in shown
    assert "--child" not in shown
