"""Tiny data sets in the layouts of the releases, the flags of tiny runs, and what runs leave."""

import csv
import importlib
import importlib.util
import json
import re
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common

METHODS = ("dkd", "icd", "ilt", "mib_unbiased", "ucd")
SMALL = (
    "--backbone small --weights none --output-stride 8 --crop 32 --batch 4 --epochs 2 --workers 0"
)
TINY = f"--dataset voc --task 19-1 {SMALL} --lr 0.002 0.0002"
CLASSES = [[1 + i % 20, 1 + (i + 7) % 20] for i in range(40)]
EXACT = {"rel": 1e-9, "abs": 1e-12}  # of values with 12 digits


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


def own(root, train, test, names):
    """Own pictures: `train`, `test` are the classes of each image, `names` those of the classes."""
    for part, images in (("train", train), ("test", test)):
        for i, classes in enumerate(images):
            ending = ("jpg", "png", "webp")[i % 3]
            write(root / part / f"images/{part}{i}.{ending}", picture(i))
            write(root / part / f"masks/{part}{i}.png", mask(classes))
    (root / "classes.txt").write_text("\n".join(names))
    return root


# losses


def value_and_gradient(loss, at):
    """What a loss is at `at`, and its gradient there."""
    leaf = at.detach().clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.item(), torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def assert_as(found, loss, gradient_norm, name=""):
    """A value and its gradient's norm as the golden file has them."""
    assert found[0] == pytest.approx(loss, **EXACT), name
    assert found[1].norm().item() == pytest.approx(gradient_norm, **EXACT), name


def levels_and_logits():
    """PLOP's golden inputs: four old maps, four new ones, (old logits, logits)."""
    rng = np.random.default_rng(0)
    shapes = ((2, 6, 16, 16), (2, 8, 8, 8), (2, 12, 4, 4), (2, 12, 4, 4))
    old = [torch.tensor(rng.standard_normal(s)) for s in shapes]
    new = [x + 0.5 * torch.tensor(rng.standard_normal(x.shape)) for x in old]
    return old, new, [torch.tensor(rng.standard_normal((2, c, 4, 4))) for c in (5, 7)]


# runs


@torch.no_grad()
def lively(model, data):
    """An untrained model that predicts many classes, in eval mode and frozen.

    Its classifiers are random and large, its BatchNorm has the statistics of some test images.
    """
    for classifier in model.classifiers:
        torch.nn.init.normal_(classifier.weight, std=0.3)
    view, indices = data.testing(data.steps[-1])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    for images, _ in common.load_in_order(view, indices, data.args):
        model.train()(images)
    return model.eval().requires_grad_(False)


def arguments(method, flags=""):
    """What a script's main is called with."""
    module = importlib.import_module(method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(common.HERE / f"{method}.py"), *shlex.split(flags)])
        args = common.parse(module.flags())
    return args


def launch(script, flags):
    """Runs a script in this process: a method's name, or the path of another one. Exit status.

    SIGINT and SIGTERM have their usual handlers in it, whatever started pytest, and after it those
    from before.
    """
    path = common.HERE / f"{script}.py" if isinstance(script, str) else script
    if path.parent == common.HERE:
        module = importlib.import_module(path.stem)
    else:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", [str(path), *shlex.split(flags)])
            common.launch(module.main, module.flags())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return stop.value.code or 0


def whole_run(place, flags, method="dkd"):
    """Runs a script to its end, for several tests: into place/runs. Gives `place`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        assert launch(method, f"{flags} --out {place}/runs") == 0
    return place


def inside(monkeypatch, step, iteration, action):
    """Does something once, in an iteration of a step that starts anew. It may change the losses."""
    batches, log, place = common.Run.batches, common.Run.log, []

    def counted(run, now, *given, **named):
        for i, batch in enumerate(batches(run, now, *given, **named)):
            place.append((now.index, i))
            yield batch

    def disturbed(run, losses):
        if place[-1] == (step, iteration) and place.count(place[-1]) == 1:
            losses = action(run, losses) or losses
        return log(run, losses)

    monkeypatch.setattr(common.Run, "batches", counted)
    monkeypatch.setattr(common.Run, "log", disturbed)


def folder_name(method, step="19-1", dataset="voc", setting="overlapped"):
    return Path(f"runs/{method}-{dataset}-{step}-{setting}-s0")


def results(folder):
    """The steps of metrics.json without what depends on the machine."""
    steps = json.loads((folder / "metrics.json").read_text())["steps"]
    return [{k: v for k, v in step.items() if k != "timing"} for step in steps]


def read_rows(folder):
    return list(csv.DictReader((folder / "train.csv").read_text().splitlines()))


def weights(folder, step=1):
    return torch.load(folder / f"step_{step}.pt", weights_only=True)["model"]


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_same_run(whole, folder):
    """Both are finished, with the same bits."""
    assert results(whole) == results(folder)
    for step in range(len(results(whole))):
        assert_same(weights(whole, step), weights(folder, step))
    assert (whole / "train.csv").read_text() == (folder / "train.csv").read_text()
    assert not (folder / "last.pt").exists()


def patched(code, diff):
    """A script with the hunks of a diff, divided by lines @@, each of which fits in one place."""
    for hunk in filter(None, re.split("^@@.*\n", diff, flags=re.M)):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(x[1:] for x in lines if x[0] in " " + sign) for sign in "-+")
        assert code.count(old) == 1, f"the script has changed, the diff has not: {old}"
        code = code.replace(old, new)
    return code
