"""``kcache inspect --export-svg`` and ``--export-png``: shapes for blocks and lines, words as they are, right steps."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kcache.errors import InputError
from kcache.watch.frame import Info
from kcache.watch.recorder import Recorder
from kcache_cli.inspect.picture import parse_size
from kcache_cli.pictures.draw import draw
from kcache_cli.pictures.glyphs import CELL_H, CELL_W, ROUND, boxes
from kcache_cli.pictures.png import to_png
from kcache_cli.pictures.screen import Fill, Run, Screen, cells, read_screen
from tests.cli.conftest import Run as RunCommand
from tests.watch.steps import Steps

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    steps, path = Steps(layers=6, kv_heads=2, group=2, topn=8, tokens=500), tmp_path / "run.kcr"
    recorder = Recorder(path)
    recorder.begin(asdict(Info(12, "chat", "tiny-model", 1.8e9, "CPU", True, 100)))
    for _ in range(6):
        recorder.write(steps.step(), steps.text)
    recorder.close("the run ended")
    return path


def words(svg: str) -> str:
    return " ".join(text.text or "" for text in ElementTree.fromstring(svg).iter(f"{SVG}text")).replace("\xa0", " ")


def test_both_pictures_of_a_recording(run: RunCommand, recording: Path, tmp_path: Path) -> None:
    svg, png = tmp_path / "out.svg", tmp_path / "out.png"
    result = run("inspect", str(recording), "--export-svg", str(svg), "--export-png", str(png), "--size", "100x34")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "" and "out.svg and" in result.stderr
    text = svg.read_text(encoding="utf-8")
    said = words(text)
    for part in ("kcache inspect run.kcr", "tiny-model", "506", "memory", "where attention looks"):
        assert part in said
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@font-face|[▀█⣿│─]", text)
    root = ElementTree.fromstring(text)
    wanted = int(root.get("width", "0")), int(root.get("height", "0"))
    assert wanted[0] > 100 * CELL_W and wanted[1] > 34 * CELL_H
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == wanted
    assert len(text) < 300_000


def test_the_step_that_is_asked_for(run: RunCommand, recording: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.svg"
    for step in (2, 5):
        picture = ["inspect", str(recording), "--export-svg", str(target), "--overwrite"]
        result = run(*picture, "--at", str(step), "--view", "history")
        assert result.exit_code == 0, result.stderr
        assert f"{500 + step} tokens" in " ".join(words(target.read_text()).split())
    result = run(*picture, "--at", "99")
    assert result.exit_code == 2
    assert "--at 99: no such step; there are steps 1 to 6" in result.stderr


@pytest.mark.parametrize("size", ["120", "10x10", "9999x50", "axb", "120x-3", "1200000x40"])
def test_sizes_that_are_none(run: RunCommand, recording: Path, size: str) -> None:
    result = run("inspect", str(recording), "--export-svg", "x.svg", "--size", size)
    assert result.exit_code == 2 and f"--size {size}: write columns x lines" in result.stderr
    assert not Path("x.svg").exists()


def test_sizes() -> None:
    assert parse_size("120x40") == parse_size(" 120×40 ") == (120, 40)
    with pytest.raises(InputError):
        parse_size("")


def area(character: str) -> float:
    found = boxes(character)
    assert found is not None
    for x, y, width, height in found:
        assert 0 <= x < x + width <= CELL_W and 0 <= y < y + height <= CELL_H
    return sum(width * height for _, _, width, height in found) / (CELL_W * CELL_H)


def test_blocks_fill_what_their_names_say() -> None:
    assert [area(character) * 8 for character in "▁▂▃▄▅▆▇█"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [area(character) * 8 for character in "▏▎▍▌▋▊▉█"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [area(character) * 4 for character in "▘▝▖▗▀▌▞▐▚▛▜▙▟"] == [1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3]
    assert boxes("▀") == ((0, 0, CELL_W, CELL_H / 2),)
    assert boxes("▐") is not None and all(box[0] == CELL_W / 2 for box in boxes("▐") or ())
    assert area("░") == 1.0


def test_every_braille_pattern_has_its_dots() -> None:
    places = set()
    for bits in range(256):
        found = boxes(chr(0x2800 + bits))
        assert found is not None and len(found) == bits.bit_count() == len(set(found))
        places |= set(found)
    assert len(places) == 8
    assert boxes("⠁") == ((1, 1, 4, 4),)  # dot 1 is at the top left
    assert boxes("⢀") == ((7, 19, 4, 4),)  # dot 8 at the bottom right


def test_lines_meet_their_neighbours() -> None:
    for character, reach in (("─", "lr"), ("│", "ud"), ("┌", "rd"), ("┤", "lud"), ("┼", "lurd"), ("┗", "ur")):
        found = boxes(character) or ()
        touched = {
            "l": any(x == 0 for x, _, _, _ in found),
            "u": any(y == 0 for _, y, _, _ in found),
            "r": any(x + width == CELL_W for x, _, width, _ in found),
            "d": any(y + height == CELL_H for _, y, _, height in found),
        }
        assert {side for side, is_there in touched.items() if is_there} == set(reach)
    assert all(boxes(character) is None for character in ROUND)
    assert boxes("x") is None and boxes("é") is None


def test_wide_and_combining_characters_keep_their_columns() -> None:
    assert cells("a語b") == [(0, "a"), (1, "語"), (3, "b")]
    assert cells("e\u0301x") == [(0, "e\u0301"), (1, "x")]


def test_hostile_words_are_words() -> None:
    attack = '</text><script>alert(1)</script>&<"\x1b[31m'
    svg = draw(Screen(80, 2, [Fill(0, 0, 3, "#102030")], [Run(0, 0, attack, "#ffffff")]), attack, "#000000")
    root = ElementTree.fromstring(svg)
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    assert "<script>alert(1)</script>" in words(svg)


def test_a_screen_that_textual_exported_is_read_back() -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=30, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115, PTH123
    console.print(Text.assemble("ab ", ("bold", "bold red"), ("▀", "green on blue")))
    screen = read_screen(console.export_svg(title="x"), 30, 1)
    found = {run.text.strip(): run for run in screen.runs}
    assert found["bold"].bold and found["bold"].column == 3 and found["bold"].line == 0
    assert [(fill.column, fill.width) for fill in screen.fills] == [(7, 1)]
    assert found["▀"].column == 7


def test_a_picture_has_no_missing_glyphs() -> None:
    """Two letters that no font at hand may have look alike; ours do not."""

    def drawn(text: str) -> bytes:
        return to_png(draw(Screen(6, 1, [], [Run(0, 0, text, "#ffffff")]), "", "#000000"))

    pictures = {text: drawn(text) for text in ("▲", "▼", "●", "…", "–", "╱", "×", "·", "↑", "Ⅱ", "\U000f1234")}
    assert len(set(pictures.values())) == len(pictures)
