"""ILT: knowledge distillation for incremental learning in semantic segmentation.

Michieli, Zanuttigh. CVIU 2021, arXiv 1911.03462; first form: ICCV Workshops 2019, arXiv 1907.13372.
Authors' code of the first form: LTTM/IL-SemSegm.

The first work on the task: no old image is kept, only the old model, and the new one is held to it
at its output, at its encoder, at stages of its decoder, or in how similar it finds the images of a
batch; or the encoder is frozen. In the authors' own protocol (--setting sequential) old classes
keep their labels in new images. Later papers report "ILT" in the protocol of MiB, where they become
background, and there it collapses: the two kinds of tables must never be mixed.

    python ilt.py --task 15-1 --dataset shapes               drawn pictures, minutes on a CPU
    python ilt.py --task 15-1 --data DIR                     Pascal VOC 2012, the authors' protocol
    python ilt.py --task 15-1 --data DIR --preset baseline   "ILT" as in the tables of later papers
    python ilt.py --task 16-5 --dataset msrc --data DIR --keep-later     MSRC-v2

| workshop paper | what                                      | here                     |
|----------------|-------------------------------------------|--------------------------|
| Eq. 1          | L = cross-entropy + weight * distillation | main                     |
| Eq. 2          | cross-entropy over old and new classes    | cross_entropy            |
| Eq. 3          | distillation of the output                | output_distillation      |
| Eq. 4          | distillation of the encoder's map         | encoder_distillation     |
| E_F            | the encoder frozen                        | --freeze-encoder         |
| journal        | several stages of the decoder             | decoder_distillation     |
| journal        | similarity-preserving distillation        | similarity_distillation  |

Each scheme alone, with the weights of the code where it has one (all under --setting sequential):

    --output-kd 0 --no-freeze-encoder                         fine-tuning
    --output-kd 1 --no-freeze-encoder                         output
    --output-kd 0 --no-freeze-encoder --encoder-kd 50         encoder
    --output-kd 0 --no-freeze-encoder --decoder-kd 50         decoder stages
    --output-kd 0 --no-freeze-encoder --similarity-kd 1000    similarity
    --output-kd 0                                             encoder frozen
    (no flag)                                                 encoder frozen, output

Measured: data/RESULTS.md, on shapes, MSRC-v2 and photographs. Not run yet: full VOC 2012, ADE20K.
--preset baseline equals MiB's trainer with its ILT over twelve iterations to 1e-9
(tests/test_trajectories.py).

The journal's text could not be read, only its abstract. Our reconstruction, therefore:
 a. Decoder stages: the mean squared error of the four convolutional branches of the ASPP, before
    their projection, averaged over the branches; the same reduction as Eq. 4 has in the code.
 b. Similarity: Tung & Mori (ICCV 2019) on the encoder's map. --similarity-form pixel compares the
    pixels of each image instead, pooled the images by the means of their maps.
 c. Temperature: softmax(z / T) of both models, no factor T^2. At 1 it is Eq. 3.
 d. Weights of decoder stages and similarity (50, 1000): where one starts, not theirs.

Differences between the papers (p), the authors' code (c) and this file:
 1. Output distillation. p (Eq. 3): the new model's softmax over all classes seen, terms of the
    old ones. c: a head of all 21 classes from the start, on pixels whose label is an old class.
    Here the softmax of p on the pixels of c, which the published numbers come from.
    --output-pixels all takes all valid pixels, those of new classes too, as p (shapes, 15-1,
    all, seed 0: 74.2; on the pixels of c 76.0). --student old is the form of MiB's code (softmax
    over the old channels only, all pixels, mean over channels), which later papers call ILT.
 2. Network. p: DeepLabV2, ResNet-101 at stride 8, pre-trained on MS COCO. Here DeepLabV3 at stride
    16 and torchvision's ImageNet weights; the baseline of later papers has in-place ABN's.
 3. Schedule. p: 1000 iterations per class, batch 4, rate 1e-4 then 5e-5; c: crop 321, BatchNorm's
    statistics frozen. Here MiB's, for all its baselines: 30 epochs, batch 24, crop 512, rate 0.01
    then 0.001, BatchNorm learning; --freeze-batchnorm freezes it after step 0.
 4. Encoder map. p: the squared norm per image; c: the mean over its elements, weight 50. As c.
 5. Frozen encoder. c: it still decays with the weights. Here it does not change at all.
 6. Teacher. c: its outputs are stored once, for one random crop per image. Here it sees each crop.
 7. Weight decay. p: 1e-4; c: not on biases and BatchNorm. Here on everything, as MiB's code.
 8. MSRC-v2. The journal's classes, order and schedule could not be read: the creators' order, and
    the tasks 20-1, 16-5, 16-1 by analogy with VOC. It has no background: unlabelled is ignored, and
    channel 0 stays without a target under --setting sequential.
 9. Test images. c: whole. Here the centre crop of the later papers.
10. ADE20K, --preset baseline. MiB's code: id 0 is left out of the test, and "disjoint" is a stored
    list (difference 16 of mib_unbiased.py). Here id 0 counts as background, as in the rows of later
    papers, and disjoint is the rule of VOC.
11. Precision. c, and MiB's code: float32. Here bfloat16 on a GPU; --precision fp32 is theirs.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from common import IGNORE

# Filled in where the user typed nothing. paper: what did best in the workshop paper's 15-1, the
# code's weight. baseline: MiB's code, method ILT.
PRESETS = {
    "paper": {
        "setting": "sequential",
        "output_kd": 1.0,
        "student": "all",
        "output_pixels": "old",
        "encoder_kd": 0.0,
        "freeze_encoder": True,
        "ignore": ["void", "later"],
    },
    "baseline": {
        "setting": "overlapped",
        "output_kd": 100.0,
        "student": "old",
        "output_pixels": "all",
        "encoder_kd": 100.0,
        "freeze_encoder": False,
        "ignore": ["later"],
    },
}
# The schedule: MiB's README and argument parser (difference 3). Two values: step 0, later steps.
RECIPE = {
    "voc": PRESETS["paper"]
    | {
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
    }
}
RECIPE["ade"] = RECIPE["voc"] | {"epochs": [60]}
RECIPE["msrc"] = RECIPE["voc"] | {"batch": 8, "crop": 256}
RECIPE["folder"] = RECIPE["msrc"] | {"epochs": [60], "backbone": "mobilenet_v2"}
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


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over all classes seen so far (Eq. 2).

    logits      float [B, C, H, W]
    labels      int64 [B, H, W], 255 = ignored
    returns     scalar: mean over valid pixels, nats; no valid pixel: 0 with a gradient
    """
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return loss.sum() / (labels != IGNORE).sum().clamp(min=1)


def output_distillation(
    logits: Tensor,
    old_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    student: str = "all",
) -> Tensor:
    """Cross-entropy between the old model's output and the new one's (Eq. 3).

    logits      float [B, C, H, W]
    old_logits  float [B, O, H, W], of the frozen model, O <= C
    labels      int64 [B, H, W], 255 = ignored by student "all"
    student     "all": the new softmax has all C channels; mean over valid pixels, sum over the old
                channels (the paper). "old": only the O old ones; mean over all pixels and over the
                channels (MiB's code)
    returns     scalar, nats; least: the teacher's entropy, not 0; no valid pixel: 0
    """
    old = old_logits.shape[1]
    p = (old_logits / temperature).softmax(1)
    z = (logits if student == "all" else logits[:, :old]) / temperature
    loss = -(p * z.log_softmax(1)[:, :old]).sum(1)
    if student == "old":
        return loss.mean() / old
    valid = labels != IGNORE
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def encoder_distillation(features: Tensor, old_features: Tensor) -> Tensor:
    """Squared difference of the encoders' maps (Eq. 4): mean over all elements.

    features, old_features      float [B, D, h, w]
    """
    return (features - old_features).square().mean()


def decoder_distillation(stages: list[Tensor], old_stages: list[Tensor]) -> Tensor:
    """Squared difference of several maps of the decoder (our reconstruction, a).

    stages, old_stages      lists of float [B, D, h, w]; where a stage has grown, its first channels
    returns                 scalar: mean over the stages of the mean over all elements
    """
    pairs = zip(stages, old_stages, strict=True)
    return torch.stack([encoder_distillation(x[:, : y.shape[1]], y) for x, y in pairs]).mean()


def similarity_distillation(features: Tensor, old_features: Tensor, form: str = "batch") -> Tensor:
    """Squared difference of who is similar to whom (Tung & Mori, arXiv 1907.09682; b).

    features, old_features      float [B, D, h, w]
    form        "batch": images of the batch by their whole maps; "pooled": by the means of their
                maps; "pixel": the pixels of each image
    returns     scalar: mean over all pairs; 0 for a batch of one image, but in form "pixel".
                On several devices each one compares the images of its own batch
    """

    def similarity(maps: Tensor) -> Tensor:
        q = {
            "batch": lambda: maps.flatten(1),
            "pooled": lambda: maps.mean((2, 3)),
            "pixel": lambda: maps.flatten(2).mT,
        }[form]()
        return F.normalize(q @ q.mT, dim=-1)  # each row to length 1

    return (similarity(features) - similarity(old_features)).square().mean()


def freeze_encoder(model: common.DeepLabV3) -> None:
    """E_F: the trunk learns nothing; its BatchNorm keeps its statistics."""
    model.trunk.eval().requires_grad_(False)


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


def published_name(args: argparse.Namespace) -> str:
    """The rows in data/published.csv: the baseline's, or those of the paper's own protocol."""
    if args.preset == "baseline":
        return "ILT"
    if args.setting != "sequential" or args.decoder_kd or args.similarity_kd or args.encoder_kd:
        return ""
    names = {(True, True): "ILT", (False, False): "FT"}
    return names.get((args.freeze_encoder, args.output_kd > 0), "")


def main(args: argparse.Namespace) -> None:
    _, processes = common.processes()  # under torchrun each one compares its own images
    if args.similarity_kd and args.similarity_form != "pixel" and args.batch < 2 * processes:
        raise common.InputError(
            f"--similarity-kd compares the images of a batch: --batch {2 * processes} or more, or "
            "--similarity-form pixel"
        )
    preset = PRESETS[args.preset].items()
    filled = ", ".join(f"{k} {v}" for k, v in preset if getattr(args, k) == v)
    print(f"preset {args.preset}: {filled}")
    weights = args.output_kd, args.encoder_kd, args.decoder_kd, args.similarity_kd
    run = common.Run(args, common.most_likely, published_name(args))
    for step in run.steps():
        old_model, model = run.models(step)
        first = old_model is None
        model.train()
        if args.freeze_encoder and not first:
            freeze_encoder(model)
        if args.freeze_batchnorm and not first:
            common.freeze_batchnorm(model)
        optimizer = sgd(model, common.per_step(args.lr, step), args)
        net = run.parallel(model)
        for images, labels in run.batches(step, model, optimizer):
            logits, maps = net(images)
            valid = labels != IGNORE
            losses = {"ce": run.dense(cross_entropy, logits, labels, valid=valid)}
            if not first and any(weights):
                with torch.no_grad():
                    old_logits, old_maps = old_model(images)
                encoder, old_encoder = maps["stages"][-1].float(), old_maps["stages"][-1].float()
            if not first and args.output_kd:
                pixels = labels
                if args.output_pixels == "old":
                    pixels = torch.where(labels < step.first, labels, IGNORE)
                valid = pixels != IGNORE if args.student == "all" else None
                how = args.temperature, args.student
                losses["output"] = args.output_kd * run.dense(
                    output_distillation, logits, old_logits, pixels, *how, valid=valid
                )
            if not first and args.encoder_kd:
                losses["encoder"] = args.encoder_kd * encoder_distillation(encoder, old_encoder)
            if not first and args.decoder_kd:
                stages, old_stages = (
                    [m.float() for m in x["branches"][:4]] for x in (maps, old_maps)
                )
                losses["decoder"] = args.decoder_kd * decoder_distillation(stages, old_stages)
            if not first and args.similarity_kd:
                distance = similarity_distillation(encoder, old_encoder, args.similarity_form)
                losses["similarity"] = args.similarity_kd * distance
            loss = run.log(losses)  # Eq. 1: their sum
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.finish(step, model)


class Preset(argparse.Action):
    """Puts a preset's values into the recipes, which fill in what is not typed."""

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        namespace.preset = value
        namespace.recipes = {name: recipe | PRESETS[value] for name, recipe in RECIPE.items()}


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, RECIPE)
    parser.set_defaults(head="softmax", setting=None)  # the setting is the preset's
    add = parser.add_argument_group("method").add_argument
    switch, rate = argparse.BooleanOptionalAction, common.rate
    text = "paper: sequential, encoder frozen, output 1; baseline: overlapped, output and encoder "
    text += "100, as later papers report ILT. Fills in what is not typed (paper)"
    add("--preset", choices=PRESETS, action=Preset, default="paper", help=text)
    add("--output-kd", type=rate, help="weight of Eq. 3 (1: code)")
    add("--encoder-kd", type=rate, help="weight of Eq. 4 (0; alone 50: code)")
    text = "weight of the decoder's stages (0; alone 50: ours)"
    add("--decoder-kd", type=rate, default=0.0, help=text)
    text = "weight of similarity preserving (0; alone 1000: ours)"
    add("--similarity-kd", type=rate, default=0.0, help=text)
    text = "encoder frozen after step 0 (on: paper)"
    add("--freeze-encoder", action=switch, help=text)
    text = "new model's softmax in Eq. 3: over all channels, or over the old ones (all: paper)"
    add("--student", choices=("all", "old"), help=text)
    text = "pixels of Eq. 3: all valid ones (paper), or those labelled as an old class (old: code)"
    add("--output-pixels", choices=("all", "old"), help=text)
    text = "of both softmaxes in Eq. 3 (1: code)"
    add("--temperature", type=common.above_zero, default=1.0, metavar="T", help=text)
    text = "what is compared: the batch's images, their mean features, pixels (batch: ours)"
    forms = ("batch", "pooled", "pixel")
    add("--similarity-form", choices=forms, default="batch", help=text)
    text = "after step 0 BatchNorm keeps its statistics and weights: for small batches (off: code)"
    add("--freeze-batchnorm", action="store_true", help=text)
    text = "ASPP's, head's and classifiers' rate is this times --lr (1: code)"
    add("--head-lr", type=rate, default=1.0, help=text)
    return parser


if __name__ == "__main__":
    common.launch(main, flags())
