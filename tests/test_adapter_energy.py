"""Which band gets how much: energy of a weight, of an expected gradient, and of targets of known shape."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rankfold import KFAC, recipes
from rankfold.factorize import factorize_
from rankfold.methods import PiSSA, WaRA
from rankfold.metric import Metric
from rankfold.structures import LowRank
from rankfold.wavelet import Wavelet
from rankfold.wavelet_bands import count, energies, energy_ranks, equal_ranks, nearest
from rankfold.wavelet_transform import filters

IDS = torch.arange(4, 28).view(2, 12)
MATRICES = Path(__file__).parent.parent / "benchmarks" / "wara_matrices.py"


def test_energy_gives_ranks_to_the_bands_that_have_it() -> None:
    torch.manual_seed(0)
    steps = torch.linspace(0, 3, 32, dtype=torch.float64)
    smooth = torch.stack([torch.sin(steps * (k + 1) + k) for k in range(8)])
    update = (smooth.mT @ torch.randn(8, 8, dtype=torch.float64)) @ smooth
    taps = filters("db1")
    budget = count(equal_ranks(4, 1), (32, 32))
    ranks = energy_ranks(energies(update, taps, 1), (32, 32), budget)
    assert ranks["LL1"] > 4 and count(ranks, (32, 32)) <= budget
    errors = [
        float((nearest(update, r, taps).to_dense() - update).detach().norm())
        for r in (ranks, equal_ranks(4, 1))
    ]
    assert errors[0] < errors[1]
    spectra = energies(update, taps, 1)
    best = sum(float(values[ranks.get(band, 0) :].sum()) for band, values in spectra.items())
    assert errors[0] ** 2 == pytest.approx(best, rel=1e-6, abs=1e-18)
    fitted = WaRA(4, alpha=8, bands="energy").fit(update, Metric(), 4).added[0]
    assert isinstance(fitted, Wavelet) and fitted.scale == 2.0, "alpha / rank, whatever a band's own rank is"
    assert {band: held.rank for band, held in fitted.active().items()} == ranks  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="a budget of 3 numbers pays for no band"):
        energy_ranks(spectra, (32, 32), 3)


def test_energy_of_the_expected_gradient(tiny_llama: Callable[..., Any]) -> None:
    method = WaRA(4, bands="energy", of="gradient")
    with pytest.raises(ValueError, match=r"layer .*q_proj.*reads the expected gradient"):
        factorize_(tiny_llama(), replace(recipes.wara, method=method))
    model = tiny_llama()
    before = model(IDS).logits
    report = factorize_(model, replace(recipes.wara, method=method, metric=KFAC()), batches=IDS)
    assert torch.equal(model(IDS).logits, before)
    ranks = [row.spec["terms"][1]["bands"] for row in report.layers if row.spec]
    assert any(len({band["rank"] for band in bands.values()}) > 1 or len(bands) < 4 for bands in ranks)
    assert all(
        f"LL1 {bands['LL1']['rank']}" in row.note for row, bands in zip(report.layers, ranks, strict=True)
    )
    assert all(
        row.size == sum(b["rank"] for b in bands.values())
        for row, bands in zip(report.layers, ranks, strict=True)
    )
    # With the moments of a rank-one gradient the energies are those of that very gradient.
    g, x = torch.randn(8, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    ranks = method.sized(
        torch.zeros(8, 12, dtype=torch.float64), Metric(torch.outer(g, g), torch.outer(x, x))
    )
    spectra = energies(torch.outer(g, x), filters("db1"), 1)
    assert max(spectra, key=lambda band: float(spectra[band][0])) in ranks


def test_pissa_holds_the_principal_part() -> None:
    weight = torch.randn(16, 12)
    fitted = PiSSA(3, alpha=6.0).fit(weight, Metric(), 3)
    term = fitted.added[0]
    assert isinstance(term, LowRank) and term.scale == 2.0
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(term.to_dense(), (u[:, :3] * s[:3]) @ v[:3], atol=1e-5, rtol=1e-5)
    assert torch.linalg.matrix_rank(fitted.base.to_dense(), atol=1e-4) == 9


@pytest.mark.skipif(not MATRICES.exists(), reason="benchmarks are not in the source distribution")
def test_the_matrix_study_is_in_the_order_of_the_paper_s_page() -> None:
    """At one parameter count: low rank wins what is of low rank, energy what is smooth, nobody noise."""
    spec = importlib.util.spec_from_file_location("wara_matrices", MATRICES)
    assert spec is not None and spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    table = study.run(2)
    for seed in range(2):
        row = {name: [values[seed] for values in columns.values()] for name, columns in table.items()}
        lora, equal, energy = row["exact rank 8"][:3]
        assert lora < 1e-6 < 0.3 < energy <= equal
        lora, equal, energy = row["white noise"][:3]
        assert max(lora, equal, energy) - min(lora, equal, energy) < 0.01 and energy <= equal
        lora, equal, energy = row["smooth random field"][:3]
        assert energy < lora < equal
        lora, equal, energy = row["sparse blocks"][:3]
        assert lora < energy < equal
        assert max(row["M ⊗ I₂, rank(M) = 4"][:3]) < 1e-6
