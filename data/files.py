"""One file at a time: pictures, masks, tables, JSON, checkpoints. Errors that name the file.

It imports nothing of ours but the drawn pictures. Files are read as data, and never executed.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import json
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn

from data import shapes

IGNORE = 255  # void, in masks and in labels
NETWORK = ("trunk.", "aspp.", "head.", "classifiers.")  # all other weights are a method's own


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is all that the user gets to see."""


class CorruptFile(InputError):
    """A checkpoint or a JSON file that can be opened, but holds something else than it should."""


# --------------------------------------------------------------------------------- text and tables


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of data/NAME.csv."""
    with open(Path(__file__).with_name(f"{name}.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text file, stripped, without empty ones."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {path}: cannot be read as text ({error})") from None
    return [line.strip() for line in lines if line.strip()]


# ------------------------------------------------------------------------------ pictures and masks


def open_image(path: Path, what: str) -> Image.Image:
    """InputError: there is no such file, or it is not a picture."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("no regular file")  # to read from a device might never end
        with open(path, "rb") as file:
            image = Image.open(file)
            image.load()
            return image
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such {what}; python -m data.prepare lists all that are missing"
        ) from None
    except Exception as error:  # damage can surface as anything
        raise InputError(f"{path}: not a readable {what} ({error})") from None


def read_picture(path: Path | int) -> Image.Image:
    """RGB, any kind of file. EXIF's rotation is not applied: VOC's masks lie as the pixels do."""
    if isinstance(path, int):
        return shapes.draw(path)[0]
    picture = open_image(path, "picture")
    if picture.mode.startswith("I"):  # 16 bits: the upper byte, as Pillow does with colours
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")


def read_mask(path: Path | int) -> Image.Image:
    """One byte per pixel: the data set's own ids, 255 = void. MSRC-v2's colours become ids here."""
    if isinstance(path, int):
        return shapes.draw(path)[1]
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
    colours = [
        (int(r["id"]), *(int(r[k]) for k in ("red", "green", "blue"))) for r in read_table("msrc")
    ]
    for i, red, green, blue in (*((IGNORE, *colour) for colour in MSRC_VOID), *colours):
        table[red << 16 | green << 8 | blue] = i
    return table


def msrc_ids(mask: Image.Image) -> np.ndarray:
    red, green, blue = np.moveaxis(np.asarray(mask, np.int32), 2, 0)
    return msrc_colours()[red << 16 | green << 8 | blue]


def classes_in_image(samples: Sequence[tuple], classes: int) -> list[list[int]]:
    """The ids in the mask of each sample (picture, mask), without background and void.

    The masks of a folder are read once and the result is kept in the user's cache. A mask whose
    time or size has changed is read again.

    InputError: an unreadable mask, one of another size than its picture, or with unknown ids
    """
    if not samples or isinstance(samples[0][1], int):
        return [ids_in_mask(*sample) for sample in samples]
    folder = samples[0][1].parent.resolve()
    there = os.scandir(folder) if folder.is_dir() else ()
    stamps = {f.name: [f.stat().st_mtime_ns, f.stat().st_size] for f in there if f.is_file()}
    cache, known = cache_of(folder), {}
    with contextlib.suppress(InputError):  # none yet, or damaged
        known = read_json(cache, lambda content: current_entries(content, stamps))
    unknown = {mask: picture for picture, mask in samples if mask.name not in known}
    if unknown:
        print(f"reading {len(unknown)} masks in {folder}, once", flush=True)
        with ThreadPoolExecutor() as pool:
            found = pool.map(ids_in_mask, unknown.values(), unknown)
            for mask, ids in zip(unknown, found, strict=True):
                known[mask.name] = [stamps.get(mask.name), ids]
        with contextlib.suppress(OSError):  # nowhere to keep it: the next run reads them again
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, known)
    for _, mask in samples:
        if (ids := known[mask.name][1]) and ids[-1] > classes:
            raise InputError(f"{mask}: class number {ids[-1]}, but there are only {classes}")
    return [known[mask.name][1] for _, mask in samples]


def ids_in_mask(picture: Path | int, mask: Path | int) -> list[int]:
    """The ids in one mask. InputError where its picture has another size."""
    labels = read_mask(mask)
    if not isinstance(picture, int) and picture.is_file():
        with contextlib.suppress(OSError), Image.open(picture) as opened:  # the header alone
            refuse_mask_size(mask, labels, opened)
    return [i for i, n in enumerate(labels.histogram()[:IGNORE]) if n and i]


def refuse_mask_size(path: Path, mask: Image.Image, picture: Image.Image) -> None:
    """InputError where a mask and its picture differ in size."""
    if picture.size != mask.size:
        raise InputError(f"{path}: {mask.size} pixels, its picture has {picture.size}")


def cache_of(folder: Path) -> Path:
    """Where what was found in a folder's masks is kept."""
    name = f"classes-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.json"
    home = os.path.expanduser("~")  # as it is where no home directory can be found
    base = os.environ.get("XDG_CACHE_HOME") or (home != "~" and Path(home) / ".cache")
    return Path(base or tempfile.gettempdir()) / "ciss" / name


def current_entries(content: dict, stamps: dict) -> dict:
    """Of a cache those whose mask has not changed. TypeError and others: it has another form."""
    for _, ids in content.values():
        if not all(isinstance(i, int) and 0 < i < IGNORE for i in ids):
            raise TypeError("ids")
    return {name: entry for name, entry in content.items() if entry[0] == stamps.get(name)}


# ------------------------------------------------------------- JSON, checkpoints, downloads


def write_atomically(path: Path, write: Callable) -> None:
    """Writes beside the file, then renames: at any moment the old file or the new one is there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
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


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1))


def read_json(path: Path, parse: Callable) -> object:
    """What `parse` makes of a JSON file. CorruptFile: it is none, or has not the form expected."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise CorruptFile(f"{path}: not such a file as a run writes ({reason})") from None


def read_checkpoint(path: str | Path, what: str = "file", whole: bool = True) -> dict:
    """Tensors and plain values; a file that holds anything else is refused, no code in it runs.

    whole       False: for a look at the plain values; the tensors are not read until they are used
    """
    try:
        if whole and zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")  # torch does not look at them
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
        return dict(saved.items())
    except FileNotFoundError:
        raise InputError(f"{what} {path}: no such file") from None
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be read ({error})") from None
    except Exception:  # damage can surface as anything; torch would advise to run what is in it
        reason = "it holds other things, or is damaged"
        if not zipfile.is_zipfile(path):
            reason = "torch.save has not written it, or it is cut short"
        raise CorruptFile(
            f"{what} {path}: not a file of tensors and plain values: {reason}"
        ) from None


def local_file(path: str) -> str | Path:
    """A path as it is; of a URL the file in PyTorch's cache, to which it is fetched once."""
    if "://" not in path:
        return path
    name = f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{name_in(path)}"
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.exists():
        fetch(path, file)
        if not zipfile.is_zipfile(file):
            file.unlink()
            raise InputError(f"{path}: not a checkpoint; a web page, or cut off")
    return file


def name_in(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]


def fetch(url: str, file: Path) -> None:
    """Downloads. If the name ends like step_0-1a2b3c4d.pt, the file's SHA-256 has to begin so."""
    prefix = re.search(r"-([0-9a-f]{8,64})\.\w+$", name_in(url))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), prefix and prefix[1])
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise InputError(f"{url}: cannot be fetched ({error})") from None


IMAGENET = {"imagenet": "IMAGENET1K_V1", "imagenet-v2": "IMAGENET1K_V2"}  # torchvision's names


def imagenet_weights(backbone: str, weights: str) -> dict:
    """torchvision's state dict, fetched once. InputError: there is none, or no network."""
    try:
        kind = torchvision.models.get_model_weights(backbone)[IMAGENET[weights]]
        return kind.get_state_dict(check_hash=True, weights_only=True)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        reason = f"no {error} in torchvision" if isinstance(error, KeyError) else error
        raise InputError(
            f"--weights {weights}: not to be had for {backbone} ({reason}). Give a file of "
            "torchvision's weights (--weights FILE), or --weights none to start at random"
        ) from None


def load_trunk(model: nn.Module, backbone: str, weights: str) -> str:
    """Loads a trunk; says in one line what was loaded and what stays random.

    weights     "none", "imagenet", "imagenet-v2" (torchvision's; the first is the papers' kind), or
                a file with a state dict in torchvision's names, which may cover the trunk in part
    InputError  no network, no such file, or weights of another network
    """
    if weights == "none":
        return "random"
    if weights in IMAGENET:
        state = imagenet_weights(backbone, weights)
    else:
        state = read_checkpoint(weights, "--weights")
    if isinstance(state.get("state_dict"), dict):  # as training programs save it
        state = state["state_dict"]
    state = {name.removeprefix("module."): value for name, value in state.items()}
    target = model.trunk.state_dict()
    fits = {
        k: state[k] for k, v in target.items() if getattr(state.get(k), "shape", None) == v.shape
    }
    wrong = [k for k in state if k in target and k not in fits]
    if wrong or not fits:
        reason = f"{wrong[0]} has another shape" if wrong else "none of its names is the trunk's"
        raise InputError(f"--weights {weights}: not weights of {backbone} ({reason})")
    refuse_nan(fits, f"--weights {weights}")
    model.trunk.load_state_dict(fits, strict=False)
    missing = [k for k in target if k not in fits and not k.endswith("num_batches_tracked")]
    return f"{len(fits)} tensors from {weights}; random stay: {', '.join(missing) or 'none'}"


def refuse_nan(state: dict, where: str) -> None:
    """InputError where weights from a file are not finite."""
    if wrong := [name for name, value in state.items() if not value.isfinite().all()]:
        raise InputError(f"{where}: {wrong[0]} is not finite (NaN or infinity)")


def load_weights(model: nn.Module, saved: dict, path: str | Path) -> None:
    """A checkpoint's weights; those of modules of a method's own are left out.

    InputError: weights of another network; the first tensor that differs is named
    """
    state, here = saved.get("model"), shapes_in(model.state_dict())
    there = shapes_in(state) if isinstance(state, dict) else {}
    for name in (*here, *(name for name in there if str(name).startswith(NETWORK))):
        if there.get(name) != here.get(name):
            raise InputError(
                f"{path}: weights of another network than these flags give ({name}: "
                f"{there.get(name, 'none')} there, {here.get(name, 'none')} here)"
            )
    state = {name: state[name] for name in here}
    refuse_nan(state, str(path))
    model.load_state_dict(state)


def shapes_in(state: dict) -> dict[str, list[int]]:
    return {name: [*v.shape] for name, v in state.items() if isinstance(v, torch.Tensor)}
