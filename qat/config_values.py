"""Typed reading of configuration values: YAML nodes and ``key=value`` words, led by the schema.

Values are converted by the type that the schema asks for, from their text: ``logger: off`` is the
word "off" where a word is wanted, ``model=1e5`` is the name "1e5", ``lr: 1e-4`` is a float. (YAML's
own guesses would give False, 100000.0 and a string.) A schema is a dataclass whose fields are
bool, int, float, str, Path, Literal, Optional or Union of these, lists and tuples, and further
dataclasses.

Every error is a `UserError` that names the dotted key, the value and what is allowed, and the file
and line where a YAML file is at fault.
"""

import dataclasses
import functools
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

import yaml  # type: ignore[import-untyped,unused-ignore]

from qat.errors import UserError, did_you_mean, nearest

NULL_WORDS = ("null", "Null", "NULL", "~", "")
TRUE_WORDS = ("true", "yes", "on")
FALSE_WORDS = ("false", "no", "off")

OPTIONS_UNDER = {"data": "text", "logger": "wandb"}
"""Scalar keys whose options live in a section of another name."""


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a YAML file, or the command line when `file` is None."""

    file: Path | None = None

    def at(self, node: yaml.Node | None = None) -> str:
        """``FILE, line 3: `` or an empty string for the command line."""
        if self.file is None:
            return ""
        line = f", line {node.start_mark.line + 1}" if node is not None else ""
        return f"{self.file}{line}: "


@functools.cache
def field_types(schema: type) -> dict[str, Any]:
    """Field name -> resolved type, for the fields that a configuration may set."""
    hints = typing.get_type_hints(schema)
    return {f.name: hints[f.name] for f in dataclasses.fields(schema) if f.init}


def strip_optional(hint: Any) -> tuple[Any, bool]:
    """``Optional[X]`` -> (X, True), anything else -> (hint, False)."""
    if typing.get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
    nullable = len(arms) < len(typing.get_args(hint))
    return (arms[0] if len(arms) == 1 else Union[tuple(arms)]), nullable  # noqa: UP007


def is_section(hint: Any) -> bool:
    """Whether a field of this type holds keys of its own."""
    inner = strip_optional(hint)[0]
    return isinstance(inner, type) and dataclasses.is_dataclass(inner)


def element_type(hint: Any) -> Any | None:
    """Type of the elements of a list or tuple of one type, else None."""
    inner = strip_optional(hint)[0]
    args = typing.get_args(inner)
    if typing.get_origin(inner) is list or (
        typing.get_origin(inner) is tuple and args[-1:] == (...,)
    ):
        return args[0]
    return None


def describe(hint: Any) -> str:
    """What a field of this type takes, for help and errors: ``int``, ``csv | wandb | none``."""
    inner, nullable = strip_optional(hint)
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    if origin is Literal:
        text = " | ".join(_spell(option) for option in args)
    elif origin in (Union, types.UnionType):
        text = " | ".join(describe(arm) for arm in args)
    elif element_type(inner) is not None:
        text = f"list of {describe(element_type(inner))}"
    elif origin is tuple:
        text = "[" + ", ".join(describe(arm) for arm in args) + "]"
    elif is_section(inner):
        text = "{" + ", ".join(field_types(inner)) + "}"
    else:
        text = {bool: "true | false", str: "text", Path: "path"}.get(inner, inner.__name__)
    return text + (" | null" if nullable else "")


def _spell(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def leaf_keys(schema: type, prefix: str = "") -> list[str]:
    """All dotted keys of a schema, sections entered, list elements not."""
    keys = []
    for name, hint in field_types(schema).items():
        if is_section(hint):
            keys += leaf_keys(strip_optional(hint)[0], f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


# --- YAML nodes ----------------------------------------------------------------------------------


def convert(node: yaml.Node, hint: Any, path: str, origin: Origin, root: type) -> Any:
    """The plain value (bool, int, float, str, None, list, dict) of a node for a field of `hint`."""
    inner, nullable = strip_optional(hint)
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULL_WORDS:
        if nullable:
            return None
        raise UserError(
            f"{origin.at(node)}{path}=null: null is not allowed here, give {describe(inner)}"
        )
    if is_section(inner):
        return convert_section(node, inner, path, origin, root)
    if typing.get_origin(inner) in (list, tuple):
        return _convert_sequence(node, inner, path, origin, root)
    if typing.get_origin(inner) in (Union, types.UnionType):
        # text takes every scalar, so it is asked last
        for arm in sorted(typing.get_args(inner), key=lambda arm: arm is str):
            try:
                return convert(node, arm, path, origin, root)
            except UserError:
                continue
        raise _wrong_type(node, inner, path, origin)
    if not isinstance(node, yaml.ScalarNode):
        raise _wrong_type(node, inner, path, origin)
    return _convert_scalar(node, inner, path, origin)


def convert_section(
    node: yaml.Node, schema: type, path: str, origin: Origin, root: type
) -> dict[str, Any]:
    """A mapping node as a dict of the keys that it sets; unknown and repeated keys are errors."""
    if not isinstance(node, yaml.MappingNode):
        first = next(iter(field_types(schema)))
        raise UserError(
            f"{origin.at(node)}{path}={show(node)}: {path} is a section; set one of its keys "
            f"({', '.join(field_types(schema))}), for example {path}.{first}=..."
        )
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        dotted = f"{path}.{key}" if path else key
        if key not in field_types(schema):
            raise unknown_key(path, key, schema, root, origin.at(key_node))
        if key in values:
            raise UserError(f"{origin.at(key_node)}{dotted} is given twice")
        values[key] = convert(value_node, field_types(schema)[key], dotted, origin, root)
    return values


def _convert_sequence(
    node: yaml.Node, hint: Any, path: str, origin: Origin, root: type
) -> list[Any]:
    element = element_type(hint)
    if not isinstance(node, yaml.SequenceNode):
        raise _wrong_type(node, hint, path, origin)
    hints = list(typing.get_args(hint)) if element is None else [element] * len(node.value)
    if len(hints) != len(node.value):
        raise UserError(
            f"{origin.at(node)}{path}={show(node)}: {len(node.value)} values given, "
            f"{len(hints)} wanted: {describe(hint)}"
        )
    return [
        convert(item, item_hint, f"{path}[{i}]", origin, root)
        for i, (item, item_hint) in enumerate(zip(node.value, hints, strict=True))
    ]


def _convert_scalar(node: yaml.ScalarNode, hint: Any, path: str, origin: Origin) -> Any:
    text = node.value
    if typing.get_origin(hint) is Literal:
        for option in typing.get_args(hint):
            if _spell(option) == (text.lower() if isinstance(option, bool) else text):
                return option
    elif hint is bool and text.lower() in TRUE_WORDS + FALSE_WORDS:
        return text.lower() in TRUE_WORDS
    elif hint is int and re.fullmatch(r"[-+]?\d[\d_]*", text):
        return int(text)
    elif hint is float:
        try:
            return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.lower()))
        except ValueError:
            pass
    elif hint in (str, Path):
        _check_text(text, path, origin.at(node))
        return hint(text)
    raise _wrong_type(node, hint, path, origin)


def _check_text(text: str, path: str, where: str) -> None:
    """Reject the two spellings that the merge below would read as something else."""
    if "${" in text:
        raise UserError(
            f"{where}{path}={text}: ${{...}} is not expanded in values; write the value itself, "
            "or let the shell expand a variable by using double quotes"
        )
    if text == "???":
        raise UserError(f"{where}{path}=???: this marks a missing value; write the value itself")


def _wrong_type(node: yaml.Node, hint: Any, path: str, origin: Origin) -> UserError:
    message = f"{origin.at(node)}{path}={show(node)}: must be {describe(hint)}."
    if isinstance(node, yaml.ScalarNode):
        if typing.get_origin(hint) is Literal:
            message += did_you_mean(node.value, [_spell(o) for o in typing.get_args(hint)])
        elif hint is int and re.fullmatch(r"[-+]?\d+(\.0*)?([eE]\+?\d)?", node.value):
            message += f" Write {int(float(node.value))}"
    return UserError(message.removesuffix("."))


def show(node: yaml.Node) -> str:
    """A node in one line, shortened, for messages."""
    text = _inline(node)
    return text if len(text) <= 60 else text[:57] + "..."


def _inline(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(_inline(item) for item in node.value) + "]"
    if isinstance(node, yaml.MappingNode):
        return "{" + ", ".join(f"{_inline(k)}: {_inline(v)}" for k, v in node.value) + "}"
    return str(node.value)


# --- keys ----------------------------------------------------------------------------------------


def unknown_key(path: str, key: str, schema: type, root: type, where: str) -> UserError:
    """The error for a key that `schema` (found at `path`) lacks, with the nearest key there is."""
    dotted = f"{path}.{key}" if path else key
    # the right name under the wrong parent (`bits` for `scheme.weight.bits`), else a near sibling
    guess = next((k for k in leaf_keys(root) if k.rpartition(".")[2] == key), None)
    if guess is None:
        close = nearest(key, field_types(schema))
        guess = f"{path}.{close}" if path and close else close
    guess = guess or nearest(dotted, leaf_keys(root))
    hint = f" Did you mean '{guess}'?" if guess else ""
    section = f"keys of {path}" if path else "top-level keys"
    return UserError(
        f"{where}unknown key '{dotted}'.{hint} The {section}: {', '.join(field_types(schema))}"
    )


def options_hint(parent: str, key: str, root: type) -> str:
    """Where the options of a scalar key live, when the schema has such a section."""
    section = OPTIONS_UNDER.get(parent)
    if section is None or section not in field_types(root):
        return ""
    names = field_types(strip_optional(field_types(root)[section])[0])
    option = key.removeprefix(f"{parent}.")
    example = option if option in names else nearest(option, names) or next(iter(names))
    return f"; the options of {parent} live under {section}. (such as {section}.{example})"


def find_type(key: str, root: type) -> Any:
    """Type of the field at a dotted key; UserError for a key that does not exist."""
    hint: Any = root
    parts = key.split(".")
    for depth, part in enumerate(parts):
        parent = ".".join(parts[:depth])
        if not is_section(hint):
            if element_type(hint) is not None:
                raise UserError(
                    f"unknown key '{key}': {parent} is a list; set it whole, "
                    f"{parent}=[...] ({describe(hint)})"
                )
            raise UserError(
                f"unknown key '{key}': {parent} is a single value ({describe(hint)}) and has no "
                f"keys below it{options_hint(parent, key, root)}"
            )
        schema = strip_optional(hint)[0]
        if part not in field_types(schema):
            raise unknown_key(parent, part, schema, root, "")
        hint = field_types(schema)[part]
    return hint


def word_to_node(key: str, text: str, hint: Any) -> yaml.Node:
    """The node of a command-line value: raw text where text is wanted, else parsed as YAML."""
    if text == "":
        raise UserError(
            f"{key}= has no value: must be {describe(hint)}"
            + (f". Empty text is written '{key}=\"\"'" if _takes_text(hint) else "")
        )
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        if not _takes_text(hint):
            raise UserError(f"{key}={text}: not valid YAML, expected {describe(hint)}") from error
        node = None
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    listed = isinstance(node, yaml.SequenceNode) and not _only_text(hint)
    if _takes_text(hint) and not quoted and not listed:
        return yaml.ScalarNode("tag:yaml.org,2002:str", text)
    return node if node is not None else yaml.ScalarNode("tag:yaml.org,2002:null", text)


def _only_text(hint: Any) -> bool:
    return strip_optional(hint)[0] in (str, Path)


def _takes_text(hint: Any) -> bool:
    inner = strip_optional(hint)[0]
    union = typing.get_origin(inner) in (Union, types.UnionType)
    return _only_text(inner) or (union and str in typing.get_args(inner))
