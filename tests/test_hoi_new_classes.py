"""Classes added to a trained model by their texts: what stays, what is coded, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy_hoi
from toy_hoi import unit

from rankfold.hoi.classes import ClassTable
from rankfold.hoi.decomposition import TextDecomposition
from rankfold.hoi.new_classes import with_classes

TABLE, TEXT = toy_hoi.table(), toy_hoi.texts()


def trained(**options: Any) -> Any:
    """A model none of whose parameters is as it started."""
    model = toy_hoi.model(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def larger() -> tuple[ClassTable, Any]:
    """Verbs and objects in another order, with a new one of each, and three new interactions."""
    verbs = ("chase", *reversed(TABLE.verbs))
    things = ("kite", *reversed(TABLE.objects))
    old = [(6 - verb, 4 - thing) for verb, thing in TABLE.interactions]
    table = ClassTable(verbs, things, ((0, 0), (0, 2), *old, (6, 2)))  # chase kite, chase dog, ride dog
    text = replace(
        TEXT,
        classes=torch.cat([unit(2, 16, seed=40), TEXT.classes, unit(1, 16, seed=41)]),
        actions=torch.cat([unit(1, 16, seed=42), TEXT.actions.flip(0)]),
        objects=torch.cat([unit(1, 16, seed=43), TEXT.objects[:-1].flip(0), TEXT.objects[-1:]]),
        guides=(unit(4, 16, seed=44), *reversed(TEXT.guides)),
    )
    return table, text


@pytest.mark.parametrize(
    "options", [{}, {"upstream": True}, {"form": "free"}, {"form": "frozen"}, {"tokens": False}]
)
def test_the_same_table_gives_the_same_model(options: dict[str, Any]) -> None:
    model = trained(**options)
    made, batch = with_classes(model, TABLE, TEXT), toy_hoi.batch()
    assert made is not model and not made.training
    with torch.no_grad():
        before, after = model(**batch), made(**batch)
    for name in ("logits", "prior", "pairs", "text", "pair_text"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, p in made.named_parameters() if not p.requires_grad}


def test_known_classes_keep_what_they_learned_and_new_ones_are_coded() -> None:
    model, (table, text) = trained(), larger()
    made = with_classes(model, table, text)
    old, new = model.language.decomposition, made.language.decomposition
    assert isinstance(new, TextDecomposition) and torch.equal(new.basis, old.basis)
    assert torch.equal(new.weights[2:12], old.weights)
    assert torch.equal(new.action_weights[1:], old.action_weights.flip(0))
    assert torch.allclose(new.weights[[0, 1, 12]], old.code(text.classes[[0, 1, 12]]), atol=1e-5)
    assert torch.allclose(new.action_weights[:1], old.code(text.actions[:1], actions=True), atol=1e-5)
    assert torch.equal(new.target, text.classes) and torch.equal(made.language.objects, text.objects)
    assert made.table == table and made.config.num_guides == [4, 2, 1, 3, 2]


def test_logits_of_verbs_without_a_new_class_stay() -> None:
    """With `attend=False` in the adapters of classes, and a mem_adapter that adds nothing, a verb's logit
    depends on its own classes alone; "ride" gains one. Object ids are those of the larger table."""
    model = trained()
    model.language.mem_adapter.reset_up_()
    made = with_classes(model, *larger())
    batch = toy_hoi.batch()
    moved = batch | {"labels": torch.where(batch["labels"] >= 0, 4 - batch["labels"], -1)}
    with torch.no_grad():
        before, after = model(**batch), made(**moved)
    logits, prior = (getattr(after, name)[..., 1:].flip(-1) for name in ("logits", "prior"))
    assert torch.allclose(logits[..., 1:], before.logits[..., 1:], atol=1e-5)
    assert not torch.allclose(logits[..., 0], before.logits[..., 0], atol=1e-3)
    assert torch.allclose(prior[..., 1:], before.prior[..., 1:])
    assert after.logits[..., 0].any() and after.prior[..., 0].any()  # chase, of which there is a dog


def test_few_entries() -> None:
    made = with_classes(trained(), *larger(), nonzeros=2)
    counts = (made.language.decomposition.weights != 0).sum(1)
    assert counts[[0, 1, 12]].tolist() == [2, 2, 2] and int(counts[2:12].min()) == 6


def test_it_is_saved_as_any_model(tmp_path: Any) -> None:
    made = with_classes(trained(), *larger())
    made.save_pretrained(tmp_path)
    back = type(made).from_pretrained(tmp_path).eval()
    batch = toy_hoi.batch()
    with torch.no_grad():
        assert torch.equal(made(**batch).logits, back(**batch).logits)


def test_what_does_not_fit() -> None:
    model, (table, text) = trained(), larger()
    fewer = replace(table, verbs=("chase", "read", *table.verbs[2:]))
    with pytest.raises(ValueError, match="lacks 1 of the model's verbs, 'no_interaction' first"):
        with_classes(model, fewer, text)
    fewer = replace(table, interactions=(*table.interactions[:2], *table.interactions[3:]))
    with pytest.raises(ValueError, match=r"lacks 1 of the model's interactions, \('ride', 'bicycle'\) first"):
        with_classes(model, fewer, text)
    with pytest.raises(ValueError, match="width 8, the model's is 16"):
        with_classes(model, TABLE, toy_hoi.texts(width=8))
    with pytest.raises(
        ValueError, match=r"known interactions differ from the model's by up to .* another encoder"
    ):
        with_classes(model, TABLE, toy_hoi.texts(seed=7))
    with pytest.raises(ValueError, match="nonzeros=9 of atoms=6"):
        with_classes(model, table, text, nonzeros=9)
