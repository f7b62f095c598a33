"""The library's kernels: what each is called, which template arguments it comes with, how it is sized."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from cupyattn.runtime.registry import KernelSpec, register_kernel

#: Elements of CUDA arrays, by dtype name.
CUDA_TYPES = {
    "float16": "cupyattn::half_t",
    "bfloat16": "cupyattn::bfloat16_t",
    "float32": "float",
}
LEVELS = "cupyattn::Levels"  # the last template argument of kernels that do a cascade
DECODE_DTYPES = ("float16", "bfloat16")
APPEND_THREADS = 128  # kAppendThreads of append.cu
DECODE_HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)

_KiB = 1024
_RESERVED_SHARED_BYTES = 1 * _KiB  # that the system takes of an SM's shared memory for each CTA
_STATIC_SHARED_BYTES = 2 * _KiB  # at most: what a kernel declares with a fixed size, but for decode's notes
#: Tiles of 64 keys and a KV head, for each SM, from which on pairs of heads are worked on. Of fewer, units of twice the
#: bytes would be dealt out less evenly.
_PAIR_TILES_PER_SM = 8
#: The same, from which on KV heads come in parts.
_PART_TILES_PER_SM = 16
#: The same, from which on tiles have 128 keys where that helps, by rows: a tile costs more than its keys, a CTA leaves
#: states. Of fewer, such tiles would be dealt out less evenly.
_WIDE_TILES_PER_SM = {8: 12, 16: 6}
#: And of a request and a KV head, on average: the last tile of each is not full.
_WIDE_TILES_PER_GROUP = 8
#: The same, above which three stages are faster than two: with up to 8 rows of 128 columns, with up to 16 of 256.
_LONG_TILES_PER_SM = 128
_LONG_WIDE_TILES_PER_SM = 48


@dataclass(frozen=True)
class DecodeConfig:
    """One shape of the decode kernel: the template parameters after T and kHeadDim (see decode.cu)."""

    warps_q: int
    row_blocks: int
    warps_kv: int
    tile_kv: int
    num_stages: int
    ctas_per_sm: int
    heads: int = 1  # KV heads whose rows of keys a tile has side by side
    flags_states: ClassVar[bool] = False
    group_overhead: ClassVar[tuple[int, int]] = 0, 1
    uneven_overhead: ClassVar[tuple[int, int]] = 1, 4

    @property
    def num_threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps_q * self.warps_kv

    @property
    def tile_q(self) -> int:
        """Query rows of a tile."""
        return 8 * self.row_blocks * self.warps_q

    def shared_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory of a CTA."""
        kv_tiles = self.num_stages * 2 * self.tile_kv * _row_bytes(self.heads * head_dim)
        queries = self.num_stages * self.tile_q * _row_bytes(head_dim)
        row_addresses = 2 * 2 * self.tile_kv * 8
        return kv_tiles + queries + row_addresses

    @property
    def static_shared_bytes(self) -> int:
        """What a CTA has of fixed size, at most: with notes of requests (schedule.cuh), which cascades do without."""
        warp_rows = 8 * self.row_blocks * self.num_threads // 32  # with a maximum and a sum each
        size = 512 + 8 * warp_rows + 16 * self.num_threads
        # Behind it, a warpgroup's tiles are aligned to blocks of 1 KiB.
        return -(-size // _KiB) * _KiB if self.warps_q == 4 else size

    def shared_bytes_per_sm(self, head_dim: int) -> int:
        """All that its CTAs take of an SM's shared memory, at most."""
        each = self.shared_bytes(head_dim) + self.static_shared_bytes + _RESERVED_SHARED_BYTES
        return self.ctas_per_sm * each


@dataclass(frozen=True)
class DecodeSm90Config:
    """The shape of the kernel of decode_sm90.cu, of which an SM has one CTA."""

    num_threads: ClassVar[int] = 384
    tile_q: ClassVar[int] = 128
    tile_kv: ClassVar[int] = 64
    most_box_rows: ClassVar[int] = 32  # keys of a box (tma.cuh): those of a warp that copies
    heads: ClassVar[int] = 1
    ctas_per_sm: ClassVar[int] = 1
    flags_states: ClassVar[bool] = False
    group_overhead: ClassVar[tuple[int, int]] = 0, 1
    uneven_overhead: ClassVar[tuple[int, int]] = 1, 4

    def shared_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory of a CTA: four tiles of keys and values, queries of two segments, where states are."""
        lists = 3 * 2048 + 94 * 24 + 1024 * 4  # as they are found; of 93 rows; of 1024 states
        return 2 * head_dim * (4 * 2 * self.tile_kv + 2 * self.tile_q) + 1024 + lists


DECODE_SM90_HEAD_DIMS = (64, 128)  # of more, two warpgroups' accumulators leave no registers


def _row_bytes(num_dims: int) -> int:
    """Return what a row takes in shared memory: TileLayout::kRowBytes of tile.cuh."""
    row_chunks = num_dims // 8
    return 16 * (row_chunks if row_chunks % 8 == 0 else row_chunks | 1)


def decode_config(
    arch: str,
    head_dim: int,
    rows: int,
    num_tiles: int | None = None,
    num_sms: int = 1,
    has_pairs: bool = False,
    num_groups: int = 1,
) -> DecodeConfig:
    """Choose the shape of the decode kernel. Any choice is right; this one is fast.

    Parameters
    ----------
    arch : str
    head_dim : int
    rows : int
        Query rows (query tokens x group size) per KV head. Up to 8, all warps share them and split the keys; up to 32,
        two warps do (up to 16, with head_dim > 128, all); with more, each warp takes rows of its own. So it does on
        sm_90a from 17 rows on, with head_dim 64, 128 and 256, where the four of them multiply as a warpgroup.
    num_tiles : int, optional
        Tiles of 64 keys that all KV heads of all requests have room for. If they are so few that even with fewer rows
        a tile all would be worked on at once, tiles have 8 or 16 rows, if there is an SM for each; or 32. The keys are
        then read several times, but a CTA is done sooner, and that is what such a step waits for.
    num_sms : int
        Matters with `num_tiles` only.
    has_pairs : bool
        Whether there is one query token a request and an even number of KV heads, each two of which have their rows
        of keys side by side, and of values. Then, if `num_tiles` are many, a tile may have the rows of two heads.
    num_groups : int
        Requests x KV heads, among which `num_tiles` are.

    Notes
    -----
    CTAs on one SM copy while others compute, stages of one CTA copy ahead. On an H100 (228 KiB an SM) with
    head_dim 128, a tile of 64 keys is 32 KiB, and there is room for 2 CTAs x 3 stages; but 2 x 2 are faster unless runs
    are long. bench/NOTES.md has the times.
    """
    if has_pairs and rows <= 8 and (num_tiles or 0) >= _PAIR_TILES_PER_SM * num_sms:
        pairs = _pair_config(arch, head_dim)
        if pairs is not None:
            return pairs
    if num_tiles is not None:
        for fewer_rows in (8, 16, 32):
            config = decode_config(arch, head_dim, fewer_rows)
            at_once = num_sms * (1 if fewer_rows <= 16 else config.ctas_per_sm)
            num_units = num_tiles * (64 // config.tile_kv) * -(-rows // config.tile_q)
            if config.tile_q < rows and num_units <= at_once:
                return config
    per_sm = shared_bytes_per_sm(arch)
    wide = _wide_config(arch, head_dim, rows)
    if wide is not None and num_tiles is not None:
        least = max(_WIDE_TILES_PER_SM[wide.tile_q] * num_sms, _WIDE_TILES_PER_GROUP * num_groups)
        if num_tiles >= least:
            return wide
    shapes: tuple[tuple[int, int, int, int], ...]
    if rows <= 8 or (rows <= 16 and head_dim > 128):
        row_blocks = -(-rows // 8)
        shapes = ((1, row_blocks, 4, 64), (1, row_blocks, 2, 32))
    elif 16 < rows <= 32 and head_dim in (64, 128) and arch == "sm_90a":
        shapes = ((4, 1, 1, 64),)
    elif rows <= 32 and head_dim <= 128:
        row_blocks = -(-rows // 16)
        shapes = ((2, row_blocks, 2, 64), (2, row_blocks, 1, 32))
    else:
        row_blocks = 2 if head_dim <= 128 else 1  # of 16 rows x 256 columns, registers would spill
        shapes = ((4, row_blocks, 1, 64), (2, row_blocks, 1, 32))
    if head_dim <= 64:
        # With 8 rows x 64 columns there are registers for 4 CTAs.
        ctas_and_stages = [(4, 2) if rows <= 8 else (2, 3)]
    elif head_dim <= 128:
        is_long = rows <= 8 and (num_tiles or 0) > _LONG_TILES_PER_SM * num_sms
        ctas_and_stages = [(2, 3 if is_long else 2)]
    else:
        is_long = head_dim == 256 and (num_tiles or 0) > _LONG_WIDE_TILES_PER_SM * num_sms
        ctas_and_stages = [(2, 2), (1, 3 if is_long else 2)] if rows <= 16 else []
    ctas_and_stages += itertools.product((2, 1), (4, 3, 2))  # where there is less shared memory
    for shape, (num_ctas, num_stages) in itertools.product(shapes, ctas_and_stages):
        config = DecodeConfig(*shape, num_stages, num_ctas)
        if config.shared_bytes_per_sm(head_dim) <= per_sm:
            return config
    raise ValueError(
        f"decode: head_dim = {head_dim} does not fit into {per_sm} bytes of shared memory ({arch})"
    )


def choose_num_parts(num_kv_heads: int, num_tiles: int, num_ctas: int, num_sms: int) -> int:
    """Choose how many parts the KV heads are cut into, which CTAs walk side by side, as many through each.

    So the rows of several heads, which lie next to each other, are read at about the same time, and DRAM is faster by
    1%. Any power of two that divides `num_kv_heads` and `num_ctas` is right. Two heads gain nothing, nor do fewer
    `num_tiles` (of 64 keys, of all heads), most of which are read at once anyway.
    """
    if num_tiles < _PART_TILES_PER_SM * num_sms:
        return 1
    return next(parts for parts in (8, 4, 1) if num_kv_heads % parts == num_ctas % parts == 0)


def _wide_config(arch: str, head_dim: int, rows: int) -> DecodeConfig | None:
    """Return the shape with tiles of 128 keys, for `decode` without fixed splits, or None where others are faster."""
    if head_dim != 64 or rows > 16:
        return None
    config = DecodeConfig(1, 1, 8, 128, 2, 2) if rows <= 8 else DecodeConfig(2, 1, 4, 128, 2, 2)
    return config if config.shared_bytes_per_sm(head_dim) <= shared_bytes_per_sm(arch) else None


def _pair_config(arch: str, head_dim: int) -> DecodeConfig | None:
    """Return the shape for pairs of KV heads, or None where single rows are wide enough or two CTAs do not fit."""
    config = DecodeConfig(1, 2, 4, 64, 2, 2, heads=2)
    fits = config.shared_bytes_per_sm(head_dim) <= shared_bytes_per_sm(arch)
    return config if head_dim == 64 and fits else None


def decode_configs(arch: str, head_dim: int) -> tuple[DecodeConfig, ...]:
    """All that `decode_config` can choose."""
    most = max(_LONG_TILES_PER_SM, _LONG_WIDE_TILES_PER_SM) + 1
    configs = [decode_config(arch, head_dim, rows) for rows in (8, 16, 32, 33)]
    configs += [decode_config(arch, head_dim, rows, most) for rows in (8, 16, 32)]
    pairs = _pair_config(arch, head_dim)
    return tuple(dict.fromkeys((*configs, pairs) if pairs is not None else configs))


def shared_bytes_per_sm(arch: str) -> int:
    """Shared memory of an SM, by compute capability (CUDA C++ Programming Guide, table of technical specifications)."""
    capability = int("".join(c for c in arch.removeprefix("sm_") if c.isdigit()))
    if capability in (80, 87):
        return 164 * _KiB
    if capability in (86, 89) or capability >= 120:
        return 100 * _KiB
    return 228 * _KiB


def _decode_instances(arch: str) -> Iterator[tuple[str | int, ...]]:
    for dtype, head_dim in itertools.product(DECODE_DTYPES, DECODE_HEAD_DIMS):
        for config in decode_configs(arch, head_dim):
            yield decode_template(dtype, head_dim, config)
        for config in dict.fromkeys(decode_config(arch, head_dim, rows) for rows in (8, 16, 32, 33)):
            yield decode_template(dtype, head_dim, config, True)


#: Tiles of 128 query rows, for each SM, of which decode_sm90.cu needs as many to be faster than decode.cu.
_SM90_TILES_PER_SM = 0.9
#: How long a tile of keys takes a cascade, by its query rows, in units of reading it from HBM: where one tile of rows
#: has all that see the keys, and where others read them too (then they are in L2). From bench/NOTES.md.
_DECODE_TILE_COSTS = {16: (1.0, 0.7), 32: (1.0, 1.15), 64: (1.2, 1.0), 128: (1.15, 1.2)}
#: The same with so many tiles of keys for each SM that memory is the limit: rows that do not exist cost nothing.
_MEMORY_TILES_PER_SM = 20
_MEMORY_TILE_COSTS = {**_DECODE_TILE_COSTS, 64: (1.0, 1.0), 128: (1.0, 1.0)}
#: Between 16 and 32 rows of one tile there is a tie, which the first wins: it has less to merge.
_MLA_TILE_COSTS = {16: (1.0, 0.6), 32: (1.0, 0.65), 64: (1.05, 0.6)}


def _cascade_cost(
    costs: dict[int, tuple[float, float]], tile_q: int, levels: Sequence[tuple[int, int]]
) -> float:
    """Return how long levels take with tiles of so many rows, each level being (tiles of keys, query rows a group)."""
    once, again = costs[tile_q]
    return sum(
        num_tiles * (once if rows <= tile_q else -(-rows // tile_q) * again) for num_tiles, rows in levels
    )


def cascade_config(
    arch: str,
    head_dim: int,
    levels: Sequence[tuple[int, int]],
    num_kv_heads: int = 1,
    num_sms: int = 1,
) -> DecodeConfig | DecodeSm90Config:
    """Choose the shape of the decode kernel for a cascade. Any choice is right; this one is fast.

    Parameters
    ----------
    arch : str
    head_dim : int
    levels : sequence of (int, int)
        Of each level, tiles of 64 keys that its groups have room for, and the query rows of a group on average (query
        tokens x group size), both per KV head.
    num_kv_heads, num_sms : int
        Of tiles of 128 rows there must be one for nearly each SM; with many tiles of keys for each, they cost less.

    Notes
    -----
    Tiles of 128 and 64 rows read shared keys seldom; those of 16 read a request's own keys faster, where there are few
    CTAs. With 128 rows there are half as many as with 64. Of shapes that cost the same, that of the fewest rows it is.
    """
    configs = [
        config
        for config in cascade_configs(arch, head_dim)
        if isinstance(config, DecodeConfig)
        or num_kv_heads * sum(num_tiles * -(-rows // config.tile_q) for num_tiles, rows in levels)
        >= _SM90_TILES_PER_SM * num_sms
    ]
    num_tiles = num_kv_heads * sum(num_tiles for num_tiles, _ in levels)
    costs = _MEMORY_TILE_COSTS if num_tiles >= _MEMORY_TILES_PER_SM * num_sms else _DECODE_TILE_COSTS
    return min(configs, key=lambda config: _cascade_cost(costs, config.tile_q, levels))


def cascade_configs(arch: str, head_dim: int) -> tuple[DecodeConfig | DecodeSm90Config, ...]:
    """All that `cascade_config` can choose: 16 rows at least, as 8 are too few to share."""
    configs: list[DecodeConfig | DecodeSm90Config] = [
        decode_config(arch, head_dim, rows) for rows in (16, 32, 33)
    ]
    if arch == "sm_90a" and head_dim in DECODE_SM90_HEAD_DIMS:
        configs.append(DecodeSm90Config())
    return tuple(dict.fromkeys(configs))


def cascade_kernel(
    dtype: str, head_dim: int, config: DecodeConfig | DecodeSm90Config
) -> tuple[str, tuple[str | int, ...]]:
    """Name and template arguments of the kernel that has a shape, for a cascade."""
    if isinstance(config, DecodeSm90Config):
        return "decode_sm90_cascade", (CUDA_TYPES[dtype], head_dim, LEVELS)
    return "decode_cascade", (*decode_template(dtype, head_dim, config), LEVELS)


def _decode_cascade_instances(arch: str) -> Iterator[tuple[str | int, ...]]:
    for dtype, head_dim in itertools.product(DECODE_DTYPES, DECODE_HEAD_DIMS):
        for config in cascade_configs(arch, head_dim):
            if isinstance(config, DecodeConfig):
                yield decode_template(dtype, head_dim, config)


def _decode_sm90_instances(arch: str) -> Iterator[tuple[str | int, ...]]:
    for dtype, head_dim in itertools.product(DECODE_DTYPES, DECODE_SM90_HEAD_DIMS):
        yield CUDA_TYPES[dtype], head_dim


def decode_template(
    dtype: str, head_dim: int, config: DecodeConfig, fixed_splits: bool = False
) -> tuple[str | int, ...]:
    """Template arguments of the decode kernel."""
    return (
        CUDA_TYPES[dtype],
        head_dim,
        config.warps_q,
        config.row_blocks,
        config.warps_kv,
        config.tile_kv,
        config.num_stages,
        config.ctas_per_sm,
        config.heads,
        int(fixed_splits),
    )


MLA_DIMS = (512, 64)  # of ckv and kpe: kCkvDim and kKpeDim of mla.cu


@dataclass(frozen=True)
class MLAConfig:
    """One shape of the MLA kernel: the template parameters after T (see mla.cu)."""

    warps_q: int
    row_blocks: int
    warps_d: int
    tile_kv: int
    num_stages: int
    query_buffers: int
    flags_states: ClassVar[bool] = False
    group_overhead: ClassVar[tuple[int, int]] = 0, 1
    uneven_overhead: ClassVar[tuple[int, int]] = 0, 1

    @property
    def num_threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps_q * self.warps_d

    @property
    def tile_q(self) -> int:
        """Query rows of a tile."""
        return 16 * self.row_blocks * self.warps_q

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        row_bytes = 2 * sum(MLA_DIMS)
        kv_tiles = self.num_stages * self.tile_kv * row_bytes
        queries = self.query_buffers * self.tile_q * row_bytes
        dim_splits = self.warps_d // (self.tile_kv // 16)
        logits = dim_splits * self.tile_q * (self.tile_kv + 8) * 4
        row_addresses = 2 * 2 * self.tile_kv * 8
        return kv_tiles + queries + logits + row_addresses


@dataclass(frozen=True)
class MLASm90Config:
    """A shape of the kernel of mla_sm90.cu, by the query rows of a tile."""

    tile_q: int
    is_cascade: bool = False
    num_threads: ClassVar[int] = 384
    tile_kv: ClassVar[int] = 64
    most_box_rows: ClassVar[int] = 64  # keys of a box (tma.cuh): a tile's
    group_overhead: ClassVar[tuple[int, int]] = 2, 8
    uneven_overhead: ClassVar[tuple[int, int]] = 2, 8  # the same, as its merge reads it of Levels alone

    @property
    def flags_states(self) -> bool:
        """Whether it leaves FlaggedPartials."""
        return not self.is_cascade and self.tile_q > 16

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA: queries and two tiles of keys, 64 rows each; weights."""
        return 2 * (3 * 64 * sum(MLA_DIMS) + 64 * self.tile_kv)


MLA_SM90_CONFIGS = tuple(MLASm90Config(tile_q) for tile_q in (16, 32, 64))


def mla_sm90_config(
    rows: int, num_tiles: int, num_sms: int, num_requests: int = 0
) -> MLAConfig | MLASm90Config:
    """Choose the shape of the kernel of mla_sm90.cu, or of that of mla.cu where this is faster.

    Parameters
    ----------
    rows : int
        Query rows (query tokens x heads) of a request.
    num_tiles : int
        Tiles of 64 keys that all requests have room for.
    num_sms : int
    num_requests : int
        0 for a cascade's groups.

    Notes
    -----
    With few rows and tiles, mla.cu has the shorter way from start to end; bench/NOTES.md has the times on all sides.
    That is worth reading keys again for each 16 rows (from L2, mostly) where a CTA gets up to three of its tiles, of 32
    keys. With 17 to 64 rows it is still faster, in tiles of 32, where requests have up to 16 tiles of 64 keys (of more,
    it would have more to merge), and CTAs two of its own. Where CTAs would get one tile with 64 rows, and leave large
    states, they get two with 32. (What a table has room for may be a tile more for each request.)
    """
    if rows <= 16:
        if num_tiles <= 9 * num_sms // 4:
            return mla_config("sm_90a", 16)
    elif num_requests > 0:
        num_units = {tile_q: num_tiles * -(-rows // tile_q) for tile_q in (16, 32)}
        if num_units[16] <= 3 * num_sms // 2:
            return mla_config("sm_90a", 16)
        if rows <= 64 and num_tiles <= 17 * num_requests and num_units[32] <= 5 * num_sms // 4:
            return mla_config("sm_90a", 32)
        if num_sms < num_units[32] <= 9 * num_sms // 4:
            return MLA_SM90_CONFIGS[1]
    return next((config for config in MLA_SM90_CONFIGS if rows <= config.tile_q), MLA_SM90_CONFIGS[-1])


def mla_sm90_cluster(config: MLAConfig | MLASm90Config, rows: int, num_tiles: int, num_sms: int) -> int:
    """Choose how many CTAs a cluster has: two where requests have several query tiles of 64 rows, of the same keys.

    `config` is what `mla_sm90_config` has chosen for the others. They share copies in runs of more than four tiles
    (`is_long` of mla_sm90.cu). Clusters start later, so there are none where no CTA has more than one tile; in between
    they gain nothing.
    """
    largest = MLA_SM90_CONFIGS[-1]
    has_several = config is largest and rows > largest.tile_q
    return 2 if has_several and num_tiles * -(-rows // largest.tile_q) > num_sms else 1


def mla_sm90_cascade_config(levels: Sequence[tuple[int, int]], num_sms: int) -> MLASm90Config | None:
    """Choose the shape for a cascade whose levels have so many tiles of 64 keys, and query rows a group."""
    if all(isinstance(mla_sm90_config(rows, num_tiles, num_sms), MLAConfig) for num_tiles, rows in levels):
        return None
    tile_q = min(_MLA_TILE_COSTS, key=lambda tile_q: _cascade_cost(_MLA_TILE_COSTS, tile_q, levels))
    return MLASm90Config(tile_q, is_cascade=True)


def mla_config(arch: str, rows: int, fixed_splits: bool = False) -> MLAConfig:
    """Choose the shape of the MLA kernel. Any choice is right; this one is fast.

    Parameters
    ----------
    arch : str
    rows : int
        Query rows (query tokens x heads) of a request.
    fixed_splits : bool
        Then tiles have 32 rows at most: with more, registers would spill.

    Notes
    -----
    On an H100 (227 KiB a CTA) a tile of 32 keys is 36 KiB and one of 64 query rows 72 KiB. A second buffer for
    queries lets copies run ahead into the next request. There, tiles of more than 32 rows are mla_sm90.cu's.
    """
    per_sm = shared_bytes_per_sm(arch)
    shapes = [MLAConfig(1, 1, 8, 32, 4, 2), MLAConfig(1, 1, 8, 32, 3, 2), MLAConfig(1, 1, 4, 16, 3, 2)]
    if rows > 16:
        shapes = [MLAConfig(1, 2, 8, 32, 4, 1), MLAConfig(1, 2, 8, 32, 2, 1), *shapes]
    if rows > 32 and not fixed_splits and arch != "sm_90a":
        shapes = [MLAConfig(2, 2, 4, 32, 3, 1), *shapes]
    for config in shapes:
        if config.shared_bytes + _STATIC_SHARED_BYTES + _RESERVED_SHARED_BYTES <= per_sm:
            return config
    raise ValueError(f"mla_decode: no tile fits into {per_sm} bytes of shared memory ({arch})")


def mla_configs(arch: str, fixed_splits: bool = False) -> tuple[MLAConfig, ...]:
    """All that `mla_config` can choose."""
    return tuple(dict.fromkeys(mla_config(arch, rows, fixed_splits) for rows in (16, 32, 33)))


def mla_plain_configs(arch: str) -> tuple[MLAConfig | MLASm90Config, ...]:
    """All shapes of either kernel that there are without fixed splits."""
    return (*mla_configs(arch), *MLA_SM90_CONFIGS) if arch == "sm_90a" else mla_configs(arch)


def mla_template(dtype: str, config: MLAConfig, fixed_splits: bool = False) -> tuple[str | int, ...]:
    """Template arguments of the MLA kernel."""
    return (
        CUDA_TYPES[dtype],
        config.warps_q,
        config.row_blocks,
        config.warps_d,
        config.tile_kv,
        config.num_stages,
        config.query_buffers,
        int(fixed_splits),
    )


def _mla_instances(arch: str) -> Iterator[tuple[str | int, ...]]:
    for dtype, fixed_splits in itertools.product(DECODE_DTYPES, (False, True)):
        configs = mla_configs(arch, True) if fixed_splits else mla_plain_configs(arch)
        for config in configs:
            if isinstance(config, MLAConfig):
                yield mla_template(dtype, config, fixed_splits)


def _mla_cascade_instances(arch: str) -> Iterator[tuple[str | int, ...]]:
    configs = (mla_config(arch, 16),) if arch == "sm_90a" else mla_configs(arch)
    for dtype, config in itertools.product(DECODE_DTYPES, configs):
        yield mla_template(dtype, config)


def _mla_sm90_instances(arch: str) -> Iterator[tuple[str | int, ...]]:
    for dtype, config in itertools.product(DECODE_DTYPES, MLA_SM90_CONFIGS):
        yield CUDA_TYPES[dtype], config.tile_q


def divisor(value: int) -> tuple[int, int, int]:
    """Return `value` with what lets a kernel divide by it (see divide.cuh): (value, multiplier, shift)."""
    shift = (value - 1).bit_length()
    return value, (2**32 * (2**shift - value)) // value + 1, shift


def merge_vector(dtype: str, head_dim: int, aligned: bool) -> int:
    """Elements that a lane of the merge kernel moves at once: 16 bytes where everything is aligned to them."""
    width = 4 if dtype == "float32" else 8
    return width if aligned and head_dim % width == 0 else 1


def _args(**types: str) -> tuple[tuple[str, str], ...]:
    """Expand {"ptr": "q k", "i32": "n"} into (("q", "ptr"), ("k", "ptr"), ("n", "i32")): C order, C names."""
    return tuple((name, kind.rstrip("_")) for kind, names in types.items() for name in names.split())


DECODE = register_kernel(
    KernelSpec(
        name="decode",
        source="decode.cu",
        symbol="cupyattn::decode_kernel",
        template=(
            "T",
            "kHeadDim",
            "kWarpsQ",
            "kRowBlocks",
            "kWarpsKV",
            "kTileKV",
            "kStages",
            "kCtasPerSM",
            "kHeads",
            "kFixedSplits",
        ),
        args=_args(
            ptr="q k_pages v_pages qo_indptr kv_indptr kv_indices kv_lens out lse "
            "partial_out partial_flags departures",
            i64="q_stride_token q_stride_head k_stride_page k_stride_token k_stride_head "
            "v_stride_page v_stride_token v_stride_head out_stride_token out_stride_head "
            "lse_stride_token lse_stride_head",
            i32="batch_size num_kv_heads part_shift group_size",
            u32="group_multiplier",
            i32_="group_shift page_size",
            u32_="page_multiplier",
            i32__="page_shift num_pages table_row_stride num_table_entries split_shift max_splits reads_early "
            "window_left",
            f32="sm_scale logits_soft_cap",
        ),
        instances=_decode_instances,
        archs="sm_80",
    )
)

LEVELS_BYTES = 424  # of Levels in cascade.cuh


def _cascade(spec: KernelSpec, instances: Callable[[str], Iterator[tuple[str | int, ...]]]) -> KernelSpec:
    """Return the same kernel for the levels of a cascade."""
    return dataclasses.replace(
        spec,
        name=f"{spec.name}_cascade",
        template=(*spec.template, "Cascade"),
        args=(*spec.args, ("levels", f"bytes:{LEVELS_BYTES}:8")),
        instances=lambda arch: ((*template, LEVELS) for template in instances(arch)),
    )


DECODE_CASCADE = register_kernel(_cascade(DECODE, _decode_cascade_instances))
KEY_MAPS_BYTES = 320  # of KeyMaps in tma.cuh
KEY_MAPS = ("key_maps", f"bytes:{KEY_MAPS_BYTES}:64")

DECODE_SM90_CASCADE = register_kernel(
    _cascade(
        dataclasses.replace(
            DECODE,
            name="decode_sm90",
            source="decode_sm90.cu",
            symbol="cupyattn::decode_sm90_kernel",
            template=("T", "kHeadDim"),
            args=(*DECODE.args, KEY_MAPS),
            archs=("sm_90a",),
        ),
        _decode_sm90_instances,
    )
)

MLA_DECODE = register_kernel(
    KernelSpec(
        name="mla",
        source="mla.cu",
        symbol="cupyattn::mla_kernel",
        template=(
            "T",
            "kWarpsQ",
            "kRowBlocks",
            "kWarpsD",
            "kTileKV",
            "kStages",
            "kQueryBuffers",
            "kFixedSplits",
        ),
        args=_args(
            ptr="q_ckv q_kpe ckv_pages kpe_pages qo_indptr kv_indptr kv_indices kv_lens out lse "
            "partial_out partial_flags departures",
            i64="q_ckv_stride_token q_ckv_stride_head q_kpe_stride_token q_kpe_stride_head "
            "ckv_stride_page ckv_stride_token kpe_stride_page kpe_stride_token "
            "out_stride_token out_stride_head lse_stride_token lse_stride_head",
            i32="batch_size num_qo_heads",
            u32="heads_multiplier",
            i32_="heads_shift page_size",
            u32_="page_multiplier",
            i32__="page_shift num_pages table_row_stride num_table_entries split_shift max_splits reads_early "
            "window_left",
            f32="sm_scale logits_soft_cap",
        ),
        instances=_mla_instances,
        archs="sm_80",
    )
)

MLA_SM90_DECODE = register_kernel(
    dataclasses.replace(
        MLA_DECODE,
        name="mla_sm90",
        source="mla_sm90.cu",
        symbol="cupyattn::mla_sm90_kernel",
        template=("T", "kTileQ"),
        args=(*MLA_DECODE.args, KEY_MAPS),
        instances=_mla_sm90_instances,
        archs=("sm_90a",),
    )
)

MLA_CASCADE = register_kernel(_cascade(MLA_DECODE, _mla_cascade_instances))
MLA_SM90_CASCADE = register_kernel(_cascade(MLA_SM90_DECODE, _mla_sm90_instances))

MERGE_STATES = register_kernel(
    KernelSpec(
        name="merge_states",
        source="merge.cu",
        symbol="cupyattn::merge_states_kernel",
        template=("T", "kVec"),
        args=_args(
            ptr="first_out first_lse rest_out rest_lse out lse",
            i64="num_rows",
            i32="num_states head_dim",
            i64_="num_inner state_stride outer_stride out_outer_stride",
        ),
        instances=lambda arch: (
            (CUDA_TYPES[dtype], vec) for dtype in CUDA_TYPES for vec in (1, 4 if dtype == "float32" else 8)
        ),
        archs="sm_80",
    )
)

APPEND = register_kernel(
    KernelSpec(
        name="append",
        source="append.cu",
        symbol="cupyattn::append_kernel",
        template=("T",),
        args=_args(
            ptr="k v k_pages v_pages q q_out qo_indptr kv_indptr kv_indices kv_lens inv_freq",
            i64="k_in_stride_token k_in_stride_head v_in_stride_token v_in_stride_head "
            "k_stride_page k_stride_token k_stride_head v_stride_page v_stride_token v_stride_head "
            "q_stride_token q_stride_head q_out_stride_token q_out_stride_head",
            i32="batch_size num_kv_heads num_qo_heads head_dim v_head_dim page_size table_row_stride "
            "rotary_dim rope_mode",
        ),
        instances=lambda arch: ((CUDA_TYPES[dtype],) for dtype in DECODE_DTYPES),
        archs="sm_80",
    )
)
