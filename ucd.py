"""UCD: Uncertainty-aware Contrastive Distillation for Incremental Semantic Segmentation.

Yang, Fini, Xu, Rota, Ding, Nabi, Alameda-Pineda, Ricci. TPAMI 45(2), 2023, arXiv 2203.14098.
Authors' code: ygjwd12345/UCD (commits cc73546, on MiB, and 51b783a, on PLOP). Bases: MiB, Cermelli
et al., CVPR 2020, fcdl94/MiB; PLOP, Douillard et al., CVPR 2021, arthurdouillard/CVPR2021_PLOP.

Distillation compares the new and the old model pixel by pixel. UCD compares all pixels of the
mini-batch with each other: features of one class are drawn together, those of other classes pushed
apart, features of the frozen old model among them. Old classes have no labels now, so the old
model's predictions stand in, and each pair weighs as much as the old model is sure that both pixels
are of one class. It is a further loss on top of a method: --base mib, or plop.

    python ucd.py --task 15-1 --dataset shapes              drawn pictures, minutes on a CPU
    python ucd.py --task 15-1 --data DIR                    Pascal VOC 2012, MiB + UCD
    python ucd.py --task 15-1 --data DIR --base plop        PLOP + UCD

| what                                                 | here                     |
|------------------------------------------------------|--------------------------|
| L = base + weight * contrastive distillation         | main                     |
| contrastive distillation, uncertainty                | contrastive_distillation |
| MiB: unbiased cross-entropy                          | unbiased_cross_entropy   |
| MiB: unbiased distillation                           | unbiased_distillation    |
| MiB, PLOP: new classifiers from the background's     | initialise               |
| PLOP: Local POD on maps and logits                   | local_pod, pod           |
| PLOP: background that is sure gets pseudo-labels     | pseudo_labels            |
| PLOP: what is sure: a threshold of entropy per class | find_thresholds          |
| PLOP: images weigh by their certain pixels           | adaptive_cross_entropy   |

    --contrast 0                                            the base alone
    --no-uncertainty                                        every positive pair weighs 1
    --no-old-features                                       the new model's features alone

Measured: data/RESULTS.md, on shapes and on photographs of VOC 2012. Not run yet: full VOC 2012
and ADE20K with ResNet-101. Losses, learning rates, weights and the confusion matrix of twelve
iterations of PLOP equal those of its authors' trainer to 1e-8 (tests/test_trajectories.py). Of the
UCD paper only abstract, overview figure and Table 1 could be read: the method is that of the code,
its equations carry no numbers here.

Differences between the authors' code (c) and this file; effects: shapes, 15-1, all, seed 0.
UCD:
 1. Shift. c: the largest similarity is taken from the positives but not from the negatives, which
    are e^(1 / temperature) too heavy then. As c; --no-published-shift is the plain ratio
    (MiB + UCD: 74.4, plain 74.3).
 2. Labels at the size of the features. c: class ids resized bilinearly, which makes up classes at
    borders. Here nearest neighbour.
 3. Void. c: becomes background for the contrast, then takes the old model's label. As c.
 4. Pairs of weight 1. c: where both ids are at least the smallest one, made-up ones too. Here where
    both pixels are labelled.
 5. PLOP + UCD. c: PLOP's pseudo-labels count as labels, so that nearly all pairs weigh 1 and the
    old features are hardly used. Here the contrast sees the labels as they are.
 6. Classifiers. c (on MiB): the first one is frozen, in step 0 too. Here all learn.
 7. Class ids above 20 are dropped in c. Here any number of classes.
 8. No positive pair. c: an error, or not a number. Here 0.
 9. Distillation's weight on MiB. c: 10 in every task. As c; mib_unbiased.py takes 100 for 15-1.
10. Cross-entropy on MiB. c: the mean over all pixels, void ones too. As c.
11. PLOP + UCD. c: one of its two scripts for VOC has a temperature of 1, the other 0.07; its
    factors of Local POD on ADE20K are those of VOC. Here 0.07, and PLOP's factors.
PLOP:
12. Maps of Local POD. c: six: the four stages before their last ReLU, the map that the classifiers
    read, the logits. As c (without the fifth 75.1, with it 75.0).
13. Thresholds. p: the median entropy of a class. c: read from a histogram of 100 bins, in which the
    entropies, divided twice by a logarithm of the number of classes and once by the number, fill
    the first two or three. So most classes have the same threshold, the middle of the first bin: in
    15-1's step 1 it is 0.23 of the greatest entropy. As c: 75.0; --thresholds median: 59.2.
14. The same histogram. c: adds indices of bins, not counts, below a bin (published_median); looks
    at one random crop per image, the last incomplete batch left out. As c. c: each process has
    thresholds of its own part of the images; here all look at the whole step.
15. Images without any background. c: they weigh 0. As c. On shapes there are none.
16. Step 0. c: cross-entropy is the mean over all pixels, void ones too. As c. On shapes there are
    none.
17. Cells of Local POD on maps that are not square. c: measured by the width. Here by the shorter
    side. All training maps are square.
18. Epochs of VOC's 10-1. c: 10 in the later steps, 30 in its other tasks of VOC. Here 30 in all;
    --epochs 30 10 is c's (PLOP on shapes, 10-1: 43.4; with a third of the epochs 18.9).
Both:
19. Several devices: each contrasts its own images. As c.
20. Network. c: in-place ABN with leaky ReLU and its authors' ImageNet weights, no 3x3 convolution
    behind the ASPP, Xavier start of the head, rates 12, 24, 32 at stride 8. Here torchvision's ASPP
    and weights, BatchNorm and ReLU, and a 3x3 convolution. The dilations of the trunk are those of
    c (--dilate-first), but for shapes.
21. BatchNorm after step 0. c: learns, and follows the batches of each step. As c; small batches
    need --freeze-batchnorm (PLOP, 2,292 photographs, batch 6, 15-1, all, seeds 0 and 1: 22.4
    instead of 12.6).
22. Precision. c: apex's mixed float16 (PLOP), float32 (MiB + UCD). Here bfloat16 on a GPU.
23. msrc, folder, shapes: not in the papers, the recipes are ours, rates as in mib_unbiased.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from common import BACKGROUND, IGNORE

# VOC and ADE20K: the README and the author's answer in issue 1; PLOP's factors from its scripts.
# Two values: step 0, later steps.
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
        "pod": 0.01,
        "pod_logits": 0.0005,
    }
}
RECIPE["ade"] = RECIPE["voc"] | {"epochs": [60], "pod": 0.001, "pod_logits": 0.00001}
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
    "pod": 0.0003,  # of 0.001, 0.0003, 0.0001, 0.00003 the best on held-out training images
    "pod_logits": 1.5e-5,
}
WEIGHT_DECAY = 1e-4  # of all parameters: MiB's code


def contrastive_distillation(
    features: Tensor,
    old_features: Tensor,
    labels: Tensor,
    old_logits: Tensor,
    temperature: float = 0.07,
    uncertainty: bool = True,
    use_old: bool = True,
    published_shift: bool = True,
) -> Tensor:
    """Draws pixels of one class together and pushes others apart, the old model's among them.

    features, old_features      float [B, D, h, w], the classifiers' inputs
    labels          int64 [B, H, W]; 0 takes the old model's prediction, 255 is left out
    old_logits      float [B, O, h, w], of the frozen model
    uncertainty     weighs a positive pair by the probability that the old model gives both pixels
                    the same class; pairs of labelled pixels weigh 1
    use_old         old features of the pixels that took a prediction are candidates, too
    published_shift the largest similarity is taken from the positives alone (difference 1)
    returns         scalar: mean over the anchors that have a positive, nats; none: 0 with a
                    gradient path. The gradient reaches the anchors only. Time grows with the square
                    of their number, memory in proportion to it
    """
    labels = F.interpolate(labels[:, None].double(), features.shape[2:])[:, 0].long()
    known = labels != BACKGROUND
    labels = torch.where(known, labels, old_logits.argmax(1))
    used = ((labels != BACKGROUND) & (labels != IGNORE)).nonzero(as_tuple=True)
    labels, known = labels[used], known[used]

    def pixels(maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1)[used]

    anchors, p = F.normalize(pixels(features), dim=1), pixels(old_logits.softmax(1))
    taken = (~known & use_old).nonzero()[:, 0]
    old = F.normalize(pixels(old_features)[taken], dim=1)
    keys = torch.cat([anchors, old]).detach()
    key_labels, key_known, key_p = (torch.cat([v, v[taken]]) for v in (labels, known, p))

    def sum_of(block: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The losses of the anchors start, start + 1, ..., and how many have a positive."""
        rows = slice(start, start + len(block))
        s = block @ keys.T / temperature
        same = labels[rows, None] == key_labels
        negatives = s.masked_fill(same, -math.inf).logsumexp(1, keepdim=True)
        if published_shift:
            s = s - s.detach().max(1, keepdim=True).values
        loss = torch.logaddexp(s, negatives) - s
        if uncertainty:
            both = known[rows, None] & key_known
            loss = loss * (p[rows] @ key_p.T).masked_fill(both, 1)
        positive = same.clone()
        positive.diagonal(start).fill_(False)  # not the anchor itself
        loss, pairs = loss.masked_fill(~positive, 0).sum(1), positive.sum(1)
        return (loss / pairs.clamp(min=1)).sum(), (pairs > 0).sum()

    return mean_in_blocks(anchors, sum_of, common.STRIP[anchors.is_cuda] // max(1, len(keys)))


def mean_in_blocks(anchors: Tensor, sum_of: Callable, rows: int) -> Tensor:
    """The mean over some anchors, in blocks whose gradient is taken at once, so that none is kept.

    anchors     float [n, D]
    sum_of      function of a block and its start -> the sum of its losses, and over how many
    rows        of a block
    """
    total, count, leaf = anchors.sum() * 0, 0, anchors.detach().requires_grad_()
    rows = max(1, rows)
    for start in range(0, len(anchors), rows):
        with torch.enable_grad():
            loss, counted = sum_of(leaf[start : start + rows], start)
            loss.backward()
        total, count = total + loss.detach(), count + counted
    if len(anchors):
        product = (anchors * leaf.grad).sum()  # its gradient is the one just taken
        total = (total + product - product.detach()) / count.clamp(min=1)
    return total


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
def find_thresholds(run: common.Run, step: common.Step, old_model: torch.nn.Module) -> Tensor:
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


@torch.no_grad()
def initialise(model: common.DeepLabV3) -> None:
    """The new classifiers share the background's probability with it, equally (MiB)."""
    background, new = model.classifiers[0], model.classifiers[-1]
    background.bias -= math.log(len(new.bias) + 1)
    new.weight.copy_(background.weight.expand_as(new.weight))
    new.bias.copy_(background.bias.expand_as(new.bias))


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
    name = {"mib": "MiB", "plop": "PLOP"}[args.base] + " + UCD" * bool(args.contrast)
    run = common.Run(args, common.most_likely, name)
    for step in run.steps():
        old_model, model = run.models(step)
        first = old_model is None
        model.train()
        plop = args.base == "plop"
        if not first:
            initialise(model)
            thresholds = find_thresholds(run, step, old_model) if plop else None
        if args.freeze_batchnorm and not first:
            common.freeze_batchnorm(model)
        optimizer = sgd(model, common.per_step(args.lr, step), args)
        net = run.parallel(model)
        for images, labels in run.batches(step, model, optimizer):
            logits, maps = net(images)
            targets, share, losses = labels, torch.ones(len(labels), device=labels.device), {}
            if not first:
                with torch.no_grad():
                    old_logits, old_maps = old_model(images)
            if plop and not first:
                targets = common.in_strips(pseudo_labels, args.crop, old_logits, labels, thresholds)
                share = sure_share(labels, targets)
            if plop or first:
                losses["ce"] = run.dense(adaptive_cross_entropy, logits, targets, share)
            else:
                both = labels, old_logits, args.kd_weight
                losses["ce"], losses["kd"] = run.dense(unbiased_losses, logits, *both)
            if plop and not first:
                six, old_six = (
                    [m.float() for m in (*x["before_relu"], x["head"], z)]
                    for x, z in ((maps, logits), (old_maps, old_logits))
                )
                factors = [args.pod] * 5 + [args.pod_logits]
                losses["pod"] = pod(six, old_six, factors, step.channels, len(step.new))
            if args.contrast and not first:
                losses["contrast"] = args.contrast * contrastive_distillation(
                    maps["head"].float(),
                    old_maps["head"].float(),
                    torch.where(labels == IGNORE, BACKGROUND, labels),  # difference 3
                    old_logits,
                    args.temperature,
                    args.uncertainty,
                    args.old_features,
                    args.published_shift,
                )
            loss = run.log(losses)  # their sum
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.finish(step, model)


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, RECIPE)
    parser.set_defaults(head="softmax")
    add = parser.add_argument_group("method").add_argument
    switch, rate = argparse.BooleanOptionalAction, common.rate
    add("--base", choices=("mib", "plop"), default="mib", help="what UCD is added to (mib)")
    text = "weight of the contrastive distillation (0.01: code)"
    add("--contrast", type=rate, default=0.01, help=text)
    text = "of the similarities (0.07: code)"
    add("--temperature", type=common.above_zero, default=0.07, help=text)
    add("--uncertainty", action=switch, default=True, help="weighs positive pairs (on: paper)")
    add("--old-features", action=switch, default=True, help="among the candidates (on: paper)")
    text = "largest similarity taken from the positives alone (on: code; off: the plain ratio)"
    add("--published-shift", action=switch, default=True, help=text)
    text = "plop: a class's threshold: as in PLOP's code, or the median entropy, as in its paper "
    text += "(published)"
    add("--thresholds", choices=("published", "median"), default="published", help=text)
    add("--kd-weight", type=rate, default=10.0, help="mib: weight of distillation (10: code)")
    text = "plop: factor of Local POD on the stages (voc 0.01, ade 0.001: code; shapes 0.0003)"
    add("--pod", type=rate, help=text)
    text = "plop: factor of Local POD on the logits (voc 0.0005, ade 0.00001: code; shapes 1.5e-5)"
    add("--pod-logits", type=rate, help=text)
    text = "after step 0 BatchNorm keeps its statistics and weights: for small batches (off: code)"
    add("--freeze-batchnorm", action="store_true", help=text)
    text = "ASPP's, head's and classifiers' rate is this times --lr (1: code)"
    add("--head-lr", type=rate, default=1.0, help=text)
    return parser


if __name__ == "__main__":
    common.launch(main, flags())
