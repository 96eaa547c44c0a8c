"""A small server that speaks the protocol of the Hugging Face Hub: files, revisions, commits, uploads."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token"


@dataclass
class Hub:
    """What the server has: per model, the files of each commit, the newest last. lfs: uploaded objects by SHA-256."""

    url: str = ""
    models: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def files(self, model: str) -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.models[model][-1][1]

    def commit(self, model: str, files: dict[str, bytes]) -> str:
        """Adds a commit; returns its name."""
        sha = hashlib.sha1(f"{model} {len(self.models[model])}".encode()).hexdigest()
        self.models[model].append((sha, files))
        return sha


@contextmanager
def serving() -> Iterator[Hub]:
    """Runs the server on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _no(self, status: int, code: str) -> None:
        self._answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _commit_of(self, model: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.hub.models[model]
        if revision == "main":
            return commits[-1]
        return next((one for one in commits if one[0] == revision), None)

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if not self._known:
            return self._no(401, "Unauthorized")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.hub.models:
                return self._answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
            self.hub.models[name] = []
            self.hub.commit(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            return self._answer(200, {"url": f"{self.hub.url}/{name}"})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".npz")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            files = dict(self.hub.files(found[1]))
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.lfs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            sha = self.hub.commit(found[1], files)
            return self._answer(200, {"commitUrl": f"{self.hub.url}/{found[1]}/commit/{sha}", "commitOid": sha})
        self._no(404, "EntryNotFound")

    def do_PUT(self) -> None:
        data = self._body()
        self.hub.lfs[hashlib.sha256(data).hexdigest()] = data
        self._answer(200, b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?", path)
        if found is None or found[1] not in self.hub.models or (found[1] in self.hub.private and not self._known):
            return self._no(401 if not self._known else 404, "RepoNotFound")
        model, what, revision, name = found[1], found[2] or "revision", found[3] or "main", found[4]
        commit = self._commit_of(model, revision)
        if commit is None:
            return self._no(404, "RevisionNotFound")
        sha, files = commit
        if what == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self._answer(
                200, {"_id": "1", "id": model, "sha": sha, "private": model in self.hub.private, "siblings": siblings}
            )
        if what == "tree":
            return self._answer(200, [_entry(file, data) for file, data in files.items()])
        if name not in files:
            return self._no(404, "EntryNotFound")
        self._answer(200, files[name], {"ETag": f'"{_entry(name, files[name])["oid"]}"', "X-Repo-Commit": sha})


def _entry(path: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}
