"""ICD, reconstructed: internal-external constrained distillation for continual segmentation.

Yan, Liu, Zhang, Zhu, Sun, Zhang: An Internal-External Constrained Distillation Framework for
Continual Semantic Segmentation. PRCV 2023, LNCS 14427. Only the abstract is public, no code, no
equation, no number: all that is below is our reconstruction, and no result of this file is theirs.

From the abstract: features of one level of the old and the new model are compared through their
statistics (internal), and multi-scale convolutional attention captures the relations between
features of different scales, which are kept as well (external).

    python icd.py --task 15-1 --dataset shapes              drawn pictures, minutes on a CPU
    python icd.py --task 15-1 --data DIR                    Pascal VOC 2012
    python icd.py --task 15-1 --data DIR --base mib

| what                                                | here                             |
|-----------------------------------------------------|----------------------------------|
| L = base + gamma (weighted internal + external)     | main                             |
| internal: means and deviations over each axis       | statistics, internal_distillation|
| external: attention over scales, then matching      | ExternalDistillation             |
| multi-scale convolutional attention (SegNeXt)       | MultiScaleAttention              |
| matching at four sizes (knowledge review)           | hierarchical_distance            |
| base: PLOP's pseudo-labels, or MiB                  | pseudo_labels, unbiased_...      |
| alternative: PLOP's Local POD                       | local_pod                        |

    --no-internal --no-external                 pseudo-labels alone
    --no-external --statistics pod              PLOP
    --no-external                               internal alone
    --no-internal                               external alone
    --statistics means | deviations             half of the statistics
    --levels 3 4 5                              the deep levels

What is open, how sure we are, and where a reader of the full paper would change it:
 a. Two terms, statistics and attention: sure, the abstract.
 b. The attention is SegNeXt's (kernels 5, 7, 11, 21): likely, by its name. MultiScaleAttention.
 c. Statistics are means and deviations over width, height and channels: possible. statistics.
 d. Levels: the four stages before their last ReLU, the classifiers' input. --levels, levels_of.
 e. Fusion from the top down, as in knowledge review: open. ExternalDistillation.fuse.
 f. The attention's parameters: open. Random and frozen: a constant would please the distillation.
 g. Base: PLOP's pseudo-labels are likely. --base.
 h. Weights 10 and 1 (ADE20K 3 and 0.3; shapes 0.1 and 0.01, chosen on held-out training images),
    gamma = sqrt(all / new channels) as PLOP's: open. --internal-weight, --external-weight, main.

Measured: data/RESULTS.md, on shapes and on photographs of VOC 2012. Not run yet: full VOC 2012
and ADE20K with ResNet-101. PLOP's twelve iterations are those of its authors' trainer to 1e-8 here,
too (tests/test_trajectories.py).

Differences between the published codes that this borrows from (c) and this file:
 1. PLOP's thresholds, maps, weights of images and step 0: as c; see differences 12-16 of ucd.py.
    --thresholds median are the medians of PLOP's paper. Pseudo-labels alone on shapes,
    15-1, all, three seeds: 71.9 with the thresholds of the code, 60.8 with medians.
 2. PLOP's cells on maps that are not square. c: measured by the width. Here by the shorter side.
 3. Network, BatchNorm after step 0, precision, epochs of VOC's 10-1: as in differences 18 and 20 to
    22 of ucd.py. The schedule is MiB's and PLOP's; msrc, folder and shapes are ours, rates as in
    mib_unbiased.py.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import BACKGROUND, IGNORE

# The schedule of MiB and PLOP; the weights are ours (h). Two values: step 0, later steps.
RECIPE = {
    "voc": {
        "epochs": [30],
        "batch": 24,
        "lr": [1e-2, 1e-3],
        "crop": 512,
        "backbone": "resnet101",
        "weights": "imagenet",
        "output_stride": 16,
        "dilate_first": True,
        "dropout": 0.0,
        "bn_momentum": 0.1,
        "warmup": 0.0,
        "ignore": ["void"],
        "internal_weight": 10.0,
        "external_weight": 1.0,
        "pod": 0.01,
        "pod_logits": 0.0005,
    }
}
RECIPE["ade"] = RECIPE["voc"] | {
    "epochs": [60],
    "internal_weight": 3.0,
    "external_weight": 0.3,
    "pod": 0.001,
    "pod_logits": 0.00001,
}
RECIPE["msrc"] = RECIPE["voc"] | {"batch": 8, "crop": 256, "ignore": ["void", "later"]}
RECIPE["folder"] = RECIPE["msrc"] | {"epochs": [60], "backbone": "mobilenet_v2", "ignore": ["void"]}
RECIPE["shapes"] = RECIPE["voc"] | {
    "epochs": [15],
    "batch": 8,
    "lr": [0.1, 0.01],
    "crop": 64,
    "backbone": "small",
    "weights": "none",
    "output_stride": 8,
    "dilate_first": False,
    "internal_weight": 0.1,  # of 10, 1, 0.3, 0.1 the best on held-out training images
    "external_weight": 0.01,  # of 1, 0.3, 0.1, 0.03, 0.01 likewise
    "pod": 0.0003,  # likewise, in ucd.py
    "pod_logits": 1.5e-5,
}
WEIGHT_DECAY = 1e-4  # of all parameters: MiB's code
LEVELS = (1, 2, 3, 4, 5)


def levels_of(maps: dict, levels: list[int]) -> list[Tensor]:
    """Some of five levels, float32: stages 1-4 before their last ReLU, the classifiers' input."""
    five = (*maps["before_relu"], maps["head"])
    return [five[level - 1].float() for level in levels]


def statistics(maps: Tensor, which: str = "both") -> list[Tensor]:
    """Means and deviations over width, height and channels, each [B, n].

    maps        float [B, D, h, w]
    which       "both", "means" or "deviations"; six or three are returned
    """
    found = []
    for axis in (3, 2, 1):
        variance, mean = torch.var_mean(maps, axis, correction=0)
        if which != "deviations":
            found.append(mean.flatten(1))
        if which != "means":
            found.append((variance + 1e-6).sqrt().flatten(1))  # finite gradient at 0
    return found


def internal_distillation(
    features: list[Tensor], old_features: list[Tensor], which: str = "both"
) -> Tensor:
    """Distance of the statistics, each scaled to length 1: mean over statistics, levels and images.

    features, old_features      lists of float [B, D, h, w]
    returns                     scalar, 0 ... 4; a map and its double are the same to it
    """
    terms = [
        (F.normalize(x, dim=1, eps=1e-12) - F.normalize(y, dim=1, eps=1e-12)).square().sum(1).mean()
        for new, old in zip(features, old_features, strict=True)
        for x, y in zip(statistics(new, which), statistics(old, which), strict=True)
    ]
    return torch.stack(terms).mean()


class MultiScaleAttention(nn.Module):
    """SegNeXt's attention gate (Guo et al., arXiv 2209.08575): depthwise strips, then a 1x1 mix."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def depthwise(height: int, width: int) -> nn.Conv2d:
            padding = (height // 2, width // 2)
            return nn.Conv2d(channels, channels, (height, width), padding=padding, groups=channels)

        self.near = depthwise(5, 5)
        strips = (nn.Sequential(depthwise(1, k), depthwise(k, 1)) for k in (7, 11, 21))
        self.strips = nn.ModuleList(strips)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        near = self.near(maps)
        return self.mix(near + sum(strip(near) for strip in self.strips)) * maps


def hierarchical_distance(maps: Tensor, old_maps: Tensor) -> Tensor:
    """Squared distance of two maps and of their 4x4, 2x2 and 1x1 means (Chen et al., arXiv
    2104.09044), weighed 1, 1/2, 1/4, 1/8 and divided by the weights' sum."""
    total, weights = (maps - old_maps).square().mean(), 1.0
    for size, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
        pooled = (F.adaptive_avg_pool2d(m, size) for m in (maps, old_maps))
        total, weights = total + weight * F.mse_loss(*pooled), weights + weight
    return total / weights


class ExternalDistillation(nn.Module):
    """Distance of what the attention makes of all levels together.

    Each level is projected to `width` channels at the side of level 3 (the middle one), then from
    the top down joined with the levels above it, gated, and scaled to a root mean square of 1.

    channels    of each level
    seed        of the random parameters: the same in every step
    """

    def __init__(self, channels: list[int], width: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.width = width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.project = nn.ModuleList(nn.Conv2d(c, width, 1, bias=False) for c in channels)
            gates = (MultiScaleAttention(2 * width) for _ in channels[1:])
            self.gates = nn.ModuleList(gates)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    fan_in = module.weight[0].numel()
                    nn.init.normal_(module.weight, std=fan_in**-0.5)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            for module in self.project:
                nn.init.orthogonal_(module.weight)

    def fuse(self, maps: list[Tensor]) -> list[Tensor]:
        """[B, width, h, w] per level but the top one: each holds all levels from it upwards."""
        size, projected = maps[len(maps) // 2].shape[2:], []
        for x, project in zip(maps, self.project, strict=True):
            x = F.adaptive_avg_pool2d(project(x), size)
            projected.append(F.normalize(x, dim=1) * self.width**0.5)
        above, fused = projected.pop(), []
        for x, gate in zip(projected[::-1], self.gates, strict=True):
            a, b = gate(torch.cat([x, above], 1)).chunk(2, 1)
            above = a + b
            square = above.square().mean((1, 2, 3), keepdim=True)
            above = above * (square + 1e-12).rsqrt()
            fused.append(above)
        return fused[::-1]

    def forward(self, features: list[Tensor], old_features: list[Tensor]) -> Tensor:
        """Scalar: mean over the fused levels of the hierarchical distance."""
        with torch.no_grad():
            old = self.fuse(old_features)
        pairs = zip(self.fuse(features), old, strict=True)
        return torch.stack([hierarchical_distance(x, y) for x, y in pairs]).mean()


def local_pod(features: Tensor, old_features: Tensor) -> Tensor:
    """PLOP: the distance of the means over rows and columns, in the map and its 4 and 16 cells.

    features, old_features      float [B, D, h, w]; squared first
    returns                     scalar: mean over images of the L2 norm, gradient 0 at 0
    """

    def means(maps: Tensor) -> Tensor:
        maps, found = maps.square(), []
        for cells in (1, 2, 4):
            side = min(maps.shape[2:]) // cells  # the shorter side; the code: the width
            cut = maps[:, :, : side * cells, : side * cells].unflatten(2, (cells, side))
            cut = cut.unflatten(4, (cells, side))  # [B, D, cells, side, cells, side]
            found += [cut.mean(5).flatten(1), cut.mean(3).flatten(1)]
        return torch.cat(found, 1)

    return torch.linalg.vector_norm(means(features) - means(old_features), dim=1).mean()


def pod(
    maps: list[Tensor], old_maps: list[Tensor], factors: list[float], channels: int, new: int
) -> Tensor:
    """PLOP: Local POD of several maps, weighed by how few of the classes are new.

    maps, old_maps  [B, D, h, w] each, the last one the logits [B, C, h, w], in which the new
                    classes are added to background
    factors         of the maps
    channels, new   of the model; classes that are new in this step
    returns         scalar: mean over the maps
    """
    *features, logits = maps
    old = old_maps[-1].shape[1]
    background = logits[:, :1] + logits[:, old:].sum(1, keepdim=True)
    merged = [*features, torch.cat([background, logits[:, 1:old]], 1)]
    terms = [f * local_pod(x, y) for f, x, y in zip(factors, merged, old_maps, strict=True)]
    return math.sqrt(channels / new) * torch.stack(terms).mean()


def entropy(logits: Tensor) -> Tensor:
    """Of the softmax, 0 ... 1: [B, H, W]."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1) / math.log(max(2, logits.shape[1]))


def pseudo_labels(old_logits: Tensor, labels: Tensor, thresholds: Tensor) -> Tensor:
    """PLOP: background takes the old model's prediction where that is sure, else it is ignored.

    old_logits  float [B, O, H, W]
    labels      int64 [B, H, W], 0 = background
    thresholds  float [O]: sure is an entropy below that of the predicted class
    returns     int64 [B, H, W]
    """
    background, predicted = labels == BACKGROUND, old_logits.max(1).indices  # faster than argmax
    sure = background & (entropy(old_logits) < thresholds[predicted])
    return torch.where(background, torch.where(sure, predicted, IGNORE), labels)


def sure_share(labels: Tensor, pseudo: Tensor) -> Tensor:
    """PLOP: the part of each image's background that has got a pseudo-label [B]; none there: 0."""
    background = labels == BACKGROUND
    sure = background & (pseudo != IGNORE)
    return sure.sum((1, 2)) / (background.sum((1, 2)) + 1e-6)


def adaptive_cross_entropy(logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
    """PLOP: cross-entropy, each image weighed by the share of its background that is sure.

    logits      float [B, C, H, W]
    labels      int64 [B, H, W], 255 = ignored
    share       float [B]
    returns     scalar: mean over all pixels, ignored ones too, nats
    """
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return (loss * share[:, None, None]).mean()


def median(counts: Tensor) -> float:
    """Of a histogram of 0 ... 1 with equal bins: the middle of the bin that holds it."""
    half = counts.sum() / 2
    return ((counts.cumsum(0) >= half).int().argmax().item() + 0.5) / len(counts)


def published_median(counts: Tensor) -> float:
    """The same as PLOP's code has it: the sum below a bin is one of indices, not of counts.

    It is right in the first two bins. Behind them it is too low, too high, or infinite.
    """
    half, below = counts.sum() / 2, 0
    for i, count in enumerate(counts):
        if below <= half <= below + count:
            break
        below += i
    return ((i + (half - below) / count) / len(counts)).item()


@torch.no_grad()
def find_thresholds(run: common.Run, step: common.Step, old_model: nn.Module) -> Tensor:
    """PLOP: the median entropy of the pixels of each predicted class, on the step's background.

    returns     float [O], on the scale of `entropy`. It is at least 0.001 on the scale of the
                histogram, which in PLOP's code is the entropy divided by the logarithm of all
                channels and by the number of the old ones. A class without a pixel has the least
    """
    published = run.args.thresholds == "published"
    bins = 100 if published else 1000
    unit = step.first * math.log(step.channels) if published else 1.0
    histogram = torch.zeros(step.first, bins, dtype=torch.int64, device=run.args.device)
    view, indices = run.data.training(step)
    one_epoch = max(1, len(indices) // run.args.batch)
    keys = common.epoch_keys(indices, run.args.batch, view.seed, 0, one_epoch)

    def place(logits: Tensor) -> Tensor:
        """Of each pixel in the histogram."""
        column = (entropy(logits) / unit * bins).long().clamp(max=bins - 1)
        return logits.max(1).indices * bins + column

    for images, labels in common.load_batches(view, keys, run.args):
        places = common.in_strips(place, run.args.crop, old_model(images)[0])
        found = places[labels == BACKGROUND].bincount(minlength=histogram.numel())
        histogram += found.view_as(histogram)
    find = published_median if published else median
    found = [max(find(counts), 0.001) if counts.any() else 0.001 for counts in histogram.cpu()]
    return unit * torch.tensor(found, device=run.args.device)


def log_masses(logits: Tensor, old: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The logarithms of sums of e^logit, out of which both unbiased losses are made.

    logits      float [B, C, H, W], background first
    old         number of old channels, background included
    returns     background's logit, sum over the old classes, over the new ones, each [B, H, W];
                and the old classes' logits [B, old - 1, H, W]
    """
    z_0, z_old, z_new = logits.split([1, old - 1, logits.shape[1] - old], 1)
    return z_0[:, 0], z_old.logsumexp(1), z_new.logsumexp(1), z_old


def unbiased_cross_entropy(
    logits: Tensor, labels: Tensor, old: int, keep: bool = False, masses: tuple | None = None
) -> Tensor:
    """MiB: cross-entropy in which "background" means background or any old class.

    logits      float [B, C, H, W], background first
    labels      int64 [B, H, W], 255 = ignored
    old         number of old channels, background included; 1 gives plain cross-entropy
    keep        labels of old classes, where they are shown, stay targets; without it they count
                as background, as in the authors' code
    masses      log_masses(logits, old), where it is there already
    returns     scalar: mean over valid pixels, nats; no valid pixel: 0 with a gradient
    """
    z_0, log_old, log_new, _ = masses or log_masses(logits, old)
    background = torch.logaddexp(z_0, log_old)
    total = torch.logaddexp(background, log_new)
    valid = labels != IGNORE
    own = logits.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
    merged = labels == BACKGROUND if keep else labels < old
    loss = total - torch.where(merged, background, own)
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def unbiased_distillation(
    logits: Tensor, old_logits: Tensor, masses: tuple | None = None
) -> Tensor:
    """MiB: distillation in which the old "background" is background or any new class.

    logits      float [B, C, H, W]
    old_logits  float [B, O, H, W], of the frozen model
    masses      log_masses(logits, O), where it is there already
    returns     scalar: mean over all pixels, divided by O, nats
    """
    old, p = old_logits.shape[1], old_logits.softmax(1)
    z_0, log_old, log_new, z_old = masses or log_masses(logits, old)
    background = torch.logaddexp(z_0, log_new)
    total = torch.logaddexp(background, log_old)
    kept = p[:, 0] * background + (p[:, 1:] * z_old).sum(1)
    return (total - kept).mean() / old  # the p sum to 1


def unbiased_losses(logits: Tensor, labels: Tensor, old_logits: Tensor, weight: float) -> Tensor:
    """MiB: cross-entropy and `weight` times distillation, from one set of masses: [2].

    Labels of old classes stay; cross-entropy is the mean over all pixels, ignored ones too.
    """
    old = old_logits.shape[1]
    masses = log_masses(logits, old)
    share = (labels != IGNORE).to(logits).mean()  # of the valid pixels
    ce = share * unbiased_cross_entropy(logits, labels, old, True, masses)
    kd = unbiased_distillation(logits, old_logits, masses)
    return torch.stack([ce, weight * kd])


@torch.no_grad()
def initialise(model: common.DeepLabV3) -> None:
    """The new classifiers share the background's probability with it, equally (MiB)."""
    background, new = model.classifiers[0], model.classifiers[-1]
    background.bias -= math.log(len(new.bias) + 1)
    new.weight.copy_(background.weight.expand_as(new.weight))
    new.bias.copy_(background.bias.expand_as(new.bias))


def make_external(run: common.Run, model: common.DeepLabV3) -> ExternalDistillation:
    """The external term, for the maps that `model`, in eval mode, gives; frozen."""
    with torch.no_grad():
        probe = torch.zeros(1, 3, 64, 64, device=run.args.device)
        maps = levels_of(model(probe)[1], run.args.levels)
    external = ExternalDistillation([m.shape[1] for m in maps], seed=run.args.seed)
    return external.requires_grad_(False).to(run.args.device)


def sgd(model: common.DeepLabV3, lr: float, args: argparse.Namespace) -> torch.optim.SGD:
    """One rate and weight decay for all; --head-lr raises what is not trunk."""
    head = [p for name, p in model.named_parameters() if not name.startswith("trunk.")]
    groups = [
        {"params": model.trunk.parameters(), "lr": lr},
        {"params": head, "lr": args.head_lr * lr},
    ]
    return torch.optim.SGD(
        groups, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY, fused=args.device != "cpu"
    )


def main(args: argparse.Namespace) -> None:
    if sorted({*args.levels}) != args.levels or not {*args.levels} <= {*LEVELS}:
        raise common.InputError(f"--levels {args.levels}: some of 1 2 3 4 5, in this order")
    if args.external and len(args.levels) < 2:
        raise common.InputError("--levels: the external term relates two levels or more")
    print("ICD, reconstructed from its abstract: no result of this run is the authors'")
    run = common.Run(args, common.most_likely, "")
    for step in run.steps():
        old_model, model = run.models(step)
        first = old_model is None
        model.train()
        plop = args.base == "plop"
        if not first:
            initialise(model)
            thresholds = find_thresholds(run, step, old_model) if plop else None
            external = make_external(run, old_model) if args.external else None
        gamma = math.sqrt(step.channels / len(step.new))
        if args.freeze_batchnorm and not first:
            common.freeze_batchnorm(model)
        optimizer = sgd(model, common.per_step(args.lr, step), args)
        net = run.parallel(model)
        for images, labels in run.batches(step, model, optimizer):
            logits, maps = net(images)
            targets, share, losses = labels, torch.ones(len(labels), device=labels.device), {}
            new = levels_of(maps, args.levels)
            if not first:
                with torch.no_grad():
                    old_logits, old_maps = old_model(images)
                old = levels_of(old_maps, args.levels)
            if plop and not first:
                targets = common.in_strips(pseudo_labels, args.crop, old_logits, labels, thresholds)
                share = sure_share(labels, targets)
            if plop or first:
                losses["ce"] = run.dense(adaptive_cross_entropy, logits, targets, share)
            else:
                both = labels, old_logits, args.kd_weight
                losses["ce"], losses["kd"] = run.dense(unbiased_losses, logits, *both)
            if args.internal and args.statistics == "pod" and not first:  # PLOP's
                factors = [args.pod] * len(new) + [args.pod_logits]
                losses["internal"] = pod(
                    [*new, logits], [*old, old_logits], factors, step.channels, len(step.new)
                )
            elif args.internal and not first:
                distance = internal_distillation(new, old, args.statistics)
                losses["internal"] = gamma * args.internal_weight * distance
            if args.external and not first:
                losses["external"] = gamma * args.external_weight * external(new, old)
            loss = run.log(losses)  # their sum
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.finish(step, model)


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, RECIPE)
    parser.set_defaults(head="softmax")
    add = parser.add_argument_group("method (all of it our reconstruction)").add_argument
    switch, rate = argparse.BooleanOptionalAction, common.rate
    text = "pseudo-labels, or unbiased losses (plop)"
    add("--base", choices=("plop", "mib"), default="plop", help=text)
    add("--internal", action=switch, default=True, help="statistics within each level (on)")
    add("--external", action=switch, default=True, help="relations between levels (on)")
    text = "of the internal term: means and deviations, one of them, or PLOP's Local POD (both)"
    add("--statistics", choices=("both", "means", "deviations", "pod"), default="both", help=text)
    text = "stages 1-4, and 5, the classifiers' input (all)"
    add("--levels", type=int, nargs="+", default=[*LEVELS], metavar="LEVEL", help=text)
    add("--internal-weight", type=rate, help="(voc 10, ade 3, shapes 0.1)")
    add("--external-weight", type=rate, help="(voc 1, ade 0.3, shapes 0.01)")
    text = "factor of Local POD on the levels (voc 0.01, ade 0.001: PLOP's code; shapes 0.0003)"
    add("--pod", type=rate, help=text)
    text = "factor of Local POD on the logits (voc 0.0005, ade 0.00001: code; shapes 1.5e-5)"
    add("--pod-logits", type=rate, help=text)
    text = "plop: a class's threshold: as in PLOP's code, or the median entropy, as in its paper "
    text += "(published)"
    add("--thresholds", choices=("published", "median"), default="published", help=text)
    add("--kd-weight", type=rate, default=10.0, help="mib: weight of distillation (10: code)")
    text = "after step 0 BatchNorm keeps its statistics and weights: for small batches (off: code)"
    add("--freeze-batchnorm", action="store_true", help=text)
    text = "ASPP's, head's and classifiers' rate is this times --lr (1: code)"
    add("--head-lr", type=rate, default=1.0, help=text)
    return parser


if __name__ == "__main__":
    common.launch(main, flags())
