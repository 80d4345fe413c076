"""Wrong input to adapter runs: exit code 2, one message that says what to do, nothing left behind.

What all recipes share is in `test_bad_input`.
"""

import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qat import cli
from tests.recipes.running import TRAIN, adapter_setup, files, hashes, run
from tests.recipes.test_bad_input import small_disk  # noqa: F401  (a fixture)
from tests.tiny import save_tiny

Fail = Callable[..., str]
QLORA = "recipe=qlora_nf4"


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return adapter_setup(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fail(
    setup: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Fail:
    """Run a recipe with more words, expect exit code 2, return the message."""
    monkeypatch.chdir(tmp_path)

    def check(*words: str, recipe: str = QLORA) -> str:
        names = {word.partition("=")[0] for word in words}
        kept = [word for word in setup if word.partition("=")[0] not in names]
        before = hashes(tmp_path)
        capfd.readouterr()
        assert run([recipe, *kept, *words]) == 2
        output = capfd.readouterr()
        assert "Traceback" not in output.err
        assert output.err.count("error:") == 1
        assert hashes(tmp_path) == before
        assert not list(tmp_path.rglob("runs/*"))
        return output.err[output.err.index("error: ") + 7 :]

    return check


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter.targets=[q_pro]"], "adapter.targets: 'q_pro' selects no plain nn.Linear"),
        (["adapter.targets=[q_pro]"], "Did you mean 'q_proj'?"),
        (["adapter.targets=[lm_head]"], "adapter.targets: 'lm_head' selects no plain nn.Linear"),
        (["adapter.targets=[]"], "adapter.targets=[]: name layers, or all-linear"),
        (["adapter.targets=q_proj"], "adapter.targets"),
        (["adapter.modules_to_save=[lm_hed]"], "did you mean 'lm_head'?"),
        (["adapter.modules_to_save=[down_proj]"], "is quantized by the scheme"),
        (["adapter.new_tokens=<a>"], "adapter.new_tokens"),
        (
            ["adapter.new_tokens=['<a>','']"],
            "adapter.new_tokens=['<a>', '']: each a text of its own",
        ),
        (["adapter.new_tokens=['<a>','<a>']"], "each a text of its own, none empty"),
        (["adapter.init=pisa"], "adapter.init=pisa"),
        (["adapter.rank=0"], "adapter.rank=0: at least 1"),
        (["adapter.rank=4.5"], "adapter.rank"),
        (["adapter.alpha=0"], "adapter.alpha=0.0: a finite number above 0"),
        (["adapter.dropout=1"], "adapter.dropout=1.0: at least 0 and below 1"),
        (["adapter.block_size=48"], "adapter.block_size=48"),
        (["adapter.base=int4"], "adapter.base=int4"),
        (["adapter.dtype=float16"], "adapter.dtype=float16"),
        (["adapter.ranks=4"], "Did you mean 'adapter.rank'?"),
        (["adapter.dora=true", "adapter.init=pissa"], "adapter.dora=true with init=pissa"),
        (["adapter.base=16bit", "adapter.init=loftq"], "init=loftq: needs a 4-bit base"),
        (["merge_share=2"], "merge_share=2.0: between 0 and 1"),
        (["scheme.enable_after_steps=1"], "adapters take merge_share instead"),
        (["outputs=[nf4]", "adapter.base=16bit"], "outputs: nf4 is for runs that train on a 4-bit"),
        (["outputs=[nf4]", "merge_share=0.5"], "outputs: nf4 is for runs that train on a 4-bit"),
        (["outputs=[gguf]"], "outputs"),
        (["min_gain_kept=most"], "min_gain_kept"),
        (["optim.lora_plus_ratio=0"], "optim.lora_plus_ratio=0.0: a finite number above 0"),
        (["optim.warmup_steps=4"], "optim.warmup_steps=4: below max_steps=4"),
        (["scheme.weight.group_size=40"], "scheme.weight.group_size=40 divides no selected layer"),
        (["chat.max_bad_rows=2"], "chat.max_bad_rows=2.0: a share, from 0 to 1"),
        (["chat.completion_column=prompt"], "another column than prompt_column"),
        (["chat.template=chatlm"], "chat.template=chatlm: neither a built-in template"),
        (["chat.template=chatml"], "the tokenizer lacks its special tokens <|im_start|>"),
        (["text.seq_len=8"], "text.seq_len=8: none of the "),
        (["text.seq_len=4096"], "text.seq_len=4096: the model has 128 positions"),
    ],
)
def test_wrong_value(fail: Fail, words: list[str], message: str):
    assert message in fail(*words)


def test_a_recipe_without_adapters(fail: Fail):
    assert "unknown key 'adapter'" in fail("adapter.rank=4", recipe="recipe=qat_int4")


def test_the_dry_run_refuses_the_same(fail: Fail):
    assert "Did you mean 'q_proj'?" in fail("adapter.targets=[q_pro]", "dry_run=true")
    message = fail("adapter.modules_to_save=[down_proj]", "dry_run=true")
    assert "is quantized by the scheme" in message


# --- data ----------------------------------------------------------------------------------------


def write(path: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"data={path.name}"


def chat(question: str, answer: str) -> dict[str, Any]:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_missing_columns(fail: Fail, tmp_path: Path):
    data = write(tmp_path / "rows.jsonl", [{"question": "a", "answers": "b"}])
    message = fail(data)
    assert "has the columns question, answers" in message
    assert "Name yours with chat.messages_column=" in message
    named = ["chat.prompt_column=question", "chat.completion_column=answer"]
    message = fail(data, *named)
    assert "has the columns question, answers" in message
    message = fail(data, *named, "chat.format=prompt_completion")
    assert "rows.jsonl: line 1: no column 'answer'" in message
    assert "Did you mean 'answers'?" in message


def test_too_many_bad_rows(fail: Fail, tmp_path: Path):
    rows = [chat(f"word {i}", "yes") for i in range(60)]
    rows[6] = {"messages": [{"role": "user", "content": "no answer"}]}
    rows[7] = '{"messages": ['
    rows[8] = {"messages": [{"role": "robot", "content": "hello"}]}
    message = fail(write(tmp_path / "rows.jsonl", rows))
    assert "rows.jsonl: 3 of 60 rows left out:" in message
    assert "rows.jsonl: line 7: no assistant turn" in message
    assert "rows.jsonl: line 8: column " in message
    assert "rows.jsonl: line 9: message 0: role 'robot' is unknown" in message
    assert "chat.max_bad_rows=0.01" in message


def test_unusable_files(fail: Fail, tmp_path: Path):
    (tmp_path / "empty.jsonl").touch()
    assert "data=empty.jsonl: the file is empty" in fail("data=empty.jsonl")
    assert "data=none.jsonl: no such file" in fail("data=none.jsonl")
    assert "line 1: holds list, not an object" in fail(write(tmp_path / "rows.jsonl", [[1], [2]]))
    data = write(tmp_path / "one.jsonl", [chat("a", "b")])
    assert "text.validation_fraction=0.1" in fail(data)
    message = fail("text.validation=none.jsonl")
    assert "text.validation=none.jsonl: no such file" in message
    (tmp_path / "notes.txt").write_text("words " * 100)
    message = fail("data=notes.txt", "chat.format=messages")
    assert "chat.format=messages: data=" in message


def test_templates_that_cannot_be_followed(fail: Fail, tmp_path: Path):
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}")
    message = fail("chat.template=broken.jinja")
    assert message.startswith("chat.template=broken.jinja: ")
    # the assistant's text is changed on the way, so its place cannot be found
    (tmp_path / "upper.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'][::-1] | upper }}\n{% endfor %}"
    )
    message = fail("chat.template=upper.jinja")
    assert message.startswith("chat.template=upper.jinja: ")
    assert "Take another template" in message


# --- model ---------------------------------------------------------------------------------------


@pytest.fixture
def model(setup: list[str], tmp_path: Path) -> Path:
    """A copy of the model, to be spoiled."""
    copy = tmp_path / "model"
    shutil.copytree(setup[0].partition("=")[2], copy)
    return copy


def change_config(model: Path, **values: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def test_model_quantized_otherwise(fail: Fail, model: Path):
    change_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    message = fail(f"model={model}")
    assert "already quantized (gptq)" in message
    assert "bitsandbytes checkpoints" in message
    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    change_config(model, quantization_config=eight)
    message = fail(f"model={model}")
    assert "8-bit" in message


def test_truncated_weights(fail: Fail, model: Path):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = fail(f"model={model}")
    assert f"model={model}: " in message
    weights.write_bytes(b"")
    assert f"model={model}: " in fail(f"model={model}")
    weights.unlink()
    assert f"model={model}: " in fail(f"model={model}")


def test_weights_that_do_not_fit(fail: Fail, model: Path):
    path = model / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, path, {"format": "pt"})
    assert f"1 weights are missing, the first is {name}" in fail(f"model={model}")
    save_file(tensors | {name: tensors[name][:5].clone()}, path, {"format": "pt"})
    message = fail(f"model={model}")
    assert name in message
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    message = fail(f"model={model}")
    assert name in message
    assert "cannot be trained" in message


@pytest.mark.parametrize(("family", "named"), [("gpt2", "Conv1D"), ("falcon", "FalconLinear")])
def test_classes_that_take_no_adapter(fail: Fail, tmp_path: Path, family: str, named: str):
    assert named in fail(f"model={save_tiny(family, tmp_path / family)}")


def test_a_4_bit_model_and_what_needs_16_bit(setup: list[str], fail: Fail, tmp_path: Path):
    """The base of another run in 4 bits: what would change it, or read it otherwise, is refused."""
    out = tmp_path / "made"
    assert run([QLORA, *setup, "baselines.finetune=false", f"output_dir={out}"]) == 0
    base = f"model={out / 'nf4'}"
    assert "is 4-bit already; take adapter.init=default" in fail(base, "adapter.init=pissa")
    message = fail(base, "adapter.base=fp4")
    assert "adapter.base=nf4 adapter.block_size=32 adapter.double_quant=true" in message
    (out / "nf4/model.safetensors").write_bytes(b"spoiled")
    assert base in fail(base)


# --- full disk -----------------------------------------------------------------------------------


def check_full(code: int, error: str, directory: Path) -> None:
    assert code == 1
    assert "Traceback" not in error
    assert error.count("error: the disk is full") == 1
    assert f"Continue with: python train.py {QLORA} resume={directory}" in error
    assert not [name for name in files(directory) if ".tmp" in name or "partial" in name]


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_full_disk_while_writing(
    setup: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    call: int,
):
    """The adapter, the base, the adapter on it, the artifact: what came before stays whole."""
    import qat.adapter_files
    import qat.convert

    calls = 0

    def full(tensors, path, metadata=None):
        nonlocal calls
        calls += 1
        if calls == call:
            Path(path).write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_file(tensors, path, metadata)

    directory = tmp_path / "run"
    words = [*setup, "baselines.finetune=false", f"output_dir={directory}"]
    with monkeypatch.context() as patch:
        patch.setattr(qat.adapter_files, "save_file", full)
        patch.setattr(qat.convert, "save_file", full)
        code = run([QLORA, *words])
    check_full(code, capfd.readouterr().err, directory)
    whole = {path.name for path in directory.iterdir() if path.is_dir()}
    complete = [set(), {"adapter"}, {"adapter"}, {"adapter", "nf4"}][call - 1]
    assert whole == {"checkpoints"} | complete
    before = {n: h for n, h in hashes(directory).items() if n.endswith(".safetensors")}
    assert run([f"resume={directory}"]) == 0
    after = hashes(directory)
    assert all(after[name] == before[name] for name in before)
    assert cli.main(["verify", str(directory / "artifact")]) == 0


@pytest.mark.parametrize("size", ["200k", "560k"])
def test_full_disk(
    setup: list[str],
    small_disk: Callable[[str], Path],  # noqa: F811
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    size: str,
):
    """The same on a real file system, at the first checkpoint and while writing the outputs."""
    directory = small_disk(size) / "run"
    code = run([QLORA, *setup, "baselines.finetune=false", f"output_dir={directory}"])
    check_full(code, capfd.readouterr().err, directory)
    assert not (directory / "artifact").exists()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(directory, elsewhere)
    assert run([f"resume={elsewhere}"]) == 0
    assert cli.main(["verify", str(elsewhere / "artifact")]) == 0


def test_out_of_memory(setup: list[str], tmp_path: Path):
    """A step that needs far more than the process may have: advice by the estimate, run kept."""
    out = tmp_path / "run"
    limit = 6 << 30  # the imports reserve about 3 GiB of addresses
    # 8192 blocks of 64 tokens: attention masks and scores alone are beyond the limit
    size = ["trainer.micro_batch_size=8192", "trainer.global_batch_size=8192"]
    done = subprocess.run(
        [*TRAIN, QLORA, *setup, f"output_dir={out}", *size],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: out of memory (" in done.stderr
    advice = done.stderr[done.stderr.index("By the estimate") :].splitlines()
    assert advice[1].split()[0] == "activations"
    assert "lower trainer.micro_batch_size" in advice[1]
    assert f"Continue with: python train.py recipe=qlora_nf4 resume={out}" in done.stderr
    assert (out / "config.yaml").is_file()
    assert not (out / "artifact").exists()
