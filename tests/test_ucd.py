"""UCD's and PLOP's losses against the reference values (golden.json) and the formulas."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from trees import TINY

import common
import ucd

EXACT = {"rel": 1e-9, "abs": 1e-12}
CONTRASTS = ["contrast_aligned_seed0", "contrast_no_old_class_pixels"]
PUBLISHED_LABELS = ["contrast_unaligned_seed0", "contrast_shapes_seed0"]


def contrast_inputs(case):
    """Features, old features, labels, old logits: drawn in the golden file's order."""
    rng = np.random.default_rng(case["seed"])
    f, f_old = (torch.tensor(rng.standard_normal((2, 8, 4, 4))) for _ in range(2))
    z_old, u = torch.tensor(2 * rng.standard_normal((2, 6, 4, 4))), rng.random((2, 4, 4))
    small = np.where(u < 0.6, 0, np.where(u < 0.8, 6, 7))
    labels = np.repeat(np.repeat(small, 16, 1), 16, 2)
    if "roll" in case["labels"]:
        labels = np.roll(labels, (8, 8), (1, 2))
    if case["labels"] == "SHAPES":
        i, j = np.mgrid[:64, :64]
        labels[:] = 0
        labels[0][(i - 24) ** 2 + (j - 30) ** 2 < 17**2] = 6
        labels[1][10:41, 22:58] = 7
        labels[1][50:60, 5:15] = 255
    if "every pixel" in case["labels"]:
        labels[:] = 255 if "255" in case["labels"] else 0
    if "z_old[:,0] += 50" in case.get("override", ""):
        z_old[:, 0] += 50
    return f, f_old, torch.tensor(labels), z_old


def published_resize(labels):
    """The authors' labels at the size of the features: made-up classes at borders."""
    resized = F.interpolate(labels[:, None].double(), (4, 4), mode="bilinear")[:, 0]
    resized = resized.to(torch.uint8).to(torch.int8).long()
    return torch.where((resized < 0) | (resized > 20), 0, resized)


@pytest.mark.parametrize("numbers", [200, 2**20])
@pytest.mark.parametrize("name", CONTRASTS)
def test_contrastive_distillation_equals_the_authors(golden, monkeypatch, name, numbers):
    monkeypatch.setattr(ucd.common, "STRIP", (numbers, numbers))
    case = golden["ucd"][name]
    f, *rest = contrast_inputs(case)
    for key, expected in case["results"].items():
        if key == "info":
            continue
        t, uncertainty = float(key.split("_")[0][3:]), key.endswith("_P")
        for shift, values in (
            (True, expected),
            (False, expected["own_reference_consistent_shift"]),
        ):
            leaf = f.clone().requires_grad_()
            loss = ucd.contrastive_distillation(leaf, *rest, t, uncertainty, published_shift=shift)
            loss.backward()
            assert loss.item() == pytest.approx(values["loss"], **EXACT), key
            assert leaf.grad.norm().item() == pytest.approx(values["grad_norm_f_new"], **EXACT)


@pytest.mark.parametrize("name", PUBLISHED_LABELS)
def test_with_the_authors_labels_only_the_weights_differ(golden, name):
    """Made-up classes make the authors' weights 1 where ours are not (difference 4)."""
    case = golden["ucd"][name]
    f, f_old, labels, z_old = contrast_inputs(case)
    small = published_resize(labels)
    for t in ("0.07", "1"):
        expected = case["results"][f"tau{t}_noP"]
        leaf = f.clone().requires_grad_()
        loss = ucd.contrastive_distillation(
            leaf, f_old, small, z_old, float(t), False, published_shift=True
        )
        loss.backward()
        assert loss.item() == pytest.approx(expected["loss"], **EXACT)
        assert leaf.grad.norm().item() == pytest.approx(expected["grad_norm_f_new"], **EXACT)
        ours = ucd.contrastive_distillation(
            f, f_old, small, z_old, float(t), published_shift=True
        ).item()
        assert ours <= case["results"][f"tau{t}_P"]["loss"] + 1e-9


@pytest.mark.parametrize(
    "name", ["contrast_all_void", "contrast_all_background", "contrast_one_new_pixel_no_old"]
)
def test_where_the_authors_code_fails_the_loss_is_finite(golden, name):
    case = golden["ucd"][name]
    f, f_old, labels, z_old = contrast_inputs(case)
    if "one_new_pixel" in name:
        labels = torch.zeros_like(labels)
        labels[0, :16, :16] = 7
    leaf = f.requires_grad_()
    loss = ucd.contrastive_distillation(leaf, f_old, labels, z_old)
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all()
    if name != "contrast_all_background":  # there, old predictions remain
        assert loss.item() == 0 and (leaf.grad == 0).all()


def slow_contrast(f, f_old, labels, z_old, temperature, uncertainty, use_old):
    """Anchor by anchor, positive by positive, as in the docstring."""
    cells = []
    for b in range(len(f)):
        for y in range(f.shape[2]):
            for x in range(f.shape[3]):
                label, known = labels[b, y, x].item(), True
                if label == 0:
                    label, known = z_old[b, :, y, x].argmax().item(), False
                if label not in (0, 255):
                    at = (b, slice(None), y, x)
                    cells.append((label, known, f[at], f_old[at], z_old[at].softmax(0)))
    keys = [(i, c[0], c[1], F.normalize(c[2], dim=0).detach(), c[4]) for i, c in enumerate(cells)]
    if use_old:
        keys += [(-1, c[0], False, F.normalize(c[3], dim=0), c[4]) for c in cells if not c[1]]
    losses = []
    for i, (label, known, anchor, _, p) in enumerate(cells):
        s = [(F.normalize(anchor, dim=0) * key[3]).sum() / temperature for key in keys]
        negative = sum(s[j].exp() for j, key in enumerate(keys) if key[1] != label)
        terms = []
        for j, (own, other, other_known, _, q) in enumerate(keys):
            if other == label and own != i:
                weight = (p * q).sum() if uncertainty and not (known and other_known) else 1
                terms.append(-weight * (s[j] - (s[j].exp() + negative).log()))
        if terms:
            losses.append(torch.stack([torch.as_tensor(t) for t in terms]).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("uncertainty", [True, False])
@pytest.mark.parametrize("use_old", [True, False])
def test_contrastive_distillation_is_the_formula(uncertainty, use_old):
    torch.manual_seed(0)
    f, f_old = (torch.randn(2, 5, 3, 3, dtype=torch.float64) for _ in range(2))
    z_old, labels = 2 * torch.randn(2, 4, 3, 3).double(), torch.randint(0, 7, (2, 3, 3))
    labels = torch.where(labels < 4, 0, labels)
    labels[0, 0, 0] = 255
    found = []
    for loss in (
        lambda f: ucd.contrastive_distillation(f, f_old, labels, z_old, 0.2, uncertainty, use_old),
        lambda f: slow_contrast(f, f_old, labels, z_old, 0.2, uncertainty, use_old),
    ):
        leaf = f.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        found.append((value.item(), leaf.grad))
    assert found[0][0] == pytest.approx(found[1][0], **EXACT)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-9, atol=1e-12)


def test_any_number_of_classes_and_only_one():
    torch.manual_seed(0)
    f, z_old = torch.randn(1, 5, 4, 4), torch.randn(1, 151, 4, 4)
    labels = torch.randint(140, 250, (1, 4, 4))
    assert ucd.contrastive_distillation(f, f, labels, z_old).isfinite()
    one = torch.full((1, 4, 4), 160)
    assert ucd.contrastive_distillation(f, f, one, z_old).item() == 0  # nothing to be apart from


@pytest.mark.parametrize("name", ["mib_seed0", "mib_all_void", "mib_all_background"])
def test_mibs_terms_equal_the_authors(golden, name):
    case = golden["ucd"][name]
    rng = np.random.default_rng(case["seed"])
    z, z_old = (torch.tensor(2 * rng.standard_normal((2, c, 5, 6))) for c in (8, 6))
    u = rng.random((2, 5, 6))
    labels = torch.tensor(np.select([u < 0.5, u < 0.7, u < 0.9], [0, 6, 7], 255))
    if "all" in name:
        labels[:] = 255 if "void" in name else 0
    part = (labels != 255).double().mean()  # the authors divide by all pixels
    unce = lambda z: part * ucd.unbiased_cross_entropy(z, labels, 6)  # noqa: E731
    unkd = lambda z: ucd.unbiased_distillation(z, z_old)  # noqa: E731
    losses = {"unce": unce, "unkd": unkd, "unce_plus_10_unkd": lambda z: unce(z) + 10 * unkd(z)}
    for key, expected in case["results"].items():
        leaf = z.clone().requires_grad_()
        value = losses[key](leaf)
        value.backward()
        assert value.item() == pytest.approx(expected["loss"], **EXACT)
        assert leaf.grad.norm().item() == pytest.approx(expected["grad_norm_z_new"], **EXACT)


def pod_inputs():
    rng = np.random.default_rng(0)
    shapes = ((2, 6, 16, 16), (2, 8, 8, 8), (2, 12, 4, 4), (2, 12, 4, 4))
    old = [torch.tensor(rng.standard_normal(s)) for s in shapes]
    new = [x + 0.5 * torch.tensor(rng.standard_normal(x.shape)) for x in old]
    logits = [torch.tensor(rng.standard_normal((2, c, 4, 4))) for c in (5, 7)]
    return old, new, logits


def test_local_pod_equals_the_authors(golden):
    expected = golden["plop"]
    old, new, (z_old, z) = pod_inputs()
    assert old[0].sum().item() == pytest.approx(expected["inputs"]["old_first"])
    assert z.sum().item() == pytest.approx(expected["inputs"]["logits_new"])
    each = [ucd.local_pod(x, y).item() for x, y in zip(new, old, strict=True)]
    assert each == pytest.approx(expected["each_layer_pow_factor1"], **EXACT)
    total = ucd.pod([*new, z], [*old, z_old], (0.01, 0.0005), (7, 2))
    assert total.item() == pytest.approx(expected["PLOP_defaults_4layers_plus_logits"], **EXACT)
    four = math.sqrt(7 / 2) * 0.01 * sum(each) / 4
    assert four == pytest.approx(expected["4layers_only_factor0.01_schedule"], **EXACT)
    rng = np.random.default_rng(7)
    for key, size in (("side10", (2, 3, 10, 10)), ("h12_w8", (2, 3, 12, 8))):
        a, b = (torch.tensor(rng.standard_normal(size)) for _ in range(2))
        assert ucd.local_pod(b, a).item() == pytest.approx(expected[key], **EXACT)
    leaf = new[1].clone().requires_grad_()
    ucd.local_pod(leaf, old[1]).backward()
    assert leaf.grad.abs().sum().item() == pytest.approx(expected["gradient"]["abs_sum"], **EXACT)
    assert leaf.grad.flatten()[:3].tolist() == pytest.approx(
        expected["gradient"]["first3"], **EXACT
    )
    leaf = old[1].clone().requires_grad_()
    ucd.local_pod(leaf, old[1]).backward()
    assert (leaf.grad == 0).all()  # never not a number


def test_pseudo_labels_take_what_is_sure():
    z_old = torch.tensor([[9.0, 0, 0], [0.0, 3, 0], [0.0, 0.5, 0], [0.0, 9, 0]]).T[None, :, None]
    labels = torch.tensor([[[0, 0, 0, 3]]])
    thresholds = torch.tensor([0.5, 0.6, 0.5])
    assert ucd.entropy(torch.zeros(1, 4, 1, 1)).item() == pytest.approx(1)
    found = ucd.pseudo_labels(labels, z_old, thresholds)
    assert found.flatten().tolist() == [0, 1, 255, 3]
    assert ucd.sure_share(labels, found).item() == pytest.approx(2 / 3)
    found = ucd.pseudo_labels(labels + 3, z_old, thresholds)
    assert found.flatten().tolist() == [3, 3, 3, 6]
    assert ucd.sure_share(labels + 3, found).item() == 1
    z = torch.randn(1, 4, 1, 4)
    weighed = ucd.adaptive_cross_entropy(z, labels, torch.tensor([0.5]))
    assert weighed.item() == pytest.approx(0.5 * F.cross_entropy(z, labels).item(), rel=1e-5)


def test_medians_are_those_of_the_predicted_classes():
    torch.manual_seed(0)
    z_old = torch.randn(6, 4, 8, 8)
    z_old[:, 3] = -50  # never predicted
    labels = torch.randint(0, 2, (6, 8, 8)) * 5

    class Run:
        device, source, images = torch.device("cpu"), common.Source([], [], ""), (None, [0])

        def labels(self, step):
            return None

        def sweep(self, *_):
            yield z_old, labels

    found = ucd.median_entropies(Run(), common.Step(1, 4, 5), lambda z: (z, {}))
    entropy, predicted = ucd.entropy(z_old), z_old.argmax(1)
    for c in range(3):
        exact = entropy[(labels == 0) & (predicted == c)].median().item()
        assert found[c].item() == pytest.approx(exact, abs=2 / ucd.BINS)
    assert found[3].item() == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("", {"ce", "kd", "contrast"}),
        ("--base plop --no-uncertainty", {"ce", "pod", "contrast"}),
        ("--contrast 0 --kd-weight 3", {"ce", "kd"}),
        ("--base plop --contrast 0", {"ce", "pod"}),
        ("--no-old-features --published-shift --precision bf16", {"ce", "kd", "contrast"}),
    ],
)
def test_both_bases_run(start, flags, parts):
    status, _, err = start(f"{TINY} --epochs 1 {flags} --out one", method="ucd")
    assert (status, err) == (0, "")
    (folder,) = Path("one").iterdir()
    header = {*(folder / "train.csv").read_text().splitlines()[0].split(",")}
    assert header - {"kd"} == {"step", "iteration", "lr_factor", *parts} - {"kd"}
    assert ("kd" in header) == ("kd" in parts)
