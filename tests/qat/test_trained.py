"""One view of what is shipped, for both ways to train."""

import pytest
import torch

from qat.adapter_config import AdapterConfig
from qat.adapters import prepare_adapters
from qat.fake_quant import set_enabled
from qat.original import OriginalWeights
from qat.prepare import prepare
from qat.scheme import InputSpec, Rule, Scheme
from qat.trained import kept_parameters, quantized_parameters
from qat_kernels import QuantSpec
from tests.tiny import save_tiny, tiny

SCHEME = Scheme(
    weight=QuantSpec(bits=4, group_size=32),
    input=InputSpec(),
    rules=[
        Rule(match="lm_head", weight=QuantSpec(bits=8, group_size=64)),
        Rule(match="*.0.*.k_proj", action="keep"),
    ],
    min_coverage=0.1,
)
EXPERTS = Scheme(weight=QuantSpec(bits=4, group_size=32), min_coverage=0.1)


def both(family, scheme, directory, **options):
    """The original prepared, and with adapters that change nothing yet."""
    # on the grid of bf16, which experts without adapters are held in
    save_tiny(family, directory, torch.bfloat16)
    original = OriginalWeights(str(directory))
    prepared = original.load()
    coverage = prepare(prepared, scheme)
    adapter = AdapterConfig(block_size=32, rank=2, **options)
    adapted, _ = prepare_adapters(original, adapter, scheme, 0)
    return prepared, adapted, coverage


@pytest.mark.parametrize("family", ["llama_bias", "llama_tied", "qwen2", "mixtral"])
def test_both_ways_to_train_show_the_same(family, tmp_path):
    scheme = EXPERTS if family == "mixtral" else SCHEME
    if family == "llama_tied":
        scheme = Scheme(scheme.weight, scheme.input, scheme.rules[1:])
    prepared, adapted, coverage = both(family, scheme, tmp_path)
    ours = {item.name: item for item in quantized_parameters(adapted)}
    theirs = {item.name: item for item in quantized_parameters(prepared)}
    assert ours.keys() == theirs.keys() == {entry.name for entry in coverage.quantized}
    for name, item in ours.items():
        assert torch.equal(item.weight, theirs[name].weight)
        assert item.weight.dtype == torch.float32
        assert not item.weight.requires_grad or item.weight.is_leaf
        assert item.quantizer.spec == theirs[name].quantizer.spec
        assert (item.inputs is None) == (theirs[name].inputs is None)
        if item.inputs is not None:
            assert item.inputs.spec == theirs[name].inputs.spec
    kept = [
        {name: (value, dtype) for name, value, dtype in kept_parameters(m)}
        for m in (adapted, prepared)
    ]
    assert kept[0].keys() == kept[1].keys()
    # tied ones come each time they are owned
    missing = set(tiny(family).state_dict()) - ours.keys() - kept[0].keys()
    assert not missing
    for name, (value, dtype) in kept[0].items():
        assert dtype == kept[1][name][1] == torch.bfloat16
        assert torch.equal(value.to(dtype), kept[1][name][0].to(dtype)), name


def test_only_active_quantizers_are_shown_when_asked(tmp_path):
    prepared, adapted, coverage = both("llama", SCHEME, tmp_path)
    count = len(coverage.quantized)
    assert len(list(quantized_parameters(prepared, active_only=True))) == count
    # adapters begin in their plain form, and merging takes time
    assert not list(quantized_parameters(adapted, active_only=True))
    set_enabled(adapted, True)
    assert len(list(quantized_parameters(adapted, active_only=True))) == count


def test_merged_weights_move_with_the_adapters(tmp_path):
    _, adapted, _ = both("llama", SCHEME, tmp_path, modules_to_save=["norm"])
    before = {item.name: item.weight.clone() for item in quantized_parameters(adapted)}
    norms = {n: v for n, v, _ in kept_parameters(adapted) if n == "model.norm.weight"}
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    after = {item.name: item.weight for item in quantized_parameters(adapted)}
    assert before.keys() == after.keys()
    for name, weight in after.items():
        # the head is quantized by a rule and has no adapter
        assert torch.equal(weight, before[name]) == (name == "lm_head.weight")
    kept = {n: (v, dtype) for n, v, dtype in kept_parameters(adapted)}
    layer = adapted.get_submodule("model.layers.0.self_attn.k_proj")
    value, dtype = kept["model.layers.0.self_attn.k_proj.weight"]
    assert dtype == torch.bfloat16
    assert torch.equal(value, layer.merged_weight())
    assert not torch.equal(kept["model.norm.weight"][0], norms["model.norm.weight"])
