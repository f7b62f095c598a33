"""CUDA C++ to cubin through NVRTC, with a disk cache that notices edited headers.

Why not let CuPy compile? A thin ctypes binding of NVRTC needs neither a GPU, a driver nor CuPy, so that every
kernel can be compiled ahead of time and checked on any machine; it targets arch-specific features (sm_90a,
sm_100a) without CuPy's own ``-arch`` and ``-ftz=true`` joining in; and the cache key covers included headers,
which CuPy's does not see. CuPy then loads the finished cubin with ``cupy.RawModule(path=...)``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import sys
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .source import Source

_FORMAT = "1"  # of the files in the cache; raise it when they change
_INT = re.compile(r"(?P<bytes>\d+) bytes (?P<what>stack frame|spill stores|spill loads)")


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message holds its log, which names the real file and line."""


class CompilerNotFound(RuntimeError):
    """No NVRTC on this machine."""


@dataclass(frozen=True)
class Resources:
    """What one kernel instance uses: registers and bytes per thread, static shared memory per block."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_smem: int

    @property
    def spills(self) -> int:
        """Bytes of spill traffic a thread does, stores and loads together."""
        return self.spill_stores + self.spill_loads


@dataclass(frozen=True)
class Param:
    """One parameter of a compiled kernel: PTX type (u64, f32, b8 for structs), offset and size in bytes."""

    ptx_type: str
    offset: int
    size: int


@dataclass(frozen=True)
class Build:
    """A compiled kernel instance on disk."""

    cubin: Path
    symbol: str  # the mangled name inside the cubin
    params: tuple[Param, ...]
    resources: Resources
    log: str  # all that NVRTC and ptxas said, warnings included
    seconds: float  # how long the compiler took
    cached: bool = False  # whether this came from the disk cache


def cache_dir() -> Path:
    """Return the folder of compiled kernels: ``$CUPYATTN_CACHE_DIR``, or one in the user's cache folder."""
    if chosen := os.environ.get("CUPYATTN_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "cupyattn"


class Nvrtc:
    """The few NVRTC calls that turn source text into a cubin. Safe to use from several threads at once."""

    def __init__(self) -> None:
        try:
            from cuda.pathfinder import load_nvidia_dynamic_lib

            path = load_nvidia_dynamic_lib("nvrtc").abs_path
            if path is None:
                raise OSError("its path is unknown")
        except (ImportError, OSError, RuntimeError) as error:
            raise CompilerNotFound(
                "compiling a kernel needs NVRTC, which was not found; install cupyattn[cuda13] or "
                f"cupyattn[cuda12], or `pip install nvidia-cuda-nvrtc cuda-pathfinder` ({error})"
            ) from error
        self.path = Path(path)
        self._lib = ctypes.CDLL(path)
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    @functools.cached_property
    def identity(self) -> str:
        """Version and size of the library: patch releases, which can compile differently, share a version."""
        return f"nvrtc {self.version[0]}.{self.version[1]} {self.path.stat().st_size}"

    @functools.cached_property
    def archs(self) -> tuple[int, ...]:
        """Compute capabilities it can compile for, as 80, 90, 100, ..."""
        count = ctypes.c_int()
        self._check(self._lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        archs = (ctypes.c_int * count.value)()
        self._check(self._lib.nvrtcGetSupportedArchs(archs))
        return tuple(archs)

    def compile(
        self, source: Source, expression: str, options: tuple[str, ...]
    ) -> tuple[bytes, str, str, str]:
        """Compile the instance that `expression` names; return cubin, mangled name, PTX and log."""
        lib = self._lib
        program = ctypes.c_void_p()
        text, name, wanted = source.text.encode(), str(source.path).encode(), expression.encode()
        self._check(lib.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
        try:
            self._check(lib.nvrtcAddNameExpression(program, wanted))
            encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = lib.nvrtcCompileProgram(program, len(options), encoded)
            log = self._fetch(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileError(f"{expression} does not compile ({' '.join(options)})\n{log}")
            lowered = ctypes.c_char_p()
            self._check(lib.nvrtcGetLoweredName(program, wanted, ctypes.byref(lowered)))
            ptx = self._fetch(program, "PTX").rstrip(b"\0").decode()
            return self._fetch(program, "CUBIN"), (lowered.value or b"").decode(), ptx, log
        finally:
            lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _fetch(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            raise CompileError(f"NVRTC failed: {self._lib.nvrtcGetErrorString(status).decode()}")


@functools.cache
def nvrtc() -> Nvrtc:
    """Return NVRTC, loaded once a process; raises CompilerNotFound."""
    return Nvrtc()


@dataclass(frozen=True)
class Program:
    """One kernel instance for one architecture: all that decides what its cubin will be."""

    source: Source
    expression: str  # C++ name of the instance, "cupyattn::decode_kernel<__half, 128>"
    arch: str  # "sm_90a"
    include_dirs: tuple[Path, ...] = ()
    options: tuple[str, ...] = ()

    def build(self) -> Build:
        """Return the instance from the disk cache, or compile it into the cache."""
        return self.cached() or self.compile()

    def cached(self) -> Build | None:
        """Return the instance from the disk cache, or None if it is not there in full."""
        cubin = self._cubin
        try:
            meta = json.loads(cubin.with_suffix(".json").read_text(encoding="utf-8"))
            if cubin.stat().st_size != meta["cubin_bytes"]:
                return None
            params = tuple(Param(**param) for param in meta["params"])
            resources = Resources(**meta["resources"])
            return Build(cubin, meta["symbol"], params, resources, meta["log"], meta["seconds"], cached=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent, or cut short by a crash: compile it again

    def compile(self) -> Build:
        """Compile the instance, whatever the cache holds, and store it."""
        compiler = nvrtc()
        self._check_arch(compiler)
        started = time.perf_counter()
        folders = (self.source.path.parent, *self.include_dirs)
        options = (*self._flags, *(f"-I{folder}" for folder in folders))
        cubin, symbol, ptx, log = compiler.compile(self.source, self.expression, options)
        seconds = time.perf_counter() - started
        params, resources = parse_params(ptx, symbol), parse_resources(log, symbol)
        build = Build(self._cubin, symbol, params, resources, log, seconds)
        _store(build, cubin)
        return build

    @property
    def _flags(self) -> tuple[str, ...]:
        lineinfo = ("-lineinfo",) if os.environ.get("CUPYATTN_LINEINFO", "0") != "0" else ()
        target = f"-arch={self.arch}"
        return ("-std=c++17", target, "-default-device", "--ptxas-options=-v", *lineinfo, *self.options)

    @functools.cached_property
    def _cubin(self) -> Path:
        parts = (_FORMAT, nvrtc().identity, self.source.sha256, self.expression, *self._flags)
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]
        return cache_dir() / f"{self.source.path.stem}-{self.arch}-{key}.cubin"

    def _check_arch(self, compiler: Nvrtc) -> None:
        number = int(re.sub(r"\D", "", self.arch) or 0)
        if number not in compiler.archs:
            known = ", ".join(f"sm_{arch}" for arch in compiler.archs)
            version = ".".join(map(str, compiler.version))
            raise CompileError(f"NVRTC {version} ({compiler.path}) knows no {self.arch}; it knows {known}")


def _store(build: Build, cubin: bytes) -> None:
    """Write cubin and sidecar, never half a file; the sidecar, written last, makes the pair valid."""
    meta: dict[str, Any] = asdict(replace(build, cubin=Path()))
    del meta["cubin"], meta["cached"]
    meta["cubin_bytes"] = len(cubin)
    files = ((build.cubin, cubin), (build.cubin.with_suffix(".json"), json.dumps(meta, indent=1).encode()))
    try:
        build.cubin.parent.mkdir(parents=True, exist_ok=True)
        for path, content in files:
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            partial.write_bytes(content)
            os.replace(partial, path)
    except OSError as error:
        error.add_note("this is the kernel cache; set CUPYATTN_CACHE_DIR to a folder that can be written")
        raise


def parse_resources(log: str, symbol: str) -> Resources:
    """Read one kernel's figures from ptxas' verbose log; functions that were not inlined count with it."""
    _, _, section = log.partition(f"Compiling entry function '{symbol}'")
    section = section.partition("Compiling entry function")[0]
    total = dict.fromkeys(("stack frame", "spill stores", "spill loads"), 0)
    for number, what in _INT.findall(section):
        total[what] += int(number)
    registers = re.search(r"Used (\d+) registers", section)
    smem = re.search(r"(\d+) bytes smem", section)
    if registers is None:
        raise CompileError(f"ptxas gave no figures for {symbol}:\n{log}")
    return Resources(
        registers=int(registers[1]),
        spill_stores=total["spill stores"],
        spill_loads=total["spill loads"],
        stack=total["stack frame"],
        static_smem=int(smem[1]) if smem else 0,
    )


def parse_params(ptx: str, symbol: str) -> tuple[Param, ...]:
    """Read a kernel's parameters from its PTX, laid out as C does: each aligned to its own alignment."""
    _, _, rest = ptx.partition(f".entry {symbol}(")
    params, offset = [], 0
    declaration = re.compile(r"\.param (?:\.align (\d+) )?\.(\w\d+)[^,\n]*?_param_\d+(?:\[(\d+)\])?")
    for align, ptx_type, count in declaration.findall(rest.partition(")")[0]):
        size = int(ptx_type[1:]) // 8 * int(count or 1)
        offset = -(-offset // int(align or size)) * int(align or size)
        params.append(Param(ptx_type, offset, size))
        offset += size
    return tuple(params)
