"""How every command starts and ends: a fault is one line and an exit status.

0: all is well. 2: something that was given cannot be used. 1: any other trouble. 128 and more: a
signal. An error of the program itself stays a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from data.files import InputError

# words of RuntimeErrors whose cause lies outside the program -> what to say
CAUSES = {
    "DataLoader worker": "a process that reads images was ended from outside, or had no memory or "
    "no room in /dev/shm left: try fewer --workers, or --workers 0",
    "shared memory": "no room in /dev/shm, where processes hand over images: try --workers 0",
    "</torch_": "no room in /dev/shm, where processes hand over images: try --workers 0",
    "out of memory": "no memory left on the GPU: try a smaller --batch or --crop",
    "allocate memory": "no memory left: try a smaller --batch or --crop, or --workers 0",
    "not enough memory": "no memory left: try a smaller --batch or --crop, or --workers 0",
    "onnection closed by peer": "another process has ended, see its message",
    "onnection reset by peer": "another process has ended, see its message",
    "remote process": "another process has ended, see its message",
}


def run(name: str, parse: Callable, work: Callable, saved: Callable = lambda _: False) -> int:
    """Does the work of a command, and returns its exit status.

    name        what the line of a fault begins with
    parse       gives the flags
    work        called with them; returns an exit status, None is 0
    saved       says, after a fault, whether something was saved that a second try starts from
    """
    prepare_terminal()
    args = None
    try:
        args = parse()
        for key, value in vars(args).items():
            if value == "" or (isinstance(value, list) and "" in value):
                raise InputError(f"{key}: empty. A variable of the shell that has no value?")
        status, message = work(args) or 0, ""
        sys.stdout.flush()
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (Exception, KeyboardInterrupt) as error:
        status, message = explain(error)
        if not message:
            raise
        if status != 2 and not isinstance(error, FloatingPointError) and args and saved(args):
            message += "; the same command goes on from what was saved before"
    if message:
        print(f"{name}: {message}", file=sys.stderr)
    return status


def prepare_terminal() -> None:
    """Output may be closed (>&-), and a terminal may lack letters of a class's or a file's name."""
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def show(text: str, end: str = "\n") -> None:
    """Prints to the terminal, as long as there is one: no run ends because nobody looks on."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit status and the line for a fault. "": an error of the program itself."""
    text = str(error).strip()
    if isinstance(error, InputError):  # a worker process hands it over inside a traceback
        return 2, text.rsplit("InputError: ", 1)[-1]
    if isinstance(error, KeyboardInterrupt):
        return 128 + (*error.args, signal.SIGINT)[0], "stopped"
    last = (text.splitlines() or [""])[-1]  # of a worker's traceback
    if isinstance(error, (RuntimeError, MemoryError, OSError)):
        text = "allocate memory" if isinstance(error, MemoryError) else text
        if cause := next((say for words, say in CAUSES.items() if words in text), ""):
            return 1, cause
    if isinstance(error, (OSError, FloatingPointError)):
        return 1, last
    return 1, ""
