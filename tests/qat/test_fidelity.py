"""The comparison notices every way in which an artifact can differ from the trained model."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat import convert, fidelity
from qat.fidelity import FidelityError, compare
from qat.prepare import prepare
from qat.scheme import InputSpec, Scheme
from qat.training import calibrate
from qat_kernels import QuantSpec
from tests.tiny import random_batch, tiny, tiny_tokenizer

UP = "model.layers.1.mlp.up_proj"
SCHEMES = {
    "int4": Scheme(),
    "asymmetric": Scheme(weight=QuantSpec(symmetric=False, grid="absmax")),
    "w8a8": Scheme(
        weight=QuantSpec(bits=8, granularity="channel", grid="absmax"),
        input=InputSpec(granularity="tensor", dynamic=False, scale_dtype="bfloat16"),
    ),
    "tensor": Scheme(weight=QuantSpec(symmetric=False, grid="absmax", granularity="tensor")),
}


@pytest.fixture(scope="module", params=SCHEMES)
def every_written(request, tmp_path_factory):
    return write(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write("int4", tmp_path_factory.mktemp("int4"))


def write(name, directory):
    """(name of the scheme, trained model, coverage, artifact)."""
    model = tiny("llama_tied")
    coverage = prepare(model, SCHEMES[name])
    calibrate(model, [random_batch(seed=1)])
    convert.write_checkpoint(model, tiny_tokenizer(), coverage, SCHEMES[name], directory)
    return SimpleNamespace(name=name, model=model, coverage=coverage, artifact=directory)


def changed(written, directory, change):
    """Compare after ``change`` has edited the tensors."""
    artifact = shutil.copytree(written.artifact, directory / "artifact")
    tensors = load_file(artifact / "model.safetensors")
    change(tensors)
    save_file(tensors, artifact / "model.safetensors", {"format": "pt"})
    return compare(written.model, written.coverage, artifact, [random_batch()])


def configured(written, directory, change):
    """Compare after ``change`` has edited the quantization config, or config.json."""
    artifact = shutil.copytree(written.artifact, directory / "artifact")
    path = artifact / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return compare(written.model, written.coverage, artifact, [random_batch()])


def flip_last_bit(tensor):
    """Change one bit of the last element."""
    view = tensor.flatten().view(torch.uint8)
    view[-tensor.element_size()] ^= 1
    return view.view(tensor.dtype).reshape(tensor.shape)


def test_untouched_artifacts_are_equal(every_written, tmp_path):
    result, reloaded = changed(every_written, tmp_path, lambda tensors: None)
    assert (result.codes_equal, result.codes_compared) == (True, 14)
    # the parameters, the tied head under its second name too; W8A8 has no more of them
    assert (result.weights_equal, result.weights_compared) == (True, 21)
    assert (result.logits, result.max_logit_diff) == ("equal", 0.0)
    assert reloaded is not None


def test_one_bit_anywhere(every_written, tmp_path):
    """Each kind of stored tensor, one bit changed: an error that names the tensor."""
    names = load_file(every_written.artifact / "model.safetensors")
    chosen = [n for n in names if n.startswith(UP)] + ["model.norm.weight"]
    for number, name in enumerate(chosen):
        with pytest.raises(FidelityError, match=UP if name.startswith(UP) else name):
            changed(
                every_written,
                tmp_path / str(number),
                lambda tensors, name=name: tensors.update({name: flip_last_bit(tensors[name])}),
            )
    kinds = {name.removeprefix(f"{UP}.") for name in chosen[:-1]}
    packed = {"weight_packed", "weight_scale", "weight_shape"}
    assert (
        kinds
        == {
            "int4": packed,
            "asymmetric": packed | {"weight_zero_point"},
            "tensor": packed | {"weight_zero_point"},
            "w8a8": {"weight", "weight_scale", "input_scale"},
        }[every_written.name]
    )


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("weight_packed", "codes differ"),
        ("weight_scale", "scales differ"),
        ("weight_shape", "weight_shape"),
    ],
)
def test_what_differs_is_said(suffix, message, written, tmp_path):
    def change(tensors):
        tensors[f"{UP}.{suffix}"][0] += 1

    with pytest.raises(FidelityError, match=rf"{UP}.*{message}"):
        changed(written, tmp_path, change)


def test_zero_point_and_input_scale_are_named(tmp_path_factory, tmp_path):
    for scheme, suffix, message in (
        ("asymmetric", "weight_zero_point", "zero points differ"),
        ("w8a8", "input_scale", "the input scale differs"),
    ):
        item = write(scheme, tmp_path_factory.mktemp(scheme))
        key = f"{UP}.{suffix}"
        with pytest.raises(FidelityError, match=f"{UP}: {message}"):
            changed(
                item,
                tmp_path / scheme,
                lambda tensors, key=key: tensors.update({key: tensors[key] * 3}),
            )


@pytest.mark.parametrize("name", [f"{UP}.weight_scale", f"{UP}.weight_shape", "model.norm.weight"])
def test_missing_tensor(name, written, tmp_path):
    with pytest.raises(FidelityError, match=f"{name} is missing"):
        changed(written, tmp_path, lambda tensors: tensors.pop(name))


@pytest.mark.parametrize("name", ["foo", f"{UP}.weight_g_idx", "model.rotary_emb.inv_freq"])
def test_extra_tensor(name, written, tmp_path):
    """Among them one that transformers ignores without a word."""
    with pytest.raises(FidelityError, match=f"{name} does not belong there"):
        changed(written, tmp_path, lambda tensors: tensors.update({name: torch.zeros(8)}))


def test_wrong_shape(written, tmp_path):
    name = f"{UP}.weight_scale"
    with pytest.raises(FidelityError, match=f"{UP}: scales differ"):
        changed(written, tmp_path, lambda t: t.update({name: t[name][:, :1].contiguous()}))


def test_truncated_file(written, tmp_path):
    artifact = shutil.copytree(written.artifact, tmp_path / "artifact")
    path = artifact / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FidelityError, match=r"model\.safetensors: cannot be read"):
        compare(written.model, written.coverage, artifact, [random_batch()])
    with pytest.raises(FidelityError, match="plain transformers cannot load it"):
        fidelity.reload(artifact)


def weights_args(config):
    return config["quantization_config"]["config_groups"]["group_0"]["weights"]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: weights_args(config).update(num_bits=3),
        lambda config: weights_args(config).update(num_bits=8),
        lambda config: weights_args(config).update(group_size=16),
        lambda config: config["quantization_config"].pop("quantization_status"),
        lambda config: config["quantization_config"].update(quant_method="unheard-of"),
        lambda config: config["quantization_config"].update(ignore=["model.layers.0.mlp.up_proj"]),
        lambda config: config.pop("quantization_config"),
        lambda config: config.update(rms_norm_eps=1e-3),
        lambda config: config.update(tie_word_embeddings=False),
    ],
)
# transformers warns of a quantization method that it does not know
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_wrong_config(change, written, tmp_path):
    with pytest.raises(FidelityError):
        configured(written, tmp_path, change)


def test_logits_of_nan_do_not_pass_as_equal(written, tmp_path, monkeypatch):
    """Both models give NaN: the difference is NaN, and NaN is not zero."""
    monkeypatch.setattr(
        fidelity, "forward_logits", lambda model, batch: torch.full((2, 24, 256), torch.nan)
    )
    with pytest.raises(FidelityError, match="logits differ by up to nan"):
        changed(written, tmp_path, lambda tensors: None)


def test_one_nan_in_an_early_batch_is_not_forgotten(written, monkeypatch):
    calls = iter([torch.tensor([1.0, torch.nan]), torch.zeros(2), torch.zeros(2), torch.zeros(2)])
    monkeypatch.setattr(fidelity, "forward_logits", lambda model, batch: next(calls))
    worst, blocks = fidelity._logit_difference(
        written.model, written.model, [random_batch(), random_batch(seed=1)]
    )
    assert worst != worst
    assert blocks == 4


def test_short_memory_is_reported_as_not_compared(written, tmp_path, monkeypatch):
    free = SimpleNamespace(available=1 << 10)
    monkeypatch.setattr(fidelity.psutil, "virtual_memory", lambda: free)
    result, reloaded = changed(written, tmp_path / "whole", lambda tensors: None)
    assert reloaded is None
    assert (result.codes_equal, result.codes_compared) == (True, 14)
    assert (result.weights_equal, result.weights_compared) == (None, 0)
    assert result.logits.startswith("not compared: needs 0.0 GiB")
    assert (result.logit_blocks, result.max_logit_diff) == (0, None)
    # the files are compared all the same, kept tensors included
    for name in ("model.norm.weight", f"{UP}.weight_packed"):
        with pytest.raises(FidelityError, match="differ"):
            changed(
                written,
                tmp_path / name,
                lambda tensors, name=name: tensors.update({name: flip_last_bit(tensors[name])}),
            )


def test_no_text_is_reported_as_not_compared(written):
    result, _ = compare(written.model, written.coverage, written.artifact, [])
    assert (result.logits, result.max_logit_diff) == ("not compared: no text was given", None)
    assert result.weights_equal is True
