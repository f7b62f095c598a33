"""Launching kernels: arguments packed and checked, then one ctypes call to ``cuLaunchKernelEx``.

CuPy's own launch takes neither a cluster size nor programmatic dependent launch (PDL) and does not check
arguments. Here everything that can be built once is built once, in :meth:`Kernel.prepare`, with the arguments that
never change; per launch there remain one ``struct.pack_into``, one store of the stream and one foreign call; or, of
one with the very arguments of an earlier one (:meth:`Launcher.bind`), the foreign call alone. Nothing synchronizes or
allocates on the device, so a launch can be captured into a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import numbers
import operator
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .compiler import Build, Param
from .device import device_properties

# type: (struct code, size, the letter of its PTX type)
_SCALARS = {
    "ptr": ("Q", 8, "u"),
    "i32": ("i", 4, "u"),
    "u32": ("I", 4, "u"),
    "i64": ("q", 8, "u"),
    "u64": ("Q", 8, "u"),
    "f32": ("f", 4, "f"),
    "f64": ("d", 8, "f"),
}
# Values of cuda.h: a CUresult, two CUlaunchAttributeIDs, two CUfunction_attributes.
_INVALID_CONTEXT = 201
_CLUSTER_DIMENSION = 4
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14

_MAX_CACHED_LAUNCHERS = 1024
_PORTABLE_CLUSTER = 8  # blocks; larger clusters are an opt-in of the function

Dim: TypeAlias = int | tuple[int, ...]


class LaunchError(RuntimeError):
    """The driver refused a launch; the message names the kernel, the driver's error and the configuration."""


@dataclass(frozen=True)
class Field:
    """One kernel argument: its name, its type as in the KernelSpec, offset and size in bytes."""

    name: str
    ctype: str
    offset: int
    size: int

    @property
    def kind(self) -> type:
        """The Python type that needs no conversion."""
        return {"f": float, "b": bytes}.get(self.ctype[0], int)

    def convert(self, value: Any) -> Any:
        """Turn what a caller may pass into what ``struct`` packs; TypeError or ValueError if it cannot be."""
        if self.ctype == "ptr":
            return address(value)
        if self.ctype.startswith("bytes"):
            blob = value if isinstance(value, bytes | bytearray) else memoryview(value).tobytes()
            if len(blob) != self.size:
                raise ValueError(f"{len(blob)} bytes")
            return bytes(blob)
        if self.kind is float:
            if not isinstance(value, numbers.Real):
                raise TypeError
            return float(value)
        if not isinstance(value, numbers.Integral):
            raise TypeError
        return int(value)


def address(array: Any) -> int:
    """Return the device address of `array`: a CuPy or other CUDA array, an address, or None for null."""
    if array is None:
        return 0
    try:
        return int(array.data.ptr)  # CuPy
    except AttributeError:
        pass
    if isinstance(array, numbers.Integral):
        return int(array)
    try:
        return int(array.__cuda_array_interface__["data"][0])  # torch, Numba
    except (AttributeError, TypeError):
        raise TypeError from None


class ArgLayout:
    """The parameter block of a kernel, laid out as C lays out a struct of the same members.

    Parameters
    ----------
    kernel : str
        Named in errors.
    args : sequence of (name, type)
        Types are ptr, i32, u32, i64, u64, f32, f64 and ``bytes:N`` or ``bytes:N:ALIGN`` (a struct by value of
        N bytes; ALIGN is 1 if not given).

    Raises
    ------
    ValueError
        On an unknown type.
    """

    def __init__(self, kernel: str, args: Sequence[tuple[str, str]]) -> None:
        self.kernel = kernel
        fields, code, end = [], "<", 0
        for name, type_ in args:
            letter, size, align = _parse_type(type_)
            offset = -(-end // align) * align
            code += "x" * (offset - end) + letter
            fields.append(Field(name, type_, offset, size))
            end = offset + size
        self.fields = tuple(fields)
        self.size = end
        self._kinds = [field.kind for field in fields]
        self._blobs = tuple((i, field.size) for i, field in enumerate(fields) if field.kind is bytes)
        self._pack_into = struct.Struct(code).pack_into

    def pack_into(self, buffer: Any, args: Sequence[Any]) -> None:
        """Pack `args` into `buffer` (`size` bytes).

        Plain ``int``, ``float`` and ``bytes`` are packed at once. Anything else is looked at one by one:
        arrays and None for ptr, NumPy scalars, NumPy structs for bytes. (An array is never asked for its
        value: an integer array of one element must not pass for an address.)

        Raises
        ------
        TypeError
            On a wrong number of arguments or a wrong type, naming the argument.
        ValueError
            On an integer out of range or a struct of another size, naming the argument.
        """
        self.pack_plain_into(buffer, self.as_plain(args))

    def as_plain(self, args: Sequence[Any]) -> Sequence[Any]:
        """Return `args` as ``int``, ``float`` and ``bytes``, of which only ranges are unchecked; see `pack_into`."""
        if [*map(type, args)] != self._kinds or (self._blobs and self._misfits(args)):
            return self._convert(args)
        return args

    def pack_plain_into(self, buffer: Any, args: Sequence[Any]) -> None:
        """Pack what `as_plain` returned, or is known to be plain."""
        try:
            self._pack_into(buffer, 0, *args)
        except (struct.error, OverflowError):
            self._blame(args)
            raise

    def split(self, is_second: Sequence[bool]) -> tuple[ArgLayout, ArgLayout]:
        """Return two layouts, between which the arguments are divided; TypeError if not all are."""
        self._check_count(is_second)
        parts: tuple[list[tuple[str, str]], list[tuple[str, str]]] = [], []
        for field, second in zip(self.fields, is_second, strict=True):
            parts[second].append((field.name, field.ctype))
        return ArgLayout(self.kernel, parts[0]), ArgLayout(self.kernel, parts[1])

    def addresses(self, buffer: Any) -> Iterator[int]:
        """Return where in `buffer` the arguments lie."""
        return (ctypes.addressof(buffer) + field.offset for field in self.fields)

    def _check_count(self, args: Sequence[Any]) -> None:
        if len(args) != len(self.fields):
            names = ", ".join(field.name for field in self.fields)
            raise TypeError(f"{self.kernel} takes {len(self.fields)} arguments ({names}), got {len(args)}")

    def _misfits(self, args: Sequence[Any]) -> bool:
        return any(len(args[i]) != size for i, size in self._blobs)  # struct would pad or cut in silence

    def _convert(self, args: Sequence[Any]) -> list[Any]:
        self._check_count(args)
        values = list(args)
        for i, field in enumerate(self.fields):
            if type(values[i]) is not self._kinds[i] or self._kinds[i] is bytes:
                try:
                    values[i] = field.convert(values[i])
                except TypeError:
                    raise TypeError(f"{self._expected(i)}, got {type(args[i]).__name__}") from None
                except ValueError as error:
                    raise ValueError(f"{self._expected(i)}, got {error}") from None
        return values

    def _blame(self, values: Sequence[Any]) -> None:
        """Raise ValueError for the value that is out of its type's range."""
        for i, (field, value) in enumerate(zip(self.fields, values, strict=True)):
            try:
                struct.pack("<" + _parse_type(field.ctype)[0], value)
            except (struct.error, OverflowError) as error:
                raise ValueError(f"{self._expected(i)}, got {value!r}") from error

    def _expected(self, i: int) -> str:
        return f"{self.kernel}: argument {i}, {self.fields[i].name!r}, must be {self.fields[i].ctype}"

    def check(self, params: Sequence[Param]) -> None:
        """Compare with the parameters that the compiler saw; TypeError names the first that differs."""
        if len(params) != len(self.fields):
            counts = f"{len(self.fields)} arguments, the kernel takes {len(params)}"
            raise TypeError(f"{self.kernel}: its KernelSpec lists {counts}")
        for i, (field, param) in enumerate(zip(self.fields, params, strict=True)):
            same_place = (field.offset, field.size) == (param.offset, param.size)
            expected = _SCALARS.get(field.ctype, ("", 0, "b"))[2]
            # An untyped scalar ("b32") fits either kind; only float against integer is a sure mistake.
            same_kind = param.ptx_type[0] not in "fus" or (param.ptx_type[0] == "f") == (expected == "f")
            if not (same_place and same_kind):
                raise TypeError(
                    f"{self.kernel}: argument {i}, {field.name!r}, is {field.ctype} in its KernelSpec "
                    f"({field.size} bytes at offset {field.offset}), but .{param.ptx_type} in the kernel "
                    f"({param.size} bytes at offset {param.offset})"
                )


def _parse_type(type_: str) -> tuple[str, int, int]:
    """Return struct code, size and alignment of an argument type."""
    if type_ in _SCALARS:
        code, size, _ = _SCALARS[type_]
        return code, size, size
    head, *counts = type_.split(":")
    if head == "bytes" and 1 <= len(counts) <= 2 and all(n.isdecimal() and int(n) for n in counts):
        size = int(counts[0])
        return f"{size}s", size, int(counts[1]) if len(counts) == 2 else 1
    known = ", ".join((*_SCALARS, "bytes:N", "bytes:N:ALIGN"))
    raise ValueError(f"unknown argument type {type_!r}; known are {known}")


# -- the driver's structs, as in cuda.h --


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_mem", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


@functools.cache
def driver() -> Any:
    """Return libcuda, for the calls that CuPy does not wrap."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    lib = ctypes.CDLL(load_nvidia_dynamic_lib("cuda").abs_path)
    lib.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return lib


def _error_text(status: int) -> str:
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    driver().cuGetErrorName(status, ctypes.byref(name))
    driver().cuGetErrorString(status, ctypes.byref(text))
    return f"{(name.value or b'unknown error').decode()} ({status}): {(text.value or b'').decode()}"


class _Frame:
    """The memory of one launch in flight: configuration, arguments and pointers to them."""

    __slots__ = ("args", "attributes", "config", "config_address", "pointers", "pointers_address")

    def __init__(self, launcher: Launcher) -> None:
        self.args = ctypes.create_string_buffer(launcher.layout.size)
        given = launcher.layout.addresses(self.args)
        fixed = launcher.fixed_layout.addresses(launcher.fixed_args)
        addresses = [next(fixed if is_fixed else given) for is_fixed in launcher.is_fixed]
        self.pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        attributes = launcher.attributes
        self.attributes = (LaunchAttribute * len(attributes))(*attributes)
        self.config = LaunchConfig(
            launcher.grid, launcher.block, launcher.shared_mem, None, self.attributes, len(attributes)
        )
        self.config_address = ctypes.addressof(self.config)
        self.pointers_address = ctypes.addressof(self.pointers)


class BoundLaunch:
    """A launch with all its arguments, on one stream, for as often as it is called. Made by `Launcher.bind`.

    Nothing is written after it is made, so several threads may call it at once.
    """

    __slots__ = ("_frame", "_launch", "_launcher", "_pointers")

    def __init__(self, launcher: Launcher, args: Sequence[Any], stream: int) -> None:
        self._launcher = launcher
        self._frame = frame = _Frame(launcher)
        launcher.layout.pack_plain_into(frame.args, args)
        frame.config.stream = stream
        self._launch = driver().cuLaunchKernelEx
        self._pointers = frame.config_address, launcher.kernel.function, frame.pointers_address, None

    def __call__(self) -> None:
        """Do as `Launcher.launch_plain` does."""
        if self._launch(*self._pointers):
            self._launcher.launch(self._frame)  # once more: it knows what to do, or what to say


class Launcher:
    """A kernel with its launch configuration fixed; call it with the arguments. Made by `Kernel.prepare`.

    Safe to call from several threads: each call in flight has a frame of its own, taken from a free list.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: Dim,
        block: Dim,
        shared_mem: int,
        cluster: Dim | None,
        pdl: bool,
        arguments: Sequence[Any] | None,
    ) -> None:
        import cupy

        self.kernel = kernel
        self.grid, self.block = _dim3("grid", grid), _dim3("block", block)
        self.shared_mem = shared_mem
        self.cluster = None if cluster is None else _dim3("cluster", cluster)
        self.pdl = pdl and device_properties(kernel.device).has_pdl
        self.attributes = []
        if self.cluster is not None:
            self.attributes.append(LaunchAttribute(_CLUSTER_DIMENSION, 0, self.cluster))
            kernel.allow_cluster(self.cluster[0] * self.cluster[1] * self.cluster[2])
        if self.pdl:
            self.attributes.append(LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,)))
        kernel.set_max_shared(shared_mem)
        values = [None] * len(kernel.layout.fields) if arguments is None else arguments
        self.is_fixed = [value is not None for value in values]
        self.layout, self.fixed_layout = kernel.layout.split(self.is_fixed)
        self.fixed_args = ctypes.create_string_buffer(self.fixed_layout.size)
        self.fixed_layout.pack_into(self.fixed_args, [value for value in values if value is not None])
        self._frames = [_Frame(self)]
        self._launch = driver().cuLaunchKernelEx
        self._current_device: Callable[[], int] = cupy.cuda.runtime.getDevice
        self._current_stream: Callable[[], Any] = cupy.cuda.get_current_stream

    def __call__(self, args: Sequence[Any], stream: Any = None) -> None:
        """Launch with the arguments that are not fixed, on `stream`: CuPy's, its address, or None for the current one.

        Raises
        ------
        TypeError, ValueError
            If `args` do not fit the KernelSpec; nothing is launched. See `ArgLayout.pack_into`.
        LaunchError
            If the driver refuses.
        """
        if self._current_device() != self.kernel.device:
            with self.kernel.on_device():
                return self(args, stream)
        if stream is None:
            stream = self._current_stream()
        self.launch_plain(self.layout.as_plain(args), stream if stream.__class__ is int else stream.ptr)
        return None

    def launch_plain(self, args: Sequence[Any], stream: int) -> None:
        """Do the same, but check neither that the kernel's device is the current one nor what types `args` have."""
        try:
            frame = self._frames.pop()
        except IndexError:  # all are in use by other threads
            frame = _Frame(self)
        self.layout.pack_plain_into(frame.args, args)
        frame.config.stream = stream
        self.launch(frame)
        self._frames.append(frame)

    def bind(self, args: Sequence[Any], stream: int) -> BoundLaunch:
        """Return what launches with these very arguments on that stream; they are as for `launch_plain`."""
        return BoundLaunch(self, args, stream)

    def launch(self, frame: _Frame) -> None:
        """Launch with what a frame holds; LaunchError if the driver refuses."""
        kernel = self.kernel
        status = self._launch(frame.config_address, kernel.function, frame.pointers_address, None)
        if status == _INVALID_CONTEXT:  # a thread that has not used CUDA yet
            kernel.make_context_current()
            status = self._launch(frame.config_address, kernel.function, frame.pointers_address, None)
        if status:
            raise LaunchError(f"{kernel} with {self.describe()}: {_error_text(status)}")

    def describe(self) -> str:
        """Say the configuration in words."""
        cluster = f", cluster={self.cluster}" if self.cluster else ""
        return f"grid={self.grid}, block={self.block}, shared_mem={self.shared_mem}{cluster}, pdl={self.pdl}"


class Kernel:
    """One compiled instance, loaded on one device. Made by `get_kernel`.

    Attributes
    ----------
    name : str
        C++ name of the instance.
    device : int
        Where it is loaded. It launches there, whatever the current device is.
    function : int
        The CUfunction handle.
    layout : ArgLayout
        Names, types and offsets of its arguments.
    build : Build
        The cubin on disk, what it uses, and the compiler's log.
    """

    def __init__(self, name: str, layout: ArgLayout, build: Build, device: int) -> None:
        import cupy

        self.name, self.layout, self.build, self.device = name, layout, build, device
        self._launchers: dict[tuple[Any, ...], Launcher] = {}
        self._lock = threading.Lock()
        self._max_shared = 48 * 1024 - build.resources.static_smem  # what needs no opt-in
        with self.on_device():
            self._module = cupy.RawModule(path=str(build.cubin))  # unloads the code when it goes
            self.function = int(self._module.get_function(build.symbol).kernel.ptr)

    @property
    def num_regs(self) -> int:
        """Registers a thread."""
        return self.build.resources.registers

    @property
    def local_size_bytes(self) -> int:
        """Local memory (stack and spills) a thread, in bytes."""
        return self.build.resources.stack

    def on_device(self) -> Any:
        """Return a context manager that makes the kernel's device the current one."""
        import cupy

        return cupy.cuda.Device(self.device)

    def make_context_current(self) -> None:
        """Create the device's context, or bind it to a thread that has none."""
        import cupy

        cupy.cuda.runtime.setDevice(self.device)
        cupy.cuda.runtime.free(0)

    @property
    def max_dynamic_shared(self) -> int:
        """Bytes of dynamic shared memory that a block can have."""
        return device_properties(self.device).max_shared_per_block - self.build.resources.static_smem

    def set_max_shared(self, nbytes: int) -> None:
        """Allow launches with `nbytes` of dynamic shared memory; `prepare` and `launch` do it by themselves.

        Raises
        ------
        ValueError
            If the device has not that much for one block.
        """
        if nbytes <= self._max_shared:
            return
        limit = self.max_dynamic_shared
        if nbytes > limit:
            raise ValueError(f"{self}: the device has {limit} bytes of dynamic shared memory, not {nbytes}")
        with self._lock:
            nbytes = max(nbytes, self._max_shared)  # another thread may have raised it meanwhile
            self._set_attribute(_MAX_DYNAMIC_SHARED_SIZE_BYTES, nbytes)
            self._max_shared = nbytes

    def allow_cluster(self, num_blocks: int) -> None:
        """Allow clusters of `num_blocks`; above 8 they depend on the chip and need an opt-in."""
        if num_blocks > _PORTABLE_CLUSTER:
            self._set_attribute(_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)

    def _set_attribute(self, attribute: int, value: int) -> None:
        with self.on_device():
            status = driver().cuFuncSetAttribute(ctypes.c_void_p(self.function), attribute, value)
            if status == _INVALID_CONTEXT:  # as in Launcher.launch
                self.make_context_current()
                status = driver().cuFuncSetAttribute(ctypes.c_void_p(self.function), attribute, value)
        if status:
            raise LaunchError(f"{self}: function attribute {attribute} = {value}: {_error_text(status)}")

    def max_active_blocks(self, block: Dim, shared_mem: int = 0) -> int:
        """Return how many blocks of this shape one SM holds at a time."""
        import cupy

        self.set_max_shared(shared_mem)
        x, y, z = _dim3("block", block)
        occupancy = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
        with self.on_device():
            try:
                return int(occupancy(self.function, x * y * z, shared_mem))
            except cupy.cuda.driver.CUDADriverError as error:
                if error.status != _INVALID_CONTEXT:
                    raise
                self.make_context_current()
                return int(occupancy(self.function, x * y * z, shared_mem))

    def prepare(
        self,
        grid: Dim,
        block: Dim,
        *,
        shared_mem: int = 0,
        cluster: Dim | None = None,
        pdl: bool = False,
        arguments: Sequence[Any] | None = None,
    ) -> Launcher:
        """Fix a launch configuration; calling the result with the arguments is the fastest way to launch.

        Parameters
        ----------
        grid, block, cluster : int or tuple of up to 3 ints
            Blocks, threads a block, blocks a cluster.
        shared_mem : int
            Bytes of dynamic shared memory a block.
        pdl : bool
            Programmatic dependent launch: the kernel may start before its predecessor in the stream has
            finished, and must itself wait (``griddepcontrol.wait``) before it reads what that one writes, or
            writes what that one reads. No effect below compute capability 9.0.
        arguments : sequence, optional
            For each of the kernel's arguments its value, which is fixed too, or None if calls are to give it (a
            null pointer is 0).

        Raises
        ------
        TypeError, ValueError
            As for a launch: something does not fit the kernel.
        """
        return Launcher(self, grid, block, shared_mem, cluster, pdl, arguments)

    def launch(
        self,
        grid: Dim,
        block: Dim,
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        stream: Any = None,
        cluster: Dim | None = None,
        pdl: bool = False,
    ) -> None:
        """Launch once: `prepare`, remembered for each configuration, then the call. See both."""
        key = (grid, block, shared_mem, cluster, pdl)
        launcher = self._launchers.get(key)
        if launcher is None:
            if len(self._launchers) >= _MAX_CACHED_LAUNCHERS:
                self._launchers.clear()
            launcher = self._launchers[key] = self.prepare(
                grid, block, shared_mem=shared_mem, cluster=cluster, pdl=pdl
            )
        launcher(args, stream)

    def __repr__(self) -> str:
        return f"<Kernel {self.name} on device {self.device}, {self.num_regs} registers>"


def _dim3(name: str, dim: Dim) -> tuple[int, int, int]:
    sizes = dim if isinstance(dim, tuple) and dim else (dim,)
    try:
        x, y, z = map(operator.index, (*sizes, *(1, 1, 1)[len(sizes) :]))
    except (TypeError, ValueError):
        x = y = z = 0
    if min(x, y, z) < 1:
        raise ValueError(f"{name} must be 1 to 3 positive integers, got {dim!r}")
    return x, y, z
