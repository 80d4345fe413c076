"""What every export has in common: where it writes, what it refuses, how it compares."""

import math
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from qat import cli
from qat.errors import UserError
from qat.export import ExportOptions, export
from qat.export.compare import read_back, relative_error
from qat.export.format import ReadTensor
from qat.export.source import Source
from qat.fidelity import FidelityError
from qat.scheme import InputSpec, Scheme
from qat.verify import verify
from qat_kernels import QuantSpec
from tests.qat.export.artifacts import make_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("made") / "artifact")


def options(form, out, **changes):
    return ExportOptions(format=form, out=str(out), **changes)


@pytest.mark.parametrize("name", ["out", "sub/model.gguf"])
def test_an_output_inside_the_artifact_is_refused(name, artifact):
    """Its manifest would no longer list what is there."""
    before = sorted(artifact.rglob("*"))
    with pytest.raises(UserError, match="lies in the artifact"):
        export(artifact, options("gguf", artifact / name))
    assert sorted(artifact.rglob("*")) == before
    assert verify(artifact) == []


@pytest.mark.parametrize("there", ["m.gguf", "m.gguf.export.json"])
def test_neither_the_file_nor_its_report_is_overwritten(there, artifact, tmp_path):
    (tmp_path / there).write_text("mine")
    with pytest.raises(UserError, match=f"{there} exists already"):
        export(artifact, options("gguf", tmp_path / "m.gguf"))
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


def test_an_existing_output_is_refused_before_the_artifact_is_read(artifact, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    monkeypatch.setattr("qat.export.run.verify", lambda path: pytest.fail("it was read"))
    with pytest.raises(UserError, match="exists already"):
        export(artifact, options("merged", tmp_path / "out"))


@pytest.mark.parametrize("failing", ["m.gguf", "m.gguf.export.json"])
def test_an_interrupted_last_step_leaves_nothing(failing, artifact, tmp_path, monkeypatch):
    rename = Path.rename

    def interrupted(self, target):
        if Path(target).name == failing:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(artifact, options("gguf", tmp_path / "m.gguf"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "said"), [("file/x", "file is no directory"), (201 * "x", "choose a shorter name")]
)
def test_an_output_that_cannot_be_is_refused(name, said, artifact, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=said):
        export(artifact, options("merged", tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_dtype_that_the_format_does_not_have_is_refused(artifact, tmp_path):
    with pytest.raises(UserError, match="only format=merged has a choice of dtype"):
        export(artifact, options("gguf", tmp_path / "out", dtype="float16"))


@pytest.mark.parametrize(
    ("found", "equal"),
    [
        ([math.nan, math.inf, 1.0], True),
        ([0.0, math.inf, 1.0], False),
        ([math.nan, torch.finfo(torch.float32).max, 1.0], False),
        ([math.nan, math.inf, math.nan], False),
    ],
)
def test_what_is_no_number_must_be_found_where_it_was(found, equal, artifact):
    wanted = torch.tensor([math.nan, math.inf, 1.0])
    with ExitStack() as stack:
        source = Source(artifact, stack)
        item = ReadTensor("a", torch.tensor(found), wanted)
        result = read_back(source, [item], "reader", ["a"])
    assert result.exact == equal
    assert result.relative_error == (0.0 if equal else math.inf)


def test_an_error_that_is_no_number_is_the_largest():
    assert relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf


def test_an_allowed_loss_does_not_hide_others(tmp_path, monkeypatch):
    """What is lost here are quantized inputs; codes that differ are an error all the same."""
    from qat.export import gguf

    int8 = QuantSpec(bits=8, granularity="channel", grid="absmax")
    scheme = Scheme(weight=int8, input=InputSpec())
    source = make_artifact(tmp_path / "artifact", "llama", scheme)
    report = export(source, options("gguf", tmp_path / "right", allow_lossy=True))
    assert report.read_back.exact
    assert not report.exact
    assert "what it changes was not measured" in report.text()
    pack = gguf.pack

    def wrong(matrix, kind):
        data = pack(matrix, kind).copy()
        data[0, 5] ^= 1
        return data

    monkeypatch.setattr(gguf, "pack", wrong)
    with pytest.raises(FidelityError, match="14 differences"):
        export(source, options("gguf", tmp_path / "wrong", allow_lossy=True))
    assert not (tmp_path / "wrong").exists()


def test_a_full_disk_is_named(artifact, tmp_path, monkeypatch, capsys):
    """numpy, with which gguf writes, says neither where nor why."""

    def full(self, tensor):
        raise OSError("147456 requested and 72512 written")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
    out = tmp_path / "m.gguf"
    assert cli.main(["export", str(artifact), "format=gguf", f"out={out}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: the disk is full while writing {out}: ")
    assert f"MiB left for {tmp_path}. " in error
    assert list(tmp_path.iterdir()) == []
