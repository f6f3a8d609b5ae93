"""ARCHITECTURE.md and the packages: the map, and the order of imports."""

from __future__ import annotations

import re

from importlinter.api import read_configuration

from tests.helpers.pages import ROOT, blocks


def packages_in_the_map() -> set[str]:
    """Paths of the packages in the map of ARCHITECTURE.md, where a folder is indented below the one that it is in."""
    found: set[str] = set()
    parents: list[str] = []
    for line in blocks("ARCHITECTURE.md", "text")[-1].text.splitlines():
        entry = re.split(r"  +", line.strip())[0]
        del parents[(len(line) - len(line.lstrip())) // 2 :]
        if folders := [name for name in entry.split(", ") if name.endswith("/")]:
            found |= {"".join([*parents, name]).rstrip("/") for name in folders}
            parents.append(folders[0])
    return found


def test_the_map_in_architecture_has_every_package() -> None:
    parents = [ROOT / name for name in ("reinforce", "teachers", "schemas", "jobs")]
    packages = {str(path.parent.relative_to(ROOT)) for folder in parents for path in folder.rglob("*.py")}
    assert {
        name for name in packages_in_the_map() if name.split("/")[0] in {folder.name for folder in parents}
    } == packages


def test_the_import_order_in_architecture_is_the_contract() -> None:
    options = read_configuration(str(ROOT / "pyproject.toml"))
    layers = next(c for c in options["contracts_options"] if c.get("containers") == ["reinforce"])["layers"]
    contract = [set(re.split(r" [|:] ", layer)) - {"__main__"} for layer in layers]
    shown = blocks("ARCHITECTURE.md", "text")[0]
    lines = [line.removeprefix("reinforce.") for line in shown.text.splitlines() if line.startswith("reinforce.")]
    assert [set(line.split(", ")) for line in lines] == [layer for layer in contract if layer]
