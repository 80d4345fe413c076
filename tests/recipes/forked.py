"""Runs in processes of their own that share one start: forked from a server that has imported.

Such a process can be killed at an exact place: its N-th call of a function.
"""

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.recipes.running import run

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.recipes.running", "matplotlib.pyplot", "PIL.Image"])


@dataclass(frozen=True)
class Kill:
    """SIGKILL in or around a call."""

    target: str
    """``module:attribute`` or ``module:Class.attribute`` of the function."""
    call: int = 1
    """Which call of it in the process."""
    after: bool = False
    """Once the function has done its work, instead of before it."""


def run_forked(words: Sequence[str], log: Path, kill: Kill | None = None) -> int:
    """The exit code of a run in a forked process (-9 when it was killed); its output in ``log``."""
    process = _CONTEXT.Process(target=_child, args=(list(words), log, kill))
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the run did not end:\n{log.read_text('utf-8')}")
    return process.exitcode


def _child(words: list[str], log: Path, kill: Kill | None) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if kill is not None:
        _arm(kill)
    code = run(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _arm(kill: Kill) -> None:
    module, _, path = kill.target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != kill.call:
            return original(*args, **kwargs)
        if kill.after:
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, wrapper)
