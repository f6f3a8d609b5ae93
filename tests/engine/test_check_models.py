"""Checking models without a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from reinforce.config import parse_config
from reinforce.engine import check_models as check
from reinforce.engine.check_models import CheckReport, check_class, check_config, check_target
from reinforce.engine.worker.models import LoadedModels
from reinforce.errors import UserError
from teachers.runtime.accelerator import Accelerator
from tests.helpers.commands import printed_by, run_command
from tests.helpers.data import config_of
from tests.helpers.models import SeedCaptioner, tiny_models
from tests.helpers.models.tiny_coca import coca_model

MODELS = "tests.helpers.models"


class ThreeCaptions(SeedCaptioner):
    """A captioner whose number of captions is an attribute of the class."""

    captions = 3

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, captions=3)


class Both(SeedCaptioner):
    """A captioner that could be a teacher."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels


def sides(report: CheckReport) -> list[tuple[str, str, int | None, int]]:
    return [(row.model, row.side, row.dim, row.batch) for row in report.rows]


def test_every_model_of_a_config_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_ENOUGH_SECONDS", 60.0)  # on a busy machine a batch of 8 may take long
    teachers = {
        "vit": {"model": tiny_models.open_clip_model(tmp_path / "vit")},
        "dino": {"family": "transformers", "model": tiny_models.transformers_dinov2(tmp_path / "dino")},
        "words": {"class": f"{MODELS}:TextOnly"},
    }
    coca = {"model": coca_model(tmp_path / "coca"), "captions": 2, "max_length": 8, "graphs": True}
    captioners = {"coca": coca}
    config = config_of("x.tar", "out", teachers=teachers, captioners=captioners, workers={"batch": 9})
    threads = torch.get_num_threads()
    report = check_config(parse_config(config))
    assert sides(report) == [
        ("vit", "images", 16, 9),
        ("vit", "texts", 16, 9),
        ("dino", "images", 32, 9),
        ("words", "texts", 6, 9),
        ("coca", "captions", None, 9),
    ]
    assert all(row.rate > 0 for row in report.rows)
    assert report.errors == []
    precision, vit, dino, version, graphs = report.notes
    assert vit.startswith(
        "teachers.vit: crops of 24 x 24 pixels are enlarged to its 32 x 32; augmentations.size, which"
    )
    assert dino.startswith("teachers.dino: crops of 24 x 24 pixels are enlarged")
    assert precision == "precision: fp32 for coca, dino, vit (auto: workers use CPUs)"
    assert version.startswith(f"class {MODELS}:TextOnly has no `version`,")
    assert graphs == ("coca: fast path `graphs: true` fell back: CUDA graphs need a GPU; `graphs: false` turns it off")
    assert capsys.readouterr().out.startswith("1 CPU, batches of 9, device cpu\n")
    assert torch.get_num_threads() == threads
    with (console := Console(width=200)).capture() as shown:
        console.print(report.table())
    lines = shown.get().splitlines()
    assert lines[0].split() == ["model", "side", "dimension", "norm", "speed", "batch"]
    assert lines[1].split()[:4] == ["vit", "images", "16", "1.0000"]
    assert lines[1].split()[5:] == ["images/s", "9"]
    assert lines[-1].split()[:4] == ["coca", "captions", "-", "-"]


def test_a_model_that_fails_does_not_hide_the_others() -> None:
    teachers: dict[str, Any] = {
        "wrong": {"class": f"{MODELS}:WrongShapeTeacher"},
        "absent": {"family": "transformers", "model": "/absent/it"},
        "leaks": {"class": f"{MODELS}:TokenLeakingTeacher", "options": {"hf_token": "hf_t0ken", "endpoint": "it"}},
        "good": {"class": f"{MODELS}:ImageOnly"},
    }
    report = check_config(parse_config(config_of("x.tar", "out", teachers=teachers, captioners={})))
    assert [row.model for row in report.rows] == ["leaks", "good"]
    wrong, absent, leaks = report.errors
    assert wrong.startswith("wrong fails its self-test (images): embeddings must have shape (3, 6), got (3, 7)")
    assert absent == "teacher absent: folder /absent/it does not exist"
    assert leaks.startswith("leaks (texts) fails in a batch of 8: RuntimeError: it does not accept (secret) (")
    assert "tests/helpers/models/__init__.py:" in leaks


def test_classes_of_scores_are_checked_where_their_inputs_can_be_made_up(tmp_path: Path) -> None:
    ours = "tests.helpers.models.scorers"
    assert sides(check_class(f"{ours}:Colors", {})) == [("Colors", "samples", None, 64)]
    [error] = check_class(f"{ours}:Length", {"wrong": "random"}).errors
    assert error.startswith("scores.Length fails its self-test (scores): the same batch gives other scores")
    scores = {"red": {"class": f"{ours}:Described"}, "every": {"class": f"{ours}:Everything"}}
    report = check_config(parse_config(config_of("x.tar", tmp_path, teachers={}, captioners={}, scores=scores)))
    assert sides(report) == [("red", "samples", None, 16)]
    assert report.errors == []
    assert report.notes == ["scores.every sees more than pixels and captions: it is loaded, and not tested"]


def test_the_kind_is_needed_where_the_methods_do_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "our_checked", sys.modules[__name__])
    assert sides(check_class("our_checked:ThreeCaptions", {})) == [("ThreeCaptions", "captions", None, 64)]
    with pytest.raises(UserError, match=r"methods of teachers and captioners: .* --kind teacher or --kind captioner"):
        check_class("our_checked:Both", {})
    assert sides(check_class("our_checked:Both", {}, "captioner")) == [("Both", "captions", None, 64)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "neither a YAML file nor a class such as our_teachers:Tiny"),
        (("absent.yaml",), "absent.yaml"),
        ((f"{MODELS}:ColorTeacher", "[1]"), "--options must be a JSON object"),
        ((f"{MODELS}:ColorTeacher", "{"), "--options must be a JSON object"),
        ((f"{MODELS}:ColorTeacher", '{"sise": 3}'), "unexpected keyword argument 'sise'"),
        ((f"{MODELS}:Absent",), "has no such name"),
        (("no.such:Teacher",), "cannot be imported"),
        ((":Teacher",), "must be package.module:Class"),
        ((f"{MODELS}:ColorTeacher", None, None, ["seed=1"]), "--set belongs to a config"),
        (("x.yaml", "{}"), "--options and --kind belong to a class"),
    ],
)
def test_a_wrong_target_is_a_user_error(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_target(*arguments)


def test_the_command_exits_with_0_or_with_2_and_the_check_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    (tmp_path / "our_check_lab.py").write_text(
        f"from {MODELS} import ColorTeacher\n\n\nclass Mine(ColorTeacher):\n    version = 1\n"
    )
    assert "Mine" in printed_by(capsys, "check", "our_check_lab:Mine", "--options", '{"size": 8}')
    teachers = {"wrong": {"class": f"{MODELS}:WrongShapeTeacher"}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config_of("x.tar", "out", teachers=teachers, captioners={})))
    status, _, err = run_command(capsys, "check", "my.yaml")
    assert (status, "error: wrong fails its self-test (images): embeddings must have shape" in err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["my.yaml", "our_check_lab.py"]


def test_a_batch_that_does_not_fit_in_memory_is_not_measured() -> None:
    sizes = []

    def prepare(size: int) -> Callable[[], Any]:
        sizes.append(size)
        if size > 16:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return lambda: None

    assert check._measure(LoadedModels({}, Accelerator("cpu")), prepare, 256, "x")[1] == 16
    assert sizes == [8, 16, 32]
