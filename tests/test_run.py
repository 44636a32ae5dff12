"""Whole runs on tiny data: files, flags, refusals, what is the same in every method."""

import ast
import copy
import csv
import functools
import gc
import hashlib
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from trees import CLASSES, METHODS, SMALL, TINY, assert_same, read_rows, results, weights

import common
from data import files, shapes

ROOT = Path(__file__).resolve().parent.parent
FOLDER = trees.folder_name("dkd")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A folder with a finished run of DKD in runs/."""
    return trees.whole_run(tmp_path_factory.mktemp("whole"), f"{TINY} --data {data}")


@pytest.fixture
def finished(whole, start):
    """The same in the folder of this test."""
    shutil.copytree(whole / FOLDER, FOLDER)
    return FOLDER


@slow
def test_a_run_and_what_it_leaves(start, capsys):
    status, out, err = start(TINY)
    assert (status, err) == (0, "")
    assert "step 1 of 0-1: learns tvmonitor (4) from 4 images" in out and "base 0-19" in out
    assert "published: base 77.76, new 41.45, all 76.03 (with background; DKD Table 1" in out
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        *("config.json", "log.txt", "dkd.py", "train.csv", "metrics.json", "iou.csv"),
        *("step_0.pt", "step_1.pt", ".lock", "flags.txt", "pictures"),
    }
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["flags"]["alpha"] == 5.0 and config["versions"]["torch"] == torch.__version__
    assert f"flags    {' '.join(config['flags']['typed'])} (config.json" in out
    table = list(csv.DictReader((FOLDER / "iou.csv").read_text().splitlines()))
    assert [row["learned_in"] for row in table] == [*"0" * 20, "1"] and table[20]["step_0"] == ""
    printed = re.findall(r"^  .*\btrain +([0-9.]+)", out, re.M)
    assert printed == [f"{float(table[19][step]):.1f}" for step in ("step_0", "step_1")]
    assert re.search(r"^  not learned in \d+ iterations: \w.* Try more --epochs, ", out, re.M)
    rows = read_rows(FOLDER)
    assert {"step", "iteration", "lr_factor", "mbce", "ac", "kd", "positive", "negative"} == {
        *rows[0]
    }
    assert rows[0]["kd"] == "" and float(rows[-1]["kd"]) > 0
    for step in results(FOLDER):
        assert len(step["iou"]) == 20 + step["step"] and "tvmonitor" not in [*step["iou"]][:20]
        assert np.array(step["confusion"]).shape == (20 + step["step"],) * 2
    for k in (0, 1):
        page = files.open_image(FOLDER / f"pictures/step_{k}.png", "sheet")
        assert page.width == 600 + 198 * k and page.height > 1000  # a column per step
    content = torch.load(FOLDER / "step_1.pt", weights_only=True)
    assert content["classes"][1] == ["tvmonitor"] and content["flags"]["task"] == "19-1"
    assert all(content[k] == config[k] for k in ("commit", "versions"))
    last = json.loads((FOLDER / "metrics.json").read_text())["steps"][1]
    assert content["metrics"] == last and "tvmonitor" in last["iou"]

    # the same command again only reports
    before, table = weights(FOLDER), out[out.index("mIoU, %") :]
    status, again, _ = start(TINY)
    assert status == 0 and "2 steps done" in again and again[again.index("mIoU, %") :] == table
    assert_same(before, weights(FOLDER))
    # and so do the flags that it has written
    trees.launch("dkd", f"@{FOLDER}/flags.txt")
    assert "2 steps done" in capsys.readouterr().out


@slow
def test_another_configuration_in_the_folder_is_refused(start, finished):
    status, _, err = start(TINY + " --alpha 1")
    assert status == 2 and "alpha 5.0 there, 1.0 here" in err


@slow
def test_step_0_serves_other_runs_but_not_those_of_another_kind(start, whole):
    there = whole / FOLDER
    step0 = f"--step0 {there}/step_0.pt"
    status, out, _ = start(f"{TINY} {step0} --init random --alpha 0 --beta 0")
    assert status == 0 and f"step 0 is {there}" in out
    assert results(FOLDER)[0] == results(there)[0]
    assert_same(weights(FOLDER, 0), weights(there, 0))
    assert "kd" not in read_rows(FOLDER)[-1]  # fine-tuning distils nothing
    for flags, message in (
        ("--setting disjoint", "another setting: overlapped there, disjoint here"),
        ("--task 15-5", "another classes"),
        ("--backbone resnet18", "another backbone: small there, resnet18 here"),
        ("--output-stride 16 --crop 64", "another output_stride: 8 there, 16 here"),
    ):
        status, _, err = start(f"{TINY} {step0} {flags} --out third")
        assert status == 2 and message in err
    assert not Path("third").exists()


@slow
def test_step_0_may_be_a_url_whose_file_is_kept_and_checked(start, whole):
    step0 = (whole / FOLDER / "step_0.pt").read_bytes()
    digest = hashlib.sha256(step0).hexdigest()
    good, bad = Path(f"step_0-{digest[:8]}.pt"), Path("step_0-00000000.pt")
    for file in (good, bad):
        file.write_bytes(step0)
    for _ in range(2):
        url = good.absolute().as_uri()
        status, out, _ = start(f"{TINY} --step0 {url} --dry-run")
        assert status == 0 and f"step 0 is {url}" in out
        good.unlink(missing_ok=True)
    assert_same(weights(FOLDER.with_name(FOLDER.name + "-dry"), 0), weights(whole / FOLDER, 0))
    for file, message in ((bad, "invalid hash value"), (Path("gone.pt"), "No such file")):
        other = file.absolute().as_uri()
        status, _, err = start(f"{TINY} --step0 {other} --out other")
        assert status == 2 and f"{other}: cannot be fetched" in err and message in err
    assert not Path("other").exists()
    assert files.name_in("https://a.b/c/step_0-1a2b3c4d.pt?download=1") == "step_0-1a2b3c4d.pt"


@slow
def test_neither_workers_nor_a_second_run_change_the_result(start, whole):
    assert start(TINY + " --workers 2")[0] == 0
    trees.assert_same_run(whole / FOLDER, FOLDER)


@slow
def test_another_seed_changes_the_result(start, whole):
    assert start(TINY + " --seed 1")[0] == 0
    other = weights(Path("runs/dkd-voc-19-1-overlapped-s1"))
    assert any(not torch.equal(v, other[k]) for k, v in weights(whole / FOLDER).items())


@slow
def test_dry_run_leaves_the_real_run_and_the_users_files_alone(start):
    notes = FOLDER.with_name(FOLDER.name + "-dry") / "notes.txt"
    for _ in range(2):
        status, out, _ = start(TINY + " --dry-run")
        assert status == 0 and "iteration 2/2" in out and "goes on" not in out
        notes.touch()
    assert [path.name for path in Path("runs").iterdir()] == [notes.parent.name]
    assert (notes.parent / "log.txt").read_text().count("step 0 of 0-1") == 1


@slow
@pytest.mark.parametrize("method", METHODS)
def test_shapes_run_through_the_same_code(start, few_shapes, method):
    flags = "--task 15-5 --dataset shapes --setting overlapped --epochs 1 --out drawn"
    status, out, err = start(flags, method=method)
    assert (status, err) == (0, "") and "80 training, 20 test images" in out
    assert (Path(f"drawn/{method}-shapes-15-5-overlapped-s0") / "pictures/step_1.png").exists()


@slow
@pytest.mark.parametrize("method", [*METHODS, "ucd --base plop"])
def test_all_methods_run_with_swin(start, monkeypatch, method):
    """Its maps are those of PLOP, ICD and ILT."""
    monkeypatch.setattr(shapes, "TRAIN", 80)
    monkeypatch.setattr(shapes, "TEST", 4)
    method, _, flags = method.partition(" ")
    flags += " --task 19-1 --dataset shapes --backbone swin_t --crop 128 --batch 2 --dry-run"
    if method == "ilt":
        flags += " --encoder-kd 1 --decoder-kd 1 --similarity-kd 1 --no-freeze-encoder"
    status, _, err = start(flags, method=method)
    assert (status, err) == (0, "")
    (config,) = Path("runs").glob("*/config.json")
    assert json.loads(config.read_text())["flags"]["output_stride"] == 32


SKELETON = """\
def main(args: argparse.Namespace) -> None:
    run = common.Run(args, ...)
    for step in run.steps():
        old_model, model = run.models(step)
        first = old_model is None
        model.train()
        optimizer = sgd(model, common.per_step(args.lr, step), args...)
        net = run.parallel(model)
        for images, labels in run.batches(step, model, optimizer...):
            logits, ... = net(images)
                with torch.no_grad():
                    old_logits, ... = old_model(images)
            loss = run.log(losses)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.finish(step, model)""".splitlines()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_the_method_is_the_same_in_every_main(method):
    """A method may add lines between these; it may not have them otherwise or elsewhere."""
    main = inspect.getsource(importlib.import_module(method).main)
    patterns = [".*".join(map(re.escape, line.split("..."))) for line in SKELETON]
    lines = [line.split("  #")[0] for line in main.splitlines()]
    found = [k for line in lines for k, p in enumerate(patterns) if re.fullmatch(p, line)]
    assert found == [*range(len(SKELETON))]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_imports_common_and_packages_only(method):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{method}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert "common" in imported
    assert not {name.split(".")[0] for name in imported} & {*METHODS, "data"}


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--task 15-1 --dataset shapes --lr 0.1 1e-5 --ignore --no-freeze --keep-later --dry-run",
        "--data 'my data/VOC=2012' --class-order ' order' --out ../-runs --name a.b-1 --seed 3",
        "--epochs 5 --ignore void later --positive-weight 2.5 --device cpu --precision fp32",
    ],
)
def test_flags_txt_repeats_the_command(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    args = trees.arguments("dkd", flags)
    Path("flags.txt").write_text("".join(f"{word}\n" for word in args.typed))
    assert vars(trees.arguments("dkd", "@flags.txt")) == vars(args)
    other = trees.arguments("dkd", "@flags.txt --seed 7")
    assert other.seed == 7 and "--seed=7" in other.typed and "@" not in str(other.typed)


def test_the_run_is_called_as_name_says(few_shapes):
    usual = "dkd-shapes-15-1-overlapped-s0"
    for flags, folder in (("--name lr2", "lr2"), ("--name a --dry-run", "a-dry"), ("", usual)):
        args = trees.arguments("dkd", f"--dataset shapes {flags}")
        assert common.Run(args, common.most_likely, "").folder == Path("runs") / folder


@slow
def test_memory_is_balanced_and_trained_on(start):
    assert start(TINY + " --task 18-1 --memory 18")[0] == 0
    folder = Path("runs/dkd-voc-18-1-overlapped-s0")
    first, second = (json.loads((folder / f"memory_{k}.json").read_text()) for k in (1, 2))
    assert len(first) == len(second) == len({name for name, _ in first}) == 18
    seen = {name: {c for c in ids if c in range(1, 19)} for name, ids in first}
    assert {c for ids in seen.values() for c in ids} == {*range(1, 19)}
    for name, ids in seen.items():
        assert ids <= {*CLASSES[int(name.strip("a.jpg"))]}
    shown = [i for i, ids in enumerate(CLASSES) if 19 in ids]
    assert f"{len(shown) + 18} images" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("setting", ["disjoint", "sequential"])
def test_a_class_without_an_image_is_named(start, setting):
    status, _, err = start(TINY + f" --task 3-17 --setting {setting}")
    assert status == 2 and "has no image of" in err and "aeroplane" in err


@slow
def test_msrc_has_no_background(start, tmp_path):
    trees.msrc(tmp_path)
    flags = f"--dataset msrc --task 20-1 --setting sequential {SMALL} --batch 2"
    status, _, err = start(flags, tmp_path)
    assert (status, err) == (0, "")
    last = results(Path("runs/dkd-msrc-20-1-sequential-s0"))[-1]
    assert last["iou"]["background"] is None
    assert last["with_background"] == last["without_background"]


@slow
def test_msrc_keeps_images_with_later_classes_on_request(start, tmp_path):
    """All its training images here show a later class; horse and mountain are void, not unknown."""
    base = trees.msrc(tmp_path)
    flags = f"--dataset msrc --task 16-5 --setting sequential {SMALL} --batch 2"
    status, _, err = start(flags, tmp_path, "mib_unbiased")
    assert status == 2 and "has no image of building, grass" in err and "or --keep-later" in err
    mask = next((base / "GroundTruth").glob("*.bmp"))
    pixels = np.array(Image.open(mask))
    pixels[0, 0] = (1, 2, 3)  # a colour of no class
    Image.fromarray(pixels).save(mask)
    status, out, err = start(f"{flags} --keep-later", tmp_path, "mib_unbiased")
    assert (status, err) == (0, "") and "building (4), grass (2)" in out
    assert files.read_mask(mask).getpixel((0, 0)) == 255


@slow
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


@slow
def test_a_loss_that_is_not_finite_stops_the_run(start):
    status, _, err = start(TINY + " --lr 1e30")
    assert status == 1
    assert re.search(r"not finite in step 0, iteration \d+: mbce \S+, ac \S+\. ", err)
    assert len(err.splitlines()) == 1


@slow
def test_bfloat16_runs_every_loss(start):
    assert start(TINY + " --task 18-1 --memory 10 --precision bf16 --epochs 1")[0] == 0


@pytest.fixture
def compiler(monkeypatch):
    """Counts the graphs of torch.compile; without the slow part, code generation."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    common.compiled_stages.cache_clear()
    yield counter
    common.compiled_stages.cache_clear()
    torch._dynamo.reset()


@slow
@pytest.mark.skipif(torch.__version__ < (2, 5), reason="compiles each model anew")
def test_compiled_the_trunk_learns_the_same_in_three_graphs(start, monkeypatch, compiler):
    """Step 0, later steps with BatchNorm frozen, the old model. No model outlives its step."""
    parallel, models = common.Run.parallel, []

    def noted(run, model):
        models.append(weakref.ref(model))
        return parallel(run, model)

    monkeypatch.setattr(common.Run, "parallel", noted)
    for flags in ("--out plain", "--out compiled --compile"):
        assert start(f"{TINY} --task 18-1 --dry-run {flags}")[0] == 0
    assert compiler.frame_count == 3
    gc.collect()
    assert len(models) == 6 and not any(model() for model in models)
    name = "dkd-voc-18-1-overlapped-s0-dry"
    plain, other = (weights(Path(out) / name, 2) for out in ("plain", "compiled"))
    assert plain.keys() == other.keys()
    for key, value in plain.items():
        assert torch.allclose(value, other[key], rtol=1e-4, atol=1e-5), key


@slow
def test_a_copy_of_a_compiled_model_has_statistics_of_its_own(monkeypatch, compiler):
    monkeypatch.setattr(common.DeepLabV3, "compiled", True)
    model, images = common.DeepLabV3("small", 8, [2]).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before, other = model(images)[0], copy.deepcopy(model)
        for name, statistic in other.named_buffers():
            if name.endswith("running_mean"):
                statistic += 1
        assert not torch.allclose(other(images)[0], before, atol=1e-3)
        assert torch.equal(model(images)[0], before)
    assert compiler.frame_count == 1 or torch.__version__ < (2, 5)  # compiles each model anew


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


@slow
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
    """Between a batch and the next. A step's first one may: there `dense` checks each loss once."""
    waits, batches, later = Waits(), common.Run.batches, []

    def counted(run, step, *given, **named):
        for i, batch in enumerate(batches(run, step, *given, **named)):
            waits.on = i > 0
            later.append(i > 0 and step.index > 0)
            yield batch
            waits.on = False  # once in LOG_EVERY iterations the losses are read

    monkeypatch.setattr(common.Run, "batches", counted)
    script, *flags = method.split()
    with waits:
        status, _, err = start(" ".join([TINY, "--dry-run", *flags]), method=script)
    assert (status, err) == (0, "")
    assert any(later) and waits.found == each * sum(later)


@slow
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
        ("--data nowhere", "nowhere/VOCdevkit/VOC2012"),
        ("--out /dev/null", "--out /dev/null: cannot be written to"),
        ("--weights imagenet", "--weights imagenet: not to be had for small"),
    ],
)
def test_bad_input_ends_in_a_clear_line_and_status_2(start, flags, message):
    status, _, err = start(f"{TINY} {flags}")
    assert status == 2 and message in err and "Traceback" not in err


@slow
def test_without_data_the_first_command_explains_itself(tmp_path):
    """As a user sees it: another process, no flags but the task."""
    command = [sys.executable, str(ROOT / "dkd.py"), "--task", "15-1", "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(tmp_path / "VOCdevkit/VOC2012") in done.stderr
    assert "python -m data.prepare voc --data DIR --download" in done.stderr
    assert "python dkd.py --task 15-1 --dataset shapes" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


@slow
def test_a_faulty_picture_is_named_also_from_a_worker(start, tmp_path):
    base = trees.voc(tmp_path / "bad", CLASSES, CLASSES[:12])
    (base / "JPEGImages/a5.jpg").write_bytes(b"nothing")
    for workers in (0, 1):
        status, _, err = start(f"{TINY} --workers {workers}", tmp_path / "bad")
        assert status == 2 and "a5.jpg: not a readable picture" in err
        assert len(err.splitlines()) == 1, err


@pytest.mark.slow
def test_the_benchmark_of_losses_runs():
    """Small: it also asserts that the losses equal the textbook's, and how little they keep."""
    flags = ["losses", "--size", "128", "--batch", "1", "--repeats", "1"]
    command = [sys.executable, str(ROOT / "tests/benchmark.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if "151" in line]) == 4


@slow
@pytest.mark.parametrize("method", [m for m in METHODS if m != "dkd"])
def test_frozen_batchnorm_keeps_the_statistics_of_step_0(start, method):
    assert start(f"{TINY} --setting overlapped --freeze-batchnorm", method=method)[0] == 0
    before, after = (weights(trees.folder_name(method), step) for step in (0, 1))
    statistics = [k for k in before if ".running_" in k]
    assert statistics and all(torch.equal(before[k], after[k]) for k in statistics)
    assert not torch.equal(before["head.0.weight"], after["head.0.weight"])
