"""Two ranks, in processes of their own, come to the losses and the gradients of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from reinforce.captioning.config import Loss
from reinforce.captioning.loss import captioning_losses

RANKS, PAIRS = 2, 3  # pairs of a rank
LENGTHS = [2, 3, 4, 30, 40, 50]  # the ranks' captions differ in length


def computed(rows: slice) -> dict[str, torch.Tensor]:
    """Losses, and gradients by feature, for some rows of the batch."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"image": (RANKS * PAIRS, 5), "text": (RANKS * PAIRS, 5), "nll": (RANKS * PAIRS,)}
    whole = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    features = {name: value[rows].clone().requires_grad_() for name, value in whole.items()}
    losses = captioning_losses(Loss(), features, torch.tensor(10.0), LENGTHS[rows])
    torch.stack(list(losses.values())).sum().backward()
    gradients = {f"of {name}": value.grad for name, value in features.items() if value.grad is not None}
    return {name: value.detach() for name, value in losses.items()} | gradients


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.save(computed(slice(rank * PAIRS, (rank + 1) * PAIRS)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", ["contrastive", "caption"])
def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(name: str, of_ranks: list[dict[str, torch.Tensor]]) -> None:
    parts = torch.stack([results[name] for results in of_ranks])
    torch.testing.assert_close(parts.mean(), computed(slice(None))[name])
    assert parts[0] != parts[1]


@pytest.mark.parametrize("name", ["of image", "of text", "of nll"])
def test_gradients_averaged_over_ranks_are_those_of_the_whole_batch(
    name: str, of_ranks: list[dict[str, torch.Tensor]]
) -> None:
    parts = torch.cat([results[name] for results in of_ranks])
    torch.testing.assert_close(parts / RANKS, computed(slice(None))[name])
