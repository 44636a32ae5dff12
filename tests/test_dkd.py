"""DKD's losses against the authors' functions (golden.json) and the formulas written out."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trees
from torch import nn
from trees import EXACT, TINY, assert_as, value_and_gradient

import common
import dkd


def draw_labels(u, old, new):
    """The golden files' rule: half background, 40 % new classes, 10 % void."""
    labels = np.where(u < 0.5, 0, 255)
    for k in range(new):
        labels[(u >= 0.5 + 0.4 * k / new) & (u < 0.5 + 0.4 * (k + 1) / new)] = old + 1 + k
    return torch.tensor(labels)


# losses


@pytest.mark.parametrize(
    "case", ["logit_seed0", "logit_all_void", "logit_all_background", "logit_one_pixel"]
)
def test_logit_losses_equal_the_authors(golden, case):
    expected = golden["dkd"][case]["results"]
    rng = np.random.default_rng(golden["dkd"][case]["seed"])
    new, old = (torch.tensor(2 * rng.standard_normal((2, c, 6, 5))) for c in (8, 5))
    labels = draw_labels(rng.random((2, 6, 5)), 4, 3)
    if case != "logit_seed0":
        labels[:] = 255 if case == "logit_all_void" else 0
    if case == "logit_one_pixel":
        labels[1, 2, 3] = 6
    losses = {
        "kd": lambda z: dkd.kd(z[:, 1:5], old[:, 1:]),
        "ac": lambda z: dkd.auxiliary_loss(z[:, :1]),
        **{
            f"mbce_gamma{g}": lambda z, g=g: dkd.mbce(z[:, 5:], labels, 5, float(g))
            for g in (1, 2, 35)
        },
    }
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        entry = expected[name]
        assert_as(value_and_gradient(loss, new), entry["loss"], entry["grad_norm_z_new"], name)


def test_mbce_ignores_a_label_on_request():
    torch.manual_seed(0)
    z, labels = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(0, 6, (2, 4, 5))
    labels[0, :2] = 255
    valid = labels != 255
    target = torch.stack([(labels == c).double() for c in (3, 4, 5)], 1)
    slow = F.binary_cross_entropy_with_logits(
        z, target, reduction="none", pos_weight=torch.tensor(2.0)
    ).sum(1)
    ignored, negative = dkd.mbce(z, labels, 3, 2.0, ignore=255), dkd.mbce(z, labels, 3, 2.0)
    assert ignored.item() == pytest.approx(slow[valid].mean().item())
    assert negative.item() == pytest.approx(slow.mean().item())


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
        assert_as((value.item(), f.grad), expected["loss"], expected["grad_norm_f_new"])
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
    rows, old = sum(groups.values()), 0 if first else 4
    features = [np.maximum(rng.standard_normal((2, 8, 3, 4)), 0) for _ in range(1 if first else 2)]
    weight, bias = (
        torch.tensor(v)
        for v in (0.5 * rng.standard_normal((rows, 8)), 0.1 * rng.standard_normal(rows))
    )
    if not first:
        old_weight = torch.tensor(0.5 * rng.standard_normal((5, 8)))
        old_bias, f_old = torch.tensor(0.1 * rng.standard_normal(5)), torch.tensor(features[1])
    labels = draw_labels(rng.random((2, 12, 16)), old, groups["new"])
    sizes = [*groups.values()]
    parts = nn.ModuleDict({name: nn.Conv2d(8, n, 1).double() for name, n in groups.items()})
    for part, w, b in zip(parts.values(), weight.split(sizes), bias.split(sizes), strict=True):
        part.weight.data, part.bias.data = w[..., None, None], b
    parts["aux"].register_forward_pre_hook(lambda _, inputs: inputs[0].detach())  # as in main

    def terms(f):
        z = common.upsample(torch.cat([part(f) for part in parts.values()], 1), (12, 16))
        losses = {
            "mbce": dkd.mbce(z[:, old + 1 :], labels, old + 1, entry["gamma"]),
            "ac": dkd.auxiliary_loss(z[:, :1]),
        }
        if not first:
            z_old = F.conv2d(f_old, old_weight[..., None, None], old_bias)
            losses["kd"] = dkd.kd(z[:, 1:5], common.upsample(z_old, (12, 16))[:, 1:])
            rows = torch.cat([p.weight.flatten(1) for p in parts.values()])
            distilled = dkd.decomposed_kd(f, rows[1:5], f_old, old_weight[1:])
            losses["dkd_pos"], losses["dkd_neg"] = distilled
        losses["total"] = sum((5 if n[:2] in ("kd", "dk") else 1) * v for n, v in losses.items())
        return losses, z

    losses, z = terms(torch.tensor(features[0]))
    assert losses.keys() == entry["results"].keys() - {"prediction_counts"}
    for name in losses:
        parts.zero_grad()
        found = value_and_gradient(
            lambda f, name=name: terms(f)[0][name], torch.tensor(features[0])
        )
        expected = entry["results"][name]
        assert_as(found, expected["loss"], expected["grad_norm"]["f_new"], name)
        for key, value in expected["grad_norm"].items():
            if key != "f_new":
                part, which = key.split(".")
                gradient = getattr(parts[part], which).grad
                norm = 0.0 if gradient is None else gradient.norm().item()
                assert norm == pytest.approx(value or 0.0, **EXACT)
    if not first:
        found, counts = dkd.predict(z).unique(return_counts=True)
        counted = dict(zip(map(str, found.tolist()), counts.tolist(), strict=True))
        assert counted == entry["results"]["prediction_counts"]


def test_losses_are_finite_with_a_gradient_on_empty_input():
    void = torch.full((1, 3, 3), 255)
    for loss in (
        lambda z: dkd.mbce(z, void, 1, 2.0, ignore=255),
        lambda z: dkd.kd(z[:, :0], z.detach()[:, :0]),
    ):
        value, gradient = value_and_gradient(loss, torch.randn(1, 2, 3, 3))
        assert value == 0 and (gradient == 0).all()


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


# a step


def test_the_auxiliary_classifier_never_teaches_the_features(start, monkeypatch):
    """In the model as main makes it."""
    made = []

    def batches(run, step, model, optimizer, **_):
        made.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(common.Run, "batches", batches)
    assert start(TINY)[0] == 130
    (model,) = made
    logits, _ = model(torch.randn(2, 3, 64, 64))
    dkd.auxiliary_loss(logits[:, :1]).backward()
    assert model.classifiers[0].weight.grad.norm() > 0
    learns = [p for k, p in model.named_parameters() if not k.startswith("classifiers.")]
    assert all(p.grad is None or p.grad.norm() == 0 for p in learns)


def test_new_classifiers_start_from_the_auxiliary_one(golden):
    expected = golden["dkd"]["init_novel"]["results"]
    rng, sizes = np.random.default_rng(7), (1, 3, 2)
    weight, bias = torch.tensor(rng.standard_normal((6, 5))), torch.tensor(rng.standard_normal(6))
    model = common.DeepLabV3("small", 8, sizes[1:])
    model.classifiers = nn.ModuleList(nn.Conv2d(5, n, 1).double() for n in sizes)
    for part, w, b in zip(model.classifiers, weight.split(sizes), bias.split(sizes), strict=True):
        part.weight.data, part.bias.data = w[..., None, None].clone(), b.clone()
    dkd.initialise(model, "auxiliary")
    auxiliary, old, new = model.classifiers
    assert (new.weight == auxiliary.weight).all() and (new.bias == auxiliary.bias).all()
    assert new.weight.sum().item() == pytest.approx(expected["sum_new_weight"], **EXACT)
    assert new.bias.sum().item() == pytest.approx(expected["sum_new_bias"], **EXACT)
    assert old.weight.sum().item() == pytest.approx(expected["sum_old_weight_unchanged"], **EXACT)
    dkd.initialise(model, "random")
    assert new.weight.unique().numel() == new.weight.numel()
    assert torch.equal(auxiliary.weight.flatten(), weight[0])


def test_in_step_0_all_behind_the_trunk_is_random():
    model = common.DeepLabV3("small", 8, [3])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dkd.initialise_all(model)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    behind = (("trunk." not in k) and v.ndim == 4 for k, v in before.items())
    assert changed == {k for k, is_behind in zip(before, behind, strict=True) if is_behind}
    deviation = (2 / (64 * 9)) ** 0.5  # Kaiming's, of a 3x3 convolution of 64 channels
    assert model.head[0].weight.std().item() == pytest.approx(deviation, rel=0.05)


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


@pytest.mark.parametrize("first", [True, False])
def test_weight_decay_and_rates_follow_the_code(first):
    model, args = common.DeepLabV3("small", 8, [3, 1]), trees.arguments("dkd", "--dataset shapes")
    optimizer = dkd.sgd(model, 0.1, args, first)
    groups = optimizer.param_groups
    ids = [{id(p) for p in group["params"]} for group in groups]
    assert ids[0] == {id(p) for p in model.trunk.parameters()}
    assert ids[2] == {id(p) for p in model.classifiers[-1].parameters()}
    assert sum(map(len, ids)) == len({*ids[0], *ids[1], *ids[2]}) == len([*model.parameters()])
    assert [group["lr"] for group in groups] == [0.1, 1.0, 1.0]
    decay = [group["weight_decay"] for group in groups]
    assert decay == ([1e-4] * 3 if first else [0.0, 0.0, 1e-4])
    assert all(group["momentum"] == 0.9 and group["nesterov"] for group in groups)


def test_prediction_is_background_where_no_class_exceeds_one_half():
    z = torch.tensor([[9.0, -1.0, -2.0], [9.0, 1.0, 2.0], [9.0, 0.0, -1.0]])[..., None, None]
    assert dkd.predict(z).flatten().tolist() == [0, 2, 0]


def test_a_memory_is_balanced_and_kept(data, tmp_path):
    flags = f"{TINY} --task 18-1 --memory 18 --data {data} --out {tmp_path}"
    run = common.Run(trees.arguments("dkd", flags), dkd.predict, "")
    run.folder.mkdir()
    first, second = run.data.steps[1:]

    def memory(step, old_model):
        chosen = dkd.choose_memory(run, step, old_model)
        kept = json.loads((run.folder / f"memory_{step.index}.json").read_text())
        assert [f"a{i}.jpg" for i in chosen] == [name for name, _ in kept] and len(chosen) == 18
        assert dkd.choose_memory(run, step, None) == chosen  # nothing is looked at again
        return kept

    kept = memory(first, None)  # step 0's labels are whole: no model is asked
    for name, ids in kept:
        shown = trees.CLASSES[int(name.strip("a.jpg"))]
        assert {*ids} - {0} == {*shown} & {*range(1, 19)}
    assert {c for _, ids in kept for c in ids} == {*range(19)}
    (run.folder / "memory_1.json").unlink()
    run.args.memory = 999  # more than there are: each is taken once
    assert sorted(dkd.choose_memory(run, first, None)) == run.data.images[0]
    run.args.memory = 18
    (run.folder / "memory_1.json").write_text(json.dumps(kept))

    old_model = run.build(first).eval()
    for sure in (-9.0, 9.0):  # probability of class 5 everywhere, of the others none
        for classifier in old_model.classifiers:
            classifier.weight.data.zero_()
            classifier.bias.data.fill_(-9.0)
        old_model.classifiers[1].bias.data[4] = sure
        later = memory(second, old_model)
        news = [ids for name, ids in later if [name, ids] not in kept]
        assert news and all({*ids} == ({19, 5} if sure > 0 else {0, 19}) for ids in news)
        (run.folder / "memory_2.json").unlink()
