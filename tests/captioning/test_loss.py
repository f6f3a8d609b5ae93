"""CoCa's losses, compared with open_clip's, and over two ranks in separate processes."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.functional import cross_entropy

from reinforce.captioning.model import CaptionerModel
from reinforce.training.task import Batch
from teachers.preprocessing.pixels import to_pixels
from tests.helpers.caption_ranks import RANKS, compute, run_rank
from tests.helpers.captioning import TEXTS, gradients_of, make_batch, make_captioner, task_losses

#: The tokenizer encodes "&!;" as the tokens 5, 0 and 282: open_clip's padding is also a word.
WITH_ZERO = "a sign that says &!;"


def open_clip_losses(model: CaptionerModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Losses by open_clip's forward pass and CoCaLoss."""
    outputs = model.coca(to_pixels(batch["image"], model.image), batch["caption"])
    loss = open_clip.loss.CoCaLoss(caption_loss_weight=2, clip_loss_weight=1, pad_id=0)
    losses: dict[str, torch.Tensor] = loss(**outputs, output_dict=True)
    return losses


def test_losses_and_gradients_equal_those_of_open_clip(tmp_path: Path) -> None:
    model = make_captioner(tmp_path)
    batch = make_batch(TEXTS)
    ours = task_losses(model, batch, model.loss)
    sum(ours.values()).backward()  # type: ignore[union-attr]
    our_gradients = gradients_of(model)
    model.zero_grad()
    reference = open_clip_losses(model, batch)
    sum(reference.values()).backward()  # type: ignore[union-attr]
    reference_gradients = gradients_of(model)

    torch.testing.assert_close(ours["contrastive"], reference["contrastive_loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["caption"], reference["caption_loss"], rtol=1e-5, atol=1e-5)
    assert our_gradients.keys() == reference_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, reference_gradients[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_word_with_the_token_of_the_padding_counts(tmp_path: Path) -> None:
    model = make_captioner(tmp_path)
    batch = make_batch([WITH_ZERO, "two dogs"])
    assert 0 in batch["caption"][0, 1 : batch["length"][0]]
    with torch.no_grad():
        ours = task_losses(model, batch, model.loss)["caption"]
        logits = model.coca(to_pixels(batch["image"], model.image), batch["caption"])["logits"]
        token_by_token = [
            cross_entropy(logits[row, position], batch["caption"][row, position + 1])
            for row in range(2)
            for position in range(batch["length"][row])
        ]
        torch.testing.assert_close(ours, 2 * torch.stack(token_by_token).mean(), rtol=1e-5, atol=1e-5)
        assert abs(float(ours - open_clip_losses(model, batch)["caption_loss"])) > 1e-3  # which ignores the word


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", ["contrastive", "caption"])
def test_the_mean_over_ranks_is_the_loss_of_the_global_batch(name: str, by_rank: list[dict[str, torch.Tensor]]) -> None:
    parts = torch.stack([results[name] for results in by_rank])
    torch.testing.assert_close(parts.mean(), compute(slice(None))[name])
    assert parts[0] != parts[1]


@pytest.mark.parametrize("name", ["of image", "of text", "of nll"])
def test_gradients_averaged_over_ranks_are_those_of_the_global_batch(
    name: str, by_rank: list[dict[str, torch.Tensor]]
) -> None:
    parts = torch.cat([results[name] for results in by_rank])
    torch.testing.assert_close(parts / RANKS, compute(slice(None))[name])
