"""What the demo's teachers know together: ``python -m benchmarks.ablations.ensembles``, after ``make demo``.

For each set of names of the demo's student, the accuracy of each teacher alone, and that of all of them: of the mean of
their probabilities at several logit scales, as the loss mixes them. Writes it as JSON. A minute of one core.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.ablations.arms import DEMO
from benchmarks.stored import write_results
from examples.demo.compare import CONFIG
from reinforce import settings
from reinforce.config import load_config
from reinforce.evaluation.classes import load_templates
from reinforce.evaluation.encoding import build_classifier
from reinforce.evaluation.kinds.base import read_labels
from reinforce.evaluation.reading import CacheBudget, ImageBatches
from reinforce.student.config import StudentConfig
from teachers.open_clip.teacher import OpenClipTeacher
from teachers.pixels import to_pixels
from teachers.runtime.accelerator import Accelerator

RESULTS = Path(__file__).parents[1] / "results" / "ensembles.json"
SCALES = (5, 20, 80)
_BATCH = 128


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator("cpu")
    specs = load_config(DEMO).teachers
    teachers = {name: OpenClipTeacher(spec, accelerator) for name, spec in specs.items()}
    evaluation = settings.load(StudentConfig, CONFIG).evaluate
    shares: dict[str, dict[str, float]] = {}
    for name, wanted in evaluation.zero_shot.items():
        opened = read_labels(wanted, name, evaluation.limits, ())
        templates = load_templates(wanted.templates, name)
        cosines, labels = {}, torch.empty(0)
        for teacher, model in teachers.items():
            assert model.image is not None
            classes = build_classifier(model, opened.classes, templates, _BATCH)
            images = ImageBatches(opened.examples, opened.images, evaluation.limits, CacheBudget(0))
            found = [*images.decode([model.image], _BATCH, threads=1)]
            vectors = [model.encode_images(to_pixels(accelerator.put(pixels), model.image)) for (pixels,), _ in found]
            cosines[teacher] = torch.cat(vectors).float() @ classes.T
            labels = torch.tensor([target for _, targets in found for target in targets])

        right = {teacher: one.argmax(1) == labels for teacher, one in cosines.items()}
        either = torch.stack([*right.values()]).any(0)
        for scale in SCALES:
            probabilities = torch.stack([(scale * one).softmax(1) for one in cosines.values()]).mean(0)
            right[f"mean of probabilities, scale {scale}"] = probabilities.argmax(1) == labels
        right["any of them"] = either
        shares[name] = {who: round(one.float().mean().item(), 4) for who, one in right.items()}
        print(f"{name}, {len(labels):,} images: " + ", ".join(f"{who} {one:.1%}" for who, one in shares[name].items()))
    write_results(RESULTS, ("torch", "open_clip_torch"), {"accuracy": shares})


if __name__ == "__main__":
    main()
