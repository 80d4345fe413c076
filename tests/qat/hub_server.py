"""A server on this machine that speaks the endpoints of the Hub which an upload needs.

Paths and answers as in the Hub's API (https://huggingface.co/docs/hub/api) and the batch API of Git
LFS (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md).
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_token_of_the_test"


class Hub:
    """The state of the server: repositories with their files, and what was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[str, dict[str, Any]] = {}
        """Name → private, branches (name → files by path), messages."""
        self.blobs: dict[str, bytes] = {}
        """LFS objects by sha256."""
        self.requests: list[str] = []
        """Method and path of each request."""
        self.ignored: set[str] = set()
        """Names that a .gitignore of the repository would leave out."""
        self.broken_uploads = False
        """Answer uploads of LFS objects with an error."""

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        found: dict[str, bytes] = self.repos[repo]["branches"][branch]
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None: ...

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def do_GET(self) -> None:
        self.answer("GET")

    def answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{method} {path}")
        status, content = self.route(method, path.strip("/").split("/"), body)
        raw = json.dumps({"error": content} if isinstance(content, str) else content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        if status >= 400:
            self.send_header("X-Error-Message", str(content))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(raw)

    def route(self, method: str, parts: list[str], body: bytes) -> tuple[int, Any]:
        hub = self.hub
        if parts[0] == "lfs":  # signed links have no token
            return self.upload(parts[1], body)
        repo = "/".join(parts[2:4]) if parts[:2] == ["api", "models"] else "/".join(parts[:2])
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if parts[:2] == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}
        if not allowed:
            return 401, "Invalid username or password."
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self.batch(json.loads(body))
        if repo not in hub.repos:
            return 404, "Repository not found"
        branches = hub.repos[repo]["branches"]
        if parts[4] == "branch":
            if parts[5] in branches:
                return 409, "Reference already exists"
            branches[parts[5]] = dict(branches["main"])
            return 200, {}
        files = branches[parts[5]]
        if parts[4] == "preupload":
            return 200, {"files": [self.mode(f, files) for f in json.loads(body)["files"]]}
        if parts[4] == "paths-info":
            return 200, self.infos(body, files)
        if parts[4] == "commit":
            return self.commit(repo, files, body)
        return 404, f"{method} {'/'.join(parts)}"

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        if name in self.hub.repos:
            return 409, {
                "error": "You already created this model repo",
                "url": f"{self.hub.url}/{name}",
            }
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[name] = {"private": private, "branches": {"main": {}}, "messages": []}
        return 200, {"url": f"{self.hub.url}/{name}", "name": name}

    def mode(self, file: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        name = file["path"]
        mode = "lfs" if name.endswith(".safetensors") else "regular"
        ignored = name in self.hub.ignored
        return {"path": name, "uploadMode": mode, "shouldIgnore": ignored, "oid": None}

    def batch(self, asked: dict[str, Any]) -> tuple[int, Any]:
        objects = []
        for wanted in asked["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                href = f"{self.hub.url}/lfs/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}

    def upload(self, oid: str, body: bytes) -> tuple[int, Any]:
        if self.hub.broken_uploads:
            return 400, "no more room"
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        return 200, {}

    def infos(self, body: bytes, files: dict[str, bytes]) -> list[dict[str, Any]]:
        from urllib.parse import parse_qs

        text = body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        infos = []
        for name in asked:
            if name in files:
                raw = files[name]
                blob = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
                info = {"type": "file", "path": name, "size": len(raw), "oid": blob}
                if name.endswith(".safetensors"):
                    sha256 = hashlib.sha256(raw).hexdigest()
                    info["lfs"] = {"oid": sha256, "size": len(raw), "pointerSize": 1}
                infos.append(info)
        return infos

    def commit(self, repo: str, files: dict[str, bytes], body: bytes) -> tuple[int, Any]:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.repos[repo]["messages"].append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """The server, on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
