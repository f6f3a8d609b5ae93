"""The code that a config would run, and the places that it would reach. Nothing is imported or opened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce.config import Config
from teachers.redact import CONTAINER_SCHEMES

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/\s,'\"]*)")
_LIST_BYTES = 2**20  # of a text file of URLs


@dataclass(frozen=True)
class Uses:
    """Custom classes, which are imported and run, and places: hosts and buckets by scheme, and model hubs."""

    classes: tuple[str, ...]
    places: tuple[str, ...]

    def lines(self, every: bool = True) -> list[str]:
        """One line each, for people; unless ``every``, none for a config that only uses this machine."""
        if not (every or self.classes or self.places):
            return []
        code = f"runs the code of {', '.join(self.classes)}" if self.classes else "runs no code of its own"
        return [f"this config {code}", f"it reaches {', '.join(self.places) or 'no other machine'}"]


def config_uses(config: Config) -> Uses:
    """List what a run of the config would use, without importing or opening anything but local lists of URLs."""
    values = config.model_dump(mode="json", by_alias=True)
    found = [place for text in _texts(values) for place in _places(text)]
    found += [place for text in _lists(config) for place in _places(text)]
    found += [host for of in config.models.values() for spec in of.values() for host in spec.hosts()]
    return Uses(tuple(config.classes), tuple(sorted(set(found))))


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _places(text: str) -> Iterator[str]:
    """The scheme and host or bucket of every URL in a text, without users and passwords."""
    for scheme, authority in _URL.findall(text):
        if scheme.lower() not in ("file", "local"):
            host = authority if scheme.lower() in CONTAINER_SCHEMES else authority.rpartition("@")[2]
            yield f"{scheme.lower()}://{host}"


def _lists(config: Config) -> Iterator[str]:
    """The content of text files of URLs in ``source`` and ``reinforcements`` that are local."""
    for text in _texts([config.source, config.reinforcements]):
        path = Path(text).expanduser()
        if text.endswith(".txt") and path.is_file():
            with path.open("rb") as file:
                yield file.read(_LIST_BYTES).decode("utf-8", "replace")
