"""What a run shows of itself as text: flags, progress, results beside the published numbers.

It imports nothing of ours but the reading of files.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Sequence

import numpy as np
import torch

from data.files import read_table


def average_of_steps(results: list[dict]) -> float:
    """Mean over the steps of the mIoU over the classes seen at each, background included.

    A step without a test image of its classes has none, and is left out.
    """
    values = [r["with_background"]["all"] for r in results]
    return float(np.mean([v for v in values if v is not None] or [math.nan]))


def as_typed(key: str, value: object) -> list[str]:
    """A flag as the words of a command line."""
    flag = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]


def clock(seconds: float) -> str:
    hours, seconds = divmod(round(seconds), 3600)
    return f"{hours}:{seconds // 60:02}:{seconds % 60:02}"


def live_line(done: float, left: float, losses: dict[str, str]) -> str:
    """The step's progress for a terminal: DKD's five losses just fit into 80 columns.

    done        share of the step, 0 ... 1
    left        seconds
    """
    shown = (f"{name} {float(value):.4f}"[: len(name) + 6] for name, value in losses.items())
    return f"{100 * done:.0f} %, {clock(left)} left; " + " ".join(shown)


def log_line(place: str, left: float, after: float, rate: float, losses: dict[str, str]) -> str:
    """The step's progress for a log.

    left, after     seconds, of this step and of the later ones, which distil: there it is less
    rate            images per second
    """
    whole = f" (run: {clock(left + after)} or more)" if after else ""
    shown = ", ".join(f"{name} {value}" for name, value in losses.items())
    return f"  {place}, {clock(left)} left{whole}, {rate:.0f} images/s; {shown}"


def summary(result: dict) -> str:
    shown = [f"{k} {v:.2f}" for k, v in result["with_background"].items() if v is not None]
    return f"mIoU {', '.join(shown)} on {result['test_images']} test images"


def iou_table(result: dict) -> str:
    """A step's IoU of each class, some to a line of 80 columns; "-": no test image shows it."""
    width = min(18, max(map(len, result["iou"])))
    cells = [
        f"{name[:width]:{width}} {'-' if value is None else f'{value:.1f}':>5}"
        for name, value in result["iou"].items()
    ]
    each = 78 // (width + 8)
    rows = (cells[i : i + each] for i in range(0, len(cells), each))
    return "\n".join("  " + "  ".join(row) for row in rows)


def not_learned(result: dict, new: Sequence[str], iterations: int | None) -> str:
    """A line on the new classes that the model hardly finds; "": it finds all.

    iterations      of the step; None: --step0 took it from another run
    """
    iou = result["iou"]
    missed = [name for name in new if iou[name] is not None and iou[name] < 1]
    if not missed:
        return ""
    if iterations is None:
        return f"\n  not learned: {', '.join(missed)}"
    text = f"\n  not learned in {iterations} iterations: {', '.join(missed)}. Try more --epochs"
    return text + ", a smaller --batch or a higher --lr"


def iou_csv(results: list[dict], steps: Sequence) -> str:
    """A row per class, a column per step; empty where no test image shows the class."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["class", "learned_in", *(f"step_{r['step']}" for r in results)])
    for c, name in enumerate(results[-1]["iou"] if results else ()):
        values = (r["iou"].get(name) for r in results)
        first = next(step.index for step in steps if c <= step.last)
        table.writerow([name, first, *("" if v is None else f"{v:.2f}" for v in values)])
    return text.getvalue()


def results_table(
    results: list[dict], steps: Sequence, args: argparse.Namespace, method: str
) -> str:
    """A column per step: base, new, all, with and without background. Below: what was published."""
    base, last = steps[0].last, steps[results[-1]["step"]].last
    lines = ["mIoU, %".ljust(26) + "".join(f"step {r['step']}".rjust(8) for r in results)]
    for kind, first in (("with_background", 0), ("without_background", 1)):
        classes = {"base": f"{first}-{base}", "new": f"{base + 1}-{last}", "all": f"{first}-{last}"}
        for key in ("base", "new", "all", "harmonic") if first == 0 else ("base", "all"):
            values = [r[kind][key] for r in results]
            title = f"{key} {classes.get(key, '')}" + ", no background" * first
            cells = ("-" if v is None else f"{v:.2f}" for v in values)
            if values[-1] is not None:
                lines.append(title.ljust(26) + "".join(cell.rjust(8) for cell in cells))
    lines.append(f"average of 'all' over the steps: {average_of_steps(results):.2f}")
    own_order = args.class_order is None  # what was published is of that one
    for row in published(args.dataset, args.task, args.setting, method) if own_order else ():
        values = ", ".join(f"{k} {row[v]}" for k, v in (("base", "old"), ("new", "new")) if row[v])
        covers = averaging_convention(row)
        lines.append(f"published: {values}, all {row['all']} ({covers}; {row['source']})")
    return "\n".join(lines)


def published(dataset: str, task: str, setting: str, method: str) -> list[dict[str, str]]:
    """The rows of data/published.csv."""
    wanted = {"dataset": dataset, "task": task, "setting": setting, "method": method}
    return [row for row in read_table("published") if wanted.items() <= row.items()]


def best_published(
    dataset: str, task: str, setting: str, method: str, convention: str
) -> dict[str, str] | None:
    """The row to compare with: of this convention if possible, then a mean of several runs."""
    return max(
        published(dataset, task, setting, method),
        key=lambda r: (averaging_convention(r) == convention, bool(r["std"]), bool(r["old"])),
        default=None,
    )


def averaging_convention(row: dict[str, str]) -> str:
    """What a published row's averages of base and all cover."""
    return "no background" if row["convention"] in ("A", "A/B as A") else "with background"


def iou_per_class(result: dict) -> torch.Tensor:
    """A step's entry of metrics.json -> float64 [C], percent; NaN where `without_nan` made None."""
    return torch.tensor(np.array([*result["iou"].values()], float))


def without_nan(value: object) -> object:
    """NaN becomes None, which JSON has."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
