"""A server on this machine that speaks as much of the Hugging Face Hub's protocol as plans and data sets need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants


class FakeHub(ThreadingHTTPServer):
    """repositories: of each id its commits, oldest first, as (id, files); asked: method and path of each request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.asked: list[str] = []
        self.tokens: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, changed: dict[str, bytes]) -> str:
        commits = self.repositories[name]
        files = {**(commits[-1][1] if commits else {}), **changed}
        oid = hashlib.sha1(repr((len(commits), sorted(files.items()))).encode()).hexdigest()
        commits.append((oid, files))
        return oid

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(name, [])
        return next((each for each in reversed(commits) if revision in ("main", each[0])), None)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """From now on the Hub is at `url`, with an empty cache of what was fetched."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.removeprefix("/datasets")
        owner, name, kind, revision, file = (path.split("/", 5)[1:] + 5 * [""])[:5]
        found = self.server.files(f"{owner}/{name}", revision) if kind == "resolve" else None
        if found is None:
            missing = "RevisionNotFound" if f"{owner}/{name}" in self.server.repositories else "RepoNotFound"
            return self._answer(404, b"", {"X-Error-Code": missing})
        oid, files = found
        if file not in files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
        etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
        return self._answer(200, files[file], {"ETag": etag, "X-Repo-Commit": oid})

    def do_POST(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self._json(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}"
            if name in self.server.repositories:
                return self._json(409, {"url": f"{self.server.url}/{name}"})
            self.server.repositories[name] = []
            return self._json(200, {"url": f"{self.server.url}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self._json(200, {"errors": [], "warnings": []})
        name, _, action = self.path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self._json(200, {"files": files})
        name, _, action = name.partition("/commit/")
        lines = [json.loads(line) for line in body.splitlines()]
        added = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
        oid = self.server.commit(name, added)
        return self._json(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"}
        )

    def _json(self, code: int, value: Any) -> None:
        self._answer(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
