"""What people look at: the table of runs, pictures, predictions, own data, README's examples."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from trees import TINY

import common
import dkd
import mib_unbiased

ROOT = Path(__file__).resolve().parent.parent


def finished(folder, script, flags, iou, published="", steps=6):
    """What a run leaves for the table: every class has this IoU after every step."""
    args = script.flags().parse_args(shlex.split(flags))
    common.fill_in(vars(args))
    base = {"method": script.__name__, "precision": "fp32"}
    config = {"flags": vars(args) | base, "versions": {"torch": "2.9.9", "device": "a card"}}
    config |= {"argv": shlex.split(flags), "published": published}
    names, _ = common.class_table(args.dataset)
    step = {"test_images": 7, "timing": {"minutes": 1.5}}
    step["iou"] = {name: 0.0 if name == "background" else iou for name in names}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps({"steps": [step] * steps}))
    os.utime(folder / "metrics.json", (86400, 86400))
    return str(folder)


def cells(table):
    """The rows of a Markdown table as dictionaries."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] == "| "]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def report(*given, curves=None):
    return common.report(argparse.Namespace(runs=[*map(str, given)], curves=curves))


def test_the_table_has_a_row_per_configuration_and_what_was_published(tmp_path, capsys):
    fine_tuning = "--task 15-1 --ce plain --kd none --init random --lr 0.5"
    runs = [
        finished(tmp_path / "a0", dkd, "--task 15-1 --lr 0.5", 50, "DKD"),
        finished(tmp_path / "a1", dkd, "--task 15-1 --lr 0.5 --seed 1 --workers 3", 60, "DKD"),
        finished(tmp_path / "b", mib_unbiased, "--task 15-1 --lr 0.5", 40, "MiB"),
        finished(tmp_path / "c", mib_unbiased, fine_tuning, 4),
        finished(tmp_path / "d", mib_unbiased, "--task offline --lr 0.5", 80, steps=1),
    ]
    assert report(*runs[:3], f"mine={runs[3]}", runs[4]) == 0
    out, err = capsys.readouterr()
    found = cells(out)
    assert err == "" and [row["method"] for row in found] == ["DKD", "MiB", "mine", "joint"]
    above = out.splitlines()[0]
    for text in ("dataset voc", "setting overlapped", "resnet101, crop 512", "a card, fp32"):
        assert text in above and text not in out[len(above) :]
    assert "torch 2.9.9" in above and "date 1970-01-02" in above and "flags `--lr 0.5`" in above
    joined, mib, mine, joint = found
    # DKD counts the background, whose IoU is 0 here; MiB does not
    assert joined["base"] == f"{55 * 15 / 16:.1f} ± {50**0.5 * 15 / 16:.1f}"
    assert joined["seeds"] == "0, 1" and joined["minutes"] == "9" and joined["task"] == "15-1"
    assert joined["published"].startswith("78.09 / 42.72 / 69.67 (with background; DKD Table 1")
    assert (mib["base"], mib["averages"]) == ("40.0", "no background")
    assert mib["published"].startswith("35.1 / 13.5 / 29.7 (no background; MiB Table 1")
    assert mib["command"] == "`mib_unbiased.py`"
    assert mine["command"] == "`mib_unbiased.py --ce plain --kd none --init random`"
    assert (mine["base"], mine["new"], mine["published"]) == ("3.8", "4.0", "-")
    # the joint run is divided, counted and compared as the first other task of the data set
    assert (joint["base"], joint["new"]) == ("75.0", "80.0")
    assert joint["published"].startswith("78.88 / 72.63 / 77.39 (with background; ")


def test_a_folder_that_is_no_finished_run_is_left_out_in_one_line(tmp_path, capsys):
    run = finished(tmp_path / "a", dkd, "--task 15-1", 50)
    half = finished(tmp_path / "half", dkd, "--task 15-1", 50, steps=4)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    (tmp_path / "broken/metrics.json").write_text("[")
    assert report(tmp_path / "none", run, half, tmp_path / "broken") == 2
    out, err = capsys.readouterr()
    assert len(cells(out)) == 1 and cells(out)[0]["base"] == "46.9"
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("common.py: ") for line in lines)
    assert "none: no results of a run" in lines[0] and "broken: no results" in lines[2]
    assert "half: not finished, 2 steps are missing" in lines[1]


def test_the_command_prints_the_table_of_a_real_run(start, tmp_path):
    assert start(TINY + " --alpha 1 --epochs 1")[0] == 0
    command = [sys.executable, str(ROOT / "common.py"), "runs/dkd-voc-19-1-overlapped-s0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    (row,) = cells(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert row["method"] == "DKD" and "--alpha 1" in row["command"]
    last = json.loads(Path("runs/dkd-voc-19-1-overlapped-s0/metrics.json").read_text())["steps"][-1]
    assert float(row["all"]) == pytest.approx(last["with_background"]["all"], abs=0.051)


def test_curves_are_drawn_with_matplotlib_and_else_one_line_says_so(tmp_path, capsys, monkeypatch):
    runs = [finished(tmp_path / f"{k}", dkd, f"--task 15-1 --seed {k}", 50 + k) for k in (0, 1)]
    runs.append(finished(tmp_path / "joint", dkd, "--task offline", 80, steps=1))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report(*runs, curves="x.png") == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    pytest.importorskip("matplotlib")
    assert report(*runs, curves=tmp_path / "x.png") == 0
    assert common.open_image(tmp_path / "x.png", "curves").width > 1000
    assert report(*runs, curves=tmp_path / "no/x.png") == 2
    assert "--curves" in capsys.readouterr().err
