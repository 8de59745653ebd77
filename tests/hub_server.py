"""A small Hub on the loopback address, for tests of the real ``huggingface_hub`` client.

It keeps repositories in memory and speaks the parts of the protocol that publishing and loading
need: creating, pre-upload, LFS upload with verification, commits, listing, and resolving files.
The client reads ``HF_ENDPOINT`` when it is imported, so give it to a fresh process:

    with HubServer() as hub:
        subprocess.run([sys.executable, "script.py"], env={**os.environ, **hub.environment(home)})
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_onlyForTheTestServer"
USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow")


@dataclass
class Repo:
    """One repository: every commit is a whole tree, the last one is the head."""

    kind: str
    name: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit({}, "main")

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        """The tree at a branch or a commit, or None if there is no such revision."""
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, files: dict[str, bytes], branch: str) -> str:
        sha = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


class HubServer:
    """Serves inside its ``with`` block; ``repos`` and ``requests`` may be looked at any time."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}  # ("model" or "dataset", "owner/name")
        self.uploads: dict[str, bytes] = {}  # LFS content by SHA-256
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads = True
        self._http.hub = self  # type: ignore[attr-defined]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def repo(self, name: str, kind: str = "model") -> Repo:
        return self.repos[kind, name]

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What a client process needs: this endpoint, an empty cache of its own, no xet."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Refusal(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+?)"
_API = rf"/api/(?P<kind>model|dataset)s/{_REPO}"
_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"{_API}(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", rf"{_API}/branch/(?P<revision>[^/]+)", "create_branch"),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/(?P<kind>datasets/)?{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    ("GET", rf"/(?P<kind>datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        """Quiet: the tests read ``HubServer.requests`` instead."""

    def _answer(self) -> None:
        self.body = self._read_body()  # always, or the next request on this connection is garbled
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for verb, pattern, name in _ROUTES:
                if verb == method and (match := re.fullmatch(pattern, path)):
                    groups = {key: unquote(value or "") for key, value in match.groupdict().items()}
                    action: Callable[..., None] = getattr(self, f"_{name}")
                    return action(**groups)
            raise _Refusal(404, "", f"this test server knows no {method} {path}")
        except _Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), "X-Error-Code": refusal.code}
            self._send_json({"error": str(refusal)}, refusal.status, **headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    # -- reading and writing ------------------------------------------------------------------

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value: Any, status: int = 200, **headers: str) -> None:
        headers = {"Content-Type": "application/json", **headers}
        self._send(json.dumps(value).encode(), status, **headers)

    def _send_range(self, content: bytes, **headers: str) -> None:
        """The whole content, or the part that a Range header asks for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._send(content, Accept_Ranges="bytes", **headers)
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        last = min(last, len(content) - 1)
        span = f"bytes {first}-{last}/{len(content)}"
        return self._send(content[first : last + 1], 206, Content_Range=span, **headers)

    def _authorised(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        return given is not None

    def _require_token(self) -> None:
        if not self._authorised():
            raise _Refusal(401, "", "Invalid username or password.")

    def _repo(self, kind: str, name: str) -> Repo:
        kind = "dataset" if kind.startswith("dataset") else "model"
        found = self.hub.repos.get((kind, name))
        if found is None or (found.private and not self._authorised()):
            raise _Refusal(
                404 if self._authorised() else 401, "RepoNotFound", "Repository not found"
            )
        return found

    def _tree_of(self, repo: Repo, revision: str) -> dict[str, bytes]:
        files = repo.files(revision or "main")
        if files is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files

    # -- the account and the repositories -----------------------------------------------------

    def _whoami(self) -> None:
        self._require_token()
        access = {"role": "write", "displayName": "test"}
        auth = {"type": "access_token", "accessToken": access}
        self._send_json({"type": "user", "name": USER, "orgs": [], "auth": auth})

    def _create(self) -> None:
        self._require_token()
        wanted = json.loads(self.body)
        owner, kind = wanted.get("organization") or USER, wanted.get("type") or "model"
        if owner != USER:
            raise _Refusal(403, "", f"You don't have the rights to create a {kind} under {owner}")
        name = f"{owner}/{wanted['name']}"
        prefix = "datasets/" if kind == "dataset" else ""
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        with self.hub.lock:
            known = (kind, name) in self.hub.repos
            if not known:
                self.hub.repos[kind, name] = Repo(kind, name, private)
        url = f"{self.hub.endpoint}/{prefix}{name}"
        self._send_json({"url": url, "name": name, "id": name}, 409 if known else 200)

    def _validate_yaml(self) -> None:
        front = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(front[1]) if front else {}
            errors = [] if isinstance(data, dict) else [{"message": "metadata is not a mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        warnings = [] if front else [{"message": "empty or missing yaml metadata in repo card"}]
        self._send_json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def _info(self, kind: str, repo: str, revision: str) -> None:
        found = self._repo(kind, repo)
        files = self._tree_of(found, revision)
        sha = next(sha for sha, tree in found.commits.items() if tree is files)
        info = {"_id": "0", "id": repo, "modelId": repo, "author": USER, "sha": sha}
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._send_json({**info, "private": found.private, "siblings": siblings, "tags": []})

    def _create_branch(self, kind: str, repo: str, revision: str) -> None:
        self._require_token()
        found = self._repo(kind, repo)
        found.branches.setdefault(revision, found.branches["main"])
        self._send_json({})

    def _tree(self, kind: str, repo: str, revision: str, path: str) -> None:
        files = self._tree_of(self._repo(kind, repo), revision)
        start = f"{path}/" if path else ""
        inside = [name for name in sorted(files) if name.startswith(start)]
        if path and not inside:
            raise _Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0] == "true"
        folders = {str(parent) for name in inside for parent in PurePosixPath(name).parents}
        entries = [
            _folder(name) for name in sorted(folders - {".", path}) if name.startswith(start)
        ]
        entries += [_entry(name, files[name]) for name in inside]
        self._send_json([e for e in entries if recursive or "/" not in e["path"][len(start) :]])

    def _paths_info(self, kind: str, repo: str, revision: str) -> None:
        files = self._tree_of(self._repo(kind, repo), revision)
        wanted = json.loads(self.body)["paths"]
        folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
        entries = [_entry(name, files[name]) for name in wanted if name in files]
        self._send_json(entries + [_folder(name) for name in wanted if name in folders - {"."}])

    # -- uploading ----------------------------------------------------------------------------

    def _preupload(self, kind: str, repo: str, revision: str) -> None:
        self._require_token()
        files = self._tree_of(self._repo(kind, repo), revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            known = _entry(path, files[path])["oid"] if path in files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self._send_json({"files": answer})

    def _lfs_batch(self, kind: str, repo: str) -> None:
        self._require_token()
        self._repo(kind, repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.uploads:
                href = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(entry)
        self._send_json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "", "the content does not have this SHA-256")
        self.hub.uploads[oid] = self.body
        self._send(b"")

    def _lfs_verify(self, oid: str) -> None:
        content = self.hub.uploads.get(oid)
        if content is None or len(content) != json.loads(self.body)["size"]:
            raise _Refusal(404, "", f"object {oid} was not uploaded whole")
        self._send_json({})

    def _commit(self, kind: str, repo: str, revision: str) -> None:
        self._require_token()
        with self.hub.lock:
            found = self._repo(kind, repo)
            files = dict(self._tree_of(found, revision))
            for line in self.body.splitlines():
                _apply(files, self.hub.uploads, **json.loads(line))
            sha = found.commit(files, revision)
        url = f"{self.hub.endpoint}/{repo}/commit/{sha}"
        self._send_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    # -- downloading --------------------------------------------------------------------------

    def _resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        found = self._repo(kind, repo)
        files = self._tree_of(found, revision)
        commit = {"X-Repo-Commit": found.branches.get(revision, revision)}
        if path not in files:
            raise _Refusal(404, "EntryNotFound", f"Entry not found: {path}")
        etag = _entry(path, files[path])["oid"]
        self._send_range(files[path], ETag=f'"{etag}"', **commit)


def _folder(name: str) -> dict[str, Any]:
    return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file in a listing: the git id of a small file, the SHA-256 of a large one."""
    sha = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": sha}
    if path.endswith(LFS_SUFFIXES):
        sha = hashlib.sha256(content).hexdigest()
        entry.update(oid=sha, lfs={"oid": sha, "size": len(content), "pointerSize": 134})
    return entry


def _apply(
    files: dict[str, bytes], uploads: dict[str, bytes], key: str, value: dict[str, Any]
) -> None:
    """One line of a commit."""
    if key == "file":
        files[value["path"]] = base64.b64decode(value["content"])
    elif key == "lfsFile":
        if value["oid"] not in uploads:
            raise _Refusal(400, "", f"object {value['oid']} was never uploaded")
        files[value["path"]] = uploads[value["oid"]]
    elif key == "deletedFile":
        files.pop(value["path"], None)
    elif key == "deletedFolder":
        for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
            del files[path]
