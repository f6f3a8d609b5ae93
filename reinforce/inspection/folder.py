"""The folder of a report: files that fit together, and none that an earlier report has left."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reinforce.errors import UserError
from reinforce.storage import Storage, write_file

CONTENTS = "report.json"
_FIRST = "index.html"
_KIND = "reinforce-inspect"
_WRITTEN = re.compile(r"(images|data)/[a-z0-9-]+\.(webp|js)|[a-z]+\.(html|css|js)")


class ReportFolder:
    """A local folder or fsspec URL. Raises UserError if it holds something else than a report."""

    def __init__(self, url: str) -> None:
        self.storage = Storage(url)
        found = self.storage.read_json(CONTENTS)
        if found is None and self.storage.names():
            raise UserError(
                f"{self.storage.url} is not empty, and no report of `reinforce inspect`. Name another folder for it."
            )
        if found is not None and found.get("kind") != _KIND:
            raise UserError(f"{self.storage.path(CONTENTS)} is of another program. Name another folder.")
        self._before = {name for name in (found or {}).get("files", []) if _is_ours(name)}

    def publish(self, files: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
        """Write the files of a report by name, and remove those of an earlier one that it does not have."""
        names = sorted(files)
        contents = json.dumps({"kind": _KIND, **about, "files": names}, indent=2) + "\n"
        written = {CONTENTS: contents.encode(), **files}
        written[_FIRST] = written.pop(_FIRST)  # the last
        if self.storage.local:
            for name, data in written.items():
                write_file(data, self.storage.path(name))
        else:
            self._upload(written)
        for name in sorted(self._before - set(names)):
            self.storage.remove(name)

    def _upload(self, files: Mapping[str, bytes]) -> None:
        """Put files that have their names: drivers take the type, which a browser needs, from the ending."""
        with tempfile.TemporaryDirectory(prefix="reinforce-") as folder:
            for name, data in files.items():
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
            with self.storage.storage_errors("written", _FIRST):
                self.storage.put_folder(folder)


def _is_ours(name: Any) -> bool:
    return isinstance(name, str) and _WRITTEN.fullmatch(name) is not None
