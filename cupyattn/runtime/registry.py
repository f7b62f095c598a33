"""The registry of kernels: what there is, how it is instantiated, and the instances loaded so far."""

from __future__ import annotations

import functools
import importlib
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .compiler import Build, Program
from .device import device_properties
from .launch import ArgLayout, Kernel
from .source import Source, kernels_root, read_source

TemplateArg: TypeAlias = int | bool | str
# Where kernels must compile in CI: the oldest supported chip and one of each later generation.
CI_ARCHS = ("sm_80", "sm_90a", "sm_100a", "sm_120a")

_specs: dict[str, KernelSpec] = {}
_loaded: dict[tuple[Any, ...], Kernel] = {}
_lock = threading.RLock()


class UnknownKernel(LookupError):
    """There is no kernel of that name in the registry."""


@dataclass(frozen=True)
class KernelSpec:
    """All that is needed to compile, check and launch one kernel.

    Attributes
    ----------
    name : str
        Name in the registry, "decode".
    source : str or Path
        The ``.cu`` file: relative to ``kernels_cu``, or absolute.
    symbol : str
        C++ name of the ``__global__`` function, "cupyattn::decode_kernel".
    template : tuple of str
        Names of its template parameters, for people to read: ("T", "kHeadDim").
    args : tuple of (name, type)
        Its arguments in order; see `ArgLayout` for the types. Compared with the compiled kernel.
    instances : callable, optional
        Takes an arch, returns the template arguments to compile ahead of time and in CI, one tuple an
        instance. A kernel without template parameters needs none.
    archs : str or tuple of str
        The oldest arch ("sm_80"), or exactly the ones it is for (("sm_90a",)).
    include_dirs : tuple of str or Path
        Searched before cupyattn's own headers.
    options : tuple of str
        More NVRTC options, as "--use_fast_math". None are implied that change results.

    Examples
    --------
    >>> spec = KernelSpec(
    ...     name="my_scale", source="/home/me/scale.cu", symbol="scale", template=("T",),
    ...     args=(("x", "ptr"), ("n", "i64"), ("factor", "f32")), instances=lambda arch: [("float",)],
    ... )
    >>> spec.expression(("float",))
    'scale<float>'
    """

    name: str
    source: str | Path
    symbol: str
    template: tuple[str, ...] = ()
    args: tuple[tuple[str, str], ...] = ()
    instances: Callable[[str], Iterable[tuple[TemplateArg, ...]]] | None = None
    archs: str | tuple[str, ...] = "sm_80"
    include_dirs: tuple[str | Path, ...] = ()
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or not self.symbol:
            raise ValueError("a KernelSpec needs a name and a symbol")
        _ = self.layout  # an unknown argument type raises here

    @functools.cached_property
    def layout(self) -> ArgLayout:
        """How its arguments lie in memory."""
        return ArgLayout(self.name, self.args)

    def supports(self, arch: str) -> bool:
        """Tell whether the kernel can be compiled for `arch`."""
        if isinstance(self.archs, str):
            return _arch_number(arch) >= _arch_number(self.archs)
        return arch in self.archs

    def instances_for(self, arch: str) -> tuple[tuple[TemplateArg, ...], ...]:
        """Return the template arguments of every instance to compile ahead for `arch`."""
        if not self.supports(arch):
            return ()
        if self.instances is None:
            return () if self.template else ((),)
        return tuple(self.instances(arch))

    def expression(self, template_args: tuple[TemplateArg, ...]) -> str:
        """Return the C++ name of an instance; TypeError if the template arguments do not fit."""
        if len(template_args) != len(self.template):
            wanted = ", ".join(self.template) or "none"
            raise TypeError(
                f"{self.name} takes {len(self.template)} template arguments ({wanted}), got {template_args!r}"
            )
        if not template_args:
            return self.symbol
        return f"{self.symbol}<{', '.join(map(_render, template_args))}>"

    def program(self, template_args: tuple[TemplateArg, ...], arch: str) -> Program:
        """Return one instance for one arch; its sources are read and hashed now, nothing is compiled yet."""
        if not self.supports(arch):
            raise ValueError(f"{self.name} does not run on {arch}: it is for {self.archs}")
        include_dirs = (*map(Path, self.include_dirs), kernels_root() / "include")
        source = self._read(include_dirs)
        return Program(source, self.expression(template_args), arch, include_dirs, self.options)

    def build(self, template_args: tuple[TemplateArg, ...], arch: str) -> Build:
        """Compile one instance, or find it in the disk cache. Needs no GPU.

        Raises
        ------
        CompileError
            With the compiler's log.
        TypeError
            If `args` is not what the kernel takes.
        """
        build = self.program(template_args, arch).build()
        self.layout.check(build.params)
        return build

    def _read(self, include_dirs: tuple[Path, ...]) -> Source:
        return read_source(kernels_root() / self.source, include_dirs)  # an absolute source stays itself


def register_kernel(spec: KernelSpec, *, replace: bool = False) -> KernelSpec:
    """Add a kernel to the registry, so that `get_kernel` and ``python -m cupyattn`` know it.

    Parameters
    ----------
    spec : KernelSpec
    replace : bool
        Take the place of a kernel of the same name; instances of it that were loaded are forgotten.

    Returns
    -------
    KernelSpec
        The spec itself.

    Raises
    ------
    ValueError
        If the name is taken and `replace` is not set.
    """
    _load_builtins()
    with _lock:
        if spec.name in _specs and not replace:
            raise ValueError(f"there is a kernel named {spec.name!r} already; replace=True would replace it")
        _specs[spec.name] = spec
        for key in [key for key in _loaded if key[1] == spec.name]:
            del _loaded[key]
    return spec


def list_kernels() -> tuple[KernelSpec, ...]:
    """Return every registered kernel, by name."""
    _load_builtins()
    return tuple(_specs[name] for name in sorted(_specs))


def get_spec(name: str) -> KernelSpec:
    """Return a registered kernel's spec; UnknownKernel if there is none of that name."""
    _load_builtins()
    try:
        return _specs[name]
    except KeyError:
        raise UnknownKernel(f"no kernel named {name!r}; there are {', '.join(sorted(_specs))}") from None


def get_kernel(name: str, *template_args: TemplateArg, device: int | None = None) -> Kernel:
    """Return a kernel instance, ready to launch; compiled and loaded at the first call on each device.

    The first call reads the disk cache (tens of ms) or compiles (seconds) and loads code into the device's
    context; make it before a CUDA graph capture. Later calls are a dictionary lookup. Thread-safe.

    Parameters
    ----------
    name : str
        As registered.
    *template_args : int, bool or str
        Template arguments; strings are C++ ("__half", "cupyattn::half_t").
    device : int, optional
        Device id; the current device by default.

    Raises
    ------
    UnknownKernel
        No such kernel.
    ValueError
        The kernel is not for this device's arch.
    TypeError
        Wrong number of template arguments, or a KernelSpec whose `args` are not what the kernel takes.
    CompileError
        With the compiler's log, which names file and line.

    Examples
    --------
    >>> kernel = get_kernel("my_scale", "float")  # doctest: +SKIP
    >>> kernel.launch(grid=64, block=256, args=(x, x.size, 2.0))  # doctest: +SKIP
    """
    if device is None:
        import cupy

        device = cupy.cuda.runtime.getDevice()
    key = (device, name, template_args)
    kernel = _loaded.get(key)
    if kernel is None:
        spec = get_spec(name)  # before the lock: it may import, and imports have locks of their own
        with _lock:
            kernel = _loaded.get(key) or _load(spec, template_args, device)
            _loaded[key] = kernel
    return kernel


def _load(spec: KernelSpec, template_args: tuple[TemplateArg, ...], device: int) -> Kernel:
    build = spec.build(template_args, device_properties(device).arch)
    return Kernel(spec.expression(template_args), spec.layout, build, device)


def _load_builtins() -> None:
    """Import the module that registers cupyattn's own kernels (no-op while that very import runs)."""
    importlib.import_module("cupyattn.kernels")


def _arch_number(arch: str) -> int:
    match = re.fullmatch(r"sm_(\d+)[af]?", arch)
    if match is None:
        raise ValueError(f"an arch looks like sm_80 or sm_90a, got {arch!r}")
    return int(match[1])


def _render(arg: TemplateArg) -> str:
    if isinstance(arg, bool):
        return "true" if arg else "false"
    if isinstance(arg, int | str):
        return str(arg)
    raise TypeError(f"a template argument is an int, a bool or a str of C++, got {arg!r}")
