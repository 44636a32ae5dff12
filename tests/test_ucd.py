"""UCD's and PLOP's losses against the reference values (golden.json) and the formulas."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trees
from trees import EXACT, TINY, assert_as, value_and_gradient

import common
import ucd

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


# contrast


@pytest.mark.parametrize("numbers", [200, 2**20])
@pytest.mark.parametrize("name", CONTRASTS)
def test_contrastive_distillation_equals_the_authors(golden, monkeypatch, name, numbers):
    monkeypatch.setattr(common, "STRIP", (numbers, numbers))
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
            found = value_and_gradient(
                lambda f, t=t, uncertainty=uncertainty, shift=shift: ucd.contrastive_distillation(
                    f, *rest, t, uncertainty, published_shift=shift
                ),
                f,
            )
            assert_as(found, values["loss"], values["grad_norm_f_new"], key)


@pytest.mark.parametrize("name", PUBLISHED_LABELS)
def test_with_the_authors_labels_only_the_weights_differ(golden, name):
    """Made-up classes make the authors' weights 1 where ours are not (difference 4)."""
    case = golden["ucd"][name]
    f, f_old, labels, z_old = contrast_inputs(case)
    small = published_resize(labels)
    for t in ("0.07", "1"):
        expected = case["results"][f"tau{t}_noP"]
        found = value_and_gradient(
            lambda f, t=t: ucd.contrastive_distillation(f, f_old, small, z_old, float(t), False), f
        )
        assert_as(found, expected["loss"], expected["grad_norm_f_new"])
        ours = ucd.contrastive_distillation(f, f_old, small, z_old, float(t)).item()
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
    for shift in (True, False):
        loss, gradient = value_and_gradient(
            lambda f, shift=shift: ucd.contrastive_distillation(
                f, f_old, labels, z_old, published_shift=shift
            ),
            f,
        )
        assert math.isfinite(loss) and gradient.isfinite().all()
        if name != "contrast_all_background":  # there, old predictions remain
            assert loss == 0 and (gradient == 0).all()


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
    rest = f_old, labels, z_old, 0.2, uncertainty, use_old
    ours, gradient = value_and_gradient(
        lambda f: ucd.contrastive_distillation(f, *rest, published_shift=False), f
    )
    slow, slow_gradient = value_and_gradient(lambda f: slow_contrast(f, *rest), f)
    assert ours == pytest.approx(slow, **EXACT)
    assert torch.allclose(gradient, slow_gradient, rtol=1e-9, atol=1e-12)


def test_any_number_of_classes_and_only_one():
    torch.manual_seed(0)
    f, z_old = torch.randn(1, 5, 4, 4), torch.randn(1, 151, 4, 4)
    labels = torch.randint(140, 250, (1, 4, 4))
    assert ucd.contrastive_distillation(f, f, labels, z_old).isfinite()
    one = torch.full((1, 4, 4), 160)
    assert ucd.contrastive_distillation(f, f, one, z_old).item() == 0  # nothing to be apart from


# MiB


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
        found = value_and_gradient(losses[key], z)
        assert_as(found, expected["loss"], expected["grad_norm_z_new"], key)


# PLOP


def test_local_pod_equals_the_authors(golden):
    expected = golden["plop"]
    old, new, (z_old, z) = trees.levels_and_logits()
    assert old[0].sum().item() == pytest.approx(expected["inputs"]["old_first"])
    assert z.sum().item() == pytest.approx(expected["inputs"]["logits_new"])
    each = [ucd.local_pod(x, y).item() for x, y in zip(new, old, strict=True)]
    assert each == pytest.approx(expected["each_layer_pow_factor1"], **EXACT)
    total = ucd.pod([*new, z], [*old, z_old], [0.01] * 4 + [0.0005], 7, 2)
    assert total.item() == pytest.approx(expected["PLOP_defaults_4layers_plus_logits"], **EXACT)
    four = math.sqrt(7 / 2) * 0.01 * sum(each) / 4
    assert four == pytest.approx(expected["4layers_only_factor0.01_schedule"], **EXACT)
    one = ucd.pod([*new, z], [*old, z_old], [0, 0, 1, 0, 0], 7, 2)  # each map has its own factor
    assert one.item() == pytest.approx(math.sqrt(7 / 2) * each[2] / 5, **EXACT)
    rng = np.random.default_rng(7)
    for key, size in (("side10", (2, 3, 10, 10)), ("h12_w8", (2, 3, 12, 8))):
        a, b = (torch.tensor(rng.standard_normal(size)) for _ in range(2))
        assert ucd.local_pod(b, a).item() == pytest.approx(expected[key], **EXACT)
    _, gradient = value_and_gradient(lambda f: ucd.local_pod(f, old[1]), new[1])
    expected = expected["gradient"]
    assert gradient.abs().sum().item() == pytest.approx(expected["abs_sum"], **EXACT)
    assert gradient.flatten()[:3].tolist() == pytest.approx(expected["first3"], **EXACT)
    _, gradient = value_and_gradient(lambda f: ucd.local_pod(f, old[1]), old[1])
    assert (gradient == 0).all()  # never not a number


def test_pseudo_labels_take_what_is_sure():
    z_old = torch.tensor([[9.0, 0, 0], [0.0, 3, 0], [0.0, 0.5, 0], [0.0, 9, 0]]).T[None, :, None]
    labels = torch.tensor([[[0, 0, 0, 3]]])
    thresholds = torch.tensor([0.5, 0.6, 0.5])
    assert ucd.entropy(torch.zeros(1, 4, 1, 1)).item() == pytest.approx(1)
    found = ucd.pseudo_labels(z_old, labels, thresholds)
    assert found.flatten().tolist() == [0, 1, 255, 3]
    assert ucd.sure_share(labels, found).item() == pytest.approx(2 / (3 + 1e-6), rel=1e-7)
    found = ucd.pseudo_labels(z_old, labels + 3, thresholds)
    assert found.flatten().tolist() == [3, 3, 3, 6]
    assert ucd.sure_share(labels + 3, found).item() == 0  # no background


def test_images_weigh_by_what_is_sure_and_void_is_part_of_the_mean():
    torch.manual_seed(0)
    z, labels = torch.randn(2, 4, 1, 4).double(), torch.tensor([[[0, 1, 255, 3]], [[2, 2, 0, 1]]])
    share = torch.tensor([0.5, 0.25]).double()
    each = F.cross_entropy(z, labels, ignore_index=255, reduction="none")
    assert (each[labels == 255] == 0).all()
    weighed = ucd.adaptive_cross_entropy(z, labels, share).item()
    assert weighed == pytest.approx((each * share[:, None, None]).sum().item() / 8, **EXACT)
    value, gradient = value_and_gradient(
        lambda z: ucd.adaptive_cross_entropy(z, labels * 0 + 255, share), z
    )
    assert value == 0 and (gradient == 0).all()


def plops_median(counts):
    """The loop of PLOP's code over a histogram of 100 bins."""
    below, half = 0, counts.sum() / 2
    for i in range(100):
        if below <= half <= below + counts[i]:
            break
        below += i  # the index
    return (i + (half - below) / counts[i]) / 100


def histogram(**bins):
    """Counts of 100 bins: b3=7 puts 7 into bin 3."""
    counts = torch.zeros(100, dtype=torch.int64)
    for name, count in bins.items():
        counts[int(name[1:])] = count
    return counts


@pytest.mark.parametrize(
    ("bins", "expected"),
    [
        ({"b0": 10}, 0.005),  # half a bin
        ({"b0": 6, "b1": 4}, 0.01 * 5 / 6),
        ({"b0": 4, "b1": 6}, 0.01 * (1 + 5 / 6)),  # right: 4 are in bin 0; it takes them for 0
        ({"b0": 2, "b3": 8}, 0.01 * (3 + 2 / 8)),  # below bin 3 are 0 + 1 + 2, not 2
        ({"b50": 8, "b60": 8}, None),
        ({"b99": 10}, None),
        ({"b2": 10}, None),
        ({"b7": 10_000}, None),
        ({"b5": 1000, "b6": 1}, None),
        ({"b0": 1000, "b1": 999, "b98": 10_000}, None),
    ],
)
def test_the_published_median_counts_indices(bins, expected):
    counts = histogram(**bins)
    found = ucd.published_median(counts)
    slow = plops_median(counts.double()).item()
    assert found == pytest.approx(slow, rel=1e-6)
    if expected is not None:
        assert found == pytest.approx(expected, rel=1e-6)


def test_where_the_published_median_finds_no_bin():
    """The loop runs through, to an empty last bin; 4950 = 0 + 1 + ... + 99 are below its end."""
    assert ucd.published_median(histogram(b0=4000, b1=4000, b2=4000)) == math.inf
    assert ucd.published_median(histogram(b0=10, b1=9, b2=9)) == -math.inf
    assert ucd.published_median(histogram(b0=5000, b1=5000, b2=5000, b99=50)) == pytest.approx(
        (99 + (15050 / 2 - 4950) / 50) / 100
    )
    assert math.isnan(ucd.published_median(histogram(b0=10, b1=10, b2=10)))  # half: 0 + ... + 5


def test_medians_of_random_histograms():
    rng = np.random.default_rng(0)
    for _ in range(100):
        values = rng.beta(*rng.uniform(0.5, 8, 2), rng.integers(1, 5000)) * rng.uniform(0.01, 1)
        counts = torch.tensor(np.histogram(values, 100, (0, 1))[0])
        exact = np.sort(values)[(len(values) - 1) // 2]
        assert ucd.median(counts) == pytest.approx(exact, abs=0.0051)
        found, slow = ucd.published_median(counts), plops_median(counts.double()).item()
        assert found == pytest.approx(slow, rel=1e-5, nan_ok=True)
        if counts[0] >= counts.sum() / 2:
            assert found == pytest.approx(exact, abs=0.01)
    assert ucd.median(histogram(b3=5, b80=2)) == pytest.approx(0.035)


@pytest.mark.parametrize("kind", ["published", "median"])
def test_thresholds_are_medians_of_the_entropy_of_each_predicted_class(few_shapes, kind):
    flags = f"--dataset shapes --task 15-5 --crop 32 --thresholds {kind} --batch 7"
    run = common.Run(trees.arguments("ucd", flags), common.most_likely, "")
    step = run.data.steps[1]
    torch.manual_seed(0)
    old_model = trees.lively(run.build(run.data.steps[0]), run.data)
    old_model.classifiers[1].bias.data[4] = -1000  # class 5 is never predicted
    found = ucd.find_thresholds(run, step, old_model)

    view, indices = run.data.training(step)
    keys = common.epoch_keys(indices, 7, (0, 1), 0, len(indices) // 7)
    pairs = []
    for images, labels in common.load_batches(view, keys, run.args):
        z = common.upsample(old_model(images)[0], (32, 32))
        here = labels == 0
        pairs.append(torch.stack([z.argmax(1)[here], ucd.entropy(z)[here]]))
    predicted, entropy = torch.cat(pairs, 1)
    unit = 16 * math.log(21) if kind == "published" else 1.0
    for c in range(16):
        values = (entropy[predicted == c] / unit).numpy()
        if not len(values):
            expected = 0.001
        elif kind == "median":
            expected = max(0.001, np.sort(values)[(len(values) - 1) // 2])
        else:
            counts = torch.tensor(np.histogram(values, 100, (0, 1))[0]).double()
            expected = max(0.001, plops_median(counts).item())
        assert found[c].item() / unit == pytest.approx(expected, abs=6e-4), c
    assert found[5].item() == pytest.approx(0.001 * unit)
    assert (predicted == 5).sum() == 0 and predicted.unique().numel() > 5


# whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("", {"ce", "kd", "contrast"}),
        ("--base plop --no-uncertainty", {"ce", "pod", "contrast"}),
        ("--contrast 0 --kd-weight 3", {"ce", "kd"}),
        ("--base plop --contrast 0", {"ce", "pod"}),
        ("--base plop --thresholds median --contrast 0", {"ce", "pod"}),
        ("--no-old-features --no-published-shift --precision bf16", {"ce", "kd", "contrast"}),
    ],
)
def test_both_bases_run(start, flags, parts):
    status, _, err = start(f"{TINY} --epochs 1 {flags} --out one", method="ucd")
    assert (status, err) == (0, "")
    (folder,) = Path("one").iterdir()
    header = {*(folder / "train.csv").read_text().splitlines()[0].split(",")}
    assert header - {"kd"} == {"step", "iteration", "lr_factor", *parts} - {"kd"}
    assert ("kd" in header) == ("kd" in parts)
