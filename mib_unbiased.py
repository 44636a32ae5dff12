"""Unbiased losses against forgetting (MiB), and what causes it (Kalb & Beyerer).

Kalb, Beyerer: Causes of Catastrophic Forgetting in Class-Incremental Semantic Segmentation.
ACCV 2022, arXiv 2209.08010; no public code. The losses are those of Cermelli, Mancini, Rota Bulo,
Ricci, Caputo: Modeling the Background for Incremental Learning in Semantic Segmentation (MiB).
CVPR 2020, arXiv 2002.00718. Authors' code: fcdl94/MiB (commit 1c58983).

A pixel labelled background may belong to an old class, and what the old model calls background may
belong to a new one. So cross-entropy compares the label "background" with the mass of background
and all old classes, distillation compares the old background with the mass of background and all
new classes, and new classifiers start as equal shares of the background's. Kalb & Beyerer find that
the shift of the background and a bias towards new classes cause forgetting, in the deeper,
classifying layers; --analyse looks where it sits in any finished run.

    python mib_unbiased.py --task 15-1 --dataset shapes      drawn pictures, minutes on a CPU
    python mib_unbiased.py --task 15-1 --data DIR            Pascal VOC 2012
    python mib_unbiased.py --analyse runs/*                  finished runs of any of the scripts

| MiB                                          | here                   |
|----------------------------------------------|------------------------|
| L = unbiased CE + weight * unbiased KD       | main                   |
| unbiased cross-entropy                       | unbiased_cross_entropy |
| unbiased distillation, sharpening alpha      | unbiased_distillation  |
| new classifiers from the background's        | initialise             |

The grid. The rows down to MiB, and joint, are in MiB's own tables (weights of the losses: theirs):

    --ce plain --kd none --init random                  fine-tuning (FT)
    --ce plain --kd plain --init random                 LwF
    --ce binary --kd binary --init random               LwF-MC
    --ce plain --kd none --init random --ewc 500        EWC
    --kd none --init random                             unbiased cross-entropy only
    --ce plain --init random                            unbiased distillation only
    --init random                                       MiB without its initialisation
    (no flag)                                           MiB
    --ce plain --kd none --init random --freeze-old     DFT*: only the new classifiers learn
    --ce plain --kd none --init random --replay 100     images of earlier steps are kept
    --ce plain --kd none --init random --labels KIND    R2: which labels the old classes' pixels get
    --task offline                                      joint

| analysis                                                           | here                      |
|--------------------------------------------------------------------|---------------------------|
| R1 what old pixels are taken for; had a rival not been there       | old_pixels                |
| R2 the same images with other labels                               | --labels, step_labels     |
| R3 stitching: the front of one model, the back of the other        | recombined                |
| R4 the back trained anew behind a frozen front                     | --retrain, retrain        |
| R5 linear CKA of the maps                                          | similarity                |
| R6 the classifier's biases and norms, an offset on rivals' scores  | classifier_bias           |
| R8 drift of the weights, parts reset                               | recombined                |
| R9 BatchNorm's statistics swapped                                  | statistics                |

Only the abstract of Kalb & Beyerer could be read. The three claims are theirs; the grid (R7), the
analyses and every number are our reconstruction of how they can be tested, not their protocol.

Measured: data/RESULTS.md, on shapes and on photographs of VOC 2012. Not run yet: full VOC 2012
and ADE20K with ResNet-101. Fine-tuning, LwF and MiB equal MiB's trainer over twelve iterations to
1e-9 in losses, learning rates and weights (tests/test_trajectories.py).

Differences between MiB's paper (p), the authors' code (c) and this file:
 1. Equations. p could not be read in full: they are taken from c, where other papers' restatements
    agree, and carry no numbers.
 2. Distillation. p: a sum over old classes, as far as we know; c: their mean. As c; so a weight of
    10 is 10 / 16 of the sum in VOC's 15-1.
 3. Weight. p: chosen on held-out images; c: 10. The author later gave 100 for 15-1 and 10 for the
    other tasks (issues #22, #43, and MiB's second code): in his runs of 15-1 the old classes end at
    37-42 with 100, at 37-39 with 10 (#22). As the author. Plain distillation (LwF): c: 100; LwF-MC:
    10, times the old channels, in c as here. PLOP's authors ran MiB again, with 10 in all tasks and
    void left out; where a table counts the background, the published row is theirs: --kd-weight 10
    --ignore void.
 4. Void. c: background in VOC's training. As c; --ignore later void leaves it out.
 5. Mean of cross-entropy. c: over all pixels; here over the valid ones. With 4. it is the same.
 6. Initialisation. c: the background's bias is lowered again in each step. As c.
 7. Old labels in a step's images. c: count as background. Here they stay targets where --labels,
    --replay or --setting sequential show them; otherwise there are none.
 8. Network. c: in-place ABN with leaky ReLU (slope 0.01) and its authors' ImageNet weights, no 3x3
    convolution behind the ASPP, Xavier start of the head, rates 12, 24, 32 at stride 8, no dropout.
    Here BatchNorm and ReLU, torchvision's weights, ASPP and start, a 3x3 convolution behind the
    ASPP, rates 12, 24, 36, no dropout. The BatchNorm of c over the joined branches of the ASPP is
    one per branch: the same. The dilations of the trunk are those of c, as in every published
    number of MiB and of the codes built on it (--dilate-first); for shapes they are torchvision's.
 9. EWC. c: a running mean of squared mini-batch gradients from the training itself, scaled to 0-1
    in each tensor. Here measured at each step's end, summed over the steps, scaled by the maximum:
    nothing then has to be carried through step 0, and --step0 serves every row.
10. Replay is not in c. Images are drawn class by class from the steps in which their class was new.
11. ADE20K's id 0 in the test. c: ignored. As c; --ignore later counts it as background, --ignore
    with nothing behind it also what is of later steps, as PLOP and all rows with background.
12. Rate of ASPP, head and classifiers. c: the trunk's. As c; --head-lr is for small data.
13. DFT*, the frozen baseline (Zhang et al.: Revisiting Continual Semantic Segmentation with
    Pre-trained Vision Models, arXiv 2508.04267, in which DFT is fine-tuning; read in the authors'
    code, BladeDancer957/RevisitingCSS). c: a softmax over the classes of all steps from step 0 on;
    in 15-1 a rate of 0.02, then 0.0005. Here each step adds its classifiers, at MiB's rates.
14. BatchNorm after step 0. c: learns, and follows the batches of each step. As c; small batches
    need --freeze-batchnorm (2,292 photographs, batch 6, 15-1, all, seeds 0 and 1: 25.2 instead of
    10.1).
15. Precision. c: float32. Here bfloat16 on a GPU; --precision fp32 is c's.
16. ADE20K, disjoint. c: stored lists, drawn with a seed that is lost (100-50: 13,452 and 6,744
    images); MiB's Table 2 is of them. Here the rule of VOC: 10,806 and 9,390.
17. msrc, folder, shapes: not in the papers, the recipes are ours. For shapes the rate was chosen
    among 0.03, 0.1 and 0.3 on the joint run with --held-out 0.2.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Permute

import common
from common import BACKGROUND, IGNORE

# VOC and ADE20K: MiB's README and argument parser. Two values: step 0, later steps.
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
        "ignore": ["later"],
    }
}
RECIPE["ade"] = RECIPE["voc"] | {"epochs": [60], "ignore": ["later", "other"]}
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
}
WEIGHT_DECAY = 1e-4  # of all parameters: MiB's code


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
    """Cross-entropy in which "background" means background or any old class.

    logits      float [B, C, H, W], C = old + new, background first
    labels      int64 [B, H, W], 255 = ignored
    old         number of old channels, background included; 1 gives plain cross-entropy
    keep        labels of old classes, where they are shown, stay targets; without it they count
                as background, as in the authors' code
    masses      log_masses(logits, old), where it is there already
    returns     scalar: mean over valid pixels, nats; no valid pixel: 0 with a gradient
    """
    if old == 1:
        return cross_entropy(logits, labels)
    z_0, log_old, log_new, _ = masses or log_masses(logits, old)
    background = torch.logaddexp(z_0, log_old)  # log of the mass of background and all old classes
    total = torch.logaddexp(background, log_new)
    valid = labels != IGNORE
    own = logits.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
    merged = labels == BACKGROUND if keep else labels < old
    loss = total - torch.where(merged, background, own)
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Plain cross-entropy: the unbiased one where background is the only old channel."""
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return loss.sum() / (labels != IGNORE).sum().clamp(min=1)


def unbiased_distillation(
    logits: Tensor,
    old_logits: Tensor,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    masses: tuple | None = None,
) -> Tensor:
    """Distillation in which the old "background" is background or any new class.

    logits      float [B, C, H, W], background first
    old_logits  float [B, O, H, W], of the frozen model, O <= C
    alpha       sharpens the old model: softmax(alpha * old_logits)
    mask        [B, H, W], weights of the pixels
    masses      log_masses(logits, O), where it is there already
    returns     scalar: mean over *all* pixels, divided by O (as in the authors' code), nats
    """
    old, p = old_logits.shape[1], (alpha * old_logits).softmax(1)
    z_0, log_old, log_new, z_old = masses or log_masses(logits, old)
    background = torch.logaddexp(z_0, log_new)  # log of the mass of background and all new classes
    total = torch.logaddexp(background, log_old)
    loss = total - p[:, 0] * background - (p[:, 1:] * z_old).sum(1)  # the p sum to 1
    return (loss if mask is None else loss * mask).mean() / old


def distillation(
    logits: Tensor, old_logits: Tensor, alpha: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Plain distillation (LwF): both distributions over the old channels only.

    Arguments and result as in unbiased_distillation: a model without new channels is unbiased.
    """
    return unbiased_distillation(logits[:, : old_logits.shape[1]], old_logits, alpha, mask)


def unbiased_losses(
    logits: Tensor, labels: Tensor, old_logits: Tensor, weight: float, alpha: float = 1.0
) -> Tensor:
    """Unbiased cross-entropy and `weight` times unbiased distillation, from one set of masses: [2].

    Arguments as there; labels of old classes stay targets.
    """
    old = old_logits.shape[1]
    masses = log_masses(logits, old)
    ce = unbiased_cross_entropy(logits, labels, old, True, masses)
    kd = unbiased_distillation(logits, old_logits, alpha, masses=masses)
    return torch.stack([ce, weight * kd])


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """A sigmoid per class, background too (LwF-MC).

    logits      float [B, C, H, W]
    labels      int64 [B, H, W], 255 = ignored
    returns     scalar: mean over valid pixels, sum over classes, nats; no valid pixel: 0
    """
    valid = labels != IGNORE
    own = logits.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
    loss = F.softplus(logits).sum(1) - own  # softplus(z) - z = softplus(-z)
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def binary_distillation(logits: Tensor, old_logits: Tensor, alpha: float = 1.0) -> Tensor:
    """Distillation of the old channels' sigmoids (LwF-MC).

    Arguments as in unbiased_distillation; returns the mean over pixels, sum over old channels, nats
    """
    old, p = old_logits.shape[1], (alpha * old_logits).sigmoid()
    return old * F.binary_cross_entropy_with_logits(logits[:, :old], p)


CROSS_ENTROPY = {
    "plain": cross_entropy,
    "unbiased": unbiased_cross_entropy,
    "binary": binary_cross_entropy,
}
DISTIL = {
    "plain": distillation,
    "unbiased": unbiased_distillation,
    "binary": binary_distillation,
}


def pseudo_labels(old_logits: Tensor, labels: Tensor) -> Tensor:
    """--labels pseudo: background takes the old model's prediction. int64 [B, H, W]."""
    return torch.where(labels == BACKGROUND, old_logits.argmax(1), labels)


@torch.no_grad()
def initialise(model: common.DeepLabV3) -> None:
    """The new classifiers share the background's probability with it, equally."""
    background, new = model.classifiers[0], model.classifiers[-1]
    background.bias -= math.log(len(new.bias) + 1)  # p_0 / (N + 1) for each of N + 1
    new.weight.copy_(background.weight.expand_as(new.weight))
    new.bias.copy_(background.bias.expand_as(new.bias))


def step_labels(data: common.Data, step: common.Step, kind: str) -> np.ndarray:
    """The label table of a step, uint8 [256], under --labels `kind`."""
    table = data.labels(step, "sequential" if kind == "oracle" else None)
    if kind in ("ignore-old", "ignore-background"):
        table[[data.order[c - 1] for c in step.old]] = IGNORE
    if kind == "ignore-background" and step.index:
        table[table == BACKGROUND] = IGNORE
    return table


def replay(data: common.Data, step: common.Step, count: int) -> list[tuple[int, np.ndarray]]:
    """--replay: `count` images of earlier steps, each with the label table of its step.

    Drawn class by class in turn, from each class's step, in an order that never changes: what is
    kept in a later step was kept in all steps before.
    """
    kept: dict[tuple[int, int], np.ndarray] = {}
    queues = []
    for before in data.steps[: step.index]:
        table = data.labels(before)
        for c in before.new:
            showing = [i for i in data.images[before.index] if c in data.classes[i]]
            order = np.random.default_rng((data.args.seed, c)).permutation(showing).tolist()
            queues.append([((i, before.index), table) for i in order])
    for place in range(max(map(len, queues), default=0)):
        for queue in queues:
            if place < len(queue) and len(kept) < count:
                kept.setdefault(*queue[place])
    return [(i, table) for (i, _), table in kept.items()]


def importance(run: common.Run, step: common.Step, old_model: nn.Module) -> dict[str, Tensor]:
    """EWC: how much each parameter matters to the earlier steps, 0 ... 1 in every tensor.

    The squared gradient of cross-entropy, summed over the mini-batches of each earlier step, taken
    at that step's end. The sums are kept in ewc_K.pt: the next step needs them.
    """
    args, data = run.args, run.data
    file, earlier = (run.folder / f"ewc_{k}.pt" for k in (step.index, step.index - 1))
    if not common.usable(file, common.read_checkpoint, run.say):
        before = data.steps[step.index - 1]
        view = common.View(data.train, data.labels(before), args.crop)
        sums = {k: torch.zeros_like(p) for k, p in old_model.named_parameters()}
        if before.index:
            for k, value in common.read_checkpoint(earlier).items():
                sums[k] += value.to(args.device)
        old_model.requires_grad_(True)
        for images, labels in common.load_in_order(view, data.images[before.index], args):
            logits, _ = old_model(images)
            loss = run.dense(cross_entropy, logits, labels, valid=labels != IGNORE)
            gradients = torch.autograd.grad(loss, [*old_model.parameters()])
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += gradient**2
        old_model.requires_grad_(False)
        common.write_atomically(file, lambda target: torch.save(sums, target))
    sums = common.read_checkpoint(file)
    return {k: (v / v.max().clamp(min=1e-30)).to(args.device) for k, v in sums.items()}


def ewc_penalty(model: nn.Module, old_model: nn.Module, importance: dict[str, Tensor]) -> Tensor:
    """EWC (Kirkpatrick et al., arXiv 1612.00796): the sum of F (theta - theta_old)^2."""
    new = dict(model.named_parameters())
    terms = (importance[k] * (new[k] - p) ** 2 for k, p in old_model.named_parameters())
    return sum(term.sum() for term in terms)


def freeze_old(model: common.DeepLabV3) -> None:
    """DFT*: all but the newest classifiers keep their weights, BatchNorm its statistics too."""
    model.eval().requires_grad_(False)
    model.classifiers[-1].requires_grad_(True)


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


def distillation_weight(args: argparse.Namespace) -> float:
    """What was typed, or the authors' weight for the kind of distillation (difference 3)."""
    heavy = args.kd == "plain" or (args.kd == "unbiased" and args.task == "15-1")
    return (100.0 if heavy else 10.0) if args.kd_weight is None else args.kd_weight


def published_name(args: argparse.Namespace) -> str:
    """The row of the grid in data/published.csv."""
    if args.replay or args.labels != "masked" or args.alpha != 1 or args.freeze_old:
        return ""
    return {
        ("plain", "none", "random", False): "FT",
        ("plain", "none", "random", True): "EWC",
        ("plain", "plain", "random", False): "LwF",
        ("binary", "binary", "random", False): "LwF-MC",
        ("unbiased", "unbiased", "background", False): "MiB",
    }.get((args.ce, args.kd, args.init, args.ewc > 0), "")


def main(args: argparse.Namespace) -> None:
    if args.retrain and not args.analyse:
        raise common.InputError("--retrain goes with --analyse RUN")
    if args.analyse:
        return analyse(args)
    args.kd_weight = distillation_weight(args)
    if args.ce == "binary":
        args.head = "binary"
    run = common.Run(args, common.most_likely, published_name(args))
    for step in run.steps():
        old_model, model = run.models(step)
        first = old_model is None
        model.train()
        if args.init == "background" and not first:
            initialise(model)
        if args.freeze_old and not first:
            freeze_old(model)
        if args.freeze_batchnorm and not first:
            common.freeze_batchnorm(model)
        weights = importance(run, step, old_model) if args.ewc and not first else None
        memory = replay(run.data, step, args.replay)
        label_table = step_labels(run.data, step, args.labels)
        pseudo = args.labels == "pseudo" and not first
        optimizer = sgd(model, common.per_step(args.lr, step), args)
        net = run.parallel(model)
        for images, labels in run.batches(step, model, optimizer, label_table, memory):
            logits, _ = net(images)
            if not first and (args.kd != "none" or pseudo):
                with torch.no_grad():
                    old_logits, _ = old_model(images)
            if pseudo:
                labels = common.in_strips(pseudo_labels, args.crop, old_logits, labels)
            valid, losses = labels != IGNORE, {}
            if args.ce == args.kd == "unbiased" and not first:
                both, how = (labels, old_logits), (args.kd_weight, args.alpha)
                losses["ce"], losses["kd"] = run.dense(
                    unbiased_losses, logits, *both, *how, valid=(valid, None)
                )
            else:
                target = (labels, step.first, True) if args.ce == "unbiased" else (labels,)
                losses["ce"] = run.dense(CROSS_ENTROPY[args.ce], logits, *target, valid=valid)
                if args.kd != "none" and not first:
                    kd = run.dense(DISTIL[args.kd], logits, old_logits, args.alpha)
                    losses["kd"] = args.kd_weight * kd
            if args.ewc and not first:
                losses["ewc"] = args.ewc * ewc_penalty(model, old_model, weights)
            loss = run.log(losses)  # their sum
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.finish(step, model)


# ----------------------------------------------------- the analysis: what was forgotten, and where

DEPTHS = ("stem", "stage1", "stage2", "stage3", "stage4", "aspp", "head")
PARTS = (*DEPTHS, "classifier")  # the depth "stem" lies right behind the part "stem", and so on
DESTINATIONS = ("right", "background", "new classes", "other old classes")
FITTED = (("last", "first"), ("first", "last"), ("first", "first"), ("untrained", "first"))
FIT_IMAGES, FIT_PIXELS = 500, 50_000  # of step 0's training images, for a stitching layer
DRAWS, DRAW_PIXELS = 5, 10_000  # of the test images, for CKA
OFFSETS = [0.5 * i for i in range(-8, 33)]  # nats


class Side(nn.ModuleList):
    """Modules side by side: the same input, their outputs joined along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self], 1)


class Pair(NamedTuple):
    """The models of a run after step 0 and after its last step. "Old" are step 0's classes."""

    folder: Path
    data: common.Data  # data.args: the run's flags
    models: dict[int, common.DeepLabV3]  # of each finished step, frozen
    step: common.Step  # the last one

    @property
    def first(self) -> common.DeepLabV3:
        return self.models[0]

    @property
    def last(self) -> common.DeepLabV3:
        return self.models[self.step.index]

    @property
    def base(self) -> int:
        return self.data.steps[0].last


def accumulate(sums: dict, key: object, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def open_pair(folder: str, args: argparse.Namespace) -> Pair:
    """A run of any of the five scripts, in float32 on this call's device."""
    file = Path(folder) / "config.json"
    try:
        config = common.read_config(file)
    except common.InputError:
        raise common.InputError(
            f"--analyse {folder}: no run there (its config.json cannot be read); expected a folder "
            "such as runs/mib_unbiased-shapes-15-1-overlapped-s0"
        ) from None
    used = config["flags"]
    if used["dry_run"]:
        raise common.InputError(f"--analyse {folder}: a dry run")
    flags = vars(args) | used | {"device": args.device, "precision": "fp32", "compile": False}
    if args.data != str(common.HERE / "data"):
        flags["data"] = args.data
    flags, models = argparse.Namespace(**flags), {}
    data = common.Data(flags, config["data"]["classes"][1:])
    common.refuse_other(file, config, used, data.identity)
    for step in data.steps:
        path = Path(folder) / f"step_{step.index}.pt"
        if path.exists():
            saved = common.read_checkpoint(path)
            common.refuse_other(path, saved, used, data.identity)
            model = common.build_model(flags, [len(s.new) for s in data.steps[: step.index + 1]])
            common.load_weights(model, saved, path)
            models[step.index] = model.eval().requires_grad_(False)
    if len(models) < 2 or 0 not in models:
        raise common.InputError(
            f"--analyse {folder}: needs step_0.pt and that of a later step, there is "
            + (" and ".join(f"step_{k}.pt" for k in models) or "neither")
        )
    return Pair(Path(folder), data, models, data.steps[max(models)])


def parts(model: common.DeepLabV3) -> list[nn.Module]:
    """The network in eight PARTS: images [B, 3, H, W] -> ... -> logits [B, C, h, w]."""
    trunk = model.trunk
    if isinstance(trunk, nn.ModuleDict):
        front = [trunk["features"][a:b] for a, b in itertools.pairwise((0, 1, *model.ends))]
        if "norm" in trunk:  # Swin, whose blocks take and give [B, h, w, D]
            front[-1].append(trunk["norm"])
            enter, leave = Permute([0, 2, 3, 1]), Permute([0, 3, 1, 2])
            stem, *rest = front
            front = [nn.Sequential(stem, leave), *(nn.Sequential(enter, x, leave) for x in rest)]
    else:
        stem = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool)
        front = [stem, trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    head = nn.Sequential(model.aspp.project, model.head)
    return [*front, Side(model.aspp.convs), head, Side(model.classifiers)]


def through(chain: Sequence[Callable], x: Tensor) -> Tensor:
    for part in chain:
        x = part(x)
    return x


def maps_of(network: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    """The maps [B, D, h, w] at the seven depths."""
    return [*itertools.accumulate(network[:-1], lambda x, part: part(x), initial=images)][1:]


def scores_of(logits: Tensor, args: argparse.Namespace) -> Tensor:
    """Logits [B, C, h, w] -> scores [B, C, H, W]; the channel of the largest is the prediction.

    With a sigmoid per class (DKD) it is background where no logit is positive: its score is 0.
    """
    if args.head == "sigmoid":
        logits = torch.cat([torch.zeros_like(logits[:, :1]), logits[:, 1:]], 1)
    return common.upsample(logits, (args.crop, args.crop))


def test_batches(pair: Pair) -> Iterator[tuple[Tensor, Tensor]]:
    """The test images of the run's last step, with the labels of its table."""
    return common.load_in_order(*pair.data.testing(pair.step), pair.data.args)


def old_iou(confusion: Tensor, base: int) -> float:
    """Mean IoU of background and the old classes, percent, on pixels whose truth is one of them."""
    confusion = confusion.clone()
    confusion[base + 1 :] = 0
    return common.iou_per_class(confusion)[: base + 1].nanmean().item()


def new_iou(confusion: Tensor, base: int) -> float:
    """Mean IoU of the classes learnt after step 0, percent, on all pixels."""
    return common.iou_per_class(confusion)[base + 1 :].nanmean().item()


def destinations(confusion: Tensor, base: int) -> Tensor:
    """R1: what the pixels of each old class were taken for.

    confusion   int64 [C, C], rows = truth
    returns     float64 [base, 4], percent, a column per DESTINATIONS; NaN for an absent class
    """
    rows = confusion[1 : base + 1].double()
    right, background, new = rows.diag(1), rows[:, 0], rows[:, base + 1 :].sum(1)
    other = rows.sum(1) - right - background - new
    return 100 * torch.stack([right, background, new, other], 1) / rows.sum(1, keepdim=True)


def counterfactuals(scores: Tensor, labels: Tensor, base: int) -> dict[str, Tensor]:
    """R1: class ids [B, H, W] as predicted, and with rivals of the old classes taken away."""
    foreground = labels != BACKGROUND
    plain, no_new = scores.argmax(1), scores[:, : base + 1].argmax(1)
    return {
        "as predicted": plain,
        "without background": torch.where(foreground, scores[:, 1:].argmax(1) + 1, plain),
        "without new classes": no_new,
        "without both": torch.where(foreground, scores[:, 1 : base + 1].argmax(1) + 1, no_new),
    }


def old_pixels(pair: Pair) -> dict[str, dict[str, float]]:
    """R1 of each step: destinations in percent, and the old IoU of each counterfactual."""
    result = {}
    for index, model in pair.models.items():
        step, tally = pair.data.steps[index], {}
        for images, labels in test_batches(pair):
            scores = scores_of(model(images)[0], pair.data.args)
            for name, predicted in counterfactuals(scores, labels, pair.base).items():
                found = common.confusion_matrix(labels, predicted, step.channels)
                accumulate(tally, name, found)
        mean = destinations(tally["as predicted"], pair.base).nanmean(0).tolist()
        ious = {f"IoU {name}": old_iou(c, pair.base) for name, c in tally.items()}
        result[f"step {step.index}"] = dict(zip(DESTINATIONS, mean, strict=True)) | ious
    return result


def moments(x: Tensor, y: Tensor) -> Tensor:
    """Sums over n samples of the products of (1, x, y): float64 [1 + dx + dy, 1 + dx + dy].

    x, y        [n, dx], [n, dy]; the moments of two batches add up to those of both
    """
    v = torch.cat([torch.ones_like(x[:, :1]), x, y], 1).double()
    return v.T @ v


def covariance(sums: Tensor) -> Tensor:
    """From moments: the sums of the products of (x, y) less their means, [dx + dy, dx + dy]."""
    total = sums[0, 1:]
    return sums[1:, 1:] - total[:, None] * total / sums[0, 0]


def least_squares(sums: Tensor, dx: int) -> tuple[Tensor, Tensor]:
    """R3: the affine map x -> y of least squared error, from moments: weight [dx, dy], bias [dy].

    Ridge: 1e-4 of the mean of x's variances.
    """
    joint, mean = covariance(sums), sums[0, 1:] / sums[0, 0]
    ridge = (1e-4 * joint[:dx, :dx].trace() / dx).clamp(min=1e-12)
    eye = torch.eye(dx, dtype=sums.dtype, device=sums.device)
    weight = torch.linalg.solve(joint[:dx, :dx] + ridge * eye, joint[:dx, dx:])
    return weight, mean[dx:] - mean[:dx] @ weight


def cka(sums: Tensor, dx: int) -> float:
    """R5: linear CKA (Kornblith et al., arXiv 1905.00414) of x and y, from moments: 0 ... 1."""
    joint = covariance(sums)
    x, y, both = joint[:dx, :dx], joint[dx:, dx:], joint[:dx, dx:]
    return (both.square().sum() / (x.norm() * y.norm())).item()


def pick(maps: Tensor, images: int, pixels: int, rng: torch.Generator) -> Tensor:
    """bool [B, h, w], drawn so that `images` such maps give about `pixels` pixels in all."""
    b, _, h, w = maps.shape
    return (torch.rand((b, h, w), generator=rng) * images * h * w < pixels).to(maps.device)


def fit_stitches(data: common.Data, networks: dict[str, list]) -> dict[tuple, list[Callable]]:
    """R3: least-squares stitching layers of FITTED at the seven depths, on images of step 0."""
    rng, sums = torch.Generator().manual_seed(0), {}
    chosen = np.random.default_rng(0).permutation(data.images[0])[:FIT_IMAGES].tolist()
    view = common.View(data.train, data.labels(data.steps[0]), data.args.crop)
    for images, _ in common.load_in_order(view, chosen, data.args):
        maps = {name: maps_of(network, images) for name, network in networks.items()}
        for depth in range(len(DEPTHS)):
            picked = pick(maps["first"][depth], len(chosen), FIT_PIXELS, rng)
            x = {name: m[depth].permute(0, 2, 3, 1)[picked] for name, m in maps.items()}
            for way in FITTED:
                accumulate(sums, (way, depth), moments(x[way[0]], x[way[1]]))
    stitches: dict[tuple, list[Callable]] = {way: [] for way in FITTED}
    for (way, _), total in sums.items():
        weight, bias = least_squares(total, (len(total) - 1) // 2)
        conv = {"weight": weight.T[..., None, None].float(), "bias": bias.float()}
        stitches[way].append(functools.partial(F.conv2d, **conv))
    return stitches


def recombined(pair: Pair) -> tuple[dict, dict]:
    """R3 and R8: parts of the first and the last model put together.

    returns     stitching: old IoU in percent of the first model's, per depth
                layers: drift of each part, old and new IoU with parts reset to the first model's
    """
    data, base, channels = pair.data, pair.base, pair.step.channels
    torch.manual_seed(0)
    untrained = common.build_model(data.args, [len(data.steps[0].new)]).eval()
    models = {"first": pair.first, "last": pair.last, "untrained": untrained}
    networks = {name: parts(model) for name, model in models.items()}
    stitches = fit_stitches(data, networks)
    first, last, tally = networks["first"], networks["last"], {}
    extended = Side([*first[-1], *last[-1][len(first[-1]) :]])  # and the classifiers learnt later
    backs = {"first": [*first[:-1], extended], "last": last}
    for images, labels in test_batches(pair):

        def add(name: tuple, logits: Tensor, labels: Tensor = labels) -> None:
            scores = scores_of(logits, data.args)
            for among, part in (("old", scores[:, : base + 1]), ("all", scores)):
                found = common.confusion_matrix(labels, part.argmax(1), channels)
                accumulate(tally, (*name, among), found)

        add(("model", "first"), pair.first(images)[0])
        maps = {name: maps_of(network, images) for name, network in networks.items()}
        for depth, (way, affine) in itertools.product(range(len(DEPTHS)), stitches.items()):
            front, back = maps[way[0]][depth], backs[way[1]][depth + 1 :]
            add((*way, depth, "fitted"), through(back, affine[depth](front)))
            if way[0] != "untrained":
                add((*way, depth), through(back, front))
        for i in range(len(PARTS)):
            front = maps["last"][i - 1] if i else images
            add(("reset", i), through([backs["first"][i], *last[i + 1 :]], front))
        add(("model", "last"), through(last[-1:], maps["last"][-1]))

    drifts = {p: drift(a, b) for p, a, b in zip(PARTS, first, last, strict=True)}
    stitching, layers = read_tally(tally, base)
    return stitching, {"drift": drifts} | layers


def read_tally(tally: dict[tuple, Tensor], base: int) -> tuple[dict, dict]:
    """The two results of `recombined`, from the confusion matrices that it counts."""
    reference = old_iou(tally["model", "first", "old"], base)

    def curve(front: str, back: str, *rest: str, among: str = "old") -> list[float]:
        found = (tally[(front, back, d, *rest, among)] for d in range(len(DEPTHS)))
        return [100 * old_iou(c, base) / (reference or math.nan) for c in found]

    def ious(*name: object) -> dict[str, float]:
        confusion = tally[(*name, "all")]
        return {"old": old_iou(confusion, base), "new": new_iou(confusion, base)}

    stitching = {
        "old IoU of the first model": reference,
        "last front, first back": curve("last", "first"),
        "last front, first back, fitted": curve("last", "first", "fitted"),
        "first front, last back": curve("first", "last"),
        "first front, last back, fitted": curve("first", "last", "fitted"),
        "first front, last back, all channels": curve("first", "last", among="all"),
        "control: first with itself": curve("first", "first"),
        "control: first with itself, fitted": curve("first", "first", "fitted"),
        "control: untrained front, fitted": curve("untrained", "first", "fitted"),
    }
    layers = {
        "none reset": ious("model", "last"),
        "reset alone": {p: ious("reset", i) for i, p in enumerate(PARTS)},
        "reset up to here": {p: ious("first", "last", d) for d, p in enumerate(DEPTHS)},
        "reset behind here": {p: ious("last", "first", d) for d, p in enumerate(DEPTHS)},
    }
    return stitching, layers


def drift(first: nn.Module, last: nn.Module) -> float:
    """R8: the distance of the parameters, relative to the first ones' norm; new ones left out."""
    pairs = zip(first.parameters(), last.parameters(), strict=False)
    a, b = (torch.cat([p.flatten() for p in side]) for side in zip(*pairs, strict=True))
    return ((b - a).norm() / a.norm()).item()


def similarity(pair: Pair) -> dict[str, dict[str, list[float]]]:
    """R5: linear CKA of the two models' maps at each depth: all pixels, and by the pixels' truth.

    Mean and standard error of DRAWS disjoint draws of pixels.
    """
    base, rng, sums = pair.base, torch.Generator().manual_seed(0), {}
    count = len(pair.data.testing(pair.step)[1])
    first, last = parts(pair.first), parts(pair.last)
    for images, labels in test_batches(pair):
        for depth, (x, y) in enumerate(
            zip(maps_of(first, images), maps_of(last, images), strict=True)
        ):
            picked = pick(x, count, DRAWS * DRAW_PIXELS, rng)
            truth = F.interpolate(labels[:, None].float(), x.shape[2:])[:, 0][picked]
            x, y = (m.permute(0, 2, 3, 1)[picked] for m in (x, y))
            draw = torch.randint(DRAWS, truth.shape, generator=rng).to(truth.device)
            groups = {
                "background": truth == BACKGROUND,
                "old": (truth > BACKGROUND) & (truth <= base),
                "new": (truth > base) & (truth < IGNORE),
            }
            for (name, group), d in itertools.product(groups.items(), range(DRAWS)):
                here = group & (draw == d)
                accumulate(sums, (name, depth, d), moments(x[here], y[here]))
    for (_, depth, d), total in [*sums.items()]:
        accumulate(sums, ("all", depth, d), total)
    result = {}
    for name in ("all", "background", "old", "new"):
        values = torch.tensor(
            [
                [cka(s, (len(s) - 1) // 2) for s in (sums[name, depth, d] for d in range(DRAWS))]
                for depth in range(len(DEPTHS))
            ]
        )
        error = values.std(1) / DRAWS**0.5
        result[name] = {"mean": values.mean(1).tolist(), "standard error": error.tolist()}
    return result


def classifier_bias(pair: Pair) -> dict:
    """R6: the classifier's numbers per class, two corrections, and the sweep of an offset.

    The offset is taken from the scores of background and the new classes alike.
    """
    data, base, channels = pair.data, pair.base, pair.step.channels
    norms = pair.last.weight().norm(dim=1)
    biases = torch.cat([c.bias for c in pair.last.classifiers])
    shift = biases[base + 1 :].mean() - biases[1 : base + 1].mean()
    ratio = norms[1 : base + 1].mean() / norms[base + 1 :].mean()
    sums = torch.zeros(channels, channels, dtype=torch.float64, device=data.args.device)
    mass, pixels, tally = torch.zeros_like(sums[0]), torch.zeros_like(sums[0]), {}
    for images, labels in test_batches(pair):
        scores = scores_of(pair.last(images)[0], data.args)
        old, new = scores[:, : base + 1], scores[:, base + 1 :]
        aligned = (new - biases[base + 1 :, None, None]) * ratio + biases[base + 1 :, None, None]
        for name, rest in (("as it is", new), ("bias", new - shift), ("norm", aligned)):
            predicted = torch.cat([old, rest], 1).argmax(1)
            accumulate(tally, name, common.confusion_matrix(labels, predicted, channels))
        best, own = old[:, 1:].max(1)
        rival, other = torch.cat([old[:, :1], new], 1).max(1)
        other = torch.where(other > 0, other + base, BACKGROUND)
        for offset in OFFSETS:
            predicted = torch.where(best > rival - offset, own + 1, other)
            accumulate(tally, offset, common.confusion_matrix(labels, predicted, channels))
        flat, valid = scores.movedim(1, 3)[labels < channels], labels[labels < channels]
        sums.index_add_(0, valid, flat.double())
        pixels += valid.bincount(minlength=channels)
        mass += flat.softmax(1)[(valid > BACKGROUND) & (valid <= base)].double().sum(0)
    means, mass = sums / pixels[:, None], mass / mass.sum()
    ious = {name: {"old": old_iou(c, base), "new": new_iou(c, base)} for name, c in tally.items()}
    everything = [common.iou_per_class(tally[offset]).nanmean().item() for offset in OFFSETS]
    best = max(range(len(OFFSETS)), key=lambda i: everything[i])
    return {
        "classes": {
            name: {"norm": n, "bias": b, "score on own pixels": o, "score on background": g}
            for name, n, b, o, g in zip(
                data.names,
                *(v.tolist() for v in (norms, biases, means.diag(), means[BACKGROUND])),
                strict=False,
            )
        },
        "mass on old pixels": {
            "background": mass[0].item(),
            "old": mass[1 : base + 1].sum().item(),
            "new": mass[base + 1 :].sum().item(),
        },
        "as it is": ious["as it is"],
        "bias difference removed": ious["bias"],
        "weights aligned": ious["norm"],
        "offset": OFFSETS,
        **{f"offset, {k}": [ious[offset][k] for offset in OFFSETS] for k in ("old", "new")},
        "offset, all": everything,
        "best offset for all": OFFSETS[best],
    }


def statistics(pair: Pair) -> dict[str, float]:
    """R9: old IoU with BatchNorm's running statistics of another model, or of other images."""
    data, tally = pair.data, {}
    swapped, measured = copy.deepcopy(pair.last), copy.deepcopy(pair.first)
    running = {k: v for k, v in pair.first.state_dict().items() if ".running_" in k}
    swapped.load_state_dict(running, strict=False)
    for module in measured.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
            module.train()
    view = common.View(data.train, data.labels(data.steps[1]), data.args.crop)
    for images, _ in common.load_in_order(view, data.images[1], data.args):
        if len(images) > 1:
            measured(images)
    models = {
        "last model": pair.last,
        "last model, the first one's statistics": swapped,
        "first model": pair.first,
        "first model, statistics of step 1's images": measured.eval(),
    }
    for images, labels in test_batches(pair):
        for name, model in models.items():
            predicted = scores_of(model(images)[0], data.args).argmax(1)
            found = common.confusion_matrix(labels, predicted, pair.step.channels)
            accumulate(tally, name, found)
    return {name: old_iou(confusion, pair.base) for name, confusion in tally.items()}


def retrain(pair: Pair, depth: str, args: argparse.Namespace) -> dict[str, dict]:
    """R4: the front up to `depth` frozen, all behind it trained anew on every class seen so far.

    It uses the images and labels of all steps: an analysis, not a method. The fronts: the first
    model's, the last one's, and that of the untrained network (with --weights, as step 0 began).
    """
    frozen, result, everything = DEPTHS.index(depth) + 1, {}, common.Step(0, 1, pair.step.last)
    order = pair.data.names[1:]  # the file of --class-order may be gone
    own = argparse.Namespace(**vars(pair.data.args) | {"class_order": order})
    for name, source in (("first", pair.first), ("last", pair.last), ("untrained", None)):
        run = common.Run(own, common.most_likely, "")
        run.folder = pair.folder / f"retrain-{depth}-{name}"
        run.folder.mkdir(exist_ok=True)
        run.data.steps = [everything]
        run.data.images = [common.images_of_step(run.data.classes, everything, "overlapped")]
        torch.manual_seed(own.seed)
        classes = [len(s.new) for s in pair.data.steps[: pair.step.index + 1]]
        model = common.build_model(own, classes).train()
        if source is None:
            run.say(common.load_trunk(model, own.backbone, own.weights))
        for i, part in enumerate(parts(model)[:frozen]):
            if source is not None:
                part.load_state_dict(parts(source)[i].state_dict())
            part.eval().requires_grad_(False)
        optimizer = sgd(model, own.lr[0], args)
        for images, labels in run.batches(everything, model, optimizer):
            logits, _ = model(images)
            valid = labels != IGNORE
            loss = run.log({"ce": run.dense(cross_entropy, logits, labels, valid=valid)})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = common.evaluate(model.eval(), common.most_likely, run.data, everything)
        result[name] = common.averages(common.tables.iou_per_class(found), pair.base, True)
    return result


def analyse(args: argparse.Namespace) -> None:
    """--analyse: RUN/analysis.json for each run, a table, and figures of all of them together."""
    results = {}
    for given in args.analyse:
        name, folder = given.split("=", 1) if "=" in given else (given, given)
        try:
            pair, file = open_pair(folder, args), Path(folder) / "analysis.json"
        except common.InputError as error:
            if len(args.analyse) == 1:
                raise
            print(f"left out: {error}", file=sys.stderr)  # of runs/* a joint run, say
            continue
        print(f"\n{name}: step 0 and step {pair.step.index}", flush=True)

        def found(analysis: Callable, pair: Pair = pair):
            begun = time.monotonic()
            with torch.no_grad():
                result = analysis(pair)
            print(f"  {analysis.__name__}: {time.monotonic() - begun:.0f} s", flush=True)
            return result

        stitching, layers = found(recombined)
        result = {
            "old classes": [pair.data.names[c] for c in pair.data.steps[0].new],
            "steps": [0, pair.step.index],
            "test images": len(pair.data.testing(pair.step)[1]),
            "old pixels": found(old_pixels),
            "stitching": stitching,
            "cka": found(similarity),
            "classifier": found(classifier_bias),
            "layers": layers,
            "statistics": found(statistics),
            "retrained": {},
        }
        if file.exists():
            result["retrained"] = json.loads(file.read_text()).get("retrained", {})
        if args.retrain:
            result["retrained"][args.retrain] = retrain(pair, args.retrain, args)
        results[name] = common.tables.without_nan(result)
        common.write_json(file, results[name])
        print(report(results[name]), flush=True)
    if not results:
        raise common.InputError("--analyse: none of these is a run of two steps or more")
    folder = Path(f"{args.out}-analysis")  # not in it: it is no run
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_figures(results, folder)
    print(f"\nanalysis.json lies in each run's folder; {drawn}")


def report(result: dict) -> str:
    """The analysis as text, percent unless said otherwise."""
    lines: list[str] = []

    def rows(title: str, columns: Sequence[str], table: dict[str, Sequence], digits=2) -> None:
        lines.extend(["", title.ljust(44) + "".join(c.rjust(11) for c in columns)])
        for name, values in table.items():
            cells = ("-" if v is None else f"{v:.{digits}f}" for v in values)
            lines.append(f"  {name}".ljust(44) + "".join(cell.rjust(11) for cell in cells))

    pixels = result["old pixels"]
    short = ("right", "background", "new", "other old")
    shares = {step: [values[k] for k in DESTINATIONS] for step, values in pixels.items()}
    rows("R1 pixels of old classes go to", short, shares)
    keys = ("as predicted", "without background", "without new classes", "without both")
    found = {step: [values[f"IoU {k}"] for k in keys] for step, values in pixels.items()}
    rows("R1 old IoU, counterfactual", ("predicted", "no backgr.", "no new", "neither"), found)
    stitched = {k: v for k, v in result["stitching"].items() if isinstance(v, list)}
    rows("R3 old IoU, % of the first model's", DEPTHS, stitched)
    similar = {}
    for group, values in result["cka"].items():
        similar[f"{group} pixels"], similar[f"{group} pixels, standard error"] = values.values()
    rows("R5 linear CKA, 0 to 1", DEPTHS, similar, digits=3)
    bias = result["classifier"]
    rows(
        "R6 mean softmax mass on old pixels, 0 to 1",
        ("background", "old", "new"),
        {"last model": bias["mass on old pixels"].values()},
    )
    best = bias["offset"].index(bias["best offset for all"])
    corrected = {k: bias[k].values() for k in ("as it is", "bias difference removed")}
    corrected["new weights at the old ones' norm"] = bias["weights aligned"].values()
    corrected[f"background and new less {bias['offset'][best]:g} (best for all)"] = [
        bias[f"offset, {k}"][best] for k in ("old", "new")
    ]
    rows("R6 IoU with the classifier corrected", ("old", "new"), corrected)
    layers = result["layers"]
    rows("R8 drift of the weights, relative", PARTS, {"": layers["drift"].values()}, digits=3)
    for kind in ("old", "new"):
        table = {
            name: [layers[name].get(p, {}).get(kind) for p in PARTS]
            for name in ("reset alone", "reset up to here", "reset behind here")
        }
        table["nothing reset"] = [layers["none reset"][kind]]
        rows(f"R8 {kind} IoU", PARTS, table)
    rows(
        "R9 BatchNorm's statistics", ("old IoU",), {k: [v] for k, v in result["statistics"].items()}
    )
    for depth, values in result["retrained"].items():
        table = {f"front of the {k} model": v.values() for k, v in values.items()}
        rows(f"R4 retrained behind {depth}", ("base", "new", "all", "harmonic"), table)
    return "\n".join(lines)


def draw_figures(results: dict[str, dict], folder: Path) -> str:
    """PNG figures of one or several runs; says where they are."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "figures need one more package: pip install matplotlib"
    for draw, width in (
        (draw_old_pixels, 7),
        (draw_stitching, 10),
        (draw_cka, 14),
        (draw_offset, 10),
        (draw_layers, 10),
    ):
        figure = Figure((width, 3.3), layout="constrained")
        lines = draw(figure, results)
        if lines:
            figure.legend(handles=lines, loc="outside right center", fontsize=8, frameon=False)
        figure.savefig(folder / f"{draw.__name__[5:]}.png", dpi=110)
    return f"figures of all runs in {folder}"


def draw_old_pixels(figure, results: dict[str, dict]) -> list:
    """R1: a bar per run, after its last step; or of a single run, a bar per step."""
    bars = {name: [*result["old pixels"].values()][-1] for name, result in results.items()}
    if len(bars) == 1:
        bars = next(iter(results.values()))["old pixels"]
    axes, left, colours = figure.subplots(), 0, ("#4a9c5d", "#9a9a9a", "#d1495b", "#edae49")
    for kind, colour in zip(DESTINATIONS, colours, strict=True):
        shares = np.array([values[kind] for values in bars.values()])
        axes.barh([*bars], shares, left=left, label=kind, color=colour)
        left = left + shares
    axes.invert_yaxis()
    axes.set(xlabel="pixels of the old classes, %", xlim=(0, 100))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    return []


def draw_stitching(figure, results: dict[str, dict]) -> list:
    """R3: the last model's front, refitted, read by the first one's back; and the mirror image."""
    left, right = figure.subplots(1, 2, sharey=True)
    for name, result in results.items():
        found = result["stitching"]
        left.plot(DEPTHS, found["last front, first back, fitted"], marker="o", label=name)
        right.plot(DEPTHS, found["first front, last back, all channels"], marker="o")
    left.plot(DEPTHS, found["control: untrained front, fitted"], "k:", label="untrained front")
    left.set(title="last front, first back (fitted)", ylabel="old IoU, % of the first model's")
    right.set(title="first front, last back", ylim=(0, 105))
    return left.get_lines()


def draw_cka(figure, results: dict[str, dict]) -> list:
    """R5: by the pixels' truth."""
    panels = figure.subplots(1, 4, sharey=True)
    for axes, group in zip(panels, ("all", "background", "old", "new"), strict=True):
        for name, result in results.items():
            mean, error = (np.array(v, float) for v in result["cka"][group].values())
            axes.errorbar(DEPTHS, mean, error, marker="o", label=name)
        axes.set(title=f"{group} pixels", ylim=(0, 1.03))
        axes.tick_params("x", labelrotation=45)
    panels[0].set(ylabel="linear CKA, first and last model")
    return panels[0].get_legend_handles_labels()[0]


def draw_offset(figure, results: dict[str, dict]) -> list:
    """R6: what an offset on the rivals' scores would bring back."""
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("old", "new"), strict=True):
        for name, result in results.items():
            bias = result["classifier"]
            axes.plot(bias["offset"], bias[f"offset, {kind}"], label=name)
        axes.set(title=f"{kind} classes", xlabel="taken from background's and new scores, nats")
        axes.axvline(0, color="0.8", zorder=0)
    figure.axes[0].set(ylabel="IoU, %")
    return axes.get_lines()[: len(results)]


def draw_layers(figure, results: dict[str, dict]) -> list:
    """R8: the drift of each part, and the old IoU with this part reset."""
    drifts, resets = figure.subplots(1, 2)
    for name, result in results.items():
        layers = result["layers"]
        drifts.plot(PARTS, [*layers["drift"].values()], marker="o", label=name)
        values = [part["old"] for part in layers["reset alone"].values()]
        (line,) = resets.plot(PARTS, values, marker="o")
        resets.axhline(layers["none reset"]["old"], color=line.get_color(), ls=":")
    drifts.set(title="drift of the weights", ylabel="relative to the first model's")
    resets.set(title="one part reset (dotted: none)", ylabel="old IoU, %")
    for axes in (drifts, resets):
        axes.tick_params("x", labelrotation=45)
    return drifts.get_lines()


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, RECIPE)
    parser.set_defaults(head="softmax")
    add = parser.add_argument_group("method").add_argument
    rate = common.rate
    kinds = ("plain", "unbiased", "binary")
    text = "cross-entropy after step 0; binary: a sigmoid per class, in step 0 too (unbiased)"
    add("--ce", choices=kinds, default="unbiased", help=text)
    add("--kd", choices=("none", *kinds), default="unbiased", help="distillation (unbiased)")
    text = "of distillation (unbiased 10, 100 for 15-1: MiB's author; plain 100, binary 10: code)"
    add("--kd-weight", type=rate, help=text)
    add("--alpha", type=rate, default=1.0, help="sharpens the old model's softmax (1: code)")
    text = "new classifiers: shares of the background's, or random (background: paper)"
    add("--init", choices=("background", "random"), default="background", help=text)
    text = "DFT*: after step 0 only the new classifiers learn (off)"
    add("--freeze-old", action="store_true", help=text)
    text = "after step 0 BatchNorm keeps its statistics and weights: for small batches (off: code)"
    add("--freeze-batchnorm", action="store_true", help=text)
    kinds = ("masked", "ignore-old", "ignore-background", "oracle", "pseudo")
    text = "old classes' pixels in new images: as --setting says; left out; left out with all "
    text += "background; their true class; the old model's prediction (masked)"
    add("--labels", choices=kinds, default="masked", help=text)
    text = "this many images of earlier steps stay, with their labels (0)"
    add("--replay", type=common.natural, default=0, metavar="N", help=text)
    text = "of EWC's penalty (0; MiB's baseline 500, at a rate of 0.001)"
    add("--ewc", type=rate, default=0.0, metavar="WEIGHT", help=text)
    text = "ASPP's, head's and classifiers' rate is this times --lr (1: code)"
    add("--head-lr", type=rate, default=1.0, help=text)
    add = parser.add_argument_group("analysis").add_argument
    text = (
        "only analyse finished runs, folders of any of the scripts; NAME=RUN names one in figures"
    )
    add("--analyse", metavar="RUN", nargs="+", help=text)
    text = "with --analyse: train anew all that lies behind this part, as R4 does"
    add("--retrain", choices=DEPTHS, help=text)
    return parser


if __name__ == "__main__":
    common.launch(main, flags())
