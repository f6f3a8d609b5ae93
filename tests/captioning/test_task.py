from __future__ import annotations

from pathlib import Path

import open_clip
import torch

from reinforce.captioning.model import build_captioner
from reinforce.captioning.task import CaptioningTask
from reinforce.training.step import backpropagate
from teachers.device.accelerator import Accelerator
from tests.helpers.captioning import TEXTS, captioner_config, gradients_of, make_batch, make_captioner


def test_batch_parts_give_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    model = make_captioner(tmp_path)
    task = CaptioningTask(model, model.loss, evaluator=None)  # type: ignore[arg-type]
    batch, accelerator = make_batch(TEXTS), Accelerator("cpu")
    assert len(set(batch["length"])) == 4  # parts differ in their number of tokens
    results = []
    for seeds in ([0], [0, 1]):
        model.zero_grad()
        outcome = backpropagate(task, model, batch, len(TEXTS), seeds, accelerator)
        results.append((outcome.losses, gradients_of(model)))
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name], rtol=1e-5, atol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    model = make_captioner(tmp_path)
    task = CaptioningTask(model, model.loss, evaluator=None)  # type: ignore[arg-type]
    batch = make_batch(TEXTS)
    full, half = (
        backpropagate(task, model, batch, len(TEXTS), [0], Accelerator("cpu", precision)).losses
        for precision in ("fp32", "bf16")
    )
    for name, value in full.items():
        assert half[name].dtype == torch.float32
        assert half[name] != value
        torch.testing.assert_close(half[name], value, rtol=0.03, atol=0.03)


def test_the_exported_folder_loads_with_the_same_weights(tmp_path: Path) -> None:
    model = make_captioner(tmp_path)
    task = CaptioningTask(model, model.loss, evaluator=None)  # type: ignore[arg-type]
    (tmp_path / "export").mkdir()
    task.export(model, f"{tmp_path}/export")
    name = f"local-dir:{tmp_path}/export"
    again = build_captioner(captioner_config(tmp_path, captioner={"model": name}))
    assert again.image == model.image
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    assert open_clip.get_tokenizer(name)("fog").shape == (1, 76)
