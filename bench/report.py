"""Draws a record: a roofline plot (PNG, SVG) and a Markdown table, beside the record unless told otherwise.

    python bench/report.py [RECORD] [--output-dir DIR]

Peers are those timed in the same run, else those of results/peers_<device>.json, measured earlier on such a
device; the latter are marked with a star.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Record = dict[str, Any]

_STYLE = {  # name: (label, marker, colour)
    "ours": ("cupyattn", "o", "#c1272d"),
    "torch-sdpa": ("torch SDPA, dense", "_", "#333333"),
    "flashinfer": ("FlashInfer", "x", "#0072b2"),
    "flashinfer-tc": ("FlashInfer, tensor cores", "+", "#56b4e9"),
    "fa3": ("FlashAttention-3", "1", "#009e73"),
    "xqa": ("TRT-LLM XQA", "2", "#cc79a7"),
    "xformers": ("xformers", "3", "#e69f00"),
}


def timed_rows(record: Record) -> list[Record]:
    return [row for row in record["rows"] if "cold_us" in row]


def earlier_peers(slug: str) -> dict[str, dict[str, float]]:
    """{row key: {peer: cold us}} measured earlier on a device of this short name, if there is such a file."""
    path = RESULTS / f"peers_{slug}.json"
    return json.loads(path.read_text(encoding="utf-8"))["cold_us"] if path.exists() else {}


def peer_times(row: Record, earlier: dict[str, dict[str, float]]) -> dict[str, tuple[float, bool]]:
    """{peer: (cold us, from this run)}."""
    times = {name: (us, False) for name, us in earlier.get(row["key"], {}).items()}
    times |= {
        name: (peer["cold_us"], True) for name, peer in row.get("peers", {}).items() if "cold_us" in peer
    }
    return times


def markdown(record: Record, earlier: dict[str, dict[str, float]]) -> str:
    """The record as a table: a head line, a row for each configuration, the verdicts."""

    def peer(times: dict[str, tuple[float, bool]]) -> str:
        if not times:
            return ""
        name = min(times, key=lambda name: times[name][0])
        us, same_run = times[name]
        return f"{us:.1f} {name}{'' if same_run else ' *'}"

    lines = [
        f"{record['device']}, driver {record['driver']}, {record['date']}; "
        f"sources {record['source_sha256'][:12]}. "
        f"Read roof {record['read_roof_gbs']:.0f} GB/s, "
        f"matrix product {record['matmul_tflops']:.0f} TFLOP/s.",
        "",
        "| configuration | MB | cold us | warm us | eager us | GB/s | of roof | over floor | SDPA us "
        "| best paged peer us |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        if "cold_us" not in row:
            lines.append(f"| {row['key']} | failed: {row['error']} |" + " |" * 8)
            continue
        times = peer_times(row, earlier)
        dense = {name: times.pop(name) for name in ("torch-sdpa",) if name in times}
        dense_us = "".join(f"{us:.1f}{'' if same_run else ' *'}" for us, same_run in dense.values())
        lines.append(
            f"| {row['key']} | {row['num_bytes'] * 1e-6:.1f} | {row['cold_us']:.1f} | {row['warm_us']:.1f} "
            f"| {row['eager_us']:.1f} | {row['gbs']:.0f} | {row['of_roof']:.0%} | {row['over_floor']:.2f}x "
            f"| {dense_us} | {peer(times)} |"
        )
    lines += ["", "| rule | limit | worst | row | |", "|---|---:|---:|---|---|"]
    for verdict in record["verdicts"]:
        word = {True: "met", False: "**not met**", None: "no row"}[verdict["ok"]]
        worst, row = verdict["worst"], verdict["row"] or ""
        lines.append(
            f"| {verdict['rule']} | {verdict['limit']} | {'' if worst is None else worst} | {row} | {word} |"
        )
    if any("*" in line for line in lines[4:]):
        lines += ["", "\\* measured earlier on such a device, not in this run."]
    return "\n".join(lines) + "\n"


def plot(record: Record, earlier: dict[str, dict[str, float]], paths: Sequence[Path]) -> None:
    """Achieved bandwidth over bytes, decode rows only; what is not bandwidth is latency or computation."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cupyattn"  # the same record draws the same file
    from matplotlib import pyplot

    rows = [row for row in timed_rows(record) if row["key"].startswith("b")]
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in _STYLE}
    for row in rows:
        points["ours"].append((row["num_bytes"], row["gbs"]))
        for name, (us, _) in peer_times(row, earlier).items():
            points[name].append((row["num_bytes"], row["num_bytes"] / us * 1e-3))

    figure, axes = pyplot.subplots(figsize=(9, 5.2), layout="constrained")
    roof = record["read_roof_gbs"]
    axes.axhline(roof, color="#333333", linewidth=1)
    axes.annotate(
        f"read roof {roof:.0f} GB/s",
        (1, roof),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    sizes = sorted(row["num_bytes"] for row in rows)
    if sizes:
        grid = [sizes[0] * (sizes[-1] / sizes[0]) ** (i / 99) for i in range(100)]
        reach = [size / (size / roof + 5e3) for size in grid]  # bytes / (bytes / (bytes/ns) + ns) = GB/s
        axes.plot(grid, reach, color="#999999", linestyle=":", linewidth=1, label="roof and 5 us")
    for name, (label, marker, colour) in _STYLE.items():
        if points[name]:
            size, order = (26, 3) if name == "ours" else (22, 2)
            xs, ys = zip(*points[name], strict=True)
            axes.scatter(xs, ys, s=size, color=colour, marker=marker, linewidth=1, label=label, zorder=order)
    axes.set(xscale="log", yscale="log", xlabel="bytes that the step must move", ylabel="GB/s, cold L2")
    axes.set_title(f"Paged decode on {record['device']}, {record['date']}")
    axes.grid(True, which="major", color="#eeeeee")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def newest(folder: Path) -> Path:
    found = [path for path in folder.glob("decode_*.json") if ".partial" not in path.name]
    if not found:
        raise SystemExit(f"no decode_*.json in {folder}; write one with: python bench/record.py bench")
    return max(found, key=lambda path: path.stat().st_mtime)


def report(path: Path, folder: Path) -> list[Path]:
    """Writes <name>.md, .png and .svg of the record at `path` into `folder`; returns them."""
    record = json.loads(path.read_text(encoding="utf-8"))
    slug = path.stem.removesuffix(".partial").removeprefix("decode_")
    earlier = earlier_peers(slug)
    folder.mkdir(parents=True, exist_ok=True)
    table, *plots = written = [folder / f"{path.stem}{suffix}" for suffix in (".md", ".png", ".svg")]
    table.write_text(markdown(record, earlier), encoding="utf-8")
    plot(record, earlier, plots)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "record", nargs="?", type=Path, help="default: the newest decode_*.json in bench/results"
    )
    parser.add_argument("--output-dir", type=Path, help="default: where the record lies")
    options = parser.parse_args(arguments)
    path = options.record or newest(RESULTS)
    written = report(path, options.output_dir or path.parent)
    print(written[0].read_text(encoding="utf-8"))
    print(f"written: {', '.join(map(str, written))}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
