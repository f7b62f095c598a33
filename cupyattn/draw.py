"""A picture of who shares which keys, and of what that makes of a decode step's work."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyattn import checks
from cupyattn.levels import CascadeLevels
from cupyattn.schedule import Segment

_WIDTH = 11.0  # inches, of which axes have about this:
_AXES_WIDTH = 10.2
_CHAR_WIDTH, _CHAR_HEIGHT = 0.062, 0.075  # of a digit of 7 points, and of 6


def draw_levels(
    levels: CascadeLevels, path: str | Path, *, segments: Sequence[Segment] = (), title: str = ""
) -> None:
    """Draw each level as a row of boxes, one a group, over the query tokens that share its keys.

    A token's keys are those of all boxes in its column, from the top down. A box is read once for each tile of its query
    rows. Below, with `segments`, lies the line of units: what the CTAs read, box after box, level by level.

    Parameters
    ----------
    levels : CascadeLevels
        Groups without keys are left out, but for requests.
    path : str or Path
        Where to; the suffix says the format, as ``.svg`` or ``.png``.
    segments : sequence of Segment
        As `cupyattn.schedule.cascade_schedule` returns them for these levels.
    title : str

    Raises
    ------
    ModuleNotFoundError
        There is no matplotlib.
    ValueError
        matplotlib does not know the format.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    palette = matplotlib.colormaps["tab10"]
    groups = _groups(levels)
    num_tokens = max((int(end) for level in groups for _, end, _ in level), default=0)
    rows = [0.8] * levels.num_levels + ([0.55] if segments else [])
    # Without pyplot there is no backend to choose, and no display is asked for.
    figure = Figure(figsize=(_WIDTH, 0.9 + sum(rows) + (0.9 if segments else 0)), layout="constrained")
    grid = [sum(rows[: levels.num_levels]), *rows[levels.num_levels :]]
    all_axes = figure.subplots(len(grid), 1, height_ratios=grid, squeeze=False)[:, 0]

    axes = all_axes[0]
    for number, level in enumerate(groups):
        boxes = [(begin, end - begin) for begin, end, _ in level]
        axes.broken_barh(
            boxes, (number, 0.9), facecolors=[(*palette(number)[:3], 0.55)], edgecolor="white", linewidth=0.6
        )
        for begin, end, kv_len in level:
            _write(axes, begin, end - begin, number + 0.45, kv_len, num_tokens)
    axes.set_xlim(0, max(num_tokens, 1))
    axes.set_ylim(levels.num_levels, -0.1)  # the first level on top
    names = [*(f"level {i}" for i in range(levels.num_levels - 1)), "own keys"]
    axes.set_yticks([number + 0.45 for number in range(levels.num_levels)], names)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("query tokens, as the levels order them; in the boxes: keys")
    if segments:
        _draw_line(
            all_axes[1],
            segments,
            [palette(i) for i, level in enumerate(levels.levels) for _ in range(level[0].batch_size)],
        )
    for axes in all_axes:
        axes.spines[["top", "right", "left"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    # The same levels draw the same file.
    with matplotlib.rc_context({"svg.hashsalt": "cupyattn"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if Path(path).suffix == ".svg" else None)


def _groups(levels: CascadeLevels) -> list[list[tuple[int, int, int]]]:
    """Return of each level (first token, end, keys) of the groups to be drawn."""
    found = []
    for number, (pages, qo_indptr) in enumerate(levels.levels, 1):
        lens = np.maximum(checks.to_host(pages.kv_lens), 0).tolist()
        ends = range(len(lens) + 1) if qo_indptr is None else checks.to_host(qo_indptr).tolist()
        level = zip(itertools.pairwise(ends), lens, strict=True)
        found.append(
            [(a, b, kv_len) for (a, b), kv_len in level if b > a and (kv_len or number == levels.num_levels)]
        )
    return found


def _write(axes: Any, begin: int, width: int, y: float, kv_len: int, num_tokens: int) -> None:
    """Say how many keys a box has, as long as there is room."""
    inches = width / num_tokens * _AXES_WIDTH
    texts = (f"{kv_len} keys, read once for {width} query tokens", f"{kv_len} keys\nfor {width}", str(kv_len))
    for text in texts if width > 1 else texts[2:]:
        if inches > _CHAR_WIDTH * max(map(len, text.split("\n"))):
            axes.text(begin + width / 2, y, text, ha="center", va="center", fontsize=7)
            return
    if inches > _CHAR_HEIGHT:
        axes.text(begin + width / 2, y, str(kv_len), ha="center", va="center", fontsize=6, rotation=90)


def _draw_line(axes: Any, segments: Sequence[Segment], colours: Sequence[Any]) -> None:
    """Draw the line of units, a box for all that is read of a group, with a tick where a CTA's run begins."""
    ends = list(itertools.accumulate((s.num_tokens for s in segments), initial=0))
    spans: dict[int, list[int]] = {}
    for s, (begin, end) in zip(segments, itertools.pairwise(ends), strict=True):
        spans[s.request] = [spans.get(s.request, [begin])[0], end]
    axes.broken_barh(
        [(begin, end - begin) for begin, end in spans.values()], (0, 0.9),
        facecolors=[(*colours[request][:3], 0.55) for request in spans], edgecolor="white", linewidth=0.3,
    )  # fmt: skip
    starts = {s.cta: begin for s, begin in zip(reversed(segments), ends[-2::-1], strict=True)}
    axes.vlines(sorted(starts.values()), 0.9, 1.15, color="black", linewidth=0.5)
    axes.set_xlim(0, max(ends[-1], 1))
    axes.set_ylim(1.2, 0)
    axes.set_yticks([0.45], ["the line"])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(
        "keys that CTAs read, in the order of the line; a tick below it: the next CTA's run begins"
    )
