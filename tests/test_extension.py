"""A stranger's structure, method and recipe, in one file that nothing of ours knows.

The package is not installed: its folder is on the path, with the metadata that an installation would have
written.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rankfold import Metric, checkpoint, recipes
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.method import Method
from rankfold.structure import Structure, build
from rankfold.testing import check_host, check_method, check_structure

FOLDER = Path(__file__).parent.parent / "examples" / "third_party"
GROUP = "rankfold.recipes"


def install(folder: Path, name: str, entries: dict[str, str]) -> None:
    """Write the metadata of an installed distribution that offers `entries`."""
    info = folder / f"{name}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = [f"[{GROUP}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the metadata that `pip install examples/third_party` would write."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    install(tmp_path / "site", "rankfold_kronecker", project["entry-points"][GROUP])
    return tmp_path / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(site))
    forget()
    yield site
    forget()


def forget() -> None:
    sys.modules.pop("rankfold_kronecker", None)
    Structure.kinds.pop("kronecker", None)
    Method.kinds.pop("kronecker_svd", None)
    importlib.invalidate_caches()


@pytest.fixture
def theirs(installed: Path) -> ModuleType:
    return importlib.import_module("rankfold_kronecker")


def test_it_appears_among_the_recipes(installed: Path) -> None:
    assert "rankfold_kronecker" not in sys.modules
    assert recipes.available()["kronecker"].paper == "Van Loan & Pitsianis 1993"
    assert recipes.get("kronecker").method.kind == "kronecker_svd"
    with pytest.raises(ValueError, match="Did you mean 'kronecker'"):
        recipes.get("kroneker")


def test_a_spec_finds_its_structure_without_an_import(installed: Path) -> None:
    assert "kronecker" not in Structure.kinds
    spec = {"kind": "kronecker", "shape": [6, 4], "left": [2, 2], "terms": 2}
    assert build(spec, device="meta").spec() == spec


@pytest.mark.parametrize(
    ("shape", "left", "terms"), [((12, 20), (3, 4), 3), ((7, 1), (7, 1), 1), ((1, 9), (1, 3), 2)]
)
def test_its_structure_obeys_the_laws(theirs: ModuleType, shape: Any, left: Any, terms: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_structure(
            theirs.Kronecker(shape, left=left, terms=terms, dtype=dtype), compile=shape == (12, 20)
        )


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7, 5), (9, 9), (1, 9)])
def test_its_method_obeys_the_laws(theirs: ModuleType, shape: tuple[int, int]) -> None:
    check_method(theirs.KroneckerSVD(), shape, metrics={"plain": Metric()}, best=True)


def test_the_hosts_take_its_structure(theirs: ModuleType) -> None:
    linear, x = torch.nn.Linear(20, 12), torch.randn(3, 20)
    check_host(linear, x, structure=theirs.Kronecker((12, 20), left=(3, 4), terms=2))
    conv, images = torch.nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 6)
    check_host(conv, images, structure=theirs.Kronecker((6, 36), left=(2, 6), terms=2))
    check_host(conv, images, spatial=True, structure=theirs.Kronecker((18, 12), left=(3, 3), terms=2))
    check_host(
        torch.nn.Embedding(12, 20),
        torch.arange(5),
        structure=theirs.Kronecker((12, 20), left=(3, 4), terms=2),
    )


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
assert not [name for name in sys.modules if name.startswith("rankfold_")]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(torch.load(sys.argv[2], weights_only=True)).logits
torch.save(logits, sys.argv[3])
print(type(model.model.layers[0].self_attn.q_proj.weight).__name__)
"""


def test_it_saves_and_reloads_in_a_fresh_process_through_plain_transformers(
    theirs: ModuleType, installed: Path, tmp_path: Path, tiny_llama: Any
) -> None:
    model, ids = tiny_llama(), torch.randint(4, 128, (2, 9))
    report = factorize_(model, recipes.get("kronecker"), budget=0.5)
    assert report.reached <= 0.5 and {row.structure for row in report.layers} == {"kronecker"}
    with torch.no_grad():
        logits = model(ids).logits
    checkpoint.save(model, tmp_path / "out", report=report)
    checkpoint.verify(model, tmp_path / "out", {"input_ids": ids})
    torch.save(ids, tmp_path / "ids.pt")
    path = os.pathsep.join([str(FOLDER), str(installed)])
    arguments = [str(tmp_path / name) for name in ("out", "ids.pt", "logits.pt")]
    run = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["Kronecker"]
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits)


def test_a_plain_module_reloads_too(theirs: ModuleType, tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 12))

    model, x = make(), torch.randn(3, 12)
    factorize_(model, recipes.get("kronecker"), budget=0.6)
    assert hosts(model)
    checkpoint.save(model, tmp_path / "out")
    forget()  # as in a process that has not imported the package
    again = checkpoint.load_(make(), tmp_path / "out")
    assert torch.equal(again(x), model(x))


def test_where_it_is_not_installed_the_error_says_so(
    theirs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(12, 20))
    factorize_(model, recipes.get("kronecker"), budget=0.6)
    checkpoint.save(model, tmp_path / "out")
    forget()
    monkeypatch.setattr(
        sys, "path", [p for p in sys.path if p != str(FOLDER) and not p.startswith(str(tmp_path))]
    )
    with pytest.raises(
        ValueError, match=r"Unknown structure 'kronecker'.*Import the package that defines it"
    ):
        checkpoint.load_(torch.nn.Sequential(torch.nn.Linear(12, 20)), tmp_path / "out")


def test_a_broken_package_does_not_take_the_others_with_it(installed: Path, tmp_path: Path) -> None:
    install(installed, "broken", {"shattered": "no_such_module:recipe"})
    install(installed, "odd", {"number": "math:pi"})
    importlib.invalidate_caches()
    with pytest.warns(UserWarning, match="recipe 'shattered' .*does not load"):
        known = recipes.available()
    assert {"svd", "kronecker"} <= set(known) and not {"shattered", "number"} & set(known)


def test_ours_cannot_be_shadowed(installed: Path) -> None:
    install(installed, "pirate", {"svd": "rankfold_kronecker:kronecker"})
    importlib.invalidate_caches()
    assert recipes.get("svd") is recipes.svd
