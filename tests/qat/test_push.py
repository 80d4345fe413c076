"""Publishing over HTTP: the real client against a server of this test."""

import os
import subprocess
import sys

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from qat import cli
from qat.manifest import write_manifest
from tests.qat.artifacts import make_artifact
from tests.qat.hub_server import TOKEN, running_hub

# huggingface_hub 2.4 hands the parts of a file to its HTTP library in a form that is being retired
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("push") / "artifact")


@pytest.fixture
def artifact(source, tmp_path):
    copy = tmp_path / "artifact"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture
def push(artifact, hub, tmp_path, monkeypatch, capsys):
    """``qat push`` in this process, its client turned to the server of the test."""
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def call(*words, repo="some-org/tiny", token=TOKEN, endpoint=None, offline=False):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint or hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_TOKEN", token or "")
        close_session()  # it remembers whether it is offline
        code = cli.main(["push", str(artifact), f"repo={repo}", *words])
        return code, *capsys.readouterr()

    yield call
    close_session()


def contents(artifact):
    return {path.name: path.read_bytes() for path in artifact.iterdir()}


def test_upload(push, artifact, hub):
    """All files arrive, weights through LFS; a second push sends only what changed."""
    (artifact / ".gitattributes").write_text("not part of the artifact")
    code, out, err = push("private=true", "message=first")
    assert code == 0, err
    expected = contents(artifact)
    del expected[".gitattributes"]
    assert hub.files("some-org/tiny") == expected
    assert hub.repos["some-org/tiny"]["private"] is True
    assert hub.repos["some-org/tiny"]["messages"] == ["first"]
    total = sum(map(len, expected.values()))
    assert out.startswith(
        f"{len(expected)} files, {total:,} bytes: {hub.url}/some-org/tiny/commit/"
    )
    assert list(hub.blobs.values()) == [expected["model.safetensors"]]
    kinds = [request.split("/")[-2] for request in hub.requests]
    assert [k for k in kinds if k in ("repos", "preupload", "objects", "lfs", "commit")] == [
        "repos", "preupload", "objects", "lfs", "commit",
    ]  # fmt: skip

    (artifact / "README.md").write_text("# another card\n")
    (artifact / "manifest.json").unlink()
    write_manifest(artifact, {})
    hub.requests.clear()
    code, out, err = push("dry_run=true")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].endswith("would go to some-org/tiny, branch main; nothing was sent")
    states = {words[0]: words[-1] for words in (line.split() for line in lines) if len(words) == 4}
    assert states == {name: "same" for name in expected} | {
        "README.md": "changed",
        "manifest.json": "changed",
    }
    assert not [r for r in hub.requests if r.startswith("POST") and "/paths-info/" not in r]
    assert hub.files("some-org/tiny")["README.md"] != b"# another card\n"
    assert push()[0] == 0
    assert hub.files("some-org/tiny")["README.md"] == b"# another card\n"
    assert not any(request.startswith("PUT") for request in hub.requests), "weights went up twice"


def test_branch_of_its_own(push, artifact, hub):
    code, _, err = push("revision=v2")
    assert code == 0, err
    assert hub.files("some-org/tiny") == {}
    assert hub.files("some-org/tiny", "v2") == contents(artifact)
    assert hub.repos["some-org/tiny"]["messages"] == ["Upload artifact with qat-lightning"]


def test_dry_run_before_the_repository_exists(push, artifact, hub):
    code, out, err = push("dry_run=true")
    assert code == 0, err
    assert "it would be made" in out
    total = sum(path.stat().st_size for path in artifact.iterdir())
    size = (artifact / "model.safetensors").stat().st_size
    cells = [line.split() for line in out.splitlines()]
    assert ["model.safetensors", f"{size:,}", "bytes", "new"] in cells
    assert ["total", f"{total:,}", "bytes"] in cells
    assert hub.repos == {}


def test_dry_run_offline(push):
    code, out, _ = push("dry_run=true", offline=True)
    assert code == 0
    assert "the repository could not be asked" in out
    assert ["manifest.json", "unknown"] in [
        [w[0], w[-1]] for w in map(str.split, out.splitlines()) if w
    ]


def test_what_does_not_verify_is_refused(push, artifact, hub):
    path = artifact / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    for words in ([], ["dry_run=true"]):
        code, out, err = push(*words)
        assert (code, out) == (2, "")
        assert "does not verify (1 problems, first: model.safetensors: bytes " in err
        assert "so it is not published" in err
    path.unlink()
    assert push()[0] == 2
    assert hub.repos == {}


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "a b/c", "some-org/tiny..git", ""])
def test_wrong_names(push, artifact, hub, repo):
    code, _, err = push(repo=repo)
    assert code == 2
    assert err.startswith("error: repo")
    assert hub.repos == {}


def test_refusals(push, artifact, hub):
    code, out, err = push(token=None)
    assert (code, out, hub.repos) == (2, "", {})
    assert "no token for the Hub" in err
    assert "`hf auth login`" in err
    assert "HF_TOKEN" in err
    code, _, err = push(token="hf_of_somebody_else")
    assert code == 2
    assert "the Hub refuses" in err
    assert "`hf auth login`" in err
    code, _, err = push(endpoint="http://127.0.0.1:9")
    assert code == 2
    assert "the Hub cannot be reached" in err
    code, _, err = push(offline=True)
    assert code == 2
    assert "unset it" in err


def test_failures_in_the_middle(push, artifact, hub):
    """Nothing is committed when an upload fails; what does not arrive is said."""
    hub.broken_uploads = True
    code, _, err = push()
    assert code == 2
    assert "the Hub answers: Bad request: no more room" in err
    assert hub.files("some-org/tiny") == {}
    hub.broken_uploads, hub.ignored = False, {"config.json"}
    code, _, err = push()
    assert code == 2
    assert "config.json did not arrive" in err
    assert ".gitignore" in err


def test_as_a_command(artifact, hub):
    """In a process of its own, set up by the environment alone."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(artifact.parent), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-m", "qat", "push", str(artifact), "repo=some-org/tiny"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.files("some-org/tiny") == contents(artifact)
