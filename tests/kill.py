"""Kills runs of `shapes` at random moments, starts them again, compares with an undisturbed run.

    python tests/kill.py                           all five methods, 20 kills each
    python tests/kill.py --methods dkd --kills 3   what the test suite does

SIGKILL after a random time, or as soon as a random one of the temporary files appears, so that a
file is left half written. Each start has 0, 1 or 2 workers, also drawn. Every checkpoint must be
readable after each kill; in the end weights, metrics.json without timings and train.csv must equal
the undisturbed run's bit for bit. Exit status 1 if anything differs. Not collected by pytest.
"""

import argparse
import importlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trees import METHODS  # noqa: E402

import common  # noqa: E402
from data import shapes  # noqa: E402

torch.set_num_threads(1)  # a forked child that waits for its parent's threads waits for ever
shapes.TRAIN, shapes.TEST = 60, 12
FLAGS = (
    "--dataset shapes --task 10-5 --setting overlapped --crop 32 --batch 4 --epochs 3 --device cpu"
)
OWN = {"dkd": "--memory 10", "mib_unbiased": "--replay 10 --ewc 1"}
WRITE = 3  # one of so many kills waits for a file that is being written


def begin(method: str, out: Path, workers: int) -> int:
    """Starts a run in a child that has imported everything already; its process id."""
    if pid := os.fork():
        return pid
    status = 70
    try:
        log = os.open(out.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        flags = f"{FLAGS} {OWN.get(method, '')} --save-every 0 --workers {workers} --out {out}"
        sys.argv = [str(ROOT / f"{method}.py"), *flags.split()]
        module = importlib.import_module(method)
        common.launch(module.main, module.flags())
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def folder_of(out: Path) -> Path:
    return next(out.glob("*"), out / "none yet")


def half_written(out: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder_of(out)) if name[0] == "." and name != ".lock"]
    except FileNotFoundError:
        return []


def ended(pid: int) -> bool:
    """False while it runs; what a child returns but 0 is an error."""
    done, status = os.waitpid(pid, os.WNOHANG)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), "see the log file"
    return bool(done)


def kill_once(pid: int, out: Path, longest: float) -> bool:
    """Kills the run after `longest` seconds at most; False: it ended before."""
    moment = time.monotonic() + random.random() * longest
    in_a_write = random.randrange(WRITE) == 0
    while True:
        if ended(pid):
            return False
        if time.monotonic() > moment and (not in_a_write or half_written(out)):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
        time.sleep(0.0001 if in_a_write else 0.002)


def content(out: Path) -> dict:
    """All that must not depend on interruptions."""
    folder = folder_of(out)
    left = [*half_written(out), *folder.glob("last.pt")]
    assert not left, left
    steps = json.loads((folder / "metrics.json").read_text())["steps"]
    return {
        "weights": [
            torch.load(folder / f"step_{k}.pt", weights_only=True)["model"]
            for k in range(len(steps))
        ],
        "metrics.json": [{k: v for k, v in step.items() if k != "timing"} for step in steps],
        "train.csv": (folder / "train.csv").read_text(),
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def torture(method: str, kills: int, place: Path) -> tuple[bool, str]:
    """One method: whether all was equal, and a row of the table."""
    begun = time.monotonic()
    kill_once(begin(method, place / "whole", 0), place / "whole", math.inf)
    whole, seconds = content(place / "whole"), time.monotonic() - begun
    killed, halves, runs, equal = 0, 0, 0, dict.fromkeys(whole, True)
    while killed < kills:
        out = place / f"killed{runs}"
        longest = seconds / 4
        while kill_once(begin(method, out, random.choice((0, 1, 2))), out, longest):
            killed += 1
            halves += bool(half_written(out))
            for path in folder_of(out).glob("*.pt"):
                common.read_checkpoint(path, "after a kill")
            if killed == kills:
                longest = math.inf
        runs, found = runs + 1, content(out)
        equal = {k: equal[k] and same(whole[k], found[k]) for k in whole}
    words = [("different", "equal")[v] for v in equal.values()]
    cells = (method, f"{seconds:.1f} s", killed, halves, runs, *words)
    return all(equal.values()), "".join(str(cell).ljust(14) for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each method (20)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    args = parser.parse_args()
    random.seed(args.seed)
    for number in (*range(shapes.TRAIN), *range(-shapes.TEST, 0)):
        shapes.draw(number)  # once for all children
    columns = ("method", "undisturbed", "kills", "in a write", "runs", "weights", "metrics.json")
    print("".join(name.ljust(14) for name in (*columns, "train.csv")), flush=True)
    all_equal = True
    for method in args.methods:
        importlib.import_module(method)
        place = Path(tempfile.mkdtemp(prefix=f"kill-{method}-"))
        equal, row = torture(method, args.kills, place)
        print(f"{row}{'' if equal else place}", flush=True)
        all_equal &= equal
    sys.exit(not all_equal)


if __name__ == "__main__":
    main()
