"""Students in a teacher's space, on the data of the demo: ``make bench-space``, after ``make demo``.

Images: a student of images alone that learns the vectors of the teacher conv-64 and gets its text tower, beside one
with a space and a text tower of its own that is distilled from the same teacher, in equal steps. Texts: a text tower
that learns the same space from German names alone, of the package `emoji`, beside the teacher's image tower; a quarter
of the names is held out. Writes two tables into docs/space.md. Finished trainings are kept.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import reinforce
from benchmarks.stored import markdown_table, mean_and_spread, replace_part, update_page, write_results, write_tar
from examples.demo.compare import CONFIG
from examples.demo.data import UNSEEN_PICTURES, UNSEEN_STYLE, shared_concepts
from reinforce import settings
from reinforce.config import Config
from reinforce.evaluation.command import EvaluationCommand, evaluate_models
from reinforce.evaluation.model_names import resolve_models
from reinforce.student.config import StudentConfig

BUILD = Path("build/space")
RESULTS = Path(__file__).parent / "results" / "space.json"
PAGE = Path(__file__).parents[1] / "docs" / "space.md"
TEACHER = "conv-64"
TEACHER_MODEL = f"local-dir:configs/demo-models/{TEACHER}"
_SPACE = ("loss={lambda: 1, features: {teachers: all, head: none}}", f'data.teachers=["{TEACHER}"]')
#: Student of images -> overrides of the demo's.
ARMS: Mapping[str, Sequence[str]] = {
    "its own space": (f'data.teachers=["{TEACHER}"]',),
    "the teacher's space": (
        *_SPACE,
        "data.captions=none",
        "data.captioners=null",
        f"student.text={{model: {TEACHER_MODEL}}}",
    ),
}
MEASURES = {
    "training pictures": "zero_shot/own-style/top1",
    "unseen style": "zero_shot/unseen-style/top1",
    "unseen pictures": "zero_shot/unseen-pictures/top1",
    "retrieval, unseen style": "retrieval/unseen-style/text_to_image/r5",
}
RECALL = "recall@10 of the teacher's neighbours"
#: Sets of German and English names: whether the student was trained on the names, and the pictures.
NAMES = {"trained names": UNSEEN_STYLE, "other names": UNSEEN_PICTURES}
GERMAN = "German text tower"


def train_images(arm: str, seed: int, out: Path, more: Sequence[str]) -> dict[str, float]:
    """Train a student of images, and return its measures."""
    output = out / f"{'own' if arm == 'its own space' else 'space'}-{seed}"
    config = settings.load(StudentConfig, CONFIG, [*ARMS[arm], f"output={output}", f"seed={seed}", *more])
    results = reinforce.train(config)
    found = {name: float(results.metrics[metric] or 0) for name, metric in MEASURES.items()}
    if "text" in ARMS[arm][-1]:
        sets = {"index": {"own": {"images": f"demo/tests/{UNSEEN_STYLE}/*.tar", "teacher": TEACHER_MODEL}}}
        found[RECALL] = _evaluate(f"{output}/student", sets)["index/own/k10/recall"]
    return found


def german_names() -> dict[str, str]:
    """The German name of each concept by its key, where it is the only one of this name; of the package `emoji`."""
    import emoji

    emoji.config.load_language("de")
    names = {}
    for concept in shared_concepts():
        text = "".join(chr(int(code, 16)) for code in concept.emoji.key.split("-"))
        entries = (emoji.EMOJI_DATA.get(one, {}) for one in (text, f"{text}\ufe0f"))
        if name := next((entry["de"] for entry in entries if "de" in entry), ""):
            names[concept.emoji.key] = name.strip(":").replace("_", " ")
    several = {name for name in names.values() if [*names.values()].count(name) > 1}
    return {key: name for key, name in names.items() if name not in several}


def write_names(out: Path) -> None:
    """Write shards with English and German names in the metadata: of trained names, and of the tests; and the names."""
    german, unseen = german_names(), {concept.emoji.key for concept in shared_concepts() if concept.unseen}
    for source, name, keys in (
        ("demo/shards", "shards", german.keys() - unseen),
        (f"demo/tests/{UNSEEN_STYLE}", UNSEEN_STYLE, german.keys()),
        (f"demo/tests/{UNSEEN_PICTURES}", UNSEEN_PICTURES, german.keys()),
    ):
        (out / name).mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(source).glob("*.tar")):
            write_tar(out / name / path.name, [one for one in _samples(path, german) if one[0] in keys])
    english = {concept.emoji.key: concept.name for concept in shared_concepts()}
    for language, names in (("en", [english[key] for key in german]), ("de", [*german.values()])):
        (out / f"{language}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _samples(path: Path, german: Mapping[str, str]) -> list[tuple[str, dict[str, bytes]]]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    for key, members in samples.items():
        members["json"] = json.dumps({**json.loads(members["json"]), "de": german.get(key)}).encode()
    return [*samples.items()]


def train_texts(seed: int, out: Path, more: Sequence[str]) -> dict[str, dict[str, float]]:
    """Train a text tower on German names in the teacher's space, and return the measures by language."""
    overrides = (
        *(*_SPACE, f"output={out / f'german-{seed}'}", f"seed={seed}", f"data.datasets={out / 'dataset'}"),
        *("data.images=none", "data.captioners=[]", 'data.parallel=["json:de"]', "evaluate={}"),
        f"student={{model: {TEACHER_MODEL}, text: {{model: local-dir:configs/student-demo}}}}",
        *("train.steps=1000", "train.compute.cpus=1", "data.workers=0"),
    )
    results = reinforce.train(settings.load(StudentConfig, CONFIG, [*overrides, *more]))
    return measure_names(f"{results.output}/student", out)


def measure_names(model: str, out: Path) -> dict[str, dict[str, float]]:
    """Top-5 accuracy of a model among the names of each language, by language and set."""
    found: dict[str, dict[str, float]] = {}
    for language, label in (("German", "de"), ("English", "class")):
        classes = out / f"{'de' if label == 'de' else 'en'}.txt"
        sets = {
            name: {
                "images": f"{out / name}/*.tar",
                "classes": str(classes),
                "label": f"json:{label}",
                "templates": ["{}"],
            }
            for name in NAMES.values()
        }
        metrics = _evaluate(model, {"zero_shot": sets})
        found[language] = {shown: metrics[f"zero_shot/{name}/top5"] for shown, name in NAMES.items()}
    return found


def make_dataset(out: Path) -> None:
    """Label the shards of trained names by the teacher alone: the caption is the English name."""
    config = settings.load(
        Config,
        "configs/demo.yaml",
        [
            *(f"source={out}/shards/*.tar", f"output={out / 'dataset'}", "captioners={}", "workers.max=1"),
            f"teachers={{{TEACHER}: {{model: {TEACHER_MODEL}, logit_scale: 20}}}}",
            *("input={captions: [json:class]}", "augmentations.count=1"),
        ],
    )
    reinforce.run(config)


def _evaluate(model: str, sets: Mapping[str, Any]) -> dict[str, float]:
    with resolve_models([model]) as specs:
        report = evaluate_models(specs, settings.parse(EvaluationCommand, dict(sets)), "cpu", "fp32")
    return report.results[model].metrics


def render_page(text: str, results: Mapping[str, Any]) -> str:
    """The page with both tables written anew; the rest of ``text`` stays."""
    columns = [*MEASURES, RECALL]
    rows = [
        [arm, *(mean_and_spread([100 * seed[name] for seed in seeds]) if name in seeds[0] else "" for name in columns)]
        for arm, seeds in results["images"].items()
    ]
    text = replace_part(text, "images", markdown_table(["student with", *(f"{name}, %" for name in columns)], rows))
    columns_of_texts = [(language, name) for language in ("German", "English") for name in NAMES]
    rows = []
    for tower, seeds in results["texts"].items():
        values = [[100 * seed[language][name] for seed in seeds] for language, name in columns_of_texts]
        rows.append([tower, *(mean_and_spread(of) if len(of) > 1 else f"{of[0]:.1f}" for of in values)])
    heads = ["text tower", *(f"{language}, {name}, %" for language, name in columns_of_texts)]
    return replace_part(text, "texts", markdown_table(heads, rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.space", description=__doc__)
    parser.add_argument("--out", type=Path, default=BUILD, help="folder for datasets and trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the students of images")
    parser.add_argument("--text-seeds", type=int, nargs="+", default=[0], help="seeds of the text towers")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE override of all trainings")
    arguments = parser.parse_args()
    out, seeds, more = arguments.out, arguments.seeds, arguments.set
    images = {arm: [train_images(arm, seed, out, more) for seed in seeds] for arm in ARMS}
    write_names(out)
    make_dataset(out)
    texts = {
        "the teacher's": [measure_names(TEACHER_MODEL, out)],
        GERMAN: [train_texts(seed, out, more) for seed in arguments.text_seeds],
    }
    packages = ["torch", "open_clip_torch", "emoji"]
    about = {"seeds": seeds, "seeds_of_texts": arguments.text_seeds}
    write_results(RESULTS, packages, {**about, "images": images, "texts": texts})
    update_page(PAGE, RESULTS, render_page)


if __name__ == "__main__":
    main()
