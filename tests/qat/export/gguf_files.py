"""Exporting to GGUF and looking into the file, for several test files."""

import gguf

from qat.export import ExportOptions, export

KINDS = {
    "llama": "llama3",
    "llama_tied": "gpt2",
    "llama_bias": "gpt2",
    "mistral": "llama2",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
}
"""Family → kind of its tokenizer."""


def convert(artifact, out, **options):
    return export(artifact, ExportOptions(format="gguf", out=str(out), **options))


def file_of(out):
    (path,) = out.glob("*.gguf")
    return path


def field(path, name):
    found = gguf.GGUFReader(path).fields.get(name)
    return None if found is None else found.contents()


def types_of(path):
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
