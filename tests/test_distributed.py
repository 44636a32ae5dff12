"""Several processes, as torchrun starts them: on the CPU, with gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trees import METHODS, SMALL, TINY

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
# runs methods one after the other, without dropout, and with a BatchNorm for which a batch in two
# halves is the same as the whole: FROZEN, or SHARED, which is SyncBatchNorm in plain PyTorch
DRIVER = """\
import importlib, os, sys
sys.path.insert(0, ROOT)
import common
import torch
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce
nn.Dropout.forward = lambda self, x: x
init = distributed.init_process_group
distributed.init_process_group = lambda kind: distributed.is_initialized() or init(kind)
distributed.destroy_process_group = lambda: None  # one group for all methods
for method in METHODS:
    module = importlib.import_module(method)
    typed = FLAGS + ["--contrast", "0"] * (method == "ucd")  # it contrasts a process's own images
    typed += ["--lr", "0.01"] * (method == "dkd")  # its head's rate is ten times that
    sys.argv = [f"{ROOT}/{method}.py", *typed]
    try:
        common.launch(module.main, module.flags())
    except SystemExit as stop:
        if stop.code:
            raise
"""


FROZEN = "nn.BatchNorm2d.train = lambda self, mode=True: nn.Module.train(self, False)\n"
SHARED = """\
def forward(norm, x):
    if not norm.training:
        return nn.BatchNorm2d.forward(norm, x)
    count = 2 * x.numel() // len(x[0])
    mean, square = all_reduce(torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])) / count
    variance = square - mean.square()
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
        norm.num_batches_tracked += 1
    scale = norm.weight * (variance + norm.eps).rsqrt()
    shape = (1, -1, 1, 1)
    return x * scale.view(shape) + (norm.bias - mean * scale).view(shape)


def shared(run, model, parallel=common.Run.parallel):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return parallel(run, model)


torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
nn.SyncBatchNorm.forward, common.Run.parallel = forward, shared
nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # GPUs only
"""


def launch(folder, data, count, methods=METHODS, more="", norm=FROZEN):
    """`count` processes, under torchrun if there are several; folder/runs is what they leave."""
    flags = f"--dataset voc --task 19-1 {SMALL} --lr 0.3 --ignore void --epochs 1 {more}".split()
    flags += ["--data", str(data), "--out", str(folder / "runs"), "--setting", "overlapped"]
    given = f"ROOT, METHODS, FLAGS = {str(ROOT)!r}, {methods!r}, {flags!r}\n"
    (folder / "driver.py").write_text(given + DRIVER.replace("init = ", f"{norm}init = "))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [sys.executable, *(torchrun if count > 1 else []), str(folder / "driver.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_two_processes_learn_what_one_does(tmp_path, data):
    """The same total batch: the same weights and confusion matrices, and each file once."""
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        done = launch(tmp_path / str(count), data, count)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("learns tvmonitor") == len(METHODS)  # only the first one speaks
    for method in METHODS:
        one, two = (tmp_path / f"{n}/runs/{method}-voc-19-1-overlapped-s0" for n in (1, 2))
        assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
        for step in (0, 1):
            a, b = (
                torch.load(f / f"step_{step}.pt", weights_only=True)["model"] for f in (one, two)
            )
            assert a.keys() == b.keys()
            old = torch.load(one / "step_0.pt", weights_only=True)["model"]
            assert step == 0 or max((a[k] - old[k]).abs().max() for k in old) > 1e-3
            for key, value in a.items():
                assert torch.allclose(value, b[key], rtol=1e-5, atol=1e-5), (method, step, key)
        a, b = (json.loads((f / "metrics.json").read_text())["steps"] for f in (one, two))
        assert [s["test_images"] for s in a] == [s["test_images"] for s in b]
        for there, here in zip(a, b, strict=True):
            counted = torch.tensor(there["confusion"]).sum(), torch.tensor(here["confusion"]).sum()
            assert counted[0] == counted[1]  # no picture twice
        rows = [(f / "train.csv").read_text().splitlines() for f in (one, two)]
        for x, y in zip(*rows, strict=True):
            if x[0] != "s":
                x, y = ([float(v) for v in line.split(",") if v] for line in (x, y))
                assert x == pytest.approx(y, rel=1e-3)


@pytest.mark.parametrize("batch", [4, 2])  # 2: one image in each of two processes
def test_batchnorm_that_all_share_learns_what_one_process_does(tmp_path, data, batch):
    found = []
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        more = f"--batch {batch} --lr 0.001 --epochs 1"
        done = launch(tmp_path / str(count), data, count, ("mib_unbiased",), more, SHARED)
        assert done.returncode == 0, done.stderr
        path = tmp_path / f"{count}/runs/mib_unbiased-voc-19-1-overlapped-s0/step_1.pt"
        found.append(torch.load(path, weights_only=True)["model"])
    for key, value in found[0].items():
        assert torch.allclose(value, found[1][key], rtol=0, atol=1e-9), key


def test_a_fault_of_one_process_ends_all_with_the_reason(tmp_path, data):
    done = launch(tmp_path, data, 2, ("ilt",), "--lr 1e30")
    assert done.returncode != 0 and "the loss is not finite in step 0" in done.stderr


def test_a_batch_that_the_processes_cannot_share_is_refused(start, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    status, _, err = start(TINY + " --batch 5")
    assert status == 2 and len(err.splitlines()) == 1
    assert "--batch 5: 2 processes share it, it has to be a multiple of 2" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--device cuda:0", "--device cuda:0: under torchrun each has its own: cuda"),
        ("--device cuda --compile", "--compile: not with torchrun on GPUs"),
    ],
)
def test_what_several_gpus_cannot_do_is_refused(start, monkeypatch, flags, message):
    monkeypatch.setenv("LOCAL_RANK", "1")  # as torchrun sets it
    status, _, err = start(f"{TINY} {flags}")
    assert status == 2 and len(err.splitlines()) == 1 and message in err


@pytest.mark.parametrize("machines", [1, 2])
def test_the_readmes_torchrun_commands_run(tmp_path, data, machines):
    """As they stand, but for the number of processes: two, on one machine or one on each."""
    lines = (ROOT / "README.md").read_text().splitlines()
    line = [line for line in lines if line.startswith("torchrun ")][machines - 1]
    assert ("--nnodes=2 " in line) == (machines == 2)
    line = line.replace("--nproc_per_node=4", f"--nproc_per_node={2 // machines}")
    line = line.replace("HOST", "127.0.0.1").replace("DIR", str(data))
    line = line.replace("torchrun", "-m torch.distributed.run").replace("dkd.py", f"{ROOT}/dkd.py")
    command = [sys.executable, *line.split(), *SMALL.split(), "--epochs", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    started = [subprocess.Popen(command, **pipes) for _ in range(machines)]
    ends = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * machines, ends
    assert (tmp_path / "runs/dkd-voc-15-1-overlapped-s0/step_5.pt").exists()
