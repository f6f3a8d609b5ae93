"""``reinforce publish model``: what open_clip loads from the Hub, the card, and what is never published."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_settings
import open_clip
import pytest
import torch
import yaml

import reinforce
from reinforce.errors import UserError
from reinforce.publishing.model import publish_model
from reinforce.student.model import export
from teachers.open_clip.teacher import load_model
from teachers.spec import ModelSpec
from tests.helpers.commands import Printed
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.evaluation import write_colour_folder
from tests.helpers.hub import Hub, serving_hub
from tests.helpers.reinforced import reinforce_here
from tests.helpers.students import KINDS, built, student_config, student_folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub without repositories, for which there is a token."""
    (tmp_path / "hub").mkdir()
    with serving_hub(tmp_path / "hub") as (handler, endpoint):
        monkeypatch.setattr(hub_settings, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            hub_settings, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hub_settings, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_tests")
        yield handler


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of a training from a dataset with two teachers, a classifier and a captioner, with an evaluation."""
    folder = tmp_path_factory.mktemp("trained")
    write_tar(folder / "source" / "0.tar", members_of(0, 12))
    teachers = {
        "red": {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16}, "logit_scale": 50.0},
        "unused": {"class": "tests.helpers.models:ImageOnly"},
    }
    classifiers = {"colors": {"class": "tests.helpers.models.classifiers:Colors", "k": 3}}
    made = config_of(f"{folder}/source/*.tar", folder / "photos-dr", teachers=teachers, classifiers=classifiers)
    dataset = reinforce_here(made)
    sets = {"colours": {"images": write_colour_folder(folder / "colours"), "templates": "none"}}
    config = student_config(
        folder,
        [{"url": dataset}],
        data={"teachers": ["red"]},
        loss={"probabilities": 0.1},
        evaluate={"zero_shot": sets},
    )
    return reinforce.train(config).output


def set_text(config: Path, **changes: Any) -> None:
    """Change keys of the ``text_cfg`` of an open_clip_config.json."""
    content = json.loads(config.read_text())
    content["model_cfg"]["text_cfg"] |= changes
    config.write_text(json.dumps(content))


def loaded(name: str) -> dict[str, torch.Tensor]:
    model, _, _ = open_clip.create_model_and_transforms(name)
    return dict(model.state_dict())


def published_texts(folder: Path) -> Iterator[tuple[str, str]]:
    for path in folder.iterdir():
        yield path.name, path.read_bytes().decode("utf-8", "replace")


def check_loading(card: str, expected: dict[str, torch.Tensor]) -> None:
    """Run the two ways of loading that a card has."""
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        exec(block, scope)
    state = scope["model"].state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    with torch.no_grad():
        vectors = scope["model"].eval().encode_text(scope["tokenizer"](["a cat"]), normalize=True)
    torch.testing.assert_close(scope["student"].encode_texts("a cat"), vectors)


def test_open_clip_loads_a_published_student_and_its_card_states_its_origin(
    hub: type[Hub], trained: str, tmp_path: Path, printed: Printed, refused: Printed
) -> None:
    words = ("publish", "model", trained, "hf://x/small-clip")
    out = printed(*words, "--license", "mit", "--license-of", "red=apple-amlr")
    assert 'load it: reinforce.Student.load("hf-hub:x/small-clip")' in out
    folder = hub.root / "small-clip"
    files = {"README.md", "open_clip_config.json", "open_clip_model.safetensors"}
    assert {path.name for path in folder.iterdir()} == files
    assert hub.commits == ["Publish small-clip"], "all files in one commit"
    expected = loaded(f"local-dir:{trained}/student")
    found = loaded("hf-hub:x/small-clip")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())

    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["library_name"]) == ("mit", "open_clip")
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    manifest = json.loads(Path(trained).parent.joinpath("photos-dr/dataset.json").read_text())
    for layer in ("samples", "embeddings/red/images", "embeddings/red/caption", "probabilities/colors"):
        assert manifest["layers"][layer]["fingerprint"] in card, layer
    (teacher,) = [line for line in card.splitlines() if line.startswith("| red")]
    assert "ColorTeacher" in teacher
    (classifier,) = [line for line in card.splitlines() if line.startswith("| colors")]
    assert "Colors" in classifier
    assert "apple\\-amlr" in teacher
    assert "unused" not in card
    assert "photos\\-dr" in card
    results = json.loads(Path(trained, "results.json").read_text())
    for name, value in results["metrics"].items():
        assert f"| {name} | {value:.4f} |" in card.replace("\\", ""), name
    assert "`train.batch` | 8" in card
    check_loading(card, expected)
    for name, text in published_texts(folder):
        for private in (str(tmp_path.parent), str(Path(trained).parent), str(Path.home()), "hf_secret"):
            assert private not in text, (name, private)

    printed(*words)  # replaces its own card
    (folder / "README.md").write_text("by hand")
    assert "README.md was not written by this command. --force replaces it." in refused(*words)
    printed(*words, "--force")
    err = refused(*words, "--license-of", "blue=mit")
    assert "--license-of blue: the model was not trained from it, but from photos-dr, red" in err


def test_what_the_card_cannot_state_is_named(trained: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    data = Path(trained).parent / "photos-dr"
    data.rename(tmp_path / "elsewhere")
    published = publish_model(str(run), str(tmp_path / "one"))
    (tmp_path / "elsewhere").rename(data)
    assert [note.partition(":")[0] for note in published.notes] == [
        "the card has no teachers and captioners of photos-dr"
    ]
    card = (tmp_path / "one/README.md").read_text()
    assert "photos\\-dr" in card
    assert "## Teachers" not in card
    last = sorted((run / "checkpoints").glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        publish_model(str(run), str(tmp_path / "two"))
    shutil.rmtree(run / "checkpoints")
    published = publish_model(str(run), str(tmp_path / "two"))
    assert published.notes == (f"{run} has no checkpoint, so the card does not state what the model was trained from",)
    assert "## Evaluation" in (tmp_path / "two/README.md").read_text()
    (run / "student/open_clip_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"run: the weights in .* cannot be read, copy them again"):
        publish_model(str(run), str(tmp_path / "three"))
    assert not (tmp_path / "three").exists()


def test_a_text_tower_in_a_local_folder_goes_along(hub: type[Hub], tmp_path: Path, monkeypatch: Any) -> None:
    student = built(student_folder(tmp_path / "architecture", "hf"))
    export(student, str(tmp_path / "student"))
    (tmp_path / "architecture").rename(tmp_path / "gone")
    (tmp_path / "student").rename(tmp_path / "moved")
    name = f"local-dir:{tmp_path}/moved"
    expected = student.clip.state_dict()
    state = load_model(ModelSpec(model=name)).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    publish_model(str(tmp_path / "moved"), "hf://x/with-text")
    for one, text in published_texts(hub.root / "with-text"):
        assert str(tmp_path.parent) not in text, one
    assert all(torch.equal(value, expected[key]) for key, value in loaded("hf-hub:x/with-text").items())
    texts = ["a photo of a cat", "A dog."]
    ours = open_clip.get_tokenizer(name)(texts)
    assert torch.equal(open_clip.get_tokenizer("hf-hub:x/with-text")(texts), ours)
    monkeypatch.chdir(tmp_path)
    for out in ("hf://x/with-text", "published"):
        lines = publish_model(name, out).lines()
        (call,) = [line.removeprefix("load it: ") for line in lines if line.startswith("load it: ")]
        folder = hub.root / "with-text" if "://" in out else tmp_path / out
        check_loading((folder / "README.md").read_text(), expected)
        monkeypatch.chdir("/")
        torch.testing.assert_close(eval(call).encode_texts(texts), reinforce.Student.load(name).encode_texts(texts))
        monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_call_loads_a_trained_mixed_or_published_student_of_each_kind_of_tower_from_anywhere(
    trained: str, tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    names = {"hf_tokenizer_name": f"{tmp_path}/architecture"} if kind == "hf" else {}
    student_folder(tmp_path / "architecture", kind)
    set_text(tmp_path / "architecture/open_clip_config.json", **names)
    config = {
        "output": "out",
        "student": {"model": "local-dir:architecture"},
        "data": {"datasets": [{"url": f"{Path(trained).parent}/photos-dr"}], "teachers": ["red"], "workers": 0},
        "train": {"steps": 1, "batch": 4, "optimizer": {"warmup": 0}},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    outputs = {"out": printed("train", "train.yaml")}
    outputs["between"] = printed("interpolate", "out", "local-dir:out/student", "between", "--alpha", "0.3")
    outputs["public"] = printed("publish", "model", "between", "public")
    shutil.rmtree(tmp_path / "architecture")
    texts = ["a photo of a cat", "A dog."]
    for folder, out in outputs.items():
        (call,) = [line.removeprefix("load it: ") for line in out.splitlines() if line.startswith("load it: ")]
        assert call == f'reinforce.Student.load("{tmp_path}/{folder}")'
        model = tmp_path / folder / ("student" if folder == "out" else ".")
        for path in filter(Path.is_file, model.iterdir()):
            assert str(tmp_path).encode() not in path.read_bytes(), path
        monkeypatch.chdir("/")
        before = eval(call).encode_texts(texts)
        shutil.move(tmp_path / folder, tmp_path / "moved" / folder)
        after = eval(call.replace(folder, f"moved/{folder}")).encode_texts(texts)
        monkeypatch.chdir(tmp_path)
        assert torch.equal(before, after)


def test_nothing_is_written_without_a_token_or_network(
    hub: type[Hub], trained: str, tmp_path: Path, refused: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = partial(refused, "publish", "model", trained)
    hub.refused["closed"] = 403
    assert "hf://x/closed cannot be" in (err := publish("hf://x/closed"))
    assert err.count("\n") == 1
    assert "check that the token of HF_TOKEN or `hf auth login` may write to it" in err
    assert "hf_secret" not in err
    assert "hf://datasets/x/y is not a repository of models: write hf://ORG/NAME" in publish("hf://datasets/x/y")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "already exists: remove it, or give another output" in publish(f"{tmp_path}/full")
    monkeypatch.setattr(hub_settings, "ENDPOINT", "http://127.0.0.1:9")
    assert "check the network and the address" in publish("hf://x/small-clip")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub_settings, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "cannot be written without a token: run `hf auth login`, or set HF_TOKEN" in publish("hf://x/small-clip")
    assert list(hub.root.iterdir()) == []
    assert hub.commits == []


def test_paths_and_what_open_clip_cannot_load_are_refused(tmp_path: Path) -> None:
    export(built(student_folder(tmp_path / "architecture")), str(tmp_path / "student"))
    export_config = tmp_path / "student/open_clip_config.json"
    content = export_config.read_text()
    for change, message in (
        ({"hf_tokenizer_name": "/home/me/tokenizer"}, "text_cfg.hf_tokenizer_name .* is a path of this machine"),
        ({"mixer_kernel": 3}, "open_clip has no text tower with"),
    ):
        export_config.write_text(content)
        set_text(export_config, **change)
        with pytest.raises(UserError, match=message):
            publish_model(str(tmp_path / "student"), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("hub")
def test_a_student_is_pushed_and_loaded_again_from_python(trained: str) -> None:
    student = reinforce.Student.load(trained)
    published = student.push("lab/pushed", license="mit")
    assert published.url == "hf://lab/pushed"
    again = reinforce.Student.load("hf-hub:lab/pushed")
    torch.testing.assert_close(again.encode_texts(["a cat"]), student.encode_texts(["a cat"]))
    with pytest.raises(UserError, match="published already"):
        again.push("lab/copy")
    with pytest.raises(UserError, match="repository: Input should be a valid string, got 3"):
        student.push(3)  # type: ignore[arg-type]
