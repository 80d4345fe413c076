"""Coverage, rules and module surgery on tiny models of each architecture."""

import copy

import pytest
import torch
from torch import nn

from qat.errors import UserError
from qat.fake_quant import FakeQuantLinear, InputFakeQuant, WeightFakeQuant, set_enabled
from qat.prepare import plan, prepare
from qat.scheme import InputSpec, ObserverConfig, Rule, Scheme
from qat.trained import kept_parameters, quantized_parameters
from qat_kernels import QuantSpec, fake_quantize
from tests.tiny import CONFIGS, random_batch, tiny

W8A8 = Scheme(
    weight=QuantSpec(bits=8, granularity="channel", grid="absmax"),
    input=InputSpec(),
)
STATIC = Scheme(
    weight=W8A8.weight,
    input=InputSpec(granularity="tensor", dynamic=False, scale_dtype="bfloat16"),
)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "gpt2"])
def test_every_parameter_has_an_entry(family):
    model = tiny(family)
    coverage = plan(model, Scheme())
    assert [entry.name for entry in coverage.entries] == [n for n, _ in model.named_parameters()]
    assert all(entry.reason for entry in coverage.entries)
    assert coverage.share == 1.0


def test_gpt2_is_refused_by_the_name_of_its_class():
    with pytest.raises(UserError, match="Conv1D stores its weight transposed"):
        plan(tiny("gpt2"), Scheme())


def test_surgery_shares_parameters_and_names():
    model = tiny("llama_bias")
    before = dict(model.named_parameters())
    prepare(model, Scheme())
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, FakeQuantLinear)
    assert layer.weight is before["model.layers.0.self_attn.q_proj.weight"]
    # parametrized parameters are the same objects under another name
    assert {id(p) for p in model.parameters()} == {id(p) for p in before.values()}


def test_tied_head_stays_tied_and_gets_both_gradients():
    model = tiny("llama_tied")
    prepare(model, Scheme())
    batch = random_batch()
    embedding = model.model.embed_tokens.parametrizations.weight.original
    assert embedding is model.lm_head.parametrizations.weight.original
    model(input_ids=batch["input_ids"]).logits.sum().backward()
    assert embedding.grad is not None


def test_the_forward_pass_sees_quantized_and_rounded_weights():
    """Logits of the prepared model equal those of the plain model with replaced weights."""
    model, plain = tiny("llama_bias"), tiny("llama_bias")
    prepare(model, Scheme())
    values = {
        i.name: fake_quantize(i.weight, i.quantizer.spec) for i in quantized_parameters(model)
    }
    values |= {name: value.to(dtype).float() for name, value, dtype in kept_parameters(model)}
    assert set(values) == {name for name, _ in plain.named_parameters()}
    plain.load_state_dict({name: value.detach() for name, value in values.items()})
    ids = random_batch()["input_ids"]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_disabled_quantizers_leave_only_the_rounding():
    model, plain = tiny("llama"), tiny("llama")
    prepare(model, Scheme(keep_dtype="float32"))
    set_enabled(model, False)
    ids = random_batch()["input_ids"]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "mixtral", "falcon"])
def test_gradients_reach_every_parameter(family):
    model = tiny(family)
    prepare(model, Scheme())
    model.train()
    batch = random_batch(blocks=4, tokens=48)
    model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_experts_are_quantized_per_expert():
    model = tiny("mixtral")
    coverage = prepare(model, Scheme())
    entry = next(e for e in coverage.entries if e.name.endswith("gate_up_proj"))
    assert entry.status == "quantized"
    assert entry.shape == (4, 192, 64)
    quantizer = model.model.layers[0].mlp.experts.parametrizations.gate_up_proj[0]
    assert isinstance(quantizer, WeightFakeQuant)


def test_experts_are_kept_only_by_a_rule():
    coverage = plan(tiny("mixtral"), Scheme(rules=[Rule("*experts", "keep")], min_coverage=0))
    kept = [e for e in coverage.entries if "experts" in e.name]
    assert {(e.status, e.reason) for e in kept} == {("kept", "rule '*experts'")}


def test_first_matching_rule_wins():
    eight = QuantSpec(bits=8, granularity="channel")
    scheme = Scheme(rules=[Rule("*.0.mlp.*", "keep"), Rule("*.mlp.*", weight=eight)])
    entries = {e.name: e for e in plan(tiny("llama"), scheme).entries}
    assert entries["model.layers.0.mlp.up_proj.weight"].status == "kept"
    assert entries["model.layers.1.mlp.up_proj.weight"].weight == eight
    assert entries["model.layers.1.self_attn.q_proj.weight"].weight == QuantSpec()


def test_head_is_kept_unless_a_rule_asks():
    entry = next(e for e in plan(tiny("llama"), Scheme()).entries if e.name == "lm_head.weight")
    assert (entry.status, entry.matmul) == ("kept", False)
    scheme = Scheme(rules=[Rule("lm_head")])
    entry = next(e for e in plan(tiny("llama"), scheme).entries if e.name == "lm_head.weight")
    assert entry.status == "quantized"
    with pytest.raises(UserError, match="lm_head, an embedding that the output head shares"):
        plan(tiny("llama_tied"), scheme)


def test_layer_that_the_group_does_not_divide_is_kept_with_the_reason():
    # K = 64 for most layers, 96 for down_proj
    scheme = Scheme(weight=QuantSpec(group_size=64))
    entries = {e.name: e for e in plan(tiny("llama"), scheme).entries}
    entry = entries["model.layers.0.mlp.down_proj.weight"]
    assert (entry.status, entry.reason) == ("kept", "K = 96 is not a multiple of group_size = 64")
    assert entries["model.layers.0.mlp.up_proj.weight"].status == "quantized"


def test_group_that_divides_nothing():
    with pytest.raises(UserError, match=r"group_size=40 divides no selected layer.*64, 96"):
        plan(tiny("llama"), Scheme(weight=QuantSpec(group_size=40)))


def test_half_of_the_model_must_be_quantized():
    scheme = Scheme(rules=[Rule("*.mlp.*", "keep")])
    with pytest.raises(UserError, match=r"min_coverage=0\.5: only .*% of the linear"):
        plan(tiny("llama"), scheme)
    allowed = Scheme(rules=scheme.rules, min_coverage=0.2)
    assert 0.2 < plan(tiny("llama"), allowed).share < 0.5


def test_rule_without_a_match_names_a_near_module():
    with pytest.raises(UserError, match=r"'lm_haed' selects no module.*'lm_head'"):
        plan(tiny("llama"), Scheme(rules=[Rule("lm_haed", "keep")]))


def test_nan_is_refused_with_the_parameters_name():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight: 1 of"):
        prepare(model, Scheme())


def test_plan_on_the_meta_device_equals_the_real_one():
    with torch.device("meta"):
        meta = type(tiny("llama"))(CONFIGS["llama"])
    assert plan(meta, Scheme()) == plan(tiny("llama"), Scheme())


def test_quantizer_state_is_in_buffers_that_checkpoints_carry():
    model = tiny("llama")
    prepare(model, STATIC)
    for module in model.modules():
        if isinstance(module, InputFakeQuant):
            module.calibrating = True
    model(input_ids=random_batch()["input_ids"])
    for module in model.modules():
        if isinstance(module, InputFakeQuant):
            module.calibrating = False
            module.observer.commit()
    set_enabled(model, False)
    fresh = tiny("llama", seed=1)
    prepare(fresh, STATIC)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh_state = fresh.state_dict()
    assert all(torch.equal(value, fresh_state[name]) for name, value in model.state_dict().items())
    ids = random_batch(seed=1)["input_ids"]
    # the switch came along: still off
    assert torch.equal(fresh(input_ids=ids).logits, model(input_ids=ids).logits)
    set_enabled(fresh, True)
    set_enabled(model, True)
    assert torch.equal(fresh(input_ids=ids).logits, model(input_ids=ids).logits)


def test_dynamic_inputs_of_two_axes_are_refused():
    model = tiny("opt")
    prepare(model, W8A8)
    with pytest.raises(UserError, match="inputs of 2 axes"):
        model(input_ids=random_batch()["input_ids"])


@pytest.mark.parametrize("kind", ["ema_minmax", "percentile"])
def test_observer_averages_commits_and_freezes(kind):
    spec = QuantSpec(bits=8, granularity="tensor", grid="absmax")
    quantizer = InputFakeQuant(spec, ObserverConfig(kind=kind, momentum=0.25, percentile=75))
    quantizer.train()
    observer = quantizer.observer
    high = {"ema_minmax": 8.0, "percentile": 4.0}[kind]
    quantizer(torch.tensor([1.0, 2.0, 4.0, -8.0]))
    assert int(observer.steps) == 0
    observer.commit()
    assert float(observer.range.abs().max()) == high
    quantizer(torch.tensor([1.0, 2.0, 4.0, -8.0]) * 2)
    before = observer.range.clone()
    quantizer(torch.tensor([1.0, 2.0, 4.0, -8.0]) * 2)  # a recomputed forward changes nothing
    assert torch.equal(observer.range, before)
    observer.commit()
    assert float(observer.range.abs().max()) == high * 1.25
    observer.frozen.fill_(True)
    quantizer(torch.full((4,), 1000.0))
    observer.commit()
    assert float(observer.range.abs().max()) == high * 1.25
    # 1.25 * high / 127.5, rounded to bf16
    expected = torch.tensor(high * 1.25 / 127.5).bfloat16().float()
    assert torch.equal(quantizer.scale(), expected)


def test_linear_subclasses_keep_their_own_forward():
    model = tiny("falcon")
    prepare(model, Scheme())
    layer = model.transformer.h[0].self_attention.dense
    assert isinstance(layer, nn.Linear)
    assert not isinstance(layer, FakeQuantLinear)
    assert "FalconLinear" in type(layer).__name__


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("*.mlp", "keep")], r"'\*\.mlp' decides nothing.*write '\*\.mlp\.\*'"),
        ([Rule("*norm")], r"'\*norm' decides nothing"),
        ([Rule("*.mlp.*", "keep"), Rule("*.up_proj")], r"'\*\.up_proj' decides nothing"),
    ],
)
def test_rule_that_decides_nothing(rules, message):
    with pytest.raises(UserError, match=message):
        plan(tiny("llama"), Scheme(rules=rules, min_coverage=0))


def test_rule_that_contradicts_itself():
    with pytest.raises(ValueError, match="action=keep: the rule 'lm_head' must not give specs"):
        Rule("lm_head", "keep", weight=QuantSpec())


def test_an_infinite_activation_does_not_stay_in_the_average():
    quantizer = InputFakeQuant(
        InputSpec(granularity="tensor", dynamic=False, scale_dtype="bfloat16"), ObserverConfig()
    )
    quantizer.train()
    for value in (torch.inf, 2.0):
        quantizer(torch.tensor([value]))
        quantizer.observer.commit()
    assert int(quantizer.observer.steps) == 1
    assert quantizer.observer.range.tolist() == [2.0, 2.0]
