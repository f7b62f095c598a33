"""What a decode launch costs the hardware: Nsight Compute's counters of three cases.

    python bench/counters.py                   profile them and show the figures
    python bench/counters.py --record [FILE]   the same -> bench/results/counters_<device>.json

ncu runs this file once more, as its child. The child builds each case as the bench does, launches it over all input
sets and checks the outputs; the last launch alone is profiled. ncu replays that launch in several passes, a few
counters in each. Input sets that rotate would make only the first pass cold, so `--cache-control all` flushes and
invalidates the caches before every pass. Clocks stay as they are when the bench times (`--clock-control none`).

Bytes needed are the floor's without the output: K, V and q, once. What DRAM is read for beyond them is the lengths,
the page table and, as the caches are empty, the kernel's code and its arrival counters. A duration is that of one
kernel by itself; the bench's cold time is that of a node among others in a graph. Reads of L2 count what its parts
fetch from each other too; beside them, in brackets, stands what the SMs asked for.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run as a file, Python sees bench/ only

from bench import configs, record, timing  # noqa: E402

CASES = (
    configs.equal(1, 1024, 8, 1),  # 0.5 MB: latency
    configs.equal(8, 1024, 32, 8),  # 33 MB
    configs.equal(64, 8192, 32, 8),  # 2.1 GB: bandwidth
)
METRICS = {
    "duration_us": "gpu__time_duration.sum",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    "dram_percent_of_peak": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_read_sectors": "lts__t_sectors_op_read.sum",
    "l2_sm_read_sectors": "lts__t_sectors_srcunit_tex_op_read.sum",
    "instructions": "smsp__inst_executed.sum",  # of a warp each
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block_dynamic",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
OPTIONS = (
    "--csv",
    "--print-units=base",  # else 2,151,677,952 bytes come as "2.15 Gbyte"
    "--clock-control=none",
    "--cache-control=all",
    "--profile-from-start=off",  # the child says when
    "--kernel-name-base=function",
    "--kernel-name=regex:decode_kernel",
    f"--metrics={','.join(METRICS.values())}",
)
TIMEOUT_S = 300
_SECTOR_BYTES = 32
# To bytes and microseconds. Versions of ncu spell seconds in two ways.
_UNITS = {
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
    "ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6,
    "nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6,
    "%": 1.0, "inst": 1.0, "sector": 1.0, "register": 1.0, "": 1.0,
}  # fmt: skip


# --- the child ---


def launch_and_check(problem: timing.Problem, profiling: Callable[[], AbstractContextManager[Any]]) -> float:
    """Launches every set, the last one inside `profiling()`; returns the relative error that the check saw."""
    problem.poison()
    *before, last = problem.launches
    for launch in before:  # loads the kernel
        launch()
    with profiling():
        last()
    return problem.check()["rel_err"]


def run_cases() -> None:
    from cupyx.profiler import profile

    from bench.rows import Pool  # imports cupyattn

    l2_bytes = timing.environment()["l2_bytes"]
    pool = Pool(timing.cupy, CASES, l2_bytes, seed=secrets.randbits(32))
    for config in CASES:
        problem, _ = pool.decode(config)
        print(f"{config.key}: rel_err {launch_and_check(problem, profile)}", flush=True)


# --- ncu ---


def find_ncu() -> str:
    """Path of ncu: on PATH, in a CUDA toolkit, or in a folder of Nsight Compute's own."""
    toolkits = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [os.path.join(toolkit, "bin") for toolkit in toolkits if toolkit]
    folders += map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True))  # newest first
    found = shutil.which("ncu") or shutil.which("ncu", path=os.pathsep.join(folders))
    if found is None:
        raise SystemExit(
            "ncu (Nsight Compute) was not found: not on PATH, in CUDA_HOME or in /opt/nvidia/nsight-compute"
        )
    return found


def run_ncu(ncu: str) -> str:
    """What ncu and its child print."""
    run = subprocess.run(
        [ncu, *OPTIONS, sys.executable, __file__, "--child"],
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "C"},  # decimal points, whatever the user's locale has
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT_S,
    )
    if run.returncode:
        raise SystemExit(f"{run.stdout[-4000:]}\nncu ended with {run.returncode}: nothing recorded")
    return run.stdout


def value_of(row: dict[str, str]) -> float:
    """The number of one row of ncu's table, such as "33,620,480", in bytes or microseconds if it has a unit."""
    value, unit = row["Metric Value"], row["Metric Unit"]
    try:
        return float(value.replace(",", "")) * _UNITS[unit.split("/")[0]]  # "Kbyte/block"
    except (KeyError, ValueError):
        raise ValueError(f"{row['Metric Name']}: cannot read {value!r} with unit {unit!r}") from None


def parse_table(log: str) -> list[dict[str, float]]:
    """{metric: value} of each profiled launch, in order. The table has a row for each launch and metric."""
    launches: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(line for line in log.splitlines() if line.startswith('"')):
        launches.setdefault(row["ID"], {})[row["Metric Name"]] = value_of(row)
    return list(launches.values())


# --- the record ---


def row_of(config: configs.DecodeConfig, launch: dict[str, float], rel_err: float) -> record.Record:
    row = {name: launch[metric] for name, metric in METRICS.items()}
    for reads in ("l2_read", "l2_sm_read"):
        row[f"{reads}_bytes"] = _SECTOR_BYTES * row.pop(f"{reads}_sectors")
    needed_bytes = (config.num_bytes + config.kv_bytes) // 2  # q is as large as the output
    row["read_over_needed"] = row["dram_read_bytes"] / needed_bytes
    row["dram_gbs"] = (row["dram_read_bytes"] + row["dram_write_bytes"]) / row["duration_us"] * 1e-3
    figures = {name: int(x) if x.is_integer() else round(x, 4) for name, x in row.items()}
    return {"key": config.key, "needed_bytes": needed_bytes, **figures, "rel_err": rel_err}


def rows_of(log: str) -> list[record.Record]:
    """A row for each case; SystemExit, with the log, unless each was checked and profiled."""
    launches = parse_table(log)
    checked = {key: float(error) for key, error in re.findall(r"^(b\d.*): rel_err (\S+)$", log, re.M)}
    if len(launches) != len(CASES) or list(checked) != [config.key for config in CASES]:
        raise SystemExit(
            f"{log[-4000:]}\n{len(checked)} of {len(CASES)} cases checked, {len(launches)} profiled: "
            "nothing recorded"
        )
    return [
        row_of(config, launch, checked[config.key]) for config, launch in zip(CASES, launches, strict=True)
    ]


def table(rows: Sequence[record.Record]) -> list[str]:
    columns: dict[str, Callable[[record.Record], str]] = {
        "us": lambda row: f"{row['duration_us']:.1f}",
        "needed MB": lambda row: f"{row['needed_bytes'] * 1e-6:.2f}",
        "DRAM MB": lambda row: f"{row['dram_read_bytes'] * 1e-6:.2f}",
        "ratio": lambda row: f"{row['read_over_needed']:.3f}",
        "GB/s": lambda row: f"{row['dram_gbs']:.0f}",
        "of peak": lambda row: f"{row['dram_percent_of_peak']:.1f}%",
        "L2 MB (SM)": lambda row: f"{row['l2_read_bytes'] * 1e-6:.1f} ({row['l2_sm_read_bytes'] * 1e-6:.1f})",
        "instructions": lambda row: f"{row['instructions']:,}",
        "registers": lambda row: f"{row['registers']}",
        "shared": lambda row: f"{row['shared_bytes']:,}",
        "occupancy": lambda row: f"{row['occupancy_percent']:.1f}%",
    }
    lines = [("", *columns), *((row["key"], *(cell(row) for cell in columns.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--record", nargs="?", const="", metavar="FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if reason := timing.missing_gpu():
        print(f"{reason}: nothing to profile")
        return 2
    if options.child:
        run_cases()
        return 0
    ncu = find_ncu()
    with record.unchanged_sources() as sha:
        rows = rows_of(run_ncu(ncu))
    if options.record is not None:
        environment = timing.environment()
        slug = timing.device_slug(environment["device"])
        path = Path(options.record or record.RESULTS / f"counters_{slug}.json")
        record.write(
            {
                "kind": "decode counters",
                **environment,
                "source_sha256": sha,
                "ncu_version": record.tool_version(ncu),
                "command": f"ncu {' '.join(OPTIONS)} python bench/counters.py --child",
                "rows": rows,
            },
            path,
        )
        print(f"written: {path}")
    print(*table(rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
