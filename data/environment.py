"""What a run ran on: versions, device, driver, commit. Results can hang on each of them."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch
import torchvision


def environment(device: str) -> dict[str, str | int | bool]:
    """For config.json; what PyTorch computes with on this device."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
    }
    if not device.startswith("cuda"):
        return found | {"device": device, "threads": torch.get_num_threads()}
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found | {
        "device": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver.split("\n")[0],
        "tf32 in matrix products": torch.get_float32_matmul_precision() != "highest",
        "tf32 in convolutions": torch.backends.cudnn.allow_tf32,
    }


def git_commit() -> str:
    folder = str(Path(__file__).parent)
    return output_of("git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40")


def output_of(*command: str) -> str:
    """What a command prints; "unknown" where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
