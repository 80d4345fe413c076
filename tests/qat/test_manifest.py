"""The manifest and ``qat verify``: what is written, and that no damage passes."""

import hashlib
import json
import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from qat import cli, manifest
from qat.errors import UserError
from qat.manifest import (
    BLOCK_HEX,
    ManifestError,
    block_bytes,
    describe_files,
    is_pickle,
    read_manifest,
    seal,
    write_manifest,
)
from qat.safetensors_header import BrokenHeader, read_header
from qat.verify import verify
from tests.qat.artifacts import make_artifact


@pytest.fixture
def made(tmp_path):
    """Two layers of int4 codes and a kept embedding, 128 KiB, and two small files."""
    directory = tmp_path / "artifact"
    directory.mkdir()
    tensors = {"model.embed.weight": torch.ones(1024, 64, dtype=torch.bfloat16)}
    for layer in range(2):
        prefix = f"model.layers.{layer}.proj"
        tensors[f"{prefix}.weight_packed"] = torch.full((4, 8), layer, dtype=torch.int32)
        tensors[f"{prefix}.weight_scale"] = torch.ones(4, 2, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text("{}" + 9999 * " ")
    (directory / "sub").mkdir()
    (directory / "sub" / "note.txt").write_text("hello")
    write_manifest(directory, {"seed": 3, "versions": {"torch": "x"}})
    return directory


def edit_manifest(directory, change):
    """Change a manifest as its owner could: with the digest that belongs to it."""
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_bytes(seal((json.dumps(content, indent=2) + "\n").encode()))


def found(directory, **kwargs):
    return [(p.kind, p.file, p.tensor) for p in verify(directory, **kwargs)]


def overwrite(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# --- content -------------------------------------------------------------------------------------


def test_content(made):
    content = json.loads((made / "manifest.json").read_text())
    assert list(content) == ["format", "digest", "provenance", "files"]
    assert content["format"] == 2
    assert content["provenance"] == {"seed": 3, "versions": {"torch": "x"}}
    assert list(content["files"]) == ["config.json", "model.safetensors", "sub/note.txt"]
    digest = hashlib.sha256(b"hello").hexdigest()
    assert content["files"]["sub/note.txt"] == {
        "sha256": digest,
        "size": 5,
        "block": 4096,
        "blocks": digest[:16],
    }
    entry = content["files"]["model.safetensors"]
    whole = (made / "model.safetensors").read_bytes()
    assert entry["sha256"] == hashlib.sha256(whole).hexdigest()
    blocks = [hashlib.sha256(whole[i : i + 4096]).hexdigest() for i in range(0, len(whole), 4096)]
    assert len(blocks) > 32
    assert entry["blocks"] == "".join(block[:BLOCK_HEX] for block in blocks)
    expected = torch.full((4, 8), 1, dtype=torch.int32).numpy().tobytes()
    name = "model.layers.1.proj.weight_packed"
    assert entry["tensors"][name] == hashlib.sha256(expected).hexdigest()
    assert len(entry["tensors"]) == 5


def test_the_digest_is_that_of_the_file_with_zeros_in_its_place(made):
    raw = (made / "manifest.json").read_bytes()
    digest = json.loads(raw)["digest"]
    blank = raw.replace(digest.encode(), b"0" * 64)
    assert digest == hashlib.sha256(blank).hexdigest()
    assert seal(raw) == raw


@pytest.mark.parametrize(
    ("size", "block"),
    [(0, 4096), (1, 4096), (8 << 20, 4096), ((8 << 20) + 1, 8192), (5 * 10**9, 1 << 22)],
)
def test_blocks_are_few_and_small(size, block):
    assert block_bytes(size) == block
    assert size <= 2048 * block


def test_chunks_do_not_change_hashes(made, monkeypatch):
    before = (made / "manifest.json").read_bytes()
    monkeypatch.setattr(manifest, "CHUNK", 7)
    (made / "sub" / "empty").write_bytes(b"")
    write_manifest(made, {"seed": 3, "versions": {"torch": "x"}})
    assert verify(made) == []
    (made / "sub" / "empty").unlink()
    write_manifest(made, {"seed": 3, "versions": {"torch": "x"}})
    assert (made / "manifest.json").read_bytes() == before


def test_known_entries_are_not_read_again(made):
    known = describe_files(made, skip=["config.json"])
    assert set(known) == {"model.safetensors", "sub/note.txt"}
    (made / "config.json").write_text("[]")
    write_manifest(made, {}, known)
    assert verify(made) == []
    assert list(read_manifest(made)["files"]) == ["config.json", *known]


# --- whole, missing, extra -----------------------------------------------------------------------


def test_whole_artifact_verifies(made):
    assert verify(made) == []
    assert verify(made, hashes=False) == []


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


def test_a_file_of_another_size_is_compared_as_far_as_both_go(made):
    text = (made / "config.json").read_text()
    (made / "config.json").write_text(text[:-1])
    (problem,) = verify(made)
    assert str(problem) == "config.json: 10000 bytes, the manifest says 10001"
    (made / "config.json").write_text(text[:5000] + "x" + text[5000:])
    (problem,) = verify(made)
    assert problem.span == (4096, 8192)
    assert str(problem).endswith("says 10001; the first difference lies in bytes 4096 to 8192")


# --- what differs, and where ---------------------------------------------------------------------


def test_changed_byte_names_the_range_and_the_tensor(made):
    path = made / "model.safetensors"
    name = "model.layers.1.proj.weight_scale"
    entry = next(t for t in read_header(path).tensors if t.name == name)
    overwrite(path, entry.begin + 3, b"\x7f")
    (problem,) = verify(made)
    assert (problem.kind, problem.tensor, problem.span) == ("content", name, entry_span(entry))
    assert str(problem) == (
        f"model.safetensors: bytes {entry.begin} to {entry.end} differ (in tensor {name})"
    )
    assert verify(made, hashes=False) == []


def entry_span(entry):
    return (entry.begin, entry.end)


def test_the_first_differing_block_of_a_large_tensor(made):
    path = made / "model.safetensors"
    entry = max(read_header(path).tensors, key=lambda t: t.nbytes)
    at = entry.begin + 70_000
    for offset in (at, at + 30_000):  # the second difference is not the first
        overwrite(path, offset, b"\x7f")
    (problem,) = verify(made)
    assert problem.span == (at // 4096 * 4096, at // 4096 * 4096 + 4096)
    assert problem.tensor == entry.name
    overwrite(path, entry.begin, b"\x7f")
    (problem,) = verify(made)
    assert problem.span == (entry.begin, entry.begin // 4096 * 4096 + 4096)


def test_changed_text_file(made):
    (made / "sub" / "note.txt").write_text("hellO")
    (problem,) = verify(made)
    assert str(problem) == "sub/note.txt: bytes 0 to 5 differ"
    text = (made / "config.json").read_text()
    (made / "config.json").write_text(text[:9000] + "x" + text[9001:])
    assert next(str(p) for p in verify(made)) == "config.json: bytes 8192 to 10001 differ"


def test_changed_header(made):
    path = made / "model.safetensors"
    overwrite(path, path.read_bytes().index(b'"pt"'), b'"tf"')
    end = read_header(path).data_begin
    assert [str(p) for p in verify(made)] == [
        f"model.safetensors: bytes 0 to {end} differ (in the header)"
    ]
    overwrite(path, 8, b"[")
    (problem,) = verify(made)
    assert (problem.kind, problem.span) == ("header", (0, 4096))
    assert "header is not valid" in str(problem)


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


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
def test_every_truncation_is_found(made, name):
    path = made / name
    raw = path.read_bytes()
    sizes = random.Random(name).sample(range(len(raw)), 40)
    for size in [0, 1, len(raw) - 1, *sizes]:
        path.write_bytes(raw[:size])
        assert verify(made), size


def test_bytes_after_the_last_tensor(made):
    path = made / "model.safetensors"
    with path.open("ab") as file:
        file.write(b"abc")
    assert [str(p) for p in verify(made)][1] == "model.safetensors: 3 bytes after the last tensor"


def test_every_flipped_bit_is_found(tmp_path):
    """1,000 bits at random places, in proportion to size, and 50 in each file."""
    directory = make_artifact(tmp_path / "artifact")
    files = sorted(directory.iterdir())
    sizes = [path.stat().st_size for path in files]
    rng = random.Random(5)
    chosen = rng.choices(files, sizes, k=1000) + [path for path in files for _ in range(50)]
    assert {"manifest.json", "model.safetensors", "README.md"} <= {path.name for path in chosen}
    originals = {path: path.read_bytes() for path in files}
    for path in chosen:
        raw = originals[path]
        place = rng.randrange(len(raw))
        overwrite(path, place, bytes([raw[place] ^ 1 << rng.randrange(8)]))
        problems = verify(directory)
        assert problems, (path.name, place)
        assert problems[0].file == path.name
        if path.name != "manifest.json":
            begin, end = problems[0].span
            # in the header a bit can move or rename tensors, which are then named instead
            header = path.suffix == ".safetensors" and place < read_header_end(raw)
            assert header or begin <= place < end, (path.name, place, str(problems[0]))
        overwrite(path, place, raw[place : place + 1])
    assert verify(directory) == []


def read_header_end(raw):
    return 8 + int.from_bytes(raw[:8], "little")


# --- the manifest itself -------------------------------------------------------------------------


def test_manifest_of_another_artifact(tmp_path):
    one, two = (make_artifact(tmp_path / str(seed), seed) for seed in (0, 1))
    assert verify(one) == verify(two) == []
    (one / "manifest.json").write_bytes((two / "manifest.json").read_bytes())
    problems = verify(one)
    assert str(problems[0]) == (
        "manifest.json: belongs to another artifact: the weights that it lists are not the ones "
        "here"
    )
    assert {p.file for p in problems} == {"manifest.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("{", "damaged: "),
        ("[]", "format None is unknown, 2 is expected"),
        ('{"format": 1, "files": {}}', "format 1, of an earlier version, which has no digest"),
        ('{"format": 3, "files": {}}', "format 3 is unknown, 2 is expected"),
        ('{"format": 2, "files": {}}', "changed after it was written: it does not begin as"),
    ],
)
def test_broken_manifest(made, text, detail):
    (made / "manifest.json").write_text(text)
    (problem,) = verify(made)
    assert problem.kind == "manifest"
    assert str(problem).startswith(f"manifest.json: {detail}")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(files=[]),
        lambda m: m["files"].update(a={"size": 1}),
        lambda m: m["files"]["sub/note.txt"].update(size="5"),
        lambda m: m["files"]["sub/note.txt"].update(block=0),
        lambda m: m["files"]["sub/note.txt"].update(blocks="00"),
        lambda m: m["files"]["sub/note.txt"].update(tensors=[]),
    ],
)
def test_incomplete_manifest(made, change):
    edit_manifest(made, change)
    with pytest.raises(ManifestError, match=r"no table of files|lacks size, sha256 or blocks"):
        read_manifest(made)
    assert [p.kind for p in verify(made)] == ["manifest"]


def test_an_edited_manifest_is_found(made):
    path = made / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    (problem,) = verify(made)
    assert str(problem).startswith("manifest.json: changed after it was written: its text does not")


def test_not_an_artifact(tmp_path):
    with pytest.raises(UserError, match=r"not an artifact, it has no manifest\.json"):
        verify(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        verify(tmp_path / "x")


# --- what must not be there ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../up.txt", "/etc/hosts", "a/../../b", "C:\\x", "\\x", "a\\..\\..\\b", "a\\b", "", "C:x",
     ".", "..", "a//b", "./a", "//host/x", "a\0b"],
)  # fmt: skip
def test_unsafe_names_are_not_opened(made, name):
    entry = {"sha256": "0", "size": 1, "block": 4096, "blocks": "0" * 16}
    edit_manifest(made, lambda m: m["files"].update({name: entry}))
    assert found(made) == [("unsafe", name, None)]


def test_files_with_such_names_are_found_and_not_written(made):
    (made / "a\\b").write_text("x")
    assert found(made) == [("unsafe", "a\\b", None)]
    with pytest.raises(ValueError, match="not a name that every system reads alike"):
        write_manifest(made, {})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "sub/x.pkl", "y.ckpt", "B.PT"])
def test_pickles_by_name(made, name):
    (made / name).write_bytes(b"x")
    assert found(made) == [("pickle", name, None)]
    listed = {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}
    listed |= {"block": 4096, "blocks": listed["sha256"][:16]}
    edit_manifest(made, lambda m: m["files"].update({name: listed}))
    assert found(made) == [("pickle", name, None)]
    with pytest.raises(ValueError, match="holds no pickle files"):
        write_manifest(made, {})


@pytest.mark.parametrize("kind", ["pickle 2", "pickle 4", "pickle 5", "torch", "zip"])
@pytest.mark.parametrize("name", ["model.safetensors", "weights.dat", "adapter_model.safetensors"])
def test_pickles_by_content(made, name, kind):
    path = made / name
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps({"a": [1, 2]}, protocol=int(kind[-1])))
    elif kind == "torch":
        torch.save({"a": torch.ones(2)}, path)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.pkl", pickle.dumps(1))
    assert found(made, hashes=False) == [("pickle", name, None)]
    with pytest.raises(ValueError, match="holds no pickle files"):
        write_manifest(made, {})


def test_safetensors_that_begin_like_a_pickle_are_none(tmp_path):
    """The length of the header is its first bytes: 0x280 reads as a pickle of protocol 2."""
    path = tmp_path / "x.safetensors"
    for length in (0x280, 0x580, 0x010280):
        header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + b"\0")
        read_header(path)
        assert not is_pickle(path)
    raw = bytearray(path.read_bytes())
    raw[8] = 0
    path.write_bytes(raw)
    assert is_pickle(path), "with a broken header nothing speaks against it"


def test_links(made, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("hello")
    (made / "code").symlink_to(tmp_path / "elsewhere")
    (made / "sub" / "note.txt").unlink()
    (made / "sub" / "note.txt").symlink_to(tmp_path / "elsewhere" / "secret")
    (made / "loop").symlink_to(made / "loop")
    assert found(made) == [
        ("unsafe", "code", None),
        ("unsafe", "loop", None),
        ("unsafe", "sub/note.txt", None),
    ]
    assert str(verify(made)[0]).endswith(
        f"code: a link to {tmp_path / 'elsewhere'}, outside the artifact"
    )
    (made / "code").unlink()
    (made / "loop").unlink()
    (made / "sub" / "note.txt").unlink()
    (made / "sub" / "note.txt").symlink_to("../hello")
    (made / "hello").write_text("hello")
    assert found(made) == [("extra", "hello", None)]


def test_the_cache_of_the_hub_is_an_artifact(made, tmp_path):
    """There, each file is a link to a folder of blobs beside the snapshots."""
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "blobs").mkdir(parents=True)
    for path in sorted(p for p in made.rglob("*") if p.is_file()):
        name = path.relative_to(made)
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    assert verify(snapshot) == []
    blob.write_text("hellO")
    assert [str(p) for p in verify(snapshot)] == ["sub/note.txt: bytes 0 to 5 differ"]
    (repo / "other").write_text("hello")
    (snapshot / "sub" / "note.txt").unlink()
    (snapshot / "sub" / "note.txt").symlink_to(repo / "other")
    assert found(snapshot) == [("unsafe", "sub/note.txt", None)]


@pytest.mark.parametrize("rest", [b" nonsense", b' "\xff": 0}', b' "a": ' + 100_000 * b"["])
def test_a_manifest_with_its_digest_and_no_json(made, rest):
    """Whoever writes the text can write its digest."""
    head = (made / "manifest.json").read_bytes().split(b'"provenance"')[0]
    (made / "manifest.json").write_bytes(seal(head + rest))
    with pytest.raises(ManifestError, match="damaged"):
        read_manifest(made)
    assert [p.kind for p in verify(made)] == ["manifest"]


def test_a_name_that_no_file_can_have(made):
    edit_manifest(made, lambda m: m["files"].update({300 * "a": m["files"]["config.json"]}))
    assert found(made) == [("unsafe", 300 * "a", None)]


@pytest.mark.parametrize(
    "header",
    [
        b"nonsense",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}',
        b'{"a": {"dtype": "U8", "shape": [2]}}',
        b'{"a": {"dtype": "??", "shape": [2], "data_offsets": [0, 1.5]}}',
        b'{"a": {"dtype": "U8", "shape": [-2, -1], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "??", "shape": [2], "data_offsets": [0, true]}}',
        100_000 * b"[",
    ],
    ids=range(9),
)
def test_invalid_headers(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(BrokenHeader, match="header is not valid"):
        read_header(path)


# --- the command ---------------------------------------------------------------------------------


def test_verify_command(made, capsys):
    assert cli.main(["verify", str(made)]) == 0
    assert capsys.readouterr().out == f"{made}: every file is as the manifest says\n"
    (made / "sub" / "note.txt").write_text("hellO")
    assert cli.main(["verify", str(made), "hashes=false"]) == 0
    capsys.readouterr()
    assert cli.main(["verify", str(made)]) == 1
    assert capsys.readouterr().err == (f"sub/note.txt: bytes 0 to 5 differ\n{made}: 1 problem(s)\n")
    (made / "manifest.json").unlink()
    assert cli.main(["verify", str(made)]) == 2
    assert capsys.readouterr().err == f"error: {made}: not an artifact, it has no manifest.json.\n"
