"""data/environment.py: what config.json says about where a run ran."""

import json

import torch
import torchvision

from data import environment


def test_the_cpu_and_a_gpu_are_described_in_plain_values(monkeypatch):
    there = environment.environment("cpu")
    assert there["torchvision"] == torchvision.__version__ and there["device"] == "cpu"
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device}")
    monkeypatch.setattr(
        environment, "output_of", lambda *words: asked.append(words) or "580.1\n580.1"
    )
    card = json.loads(json.dumps(environment.environment("cuda:1")))
    assert asked[0][0] == "nvidia-smi"
    assert (card["device"], card["driver"]) == ("card cuda:1", "580.1")
    assert (card["cuda"], card["cudnn"]) == (torch.version.cuda, torch.backends.cudnn.version())
    assert card["tf32 in matrix products"] is False
    torch.set_float32_matmul_precision("high")
    try:
        assert environment.environment("cuda:1")["tf32 in matrix products"] is True
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_command_that_is_missing_or_fails_is_unknown():
    assert environment.output_of("no-such-command") == "unknown"
    assert environment.output_of("git", "no-such-subcommand") == "unknown"
    assert environment.output_of("git", "--version").startswith("git version")
    assert len(environment.git_commit().removesuffix("-dirty")) in (7, 40)
