"""DKD's losses against the authors' functions (golden.json) and the formulas written out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import dkd

EXACT = {"rel": 1e-9, "abs": 1e-12}


def norm(tensor):
    return 0.0 if tensor.grad is None else tensor.grad.norm().item()


def draw_labels(u, old, new):
    """The golden files' rule: half background, 40 % new classes, 10 % void."""
    labels = np.where(u < 0.5, 0, 255)
    for k in range(new):
        labels[(u >= 0.5 + 0.4 * k / new) & (u < 0.5 + 0.4 * (k + 1) / new)] = old + 1 + k
    return torch.tensor(labels)


def leaf(array):
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    "case", ["logit_seed0", "logit_all_void", "logit_all_background", "logit_one_pixel"]
)
def test_logit_losses_equal_the_authors(golden, case):
    expected = golden["dkd"][case]["results"]
    rng = np.random.default_rng(golden["dkd"][case]["seed"])
    new, old = (2 * rng.standard_normal((2, c, 6, 5)) for c in (8, 5))
    labels = draw_labels(rng.random((2, 6, 5)), 4, 3)
    if case != "logit_seed0":
        labels[:] = 255 if case == "logit_all_void" else 0
    if case == "logit_one_pixel":
        labels[1, 2, 3] = 6
    losses = {
        "kd": lambda z: dkd.kd(z[:, 1:5], torch.tensor(old)[:, 1:]),
        "ac": lambda z: dkd.auxiliary_loss(z[:, :1]),
        **{
            f"mbce_gamma{g}": lambda z, g=g: dkd.mbce(z[:, 5:], labels, 5, float(g))
            for g in (1, 2, 35)
        },
    }
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        z = leaf(new)
        value = loss(z)
        value.backward()
        assert value.item() == pytest.approx(expected[name]["loss"], **EXACT)
        assert norm(z) == pytest.approx(expected[name]["grad_norm_z_new"], **EXACT)


@pytest.mark.parametrize(
    "case", ["dkd_seed0", "dkd_leaky_features_seed3", "dkd_identical_models_seed4"]
)
def test_decomposed_kd_equals_the_authors(golden, case):
    entry = golden["dkd"][case]
    rng = np.random.default_rng(entry["seed"])
    slope = 0.01 if "leaky" in entry["activation"] else 0.0
    f_new, f_old = (
        F.leaky_relu(torch.tensor(rng.standard_normal((2, 8, 3, 4))), slope) for _ in range(2)
    )
    w_new, w_old = (torch.tensor(0.5 * rng.standard_normal((k, 8))) for k in (6, 4))
    if "identical" in case:
        f_old, w_old = f_new, w_new[:4]
    for i, name in enumerate(("dkd_pos", "dkd_neg")):
        f, w = f_new.clone().requires_grad_(), w_new.clone().requires_grad_()
        value = dkd.decomposed_kd(f, w[:4], f_old, w_old)[i]
        value.backward()
        expected = entry["results"][name]
        assert value.item() == pytest.approx(expected["loss"], **EXACT)
        assert norm(f) == pytest.approx(expected["grad_norm_f_new"], **EXACT)
        old_rows = w.grad[:4].norm().item()
        assert old_rows == pytest.approx(expected["grad_norm_W_new_oldrows"], **EXACT)
        assert w.grad[4:].norm().item() == 0
        product = entry["results"]["own_reference_sign_of_product"][name]
        assert (abs(value.item() - product) < 1e-9) == (slope == 0.0)  # difference 3


@pytest.mark.parametrize(
    ("case", "first"), [("base_seed0_gamma2", True), ("full_seed0_gamma1", False)]
)
def test_sum_of_losses_equals_the_authors(golden, case, first):
    """Features through classifiers, upsampling, all terms: values and gradients of every part."""
    entry = golden["dkd"][case]
    rng = np.random.default_rng(entry["seed"])
    groups = (
        {"aux": 1, "new": 4} if first else {"aux": 1, "old_group0": 3, "old_group1": 1, "new": 2}
    )
    rows = sum(groups.values())
    features = [np.maximum(rng.standard_normal((2, 8, 3, 4)), 0) for _ in range(1 if first else 2)]
    weight, bias = 0.5 * rng.standard_normal((rows, 8)), 0.1 * rng.standard_normal(rows)
    if not first:
        old_weight = torch.tensor(0.5 * rng.standard_normal((5, 8)))
        old_bias, f_old = torch.tensor(0.1 * rng.standard_normal(5)), torch.tensor(features[1])
    old = 0 if first else 4
    labels = draw_labels(rng.random((2, 12, 16)), old, groups["new"])
    parts = {}
    for name, (w, b) in zip(
        groups,
        zip(
            *(np.split(v, np.cumsum([*groups.values()])[:-1]) for v in (weight, bias)), strict=True
        ),
        strict=True,
    ):
        kind = dkd.Auxiliary if name == "aux" else nn.Conv2d
        parts[name] = kind(8, len(w), 1).double()
        parts[name].weight.data, parts[name].bias.data = (
            torch.tensor(w)[..., None, None],
            torch.tensor(b),
        )

    def terms(f):
        up = lambda z: F.interpolate(z, scale_factor=4, mode="bilinear", align_corners=False)  # noqa: E731
        z = up(torch.cat([part(f) for part in parts.values()], 1))
        losses = {
            "mbce": dkd.mbce(z[:, old + 1 :], labels, old + 1, entry["gamma"]),
            "ac": dkd.auxiliary_loss(z[:, :1]),
        }
        if not first:
            z_old = up(F.conv2d(f_old, old_weight[..., None, None], old_bias))
            losses["kd"] = dkd.kd(z[:, 1:5], z_old[:, 1:])
            rows = torch.cat([p.weight.flatten(1) for p in parts.values()])
            distilled = dkd.decomposed_kd(f, rows[1:5], f_old, old_weight[1:])
            losses["dkd_pos"], losses["dkd_neg"] = distilled
        losses["total"] = sum((5 if n[:2] in ("kd", "dk") else 1) * v for n, v in losses.items())
        return losses, z

    for name in terms(torch.tensor(features[0]))[0]:
        f = leaf(features[0])
        for part in parts.values():
            part.zero_grad()
        losses, z = terms(f)
        losses[name].backward()
        expected = entry["results"][name]
        assert losses[name].item() == pytest.approx(expected["loss"], **EXACT)
        assert norm(f) == pytest.approx(expected["grad_norm"]["f_new"], **EXACT)
        for key, value in expected["grad_norm"].items():
            if key != "f_new":
                part, which = key.split(".")
                assert norm(getattr(parts[part], which)) == pytest.approx(value or 0.0, **EXACT)
    if not first:
        found, counts = dkd.predict(z).unique(return_counts=True)
        counted = dict(zip(map(str, found.tolist()), counts.tolist(), strict=True))
        assert counted == entry["results"]["prediction_counts"]


def test_new_classifiers_start_from_the_auxiliary_one(golden):
    expected = golden["dkd"]["init_novel"]["results"]
    rng = np.random.default_rng(7)
    weight, bias = torch.tensor(rng.standard_normal((6, 5))), torch.tensor(rng.standard_normal(6))

    class Model:
        classifiers = [nn.Conv2d(5, n, 1).double() for n in (1, 3, 2)]  # noqa: RUF012

    for part, w, b in zip(
        Model.classifiers, weight.split([1, 3, 2]), bias.split([1, 3, 2]), strict=True
    ):
        part.weight.data, part.bias.data = w[..., None, None].clone(), b.clone()
    dkd.initialise(Model, "auxiliary")
    auxiliary, old, new = Model.classifiers
    assert (new.weight == auxiliary.weight).all() and (new.bias == auxiliary.bias).all()
    assert new.weight.sum().item() == pytest.approx(expected["sum_new_weight"], **EXACT)
    assert new.bias.sum().item() == pytest.approx(expected["sum_new_bias"], **EXACT)
    assert old.weight.sum().item() == pytest.approx(expected["sum_old_weight_unchanged"], **EXACT)


def test_mbce_ignores_a_label_on_request():
    torch.manual_seed(0)
    z, labels = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(0, 6, (2, 4, 5))
    labels[0, :2] = 255
    valid = labels != 255
    target = torch.stack([(labels == c).double() for c in (3, 4, 5)], 1)
    slow = F.binary_cross_entropy_with_logits(
        z, target, reduction="none", pos_weight=torch.tensor(2.0)
    ).sum(1)
    assert dkd.mbce(z, labels, 3, 2.0, ignore=255).item() == pytest.approx(
        slow[valid].mean().item()
    )
    assert dkd.mbce(z, labels, 3, 2.0).item() == pytest.approx(slow.mean().item())


def test_losses_are_finite_with_a_gradient_on_empty_input():
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    void = torch.full((1, 3, 3), 255)
    for loss in (dkd.mbce(z, void, 1, 2.0, ignore=255), dkd.kd(z[:, :0], z.detach()[:, :0])):
        assert loss.item() == 0
        z.grad = None
        loss.backward()
        assert (z.grad == 0).all()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_losses_are_finite_for_huge_logits(scale):
    z = torch.full((1, 2, 3, 3), scale, requires_grad=True)
    labels = torch.ones(1, 3, 3, dtype=torch.int64)
    loss = dkd.mbce(z, labels, 1, 2.0) + dkd.kd(z, -z.detach()) + dkd.auxiliary_loss(z[:, :1])
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_gradients_of_the_losses():
    torch.manual_seed(1)
    double = {"dtype": torch.float64, "requires_grad": True}
    z, labels = torch.randn(1, 3, 2, 3, **double), torch.tensor([[[0, 1, 2], [3, 255, 9]]])
    old = torch.randn(1, 3, 2, 3, dtype=torch.float64)
    f, w = torch.rand(1, 4, 2, 3, **double), torch.randn(3, 4, **double)
    assert torch.autograd.gradcheck(lambda z: dkd.mbce(z, labels, 1, 2.0, ignore=255), z)
    assert torch.autograd.gradcheck(lambda z: dkd.kd(z, old), z)
    frozen = f.detach() + 0.1, w.detach() - 0.2
    assert torch.autograd.gradcheck(lambda f, w: dkd.decomposed_kd(f, w, *frozen), (f, w))


def test_prediction_is_background_where_no_class_exceeds_one_half():
    z = torch.tensor([[9.0, -1.0, -2.0], [9.0, 1.0, 2.0], [9.0, 0.0, -1.0]])[..., None, None]
    assert dkd.predict(z).flatten().tolist() == [0, 2, 0]


def test_weight_decay_and_rates_follow_the_code():
    model = common.DeepLabV3("small", 8, [3, 1])
    args = dkd.flags().parse_args(["--dataset", "shapes"])
    for first in (True, False):
        groups = dkd.parameter_groups(model, 0.1, args, first)
        tensors = [[*group["params"]] for group in groups]
        assert sum(map(len, tensors)) == len([*model.parameters()])
        assert [group["lr"] for group in groups] == [0.1, 1.0, 1.0]
        decay = [group["weight_decay"] for group in groups]
        assert decay == ([1e-4] * 3 if first else [0.0, 0.0, 1e-4])
        newest = {id(p) for p in model.classifiers[-1].parameters()}
        assert {id(p) for p in tensors[2]} == newest


def test_frozen_means_no_statistics_no_weights_no_dropout():
    model = common.DeepLabV3("small", 8, [3, 1]).train()
    dkd.freeze(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a, b = (model(torch.ones(2, 3, 64, 64))[0] for _ in range(2))
    assert (a == b).all()
    assert all((v == before[k]).all() for k, v in model.state_dict().items())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(p.requires_grad for m in norms for p in m.parameters())
    assert all(p.requires_grad for p in model.classifiers.parameters())


def test_the_auxiliary_classifier_never_teaches_the_features():
    model = common.DeepLabV3("small", 8, [3])
    model.classifiers[0].__class__ = dkd.Auxiliary
    logits, _ = model(torch.randn(2, 3, 64, 64))
    dkd.auxiliary_loss(logits[:, :1]).backward()
    assert model.classifiers[0].weight.grad.norm() > 0
    assert model.trunk.conv1.weight.grad is None or model.trunk.conv1.weight.grad.norm() == 0
