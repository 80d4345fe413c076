"""Errors that a user can act on, and the exit codes that `train.py` and `qat` share.

====  ==========================================================================
0     done
1     the run failed: the traceback is printed (a full disk and too little memory get one message)
2     the input is wrong: one message, no traceback unless ``QAT_DEBUG=1``
130   interrupted by Ctrl+C: one line says how to go on
====  ==========================================================================
"""

import difflib
import errno
import logging
import os
import re
import select
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """The user's input is wrong: the message names key, value, what is allowed and the remedy."""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most similar to `name`, or None when nothing is close."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return close[0] if close else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with its leading space, or an empty string when nothing is close."""
    close = nearest(name, choices)
    return f" Did you mean '{close}'?" if close else ""


@contextmanager
def resumable(run_dir: Path, command: str) -> Iterator[None]:
    """Attach "Continue with: COMMAND" to whatever ends the block before its time.

    The note reaches the user through `run_main`. It is attached only once ``run_dir/config.yaml``
    exists, since a run without it cannot be resumed, and not to a `UserError`, which needs another
    input first.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        note = f"Continue with: {command}"
        if (run_dir / "config.yaml").is_file() and note not in _notes(error):
            error.add_note(note)
        raise


def run_main(fn: Callable[[], int | None]) -> int:
    """Call `fn` and turn what it raises into an exit code (see the module's table).

    `fn` may return an exit code of its own; None counts as 0.
    """
    # progress bars only for what takes longer than two seconds; tqdm reads this when first imported
    os.environ.setdefault("TQDM_DELAY", "2")
    # bitsandbytes, which PEFT imports, remarks that a kernel of the Hub is missing: not used here
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return fn() or 0
    except UserError as error:
        if os.environ.get("QAT_DEBUG") == "1":
            traceback.print_exc()
        else:
            _say(f"error: {error}", error)
        return 2
    except KeyboardInterrupt as error:
        return _interrupted(error)
    except SystemExit as error:
        # Lightning answers Ctrl+C during fit with its own clean-up and sys.exit(1)
        if isinstance(error.__context__, KeyboardInterrupt):
            return _interrupted(error)
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            return 1
        if disk_is_full(error):
            _say(_disk_message(error), error)
        elif is_out_of_memory(error):
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            _say(f"error: out of memory ({first}). What was saved is kept.", error)
        else:
            traceback.print_exc()
        return 1


def _stdout_is_closed() -> bool:
    """Whether the reader of stdout has gone (``... | head``); if so, nothing more is written."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLERR)
    if not poll.poll(0):
        return False
    # the interpreter flushes once more at exit and would complain there
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _interrupted(error: BaseException) -> int:
    notes = _notes(error)
    _say("Interrupted." + (f" {notes[0]}" if notes else ""))
    return 130


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from, newest first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _notes(error: BaseException) -> list[str]:
    return [note for link in _chain(error) for note in getattr(link, "__notes__", [])]


def disk_is_full(error: BaseException) -> bool:
    """Whether a full disk or quota is behind `error`; some libraries only say so in the text.

    "No space left on device" is what Rust ones say, "N requested and M written" is numpy's.
    """
    return any(
        (isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT))
        or "No space left on device" in str(link)
        or (isinstance(link, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(link)))
        for link in _chain(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in RAM or on a device; torch's errors have no common class."""
    return any(
        isinstance(link, MemoryError)
        or type(link).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(link)
        for link in _chain(error)
    )


def _disk_message(error: BaseException) -> str:
    names = [
        os.fsdecode(link.filename)
        for link in _chain(error)
        if isinstance(link, OSError) and isinstance(link.filename, str | bytes)
    ]
    place = Path(names[0] if names else ".").absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    target = f" while writing {names[0]}" if names else ""
    return (
        f"error: the disk is full{target}: {free / 2**20:.0f} MiB left for {place}. "
        "Free space there (old runs and their checkpoints/ are the largest) or write to another "
        "disk (output_dir=… of a run, out=… of an export). "
        "Nothing that was complete has been overwritten."
    )


def _say(message: str, error: BaseException | None = None) -> None:
    notes = _notes(error) if error is not None else []
    print("\n".join([message, *notes]), file=sys.stderr)
