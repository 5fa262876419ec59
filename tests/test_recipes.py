"""Recipes: named, comparable, JSON and back, and an error that knows the nearest name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from rankfold import SVD, Activation, Frobenius, Recipe, allocate, recipes
from rankfold.factorize import factorize_

NAMES = """asvd basis_sharing best codes compot cospadi cospadi_grouped dsformer fwsvd kfac rocket svd svd_llm
weighted""".split()


def test_what_ships() -> None:
    assert sorted(name for name in recipes.available() if name in NAMES) == NAMES
    for name in NAMES:
        recipe = recipes.get(name)
        assert recipe is getattr(recipes, name) and recipe.name == name and recipe.summary


@pytest.mark.parametrize("name", NAMES)
def test_json_and_back(name: str) -> None:
    recipe = recipes.get(name)
    data = json.loads(json.dumps(recipe.to_json(), allow_nan=False))
    again = Recipe.from_json(data)
    assert again.to_json() == data
    for part in ("name", "method", "metric", "allocate", "paper", "groups"):
        assert getattr(again, part) == getattr(recipe, part)


def test_options_survive_json() -> None:
    recipe = Recipe("mine", SVD(multiple=8), Activation("scalar", 0.5, 0.01), allocate.knapsack)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_factorizes_a_language_model(name: str, tiny_llama) -> None:
    model, ids = tiny_llama(), torch.randint(4, 128, (4, 16))
    report = factorize_(model, recipes.get(name), budget=0.6, batches=ids)
    assert 0.5 < report.reached <= 0.6
    assert report.recipe["name"] == name
    assert all(row.error >= 0 and math.isfinite(row.relative_error) for row in report.layers)
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("svdllm", r"Unknown recipe 'svdllm'\. Did you mean 'svd_llm'"),
        ("fwsdv", "Did you mean 'fwsvd'"),
        ("zzzzzz", r"Unknown recipe 'zzzzzz'\. Known: asvd, basis_sharing"),
        ("", "Unknown recipe ''"),
        ("lagrangian", "Unknown recipe"),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        recipes.get(name)


GOOD = Recipe("svd", SVD(), Frobenius(), allocate.uniform).to_json()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "a recipe in JSON has"),
        ([1], "a recipe in JSON has"),
        ({"name": "svd"}, "a recipe in JSON has"),
        ({**GOOD, "allocate": "greedy"}, r"Unknown allocator 'greedy'; known: \['energy'"),
        ({**GOOD, "allocate": ["uniform"]}, "Unknown allocator"),
        ({**GOOD, "method": {"kind": "magic"}}, r"Unknown method 'magic'; known: .*'svd'"),
        ({**GOOD, "method": "svd"}, "a method in JSON is an object with 'kind'"),
        ({**GOOD, "method": {"kind": "svd", "depth": 2}}, r"method 'svd' has no options \['depth'\]"),
        ({**GOOD, "method": {"kind": "svd", "multiple": -4}}, "SVD\\(multiple=-4\\)"),
        ({**GOOD, "metric": {"kind": "activation", "shrink": 2}}, "must lie in"),
        ({**GOOD, "metric": {"kind": ["fisher"]}}, "a metric in JSON"),
    ],
)
def test_damaged_json(data: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Recipe.from_json(data)


@pytest.mark.parametrize("name", sorted({*NAMES} - {"svd", "dsformer"}))
def test_recipes_that_calibrate_ask_for_data(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=rf"recipe '{name}' calibrates on data .* but batches is None"):
        factorize_(model, recipes.get(name), budget=0.9)
