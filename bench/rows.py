"""The rows: inputs, launches and a check for each configuration, on the device or (small ones) in NumPy.

All inputs are cut from one pool of random 16-bit floats that is filled anew for every row. Arrays are kept as
uint16 `*_bits` and viewed as bfloat16 or float16 where the library gets them: bits can be gathered, compared
and poisoned whatever an array package makes of bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

import cupyattn
from bench import peers, timing
from bench.configs import (
    CKV_DIM,
    FIXED_SPLIT_SIZE,
    GROUPS,
    HOST_KEY,
    KPE_DIM,
    AppendConfig,
    CascadeConfig,
    Config,
    DecodeConfig,
    MergeConfig,
    MLAConfig,
    PagedConfig,
    matmul_share,
    step_of,
)
from bench.timing import Launch, Problem, Roof, num_sets
from cupyattn import reference
from cupyattn.levels import CascadeLevels
from cupyattn.prefix import CascadeCost, PrefixLevels, PrefixTree

NAN_BITS = 0x7FFF  # a NaN in bfloat16 and in float16
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00}  # all ones: NaN or infinity
# Limits of ||out - ref|| / ||ref||, and of |out - ref| <= tol + tol * |ref| element by element.
_RELATIVE = {"bfloat16": 5e-3, "float16": 1e-3}
_ELEMENTWISE = {"bfloat16": 1e-2, "float16": 1e-3}
_MLA_RELATIVE = {"bfloat16": 3e-3, "float16": 1e-3}
MLA_SM_SCALE = 192**-0.5  # DeepSeek-V3: 128 + 64 dimensions a head before folding
_LONE_SET_BYTES = 10**10  # from here on, of one set the L2 can keep half a percent for the next launch


def require(condition: Any, message: str) -> None:
    """An assertion that `python -O` keeps: nothing is ever timed unchecked."""
    if not condition:
        raise AssertionError(message)


def to_float64(bits: Any, dtype: str) -> Any:
    """uint16 bit patterns to float64, without arithmetic in bfloat16."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def errors(out: Any, ref: Any, dtype: str, limits: Mapping[str, float] = _RELATIVE) -> dict[str, float]:
    """Relative and largest absolute error of float64 arrays; AssertionError beyond the limits or at a NaN."""
    difference = abs(out - ref)
    relative = float((difference**2).sum() ** 0.5 / (ref**2).sum() ** 0.5)
    tolerance = _ELEMENTWISE[dtype]
    require(
        relative <= limits[dtype],
        f"||out - ref|| / ||ref|| = {relative:.2e}, limit {limits[dtype]:.0e}",
    )
    require(
        (difference <= tolerance + tolerance * abs(ref)).all(), f"an element is off by more than {tolerance}"
    )
    return {"rel_err": relative, "max_err": float(difference.max())}


def worst(found: Iterable[dict[str, float]]) -> dict[str, float]:
    result: dict[str, float] = {}
    for one in found:
        result = {name: max(value, result.get(name, 0.0)) for name, value in one.items()}
    return {name: float(f"{value:.3g}") for name, value in result.items()}


def require_written(out_bits: Any, dtype: str) -> None:
    exponent = np.uint16(_EXPONENT[dtype])
    require(
        ((out_bits & exponent) != exponent).all(), "an output element is NaN, infinite or was never written"
    )


def attention(q: Any, k: Any, v: Any, sm_scale: float) -> Any:
    """Of float64 q [rows, dims] over k [keys, dims] and v [keys, ...]: the definition."""
    logits = q @ k.T * sm_scale
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights @ v / weights.sum(axis=1, keepdims=True)


def chosen_requests(config: PagedConfig) -> set[int]:
    """Those that are checked: the first, the last, the shortest and the longest, and of a cascade up to eight more."""
    step = step_of(config)
    lens = np.array(step.lens)
    chosen = {0, step.batch - 1, int(lens.argmin()), int(lens.argmax())}
    if isinstance(config, CascadeConfig):
        chosen.update(range(0, step.batch, -(-step.batch // 8)))
    return chosen


@dataclass(frozen=True)
class DecodeInputs:
    """What one decode row reads: `num_sets` equal problems, each with its own cache, q and page table."""

    config: DecodeConfig
    q_bits: Any  # [num_sets, batch, num_qo_heads, head_dim]
    k_bits: Any  # [num_sets, num_pages, ...], the rest in the configuration's layout
    v_bits: Any
    indptr: np.ndarray  # [batch + 1]
    indices: np.ndarray  # [num_sets, indptr[-1]], page ids within the set
    requests: set[int]  # that are checked

    @property
    def num_sets(self) -> int:
        return int(self.q_bits.shape[0])

    def as_dense(self, layout: str) -> DecodeInputs:
        """The same memory as dense K and V, [batch, num_kv_heads, ctx, head_dim] for HND: a page a request."""
        config = replace(self.config, page_size=self.config.lens[0], layout=layout)
        shape = (self.num_sets, config.batch, *config.page_shape)
        k_bits, v_bits = (
            x.reshape(-1)[: math.prod(shape)].reshape(shape) for x in (self.k_bits, self.v_bits)
        )
        pages = np.arange(config.batch + 1, dtype=np.int32)
        indices = np.tile(pages[:-1], (self.num_sets, 1))
        return replace(self, config=config, k_bits=k_bits, v_bits=v_bits, indptr=pages, indices=indices)

    def check(self, out_bits: Callable[[int], Any]) -> dict[str, float]:
        """Compares `out_bits(set)` of the first and last set with float64, for some requests and KV heads."""
        config = self.config
        found = []
        for one in {0, self.num_sets - 1}:
            out = out_bits(one)
            require_written(out, config.dtype)
            for request in self.requests:
                for head in {0, config.num_kv_heads - 1}:
                    rows = slice(head * config.group_size, (head + 1) * config.group_size)
                    ref = self._reference(one, request, head, self.q_bits[one, request, rows])
                    found.append(errors(to_float64(out[request, rows], config.dtype), ref, config.dtype))
        return worst(found)

    def _reference(self, one: int, request: int, head: int, q_bits: Any) -> Any:
        """Float64 attention of the query heads of one KV head: [group_size, head_dim]."""
        config = self.config
        pages = self.indices[one, self.indptr[request] : self.indptr[request + 1]]

        def tokens(cache_bits: Any) -> Any:
            of_head = cache_bits[one][:, :, head] if config.layout == "NHD" else cache_bits[one][:, head]
            gathered = of_head.take(type_as(of_head, pages), axis=0).reshape(-1, config.head_dim)
            return to_float64(gathered[: config.lens[request]], config.dtype)

        q = to_float64(q_bits, config.dtype)
        return attention(q, tokens(self.k_bits), tokens(self.v_bits), config.head_dim**-0.5)


def type_as(like: Any, host: np.ndarray) -> Any:
    """`host` where `like` lives."""
    return host if isinstance(like, np.ndarray) else timing.cupy.asarray(host)


def _numbers(one: PrefixLevels) -> list[Any]:
    """What stands in the arrays of its levels."""
    tables = [(pages.kv_indptr, pages.kv_indices, pages.kv_lens, qo) for pages, qo in one.levels.levels]
    arrays = [one.levels.q_indices, *(array for table in tables for array in table)]
    return [None if array is None else array.tolist() for array in arrays]


def _always(num_readers: int, num_tokens: int, num_qo_tokens: int) -> float:
    """For `PrefixTree.levels`: shares wherever two requests can."""
    return float((num_readers - 1) * num_tokens)


@dataclass(frozen=True)
class _Paged:
    """Of a step over paged keys: the launches' arguments, a set each, and what they have filled."""

    operands: list[tuple[Any, Any]]  # q and cache
    pages: Sequence[Any]
    options: list[dict[str, Any]]
    indptr: np.ndarray  # as of `DecodeInputs`
    indices: np.ndarray
    out_bits: Any
    check: Callable[[], dict[str, float]]

    def launches(
        self, call: Callable[..., Any], levels: Iterable[CascadeLevels] | None = None, **more: Any
    ) -> list[partial[Any]]:
        """Of each set; with its levels instead of its page table, if they are given."""
        tables = self.pages if levels is None else levels
        return [
            partial(call, *operands, table, **options, **more)
            for operands, table, options in zip(self.operands, tables, self.options, strict=True)
        ]

    def problem(self, config: PagedConfig, launches: Sequence[Launch], **more: Any) -> Problem:
        def poison() -> None:
            self.out_bits.fill(NAN_BITS)

        return Problem(config.key, config.num_bytes, config.flops, launches, poison, self.check, **more)


class Pool:
    """Random K and V for the rows of `configs`, on the device (`xp` is cupy) or in NumPy."""

    def __init__(self, xp: Any, configs: Iterable[Config], l2_bytes: int, seed: int, least: int = 0) -> None:
        self.xp, self.l2_bytes, self.seed = xp, l2_bytes, seed
        elements = max(self._elements(config) for config in configs)
        if xp is not np:  # two buffers of 16-bit elements take at most 80% of the free memory
            elements = min(elements, int(0.2 * xp.cuda.runtime.memGetInfo()[0]))
            self.kernels = timing.DeviceKernels()
        self.workspace = None if xp is np else cupyattn.decode_workspace()
        self.k_bits, self.v_bits = (xp.empty(max(elements, least), np.uint16) for _ in "kv")

    def _elements(self, config: Config) -> int:
        if isinstance(config, PagedConfig):
            return self._most_sets(config) * config.cache_elements
        sets = num_sets(config.num_bytes, self.l2_bytes)
        if isinstance(config, MergeConfig):
            return sets * config.num_states * config.state_elements
        per_request = math.ceil(sets * config.num_tokens / config.page_size) * config.page_size
        return config.batch * per_request * config.num_kv_heads * config.head_dim

    def fill(self, bits: Any, dtype: str) -> Any:
        """Fresh random numbers in `bits`, each call from the next seed; returns `bits`."""
        self.seed += 1
        if self.xp is np:
            bits[...] = (
                np.random.default_rng(self.seed).standard_normal(bits.shape).astype(_DTYPES[dtype]).view("u2")
            )
        else:
            self.kernels.fill_normal(bits, self.seed * 0x5851F42D4C957F2D % 2**64, dtype)
        return bits

    def _new(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self.fill(self.xp.empty(shape, np.uint16), dtype)

    def _cut(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
        """Fresh K and V of this shape from the head of the pool."""
        n = math.prod(shape)
        if n > self.k_bits.size:
            raise MemoryError(
                f"{4e-9 * n:.1f} GB of K and V, the pool holds {4e-9 * self.k_bits.size:.1f} GB"
            )
        k_bits, v_bits = (self.fill(x[:n], dtype).reshape(shape) for x in (self.k_bits, self.v_bits))
        return k_bits, v_bits

    def _permutations(self, count: int, n: int) -> np.ndarray:
        """[count, n] int32: page ids, shuffled, differently in each row."""
        rng = np.random.default_rng(self.seed)
        return rng.permuted(np.tile(np.arange(n, dtype=np.int32), (count, 1)), axis=1)

    def _most_sets(self, config: PagedConfig) -> int:
        return 1 if config.num_bytes >= _LONE_SET_BYTES else num_sets(config.num_bytes, self.l2_bytes)

    def _num_sets(self, config: PagedConfig) -> int:
        sets = self._most_sets(config)
        if sets == 2 and 2 * config.cache_elements > self.k_bits.size:
            return 1  # the largest rows: one set is already several times the L2
        return sets

    def _tables(
        self, config: PagedConfig, sets: int
    ) -> tuple[np.ndarray, np.ndarray, list[cupyattn.PageTable]]:
        """`indptr` and `indices` of `DecodeInputs`, and a table of its own for every set, so that a cold launch
        finds those in HBM too."""
        step, indices = step_of(config), self._permutations(sets, config.num_pages)
        if isinstance(config, CascadeConfig):
            indices = indices.take(config.page_numbers(), axis=1)  # in C order, as tables must be
        indptr = np.cumsum([0, *(math.ceil(n / step.page_size) for n in step.lens)], dtype=np.int32)
        lens = np.array(step.lens, np.int32)
        tables = [self.xp.asarray(x) for x in (np.tile(indptr, (sets, 1)), indices, np.tile(lens, (sets, 1)))]
        return indptr, indices, [cupyattn.PageTable(*(x[i] for x in tables)) for i in range(sets)]

    def problem(self, config: Config) -> tuple[Problem, DecodeInputs | None]:
        """The row's problem, and where peers can take part the inputs they shall read."""
        if isinstance(config, DecodeConfig):
            return self.decode(config)
        if isinstance(config, MLAConfig):
            return self.mla(config), None
        if isinstance(config, CascadeConfig):
            return self.cascade(config), None
        return (self.merge(config) if isinstance(config, MergeConfig) else self.append(config)), None

    def decode(self, config: DecodeConfig) -> tuple[Problem, DecodeInputs]:
        paged, inputs = self._paged_decode(config, config)
        launches = paged.launches(cupyattn.decode, workspace=self.workspace)
        # A further way to call decode is an entry here, and a column or a table in report.py.
        variants = {"pdl_us": [partial(launch, pdl=True) for launch in launches]}
        if config in GROUPS["invariant"]:
            fixed = {"fixed_split_size": FIXED_SPLIT_SIZE}
            workspace = None
            if self.xp is not np:
                (q, cache), pages = paged.operands[0], paged.pages[0]
                num_bytes = cupyattn.decode_workspace_bytes(q, cache, pages, **fixed)
                workspace = cupyattn.decode_workspace(num_bytes=num_bytes)
            variants["fixed_us"] = [partial(launch, workspace=workspace, **fixed) for launch in launches]
        return paged.problem(config, launches, variants=variants), inputs

    def mla(self, config: MLAConfig) -> Problem:
        paged = self._paged_mla(config, config)
        launches = paged.launches(cupyattn.mla_decode, workspace=self.workspace)
        variants = {"pdl_us": [partial(launch, pdl=True) for launch in launches]}
        return paged.problem(config, launches, variants=variants)

    def cascade(self, config: CascadeConfig) -> Problem:
        """The launches are those that the library chooses; beside them plain decode, and all that can be shared."""
        step = config.step
        plain: Callable[..., Any]
        if isinstance(step, DecodeConfig):
            plain, (paged, _) = cupyattn.decode, self._paged_decode(config, step)
            cost = CascadeCost.gqa(step.num_qo_heads, step.num_kv_heads, step.head_dim)
        else:
            require(step.num_query_tokens == 1, "a cascade's requests have one query token each")
            plain, paged = cupyattn.mla_decode, self._paged_mla(config, step)
            cost = CascadeCost.mla(step.num_heads)
        trees = []
        for indices in paged.indices:
            trees.append(tree := PrefixTree(step.page_size))
            for request, kv_len in enumerate(step.lens):
                tree.add(request, indices[paged.indptr[request] : paged.indptr[request + 1]], kv_len)
        auto, forced = (
            [tree.levels(choose=choose, xp=self.xp) for tree in trees] for choose in (cost, _always)
        )
        # Where all there is to share is chosen, both are the same launches: with equal arrays at other addresses, some
        # rows would take 6% more or less.
        are_equal = all(_numbers(a) == _numbers(b) for a, b in zip(auto, forced, strict=True))

        def launches(chosen: list[PrefixLevels]) -> list[partial[Any]]:
            levels, workspace = [one.levels for one in chosen], None
            if self.xp is not np:
                num_bytes = cupyattn.cascade_workspace_bytes(*paged.operands[0], levels[0])
                workspace = cupyattn.decode_workspace(num_bytes=num_bytes)
            return paged.launches(cupyattn.cascade_decode, levels, workspace=workspace)

        chosen = launches(auto)
        return paged.problem(
            config,
            chosen,
            variants={
                "plain_us": paged.launches(plain, workspace=self.workspace),
                "cascade_us": chosen if are_equal else launches(forced),
            },
            host={"levels_us": partial(trees[0].levels, choose=cost, xp=self.xp)},
            facts={
                "groups": [pages.batch_size for pages, _ in auto[0].levels.levels],
                "cascade_groups": [pages.batch_size for pages, _ in forced[0].levels.levels],
                "saving_us": round(auto[0].saving_us, 2),
            },
        )

    def _paged_decode(
        self, config: DecodeConfig | CascadeConfig, step: DecodeConfig
    ) -> tuple[_Paged, DecodeInputs]:
        """Of `step`, in the pages of `config`."""
        dtype, sets = _DTYPES[step.dtype], self._num_sets(config)
        k_bits, v_bits = self._cut((sets, config.num_pages, *step.page_shape), step.dtype)
        q_bits = self._new((sets, step.batch, step.num_qo_heads, step.head_dim), step.dtype)
        out_bits = self.xp.empty_like(q_bits)
        indptr, indices, pages = self._tables(config, sets)
        inputs = DecodeInputs(step, q_bits, k_bits, v_bits, indptr, indices, chosen_requests(config))
        q, out, k, v = (x.view(dtype) for x in (q_bits, out_bits, k_bits, v_bits))
        paged = _Paged(
            operands=[(q[i], cupyattn.PagedKVCache(k[i], v[i], layout=step.layout)) for i in range(sets)],
            pages=pages,
            options=[{"sm_scale": step.head_dim**-0.5, "out": out[i]} for i in range(sets)],
            indptr=indptr,
            indices=indices,
            out_bits=out_bits,
            check=lambda: inputs.check(lambda i: out_bits[i]),
        )
        return paged, inputs

    def _paged_mla(self, config: MLAConfig | CascadeConfig, step: MLAConfig) -> _Paged:
        """Of `step`, in the pages of `config`."""
        xp, dtype, sq = self.xp, _DTYPES[step.dtype], step.num_query_tokens
        sets = self._num_sets(config)
        row_dim = CKV_DIM + KPE_DIM
        rows_bits, _ = self._cut((sets, config.num_pages, step.page_size, row_dim), step.dtype)
        q_bits = self._new((sets, step.batch * sq, step.num_heads, row_dim), step.dtype)
        out_bits = xp.empty((*q_bits.shape[:3], CKV_DIM), np.uint16)
        indptr, indices, pages = self._tables(config, sets)
        q, out, rows = (x.view(dtype) for x in (q_bits, out_bits, rows_bits))
        options: list[dict[str, Any]] = [{"sm_scale": MLA_SM_SCALE, "out": out[i]} for i in range(sets)]
        if sq > 1:
            offsets = sq * np.arange(step.batch + 1, dtype=np.int32)
            for one, qo_indptr in zip(options, xp.asarray(np.tile(offsets, (sets, 1))), strict=True):
                one["qo_indptr"] = qo_indptr

        def check() -> dict[str, float]:
            found = []
            for one in {0, sets - 1}:
                require_written(out_bits[one], step.dtype)
                for request in chosen_requests(config):
                    ids = type_as(rows_bits, indices[one, indptr[request] : indptr[request + 1]])
                    gathered = rows_bits[one].take(ids, axis=0).reshape(-1, row_dim)
                    keys = to_float64(gathered[: step.lens[request]], step.dtype)
                    for i in range(sq):
                        token, seen = request * sq + i, keys[: step.lens[request] - (sq - 1 - i)]
                        query = to_float64(q_bits[one, token], step.dtype)
                        ref = attention(query, seen, seen[:, :CKV_DIM], MLA_SM_SCALE)
                        result = to_float64(out_bits[one, token], step.dtype)
                        found.append(errors(result, ref, step.dtype, _MLA_RELATIVE))
            return worst(found)

        operands = [(q[i], cupyattn.PagedMLACache.from_concatenated(rows[i])) for i in range(sets)]
        return _Paged(operands, pages, options, indptr, indices, out_bits, check)

    def merge(self, config: MergeConfig) -> Problem:
        xp, dtype = self.xp, _DTYPES[config.dtype]
        sets = num_sets(config.num_bytes, self.l2_bytes)
        rows = (config.num_rows, config.num_heads)
        states, _ = self._cut((sets, config.num_states, *rows, config.head_dim), config.dtype)
        rng = np.random.default_rng(self.seed)
        lse = xp.asarray(rng.normal(5.0, 2.0, (sets, config.num_states, *rows)).astype(np.float32))
        out_bits = xp.empty((sets, *rows, config.head_dim), np.uint16)
        out_lse = xp.empty((sets, *rows), np.float32)
        launches = [
            partial(
                cupyattn.merge_states,
                states[i].view(dtype),
                lse[i],
                0,
                into=(out_bits[i].view(dtype), out_lse[i]),
            )
            for i in range(sets)
        ]

        def poison() -> None:
            out_bits.fill(NAN_BITS)
            out_lse.fill(np.nan)

        def check() -> dict[str, float]:
            require_written(out_bits, config.dtype)
            found = []
            for i in {0, sets - 1}:
                lse64 = lse[i].astype(np.float64)
                largest = lse64.max(axis=0)
                weights = np.exp(lse64 - largest)
                total = weights.sum(axis=0)
                ref = (weights[..., None] * to_float64(states[i], config.dtype)).sum(axis=0) / total[
                    ..., None
                ]
                found.append(errors(to_float64(out_bits[i], config.dtype), ref, config.dtype))
                lse_error = float(abs(out_lse[i] - largest - np.log(total)).max())
                require(lse_error <= 1e-3, f"lse is off by {lse_error:.1e}")
            return worst(found)

        return Problem(config.key, config.num_bytes, config.flops, launches, poison, check)

    def append(self, config: AppendConfig) -> Problem:
        """Set `i` appends tokens i * num_tokens .. of every request to one cache: every set has its slots."""
        xp, dtype, step = self.xp, _DTYPES[config.dtype], config.num_tokens
        sets = num_sets(config.num_bytes, self.l2_bytes)
        pages_each = math.ceil(sets * step / config.page_size)
        head = (config.num_kv_heads, config.head_dim)
        k_bits, v_bits = self._cut((config.batch * pages_each, config.page_size, *head), config.dtype)
        new = [self._new((sets, config.batch * step, *head), config.dtype) for _ in "kv"]
        indptr = np.arange(config.batch + 1, dtype=np.int32)
        page_ids = self._permutations(1, config.batch * pages_each)[0]
        indptr_pages, indices, qo_indptr = (
            xp.asarray(x) for x in (indptr * pages_each, page_ids, indptr * step)
        )
        lens = xp.asarray(
            np.int32(step) * np.arange(1, sets + 1, dtype=np.int32)[:, None].repeat(config.batch, 1)
        )
        cache = cupyattn.PagedKVCache(k_bits.view(dtype), v_bits.view(dtype))
        rope = cupyattn.Rope() if config.rope else None
        launches = [
            partial(cupyattn.append, new[0][i].view(dtype), new[1][i].view(dtype), cache,
                    cupyattn.PageTable(indptr_pages, indices, lens[i]), qo_indptr=qo_indptr, rope=rope)
            for i in range(sets)
        ]  # fmt: skip

        def poison() -> None:
            k_bits.fill(NAN_BITS)
            v_bits.fill(NAN_BITS)

        def host(bits: Any) -> Any:
            return bits if xp is np else timing.cupy.asnumpy(bits)

        def check() -> dict[str, float]:
            found = []
            for request in {0, config.batch - 1}:
                ids = type_as(k_bits, page_ids[request * pages_each : (request + 1) * pages_each])
                k_row, v_row = (host(x.take(ids, axis=0)).reshape(-1, *head) for x in (k_bits, v_bits))
                for i in {0, sets - 1}:
                    slots, rows = slice(i * step, (i + 1) * step), slice(request * step, (request + 1) * step)
                    k_new, v_new = host(new[0][i, rows]), host(new[1][i, rows])
                    require(np.array_equal(v_row[slots], v_new), "V is not what was appended")
                    ref = to_float64(k_new, config.dtype)
                    if rope is not None:
                        ref = reference.apply_rope(ref, np.arange(slots.start, slots.stop), rope)
                    found.append(errors(to_float64(k_row[slots], config.dtype), ref, config.dtype))
            return worst(found)

        return Problem(config.key, config.num_bytes, config.flops, launches, poison, check)


class Bench:
    """One run on the current device: its roofs, its data, and a row for each configuration."""

    def __init__(self, configs: Iterable[Config], seed: int, with_peers: bool = True) -> None:
        self.environment = timing.environment()
        self.runner = timing.CupyRunner()
        self.pool = Pool(timing.cupy, configs, self.environment["l2_bytes"], seed, least=1 << 30)
        self.pool.fill(self.pool.k_bits[: 1 << 30], "bfloat16")
        timing.cupy.cuda.Device().synchronize()
        read_gbs = timing.read_roof_gbs(self.pool.kernels, self.pool.k_bits[: 1 << 30], self.runner)
        self.roof = Roof(round(read_gbs, 1), round(timing.matmul_tflops(self.runner.stream), 1))
        self._peers = peers.Peers(self.runner.stream) if with_peers else None

    @property
    def peer_versions(self) -> dict[str, str]:
        return self._peers.versions if self._peers else {}

    def row(self, config: Config) -> dict[str, Any]:
        """Checks and times one configuration, peers beside it. AssertionError where our result is wrong."""
        problem, inputs = self.pool.problem(config)
        timing.cupy.cuda.Device().synchronize()  # inputs were made on the default stream
        figures = timing.measure(problem, self.runner)
        if config.key == HOST_KEY:
            with self.runner.current():
                quietest, median = timing.host_us(problem.launches, self.runner.stream, calls=200)
            figures |= {"host_us": round(quietest, 2), "median_host_us": round(median, 2)}
        floor_us = self.roof.floor_us(problem.num_bytes, problem.flops, matmul_share(config))
        row = {
            "key": config.key,
            "num_bytes": problem.num_bytes,
            "flops": problem.flops,
            **problem.facts,
            **figures,
            "of_roof": round(figures["gbs"] / self.roof.read_gbs, 4),
            "floor_us": round(floor_us, 2),
            "over_floor": round(figures["cold_us"] / floor_us, 3),
        }
        if inputs is not None and self._peers is not None:
            row["peers"] = self._peers.time(inputs)
        timing.cupy.get_default_memory_pool().free_all_blocks()
        return row
