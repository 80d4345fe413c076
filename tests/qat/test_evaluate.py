"""Figures of the evaluation against direct computation."""

import math

import pytest
import torch

from qat import evaluate
from qat.evaluate import EvaluateConfig, Reference, measure
from qat.loss import forward_logits
from tests.tiny import random_batch, tiny


@pytest.fixture(scope="module")
def batches():
    """Two batches of different size; every third position has no target."""
    made = [random_batch(3, 16), random_batch(1, 16, seed=1)]
    for batch in made:
        batch["labels"][:, ::3] = -100
    return made


@pytest.fixture(scope="module")
def models():
    return tiny("llama"), tiny("llama", seed=1)


def test_against_direct_computation(models, batches):
    original, other = models
    quality = measure(other, batches, Reference(original, batches), "test")
    logs, references, labels = [], [], []
    with torch.no_grad():
        for batch in batches:
            chosen = batch["labels"] != -100
            logs.append(forward_logits(other, batch)[chosen].double().log_softmax(-1))
            references.append(forward_logits(original, batch)[chosen].double().log_softmax(-1))
            labels.append(batch["labels"][chosen])
    log, reference, label = torch.cat(logs), torch.cat(references), torch.cat(labels)
    loss = float(-log.gather(1, label[:, None]).mean())
    kl = float((reference.exp() * (reference - log)).sum(-1).mean())
    agree = float((log.argmax(-1) == reference.argmax(-1)).double().mean())
    assert quality.tokens == len(label) == 40
    # a logarithm of fp32 logits below 16 is off by some ulps of 16, 2^-20, and the mean by no more
    assert abs(quality.loss - loss) < 4 * 2**-20
    # 256 terms with probabilities that sum to one
    assert quality.kl_to_original == pytest.approx(kl, abs=8 * 2**-20)
    assert quality.top1_agreement == agree
    assert quality.perplexity == math.exp(quality.loss)


def test_a_model_agrees_with_itself_exactly(models, batches):
    quality = measure(models[0], batches, Reference(models[0], batches), "test")
    assert quality.kl_to_original == 0.0
    assert quality.top1_agreement == 1.0


def test_without_a_reference(models, batches):
    quality = measure(models[0], batches, None, "test")
    assert (quality.kl_to_original, quality.top1_agreement) == (None, None)


def test_cached_and_computed_references_are_identical(models, batches, monkeypatch):
    cached = Reference(models[0], batches)
    assert cached.cache == []
    first = measure(models[1], batches, cached, "test")
    assert len(cached.cache) == 2
    # the second model is measured on the cached logits alone
    monkeypatch.setattr(cached, "model", None)
    assert measure(models[1], batches, cached, "test") == first
    monkeypatch.setattr(evaluate, "REFERENCE_BYTES", 1)
    computed = Reference(models[0], batches)
    assert computed.cache is None
    assert measure(models[1], batches, computed, "test") == first


def test_the_model_is_measured_in_eval_mode(batches):
    model = tiny("llama")
    expected = measure(model, batches, None, "test")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    assert measure(model, batches, None, "test") == expected


def test_perplexity_does_not_overflow(models, batches, monkeypatch):
    logits = torch.zeros(3, 16, 256)
    logits[..., 0] = 1e4
    monkeypatch.setattr(evaluate, "forward_logits", lambda model, batch: logits)
    quality = measure(models[0], batches[:1], None, "test")
    assert quality.loss == 1e4
    assert quality.perplexity == math.exp(700)


def test_text_without_targets(models, batches):
    empty = {key: value.clone() for key, value in batches[0].items()}
    empty["labels"].fill_(-100)
    with pytest.raises(ValueError, match="no target token"):
        measure(models[0], [empty], None, "test")


@pytest.mark.parametrize("name", ["max_tokens", "batch_size"])
def test_counts_below_one(name):
    with pytest.raises(ValueError, match=f"{name}=0: at least 1"):
        EvaluateConfig(**{name: 0})
