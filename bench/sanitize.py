"""Every kernel on tiny problems, for compute-sanitizer.

    python bench/sanitize.py [--part I N]                 run the grid and check its results; or part I of N of it
    compute-sanitizer --tool memcheck --error-exitcode 9 python bench/sanitize.py
    python bench/sanitize.py --record [FILE] [--parts N]  run it under memcheck, racecheck and synccheck, parts side by
                                                          side -> bench/results/sanitizer.json

Each array has an allocation of its own, so that memcheck sees where it ends; arrays are filled on the host, so
that only cupyattn's kernels run. The record names the device, the driver, the date and the sources.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench import record, timing  # noqa: E402

TOOLS = ("memcheck", "racecheck", "synccheck")
ERROR_EXIT = 9
TIMEOUT_S = 540
T = TypeVar("T")


# -- the grid --


class Part(NamedTuple):
    """Every `of`-th problem of each kind, from `index` on."""

    index: int = 0
    of: int = 1

    def pick(self, problems: Iterable[T]) -> Iterator[T]:
        return itertools.islice(problems, self.index, None, self.of)


def decode_problems() -> Iterator[tuple[str, Any, dict[str, int]]]:
    """(name, problem on the host, options) for each template instance of `decode`, and a few with fixed splits.

    While it is the caller's turn, `decode` takes that shape (`decode_shape`).

    Short requests; one whose keys take 71 CTAs with a tile each, or 71 fixed splits, and as many partial states; and
    in bfloat16 so many of three tiles that the longest run has more tiles than stages, and several segments; and in
    tiles of many rows a long one beside a short one, so that groups start runs.
    """
    from device import decode_shape
    from problems import build_problem

    from cupyattn import kernels

    for dtype, head_dim in itertools.product(kernels.DECODE_DTYPES, kernels.DECODE_HEAD_DIMS):
        shapes = kernels.decode_configs("sm_90a", head_dim)
        for shape in shapes:
            num_kv_heads = shape.heads
            # Not all rows of a tile, or (of the largest tiles) several tokens' in it, and in several.
            rows = {8: 4, 16: 12, 32: 20, 64: 40}[shape.tile_q] if num_kv_heads == 1 else 4
            is_largest = shape.tile_q == max(one.tile_q for one in shapes)
            common = {
                "dtype": dtype,
                "head_dim": head_dim,
                "num_kv_heads": num_kv_heads,
                "group_size": rows,
                "page_size": 16,
            }
            words = (dtype, f"d={head_dim}", f"rows={num_kv_heads}x{rows}", f"tile={shape.tile_kv}")
            name = " ".join((*words, f"stages={shape.num_stages}"))
            short = build_problem(
                [0, 1, 65, 130, 20], qo_lens=[1, 1, 3, 0, 20] if is_largest else None,
                storage="interleaved", window_left=40, logits_soft_cap=20.0, **common,
            )  # fmt: skip
            layout = "HND" if num_kv_heads == 1 else "NHD"
            long = build_problem([4500], dense=True, layout=layout, **common)
            modes: list[dict[str, int]] = [{}]
            is_split = shape == kernels.decode_config("sm_90a", head_dim, shape.tile_q)
            if dtype == "bfloat16" and head_dim in (64, 128) and shape.tile_q <= 32 and is_split:
                modes.append({"fixed_split_size": 64})
            with decode_shape(shape):
                for mode in modes:
                    fixed = " fixed" if mode else ""
                    yield f"{name} short{fixed}", short, mode
                    yield f"{name} long{fixed}", long, mode
                if dtype == "bfloat16":
                    num_keys = 2 * shape.tile_kv + 2
                    yield f"{name} many", build_problem([num_keys] * 600, **common), {}
                if dtype == "bfloat16" and shape.tile_q > 32:  # each group starts a run
                    lens = [(2 * shape.ctas_per_sm * 132 + 30) * shape.tile_kv, 700]
                    yield f"{name} starts", build_problem(lens, **common), {}


def run_decode(part: Part) -> int:
    from device import attend, misses
    from problems import to_backend

    import cupyattn

    count = 0
    for name, problem, mode in part.pick(decode_problems()):
        out, lse = to_backend(problem, _cupy()).call(cupyattn.decode, return_lse=True, **mode)
        wrong = int(misses(out.get(), lse.get(), attend(problem), problem.dtype, np))
        if wrong:
            raise SystemExit(f"decode {name}: {wrong} wrong numbers")
        count += 1
    return count


def mla_problems() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, problem on the host, options) for `mla_decode`: short and long requests, as in `decode_problems`.

    These are problems of `decode` whose keys and values are the same 576 numbers: `attend` gives 576 columns for
    them, of which the first 512 are MLA's. 16 heads fill a tile of rows, 24 and 40 do not, 128 take several;
    with `qo_lens` a tile may hold several tokens.
    """
    from problems import build_problem

    from cupyattn import kernels

    shapes = (
        (16, 16, None),
        (24, 16, None),
        (32, 64, [1, 1, 3, 0, 20]),
        (40, 1, None),
        (128, 64, [1, 1, 2, 0, 3]),
    )
    for dtype, (heads, page_size, qo_lens) in itertools.product(kernels.DECODE_DTYPES, shapes):
        common: dict[str, Any] = {
            "dtype": dtype,
            "head_dim": 576,
            "num_kv_heads": 1,
            "group_size": heads,
            "page_size": page_size,
            "sm_scale": 192**-0.5,
        }
        problems = {
            "short": build_problem(
                [0, 1, 65, 130, 20], qo_lens=qo_lens, window_left=40, logits_soft_cap=20.0, **common
            ),
            "long": build_problem([4500], dense=True, **common),
        }
        # With a table for many more tokens, sm_90a's own kernel is chosen for up to 64 rows, too.
        roomy = {"short": [0, 1, 65, 130, 20], "long": [4500]}
        for length, kv_lens in roomy.items():
            problems[f"{length} roomy"] = build_problem(
                kv_lens, qo_lens=qo_lens if length == "short" else None, spare_entries=12000, **common
            )
        # Runs of six tiles, which sm_90a's kernel copies by boxes, for 128 heads to both CTAs of a pair. Requests
        # differ, so groups count for more tiles than they have, or, with 128 heads, each starts a run.
        if dtype == "bfloat16" and heads in (16, 128):
            problems["runs"] = build_problem([44_000 if heads == 16 else 21_500, 1000], **common)
        # 64 rows in 127 states, of which a CTA has five lines, and room for four (flagged.cuh).
        if dtype == "bfloat16" and heads == 40:
            problems["rounds"] = build_problem([127 * 64], spare_entries=12000, **common | {"group_size": 64})
        # For mla.cu on 132 SMs: 130 states, whose lines CTAs merge by halves; runs of two tiles of 32 rows.
        if dtype == "bfloat16" and heads in (16, 40):
            problems["few keys"] = build_problem([4160] if heads == 16 else [600] * 8, dense=True, **common)
        for mode, (length, problem) in itertools.product(({}, {"fixed_split_size": 64}), problems.items()):
            # Fixed splits are mla.cu's; with much room in the table they have a workspace of gigabytes.
            if mode and length in ("short roomy", "long roomy", "runs", "rounds", "few keys"):
                continue
            fixed = " fixed" if mode else ""
            keys_as_values = problem.replace(bases=problem.bases[:1] * 2)
            yield f"{dtype} heads={problem.q.shape[1]} p{page_size} {length}{fixed}", keys_as_values, mode


def run_mla(part: Part) -> int:
    from device import attend, misses
    from problems import to_backend

    import cupyattn

    count = 0
    for name, problem, mode in part.pick(mla_problems()):
        there = to_backend(problem, _cupy())
        cache = cupyattn.PagedMLACache.from_concatenated(there.bases[0][:, :, 0])
        out, lse = cupyattn.mla_decode(there.q, cache, there.pages, return_lse=True, **there.options, **mode)
        wanted, wanted_lse = attend(problem)
        wrong = int(misses(out.get(), lse.get(), (wanted[..., :512], wanted_lse), problem.dtype, np))
        if wrong:
            raise SystemExit(f"mla_decode {name}: {wrong} wrong numbers")
        count += 1
    return count


def cascade_structures(many: int) -> dict[str, dict[str, Any]]:
    """Arguments of `build_cascade`, by name; 12 query tokens in the largest groups on average.

    short   groups of one tile and of several in two levels above the requests, a window that ends in either, several
            tokens a request, requests without a token, in no group or without keys of their own
    long    a group with more tiles than there are CTAs: it is split, in runs of several tiles; tokens in any order
    uneven  requests of which one has five times as many tiles of its own as another
    many    dozens of requests (`many`, or none of this), so that there are more groups than CTAs, and more than shared
            memory has room for beside the tiles (but for those of 128 rows and 64 columns)
    """
    structures: dict[str, dict[str, Any]] = {
        "short": {
            "own_lens": [0, 1, 65, 130, 20, 7, 0, 30],
            "qo_lens": [1, 1, 3, 0, 4, 1, 1, 1],
            "shared": [([8], [150]), ([1, 4, 2], [20, 130, 0], 1)],
            "window_left": 180,
            "logits_soft_cap": 20.0,
        },
        "long": {
            "own_lens": [70, 0, 130],
            "qo_lens": [4, 4, 4],
            "shared": [([3], [9000])],
            "permuted": True,
            "padding": 3,
        },
        "uneven": {"own_lens": [5, 300, 70] * 8, "shared": [([12] * 2, [200] * 2)]},
    }
    if many:
        sizes = ((12, 70), (2, 10), (1, 3))
        structures["many"] = {
            "own_lens": [5] * 12 * many,
            "shared": [([size] * (12 * many // size), [keys] * (12 * many // size)) for size, keys in sizes],
            "page_size": 1,
        }
    return structures


def cascade_problems() -> Iterator[tuple[str, Any]]:
    """(name, cascade on the host) for each template instance of `cascade_decode`, GQA and MLA.

    While it is the caller's turn, `cascade_decode` takes that shape, and groups of GQA count for a tile more where
    requests differ.
    """
    from cascade_problems import build_cascade, group_overhead, tile_rows

    from cupyattn import kernels

    for dtype, head_dim in itertools.product(kernels.DECODE_DTYPES, kernels.DECODE_HEAD_DIMS):
        for tile_q in sorted({config.tile_q for config in kernels.cascade_configs("sm_90a", head_dim)}):
            for name, structure in cascade_structures(170 if dtype == "bfloat16" else 0).items():
                if dtype == "float16" and name != "short":
                    continue  # differs in conversions alone
                layout = {"storage": "interleaved"} if name == "short" else {"layout": "HND"}
                num_kv_heads = 2 if name == "long" else 1
                cascade = build_cascade(
                    **structure, **layout, dtype=dtype, head_dim=head_dim, group_size=tile_q // 8,
                    num_kv_heads=num_kv_heads,
                )  # fmt: skip
                with tile_rows(tile_q), group_overhead(0, 1):
                    yield f"{dtype} d={head_dim} tile={tile_q} {name}", cascade
            if tile_q == kernels.DecodeSm90Config.tile_q and dtype == "bfloat16":
                # 64 rows of the result for each of 132 CTAs: decode_sm90.cu finds early where up to 91 have states, and
                # lists 1024 states; the first CTA's rows have more where few tokens share much.
                for name, own, shared, group_size, page_size in (
                    ("rows", [5] * 528, ([12] * 44, [70] * 44), 16, 1),
                    ("states", [20] * 1100, ([16], [20_000]), 8, 16),
                ):
                    cascade = build_cascade(
                        own, [shared], dtype=dtype, head_dim=head_dim, group_size=group_size,
                        num_kv_heads=1, page_size=page_size,
                    )  # fmt: skip
                    with tile_rows(tile_q):
                        yield f"{dtype} d={head_dim} tile={tile_q} {name}", cascade
    for dtype, tile_q in itertools.product(kernels.DECODE_DTYPES, (None, 16, 32, 64)):
        many = (
            40 if dtype == "bfloat16" and tile_q is not None else 0
        )  # few enough for the smaller tiles of mla.cu
        for name, structure in cascade_structures(many).items():
            if dtype == "float16" and name != "short":
                continue
            heads = (tile_q or 16) // 8
            cascade = build_cascade(**structure, mla=True, num_heads=heads, dtype=dtype)
            with tile_rows(tile_q):
                yield f"{dtype} MLA tile={tile_q} {name}", cascade


def run_cascade(part: Part) -> int:
    from device import attend, misses

    count = 0
    for name, cascade in part.pick(cascade_problems()):
        out, lse = cascade.moved(_cupy()).call(return_lse=True)
        rows, dtype = cascade.rows, cascade.problem.dtype
        wrong = int(misses(out.get()[rows], lse.get()[rows], attend(cascade.plain), dtype, np))
        if wrong:
            raise SystemExit(f"cascade_decode {name}: {wrong} wrong numbers")
        count += 1
    return count


def run_mla_append(part: Part) -> int:
    from problems import DTYPES

    import cupyattn
    from cupyattn import PagedMLACache, PageTable, Rope

    count = 0
    for dtype, rope in part.pick(itertools.product(("float16", "bfloat16"), (None, Rope(interleaved=True)))):
        rng = np.random.default_rng(count)
        shapes = ((20, 4, 576), (11, 512), (11, 64), (11, 3, 64))  # cache, ckv, kpe, q_kpe
        arrays = [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]
        tables = [
            np.array(x, np.int32)
            for x in ([0, 1, 1, 11, 16, 17], rng.permutation(20)[:17], [3, 0, 40, 17, 2])
        ]
        qo_indptr = np.array([0, 3, 3, 8, 9, 11], np.int32)
        results = []
        for xp in (_cupy(), np):  # NumPy: the specification
            rows, ckv, kpe, q_kpe = (xp.array(x) for x in arrays)
            cache = PagedMLACache.from_concatenated(rows)
            q_kpe = cupyattn.mla_append(
                ckv, kpe, cache, PageTable(*map(xp.asarray, tables)), qo_indptr=xp.asarray(qo_indptr), rope=rope,
                q_kpe=q_kpe,
            )  # fmt: skip
            results.append((q_kpe, rows))
        for actual, wanted in zip(*results, strict=True):
            if not np.allclose(actual.get().astype("f4"), wanted.astype("f4"), rtol=1e-2, atol=1e-2):
                raise SystemExit(f"mla_append {dtype} {rope}: wrong")
        count += 1
    return count


def run_append(part: Part) -> int:
    from problems import build_problem, to_backend

    import cupyattn
    from cupyattn import Rope

    ropes = (None, Rope(), Rope(rotary_dim=32, interleaved=True))
    count = 0
    for dtype, rope, storage in part.pick(
        itertools.product(("float16", "bfloat16"), ropes, ("interleaved", "strided"))
    ):
        problem = build_problem(
            [3, 0, 40, 17, 2],
            qo_lens=[3, 2, 5, 0, 1],
            page_size=4,
            dtype=dtype,
            storage=storage,
            poison=False,
        )
        rng = np.random.default_rng(count)
        k, v = (rng.standard_normal((11, 2, 64)).astype(problem.q.dtype) for _ in range(2))
        there = to_backend(problem, _cupy())
        q = cupyattn.append(
            _cupy().asarray(k), _cupy().asarray(v), there.cache, there.pages, qo_indptr=there.qo_indptr,
            rope=rope, q=there.q,
        )  # fmt: skip
        back = to_backend(there, np)
        rotated = cupyattn.append(  # NumPy: the specification
            k, v, problem.cache, problem.pages, qo_indptr=problem.qo_indptr, rope=rope, q=problem.q
        )
        pairs = [(q.get(), rotated), *zip(back.bases, problem.bases, strict=True)]
        for actual, wanted in pairs:
            if not np.allclose(
                actual.astype("f4"), wanted.astype("f4"), rtol=1e-2, atol=1e-2, equal_nan=True
            ):
                raise SystemExit(f"append {dtype} {rope} {storage}: wrong")
        count += 1
    return count


def run_merge(part: Part) -> int:
    import ml_dtypes

    import cupyattn

    count = 0
    kinds = itertools.product(
        (np.float16, ml_dtypes.bfloat16, np.float32), (((2, 5), 0), ((3, 35, 2), 1)), (1, 33, 64, 512)
    )
    for dtype, (shape, axis), head_dim in part.pick(kinds):
        rng = np.random.default_rng(head_dim)
        out = rng.standard_normal((*shape, head_dim)).astype(dtype)
        lse = rng.standard_normal(shape).astype(np.float32)
        lse[1, 1], out[1, 1] = -np.inf, np.nan
        merged, _ = cupyattn.merge_states(_cupy().asarray(out), _cupy().asarray(lse), axis)
        wanted, _ = cupyattn.merge_states(out, lse, axis)
        if not np.allclose(merged.get().astype("f4"), wanted.astype("f4"), rtol=1e-2, atol=1e-2):
            raise SystemExit(f"merge_states {np.dtype(dtype)} {shape} {head_dim}: wrong")
        count += 1
    return count


def _cupy() -> Any:
    return timing.cupy


def run_grid(part: Part) -> None:
    _cupy().cuda.set_allocator(None)  # no pool: an allocation an array
    runs: dict[str, Callable[[Part], int]] = {
        "decode": run_decode,
        "mla_decode": run_mla,
        "cascade_decode": run_cascade,
        "append": run_append,
        "mla_append": run_mla_append,
        "merge_states": run_merge,
    }
    for name, run in runs.items():
        start = time.perf_counter()
        print(f"{name}: {run(part)} problems right, {time.perf_counter() - start:.1f} s", flush=True)
    _cupy().cuda.Device().synchronize()


# -- the record --


def find_sanitizer() -> str:
    """Path of compute-sanitizer: on PATH, in a toolkit, or in the package nvidia-cuda-sanitizer-api."""
    folders = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    candidates = [shutil.which("compute-sanitizer")]
    candidates += [
        str(path)
        for folder in filter(None, folders)
        for path in (
            Path(folder, "bin", "compute-sanitizer"),
            Path(folder, "compute-sanitizer", "compute-sanitizer"),
        )
    ]
    for site in map(Path, sys.path):
        candidates += map(str, sorted((site / "nvidia").glob("**/compute-sanitizer")))
    for path in filter(None, candidates):
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise SystemExit("compute-sanitizer was not found: not on PATH, in CUDA_HOME or among Python packages")


def summary_of(log: str) -> str:
    """The tool's last word: "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (...)"."""
    lines = re.findall(r"^=+ *(.*SUMMARY:.*\S)", log, re.MULTILINE)
    return lines[-1] if lines else "no summary"


def findings_of(log: str) -> dict[str, int]:
    """How many of the tool's reports name each kernel instance; a kernel's parameter list is left out."""
    reports = re.findall(
        r"^=+ (?:Error|Warning|Invalid|Uninitialized|Barrier)[^\n]*(?:\n=+ {2,}[^\n]*)*", log, re.M
    )
    kernels = Counter(
        name.replace("(int)", "")
        for report in reports
        for name in dict.fromkeys(re.findall(r"cupyattn::(\w+<.*?>)\(", report))
    )
    return dict(kernels.most_common())


def run_tool(sanitizer: str, tool: str, part: Part) -> dict[str, Any]:
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR_EXIT), sys.executable, __file__]
    command += ["--part", *map(str, part)]
    start = time.perf_counter()
    try:
        run = subprocess.run(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_S
        )
        code, log = run.returncode, run.stdout
    except subprocess.TimeoutExpired as error:
        code, log = None, (error.stdout or b"").decode(errors="replace")
    result = {
        "tool": tool,
        "exit_code": code,
        "summary": summary_of(log) if code is not None else f"stopped after {TIMEOUT_S} s",
        "problems": sum(map(int, re.findall(r"(\d+) problems right", log))),
        "findings": findings_of(log),
        "wall_s": round(time.perf_counter() - start, 1),
    }
    print(f"{tool} {part.index + 1}/{part.of}: exit {code}, {result['summary']}, {result['problems']} problems, "
          f"{result['wall_s']} s", flush=True)  # fmt: skip
    for kernel, count in result["findings"].items():
        print(f"  {count} reports in {kernel}")
    if code != 0:
        print(log[:6000], "...", log[-2000:], sep="\n")
    return result


def sum_of(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a tool says of the whole grid: each different summary and exit code, and what counts added up."""
    codes = list(dict.fromkeys(part["exit_code"] for part in parts))
    return {
        "tool": parts[0]["tool"],
        "exit_code": next((code for code in codes if code != 0), 0),
        "summary": "; ".join(dict.fromkeys(part["summary"] for part in parts)),
        "problems": sum(part["problems"] for part in parts),
        "findings": dict(sum((Counter(part["findings"]) for part in parts), Counter()).most_common()),
        "wall_s": max(part["wall_s"] for part in parts),
    }


def write_record(path: Path, tools: Sequence[str], num_parts: int) -> int:
    sanitizer = find_sanitizer()
    with record.unchanged_sources() as sha:
        record.precompile()
        parts = [Part(index, num_parts) for index in range(num_parts)]
        with ThreadPoolExecutor(len(tools) * num_parts) as pool:  # they are busy on the host
            runs = [[pool.submit(run_tool, sanitizer, tool, part) for part in parts] for tool in tools]
            results = [sum_of([run.result() for run in of_tool]) for of_tool in runs]
    record.write(
        {
            "kind": "compute-sanitizer",
            **timing.environment(),
            "source_sha256": sha,
            "sanitizer_version": record.tool_version(sanitizer),
            "command": f"compute-sanitizer --tool TOOL --error-exitcode {ERROR_EXIT} python bench/sanitize.py "
            f"--part I {num_parts}",
            "rows": results,
        },
        path,
    )
    print(f"written: {path}")
    return 0 if all(result["exit_code"] == 0 for result in results) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--record", type=Path, nargs="?", const=record.RESULTS / "sanitizer.json", metavar="FILE"
    )
    parser.add_argument(
        "--parts", type=int, default=4, metavar="N", help="processes for each tool (%(default)s)"
    )
    parser.add_argument("--part", type=int, nargs=2, default=Part(), metavar=("I", "N"), help="from 0 on")
    parser.add_argument("--tools", nargs="+", choices=(*TOOLS, "initcheck"), default=TOOLS)
    options = parser.parse_args(arguments)
    if reason := timing.missing_gpu():
        print(f"{reason}: nothing to check")
        return 2
    if options.record is not None:
        return write_record(options.record, options.tools, options.parts)
    run_grid(Part(*options.part))
    return 0


if __name__ == "__main__":
    sys.exit(main())
