"""What keeps an adapted student from forgetting, at the demo's scale: ``make bench-adapt``, after ``make demo``.

The demo's distilled student is the released model. Its domain are the OpenMoji drawings, a style that it has not seen;
the general sets are the Twemoji that it was trained on, and the icons. Each arm is a fine-tuning of equal steps on 200
or 1,000 drawings. Of several rates the best by the domain's validation part is taken, with the first seed; other seeds
use it. A seed decides the split of the drawings, the order and the noise of a training. Of the rest of the drawings one
part validates and one tests. Writes a table and a picture into docs/adapt.md. Finished trainings are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.stored import markdown_table, mean_and_spread, replace_part, update_page, write_results
from reinforce import reports, settings
from reinforce.config import parse_config
from reinforce.engine.run import run
from reinforce.evaluation.config import Evaluation
from reinforce.explore.config import SelectConfig
from reinforce.explore.select import select
from reinforce.student.config import StudentConfig
from reinforce.student.train import train as train_student
from reinforce.tuning.adapt_config import Point, Rule, mean
from reinforce.tuning.mixtures import GRID, Mixtures
from teachers.spec import ModelSpec

BUILD = Path("build/adapt")
RESULTS = Path(__file__).parent / "results" / "adapt.json"
PAGE = Path(__file__).parents[1] / "docs" / "adapt.md"
PICTURE = PAGE.parent / "adapt-arms.png"
RELEASED = "local-dir:demo/students/distilled/student"
SIZES = {200: 80, 1000: 160}  # images -> steps
DRAWINGS, BATCH, VALIDATION = 1364, 64, 100
RATES = (1e-4, 3e-4, 1e-3)
_KEEP: dict[str, Any] = {"student": {"batch_norm": "keep"}}
_ANCHOR = {"teacher": "released", "similarities": 1.0, "features": 1.0}
#: Arm -> what it changes of a naive fine-tuning: CLIP's loss, batch statistics that move.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "naive": {"student": {"batch_norm": "train"}},
    "keep": _KEEP,
    "keep, layer decay": {**_KEEP, "train": {"optimizer": {"layer_decay": {"image": 0.7, "text": 0.7}}}},
    "keep, anchor of similarities": {**_KEEP, "loss": {"anchor": {"teacher": "released", "similarities": 1.0}}},
    "keep, anchor of features": {**_KEEP, "loss": {"anchor": {"teacher": "released", "features": 1.0}}},
    "keep, anchor of weights": {**_KEEP, "loss": {"anchor": {"weights": 0.01}}},
    "keep, both stored anchors": {**_KEEP, "loss": {"anchor": _ANCHOR}},
}
#: Arms that are also mixed with the released weights, with the points that the general mean may lose; of the shares
#: that lose no more, the best on the validation part is taken.
MIXED = {
    "keep": {"keep, interpolation": 0.5},
    "keep, both stored anchors": {"all together": 0.5, "all together, --allow 1": 1.0},
}
_NAMES = {"classes": "demo/tests/classes.txt", "label": "json:class", "templates": ["{}", "a {}", "an emoji of a {}"]}
GENERAL = ("zero_shot/own-style/top5", "zero_shot/unseen-icons/top5")
TESTED, VALIDATED = "zero_shot/test/top5", "zero_shot/validation/top5"


def sets_of(size: int, seed: int, out: Path) -> dict[str, Any]:
    """The general sets, and both parts of the drawings of a seed."""
    drawings = {
        part: {"images": f"{out}/dataset", "view": f"{part}-{size}-{seed}", "limit": 500}
        for part in ("validation", "test")
    }
    general: dict[str, Any] = {
        "own-style": {"images": "demo/shards/*.tar", "limit": 500},
        "unseen-icons": {"images": "demo/tests/unseen-icons/*.tar"},
    }
    return {"zero_shot": {name: {**one, **_NAMES} for name, one in {**general, **drawings}.items()}, "threads": 1}


def prepare(seeds: Sequence[int], out: Path) -> None:
    """Store the vectors of the released student, and divide the drawings for each seed."""
    drawn = ["demo/tests/unseen-style/*.tar", "demo/tests/unseen-pictures/*.tar"]
    config = {
        "source": drawn, "output": f"{out}/dataset", "teachers": {"released": {"model": RELEASED}},
        "augmentations": {"count": 10, "size": 48, "scale": [0.7, 1.0], "backend": "fixed-point-1"},
    }  # fmt: skip
    assert run(parse_config(config)).status == 0
    for seed, size in itertools.product(seeds, SIZES):
        others = DRAWINGS - size
        views = {
            "train": [{"all_but": others}],
            "validation": [{"sample": others}, {"sample": VALIDATION}],
            "test": [{"sample": others}, {"all_but": VALIDATION}],
        }
        for part, rules in views.items():
            name = f"{part}-{size}-{seed}"
            if not (out / f"dataset/views/{name}/view.json").exists():
                keys = {"dataset": f"{out}/dataset", "name": name, "rules": rules, "seed": seed}
                select(settings.parse(SelectConfig, keys), processes=1)


def training(arm: str, size: int, rate: float, seed: int, out: Path) -> StudentConfig:
    """The fine-tuning of an arm."""
    steps = SIZES[size]
    base = {
        "output": f"{out}/{size}/{arm.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}",
        "seed": seed,
        "student": {"model": RELEASED},
        "data": {
            "datasets": [{"url": f"{out}/dataset", "view": f"train-{size}-{seed}"}],
            "captioners": [], "workers": 0, "streams": 1,
        },
        "loss": {"lambda": 0.0},
        "train": {
            "steps": steps, "batch": BATCH, "log_every": steps, "checkpoints": {"every": steps},
            "optimizer": {"lr": rate, "final_lr": 0.0, "warmup": steps // 10, "weight_decay": 0.1},
            "compute": {"cpus": 1},
        },
        "evaluate": sets_of(size, seed, out),
    }  # fmt: skip
    return settings.parse(StudentConfig, settings.merge(base, ARMS[arm]))


def train(config: StudentConfig) -> dict[str, float]:
    """Metrics of a finished fine-tuning, run as `reinforce train` does."""
    results = Path(config.output, "results.json")
    if not results.exists():
        train_student(config)
    return dict(json.loads(results.read_text(encoding="utf-8"))["metrics"])


def interpolated(config: StudentConfig, size: int, seed: int, out: Path, allow: float) -> dict[str, Any]:
    """Metrics of the share that a rule chooses, and of all shares."""
    specs = {
        "released": ModelSpec(model=RELEASED),
        "trained": ModelSpec(model=f"local-dir:{config.output}/student"),
    }
    mixtures = Mixtures(specs, f"{config.output}/mixed", settings.parse(Evaluation, sets_of(size, seed, out)), "cpu")
    points = [Point(alpha, mixtures.metrics({"released": 1 - alpha, "trained": alpha})) for alpha in GRID]
    chosen = Rule((VALIDATED,), GENERAL, allow / 100).choose(points)
    curve = [[point.alpha, point.metrics[TESTED], mean(point.metrics, GENERAL)] for point in points]
    return {"metrics": dict(chosen.metrics), "alpha": chosen.alpha, "curve": curve}


def measure(size: int, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """All arms for a number of images: the best rate of each, and the metrics by seed."""
    start = [{"metrics": released(size, seed, out)} for seed in seeds]
    arms: dict[str, Any] = {"released": {"rate": 0.0, "seeds": start}}
    for arm in ARMS:
        tried = {rate: train(training(arm, size, rate, seeds[0], out)) for rate in RATES}
        rate = max(RATES, key=lambda rate: tried[rate][VALIDATED])
        configs = [training(arm, size, rate, seed, out) for seed in seeds]
        arms[arm] = {"rate": rate, "seeds": [{"metrics": train(config)} for config in configs]}
        for name, allow in MIXED.get(arm, {}).items():
            mixed = [interpolated(config, size, seed, out, allow) for config, seed in zip(configs, seeds, strict=True)]
            arms[name] = {"rate": rate, "seeds": mixed}
    return {"steps": SIZES[size], "arms": arms}


def released(size: int, seed: int, out: Path) -> dict[str, float]:
    """Metrics of the released student."""
    specs = {"released": ModelSpec(model=RELEASED)}
    mixtures = Mixtures(
        specs, f"{out}/released-{size}-{seed}", settings.parse(Evaluation, sets_of(size, seed, out)), "cpu"
    )
    return mixtures.metrics({"released": 1.0})


def figures(arms: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """By arm and seed, in points: the accuracy on the domain's test part, its gain, and what the general mean loses."""
    start = arms["released"]["seeds"]
    found: dict[str, dict[str, list[float]]] = {}
    for arm, of in arms.items():
        domain = [100 * one["metrics"][TESTED] for one in of["seeds"]]
        general = [100 * mean(one["metrics"], GENERAL) for one in of["seeds"]]
        gain = [now - 100 * one["metrics"][TESTED] for now, one in zip(domain, start, strict=True)]
        loss = [100 * mean(one["metrics"], GENERAL) - now for now, one in zip(general, start, strict=True)]
        found[arm] = {"domain": domain, "general": general, "gain": gain, "loss": loss}
    return found


def render_page(text: str, results: Mapping[str, Any]) -> str:
    """The page with the tables written anew; the rest of ``text`` stays."""
    parts = []
    for size, of in results["sizes"].items():
        found = figures(of["arms"])
        naive = statistics.fmean(found["naive"]["loss"])
        best = max(statistics.fmean(values["gain"]) for values in found.values())
        rows = []
        for arm, values in found.items():
            rate = of["arms"][arm]["rate"]
            cells = [mean_and_spread(values[name]) for name in ("domain", "gain", "general", "loss")]
            rows.append([arm, f"{rate:g}" if rate else "", *cells])
        heads = ["arm", "rate", "domain, top 5 %", "gain", "general, top 5 %", "loss"]
        about = f"{int(size):,} drawings, {of['steps']} steps of {BATCH}, {results['seeds']} seeds:"
        lines = [about, "", markdown_table(heads, rows)]
        for name in MIXED["keep, both stored anchors"]:
            share = 100 * statistics.fmean(found[name]["gain"]) / best if best > 0 else 0.0
            lost = max(0.0, 100 * statistics.fmean(found[name]["loss"]) / naive) if naive > 0 else 0.0
            lines += ["", f"*{name}* has {share:.0f} % of the best gain, and {lost:.0f} % of the loss of *naive*."]
        parts.append("\n".join(lines))
    return replace_part(text, "adapt", "\n\n".join(parts))


def draw(results: Mapping[str, Any], picture: Path) -> None:
    """Draw each arm by what it gains and loses, and the curves between the weights."""
    made, axes = reports.figure(len(results["sizes"]), width=11, height=4.6)
    for panel, (size, of) in zip(axes, results["sizes"].items(), strict=True):
        reports.label(panel, f"{int(size):,} drawings", "mean of the general sets, top 5 %", "domain, top 5 %")
        for number, (arm, values) in enumerate(figures(of["arms"]).items()):
            x, y = (statistics.fmean(values[name]) for name in ("general", "domain"))
            panel.plot([x], [y], "os"[number // len(reports.COLOURS)], color=reports.colour(number), label=arm)
        for number, name in enumerate(("keep, interpolation", "all together")):
            curves = [one["curve"] for one in of["arms"][name]["seeds"]]
            means = [
                [statistics.fmean(point[axis] for point in points) for axis in (2, 1)]
                for points in zip(*curves, strict=True)
            ]
            panel.plot(
                *zip(*[(100 * x, 100 * y) for x, y in means], strict=True),
                color=reports.GREY,
                linewidth=1,
                linestyle=(":", "-")[number],
            )
    axes[-1].legend(frameon=False, fontsize=7, labelcolor=reports.INK)
    reports.save(made, str(picture))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapt", description=__doc__)
    parser.add_argument("--out", type=Path, default=BUILD, help="folder for the dataset and the trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds; the first chooses the rates")
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=[*SIZES], help="images to train on")
    parser.add_argument("--render", action="store_true", help="only write the page from stored results")
    arguments = parser.parse_args()
    if not arguments.render:
        prepare(arguments.seeds, arguments.out)
        sizes = json.loads(RESULTS.read_text(encoding="utf-8"))["sizes"] if RESULTS.exists() else {}
        for size in arguments.sizes:
            sizes[str(size)] = measure(size, arguments.seeds, arguments.out)
        write_results(RESULTS, ["torch", "timm"], {"seeds": len(arguments.seeds), "sizes": sizes})
    update_page(PAGE, RESULTS, render_page)
    draw(json.loads(RESULTS.read_text(encoding="utf-8")), PICTURE)
    print(f"written to {RESULTS} and {PAGE}")


if __name__ == "__main__":
    main()
