"""MiB's losses against the authors' functions (golden.json) and the formulas; the analyses."""

import importlib.util
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trees
from torch import nn
from trees import EXACT, METHODS, TINY, assert_as, value_and_gradient

import common
import mib_unbiased as mib

FLOAT32 = {"rel": 1e-6, "abs": 1e-6}  # the published function casts to float32
CASES = [
    "voc15-1_step1_seed11",
    "voc15-5_step1_seed21",
    "voc15-1_step3_seed31",
    "ade100-10_step1_seed41",
    "edge_all_void",
    "edge_no_new_pixel",
    "edge_old_ids_in_labels",
    "edge_old_is_background_only",
    "edge_first_step_no_old",
    "edge_alpha_0.5",
]


def draw(case):
    """Logits, old logits, labels: drawn in the golden file's order."""
    rng, old = np.random.default_rng(case["seed"]), case["C_old"]
    size = case["H"], case["W"]
    z, z_old = (
        torch.tensor(rng.standard_normal((case["B"], c, *size)) * case["scale"]) if c else None
        for c in (old + case["C_new"], old)
    )
    labels = torch.tensor(rng.choice(np.array(case["label_values"]), size=(case["B"], *size)))
    if case["note"].startswith("y[...]=255"):
        labels[...] = 255
    assert z.sum().item() == pytest.approx(case["input_check"]["z_sum"])
    return z, z_old, labels


# losses


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_the_authors(golden, name):
    """The authors divide cross-entropy by all pixels, ours by the valid ones: "trainer"."""
    cases = golden["mib"]["cases"]
    assert [*cases] == CASES
    case = cases[name]
    (z, z_old, labels), old = draw(case), case["C_old"]
    alpha, part = case["alpha"], (labels != 255).double().mean()

    def weighted(base, weight, kd):
        return lambda z: base(z) + weight * kd(z)

    losses = {
        "ce_valid_mean": lambda z: mib.cross_entropy(z, labels),
        "ce_trainer": lambda z: part * mib.cross_entropy(z, labels),
        "unce_valid_mean": lambda z: mib.unbiased_cross_entropy(z, labels, old),
        "unce_trainer": lambda z: part * mib.unbiased_cross_entropy(z, labels, old),
        "unkd": lambda z: mib.unbiased_distillation(z, z_old, alpha),
        "kd_lwf": lambda z: mib.distillation(z, z_old, alpha),
        "lwfmc_bce_part": lambda z: part * mib.binary_cross_entropy(z, labels),
    }
    for weight in (10, 100):
        total = weighted(losses["unce_trainer"], weight, losses["unkd"])
        losses[f"mib_total_w{weight}"] = total
    losses["lwf_total_w100"] = weighted(losses["ce_trainer"], 100, losses["kd_lwf"])
    binary = lambda z: mib.binary_distillation(z, z_old)  # noqa: E731
    losses["lwfmc_total_w10"] = weighted(losses["lwfmc_bce_part"], 10, binary)
    for key, expected in case["results"].items():
        value, gradient = value_and_gradient(losses[key], z)
        near = FLOAT32 if key.startswith("lwfmc") else EXACT
        if expected["loss"] is None:  # not a number there, 0 here
            assert value == 0 and (gradient == 0).all()
            continue
        assert value == pytest.approx(expected["loss"], **near), key
        assert gradient.norm().item() == pytest.approx(expected["grad_norm"], **near), key
        background = gradient[:, 0].norm().item()
        assert background == pytest.approx(expected["grad_norm_channel0"], **near), key


def test_masked_distillation_equals_the_authors(golden):
    rng = np.random.default_rng(90)
    z, z_old = (torch.tensor(rng.standard_normal((2, c, 5, 6)) * 2) for c in (17, 16))
    labels = torch.tensor(rng.choice(np.array([0, 16]), size=(2, 5, 6)))
    expected = golden["mib"]["masked_kd"]
    mask = labels == 0
    assert mask.sum() == expected["n_mask"]
    for key, loss in (("kd", mib.distillation), ("unkd", mib.unbiased_distillation)):
        found = value_and_gradient(lambda z, loss=loss: loss(z, z_old, mask=mask), z)
        assert_as(found, expected[key]["loss"], expected[key]["grad_norm"], key)


def test_an_old_model_equal_to_the_merged_new_one_has_no_gradient(golden):
    z = torch.tensor(np.random.default_rng(80).standard_normal((1, 21, 3, 3)) * 2)
    merged = torch.cat([z[:, :1], z[:, 16:]], 1).logsumexp(1, keepdim=True)
    value, gradient = value_and_gradient(
        lambda z: mib.unbiased_distillation(z, torch.cat([merged, z[:, 1:16]], 1).detach()), z
    )
    assert value == pytest.approx(golden["mib"]["fixed_point"]["loss"], **EXACT)
    assert gradient.norm() < 1e-15


def slow_unbiased(z, labels, old, keep=False):
    """MiB Eq. 5 and 6, pixel by pixel."""
    q, terms = z.softmax(1), []
    for b, y, x in itertools.product(*map(range, labels.shape)):
        c, here = labels[b, y, x].item(), q[b, :, y, x]
        if c != 255:
            merged = c == 0 or (c < old and not keep)
            terms.append(-(here[:old].sum() if merged else here[c]).log())
    return torch.stack(terms).mean()


def slow_distillation(z, z_old, alpha):
    """MiB Eq. 8 and 9."""
    q, p, old = z.softmax(1), (alpha * z_old).softmax(1), z_old.shape[1]
    merged = torch.cat([q[:, :1] + q[:, old:].sum(1, keepdim=True), q[:, 1:old]], 1)
    return -(p * merged.log()).sum(1).mean() / old


@pytest.mark.parametrize(("old", "new"), [(1, 1), (4, 1), (3, 4), (5, 0)])
def test_losses_are_the_formulas(old, new):
    torch.manual_seed(old)
    z = torch.randn(2, old + new, 3, 4, dtype=torch.float64) * 3
    z_old = torch.randn(2, old, 3, 4, dtype=torch.float64) * 3
    labels = torch.randint(0, old + new, (2, 3, 4))
    labels[0, 0] = 255
    for keep in (False, True):
        ours = mib.unbiased_cross_entropy(z, labels, old, keep)
        assert ours.item() == pytest.approx(slow_unbiased(z, labels, old, keep).item(), **EXACT)
    plain = F.cross_entropy(z, labels, ignore_index=255)
    assert mib.cross_entropy(z, labels).item() == pytest.approx(plain.item(), **EXACT)
    for alpha in (0.5, 1.0, 3.0):
        ours, slow = mib.unbiased_distillation(z, z_old, alpha), slow_distillation(z, z_old, alpha)
        assert ours.item() == pytest.approx(slow.item(), **EXACT)
        ours, slow = mib.distillation(z, z_old, alpha), slow_distillation(z[:, :old], z_old, alpha)
        assert ours.item() == pytest.approx(slow.item(), **EXACT)


def test_losses_do_not_see_a_constant_added_to_all_logits():
    torch.manual_seed(0)
    z, z_old = torch.randn(1, 6, 2, 2).double(), torch.randn(1, 4, 2, 2).double()
    labels = torch.tensor([[[0, 4], [5, 255]]])
    for loss in (
        lambda z, o: mib.unbiased_cross_entropy(z, labels, 4),
        mib.unbiased_distillation,
        mib.distillation,
    ):
        assert loss(z + 7, z_old - 5).item() == pytest.approx(loss(z, z_old).item(), **EXACT)


def test_gradients_of_the_losses():
    torch.manual_seed(1)
    z = torch.randn(1, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    z_old = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    labels = torch.tensor([[[0, 1], [4, 255]]])
    for loss in (
        lambda z: mib.unbiased_cross_entropy(z, labels, 3, keep=True),
        lambda z: mib.unbiased_distillation(z, z_old, 2.0),
        lambda z: mib.distillation(z, z_old),
        lambda z: mib.binary_cross_entropy(z, labels),
        lambda z: mib.binary_distillation(z, z_old),
    ):
        assert torch.autograd.gradcheck(loss, z)


def test_pseudo_labels_stand_in_for_background():
    z_old = torch.tensor([[0.0, 3, 1], [9.0, 8, 7], [0.0, 3, 1], [0.0, 3, 1]]).T[None, :, None]
    found = mib.pseudo_labels(z_old, torch.tensor([[[0, 0, 4, 255]]]))
    assert found.flatten().tolist() == [1, 0, 4, 255]


@pytest.mark.parametrize("scale", [60.0, 1e4])
def test_losses_are_finite_for_huge_logits_and_without_a_valid_pixel(scale):
    torch.manual_seed(2)
    z = (torch.randn(1, 5, 3, 3) * scale).requires_grad_()
    z_old, void = torch.randn(1, 3, 3, 3) * scale, torch.full((1, 3, 3), 255)
    for labels in (torch.randint(0, 5, (1, 3, 3)), void):
        z.grad = None
        loss = mib.unbiased_cross_entropy(z, labels, 3) + mib.unbiased_distillation(z, z_old)
        loss = loss + mib.binary_cross_entropy(z, labels) + mib.distillation(z, z_old)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()
    assert mib.unbiased_cross_entropy(z, void, 3) == 0 == mib.binary_cross_entropy(z, void)


# a step


@pytest.mark.parametrize("which", [0, 1])
def test_new_classifiers_share_the_backgrounds_probability(golden, which):
    expected = golden["mib"]["classifier_init"][which]
    rng, (first, new) = np.random.default_rng(expected["seed"]), expected["classes"]
    heads = [
        (torch.tensor(rng.standard_normal((n, 4, 1, 1))), torch.tensor(rng.standard_normal(n)))
        for n in (first, new)
    ]
    x = torch.tensor(rng.standard_normal((1, 4, 1, 1)))
    heads[:1] = [tuple(v[:1] for v in heads[0]), tuple(v[1:] for v in heads[0])]
    model = common.DeepLabV3("small", 8, [first - 1, new])
    model.classifiers = nn.ModuleList(nn.Conv2d(4, len(b), 1).double() for _, b in heads)
    for conv, (weight, bias) in zip(model.classifiers, heads, strict=True):
        conv.weight.data, conv.bias.data = weight.clone(), bias.clone()
    background, old, added = model.classifiers
    before = torch.cat([background(x), old(x)], 1).softmax(1).flatten()
    mib.initialise(model)
    after = torch.cat([conv(x) for conv in model.classifiers], 1).softmax(1).flatten()
    assert background.bias.item() == pytest.approx(expected["after"]["b_bkg"], abs=1e-6)
    assert added.bias.tolist() == pytest.approx(expected["after"]["new_head_bias"], abs=1e-6)
    row = expected["after"]["new_head_weight_row0"]
    assert all(w.flatten().tolist() == pytest.approx(row, abs=1e-6) for w in added.weight)
    assert torch.equal(old.weight, heads[1][0]) and torch.equal(old.bias, heads[1][1])
    assert torch.equal(background.weight, heads[0][0])
    assert before[0].item() == pytest.approx(expected["probs"]["p_old_bkg"], rel=1e-6)
    assert after[0].item() == pytest.approx(expected["probs"]["p_new_bkg"], rel=1e-6)
    assert after[first:].tolist() == pytest.approx(expected["probs"]["p_new_each_new"], rel=1e-6)
    assert after[1:first].tolist() == pytest.approx(before[1:].tolist())


def test_right_after_initialisation_the_unbiased_losses_are_at_their_least():
    """Old classes keep their outputs, distillation has no gradient: what Sec. 3.3 is for."""
    torch.manual_seed(3)
    old_model, model = common.DeepLabV3("small", 8, [3]), common.DeepLabV3("small", 8, [3, 2])
    model.load_state_dict(old_model.state_dict(), strict=False)
    mib.initialise(model)
    images = torch.randn(2, 3, 64, 64)
    (z, _), (z_old, _) = model.eval()(images), old_model.eval()(images)
    p, p_old = z.softmax(1), z_old.softmax(1)
    assert torch.allclose(p[:, 1:4], p_old[:, 1:], atol=1e-6)
    assert torch.allclose(3 * p[:, [0, 4, 5]], p_old[:, :1].expand(-1, 3, -1, -1), atol=1e-5)
    z_old = z_old.detach().double()
    _, gradient = value_and_gradient(lambda z: mib.unbiased_distillation(z, z_old), z.double())
    assert gradient.norm() < 1e-7
    assert math.isclose(p.sum(1).mean().item(), 1, rel_tol=1e-5)


def test_the_rate_falls_as_in_the_authors_code(golden):
    rates = [0.01 * common.poly(i, 10) for i in range(10)]
    assert rates == pytest.approx(golden["mib"]["poly_lr"], **EXACT)


# the grid


def losses_in(folder):
    header, *rows = (folder / "train.csv").read_text().splitlines()
    return dict(zip(header.split(","), rows[-1].split(","), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "name", "parts"),
    [
        ("", "MiB", {"ce", "kd"}),
        ("--ce plain --kd none --init random", "FT", {"ce"}),
        ("--ce plain --kd plain --init random", "LwF", {"ce", "kd"}),
        ("--ce binary --kd binary --init random", "LwF-MC", {"ce", "kd"}),
        ("--ce plain --kd none --init random --ewc 5", "EWC", {"ce", "ewc"}),
        ("--ce plain --kd none --init random --freeze-old", "", {"ce"}),
        ("--kd none --replay 7", "", {"ce"}),
        ("--labels ignore-old", "", {"ce", "kd"}),
        ("--labels ignore-background --kd none", "", {"ce"}),
        ("--labels oracle", "", {"ce", "kd"}),
        ("--labels pseudo --kd none", "", {"ce"}),
        ("--task offline", "MiB", {"ce"}),
    ],
)
def test_every_row_of_the_grid_runs(start, flags, name, parts):
    status, _, err = start(f"{TINY} --epochs 1 {flags} --out grid", method="mib_unbiased")
    assert (status, err) == (0, "")
    (folder,) = Path("grid").iterdir()
    assert {*losses_in(folder)} == {"step", "iteration", "lr_factor", *parts}
    args = mib.flags().parse_args(flags.split())
    assert mib.published_name(args) == name


def test_the_weight_of_distillation_follows_the_author():
    for flags, weight in (
        ("--task 15-1", 100),
        ("--task 15-5", 10),
        ("--task 15-5 --kd plain", 100),
        ("--task 15-1 --kd binary", 10),
        ("--task 15-1 --kd-weight 3", 3),
    ):
        assert mib.distillation_weight(mib.flags().parse_args(flags.split())) == weight


SETS = ([1, 2], [3, 4], [4, 5], [1], [2, 5], [3], [4])  # class ids, in the order below


def five_classes(root, flags=""):
    """Three classes, then one each; own pictures, whose ids 2, 1, 4, 3, 5 are the classes 1-5."""
    raw = [[(2, 1, 4, 3, 5)[c - 1] for c in ids] for ids in SETS]
    names = ["a", "b", "c", "d", "e"]
    if not root.exists():
        trees.own(root, raw, raw[:1], names)
        (root / "order.txt").write_text("b\na\nd\nc\ne")
    typed = f"--dataset folder --task 3-1 --data {root} --class-order {root}/order.txt {flags}"
    return common.Data(trees.arguments("mib_unbiased", f"{typed} --ignore void later"))


def test_what_old_pixels_are_labelled(tmp_path):
    """In the step of class 4 the later class 5 is hidden."""
    expected = {
        "masked": [0, 0, 0, 4, 0, 0, 255],
        "masked --setting sequential": [0, 2, 1, 4, 3, 0, 255],
        "ignore-old": [0, 255, 255, 4, 255, 0, 255],
        "ignore-background": [255, 255, 255, 4, 255, 255, 255],
        "oracle": [0, 2, 1, 4, 3, 0, 255],
        "pseudo": [0, 0, 0, 4, 0, 0, 255],
    }
    for flags, values in expected.items():
        kind, *setting = flags.split(" ", 1)
        data = five_classes(tmp_path / "own", *setting)
        table = mib.step_labels(data, data.steps[1], kind)
        assert table[[0, 1, 2, 3, 4, 5, 255]].tolist() == values
    assert mib.step_labels(data, data.steps[0], "ignore-background")[0] == 0  # no old classes yet


def test_replayed_images_keep_their_own_labels_and_were_kept_before(tmp_path):
    data = five_classes(tmp_path / "own")
    assert mib.replay(data, data.steps[0], 5) == []
    first, second = (mib.replay(data, step, 5) for step in data.steps[1:])
    assert len(first) == len(second) == 5
    shown = {label for i, table in first for label in table if label < 255}
    assert shown == {0, 1, 2, 3}  # of step 0
    of_step = {i: sorted({int(table[raw]) for raw in range(6)} - {0, 255}) for i, table in second}
    assert [4] in of_step.values() and [1, 2, 3] in of_step.values()
    kept = {i for i, table in second if table[data.order[0]] == 1}
    assert kept <= {i for i, _ in first}
    assert all({*SETS[i]} & {*classes} for i, classes in of_step.items())
    assert len(mib.replay(data, data.steps[2], 100)) == 5 + 3  # all there are
    for data.args.seed in range(5):  # the first one shows the first class
        ((i, _),) = mib.replay(data, data.steps[1], 1)
        assert 1 in SETS[i]


def test_ewcs_penalty_is_the_formula():
    old_model, model = nn.Linear(2, 1), nn.Linear(2, 1)
    f = {"weight": torch.tensor([[1.0, 0.5]]), "bias": torch.tensor([0.0])}
    difference = (model.weight - old_model.weight).detach().flatten()
    slow = difference[0] ** 2 + 0.5 * difference[1] ** 2
    assert mib.ewc_penalty(model, old_model, f).item() == pytest.approx(slow.item())


@pytest.mark.slow
def test_ewc_holds_what_mattered(start):
    """Nearly infinite, it keeps every weight that had a gradient."""
    moved, flags = {}, f"{TINY} --ce plain --kd none --init random --epochs 2 4 --lr 0.002 0.01"
    for weight in (0.01, 30):
        assert start(f"{flags} --ewc {weight} --out w{weight}", method="mib_unbiased")[0] == 0
        folder = Path(f"w{weight}") / trees.folder_name("mib_unbiased").name
        sums = torch.load(folder / "ewc_1.pt", weights_only=True)
        a, b = (torch.load(folder / f"step_{k}.pt", weights_only=True)["model"] for k in (0, 1))
        moved[weight] = sum((sums[k] * (b[k] - a[k]) ** 2).sum() / sums[k].max() for k in sums)
    assert moved[30] < 0.5 * moved[0.01]
    assert {*sums} == {k for k in a if "running" not in k and "num_batches" not in k}
    assert all((v >= 0).all() for v in sums.values()) and sums["head.0.weight"].sum() > 0


def test_all_parameters_learn_at_one_rate_unless_the_head_has_its_own():
    model = common.DeepLabV3("small", 8, [3, 1])
    for flags, rates in (("", [0.1, 0.1]), (" --head-lr 3", [0.1, pytest.approx(0.3)])):
        args = trees.arguments("mib_unbiased", f"--dataset shapes{flags}")
        groups = mib.sgd(model, 0.1, args).param_groups
        ids = [{id(p) for p in group["params"]} for group in groups]
        assert ids[0] == {id(p) for p in model.trunk.parameters()} and not ids[0] & ids[1]
        assert ids[0] | ids[1] == {id(p) for p in model.parameters()}
        assert [group["lr"] for group in groups] == rates
        assert all(g["weight_decay"] == 1e-4 and g["nesterov"] for g in groups)


@pytest.mark.parametrize("what", ["batchnorm", "old"])
def test_what_is_frozen_keeps_its_weights_and_statistics(what):
    model = common.DeepLabV3("small", 8, [3, 1]).train()
    common.freeze_batchnorm(model) if what == "batchnorm" else mib.freeze_old(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = mib.sgd(model, 0.1, trees.arguments("mib_unbiased", "--dataset shapes"))
    model(torch.randn(4, 3, 64, 64))[0].square().mean().backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    newest = {"classifiers.2.weight", "classifiers.2.bias"}
    norms = [name for name, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    others = {k for k in before if k.rpartition(".")[0] not in norms}
    assert changed == (others if what == "batchnorm" else newest)


# the analysis


def test_destinations_of_old_pixels_are_counted():
    confusion = torch.tensor(
        [[50, 0, 0, 0], [6, 2, 1, 1], [0, 0, 8, 0], [3, 3, 3, 3]]  # background, 2 old, 1 new
    )
    found = mib.destinations(confusion, 2)
    assert found.tolist() == [[20, 60, 10, 10], [100, 0, 0, 0]]
    confusion[2] = 0
    assert mib.destinations(confusion, 2)[1].isnan().all()
    # IoU without the new class's row: 50/56, 2/10, 0/1 is absent
    assert mib.old_iou(confusion, 2) == pytest.approx(100 * (50 / 56 + 2 / 10) / 2)
    assert mib.new_iou(confusion, 2) == pytest.approx(100 * 3 / 13)


def test_counterfactuals_take_a_rival_away():
    #                      background, old 1, old 2, new 3
    scores = torch.tensor([[9.0, 5, 4, 8], [1.0, 2, 6, 7], [9.0, 1, 2, 3], [9.0, 3, 1, 5]])
    scores, labels = scores.T[None, :, :, None], torch.tensor([1, 2, 0, 255])[None, :, None]
    found = mib.counterfactuals(scores, labels, 2)
    assert {k: v.flatten().tolist()[:3] for k, v in found.items()} == {
        "as predicted": [0, 3, 0],
        "without background": [3, 3, 0],  # only where the truth is foreground
        "without new classes": [0, 2, 0],
        "without both": [1, 2, 0],
    }


def test_cka_is_the_slow_formula_and_does_not_see_rotation_or_scale():
    torch.manual_seed(0)
    x, y = torch.randn(50, 4).double() + 3, torch.randn(50, 6).double()
    y[:, :4] += x
    centre = torch.eye(50).double() - 1 / 50
    kx, ky = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    slow = ((kx * ky).sum() / (kx.norm() * ky.norm())).item()
    assert mib.cka(mib.moments(x, y), 4) == pytest.approx(slow, **EXACT)
    halves = mib.moments(x[:20], y[:20]) + mib.moments(x[20:], y[20:])
    assert mib.cka(halves, 4) == pytest.approx(slow, **EXACT)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4).double())
    assert mib.cka(mib.moments(x, 7 * x @ rotation - 2), 4) == pytest.approx(1, **EXACT)
    assert mib.cka(mib.moments(x, torch.randn(50, 4).double()), 4) < 0.3


def test_least_squares_finds_the_affine_map():
    torch.manual_seed(1)
    x = torch.randn(200, 5).double() * torch.tensor([1, 2, 3, 1, 0]) + 1  # a dead channel too
    weight, bias = torch.randn(5, 3).double(), torch.randn(3).double()
    w, b = mib.least_squares(mib.moments(x, x @ weight + bias), 5)
    assert torch.allclose(x @ w + b, x @ weight + bias, atol=5e-3)
    noisy = x @ weight + bias + torch.randn(200, 3).double()
    w, b = mib.least_squares(mib.moments(x, noisy), 5)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(200, 1)], 1)[:, [0, 1, 2, 3, 5]], noisy)
    error = (x @ w + b - noisy).square().sum()
    exact = (torch.cat([x[:, :4], torch.ones(200, 1)], 1) @ best.solution - noisy).square().sum()
    assert error.item() == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize("backbone", ["small", "resnet18", "resnet50", "mobilenet_v2", "swin_t"])
def test_the_parts_make_up_the_network(backbone):
    swin = backbone == "swin_t"
    model = common.DeepLabV3(backbone, 32 if swin else 16, [3, 1]).eval()
    images = torch.randn(2, 3, 64, 64)
    network = mib.parts(model)
    with torch.no_grad():
        logits, features = model(images)
        maps = mib.maps_of(network, images)
        assert torch.equal(mib.through(network, images), logits)
    assert len(network) == len(mib.PARTS) and len(maps) == len(mib.DEPTHS)
    skipped = 3 if swin else 0  # the next stage takes the map before its norm
    for own, of_network in zip(maps[1 + skipped : 5], features["stages"][skipped:], strict=True):
        assert torch.equal(own, of_network)
    assert torch.equal(maps[5], torch.cat(features["branches"], 1))
    assert torch.equal(maps[6], features["head"])
    ids = [id(p) for part in network for p in part.parameters()]
    assert len({*ids}) == len(ids) == len([*model.parameters()])


@pytest.fixture
def pair(few_shapes, tmp_path):
    """What a run leaves whose last model is its first one, with two classifiers more."""
    args = trees.arguments(
        "mib_unbiased", f"--task 18-1 --dataset shapes --crop 32 --batch 20 --out {tmp_path}"
    )
    run = common.Run(args, common.most_likely, "")
    run.folder.mkdir()
    torch.manual_seed(0)
    first = trees.lively(run.build(run.data.steps[0]), run.data)
    for step in run.data.steps:
        model = run.build(step)
        model.load_state_dict(first.state_dict(), strict=False)
        for classifier in model.classifiers[2:]:  # the later classes never win
            nn.init.zeros_(classifier.weight)
            nn.init.constant_(classifier.bias, -100)
        torch.save({"model": model.state_dict()}, run.folder / f"step_{step.index}.pt")
    (run.folder / "config.json").write_text(
        json.dumps({"flags": vars(args), "classes": run.data.names})
    )
    return mib.open_pair(run.folder, args)


@torch.no_grad()
def test_a_model_with_itself_has_forgotten_nothing(pair):
    stitching, layers = mib.recombined(pair)
    reference = stitching.pop("old IoU of the first model")
    untrained = stitching.pop("control: untrained front, fitted")
    for name, curve in stitching.items():
        near = {"abs": 5} if "fitted" in name else {"abs": 1e-9}
        assert curve == pytest.approx([100] * 7, **near), name
    assert untrained != pytest.approx([100] * 7, abs=2)
    assert set(layers["drift"].values()) == {0}
    for name in ("reset alone", "reset up to here", "reset behind here"):
        assert all(part == layers["none reset"] for part in layers[name].values())
    assert layers["none reset"]["old"] == pytest.approx(reference)
    for values in mib.similarity(pair).values():
        known = [v for v in values["mean"] if not math.isnan(v)]
        assert known == pytest.approx([1] * len(known))
    numbers = [*mib.statistics(pair).values()]
    assert numbers[0] == numbers[1] == numbers[2] == pytest.approx(reference)


@torch.no_grad()
def test_a_permuted_layer_is_found_again_by_least_squares(pair):
    """Channels of the last model's head in another order: the same function, other maps."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    conv, norm, _ = pair.last.head
    conv.weight.copy_(conv.weight[order])
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        values.copy_(values[order])
    for classifier in pair.last.classifiers:
        classifier.weight.copy_(classifier.weight[:, order])
    images = torch.randn(2, 3, 32, 32)
    logits = [m(images)[0][:, :19] for m in (pair.first, pair.last)]
    assert torch.allclose(*logits, atol=1e-4)
    stitching, layers = mib.recombined(pair)
    assert stitching["last front, first back"][:6] == pytest.approx([100] * 6, abs=1)
    assert stitching["last front, first back"][6] != pytest.approx(100, abs=5)
    assert stitching["last front, first back, fitted"][6] == pytest.approx(100, abs=5)
    assert layers["drift"]["head"] > 0.1 and layers["drift"]["aspp"] == 0


@torch.no_grad()
def test_a_bias_towards_new_classes_is_seen_and_taken_back(pair):
    for classifier in pair.last.classifiers[2:]:
        classifier.bias.fill_(10.0)
    before, _, after = mib.old_pixels(pair).values()
    assert after["new classes"] == pytest.approx(100) and after["right"] == 0
    assert after["IoU as predicted"] < after["IoU without new classes"]
    assert after["IoU without new classes"] == pytest.approx(before["IoU as predicted"])
    found = mib.classifier_bias(pair)
    assert found["mass on old pixels"]["new"] > 0.9
    assert sum(found["mass on old pixels"].values()) == pytest.approx(1)
    offset = dict(zip(found["offset"], found["offset, old"], strict=True))
    assert offset[0] == pytest.approx(found["as it is"]["old"]) and offset[0] < offset[16]
    classes = [*found["classes"].values()]
    assert classes[-1]["norm"] == 0 and classes[-1]["bias"] == 10
    assert classes[-1]["score on own pixels"] == pytest.approx(10)


def test_scores_of_sigmoids_have_a_background_of_zero():
    args = trees.arguments("dkd", "--dataset shapes")
    scores = mib.scores_of(torch.tensor([[9.0, -1, -2], [9.0, 1, 2]])[..., None, None], args)
    assert scores.shape == (2, 3, args.crop, args.crop)
    assert scores.argmax(1)[:, 0, 0].tolist() == [0, 2]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_analysis_of_a_run(start, method):
    order = Path("order.txt")
    order.write_text("\n".join(str(c) for c in range(1, 21)))
    flags = f"{TINY} --setting overlapped --class-order {order}"
    assert start(flags, method=method)[0] == 0
    order.unlink()  # the run's checkpoints know its classes
    folder = trees.folder_name(method)
    files = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    flags = f"--analyse first={folder} {folder} --out figures --retrain stage4"
    status, out, err = start(flags, method="mib_unbiased")
    assert (status, err) == (0, "")
    content = json.loads((folder / "analysis.json").read_text())
    step = content["old pixels"]["step 1"]
    assert sum(step[k] for k in mib.DESTINATIONS) == pytest.approx(100)
    assert len(content["stitching"]["last front, first back"]) == 7
    assert {*content["cka"]} == {"all", "background", "old", "new"}
    assert {*content["retrained"]["stage4"]} == {"first", "last", "untrained"}
    for title in ("R1", "R3", "R4", "R5", "R6", "R8", "R9"):
        assert f"\n{title} " in out
    assert {path.name: path.read_bytes() for path in folder.glob("*.pt")} == files

    # what R4 trained: all behind stage 4, nothing before it
    model = torch.load(folder / "step_1.pt", weights_only=True)["model"]
    trained = torch.load(folder / "retrain-stage4-last/last.pt", weights_only=True)["model"]
    same = {k for k in model if torch.equal(model[k], trained[k]) and "num_batches" not in k}
    trunk = {k for k in model if k.startswith("trunk.")}
    assert same == {k for k in trunk if "num_batches" not in k}

    figures = {path.name for path in Path("figures-analysis").glob("*.png")}
    if importlib.util.find_spec("matplotlib"):
        assert figures == {
            f"{n}.png" for n in ("old_pixels", "stitching", "cka", "offset", "layers")
        }
    else:
        assert not figures and "pip install matplotlib" in out


def test_what_cannot_be_analysed_says_so(start):
    Path("dry").mkdir()
    Path("dry/config.json").write_text('{"flags": {"dry_run": true}, "classes": []}')
    for folder, reason in (("nowhere", "no run there"), ("dry", "a dry run")):
        status, _, err = start(f"--analyse {folder}", method="mib_unbiased")
        assert status == 2 and f"--analyse {folder}: {reason}" in err
    status, _, err = start("--retrain head", method="mib_unbiased")
    assert status == 2 and "--retrain goes with --analyse RUN" in err


@pytest.mark.slow
def test_a_run_of_one_step_cannot_be_analysed(start):
    assert start(f"{TINY} --epochs 1 --task offline", method="mib_unbiased")[0] == 0
    folder = trees.folder_name("mib_unbiased", "offline")
    status, _, err = start(f"--analyse {folder}", method="mib_unbiased")
    assert status == 2 and "needs step_0.pt and that of a later step, there is step_0.pt" in err
