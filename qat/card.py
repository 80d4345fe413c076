"""The artifact's model card: what it is, how it was made, what was checked and measured."""

from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from qat.card_tables import engine_table, layer_table, markdown_table, version_table
from qat.compressed_tensors import quantization_config
from qat.provenance import is_hub_id
from qat.report import Report, gain_kept, slice_rows, slice_table, table, verdict

LONGEST_TEMPLATE = 2000
"""Characters of a chat template that the card shows; longer ones are in a file of their own."""


@dataclass(frozen=True)
class CardFacts:
    """What the card says beside the report."""

    provenance: dict[str, Any]
    """The manifest's, see `qat.result.Result.provenance`."""
    metadata: dict[str, Any]
    """Licence and language for the Hub, where they are known."""
    chat_template: Any = None
    """The tokenizer's, None if it has none."""
    chat: bool = False
    """Whether the training text was conversations in that template."""


def model_card(report: Report, facts: CardFacts) -> str:
    """README.md of the artifact, with the metadata block that the Hub reads."""
    name = facts.provenance["model"].rpartition("/")[2]
    sections = {
        "Use": _use(report),
        "Quality": _quality(report, facts),
        "Known degradations": _degradations(report),
        "Quantization": _quantization(report),
        "Adapters": _adapters(report),
        "Data": _data(report, facts),
        "Prompt template": _template(facts),
        "Checked on": _checked(report),
        "Made with": _made_with(report, facts),
        "Verify": _VERIFY,
        "Sample": _sample(report),
        "Limits": _LIMITS,
    }
    parts = [_front_matter(report, facts), f"# {name}, {report.scheme}", _origin(report)]
    parts.append(_glance(report, facts))
    parts += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def _front_matter(report: Report, facts: CardFacts) -> str:
    base = facts.provenance["model"]
    types = {f"{e.weight.family}{e.weight.bits}" for e in report.coverage.quantized if e.weight}
    if "trained" in report.packed:
        method = ["quantization-aware-training"]
    else:
        method = ["qlora"] if report.adapter and report.adapter["base"] != "16bit" else []
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            *method,
            *(["lora"] if report.adapter else []),
            "compressed-tensors",
            *sorted(types),
        ],
    }
    if is_hub_id(base):
        metadata |= {"base_model": base, "base_model_relation": "quantized"}
    text = yaml.safe_dump(metadata | facts.metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


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


def _glance(report: Report, facts: CardFacts) -> str:
    """The facts that a reader looks for first."""
    provenance = facts.provenance
    config = provenance["config"]
    method = "quantization-aware training" if report.adapter is None else "LoRA adapters, merged"
    steps = f"{config['max_steps']:,} steps" if "max_steps" in config else "steps unknown"
    packed = next((row for name, row in report.rows.items() if name in report.packed), None)
    rows = [
        ["base model", _base(provenance["base"])],
        ["method", f"{method} (recipe `{report.recipe}`, {steps})"],
        ["trained on", f"{provenance['data_class']}"],
        ["format", f"compressed-tensors, `{quantization_config(report.coverage, None)['format']}`"],
        ["quantized", f"{report.coverage.share:.1%} of the linear layers' parameters"],
    ]
    if packed is not None and packed.bits_per_weight is not None:
        bits = f"{packed.bits_per_weight:.4f}, scales and zero points included"
        rows.append(["bits per quantized weight", bits])
    if packed is not None and packed.size_bytes is not None:
        size = f"{packed.size_bytes / 1e6:.2f} MB"
        full = report.rows["original"].size_bytes if "original" in report.rows else None
        if full:
            size += f" ({full / 1e6:.2f} MB in {report.keep_dtype})"
        rows.append(["size", size])
    licence = facts.metadata.get("license") or "not recorded: the base model's applies"
    rows.append(["licence", str(licence)])
    return markdown_table(["", ""], rows)


def _base(base: dict[str, Any]) -> str:
    """Name and fingerprint of the base model."""
    text = f"`{base['name']}`" if not is_hub_id(base["name"]) else base["name"]
    if base["name"] == "demo":
        text = "the built-in demo model of qat-lightning"
    if "revision" in base:
        text += f", revision `{base['revision']}`"
    if "weights_sha256" in base:
        text += f", weights of sha256 `{base['weights_sha256']}`"
    return text


def _use(report: Report) -> str:
    lines = [
        "```python",
        "import torch",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'path = "."  # this directory',
        "tokenizer = AutoTokenizer.from_pretrained(path)",
        "model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)",
        "```",
        "",
        f"Loading needs the package compressed-tensors. {_exactness(report)}",
    ]
    return "\n".join(lines)


def _exactness(report: Report) -> str:
    module = "trained" if "trained" in report.packed else "merged and quantized"
    if report.fidelity.logits != "equal":
        return f"Logits were not compared with the {module} module's."
    return (
        f"In fp32 the logits are those of the {module} module bit for bit; in bf16 they are "
        "rounded as the `served` row shows."
    )


def _quality(report: Report, facts: CardFacts) -> str:
    source = facts.provenance["data_class"]
    task = (
        f"Task: prediction of the next token on {facts.provenance['evaluation_tokens']:,} targets "
        f"of held-out text ({source}). Loss in nats per token; KL divergence and agreement are "
        "those of the next-token distribution with the original's."
    )
    return f"{task}\n\n{table(report)}\n\n{verdict(report)}"


def _degradations(report: Report) -> str:
    rows = [row for row in slice_rows(report) if row.change is not None]
    if not rows:
        return ""
    worse = [row for row in rows if row.change is not None and not row.change <= 0]
    if worse:
        parts = ", ".join(f"{row.slice} ({row.change:+.4f})" for row in worse[:3])
        first = f"Worse than the original on {len(worse)} of {len(rows)} parts, most on {parts}."
    else:
        first = f"Not worse than the original on any of {len(rows)} parts of the held-out text."
    against = {
        "finetuned": "; the latter is the loss less that of `finetuned`, trained alike in 16 bit",
        "trained": "; the latter is the loss less that of `trained`, before merge and rounding",
        None: "",
    }
    cost = against[rows[0].against]
    meaning = (
        "`change` is the artifact's loss less the original's, nats per token: above zero is worse. "
        f"It holds what training changed as well as what low bits cost{cost}. Tokens are frequent, "
        "medium or rare by their count among all targets (half of the text, the next 40 %, the "
        "last tenth)."
    )
    return f"{first} {meaning}\n\n{slice_table(report)}"


def _quantization(report: Report) -> str:
    return (
        f"{len(report.coverage.quantized)} weights are quantized "
        f"({report.coverage.share:.1%} of the linear layers' parameters); everything else is kept "
        f"in {report.keep_dtype}.\n\n{layer_table(report.coverage, report.keep_dtype)}"
    )


def _adapters(report: Report) -> str:
    adapter = report.adapter
    if adapter is None:
        return ""
    on = ", ".join(adapter["targets"]).replace("all-linear", "all linear layers")
    kinds = [k for k, name in (("DoRA", "dora"), ("rsLoRA", "rslora")) if adapter.get(name)]
    quantizer = adapter["quantizer"]
    held = quantizer["dtype"]
    if "quant_type" in quantizer:
        nested = ", double quantization" if quantizer["double_quant"] else ""
        held = f"{quantizer['quant_type'].upper()}, blocks of {quantizer['block_size']}{nested}"
    rows = [
        ["1. frozen base", f"{held}; sha256 `{adapter['base_sha256']}`"],
        ["2. adapter", f"{' and '.join(kinds) or 'LoRA'}, rank {adapter['rank']}, alpha "
                       f"{adapter['alpha']}, initialised as `{adapter['init']}`, on {on}"],
        ["trained parameters", f"{adapter['trained_parameters']:,}"],
    ]  # fmt: skip
    extra = [*adapter.get("modules_to_save", []), *adapter.get("new_tokens", [])]
    if extra:
        rows.append(["also trained", ", ".join(f"`{name}`" for name in extra)])
    merged = f"added to the original weights in fp32, quantized once to {report.scheme}"
    if adapter["merge_share"]:
        merged += f"; so trained in the last {adapter['merge_share']:.0%} of the steps"
    rows.append(["3. merge", merged])
    kept = gain_kept(report.rows)
    if kept is not None:
        rows.append(["gain kept", f"{kept:.2%} of what training gained over the original"])
    return markdown_table(["stack", ""], rows)


def _data(report: Report, facts: CardFacts) -> str:
    provenance = facts.provenance
    fingerprint = f"sha256 `{report.data_fingerprint}`"
    rows = [["training", f"{provenance['data_class']} (`{provenance['data']}`)", fingerprint]]
    summary = report.data_summary
    if summary is not None:
        what = (
            f"{summary['train']['conversations']:,} conversations, loss on "
            f"{summary['train']['loss_tokens']:,} tokens ({summary['train_on']})"
        )
        rows.append(["", what, ""])
    blocks = provenance["calibration_blocks"]
    if blocks:
        what = f"{blocks} blocks of the same source, for the ranges of static inputs"
        rows.append(["calibration", what, fingerprint])
    else:
        dynamic = any(entry.input for entry in report.coverage.quantized)
        why = "scales of weights come from the weights"
        why += ", those of inputs are computed at run time" if dynamic else ""
        rows.append(["calibration", f"none: {why}", ""])
    held = f"{provenance['evaluation_tokens']:,} targets held out from the same source"
    if (provenance["config"].get("text") or {}).get("validation"):
        held = f"{provenance['evaluation_tokens']:,} targets of a file of their own"
    rows.append(["evaluation", held, fingerprint])
    return markdown_table(["used for", "class of data", "fingerprint"], rows)


def _template(facts: CardFacts) -> str:
    template = facts.chat_template
    if not template:
        return "None: the model continues plain text, and its tokenizer has no chat template."
    first = (
        "Conversations were trained in the tokenizer's chat template"
        if facts.chat
        else "The tokenizer brings a chat template, but this run trained on plain text"
    )
    if not isinstance(template, str):
        return f"{first}. It has several: {', '.join(f'`{name}`' for name in template)}."
    if len(template) > LONGEST_TEMPLATE:
        return f"{first}; it is in `chat_template.jinja`."
    fence = "````" if "```" in template else "```"
    return f"{first}:\n\n{fence}jinja\n{template.rstrip()}\n{fence}"


def _checked(report: Report) -> str:
    environment = report.environment
    cpu = environment.get("cpu") or "unknown model"
    hardware = f"{cpu} ({environment['cpu_capability']}, {environment['platform']})"
    gpu = environment["gpu"]
    device = f"Training ran on a machine with {gpu}; the checks used its CPU" if gpu else "Hardware"
    return (
        f"{engine_table(report)}\n\n{device}: {hardware}. Other engines that read this format "
        "(vLLM among them) were not part of this run; a conversion by `qat export` states in its "
        "own card what it was read back with."
    )


def _made_with(report: Report, facts: CardFacts) -> str:
    provenance = facts.provenance
    text = version_table(report, provenance["git"])
    seed = provenance["seeds"]["run"]
    seeds = f"Seed of the run: {seed}." if seed is not None else ""
    command = provenance["command"]
    if command:
        return f"{text}\n\n{seeds} Command, files by their names:\n\n```sh\n{command}\n```"
    return f"{text}\n\n{seeds}".rstrip()


_VERIFY = """\
`manifest.json` has the SHA-256 of each file and of each tensor, the whole configuration and the
commit. With qat-lightning installed,

```sh
qat verify .                             # every byte; names the first range that differs
qat verify . public_key=publisher.pem    # the publisher's signature too, where there is a model.sig
```"""

_LIMITS = """\
The model knows what its base model and its training text know, and repeats their errors and
biases. No evaluation beyond the tables above was made: not of safety, not of facts, not of other
languages or tasks, not of contexts longer than the blocks above. The licence and the terms of use
of the base model hold for this one too."""


def _sample(report: Report) -> str:
    """Prompt and continuation as they are: generated text is no Markdown."""
    text = f"{report.sample['prompt']}{report.sample['continuation']}".rstrip()
    fence = "````" if "```" in text else "```"
    prompt = report.sample["prompt"].strip()
    return f"Greedy, as served; the prompt is *{prompt}*\n\n{fence}text\n{text}\n{fence}"
