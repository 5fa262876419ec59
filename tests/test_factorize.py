"""The pipeline: budgets kept, bad input refused before any work, a model that an error leaves as it was."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankfold import SVD, Activation, Metric, Recipe, Report, allocate, recipes, select
from rankfold.factorize import calibrate, factorize_
from rankfold.hosts import hosts
from rankfold.method import DecompositionError


def tower(width: int = 24) -> nn.Sequential:
    layers = [nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
    return nn.Sequential(*layers)


def data() -> list[tuple[Tensor, Tensor]]:
    x, y = torch.randn(40, 16), torch.randint(10, (40,))
    return list(zip(x.split(8), y.split(8), strict=True))


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return (
        not hosts(model)
        and set(state) == set(before)
        and all(torch.equal(state[k], v) for k, v in before.items())
    )


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


@settings(max_examples=12)
@given(
    st.floats(0.3, 1.0),
    st.sampled_from(["nbytes", "params", "macs"]),
    st.sampled_from(["svd", "svd_llm", "kfac"]),
)
def test_the_budget_is_kept_and_the_report_tells_the_truth(budget: float, unit: str, name: str) -> None:
    torch.manual_seed(0)
    model = tower()
    dense = copy.deepcopy(model)
    report = factorize_(model, recipes.get(name), budget=budget, batches=data(), unit=unit)
    assert report.reached <= budget and report.reached >= 0.85 * budget
    assert report.budget == budget and report.unit == unit
    assert report.totals["model_after"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert report.totals["params_after"] == sum(p.numel() for p in model.parameters())
    matrices = [m for m in dense if isinstance(m, nn.Linear)]
    assert report.totals["selected_before"] == sum(m.weight.nbytes for m in matrices)
    for row in report.layers:
        module = model.get_submodule(row.name)
        if row.size is None:
            assert row.note.startswith("stays dense") and isinstance(module, nn.Linear)
        else:
            assert row.spec == module.weight.spec() and row.bytes_after == module.weight.nbytes
            assert row.macs_after == module.weight.macs
    assert sum(row.loss_share for row in report.layers) == pytest.approx(1 if budget < 1 else 0, abs=1)
    again = Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)))
    assert again.to_json() == report.to_json()


def test_errors_in_the_report_are_those_after_the_cast() -> None:
    model = tower().bfloat16()
    weights = {name: layer.matrix().clone() for name, layer in select(model).items()}
    report = factorize_(model, recipes.svd, budget=0.5)
    for row in report.layers:
        left = weights[row.name].double() - model.get_submodule(row.name).weight.to_dense().detach().double()
        # to_dense in bfloat16 rounds once more, hence not exactly
        assert row.error == pytest.approx(float(left.square().sum()), rel=0.02)
        assert row.relative_error == pytest.approx(
            math.sqrt(row.error / float(weights[row.name].double().square().sum()))
        )
        assert model.get_submodule(row.name).weight.dtype == torch.bfloat16


def test_a_full_budget_changes_nothing() -> None:
    model, before = (m := tower()), snapshot(m)
    report = factorize_(model, recipes.svd)
    assert unchanged(model, before)
    assert report.reached == 1.0 and all(row.size is None and row.error == 0 for row in report.layers)


class Watched:
    """Batches that remember whether anybody looked."""

    def __init__(self) -> None:
        self.touched = False

    def __iter__(self) -> Iterator[Any]:
        self.touched = True
        return iter(data())


@pytest.mark.parametrize("budget", [0, -0.5, 1.0001, 80, math.nan, math.inf, True, "0.5", None, [0.5]])
def test_budgets_that_are_no_fraction(budget: Any) -> None:
    model, before, batches = (m := tower()), snapshot(m), Watched()
    with pytest.raises(
        ValueError, match=r"budget=.* is the fraction of nbytes kept, a number above 0 and at most 1"
    ):
        factorize_(model, recipes.svd_llm, budget=budget, batches=batches)
    assert unchanged(model, before) and not batches.touched


@pytest.mark.parametrize("unit", ["nbytes", "params", "macs"])
def test_a_budget_below_the_smallest_size_names_both_and_costs_nothing(unit: str) -> None:
    model, before, batches = (m := tower()), snapshot(m), Watched()
    with pytest.raises(
        ValueError, match=r"budget=0\.01 is below the smallest possible 0\.\d+ .*alone needs 0\.\d+"
    ) as told:
        factorize_(model, recipes.svd_llm, budget=0.01, batches=batches, unit=unit)
    assert unchanged(model, before) and not batches.touched
    # What the message calls possible is possible.
    smallest = float(str(told.value).split("smallest possible ")[1].split()[0])
    assert factorize_(model, recipes.svd_llm, budget=smallest, batches=batches, unit=unit).reached <= smallest


def test_other_bad_arguments_come_before_the_data() -> None:
    model, before = (m := tower()), snapshot(m)
    bad: list[tuple[dict[str, Any], str]] = [
        (
            {"unit": "flops"},
            r"unit='flops' is not a unit of cost; choose one of \('nbytes', 'params', 'macs'\)",
        ),
        ({"targets": ["9"]}, "No layer matches '9'"),
        ({"skip": ["*"]}, "no layer is left"),
        ({"conv": "both"}, "conv='both'"),
    ]
    for options, says in bad:
        batches = Watched()
        with pytest.raises(ValueError, match=says):
            factorize_(model, recipes.svd_llm, budget=0.5, batches=batches, **options)
        assert unchanged(model, before) and not batches.touched


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["2.weight", "0.bias"])
def test_weights_that_are_not_finite_are_named(bad: float, name: str) -> None:
    model, batches = tower(), Watched()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = bad
    with pytest.raises(ValueError, match=rf"tensor '{name}' of shape .* holds 1 NaN or infinite"):
        factorize_(model, recipes.svd_llm, budget=0.5, batches=batches)
    assert not batches.touched and not hosts(model)


def test_buffers_may_be_infinite_but_not_nan() -> None:
    model = tower()
    model.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    factorize_(model, recipes.svd, budget=0.5)
    model = tower()
    model.register_buffer("mean", torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="tensor 'mean'"):
        factorize_(model, recipes.svd, budget=0.5)


def test_a_model_without_weights_yet() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device"):
        factorize_(tower().to("meta"), recipes.svd, budget=0.5)


@pytest.mark.parametrize("name", ["svd_llm", "weighted", "kfac", "asvd", "fwsvd"])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_dead_inputs_and_too_few_tokens(name: str, rows: int) -> None:
    """All-zero and rank-deficient moments are ordinary: the budget is met and every number is finite."""
    model = tower()
    x = torch.randn(rows, 16) if rows else torch.zeros(4, 16)
    with torch.no_grad():
        model[0].bias.zero_()  # with x = 0, the second layer sees zeros only
    report = factorize_(
        model, recipes.get(name), budget=0.5, batches=[(x, torch.zeros(len(x), dtype=torch.long))]
    )
    assert report.reached <= 0.5 and len(hosts(model)) >= 2
    assert all(math.isfinite(row.error) and math.isfinite(row.relative_error) for row in report.layers)
    assert torch.isfinite(model(torch.randn(5, 16))).all()


def broken(*args: Any, **kwargs: Any) -> Any:
    raise torch.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize("name", ["svd_llm", "kfac"])
def test_a_failing_solver_is_replaced_and_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = tower(), data()
    twin = copy.deepcopy(model)
    factorize_(twin, recipes.get(name), budget=0.5, batches=batches)
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    report = factorize_(model, recipes.get(name), budget=0.5, batches=batches)
    assert any("falling back to a singular value decomposition" in warning for warning in report.warnings)
    x = torch.randn(6, 16)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["svd_llm", "kfac"])
def test_when_every_solver_fails_the_model_is_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = (m := tower()), snapshot(m)
    for solver in ("eigh", "eigvalsh", "svd"):
        monkeypatch.setattr(torch.linalg, solver, broken)
    with pytest.raises(DecompositionError, match=r"layer '0'.*no layer was replaced"):
        factorize_(model, recipes.get(name), budget=0.5, batches=data())
    assert unchanged(model, before)


@pytest.mark.parametrize("stage", ["calibrate", "measure", "factorize"])
def test_an_interrupt_leaves_the_model_as_it_was(stage: str) -> None:
    model, before = (m := tower().train()), snapshot(m)
    model[2].weight.requires_grad_(False)
    stages = []

    def interrupt(at: str, done: int, total: int | None) -> None:
        stages.append(at)
        if at == stage and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        factorize_(model, recipes.kfac, budget=0.5, batches=data(), progress=interrupt)
    assert stages[-1] == stage and unchanged(model, before)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    factorize_(model, recipes.kfac, budget=0.5, batches=data())  # and it can be tried again


def test_progress_runs_to_its_end() -> None:
    seen: dict[str, list[tuple[int, int | None]]] = {}
    factorize_(
        tower(),
        recipes.svd_llm,
        budget=0.5,
        batches=data(),
        progress=lambda at, *n: seen.setdefault(at, []).append(n),
    )
    assert list(seen) == ["calibrate", "measure", "factorize"]
    assert all(steps == [(i, len(steps) - 1) for i in range(len(steps))] for steps in seen.values())


def test_mode_and_trainability_carry_over() -> None:
    model = tower().train()
    model[2].eval()
    model[2].weight.requires_grad_(False)
    factorize_(model, recipes.svd_llm, budget=0.5, batches=data())
    assert [model[i].training for i in (0, 2, 4)] == [True, False, True]
    assert all(p.requires_grad for p in model[0].parameters())
    assert not any(p.requires_grad for p in model[2].weight.parameters()) and model[2].bias.requires_grad


def test_metrics_can_be_kept_and_used_again() -> None:
    one, batches = tower(), data()
    two = copy.deepcopy(one)
    layers = select(one)
    metrics = calibrate(one, recipes.kfac, layers, batches)
    factorize_(one, recipes.kfac, budget=0.5, metrics=metrics)
    factorize_(two, recipes.kfac, budget=0.5, batches=batches)
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )


def test_metrics_of_another_model_are_refused() -> None:
    model, before = (m := tower()), snapshot(m)
    metrics = calibrate(wide := tower(20), recipes.svd_llm, select(wide), data())
    with pytest.raises(ValueError, match=r"layer '[24]': the metric's right side has shape \(20, 20\)"):
        factorize_(model, recipes.svd_llm, budget=0.5, metrics=metrics)
    assert unchanged(model, before)


def test_layers_that_never_ran_stay_dense_and_say_so() -> None:
    model = tower()
    model.add_module("5", nn.Identity())
    model[5].idle = nn.Linear(16, 16)
    report = factorize_(model, recipes.svd_llm, budget=0.8, batches=data())
    row = next(row for row in report.layers if row.name == "5.idle")
    assert row.size is None and row.note == "stays dense: it never ran on the calibration data"
    assert report.reached <= 0.8


def test_layers_too_small_to_gain_stay_dense_and_say_so() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
    report = factorize_(model, recipes.svd, budget=0.8)
    assert [row.note for row in report.layers][1] == "stays dense: no size of the method is smaller"


def test_adding_errors_of_a_one_sided_metric_is_called_out() -> None:
    mixed = Recipe("mixed", SVD(), Activation(), allocate.lagrangian)
    assert any(
        "not in the unit of the loss" in w
        for w in factorize_(tower(), mixed, budget=0.5, batches=data()).warnings
    )
    assert not factorize_(tower(), recipes.weighted, budget=0.5, batches=data()).warnings


def test_the_allocator_is_believed_by_the_report() -> None:
    model = tower()
    report = factorize_(model, recipes.kfac, budget=0.6, batches=data())
    told = report.allocation
    assert (
        told["allocator"] == "lagrangian"
        and told["cost"] == report.totals["selected_after"] <= told["budget"]
    )
    # In float64 before the cast, here in float32 after it.
    assert told["error"] == pytest.approx(sum(row.error for row in report.layers), rel=1e-3)
    assert 0 <= told["bound"] <= told["error"] and told["gap"] == pytest.approx(
        1 - told["bound"] / told["error"]
    )


def test_more_data_in_the_metric_is_less_error_in_the_output() -> None:
    """The point of it all: on the calibration data, `svd_llm` beats `svd` at the same bytes."""
    model, batches = tower(), data()
    x = torch.cat([x * torch.logspace(0, -2, 16) for x, _ in batches])
    truth, lost = model(x), {}
    for name in ("svd", "svd_llm"):
        twin = copy.deepcopy(model)
        factorize_(twin, recipes.get(name), budget=0.5, batches=[x], targets=["0"])
        lost[name] = float((twin(x) - truth).detach().square().sum())
    assert lost["svd_llm"] < lost["svd"]


def test_a_recipe_is_a_value() -> None:
    coarse = dataclasses.replace(recipes.svd, name="coarse", method=SVD(multiple=4))
    report = factorize_(tower(), coarse, budget=0.6)
    assert all(row.size % 4 == 0 for row in report.layers if row.size)
    assert report.recipe["name"] == "coarse" and report.recipe["method"] == {"kind": "svd", "multiple": 4}
    assert Metric() != Metric()  # metrics hold tensors and compare by identity
