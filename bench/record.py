"""Writes the committed records under bench/results/.

    python bench/record.py tests                       the GPU tests        -> gpu_tests.json
    python bench/record.py bench                       the grid, with peers -> decode_<device>.json
    python bench/record.py gemma3 [--model FILE.gguf]  greedy text, GPU and NumPy -> gemma3.json

All need a GPU, and name the device, the driver, the date and the sources (`source_sha256`) that were run.
`bench --group NAME` (of bench/configs.py), `--quick` (a row of every kind) and `--only S` (rows whose key contains
S) choose rows, and write decode_<device>.partial.json: records are whole runs. `bench` ends with 1 where a row
is wrong or misses what the first version was held to; the other rules are reported, not enforced. `tests` and a whole
`bench` compile all kernels for the device first, and end there where CI would refuse what the compiler says of them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run as a file, Python sees bench/ only

from bench import configs, rules, timing  # noqa: E402
from bench.rules import RESULTS, Record  # noqa: E402


def source_sha256(root: Path = ROOT) -> str:
    """Hash of what was run: for each .py, .cu, .cuh and .h file under cupyattn/ and kernels_cu/, in sorted
    order of its POSIX path relative to `root`: that path, a NUL, the file's bytes, a NUL."""
    digest = hashlib.sha256()
    files = [path for top in ("cupyattn", "kernels_cu") for path in (root / top).rglob("*")]
    sources = {
        path.relative_to(root).as_posix(): path
        for path in files
        if path.suffix in (".py", ".cu", ".cuh", ".h")
    }
    for name in sorted(sources):
        digest.update(name.encode() + b"\0" + sources[name].read_bytes() + b"\0")
    return digest.hexdigest()


@contextlib.contextmanager
def unchanged_sources() -> Iterator[str]:
    """The hash of the sources; SystemExit where they are others when the body has run."""
    sha = source_sha256()
    yield sha
    if source_sha256() != sha:
        raise SystemExit("the sources changed during the run: its record would be worthless")


def tool_version(tool: str) -> str:
    """What a command-line tool of CUDA calls its version."""
    text = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"Version (\S+)", text)
    return found[1] if found else text.strip()


def write(record: Record, path: Path) -> None:
    """Writes JSON in one step, a row to a line, so that an interrupted run leaves the last whole state."""
    rows = record.get("rows", [])
    head = json.dumps({**record, "rows": []} if rows else record, indent=1)
    if rows:
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        head = head.replace('"rows": []', f'"rows": [\n  {lines}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(head + "\n", encoding="utf-8")
    os.replace(scratch, path)


# --- tests ---


def parse_junit(*paths: Path) -> Record:
    """Counts, durations, failures and properties from pytest's JUnit files.

    Whole-number properties (`record_property("fuzz_cases", 2000)` in a test, or `record_testsuite_property`)
    are added up by name.
    """
    roots = [ElementTree.parse(path).getroot() for path in paths]
    outcomes: dict[str, str] = {}
    seconds: dict[str, float] = {}
    skip_reasons = set()
    for case in (case for root in roots for case in root.iter("testcase")):
        name = f"{case.get('classname')}::{case.get('name')}"
        seconds[name] = seconds.get(name, 0.0) + float(case.get("time", 0))
        if case.find("failure") is not None or case.find("error") is not None:
            outcomes[name] = "failed"
        elif (reason := case.find("skipped")) is not None:
            outcomes[name] = "skipped"
            skip_reasons.add(reason.get("message", ""))
        else:  # a test that fails while tearing down comes twice: passed, and as an error
            outcomes.setdefault(name, "passed")
    properties: dict[str, int] = {}
    for item in (item for root in roots for item in root.iter("property")):
        value = item.get("value", "")
        if value.lstrip("-").isdigit():
            properties[item.get("name", "")] = properties.get(item.get("name", ""), 0) + int(value)
    counts = Counter(outcomes.values())
    slowest = sorted(seconds, key=lambda name: seconds[name], reverse=True)[:10]
    return {
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "seconds": round(sum(seconds.values()), 1),
        "properties": properties,
        "failures": [name for name, outcome in outcomes.items() if outcome == "failed"],
        "skip_reasons": sorted(skip_reasons),
        "slowest": {name: round(seconds[name], 2) for name in slowest},
    }


NO_TESTS = 5  # what pytest ends with where none is chosen


def precompile() -> None:
    """Compile all kernels for this device, many at a time: or whatever first uses one waits for it, minutes in all.

    SystemExit where CI would refuse them for what the compiler says: figures of other sources would be worth nothing.
    """
    from cupyattn.runtime.device import device_properties

    subprocess.run([sys.executable, "-m", "cupyattn", "precompile"], cwd=ROOT, check=True)
    test, arch = "tests/test_kernels_compile.py", device_properties().arch
    command = [sys.executable, "-m", "pytest", "-q", test, "-k", arch]
    run = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if run.returncode not in (0, NO_TESTS):
        raise SystemExit(f"{run.stdout[-4000:]}\nCI would refuse these kernels; nothing recorded")


# Tests marked so measure times, or hold SMs, and run when all else is done: other processes would disturb them.
ALONE = "alone"


def run_tests(files: Sequence[Path], chosen: str, junit: Path) -> int:
    """Run GPU tests of files, of the `chosen` marks; print how it ended, and where a test fails what pytest says."""
    paths = [str(file) for file in files]
    command = [sys.executable, "-m", "pytest", *paths, "-m", f"gpu and {chosen}", "-q", f"--junitxml={junit}"]
    run = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if run.returncode == NO_TESTS:
        return 0
    last = run.stdout.strip().rpartition("\n")[2]
    print(f"{junit.stem}: {last}" if run.returncode == 0 else run.stdout, flush=True)
    return run.returncode


def run_all_tests(files: Sequence[Path], scratch: Path, jobs: int) -> tuple[int, list[Path]]:
    """Run the GPU tests of all files, `jobs` of them at a time: they are busy on the host. Exit status and reports.

    The status is the first that is not 0, of whatever sign: a process that a signal ends has a negative one, and leaves
    no report.
    """
    reports = [scratch / f"{file.stem}.xml" for file in files]
    with ThreadPoolExecutor(jobs) as pool:
        codes = list(pool.map(lambda file, report: run_tests([file], f"not {ALONE}", report), files, reports))
    reports.append(scratch / f"{ALONE}.xml")
    codes.append(run_tests(files, ALONE, reports[-1]))
    return next(filter(None, codes), 0), reports


def record_tests(path: Path, jobs: int) -> int:
    start = time.perf_counter()
    precompile()
    with unchanged_sources() as sha, tempfile.TemporaryDirectory() as scratch:
        files = sorted((ROOT / "tests").glob("test_*.py"))
        code, reports = run_all_tests(files, Path(scratch), jobs)
        if missing := [report.stem for report in reports if not report.exists()]:
            print(f"pytest ended with {code} and left no report of {', '.join(missing)}; nothing recorded")
            return code or 1
        counts = parse_junit(*reports)
    record = {
        "kind": "gpu tests",
        **timing.environment(),
        "source_sha256": sha,
        "command": "pytest FILE -m 'gpu and not alone', for each file of tests/; pytest -m 'gpu and alone'",
        "jobs": jobs,
        "pytest_exit": code,
        "wall_s": round(time.perf_counter() - start, 1),
        **counts,
    }
    write(record, path)
    print(f"{path.name}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped "
          f"{counts['properties']}")  # fmt: skip
    return code


# --- bench ---


def judge(record: Record) -> None:
    """Writes into the record its verdicts, and into each row the rules that it misses."""
    record.update(rules.verdicts(record))
    for case in rules.cases(record):
        case.row["missed"] = [name for name, (_, met) in rules.judged(case).items() if met is False]


def line(row: Record) -> str:
    """A row as it is shown while the bench runs."""
    if "error" in row:
        return f"{row['key']:<52} {row['error']}"
    figures = {
        name.removesuffix("_us"): row[name]
        for name in ("cold_us", "pdl_us", "fixed_us", "plain_us", "cascade_us", "warm_us", "eager_us")
        if name in row
    }
    times = "".join(f" {name:>5}{us:>8.1f}" for name, us in figures.items())
    return f"{row['key']:<52}{times}{row['of_roof']:>6.0%}  missed: {', '.join(row.get('missed', ())) or '-'}"


def record_bench(chosen: Sequence[configs.Config], path: Path, seed: int, with_peers: bool) -> int:
    from bench.rows import Bench  # imports cupyattn

    start = time.perf_counter()
    if len(chosen) == len(configs.GRID):
        precompile()
    with unchanged_sources() as sha:
        bench = Bench(chosen, seed, with_peers)
        record: Record = {
            "kind": "decode bench",
            **bench.environment,
            "source_sha256": sha,
            "seed": seed,
            "read_roof_gbs": bench.roof.read_gbs,
            "matmul_tflops": bench.roof.matmul_tflops,
            "peers": bench.peer_versions,
            "wall_s": 0.0,
            "rules": [],
            "foundation": [],
            "rows": [],
        }
        for config in chosen:
            try:
                row = bench.row(config)
            except Exception as error:  # the other rows are still worth having
                traceback.print_exc()
                row = {"key": config.key, "error": f"{type(error).__name__}: {error}"}
            record["rows"].append(row)
            judge(record)
            record["wall_s"] = round(time.perf_counter() - start, 1)
            write(record, path)
            print(f"{record['wall_s']:6.1f} s  {line(row)}", flush=True)
    print(
        "",
        f"{record['device']}: roof {record['read_roof_gbs']:.0f} GB/s, "
        f"matrix product {record['matmul_tflops']:.0f} TFLOP/s; peers {record['peers']}",
        *rules.summary(record["rules"]),
        "",
        *rules.summary(record["foundation"]),
        f"written: {path}",
        sep="\n",
    )
    return int(any(verdict["ok"] is False for verdict in record["foundation"]))


def record_gemma3(path: Path, model: str | None) -> int:
    """Both backends write 64 tokens after each of the example's prompts; 1 if a text differs without a tie."""
    from cupyattn.examples import gemma3

    with unchanged_sources() as sha, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "compare.json"
        gemma3.main(
            ["--compare", "--tokens", "64", "--json", str(file), *(["--model", model] if model else [])]
        )
        result = json.loads(file.read_text())
    record = {
        "kind": "gemma3 greedy text",
        **timing.environment(),
        "source_sha256": sha,
        **result,
    }
    write(record, path)
    print(f"{path.name}: {result['num_same']} of {len(result['texts'])} texts the same")
    return int(result["num_same"] < len(result["texts"]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tests = commands.add_parser("tests", help="run and record the GPU tests")
    bench = commands.add_parser("bench", help="run and record the grid")
    gemma = commands.add_parser("gemma3", help="compare and record the example's text on both backends")
    gemma.add_argument("--model", help="GGUF file; default: the one of the PyPI package")
    tests.add_argument("--jobs", type=int, default=6, help="files of tests at a time (%(default)s)")
    for command in (tests, bench, gemma):
        command.add_argument("--output", type=Path, help="default: a file under bench/results/")
    bench.add_argument("--group", choices=configs.GROUPS, help="the rows of one group")
    bench.add_argument("--quick", action="store_true", help="some twenty rows")
    bench.add_argument("--only", metavar="S", help="rows whose key contains S")
    bench.add_argument("--seed", type=int, help="of the inputs; default: a new one, which the record names")
    bench.add_argument("--no-peers", action="store_true")
    options = parser.parse_args(arguments)

    if reason := timing.missing_gpu():
        print(f"{reason}: nothing to record")
        return 2
    if options.command == "tests":
        return record_tests(options.output or RESULTS / "gpu_tests.json", options.jobs)
    if options.command == "gemma3":
        return record_gemma3(options.output or RESULTS / "gemma3.json", options.model)
    chosen = [
        config
        for config in (configs.GROUPS[options.group] if options.group else configs.GRID)
        if (not options.quick or config.key in configs.QUICK_KEYS) and (options.only or "") in config.key
    ]
    if not chosen:
        parser.error("no row fits --group, --quick and --only together")
    partial = ".partial" if len(chosen) < len(configs.GRID) else ""
    slug = timing.device_slug(timing.environment()["device"])
    path = options.output or RESULTS / f"decode_{slug}{partial}.json"
    seed = secrets.randbits(32) if options.seed is None else options.seed
    return record_bench(chosen, path, seed, not options.no_peers)


if __name__ == "__main__":
    sys.exit(main())
