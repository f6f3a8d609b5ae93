"""Templates, class names and groups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from reinforce.errors import UserError
from reinforce.evaluation.classes import load_class_names, load_groups, load_templates, name_folders


def test_templates_are_built_in_or_custom(tmp_path: Path) -> None:
    def texts(templates: str | list[str]) -> list[str]:
        return [template("{cat}") for template in load_templates(templates, "set")]

    assert len(texts("openai")) == 80
    assert len(texts("simple")) == 7
    assert texts("openai")[0] == "a bad photo of a {cat}."
    assert texts("none") == ["{cat}"]
    assert texts(["a {} in {0.__class__}", "{c} and {}"]) == ["a {cat} in {0.__class__}", "{cat} and {cat}"]
    (tmp_path / "own.txt").write_text("photo of {}\n\ta {c}.\n")
    assert texts(str(tmp_path / "own.txt")) == ["photo of {cat}", "a {cat}."]


def test_class_names_come_from_a_list_a_file_or_imagenet(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("\ufeffred\r\n dark blue \r\n\r\n".encode())
    assert load_class_names(["red", "blue"], "set") == ["red", "blue"]
    assert load_class_names(str(tmp_path / "names.txt"), "set") == ["red", "dark blue"]
    assert load_class_names("imagenet", "set") == list(IMAGENET_CLASSNAMES)


def test_folders_are_named_by_themselves_by_a_list_or_by_wordnet_ids() -> None:
    assert name_folders(None, ["a", "b"], "set") == ["a", "b"]
    assert name_folders(["red", "blue"], ["a", "b"], "set") == ["red", "blue"]
    assert name_folders("imagenet", ["n01443537", "n15075141"], "set") == ["goldfish", "toilet paper"]
    with pytest.raises(UserError, match="set: classes has 1 names for 2 folders"):
        name_folders(["red"], ["a", "b"], "set")


def test_groups_come_from_a_mapping_or_a_json_file(tmp_path: Path) -> None:
    groups = {"cat": "animal", "dog": "animal", "car": "vehicle"}
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    for given in (groups, str(tmp_path / "groups.json")):
        assert load_groups(given, ["car", "cat"], "set") == ["vehicle", "animal"]
    with pytest.raises(UserError, match="set: groups has no group for 1 of 2 classes, such as 'bus'"):
        load_groups(groups, ["car", "bus"], "set")
