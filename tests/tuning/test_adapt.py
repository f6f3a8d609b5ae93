"""``reinforce adapt``: a whole adaptation of a small model, its parts, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

import reinforce
from reinforce.storage import Storage
from reinforce.student.model import export
from reinforce.tuning import adapt as adapting
from reinforce.tuning import mixtures
from reinforce.tuning.adapt import advice
from reinforce.tuning.adapt_config import AdaptConfig, Point, Released, Rule, find_domain
from reinforce.tuning.gain import Gain
from reinforce.tuning.mixtures import Sweep
from tests.helpers.commands import Command
from tests.helpers.data import tree
from tests.helpers.evaluation import write_colour_folder
from tests.helpers.students import built, student_folder

WEIGHTS = "open_clip_model.safetensors"
FAST = ["--set", "student.train.steps=2", "--set", "student.data.workers=0"]


@pytest.fixture(autouse=True)
def _two_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate the released and the trained weights alone, not eleven mixtures."""
    monkeypatch.setattr("reinforce.tuning.adapt.GRID", (0.0, 1.0))


@pytest.fixture
def released(tmp_path: Path) -> str:
    """A small model with weights, as an option."""
    export(built(student_folder(tmp_path / "architecture", "vit")), str(tmp_path / "released"))
    return str(tmp_path / "released")


def photos(folder: Path, each: int = 5) -> str:
    """A folder of a class of images for each colour."""
    return write_colour_folder(folder / "photos", each)


def captioned(folder: Path, count: int = 24, caption: str = "photo {}") -> str:
    (folder / "captioned").mkdir()
    for number in range(count):
        Image.new("RGB", (20, 30), (number, 5 * number, 200)).save(folder / f"captioned/{number:02}.png")
        (folder / f"captioned/{number:02}.txt").write_text(caption.format(number))
    return str(folder / "captioned")


@pytest.mark.usefixtures("ray_session")
def test_class_folders_become_a_model_and_a_page_and_nothing_is_computed_twice(
    tmp_path: Path, released: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    general = f"others={write_colour_folder(tmp_path / 'others', 1)}"
    words = ["adapt", photos(tmp_path), str(out), "--model", released, "--zero-shot", general, *FAST, "--json", "-"]
    status, text, error = command(*words)
    assert status == 0, error
    report = json.loads(text)
    assert [point["alpha"] for point in report["points"]] == [0, 1]
    assert report["rule"] == {"domain": ["zero_shot/domain/top1"], "general": ["zero_shot/others/top1"], "allow": 0.005}
    train, held_out = ([one.key for one in reinforce.open(f"{out}/dataset", view=v)] for v in ("train", "held-out"))
    assert (len(train), len(held_out), {*train} & {*held_out}) == (24, 6, set())
    chosen = released if report["alpha"] == 0 else f"{out}/training/student"
    assert load_file(f"{out}/model/{WEIGHTS}").keys() == load_file(f"{chosen}/{WEIGHTS}").keys()
    assert "evaluation of 2 shares of its weights, with 6 general images" in error, "colours, one image each"
    assert "estimate:" in error
    assert "classes: 6 folders" in error
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "zero_shot/others/top1" in page
    assert str(tmp_path / "architecture") not in page
    before = tree(out)

    def fail(*_: object) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(mixtures.Evaluator, "evaluate_module", fail)
    words[2] = f"{out}/"
    status, text, error = command(*words)
    assert status == 0, error
    assert json.loads(text) == report
    changed = {name for name, data in (tree(out).items() ^ before.items())}
    assert all(name.startswith("training/") for name in changed)
    status, _, error = command(*words, "--set", "seed=1")
    assert (status, "has an adaptation with other seed" in error) == (2, True)
    for step in ("train", "run"):
        status, _, error = command(step, f"{out}/{step}.yaml")
        assert status == 0, f"each step is a command of its own: {error}"
    shutil.copytree(tmp_path / "photos/red", tmp_path / "photos/more")
    shutil.rmtree(tmp_path / "photos/red")
    status, text, error = command(*words)
    assert (status, json.loads(text)) == (0, report), "folders may come and go after the training"
    assert "5 images came after the training began and are not used" in error


@pytest.mark.usefixtures("worker_in_process")
def test_captions_are_retrieved_and_both_kinds_of_labels_are_used_where_they_are(
    tmp_path: Path, released: str, command: Command
) -> None:
    words = ["adapt", captioned(tmp_path), f"{tmp_path}/out", "--model", released, *FAST, "--json", "-"]
    status, text, error = command(*words)
    assert status == 0, error
    ways = ["retrieval/domain/text_to_image/r1", "retrieval/domain/image_to_text/r1"]
    assert json.loads(text)["rule"]["domain"] == ways
    assert "Name general sets" in (tmp_path / "out/index.html").read_text()
    both = Path(photos(tmp_path))
    for path in both.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"{path.parent.name} number {path.stem}")
    keys: dict[str, Any] = {"source": both, "output": tmp_path / "both"}
    keys |= {"student": {"train": {"steps": 2}, "data": {"workers": 0}}, "general": {"retrieval": {"all": both}}}
    keys["teachers"] = {"other": {"model": f"local-dir:{released}", "codec": "int8"}}
    export(built(student_folder(tmp_path / "mobile", "mobileclip")), str(tmp_path / "timm"))
    adapted = reinforce.adapt(**keys, released=tmp_path / "timm")
    assert adapted.sweep.rule.domain == ("zero_shot/domain/top1", *ways)
    metrics = {"zero_shot/domain/top1", *ways, "retrieval/all/text_to_image/r1"}
    assert metrics <= adapted.before.keys() == adapted.after.keys()
    assert adapted.alpha in (0, 1)
    assert all(name in adapted._repr_html_() for name in metrics)
    assert reinforce.Student.load(adapted.model).dim > 0
    vectors = {
        layer: one.get("dtype") for layer, one in reinforce.open(f"{tmp_path}/both/dataset").manifest["layers"].items()
    }
    assert (vectors["embeddings/other/caption"], vectors["embeddings/released/images"]) == ("int8", "float16")
    sample = next(iter(reinforce.open(f"{tmp_path}/both/dataset")))
    assert (sample.caption, sample.metadata) == ("blue number 0", {"class": "blue"})


@pytest.mark.usefixtures("worker_in_process")
def test_a_killed_adaptation_goes_on_with_the_step_that_was_interrupted(
    tmp_path: Path, released: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["adapt", photos(tmp_path), f"{tmp_path}/out", "--model", released, *FAST, "--json", "-"]
    for function in ("run", "divide", "train", "sweep", "cross_fit", "write_page"):
        with monkeypatch.context() as patch:
            patch.setattr(adapting, function, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            status, _, error = command(*words)
            assert status == 130, error
    status, text, error = command(*words)
    assert status == 0, error
    killed = json.loads(text)
    shutil.move(tmp_path / "out", tmp_path / "killed")
    whole = json.loads(command(*words)[1])
    assert killed["points"] == whole["points"]
    assert tree(tmp_path / "killed/model")[WEIGHTS] == tree(tmp_path / "out/model")[WEIGHTS]


def test_all_captions_of_a_photo_are_kept_where_the_first_photo_has_one(tmp_path: Path) -> None:
    source = Path(captioned(tmp_path, 3))
    rows = []
    for number, path in enumerate(sorted(source.glob("*.txt"))):
        path.unlink()
        texts = [f"photo {number}", f"picture {number}", f"image {number}"][: number + 1]
        rows.append(json.dumps({"file_name": f"{path.stem}.png", "caption": texts}))
    (source / "metadata.jsonl").write_text("\n".join(rows))
    config = AdaptConfig(source=str(source), output=str(tmp_path / "out"), released=Released(model="ViT-B-32"))
    domain = find_domain(config)
    assert domain.input == {"captions_per_sample": 3}
    assert "up to 3 true captions a sample; input.captions_per_sample keeps them" in domain.notes


def test_bad_input_is_one_line_before_anything_is_written(tmp_path: Path, released: str, command: Command) -> None:
    (tmp_path / "one").mkdir()
    shutil.copytree(Path(photos(tmp_path)) / "red", tmp_path / "one/red")
    (tmp_path / "empty").mkdir()
    good, architecture = str(tmp_path / "photos"), f"local-dir:{tmp_path}/architecture"
    sets = {
        "teachers.released.model=ViT-B-32": "choose another",
        "held_out=1.5": "held_out",
        "student.train=5": "should be a valid dictionary",
        "student.train.nonsense=1": "nonsense: unknown key",
        "student.train.steps=abc": "steps: Input should be a valid integer",
        "student.train.epochs=-1": "epochs: Input should be greater than 0",
        "run.output=x": "run.output follows from `output`",
        "run.teachers.a.model=x": "run.teachers.a.model follows from `teachers`",
        "student.data.datasets=[x]": "data.datasets follows from `source`",
        "student.student.image_size=64": "image_size follows from `released`",
    }
    cases: list[tuple[list[str], str]] = [
        ([f"{tmp_path}/one", "--model", released], "not in folders of two or more classes"),
        ([f"{tmp_path}/empty", "--model", released], "is an empty folder"),
        ([good], "name the released model with --model"),
        ([good, "--model", architecture], "weights"),
        ([good, "--model", "MobilCLIP2-S0,dfndr2b"], "MobileCLIP2-S0"),
        ([good, "--model", "MobileCLIP2-S0"], "has no weights. Name their tag"),
        ([good, "--model", released, "--zero-shot", f"others={tmp_path}/none"], "none"),
        ([good, "--model", released, "--limit", "5"], "--limit is for sets, and none is given"),
        ([good, "--model", released, "--zero-shot", f"domain={good}"], "'domain' is the name of the held-out images"),
        ([good, "--model", released, "--teachers", "ViT-B-32"], "ViT-B-32 has no weights without `pretrained`"),
        ([good, "--model", released, "--teachers", "a/m", "--teachers", "b/m"], "a/m and b/m would both be named m"),
        ([str(tmp_path), "--model", released], "is inside source"),
    ]
    cases += [([good, "--model", released, "--set", one], message) for one, message in sets.items()]
    for (data, *words), message in cases:
        status, out, error = command("adapt", data, f"{tmp_path}/out", *words)
        assert (status, out, message in error) == (2, "", True), (words, error)
        assert not (tmp_path / "out").exists(), words


@pytest.mark.usefixtures("s3", "worker_in_process")
def test_an_object_store_takes_all_that_an_adaptation_writes(tmp_path: Path, released: str, command: Command) -> None:
    out = "s3://bucket/out"
    status, text, error = command("adapt", photos(tmp_path), out, "--model", released, *FAST, "--json", "-")
    assert status == 0, error
    assert json.loads(text)["page"] == f"{out}/index.html"
    assert {"dataset", "training", "model"} <= {*Storage(out).names()}
    assert f"reinforce evaluate {out}/model" in Storage(out).read_bytes("index.html", limit=2**24).decode()


def test_no_file_has_the_secrets_of_a_config(tmp_path: Path) -> None:
    secret = {"source": "s3://me:PASSWORD@bucket/x.tar?sig=SIGNED", "output": str(tmp_path)}
    teachers = {"t": {"class": "a.b:C", "options": {"api_key": "APIKEY", "width": 3}}}
    config = AdaptConfig.model_validate({**secret, "released": {"model": "ViT-B-32"}, "teachers": teachers})
    stated = json.dumps(adapting._check_repeated(Storage(str(tmp_path)), config))
    text = stated + adapting._yaml(config).decode()
    assert not [word for word in ("PASSWORD", "SIGNED", "APIKEY") if word in text]
    assert text.count("bucket/x.tar") == 2


@pytest.mark.usefixtures("worker_in_process")
def test_too_few_images_equal_captions_and_too_many_steps_are_said(
    tmp_path: Path, released: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = captioned(tmp_path, 19)
    status, _, error = command("adapt", few, f"{tmp_path}/few", "--model", released, *FAST)
    assert (status, "has 19 usable images, and an adaptation needs 20" in error) == (2, True), error
    for number in range(20, 22):
        shutil.copy(f"{few}/00.png", f"{few}/{number}.png")
        Path(f"{few}/{number}.txt").write_text(f"photo {number}")
    with monkeypatch.context() as patch:
        patch.setattr(adapting, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        _, out, error = command("adapt", few, f"{tmp_path}/few", "--model", released, *FAST)
    assert "training on 17 images, 4 are held out" in out + error, "images may be added"
    shutil.rmtree(few)
    partly = captioned(tmp_path, 40)
    for path in sorted(Path(partly).glob("*.txt"))[:16]:
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(adapting, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        _, out, error = command("adapt", partly, f"{tmp_path}/partly", "--model", released, *FAST)
    said = re.search(r"training on (\d+) images, 8 are held out; (\d+) others? without a caption", out + error)
    missing = re.search(r"of (\d+) held-out images? have a caption .*; (\d) have none and are not", out + error)
    assert said is not None
    assert missing is not None
    assert int(said[1]) + int(missing[1]) == 24
    assert int(said[2]) + int(missing[2]) == 16
    for path in sorted(Path(partly).glob("*.txt"))[:5]:
        path.unlink()
    status, _, error = command("adapt", partly, f"{tmp_path}/fewer", "--model", released, *FAST)
    assert (status, "has 19 usable images, and an adaptation needs 20" in error) == (2, True), error
    shutil.rmtree(partly)
    equal = captioned(tmp_path, 24, "a photo")
    status, _, error = command("adapt", equal, f"{tmp_path}/equal", "--model", released, *FAST)
    assert (status, "all captions are equal" in error) == (2, True), error
    shutil.rmtree(equal)
    words = ["adapt", captioned(tmp_path), f"{tmp_path}/long", "--model", released, *FAST]
    monkeypatch.setattr(adapting, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    _, out, error = command(*words, "--set", "student.train.batch=2", "--set", "student.train.steps=1000000")
    assert "passes over 19 images are more than the 100 that help" in out + error


def test_the_page_advises_by_what_the_points_show() -> None:
    rule = Rule(("d",), ("g",), allow=0.01)

    def advised(*rows: tuple[float, float, float], chosen: int, p: float = 0.0, gained: float | None = None) -> str:
        points = [Point(alpha, {"d": domain, "g": general}) for alpha, domain, general in rows]
        after = rows[chosen][1] if gained is None else rows[0][1] + gained
        gain = Gain(rows[0][1], after, -1, 1, p, [rows[chosen][0]], [])
        return " ".join(advice(Sweep(("a", "b"), points, rule, points[chosen]), gain, points[0], points[-1]))

    assert "did not help" in advised((0, 0.5, 0.5), (1, 0.4, 0.5), chosen=0)
    assert "train for longer" in advised((0, 0.5, 0.5), (1, 0.6, 0.5), chosen=1)
    assert "loss.anchor.similarities" in advised((0, 0.5, 0.5), (0.5, 0.6, 0.5), (1, 0.7, 0.3), chosen=1)
    assert "Another seed" in advised((0, 0.5, 0.5), (0.5, 0.6, 0.5), (1, 0.5, 0.5), chosen=1)
    assert "too few to tell a gain from chance" in advised((0, 0.5, 0.5), (1, 0.6, 0.5), chosen=1, p=0.5)
    assert "too few" not in advised((0, 0.5, 0.5), (1, 0.6, 0.5), chosen=1, p=0.01)
    assert "too few" not in advised((0, 0.5, 0.5), (1, 0.4, 0.5), chosen=0, p=1.0), "there is no gain"
    assert "did not help" in advised((0, 0.5, 0.5), (1, 0.6, 0.5), chosen=1, gained=-0.1), "on images not chosen by"


@pytest.mark.usefixtures("worker_in_process")
def test_unequal_classes_with_copies_are_chosen_by_class_and_the_folder_loads_as_a_student(
    tmp_path: Path, command: Command
) -> None:
    released = tmp_path / "released"  # with a text tower and a tokenizer of Hugging Face, by their paths
    name = student_folder(released, "hf", text_cfg={"hf_tokenizer_name": str(released)})
    export(built(name), str(tmp_path / "made"))
    shutil.copy(tmp_path / "made" / WEIGHTS, released)
    source = Path(photos(tmp_path))
    for number in range(6):
        shutil.copy(source / "red/0.png", source / f"red/copy-{number}.png")
    words = ["adapt", str(source), f"{tmp_path}/out", "--model", str(released), *FAST, "--json", "-"]
    status, text, error = command(*words)
    assert status == 0, error
    report = json.loads(text)
    assert report["rule"]["domain"] == ["zero_shot/domain/mean_per_class"]
    copies, templates = report["notes"][-2:]
    assert copies.startswith("copies: 7 of 36 images have the bytes of another")
    assert "templates of zero_shot/domain: 'a photo of a {}.'" in templates
    [counted], page = report["gain"]["counted"], (tmp_path / "out/index.html").read_text()
    train, held_out = (
        [one.image for one in reinforce.open(f"{tmp_path}/out/dataset", view=view)] for view in ("train", "held-out")
    )
    assert counted["queries"] == len(held_out) == 7
    assert train.count((source / "red/0.png").read_bytes()) == 7, "such a large group is trained on"
    assert not {*train} & {*held_out}
    assert f"{counted['before']} -&gt; {counted['after']} of 7 right" in page
    assert "cross-fitting" in page
    assert copies in page
    student = reinforce.Student.load(f"{tmp_path}/out")
    assert student.encode_texts("red").equal(reinforce.Student.load(f"{tmp_path}/out/model").encode_texts("red"))
    assert json.loads(command(*words)[1]) == report, "a second run keeps the division and what was counted"
    shutil.move(tmp_path / "out/model", tmp_path / "moved")
    shutil.rmtree(released)
    assert str(tmp_path) not in (tmp_path / "moved/open_clip_config.json").read_text()
    moved = reinforce.Student.load(tmp_path / "moved")
    assert moved.encode_texts("red").equal(student.encode_texts("red")), "nothing names the released model's folder"


def test_a_folder_with_other_files_is_refused_before_anything_is_written(
    tmp_path: Path, released: str, command: Command
) -> None:
    source, out = photos(tmp_path), tmp_path / "out"
    out.mkdir()
    for name, content in (("mine.txt", "my notes"), ("adapt.json", '{"of": "another program"}')):
        (out / name).write_text(content)
        before = {path.name: path.read_text() for path in out.iterdir()}
        status, _, error = command("adapt", source, str(out), "--model", released)
        assert (status, "is not empty, and no folder of `reinforce adapt`" in error) == (2, True), error
        assert {path.name: path.read_text() for path in out.iterdir()} == before
        (out / name).unlink()
