"""The model card of an export: what this conversion did, then the card of what it was made from."""

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from qat.adapter_card import NF4_TITLE

LIBRARIES = {"gguf": "gguf", "onnx": "onnx", "peft": "peft"}
"""Format → ``library_name`` of the Hub, where it is not transformers."""
TAGS = {"gptq_v2": ["gptq"], "merged": []}
"""Format → tags of the Hub, where they are not its name."""
SOURCE_TAGS = ("compressed-tensors", "bitsandbytes")
"""Tags that say how the source is stored."""


def export_card(artifact: Path, facts: dict[str, Any], use: str) -> str:
    """README.md of an export.

    Args:
        artifact: the source, whose card follows (all but its section on loading).
        facts: content of export.json.
        use: Markdown on how the export is loaded.
    """
    path = artifact / "README.md"
    front, body = _split(path.read_text(encoding="utf-8") if path.is_file() else "")
    name = facts["format"]
    title, _, rest = body.partition("\n")
    of_base = title.endswith(NF4_TITLE)
    title = title.removesuffix(f": {NF4_TITLE}")
    rest = re.sub(r"^## Use\n.*?(?=^## |\Z)", "", rest, flags=re.MULTILINE | re.DOTALL)
    preface, mark, sections = rest.partition("\n## ")
    parts = [_front(front, name, of_base), f"{title or '# Quantized model'} ({name})"]
    parts += [*_conversion(facts), f"## Use\n\n{use.strip()}"]
    if preface.strip():
        parts.append(f"## The artifact that it was made from\n\n{preface.strip()}")
    parts.append(f"{mark}{sections}".strip())
    return "\n\n".join(part for part in parts if part) + "\n"


def _split(card: str) -> tuple[str, str]:
    """Front matter without its fences, and the text below it."""
    match = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    if match is None:
        return "", card.strip()
    return match[1], card[match.end() :].strip()


def _front(text: str, name: str, of_base: bool) -> str:
    """The metadata for the Hub, with its fences; "" where the source has none.

    Args:
        text: of the source.
        name: of the format.
        of_base: whether the source is a 4-bit base with its adapter.
    """
    metadata = yaml.safe_load(text) if text else None
    if not isinstance(metadata, dict):
        return ""
    metadata["library_name"] = LIBRARIES.get(name, "transformers")
    tags = [tag for tag in metadata.get("tags") or [] if tag not in SOURCE_TAGS]
    metadata["tags"] = [*tags, *TAGS.get(name, [name])]
    if "base_model_relation" in metadata and of_base:
        relations = {"peft": "adapter", "merged": "finetune"}
        metadata["base_model_relation"] = relations.get(name, "quantized")
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---"


def _conversion(facts: dict[str, Any]) -> list[str]:
    """The paragraphs on what was written from what, and how exactly."""
    found = facts["read_back"]
    source = (
        f"Written by {facts['converter']} from the artifact whose manifest.json has the SHA-256 "
        f"`{facts['source_sha256']}`; what stands below the section on its use describes that "
        "artifact."
    )
    tensors = f"{found['tensors']} tensors"
    what = "values"
    if found["matrices"]:
        tensors = f"{found['matrices']} quantized weights and {found['tensors']} other tensors"
        what = "codes and scales"
    if facts["exact"]:
        result = (
            f"The {what} are the trained ones; nothing was quantized again. Read back with "
            f"{found['reader']}: {tensors}, all equal."
        )
        return ["## Conversion", f"{source} {result}"]
    result = "**This format does not carry that artifact exactly.**"
    if found["differences"] or found["not_compared"]:
        result += (
            f" The largest relative error of a tensor, as {found['reader']} reads it, is "
            f"{found['relative_error']:.2e}."
        )
    else:
        result += (
            f" Each of the {tensors} that it holds is equal, as {found['reader']} reads it; what "
            "the rest changes in the model's answers was not measured."
        )
    losses = "\n".join(f"- {loss['what']}: {loss['reason']}" for loss in facts["losses"])
    return ["## Conversion", f"{source} {result} Not carried:", losses]
