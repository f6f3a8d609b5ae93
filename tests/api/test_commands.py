"""Commands as functions: dicts and keywords, figures, notebooks, and one kind of error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import reinforce
from reinforce.errors import UserError
from tests.helpers.data import config_of, picture
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.reinforced import config_for
from tests.helpers.students import student_config

RULE = {"name": "a", "rules": [{"deduplicate": {"teacher": "red"}}]}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("cats/a", "cats/b", "dogs/c"):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(len(name) + ord(name[-1])))
    return tmp_path / "photos"


def test_init_plan_run_and_open_from_a_folder_by_keywords(photos: Path, ray_session: None) -> None:
    started = reinforce.init(photos)
    assert started.path == Path("photos.yaml")
    assert started.config.source
    assert "written: photos.yaml" in str(started)
    with pytest.raises(UserError, match=r"photos\.yaml exists"):
        reinforce.init(photos)
    made = photos.parent / "photos-reinforced"
    keys: dict[str, Any] = config_of(str(photos), made, captioners={}, input={"captions": ()})
    keys |= {"source": photos, "output": made}
    planned = reinforce.plan(**keys)
    assert (planned.shards, planned.pending, planned.sample is not None) == (1, 1, True)
    assert planned.bytes is not None or planned.report.expected["embeddings/red/images"] is None
    assert "embeddings/red/images" in planned._repr_html_()
    summary = reinforce.run(**keys)
    assert (summary.samples, summary.status) == (3, 0)
    assert len(reinforce.open(keys["output"], teachers="red").samples) == 3
    again = reinforce.plan(keys)
    assert (again.pending, again.bytes) == (0, 0)
    assert reinforce.init(photos, force=True).lines == started.lines, "also where the dataset exists"


def test_keywords_change_a_config_section_by_section(made: Path, tmp_path: Path) -> None:
    config = config_for(made)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    more = {"teachers": {"third": {"class": "tests.helpers.models:ColorTeacher", "logit_scale": np.float32(2)}}}
    for given in (tmp_path / "my.yaml", str(tmp_path / "my.yaml"), config, reinforce.load_config(tmp_path / "my.yaml")):
        planned = reinforce.plan(given, **more, augmentations={"count": np.int64(2)})
        assert {*planned.report.plan.config.teachers} == {"red", "blue", "third"}
        assert planned.pending == 2
        assert planned.report.plan.states["embeddings/blue/images"].missing == 0


def test_check_measures_the_models_of_a_config_or_a_class(made: Path) -> None:
    report = reinforce.check(config_for(made, captioners={}))
    assert {(row.model, row.side) for row in report.rows} == {
        (m, s) for m in ("red", "blue") for s in ("images", "texts")
    }
    assert "red" in report._repr_html_()
    rows = reinforce.check("tests.helpers.models:ColorTeacher", options={"dim": 4}).rows
    assert {row.dim for row in rows} == {4}


def test_train_evaluate_select_and_inspect_return_figures(
    dataset: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reinforce.processes.parallel.available_cores", lambda: 1)
    config = student_config(tmp_path, str(dataset), loss={"logit_scales": {"blue": 20.0}})
    results = reinforce.train(config, train={"steps": 3}, seed=7)
    assert results.steps == 3
    pairs = {"made": dataset}
    report = reinforce.evaluate(results.output, retrieval=pairs)
    [metrics] = [one.metrics for one in report.results.values()]
    assert {*metrics} > {"retrieval/made/text_to_image/r1"}
    assert all(0 <= value <= 1 for value in metrics.values())
    assert "retrieval/made/text_to_image/r1" in report._repr_html_()
    model = open_clip_model(tmp_path / "other")
    assert (
        len(reinforce.evaluate([results.output, model], {"retrieval": {"made": {"pairs": str(dataset)}}}).results) == 2
    )

    chosen = reinforce.select(dataset=dataset, name="some", rules=[{"sample": 5}])
    assert (chosen.kept, chosen.samples, len(reinforce.open(dataset, view="some"))) == (5, 12, 5)
    assert "5 of 12 samples" in chosen._repr_html_()
    shown = reinforce.inspect(dataset, tmp_path / "report", teachers=["red"], captioners=[], limit=4)
    assert shown.samples == 12
    assert f'href="{tmp_path}/report/index.html"' in shown._repr_html_()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda tmp: reinforce.init(3), "init: data: Input should be a valid string, got 3"),
        (lambda tmp: reinforce.init(tmp / "missing"), "missing"),
        (lambda tmp: reinforce.init(tmp, output="x.yaml", forced=True), "argument 'forced'. It takes: data"),
        (lambda tmp: reinforce.plan(), "want the path of a YAML file, .* keywords such as `source` and `output`"),
        (lambda tmp: reinforce.plan(7), "got int"),
        (lambda tmp: reinforce.plan(source=7, output="x"), "source.*got 7"),
        (lambda tmp: reinforce.plan(tmp / "no.yaml"), "no.yaml: No such file.*Give the path of a YAML file"),
        (lambda tmp: reinforce.plan(source=tmp / "none", output=tmp / "x"), "none"),
        (lambda tmp: reinforce.run({"source": "a", "outptu": "b"}), "outptu: unknown key; known keys"),
        (lambda tmp: reinforce.run(source="a", output="b", retry_quarantined="yes"), "should be a valid bool"),
        (lambda tmp: reinforce.check("our_missing:Class"), "our_missing"),
        (lambda tmp: reinforce.check("tests.helpers.models:ColorTeacher", source="x"), "source belong to a config"),
        (lambda tmp: reinforce.check({"source": "a", "output": "b"}, kind="teacher"), "belong to a class"),
        (lambda tmp: reinforce.train(output=tmp, data=3), "config has .* errors"),
        (lambda tmp: reinforce.train({"output": str(tmp), "student": {"model": "ViT-B-32"}, "train": {"steps": 20},
                                      "data": {"datasets": str(tmp / "none")}}), "none is not a reinforced dataset"),
        (lambda tmp: reinforce.evaluate("ViT-B-32,openai"), "nothing to evaluate on"),
        (lambda tmp: reinforce.evaluate(tmp / "gone", zero_shot={"a": "x"}), "gone"),
        (lambda tmp: reinforce.evaluate(4, zero_shot={"a": "x"}), "evaluate: models: .*got 4"),
        (lambda tmp: reinforce.evaluate("a", compare="b"), "belong to `suite`"),
        (lambda tmp: reinforce.train(output=tmp, learning_rate=1e-4), "learning_rate of .* `train.optimizer.lr` here"),
        (lambda tmp: reinforce.adapt(source=tmp, output=tmp / "x"), "released: is required"),
        (lambda tmp: reinforce.adapt(source=7, output=tmp, released={"model": "a"}), "source: .*got 7"),
        (lambda tmp: reinforce.adapt(source=tmp, output=tmp, released=tmp / "none"), "none"),
        (lambda tmp: reinforce.adapt(source=tmp, output=tmp, released="s3://b/m"), "copy the model to this machine"),
        (lambda tmp: reinforce.adapt(source=tmp / "none", output=tmp / "x", released="ViT-B-32,x"), "ViT-B-32"),
        (lambda tmp: reinforce.adapt(source=tmp, output=tmp, released={"model": "a"}, general={"zero_shot": {"a": 3}}),
         "general.zero_shot.a: .*got 3"),
        (lambda tmp: reinforce.select(RULE, dataset=tmp / "none"), "none is not a reinforced dataset"),
        (lambda tmp: reinforce.select(name="a"), "dataset: is required"),
        (lambda tmp: reinforce.inspect(tmp / "none", tmp / "report"), "none is not a reinforced dataset"),
        (lambda tmp: reinforce.inspect(tmp, tmp / "report", limit="many"), "limit: .* integer, got 'many'"),
        (lambda tmp: reinforce.inspect(tmp, tmp / "report", limit=0), "limit must be at least 1"),
        (lambda tmp: reinforce.open(None), "open: url: Input should be a valid string, got None"),
        (lambda tmp: reinforce.open(tmp / "none"), "none is not a reinforced dataset"),
        (lambda tmp: reinforce.open(tmp, teachers=3), "open: teachers"),
        (lambda tmp: reinforce.open(tmp, teacher="a"), "unexpected keyword argument 'teacher'. It takes: url"),
    ],
)  # fmt: skip
def test_wrong_types_and_missing_files_are_one_error_that_names_them(
    tmp_path: Path, act: Callable[[Path], object], message: str
) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        act(tmp_path)


def test_an_unfinished_dataset_is_one_error_for_each_function(dataset: Path, tmp_path: Path) -> None:
    for path in (dataset / "embeddings/red/images").glob("*.parquet"):
        path.unlink()
    student = {"output": str(tmp_path / "s"), "student": {"model": "ViT-B-32"}, "train": {"steps": 20}}
    for act in (
        lambda: reinforce.open(dataset),
        lambda: reinforce.Examples(dataset),
        lambda: reinforce.train(student, data={"datasets": dataset}, loss={"logit_scales": {"blue": 9.0}}),
        lambda: reinforce.select(RULE, dataset=dataset),
        lambda: reinforce.inspect(dataset, tmp_path / "report"),
    ):
        with pytest.raises(UserError, match=r"(?s)red/images.*(Finish|reinforce run)"):
            act()


def test_a_notebook_shows_progress_of_select_in_its_output(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reinforce.select(dataset=dataset, name="some", rules=[{"sample": 5}])
    assert "writing 2 shards" in capsys.readouterr().out


def test_a_script_without_a_guard_of_its_main_module_trains_with_loader_processes(made: Path, tmp_path: Path) -> None:
    keys = {"data": {"workers": 1}, "loss": {"logit_scales": {"blue": 20.0}}}
    config = student_config(tmp_path, str(made), **keys).model_dump(mode="json", by_alias=True, exclude_unset=True)
    script = tmp_path / "script.py"
    script.write_text(f"import reinforce\nprint('begins')\nprint('steps:', reinforce.train({config!r}).steps)\n")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout.count("begins"), done.stdout.count("steps: 2")) == (1, 1)
