"""Repositories of models on the Hub of Hugging Face: one commit for all files, or an error in one line."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reinforce.errors import UserError
from teachers.redact import redact

PREFIX = "hf://"
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class ModelRepository:
    """A repository by its URL ``hf://ORG/NAME``. Raises UserError for another URL, and without a token."""

    def __init__(self, url: str) -> None:
        from huggingface_hub import HfApi, get_token

        self.id = url.removeprefix(PREFIX).removeprefix("models/").rstrip("/")
        if not _ID.fullmatch(self.id):
            raise UserError(f"{url} is not a repository of models: write {PREFIX}ORG/NAME.")
        if get_token() is None:
            raise UserError(f"{url} cannot be written without a token: run `hf auth login`, or set HF_TOKEN.")
        self.url, self._api = f"{PREFIX}{self.id}", HfApi()

    def read(self, name: str) -> str | None:
        """The text of a file; None if there is no such file or repository."""
        with self._errors("read"), tempfile.TemporaryDirectory(prefix="reinforce-hub-") as cache:
            if not self._api.file_exists(self.id, name):
                return None
            return Path(self._api.hf_hub_download(self.id, name, cache_dir=cache)).read_text(encoding="utf-8")

    def write(self, folder: str, message: str, private: bool) -> None:
        """Create the repository if it does not exist, and write the files of a folder in one commit."""
        from huggingface_hub import CommitOperationAdd

        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        changes: list[Any] = [
            CommitOperationAdd(path_in_repo=path.relative_to(folder).as_posix(), path_or_fileobj=path) for path in files
        ]
        with self._errors("written"):
            self._api.create_repo(self.id, private=private or None, exist_ok=True)
            self._api.create_commit(self.id, changes, commit_message=message)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of huggingface_hub, its HTTP client, and the network
            reason = " ".join(redact(str(error)).split())[:200] or type(error).__name__
            status = getattr(getattr(error, "response", None), "status_code", None)
            fix = (
                "check that the token of HF_TOKEN or `hf auth login` may write to it"
                if status in (401, 403)
                else "check the network and the address"
            )
            raise UserError(f"{self.url} cannot be {what}: {type(error).__name__}: {reason}; {fix}.") from error
