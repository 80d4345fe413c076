"""The console script ``qat``: commands on a finished artifact.

``qat COMMAND ARTIFACT [...] key=value ...``. Words of the form ``key=value`` are options, all
others are positional; what follows ``--`` is positional whatever its form. ``--key value`` and
``--key=value`` are other ways of writing ``key=value``. Options are dataclasses, read and explained
by `qat.config`. A new command is one entry of `COMMANDS`.
"""

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat import config
from qat.config_values import FALSE_WORDS, TRUE_WORDS, find_type, strip_optional
from qat.errors import UserError, did_you_mean, run_main


@dataclass(frozen=True)
class InspectOptions:
    """Options of ``qat inspect``."""

    every_layer: bool = False
    """One row per tensor instead of one per kind of layer."""
    plot: str | None = None
    """PNG file to draw into: magnitudes of the scales, and how often each code occurs."""


@dataclass(frozen=True)
class VerifyOptions:
    """Options of ``qat verify``."""

    hashes: bool = True
    """Read every file and compare its sha256; false compares names and sizes only."""
    public_key: str | None = None
    """Public key (PEM) of the one that signed the artifact: its signature must hold too."""


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
    marker: str = "config.json"
    """File without which a directory is nothing that the command works on."""


def _generate(artifact: Path, prompt: str, options: Any) -> None:
    from qat.generate import generate

    generate(artifact, prompt, options, stream=True)


def _evaluate(artifact: Path, options: Any) -> None:
    from qat.evaluate_file import evaluate_file

    print(evaluate_file(artifact, options))


def _export(artifact: Path, options: Any) -> None:
    from qat.export import export

    print(export(artifact, options).text())


def _serve(artifact: Path, options: Any) -> int:
    from qat.serve.server import serve

    return serve(artifact, options)


def _inspect(artifact: Path, options: InspectOptions) -> None:
    from qat.artifact import inspect

    plot = None if options.plot is None else Path(options.plot)
    print(inspect(artifact, every_layer=options.every_layer, plot=plot))


def _verify(artifact: Path, options: VerifyOptions) -> int:
    from qat.artifact import verify
    from qat.manifest import SIGNATURE

    signed = ""
    problems = verify(artifact, hashes=options.hashes)
    if options.public_key is not None:
        from qat.signing import verify_signature

        problems += verify_signature(artifact, options.public_key)
        signed = ", and the signature holds"
    elif (artifact / SIGNATURE).is_file():
        signed = "; it is signed, which public_key=FILE would check"
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{artifact}: {len(problems)} problem(s)", file=sys.stderr)
        return 1
    print(f"{artifact}: every file is as the manifest says{signed}")
    return 0


def _sign(artifact: Path, options: Any) -> None:
    from qat.signing import sign

    print(f"signed: {sign(artifact, options)}")


def _push(artifact: Path, options: Any) -> None:
    from qat.push import push

    print(push(artifact, options))


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
    "export": Command(
        "write it for llama.cpp, vLLM, ONNX Runtime ..., format=… out=…",
        "qat.export:ExportOptions",
        _export,
    ),
    "serve": Command(
        "an OpenAI-compatible server with a chat page",
        "qat.serve.server:ServeOptions",
        _serve,
    ),
    "inspect": Command(
        "architecture, scheme, layers and sizes, read from the files",
        "qat.cli:InspectOptions",
        _inspect,
    ),
    "verify": Command(
        "compare every file with manifest.json",
        "qat.cli:VerifyOptions",
        _verify,
        marker="manifest.json",
    ),
    "sign": Command(
        "sign every file with a private key, key=FILE",
        "qat.signing:SignOptions",
        _sign,
        marker="manifest.json",
    ),
    "push": Command(
        "publish it on the Hugging Face Hub, repo=ORG/NAME",
        "qat.push:PushOptions",
        _push,
    ),
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
    given = _without_dashes(rest[:cut], schema)
    options = [word for word in given if form.fullmatch(word)]
    words = [word for word in given if not form.fullmatch(word)] + rest[cut + 1 :]
    _check_words(name, words, options)
    try:
        loaded: Any = config.load(schema, options)
    except UserError as error:
        if len(command.words) > 1 and options:
            error.add_note(f"({command.words[-1]} of the form key=value goes after --)")
        raise
    return command.run(_artifact(words[0], command.marker), *words[1:], loaded)


def _without_dashes(words: list[str], schema: type) -> list[str]:
    """``--key value`` and ``--key=value`` as ``key=value``; ``--flag`` alone as ``flag=true``.

    Dashes within a key stand for underscores.
    """
    found, left = [], list(words)
    while left:
        word = left.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not word.startswith("--") or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
            found.append(word)
            continue
        following = left[0] if left else None
        if equals:
            found.append(f"{key}={value}")
        elif _is_flag(key, schema) and str(following).lower() not in (*TRUE_WORDS, *FALSE_WORDS):
            found.append(f"{key}=true")
        elif following is None or re.match(r"--[A-Za-z_]", following):
            raise UserError(f"{word}: its value is missing; write {key}=VALUE or {word} VALUE")
        else:
            found.append(f"{key}={left.pop(0)}")
    return found


def _is_flag(key: str, schema: type) -> bool:
    """Whether an option is true or false; UserError for one that does not exist."""
    return strip_optional(find_type(key, schema))[0] is bool


def _check_words(name: str, words: list[str], options: list[str]) -> None:
    wanted = COMMANDS[name].words
    if len(words) < len(wanted):
        missing = wanted[len(words)]
        hint = " (one of the form key=value goes after --)" if options else ""
        raise UserError(f"{missing} is missing{hint}; usage: {_line(name)}")
    if len(words) > len(wanted):
        extra = words[len(wanted)]
        raise UserError(f"{extra!r} is one word too many (quote the text?); usage: {_line(name)}")


def _artifact(word: str, marker: str) -> Path:
    path = Path(word)
    if not path.is_dir():
        raise UserError(f"{word}: no such directory; give the artifact/ of a finished run")
    if not (path / marker).is_file():
        inner = path / "artifact"
        hint = f" Did you mean {inner}?" if (inner / marker).is_file() else ""
        raise UserError(f"{word}: not an artifact, it has no {marker}.{hint}")
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
