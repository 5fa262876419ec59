"""Laws of every form of training, in a loop of one's own: accumulation, mixed precision, checkpointing,
compilation, and resuming bit for bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from toy_regimes import FORMS, batches, network, train
from toy_steps import same

from rankfold.hosts import hosts
from rankfold.ordered import Ordered
from rankfold.step_in_backward import StepInBackward

# The others share their code with these; `make test-all` asks them too.
MAIN = ("sltrain", "maestro", "trp", "codes")
EVERY = pytest.mark.parametrize(
    "form", [form if form in MAIN else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
COMPILED = pytest.mark.parametrize(
    "form",
    [
        form if form in ("sltrain", "maestro") else pytest.param(form, marks=pytest.mark.slow)
        for form in FORMS
    ],
)
STEPS = 6


def started(form: str, dtype: torch.dtype = torch.float32, steps: int = STEPS) -> tuple[nn.Sequential, Any]:
    model, regime = network(dtype), FORMS[form]()
    regime.start_(model, steps=steps)
    return model, regime


def adam(model: nn.Module, rate: float = 0.02) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0.0)


def near(model: nn.Module, other: nn.Module, atol: float) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(
            mine[name], theirs[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@EVERY
def test_something_happens(form: str) -> None:
    """What the laws below compare is a training in which losses fall and the regime acts."""
    model, regime = started(form)
    first = copy.deepcopy(model.state_dict())
    same_batch = [[batches(1)[0]]] * STEPS
    losses = train(model, regime, adam(model), same_batch)
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert first.keys() == after.keys() and all(first[n].shape == after[n].shape for n in first)
    if form.startswith("maestro"):
        assert all(layer.alive < layer.rank for layer in ordered(model))
    if form == "trp":
        assert all(rank < 16 for rank in regime.finish_().values())


def ordered(model: nn.Module) -> list[Ordered]:
    return [host.weight for host in hosts(model).values() if isinstance(host.weight, Ordered)]


@EVERY
def test_accumulation_is_one_large_batch(form: str) -> None:
    """A step is a step of the optimizer: whatever is drawn is drawn once for its micro-batches."""
    parts, joined = started(form, torch.float64), started(form, torch.float64)
    micro = batches(4 * STEPS, rows=4, dtype=torch.float64)
    steps = [micro[i : i + 4] for i in range(0, len(micro), 4)]
    large = [[tuple(torch.cat(part) for part in zip(*step, strict=True))] for step in steps]
    train(*parts, adam(parts[0]), steps)
    train(*joined, adam(joined[0]), large)
    near(parts[0], joined[0], 1e-9)


@EVERY
def test_autocast_computes_in_bfloat16_and_keeps_float32(form: str) -> None:
    model, regime = started(form)
    seen = set()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(batch[0])
        seen.add(y.dtype)
        return (y.float() - batch[1]).square().mean()

    losses = train(model, regime, adam(model), [[b] for b in batches(STEPS)], loss)
    assert seen == {torch.bfloat16} and torch.tensor(losses).isfinite().all()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_pass(form: str, reentrant: bool) -> None:
    """What is recomputed has the width, the choices and the weights of the first time."""

    def saving(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        return (checkpoint(model, x, use_reentrant=reentrant) - batch[1]).square().mean()

    plain, saved = started(form), started(form)
    steps = [[b] for b in batches(STEPS)]
    expected = train(*plain, adam(plain[0]), steps)
    assert train(*saved, adam(saved[0]), steps, saving) == pytest.approx(expected, abs=1e-6)
    near(plain[0], saved[0], 1e-5)


# torch's own tracing of autograd functions warns about itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@COMPILED
def test_compiled_training_is_the_same(form: str) -> None:
    """Also while widths and choices change from step to step, which must not compile anew each time."""
    dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain, fast = started(form), started(form)
    compiled = torch.compile(fast[0], backend=counter)
    steps = [[b] for b in batches(STEPS)]
    expected = train(*plain, adam(plain[0]), steps)
    got = train(compiled, fast[1], adam(fast[0]), steps)  # type: ignore[arg-type]
    assert got == pytest.approx(expected, rel=1e-4)
    near(plain[0], fast[0], 1e-4)
    assert counter.frame_count <= 4  # eager and fixed choices, a fresh product and a held one


@EVERY
@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_resumes_bit_for_bit(form: str, stop: int) -> None:
    """The model's and the optimizer's state dicts and the number of steps are all there is, also where the
    global random state of the second process is another."""
    steps = [[b] for b in batches(STEPS)]
    whole, regime = started(form)
    optimizer = adam(whole)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    train(whole, regime, optimizer, steps, schedule=schedule)
    model, regime = started(form)
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    train(model, regime, optimizer, steps[:stop], schedule=schedule)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    torch.manual_seed(12345)
    second, regime = started(form)
    optimizer = adam(second)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for item, state in zip((second, optimizer, schedule), states, strict=True):
        item.load_state_dict(state)
    regime.schedule(STEPS, stop)
    train(second, regime, optimizer, steps[stop:], schedule=schedule)
    same(second, whole)


@EVERY
def test_the_global_random_state_is_neither_read_nor_moved(form: str) -> None:
    """Two processes of one run, whose global states differ, hold the same supports and draw the same."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model, regime = started(form)
        train(model, regime, adam(model), [[b] for b in batches(STEPS)])
        assert torch.equal(torch.get_rng_state(), before)
        models.append(model)
    same(*models)


@EVERY
def test_steps_in_the_backward_pass_are_the_same(form: str) -> None:
    """With the penalty in the loss, every regime trains so, bit for bit."""
    plain, inside = started(form), started(form)
    steps = [[b] for b in batches(STEPS)]
    train(*plain, adam(plain[0]), steps)
    optimizer = adam(inside[0])
    with StepInBackward(optimizer):
        train(*inside, optimizer, steps)
    same(inside[0], plain[0])


@EVERY
def test_finish_changes_nothing(form: str) -> None:
    """Logits of the trained model in eval mode, and after `finish_`: 1e-5 apart at most. Truncation is asked
    for what it would leave, since its last act is a truncation."""
    model, regime = started(form)
    train(model, regime, adam(model), [[b] for b in batches(STEPS)])
    x = batches(1, rows=32)[0][0]
    model.eval()
    with torch.no_grad():
        if form == "trp":
            with regime.truncated():
                before = model(x)
        else:
            before = model(x)
        regime.finish_()
        assert float((model(x) - before).abs().max()) <= 1e-5
    with pytest.raises(ValueError, match="start_"):
        regime.before_step()
    assert model.train()(x).requires_grad
