"""What benchmarks write: their results, the parts of pages that show them, and tars of samples."""

from __future__ import annotations

import datetime
import io
import json
import re
import statistics
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reinforce.shipping.latency import describe_machine


def write_results(path: Path, packages: Sequence[str], results: Mapping[str, Any]) -> None:
    """Write results as JSON, after the date, the machine and the versions of ``packages``."""
    about = {"date": datetime.date.today().isoformat(), **describe_machine(packages)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, **results}, indent=2) + "\n", encoding="utf-8")


def replace_part(text: str, name: str, part: str) -> str:
    """A page with another part between ``<!-- NAME ... -->`` and ``<!-- end of NAME -->``; the rest stays.

    Raises ValueError unless the page has one such part.
    """
    markers = re.compile(rf"(<!-- {name}\b[^\n]*-->\n).*?(<!-- end of {name} -->)", flags=re.DOTALL)
    if len(markers.findall(text)) != 1:
        raise ValueError(f"the page must have `<!-- {name} -->` and `<!-- end of {name} -->`, each once")
    return markers.sub(lambda found: f"{found[1]}\n{part.rstrip()}\n\n{found[2]}", text)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    head, *lines = ("".join(f"| {cell} " if cell else "| " for cell in cells) + "|" for cells in (heads, *rows))
    return "\n".join([head, "|---" * len(heads) + "|", *lines])


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean of seeds and their standard deviation, 0 of one."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}"


def update_page(page: Path, results: Path, render: Callable[[str, Mapping[str, Any]], str]) -> None:
    """Write the generated parts of a page from stored results."""
    stored = json.loads(results.read_text(encoding="utf-8"))
    page.write_text(render(page.read_text(encoding="utf-8"), stored), encoding="utf-8")


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write a tar of samples, (key, content by extension)."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
