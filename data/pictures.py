"""Pictures for people: colours, overlays, sheets of predictions, confusion matrices."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, IGNORE = 0, 255
Colour = tuple[int, int, int]  # RGB, 0 ... 255


@functools.cache
def palette(count: int) -> list[Colour]:
    """`count` colours, no grey. Each is the one that differs most from all before it and from grey.

    A class keeps its colour where more classes follow.
    """
    colours = np.array([*itertools.product(range(0, 256, 36), repeat=3)])
    seen, known = perceived(colours), perceived(np.stack([np.arange(0, 256, 36)] * 3, 1))  # greys
    nearest = np.linalg.norm(seen[:, None] - known, axis=2).min(1)
    chosen = []
    for _ in range(count):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(seen - seen[chosen[-1]], axis=1))
    return [tuple(colours[i].tolist()) for i in chosen]


def perceived(colours: np.ndarray) -> np.ndarray:
    """RGB [n, 3] -> CIELAB [n, 3], in which distances are about as large as they look."""
    rgb = colours / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ np.array(
        [[0.4339, 0.2126, 0.0177], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8728]]
    )
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def overlay(picture: Image.Image, labels: np.ndarray, colours: Sequence[Colour]) -> Image.Image:
    """The picture in grey under the colours of its classes. Background stays grey.

    labels      integers [H, W], class ids; 255 = ignored, shown white
    colours     of the class ids 0, 1, ...
    """
    table = np.full((256, 3), 255, np.uint8)
    table[: len(colours)] = colours
    grey = np.asarray(picture.convert("L"))[..., None]
    mixed = np.where(labels[..., None] == BACKGROUND, grey, 0.35 * grey + 0.65 * table[labels])
    return Image.fromarray(mixed.astype(np.uint8))


def class_map(labels: np.ndarray, colours: Sequence[Colour]) -> Image.Image:
    """Class ids, uint8 [H, W], as a picture that keeps the ids and is shown in their colours."""
    page = Image.fromarray(labels)
    page.putpalette(sum(map(tuple, colours), ()))
    return page


def entries(
    shown: Iterable[int], names: Sequence[str], colours: Sequence[Colour]
) -> list[tuple[str, Colour]]:
    """A legend's names and colours, as the colours look over medium grey; without background.

    shown               class ids, in any order; 255 is named "void"
    names, colours      of the class ids 0, 1, ...
    """
    patch = Image.new("L", (1, 1), 128)
    return [
        (
            "void" if c == IGNORE else names[c],
            overlay(patch, np.full((1, 1), c), colours).getpixel((0, 0)),
        )
        for c in sorted({*shown} - {BACKGROUND})
    ]


def legend(pairs: Sequence[tuple[str, Colour]], width: int, size: int) -> Image.Image:
    """(name, colour) pairs in columns as wide as the longest name.

    width       pixels; the legend is wider only if a single column needs more
    size        pixels of the text
    """
    font = ImageFont.load_default(size)
    column = max((int(font.getlength(name)) for name, _ in pairs), default=0) + 3 * size
    per_line, line = max(1, width // column), size * 3 // 2
    lines = -(-len(pairs) // per_line)
    page = Image.new("RGB", (max(width, column), lines * line), "white")
    pen = ImageDraw.Draw(page)
    for i, (name, colour) in enumerate(pairs):
        x, y = size // 2 + i % per_line * column, (i // per_line + 0.5) * line
        pen.rectangle((x, y - size // 2, x + size, y + size // 2), fill=colour, outline="black")
        pen.text((x + 1.5 * size, y), name, "black", font, "lm")
    return page


def with_legend(
    picture: Image.Image, labels: np.ndarray, names: Sequence[str], colours: Sequence[Colour]
) -> Image.Image:
    """The overlay of a picture and its class ids [H, W]; under it the legend of those found."""
    found = entries(np.unique(labels).tolist(), names, colours)
    below = legend(found, picture.width, max(14, picture.width // 50))
    page = Image.new("RGB", (below.width, picture.height + below.height), "white")
    page.paste(overlay(picture, labels, colours))
    page.paste(below, (0, picture.height))
    return page


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    pairs: Sequence[tuple[str, Colour]],
) -> Image.Image:
    """Rows of pictures under the titles of the columns, and a legend; pictures become squares.

    A title may have several lines; one that is too long is written smaller.
    """
    side, gap = 192, 6
    width = gap + len(titles) * (side + gap)
    size = max(14, width // 58)  # readable when the sheet is shown 800 pixels wide
    names, top = legend(pairs, width, size), 3 * size
    height = top + len(rows) * (side + gap) + names.height + gap
    page = Image.new("RGB", (names.width, height), "white")
    pen = ImageDraw.Draw(page)
    for x, title in enumerate(titles):
        for y, line in enumerate(lines := title.split("\n")):
            wide = ImageFont.load_default(size).getlength(line)
            font = ImageFont.load_default(min(size, size * side / wide))
            place = gap + x * (side + gap) + side // 2, (y + 1) * top // (len(lines) + 1)
            pen.text(place, line, "black", font, "mm")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            corner = (gap + x * (side + gap), top + y * (side + gap))
            page.paste(picture.resize((side, side)), corner)
    page.paste(names, (0, page.height - names.height - gap // 2))
    return page


def prediction_sheet(
    originals: Sequence[Image.Image],
    truth: Sequence[np.ndarray],
    predicted: dict[int, Sequence[np.ndarray]],
    names: Sequence[str],
    colours: Sequence[Colour],
    last: Sequence[int],
) -> Image.Image:
    """A row per picture: the picture itself, then the overlays of its truth and its predictions.

    truth, predicted    class ids [H, W] of each picture, 255 = void; predicted: after which step
    names, colours      of the class ids 0, 1, ...
    last                of each step the last class id that it learns
    """
    columns, seen = {"picture": originals, "truth": truth}, 0
    for k, maps in predicted.items():
        new = names[seen + 1 : last[k] + 1]
        added = new[0] if len(new) == 1 else f"{len(new)} classes"
        columns[f"after step {k}\n{'+ ' * bool(seen)}{added}"], seen = maps, last[k]
    learned = [bisect.bisect_left(last, c) for c in range(len(names))]
    marked = [n + f" (step {k})" * (k > 0) for n, k in zip(names, learned, strict=True)]
    maps = [labels for column in (truth, *predicted.values()) for labels in column]
    shown = {c for labels in maps for c in np.unique(labels).tolist()}
    rows = [
        [picture, *(overlay(picture, labels, colours) for labels in maps)]
        for picture, *maps in zip(*columns.values(), strict=True)
    ]
    return sheet(rows, [*columns], entries(shown, marked, colours))


def read_strip(file: Path, count: int) -> list[np.ndarray]:
    """`count` square class maps of a file. Empty: there is no such file, or another one."""
    try:
        with Image.open(file) as opened:
            strip = np.array(opened)
    except (OSError, SyntaxError, ValueError):  # all that Pillow raises for damage
        return []
    height, width = strip.shape[:2]
    return np.hsplit(strip, count) if strip.ndim == 2 and width == count * height else []


def draw_confusion(confusion: np.ndarray, names: Sequence[str], base: int) -> Image.Image:
    """The confusion matrix in percent of each row; red lines after class `base`.

    confusion   integers [C, C], pixels; rows = truth. A class without a pixel gets a grey row
    names       of the class ids 0, 1, ...
    """
    count, gap = len(confusion), 8
    cell, size = (34, 15) if count <= 40 else (15, 12)  # pixels
    font = ImageFont.load_default(size)
    title = "rows: truth", "columns: predicted", "% of the row"
    margin = int(max(font.getlength(text) for text in (*title, *names[:count]))) + 2 * gap
    end = margin + count * cell
    page = Image.new("RGB", (end + gap, end + gap), "white")
    column_names = Image.new("RGB", (margin, count * cell), "white")  # written upright, then turned
    pen, upright = ImageDraw.Draw(page), ImageDraw.Draw(column_names)
    for y, row in enumerate(confusion):
        top = margin + y * cell
        pen.text((margin - gap, top + cell // 2), names[y], "black", font, "rm")
        upright.text((gap, y * cell + cell // 2), names[y], "black", font, "lm")
        for x, share in enumerate(row / max(1, row.sum())):
            left = margin + x * cell
            shade = tuple(round(255 - (255 - c) * share**0.5) for c in (20, 60, 130))
            box = (left, top, left + cell - 2, top + cell - 2)
            pen.rectangle(box, fill=shade if row.sum() else (225, 225, 225))
            if cell > 30 and share >= 0.005:
                middle = (left + cell // 2, top + cell // 2)
                ink = "white" if share > 0.3 else "black"
                pen.text(middle, f"{100 * share:.0f}", ink, font, "mm")
    page.paste(column_names.transpose(Image.Transpose.ROTATE_90), (margin, 0))
    if base + 1 < count:
        line = margin + (base + 1) * cell - 1
        pen.line((line, 0, line, end), "red", 2)
        pen.line((0, line, end, line), "red", 2)
    pen.multiline_text((gap, gap), "\n".join(title), "black", font)
    return page
