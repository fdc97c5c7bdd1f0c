"""A Hub on this machine: enough of its HTTP interface for huggingface_hub and datasets, with repositories in memory."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
LARGE = (".safetensors", ".parquet", ".arrow", ".bin")  # served by redirection, as the Hub does with large files


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by commit
    refs: dict[str, str] = field(default_factory=dict)
    access: str = "open"  # "gated", "private"
    token: str = ""  # that opens it

    def push(self, files: dict[str, bytes | str], branch: str = "main") -> str:
        """A commit, which becomes the branch's."""
        files = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        commit = hashlib.sha1(repr((sorted(files.items()), branch, len(self.commits))).encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit


class FakeHub(ThreadingHTTPServer):
    """The server. faults: {part of a path: status, or "cut", "slow"}; asked: (method, path) of all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: dict[str, int | str] = {}
        self.asked: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def repo(self, id: str, kind: str = "models") -> Repo:
        return self.repos.setdefault((kind, id), Repo())

    def files_asked(self) -> set[str]:
        """Names of the files whose bytes were sent."""
        return {path.rpartition("/")[2] for method, path in self.asked if method == "GET" and "/api/" not in path}

    def handle_error(self, request: object, address: object) -> None:
        pass  # whoever asked has gone

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.0"  # no connection outlives its answer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())

    def answer(self, body: str = "") -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        fault = next((fault for part, fault in self.server.faults.items() if part in path), None)
        if isinstance(fault, int):
            return self.send(fault, b"no", {})
        if fault == "slow":
            time.sleep(30)
        raw = urlsplit(self.path).path  # a revision's slashes are escaped in there
        if match := API.fullmatch(raw):
            return self.api(*match.groups(), body)
        if match := FILE.fullmatch(raw):
            return self.file(match[1] or "models", match[2], unquote(match[3]), unquote(match[4]))
        if raw.startswith("/cdn/"):
            data = next(f[1] for r in self.server.repos.values() for c in r.commits.values() for f in c.items()
                        if hashlib.sha256(f[1]).hexdigest() == raw.split("/")[2])  # fmt: skip
            return self.send(200, data, {}, cut=fault == "cut")
        self.send(404, b"", {})

    def opened(self, kind: str, id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files), or an answer is sent."""
        repo = self.server.repos.get((kind, id))
        may = repo and (repo.access == "open" or self.headers.get("Authorization") == f"Bearer {repo.token}")
        if not repo or (not may and repo.access == "private"):
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if not may and "/resolve/" in self.path:  # what there is may be seen
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        return commit, repo.commits[commit]

    def api(self, kind: str, id: str, what: str | None, revision: str | None, path: str | None, body: str) -> None:
        if not (found := self.opened(kind, id, unquote(revision or "main"))):
            return None
        commit, files = found
        if what in (None, "revision"):
            listed = [{"rfilename": name} for name in files]
            return self.json({"id": id, "_id": "0", "sha": commit, "siblings": listed, "tags": [], "private": False})
        entries = [_entry(name, data) for name, data in files.items()]
        folders = {"/".join(name.split("/")[:n]) for name in files for n in range(1, name.count("/") + 1)}
        entries += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
        if what == "paths-info":
            wanted = [name.rstrip("/") for name in parse_qs(body).get("paths", [])]
            return self.json([entry for entry in entries if entry["path"] in wanted])
        home = f"{unquote(path)}/" if path else ""
        below = [entry for entry in entries if entry["path"].startswith(home)]
        if home and not below:
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such path"})
        if parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() != "true":
            below = [entry for entry in below if "/" not in entry["path"].removeprefix(home)]
        return self.json(below)

    def file(self, kind: str, id: str, revision: str, path: str) -> None:
        if not (found := self.opened(kind, id, revision)):
            return None
        commit, files = found
        if path not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
            return self.send(404, b"", headers)
        data = files[path]
        sha = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{sha[:40]}"'}
        if path.endswith(LARGE):
            cdn = f"http://localhost:{self.server.server_port}"  # another host: the token does not go there
            headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
            return self.send(302, b"", headers | {"Location": f"{cdn}/cdn/{sha}/{quote(path)}"})
        return self.send(200, data, headers)

    def json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, data: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A Hub with nothing in it, an empty cache, and an empty current folder."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    datasets = pytest.importorskip("datasets")
    constants, server = huggingface_hub.constants, FakeHub()
    environment = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "hf"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield server
    server.close()
    huggingface_hub.HfFileSystem.clear_instance_cache()
