"""The hub's HTTP interface over folders of this machine, as far as the libraries use it here."""

from __future__ import annotations

import base64
import json
import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
CREATED = "created.json"  # what the last request for a new repository said
FILE = rf"/(datasets/)?([^/]+/[^/]+)/resolve/(main|{COMMIT})/(.+)"
REPOSITORY = r"/api/(models|datasets)/([^/]+/[^/]+)/([\w-]+)/[^/]+/?(.*)"


class Handler(SimpleHTTPRequestHandler):
    """Serves repositories in `directory`: `models/OWNER/NAME` and `datasets/OWNER/NAME`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *message: Any) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("ETag", '"' + self.path.encode().hex()[-40:] + '"')
        self.send_header("X-Repo-Commit", COMMIT)
        super().end_headers()

    def translate_path(self, path: str) -> str:
        """The file that `OWNER/NAME/resolve/REVISION/FILE` names."""
        found = re.fullmatch(FILE, unquote(path))
        name = f"{found[1] or 'models/'}{found[2]}/{found[4]}" if found else "none"
        return str(Path(self.directory, name))

    def do_HEAD(self) -> None:
        if Path(self.translate_path(self.path)).is_file():
            return super().do_HEAD()
        error = "EntryNotFound" if re.fullmatch(FILE, self.path) else "RevisionNotFound"
        owner, name = self.path.removeprefix("/datasets").split("/")[1:3]
        if not any(Path(self.directory).glob(f"*/{owner}/{name}")):
            error = "RepoNotFound"
        return self._answer({}, 404, error)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not path.startswith("/api/"):
            return super().do_GET() if Path(self.translate_path(path)).is_file() else self.do_HEAD()
        found = re.fullmatch(REPOSITORY, path)
        name = "/".join(found.groups()[:2]) if found else path.removeprefix("/api/")
        repository = Path(self.directory, name)
        if not repository.is_dir():
            return self._answer({}, 404, "RepoNotFound")
        if found and found[3] == "tree":
            return self._list(repository, repository / unquote(found[4]))
        paths = sorted(path for path in repository.rglob("*") if path.is_file())
        files = [{"rfilename": str(path.relative_to(repository))} for path in paths]
        return self._answer({"id": name.split("/", 1)[1], "sha": COMMIT, "siblings": files})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            Path(self.directory, CREATED).write_bytes(body)
            name = f"{json.loads(body)['organization']}/{json.loads(body)['name']}"
            Path(self.directory, "models", name).mkdir(parents=True, exist_ok=True)
            return self._answer({"url": f"http://{self.headers['Host']}/{name}"})
        found = re.fullmatch(REPOSITORY, urlsplit(self.path).path)
        if found is None:
            return self._answer({"errors": [], "warnings": []})  # of a model card
        repository = Path(self.directory, found[1], found[2])
        if found[3] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self._answer({"files": [{"path": path, **how} for path in paths]})
        if found[3] == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    (repository / line["value"]["path"]).write_bytes(content)
        url = f"http://{self.headers['Host']}/{found[2]}/commit/{COMMIT}"
        return self._answer({"commitUrl": url, "commitOid": COMMIT})

    def _list(self, repository: Path, folder: Path) -> None:
        if not folder.is_dir():
            return self._answer({}, 404, "EntryNotFound")
        is_deep = "recursive=true" in self.path.lower()
        entries = [
            {
                "type": "directory" if entry.is_dir() else "file",
                "path": str(entry.relative_to(repository)),
                "size": entry.stat().st_size,
                "oid": COMMIT,
            }
            for entry in (folder.rglob("*") if is_deep else folder.iterdir())
        ]
        return self._answer(entries)

    def _answer(self, content: Any, status: int = 200, error: str = "") -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)


def pretended_hub(folder: Path) -> ThreadingHTTPServer:
    """A server of the repositories in a folder, at a free port; `serve_forever` runs it."""
    return ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
