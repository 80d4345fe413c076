import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat import bitsandbytes_format, cli
from qat.artifact import inspect, staged_directory, write_manifest
from qat.artifact_scales import _kinds
from qat.artifact_summary import bits_per_weight
from qat.errors import UserError
from qat.linear_4bit import Linear4bit
from qat_kernels.nf4 import Spec4bit


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# --- staged_directory ----------------------------------------------------------------------------


def test_directory_appears_whole(tmp_path):
    final = tmp_path / "new" / "artifact"
    with staged_directory(final) as partial:
        assert partial == final.parent / f".artifact.partial-{os.getpid()}"
        (partial / "sub").mkdir()
        (partial / "sub" / "a").write_text("1")
        assert not final.exists()
    assert (final / "sub" / "a").read_text() == "1"
    assert names(final.parent) == ["artifact"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("replace", [False, True])
def test_failure_leaves_nothing_and_loses_nothing(tmp_path, error, replace):
    final = tmp_path / "artifact"
    if replace:
        final.mkdir()
        (final / "old").write_text("old")

    def write_and_fail():
        with staged_directory(final, replace=replace) as partial:
            (partial / "a").write_text("1")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert names(tmp_path) == (["artifact"] if replace else [])
    if replace:
        assert (final / "old").read_text() == "old"


def test_existing_directory_is_refused_before_any_work(tmp_path):
    final = tmp_path / "artifact"
    final.mkdir()
    (final / "old").write_text("old")
    refused = pytest.raises(UserError, match="artifact exists already; choose another")
    with refused, staged_directory(final):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == ["artifact"]


def test_directory_that_appeared_meanwhile_is_kept(tmp_path):
    final = tmp_path / "artifact"

    def write_while_another_does():
        with staged_directory(final) as partial:
            (partial / "a").write_text("1")
            final.mkdir()
            (final / "other").write_text("2")

    with pytest.raises(UserError, match="exists already"):
        write_while_another_does()
    assert names(tmp_path) == ["artifact"]
    assert names(final) == ["other"]


def test_empty_directory_is_filled(tmp_path):
    (tmp_path / "artifact").mkdir()
    with staged_directory(tmp_path / "artifact") as partial:
        (partial / "a").write_text("1")
    assert names(tmp_path / "artifact") == ["a"]


def test_replace_swaps(tmp_path):
    final = tmp_path / "artifact"
    for text in ("one", "two"):
        with staged_directory(final, replace=True) as partial:
            (partial / text).write_text(text)
    assert names(final) == ["two"]
    assert names(tmp_path) == ["artifact"]


def test_failed_swap_puts_the_old_one_back(tmp_path, monkeypatch):
    final = tmp_path / "artifact"
    final.mkdir()
    (final / "old").write_text("old")
    rename = type(final).rename

    def failing(self, target):
        if ".partial-" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(type(final), "rename", failing)
    with pytest.raises(OSError, match="No space"), staged_directory(final, replace=True) as partial:
        (partial / "new").write_text("new")
    assert names(tmp_path) == ["artifact"]
    assert names(final) == ["old"]


def dead_pid():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    keep = [
        f".artifact.partial-{os.getppid()}",
        f".other.partial-{dead_pid()}",
        ".artifact.partial-x",
    ]
    gone = [f".artifact.partial-{dead_pid()}", f".artifact.partial-{os.getpid()}"]
    for name in keep + gone:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("1")
    with staged_directory(tmp_path / "artifact"):
        pass
    assert names(tmp_path) == sorted([*keep, "artifact"])


@pytest.mark.parametrize("final_exists", [False, True])
def test_crash_between_the_two_renames_is_repaired(tmp_path, final_exists):
    aside = tmp_path / f".artifact.old-{dead_pid()}"
    aside.mkdir()
    (aside / "old").write_text("old")
    if final_exists:
        (tmp_path / "artifact").mkdir()
        (tmp_path / "artifact" / "new").write_text("new")
    with pytest.raises(UserError, match="exists already"), staged_directory(tmp_path / "artifact"):
        pass
    assert names(tmp_path) == ["artifact"]
    assert names(tmp_path / "artifact") == (["new"] if final_exists else ["old"])


# --- inspect -------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path):
    """An artifact of two layers: int4, group 32, weights 4 x 64, and a kept embedding."""
    directory = tmp_path / "artifact"
    directory.mkdir()
    tensors = {"model.embed.weight": torch.ones(8, 64, dtype=torch.bfloat16)}
    for layer in range(2):
        prefix = f"model.layers.{layer}.proj"
        tensors[f"{prefix}.weight_packed"] = torch.full((4, 8), layer, dtype=torch.int32)
        tensors[f"{prefix}.weight_scale"] = torch.ones(4, 2, dtype=torch.bfloat16)
        tensors[f"{prefix}.weight_shape"] = torch.tensor([4, 64])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    group = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
            "group_size": 32, "dynamic": False,
        },
        "input_activations": None,
    }  # fmt: skip
    config = {
        "architectures": ["ToyForCausalLM"],
        "hidden_size": 64,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "sub").mkdir()
    (directory / "sub" / "note.txt").write_text("hello")
    write_manifest(directory, {"seed": 3, "versions": {"torch": "x"}})
    return directory


def test_inspect(made):
    lines = inspect(made).splitlines()
    assert lines[:5] == [
        str(made),
        "",
        "architecture  ToyForCausalLM  (hidden_size=64)",
        "scheme        compressed-tensors, format pack-quantized",
        "              Linear: weights int4 symmetric, group of 32",
    ]
    cells = [line.split() for line in lines]
    assert ["model.layers.*.proj", "2", "4", "x", "64", "int4", "32", "320"] in cells
    assert ["model.embed", "1", "8", "x", "64", "BF16", "-", "1,024"] in cells
    # 4 bits of code and a 16-bit scale for each 32 weights
    assert "bits per weight  4.5000 (codes, scales and zero points)" in lines
    assert "quantized        512 (50.0%)" in lines
    total = sum(p.stat().st_size for p in made.rglob("*") if p.is_file())
    assert cells[-1] == ["total", f"{total:,}", "bytes"]


def test_bits_per_weight(made):
    assert bits_per_weight(made) == 4.5
    save_file({"a.weight": torch.ones(2, 2)}, made / "model.safetensors")
    assert bits_per_weight(made) is None


def test_parts_of_a_layer_in_two_shards(made):
    tensors = load_file(made / "model.safetensors")
    (made / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:2]}, made / "model-1.safetensors")
    save_file({n: tensors[n] for n in names[2:]}, made / "model-2.safetensors")
    assert names[1].startswith("model.layers.0.")
    assert names[2].startswith("model.layers.0.")
    assert bits_per_weight(made) == 4.5


def test_inspect_every_layer(made):
    cells = [line.split() for line in inspect(made, every_layer=True).splitlines()]
    for layer in range(2):
        row = [f"model.layers.{layer}.proj", "1", "4", "x", "64", "int4", "32", "160"]
        assert row in cells


def test_inspect_unquantized_int8_and_broken(made):
    (made / "config.json").write_text("{}")
    assert "scheme        not quantized" in inspect(made)
    save_file(
        {
            "a.weight": torch.zeros(4, 6, dtype=torch.int8),
            "a.weight_scale": torch.ones(4, 1),
            "a.bias": torch.ones(4),
            "b.weight": torch.zeros(4, 6, dtype=torch.int8),
            "b.weight_scale": torch.ones(1),
        },
        made / "model.safetensors",
    )
    cells = [line.split() for line in inspect(made).splitlines()]
    assert ["a", "1", "4", "x", "6", "int8", "channel", "56"] in cells
    assert ["b", "1", "4", "x", "6", "int8", "tensor", "28"] in cells
    os.truncate(made / "model.safetensors", 12)
    with pytest.raises(UserError, match=r"model\.safetensors: truncated"):
        inspect(made)


def test_specs_by_name_win_over_specs_by_class(made):
    config = json.loads((made / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {"targets": ["model.layers.1.proj"], "weights": {"num_bits": 3}}
    groups["group_2"] = {"targets": [r"re:.*\.0\.proj"], "weights": {"num_bits": 2}}
    (made / "config.json").write_text(json.dumps(config))
    cells = [line.split() for line in inspect(made).splitlines()]
    assert ["model.layers.*.proj", "1", "4", "x", "64", "int2", "32", "160"] in cells
    assert ["model.layers.*.proj", "1", "4", "x", "64", "int3", "32", "160"] in cells


def test_inspect_command(made, capsys):
    assert cli.main(["inspect", str(made)]) == 0
    assert capsys.readouterr().out == inspect(made) + "\n"


def test_inspect_reads_bitsandbytes_serialization(tmp_path):
    torch.manual_seed(0)
    layer = Linear4bit.from_weight(torch.randn(128, 256), Spec4bit(), torch.float32)
    tensors = bitsandbytes_format.tensors("model.layers.0.up_proj", layer)
    save_file({**tensors, "model.norm.weight": torch.ones(256)}, tmp_path / "model.safetensors")
    section = bitsandbytes_format.quantization_config(Spec4bit(), torch.bfloat16, ["lm_head"])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    lines = inspect(tmp_path).splitlines()
    assert any(line.startswith("scheme") and "bitsandbytes, format nf4" in line for line in lines)
    rows = [line.split() for line in lines if "model.layers" in line]
    assert len(rows) == 1, "its helper tensors have no rows of their own"
    assert rows[0][:7] == ["model.layers.*.up_proj", "1", "128", "x", "256", "nf4", "64"]
    # codes, one byte for each of 512 blocks, and fp32 for each 256 of them
    assert bits_per_weight(tmp_path) == 4 + (512 + 2 * 4) * 8 / (128 * 256)


# --- scales and codes ----------------------------------------------------------------------------


def scale_rows(directory):
    """Kind → cells of the table of scales."""
    lines = inspect(directory).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("scales "))
    rows = [line.split() for line in lines[begin + 1 :]]
    return {row[0]: row[1:] for row in rows[: rows.index([])]}


def test_table_of_scales(made):
    tensors = load_file(made / "model.safetensors")
    scale = torch.tensor([[1.0, -2.0], [0.5, -0.25], [4.0, 1.0], [1.0, 1.0]])
    tensors["model.layers.0.proj.weight_scale"] = scale.bfloat16()
    save_file(tensors, made / "model.safetensors")
    # with layer 1, whose 8 scales are one
    assert scale_rows(made) == {"proj": ["(int4)", "16", "0.25", "1", "4", "12.5%"]}


def test_scales_of_several_types(made):
    tensors = load_file(made / "model.safetensors")
    tensors["a.weight"] = torch.zeros(4, 6, dtype=torch.int8)
    tensors["a.weight_scale"] = torch.tensor([[3.0]])
    save_file(tensors, made / "model.safetensors")
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_1"] = {
        "targets": ["a"],
        "weights": {"num_bits": 8, "type": "int"},
    }
    (made / "config.json").write_text(json.dumps(config))
    assert scale_rows(made)["a"] == ["(int8)", "1", "3", "3", "3", "0.0%"]
    (kinds,) = [_kinds(made, config["quantization_config"], codes=True)]
    counts = {kind.name: kind.codes for kind in kinds}
    assert counts["a"].tolist() == [0] * 128 + [24] + [0] * 127
    # words of zeros hold codes of -8; a word of one holds -7 and seven of -8
    assert counts["proj"].tolist() == [256 + 32 * 7, 32] + [0] * 14


def test_double_quantization_is_undone(tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(128, 256)
    layer = Linear4bit.from_weight(weight, Spec4bit(), torch.float32)
    tensors = bitsandbytes_format.tensors("model.layers.0.up_proj", layer)
    save_file(tensors, tmp_path / "model.safetensors")
    section = bitsandbytes_format.quantization_config(Spec4bit(), torch.bfloat16, [])
    (kind,) = _kinds(tmp_path, section, codes=True)
    found = torch.from_numpy(kind.scales[0])
    expected = dequantize_absmax(layer.packed)
    assert torch.equal(found, expected.reshape(-1))
    assert kind.type == "nf4"
    assert kind.codes.sum() == weight.numel()
    high, low = layer.packed.codes >> 4, layer.packed.codes & 15
    codes = torch.stack([high, low], -1).reshape(-1).long()
    assert kind.codes.tolist() == torch.bincount(codes, minlength=16).tolist()


def dequantize_absmax(packed):
    """By bitsandbytes itself."""
    import bitsandbytes.functional as reader

    from qat_kernels.nf4 import NESTED_BLOCK, dynamic_map

    state = reader.QuantState(
        absmax=packed.nested_absmax,
        code=dynamic_map(torch.device("cpu")),
        blocksize=NESTED_BLOCK,
        dtype=torch.float32,
    )
    return reader.dequantize_blockwise(packed.absmax, state) + packed.offset


@pytest.mark.parametrize("kind", ["int4", "nf4", "mixed"])
def test_plot_of_scales(made, tmp_path, capsys, kind):
    from matplotlib import image

    if kind == "nf4":
        layer = Linear4bit.from_weight(torch.randn(128, 256), Spec4bit(), torch.float32)
        tensors = bitsandbytes_format.tensors("model.layers.0.up_proj", layer)
        save_file(tensors, made / "model.safetensors")
    elif kind == "mixed":
        tensors = load_file(made / "model.safetensors")
        tensors["a.weight"] = torch.arange(64, dtype=torch.int8).reshape(8, 8)
        tensors["a.weight_scale"] = torch.ones(8, 1)
        save_file(tensors, made / "model.safetensors")
        assert cli.main(["inspect", str(made), f"plot={tmp_path / 'scales.png'}"]) == 2
        assert "a has codes outside -8 ... 7" in capsys.readouterr().err
        config = json.loads((made / "config.json").read_text())
        eight = {"targets": ["a"], "weights": {"num_bits": 8, "type": "int"}}
        config["quantization_config"]["config_groups"]["group_1"] = eight
        (made / "config.json").write_text(json.dumps(config))
    target = tmp_path / "scales.png"
    assert cli.main(["inspect", str(made), f"plot={target}"]) == 0
    pixels = image.imread(target)
    assert pixels.shape[:2] == (576, 1440)
    for half in (pixels[:, :720], pixels[:, 720:]):
        # colours of lines or bars, which axes and letters do not have
        colour = half[..., :3].max(-1) - half[..., :3].min(-1) > 0.2
        assert colour.sum() > 200
    assert not list(tmp_path.glob(".scales*"))


def test_plots_that_cannot_be(made, tmp_path, capsys):
    def refused(plot, artifact=made):
        assert cli.main(["inspect", str(artifact), f"plot={plot}"]) == 2
        return capsys.readouterr().err

    (tmp_path / "there.png").write_text("x")
    assert "exists already" in refused(tmp_path / "there.png")
    assert "ending in .png" in refused(tmp_path / "x.pdf")
    assert "create it first" in refused(tmp_path / "no" / "x.png")
    assert "lies in the artifact" in refused(made / "x.png")
    save_file({"a.weight": torch.ones(2, 2)}, made / "model.safetensors")
    assert "no quantized matrix" in refused(tmp_path / "x.png")
    assert (tmp_path / "there.png").read_text() == "x"
