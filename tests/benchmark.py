"""Times and memory: python tests/benchmark.py losses network contrast loader growth

Ours always stands beside something else measured in the same minutes: machines are noisy. On cuda
where there is one, else on the CPU. No test runs this. The loader needs --data DIR, with VOC 2012.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import math
import multiprocessing
import re
import resource
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import dkd
import icd
import ilt
import mib_unbiased as mib
import ucd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable, repeats: int = 3, warm: int = 1) -> float:
    """The fastest of some repeats, after `warm` that do not count."""
    spent = []
    for _ in range(warm + repeats):
        begun = now()
        work()
        spent.append(now() - begun)
    return min(spent[warm:])


class Kept:
    """Counts the bytes that autograd holds for backward at some moment."""

    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def __init__(self) -> None:
        self.boxes: weakref.WeakSet = weakref.WeakSet()

    def pack(self, tensor: Tensor) -> Box:
        box = self.Box(tensor)
        self.boxes.add(box)
        return box

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.tensor)

    def mebibytes(self) -> float:
        storages = {b.tensor.untyped_storage().data_ptr(): b.tensor for b in self.boxes}
        return sum(t.untyped_storage().nbytes() for t in storages.values()) / 2**20


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells: str) -> None:
    row(*cells)
    row(*["---"] * len(cells))


# --------------------------------------------------------------------------------------- losses

# The formulas as a textbook has them, on full-size maps: probabilities of every class, one-hot
# targets. Each takes logits, old logits, labels, the number of old channels.


def one_hot(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    valid = labels != common.IGNORE
    hot = F.one_hot(torch.where(valid, labels, 0), classes).permute(0, 3, 1, 2).float()
    return hot * valid[:, None], valid.sum()


def textbook_mib(z: Tensor, old_z: Tensor, labels: Tensor, old: int) -> Tensor:
    hot, count = one_hot(labels, z.shape[1])
    p = z.softmax(1)
    merged = torch.cat([p[:, :old].sum(1, keepdim=True), p[:, 1:]], 1)
    ce = -(hot * merged.log()).sum() / count
    background = torch.cat([p[:, :1], p[:, old:]], 1).sum(1, keepdim=True)
    kept = torch.cat([background, p[:, 1:old]], 1)
    return ce - (old_z.softmax(1) * kept.log()).sum(1).mean() / old


def textbook_ilt(z: Tensor, old_z: Tensor, labels: Tensor, old: int) -> Tensor:
    hot, count = one_hot(labels, z.shape[1])
    log_p = z.log_softmax(1)
    distance = -(old_z.softmax(1) * log_p[:, :old]).sum(1)
    return -(hot * log_p).sum() / count + (distance * (labels != common.IGNORE)).sum() / count


def textbook_dkd(z: Tensor, old_z: Tensor, labels: Tensor, old: int) -> Tensor:
    hot, count = one_hot(labels, z.shape[1])
    target, p = hot[:, old:], z.sigmoid()
    bce = -(target * p[:, old:].log() + (1 - target) * (1 - p[:, old:]).log()).sum(1)
    q, p_old = old_z[:, 1:].sigmoid(), p[:, 1:old]
    distance = -(q * p_old.log() + (1 - q) * (1 - p_old).log()).sum(1).mean()
    auxiliary = -(1 - p[:, 0]).log().mean()
    return (bce * (labels != common.IGNORE)).sum() / count + distance + auxiliary


def textbook_plop(z: Tensor, old_z: Tensor, labels: Tensor, old: int) -> Tensor:
    p = old_z.softmax(1)
    entropy = -(p * p.log()).sum(1) / math.log(old)
    sure, background = entropy < 0.9, labels == common.BACKGROUND
    known = torch.where(background, torch.where(sure, p.argmax(1), common.IGNORE), labels)
    share = (background & sure).sum((1, 2)) / background.sum((1, 2)).clamp(min=1)
    hot, _ = one_hot(known, z.shape[1])
    return (-(hot * z.log_softmax(1)).sum(1) * share[:, None, None]).mean()


# The scripts' own functions. They take the run and logits of the network's size.


def dense_mib(run: common.Run, z: Tensor, old_z: Tensor, labels: Tensor, old: int) -> Tensor:
    valid = labels != common.IGNORE
    return run.dense(mib.unbiased_losses, z, labels, old_z, 1.0, valid=(valid, None)).sum()


def dense_ilt(run: common.Run, z: Tensor, old_z: Tensor, labels: Tensor, old: int) -> Tensor:
    valid = labels != common.IGNORE
    ce = run.dense(ilt.cross_entropy, z, labels, valid=valid)
    return ce + run.dense(ilt.output_distillation, z, old_z, labels, valid=valid)


def dense_dkd(run: common.Run, z: Tensor, old_z: Tensor, labels: Tensor, old: int) -> Tensor:
    target, valid = (labels, old, 1.0, common.IGNORE), labels != common.IGNORE
    bce = run.dense(dkd.mbce, z[:, old:], *target, valid=valid)
    distance = run.dense(dkd.kd, z[:, 1:old], old_z[:, 1:])
    return bce + distance + run.dense(dkd.auxiliary_loss, z[:, :1])


def dense_plop(run: common.Run, z: Tensor, old_z: Tensor, labels: Tensor, old: int) -> Tensor:
    thresholds = torch.full((old,), 0.9, device=z.device)
    targets = common.in_strips(ucd.pseudo_labels, len(labels[0]), old_z, labels, thresholds)
    share = ucd.sure_share(labels, targets)
    return run.dense(ucd.adaptive_cross_entropy, z, targets, share)


def run_for_dense(size: int) -> common.Run:
    """A run on shapes, for its `dense` at this size."""
    sys.argv = [dkd.__file__, "--dataset", "shapes", "--crop", str(size)]
    typed = common.parse(dkd.flags())
    return common.Run(typed, dkd.predict, "")


def losses(args: argparse.Namespace) -> None:
    """Each method's losses of full-size logits, upsampling included, beside the textbook's."""
    print(
        f"\nLosses, forward and backward, {args.size} x {args.size}, batch {args.batch}, {DEVICE}, "
        f"{torch.get_num_threads()} threads"
    )
    names = "textbook, MiB kept", "ours, MiB kept", "of it"
    header("method", "classes", "textbook, s", "ours, s", "times as fast", *names)
    for classes, old in ((21, 16), (151, 101)):
        for case in (
            ("mib_unbiased, ucd, icd on MiB", textbook_mib, dense_mib),
            ("ilt", textbook_ilt, dense_ilt),
            ("dkd", textbook_dkd, dense_dkd),
            ("ucd, icd on PLOP", textbook_plop, dense_plop),
        ):
            row(case[0], classes, *compare(*case[1:], classes, old, args))


def compare(textbook: Callable, dense: Callable, classes: int, old: int, args) -> list[str]:
    torch.manual_seed(0)
    side, shape = args.size // 16, (args.batch, args.size, args.size)
    new, before = (torch.randn(args.batch, n, side, side, device=DEVICE) for n in (classes, old))
    labels = torch.randint(0, classes, shape, device=DEVICE)
    labels = torch.where(labels < old, 0, labels)
    labels[:, :8] = common.IGNORE
    run = run_for_dense(args.size)

    def theirs(small: Tensor) -> Tensor:
        return textbook(*(common.upsample(z, shape[1:]) for z in (small, before)), labels, old)

    def ours(small: Tensor) -> Tensor:
        return dense(run, small, before, labels, old)

    found, times = [], [math.inf, math.inf]
    for work in (theirs, ours):
        small, kept = new.clone().requires_grad_(), Kept()
        with kept.hooks():
            loss = work(small)
        held = kept.mebibytes()
        loss.backward()
        found.append((loss.item(), small.grad, held))
    for _ in range(args.repeats):  # one after the other: the machine may be busier for a while
        for k, work in enumerate((theirs, ours)):
            small = new.clone().requires_grad_()
            times[k] = min(times[k], seconds(lambda w=work, z=small: w(z).backward(), 1, warm=0))
    (slow, fast), ((loss, gradient, much), (value, other, little)) = times, found
    assert abs(loss - value) < 1e-5 * abs(loss)
    # looser: a pixel whose entropy lies at PLOP's threshold may fall to the other side
    assert (gradient - other).norm() < 1e-3 * gradient.norm()
    assert little < much / 10
    spent = f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.1f}"
    return [*spent, f"{much:.0f}", f"{little:.1f}", f"1/{much / little:.0f}"]


# -------------------------------------------------------------------------------------- network

METHODS = {  # the table's names: script, flags
    "dkd": (dkd, ""),
    "mib_unbiased": (mib, ""),
    "ilt": (ilt, "--no-freeze-encoder"),
    "ucd": (ucd, ""),
    "ucd, PLOP": (ucd, "--base plop"),
    "icd": (icd, ""),
}
STAGES = {  # one change after the other: flags, memory format
    "float32": ("--precision fp32", torch.contiguous_format),  # without TF32
    "+ channels last": ("--precision fp32", torch.channels_last),
    "+ bf16": ("--precision bf16", torch.channels_last),
    "+ --compile": ("--precision bf16 --compile", torch.channels_last),
    "+ bf16, cudnn.benchmark": ("--precision bf16", torch.channels_last),
}


class Enough(Exception):
    """The measurement is done."""


def network(args: argparse.Namespace) -> None:
    """Whole iterations of the scripts' own loops, on one random batch: step 0, and a later one."""
    print(
        f"\nTraining, {args.backbone}, {args.size} x {args.size}, batch {args.batch}, {DEVICE}: "
        f"{args.iterations} iterations after 5; dense losses: those of full-size logits"
    )
    cells = "step 0, images/s", "later, images/s", "dense losses, %", "optimiser, %", "peak GiB"
    header("method", "classes", "", *cells)
    last = "+ bf16" if DEVICE == "cuda" else "+ channels last"
    rows = [("mib_unbiased", 21, stage) for stage in STAGES]
    rows += [(method, classes, last) for method in METHODS for classes in (21, 151)]
    for method, classes, stage in rows:
        if re.search(args.rows, f"{method} {classes} {stage}"):
            torch.backends.cudnn.benchmark = "cudnn.benchmark" in stage
            row(method, classes, stage, *train(method, *STAGES[stage], classes, args))


def train(method: str, flags: str, layout: torch.memory_format, classes: int, args) -> list[str]:
    script, own = METHODS[method]
    data = {21: "--dataset voc --task 15-5", 151: "--dataset ade --task 100-50"}[classes]
    shape = f"--backbone {args.backbone} --weights none --crop {args.size} --batch {args.batch}"
    warm, counted, rates = 5, args.iterations, []
    total = warm + 2 * counted  # of them, the last `counted` with more clocks, which cost time
    spent = dict.fromkeys(("dense", "optimiser", "all"), 0.0)
    batches, dense, in_strips = common.Run.batches, common.Run.dense, common.in_strips
    build = common.build_model

    def list_samples(*_: object) -> common.Source:
        return common.Source([(0, 0)] * args.batch * total, [(0, 0)], "random")

    def load_batches(view: common.View, keys: Iterator, typed: argparse.Namespace) -> Iterator:
        step = common.task_steps(typed.task, classes - 1)[view.seed[1]]
        torch.manual_seed(0)
        images = torch.randn(args.batch, 3, args.size, args.size, device=DEVICE)
        labels = torch.randint(step.first, step.last + 1, (args.batch, 16, 16)).double()
        labels[:, ::2] = common.BACKGROUND
        labels = F.interpolate(labels[None], (args.size, args.size))[0].long().to(DEVICE)
        for _ in keys:
            yield images.contiguous(memory_format=layout), labels

    def timed(part: str, work: Callable) -> Callable:
        def run(*given: object, **named: object) -> object:
            begun = now()
            result = work(*given, **named)
            spent[part] += now() - begun
            return result

        return run

    def timed_batches(run, step, model, optimizer, *given, **named) -> Iterator:
        todo = batches(run, step, model, optimizer, *given, **named)
        for _ in range(warm):
            yield next(todo)
        begun = now()
        yield from itertools.islice(todo, counted)
        rates.append(counted * args.batch / (now() - begun))
        with (
            mock.patch.object(common.Run, "dense", timed("dense", dense)),
            mock.patch.object(common, "in_strips", timed("dense", in_strips)),
            mock.patch.object(optimizer, "step", timed("optimiser", optimizer.step)),
        ):
            spent.update(dict.fromkeys(spent, 0.0))
            profiler = torch.profiler.profile() if args.profile else contextlib.nullcontext()
            begun = now()
            with profiler:
                yield from todo
            spent["all"] = now() - begun
        if args.profile:  # standard output is silent here
            table = profiler.key_averages().table(f"self_{DEVICE}_time_total", row_limit=25)
            print(table, file=sys.stderr)
        if step.index == 1:
            raise Enough

    def conclude(run: common.Run, step: common.Step, model: torch.nn.Module, *_: object) -> None:
        torch.save({"model": model.state_dict()}, run.folder / f"step_{step.index}.pt")

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(
            common,
            list_samples=list_samples,
            classes_in_image=lambda samples, _: [[*range(1, classes)]] * len(samples),
            load_batches=load_batches,
            build_model=lambda *given: build(*given).to(memory_format=layout),
        ),
        mock.patch.multiple(common.Run, batches=timed_batches, conclude=conclude, say=silent),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(Enough),
    ):
        main_of(
            script, f"{data} {shape} {own} {flags} --keep-later --epochs 1 --lr 0 --out {folder}"
        )
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if DEVICE == "cuda" else "-"
    shares = (f"{100 * spent[part] / spent['all']:.0f}" for part in ("dense", "optimiser"))
    return [*(f"{rate:.1f}" for rate in rates), *shares, peak]


def silent(*_: object) -> None:
    """In the place of Run.say."""


def main_of(script: ModuleType, flags: str) -> None:
    """A script's own loop."""
    with mock.patch.object(sys, "argv", [script.__file__, *flags.split()]):
        typed = common.parse(script.flags())
        script.main(typed)


# ------------------------------------------------------------------------------------- contrast


def straightforward(features, old_features, labels, old_logits, temperature=0.07) -> Tensor:
    """ucd.contrastive_distillation with all pairs at once, every pixel unlabelled foreground."""
    flat = [maps.permute(0, 2, 3, 1).flatten(0, 2) for maps in (features, old_features, old_logits)]
    anchors, p = F.normalize(flat[0], dim=1), flat[2].softmax(1)
    keys = torch.cat([anchors, F.normalize(flat[1], dim=1)]).detach()
    predicted = flat[2].argmax(1)
    same = predicted[:, None] == predicted.repeat(2)
    weight = p @ p.repeat(2, 1).T
    similar = (anchors @ keys.T / temperature).exp()
    negative = (similar * ~same).sum(1, keepdim=True)
    loss = -(similar / (similar + negative)).log() * weight
    positive = same & ~torch.eye(len(anchors), 2 * len(anchors), dtype=torch.bool, device=DEVICE)
    count = positive.sum(1)
    return ((loss * positive).sum(1) / count.clamp(min=1)).sum() / (count > 0).sum()


def measure_contrast(form: str, anchors: int) -> tuple[float, float, float]:
    """Value, seconds, and how much the process grows in MiB."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = (1, 256, 32, anchors // 32)
    features, old_features = (torch.randn(shape, device=DEVICE) for _ in range(2))
    old_logits = torch.randn(1, 21, *shape[2:], device=DEVICE)
    old_logits[:, 0] = -100  # all are foreground
    labels = torch.zeros(1, *shape[2:], dtype=torch.int64, device=DEVICE)
    paper = functools.partial(ucd.contrastive_distillation, published_shift=False)
    work = {"ours": paper, "straightforward": straightforward}[form]
    work(features[..., :1], old_features[..., :1], labels[..., :1], old_logits[..., :1])

    def peak() -> float:
        if DEVICE == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    before, begun = peak(), time.perf_counter()
    loss = work(features.requires_grad_(), old_features, labels, old_logits)
    loss.backward()
    return loss.item(), time.perf_counter() - begun, peak() - before


def contrast(args: argparse.Namespace) -> None:
    """UCD's contrast against the number of anchors; as many old features, 256 channels."""
    print(f"\nContrastive distillation, forward and backward, float32, {DEVICE}, one thread")
    header("anchors", "straightforward, s", "MiB", "ours, s", "MiB")
    context = multiprocessing.get_context("spawn")
    for anchors in (1024, 2048, 4096, 8192, 16384, 24576):
        cells, values = [], []
        for form in ("straightforward", "ours"):
            if form == "straightforward" and anchors > args.most:
                cells += ["-", "-"]
                continue
            with ProcessPoolExecutor(1, context) as fresh:  # a process of its own has a peak too
                value, spent, peak = fresh.submit(measure_contrast, form, anchors).result()
            values.append(value)
            cells += [f"{spent:.2f}", f"{peak:.0f}"]
        assert max(values) - min(values) < 1e-4 * max(values)
        row(anchors, *cells)


# --------------------------------------------------------------------------------------- loader


def whole_then_crop(sample: tuple, crop: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The usual loader: the whole picture scaled by 0.5-2, cropped, normalised, float."""
    picture, mask = (Image.open(path) for path in sample)
    scale = max(rng.uniform(0.5, 2), crop / min(picture.size))
    size = [max(crop, round(side * scale)) for side in picture.size]
    picture = picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    mask = mask.resize(size, Image.Resampling.NEAREST)
    left, top = (int(rng.integers(0, side - crop + 1)) for side in size)
    box = (left, top, left + crop, top + crop)
    pixels = torch.from_numpy(np.array(picture.crop(box))).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (common.MEAN, common.STD))
    return (pixels - mean) / std, torch.from_numpy(np.array(mask.crop(box))).long()


def loader(args: argparse.Namespace) -> None:
    """Images per second of one process on real pictures."""
    source = common.list_samples("voc", args.data)
    samples = source.train[: args.pictures]
    view = common.View(samples, np.arange(256, dtype=np.uint8), args.size, seed=(0, 0))
    rng = np.random.default_rng(0)
    torch.set_num_threads(1)

    def usual() -> None:
        for sample in samples:
            whole_then_crop(sample, args.size, rng)

    def ours() -> None:
        for i in range(len(samples)):
            view[0, i]

    print(f"\nLoader, {len(samples)} pictures of {source.where}, crop {args.size}, one process")
    header("resize all, crop, float: images/s", "ours: images/s", "times as fast")
    slow, fast = (seconds(work, args.repeats) for work in (usual, ours))
    row(f"{len(samples) / slow:.0f}", f"{len(samples) / fast:.0f}", f"{slow / fast:.2f}")


# --------------------------------------------------------------------------------------- growth


def growth(args: argparse.Namespace) -> None:
    """MiB's iteration of a later step against classes, steps, size and batch, one at a time."""
    print(f"\nGrowth: MiB's iteration with the trunk of shapes, {DEVICE}, one thread")
    header("classes", "steps", "size", "batch", "s per iteration", "s per image", "MiB kept")
    torch.set_num_threads(1)
    cases = [([15, n - 15], 128, 2) for n in (20, 50, 100, 150)]
    cases += [([100, *[50 // n] * n], 128, 2) for n in (1, 5, 10, 50)]
    cases += [([15, 5], size, 2) for size in (256, 512, 768)]
    cases += [([15, 5], 128, batch) for batch in (4, 8, 16)]
    for classes, size, batch in cases:
        spent, kept = iteration(classes, size, batch, args.repeats)
        where = sum(classes) + 1, len(classes), size, batch
        row(*where, f"{spent:.3f}", f"{spent / batch:.3f}", f"{kept:.0f}")


def iteration(classes: list[int], size: int, batch: int, repeats: int) -> tuple[float, float]:
    """Seconds, and what is kept for backward in MiB."""
    torch.manual_seed(0)
    old_model = common.DeepLabV3("small", 8, classes[:-1], 0.0).to(DEVICE).eval()
    model = common.DeepLabV3("small", 8, classes, 0.0).to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    old = sum(classes[:-1]) + 1
    labels = torch.randint(old, sum(classes) + 1, (batch, size, size), device=DEVICE)
    run, kept = run_for_dense(size), Kept()

    def forward() -> Tensor:
        logits, _ = model(images)
        with torch.no_grad():
            old_logits, _ = old_model(images)
        return dense_mib(run, logits, old_logits, labels, old)

    def whole() -> None:
        loss = forward()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with kept.hooks():
        loss = forward()
    held = kept.mebibytes()
    loss.backward()
    return seconds(whole, repeats), held


if __name__ == "__main__":
    tables = {table.__name__: table for table in (losses, network, contrast, loader, growth)}
    flags = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flags.add_argument("tables", nargs="+", choices=tables)
    flags.add_argument("--size", type=int, default=512, help="side of the pictures (512)")
    flags.add_argument("--batch", type=int, default=2, help="of losses and network (2)")
    flags.add_argument(
        "--backbone", choices=common.BACKBONES, default="resnet101", help="(resnet101)"
    )
    flags.add_argument("--iterations", type=int, default=10, help="of the network, twice (10)")
    flags.add_argument("--rows", default="", help="of the network: those that match this (all)")
    flags.add_argument("--profile", action="store_true", help="of the network: top 25 operations")
    flags.add_argument("--repeats", type=int, default=2, help="the fastest counts (2)")
    most = "anchors up to which all pairs at once are tried (8192)"
    flags.add_argument("--most", type=int, default=8192, help=most)
    flags.add_argument("--data", default="data", help="of the loader (data)")
    flags.add_argument("--pictures", type=int, default=100, help="of the loader (100)")
    given = flags.parse_args()
    for name in given.tables:
        tables[name](given)
