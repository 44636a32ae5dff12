"""ILT's losses against the reference values (golden.json) and the formulas; its presets."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trees
from trees import EXACT, TINY, value_and_gradient

import common
import ilt
import mib_unbiased as mib


@pytest.fixture
def outputs():
    """z_old, z_new, z_old of the fixed head, labels: drawn in the golden file's order."""
    rng = np.random.default_rng(0)
    maps = [torch.tensor(2 * rng.standard_normal((2, c, 4, 6))) for c in (5, 7, 7)]
    labels = rng.integers(0, 7, size=(2, 4, 6))
    labels[rng.random((2, 4, 6)) < 0.1] = 255
    return *maps, torch.tensor(labels)


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    old = torch.tensor(rng.standard_normal((4, 8, 5, 7)))
    return old, old + 0.5 * torch.tensor(rng.standard_normal((4, 8, 5, 7)))


@pytest.fixture
def stages():
    rng = np.random.default_rng(0)
    return [torch.tensor(rng.standard_normal((4, 2, c, 5, 7))) for c in (5, 7)]


def test_output_distillation_equals_the_reference(golden, outputs):
    """The reference has three sets of pixels: here the labels choose them."""
    z_old, z, z_fixed, labels = outputs
    expected = golden["ilt"]["output_level"]
    assert z.sum().item() == pytest.approx(expected["inputs"]["z_new"]["sum"])
    assert ilt.cross_entropy(z, labels).item() == pytest.approx(expected["CE_valid_mean"], **EXACT)
    old_only = torch.where(labels < 5, labels, 255)
    pixels = {"all_pixels": labels * 0, "valid_pixels": labels, "old_gt_pixels": old_only}
    for name, chosen in pixels.items():
        for t in (1, 2):
            for key, student in (
                (f"KD_full_softmax_T{t}", z),
                (f"KD_restricted_softmax_T{t}", z[:, :5]),
            ):
                value = ilt.output_distillation(student, z_old, chosen, t)
                assert value.item() == pytest.approx(expected[key][name], **EXACT)
            entropy = ilt.output_distillation(z_old, z_old, chosen, t).item()
            assert entropy == pytest.approx(expected[f"teacher_entropy_T{t}"][name], **EXACT)
    released = ilt.output_distillation(z, z_fixed, old_only)
    assert released.item() == pytest.approx(expected["KD_released_code_T1"], **EXACT)
    baseline = ilt.output_distillation(z, z_old, labels, student="old")
    assert baseline.item() == pytest.approx(expected["KD_MiB_baseline_T1"], **EXACT)


def test_edges_of_output_distillation(golden, outputs):
    z_old, z, z_fixed, labels = outputs
    expected, everywhere = golden["ilt"]["output_level_edge_seed0"], labels * 0
    found = {
        "student_equals_teacher_restricted_T1_all_pixels": (z_old, z_old, everywhere),
        "labels_all_new_or_void__KD_released_code": (z, z_fixed, everywhere + 255),
        "logits_times_1000_KD_full_softmax_T1_all_pixels": (1000 * z, 1000 * z_old, everywhere),
        "shift_all_new_logits_by_+37.5_KD_full_softmax_T1_all_pixels": (
            z + 37.5,
            z_old,
            everywhere,
        ),
        "KD_full_softmax_T1000_all_pixels": (z, z_old, everywhere, 1000),
        "single_old_class_C_old=1_KD_restricted_T1": (z[:, :1], z_old[:, :1], everywhere),
        "single_old_class_C_old=1_KD_full_T1": (z, z_old[:, :1], everywhere),
    }
    for key, inputs in found.items():
        assert ilt.output_distillation(*inputs).item() == pytest.approx(expected[key], **EXACT), key


def test_map_distillations_equal_the_reference(golden, maps, stages):
    expected = golden["ilt"]
    old, new = maps
    value = ilt.encoder_distillation(new, old)
    assert value.item() == pytest.approx(
        expected["encoder_L2"]["L2_mean_over_all_elements"], **EXACT
    )
    squared = value.item() * new[0].numel()
    key = "L2_squared_norm_sum_per_image"
    assert squared == pytest.approx(expected["encoder_L2"][key], **EXACT)

    old_stages, new_stages = ([*part.unbind(0)] for part in stages)
    decoder = expected["decoder_stages_L2"]
    value = ilt.decoder_distillation(new_stages, old_stages)
    assert value.item() == pytest.approx(decoder["mean_over_branches"], **EXACT)
    each = [
        ilt.decoder_distillation([a], [b]).item()
        for a, b in zip(new_stages, old_stages, strict=True)
    ]
    assert each == pytest.approx(decoder["per_branch_mse_old_channels"], **EXACT)

    for form, key in (
        ("batch", "batch_similarity_B4"),
        ("pixel", "pixel_similarity_alternative"),
        ("pooled", "batch_similarity_after_global_avg_pool"),
    ):
        value = ilt.similarity_distillation(new, old, form).item()
        assert value == pytest.approx(expected["SPKD"][key], **EXACT)


def test_the_sum_of_the_published_losses(golden, outputs, maps):
    z_old, z, z_fixed, labels = outputs
    expected, ce = golden["ilt"]["total_seed0"], ilt.cross_entropy(z, labels)
    old_only = torch.where(labels < 5, labels, 255)
    encoder = ilt.encoder_distillation(*maps)
    baseline = ilt.output_distillation(z, z_old, labels, student="old")
    totals = {
        "released LD1: CE + 1*KD_released_code": ilt.output_distillation(z, z_fixed, old_only),
        "released LD2: CE + 50*MSE(encoder)": 50 * encoder,
        "MiB baseline ILT: CE + 100*KD_MiB + 100*MSE": 100 * baseline + 100 * encoder,
    }
    for key, distilled in totals.items():
        assert (ce + distilled).item() == pytest.approx(expected[key], **EXACT)


def test_gradients_equal_the_reference(golden, outputs, maps, stages):
    z_old, z, z_fixed, labels = outputs
    old, new = maps
    everywhere, old_only = labels * 0, torch.where(labels < 5, labels, 255)
    losses = {
        "d KD_released_code_T1 / d z_new": (
            z,
            lambda z: ilt.output_distillation(z, z_fixed, old_only),
        ),
        "d L2_mean / d f_new": (new, lambda f: ilt.encoder_distillation(f, old)),
        "d mean_over_branches / d d_new": (
            stages[1],
            lambda d: ilt.decoder_distillation([*d.unbind(0)], [*stages[0].unbind(0)]),
        ),
        "d SPKD_batch_similarity / d f_new": (new, lambda f: ilt.similarity_distillation(f, old)),
    }
    for t in (1, 2):
        losses |= {
            f"d KD_full_softmax_T{t} (all_pixels) / d z_new": (
                z,
                lambda z, t=t: ilt.output_distillation(z, z_old, everywhere, t),
            ),
            f"d KD_restricted_softmax_T{t} (all_pixels) / d z_new": (
                z,
                lambda z, t=t: ilt.output_distillation(z[:, :5], z_old, everywhere, t),
            ),
        }
    assert losses.keys() == golden["ilt"]["gradients_seed0"].keys()
    for key, expected in golden["ilt"]["gradients_seed0"].items():
        at, loss = losses[key]
        _, gradient = value_and_gradient(loss, at)
        assert gradient.abs().sum().item() == pytest.approx(expected["abs_sum"], **EXACT), key
        assert gradient.flatten()[:3].tolist() == pytest.approx(expected["first3"], **EXACT), key


def test_what_mib_has_too_is_the_same(outputs):
    z_old, z, _, labels = outputs
    ours = ilt.output_distillation(z, z_old, labels, student="old")
    assert ours.item() == pytest.approx(mib.distillation(z, z_old).item(), **EXACT)
    theirs = mib.cross_entropy(z, labels)
    assert ilt.cross_entropy(z, labels).item() == pytest.approx(theirs.item(), **EXACT)


@pytest.mark.parametrize("form", ["batch", "pooled", "pixel"])
def test_similarity_has_its_invariances_and_finite_gradients(maps, form):
    old, new = maps
    value = ilt.similarity_distillation(new, old, form)
    scaled = ilt.similarity_distillation(7 * new, old, form)
    assert scaled.item() == pytest.approx(value.item(), **EXACT)
    order = [2, 0, 3, 1]
    permuted = ilt.similarity_distillation(new[order], old[order], form)
    assert permuted.item() == pytest.approx(value.item(), **EXACT)
    alone = ilt.similarity_distillation(new[:1], old[:1], form).item()
    assert (alone == pytest.approx(0, abs=1e-12)) == (form != "pixel")
    for at in (old, torch.zeros_like(old)):  # where old and new agree; dead features
        value, gradient = value_and_gradient(
            lambda f, at=at: (
                ilt.similarity_distillation(f, at, form)
                + ilt.encoder_distillation(f, at)
                + ilt.decoder_distillation([f], [at])
            ),
            at,
        )
        assert value == pytest.approx(0, abs=1e-12) and gradient.norm() < 1e-9


def test_losses_are_finite_with_a_gradient_on_empty_input():
    z, void = torch.randn(1, 4, 3, 3), torch.full((1, 3, 3), 255)
    value, gradient = value_and_gradient(
        lambda x: ilt.cross_entropy(x, void) + ilt.output_distillation(x, z[:, :2], void), z
    )
    assert value == 0 and (gradient == 0).all()
    labels = torch.randint(0, 4, (1, 3, 3))
    plain = F.cross_entropy(z, labels)
    assert ilt.cross_entropy(z, labels).item() == pytest.approx(plain.item(), rel=1e-5)


def test_gradients_of_the_losses():
    torch.manual_seed(0)
    z = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    old, labels = (
        torch.randn(2, 4, 2, 2, dtype=torch.float64),
        torch.tensor([[[0, 1], [255, 3]]] * 2),
    )
    for loss in (
        lambda z: ilt.output_distillation(z, old[:, :3], labels, 2.0),
        lambda z: ilt.output_distillation(z, old[:, :3], labels, 2.0, "old"),
        lambda z: ilt.similarity_distillation(z, old, "batch"),
        lambda z: ilt.similarity_distillation(z, old, "pixel"),
    ):
        assert torch.autograd.gradcheck(loss, z)


def test_a_frozen_encoder_neither_learns_nor_moves_its_statistics():
    model = common.DeepLabV3("small", 8, [3, 1]).train()
    ilt.freeze_encoder(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = ilt.sgd(model, 0.1, trees.arguments("ilt", "--dataset shapes"))
    model(torch.randn(4, 3, 64, 64))[0].square().mean().backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(k.startswith("trunk.") for k in changed)
    assert "aspp.convs.0.1.running_mean" in changed and "head.0.weight" in changed


def test_presets_fill_in_only_what_was_not_typed():
    def resolved(flags):
        return trees.arguments("ilt", flags)

    paper = resolved("--dataset shapes")
    assert all(getattr(paper, key) == value for key, value in ilt.PRESETS["paper"].items())
    baseline = resolved("--dataset shapes --preset baseline")
    assert all(getattr(baseline, key) == value for key, value in ilt.PRESETS["baseline"].items())
    for flags in ("--preset baseline", "--setting disjoint --encoder-kd 3 --preset baseline"):
        typed = resolved(f"{flags} --setting disjoint --encoder-kd 3")
        assert (typed.setting, typed.encoder_kd, typed.output_kd) == ("disjoint", 3, 100)
    assert resolved("--setting overlapped").freeze_encoder is True
    assert resolved("--no-freeze-encoder").freeze_encoder is False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("", {"ce", "output"}),
        ("--preset baseline", {"ce", "output", "encoder"}),
        ("--output-kd 0 --no-freeze-encoder", {"ce"}),
        (
            "--output-kd 0 --no-freeze-encoder --encoder-kd 50 --decoder-kd 50",
            {"ce", "encoder", "decoder"},
        ),
        ("--output-kd 0 --similarity-kd 10 --similarity-form pixel", {"ce", "similarity"}),
        ("--temperature 2 --student old --similarity-kd 10", {"ce", "output", "similarity"}),
        ("--output-pixels all", {"ce", "output"}),
    ],
)
def test_every_scheme_runs(start, flags, parts):
    status, out, err = start(f"{TINY} --epochs 1 {flags} --out one", method="ilt")
    assert (status, err) == (0, "") and out.startswith("preset ")
    (folder,) = Path("one").iterdir()
    header = (folder / "train.csv").read_text().splitlines()[0].split(",")
    assert {*header} == {"step", "iteration", "lr_factor", *parts}
    a, b = (torch.load(folder / f"step_{k}.pt", weights_only=True)["model"] for k in (0, 1))
    frozen = all(torch.equal(a[k], b[k]) for k in a if k.startswith("trunk."))
    assert frozen == ("--no-freeze-encoder" not in flags and "baseline" not in flags)


def test_similarity_of_one_image_is_refused(start):
    status, _, err = start(f"{TINY} --similarity-kd 1 --batch 1", method="ilt")
    assert status == 2 and "--batch 2 or more, or --similarity-form pixel" in err
