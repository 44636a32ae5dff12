"""Whole runs on tiny data: files, resume, refusals, messages."""

import csv
import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trees
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from trees import CLASSES, METHODS, SMALL, TINY

import common

ROOT = Path(__file__).resolve().parent.parent


def results(folder):
    steps = json.loads((folder / "metrics.json").read_text())["steps"]
    return [{k: v for k, v in step.items() if k != "timing"} for step in steps]


def read_rows(folder):
    return list(csv.DictReader((folder / "train.csv").read_text().splitlines()))


def weights(folder, step=1):
    return torch.load(folder / f"step_{step}.pt", weights_only=True)["model"]


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


FOLDER = Path("runs/dkd-voc-19-1-overlapped-s0")


def test_a_run_and_what_it_leaves(start, tmp_path, data):
    status, out, err = start(TINY)
    assert (status, err) == (0, "")
    assert "step 1 of 0-1: learns tvmonitor (4) from 4 images" in out and "base 0-19" in out
    assert "published: base 77.76, new 41.45, all 76.03 (with background; DKD Table 1" in out
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        *("config.json", "log.txt", "dkd.py", "train.csv", "metrics.json", "pictures"),
        *("step_0.pt", "step_1.pt", ".lock"),
    }
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["flags"]["alpha"] == 5.0 and config["versions"]["torch"] == torch.__version__
    rows = read_rows(FOLDER)
    assert {"step", "iteration", "lr_factor", "mbce", "ac", "kd", "positive", "negative"} == {
        *rows[0]
    }
    assert rows[0]["kd"] == "" and float(rows[-1]["kd"]) > 0
    for step in results(FOLDER):
        assert len(step["iou"]) == 20 + step["step"] and "tvmonitor" not in [*step["iou"]][:20]
        assert np.array(step["confusion"]).shape == (20 + step["step"],) * 2
    for k in (0, 1):
        page = common.open_image(FOLDER / f"pictures/step_{k}.png", "sheet")
        assert page.width == 600 + 198 * k and page.height > 1000  # a column per step
    content = torch.load(FOLDER / "step_1.pt", weights_only=True)
    assert content["classes"][1] == ["tvmonitor"] and content["flags"]["task"] == "19-1"

    # the same command again only reports; --eval finds the same numbers; neither changes a weight
    before, table = weights(FOLDER), out[out.index("mIoU, %") :]
    status, again, _ = start(TINY)
    assert status == 0 and "2 steps done" in again and again[again.index("mIoU, %") :] == table
    status, evaluated, _ = start(TINY + " --eval")
    assert status == 0 and table.splitlines()[:8] == evaluated.splitlines()[2:10]
    assert_same(before, weights(FOLDER))

    # pictures of any size and kind
    Image.fromarray(np.full((50, 90), 128, np.uint8)).save("grey photo.png")
    status, out, _ = start(TINY + " --predict 'grey photo.png'")
    classes = common.open_image(FOLDER / "pictures/grey photo_classes.png", "class map")
    assert status == 0 and classes.size == (90, 50) and classes.mode == "P"
    painted = common.read_picture(FOLDER / "pictures/grey photo_overlay.png")
    assert painted.width >= 90 and painted.height >= 50  # a legend may be below
    shares = [float(value) for value in re.findall(r"([0-9.]+) %", out)]
    assert sum(shares) == pytest.approx(100, abs=0.5)

    # another configuration in the same folder is refused, with the flag that differs
    status, _, err = start(TINY + " --alpha 1")
    assert status == 2 and "alpha 5.0 there, 1.0 here" in err

    # step 0 serves other runs; not those of another kind
    step0 = f" --step0 {FOLDER}/step_0.pt --out other"
    status, out, _ = start(TINY + step0 + " --init random --alpha 0 --beta 0")
    assert status == 0 and "step 0 is runs" in out
    other = Path("other") / FOLDER.name
    assert results(other)[0] == results(FOLDER)[0]
    assert_same(weights(FOLDER, 0), weights(other, 0))
    last = read_rows(other)[-1]
    assert "kd" not in last  # fine-tuning distils nothing
    for flags, message in (
        ("--setting disjoint", "another setting: overlapped there, disjoint here"),
        ("--task 15-5", "another classes"),
        ("--backbone resnet18", "another backbone: small there, resnet18 here"),
        ("--output-stride 16 --crop 64", "another output_stride: 8 there, 16 here"),
    ):
        status, _, err = start(f"{TINY} {step0} {flags} --out third")
        assert status == 2 and message in err


def test_neither_workers_nor_a_second_run_change_the_result(start):
    assert start(TINY)[0] == 0
    assert start(TINY + " --out two --workers 2")[0] == 0
    two = Path("two") / FOLDER.name
    assert_same(weights(FOLDER), weights(two))
    assert results(FOLDER) == results(two)
    assert (FOLDER / "train.csv").read_text() == (two / "train.csv").read_text()
    assert start(TINY + " --out three --seed 1")[0] == 0
    three = weights(Path("three/dkd-voc-19-1-overlapped-s1"))
    assert any(not torch.equal(v, three[k]) for k, v in weights(FOLDER).items())


def test_dry_run_leaves_the_real_run_alone(start):
    for _ in range(2):
        status, out, _ = start(TINY + " --dry-run")
        assert status == 0 and "iteration 2/2" in out
    assert [path.name for path in Path("runs").iterdir()] == [FOLDER.name + "-dry"]


@pytest.mark.parametrize("method", METHODS)
def test_shapes_run_through_the_same_code(start, monkeypatch, method):
    monkeypatch.setattr(common, "SHAPES_TRAIN", 80)
    monkeypatch.setattr(common, "SHAPES_TEST", 20)
    flags = "--task 15-5 --dataset shapes --setting overlapped --epochs 1 --out drawn"
    status, out, err = start(flags, method=method)
    assert (status, err) == (0, "") and "80 training and 20 test images" in out
    assert (Path(f"drawn/{method}-shapes-15-5-overlapped-s0") / "pictures/step_1.png").exists()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_the_method_is_the_same_in_every_main(method):
    """A method may add lines between these; it may not have them otherwise or elsewhere."""
    text = inspect.getsource(importlib.import_module(method).main)
    found = [line for line in text.splitlines() if line in SKELETON]
    assert found == SKELETON


SKELETON = """\
    for step in run.steps():
        old_model, model = run.models(step)
        first = old_model is None
        model.train()
        for images, labels in run.batches():
            run.update(losses)
        run.finish(model)""".splitlines()


def test_memory_is_balanced_and_trained_on(start):
    assert start(TINY + " --task 18-1 --memory 18")[0] == 0
    folder = Path("runs/dkd-voc-18-1-overlapped-s0")
    first, second = (json.loads((folder / f"memory_{k}.json").read_text()) for k in (1, 2))
    assert len(first) == len(second) == 18
    assert {c for ids in first.values() for c in ids} == {*range(1, 19)}
    for i, ids in first.items():
        assert {*ids} == {c for c in CLASSES[int(i)] if c <= 18}
    shown = [i for i, ids in enumerate(CLASSES) if 19 in ids]
    assert f"{len(shown) + 18} images" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("setting", ["disjoint", "sequential"])
def test_a_class_without_an_image_is_named(start, setting):
    status, _, err = start(TINY + f" --task 3-17 --setting {setting}")
    assert status == 2 and "has no image of" in err and "aeroplane" in err


def test_msrc_has_no_background(start, tmp_path):
    trees.msrc(tmp_path)
    flags = f"--dataset msrc --task 20-1 --setting sequential {SMALL} --batch 2"
    status, _, err = start(flags, tmp_path)
    assert (status, err) == (0, "")
    last = results(Path("runs/dkd-msrc-20-1-sequential-s0"))[-1]
    assert last["iou"]["background"] is None
    assert last["with_background"] == last["without_background"]


def test_msrc_keeps_images_with_later_classes_on_request(start, tmp_path):
    """All its training images here show a later class; horse and mountain are void, not unknown."""
    base = trees.msrc(tmp_path)
    flags = f"--dataset msrc --task 16-5 --setting sequential {SMALL} --batch 2"
    status, _, err = start(flags, tmp_path, "mib_unbiased")
    assert status == 2 and "has no image of building, grass" in err and "or --keep-later" in err
    status, out, err = start(f"{flags} --keep-later", tmp_path, "mib_unbiased")
    assert (status, err) == (0, "") and "building (4), grass (2)" in out
    assert start(f"{flags} --check-data", tmp_path)[0] == 0
    mask = next((base / "GroundTruth").glob("*.bmp"))
    pixels = np.array(Image.open(mask))
    pixels[0, 0] = (1, 2, 3)
    Image.fromarray(pixels).save(mask)
    status, out, _ = start(f"{flags} --check-data", tmp_path)
    assert status == 0 and "note: colours of no class, taken as void: 1" in out
    assert common.read_mask(mask).getpixel((0, 0)) == 255


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("setting", ["overlapped", "disjoint"])
def test_every_method_runs_on_msrc_with_masked_labels(start, tmp_path, method, setting):
    """Hidden classes become channel 0, which has no part in the averages."""
    trees.msrc(tmp_path)
    flags = f"--dataset msrc --task 20-1 --setting {setting} {SMALL} --batch 2 --epochs 1"
    status, _, err = start(flags, tmp_path, method)
    assert (status, err) == (0, "")
    last = results(Path(f"runs/{method}-msrc-20-1-{setting}-s0"))[-1]
    assert last["iou"]["background"] is None and last["pixel_accuracy"] is not None


@pytest.mark.parametrize("numbers", [1, 3000, 2**20])
def test_strips_are_the_batch_at_full_size(monkeypatch, numbers):
    """Logits, losses and gradients of a batch in strips equal those of the batch in one piece."""
    monkeypatch.setattr(common, "STRIP", (numbers, numbers))
    torch.manual_seed(0)
    small, old = torch.randn(2, 5, 4, 3, dtype=torch.float64), torch.randn(2, 3, 4, 3).double()
    labels = torch.randint(0, 5, (2, 30, 41))
    labels[:, :7], labels[0, 20:] = 255, 255
    whole = small.clone().requires_grad_()
    z, z_old = (F.interpolate(maps, (30, 41), mode="bilinear") for maps in (whole, old))
    expected = {"ce": F.cross_entropy(z, labels, ignore_index=255), "kd": (z[:, :3] * z_old).mean()}
    run, parts = object.__new__(common.Run), []
    run.world = 1
    run.added, run.small, leaf = {}, None, small.clone().requires_grad_()
    for part in run.strips(labels, leaf, old):
        parts.append(part)
        valid = (part.labels != 255).any()
        ce = F.cross_entropy(part.logits, part.labels, ignore_index=255) if valid else 0
        run.add(
            {"ce": part.valid * ce, "kd": part.all * (part.logits[:, :3] * part.old_logits).mean()}
        )
    assert torch.allclose(torch.cat([p.logits for p in parts], 2), z)
    assert torch.allclose(torch.cat([p.old_logits for p in parts], 2), z_old)
    assert torch.equal(torch.cat([p.labels for p in parts], 1), labels)
    assert sum(p.valid for p in parts).item() == pytest.approx(1)
    assert sum(p.all for p in parts) == pytest.approx(1)
    assert len(parts) == {1: 30, 3000: 5, 2**20: 1}[numbers]
    sum(expected.values()).backward()
    assert torch.allclose(run.leaf.grad, whole.grad)
    for name, value in expected.items():
        assert run.added[name].item() == pytest.approx(value.item())


def test_a_loss_that_is_not_finite_stops_the_run(start):
    status, _, err = start(TINY + " --lr 1e30")
    assert status == 1
    assert re.search(r"not finite in step 0, iteration \d+: mbce \S+, ac \S+\. ", err)
    assert len(err.splitlines()) == 1


def test_bfloat16_runs_every_loss(start):
    assert start(TINY + " --task 18-1 --memory 10 --precision bf16 --epochs 1")[0] == 0


def test_compiled_the_trunk_learns_the_same_and_weights_stay_plain(start, monkeypatch):
    """Through two steps: the classifiers grow. Here without the slow part, code generation."""
    compiled = functools.partial(torch.compile, backend="aot_eager")
    calls = []
    monkeypatch.setattr(torch, "compile", lambda work: calls.append(work) or compiled(work))
    for flags in ("--out plain", "--out compiled --compile"):
        assert start(f"{TINY} --dry-run {flags}")[0] == 0
    assert calls and all(call.__name__ == "stages" for call in calls)
    name = FOLDER.name + "-dry"
    plain, other = (weights(Path(out) / name, 1) for out in ("plain", "compiled"))
    assert plain.keys() == other.keys()
    for key, value in plain.items():
        assert torch.allclose(value, other[key], rtol=1e-4, atol=1e-5), key


class Waits(TorchDispatchMode):
    """While `on`, counts the operations that would wait for a GPU: the CPU needs their result."""

    on, found = False, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = [i for i in indices if i is not None and i.dtype == torch.bool]
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2")
        self.found += self.on and bool(waits or masks)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("method", "each"),
    [
        ("dkd", 0),
        ("mib_unbiased --ewc 1", 0),
        ("ilt --no-freeze-encoder --encoder-kd 1 --similarity-kd 1", 0),
        ("icd", 0),
        ("ucd --base plop", 2),  # its contrast is of as many pixels as there are of foreground
    ],
)
def test_an_iteration_does_not_wait_for_the_gpu(start, monkeypatch, method, each):
    """Between a batch and the losses' reading, once in WINDOW iterations."""
    waits, batches, read, later = Waits(), common.Run.batches, common.Run.read_window, []

    def counted(run):
        for batch in batches(run):
            waits.on = True
            later.append(run.step.index)
            yield batch
            waits.on = False

    def read_window(run, names):
        waits.on = False
        return read(run, names)

    monkeypatch.setattr(common.Run, "batches", counted)
    monkeypatch.setattr(common.Run, "read_window", read_window)
    script, *flags = method.split()
    with waits:
        status, _, err = start(" ".join([TINY, "--dry-run", *flags]), method=script)
    assert (status, err) == (0, "")
    assert 1 in later and waits.found == each * sum(later)


def test_a_step_with_fewer_images_than_the_batch(start):
    assert start(TINY + " --batch 64 --epochs 1")[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task 25-1", "--task 25-1: expected A-B"),
        ("--task abc", "--task abc: expected A-B"),
        ("--batch 0", "'0' is not a whole number from 1"),
        ("--lr -1", "'-1' is not a number from 0"),
        ("--lr 1 2 3", "--lr: one value, or two"),
        ("--held-out 0.9", "--held-out 0.9"),
        ("--device cuda:99", "--device cuda:99"),
        ("--device gpu", "--device gpu: expected cpu, cuda or cuda:N"),
        ("--class-order nowhere.txt", "--class-order nowhere.txt: cannot be read"),
        ("--weights nowhere.pth", "--weights nowhere.pth: no such file"),
        ("--step0 nowhere.pt", "--step0 nowhere.pt: no such file"),
        ("--eval", "--eval: no step_0.pt in runs"),
        ("--predict a.jpg", "--predict: no step_0.pt in runs"),
        ("--data nowhere", "nowhere/VOCdevkit/VOC2012"),
        ("--out /dev/null", "--out /dev/null: cannot be written to"),
        ("--weights imagenet", "--weights imagenet: not to be had for small"),
    ],
)
def test_bad_input_ends_in_a_clear_line_and_status_2(start, flags, message):
    status, _, err = start(f"{TINY} {flags}")
    assert status == 2 and message in err and "Traceback" not in err


def test_without_data_the_first_command_explains_itself(tmp_path):
    """As a user sees it: another process, no flags but the task."""
    command = [sys.executable, str(ROOT / "dkd.py"), "--task", "15-1", "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(tmp_path / "VOCdevkit/VOC2012") in done.stderr
    assert "python dkd.py --dataset voc --data DIR --download" in done.stderr
    assert "python dkd.py --task 15-1 --dataset shapes" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_check_data_reports_every_kind_of_fault(start, tmp_path):
    base = trees.voc(tmp_path / "bad", [[1], [2], [3]], [[1], [2]])
    assert start("--check-data", tmp_path / "bad")[0] == 0
    (base / "JPEGImages/a0.jpg").unlink()
    status, out, _ = start("--check-data", tmp_path / "bad")
    assert status == 1 and "error: no picture: 1, such as" in out and "1 errors" in out
    assert re.search(r"15-1 +overlapped +train +3\*\[9568\] 0\*\[487\]", out)
    trees.write(base / "SegmentationClassAug/a1.png", trees.mask([1], width=8))
    (base / "JPEGImages/b0.jpg").write_bytes(b"nothing")
    trees.write(base / "SegmentationClassAug/b1.png", trees.mask([99]))
    status, out, err = start("--check-data", tmp_path / "bad")
    assert "error: picture and mask differ in size: 1" in out and "a1.png" in out
    assert "error: unreadable: 1" in out and "b0.jpg" in out
    assert "error: class numbers beyond 20: 1" in out and "b1.png" in out
    assert status == 2 and "b1.png: class number 99" in err and "Traceback" not in err


def test_download_says_where_data_comes_from_and_writes_masks(start, tmp_path, monkeypatch):
    for name, text in (("ade", "ADEChallengeData2016.zip"), ("msrc", "TextonBoost")):
        status, out, _ = start(f"--dataset {name} --download")
        assert status == 0 and text in out
    voc = tmp_path / "VOCdevkit/VOC2012"
    trees.write(voc / "SegmentationClass/own.png", trees.mask([1]))
    (tmp_path / "cls").mkdir()
    for name in ("own", "sbd"):
        (tmp_path / f"cls/{name}.mat").touch()
    label = trees.mask([2]).astype(np.uint8)
    label[label == 255] = 0
    common.write_aug_masks(
        voc, tmp_path / "cls", lambda path: {"GTcls": [{"Segmentation": [label]}]}
    )
    target = voc / "SegmentationClassAug"
    assert np.unique(common.read_mask(target / "own.png")).tolist() == [0, 1, 255]
    assert np.unique(common.read_mask(target / "sbd.png")).tolist() == [0, 2]
    assert common.read_mask(target / "sbd.png").getpalette()[3:6] == [128, 0, 0]


def test_a_faulty_picture_is_named_also_from_a_worker(start, tmp_path):
    base = trees.voc(tmp_path / "bad", CLASSES, CLASSES[:12])
    (base / "JPEGImages/a5.jpg").write_bytes(b"nothing")
    for workers in (0, 1):
        status, _, err = start(f"{TINY} --workers {workers}", tmp_path / "bad")
        assert status == 2 and "a5.jpg: not a readable picture" in err
        assert len(err.splitlines()) == 1, err
