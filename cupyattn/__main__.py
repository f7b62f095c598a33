"""``python -m cupyattn``: list and compile the kernels, draw a schedule or a cascade, say what this machine uses."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Self

import numpy as np

from . import __version__
from .checks import check_divisible
from .draw import draw_levels
from .kernels import (
    DECODE_HEAD_DIMS,
    DecodeConfig,
    DecodeSm90Config,
    cascade_config,
    choose_num_parts,
    decode_config,
)
from .prefix import CascadeCost, PrefixTree
from .runs import level_sizes
from .runtime import (
    CI_ARCHS,
    Build,
    CompileError,
    CompilerNotFound,
    KernelSpec,
    cache_dir,
    device_properties,
    kernels_root,
    list_kernels,
    num_devices,
)
from .runtime.compiler import nvrtc
from .runtime.registry import TemplateArg, UnknownKernel, get_spec
from .schedule import (
    Segment,
    are_uneven,
    cascade_schedule,
    choose_group_overhead,
    decode_schedule,
    draw_schedule,
    schedule_figures,
)

Instance = tuple[KernelSpec, tuple[TemplateArg, ...], str]  # kernel, template arguments, arch


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cupyattn", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("kernels", help="list the registered kernels")
    command.add_argument(
        "--arch", nargs="+", help="list the instances for these, and what the cached ones use"
    )
    command.set_defaults(run=_kernels)

    command = commands.add_parser("precompile", help="compile kernels into the disk cache; needs no GPU")
    command.add_argument(
        "--arch", nargs="+", help=f"as sm_90a; default: this machine's GPUs, without one {' '.join(CI_ARCHS)}"
    )
    command.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time (%(default)s)")
    command.add_argument("--kernel", nargs="+", metavar="NAME", help="only these kernels")
    command.add_argument("--fail-on-spills", action="store_true", help="exit with 1 if any register spills")
    command.set_defaults(run=_precompile)

    command = commands.add_parser(
        "schedule", help="say, or draw, which CTA of a decode step reads which keys"
    )
    command.add_argument(
        "--lens",
        type=int,
        nargs="+",
        required=True,
        metavar="TOKENS",
        help="keys of each request; tables have room for just these",
    )
    command.add_argument("--window-left", type=int, default=-1, help="keys before its own that a query sees")
    command.add_argument(
        "--fixed-split-size", type=int, metavar="TOKENS", help="batch-invariant mode: cut keys every so many"
    )
    _add_sizes(command)
    command.set_defaults(run=_schedule)

    command = commands.add_parser(
        "cascade", help="say, or draw, what requests of a trace share, and which CTA reads it"
    )
    command.add_argument(
        "--trace", type=Path, required=True, metavar="CSV", help="columns as in bench/traces/README.md"
    )
    command.add_argument("--row", type=int, default=0, help="of its first request (%(default)s)")
    command.add_argument("--batch", type=int, help="requests that run together (all that follow)")
    command.add_argument("--block-size", type=int, default=512, help="tokens of a block (%(default)s)")
    _add_sizes(command)
    command.set_defaults(run=_cascade)

    command = commands.add_parser("info", help="say what cupyattn finds and uses on this machine")
    command.set_defaults(run=_info)

    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except BrokenPipeError:  # as when piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CompilerNotFound, UnknownKernel, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_sizes(command: argparse.ArgumentParser) -> None:
    """Add the options that a schedule's figures depend on, and where to draw it."""
    command.add_argument("--num-qo-heads", type=int, default=8, help="query heads (%(default)s)")
    command.add_argument("--num-kv-heads", type=int, default=1, help="KV heads (%(default)s)")
    command.add_argument("--head-dim", type=int, default=128, choices=DECODE_HEAD_DIMS, help="(%(default)s)")
    command.add_argument("--arch", default="sm_90a", help="(%(default)s)")
    command.add_argument("--num-sms", type=int, default=132, help="SMs of the device (%(default)s)")
    command.add_argument(
        "--out", type=Path, help="draw it, with matplotlib: a path that ends in .svg or .png"
    )


def _kernels(args: argparse.Namespace) -> int:
    specs = list_kernels()
    if args.arch is None:
        rows: list[tuple[str, ...]] = [("kernel", "source", "instances", "archs", "template")]
        for spec in specs:
            counts = {len(spec.instances_for(arch)) for arch in CI_ARCHS} - {0}
            archs = f"{spec.archs} and up" if isinstance(spec.archs, str) else " ".join(spec.archs)
            rows.append((spec.name, str(spec.source), _span(counts), archs, ", ".join(spec.template)))
    else:
        rows = [("arch", "registers", "spills", "stack", "smem", "built in", "instance")]
        for spec, template_args, arch in _instances(specs, args.arch):
            build = spec.program(template_args, arch).cached()
            rows.append((arch, *_figures(build), spec.expression(template_args)))
    print(_table(rows))
    return 0


def _precompile(args: argparse.Namespace) -> int:
    specs = list_kernels() if args.kernel is None else [get_spec(name) for name in args.kernel]
    archs = args.arch or _default_archs()
    work = list(_instances(specs, archs))
    if not work:
        raise ValueError(f"no kernel is for {' '.join(archs)}")
    failed, spilled, num_compiled = [], [], 0
    started = time.perf_counter()
    with _Progress(len(work)) as progress:
        for instance, outcome in _build_all(work, args.jobs):
            if isinstance(outcome, Exception):
                failed.append(f"{_label(instance)}: {outcome}")
                note = "FAILED"
            else:
                num_compiled += not outcome.cached
                note = f"{outcome.resources.registers} registers"
                note += ", cached" if outcome.cached else f", {outcome.seconds:.2f} s"
                if outcome.resources.spills:
                    spilled.append(f"{_label(instance)}: {outcome.resources.spills} bytes of spills a thread")
                    note += ", SPILLS"
            progress.step(f"{_label(instance)}: {note}")
    counts = {
        "compiled": num_compiled,
        "cached before": len(work) - num_compiled - len(failed),
        "failed": len(failed),
        "with spills": len(spilled),
    }
    summary = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(f"{len(work)} instances: {summary}; {time.perf_counter() - started:.1f} s; in {cache_dir()}")
    for line in (*failed, *spilled):
        print(line, file=sys.stderr)
    return int(bool(failed or (args.fail_on_spills and spilled)))


def _build_all(work: Iterable[Instance], jobs: int) -> Iterator[tuple[Instance, Build | Exception]]:
    """Compile in `jobs` threads (NVRTC allows it, and ctypes lets go of the GIL); yield as they finish."""
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        futures = {pool.submit(spec.build, args, arch): (spec, args, arch) for spec, args, arch in work}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error is None:
                    yield futures[future], future.result()
                elif isinstance(error, CompileError | TypeError):
                    yield futures[future], error
                else:
                    raise error
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, say


def _schedule(args: argparse.Namespace) -> int:
    group_size = _check_sizes(args)
    num_tiles = None  # with fixed splits it must not matter
    if args.fixed_split_size is None:
        num_tiles = args.num_kv_heads * sum(max(-(-n // 64), 1) for n in args.lens)
    config = _decode_config(args, num_tiles, len(args.lens))
    num_kv_heads, max_ctas = args.num_kv_heads // config.heads, config.ctas_per_sm * args.num_sms
    segments = decode_schedule(
        args.lens,
        num_kv_heads=num_kv_heads,
        group_size=group_size * config.heads,
        tile_kv=config.tile_kv,
        tile_q=config.tile_q,
        max_ctas=max_ctas,
        window_left=args.window_left,
        fixed_split_size=args.fixed_split_size,
        num_parts=choose_num_parts(num_kv_heads, num_tiles or 0, max_ctas, args.num_sms),
        num_threads=config.num_threads,
    )
    if args.out is not None:
        title = f"{len(args.lens)} requests, {sum(args.lens)} tokens, {_sizes(args)}"
        if args.fixed_split_size is not None:
            title += f", splits of {args.fixed_split_size}"
        return _draw(args.out, lambda: draw_schedule(segments, args.out, title=title))
    print(_table(_schedule_rows(segments, max_ctas)))
    return 0


def _cascade(args: argparse.Namespace) -> int:
    group_size = _check_sizes(args)
    tree = PrefixTree(args.block_size)
    requests = _running_requests(args.trace, args.row, args.batch, args.block_size)
    num_pages = 0
    for request, (kv_len, blocks) in enumerate(requests):
        pages = range(num_pages, num_pages := num_pages - (-kv_len // args.block_size))
        tree.add(request, pages, kv_len, hashes=blocks)
    cost = CascadeCost.gqa(args.num_qo_heads, args.num_kv_heads, args.head_dim)
    levels, _, saving_us = tree.levels(choose=cost)
    sizes = level_sizes(64, len(requests) * group_size, args.block_size, levels)
    is_plain = levels.num_levels == 1
    config: DecodeConfig | DecodeSm90Config
    if is_plain:
        num_tiles = args.num_kv_heads * sizes[0][0]
        config = _decode_config(args, num_tiles, len(requests))
    else:
        config = cascade_config(args.arch, args.head_dim, sizes, args.num_kv_heads, args.num_sms)
        sizes = level_sizes(config.tile_kv, len(requests) * group_size, args.block_size, levels)
        num_tiles = args.num_kv_heads * sum(tiles * -(-rows // config.tile_q) for tiles, rows in sizes)
    max_ctas = config.ctas_per_sm * args.num_sms
    overhead, parts = None, 1  # as `decode` chooses
    if is_plain:
        parts = choose_num_parts(args.num_kv_heads // config.heads, num_tiles, max_ctas, args.num_sms)
    else:
        own_tiles = [-(-kv_len // config.tile_kv) or 1 for kv_len in levels.levels[-1][0].kv_lens.tolist()]
        of_group = config.uneven_overhead if are_uneven(own_tiles) else config.group_overhead
        overhead = choose_group_overhead(of_group, num_tiles, max_ctas)
    segments = cascade_schedule(
        levels,
        num_kv_heads=args.num_kv_heads // config.heads,
        group_size=group_size * config.heads,
        tile_kv=config.tile_kv,
        tile_q=config.tile_q,
        max_ctas=max_ctas,
        group_overhead=overhead,
        num_parts=parts,
        num_threads=config.num_threads,
    )
    num_tokens = sum(kv_len for kv_len, _ in requests)
    shared = [(qo_indptr, pages.kv_lens.tolist()) for pages, qo_indptr in levels.levels[:-1]]
    own = int(levels.levels[-1][0].kv_lens.sum())
    num_read = own + sum(sum(lens) for _, lens in shared)
    if args.out is not None:
        title = f"{len(requests)} requests, {num_tokens} tokens, {num_read} of them read, {_sizes(args)}"
        return _draw(args.out, lambda: draw_levels(levels, args.out, segments=segments, title=title))
    rows = [("requests", str(len(requests))), ("tokens", f"{num_tokens}, {num_read} of them read")]
    for number, (qo_indptr, lens) in enumerate(shared):
        of = [str(n) for n, kv_len in zip(np.diff(qo_indptr), lens, strict=True) if kv_len]
        keys = [str(kv_len) for kv_len in lens if kv_len]
        rows.append((f"level {number}", f"{len(keys)} groups; requests {_few(of)}; tokens {_few(keys)}"))
    rows.append(("own", f"{own} tokens"))
    rows.append(("saving", f"{saving_us:.1f} us, as CascadeCost sees it" if shared else "none: plain decode"))
    rows.append(("items", f"{len(segments)}, of up to {config.tile_q} query rows"))
    print(_table(rows + _schedule_rows(segments, max_ctas)))
    return 0


def _running_requests(
    path: Path, first_row: int, batch: int | None, block_size: int
) -> list[tuple[int, list[str]]]:
    """Return what each request holds, part-way through its output, and the blocks that it may share."""
    if batch is not None and batch < 1:
        raise ValueError(f"--batch must be at least 1, got {batch}")
    progress = random.Random(0)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["row"]) >= first_row][:batch]
        found = [(int(row["input_tokens"]), int(row["output_tokens"]), row["blocks"].split()) for row in rows]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except KeyError as error:
        raise ValueError(f"{path} has no column {error}") from None
    if not found or len(found) < (batch or 1):
        raise ValueError(f"{path} has {len(found)} rows from row {first_row} on, fewer than {batch or 1}")
    # The last block of a prompt is its own, even if it is full.
    return [
        (inputs + int(progress.random() * outputs), blocks[: (inputs - 1) // block_size])
        for inputs, outputs, blocks in found
    ]


def _check_sizes(args: argparse.Namespace) -> int:
    """Return the query heads of a KV head."""
    check_divisible("--num-qo-heads", args.num_qo_heads, "--num-kv-heads", args.num_kv_heads)
    if not re.fullmatch(r"sm_\d+[af]?", args.arch):
        raise ValueError(f"--arch must look like sm_90a, got {args.arch}")
    return int(args.num_qo_heads // args.num_kv_heads)


def _decode_config(args: argparse.Namespace, num_tiles: int | None, num_requests: int) -> DecodeConfig:
    """Return the shape of `decode` for a cache in NHD layout."""
    group_size, has_pairs = args.num_qo_heads // args.num_kv_heads, args.num_kv_heads % 2 == 0
    num_groups = num_requests * args.num_kv_heads
    return decode_config(args.arch, args.head_dim, group_size, num_tiles, args.num_sms, has_pairs, num_groups)


def _sizes(args: argparse.Namespace) -> str:
    heads = f"{args.num_qo_heads}/{args.num_kv_heads} heads, head_dim {args.head_dim}"
    return f"{heads}, {args.num_sms} SMs ({args.arch})"


def _schedule_rows(segments: Sequence[Segment], max_ctas: int) -> list[tuple[str, ...]]:
    figures = schedule_figures(segments)
    return [
        ("CTAs", f"{figures.num_ctas} of {max_ctas}"),
        ("longest run", f"{figures.longest_run} tokens"),
        ("groups split", f"{figures.num_split} of {figures.num_groups}"),
        ("partial states", str(figures.num_partials)),
        ("longest merge", str(figures.longest_merge)),
    ]


def _draw(out: Path, draw: Callable[[], None]) -> int:
    if out.suffix not in (".svg", ".png"):
        raise ValueError(f"--out must end in .svg or .png, got {out}")
    try:
        draw()
    except ModuleNotFoundError:
        raise ValueError("--out needs matplotlib: pip install 'cupyattn[bench]'") from None
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}") from None
    return 0


def _info(args: argparse.Namespace) -> int:
    rows = [("cupyattn", __version__)]
    rows += [(name, _version(name)) for name in ("numpy", "ml_dtypes")]
    rows.append(("cupy", _version("cupy-cuda13x", "cupy-cuda12x", "cupy")))
    rows.append(("python", f"{platform.python_version()}, {platform.platform()}"))
    try:
        compiler = nvrtc()
        rows.append(("nvrtc", f"{'.'.join(map(str, compiler.version))}, {compiler.path}"))
    except CompilerNotFound as error:
        rows.append(("nvrtc", str(error)))
    devices = [device_properties(i) for i in range(num_devices())]
    if devices:
        import cupy

        version = cupy.cuda.runtime.driverGetVersion()
        rows.append(("driver", f"for CUDA {version // 1000}.{version % 1000 // 10}"))
    rows += [(f"device {d.id}", f"{d.name}, {d.arch}, {d.num_sms} SMs") for d in devices]
    num_cached = sum(1 for _ in cache_dir().glob("*.cubin"))
    rows.append(("kernels", str(kernels_root())))
    rows.append(("cache", f"{cache_dir()}, {num_cached} compiled kernels"))
    cuda = (
        "CUDA kernels for CuPy and DLPack arrays on a device" if devices else "no CUDA device for CuPy to use"
    )
    rows.append(("backends", f"numpy for arrays on the host; {cuda}"))
    print(_table(rows))
    return 0


def _instances(specs: Iterable[KernelSpec], archs: Iterable[str]) -> Iterator[Instance]:
    for arch in archs:
        for spec in specs:
            for template_args in spec.instances_for(arch):
                yield spec, template_args, arch


def _label(instance: Instance) -> str:
    spec, template_args, arch = instance
    return f"{spec.expression(template_args)} {arch}"


def _default_archs() -> tuple[str, ...]:
    found = dict.fromkeys(device_properties(i).arch for i in range(num_devices()))
    return tuple(found) or CI_ARCHS


def _figures(build: Build | None) -> tuple[str, ...]:
    if build is None:
        return ("-",) * 4 + ("not cached",)
    used = build.resources
    numbers = (used.registers, used.spills, used.stack, used.static_smem)
    return (*map(str, numbers), f"{build.seconds:.2f} s")


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _span(counts: set[int]) -> str:
    return f"{min(counts)}-{max(counts)}" if len(counts) > 1 else str(*counts or {0})


def _few(texts: Sequence[str]) -> str:
    return ", ".join(texts if len(texts) <= 4 else [*texts[:3], "..."])


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


class _Progress:
    """A bar on stderr: one line that redraws itself on a terminal, a line a step elsewhere."""

    _WIDTH = 24

    def __init__(self, total: int) -> None:
        self._total, self._done, self._live = total, 0, sys.stderr.isatty()

    def step(self, text: str) -> None:
        self._done += 1
        full = self._WIDTH * self._done // self._total
        line = f"[{'#' * full:.<{self._WIDTH}}] {self._done}/{self._total} {text}"
        if self._live:
            line = f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}"
        print(line, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
