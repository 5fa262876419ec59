"""One of two processes of tests/test_distributed.py: runs every check there is, and writes what came of it.

    python distributed_worker.py RANK FOLDER        -> FOLDER/RANK.json = {check: "" or what went wrong}

Both compute in one process what two are to agree with. All checks share one start, which takes seconds.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy_regimes import FORMS, batches, train

from rankfold.hosts import hosts
from rankfold.ordered import Ordered
from rankfold.step_in_backward import StepInBackward

STEPS = 4
CHECKS: dict[str, Callable[[Path], None]] = {}
DTYPE = torch.float64  # so that Adam does not magnify the last bit of a sum


def check(function: Callable[..., None], *arguments: Any) -> None:
    name = "-".join([function.__name__, *map(str, arguments)])
    CHECKS[name] = lambda folder: function(folder / name, *arguments)


def blocks() -> nn.Sequential:
    """Two blocks of two linear layers, the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = [nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)) for _ in range(2)]
        return nn.Sequential(*block).to(DTYPE).train()


def started(form: str) -> tuple[nn.Sequential, Any]:
    model, regime = blocks(), FORMS[form]()
    regime.start_(model, steps=STEPS)
    return model, regime


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)


def mine(step: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """This process's half of each batch."""
    return [(x.chunk(2)[dist.get_rank()], y.chunk(2)[dist.get_rank()]) for x, y in step]


DATA = [[batch] for batch in batches(STEPS, dtype=DTYPE)]


def alone(form: str) -> dict[str, Tensor]:
    """The state after the same training in one process."""
    model, regime = started(form)
    train(model, regime, adam(model), DATA)
    return model.state_dict()


def gathered(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in model.state_dict().items()}


def near(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-8) -> None:
    assert found.keys() == expected.keys(), (sorted(found), sorted(expected))
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def agreed(what: Any) -> None:
    """Both processes have the same, a thing of JSON or a state dict."""
    said = [None, None]
    if isinstance(what, dict):
        what = {name: item.tolist() if isinstance(item, Tensor) else item for name, item in what.items()}
    dist.all_gather_object(said, what)
    assert said[0] == said[1], said


def start(folder: Path, form: str) -> None:
    """The same factors and the same support, drawn with no word between the processes."""
    agreed(dict(started(form)[0].state_dict()))


def ddp(folder: Path, form: str) -> None:
    """Two halves of every batch are the whole; all widths, ranks and choices agree at every step."""
    model, regime = started(form)
    drawn = []
    before = regime.before_step

    def noting() -> None:
        before()
        drawn.append([h.weight.width for h in hosts(model).values() if isinstance(h.weight, Ordered)])

    regime.before_step = noting
    # Masters of weights that stand still have no gradient.
    wrapped = DistributedDataParallel(model, find_unused_parameters=form == "refitted")
    train(wrapped, regime, adam(model), [mine(step) for step in DATA])
    agreed(drawn)
    near(model.state_dict(), alone(form))
    regime.finish_()
    agreed(dict(model.state_dict()))
    agreed([str(host.weight.spec()) for host in hosts(model).values()])


def sharded(form: str) -> tuple[nn.Sequential, Any]:
    model, regime = started(form)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    return model, regime


def fsdp(folder: Path, form: str) -> None:
    """fully_shard of each block, after the factorization: the state of one process after as many steps."""
    model, regime = sharded(form)
    train(model, regime, adam(model), [mine(step) for step in DATA])
    near(gathered(model), alone(form))


def refused(folder: Path, form: str) -> None:
    """What a regime cannot do on shards it says at once, before anything is trained."""
    model, regime = sharded(form)
    try:
        train(model, regime, adam(model), [mine(step) for step in DATA])
    except ValueError as error:
        assert "shard" in str(error), error
    else:
        raise AssertionError("nothing was raised")


def resumed(folder: Path, form: str) -> None:
    """Saved sharded after two steps, loaded into another sharded model, trained on: bit for bit the run that
    did not stop."""
    model, regime = sharded(form)
    optimizer = adam(model)
    steps = [mine(step) for step in DATA]
    train(model, regime, optimizer, steps[:2])
    states: Any = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=folder)
    train(model, regime, optimizer, steps[2:])

    second, again = sharded(form)
    other = adam(second)
    states = dict(zip(("model", "optimizer"), get_state_dict(second, other), strict=True))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(second, other, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    again.schedule(STEPS, 2)
    train(second, again, other, steps[2:])
    near(gathered(second), gathered(model), atol=0)


def step_in_backward(folder: Path) -> None:
    """Works on shards, and refuses what DistributedDataParallel would average later."""
    model, regime = sharded("sltrain")
    optimizer = adam(model)
    with StepInBackward(optimizer):
        train(model, regime, optimizer, [mine(step) for step in DATA])
    near(gathered(model), alone("sltrain"))
    plain, _ = started("sltrain")
    try:
        StepInBackward(adam(plain))
    except ValueError as error:
        assert "2 processes are training" in str(error) and "fully_shard" in str(error), error
    else:
        raise AssertionError("nothing was raised")


for form in FORMS:
    check(start, form)
    check(ddp, form)
for form in ("sltrain", "maestro", "trp"):
    check(fsdp, form)
    check(resumed, form)
for form in ("codes", "refitted"):
    check(refused, form)
check(step_in_backward)


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {}
    for name, run in CHECKS.items():
        torch.manual_seed(100 + rank)  # global random states differ
        try:
            run(folder)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        said = [None, None]
        dist.all_gather_object(said, found[name])  # a check that failed in one process has ended in both
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
