"""Kernels from source to launch: find and hash the sources, compile, cache, load and launch them."""

from .compiler import Build, CompileError, CompilerNotFound, Program, Resources, cache_dir
from .device import DeviceProperties, arch_of, device_properties, num_devices
from .launch import Kernel, Launcher, LaunchError
from .registry import CI_ARCHS, KernelSpec, get_kernel, get_spec, list_kernels, register_kernel
from .source import get_include, kernels_root
from .tensor_map import KeyBoxes, can_map, encode_tensor_map

__all__ = [
    "CI_ARCHS",
    "Build",
    "CompileError",
    "CompilerNotFound",
    "DeviceProperties",
    "Kernel",
    "KernelSpec",
    "KeyBoxes",
    "LaunchError",
    "Launcher",
    "Program",
    "Resources",
    "arch_of",
    "cache_dir",
    "can_map",
    "device_properties",
    "encode_tensor_map",
    "get_include",
    "get_kernel",
    "get_spec",
    "kernels_root",
    "list_kernels",
    "num_devices",
    "register_kernel",
]
