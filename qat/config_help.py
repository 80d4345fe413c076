"""``--help`` text from a schema: names, types, defaults, and attribute docstrings as meanings."""

import ast
import dataclasses
import functools
import inspect
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]
from omegaconf import OmegaConf

from qat.config_values import describe, element_type, field_types, is_section, strip_optional


@functools.cache
def attribute_docs(schema: type) -> dict[str, str]:
    """Field name -> the string literal that follows the field in the class's source.

    Bases are read too. Fields without such a string are absent.
    """
    docs: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                docs[statement.target.id] = inspect.cleandoc(after.value.value)
    return docs


def render(schema: type, title: str, values: dict[str, Any], width: int | None = None) -> str:
    """Every key of `schema`: dotted name, default, type, meaning; see `qat.config.help_text`."""
    columns = width or min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [title]
    for text, indent in _entries(schema, values, ""):
        lines += textwrap.wrap(
            text,
            columns,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines) + "\n"


def _entries(schema: type, values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """(paragraph, indent) of each key: the section's own values first, then its sections."""
    docs, hints = attribute_docs(schema), field_types(schema)
    for name, hint in hints.items():
        if is_section(hint):
            continue
        rows = element_type(hint) is not None and is_section(element_type(hint))
        yield "", ""
        yield f"{prefix}{name}{shown(values[name])}  ({'list' if rows else describe(hint)})", "  "
        if name in docs:
            yield docs[name], "      "
        if rows:
            yield "Each element:", "      "
            yield from _element(element_type(hint))
    for name, hint in hints.items():
        if not is_section(hint):
            continue
        inner, nullable = strip_optional(hint)
        yield "", ""
        yield f"[{prefix}{name}]  {docs.get(name, '')}".rstrip(), ""
        below = values[name]
        if below is None:
            yield f"null; setting a key below creates it, {prefix}{name}=null removes it.", "  "
            below = OmegaConf.to_container(OmegaConf.structured(inner))
        elif nullable:
            yield f"{prefix}{name}=null removes it.", "  "
        assert isinstance(below, dict)
        yield from _entries(inner, below, f"{prefix}{name}.")


def _element(schema: Any) -> Iterator[tuple[str, str]]:
    """The keys of one element of a list of dataclasses, one paragraph each."""
    values = OmegaConf.to_container(OmegaConf.structured(schema))
    assert isinstance(values, dict)
    for name, hint in field_types(schema).items():
        meaning = attribute_docs(schema).get(name, "")
        yield f"{name}{shown(values[name])}  ({describe(hint)})  {meaning}".rstrip(), "        "


def shown(value: Any) -> str:
    """A default as ``=value`` in the spelling of the command line."""
    if value == "???":
        return " (required)"
    plain = str(value) if isinstance(value, Path) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True)
    return "=" + text.removesuffix("\n").removesuffix("\n...")
