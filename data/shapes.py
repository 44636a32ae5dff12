"""The drawn data set: 20 classes, no download. A picture is drawn from its number alone."""

from __future__ import annotations

import colorsys
import functools

import numpy as np
from PIL import Image, ImageDraw

TRAIN, TEST, SIZE = 1000, 200, 72  # pictures, pictures, pixels per side
CLASSES = 20
STRIDE = 9  # of 20 hues: neighbours in the class order are nearly opposite on the circle of hues


@functools.cache
def draw(number: int) -> tuple[Image.Image, Image.Image]:
    """A picture and its mask: one to four objects on a rough grey ground.

    Class k = 1 ... 20 has one of four outlines, and a hue nearly opposite to that of class k - 1.

    number      0, 1, ... for training pictures, -1, -2, ... for test pictures
    returns     RGB picture and mask (class ids, 0 = background), both SIZE x SIZE pixels
    """
    rng = np.random.default_rng((20, abs(number), number < 0))
    ground = Image.fromarray(rng.integers(40, 216, (9, 9), np.uint8))
    ground = np.asarray(ground.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    ground = np.clip(ground + rng.normal(0, 24, (SIZE, SIZE)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(ground).convert("RGB")
    mask = Image.new("L", (SIZE, SIZE), 0)
    for i in rng.choice(CLASSES, size=rng.integers(1, 5), replace=False).tolist():
        label = i + 1
        radius, angle = rng.uniform(13, 23), rng.uniform(0, 2 * np.pi)
        centre = complex(*rng.uniform(radius / 2, SIZE - radius / 2, 2))
        points = centre + radius * np.exp(1j * angle) * outline(label)
        corners = list(zip(points.real, points.imag, strict=True))
        hue, saturation, value = rng.uniform((-0.01, 0.7, 0.75), (0.01, 1, 1))
        colour = colorsys.hsv_to_rgb((STRIDE * i / CLASSES + hue) % 1, saturation, value)
        ImageDraw.Draw(picture).polygon(corners, fill=tuple(int(255 * c) for c in colour))
        ImageDraw.Draw(mask).polygon(corners, fill=label)
    noisy = np.asarray(picture) + rng.normal(0, 12, (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), mask


def outline(label: int) -> np.ndarray:
    """The corners of a disc, square, oval or star: complex [n], at a distance of about 1 from 0."""
    kind = ("disc", "square", "oval", "star")[label % 4]
    corners = {"disc": 24, "square": 4, "oval": 24, "star": 10}[kind]
    circle = np.exp(2j * np.pi * np.arange(corners) / corners)
    if kind == "square":
        return 1.1 * circle
    if kind == "oval":
        return 1.25 * circle.real + 0.75j * circle.imag
    if kind == "star":
        return np.where(np.arange(corners) % 2, 0.8, 1.2) * circle
    return circle
