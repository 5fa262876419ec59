"""SLTrain in two processes: both draw one support, and DDP and FSDP2 train as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rankfold import factorize_, recipes
from rankfold.hosts import hosts

STEPS, WORLD = 4, 2


def fresh(rank: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2)]
    model = nn.Sequential(*blocks)
    torch.manual_seed(100 + rank)  # the support must not come from a process's own state
    factorize_(model, recipes.sltrain(rank=7, sparsity=0.05, alpha=7.0))
    return model


def train(forward: nn.Module, part: slice) -> None:
    random = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, 32, generator=random)[part] for _ in range(2))
    optimizer = torch.optim.AdamW(forward.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (forward(x) - y).square().mean().backward()
        optimizer.step()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        part = slice(4 * rank, 4 * rank + 4)
        alone = fresh()
        train(alone, slice(None))
        expected = alone.state_dict()

        model = fresh(rank)
        for host in hosts(model).values():
            places = host.weight.terms[1].places
            everyone = [torch.empty_like(places) for _ in range(WORLD)]
            dist.all_gather(everyone, places)
            assert torch.equal(everyone[0], everyone[1])
        train(DistributedDataParallel(model), part)
        torch.testing.assert_close(model.state_dict(), expected, rtol=1e-4, atol=1e-5)

        model = fresh(rank)
        mesh = init_device_mesh("cpu", (WORLD,))
        for block in (*model, model):
            fully_shard(block, mesh=mesh)
        train(model, part)
        found = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
