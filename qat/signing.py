"""Signing an artifact with OpenSSF model-signing, offline, with an elliptic-curve key.

``manifest.json`` finds damage; a signature says who made the artifact. ``model.sig`` is a sigstore
bundle over the SHA-256 of every file (the manifest among them), as the command ``model_signing``
of that package writes and verifies it too. Keys are PEM files on secp256r1, secp384r1 or
secp521r1::

    openssl ecparam -name prime256v1 -genkey -noout -out private.pem
    openssl ec -in private.pem -pubout -out public.pem
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.manifest import HUB_FILES, SIGNATURE
from qat.verify import Problem, verify

# an RSA key shows as an attribute that is not there
_KEY_ERRORS = (ValueError, TypeError, AttributeError)

PASSWORD = "QAT_SIGN_PASSWORD"
"""Environment variable with the password of an encrypted private key."""


@dataclass(frozen=True)
class SignOptions:
    """Options of ``qat sign``."""

    key: str
    """Private key, a PEM file; the password of an encrypted one comes from $QAT_SIGN_PASSWORD."""
    replace: bool = False
    """Replace the signature that is there."""


def sign(artifact: Path, options: SignOptions) -> Path:
    """Write ``model.sig`` into an artifact; returns its path.

    Raises:
        UserError: the artifact does not verify or is signed already, the key cannot be read or is
            of another kind, or the package model-signing is missing.
    """
    key = Path(options.key).expanduser()
    if not key.is_file():
        raise UserError(f"key={options.key}: no such file; give a private key in PEM form")
    target = artifact / SIGNATURE
    if target.exists() and not options.replace:
        raise UserError(f"{target} exists already; sign anew with replace=true")
    if key.resolve().is_relative_to(artifact.resolve()):
        raise UserError(f"key={options.key}: lies in the artifact; a private key must not be there")
    signing, _, hashing = _package()
    problems = verify(artifact)
    if problems:
        raise UserError(
            f"{artifact}: does not verify ({len(problems)} problems, first: {problems[0]}), so it "
            "is not signed; `qat verify` lists them all"
        )
    password = os.environ.get(PASSWORD)
    try:
        config = signing.Config().use_elliptic_key_signer(
            # bytes, whatever the package's hint says: it hands them to cryptography as they are
            private_key=key,
            password=None if password is None else password.encode(),
        )
    except _KEY_ERRORS as error:
        raise UserError(
            f"key={options.key}: cannot be used ({_first(error)}). A PEM file with a private key "
            f"on secp256r1, secp384r1 or secp521r1 is needed, its password (if any) in ${PASSWORD}"
        ) from error
    # beside the final name, which is ignored too, so that the file appears whole
    temporary = target.with_name(f".{SIGNATURE}.partial")
    ignored = [SIGNATURE, temporary.name, *HUB_FILES]
    config.set_hashing_config(
        hashing.Config().set_ignored_paths(paths=ignored).set_allow_symlinks(True)
    )
    try:
        config.sign(artifact, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def verify_signature(artifact: Path, public_key: str) -> list[Problem]:
    """Check ``model.sig`` against a public key and the files; an empty list means that all is well.

    Raises:
        UserError: the key cannot be read, or the package model-signing is missing.
    """
    key = Path(public_key).expanduser()
    if not key.is_file():
        raise UserError(f"public_key={public_key}: no such file; give a public key in PEM form")
    _, verifying, _ = _package()
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except _KEY_ERRORS as error:
        raise UserError(
            f"public_key={public_key}: cannot be used ({_first(error)}). A PEM file with the "
            "public key of the one that signed is needed"
        ) from error
    if not (artifact / SIGNATURE).is_file():
        return [Problem("signature", SIGNATURE, "is not there: the artifact is not signed")]
    try:
        config.verify(artifact, artifact / SIGNATURE)
    except Exception as error:  # a forged bundle can make the readers fail in any way
        return [Problem("signature", SIGNATURE, f"does not hold: {_why(error)}")]
    return []


def _why(error: Exception) -> str:
    """The files that are not the signed ones, where the package names them; else its message."""
    text = _first(error)
    changed = re.findall(r"Hash mismatch for \\?'(.+?)\\?'", text)
    others = re.findall(r"((?:Extra|Missing) files) (?:found )?in model .*?: (.+?)[\"'\]]", text)
    parts = [f"changed since it was signed: {', '.join(changed)}"] if changed else []
    parts += [f"{kind.lower()}: {names}" for kind, names in others]
    return "; ".join(parts) or text[:300]


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _package() -> tuple[Any, Any, Any]:
    """The modules signing, verifying and hashing of model-signing."""
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise UserError(
            f"signatures need a package that is not installed ({_first(error)}): "
            'pip install "qat-lightning[sign]"'
        ) from error
    return signing, verifying, hashing
