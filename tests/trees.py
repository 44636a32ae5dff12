"""Tiny data sets in the layouts of the releases, and the flags of tiny runs."""

import numpy as np
from PIL import Image

import common

METHODS = ("dkd", "icd", "ilt", "mib_unbiased", "ucd")
SMALL = (
    "--backbone small --weights none --output-stride 8 --crop 32 --batch 4 --epochs 2 --workers 0"
)
TINY = f"--dataset voc --task 19-1 {SMALL} --lr 0.002 0.0002"
CLASSES = [[1 + i % 20, 1 + (i + 7) % 20] for i in range(40)]


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def picture(seed, height=24, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3))


def mask(classes, height=24, width=32):
    """Vertical stripes of background, the classes, and void."""
    values = [0, *classes, 255]
    return np.repeat(np.resize(values, (1, width)), height, 0)


def voc(root, train, test, train_list=True):
    """`train`, `test`: the classes of each image; names are a0, a1, ... and b0, b1, ..."""
    base = root / "VOCdevkit/VOC2012"
    lists = base / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for letter, file, images in (("a", "train_aug", train), ("b", "val", test)):
        names = [f"{letter}{i}" for i in range(len(images))]
        for name, classes in zip(names, images, strict=True):
            write(base / f"JPEGImages/{name}.jpg", picture(len(name)))
            write(base / f"SegmentationClassAug/{name}.png", mask(classes))
        if file == "val" or train_list:
            (lists / f"{file}.txt").write_text("\n".join(names) + "\n")
    return base


def ade(root, train=((1,), (150, 2)), test=((3,),)):
    base = root / "ADEChallengeData2016"
    for part, images in (("training", train), ("validation", test)):
        for i, classes in enumerate(images):
            label = mask(classes, width=max(32, len(classes) + 2))
            write(base / f"images/{part}/{i}.jpg", picture(i, width=label.shape[1]))
            write(base / f"annotations/{part}/{i}.png", np.where(label == 255, 0, label))
    return base


def msrc(root, ending="bmp"):
    base = root / "MSRC_ObjCategImageDatabase_v2"
    colours = {
        int(r["id"]): [int(r[k]) for k in ("red", "green", "blue")]
        for r in common.read_table("msrc")
    }
    colours |= {0: [0, 0, 0], 255: [128, 0, 128]}  # black, and horse: both are void
    shown = {"Train": [range(1, 21)] * 2, "Validation": [[1, 21]] * 2, "Test": [range(1, 22)]}
    for file, images in shown.items():
        names = [f"{len(file)}_{i}_s" for i in range(len(images))]
        for name, classes in zip(names, images, strict=True):
            coloured = [[colours[v] for v in row] for row in mask(classes).tolist()]
            write(base / f"Images/{name}.{ending}", picture(len(name)))
            write(base / f"GroundTruth/{name}_GT.bmp", coloured)
        (base / f"{file}.txt").write_text("".join(f"{name}.bmp\n" for name in names))
    return base
