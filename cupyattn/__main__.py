"""``python -m cupyattn``: list the kernels, compile them ahead of time, say what this machine will use."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Self

from . import __version__
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
