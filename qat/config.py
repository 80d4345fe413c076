"""Typed configuration: a tree of frozen dataclasses, YAML deltas, ``key=value`` overrides.

The schema is the dataclass tree itself: its fields' types, defaults and attribute docstrings give
validation, merging (OmegaConf structured configs), ``--help`` and ``config.yaml``. Later layers
win: schema defaults <- the recipe's YAML <- presets <- command line. What leaves this module is
the dataclass tree, never an untyped mapping.
"""

import dataclasses
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped,unused-ignore]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.config_help import attribute_docs, render
from qat.config_values import (
    Origin,
    convert,
    convert_section,
    element_type,
    field_types,
    find_type,
    is_section,
    options_hint,
    strip_optional,
    word_to_node,
)
from qat.errors import UserError, did_you_mean

__all__ = ["attribute_docs", "help_text", "load", "load_resume", "saved_recipe", "to_yaml"]

T = TypeVar("T")

RESUME_MAY_CHANGE = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.micro_batch_size",
    "trainer.activation_checkpointing",
    "trainer.checkpoint_every_steps",
    "trainer.progress_bar",
    "logger",
    "wandb.*",
    "min_gain_kept",
)
"""Keys (and sections) that may differ when a run is resumed: none of them changes the mathematics
of the steps that were already done."""


def load(
    schema: type[T],
    argv: Sequence[str] = (),
    yaml_files: Iterable[Path] = (),
    preset_dir: Path | None = None,
) -> T:
    """Build the configuration of `schema`.

    Args:
        schema: root dataclass.
        argv: words ``key=value``; keys dotted, values YAML (raw text where text is wanted).
        yaml_files: files of deltas, later ones win.
        preset_dir: where the names of the key ``preset`` are looked up: ``trainer/debug`` is
            ``preset_dir/trainer/debug.yaml``, deltas from the root of the tree.

    Raises:
        UserError: unknown key, wrong type, missing or repeated value, unknown preset, or a
            ValueError of some dataclass's ``__post_init__`` with its key path put in front.
    """
    overrides = _parse_words(schema, argv)
    deltas = [_read_yaml(schema, Path(file)) for file in yaml_files]
    # Only the command line applies presets: config.yaml of a run records their names beside
    # values that already contain them, and perhaps overrides of them.
    for name in overrides.get("preset") or []:
        deltas.append(_read_yaml(schema, _preset_file(name, preset_dir)))
    return typing.cast(T, _build(schema, _merge(schema, [*deltas, overrides]), ""))


def help_text(
    schema: type,
    title: str,
    yaml_files: Iterable[Path] = (),
    width: int | None = None,
    argv: Sequence[str] = (),
) -> str:
    """Every key of `schema`: dotted name, type, default, meaning (attribute docstrings).

    Args:
        schema: root dataclass.
        title: lines put first, kept as they are.
        yaml_files: the recipe's deltas, which the shown defaults contain.
        width: columns; by default the terminal's.
        argv: overrides that the shown defaults contain too.
    """
    deltas = [_read_yaml(schema, Path(file)) for file in yaml_files]
    values = _merge(schema, [*deltas, _parse_words(schema, argv)])
    return render(schema, title, values, width)


def load_resume(
    schema: type[T], argv: Sequence[str], run_dir: Path, preset_dir: Path | None = None
) -> T:
    """The configuration of an interrupted run: its ``config.yaml``, then overrides.

    ``resume`` and ``output_dir`` of the result are `run_dir`, even if the directory was moved.

    Raises:
        UserError: no ``config.yaml``, or an override outside `RESUME_MAY_CHANGE`.
    """
    saved_file = _saved_config(run_dir)
    _parse_words(schema, argv)  # complains about a key given twice before words are taken out
    words = [word for word in argv if not word.startswith("resume=")]
    for word in [word for word in words if word.startswith("output_dir=")]:
        if Path(word.partition("=")[2]).resolve() != run_dir.resolve():
            raise UserError(
                f"{word}: a resumed run stays in its own directory, {run_dir}; leave output_dir out"
            )
        words.remove(word)
    place = [f"resume={run_dir}", f"output_dir={run_dir}"]
    saved = load(schema, place, [saved_file])
    resumed = load(schema, [*words, *place], [saved_file], preset_dir)
    before, after = _flatten(saved), _flatten(resumed)
    for key, value in after.items():
        # the effects of a preset are compared key by key, its name does not matter
        if key in RESUME_MAY_CHANGE or key.partition(".")[0] in ("logger", "wandb", "preset"):
            continue
        if key not in before or before[key] != value:
            had = f"{key}={_scalar(before[key])}" if key in before else f"another value of {key}"
            raise UserError(
                f"{key}={_scalar(value)}: a resumed run keeps its configuration, and {saved_file} "
                f"has {had}. Only where and how fast it runs may change "
                f"({', '.join(RESUME_MAY_CHANGE)}); start a new run for anything else"
            )
    return resumed


def saved_recipe(run_dir: Path) -> str:
    """Name of the recipe that wrote ``run_dir/config.yaml``."""
    file = _saved_config(run_dir)
    root = _compose(file)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else []:
        if key.value == "recipe" and isinstance(value, yaml.ScalarNode) and value.value:
            return str(value.value)
    raise UserError(f"{file}: has no key 'recipe', so it is not the config.yaml of a run")


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML that `load` reads back to an equal tree."""
    text: str = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=100)
    return text


# --- layers --------------------------------------------------------------------------------------


def _parse_words(schema: type, argv: Sequence[str]) -> dict[str, Any]:
    """``key=value`` words as a nested dict of converted values."""
    words: dict[str, str] = {}
    for word in argv:
        key, text = split_word(word)
        if key in words:
            raise UserError(f"{key} is given twice: {key}={words[key]} and {word}")
        words[key] = text
    for key in words:
        parts = key.split(".")
        for depth in range(1, len(parts)):
            parent = ".".join(parts[:depth])
            if parent in words:
                raise UserError(
                    f"{parent} is given both as a value ({parent}={words[parent]}) and as a parent "
                    f"({key}={words[key]}){options_hint(parent, key, schema)}"
                )
    tree: dict[str, Any] = {}
    for key, text in words.items():
        hint = find_type(key, schema)
        if key == "preset" and not text.startswith("["):
            text = f"[{text}]"
        node = word_to_node(key, text, hint)
        *parents, last = key.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = convert(node, hint, key, Origin(), schema)
    return tree


def split_word(word: str) -> tuple[str, str]:
    """``key=value`` -> (key, value), for a dotted key; UserError for any other form."""
    key, equals, text = word.partition("=")
    if equals and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        return key, text
    bare = word.lstrip("-")
    if word.startswith("-") and re.match(r"[A-Za-z_][\w.-]*=", bare):
        raise UserError(f"{word}: options have no dashes, write {bare}")
    if "[" in key and equals:
        raise UserError(f"{word}: one element of a list cannot be set; set the list as a whole")
    raise UserError(f"{word}: expected key=value, for example max_steps=100; --help lists the keys")


def _compose(file: Path) -> yaml.Node | None:
    try:
        return yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{file}, line {line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML: {error}") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _read_yaml(schema: type, file: Path) -> dict[str, Any]:
    node = _compose(file)
    if node is None:  # an empty file: no deltas
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{file}: expected keys and values (max_steps: 100)")
    return convert_section(node, schema, "", Origin(file), schema)


def _preset_file(name: str, preset_dir: Path | None) -> Path:
    files = (
        {f.relative_to(preset_dir).with_suffix("").as_posix(): f for f in _presets(preset_dir)}
        if preset_dir is not None
        else {}
    )
    if name not in files:
        listed = ", ".join(files) or "none"
        raise UserError(
            f"preset={name}: no such preset.{did_you_mean(name, files)} There are: {listed}"
        )
    return files[name]


def _presets(preset_dir: Path) -> list[Path]:
    # files directly in the directory belong to recipes
    return sorted(preset_dir.glob("*/*.yaml"))


def _saved_config(run_dir: Path) -> Path:
    file = run_dir / "config.yaml"
    if not file.is_file():
        problem = "it has no config.yaml" if run_dir.is_dir() else "no such directory"
        raise UserError(
            f"resume={run_dir}: {problem}; give the output_dir of a run that has started"
        )
    return file


def _merge(schema: type, deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Schema defaults <- deltas, as plain values; a section set to null is made anew when set."""
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(schema), *deltas))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{key}{str(error).splitlines()[0]}") from error
    return typing.cast(dict[str, Any], merged)


# --- trees ---------------------------------------------------------------------------------------


def _build(hint: Any, value: Any, path: str) -> Any:
    """Construct the value of a field, dataclasses bottom-up so that every check runs."""
    inner = strip_optional(hint)[0]
    if value is None:
        return None
    if is_section(inner):
        kwargs = {}
        for name, item_hint in field_types(inner).items():
            dotted = f"{path}.{name}" if path else name
            if name not in value and _has_default(inner, name):
                continue  # elements of a tuple arrive without their defaults
            if value.get(name, "???") == "???":
                raise UserError(f"{dotted} has no value; give {dotted}=...")
            kwargs[name] = _build(item_hint, value[name], dotted)
        try:
            return inner(**kwargs)
        except ValueError as error:
            raise UserError(_at(path, inner, str(error))) from error
    if element_type(inner) is not None:
        items = [_build(element_type(inner), v, f"{path}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if typing.get_origin(inner) is tuple else items
    return tuple(value) if typing.get_origin(inner) is tuple else value


def _has_default(schema: type, name: str) -> bool:
    field = next(f for f in dataclasses.fields(schema) if f.name == name)
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _at(path: str, schema: type, message: str) -> str:
    """Put the key path in front of a message that a dataclass raised about its own fields."""
    starts_with_field = re.match(r"([A-Za-z_]\w*)[\w.\[\]]*[=:]", message)
    if not path:
        return message
    if starts_with_field and starts_with_field[1] in field_types(schema):
        return f"{path}.{message}"
    return f"{path}: {message}"


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name)) for name in field_types(type(value))}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _flatten(config: Any) -> dict[str, Any]:
    """Dotted key -> plain value; lists are values."""
    flat: dict[str, Any] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{path}.{key}" if path else key)
        else:
            flat[path] = value

    visit(_plain(config), "")
    return flat


def _scalar(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
