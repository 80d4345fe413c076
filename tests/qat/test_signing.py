"""Signatures: made, checked, and broken by every change."""

import shutil
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from qat import cli
from qat.verify import verify
from tests.qat.artifacts import make_artifact


def write_keys(directory, name, key, password=None):
    """``NAME.pem`` and ``NAME.pub.pem``."""
    encryption = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (directory / f"{name}.pem").write_bytes(private)
    (directory / f"{name}.pub.pem").write_bytes(public)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys")
    write_keys(directory, "ours", ec.generate_private_key(ec.SECP256R1()))
    write_keys(directory, "other", ec.generate_private_key(ec.SECP256R1()))
    write_keys(directory, "locked", ec.generate_private_key(ec.SECP384R1()), b"open sesame")
    write_keys(directory, "rsa", rsa.generate_private_key(65537, 2048))
    (directory / "text.pem").write_text("no key")
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("sign") / "artifact")


@pytest.fixture
def artifact(source, tmp_path):
    return shutil.copytree(source, tmp_path / "artifact")


@pytest.fixture
def signed(artifact, keys, capsys):
    assert cli.main(["sign", str(artifact), f"key={keys / 'ours.pem'}"]) == 0
    assert capsys.readouterr().out == f"signed: {artifact / 'model.sig'}\n"
    return artifact


def check(artifact, key, capsys):
    """Exit code and what is printed of ``qat verify ... public_key=``."""
    code = cli.main(["verify", str(artifact), f"public_key={key}"])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_sign_and_verify(signed, keys, capsys, tmp_path):
    assert verify(signed) == [], "the signature is not an extra file"
    code, said = check(signed, keys / "ours.pub.pem", capsys)
    assert (code, said) == (
        0,
        f"{signed}: every file is as the manifest says, and the signature holds\n",
    )
    assert cli.main(["verify", str(signed)]) == 0
    assert "it is signed, which public_key=FILE would check" in capsys.readouterr().out
    # what a download from the Hub leaves beside the files was not signed, and need not be
    (signed / ".gitattributes").write_text("x")
    (signed / ".cache").mkdir()
    (signed / ".cache" / "x").write_text("x")
    moved = signed.rename(tmp_path / "elsewhere")
    assert check(moved, keys / "ours.pub.pem", capsys)[0] == 0


def test_other_tools_verify_it(signed, keys):
    """The package's own interface, as its command line uses it, with no code of this project."""
    from model_signing import hashing, verifying

    config = verifying.Config().use_elliptic_key_verifier(public_key=keys / "ours.pub.pem")
    config.verify(signed, signed / "model.sig")
    (signed / "README.md").write_text("# other\n")
    ignored = hashing.Config().set_ignored_paths(paths=["model.sig"])
    with pytest.raises(ValueError, match=r"Hash mismatch for .{1,2}README\.md"):
        config.set_hashing_config(ignored).verify(signed, signed / "model.sig")


def test_wrong_key(signed, keys, capsys):
    code, said = check(signed, keys / "other.pub.pem", capsys)
    assert code == 1
    assert "model.sig: does not hold: Key mismatch" in said


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "config.json"])
def test_tampering_with_a_new_manifest(signed, keys, capsys, name):
    """Whoever changes a file and writes a fitting manifest cannot sign it."""
    from qat.manifest import write_manifest

    raw = bytearray((signed / name).read_bytes())
    raw[-2] ^= 1
    (signed / name).write_bytes(raw)
    write_manifest(signed, {"recipe": "qat_int4"})
    assert verify(signed) == []
    code, said = check(signed, keys / "ours.pub.pem", capsys)
    assert code == 1
    changed = ", ".join(sorted([name, "manifest.json"]))
    assert f"model.sig: does not hold: changed since it was signed: {changed}\n" in said


def test_tampering_without(signed, keys, capsys):
    (signed / "README.md").write_text("# other\n")
    code, said = check(signed, keys / "ours.pub.pem", capsys)
    assert code == 1
    assert "README.md: 8 bytes, the manifest says" in said
    assert "model.sig: does not hold" in said
    (signed / "extra.txt").write_text("x")
    said = check(signed, keys / "ours.pub.pem", capsys)[1]
    assert "changed since it was signed: README.md; extra files: extra.txt\n" in said


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_damaged_signature(signed, keys, capsys, place):
    path = signed / "model.sig"
    raw = bytearray(path.read_bytes())
    raw[int(place * len(raw))] ^= 1
    path.write_bytes(raw)
    code, said = check(signed, keys / "ours.pub.pem", capsys)
    assert code == 1
    assert "model.sig: does not hold" in said


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"dsseEnvelope": {}}', "\x00"])
def test_no_signature_at_all(signed, keys, capsys, text):
    (signed / "model.sig").write_text(text)
    assert check(signed, keys / "ours.pub.pem", capsys)[0] == 1
    (signed / "model.sig").unlink()
    code, said = check(signed, keys / "ours.pub.pem", capsys)
    assert code == 1
    assert "model.sig: is not there: the artifact is not signed" in said


def test_signing_twice(signed, keys, capsys):
    words = ["sign", str(signed), f"key={keys / 'other.pem'}"]
    assert cli.main(words) == 2
    assert "exists already; sign anew with replace=true" in capsys.readouterr().err
    assert cli.main([*words, "replace=true"]) == 0
    capsys.readouterr()
    assert check(signed, keys / "other.pub.pem", capsys)[0] == 0
    assert check(signed, keys / "ours.pub.pem", capsys)[0] == 1


def test_encrypted_key(artifact, keys, capsys, monkeypatch):
    words = ["sign", str(artifact), f"key={keys / 'locked.pem'}"]
    for password in (None, "wrong"):
        if password:
            monkeypatch.setenv("QAT_SIGN_PASSWORD", password)
        assert cli.main(words) == 2
        assert "its password (if any) in $QAT_SIGN_PASSWORD" in capsys.readouterr().err
    monkeypatch.setenv("QAT_SIGN_PASSWORD", "open sesame")
    assert cli.main(words) == 0
    capsys.readouterr()
    assert check(artifact, keys / "locked.pub.pem", capsys)[0] == 0


@pytest.mark.parametrize("name", ["rsa.pem", "text.pem", "ours.pub.pem", "none.pem"])
def test_keys_that_do_not_do(artifact, keys, capsys, name):
    before = sorted(artifact.iterdir())
    assert cli.main(["sign", str(artifact), f"key={keys / name}"]) == 2
    assert f"error: key={keys / name}: " in capsys.readouterr().err
    assert sorted(artifact.iterdir()) == before
    if name != "ours.pub.pem":
        code, said = check(artifact, keys / name, capsys)
        assert code == 2
        assert f"error: public_key={keys / name}: " in said


def test_a_private_key_must_not_be_published(artifact, keys, capsys):
    shutil.copy(keys / "ours.pem", artifact / "key.pem")
    assert cli.main(["sign", str(artifact), f"key={artifact / 'key.pem'}"]) == 2
    assert "lies in the artifact" in capsys.readouterr().err


def test_what_does_not_verify_is_not_signed(artifact, keys, capsys):
    (artifact / "README.md").write_text("# other\n")
    assert cli.main(["sign", str(artifact), f"key={keys / 'ours.pem'}"]) == 2
    assert "does not verify (1 problems, first: README.md: " in capsys.readouterr().err
    assert not (artifact / "model.sig").exists()


def test_missing_package(signed, keys, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    code, said = check(signed, keys / "ours.pub.pem", capsys)
    assert code == 2
    assert 'pip install "qat-lightning[sign]"' in said
    assert cli.main(["sign", str(signed), f"key={keys / 'ours.pem'}", "replace=true"]) == 2
    assert 'pip install "qat-lightning[sign]"' in capsys.readouterr().err
