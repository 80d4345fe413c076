"""Small artifacts for the tests of what describes, checks and publishes them."""

from pathlib import Path

from qat.convert import write_checkpoint
from qat.manifest import write_manifest
from qat.prepare import prepare
from qat.scheme import Scheme
from tests.tiny import tiny, tiny_tokenizer


def make_artifact(directory: Path, seed: int = 0) -> Path:
    """The packed files of a tiny model, with a card and a manifest."""
    directory.mkdir(parents=True)
    model = tiny("llama", seed=seed)
    coverage = prepare(model, Scheme())
    write_checkpoint(model, tiny_tokenizer(), coverage, Scheme(), directory)
    (directory / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# tiny\n")
    write_manifest(directory, {"recipe": "qat_int4", "seeds": {"run": seed}})
    return directory
