"""The Lightning module: losses, random streams, what the log says, and when quantizers change."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningDataModule

from qat.fake_quant import InputFakeQuant, Quantizer, observers
from qat.loggers import MetricsCsv, read_metrics
from qat.loss import forward_logits, loss_sum
from qat.module import CausalLMModule, Timing, quantization_error
from qat.optim import OptimConfig, lr_factor
from qat.prepare import prepare
from qat.scheme import InputSpec, ObserverConfig, Scheme
from qat.trained import quantized_parameters
from qat.training import TrainerConfig, calibrate, fit
from qat_kernels import QuantSpec, compute_scale, dequantize, quantize
from tests.tiny import random_batch, tiny

BLOCKS, STEPS = 4, 6
SUM_BOUND = 2 * 6 * 3000**0.5 * 2**-24
"""Relative bound for two fp32 results that differ in the order of additions: sqrt(n) * u * 6 for
each (Higham and Mary 2019), with n = 3000 terms on the way through forward and backward."""


def step_batches(micro: int, steps: int = STEPS) -> list[dict[str, torch.Tensor]]:
    """The same steps of four blocks with unequal numbers of targets, in micro-batches."""
    made = []
    for step in range(steps):
        whole = random_batch(BLOCKS, 12, seed=step)
        for block in range(BLOCKS):
            # block i keeps 11 - 3i targets: means of means would differ from the mean
            whole["labels"][block, 1 : 1 + 3 * block] = -100
        count = (whole["labels"] != -100).sum()
        for start in range(0, BLOCKS, micro):
            part = {k: v[start : start + micro] for k, v in whole.items() if v.ndim}
            made.append(part | {"loss_tokens": count})
    return made


VALIDATION = [random_batch(2, 12, seed=100), random_batch(1, 12, seed=101)]


class Loader:
    """An iterable; Lightning would take a list for a list of loaders."""

    def __init__(self, batches) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Given(LightningDataModule):
    """Given batches for training, VALIDATION for validation."""

    def __init__(self, batches) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return Loader(self.batches)

    def val_dataloader(self):
        return Loader(VALIDATION)


def train(module, directory, micro=BLOCKS, batches=None, **options):
    """Fit on the steps; metric → {step: value}."""
    config = TrainerConfig(
        accelerator="cpu",
        global_batch_size=BLOCKS,
        micro_batch_size=micro,
        progress_bar=False,
        **{"validate_every_steps": STEPS, "checkpoint_every_steps": 1000} | options,
    )
    directory.mkdir(exist_ok=True)
    csv = directory / "metrics.csv"
    data = Given(batches or step_batches(micro))
    fit(module, data, config, directory / "checkpoints", [MetricsCsv(csv, "train")])
    metrics: dict[str, dict[int, float]] = {}
    for _, step, metric, value in read_metrics(csv):
        metrics.setdefault(metric, {})[step] = value
    return metrics


def module_of(family="llama", scheme=None, max_steps=STEPS, timing=None, **optim):
    model = tiny(family)
    if scheme is not None:
        prepare(model, scheme)
        calibrate(model, [random_batch(seed=1)])
    return CausalLMModule(model, OptimConfig(**optim), max_steps, seed=7, timing=timing)


def direct_loss(model, batch):
    """Mean over all target tokens, and the gradient norm."""
    model.zero_grad()
    logits = forward_logits(model, batch)
    chosen = batch["labels"] != -100
    loss = torch.nn.functional.cross_entropy(logits[chosen], batch["labels"][chosen])
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return float(loss.detach()), float(norm)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_loss_of_a_step_is_the_mean_over_all_its_targets(micro, tmp_path):
    loss, norm = direct_loss(tiny("llama"), step_batches(BLOCKS, 1)[0])
    metrics = train(module_of(max_steps=1), tmp_path, micro, step_batches(micro, 1))
    assert metrics["train_loss"][1] == pytest.approx(loss, rel=SUM_BOUND)
    assert metrics["grad_norm"][1] == pytest.approx(norm, rel=SUM_BOUND)


def test_loss_sum_ignores_positions_without_a_target():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, -100, 2], [-100, -100, -100]])
    logs = logits.log_softmax(-1)
    # two terms; exact, since torch computes each by the same operations
    assert torch.equal(loss_sum(logits, labels), -(logs[0, 0, 1] + logs[0, 2, 2]))


def test_logged_learning_rates_are_those_that_the_steps_used(tmp_path):
    optim = OptimConfig(lr=2e-3, warmup_steps=2, min_lr_ratio=0.1)
    module = CausalLMModule(tiny("llama"), optim, STEPS, seed=0)
    used = []
    original = module.configure_gradient_clipping

    def spy(optimizer, *args, **kwargs):
        used.append(optimizer.param_groups[0]["lr"])
        original(optimizer, *args, **kwargs)

    module.configure_gradient_clipping = spy
    metrics = train(module, tmp_path)
    expected = {s + 1: 2e-3 * lr_factor(s, optim, STEPS) for s in range(STEPS)}
    assert metrics["lr"] == expected
    assert used == list(expected.values())


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (4, [4, 6])])
def test_rows_of_the_log(every, steps, tmp_path):
    module = module_of()
    module.log_every_steps = every
    metrics = train(module, tmp_path)
    assert list(metrics["train_loss"]) == list(metrics["grad_norm"]) == steps
    assert list(metrics["val_loss"]) == [STEPS]


def test_gradients_are_clipped_and_the_norm_before_is_logged(tmp_path):
    module = module_of(max_steps=1, clip_norm=1e-3)
    norms = []
    original = module.configure_gradient_clipping

    def spy(optimizer, *args, **kwargs):
        original(optimizer, *args, **kwargs)
        grads = [p.grad.norm() for p in module.model.parameters() if p.grad is not None]
        norms.append(float(torch.stack(grads).norm()))

    module.configure_gradient_clipping = spy
    metrics = train(module, tmp_path, batches=step_batches(BLOCKS, 1))
    assert metrics["grad_norm"][1] > 1e-2
    # clip_grad_norm_ divides by norm + 1e-6
    assert norms == [pytest.approx(1e-3, rel=1e-4)]


def test_validation_loss_and_error_are_those_of_the_trained_model(tmp_path):
    module = module_of(scheme=Scheme())
    metrics = train(module, tmp_path)
    total = count = 0.0
    with torch.no_grad():
        for batch in VALIDATION:
            total += float(loss_sum(forward_logits(module.model, batch), batch["labels"]))
            count += batch["labels"].numel()
    # the logged figure adds the sums in fp32
    assert metrics["val_loss"][STEPS] == pytest.approx(total / count, rel=4 * 2**-24)
    for name, error in quantization_error(module.model).items():
        assert metrics[f"quant_error/{name}"] == {STEPS: error}


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(), QuantSpec(bits=2, symmetric=False, grid="mse"), QuantSpec(granularity="tensor")],
)
def test_quantization_error_by_definition(spec):
    model = tiny("mixtral" if spec.symmetric else "llama")
    prepare(model, Scheme(weight=spec))
    errors = quantization_error(model)
    items = list(quantized_parameters(model))
    assert list(errors) == [item.name for item in items]
    for item in items:
        w = item.weight.detach()
        scale, zero_point = compute_scale(w, spec)
        w_hat = dequantize(quantize(w, scale, zero_point, spec), scale, zero_point)
        expected = (w_hat - w).norm() / w.norm()
        assert errors[item.name] == float(expected)
        assert 0 < errors[item.name] < 1


def test_quantization_error_of_zeros_is_zero():
    model = tiny("llama")
    prepare(model, Scheme())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    assert quantization_error(model)["model.layers.0.mlp.up_proj.weight"] == 0.0


def test_random_streams_are_a_function_of_the_step_alone():
    """One stream for each (step, micro-batch, rank), whatever was drawn before."""

    def draw(step, micro, rank, before):
        torch.manual_seed(before)
        module = CausalLMModule.__new__(CausalLMModule)
        CausalLMModule.__init__(module, tiny("llama"), OptimConfig(), 10, seed=7)
        module._trainer = SimpleNamespace(
            accumulate_grad_batches=2, world_size=2, global_step=step, global_rank=rank
        )
        module.on_train_batch_start({}, step * 2 + micro)
        return float(torch.rand(()))

    places = list(itertools.product(range(3), range(2), range(2)))
    first = [draw(*place, before=0) for place in places]
    assert first == [draw(*place, before=99) for place in places]
    assert len(set(first)) == len(places)


def test_quantizers_are_switched_on_at_their_step(tmp_path):
    module = module_of(scheme=Scheme(), timing=Timing(enable_after_steps=3))
    seen = []
    original = module.training_step

    def spy(batch, batch_idx):
        active = {m._active for m in module.model.modules() if isinstance(m, Quantizer)}
        seen.append((module.global_step, active))
        return original(batch, batch_idx)

    module.training_step = spy
    train(module, tmp_path)
    assert seen == [(step, {step >= 3}) for step in range(STEPS)]


def test_observers_follow_until_they_freeze(tmp_path):
    static = Scheme(
        weight=QuantSpec(bits=8, granularity="channel", grid="absmax"),
        input=InputSpec(granularity="tensor", dynamic=False, scale_dtype="bfloat16"),
        observer=ObserverConfig(momentum=0.5),
    )
    module = module_of(scheme=static, timing=Timing(freeze_after_steps=2), lr=1e-2)
    ranges = []
    original = module.end_step

    def spy():
        original()
        ranges.append(torch.stack([o.range.clone() for o in observers(module.model)]))

    module.end_step = spy
    train(module, tmp_path)
    assert not torch.equal(ranges[0], ranges[1])
    assert all(torch.equal(ranges[1], later) for later in ranges[2:])
    # one calibration batch and two steps
    assert {int(o.steps) for o in observers(module.model)} == {3}
    assert all(m.observer for m in module.model.modules() if isinstance(m, InputFakeQuant))


def test_divergence_is_an_error_with_advice(tmp_path):
    module = module_of()
    with torch.no_grad():
        module.model.lm_head.weight.fill_(torch.inf)
    with pytest.raises(RuntimeError, match=r"gradient is not finite at step 1: .*Lower optim\.lr"):
        train(module, tmp_path)


def test_a_documents_logits_do_not_depend_on_its_neighbours():
    """Two documents in a block give the logits that each has alone, up to the order of sums."""
    model = tiny("mistral")
    ids = random_batch(1, 20)["input_ids"]
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    segments = torch.tensor([[0] * 8 + [1] * 12], dtype=torch.int32)
    with torch.no_grad():
        packed = forward_logits(
            model, {"input_ids": ids, "position_ids": positions, "segment_ids": segments}
        )
        for part in (slice(0, 8), slice(8, 20)):
            alone = forward_logits(
                model,
                {
                    "input_ids": ids[:, part],
                    "position_ids": positions[:, part],
                    "segment_ids": segments[:, part],
                },
            )
            bound = SUM_BOUND * float(alone.abs().max())
            torch.testing.assert_close(packed[:, part], alone, rtol=0, atol=bound)
