"""A model hub on this machine: the few answers of the hub's protocol that a download needs, over real HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repos: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as hub repositories; yields the endpoint and the list of requests as they come."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            requests.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0].strip("/")
            for repo, folder in repos.items():
                if path == f"api/models/{repo}/tree/{COMMIT}":
                    return self.send(200, _tree(folder), {"Content-Type": "application/json"}, body)
                if path.startswith(f"api/models/{repo}"):
                    revision = path.removeprefix(f"api/models/{repo}").removeprefix("/revision/")
                    if revision not in ("", "main", COMMIT):
                        return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
                    return self.send(200, _listing(repo, folder), {"Content-Type": "application/json"}, body)
                file = folder / path.removeprefix(f"{repo}/resolve/{COMMIT}/")
                if path.startswith(f"{repo}/resolve/{COMMIT}/") and file.is_file():
                    content = file.read_bytes()
                    etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
                    return self.send(200, content, etag, body)
            code = "GatedRepo" if "gated" in path else "RepoNotFound"
            return self.send(403 if "gated" in path else 404, b"", {"X-Error-Code": code}, body)

        def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _files(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _listing(repo: str, folder: Path) -> bytes:
    siblings = [{"rfilename": name, "size": size, "blobId": "0"} for name, size in _files(folder).items()]
    return json.dumps({"_id": "0", "id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}).encode()


def _tree(folder: Path) -> bytes:
    entries = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in _files(folder).items()]
    return json.dumps(entries).encode()
