import errno
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat import artifact, bitsandbytes_format, cli
from qat.artifact import inspect, staged_directory, verify, write_manifest
from qat.artifact_summary import bits_per_weight
from qat.errors import UserError
from qat.linear_4bit import Linear4bit
from qat.safetensors_header import BrokenHeader, read_header
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


# --- manifest and verify -------------------------------------------------------------------------


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


def read_manifest(directory):
    return json.loads((directory / "manifest.json").read_text())


def edit_manifest(directory, change):
    manifest = read_manifest(directory)
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def found(directory, **kwargs):
    return [(p.kind, p.file, p.tensor) for p in verify(directory, **kwargs)]


def overwrite(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_manifest_content(made):
    manifest = read_manifest(made)
    assert manifest["format"] == 1
    assert manifest["provenance"] == {"seed": 3, "versions": {"torch": "x"}}
    assert sorted(manifest["files"]) == ["config.json", "model.safetensors", "sub/note.txt"]
    assert manifest["files"]["sub/note.txt"] == {
        "sha256": hashlib.sha256(b"hello").hexdigest(),
        "size": 5,
    }
    entry = manifest["files"]["model.safetensors"]
    whole = (made / "model.safetensors").read_bytes()
    assert entry["sha256"] == hashlib.sha256(whole).hexdigest()
    assert len(entry["tensors"]) == 7
    expected = torch.full((4, 8), 1, dtype=torch.int32).numpy().tobytes()
    name = "model.layers.1.proj.weight_packed"
    assert entry["tensors"][name] == hashlib.sha256(expected).hexdigest()


def test_whole_artifact_verifies(made):
    assert verify(made) == []
    assert verify(made, hashes=False) == []


def test_chunks_do_not_change_hashes(made, monkeypatch):
    before = read_manifest(made)
    monkeypatch.setattr(artifact, "CHUNK", 7)
    (made / "manifest.json").unlink()
    write_manifest(made, before["provenance"])
    assert read_manifest(made) == before
    assert verify(made) == []


def test_missing_extra_and_size(made):
    (made / "sub" / "note.txt").unlink()
    (made / "more.txt").write_text("x")
    (made / "config.json").write_text("{}")
    assert found(made) == [
        ("extra", "more.txt", None),
        ("size", "config.json", None),
        ("missing", "sub/note.txt", None),
    ]


def test_files_that_a_download_adds_are_not_extra(made):
    (made / ".gitattributes").write_text("x")
    (made / ".cache" / "huggingface").mkdir(parents=True)
    (made / ".cache" / "huggingface" / "a.lock").write_text("")
    assert verify(made) == []


def test_linked_directory_is_seen(made, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (made / "code").symlink_to(tmp_path / "elsewhere")
    assert found(made) == [("extra", "code", None)]


def test_linked_file_counts_as_its_content(made, tmp_path):
    (made / "config.json").rename(tmp_path / "blob")
    (made / "config.json").symlink_to(tmp_path / "blob")
    assert verify(made) == []


def test_changed_byte_names_the_tensor_and_its_range(made):
    path = made / "model.safetensors"
    name = "model.layers.1.proj.weight_scale"
    entry = next(t for t in read_header(path).tensors if t.name == name)
    overwrite(path, entry.begin + 3, b"\x7f")
    (problem,) = verify(made)
    assert (problem.kind, problem.tensor) == ("content", name)
    assert str(problem) == (
        f"model.safetensors: sha256 of tensor {name} differs "
        f"(bytes {entry.begin} to {entry.begin + 16} of the file)"
    )
    assert verify(made, hashes=False) == []


def test_changed_text_file(made):
    (made / "sub" / "note.txt").write_text("hellO")
    (problem,) = verify(made)
    assert str(problem) == "sub/note.txt: sha256 differs, 5 bytes"


def test_changed_header(made):
    path = made / "model.safetensors"
    offset = path.read_bytes().index(b'"pt"')
    overwrite(path, offset, b'"tf"')
    (problem,) = verify(made)
    assert str(problem) == "model.safetensors: sha256 differs in the header"


def test_renamed_tensor(made):
    path = made / "model.safetensors"
    overwrite(path, path.read_bytes().index(b"model.embed"), b"model.embad")
    assert found(made) == [
        ("content", "model.safetensors", "model.embad.weight"),
        ("content", "model.safetensors", "model.embed.weight"),
    ]


def test_truncated_safetensors(made):
    path = made / "model.safetensors"
    size = path.stat().st_size
    last = read_header(path).tensors[-1]
    os.truncate(path, size - 1)
    problems = verify(made)
    assert [p.kind for p in problems] == ["size", "header"]
    assert str(problems[1]) == (
        f"model.safetensors: truncated in tensor {last.name} "
        f"(bytes {last.begin} to {size} of the file)"
    )
    os.truncate(path, 20)
    assert [p.kind for p in verify(made, hashes=False)] == ["size", "header"]
    assert "truncated: the header should take" in str(verify(made)[1])
    os.truncate(path, 3)
    assert str(verify(made)[1]).endswith("not a safetensors file: no plausible header length")


def test_bytes_after_the_last_tensor(made):
    path = made / "model.safetensors"
    with path.open("ab") as file:
        file.write(b"abc")
    assert [str(p) for p in verify(made)][1] == "model.safetensors: 3 bytes after the last tensor"


@pytest.mark.parametrize(
    "name", ["../up.txt", "/etc/hosts", "a/../../b", "C:\\x", "\\x", "a\\..\\..\\b", "", "C:x"]
)
def test_unsafe_names_are_not_opened(made, name):
    edit_manifest(made, lambda m: m["files"].update({name: {"sha256": "0", "size": 1}}))
    assert found(made) == [("unsafe", name, None)]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "sub/x.pkl", "y.ckpt"])
def test_pickles_are_refused(made, name):
    (made / name).write_bytes(b"x")
    assert found(made) == [("pickle", name, None)]
    listed = {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}
    edit_manifest(made, lambda m: m["files"].update({name: listed}))
    assert found(made) == [("pickle", name, None)]
    with pytest.raises(ValueError, match="holds no pickle files"):
        write_manifest(made, {})


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("{", "cannot be read: "),
        ("[]", "cannot be read: no table of files"),
        ('{"format": 2, "files": {}}', "cannot be read: format 2 is unknown, 1 is expected"),
        (
            '{"format": 1, "files": {"a": {"size": 1}}}',
            "cannot be read: the entry of 'a' lacks size or sha256",
        ),
    ],
)
def test_broken_manifest(made, text, detail):
    (made / "manifest.json").write_text(text)
    (problem,) = verify(made)
    assert problem.kind == "manifest"
    assert str(problem).startswith(f"manifest.json: {detail}")


def test_not_an_artifact(tmp_path):
    with pytest.raises(UserError, match=r"not an artifact, it has no manifest\.json"):
        verify(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        verify(tmp_path / "x")


@pytest.mark.parametrize(
    "header",
    [
        b"nonsense",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}',
        b'{"a": {"dtype": "U8", "shape": [2]}}',
    ],
)
def test_invalid_headers(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(BrokenHeader, match="header is not valid"):
        read_header(path)


# --- inspect and the commands --------------------------------------------------------------------


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


def test_verify_command(made, capsys):
    assert cli.main(["verify", str(made)]) == 0
    assert capsys.readouterr().out == f"{made}: every file is as the manifest says\n"
    (made / "sub" / "note.txt").write_text("hellO")
    assert cli.main(["verify", str(made), "hashes=false"]) == 0
    capsys.readouterr()
    assert cli.main(["verify", str(made)]) == 1
    assert capsys.readouterr().err == (
        f"sub/note.txt: sha256 differs, 5 bytes\n{made}: 1 problem(s)\n"
    )
    (made / "manifest.json").unlink()
    assert cli.main(["verify", str(made)]) == 2
    assert capsys.readouterr().err == f"error: {made}: not an artifact, it has no manifest.json\n"


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
    rows = [line.split() for line in lines if "up_proj" in line]
    assert len(rows) == 1, "its helper tensors have no rows of their own"
    assert rows[0][:7] == ["model.layers.*.up_proj", "1", "128", "x", "256", "nf4", "64"]
    # codes, one byte for each of 512 blocks, and fp32 for each 256 of them
    assert bits_per_weight(tmp_path) == 4 + (512 + 2 * 4) * 8 / (128 * 256)
