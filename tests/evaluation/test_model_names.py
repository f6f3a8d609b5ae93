"""Names of models on the command line."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from reinforce.errors import UserError
from reinforce.evaluation.model_names import model_errors, resolve_models, short_name
from tests.helpers.students import student_folder


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("runs/s0", "s0"),
        ("s3://bucket/runs/s0/", "s0"),
        ("MobileCLIP2-S0,dfndr2b", "MobileCLIP2-S0-dfndr2b"),
        ("local-dir:/models/a", "a"),
        ("hf-hub:org/repo", "repo"),
        ("hf-hub:repo", "repo"),
    ],
)
def test_a_short_name_has_no_folders(name: str, short: str) -> None:
    assert short_name(name) == short


def test_names_of_open_clip_may_carry_their_tag_or_take_the_option() -> None:
    with resolve_models(["ViT-B-32,openai"], weights=False) as specs:
        assert (specs["ViT-B-32,openai"].model, specs["ViT-B-32,openai"].pretrained) == ("ViT-B-32", "openai")
    with resolve_models(["ViT-B-32", "RN50"], "openai", weights=False) as specs:
        assert [(spec.model, spec.pretrained) for spec in specs.values()] == [
            ("ViT-B-32", "openai"),
            ("RN50", "openai"),
        ]


def test_a_remote_folder_is_copied_for_as_long_as_the_models_are_used(tmp_path: Path) -> None:
    folder = student_folder(tmp_path).removeprefix("local-dir:")
    fsspec.filesystem("memory").put(folder, "/model-names/run/student", recursive=True)
    with resolve_models(["memory://model-names/run"], weights=False) as specs:
        local = Path(str(specs["memory://model-names/run"].model).removeprefix("local-dir:"))
        assert (local / "open_clip_config.json").is_file()
    assert not local.exists()


def test_a_model_that_is_named_twice_a_folder_without_one_and_errors_of_a_model_are_user_errors(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="RN50 is named twice"), resolve_models(["RN50", "RN50"], "openai"):
        pass
    with pytest.raises(UserError, match=r"neither it nor its `student` or `model` has open_clip_config\.json, or"):
        resolve_models([str(tmp_path)]).__enter__()
    with pytest.raises(UserError, match=r"^mine: no such tag$"), model_errors("mine"):
        raise ValueError("no such tag")
