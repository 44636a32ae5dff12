"""ICD's losses against the reference values (golden.json) and the properties they must have."""

import ast
import inspect
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trees
from torch import nn
from trees import EXACT, TINY

import common
import dkd
import icd
import ilt
import mib_unbiased as mib
import ucd


def test_statistics_and_matching_equal_the_reference(golden):
    expected = golden["icd"]
    old, new, _ = trees.levels_and_logits()
    each = [
        (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean().item()
        for x, y in zip(icd.statistics(new[1]), icd.statistics(old[1]), strict=True)
    ]
    assert each == pytest.approx(expected["internal_layer1_six_stats"], **EXACT)
    total = icd.internal_distillation(new, old).item()
    assert total == pytest.approx(expected["internal_mean"], **EXACT)
    halves = [icd.internal_distillation(new, old, w).item() for w in ("means", "deviations")]
    assert sum(halves) / 2 == pytest.approx(total, **EXACT)
    distance = icd.hierarchical_distance(new[1], old[1]).item()
    assert distance == pytest.approx(expected["ReviewKD_HCL_layer1"], **EXACT)
    pods = [icd.local_pod(x, y).item() for x, y in zip(new, old, strict=True)]
    assert pods == pytest.approx(golden["plop"]["each_layer_pow_factor1"], **EXACT)


def test_the_attention_gate_equals_the_reference(golden):
    expected = golden["icd"]["attention"]
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal((2, 4, 9, 9)))
    gate = icd.MultiScaleAttention(4).double()
    convs = [gate.near, *(conv for strip in gate.strips for conv in strip)]
    for conv in convs:
        shape = conv.weight.shape
        conv.weight.data = torch.tensor(0.1 * rng.standard_normal(shape))
        conv.bias.data = torch.tensor(0.1 * rng.standard_normal(4))
    gate.mix.weight.data = torch.tensor(0.1 * rng.standard_normal((4, 4, 1, 1)))
    gate.mix.bias.data = torch.tensor(0.1 * rng.standard_normal(4))
    out = gate(x)
    assert out.sum().item() == pytest.approx(expected["out_sum"], **EXACT)
    assert out.abs().mean().item() == pytest.approx(expected["out_abs_mean"], **EXACT)
    assert out[0, 0, 0, :3].tolist() == pytest.approx(expected["out[0,0,0,:3]"], **EXACT)


def levels(batch=2, seed=0, scale=1.0):
    torch.manual_seed(seed)
    shapes = ((4, 16, 20), (6, 8, 10), (8, 4, 5), (8, 4, 5), (5, 4, 5))  # not square
    return [scale * torch.randn(batch, *s, dtype=torch.float64) for s in shapes]


def external():
    return icd.ExternalDistillation([4, 6, 8, 8, 5], 16).double().requires_grad_(False)


def test_equal_maps_have_no_distance_and_no_gradient():
    maps, module = levels(), external()
    leaves = [m.clone().requires_grad_() for m in maps]
    loss = icd.internal_distillation(leaves, maps) + module(leaves, maps)
    loss = loss + sum(icd.local_pod(x, y) for x, y in zip(leaves, maps, strict=True))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert all(m.grad.isfinite().all() and m.grad.norm() < 1e-6 for m in leaves)
    dead = [torch.zeros_like(m).requires_grad_() for m in maps]
    (icd.internal_distillation(dead, maps) + module(dead, maps)).backward()
    assert all(m.grad.isfinite().all() for m in dead)


def test_internal_distillation_is_bounded_and_sees_shape_not_size():
    old, new = levels(seed=0), levels(seed=1)
    loss = icd.internal_distillation(new, old)
    assert 0 < loss < 4 and icd.internal_distillation(new, [-m for m in new]) <= 4
    doubled = icd.internal_distillation([2 * m for m in old], old)
    assert doubled.item() == pytest.approx(0, abs=1e-6)
    flipped = icd.internal_distillation([m.flip(3) for m in new], [m.flip(3) for m in old])
    assert flipped.item() == pytest.approx(loss.item(), **EXACT)


def test_the_external_term_sees_relations_between_levels():
    """Images swapped on one level alone: each level still holds the same maps."""
    module, old = external(), levels(batch=3)
    swapped = [old[0][[1, 2, 0]], *old[1:]]
    assert module(swapped, old) > 0.1
    for level in range(4):
        moved = [m.clone() for m in old]
        moved[level] = moved[level][[1, 2, 0]]
        fused, before = module.fuse(moved), module.fuse(old)
        changed = [not torch.allclose(a, b) for a, b in zip(fused, before, strict=True)]
        assert changed == [i <= level for i in range(4)]  # from the top down
    assert all(m.square().mean((1, 2, 3)).sqrt().allclose(torch.ones(3).double()) for m in before)


def test_gradients_reach_every_level_evenly_and_never_the_attention():
    module, old = external().requires_grad_(False), levels()
    noise = levels(seed=3)
    leaves = [(m + 0.3 * n).requires_grad_() for m, n in zip(old, noise, strict=True)]
    module(leaves, old).backward()
    norms = torch.stack([m.grad.norm() / m.detach().norm() for m in leaves])
    assert norms.max() < 100 * norms.min()
    assert all(p.grad is None for p in module.parameters())
    again = external()
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True)
    )


def test_the_seed_leaves_other_random_numbers_alone():
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    icd.ExternalDistillation([4, 6, 8], 8, seed=9)
    assert torch.equal(torch.rand(1), before)


# a step


@pytest.mark.parametrize("flags", ["--levels 5 1", "--levels 7", "--levels 2"])
def test_levels_that_cannot_be(start, flags):
    status, _, err = start(f"{TINY} {flags}", method="icd")
    assert status == 2 and "--levels" in err and len(err.splitlines()) == 1


def test_the_five_levels_of_the_network():
    model = common.DeepLabV3("resnet18", 16, [3]).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 64, 96))[1]
        five = icd.levels_of(maps, [1, 2, 3, 4, 5])
    assert [m.shape[1] for m in five] == [64, 128, 256, 512, 256]
    assert any((m < 0).any() for m in five[:4])
    assert isinstance(model.head[2], nn.ReLU)
    some = icd.levels_of(maps, [2, 5])
    assert torch.equal(some[0], five[1]) and torch.equal(some[1], maps["head"])


# what several scripts have, repeated so that each can be read alone

SAME = {  # name: scripts whose function of this name has the same text
    **dict.fromkeys(("pod", "local_pod", "entropy", "median", "published_median"), (icd, ucd)),
    **dict.fromkeys(("find_thresholds", "pseudo_labels", "sure_share"), (icd, ucd)),
    **dict.fromkeys(("adaptive_cross_entropy", "unbiased_cross_entropy"), (icd, ucd)),
    **dict.fromkeys(("unbiased_distillation", "unbiased_losses", "initialise"), (icd, ucd)),
    "log_masses": (icd, mib, ucd),
    "sgd": (icd, ilt, mib, ucd),
}
OTHER = {  # name: why another script's function of this name has another text
    "main": "each has its own",
    "flags": "each has its own",
    "published_name": "each has its own",
    "sgd": "DKD decays the newest classifier alone",
    "initialise": "DKD: from the auxiliary classifier; MiB with its comment",
    "pseudo_labels": "MiB: of all background",
    "statistics": "ICD: of maps; MiB: of BatchNorm",
    "cross_entropy": "written otherwise; test_ilt.py compares the values",
    "unbiased_cross_entropy": "MiB with its comments; compared below",
    "unbiased_distillation": "MiB with alpha and mask; compared below",
    "unbiased_losses": "MiB with alpha; UCD's cross-entropy is over all pixels; test_dense.py",
}


@pytest.mark.parametrize("name", SAME)
def test_functions_of_one_name_have_one_text(name):
    """Their values: test_ucd.py."""
    found = {inspect.getsource(getattr(m, name)).replace("torch.nn.", "nn.") for m in SAME[name]}
    assert len(found) == 1


def test_no_other_function_is_in_two_scripts():
    for a, b in itertools.combinations((dkd, icd, ilt, mib, ucd), 2):
        for name, value in vars(a).items():
            if inspect.isfunction(value) and value.__module__ == a.__name__ and hasattr(b, name):
                assert {a, b} <= {*SAME.get(name, ())} or name in OTHER, (name, a, b)


def test_mibs_losses_are_the_same_in_three_scripts():
    torch.manual_seed(0)
    z, z_old = torch.randn(2, 7, 4, 5).double(), torch.randn(2, 4, 4, 5).double()
    labels = torch.randint(0, 8, (2, 4, 5))
    labels[labels == 7] = 255
    values = set()
    for old, keep in itertools.product((1, 4), (False, True)):
        found = [m.unbiased_cross_entropy(z, labels, old, keep).item() for m in (mib, ucd, icd)]
        assert found == pytest.approx([found[0]] * 3, **EXACT)
        values.add(round(found[0], 9))
    assert len(values) == 3  # `keep` matters where there are old classes
    found = [m.unbiased_distillation(z, z_old).item() for m in (mib, ucd, icd)]
    assert found == pytest.approx([found[0]] * 3, **EXACT)


def test_mibs_initialisation_is_the_same_in_three_scripts():
    """But for docstring and comments."""

    def code(module):
        (tree,) = ast.parse(inspect.getsource(module.initialise)).body
        return [ast.dump(line) for line in tree.body[1:]]

    assert code(mib) == code(ucd) == code(icd)


# whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("", {"ce", "internal", "external"}),
        ("--no-internal --no-external", {"ce"}),
        ("--no-external --statistics pod", {"ce", "internal"}),
        ("--base mib --statistics means", {"ce", "kd", "internal", "external"}),
        ("--levels 3 4 5 --precision bf16", {"ce", "internal", "external"}),
    ],
)
def test_every_row_of_the_ablation_runs(start, flags, parts):
    status, out, err = start(f"{TINY} --epochs 1 {flags} --out one", method="icd")
    assert (status, err) == (0, "") and out.startswith("ICD, reconstructed from its abstract")
    (folder,) = Path("one").iterdir()
    header = {*(folder / "train.csv").read_text().splitlines()[0].split(",")}
    assert header == {"step", "iteration", "lr_factor", *parts}
