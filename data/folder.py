"""A run's folder: whose it is, which steps are finished, which files are damaged.

config.json and every checkpoint hold the flags of the run and the identity of its data. A folder
goes on with the same ones only; what cannot be read is set aside, under a name of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data.files import CorruptFile, InputError, read_checkpoint, read_json

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows: nothing keeps two processes out of one folder there

# flags that leave the results alone; the data are known by their identity, wherever they lie
FREE = ("out", "name", "typed", "device", "compile", "workers", "save_every", "step0", "data")
# all that a run makes but its script's copies: a dry run removes what the one before has left
MADE = ("config.json", "metrics.json", "memory_[0-9]*.json", "last.pt", "*_[0-9]*.pt")
MADE += ("train.csv", "iou.csv", "log.txt", "flags.txt", "pictures/*_[0-9]*.png")


def claim(folder: Path, anew: bool) -> int:
    """Makes the folder, keeps other processes out of it, and removes what a killed one left.

    anew        what the run before has made is removed, too
    returns     a file descriptor: the folder is claimed until it is closed
    InputError  another process has it, or it cannot be written to
    """
    try:
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            if fcntl:  # lockf: the workers, which may live a little longer, do not inherit it
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(lock)
            raise InputError(
                f"{folder}: another process is at work in it; wait for it, or give --out DIR"
            ) from None
        except OSError:
            pass  # a file system without locks
        for pattern in (".*.unfinished", *MADE * anew):
            for path in folder.glob(pattern):
                path.unlink()
    except OSError as error:
        raise InputError(
            f"--out {folder.parent}: cannot be written to ({error.strerror})"
        ) from None
    return lock


# whose it is


def digest(samples: Sequence[tuple], classes: Sequence[Sequence[int]], order: Sequence[int]) -> str:
    """How many samples, and a hash of their names, their order and the numbers in their masks."""
    lines = (
        f"{sample_name(sample)} {[order[c - 1] for c in ids]}\n"
        for sample, ids in zip(samples, classes, strict=True)
    )
    return f"{len(samples)} (digest {hashlib.sha256(''.join(lines).encode()).hexdigest()[:12]})"


def sample_name(sample: tuple) -> str:
    """The file name of a sample's picture, or a drawn one's number."""
    return getattr(sample[0], "name", str(sample[0]))


def differences(there: dict, here: dict) -> list[str]:
    """Where flags, or parts of the data's identity, are not the same. Of lists the first place."""
    found = []
    for key, mine in here.items():
        other = there.get(key)
        if key in FREE or other == mine:
            continue
        if key in ("classes", "numbers") and isinstance(other, list) and len(other) == len(mine):
            place = next(i for i in range(len(mine)) if other[i] != mine[i])
            key, other, mine = f"{key}[{place}]", other[place], mine[place]
        found.append(f"{key} {other} there, {mine} here")
    return found


def refuse_other(path: Path, content: dict, flags: dict, identity: dict, advice: str = "") -> None:
    """InputError: a config.json or a checkpoint has other flags or other data; they are named.

    content     of the file. What an older version has not written down counts as the same
    """
    there = identity | content.get("flags", flags) | content.get("data", {})
    if found := differences(there, flags | identity):
        raise InputError(f"{path}: of another run ({', '.join(found)}){advice}")


def refuse_other_run(folder: Path, flags: dict, identity: dict, say: Callable) -> None:
    """InputError: something saved in the folder has other flags or other data."""
    saved = [*sorted(folder.glob("step_[0-9]*.pt")), *folder.glob("last.pt")]
    if not saved and not (folder / "metrics.json").exists():
        return
    known = {folder / "config.json": usable(folder / "config.json", read_config, say)}
    for path in saved:
        with contextlib.suppress(CorruptFile):  # it is set aside where it is needed
            known[path] = read_checkpoint(path, whole=False)
    for path, content in known.items():
        refuse_other(path, content or {}, flags, identity, "; give --name NAME")


def read_config(path: Path) -> dict:
    """A config.json. Of its data an older one knows the classes only."""

    def parse(content: dict) -> dict:
        data = content.get("data") or {"classes": content["classes"]}
        if not (isinstance(content["flags"], dict) and isinstance(data["classes"], list)):
            raise TypeError("flags or classes")
        return content | {"data": data}

    return read_json(path, parse)


# what is finished, what is damaged


def usable(path: Path, read: Callable, say: Callable) -> object:
    """What `read` makes of a file; None if there is none, or a damaged one, which is set aside."""
    try:
        return read(path) if path.exists() else None
    except CorruptFile as error:
        os.replace(path, f"{path}.damaged")
        say(f"{error}; set aside as {path.name}.damaged")
        return None


def finished_steps(folder: Path, say: Callable) -> tuple[list[dict], bool]:
    """The finished steps' entries for metrics.json, and whether it has others or none.

    metrics.json may be missing, damaged or older: a step_K.pt holds its own entry. If the newest
    model is damaged, its step is trained again.
    """
    listed = usable(folder / "metrics.json", read_results, say) or []
    results = listed.copy()
    while results and (newest := folder / f"step_{len(results) - 1}.pt").exists():
        if usable(newest, read_checkpoint, say):
            break
        results.pop()
    while saved := usable(path := folder / f"step_{len(results)}.pt", read_checkpoint, say):
        if "metrics" not in saved and not (folder / "last.pt").exists():
            raise InputError(
                f"{path} is not in metrics.json, and an older version has written it: remove it to "
                "train the step again, or give another --out DIR"
            )
        if "metrics" not in saved:
            break  # stopped between the two: last.pt is at the end of the step
        results.append(saved["metrics"])
    return results, results != listed


def read_results(path: Path) -> list[dict]:
    """The entries of metrics.json, of step 0 and so on."""

    def parse(content: dict) -> list[dict]:
        for step, entry in enumerate(content["steps"]):
            averages = (*entry["with_background"].values(), *entry["without_background"].values())
            sum(value or 0.0 for value in (*averages, entry["test_images"], *entry["iou"].values()))
            if entry["step"] != step or not isinstance(entry["timing"], dict):
                raise ValueError(f"entry {step}")
        return content["steps"]

    return read_json(path, parse)


# what else is kept there


def read_last(path: Path) -> dict:
    """A last.pt. CorruptFile: it holds something else."""
    saved = read_checkpoint(path)
    kinds = {"model": dict, "optimizer": dict, "rng": torch.Tensor, "window": list, "step": int}
    kinds |= {"iteration": int, "seconds": float}
    if wrong := [key for key, kind in kinds.items() if not isinstance(saved.get(key), kind)]:
        raise CorruptFile(f"{path}: not such a file as a run writes ({wrong[0]})")
    return saved


def read_rows(path: Path, say: Callable) -> list[dict[str, str]]:
    """The rows of train.csv. Damaged ones are left out, which is said."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows, header = [], lines[0].strip().split(",") if lines else []
    for line in lines[1:]:
        cells = line.rstrip("\n").split(",")
        row = dict(zip(header, cells, strict=False))
        numbers = row.get("step", ""), row.get("iteration", "")
        if line.endswith("\n") and len(cells) == len(header) and all(map(str.isdecimal, numbers)):
            rows.append(row)
    if left_out := len(lines) - 1 - len(rows):
        say(f"{path}: {left_out} damaged rows are left out")
    return rows


def keep_script(folder: Path, script: Path, say: Callable) -> None:
    """A copy of the script. If it has changed since, the old copy stays under another name."""
    copy = folder / script.name
    if copy.exists() and copy.read_bytes() != script.read_bytes():
        before = copy.with_stem(f"{copy.stem}-before-{time.strftime('%Y%m%d-%H%M%S')}")
        os.replace(copy, before)
        say(f"{script.name} has changed since; the old one is kept as {before.name}")
    shutil.copy(script, copy)
