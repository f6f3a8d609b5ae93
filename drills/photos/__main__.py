"""python -m drills.photos: adapt a model of released weights to real photos, by `reinforce adapt` (half an hour).

58 photos of places and music with descriptions are the domain, in five folds: a model that is adapted to four of them
finds the description of each photo of the fifth among all 58. 57 photos of animals are the general set. Before that,
the same training at a rate of 1e-9 shows what moving batch statistics alone do.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from PIL import Image

from drills.photos.pictures import Photo, read_photos, write_captioned, write_classes
from drills.photos.released import build_released
from reinforce.cli import main as reinforce
from reinforce.tuning.gain import chance
from tests.helpers.students import inside

FOLDS, CLEAR = 5, 0.05  # the largest probability of a result by chance that counts as clear
#: A short training of the image tower alone, since the text model is complete; --set changes it.
_OPTIONS = (
    *("run.augmentations.count=2", "student.student.freeze=[text]"),
    *("student.train.epochs=5", "student.train.optimizer.lr=1e-4"),
    'general.zero_shot.animals.templates=["a photo of a {}"]',
)
_GENERAL = "zero_shot/animals/top5"
_STATISTICS = (
    "zero_shot/animals/top1",
    _GENERAL,
    "retrieval/places/image_to_text/r5",
    "retrieval/places/image_to_text/r10",
)


@dataclass(frozen=True)
class Fold:
    """One adaptation: its share of the trained weights, general metrics of three models, and ranks of their answers.

    The models are the released, the trained and the chosen one. A rank is the number of descriptions that are more
    similar to a held-out photo than its own.
    """

    alpha: float
    general: tuple[float, float, float]
    ranks: tuple[list[int], list[int], list[int]]


def command(*words: str) -> None:
    """Run a command of ``reinforce`` here. Raises RuntimeError if it fails."""
    print("\n$ reinforce", *words, flush=True)
    try:
        reinforce([*words])
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"reinforce {words[0]} has failed") from None


def find_ranks(model: str, photos: Sequence[Photo], among: Sequence[Photo]) -> list[int]:
    """The rank of the description of each photo among those of others, by plain open_clip."""
    with inside(model):
        clip, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
        tokens = open_clip.get_tokenizer("local-dir:.")([one.caption for one in among])
    pictures = [preprocess(Image.open(io.BytesIO(one.data)).convert("RGB")) for one in photos]
    with torch.no_grad():
        texts = clip.eval().encode_text(tokens, normalize=True)
        similarities = clip.encode_image(torch.stack(pictures), normalize=True) @ texts.T
    own = similarities[torch.arange(len(photos)), [among.index(one) for one in photos]]
    return (similarities > own[:, None]).sum(dim=1).tolist()


def adapt_fold(folder: Path, released: str, photos: Sequence[Photo], fold: int, options: Sequence[str]) -> Fold:
    """Adapt to the photos of the other folds, and look for descriptions of this one's."""
    held_out = [photo for number, photo in enumerate(photos) if number % FOLDS == fold]
    out = folder / f"fold-{fold}"
    source = folder / f"photos-{fold}"
    if not source.exists():
        write_captioned([photo for photo in photos if photo not in held_out], source)
    report = out / "report.json"
    general = f"animals={folder / 'animals'}"
    command(
        *("adapt", str(source), str(out), "--model", released, "--zero-shot", general, "--json", str(report), *options)
    )
    swept = json.loads(report.read_text())
    of = {point["alpha"]: point["metrics"][_GENERAL] for point in swept["points"]}
    models = (released, f"{out}/training/student", f"{out}/model")
    first, last, chosen = (find_ranks(model, held_out, photos) for model in models)
    return Fold(swept["alpha"], (of[0.0], of[1.0], of[swept["alpha"]]), (first, last, chosen))


def show_statistics(folder: Path, training: Path, photos: Sequence[Photo]) -> None:
    """Train at a rate of 1e-9 with moving and with kept batch statistics, and print the metrics before and after."""
    write_captioned(photos, folder / "places")
    rows: dict[str, dict[str, float]] = {}
    for form in ("train", "keep"):
        out = folder / f"statistics-{form}"
        keys = {
            "output": out, "student.batch_norm": form, "train.steps": 16, "train.optimizer.lr": 1e-9,
            "train.optimizer.warmup": 0, "evaluate.retrieval.places.pairs": folder / "places",
        }  # fmt: skip
        command("train", str(training), *(word for key in keys for word in ("--set", f"{key}={keys[key]}")))
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        evaluated = [row["metrics"] for row in log if _GENERAL in row.get("metrics", {})]
        rows |= {"before": evaluated[0], f"batch_norm: {form}": evaluated[-1]}
    print("\n16 steps at a rate of 1e-9 (%)       ", *(f"{name:>20}" for name in rows))
    for metric in _STATISTICS:
        print(f"{metric:38}", *(f"{100 * row[metric]:20.1f}" for row in rows.values()))


def recall(ranks: Sequence[int], among: int) -> float:
    return 100 * statistics.mean(rank < among for rank in ranks)


def show(folds: Sequence[Fold]) -> None:
    """Print the recall of descriptions and the general metric by fold, their spread, and whether that is clear."""
    print(f"\n(%)     photos  alpha  {'R@1':>20}  {'R@5':>20}  {'R@10':>20}  {_GENERAL:>22}")
    print(f"{'':22}", *(f"{'released trained chosen':>22}" for _ in range(4)))
    for number, fold in enumerate(folds):
        recalls = [" ".join(f"{recall(ranks, among):6.1f}" for ranks in fold.ranks) for among in (1, 5, 10)]
        kept = " ".join(f"{100 * value:6.1f}" for value in fold.general)
        print(f"fold {number}  {len(fold.ranks[0]):6}  {fold.alpha:5g}", *(f"{text:>22}" for text in [*recalls, kept]))
    for name, model in (("trained", 1), ("chosen", 2)):
        for among in (1, 5, 10):
            gains = [recall(fold.ranks[model], among) - recall(fold.ranks[0], among) for fold in folds]
            spread = statistics.stdev(gains)
            print(f"{name} - released, R@{among}: {statistics.mean(gains):+.1f} points, +-{spread:.1f} between folds")
        lost = [100 * (fold.general[model] - fold.general[0]) for fold in folds]
        print(f"{name} - released, {_GENERAL}: {statistics.mean(lost):+.1f}, +-{statistics.stdev(lost):.1f}")
        pairs = [pair for fold in folds for pair in zip(fold.ranks[0], fold.ranks[model], strict=True)]
        better, worse = (sum(sign * (before - after) > 0 for before, after in pairs) for sign in (1, -1))
        by_chance = chance([1.0] * better + [-1.0] * worse)
        verdict = "clear" if by_chance < CLEAR else "too few photos to tell"
        print(f"{name}: {better} of {len(pairs)} photos rank better, {worse} worse: p = {by_chance:.2f}, {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path, help="folder with the packages of the weights")
    parser.add_argument("resources", type=Path, help="folder with GCompris's .rcc files")
    parser.add_argument("--folder", type=Path, help="where to write, or go on; default: a temporary folder")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of `reinforce adapt`; repeatable")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        check(arguments.folder or Path(temporary), arguments)


def check(folder: Path, arguments: argparse.Namespace) -> None:
    """Build the model, adapt it in each fold, and print what is found."""
    photos, animals = read_photos(arguments.resources)
    random.Random(0).shuffle(photos)
    print(f"{len(photos)} photos with descriptions, {len(animals)} of animals")
    released = str(folder / "released")
    if not (folder / "animals").exists():
        build_released(arguments.packages, Path(released))
        write_classes(animals, folder / "animals")
    options = [word for one in (*_OPTIONS, *arguments.set) for word in ("--set", one)]
    first = adapt_fold(folder, released, photos, 0, options)
    show_statistics(folder, folder / "fold-0/train.yaml", photos)
    show([first, *(adapt_fold(folder, released, photos, fold, options) for fold in range(1, FOLDS))])


if __name__ == "__main__":
    main()
