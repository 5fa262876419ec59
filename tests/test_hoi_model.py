"""HOLa as a whole: its logits against the formula with all classes, what hides, pads and is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toy_hoi import INTERACTIONS, D, batch, config, model, table, texts

from rankfold.hoi.boxes import union
from rankfold.hoi.model import HolaModel
from rankfold.hoi.output import HolaOutput
from rankfold.hoi.pairs import of_pairs
from rankfold.hoi.roi_align import roi_align

SCALE = math.log(1 / 0.07)


def awake(seed: int = 0, **options: Any) -> HolaModel:
    """A model whose adapters add something, as they do after a step."""
    made = model(seed, **options)
    for name, parameter in made.named_parameters():
        if name.endswith(("up.weight", "up.bias")):
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def close(a: HolaOutput, b: HolaOutput) -> None:
    """Logits and priors agree, of the first image and the pairs that both have."""
    most = min(a.logits.shape[1], b.logits.shape[1])
    for key in ("logits", "prior"):
        torch.testing.assert_close(a[key][0, :most], b[key][0, :most], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", [True, False])
def test_logits_are_those_of_all_classes_averaged_by_verb(tokens: bool) -> None:
    """The page's formula, with the (pairs, classes) table that the model does not make."""
    made, given, held = awake(tokens=tokens), batch(), {}
    made.vision.register_forward_hook(lambda _, args, out: held.update(grid=out[0], own=out[1]))
    made.img_adapter.register_forward_hook(lambda _, args, out: held.update(both=out))
    out = made(**given)
    near, far = (of_pairs(given["boxes"], out.pairs[..., side]) for side in (0, 1))
    around = F.normalize(roi_align(held["grid"], union(near, far) / 8).mean((-2, -1)), dim=-1)
    indicator = table().indicator
    counts = indicator.sum(0)
    expected = SCALE / 2 * (held["both"] @ out.pair_text.mT) @ indicator / counts
    expected = expected + SCALE / 2 * (around @ out.text.mT) @ indicator / counts
    if tokens:
        expected = expected + SCALE / 2 * (held["own"] @ out.text.mT) @ indicator / counts
    for b, count in enumerate(out.pair_counts.tolist()):
        torch.testing.assert_close(out.logits[b, :count], expected[b, :count], atol=1e-5, rtol=1e-4)
        assert (out.logits[b, count:] == 0).all() and (out.prior[b, count:] == 0).all()
    assert out.pair_counts.tolist() == [6, 1]
    assert (held["own"].shape[1] > 0) == tokens


def test_regions_are_those_of_the_two_boxes() -> None:
    """[h; o] enters the adapter, each of length 1, from the patch grid at the boxes of the pair."""
    made, given, held = awake(), batch(), {}
    made.vision.register_forward_hook(lambda _, args, out: held.update(grid=out[0]))
    made.img_adapter.register_forward_pre_hook(lambda _, args: held.update(ends=args[0]))
    out = made(**given)
    regions = F.normalize(roi_align(held["grid"], given["boxes"] / 8).mean((-2, -1)), dim=-1)
    x, y = out.pairs[0, 4].tolist()
    expected = torch.cat([regions[0, x], regions[0, y]])
    torch.testing.assert_close(held["ends"][0, 4], expected, atol=1e-5, rtol=1e-4)


def test_a_verb_is_the_mean_over_its_objects() -> None:
    """Trap 13: "hold" has three classes, whatever the object of the pair is."""
    means = model().verb_means()
    assert means.shape == (6, 10)
    hold = [1 / 3 if verb == 1 else 0 for verb, _ in INTERACTIONS]
    torch.testing.assert_close(means[1], torch.tensor(hold))
    torch.testing.assert_close(means.sum(1), torch.ones(6))


def test_scales_have_no_exp_and_texts_no_norm() -> None:
    """Trap 13: doubling a scale doubles its part of the logit, and so does doubling the texts."""
    made, given = awake(), batch()
    whole = made(**given).logits
    with torch.no_grad():
        made.union_scale.zero_()
        pair_part = made(**given).logits
        made.pair_scale.mul_(2)
        torch.testing.assert_close(made(**given).logits, 2 * pair_part)
        made.pair_scale.zero_()
        made.union_scale.fill_(SCALE)
        torch.testing.assert_close(pair_part + made(**given).logits, whole, atol=1e-5, rtol=1e-4)
        made.pair_scale.fill_(SCALE)
    made.language.register_forward_hook(lambda _, args, out: tuple(3 * part for part in out))
    torch.testing.assert_close(made(**given).logits, 3 * whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("count", "divisor"), [("all", 3), ("seen", 2)])
def test_the_divisor_with_hidden_classes(count: str, divisor: int) -> None:
    """Trap 14: "hold" has three classes, one of them hidden."""
    made = model(count=count).hide_([4]).train()
    assert float(made.verb_means()[1, 1]) == pytest.approx(1 / divisor)
    assert float(made.verb_means()[1, 4]) == 0
    kept = model(count=count, seen_columns=False).hide_([4]).train().verb_means()
    assert float(kept[1, 4]) > 0
    torch.testing.assert_close(made.eval().verb_means(), model().verb_means())


def test_leaving_training_restores_what_was_hidden() -> None:
    """Trap 19: (ride, bicycle) and both classes of "wash" are hidden, in training only."""
    made, given = model(dropout=0.0).hide_([0, 2, 8]), batch(((1, 0, 3),))
    full = made(**given).prior
    hidden = made.train()(**given).prior
    bicycle, cup = 0, 1  # what the two pairs are with
    assert [v for v in range(6) if full[0, bicycle, v] > 0] == [0, 1, 3]
    assert [v for v in range(6) if hidden[0, bicycle, v] > 0] == [1]
    assert [v for v in range(6) if hidden[0, cup, v] > 0] == [1, 5]
    assert torch.equal(made.eval()(**given).prior, full)
    assert torch.equal(made.hide_().train()(**given).prior > 0, full > 0)


def test_the_prior_is_sharper_outside_training() -> None:
    made, given = model(dropout=0.0), batch(((1, 0),))
    both = given["scores"][0].prod()
    assert float(made(**given).prior.max()) == pytest.approx(float(both**2.8))
    assert float(made.train()(**given).prior.max()) == pytest.approx(float(both))


def test_a_step_with_a_verb_whose_classes_are_all_hidden() -> None:
    """Trap 20: an unseen verb has no example, no text and no prior, and breaks nothing."""
    made, given = awake(count="seen").hide_([2, 8]).train(), batch()
    out = made(**given)
    assert (out.prior[..., 3] == 0).all() and (out.logits[..., 3] == 0).all()
    (out.logits.sigmoid() * out.prior).sum().backward()
    grads = [p.grad for p in made.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


def test_the_rest_of_a_batch_changes_nothing() -> None:
    """Trap 7: an image alone, and padded to the pairs and detections of others."""
    made = awake()
    given = batch(((1, 3), (1, 1, 1, 0, 2), ()))
    alone = {key: value[:1] for key, value in given.items()}
    alone |= {key: alone[key][:, :2] for key in ("boxes", "scores", "labels", "queries")}
    close(made(**alone), made(**given))
    junk = dict(given, boxes=given["boxes"].clone(), queries=given["queries"].clone())
    junk["boxes"][0, 2:] = torch.tensor([1.0, 2, 30, 31])
    junk["queries"][0, 2:] = 50
    close(made(**junk), made(**given))
    counted = dict(given, labels=given["labels"].clone())
    counted["labels"][0, 2:] = 0  # beyond `counts`, so not there
    close(made(**counted), made(**given))


def test_half_precision_is_near() -> None:
    """Boxes and scores come in float32, whatever the model computes in; the prior keeps that."""
    made, given = awake(), batch()
    with torch.no_grad():
        expected = made(**given)
        out = made.to(torch.bfloat16)(**given)
    assert out.logits.dtype == torch.bfloat16 and torch.equal(out.prior, expected.prior)
    assert (out.logits.float() - expected.logits).abs().max() < 0.05 * expected.logits.abs().max()


def test_isolated_pairs_do_not_see_other_pairs() -> None:
    """Trap 7: the query of detection 3 reaches pairs without it only through tokens of other pairs."""
    given = batch(((1, 0, 2, 3),))
    other = dict(given, queries=given["queries"].clone())
    other["queries"][0, 3] = batch(((1, 0, 2, 3),), seed=5)["queries"][0, 3]
    for isolate in (True, False):
        made = awake(isolate_pairs=isolate, attend_classes=True)
        change = (made(**given).logits - made(**other).logits).abs().amax(-1)[0]
        assert (change > 1e-4).tolist() == [not isolate, not isolate, True]


def test_attention_between_pairs_is_an_option() -> None:
    """Trap 6: by default each pair is a sequence of its own in its adapter."""
    ends = torch.randn(1, 4, 2 * D, generator=torch.Generator().manual_seed(0))
    moved = ends.clone()
    moved[0, 1:] += torch.randn(3, 2 * D, generator=torch.Generator().manual_seed(1))
    for attend in (False, True):
        adapter = awake(attend_classes=attend).img_adapter
        change = (adapter(ends) - adapter(moved)).abs().amax(-1)[0]
        assert (change > 1e-5).tolist() == [attend, True, True, True]


@pytest.mark.parametrize("labels", [((),), ((1,), ()), ((0, 2), (3,)), ((1,),)])
def test_images_without_pairs(labels: tuple[tuple[int, ...], ...]) -> None:
    made, given = awake().train(), batch(labels)
    out = made(**given)
    assert out.logits.shape == out.prior.shape == (len(labels), 0, 6)
    assert out.text.isfinite().all() and out.text.shape == (len(labels), 10, D)
    assert [len(found.scores) for found in made.triplets(out, given["labels"])] == [0] * len(labels)
    out.text.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


def test_triplets_are_all_pairs_with_all_interactions_of_their_object() -> None:
    made, given = awake(), batch()
    with torch.no_grad():
        out = made(**given)
    for b, found in enumerate(made.triplets(out, given["labels"])):
        expected = {}
        for m, (x, y) in enumerate(out.pairs[b].tolist()):
            for i, (verb, thing) in enumerate(INTERACTIONS):
                if x >= 0 and thing == int(given["labels"][b, y]):
                    expected[x, y, i] = float(out.logits[b, m, verb].sigmoid() * out.prior[b, m, verb])
        keys = [(*pair, i) for pair, i in zip(found.pairs.tolist(), found.interactions.tolist(), strict=True)]
        assert sorted(keys) == sorted(expected)
        assert found.scores.tolist() == pytest.approx([expected[key] for key in keys])
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_wrong_inputs_are_refused() -> None:
    made, given = model(), batch()

    def refused(words: str, **changed: Tensor) -> None:
        with pytest.raises(ValueError, match=words):
            made(**given | changed)

    refused(r"queries have shape \(2, 4, 8\).*\(2, 4, 256\)", queries=torch.zeros(2, 4, 8))
    refused(r"pixel_values have shape \(2, 3, 64, 64\).*32", pixel_values=torch.zeros(2, 3, 64, 64))
    refused("boxes have shape", boxes=given["boxes"][:, :3])
    refused("scores have shape", scores=given["scores"][:, :3])
    refused("object id 4.* 4 objects, 0 to 3", labels=torch.where(given["labels"] == 2, 4, given["labels"]))
    with pytest.raises(ValueError, match="interaction 10 is outside 0 … 9"):
        made.hide_([10])
    with pytest.raises(ValueError, match="all 10 interactions are hidden"):
        made.hide_(range(10))


def test_texts_of_another_table_or_width_are_refused() -> None:
    with pytest.raises(ValueError, match="needs the text features"):
        HolaModel(config())
    with pytest.raises(ValueError, match=r"width 12, the model's is 16"):
        HolaModel(config(), texts(width=12))
    with pytest.raises(ValueError, match=r"object 0 have shape \(2, 16\).*\(5, 16\)"):
        HolaModel(config(num_guides=[5, 3, 1, 2]), texts())
    with pytest.raises(ValueError, match="2 numbers for 4 objects"):
        HolaModel(config(num_guides=[1, 1]), texts())
    with pytest.raises(ValueError, match="no classes"):
        HolaModel(config(classes=None), texts())
