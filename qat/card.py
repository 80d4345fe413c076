"""The artifact's model card: what it is, how it was made, what was measured."""

from pathlib import Path

from qat.report import Report, table, verdict


def model_card(report: Report, licence: str | None) -> str:
    """README.md of the artifact, with the metadata block that the Hub reads."""
    hub_id = (
        report.model if report.model.count("/") == 1 and not Path(report.model).exists() else None
    )
    metadata = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- quantization-aware-training" if "trained" in report.packed else "- qlora",
        *(["- lora"] if report.adapter else []),
        "- compressed-tensors",
        *([f"base_model: {hub_id}", "base_model_relation: quantized"] if hub_id else []),
        *([f"license: {licence}"] if licence else []),
        "---",
    ]
    entries = report.coverage.quantized
    return "\n".join(
        [
            *metadata,
            "",
            f"# {report.scheme} of {Path(report.model).name}",
            "",
            _origin(report),
            "",
            verdict(report),
            "",
            "## Use",
            "",
            "```python",
            "import torch",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'path = "."  # this directory',
            "tokenizer = AutoTokenizer.from_pretrained(path)",
            "model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)",
            "```",
            "",
            "Loading needs the package compressed-tensors. " + _exactness(report),
            "",
            "## Quality",
            "",
            f"Measured on {report.rows['trained'].quality.tokens:,} held-out tokens of "
            f"{report.data} (training text {report.data_fingerprint[:16]}…).",
            "",
            table(report),
            "",
            "## Quantization",
            "",
            f"{len(entries)} weights are quantized ({report.coverage.share:.1%} of the linear "
            f"layers' parameters); everything else is kept in {report.keep_dtype}.",
            "",
            "```",
            report.coverage.summary(),
            "```",
            "",
            "## Sample",
            "",
            *[
                f"> {line}"
                for line in (
                    f"**{report.sample['prompt']}**{report.sample['continuation']}".splitlines()
                )
            ],
            "",
            "## Limits",
            "",
            "The model knows what its base model and its training text know, and no evaluation "
            "beyond the table above was made. Provenance (versions, configuration, hashes of all "
            "files) is in manifest.json.",
            "",
        ]
    )


def _exactness(report: Report) -> str:
    module = "trained" if "trained" in report.packed else "merged and quantized"
    if report.fidelity.logits != "equal":
        return f"Logits were not compared with the {module} module's."
    return (
        f"In fp32 the logits are those of the {module} module bit for bit; in bf16 they are "
        "rounded as the `served` row shows."
    )


def _origin(report: Report) -> str:
    """How these weights came about, in a sentence or two."""
    if report.adapter is None:
        return (
            "The weights in this directory are the ones that were trained: fake-quantization in "
            "training, packing and the check below use one quantizer."
        )
    adapter = report.adapter
    base = "16-bit" if adapter["base"] == "16bit" else str(adapter["base"]).upper()
    how = f"LoRA adapters (rank {adapter['rank']}) were trained on the frozen {base} base"
    if adapter["merge_share"]:
        return (
            f"{how}; the last {adapter['merge_share']:.0%} of the steps trained the merged and "
            "quantized weights themselves, which are the ones in this directory, bit for bit."
        )
    return (
        f"{how}. These weights are the original's with the adapter added in fp32, quantized once. "
        "The table's `trained` row is the model before that, `artifact` the one in this directory."
    )
