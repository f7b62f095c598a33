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

# In inches: the figure, its axes (roughly), and digits of 7 points and of 6 points.
_WIDTH, _AXES_WIDTH = 11.0, 10.2
_DIGIT_WIDTH, _DIGIT_HEIGHT = 0.062, 0.075


def draw_levels(
    levels: CascadeLevels, path: str | Path, *, segments: Sequence[Segment] = (), title: str = ""
) -> None:
    """Draw each level as a row of boxes, one a group, over the query tokens that share its keys.

    A token's keys are those of all boxes in its column, from the top down. A box is read once for each tile of its
    query rows. Below, with `segments`, lies the line of units: what the CTAs read, box after box, level by level.

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

    palette = matplotlib.colormaps["tab10"]
    colours = [(*palette(i)[:3], 0.55) for i in range(levels.num_levels)]
    heights = [0.8 * levels.num_levels, *([0.55] if segments else [])]
    # Without pyplot there is no backend to choose, and no display is asked for.
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.9 * len(heights)), layout="constrained")
    all_axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes in all_axes:
        axes.spines[["top", "right", "left"]].set_visible(False)
    _draw_groups(all_axes[0], levels, colours)
    if segments:
        sizes = [pages.batch_size for pages, _ in levels.levels]
        _draw_line(all_axes[1], segments, np.repeat(colours, sizes, axis=0))
    if title:
        figure.suptitle(title, fontsize=10)
    # The same levels draw the same file.
    with matplotlib.rc_context({"svg.hashsalt": "cupyattn"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if Path(path).suffix == ".svg" else None)


def _draw_groups(axes: Any, levels: CascadeLevels, colours: Sequence[Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    drawn = []  # of each level (first token, end, keys) of its groups
    for number, (pages, qo_indptr) in enumerate(levels.levels, 1):
        lens = np.maximum(checks.to_host(pages.kv_lens), 0).tolist()
        ends = range(len(lens) + 1) if qo_indptr is None else checks.to_host(qo_indptr).tolist()
        drawn.append([
            (begin, end, kv_len) for (begin, end), kv_len in zip(itertools.pairwise(ends), lens, strict=True)
            if end > begin and (kv_len or number == levels.num_levels)
        ])  # fmt: skip
    num_tokens = max((end for groups in drawn for _, end, _ in groups), default=1)
    for y, (groups, colour) in enumerate(zip(drawn, colours, strict=True)):
        boxes = [(begin, end - begin) for begin, end, _ in groups]
        _draw_boxes(axes, boxes, y, [colour])
        for (begin, width), (_, _, kv_len) in zip(boxes, groups, strict=True):
            text, size, rotation = _fit(kv_len, width, width / num_tokens * _AXES_WIDTH)
            place = begin + width / 2, y + 0.45
            axes.text(*place, text, ha="center", va="center", fontsize=size, rotation=rotation)
    axes.set_xlim(0, num_tokens)
    axes.set_ylim(levels.num_levels, -0.1)  # the first level on top
    names = [*(f"level {i}" for i in range(levels.num_levels - 1)), "own keys"]
    axes.set_yticks([y + 0.45 for y in range(levels.num_levels)], names)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("query tokens, as the levels order them; in the boxes: keys")


def _draw_line(axes: Any, segments: Sequence[Segment], colours: Any) -> None:
    """Draw a box for all that is read of a group in a part of the line, and a tick where each CTA's run begins."""
    boxes: list[tuple[int, int]] = []
    requests: list[int] = []
    starts: dict[int, int] = {}
    end = 0
    for request, group in itertools.groupby(segments, lambda s: s.request):
        begin = end
        for s in group:
            starts.setdefault(s.cta, end)
            end += s.num_tokens
        boxes.append((begin, end - begin))
        requests.append(request)
    _draw_boxes(axes, boxes, 0, colours[requests])
    # One path, with gaps: 264 of their own would be half of the file.
    ticks = [(x, y) for x in starts.values() for y in (0.9, 1.15, np.nan)]
    axes.plot(*zip(*ticks, strict=True), color="black", linewidth=0.5)
    axes.set_xlim(0, max(end, 1))
    axes.set_ylim(1.2, 0)
    axes.set_yticks([0.45], ["the line"])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("keys that CTAs read, in the order of the line; a tick below: the next CTA's run begins")


def _draw_boxes(axes: Any, boxes: Sequence[tuple[int, int]], y: int, colours: Any) -> None:
    # Edges are to set boxes apart, not to hide hundreds of them.
    linewidth = min(40 / max(len(boxes), 1), 0.6)
    axes.broken_barh(boxes, (y, 0.9), facecolors=colours, edgecolor="white", linewidth=linewidth)


def _fit(kv_len: int, num_tokens: int, inches: float) -> tuple[str, int, int]:
    """Return what a box of so many inches can say of its keys, the size of it, and its rotation."""
    texts = [str(kv_len)]
    if num_tokens > 1:
        texts[:0] = (
            f"{kv_len} keys, read once for {num_tokens} query tokens",
            f"{kv_len} keys\nfor {num_tokens}",
        )
    for text in texts:
        if max(map(len, text.split("\n"))) * _DIGIT_WIDTH < inches:
            return text, 7, 0
    return (str(kv_len), 6, 90) if inches > _DIGIT_HEIGHT else ("", 6, 0)
