"""What the five methods share: tasks, data, model, metric, and the run around their loops.

The border: if two papers could disagree about it, it is in the method file. In reading order:

    tasks       "15-1" and a number of classes -> steps
    data        VOC 2012, ADE20K, MSRC-v2, own pictures, shapes: images and labels of a step, views
    model       DeepLabV3 with one 1x1 classifier per step
    metric      confusion matrix, IoU, the averages of the published tables, evaluation
    dense       losses of logits at the size of the labels, some rows at a time
    run         batches, schedule, checkpoints, resume, log, results
    flags       the command line; start and end of a script
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.transforms.v2.functional import resize

# a method imports common alone: some of the names below are for methods
from data import command, pictures, shapes, tables
from data.environment import environment, git_commit
from data.files import (  # noqa: F401
    IGNORE,
    NETWORK,
    InputError,
    classes_in_image,
    load_trunk,
    load_weights,
    local_file,
    read_checkpoint,
    read_json,
    read_lines,
    read_mask,
    read_picture,
    read_table,
    refuse_mask_size,
    write_atomically,
    write_json,
    write_text,
)
from data.folder import (  # noqa: F401
    claim,
    digest,
    finished_steps,
    keep_script,
    read_config,
    read_last,
    read_rows,
    refuse_other,
    refuse_other_run,
    sample_name,
    usable,
)
from data.processes import (
    all_reduce,
    broadcast,
    ignore_signals_in_worker,
    init_distributed,
    leave,
    on_stop,
    processes,
    request_stop,
)

BACKGROUND = 0
MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in 0 ... 1
STD = (0.229, 0.224, 0.225)
HERE = Path(__file__).resolve().parent
STRIP = (2**20, 2**26)  # numbers of full-size maps at a time: what a CPU's cache holds; on cuda
LOG_EVERY = 10  # iterations per row of train.csv: the losses are read from the device once in these


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


def class_order(given: str | Sequence[str] | None, names: Sequence[str]) -> list[int]:
    """The data set's ids (1 ... K) in the order in which they are learned.

    given   the name of an order in data/orders.csv, or a text file with a class name or id per
            line, every class once; or the names of a run; None = the data set's own order
    """
    ids = list(range(1, len(names) + 1))
    if given is None:
        return ids
    orders = {r["name"]: r["order"] for r in read_table("orders") if int(r["classes"]) == len(ids)}
    known = {str(i): i for i in ids} | {name: i for i, name in enumerate(names, 1)}
    if isinstance(given, str):
        lines = orders[given].split() if given in orders else read_lines(given, "--class-order")
        where = f"--class-order {given}"
    else:
        lines, where = given, "the run's classes"
    if unknown := [line for line in lines if line not in known]:
        raise InputError(
            f"{where}: no class is called {unknown[0]!r}; there are " + ", ".join(names)
        )
    order = [known[line] for line in lines]
    if sorted(order) != ids:
        missing = [names[i - 1] for i in ids if i not in order]
        twice = [names[i - 1] for i, n in Counter(order).items() if n > 1]
        raise InputError(f"{where}: every class once, please; missing {missing}, repeated {twice}")
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


def class_table(dataset: str, data: str = "") -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names and colours of the ids 0 ... K. Own pictures have names in `data`/classes.txt."""
    rows = read_table(dataset) if dataset != "folder" else []
    names = ["background", *(row["name"] for row in rows)]
    colours = [tuple(int(row[k]) for k in ("red", "green", "blue")) for row in rows if "red" in row]
    if dataset == "folder":
        file = Path(data) / "classes.txt"
        if not file.exists():
            raise InputError(f"--dataset folder: no {file}\n{how_to_get(dataset)}")
        names += read_lines(file, "--dataset folder:")
        if not 1 < len(set(names)) == len(names) <= IGNORE:
            raise InputError(f"{file}: 1 to 254 classes, each once, without background (number 0)")
    return names, [(0, 0, 0), *(colours or pictures.palette(len(names) - 1))]


def read_names(path: Path) -> list[str]:
    """Names without folder and ending, from lines `x` or `/JPEGImages/x.jpg /Masks/x.png`."""
    endings = "|".join(map(re.escape, PICTURES))
    names = (re.split("[/\\\\]", line)[-1] for line in read_lines(path, "list"))
    return [re.sub(f"({endings})$", "", name, flags=re.I) for name in names]


def list_samples(dataset: str, data: str, held_out: float = 0.0) -> Source:
    """Lists a data set's training and test samples; opens no picture.

    data        the folder in which the release was unpacked, or the release's own folder
    held_out    this fraction of the training samples becomes the test list: for tuning, since the
                papers' test images are the official validation images
    InputError  no such folder or list; the message names the places that were tried
    """
    if not 0 <= held_out <= 0.5:
        raise InputError(f"--held-out {held_out}: a part of the training images, 0 to 0.5")
    if dataset == "shapes":
        root, train = Path("drawn"), [(i, i) for i in range(shapes.TRAIN)]
        test = [(i, i) for i in range(-shapes.TEST, 0)]
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
                + "    python dkd.py --task 15-1 --dataset shapes"
            )
        readers = {"voc": voc_samples, "ade": ade_samples}
        readers |= {"msrc": msrc_samples, "folder": folder_samples}
        train, test = readers[dataset](root)
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
    """The data set's section of data/README.md, without the marks of its code blocks."""
    text = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    section = text.split(f"--dataset {dataset}`\n")[1].split("\n## ")[0].strip()
    return re.sub(r"```\w*\n|```$", "", section, flags=re.M) + "\n"


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
    images = {path.stem: path for path in (root / "Images").glob("*_s.*")}
    train, validation, test = (
        [
            (images.get(n, root / "Images" / f"{n}.bmp"), root / "GroundTruth" / f"{n}_GT.bmp")
            for n in read_names(root / f"{part}.txt")
        ]
        for part in ("Train", "Validation", "Test")
    )
    return train + validation, test


def folder_samples(root: Path) -> tuple[list, list]:
    """Own pictures: train/images/x.jpg with train/masks/x.png; the same in test/.

    InputError: two pictures of one name, such as x.jpg and x.png
    """
    parts = tuple(
        [
            (file, root / part / "masks" / f"{file.stem}.png")
            for file in sorted((root / part / "images").glob("[!.]*"))
            if file.suffix.lower() in PICTURES
        ]
        for part in ("train", "test")
    )
    counts = Counter(mask for samples in parts for _, mask in samples)
    if twice := [mask for mask, count in counts.items() if count > 1]:
        raise InputError(f"{twice[0]}: the mask of two pictures, which differ in their ending only")
    return parts


def class_ids(samples: Sequence[tuple], order: Sequence[int]) -> list[list[int]]:
    """The class ids in each sample: positions in `order`, which holds the data set's own ids."""
    position = {raw: c for c, raw in enumerate(order, 1)}
    return [[position[raw] for raw in ids] for ids in classes_in_image(samples, len(order))]


def images_of_step(
    classes: Sequence[Sequence[int]], step: Step, setting: str, keep_later: bool = False
) -> list[int]:
    """Indices of a step's training images, from the class ids of each image.

    overlapped: images with at least one new class. disjoint and sequential: of these, the images
    without a class of a later step, or all of them with keep_later.
    """
    images = [i for i, ids in enumerate(classes) if any(c in step.new for c in ids)]
    if setting == "overlapped" or keep_later:
        return images
    return [i for i in images if max(classes[i]) <= step.last]


def classes_without_images(images: Sequence[int], classes: Sequence, step: Step) -> list[int]:
    """A step's new classes that none of its images shows."""
    return sorted({*step.new} - {c for i in images for c in classes[i]})


def test_images(classes: Sequence[Sequence[int]], step: Step) -> list[int]:
    """Indices of the test images that show at least one class seen so far."""
    return [i for i, ids in enumerate(classes) if any(c <= step.last for c in ids)]


def train_labels(
    order: Sequence[int], step: Step, setting: str, ignore: Sequence[str], later: int = BACKGROUND
) -> np.ndarray:
    """uint8 [256], a label table: the data set's ids -> training labels.

    Classes that are not shown become background, those of later steps `later`.

    setting     new classes are shown; in "sequential" old ones too
    ignore      holds "void" if 255 stays; else it becomes background
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
    """uint8 [256], a label table: the data set's ids -> test labels of the classes seen so far.

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
) -> tuple[Tensor, Tensor]:
    """The random crop, resized to crop x crop, flipped with probability 1/2.

    returns     uint8 [crop, crop, 3] and [crop, crop]
    """
    box = crop_box(*picture.size, rng)
    # cropped first: a resize with box would let pixels from outside into the picture's border
    pixels = torch.from_numpy(np.array(picture.crop(box))).permute(2, 0, 1)
    pixels = resize(pixels, [crop, crop]).permute(1, 2, 0)  # as Pillow's, several times as fast
    labels = torch.from_numpy(np.array(mask.resize((crop, crop), Image.Resampling.NEAREST, box)))
    return (pixels.flip(1), labels.flip(1)) if rng.random() < 0.5 else (pixels, labels)


def test_view(picture: Image.Image, mask: Image.Image, crop: int) -> tuple[Tensor, Tensor]:
    """Shorter side to `crop`, then centre crop, of picture and mask, in one resize call each.

    returns     uint8 [crop, crop, 3] and [crop, crop]
    """
    width, height = picture.size
    w, h = (crop * side // min(width, height) for side in picture.size)
    left, top = round((w - crop) / 2), round((h - crop) / 2)
    x, y = width / w, height / h
    box = (left * x, top * y, min((left + crop) * x, width), min((top + crop) * y, height))
    picture = picture.resize((crop, crop), Image.Resampling.BILINEAR, box)
    mask = mask.resize((crop, crop), Image.Resampling.NEAREST, box)
    return torch.from_numpy(np.array(picture)), torch.from_numpy(np.array(mask))


class View(torch.utils.data.Dataset):
    """Pictures and labels, uint8 tensors [crop, crop, 3] and [crop, crop]; keys: (epoch, index).

    labels      a label table, uint8 [256]: the data set's ids -> labels; or one per sample
    seed        (run's seed, step): random training views, each drawn from (seed, step, epoch,
                index) alone, so that neither workers nor interruptions matter; None: the test view
    """

    def __init__(
        self, samples: Sequence[tuple], labels: np.ndarray, crop: int, seed: tuple | None = None
    ) -> None:
        if labels.dtype != np.uint8 or labels.shape[-1] != 256:
            raise InputError("labels: a label table is uint8 [256]")
        self.samples, self.crop, self.seed = samples, crop, seed
        self.labels = np.broadcast_to(labels, (len(samples), 256))

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        picture, mask = read_picture(self.samples[index][0]), read_mask(self.samples[index][1])
        refuse_mask_size(self.samples[index][1], mask, picture)
        mask = mask.point(self.labels[index].tolist())
        if self.seed is None:
            return test_view(picture, mask, self.crop)
        rng = np.random.default_rng((*self.seed, epoch, index))
        return train_view(picture, mask, self.crop, rng)


class Data:
    """A data set in the steps of a task. It knows nothing of runs.

    args                    the flags (see `parser`)
    known                   the class names of a run that is read, in its order: not --class-order's
    names, colours          of the class ids 0 ... K: positions in the class order; 0 = background
    order                   the data set's own ids, in class order
    steps                   of the task
    train, test             samples: (picture, mask); `where` says from which folder
    classes, test_classes   the class ids in each of them
    images                  for each step, the indices of its training images
    identity                what results depend on in the data, wherever they lie: the classes and
                            their numbers in the masks, digests of the lists of images

    InputError: no such data, an unreadable mask, or a step without an image of one of its classes
    """

    def __init__(self, args: argparse.Namespace, known: Sequence[str] = ()) -> None:
        self.args = args
        names, colours = class_table(args.dataset, args.data)
        self.order = class_order(known or args.class_order, names[1:])
        self.names = [names[raw] for raw in (BACKGROUND, *self.order)]
        self.colours = [colours[raw] for raw in (BACKGROUND, *self.order)]
        self.steps = task_steps(args.task, len(self.order))
        self.train, self.test, self.where = list_samples(args.dataset, args.data, args.held_out)
        self.classes, self.test_classes = (
            class_ids(samples, self.order) for samples in (self.train, self.test)
        )
        self.images = [
            images_of_step(self.classes, step, args.setting, args.keep_later) for step in self.steps
        ]
        for step, images in zip(self.steps, self.images, strict=True):
            if missing := classes_without_images(images, self.classes, step):
                absent = ", ".join(self.names[c] for c in missing)
                raise InputError(
                    f"step {step.index} of --task {args.task} --setting {args.setting} has no "
                    f"image of {absent}: try another --setting, --task or --class-order"
                    + ", or --keep-later"
                    * (args.setting != "overlapped" and not args.keep_later)
                )

        self.identity = {
            "classes": self.names,
            "numbers": [BACKGROUND, *self.order],
            "training_images": digest(self.train, self.classes, self.order),
            "test_images": digest(self.test, self.test_classes, self.order),
        }

    def labels(self, step: Step, setting: str | None = None) -> np.ndarray:
        """uint8 [256], a label table: the data set's ids -> a step's training labels.

        MSRC-v2 has no background: where old classes are shown, later ones are ignored.
        """
        setting = setting or self.args.setting
        ignored = self.args.dataset == "msrc" and setting == "sequential"
        later = IGNORE if ignored else BACKGROUND
        return train_labels(self.order, step, setting, self.args.ignore, later)

    def training(
        self,
        step: Step,
        labels: np.ndarray | None = None,
        memory: Sequence[tuple[int, np.ndarray]] = (),
    ) -> tuple[View, list[int]]:
        """Random views of the training images, and the indices of those of a step.

        labels      the label table of the step's images; None = self.labels(step)
        memory      further images: (index, label table)
        """
        table = self.labels(step) if labels is None else labels
        samples = [*self.train, *(self.train[i] for i, _ in memory)]
        tables = np.stack([*([table] * len(self.train)), *(own for _, own in memory)])
        view = View(samples, tables, self.args.crop, (self.args.seed, step.index))
        return view, [*self.images[step.index], *range(len(self.train), len(samples))]

    def testing(self, step: Step) -> tuple[View, list[int]]:
        """Test views, and the indices of the images that show at least one class seen so far."""
        table = test_labels(self.order, step, self.args.ignore)
        return View(self.test, table, self.args.crop), test_images(self.test_classes, step)


def epoch_keys(indices: Sequence[int], batch: int, seed: tuple, start: int, stop: int) -> Iterator:
    """The keys of iterations start ... stop - 1: epochs in random order, full batches only."""
    per_epoch, epoch = max(1, len(indices) // batch), None
    for iteration in range(start, stop):
        if iteration // per_epoch != epoch:
            epoch = iteration // per_epoch
            order = np.random.default_rng((*seed, epoch)).permutation(indices).tolist()
        at = iteration % per_epoch * batch
        yield [(epoch, index) for index in order[at : at + batch]]


def load_in_order(view: View, indices: Sequence[int], args: argparse.Namespace) -> Iterator:
    """Batches of a view's samples, each once, in the order of `indices`."""
    keys = [(0, i) for i in indices]
    batches = (keys[at : at + args.batch] for at in range(0, len(keys), args.batch))
    return load_batches(view, batches, args)


def load_batches(view: View, keys: Iterable[list], args: argparse.Namespace) -> Iterator:
    """images float [B, 3, H, W], normalised, channels last; labels int64 [B, H, W]; on the device.

    keys        of each batch: (epoch, index) pairs. The worker processes live as long as the
                iterator, over all epochs of a step
    """
    loader = torch.utils.data.DataLoader(
        view,
        batch_sampler=keys,
        num_workers=args.workers,
        pin_memory=args.device != "cpu",
        generator=torch.Generator(),  # not the global one: resuming must not change it
        worker_init_fn=ignore_signals_in_worker,
    )
    batches = iter(loader)
    try:
        for images, labels in batches:
            yield normalise(images, args.device), labels.to(args.device, non_blocking=True).long()
    finally:
        if args.workers:  # after an error the garbage collector would wait a minute for each
            batches._shutdown_workers()


def normalise(images: Tensor, device: str) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] on the device, channels last in memory."""
    mean, std = pixel_statistics(device)
    return (images.to(device, non_blocking=True).permute(0, 3, 1, 2) - mean) / std


@functools.cache
def pixel_statistics(device: str) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and deviation of pixels 0 ... 255, float [3, 1, 1]."""
    return tuple(255 * torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))


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


RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "small")
SEQUENCES = {  # the other trunks are a sequence of blocks: channels, and where the four stages end
    "mobilenet_v2": (320, (4, 7, 14, 18)),
    "swin_t": (768, (2, 4, 6, 8)),
    "swin_s": (768, (2, 4, 6, 8)),
    "swin_b": (1024, (2, 4, 6, 8)),
}
BACKBONES = (*RESNETS, *SEQUENCES)


def before_relu(block: nn.Module, x: Tensor) -> Tensor:
    """A torchvision residual block without its last ReLU."""
    shortcut = block.downsample(x) if block.downsample else x
    x = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    if isinstance(block, Bottleneck):
        x = block.bn3(block.conv3(block.relu(x)))
    return x + shortcut


def dilate(stage: nn.Module, rate: int, dilate_first: bool) -> None:
    """Takes a stage's stride out and dilates its 3x3 convolutions by `rate`.

    dilate_first    the one that had the stride, too; else that one by half, as in torchvision
    """
    for conv in stage.modules():
        if isinstance(conv, nn.Conv2d):
            strided, conv.stride = conv.stride != (1, 1), (1, 1)
            if conv.kernel_size == (3, 3):
                own = rate // 2 if strided and not dilate_first else rate
                conv.dilation = conv.padding = (own, own)


class DeepLabV3(nn.Module):
    """DeepLabV3 (Chen et al., arXiv 1706.05587) from torchvision's parts, a classifier per step.

    backbone        one of BACKBONES
    output_stride   8 or 16; of Swin 32, as in CoinSeg and NeST: nothing in it can be dilated
    classes         number of new classes of each step so far, such as [15, 1]
    dropout         probability behind the ASPP (torchvision: 0.5)
    dilate_first    of the stages whose stride is taken out, the first 3x3 convolution is dilated
                    like the others: MiB, PLOP, UCD; without it by half: torchvision, DKD
    bf16            runs the network under autocast; the logits are float32 all the same
    classifiers     1x1 convolutions: [0] background, one channel; [1] the first step's classes; ...
    compiled        of all models: the trunk goes through torch.compile, which Run.batches turns on
    """

    compiled = False

    def __init__(
        self,
        backbone: str,
        output_stride: int,
        classes: Sequence[int],
        dropout: float = 0.5,
        dilate_first: bool = False,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.bf16 = bf16
        width, rates = 256, (12, 24, 36) if output_stride == 8 else (6, 12, 18)
        if backbone == "small":
            trunk, width, rates = SmallResNet(), 64, (1, 2, 3)  # for crops of 64 pixels
        else:
            trunk = torchvision.models.get_model(backbone, weights=None)
        if backbone in SEQUENCES:
            channels, self.ends = SEQUENCES[backbone]
            parts = {"features": trunk.features[: self.ends[-1]]}
            if hasattr(trunk, "norm"):  # Swin's
                parts["norm"] = trunk.norm
            trunk = nn.ModuleDict(parts)
            stages = [trunk["features"][a:b] for a, b in itertools.pairwise((0, *self.ends))]
        else:
            channels = trunk.inplanes  # torchvision counts them while it builds the stages
            del trunk.avgpool, trunk.fc
            stages = [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
        if output_stride == 8:
            dilate(stages[2], 2, dilate_first)
        dilate(stages[3], 32 // output_stride, dilate_first)
        self.trunk = trunk
        self.aspp = ASPP(channels, rates, width)
        self.aspp.project[3].p = dropout
        conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.head = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        self.classifiers = nn.ModuleList(nn.Conv2d(width, n, 1) for n in (1, *classes))

    def stages(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Stages 1-4, and the same before their last ReLU (MobileNetV2 and Swin have none there).

        Swin's are normalised, the first three without weights of their own.
        """
        after, before = [], []
        if isinstance(self.trunk, nn.ModuleDict):
            for i, block in enumerate(self.trunk["features"], 1):
                x = block(x)
                if i in self.ends:
                    after.append(x)
            if "norm" in self.trunk:  # of Swin's maps [B, h, w, D]
                after = [F.layer_norm(x, x.shape[3:]) for x in after[:3]] + [self.trunk["norm"](x)]
                after = [x.permute(0, 3, 1, 2) for x in after]
            return after, after
        trunk = self.trunk
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))
        for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
            before.append(before_relu(stage[-1], stage[:-1](x)))
            x = F.relu(before[-1])
            after.append(x)
        return after, before

    def forward(self, images: Tensor) -> tuple[Tensor, dict]:
        """
        images      float [B, 3, H, W], normalised
        returns     logits float32 [B, C, h, w] before upsampling, channel = class id; maps:
                    "stages", "before_relu" (4 maps each), "branches" (5 maps of the ASPP),
                    "head" [B, D, h, w], which the classifiers read
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            stages = compiled_stages() if self.compiled else DeepLabV3.stages
            after, before = stages(self, images)
            branches = [branch(after[-1]) for branch in self.aspp.convs]
            head = self.head(self.aspp.project(torch.cat(branches, 1)))
            logits = torch.cat([classifier(head) for classifier in self.classifiers], 1)
        maps = {"stages": after, "before_relu": before, "branches": branches, "head": head}
        return logits.float().contiguous(), maps  # not channels last: losses take some channels

    def weight(self) -> Tensor:
        """The classifiers' weights [C, D]; row = class id."""
        return torch.cat([classifier.weight.flatten(1) for classifier in self.classifiers])


@functools.cache
def compiled_stages() -> Callable:
    """DeepLabV3.stages with torch.compile. The trunk never grows: all models share its graphs."""
    return torch.compile(DeepLabV3.stages, dynamic=False)


def build_model(args: argparse.Namespace, classes: Sequence[int]) -> DeepLabV3:
    """The network of some flags with random weights, on their device; classes: new in each step."""
    dilate_first = getattr(args, "dilate_first", False)  # older runs have no such flag
    bf16 = args.precision == "bf16"
    how = args.dropout, dilate_first, bf16
    model = DeepLabV3(args.backbone, args.output_stride, classes, *how)
    for module in model.trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = args.bn_momentum
    return model.to(args.device, memory_format=torch.channels_last)


def freeze_batchnorm(model: nn.Module) -> None:
    """BatchNorm keeps its statistics and its weights, until the next model.train()."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, H, W], bilinear with align_corners=False, as all published codes."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


# --------------------------------------------------------------------------------------- metric


def confusion_matrix(labels: Tensor, predicted: Tensor, channels: int) -> Tensor:
    """int64 [C, C], rows = truth; pixels whose label is no channel (255) are left out.

    InputError: a prediction that is no channel
    """
    if (predicted >= channels).any():
        raise InputError(f"the prediction rule gives class ids above {channels - 1}")
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


@torch.no_grad()
def evaluate(model: nn.Module, predict: Callable, data: Data, step: Step) -> dict:
    """One step's entry of metrics.json, in percent, on the test images with a class seen so far.

    model       in eval mode: images -> (logits, maps)
    predict     logits [B, C, H, W] -> class ids [B, H, W]
    """
    args, (rank, world) = data.args, processes()
    view, images = data.testing(step)
    confusion = torch.zeros(step.channels, step.channels, dtype=torch.int64, device=args.device)
    for inputs, labels in load_in_order(view, images[rank::world], args):
        predicted = predict(upsample(model(inputs)[0], labels.shape[1:]))
        confusion += confusion_matrix(labels, predicted, step.channels)
    confusion = all_reduce(confusion).cpu()
    iou, (pixels, classes) = iou_per_class(confusion), accuracies(confusion)
    if args.dataset == "msrc":
        iou[BACKGROUND] = torch.nan  # it has no background
    result = {
        "step": step.index,
        "with_background": averages(iou, data.steps[0].last, True),
        "without_background": averages(iou, data.steps[0].last, False),
        "pixel_accuracy": pixels,
        "mean_class_accuracy": classes,
        "iou": dict(zip(data.names, iou.tolist(), strict=False)),
        "confusion": confusion.tolist(),
        "training_images": len(data.images[step.index]),
        "test_images": len(images),
    }
    return tables.without_nan(result)


# ---------------------------------------------------------------------------------------- dense


def map_dims(x: object, batch: int) -> int:
    """4 for maps [B, C, h, w], 3 for maps [B, H, W], 0 for all that is no map of the batch."""
    return x.ndim if isinstance(x, Tensor) and x.ndim > 2 and len(x) == batch else 0


def upsampling_matrix(n: int, size: int, like: Tensor) -> Tensor:
    """[size, n], by which bilinear upsampling multiplies a dimension of n; `like`: its kind."""
    eye = torch.eye(n, device=like.device, dtype=like.dtype)
    return upsample(eye[None, None], (size, n))[0, 0]


def rows_of(inputs: Sequence, size: int) -> Callable[[slice], list]:
    """A function that gives some rows of `inputs` at full size, without making the rest.

    inputs      [B, C, h, w] maps are upsampled bilinearly to size x size: two matrix products, of
                which the first can be cut by rows. [B, H, W] maps are cut; all else stays as it is
    """
    plans = []  # of each input: its kind, and the two matrices where it is upsampled
    for x in inputs:
        dims, matrices = map_dims(x, len(inputs[0])), ()
        if dims == 3:
            refuse_other_size(x, size)
        if dims == 4:
            if not x.is_floating_point():
                raise InputError(f"dense: a map of {x.dtype} with channels; labels are [B, H, W]")
            down, across = (upsampling_matrix(n, size, x) for n in x.shape[2:])
            matrices = down, across.T
        plans.append((dims, *matrices))

    def cut(rows: slice) -> list:
        parts = []
        for x, (dims, *matrices) in zip(inputs, plans, strict=True):
            if dims == 4:
                down, across = matrices
                x = down[rows] @ x @ across
            parts.append(x[:, rows] if dims == 3 else x)
        return parts

    return cut


def strips(inputs: Sequence, size: int) -> list[slice]:
    """Rows 0 ... size - 1 in parts that fit the cache, or a part of a GPU's memory."""
    batch = len(inputs[0])
    channels = max(x.shape[1] for x in inputs if map_dims(x, batch) == 4)
    count = max(1, STRIP[inputs[0].is_cuda] // max(1, batch * channels * size))
    return [slice(top, min(top + count, size)) for top in range(0, size, count)]


def in_strips(function: Callable, size: int, *inputs: object) -> Tensor:
    """What `function` gives on `inputs` at full size, a map [B, H, W], made in strips of rows."""
    cut = rows_of(inputs, size)
    return torch.cat([function(*cut(rows)) for rows in strips(inputs, size)], 1)


class DenseLoss(torch.autograd.Function):
    """A mean over the rows of full-size maps, in strips that are differentiated one by one.

    loss        function of some rows of the inputs -> scalar, or several losses [n]
    share       float [size] or [size, n]: how much each row counts in the mean
    check       several losses must be added up as they are: the gradient is that of their sum
    inputs      see `rows_of`. Those that need a gradient get it
    """

    @staticmethod
    def forward(ctx, loss: Callable, share: Tensor, check: bool, *inputs: object) -> Tensor:
        needed = ctx.needs_input_grad[3:]
        inputs = [
            x.detach().requires_grad_() if need else x
            for x, need in zip(inputs, needed, strict=True)
        ]
        leaves = [x for x, need in zip(inputs, needed, strict=True) if need]
        ctx.check, total = check, 0
        with torch.set_grad_enabled(bool(leaves)):
            cut = rows_of(inputs, len(share))
            for rows in strips(inputs, len(share)):
                part = share[rows].sum(0) * loss(*cut(rows))
                total = total + part.detach()
                if part.requires_grad:
                    refuse_other_gradients(part, leaves)
                    part.sum().backward(inputs=leaves)  # of this strip; its maps are freed
        ctx.save_for_backward(*(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple:
        saved, needed = iter(ctx.saved_tensors), ctx.needs_input_grad[3:]
        each, gradient = gradient, gradient.flatten()[0]
        same = (each == gradient).all()
        if ctx.check and not same:
            raise InputError("dense: weigh losses of one function in it; they can only be added up")
        gradient = torch.where(same, gradient, torch.nan)  # later nothing waits: the run stops soon
        return None, None, None, *(gradient * next(saved) if need else None for need in needed)


def refuse_other_size(maps: Tensor, size: int) -> None:
    """InputError where maps are not [B, size, size]."""
    if maps.shape[1:] != (size, size):
        raise InputError(f"dense: a map {tuple(maps.shape)}, expected [B, {size}, {size}]")


def refuse_other_gradients(loss: Tensor, known: list[Tensor]) -> None:
    """InputError where a loss uses a tensor that needs a gradient, but was not passed to it."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and all(leaf is not x for x in known):
            raise InputError("dense: the loss uses a parameter that is none of its arguments")
        nodes += [before for before, _ in node.next_functions if before is not None]


@torch.no_grad()
def refuse_other_means(loss: Callable, share: Tensor, inputs: Sequence) -> None:
    """InputError where a loss of some rows is not the mean of the losses of their two halves."""
    size = len(share)
    first, second = slice(size // 4, size // 2), slice(size // 2, 3 * size // 4)
    cut = rows_of(inputs, size)
    both, *halves = (
        (share[rows].sum(0) * loss(*cut(rows))).flatten()
        for rows in (slice(first.start, second.stop), first, second)
    )
    for whole, parts in torch.stack([both, sum(halves)], 1).tolist():
        if not abs(whole - parts) <= 1e-4 * abs(whole) + 3e-8:  # or not a number
            name = getattr(loss, "__name__", "the loss")
            raise InputError(
                f"dense: {name} of some rows is {whole:g}, of their halves {parts:g}. A mean over "
                "some of the pixels needs valid=, bool [B, H, W]; what is no mean over pixels "
                "needs logits of full size: common.upsample"
            )


# ------------------------------------------------------------------------------------------ run

LAST_GOOD = "The last checkpoint is from before it; try a lower --lr in another --out"
PLACE = ("step", "iteration", "lr_factor")  # the first columns of train.csv


def poly(iteration: int, total: int, warmup: float = 0.0) -> float:
    """Factor of the rate: (1 - i/total)^0.9; in the first `warmup` part also 0.001 rising to 1."""
    progress = min(1.0, iteration / (warmup * total)) if warmup else 1.0
    return (1 - iteration / total) ** 0.9 * (0.001 * (1 - progress) + progress)


class Run:
    """A run of a method over the steps of a task: what is the same for every method.

    for step in run.steps():                      # finished ones are skipped
        old_model, model = run.models(step)
        net = run.parallel(model)
        for images, labels in run.batches(step, model, optimizer):
            logits, maps = net(images)
            loss = run.log({"ce": run.dense(cross_entropy, logits, labels, valid=...), ...})
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        run.finish(step, model)

    predict     logits [B, C, H, W] -> class ids [B, H, W]
    published   the method's name in data/published.csv
    data        Data
    folder      of the results
    results     the finished steps' entries of metrics.json
    losses      those of this iteration, from `log`
    timing      of a step that is trained, but not finished
    known       names of the weights that this step's model has got: those of the network, and once
                `parallel` is through those of modules of a method's own
    origin      versions and commit
    checked     how often `dense` has seen each kind of loss
    """

    def __init__(self, args: argparse.Namespace, predict: Callable, published: str) -> None:
        if getattr(predict, "__name__", "") not in ("predict", "most_likely"):
            raise InputError(
                "the prediction rule is a function of the script, called predict, or "
                "common.most_likely: data.predict looks for it there"
            )
        self.args, self.predict, self.published = args, predict, published
        self.data, world = Data(args), processes()[1]
        for step, images in enumerate(self.data.images):
            if len(images) < world:
                raise InputError(
                    f"step {step} has {len(images)} images for {world} processes: start fewer"
                )
        self.folder = run_folder(args)
        self.results: list[dict] = []
        self.losses: dict[str, Tensor] | None = None
        self.timing: dict[str, float] = {}
        self.known: set[str] = set()
        self.origin: dict[str, object] = {}
        self.checked: Counter = Counter()

    def steps(self) -> Iterator[Step]:
        """The steps left to train. After the last one: the table of results."""
        args, rank = self.args, processes()[0]
        from_file = args.step0 or args.weights != "none"
        if from_file and not (self.folder / "config.json").exists():
            self.first_model()  # a bad file is refused before there is a folder
        if rank == 0:
            self.open_folder()
        self.results = broadcast(self.results, args.device)
        for step in self.data.steps[len(self.results) :]:
            torch.manual_seed(1000 * args.seed + step.index)
            if step.index == 0 and args.step0:
                model, text, weights = self.first_model()
                self.say(text)
                self.conclude(step, model, weights, {"taken_from": args.step0})
            else:
                yield step
        if rank == 0:
            (self.folder / "last.pt").unlink(missing_ok=True)  # killed after the last metrics.json
        self.say(tables.results_table(self.results, self.data.steps, args, self.published))
        self.say(f"weights, metrics.json, train.csv and pictures/ are in {self.folder}")

    # models

    def build(self, step: Step) -> DeepLabV3:
        """The network as it is in a step, with random weights."""
        return build_model(self.args, [len(s.new) for s in self.data.steps[: step.index + 1]])

    def load(self, step: Step) -> DeepLabV3:
        """The finished model of a step, frozen. Modules of a method's own are left out."""
        path, model = self.folder / f"step_{step.index}.pt", self.build(step)
        load_weights(model, read_checkpoint(path), path)
        return model.eval().requires_grad_(False)

    def models(self, step: Step) -> tuple[DeepLabV3 | None, DeepLabV3]:
        """The frozen model of the step before (None in step 0); its copy with a new classifier."""
        if step.index == 0:
            model, text, _ = self.first_model()
            self.known = {*model.state_dict()}
            self.say(text)
            return None, model
        model = self.build(step)
        self.known = {*model.state_dict()}
        old_model = self.load(self.data.steps[step.index - 1])
        model.load_state_dict(old_model.state_dict(), strict=False)
        return old_model, model

    def first_model(self) -> tuple[DeepLabV3, str, dict]:
        """Step 0's network, where it comes from (--step0 or --weights), and all of its weights."""
        args, step, path = self.args, self.data.steps[0], self.args.step0
        if path is None:
            model = self.build(step)
            return model, f"trunk    {load_trunk(model, args.backbone, args.weights)}", {}
        saved = read_checkpoint(local_file(path), "--step0")
        try:
            images = "training_images"  # an older step_0.pt does not say which
            there = {"dilate_first": False, images: self.data.identity[images]} | saved["flags"]
            there |= saved.get("data", {})
            there |= {"classes": saved["classes"][0], "step": saved["step"]}
            here = vars(args) | self.data.identity
            here |= {"classes": [self.data.names[c] for c in step.new], "step": 0}
            for one in (there, here):  # in a first step, disjoint and sequential are the same
                one["setting"] = one["setting"].replace("sequential", "disjoint")
        except (LookupError, TypeError, AttributeError):
            raise InputError(f"--step0 {path}: not a step_0.pt") from None
        network = ("backbone", "output_stride", "dilate_first", "head")
        shown = ("classes", "setting", "keep_later", "held_out", images)
        for key in ("step", "dataset", *shown, *network):
            if there.get(key) != here[key]:
                raise InputError(
                    f"--step0 {path}: another {key}: {there.get(key)} there, {here[key]} here"
                )
        model = self.build(step)
        load_weights(model, saved, path)
        return model, f"step 0 is {path}", saved["model"]

    def parallel(self, model: DeepLabV3) -> nn.Module:
        """The network to call: `model`, under torchrun as a part of all processes' network.

        Modules that a method has attached to `model` take their weights from the step before.
        InputError: the step before has a module that `model` lacks; it would start anew. Or a
        module that the network itself has not, where later steps would not find it
        """
        model.to(self.args.device)
        for name in model.state_dict():
            if name.startswith(NETWORK) and name not in self.known:
                raise InputError(
                    f"{name}: not of the network of these flags. A module of your own is an "
                    "attribute of the model itself: model.NAME = ..."
                )
        self.known |= {*model.state_dict()}
        index = len(model.classifiers) - 2  # of the step: one classifier is background's
        if index:
            path = self.folder / f"step_{index - 1}.pt"
            state = read_checkpoint(path)["model"]
            own = {k: v for k, v in state.items() if not k.startswith(NETWORK)}
            if lost := [k for k in own if k not in model.state_dict()]:
                raise InputError(
                    f"{path} holds {lost[0]}, which the model of step {index} lacks: attach the "
                    "same modules in every step, before run.parallel"
                )
            load_weights(model, {"model": model.state_dict() | own}, path)
        if processes()[1] == 1:
            return model
        cuda = self.args.device != "cpu"
        if cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # all have the same statistics
        # harmless: the first is about 1x1 kernels, the second about a flag that 2.14 has renamed
        warnings.filterwarnings("ignore", message="Grad strides do not match|`broadcast_buffers`")
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=not cuda)

    # the loop

    def iterations(self, step: Step, images: int) -> int:
        """Of a step: full batches per epoch, times the epochs."""
        total = max(1, images // self.args.batch) * per_step(self.args.epochs, step)
        return min(2, total) if self.args.dry_run else total

    def batches(
        self,
        step: Step,
        model: DeepLabV3,
        optimizer: torch.optim.Optimizer,
        labels: np.ndarray | None = None,
        memory: Sequence[tuple[int, np.ndarray]] = (),
        schedule: Callable = poly,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of a step: batches of images float [B, 3, H, W], labels int64 [B, H, W].

        Before an iteration the learning rates are set. After it the losses of `log` go to
        train.csv, and now and then all that is needed to resume to last.pt.

        labels      the label table of the step's images, uint8 [256]; None = data.labels(step)
        memory      further training images: (index, label table)
        schedule    (iteration, iterations of the step, the recipe's warmup) -> factor of the rates
        InputError  a second call in a step; modules of a method's own without `parallel`
        """
        args, (rank, world) = self.args, processes()
        if self.timing:
            raise InputError("one run.batches in a step: a second loop would have no iteration")
        for name in model.state_dict():
            if not name.startswith(NETWORK) and name not in self.known:
                raise InputError(
                    f"{name}: run.parallel(model) gives it its weights; call it before"
                )
        view, indices = self.data.training(step, labels, memory)
        images = min(args.batch, len(indices)) // world  # in each process
        pooled = model.aspp.convs[-1][2]  # has one value per image and channel
        if images * (world if isinstance(pooled, nn.SyncBatchNorm) else 1) == 1:
            pooled.eval()  # one value has no variance
        refuse_parameters_outside(optimizer, model)
        self.losses = None
        progress = Progress(self, step, model, optimizer, len(indices))
        done, total = progress.iteration, progress.total

        def factor(iteration: int) -> float:
            return schedule(iteration, total, args.warmup)

        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=done - 1)
        keys = epoch_keys(indices, args.batch, (args.seed, step.index), done, total)
        keys = (batch[: images * world][rank::world] for batch in keys)
        requests: list[int] = []  # signals; several processes would stop at different iterations
        on_stop(functools.partial(request_stop, requests) if world == 1 else signal.SIG_DFL)
        DeepLabV3.compiled = args.compile  # for these batches, which all have one shape
        try:
            for batch in load_batches(view, keys, args):
                yield batch
                if self.losses is None:
                    raise InputError("the loop calls run.log(losses) in every iteration")
                progress.add(self.losses, factor(progress.iteration))
                self.losses = None
                rates.step()
                if requests:
                    progress.stop(requests[0])
        finally:
            DeepLabV3.compiled = False
            on_stop(leave if world == 1 else signal.SIG_DFL)
        if requests:
            leave(requests[0])
        self.timing = progress.timing()

    def dense(
        self, loss: Callable, logits: Tensor, *others: object, valid: Tensor | tuple | None = None
    ) -> Tensor:
        """A loss of logits at the size of the labels: an ordinary scalar with its gradient.

        It is made and differentiated in strips of rows, so that no full-size map is kept. Equal to
        loss(common.upsample(logits, ...), ...), a mean over the pixels.

        loss        function of logits [B, C, r, W] and `others`, for any r rows -> scalar, 0 where
                    no pixel is valid; or several losses [n] of the same maps. These learn as their
                    sum: weigh them in it
        logits      float [B, C, h, w]
        others      what else `loss` takes: [B, C, h, w] logits are upsampled, too, [B, H, W] maps
                    are cut into the same rows. What needs a gradient gets it
        valid       bool [B, H, W]: the pixels that the loss is a mean over; None = all. For
                    several losses a tuple
        InputError  a loss that is not such a mean; a parameter that `loss` uses, but does not take
        """
        size, world = self.args.crop, processes()[1]

        def share_of_rows(valid: Tensor | None) -> Tensor:
            if valid is None:
                return logits.new_full((size,), 1 / size)
            refuse_other_size(valid, size)
            count = all_reduce(valid.sum()).clamp(min=1).to(logits)
            return valid.sum((0, 2)).to(logits) * world / count

        several = isinstance(valid, tuple)
        share = torch.stack([*map(share_of_rows, valid)], 1) if several else share_of_rows(valid)
        function = getattr(loss, "func", loss)  # of a functools.partial
        key = getattr(function, "__code__", function), valid is None, logits.shape[1]
        self.checked[key] += 1
        check = self.checked[key] in (1, 32)  # at first new and old model may be the same
        if check:
            refuse_other_means(loss, share, [logits, *others])
        return DenseLoss.apply(loss, share, check, logits, *others)

    def log(self, losses: dict[str, Tensor]) -> Tensor:
        """The sum of the losses, all scalars. Each becomes a column of train.csv."""
        if self.losses is not None:
            raise InputError("run.log(losses) is called once in an iteration, with all losses")
        for name, loss in losses.items():
            if name in PLACE or {*name} & {*',"\n'}:
                raise InputError(f"{name!r}: no name for a column of train.csv")
            if not isinstance(loss, Tensor) or loss.ndim:
                raise InputError(f"the loss {name} is no tensor of one number")
        self.losses = losses
        return sum(losses.values())

    # after the loop

    def finish(self, step: Step, model: DeepLabV3) -> None:
        """Ends a step: evaluation, pictures, step_K.pt, metrics.json.

        The step counts as done once metrics.json holds it; until then last.pt stays.
        """
        if not self.timing:
            raise InputError(f"step {step.index} was left before its last iteration")
        self.conclude(step, model, {}, self.timing)
        self.timing = {}
        if processes()[0] == 0:
            (self.folder / "last.pt").unlink(missing_ok=True)

    def conclude(self, step: Step, model: DeepLabV3, weights: dict, timing: dict) -> None:
        """Evaluates, draws and saves a step; `weights` are further ones for its step_K.pt."""
        begun = time.monotonic()
        result = evaluate(model.eval(), self.predict, self.data, step)
        minutes = (time.monotonic() - begun) / 60
        self.results.append(result | {"timing": timing | {"evaluation_minutes": minutes}})
        if processes()[0] == 0:
            self.draw(step, model)
            steps = self.data.steps[: step.index + 1]
            content = {
                "model": weights | model.state_dict(),
                "step": step.index,
                "classes": [[self.data.names[c] for c in s.new] for s in steps],
                "colours": self.data.colours,
                "flags": vars(self.args),
                "published": self.published,
                "data": self.data.identity,
                "metrics": self.results[-1],
                **self.origin,
            }
            path = self.folder / f"step_{step.index}.pt"
            write_atomically(path, lambda file: torch.save(content, file))
            self.write_results()
        broadcast(None, self.args.device)  # the others wait here: they read its file next
        new = [self.data.names[c] for c in step.new]
        missed = tables.not_learned(result, new, timing.get("iterations"))
        self.say(f"  {tables.summary(result)}\n{tables.iou_table(result)}{missed}")

    def write_results(self) -> None:
        content = {"average": tables.average_of_steps(self.results), "steps": self.results}
        write_json(self.folder / "metrics.json", tables.without_nan(content))
        write_text(self.folder / "iou.csv", tables.iou_csv(self.results, self.data.steps))

    @torch.no_grad()
    def draw(self, step: Step, model: DeepLabV3) -> None:
        """pictures/step_K.png and confusion_K.png.

        step_K: up to six test pictures with classes from all over the task, their truth, and their
        predictions after up to six of the steps so far.
        """
        data, folder = self.data, self.folder / "pictures"
        confusion = np.array(self.results[-1]["confusion"])
        page = pictures.draw_confusion(confusion, data.names, data.steps[0].last)
        page.save(folder / f"confusion_{step.index}.png")
        chosen: list[int] = []
        for c in np.linspace(1, len(data.order), 6).round():
            fitting = (i for i, ids in enumerate(data.test_classes) if c in ids and i not in chosen)
            chosen += list(fitting)[:1]
        table = test_labels(data.order, data.steps[-1], ["later"])
        view = View(data.test, table, self.args.crop)
        pixels, labels = zip(*(view[0, i] for i in chosen or [0]), strict=True)
        predicted = {}
        for k in sorted({*np.linspace(0, step.index, 6).round().astype(int).tolist()}):
            file = folder / f"predicted_{k}.png"  # kept for the sheets of later steps
            found = pictures.read_strip(file, len(pixels)) if k < step.index else []
            if not found and (k == step.index or (self.folder / f"step_{k}.pt").exists()):
                then = model if k == step.index else self.load(data.steps[k])
                found = [segment(then, self.predict, p, self.args.device) for p in pixels]
                pictures.class_map(np.hstack(found), data.colours).save(file)
            if found:
                predicted[k] = found
        originals, truth = [Image.fromarray(p.numpy()) for p in pixels], [m.numpy() for m in labels]
        style = data.names, data.colours, [s.last for s in data.steps]
        page = pictures.prediction_sheet(originals, truth, predicted, *style)
        page.save(folder / f"step_{step.index}.png")

    # the folder

    def open_folder(self) -> None:
        """Makes the run's folder, or goes on with the run that lies there."""
        args, data = self.args, self.data
        weakref.finalize(self, os.close, claim(self.folder, args.dry_run))
        refuse_other_run(self.folder, vars(args), data.identity, self.say)
        self.results, changed = finished_steps(self.folder, self.say)
        if changed:
            self.write_results()
        versions = environment(args.device)
        self.origin = {"versions": versions, "commit": git_commit()}
        content = {"flags": vars(args), "data": data.identity, "published": self.published}
        write_json(self.folder / "config.json", content | self.origin)
        write_text(self.folder / "flags.txt", "".join(f"{word}\n" for word in args.typed))
        keep_script(self.folder, Path(sys.argv[0]), self.say)
        done = len(self.results)
        self.say(f"run      {self.folder}" + f", {done} steps done" * bool(done))
        self.say(f"data     {data.where}: {len(data.train)} training, {len(data.test)} test images")
        self.say(f"steps    {' '.join(str(len(i)) for i in data.images)} training images")
        self.say(f"flags    {shlex.join(args.typed)} (config.json has all)")
        self.say("versions " + ", ".join(f"{k} {v}" for k, v in versions.items()))

    def say(self, text: str) -> None:
        """To the terminal and to log.txt, from the first process."""
        if processes()[0] == 0:
            command.show(text)
            with open(self.folder / "log.txt", "a", encoding="utf-8", errors="replace") as file:
                file.write(text + "\n")


class Progress:
    """Where a step stands: resumes from last.pt, and writes it, train.csv and the progress line.

    iteration, total    iterations done, and those of the whole step
    seconds             spent up to the last checkpoint
    window              the losses of the iterations since the last row of train.csv
    rows                of train.csv
    """

    def __init__(
        self,
        run: Run,
        step: Step,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: int,
    ) -> None:
        self.run, self.step, self.model, self.optimizer = run, step, model, optimizer
        self.images, self.total = images, run.iterations(step, images)
        self.iteration, self.seconds = 0, 0.0
        self.window: list[dict[str, Tensor]] = []
        data = run.data
        shown = Counter(c for i in data.images[step.index] for c in data.classes[i])
        new = ", ".join(f"{data.names[c]} ({shown[c]})" for c in step.new)
        last = data.steps[-1].index
        run.say(f"step {step.index} of 0-{last}: learns {new} from {images} images")
        self.resume()
        if broadcast(self.iteration, run.args.device) != self.iteration:
            raise InputError(f"{run.folder}: not the first process's; machines share one --out")
        self.clock = self.shown = self.saved = time.monotonic()

    def resume(self) -> None:
        path, device = self.run.folder / "last.pt", self.run.args.device
        saved = usable(path, read_last, self.run.say)
        if saved and saved["step"] == self.step.index:
            try:
                self.model.load_state_dict(saved["model"])
                self.optimizer.load_state_dict(saved["optimizer"])
                torch.set_rng_state(saved["rng"])
                if "cuda_rng" in saved and torch.cuda.is_available():  # dropout's
                    torch.cuda.set_rng_state(saved["cuda_rng"], device)
                self.window = [
                    {name: loss.to(device) for name, loss in losses.items()}
                    for losses in saved["window"]
                ]
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError):
                raise InputError(f"{path}: of another network or optimiser than now") from None
            self.iteration, self.seconds = saved["iteration"], saved["seconds"]
            self.run.say(f"  goes on at iteration {self.iteration} of {self.total}")
        here = (self.step.index, self.iteration)
        rows = read_rows(self.run.folder / "train.csv", self.run.say)
        self.rows = [r for r in rows if (int(r["step"]), int(r["iteration"])) <= here]

    def add(self, losses: dict[str, Tensor], factor: float) -> None:
        """After an iteration, with its losses and its factor of the learning rates.

        The losses are read from the device once in LOG_EVERY iterations.
        """
        self.window.append({name: loss.detach() for name, loss in losses.items()})
        self.iteration += 1
        done = self.iteration == self.total
        if self.iteration % LOG_EVERY and not done:
            return
        means = self.mean_losses()
        self.window = []
        place = self.step.index, self.iteration, f"{factor:.6f}"
        self.rows.append(dict(zip(PLACE, place, strict=True)) | means)
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if done or now - self.shown > (0.2 if terminal else 30):
            self.shown = now
            self.show(means, done, terminal)
        if processes()[0] == 0 and (done or now - self.saved > self.run.args.save_every):
            self.save()

    def mean_losses(self) -> dict[str, str]:
        """Of the window, as in train.csv. FloatingPointError where one is not finite."""
        if not any(self.window):
            return {}
        losses = torch.stack([loss for part in self.window for loss in part.values()])
        values = iter((all_reduce(losses) / processes()[1]).double().tolist())
        found: dict[str, list[float]] = {}
        for iteration, part in enumerate(self.window, self.iteration - len(self.window)):
            numbers = {name: next(values) for name in part}
            if not all(map(math.isfinite, numbers.values())):
                raise FloatingPointError(
                    f"the loss is not finite in step {self.step.index}, iteration {iteration}: "
                    + ", ".join(f"{name} {value:g}" for name, value in numbers.items())
                    + f". {LAST_GOOD}"
                )
            for name, value in numbers.items():
                found.setdefault(name, []).append(value)
        return {name: f"{sum(v) / len(v):.5g}" for name, v in found.items()}

    def show(self, means: dict[str, str], done: bool, terminal: bool) -> None:
        """The line of progress; on a terminal the next one takes its place."""
        run, spent = self.run, self.seconds + time.monotonic() - self.clock
        each = spent / self.iteration
        left = each * (self.total - self.iteration)
        if terminal and processes()[0] == 0:
            width = shutil.get_terminal_size().columns - 1
            text = tables.live_line(self.iteration / self.total, left, means)
            command.show(f"{text[:width]}\033[K", end="\r")
        if done or not terminal:
            place = f"step {self.step.index}, iteration {self.iteration}/{self.total}"
            later = run.data.steps[self.step.index + 1 :]
            images = map(len, run.data.images[self.step.index + 1 :])
            after = each * sum(map(run.iterations, later, images))
            run.say(tables.log_line(place, left, after, run.args.batch / each, means))

    def save(self) -> None:
        """train.csv, and last.pt to resume from."""
        run, weights = self.run, self.model.state_dict()
        if not all(value.isfinite().all() for value in weights.values()):
            place = f"step {self.step.index}, iteration {self.iteration}"
            raise FloatingPointError(f"the weights are not finite in {place}. {LAST_GOOD}")
        now = time.monotonic()
        self.seconds, self.clock, self.saved = self.seconds + now - self.clock, now, now
        header = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [header, *([str(row.get(key, "")) for key in header] for row in self.rows)]
        text = "".join(",".join(line) + "\n" for line in lines)
        write_text(run.folder / "train.csv", text)
        state = {"model": weights, "optimizer": self.optimizer.state_dict(), "window": self.window}
        state |= {"step": self.step.index, "iteration": self.iteration, "seconds": self.seconds}
        state |= {"flags": vars(run.args), "data": run.data.identity, "rng": torch.get_rng_state()}
        if run.args.device != "cpu":
            state["cuda_rng"] = torch.cuda.get_rng_state(run.args.device)
        write_atomically(run.folder / "last.pt", lambda file: torch.save(state, file))

    def stop(self, number: int) -> None:
        """After SIGINT or SIGTERM: saves, and ends the program."""
        if self.window:
            self.mean_losses()  # not finite: nothing is saved
        self.save()
        self.run.say(f"  stopped and saved at iteration {self.iteration} of {self.total}")
        leave(number)

    def timing(self) -> dict[str, float]:
        """For metrics.json. Peak memory is the device's, in GiB."""
        seconds, device = max(self.seconds, 1e-9), self.run.args.device
        images = self.total * min(self.run.args.batch, self.images)
        found = {"images_per_second": images / seconds, "minutes": seconds / 60}
        found["iterations"] = self.total
        if device != "cpu":
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            torch.cuda.reset_peak_memory_stats(device)
        return found


def refuse_parameters_outside(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """InputError: a trainable parameter is in no group of the optimiser, or is not the model's."""
    learning = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if learning - {id(p) for p in model.parameters()}:
        raise InputError(
            "the optimiser has a parameter that is not the model's, and so would not be saved: "
            "make its module an attribute of the model"
        )
    outside = [k for k, p in model.named_parameters() if p.requires_grad and id(p) not in learning]
    if outside:
        more = f" and {len(outside) - 1} more" * (len(outside) > 1)
        raise InputError(
            f"{outside[0]}{more}: in no parameter group of the optimiser; add it to one, or "
            "requires_grad_(False)"
        )


def per_step(values: Sequence, step: Step) -> float:
    """Flags of the schedule hold one value, or two: for step 0, and for the later steps."""
    return values[0] if step.index == 0 else values[-1]


def segment(model: nn.Module, predict: Callable, pixels: Tensor, device: str) -> np.ndarray:
    """uint8 picture [H, W, 3] -> uint8 class ids [H, W]."""
    logits, _ = model(normalise(pixels[None], device))
    return predict(upsample(logits, pixels.shape[:2]))[0].byte().cpu().numpy()


# ---------------------------------------------------------------------------------------- flags


def parser(doc: str, recipes: dict[str, dict]) -> argparse.ArgumentParser:
    """The flags of every method. Those that stand in `recipes` default to recipes[data set]."""
    made = argparse.ArgumentParser(
        description=doc.split("\n\n")[0],
        usage="%(prog)s --task A-B [flags, or @FILE of flags]; --help lists them",
        fromfile_prefix_chars="@",
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
    add = made.add_argument_group("task").add_argument
    text = "shapes: drawn, needs no files; folder: your own pictures (voc)"
    add("--dataset", choices=DATASETS, default="voc", help=text)
    data_flags(add)
    text = "pixels that are left out, not background: void (in training), later (classes of later "
    text += f"steps, in the test), other (ADE20K's id 0, in the test) ({default('ignore')})"
    add("--ignore", choices=("void", "later", "other"), nargs="*", metavar="WHAT", help=text)
    text = "Two values: step 0, later steps. The defaults' sources: RECIPE in the script."
    add = made.add_argument_group("schedule", text).add_argument
    text = f"over the step's images ({default('epochs')})"
    add("--epochs", type=positive, metavar="N", nargs="+", help=text)
    add("--batch", type=positive, metavar="N", help=f"images per iteration ({default('batch')})")
    text = f"the trunk's learning rate; poly decay, power 0.9 ({default('lr')})"
    add("--lr", type=rate, metavar="RATE", nargs="+", help=text)
    text = f"side of the network's input, pixels ({default('crop')})"
    add("--crop", type=positive, metavar="PIXELS", help=text)
    add = made.add_argument_group("model").add_argument
    text = f"the trunk: {', '.join(BACKBONES)}. Swin is torchvision's, with windows of 7 cells; "
    text += f"the papers' windows of 12, for 384 pixels, are not there ({default('backbone')})"
    add("--backbone", choices=BACKBONES, metavar="NAME", help=text)
    text = "of the trunk: torchvision's imagenet or imagenet-v2 (its second ones, of resnet50, "
    text += f"resnet101, mobilenet_v2), none (random), or a file ({default('weights')})"
    add("--weights", metavar="FILE", help=text)
    text = f"input pixels per cell of the trunk's last map ({default('output_stride')}; Swin: 32)"
    add("--output-stride", type=int, choices=(8, 16, 32), help=text)
    text = "where the stride is taken out of a stage, its first 3x3 convolution is dilated like "
    text += f"the others, not by half ({default('dilate_first')})"
    add("--dilate-first", action=argparse.BooleanOptionalAction, help=text)
    add = made.add_argument_group("system").add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda, cuda:1; no mps (cuda where there is one)")
    text = "of the network; fp32 is without TF32 (bf16 on cuda, else fp32)"
    add("--precision", choices=("bf16", "fp32"), help=text)
    text = "the trunk with torch.compile: minutes at the start; needs PyTorch 2.5 (off)"
    add("--compile", action=on, help=text)
    text = "processes that read images (one a core, 8 at most; shapes 0)"
    add("--workers", type=natural, metavar="N", help=text)
    text = "of weights, order and augmentation (0)"
    add("--seed", type=natural, default=0, metavar="N", help=text)
    text = "seconds between checkpoints inside a step (cuda 300, cpu 60)"
    add("--save-every", type=rate, metavar="SECONDS", help=text)
    add = made.add_argument_group("output").add_argument
    add("--out", metavar="DIR", default="runs", help="where the run's folder lies (runs)")
    text = "of the run's folder; a run there goes on (METHOD-DATASET-TASK-SETTING-sSEED)"
    add("--name", type=folder_name, help=text)
    text = "take this step_0.pt, of a path or a URL, instead of training step 0"
    add("--step0", metavar="FILE", help=text)
    add("--dry-run", action=on, help="two iterations per step, all else real, own folder")
    return made


def data_flags(add: Callable) -> None:
    """The flags that say which images a step has: of a run, and of data.prepare."""
    text = "A classes, then B at a time; or offline: all at once (15-1; ade 100-50, msrc 16-5)"
    add("--task", metavar="A-B", help=text)
    settings = ("overlapped", "disjoint", "sequential")
    text = "images of a step: any with a new class; none with later ones; old labels shown "
    text += "(overlapped; ilt.py: sequential)"
    add("--setting", choices=settings, default="overlapped", help=text)
    text = "disjoint, sequential: images that also show later classes stay; msrc needs it where "
    text += "a class is never seen without one of them (off)"
    add("--keep-later", action="store_true", help=text)
    text = "data set, as data/README.md says (data/)"
    add("--data", metavar="DIR", default=str(HERE / "data"), help=text)
    text = "b to w: published orders of VOC; b, c: of ADE20K (data/orders.csv); or a file, a class "
    text += "name or id per line (the data set's own order)"
    add("--class-order", metavar="ORDER", help=text)
    text = "test on this part of the training images, for tuning (0: on the test images)"
    add("--held-out", type=float, default=0.0, metavar="PART", help=text)


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


def folder_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of letters, digits and . _ + -")
    if text.endswith("-dry"):
        raise argparse.ArgumentTypeError(f"{text!r}: -dry is the end of a dry run's name")
    return text


def fill_in(flags: dict) -> None:
    """Takes what was not typed from the recipe of the data set; one without has that of VOC."""
    recipes = flags.pop("recipes")
    for key, value in recipes.get(flags["dataset"], recipes["voc"]).items():
        if flags.get(key) is None:
            flags[key] = value


def refuse_device(device: str) -> None:
    """InputError: PyTorch has no such device here."""
    match = re.fullmatch("cpu|cuda(:([0-9]{1,4}))?", device)
    if not match:
        raise InputError(f"--device {device}: expected cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device != "cpu" and int(match[2] or 0) >= count:
        raise InputError(
            f"--device {device}: PyTorch sees {count or 'no'} GPU here; there is --device cpu"
        )


def run_folder(args: argparse.Namespace) -> Path:
    """Where the results of a run go. All parts of its name are checked flags or the script's."""
    name = f"{args.method}-{args.dataset}-{args.task}-{args.setting}-s{args.seed}"
    return Path(args.out) / ((args.name or name) + "-dry" * args.dry_run)


def parse(flags: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; what was not typed is the data set's recipe, device, precision, workers."""
    try:
        args = flags.parse_args()
    except UnicodeDecodeError as error:
        raise InputError(f"@FILE: not a text with one flag per line ({error})") from None
    typed = {k: v for k, v in vars(args).items() if v != flags.get_default(k) and k != "recipes"}
    args.typed = [word for key, value in typed.items() for word in tables.as_typed(key, value)]
    if (args.backbone or "").startswith("swin"):
        args.output_stride = args.output_stride or 32  # the recipes have that of a ResNet
    fill_in(vars(args))
    if args.backbone.startswith("swin") != (args.output_stride == 32):
        raise InputError(
            f"--output-stride {args.output_stride}: not of {args.backbone}; Swin has 32, all "
            "others have 8 or 16"
        )
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
    if args.device != "cpu" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        if args.device != "cuda":
            raise InputError(f"--device {args.device}: under torchrun each has its own: cuda")
        if args.compile:
            raise InputError("--compile: not with torchrun on GPUs, where BatchNorm is shared")
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    refuse_device(args.device)
    cuda = args.device != "cpu"
    slow = cuda and torch.cuda.get_device_capability(args.device) < (8, 0)
    if args.precision == "bf16" and slow:
        raise InputError("--precision bf16: this GPU has no bfloat16; there is --precision fp32")
    args.precision = args.precision or ("bf16" if cuda and not slow else "fp32")
    torch.backends.cudnn.allow_tf32 = False  # fp32 is float32 in convolutions, too
    if args.save_every is None:
        args.save_every = 300 if cuda else 60  # last.pt is several hundred MB
    if args.workers is None:
        args.workers = 0 if args.dataset == "shapes" else min(8, os.cpu_count() or 1)
    return args


def launch(main: Callable, flags: argparse.ArgumentParser) -> None:
    """Runs a script. Bad input ends in a clear line and status 2, other trouble in one and 1."""
    number = int(os.environ.get("RANK", 0))  # torchrun sets it
    on_stop(leave)

    def work(args: argparse.Namespace) -> None:
        init_distributed(args)
        main(args)
        if dist.is_initialized():
            dist.destroy_process_group()

    def saved(args: argparse.Namespace) -> bool:
        return any(run_folder(args).glob("*.pt"))

    name = Path(sys.argv[0]).name + f", process {number}" * bool(number)
    sys.exit(command.run(name, lambda: parse(flags), work, saved))
