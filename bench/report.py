"""Draws a record: a roofline plot (PNG, SVG) and Markdown tables, beside the record unless told otherwise.

    python bench/report.py [RECORD] [--output-dir DIR]

All verdicts are computed anew from the record's times. Peers are those timed in the same run, else those of
results/peers_<device>.json, measured earlier on such a device; the latter are marked with a star.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run as a file, Python sees bench/ only

from bench import rules, timing  # noqa: E402
from bench.configs import DECODE_GRID, FIXED_SPLIT_SIZE, GROUPS, PAGED_GRID, DecodeConfig  # noqa: E402
from bench.rules import RESULTS, Peer, Record  # noqa: E402

_STYLE = {  # name: (label, marker, colour)
    "ours": ("cupyattn", "o", "#c1272d"),
    "torch-sdpa": ("torch SDPA, dense", "_", "#333333"),
    "flashinfer": ("FlashInfer", "x", "#0072b2"),
    "flashinfer-tc": ("FlashInfer, tensor cores", "+", "#56b4e9"),
    "fa3": ("FlashAttention-3", "1", "#009e73"),
    "xqa": ("TRT-LLM XQA", "2", "#cc79a7"),
    "xformers": ("xformers", "3", "#e69f00"),
}
# That may be bound by operations.
_COMPUTE_KEYS = {config.key for config in PAGED_GRID if not isinstance(config, DecodeConfig)}
_TIMES = {
    "cold us": "cold_us",
    "PDL us": "pdl_us",
    "plain us": "plain_us",
    "forced us": "cascade_us",
    "warm us": "warm_us",
    "eager us": "eager_us",
    "levels us": "levels_us",
}

_LEGEND = """\
*floor* is the bytes that a step must move over the roof of this run, or its operations over the rate of the matrix
product where that is more (MLA of many query rows); *cold* the whole call in a CUDA graph that rotates over inputs
larger than the L2 cache, which is what all rules judge; *PDL* the same with `pdl=True`, for callers whose kernel ahead
does not write lengths and tables (any launch begins before that one has ended, so a part of its latency is hidden
behind work that is not its own; this one also reads them before); *warm* a graph over one input; *eager* a Python
loop, wall clock; *host* what a call costs the host alone, in the quietest of 40 spells a tenth of a second apart (what
else runs there makes it up to twice as long for as long; the record has the median, too). The columns from *must* on
hold a row's value for each rule: **bold** is missed, plain is met, empty is a row of which the rule does not speak.
*paged* is judged by its mean only. Rules are stated for head_dim 64, 128
and 256 and groups of 1, 4, 7, 8 and 16; rows outside are judged too.

Of cascades, *MB* counts once what requests share, and *floor* is these bytes over the roof, or the operations over half
the rate of the matrix product. *cold*, *warm* and *eager* are `cascade_decode` over the levels that `PrefixTree`
chooses; *groups* is how many groups each level has (a single level is plain decode). *plain* is `decode` (`mla_decode`)
over whole tables, *forced* `cascade_decode` with a group wherever two requests share a page, *levels* the host's time
to make the levels that are chosen."""

_GROUP_TEXT = {
    "decode": "Decode",
    "xformers": "The grid of xformers' decode benchmark: 16 query heads, 65536 tokens",
    "trace": "Moments of request traces: the lengths of a running batch, every request with pages of its own",
    "heads": "Query heads per KV head (rows that are not above)",
    "invariant": "Rows that are timed in the batch-invariant mode too (and are not above)",
    "cascade": "Cascades: batches that share prefixes (shared, or of sum tokens uniq different ones)",
    "mla": "Multi-head latent attention: heads (h), query tokens a request (sq), page size (p)",
    "merge": "Merging states",
    "append": "Appending to the cache",
    "": "Other rows",
}


def timed_rows(record: Record) -> list[Record]:
    return [row for row in record["rows"] if "cold_us" in row]


def peers_by_row(record: Record) -> dict[str, tuple[Peer, ...]]:
    earlier = rules.earlier_peers(timing.device_slug(record["device"]))
    return {row["key"]: rules.peers_of(row, earlier) for row in record["rows"]}


def _peer(peer: Peer | None) -> str:
    return f"{peer.us:.1f} {peer.name}{'' if peer.same_run else ' *'}" if peer else ""


def _named(name: str, peers: Iterable[Peer]) -> str:
    found = [peer for peer in peers if peer.name == name]  # the same run's is the last
    return f"{found[-1].us:.1f}{'' if found[-1].same_run else ' *'}" if found else ""


def _verdict(judged: tuple[float, bool | None] | None) -> str:
    if judged is None:
        return ""
    value, met = judged
    return f"**{value:.3f}**" if met is False else f"{value:.3f}"


def _cells(
    row: Record, peers: tuple[Peer, ...], judged: dict[str, tuple[float, bool | None]]
) -> dict[str, str]:
    """{column: text} of one row."""
    if "cold_us" not in row:
        return {"configuration": row["key"], "MB": f"failed: {row['error']}"}
    return {
        "configuration": row["key"],
        "MB": f"{row['num_bytes'] * 1e-6:.1f}",
        "floor us": f"{row['floor_us']:.1f}",
        **{title: f"{row[name]:.1f}" if name in row else "" for title, name in _TIMES.items()},
        "GB/s": f"{row['gbs']:.0f}",
        "of roof": f"{row['of_roof']:.0%}",
        "TFLOP/s": f"{row['flops'] / row['cold_us'] * 1e-6:.0f}" if row["key"] in _COMPUTE_KEYS else "",
        "groups": " + ".join(map(str, row.get("groups", ()))),
        "SDPA us": _named("torch-sdpa", peers),
        "FlashMLA us": _named("flashmla", peers),
        "best paged peer us": _peer(rules.fastest(peers, paged=True)),
        **{rule.name: _verdict(judged.get(rule.name)) for rule in rules.RULES},
    }


def _table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Rows of {column: text} as a Markdown table, without the columns that are empty in all of them."""
    titles = [title for title in max(rows, key=len) if any(row.get(title) for row in rows)]
    lines = [
        titles,
        ["---", *["---:"] * (len(titles) - 1)],
        *([row.get(title, "") for title in titles] for row in rows),
    ]
    return [f"| {' | '.join(line)} |" for line in lines]


def heads_table(record: Record) -> list[str]:
    """The `heads` rows side by side: tokens a second through one layer, and the memory of its cache."""
    cold = {row["key"]: row["cold_us"] for row in timed_rows(record)}
    steps: dict[tuple[int, int], dict[int, DecodeConfig]] = {}
    for config in GROUPS["heads"]:
        if isinstance(config, DecodeConfig) and config.key in cold:
            steps.setdefault((config.batch, config.lens[0]), {})[config.num_kv_heads] = config
    rows = []
    for (batch, tokens), by_heads in sorted(steps.items()):
        row = {"requests x tokens": f"{batch} x {tokens}"}
        for num_kv_heads, config in by_heads.items():
            row[f"tokens/s, {num_kv_heads} KV heads"] = f"{batch / cold[config.key] * 1e6:,.0f}"
        for num_kv_heads, config in by_heads.items():
            per_token = config.kv_bytes / sum(config.lens)
            row[f"MiB, {num_kv_heads} KV heads ({per_token / 1024:g} KiB a token)"] = (
                f"{config.kv_bytes / 2**20:g}"
            )
        rows.append(row)
    if not rows:
        return []
    return [
        "## KV heads: tokens per second and memory",
        "",
        "LLaMA-7B's attention (32 query heads, head_dim 128, bfloat16) with 32 (MHA), 8 (GQA) and 1 (MQA) KV heads:",
        "new tokens a second through the decode attention of one layer (batch over cold time), and what the layer's",
        "KV cache holds. A model of 32 layers takes 32 times the memory.",
        "",
        *_table(rows),
        "",
    ]


def invariant_table(record: Record) -> list[str]:
    """What the batch-invariant mode costs, where it was timed."""
    rows = [
        {
            "configuration": row["key"],
            "cold us": f"{row['cold_us']:.1f}",
            "batch-invariant us": f"{row['fixed_us']:.1f}",
            "ratio": f"{row['fixed_us'] / row['cold_us']:.2f}",
        }
        for row in timed_rows(record)
        if "fixed_us" in row
    ]
    if not rows:
        return []
    return [
        "## Batch-invariant mode",
        "",
        f"The same cold time with `fixed_split_size={FIXED_SPLIT_SIZE}`: keys are cut every so many tokens, so that a",
        "request's result does not depend on its neighbours, bitwise. Few requests make few splits, and SMs idle.",
        "",
        *_table(rows),
        "",
    ]


def markdown(record: Record) -> str:
    """The record as Markdown: the rules, a table for each group of rows, the foundation's verdicts."""
    peers = peers_by_row(record)
    judged = {case.row["key"]: rules.judged(case) for case in rules.cases(record)}
    verdicts = rules.verdicts(record)
    # A row that stands in several groups is shown in the first.
    group_of = {config.key: name for name in reversed(GROUPS) for config in GROUPS[name]}
    lines = [
        f"{record['device']}, driver {record['driver']}, {record['date']}; "
        f"sources {record['source_sha256'][:12]}. "
        f"Read roof {record['read_roof_gbs']:.0f} GB/s, "
        f"matrix product {record['matmul_tflops']:.0f} TFLOP/s.",
        "",
        "## Rules",
        "",
        *rules.summary(verdicts["rules"]),
        "",
        *_LEGEND.splitlines(),
        "",
    ]
    for name, text in _GROUP_TEXT.items():
        rows = [row for row in record["rows"] if group_of.get(row["key"], "") == name]
        if rows:
            cells = [_cells(row, peers[row["key"]], judged.get(row["key"], {})) for row in rows]
            lines += [f"## {text}", "", *_table(cells), ""]
    lines += heads_table(record)
    lines += invariant_table(record)
    lines += ["## What the first version was held to", "", *rules.summary(verdicts["foundation"])]
    if any(not peer.same_run for found in peers.values() for peer in found):
        lines += ["", "\\* measured earlier on such a device, not in this run."]
    return "\n".join(lines) + "\n"


def plot(record: Record, paths: Sequence[Path]) -> None:
    """Achieved bandwidth over bytes, of decode (MLA left out); what is not bandwidth is latency."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cupyattn"  # the same record draws the same file
    from matplotlib import pyplot

    peers = peers_by_row(record)
    keys = {config.key for config in DECODE_GRID}
    rows = [row for row in timed_rows(record) if row["key"] in keys]
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in _STYLE}
    for row in rows:
        points["ours"].append((row["num_bytes"], row["gbs"]))
        for name, us in {peer.name: peer.us for peer in peers[row["key"]]}.items():
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
    folder.mkdir(parents=True, exist_ok=True)
    table, *plots = written = [folder / f"{path.stem}{suffix}" for suffix in (".md", ".png", ".svg")]
    table.write_text(markdown(record), encoding="utf-8")
    plot(record, plots)
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
