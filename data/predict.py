"""Segments pictures with a finished run, or evaluates the run's steps again.

    python -m data.predict runs/dkd-voc-15-1-overlapped-s0 photo.jpg photos/
    python -m data.predict runs/dkd-voc-15-1-overlapped-s0 --eval
    python -m data.predict shared/step_5.pt photo.jpg

Pictures may have any size. The newest finished step segments them, or --step,
and pictures/ beside it gets an overlay with a legend and a map of class numbers
for each. --eval prints the table of the run on its own test images and writes
nothing. The network's flags come from the checkpoints.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

import common
from common import HERE, InputError
from data import command, pictures
from data.folder import read_config, refuse_other
from data.tables import iou_table, results_table, summary


def main(argv: list[str] | None = None) -> int:
    parser = flags()
    args = parser.parse_intermixed_args(argv)  # flags may stand between the pictures
    if args.eval == bool(args.pictures):
        parser.error("expected pictures or folders to segment, or --eval")
    return command.run("predict", lambda: args, evaluate_again if args.eval else segment_pictures)


def step_files(run: Path, only: int | None = None) -> list[Path]:
    """Every step_K.pt of a run in order, or `only` that of one step. InputError: there is none.

    run     the run's folder, or one of the files, which may lie alone
    """
    if run.is_file():
        if only is not None:
            raise InputError(f"--step {only}: {run} is the file of one step; give the run's folder")
        return [run]
    numbers = {path.stem.removeprefix("step_"): path for path in run.glob("step_*.pt")}
    found = {int(number): path for number, path in numbers.items() if number.isdecimal()}
    if not found:
        raise InputError(f"{run}: no step_0.pt in this folder; train first")
    if only is None:
        return [found[number] for number in sorted(found)]
    if only not in found:
        raise InputError(f"--step {only}: {run} has {', '.join(map(str, sorted(found)))}")
    return [found[only]]


def method_script(name: str) -> ModuleType:
    """Imports a method's script from the project's folder; never the copy in a run's folder.

    InputError: the project has no such script
    """
    if f"{name}.py" not in os.listdir(HERE):
        raise InputError(f"there is no script {name}.py in {HERE}")
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def prediction_rule(saved: dict) -> Callable:
    """The rule logits [B, C, H, W] -> class ids [B, H, W] of the script that wrote a step_K.pt."""
    return getattr(method_script(saved["flags"]["method"]), "predict", common.most_likely)


def load(path: str | Path, device: str, data: str | None = None) -> tuple:
    """The model of a step_K.pt, on this device; the file's content; its flags, with this `data`."""
    common.refuse_device(device)
    saved = common.read_checkpoint(path)
    try:
        settings = argparse.Namespace(**saved["flags"])
        if device == "cpu" and settings.device != "cpu":
            settings.precision = "fp32"  # bfloat16 is slow on a CPU
        settings.device, settings.compile = device, False
        settings.data = data or settings.data
        model = common.build_model(settings, [len(names) for names in saved["classes"]])
    except (LookupError, ValueError, TypeError, AttributeError):
        raise InputError(f"{path}: not a step_K.pt of a run") from None
    common.load_weights(model, saved, path)
    return model.eval(), saved, settings


def class_names(saved: dict) -> list[str]:
    """Of the class ids that a step_K.pt knows: background, then the classes in their order."""
    return ["background", *(name for step in saved["classes"] for name in step)]


def evaluate_again(args: argparse.Namespace) -> None:
    """--eval: prints the table of all steps, or of --step; writes nothing."""
    data, first, results, others = None, None, [], []
    for path in step_files(Path(args.run), args.step):
        model, saved, settings = load(path, args.device, args.data)
        index, first = saved["step"], first or saved["flags"]
        known, config = saved.get("data"), path.with_name("config.json")
        if not known and config.exists():  # older checkpoints do not say which data they are of
            known = read_config(config)["data"]
        data = data or common.Data(settings, (known or {}).get("classes", ())[1:])
        names = class_names(saved)
        if names != data.names[: len(names)]:
            raise InputError(f"{path}: learned other classes than those in {data.where}")
        here = {k: v for k, v in data.identity.items() if k != "training_images"}
        refuse_other(path, saved, first, here)
        rule, published = prediction_rule(saved), saved.get("published", "")
        results.append(common.evaluate(model, rule, data, data.steps[index]))
        print(f"step {index}: {summary(results[-1])}\n{iou_table(results[-1])}", flush=True)
        before = saved.get("metrics", results[-1])  # older checkpoints have none
        was, now = (np.array(result["confusion"]) for result in (before, results[-1]))
        if np.abs(was - now).sum() > 0.02 * was.sum():  # each pixel that moved counts twice
            others.append(f"step {index}: {summary(before)}")
    print(results_table(results, data.steps, settings, published))
    if others:
        raise InputError(
            "the run itself measured something else, with another network or prediction rule: "
            + "; ".join(others)
        )


@torch.no_grad()
def segment(
    model: nn.Module, predict: Callable, picture: Image.Image, settings: argparse.Namespace
) -> np.ndarray:
    """Class ids, uint8 [H, W], of a picture of any size; the network sees its shorter side as crop.

    The logits are upsampled to the picture's size 64 rows at a time: those of a whole photograph
    take gigabytes.
    """
    size = [round(side * settings.crop / min(picture.size)) for side in picture.size]
    pixels = torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BILINEAR)))
    logits, _ = model(common.normalise(pixels[None], settings.device))
    across, down = (
        common.upsampling_matrix(n, side, logits)
        for side, n in zip(picture.size, (logits.shape[3], logits.shape[2]), strict=True)
    )  # [W, w] and [H, h]
    rows = [predict(part @ logits @ across.T) for part in down.split(64)]
    return torch.cat(rows, 1)[0].byte().cpu().numpy()


def segment_pictures(args: argparse.Namespace) -> None:
    """Per picture: overlay and class map in the run's pictures/, and a line with the shares."""
    newest, used = step_files(Path(args.run), args.step)[-1], set()
    paths = [path for given in args.pictures for path in pictures_in(Path(given))]
    model, saved, settings = load(newest, args.device)
    rule, folder = prediction_rule(saved), newest.parent / "pictures"
    names = class_names(saved)
    colours = saved.get("colours") or [(0, 0, 0), *pictures.palette(len(names) - 1)]
    suffix = f"_step_{args.step}" * (args.step is not None)
    folder.mkdir(exist_ok=True)
    for path in paths:
        picture = ImageOps.exif_transpose(common.read_picture(path))  # upright, as viewers show it
        labels = segment(model, rule, picture, settings)
        name = "-".join(filter(None, (path.parent.name, path.stem)))
        while name in used:  # photos/x.jpg and photos/x.png
            name += "_2"
        used.add(name)
        target = folder / f"{name}{suffix}"
        pictures.with_legend(picture, labels, names, colours).save(f"{target}_overlay.png")
        pictures.class_map(labels, colours).save(f"{target}_classes.png")
        counts = np.bincount(labels.ravel(), minlength=len(names))
        shares = sorted(zip(100 * counts / counts.sum(), names, strict=True), reverse=True)
        found = ", ".join(f"{name} {share:.1f} %" for share, name in shares if share)
        print(f"{path}: {found}; see {target}_overlay.png and _classes.png", flush=True)


def pictures_in(path: Path) -> list[Path]:
    """The pictures in a folder and the folders in it; a file stands for itself.

    InputError: no such file or folder, or a folder without a picture
    """
    if not path.exists():
        raise InputError(f"{path}: no such picture or folder")
    if not path.is_dir():
        return [path]
    found = [file for file in path.rglob("[!.]*") if file.suffix.lower() in common.PICTURES]
    if not found:
        raise InputError(f"{path}: no picture in this folder ({' '.join(common.PICTURES)})")
    return sorted(found)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run, or a step_K.pt of it")
    add("pictures", metavar="PICTURE", nargs="*", help="pictures to segment, or folders of them")
    text = "evaluate every step_K.pt on the run's test images instead (off)"
    add("--eval", action="store_true", help=text)
    text = "take step K (the newest that is finished; with --eval all)"
    add("--step", type=common.natural, metavar="K", help=text)
    text = "with --eval: where the run's data set lies now (where it lay in the run)"
    add("--data", metavar="DIR", help=text)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda, cuda:1; no mps (cuda where there is one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
