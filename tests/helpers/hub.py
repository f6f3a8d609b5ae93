"""A server that answers as the Hub of Hugging Face does for repositories of datasets and models."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.helpers.web import QuietHandler, serving


class Hub(QuietHandler):
    """``root`` has a folder for each repository, whose name is the last part of the repository's."""

    root: Path
    sha = "a" * 40
    asked: Counter[str]
    cut: set[str]  # names of files of which half is sent, once
    refused: dict[str, int]  # statuses by repository
    commits: list[str]  # messages

    def do_GET(self) -> None:
        path, parts = unquote(urlsplit(self.path).path), self._parts
        if len(parts) < 4:  # of no repository
            return self._answer_json({})
        repository = parts[3]
        if (status := self.refused.get(repository)) is not None:
            return self.answer(status, b"{}")
        paths = {str(one.relative_to(self.root / repository)): one for one in sorted(self._folder.rglob("*"))}
        if not path.startswith("/api"):
            return self._file(path.partition("/resolve/")[2].partition("/")[2], paths)
        if "/tree/" in path:
            return self._answer_json([_entry(name, one) for name, one in paths.items()])
        if parts[4:5] == ["revision"] and parts[5] not in ("main", "refs", self.sha):
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        siblings = [
            {"rfilename": name, "size": one.stat().st_size, "blobId": _oid(one)}
            for name, one in paths.items()
            if one.is_file()
        ]
        return self._answer_json({"id": f"x/{repository}", "sha": self.sha, "private": False, "siblings": siblings})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body, parts = self.read_body(), self._parts
        if parts[1] == "repos":
            return self._create(json.loads(body))
        if parts[1] == "validate-yaml":
            return self._answer_json({"errors": [], "warnings": []})
        if (status := self.refused.get(parts[3])) is not None:
            return self.answer(status, b"{}")
        if parts[4] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            return self._answer_json({"files": modes})
        if parts[4] == "commit":
            return self._commit([json.loads(line) for line in body.splitlines()])
        names = json.loads(body)["paths"]
        return self._answer_json(
            [_entry(name, self._folder / name) for name in names if (self._folder / name).exists()]
        )

    def _create(self, wanted: dict[str, Any]) -> None:
        if (status := self.refused.get(wanted["name"])) is not None:
            return self.answer(status, b"{}")
        (self.root / wanted["name"]).mkdir(exist_ok=True)
        return self._answer_json({"url": f"http://{self.headers['Host']}/{wanted['organization']}/{wanted['name']}"})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["key"] == "header":
                self.commits.append(line["value"]["summary"])
            else:
                assert (line["key"], line["value"]["encoding"]) == ("file", "base64")
                (self._folder / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
        url = f"http://{self.headers['Host']}/x/{self._parts[3]}/commit/{self.sha}"
        self._answer_json({"commitUrl": url, "commitOid": self.sha, "pullRequestUrl": None})

    @property
    def _parts(self) -> list[str]:
        """The parts of the path: of an API or not, the second is the kind of repository, the fourth its name."""
        path = unquote(urlsplit(self.path).path)
        parts = path.removeprefix("/api").split("/")
        return parts if path.startswith(("/api", "/datasets")) else ["", "models", *parts[1:]]

    @property
    def _folder(self) -> Path:
        return self.root / self._parts[3]

    def _file(self, name: str, paths: dict[str, Path]) -> None:
        if name not in paths:
            missing = "EntryNotFound" if self._folder.is_dir() else "RepoNotFound"
            return self.answer(404, X_Error_Code=missing)
        data = paths[name].read_bytes()
        if self.command == "GET":
            self.asked[name] += 1
        first, _, last = (self.headers.get("Range") or "bytes=0-").partition("=")[2].partition("-")
        headers = {"ETag": f'"{_oid(paths[name])}"', "X-Repo-Commit": self.sha, "Accept-Ranges": "bytes"}
        part = data[int(first) : int(last) + 1 if last else None]
        if self.command == "GET" and name in self.cut:
            self.cut.discard(name)
            self.close_connection = True
            return self.answer(200, data[: len(data) // 2], len(data), **headers)
        if len(part) < len(data):
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return self.answer(206 if len(part) < len(data) else 200, part, **headers)

    def _answer_json(self, values: Any) -> None:
        self.answer(200, json.dumps(values).encode())


def _entry(name: str, path: Path) -> dict[str, Any]:
    kind = "file" if path.is_file() else "directory"
    return {"type": kind, "path": name, "size": path.stat().st_size, "oid": _oid(path)}


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes() if path.is_file() else b"").hexdigest()


@contextlib.contextmanager
def serving_hub(root: Path) -> Iterator[tuple[type[Hub], str]]:
    """A hub of the folders in ``root``, and its address."""
    handler = type("Handler", (Hub,), {"root": root, "asked": Counter(), "cut": set(), "refused": {}, "commits": []})
    with serving(handler) as endpoint:
        yield handler, endpoint
