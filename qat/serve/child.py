"""A child process that is to end as this one is told to."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import FrameType


@dataclass(frozen=True)
class Launch:
    """A child process to start."""

    command: list[str]
    """Program and arguments."""
    environment: dict[str, str]
    """Variables beside those of this process."""


def supervise(launch: Launch) -> int:
    """Run a child process to its end, pass signals on, and return its exit code.

    A child that a signal ended gives 128 + its number, as in a shell.
    """
    print("starting", " ".join(launch.command), file=sys.stderr, flush=True)
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        elif child.poll() is None:
            child.send_signal(number)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        # a session of its own: Ctrl-C in a terminal would reach it twice, once through us
        child = subprocess.Popen(
            launch.command, env=os.environ | launch.environment, start_new_session=True
        )
        for number in early:
            child.send_signal(number)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child is not None and child.poll() is None:
            child.kill()
            child.wait()
    return 128 - code if code < 0 else code
