"""Checks a data set before a run, and counts the images of every step.

    python -m data.prepare voc --data DIR
    python -m data.prepare voc --data DIR --download    # fetches it before that

The published codes come with lists of the images of every step; where
data/image_counts.csv has their numbers, they are compared with what is there.
Exit status: 0, 1 if the data set has errors, 2 if there is no such data set or
a flag cannot be used.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torchvision

import common
from common import IGNORE, InputError
from data import command, files

ADE = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
ADE_SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"  # as many public scripts have it
# SegmentationClassAug, released by the authors of SSUL. It is checked by its number of masks
VOC_MASKS = "https://github.com/clovaai/SSUL/releases/download/preparation/SegmentationClassAug.zip"
VOC_MASK_COUNT = 12_031  # 10,582 for the training, 1,449 for the test
STRANGE_COLOURS = "colours of no class, taken as void"  # in MSRC-v2
UNUSED = "no picture to this mask"  # of --dataset folder
NOTES = (STRANGE_COLOURS, UNUSED)  # all other kinds of problems are errors


def main(argv: list[str] | None = None) -> int:
    return command.run("prepare", lambda: flags().parse_args(argv), prepare)


def prepare(args: argparse.Namespace) -> int:
    """--download, then the check."""
    if args.download and args.dataset not in DOWNLOADS:
        print(common.how_to_get(args.dataset), end="")
        return 0
    if args.download:
        download(args.dataset, Path(args.data))
    return check(args)


def check(args: argparse.Namespace) -> int:
    """Reads every file and prints what is wrong, then the images of every step. 1 on an error."""
    names, _ = common.class_table(args.dataset, args.data)
    order = common.class_order(args.class_order, names[1:])
    default = {"ade": "100-50", "msrc": "16-5", "folder": "offline"}.get(args.dataset, "15-1")
    args.task = args.task or default
    common.task_steps(args.task, len(order))  # a bad --task is refused before all files are read
    source = common.list_samples(args.dataset, args.data, args.held_out)
    print(f"{source.where}: {len(source.train)} training and {len(source.test)} test images")

    problems, faulty = find_problems([*source.train, *source.test], len(order))
    if args.dataset == "folder":  # such as those of x.heic, which is no picture here
        masks = {mask for _, mask in (*source.train, *source.test)}
        folders = {mask.parent for mask in masks}
        there = {file for folder in folders for file in folder.glob("*.png")}
        if unused := sorted(map(str, there - masks)):
            problems[UNUSED] = unused
    for kind, named in problems.items():
        level = "note" if kind in NOTES else "error"
        print(f"  {level}: {kind}: {len(named)}, such as {', '.join(named[:2])}")
    errors = sum(len(named) for kind, named in problems.items() if kind not in NOTES)
    if faulty:
        print(f"  left out of what follows: {len(faulty)} images")
    train, test = ([s for s in part if s not in faulty] for part in source[:2])
    count_images(args, common.Source(train, test, source.where), order, names)
    print(f"{errors} errors")
    return 1 if errors else 0


def find_problems(samples: Sequence[tuple], classes: int) -> tuple[dict[str, list[str]], set]:
    """Kind of problem -> files (or messages that name the file); samples that cannot be used."""
    problems: dict[str, list[str]] = defaultdict(list)
    faulty = set()
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda sample: check_sample(*sample, classes), samples)
        for sample, problem in zip(samples, found, strict=True):
            if problem:
                kind, file = problem
                problems[kind].append(file)
                if kind not in NOTES:
                    faulty.add(sample)
    if repeated := [str(mask) for (_, mask), count in Counter(samples).items() if count > 1]:
        problems["listed more than once"] = repeated
    return problems, faulty


def check_sample(picture: Path | int, mask: Path | int, classes: int) -> tuple[str, str] | None:
    """What is wrong with a picture or its mask: (kind, file); None: nothing."""
    if isinstance(picture, int):
        return None  # drawn
    for kind, path in (("no mask", mask), ("no picture", picture)):
        if not path.exists():
            return kind, str(path)
    try:
        size, labels = common.read_picture(picture).size, common.read_mask(mask)
    except InputError as error:
        return "unreadable", str(error)
    if size != labels.size:
        return "picture and mask differ in size", str(mask)
    if any(labels.histogram()[classes + 1 : IGNORE]):
        return f"class numbers beyond {classes}", str(mask)
    if mask.suffix == ".bmp":
        original = files.open_image(mask, "mask")
        if original.mode == "RGB" and (files.msrc_ids(original) == files.UNKNOWN).any():
            return STRANGE_COLOURS, str(mask)
    return None


def count_images(
    args: argparse.Namespace, source: common.Source, order: Sequence[int], names: Sequence[str]
) -> None:
    """Prints the images per step of --task and --setting, and of every published list.

    order       the data set's own ids, in class order
    names       of these ids, background first
    """
    train, test = (common.class_ids(samples, order) for samples in source[:2])
    for step in common.task_steps(args.task, len(order)):
        images = common.images_of_step(train, step, args.setting, args.keep_later)
        if missing := common.classes_without_images(images, train, step):
            absent = ", ".join(names[order[c - 1]] for c in missing)
            print(f"  note: {args.task} cannot be run: step {step.index} has no image of {absent}")
        if not common.test_images(test, step):
            print(f"  note: no test image for step {step.index} of {args.task}: its mIoU is -")
    chosen = args.task, args.setting
    lists: dict[tuple[str, str], dict[int, dict]] = {chosen: {}}  # the rows of their steps
    if not args.class_order and not args.held_out:  # else the published lists are of other images
        for row in common.read_table("image_counts"):
            if row["dataset"] == args.dataset:
                lists.setdefault((row["task"], row["setting"]), {})[int(row["step"])] = row
    print("images per step; *[N]: the published list has N")
    for (task, setting), rows in lists.items():
        keep_later = args.keep_later and (task, setting) == chosen
        steps = common.task_steps(task, len(order))
        images = [common.images_of_step(train, step, setting, keep_later) for step in steps]
        tests = [common.test_images(test, step) for step in steps]
        for part, found in (("train", images), ("test", tests)):
            counts = [str(len(indices)) for indices in found]
            listed = [rows.get(step.index, {}).get(part) for step in steps]
            pairs = zip(counts, listed, strict=True)
            cells = (n if not there or there == n else f"{n}*[{there}]" for n, there in pairs)
            print(f"  {task:7} {setting:11} {part:6} {' '.join(cells)}")


def download(dataset: str, root: Path) -> None:
    """InputError: no network, or another file than expected; it says where what has to lie."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".") as beside:  # nothing stays half done
            DOWNLOADS[dataset](root, Path(beside))
    except (InputError, OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"--download: {error}. The same command tries again; or by hand:\n"
            + common.how_to_get(dataset).rstrip()
        ) from None


def download_ade(root: Path, beside: Path) -> None:
    target, archive, digest = root / "ADEChallengeData2016", beside / "ade.zip", hashlib.sha1()
    if target.exists():
        return
    files.fetch(ADE, archive)
    with open(archive, "rb") as file:
        for part in iter(lambda: file.read(2**20), b""):
            digest.update(part)
    if digest.hexdigest() != ADE_SHA1:
        raise InputError(f"{ADE}: another file than expected (SHA-1 {digest.hexdigest()})")
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(beside)
    os.replace(beside / target.name, target)


def download_voc(root: Path, beside: Path) -> None:
    """VOC 2012 through torchvision, which checks its MD5, and SegmentationClassAug."""
    voc, masks = root / "VOCdevkit" / "VOC2012", beside / "SegmentationClassAug"
    if not (voc / "JPEGImages").exists():
        torchvision.datasets.VOCSegmentation(root, "2012", "trainval", download=True)
    if (voc / masks.name).exists():
        return
    files.fetch(VOC_MASKS, beside / "masks.zip")
    masks.mkdir()
    with zipfile.ZipFile(beside / "masks.zip") as zipped:
        for member in zipped.namelist():
            name = member.rpartition("/")[2]
            if re.fullmatch(r"\d{4}_\d{6}\.png", name):
                (masks / name).write_bytes(zipped.read(member))
    found = {file.stem for file in masks.iterdir()}
    lacking = {*common.read_names(voc / "ImageSets/Segmentation/val.txt")} - found
    if len(found) != VOC_MASK_COUNT or lacking:
        raise InputError(
            f"{VOC_MASKS}: {len(found)} masks, {len(lacking)} of val.txt not among them; expected "
            f"{VOC_MASK_COUNT} and 0"
        )
    os.replace(masks, voc / masks.name)


DOWNLOADS = {"ade": download_ade, "voc": download_voc}


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("dataset", choices=common.DATASETS, help="data/README.md says what each needs")
    text = "first fetch the data set (voc: 2 GB, ade: 1 GB); others: only say where it comes from"
    add("--download", action="store_true", help=text)
    text = "Own pictures are counted with --task offline, unless another is given."
    common.data_flags(parser.add_argument_group("images of a step", text).add_argument)
    return parser


if __name__ == "__main__":
    sys.exit(main())
