"""Batch normalisation of students that start from weights: at a rate of zero they stay what they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import reinforce
from reinforce.errors import UserError
from reinforce.student.config import BatchNorm
from reinforce.student.config import Student as StudentSpec
from reinforce.student.layers import batch_norms
from reinforce.student.model import StudentModel, build_student
from reinforce.training.checkpoints import State, make_adamw
from reinforce.training.config import Optimizer
from tests.helpers.models.tiny_models import MEAN, STD
from tests.helpers.students import batch, student_config, student_folder, train_briefly
from tests.helpers.trainings import gradients_of

#: Image towers, as changes of the ``vision_cfg`` of a tiny student.
TOWERS: dict[str, dict[str, Any]] = {
    "fastvit": {},
    "resnet": {"layers": [1, 1, 1, 1], "width": 16},
    "timm-resnet": {"timm_model_name": "resnet10t", "image_size": 64},
    "timm-norm-with-activation": {"timm_model_name": "tf_efficientnet_lite0", "image_size": 64},
    "timm-convnext": {"timm_model_name": "convnext_atto", "image_size": 64},
    "vit": {},
}
STATED = {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic", "resize_mode": "shortest"}


def published_students() -> list[Any]:
    """Names of the students that are trained by the configs of this repository; large ones are slow."""
    sections = [yaml.safe_load(path.read_text()).get("student") for path in Path("configs").rglob("*.yaml")]
    models = {section["model"] for section in sections if isinstance(section, dict) and "model" in section}
    names = sorted(name for name in models if not name.startswith("local-dir:"))
    return [pytest.param(name, marks=pytest.mark.slow if "-B" in name else ()) for name in names]


def released(model: str, folder: Path, batch_norm: BatchNorm | None = None) -> StudentModel:
    """A student that starts from a file of weights whose statistics are not those of the batches below."""
    folder.mkdir(exist_ok=True)
    file, spec = folder / "weights.safetensors", StudentSpec(model=model)
    if model.startswith("local-dir:"):
        file = Path(model.removeprefix("local-dir:")) / "open_clip_model.safetensors"
    file.unlink(missing_ok=True)
    random = build_student(spec, seed=0)
    generator = torch.Generator().manual_seed(0)
    for norm in batch_norms(random.clip):
        norm.running_mean.normal_(0, 0.05, generator=generator)
        norm.running_var.uniform_(0.8, 1.25, generator=generator)
    save_file({name: value.contiguous().clone() for name, value in random.clip.state_dict().items()}, file)
    keys: dict[str, Any] = {} if file.parent != folder else {"pretrained": str(file), "preprocess": STATED}
    student = build_student(StudentSpec(model=model, batch_norm=batch_norm, **keys), seed=1)
    assert student.pretrained
    return student


def batch_of(student: StudentModel, pairs: int = 4) -> Any:
    return batch(student.image.height, pairs, student.clip.context_length)


def take_steps(student: StudentModel, steps: int = 2, lr: float = 0.0, pairs: int = 4) -> torch.Tensor:
    """Train with all parts of a step that could change weights; returns the last features."""
    config = Optimizer(lr=lr, final_lr=0.0)
    state = State(student, make_adamw(student, config))
    for step in range(steps):
        encoded = student(batch_of(student, pairs))
        features = encoded.features
        logits = encoded.scalars["logit_scale"] * features["image"] @ features["caption"].T
        torch.nn.functional.cross_entropy(logits, torch.arange(pairs)).backward()
        state.update(config.grad_clip_norm, step + 1)
    return torch.cat([features["image"], features["caption"]]).detach()


def tower(folder: Path, name: str) -> str:
    kind = "mobileclip" if name == "fastvit" else "vit"
    return student_folder(folder, kind, vision_cfg=TOWERS[name])


@pytest.mark.parametrize(("name", "how"), [*((name, None) for name in TOWERS), ("fastvit", "merge")])
def test_at_a_rate_of_zero_a_student_stays_equal_and_computes_as_in_eval(
    tmp_path: Path, name: str, how: BatchNorm | None
) -> None:
    model = tower(tmp_path, name)
    student = released(model, tmp_path / "weights", how)
    before = copy.deepcopy(student.state_dict())
    found = take_steps(student)
    assert changed(student, before, "") == []
    student.eval()
    torch.testing.assert_close(found, take_steps(student), rtol=1e-4, atol=1e-5)
    take_steps(student.train(), 1, lr=0.1)
    moving = released(model, tmp_path / "weights", "train")
    norms = len(batch_norms(student.clip))
    assert bool(norms) == (name not in ("vit", "timm-convnext"))
    assert len(changed(student, before, "running")) == 0
    assert bool(changed(student, before, "weight"))
    apart = (found - take_steps(moving)).abs().max()
    assert apart > 1e-3 if norms else apart == 0
    assert len(changed(moving, before, "running")) == 2 * norms


def changed(student: StudentModel, before: dict[str, torch.Tensor], part: str) -> list[str]:
    """Names with this part of the tensors that are not as before."""
    after = student.state_dict().items()
    return [name for name, value in after if part in name and not torch.equal(value, before[name])]


@pytest.mark.parametrize("name", published_students())
def test_at_a_rate_of_zero_a_published_student_stays_equal(tmp_path: Path, name: str) -> None:
    student = released(name, tmp_path)
    before = copy.deepcopy(student.state_dict())
    take_steps(student, 1, pairs=2)
    assert changed(student, before, "") == []


def test_merged_branches_have_the_gradients_of_kept_statistics_and_can_be_rounded_later(tmp_path: Path) -> None:
    model = tower(tmp_path, "fastvit")
    kept, merged = (released(model, tmp_path / "weights", how) for how in ("keep", "merge"))
    assert list(kept.state_dict()) == list(merged.state_dict())
    gradients = []
    for student in (kept, merged):
        encoded = student(batch_of(student))
        (encoded.features["image"] @ encoded.features["caption"].T).logsumexp(1).sum().backward()
        gradients.append(gradients_of(student))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    for student in (kept, merged):
        student.quantize("int8")
    torch.testing.assert_close(take_steps(merged), take_steps(kept), rtol=1e-4, atol=1e-5)


def test_statistics_of_a_random_student_move_and_cannot_be_kept(tmp_path: Path) -> None:
    model = tower(tmp_path, "fastvit")
    student = build_student(StudentSpec(model=model), seed=0)
    assert student.batch_norm == "train"
    before = copy.deepcopy(student.state_dict())
    train_briefly(student)
    assert changed(student, before, "running_mean")
    with pytest.raises(UserError, match=r"student\.batch_norm: .* random weights; set student\.pretrained"):
        build_student(StudentSpec(model=model, batch_norm="keep"), seed=0)
    with pytest.raises(UserError, match=r"batch_norm: .* has no branches that `merge` could merge; set it to keep"):
        released(tower(tmp_path / "vit", "vit"), tmp_path / "weights", "merge")


@pytest.mark.usefixtures("no_pictures")
def test_a_pretrained_student_keeps_its_statistics_and_a_resumed_training_may_not_change_that(
    tmp_path: Path, labelled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    norms = len(batch_norms(released(tower(tmp_path / "student", "fastvit"), tmp_path / "weights").clip))

    def train(output: str, steps: int, **student: Any) -> dict[str, torch.Tensor]:
        train = {"steps": steps, "optimizer": {"warmup": 0, "hold": 9}}
        config = student_config(tmp_path, labelled, "mobileclip", student=student, train=train)
        trained = reinforce.train(config.model_copy(update={"output": str(tmp_path / output)}))
        return load_file(Path(trained.output) / trained.export / "open_clip_model.safetensors")

    moved, kept = train("moved", 4, batch_norm="train"), train("kept", 2)
    assert f"batch_norm: keep: {norms} batch normalisations of the pretrained student" in capsys.readouterr().out
    start = load_file(tmp_path / "student" / "open_clip_model.safetensors")
    statistics = [name for name in start if "running" in name]
    assert all(torch.equal(kept[name], start[name]) for name in statistics)
    assert not any(torch.equal(moved[name], start[name]) for name in statistics)
    assert torch.equal(train("kept", 4)[statistics[0]], start[statistics[0]])

    for output, changed, message in (
        ("moved", "keep", "'train' before, 'keep'"),
        ("kept", "train", "'keep' before, 't"),
    ):
        with pytest.raises(UserError, match=rf"student\.batch_norm: {message}"):
            train(output, 6, batch_norm=changed)
