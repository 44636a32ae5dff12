"""Iterations of every method as on a GPU, without one: PyTorch's "meta" device stands for it.

Its tensors have shapes and types, but no values. So this sees devices that are mixed, copies from
the host, and how much memory lives at once: VOC's recipe, ResNet-101, bfloat16, batch 24. It does
not see values, kernels, and what these need for themselves.
"""

import collections
import contextlib
import importlib
import weakref

import pytest
import torch
import trees
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common

pytestmark = pytest.mark.slow
GPU, ITERATIONS = "meta", 2


class Card(TorchDispatchMode):
    """Refuses operations on two devices; counts copies from the host and bytes that are alive.

    copies      of each, whether the host went on at once
    """

    def __init__(self):
        super().__init__()
        self.copies, self.live, self.peak, self.known = [], 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if len({x.device for x in given if x.ndim}) > 1:  # a single number may lie on the host
            raise RuntimeError(f"{function} of {[x.device.type for x in given]}")
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default and given[0].device != result.device:
            self.copies.append(kwargs.get("non_blocking", False))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type == GPU:
                self.note(x.untyped_storage())
        return result

    def note(self, storage):
        if storage not in self.known:
            self.known.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, count):
        self.live -= count


@pytest.fixture
def card(monkeypatch):
    """The stand-in; what it has in another way than a GPU is replaced."""
    casts = []

    @contextlib.contextmanager
    def autocast(device, dtype, enabled):
        casts.append(dtype if enabled else torch.float32)
        yield
        casts.pop()

    convolve, sgd, loader = nn.Conv2d._conv_forward, torch.optim.SGD, torch.utils.data.DataLoader

    def conv_forward(conv, x, weight, bias):
        dtype = casts[-1] if casts else torch.float32
        bias = bias if bias is None else bias.to(dtype)
        return convolve(conv, x.to(dtype), weight.to(dtype), bias)

    def nonzero(x, as_tuple=False):
        """All of them: as many as there can be."""
        found = x.new_zeros((x.numel(), x.ndim), dtype=torch.int64)
        return found.unbind(1) if as_tuple else found

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", conv_forward)
    monkeypatch.setattr(Tensor, "nonzero", nonzero)
    monkeypatch.setattr(torch.optim, "SGD", lambda *given, fused, **named: sgd(*given, **named))
    monkeypatch.setattr(
        torch.utils.data, "DataLoader", lambda *given, pin_memory, **named: loader(*given, **named)
    )
    monkeypatch.setattr(common, "STRIP", (common.STRIP[1],) * 2)
    return Card()


def train(method, index, monkeypatch, card):
    """Some iterations of one step of a script's own loop."""
    args = trees.arguments(method, "--dataset shapes --task 15-1")
    module = importlib.import_module(method)
    for key, value in (module.RECIPE["voc"] | {"batch": 24}).items():
        setattr(args, key, value)
    args.device, args.precision, args.weights = GPU, "bf16", "none"
    build = common.build_model

    def build_model(*given):
        with torch.device(GPU):
            return build(*given)

    def models(run, step):
        model, old_model = run.build(step), None
        if index:
            old_model = run.build(run.data.steps[index - 1]).eval().requires_grad_(False)
        return old_model, model

    def batches(run, step, *_, **__):
        run.checked = collections.defaultdict(lambda: 100)  # these checks look at values
        keys = [[(0, 0)] * args.batch] * ITERATIONS
        view = common.View([(0, 0)], run.data.labels(step), args.crop, (0, 0))
        card.copies.clear()  # those of modules
        for batch in common.load_batches(view, keys, args):
            yield batch
            run.losses = None

    monkeypatch.setattr(common, "build_model", build_model)
    monkeypatch.setattr(common.Run, "steps", lambda run: [run.data.steps[index]])
    for name, new in (("models", models), ("batches", batches), ("finish", lambda *_: None)):
        monkeypatch.setattr(common.Run, name, new)
    monkeypatch.setattr(common.Run, "parallel", lambda run, model: model.to(GPU))
    if hasattr(module, "find_thresholds"):
        thresholds = torch.full((16,), 0.5, device=GPU)
        monkeypatch.setattr(module, "find_thresholds", lambda *_: thresholds)
    common.pixel_statistics(GPU)
    with card:
        module.main(args)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("method", trees.METHODS)
def test_devices_copies_and_memory_of_an_iteration(monkeypatch, card, method, index):
    train(method, index, monkeypatch, card)
    assert card.copies == [True] * 2 * ITERATIONS
    assert 4 < card.peak / 2**30 < 16


def test_a_tensor_left_on_the_host_is_found(monkeypatch, card):
    module = importlib.import_module("mib_unbiased")
    monkeypatch.setattr(module, "IGNORE", torch.tensor([255]))
    with pytest.raises(RuntimeError, match=r"ne.Tensor of .*'meta', 'cpu'"):
        train("mib_unbiased", 0, monkeypatch, card)
