"""``qat push``: publish an artifact on the Hugging Face Hub, if it verifies.

Only what the manifest lists is uploaded, with the manifest and the signature, in one commit. Files
of the repository that the artifact does not have are left as they are.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.manifest import MANIFEST, SIGNATURE, read_manifest, sha256
from qat.provenance import converter
from qat.stored_layers import aligned
from qat.verify import verify

LOGIN = (
    "log in with `hf auth login`, or put a token with write access into the environment variable "
    "HF_TOKEN"
)


@dataclass(frozen=True)
class PushOptions:
    """Options of ``qat push``."""

    repo: str
    """Repository, ORG/NAME; it is made if it is not there."""
    private: bool = False
    """Make a new repository private."""
    dry_run: bool = False
    """List what would be uploaded, with sizes and whether it is new; send nothing."""
    revision: str | None = None
    """Branch to commit to; null takes main."""
    message: str | None = None
    """Commit message; null writes one."""


@dataclass(frozen=True)
class Upload:
    """One file that would go up."""

    name: str
    """Name in artifact and repository."""
    size: int
    """Bytes."""
    state: str
    """new, changed, same, or unknown where the repository could not be asked."""


def push(artifact: Path, options: PushOptions) -> str:
    """Verify and upload an artifact; returns what to tell the user.

    Raises:
        UserError: it does not verify, the name of the repository is wrong, no token, no right to
            write there, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(options.repo)
    except HFValidationError as error:
        raise UserError(f"repo={options.repo}: {error}") from None
    if options.repo.count("/") != 1:
        raise UserError(f"repo={options.repo}: ORG/NAME or USER/NAME is needed")
    problems = verify(artifact)
    if problems:
        raise UserError(
            f"{artifact}: does not verify ({len(problems)} problems, first: {problems[0]}), so it "
            "is not published; `qat verify` lists them all. Make or copy it again"
        )
    names = [*read_manifest(artifact)["files"], MANIFEST]
    names += [SIGNATURE] if (artifact / SIGNATURE).is_file() else []
    api = HfApi(library_name="qat-lightning", library_version=converter()["version"])
    if options.dry_run:
        return _listing(artifact, options, *_compare(api, artifact, options, sorted(names)))
    if get_token() is None:
        raise UserError(f"repo={options.repo}: no token for the Hub; {LOGIN}")
    return _upload(api, artifact, options, names)


def _upload(api: Any, artifact: Path, options: PushOptions, names: list[str]) -> str:
    with _hub_errors(options.repo):
        api.create_repo(options.repo, private=options.private or None, exist_ok=True)
        if options.revision is not None:
            api.create_branch(options.repo, branch=options.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=options.repo,
            folder_path=artifact,
            allow_patterns=[_literal(name) for name in names],
            revision=options.revision,
            commit_message=options.message
            or f"Upload {artifact.resolve().name} with qat-lightning",
        )
    uploads, _ = _compare(api, artifact, options, names)
    absent = [upload.name for upload in uploads if upload.state in ("new", "changed")]
    if absent:
        raise UserError(
            f"repo={options.repo}: {', '.join(absent)} did not arrive as it is here, maybe because "
            "of a .gitignore in the repository; remove that and push again"
        )
    total = sum((artifact / name).stat().st_size for name in names)
    return f"{len(names)} files, {total:,} bytes: {commit.commit_url}"


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _compare(
    api: Any, artifact: Path, options: PushOptions, names: list[str]
) -> tuple[list[Upload], str]:
    """What each file is to the repository, and in words what is known of that."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    states = dict.fromkeys(names, "new")
    note = ""
    try:
        found = api.get_paths_info(options.repo, names, revision=options.revision)
        for entry in found:
            path = artifact / entry.path
            same = (
                entry.lfs.sha256 == sha256(path)
                if getattr(entry, "lfs", None)
                else entry.blob_id == _git_blob(path)
            )
            states[entry.path] = "same" if same else "changed"
    except RepositoryNotFoundError:
        note = "the repository is not there, or not visible without a token; it would be made"
    except RevisionNotFoundError:
        note = f"the branch {options.revision} is not there; it would be made"
    except Exception as error:  # offline, a proxy, a server in trouble: nothing is sent anyway
        states = dict.fromkeys(names, "unknown")
        note = f"the repository could not be asked ({_said(error)})"
    return [Upload(n, (artifact / n).stat().st_size, states[n]) for n in names], note


def _git_blob(path: Path) -> str:
    """Git's name of a file's content; files that are not LFS are small."""
    raw = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()


def _listing(artifact: Path, options: PushOptions, uploads: list[Upload], note: str) -> str:
    rows = [(upload.name, f"{upload.size:,} bytes", upload.state) for upload in uploads]
    total = sum(upload.size for upload in uploads)
    rows.append(("total", f"{total:,} bytes", ""))
    where = f"{options.repo}, branch {options.revision or 'main'}"
    head = f"dry run: {artifact} would go to {where}; nothing was sent"
    lines = [head, *([note] if note else []), "", *aligned(rows)]
    return "\n".join(line.rstrip() for line in lines)


def _said(error: BaseException) -> str:
    """The message of an error in one line: the Hub's own words stand in the second of theirs."""
    text = re.sub(r"For more information check: \S+", "", str(error))
    return " ".join(text.split())[:300] or type(error).__name__


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what the Hub refuses into a message that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        raise UserError(f"repo={repo}: {message}") from error


def _explain(error: BaseException) -> str | None:
    """What to tell the user of an error of huggingface_hub or its cause; None for any other."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OfflineModeIsEnabled):
            return "the Hub is switched off here by HF_HUB_OFFLINE; unset it"
        if isinstance(link, HfHubHTTPError):
            status = link.response.status_code if link.response is not None else 0
            if status in (401, 403, 404):
                return f"the Hub refuses ({_said(link)}); {LOGIN}, of an account that may write"
            return f"the Hub answers: {_said(link)}"
        # huggingface_hub has changed its HTTP library between versions, which keep this name
        if any(cls.__name__ == "TransportError" for cls in type(link).__mro__):
            return (
                f"the Hub cannot be reached ({_said(link)}); check the network, then push again: "
                "what was uploaded is not sent twice"
            )
        link = link.__cause__
    return None
