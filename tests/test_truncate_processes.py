"""Trained rank pruning in two processes: DDP truncates alike on each, FSDP2 gathers, and both are one run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_truncate import net, started
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from rankfold.truncate import Truncate

STEPS, WORLD = 5, 2
OPTIONS = {"e": 0.1, "every": 2, "nuclear": 1e-2}


def data(part: slice = slice(None)) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    return x[part], (torch.arange(8) % 4)[part]


def fresh() -> tuple[nn.Sequential, Truncate]:
    torch.manual_seed(0)
    model = net()
    return model, started(model, **OPTIONS)


def train(forward: nn.Module, regime: Truncate, part: slice, by_gradient: bool) -> None:
    x, y = data(part)
    optimizer = torch.optim.SGD(forward.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        regime.before_step()
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), y)
        (loss if by_gradient else loss + regime.penalty()).backward()
        if by_gradient:
            regime.penalty_gradients_()
        optimizer.step()
        regime.after_step()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        part = slice(4 * rank, 4 * rank + 4)
        alone, regime = fresh()
        train(alone, regime, slice(None), False)
        expected = alone.state_dict()
        for by_gradient in (False, True):
            model, regime = fresh()
            train(DistributedDataParallel(model), regime, part, by_gradient)
            other = [torch.empty_like(model[1].weight) for _ in range(WORLD)]
            dist.all_gather(other, model[1].weight.detach())
            assert torch.equal(other[0], other[1])
            torch.testing.assert_close(model.state_dict(), expected, rtol=1e-4, atol=1e-5)

            model, regime = fresh()
            mesh = init_device_mesh("cpu", (WORLD,))
            fully_shard(model[1], mesh=mesh)
            fully_shard(model, mesh=mesh)
            train(model, regime, part, by_gradient)
            gathered = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
            torch.testing.assert_close(gathered, expected, rtol=1e-4, atol=1e-5)
            with regime.truncated():
                assert torch.linalg.matrix_rank(model[1].weight.full_tensor().flatten(1)) <= 8
            with pytest.raises(ValueError, match=r"layer '1' is sharded.*gather the full state dict"):
                regime.finish_()

        single, last = fresh()  # what that error advises
        single.load_state_dict(gathered)
        last.schedule(STEPS, STEPS)
        ranks = started(alone, **OPTIONS).finish_()
        assert last.finish_() == ranks
        torch.testing.assert_close(single(data()[0]), alone(data()[0]), rtol=1e-3, atol=1e-4)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
