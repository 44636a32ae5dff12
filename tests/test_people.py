"""What people look at: the table of runs, pictures, predictions, own data, README's examples."""

import argparse
import csv
import importlib
import json
import os
import re
import runpy
import shlex
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from trees import METHODS, SMALL, TINY

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
    config |= {"published": published}
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
    strange = Path(finished(tmp_path / "strange", dkd, "--task 15-1", 50))
    config = (strange / "config.json").read_text()
    (strange / "config.json").write_text(config.replace('"method": "dkd"', '"method": "this"'))
    assert report(tmp_path / "none", run, half, tmp_path / "broken", strange) == 2
    assert "this" not in sys.modules  # it would print a poem
    out, err = capsys.readouterr()
    assert len(cells(out)) == 1 and cells(out)[0]["base"] == "46.9"
    lines = err.splitlines()
    assert len(lines) == 4 and all(line.startswith("common.py: ") for line in lines)
    assert "none: no results of a run" in lines[0] and "broken: no results" in lines[2]
    assert "half: not finished, 2 steps are missing" in lines[1]
    assert "there is no script this.py here" in lines[3]


def test_the_command_prints_the_table(tmp_path, monkeypatch, capsys):
    finished(tmp_path / "a", dkd, "--task 15-1", 50)
    monkeypatch.setattr(sys, "argv", ["common.py", f"mine={tmp_path / 'a'}", "nowhere"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "common.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and cells(out)[0]["method"] == "mine"
    assert err.startswith("common.py: nowhere: no results")


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
    with pytest.raises(common.InputError, match="cannot be written"):
        report(*runs, curves=tmp_path / "no/x.png")


@pytest.fixture
def pets(tmp_path):
    """Own pictures: a folder with three classes; class 3 only in two pictures of the test."""
    root = tmp_path / "pets"
    for part, images in (("train", [[1], [2], [3], [1, 3], [2, 3]]), ("test", [[1, 2], [3]])):
        for i, classes in enumerate(images):
            ending = ("jpg", "png", "webp")[i % 3]
            trees.write(root / part / f"images/{part}{i}.{ending}", trees.picture(i))
            trees.write(root / part / f"masks/{part}{i}.png", trees.mask(classes))
    (root / "classes.txt").write_text("cat\ndog\n\nhorse\n")
    return root


OWN = f"--dataset folder --task 2-1 --setting overlapped {SMALL} --epochs 1"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_own_pictures_and_has_its_row(start, pets, method, capsys):
    status, out, err = start(OWN, pets, method)
    assert (status, err) == (0, "") and "learns horse (3) from 3 images" in out
    folder = Path(f"runs/{method}-folder-2-1-overlapped-s0")
    last = json.loads((folder / "metrics.json").read_text())["steps"][-1]
    assert [*last["iou"]] == ["background", "cat", "dog", "horse"] and last["test_images"] == 2
    assert report(folder) == 0
    (row,) = cells(capsys.readouterr().out)
    assert row["dataset"] == "folder pets" and row["trunk"] == "small, crop 32"
    assert float(row["all"]) == pytest.approx(last["with_background"]["all"], abs=0.051)
    typed = "--epochs 1 --batch 4 --crop 32 --backbone small --weights none --output-stride 8"
    assert row["command"].startswith(f"`{method}.py {typed}")
    # another folder of pictures is another data set
    pets.rename(pets.with_name("others"))
    status, _, err = start(OWN, pets.with_name("others"), method)
    assert status == 2 and "holds another run (data" in err


def test_own_pictures_are_checked(start, pets):
    status, out, _ = start(f"{OWN} --check-data", pets)
    assert status == 0 and "5 training and 2 test images" in out and "\n0 errors" in out
    colours = common.class_table("folder", pets)[1]
    assert len({*colours}) == 4
    (pets / "classes.txt").write_text("cat\ndog\n")  # masks read once are held against it again
    status, _, err = start(f"{OWN} --task 1-1", pets)
    assert status == 2 and "train2.png: class number 3, but there are only 2" in err
    for text in ("", "cat\ncat", "background\ncat"):
        (pets / "classes.txt").write_text(text)
        status, _, err = start(OWN, pets)
        assert status == 2 and "classes.txt: 1 to 254 classes, each once" in err
    (pets / "classes.txt").write_text("cat\ndog\nhorse\n")
    (pets / "train/masks/train1.png").unlink()
    status, _, err = start(OWN, pets)
    assert status == 2 and "train/masks/train1.png: no such mask" in err
    assert "error: no mask: 1" in start(f"{OWN} --check-data", pets)[1]
    (pets / "classes.txt").unlink()
    status, _, err = start(OWN, pets)
    assert status == 2 and "DIR/train/masks/x.png" in err


def test_pictures_show_every_step_also_after_a_resume(start, data, monkeypatch):
    pages, matrices = [], []
    sheet, confusion = common.sheet, common.draw_confusion
    monkeypatch.setattr(common, "sheet", lambda *a: pages.append(a) or sheet(*a))
    monkeypatch.setattr(common, "draw_confusion", lambda *a: matrices.append(a) or confusion(*a))
    flags = f"{TINY} --task 14-1 --epochs 1 --batch 16"
    folder = Path("runs/dkd-voc-14-1-overlapped-s0")

    def stop_in_the_last_step(self, groups, *rest):
        if self.step.index == 6:
            raise KeyboardInterrupt
        return update(self, groups, *rest)

    update = common.Run.update
    monkeypatch.setattr(common.Run, "update", stop_in_the_last_step)
    assert start(flags)[0] == 130 and len(pages) == 6
    monkeypatch.setattr(common.Run, "update", update)
    assert start(flags)[0] == 0
    after = [[title for title in page[1] if "after" in title] for page in pages]
    assert after[1] == ["after step 0", "after step 1"]
    assert after[6] == [f"after step {k}" for k in (0, 1, 2, 4, 5, 6)]
    # what a step predicted looks the same in its own sheet and in the last one
    for k, column in ((1, 3), (2, 4), (4, 5)):
        own = [np.asarray(row[-1]) for row in pages[k][0]]
        late = [np.asarray(row[column]) for row in pages[6][0]]
        assert all((a == b).all() for a, b in zip(own, late, strict=True))
    assert len(matrices[6][0]) == 21
    for k, matrix in enumerate(matrices):
        page = common.open_image(folder / f"pictures/confusion_{k}.png", "matrix")
        assert page.width == page.height > 34 * len(matrix[0])


@pytest.mark.parametrize("count", [21, 151])
def test_sheets_and_matrices_have_room_for_long_names(count):
    """No text touches the border; every cell of the matrix has the colour of its share."""
    names = [
        "background",
        *(f"{'escalator;moving staircase ' * (i % 9 == 0)}{i}" for i in range(count - 1)),
    ]
    matrix = np.diag(np.arange(count)) + 1
    matrix[3] = 0
    page = np.asarray(common.draw_confusion(matrix, names, 10).convert("L")).astype(int)
    assert (page[:, :3] == 255).mean() > 0.99 and (page[:3] == 255).mean() > 0.99
    cell = 34 if count == 21 else 15
    start = len(page) - 8 - count * cell + 3
    corners = page[start::cell, start::cell][:count, :count]
    assert corners[5, 5] < corners[5, 4] and corners[20, 20] < corners[5, 5]
    assert {*corners[3].tolist()} == {225}
    entries = [(name, (9, 9, 9)) for name in names[1:]]
    key = np.asarray(common.legend(entries, 600, 14).convert("L"))
    assert (key[:, -3:] == 255).all() and key.shape[1] >= 600
    assert common.legend([], 600, 14).height == 0


def test_predict_takes_folders_and_keeps_pictures_of_one_name_apart(start, tmp_path):
    flags = f"{TINY} --epochs 1"
    assert start(flags)[0] == 0
    photos = tmp_path / "photos"
    for name in ("a/x.jpg", "b/x.jpg", "b/x.png", "b/deep/y.webp"):
        trees.write(photos / name, trees.picture(len(name), 40, 70))
    (photos / "note.txt").write_text("no picture")
    turned = Image.new("RGB", (60, 30), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # a camera held upright
    turned.save("upright.jpg", exif=exif)
    grey = np.linspace(0, 65535, 30 * 60).reshape(30, 60)
    Image.fromarray(grey.astype(np.uint16)).save("sixteen.png")
    read = np.asarray(common.read_picture(Path("sixteen.png")))
    assert read.max() == 255 and 120 < read.mean() < 135
    status, out, _ = start(f"{flags} --predict photos upright.jpg sixteen.png")
    assert status == 0 and len(out.splitlines()) == 6 and "note" not in out
    pictures = Path("runs/dkd-voc-19-1-overlapped-s0/pictures")
    for name in ("a-x", "b-x", "b-x_2", "deep-y"):
        assert common.open_image(pictures / f"{name}_classes.png", "map").size == (70, 40)
    assert common.open_image(pictures / "upright_classes.png", "map").size == (30, 60)
    for line in out.splitlines():  # below the overlay: the legend of the classes found
        found, target = re.fullmatch(
            r".*?: (.*); see (.*)_overlay.png and _classes.png", line
        ).groups()
        painted, classes = (
            common.open_image(Path(f"{target}_{kind}.png"), kind) for kind in ("overlay", "classes")
        )
        assert (painted.height > classes.height) == bool(re.search(r"(?<!background) \d", found))
    (tmp_path / "empty").mkdir()
    status, _, err = start(f"{flags} --predict empty")
    assert status == 2 and "--predict empty: no picture in this folder" in err


def test_progress_tells_step_epoch_and_what_is_left(start, pets):
    _, out, _ = start(f"{OWN} --epochs 3 --batch 2", pets)
    lines = [line for line in out.splitlines() if "iteration" in line]
    pattern = r"  step {} epoch 3/3, iteration {}/{}, 0:00:00 left{}, \d+ images/s; mbce .*"
    assert re.fullmatch(pattern.format(0, 6, 6, r" \(run: 0:\d\d:\d\d or more\)"), lines[0])
    assert re.fullmatch(pattern.format(1, 3, 3, ""), lines[1])
    assert common.clock(3725.4) == "1:02:05"


def section(title):
    """The README's section, its commands by script, its other blocks."""
    text = (ROOT / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return text, re.findall(r"^python (\w+)\.py (.*)$", text, re.M)


def test_the_readmes_own_data_work(start, pets, tmp_path):
    text, commands = section("Your own data")
    for line in re.findall(r"^pets/(\S+)", text, re.M):
        assert (pets / line.replace("/a.jpg", "/train0.jpg").replace("/a.", "/train0.")).exists()
    trees.write(tmp_path / "photo.jpg", trees.picture(1))
    trees.write(tmp_path / "photos/other.png", trees.picture(2))
    for method, flags in commands:
        status, out, err = start(f"{flags} {SMALL} --epochs 1", method=method)
        assert (status, err) == (0, "")
    assert "photo.jpg: " in out and "other.png: " in out
    assert Path("runs/dkd-folder-2-1-overlapped-s0/pictures/photo_overlay.png").exists()


def test_the_readmes_fork_works(tmp_path, monkeypatch, capsys):
    text, commands = section("Fork a method")
    assert "cp dkd.py mine.py\n" in text
    code = (ROOT / "dkd.py").read_text()
    for hunk in re.split("^@@.*\n", re.search("```diff\n(.*?)```", text, re.S)[1], flags=re.M):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(x[1:] for x in lines if x[0] in " " + sign) for sign in "-+")
        assert code.count(old) == 1, f"dkd.py has changed, README's fork has not: {old}"
        code = code.replace(old, new)
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(common, "SHAPES_TRAIN", 80)
    monkeypatch.setattr(common, "SHAPES_TEST", 20)
    module = importlib.import_module("mine")
    assert [script for script, _ in commands] == ["mine", "mine", "common"]
    for script, flags in commands:
        importlib.import_module(script).flags().parse_args(shlex.split(flags))
    monkeypatch.setattr(sys, "argv", ["mine.py", *shlex.split(commands[0][1])])
    with pytest.raises(SystemExit) as stop:
        common.launch(module.main, module.flags())
    assert not stop.value.code and capsys.readouterr().err == ""
    folder = Path("runs/mine-shapes-15-1-overlapped-s0-dry")
    rows = [*csv.DictReader((folder / "train.csv").read_text().splitlines())]
    assert rows[0]["drift"] == "" and all(float(row["drift"]) > 0 for row in rows[1:])
    # nothing moved costs nothing; a moved weight costs its square; the new classifier is free
    model, old = (torch.nn.ModuleList([torch.nn.Linear(2, 2)] * n) for n in (1, 1))
    old.load_state_dict(model.state_dict())
    assert module.drift(model, old).item() == 0
    old[0].bias.data += 3
    model.append(torch.nn.Linear(2, 5))
    assert module.drift(model, old).item() == pytest.approx(18)


def fetch_nothing(monkeypatch, root):
    """torchvision's downloads and scipy, for --download without a network."""

    def voc(where, *_, download):
        assert Path(where) == root and download

    def sbd(where, *_, download):
        (Path(where) / "cls").mkdir(parents=True)
        (Path(where) / "cls/a0.mat").touch()

    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", voc)
    monkeypatch.setattr("torchvision.datasets.SBDataset", sbd)
    found = {"GTcls": [{"Segmentation": [np.uint8(trees.mask([1]) % 255)]}]}
    for name in ("scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(loadmat=lambda path: found))


def test_the_readmes_commands_run(start, tmp_path, monkeypatch, capsys):
    """All but those of the two sections above, in their order, on tiny data and a small network."""
    text = (ROOT / "README.md").read_text()
    for title in ("Your own data", "Fork a method"):
        text = text.replace(section(title)[0], "")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line.split(" # ")[0] for block in blocks for line in block.splitlines()]
    commands = [match for line in lines for match in re.findall(r"python (\w+)\.py (.+)", line)]
    trees.voc(tmp_path / "voc", trees.CLASSES, trees.CLASSES[:12])
    trees.ade(tmp_path / "ade", [range(1, 151)], [range(1, 151)])
    trees.msrc(tmp_path / "msrc")
    trees.write(tmp_path / "photo.jpg", trees.picture(1))
    monkeypatch.setattr(common, "SHAPES_TRAIN", 60)
    monkeypatch.setattr(common, "SHAPES_TEST", 10)
    fetch_nothing(monkeypatch, tmp_path / "voc")
    assert {script for script, _ in commands} == {*METHODS, "common"} and len(commands) > 15
    for script, flags in commands:
        where = re.search("--dataset (ade|msrc)", flags)
        flags = flags.replace("DIR", str(tmp_path / (where[1] if where else "voc")))
        if "runs/*" in flags:  # here only two of them
            flags = flags.replace("runs/*", " ".join(map(str, Path().glob("runs/[du]*shapes-15*"))))
        if script == "common":
            runs, curves = flags.split(" --curves ")
            drawn = curves if find_spec("matplotlib") else None
            assert report(*runs.split(), curves=drawn) == 0
            continue
        small = f" {SMALL} --epochs 1" * ("--analyse" not in flags)
        status, _, err = start(flags + small, method=script)
        assert (status, err) == (0, ""), flags


def test_the_flags_in_the_readmes_tables_are_accepted():
    text = (ROOT / "README.md").read_text().replace("--seed S", "--seed 0")
    typed = re.findall(r"`python (\w+)\.py ([^`]*)`", text)
    for script, part in re.findall(r"\n### (\w+)\.py[^\n]*\n(.*?)(?=\n##)", text, re.S):
        typed += [(script, span) for span in re.findall(r"`(--[^`]*)`", part)]
    typed = [pair for pair in typed if pair[1] not in ("--analyse", "--labels")]
    assert len(typed) > 70 and {script for script, _ in typed} == {*METHODS}
    for script, flags in typed:
        importlib.import_module(script).flags().parse_args(shlex.split(flags))


@pytest.mark.parametrize("method", METHODS)
def test_help_says_every_default_and_fits_a_screen_per_group(method, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    made = importlib.import_module(method).flags()
    text = made.format_help()
    groups = re.split(r"\n\n(?=[a-z].*:\n)", text)[2:]
    titles = ["task", "schedule", "model", "system", "output", "method"]
    assert [re.match(r"\w+", group)[0] for group in groups[:6]] == titles
    assert max(len(group.splitlines()) for group in groups) <= 40
    for action in made._actions[1:]:  # in brackets: the default; a flag without a value is off
        assert re.search(r"\(.+\)", action.help) or action.default in (None, False), action.help
    assert len(made._actions) - 1 < 40  # without --help
