"""Two hubs on this machine, as far as their own clients ask for it: snapshots down, repositories, LFS and commits up."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

SHA = {"main": "a" * 40, "v1": "b" * 40}  # branch or tag -> commit
WEIGHTS = bytes(range(256)) * 1024
LARGE = bytes(24 << 20)  # the Hugging Face client keeps what came of a broken download by pieces of 10 MB


def _model(word: str) -> dict[str, bytes]:
    config = json.dumps({"model_type": "qwen2", "word": word}).encode()
    unwanted = {"pytorch_model.bin": b"pickle", "modeling_own.py": b"1/0", "onnx/config.json": b"{}"}
    return {"config.json": config, "model.safetensors": WEIGHTS, "tokenizer.json": b"{}", **unwanted}


REPOS = {
    "models/tiny/qwen": {SHA["main"]: _model("new"), SHA["v1"]: _model("old")},
    "models/tiny/large": {SHA["main"]: {"config.json": b"{}", "model.safetensors": LARGE}},
    "models/tiny/private": {SHA["main"]: _model("private")},
    "models/tiny/gated": {SHA["main"]: _model("gated")},
    "models/tiny/pickled": {SHA["main"]: {"config.json": b"{}", "pytorch_model.bin": b"pickle"}},
    "datasets/tiny/news": {SHA["main"]: {"data/train.csv": b"text,label\na,1\n", "load.py": b"1/0", "a.pkl": b""}},
    "datasets/tiny/code": {SHA["main"]: {"load.py": b"1/0", "README.md": b"hello"}},
}


class FakeHubs(http.server.BaseHTTPRequestHandler):
    """What the Hugging Face client and the ModelScope client ask for, and nothing else.

    The weights break off once, in the middle; who asks for the rest (``Range``) gets the rest. ``secret`` is the token of
    who may write and see what is private.
    """

    log: list[str]  # one of each for the server, in the subclass that the fixture makes
    pushed: dict[str, dict]  # repo -> {"private", "branches": {name: commit}, "commits": {commit: {path: content}}}
    blobs: dict[str, bytes]  # what was uploaded by LFS

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        fields = dict(urllib.parse.parse_qsl(query))
        self.log.append(f"{self.command} {urllib.parse.unquote(self.path)}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "v1"]:
            self._modelscope("/".join(parts[2:5]), parts[5:], fields)
        elif parts[0] == "api" and parts[-2] in ("revision", "tree"):
            self._hugging_face("/".join(parts[1:4]), parts[-2], parts[-1])
        elif parts[:2] == ["api", "models"] and len(parts) == 4:
            self._hugging_face("/".join(parts[1:4]), "revision", "main")
        elif "resolve" in parts:
            at = parts.index("resolve")
            repo = "/".join(parts[:at] if parts[0] == "datasets" else ["models", *parts[:at]])
            self._hugging_face(repo, "/".join(parts[at + 2 :]), parts[at + 1])
        else:
            self._send(404, b"{}")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.log.append(f"POST {path}")
        parts = path.strip("/").split("/")
        asked = [json.loads(line) for line in body.splitlines()] if path.startswith("/api/") and body else []
        if self.headers.get("Authorization") != "Bearer secret":
            self._json({"error": "who are you", "Message": "who are you"}, 401)
        elif parts[:2] == ["api", "repos"]:
            self._create(
                f"models/{asked[0]['organization']}/{asked[0]['name']}", asked[0].get("visibility") == "private"
            )
        elif parts == ["api", "v1", "models"]:
            self._create(f"models/{asked[0]['Path']}/{asked[0]['Name']}", asked[0]["Visibility"] == 1)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif parts[-2] == "branch":
            repo = self.pushed["/".join(parts[1:4])]
            repo["branches"][urllib.parse.unquote(parts[-1])] = repo["branches"]["main"]
            self._json({})
        elif parts[-2] == "preupload":
            how = [(f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in asked[0]["files"]]
            self._json({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in how]})
        elif parts[-2:] == ["objects", "batch"]:
            url = f"http://{self.headers['Host']}/blobs/"
            wanted = [{k: o[k] for k in ("oid", "size")} | {"actions": {"upload": {"href": url + o["oid"], "header": {}}}}
                      for o in json.loads(body)["objects"] if o["oid"] not in self.blobs]  # fmt: skip
            self._json({"transfer": "basic", "objects": wanted, "Data": {"objects": wanted}, "Code": 200})
        elif parts[-2] == "commit" and parts[1] == "v1":
            files = {f["path"]: self.blobs[f["sha256"]] if f["type"] == "lfs" else base64.b64decode(f["content"])
                     for f in asked[0]["actions"]}  # fmt: skip
            self._commit("/".join(parts[3:6]), {"master": "main"}.get(parts[-1], parts[-1]), files)
        elif parts[-2] == "commit":
            known = [(line["key"], line["value"]) for line in asked]
            files = {v["path"]: base64.b64decode(v["content"]) for k, v in known if k == "file"}
            files |= {v["path"]: self.blobs[v["oid"]] for k, v in known if k == "lfsFile"}
            self._commit("/".join(parts[1:4]), urllib.parse.unquote(parts[-1]), files)
        else:
            self._send(404, b"{}")

    def do_PUT(self) -> None:
        content, oid = self.rfile.read(int(self.headers["Content-Length"])), self.path.rpartition("/")[2]
        self.log.append("PUT a blob")
        whole = hashlib.sha256(content).hexdigest() == oid
        if whole:
            self.blobs[oid] = content
        self._json({}, 200 if whole else 400)

    def _create(self, repo: str, private: bool) -> None:
        address = {"url": f"http://{self.headers['Host']}/{repo.partition('/')[2]}"}
        if repo in self.pushed or repo in REPOS:
            self._json({**address, "error": "it exists already", "Message": "it exists already", "Code": 409}, 409)
            return
        self.pushed[repo] = {"private": private, "branches": {"main": "0" * 40}, "commits": {"0" * 40: {}}}
        self._json({**address, "Code": 200, "Success": True, "Data": {"Path": repo.split("/")[1]}})

    def _commit(self, repo: str, branch: str, files: dict[str, bytes]) -> None:
        kept = self.pushed[repo]
        files = kept["commits"][kept["branches"][branch]] | files
        commit = hashlib.sha1(b"".join(name.encode() + content for name, content in sorted(files.items()))).hexdigest()
        kept["commits"][commit], kept["branches"][branch] = files, commit
        address = f"http://{self.headers['Host']}/{repo.partition('/')[2]}/commit/{commit}"
        self._json({"commitUrl": address, "commitOid": commit, "success": True, "Code": 200, "Success": True})

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes] | None]:
        """The commit of a revision, and its files."""
        if repo in self.pushed:
            commit = self.pushed[repo]["branches"].get(revision, revision)
            return commit, self.pushed[repo]["commits"].get(commit)
        commit = SHA.get(revision, revision)
        return commit, REPOS[repo].get(commit)

    def _hidden(self, repo: str) -> bool:
        private = repo.endswith("private") or self.pushed.get(repo, {}).get("private")
        return bool(private) and self.headers.get("Authorization") != "Bearer secret"

    def _hugging_face(self, repo: str, what: str, revision: str) -> None:
        if repo not in REPOS.keys() | self.pushed.keys() or self._hidden(repo):
            self._send(401 if self._hidden(repo) else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        commit, files = self._files(repo, urllib.parse.unquote(revision))
        if repo.endswith("gated"):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif files is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif what == "revision":
            private = bool(self.pushed.get(repo, {}).get("private"))
            self._json({"id": repo.partition("/")[2], "sha": commit, "siblings": [], "private": private})
        elif what == "tree":
            tree = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            self._json(tree)
        else:
            content = files[what]
            self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit})

    def _modelscope(self, repo: str, what: list[str], fields: dict[str, str]) -> None:
        files = None
        if repo in REPOS.keys() | self.pushed.keys() and not self._hidden(repo):
            _, files = self._files(repo, fields.get("Revision", "main").replace("master", "main"))
        if files is None:
            self._json({"Code": 404, "Message": "not found"}, 404)
        elif what == ["repo"]:
            self._send(200, files[fields["FilePath"]])
        else:
            listed = [
                {"Path": p, "Type": "blob", "Size": len(c), "Sha256": hashlib.sha256(c).hexdigest()}
                for p, c in files.items()
            ]
            self._json({"Code": 200, "Data": {"Files": listed}})

    def _json(self, answer: object, status: int = 200) -> None:
        self._send(status, json.dumps(answer).encode())

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        headers, weights = dict(headers or {}), content is WEIGHTS or content is LARGE
        if (wanted := self.headers.get("Range", "")).startswith("bytes=") and self.command == "GET":
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[start:]
            if start and weights:
                self.log.append(f"went on at {start}")
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if weights and "broke off" not in self.log:
            self.log.append("broke off")
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class Hubs:
    """The hubs' address, what was asked of them, and a way to ask them through hub.py."""

    def __init__(self, home: Path, port: int, log: list[str], pushed: dict[str, dict]):
        self.home, self.url, self.log, self.pushed = home, f"http://127.0.0.1:{port}", log, pushed

    def download(self, spec: str, kind: str = "model", revision: str | None = None, **env: str) -> tuple[Path, str]:
        """``hub.download`` and the revision it found, in a new process: the clients read their variables at import."""
        script = (
            "import json, sys\nfrom loracle import hubs as hub\nfrom loracle.errors import UserError\n"
            "spec, kind, revision = json.loads(sys.argv[1])\n"
            "try:\n    folder = hub.download(spec, repo_type=kind, revision=revision)\n"
            "    print(json.dumps([str(folder), hub.revision_of(folder)]))\n"
            "except UserError as error:\n    print(json.dumps(str(error)))\n"
        )
        done = self.run("-c", script, json.dumps([spec, kind, revision]), **env)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout.splitlines()[-1])
        if isinstance(answer, str):
            raise AssertionError(answer)
        return Path(answer[0]), answer[1]

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Python in a process of its own that knows no hubs but these."""
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODELSCOPE_", "HUGGING"))}
        own = {"HF_HOME": str(self.home / "hf"), "HF_ENDPOINT": self.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        own |= {"MODELSCOPE_CACHE": str(self.home / "ms"), "MODELSCOPE_HOME": str(self.home / "ms")}
        own |= {"MODELSCOPE_ENDPOINT": self.url, "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1"}
        own |= {"HF_HUB_DISABLE_XET": "1"}  # uploads by LFS, which can be answered here: Xet's chunks cannot
        command = [sys.executable, *args]
        return subprocess.run(command, env=keep | own | env, capture_output=True, text=True, timeout=120)

    def refusal(self, spec: str, kind: str = "model", revision: str | None = None, **env: str) -> str:
        with pytest.raises(AssertionError) as refused:
            self.download(spec, kind, revision, **env)
        return str(refused.value)


@pytest.fixture
def hubs(tmp_path):
    log: list[str] = []
    pushed: dict[str, dict] = {}
    handler = type("Handler", (FakeHubs,), {"log": log, "pushed": pushed, "blobs": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Hubs(tmp_path, server.server_port, log, pushed)
        server.shutdown()
        thread.join()
