"""Everything that README.md and docs/ show works: commands, Python and configs."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import BaseModel

import reinforce
from reinforce import settings
from reinforce.cli.run import model_of
from reinforce.config import Config
from reinforce.images.policy import decode
from reinforce.source.config import LIMITS, Limits
from reinforce.student.config import StudentConfig
from reinforce_docs.check import GENERATED
from reinforce_docs.keys import groups
from schemas import Reason
from teachers.fit import fit
from teachers.open_clip.catalog import check_model
from tests.helpers import pages_commands as commands
from tests.helpers.commands import exit_status
from tests.helpers.models.tiny_models import transformers_bert, transformers_clip
from tests.helpers.pages import (
    ROOT,
    Block,
    all_blocks,
    blocks,
    inline_code,
    links,
    measured,
    pages,
    prose,
)
from tests.helpers.pages_workspace import SIZE, write_inputs
from tests.helpers.worker_in_process import worker_in_process

WRITTEN_BY_HAND = sorted(set(pages()) - GENERATED)
#: The kind of the config in NAME.yaml, by this name.
KINDS = {name: name for name in ("student", "tune", "select")} | {"finetune": "captioner", "my": "run", "photos": "run"}
CONFIGS = {f"{name}.yaml": model_of(kind) for name, kind in KINDS.items()}
#: Endings of names that are files and no keys.
FILES = (".json", ".jsonl", ".md", ".onnx", ".parquet", ".png", ".py", ".txt", ".yaml")
SHOWN = [(block, words) for block in all_blocks("console") for words in block.commands()]


def run_command(*words: str) -> None:
    assert exit_status(*words) == 0, words


run_once = cache(run_command)  # the workspace is the same for each page


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The workspace after the first commands of README.md: a dataset, and a student that was trained from it.

    Pages show many runs, so that what commands do in processes of Ray is done in this one.
    """
    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch, worker_in_process():
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr("reinforce.training.log.draw_curves", lambda *_: None)  # takes a second
        patch.setattr("reinforce.processes.parallel.available_cores", lambda: 1)
        write_inputs(folder)
        run_command("run", "my.yaml")
        run_once("select", "select.yaml")
        shutil.copytree("my-data", "demo/dataset")
        run_command("train", "student.yaml")
        yield folder
    for module in ("our_teachers", "our_scores"):
        sys.modules.pop(module, None)


@pytest.fixture
def workspace(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(built)
    return built


def run_shown(words: list[str]) -> None:
    """Run a command of a page, if it is one of those that tests run, and has not run yet."""
    if commands.rule_of(words) is not None:
        run_once(*commands.local(words)[1:])


def executed(page: str, optional: bool = False) -> dict[str, Any]:
    """The names that the Python blocks of a page leave, run one after the other, after the commands above them.

    Blocks that need an optional package run if this is asked for.
    """
    scope: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "console", "python"):
        if block.language == "console":
            for words in block.commands():
                run_shown(words)
        elif optional or not any(text in block.text for text in OPTIONAL):
            exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), scope)
    return scope


# --- commands


@pytest.mark.parametrize(("block", "words"), SHOWN, ids=[f"{b}-{' '.join(w[:3])}" for b, w in SHOWN])
def test_every_command_shown_runs_or_is_parsed(block: Block, words: list[str], workspace: Path) -> None:
    commands.check(words)
    run_shown(words)


def test_no_rule_is_left_over() -> None:
    assert {commands.rule_of(words) for _, words in SHOWN} >= {*commands.RUN}


def test_commands_in_the_comments_of_configs_are_parsed(workspace: Path) -> None:
    programs = r"^#\s+((?:reinforce|ray job|torchrun|make|python -m) .+?)(?:  +#.*)?$"
    for config in sorted(ROOT.glob("configs/**/*.yaml")):
        for line in re.findall(programs, config.read_text(encoding="utf-8"), flags=re.MULTILINE):
            for words in Block(str(config), 0, "console", line).commands():
                commands.check(words)


@pytest.mark.parametrize("page", WRITTEN_BY_HAND)
def test_commands_keys_and_tests_in_sentences_exist(page: str) -> None:
    known = known_keys()
    for code in inline_code(page):
        program, *words = code.split() or [""]
        if program in ("reinforce", "make", "python") and words:
            commands.check_names(program, words)
        dotted = re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", code) and Path(code).suffix not in FILES
        if dotted and code.partition(".")[0] in known and page not in ("docs/reading.md", "docs/file-formats.md"):
            assert code in known, f"{page}: `{code}`"
        file, separator, name = code.partition("::")
        if separator and file.startswith("tests/"):
            assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page}: {code}"


# --- Python

#: Public names that docs/python.md has without `reinforce.` before them.
NAMED_OTHERWISE = {"Dataset", "Sample", "check", "evaluate", "inspect", "load_config", "plan", "run"}
#: Packages that no extra has, by what a block of Python that needs one contains.
OPTIONAL = {"import lightning": "lightning", "TrainingArguments": "accelerate", "import Sent": "sentence_transformers"}
#: Pages whose Python leaves names that are checked; tests/captioning/test_published_sets.py runs that of captions.md.
CHECKED_BELOW = ("docs/captions.md", "docs/choosing.md", "docs/python.md", "docs/reading.md", "docs/students.md")


@pytest.mark.parametrize("page", [page for page in pages() if blocks(page, "python") and page not in CHECKED_BELOW])
def test_the_python_of_each_page_runs(page: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    executed(page)


@pytest.fixture(scope="module")
def reading(built: Path) -> dict[str, Any]:
    """The names that the Python of docs/reading.md leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(built)
        return executed("docs/reading.md")


def test_what_is_read_with_and_without_this_project_is_equal(reading: dict[str, Any]) -> None:
    stored = {sample.key: sample for sample in reading["samples"]}
    for key, vectors in zip(reading["keys"], reading["vectors"], strict=True):
        np.testing.assert_array_equal(vectors.astype(np.float32), stored[key].images["conv-64"])
    assert (reading["crop"].size, reading["large"].size) == ((SIZE, SIZE), (224, 224))
    assert reading["sample"].images["tiny"].shape == (2, 64)
    for key, caption in reading["captions"].items():
        assert caption in [stored[key].caption, *stored[key].captions["coca"]]


def test_the_samples_of_a_view_are_a_tar_that_a_run_reads(reading: dict[str, Any], workspace: Path) -> None:
    kept = {sample.key for sample in reinforce.open("my-data", view="best")}
    run_command("run", "my.yaml", "--set", "source=filtered.tar", "--set", "output=filtered", "--set", "scores={}")
    assert {sample.key for sample in reinforce.open("filtered")} == kept


def test_scores_are_read_as_the_page_shows(workspace: Path) -> None:
    names = executed("docs/choosing.md")
    samples = list(reinforce.open("my-data"))
    found = dict(names["best"])
    assert found == {sample.key: pytest.approx(sample.values["scores/match"]["caption_mean"]) for sample in samples}
    assert [score for _, score in names["best"]] == sorted(found.values(), reverse=True)
    for sample in samples:
        with Image.open(io.BytesIO(sample.image)) as image:
            pixels = torch.from_numpy(fit(image.convert("RGB"), names["Sharpness"].image).copy()).permute(2, 0, 1) / 255
        [[sharpness]] = names["Sharpness"]("cpu").score(pixels[None]).tolist()
        assert sample.values["scores/sharp"]["sharpness"] == pytest.approx(sharpness, rel=1e-4)
        vectors = sample.texts["conv-64"]
        agreement = float((vectors["caption"] @ vectors["coca"].T).mean())
        assert sample.values["scores/agreement"]["agreement"] == pytest.approx(agreement, abs=1e-5)


def test_a_picture_is_shown_to_a_student_as_the_image_policy_decodes_it(workspace: Path) -> None:
    names = executed("docs/students.md")
    expected = decode((workspace / "cat.png").read_bytes(), Limits())
    np.testing.assert_array_equal(np.asarray(names["image"]), np.asarray(expected))
    assert expected.size == (40, 60), "turned"
    assert names["similarity"].shape == (1, 1)


def test_a_loop_of_fifteen_lines_makes_ten_steps_and_the_other_python_of_its_page_runs(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = executed("docs/python.md")
    loop = next(block for block in blocks("docs/python.md", "python") if block.under.startswith("Ten steps"))
    assert len([line for line in loop.text.splitlines() if line.strip()]) <= 15
    assert {float(state["step"]) for state in names["optimizer"].state.values()} == {10.0}
    assert names["images"].shape[0] == 1
    assert {*re.findall(r"`reinforce\.(\w+)`", prose("docs/python.md"))} >= {*reinforce.__all__} - NAMED_OTHERWISE
    assert "has no teacher 'missing'" in capsys.readouterr().out


@pytest.mark.slow
def test_lightning_transformers_and_sentence_transformers_train_from_stored_targets(workspace: Path) -> None:
    for package in OPTIONAL.values():
        pytest.importorskip(package)
    transformers_clip(workspace / "my-clip")
    transformers_bert(workspace / "my-bert")
    names = executed("docs/python.md", optional=True)
    assert [names[trained].global_step for trained in ("trainer", "trained", "trained_texts")] == [10, 10, 10]
    assert all(np.isfinite(names[trained].training_loss) for trained in ("trained", "trained_texts"))


def test_layers_joined_in_sql_and_frames_are_those_of_the_samples(reading: dict[str, Any], workspace: Path) -> None:
    names, samples = reading, reading["samples"]
    vectors = np.stack([sample.images["conv-64"] for sample in samples])
    for joined in ("by_polars", "by_pandas"):
        np.testing.assert_array_equal(names[joined].astype(np.float32), vectors)
    converted = names["pd"].concat([names["pd"].read_parquet(path) for path in sorted(Path("for-spark").iterdir())])
    np.testing.assert_array_equal(np.stack(converted["embeddings"]).reshape(vectors.shape), vectors.astype(np.float32))
    loaded = [vector.numpy().astype(np.float32) for _, vector in names["Captions"]()]
    np.testing.assert_array_equal(loaded, vectors)
    scores = {
        sample.key: float(sample.images["conv-64"][0] @ sample.texts["conv-64"]["caption"][0]) for sample in samples
    }
    assert len(names["scored"]) == len(samples)
    for key, caption, synthetic, uid, score in names["scored"]:
        (sample,) = (sample for sample in samples if sample.key == key)
        assert (caption, uid, synthetic) == (sample.caption, key, (sample.captions["coca"] or [""])[0])
        assert score == pytest.approx(scores[key], abs=1e-4)


# --- configs


@cache
def complete(name: str) -> dict[str, Any]:
    """The config of this name that a page shows as a whole, over which the others are laid."""
    required = {key for key, field in CONFIGS[name].model_fields.items() if field.is_required()}
    shown = (yaml.safe_load(block.text) for block in all_blocks("yaml") if block.file == name)
    return max((config for config in shown if required <= config.keys()), key=len)


def open_clip_models(value: Any) -> Iterator[tuple[str, str]]:
    """(model, pretrained) of every mapping in a config that names both."""
    if isinstance(value, dict):
        if "model" in value and value.get("pretrained", "random") not in ("random", "transformers"):
            yield value["model"], value["pretrained"]
        for inner in value.values():
            yield from open_clip_models(inner)


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_every_config_shown_is_valid_and_open_clip_has_the_weights_that_it_names(block: Block) -> None:
    assert block.file in CONFIGS, f"{block}: begin with a comment that names one of {', '.join(CONFIGS)}"
    config = yaml.safe_load(block.text)
    settings.parse(CONFIGS[block.file], {**complete(block.file), **config}, str(block))
    for model, pretrained in open_clip_models(config):
        check_model(model, pretrained)


@pytest.mark.parametrize("block", [b for b in blocks("docs/runs.md", "yaml") if b.under == "Recipes"], ids=str)
def test_a_config_makes_the_layers_that_its_recipe_promises(block: Block, workspace: Path, tmp_path: Path) -> None:
    shown, base = yaml.safe_load(block.text), yaml.safe_load(Path("my.yaml").read_text(encoding="utf-8"))
    for kind in ("teachers", "captioners"):  # small models in place of the named ones
        model = next(iter(base[kind].values()))
        shown |= {kind: {name: model | {k: v for k, v in one.items() if k in ("codec", "captions")}
                         for name, one in shown.get(kind, {}).items()}} if kind in shown else {}  # fmt: skip
    recipe = {**base, **shown, "output": str(tmp_path / "data"), "scores": {}}
    settings.parse(Config, recipe)
    reinforce.run(recipe)
    data = reinforce.open(recipe["output"], images_from=[str(workspace / "shards")])
    assert ([*data.teachers], [*data.captioners]) == ([*recipe["teachers"]], [*recipe["captioners"]])
    assert len(next(iter(data)).augmentations) == recipe["augmentations"]["count"]
    assert data.manifest["images"] == shown.get("images", "embed")


def test_the_examples_of_readme_are_whole_configs() -> None:
    run, student = (yaml.safe_load(block.text) for block in blocks("README.md", "yaml"))
    assert set(settings.parse(Config, run).teachers) == {"dfn2b", "siglip"}
    assert settings.parse(StudentConfig, student).evaluate.best_metric == "zero_shot/imagenet/top1"


@cache
def known_keys() -> set[str]:
    """Every key of a config, such as ``workers.cpus``; names and places in lists are left out."""
    found = (group for config in CONFIGS.values() for group in groups(config))
    names = (name for group in found for name in (group.path, *(key.name for key in group.keys)))
    return {re.sub(r"\.NAME|\[\]", "", name) for name in names}


def test_the_tables_of_limits_and_reasons_are_those_of_the_code() -> None:
    cell = r" ([\d,]+)( MiB)? \|"
    table = re.findall(rf"^\| `(\w+)` \|{cell}{cell}", prose("docs/data.md"), flags=re.MULTILINE)
    for place, policy in enumerate(LIMITS.values()):
        values = {name: cells[2 * place : 2 * place + 2] for name, *cells in table}
        listed = {name: float(value.replace(",", "")) * (2**20 if mib else 1) for name, (value, mib) in values.items()}
        assert listed == policy.model_dump()
    rows = [line.partition(" | ")[0] for line in prose("docs/bad-data.md").splitlines() if line.startswith("| `")]
    reasons = [reason for cell in rows for reason in re.findall(r"`(\w+)`", cell)]
    assert sorted(reasons) == sorted(reason.value for reason in Reason)


def test_results_and_speeds_in_pages_are_those_that_were_measured() -> None:
    readme, transfer, questions = prose("README.md"), measured("transfer"), measured("ablations")["questions"]
    for plain, distilled, names in (
        ("plain", "distilled", ("unseen_style", "unseen_pictures", "unseen_icons")),
        ("plain-noisy", "distilled-noisy", ("unseen_style",)),
    ):
        for name in names:
            means = [transfer[arm][name]["mean"] for arm in (plain, distilled)]
            row = f"| {100 * means[0]:.1f} % | **{100 * means[1]:.1f} %** | {means[1] / means[0]:.1f} |"
            assert row in readme, row
    seconds = [questions["ways"]["arms"][way]["seconds_per_step"]["mean"] for way in ("online", "stored")]
    assert f"takes {seconds[0] / seconds[1]:.1f} times as long" in readme

    students, captions = prose("docs/students.md"), prose("docs/captions.md")
    step, loader = measured("step")["students"], measured("loader")
    ratios = [step["MobileCLIP2-S0"]["ratio"]["stored"], step["tiny"]["ratio"]["stored"]]
    ratios += [step["MobileCLIP2-S0"]["ratio"]["online"], loader["ratios"]["loader / webdataset"]["images/s"]]
    for text in [*(f"{ratio:.2f}" for ratio in ratios), f"{loader['medians']['loader']['images/s']:.0f} images"]:
        assert text in students, text
    for model in measured("captions")["models"].values():
        assert f"{model['speedup_natural_length']:.1f}" in captions
        assert f"{model['speedup_fixed_length']:.1f}" in captions


# --- pages


@pytest.mark.parametrize(
    ("page", "model"), [("docs/data.md", Config), ("docs/students.md", StudentConfig)], ids=["data", "students"]
)
def test_a_page_names_every_module_that_describes_keys_of_its_config(page: str, model: type[BaseModel]) -> None:
    sections = [group.section for group in groups(model)]  # one of all families is named as its base
    bases = ([one for one in section.__mro__ if one.__name__ == section.__name__][-1] for section in sections)
    modules = {base.__module__.replace(".", "/") + ".py" for base in bases}
    assert len(modules) > 1
    assert modules - {target.removeprefix("../") for target in links(page)} == set()
