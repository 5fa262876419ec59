"""FWSVD's Fisher against brute force: each example's gradient formed by autograd, squared, averaged, summed.

A wrong axis, a wrong power or a doubled label shift barely moves any figure of quality, hence exact tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold import recipes
from rankfold.factorize import factorize_
from rankfold.layers import select
from rankfold.metrics import Fisher
from rankfold.observe import observe

TOLERANCE = {"rtol": 2e-5, "atol": 1e-12}


Sides = dict[str, tuple[Tensor, Tensor]]  # {layer: (by output, by input)}


def seen(model: nn.Module, batches: Any, targets: list[str] | None = None) -> Sides:
    """{layer: (f of the outputs, f of the inputs)}, before the floor."""
    return observe(model, select(model, targets), batches, fisher=True, labels="data").fisher


def brute(model: nn.Module, losses: list[Callable[[], Tensor]], names: list[str]) -> Sides:
    """The same from autograd: one backward pass an example. `losses` are the examples' losses."""
    weights = [model.get_submodule(name).weight for name in names]
    total = [torch.zeros_like(w, dtype=torch.float64) for w in weights]
    for loss in losses:
        for square, gradient in zip(total, torch.autograd.grad(loss(), weights), strict=True):  # type: ignore[arg-type]
            square += gradient.double().square()
    mean = {n: (square / len(losses)).flatten(1) for n, square in zip(names, total, strict=True)}
    return {name: (square.sum(1), square.sum(0)) for name, square in mean.items()}


def agree(ours: Sides, theirs: Sides) -> None:
    assert set(ours) == set(theirs)
    for name in theirs:
        for mine, true, side in zip(ours[name], theirs[name], ("out", "in"), strict=True):
            assert true.sum() > 0
            torch.testing.assert_close(mine, true, **TOLERANCE, msg=lambda m, n=name, s=side: f"{n} {s}: {m}")


class Tagger(nn.Module):
    """A class for every position; `first` runs `repeats` times."""

    def __init__(self, width: int, classes: int = 3, repeats: int = 1) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, classes)
        self.repeats = repeats

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.repeats):
            x = torch.tanh(self.first(x))
        return self.last(x)


def of_tagger(model: nn.Module, x: Tensor, y: Tensor) -> list[Callable[[], Tensor]]:
    """The examples' losses: cross-entropy summed over the rows."""
    return [
        lambda i=i: F.cross_entropy(model(x[i : i + 1]).flatten(0, -2), y[i].flatten(), reduction="sum")
        for i in range(len(x))
    ]


@pytest.mark.parametrize("rows, form", [(2, "Gram"), (9, "explicit")])
def test_equals_autograd_in_both_forms(rows: int, form: str) -> None:
    """Few rows an example: ((G Gᵀ X) ∘ X); many: Gᵀ X itself. Which is taken is a matter of cost."""
    model, width = Tagger(8, 8).double(), 8
    assert (rows * 2 * width < width * width) == (form == "Gram")
    x, y = torch.randn(5, rows, width).double(), torch.randint(8, (5, rows))
    agree(
        seen(model, [(x[:3], y[:3]), (x[3:], y[3:])]), brute(model, of_tagger(model, x, y), ["first", "last"])
    )


def test_one_row_an_example() -> None:
    model, x, y = Tagger(6).double(), torch.randn(4, 6).double(), torch.randint(3, (4,))
    agree(seen(model, [(x, y)]), brute(model, of_tagger(model, x, y), ["first", "last"]))


def test_batching_does_not_matter() -> None:
    model, x, y = Tagger(6), torch.randn(6, 3, 6), torch.randint(3, (6, 3))
    whole = seen(model, [(x, y)])
    single = seen(model, [(x[i : i + 1], y[i : i + 1]) for i in range(6)])
    agree(whole, single)


def test_a_layer_that_runs_twice_adds_its_gradients_before_squaring() -> None:
    model = Tagger(5, repeats=3).double()
    x, y = torch.randn(4, 2, 5).double(), torch.randint(3, (4, 2))
    agree(seen(model, [(x, y)]), brute(model, of_tagger(model, x, y), ["first", "last"]))


def test_a_call_that_the_loss_ignores_does_not_hide_the_others() -> None:
    class Half(Tagger):
        def forward(self, x: Tensor) -> Tensor:
            self.first(x.flip(-1))  # thrown away: no gradient ever arrives
            return self.last(torch.tanh(self.first(x)))

    model, x, y = Half(5).double(), torch.randn(4, 2, 5).double(), torch.randint(3, (4, 2))
    agree(seen(model, [(x, y)]), brute(model, of_tagger(model, x, y), ["first", "last"]))


def test_opposite_gradients_do_not_cancel() -> None:
    """The mean gradient of these two examples is exactly zero; their mean squared gradient is not."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).double()
    nn.init.zeros_(model[0].weight)  # p = ½, ½
    x = torch.ones(2, 4).double()
    y = torch.tensor([0, 1])
    F.cross_entropy(model(x), y).backward()
    assert model[0].weight.grad.abs().max() == 0
    (by_out, by_in) = seen(model, [(x, y)], ["0"])["0"]
    torch.testing.assert_close(by_in, torch.full((4,), 0.5).double())
    torch.testing.assert_close(by_out, torch.full((2,), 1.0).double())


def test_convolution_and_embedding() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Embedding(7, 4), nn.Conv2d(1, 3, 3, stride=2, padding=1)
            self.last = nn.Linear(3, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(torch.tanh(self.conv(self.table(ids)[:, None])).mean((2, 3)))

    model, ids, y = Net().double(), torch.randint(6, (5, 6)), torch.randint(2, (5,))
    names = ["table", "conv", "last"]
    ours = seen(model, [(ids, y)], names)
    theirs = brute(model, of_tagger(model, ids, y), names)
    agree(ours, theirs)
    assert ours["table"][0][6] == 0  # a token that never came
    # An embedding's inputs are its rows: the paper's input axis is the vocabulary.
    metric = Fisher()(model, select(model, names), [(ids, y)])["table"]
    assert metric.right is None and metric.left is not None and metric.left.shape == (7,)


def test_the_label_of_a_language_model_is_shifted_once(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama().double()
    ids = torch.randint(4, 128, (3, 7))
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]

    def loss(row: Tensor, shift: int) -> Tensor:
        logits = model(input_ids=row[None]).logits[0]
        return F.cross_entropy(logits[:-shift], row[shift:], reduction="sum")

    once = brute(model, [lambda r=r: loss(r, 1) for r in ids], names)
    twice = brute(model, [lambda r=r: loss(r, 2) for r in ids], names)
    for batches in (ids, [{"input_ids": ids}], [{"input_ids": ids, "labels": ids}]):
        agree(seen(model, batches, names), once)
    ours = seen(model, ids, names)[names[0]][1]
    assert not torch.allclose(ours, twice[names[0]][1], rtol=0.05)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(tiny_llama: Callable[..., Any], side: str) -> None:
    model = tiny_llama().double()
    ids = torch.randint(4, 128, (3, 6))
    junk, zeros, ones = torch.randint(4, 128, (3, 4)), torch.zeros(3, 4).long(), torch.ones(3, 6).long()
    pair = (lambda a, b: torch.cat([a, b], 1)) if side == "right" else (lambda a, b: torch.cat([b, a], 1))
    padded = {"input_ids": pair(ids, junk), "attention_mask": pair(ones, zeros)}
    agree(seen(model, [padded]), seen(model, [{"input_ids": ids}]))


def bert(**overrides: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    options = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**options, intermediate_size=24, **overrides)  # type: ignore[arg-type]
    return BertForSequenceClassification(config).double()


def test_a_classifier_is_differentiated_on_its_own_loss() -> None:
    """Padded batches, a BERT in train mode with dropout: as its own loss in eval mode, example by example."""
    model = bert(num_labels=3).train()
    lengths, y = [3, 6, 4, 6], torch.tensor([0, 2, 1, 2])
    ids = torch.randint(1, 50, (4, 6))
    mask = (torch.arange(6)[None] < torch.tensor(lengths)[:, None]).long()
    names = list(select(model, ["bert.encoder.*"]))
    ours = seen(model, [{"input_ids": ids, "attention_mask": mask, "labels": y}], ["bert.encoder.*"])
    assert model.training
    model.eval()
    losses = [
        lambda i=i, n=n: model(input_ids=ids[i : i + 1, :n], labels=y[i : i + 1]).loss
        for i, n in enumerate(lengths)
    ]
    agree(ours, brute(model, losses, names))


def test_a_loss_of_the_models_own() -> None:
    """Regression: no class index to subtract, so the model's loss is used, one example at a time."""
    model = bert(num_labels=1, problem_type="regression").eval()
    ids, y = torch.randint(1, 50, (3, 5)), torch.randn(3).double()
    names = list(select(model, ["bert.encoder.*"]))
    losses = [lambda i=i: model(input_ids=ids[i : i + 1], labels=y[i : i + 1]).loss for i in range(3)]
    single = [{"input_ids": ids[i : i + 1], "labels": y[i : i + 1]} for i in range(3)]
    agree(seen(model, single, ["bert.encoder.*"]), brute(model, losses, names))
    with pytest.raises(ValueError, match="batches of one example"):
        seen(model, [{"input_ids": ids, "labels": y}], ["bert.encoder.*"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_neither_crashes_nor_underflows(dtype: torch.dtype) -> None:
    """Gradients of 1e-4 have squares that float16 cannot hold."""
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 3))
    with torch.no_grad():
        model[2].weight *= 1e-4
    x, y = torch.randn(8, 24), torch.randint(3, (8,))
    exact = seen(model, [(x, y)], ["0"])["0"][1]
    model, x = model.to(dtype), x.to(dtype)
    by_in = seen(model, [(x, y)], ["0"])["0"][1]
    assert by_in.dtype == torch.float64 and by_in.min() > 0
    torch.testing.assert_close(by_in, exact, rtol=0.05, atol=0.0)
    factorize_(model, recipes.fwsvd, budget=0.5, batches=[(x, y)], targets=["0"])
    assert {p.dtype for p in model[0].parameters()} == {dtype}


def test_nothing_is_left_behind_and_two_passes_are_bit_equal() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)).train()
    model[1].eval()
    model[2].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    x, y = torch.randn(5, 6), torch.randint(3, (5,))
    first, second = (seen(model, [(x, y)], ["0", "2"]) for _ in range(2))
    for name in first:
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert model[0].weight.grad.eq(1).all() and model[2].weight.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_is_left_behind_by_an_error() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)).train()
    with pytest.raises(ValueError, match="labels"):
        seen(model, [torch.randn(2, 6)], ["0"])
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Experts(nn.Module):
    """Two experts by the sign of the first feature; `call_empty` runs an expert even with no rows."""

    def __init__(self, call_empty: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))
        self.last, self.call_empty = nn.Linear(24, 3), call_empty

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen, y = (rows[:, 0] < 0).long(), torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            mine = chosen == index
            if self.call_empty or mine.any():
                y[mine] = expert(rows[mine])
        return self.last(y.view_as(x))


@pytest.mark.parametrize("call_empty", [False, True])
def test_an_expert_without_a_token_stays_sound(call_empty: bool) -> None:
    """Never called: it stays dense, and the report says so. Called with no rows: plain SVD serves."""
    model = Experts(call_empty)
    x, y = torch.randn(4, 5, 24), torch.randint(3, (4, 5))
    x[..., 0] = x[..., 0].abs() + 0.1  # all to the first expert
    batches = [(x[i : i + 1], y[i : i + 1]) for i in range(4)]
    report = factorize_(model, recipes.fwsvd, budget=0.7, batches=batches, targets=["experts.*"])
    rows = {row.name: row for row in report.layers}
    assert rows["experts.0"].structure == "low_rank"
    if not call_empty:
        assert rows["experts.1"].structure == "dense" and "never ran" in rows["experts.1"].note
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model(x)).all()


def test_an_expert_that_some_examples_miss() -> None:
    model = Experts(call_empty=False).double()
    x, y = torch.randn(4, 3, 24).double(), torch.randint(3, (4, 3))
    x[0, :, 0] = 1.0  # the second expert does not see the first example
    batches = [(x[i : i + 1], y[i : i + 1]) for i in range(4)]
    losses = of_tagger(model, x, y)
    ours = seen(model, batches, ["experts.*"])["experts.1"]
    theirs = brute(model, losses[1:], ["experts.1"])["experts.1"]
    # An example whose gradient is zero only changes the scale, which the floor removes.
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine / mine.sum(), true / true.sum(), **TOLERANCE)
    with pytest.raises(ValueError, match=r"experts\.0.*batches of one example"):
        seen(model, [(x, y)], ["experts.*"])
