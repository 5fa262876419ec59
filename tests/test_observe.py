"""One pass over data: the sums are the textbook's sums, whatever the batching, and nothing else is "
"touched."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankfold import KFAC, Activation, Fisher, Metric, select
from rankfold.observe import observe

WANT = {"input": "gram", "gradient": "matrix", "fisher": True, "labels": "data"}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.head = nn.Linear(5, 7), nn.Dropout(0.8), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.first(x))))


def data(examples: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(examples, 5), torch.randint(3, (examples,))


def test_sums_are_their_definitions() -> None:
    model, (x, y) = Classifier(), data()
    seen = observe(model, select(model, ["first", "head"]), [(x, y)], **WANT)
    model.eval()
    hidden = torch.tanh(model.first(x)).detach()
    torch.testing.assert_close(seen.second["first"], (x.mT @ x / 12).double())
    torch.testing.assert_close(seen.second["head"], (hidden.mT @ hidden / 12).double())
    slopes = model(x).softmax(-1).detach() - nn.functional.one_hot(y, 3)
    torch.testing.assert_close(seen.gradient["head"], (slopes.mT @ slopes / 12).double())
    for name in ("first", "head"):
        squares = []
        for each, label in zip(x, y, strict=True):
            loss = nn.functional.cross_entropy(model(each[None]), label[None])
            squares.append(torch.autograd.grad(loss, model.get_submodule(name).weight)[0].square())
        mean = torch.stack(squares).mean(0)
        torch.testing.assert_close(seen.fisher[name][0], mean.sum(1).double())
        torch.testing.assert_close(seen.fisher[name][1], mean.sum(0).double())
    absolute = observe(model, select(model, ["head"]), [x], input="absolute").absolute["head"]
    torch.testing.assert_close(absolute, hidden.abs().mean(0).double())
    head = select(model, ["head"])
    energy = observe(model, head, [(x, y)], gradient="scalar", labels="data").energy
    assert float(energy["head"]) == pytest.approx(float(slopes.square().sum(1).mean() / 3), rel=1e-5)


@settings(max_examples=10)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_batching_changes_nothing(parts: list[int]) -> None:
    torch.manual_seed(0)
    model, (x, y) = Classifier(), data(sum(parts))
    layers = select(model, ["first", "head"])
    whole = observe(model, layers, [(x, y)], **WANT)
    split = observe(model, layers, list(zip(x.split(parts), y.split(parts), strict=True)), **WANT)
    for what in ("second", "gradient"):
        for name, value in getattr(whole, what).items():
            torch.testing.assert_close(getattr(split, what)[name], value, rtol=1e-5, atol=1e-7)
    for name, sides in whole.fisher.items():
        for side, again in zip(sides, split.fisher[name], strict=True):
            torch.testing.assert_close(again, side, rtol=1e-5, atol=1e-7)


def ids(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(4, 128, (rows, length))


def test_padding_is_excluded(tiny_llama) -> None:
    model, full = tiny_llama(), ids()
    layers = select(model)
    keep = [9, 5, 7]
    mask = torch.stack([(torch.arange(9) < n).long() for n in keep])
    padded = [{"input_ids": torch.where(mask.bool(), full, 1), "attention_mask": mask}]
    alone = [{"input_ids": row[None, :n]} for row, n in zip(full, keep, strict=True)]
    one, two = (observe(model, layers, batches, **WANT) for batches in (padded, alone))
    assert one.tokens == two.tokens == sum(keep)
    for name in layers:
        torch.testing.assert_close(one.second[name], two.second[name], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one.gradient[name], two.gradient[name], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(one.fisher[name][1], two.fisher[name][1], rtol=1e-3, atol=1e-6)


def test_layers_that_share_an_input_share_one_moment(tiny_llama) -> None:
    model = tiny_llama()
    layers = select(model)
    for calibration in (Activation(), Activation(shrink=0.1), Activation(output="scalar"), KFAC()):
        found = calibration(model, layers, ids())
        rights = {name: m.right for name, m in found.items()}
        prefix = "model.layers.0."
        assert rights[f"{prefix}self_attn.q_proj"] is rights[f"{prefix}self_attn.k_proj"]
        assert rights[f"{prefix}self_attn.q_proj"] is rights[f"{prefix}self_attn.v_proj"]
        assert rights[f"{prefix}mlp.gate_proj"] is rights[f"{prefix}mlp.up_proj"]
        assert len({id(right) for right in rights.values()}) == 2 * 4  # a block: qkv, o, gate and up, down


def test_an_embedding_is_seen_as_token_frequencies(tiny_llama) -> None:
    model, tokens = tiny_llama(tie_word_embeddings=False), ids()
    name = "model.embed_tokens"
    found = Activation()(model, select(model, [name]), tokens)[name]
    assert found.right is None
    torch.testing.assert_close(
        found.left, torch.bincount(tokens.flatten(), minlength=128).double() / tokens.numel()
    )


def test_one_tensor_of_ids_is_cut_into_batches(tiny_llama) -> None:
    model, tokens = tiny_llama(), ids(6)
    layers = select(model, ["*.q_proj"])
    stages: list[tuple[str, int, int | None]] = []
    one = observe(model, layers, tokens, input="gram", progress=lambda *at: stages.append(at))
    two = observe(model, layers, [{"input_ids": tokens}], input="gram")
    assert stages == [("calibrate", 0, 2), ("calibrate", 1, 2), ("calibrate", 2, 2)]
    for name in layers:
        torch.testing.assert_close(one.second[name], two.second[name], rtol=1e-5, atol=1e-7)


def test_sampled_labels_are_seeded(tiny_llama) -> None:
    model, tokens = tiny_llama(), ids()
    layers = select(model)
    one, two, other = (KFAC()(model, layers, tokens, seed=seed) for seed in (3, 3, 4))
    for name in layers:
        assert torch.equal(one[name].left, two[name].left) and torch.equal(one[name].right, two[name].right)
        assert torch.equal(one[name].right, other[name].right)
        assert not torch.equal(one[name].left, other[name].left)


def test_the_global_generator_is_left_alone(tiny_llama) -> None:
    model, before = tiny_llama(), torch.random.get_rng_state()
    KFAC()(model, select(model), ids_of(before))
    assert torch.equal(torch.random.get_rng_state(), before)


def ids_of(state: Tensor) -> Tensor:
    return state[:18].long().remainder(124).add(4).view(2, 9)


def test_everything_is_put_back(tiny_llama) -> None:
    model = tiny_llama().train()
    model.model.norm.eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.grad = torch.ones(128, 64)
    modes = {name: m.training for name, m in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    tokens = ids()

    def check() -> None:
        assert {name: m.training for name, m in model.named_modules()} == modes
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        graded = [n for n, p in model.named_parameters() if p.grad is not None]
        assert graded == ["model.layers.0.mlp.up_proj.weight"]
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    observe(model, select(model), tokens, **WANT)
    check()

    def interrupt(stage: str, done: int, total: int | None) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe(model, select(model), tokens.repeat(3, 1), progress=interrupt, **WANT)
    check()
    with pytest.raises(IndexError):
        observe(model, select(model), [{"input_ids": tokens + 10_000}], **WANT)
    check()


@pytest.mark.parametrize("batches", [None, [], iter(())])
def test_no_data(batches: Any) -> None:
    model = Classifier()
    with pytest.raises(ValueError, match=r"batches is (None|empty)"):
        observe(model, select(model), batches, input="gram")


def test_data_that_overflow_name_the_layer() -> None:
    model = Classifier()
    with pytest.raises(ValueError, match=r"layer 'first': the activations hold NaN or infinity"):
        observe(model, select(model, ["first"]), [torch.full((2, 5), math.nan)], input="gram")


def test_outputs_that_cannot_be_differentiated() -> None:
    class Headless(Classifier):
        def forward(self, x):
            return {"hidden": self.first(x)}

    model = Headless()
    with pytest.raises(ValueError, match=r"no `\.logits`"):
        KFAC()(model, select(model), [torch.randn(2, 5)])
    model = Classifier()
    with pytest.raises(ValueError, match="needs labels"):
        Fisher()(model, select(model), [torch.randn(2, 5)])


def test_examples_that_a_layer_mixes_cannot_be_told_apart() -> None:
    class Mixed(Classifier):
        def forward(self, x):
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    model, x, y = Mixed(), torch.randn(4, 3, 5), torch.randint(3, (4,))
    with pytest.raises(ValueError, match="sees 12 rows for a batch of 4 examples"):
        Fisher()(model, select(model), [(x, y)])
    Fisher()(model, select(model), [(x[i : i + 1], y[i : i + 1]) for i in range(4)])


def test_a_layer_called_twice_has_the_sum_of_both_gradients() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.core(torch.tanh(self.core(x)))))

    model, (x, y) = Twice(), data(6)
    seen, loss = (
        observe(model, select(model), [(x, y)], fisher=True, labels="data"),
        nn.functional.cross_entropy,
    )
    squares = [
        torch.autograd.grad(loss(model(a[None]), b[None]), model.core.weight)[0].square()
        for a, b in zip(x, y, strict=True)
    ]
    torch.testing.assert_close(seen.fisher["core"][1], torch.stack(squares).mean(0).sum(0).double())
    assert seen.calls == {"core": 2, "head": 1}


def test_a_layer_that_never_runs_has_no_metric() -> None:
    model = Classifier()
    model.idle = nn.Linear(5, 5)
    assert set(Activation()(model, select(model), [torch.randn(4, 5)])) == {"first", "head"}
    assert set(KFAC()(model, select(model), [torch.randn(4, 5)])) == {"first", "head"}


def test_fewer_tokens_than_inputs_and_one_token() -> None:
    model = Classifier()
    for rows in (1, 3):
        gram = Activation()(model, select(model), [torch.randn(rows, 5)])["first"].right
        assert int(torch.linalg.matrix_rank(gram, rtol=1e-5)) == rows


def test_half_of_the_two_sided_error_is_the_divergence() -> None:
    """On one softmax layer: KL(original ‖ changed) = ½ E[δᵀFδ], sampled labels estimate F, K-FAC "
    "factorizes it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12).double())
    x = torch.randn(4000, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    metric = KFAC(0.0, 0.0)(model, select(model), list(x.split(500)))["0"]
    change = 1e-3 * torch.randn(12, 8, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
        before, after = logits.log_softmax(-1), (logits + x @ change.mT).log_softmax(-1)
        divergence = float((before.exp() * (before - after)).sum(-1).mean())
        delta, p = x @ change.mT, before.exp()
        exact = float(0.5 * ((p * delta.square()).sum(-1) - (p * delta).sum(-1).square()).mean())
    assert exact == pytest.approx(divergence, rel=0.01)
    # The fisher of the sampled labels, token by token, and then its Kronecker factors.
    small = x / x.norm(dim=1, keepdim=True)  # near-uniform p: the factors are all but independent
    near = KFAC(0.0, 0.0)(model, select(model), list(small.split(500)))["0"]
    with torch.no_grad():
        before, after = (model(small) + s for s in (0, small @ change.mT))
        before, after = before.log_softmax(-1), after.log_softmax(-1)
        true = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0.5 * near.error(change) == pytest.approx(true, rel=0.06)
    assert 0.5 * metric.error(change) == pytest.approx(divergence, rel=1.0)  # peaked p: the same order
    assert isinstance(metric, Metric)


def test_draws_follow_the_probabilities() -> None:
    from rankfold.batches import draw

    probabilities = torch.tensor([0.1, 0.0, 0.2, 0.7]).expand(40_000, 4)
    drawn = draw(probabilities, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    assert share[1] == 0 and torch.allclose(share, probabilities[0], atol=0.01)
    assert torch.equal(drawn, draw(probabilities, torch.Generator().manual_seed(0)))
