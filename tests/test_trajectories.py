"""Whole training steps against the authors' own trainers, in float64 on the CPU.

trajectories.json holds what the published programs of MiB, PLOP and DKD gave in twelve iterations
of one step: losses, learning rates, weights, confusion matrix. Weights, pictures and labels are
formulas, so that no random numbers take part. Each case runs the script's own `main`; replaced are
the batches, the random start of a classifier, and PLOP's thresholds, which are inputs.

CISS_TRAJECTORIES=FILE takes the cases of another file of the same schema.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from torch import Tensor

import common

FILE = os.environ.get("CISS_TRAJECTORIES") or Path(__file__).with_name("trajectories.json")
GOLDEN = json.loads(Path(FILE).read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}
MIB = "mib_unbiased --ce {} --kd {} --init {}"
SCRIPTS = {  # the flags that make a script the published program
    "ft": [MIB.format("plain", "none", "random")],
    "lwf": [MIB.format("plain", "plain", "random")],
    "lwf_mc": [MIB.format("binary", "binary", "random")],
    "mib": [MIB.format("unbiased", "unbiased", "background")],
    "ilt": ["ilt --preset baseline"],
    "plop": ["ucd --base plop --contrast 0", "icd --no-external --statistics pod"],
    "dkd": ["dkd"],
}


def method_of(case: dict) -> str:
    return "lwf_mc" if case["name"].startswith("lwf_mc") else case["method"]


def flags_of(case: dict) -> str:
    """The weights of a case's losses, as flags."""
    weights, hyper = case["hyper"]["weights"], case["hyper"]
    flags = f" --lr {hyper['lr']!r} --epochs {hyper['epochs']}"
    if method_of(case) == "dkd":
        beta = max(weights.get("positive", 0), weights.get("negative", 0))
        flags += f" --alpha {weights.get('kd', 0)} --beta {beta}"
        flags += f" --positive-weight {weights['positive_weight']}"
        flags += "".join(
            f" --no-distil-{k}" for k in ("positive", "negative") if not weights.get(k)
        )
        flags += f" --init {'random' if case['new_classifier'] == 'formula' else 'auxiliary'}"
        return flags
    names = {"kd": "kd-weight", "output": "output-kd", "encoder": "encoder-kd"}
    names |= {"pod": "pod", "pod_logits": "pod-logits"}
    return flags + "".join(f" --{names[key]} {value!r}" for key, value in weights.items())


# the formulas


def hashed(i: np.ndarray, t: int | np.ndarray) -> np.ndarray:
    p, a, b, c, d = (GOLDEN["formula"][k] for k in "PABCD")
    return (a * i**2 + b * i * (t + 1) + c * t + d) % p


def uniform(i: np.ndarray, t: int | np.ndarray) -> np.ndarray:
    return 2 * (hashed(i, t) / GOLDEN["formula"]["P"]) - 1


def weights_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The formula's value of every tensor of a network."""
    found = {}
    for t, (name, kind, shape, *given) in enumerate(GOLDEN["tensors"]):
        v = uniform(np.arange(int(np.prod(shape, dtype=int)), dtype=np.int64), t)
        value = {
            "conv": np.sqrt(6 / np.prod(shape[1:])) * v,
            "bn_weight": 1 + 0.1 * v,
            "bn_bias": 0.1 * v,
            "bn_mean": 0.1 * v,
            "bn_var": 1 + 0.5 * v,
            "count": 0 * v,
            "classifier_weight": 1.5 / np.sqrt(np.prod(shape[1:])) * v,
            "classifier_bias": 0.2 * v,
            "given": np.array(*given, dtype=float) if given else v,
        }[kind]
        if name in state:
            found[name] = torch.tensor(value).reshape(shape).to(state[name].dtype)
    assert found.keys() == state.keys()
    return found


def batch(j: int, first: int, classes: int) -> tuple[Tensor, Tensor]:
    """Batch j of the step whose classes begin with `first`: images, and labels with 255 in them."""
    count, size, block = GOLDEN["batch"], GOLDEN["crop"], GOLDEN["block"]
    g = size // block
    n, r, c = np.ogrid[:count, :g, :g]
    q = hashed((n * g + r) * g + c, 3000 + j) % 20
    cells = np.where(q < 10, 0, np.where(q < 18, first + (q - 10) % classes, 255))
    labels = cells.repeat(block, 1).repeat(block, 2)
    n, ch, y, x = np.ogrid[:count, :3, :size, :size]
    fine = uniform(((n * 3 + ch) * size + y) * size + x, 1000 + 2 * j)
    coarse = uniform(((n * 3 + ch) * g + y // block) * g + x // block, 1001 + 2 * j)
    shade = uniform(3 * labels[:, None] + ch, 999)
    return torch.tensor(0.8 * fine + 0.8 * coarse + 0.9 * shade), torch.tensor(labels)


# the comparison


def near(ours: float, theirs: float, scale: float, tolerance: float) -> bool:
    return abs(ours - theirs) <= tolerance * scale


def sizes(tensor: Tensor, before: Tensor | None = None) -> list[float]:
    """Sum, norm, and the norm of the change."""
    found = [tensor.double().sum().item(), tensor.double().norm().item()]
    return found if before is None else [*found, (tensor - before).double().norm().item()]


def assert_sizes(ours: list[float], theirs: list[float], tolerance: float, name: str) -> None:
    assert near(ours[0], theirs[0], max(abs(theirs[0]), theirs[1]), tolerance), name
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert near(a, b, abs(b), tolerance), (name, a, b)


def part_of(name: str, classifiers: int) -> str:
    if name.startswith("trunk."):
        return "trunk"
    if not name.startswith("classifiers."):
        return "head"
    newest = name.startswith(f"classifiers.{classifiers - 1}.")
    return "new_classifier" if newest else "old_classifiers"


def runs() -> list:
    found = []
    for name, case in CASES.items():
        scripts = SCRIPTS[method_of(case)]
        if "without_head_map" in name:  # level 5 is the map in front of the classifiers
            scripts = ["icd --no-external --statistics pod --levels 1 2 3 4"]
        found += [pytest.param(case, s, id=f"{name}-{s.split()[0]}") for s in scripts]
    return found


@pytest.fixture
def double(monkeypatch):
    """float64 everywhere, also where the scripts ask for float32."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("case", "script"), runs())
def test_a_script_trains_as_the_authors_program(monkeypatch, tmp_path, double, case, script):
    classes, tolerance = case["classes"], case.get("tolerance") or 1e-9
    last = len(classes) - 1  # the step that is trained
    first, total = sum(classes[:-1]) + 1, case["hyper"]["iterations"]
    method, *flags = script.split()
    module = importlib.import_module(method)
    recipe = module.RECIPE["voc"] | {
        "bn_momentum": case["hyper"]["bn_momentum"],
        "warmup": case["hyper"]["warmup"],
        "dropout": 0.0,
        "dilate_first": False,
    }
    monkeypatch.setitem(module.RECIPE, "folder", recipe)
    if case.get("thresholds"):
        thresholds = torch.tensor(case["thresholds"])
        monkeypatch.setattr(module, "find_thresholds", lambda *_: thresholds)
    seen = {"losses": [], "rates": [], "decay": None}

    def load_batches(view, keys, args):
        """The last batch for the test; for training nothing before the step of the case."""
        if view.seed is None:
            yield batch(total - 1, first, classes[-1])
        elif view.seed[1] == last:
            for j in range(total):
                images, labels = batch(j, first, classes[-1])
                if case["void"] != "left out":  # background, or a negative of every class
                    labels[labels == common.IGNORE] = common.BACKGROUND
                yield images, labels

    parallel, batches, log = common.Run.parallel, common.Run.batches, common.Run.log

    def started(run, model):
        """In place of earlier training, and of random numbers."""
        net, state = parallel(run, model), model.state_dict()
        step = len(model.classifiers) - 2
        values = weights_of(state)
        if step == last and step and case["new_classifier"] != "formula":
            values = {k: v for k, v in values.items() if not k.startswith("classifiers.")}
        elif step == last and step:
            values = {k: v for k, v in values.items() if k.startswith(f"classifiers.{step + 1}.")}
        model.load_state_dict(state | values)
        seen["start"] = {k: v.clone() for k, v in model.state_dict().items()}
        return net

    def observed(run, step, model, optimizer, *more, **named):
        groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        parts: dict[str, dict] = {}
        for name, parameter in model.named_parameters():
            part = parts.setdefault(part_of(name, len(model.classifiers)), groups[id(parameter)])
            assert part["lr"] == groups[id(parameter)]["lr"]
        for values in batches(run, step, model, optimizer, *more, **named):
            seen["rates"].append({part: group["lr"] for part, group in parts.items()})
            seen["decay"] = {part: group["weight_decay"] for part, group in parts.items()}
            yield values
        seen["end"] = {k: v.clone() for k, v in model.state_dict().items()}

    def logged(run, losses):
        seen["losses"].append({name: loss.item() for name, loss in losses.items()})
        return log(run, losses)

    for name, new in (("parallel", started), ("batches", observed), ("log", logged)):
        monkeypatch.setattr(common.Run, name, new)
    monkeypatch.setattr(common, "load_batches", load_batches)
    monkeypatch.setattr(common.Run, "draw", lambda *_: None)

    # as many own pictures as the schedule needs: their pixels are never used
    images = max(1, total // case["hyper"]["epochs"]) * GOLDEN["batch"]
    for k, new in enumerate(np.split(np.arange(1, sum(classes) + 1), np.cumsum(classes)[:-1])):
        for i in range(max(images, len(new))):
            shown = trees.mask([int(new[i % len(new)])], 48, 48)
            for part in ("train", "test")[: 2 if i < len(new) else 1]:
                trees.write(tmp_path / f"own/{part}/images/{k}_{i}.png", trees.picture(0, 48, 48))
                trees.write(tmp_path / f"own/{part}/masks/{k}_{i}.png", shown)
    (tmp_path / "own/classes.txt").write_text("\n".join(f"c{i}" for i in range(sum(classes))))
    task = "offline" if last == 0 else f"{classes[0]}-{classes[1]}"
    small = f"--backbone small --weights none --output-stride 8 --crop {GOLDEN['crop']}"
    line = f"--dataset folder --data {tmp_path}/own --task {task} --setting overlapped {small} "
    line += f"--batch {GOLDEN['batch']} --workers 0 --device cpu --out {tmp_path}/runs"
    typed = [*line.split(), *flags_of(case).split(), *flags]
    monkeypatch.setattr(sys, "argv", [str(common.HERE / f"{method}.py"), *typed])
    args = common.parse(module.flags())
    module.main(args)

    # inputs
    pictures, labels = batch(0, first, classes[-1])
    assert sizes(pictures) == pytest.approx(case["inputs"]["images"], rel=1e-12)
    counted = {str(k): int((labels == k).sum()) for k in labels.unique().tolist()}
    assert counted == case["inputs"]["label_counts"]

    # losses, rates, weights, confusion matrix
    skipped = case.get("not_compared") or []
    if isinstance(skipped, dict):
        skipped = [name for names in skipped.values() for name in names]
    ours = {name: [row.get(name, 0.0) for row in seen["losses"]] for name in seen["losses"][0]}
    if "internal" in ours:
        ours["pod"] = ours.pop("internal")
    parts = [name for name in case["losses"] if name != "total" and name not in skipped]
    ours["total"] = np.sum([ours[name] for name in parts], 0).tolist()
    for name in [*parts, *(["total"] if "total" not in skipped else [])]:
        theirs = case["losses"][name]
        least = 1e-6 * max(map(abs, theirs))
        assert len(ours[name]) == len(theirs)
        for i, (a, b) in enumerate(zip(ours[name], theirs, strict=True)):
            assert near(a, b, max(abs(b), least), tolerance), (name, i, a, b)
    for part, rates in case["learning_rates"].items():
        if part not in skipped:
            assert [row[part] for row in seen["rates"]] == pytest.approx(rates, rel=tolerance), part
    for part, decay in case["weight_decay"].items():
        assert part in skipped or seen["decay"][part] == decay, part
    for key in ("start", "end"):
        for name, theirs in case[key].items():
            if name not in skipped and name.rsplit(".", 1)[0] not in skipped:
                before = seen["start"][name] if key == "end" else None
                assert_sizes(sizes(seen[key][name], before), theirs, tolerance, f"{key} {name}")
    result = json.loads((next((tmp_path / "runs").glob("*")) / "metrics.json").read_text())
    entry = result["steps"][-1]
    assert entry["confusion"] == case["confusion"]
    nan, found = float("nan"), entry["iou"].values()  # of classes without a pixel
    theirs = [nan if value is None else value for value in case["iou"]]
    ours = [nan if value is None else value for value in found]
    assert ours == pytest.approx(theirs, rel=1e-7, nan_ok=True)
