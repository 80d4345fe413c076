"""Adapters on a frozen base: what trains, what is merged, what is saved, what is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qat.adapter_config import AdapterConfig
from qat.adapter_state import (
    base_bits,
    base_sha256,
    has_adapters,
    in_fp32,
    stored_bytes,
    trained_modules,
    trained_rows,
    trained_state,
)
from qat.adapters import prepare_adapters
from qat.errors import UserError
from qat.fake_quant import observers, set_enabled
from qat.linear_4bit import Linear4bit
from qat.lora import FrozenLinear, LoraLinear, MergedLinear
from qat.loss import forward_logits, loss_sum
from qat.module import CausalLMModule
from qat.optim import OptimConfig, build_optimizer
from qat.original import OriginalWeights
from qat.prepare import prepare
from qat.scheme import InputSpec, Rule, Scheme
from qat.training import TrainerConfig, calibrate, fit
from qat_kernels import QuantSpec
from qat_kernels.nf4 import Spec4bit
from tests.qat.test_module import Given, step_batches
from tests.tiny import CONFIGS, random_batch, save_tiny, tiny

INT4 = Scheme(weight=QuantSpec(bits=4, group_size=32))
STATIC = InputSpec(granularity="tensor", dynamic=False, scale_dtype="bfloat16")
W8A8 = QuantSpec(bits=8, granularity="channel", grid="absmax")
SCHEMES = {
    "int4": INT4,
    "w8a8": Scheme(weight=W8A8, input=InputSpec()),
    "w8a8_static": Scheme(weight=W8A8, input=STATIC),
    "rules": Scheme(
        weight=QuantSpec(bits=4, group_size=32),
        rules=[
            Rule(match="lm_head", weight=QuantSpec(bits=8, group_size=32)),
            Rule(match="*.0.*.k_proj", action="keep"),
        ],
    ),
}
# the families whose linear layers are nn.Linear, and a mixture whose experts are not
FAMILIES = [f for f in CONFIGS if f not in ("gpt2", "falcon")]
INITS = ["default", "gaussian", "pissa", "pissa_niter_16", "olora", "loftq"]
KINDS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "bf16": {"dtype": "bfloat16"},
    "some": {"targets": ["q_proj", "*.1.mlp.*"]},
}


def built(directory, scheme=INT4, family="llama", seed=0, rows=0, **options):
    """A tiny model with adapters, and its coverage."""
    if not directory.joinpath("config.json").is_file():
        save_tiny(family, directory)
    prepare_options = {k: options.pop(k) for k in ("storage", "new_rows") if k in options}
    adapter = AdapterConfig(**{"block_size": 32, "rank": 4} | options)
    original = OriginalWeights(str(directory), rows=rows)
    return prepare_adapters(original, adapter, scheme, seed, **prepare_options)


def randomize(model, seed=1):
    """Adapters that change the weights by some ten percent, on the grid of their dtype."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def logits(model, **options):
    with torch.no_grad():
        return forward_logits(model, random_batch(**options))


def loss(model, batch):
    return loss_sum(forward_logits(model, batch), batch["labels"])


def snapshot(model, names=None):
    state = model.state_dict(keep_vars=True)
    # parametrized and tied values too, which the state dict holds under one name each
    return {n: v.detach().clone() for n, v in state.items() if names is None or n in names}


# --- what trains ----------------------------------------------------------------------------------

EXTRA = {
    "adapters": {},
    "loftq in bf16": {"init": "loftq", "dtype": "bfloat16"},
    "dora": {"dora": True, "dropout": 0.1},
    "head and norms": {"modules_to_save": ["lm_head", "norm"]},
    "new rows": {"new_rows": (256, 257), "rows": 258},
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_frozen_values_stay_as_they_are(extra, merged, optimizer, tmp_path):
    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    model, _ = built(tmp_path, SCHEMES["w8a8_static"], **EXTRA[extra])
    calibrate(model, [random_batch(seed=1)])
    set_enabled(model, merged)
    model.train()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    before = snapshot(model)
    steps = build_optimizer(model, OptimConfig(name=optimizer, lr=1e-2, weight_decay=0.1))
    held = {id(p) for group in steps.param_groups for p in group["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if n in names}
    for step in range(3):
        loss(model, random_batch(seed=step)).backward()
        assert all(p.grad is None for n, p in model.named_parameters() if n not in names)
        steps.step()
        steps.zero_grad()
        for observer in observers(model):
            observer.commit()
    after = snapshot(model)
    assert after.keys() == before.keys()
    changing = trained_state(model)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    # nothing frozen moves, and all that trains does
    assert moved <= changing
    assert names <= moved
    expected = [".lora_", "lm_head", "norm", "values"]
    assert all(any(part in name for part in expected) for name in names)
    observed = {n for n in changing - names}
    assert all("fake_quant" in name for name in observed)


def test_what_trains_is_what_was_named(tmp_path):
    model, _ = built(tmp_path, targets=["q_proj", "v_proj"], modules_to_save=["model.norm"])
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    linears = [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"]
    assert names == {
        *(f"{linear}.lora_{x}.default.weight" for linear in linears for x in "AB"),
        "model.norm.parametrizations.weight.original",
    }
    assert list(trained_modules(model)) == ["model.norm.weight"]
    assert sum(isinstance(m, FrozenLinear) for m in model.modules()) == 10
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 14
    assert type(model.lm_head) is not Linear4bit
    assert has_adapters(model)
    assert not has_adapters(tiny("llama"))


def test_rows_of_new_tokens_train_and_the_old_ones_do_not(tmp_path):
    for family in ("llama", "llama_tied"):
        model, _ = built(tmp_path / family, family=family, new_rows=(256, 258), rows=259)
        held = trained_rows(model)
        tied = family == "llama_tied"
        assert list(held) == ["model.embed_tokens"] + ["lm_head"] * (not tied)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        before = embedding.weight.detach().clone(), head.weight.detach().clone()
        loss(model, random_batch()).backward()
        for rows in held.values():
            assert rows.values.grad.abs().max() > 0 or not tied
        with torch.no_grad():
            for rows in held.values():
                rows.values.add_(1)
        for module, old in zip((embedding, head), before):
            new = module.weight.detach()
            assert torch.equal(new[:256], old[:256])
            assert torch.equal(new[257], old[257])
            assert torch.all(new[[256, 258]] != old[[256, 258]])
            assert torch.equal(new, new.bfloat16().float())
        assert torch.equal(embedding.weight, head.weight) == tied


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("base", ["nf4", "fp4", "16bit"])
def test_gradients_do_not_depend_on_a_validation_before(base, merged, tmp_path):
    """bitsandbytes' own layer repacks its weights in eval mode, and its gradients break."""
    batch = random_batch(seed=3)
    grads = []
    for validates in (False, True):
        model, _ = built(tmp_path, base=base, dropout=0.1, storage=torch.bfloat16)
        randomize(model)
        set_enabled(model, merged)
        if validates:
            model.eval()
            logits(model, seed=9)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                forward_logits(model, batch)
        model.train()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss(model, batch).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    without, after = grads
    assert len(without) == 28
    assert without.keys() == after.keys()
    assert all(torch.equal(without[n], after[n]) for n in without)


# --- the merged form ------------------------------------------------------------------------------


def checkpoint(family, directory):
    """A tiny model as it stands on disk, fp32; of a mixture on the grid of bf16.

    Experts have no adapters and are held in the dtype of what is kept, so their merged form is
    quantized from that.
    """
    mixture = family in ("mixtral", "qwen3_moe")
    dtype = torch.bfloat16 if mixture else torch.float32
    save_tiny(family, directory, dtype)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_form_begins_as_the_fake_quantized_original(family, tmp_path):
    plain = checkpoint(family, tmp_path)
    model, coverage = built(tmp_path, Scheme(INT4.weight, min_coverage=0.1), family)
    assert prepare(plain, Scheme(INT4.weight, min_coverage=0.1)) == coverage
    set_enabled(model, True)
    assert torch.equal(logits(model), logits(plain.eval()))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_initialisation_begins_as_the_fake_quantized_original(init, name, tmp_path):
    model, _ = built(tmp_path, SCHEMES[name], init=init)
    plain = tiny("llama")
    prepare(plain, SCHEMES[name])
    for prepared in (model, plain):
        set_enabled(prepared, True)
        calibrate(prepared, [random_batch(seed=1)])
        prepared.eval()
    # B A - B0 A0 is the difference of a number with itself, and B = 0 gives zeros
    assert torch.equal(logits(model), logits(plain))


def test_orthogonal_initialisation_begins_there_up_to_rounding(tmp_path):
    """B A = 0 by orthogonality of fp32 vectors, not to the last bit."""
    model, _ = built(tmp_path, init="orthogonal")
    originals = tiny("llama").state_dict()
    eps = torch.finfo(torch.float32).eps
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            a, b = (f.detach() for f in layer.factors)
            assert a.norm() > 0.01
            assert b.norm() > 0.01
            w = originals[f"{name}.weight"]
            # the rows of A and the columns of B come from one matrix that is orthogonal within
            # n eps for its n columns (Householder QR), and r products are summed
            bound = layer.scaling["default"] * a.norm() * b.norm() * 64 * eps
            assert (layer.merged_weight() - w).norm() <= bound + eps * w.norm()


def merged_by_hand(model, plain):
    """The original with W + s B A (DoRA: m / |W'| W') in its linear layers."""
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLinear):
            continue
        a, b = (layer.state_dict()[f"lora_{x}.default.weight"].float() for x in "AB")
        config = layer.lora_alpha["default"] / (
            layer.r["default"] ** 0.5 if layer.use_rslora["default"] else layer.r["default"]
        )
        linear = plain.get_submodule(name)
        with torch.no_grad():
            merged = linear.weight + (b @ a) * config
            if layer.magnitude is not None:
                m = layer.state_dict()["lora_magnitude_vector.default.weight"].float()
                norm = torch.linalg.vector_norm(merged, dim=1)
                merged = (m / norm).unsqueeze(1) * merged
            linear.weight.copy_(merged)
    return plain


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_form_is_the_prepared_merged_model(kind, name, tmp_path):
    model, _ = built(tmp_path, SCHEMES[name], storage=torch.bfloat16, **KINDS[kind])
    randomize(model)
    in_fp32(model)  # as at the end of a run
    plain = merged_by_hand(model, tiny("llama"))
    prepare(plain, SCHEMES[name])
    for prepared in (model, plain):
        set_enabled(prepared, True)
        calibrate(prepared, [random_batch(seed=1)])
        prepared.eval()
    batch = random_batch(seed=2)
    with torch.no_grad():
        ours, theirs = loss(model, batch), loss(plain, batch)
        assert torch.equal(ours, theirs)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(model, batch), loss(plain, batch))
        set_enabled(model, False)
        assert not torch.equal(loss(model, batch), theirs)


@pytest.mark.parametrize("family", ["llama_bias", "qwen2", "gpt_neox", "gemma2", "mixtral"])
def test_merged_form_of_other_families(family, tmp_path):
    scheme = Scheme(INT4.weight, min_coverage=0.1)
    plain = checkpoint(family, tmp_path)
    model, _ = built(tmp_path, scheme, family)
    merged_by_hand(randomize(model), plain)
    prepare(plain, scheme)
    set_enabled(model, True)
    assert torch.equal(logits(model), logits(plain.eval()))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_gradients_through_the_merged_model(kind, tmp_path):
    """dL/dW' of the prepared model, by hand through W' = W + s B A."""
    model, _ = built(tmp_path, **KINDS[kind])
    randomize(model)
    plain = merged_by_hand(model, tiny("llama"))
    prepare(plain, INT4)
    set_enabled(model, True)
    batch = random_batch(seed=2)
    for prepared in (model, plain):
        loss(prepared.train(), batch).backward()
    originals = dict(tiny("llama").named_parameters())
    checked = 0
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            upstream = plain.get_submodule(name).weight.grad
            a, b = (f.detach().clone().requires_grad_() for f in layer.factors)
            merged = originals[f"{name}.weight"].detach() + (b @ a) * layer.scaling["default"]
            values = [a, b]
            if layer.magnitude is not None:
                m = layer.magnitude.detach().clone().requires_grad_()
                merged = (m / merged.detach().norm(dim=1))[:, None] * merged
                values.append(m)
            merged.backward(upstream)
            held = [*layer.factors, layer.magnitude][: len(values)]
            for parameter, value in zip(held, values, strict=True):
                assert torch.equal(parameter.grad, value.grad)
            checked += 1
    assert checked == 14


# --- initialisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_base_and_factors_together_are_the_original(init, rslora, tmp_path):
    model, _ = built(tmp_path, init=init, rslora=rslora, base="16bit", alpha=6.0)
    originals = tiny("llama").state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            a, b = (f.detach() for f in layer.factors)
            w = originals[f"{name}.weight"]
            moved = layer.scaling["default"] * (b @ a)
            assert moved.norm() > 0.3 * w.norm()
            base = layer.base_layer.weight
            # the base is W - s B A in fp32, then rounded to bf16: half a unit in the last place of
            # eight bits; the subtraction and the r = 4 products before it err by some fp32 eps
            bound = base.abs() * 2**-8 + 8 * 2**-24 * (
                w.abs() + layer.scaling["default"] * (b.abs() @ a.abs())
            )
            assert torch.all((base + moved - w).abs() <= bound)


def test_pissa_takes_the_largest_singular_values(tmp_path):
    model, _ = built(tmp_path, init="pissa")
    originals = tiny("llama").state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            a, b = (f.detach() for f in layer.factors)
            w = originals[f"{name}.weight"]
            s = torch.linalg.svdvals(w)
            left = torch.linalg.svdvals(w - layer.scaling["default"] * (b @ a))
            # n eps |W| for an SVD of n = 96 at most (LAPACK users' guide, 4.9), twice
            assert torch.allclose(left[: len(s) - 4], s[4:], rtol=0, atol=2 * 96 * 2**-23 * s[0])


@pytest.mark.parametrize("base", ["nf4", "fp4"])
@pytest.mark.parametrize("rslora", [False, True])
def test_loftq_misses_less_of_the_original(base, rslora, tmp_path):
    originals = tiny("llama").state_dict()
    means = []
    for iterations in (1, 5):
        model, _ = built(
            tmp_path, init="loftq", base=base, loftq_iterations=iterations, rslora=rslora, alpha=6.0
        )
        ratios = []
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLinear):
                w = originals[f"{name}.weight"]
                plain = Linear4bit.from_weight(w, Spec4bit(base, 32), torch.float32).weight
                a, b = (f.detach() for f in layer.factors)
                held = layer.base_layer.weight + layer.scaling["default"] * (b @ a)
                ratios.append(((w - held).norm() / (w - plain).norm()).item())
        assert len(ratios) == 14
        assert max(ratios) < 1
        means.append(sum(ratios) / len(ratios))
    assert means[1] <= means[0]


def test_initial_factors_depend_on_seed_and_name_alone(tmp_path):
    whole, _ = built(tmp_path)
    some, _ = built(tmp_path, targets=["v_proj"])
    other, _ = built(tmp_path, seed=1)
    before = torch.random.get_rng_state()
    again, _ = built(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    name = "model.layers.1.self_attn.v_proj.lora_A.default.weight"
    values = [m.state_dict()[name] for m in (whole, some, other, again)]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[3])
    assert not torch.equal(values[0], values[2])
    neighbour = whole.state_dict()[name.replace("layers.1", "layers.0")]
    assert not torch.equal(values[0], neighbour)


# --- identity -------------------------------------------------------------------------------------

HASH = """
import sys, torch
from qat.adapter_state import base_sha256
from qat.adapter_config import AdapterConfig
from qat.adapters import prepare_adapters
from qat.original import OriginalWeights
from qat.scheme import Scheme
original = OriginalWeights(sys.argv[1])
adapter = AdapterConfig(block_size=32, rank=4, init=sys.argv[2])
model, _ = prepare_adapters(original, adapter, Scheme(), 0, getattr(torch, sys.argv[3]))
print(base_sha256(model))
"""


def test_hash_is_the_same_in_another_process_and_storage(tmp_path):
    values = {}
    for init in ("default", "pissa"):
        model, _ = built(tmp_path, Scheme(), init=init)
        values[init] = base_sha256(model)
        half, _ = built(tmp_path, Scheme(), init=init, storage=torch.bfloat16)
        assert base_sha256(half) == values[init]
        # what trains is no part of it
        assert base_sha256(randomize(model)) == values[init]
        set_enabled(model, True)
        assert base_sha256(model) == values[init]
    result = subprocess.run(
        [sys.executable, "-c", HASH, str(tmp_path), "pissa", "bfloat16"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert result.stdout.strip() == values["pissa"]
    assert values["pissa"] != values["default"]


def test_hash_changes_with_a_bit(tmp_path):
    model, _ = built(tmp_path)
    first = base_sha256(model)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name in trained_state(model):
            continue
        flat = value.data.reshape(-1)[:1].view(torch.uint8)
        flat[0] ^= 1
        assert base_sha256(model) != first, name
        flat[0] ^= 1
    assert base_sha256(model) == first


def test_hash_knows_seed_and_original_where_they_matter(tmp_path):
    def value(**options):
        return base_sha256(built(tmp_path, **options)[0])

    # a random subspace decides what is taken from the base; B = 0 takes nothing
    assert value(init="pissa_niter_16") != value(init="pissa_niter_16", seed=1)
    assert value() == value(seed=1)
    assert value() != value(double_quant=False)
    assert value() != value(base="fp4")
    first = value()
    # a difference that the 4-bit codes do not show
    model = tiny("llama")
    with torch.no_grad():
        w = model.model.layers[0].mlp.up_proj.weight
        w[0, 0] = torch.nextafter(w[0, 0], torch.tensor(1.0))
    model.save_pretrained(tmp_path)
    assert value() != first


# --- checkpoints ----------------------------------------------------------------------------------

FIT = TrainerConfig(
    accelerator="cpu",
    global_batch_size=4,
    micro_batch_size=4,
    progress_bar=False,
    checkpoint_every_steps=1,
)


def module_of(directory, **options):
    model, _ = built(directory, **options)
    config = OptimConfig(lr=1e-2, schedule="constant")
    return CausalLMModule(model, config, 2, seed=7, base_sha256=base_sha256(model))


def test_checkpoint_holds_what_trains_and_resumes_on_the_same_base_only(tmp_path):
    options = {"scheme": SCHEMES["w8a8_static"], "modules_to_save": ["lm_head"]}
    module = module_of(tmp_path / "model", **options)
    calibrate(module.model, [random_batch(seed=1)])
    batches = step_batches(4, 1) * 3
    fit(module, Given(batches), FIT, tmp_path / "run", [])
    path = tmp_path / "run" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    state = saved["state_dict"]
    assert state.keys() == {f"model.{name}" for name in trained_state(module.model)}
    assert saved["base_sha256"] == module.base_sha256
    moments = saved["optimizer_states"][0]["state"]
    assert len(moments) == 29  # 14 pairs and the head
    assert not any("codes" in name or "absmax" in name for name in state)

    again = module_of(tmp_path / "model", **options)
    again.max_steps = 3
    fit(again, Given(batches), FIT, tmp_path / "run", [])
    straight = module_of(tmp_path / "model", **options)
    straight.max_steps = 3
    calibrate(straight.model, [random_batch(seed=1)])
    fit(straight, Given(batches), FIT, tmp_path / "straight", [])
    for name, value in straight.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name

    for change in ({"base": "fp4"}, {"double_quant": False}, {"init": "pissa"}):
        other = module_of(tmp_path / "model", **options | change)
        with pytest.raises(UserError, match="resume: the base model is not the one"):
            fit(other, Given(batches), FIT, tmp_path / "run", [])


def test_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    module = module_of(tmp_path)
    names = sorted(trained_state(module.model))
    whole = {f"model.{n}": module.model.state_dict()[n] for n in names}
    module.on_load_checkpoint({"base_sha256": module.base_sha256, "state_dict": whole})
    del whole[f"model.{names[0]}"]
    with pytest.raises(UserError, match="resume: the checkpoint lacks model"):
        module.on_load_checkpoint({"base_sha256": module.base_sha256, "state_dict": whole})


def test_checkpoint_of_an_8b_shape_is_adapters_alone(tmp_path):
    """By shapes on the meta device; a directory with config.json and no weights is enough."""
    shape = CONFIGS["llama"].to_dict() | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    adapter = AdapterConfig(rank=16, dtype="bfloat16")
    original = OriginalWeights(str(tmp_path))
    model, coverage = prepare_adapters(original, adapter, INT4, 0, load=False)
    assert all(p.is_meta for p in model.parameters())
    assert coverage.share == 1.0
    module = CausalLMModule(model, OptimConfig(), 1, seed=0, base_sha256="0" * 64)
    checkpoint = {"state_dict": module.state_dict()}
    assert len(checkpoint["state_dict"]) > 1000
    module.on_save_checkpoint(checkpoint)
    state = checkpoint["state_dict"]
    h, i, kv = 4096, 14336, 1024
    linears = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (h, kv), "self_attn.v_proj": (h, kv)}
    linears |= {"self_attn.o_proj": (h, h), "mlp.gate_proj": (h, i), "mlp.up_proj": (h, i)}
    linears["mlp.down_proj"] = (i, h)
    switches = {name for name in state if name.endswith("weight_fake_quant.enabled")}
    weights = state.keys() - switches
    assert weights == {
        f"model.model.layers.{layer}.{name}.lora_{x}.default.weight"
        for layer in range(32)
        for name in linears
        for x in "AB"
    }
    values = 32 * 16 * sum(k + n for k, n in linears.values())
    assert values == 41_943_040
    assert sum(state[name].numel() for name in weights) == values
    # the frozen model would be another 5.7 GB
    assert sum(v.nbytes for v in state.values()) == 2 * values + len(switches)
    # half a byte a weight, 1 for each block of 64, 4 for each 256 blocks, an offset of 4 a matrix
    count = 32 * sum(k * n for k, n in linears.values())
    packed = count // 2 + count // 64 + count // 64 // 256 * 4 + 32 * len(linears) * 4
    assert base_bits(model, torch.bfloat16) == 8 * packed / count
    # embedding, head and norms in 16 bit, and the adapters
    others = 2 * 128256 * h + (2 * 32 + 1) * h
    assert stored_bytes(model, torch.bfloat16) == packed + 2 * others + 2 * values


# --- storage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["nf4", "16bit"])
def test_storage_changes_no_value(base, tmp_path):
    single, _ = built(tmp_path, base=base, family="llama_bias")
    half, _ = built(tmp_path, base=base, family="llama_bias", storage=torch.bfloat16)
    assert half.get_input_embeddings().weight.dtype == torch.bfloat16
    for parameter in half.parameters():
        if not parameter.requires_grad:
            assert parameter.dtype == torch.bfloat16
            parameter.data = parameter.data.float()
    assert torch.equal(logits(half), logits(single))


def test_plain_form_of_a_16_bit_base_is_the_rounded_original(tmp_path):
    model, _ = built(tmp_path, base="16bit")
    rounded = tiny("llama")  # its buffers stay fp32
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert torch.equal(logits(model), logits(rounded))


# --- names ----------------------------------------------------------------------------------------


def adapted(model):
    return {n.removeprefix("model.") for n, m in model.named_modules() if isinstance(m, LoraLinear)}


def test_targets_are_names_or_wildcards(tmp_path):
    attention = {f"layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qkvo"}
    mlp = {f"layers.{i}.mlp.{x}_proj" for i in (0, 1) for x in ("gate", "up", "down")}
    first = {name for name in attention | mlp if name.startswith("layers.0.")}
    cases = {
        ("all-linear",): attention | mlp,
        ("*attn*",): attention,
        ("q_proj", "model.layers.0.*"): first | {"layers.1.self_attn.q_proj"},
        ("mlp.up_proj",): {"layers.0.mlp.up_proj", "layers.1.mlp.up_proj"},
        ("layers.?.mlp.[gu]*_proj",): mlp - {f"layers.{i}.mlp.down_proj" for i in (0, 1)},
    }
    for targets, expected in cases.items():
        model, _ = built(tmp_path, targets=list(targets))
        assert adapted(model) == expected, targets


def test_head_gets_no_adapter_unless_it_is_quantized(tmp_path):
    for scheme in (INT4, SCHEMES["rules"]):
        model, _ = built(tmp_path, scheme)
        assert "lm_head" not in adapted(model)
        assert isinstance(model.lm_head, MergedLinear) == (scheme is not INT4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_porj"]}, r"targets: 'q_porj' selects no .*Did you mean 'q_proj'\?"),
        ({"targets": ["all-linear", "w1"]}, r"targets: 'w1'.*There are: down_proj, gate_proj"),
        ({"targets": ["norm"]}, r"targets: 'norm' selects no plain nn\.Linear"),
        ({"modules_to_save": ["lm_haed"]}, r"modules_to_save: 'lm_haed'.*did you mean 'lm_head'"),
        ({"modules_to_save": ["layers"]}, r"'layers' selects no module with parameters"),
        ({"modules_to_save": ["up_proj"]}, r"layers\.0\.mlp\.up_proj' is quantized.*action: keep"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        built(tmp_path, **options)


def test_models_without_plain_linear_layers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"Conv1D|nn\.Linear"):
        built(tmp_path, Scheme(INT4.weight, min_coverage=0.0), family="gpt2")


def test_a_kept_layer_may_be_trained_as_a_whole(tmp_path):
    scheme = Scheme(INT4.weight, rules=[Rule(match="*.1.mlp.up_proj", action="keep")])
    model, _ = built(tmp_path, scheme, modules_to_save=["*.1.mlp.up_proj"])
    layer = model.model.layers[1].mlp.up_proj
    assert isinstance(layer, nn.Linear)
    assert list(trained_modules(model)) == ["model.layers.1.mlp.up_proj.weight"]
    value = layer.parametrizations.weight.original
    assert value.dtype == torch.float32
    loss(model.train(), random_batch()).backward()
    assert value.grad.abs().max() > 0
    assert torch.equal(layer.weight, value.bfloat16().float())


def test_tied_embedding_and_head_train_as_one(tmp_path):
    model, _ = built(tmp_path, family="llama_tied", modules_to_save=["embed_tokens"])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    masters = [m.parametrizations.weight.original for m in (embedding, head)]
    assert masters[0] is masters[1]
    loss(model.train(), random_batch()).backward()
    assert masters[0].grad.abs().max() > 0
    with torch.no_grad():
        masters[0].add_(1e-3)  # below half a bf16 step of the larger values
    assert torch.equal(embedding.weight, masters[0].bfloat16().float())
    assert torch.equal(embedding.weight, head.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0: at least 1"),
        ({"alpha": 0.0}, "alpha=0.0: a finite number above 0"),
        ({"alpha": float("nan")}, "alpha=nan: a finite"),
        ({"alpha": float("inf")}, "alpha=inf: a finite"),
        ({"dropout": 1.0}, "dropout=1.0: at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"loftq_iterations": 0}, "loftq_iterations=0: at least 1"),
        ({"init": "loftq", "base": "16bit"}, "init=loftq: needs a 4-bit base"),
        ({"init": "pissa", "dora": True}, "dora=true with init=pissa"),
        ({"targets": []}, r"targets=\[\]"),
        ({"block_size": 48}, "block_size=48"),
        ({"new_tokens": ["<a>", "<a>"]}, "new_tokens=.*each a text of its own"),
        ({"new_tokens": [" "]}, "new_tokens=.*none empty"),
    ],
)
def test_values_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**options)
