"""Results that are kept after each section, so that a second call continues."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Results:
    """A file of JSON lines: first what they were measured on, then the sections. The last line of a section counts."""

    path: Path | None
    machine: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> Results:
        """The stored results; none if there is no file. A last line that was cut by a crash is left out."""
        results = cls(path)
        text = path.read_text(encoding="utf-8") if path is not None and path.exists() else ""
        if path is not None and text and not text.endswith("\n"):
            path.write_text(f"{text}\n", encoding="utf-8")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if "section" in entry:
                results.sections[entry["section"]] = entry
            else:
                results.machine = entry
        return results

    def begin(self, machine: dict[str, Any]) -> None:
        """Start a file, or continue one of the same machine. Raises ValueError for that of another one."""
        differing = [key for key in machine if key != "date" and self.machine.get(key) != machine[key]]
        if not self.machine:
            self.machine = machine
            self._append(machine)
        elif differing:
            raise ValueError(
                f"{self.path} was measured with another {', '.join(differing)}: move it, or name another file by "
                "--results"
            )

    def add(self, entry: dict[str, Any]) -> None:
        self.sections[entry["section"]] = entry
        self._append(entry)

    def _append(self, entry: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
