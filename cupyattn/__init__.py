"""Attention over a paged KV cache, as an array library: NumPy, CuPy, torch and JAX arrays in and out."""

from cupyattn.append import append
from cupyattn.cache import OutOfPages, PageAllocator, PagedKVCache, PagedMLACache, PageTable
from cupyattn.cascade import cascade_decode, cascade_workspace_bytes
from cupyattn.decode import decode, decode_workspace_bytes
from cupyattn.interop import get_array_module
from cupyattn.levels import CascadeLevels
from cupyattn.merge import merge_states
from cupyattn.mla import mla_append, mla_decode
from cupyattn.prefix import CascadeCost, PrefixLevels, PrefixTree
from cupyattn.rope import Rope
from cupyattn.runs import decode_workspace
from cupyattn.runtime import KernelSpec, get_include, get_kernel, register_kernel

__version__ = "0.1.0"

__all__ = [
    "CascadeCost",
    "CascadeLevels",
    "KernelSpec",
    "OutOfPages",
    "PageAllocator",
    "PageTable",
    "PagedKVCache",
    "PagedMLACache",
    "PrefixLevels",
    "PrefixTree",
    "Rope",
    "append",
    "cascade_decode",
    "cascade_workspace_bytes",
    "decode",
    "decode_workspace",
    "decode_workspace_bytes",
    "get_array_module",
    "get_include",
    "get_kernel",
    "merge_states",
    "mla_append",
    "mla_decode",
    "register_kernel",
]
