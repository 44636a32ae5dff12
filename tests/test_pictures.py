"""data/pictures.py: colours, overlays, sheets, matrices; and those that a run leaves."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import TINY

import common
from data import files, pictures


def nearest(colours):
    """Of the overlays of these colours over medium grey: the smallest distance in CIELAB."""
    seen = pictures.perceived(0.35 * 128 + 0.65 * np.array(colours))
    return np.linalg.norm(seen[:, None] - seen, axis=2)[~np.eye(len(seen), dtype=bool)].min()


@pytest.mark.parametrize(("count", "least"), [(2, 60), (20, 25), (150, 9), (254, 5)])
def test_colours_are_told_apart_and_none_is_grey(count, least):
    colours = pictures.palette(count)
    assert len(colours) == count and nearest(colours) > least
    assert all(len({*colour}) > 1 for colour in colours)
    assert colours[: count // 2] == pictures.palette(count // 2)
    assert 0 <= np.min(colours) <= np.max(colours) <= 255


@pytest.mark.parametrize(
    ("dataset", "least"), [("shapes", 19), ("voc", 10), ("msrc", 10), ("ade", 9)]
)
def test_colours_of_the_data_sets_are_told_apart(dataset, least):
    names, colours = common.class_table(dataset)
    assert len(names) == len(colours) and nearest(colours[1:]) > least


def test_distances_are_those_of_cielab():
    """Red, green and blue in sRGB: L, a, b as printed in tables, for white (95.05, 100, 108.9)."""
    found = pictures.perceived(255 * np.eye(3))
    published = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    assert np.abs(found - published).max() < 0.1


def test_an_overlay_keeps_background_grey_and_shows_void_white():
    picture = Image.new("RGB", (4, 1), (200, 100, 0))
    grey = picture.convert("L").getpixel((0, 0))
    labels = np.array([[0, 1, 2, 255]])
    page = np.asarray(pictures.overlay(picture, labels, [(0, 0, 0), (255, 0, 0), (0, 90, 0)]))[0]
    for pixel, colour in zip(page[1:], ((255, 0, 0), (0, 90, 0), (255, 255, 255)), strict=True):
        assert np.abs(pixel - (0.35 * grey + 0.65 * np.array(colour))).max() <= 1
    assert page[0].tolist() == [grey] * 3


def test_a_legend_names_what_is_shown():
    names, colours = ["background", "cat", "dog"], [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
    found = pictures.entries([255, 2, 0, 2], names, colours)
    assert [name for name, _ in found] == ["dog", "void"]
    assert found[0][1] == (44, 44, 210) and found[1][1] == (210, 210, 210)
    picture = Image.new("RGB", (50, 40))
    empty = pictures.with_legend(picture, np.zeros((40, 50), np.uint8), names, colours)
    assert empty.size == (50, 40)
    shown = pictures.with_legend(picture, np.full((40, 50), 1, np.uint8), names, colours)
    assert shown.height > 40 and np.asarray(shown)[:40, :50].any()


@pytest.mark.parametrize("count", [21, 151])
def test_sheets_and_matrices_have_room_for_long_names(count):
    """No text touches the border; every cell of the matrix has the colour of its share."""
    names = [
        "background",
        *(f"{'escalator;moving staircase ' * (i % 9 == 0)}{i}" for i in range(count - 1)),
    ]
    matrix = np.diag(np.arange(count)) + 1
    matrix[3] = 0
    page = np.asarray(pictures.draw_confusion(matrix, names, 10).convert("L")).astype(int)
    assert (page[:, :3] == 255).mean() > 0.99 and (page[:3] == 255).mean() > 0.99
    cell = 34 if count == 21 else 15
    start = len(page) - 8 - count * cell + 3
    corners = page[start::cell, start::cell][:count, :count]
    assert corners[5, 5] < corners[5, 4] and corners[20, 20] < corners[5, 5]
    assert {*corners[3].tolist()} == {225}
    entries = [(name, (9, 9, 9)) for name in names[1:]]
    key = np.asarray(pictures.legend(entries, 600, 14).convert("L"))
    assert (key[:, -3:] == 255).all() and key.shape[1] >= 600
    assert pictures.legend([], 600, 14).height == 0


@pytest.mark.slow
def test_pictures_show_every_step_also_after_a_resume(start, monkeypatch):
    pages, matrices = [], []
    sheet, confusion = pictures.sheet, pictures.draw_confusion
    monkeypatch.setattr(pictures, "sheet", lambda *a: pages.append(a) or sheet(*a))
    monkeypatch.setattr(pictures, "draw_confusion", lambda *a: matrices.append(a) or confusion(*a))
    flags = f"{TINY} --task 14-1 --epochs 1 --batch 16"
    folder = Path("runs/dkd-voc-14-1-overlapped-s0")

    def stop_in_the_last_step(progress, *given):
        if progress.step.index == 6:
            raise KeyboardInterrupt
        add(progress, *given)

    add = common.Progress.add
    monkeypatch.setattr(common.Progress, "add", stop_in_the_last_step)
    assert start(flags)[0] == 130 and len(pages) == 6
    monkeypatch.setattr(common.Progress, "add", add)
    assert start(flags)[0] == 0
    after = [[t.splitlines()[0] for t in page[1] if "after" in t] for page in pages]
    assert after[1] == ["after step 0", "after step 1"]
    assert after[6] == [f"after step {k}" for k in (0, 1, 2, 4, 5, 6)]
    assert pages[0][1][2] == "after step 0\n14 classes" and "\n+ person" in pages[1][1][3]
    assert pages[6][1][5] == "after step 4\n+ 2 classes"  # step 3 has no column
    legend = dict(pages[0][2])
    assert "train (step 5)" in legend and "aeroplane" in legend
    # what a step predicted looks the same in its own sheet and in the last one
    for k, column in ((1, 3), (2, 4), (4, 5)):
        own = [np.asarray(row[-1]) for row in pages[k][0]]
        late = [np.asarray(row[column]) for row in pages[6][0]]
        assert all((a == b).all() for a, b in zip(own, late, strict=True))
    assert len(matrices[6][0]) == 21
    for k, matrix in enumerate(matrices):
        page = files.open_image(folder / f"pictures/confusion_{k}.png", "matrix")
        assert page.width == page.height > 34 * len(matrix[0])
