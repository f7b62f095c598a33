"""The named configurations that are measured, and the bytes and operations each of them needs.

A key says everything about a row: batch, KV length (or the name of a ragged mix), query/KV heads, head_dim
and page size, then layout and dtype where they are not NHD and bfloat16. MLA has (query) heads h and query tokens
sq instead. A cascade's key ends with the tokens that all its requests share, or, for a moment of a trace, with the
thousands of tokens in all and of different ones. Peers' figures have the same keys.

`GROUPS` names what is measured together; a row may stand in several. `GRID` is all of them, each row once.
"""

from __future__ import annotations

import csv
import functools
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

AZURE, MOONCAKE, TOOLAGENT = "azure_llm_conv_2023", "mooncake_conversation", "mooncake_toolagent"
BLOCK_SIZE = 512  # tokens of a block of Mooncake's traces
TRACES = Path(__file__).resolve().parent / "traces"
MB = 10**6
MIB = 1 << 20
ITEMSIZE = 2  # bfloat16 and float16
FIXED_SPLIT_SIZE = 2048  # tokens, where the batch-invariant mode is timed
CKV_DIM, KPE_DIM = 512, 64  # of MLA, as DeepSeek has it
MOST_BYTES = 60 * 10**9  # of the keys and values of a row: what a GPU of 80 GB has room for
_SUFFIX = {"bfloat16": "", "float16": " fp16"}


class _Requests:
    """What the steps over a paged cache have in common."""

    lens: tuple[int, ...]
    page_size: int

    @property
    def page_elements(self) -> int:
        """Numbers of one page (of K, and as many of V; or of latent rows)."""
        raise NotImplementedError

    @property
    def batch(self) -> int:
        return len(self.lens)

    @property
    def equal_lens(self) -> bool:
        return len(set(self.lens)) == 1

    @property
    def num_pages(self) -> int:
        return sum(math.ceil(n / self.page_size) for n in self.lens)

    @property
    def cache_elements(self) -> int:
        """Numbers in whole pages (of K, and as many of V; or of latent rows): what must be allocated."""
        return self.num_pages * self.page_elements


@dataclass(frozen=True)
class DecodeConfig(_Requests):
    """One decode step: a query token for each request over its paged cache.

    `lens_name` replaces `ctxN` in the key of a ragged batch; an equal batch leaves it empty. `name` replaces
    the whole key, where peers' figures have one of another form (traces: head_dim 128, pages of 16).
    """

    lens: tuple[int, ...]
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int = 128
    page_size: int = 16
    layout: str = "NHD"
    dtype: str = "bfloat16"
    lens_name: str = ""
    name: str = ""

    @property
    def key(self) -> str:
        if self.name:
            return self.name
        name = self.lens_name or f"ctx{self.lens[0]}"
        layout = "" if self.layout == "NHD" else f" {self.layout}"
        shape = f"{self.heads} d{self.head_dim} p{self.page_size}"
        return f"b{self.batch} {name} {shape}{layout}{_SUFFIX[self.dtype]}"

    @property
    def heads(self) -> str:
        return f"{self.num_qo_heads}q/{self.num_kv_heads}kv"

    @property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """One page of K (or V)."""
        if self.layout == "NHD":
            return self.page_size, self.num_kv_heads, self.head_dim
        return self.num_kv_heads, self.page_size, self.head_dim

    @property
    def page_elements(self) -> int:
        return math.prod(self.page_shape)

    @property
    def token_bytes(self) -> int:
        """Bytes of the K and V of a token."""
        return 2 * self.num_kv_heads * self.head_dim * ITEMSIZE

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that the step must read: tokens in use, not whole pages."""
        return sum(self.lens) * self.token_bytes

    @property
    def num_bytes(self) -> int:
        """K, V and q read once, out written once. The page table is a cost of paging and is not counted,
        so that the floor is the one a dense, contiguous cache would have."""
        return self.kv_bytes + 2 * self.batch * self.num_qo_heads * self.head_dim * ITEMSIZE

    @property
    def flops(self) -> int:
        """A multiply and an add per element of K for q.k, and as much of V for the weighted sum."""
        return 4 * sum(self.lens) * self.num_qo_heads * self.head_dim


@dataclass(frozen=True)
class MLAConfig(_Requests):
    """One MLA decode step: each request's `num_query_tokens` newest tokens (causal) over its latent rows.

    `lens` counts those tokens too. `lens_name` is as for `DecodeConfig`.
    """

    lens: tuple[int, ...]
    num_heads: int
    num_query_tokens: int = 1
    page_size: int = 64
    dtype: str = "bfloat16"
    lens_name: str = ""

    @property
    def key(self) -> str:
        name = self.lens_name or f"ctx{self.lens[0]}"
        shape = f"{self.heads} sq{self.num_query_tokens} p{self.page_size}"
        return f"b{self.batch} {name} {shape}{_SUFFIX[self.dtype]}"

    @property
    def heads(self) -> str:
        return f"h{self.num_heads}"

    @property
    def num_rows(self) -> int:
        """Query rows of a request: all read the same keys."""
        return self.num_heads * self.num_query_tokens

    @property
    def page_elements(self) -> int:
        return self.page_size * (CKV_DIM + KPE_DIM)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's latent row."""
        return (CKV_DIM + KPE_DIM) * ITEMSIZE

    @property
    def num_bytes(self) -> int:
        """Latent rows (of tokens in use) and q read once, out written once; no page table, as for decode."""
        q_and_out = self.batch * self.num_rows * (2 * CKV_DIM + KPE_DIM) * ITEMSIZE
        return sum(self.lens) * self.token_bytes + q_and_out

    @property
    def flops(self) -> int:
        """A multiply and an add per number of a key for q.k, and of ckv again for the weighted sum.

        Token t of a request's sq sees all keys but the sq - 1 - t that come after it.
        """
        sq = self.num_query_tokens
        pairs = sum(sq * n - sq * (sq - 1) // 2 for n in self.lens)
        return 2 * self.num_heads * pairs * (2 * CKV_DIM + KPE_DIM)


@dataclass(frozen=True)
class CascadeConfig:
    """One step, MLA or not, of requests that begin with the same blocks of tokens: the same pages.

    `blocks` numbers the leading blocks of each request, of `block_size` tokens; blocks of the same number are the same.
    What lies behind them is the request's own. `moment` names the trace and its row, if it is of one.
    """

    step: DecodeConfig | MLAConfig  # the same step, if all pages were a request's own
    blocks: tuple[tuple[int, ...], ...]
    block_size: int
    moment: str = ""

    @property
    def key(self) -> str:
        if not self.moment:
            return f"{self.step.key} shared{self.block_size}"
        tokens = sum(self.step.lens)
        name = f"{self.moment} b{self.step.batch} {self.step.heads}"
        return f"{name} sum{tokens // 1000}k uniq{(tokens - self.repeated_tokens) // 1000}k"

    @property
    def repeated_tokens(self) -> int:
        """Tokens that another request has, too, counted each time but the first."""
        numbers = [number for blocks in self.blocks for number in blocks]
        return self.block_size * (len(numbers) - len(set(numbers)))

    @property
    def num_pages(self) -> int:
        return self.step.num_pages - self.repeated_tokens // self.step.page_size

    @property
    def cache_elements(self) -> int:
        """As for the step: what must be allocated."""
        return self.num_pages * self.step.page_elements

    def page_numbers(self) -> list[int]:
        """The pages of one request after the other, numbered from 0 as they come first."""
        page_size = self.step.page_size
        block_pages = self.block_size // page_size
        numbers: list[int] = []
        first_page: dict[int, int] = {}
        end = 0
        for tokens, blocks in zip(self.step.lens, self.blocks, strict=True):
            for block in blocks:
                first = first_page.setdefault(block, end)
                end = max(end, first + block_pages)
                numbers += range(first, first + block_pages)
            own = math.ceil(tokens / page_size) - len(blocks) * block_pages
            numbers += range(end, end + own)
            end += own
        return numbers

    @property
    def num_bytes(self) -> int:
        """Different keys and values, and q, read once; out written once."""
        return self.step.num_bytes - self.repeated_tokens * self.step.token_bytes

    @property
    def flops(self) -> int:
        """Sharing saves none."""
        return self.step.flops


@dataclass(frozen=True)
class MergeConfig:
    """`merge_states` of `num_states` states of `num_rows` query tokens."""

    num_states: int
    num_rows: int
    num_heads: int
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def key(self) -> str:
        shape = f"n{self.num_states} b{self.num_rows} {self.num_heads}h d{self.head_dim}"
        return f"merge {shape}{_SUFFIX[self.dtype]}"

    @property
    def state_elements(self) -> int:
        return self.num_rows * self.num_heads * self.head_dim

    @property
    def num_bytes(self) -> int:
        state = self.state_elements * ITEMSIZE + self.num_rows * self.num_heads * 4
        return (self.num_states + 1) * state

    @property
    def flops(self) -> int:
        return 2 * self.num_states * self.state_elements


@dataclass(frozen=True)
class AppendConfig:
    """`append` of `num_tokens` new tokens to each of `batch` requests, with or without rotating K."""

    batch: int
    num_tokens: int
    num_kv_heads: int
    head_dim: int = 128
    page_size: int = 16
    rope: bool = False
    dtype: str = "bfloat16"

    @property
    def key(self) -> str:
        shape = f"b{self.batch} t{self.num_tokens} {self.num_kv_heads}kv d{self.head_dim} p{self.page_size}"
        return f"append {shape}{' rope' if self.rope else ''}{_SUFFIX[self.dtype]}"

    @property
    def new_elements(self) -> int:
        """Elements of K (and as many of V) that are appended."""
        return self.batch * self.num_tokens * self.num_kv_heads * self.head_dim

    @property
    def num_bytes(self) -> int:
        return 4 * self.new_elements * ITEMSIZE  # K and V, each read and written

    @property
    def flops(self) -> int:
        return 3 * self.new_elements if self.rope else 0


def equal(batch: int, ctx: int, qo: int, kv: int, head_dim: int = 128, page_size: int = 16,
          layout: str = "NHD", dtype: str = "bfloat16") -> DecodeConfig:  # fmt: skip
    return DecodeConfig((ctx,) * batch, qo, kv, head_dim, page_size, layout, dtype)


def lognormal_lens(batch: int, median: int, sigma: float = 1.0) -> tuple[int, ...]:
    """The `batch` mid-quantiles of a log-normal distribution, in one shuffled order: no sampling noise."""
    normal = NormalDist()
    lens = [round(median * math.exp(sigma * normal.inv_cdf((i + 0.5) / batch))) for i in range(batch)]
    random.Random(0).shuffle(lens)
    return tuple(lens)


def ragged(name: str, lens: tuple[int, ...], qo: int, kv: int, head_dim: int = 128) -> DecodeConfig:
    return DecodeConfig(lens, qo, kv, head_dim, lens_name=name)


class _Request(NamedTuple):
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]  # its leading ones that others have, too


@functools.cache
def _requests(trace: str) -> dict[int, _Request]:
    """By row of the original trace, those that the sample holds."""
    with (TRACES / f"{trace}.csv").open(encoding="utf-8", newline="") as file:
        return {
            int(row["row"]): _Request(
                int(row["input_tokens"]),
                int(row["output_tokens"]),
                tuple(map(int, row.get("blocks", "").split())),
            )
            for row in csv.DictReader(file)
        }


def running_lens(trace: str, start: int, batch: int) -> tuple[int, ...]:
    """Lengths of `batch` consecutive requests that run together, each part-way through its output."""
    progress = random.Random(0)
    requests = (_requests(trace)[row] for row in range(start, start + batch))
    return tuple(r.input_tokens + int(progress.random() * r.output_tokens) for r in requests)


def running_blocks(trace: str, start: int, batch: int) -> tuple[tuple[int, ...], ...]:
    """Blocks that these requests may share: the last block of a prompt is its own, even if it is full."""
    requests = (_requests(trace)[row] for row in range(start, start + batch))
    return tuple(r.blocks[: (r.input_tokens - 1) // BLOCK_SIZE] for r in requests)


def running(trace: str, start: int, batch: int, qo: int, kv: int) -> DecodeConfig:
    """A moment of a trace, every request with pages of its own: prefixes that requests share are not shared.

    The Azure trace knows no prefixes: peers' keys say so with as many unique tokens as there are in all.
    """
    lens = running_lens(trace, start, batch)
    tokens = f"{sum(lens) // 1000}k"
    sharing = f"uniq{tokens}" if trace == AZURE else "unshared"
    name = f"{trace[:18]}@{start} b{batch} {qo}q/{kv}kv sum{tokens} {sharing}"
    return DecodeConfig(lens, qo, kv, name=name)


def _earlier_rows() -> list[DecodeConfig]:
    """Rows with earlier figures of peers: three group sizes, and page size 1."""
    mqa = [(1, 1024), (1, 131072), (8, 1024), (8, 8192), (64, 8192), (256, 2048)]
    wide = [(1, 1024), (1, 8192), (1, 131072), (8, 1024), (8, 8192), (64, 1024), (64, 8192), (256, 2048)]
    rows = [equal(b, n, 8, 1) for b, n in mqa]
    rows += [equal(b, n, 32, kv) for kv in (8, 32) for b, n in wide]
    return [*rows, equal(64, 4096, 32, 8, page_size=1)]


def _shape_rows() -> list[DecodeConfig]:
    """Batches and lengths in between, and every head_dim with every group size, small and large."""
    return [
        equal(1, 512, 32, 8),
        equal(16, 512, 8, 1),
        equal(256, 512, 32, 8),
        equal(4, 16384, 8, 1),
        equal(2, 32768, 32, 8),
        equal(32, 2048, 32, 8),
        equal(128, 4096, 8, 1),
        # 64q/8kv d64 is gpt-oss, 14q/2kv d64 is Qwen2 0.5B.
        equal(1, 1024, 32, 8, head_dim=64),
        equal(8, 8192, 32, 8, head_dim=64),
        equal(64, 4096, 32, 8, head_dim=64),
        equal(64, 4096, 64, 8, head_dim=64),
        equal(64, 2048, 14, 2, head_dim=64),
        equal(8, 1024, 32, 32, head_dim=64),
        equal(1, 131072, 16, 1, head_dim=64),
        # 4q/1kv d256 is Gemma 3 270M, 16q/8kv d256 is Gemma 3 12B, 8q/1kv and 16q/16kv d256 are Gemma 2B and 7B.
        equal(1, 1024, 4, 1, head_dim=256),
        equal(8, 8192, 16, 8, head_dim=256),
        equal(64, 2048, 8, 4, head_dim=256),
        equal(8, 1024, 8, 1, head_dim=256),
        equal(64, 1024, 16, 16, head_dim=256),
        equal(8, 8192, 28, 4, head_dim=256),
        equal(64, 4096, 16, 1, head_dim=256),
        # Group sizes that are no power of two, group 16 with many KV heads, and the other dtype.
        equal(1, 1024, 28, 4),
        equal(8, 8192, 28, 4),
        equal(64, 4096, 28, 4),
        equal(64, 2048, 40, 8),
        equal(8, 1024, 32, 2),
        equal(64, 8192, 32, 2),
        equal(64, 4096, 32, 8, dtype="float16"),
    ]


def _twin_rows() -> list[DecodeConfig]:
    """Page sizes and layouts, each with the row that it is compared with: see `rules`."""
    large, small = equal(64, 4096, 32, 8), equal(8, 1024, 32, 8)
    others = [
        equal(64, 4096, 16, 1),
        equal(64, 4096, 32, 8, head_dim=64),
        equal(8, 8192, 16, 8, head_dim=256),
    ]
    rows = [replace(row, page_size=size) for row in (large, small, *others) for size in (1, 64)]
    rows += [twin for row in (large, small) for twin in (row, replace(row, layout="HND"))]
    return [*rows, *(replace(row, layout="HND") for row in others[1:])]


def _ragged_rows() -> list[DecodeConfig]:
    """One long request among short ones, and log-normal lengths."""
    one_long = (256,) * 7 + (65536,) + (256,) * 8
    return [
        ragged("65536+15x256", one_long, 8, 1),
        ragged("65536+15x256", one_long, 32, 8),
        ragged("65536+15x256", one_long, 32, 32),
        ragged("lognormal2048", lognormal_lens(64, 2048), 32, 8),
        ragged("lognormal2048", lognormal_lens(64, 2048), 28, 4),
        ragged("lognormal2048", lognormal_lens(64, 2048), 32, 8, head_dim=64),
        ragged("lognormal2048", lognormal_lens(64, 2048), 16, 8, head_dim=256),
        ragged("lognormal2048", lognormal_lens(256, 2048), 8, 1),
        ragged("lognormal1024", lognormal_lens(32, 1024), 64, 1),
    ]


def _xformers_rows() -> list[DecodeConfig]:
    """The grid of xformers' benchmark_attn_decoding.py: 16 query heads, 65536 tokens in all."""
    lens = [256 << i for i in range(10)]
    return [equal(max(1, 65536 // n), n, 16, kv) for kv in (1, 2) for n in lens]


def _heads_rows() -> list[DecodeConfig]:
    """LLaMA-7B's 32 query heads over 32 (MHA), 8 (GQA) and 1 (MQA) KV heads."""
    return [equal(b, n, 32, kv) for b in (1, 8, 64) for n in (1024, 8192) for kv in (32, 8, 1)]


def _trace_rows() -> list[DecodeConfig]:
    """Two moments of two traces, in the shapes of Llama 3 8B, Llama 3 70B on 8 GPUs, and Qwen2 7B."""
    moments = [(trace, *moment) for trace in (AZURE, MOONCAKE) for moment in ((100, 32), (700, 128))]
    return [running(*moment, *heads) for moment in moments for heads in ((32, 8), (8, 1), (28, 4))]


def _invariant_rows() -> list[DecodeConfig]:
    """Rows that are timed in the batch-invariant mode too: one request, few, many, and many of unequal lengths."""
    equal_rows = [equal(1, 8192, 8, 1), equal(8, 8192, 32, 8), equal(64, 8192, 32, 8)]
    return [*equal_rows, ragged("lognormal2048", lognormal_lens(64, 2048), 32, 8)]


def mla(batch: int, ctx: int, heads: int, num_query_tokens: int = 1, page_size: int = 64) -> MLAConfig:
    return MLAConfig((ctx,) * batch, heads, num_query_tokens, page_size)


#: One long request among short ones, of which a rule speaks.
MLA_SKEWED = MLAConfig((1024,) * 7 + (32768,) + (1024,) * 8, 128, lens_name="32768+15x1024")


def _mla_rows() -> list[MLAConfig]:
    """Rows with earlier figures of peers, twins of page size 1, one long request among short ones, log-normal lengths.

    16, 64 and 128 heads are DeepSeek-V3's on 8, 2 and 1 GPUs.
    """
    shapes = [(1, 4096), (1, 65536), (32, 4096), (128, 4096), (128, 8192)]
    rows = [mla(b, n, heads) for heads in (16, 64, 128) for b, n in shapes]
    rows += [mla(32, 8192, 128, num_query_tokens=2), mla(8, 8192, 16)]
    twins = [(1, 65536, 16), (8, 8192, 16), (32, 4096, 64), (128, 4096, 16), (128, 4096, 128)]
    rows += [mla(*shape, page_size=1) for shape in twins]
    rows.append(MLA_SKEWED)
    # Of the first there are too many for each group to start a run.
    for batch, median in ((64, 2048), (16, 1024)):
        spread, name = lognormal_lens(batch, median), f"lognormal{median}"
        rows += [MLAConfig(spread, heads, lens_name=name) for heads in (16, 64, 128)]
    return rows


def sharing(step: DecodeConfig | MLAConfig, num_shared: int) -> CascadeConfig:
    """All requests begin with the same `num_shared` tokens."""
    return CascadeConfig(step, ((0,),) * step.batch, num_shared)


def running_sharing(trace: str, start: int, step: DecodeConfig | MLAConfig) -> CascadeConfig:
    """A moment of a trace, in the shape of `step` (whose lengths are those of `running_lens`)."""
    blocks = running_blocks(trace, start, step.batch)
    return CascadeConfig(step, blocks, BLOCK_SIZE, f"{trace[:18]}@{start}")


def _cascade_rows() -> list[CascadeConfig]:
    """One prefix for all, with earlier figures of peers, limits, or suffixes that differ; and moments of two traces.

    These are in the shapes of Llama 3 70B on 8 GPUs and Llama 3 8B, with 32 KV heads (as far as memory goes), and of
    DeepSeek-V3 on 8 GPUs and on one.
    """
    prefixes = [(8, 4000, 128), (64, 8192, 256), (256, 2048, 128)]
    rows = [sharing(equal(b, n + own, 8, kv), n) for kv in (1, 8) for b, n, own in prefixes]
    rows += [
        sharing(equal(8, 4128, 32, 8), 4000),
        sharing(mla(128, 8704, 16), 8192),
        sharing(mla(32, 4352, 128), 4096),
    ]
    spread = tuple(2048 + n for n in lognormal_lens(256, 128))
    rows += [sharing(ragged("2048+lognormal128", spread, 8, kv), 2048) for kv in (1, 8)]
    moments = [(TOOLAGENT, 0, 93), (MOONCAKE, 100, 32), (MOONCAKE, 700, 128), (MOONCAKE, 3000, 512)]
    for trace, start, batch in moments:
        lens = running_lens(trace, start, batch)
        heads = ((8, 1), (32, 8), (32, 32))
        steps: list[DecodeConfig | MLAConfig] = [DecodeConfig(lens, qo, kv) for qo, kv in heads]
        steps += [MLAConfig(lens, num_heads) for num_heads in (16, 128)]
        rows += [running_sharing(trace, start, step) for step in steps]
    return [row for row in rows if row.num_bytes <= MOST_BYTES]


PagedConfig = DecodeConfig | MLAConfig | CascadeConfig
Config = PagedConfig | MergeConfig | AppendConfig
GROUPS: dict[str, tuple[Config, ...]] = {
    "decode": tuple(dict.fromkeys(_earlier_rows() + _shape_rows() + _twin_rows() + _ragged_rows())),
    "xformers": tuple(_xformers_rows()),
    "trace": tuple(_trace_rows()),
    "heads": tuple(_heads_rows()),
    "invariant": tuple(_invariant_rows()),
    "mla": tuple(_mla_rows()),
    "cascade": tuple(_cascade_rows()),
    "merge": (MergeConfig(2, 64, 32), MergeConfig(8, 256, 32), MergeConfig(2, 128, 128, head_dim=512)),
    "append": (AppendConfig(64, 1, 8), AppendConfig(64, 1, 8, rope=True), AppendConfig(64, 64, 8, rope=True)),
}
GRID: tuple[Config, ...] = tuple(dict.fromkeys(config for group in GROUPS.values() for config in group))
DECODE_GRID = tuple(config for config in GRID if isinstance(config, DecodeConfig))
MLA_GRID = tuple(config for config in GRID if isinstance(config, MLAConfig))
CASCADE_GRID = tuple(config for config in GRID if isinstance(config, CascadeConfig))
PAGED_GRID: tuple[PagedConfig, ...] = (*DECODE_GRID, *MLA_GRID, *CASCADE_GRID)

# A minute's look: one row for each rule that is judged, and one of every kind of input.
QUICK_KEYS = frozenset({
    "b1 ctx1024 8q/1kv d128 p16",
    "b1 ctx1024 32q/8kv d128 p16",
    "b8 ctx1024 32q/8kv d128 p16",
    "b8 ctx1024 32q/8kv d128 p16 HND",
    "b64 ctx8192 8q/1kv d128 p16",
    "b64 ctx1024 32q/8kv d128 p16",
    "b64 ctx1024 32q/32kv d128 p16",
    "b64 ctx4096 32q/8kv d128 p1",
    "b64 ctx4096 32q/8kv d128 p64",
    "b1 ctx131072 16q/1kv d128 p16",
    "b8 ctx8192 16q/8kv d256 p16",
    "b16 65536+15x256 32q/8kv d128 p16",
    "azure_llm_conv_202@100 b32 8q/1kv sum42k uniq42k",
    "b32 ctx4096 h64 sq1 p64",
    "b32 ctx4096 h64 sq1 p1",
    "b32 ctx4096 h128 sq1 p64",
    "b32 ctx8192 h128 sq2 p64",
    "b16 32768+15x1024 h128 sq1 p64",
    "b8 ctx4128 8q/1kv d128 p16 shared4000",
    "b128 ctx8704 h16 sq1 p64 shared8192",
    "mooncake_toolagent@0 b93 8q/1kv sum727k uniq465k",
    "mooncake_conversat@100 b32 8q/1kv sum418k uniq402k",
    "merge n8 b256 32h d128",
    "append b64 t1 8kv d128 p16 rope",
})  # fmt: skip
# The row whose host time is read: so small that a call's own work is all of it.
HOST_KEY = "b1 ctx1024 8q/1kv d128 p16"


def step_of(config: PagedConfig) -> DecodeConfig | MLAConfig:
    """What its requests do, whatever they share."""
    return config.step if isinstance(config, CascadeConfig) else config


def matmul_share(config: Config) -> float:
    """Part of the matrix product's rate that the floor counts on."""
    return 0.5 if isinstance(config, CascadeConfig) else 1.0


def is_large(config: DecodeConfig) -> bool:
    """The problems whose bandwidth is promised: bf16, head_dim 128, groups 1, 4, 8, >= 256 MiB of KV."""
    promised = config.dtype == "bfloat16" and config.head_dim == 128 and config.group_size in (1, 4, 8)
    return promised and config.kv_bytes >= 256 * MIB


def is_latency(config: DecodeConfig) -> bool:
    """The problems whose latency is promised: batch 1 and 8 at 1024 tokens, 32/8 heads, head_dim 128."""
    heads = (config.num_qo_heads, config.num_kv_heads, config.head_dim) == (32, 8, 128)
    return heads and config.batch in (1, 8) and set(config.lens) == {1024} and config.dtype == "bfloat16"
