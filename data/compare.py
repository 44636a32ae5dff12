"""Finished runs as a Markdown table, beside the published numbers.

    python -m data.compare runs/* --curves curves.png
    python -m data.compare mine=runs/mine-voc-15-1-overlapped-s0 runs/dkd-voc*

Runs that differ only in the seed, or in the class order, share a row: mean and
standard deviation. Below the table: what is no result, such as a dry run, a run
that is not finished, or one that is there twice. What is no run at all is named
on stderr, and the exit status is then 2.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import common
from common import InputError
from data import command
from data.folder import read_config, read_results
from data.predict import method_script
from data.tables import averaging_convention, best_published, iou_per_class

AVERAGES = ("base", "new", "all")
# flags that the table does not list: they have a column, or change nothing in the method
UNLISTED = {"task", "dataset", "setting", "seed", "class_order", "data", "out", "step0", "device"}
UNLISTED |= {"save_every", "precision", "workers", "method", "head", "dropout", "bn_momentum"}
UNLISTED |= {"warmup", "name"}


def main(argv: list[str] | None = None) -> int:
    return command.run("compare", lambda: flags().parse_args(argv), compare)


def compare(args: argparse.Namespace) -> int:
    """The table, then the curves, then what is no run. Exit status."""
    runs, left_out, errors = {}, [], []
    for given in args.runs:
        try:
            run = read_run(given)
            one = run["row"], run["seed"], run["order"], str(run["training_images"])
            if one in runs:
                first = runs[one]["folder"]
                raise NoResult(f"{given}: has the seed, class order and flags of {first}")
            runs[one] = run
        except NoResult as reason:
            left_out.append(reason)
        except InputError as error:
            errors.append(error)
    rows = table_rows([*runs.values()])
    if rows:
        print(markdown(rows))
    for row in rows:
        if len({run["script"] for run in row["runs"]}) > 1:
            print(
                f"compare: the script has changed between the runs of {row['name']}",
                file=sys.stderr,
            )
    if left_out:
        print("\n".join(["\nno results:" if rows else "no results:", *map(str, left_out)]))
    if rows and args.curves:
        try:
            draw_curves(rows, args.curves)
            print(f"\ncurves in {args.curves}")
        except InputError as error:
            errors.append(error)
    for error in errors:
        print(f"compare: {error}", file=sys.stderr)
    return 2 if errors or not rows else 0


class NoResult(Exception):
    """A run that the table leaves out; says why."""


def read_run(given: str) -> dict:
    """A finished run.

    given       its folder, or NAME=folder to name its row
    returns     row: what is the same in all runs of a row; parts of config.json; script: its text,
                as the run has kept it; flags: those that differ from the script's recipe; typed: of
                these, those that were typed; iou: per step, float64 [C], percent, NaN where no test
                image shows the class; averages: whether they count the background;
                training_images: per step; minutes: per step, None where --step0 took it from
                another run; columns: texts
    NoResult    a dry run, or one that is not finished
    InputError  no run there, or one of a script that is not here
    """
    named = "=" in given and not Path(given).is_dir()
    name, folder = given.split("=", 1) if named else ("", given)
    file = Path(folder) / "metrics.json"
    try:
        config = read_config(file.with_name("config.json"))
        steps, used = read_results(file) if file.exists() else [], config["flags"]
        script, copy = method_script(used["method"]), file.with_name(f"{used['method']}.py")
        recipe = vars(script.flags().parse_args([])) | {"dataset": used["dataset"]}
        common.fill_in(recipe)
        of = len(common.task_steps(used["task"], len(config["data"]["classes"]) - 1))
        if used["dry_run"]:
            raise NoResult(f"{folder}: a dry run")
        if len(steps) < of:
            raise NoResult(f"{folder}: not finished, {len(steps)} of {of} steps are done")
        changed = {
            key: shown_flag(key, used[key])
            for key in recipe
            if key not in UNLISTED and used.get(key) not in (None, recipe[key])
        }
        iou = [iou_per_class(step) for step in steps]
        untested = iou[-1][common.BACKGROUND].isnan()
        own_data = f" {Path(used['data']).name}" if used["dataset"] == "folder" else ""
        run = {key: used[key] for key in ("method", "dataset", "task", "setting", "seed")} | {
            "folder": folder,
            "script": copy.read_bytes() if copy.exists() else b"",
            "name": name or ("joint" if of == 1 else config["published"]) or used["method"],
            "order": Path(used["class_order"]).name if used["class_order"] else "own",
            "published": config["published"],
            "flags": [*changed.values()],
            "typed": [changed[key] for key in typed_keys(used, changed)],
            "iou": iou,
            "averages": "no background" if untested else "with background",
            "training_images": [step.get("training_images") for step in steps],
            "minutes": [step["timing"].get("minutes") for step in steps],
            "columns": {
                "dataset": used["dataset"] + own_data,
                "task": used["task"],
                "setting": used["setting"],
                "trunk": f"{used['backbone']}, crop {used['crop']}",
                "tested on": f"{steps[-1]['test_images']} images",
                "device": f"{config['versions']['device']}, {used['precision']}",
                "torch": config["versions"]["torch"],
                "date": time.strftime("%Y-%m-%d", time.gmtime(file.stat().st_mtime)),
            },
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: no results of a run ({error})") from None
    same = [run["name"], run["method"], run["flags"]]
    same += [run["columns"][key] for key in ("dataset", "task", "setting", "tested on")]
    return run | {"row": str(same)}


def typed_keys(used: dict, changed: dict) -> list[str]:
    """Which of the `changed` flags were typed, not filled in; of an older run all."""
    if "typed" not in used:
        return [*changed]
    words = [word.partition("=")[0] for word in used["typed"]]
    return [key for key in changed if {shown_flag(key, True), shown_flag(key, False)} & {*words}]


def shown_flag(key: str, value: object) -> str:
    """A flag as the table shows it: numbers rounded, of a path only the last part."""
    flag, values = "--" + key.replace("_", "-"), value if isinstance(value, list) else [value]
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    texts = (f"{v:g}" if isinstance(v, float) else Path(str(v)).name for v in values)
    return " ".join([flag, *texts])


def table_rows(runs: Sequence[dict]) -> list[dict]:
    """A row per group of runs that differ in the seed or in the class order only.

    A joint run (--task offline) has one step, in which all classes are learned: its classes are
    divided, averaged and compared as those of the first other task on its data set. All rows count
    the background, unless everything that was published for them leaves it out, or the test does
    (MSRC-v2; ADE20K with --ignore other).

    returns     "name"; "runs"; "values" [runs, steps, 3]: base, new, all in percent; "published":
                a row of data/published.csv or None; "averages": what base and all cover
    """
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["row"], []).append(run)
    likes = {}
    for key, (run, *_) in groups.items():
        others = (r for r in runs if r["dataset"] == run["dataset"] and r["task"] != "offline")
        likes[key] = next(others, run) if run["task"] == "offline" else run
    found = [published_row(run, likes[key]) for key, (run, *_) in groups.items()]
    conventions = {averaging_convention(row) for row in found if row}
    background = conventions != {"no background"}
    rows = []
    for (key, group), best in zip(groups.items(), found, strict=True):
        base = common.task_steps(likes[key]["task"], len(group[0]["iou"][-1]) - 1)[0].last
        values = [[common.averages(iou, base, background) for iou in r["iou"]] for r in group]
        values = np.array([[[step[k] for k in AVERAGES] for step in steps] for steps in values])
        row = {"name": group[0]["name"], "runs": group, "values": values, "published": best}
        rows.append(row | {"averages": group[0]["averages"] if background else "no background"})
    return rows


def published_row(run: dict, like: dict) -> dict[str, str] | None:
    """What was published for a run, in its data set's own order; if possible averaged as the run.

    like        the run itself, or what a joint run is compared as
    """
    name = run["published"] if like is run else "Joint"
    place = like["dataset"], like["task"], like["setting"], name
    return best_published(*place, run["averages"]) if like["order"] == "own" else None


def markdown(rows: Sequence[dict]) -> str:
    """The table. What is the same in every row stands once, above it."""
    several = len(rows) > 1
    first, *others = (row["runs"][0]["typed"] for row in rows)
    shared = [flag for flag in first if several and all(flag in other for other in others)]
    lines = [{"method": row["name"]} | cells(row, shared) for row in rows]
    candidates = [k for k in lines[0] if several and k not in ("method", *AVERAGES, "seeds")]
    same = {k: lines[0][k] for k in candidates if len({line[k] for line in lines}) == 1}
    above = ["mIoU in %", *(f"{key} {value}" for key, value in same.items() if value != "-")]
    if shared:
        above.append(f"flags `{' '.join(shared)}`")
    columns = [key for key in lines[0] if key not in same]
    table = [columns, ["---"] * len(columns), *([line[k] for k in columns] for line in lines)]
    return "; ".join(above) + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in table)


def cells(row: dict, shared: Sequence[str]) -> dict[str, str]:
    """A row's cells by column; its command leaves out the `shared` flags."""
    runs, text = row["runs"], {}
    for kind, values in zip(AVERAGES, row["values"][:, -1].T, strict=True):
        spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
        text[kind] = "-" if np.isnan(values).any() else f"{values.mean():.1f}{spread}"
    text["seeds"] = ", ".join(map(str, sorted({run["seed"] for run in runs})))
    text["class order"] = ", ".join(sorted({run["order"] for run in runs}))
    text["published"] = "-"
    if best := row["published"]:
        means = " / ".join(best[k] or "-" for k in ("old", "new", "all"))
        text["published"] = f"{means} ({averaging_convention(best)}; {best['source']})"
    text["averages"] = row["averages"]
    for key in runs[0]["columns"]:
        text[key] = ", ".join(sorted({run["columns"][key] for run in runs}))
    minutes = np.array([run["minutes"] for run in runs], float)
    taken = bool(np.isnan(minutes[:, 0]).any())  # --step0: from another run
    text["minutes"] = f"{minutes[:, taken:].sum(1).mean():.1f}" + " without step 0" * taken
    own = [flag for flag in runs[0]["typed"] if flag not in shared]
    text["command"] = f"`{' '.join([runs[0]['method'] + '.py', *own])}`"
    return text


def draw_curves(rows: Sequence[dict], file: str) -> None:
    """mIoU over the steps: a line per row, and one standard deviation over its runs.

    InputError: no matplotlib, or a file that cannot be written
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--curves needs one more package: pip install matplotlib") from None
    figure = Figure((11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for k, (axes, kind) in enumerate(zip(panels, AVERAGES, strict=True)):
        axes.set(title=f"{kind} classes", xlabel="step", ylabel="" if k else "mIoU, %")
        axes.xaxis.get_major_locator().set_params(integer=True)
        for row in rows:
            values = row["values"][:, :, k]
            mean, spread = values.mean(0), values.std(0, ddof=len(values) > 1)
            if len(mean) > 1:
                steps = range(len(mean))
                axes.errorbar(steps, mean, spread, marker="o", capsize=3, label=row["name"])
            else:  # a joint run has one step: a level to compare with
                axes.axhline(mean[0], color="0.4", ls="--", label=row["name"])
    axes.set(ylim=(0, None))
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
    try:
        figure.savefig(file, dpi=110, format=Path(file).suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise InputError(f"--curves {file}: cannot be written ({error})") from None


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    text = "folders of runs; NAME=RUN names a row"
    parser.add_argument("runs", metavar="RUN", nargs="+", help=text)
    text = "also draw mIoU over the steps, a line per row; needs matplotlib (no curves)"
    parser.add_argument("--curves", metavar="FILE.png", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
