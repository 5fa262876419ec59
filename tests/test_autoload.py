"""Fresh processes: a folder of ours opens in plain transformers with no import of ours, and what happens
where that door has been shut."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rankfold
from rankfold import autoload
from rankfold.card import card

LOAD = """
import json, sys
{before}
import torch
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file

expected = load_file(sys.argv[2])

def load(folder):
    quiet = "rankfold.hf" not in sys.modules
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    kind = type(model.model.layers[0].mlp.down_proj).__module__
    equal = [key for key, value in expected.items() if torch.equal(value, logits)]
    print(json.dumps({{"equal": equal, "kind": kind, "quiet": quiet, "ours": "rankfold.hf" in sys.modules}}))

{body}
"""


@pytest.fixture(scope="module")
def written(tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` (factorized), `dense` (made dense again) and the logits that each has here."""
    folder = tmp_path_factory.mktemp("autoload")
    model = tiny_llama()
    ids = torch.arange(24).view(2, 12)
    report = rankfold.factorize_(model, rankfold.recipes.svd, budget=0.6)
    rankfold.save(model, folder / "model", report=report)
    with torch.no_grad():
        expected = {"ids": ids, "model": model(ids).logits}
        rankfold.save(rankfold.to_dense_(model), folder / "dense")
        expected["dense"] = model(ids).logits
    torch.testing.assert_close(expected["model"], expected["dense"], atol=1e-5, rtol=1e-4)
    save_file(expected, folder / "expected")
    return folder


def fresh(
    written: Path, body: str, before: str = "", **environment: str
) -> tuple[list[dict[str, Any]], str, int]:
    """Run LOAD in a new process; what it printed, line by line, its errors, and its exit status."""
    code = LOAD.format(before=before, body=body)
    run = subprocess.run(
        [sys.executable, "-c", code, str(written), str(written / "expected")],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return [json.loads(line) for line in run.stdout.splitlines()], run.stderr, run.returncode


def test_plain_transformers_needs_no_import_of_ours(written: Path) -> None:
    [found], errors, status = fresh(written, 'load(sys.argv[1] + "/model")')
    assert status == 0, errors
    assert found == {"equal": ["model"], "kind": "rankfold.hosts", "quiet": True, "ours": True}


@pytest.mark.parametrize("switch", ["RANKFOLD_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_what_the_model_card_says_where_autoload_is_off(switch: str, written: Path) -> None:
    """Without the import, transformers warns and goes on with random weights; with it, all is well."""
    text = " ".join(card(rankfold.Report.load(written / "model"), loader="AutoModelForCausalLM").split())
    assert "`import rankfold.hf` first" in text
    assert "random weights" in text
    body = 'load(sys.argv[1] + "/model")\nimport rankfold.hf\nload(sys.argv[1] + "/model")'
    found, errors, status = fresh(written, body, **{switch: "0"})
    assert status == 0, errors
    without, imported = found
    assert without == {"equal": [], "kind": "torch.nn.modules.linear", "quiet": True, "ours": False}
    assert "Unknown quantization type, got rankfold" in errors
    assert (imported["equal"], imported["kind"]) == (["model"], "rankfold.hosts")


def test_a_dense_folder_needs_no_rankfold(written: Path) -> None:
    """An import of rankfold fails in this process; torch must not ask for it either."""
    before = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rankfold":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""
    [found], errors, status = fresh(
        written, 'load(sys.argv[1] + "/dense")', before, TORCH_DEVICE_BACKEND_AUTOLOAD="0"
    )
    assert status == 0, errors
    assert found == {"equal": ["dense"], "kind": "torch.nn.modules.linear", "quiet": True, "ours": False}
    assert "quantization_config" not in json.loads((written / "dense" / "config.json").read_text())
    assert "Unknown quantization" not in errors


def test_saved_folder_holds_nothing_pickled(written: Path) -> None:
    names = {path.name for path in (written / "model").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "rankfold_report.json",
        "report.html",
    }


ADAPTER = """
import sys, torch
from torch import nn
{before}
import peft
assert "WARA" not in peft.PeftType.__members__ and "rankfold.peft" not in sys.modules
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
{after}
model = peft.PeftModel.from_pretrained(base, sys.argv[1])
assert type(model.base_model).__module__ == "rankfold.peft_tuner"
torch.testing.assert_close(model(torch.ones(2, 8)), torch.load(sys.argv[1] + "/expected"))
"""


def adapter_process(folder: Path, before: str = "", after: str = "", **environment: str) -> tuple[int, str]:
    code = ADAPTER.format(before=before, after=after)
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return run.returncode, run.stderr


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WaRA adapter that PEFT wrote, and the outputs with it."""
    peft = pytest.importorskip("peft")
    from rankfold.peft import WaraConfig

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 6))
    model = peft.get_peft_model(base, WaraConfig(r=2, target_modules=["0", "1"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.requires_grad
        expected = model(torch.ones(2, 8))
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    torch.save(expected, folder / "expected")
    return folder


def test_plain_peft_opens_our_adapter(adapter: Path) -> None:
    status, errors = adapter_process(adapter)
    assert status == 0, errors


@pytest.mark.slow  # imports everything anew, twice
def test_peft_where_autoload_is_off_or_came_late(adapter: Path) -> None:
    """PEFT was there first: its modules hold the very table, which must stay; the import still helps."""
    late = "import rankfold.autoload; rankfold.autoload.install()"
    status, errors = adapter_process(adapter, after=late, RANKFOLD_AUTOLOAD="0")
    assert status == 1 and "KeyError: 'WARA'" in errors
    late = "import os; del os.environ['RANKFOLD_AUTOLOAD']; " + late + "; import rankfold.peft"
    status, errors = adapter_process(adapter, after=late, RANKFOLD_AUTOLOAD="0")
    assert status == 0, errors


@pytest.mark.slow  # imports everything anew
def test_a_peft_that_we_do_not_know_says_so(adapter: Path) -> None:
    status, errors = adapter_process(adapter, after='peft.__version__ = "0.99.0"')
    assert status == 1 and "KeyError" not in errors
    assert "ImportError: rankfold.peft extends private tables of PEFT" in errors and "0.99.0" in errors


# The hook itself, without a process.


@pytest.fixture
def finders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """sys.meta_path without our finder, and put back as it was."""
    clean = [finder for finder in sys.meta_path if not isinstance(finder, autoload._Finder)]
    monkeypatch.setattr(sys, "meta_path", clean)
    yield clean


def test_install_is_idempotent_and_can_be_switched_off(
    finders: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, autoload.REGISTRY, raising=False)
    monkeypatch.delitem(sys.modules, autoload.CONFIGS, raising=False)
    monkeypatch.delitem(sys.modules, autoload.ADAPTERS, raising=False)
    monkeypatch.setenv("RANKFOLD_AUTOLOAD", "0")
    autoload.install()
    assert not any(isinstance(finder, autoload._Finder) for finder in finders)
    monkeypatch.delenv("RANKFOLD_AUTOLOAD")
    autoload.install()
    autoload.install()
    names = [finder.name for finder in finders if isinstance(finder, autoload._Finder)]
    assert sorted(names) == sorted([autoload.REGISTRY, autoload.CONFIGS, autoload.ADAPTERS])


def test_install_extends_a_registry_that_is_already_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import rankfold.hf

    registry = importlib.import_module(autoload.REGISTRY)
    for table in autoload.TABLES:
        plain = {key: value for key, value in getattr(registry, table).items() if key != "rankfold"}
        monkeypatch.setattr(registry, table, plain)
    autoload.install()
    monkeypatch.delitem(sys.modules, "rankfold.hf")
    found = registry.AUTO_QUANTIZER_MAPPING["rankfold"]  # a look-up, and not only `in`, imports
    assert found.__name__ == rankfold.hf.RankfoldQuantizer.__name__
    assert "rankfold" in registry.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert "nonesuch" not in registry.AUTO_QUANTIZER_MAPPING
    with pytest.raises(KeyError, match="nonesuch"):
        registry.AUTO_QUANTIZER_MAPPING["nonesuch"]


def test_our_model_types_are_known_before_their_module_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import rankfold.models

    mapping = importlib.import_module(autoload.CONFIGS).CONFIG_MAPPING
    plain = {key: value for key, value in mapping._extra_content.items() if key not in autoload.MODEL_TYPES}
    monkeypatch.setattr(mapping, "_extra_content", plain)
    autoload.install()
    autoload.install()
    assert "nonesuch" not in mapping and autoload.MODEL_TYPES[0] not in mapping.keys()
    monkeypatch.delitem(sys.modules, "rankfold.models")
    assert all(name in mapping for name, owner in autoload.OWNERS.items() if owner == "rankfold.models")
    found = mapping["rankfold_gru"]  # a look-up, and not only `in`, imports
    assert found.__name__ == rankfold.models.RecurrentConfig.__name__
    with pytest.raises(KeyError, match="nonesuch"):
        mapping["nonesuch"]


def test_our_adapter_type_is_looked_up_and_an_unknown_peft_is_refused(
    finders: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    held = importlib.import_module(autoload.ADAPTERS)
    plain: dict[str, Any] = {"LORA": 1}
    monkeypatch.setattr(held, autoload.ADAPTER_TABLE, plain)
    autoload.install()
    assert getattr(held, autoload.ADAPTER_TABLE) is plain, "PEFT's other modules hold this very table"
    autoload._extend(held)
    table = getattr(held, autoload.ADAPTER_TABLE)
    assert isinstance(table, autoload._Lazy) and table["LORA"] == 1
    monkeypatch.delitem(sys.modules, "rankfold.peft", raising=False)
    monkeypatch.setattr(peft, "__version__", "0.99.0")
    with pytest.raises(ImportError, match=r"installed is 0\.99\.0"):
        table["WARA"]


def test_install_never_raises(finders: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch turns an error in an entry point into a failure of `import torch`."""
    monkeypatch.setitem(sys.modules, autoload.REGISTRY, None)  # type: ignore[arg-type]
    autoload.install()
    monkeypatch.delitem(sys.modules, autoload.REGISTRY)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: 1 / 0)
    finder = autoload._Finder(autoload.REGISTRY)
    finders.insert(0, finder)
    assert finder.find_spec(autoload.REGISTRY) is None
    assert finder.find_spec("json") is None
