"""Sparse codes from a model to a file and back: bytes as promised, damage refused, fits kept and resumed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged, edited
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import rankfold
from rankfold.evaluate import bytes_on_disk
from rankfold.fits import Fits, key
from rankfold.hosts import hosts
from rankfold.methods import SVD, Dictionary
from rankfold.metric import Metric
from rankfold.recipes import cospadi, cospadi_grouped, dsformer
from rankfold.sparse_code import STORAGES, SparseCode
from rankfold.storage import store_values_

IDS = torch.arange(4, 100).view(3, 32)
QUICK = dataclasses.replace(cospadi, method=Dictionary(sweeps=2))
VARIANTS = {
    "whole": QUICK,
    "rocket": dataclasses.replace(cospadi, method=Dictionary(solver="rocket")),
    "bf14": dataclasses.replace(cospadi, method=Dictionary(sweeps=2, storage="bf14")),
    "int8": dataclasses.replace(cospadi, method=Dictionary(sweeps=2, storage="int8")),
    "grouped": dataclasses.replace(cospadi_grouped, method=Dictionary(sweeps=2)),
    "blocks": dataclasses.replace(dsformer, method=Dictionary(width=16, ratio=4, sweeps=2)),
    "indices": dataclasses.replace(dsformer, method=Dictionary(width=16, ratio=16, sweeps=2)),
    "out": dataclasses.replace(dsformer, method=Dictionary(width=16, ratio=4, sweeps=2, orient="out")),
}


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_comes_back(
    variant: str, dtype: torch.dtype, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_llama()
    for parameter in model.parameters():  # not the buffers: a model in bfloat16 has its rotations in float32
        parameter.data = parameter.data.to(dtype)
    report = rankfold.factorize_(model, VARIANTS[variant], budget=0.7, batches=IDS)
    kinds = [host.weight for host in hosts(model).values() if isinstance(host.weight, SparseCode)]
    assert len(kinds) >= 10
    assert report.reached <= 0.7
    one = rankfold.save(model, tmp_path / "one", report=report)
    rankfold.verify(model, one, IDS)
    stored = bytes_on_disk(one)["tensors"]
    selected = sum(n for name, n in stored.items() if ".weight." in name)
    dense = sum(row.bytes_after for row in report.layers if row.structure == "dense")
    assert selected + dense == report.totals["selected_after"]
    again = AutoModelForCausalLM.from_pretrained(one, dtype="auto")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    two = rankfold.save(again, tmp_path / "two")
    first, second = digest(one), digest(two)
    assert first["model.safetensors"] == second["model.safetensors"]
    assert first["config.json"] == second["config.json"]


def test_another_dtype_and_training(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    rankfold.factorize_(model, VARIANTS["int8"], budget=0.7, batches=IDS)
    folder = rankfold.save(model, tmp_path / "m")
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert next(iter(hosts(half).values())).weight.dtype == torch.bfloat16
    with torch.no_grad():
        distance = (half(IDS).logits.float() - model(IDS).logits).norm() / model(IDS).logits.norm()
    assert float(distance) < 0.05
    half.train()
    half(IDS, labels=IDS).loss.backward()
    assert all(host.weight.dictionary.grad is not None for host in hosts(half).values())  # type: ignore[union-attr]


def test_plain_modules(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    model, x = net(), torch.randn(50, 16)
    rankfold.factorize_(model, QUICK, budget=0.7, batches=[x])
    folder = rankfold.save(model, tmp_path / "m")
    assert torch.equal(rankfold.load_(net(), folder)(x), model(x))
    broken = damaged(folder, tmp_path / "broken", lambda t: t["0.weight.support"].fill_(255))
    with pytest.raises((ValueError, RuntimeError), match=r"0"):
        rankfold.load_(net(), broken)


NAME = "model.layers.1.mlp.up_proj.weight"


def spoil(tensors: dict[str, Tensor], how: str) -> None:
    support = tensors[f"{NAME}.support"]
    if how == "ones":
        support.fill_(255)
    elif how == "zeros":
        support.zero_()
    elif how == "one bit":
        support[3] ^= 16
    elif how == "short":
        tensors[f"{NAME}.support"] = support[:-1].clone()
    elif how == "int32":
        tensors[f"{NAME}.support"] = support.int()
    elif how == "floats":
        tensors[f"{NAME}.support"] = support.float()


@pytest.mark.parametrize("how", ["ones", "zeros", "one bit", "short", "int32", "floats"])
def test_a_damaged_support_does_not_open(how: str, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    rankfold.factorize_(model, QUICK, budget=0.7, batches=IDS)
    folder = rankfold.save(model, tmp_path / "m")
    broken = damaged(folder, tmp_path / "broken", lambda tensors: spoil(tensors, how))
    with pytest.raises(ValueError, match=NAME.removesuffix(".weight").replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(broken)


@pytest.mark.parametrize(
    "change", [{"nonzeros": 10**6}, {"atoms": -1}, {"blocks": 7}, {"storage": "pickle"}, {"orient": 3}]
)
def test_an_edited_spec_does_not_open(
    change: dict[str, Any], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_llama()
    rankfold.factorize_(model, QUICK, budget=0.7, batches=IDS)
    folder = rankfold.save(model, tmp_path / "m")
    layer = NAME.removesuffix(".weight")
    broken = edited(folder, tmp_path / "broken", lambda m: m["structures"][layer].update(change))
    with pytest.raises(ValueError, match=layer.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(broken)


@pytest.mark.parametrize("storage", ["bf14", "int8"])
@pytest.mark.parametrize("variant", ["whole", "grouped", "blocks"])
def test_values_are_packed_afterwards(
    variant: str, storage: str, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    """The bytes add up: what went is the values' bytes, less what their packed form takes."""
    model = tiny_llama()
    rankfold.factorize_(model, VARIANTS[variant], budget=0.7, batches=IDS)
    values = sum(h.weight.values.numel() for h in hosts(model).values())  # type: ignore[union-attr, operator, misc]
    before = bytes_on_disk(rankfold.save(model, tmp_path / "before"))["payload"]
    logits = model(IDS).logits.detach()
    was, now = store_values_(model, storage)
    after = bytes_on_disk(rankfold.save(model, tmp_path / "after"))["payload"]
    assert before - after == was - now
    rows = sum(h.weight.code_rows for h in hosts(model).values())  # type: ignore[union-attr, operator, misc]
    count = len(hosts(model))
    packed = values + 4 * rows if storage == "int8" else values * 14 // 8
    assert abs((was - now) - (4 * values - packed)) <= count
    assert float((model(IDS).logits.detach() - logits).norm() / logits.norm()) < 0.1
    rankfold.verify(model, tmp_path / "after", IDS)


def test_packing_needs_codes_and_a_known_form(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="no sparse codes"):
        store_values_(model, "int8")
    with pytest.raises(ValueError, match=r"storage='fp4' must be one of"):
        store_values_(model, "fp4")
    assert STORAGES == ("float", "bf14", "int8")


class Stop(Exception):
    pass


@pytest.mark.parametrize("grouped", [False, True])
def test_a_stopped_run_goes_on(
    grouped: bool, tiny_llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = VARIANTS["grouped" if grouped else "whole"]
    whole, broken, resumed = (tiny_llama() for _ in range(3))
    rankfold.factorize_(whole, recipe, budget=0.7, batches=IDS)
    fit, calls = Dictionary.fit, []

    def stopping(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise Stop
        return fit(self, *args)

    monkeypatch.setattr(Dictionary, "fit", stopping)
    with pytest.raises(Stop):
        rankfold.factorize_(broken, recipe, budget=0.7, batches=IDS, keep=tmp_path / "keep")
    assert not hosts(broken) and len(list((tmp_path / "keep").iterdir())) == 4
    rankfold.factorize_(resumed, recipe, budget=0.7, batches=IDS, keep=tmp_path / "keep")
    items = 5 + 4 if grouped else 14  # q, k, v, gate and up in pairs, o and down alone
    assert len(calls) == 5 + items - 4
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_a_kept_fit_is_the_answer_to_its_question_only(tmp_path: Path) -> None:
    fits, weight = Fits(tmp_path), torch.randn(12, 10)
    side = torch.eye(10, dtype=torch.float64)
    questions = [
        (SVD(), weight, Metric(), 3),
        (SVD(), weight, Metric(), 4),
        (SVD(multiple=2), weight, Metric(), 3),
        (SVD(), weight + 1, Metric(), 3),
        (SVD(), weight.double(), Metric(), 3),
        (SVD(), weight, Metric(None, side), 3),
        (SVD(), weight, Metric(side, None), 3),
    ]
    assert len({key(*question) for question in questions}) == len(questions)
    first = fits.fit(*questions[0])
    file = next(tmp_path.iterdir())
    for content in (b"", file.read_bytes()[:100], b"\0" * 64):
        file.write_bytes(content)
        assert torch.equal(fits.fit(*questions[0]).to_dense(), first.to_dense())
        assert [p.name for p in tmp_path.iterdir()] == [file.name]
