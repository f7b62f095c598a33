"""Pictures of levels: every group with keys is a box, the same levels draw the same file; and the command."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import configs
from cupyattn import CascadeLevels, PageTable, PrefixTree
from cupyattn.__main__ import main
from cupyattn.draw import _draw_line, draw_levels
from cupyattn.schedule import cascade_schedule, decode_schedule

ROOT = Path(__file__).resolve().parent.parent
TRACES = ROOT / "bench" / "traces"
TOOLAGENT = ("cascade", "--trace", str(TRACES / "mooncake_toolagent.csv"))
SIZES = {"num_kv_heads": 1, "group_size": 8, "tile_kv": 64, "tile_q": 16, "max_ctas": 3}


def levels_of(xp, *levels):

    def array(values):
        return xp.asarray(np.array(values, np.int32))

    return CascadeLevels([
        (
            PageTable(array([0] * (len(lens) + 1)), array([]), array(lens)),
            None if qo_indptr is None else array(qo_indptr),
        )
        for lens, qo_indptr in levels
    ])  # fmt: skip


# Of each level kv_lens and qo_indptr.
LEVELS = {
    "two": (([512], [0, 3]), ([64, 0, 100, 7], None)),
    "gaps": (([512, 0, 64], [1, 3, 4, 9]), ([70] * 4, [0, 2, 3, 7, 9])),
    "one": (([5, 6], None),),
    "many": (*(([10 * i, 20], [0, i, 20]) for i in range(1, 8)), ([1] * 20, None)),
    "hundreds": (([1000], [0, 300]), ([0, 1, 999] * 100, None)),
    "no requests": (([], [0]), ([], None)),
    "no keys": (([0], [0, 2]), ([0, 0], None)),
}


def test_a_line_in_parts_has_its_boxes_side_by_side():
    """Part after part, in each a box for every request, as wide as its keys."""
    pytest.importorskip("matplotlib")
    drawn = []
    axes = SimpleNamespace(
        broken_barh=lambda boxes, place, facecolors, **more: drawn.append((boxes, facecolors)),
        plot=lambda *args, **more: None,
        xaxis=SimpleNamespace(set_major_formatter=lambda text: None),
        **dict.fromkeys(
            ("set_xlim", "set_ylim", "set_yticks", "tick_params", "set_xlabel"), lambda *args, **more: None
        ),
    )
    lens = [640, 1280, 64]
    segments = decode_schedule(lens, **(SIZES | {"num_kv_heads": 4, "max_ctas": 8}), num_parts=4)
    _draw_line(axes, segments, np.arange(3))
    ((boxes, colours),) = drawn
    assert boxes == [
        (1984 * part + begin, kv_len)
        for part in range(4)
        for begin, kv_len in zip((0, 640, 1920), lens, strict=True)
    ]
    assert list(colours) == [0, 1, 2] * 4


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("with_line", [False, True])
def test_the_same_file_every_time(name, with_line, tmp_path, xp):
    pytest.importorskip("matplotlib")
    levels = levels_of(xp, *LEVELS[name])
    segments = cascade_schedule(levels, **SIZES) if with_line else ()
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in (first, second):
        draw_levels(levels, path, segments=segments, title="a title")
    assert "<svg" in first.read_text()
    assert first.read_bytes() == second.read_bytes()
    draw_levels(levels, tmp_path / "a.png", segments=segments)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def drawn(monkeypatch, levels, path, **options):
    """Boxes, [(first, width), ...] of each row, and the texts in them."""
    axes = pytest.importorskip("matplotlib.axes").Axes
    rows, texts = [], []
    draw, write = axes.broken_barh, axes.text

    def record(self, boxes, *args, **kwargs):
        rows.append(list(boxes))
        return draw(self, boxes, *args, **kwargs)

    def record_text(self, x, y, text, **kwargs):
        texts.append(text)
        return write(self, x, y, text, **kwargs)

    monkeypatch.setattr(axes, "broken_barh", record)
    monkeypatch.setattr(axes, "text", record_text)
    draw_levels(levels, path, **options)
    return rows, texts


def test_a_box_is_a_group_over_its_tokens(tmp_path, monkeypatch):
    levels = levels_of(np, *LEVELS["gaps"])
    rows, texts = drawn(monkeypatch, levels, tmp_path / "a.svg")
    assert rows == [[(1, 2), (4, 5)], [(0, 2), (2, 1), (3, 4), (7, 2)]]
    assert [re.findall(r"\d+", text)[0] for text in texts] == ["512", "64", *["70"] * 4]


def test_the_line_has_what_is_read_of_each_group(tmp_path, monkeypatch):
    levels = levels_of(np, *LEVELS["gaps"])
    segments = cascade_schedule(levels, **SIZES)
    rows, _ = drawn(monkeypatch, levels, tmp_path / "a.svg", segments=segments)
    # A tile is 2 tokens; the third has 1 tile of 512 keys, the fifth group of 64 has 3, the requests 1 or 2 of 70.
    assert rows[2] == [(0, 512), (512, 192), (704, 70), (774, 70), (844, 140), (984, 70)]


def figures(capsys):
    return dict(re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines())


def test_command_says_the_figures(capsys):
    assert main([*TOOLAGENT, "--num-qo-heads", "64", "--num-kv-heads", "8"]) == 0
    rows = figures(capsys)
    assert rows["requests"] == "93"
    assert rows["level 0"] == "3 groups; requests 45, 35, 13; tokens 512, 6144, 2560"
    assert "level 1" not in rows
    assert re.fullmatch(r"\d+ of 132", rows["CTAs"])


def test_command_takes_the_batch_that_the_bench_does(capsys):
    trace, start, batch = configs.MOONCAKE, 700, 128
    path = str(TRACES / f"{trace}.csv")
    heads = "--num-qo-heads", "32", "--num-kv-heads", "32"  # where all that is shared is worth it
    assert main(["cascade", "--trace", path, "--row", str(start), "--batch", str(batch), *heads]) == 0
    rows = figures(capsys)
    lens = configs.running_lens(trace, start, batch)
    config = configs.running_sharing(trace, start, configs.DecodeConfig(lens, 32, 32))
    assert rows["tokens"] == f"{sum(lens)}, {sum(lens) - config.repeated_tokens} of them read"
    assert rows["level 1"] == "2 groups; requests 2, 2; tokens 3072, 3584"


def test_command_where_nothing_is_shared(tmp_path, capsys):
    path = tmp_path / "x.csv"
    path.write_text("row,input_tokens,output_tokens,blocks\n0,600,1,7\n1,512,1,7\n2,40,1,\n")
    assert main(["cascade", "--trace", str(path)]) == 0
    rows = figures(capsys)
    assert rows["saving"] == "none: plain decode"
    assert rows["tokens"] == "1152, 1152 of them read"
    assert main(["cascade", "--trace", str(path), "--out", str(tmp_path / "x.svg")]) == 0


def test_command_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in (first, second):
        assert main([*TOOLAGENT, "--out", str(path)]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert capsys.readouterr() == ("", "")


def test_command_names_the_extra_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*TOOLAGENT, "--out", str(tmp_path / "x.svg")]) == 2
    assert "pip install 'cupyattn[bench]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--row", "90", "--batch", "4"), "has 3 rows from row 90 on, fewer than 4"),
        (("--row", "93"), "has 0 rows from row 93 on, fewer than 1"),
        (("--batch", "0"), "--batch must be at least 1, got 0"),
        (("--trace", str(ROOT / "missing.csv")), "cannot read"),
        (("--trace", str(TRACES / "azure_llm_conv_2023.csv")), "has no column 'blocks'"),
        (("--num-qo-heads", "6", "--num-kv-heads", "4"), "--num-qo-heads must be a positive multiple"),
        (("--block-size", "0"), "page_size must be at least 1, got 0"),
        (("--out", "x.txt"), "--out must end in .svg or .png, got x.txt"),
    ],
)
def test_command_errors(options, message, capsys):
    assert main([*TOOLAGENT, *options]) == 2
    assert message in capsys.readouterr().err


def test_notes_have_what_the_command_says(capsys):
    assert main(list(TOOLAGENT)) == 0
    assert capsys.readouterr().out in (ROOT / "bench" / "CASCADE.md").read_text(encoding="utf-8")


def test_a_tree_is_drawn_as_it_is(tmp_path, monkeypatch):
    tree = PrefixTree(page_size=16)
    for i, pages in enumerate(([1, 2, 10], [1, 2, 3, 11], [1, 2, 3, 12], [20])):
        tree.add(i, pages, 16 * len(pages) - 3)
    levels = tree.levels(choose=lambda *numbers: 1.0).levels
    rows, texts = drawn(monkeypatch, levels, tmp_path / "a.svg")
    assert rows == [[(0, 3)], [(0, 2)], [(0, 1), (1, 1), (2, 1), (3, 1)]]
    assert sorted(int(re.findall(r"\d+", text)[0]) for text in texts) == [13, 13, 13, 13, 16, 32]
