"""The language branch: what it computes, who sees whom, what learns, and its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toy_hoi
from torch.nn import functional as F
from toy_hoi import unit

from rankfold.hoi.classes import ClassTable
from rankfold.hoi.decomposition import TextDecomposition, TextTable
from rankfold.hoi.language import LanguageBranch

TABLE, D = toy_hoi.table(), toy_hoi.D


def branch(text: Any = None, adapted: bool = True, **options: Any) -> LanguageBranch:
    """With texts, and with adapters that add something."""
    made = LanguageBranch(toy_hoi.config(**options), text or toy_hoi.texts(), TABLE)
    for adapter in (made.self_adapter, made.mem_adapter, made.ho_fuse):
        if adapted:
            torch.nn.init.normal_(adapter.up.weight, std=0.1)
    return made.eval()


@pytest.mark.parametrize("form", ["decomposed", "free", "frozen"])
def test_adapters_add_nothing_at_the_start(form: str) -> None:
    """Th = W B, or T; Tho = [a ; o] with a of unit norm and o as the encoder gave it (trap 13)."""
    made, text = branch(adapted=False, form=form), toy_hoi.texts()
    features, pairs = made(unit(3, D))
    assert features.shape == (3, 10, D) and pairs.shape == (3, 10, 2 * D)
    expected = text.classes
    if form == "decomposed":
        assert isinstance(made.decomposition, TextDecomposition)
        expected = made.decomposition.weights @ made.decomposition.basis
    assert torch.allclose(features, expected.expand(3, -1, -1))
    assert torch.equal(pairs[..., D:], text.objects[TABLE.object_of].expand(3, -1, -1))
    assert not torch.allclose(pairs[..., D:].norm(dim=-1), torch.ones(3, 10), atol=0.1)
    assert torch.allclose(pairs[..., :D].norm(dim=-1), torch.ones(3, 10))
    actions = made.decomposition.action_features()
    for interaction, (verb, _) in enumerate(TABLE.interactions):
        assert torch.equal(pairs[0, interaction, :D], actions[verb])


def test_features_follow_the_image_and_pairs_do_not() -> None:
    made = branch()
    images = unit(3, D)
    features, pairs = made(images)
    assert not torch.allclose(features[0], features[1])
    assert pairs.stride(0) == 0
    for b in range(3):
        assert torch.allclose(features[b], made(images[b : b + 1])[0][0], atol=1e-6)


def test_a_context_of_many_vectors() -> None:
    made, images = branch(), unit(2, D)
    one = made(images)[0]
    assert torch.allclose(made(images.unsqueeze(1))[0], one, atol=1e-6)
    assert torch.allclose(made(images.unsqueeze(1).expand(-1, 4, -1))[0], one, atol=1e-6)
    assert not torch.allclose(made(torch.stack([images, images.flip(0)], 1))[0], one, atol=1e-3)


@pytest.mark.parametrize("dead", [False, True])
def test_classes_see_each_other_in_mem_adapter_and_elsewhere_only_if_asked(dead: bool) -> None:
    """Trap 6. Feature 0 before mem_adapter, and of its pair, when the texts of all other classes change."""
    text, other = toy_hoi.texts(), toy_hoi.texts(seed=9)
    for attend in (False, True):
        torch.manual_seed(0)
        made = branch(text, form="frozen", attend_classes=attend, dead=dead)
        changed = branch(other, form="frozen", attend_classes=attend, dead=dead)
        adapters = {k: v for k, v in made.state_dict().items() if "adapter" in k or "fuse" in k}
        changed.load_state_dict(adapters, strict=False)
        with torch.no_grad():  # class 0 is "ride bicycle": its own texts are equal in both
            changed.decomposition.target[0] = made.decomposition.target[0]
            changed.decomposition.action_target[0] = made.decomposition.action_target[0]
            changed.objects[0] = made.objects[0]
            states, others = (
                m.self_adapter(m.decomposition.class_features().unsqueeze(0)) for m in (made, changed)
            )
        assert torch.allclose(states[0, 0], others[0, 0], atol=1e-6) != attend
        assert torch.allclose(made.pair_features()[0, 0], changed.pair_features()[0, 0], atol=1e-6) != attend
        image = unit(1, D)
        assert not torch.allclose(made(image)[0][0, 0], changed(image)[0][0, 0], atol=1e-5)


def test_every_parameter_but_the_basis_learns_from_the_task() -> None:
    """Traps 3 and 5: after one backward each has a gradient, and B, which learns from what reconstructs T,
    has none; with the dead parameters of the public code those have none either."""
    for options, without in (
        ({}, {"decomposition.classes.right.weight"}),
        ({"attend_classes": True}, {"decomposition.classes.right.weight"}),
        ({"trains": "both"}, set()),
        ({"form": "free"}, set()),
        ({"form": "frozen"}, set()),
    ):
        made = branch(**options)
        features, pairs = made(unit(2, D))
        (features.square().sum() + pairs.sin().sum()).backward()
        assert {
            n for n, p in made.named_parameters() if p.grad is None or not p.grad.isfinite().all()
        } == without
    dead = branch(dead=True)
    sum(x.sin().sum() for x in dead(unit(2, D))).backward()  # type: ignore[union-attr]
    unused = {n for n, p in dead.named_parameters() if p.grad is None} - {
        "decomposition.classes.right.weight"
    }
    assert unused == {n for n, _ in dead.named_parameters()} - {n for n, _ in branch().named_parameters()}
    assert {n.split(".")[1] for n in unused} == {"read", "self_attention", "cross_attention"}


@pytest.mark.parametrize(
    ("width", "decomposed", "adapters"), [(512, 84_568, 413_568), (768, 102_744, 545_152)]
)
def test_parameters_of_hico(width: int, decomposed: int, adapters: int) -> None:
    """The page's counts, of the public code, and those of the default, which leaves out what is dead."""
    verbs = tuple(f"v{i}" for i in range(117))
    things = ("person", *(f"o{i}" for i in range(79)))
    table = ClassTable(verbs, things, tuple((i % 117, i % 80) for i in range(600)))
    sizes = {"bottleneck": 64, "ffn": 128, "context_hidden": 128, "rank": 71, "projection_dim": width}

    def counts(**options: Any) -> list[int]:
        with torch.device("meta"):
            made = LanguageBranch(toy_hoi.config(**sizes, **options), None, table)
        parts = (made.decomposition, made.self_adapter, made.mem_adapter, made.ho_fuse)
        return [sum(p.numel() for p in part.parameters()) for part in parts]

    first, lone, mem, fuse = counts(upstream=True)
    assert (first, lone + mem) == (decomposed, adapters)
    unused, query_and_key = width * 128 + 128 + 24_768, 2 * 2 * (64 * 64 + 64)
    assert counts() == [
        decomposed,
        lone - unused - query_and_key,
        mem,
        fuse - unused - width * 128 - query_and_key,
    ]
    assert counts(form="free")[0] == 717 * width and counts(form="frozen")[0] == 0


def test_a_state_dict_is_everything() -> None:
    made = branch()
    with torch.device("meta"):
        empty = LanguageBranch(toy_hoi.config(), None, TABLE)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(made.state_dict(), assign=True)
    assert not any(buffer.is_meta for buffer in empty.buffers())
    for mine, theirs in zip(made(unit(2, D)), empty(unit(2, D)), strict=True):
        assert torch.equal(mine, theirs)


def test_other_texts_are_refused() -> None:
    narrow = toy_hoi.texts(width=8)
    with pytest.raises(ValueError, match=r"object features have shape \(5, 8\), the model \(5, 16\)"):
        branch(narrow)
    more = ClassTable(TABLE.verbs, TABLE.objects, (*TABLE.interactions, (0, 2)))
    made = branch(adapted=False)
    before = made.objects.clone()
    with pytest.raises(ValueError, match=r"class features have shape \(11, 16\), the model \(10, 16\)"):
        made.start_(toy_hoi.texts(classes=more, seed=4))
    assert torch.equal(made.objects, before)
    with pytest.raises(ValueError, match="form"):
        branch(form="dense")


def test_frozen_texts_hold_no_parameter() -> None:
    made = branch(form="frozen")
    assert isinstance(made.decomposition, TextTable)
    assert not list(made.decomposition.parameters())
    assert torch.allclose(made.decomposition.action_features(), F.normalize(toy_hoi.texts().actions, dim=-1))
