"""`make ablations`: its arms, what it reads of finished trainings, and the page it writes. Nothing is trained here."""

from __future__ import annotations

import json
import math
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.ablations import page
from benchmarks.ablations.arms import BASE, WRONG, Study
from benchmarks.ablations.captions import write_wrong
from benchmarks.ablations.claims import Compare, Pick, Sooner, agreement
from benchmarks.ablations.found import Answer, Training, answer, derived, training_of
from benchmarks.ablations.measures import BYTES, KEPT, REACH, reached_at
from benchmarks.ablations.questions import SCALES, Question, questions
from reinforce.config import load_config
from reinforce.dataset.store import Store
from reinforce.demo.compare import MEASURES, SECONDS
from reinforce.errors import UserError
from reinforce.training.results import Results
from tests.helpers.data import members_of, write_tar

ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(ROOT)
    return Study(tmp_path / "out")


# --- arms


def test_every_arm_is_a_valid_training_of_one_core(study: Study) -> None:
    for question in questions(study).values():
        labels = [arm.label for arm in question.arms]
        assert len(set(labels)) == len(labels) > 1
        for arm in question.arms:
            config = study.student(arm, seed=2)
            assert (config.seed, config.output) == (2, f"{study.out}/students/{arm.name}-2")
            assert [source.url for source in config.data.datasets] == [study.dataset_url(arm.dataset)]
            assert (config.train.compute.cpus, config.data.workers) == (1, 0)
            assert {metric for _, metric in MEASURES.values()} <= set(config.evaluate.metrics)


def test_every_dataset_is_a_valid_run_of_its_own(study: Study) -> None:
    questions(study)
    configs = {name: study.dataset_config(name) for name in study.datasets}
    assert configs[BASE] == load_config("configs/demo.yaml", [f"output={study.out}/datasets/base"])
    assert len({config.model_dump_json(exclude={"output"}) for config in configs.values()}) == len(configs)
    assert {config.augmentations.count for config in configs.values()} >= {1, 2, 5, 10, 30}
    assert {spec.dtype for config in configs.values() for spec in config.teachers.values()} >= {"float32", "int8"}
    assert configs[WRONG].source == f"{study.wrong_shards}/*.tar"
    first, second = configs["two-captioners"].captioners.values()
    assert (first.model, first.captions, second.captions) == (second.model, 1, 1)
    assert first.decoding() != second.decoding()


def test_equal_arms_are_trained_once(study: Study) -> None:
    asked = questions(study)
    arms = {arm.name: arm for question in asked.values() for arm in question.arms}
    configs = {study.student(arm, 0).model_dump_json(exclude={"output", "seed", "evaluate"}) for arm in arms.values()}
    assert len(configs) == len(arms)
    shared = {"ways": "stored", "teachers": "ensemble", "lambda": "lambda 1", "storage": "float16"}
    for name, label in shared.items():
        assert {arm.label: arm.name for arm in asked[name].arms}[label] == "distilled"
    count = study.demo.augmentations.count
    assert {arm.name for arm in asked["augmentations"].arms if arm.x == count} == {"distilled"}


def test_teachers_and_captioner_are_those_of_the_demos_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo, student = (yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()) for name in ("demo", "student-demo"))
    others = list(demo["teachers"])[1:]
    demo["teachers"] = dict(zip(["dr.one", *others], demo["teachers"].values(), strict=True))
    demo["captioners"] = dict(zip(["teller"], demo["captioners"].values(), strict=False))
    student["data"] |= {"teachers": ["dr.one", *others], "captioners": ["teller"]}
    (tmp_path / "configs").mkdir()
    for name, config in (("demo", demo), ("student-demo", student)):
        (tmp_path / f"configs/{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    study = Study(tmp_path)
    asked = questions(study)
    assert [arm.label for arm in asked["teachers"].arms] == ["dr.one", *others, "ensemble"]
    online = study.student(asked["ways"].arms[1], 0)
    assert online.loss.targets == "online"
    assert online.loss.teachers == study.demo.teachers
    assert study.student(asked["scales"].arms[0], 0).loss.logit_scales == dict.fromkeys(
        ["dr.one", *others], float(SCALES[0])
    )
    two = study.student(asked["captions"].arms[-1], 0)
    assert list(two.data.captioners or {}) == list(study.dataset_config("two-captioners").captioners)


def test_changes_are_of_all_students_and_faults_are_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    study = Study(tmp_path, ["train.steps=120", "train.optimizer.warmup=5"])
    asked = questions(study)
    trained = [study.student(arm, 0) for question in asked.values() for arm in question.arms]
    assert {config.train.steps for config in trained} == {study.steps} == {120}
    assert study.student(study.plain, 0).evaluate.every == 10  # which is followed
    assert study.student(asked["ways"].arms[1], 0).evaluate.every is None
    with pytest.raises(UserError, match="warmup"):
        Study(tmp_path, ["train.steps=5", "train.optimizer.warmup=5"])
    with pytest.raises(UserError, match=r"train\.epochs=null"):
        Study(tmp_path, ["train.steps=null", "train.epochs=3"])


def test_the_asked_share_of_captions_is_exchanged_and_all_else_stays(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", members_of(shard, 25))
    made = write_wrong(f"{tmp_path}/*.tar", tmp_path / "wrong", share=0.4)
    before, after = ({}, {})  # type: dict[str, bytes], dict[str, bytes]
    for folder, found in ((tmp_path, before), (tmp_path / "wrong", after)):
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert list(before) == list(after)
    wrong = {name for name in before if before[name] != after[name] and name.endswith(".txt")}
    assert len(wrong) == 20
    assert sorted(after[name] for name in wrong) == sorted(before[name] for name in wrong)
    for name, content in before.items():
        if name.endswith(".json") and f"{name.removesuffix('.json')}.txt" in wrong:
            caption = after[f"{name.removesuffix('.json')}.txt"].decode()
            assert json.loads(after[name]) == {**json.loads(content), "caption": caption}
        elif name not in wrong:
            assert after[name] == content
    again = write_wrong(f"{tmp_path}/*.tar", tmp_path / "again", share=0.4)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in made]


# --- the rule


def _numbers(**arms: Sequence[float]) -> dict[str, dict[str, Sequence[float]]]:
    return {label: {"unseen_style": values} for label, values in arms.items()}


def test_arms_differ_where_their_means_are_further_apart_than_the_noise() -> None:
    near, far = _numbers(a=[0.30, 0.32, 0.31], b=[0.29, 0.33, 0.30]), _numbers(a=[0.3, 0.32, 0.31], b=[0.1, 0.12, 0.11])
    assert Compare("unseen_style", "a", "level with", "b").judge(near).holds
    assert Compare("unseen_style", "a", "not above", "b").judge(near).holds
    assert not Compare("unseen_style", "a", "above", "b").judge(near).holds
    assert Compare("unseen_style", "a", "above", "b").judge(far).holds
    assert not Compare("unseen_style", "a", "level with", "b").judge(far).holds
    assert Compare("unseen_style", "b", "below", "a").judge(far).holds
    # two standard errors: twice the root of 2 / 3 x (the mean of 0.01^2 and 0.01^2)
    assert "20.0 points apart, noise 1.6" in Compare("unseen_style", "a", "above", "b").judge(far).text


def test_the_best_of_several_has_to_be_further_off() -> None:
    numbers = _numbers(a=[0.30, 0.32, 0.31], b=[0.28, 0.30, 0.29], c=[0.28, 0.30, 0.29])
    assert Compare("unseen_style", "a", "above", "b").judge(numbers).holds
    verdict = Compare("unseen_style", "a", "above", Pick(["b", "c"], "the best other")).judge(numbers)
    assert not verdict.holds
    assert "a above the best other (b): no, it is level with it" in verdict.text


def test_the_step_that_reaches_a_level_lies_on_the_straight_line() -> None:
    curve = [(10, 0.1), (20, 0.3), (30, 0.2)]
    assert [reached_at(curve, level) for level in (0, 0.05, 0.1, 0.2, 0.3)] == [0, 5, 10, 15, 20]
    assert math.isinf(reached_at(curve, 0.31))
    never = {"a": {"own_style" + REACH: [5.0, math.inf]}, "b": {"own_style" + REACH: [20.0, 20.0]}}
    verdict = Sooner("own_style", "a", "b").judge(never)
    assert not verdict.holds
    assert "with 1 of 2 seeds" in verdict.text
    assert "never with 1" in verdict.text


# --- the page


def _answer(question: Question, levels: Mapping[str, float], seeds: int = 3) -> Answer:
    """Every measure of an arm is its level, give or take a thousandth; accuracy grows evenly over the steps."""
    numbers: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, dict[str, list[list[tuple[int, float]]]]] = {}
    for arm in question.arms:
        values = [levels[arm.label] + 0.001 * seed for seed in range(seeds)]
        numbers[arm.label] = dict.fromkeys((*MEASURES, SECONDS, BYTES), values)
        if question.target is not None:
            curves[arm.label] = {name: [[(50, v / 2), (100, v)] for v in values] for name in MEASURES}
    return derived(Answer(question, numbers, "this one", curves))


def _written(study: Study, answers: Sequence[Answer], folder: Path, seeds: int = 3) -> tuple[str, dict[str, object]]:
    told = page.about(study, seeds, [given.question.name for given in answers])
    page.write(study, answers, told, folder / "page.md", folder / "numbers.json")
    return (folder / "page.md").read_text(), json.loads((folder / "numbers.json").read_text())


def test_the_page_says_where_numbers_agree_and_where_they_do_not(study: Study, tmp_path: Path) -> None:
    asked = questions(study)
    agrees = _answer(asked["lambda"], {"lambda 0": 0.1, "lambda 0.3": 0.2, "lambda 0.7": 0.31, "lambda 1": 0.31})
    falls = _answer(asked["lambda"], {"lambda 0": 0.4, "lambda 0.3": 0.3, "lambda 0.7": 0.2, "lambda 1": 0.1})
    text, _ = _written(study, [agrees], tmp_path)
    assert "| [Lambda](#lambda) | agree |" in text
    assert "**The numbers here agree.**" in text
    assert "unseen style, lambda 1 above lambda 0: yes (31.1% and 10.1%, 21.0 points apart" in text
    assert "| lambda 0.7 | 31.1% ± 0.1 |" in text
    text, numbers = _written(study, [falls], tmp_path)
    assert "**The numbers here do not agree.**" in text
    assert "unseen style, lambda 1 above lambda 0: no, it is below it" in text
    assert "retrieval R@5, lambda 0.7 not below the best other (lambda 0): no" in text
    found = numbers["questions"]["lambda"]  # type: ignore[index]
    assert [claim["holds"] for claim in found["claims"]] == [False] * 3
    assert found["arms"]["lambda 1"]["arm"] == "distilled"
    assert found["arms"]["lambda 1"]["unseen_style"]["seeds"] == pytest.approx([0.1, 0.101, 0.102])
    assert numbers["command"] == "python -m benchmarks.ablations --questions lambda"


def _rising(question: Question) -> Answer:
    return _answer(question, {arm.label: 0.1 + 0.05 * place for place, arm in enumerate(question.arms)})


def test_every_question_has_its_section(study: Study) -> None:
    asked = questions(study)
    judged = [(given, page.verdicts_of(given)) for given in map(_rising, asked.values())]
    text = page.text(judged, page.about(study, 3, list(asked)))
    assert "make ablations" in text
    for (name, question), (given, verdicts) in zip(asked.items(), judged, strict=True):
        assert f"\n## {question.title}\n\n{question.paper}\n" in text
        assert f"(ablations/{name}.png)" in text
        assert all(f"- {verdict.text}.\n" in text for verdict in verdicts)
        assert all(f"\n| {label} |" in text for label in given.numbers)


def test_pictures_and_what_follows_from_numbers(study: Study, tmp_path: Path) -> None:
    asked = questions(study)
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "scales.png").touch()  # of an earlier page
    _, numbers = _written(study, [_rising(asked[name]) for name in ("augmentations", "noise", "steps")], tmp_path)
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"augmentations.png", "noise.png", "steps.png"}
    noise, steps = (numbers["questions"][name]["arms"] for name in ("noise", "steps"))  # type: ignore[index]
    wrong = [label for label in noise if KEPT in noise[label]]
    assert len(wrong) == 2
    assert noise[wrong[0]][KEPT]["mean"] == pytest.approx(noise[wrong[0]]["own_style"]["mean"] / 0.101, rel=0.01)
    assert steps["plain"]["own_style" + REACH]["mean"] == 100
    assert steps["distilled"]["own_style" + REACH]["mean"] == pytest.approx(100 * 0.101 / 0.151, rel=0.01)


def test_answers_stay_while_their_arms_do(study: Study, tmp_path: Path) -> None:
    asked = questions(study)
    given = [_rising(asked[name]) for name in ("noise", "steps")]
    given[1].numbers["plain"]["own_style" + REACH] = [50.0, math.inf, 60.0]  # type: ignore[index]
    text, numbers = _written(study, given, tmp_path)
    kept = page.kept(study, 3, tmp_path / "numbers.json")
    assert list(kept) == ["noise", "steps"]
    assert _written(study, [*kept.values()], tmp_path / "again") == (text, numbers)
    assert not page.kept(study, 2, tmp_path / "numbers.json")
    assert not page.kept(study, 3, tmp_path / "nothing.json")
    assert not page.kept(Study(study.out, ["train.steps=120"]), 3, tmp_path / "numbers.json")
    numbers["questions"]["steps"]["recipe"] = "of other weights"  # type: ignore[index]
    (tmp_path / "numbers.json").write_text(json.dumps(numbers))
    assert list(page.kept(study, 3, tmp_path / "numbers.json")) == ["noise"]


def test_machines_are_told_with_their_questions_where_they_differ(study: Study, tmp_path: Path) -> None:
    asked = questions(study)
    here, there = _rising(asked["lambda"]), replace(_rising(asked["scales"]), machine="another")
    assert "(torch" in _written(study, [here], tmp_path)[0]
    assert ";\nthis one).\n" in _written(study, [here], tmp_path)[0]
    assert "\nthis one; another, for *Logit scales*).\n" in _written(study, [here, there], tmp_path)[0]


def test_one_seed_concludes_nothing(study: Study) -> None:
    asked = questions(study)["teachers"]
    given = _answer(asked, dict.fromkeys((arm.label for arm in asked.arms), 0.1), seeds=1)
    told = page.about(study, 1, ["teachers"])
    assert page.verdicts_of(given) == []
    assert agreement([]) in page.text([(given, [])], told)
    assert told.command.endswith("--questions teachers --seeds 1")


# --- what is finished


def _dataset(study: Study, name: str = BASE) -> None:
    """What is read of a dataset."""
    manifest = {
        "format": "reinforced-dataset",
        "schema_version": 1,
        "layers": {"samples": {"fingerprint": "f00d"}},
        "teachers": {name: {"logit_scale": 50.0} for name in study.teachers},
        "captioners": {},
    }
    Store(study.dataset_url(name)).write_json(manifest, "dataset.json")


def _end(training: Training, metric: float, steps: int) -> None:
    """What a training leaves that ended so."""
    metrics = {name: metric for _, name in MEASURES.values()}
    training.begin()
    results = Results(str(training.folder), "student", steps, steps * 192, 60.0, 1_000_000, 1.0, metrics, None, 0)
    results.write(Store(str(training.folder)))
    rows = [{"step": step, "metrics": dict.fromkeys(metrics, metric * step / steps)} for step in (steps // 2, steps)]
    (training.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_question_is_answered_when_all_its_seeds_have_ended(study: Study, tmp_path: Path) -> None:
    asked = questions(study)
    assert training_of(study, study.plain, 0) is None  # there is no dataset yet
    _dataset(study)
    for arm in asked["lambda"].arms:
        for seed in range(2):
            training = training_of(study, arm, seed)
            assert training is not None
            assert training.results() is None
            _end(training, 0.2 if arm.name == "distilled" else 0.1, study.steps)
    answers = [found for question in asked.values() if (found := answer(study, question, 2)) is not None]
    assert [found.question.name for found in answers] == ["lambda"]  # the plain student is missing to others
    text, numbers = _written(study, answers, tmp_path, seeds=2)
    assert list(numbers["questions"]) == ["lambda"]  # type: ignore[call-overload]
    assert "Synthetic captions" not in text
    assert answer(study, asked["lambda"], 3) is None
    shutil.rmtree(study.out / "students" / "distilled-1")
    assert answer(study, asked["lambda"], 2) is None


def test_a_training_of_another_config_or_dataset_is_refused(study: Study) -> None:
    _dataset(study)
    training = training_of(study, study.distilled, 0)
    assert training is not None
    _end(training, 0.2, study.steps)
    assert training.results() is not None
    assert training.step == study.steps
    longer = training_of(Study(study.out, ["train.steps=9999"]), study.distilled, 0)
    assert longer is not None
    assert longer.results() is None
    with pytest.raises(UserError, match=r"train\.steps: \d+ before, 9999 now\n.*Delete "):
        longer.begin()
    manifest = json.loads(Path(study.dataset_url(BASE), "dataset.json").read_text())
    manifest["layers"]["samples"]["fingerprint"] = "beef"
    Path(study.dataset_url(BASE), "dataset.json").write_text(json.dumps(manifest))
    other = training_of(study, study.distilled, 0)
    assert other is not None
    with pytest.raises(UserError, match="fingerprint of samples"):
        other.begin()
