"""The frozen image encoder: what adapters and pair tokens change in it, and what they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_hoi import SIDE, D, config, vision

from rankfold.hoi.vision import AdaptedVision, pair_mask

WIDTH, PATCHES = 32, 16


def encoder(seed: int = 0, awake: bool = False, **options: Any) -> AdaptedVision:
    """In eval mode; `awake`: adapters add something, as they do after a step."""
    torch.manual_seed(seed)
    model = AdaptedVision(config(**options)).eval()
    if awake:
        for adapter in model.adapters:
            torch.nn.init.normal_(adapter.up.weight, std=0.3)
    return model


def inputs(rows: int = 2, pairs: int = 3, detections: int = 4, seed: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(rows, 3, SIDE, SIDE, generator=draw),
        "context": torch.randn(rows, detections, 8, generator=draw),
        "present": torch.ones(rows, detections, dtype=torch.bool),
        "tokens": torch.randn(rows, pairs, WIDTH, generator=draw),
        "lengths": torch.full((rows,), pairs),
    }


def frozen(model: AdaptedVision, pixel_values: Tensor) -> Tensor:
    """What transformers' own forward gives for the patches, projected: (B, D, 4, 4)."""
    states = model.tower(pixel_values).last_hidden_state[:, 1:]
    projected = model.projection(model.tower.post_layernorm(states))
    return projected.mT.reshape(len(pixel_values), D, 4, 4)


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_at_the_start_the_adapted_encoder_is_the_frozen_one(scale: float) -> None:
    """Trap 8. Pairs are isolated, or there are none: else the image sees their tokens."""
    for options, given in (({"isolate_pairs": True}, inputs()), ({}, inputs(pairs=0))):
        model = encoder(scale_init=scale, **options)
        grid, own = model(**given)
        torch.testing.assert_close(grid, frozen(model, given["pixel_values"]), atol=1e-5, rtol=1e-4)
        assert own.shape == (2, given["tokens"].shape[1], D)
    seen, _ = encoder()(**inputs())
    assert (seen - frozen(encoder(), inputs()["pixel_values"])).abs().max() > 1e-3


def test_first_gradients_are_as_small_as_the_scale() -> None:
    """Trap 8: near-dead adapters. The gradient of Up is proportional to the scale, 1 or 1e-9."""
    norms = []
    for scale in (1.0, 1e-9):
        model = encoder(scale_init=scale)
        model(**inputs())[0].square().sum().backward()
        up = [adapter.up.weight.grad for adapter in model.adapters]
        assert all(grad is not None for grad in up)
        norms.append(torch.stack([grad.norm() for grad in up]).norm())
    assert norms[0] > 1e-2
    assert float(norms[1] / norms[0]) == pytest.approx(1e-9, rel=1e-3)


def test_only_adapters_train_and_the_encoder_stays_in_eval_mode() -> None:
    model = encoder(awake=True).train()
    assert model.training and model.adapters.training and not model.tower.training
    grid, own = model(**inputs())
    (grid.square().sum() + own.square().sum()).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("adapters.")}
    assert all(p.grad is None for p in model.tower.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.adapters.parameters())


def test_adapters_touch_image_tokens_only() -> None:
    model, shapes = encoder(), []
    for adapter in model.adapters:
        adapter.register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape)))
    model(**inputs())
    assert shapes == [(2, 1 + PATCHES, WIDTH)] * 2


def test_the_mask_is_additive_and_from_lengths() -> None:
    mask = pair_mask(torch.tensor([2, 0]), 3, 2)
    assert mask is not None and mask.shape == (2, 1, 1, 5)
    assert mask[0].flatten().tolist() == [0, 0, 0, 0, 0]
    assert mask[1].flatten().tolist() == [0, 0, 0, -torch.inf, -torch.inf]
    alone = pair_mask(torch.tensor([2]), 1, 2, isolate=True)
    assert alone is not None
    assert (alone[0, 0] == 0).tolist() == [[True, False, False], [True, True, False], [True, False, True]]
    assert pair_mask(torch.tensor([0]), 3, 0) is None


@pytest.mark.parametrize("isolate", [False, True])
def test_padding_of_pairs_changes_nothing(isolate: bool) -> None:
    """Trap 7: whatever stands in padding, and however much there is of it."""
    model, given = encoder(awake=True, isolate_pairs=isolate), inputs(pairs=5)
    given["lengths"] = torch.tensor([3, 5])
    grid, own = model(**given)
    short = {key: value[:1] for key, value in given.items()} | {"tokens": given["tokens"][:1, :3]}
    expected, expected_own = model(**short)
    torch.testing.assert_close(grid[:1], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(own[:1, :3], expected_own, atol=1e-5, rtol=1e-4)
    given["tokens"][0, 3:] = 1e4
    torch.testing.assert_close(model(**given)[0], grid, atol=1e-5, rtol=1e-4)


def test_a_token_whose_entries_sum_to_zero_is_seen() -> None:
    """Trap 7: the public code takes it for padding."""
    model, given = encoder(), inputs(rows=1, pairs=1)
    given["tokens"] = torch.tensor([1.0, -1.0]).repeat(WIDTH // 2).view(1, 1, WIDTH)
    assert float(given["tokens"].sum()) == 0
    seen = model(**given)[0]
    without = model(**given | {"lengths": torch.tensor([0])})[0]
    assert (seen - without).abs().max() > 1e-3


def test_pairs_influence_each_other_unless_isolated() -> None:
    """Trap 7."""
    given = inputs()
    other = given | {"tokens": given["tokens"].clone()}
    other["tokens"][:, 1:] = inputs(seed=2)["tokens"][:, 1:]
    for isolate in (False, True):
        model = encoder(awake=True, isolate_pairs=isolate)
        (grid, own), (grid2, own2) = model(**given), model(**other)
        changed = [(grid - grid2).abs().max() > 1e-4, (own[:, 0] - own2[:, 0]).abs().max() > 1e-4]
        assert changed == [not isolate] * 2
        assert (own[:, 1] - own2[:, 1]).abs().max() > 1e-4


def test_detections_reach_image_tokens_and_their_padding_does_not() -> None:
    model, given = encoder(awake=True), inputs()
    grid, _ = model(**given)
    moved = given | {"context": given["context"] + 1}
    assert (model(**moved)[0] - grid).abs().max() > 1e-4
    padded = dict(given, present=torch.tensor([[True, True, False, False], [True] * 4]))
    junk = dict(padded, context=padded["context"].clone())
    junk["context"][0, 2:] = 100
    torch.testing.assert_close(model(**junk)[0], model(**padded)[0], atol=1e-5, rtol=1e-4)
    short = {key: value[:1] for key, value in padded.items()}
    short |= {"context": short["context"][:, :2], "present": short["present"][:, :2]}
    torch.testing.assert_close(model(**short)[0], model(**padded)[0][:1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("detections", [0, 4])
def test_an_image_without_detections_is_finite(detections: int) -> None:
    model, given = encoder(awake=True), inputs(detections=detections, pairs=0)
    given["present"] = torch.zeros(2, detections, dtype=torch.bool)
    grid, own = model(**given)
    assert grid.isfinite().all() and own.shape == (2, 0, D)
    grid.square().sum().backward()
    grads = [p.grad for p in model.adapters.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", ["image_size", "patch_size"])
def test_an_encoder_that_is_not_square_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* is not square"):
        AdaptedVision(config(vision=vision(**{name: [32, 16]})))
