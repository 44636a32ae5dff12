"""Several processes of one run, under torchrun; and signals, on which a run saves and ends."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from data.files import InputError


def processes() -> tuple[int, int]:
    """This process's rank, and how many torchrun has started: a device each."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if processes()[1] > 1:
        dist.all_reduce(values)
    return values


def broadcast(value: object, device: str) -> object:
    """The first process's value, once it has got here."""
    values = [value]
    if processes()[1] > 1:
        dist.broadcast_object_list(values, device=torch.device(device))
    return values[0]


def init_distributed(args: argparse.Namespace) -> None:
    """Under torchrun: joins the other processes."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % count:
        raise InputError(
            f"--batch {args.batch}: {count} processes share it, it has to be a multiple of {count}"
        )
    if count > 1:
        on_stop(signal.SIG_DFL)  # a process that waits for the others cannot save
        cuda = args.device != "cpu"
        if cuda:
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if cuda else "gloo")


def on_stop(handler: Callable) -> None:
    """Handles SIGINT and SIGTERM, unless they are ignored, as under nohup."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def leave(number: int, _: object = None) -> None:
    raise KeyboardInterrupt(number)


def request_stop(requests: list[int], number: int, _: object = None) -> None:
    """Inside the loop a signal waits for the end of the iteration; a second one does not."""
    requests.append(number)
    on_stop(leave)


def ignore_signals_in_worker(_: int) -> None:
    """A signal to all processes of a run must not take the main process's batches away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
