"""The dense term: against plain loops, its memory, and trainings with online teachers of patches."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reinforce
from reinforce import settings
from reinforce.dataset.codecs.codebooks import Place, load
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.student.config import DenseLoss, Loss, StudentConfig
from reinforce.student.config import Student as StudentSpec
from reinforce.student.model import build_student
from reinforce.student.teachers import IMAGES, TEXTS, TeacherInfo, stored_models
from reinforce.student.terms import dense
from reinforce.student.terms.base import MAP, TargetModels
from reinforce.student.terms.registry import Terms, make_terms
from reinforce.student.train import StudentTask, build
from teachers.image_encoder import features_and_map
from teachers.pixels import to_pixels
from teachers.runtime.accelerator import Accelerator
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.reinforced import reinforce_here, small_dataset
from tests.helpers.students import batch, first_batch, losses_of, student_config, student_folder
from tests.helpers.trainings import curve

TEACHER = {"class": "tests.helpers.models.patches:Cells", "options": {"rows": 4, "columns": 4, "channels": 5}}
BLIND = {"class": "tests.helpers.models:ColorTeacher"}
MODELS = TargetModels(
    {"dino": TeacherInfo(5, frozenset([IMAGES]), None, "")},
    entries=lambda section, names: {"dino": {"grid": [3, 5], "dim": 6}} if section == "patches" else {},
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(term: dense.Dense, found: torch.Tensor, target: torch.Tensor, head: torch.nn.Module) -> torch.Tensor:
    [value] = term.losses_of_rows(
        {MAP: found}, {"dino": {"patches": target}}, torch.nn.ModuleDict({"dino/patches": head})
    ).values()
    return value


def by_loops(found: np.ndarray, target: np.ndarray, cosine: float, smooth_l1: float) -> float:
    """The definition, patch by patch, of projected maps at the teacher's grid."""
    total = 0.0
    for one, other in zip(found.reshape(-1, found.shape[-1]), target.reshape(-1, target.shape[-1]), strict=True):
        away = 1 - float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))
        apart = [abs(float(difference)) for difference in one - other]
        total += cosine * away + smooth_l1 * sum(x * x / 2 if x < 1 else x - 0.5 for x in apart) / len(apart)
    return total / (found.size / found.shape[-1])


@pytest.mark.parametrize("grid", [(3, 4), (5, 7), (2, 2)])
def test_the_loss_is_that_of_its_definition(grid: tuple[int, int]) -> None:
    term = dense.Dense(DenseLoss(weight=2.0), {"dino": (*grid, 6)})
    found, target, head = random(5, 8, 3, 4), 3 * random(5, *grid, 6, seed=1), torch.nn.Linear(8, 6)
    projected = torch.einsum("nchw,dc->ndhw", found, head.weight) + head.bias[:, None, None]
    smaller = grid[0] < 3 or grid[1] < 4
    at_grid = torch.nn.functional.interpolate(projected, grid, mode="bilinear", antialias=smaller)
    expected = by_loops(at_grid.permute(0, 2, 3, 1).detach().numpy(), target.numpy(), 0.9, 0.1)
    assert loss_of(term, found, target, head).item() == pytest.approx(2 * expected, rel=1e-4)
    assert loss_of(term, found, target.half(), head).item() == pytest.approx(2 * expected, rel=1e-2)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    term = dense.Dense(DenseLoss(weight=1.0), {"dino": (6, 6, 5)})
    target, head = random(7, 6, 6, 5, seed=1), torch.nn.Linear(8, 5)
    results = []
    for chunk in (dense.CHUNK, 2 * 6 * 6 * 5, 1):
        monkeypatch.setattr(dense, "CHUNK", chunk)
        found = random(7, 8, 3, 3).requires_grad_()
        value = loss_of(term, found, target, head)
        results.append((value.detach(), *torch.autograd.grad(value, [found, *head.parameters()])))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def peak_bytes(run: Any) -> int:
    """The most bytes of tensors that are alive during a call, beside those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    peak = alive = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def test_a_batch_of_256_needs_less_than_a_gigabyte() -> None:
    """Also with the map and the target, of which the gradient of the map and chunks remain beside them."""
    term = dense.Dense(DenseLoss(weight=1.0), {"dino": (14, 14, 768)})
    target, head = torch.zeros(256, 14, 14, 768, dtype=torch.float16), torch.nn.Linear(384, 768)
    target[:] = random(768)
    found = random(256, 384, 14, 14).requires_grad_()
    given = found.nbytes + target.nbytes
    assert found.nbytes < peak_bytes(lambda: loss_of(term, found, target, head).backward()) < 10**9 - given


@pytest.mark.parametrize(("kind", "stage"), [("vit", -1), ("vit", 0), ("mobileclip", -1), ("mobileclip", 1)])
def test_a_student_learns_from_the_map_of_any_stage(tmp_path: Path, kind: str, stage: int) -> None:
    loss = settings.parse(Loss, {"lambda": 0.0, "dense": {"weight": 1.0, "stage": stage}})
    terms = make_terms(loss, MODELS)
    name = student_folder(tmp_path, kind)
    student = build_student(StudentSpec(model=name), seed=0, terms=terms)
    plain = build_student(StudentSpec(model=name), seed=0)
    made = batch(student.image.height)
    target = random(4, 3, 5, 6, seed=2)
    made["targets"] = {"dino": {"patches": target}}
    student.eval()
    encoded = student(made)
    assert encoded.features.keys() == {"image", "caption", "synthetic"}
    with torch.no_grad():
        torch.testing.assert_close(encoded.features["image"], plain.eval()(made).features["image"])
        pixels = to_pixels(made["image"], student.image)
        _, found = features_and_map(student.clip.visual, pixels, stage)
        projected = student.heads["dino/patches"](found.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        smaller = found.shape[2] > 3 or found.shape[3] > 5
        at_grid = torch.nn.functional.interpolate(projected, (3, 5), mode="bilinear", antialias=smaller)
    expected = by_loops(at_grid.permute(0, 2, 3, 1).numpy(), target.numpy(), 0.9, 0.1)
    assert encoded.losses["dense/dino"].item() == pytest.approx(expected, rel=1e-3)
    encoded.losses["dense/dino"].backward()
    first = next(student.clip.visual.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


def test_other_heads_start_as_without_the_term(tmp_path: Path) -> None:
    name = student_folder(tmp_path, "mobileclip")
    made = []
    for extra in ({}, {"dense": 1.0}):
        terms = make_terms(settings.parse(Loss, {"lambda": 0.5, "features": "all", **extra}), MODELS)
        student = build_student(StudentSpec(model=name), seed=0, terms=terms)
        made.append({key: value for key, value in student.state_dict().items() if "patches" not in key})
    for key, value in made[0].items():
        assert torch.equal(value, made[1][key]), key


def test_models_without_patches_are_refused(tmp_path: Path, dataset: str) -> None:
    plain = TargetModels({"vit": TeacherInfo(8, frozenset([IMAGES, TEXTS]), 70.0, "")})
    for loss, message in (
        ({"dense": 1.0}, r"loss\.dense needs layers patches/TEACHER, and the datasets have none"),
        ({"dense": 1.0, "teachers": {"blind": BLIND}}, r"none of `loss\.teachers` has patches"),
        ({"dense": {"weight": 1.0, "teachers": ["vit"]}}, r"teacher vit has no patches; those with patches are: none"),
        ({"dense": {"weight": 1.0, "cosine": 1.1}}, r"dense\.cosine: .* less than or equal to 1"),
    ):
        with pytest.raises(UserError, match=message):
            make_terms(settings.parse(Loss, loss), plain)
    terms = Terms([dense.Dense(DenseLoss(weight=1.0, stage=9), {"dino": (3, 5, 6)}, stage=9)])
    with pytest.raises(UserError, match=r"loss\.dense\.stage: CLIP, stage 9 gives no patches for images of 32 x 32"):
        build_student(StudentSpec(model=student_folder(tmp_path)), seed=0, terms=terms)
    named = {"lambda": 0.0, "dense": {"weight": 1.0, "teachers": ["blind"]}}
    with pytest.raises(UserError, match=r"loss\.dense: teacher blind: ColorTeacher has no patches: add a method"):
        StudentTask(online(tmp_path, dataset, named, {"blind": BLIND}))


def online(tmp_path: Path, dataset: str, loss: dict[str, Any], teachers: Any, **sections: Any) -> StudentConfig:
    loss = {"teachers": teachers, **loss}
    return student_config(tmp_path, dataset, "mobileclip", loss=loss, **sections)


def test_patches_alone_train_the_image_tower_without_vectors(tmp_path: Path, dataset: str) -> None:
    config = online(
        tmp_path, dataset, {"lambda": 0.0, "dense": 1.0}, {"cells": TEACHER}, data={"captions": "none"},
        train={"steps": 12, "batch": 8, "optimizer": {"lr": 0.01, "warmup": 0}},
    )  # fmt: skip
    task, feed = build(config, Accelerator("cpu"))
    made = next(iter(feed.batches(0, 1, 8, 0)))
    crops = made["crops"]["cells"]
    prepared = task.prepare(made)
    assert {name: {*of} for name, of in prepared["targets"].items()} == {"cells": {"patches"}}
    side = crops.shape[1] // 4
    corner = (crops[:, :side, -side:].float() / 255 * 2 - 1).mean((1, 2))
    torch.testing.assert_close(prepared["targets"]["cells"]["patches"][:, 0, 3, :3], corner, rtol=0, atol=0.02)
    assert "teacher cells: 4 x 4 patches of 5 dimensions" in task.notes
    trained = reinforce.train(config)
    losses = curve(Path(trained.output))
    assert losses[-1] < 0.8 * losses[0]


def test_patches_are_learnt_beside_the_other_losses(tmp_path: Path, dataset: str) -> None:
    teachers = {"cells": {**TEACHER, "logit_scale": 40.0}, "blind": {**BLIND, "logit_scale": 40.0}}
    loss = {"lambda": 0.5, "dense": 0.5, "features": "all"}
    task, prepared = first_batch(online(tmp_path, dataset, loss, teachers))
    assert {name: {*of} for name, of in prepared["targets"].items()} == {
        "cells": {"image", "caption", "synthetic", "patches"},
        "blind": {"image", "caption", "synthetic"},
    }
    assert losses_of(task, prepared).keys() == {
        f"{term}/{kind}" for term in ("clip", "distill", "features") for kind in ("caption", "synthetic")
    } | {"dense/cells", "features/image"}
    [note] = [note for note in task.notes if note.startswith("teacher cells: similarities, logit scale 40 (config")]
    assert note.endswith("; 4 x 4 patches of 5 dimensions")


def test_without_names_online_patches_are_of_the_teachers_whose_patches_a_run_stores(
    tmp_path: Path, dataset: str
) -> None:
    stated = {**TEACHER, "patches": {"grid": 4, "codec": "float16"}}
    teachers: dict[str, Any] = {"cells": stated, "others": TEACHER}
    url = small_dataset(tmp_path, (24,), teachers=teachers, captioners={}, augmentations={"count": 2, "size": 32})

    def terms(loss: dict[str, Any], folder: str) -> set[str]:
        config = student_config(tmp_path / folder, url, "mobileclip", loss={"lambda": 0.0, "dense": 1.0, **loss})
        task, prepared = first_batch(config)
        return {name for name in losses_of(task, prepared) if name.startswith("dense/")}

    for targets, in_loop in (("stored", {}), ("online", teachers)):
        found = terms({"teachers": in_loop}, targets)
        assert found == {"dense/cells"}, f"{targets}: `others` has a map, and its patches are not stored"
    several = {"teachers": {"cells": TEACHER, "others": TEACHER}}
    with pytest.raises(UserError, match=r"loss\.dense: teachers cells and others have patches\. Name those"):
        terms(several, "several")


def test_stored_patches_are_read_with_their_crops_and_only_where_they_are_learnt(tmp_path: Path) -> None:
    teachers = {"cells": {**TEACHER, "patches": {"grid": 4, "codec": "float16"}}}
    augmentations = {"count": 2, "size": 32}
    url = small_dataset(tmp_path, (24,), teachers=teachers, captioners={}, augmentations=augmentations)
    codebook = json.loads(Path(url, "dataset.json").read_text())["layers"]["patches/cells"]["codebook"]
    statistics = load(Place(url, "patches/cells", codebook["digest"])).arrays

    def first(**loss: Any) -> Any:
        return first_batch(student_config(tmp_path, url, "mobileclip", loss=loss, data={"captions": "none"}))

    task, prepared = first(**{"lambda": 0.0}, dense={"weight": 1.0})
    found = prepared["targets"]["cells"]["patches"]
    assert (found.shape, found.dtype) == ((8, 4, 4, 5), torch.float16)
    mean, deviation = (torch.from_numpy(statistics[f"{one}_of_channel"][:3]) for one in ("mean", "deviation"))
    images = prepared["image"].float()
    side = images.shape[1] // 4
    values = found[:, 0, 3, :3].float() * deviation + mean
    corner = images[:, :side, -side:].mean((1, 2))
    order = torch.corrcoef(torch.stack([values.flatten(), corner.flatten()]))[0, 1]
    assert order > 0.95, "the corner of the grid is that of the crop that the student sees"
    assert "dense/cells" in losses_of(task, prepared)
    _, without = first(**{"lambda": 0.5})
    assert {*without["targets"]["cells"]} == {"image"}


def test_phi_s_keeps_the_proportions_of_a_teachers_vectors_stored_and_online_alike(tmp_path: Path) -> None:
    cells = {**TEACHER, "options": {**TEACHER["options"], "channels": 3}}
    stated = {"cells": {**cells, "patches": {"grid": 4, "codec": "float16"}}}
    augmentations = {"count": 2, "size": 32}
    url = small_dataset(tmp_path, (24,), teachers=stated, captioners={}, augmentations=augmentations)
    codebook = json.loads(Path(url, "dataset.json").read_text())["layers"]["patches/cells"]["codebook"]
    statistics = load(Place(url, "patches/cells", codebook["digest"])).arrays
    mean, deviation = (torch.from_numpy(statistics[f"{one}_of_channel"]) for one in ("mean", "deviation"))
    balanced = []
    for in_loop in ({}, stated):
        loss = {"lambda": 0.0, "dense": {"weight": 1.0, "balance": "phi-s"}, "teachers": in_loop}
        config = student_config(tmp_path / f"{len(in_loop)}", url, "mobileclip", loss=loss, data={"captions": "none"})
        task, prepared = first_batch(config)
        assert [note for note in task.notes if note.endswith("4 x 4 patches of 3 dimensions, balanced by phi-s")]
        found = prepared["targets"]["cells"]["patches"].float().flatten(0, 2)
        raw = found if in_loop else found * deviation + mean
        balanced.append(task.model.heads["cells/balance-patches"](found))
        scale = torch.pdist(balanced[-1]) / torch.pdist(raw).clamp_min(1e-9)
        far = torch.pdist(raw) > 0.1
        assert far.sum() > 100
        torch.testing.assert_close(scale[far], scale[far].mean().expand(int(far.sum())), rtol=1e-2, atol=0)
        assert 0.5 < balanced[-1].var(dim=0).mean() < 2
        assert deviation.max() > 1.05 * deviation.min(), "otherwise it is `standardise`"
        assert "dense/cells" in losses_of(task, prepared)
    torch.testing.assert_close(balanced[0], balanced[1], rtol=0, atol=0.02)


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset with the patches of a teacher, of another of which some are NaN, and of one without."""
    return write_grids(tmp_path_factory.mktemp("grids"), 0)


def write_grids(folder: Path, number: int, **changes: Any) -> str:
    write_tar(folder / "source" / f"{number}.tar", members_of(number, 16))
    patches = {"grid": 4, "codec": "float16", "sample": 400}
    teacher = {"class": "tests.helpers.models.patches:PatchTeacher", "options": {"size": 16}, "patches": patches}
    broken = {**teacher, "options": {"size": 16, "broken": True}}
    teachers = {"dino": {**teacher, **changes}, "red": BLIND, "broken": broken}
    return reinforce_here(config_of(f"{folder}/source/*.tar", folder / "out", captioners={}, teachers=teachers))


def stored(tmp_path: Path, datasets: Any, loss: dict[str, Any], data: Any = None, **train: Any) -> StudentConfig:
    data = {"datasets": datasets, "captions": "none", **(data or {})}
    train = {"steps": 2, "batch": 8, "optimizer": {"lr": 0.01, "warmup": 0}, **train}
    return student_config(tmp_path, datasets, "mobileclip", loss=loss, data=data, train=train)


def test_rows_with_patches_that_are_not_finite_are_replaced(tmp_path: Path, grids: str) -> None:
    loss = {"lambda": 0.0, "dense": {"weight": 1.0, "teachers": ["broken"]}}
    _, feed = build(stored(tmp_path, grids, loss, {"workers": 1}), Accelerator("cpu"))
    batches = feed.batches(0, 1, 8, 0)
    made = [next(batches) for _ in range(4)]
    batches.close()
    assert all(one["targets"]["broken"]["patches"].isfinite().all() for one in made)
    assert len({key for one in made for key in one["key"]}) < 16


def test_datasets_of_which_one_has_patches_train_together_without_the_term(tmp_path: Path, grids: str) -> None:
    other = write_grids(tmp_path, 5, patches=None)
    data = {"teachers": ["dino", "red"]}
    StudentTask(stored(tmp_path, [grids, other], {"features": "all"}, data))
    message = r"the datasets have different patches: .* has dino, .* has none\. Name the teachers"
    with pytest.raises(UserError, match=message):
        StudentTask(stored(tmp_path, [grids, other], {"lambda": 0.0, "dense": 1.0}, data))
    manifest = read_manifest(Store(grids))
    altered = {**manifest["layers"]["patches/dino"], "codebook": {"digest": "0" * 32, "sample": 400}}
    manifests = {"a": manifest, "b": {**manifest, "layers": {**manifest["layers"], "patches/dino": altered}}}
    with pytest.raises(UserError, match=r"dino has patches with another codebook in b than in a\. Copy the codebooks"):
        stored_models(stored(tmp_path, grids, {}).data, manifests, "patches")
    unfinished = {**manifest, "layers": {**manifest["layers"], "patches/broken": {**altered, "dim": None}}}
    named = partial(stored_models, stored(tmp_path, grids, {}).data, {"a": unfinished}, "patches")
    assert {"dino", "broken"} <= {*named(["dino"])}
    with pytest.raises(UserError, match=r"no dimension of patches/broken\. Finish the run"):
        named()
