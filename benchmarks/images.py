"""Images alone compared with lightly-train: ``make bench-images``, after ``python -m examples.demo data``.

Both train torchvision's ShuffleNetV2 x0.5 from random weights on the demo's 1,364 Twemoji pictures at 64 pixels, with
one teacher: the vectors of two of the demo's models, one after the other, in a TorchScript file that both load. The
batch, the number of steps, AdamW without weight decay, the warm-up and the smallest crop are equal; lightly-train has
its own other augmentations and its mixup. Of two learning rates, the better one on OpenMoji pictures of other concepts
is taken with the first seed; other seeds use it. Each training is a process with one thread. Those of a seed follow
each other, so that load of the machine is that of all; a step's time is the median over the steps. Writes a table into
docs/students.md. Finished trainings are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.stored import markdown_table, mean_and_spread, replace_part, update_page, write_results
from reinforce import settings
from reinforce.config import parse_config
from reinforce.engine.run import run
from reinforce.evaluation.command import build_evaluation, evaluate_models
from reinforce.evaluation.model_names import resolve_models
from reinforce.student.config import StudentConfig
from reinforce.student.train import StudentTask
from reinforce.student.train import train as train_student
from teachers.backbones import IMAGENET, build_class, write_class
from teachers.open_clip.teacher import load_model
from teachers.protocols import ImageSpec
from teachers.spec import ModelSpec

BUILD = Path("build/images")
RESULTS = Path(__file__).parent / "results" / "images.json"
PAGE = Path(__file__).parents[1] / "docs" / "students.md"
TEACHERS = ("conv-64", "styles-64")
DIM, SIZE, BATCH, EPOCHS, IMAGES = 256, 64, 32, 20, 1364
CROPS = 10  # stored of each picture
STUDENT, WITHOUT = "shufflenet_v2_x0_5", "fc"
SCALE, QUEUE = 0.5, 512  # the smallest crop; the queue that lightly-train chooses for as many images
RATES = (1e-3, 3e-3)
LIGHTLY = "lightly-train"
_SIMILARITIES = {"distance": "similarities", "queue": QUEUE, "temperature": 0.07}
#: Arm -> its loss, and where its targets come from.
ARMS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "stored targets, similarities": (_SIMILARITIES, "stored"),
    "stored targets, cosine": ({"distance": "cosine"}, "stored"),
    "teacher in the loop, similarities": (_SIMILARITIES, "online"),
}
_VALIDATION = "probes/concepts/k10/top1"
#: Metric -> its title in the table.
METRICS = {"probes/style/k10/top1": "subgroup, k = 10, %", "probes/class/k1/top1": "concept, k = 1, %"}


class Scripted:
    """The teacher of a TorchScript file."""

    image = ImageSpec(SIZE, IMAGENET.mean, IMAGENET.std, "bilinear")
    logit_scale = None
    dim = DIM
    version = 1

    def __init__(self, device: torch.device, path: str) -> None:
        self._network = torch.jit.load(path, map_location=device).eval()

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self._network(pixels), dim=-1)


class _Ensemble(torch.nn.Module):
    """The unit-norm vectors of models of open_clip, one after the other, of pixels normalised as for ImageNet."""

    factor: torch.Tensor
    shift: torch.Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        models = [load_model(ModelSpec(model=f"local-dir:configs/demo-models/{name}")) for name in names]
        self.towers = torch.nn.ModuleList(model.visual for model in models)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
        own = [torch.tensor(getattr(models[0].visual, f"image_{of}")).view(1, 3, 1, 1) for of in ("mean", "std")]
        self.register_buffer("factor", std / own[1])
        self.register_buffer("shift", (mean - own[0]) / own[1])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels * self.factor + self.shift
        return torch.cat([torch.nn.functional.normalize(tower(pixels), dim=-1) for tower in self.towers], dim=-1)


def _teacher(out: Path) -> dict[str, Any]:
    return {"class": "benchmarks.images:Scripted", "options": {"path": str(out / "teacher.ts")}}


def prepare(out: Path) -> None:
    """Write the teacher, the pictures as files, and the dataset with its vectors."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "teacher.ts").exists():
        with torch.no_grad():
            torch.jit.trace(_Ensemble(TEACHERS).eval(), torch.rand(2, 3, SIZE, SIZE)).save(str(out / "teacher.ts"))
    pictures = out / "pictures"
    if not pictures.exists():
        pictures.mkdir()
        for path in sorted(Path("demo/shards").glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".png") and (file := tar.extractfile(member)) is not None:
                        (pictures / Path(member.name).name).write_bytes(file.read())
    config = {
        "source": "demo/shards/*.tar", "output": f"{out}/dataset", "teachers": {"both": _teacher(out)},
        "augmentations": {"count": CROPS, "size": SIZE, "scale": [SCALE, 1.0], "backend": "fixed-point-1"},
    }  # fmt: skip
    assert run(parse_config(config)).status == 0


def training(arm: str, rate: float, seed: int, epochs: int, out: Path) -> StudentConfig:
    """The training of one of our arms."""
    features, targets = ARMS[arm]
    steps = epochs * (IMAGES // BATCH)
    config: dict[str, Any] = {
        "output": str(_folder(arm, rate, seed, out) / "run"),
        "seed": seed,
        "student": {"class": f"torchvision.models:{STUDENT}", "without": WITHOUT, "image_size": SIZE},
        "data": {"datasets": f"{out}/dataset", "workers": 0, "streams": 1, "pick": "sequential"},
        "loss": {"features": features, "targets": targets},
        "train": {
            "steps": steps, "batch": BATCH, "log_every": steps, "checkpoints": {"every": steps},
            "optimizer": {"lr": rate, "final_lr": 0.0, "warmup": steps // 10, "weight_decay": 0.0},
            "compute": {"cpus": 1},
        },
    }  # fmt: skip
    if targets == "online":
        config["loss"]["teachers"] = {"both": _teacher(out)}
    return settings.parse(StudentConfig, config)


def train_here(arm: str, rate: float, seed: int, epochs: int, out: Path) -> None:
    """Train one of our arms in this process, and write the seconds at the start of each step."""
    torch.set_num_threads(1)
    times: list[tuple[float, float]] = []
    prepare_batch = StudentTask.prepare

    def marked(self: StudentTask, batch: Any) -> Any:
        times.append((time.perf_counter(), time.process_time()))
        return prepare_batch(self, batch)

    StudentTask.prepare = marked  # type: ignore[method-assign]
    train_student(training(arm, rate, seed, epochs, out))
    (_folder(arm, rate, seed, out) / "times.json").write_text(json.dumps({"times": times}), encoding="utf-8")


def measure(arm: str, rate: float, seed: int, epochs: int, out: Path, lightly: str) -> dict[str, Any]:
    """Train and evaluate an arm in processes of one thread, unless that is done."""
    folder = _folder(arm, rate, seed, out)
    result = folder / "result.json"
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        here = [sys.executable, "-m", "benchmarks.images", "--out", out, "--epochs", epochs]
        command = [*here, "--train", arm, rate, seed]
        if arm == LIGHTLY:
            command = [lightly, "-I", "benchmarks/images_lightly.py", "--images", out / "pictures"]
            command += ["--out", folder / "run", "--teacher", out / "teacher.ts", "--student", STUDENT]
            command += ["--dim", DIM, "--size", SIZE, "--batch", BATCH, "--epochs", epochs, "--seed", seed]
            command += ["--rate", rate, "--scale", SCALE, "--report", folder / "times.json"]
        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            for one in (command, [*here, "--evaluate", arm, rate, seed]):
                subprocess.run([*map(str, one)], check=True, stdout=log, stderr=log)  # noqa: S603
    return dict(json.loads(result.read_text(encoding="utf-8")))


def evaluate_here(arm: str, rate: float, seed: int, epochs: int, out: Path) -> None:
    """Evaluate a finished training, and write its metrics and the seconds of a step."""
    folder = _folder(arm, rate, seed, out)
    report = json.loads((folder / "times.json").read_text(encoding="utf-8"))
    found = {"metrics": evaluate(folder, arm), **step_seconds(report)}
    (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")


def step_seconds(report: Mapping[str, Any]) -> dict[str, Any]:
    """Medians of wall and CPU seconds from the start of a step to that of the next, after the first ten."""
    times = report["times"][10:]
    wall, cpu = ([later[of] - now[of] for now, later in itertools.pairwise(times)] for of in (0, 1))
    return {"steps": len(report["times"]), "wall": statistics.median(wall), "cpu": statistics.median(cpu)}


def evaluate(folder: Path, arm: str) -> dict[str, float]:
    """Metrics of the exported student of an arm, all by the same evaluator."""
    if arm == LIGHTLY:
        weights = folder / "run/exported_models/exported_last.pt"
        network, _ = build_class(f"torchvision.models:{STUDENT}", {}, WITHOUT, _named(weights, folder))
        about = {"class": f"torchvision.models:{STUDENT}", "options": {}, "without": WITHOUT}
        (folder / "run/student").mkdir(exist_ok=True)
        write_class(network, Scripted.image, about, str(folder / "run/student"))
    return evaluated(f"class:torchvision.models:{STUDENT},{folder}/run")


def _named(weights: Path, folder: Path) -> Path:
    """The weights of a student of lightly-train as a state dict of torchvision's model."""
    state = torch.load(weights, map_location="cpu", weights_only=True)
    state = state.get("model", state)
    torch.save(dict(state), folder / "weights.pth")
    return folder / "weights.pth"


def evaluated(name: str) -> dict[str, float]:
    """The metrics of a model: the nearest Twemoji pictures of OpenMoji pictures."""
    train = {"images": "demo/shards/*.tar"}
    sets = {"class": ("style", "class", 1), "style": ("style", "group", 10), "concepts": ("pictures", "group", 10)}
    keys: dict[str, Any] = {"batch": 64}
    for key, (test, label, k) in sets.items():
        parts = {"train": train, "test": {"images": f"demo/tests/unseen-{test}/*.tar"}}
        keys |= {f"probes.{key}.{part}.images": one["images"] for part, one in parts.items()}
        keys |= {f"probes.{key}.{part}.label": f"json:{label}" for part in parts}
        keys |= {f"probes.{key}.k": [k], f"probes.{key}.l2": []}
    evaluation = build_evaluation(None, overrides=[f"{key}={json.dumps(value)}" for key, value in keys.items()])
    with resolve_models([name], teachers=True) as specs:
        [result] = evaluate_models(specs, evaluation, "cpu", "fp32").as_json()["models"].values()
    return dict(result["metrics"])


def _folder(arm: str, rate: float, seed: int, out: Path) -> Path:
    return out / "trainings" / f"{arm.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"


def compare(
    seeds: Sequence[int], rates: Sequence[float], epochs: int, out: Path, lightly: str, at_once: int
) -> dict[str, Any]:
    """All arms at their best rate, and their metrics and seconds by seed; the arms take turns."""
    arms = (LIGHTLY, *ARMS)
    tuned = [arm for arm in arms if arm == LIGHTLY or ARMS[arm][1] == "stored"]

    def measured(one: tuple[str, float, int]) -> dict[str, Any]:
        return measure(*one, epochs, out, lightly)

    with ThreadPoolExecutor(at_once) as pool:
        first = [(arm, rate, seeds[0]) for rate in rates for arm in tuned]
        tried = dict(zip(first, pool.map(measured, first if len(rates) > 1 else []), strict=False))
        best = {arm: max(rates, key=lambda rate: _validated(tried, arm, rate, seeds[0])) for arm in tuned}
        best |= {arm: best["stored targets, similarities"] for arm in arms if arm not in best}
        runs = [(arm, best[arm], seed) for seed in seeds for arm in arms]
        results = dict(zip(runs, pool.map(measured, runs), strict=True))
    return {arm: {"rate": best[arm], "seeds": [results[arm, best[arm], seed] for seed in seeds]} for arm in arms}


def _validated(tried: Mapping[Any, Any], arm: str, rate: float, seed: int) -> float:
    return float(tried[arm, rate, seed]["metrics"][_VALIDATION]) if tried else 0.0


def render_page(text: str, results: Mapping[str, Any]) -> str:
    """The page with the table written anew; the rest of ``text`` stays."""
    base = statistics.fmean(one["cpu"] for one in results["arms"][LIGHTLY]["seeds"])
    rows = []
    for arm, of in results["arms"].items():
        cells = [mean_and_spread([100 * one["metrics"][metric] for one in of["seeds"]]) for metric in METRICS]
        cpu = [one["cpu"] for one in of["seeds"]]
        cells += [mean_and_spread([1000 * value for value in cpu], 0), f"{base / statistics.fmean(cpu):.2f} times"]
        rows.append([arm, f"{of['rate']:g}", *cells])
    for name, metrics in {"the teacher": results["teacher"], "random weights": results.get("random")}.items():
        if metrics is not None:
            rows.append([name, "", *(f"{100 * metrics[metric]:.1f}" for metric in METRICS), "", ""])
    heads = ["training", "rate", *METRICS.values(), "CPU ms a step", "steps a second, by CPU"]
    return replace_part(text, "images", markdown_table(heads, rows))


def _random(out: Path) -> dict[str, float]:
    torch.manual_seed(0)
    network, _ = build_class(f"torchvision.models:{STUDENT}", {}, WITHOUT)
    (out / "random").mkdir(exist_ok=True)
    about = {"class": f"torchvision.models:{STUDENT}", "options": {}, "without": WITHOUT}
    write_class(network, Scripted.image, about, str(out / "random"))
    return evaluated(f"class:torchvision.models:{STUDENT},{out}/random")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--out", type=Path, default=BUILD, help="folder for the dataset and the trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds; the first chooses the rates")
    parser.add_argument("--lightly", help="Python of an environment with lightly-train")
    parser.add_argument("--render", action="store_true", help="only write the page from stored results")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of the pictures")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to choose from")
    parser.add_argument("--at-once", type=int, default=1, help="trainings at once, each with one thread")
    for name in ("--train", "--evaluate"):
        parser.add_argument(name, nargs=3, metavar=("ARM", "RATE", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for own, act in ((arguments.train, train_here), (arguments.evaluate, evaluate_here)):
        if own is not None:
            act(own[0], float(own[1]), int(own[2]), arguments.epochs, arguments.out)
            return
    if not arguments.render:
        prepare(arguments.out)
        chosen = arguments.seeds, arguments.rates, arguments.epochs
        arms = compare(*chosen, arguments.out, arguments.lightly, arguments.at_once)
        teacher = {**_teacher(arguments.out)}
        (arguments.out / "teacher.yaml").write_text(json.dumps({"teachers": {"both": teacher}}), encoding="utf-8")
        about = {"teacher": evaluated(f"{arguments.out}/teacher.yaml:both"), "random": _random(arguments.out)}
        steps = arguments.epochs * (IMAGES // BATCH)
        results = {"seeds": len(arguments.seeds), "steps": steps, "rates": arguments.rates, "arms": arms, **about}
        write_results(RESULTS, ["torch", "torchvision"], results)
    update_page(PAGE, RESULTS, render_page)
    print(f"written to {RESULTS} and {PAGE}")


if __name__ == "__main__":
    main()
