"""The model card: each fact is in it, and only facts that the run has."""

import math
import re
from dataclasses import replace

import pytest
import yaml

from qat.adapter_card import nf4_card
from qat.card import CardFacts, model_card
from qat.card_tables import _ranges, kind_of, layer_table
from qat.evaluate import Quality
from qat.export.card import export_card
from qat.fidelity import Fidelity
from qat.module import quantization_error
from qat.prepare import prepare
from qat.report import Report, Row
from qat.scheme import InputSpec, Rule, Scheme
from qat.slices import Slice
from qat_kernels import QuantSpec
from tests.tiny import tiny

RARE, COMMON = Slice("frequency", "rare tokens", 10), Slice("frequency", "frequent tokens", 90)
LOSSES = {"original": 2.0, "finetuned": 1.5, "trained": 1.75, "artifact": 1.75, "served": 1.76}


def quality(name):
    slices = {COMMON: LOSSES[name] - 0.1, RARE: LOSSES[name] + (0.9 if name == "original" else 1.3)}
    return Quality(LOSSES[name], math.exp(LOSSES[name]), 0.01, 0.9, 100, slices)


@pytest.fixture(scope="module")
def prepared():
    model = tiny("llama")
    rules = [
        Rule("model.layers.0.mlp.down_proj", "quantize", QuantSpec(bits=8)),
        Rule("model.layers.1.self_attn.q_proj", "keep"),
    ]
    scheme = Scheme(rules=rules, min_coverage=0.1)
    return prepare(model, scheme), quantization_error(model)


@pytest.fixture
def report(prepared):
    coverage, errors = prepared
    rows = {name: Row(quality(name), 4.5, 1_100_000, "fp32") for name in LOSSES}
    rows["served"] = replace(rows["served"], dtype="bf16, packed weights")
    return Report(
        recipe="qat_int4",
        model="org/base",
        data="/home/ann/chats.jsonl",
        scheme="int4 g32 signed_absmax weights",
        keep_dtype="bfloat16",
        rows=rows,
        fidelity=Fidelity(True, 13, True, 21, "equal", 8, 0.0),
        coverage=coverage,
        quantization_error=errors,
        quantization_error_ptq=errors,
        sample={"prompt": "The *end*", "continuation": " is near\n```\n# no heading"},
        timing={},
        peak_memory_bytes=1,
        predicted_memory_bytes=None,
        data_fingerprint="f1" * 32,
        packed=frozenset({"trained", "artifact", "served"}),
    )


@pytest.fixture
def facts():
    return CardFacts(
        provenance={
            "model": "org/base",
            "base": {"name": "org/base", "revision": "ab" * 20, "weights_sha256": "cd" * 32},
            "data": "chats.jsonl",
            "data_class": "conversations (messages), given by the user as a file",
            "calibration_blocks": 0,
            "evaluation_tokens": 100,
            "seeds": {"run": 7},
            "command": "python train.py recipe=qat_int4 data=chats.jsonl",
            "config": {"max_steps": 300, "text": {"validation": None}},
            "git": {"commit": "ef" * 20, "dirty": False},
        },
        metadata={"license": "apache-2.0", "language": "en"},
    )


def front(card):
    return yaml.safe_load(re.match(r"---\n(.*?)---\n", card, re.DOTALL)[1])


def section(card, title):
    """Text of a section, its white space collapsed."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)
    return None if found is None else " ".join(found[1].split())


def test_metadata(report, facts):
    assert front(model_card(report, facts)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quantization-aware-training", "compressed-tensors", "int4", "int8"],
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "language": "en",
    }
    local = replace(facts, metadata={}, provenance=facts.provenance | {"model": "mine"})
    found = front(model_card(report, local))
    assert not {"base_model", "base_model_relation", "license", "language"} & found.keys()


def test_metadata_as_the_hub_reads_it(report, facts):
    from huggingface_hub import ModelCard

    odd = replace(facts, metadata={"license": "other", "license_name": "a: b # c"})
    data = ModelCard(model_card(report, odd)).data
    assert (data.base_model, data.license_name) == ("org/base", "a: b # c")


def test_facts(report, facts):
    card = model_card(report, facts)
    assert "# base, int4 g32 signed_absmax weights" in card
    head = card[: card.index("## Use")]
    for fact in (
        f"org/base, revision `{'ab' * 20}`, weights of sha256 `{'cd' * 32}`",
        "quantization-aware training (recipe `qat_int4`, 300 steps)",
        "conversations (messages), given by the user as a file",
        "compressed-tensors, `pack-quantized`",
        "| licence | apache-2.0 |",
        "1.10 MB",
    ):
        assert fact in head
    assert "Other engines" in section(card, "Checked on")
    assert "equal, bit for bit" in section(card, "Checked on")
    assert "loss on the held-out text; packed weights | 1.7600 (in fp32 1.7500)" in section(
        card, "Checked on"
    )
    made = section(card, "Made with")
    assert f"`{'ef' * 20}`" in made
    assert "Seed of the run: 7." in made
    assert "python train.py recipe=qat_int4 data=chats.jsonl" in made
    for name, version in report.environment["versions"].items():
        if version != "not installed":
            assert version in made, name
    data = section(card, "Data")
    assert f"sha256 `{'f1' * 32}`" in data
    assert "none: scales of weights come from the weights" in data
    assert "qat verify . public_key=" in section(card, "Verify")
    assert "/home" not in card


def test_no_heading_of_the_card_comes_from_the_sample(report, facts):
    card = model_card(report, facts)
    outside = re.sub(r"^(`{3,}).*?^\1$", "", card, flags=re.DOTALL | re.MULTILINE)
    assert "# no heading" in card
    assert "# no heading" not in outside


def test_degradations_are_worst_first(report, facts):
    text = section(model_card(report, facts), "Known degradations")
    assert text.startswith(
        "Worse than the original on 1 of 2 parts, most on rare tokens (+0.1500)."
    )
    rows = re.findall(
        r"\| (rare|frequent) tokens \| (\d+) \|.*?\| ([+-][\d.]+) \| ([+-][\d.]+) \|", text
    )
    assert rows == [("rare", "10", "+0.1500", "+0.2500"), ("frequent", "90", "-0.2500", "+0.2500")]
    for name in ("original", "finetuned"):
        report.rows[name] = replace(report.rows[name], quality=replace(quality(name), slices={}))
    assert section(model_card(report, facts), "Known degradations") is None


def test_low_bits_against_what_was_trained(report, facts):
    """Of an adapter run without the merged form, `trained` is the model before its merge."""
    del report.rows["finetuned"]
    report.rows["trained"] = replace(
        report.rows["trained"], quality=replace(quality("trained"), slices={RARE: 3.0, COMMON: 1.0})
    )
    text = section(model_card(report, facts), "Known degradations")
    assert "low bits" not in text.partition("|")[2], "the trained model is the artifact"
    report.packed = report.packed - {"trained"}
    text = section(model_card(report, facts), "Known degradations")
    assert "less that of `trained`, before merge and rounding" in text
    assert "| rare tokens | 10 | 2.9000 | 3.0000 | 3.0500 | +0.1500 | +0.0500 |" in text


def test_nothing_worse(report, facts):
    report.rows["artifact"] = replace(
        report.rows["artifact"], quality=replace(quality("artifact"), slices={COMMON: 1.0})
    )
    text = section(model_card(report, facts), "Known degradations")
    assert text.startswith("Not worse than the original on any of 1 parts")


def test_bit_widths_by_kind_of_matrix(report):
    table = layer_table(report.coverage, "bfloat16")
    rows = {tuple(row[:2]): row for row in (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    )}  # fmt: skip
    assert rows["`self_attn.k_proj`", "0-1"][2:] == [
        "2", "32 x 64", "int4", "32 weights", "bfloat16", "signed_absmax", "16 bit", "4,096",
    ]  # fmt: skip
    assert rows["`mlp.down_proj`", "0"][4] == "int8"
    assert rows["`mlp.down_proj`", "1"][4] == "int4"
    kept = rows["`self_attn.q_proj`", "1"]
    assert (kept[4], kept[7]) == ("bfloat16", "rule 'model.layers.1.self_attn.q_proj'")
    assert rows["`embed_tokens`", ""][4] == "bfloat16"
    counted = sum(int(row[-1].replace(",", "")) for row in rows.values() if row[-1][-1:].isdigit())
    assert counted == sum(entry.numel for entry in report.coverage.entries)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("model.layers.0.mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj"),
        ("model.layers.0.mlp.experts.7.up_proj", "up_proj"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_ranges():
    assert _ranges([5, 0, 1, 2, 9, 8]) == "0-2, 5, 8-9"
    assert _ranges([]) == ""


@pytest.mark.parametrize(("dynamic", "said"), [(True, "computed at run time"), (False, "6 blocks")])
def test_calibration(report, facts, dynamic, said):
    kind = {} if dynamic else {"granularity": "tensor", "scale_dtype": "bfloat16", "dynamic": False}
    scheme = Scheme(weight=QuantSpec(bits=8, granularity="channel"), input=InputSpec(**kind))
    report.coverage = prepare(tiny("llama"), scheme)
    provenance = facts.provenance | {"calibration_blocks": 0 if dynamic else 6}
    card = model_card(report, replace(facts, provenance=provenance))
    assert said in section(card, "Data")
    assert ("int8, per token" if dynamic else "int8, static") in section(card, "Quantization")
    assert front(card)["tags"][-1] == "int8"


@pytest.mark.parametrize(
    ("template", "chat", "said"),
    [
        (None, False, "None: the model continues plain text"),
        ("{{ messages }}", True, "were trained in the tokenizer's chat template: ```jinja"),
        ("{{ messages }}", False, "this run trained on plain text"),
        ("x" * 3000, True, "it is in `chat_template.jinja`"),
        ({"default": "x", "tool_use": "y"}, True, "several: `default`, `tool_use`"),
    ],
)
def test_prompt_template(report, facts, template, chat, said):
    card = model_card(report, replace(facts, chat_template=template, chat=chat))
    assert said in section(card, "Prompt template")


ADAPTER = {
    "base": "nf4", "rank": 16, "alpha": 32.0, "init": "default", "targets": ["all-linear"],
    "dora": True, "rslora": False, "trained_parameters": 1234, "base_sha256": "aa" * 32,
    "merge_share": 0.3, "modules_to_save": ["lm_head"], "new_tokens": [],
    "base_bits_per_weight": 4.127,
    "quantizer": {"dtype": "bfloat16", "quant_type": "nf4", "block_size": 64, "double_quant": True},
}  # fmt: skip


def test_adapter_stack(report, facts):
    assert section(model_card(report, facts), "Adapters") is None
    report.adapter = ADAPTER
    card = model_card(report, facts)
    stack = section(card, "Adapters")
    for fact in (
        f"NF4, blocks of 64, double quantization; sha256 `{'aa' * 32}`",
        "DoRA, rank 16, alpha 32.0, initialised as `default`, on all linear layers",
        "`lm_head`",
        "so trained in the last 30% of the steps",
        "100.00% of what training gained",
    ):
        assert fact in stack
    assert "lora" in front(card)["tags"]


def test_what_was_not_compared_is_not_claimed(report, facts):
    short = "not compared: needs 9.0 GiB, 1.0 GiB are free"
    report.fidelity = Fidelity(True, 13, None, 0, short, 0, None)
    del report.rows["artifact"]
    card = model_card(report, facts)
    checked = section(card, "Checked on")
    assert short in checked
    assert "weights as loaded" not in checked
    assert "bit for bit" not in section(card, "Use")


def test_outside_a_checkout(report, facts):
    bare = facts.provenance | {"git": None, "command": None}
    made = section(model_card(report, replace(facts, provenance=bare)), "Made with")
    assert "none: installed without a checkout" in made
    assert "Command" not in made
    dirty = facts.provenance | {"git": {"commit": "ef" * 20, "dirty": True}}
    made = section(model_card(report, replace(facts, provenance=dirty)), "Made with")
    assert "with changes that were not committed" in made


def test_an_export_takes_the_card_over(report, facts, tmp_path):
    (tmp_path / "README.md").write_text(model_card(report, facts))
    found = {
        "format": "gguf", "exact": True, "converter": "x", "source_sha256": "y", "losses": [],
        "read_back": {
            "reader": "gguf", "matrices": 1, "tensors": 2, "differences": [], "not_compared": [],
        },
    }  # fmt: skip
    card = export_card(tmp_path, found, "how to load it")
    assert "how to load it" in section(card, "Use")
    assert "from_pretrained" not in card
    assert section(card, "Known degradations")
    assert front(card)["base_model_relation"] == "quantized"
    assert "gguf" in front(card)["tags"]
    assert "compressed-tensors" not in front(card)["tags"]
    # what the source says of its own directory does not stand above what was done to it
    assert card.index("## Conversion") < card.index("The weights in this directory")


@pytest.mark.parametrize(
    ("form", "library", "relation", "tags"),
    [
        ("bitsandbytes", "transformers", "quantized", ["qlora", "lora", "bitsandbytes"]),
        ("merged", "transformers", "finetune", ["qlora", "lora"]),
        ("peft", "peft", "adapter", ["qlora", "lora", "peft"]),
    ],
)
def test_an_export_of_an_adapter_run_is_no_base_with_its_adapter(
    form, library, relation, tags, tmp_path
):
    facts = {"quantizer": {"dtype": "float32"}, "base_sha256": "ab"}
    (tmp_path / "README.md").write_text(nf4_card("org/model", facts, None))
    lost = [] if form == "peft" else [{"what": "adapter", "reason": "none"}]
    found = {
        "format": form, "exact": not lost, "converter": "x", "source_sha256": "y", "losses": lost,
        "read_back": {
            "reader": "r", "matrices": 0, "tensors": 2, "differences": [], "not_compared": [],
        },
    }  # fmt: skip
    card = export_card(tmp_path, found, "how to load it")
    assert front(card) == {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": tags,
        "base_model": "org/model",
        "base_model_relation": relation,
    }
    assert f"# model ({form})" in card
    assert 'from_pretrained(base, "adapter")' not in card
    # no figure where nothing was measured
    assert "relative error" not in card
    assert ("Each of the 2 tensors" in card) == bool(lost)
