"""Forks of dkd.py, as its users write them: what works, and what is refused in one line."""

import os
import re
import signal

import pytest
import torch
import trees
from trees import TINY, read_rows, weights

import common

pytestmark = pytest.mark.slow
FOLDER = trees.folder_name("mine")
FLAGS = TINY + " --epochs 2 15"  # 20 iterations in step 0, 15 in step 1
ATTACH = """\
@@ a module of the fork's own
+        model.projector = nn.Conv2d(model.classifiers[0].in_channels, 8, 1)
         optimizer = sgd(model, common.per_step(args.lr, step), args, first)
"""
LEARN = """\
@@ its place in the optimiser
         optimizer = sgd(model, common.per_step(args.lr, step), args, first)
+        optimizer.add_param_group({"params": model.projector.parameters(), "lr": 0.01})
"""
USE = """\
@@ its loss
+            losses["projected"] = (model.projector(maps["head"].float()) - 1).square().mean()
             loss = run.log(losses)  # Eq. 1: their sum
"""


def write_fork(folder, diff):
    """cp dkd.py mine.py, and some changes."""
    script = folder / "mine.py"
    script.write_text(trees.patched((common.HERE / "dkd.py").read_text(), diff))
    return script


@pytest.fixture
def fork(start, tmp_path):
    """Runs a fork of dkd.py with some changes; gives status, standard output and error."""
    return lambda diff, flags: start(flags, method=write_fork(tmp_path, diff))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A folder with a finished run, in runs/, of the fork with a module of its own."""
    place = tmp_path_factory.mktemp("whole")
    script = write_fork(place, ATTACH + LEARN + USE)
    return trees.whole_run(place, f"{FLAGS} --data {data}", script)


def test_a_module_of_a_fork_learns_and_is_saved(whole):
    first, second = (weights(whole / FOLDER, step) for step in (0, 1))
    own = {name for name in first if name.startswith("projector.")}
    assert own == {"projector.weight", "projector.bias"} and own < second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in own)
    losses = [float(row["projected"]) for row in read_rows(whole / FOLDER)]
    assert losses[-1] < losses[0]
    assert (whole / FOLDER / "mine.py").read_text() == (whole / "mine.py").read_text()


def test_it_goes_from_step_to_step_and_over_a_stop(fork, monkeypatch, whole):
    """Killed inside step 1 and started again, the run ends with the same bits."""
    batches, begun = common.Run.batches, []

    def observed(run, step, model, *given, **named):
        begun.append({k: v.clone() for k, v in model.projector.state_dict().items()})
        yield from batches(run, step, model, *given, **named)

    monkeypatch.setattr(common.Run, "batches", observed)
    trees.inside(monkeypatch, 1, 12, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    status, out, _ = fork(ATTACH + LEARN + USE, FLAGS)
    assert status == 143 and "stopped and saved at iteration 13 of 15" in out
    end = weights(FOLDER, 0)
    for name, value in begun[1].items():
        assert torch.equal(value, end[f"projector.{name}"])
        assert not torch.equal(value, begun[0][name])
    status, out, _ = fork(ATTACH + LEARN + USE, FLAGS)
    assert status == 0 and "goes on at iteration 13 of 15" in out
    trees.assert_same_run(whole / FOLDER, FOLDER)


def test_a_fork_starts_from_a_step_0_without_its_module(fork, start):
    assert start(f"{TINY} --dry-run")[0] == 0
    step0 = f"{trees.folder_name('dkd')}-dry/step_0.pt"
    status, out, err = fork(ATTACH + LEARN + USE, f"{FLAGS} --step0 {step0}")
    assert (status, err) == (0, "") and f"step 0 is {step0}" in out
    assert "projector.weight" not in weights(FOLDER, 0)
    assert "projector.weight" in weights(FOLDER, 1)


def test_a_parameter_in_no_group_is_refused_by_name(fork):
    status, _, err = fork(ATTACH + USE, TINY)
    assert status == 2 and len(err.splitlines()) == 1
    assert "projector.weight and 1 more: in no parameter group of the optimiser" in err


def test_a_module_that_a_later_step_lacks_is_refused(fork):
    only_first = """\
@@
+        if first:
+            model.projector = nn.Conv2d(64, 8, 1).requires_grad_(False)
         optimizer = sgd(model, common.per_step(args.lr, step), args, first)
"""
    status, _, err = fork(only_first, f"{TINY} --dry-run")
    assert status == 2 and len(err.splitlines()) == 1
    assert "step_0.pt holds projector.weight, which the model of step 1 lacks" in err


def test_a_loss_that_is_not_always_there_has_the_mean_of_where_it_was(fork):
    """Empty cells where it never was; the number of the iteration stands for a loss."""
    sometimes = """\
@@
+            i = float(next(numbers))
+            if i % 4 == 1:
+                losses["rare"] = i + 0 * losses["ac"]
+            if i >= 10:
+                losses["late"] = i + 0 * losses["ac"]
             loss = run.log(losses)  # Eq. 1: their sum
@@
         net = run.parallel(model)
+        numbers = iter(range(1000))
"""
    assert fork(sometimes, f"{TINY} --epochs 2")[0] == 0
    cells = [(row["rare"], row["late"]) for row in read_rows(FOLDER)]
    assert cells == [("5", ""), ("15", "14.5"), ("1", "")]


def test_a_schedule_of_its_own(fork):
    own = """\
@@
-        for images, labels in run.batches(step, model, optimizer, memory=memory):
+        halves = {"schedule": lambda i, total, warmup: 0.5**i}
+        for images, labels in run.batches(step, model, optimizer, memory=memory, **halves):
"""
    assert fork(own, f"{TINY} --dry-run")[0] == 0
    rows = read_rows(trees.folder_name("mine").with_name(f"{FOLDER.name}-dry"))
    assert [row["lr_factor"] for row in rows] == ["0.500000", "0.500000"]  # of iteration 1, of two


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            """\
@@
-            loss = run.log(losses)  # Eq. 1: their sum
+            loss = sum(losses.values())
""",
            r"the loop calls run\.log\(losses\) in every iteration",
        ),
        (
            """\
@@
+            scale = model.classifiers[1].weight.square().sum()
+            losses["own"] = run.dense(lambda z: scale * z.square().mean(), logits)
             loss = run.log(losses)  # Eq. 1: their sum
""",
            "dense: the loss uses a parameter that is none of its arguments",
        ),
        (
            """\
@@
+            losses["own"] = run.dense(torch.amax, logits)
             loss = run.log(losses)  # Eq. 1: their sum
""",
            "dense: amax of some rows is .*, of their halves .*common.upsample",
        ),
        (
            """\
@@
+            run.log({"own": losses["ac"]})
             loss = run.log(losses)  # Eq. 1: their sum
""",
            r"run\.log\(losses\) is called once in an iteration",
        ),
        (
            """\
@@
+            losses["step"] = losses["ac"]
             loss = run.log(losses)  # Eq. 1: their sum
""",
            "'step': no name for a column of train.csv",
        ),
        (
            """\
@@
+        for _ in run.batches(step, model, optimizer):
+            pass
         run.finish(step, model)
""",
            r"one run\.batches in a step",
        ),
        (
            """\
@@
+        model.head.append(nn.Conv2d(64, 64, 1))
         optimizer = sgd(model, common.per_step(args.lr, step), args, first)
""",
            r"head\.3\.weight: not of the network of these flags",
        ),
        (
            """\
@@
+        model.projector = nn.Conv2d(64, 8, 1).requires_grad_(False)
         optimizer = sgd(model, common.per_step(args.lr, step), args, first)
-        net = run.parallel(model)
+        net = model
""",
            r"projector\.weight: run\.parallel\(model\) gives it its weights",
        ),
        (
            """\
@@
-    run = common.Run(args, predict, "DKD-M" if args.memory else "DKD")
+    run = common.Run(args, lambda logits: logits.argmax(1), "")
""",
            "the prediction rule is a function of the script, called predict",
        ),
        (
            """\
@@
-    return torch.where(score > 0, best + 1, BACKGROUND)
+    return torch.where(score > 0, best + 1, 99)
""",
            "the prediction rule gives class ids above",
        ),
    ],
    ids=[
        *("no log", "closure", "no mean", "two logs", "name", "two loops", "in the network"),
        *("no parallel", "rule", "unknown class"),
    ],
)
def test_a_mistake_in_a_fork_is_refused_in_one_line(fork, change, message):
    status, _, err = fork(change, TINY)
    assert status == 2 and len(err.splitlines()) == 1, err
    assert re.search(message, err)
