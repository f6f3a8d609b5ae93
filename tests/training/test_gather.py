"""Rows of all ranks, gathered with gradients. Two ranks of the whole loss are in tests/student/test_loss_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from reinforce.training.distributed import gather

RANKS, ROWS = 2, 3


def values(rank: int, dim: int) -> torch.Tensor:
    return torch.randn(ROWS, dim, generator=torch.Generator().manual_seed(10 * rank + dim))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    parts = {"a": values(rank, 2).requires_grad_(), "b": values(rank, 4).requires_grad_()}
    whole = gather.gather(parts)
    ((rank + 1) * (whole["a"].sum() + 2 * whole["b"].sum())).backward()
    found = {name: value.detach() for name, value in whole.items()}
    gradients = {name: part.grad for name, part in parts.items()}
    mean = gather.mean(torch.tensor(float(rank)))
    torch.save((gather.rank(), gather.world_size(), found, gradients, mean), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, int, dict, dict, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]


def test_every_rank_gets_the_rows_of_all_in_the_order_of_the_ranks(of_ranks: list) -> None:
    for rank, (own, size, whole, _, mean) in enumerate(of_ranks):
        assert (own, size) == (rank, RANKS)
        for name, dim in (("a", 2), ("b", 4)):
            assert torch.equal(whole[name], torch.cat([values(0, dim), values(1, dim)]))
        assert mean == 0.5


def test_the_gradient_of_a_row_is_the_sum_over_the_ranks(of_ranks: list) -> None:
    for _, _, _, gradients, _ in of_ranks:
        assert torch.equal(gradients["a"], torch.full((ROWS, 2), 3.0))  # 1 + 2
        assert torch.equal(gradients["b"], torch.full((ROWS, 4), 6.0))


def test_one_rank_gets_its_own_tensors_back() -> None:
    parts = {"a": values(0, 2)}
    assert gather.gather(parts) is parts
    assert (gather.rank(), gather.world_size()) == (0, 1)
    value = torch.tensor(2.0)
    assert gather.mean(value) is value
