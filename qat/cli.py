"""The console script ``qat``: commands on a finished artifact.

``qat COMMAND ARTIFACT [...] key=value ...``. Words of the form ``key=value`` are options, all
others are positional; what follows ``--`` is positional whatever its form. Options are
dataclasses, read and explained by `qat.config`. A new command is one entry of `COMMANDS`.
"""

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat import config
from qat.errors import UserError, did_you_mean, run_main


@dataclass(frozen=True)
class InspectOptions:
    """Options of ``qat inspect``."""

    every_layer: bool = False
    """One row per tensor instead of one per kind of layer."""


@dataclass(frozen=True)
class VerifyOptions:
    """Options of ``qat verify``."""

    hashes: bool = True
    """Read every file and compare its sha256; false compares names and sizes only."""


@dataclass(frozen=True)
class Command:
    """One command: positional words, the dataclass of its options, and what it does."""

    summary: str
    """One line for the list of commands."""
    options: str
    """``module:Class`` of the options, imported when the command runs."""
    run: Callable[..., int | None]
    """Called with the artifact's path, the other positional words, and the options."""
    words: tuple[str, ...] = ("ARTIFACT",)
    """Names of the positional words; the first is the artifact's directory."""


def _generate(artifact: Path, prompt: str, options: Any) -> None:
    from qat.generate import generate

    generate(artifact, prompt, options, stream=True)


def _evaluate(artifact: Path, options: Any) -> None:
    from qat.evaluate_file import evaluate_file

    print(evaluate_file(artifact, options))


def _inspect(artifact: Path, options: InspectOptions) -> None:
    from qat.artifact import inspect

    print(inspect(artifact, every_layer=options.every_layer))


def _verify(artifact: Path, options: VerifyOptions) -> int:
    from qat.artifact import verify

    problems = verify(artifact, hashes=options.hashes)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{artifact}: {len(problems)} problem(s)", file=sys.stderr)
        return 1
    print(f"{artifact}: every file is as the manifest says")
    return 0


COMMANDS: dict[str, Command] = {
    "generate": Command(
        "continue a prompt with the packed model",
        "qat.generate:GenerateOptions",
        _generate,
        ("ARTIFACT", "PROMPT"),
    ),
    "evaluate": Command(
        "loss and perplexity on a text file, data=FILE",
        "qat.evaluate_file:EvaluateFileOptions",
        _evaluate,
    ),
    "inspect": Command(
        "architecture, scheme, layers and sizes, read from the files",
        "qat.cli:InspectOptions",
        _inspect,
    ),
    "verify": Command("compare every file with manifest.json", "qat.cli:VerifyOptions", _verify),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code (0 done, 1 failed, 2 wrong input)."""
    words = sys.argv[1:] if argv is None else argv
    return run_main(lambda: _run(words))


def _run(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("--help", "-h"):
        print(_usage())
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UserError(
            f"{name}: no such command.{did_you_mean(name, COMMANDS)} "
            f"There are: {', '.join(COMMANDS)}"
        )
    command = COMMANDS[name]
    cut = rest.index("--") if "--" in rest else len(rest)
    schema = _import(command.options)
    if {"--help", "-h"} & set(rest[:cut]):
        print(config.help_text(schema, f"{_line(name)}\n\n{command.summary}"))
        return 0
    form = re.compile(r"-*[A-Za-z_][\w.]*=.*", re.DOTALL)
    options = [word for word in rest[:cut] if form.fullmatch(word)]
    words = [word for word in rest[:cut] if not form.fullmatch(word)] + rest[cut + 1 :]
    _check_words(name, words, options)
    try:
        loaded: Any = config.load(schema, options)
    except UserError as error:
        if len(command.words) > 1 and options:
            error.add_note(f"({command.words[-1]} of the form key=value goes after --)")
        raise
    return command.run(_artifact(words[0]), *words[1:], loaded)


def _check_words(name: str, words: list[str], options: list[str]) -> None:
    wanted = COMMANDS[name].words
    if len(words) < len(wanted):
        missing = wanted[len(words)]
        hint = " (one of the form key=value goes after --)" if options else ""
        raise UserError(f"{missing} is missing{hint}; usage: {_line(name)}")
    if len(words) > len(wanted):
        extra = words[len(wanted)]
        raise UserError(f"{extra!r} is one word too many (quote the text?); usage: {_line(name)}")


def _artifact(word: str) -> Path:
    path = Path(word)
    if not path.is_dir():
        raise UserError(f"{word}: no such directory; give the artifact/ of a finished run")
    if not (path / "config.json").is_file():
        inner = path / "artifact"
        hint = f" Did you mean {inner}?" if (inner / "config.json").is_file() else ""
        raise UserError(f"{word}: not an artifact, it has no config.json.{hint}")
    return path


def _line(name: str) -> str:
    return f"qat {name} {' '.join(COMMANDS[name].words)} [key=value ...]"


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    head = ["usage: qat COMMAND ARTIFACT [key=value ...]", "", "commands:"]
    tail = ["", "  qat COMMAND --help    every option: type, default, meaning"]
    return "\n".join([*head, *rows, *tail])


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
