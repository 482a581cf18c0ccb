"""A small hub on this machine: what huggingface_hub asks of the real one, from a table, with faults on order."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator


@dataclasses.dataclass
class Repo:
    """`revisions`: branch or tag -> commit; `commits`: commit -> file -> bytes; `token`: whose bearer may read."""

    revisions: dict[str, str]
    commits: dict[str, dict[str, bytes]]
    gated: bool = False
    token: str = ""


@dataclasses.dataclass
class Hub:
    """The server's table, and what was asked of it.

    Attributes:
        repos: `models/org/name` or `datasets/org/name` -> Repo.
        cuts: how often a file's transfer is still to be cut in the middle.
        down: the status that is answered to everything; 0: none.
        asked: (method, path, range) of every request.
    """

    repos: dict[str, Repo] = dataclasses.field(default_factory=dict)
    cuts: int = 0
    down: int = 0
    asked: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    url: str = ""

    def add(self, where: str, files: dict[str, bytes], **options) -> str:
        """A repository whose main branch is a commit with those files, or one more commit of it; the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repo = self.repos.setdefault(where, Repo({}, {}, **options))
        repo.revisions["main"] = commit
        repo.commits[commit] = files
        return commit

    def files_sent(self) -> list[str]:
        return [path.split("/resolve/")[1].split("/", 1)[1] for method, path, _ in self.asked if _is_file(method, path)]


def _is_file(method: str, path: str) -> bool:
    return method == "GET" and "/resolve/" in path


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def log_message(self, *_) -> None:
        pass

    def _answer(self) -> None:
        asked = urllib.parse.urlsplit(self.path).path
        path = urllib.parse.unquote(asked)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.down:
            return self._send(self.hub.down, b"", {})
        if path.startswith("/api/"):
            # a branch such as refs/convert/parquet is one part, quoted
            kind, *rest = map(urllib.parse.unquote, asked.removeprefix("/api/").split("/"))
            name, rest = "/".join(rest[:2]), rest[2:]
        else:
            kind, path = ("datasets", path[9:]) if path.startswith("/datasets/") else ("models", path)
            name, _, rest = path.strip("/").partition("/resolve/")
            rest = ["resolve", *rest.split("/", 1)]
        repo = self.hub.repos.get(f"{kind}/{name}")
        bearer = self.headers.get("Authorization", "")
        if repo is None or (repo.token and bearer != f"Bearer {repo.token}"):
            return self._send(404 if bearer else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        what, revision = [*rest, "", ""][:2] if rest else ("revision", "main")
        if what == "refs":
            heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.revisions.items()]
            return self._json({"branches": heads, "tags": [], "converts": []})
        commit = repo.revisions.get(revision, revision)
        if commit not in repo.commits:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = repo.commits[commit]
        if what == "revision":
            return self._json({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})
        if what == "tree":
            return self._json([{"type": "file", "path": p, "size": len(b), "oid": _oid(b)} for p, b in files.items()])
        if repo.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        if rest[2] not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return self._file(files[rest[2]], commit)

    def _file(self, content: bytes, commit: str) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
        first = int(self.headers["Range"].removeprefix("bytes=").split("-")[0]) if self.headers.get("Range") else 0
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        cut = self.command == "GET" and self.hub.cuts > 0
        self.hub.cuts -= cut
        self._send(206 if first else 200, content[first:], headers, cut=cut)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at `url` until the block ends."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
