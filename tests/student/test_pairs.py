"""The loss compared with its equations in numpy and with open_clip, its properties, and that of two ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reinforce.student.teachers import IMAGES, TEXTS, TeacherInfo
from reinforce.student.terms import pairs as chunks
from reinforce.student.terms.base import Rows
from reinforce.student.terms.interactive import Interactive
from reinforce.student.terms.pairs import Objective, contrastive_losses, scale_losses
from tests.helpers.ranks import results_of_ranks

KINDS = {"both": ("caption", "synthetic"), "mixed": ("caption",)}
SCALES = {"one": 70.0, "two": 60.0, "three": 33.0}
DIMS = {"student": 12, "one": 8, "two": 5, "three": 9}
SCALES_OF_TWO = {"one": 7.0, "two": 6.0}
PAIRS = 7


def unit(rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    values = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1).to(dtype)


def vectors(name: str, captions: str = "both", pairs: int = PAIRS) -> dict[str, torch.Tensor]:
    seeds = itertools.count(10 * list(DIMS).index(name))
    return {what: unit(pairs, DIMS[name], next(seeds)) for what in ("image", *KINDS[captions])}


def reference(features, scale, bias, teachers, scales, biases, share, form, weights=None):  # type: ignore[no-untyped-def]
    """L of reinforce/student/terms/pairs.py, in numpy and float64."""

    def softmax(logits):  # type: ignore[no-untyped-def]
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def probabilities(v, kind, s, b):  # type: ignore[no-untyped-def]
        logits = s * v["image"] @ v[kind].T
        if form == "softmax":
            return [softmax(logits), softmax(logits.T)]
        if b is None:
            rows = [np.log(np.exp(np.delete(row, i)).sum()) for i, row in enumerate(logits)]
            b = -np.mean(rows)
        return [1 / (1 + np.exp(-logits - b))]

    def loss(wanted, answers):  # type: ignore[no-untyped-def]
        terms = [
            p * np.log(q) + (form == "sigmoid") * (1 - p) * np.log1p(-q) for p, q in zip(wanted, answers, strict=True)
        ]
        return -np.mean([term.sum() / len(term) for term in terms])

    total = 0.0
    for kind in [what for what in features if what != "image"]:
        answers = probabilities(features, kind, scale, bias)
        identity = [np.eye(len(answers[0]))] * len(answers)
        each = [probabilities(v, kind, scales[t], biases.get(t)) for t, v in teachers.items()]
        of_teachers = [(weights or {}).get(name, 1.0) for name in teachers] if weights != "confidence" else None
        ensemble = [
            np.average(ps, axis=0, weights=of_teachers)
            if of_teachers is not None
            else np.stack([sum(p[i, i] * p[i] for p in ps) / sum(p[i, i] for p in ps) for i in range(len(ps[0]))])
            for ps in zip(*each, strict=True)
        ]
        total += (1 - share) * loss(identity, answers) + (share * loss(ensemble, answers) if share else 0.0)
    return total


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("teachers", [["one"], ["one", "two", "three"]])
@pytest.mark.parametrize("captions", ["both", "mixed"])
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_the_loss_equals_its_equation_in_chunks_of_rows_too(
    form: str, captions: str, teachers: list[str], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = vectors("student", captions)
    targets = {name: vectors(name, captions) for name in teachers}
    scales = {name: SCALES[name] for name in teachers}
    biases = {"two": -9.0} if form == "sigmoid" and "two" in teachers else {}
    scale, bias = torch.tensor(20.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    objective = Objective(share, form, scales, biases)  # type: ignore[arg-type]
    arrays = {name: {what: value.numpy() for what, value in of.items()} for name, of in targets.items()}
    expected = reference(
        {what: value.numpy() for what, value in features.items()}, 20.0, -3.0, arrays, scales, biases, share, form
    )
    terms = {0.0: {"clip"}, 1.0: {"distill"}}.get(share, {"clip", "distill"})
    for rows in (PAIRS, 2):
        monkeypatch.setattr(chunks, "CHUNK", rows * PAIRS)
        losses = contrastive_losses(objective, features, scale, bias, targets)
        assert sum(losses.values()).item() == pytest.approx(expected, rel=1e-12)
        assert set(losses) == {f"{term}/{kind}" for term in terms for kind in KINDS[captions]}


@pytest.mark.parametrize("weights", [{"one": 2.0, "three": 0.5}, "confidence"])
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_teachers_count_by_their_weights_or_in_each_row_by_their_confidence(
    form: str, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, targets = vectors("student"), {name: vectors(name) for name in SCALES}
    scales = {name: scale / 10 for name, scale in SCALES.items()}
    arrays = {name: {what: value.numpy() for what, value in of.items()} for name, of in targets.items()}
    expected = reference(
        {what: value.numpy() for what, value in features.items()}, 20.0, -3.0, arrays, scales, {}, 0.7, form, weights
    )
    scale, bias = torch.tensor(20.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    for rows in (PAIRS, 2):
        monkeypatch.setattr(chunks, "CHUNK", rows * PAIRS)
        objective = Objective(0.7, form, scales, {}, weights)  # type: ignore[arg-type]
        losses = contrastive_losses(objective, features, scale, bias, targets)
        assert sum(losses.values()).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_equal_weights_and_pairs_of_which_no_teacher_is_sure_are_the_plain_mean(form: Any) -> None:
    features, targets = vectors("student"), {name: vectors(name) for name in ("one", "two")}
    scale, bias = torch.tensor(20.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)

    def losses(of: Mapping[str, Mapping[str, torch.Tensor]], weights: Any, scales: Mapping[str, float]) -> Any:
        return contrastive_losses(Objective(0.7, form, scales, {}, weights), features, scale, bias, of)

    plain = losses(targets, {}, SCALES_OF_TWO)
    for weights in ({"one": 3.0, "two": 3.0}, {"one": 1.0}):
        assert losses(targets, weights, SCALES_OF_TWO) == plain, "to the bit"
    # each text lies opposite its image: the true pair has a probability below 1e-12
    opposite = {
        name: {what: v if what == "image" else -of["image"] for what, v in of.items()} for name, of in targets.items()
    }
    plain = losses(opposite, {}, {"one": 99.0, "two": 99.0})
    found = losses(opposite, "confidence", {"one": 99.0, "two": 99.0})
    for name, loss in found.items():
        torch.testing.assert_close(loss, plain[name])


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_gradients_reach_features_and_scalars(form: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    features = vectors("student", pairs=4)
    targets = {name: vectors(name, pairs=4) for name in ("one", "two")}
    objective = Objective(share, form, {"one": 9.0, "two": 4.0})  # type: ignore[arg-type]

    def loss(scale: torch.Tensor, bias: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            list(contrastive_losses(objective, dict(zip(features, rows, strict=True)), scale, bias, targets).values())
        ).sum()

    inputs = [torch.tensor(5.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64), *features.values()]
    for rows in (4, 3):  # one chunk, or two
        monkeypatch.setattr(chunks, "CHUNK", rows * 4)
        assert torch.autograd.gradcheck(loss, [value.requires_grad_() for value in inputs], check_undefined_grad=False)
    gradients = torch.autograd.grad(loss(*inputs), inputs, allow_unused=True)
    used = [gradient is not None and bool(gradient.abs().max() > 0) for gradient in gradients]
    assert used == [True, form == "sigmoid", True, True, True]


def test_it_equals_open_clips_losses_with_and_without_a_teacher() -> None:
    import open_clip  # not by the ranks below

    student, teacher = vectors("student", "mixed"), vectors("one", "mixed")
    scale, bias = torch.tensor(25.0, dtype=torch.float64), torch.tensor(-7.0, dtype=torch.float64)
    theirs = open_clip.loss.DistillClipLoss()(
        student["image"], student["caption"], scale, teacher["image"], teacher["caption"], 70.0, output_dict=True
    )
    for share in (0.0, 0.4, 1.0):
        expected = (1 - share) * theirs["contrastive_loss"] + share * theirs["distill_loss"]
        losses = contrastive_losses(Objective(share, "softmax", {"one": 70.0}), student, scale, None, {"one": teacher})
        torch.testing.assert_close(sum(losses.values()), expected)
    siglip = contrastive_losses(Objective(0.0, "sigmoid"), student, scale, bias, {})["clip/caption"]
    torch.testing.assert_close(siglip, open_clip.loss.SigLipLoss()(student["image"], student["caption"], scale, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_the_largest_scales_in_half_precision_stay_finite(form: str, dtype: torch.dtype) -> None:
    same = unit(1, 16, 0, dtype).expand(6, -1)
    features = {"image": same.clone().requires_grad_(), "caption": (-same).clone().requires_grad_()}
    targets = {"one": {"image": same, "caption": unit(6, 16, 1, dtype)}, "two": {"image": same, "caption": same}}
    scale, bias = torch.tensor(100.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    objective = Objective(0.5, form, {"one": 100.0, "two": 100.0})  # type: ignore[arg-type]
    total = torch.stack([*contrastive_losses(objective, features, scale, bias, targets).values()]).sum()
    total.backward()
    assert total.dtype == torch.float32
    gradients = [value.grad for value in (*features.values(), scale)]
    assert all(value is not None and value.isfinite().all() for value in (total, *gradients))


def test_half_precision_features_are_multiplied_in_float32() -> None:
    features = {what: value.half() for what, value in vectors("student").items()}
    scale = torch.tensor(100.0)
    half = contrastive_losses(Objective(0.0), features, scale, None, {})
    exact = {what: value.double() for what, value in features.items()}
    full = contrastive_losses(Objective(0.0), exact, scale, None, {})
    for name, value in half.items():
        assert value.item() == pytest.approx(full[name].item(), abs=1e-5)


def test_the_implied_bias_reproduces_the_softmax_of_similar_rows() -> None:
    # Every row of a circulant has the same entries, so that one constant is exact for all.
    row = torch.tensor([31.0, 22.0, 26.5, 12.0, 29.0], dtype=torch.float64)
    logits = torch.stack([row.roll(shift) for shift in range(5)])
    bias = implied_bias(logits)
    torch.testing.assert_close((logits + bias).sigmoid().diagonal(), logits.softmax(dim=1).diagonal())
    for size in (9, 65):
        assert implied_bias(torch.zeros(size, size)).item() == pytest.approx(-math.log(size - 1)), "the other samples"


def implied_bias(logits: torch.Tensor) -> torch.Tensor:
    """The bias of a teacher with these logits."""
    return -chunks.Logits(logits, torch.eye(len(logits), dtype=logits.dtype), 1.0, None, 0).mean_of_others()


def test_a_learnt_scale_has_the_mean_of_the_contrastive_losses_of_its_teacher() -> None:
    """With a gradient of the scale; its minimum is where the true pairs are most likely."""
    targets = {"one": vectors("one"), "two": vectors("two")}
    scales = {"one": torch.tensor(9.0, requires_grad=True), "two": torch.tensor(5.0)}
    found = scale_losses(scales, targets)
    assert found.keys() == {"scale/one", "scale/two"}
    for name, of_teacher in targets.items():
        kinds = contrastive_losses(Objective(0.0), of_teacher, scales[name], None, {}).values()
        torch.testing.assert_close(found[f"scale/{name}"], torch.stack([*kinds]).mean())
    assert torch.autograd.grad(found["scale/one"], scales["one"])[0] != 0


KINDS_AND_IMAGE = ("image", *KINDS["both"])


class RoundedProducts(TorchDispatchMode):
    """Rounds what float32 matrix products multiply to 10 bits of mantissa, as TF32 does on CUDA."""

    _dropped = 23 - 10

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        factors = {"mm": 0, "addmm_": 1}.get(func._schema.name.removeprefix("aten::"))
        if factors is not None:
            args = (
                *args[:factors],
                *(self._round(value) for value in args[factors : factors + 2]),
                *args[factors + 2 :],
            )
        return func(*args, **(kwargs or {}))

    def _round(self, values: torch.Tensor) -> torch.Tensor:
        bits = values.contiguous().view(torch.int32)
        even = (1 << (self._dropped - 1)) - 1 + ((bits >> self._dropped) & 1)
        return ((bits + even) & -(1 << self._dropped)).view(torch.float32)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_tf32_changes_gradients_by_a_fifth_of_what_one_rounding_to_bf16_does_at_most(share: float) -> None:
    """Autocast rounds the features, after it has rounded everything before them."""
    pairs = 96
    shared = unit(pairs, 64, 0, torch.float32)

    def tower(dim: int, seed: int, noise: float) -> dict[str, torch.Tensor]:
        own = torch.nn.functional.normalize(shared @ unit(64, dim, seed, torch.float32), dim=1)
        made = {kind: own + noise * unit(pairs, dim, seed + i, torch.float32) for i, kind in enumerate(KINDS_AND_IMAGE)}
        return {kind: torch.nn.functional.normalize(value, dim=1) for kind, value in made.items()}

    features, targets = tower(512, 10, 2.0), {"one": tower(768, 20, 1.5), "two": tower(768, 30, 1.5)}
    objective = Objective(share, "softmax", {"one": 70.0, "two": 60.0})

    def gradient(features: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {kind: value.clone().requires_grad_() for kind, value in features.items()}
        losses = contrastive_losses(objective, inputs, torch.tensor(20.0), None, targets, reduced=True)
        found = torch.autograd.grad(torch.stack([*losses.values()]).sum(), [*inputs.values()])
        return torch.cat([value.flatten() for value in found])

    exact = gradient(features)
    with RoundedProducts():
        in_tf32 = gradient(features)
    rounded = gradient({kind: value.bfloat16().float() for kind, value in features.items()})
    assert 0 < (in_tf32 - exact).norm() < 0.2 * (rounded - exact).norm() < 0.2 * 0.01 * exact.norm()


RANKS, OF_RANK = 2, 3  # pairs
CASES: dict[str, Objective | None] = {
    f"{form}, lambda {share}": Objective(
        share, form, {"one": 30.0, "two": 55.0}, {"two": -12.0} if form == "sigmoid" else {}
    )
    for form, share in itertools.product(("softmax", "sigmoid"), (0.0, 0.4, 1.0))
} | {"interactive": None}


def computed(objective: Objective | None, rows: slice) -> dict[str, torch.Tensor]:
    """Loss and gradients by name for some rows of the batch."""
    features = {
        what: unit(RANKS * OF_RANK, 6, i)[rows].clone().requires_grad_() for i, what in enumerate(KINDS_AND_IMAGE)
    }
    targets = {
        teacher: {what: unit(RANKS * OF_RANK, dim, 10 * dim + i)[rows] for i, what in enumerate(KINDS_AND_IMAGE)}
        for teacher, dim in (("one", 4), ("two", 5))
    }
    scalars = {
        "scale": torch.tensor(math.log(15.0), dtype=torch.float64, requires_grad=True),
        "bias": torch.tensor(-2.0, dtype=torch.float64, requires_grad=True),
    }
    if objective is None:
        both = frozenset([IMAGES, TEXTS])
        term = Interactive(0.7, {"one": TeacherInfo(4, both, None, ""), "two": TeacherInfo(5, both, None, "")})
        heads = {"one": unit(6, 4, 1), "two": unit(6, 5, 2)}
        projected = {f"{name}/{what}": x @ head for name, head in heads.items() for what, x in features.items()}
        losses = term.losses(Rows({**features, **projected}, {"logit_scale": scalars["scale"].exp()}, targets))
    else:
        losses = contrastive_losses(objective, features, scalars["scale"].exp(), scalars["bias"], targets)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    gradients = {name: value.grad for name, value in {**features, **scalars}.items() if value.grad is not None}
    return {"loss": total.detach(), **gradients}


def of_rank(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    chunks.CHUNK = 2 * RANKS * OF_RANK  # chunks of two rows
    rows = slice(rank * OF_RANK, (rank + 1) * OF_RANK)
    return {name: computed(objective, rows) for name, objective in CASES.items()}


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    return results_of_ranks(of_rank, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(
    case: str, of_ranks: list[dict[str, dict[str, torch.Tensor]]]
) -> None:
    whole = computed(CASES[case], slice(None))
    parts = [results[case] for results in of_ranks]
    assert all(part.keys() == whole.keys() for part in parts)
    for name, expected in whole.items():
        if name in KINDS_AND_IMAGE:  # each rank's own rows; averaging over ranks divides their gradients
            found = torch.cat([part[name] for part in parts]) / RANKS
        else:
            found = torch.stack([part[name] for part in parts]).mean(dim=0)
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
