"""run.dense against the same losses of full-size logits, in float64: values and gradients."""

import functools

import pytest
import torch
import torch.nn.functional as F
import trees
from torch import nn

import common
import dkd
import icd
import ilt
import mib_unbiased as mib
import ucd
from common import InputError

SIZE = 40  # pixels; no power of two
RANDOM = torch.Generator().manual_seed(0)
Z, OLD = (torch.randn(2, c, 4, 3, generator=RANDOM, dtype=torch.float64) for c in (5, 3))
LABELS = torch.randint(0, 5, (2, SIZE, SIZE), generator=RANDOM)
LABELS[:, :7], LABELS[0, 20:], LABELS[1, 12, 5:] = 255, 255, 255  # void: much here, little there
VALID = LABELS != 255
SHARE = torch.tensor([0.25, 1.0], dtype=torch.float64)


@pytest.fixture(params=[1, 7, SIZE], ids="rows={}".format)
def rows(request, monkeypatch):
    """Rows in a strip."""
    numbers = len(Z) * Z.shape[1] * SIZE * request.param
    monkeypatch.setattr(common, "STRIP", (numbers, numbers))
    return request.param


@pytest.fixture
def run(few_shapes, rows):
    args = trees.arguments("dkd", f"--dataset shapes --crop {SIZE}")
    return common.Run(args, common.most_likely, "")


def full(value):
    """Maps at the size of the labels; other arguments of a loss as they are."""
    is_map = getattr(value, "ndim", 0) == 4
    return common.upsample(value, (SIZE, SIZE)) if is_map else value


def leaf(maps):
    return maps.clone().requires_grad_()


def assert_equal(ours, expected, *leaves):
    """Values and gradients."""
    assert ours.item() == pytest.approx(expected.item(), abs=1e-12)
    found, wanted = (torch.autograd.grad(loss, leaves) for loss in (ours, expected))
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


CASES = {  # a loss, its logits, its other arguments, the pixels it is a mean over
    "dkd mbce": (dkd.mbce, Z[:, 3:], (LABELS, 3, 2.0, 255), VALID),
    "dkd mbce, void negative": (dkd.mbce, Z[:, 3:], (LABELS, 3, 2.0), None),
    "dkd kd": (dkd.kd, Z[:, 1:3], (OLD[:, 1:],), None),
    "dkd auxiliary": (dkd.auxiliary_loss, Z[:, :1], (), None),
    "icd adaptive": (icd.adaptive_cross_entropy, Z, (LABELS, SHARE), None),
    "icd unbiased": (icd.unbiased_cross_entropy, Z, (LABELS, 3, True), VALID),
    "icd unbiased kd": (icd.unbiased_distillation, Z, (OLD,), None),
    "ilt": (ilt.cross_entropy, Z, (LABELS,), VALID),
    "ilt output": (ilt.output_distillation, Z, (OLD, LABELS, 2.0, "all"), VALID),
    "ilt output, old": (ilt.output_distillation, Z, (OLD, LABELS, 1.0, "old"), None),
    "mib plain": (mib.cross_entropy, Z, (LABELS,), VALID),
    "mib unbiased": (mib.unbiased_cross_entropy, Z, (LABELS, 3, True), VALID),
    "mib binary": (mib.binary_cross_entropy, Z, (LABELS,), VALID),
    "mib plain kd": (mib.distillation, Z, (OLD, 0.5), None),
    "mib unbiased kd": (mib.unbiased_distillation, Z, (OLD, 0.5), None),
    "mib unbiased kd, masked": (mib.unbiased_distillation, Z, (OLD, 1.0, VALID), None),
    "mib binary kd": (mib.binary_distillation, Z, (OLD, 0.5), None),
    "ucd adaptive": (ucd.adaptive_cross_entropy, Z, (LABELS, SHARE), None),
    "ucd unbiased": (ucd.unbiased_cross_entropy, Z, (LABELS, 3), VALID),
    "ucd unbiased kd": (ucd.unbiased_distillation, Z, (OLD,), None),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_of_the_scripts(run, case):
    loss, logits, others, valid = CASES[case]
    z = leaf(logits)
    ours = run.dense(loss, z, *others, valid=valid)
    assert_equal(ours, loss(full(z), *map(full, others)), z)


@pytest.mark.parametrize(
    "form",
    [lambda a, b: a[:, 1:3], lambda a, b: a / 2, lambda a, b: a + b[:, [0, 1, 2, 0, 1]]],
    ids=["slice", "temperature", "two heads"],
)
def test_logits_may_be_made_of_others(run, form):
    def loss(z):
        return z.logsumexp(1).square().mean()

    a, b = leaf(Z), leaf(OLD)
    both = Z.numel() + OLD.numel()
    ours, expected = run.dense(loss, form(a, b)), loss(full(form(a, b)))
    assert_equal(ours + (a.sum() + b.sum()) / both, expected + (a.sum() + b.sum()) / both, a, b)


def test_losses_of_the_same_logits_add_up(run):
    z = leaf(Z)
    ours = run.dense(mib.cross_entropy, z, LABELS, valid=VALID)
    ours = ours + 3 * run.dense(mib.distillation, z, OLD) + run.dense(mib.distillation, z, OLD)
    expected = mib.cross_entropy(full(z), LABELS) + 4 * mib.distillation(full(z), full(OLD))
    assert_equal(ours, expected, z)


SHARED = {  # several losses of one function: its other arguments, the pixels of each, each alone
    "mib": (
        (mib.unbiased_losses, LABELS, OLD, 7.0, 0.5),
        (VALID, None),
        lambda z, old: mib.unbiased_cross_entropy(z, LABELS, 3, keep=True),
        lambda z, old: 7 * mib.unbiased_distillation(z, old, 0.5),
    ),
    "ucd, icd": (
        (ucd.unbiased_losses, LABELS, OLD, 7.0),
        None,
        lambda z, old: VALID.double().mean() * ucd.unbiased_cross_entropy(z, LABELS, 3, keep=True),
        lambda z, old: 7 * icd.unbiased_distillation(z, old),
    ),
}


@pytest.mark.parametrize("case", SHARED)
def test_losses_that_share_their_masses_are_those_alone(run, case):
    """Each value, and the gradient of what learns: their sum."""
    (loss, *others), valid, *alone = SHARED[case]
    z = leaf(Z)
    ours, expected = (
        run.dense(loss, z, *others, valid=valid),
        [f(full(z), full(OLD)) for f in alone],
    )
    for value, other in zip(ours, expected, strict=True):
        assert value.item() == pytest.approx(other.item(), abs=1e-12)
    assert_equal(ours.sum(), sum(expected), z)


def test_losses_of_one_function_weighed_outside_are_refused(run):
    ce, kd = run.dense(mib.unbiased_losses, leaf(Z), LABELS, OLD, 1.0, valid=(VALID, None))
    with pytest.raises(InputError, match="dense: weigh losses of one function in it"):
        (ce + 2 * kd).backward()
    for _ in range(40):  # later they are not looked at, but no wrong gradient is learned from
        z = leaf(Z)
        ce, kd = run.dense(mib.unbiased_losses, z, LABELS, OLD, 1.0, valid=(VALID, None))
    (ce + 2 * kd).backward()
    assert z.grad.isnan().all()


def test_a_gradient_goes_to_all_that_need_one(run):
    def loss(z, other, weight):
        return ((z[:, :3] - other).square().sum(1) * weight).mean()

    z, other, weight = leaf(Z), leaf(OLD), leaf(SHARE[:1])
    assert_equal(
        run.dense(loss, z, other, weight), loss(full(z), full(other), weight), z, other, weight
    )
    assert_equal(run.dense(loss, Z, other, weight), loss(full(Z), full(other), weight), other)
    assert not run.dense(loss, Z, OLD, SHARE[:1]).requires_grad
    with torch.no_grad():
        assert not run.dense(loss, z, other, weight).requires_grad


def test_no_valid_pixel_gives_0_with_a_gradient(run):
    z, void = leaf(Z), torch.full_like(LABELS, 255)
    loss = run.dense(mib.cross_entropy, z, void, valid=void != 255)
    assert loss.item() == 0
    loss.backward()
    assert (z.grad == 0).all()


def test_float32_is_as_near_as_float32_can_be(run):
    z = leaf(Z.float())
    ours = run.dense(mib.cross_entropy, z, LABELS, valid=VALID)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(mib.cross_entropy(full(z), LABELS).item(), rel=1e-5)


def test_a_mean_over_some_pixels_needs_valid(run):
    for loss in (mib.cross_entropy, ilt.cross_entropy):
        with pytest.raises(InputError, match=r"dense: cross_entropy of some rows is .* valid="):
            run.dense(loss, leaf(Z), LABELS)
    without_void = torch.where(VALID, LABELS, 0)
    run.dense(mib.binary_cross_entropy, leaf(Z), without_void)


def test_what_is_no_mean_over_pixels_is_refused(run):
    for loss in (lambda z: z.square().sum(), lambda z: z.square().mean().sqrt()):
        with pytest.raises(InputError, match="no mean over pixels needs"):
            run.dense(loss, leaf(Z))


def test_a_parameter_that_is_no_argument_is_refused(run):
    weight, conv = nn.Parameter(SHARE), nn.Conv2d(5, 1, 1).double()
    head = conv(Z).mean()  # not a leaf itself
    for other in (weight, head):
        with pytest.raises(InputError, match="a parameter that is none of its arguments"):
            run.dense(lambda z, other=other: (z * other.sum()).mean(), leaf(Z))


def test_maps_of_another_size_are_refused(run):
    message = rf"expected \[B, {SIZE}, {SIZE}\]"
    with pytest.raises(InputError, match=message):
        run.dense(mib.cross_entropy, leaf(Z), LABELS[:, :20, :20])
    with pytest.raises(InputError, match=message):
        run.dense(mib.distillation, leaf(Z), OLD, valid=VALID[:, :20] | True)


def test_a_mask_with_channels_is_refused(run):
    with pytest.raises(InputError, match=r"a map of torch.bool with channels"):
        run.dense(lambda z, mask: (z * mask).mean(), leaf(Z), VALID[:, None])


def test_a_loss_that_is_not_a_number_in_a_strip_is_refused(run):
    void = torch.full_like(LABELS, 255)
    own = functools.partial(F.cross_entropy, ignore_index=255)
    with pytest.raises(InputError, match="of some rows is nan"):
        run.dense(own, leaf(Z), void, valid=void != 255)


def test_maps_in_strips_are_the_full_size_maps(rows):
    found = common.in_strips(lambda z: z[:, 1] - z[:, 0], SIZE, Z)
    assert torch.allclose(found, full(Z)[:, 1] - full(Z)[:, 0], rtol=0, atol=1e-12)
    background, thresholds = LABELS * (LABELS > 2), torch.tensor([0.7, 0.8, 0.9])
    for labels, *more in ((background, thresholds), (background,)):
        function = ucd.pseudo_labels if more else mib.pseudo_labels
        found = common.in_strips(function, SIZE, OLD, labels, *more)
        assert torch.equal(found, function(full(OLD), labels, *more))
        assert len(found.unique()) > 3
