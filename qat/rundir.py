"""The directory of a run: chosen once, described first, never overwritten."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

from qat.errors import UserError

ENVIRONMENT = "QAT_RUN_DIR"
"""Through this variable the processes that Lightning starts learn what rank 0 chose."""


def is_rank_zero() -> bool:
    """Whether this process leads the run."""
    return bool(rank_zero_only.rank == 0)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


@contextmanager
def run_directory(
    output_dir: str | None, resume: str | None, recipe: str, config_yaml: str
) -> Iterator[Path]:
    """`open_run` for a block; input that proves wrong before anything was trained leaves no trace.

    Raises:
        UserError: see `open_run`.
    """
    run = open_run(output_dir, resume, recipe, config_yaml)
    try:
        yield run
    except UserError:
        started = any((run / "checkpoints").glob("*/*.ckpt"))
        if resume is None and is_rank_zero() and not started:
            os.environ.pop(ENVIRONMENT, None)
            shutil.rmtree(run, ignore_errors=True)
        raise


def open_run(output_dir: str | None, resume: str | None, recipe: str, config_yaml: str) -> Path:
    """Choose the run's directory and write ``config.yaml`` into it before anything else.

    Args:
        output_dir: where the user wants it; None takes a fresh ``runs/<recipe>-<number>``.
        resume: directory of the run to continue, or None.
        recipe: name of the recipe.
        config_yaml: the resolved configuration.

    Raises:
        UserError: the directory holds a run already, or the run to resume is finished.
    """
    if ENVIRONMENT in os.environ and not is_rank_zero():
        return Path(os.environ[ENVIRONMENT])
    if resume is not None:
        run = Path(resume)
        if (run / "report.json").exists():
            raise UserError(f"resume={resume}: this run is finished; its report is report.md")
    elif output_dir is None:
        if _world_size() > 1 and ENVIRONMENT not in os.environ:
            raise UserError("output_dir: name one when several processes are started from outside")
        run = _fresh(Path("runs"), recipe)
    else:
        run = Path(output_dir)
        if not is_rank_zero():
            return run
        _check_unused(run)
    _make(run)
    if is_rank_zero():
        os.environ[ENVIRONMENT] = str(run.absolute())
        temporary = run / ".config.yaml.tmp"
        temporary.write_text(config_yaml, encoding="utf-8")
        os.replace(temporary, run / "config.yaml")
    return run


def _check_unused(run: Path) -> None:
    if run.exists() and not run.is_dir():
        raise UserError(f"output_dir={run}: is a file; name a directory")
    if (run / "config.yaml").exists():
        state = "a finished run" if (run / "report.json").exists() else "an unfinished run"
        remedy = "" if state == "a finished run" else f", or continue it with resume={run}"
        raise UserError(
            f"output_dir={run}: holds {state}; nothing was changed. Choose another "
            f"directory{remedy}"
        )
    if run.is_dir() and any(run.iterdir()):
        raise UserError(f"output_dir={run}: is not empty and holds no run; choose a new directory")


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(
            f"output_dir={directory}: cannot be made ({error.strerror}); choose another directory"
        ) from error


def _fresh(parent: Path, recipe: str) -> Path:
    """The first free ``<recipe>-<number>``; made here, so that two runs never share one."""
    _make(parent)
    number = 1
    while True:
        run = parent / f"{recipe}-{number:03d}"
        try:
            run.mkdir()
        except FileExistsError:
            number += 1
        else:
            return run
