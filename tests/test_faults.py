"""What a run survives: kills, full disks, damaged files, strange pictures, wrong flags."""

import argparse
import ast
import errno
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from test_run import FOLDER, assert_same, read_rows, results, weights
from trees import CLASSES, METHODS, SMALL, TINY

import common

ROOT = Path(__file__).resolve().parent.parent
FLAGS = TINY + " --epochs 2 15"  # 20 iterations in step 0, 15 in step 1
START_AGAIN = "the same command goes on"


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out / "cache"))
        module = importlib.import_module("dkd")
        flags = f"{FLAGS} --data {data} --out {out}/runs"
        patch.setattr(sys, "argv", [str(ROOT / "dkd.py"), *shlex.split(flags)])
        with pytest.raises(SystemExit) as stop:
            common.launch(module.main, module.flags())
    assert stop.value.code == 0
    return out / FOLDER


def assert_same_run(whole, folder):
    for k in (0, 1):
        assert_same(weights(whole, k), weights(folder, k))
    assert results(whole) == results(folder)
    assert (whole / "train.csv").read_text() == (folder / "train.csv").read_text()
    assert not (folder / "last.pt").exists()


def before_update(monkeypatch, step, iteration, action):
    """Does something once inside the loop."""
    update, done = common.Run.update, []

    def disturbed(run, losses):
        if (run.step.index, run.iteration) == (step, iteration) and not done:
            done.append(True)
            losses = action(run, losses) or losses
        update(run, losses)

    monkeypatch.setattr(common.Run, "update", disturbed)


# kills and signals


def test_killed_at_random_moments_the_result_is_the_same(tmp_path):
    """tests/kill.py does this to all methods, with more kills."""
    methods = ["dkd", "mib_unbiased"]
    command = [sys.executable, str(ROOT / "tests/kill.py"), "--kills", "3", "--methods", *methods]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for method in methods:
        assert re.search(rf"^{method} .* 3 .*(equal +){{3}}$", done.stdout, re.M), done.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on_from_there(start, monkeypatch, whole, number, status):
    for step, iteration, of in ((0, 12, 20), (1, 14, 15)):
        before_update(monkeypatch, step, iteration, lambda *_: os.kill(os.getpid(), number))
        code, out, err = start(FLAGS + " --save-every 1000")
        assert code == status and START_AGAIN in err and len(err.splitlines()) == 1
        assert f"stopped and saved at iteration {iteration + 1} of {of}" in out
        assert torch.load(FOLDER / "last.pt", weights_only=True)["iteration"] == iteration + 1
    code, out, _ = start(FLAGS)
    assert code == 0 and "goes on at iteration 15 of 15" in out
    assert_same_run(whole, FOLDER)


def test_a_signal_outside_the_loop_stops_at_once(start, monkeypatch):
    monkeypatch.setattr(common.Run, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = start(FLAGS)
    assert code == 143 and START_AGAIN in err
    assert torch.load(FOLDER / "last.pt", weights_only=True)["iteration"] == 20


@pytest.mark.parametrize("number", [signal.SIGTERM])  # SIGINT: the same way, as slow
def test_a_signal_to_the_workers_too_saves_and_leaves_quickly(tmp_path, data, number):
    """As Ctrl-C, or a cluster's job control, reaches every process of the run."""
    flags = f"{TINY} --epochs 9999 --workers 2 --save-every 1000 --data {data}"
    command = [sys.executable, str(ROOT / "dkd.py"), *shlex.split(flags)]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    ) as run:
        for line in run.stdout:
            if "step 0 of" in line:
                break
        time.sleep(2)
        os.killpg(run.pid, number)
        begun = time.monotonic()
        _, err = run.communicate(timeout=50)
    assert run.returncode == 128 + number, err
    assert START_AGAIN in err and len(err.splitlines()) == 1 and time.monotonic() - begun < 30
    log = (tmp_path / FOLDER / "log.txt").read_text()
    assert re.search(r"stopped and saved at iteration \d+ of", log.splitlines()[-1])


# what was saved


def fill_disk(run, _):
    """The file that torch.save writes next is on a full device."""
    (run.folder / f".last.pt.{os.getpid()}").symlink_to("/dev/full")


def vanish(run, _):
    run.folder.rename("moved")


def make_read_only(_, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (fill_disk, "last.pt: cannot be written (No space left on device)"),
        (make_read_only, "train.csv: cannot be written (Read-only file system)"),
        (vanish, "No such file or directory"),
    ],
)
def test_a_fault_of_the_disk_loses_nothing(start, monkeypatch, whole, fault, message):
    with monkeypatch.context() as patch:
        before_update(patch, 1, 9, lambda run, _: fault(run, patch))
        code, _, err = start(FLAGS + " --save-every 0")
    assert code == 1 and message in err and START_AGAIN in err and len(err.splitlines()) == 1, err
    if Path("moved").exists():
        Path("moved").rename(FOLDER)
    assert not list(FOLDER.glob(".*.[0-9]*"))
    assert_same(weights(whole, 0), weights(FOLDER, 0))
    assert results(FOLDER) == results(whole)[:1]


def test_after_a_full_disk_the_run_goes_on(start, monkeypatch, whole):
    before_update(monkeypatch, 0, 17, fill_disk)
    assert start(FLAGS + " --save-every 0")[0] == 1
    code, out, _ = start(FLAGS)
    assert code == 0 and "goes on at iteration 10 of 20" in out
    assert_same_run(whole, FOLDER)


class Runs:
    def __reduce__(self):
        return print, ("code ran",)


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "bit":
        content[len(content) // 2] ^= 1
    if kind == "code":
        torch.save({"model": Runs(), "step": 1}, path)
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(kind, content))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("last.pt", "cut"), ("last.pt", "code"), ("step_0.pt", "bit"), ("step_1.pt", "empty")],
)
def test_a_damaged_checkpoint_is_set_aside(start, monkeypatch, whole, name, kind):
    shutil.copytree(whole, FOLDER)
    if name != "step_1.pt":  # a run that was stopped inside step 1
        content = json.loads((FOLDER / "metrics.json").read_text())
        content["steps"].pop()
        (FOLDER / "metrics.json").write_text(json.dumps(content))
        (FOLDER / "step_1.pt").unlink()
        torch.save({"step": 1, "model": weights(whole)}, FOLDER / "last.pt")
    damage(FOLDER / name, kind)
    code, out, err = start(FLAGS)
    assert (code, err) == (0, "") and "code ran" not in out
    assert f"{name}: not a file of tensors" in out and f"set aside as {name}.damaged" in out
    assert (FOLDER / f"{name}.damaged").exists()
    assert_same_run(whole, FOLDER)


def test_a_damaged_json_file_is_named(start, whole):
    shutil.copytree(whole, FOLDER)
    for name in ("metrics.json", "config.json"):
        (FOLDER / name).write_text("{")
        code, _, err = start(FLAGS)
        assert code == 2 and f"{name}: cannot be read" in err and len(err.splitlines()) == 1


def test_a_second_process_in_the_folder_is_refused(start, tmp_path):
    pytest.importorskip("fcntl")
    FOLDER.mkdir(parents=True)
    hold = "import fcntl, sys; f = open('.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold], cwd=FOLDER, **pipes) as other:
        other.stdout.readline()
        code, _, err = start(FLAGS)
        assert code == 2 and f"{FOLDER}: another process is at work in it" in err
        assert not (FOLDER / "config.json").exists()
        other.kill()
    assert start(TINY + " --dry-run --epochs 1")[0] == 0
    assert start(TINY + " --epochs 1")[0] == 0


# data


def test_every_kind_of_picture_is_read(tmp_path):
    """Grey, palette, transparent, CMYK and 16 bits become RGB as other tools show them."""
    colour = np.zeros((4, 6, 3), np.uint8)
    colour[:, :3], colour[0] = (255, 0, 0), (0, 0, 255)
    rgb = Image.fromarray(colour)
    for mode in ("P", "RGBA", "CMYK", "RGB"):
        path = tmp_path / f"{mode}.tif"
        rgb.convert(mode).save(path)
        assert (np.asarray(common.read_picture(path)) == colour).all(), mode
    for mode in ("L", "LA", "1", "I;16"):
        path = tmp_path / f"{mode}.png".replace(";", "")
        values = np.array([[0, 255], [255, 0]], np.uint8)
        if mode == "I;16":
            values = np.array([[0, 100], [200, 255]], np.uint8)
            Image.fromarray(257 * values.astype(np.uint16)).save(path)
        else:
            Image.fromarray(values).convert(mode).save(path)
        assert (np.asarray(common.read_picture(path)) == values[..., None]).all(), mode


def turned(path):
    """A JPEG 32 wide and 24 high that viewers show upright: 24 wide, 32 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(trees.picture(5).astype(np.uint8)).save(path, exif=exif)


def test_exif_turns_pictures_to_predict_but_not_those_with_a_mask(start, tmp_path, whole):
    turned(tmp_path / "photo.jpg")
    assert common.read_picture(tmp_path / "photo.jpg").size == (32, 24)
    shutil.copytree(whole, FOLDER)
    assert start(FLAGS + " --predict photo.jpg")[0] == 0
    with Image.open(FOLDER / "pictures/photo_classes.png") as classes:
        assert classes.size == (24, 32)


def test_pictures_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    Image.fromarray(trees.picture(1, 64, 64).astype(np.uint8)).save(tmp_path / "good.jpg")
    content = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("truncated", "zero", "text", "folder", "huge"):
        if name == "huge":
            (tmp_path / "huge.jpg").write_bytes(content)
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
        with pytest.raises(common.InputError, match=f"{name}.jpg: not a readable") as error:
            common.read_picture(tmp_path / f"{name}.jpg")
        assert len(str(error.value).splitlines()) == 1


def test_check_data_finds_what_lists_and_masks_can_have_wrong(start, tmp_path):
    base = trees.voc(tmp_path / "bad", CLASSES, CLASSES[:12])
    masks, train = base / "SegmentationClassAug", base / "ImageSets/Segmentation/train_aug.txt"
    train.write_text(train.read_text() + "a3\nghost\n")
    trees.write(masks / "a4.png", trees.picture(0))  # colours
    Image.fromarray(trees.mask([1]).astype(np.uint16)).save(masks / "a5.png")  # 16 bits
    turned(base / "JPEGImages/a6.jpg")
    trees.write(masks / "a6.png", trees.mask([1], 32, 24))  # drawn on the upright picture
    (base / "JPEGImages/a7.jpg").write_bytes(b"")
    code, out, err = start("--check-data", tmp_path / "bad")
    assert code and "Traceback" not in err
    for kind, name in (
        ("listed more than once: 1", "a3.png"),
        ("no mask: 1", "ghost.png"),
        ("unreadable: 3", "a4.png"),
        ("picture and mask differ in size: 1", "a6.png"),
    ):
        assert re.search(f"error: {kind}, such as .*{name}", out), (kind, out)
    for mode in ("RGB", "I;16"):
        assert f"this has mode {mode}" in out + err


def test_check_data_names_the_class_that_no_image_shows(start, tmp_path):
    trees.voc(tmp_path / "few", [[1, 2], [3]], [[1]])
    code, out, _ = start("--check-data --task 2-18", tmp_path / "few")
    assert code == 0
    assert "note: 2-18 cannot be run: step 1 has no image of boat, bottle, bus" in out


@pytest.mark.parametrize("file", ["train_aug", "val"])
def test_an_empty_list_is_an_error_at_the_start(start, tmp_path, file):
    base = trees.voc(tmp_path / "empty", CLASSES, CLASSES[:12])
    (base / f"ImageSets/Segmentation/{file}.txt").write_text("\n")
    for flags in (TINY, "--check-data"):
        code, _, err = start(flags, tmp_path / "empty")
        kind = {"train_aug": "training", "val": "test"}[file]
        assert code == 2 and f"lists no {kind} image" in err and len(err.splitlines()) == 1
    assert not Path("runs").exists()


def test_names_in_lists_stay_in_the_data_folder(tmp_path):
    base = trees.voc(tmp_path, [[1]], [[2]])
    lines = ("../../../secret", "/etc/passwd", "x /JPEGImages/../../b.jpg ../../c.png", "..")
    (base / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(lines))
    for pair in common.open_source("voc", str(tmp_path)).train:
        for path, folder in zip(pair, ("JPEGImages", "SegmentationClassAug"), strict=True):
            assert path.resolve().parent == (base / folder).resolve(), path


# flags


BAD_FLAGS = [
    *((f"--task {task}", "expected A-B") for task in ("25-1", "0-5", "15-0", "abc", "15", "1-1-1")),
    ("--task ../../x", "expected A-B"),
    (f"--task 15-{'9' * 5000}", "expected A-B"),
    ("--setting ../x", "'disjoint'"),
    ("--dataset ../x", "'shapes'"),
    ("--seed -1", "'-1' is not a whole number from 0"),
    ("--seed ../1", "is not a whole number from 0"),
    (f"--seed {2**70}", "is not a whole number from 0"),
    ("--batch 0", "'0' is not a whole number from 1"),
    ("--batch 1.5", "'1.5' is not a whole number from 1"),
    ("--epochs 0", "'0' is not a whole number from 1"),
    ("--workers -1", "'-1' is not a whole number from 0"),
    ("--lr nan", "'nan' is not a number from 0"),
    ("--lr -0.1", "'-0.1' is not a number from 0"),
    ("--save-every -1", "'-1' is not a number from 0"),
    ("--save-every nan", "'nan' is not a number from 0"),
    ("--held-out nan", "0 to 0.5"),
    ("--held-out -1", "0 to 0.5"),
    ("--crop 31", "needs 32 pixels or more"),
    ("--output-stride 16", "needs 64 pixels or more"),
    ("--output-stride 4", "8, 16"),
    ("--device cuda:9", "PyTorch sees"),
    ("--device meta", "expected cpu, cuda or cuda:N"),
    ("--backbone vgg", "'mobilenet_v2'"),
    ("--memory -1", "'-1' is not a whole number from 0"),
    ("--positive-weight 1 2 3", "--positive-weight: one value, or two"),
    ("--class-order order.txt", "no class is called 'bike'"),
    ("--class-order twice.txt", "repeated ['aeroplane']"),
    ("--weights evil.pt", "evil.pt: not a file of tensors"),
    ("--weights order.txt", "order.txt: not a file of tensors"),
    ("--weights list.pt", "list.pt: not a file of tensors"),
    ("--weights odd.pt", "odd.pt: not weights of small"),
    ("--weights .", "--weights .: cannot be read"),
    ("--step0 evil.pt", "evil.pt: not a file of tensors"),
    ("--step0 odd.pt", "odd.pt: not a step_0.pt"),
    ("--step0 list.pt", "list.pt: not a file of tensors"),
    ("--eval", "no step_0.pt in runs"),
    ("--predict order.txt", "no step_0.pt in runs"),
    ("--unheard-of", "unrecognized arguments"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=[f[0][:30] for f in BAD_FLAGS])
def test_bad_flags_write_nothing(start, tmp_path, capsys, flags, message):
    Path("order.txt").write_text("bike\n")
    names = common.class_table("voc")[0][1:]
    Path("twice.txt").write_text("\n".join([*names, "aeroplane"]))
    torch.save({"model": Runs()}, "evil.pt")
    torch.save([1], "list.pt")
    torch.save({"step": 0, "flags": {}, "conv1.weight": 3}, "odd.pt")
    code, out, err = start(f"{TINY} {flags}")
    assert code == 2 and message in err and len(err.splitlines()) <= 2, err
    assert "Traceback" not in err and "code ran" not in out
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("method", "flags"),
    [("mib_unbiased", "--replay -1"), ("ilt", "--temperature 0"), ("ucd", "--temperature 0")],
)
def test_bad_flags_of_the_methods(start, method, flags):
    code, _, err = start(f"{TINY} {flags}", method=method)
    assert code == 2 and "is not a" in err and not Path("runs").exists()


def test_another_step0_is_refused_before_anything_is_written(start, whole):
    code, _, err = start(f"{TINY} --task 15-1 --step0 {whole}/step_0.pt")
    assert code == 2 and "another classes" in err and not Path("runs").exists()
    code, _, err = start(f"{TINY} --step0 {whole}/step_1.pt")
    assert code == 2 and "another" in err and not Path("runs").exists()


def test_predicting_a_text_file(start, whole):
    shutil.copytree(whole, FOLDER)
    Path("note.txt").write_text("no picture")
    code, _, err = start(f"{FLAGS} --predict note.txt")
    assert code == 2 and "note.txt: not a readable picture" in err and len(err.splitlines()) == 1


def test_bfloat16_only_where_the_gpu_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["dkd.py"])

    def resolved(*flags):
        args = importlib.import_module("dkd").flags().parse_args(["--device", "cuda", *flags])
        common.resolve(args)
        return args.precision

    for capability, precision in (((8, 0), "bf16"), ((7, 5), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert resolved() == precision
    with pytest.raises(common.InputError, match="there is --precision fp32"):
        resolved("--precision", "bf16")
    with pytest.raises(common.InputError, match="sees 1 GPU here"):
        resolved("--device", "cuda:1")


# numbers


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(start, monkeypatch, whole):
    before_update(monkeypatch, 0, 13, lambda run, _: {k: v / 0 for k, v in run.added.items()})
    code, _, err = start(FLAGS + " --save-every 0")
    assert code == 1 and "not finite in step 0, iteration 13: mbce inf, ac inf." in err
    last = torch.load(FOLDER / "last.pt", weights_only=True)
    assert last["iteration"] == 10 and all(v.isfinite().all() for v in last["model"].values())
    assert start(FLAGS)[0] == 0
    assert_same_run(whole, FOLDER)


def test_weights_that_are_not_finite_are_never_saved(start, monkeypatch):
    """After the last iteration of a step no loss would tell."""

    def enlarge_gradient(run, losses):
        run.leaf.grad *= 1e20
        return losses

    before_update(monkeypatch, 0, 0, enlarge_gradient)
    code, _, err = start(TINY + " --batch 64 --epochs 1 --lr 1e30")
    assert code == 1 and "the weights are not finite in step 0, iteration 1." in err
    assert not list(FOLDER.glob("*.pt"))


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("method", METHODS)
def test_one_image_few_images_and_crops_of_void(start, tmp_path, method, batch):
    """Step 1 has a single image; most crops of it, and of many others, are void from end to end."""
    base = trees.voc(tmp_path / "few", [*CLASSES[:18], [19, 1], [20]], CLASSES[:12])
    for name in ("a3", "a4", "a19"):
        values = np.full((24, 32), 255)
        values[0, 0] = {"a3": 4, "a4": 5, "a19": 20}[name]
        trees.write(base / f"SegmentationClassAug/{name}.png", values)
    trees.write(base / "SegmentationClassAug/a12.png", trees.mask([13]))  # 20 only in step 1
    flags = f"--task 19-1 {SMALL} --setting overlapped --batch {batch} --epochs 1 2 --ignore void"
    code, _, err = start(flags, tmp_path / "few", method)
    assert (code, err) == (0, "")
    folder = Path(f"runs/{method}-voc-19-1-overlapped-s0")
    assert "from 1 images" in (folder / "log.txt").read_text()
    first, second = weights(folder, 0), weights(folder, 1)
    assert all(v.isfinite().all() for v in second.values())
    assert any(not torch.equal(v, second[k]) for k, v in first.items())
    losses = [float(v) for row in read_rows(folder) for v in list(row.values())[3:] if v]
    assert losses and np.isfinite(losses).all()
    pooled, other = (f"aspp.convs.{k}.{i}.running_mean" for k, i in ((4, 2), (0, 1)))
    assert first[pooled].any() == (batch > 1) and first[other].any()


# security


def test_nothing_is_read_as_code():
    """torch.load only with weights_only=True; no pickle, eval, exec, or numpy's object arrays."""
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "np.load", "np.fromfile"), path
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert name != "torch.load" or keywords["weights_only"] == "True", path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "pickle" not in ast.unparse(node), path


def test_the_runs_folder_lies_in_out(start, whole):
    """All parts of its name are checked (see BAD_FLAGS); the rest is a number or the script's."""
    args = argparse.Namespace(**json.loads((whole / "config.json").read_text())["flags"])
    args.predict, args.eval = None, False
    assert common.Run(args, common.most_likely, "").folder.parent == Path(args.out)


def test_every_promise_in_the_readme_has_its_test():
    section = (ROOT / "README.md").read_text().split("## Promises\n")[1].split("\n## ")[0]
    names = re.findall(r"`(test_\w+)`", section)
    there = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert len(names) > 20 and {*names} <= there, {*names} - there
