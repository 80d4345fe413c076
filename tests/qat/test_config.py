import dataclasses
import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

import recipes
import train
from qat import cli, config, errors
from qat.errors import UserError, nearest, resumable, run_main

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Spec:
    bits: int = 4
    """Bits per code."""
    grid: Literal["absmax", "mse"] = "absmax"
    """How the scale is found."""

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: 2 to 8")


@dataclass(frozen=True)
class Rule:
    match: str
    """Wildcard."""
    spec: Spec | None = None
    """Spec of these."""


@dataclass(frozen=True)
class Scheme:
    weight: Spec = field(default_factory=Spec)
    """Weights."""
    input: Spec | None = None
    """Inputs."""
    rules: list[Rule] = field(default_factory=list)
    """Exceptions."""

    def __post_init__(self):
        if self.input is not None and self.input.bits != 8:
            raise ValueError("inputs take 8 bits")


@dataclass(frozen=True)
class Text:
    column: str = "text"
    """Column to read."""
    seq_len: int = 128
    """Tokens per block."""


@dataclass(frozen=True)
class Trainer:
    devices: int = 1
    """Processes."""
    clip: float = 1.0
    """Gradient norm."""


@dataclass(frozen=True)
class Toy:
    recipe: str = ""
    """Recipe."""
    data: str | None = None
    """File."""
    output_dir: str | None = None
    """Run directory."""
    resume: str | None = None
    """Run to continue."""
    max_steps: int = 10
    """Steps."""
    lr: float = 1e-3
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Moments."""
    flag: bool = False
    """A switch."""
    place: Path = Path("x")
    """A path."""
    amount: int | str = 3
    """Number or word."""
    names: tuple[str, ...] = ("a",)
    """Words."""
    preset: list[str] = field(default_factory=list)
    """Presets."""
    logger: Literal["csv", "none"] = "csv"
    """Logger."""
    text: Text = field(default_factory=Text)
    """Reading."""
    scheme: Scheme = field(default_factory=Scheme)
    """Scheme."""
    trainer: Trainer = field(default_factory=Trainer)
    """Loop."""
    after: tuple[Rule, ...] = ()
    """Rules in a tuple."""


def load(*argv, yaml=(), presets=None):
    return config.load(Toy, argv, yaml, presets)


def message(*argv, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load(*argv, **kwargs)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- values --------------------------------------------------------------------------------------


def test_defaults():
    assert load() == Toy()


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("lr=1e-4", "lr", 1e-4),
        ("lr=3", "lr", 3.0),
        ("lr=-.inf", "lr", float("-inf")),
        ("max_steps=1_000", "max_steps", 1000),
        ("flag=on", "flag", True),
        ("flag=False", "flag", False),
        ("data=null", "data", None),
        ("data='null'", "data", "null"),
        ('data=""', "data", ""),
        ("data=off", "data", "off"),
        ("data=1e5", "data", "1e5"),
        ("data=[1", "data", "[1"),
        ("data=[1]", "data", "[1]"),
        ("data=a: b=c # d", "data", "a: b=c # d"),
        ("place=a/b", "place", Path("a/b")),
        ("amount=7", "amount", 7),
        ("amount=seven", "amount", "seven"),
        ("betas=[0.8, 1]", "betas", (0.8, 1.0)),
        ("names=[]", "names", ()),
        ("names=[on, 3]", "names", ("on", "3")),
        ("logger=none", "logger", "none"),
        ("scheme.input={bits: 8}", "scheme", Scheme(input=Spec(bits=8))),
        ("scheme.weight.grid=mse", "scheme", Scheme(weight=Spec(grid="mse"))),
        (
            'scheme.rules=[{match: "*.mlp.*", spec: {bits: 3}}, {match: x}]',
            "scheme",
            Scheme(rules=[Rule("*.mlp.*", Spec(bits=3)), Rule("x")]),
        ),
        ("after=[{match: a, spec: {bits: 2}}]", "after", (Rule("a", Spec(bits=2)),)),
    ],
)
def test_value(word, key, value):
    assert getattr(load(word), key) == value
    assert load(word) == dataclasses.replace(Toy(), **{key: value})


def test_optional_section_is_created_by_a_key_below_and_reset_by_null(tmp_path):
    file = write(tmp_path / "a.yaml", "scheme: {input: {bits: 8, grid: mse}}")
    assert load("scheme.input.bits=8").scheme.input == Spec(bits=8)
    assert load(yaml=[file]).scheme.input == Spec(bits=8, grid="mse")
    assert load("scheme.input.grid=absmax", yaml=[file]).scheme.input == Spec(bits=8)
    assert load("scheme.input=null", yaml=[file]).scheme.input is None


def test_result_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().scheme.weight.bits = 3


ERRORS = [
    (["lr"], "lr: expected key=value, for example max_steps=100; --help lists the keys"),
    (["--lr=3"], "--lr=3: options have no dashes, write lr=3"),
    (["lr=1", "lr=2"], "lr is given twice: lr=1 and lr=2"),
    (["lr="], "lr= has no value: must be float"),
    (["data="], "data= has no value: must be text | null. Empty text is written 'data=\"\"'"),
    (["lr=fast"], "lr=fast: must be float"),
    (["lr=[1"], "lr=[1: not valid YAML, expected float"),
    (["lr={a: 1}"], "lr={a: 1}: must be float"),
    (["max_steps=1e3"], "max_steps=1e3: must be int. Write 1000"),
    (["max_steps=true"], "max_steps=true: must be int"),
    (["max_steps=null"], "max_steps=null: null is not allowed here, give int"),
    (["flag=1"], "flag=1: must be true | false"),
    (["logger=cvs"], "logger=cvs: must be csv | none. Did you mean 'csv'?"),
    (["logger=null"], "logger=null: null is not allowed here, give csv | none"),
    (["betas=[1]"], "betas=[1]: 1 values given, 2 wanted: [float, float]"),
    (["names=a"], "names=a: must be list of text"),
    (["names=[a, [b]]"], "names[1]=[b]: must be text"),
    (["amount=[1]"], "amount=[1]: must be int | text"),
    (
        ["scheme=foo"],
        "scheme=foo: scheme is a section; set one of its keys (weight, input, rules), for example "
        "scheme.weight=...",
    ),
    (
        ["scheme.weight=null"],
        "scheme.weight=null: null is not allowed here, give {bits, grid}",
    ),
    (
        ["scheme.weight.bit=3"],
        "unknown key 'scheme.weight.bit'. Did you mean 'scheme.weight.bits'? The keys of "
        "scheme.weight: bits, grid",
    ),
    (
        ["scheme.rules=[{mach: x}]"],
        "unknown key 'scheme.rules[0].mach'. Did you mean 'scheme.rules[0].match'? The keys of "
        "scheme.rules[0]: match, spec",
    ),
    (
        ["scheme.rules=[{spec: null}]"],
        "scheme.rules[0].match has no value; give scheme.rules[0].match=...",
    ),
    (["after=[{spec: null}]"], "after[0].match has no value; give after[0].match=..."),
    (["scheme.weight={bits: 2, bits: 3}"], "scheme.weight.bits is given twice"),
    (
        ["scheme.rules[0].match=x"],
        "scheme.rules[0].match=x: one element of a list cannot be set; set the list as a whole",
    ),
    (
        ["scheme.rules.0=x"],
        "unknown key 'scheme.rules.0': scheme.rules is a list; set it whole, scheme.rules=[...] "
        "(list of {match, spec})",
    ),
    (
        ["lr.max=1"],
        "unknown key 'lr.max': lr is a single value (float) and has no keys below it",
    ),
    (
        ["data=x.txt", "data.column=y"],
        "data is given both as a value (data=x.txt) and as a parent (data.column=y); the options "
        "of data live under text. (such as text.column)",
    ),
    (
        ["data.seqlen=3"],
        "unknown key 'data.seqlen': data is a single value (text | null) and has no keys below "
        "it; the options of data live under text. (such as text.seq_len)",
    ),
    (
        ["scheme.input.bits=8", "scheme.input=null"],
        "scheme.input is given both as a value (scheme.input=null) and as a parent "
        "(scheme.input.bits=8)",
    ),
    (["data=???"], "data=???: this marks a missing value; write the value itself"),
    (["scheme.weight.bits=9"], "scheme.weight.bits=9: 2 to 8"),
    (["scheme.input.bits=4"], "scheme: inputs take 8 bits"),
    (["after=[{match: a, spec: {bits: 1}}]"], "after[0].spec.bits=1: 2 to 8"),
]


@pytest.mark.parametrize(("argv", "expected"), ERRORS, ids=[" ".join(a) for a, _ in ERRORS])
def test_error(argv, expected):
    assert message(*argv) == expected


def test_unknown_key_names_the_same_key_elsewhere_before_a_near_sibling():
    assert message("bits=3").startswith(
        "unknown key 'bits'. Did you mean 'scheme.weight.bits'? The top-level keys: recipe, data,"
    )
    assert message("max_step=3").startswith("unknown key 'max_step'. Did you mean 'max_steps'?")
    assert message("qqqqqq=3").startswith("unknown key 'qqqqqq'. The top-level keys: ")


@pytest.mark.parametrize("value", ["${HOME}/x", "${oc.env:HOME}", "a${", "${", "${a"])
def test_interpolation_is_refused_with_the_remedy(value):
    assert message(f"data={value}") == (
        f"data={value}: ${{...}} is not expanded in values; write the value itself, or let the "
        "shell expand a variable by using double quotes"
    )
    assert message(f"scheme.rules=[{{match: '{value}'}}]").startswith("scheme.rules[0].match=")


# --- YAML files ----------------------------------------------------------------------------------


def test_later_layers_win(tmp_path):
    one = write(tmp_path / "one.yaml", "lr: 1e-2\nmax_steps: 5\ndata: off\nlogger: none\n")
    two = write(tmp_path / "two.yaml", "max_steps: 6\nscheme:\n  rules: [{match: a}]\n")
    got = load("scheme.rules=[]", yaml=[one, two])
    assert got == Toy(lr=1e-2, max_steps=6, data="off", logger="none")


def test_empty_yaml_is_no_delta(tmp_path):
    assert load(yaml=[write(tmp_path / "a.yaml", "# nothing\n")]) == Toy()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1\nscheme:\n  wight: 3\n", ", line 3: unknown key 'scheme.wight'. Did you mean"),
        ("max_steps: x\n", ", line 1: max_steps=x: must be int"),
        ("max_steps:\n", ", line 1: max_steps=null: null is not allowed here, give int"),
        ("lr: 1\nlr: 2\n", ", line 2: lr is given twice"),
        ("lr: [1\n", ", line 2: not valid YAML: "),
        ("- 1\n", ": expected keys and values (max_steps: 100)"),
        ("data: ${HOME}\n", ", line 1: data=${HOME}: ${...} is not expanded in values"),
        ("scheme: 3\n", ", line 1: scheme=3: scheme is a section"),
    ],
)
def test_yaml_error_names_file_and_line(tmp_path, text, expected):
    file = write(tmp_path / "a.yaml", text)
    assert message(yaml=[file]).startswith(f"{file}{expected}")


def test_missing_yaml_file(tmp_path):
    file = tmp_path / "a.yaml"
    assert message(yaml=[file]) == f"{file}: cannot be read: No such file or directory"


def test_yaml_that_is_not_text(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"lr: \xff")
    assert message(yaml=[file]).startswith(f"{file}: not valid YAML: ")


def test_presets_lie_between_the_recipe_and_the_command_line(tmp_path):
    recipe = write(tmp_path / "qat.yaml", "max_steps: 5\nlr: 0.5\ndata: r\n")
    write(tmp_path / "trainer" / "debug.yaml", "max_steps: 2\nlr: 0.25\n")
    write(tmp_path / "model" / "big.yaml", "lr: 0.125\n")
    got = load("lr=2", "preset=trainer/debug", yaml=[recipe], presets=tmp_path)
    assert got == Toy(max_steps=2, lr=2.0, data="r", preset=["trainer/debug"])
    got = load("preset=[trainer/debug, model/big]", yaml=[recipe], presets=tmp_path)
    assert (got.max_steps, got.lr) == (2, 0.125)
    # recipes' own files and paths out of the directory are not presets
    for name in ("trainer/debgu", "qat", "../x"):
        text = message(f"preset={name}", presets=tmp_path)
        assert text.startswith(f"preset={name}: no such preset.")
        assert text.endswith("There are: model/big, trainer/debug")
    assert "Did you mean 'trainer/debug'?" in message("preset=trainer/debgu", presets=tmp_path)


def test_preset_error_names_its_file(tmp_path):
    file = write(tmp_path / "trainer" / "debug.yaml", "max_stesp: 2\n")
    expected = f"{file}, line 1: unknown key 'max_stesp'. Did you mean 'max_steps'?"
    assert message("preset=trainer/debug", presets=tmp_path).startswith(expected)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["data=null", "lr=1e-05", "place=null.txt", "scheme.input.bits=8"],
        ["data='null'", "amount=x", "lr=.inf", "scheme.rules=[{match: '*', spec: {bits: 2}}]"],
        ['data=""', "names=['~', 'true', '1', ' a ', \"x\\ny\"]", "logger=none"],
        ["data=ünïcode: #x", "amount='3'", "after=[{match: a}]", "betas=[0.1, 1e-300]"],
    ],
)
def test_to_yaml_round_trip(tmp_path, argv):
    original = load(*argv)
    file = write(tmp_path / "config.yaml", config.to_yaml(original))
    assert load(yaml=[file]) == original


# --- help ----------------------------------------------------------------------------------------


def test_help_has_every_key_with_default_type_and_meaning(tmp_path):
    recipe = write(tmp_path / "r.yaml", "max_steps: 7\n")
    text = config.help_text(Toy, "title\n\nusage", [recipe], width=80)
    assert text.startswith("title\n\nusage\n\n  recipe=''  (text)\n      Recipe.\n")
    assert "\n  max_steps=7  (int)\n      Steps.\n" in text
    assert "\n  data=null  (text | null)\n      File.\n" in text
    assert "\n  scheme.weight.grid=absmax  (absmax | mse)\n" in text
    assert (
        "\n[scheme.input]  Inputs.\n"
        "  null; setting a key below creates it, scheme.input=null removes it.\n\n"
        "  scheme.input.bits=4  (int)\n" in text
    )
    assert "        match (required)  (text)  Wildcard.\n" in text
    assert max(map(len, text.splitlines())) <= 80


def test_attribute_docs_read_bases():
    @dataclass(frozen=True)
    class Derived(Text):
        extra: int = 0
        """More."""
        bare: int = 0

    assert config.attribute_docs(Derived) == {
        "column": "Column to read.",
        "seq_len": "Tokens per block.",
        "extra": "More.",
    }


def undocumented(schema: type, prefix: str = "") -> list[str]:
    from qat.config_values import element_type, field_types, is_section, strip_optional

    missing = []
    for name, hint in field_types(schema).items():
        if name not in config.attribute_docs(schema):
            missing.append(f"{schema.__name__}.{name}")
        inner = element_type(hint) or strip_optional(hint)[0]
        if is_section(inner):
            missing += undocumented(inner)
    return missing


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_key_of_a_recipe_is_documented_and_its_defaults_load(name):
    recipe = recipes.find(name)
    assert undocumented(recipe.schema()) == []
    loaded = config.load(recipe.schema(), [f"recipe={name}"], [recipe.config_file])
    assert loaded.recipe == name


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_of_a_command_is_documented(name):
    module, _, schema = cli.COMMANDS[name].options.partition(":")
    __import__(module)
    assert undocumented(getattr(sys.modules[module], schema)) == []


# --- resume --------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path):
    saved = load("recipe=toy", "data=d", "output_dir=elsewhere", "lr=0.5")
    write(tmp_path / "run" / "config.yaml", config.to_yaml(saved))
    return tmp_path / "run"


def test_resume_takes_the_saved_configuration(run_dir):
    got = config.load_resume(Toy, ["recipe=toy", f"resume={run_dir}"], run_dir)
    assert got == Toy(recipe="toy", data="d", lr=0.5, resume=str(run_dir), output_dir=str(run_dir))
    assert config.saved_recipe(run_dir) == "toy"


def test_resume_allows_safe_changes(run_dir):
    words = ["logger=none", "trainer.devices=2", "lr=0.5", f"output_dir={run_dir}"]
    got = config.load_resume(Toy, words, run_dir)
    assert (got.logger, got.trainer.devices) == ("none", 2)


def test_resume_does_not_apply_the_recorded_presets_again(run_dir, tmp_path):
    write(tmp_path / "trainer" / "debug.yaml", "lr: 0.25\n")
    saved = load("preset=trainer/debug", "lr=0.5", presets=tmp_path)
    write(run_dir / "config.yaml", config.to_yaml(saved))
    assert config.load_resume(Toy, [], run_dir, tmp_path).lr == 0.5


@pytest.mark.parametrize(
    ("word", "start"),
    [
        ("max_steps=20", "max_steps=20: a resumed run keeps its configuration, and "),
        ("trainer.clip=2", "trainer.clip=2.0: a resumed run keeps its configuration, and "),
        ("lr=0.25", "lr=0.25: a resumed run keeps its configuration, and "),
        ("recipe=other", "recipe=other: a resumed run keeps its configuration, and "),
        ("data=null", "data=null: a resumed run keeps its configuration, and "),
        ("scheme.input.bits=8", "scheme.input.bits=8: a resumed run keeps its configuration, and "),
        ("output_dir=other", "output_dir=other: a resumed run stays in its own directory, "),
        ("lrr=1", "unknown key 'lrr'. Did you mean 'lr'?"),
    ],
)
def test_resume_rejects_other_changes(run_dir, word, start):
    with pytest.raises(UserError) as caught:
        config.load_resume(Toy, [f"resume={run_dir}", word], run_dir)
    assert str(caught.value).startswith(start)


def test_resume_rejects_removing_a_section(run_dir):
    write(run_dir / "config.yaml", config.to_yaml(load("scheme.input.bits=8")))
    with pytest.raises(UserError) as caught:
        config.load_resume(Toy, ["scheme.input=null"], run_dir)
    assert str(caught.value) == (
        f"scheme.input=null: a resumed run keeps its configuration, and {run_dir}/config.yaml has "
        "another value of scheme.input. Only where and how fast it runs may change "
        f"({', '.join(config.RESUME_MAY_CHANGE)}); start a new run for anything else"
    )


def test_resume_rejects_a_key_given_twice(run_dir):
    with pytest.raises(UserError, match="resume is given twice"):
        config.load_resume(Toy, ["resume=a", "resume=b"], run_dir)


def test_resume_without_a_run(tmp_path):
    for path, problem in ((tmp_path, "it has no config.yaml"), (tmp_path / "x", "no such direct")):
        with pytest.raises(UserError) as caught:
            config.load_resume(Toy, [], path)
        assert str(caught.value).startswith(f"resume={path}: {problem}")


def test_saved_recipe_needs_the_key(tmp_path):
    file = write(tmp_path / "config.yaml", "lr: 1\n")
    with pytest.raises(UserError, match="has no key 'recipe', so it is not"):
        config.saved_recipe(file.parent)


# --- exit codes ----------------------------------------------------------------------------------


def raiser(error):
    def fn():
        raise error

    return fn


def test_exit_codes(capsys, monkeypatch):
    monkeypatch.delenv("QAT_DEBUG", raising=False)
    assert run_main(lambda: None) == 0
    assert run_main(lambda: 1) == 1
    assert capsys.readouterr().err == ""
    assert run_main(raiser(UserError("lr=x: must be float"))) == 2
    assert capsys.readouterr().err == "error: lr=x: must be float\n"
    assert run_main(raiser(ValueError("inside"))) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("ValueError: inside\n")
    monkeypatch.setenv("QAT_DEBUG", "1")
    assert run_main(raiser(UserError("lr=x"))) == 2
    assert capsys.readouterr().err.startswith("Traceback (most recent call last):")


def test_interrupt_says_how_to_resume(capsys, tmp_path):
    def fn():
        with resumable(tmp_path, "python train.py resume=x"):
            raise KeyboardInterrupt

    assert run_main(fn) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    write(tmp_path / "config.yaml", "")
    assert run_main(fn) == 130
    expected = "Interrupted. Continue with: python train.py resume=x\n"
    assert capsys.readouterr().err == expected

    def as_lightning_does():
        with resumable(tmp_path, "python train.py resume=x"):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                sys.exit(1)

    assert run_main(as_lightning_does) == 130
    assert capsys.readouterr().err == expected
    with pytest.raises(SystemExit):
        run_main(raiser(SystemExit(3)))


def test_resumable_leaves_user_errors_alone_and_notes_once(tmp_path):
    write(tmp_path / "config.yaml", "")
    with pytest.raises(UserError) as user, resumable(tmp_path, "c"):
        raise UserError("x")
    assert not hasattr(user.value, "__notes__")
    with pytest.raises(RuntimeError) as failed, resumable(tmp_path, "c"), resumable(tmp_path, "c"):
        raise RuntimeError("x")
    assert failed.value.__notes__ == ["Continue with: c"]


def test_full_disk_is_one_message(capsys, tmp_path):
    target = tmp_path / "missing" / "model.safetensors"

    def wrapped():
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        except OSError as error:
            raise RuntimeError("cannot save") from error

    assert run_main(wrapped) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: the disk is full while writing {target}: ")
    assert f"MiB left for {tmp_path}. Free space there" in err
    assert err.endswith("Nothing that was complete has been overwritten.\n")
    assert err.count("\n") == 1
    for error in (
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        OSError("147456 requested and 72512 written"),
    ):
        assert run_main(raiser(error)) == 1
        assert capsys.readouterr().err.startswith("error: the disk is full: ")
    assert run_main(raiser(OSError(errno.EACCES, "Permission denied"))) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_closed_stdout_is_quiet():
    code = (
        "from qat.errors import run_main; import sys; "
        "sys.exit(run_main(lambda: print('x' * 10**6)))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_nearest():
    assert nearest("group_sise", ["group_size", "grid"]) == "group_size"
    assert nearest("zzz", ["group_size", "grid"]) is None
    assert errors.did_you_mean("gird", ["grid"]) == " Did you mean 'grid'?"
    assert errors.did_you_mean("zzz", ["grid"]) == ""


# --- the commands themselves ---------------------------------------------------------------------


def call(*argv, **env):
    """Run Python in the repository; for what an imported module cannot show."""
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "QAT_DEBUG": "", **env},
    )
    return done.returncode, done.stdout, done.stderr


def test_train_lists_the_recipes_without_torch():
    code, out, err = call("-X", "importtime", "train.py")
    assert code == 0
    assert "torch" not in {line.rpartition("|")[2].strip() for line in err.splitlines()}
    for name, recipe in recipes.RECIPES.items():
        assert any(line.split() == [name, *recipe.summary.split()] for line in out.splitlines())
    assert call("train.py", "--help")[:2] == (0, out)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_train_help(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    assert run_main(lambda: train.run([f"recipe={name}", "--help"])) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"{name}: {recipes.find(name).summary}\n")
    assert f"\n  recipe={name}  (text)\n" in out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["recipe=qat_int44"],
            "error: recipe=qat_int44: no such recipe. Did you mean 'qat_int4'? ",
        ),
        (["recipe=qat_int4", "max_step=3"], "error: unknown key 'max_step'. Did you mean "),
        (["recipe=qat_int4", "max_steps=x"], "error: max_steps=x: must be int\n"),
        (["recipe=qat_int4", "data=x.txt", "data.column=y"], "error: data is given both as a "),
        (["recipe=qat_int4", "recipe=qat_int8"], "error: recipe is given twice: "),
        (["recipe=qat_int4", "resume=/nonexistent"], "error: resume=/nonexistent: no such dir"),
        (["resume=/nonexistent"], "error: resume=/nonexistent: no such directory; give the "),
        (["max_steps=3"], "error: no recipe given; add recipe=NAME. There are:\n"),
        (["qat_int4"], "error: qat_int4: expected key=value, "),
        (["recipe=qat_int4", "preset=no/such"], "error: preset=no/such: no such preset."),
    ],
)
def test_train_input_errors(argv, expected, capsys):
    assert run_main(lambda: train.run(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(expected)


def test_train_exit_code():
    code, out, err = call("train.py", "recipe=qat")
    assert (code, out) == (2, "")
    assert err.startswith("error: recipe=qat: no such recipe. ")
    assert "Traceback" not in err


def test_train_runs_a_recipe_and_resumes_it_in_both_forms(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(recipes.Recipe, "schema", lambda self: Toy)
    monkeypatch.setattr(recipes.Recipe, "run", lambda self, config: seen.append(config))
    monkeypatch.setattr(recipes, "CONFIGS", tmp_path)
    write(tmp_path / "qat_int4.yaml", "max_steps: 5\n")
    train.run(["lr=2", "recipe=qat_int4"])
    started = Toy(recipe="qat_int4", max_steps=5, lr=2.0)
    assert seen == [started]
    run = tmp_path / "run"
    write(run / "config.yaml", config.to_yaml(started))
    train.run(["recipe=qat_int4", f"resume={run}"])
    train.run([f"resume={run}", "logger=none"])
    resumed = dataclasses.replace(started, resume=str(run), output_dir=str(run))
    assert seen[1:] == [resumed, dataclasses.replace(resumed, logger="none")]
    with pytest.raises(UserError, match="recipe=qat_int8: a resumed run keeps its configuration"):
        train.run(["recipe=qat_int8", f"resume={run}"])


def test_qat_lists_its_commands_without_torch():
    code, out, err = call("-X", "importtime", "-m", "qat")
    assert code == 0
    assert "torch" not in {line.rpartition("|")[2].strip() for line in err.splitlines()}
    for name, command in cli.COMMANDS.items():
        assert any(line.split() == [name, *command.summary.split()] for line in out.splitlines())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_qat_help(name, capsys):
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    words = " ".join(cli.COMMANDS[name].words)
    assert out.startswith(f"qat {name} {words} [key=value ...]\n\n{cli.COMMANDS[name].summary}\n")


@pytest.fixture
def artifact(tmp_path):
    write(tmp_path / "A" / "config.json", "{}")
    return tmp_path / "A"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["verfy", "A"], "error: verfy: no such command. Did you mean 'verify'? There are: "),
        (["verify"], "error: ARTIFACT is missing; usage: qat verify ARTIFACT [key=value ...]\n"),
        (["verify", "A", "B"], "error: 'B' is one word too many (quote the text?); usage: qat "),
        (["verify", "A", "hash=1"], "error: unknown key 'hash'. Did you mean 'hashes'? "),
        (["verify", "A", "-hashes=false"], "error: -hashes=false: options have no dashes, "),
        (["verify", "A", "--hash"], "error: unknown key 'hash'. Did you mean 'hashes'? "),
        (["verify", "A", "--hashes=1"], "error: hashes=1: must be true | false"),
        (["generate", "A", "x", "--seed"], "error: --seed: its value is missing; write seed=VALUE"),
        (["generate", "A", "x", "--seed", "--chat"], "error: --seed: its value is missing; "),
        (["generate", "A", "x", "--seed", "1", "seed=2"], "error: seed is given twice: "),
        (["verify", "A"], "error: A: not an artifact, it has no manifest.json.\n"),
        (["inspect", "A/x"], "error: A/x: no such directory; give the artifact/ of a finished "),
        (["generate", "A"], "error: PROMPT is missing; usage: qat generate ARTIFACT PROMPT "),
        (
            ["generate", "A", "x=y"],
            "error: PROMPT is missing (one of the form key=value goes after --); usage: ",
        ),
    ],
)
def test_qat_input_errors(artifact, capsys, monkeypatch, argv, expected):
    monkeypatch.chdir(artifact.parent)
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.startswith(expected)


def test_qat_finds_the_artifact_inside_a_run(artifact, capsys):
    run = artifact.parent / "run"
    write(run / "artifact" / "config.json", "{}")
    assert cli.main(["inspect", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"error: {run}: not an artifact, it has no config.json. Did you mean {run}/artifact?\n"
    )


def test_generate_words(artifact, monkeypatch):
    @dataclass(frozen=True)
    class Options:
        count: int = 1
        """How many."""

    seen = []
    command = cli.Command("", "unused", lambda *args: seen.append(args), ("ARTIFACT", "PROMPT"))
    monkeypatch.setitem(cli.COMMANDS, "generate", command)
    monkeypatch.setattr(cli, "_import", lambda path: Options)
    assert cli.main(["generate", str(artifact), "a = b", "count=3"]) == 0
    assert cli.main(["generate", "count=2", str(artifact), "--", "--help=x=1"]) == 0
    assert seen == [(artifact, "a = b", Options(3)), (artifact, "--help=x=1", Options(2))]


def test_dashes_are_another_way_of_writing_options(artifact, monkeypatch):
    @dataclass(frozen=True)
    class Options:
        count: int = 1
        """How many."""
        long_name: str = ""
        """Text."""
        fast: bool = False
        """A flag."""

    seen = []
    command = cli.Command("", "unused", lambda *args: seen.append(args), ("ARTIFACT", "PROMPT"))
    monkeypatch.setitem(cli.COMMANDS, "generate", command)
    monkeypatch.setattr(cli, "_import", lambda path: Options)
    path = str(artifact)
    for words, options in (
        (["--count", "3", path, "p"], Options(3)),
        ([path, "p", "--count=3"], Options(3)),
        ([path, "--count", "-3", "p"], Options(-3)),
        (["--long-name", "a=b c", path, "p"], Options(long_name="a=b c")),
        ([path, "p", "--long_name=--x"], Options(long_name="--x")),
        (["--fast", path, "p", "--count", "2"], Options(2, fast=True)),
        ([path, "p", "--fast", "false"], Options()),
        ([path, "p", "--fast", "yes", "long_name=x"], Options(long_name="x", fast=True)),
        ([path, "p", "--fast"], Options(fast=True)),
    ):
        assert cli.main(["generate", *words]) == 0
        assert seen.pop() == (artifact, "p", options)
    # what is no option stays a word
    for prompt in ("--", "-- a", "--a b", "-5", "--5"):
        assert cli.main(["generate", path, *(["--"] if prompt == "--" else []), prompt]) == 0
        assert seen.pop() == (artifact, prompt, Options())
