"""The demo's commands, its models before training and in the repository, trainings in parallel, and the comparison."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from examples.demo import students
from examples.demo.__main__ import app
from examples.demo.compare import ARMS, MEASURES, PAIRS, compare_students, student_config
from examples.demo.data import UNSEEN_STYLE
from examples.demo.models import MODELS, VOCABULARY, keep_model, read_captions, write_initial_models
from examples.demo.students import train_side_by_side
from reinforce.errors import UserError
from tests.helpers.data import tree
from tests.helpers.demo import COMMITTED, ROOT, finish_training, read_shards


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_failed_training_is_named_and_terminates_the_others(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    trainings = {
        name: [f"output={tmp_path}/{name}", f"no-{name}=1"]  # found before models are imported
        for name in ("first", "second", "third")
    }
    with pytest.raises(UserError, match=r"the training '(first|second)' failed with status 2"):
        train_side_by_side(trainings, tmp_path)
    printed = capfd.readouterr().out
    assert re.search(r"(first |second) \| error: ", printed)
    assert re.search(r"(first |second) \|   no-(first|second): unknown key", printed)
    assert "third" not in printed
    assert "unknown key" in "".join(path.read_text() for path in tmp_path.glob("*.log"))


def test_progress_is_shown_and_metrics_are_not() -> None:
    shown = ["step 1,040 of 2,000  loss 4.5", "resuming after step 40 of 200"]
    lines = [*shown, "step 200: zero_shot/own-style/top1 0.3", "final loss: 2.1"]
    assert [line for line in lines if students._SHOWN.match(line)] == shown


def test_comparison_prints_a_table_and_writes_results_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arm, metric in zip(ARMS, (0.125, 0.25, 0.0625, 0.1875), strict=True):
        finish_training(tmp_path / "students" / arm, metric)
    compare_students(tmp_path / "students", tmp_path)
    printed = capsys.readouterr().out
    assert len(re.findall(r"unseen \w+ +│ +12\.5% │ +25\.0% │ +2\.0 │ +6\.2% │ +18\.8% │ +3\.0 │", printed)) >= 3
    assert f'reinforce.Student.load("{tmp_path}/students/distilled")' in printed
    finish_training(tmp_path / "students" / "plain", 0.0)
    compare_students(tmp_path / "students", tmp_path)
    assert re.search(r"unseen icons +│ +0\.0% │ +25\.0% │ +- │", capsys.readouterr().out)
    finish_training(tmp_path / "students" / "plain", 0.125)
    compare_students(tmp_path / "students", tmp_path)
    assert len(printed.splitlines()) < 30
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["distilled"] == {**dict.fromkeys(MEASURES, 0.25), "seconds_per_step": 0.2}
    assert {"own_style", "unseen_style", "unseen_pictures", "retrieval"} <= found["plain"].keys()
    with Image.open(tmp_path / "summary.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=2**20) or []) > 20


def test_unfinished_or_unequal_trainings_are_a_user_error(tmp_path: Path) -> None:
    for arm, steps, message in (
        ("plain", 300, r"plain has no finished training. Run `python -m examples\.demo students`"),
        ("distilled", 200, "distilled has no finished training"),
        ("plain-noisy", 300, "plain-noisy has no finished training"),
        ("distilled-noisy", 300, "distilled-noisy has no finished training"),
    ):
        with pytest.raises(UserError, match=message):
            run("compare", str(tmp_path))
        finish_training(tmp_path / arm, 0.1, steps=steps)
    with pytest.raises(UserError, match="200 and 300 steps"):
        compare_students(tmp_path, tmp_path)


@pytest.mark.parametrize("arms", PAIRS.values(), ids=["right", "wrong"])
def test_students_differ_only_in_lambda_and_captions(monkeypatch: pytest.MonkeyPatch, arms: tuple[str, str]) -> None:
    monkeypatch.chdir(ROOT)
    plain, distilled = (student_config(arm, "out", seed=3).model_dump() for arm in arms)
    assert (plain["loss"]["lambda_"], plain["data"]["captioners"]) == (0, {})
    for section, key in (("loss", "lambda_"), ("data", "captioners")):
        assert plain[section].pop(key) != distilled[section].pop(key)
    assert plain == distilled
    assert plain["seed"] == 3
    assert {name for _, name in MEASURES.values()} <= set(student_config("plain", "out").evaluate.metrics)


def test_commands_of_the_makefile_exist() -> None:
    commands = set(re.findall(r"examples\.demo ([\w-]+)", (ROOT / "Makefile").read_text()))
    assert commands == {"data", "teacher-data", "initial-models", "keep", "students", "compare"}
    for command in commands:
        assert "--help" in run(command, "--help")


@pytest.mark.usefixtures("few_concepts")
def test_data_repairs_damaged_shards_and_does_not_write_complete_ones_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is drawn again, to the same bytes."""
    monkeypatch.setattr("examples.demo.data.SAMPLES_PER_SHARD", 28)
    folder = tmp_path / "demo"
    out, noisy, tests = (folder / name for name in ("shards", "noisy-shards", "tests"))
    command = ("data", "--out", str(out), "--noisy", str(noisy), "--tests", str(tests))
    run(*command)
    whole = tree(folder)
    damaged = {out / "00001.tar", noisy / "00001.tar", tests / "unseen-style/00000.tar"}
    for path in damaged:
        path.write_bytes(path.read_bytes()[:1000])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    output = run(*command)
    assert f"3 shards in {out}" in output
    assert {path.name for path in tests.iterdir()} == {
        "classes.txt", "groups.json", "unseen-icons", "unseen-pictures", "unseen-style",
    }  # fmt: skip
    assert tree(folder) == whole
    assert {path for path, written in before.items() if path.stat().st_mtime_ns != written} == damaged


@pytest.fixture(scope="module")
def teacher_data(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    """Shards with enough words for the vocabulary."""
    folder = tmp_path_factory.mktemp("teacher_data")
    for name, shards in {"twemoji": "shards", "openmoji": f"tests/{UNSEEN_STYLE}"}.items():
        (folder / name).symlink_to(demo_folder / shards)
    return folder


@pytest.fixture(scope="module")
def initial_models(tmp_path_factory: pytest.TempPathFactory, teacher_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("initial_models")
    write_initial_models(folder, teacher_data)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_committed_model_is_small_has_its_initial_config_and_recognizes_an_apple(
    name: str, shards: list[Path]
) -> None:
    written = json.loads((COMMITTED / name / "open_clip_config.json").read_text())
    assert written["model_cfg"] == json.loads(json.dumps(MODELS[name]))["model_cfg"]
    weights = load_file(COMMITTED / name / "open_clip_model.safetensors")
    assert all(value.dtype == torch.float16 for value in weights.values() if value.is_floating_point())
    assert sum((COMMITTED / one / "open_clip_model.safetensors").stat().st_size for one in MODELS) < 16e6
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{COMMITTED / name}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{COMMITTED / name}")
    names = ["a red apple", "a bicycle", "a grinning face", "a dog"]
    with Image.open(io.BytesIO(read_shards(shards)["1f34e"]["png"])) as drawn:
        rgba = drawn.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    with torch.no_grad():
        seen = model.eval().encode_image(preprocess(image)[None], normalize=True)
        texts = model.encode_text(tokenizer(names), normalize=True)
    assert seen.shape == (1, MODELS[name]["model_cfg"]["embed_dim"])
    assert names[(seen @ texts.T).argmax()] == "a red apple"


def test_initial_models_are_fully_initialized_and_depend_only_on_the_seed(
    initial_models: Path, teacher_data: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        write_initial_models(tmp_path / "same", teacher_data)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), state)
    write_initial_models(tmp_path / "other", teacher_data, seed=1)
    for path in initial_models.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "same" / path.relative_to(initial_models)).read_bytes()
    weights = {
        folder: load_file(folder / "coca-64/open_clip_model.safetensors")
        for folder in (initial_models, tmp_path / "other")
    }
    assert all(torch.isfinite(value).all() for value in weights[initial_models].values())
    assert not torch.equal(*(found["text_decoder.text_projection"] for found in weights.values()))


def test_tokenizer_encodes_every_text_and_its_end_token_is_the_highest(initial_models: Path) -> None:
    tokenizer = open_clip.get_tokenizer(f"local-dir:{initial_models / 'conv-64'}")
    tokens = tokenizer(["A red Apple", "Ünïcode ☃, zzz"])
    assert tokens.shape == (2, 24)
    assert (tokens.max(dim=1).values == VOCABULARY - 1).all()
    assert [tokenizer.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens] == [
        "a red apple",
        "ünïcode ☃, zzz",
    ]


def test_keep_model_writes_float16_weights_and_copies_the_other_files(initial_models: Path, tmp_path: Path) -> None:
    size = keep_model(initial_models / "coca-64", tmp_path / "kept")
    assert size == (tmp_path / "kept/open_clip_model.safetensors").stat().st_size
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        path.name for path in (initial_models / "coca-64").iterdir()
    }
    half, whole = (
        load_file(f / "open_clip_model.safetensors") for f in (tmp_path / "kept", initial_models / "coca-64")
    )
    assert all(torch.equal(half[name], value.half()) for name, value in whole.items())
    with pytest.raises(UserError, match="finish its training first"):
        keep_model(tmp_path, tmp_path / "kept")
    with pytest.raises(UserError, match=r"python -m examples\.demo teacher-data"):
        next(read_captions(tmp_path))
