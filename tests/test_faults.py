"""What a run survives: kills, full disks, damaged files, strange pictures, wrong flags."""

import argparse
import ast
import errno
import importlib
import json
import os
import re
import shlex
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
from trees import (
    CLASSES,
    METHODS,
    SMALL,
    TINY,
    assert_same,
    assert_same_run,
    read_rows,
    results,
    weights,
)

import common
from data import files

ROOT = Path(__file__).resolve().parent.parent
FOLDER = trees.folder_name("dkd")
FLAGS = TINY + " --epochs 2 15"  # 20 iterations in step 0, 15 in step 1
START_AGAIN = "the same command goes on"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of an undisturbed run."""
    return trees.whole_run(tmp_path_factory.mktemp("whole"), f"{FLAGS} --data {data}") / FOLDER


# kills and signals


@slow
def test_killed_at_random_moments_the_result_is_the_same(tmp_path):
    """tests/kill.py does this to all methods, with more kills."""
    methods = ["dkd", "mib_unbiased"]
    command = [sys.executable, str(ROOT / "tests/kill.py"), "--kills", "3", "--methods", *methods]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for method in methods:
        assert re.search(rf"^{method} .* 3 .*(equal +){{3}}$", done.stdout, re.M), done.stdout


@slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on_from_there(start, monkeypatch, whole, number, status):
    for step, iteration, of in ((0, 12, 20), (1, 14, 15)):
        trees.inside(monkeypatch, step, iteration, lambda *_: os.kill(os.getpid(), number))
        code, out, err = start(FLAGS + " --save-every 1000")
        assert code == status and START_AGAIN in err and len(err.splitlines()) == 1
        assert f"stopped and saved at iteration {iteration + 1} of {of}" in out
        assert torch.load(FOLDER / "last.pt", weights_only=True)["iteration"] == iteration + 1
    code, out, _ = start(FLAGS)
    assert code == 0 and "goes on at iteration 15 of 15" in out
    assert_same_run(whole, FOLDER)


@slow
def test_a_second_signal_does_not_wait(start, monkeypatch):
    def stop_twice(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the iteration went on")

    trees.inside(monkeypatch, 0, 12, stop_twice)
    code, out, err = start(FLAGS + " --save-every 0")
    assert code == 143 and START_AGAIN in err and "stopped and saved" not in out
    assert torch.load(FOLDER / "last.pt", weights_only=True)["iteration"] == 10


@slow
def test_a_signal_outside_the_loop_stops_at_once(start, monkeypatch):
    monkeypatch.setattr(common, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = start(FLAGS)
    assert code == 143 and START_AGAIN in err
    assert torch.load(FOLDER / "last.pt", weights_only=True)["iteration"] == 20


# a script whose workers would never end by themselves, with the usual answers to signals
ENDLESS_WORKERS = f"""\
import runpy, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.alarm = lambda _: 0
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@slow
def test_a_signal_to_the_workers_too_saves_and_leaves_quickly(tmp_path, data):
    """As Ctrl-C, or a cluster's job control, reaches every process of the run."""
    flags = f"{TINY} --epochs 9999 --workers 2 --save-every 0 --data {data}"
    script = [sys.executable, "-c", ENDLESS_WORKERS, str(ROOT / "dkd.py")]
    run = subprocess.Popen(
        [*script, *shlex.split(flags)],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    with run:
        while not (tmp_path / FOLDER / "last.pt").exists():  # the loop is at work
            assert run.poll() is None
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGTERM)
        _, err = run.communicate(timeout=300)
    assert run.returncode == 128 + signal.SIGTERM, err
    assert START_AGAIN in err and len(err.splitlines()) == 1
    log = (tmp_path / FOLDER / "log.txt").read_text()
    stopped = re.search(r"stopped and saved at iteration (\d+) of", log.splitlines()[-1])
    saved = torch.load(tmp_path / FOLDER / "last.pt", weights_only=True)
    assert saved["iteration"] == int(stopped[1])


# what was saved


def fill_disk(run, _):
    """The file that torch.save writes next is on a full device."""
    (run.folder / f".last.pt.{os.getpid()}.unfinished").symlink_to("/dev/full")


def vanish(run, _):
    run.folder.rename("moved")


def make_read_only(_, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)


@slow
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
        trees.inside(patch, 1, 9, lambda run, _: fault(run, patch))
        code, _, err = start(FLAGS + " --save-every 0")
    assert code == 1 and message in err and len(err.splitlines()) == 1, err
    assert (START_AGAIN in err) == (fault is not vanish)  # where nothing is left, nothing goes on
    if Path("moved").exists():
        Path("moved").rename(FOLDER)
    assert not list(FOLDER.glob(".*.unfinished"))
    assert_same(weights(whole, 0), weights(FOLDER, 0))
    assert results(FOLDER) == results(whole)[:1]


@slow
def test_after_a_full_disk_the_run_goes_on(start, monkeypatch, whole):
    trees.inside(monkeypatch, 0, 17, fill_disk)
    assert start(FLAGS + " --save-every 0")[0] == 1
    code, out, _ = start(FLAGS)
    assert code == 0 and "goes on at iteration 10 of 20" in out
    assert_same_run(whole, FOLDER)


class Runs:
    def __reduce__(self):
        return print, ("code ran",)


@slow
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
        assert (np.asarray(files.read_picture(path)) == colour).all(), mode
    for mode in ("L", "LA", "1", "I;16"):
        path = tmp_path / f"{mode}.png".replace(";", "")
        values = np.array([[0, 255], [255, 0]], np.uint8)
        if mode == "I;16":
            values = np.array([[0, 100], [200, 255]], np.uint8)
            Image.fromarray(257 * values.astype(np.uint16)).save(path)
        else:
            Image.fromarray(values).convert(mode).save(path)
        assert (np.asarray(files.read_picture(path)) == values[..., None]).all(), mode


def test_exif_does_not_turn_a_picture_with_a_mask(tmp_path):
    """VOC's masks lie as the pixels do."""
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers show it 24 wide and 32 high
    Image.fromarray(trees.picture(5).astype(np.uint8)).save(tmp_path / "photo.jpg", exif=exif)
    assert files.read_picture(tmp_path / "photo.jpg").size == (32, 24)


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
            files.read_picture(tmp_path / f"{name}.jpg")
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("file", ["train_aug", "val"])
def test_an_empty_list_is_an_error_at_the_start(start, tmp_path, file):
    base = trees.voc(tmp_path / "empty", CLASSES, CLASSES[:12])
    (base / f"ImageSets/Segmentation/{file}.txt").write_text("\n")
    code, _, err = start(TINY, tmp_path / "empty")
    kind = {"train_aug": "training", "val": "test"}[file]
    assert code == 2 and f"lists no {kind} image" in err and len(err.splitlines()) == 1
    assert not Path("runs").exists()


def test_names_in_lists_stay_in_the_data_folder(tmp_path):
    base = trees.voc(tmp_path, [[1]], [[2]])
    lines = ("../../../secret", "/etc/passwd", "x /JPEGImages/../../b.jpg ../../c.png", "..")
    (base / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(lines))
    for pair in common.list_samples("voc", str(tmp_path)).train:
        for path, folder in zip(pair, ("JPEGImages", "SegmentationClassAug"), strict=True):
            assert path.resolve().parent == (base / folder).resolve(), path


# flags


BAD_FLAGS = [
    *((f"--task {task}", "expected A-B") for task in ("25-1", "0-5", "15-0", "abc", "15", "1-1-1")),
    ("--task ../../x", "expected A-B"),
    (f"--task 15-{'9' * 5000}", "expected A-B"),
    ("--setting ../x", "'disjoint'"),
    ("--dataset ../x", "'shapes'"),
    *((f"--name {name}", "is not a name of letters") for name in ("../x", "..", "a/b", "a=b")),
    ("@nowhere.txt", "No such file or directory: 'nowhere.txt'"),
    ("@evil.pt", "@FILE: not a text with one flag per line"),
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
    ("--device mps", "expected cpu, cuda or cuda:N"),
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
    ("--step0 http://", "http://: cannot be fetched (<urlopen error no host given>)"),
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


def test_a_page_behind_a_url_is_no_checkpoint_and_not_kept(start):
    Path("step_0.pt").write_text("<html>")
    url = Path("step_0.pt").absolute().as_uri()
    for _ in range(2):
        code, _, err = start(f"{TINY} --step0 {url}")
        assert code == 2 and err.endswith(f"{url}: not a checkpoint; a web page, or cut off\n")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("method", "flags"),
    [("mib_unbiased", "--replay -1"), ("ilt", "--temperature 0"), ("ucd", "--temperature 0")],
)
def test_bad_flags_of_the_methods(start, method, flags):
    code, _, err = start(f"{TINY} {flags}", method=method)
    assert code == 2 and "is not a" in err and not Path("runs").exists()


@slow
def test_another_step0_is_refused_before_anything_is_written(start, whole):
    code, _, err = start(f"{TINY} --task 15-1 --step0 {whole}/step_0.pt")
    assert code == 2 and "another classes" in err and not Path("runs").exists()
    code, _, err = start(f"{TINY} --step0 {whole}/step_1.pt")
    assert code == 2 and "another" in err and not Path("runs").exists()


def test_bfloat16_only_where_the_gpu_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def resolved(*flags):
        monkeypatch.setattr(sys, "argv", ["dkd.py", "--device", "cuda", *flags])
        return common.parse(importlib.import_module("dkd").flags()).precision

    for capability, precision in (((8, 0), "bf16"), ((7, 5), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert resolved() == precision
    with pytest.raises(common.InputError, match="there is --precision fp32"):
        resolved("--precision", "bf16")
    with pytest.raises(common.InputError, match="sees 1 GPU here"):
        resolved("--device", "cuda:1")


# numbers


@slow
def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(start, monkeypatch, whole):
    trees.inside(monkeypatch, 0, 13, lambda _, losses: {k: v / 0 for k, v in losses.items()})
    code, _, err = start(FLAGS + " --save-every 0")
    assert code == 1 and "not finite in step 0, iteration 13: mbce inf, ac inf." in err
    last = torch.load(FOLDER / "last.pt", weights_only=True)
    assert last["iteration"] == 10 and all(v.isfinite().all() for v in last["model"].values())
    assert start(FLAGS)[0] == 0
    assert_same_run(whole, FOLDER)


@slow
def test_weights_that_are_not_finite_are_never_saved(start, monkeypatch):
    """After the last iteration of a step no loss would tell."""

    trees.inside(monkeypatch, 0, 0, lambda _, losses: {k: 1e20 * v for k, v in losses.items()})
    code, _, err = start(TINY + " --batch 64 --epochs 1 --lr 1e30")
    assert code == 1 and "the weights are not finite in step 0, iteration 1." in err
    assert not list(FOLDER.glob("*.pt"))


@slow
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
    for path in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "np.load", "np.fromfile"), path
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert name != "torch.load" or keywords["weights_only"] == "True", path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "pickle" not in ast.unparse(node), path


@slow
def test_the_runs_folder_lies_in_out(start, whole):
    """All parts of its name are checked (see BAD_FLAGS); the rest is a number or the script's."""
    args = argparse.Namespace(**json.loads((whole / "config.json").read_text())["flags"])
    assert common.Run(args, common.most_likely, "").folder.parent == Path(args.out)
