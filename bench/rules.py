"""The rules that speed is held to, and what a record says to each of them.

A rule reads one number from a row, or None where it does not speak of such rows, and compares it with its limit.
All of it is computed from what a record holds (times, bytes, operations and the roofs of its run) and from the
peers' times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

from bench import timing
from bench.configs import (
    MB,
    MLA_SKEWED,
    MOONCAKE,
    PAGED_GRID,
    TOOLAGENT,
    CascadeConfig,
    DecodeConfig,
    MLAConfig,
    PagedConfig,
    is_large,
    is_latency,
    matmul_share,
)

RESULTS = Path(__file__).resolve().parent / "results"
Record = dict[str, Any]


class Peer(NamedTuple):
    """A peer's cold time for a row: from the same run, or measured earlier on such a device."""

    name: str
    us: float
    same_run: bool


def earlier_peers(slug: str) -> dict[str, dict[str, float]]:
    """{row key: {peer: cold us}} measured earlier on a device of this short name, if there is such a file."""
    path = RESULTS / f"peers_{slug}.json"
    return json.loads(path.read_text(encoding="utf-8"))["cold_us"] if path.exists() else {}


def peers_of(row: Record, earlier: Mapping[str, Mapping[str, float]]) -> tuple[Peer, ...]:
    """All known times of peers, those of the same run last."""
    found = [Peer(name, us, False) for name, us in earlier.get(row["key"], {}).items()]
    timed = {name: peer["cold_us"] for name, peer in row.get("peers", {}).items() if "cold_us" in peer}
    return (*found, *(Peer(name, us, True) for name, us in timed.items()))


def fastest(peers: Iterable[Peer], paged: bool = False) -> Peer | None:
    """With `paged`, of all but torch's SDPA, which reads dense keys and values."""
    found = [peer for peer in peers if not (paged and peer.name == "torch-sdpa")]
    return min(found, key=lambda peer: peer.us, default=None)


@dataclass(frozen=True)
class Case:
    """A decode row that was timed, MLA, cascade or neither, with all that a rule may look at."""

    row: Record
    config: Any  # of the class that the rule speaks of
    roof: timing.Roof
    peers: tuple[Peer, ...]
    run: Mapping[str, Record]  # the rows of the same run by key

    @property
    def us(self) -> float:
        return float(self.row["cold_us"])

    @property
    def floor_us(self) -> float:
        return self.roof.floor_us(self.config.num_bytes, self.config.flops, matmul_share(self.config))

    @property
    def of_roof(self) -> float:
        return self.floor_us / self.us

    def over_peer(self, paged: bool = False) -> float | None:
        peer = fastest(self.peers, paged)
        return self.us / peer.us if peer else None

    def over(self, name: str) -> float | None:
        """Time over that of one peer."""
        found = fastest(peer for peer in self.peers if peer.name == name)
        return self.us / found.us if found else None

    def over_sdpa(self) -> float | None:
        """Beside torch SDPA of the same run only."""
        found = [peer.us for peer in self.peers if peer.name == "torch-sdpa" and peer.same_run]
        return self.us / found[0] if found else None

    def over_variant(self, name: str) -> float | None:
        """Time over that of another way to launch the same."""
        return self.us / self.row[name] if name in self.row else None

    def over_twin(self, applies: bool, **changes: Any) -> float | None:
        """Time over that of the row that differs in `changes` alone, if this run has it."""
        key = replace(self.config, **changes).key
        twin = self.run.get(key, {}) if applies and key != self.config.key else {}
        return self.us / twin["cold_us"] if "cold_us" in twin else None


def cases(record: Record) -> list[Case]:
    by_key = {config.key: config for config in PAGED_GRID}
    earlier = earlier_peers(timing.device_slug(record["device"]))
    roof = timing.Roof(record["read_roof_gbs"], record["matmul_tflops"])
    run = {row["key"]: row for row in record["rows"]}
    return [
        Case(row, by_key[key], roof, peers_of(row, earlier), run)
        for key, row in run.items()
        if key in by_key and "cold_us" in row
    ]


@dataclass(frozen=True)
class Rule:
    """A row meets a rule whose `value` is at most its limit (`at_least`: at least).

    It speaks of rows whose configuration is of the class `of`. The limit of a `mean` rule is for the geometric mean
    over the rows, and no single row is judged by it.
    """

    name: str
    text: str
    limit: float
    value: Callable[[Case], float | None]
    at_least: bool = False
    mean: bool = False
    of: type | UnionType = DecodeConfig

    def read(self, case: Case) -> float | None:
        return self.value(case) if isinstance(case.config, self.of) else None

    def meets(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def _speedup(ratio: float | None) -> float | None:
    return 1 / ratio if ratio else None


def _ragged_of_roof(case: Case) -> float | None:
    return case.of_roof if not case.config.equal_lens and case.config.kv_bytes >= 256 * MB else None


def _few_rows(factor: float, us: float) -> Callable[[Case], float | None]:
    """Time over `factor` floor + `us`, of MLA with up to 64 query rows a request."""
    return lambda c: c.us / (factor * c.floor_us + us) if c.config.num_rows <= 64 else None


def _many_rows(over: Callable[[Case], float | None]) -> Callable[[Case], float | None]:
    """A peer's time over ours (the inverse of `over`), of MLA from 128 query rows a request on."""
    return lambda c: _speedup(over(c)) if c.config.num_rows >= 128 else None


def _over_flashmla(case: Case) -> float | None:
    return case.over("flashmla")


def _over_named_limit(case: Case) -> float | None:
    limit = CASCADE_LIMITS_US.get(case.row["key"])
    return case.us / limit if limit else None


def _moment(trace: str, case: Case) -> bool:
    return bool(case.config.moment.startswith(trace[:18]))


def _of_unique_bytes(case: Case) -> float | None:
    """Where operations take longer than the bytes, those are no measure (MLA of many heads)."""
    bytes_us = case.roof.floor_us(case.config.num_bytes, 0)
    by_bytes = _moment(TOOLAGENT, case) and case.config.num_bytes > 100 * MB and bytes_us == case.floor_us
    return bytes_us / case.us if by_bytes else None


# Cascades that have limits of their own, one prefix for all requests.
CASCADE_LIMITS_US = {
    "b8 ctx4128 8q/1kv d128 p16 shared4000": 8.0,
    "b64 ctx8448 8q/1kv d128 p16 shared8192": 14.0,
    "b256 ctx2176 8q/1kv d128 p16 shared2048": 16.0,
    "b64 ctx8448 8q/8kv d128 p16 shared8192": 48.0,
}
CASCADE_MLA_KEY = "b128 ctx8704 h16 sq1 p64 shared8192"

# The floor is bytes / roof, or operations / matrix rate where that is more (MLA of many rows); all of the same run.
# Of a cascade it is the different bytes, or operations at half that rate; its time is that of the levels chosen for it.
RULES = (
    Rule("must", "time / (1.06 floor + 5 us)", 1.0, lambda c: c.us / (1.06 * c.floor_us + 5)),
    Rule("goal", "time / (1.03 floor + 3.5 us)", 1.0, lambda c: c.us / (1.03 * c.floor_us + 3.5)),
    Rule(
        "peer",
        "time / that of the fastest peer, dense SDPA included",
        1.0,
        lambda c: c.over_peer(),
        of=PagedConfig,
    ),
    Rule("SDPA", "time / torch SDPA's in the same run", 1.0, lambda c: c.over_sdpa()),
    Rule(
        "paged",
        "time of the best paged peer / ours, geometric mean",
        1.2,
        lambda c: _speedup(c.over_peer(paged=True)),
        at_least=True,
        mean=True,
    ),
    Rule(
        "p1/p64",
        "time with page size 1 / with 64",
        1.03,
        lambda c: c.over_twin(c.config.page_size == 1, page_size=64),
    ),
    Rule(
        "HND/NHD", "time in HND / in NHD", 1.03, lambda c: c.over_twin(c.config.layout == "HND", layout="NHD")
    ),
    Rule("ragged", "share of the roof, ragged, from 256 MB on", 0.92, _ragged_of_roof, at_least=True),
    Rule("host", "host us of a call, in the quietest of 40 spells", 12.0, lambda c: c.row.get("host_us")),
    Rule(
        "MLA must", "time / (1.05 floor + 7 us), up to 64 query rows", 1.0, _few_rows(1.05, 7), of=MLAConfig
    ),
    Rule(
        "MLA goal", "time / (1.03 floor + 4 us), up to 64 query rows", 1.0, _few_rows(1.03, 4), of=MLAConfig
    ),
    Rule(
        "FlashMLA",
        "rate / FlashMLA's, from 128 query rows on",
        1.0,
        _many_rows(_over_flashmla),
        at_least=True,
        of=MLAConfig,
    ),
    Rule(
        "FlashMLA goal",
        "rate / FlashMLA's, from 128 query rows on",
        1.1,
        _many_rows(_over_flashmla),
        at_least=True,
        of=MLAConfig,
    ),
    Rule(
        "MLA b1-32",
        "time of the best peer / ours, from 128 query rows on, batch up to 32",
        1.2,
        _many_rows(lambda c: c.over_peer() if c.config.batch <= 32 else None),
        at_least=True,
        of=MLAConfig,
    ),
    Rule(
        "MLA p1/p64",
        "time with page size 1 / with 64, MLA",
        1.05,
        lambda c: c.over_twin(c.config.page_size == 1, page_size=64),
        of=MLAConfig,
    ),
    Rule(
        "MLA skewed",
        "us, MLA, one long request among short ones (FlashMLA 47.7, FlashInfer 62)",
        45.0,
        lambda c: c.us if c.config == MLA_SKEWED else None,
        of=MLAConfig,
    ),
    Rule(
        "auto/plain",
        "time of a cascade with the chosen levels / plain decode's",
        1.03,
        lambda c: c.over_variant("plain_us"),
        of=CascadeConfig,
    ),
    Rule(
        "auto/forced",
        "time of a cascade with the chosen levels / with all there are",
        1.05,
        lambda c: c.over_variant("cascade_us"),
        of=CascadeConfig,
    ),
    Rule(
        "cascade must",
        "time / (1.2 floor + 8 us), cascades",
        1.0,
        lambda c: c.us / (1.2 * c.floor_us + 8),
        of=CascadeConfig,
    ),
    Rule(
        "named",
        "time / 8, 14, 16, 48 us: 8/1 heads 8 x (4000 + 128), 64 x (8192 + 256), 256 x (2048 + 128); 8/8, the second",
        1.0,
        _over_named_limit,
        of=CascadeConfig,
    ),
    Rule(
        "MLA/plain",
        "plain mla_decode's time / the cascade's, 128 x (8192 + 512), 16 heads",
        3.0,
        lambda c: _speedup(c.over_variant("plain_us")) if c.row["key"] == CASCADE_MLA_KEY else None,
        at_least=True,
        of=CascadeConfig,
    ),
    Rule(
        "tool-agent",
        "share of the roof, different bytes of the tool-agent batch, from 100 MB on",
        0.85,
        _of_unique_bytes,
        at_least=True,
        of=CascadeConfig,
    ),
    Rule(  # the rows of "auto/plain" that share almost nothing, in a line of their own
        "conversation",
        "time / plain decode's, conversation batches",
        1.03,
        lambda c: c.over_variant("plain_us") if _moment(MOONCAKE, c) else None,
        of=CascadeConfig,
    ),
)
PDL_RULES = ("must", "goal", "MLA must", "MLA goal")  # what the PDL time is held against too


def _large(group_size: int) -> Callable[[Case], float | None]:
    return lambda c: c.of_roof if is_large(c.config) and c.config.group_size == group_size else None


def _latency(batch: int) -> Callable[[Case], float | None]:
    return lambda c: c.us if is_latency(c.config) and c.config.batch == batch else None


# What the first version was held to.
FOUNDATION = (
    *(
        Rule(f"large, group {n}", "share of the roof, >= 256 MiB", 0.85, _large(n), at_least=True)
        for n in (1, 4, 8)
    ),
    *(Rule(f"batch {n}", f"us, {n} x 1024 tokens, 32/8 heads", 20.0, _latency(n)) for n in (1, 8)),
    Rule("2 x SDPA", "time / torch SDPA's in the same run", 2.0, lambda c: c.over_sdpa()),
)


def judged(case: Case) -> dict[str, tuple[float, bool | None]]:
    """{rule: (value, whether it is met)} of the rules that speak of this row; None for those of a mean."""
    values = {rule: rule.read(case) for rule in RULES}
    return {
        rule.name: (value, None if rule.mean else rule.meets(value))
        for rule, value in values.items()
        if value is not None
    }


def verdict(rule: Rule, found: Iterable[Case]) -> Record:
    """How many rows meet the rule, and the worst one. `ok` is None where the rule speaks of no row."""
    values = [(value, case.row["key"]) for case in found if (value := rule.read(case)) is not None]
    values.sort(reverse=not rule.at_least)  # the worst first
    result = {
        "rule": rule.name,
        "text": rule.text,
        "limit": rule.limit,
        "ok": None,
        "num_met": sum(rule.meets(value) for value, _ in values),
        "num_rows": len(values),
        "worst": None,
        "row": None,
    }
    if values:
        worst, row = values[0]
        result |= {"ok": rule.meets(worst), "worst": round(worst, 3), "row": row}
        if rule.mean:
            mean = math.exp(math.fsum(math.log(value) for value, _ in values) / len(values))
            result |= {"ok": rule.meets(mean), "mean": round(mean, 3)}
    return result


def with_pdl(found: Iterable[Case]) -> list[Case]:
    """The rows that were launched with programmatic dependent launch too, in that time."""
    return [
        replace(case, row={**case.row, "cold_us": case.row["pdl_us"]})
        for case in found
        if "pdl_us" in case.row
    ]


def verdicts(record: Record) -> dict[str, list[Record]]:
    """{"rules": of RULES, "foundation": of FOUNDATION and of the rows that failed their check}."""
    found = cases(record)
    pdl = with_pdl(found)
    rules = [verdict(rule, found) for rule in RULES]
    for rule, one in zip(RULES, rules, strict=True):
        if pdl and rule.name in PDL_RULES:
            one["num_met_pdl"] = verdict(rule, pdl)["num_met"]
    errors = [row["key"] for row in record["rows"] if "error" in row]
    failed = {
        "rule": "checks",
        "text": "rows that failed",
        "limit": 0,
        "ok": not errors,
        "num_met": len(record["rows"]) - len(errors),
        "num_rows": len(record["rows"]),
        "worst": len(errors),
        "row": ", ".join(errors) or None,
    }
    return {"rules": rules, "foundation": [*(verdict(rule, found) for rule in FOUNDATION), failed]}


_WORDS = {True: "met", False: "**MISSED**", None: "no row"}


def summary(verdicts: Sequence[Record]) -> list[str]:
    """The verdicts as a Markdown table."""
    lines = [
        "| rule | | limit | rows that meet it | worst | row | verdict |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for one in verdicts:
        met = f"{one['num_met']} of {one['num_rows']}"
        if "num_met_pdl" in one:
            met += f" ({one['num_met_pdl']} with PDL)"
        if "mean" in one:
            met = f"mean {one['mean']} of {one['num_rows']}"
        worst = "" if one["worst"] is None else one["worst"]
        lines.append(
            f"| {one['rule']} | {one['text']} | {one['limit']} | {met} | {worst} | {one['row'] or ''} "
            f"| {_WORDS[one['ok']]} |"
        )
    return lines
