"""The reference of the site is complete: what the code has without a meaning makes a test fail."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, Field
from typer.main import get_command

from reinforce.cli import app
from reinforce_docs import api, commands, formats, keys, variables


def test_the_page_of_a_config_has_a_row_for_each_key_in_mappings_and_lists_too_with_its_meaning() -> None:
    found: list[keys.Key] = []
    for name, (model, _) in keys.CONFIGS.items():
        lines = keys.keys_page(name).splitlines()
        assert {line for line in lines if line.startswith("| key")} == {"| key | meaning | type | default | bounds |"}
        own = [key for group in keys.groups(model) for key in group.keys]
        assert len([line for line in lines if line.startswith("| `")]) == len(own)
        found += own
    assert len(found) > 200
    assert [key.name for key in found if not key.meaning] == []
    some = {"teachers.NAME.model", "captioners.NAME.clean.words", "data.datasets[].url", "workers.cpus"}
    assert some <= {key.name for key in found}


def test_types_defaults_and_bounds_are_in_words() -> None:
    class Inner(BaseModel):
        size: int = Field(3, ge=1, lt=10, description="size of it")

    class Outer(BaseModel):
        """What it is."""

        mode: Literal["a", "b"] | None = Field(None, description="which of them")
        pair: tuple[float, float] = Field((0.5, 1.0), description="two numbers")
        names: list[Annotated[str, Field(min_length=1)]] = Field(description="some names")
        inner: Inner = Inner()

    outer, inner = keys.groups(Outer)
    assert [(key.type, key.default, key.bounds) for key in (*outer.keys, *inner.keys)] == [
        ("a / b, or null", "null", ""),
        ("[number, number]", "[0.5, 1.0]", ""),
        ("list of string", "required", ""),
        ("integer", "3", ">= 1, < 10"),
    ]
    assert (outer.path, outer.description, inner.path) == ("", "What it is.", "inner")


def test_every_exit_status_and_environment_variable_is_explained() -> None:
    page = (variables.ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    for error in api.OBJECTS["Errors"]:
        assert f"\n| {error.exit_status} | " in page
    found = variables.variables_in_code()
    assert {"REINFORCE_CACHE", "RAY_ADDRESS", "OMP_WAIT_POLICY"} <= found
    assert found - {*variables.VARIABLES} - variables.INTERNAL == set()
    folders = ("reinforce", "teachers", "jobs")
    text = "".join(path.read_text() for name in folders for path in (variables.ROOT / name).rglob("*.py"))
    assert [name for name in variables.VARIABLES if f'"{name}"' not in text] == []


def test_every_column_of_every_file_has_a_description_and_every_command_a_section_with_its_options() -> None:
    listed = [(name, formats.description(field)) for _, schema in formats.FILES.values()
              for name, field in formats.columns(list(schema))]  # fmt: skip
    assert [name for name, description in listed if not description] == []
    assert "augmentations[].crop.top" in dict(listed)
    page = commands.commands_page()
    names = re.findall(r"^##+ `reinforce (.+)`$", page, flags=re.MULTILINE)
    assert {*get_command(app).commands, "export onnx"} <= {*names}  # type: ignore[attr-defined]
    listed_names = [name for name, _ in commands.summaries(get_command(app))]
    assert len(listed_names) == len({*listed_names}), "a summary is found by its name"
    assert [line for line in page.splitlines() if line.startswith("* `") and line.endswith("...")] == []
    assert "* `inspect`: Write a report on a dataset: an HTML folder with a summary, a gallery of samples, " in page
    assert "```console\n$ reinforce plan configs/demo.yaml\n$ reinforce plan configs/demo.yaml --rate 400" in page
    outside = re.sub(r"^```console\n.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^\$ ", outside, flags=re.MULTILINE), "each command is in a block of code"
    assert "* `--set KEY=VALUE`: Override a key of the config" in page
    assert "* `--rounds <int range>`: Measurements per tower; the towers take turns.  [default: 20; " in page


def test_every_public_name_of_the_package_has_a_docstring_in_the_page() -> None:
    page = api.api_page()
    for values in api.OBJECTS.values():
        for value in values:
            assert f"### {value.__qualname__}\n" in page
            assert (value.__doc__ or "").strip().splitlines()[0].replace("``", "`") in page
    assert "#### Sample.augmented" in page
