"""As much of the Hugging Face Hub as takes a folder: repositories, large files, commits. On loopback, in a thread."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_test"


class FakeHub(ThreadingHTTPServer):
    """repositories: name -> {"private": bool, "files": {path: bytes}, "commits": [message]}.

    fault: (text, status) of the answer to requests whose path holds the text."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.blobs, self.asked, self.fault = {}, {}, [], None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(404)

    def do_GET(self):
        name, _, rest = self.path.removeprefix("/api/models/").partition("/tree/")
        repository = self.server.repositories.get(name.partition("?")[0].partition("/revision")[0])
        if repository is None:
            return self.answer(404)
        if rest:
            rows = [
                {"type": "file", "oid": "0" * 40, "size": len(x), "path": p} for p, x in repository["files"].items()
            ]
            return self.answer(200, rows)
        siblings = [{"rfilename": path} for path in repository["files"]]
        self.answer(200, {"id": name, "private": repository["private"], "sha": "a" * 40, "siblings": siblings})

    def do_PUT(self):
        body = self.body()
        self.server.blobs[self.path.rpartition("/")[2]] = body
        self.answer(200)

    def do_POST(self):
        body, hub = self.body(), self.server
        hub.asked.append(self.path)
        if hub.fault and hub.fault[0] in self.path:
            return self.answer(hub.fault[1], {"error": "as the test wants it"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        name, _, action = self.path.removeprefix("/api/models/").removeprefix("/").rpartition("/")
        if self.path.endswith("/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "shouldIgnore": False, **mode(f["path"])} for f in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            return self.commit(name.removesuffix("/commit"), [json.loads(line) for line in body.splitlines()])
        self.answer(404, {"error": f"{self.path} {action}"})

    def create(self, asked):
        name = f"{asked.get('organization')}/{asked['name']}"
        known = name in self.server.repositories
        self.server.repositories.setdefault(
            name, {"private": asked.get("private") or asked.get("visibility") == "private", "files": {}, "commits": []}
        )
        self.answer(409 if known else 200, {"url": f"{self.server.url}/{name}", "name": name})

    def batch(self, asked):
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.server.url}/blob/{o['oid']}"}}}
            for o in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def commit(self, name, rows):
        repository = self.server.repositories[name]
        for row in rows:
            value = row["value"]
            if row["key"] == "header":
                repository["commits"].append(value["summary"])
            elif row["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                blob = self.server.blobs[value["oid"]]
                assert hashlib.sha256(blob).hexdigest() == value["oid"]
                repository["files"][value["path"]] = blob
            elif row["key"] == "deletedFile":
                del repository["files"][value["path"]]
        commit = {"commitUrl": f"{self.server.url}/{name}/commit/{'b' * 40}", "commitOid": "b" * 40, "success": True}
        self.answer(200, commit)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status, value=None, kind="application/json"):
        content = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def mode(path):
    return {"uploadMode": "lfs" if path.endswith(".safetensors") else "regular"}
