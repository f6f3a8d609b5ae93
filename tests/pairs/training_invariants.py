"""What must be true of every training, whatever its case. What it computes is compared with functions for users, with
what `reinforce.open` reads, and with other trainings of the case."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import reinforce
from reinforce import losses
from reinforce.dataset.codecs.codebooks import find_codec, load
from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from reinforce.evaluation.encoding import load_encoders
from reinforce.evaluation.model_names import resolve_models
from reinforce.student.terms.base import MAP, Rows, scale_name
from reinforce.student.terms.features import Features
from reinforce.student.train import StudentTask, build
from reinforce.training.config import HIGHEST_LOGIT_SCALE
from reinforce.training.task import Batch, Encoded
from teachers.open_clip.text import Tokenizer
from teachers.pixels import to_pixels
from teachers.runtime.accelerator import Accelerator
from tests.helpers.trainings import before_batches
from tests.pairs.trainings import (
    BATCH,
    SIDES,
    STEPS,
    Case,
    Place,
    config,
    ensemble,
    last_state,
    rows_of,
    train,
    weights_of,
)

Losses = Mapping[str, torch.Tensor]


class Numbers(NamedTuple):
    """The losses of a batch: those of a training, and by the functions for users."""

    trained: Losses
    expected: Losses


@dataclass
class Trained:
    """A case, trained on one rank in one part without an end in between, and how it was before its first step.

    ``raw`` is its first batch as it is read, ``batch`` as a step computes with it, ``first`` its losses. ``keys`` are
    the rows of each batch, ``start`` the first weight of the image tower. ``divided`` is where it was trained on its
    ranks, in its parts, at once, and ``resumed`` where that ended and began again; each may be the folder of another.
    """

    case: Case
    place: Place
    output: Path
    divided: Path
    resumed: Path
    raw: Batch = field(default_factory=dict)
    batch: Batch = field(default_factory=dict)
    first: Any = None
    keys: list[list[str]] = field(default_factory=list)
    start: torch.Tensor | None = None
    task: Any = None

    @property
    def online(self) -> bool:
        return self.case["targets"] != "stored"

    @property
    def urls(self) -> list[str]:
        return [one.url for one in config(self.case, self.place, "unused").data.datasets]

    def train(self) -> None:
        def watch(task: Any, feed: Any) -> None:
            self.start = next(task.model.clip.visual.parameters()).detach().clone()
            self.raw = next(iter(feed.batches(0, 1, BATCH, 0)))
            self.batch = task.prepare(self.raw)
            self.first = numbers(self.case, task, self.batch)
            before_batches(feed, lambda rank, step, batch: self.keys.append(batch["key"]))

        self.task = train(config(self.case, self.place, self.output), watch=watch)


def is_finite(run: Trained) -> None:
    for output in (run.output, run.divided, run.resumed):
        rows = rows_of(output)
        assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
        assert all(math.isfinite(value) for row in rows for value in (row["loss"], *row["losses"].values()))
        assert rows[-1]["skipped"] == 0
        for row in rows:
            for name, value in row["scalars"].items():
                if "scale" in name:
                    assert 1 - 1e-6 <= value <= HIGHEST_LOGIT_SCALE * (1 + 1e-6), name
    assert all(value.isfinite().all() for value in last_state(run.output).values())
    assert run.start is not None
    assert not torch.equal(next(run.task.model.clip.visual.parameters()), run.start), "the image tower learns"


def resumes_bit_for_bit(run: Trained) -> None:
    if run.resumed != run.divided:
        assert rows_of(run.resumed) == rows_of(run.divided)
        one, other = last_state(run.divided), last_state(run.resumed)
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def ranks_and_parts_are_as_one(run: Trained) -> None:
    """But for batch normalisations, of which each part has statistics of its own, and for rows of which an online
    teacher gives nothing, for which each rank takes others of its own."""
    case = run.case
    if run.online and case["nulls"] == "some" and case["ranks"] == "2":
        return
    norms = case["start"] == "random" and case["tower"] in ("timm", "alone")
    if run.divided == run.output or (norms and case["accumulate"] == "2"):
        return
    rough = case["precision"] == "bf16"
    for one, other in zip(rows_of(run.output), rows_of(run.divided), strict=True):
        assert one["losses"].keys() == other["losses"].keys()
        assert other["losses"] == pytest.approx(one["losses"], rel=5e-2 if rough else 2e-3, abs=1e-2 if rough else 1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=5e-2 if rough else 2e-3)
        tolerance = 1e-5 if one["step"] == 1 else 2e-2 if rough else 2e-3  # those of the first step are its start
        assert other["scalars"] == pytest.approx(one["scalars"], rel=tolerance)


def losses_are_those_of_functions_for_users(run: Trained) -> None:
    tolerance = {"rtol": 4e-2, "atol": 3e-2} if run.case["precision"] == "bf16" else {"rtol": 1e-4, "atol": 2e-5}
    logged = {name: torch.tensor(value) for name, value in rows_of(run.output)[0]["losses"].items()}
    assert logged.keys() == run.first.expected.keys()
    after = numbers(run.case, run.task, run.task.prepare(run.raw))
    for trained, expected in ((logged, run.first.expected), (run.first.trained, run.first.expected), after):
        assert trained.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                trained[name].float(), value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


def batches_have_usable_rows_once(run: Trained) -> None:
    usable = {sample.key for sample in run.place.samples(run.urls).values() if _is_usable(run, sample)}
    assert len(run.keys) == STEPS
    for keys in run.keys:
        # Of two datasets, which are drawn by weight, one can end inside a batch.
        most = 1 if run.case["data"] == "one" else 2
        assert max(Counter(keys).values()) <= most, f"a batch has a row twice: {sorted(keys)}"
        assert len(keys) == BATCH
        assert run.online or {*keys} <= usable
    if not run.online:
        assert sorted(one["key"] for one in _examples(run)) == sorted(usable)


def balanced_vectors_have_mean_0_and_deviation_1(run: Trained) -> None:
    """Over the examples of the first epoch, those of images, true and synthetic captions each by their own.

    By PHI-S, vectors of texts have it only over all dimensions, where there are two kinds of them.
    """
    if run.online and (run.case["codec"] not in _TOLERANCES or run.case["nulls"] == "some"):
        return  # what is stored is not what is balanced
    tolerance = 5e-2 if run.online else 2e-3
    for name, head in run.task.model.heads.items():
        teacher, _, what = name.replace(",", ".").partition("/balance-")
        if what in ("image", "caption", "synthetic"):
            rows = torch.stack([one["targets"][teacher][what] for one in _examples(run, [teacher])])
            deviation, mean = torch.std_mean(head(rows), dim=0, correction=0)
            torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=tolerance)
            if run.case["balance"] == "phi-s" and what != "image":
                deviation = deviation.square().mean().sqrt()
            torch.testing.assert_close(deviation, torch.ones_like(deviation), rtol=tolerance, atol=0)


def shares_of_teachers_are_parts_of_the_losses(run: Trained) -> None:
    """Of the losses that are means over teachers; a teacher that is surest of a pair has its row."""
    model, batch = run.task.model, run.batch
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        encoded = model.train()(batch)
        found = run.task.losses(encoded, batch) | encoded.losses
    shares = run.task.shares(encoded, batch)
    rows = Rows(encoded.features, encoded.scalars, batch.get("targets", {}), heads=model.heads)
    rows = replace(rows, features={name: of for name, of in rows.features.items() if "/" not in name})
    parts = [part for term in run.task.terms.terms for part in term.parts(rows)]
    model.load_state_dict(before)
    of_teachers = [name for name in found if name.partition("/")[0] in ("distill", "features", "interactive")]
    if run.case["distance"] != "similarities" and of_teachers:  # without earlier vectors
        total = sum(value for what, _, value in parts if what == "loss")
        torch.testing.assert_close(total, sum(found[name] for name in of_teachers), rtol=1e-4, atol=1e-5)
    for what in shares.keys() - {"rows"}:
        own = [*shares[what].values()]
        assert len(own) > 1
        assert torch.stack(own).sum().item() == pytest.approx(1)
        assert all(value > 0 for value in own)
    won = shares.get("rows", {}).values()
    directions = 2 if run.case["form"] == "softmax" else 1
    kinds = len([kind for kind in ("caption", "synthetic") if kind in batch])
    assert sum(won) == (directions * kinds * len(batch["image"]) if run.case["weights"] == "confidence" else 0)


def targets_are_those_of_their_rows(run: Trained) -> None:
    """Vectors are those of the row's own augmentation and text, as `reinforce.open` reads them."""
    samples, layers = run.place.samples(run.urls), _layers(run)
    tokenize = Tokenizer(run.task.model.text_name) if run.task.tokenizer is not None else None
    images = [image.numpy() for image in run.raw["image"]]
    seen = set()
    for row, image in enumerate(run.batch["image"]):
        number = next(n for n, one in enumerate(images) if np.array_equal(one, image.numpy()))
        sample = samples[run.raw["key"][number]]
        seen.add(sample.key)
        [crop] = (
            k
            for k in range(len(sample.augmentations))
            if np.array_equal(np.asarray(sample.augmented(k, len(image))), image)
        )
        for model, targets in run.batch["targets"].items():
            for what, value in targets.items():
                assert value[row].float().isfinite().all(), (model, what)
                if what == "image":
                    layer = layers[f"embeddings/{model}/images"]
                    _compare(run, layer, value[row], [sample.images[model][crop]])
                elif what == "patches":
                    if (stored := sample.values["patches/dino"]) is not None:
                        grid = value[row].float()
                        if run.online:
                            book = load(layers["patches/dino"].codebook_at(run.urls[0])).arrays
                            grid = (grid - book["mean_of_channel"]) / book["deviation_of_channel"]
                        np.testing.assert_allclose(grid, stored[crop], rtol=0, atol=2e-2)
                elif what in ("caption", "synthetic"):
                    layer, tokens = layers[f"embeddings/{model}/caption"], run.batch[what][row]
                    texts = [*_texts(run, sample, what)]
                    own = [one for one, _, _ in texts]
                    same = (tokenize(own) == tokens).all(dim=1).tolist()
                    _compare(
                        run,
                        layer,
                        value[row],
                        [sample.texts[model][of][n] for same, (_, of, n) in zip(same, texts, strict=True) if same],
                    )
        if "colors" in run.batch["targets"]:
            stored, own = sample.values["probabilities/colors"], run.batch["targets"]["colors"]
            assert own["classes"][row].tolist() == stored.classes[crop].tolist()
            np.testing.assert_allclose(own["probabilities"][row], stored.values[crop], atol=1e-6)
    assert len(seen) == BATCH or run.online


def online_targets_give_the_losses_of_stored_ones(run: Trained) -> None:
    case = run.case
    if not run.online or case["nulls"] == "some" or case["codec"] not in _TOLERANCES:
        return
    task, feed = build(config(case, run.place, "unused", stored=True), Accelerator("cpu", case["precision"]))
    stored = task.prepare(next(iter(feed.batches(0, 1, BATCH, 0))))
    assert stored.keys() == run.batch.keys()
    for name in stored.keys() - {"targets"}:
        assert torch.equal(stored[name], run.batch[name])
    tolerance = max(_TOLERANCES[case["codec"]], 3e-2 * ("bf16" in (case["targets"], case["precision"])))
    found = numbers(case, task, stored).trained
    assert {name: float(value) for name, value in run.first.trained.items()} == pytest.approx(
        {name: float(value) for name, value in found.items()}, rel=tolerance, abs=2e-4
    )


#: Largest relative difference of losses with vectors of a codec, of those that keep the length of vectors.
_TOLERANCES = {"float16": 5e-3, "int8": 2e-2}


def exports_encode_as_the_student(run: Trained) -> None:
    model = run.task.model.eval()
    pixels = to_pixels(run.batch["image"], model.image)
    texts = ["thing 3", "a picture of 0.123, seed 45", "Na\u00efve <end_of_text> caf\u00e9"]
    with torch.no_grad():
        images = normalize(model.clip.encode_image(pixels), dim=-1)
        torch.testing.assert_close(model(run.batch).features["image"], images, rtol=0, atol=2e-5)
        if run.task.tokenizer is None:
            with resolve_models([str(run.output)], teachers=True) as specs:
                [(_, encoder, _)] = load_encoders(specs, "cpu", "fp32", 1)
            torch.testing.assert_close(normalize(encoder.encode_images(pixels), dim=-1), images, rtol=0, atol=2e-5)
            return
        of_texts = normalize(model.clip.encode_text(Tokenizer(run.task.model.text_name)(texts)), dim=-1)
    student = reinforce.Student.load(str(run.output), device="cpu")
    found = student.encode_images([image.numpy() for image in run.batch["image"]])
    torch.testing.assert_close(found, images, rtol=0, atol=2e-5)
    torch.testing.assert_close(student.encode_texts(texts), of_texts, rtol=0, atol=2e-5)
    assert student.logit_scale == pytest.approx(float(model.clip.logit_scale.exp()), rel=1e-6)


INVARIANTS: tuple[Callable[[Trained], None], ...] = (
    is_finite,
    resumes_bit_for_bit,
    ranks_and_parts_are_as_one,
    losses_are_those_of_functions_for_users,
    batches_have_usable_rows_once,
    balanced_vectors_have_mean_0_and_deviation_1,
    shares_of_teachers_are_parts_of_the_losses,
    targets_are_those_of_their_rows,
    online_targets_give_the_losses_of_stored_ones,
    exports_encode_as_the_student,
)

# -- The losses of a batch by the functions for users.


class _Computed(NamedTuple):
    """A step's batch and what the student gives of it; ``queues`` are the vectors of earlier batches."""

    case: Case
    task: StudentTask
    batch: Batch
    encoded: Encoded
    queues: Mapping[str, torch.Tensor]

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in ("caption", "synthetic") if kind in self.batch]

    @property
    def names(self) -> list[str]:
        return ensemble(self.case) if float(self.case["lambda"]) > 0 else []

    @property
    def of_both_sides(self) -> list[str]:
        return [name for name in self.names if name.partition(".")[0] in SIDES]

    def scale(self, teacher: str) -> Any:
        """The logit scale of a teacher."""
        learnt = self.encoded.scalars.get(scale_name(teacher))
        least = self.case["scales"] == "least"
        return learnt.detach() if learnt is not None else 1.0 if least else SIDES[teacher.partition(".")[0]]

    def vectors(self, teacher: str, what: str) -> torch.Tensor:
        found: torch.Tensor = self.batch["targets"][teacher][what]
        return found

    def head(self, teacher: str, what: str, part: str = "") -> Any:
        return self.task.model.heads[f"{teacher}/{part}{what}".replace(".", ",")]


def numbers(case: Case, task: StudentTask, batch: Batch) -> Numbers:
    """The losses of a batch; the state of the model, such as batch statistics and queues, stays as it is."""
    heads = task.model.heads
    queues = {name: heads[name].filled().clone() for name in heads if "queue-" in name}
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    task.model.train()
    with torch.no_grad():
        with Accelerator("cpu", case["precision"]).autocast():
            encoded = task.model(batch)
        trained = {**encoded.losses, **task.losses(encoded, batch)}
        run = _Computed(case, task, batch, encoded, queues)
        found = Numbers(trained, {name: value for term in FUNCTIONS.values() for name, value in term(run)})
    task.model.load_state_dict(before)
    return found


_Found = Iterator[tuple[str, torch.Tensor]]


def _pairs(run: _Computed) -> _Found:
    weight, form, scalars = float(run.case["lambda"]), run.case["form"], run.encoded.scalars
    for kind in run.kinds:
        image, text = run.encoded.features["image"], run.encoded.features[kind]
        fixed = (image, text, scalars["logit_scale"])
        bias = scalars["logit_bias"] if form == "sigmoid" else None
        if weight < 1:
            yield f"clip/{kind}", (1 - weight) * losses.contrastive(*fixed, bias, form=form)
        if weight > 0:
            teachers = [
                (run.vectors(name, "image"), run.vectors(name, kind), run.scale(name)) for name in run.of_both_sides
            ]
            named = [weights_of(run.case).get(name, 1.0) for name in run.of_both_sides]
            weights = "confidence" if run.case["weights"] == "confidence" else named
            yield f"distill/{kind}", weight * losses.distillation(*fixed, teachers, bias, form=form, weights=weights)


def _scales(run: _Computed) -> _Found:
    for name in run.of_both_sides if run.case["scales"] == "learnt" else []:
        image = run.vectors(name, "image")
        found = [losses.contrastive(image, run.vectors(name, kind), run.scale(name)) for kind in run.kinds]
        yield f"scale/{name}", torch.stack(found).mean()


def _features(run: _Computed) -> _Found:
    case = run.case
    every = run.names  # without texts all of them have one side
    one_sided = [name for name in every if name in ("eyes", "ears") or case["captions"] == "none"]
    names = {"none": [], "one-sided": one_sided, "all": every}[case["features"]]
    for what in ["image", *run.kinds]:
        found, total = [], 0.0
        for name in [name for name in names if name != ("ears" if what == "image" else "eyes")]:
            target = run.vectors(name, what)
            balanced = case["balance"] in ("standardise", "phi-s")
            if balanced:
                target = run.head(name, what, "balance-")(target)
            projected = run.head(name, "images" if what == "image" else "texts")(run.encoded.features[what])
            options = (
                {"temperature": 0.2, "earlier": run.queues[f"{name}/queue-{what}".replace(".", ",")]}
                if case["distance"] == "similarities"
                else {}
            )
            weight = weights_of(case).get(name, 1.0)
            if case["balance"] == "dispersion":
                [term] = [one for one in run.task.terms.terms if isinstance(one, Features)]
                length = term.moments[name, what].mean.double().norm().item()
                weight /= 1 - length ** (2 if case["distance"] == "l2" else 1)
            if case["weights"] == "confidence" and case["distance"] != "similarities" and name in run.of_both_sides:
                of_rows = [
                    losses.features(one[None], other[None], case["distance"], balanced=balanced)
                    for one, other in zip(projected, target, strict=True)
                ]
                loss = (_confidence(run, name, what) * torch.stack(of_rows)).mean()
            else:
                loss = losses.features(projected, target, case["distance"], balanced=balanced, **options)
            found.append(weight * loss)
            total += weight
        if found:
            yield f"features/{what}", float(case["lambda"]) * 0.5 * torch.stack(found).sum() / total


def _confidence(run: _Computed, name: str, what: str) -> torch.Tensor:
    """How sure a teacher is of each row's pair, relative to the mean over the teachers."""

    def sure(teacher: str, kind: str) -> torch.Tensor:
        similarities = run.vectors(teacher, "image").double() @ run.vectors(teacher, kind).double().T
        logits = (run.scale(teacher) * similarities).detach().numpy()
        found = logits - np.log(np.exp(logits).sum(axis=1 if what == "image" else 0, keepdims=True))
        return torch.from_numpy(np.exp(np.diagonal(found)))

    kinds = run.kinds if what == "image" else [what]
    of_teachers = {
        teacher: (sum(sure(teacher, kind) for kind in kinds) / len(kinds)).clamp_min(1e-12)
        for teacher in run.of_both_sides
    }
    share: torch.Tensor = of_teachers[name] * len(of_teachers) / sum(of_teachers.values())
    return share.float()


def _interactive(run: _Computed) -> _Found:
    for kind in run.kinds if run.case["interactive"] == "yes" else []:
        weights = {name: weights_of(run.case).get(name, 1.0) for name in run.of_both_sides}
        found = [
            weight * losses.interactive(
                run.head(name, "images", "interactive-")(run.encoded.features["image"]),
                run.head(name, "texts", "interactive-")(run.encoded.features[kind]),
                run.vectors(name, "image"), run.vectors(name, kind), run.encoded.scalars["logit_scale"],
            )
            for name, weight in weights.items()
        ]  # fmt: skip
        total = sum(weights.values())
        yield f"interactive/{kind}", float(run.case["lambda"]) * 0.5 * torch.stack(found).sum() / total


def _probabilities(run: _Computed) -> _Found:
    if run.case["probabilities"] == "yes":
        image = run.encoded.features["image"]
        stored = (run.vectors("colors", name) for name in ("classes", "probabilities", "rest"))
        logits = run.head("colors", "classes")(math.sqrt(image.shape[1]) * image)
        yield "probabilities/colors", 0.3 * losses.probabilities(logits, *stored, temperature=2.0)


def _dense(run: _Computed) -> _Found:
    if run.case["dense"] != "no":
        model, patches = run.task.model, run.vectors("dino", "patches")
        found = model.terms.encode_images(model.clip, to_pixels(run.batch["image"], model.image))[MAP]
        how = "balance-" if run.case["dense"] == "phi-s" else "standardise-"
        if f"dino/{how}patches" in model.heads:
            patches = run.head("dino", "patches", how)(patches)
        yield "dense/dino", 0.7 * losses.dense(run.head("dino", "patches")(found.permute(0, 2, 3, 1)), patches)


def _anchor_similarities(run: _Computed) -> _Found:
    for kind in run.kinds if run.case["anchor"] == "similarities" else []:
        features, scalars = run.encoded.features, run.encoded.scalars
        teacher = (run.vectors("vit", "image"), run.vectors("vit", kind), SIDES["vit"])
        bias, form = scalars.get("logit_bias"), run.case["form"]
        value = losses.distillation(
            features["image"], features[kind], scalars["logit_scale"], [teacher], bias, form=form
        )
        yield f"anchor_similarities/{kind}", 0.3 * value


def _anchor_features(run: _Computed) -> _Found:
    for what in ["image", *run.kinds] if run.case["anchor"] == "features" else []:
        yield f"anchor_features/{what}", 0.3 * losses.features(run.encoded.features[what], run.vectors("vit", what))


def _anchor_weights(run: _Computed) -> _Found:
    if run.case["anchor"] == "weights":
        weights, start = dict(run.task.model.named_parameters()), run.task.model.start
        yield "anchor_weights", 0.4 * losses.distance_from_start(weights, start)


#: What the losses of a term are by the functions for users.
FUNCTIONS: dict[str, Callable[[_Computed], _Found]] = {
    "pairs": _pairs, "scales": _scales, "features": _features, "interactive": _interactive,
    "probabilities": _probabilities, "dense": _dense, "anchor_similarities": _anchor_similarities,
    "anchor_features": _anchor_features, "anchor_weights": _anchor_weights,
}  # fmt: skip

# -- What is stored of a row.


def _layers(run: Trained) -> dict[str, Any]:
    manifest = read_manifest(Store(run.urls[0]))
    return {name: stored_layer(name, entry) for name, entry in manifest["layers"].items()}


def _texts(run: Trained, sample: Any, what: str) -> Iterator[tuple[str, str, int]]:
    """The texts that a row of the batch may have, with the source and the place of their vectors."""
    captions = run.case["captions"]
    true = [*(sample.true_captions or ((sample.caption,) if sample.caption else ()))]
    if captions == "parallel" and what == "synthetic":
        yield (sample.metadata or {}).get("de", ""), "caption", 0
    elif what == "caption":
        yield from ((text, "caption", n) for n, text in enumerate(true))
    if captions == "mixed" or (captions == "both" and what == "synthetic"):
        yield from ((text, "namer", n) for n, text in enumerate(sample.captions["namer"] or ()))


def _is_usable(run: Trained, sample: Any) -> bool:
    """Whether a row has all that an example takes."""
    case, read = run.case, set(run.batch.get("targets", {}))
    images = [sample.images[name] for name in read if name in sample.images]
    if not all(np.isfinite(one).all() and one.any() for one in images):
        return False
    others = {"patches/dino": case["dense"] != "no", "probabilities/colors": case["probabilities"] == "yes"}
    if any(sample.values[name] is None for name, is_read in others.items() if is_read):
        return False
    for what in ("caption", "synthetic"):
        if what in run.batch:
            texts = [*_texts(run, sample, what)]
            usable = [
                text and all(_is_vector(sample.texts[name][of], n) for name in read if sample.texts.get(name))
                for text, of, n in texts
            ]
            if not any(usable):
                return False
    return True


def _is_vector(stored: Any, number: int) -> bool:
    return number < len(stored) and bool(np.isfinite(stored[number]).all() and stored[number].any())


def _examples(run: Trained, teachers: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The examples of the first epoch by number, with all that the training reads, or with the vectors of teachers."""
    data = config(run.case, run.place, "unused").data
    keys = {key: getattr(data, key) for key in ("captions", "captioners", "parallel", "synthetic")}
    keys = {key: value for key, value in keys.items() if value is not None}
    if teachers is None:
        teachers = [name for name in run.batch.get("targets", {}) if name != "colors"]
        keys |= {"classifiers": ["colors"]} if run.case["probabilities"] == "yes" else {}
        keys |= {"patches": ["dino"]} if run.case["dense"] != "no" else {}
    examples = reinforce.Examples(run.urls, teachers=teachers, size=8, **keys)
    examples.set_epoch(0)
    yield from examples


def _compare(run: Trained, layer: Any, found: torch.Tensor, stored: Sequence[np.ndarray]) -> None:
    """A target's vector with one of those that are stored, or what the layer's codec keeps of it, if it is online."""
    assert float(found.norm()) == pytest.approx(1, abs=1e-4)
    known = [normalize(torch.from_numpy(one), dim=0) for one in stored if np.isfinite(one).all() and one.any()]
    if not known:
        assert run.online, "its row is null"
        return
    codec, length = find_codec(layer.dtype), 2e-3
    if run.online:
        values = codec.prepare(found.numpy()[None])
        found = normalize(torch.from_numpy(values)[0], dim=0)
        length = {"int8": 3e-2}.get(codec.numbers, length) if run.case["targets"] == "online" else 5e-2
        if layer.codebook is not None:
            book = load(layer.codebook_at(run.urls[0]))
            nearest = normalize(torch.from_numpy(book.decode(book.encode(values)))[0], dim=0)
            length += float((nearest - found).norm())
    assert min(float((one - found).norm()) for one in known) < length, layer.name
