"""The model card of an export: the artifact's card with what this conversion did on top."""

import re
from pathlib import Path
from typing import Any

LIBRARIES = {"gguf": "gguf", "onnx": "onnx", "peft": "peft"}
"""Format → ``library_name`` of the Hub, where it is not transformers."""


def export_card(artifact: Path, facts: dict[str, Any], use: str) -> str:
    """README.md of an export.

    Args:
        artifact: the source, whose card is taken over (all but its section on loading).
        facts: content of export.json.
        use: Markdown on how the export is loaded.
    """
    path = artifact / "README.md"
    front, body = _split(path.read_text(encoding="utf-8") if path.is_file() else "")
    name = facts["format"]
    front = re.sub(r"^library_name:.*$", f"library_name: {LIBRARIES.get(name, 'transformers')}",
                   front, flags=re.MULTILINE)  # fmt: skip
    front = re.sub(r"^- compressed-tensors$", f"- {name}", front, flags=re.MULTILINE)
    title, _, rest = body.partition("\n")
    rest = re.sub(r"^## Use\n.*?(?=^## )", "", rest, flags=re.MULTILINE | re.DOTALL)
    preface, mark, sections = rest.partition("\n## ")
    heading = f"{title or '# Quantized model'} ({name})"
    parts = [heading, preface.strip(), *_conversion(facts), f"## Use\n\n{use.strip()}"]
    parts.append(f"{mark}{sections}".strip())
    return "\n\n".join(part for part in [front.strip(), *parts] if part) + "\n"


def _split(card: str) -> tuple[str, str]:
    """Front matter with its fences, and the text below it."""
    match = re.match(r"---\n.*?\n---\n", card, flags=re.DOTALL)
    if match is None:
        return "", card.strip()
    return match[0], card[match.end() :].strip()


def _conversion(facts: dict[str, Any]) -> list[str]:
    """The paragraphs on what was written from what, and how exactly."""
    found = facts["read_back"]
    source = (
        f"Written by {facts['converter']} from the artifact whose manifest.json has the SHA-256 "
        f"`{facts['source_sha256']}`; the tables below describe that artifact."
    )
    if facts["exact"]:
        result = (
            "The codes and scales are the trained ones; nothing was quantized again. Read back "
            f"with {found['reader']}: {found['matrices']} quantized weights and "
            f"{found['tensors']} other tensors, all equal."
        )
        return ["## Conversion", f"{source} {result}"]
    result = (
        "**This format does not carry that artifact exactly.** The largest relative error of a "
        f"tensor, as {found['reader']} reads it, is {found['relative_error']:.2e}. Not carried:"
    )
    losses = "\n".join(f"- {loss['what']}: {loss['reason']}" for loss in facts["losses"])
    return ["## Conversion", f"{source} {result}", losses]
