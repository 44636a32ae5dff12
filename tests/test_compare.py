"""data/compare.py: the table of finished runs beside the published numbers, and the curves."""

import json
import os
import shlex
import sys

import pytest
import torch
import trees
from trees import METHODS, SMALL

import common
import dkd
import ilt
import mib_unbiased
from data import compare, files

slow = pytest.mark.slow


def finished(folder, script, flags, iou, published="", steps=6, background=0.0, **changes):
    """What a run leaves for the table: every class has this IoU after every step."""
    args = script.flags().parse_args(shlex.split(flags))
    common.fill_in(vars(args))
    names, _ = common.class_table(args.dataset, args.data)
    used = vars(args) | {"method": script.__name__, "precision": "fp32"} | changes
    config = {"flags": used, "versions": {"torch": "2.9.9", "device": "a card"}}
    config |= {"published": published, "classes": names}
    step = {"test_images": 7, "timing": {"minutes": 1.5}}
    step |= {"with_background": {}, "without_background": {}}
    step["iou"] = {name: background if name == "background" else iou for name in names}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(
        json.dumps({"steps": [step | {"step": k} for k in range(steps)]})
    )
    os.utime(folder / "metrics.json", (86400, 86400))
    return str(folder)


def rows(table):
    """The rows of a Markdown table as dictionaries."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] == "| "]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_table_has_a_row_per_configuration_and_what_was_published(tmp_path, capsys):
    fine_tuning = "--task 15-1 --ce plain --kd none --init random --lr 0.5"
    runs = [
        finished(tmp_path / "a0", dkd, "--task 15-1 --lr 0.5", 50, "DKD"),
        finished(tmp_path / "a1", dkd, "--task 15-1 --lr 0.5 --seed 1 --workers 3", 60, "DKD"),
        finished(tmp_path / "b", mib_unbiased, "--task 15-1 --lr 0.5", 40, "MiB"),
        finished(tmp_path / "c", mib_unbiased, fine_tuning, 4),
        finished(tmp_path / "d", mib_unbiased, "--task offline --lr 0.5", 80, steps=1),
    ]
    assert compare.main([*runs[:3], f"mine={runs[3]}", runs[4]]) == 0
    out, err = capsys.readouterr()
    found = rows(out)
    assert err == "" and [row["method"] for row in found] == ["DKD", "MiB", "mine", "joint"]
    above = out.splitlines()[0]
    for text in ("dataset voc", "setting overlapped", "resnet101, crop 512", "a card, fp32"):
        assert text in above and text not in out[len(above) :]
    assert "torch 2.9.9" in above and "date 1970-01-02" in above and "flags `--lr 0.5`" in above
    joined, mib, mine, joint = found
    # all count the background, whose IoU is 0 here, as what was published for them in some table
    assert joined["base"] == f"{55 * 15 / 16:.1f} ± {50**0.5 * 15 / 16:.1f}"
    assert joined["seeds"] == "0, 1" and joined["minutes"] == "9.0" and joined["task"] == "15-1"
    assert joined["published"].startswith("78.09 / 42.72 / 69.67 (with background; DKD Table 1")
    assert mib["base"] == f"{40 * 15 / 16:.1f}" and "averages with background" in above
    assert mib["published"].startswith("34.22 / 13.5 / 29.29 (with background; PLOP Table 1")
    assert mib["command"] == "`mib_unbiased.py`"
    assert mine["command"] == "`mib_unbiased.py --ce plain --kd none --init random`"
    assert (mine["base"], mine["new"], mine["published"]) == ("3.8", "4.0", "-")
    # the joint run is divided, counted and compared as the first other task of the data set
    assert (joint["base"], joint["new"]) == ("75.0", "80.0")
    assert joint["published"].startswith("78.88 / 72.63 / 77.39 (with background; ")


def test_a_single_run_is_one_whole_row(tmp_path, capsys):
    """Without a name in the papers the row has the script's; a joint run alone has no new class."""
    run = finished(tmp_path / "a", dkd, "--task offline --no-freeze --lr 0.1 0.01", 50, "DKD", 1)
    assert compare.main([run]) == 0
    (row,) = rows(capsys.readouterr().out)
    assert (row["method"], row["new"], row["all"]) == ("joint", "-", f"{50 * 20 / 21:.1f}")
    assert row["command"] == "`dkd.py --lr 0.1 0.01 --no-freeze`" and row["dataset"] == "voc"
    flags = "--task 16-5 --dataset msrc --keep-later --class-order a/mine.txt"
    assert compare.main([finished(tmp_path / "b", ilt, flags, 50, steps=2)]) == 0
    (row,) = rows(capsys.readouterr().out)
    assert (row["method"], row["class order"]) == ("ilt", "mine.txt")
    assert row["command"] == "`ilt.py --keep-later`"


def test_a_run_that_does_not_test_the_background_stands_beside_averages_without_it(
    tmp_path, capsys
):
    """ADE20K's id 0, ignored in the test, has no IoU."""
    given = mib_unbiased, "--dataset ade --task 100-50", 40, "MiB"
    for name, background, covers in (("a", None, "no background"), ("b", 0.0, "with background")):
        run = finished(tmp_path / name, *given, steps=2, background=background)
        assert compare.main([run]) == 0
        (row,) = rows(capsys.readouterr().out)
        assert row["averages"] == covers, row
        assert row["base"] == ("40.0" if background is None else f"{40 * 100 / 101:.1f}")


def test_the_command_has_what_was_typed_not_what_the_script_filled_in(tmp_path, capsys):
    typed = ["--task=15-1", "--alpha=2.0", "--no-freeze", "--lr", "0.1", "0.01"]
    flags = "--task 15-1 --alpha 2 --beta 3 --no-freeze --lr 0.1 0.01"
    assert compare.main([finished(tmp_path / "a", dkd, flags, 50, typed=typed)]) == 0
    assert (
        rows(capsys.readouterr().out)[0]["command"]
        == "`dkd.py --lr 0.1 0.01 --alpha 2 --no-freeze`"
    )
    assert compare.main([finished(tmp_path / "b", dkd, flags, 50, typed=[])]) == 0
    assert rows(capsys.readouterr().out)[0]["command"] == "`dkd.py`"


def test_a_script_that_has_changed_between_the_runs_of_a_row_is_said(tmp_path, capsys):
    runs = [
        finished(tmp_path / str(s), dkd, f"--task 15-1 --seed {s}", 50, "DKD") for s in range(2)
    ]
    (tmp_path / "0/dkd.py").write_text("a = 1")
    for text in ("a = 1", "a = 2"):
        (tmp_path / "1/dkd.py").write_text(text)
        assert compare.main(runs) == 0
        said = "the script has changed between the runs of DKD" in capsys.readouterr().err
        assert said == (text == "a = 2")


def test_runs_over_class_orders_share_a_row(tmp_path, capsys):
    """What was published is of the data set's own order."""
    runs = [
        finished(tmp_path / name, dkd, f"--task 15-1 --class-order {name}", value, "DKD")
        for name, value in (("b", 50), ("c", 60), ("d", 50), ("e", 60))
    ]
    assert compare.main(runs) == 0
    (row,) = rows(capsys.readouterr().out)
    assert (row["class order"], row["published"]) == ("b, c, d, e", "-")
    assert row["new"] == f"55.0 ± {(100 / 3) ** 0.5:.1f}"


def test_minutes_leave_out_a_step_that_another_run_has_trained(tmp_path, capsys):
    run = finished(tmp_path / "a", dkd, "--task 15-1", 50)
    content = json.loads((tmp_path / "a/metrics.json").read_text())
    content["steps"][0] = content["steps"][0] | {"timing": {"taken_from": "step_0.pt"}}
    (tmp_path / "a/metrics.json").write_text(json.dumps(content))
    assert compare.main([run]) == 0
    assert rows(capsys.readouterr().out)[0]["minutes"] == "7.5 without step 0"


def test_a_class_that_no_test_image_shows_is_left_out_of_the_mean(tmp_path, capsys):
    run = finished(tmp_path / "a", dkd, "--task 15-1", 50)
    content = (tmp_path / "a/metrics.json").read_text()
    (tmp_path / "a/metrics.json").write_text(content.replace('"sofa": 50', '"sofa": null'))
    assert compare.main([run]) == 0
    assert rows(capsys.readouterr().out)[0]["new"] == "50.0"


def test_other_pictures_other_flags_and_other_test_images_are_other_rows(tmp_path, capsys):
    for name in ("cats", "dogs"):
        trees.own(tmp_path / name, [[1], [2]], [[1]], ["one", "two"])
    flags = "--task 1-1 --dataset folder --data"
    runs = [
        finished(tmp_path / "0", dkd, f"{flags} {tmp_path}/cats", 50, steps=2),
        finished(tmp_path / "1", dkd, f"{flags} {tmp_path}/cats --seed 1", 50, steps=2),
        finished(tmp_path / "2", dkd, f"{flags} {tmp_path}/dogs", 50, steps=2),
        finished(tmp_path / "3", dkd, f"{flags} {tmp_path}/dogs --held-out 0.2", 50, steps=2),
        finished(tmp_path / "4", dkd, f"{flags} {tmp_path}/dogs", 50, steps=2),
    ]
    content = (tmp_path / "4/metrics.json").read_text()
    (tmp_path / "4/metrics.json").write_text(
        content.replace('"test_images": 7', '"test_images": 9')
    )
    assert compare.main(runs) == 0
    found = rows(capsys.readouterr().out)
    assert [row["dataset"] for row in found] == ["folder cats", *["folder dogs"] * 3]
    assert [row["seeds"] for row in found] == ["0, 1", "0", "0", "0"]
    assert "--held-out 0.2" in found[2]["command"]


def test_a_folder_that_is_no_finished_run_is_left_out_in_one_line(tmp_path, capsys):
    run = finished(tmp_path / "a=b", dkd, "--task 15-1", 50)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    (tmp_path / "broken/metrics.json").write_text("[")
    strange = finished(tmp_path / "strange", dkd, "--task 15-1", 50, method="this")
    helper = finished(tmp_path / "helper", dkd, "--task 15-1", 50, method="common")
    given = (tmp_path / "none", run, tmp_path / "broken", strange, helper)
    assert compare.main([*map(str, given)]) == 2
    assert "this" not in sys.modules  # it would print a poem
    out, err = capsys.readouterr()
    assert len(rows(out)) == 1 and rows(out)[0]["base"] == "46.9"
    lines = err.splitlines()
    assert len(lines) == 4 and all(line.startswith("compare: ") for line in lines)
    assert "none: no results of a run" in lines[0] and "broken: no results" in lines[1]
    assert "there is no script this.py in" in lines[2] and "helper: no results" in lines[3]


def test_dry_runs_and_unfinished_runs_are_listed_as_such(tmp_path, capsys):
    run = finished(tmp_path / "a", dkd, "--task 15-1", 50)
    dry = finished(tmp_path / "dry", dkd, "--task 15-1 --dry-run", 2)
    half = finished(tmp_path / "half", dkd, "--task 15-1", 50, steps=4)
    new = finished(tmp_path / "new", dkd, "--task 15-1", 50)
    (tmp_path / "new/metrics.json").unlink()
    assert compare.main([dry, run, half, new]) == 0
    out, err = capsys.readouterr()
    assert err == "" and len(rows(out)) == 1 and rows(out)[0]["base"] == "46.9"
    listed = f"""
no results:
{dry}: a dry run
{half}: not finished, 4 of 6 steps are done
{new}: not finished, 0 of 6 steps are done
"""
    assert out.endswith(listed)
    assert compare.main([half, "--curves", "x.png"]) == 2
    assert capsys.readouterr().out == "".join(listed.splitlines(True)[i] for i in (1, 3))


def test_a_run_that_is_given_twice_is_one_seed(tmp_path, capsys):
    """Also its copy, or the same command with another --out; but not another class order."""
    first = finished(tmp_path / "a", dkd, "--task 15-1", 50)
    copy = finished(tmp_path / "b", dkd, "--task 15-1 --out elsewhere", 50)
    other = finished(tmp_path / "c", dkd, "--task 15-1 --seed 1", 60)
    order = finished(tmp_path / "d", dkd, "--task 15-1 --class-order b", 70)
    assert compare.main([first, f"{first}/", copy, other, order]) == 0
    out, _ = capsys.readouterr()
    (row,) = rows(out)
    assert row["seeds"] == "0, 1" and row["base"].startswith(f"{60 * 15 / 16:.1f} ± ")
    for run in (f"{first}/", copy):
        assert f"\n{run}: has the seed, class order and flags of {first}\n" in out
    assert compare.main([first, f"again={first}"]) == 0  # a name is a row of its own
    assert len(rows(capsys.readouterr().out)) == 2


@pytest.fixture
def three(tmp_path):
    """Two seeds of a run and a joint one."""
    runs = [finished(tmp_path / f"{k}", dkd, f"--task 15-1 --seed {k}", 50 + k) for k in (0, 1)]
    return [*runs, finished(tmp_path / "joint", dkd, "--task offline", 80, steps=1)]


def test_curves_are_drawn_beside_the_table(three, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert compare.main([*three, "--curves", str(tmp_path / "x.png")]) == 0
    out, err = capsys.readouterr()
    assert err == "" and len(rows(out)) == 2 and out.endswith(f"curves in {tmp_path / 'x.png'}\n")
    picture = files.read_picture(tmp_path / "x.png")
    assert picture.width > 1000 and len(picture.getcolors(10**6)) > 10


@pytest.mark.parametrize("name", ["no/x.png", "x.unheard-of", "0.png"])
def test_curves_that_cannot_be_written_are_one_line(three, tmp_path, capsys, name):
    pytest.importorskip("matplotlib")
    (tmp_path / "0.png").mkdir()
    assert compare.main([*three, "--curves", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert len(rows(out)) == 2 and "curves in" not in out and len(err.splitlines()) == 1
    assert err.startswith("compare: --curves ") and "cannot be written" in err


def test_without_matplotlib_the_table_stands_and_one_line_says_what_is_missing(
    three, monkeypatch, capsys, tmp_path
):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert compare.main([*three, "--curves", str(tmp_path / "x.png")]) == 2
    out, err = capsys.readouterr()
    assert len(rows(out)) == 2 and not (tmp_path / "x.png").exists()
    assert err == "compare: --curves needs one more package: pip install matplotlib\n"


@slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_own_pictures_and_has_its_row(start, tmp_path, method, capsys):
    pets = [[1], [2], [3], [1, 3], [2, 3]], [[1, 2], [3]], ["cat", "dog", "", "horse"]
    flags = f"--dataset folder --task 2-1 --setting overlapped {SMALL} --epochs 1"
    status, out, err = start(flags, trees.own(tmp_path / "pets", *pets), method)
    assert (status, err) == (0, "") and "learns horse (3) from 3 images" in out
    folder = trees.folder_name(method, "2-1", "folder")
    last = trees.results(folder)[-1]
    assert [*last["iou"]] == ["background", "cat", "dog", "horse"] and last["test_images"] == 2
    assert compare.main([str(folder)]) == 0
    (row,) = rows(capsys.readouterr().out)
    assert row["dataset"] == "folder pets" and row["trunk"] == "small, crop 32"
    assert float(row["all"]) == pytest.approx(last["with_background"]["all"], abs=0.051)
    assert row["torch"] == torch.__version__
    typed = "--epochs 1 --batch 4 --crop 32 --backbone small --weights none --output-stride 8"
    assert row["command"].startswith(f"`{method}.py {typed}")
    # the same pictures at another place are the same data set; with one less they are another
    (tmp_path / "pets").rename(tmp_path / "moved")
    status, out, _ = start(flags, tmp_path / "moved", method)
    assert status == 0 and "2 steps done" in out
    next((tmp_path / "moved/train/images").iterdir()).unlink()
    status, _, err = start(flags, tmp_path / "moved", method)
    assert status == 2 and "of another run (training_images 5 (digest " in err


@slow
def test_a_step_without_a_test_image_of_its_classes_has_no_numbers(start, tmp_path, capsys):
    pets = trees.own(tmp_path / "pets", [[1], [2], [3], [1, 3]], [[3]], ["a", "b", "c"])
    status, out, err = start(f"--dataset folder --task 2-1 {SMALL} --epochs 1", pets)
    assert (status, err) == (0, "")
    folder = trees.folder_name("dkd", "2-1", "folder")
    last = trees.results(folder)[-1]["with_background"]["all"]
    assert f"average of 'all' over the steps: {last:.2f}" in out
    assert compare.main([str(folder), "--curves", "x.png"]) == 0
    (row,) = rows(capsys.readouterr().out)
    assert row["base"] == f"{trees.results(folder)[-1]['with_background']['base']:.1f}"
