"""Wrong input: exit code 2, one message that says what to do, and nothing lost or left behind."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qat import cli
from tests.recipes.running import ROOT, files, hashes, run, tiny_setup, write_text

Fail = Callable[..., str]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_setup(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fail(
    setup: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Fail:
    """Run qat_int4 with more words, expect exit code 2, return the message."""
    monkeypatch.chdir(tmp_path)

    def check(*words: str, base: list[str] | None = None) -> str:
        names = {word.partition("=")[0] for word in words}
        kept = [word for word in setup if word.partition("=")[0] not in names]
        before = hashes(tmp_path)
        capfd.readouterr()
        assert run(["recipe=qat_int4", *kept, *words] if base is None else base) == 2
        output = capfd.readouterr()
        assert "Traceback" not in output.err
        assert output.err.count("error:") == 1
        assert hashes(tmp_path) == before
        assert not list(tmp_path.rglob("runs/*"))
        return output.err[output.err.index("error: ") + 7 :]

    return check


def test_unknown_recipe(fail: Fail):
    message = fail(base=["recipe=qat_in4", "max_steps=3"])
    assert "recipe=qat_in4: no such recipe. Did you mean 'qat_int4'?" in message
    assert "pretrain_demo" in message
    assert "no recipe given" in fail(base=["max_steps=3"])


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("max_step=3", "max_steps"),
        ("scheme.weight.grop_size=32", "scheme.weight.group_size"),
        ("bits=3", "scheme.weight.bits"),
        ("trainer.precison=32-true", "trainer.precision"),
    ],
)
def test_misspelt_key(fail: Fail, word: str, nearest: str):
    message = fail(word)
    assert f"unknown key '{word.partition('=')[0]}'. Did you mean '{nearest}'?" in message


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("max_steps=many", "must be int"),
        ("max_steps=1.5", "must be int"),
        ("optim.lr=fast", "must be float"),
        ("trainer.precision=16-mixed", "32-true"),
        ("baselines.finetune=perhaps", "must be true | false"),
        ("max_steps=", "no value"),
    ],
)
def test_wrong_type(fail: Fail, word: str, wanted: str):
    message = fail(word)
    assert message.startswith(word.partition("=")[0])
    assert wanted in message


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("max_steps=0", "max_steps=0: at least 1"),
        ("optim.lr=-1", "optim.lr=-1.0: "),
        ("trainer.micro_batch_size=0", "trainer.micro_batch_size=0: at least 1"),
        ("scheme.enable_after_steps=99", "scheme.enable_after_steps=99: below max_steps=4"),
        ("scheme.min_coverage=2", "scheme.min_coverage=2.0: between 0 and 1"),
        ("text.seq_len=1", "text.seq_len=1: at least 2"),
        ("text.seq_len=4096", "text.seq_len=4096: the model has 128 positions"),
        ("trainer.micro_batch_size=3", "trainer.global_batch_size=4: must be a multiple"),
        ("trainer.devices=0", "trainer.devices=0: at least 1"),
    ],
)
def test_value_out_of_range(fail: Fail, word: str, message: str):
    assert fail(word).startswith(message)


def test_missing_model(fail: Fail, tmp_path: Path):
    assert "no such directory" in fail("model=./nothing")
    (tmp_path / "modell").mkdir()
    assert f"did you mean {tmp_path / 'modell'}?" in fail(f"model={tmp_path / 'model'}")
    assert "holds no config.json" in fail(f"model={tmp_path / 'modell'}")
    # an id that is not in the cache, without a network
    assert "model=nobody/nothing: cannot be loaded" in fail("model=nobody/nothing")


def test_broken_model(fail: Fail, setup: list[str], tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(setup[0].partition("=")[2], model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert f"model={model}: the weights cannot be loaded" in fail(f"model={model}")
    weights.unlink()
    assert f"model={model}: the weights cannot be loaded" in fail(f"model={model}")
    (model / "config.json").write_text("{not json")
    assert f"model={model}: " in fail(f"model={model}")


def test_model_without_tokenizer(fail: Fail, setup: list[str], tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(setup[0].partition("=")[2], model)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    message = fail(f"model={model}")
    assert message.startswith(f"model={model}: no ")
    assert "tokenizer.json" in message


def test_quantized_model(fail: Fail, setup: list[str], tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(setup[0].partition("=")[2], model)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    assert "already quantized (gptq)" in fail(f"model={model}")


def test_unreadable_data(fail: Fail, tmp_path: Path):
    assert "data=nothing.txt: no such file" in fail("data=nothing.txt")
    (tmp_path / "notes.txt").touch()
    assert "data=notes.txt: the file is empty" in fail("data=notes.txt")
    assert "Did you mean 'notes.txt'?" in fail("data=note.txt")
    assert "a directory" in fail(f"data={tmp_path}")
    (tmp_path / "bytes.txt").write_bytes(b"fine\n" * 6 + b"caf\xe9\n" + b"fine\n" * 900)
    message = fail("data=bytes.txt")
    assert "line 7, byte 33: 0xe9 is not valid UTF-8" in message
    (tmp_path / "rows.jsonl").write_text('{"txt": "a"}\n')
    assert "line 1: no column 'text'. Columns: txt. Did you mean 'txt'?" in fail("data=rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "line 2" in fail("data=rows.jsonl")
    (tmp_path / "short.txt").write_text("too short\n" * 5)
    message = fail("data=short.txt", "text.validation=short.txt", "text.seq_len=128", "seed=1")
    assert "do not fill one block of text.seq_len=128" in message
    assert "text.validation=gone.txt" in fail("text.validation=gone.txt")


def test_data_together_with_a_key_below_it(fail: Fail, tmp_path: Path):
    write_text(tmp_path / "x.jsonl")
    for words in (("data=x.jsonl", "data.column=body"), ("data.column=body", "data=x.jsonl")):
        message = fail(*words)
        assert "data" in message
        assert "text.column" in message


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("scheme.weight.group_size=40", "scheme.weight.group_size=40 divides no selected layer"),
        # only the inputs of down_proj, 96
        ("scheme.weight.group_size=48", "scheme.min_coverage=0.5: only 20.0%"),
        ("scheme.weight.bits=1", "scheme.weight.bits=1"),
        ("scheme.weight.bits=9", "scheme.weight.bits=9"),
        ("scheme.weight.granularity=token", "granularity=token: "),
        ("scheme.weight.family=float", "scheme.weight.family=float"),
        ("scheme.rules=[{match: '*.q_pro', action: keep}]", "selects no module"),
        ("scheme.rules=[{match: '*', action: keep}]", "scheme.min_coverage=0.5: only 0.0%"),
        ("scheme.rules=[{match: 'model.embed_tokens'}]", "an embedding"),
        ("scheme.rules=[{mtch: '*'}]", "Did you mean"),
    ],
)
def test_impossible_scheme(fail: Fail, word: str, message: str):
    assert message in fail(word)
    # what would be done is refused for the same reason
    assert message in fail(word, "dry_run=true")


def test_selector_names_near_modules(fail: Fail):
    message = fail("scheme.rules=[{match: model.layers.0.mlp.dwn_proj, action: keep}]")
    assert "a near name is 'model.layers.0.mlp.down_proj'" in message


def test_unsupported_class_is_named(fail: Fail, tmp_path: Path):
    from tests.tiny import save_tiny

    message = fail(f"model={save_tiny('gpt2', tmp_path / 'gpt2')}")
    assert "Conv1D" in message


def test_preset(fail: Fail):
    assert "Did you mean 'trainer/debug'?" in fail("preset=[trainer/debgu]")


def test_output_dir_in_use(setup: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """A finished run, an unfinished one, a file, and a directory of something else stay whole."""
    finished, unfinished, other = (tmp_path / n for n in ("finished", "unfinished", "other"))
    for directory in (finished, unfinished):
        (directory / "artifact").mkdir(parents=True)
        (directory / "artifact/model.safetensors").write_bytes(b"precious")
        (directory / "config.yaml").write_text("recipe: qat_int4\n")
    (finished / "report.json").write_text("{}")
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    before = hashes(tmp_path)
    for name, message in {
        "finished": "holds a finished run; nothing was changed. Choose another directory\n",
        "unfinished": f"continue it with resume={unfinished}\n",
        "other": "is not empty and holds no run",
        "file": "is a file",
        "file/run": "cannot be made",
    }.items():
        assert run(["recipe=qat_int4", *setup, f"output_dir={tmp_path / name}"]) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"error: output_dir={tmp_path / name}: ")
        assert message in error
        assert error.count("\n") == 1
    assert hashes(tmp_path) == before


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("QAT_DEBUG", "1")
    assert run(["recipe=nothing"]) == 2
    assert "Traceback" in capfd.readouterr().err


# --- full disk -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Make a file system of a given size, where the user may."""
    mounted: list[Path] = []

    def make(size: str) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount a small file system here")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def check_full(code: int, error: str, directory: Path) -> None:
    assert code == 1
    assert "Traceback" not in error
    assert error.count("error: the disk is full") == 1
    assert f"Continue with: python train.py recipe=qat_int4 resume={directory}" in error
    assert not [name for name in files(directory) if ".tmp" in name or "partial" in name]


ONE_CHECKPOINT = ["trainer.checkpoint_every_steps=100", "baselines.finetune=false"]


@pytest.mark.parametrize(
    ("size", "words", "left"),
    [
        # a checkpoint takes 1150 KiB, another one while it replaces the first; the artifact 140
        ("700k", [], []),
        ("2800k", [], ["checkpoints/finetune/last.ckpt", "checkpoints/qat/last.ckpt"]),
        ("1220k", ONE_CHECKPOINT, ["checkpoints/qat/last.ckpt"]),
        ("1370k", ONE_CHECKPOINT, ["artifact/manifest.json", "checkpoints/qat/last.ckpt"]),
    ],
    ids=["first checkpoint", "second phase", "artifact", "report"],
)
def test_full_disk(
    setup: list[str],
    small_disk: Callable[[str], Path],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    size: str,
    words: list[str],
    left: list[str],
):
    """The run fails whole, and goes on where there is room."""
    directory = small_disk(size) / "run"
    code = run(["recipe=qat_int4", *setup, *words, f"output_dir={directory}"])
    check_full(code, capfd.readouterr().err, directory)
    markers = {"checkpoints/finetune/last.ckpt", "checkpoints/qat/last.ckpt"}
    assert sorted(files(directory) & (markers | {"artifact/manifest.json"})) == left
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(directory, elsewhere)  # the user moves the run to a larger disk
    assert run([f"resume={elsewhere}"]) == 0
    assert cli.main(["verify", str(elsewhere / "artifact")]) == 0


def test_full_disk_without_a_mount(
    setup: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """The same where nothing can be mounted: the operating system's error from safetensors."""
    import qat.convert

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(qat.convert, "save_file", full)
        code = run(["recipe=qat_int4", *setup, f"output_dir={directory}"])
    check_full(code, capfd.readouterr().err, directory)
    assert not (directory / "artifact").exists()
    assert run([f"resume={directory}"]) == 0


def test_nothing_of_this_is_in_the_checkout():
    """Tests write to temporary directories only."""
    assert not (ROOT / "runs").exists()
