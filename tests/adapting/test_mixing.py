"""Mixed weights: every tensor by name, integers and statistics included; models that differ are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reinforce.adapting.mixtures import load_mixer, mix
from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.student.model import export
from teachers.spec import ModelSpec
from tests.helpers.students import KINDS, built, student_folder, train_briefly

WEIGHTS = "open_clip_model.safetensors"


def two_students(folder: Path, kind: str = "mobileclip", **changes: Any) -> dict[str, ModelSpec]:
    """A student and the one that it becomes by some steps -> specs by name."""
    specs = {}
    for name in ("released", "tuned"):
        student = built(student_folder(folder / f"architecture-{name}", kind, **(changes if name == "tuned" else {})))
        if name == "tuned":
            train_briefly(student)
        export(student, str(folder / name))
        specs[name] = ModelSpec(model=f"local-dir:{folder / name}")
    return specs


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_the_weighted_mean_and_the_ends_are_equal_bit_for_bit(tmp_path: Path, kind: str) -> None:
    specs = two_students(tmp_path, kind)
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in specs)
    mixer = load_mixer(specs)
    for share in (0.0, 0.25, 1.0):
        mixer.use({"released": 1 - share, "tuned": share})
        mixer.write(Storage(str(tmp_path / f"mixed-{share}")))
        mixed = load_file(tmp_path / f"mixed-{share}" / WEIGHTS)
        assert mixed.keys() == first.keys()
        for name, tensor in mixed.items():
            if share in (0, 1):
                assert torch.equal(tensor, (first, second)[int(share)][name]), name
            elif tensor.is_floating_point():
                torch.testing.assert_close(tensor, torch.lerp(first[name], second[name], share))
            else:
                assert torch.equal(tensor, torch.maximum(first[name], second[name])), name
    moved = [name for name in first if not torch.equal(first[name], second[name])]
    assert any("running_var" in name for name in moved) == (kind == "mobileclip")


def test_a_mean_of_equal_weights_is_the_same_weights() -> None:
    state = {"weight": torch.randn(5, generator=torch.Generator().manual_seed(0)), "count": torch.tensor(3)}
    mixed = mix([state] * 3, [1 / 3] * 3)
    torch.testing.assert_close(mixed["weight"], state["weight"])
    assert mixed["count"] == 3


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"embed_dim": 24}, "is \\(.*\\) in one and \\(.*\\) in the other"),
        ({"quick_gelu": True}, "quick_gelu is absent in one and True in the other"),
        ({"text_cfg": {"layers": 1}}, "absent in the other"),
    ],
)
def test_models_of_other_architectures_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=f"released and tuned cannot be mixed: .*{fault}"):
        load_mixer(two_students(tmp_path, "vit", **changes))


def test_starting_values_and_rates_of_dropout_may_differ(tmp_path: Path) -> None:
    assert load_mixer(two_students(tmp_path, "vit", init_logit_scale=2.0, vision_cfg={"patch_dropout": 0.5}))


def test_other_preprocessing_and_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    specs = two_students(tmp_path, "vit")
    config = tmp_path / "tuned" / "open_clip_config.json"
    changed = json.loads(config.read_text())
    changed["preprocess_cfg"]["mean"] = [0.1, 0.2, 0.3]
    config.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="their images differ"):
        load_mixer(specs)
    state = load_file(tmp_path / "released" / WEIGHTS)
    state["logit_scale"].fill_(float("nan"))
    save_file(state, tmp_path / "released" / WEIGHTS)
    with pytest.raises(UserError, match="logit_scale is not finite"):
        load_mixer({"released": specs["released"]})
