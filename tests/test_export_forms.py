"""`rankfold export --to dense | peft`: a structured model as what others open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_adapters import IDS, logits, stir_
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import rankfold
from rankfold import recipes
from rankfold.adapter_file import save_adapter
from rankfold.adapters import freeze_
from rankfold.cli import app
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.report import Report
from rankfold.token_wavelet import token_wara_

TARGETS = ["*.q_proj", "*.down_proj"]


@pytest.fixture(scope="module")
def home(tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`; `adapted`, the same with WaRA on it; `alone`, its adapters; `small`, factors with a LoRA beside
    some; the logits of each; and `tokens`, with a TokenWara."""
    home = tmp_path_factory.mktemp("forms")
    tiny_llama().save_pretrained(home / "base")
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    report = factorize_(model, recipes.wara(rank=2, alpha=4.0), targets=TARGETS)
    report.model = str(home / "base")
    stir_(model)
    rankfold.save(model, home / "adapted", report=report)
    save_adapter(model, home / "alone")
    small = tiny_llama()
    factorize_(small, recipes.svd, budget=0.6)
    factorize_(small, recipes.lora(rank=2), targets=TARGETS)
    rankfold.save(stir_(small), home / "small")
    tokens = tiny_llama()
    token_wara_(tokens, ["model.layers.0.self_attn.o_proj"], 2)
    rankfold.save(tokens, home / "tokens")
    torch.save({"adapted": logits(model), "alone": logits(model), "small": logits(small)}, home / "logits")
    return home


def export(home: Path, model: str, out: str, *words: object) -> Result:
    arguments = ["export", home / model, home / out, *words, "--device", "cpu"]
    return CliRunner().invoke(app, [str(word) for word in arguments])


@pytest.mark.parametrize("name", ["adapted", "alone", "small"])
def test_dense_is_an_ordinary_checkpoint(name: str, home: Path) -> None:
    said = export(home, name, f"{name}-dense", "--to", "dense", "--json")
    assert said.exit_code == 0, said.output
    folder, body = home / f"{name}-dense", json.loads(said.stdout)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert not hosts(again) and "quantization_config" not in json.loads((folder / "config.json").read_text())
    torch.testing.assert_close(logits(again), torch.load(home / "logits")[name], atol=1e-5, rtol=1e-4)
    size = sum(p.numel() * p.element_size() for p in again.parameters())
    assert body["totals"]["model_after"] == body["totals"]["disk_after"] == size
    assert body["recipe"]["to"] == "dense" and body["recipe"]["merged"] == 4
    assert len(body["layers"]) == (14 if name == "small" else 4)
    assert max(row["relative_error"] for row in body["layers"]) < 1e-6
    report = Report.load(folder)
    shown = (report.to_text(), (folder / "report.html").read_text(), (folder / "README.md").read_text())
    for words in shown:
        assert "factorized" not in words and "ompressed" not in words and "asked" not in words
    assert "made dense" in shown[1] and "An ordinary checkpoint" in shown[2]
    assert "pip install" not in shown[2] and "allocator kept" not in shown[0]


@pytest.mark.slow  # imports everything anew
def test_plain_transformers_opens_the_dense_form_without_rankfold(home: Path) -> None:
    assert export(home, "adapted", "plain", "--to", "dense").exit_code == 0
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rankfold":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/plain").eval()
with torch.no_grad():
    found = model(torch.arange(24).view(2, 12)).logits
torch.testing.assert_close(found, torch.load(sys.argv[1] + "/logits")["adapted"], atol=1e-5, rtol=1e-4)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(home)],
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["adapted", "alone"])
def test_peft_opens_the_adapters_on_the_base(name: str, home: Path) -> None:
    peft = pytest.importorskip("peft")
    said = export(home, name, f"{name}-lora", "--to", "peft", "--json")
    assert said.exit_code == 0, said.output
    body = json.loads(said.stdout)
    assert body["layers"] == 4 and body["base"] == str(home / "base")
    folder = home / f"{name}-lora"
    assert body["nbytes"] == sum(path.stat().st_size for path in folder.iterdir())
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(body["base"]), folder)
    torch.testing.assert_close(logits(model), torch.load(home / "logits")[name], atol=1e-5, rtol=1e-4)


def test_a_folder_of_ours_is_never_named_as_the_base(home: Path) -> None:
    """It has adapters in it already: a server would apply them twice."""
    said = export(home, "small", "unnamed", "--to", "peft")
    assert said.exit_code == 0 and "does not name (see --base)" in " ".join(said.stderr.split()), said.output
    config = json.loads((home / "unnamed" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    said = export(home, "small", "named", "--to", "peft", "--base", "some/base", "--json")
    assert json.loads(said.stdout)["base"] == "some/base", said.output


@pytest.mark.parametrize("known", [True, False])
def test_a_head_that_trained_goes_along(known: bool, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    """Named by what `rankfold adapt` writes beside the model, or by hand; a loaded model trains as a whole,
    and does not know."""
    peft = pytest.importorskip("peft")
    tiny_llama().save_pretrained(tmp_path / "base")
    model = tiny_llama()
    factorize_(model, recipes.lora(rank=2), targets=TARGETS)
    stir_(freeze_(model, keep=["lm_head*", "model.norm.weight"]))
    rankfold.save(model, tmp_path / "model")
    facts = {"model": str(tmp_path / "base"), "trained": {"head": ["lm_head.weight"]}}
    facts["recipe"] = {"name": "lora", "keep": ["model.norm.*"]}
    words = ["--keep-trainable", "lm_head.weight", "--keep-trainable", "*.norm.weight"]
    if known:
        (tmp_path / "model" / "adapt.json").write_text(json.dumps(facts))
    said = export(tmp_path, "model", "lora", "--to", "peft", *([] if known else words))
    assert said.exit_code == 0, said.output
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(logits(opened), logits(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("base", "--to dense", "holds no structure of rankfold: it is an ordinary checkpoint already"),
        ("tokens", "--to dense", "is a TokenWara, which changes activations"),
        ("tokens", "--to peft", "is a TokenWara, which changes activations and is no matrix"),
        ("base", "--to peft", "has no adapters: put some on first"),
        ("adapted", "--to gguf", "choose 'dense', 'peft' or 'onnx'"),
        ("adapted", "--to dense --budget 0.5", "--budget belongs to a cut"),
        ("adapted", "--to dense --data wikipedia", "--data belongs to a cut"),
        ("adapted", "--to peft --seed 0", "--seed belongs to a cut"),
        ("adapted", "--to peft --no-verify", "leave out --no-verify"),
        ("adapted", "--to onnx --order prefix", "--order belongs to a cut"),
        ("adapted", "--to onnx --unit nbytes", "--unit belongs to a cut"),
        ("adapted", "--to onnx --batch-size 4", "--batch-size belongs to a cut"),
        ("adapted", "--to onnx --seed 1", "--seed belongs to a cut"),
        ("adapted", "--to onnx --base some/base", "--base says what adapters belong to"),
        ("adapted", "--to dense --keep-trainable x", "it goes with --to peft"),
        ("adapted", "--to peft --keep-trainable nothing*", "No parameter matches 'nothing*'"),
        ("alone", "--to peft --keep-trainable lm_head*", "says itself what trained beside its adapters"),
        ("adapted", "--budget 0.5 --base some/base", "--base says what adapters belong to"),
        ("alone", "--to dense --base {home}/small", "is an adapter for another base"),
        ("nowhere", "--to dense", "no model"),
    ],
)
def test_what_does_not_apply_is_one_line_and_status_2(
    model: str, words: str, message: str, home: Path
) -> None:
    said = export(home, model, "never", *words.format(home=home).split())
    assert said.exit_code == 2 and message in said.stderr and said.stderr.count("\n") == 1, said.output
    assert not (home / "never").exists()


def test_adapters_alone_need_the_name_of_their_base(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    factorize_(model, recipes.lora(rank=2), targets=TARGETS)
    save_adapter(model, tmp_path / "alone")
    said = export(tmp_path, "alone", "out", "--to", "dense")
    assert said.exit_code == 2 and "names no base; give --base" in said.stderr, said.output
    tiny_llama().save_pretrained(tmp_path / "base")
    said = export(tmp_path, "alone", "out", "--to", "dense", "--base", tmp_path / "base")
    assert said.exit_code == 0 and "Wrote" in said.stderr, said.output
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(tiny_llama()))
    assert IDS.shape == (2, 12)


def test_half_precision_is_built_wide_and_cast_once(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama().bfloat16()
    factorize_(model, recipes.lora(rank=2), targets=TARGETS)
    rankfold.save(stir_(model), tmp_path / "model")
    said = export(tmp_path, "model", "dense", "--to", "dense")
    assert said.exit_code == 0, said.output
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    for name, host in hosts(model).items():
        base, term = host.weight.terms
        full = base.full.weight.double() + term.scale * term.left.weight.double() @ term.right.weight.double()
        assert torch.equal(again.get_submodule(name).weight, full.bfloat16()), name
