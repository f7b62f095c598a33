"""The host's side of run.cuh: grid, workspace and arguments of kernels that walk runs of KV tiles."""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from cupyattn import checks, kernels
from cupyattn.cache import PageTable
from cupyattn.levels import MAX_LEVELS, CascadeLevels
from cupyattn.runtime.device import device_properties
from cupyattn.runtime.launch import BoundLaunch, Kernel, Launcher
from cupyattn.runtime.workspace import default_workspace, zeroed
from cupyattn.schedule import choose_group_overhead

# What comes first in a workspace: Departures<TileInfo>::Memory of partials.cuh.
_MAX_CTAS = 4096
_TILE_INFO_BYTES = 64
_DEPARTURES_BYTES = 128 + _MAX_CTAS * (8 + 2 * _TILE_INFO_BYTES)
_MAX_SLOTS = 2**17  # partial states, with fixed splits: several GB
_MAX_NODES = 2**15  # groups of all levels of a cascade
_NODE_BYTES = 16  # of Node in cascade.cuh


class Tiles(Protocol):
    """What a launch must know of a kernel's shape."""

    @property
    def num_threads(self) -> int:
        """Threads of a CTA."""

    @property
    def tile_q(self) -> int:
        """Query rows of a tile."""

    @property
    def tile_kv(self) -> int:
        """Keys of a tile."""

    @property
    def flags_states(self) -> bool:
        """Whether of partial states only the flags must be zero between launches (FlaggedPartials of flagged.cuh)."""

    @property
    def group_overhead(self) -> tuple[int, int]:
        """What queries and states of a group of a cascade cost, as `choose_group_overhead` takes it."""

    @property
    def uneven_overhead(self) -> tuple[int, int]:
        """The same, where requests differ."""


class Runs:
    """A launch whose CTAs each take a run of tiles, for calls of one signature.

    Parameters
    ----------
    caller : str
        The public function, for messages.
    kernel : Kernel
    tiles : Tiles
    shared_bytes : int
        Dynamic shared memory of a CTA.
    head_dim : int
        Of the result.
    num_rows : int
        All requests' query rows (tokens x group size) of a KV head.
    single : bool
        Whether every request has one query token.
    num_kv_heads, page_size : int
        Of the cache.
    pages : PageTable
    fixed_split_size : int or None
    cluster : int
        CTAs of a cluster.
    multiple : int
        What the number of CTAs must be a multiple of.

    Attributes
    ----------
    needed_bytes : int
        Of workspace.
    num_structs : int
        Arguments at the kernel's end that are structs, which follow the inputs in `pointers`.

    Raises
    ------
    ValueError
        There is room for more than 2^17 fixed splits.
    """

    def __init__(
        self, caller: str, kernel: Kernel, tiles: Tiles, shared_bytes: int, head_dim: int, *, num_rows: int,
        single: bool, num_kv_heads: int, page_size: int, pages: PageTable, fixed_split_size: int | None,
        cluster: int = 1, multiple: int = 1,
    ) -> None:  # fmt: skip
        num_units = num_kv_heads * max_units(
            fixed_split_size or tiles.tile_kv, num_rows, single, tiles.tile_q, page_size, pages
        )
        num_slots = None
        if fixed_split_size is not None:
            num_slots = num_units
            if num_slots > _MAX_SLOTS:
                raise ValueError(
                    f"{caller}: fixed_split_size = {fixed_split_size} makes up to {num_slots} splits of what the "
                    f"page table has room for, more than {_MAX_SLOTS}"
                )
        self._size(
            kernel, tiles, shared_bytes, head_dim, num_units, num_slots, cluster=cluster,
            multiple=max(cluster, multiple),
        )  # fmt: skip
        split_shift = ((fixed_split_size or 0) // tiles.tile_kv).bit_length() - 1 if num_slots else 0
        table_row_stride, num_table_entries = table_arguments(pages)
        self._table_arguments = (table_row_stride, num_table_entries, split_shift, num_slots or 0)

    def _size(
        self, kernel: Kernel, tiles: Tiles, shared_bytes: int, head_dim: int, num_units: int,
        num_slots: int | None, num_homes: int = 0, cluster: int = 1, multiple: int = 1,
    ) -> None:  # fmt: skip
        """Set grid and workspace for up to so many units, with two slots a CTA by default, and homes of one row."""
        self._kernel = kernel
        # CTAs without work only delay the next launch.
        per_sm = kernel.max_active_blocks(tiles.num_threads, shared_bytes)
        most_ctas = min(per_sm * device_properties(kernel.device).num_sms, _MAX_CTAS)
        num_ctas = max(min(most_ctas, num_units) // multiple * multiple, multiple)
        self._num_ctas = num_ctas
        if num_slots is None:
            num_slots = 2 * num_ctas
        self._slot_rows = num_slots * tiles.tile_q
        state_bytes, flag_bytes = _state_bytes(self._slot_rows + num_homes, head_dim, tiles)
        layout = workspace_layout(kernel.device)
        self.needed_bytes = layout.end
        if tiles.flags_states:
            self._state_offset, self._flags_offset = layout.scratch, _DEPARTURES_BYTES
        else:
            # Fixed splits may need more than there is; then they lie behind all others.
            fits = _DEPARTURES_BYTES + state_bytes + flag_bytes <= layout.scratch
            self._state_offset = _DEPARTURES_BYTES if fits else layout.end
            self._flags_offset = self._state_offset + state_bytes
            self.needed_bytes = max(layout.end, self._flags_offset + flag_bytes)
        self._prepare = functools.partial(
            kernel.prepare, num_ctas, tiles.num_threads, shared_mem=shared_bytes,
            cluster=cluster if cluster > 1 else None,
        )  # fmt: skip
        self.num_structs = 0

    def fix(self, *arguments: int) -> None:
        """Set the kernel's arguments between its pointers and `table_row_stride`, for all calls.

        Every launch starts early (see launch.cuh). One with `pdl` also relies on lengths and tables as they are then.
        """
        fixed = (*arguments, *self._table_arguments)
        fields = self._kernel.layout.fields
        num_pointers = next(i for i, field in enumerate(fields) if field.ctype != "ptr")
        num_options = len(fields) - num_pointers - len(fixed) - 1
        self._launchers: list[Launcher] = [
            self._prepare(
                pdl=True, arguments=(*(None,) * num_pointers, *fixed, reads_early, *(None,) * num_options)
            )
            for reads_early in (0, 1)
        ]

    def launch(
        self, pointers: tuple[Any, ...], workspace: Any, options: tuple[Any, ...], stream: int, pdl: bool
    ) -> None:
        """Launch with `pointers`, those into a workspace (`workspace`, or the stream's own), and the last arguments.

        `pointers` are to inputs, then structs, then to `out` and `lse`.
        """
        if workspace is None:
            workspace = default_workspace(self.needed_bytes, self._kernel.device, stream)
        self._launchers[pdl].launch_plain(self._call_arguments(pointers, workspace, options), stream)

    def bind(
        self, pointers: tuple[Any, ...], workspace: Any, options: tuple[Any, ...], stream: int, pdl: bool
    ) -> BoundLaunch:
        """Return what does the same as often as it is called, `workspace` being given."""
        return self._launchers[pdl].bind(self._call_arguments(pointers, workspace, options), stream)

    def _call_arguments(
        self, pointers: tuple[Any, ...], workspace: Any, options: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        start = workspace.data.ptr
        if self.num_structs:
            structs = pointers[-2 - self.num_structs : -2]
            pointers = (*pointers[: -2 - self.num_structs], *pointers[-2:])
            options = (*options, *structs)
        return (*pointers, start + self._state_offset, start + self._flags_offset, start, *options)


def table_arguments(pages: PageTable) -> tuple[int, int]:
    """Return the stride of a table's rows, and how many entries from its start on a kernel may look at."""
    row_stride = 0 if pages.kv_indptr is not None else checks.element_strides(pages.kv_indices)[0]
    in_one_piece = not pages.is_dense or row_stride >= pages.kv_indices.shape[1]
    return row_stride, min(pages.kv_indices.size, 2**31 - 1) if in_one_piece else 0


class CascadeRuns(Runs):
    """The same for a cascade, whose kernels take Levels (cascade.cuh) as their last argument.

    Parameters
    ----------
    caller, kernel, tiles, shared_bytes, head_dim, num_kv_heads, page_size
        As for `Runs`.
    group_size : int
    num_tokens : int
        Query tokens.
    levels : CascadeLevels

    Raises
    ------
    ValueError
        There are more than 2^15 groups.
    """

    def __init__(
        self, caller: str, kernel: Kernel, tiles: Tiles, shared_bytes: int, head_dim: int, *, group_size: int,
        num_tokens: int, num_kv_heads: int, page_size: int, levels: CascadeLevels,
    ) -> None:  # fmt: skip
        num_nodes = sum(pages.batch_size for pages, _ in levels.levels)
        if num_nodes > _MAX_NODES:
            raise ValueError(
                f"{caller}: levels must have at most {_MAX_NODES} groups in all, got {num_nodes}"
            )
        num_units = num_kv_heads * sum(
            max_units(
                tiles.tile_kv, num_tokens * group_size, qo_indptr is None, tiles.tile_q, page_size, pages
            )
            for pages, qo_indptr in levels.levels
            if pages.batch_size
        )
        num_homes = levels.num_levels * num_tokens * num_kv_heads * group_size
        # Nodes lie behind what else a CTA has in shared memory, if it costs no CTA; else in the workspace.
        with_nodes = shared_bytes + num_nodes * _NODE_BYTES
        in_shared = with_nodes <= kernel.max_dynamic_shared and (
            kernel.max_active_blocks(tiles.num_threads, with_nodes)
            == kernel.max_active_blocks(tiles.num_threads, shared_bytes)
        )
        self._size(
            kernel, tiles, with_nodes if in_shared else shared_bytes, head_dim, num_units, None, num_homes
        )
        self._table_arguments = (0, 0, 0, 0)
        # What of Levels are no addresses: after each level's four, and at the end.
        first_nodes = itertools.accumulate((pages.batch_size for pages, _ in levels.levels), initial=0)
        self._numbers = [
            (pages.batch_size, *table_arguments(pages), first_node)
            for (pages, _), first_node in zip(levels.levels, first_nodes, strict=False)
        ]
        place = (shared_bytes, True) if in_shared else (workspace_layout(kernel.device).scratch, False)
        sizes = level_sizes(tiles.tile_kv, num_tokens * group_size, page_size, levels)
        num_tiles = num_kv_heads * sum(each * -(-rows // tiles.tile_q) for each, rows in sizes)
        overheads = (
            choose_group_overhead(cost, num_tiles, self._num_ctas)
            for cost in (tiles.group_overhead, tiles.uneven_overhead)
        )
        self.num_structs = 1
        self._totals = (levels.num_levels, num_nodes, num_tokens, self._slot_rows, *overheads, *place)

    def pack(self, addresses: Sequence[int]) -> bytes:
        """Return Levels, of the addresses of the arrays of `CascadeLevels`."""
        packed = b"".join(
            struct.pack("<4Q4i", *addresses[4 * i : 4 * i + 4], *numbers)
            for i, numbers in enumerate(self._numbers)
        )
        packed = packed.ljust(MAX_LEVELS * struct.calcsize("<4Q4i"), b"\0")
        return packed + struct.pack("<Q6iIi", addresses[-1], *self._totals)


def max_units(size: int, num_rows: int, single: bool, tile_q: int, page_size: int, pages: PageTable) -> int:
    """Bound the tiles or fixed splits (of `size` keys) of a step and a KV head from shapes alone.

    In each group of a KV head there are those of its request. With one query token a request (`single`) all have as
    many tiles of rows. Else a request has rows // tile_q tiles, rounded down, and one more at most; and the products
    of tiles and splits add up to at most the product of the sums.
    """
    batch_size, tokens = pages.batch_size, int(pages.kv_indices.size) * page_size
    num_q_tiles = (
        batch_size * -(-num_rows // batch_size // tile_q) if single else num_rows // tile_q + batch_size
    )
    if pages.is_dense:  # no request has more than a row of the table
        return num_q_tiles * max(-(-tokens // batch_size // size), 1)
    if single:
        return num_q_tiles // batch_size * (tokens // size + batch_size)
    return num_rows // tile_q * (tokens // size) + num_q_tiles + tokens // size


def level_sizes(size: int, num_rows: int, page_size: int, levels: CascadeLevels) -> list[tuple[int, int]]:
    """Return of each level that has groups: tiles of `size` keys that they have room for, and their rows on average."""
    return [
        (max_units(size, pages.batch_size, True, 1, page_size, pages), -(-num_rows // pages.batch_size))
        for pages, _ in levels.levels
        if pages.batch_size
    ]


def check_workspace(caller: str, workspace: Any, needed_bytes: int) -> None:
    """Raise TypeError or ValueError unless it is None or serves (its address is checked elsewhere)."""
    if workspace is None:
        return
    checks.check_dtype(f"{caller}: workspace", workspace, "uint8")
    if workspace.ndim != 1 or workspace.nbytes < needed_bytes or workspace.strides[0] != 1:
        raise ValueError(
            f"{caller}: workspace must be contiguous, of at least {needed_bytes} bytes (see "
            f"decode_workspace_bytes and cascade_workspace_bytes), got shape {list(workspace.shape)}"
        )


def check_options(
    caller: str, sm_scale: Any, window_left: Any, logits_soft_cap: Any, pdl: Any
) -> tuple[float, int, float]:
    """Return the first three as plain numbers, or raise TypeError or ValueError."""
    plain = (type(sm_scale), type(window_left), type(logits_soft_cap), type(pdl)) == (float, int, float, bool)
    if plain and math.isfinite(sm_scale) and 0 <= logits_soft_cap < math.inf and -1 <= window_left < 2**31:
        return sm_scale, window_left, logits_soft_cap  # making messages takes longer than these checks
    sm_scale = checks.as_finite(f"{caller}: sm_scale", sm_scale)
    logits_soft_cap = checks.as_finite(f"{caller}: logits_soft_cap", logits_soft_cap)
    if logits_soft_cap < 0:
        raise ValueError(f"{caller}: logits_soft_cap must be at least 0, got {logits_soft_cap}")
    window_left = checks.as_index(f"{caller}: window_left", window_left)
    if not -1 <= window_left < 2**31:
        raise ValueError(f"{caller}: window_left must be within -1..2**31 - 1, got {window_left}")
    checks.check_bool(f"{caller}: pdl", pdl)
    return sm_scale, window_left, logits_soft_cap


def as_split_size(caller: str, fixed_split_size: Any) -> int | None:
    """Return it as an int (64.0 would find the plan of 64), or raise TypeError or ValueError."""
    if fixed_split_size is None:
        return None
    size = checks.as_index(f"{caller}: fixed_split_size", fixed_split_size)
    if size < 64 or size & (size - 1):
        raise ValueError(f"{caller}: fixed_split_size must be a power of two of at least 64, got {size}")
    return size


def validate(
    caller: str, q: Any, cache: Any, pages: PageTable, qo_indptr: Any, workspace: Any, window_left: int
) -> None:
    """Check values in memory, on the host: the work of ``validate=True``. ValueError if one is wrong."""
    checks.validate_pages(
        caller, pages, page_size=cache.page_size, num_pages=cache.num_pages, qo_indptr=qo_indptr,
        num_tokens=q.shape[0], window_left=window_left,
    )  # fmt: skip
    check_zeroed(caller, workspace)


def check_zeroed(caller: str, workspace: Any) -> None:
    """Raise ValueError unless it is None or zero where it must be between launches; waits for the device."""
    if workspace is not None and not is_zeroed(workspace):
        raise ValueError(f"{caller}: workspace must be all zeros between launches, got others")


def decode_workspace(device: int | None = None, *, num_bytes: int = 0) -> Any:
    """Allocate a workspace for `decode` and `mla_decode`: for every call on that device without `fixed_split_size`.

    And for `cascade_decode`, but for large batches, and for MLA with more than 16 rows of queries a group.

    It is zero at first, and launches leave zero what they need so. Launches that overlap in time must not share one:
    they would take each other's partial states, and may end in an error of the device.

    Parameters
    ----------
    device : int, optional
        Device id; the current one by default.
    num_bytes : int
        Its size at least. Calls with `fixed_split_size` may need more: `decode_workspace_bytes` says how much; for
        cascades `cascade_workspace_bytes`.

    Returns
    -------
    cupy.ndarray, uint8
        About 29 MB on an H100.

    Raises
    ------
    TypeError, ValueError
        `num_bytes` is not an integer of at least 0.
    """
    properties = device_properties(device)
    num_bytes = checks.as_index("decode_workspace: num_bytes", num_bytes)
    if num_bytes < 0:
        raise ValueError(f"decode_workspace: num_bytes must be at least 0, got {num_bytes}")
    return zeroed(max(workspace_bytes(properties.id), num_bytes), properties.id)


class WorkspaceLayout(NamedTuple):
    """Offsets, in bytes, into a workspace: what lies between them need not be zero between launches."""

    scratch: int
    end: int


@functools.cache
def workspace_layout(device: int) -> WorkspaceLayout:
    """Return what the hungriest kernels need without fixed splits: two partial states a CTA.

    The number of CTAs is bounded by shared memory alone here, so that nothing is compiled to find it.
    """
    properties = device_properties(device)
    shapes: list[tuple[Tiles, int, int]] = [
        (config, head_dim, config.shared_bytes(head_dim))
        for head_dim in kernels.DECODE_HEAD_DIMS
        for config in kernels.decode_configs(properties.arch, head_dim)
    ]
    ckv_dim, _ = kernels.MLA_DIMS
    shapes += [
        (config, ckv_dim, config.shared_bytes) for config in kernels.mla_plain_configs(properties.arch)
    ]
    most_zeroed, most_scratch = 0, _MAX_NODES * _NODE_BYTES
    for tiles, head_dim, shared_bytes in shapes:
        num_ctas = min(properties.max_shared_per_sm // shared_bytes * properties.num_sms, _MAX_CTAS)
        state_bytes, flag_bytes = _state_bytes(2 * num_ctas * tiles.tile_q, head_dim, tiles)
        if tiles.flags_states:
            most_zeroed, most_scratch = max(most_zeroed, flag_bytes), max(most_scratch, state_bytes)
        else:
            most_zeroed = max(most_zeroed, state_bytes + flag_bytes)
    start = _DEPARTURES_BYTES + most_zeroed
    return WorkspaceLayout(start, start + most_scratch)


def workspace_bytes(device: int) -> int:
    """Return the bytes of a workspace for all calls without fixed splits."""
    return workspace_layout(device).end


def is_zeroed(workspace: Any) -> bool:
    """Say whether a workspace is zero where it must be between launches; waits for the device."""
    layout = workspace_layout(workspace.device.id)
    with workspace.device:
        return not (workspace[: layout.scratch].any() or workspace[layout.end :].any())


def _state_bytes(num_rows: int, head_dim: int, tiles: Tiles) -> tuple[int, int]:
    """Return the bytes of so many rows of partial states, and of their flags; of whole lines (partials.cuh)."""
    line_dims = 64 if tiles.flags_states else 32
    num_lines = num_rows * math.ceil(head_dim / line_dims)
    return 2 * line_dims * num_lines, 8 * num_lines
