"""Every term of the registry: online targets give the losses of stored ones, and the function of Python the trainer's.

A term that is added to the registry needs a case here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from reinforce import losses
from reinforce.student.terms.base import MAP, scale_name
from reinforce.student.terms.registry import MODULES
from reinforce.student.train import StudentTask, build
from reinforce.training.step import backpropagate
from reinforce.training.task import Batch, Encoded
from teachers.pixels import to_pixels
from teachers.runtime.accelerator import Accelerator
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.reinforced import reinforce_here
from tests.helpers.students import first_batch, student_config, student_folder

SIDES = {"released": 20.0, "red": 50.0, "dino": 30.0}  # logit scales of teachers with both sides
KINDS = ("caption", "synthetic")
CPU = Accelerator("cpu")


class Trained(NamedTuple):
    """What a training run computes of its first batch."""

    task: StudentTask
    batch: Batch
    encoded: Encoded
    losses: dict[str, torch.Tensor]

    @property
    def scale(self) -> torch.Tensor:
        return self.encoded.scalars["logit_scale"]

    def feature(self, what: str) -> torch.Tensor:
        return self.encoded.features[what]

    def target(self, teacher: str, what: str) -> torch.Tensor:
        found: torch.Tensor = self.batch["targets"][teacher][what]
        return found

    def head(self, name: str) -> Any:
        return self.task.model.heads[name]

    def projected(self, teacher: str, what: str, prefix: str = "") -> torch.Tensor:
        side = "images" if what == "image" else "texts"
        found: torch.Tensor = self.head(f"{teacher}/{prefix}{side}")(self.feature(what))
        return found


def pairs(run: Trained) -> dict[str, torch.Tensor]:
    found = {}
    for kind in KINDS:
        image, text = run.feature("image"), run.feature(kind)
        teachers = [(run.target(name, "image"), run.target(name, kind), scale) for name, scale in SIDES.items()]
        found[f"clip/{kind}"] = 0.4 * losses.contrastive(image, text, run.scale)
        found[f"distill/{kind}"] = 0.6 * losses.distillation(image, text, run.scale, teachers)
    return found


def sigmoid_pairs(run: Trained) -> dict[str, torch.Tensor]:
    bias, found = run.encoded.scalars["logit_bias"], {}
    for kind in KINDS:
        image, text = run.feature("image"), run.feature(kind)
        teachers = [(run.target(name, "image"), run.target(name, kind), scale) for name, scale in SIDES.items()]
        found[f"clip/{kind}"] = 0.4 * losses.contrastive(image, text, run.scale, bias, form="sigmoid")
        found[f"distill/{kind}"] = 0.6 * losses.distillation(image, text, run.scale, teachers, bias, form="sigmoid")
    return found


def scales(run: Trained) -> dict[str, torch.Tensor]:
    found = {}
    for name in SIDES:
        scale, image = run.encoded.scalars[scale_name(name)], run.target(name, "image")
        of_kinds = [losses.contrastive(image, run.target(name, kind), scale) for kind in KINDS]
        found[f"scale/{name}"] = torch.stack(of_kinds).mean()
    return found


def features(**options: Any) -> Callable[[Trained], dict[str, torch.Tensor]]:
    """The mean over the teachers, of which ``red`` counts three times."""

    def of_run(run: Trained) -> dict[str, torch.Tensor]:
        found = {}
        for what in ("image", *KINDS):
            terms = {}
            for name in (*SIDES, "eyes" if what == "image" else "ears"):
                target = run.target(name, what)
                if options.get("standardised"):
                    target = run.head(f"{name}/standardise-{what}")(target)
                terms[name] = losses.features(run.projected(name, what), target, **options)
            total = sum(3 * value if name == "red" else value for name, value in terms.items())
            found[f"features/{what}"] = 0.5 * total / (len(terms) + 2)
        return found

    return of_run


def interactive(run: Trained) -> dict[str, torch.Tensor]:
    found = {}
    for kind in KINDS:
        of_teachers = [
            losses.interactive(
                run.projected(name, "image", "interactive-"), run.projected(name, kind, "interactive-"),
                run.target(name, "image"), run.target(name, kind), run.scale,
            )
            for name in SIDES
        ]  # fmt: skip
        found[f"interactive/{kind}"] = 0.5 * torch.stack(of_teachers).mean()
    return found


def probabilities(run: Trained) -> dict[str, torch.Tensor]:
    stored = (run.target("colors", name) for name in ("classes", "probabilities", "rest"))
    logits = run.head("colors/classes")(math.sqrt(16) * run.feature("image"))
    return {"probabilities/colors": 0.3 * losses.probabilities(logits, *stored, temperature=2.0)}


def dense(run: Trained) -> dict[str, torch.Tensor]:
    model = run.task.model
    found = model.terms.encode_images(model.clip, to_pixels(run.batch["image"], model.image))[MAP]
    patches = run.target("dino", "patches")
    if "dino/standardise-patches" in model.heads:
        patches = run.head("dino/standardise-patches")(patches)
    return {"dense/dino": 0.7 * losses.dense(run.head("dino/patches")(found.permute(0, 2, 3, 1)), patches)}


def anchor_similarities(run: Trained) -> dict[str, torch.Tensor]:
    image = run.target("released", "image")
    return {
        f"anchor_similarities/{kind}": 0.2 * losses.distillation(
            run.feature("image"), run.feature(kind), run.scale, [(image, run.target("released", kind), 20.0)]
        )
        for kind in KINDS
    }  # fmt: skip


def anchor_features(run: Trained) -> dict[str, torch.Tensor]:
    whats = ("image", *KINDS)
    return {
        f"anchor_features/{what}": 0.3 * losses.features(run.feature(what), run.target("released", what))
        for what in whats
    }


def anchor_weights(run: Trained) -> dict[str, torch.Tensor]:
    return {
        "anchor_weights": 0.4
        * losses.distance_from_start(dict(run.task.model.named_parameters()), run.task.model.start)
    }


WEIGHTED: dict[str, Any] = {"teachers": "all", "weights": {"red": 3.0}}
#: Terms with keys of ``loss`` and what the functions of ``reinforce.losses`` give.
CASES: list[tuple[str, dict[str, Any], Callable[[Trained], dict[str, torch.Tensor]]]] = [
    ("pairs", {"features": "none"}, pairs),
    ("pairs", {"features": "none", "form": "sigmoid"}, sigmoid_pairs),
    ("scales", {"learn_scales": True}, scales),
    ("features", {"features": WEIGHTED, "features_weight": 0.5 / 0.6}, features()),
    ("features", {"features": {**WEIGHTED, "distance": "l2"}, "features_weight": 0.5 / 0.6}, features(distance="l2")),
    *(
        (
            "features",
            {"features": {**WEIGHTED, "distance": of, "standardise": True}, "features_weight": 0.5 / 0.6},
            features(distance=of, standardised=True),
        )
        for of in ("cosine", "l2", "similarities")
    ),
    ("interactive", {"interactive": 0.5 / 0.6}, interactive),
    ("probabilities", {"probabilities": 0.3}, probabilities),
    ("dense", {"dense": {"weight": 0.7, "stage": 0, "teachers": ["dino"]}}, dense),
    ("anchor_similarities", {"anchor": {"teacher": "released", "similarities": 0.2}}, anchor_similarities),
    ("anchor_features", {"anchor": {"teacher": "released", "features": 0.3}}, anchor_features),
    ("anchor_weights", {"anchor": {"weights": 0.4}}, anchor_weights),
]  # fmt: skip
IDS = [f"{term}-{'-'.join(str(value) for value in keys.values())}"[:60] for term, keys, _ in CASES]


def test_every_term_of_the_registry_is_compared() -> None:
    assert {term for term, _, _ in CASES} == MODULES.keys()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> str:
    return open_clip_model(tmp_path_factory.mktemp("released"), context_length=16)


def specs(released: str) -> dict[str, dict[str, Any]]:
    patches = {"class": "tests.helpers.models.patches:PatchTeacher", "options": {"size": 16}}
    return {
        "released": {"model": released, "logit_scale": SIDES["released"]},
        "red": {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16}, "logit_scale": SIDES["red"]},
        "dino": {**patches, "logit_scale": SIDES["dino"]},
        "eyes": {"class": "tests.helpers.models:ImageOnly"},
        "ears": {"class": "tests.helpers.models:TextOnly"},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, released: str) -> str:
    return write(tmp_path_factory.mktemp("made"), released, "float16")


def write(folder: Path, released: str, codec: str) -> str:
    """A dataset with all that the terms of a loss read."""
    write_tar(folder / "source" / "0.tar", members_of(0, 12))
    teachers = {name: {**spec, "codec": codec} for name, spec in specs(released).items()}
    teachers["dino"]["patches"] = {"grid": 4, "codec": "float16", "sample": 400}
    classifiers = {"colors": {"class": "tests.helpers.models.classifiers:Colors", "k": 3, "temperature": 2.0}}
    return reinforce_here(
        config_of(f"{folder}/source/*.tar", folder / "out", teachers=teachers, classifiers=classifiers)
    )


def trained(folder: Path, url: str, released: str, keys: dict[str, Any], student: Any = None) -> Trained:
    torch.manual_seed(0)
    name = student_folder(folder / "random") if "form" in keys else released  # of a softmax
    config = student_config(folder, url, loss={"lambda": 0.6, **keys}, student=student or {"model": name})
    task, batch = first_batch(config)
    with torch.no_grad():
        for name, parameter in task.model.clip.named_parameters():  # away from the start
            parameter.add_(0.01 * len(name) / 30)
    encoded = task.model(batch)
    return Trained(task, batch, encoded, {**encoded.losses, **task.losses(encoded, batch)})


@pytest.mark.parametrize(("term", "keys", "function"), CASES, ids=IDS)
def test_online_targets_give_the_losses_of_stored_ones_and_python_functions_those_of_the_trainer(
    tmp_path: Path, made: str, released: str, term: str, keys: dict[str, Any], function: Any
) -> None:
    stored, computed = runs = stored_and_online(tmp_path, made, released, keys)
    assert torch.equal(stored.batch["image"], computed.batch["image"])
    assert stored.losses.keys() == computed.losses.keys()
    for run in runs:
        expected = function(run)
        assert expected.keys() <= run.losses.keys()
        for name, value in expected.items():
            assert value > 0
            torch.testing.assert_close(run.losses[name], value, rtol=1e-4, atol=1e-5, msg=f"{name}: {term}")
    assert_equal(stored, computed, 5e-3)


def stored_and_online(
    folder: Path, url: str, released: str, keys: dict[str, Any], student: Any = None
) -> tuple[Trained, Trained]:
    online = {"targets": "online", "teachers": specs(released)}
    return trained(folder, url, released, keys, student), trained(folder, url, released, {**keys, **online}, student)


def assert_equal(stored: Trained, computed: Trained, tolerance: float) -> None:
    assert stored.losses.keys() == computed.losses.keys()
    for name, value in stored.losses.items():
        assert computed.losses[name].item() == pytest.approx(value.item(), rel=tolerance, abs=1e-4), name


ALL: dict[str, Any] = {
    "features": {**WEIGHTED, "standardise": True}, "interactive": 0.5, "learn_scales": True, "probabilities": 0.3,
    "dense": {"weight": 0.7, "stage": 0, "teachers": ["dino"]},
    "anchor": {"teacher": "released", "similarities": 0.2, "features": 0.3, "weights": 0.4},
}  # fmt: skip


@pytest.mark.parametrize(("codec", "tolerance"), [("float32", 1e-4), ("int8", 2e-2)])
def test_all_terms_with_online_targets_give_the_losses_of_those_stored_by_another_codec(
    tmp_path: Path, released: str, codec: str, tolerance: float
) -> None:
    url = write(tmp_path, released, codec)
    assert_equal(*stored_and_online(tmp_path, url, released, ALL), tolerance)


@pytest.mark.parametrize("model", ["test_efficientnet", "test_vit"])
@pytest.mark.parametrize("stage", [-1, 1])
def test_students_of_timm_learn_stored_and_online_patches_beside_their_features(
    tmp_path: Path, made: str, released: str, model: str, stage: int
) -> None:
    timm = {"family": "timm", "model": model, "image_size": 32}
    keys = {"dense": {"weight": 0.7, "stage": stage, "teachers": ["dino"]}, "features": "all", "probabilities": 0.3}
    stored, computed = stored_and_online(tmp_path, made, released, keys, student=timm)
    assert stored.losses.keys() == {"features/image", "probabilities/colors", "dense/dino"}
    assert_equal(stored, computed, 5e-3)
    student, batch = stored.task.model.eval(), stored.batch
    torch.testing.assert_close(
        student(batch).features["image"],
        torch.nn.functional.normalize(student.clip.encode_image(to_pixels(batch["image"], student.image)), dim=-1),
    )
    student(batch).losses["dense/dino"].backward()
    first = next(student.clip.visual.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["hf", "mobileclip"])
def test_terms_accumulate_with_online_targets_in_students_of_other_towers(
    tmp_path: Path, made: str, released: str, kind: str
) -> None:
    keys = {**{key: value for key, value in ALL.items() if key != "anchor"}, "lambda": 0.6}
    keys |= {"features": {**WEIGHTED, "standardise": True, "distance": "similarities", "queue": 20}}
    keys |= {"targets": "online", "teachers": specs(released)}
    found = []
    for microbatches in (1, 4):
        task, feed = build(student_config(tmp_path, made, kind, loss=keys), CPU)
        task.model.eval()  # batch statistics would differ
        made_batch = next(iter(feed.batches(0, 1, 8, 0)))
        output = backpropagate(task, task.model, made_batch, 8, [0] * microbatches, CPU)
        found.append((output.losses, {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
