"""The loss terms as functions and as a module, beside what a training run computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import reinforce
from reinforce import losses
from reinforce.errors import UserError
from reinforce.student.terms.registry import MODULES
from reinforce.student.train import StudentTask, build
from teachers.pixels import to_pixels
from teachers.runtime.accelerator import Accelerator
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.reinforced import reinforce_here
from tests.helpers.students import student_config

SCALED = partial(losses.StudentLoss, logit_scales={"blue": 9.0})


def rows(seed: int, pairs: int = 6, dim: int = 5) -> torch.Tensor:
    return torch.randn(pairs, dim, generator=torch.Generator().manual_seed(seed))


FEATURES = {kind: rows(seed) for seed, kind in enumerate(("image", "caption", "synthetic"))}


def test_functions_are_the_equations_of_the_papers() -> None:
    image, text, one, other = (normalize(rows(n), dim=-1) for n in range(4))
    diagonal, scale = torch.arange(6), torch.tensor(20.0)
    logits = scale * image @ text.T
    clip = (cross_entropy(logits, diagonal) + cross_entropy(logits.T, diagonal)) / 2
    torch.testing.assert_close(losses.contrastive(3 * image, text, scale), clip)
    signs = 2 * torch.eye(6) - 1
    siglip = -torch.nn.functional.logsigmoid(signs * (logits - 10)).sum() / 6
    torch.testing.assert_close(losses.contrastive(image, text, 20.0, -10.0, form="sigmoid"), siglip)
    target = ((30 * one @ other.T).softmax(1) + (50 * other @ one.T).softmax(1)) / 2
    back = ((30 * one @ other.T).softmax(0) + (50 * other @ one.T).softmax(0)) / 2
    soft = (cross_entropy(logits, target) + cross_entropy(logits.T, back.T)) / 2
    found = losses.distillation(image, text, scale, [(one, other, 30.0), (other, one, torch.tensor(50.0))])
    torch.testing.assert_close(found, soft)
    torch.testing.assert_close(losses.features(image, one), 1 - (image * one).sum(1).mean())
    icl = cross_entropy(scale * image @ other.T, diagonal) + cross_entropy(scale * text @ one.T, diagonal)
    torch.testing.assert_close(losses.interactive(image, text, one, other, scale), icl / 2)
    stored = (rows(9) / 2).softmax(1)
    [values, classes] = stored.topk(5)
    found = losses.probabilities(rows(8), classes, values, torch.zeros(6), temperature=2.0)
    expected = 4 * torch.nn.functional.kl_div((rows(8) / 2).log_softmax(1), stored, reduction="batchmean")
    torch.testing.assert_close(found, expected)
    grid, other_grid = rows(5, 24, 7).view(4, 2, 3, 7), rows(6, 24, 7).view(4, 2, 3, 7)
    cosines = torch.nn.functional.cosine_similarity(grid, other_grid, dim=-1)
    apart = torch.nn.functional.smooth_l1_loss(grid, other_grid)
    torch.testing.assert_close(losses.dense(grid, other_grid), 0.9 * (1 - cosines.mean()) + 0.1 * apart)
    constant = grid[:, :1, :1]
    assert losses.dense(constant.expand(-1, 5, 4, -1), constant).item() == pytest.approx(0, abs=1e-5)
    start = {"a": torch.zeros(2), "b": torch.ones(1)}
    assert losses.distance_from_start({"a": torch.ones(2), "b": torch.tensor([3.0]), "c": one}, start) == 3.0


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> str:
    return open_clip_model(tmp_path_factory.mktemp("released"), context_length=16)


@pytest.fixture(scope="module")
def of_all_terms(tmp_path_factory: pytest.TempPathFactory, released: str) -> str:
    """A dataset with all that the terms of a loss read."""
    folder = tmp_path_factory.mktemp("all")
    write_tar(folder / "source" / "0.tar", members_of(0, 12))
    patches = {"grid": 4, "codec": "float16", "sample": 400}
    teachers = {
        "released": {"model": released, "logit_scale": 20.0, "codec": "float32"},
        "red": {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16}, "logit_scale": 50.0},
        "dino": {
            "class": "tests.helpers.models.patches:PatchTeacher", "options": {"size": 16}, "patches": patches,
            "logit_scale": 30.0,
        },
    }  # fmt: skip
    classifiers = {"colors": {"class": "tests.helpers.models.classifiers:Colors", "k": 3}}
    config = config_of(f"{folder}/source/*.tar", folder / "out", teachers=teachers, classifiers=classifiers)
    return reinforce_here(config)


def test_the_module_gives_the_losses_and_gradients_of_a_training_run(
    of_all_terms: str, released: str, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "features": "all", "interactive": 0.5, "logit_scales": {"red": 40.0}, "learn_scales": True,
        "probabilities": 0.3, "dense": {"weight": 0.7, "stage": 0},
        "anchor": {"teacher": "released", "similarities": 0.2, "features": 0.3, "weights": 0.4},
    }  # fmt: skip
    config = student_config(tmp_path, of_all_terms, loss={"lambda": 0.6, **keys}, student={"model": released})
    task, feed = build(config, Accelerator("cpu"))
    assert isinstance(task, StudentTask)
    batch = task.prepare(next(iter(feed.batches(0, 1, 8, 0))))
    model = open_clip.create_model(released)
    all_targets = reinforce.Examples(of_all_terms, patches="dino", classifiers="colors")
    own = losses.StudentLoss(all_targets, width=16, model=model, lambda_=0.6, **keys)
    assert [type(term).__module__ for term in own.terms.terms] == [module.__name__ for module in MODULES.values()]
    own.heads.load_state_dict(task.model.heads.state_dict())
    for clip in (task.model.clip, model):
        with torch.no_grad():
            for name, parameter in clip.named_parameters():
                parameter.add_(0.01 * len(name) / 30)
    encoded = task.model(batch)
    trained = {**encoded.losses, **task.losses(encoded, batch)}

    features = own.encode_image(to_pixels(batch["image"], task.model.image))
    features |= {kind: 2 * model.encode_text(batch[kind]) for kind in ("caption", "synthetic")}
    found = own.losses(features, batch["targets"], model.logit_scale.exp())
    assert found.keys() == trained.keys()
    for name, value in found.items():
        assert value > 0
        torch.testing.assert_close(value, trained[name], msg=name)
    total = own(features, batch["targets"], model.logit_scale.exp())
    torch.testing.assert_close(total, torch.stack([*trained.values()]).sum())
    total.backward()
    assert all(p.grad is not None for p in own.parameters())
    assert not {*own.parameters()} & {*model.parameters()}
    assert any(note.startswith("teacher red: similarities, logit scale 40") for note in own.notes)


def test_examples_have_the_targets_of_every_term_and_weights_move_with_the_model(
    of_all_terms: str, released: str
) -> None:
    model = open_clip.create_model(released)
    keys: dict[str, Any] = {"dense": 1.0, "lambda_": 0.0, "probabilities": 1.0, "anchor": {"weights": 1.0}}
    pairs = reinforce.Examples(of_all_terms, teachers=["dino"], patches="dino", classifiers=["colors"])
    own = losses.StudentLoss(pairs, width=16, model=model, **keys)
    model.double()
    batch = torch.utils.data.default_collate([pairs[0], pairs[1]])
    assert {"dino/patches", "colors/probabilities"} <= {*pairs.names}
    features = own.encode_image(torch.rand(2, 3, 32, 32, dtype=torch.float64))
    features |= {kind: model.encode_text(torch.ones(2, 16, dtype=torch.int64)) for kind in pairs.kinds}
    found = own.losses({**features, "map": features["map"].float()}, batch["targets"], 10.0)
    assert {name for name, value in found.items() if value > 0} == {
        "clip/caption", "clip/synthetic", "dense/dino", "probabilities/colors"
    }  # fmt: skip
    assert found["anchor_weights"] == 0
    with pytest.raises(UserError, match=r"loss\.dense\.stage: SimpleNamespace has no map that is known here"):
        losses.StudentLoss(pairs, width=16, model=SimpleNamespace(visual=torch.nn.Linear(2, 2)), dense=1.0)
    fewer = reinforce.Examples(of_all_terms, teachers=["dino"])
    with pytest.raises(UserError, match=r"the loss reads classifiers .*: set classifiers=\['colors'\] of Examples"):
        losses.StudentLoss(fewer, width=16, probabilities=0.3)
    with pytest.raises(UserError, match=r"the loss reads patches .*: set patches=\['dino'\] of Examples"):
        losses.StudentLoss(fewer, width=16, model=model, dense=1.0)
    with pytest.raises(UserError, match="`dense` needs the `map` of the images"):
        own({"image": features["image"]}, batch["targets"], 10.0)


def test_learnt_scales_are_parameters_of_the_module(made: Path) -> None:
    own = losses.StudentLoss(reinforce.Examples(made, captioners=[], teachers=["red"]), learn_scales=True)
    assert [name for name, _ in own.named_parameters()] == ["scales.red.logit_scale"]
    vectors = {"red": {"image": normalize(rows(1), dim=-1), "caption": normalize(rows(2), dim=-1)}}
    features = {"image": rows(3), "caption": rows(4)}
    assert own.losses(features, vectors, 10.0).keys() == {"distill/caption", "scale/red"}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda data: losses.StudentLoss(data, lambda_=2), "lambda_: Input should be less than or equal to 1"),
        (lambda data: losses.StudentLoss(data, lamda=1), "lamda: unknown key; known keys here: lambda"),
        (lambda data: losses.StudentLoss(data, interactive=1.0), "set `width` to their dimension"),
        (lambda data: losses.StudentLoss(data, anchor={"weights": 1.0}, logit_scales={"blue": 9.0}),
         "anchor.weights reads the model that is trained: set `model` to it, .* got none"),
        (lambda data: losses.StudentLoss(data, model=torch.nn.Linear(2, 2), anchor={"weights": 1.0},
                                         logit_scales={"blue": 9.0}), "a model of open_clip, got Linear"),
        (lambda data: SCALED(data).encode_image(rows(0)), "encode_image reads the model that is trained"),
        (lambda data: SCALED(data)({"image": rows(0), "map": rows(0)}, {}, 1.0), "no 'map'; they have: image, "),
        (lambda data: SCALED(data)({"images": rows(0)}, {}, 1.0), "no 'images'; they have: image, caption, synthetic"),
        (lambda data: SCALED(data)(FEATURES, {}, 1.0), "the batch has no 'red'"),
        (lambda data: SCALED(data)(FEATURES, None, 1.0), "the `targets` of a batch"),
        (lambda data: SCALED(data)([rows(0)], {}, 1.0), "want features by what they are of"),
        (lambda data: SCALED(data)({"caption": rows(0)}, {}, 1.0), "have 'image', which is missing: encode it"),
        (lambda data: SCALED(data)({**FEATURES, "image": rows(0, 5)}, {}, 1.0), r"image \[5, 5\], caption \[6, 5\]"),
        (lambda data: SCALED(data)(FEATURES, {"red": {"image": rows(0, 5)}}, 1.0),
         "features have 6 rows, and image of red has 5"),
        (lambda data: SCALED(data)({n: of[:0] for n, of in FEATURES.items()}, {}, 1.0), r"Got image \[0, 5\]"),
        (lambda data: SCALED(data)(FEATURES, {}, rows(0)), "logit_scale: want a number, or a tensor of one"),
        (lambda data: losses.StudentLoss(data, width=7, lambda_=0)(FEATURES, {}, 1.0), "have 5 dimensions, .* is 7"),
        (lambda data: losses.contrastive(rows(0), rows(1, pairs=5), 1.0), r"Got image \[6, 5\], text \[5, 5\]"),
        (lambda data: losses.contrastive(rows(0, 0), rows(1, 0), 1.0), r"contrastive: want .* Got image \[0, 5\]"),
        (lambda data: losses.contrastive(rows(0).numpy(), rows(1), 1.0), r"Got image ndarray, text \[6, 5\]"),
        (lambda data: losses.contrastive(rows(0), rows(1), None), "logit_scale: want a number, .* got None"),
        (lambda data: losses.distillation(rows(0), rows(1), 1.0, [(rows(2, 5), rows(3, 5), 9.0)]),
         r"distillation: .* image of teacher 0 \[5, 5\]"),
        (lambda data: losses.distillation(rows(0), rows(1), 1.0, [(rows(2), rows(3))]), "vectors of texts, logit"),
        (lambda data: losses.probabilities(rows(0), torch.zeros(5, 2).long(), rows(1, 5)[:, :2], torch.zeros(5)),
         r"probabilities: .* Got logits \[6, 5\], classes \[5, 2\]"),
        (lambda data: losses.probabilities(rows(0), torch.full((6, 2), 5), rows(1)[:, :2], torch.zeros(6)),
         "want classes from 0 to 4"),
        (lambda data: losses.probabilities(rows(0), torch.zeros(6, 2).long(), rows(1)[:, :2], torch.zeros(1)),
         r"want rest \[6\]"),
        (lambda data: losses.dense(torch.zeros(0, 2, 2, 3), torch.zeros(0, 2, 2, 3)), r"got \[0, 2, 2, 3\]"),
        (lambda data: losses.distance_from_start({"w": rows(0)}, {"w": rows(0, 1)}), "'w' has another shape in start"),
        (lambda data: losses.distance_from_start({"w": rows(0)}, {}), "start with one weight at least"),
        (lambda data: losses.contrastive(rows(0), rows(1), 1.0, form="sigmoid"), "needs `logit_bias`"),
        (lambda data: losses.contrastive(rows(0), rows(1), 1.0, form="hinge"), "want softmax or sigmoid, got 'hinge'"),
        (lambda data: losses.dense(rows(0), rows(1)), r"dense: want two grids .* got \[6, 5\] and \[6, 5\]"),
        (lambda data: losses.features(rows(0), rows(1, 5)), r"Got projected \[6, 5\], vectors \[5, 5\]"),
        (lambda data: losses.features(rows(0), rows(1), "L2"), "want cosine, l2 or similarities, got 'L2'"),
        (lambda data: losses.interactive(rows(0), rows(1), rows(2), rows(3, 5), 1.0), r"interactive: .* \[5, 5\]"),
        (lambda data: losses.distillation(rows(0), rows(1), 1.0, []), "teachers is empty"),
        (lambda data: losses.distance_from_start({}, {"w": rows(0)}), "weights has no 'w'"),
    ],
)  # fmt: skip
def test_what_a_loss_cannot_be_made_of_is_one_error_with_the_fix(
    made: Path, act: Callable[[reinforce.Examples], Mapping[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        act(reinforce.Examples(made))
