"""What grows has one place: one more of its sort needs no other file, and nothing else asks which one it is."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.drop import plan_drop
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import parts_of
from reinforce.dataset.store import Store
from reinforce.dataset.validate import validate
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.recompute import recompute
from reinforce.engine.worker.producers.registry import PRODUCERS
from reinforce.errors import UserError
from reinforce.source import config as input_config
from reinforce.source.formats.base import all_formats
from reinforce.student.config import OF_IMAGES, OTHER_MODELS
from teachers import registry
from tests.helpers.commands import printed_by
from tests.helpers.data import config_of, members_of, picture, write_tar
from tests.helpers.reinforced import reinforce_here
from tests.helpers.seams import BRIGHTNESS, PALETTE, Brightness, BrightnessProducer, write_records

ROOT = Path(__file__).parents[1]


DIVIDES, PARTS = ("split", "rsplit", "partition", "rpartition"), ("dirname", "basename")


@cache
def parsed_file(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def compared_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the text of each string that is compared, looked up in a mapping, or matched."""
    for node in ast.walk(tree):
        sides: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            sides = [node.func.value] if isinstance(node.func.value, ast.Dict) else []
        for side in sides:
            for leaf in ast.walk(side):
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                    yield leaf.lineno, leaf.value


def compared_formats(tree: ast.AST) -> Iterator[tuple[int, str]]:
    return ((line, text) for line, text in compared_texts(tree) if text in input_config.MODULES)


def read_families(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the name of each attribute that tells the family of a model."""
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return ((node.lineno, node.attr) for node in attributes if node.attr in ("family", "class_"))


def kind_questions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the text of each comparison of a kind with a name, of each name of a layer that is built or
    compared, and of each that is divided into its parts."""
    names = {*KINDS}
    sections = {kind.section for kind in KINDS.values()} - {None}
    folders = tuple(f"{parts_of(kind.pattern)[0]}/" for kind in KINDS.values())
    for node in ast.walk(tree):
        found = False
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            texts = {leaf.value for side in sides for leaf in ast.walk(side) if isinstance(leaf, ast.Constant)}
            asked = "".join(map(ast.unparse, sides))
            found = (bool(names & texts) and "kind" in asked) or (bool(sections & texts) and "kind.section" in asked)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = node.value.startswith(folders) and " " not in node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            on, of = ast.unparse(node.func.value), "".join(ast.unparse(argument) for argument in node.args[:1])
            divided = on if of == "'/'" and node.func.attr in DIVIDES else of if node.func.attr in PARTS else ""
            found = divided in ("name", "layer", "layer.name", "self.name")
        if found:
            yield node.lineno, ast.unparse(node)


def term_questions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the text of each key of a term of images that is read, and of each name under which terms ask for
    other targets than vectors."""
    asked = {kind.target_section for kind in KINDS.values() if kind.target_section != kind.section}
    asked |= {*OTHER_MODELS.values()}
    for node in ast.walk(tree):
        of_term = isinstance(node, ast.Attribute) and node.attr in OF_IMAGES
        found = of_term and ast.unparse(node.value).endswith("loss")
        if found or (isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in asked):
            yield node.lineno, ast.unparse(node)


TERM_CODE = "config.loss.dense.stage; targets['patches']; models.loaded['classifiers']"
KIND_CODE = "layer.kind.name in ('images', 'texts'); f'captions/{c}'; layer.split('/'); posixpath.dirname(name); "
KIND_CODE += "layer.kind.section == 'teachers'"
PROGRAMS = ("reinforce", "jobs", "benchmarks", "examples")


@pytest.mark.parametrize(
    ("search", "folders", "own", "code", "found"),
    [
        (compared_formats, PROGRAMS, ("source/formats",), 'a.f in ("tar", "csv") or {"folder": 1}.get(b)', 3),
        (
            read_families,
            (*PROGRAMS, "reinforce_docs", "schemas"),
            ("student/config.py",),  # has keys of these names
            "spec.family == 'openai' or s.class_ is None",
            2,
        ),
        (
            kind_questions,
            ("reinforce",),
            ("reinforce/dataset/kinds/", "dataset/layers.py", "worker/producers/", "source/formats/tar.py"),
            KIND_CODE,
            5,
        ),
        (
            term_questions,
            ("reinforce",),
            ("reinforce/dataset/kinds/", "worker/producers/", "student/terms/", "student/config.py"),
            TERM_CODE,
            3,
        ),
    ],
)
def test_no_other_code_asks_which_format_family_kind_or_term_it_has(
    search: Callable[[ast.AST], Iterator[tuple[int, str]]],
    folders: tuple[str, ...],
    own: tuple[str, ...],
    code: str,
    found: int,
) -> None:
    asked = [
        f"{path}: {line}: {text}"
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not any(part in str(path.relative_to(ROOT)) for part in own)
        for line, text in search(parsed_file(path))
    ]
    assert asked == []
    assert len({text for _, text in search(ast.parse(code))}) == found, "the search finds such code"


# Source formats.


def test_each_format_has_the_name_it_is_registered_by_and_endings_of_its_own() -> None:
    formats = all_formats()
    assert [one.name for one in formats] == [*input_config.MODULES]
    endings = [ending for one in formats for ending in one.endings]
    assert len({*endings}) == len(endings)
    schema = json.dumps(json.loads((ROOT / "schemas/json/run.json").read_text()))
    assert f'"enum": {json.dumps([one.name for one in formats])}' in schema


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two files of one more format; the last sample of the second has a key that is there already."""
    monkeypatch.setitem(input_config.MODULES, "records", "tests.helpers.seams")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # charts, which take long, are those of other reports
    monkeypatch.chdir(tmp_path)
    for shard in "ab":
        samples = [(f"{shard}{n}", f"thing {shard}{n}", picture(ord(shard) + n)) for n in range(4)]
        write_records(tmp_path / "source" / f"{shard}.records", samples + samples[: shard == "b"])
    return tmp_path / "source"


def test_one_more_format_needs_a_module_and_a_line(records: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = printed_by(capfd, "init", str(records), "my.yaml")
    assert "source: 2 shards (records, " in made
    assert "caption of the first sample that has one: 'thing a0'" in made
    begun = yaml.safe_load(Path("my.yaml").read_text())
    assert (begun["source"], begun["input"]) == (f"{records}/*.records", {"format": "records"})
    assert "# Sources of format records need `embed`." in Path("my.yaml").read_text()

    config = config_of(begun["source"], "out")
    Path("run.yaml").write_text(yaml.safe_dump(config))
    planned = printed_by(capfd, "plan", "run.yaml")
    assert "2 shards, 2 with something missing" in planned
    assert "first sample: a0 (.png, 40 x 30), caption 'thing a0'" in planned
    assert {shard.format for shard in make_plan(parse_config(config)).pending} == {"records"}

    url = reinforce_here(config)
    assert make_plan(parse_config(config)).pending == []
    status = json.loads(printed_by(capfd, "status", url, "--json"))
    assert status["layers"]["samples"]["shards"] == 2
    found = validate(url, [str(records)], count=True)
    assert (found.findings, found.as_json()["sources"]) == ([], {"same": 2})
    opened = {sample.key: sample for sample in reinforce.open(url)}
    assert {key: sample.caption for key, sample in opened.items()} == {
        f"{s}{n}": f"thing {s}{n}" for s in "ab" for n in range(4)
    }
    assert opened["a0"].image == picture(ord("a"))
    printed_by(capfd, "inspect", url, "report")
    assert "thing a0" in "".join(path.read_text() for path in Path("report").rglob("*.html"))

    whole = (records / "a.records").read_bytes()
    (records / "unnamed").write_bytes(whole)
    assert make_plan(parse_config(config_of(f"{records}/unnamed", "other"))).pending[0].format == "records"
    (records / "a.records").write_bytes(whole[:-100])
    damaged = reinforce.open(reinforce_here(config_of(f"{records}/a.records", "damaged")))
    assert [sample.key for sample in damaged] == ["a0", "a1", "a2"]


# Families of models.


@pytest.fixture
def palette(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A config with models of one more family."""
    monkeypatch.setitem(registry.FAMILIES, "palette", PALETTE)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "source" / "0.tar", members_of(0, 5))
    teachers = {"hue": {"family": "palette", "model": "sea", "colors": 6}}
    captioners = {"says": {"family": "palette", "model": "sea", "captions": 2}}
    return config_of("source/*.tar", "out", teachers=teachers, captioners=captioners)


def test_one_more_family_of_models_needs_a_package_and_a_line(
    palette: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(yaml.safe_dump(palette))
    planned = printed_by(capfd, "plan", "run.yaml")
    assert "it reaches palettes.example (sea)" in planned
    assert "precision: fp32 for hue (auto: workers use CPUs)" in planned
    url = reinforce_here(palette)
    assert make_plan(parse_config(palette)).pending == []
    assert "embeddings/hue/says" in printed_by(capfd, "status", url)
    assert validate(url).findings == []
    samples = list(reinforce.open(url))
    assert len(samples) == 5
    for sample in samples:
        assert (sample.images["hue"].shape, len(sample.captions["says"])) == ((2, 6), 2)
        np.testing.assert_allclose(np.linalg.norm(sample.texts["hue"]["says"], axis=1), 1, atol=1e-3)
    printed_by(capfd, "inspect", url, "report")
    assert "hue" in Path("report", "index.html").read_text()


def test_keys_of_one_more_family_are_validated_and_change_its_fingerprint(palette: dict[str, Any]) -> None:
    [hue] = palette["teachers"].values()

    def parsed(**keys: Any) -> Any:
        return parse_config({**palette, "teachers": {"hue": {**hue, **keys}}})

    name = "embeddings/hue/images"
    assert make_plan(parsed()).layers[name].fingerprint != make_plan(parsed(colors=7)).layers[name].fingerprint
    for keys, message in (
        ({"colors": 0}, r"teachers\.hue\.colors: Input should be greater than or equal to 1, got 0"),
        ({"shades": 3}, r"teachers\.hue\.shades: unknown key"),
        ({"pooling": "cls"}, r"teachers\.hue: pooling: used only with family transformers; remove it"),
        ({"family": "open_clip"}, r"teachers\.hue: colors: used only with family palette; remove it"),
    ):
        with pytest.raises(UserError, match=message):
            parsed(**keys)


# Kinds of layers.


@pytest.mark.usefixtures("worker_in_process")  # a kind that no other process has
def test_one_more_kind_of_layers_needs_a_kind_and_a_producer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "source" / "0.tar", members_of(0, 5))
    config = config_of(f"{tmp_path}/source/*.tar", tmp_path / "out", captioners={})
    del config["teachers"]["blue"]
    url = reinforce_here(config)  # the layer is added to a finished dataset
    monkeypatch.setitem(KINDS, "brightness", Brightness())
    monkeypatch.setitem(PRODUCERS, "brightness", BrightnessProducer)
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert [shard.layers for shard in make_plan(parse_config(config)).pending] == [(BRIGHTNESS,)]
    assert BRIGHTNESS in printed_by(capfd, "plan", "run.yaml")
    assert reinforce.run(config).status == 0
    assert make_plan(parse_config(config)).pending == []
    assert "mean of the first crop" in printed_by(capfd, "status", url)
    assert validate(url).findings == []
    comparison = recompute(parse_config(config), url, 5).layers[BRIGHTNESS]
    assert (comparison.rows, comparison.equal) == (5, 5)
    samples = list(reinforce.open(url))
    assert len(samples) == 5
    for sample in samples:
        assert sample.values[BRIGHTNESS] == pytest.approx(np.asarray(sample.augmented(0)).mean(), abs=0.01)
    printed_by(capfd, "inspect", url, "report")
    assert "mean of the first crop" in Path("report", "index.html").read_text()
    with pytest.raises(UserError, match=f"{BRIGHTNESS} depends? on samples"):
        plan_drop(Store(url), ["samples"]).check()
    assert f"{BRIGHTNESS}: 1 file" in printed_by(capfd, "drop", url, "measures/*")
