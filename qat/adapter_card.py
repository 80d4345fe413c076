"""Short model cards of what an adapter run writes beside its artifact."""

from typing import Any

from qat.provenance import is_hub_id, public_name

NF4_TITLE = "4-bit base with its adapter, as trained"
"""End of the title of the card of ``nf4/``."""


def _front(library: str, base: str, relation: str, tags: list[str]) -> list[str]:
    hub_id = base if is_hub_id(base) else None
    return [
        "---",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:",
        *[f"- {tag}" for tag in tags],
        *([f"base_model: {hub_id}", f"base_model_relation: {relation}"] if hub_id else []),
        "---",
        "",
    ]


def _code(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]


_LOCAL_BASE = (
    "PEFT finds the base by `base_model_name_or_path` in adapter_config.json, which is a directory "
    "of the machine that trained: put the name of the base there before you publish this."
)


def adapter_card(base: str, facts: dict[str, Any], vocabulary: int | None) -> str:
    """README.md of ``adapter/``.

    Args:
        base: the original model, as the user gave it.
        facts: what ``base.json`` holds.
        vocabulary: entries that the base's vocabulary must be resized to, or None.
    """
    local = [] if is_hub_id(base) else [_LOCAL_BASE, ""]
    resize = [] if vocabulary is None else [f"base.resize_token_embeddings({vocabulary})"]
    return "\n".join(
        [
            *_front("peft", base, "adapter", ["lora", "peft"]),
            f"# LoRA adapter for {public_name(base).rpartition('/')[2]}",
            "",
            "For the original 16-bit model. Do not merge it into a 4-bit base: rounding to the "
            "base's own codes swallows most of a small update. Quantize once from the original "
            "weights with the adapter added, as the low-bit artifact of this run was made.",
            "",
            *_code(
                "from peft import PeftModel",
                "from transformers import AutoModelForCausalLM",
                "",
                f'base = AutoModelForCausalLM.from_pretrained("{public_name(base)}")',
                *resize,
                'model = PeftModel.from_pretrained(base, ".")  # this directory',
            ),
            f"Trained on a base of sha256 `{facts['base_sha256']}`, held as "
            f"{_quantizer(facts['quantizer'])}; base.json has the same for programs.",
            "",
            *local,
        ]
    )


def nf4_card(base: str, facts: dict[str, Any], caveat: str | None) -> str:
    """README.md of ``nf4/``; ``caveat`` says where plain bitsandbytes misreads it."""
    return "\n".join(
        [
            *_front("transformers", base, "quantized", ["bitsandbytes", "qlora", "lora"]),
            f"# {public_name(base).rpartition('/')[2]}: {NF4_TITLE}",
            "",
            f"The frozen base ({_quantizer(facts['quantizer'])}, sha256 "
            f"`{facts['base_sha256']}`) in bitsandbytes' serialization, and in `adapter/` the "
            "adapter that was trained on it. Together they compute what training computed.",
            "",
            "## Use",
            "",
            *_code(
                "from peft import PeftModel",
                "from transformers import AutoModelForCausalLM",
                "",
                'base = AutoModelForCausalLM.from_pretrained(".")  # this directory',
                'model = PeftModel.from_pretrained(base, "adapter")',
            ),
            "On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward "
            "pass in eval mode, computes in bf16 from then on, and neither trains nor saves "
            "rightly after it: set `support_avx512bf16_for_cpu = False` on each of its Linear4bit.",
            "",
            *([f"Caution: {caveat}.", ""] if caveat else []),
        ]
    )


def merged_card(base: str, facts: dict[str, Any]) -> str:
    """README.md of ``merged/``."""
    return "\n".join(
        [
            *_front("transformers", base, "finetune", ["lora"]),
            f"# {public_name(base).rpartition('/')[2]} with its adapter merged",
            "",
            "The original weights with the adapter added in fp32, rounded once to "
            f"{facts['quantizer']['dtype']}.",
            "",
        ]
    )


def _quantizer(facts: dict[str, Any]) -> str:
    if "quant_type" not in facts:
        return str(facts["dtype"])
    nested = ", double quantization" if facts["double_quant"] else ""
    return f"{facts['quant_type'].upper()}, blocks of {facts['block_size']}{nested}"
