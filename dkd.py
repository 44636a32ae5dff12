"""DKD: Decomposed Knowledge Distillation for Class-Incremental Semantic Segmentation.

Baek, Oh, Lee, Lee, Ham. NeurIPS 2022, arXiv 2210.05941. Authors' code: cvlab-yonsei/DKD.

Every class has a sigmoid of its own, so that a new class does not push the old ones down, and
background is where none fires. A logit is positive plus negative evidence; distilling the two apart
holds more than distilling their sum. An auxiliary classifier learns in every step that all pixels
are negatives, and the next step's new classifiers start from it.

Two other methods are called DKD, too: Distribution-based Knowledge Distillation, for the same task
(OpenReview 9qbKOaF8YJ), and Decoupled Knowledge Distillation, for image classification and object
detection (Zhao et al., CVPR 2022, arXiv 2203.08679).

    python dkd.py --task 15-1 --dataset shapes      drawn pictures, minutes on a CPU
    python dkd.py --task 15-1 --data DIR            Pascal VOC 2012

| paper    | what                                                  | here                      |
|----------|-------------------------------------------------------|---------------------------|
| Eq. 1    | L = mbce + alpha kd + beta (positive + negative) + ac | main                      |
| Eq. 2    | logit = f . w + b                                     | common.DeepLabV3          |
| Eq. 3, 4 | multi-class binary cross-entropy of the new classes   | mbce                      |
| Eq. 5    | distillation of the old classes' sigmoids             | kd                        |
| Eq. 6    | logit = positive + negative evidence                  | decomposed_kd             |
| Eq. 7-9  | distillation of both parts                            | decomposed_kd             |
| Eq. 10   | the auxiliary classifier: every pixel is a negative   | auxiliary_loss            |
| Eq. 11   | new classifiers start from the auxiliary one          | initialise                |
| Eq. 12   | background where no class exceeds 0.5                 | predict                   |
| DKD-M    | a memory of earlier images                            | choose_memory             |

Table 3, the ablation, row by row (all with --task 15-1):

    --init random --no-distil-positive --no-distil-negative      mBCE + KD
    --init random
    --no-distil-positive --no-distil-negative
    --no-distil-negative
    --no-distil-positive
    (no flag)                                                    DKD
    --init random --alpha 0 --beta 0                             fine-tuning; not in the paper

Measured: data/RESULTS.md, on shapes and on photographs of VOC 2012. Not run yet: full VOC 2012
and ADE20K with ResNet-101. Losses, learning rates, weights and the confusion matrix of twelve
iterations equal those of the authors' trainer to 1e-9 (tests/test_trajectories.py).

Differences between the paper (p), the authors' code (c) and this file:
 1. Void pixels. p: not mentioned; c: negatives in mbce, part of every other term. As c;
    --ignore void leaves them out of mbce.
 2. Eq. 8, 9. p: mean over the image; c: over the feature map, stride 16. As c.
 3. Eq. 6. p: split by the sign of the product f w; c: by the sign of w, which is the same for
    f >= 0, behind a ReLU as here. As c.
 4. Bias. p: left out "for ease of notation"; c: part of neither term. As c.
 5. Learning rate. p: one; c: ten times as high for ASPP, head and classifiers. As c (--head-lr).
 6. Weight decay. p: not mentioned; c: 1e-4 in step 0, then on the newest classifier only. As c.
 7. BatchNorm and dropout. p: not mentioned; c: frozen and off after step 0. As c; --no-freeze, on
    2,292 photographs, batch 6, 15-1, seed 0, gives 21.4 in all instead of 31.2.
 8. Positive weight in VOC's step 0. p: 2; c: 2 by a script's flag, 1 in the configuration. 2 here.
 9. Precision. p: not mentioned; c: float16 with a scaler. Here bfloat16 without one on a GPU.
10. Background where max p = 0.5 exactly. p: a class; c: background. As c.
11. DKD-M. p: its details could not be read. c, and here: one random crop per image tells what a
    candidate shows, an image can be drawn twice, the classes are shuffled once, and labels of
    earlier classes stay hidden. c: labels the candidates from step 2 on with a network whose
    weights are not loaded yet, and never ends where the candidates run out. Here the trained
    old model labels them, and a smaller memory is a result. The random order is ours.
12. First weights of ASPP, head and all classifiers, the auxiliary one too. p: not mentioned;
    c: kaiming_normal_. As c; torchvision's start gave 70.0 instead of 66.6 on shapes (15-1, all,
    seed 0).
13. ADE20K's 100-50 list of step 0. c: all 20,210 images; here the rule's 20,192, as c in 100-10.
14. A class without a pixel in the test. c: counts as IoU 0. Here it is left out of the means.
15. Test masks of VOC. c: SegmentationClass; here SegmentationClassAug, as the other codes.
16. msrc, folder, shapes: not in the paper, the recipes are ours. For shapes, rate and epochs were
    chosen on the joint run (--task offline); on held-out training images, gamma and a tenth of the
    rate in later steps, both as on VOC, were best.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import BACKGROUND, IGNORE

# VOC and ADE20K: the paper, and the authors' configurations and scripts for what it leaves open
# (see the differences). Two values: step 0, later steps.
RECIPE = {
    "voc": {
        "epochs": [60],
        "batch": 32,
        "lr": [1e-3, 1e-4],
        "crop": 512,
        "backbone": "resnet101",
        "weights": "imagenet",
        "output_stride": 16,
        "dilate_first": False,
        "dropout": 0.1,
        "bn_momentum": 0.01,
        "warmup": 0.0,
        "positive_weight": [2.0, 1.0],
        "ignore": [],
    }
}
RECIPE["ade"] = RECIPE["voc"] | {
    "epochs": [100],
    "batch": 24,
    "lr": [2.5e-3, 2.5e-4],
    "warmup": 0.2,
    "positive_weight": [35.0],
    "ignore": ["later"],
}
RECIPE["msrc"] = RECIPE["voc"] | {"batch": 8, "crop": 256, "ignore": ["void", "later"]}
RECIPE["folder"] = RECIPE["msrc"] | {"epochs": [60], "backbone": "mobilenet_v2", "ignore": ["void"]}
RECIPE["shapes"] = RECIPE["voc"] | {
    "epochs": [15],
    "batch": 8,
    "lr": [0.02, 0.002],
    "crop": 64,
    "backbone": "small",
    "weights": "none",
    "output_stride": 8,
    "bn_momentum": 0.1,
}
WEIGHT_DECAY = 1e-4  # code; in step 0 of everything, later of the newest classifier


def mbce(
    logits: Tensor, labels: Tensor, first: int, pos_weight: float, ignore: int | None = None
) -> Tensor:
    """Multi-class binary cross-entropy of the new classes (Eq. 3, 4).

    logits      float [B, N, H, W], the new classes only
    labels      int64 [B, H, W]; all that is not a new class is a negative of each, void too
    first       id of the first new class
    pos_weight  gamma, the weight of positive pixels
    ignore      a label whose pixels are left out, such as 255; None = as in the authors' code
    returns     scalar: mean over (valid) pixels, sum over classes, nats; no valid pixel: 0
    """
    # -log p = softplus(-z), -log(1 - p) = softplus(z). First all as negatives, then the positives
    loss = F.softplus(logits).sum(1)
    is_new = (labels >= first) & (labels < first + logits.shape[1])
    z = logits.gather(1, (labels - first).clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    loss = loss + torch.where(is_new, pos_weight * F.softplus(-z) - F.softplus(z), 0)
    if ignore is None:
        return loss.mean()
    valid = labels != ignore
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def kd(logits: Tensor, old_logits: Tensor) -> Tensor:
    """Distillation of the old classes' sigmoids (Eq. 5), or of the sigmoids of a part (Eq. 8, 9).

    logits      float [B, K, H, W], the old foreground classes only
    old_logits  float [B, K, H, W], of the frozen model
    returns     scalar: mean over all pixels, sum over classes, nats; least: the teacher's entropy
    """
    if not logits.shape[1]:
        return logits.sum()
    return F.binary_cross_entropy_with_logits(logits, old_logits.sigmoid()) * logits.shape[1]


def decomposed_kd(
    features: Tensor, weight: Tensor, old_features: Tensor, old_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Distillation of positive and negative evidence apart (Eq. 6-9).

    features, old_features  float [B, D, h, w], inputs of the classifiers, >= 0
    weight, old_weight      float [K, D], classifiers of the old foreground classes
    returns                 positive, negative: scalars, mean over cells, sum over classes, nats
    """

    def part(sign: Tensor, old_sign: Tensor) -> Tensor:
        scores = torch.einsum("bdhw,kd->bkhw", features, sign)
        return kd(scores, torch.einsum("bdhw,kd->bkhw", old_features, old_sign))  # Eq. 8, 9

    # Eq. 6: since f >= 0, the sign of f w is the sign of w
    positive = part(weight.clamp(min=0), old_weight.clamp(min=0))
    return positive, part(weight.clamp(max=0), old_weight.clamp(max=0))


def auxiliary_loss(logits: Tensor) -> Tensor:
    """The auxiliary classifier's loss: every pixel is a negative (Eq. 10).

    logits      float [B, 1, H, W]
    returns     scalar: mean over all pixels, nats
    """
    return F.softplus(logits).mean()


@torch.no_grad()
def initialise(model: common.DeepLabV3, init: str) -> None:
    """The new classifiers: copies of the auxiliary one (Eq. 11), or random (Table 3)."""
    auxiliary, new = model.classifiers[0], model.classifiers[-1]
    if init == "auxiliary":
        new.weight.copy_(auxiliary.weight.expand_as(new.weight))
        new.bias.copy_(auxiliary.bias.expand_as(new.bias))
    else:
        nn.init.kaiming_normal_(new.weight)


def initialise_all(model: common.DeepLabV3) -> None:
    """Step 0: all convolutions behind the trunk start at random, as in the authors' code."""
    for module in nn.ModuleList([model.aspp, model.head, model.classifiers]).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)


def freeze(model: common.DeepLabV3) -> None:
    """After step 0: BatchNorm keeps its statistics and its weights, dropout is off."""
    model.eval()
    common.freeze_batchnorm(model)


def sgd(
    model: common.DeepLabV3, lr: float, args: argparse.Namespace, first: bool
) -> torch.optim.SGD:
    """Weight decay on everything in step 0, later on the newest classifier alone."""
    decay = WEIGHT_DECAY if first else 0.0
    head = nn.ModuleList([model.aspp, model.head, *model.classifiers[:-1]])
    groups = [
        {"params": model.trunk.parameters(), "lr": lr, "weight_decay": decay},
        {"params": head.parameters(), "lr": args.head_lr * lr, "weight_decay": decay},
        {
            "params": model.classifiers[-1].parameters(),
            "lr": args.head_lr * lr,
            "weight_decay": WEIGHT_DECAY,
        },
    ]
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=args.device != "cpu")


def predict(logits: Tensor) -> Tensor:
    """Class ids [B, H, W]: the largest sigmoid, background where none exceeds 0.5 (Eq. 12)."""
    score, best = logits[:, 1:].max(1)
    return torch.where(score > 0, best + 1, BACKGROUND)


@torch.no_grad()
def choose_memory(run: common.Run, step: common.Step, old_model: nn.Module) -> list[int]:
    """DKD-M: indices of --memory training images of earlier steps, balanced over the old classes.

    Candidates are the memory so far and the images of the step before, each with what one random
    crop shows of it: its labels in that step and, if that was not step 0, the old model's
    predictions with p >= 0.9 on background. Each class in turn takes the first candidate, in a
    random order, that shows it. The result is kept in memory_K.json, by the pictures' names: the
    next step needs it.
    """
    args, data = run.args, run.data
    file, earlier = (run.folder / f"memory_{k}.json" for k in (step.index, step.index - 1))
    names = [common.sample_name(sample) for sample in data.train]
    place = {name: i for i, name in enumerate(names)}

    def read(path: Path) -> list[tuple[int, list[int]]]:
        return common.read_json(path, lambda kept: [(place[name], ids) for name, ids in kept])

    if (kept := common.usable(file, read, run.say)) is not None:
        return [i for i, _ in kept]
    before = data.steps[step.index - 1]
    candidates = read(earlier) if before.index else []
    view, indices = data.training(before)
    shown = iter(indices)
    for images, labels in common.load_in_order(view, indices, args):
        if before.index:
            logits, _ = old_model(images)
            score, best = common.upsample(logits, labels.shape[1:])[:, 1:].sigmoid().max(1)
            labels = torch.where((labels == BACKGROUND) & (score >= 0.9), best + 1, labels)
        candidates += [(next(shown), own.unique().tolist()) for own in labels]
    rng = np.random.default_rng((args.seed, step.index))
    rng.shuffle(candidates)
    classes, chosen = rng.permutation(step.old).tolist(), []
    while len(chosen) < args.memory:
        found = len(chosen)
        for c in classes:
            match = next((k for k, (_, ids) in enumerate(candidates) if c in ids), None)
            if match is not None and len(chosen) < args.memory:
                chosen.append(candidates.pop(match))
        if len(chosen) == found:
            break  # no other candidate shows an old class
    common.write_json(file, [(names[i], ids) for i, ids in chosen])
    return [i for i, _ in chosen]


def main(args: argparse.Namespace) -> None:
    run = common.Run(args, predict, "DKD-M" if args.memory else "DKD")
    for step in run.steps():
        old_model, model = run.models(step)
        first = old_model is None
        model.train()
        # channel 0 is the auxiliary classifier: it reads the features, but never teaches them
        model.classifiers[0].register_forward_pre_hook(lambda _, inputs: inputs[0].detach())
        if first:
            initialise_all(model)
        else:
            initialise(model, args.init)
        if args.freeze and not first:
            freeze(model)
        memory = choose_memory(run, step, old_model) if args.memory and not first else []
        memory = [(i, run.data.labels(step)) for i in memory]
        gamma = common.per_step(args.positive_weight, step)
        old, new = slice(1, step.first), slice(step.first, step.channels)  # channels
        optimizer = sgd(model, common.per_step(args.lr, step), args, first)
        net = run.parallel(model)
        for images, labels in run.batches(step, model, optimizer, memory=memory):
            logits, maps = net(images)
            target, valid = (labels, step.first, gamma, IGNORE), labels != IGNORE
            losses = {
                "mbce": run.dense(mbce, logits[:, new], *target, valid=valid),
                "ac": run.dense(auxiliary_loss, logits[:, :1]),
            }
            if not first and (args.alpha or args.beta):
                with torch.no_grad():
                    old_logits, old_maps = old_model(images)
                losses["kd"] = args.alpha * run.dense(kd, logits[:, old], old_logits[:, old])
                positive, negative = decomposed_kd(
                    maps["head"].float(),
                    model.weight()[old],
                    old_maps["head"].float(),
                    old_model.weight()[old],
                )
                losses["positive"] = args.beta * args.distil_positive * positive
                losses["negative"] = args.beta * args.distil_negative * negative
            loss = run.log(losses)  # Eq. 1: their sum
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.finish(step, model)


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, RECIPE)
    parser.set_defaults(head="sigmoid")
    add = parser.add_argument_group("method").add_argument
    switch, rate = argparse.BooleanOptionalAction, common.rate
    add("--alpha", type=rate, default=5.0, help="weight of kd, Eq. 1 (5: paper)")
    add("--beta", type=rate, default=5.0, help="weight of the decomposed terms, Eq. 1 (5: paper)")
    add("--distil-positive", action=switch, default=True, help="positive evidence, Eq. 8 (on)")
    add("--distil-negative", action=switch, default=True, help="negative evidence, Eq. 9 (on)")
    text = "new classifiers, Eq. 11 (auxiliary: paper)"
    add("--init", choices=("auxiliary", "random"), default="auxiliary", help=text)
    text = "gamma, Eq. 3, step 0 and later (voc 2 1, ade 35: paper)"
    add("--positive-weight", type=rate, nargs="+", help=text)
    text = "BatchNorm frozen and dropout off after step 0 (on: code)"
    add("--freeze", action=switch, default=True, help=text)
    text = "ASPP's, head's and classifiers' rate is this times --lr (10: code)"
    add("--head-lr", type=rate, default=10.0, help=text)
    text = "DKD-M: images of earlier steps (0; 100 on voc, 300 on ade: code)"
    add("--memory", type=common.natural, default=0, metavar="N", help=text)
    return parser


if __name__ == "__main__":
    common.launch(main, flags())
