"""JSON schemas of configs: they describe every key, and accept what the validation of configs accepts."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from reinforce.cli.run import Kind, model_of, schema_of
from reinforce.settings import json_schema
from tests.helpers.pages import ROOT

KINDS: tuple[Kind, ...] = get_args(Kind)
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/**/*.yaml"))
#: A config of each kind of which single keys are changed.
EXAMPLES = {
    "run": "configs/demo.yaml", "student": "configs/student-demo.yaml", "tune": "configs/tune-demo.yaml",
    "captioner": "configs/finetune-demo.yaml", "select": "configs/select-demo.yaml",
    "adapt": "configs/adapt-demo.yaml",
}  # fmt: skip
SCHEMAS = {kind: schema_of(kind) for kind in KINDS}


def accepted_by_schema(kind: str, config: Any) -> bool:
    return bool(Draft202012Validator(SCHEMAS[kind]).is_valid(config))


def accepted(kind: Kind, config: Any) -> bool:
    """Whether the validation accepts a config; of a tuning, also that of its student."""
    try:
        model_of(kind).model_validate(config)
    except ValidationError:
        return False
    return True


def example(kind: str) -> Any:
    return yaml.safe_load((ROOT / EXAMPLES[kind]).read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_a_description_and_the_committed_schemas_are_those_of_the_configs(kind: Kind) -> None:
    Draft202012Validator.check_schema(SCHEMAS[kind])
    sections = {kind: SCHEMAS[kind], **SCHEMAS[kind]["$defs"]}
    missing = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, value in section.get("properties", {}).items()
        if not value.get("description")
    ]
    assert missing == []
    committed = json.loads((ROOT / f"schemas/json/{kind}.json").read_text(encoding="utf-8"))
    assert committed == SCHEMAS[kind], f"run: reinforce init --schema {kind} > schemas/json/{kind}.json"


@pytest.mark.parametrize("path", CONFIGS)
def test_the_first_line_of_each_example_names_the_schema_that_accepts_it(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named
    schema = (ROOT / path).parent / named[1]
    config = yaml.safe_load(text)
    assert not list(Draft202012Validator(json.loads(schema.read_text(encoding="utf-8"))).iter_errors(config))
    assert accepted(schema.stem, config)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a config."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


def changed(config: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a path."""
    if not path:
        return value
    found = copy.deepcopy(config)
    node = found
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return found


def at(config: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        config = config[key]
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_schema_and_validation_agree_on_unknown_keys_and_wrong_types(kind: Kind) -> None:
    good = example(kind)
    disagreements = []
    for path in nodes(good):
        if kind == "tune" and path[:1] in (("trial",), ("student",)):
            continue  # checked with the student's config when the tuning starts
        values: list[Any] = [{"x": [1]}, [[1]], -1, "text", True, None]
        values += [{**at(good, path), "unknown_key": 1}] if isinstance(at(good, path), dict) else []
        for value in values:
            config = changed(good, path, value)
            both = accepted_by_schema(kind, config), accepted(kind, config)
            if both[0] != both[1]:
                disagreements.append((".".join(map(str, path)), value, both))
    # A rule between keys is not in a schema: it may accept what the validation refuses, never the other way round.
    assert not [found for found in disagreements if found[2] == (False, True)], disagreements
    assert {found[0] for found in disagreements} <= BETWEEN_KEYS, disagreements


#: Keys whose other values break a rule between several keys.
BETWEEN_KEYS = {
    *("augmentations.scale.0", "augmentations.scale.1", "captioners.coca.model", "teachers.conv-64.model"),
    *("teachers.conv-48.model", "teachers.styles-64.model", "student.model", "train.steps", "scales"),
    *("data.crop.0", "data.crop.1", "held_out.share"),
}
TEACHER = {"model": "ViT-B-32", "pretrained": "openai"}
RUN = {"source": "a.tar", "output": "o"}
STUDENT = {"output": "o", "student": {"model": "ViT-B-32"}, "data": {"datasets": "d"}, "train": {"steps": 2000}}
TUNE = {"output": "o", "student": "student.yaml", "scales": {"a": [1.0, 2.0]}}
FORMS = [
    ("run", {**RUN, "source": ["a.tar", "b.tar"], "input": {"images_from": "s3://b"}}, True),
    ("run", {**RUN, "workers": {"batch": "auto"}}, True),
    ("run", {**RUN, "input": {"images_from": ["s3://b"]}, "teachers": {"a.b-c_d": TEACHER}}, True),
    ("run", {**RUN, "teachers": {"mine": {"class": "m:C", "options": {"any": [1, {"x": None}]}}}}, True),
    ("run", {**RUN, "augmentations": {"scale": [0.1, 1], "ratio": [1, 1]}}, True),
    ("run", {**RUN, "teachers": {"caption": TEACHER}}, False),
    ("run", {**RUN, "teachers": {"../x": TEACHER}}, False),
    ("run", {**RUN, "workers": {"batch": 0}}, False),
    ("run", {**RUN, "workers": {"batch": "all"}}, False),
    ("run", {**RUN, "augmentations": {"scale": [0.1]}}, False),
    ("run", {**RUN, "images": "embedd"}, False),
    ("run", {"output": "o"}, False),
    ("student", {**STUDENT, "data": {"datasets": ["d", {"url": "e", "weight": 2}], "captioners": ["coca"]}}, True),
    ("student", {**STUDENT, "data": {"datasets": {"url": "e"}, "captioners": {"coca": 0.5}}}, True),
    ("student", {**STUDENT, "data": {"datasets": [], "captioners": []}}, False),
    ("student", {**STUDENT, "data": {"datasets": ["d"], "captioners": {"coca": 0}}}, False),
    ("student", {**STUDENT, "evaluate": {"zero_shot": {"a b": {"images": "x"}}}}, False),
    ("student", {**STUDENT, "loss": {"lamda": 1}}, False),
    ("tune", {**TUNE, "scales": {"a": {"from": 1, "to": 9, "count": 3}}, "early_stopping": False}, True),
    ("tune", {**TUNE, "scales": {"a": {"from": 1, "to": 9}}}, False),
    ("tune", {**TUNE, "lambda": [0.5, 0.7], "seeds": [0]}, True),
    ("tune", {**TUNE, "lambda": [0.5, 1.7]}, False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "good"), FORMS)
def test_schema_and_validation_agree_on_every_form_of_a_value(kind: Kind, config: dict[str, Any], good: bool) -> None:
    assert (accepted_by_schema(kind, config), accepted(kind, config)) == (good, good)


def test_the_sections_of_a_tunings_student_have_the_names_of_a_students() -> None:
    sections, own = (set(SCHEMAS["student"]["$defs"]), set(json_schema(model_of("tune"))["$defs"]))
    assert not sections & own, "one name for two sections"
    assert set(SCHEMAS["tune"]["$defs"]) == {*sections, *own, "StudentConfig"}


def test_a_tuning_completes_the_keys_of_its_student() -> None:
    for key in ("trial", "student"):
        assert accepted_by_schema("tune", {**TUNE, key: {"train": {"steps": 5}}}), "parts of a student's config"
        assert not accepted_by_schema("tune", {**TUNE, key: {"train": {"stepps": 5}}})
