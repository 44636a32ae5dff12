"""What the five methods share: tasks, data, model, metric, and the run around their loops.

The border: if two papers could disagree about it, it is in the method file. In reading order:

    tasks       "15-1" and a number of classes -> steps
    data        VOC 2012, ADE20K, MSRC-v2, shapes; the images of a step, its labels, the transform
    model       DeepLabV3 with one 1x1 classifier per step
    metric      confusion matrix, IoU, the averages of the published tables
    run         checkpoints, resume, log, evaluation, pictures, report
    results     python common.py RUN ...: a table of finished runs beside the published numbers
    flags       the command line; --check-data and --download
"""

from __future__ import annotations

import argparse
import colorsys
import csv
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.segmentation.deeplabv3 import ASPP

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows: nothing keeps two processes out of one folder there

BACKGROUND = 0
IGNORE = 255
MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in 0 ... 1
STD = (0.229, 0.224, 0.225)
HERE = Path(__file__).resolve().parent
STRIP = (2**20, 2**26)  # numbers at a time in full-size maps: what the CPU's cache holds; on cuda
WINDOW = 10  # iterations per row of train.csv: the losses are read from the device once per window


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is all that the user gets to see."""


class Damaged(InputError):
    """A file of tensors that can be opened, but holds something else."""


# ---------------------------------------------------------------------------------------- tasks


class Step(NamedTuple):
    """One step of a task. Class ids are positions in the class order, 1 ... K; 0 is background."""

    index: int
    first: int  # the first class that is new in this step
    last: int  # the last one

    @property
    def old(self) -> range:
        return range(1, self.first)

    @property
    def new(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def channels(self) -> int:
        """The model's channels after this step: background, old and new classes."""
        return self.last + 1


def task_steps(task: str, classes: int) -> list[Step]:
    """`A-B`: A classes, then B at a time, the last step takes what is left. `offline`: all in one.

    InputError: another form, or no class left for a second step
    """
    if task == "offline":
        return [Step(0, 1, classes)]
    match = re.fullmatch("([0-9]{1,9})-([0-9]{1,9})", task)
    base, each = map(int, match.groups()) if match else (0, 0)
    if not (0 < base < classes and each > 0):
        raise InputError(
            f"--task {task}: expected A-B, A classes in the first step (here 1 to {classes - 1}), "
            f"then B at a time, such as 15-1; or offline for all {classes} classes in one step"
        )
    later = range(base + 1, classes + 1, each)
    return [
        Step(0, 1, base),
        *(Step(i, c, min(c + each - 1, classes)) for i, c in enumerate(later, 1)),
    ]


def class_order(file: str | None, names: Sequence[str]) -> list[int]:
    """The data set's ids (1 ... K) in the order in which they are learned.

    file    text, a class name or id per line, every class once; None = the data set's own order
    """
    ids = list(range(1, len(names) + 1))
    if file is None:
        return ids
    known = {name: i for i, name in enumerate(names, 1)} | {str(i): i for i in ids}
    lines = read_lines(file, "--class-order")
    if unknown := [line for line in lines if line not in known]:
        raise InputError(
            f"--class-order {file}: no class is called {unknown[0]!r}; there are {', '.join(names)}"
        )
    order = [known[line] for line in lines]
    if sorted(order) != ids:
        missing = [names[i - 1] for i in ids if i not in order]
        twice = [names[i - 1] for i, n in Counter(order).items() if n > 1]
        raise InputError(
            f"--class-order {file}: every class once, please; missing {missing}, repeated {twice}"
        )
    return order


# ----------------------------------------------------------------------------------------- data


class Source(NamedTuple):
    """A data set. A sample is (picture, mask): two paths, or twice a drawn picture's number."""

    train: list[tuple]
    test: list[tuple]
    where: str


FOLDERS = {  # the release's folder, and what must lie in it
    "voc": ("VOCdevkit/VOC2012", "SegmentationClassAug"),
    "ade": ("ADEChallengeData2016", "annotations"),
    "msrc": ("MSRC_ObjCategImageDatabase_v2", "GroundTruth"),
    "folder": (".", "train/masks"),
}
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
DATASETS = (*FOLDERS, "shapes")


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of data/NAME.csv."""
    with open(HERE / "data" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def class_table(dataset: str, data: str = "") -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names and colours of the ids 0 ... K. Own pictures have names in `data`/classes.txt."""
    if dataset == "folder":
        file = Path(data) / "classes.txt"
        if not file.exists():
            raise InputError(f"--dataset folder: no {file}\n{how_to_get(dataset)}")
        names = ["background", *read_lines(file, "--dataset folder:")]
        if not 1 < len(set(names)) == len(names) <= IGNORE:
            raise InputError(f"{file}: 1 to 254 classes, each once, without background (number 0)")
        # hues a golden section apart, light and dark in turn
        hsv = ((0.618 * i, (1, 0.55)[i // 2 % 2], (1, 0.65)[i % 2]) for i in range(len(names) - 1))
        colours = [tuple(int(255 * v) for v in colorsys.hsv_to_rgb(*c)) for c in hsv]
        return names, [(0, 0, 0), *colours]
    rows = read_table(dataset)
    colours = [tuple(int(row[k]) for k in ("red", "green", "blue")) for row in rows]
    return ["background", *(row["name"] for row in rows)], [(0, 0, 0), *colours]


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text file, stripped, without empty ones."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {path}: cannot be read as text ({error})") from None
    return [line.strip() for line in lines if line.strip()]


def read_names(path: Path) -> list[str]:
    """Names without folder and ending, from lines `x` or `/JPEGImages/x.jpg /Masks/x.png`."""
    return [Path(line.split()[-1]).stem for line in read_lines(path, "list")]


def open_source(dataset: str, data: str, held_out: float = 0.0) -> Source:
    """Lists a data set's training and test samples; opens no picture.

    data        the folder in which the release was unpacked, or the release's own folder
    held_out    this fraction of the training samples becomes the test list: for tuning, since the
                papers' test images are the official validation images
    InputError  no such folder or list; the message names the places that were tried
    """
    if dataset == "shapes":
        root, train = Path("drawn"), [(i, i) for i in range(SHAPES_TRAIN)]
        test = [(i, i) for i in range(-SHAPES_TEST, 0)]
    else:
        folder, needed = FOLDERS[dataset]
        places = Path(data) / folder, Path(data) / Path(folder).name, Path(data)
        tried = [*dict.fromkeys(places)]
        root = next((path for path in tried if (path / needed).is_dir()), None)
        if root is None:
            raise InputError(
                f"--dataset {dataset}: no {needed} in any of\n"
                + "".join(f"    {path}\n" for path in tried)
                + how_to_get(dataset)
                + "To see the method run first, without any data:\n"
                + f"    python {Path(sys.argv[0]).name} --task 15-1 --dataset shapes"
            )
        readers = (voc_samples, ade_samples, msrc_samples, folder_samples)  # in FOLDERS' order
        train, test = dict(zip(FOLDERS, readers, strict=True))[dataset](root)
    if held_out:
        out = [int((i + 1) * held_out) > int(i * held_out) for i in range(len(train))]
        test = [s for s, is_out in zip(train, out, strict=True) if is_out]
        train = [s for s, is_out in zip(train, out, strict=True) if not is_out]
    if not train or not test:
        raise InputError(
            f"--dataset {dataset}: {root} lists no {'test' if train else 'training'} image"
        )
    return Source(train, test, str(root))


def how_to_get(dataset: str) -> str:
    """The data set's section of data/README.md."""
    text = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    return text.split(f"--dataset {dataset}`\n")[1].split("\n## ")[0].strip() + "\n"


def voc_samples(root: Path) -> tuple[list, list]:
    masks, lists = root / "SegmentationClassAug", root / "ImageSets" / "Segmentation"
    test = read_names(lists / "val.txt")
    if (lists / "train_aug.txt").exists():
        train = read_names(lists / "train_aug.txt")
    else:
        train = sorted({path.stem for path in masks.glob("*.png")} - set(test))
    return tuple(
        [(root / "JPEGImages" / f"{name}.jpg", masks / f"{name}.png") for name in names]
        for names in (train, test)
    )


def ade_samples(root: Path) -> tuple[list, list]:
    return tuple(
        [
            (root / "images" / part / f"{mask.stem}.jpg", mask)
            for mask in sorted((root / "annotations" / part).glob("*.png"))
        ]
        for part in ("training", "validation")
    )


def msrc_samples(root: Path) -> tuple[list, list]:
    """Trains on Train and Validation together (335 images), tests on Test (256)."""
    pictures = {path.stem: path for path in (root / "Images").glob("*_s.*")}
    train, validation, test = (
        [
            (pictures.get(n, root / "Images" / f"{n}.bmp"), root / "GroundTruth" / f"{n}_GT.bmp")
            for n in read_names(root / f"{part}.txt")
        ]
        for part in ("Train", "Validation", "Test")
    )
    return train + validation, test


def folder_samples(root: Path) -> tuple[list, list]:
    """Own pictures: train/images/x.jpg with train/masks/x.png; the same in test/."""
    return tuple(
        [
            (file, root / part / "masks" / f"{file.stem}.png")
            for file in sorted((root / part / "images").glob("*"))
            if file.suffix.lower() in PICTURES
        ]
        for part in ("train", "test")
    )


SHAPES_TRAIN, SHAPES_TEST, SHAPES_SIZE = 1000, 200, 72  # pictures, pictures, pixels


@functools.cache
def draw(number: int) -> tuple[Image.Image, Image.Image]:
    """A picture of `shapes`, and its mask: one to four objects on a rough grey ground.

    Class k = 1 ... 20 has the k-th of 20 hues and one of four outlines.
    """
    rng, size = np.random.default_rng((20, abs(number), number < 0)), SHAPES_SIZE
    ground = Image.fromarray(rng.integers(40, 216, (9, 9), np.uint8))
    ground = np.asarray(ground.resize((size, size), Image.Resampling.BICUBIC))
    ground = np.clip(ground + rng.normal(0, 24, (size, size)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(ground).convert("RGB")
    mask = Image.new("L", (size, size), BACKGROUND)
    for label in rng.choice(20, size=rng.integers(1, 5), replace=False).tolist():
        radius, angle = rng.uniform(13, 23), rng.uniform(0, 2 * math.pi)
        centre = complex(*rng.uniform(radius / 2, size - radius / 2, 2))
        points = centre + radius * np.exp(1j * angle) * outline(label + 1)
        corners = list(zip(points.real, points.imag, strict=True))
        hue, saturation, value = rng.uniform((-0.01, 0.7, 0.75), (0.01, 1, 1))
        colour = colorsys.hsv_to_rgb((label / 20 + hue) % 1, saturation, value)
        ImageDraw.Draw(picture).polygon(corners, fill=tuple(int(255 * c) for c in colour))
        ImageDraw.Draw(mask).polygon(corners, fill=label + 1)
    noisy = np.asarray(picture) + rng.normal(0, 12, (size, size, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), mask


def outline(label: int) -> np.ndarray:
    """The corners of a disc, square, oval or star: complex numbers, about 1 away from 0."""
    corners = (24, 4, 24, 10)[label % 4]
    circle = np.exp(2j * np.pi * np.arange(corners) / corners)
    star = np.where(np.arange(corners) % 2, 0.8, 1.2) * circle
    return (circle, 1.1 * circle, 1.25 * circle.real + 0.75j * circle.imag, star)[label % 4]


def open_image(path: Path, what: str) -> Image.Image:
    """InputError: there is no such file, or it is not a picture."""
    try:
        with open(path, "rb") as file:
            image = Image.open(file)
            image.load()
            return image
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what}; --check-data lists all that miss") from None
    except Exception as error:  # damage can surface as anything
        raise InputError(f"{path}: not a readable {what} ({error})") from None


def read_picture(path: Path | int) -> Image.Image:
    """RGB, any kind of file. EXIF's rotation is not applied: VOC's masks lie as the pixels do."""
    if isinstance(path, int):
        return draw(path)[0]
    picture = open_image(path, "picture")
    if picture.mode.startswith("I"):  # 16 bits: the upper byte, as Pillow does with colours
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")


def pictures_in(given: str) -> list[Path]:
    """--predict: the pictures in a folder and the folders in it; a file stands for itself."""
    if not Path(given).is_dir():
        return [Path(given)]
    found = [path for path in Path(given).rglob("*") if path.suffix.lower() in PICTURES]
    if not found:
        raise InputError(f"--predict {given}: no picture in this folder ({' '.join(PICTURES)})")
    return sorted(found)


def read_mask(path: Path | int) -> Image.Image:
    """One byte per pixel: the data set's own ids, 255 = void. MSRC-v2's colours become ids here."""
    if isinstance(path, int):
        return draw(path)[1]
    mask = open_image(path, "mask")
    if mask.mode == "RGB" and path.suffix == ".bmp":
        ids = msrc_ids(mask)
        return Image.fromarray(np.where(ids == UNKNOWN, IGNORE, ids).astype(np.uint8))
    if mask.mode not in ("L", "P"):
        raise InputError(
            f"{path}: a mask has one class number per pixel (grey or palette), this has mode "
            f"{mask.mode}"
        )
    return mask


UNKNOWN = 254  # a colour that MSRC-v2 does not have
MSRC_VOID = ((0, 0, 0), (128, 0, 128), (64, 0, 0))  # unlabelled, horse, mountain


@functools.cache
def msrc_colours() -> np.ndarray:
    """uint8 [2^24]: packed RGB -> id, 255 for void, UNKNOWN for all other colours."""
    table = np.full(1 << 24, UNKNOWN, np.uint8)
    ids = enumerate(class_table("msrc")[1][1:], 1)
    for i, (red, green, blue) in (*((IGNORE, colour) for colour in MSRC_VOID), *ids):
        table[red << 16 | green << 8 | blue] = i
    return table


def msrc_ids(mask: Image.Image) -> np.ndarray:
    red, green, blue = np.moveaxis(np.asarray(mask, np.int32), 2, 0)
    return msrc_colours()[red << 16 | green << 8 | blue]


def class_sets(masks: Sequence[Path | int], classes: int) -> list[list[int]]:
    """The ids in each mask, without background and void.

    Read once per folder and kept in the user's cache, where a file's time and size tell changes.
    """

    def read(mask: Path | int) -> list[int]:
        return [i for i, n in enumerate(read_mask(mask).histogram()[:IGNORE]) if n and i]

    if isinstance(masks[0], int):
        return list(map(read, masks))
    folder = masks[0].parent.resolve()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ciss"
    cache /= f"classes-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"
    stamps = {f.name: [f.stat().st_mtime_ns, f.stat().st_size] for f in os.scandir(folder)}
    try:
        known = json.loads(cache.read_text())
        known = {name: entry for name, entry in known.items() if entry[0] == stamps.get(name)}
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        known = {}  # none yet, or not ours
    if unknown := sorted({mask for mask in masks if mask.name not in known}):
        print(f"reading {len(unknown)} masks in {folder}, once", flush=True)
        with ThreadPoolExecutor() as pool:
            for mask, ids in zip(unknown, pool.map(read, unknown), strict=True):
                known[mask.name] = [stamps.get(mask.name), ids]
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, known)
        except OSError:
            pass  # nowhere to keep it: the next run reads the masks again
    for mask in masks:
        if (ids := known[mask.name][1]) and ids[-1] > classes:
            raise InputError(f"{mask}: class number {ids[-1]}, but there are only {classes}")
    return [known[mask.name][1] for mask in masks]


def shown_classes(samples: Sequence[tuple], order: Sequence[int]) -> list[list[int]]:
    """The class ids, that is positions in the class order, in each sample."""
    position = {raw: c for c, raw in enumerate(order, 1)}
    sets = class_sets([mask for _, mask in samples], len(order))
    return [[position[raw] for raw in ids] for ids in sets]


def images_of_step(
    sets: Sequence[Sequence[int]], step: Step, setting: str, keep_later: bool = False
) -> list[int]:
    """Indices of a step's training images, from the class ids of each image.

    overlapped: at least one new class. disjoint, sequential: and no class of a later step, unless
    keep_later.
    """
    images = [i for i, ids in enumerate(sets) if any(c in step.new for c in ids)]
    if setting == "overlapped" or keep_later:
        return images
    return [i for i in images if max(sets[i]) <= step.last]


def without_image(images: Sequence[int], sets: Sequence, step: Step) -> list[int]:
    """A step's new classes that none of its images shows."""
    return sorted({*step.new} - {c for i in images for c in sets[i]})


def test_images(sets: Sequence[Sequence[int]], step: Step) -> list[int]:
    """Indices of the test images that show at least one class seen so far."""
    return [i for i, ids in enumerate(sets) if any(c <= step.last for c in ids)]


def train_labels(
    order: Sequence[int], step: Step, setting: str, ignore: Sequence[str], later: int = BACKGROUND
) -> np.ndarray:
    """uint8 [256]: the data set's ids -> training labels. Hidden classes become background.

    setting     new classes are shown; in "sequential" old ones too
    ignore      holds "void" if 255 stays; else it becomes background
    later       the label of classes of later steps
    """
    table = np.full(256, IGNORE, np.uint8)
    table[BACKGROUND] = BACKGROUND
    for c, raw in enumerate(order, 1):
        shown = c in step.new or (setting == "sequential" and c in step.old)
        hidden = later if c > step.last else BACKGROUND
        table[raw] = c if shown else hidden
    table[IGNORE] = IGNORE if "void" in ignore else BACKGROUND
    return table


def test_labels(order: Sequence[int], step: Step, ignore: Sequence[str]) -> np.ndarray:
    """uint8 [256]: the data set's ids -> test labels. Every class seen so far keeps its id.

    ignore      of "later" (classes of later steps) and "other" (the data set's own 0, ADE20K's
                "other"): those are ignored, else they become background
    """
    later, other = (IGNORE if name in ignore else BACKGROUND for name in ("later", "other"))
    table = np.full(256, IGNORE, np.uint8)
    table[BACKGROUND] = other
    for c, raw in enumerate(order, 1):
        table[raw] = c if c <= step.last else later
    return table


def crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The published crop: area 0.5-2.0 of the image, ratio 3/4-4/3; (left, top, right, bottom).

    A draw larger than the image is rejected; after ten, the largest centre crop of such a ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(0.5, 2.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers((width - w + 1, height - h + 1)).tolist()
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def train_view(
    picture: Image.Image, mask: Image.Image, crop: int, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """The random crop, resized to crop x crop, flipped with probability 1/2."""
    box = crop_box(*picture.size, rng)
    # cropped first: a resize with box would let pixels from outside into the picture's border
    picture = picture.crop(box).resize((crop, crop), Image.Resampling.BILINEAR)
    mask = mask.resize((crop, crop), Image.Resampling.NEAREST, box)
    if rng.random() < 0.5:
        flip = Image.Transpose.FLIP_LEFT_RIGHT
        picture, mask = picture.transpose(flip), mask.transpose(flip)
    return picture, mask


def test_view(
    picture: Image.Image, mask: Image.Image, crop: int
) -> tuple[Image.Image, Image.Image]:
    """Shorter side to `crop`, then centre crop, of picture and mask, in one resize call each."""
    width, height = picture.size
    w, h = (crop * side // min(width, height) for side in picture.size)
    left, top = round((w - crop) / 2), round((h - crop) / 2)
    x, y = width / w, height / h
    box = (left * x, top * y, min((left + crop) * x, width), min((top + crop) * y, height))
    picture = picture.resize((crop, crop), Image.Resampling.BILINEAR, box)
    return picture, mask.resize((crop, crop), Image.Resampling.NEAREST, box)


class View(torch.utils.data.Dataset):
    """Pictures and labels, uint8 tensors [crop, crop, 3] and [crop, crop]; keys: (epoch, index).

    labels      uint8 [256], the data set's ids -> labels; or one such table per sample
    seed        (run's seed, step): random training views, each drawn from (seed, step, epoch,
                index) alone, whatever the workers and interruptions; None: the test view
    """

    def __init__(
        self, samples: Sequence[tuple], labels: np.ndarray, crop: int, seed: tuple | None = None
    ) -> None:
        self.samples, self.crop, self.seed = samples, crop, seed
        self.labels = np.broadcast_to(labels, (len(samples), 256))

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        picture, mask = read_picture(self.samples[index][0]), read_mask(self.samples[index][1])
        if picture.size != mask.size:
            raise InputError(
                f"{self.samples[index][1]}: {mask.size} pixels, its picture has {picture.size}"
            )
        if self.seed is None:
            picture, mask = test_view(picture, mask, self.crop)
        else:
            rng = np.random.default_rng((*self.seed, epoch, index))
            picture, mask = train_view(picture, mask, self.crop, rng)
        return torch.from_numpy(np.array(picture)), torch.from_numpy(
            self.labels[index][np.asarray(mask)]
        )


def epoch_keys(indices: Sequence[int], batch: int, seed: tuple, start: int, stop: int) -> Iterator:
    """The keys of iterations start ... stop - 1: epochs in random order, full batches only."""
    per_epoch, epoch = max(1, len(indices) // batch), None
    for iteration in range(start, stop):
        if iteration // per_epoch != epoch:
            epoch = iteration // per_epoch
            order = np.random.default_rng((*seed, epoch)).permutation(indices).tolist()
        at = iteration % per_epoch * batch
        yield [(epoch, index) for index in order[at : at + batch]]


# ---------------------------------------------------------------------------------------- model


class SmallResNet(ResNet):
    """torchvision's ResNet, one block and 16, 32, 64, 128 channels per stage: trunk of `shapes`."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.inplanes = 16
        self.conv1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for i, stride in enumerate((1, 2, 2, 2)):
            setattr(self, f"layer{i + 1}", self._make_layer(BasicBlock, 16 << i, 1, stride))


BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "small")
MOBILENET_STAGES = (4, 7, 14, 18)  # ends of the stages of stride 4, 8, 16, 32 in its feature blocks


def before_relu(block: nn.Module, x: Tensor) -> Tensor:
    """A torchvision residual block without its last ReLU."""
    shortcut = block.downsample(x) if block.downsample else x
    x = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    if isinstance(block, Bottleneck):
        x = block.bn3(block.conv3(block.relu(x)))
    return x + shortcut


def dilate(stage: nn.Module, rate: int) -> None:
    """Takes a stage's stride out and widens its 3x3 convolutions to `rate`, the strided to half."""
    for conv in stage.modules():
        if isinstance(conv, nn.Conv2d):
            strided, conv.stride = conv.stride != (1, 1), (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (rate // 2 if strided else rate,) * 2


class DeepLabV3(nn.Module):
    """DeepLabV3 (Chen et al., arXiv 1706.05587) from torchvision's parts, a classifier per step.

    backbone        one of BACKBONES
    output_stride   8 or 16
    classes         number of new classes of each step so far, such as [15, 1]
    dropout         probability behind the ASPP (torchvision: 0.5)
    bf16            runs the network under autocast; what comes out as logits is float32
    classifiers     1x1 convolutions: [0] background, one channel; [1] the first step's classes; ...
    """

    def __init__(
        self,
        backbone: str,
        output_stride: int,
        classes: Sequence[int],
        dropout: float = 0.5,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.bf16 = bf16
        width, rates = 256, {16: (6, 12, 18), 8: (12, 24, 36)}[output_stride]
        if backbone == "small":
            trunk, width, rates = SmallResNet(), 64, (1, 2, 3)  # for crops of 64 pixels
        else:
            trunk = torchvision.models.get_model(backbone, weights=None)
        if backbone == "mobilenet_v2":
            blocks, channels = trunk.features[:18], 320
            trunk = nn.ModuleDict({"features": blocks})
            ends = (0, *MOBILENET_STAGES)
            stages = [blocks[a:b] for a, b in itertools.pairwise(ends)]
        else:
            channels = trunk.inplanes  # torchvision counts them while it builds the stages
            del trunk.avgpool, trunk.fc
            stages = [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
        if output_stride == 8:
            dilate(stages[2], 2)
        dilate(stages[3], 32 // output_stride)
        self.trunk = trunk
        self.aspp = ASPP(channels, rates, width)
        self.aspp.project[3].p = dropout
        conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.head = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        self.classifiers = nn.ModuleList(nn.Conv2d(width, n, 1) for n in (1, *classes))

    def stages(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Stages 1-4, and the same before their last ReLU (MobileNetV2 has none there)."""
        after, before = [], []
        if isinstance(self.trunk, nn.ModuleDict):
            for i, block in enumerate(self.trunk["features"], 1):
                x = block(x)
                if i in MOBILENET_STAGES:
                    after.append(x)
            return after, after
        trunk = self.trunk
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))
        for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
            before.append(before_relu(stage[-1], stage[:-1](x)))
            x = F.relu(before[-1])
            after.append(x)
        return after, before

    def forward(self, images: Tensor, upsample: bool = True) -> tuple[Tensor, dict]:
        """
        images      float [B, 3, H, W], normalised
        returns     logits float32 [B, C, H, W], channel = class id, bilinearly upsampled, or as
                    they are, [B, C, h, w]; features: "stages", "before_relu" (4 maps each),
                    "branches" (5 ASPP maps), "head" [B, D, h, w] (the classifiers' input), "logits"
                    [B, C, h, w]
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            after, before = self.stages(images)
            branches = [branch(after[-1]) for branch in self.aspp.convs]
            head = self.head(self.aspp.project(torch.cat(branches, 1)))
            small = torch.cat([classifier(head) for classifier in self.classifiers], 1)
        small = small.float().contiguous()  # not channels last: losses take slices of channels
        logits = F.interpolate(small, images.shape[2:], mode="bilinear") if upsample else small
        maps = {"stages": after, "before_relu": before, "branches": branches}
        return logits, maps | {"head": head, "logits": small}

    def weight(self) -> Tensor:
        """The classifiers' weights [C, D]; row = class id."""
        return torch.cat([classifier.weight.flatten(1) for classifier in self.classifiers])


def bilinear(maps: Tensor, dim: int, size: int) -> Tensor:
    """[size, n]: the matrix by which bilinear upsampling multiplies a dimension of n to `size`."""
    n = maps.shape[dim]
    eye = torch.eye(n, device=maps.device, dtype=maps.dtype)
    return F.interpolate(eye[None, None], (size, n), mode="bilinear")[0, 0]


def load_trunk(model: DeepLabV3, backbone: str, weights: str) -> str:
    """Loads a trunk; says in one line what was loaded and what stays random.

    weights     "imagenet" (torchvision's IMAGENET1K_V1, the papers' kind), "none", or a file with
                a state dict in torchvision's names, which may cover the trunk in part
    InputError  no network, no such file, or weights of another network
    """
    if weights == "none":
        return "random"
    if weights == "imagenet":
        try:
            kind = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
            state = kind.get_state_dict(progress=True)
        except (OSError, ValueError) as error:
            raise InputError(
                f"--weights imagenet: not to be had for {backbone} ({error}). Give a file of "
                "torchvision's weights (--weights FILE), or --weights none to start at random"
            ) from None
    else:
        state = read_checkpoint(weights, "--weights")
    target = model.trunk.state_dict()
    fits = {
        k: state[k] for k, v in target.items() if getattr(state.get(k), "shape", None) == v.shape
    }
    wrong = [k for k in state if k in target and k not in fits]
    if wrong or not fits:
        reason = f"{wrong[0]} has another shape" if wrong else "none of its names is the trunk's"
        raise InputError(f"--weights {weights}: not weights of {backbone} ({reason})")
    model.trunk.load_state_dict(fits, strict=False)
    missing = [k for k in target if k not in fits and not k.endswith("num_batches_tracked")]
    return f"{len(fits)} tensors from {weights}; random stay: {', '.join(missing) or 'none'}"


# --------------------------------------------------------------------------------------- metric


def confusion_matrix(labels: Tensor, predicted: Tensor, channels: int) -> Tensor:
    """int64 [C, C], rows = truth; pixels whose label is no channel (255) are left out."""
    valid = labels < channels
    pairs = labels[valid] * channels + predicted[valid]
    return torch.bincount(pairs, minlength=channels**2).view(channels, channels)


def iou_per_class(confusion: Tensor) -> Tensor:
    """float64 [C], percent; NaN for a class without a pixel in the truth, so that means skip it."""
    hit, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    return torch.where(truth > 0, 100 * hit.double() / (truth + predicted - hit), torch.nan)


def accuracies(confusion: Tensor) -> tuple[float, float]:
    """Percent of pixels that are right, over all and as the mean over the classes in the truth."""
    hit = 100 * confusion.diag().double()
    return (hit.sum() / confusion.sum()).item(), (hit / confusion.sum(1)).nanmean().item()


def averages(iou: Tensor, base: int, background: bool) -> dict[str, float]:
    """base / new / all / harmonic, percent; base = classes 1 ... `base`, new = all later ones.

    background      True: class 0 is part of base and all (PLOP, RCIL, SSUL, DKD)
                    False: it is left out (MiB, UCD)
    """
    start = 0 if background else 1
    old, new = iou[start : base + 1].nanmean().item(), iou[base + 1 :].nanmean().item()
    harmonic = 2 * old * new / (old + new) if old + new else 0.0
    return {"base": old, "new": new, "all": iou[start:].nanmean().item(), "harmonic": harmonic}


def most_likely(logits: Tensor) -> Tensor:
    """Class ids [B, H, W]: the channel with the largest logit, as all softmax methods predict."""
    return logits.argmax(1)


# ------------------------------------------------------------------------------------- pictures


def overlay(picture: Image.Image, labels: np.ndarray, palette: Sequence[tuple]) -> Image.Image:
    """The picture in grey under the classes' colours; background stays clear, 255 becomes white."""
    colours = np.full((256, 3), 255, np.uint8)
    colours[: len(palette)] = palette
    grey = np.asarray(picture.convert("L"))[..., None]
    mixed = np.where(labels[..., None] == BACKGROUND, grey, 0.35 * grey + 0.65 * colours[labels])
    return Image.fromarray(mixed.astype(np.uint8))


def legend(entries: Sequence[tuple], width: int, size: int) -> Image.Image:
    """(name, colour) pairs in columns as wide as the longest name; text of `size` pixels."""
    font = ImageFont.load_default(size)
    column = max((int(font.getlength(name)) for name, _ in entries), default=0) + 3 * size
    per_line, line = max(1, width // column), size * 3 // 2
    page = Image.new("RGB", (max(width, column), -(-len(entries) // per_line) * line), "white")
    pen = ImageDraw.Draw(page)
    for i, (name, colour) in enumerate(entries):
        x, y = size // 2 + i % per_line * column, (i // per_line + 0.5) * line
        pen.rectangle((x, y - size // 2, x + size, y + size // 2), fill=colour, outline="black")
        pen.text((x + 1.5 * size, y), name, "black", font, "lm")
    return page


def sheet(rows: Sequence, titles: Sequence[str], entries: Sequence[tuple]) -> Image.Image:
    """Rows of pictures under column titles, and the legend; to be read at 800 pixels' width."""
    side, gap, width = 192, 6, len(titles) * 198 + 6
    size = max(14, width // 58)
    names, top = legend(entries, width, size), 2 * size
    height = top + len(rows) * (side + gap) + names.height + gap
    page = Image.new("RGB", (names.width, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size)
    for x, title in enumerate(titles):
        pen.text((gap + x * (side + gap) + side // 2, top // 2), title, "black", font, "mm")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            at = (gap + x * (side + gap), top + y * (side + gap))
            page.paste(picture.resize((side, side)), at)
    page.paste(names, (0, page.height - names.height - gap // 2))
    return page


def draw_confusion(confusion: np.ndarray, names: Sequence[str], base: int) -> Image.Image:
    """The confusion matrix, rows = truth, in percent of the row; red lines behind class `base`."""
    count, gap = len(confusion), 8
    cell, size = (34, 15) if count <= 40 else (15, 12)
    font = ImageFont.load_default(size)
    title = "rows: truth", "columns: predicted", "% of the row"
    margin = int(max(font.getlength(text) for text in (*title, *names[:count]))) + 2 * gap
    side = count * cell
    page = Image.new("RGB", (margin + side + gap,) * 2, "white")
    column = Image.new("RGB", (margin, side), "white")  # turned by 90 degrees when it is full
    pen, upright = ImageDraw.Draw(page), ImageDraw.Draw(column)
    for y, row in enumerate(confusion):
        at = margin + y * cell
        pen.text((margin - gap, at + cell // 2), names[y], "black", font, "rm")
        upright.text((gap, y * cell + cell // 2), names[y], "black", font, "lm")
        for x, share in enumerate(row / max(1, row.sum())):
            shade = tuple(round(255 - (255 - c) * share**0.5) for c in (20, 60, 130))
            corner = (margin + x * cell, at)
            box = (*corner, corner[0] + cell - 2, at + cell - 2)
            pen.rectangle(box, fill=shade if row.sum() else (225, 225, 225))
            if cell > 30 and share >= 0.005:
                middle = (corner[0] + cell // 2, at + cell // 2)
                ink = "white" if share > 0.3 else "black"
                pen.text(middle, f"{100 * share:.0f}", ink, font, "mm")
    page.paste(column.transpose(Image.Transpose.ROTATE_90), (margin, 0))
    if base + 1 < count:
        behind, end = margin + (base + 1) * cell - 1, margin + side
        pen.line((behind, 0, behind, end), "red", 2)
        pen.line((0, behind, end, behind), "red", 2)
    pen.multiline_text((gap, gap), "\n".join(title), "black", font)
    return page


# ------------------------------------------------------------------------------------------ run


def write_atomically(path: Path, write: Callable) -> None:
    """Writes beside the file, then renames: at any moment the old file or the new one is there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps the one in the other
        reason = getattr(error, "strerror", None) or str(error.__context__ or error)
        raise OSError(f"{path}: cannot be written ({' '.join(reason.split())})") from None
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give another --out DIR") from None


def read_checkpoint(path: str | Path, what: str) -> dict:
    """Tensors and plain values; a file that holds anything else is refused, no code in it runs."""
    try:
        if zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"wrong checksum of {bad}")  # torch does not look at them
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return dict(saved.items())
    except FileNotFoundError:
        raise InputError(f"{what} {path}: no such file") from None
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be read ({error})") from None
    except Exception as error:  # damage can surface as anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise Damaged(f"{what} {path}: not a file of tensors and plain values ({reason})") from None


def load_weights(model: nn.Module, saved: dict, path: str | Path) -> None:
    """A checkpoint's weights; those that a method has added to its model are left out."""
    try:
        state = saved["model"]
        model.load_state_dict({k: state[k] for k in model.state_dict()})
    except (KeyError, TypeError, RuntimeError):
        raise InputError(f"{path}: weights of another network than these flags give") from None


def poly(iteration: int, total: int, warmup: float = 0.0) -> float:
    """Factor of the rate: (1 - i/total)^0.9; in the first `warmup` part also 0.001 rising to 1."""
    progress = min(1.0, iteration / (warmup * total)) if warmup else 1.0
    return (1 - iteration / total) ** 0.9 * (0.001 * (1 - progress) + progress)


def per_step(values: Sequence, step: Step) -> float:
    """Flags of the schedule hold one value, or two: for step 0, and for the later steps."""
    return values[0] if step.index == 0 else values[-1]


def processes() -> tuple[int, int]:
    """This process's number, and how many torchrun has started: a device each."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


LAST_GOOD = "The last checkpoint is from before it; try a lower --lr in another --out"


class Strip(NamedTuple):
    """Some rows of a batch at full size. A mean over them counts as much as the part they are."""

    labels: Tensor  # int64 [B, r, W]
    logits: Tensor  # float [B, C, r, W]
    old_logits: Tensor | None  # float [B, O, r, W]
    valid: Tensor  # the part of the batch's valid pixels that lies in these rows
    all: float  # the part of all its pixels


class Run:
    """A run of a method over the steps of a task: all that is the same for every method.

    for step in run.steps():                      # finished ones are skipped
        old_model, model = run.models(step)
        net = run.start(step, model, groups)      # optimiser; goes on inside an unfinished step
        for images, labels in run.batches():
            for part in run.strips(labels, logits, old_logits):
                run.add(losses)                   # of full-size logits
            run.update(losses)                    # and all others
        run.finish(model)                         # checkpoint, metrics, pictures

    predict     logits [B, C, H, W] -> class ids [B, H, W]
    published   the method's name in data/published.csv
    """

    def __init__(self, args: argparse.Namespace, predict: Callable, published: str) -> None:
        self.args, self.predict, self.published = args, predict, published
        self.device = torch.device(args.device)
        self.mean, self.std = (
            255 * torch.tensor(v, device=self.device).view(3, 1, 1) for v in (MEAN, STD)
        )
        names, palette = class_table(args.dataset, args.data)
        self.order = class_order(args.class_order, names[1:])
        self.names, self.palette = (
            [values[raw] for raw in (BACKGROUND, *self.order)] for values in (names, palette)
        )
        self.plan = task_steps(args.task, len(self.order))
        name = f"{args.method}-{args.dataset}-{args.task}-{args.setting}-s{args.seed}"
        self.folder = Path(args.out) / (name + "-dry" * args.dry_run)
        self.results: list[dict] = []
        self.added: dict[str, Tensor] = {}
        self.small = self.leaf = None
        self.signal = 0
        self.rank, self.world = processes()

    def steps(self) -> Iterator[Step]:
        """The steps left to train, and the report after them. --eval and --predict leave none."""
        if self.args.predict:
            return self.predict_pictures()
        self.open_data()
        if self.args.eval:
            return self.evaluate_again()
        if not (self.folder / "config.json").exists():
            self.first_model()  # a bad --step0 or --weights is refused before there is a folder
        if self.rank == 0:
            self.open_folder()
        self.results = self.of_first(self.results)
        for step in self.plan[len(self.results) :]:
            torch.manual_seed(1000 * self.args.seed + step.index)
            if step.index == 0 and self.args.step0:
                model, text = self.first_model()
                self.log(text)
                self.conclude(step, model, {"taken_from": self.args.step0})
            else:
                yield step
        if self.rank == 0:
            (self.folder / "last.pt").unlink(missing_ok=True)  # killed after the last metrics.json
        self.log(self.table())
        self.log(f"weights, metrics.json, train.csv and pictures/ are in {self.folder}")

    def open_data(self) -> None:
        args = self.args
        self.source = open_source(args.dataset, args.data, args.held_out)
        self.sets = shown_classes(self.source.train, self.order)
        self.test_sets = shown_classes(self.source.test, self.order)
        self.images = [
            images_of_step(self.sets, step, args.setting, args.keep_later) for step in self.plan
        ]
        for step in self.plan:
            missing = without_image(self.images[step.index], self.sets, step)
            if missing:
                absent = ", ".join(self.names[c] for c in missing)
                raise InputError(
                    f"step {step.index} of --task {args.task} --setting {args.setting} has no "
                    f"image of {absent}: try another --setting, --task or --class-order"
                    + ", or --keep-later"
                    * (args.setting != "overlapped" and not args.keep_later)
                )

    def open_folder(self) -> None:
        """Makes the run's folder, or takes up the run that lies there."""
        args, config, metrics = self.args, self.folder / "config.json", self.folder / "metrics.json"
        try:
            self.lock()
            if args.dry_run:
                shutil.rmtree(self.folder)
                self.lock()
            for left in self.folder.glob(".*.[0-9]*"):
                left.unlink()  # half a file, of a process that was killed
        except OSError as error:
            raise InputError(f"--out {args.out}: cannot be written to ({error.strerror})") from None
        flags = {k: v for k, v in vars(args).items() if k not in ("eval", "predict")}
        if metrics.exists() or (self.folder / "last.pt").exists():
            there = read_json(config).get("flags", {})
            free = ("out", "device", "compile", "workers", "save_every", "step0")
            free += ("data",) * (args.dataset != "folder")  # there it is another data set
            differ = [k for k in flags if k not in free and flags[k] != there.get(k)]
            if differ:
                listed = ", ".join(f"{k} {there.get(k)} there, {flags[k]} here" for k in differ)
                raise InputError(f"{self.folder} holds another run ({listed}); give --out DIR")
        if metrics.exists():
            self.results = read_json(metrics).get("steps", [])
        # the next step starts from the newest model; if that is damaged it is trained again
        while (newest := self.folder / f"step_{len(self.results) - 1}.pt").exists():
            if self.checkpoint(newest):
                break
            self.results.pop()
            self.write_results()
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        cuda = self.device.type == "cuda"
        versions["device"] = torch.cuda.get_device_name(self.device) if cuda else "cpu"
        content = {"flags": flags, "versions": versions, "commit": git_commit()}
        write_json(config, content | {"published": self.published, "classes": self.names})
        shutil.copy(sys.argv[0], self.folder)
        train, test = len(self.source.train), len(self.source.test)
        counts = " ".join(str(len(images)) for images in self.images)
        self.log(
            f"run      {self.folder}" + f", {len(self.results)} steps done" * bool(self.results)
        )
        self.log(f"data     {self.source.where}: {train} training and {test} test images")
        self.log(f"steps    {counts} training images")
        self.log("flags    " + ", ".join(f"{k} {v}" for k, v in flags.items() if v is not None))
        self.log("versions " + ", ".join(f"{k} {v}" for k, v in versions.items()))

    def lock(self) -> None:
        """Makes the folder, and keeps other processes out of it for as long as this one lives."""
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT)
        weakref.finalize(self, os.close, lock)
        try:
            if fcntl:  # lockf: the workers, which may live a little longer, do not inherit it
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(
                f"{self.folder}: another process is at work in it; wait for it, or give --out DIR"
            ) from None
        except OSError:
            pass  # a file system without locks

    def checkpoint(self, path: Path) -> dict | None:
        """A checkpoint of this run. None: it is damaged; that is said, and it is set aside."""
        try:
            return read_checkpoint(path, "file")
        except Damaged as error:
            os.replace(path, f"{path}.damaged")
            self.log(f"{error}; set aside as {path.name}.damaged")
            return None

    def of_first(self, value: object) -> object:
        """What the first process has, once it has got here."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def log(self, text: str) -> None:
        """To the terminal and to log.txt."""
        if self.rank:
            return
        print(text, flush=True)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def labels(self, step: Step, setting: str | None = None) -> np.ndarray:
        """uint8 [256]: the data set's ids -> a step's training labels.

        MSRC-v2 has no background: where old classes are shown, later ones are ignored.
        """
        setting = setting or self.args.setting
        ignored = self.args.dataset == "msrc" and setting == "sequential"
        later = IGNORE if ignored else BACKGROUND
        return train_labels(self.order, step, setting, self.args.ignore, later)

    def build(self, step: Step) -> DeepLabV3:
        """The network as it is in a step, with random weights."""
        args, classes = self.args, [len(s.new) for s in self.plan[: step.index + 1]]
        bf16 = args.precision == "bf16"
        model = DeepLabV3(args.backbone, args.output_stride, classes, args.dropout, bf16)
        for module in model.trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = args.bn_momentum
        if args.compile:  # the trunk alone: it never grows
            model.stages = torch.compile(model.stages)
        return model.to(self.device, memory_format=torch.channels_last)

    def load(self, step: Step) -> DeepLabV3:
        """The finished model of a step, frozen. What a method has added to it is left out."""
        path, model = self.folder / f"step_{step.index}.pt", self.build(step)
        load_weights(model, read_checkpoint(path, "file"), path)
        return model.eval().requires_grad_(False)

    def first_model(self) -> tuple[DeepLabV3, str]:
        """Step 0's network, and where it comes from: --step0, if of the same kind, or --weights."""
        args, step, path = self.args, self.plan[0], self.args.step0
        if path is None:
            model = self.build(step)
            return model, f"trunk    {load_trunk(model, args.backbone, args.weights)}"
        saved = read_checkpoint(path, "--step0")
        try:
            there = saved["flags"] | {"classes": saved["classes"][0], "step": saved["step"]}
            here = vars(args) | {"classes": [self.names[c] for c in step.new], "step": 0}
            for one in (there, here):  # in a first step, disjoint and sequential are the same
                one["setting"] = one["setting"].replace("sequential", "disjoint")
        except (LookupError, TypeError, AttributeError):
            raise InputError(f"--step0 {path}: not a step_0.pt") from None
        network = ("backbone", "output_stride", "head")
        for key in ("step", "dataset", "classes", "setting", "keep_later", *network):
            if there.get(key) != here[key]:
                raise InputError(
                    f"--step0 {path}: another {key}: {there.get(key)} there, {here[key]} here"
                )
        model = self.build(step)
        load_weights(model, saved, path)
        return model, f"step 0 is {path}"

    def models(self, step: Step) -> tuple[DeepLabV3 | None, DeepLabV3]:
        """The frozen model of the step before (None in step 0); its copy with a new classifier."""
        if step.index == 0:
            model, text = self.first_model()
            self.log(text)
            return None, model
        model = self.build(step)
        old_model = self.load(self.plan[step.index - 1])
        model.load_state_dict(old_model.state_dict(), strict=False)
        return old_model, model

    # the loop

    def start(
        self,
        step: Step,
        model: DeepLabV3,
        groups: list[dict],
        labels: np.ndarray | None = None,
        memory: Sequence[tuple[int, np.ndarray]] = (),
    ) -> nn.Module:
        """Begins a step, or goes on inside it; returns the network to call.

        groups      parameter groups with lr and weight_decay: SGD, Nesterov momentum 0.9
        labels      uint8 [256], the data set's ids -> labels; None = self.labels(step)
        memory      further training images, each with its labels, uint8 [256]
        """
        args, train = self.args, self.source.train
        self.step, self.model, self.window = step, model, []
        if labels is None:
            labels = self.labels(step)
        samples = [*train, *(train[i] for i, _ in memory)]
        tables = np.stack([*([labels] * len(train)), *(table for _, table in memory)])
        self.view = View(samples, tables, args.crop, (args.seed, step.index))
        self.indices = [*self.images[step.index], *range(len(train), len(samples))]
        self.total = self.iterations(step, len(self.indices))
        images = min(args.batch, len(self.indices)) // self.world
        if not images:
            count, known = len(self.indices), f"{self.world} processes"
            raise InputError(f"step {step.index} has {count} images for {known}: start fewer")
        if images == 1:
            # the pooling branch has one value per image and channel: one image has no variance
            model.aspp.convs[-1][2].eval()
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=fused)
        self.rates = [group["lr"] for group in groups]
        shown = Counter(c for i in self.images[step.index] for c in self.sets[i])
        new = ", ".join(f"{self.names[c]} ({shown[c]})" for c in step.new)
        last, count = len(self.plan) - 1, len(self.indices)
        self.log(f"step {step.index} of 0-{last}: learns {new} from {count} images")
        self.resume()
        if self.world == 1:
            return model
        if self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        warnings.filterwarnings("ignore", message="Grad strides do not match")  # of 1x1 kernels
        return nn.parallel.DistributedDataParallel(model)

    def iterations(self, step: Step, images: int) -> int:
        """Of a step: full batches per epoch, times the epochs."""
        total = max(1, images // self.args.batch) * per_step(self.args.epochs, step)
        return min(2, total) if self.args.dry_run else total

    def resume(self) -> None:
        """Takes up last.pt if it belongs to this step, and the rows of train.csv up to there."""
        path, table = self.folder / "last.pt", self.folder / "train.csv"
        saved = self.checkpoint(path) if path.exists() else None
        self.iteration, self.seconds = 0, 0.0
        if saved and saved.get("step") == self.step.index:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"])
            if self.device.type == "cuda" and "cuda_rng" in saved:  # dropout's
                torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
            self.iteration, self.seconds = saved["iteration"], saved["seconds"]
            self.window = [losses.to(self.device) for losses in saved.get("window", ())]
            self.log(f"  goes on at iteration {self.iteration} of {self.total}")
        here = (self.step.index, self.iteration)
        rows = csv.DictReader(table.read_text().splitlines()) if table.exists() else ()
        self.rows = [r for r in rows if (int(r["step"]), int(r["iteration"])) <= here]
        self.clock = self.shown = self.saved = time.monotonic()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The iterations left: images float [B, 3, H, W], normalised; labels int64 [B, H, W]."""
        args, seed = self.args, (self.args.seed, self.step.index)
        keys = epoch_keys(self.indices, args.batch, seed, self.iteration, self.total)
        whole = min(args.batch, len(self.indices)) // self.world * self.world
        keys = (batch[:whole][self.rank :: self.world] for batch in keys)
        # several processes would answer at different iterations: there a signal ends them at once
        on_stop(self.note if self.world == 1 else signal.SIG_DFL)
        try:
            yield from self.read(self.view, keys)
        finally:
            on_stop(leave if self.world == 1 else signal.SIG_DFL)
        self.answer()

    def note(self, number: int, _: object) -> None:
        """Inside the loop, SIGINT and SIGTERM wait for `answer`; the second one does not."""
        self.signal = number
        on_stop(leave)

    def answer(self, names: Sequence[str] = ()) -> None:
        """After SIGINT or SIGTERM: saves, and ends the program."""
        if self.signal:
            if self.window:
                self.read_window(names)
            self.save()
            self.log(f"  stopped and saved at iteration {self.iteration} of {self.total}")
            leave(self.signal)

    def sweep(
        self, samples: Sequence[tuple], labels: np.ndarray, indices: Sequence[int]
    ) -> Iterator:
        """Images and labels of the test views of some samples, each once, in order."""
        keys = [(0, i) for i in indices]
        batches = (keys[at : at + self.args.batch] for at in range(0, len(keys), self.args.batch))
        return self.read(View(samples, labels, self.args.crop), batches)

    def read(self, view: View, keys: Iterator[list]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches on the device. The workers live as long as the iterator: over all epochs."""
        loader = torch.utils.data.DataLoader(
            view,
            batch_sampler=keys,
            num_workers=self.args.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # not the global one: resuming must not change it
            worker_init_fn=let_main_answer,
        )
        for pictures, labels in loader:
            yield self.normalise(pictures), labels.to(self.device, non_blocking=True).long()

    def normalise(self, pictures: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> float [B, 3, H, W] on the device, channels last in memory."""
        pictures = pictures.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return (pictures - self.mean) / self.std

    def strips(self, labels: Tensor, logits: Tensor, old_logits: Tensor | None = None) -> Iterator:
        """The batch at full size, a strip of rows at a time: no full-size map is kept or even made.

        labels                  int64 [B, H, W]
        logits, old_logits      float [B, C, h, w] and [B, O, h, w], not upsampled
        yields                  Strip; what bilinear upsampling gives for the batch, row by row.
                                The losses of several passes over the same logits add up
        """
        if logits is not self.small:
            self.small, self.leaf = logits, logits.detach().requires_grad_()
        height, width = labels.shape[1:]
        down, across = bilinear(logits, 2, height), bilinear(logits, 3, width).T
        valid = labels != IGNORE
        count = self.summed(valid.sum()).clamp(min=1) / self.world
        numbers = STRIP[logits.is_cuda]
        rows = max(1, numbers // (logits.shape[0] * logits.shape[1] * width))
        for top in range(0, height, rows):
            here = slice(top, min(top + rows, height))
            new = down[here] @ self.leaf @ across
            old = None if old_logits is None else down[here] @ old_logits @ across
            shown, part = valid[:, here].sum() / count, (here.stop - top) / height
            yield Strip(labels[:, here], new, old, shown, part)

    def add(self, losses: dict[str, Tensor]) -> None:
        """A strip's losses: their gradient is taken here, down to the logits before upsampling."""
        sum(losses.values()).backward()
        for name, loss in losses.items():
            self.added[name] = self.added.get(name, 0) + loss.detach()

    def update(self, losses: dict[str, Tensor]) -> None:
        """An optimiser step on the sum of the losses and those of add(), at the schedule's rate."""
        factor = poly(self.iteration, self.total, self.args.warmup)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        total = sum(losses.values())
        if self.added:  # this product's gradient is the one that add() has taken
            total = total + (self.small * self.leaf.grad).sum()
        total.backward()
        self.optimizer.step()
        losses, self.added, self.small = self.added | losses, {}, None
        self.window.append(torch.stack([loss.detach() for loss in losses.values()]))
        self.iteration += 1
        if self.iteration % WINDOW == 0 or self.iteration == self.total:
            self.end_window(list(losses), factor)
        self.answer(list(losses))

    def read_window(self, names: Sequence[str]) -> Tensor:
        """The losses since the last row of train.csv, from the device. Are they finite?"""
        values = (self.summed(torch.stack(self.window)) / self.world).double().cpu()
        for i, row in enumerate(values, self.iteration - len(values)):
            if not row.isfinite().all():
                parts = ", ".join(f"{n} {v:g}" for n, v in zip(names, row.tolist(), strict=True))
                raise FloatingPointError(
                    f"the loss is not finite in step {self.step.index}, iteration {i}: {parts}. "
                    + LAST_GOOD
                )
        return values

    def end_window(self, names: list[str], factor: float) -> None:
        """The losses of the last iterations: a row of train.csv, progress, last.pt."""
        values, self.window = self.read_window(names), []
        means = {n: f"{v:.5g}" for n, v in zip(names, values.mean(0).tolist(), strict=True)}
        place = {"step": self.step.index, "iteration": self.iteration, "lr_factor": f"{factor:.6f}"}
        self.rows.append(place | means)
        now, done, terminal = time.monotonic(), self.iteration == self.total, sys.stdout.isatty()
        if done or now - self.shown > (0.2 if terminal else 30):
            self.shown = now
            spent = self.seconds + now - self.clock
            todo, each = self.total - self.iteration, max(1, len(self.indices) // self.args.batch)
            epoch, epochs = (-(-count // each) for count in (self.iteration, self.total))
            text = f"  step {self.step.index} epoch {epoch}/{epochs}, "
            text += f"iteration {self.iteration}/{self.total}, "
            text += f"{clock(spent / self.iteration * todo)} left"
            later = [*zip(self.plan, self.images, strict=False)][self.step.index + 1 :]
            if later:  # they distil and keep memories: slower
                todo += sum(self.iterations(s, len(images)) for s, images in later)
                text += f" (run: {clock(spent / self.iteration * todo)} or more)"
            text += f", {self.iteration * self.args.batch / spent:.0f} images/s; "
            text += ", ".join(f"{name} {value}" for name, value in means.items())
            if terminal:  # the next line takes this one's place
                width = shutil.get_terminal_size().columns - 1
                print(f"{text[:width]}\033[K", end="\r", flush=True)
            if done or not terminal:
                self.log(text)
        if now - self.saved > self.args.save_every and self.rank == 0:
            self.save()

    def save(self) -> None:
        """train.csv, and last.pt to go on from."""
        weights = self.model.state_dict()
        if not all(value.isfinite().all() for value in weights.values()):
            place = f"step {self.step.index}, iteration {self.iteration}"
            raise FloatingPointError(f"the weights are not finite in {place}. {LAST_GOOD}")
        now = time.monotonic()
        self.seconds, self.clock, self.saved = self.seconds + now - self.clock, now, now
        header = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [header, *([str(row.get(key, "")) for key in header] for row in self.rows)]
        text = "".join(",".join(line) + "\n" for line in lines)
        write_atomically(self.folder / "train.csv", lambda file: file.write(text.encode()))
        state = {"model": weights, "window": self.window, "optimizer": self.optimizer.state_dict()}
        state |= {"rng": torch.get_rng_state(), "step": self.step.index}
        state |= {"iteration": self.iteration, "seconds": self.seconds}
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        write_atomically(self.folder / "last.pt", lambda file: torch.save(state, file))

    # after the loop

    def finish(self, model: DeepLabV3) -> None:
        """Ends a step. It counts as done once metrics.json holds it; until then last.pt stays."""
        timing = {}
        if self.rank == 0:
            self.save()
            images = self.total * min(self.args.batch, len(self.indices))
            timing = {"images_per_second": images / self.seconds, "minutes": self.seconds / 60}
        if self.device.type == "cuda":
            timing["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
        self.conclude(self.step, model, timing)
        if self.rank == 0:
            (self.folder / "last.pt").unlink()

    def conclude(self, step: Step, model: DeepLabV3, timing: dict) -> None:
        """Evaluation, pictures, step_K.pt, metrics.json."""
        model.eval()
        result = self.evaluate(step, model, timing)
        self.results.append(result)
        if self.rank == 0:
            self.write_step(step, model)
        self.of_first(None)  # the others wait here: they read its file next
        self.log(f"  {summary(result)}")

    def write_step(self, step: Step, model: DeepLabV3) -> None:
        self.draw_predictions(step, model)
        confusion = np.array(self.results[-1]["confusion"])
        page = draw_confusion(confusion, self.names, self.plan[0].last)
        page.save(self.folder / "pictures" / f"confusion_{step.index}.png")
        content = {
            "model": model.state_dict(),
            "step": step.index,
            "classes": [[self.names[c] for c in s.new] for s in self.plan[: step.index + 1]],
            "flags": vars(self.args),
        }
        write_atomically(
            self.folder / f"step_{step.index}.pt", lambda file: torch.save(content, file)
        )
        self.write_results()

    def write_results(self) -> None:
        content = {"average": self.average(), "steps": self.results}
        write_json(self.folder / "metrics.json", without_nan(content))

    @torch.no_grad()
    def evaluate(self, step: Step, model: DeepLabV3, timing: dict) -> dict:
        """One step's entry of metrics.json, in percent, on test images with a class seen so far."""
        args, begun, channels = self.args, time.monotonic(), step.channels
        images = test_images(self.test_sets, step)
        table = test_labels(self.order, step, args.ignore)
        confusion = torch.zeros(channels, channels, dtype=torch.int64, device=self.device)
        own = images[self.rank :: self.world]
        for pictures, labels in self.sweep(self.source.test, table, own):
            confusion += confusion_matrix(labels, self.predict(model(pictures)[0]), channels)
        confusion = self.summed(confusion).cpu()
        iou, (pixels, classes) = iou_per_class(confusion), accuracies(confusion)
        if args.dataset == "msrc":
            iou[BACKGROUND] = torch.nan  # it has no background
        result = {
            "step": step.index,
            "with_background": averages(iou, self.plan[0].last, True),
            "without_background": averages(iou, self.plan[0].last, False),
            "pixel_accuracy": pixels,
            "mean_class_accuracy": classes,
            "iou": dict(zip(self.names, iou.tolist(), strict=False)),
            "confusion": confusion.tolist(),
            "training_images": len(self.images[step.index]),
            "test_images": len(images),
            "timing": timing | {"evaluation_minutes": (time.monotonic() - begun) / 60},
        }
        return without_nan(result)

    @torch.no_grad()
    def draw_predictions(self, step: Step, model: DeepLabV3) -> None:
        """pictures/step_K.png: up to six test pictures with classes from all over the task, their
        truth, and their predictions after up to six of the steps so far."""
        chosen: list[int] = []
        for c in np.linspace(1, len(self.order), 6).round():
            fitting = (i for i, ids in enumerate(self.test_sets) if c in ids and i not in chosen)
            chosen += list(fitting)[:1]
        truth = test_labels(self.order, self.plan[-1], ["later"])
        view = View(self.source.test, truth, self.args.crop)
        pixels, labels = zip(*(view[0, i] for i in chosen or [0]), strict=True)
        columns = {"truth": [map_.numpy() for map_ in labels]}
        for k in sorted({*np.linspace(0, step.index, 6).round().astype(int).tolist()}):
            file = self.folder / "pictures" / f"predicted_{k}.png"  # for the sheets to come
            if k == step.index:
                side_by_side = Image.fromarray(np.hstack([self.segment(model, p) for p in pixels]))
                side_by_side.putpalette(sum(self.palette, ()))
                side_by_side.save(file)
            if file.exists():
                columns[f"after step {k}"] = np.hsplit(np.array(Image.open(file)), len(pixels))
        pictures = [Image.fromarray(p.numpy()) for p in pixels]
        shown = {c for column in columns.values() for map_ in column for c in np.unique(map_)}
        rows = [
            [picture, *(overlay(picture, map_, self.palette) for map_ in maps)]
            for picture, *maps in zip(pictures, *columns.values(), strict=True)
        ]
        page = sheet(rows, ("picture", *columns), self.entries(shown))
        page.save(self.folder / "pictures" / f"step_{step.index}.png")

    def entries(self, shown: set[int]) -> list[tuple]:
        """The legend's names and colours, as they look over grey."""
        patch = Image.new("L", (1, 1), 128)
        return [
            (
                "void" if c == IGNORE else self.names[c],
                overlay(patch, np.full((1, 1), c), self.palette).getpixel((0, 0)),
            )
            for c in sorted(shown - {BACKGROUND})
        ]

    def segment(self, model: DeepLabV3, pixels: Tensor) -> np.ndarray:
        """uint8 picture [H, W, 3] -> uint8 class ids [H, W]."""
        return self.predict(model(self.normalise(pixels[None]))[0])[0].byte().cpu().numpy()

    def evaluate_again(self) -> None:
        """--eval: evaluates every step_K.pt of the run, prints the table, writes nothing."""
        for step in self.plan:
            if (self.folder / f"step_{step.index}.pt").exists():
                self.results.append(self.evaluate(step, self.load(step), {}))
                if self.rank == 0:
                    print(f"step {step.index}: {summary(self.results[-1])}", flush=True)
        if not self.results:
            raise InputError(f"--eval: no step_0.pt in {self.folder}; without --eval it is trained")
        if self.rank == 0:
            print(self.table())

    @torch.no_grad()
    def predict_pictures(self) -> None:
        """--predict: the newest model on pictures of any size: overlay, class map, shares."""
        steps = [s for s in self.plan if (self.folder / f"step_{s.index}.pt").exists()]
        if not steps:
            raise InputError(f"--predict: no step_0.pt in {self.folder}; train first")
        model, names = self.load(steps[-1]), set()
        for path in itertools.chain(*map(pictures_in, self.args.predict)):
            picture = ImageOps.exif_transpose(read_picture(path))  # upright, as viewers show it
            size = [round(s * self.args.crop / min(picture.size)) for s in picture.size]
            small = np.array(picture.resize(size, Image.Resampling.BILINEAR))
            classes = Image.fromarray(self.segment(model, torch.from_numpy(small)))
            classes = classes.resize(picture.size, Image.Resampling.NEAREST)
            counts = {c: n for c, n in enumerate(classes.histogram()) if n}
            key = legend(self.entries({*counts}), picture.width, max(14, picture.width // 50))
            page = Image.new("RGB", (key.width, picture.height + key.height), "white")
            page.paste(overlay(picture, np.asarray(classes), self.palette))
            page.paste(key, (0, picture.height))
            name = "-".join(filter(None, (path.parent.name, path.stem)))
            while name in names:
                name += "_2"
            names.add(name)
            target = self.folder / "pictures" / name
            page.save(f"{target}_overlay.png")
            classes.putpalette(sum(self.palette, ()))
            classes.save(f"{target}_classes.png")
            percent = 100 / (picture.width * picture.height)
            shares = sorted(((n * percent, self.names[c]) for c, n in counts.items()), reverse=True)
            found = ", ".join(f"{name} {share:.1f} %" for share, name in shares)
            print(f"{path}: {found}; see {target}_overlay.png and _classes.png")

    def average(self) -> float:
        """Mean over the steps of the mIoU over the classes seen at each, background included."""
        values = [result["with_background"]["all"] for result in self.results]
        return float(np.mean(values or [math.nan]))

    def table(self) -> str:
        """A column per step; base, new, all with and without background; what was published."""
        base, last = self.plan[0].last, self.plan[len(self.results) - 1].last
        lines = ["mIoU, %".ljust(26) + "".join(f"step {r['step']}".rjust(8) for r in self.results)]
        for kind, first in (("with_background", 0), ("without_background", 1)):
            span = {
                "base": f"{first}-{base}",
                "new": f"{base + 1}-{last}",
                "all": f"{first}-{last}",
            }
            for key in ("base", "new", "all", "harmonic"):
                values = [r[kind][key] for r in self.results]
                title = f"{key} {span.get(key, '')}" + ", no background" * first
                cells = ("-" if v is None else f"{v:.2f}" for v in values)
                if values[-1] is not None and (first == 0 or key in ("base", "all")):
                    lines.append(title.ljust(26) + "".join(cell.rjust(8) for cell in cells))
        lines.append(f"average of 'all' over the steps: {self.average():.2f}")
        flags = self.args
        for r in published(flags.dataset, flags.task, flags.setting, self.published):
            values = ", ".join(f"{k} {r[v]}" for k, v in (("base", "old"), ("new", "new")) if r[v])
            lines.append(f"published: {values}, all {r['all']} ({counted(r)}; {r['source']})")
        return "\n".join(lines)


def clock(seconds: float) -> str:
    hours, seconds = divmod(round(seconds), 3600)
    return f"{hours}:{seconds // 60:02}:{seconds % 60:02}"


def summary(result: dict) -> str:
    shown = [f"{k} {v:.2f}" for k, v in result["with_background"].items() if v is not None]
    return f"mIoU {', '.join(shown)} on {result['test_images']} test images"


def without_nan(value: object) -> object:
    """NaN becomes None, which JSON has."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def git_commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# -------------------------------------------------------------------------------------- results


def published(dataset: str, task: str, setting: str, method: str) -> list[dict[str, str]]:
    """The rows of data/published.csv."""
    wanted = {"dataset": dataset, "task": task, "setting": setting, "method": method}
    return [row for row in read_table("published") if wanted.items() <= row.items()]


def counted(row: dict[str, str]) -> str:
    """What a published row's averages of base and all cover."""
    return "no background" if row["convention"].startswith("A") else "with background"


# what says nothing of the method, stands in a column of its own, or is no flag
UNSHOWN = {"task", "dataset", "setting", "seed", "data", "out", "step0", "save_every", "device"}
UNSHOWN |= {"precision", "workers", "method", "head", "dropout", "bn_momentum", "warmup"}
KINDS = ("base", "new", "all")


def read_run(given: str) -> dict:
    """A finished run, for the table. `given`: its folder, or NAME=folder.

    flags       those that differ from the script's recipe, as typed
    iou         per step: float64 [C], percent, NaN for a class that no test image shows
    InputError  no run there, one that is not finished, or one of a script that is not here
    """
    name, folder = given.split("=", 1) if "=" in given else ("", given)
    file = Path(folder) / "metrics.json"
    try:
        config = json.loads(file.with_name("config.json").read_text())
        steps, there = json.loads(file.read_text())["steps"], config["flags"]
        if f"{there['method']}.py" not in os.listdir(HERE):  # a stranger may have named it
            raise LookupError(f"there is no script {there['method']}.py here")
        made = importlib.import_module(there["method"]).flags()
        names = config.get("classes") or class_table(there["dataset"])[0]
        missing = len(task_steps(there["task"], len(names) - 1)) - len(steps)
        iou = [[math.nan if v is None else v for v in step["iou"].values()] for step in steps]
        own = f" {Path(there['data']).name}" * (there["dataset"] == "folder")
        columns = {
            "dataset": there["dataset"] + own,
            "task": there["task"],
            "setting": there["setting"],
            "trunk": f"{there['backbone']}, crop {there['crop']}",
            "tested on": f"{steps[-1]['test_images']} images",
            "device": f"{config['versions']['device']}, {there['precision']}",
            "torch": config["versions"]["torch"],
            "date": time.strftime("%Y-%m-%d", time.gmtime(file.stat().st_mtime)),
        }
    except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
        raise InputError(f"{folder}: no results of a run ({error})") from None
    if missing:
        raise InputError(f"{folder}: not finished, {missing} steps are missing")
    recipe = vars(made.parse_args(["--dataset", there["dataset"]]))
    fill_in(recipe)
    shown = {k: v for k, v in there.items() if k in recipe and k not in UNSHOWN}
    return columns | {
        "name": name or ("joint" if there["task"] == "offline" else config.get("published")),
        "published": config.get("published", name),
        "script": there["method"],
        "flags": [as_typed(k, v) for k, v in shown.items() if v not in (None, recipe[k])],
        "seed": there["seed"],
        "columns": [*columns],
        "iou": [torch.tensor(values, dtype=torch.float64) for values in iou],
        "minutes": [step["timing"].get("minutes", math.nan) for step in steps],
    }


def as_typed(key: str, value: object) -> str:
    """A flag as on the command line; of a path only the last part."""
    flag, values = "--" + key.replace("_", "-"), value if isinstance(value, list) else [value]
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    texts = (f"{v:g}" if isinstance(v, float) else Path(str(v)).name for v in values)
    return " ".join([flag, *texts])


def best_published(run: dict, method: str, covers: str = "") -> dict | None:
    """Of several rows one that covers the same, is a mean of several runs, has all numbers."""
    found = published(run["dataset"], run["task"], run["setting"], method)
    order = [(counted(r) == covers, bool(r["std"]), bool(r["old"])) for r in found]
    return found[order.index(max(order))] if found else None


def table_rows(runs: Sequence[dict]) -> list[dict]:
    """Runs that differ in the seed become a row with values [seeds, steps, 3]: base, new, all.

    The classes of a joint run are divided as in the first other task on its data set.
    """
    groups: dict[str, list[dict]] = {}
    for run in runs:
        same = ("name", "script", "dataset", "task", "setting", "tested on", "flags")
        groups.setdefault(str([run[key] for key in same]), []).append(run)
    rows = []
    for group in groups.values():
        like = run = group[0]
        if run["task"] == "offline":
            others = (r for r in runs if r["dataset"] == run["dataset"] and r["task"] != "offline")
            like = next(others, run)
        best = best_published(like, like["published"])
        covers = counted(best) if best else "with background"
        if like is not run:
            best = best_published(like, "Joint", covers)
        last = like["task"].split("-")[0]
        base = int(last) if last != "offline" else len(run["iou"][0])
        values = [[averages(iou, base, covers[:2] != "no") for iou in r["iou"]] for r in group]
        values = np.array([[[step[k] for k in KINDS] for step in steps] for steps in values])
        name = run["name"] or run["published"] or run["script"]
        new = {"name": name, "runs": group, "values": values, "best": best, "covers": covers}
        rows.append(run | new)
    return rows


def results_table(rows: Sequence[dict]) -> str:
    """Markdown. What is the same in every row stands once, above the table."""
    first, several = rows[0], len(rows) > 1
    shared = [f for f in first["flags"] if several and all(f in row["flags"] for row in rows)]
    lines = []
    for row in rows:
        line, best = {"method": row["name"]}, row["best"]
        for kind, values in zip(KINDS, row["values"][:, -1].T, strict=True):
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            line[kind] = "-" if np.isnan(values).any() else f"{values.mean():.1f}{spread}"
        line["seeds"] = ", ".join(str(seed) for seed in sorted(run["seed"] for run in row["runs"]))
        numbers = " / ".join(best[k] or "-" for k in ("old", "new", "all")) if best else "-"
        line["published"] = f"{numbers} ({counted(best)}; {best['source']})" if best else "-"
        line["averages"] = row["covers"]
        for key in row["columns"]:
            line[key] = ", ".join(sorted({run[key] for run in row["runs"]}))
        minutes = torch.tensor([run["minutes"] for run in row["runs"]]).nanmean(0)
        line["minutes"] = f"{minutes.nansum():.3g}" + " without step 0" * math.isnan(minutes[0])
        own = [f for f in row["flags"] if f not in shared]
        line["command"] = f"`{' '.join([row['script'] + '.py', *own])}`"
        lines.append(line)
    free = [key for key in lines[0] if several and key not in ("method", *KINDS, "seeds")]
    same = {k: lines[0][k] for k in free if len({line[k] for line in lines}) == 1}
    above = ["mIoU in %", *(f"{key} {value}" for key, value in same.items() if value != "-")]
    above += [f"flags `{' '.join(shared)}`"] * bool(shared)
    columns = [key for key in lines[0] if key not in same]
    cells = [columns, ["---"] * len(columns), *([line[k] for k in columns] for line in lines)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"{'; '.join(above)}\n\n{table}"


def draw_curves(rows: Sequence[dict], file: str) -> str:
    """mIoU over the steps: a line per row, a band of a standard deviation; says where it is."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "--curves needs one more package: pip install matplotlib"
    figure = Figure((11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    titles = ("base classes", "new classes", "all seen so far")
    for k, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.set(title=title, xlabel="step", ylabel="" if k else "mIoU, %")
        for row in rows:
            values = row["values"][:, :, k]
            mean, spread = values.mean(0), values.std(0, ddof=len(values) > 1)
            if len(mean) == 1:  # a joint run has one step, which the others are measured against
                axes.axhline(mean[0], color="0.4", ls="--", label=row["name"])
                continue
            (line,) = axes.plot(mean, marker="o", label=row["name"])
            band = range(len(mean)), mean - spread, mean + spread
            axes.fill_between(*band, color=line.get_color(), alpha=0.2, lw=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(ylim=(0, None))
    handles = axes.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"--curves {file}: cannot be written ({error})") from None
    return f"curves in {file}"


def flags() -> argparse.ArgumentParser:
    text = "Finished runs as a Markdown table: mean and spread over seeds, and what was published."
    made = argparse.ArgumentParser(description=text, allow_abbrev=False)
    text = "folders of runs; those that differ only in the seed share a row; NAME=RUN names it"
    made.add_argument("runs", metavar="RUN", nargs="+", help=text)
    text = "also draw mIoU over the steps, a line per row (needs matplotlib)"
    made.add_argument("--curves", metavar="FILE.png", help=text)
    return made


def report(args: argparse.Namespace) -> int:
    """python common.py RUN ...; what is no finished run is named and left out, status 2."""
    runs = []
    for given in args.runs:
        try:
            runs.append(read_run(given))
        except InputError as error:
            print(f"common.py: {error}", file=sys.stderr)
    if rows := table_rows(runs):
        print(results_table(rows))
        if args.curves:
            print(f"\n{draw_curves(rows, args.curves)}")
    return 0 if len(runs) == len(args.runs) else 2


# ---------------------------------------------------------------------------------------- flags


def parser(doc: str, recipes: dict[str, dict]) -> argparse.ArgumentParser:
    """The flags of every method. Those that stand in `recipes` default to recipes[data set]."""
    made = argparse.ArgumentParser(
        description=doc.split("\n\n")[0],
        usage="%(prog)s --task A-B [flags]; --help lists them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.set_defaults(recipes=recipes)

    def default(key: str) -> str:
        values = {}
        for name, recipe in recipes.items():
            text = " ".join(map(str, np.atleast_1d(recipe[key]))) or "none"
            values[text] = [*values.get(text, []), name]
        return "; ".join(f"{', '.join(names)}: {text}" for text, names in values.items())

    on = "store_true"
    settings = ("overlapped", "disjoint", "sequential")
    add = made.add_argument_group("task").add_argument
    text = "A classes, then B at a time; or offline: all at once (15-1; ade 100-50, msrc 16-5)"
    add("--task", metavar="A-B", help=text)
    text = "shapes: drawn, needs no files; folder: your own pictures, with voc's recipe (voc)"
    add("--dataset", choices=DATASETS, default="voc", help=text)
    text = "images of a step: any with a new class; none with later ones; old labels shown"
    add("--setting", choices=settings, default="overlapped", help=f"{text} (overlapped)")
    text = "disjoint, sequential: images that also show later classes stay; msrc needs it where "
    text += "a class is never seen without one of them (off)"
    add("--keep-later", action=on, help=text)
    add(
        "--data",
        metavar="DIR",
        default=str(HERE / "data"),
        help="data set, as data/README.md says (data/)",
    )
    add("--class-order", metavar="FILE", help="class names or ids, a line each (as in data/*.csv)")
    text = "pixels that are left out, not background: void (in training), later (classes of later "
    text += f"steps, in the test), other (ADE20K's id 0, in the test) ({default('ignore')})"
    add("--ignore", choices=("void", "later", "other"), nargs="*", metavar="WHAT", help=text)
    text = "test on this part of the training images, for tuning (0: on the test images)"
    add("--held-out", type=float, default=0.0, metavar="PART", help=text)
    text = "Two values: step 0, later steps. The defaults' sources: RECIPE in the script."
    add = made.add_argument_group("schedule", text).add_argument
    add(
        "--epochs",
        type=positive,
        metavar="N",
        nargs="+",
        help=f"over the step's images ({default('epochs')})",
    )
    add("--batch", type=positive, metavar="N", help=f"images per iteration ({default('batch')})")
    text = f"the trunk's learning rate; poly decay, power 0.9 ({default('lr')})"
    add("--lr", type=rate, metavar="RATE", nargs="+", help=text)
    text = f"side of the network's input, pixels ({default('crop')})"
    add("--crop", type=positive, metavar="PIXELS", help=text)
    add = made.add_argument_group("model").add_argument
    add("--backbone", choices=BACKBONES, help=f"the trunk ({default('backbone')})")
    text = f"of the trunk: imagenet (torchvision's), none (random), a file ({default('weights')})"
    add("--weights", metavar="FILE", help=text)
    text = f"input pixels per cell of the trunk's last map ({default('output_stride')})"
    add("--output-stride", type=int, choices=(8, 16), help=text)
    add = made.add_argument_group("system").add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda, cuda:1 (cuda where there is one)")
    add("--precision", choices=("bf16", "fp32"), help="of the network (bf16 on cuda, else fp32)")
    text = "the trunk with torch.compile, which takes minutes at the start (off)"
    add("--compile", action=on, help=text)
    text = "processes that read images (one a core, 8 at most; shapes 0)"
    add("--workers", type=natural, metavar="N", help=text)
    text = "of weights, order and augmentation (0)"
    add("--seed", type=natural, default=0, metavar="N", help=text)
    text = "seconds between checkpoints inside a step (60)"
    add("--save-every", type=rate, default=60, metavar="SECONDS", help=text)
    add = made.add_argument_group("output").add_argument
    text = "results go to DIR/METHOD-DATASET-TASK-SETTING-sSEED; a run there goes on (runs)"
    add("--out", metavar="DIR", default="runs", help=text)
    add("--step0", metavar="FILE", help="take this step_0.pt instead of training step 0")
    add("--eval", action=on, help="only evaluate the run's checkpoints")
    text = "only segment pictures, or folders of them, with the run's newest model"
    add("--predict", metavar="PICTURE", nargs="+", help=text)
    add("--dry-run", action=on, help="two iterations per step, all else real, own folder")
    add("--check-data", action=on, help="only check the files, and count images per step")
    add("--download", action=on, help="only fetch the data set (voc), or say where it comes from")
    return made


def natural(text: str, least: int = 0) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to 1e9")
    return int(text)


def positive(text: str) -> int:
    return natural(text, 1)


def rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e30:  # more overflows float32 in the optimiser
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1e30")
    return value


def above_zero(text: str) -> float:
    if not rate(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return rate(text)


def fill_in(flags: dict) -> None:
    """Takes what was not typed from the recipe of the data set; own pictures have that of VOC."""
    recipes = flags.pop("recipes")
    for key, value in recipes.get(flags["dataset"], recipes["voc"]).items():
        if flags.get(key) is None:
            flags[key] = value


def resolve(args: argparse.Namespace) -> None:
    """Fills in what was not typed: the recipe of the data set, device, precision, workers."""
    fill_in(vars(args))
    args.method = Path(sys.argv[0]).stem
    args.task = args.task or {"ade": "100-50", "msrc": "16-5"}.get(args.dataset, "15-1")
    for key in ("epochs", "lr", "positive_weight"):
        if len(getattr(args, key, ())) > 2:
            raise InputError(f"--{key.replace('_', '-')}: one value, or two (step 0, later steps)")
    if args.crop < 4 * args.output_stride:  # PLOP's pooling cuts a map into 4 x 4
        raise InputError(
            f"--crop {args.crop}: at --output-stride {args.output_stride} the network needs "
            f"{4 * args.output_stride} pixels or more, for maps of 4 x 4 cells"
        )
    if not 0 <= args.held_out <= 0.5:
        raise InputError(f"--held-out {args.held_out}: a part of the training images, 0 to 0.5")
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    match = re.fullmatch("cpu|cuda(:([0-9]{1,4}))?", args.device)
    if not match:
        raise InputError(f"--device {args.device}: expected cpu, cuda or cuda:N")
    cuda, count = args.device != "cpu", torch.cuda.device_count()
    if cuda and int(match[2] or 0) >= count:
        raise InputError(
            f"--device {args.device}: PyTorch sees {count or 'no'} GPU here; there is --device cpu"
        )
    slow = cuda and torch.cuda.get_device_capability(args.device) < (8, 0)
    if args.precision == "bf16" and slow:
        raise InputError("--precision bf16: this GPU has no bfloat16; there is --precision fp32")
    args.precision = args.precision or ("bf16" if cuda and not slow else "fp32")
    if args.workers is None:
        args.workers = 0 if args.dataset == "shapes" else min(8, os.cpu_count() or 1)


def on_stop(handler: Callable) -> None:
    """What answers SIGINT and SIGTERM, unless they are ignored, as under nohup."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def leave(number: int, _: object = None) -> None:
    raise KeyboardInterrupt(number)


def let_main_answer(_: int) -> None:
    """In a worker: a signal to all processes of a run must not take main's batches away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def join(args: argparse.Namespace) -> None:
    """Under torchrun: this process takes its place among the others."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % count:
        raise InputError(
            f"--batch {args.batch}: {count} processes share it, it has to be a multiple of {count}"
        )
    if count > 1:
        on_stop(signal.SIG_DFL)  # no answer while it waits for the others
        cuda = args.device.startswith("cuda")
        if cuda:
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if cuda else "gloo")


def launch(main: Callable, flags: argparse.ArgumentParser) -> None:
    """Runs a script. Bad input ends in a clear line and status 2, other trouble in one and 1."""
    args, status, message = flags.parse_args(), 0, ""
    number = int(os.environ.get("RANK", 0))  # torchrun sets it
    on_stop(leave)
    try:
        resolve(args)
        join(args)
        if args.check_data:
            status = check_data(args)
        elif args.download:
            download(args)
        else:
            main(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except InputError as error:
        # a worker process hands the message over inside a traceback
        message, status = str(error).rsplit("InputError: ", 1)[-1].strip(), 2
    except FloatingPointError as error:
        message, status = str(error), 1
    except OSError as error:
        message, status = f"{error}; the same command goes on from what was saved before", 1
    except KeyboardInterrupt as stop:
        message = "stopped; the same command goes on from the last checkpoint" if not number else ""
        status = 128 + (*stop.args, signal.SIGINT)[0]
    if message:
        which = f", process {number}" if number else ""
        print(f"{Path(sys.argv[0]).name}{which}: {message}", file=sys.stderr)
    sys.exit(status)


def check_data(args: argparse.Namespace) -> int:
    """--check-data: every file; images per step beside the published lists. 1 on an error."""
    source = open_source(args.dataset, args.data, args.held_out)
    names, _ = class_table(args.dataset, args.data)
    order = class_order(args.class_order, names[1:])
    samples = [*source.train, *source.test]
    print(f"{source.where}: {len(source.train)} training and {len(source.test)} test images")
    problems: dict[str, list[str]] = {}
    with ThreadPoolExecutor() as pool:
        for problem in pool.map(lambda sample: check_sample(sample, len(order)), samples):
            if problem:
                problems.setdefault(problem[0], []).append(problem[1])
    if twice := [str(s[1]) for s, n in Counter(samples).items() if n > 1]:
        problems["listed more than once"] = twice
    for kind, files in problems.items():
        level = "note" if kind == STRANGE_COLOURS else "error"
        print(f"  {level}: {kind}: {len(files)}, such as {', '.join(files[:2])}")
    problems.pop(STRANGE_COLOURS, None)  # no error
    train, test = (shown_classes(part, order) for part in (source.train, source.test))
    lists: dict = {(args.task, args.setting): {}}  # of the published codes
    for row in read_table("image_counts"):
        if row["dataset"] == args.dataset:
            key = (row["task"], row["setting"])
            lists.setdefault(key, {})[int(row["step"])] = (row["train"], row["test"])
    print("images per step; * differs from the published lists, which have the number in brackets")
    for (task, setting), expected in lists.items():
        lines = []
        for step in task_steps(task, len(order)):
            keep = args.keep_later and (task, setting) == (args.task, args.setting)
            images = images_of_step(train, step, setting, keep)
            counts = len(images), len(test_images(test, step))
            missing = ", ".join(names[order[c - 1]] for c in without_image(images, train, step))
            if missing and (task, setting) == (args.task, args.setting):
                print(f"  note: {task} cannot be run: step {step.index} has no image of {missing}")
            pairs = zip(map(str, counts), expected.get(step.index, ("", "")), strict=True)
            lines.append([n if there in ("", n) else f"{n}*[{there}]" for n, there in pairs])
        for part, values in zip(("train", "test"), zip(*lines, strict=True), strict=True):
            print(f"  {task:7} {setting:11} {part:6} {' '.join(values)}")
    print(f"{sum(map(len, problems.values()))} errors")
    return 1 if problems else 0


STRANGE_COLOURS = "colours of no class, taken as void"


def check_sample(sample: tuple, classes: int) -> tuple[str, str] | None:
    """What is wrong with a picture or its mask: (kind, file)."""
    picture, mask = sample
    if isinstance(picture, int):
        return None
    for kind, path in (("no mask", mask), ("no picture", picture)):
        if not path.exists():
            return kind, str(path)
    try:
        size, labels = read_picture(picture).size, read_mask(mask)
    except InputError as error:
        return "unreadable", str(error)
    if size != labels.size:
        return "picture and mask differ in size", str(mask)
    if any(labels.histogram()[classes + 1 : IGNORE]):
        return f"class numbers beyond {classes}", str(mask)
    if mask.suffix == ".bmp":
        original = open_image(mask, "mask")
        if original.mode == "RGB" and (msrc_ids(original) == UNKNOWN).any():
            return STRANGE_COLOURS, str(mask)
    return None


def download(args: argparse.Namespace) -> None:
    """--download: VOC 2012 and SBD through torchvision; SegmentationClassAug written from both."""
    if args.dataset != "voc":
        drawn = "shapes is drawn: there is nothing to download"
        return print(drawn if args.dataset == "shapes" else how_to_get(args.dataset))
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(
            "--download: SBD's .mat files need one more package: pip install scipy"
        ) from None
    root = Path(args.data)
    try:
        torchvision.datasets.VOCSegmentation(root, "2012", "trainval", download=True)
        if not (root / "sbd" / "cls").is_dir():
            torchvision.datasets.SBDataset(root / "sbd", "train", "segmentation", download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"--download: {error}; is there a network? The same command goes on"
        ) from None
    write_aug_masks(root / "VOCdevkit/VOC2012", root / "sbd" / "cls", loadmat)
    print(f"{root / 'VOCdevkit/VOC2012'} is complete; --check-data checks it")


def write_aug_masks(voc: Path, mats: Path, loadmat: Callable) -> None:
    """SegmentationClassAug: VOC's own masks where there are some, with void borders; else SBD's."""
    target = voc / "SegmentationClassAug"
    target.mkdir(exist_ok=True)
    own = {path.stem for path in (voc / "SegmentationClass").glob("*.png")}
    for name in own:
        shutil.copy(voc / "SegmentationClass" / f"{name}.png", target)
    palette = sum(class_table("voc")[1], ())
    for path in mats.glob("*.mat"):
        if path.stem not in own:
            mask = Image.fromarray(loadmat(path)["GTcls"][0]["Segmentation"][0])
            mask.putpalette(palette)
            mask.save(target / f"{path.stem}.png")


if __name__ == "__main__":
    try:
        sys.exit(report(flags().parse_args()))
    except InputError as problem:
        sys.exit(f"common.py: {problem}")
