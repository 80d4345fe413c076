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
    heading = f"{title or '# Quantized model'} ({name})"
    parts = [heading, "", *_conversion(facts), "", "## Use", "", use.strip(), ""]
    parts += ["## The artifact that was converted", "", rest.strip(), ""]
    return "\n".join([front, *parts] if front else parts)


def _split(card: str) -> tuple[str, str]:
    """Front matter with its fences, and the text below it."""
    match = re.match(r"---\n.*?\n---\n", card, flags=re.DOTALL)
    if match is None:
        return "", card.strip()
    return match[0], card[match.end() :].strip()


def _conversion(facts: dict[str, Any]) -> list[str]:
    found = facts["read_back"]
    lines = ["## Conversion", ""]
    if facts["exact"]:
        lines.append(
            f"Written by {facts['converter']} from the artifact whose manifest has the sha256 "
            f"`{facts['source_sha256']}`. The codes and scales are the trained ones; nothing was "
            f"quantized again. Read back with {found['reader']}: "
            f"{found['matrices']} quantized weights and {found['tensors']} other tensors, all "
            "equal."
        )
        return lines
    lines.append(
        f"Written by {facts['converter']} from the artifact whose manifest has the sha256 "
        f"`{facts['source_sha256']}`. **This format does not carry that artifact exactly**; the "
        f"largest relative error of a tensor, as {found['reader']} reads it, is "
        f"{found['relative_error']:.2e}. Not carried:"
    )
    return [*lines, "", *(f"- {loss['what']}: {loss['reason']}" for loss in facts["losses"])]
