"""``make bench-step``: cost of a training step compared with a step of plain CLIP on the same images and texts.

Three kinds of step of one student are measured alternately: *plain* (lambda 0, no targets), *stored* (lambda 0.7, so
that both losses are computed, with stored embeddings of two teachers of 768 dimensions) and *online* (the same two
teachers run in each step). All have a true and a synthetic caption per image, and run forward, loss, backward and
AdamW.

Times are CPU seconds of this process on a CPU, which other load does not change, and wall time on CUDA; ratios are of
medians. ``limit`` is the ratio of floating point operations that torch counts in matrix products and convolutions: the
ratio that would remain if the rest of the loss, its exponentials and memory traffic, took no time. The loss is
quadratic in the batch and the towers are linear, so the limit is also reported for a batch of 8,192.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from benchmarks.stored import write_results
from reinforce import settings
from reinforce.student.config import StudentConfig
from reinforce.student.train import StudentTask
from reinforce.training.checkpoints import make_adamw
from reinforce.training.config import Optimizer
from reinforce.training.step import Prefetcher, backpropagate
from teachers.runtime.accelerator import Accelerator
from teachers.runtime.flops import counted_flops

BOUND = 1.1
DIM = 768
TEACHERS = ("first", "second")
KINDS = ("caption", "synthetic")
TEACHER = "two ViT-B-32 of 768 dimensions with random weights"
LARGE = 8192
RESULTS = Path(__file__).parent / "results" / "step.json"

#: The largest share of the loss in a step: a tiny student with a normal batch.
TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@dataclass(frozen=True)
class Case:
    """A student and batch size; ``rounds`` are measured, the first ``online`` of them with the online step, too."""

    student: str
    batch: int
    rounds: int
    online: int


class Bench:
    """Models and a dataset's manifest in ``folder``, and measurements of steps on them."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self.accelerator = Accelerator(device)
        self.tiny = model_folder(folder / "tiny", TINY, weights=False)
        (folder / "data").mkdir()
        (folder / "data" / "dataset.json").write_text(json.dumps(manifest()))

    def measure(self, case: Case) -> dict[str, Any]:
        """Return seconds and operations of each kind of step, measured alternately."""
        steps = self.steps(case)
        operations = {name: counted_flops(step) for name, step in steps.items()}  # also the warm-up
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(case.rounds):
            for name, step in steps.items():
                if name != "online" or number < case.online:
                    seconds[name].append(self.time_step(step))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        extra = operations["stored"] / operations["plain"] - 1
        return {
            "batch": case.batch,
            "ratio": {name: value / medians["plain"] for name, value in medians.items()},
            "limit": {name: value / operations["plain"] for name, value in operations.items()},
            f"limit of stored at {LARGE}": 1 + extra * LARGE / case.batch,
            "median seconds": medians,
            "seconds": seconds,
            "operations": operations,
        }

    def steps(self, case: Case) -> dict[str, Callable[[], None]]:
        """Return a function for each kind of step."""
        losses: dict[str, dict[str, Any]] = {"plain": {"lambda": 0.0}, "stored": {"lambda": 0.7}}
        if case.online:
            config = {**open_clip.get_model_config("ViT-B-32"), "embed_dim": DIM}
            spec = {"model": model_folder(self.folder / "teacher", config, weights=True)}
            losses["online"] = {"lambda": 0.7, "teachers": dict.fromkeys(TEACHERS, spec)}
        tasks = {name: self.task(case, loss) for name, loss in losses.items()}
        model = self.accelerator.place(tasks["plain"].model).train()
        optimizer = make_adamw(model, Optimizer(lr=1e-5))
        examples = random_batch(tasks["plain"], case.batch)
        unused = {"plain": ("targets", "crops", "texts"), "stored": ("crops", "texts"), "online": ("targets",)}
        prefetchers = {name: Prefetcher([without(examples, unused[name])], self.accelerator) for name in tasks}
        for prefetcher in prefetchers.values():
            prefetcher.fetch()
        batches = {name: prefetcher.take() for name, prefetcher in prefetchers.items()}

        def step(name: str) -> None:
            backpropagate(tasks[name], model, batches[name], case.batch, [0], self.accelerator)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return {name: lambda name=name: step(name) for name in tasks}  # type: ignore[misc]

    def task(self, case: Case, loss: dict[str, Any]) -> StudentTask:
        config = {
            "output": str(self.folder / "out"),
            "student": {"model": self.tiny if case.student == "tiny" else case.student},
            "data": {"datasets": str(self.folder / "data")},
            "loss": loss,
            "train": {"steps": 1, "batch": case.batch},
        }
        return StudentTask(settings.parse(StudentConfig, config), str(self.accelerator.device))

    def time_step(self, step: Callable[[], None]) -> float:
        cuda = self.accelerator.device.type == "cuda"
        clock = time.perf_counter if cuda else time.process_time
        self.accelerator.synchronize()
        start = clock()
        step()
        self.accelerator.synchronize()
        return clock() - start


def model_folder(folder: Path, config: dict[str, Any], weights: bool) -> str:
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    if weights:
        save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def manifest() -> dict[str, Any]:
    """Return dataset.json of a dataset with the two teachers; its layers are not read here."""
    targets = ("images", "caption", "captioner")
    return {
        "schema_version": 1,
        "images": "embed",
        "augmentations": {"size": 32},
        "teachers": {t: {"dim": DIM, "logit_scale": 60.0, "logit_scale_from": "config"} for t in TEACHERS},
        "captioners": {"captioner": {}},
        "layers": {
            "samples": {"kind": "samples", "fingerprint": "0"},
            **{f"embeddings/{teacher}/{target}": layer(target) for teacher in TEACHERS for target in targets},
        },
    }


def layer(target: str) -> dict[str, Any]:
    """Return the entry of one layer of embeddings."""
    kind = "images" if target == "images" else "texts"
    return {"kind": kind, "fingerprint": "0", "count": 1, "dim": DIM, "dtype": "float16"}


def random_batch(task: StudentTask, count: int) -> dict[str, Any]:
    """Return a random batch with the shapes of ``reinforce.student.data.feed``."""
    torch.manual_seed(0)
    size = task.model.image.height
    texts = {kind: [f"a {kind} text about thing {i} on a table" for i in range(count)] for kind in KINDS}
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)
    targets = {
        teacher: {what: torch.nn.functional.normalize(torch.randn(count, DIM), dim=-1) for what in ("image", *KINDS)}
        for teacher in TEACHERS
    }
    tokens = {kind: task.tokenizer(values) for kind, values in texts.items()}
    crops = dict.fromkeys(TEACHERS, images)
    return {"image": images, **tokens, "targets": targets, "crops": crops, "texts": texts}


def without(batch: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in names}


def table(results: dict[str, Any]) -> str:
    lines = [f"{'student':<16}{'batch':>6}{'step':>9}{'seconds':>10}{'x plain':>9}{'limit':>9}"]
    for student, result in results.items():
        for name, seconds in result["median seconds"].items():
            lines.append(
                f"{student:<16}{result['batch']:>6}{name:>9}{seconds:>10.3f}{result['ratio'][name]:>9.3f}"
                f"{result['limit'][name]:>9.4f}"
            )
        large = result[f"limit of stored at {LARGE}"]
        lines.append(f"{student:<16}{LARGE:>6}{'stored':>9}{'':>19}{large:>9.4f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--student", default="MobileCLIP2-S0", help="open_clip name of the student next to the tiny one"
    )
    parser.add_argument("--batch", type=int, default=16, help="batch size of that student")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of that student")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [
        Case("tiny", 256, 15, online=0),
        Case(options.student, options.batch, options.rounds, online=max(1, options.rounds // 2)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.device)
        results = {case.student: bench.measure(case) for case in cases}
    print(f"{options.device}, {options.threads} threads; online: {TEACHER}")
    print(table(results))
    worst = max(result["ratio"]["stored"] for result in results.values())
    print(f"a step with stored targets takes at most {worst:.3f} times as long as a plain one; the bound is {BOUND}")
    about = {
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "threads": options.threads,
        "clock": "process" if options.device == "cpu" else "wall",
        "teachers in the loop": TEACHER,
        "bound": BOUND,
    }
    write_results(RESULTS, ("torch", "open_clip_torch", "timm"), {**about, "students": results})
    return 0 if worst <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
