"""data/predict.py: pictures through a finished run, and the evaluation of its steps again."""

import argparse
import multiprocessing
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from trees import SMALL

import common
from data import files, predict

slow = pytest.mark.slow
NAME = trees.folder_name("dkd", "2-1", "folder")
FLAGS = f"--dataset folder --task 2-1 {SMALL} --batch 2"


def pets(root):
    train, test = [[1], [2], [3], [1, 3], [2, 3]], [[1, 2], [3], [1]]
    return trees.own(root, train, test, ["cat", "dog", "horse"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run on own pictures, and the pictures."""
    place = tmp_path_factory.mktemp("whole")
    data = pets(place / "pets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        assert trees.launch("dkd", f"{FLAGS} --data {data} --out {place}/runs") == 0
    return place / NAME


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs the command; gives exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*given):
        return predict.main([*map(str, given)]), *capsys.readouterr()

    return run


@pytest.fixture
def run(whole, command):
    """A copy of the run for a test to write to, in its own folder."""
    return shutil.copytree(whole, NAME)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(path, **changes):
    """Other content in a step_K.pt."""
    torch.save(torch.load(path, weights_only=True) | changes, path)


# --eval


@slow
def test_the_evaluation_prints_the_table_of_the_run_and_writes_nothing(run, command):
    before = content(run)
    status, out, err = command(run, "--eval", "--device", "cpu")
    assert (status, err) == (0, "") and content(run) == before
    table = out[out.index("mIoU, %") :]
    assert len(table.splitlines()) > 6 and table in (run / "log.txt").read_text()
    pattern = r"^step 0: mIoU .* 2 test images\n  background .*\nstep 1: .* 3 test images$"
    assert re.search(pattern, out, re.M)
    status, out, _ = command(run, "--eval", "--step", "0")
    assert status == 0 and "step 0: mIoU" in out and "step 1" not in out
    (run / "step_0.pt").unlink()  # of an unfinished copy what is there
    status, out, _ = command(run, "--eval")
    assert status == 0 and "step 0: " not in out and "step 1: mIoU" in out


@slow
def test_data_that_have_moved_are_given(run, command, whole):
    change(run / "step_0.pt", flags=torch.load(run / "step_0.pt")["flags"] | {"data": "gone"})
    status, _, err = command(run, "--eval")
    assert status == 2 and err.startswith("predict: --dataset folder: no gone/classes.txt")
    status, out, _ = command(run, "--eval", "--data", whole.parent.parent / "pets")
    assert status == 0 and "step 1: " in out


@slow
def test_data_with_other_classes_are_refused(run, command, tmp_path):
    data = pets(tmp_path / "others")
    (data / "classes.txt").write_text("cat\ncow\nhorse\n")
    status, _, err = command(run, "--eval", "--data", data)
    assert status == 2 and len(err.splitlines()) == 1
    assert "the run's classes: no class is called 'dog'" in err


@slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_faulty_test_picture_is_named_also_from_a_worker(run, command, tmp_path, workers):
    data = pets(tmp_path / "others")
    (data / "test/images/test0.jpg").write_bytes(b"nothing")
    for path in run.glob("step_*.pt"):
        change(path, flags=torch.load(path)["flags"] | {"workers": workers})
    status, _, err = command(run, "--eval", "--data", data)
    assert status == 2 and "test0.jpg: not a readable picture" in err
    assert err.startswith("predict: ") and len(err.splitlines()) == 1
    assert not multiprocessing.active_children()  # else the program would wait for them to end


# pictures


@slow
def test_a_picture_of_any_size_gets_an_overlay_a_class_map_and_its_shares(run, command):
    Image.fromarray(np.full((50, 90), 128, np.uint8)).save("grey photo.png")
    status, out, err = command(run, "grey photo.png")
    assert (status, err) == (0, "")
    classes = files.open_image(run / "pictures/grey photo_classes.png", "class map")
    assert classes.size == (90, 50) and classes.mode == "P"
    painted = files.read_picture(run / "pictures/grey photo_overlay.png")
    assert painted.width >= 90 and painted.height >= 50  # a legend may be below
    shares = [float(value) for value in re.findall(r"([0-9.]+) %", out)]
    assert sum(shares) == pytest.approx(100, abs=0.5)


@slow
def test_the_newest_step_predicts_by_the_rule_of_its_method(run, command, monkeypatch):
    """DKD's sigmoids: background where none exceeds 0.5."""
    trees.write(Path("photo.png"), trees.picture(3, 32, 32))
    logits = torch.full((1, 4, 32, 32), -1.0)  # background and three classes
    logits[:, 0], logits[:, 3, :8] = 5, 2
    monkeypatch.setattr(common.DeepLabV3, "forward", lambda model, _: (logits, {}))
    assert command(run, "photo.png")[0] == 0
    found = np.asarray(files.open_image(run / "pictures/photo_classes.png", "class map"))
    assert (found[:8] == 3).all() and (found[8:] == 0).all()
    monkeypatch.setattr(predict, "method_script", lambda _: common)  # has no rule of its own
    status, out, _ = command(run, "photo.png")
    assert status == 0 and "background 100.0 %" in out


@pytest.mark.parametrize("size", [(90, 50), (33, 150)])
def test_logits_are_upsampled_to_the_picture_not_class_maps(size):
    """In strips of rows it is what the rule gives on all of them at once."""
    logits = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    settings = argparse.Namespace(crop=32, device="cpu")
    found = predict.segment(
        lambda _: (logits, {}), common.most_likely, Image.new("RGB", size), settings
    )
    whole = common.upsample(logits, size[::-1]).argmax(1)[0]
    assert found.shape == size[::-1] and (found != whole.numpy()).mean() < 1e-3


@slow
def test_a_step_is_chosen_and_its_pictures_are_files_of_their_own(run, command):
    trees.write(Path("photo.png"), trees.picture(3))
    for flags, ending in (((), ""), (("--step", "0"), "_step_0")):
        assert command(run, "photo.png", *flags)[0] == 0
        assert (run / f"pictures/photo{ending}_classes.png").exists()
    status, _, err = command(run, "photo.png", "--step", "2")
    assert status == 2 and err == f"predict: --step 2: {run} has 0, 1\n"


@slow
def test_folders_and_pictures_of_one_name_are_kept_apart(run, command, tmp_path):
    for name in ("a/x.jpg", "b/x.jpg", "b/x.png", "b/deep/y.webp"):
        trees.write(Path("photos") / name, trees.picture(len(name), 40, 70))
    Path("photos/note.txt").write_text("no picture")
    turned = Image.new("RGB", (60, 30), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # a camera held upright
    turned.save("upright.jpg", exif=exif)
    grey = np.linspace(0, 65535, 30 * 60).reshape(30, 60)
    Image.fromarray(grey.astype(np.uint16)).save("sixteen.png")
    status, out, _ = command(run, "photos", "--device", "cpu", "upright.jpg", "sixteen.png")
    assert status == 0 and len(out.splitlines()) == 6 and "note" not in out
    for name in ("a-x", "b-x", "b-x_2", "deep-y"):
        assert files.open_image(run / f"pictures/{name}_classes.png", "map").size == (70, 40)
    # upright as viewers show it, though pictures with a mask are read as the mask lies
    assert files.read_picture(Path("upright.jpg")).size == (60, 30)
    assert files.open_image(run / "pictures/upright_classes.png", "map").size == (30, 60)
    for line in out.splitlines():  # below the overlay: the legend of the classes found
        found, target = re.fullmatch(
            r".*?: (.*); see (.*)_overlay.png and _classes.png", line
        ).groups()
        painted, classes = (
            files.open_image(Path(f"{target}_{kind}.png"), kind) for kind in ("overlay", "classes")
        )
        assert (painted.height > classes.height) == bool(re.search(r"(?<!background) \d", found))


@slow
def test_an_older_checkpoint_without_colours_and_a_run_from_a_gpu(run, command):
    saved = torch.load(run / "step_1.pt", weights_only=True)
    flags = saved["flags"] | {"device": "cuda:3", "precision": "bf16", "compile": True}
    del flags["dilate_first"], saved["colours"]
    torch.save(saved | {"flags": flags}, run / "step_1.pt")
    trees.write(Path("photo.png"), trees.picture(3))
    assert command(run, "photo.png", "--device", "cpu")[0] == 0
    model, _, settings = predict.load(run / "step_1.pt", "cpu")
    assert settings.precision == "fp32" and not model.bf16 and not model.training


@slow
def test_results_in_python_as_data_readme_says(run, command, capsys):
    """pandas is not needed here: the columns that it draws are there."""
    page = (common.HERE / "data/README.md").read_text()
    curves, picture = re.findall("```python\n(.*?)```", page, re.S)
    table = (run / "train.csv").read_text().splitlines()
    assert {*re.findall(r'"(\w+)"', curves)} | {"step"} <= {*table[0].split(",")}
    Image.fromarray(np.full((50, 90), 128, np.uint8)).save("photo.jpg")
    exec(re.sub(r"runs/\S+/step_5", f"{run}/step_1", picture), {})
    assert re.match(r"\(50, 90\) \['(background|cat|dog|horse)'", capsys.readouterr().out)


# refusals


@slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.jpg", "nowhere.jpg: no such picture or folder"),
        ("empty", "empty: no picture in this folder"),
        ("note.txt", "note.txt: not a readable picture"),
        ("photo.jpg --device cuda:99", "--device cuda:99: PyTorch sees"),
        ("photo.jpg --device gpu", "--device gpu: expected cpu, cuda or cuda:N"),
    ],
)
def test_pictures_that_cannot_be_used_write_nothing(run, command, given, message):
    before = content(run)
    Path("empty").mkdir()
    Path("note.txt").write_text("no picture")
    trees.write(Path("photo.jpg"), trees.picture(1))
    first = [] if given == "note.txt" else ["photo.jpg"]  # files are opened one after the other
    status, out, err = command(run, *first, *given.split())
    assert (status, out) == (2, "") and err.startswith(f"predict: {message}")
    assert len(err.splitlines()) == 1 and content(run) == before


class Code:
    def __reduce__(self):
        return print, ("code ran",)


@slow
@pytest.mark.parametrize("mode", ["--eval", "photo.jpg"])
def test_files_of_a_run_that_are_damaged_are_named(run, command, mode):
    trees.write(Path("photo.jpg"), trees.picture(1))
    newest = run / "step_1.pt"
    good = torch.load(newest, weights_only=True)
    other = good | {"flags": good["flags"] | {"backbone": "resnet18"}}
    for broken, message in (
        (other, "weights of another network than these flags give"),
        ({"model": good["model"]}, "not a step_K.pt of a run"),
        ({**good, "flags": [1]}, "not a step_K.pt of a run"),
        ({"model": Code()}, "not a file of tensors and plain values"),
        ([1], "not a file of tensors and plain values"),
    ):
        torch.save(broken, newest)
        status, out, err = command(run, mode)
        assert status == 2 and f"{newest}: {message}" in err and len(err.splitlines()) == 1
        assert "code ran" not in out + err
    torch.save(good | {"flags": good["flags"] | {"method": "gone"}}, newest)
    status, _, err = command(run, mode)
    words = "method gone there, dkd here" if mode == "--eval" else "there is no script gone.py in"
    assert status == 2 and words in err and len(err.splitlines()) == 1


@slow
def test_another_rule_or_network_than_the_runs_is_said(run, command):
    """As where the script has changed since: the numbers are not those of the run."""
    newest = run / "step_1.pt"
    saved = torch.load(newest, weights_only=True)
    confusion = saved["metrics"]["confusion"]
    saved["metrics"]["confusion"] = [row[::-1] for row in confusion]
    torch.save(saved, newest)
    status, out, err = command(run, "--eval")
    assert status == 2 and "mIoU, %" in out and len(err.splitlines()) == 1
    assert "the run itself measured something else" in err and "step 1: mIoU base" in err
    status, _, err = command(newest, "--eval", "--step", "1")
    assert status == 2 and "is the file of one step" in err


@slow
def test_a_step_pt_alone_is_enough(run, command):
    """As somebody else gets it."""
    Path("shared").mkdir()
    shutil.copy(run / "step_1.pt", "shared/pets.pt")
    trees.write(Path("photo.png"), trees.picture(3))
    status, _, err = command("shared/pets.pt", "photo.png")
    assert (status, err) == (0, "") and Path("shared/pictures/photo_classes.png").exists()
    whole = command(run, "--step", "1", "--eval")[1]
    alone = command("shared/pets.pt", "--eval")[1]
    assert whole.endswith(alone) and alone.startswith("step 1: mIoU")


def test_a_folder_without_a_step_is_no_run(command, tmp_path):
    (tmp_path / "step_last.pt").touch()
    trees.write(Path("photo.jpg"), trees.picture(1))
    for mode in ("--eval", "photo.jpg"):
        for folder in ("nowhere", "."):
            status, _, err = command(folder, mode)
            assert (
                status == 2
                and err == f"predict: {folder}: no step_0.pt in this folder; train first\n"
            )


def test_steps_are_in_the_order_of_their_numbers(tmp_path):
    for k in (10, 9, 0):
        (tmp_path / f"step_{k}.pt").touch()
    for name in ("step_1.pt.damaged", "step_x.pt", "step_-1.pt"):
        (tmp_path / name).touch()
    assert predict.step_files(tmp_path) == [tmp_path / f"step_{k}.pt" for k in (0, 9, 10)]


@pytest.mark.parametrize("flags", ["run", "run photo.jpg --eval", "", "run --unheard-of"])
def test_pictures_or_the_evaluation(command, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        command(*flags.split())
    assert stop.value.code == 2 and "usage: python -m data.predict" in capsys.readouterr().err


def test_scripts_are_those_of_this_project_alone(tmp_path, monkeypatch):
    """Neither a file in the current folder, nor a module that Python finds, nor a path."""
    (tmp_path / "dkd.py").write_text("raise SystemExit")
    (tmp_path / "other.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    script = predict.method_script("dkd")
    assert Path(script.__file__) == common.HERE / "dkd.py"
    for name in ("other", "this", "json", "../x", f"{tmp_path}/other", "data/predict", ""):
        with pytest.raises(common.InputError, match="there is no script"):
            predict.method_script(name)
    assert "this" not in sys.modules  # it would print a poem
    # a fork that lies beside the scripts
    (tmp_path / "mine.py").write_text("def predict(logits):\n    return 7\n")
    monkeypatch.setattr(predict, "HERE", tmp_path)
    assert predict.method_script("mine").predict(None) == 7
