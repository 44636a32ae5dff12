"""Checks a data set before a run, and counts the images of every step.

    python -m data.prepare voc --data DIR               # checks every file
    python -m data.prepare voc --data DIR --download    # fetches VOC 2012 and SBD before that

The published codes come with lists of the images of every step; where data/image_counts.csv has
their numbers, they are compared with what is there. Exit status: 0, 1 if the data set has errors,
2 if there is no such data set or a flag cannot be used.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torchvision
from PIL import Image

import common
from common import IGNORE, InputError

STRANGE_COLOURS = "colours of no class, taken as void"  # in MSRC-v2: a note, not an error


def main(argv: list[str] | None = None) -> int:
    args = flags().parse_args(argv)
    try:
        if args.download and args.dataset != "voc":
            print(common.how_to_get(args.dataset), end="")
            return 0
        if args.download:
            download(Path(args.data))
        return check(args)
    except (InputError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2


def check(args: argparse.Namespace) -> int:
    """Reads every file and prints what is wrong, then the images of every step. 1 on an error."""
    names, _ = common.class_table(args.dataset, args.data)
    order = common.class_order(args.class_order, names[1:])
    task = args.task or {"ade": "100-50", "msrc": "16-5", "folder": "offline"}.get(args.dataset)
    task = task or "15-1"
    common.task_steps(task, len(order))  # a bad --task is refused before all files are read
    if not 0 <= args.held_out <= 0.5:
        raise InputError(f"--held-out {args.held_out}: a part of the training images, 0 to 0.5")
    source = common.list_samples(args.dataset, args.data, args.held_out)
    print(f"{source.where}: {len(source.train)} training and {len(source.test)} test images")

    problems = find_problems([*source.train, *source.test], len(order))
    for kind, files in problems.items():
        level = "note" if kind == STRANGE_COLOURS else "error"
        print(f"  {level}: {kind}: {len(files)}, such as {', '.join(files[:2])}")
    errors = sum(len(files) for kind, files in problems.items() if kind != STRANGE_COLOURS)
    try:
        train, test = (classes_of_samples(part, order) for part in (source.train, source.test))
    except InputError as error:
        print(f"  the images of the steps cannot be counted: {error}")
        errors = max(errors, 1)
    else:
        ordered = ["background", *(names[i] for i in order)]
        count_images(args, task, ordered, train, test)
    print(f"{errors} errors")
    return 1 if errors else 0


def find_problems(samples: Sequence[tuple], classes: int) -> dict[str, list[str]]:
    """Kind of problem -> files (or messages that name the file), over all samples."""
    problems: dict[str, list[str]] = {}
    with ThreadPoolExecutor() as pool:
        for problem in pool.map(lambda sample: check_sample(*sample, classes), samples):
            if problem:
                kind, file = problem
                problems.setdefault(kind, []).append(file)
    if repeated := [str(mask) for (_, mask), count in Counter(samples).items() if count > 1]:
        problems["listed more than once"] = repeated
    return problems


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
        original = common.open_image(mask, "mask")
        if original.mode == "RGB" and (common.msrc_ids(original) == common.UNKNOWN).any():
            return STRANGE_COLOURS, str(mask)
    return None


def classes_of_samples(samples: Sequence[tuple], order: Sequence[int]) -> list[list[int]]:
    """The class ids, that is positions in the class order, that each sample shows."""
    position = {i: c for c, i in enumerate(order, 1)}
    found = common.classes_in_image([mask for _, mask in samples], len(order))
    return [[position[i] for i in ids] for ids in found]


def count_images(
    args: argparse.Namespace,
    task: str,
    names: Sequence[str],
    train: Sequence[Sequence[int]],
    test: Sequence[Sequence[int]],
) -> None:
    """Prints the images per step of --task and --setting, and of every published list.

    names           of the class ids, background first
    train, test     the class ids of each image
    """
    expected: dict[tuple[str, str], dict[int, tuple[str, str]]] = {(task, args.setting): {}}
    if not args.class_order and not args.held_out:  # else the lists are of other images
        for row in common.read_table("image_counts"):
            if row["dataset"] == args.dataset:
                counts = expected.setdefault((row["task"], row["setting"]), {})
                counts[int(row["step"])] = row["train"], row["test"]
    if len(expected) > 1:
        print("images per step; * differs from the published list, whose number is in brackets")
    else:
        print("images per step")
    for (a_task, setting), published in expected.items():
        chosen = (a_task, setting) == (task, args.setting)
        cells: dict[str, list[str]] = {"train": [], "test": []}
        for step in common.task_steps(a_task, len(names) - 1):
            images = common.images_of_step(train, step, setting, chosen and args.keep_later)
            missing = common.classes_without_images(images, train, step)
            if missing and chosen:
                absent = ", ".join(names[c] for c in missing)
                print(f"  note: {task} cannot be run: step {step.index} has no image of {absent}")
            counts = len(images), len(common.test_images(test, step))
            lists = published.get(step.index, ("", ""))
            for part, count, there in zip(cells, counts, lists, strict=True):
                differs = there not in ("", str(count))
                cells[part].append(f"{count}*[{there}]" if differs else str(count))
        for part, values in cells.items():
            print(f"  {a_task:7} {setting:11} {part:6} {' '.join(values)}")


def download(root: Path) -> None:
    """Fetches VOC 2012 and SBD through torchvision, and writes SegmentationClassAug from both.

    InputError: no scipy, no network, or a broken archive
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(
            "--download: SBD's .mat files need one more package: pip install scipy"
        ) from None
    voc, sbd = root / "VOCdevkit" / "VOC2012", root / "sbd"
    try:
        torchvision.datasets.VOCSegmentation(root, "2012", "trainval", download=True)
        if not (sbd / "cls").is_dir():
            torchvision.datasets.SBDataset(sbd, "train", "segmentation", download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"--download: {error}. Is there a network? The same command tries again"
        ) from None
    write_aug_masks(voc, sbd / "cls", loadmat)
    print(f"{voc} is complete", flush=True)


def write_aug_masks(voc: Path, mats: Path, loadmat: Callable) -> None:
    """SegmentationClassAug: VOC's own masks, with void borders; SBD's for all other images.

    voc         the folder VOCdevkit/VOC2012
    mats        SBD's folder of .mat files
    loadmat     scipy.io.loadmat
    """
    target = voc / "SegmentationClassAug"
    target.mkdir(exist_ok=True)
    own = {path.stem for path in (voc / "SegmentationClass").glob("*.png")}
    for name in own:
        shutil.copy(voc / "SegmentationClass" / f"{name}.png", target)
    palette = sum(common.class_table("voc")[1], ())
    for path in mats.glob("*.mat"):
        if path.stem not in own:
            mask = Image.fromarray(loadmat(path)["GTcls"][0]["Segmentation"][0])
            mask.putpalette(palette)
            mask.save(target / f"{path.stem}.png")


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("dataset", choices=common.DATASETS, help="data/README.md says what each needs")
    text = "where the data set lies, as data/README.md says (data/)"
    add("--data", metavar="DIR", default=str(common.HERE / "data"), help=text)
    text = "first fetch the data set (voc: 4 GB, needs scipy); others: only say where it comes from"
    add("--download", action="store_true", help=text)
    text = "count the images of this task (15-1; ade 100-50, msrc 16-5, folder offline)"
    add("--task", metavar="A-B", help=text)
    settings = ("overlapped", "disjoint", "sequential")
    text = "and this setting (overlapped)"
    add("--setting", choices=settings, default="overlapped", help=text)
    text = "disjoint, sequential: keep images that also show later classes (off)"
    add("--keep-later", action="store_true", help=text)
    text = "class names or ids, one per line (the order of data/*.csv)"
    add("--class-order", metavar="FILE", help=text)
    text = "test on this part of the training images, 0 to 0.5 (0: on the test images)"
    add("--held-out", type=float, default=0.0, metavar="PART", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
