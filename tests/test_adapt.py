"""`rankfold adapt` of a classifier: what trains, what is written, what a kill leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_adapt import CLASSIFY, encoder, examples, run, same

from rankfold import recipes
from rankfold.adapters import trainable


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    encoder(home / "base")
    examples(home)
    return home


def adapt(home: Path, out: Path, recipe: str = "lora", **more: Any) -> tuple[dict[str, Any], Path]:
    data = {"data": [str(home / "train.csv")], "test": [str(home / "test.csv")]}
    model = more.pop("model", str(home / "base"))
    return run(model, out, recipe, **{**CLASSIFY, **data, **more})


def classify(folder: Path | str, text: str = "a fine film") -> Tensor:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).logits


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("wara_adaptive", "wara_feature", "pissa")]


@pytest.mark.parametrize("recipe", ["lora", "wara", "full", "probe", *SLOW])
def test_every_recipe_trains_and_is_an_ordinary_folder(recipe: str, home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    facts, folder = adapt(home, tmp_path / "out", recipe, epochs=1)
    trained = facts["trained"]
    # Four projections of 32 x 32, two of 32 x 48 in each of two layers, and the pooler: all at rank 2.
    sides = 2 * (4 * 64 + 2 * 80) + 64
    whole = sum(
        p.numel() for p in AutoModelForSequenceClassification.from_pretrained(home / "base").parameters()
    )
    counts = {"lora": 2, "pissa": 2, "wara": 4, "wara_feature": 1, "full": None, "probe": 0}
    if recipe == "full":
        assert trained["parameters"] == whole and trained["share"] == 1
    elif recipe in counts:
        assert trained["adapters"] == counts[recipe] * sides
        assert trained["others"] == 66 and trained["head"] == ["classifier.weight", "classifier.bias"]
        assert trained["bytes_added"] == 4 * trained["adapters"]
    assert trained["model_parameters"] == whole
    found = facts["metrics"]["test"]
    assert found["before"]["n"] == found["after"]["n"] == 20 and "standard_error" in found["after"]
    assert json.loads((folder / "adapt.json").read_text())["metrics"] == facts["metrics"]
    assert "Loss in nats per text" in (folder / "report.html").read_text()
    assert classify(folder).shape == (1, 2) and not folder.with_name("out.run").exists()


def test_it_learns(home: Path, tmp_path: Path) -> None:
    facts, _ = adapt(home, tmp_path / "out", "wara", epochs=10, lr=1e-2, patience=0, check=False)
    found = facts["metrics"]["test"]
    assert found["after"]["accuracy"] >= 0.75 > found["before"]["accuracy"]
    losses = [row["training_loss"] for row in facts["training"]["epochs"]]
    assert losses[-1] < losses[0] / 3


def test_merged_adapter_and_lora_say_the_same(home: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from rankfold.adapter_file import load_adapter_

    _, whole = adapt(home, tmp_path / "whole", "wara", epochs=1, check=False)
    want = classify(whole)
    facts, merged = adapt(home, tmp_path / "merged", "wara", epochs=1, check=False, merge=True)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert facts["written"]["form"] == "merged" and facts["written"]["merge_error"] < 1e-6
    assert torch.allclose(classify(merged), want, atol=1e-5)

    facts, alone = adapt(home, tmp_path / "alone", "wara", epochs=1, check=False, adapter_only=True)
    assert facts["written"]["bytes"] == 4 * facts["trained"]["parameters"]
    base = AutoModelForSequenceClassification.from_pretrained(home / "base", num_labels=2)
    load_adapter_(base, alone)
    assert sum(p.numel() for p in trainable(base).values()) == facts["trained"]["parameters"]
    _, lora = adapt(home, tmp_path / "lora", "wara", epochs=1, check=False, as_lora=True)
    base_ = AutoModelForSequenceClassification.from_pretrained(home / "base", num_labels=2)
    ids = torch.arange(4, 10)[None]
    from transformers import AutoModelForSequenceClassification as Auto

    with torch.no_grad():
        said = [
            model.eval()(input_ids=ids).logits
            for model in (Auto.from_pretrained(whole), base, PeftModel.from_pretrained(base_, lora))
        ]
    assert torch.equal(said[0], said[1]) and torch.allclose(said[0], said[2], atol=1e-5)


def test_a_kill_changes_nothing(home: Path, tmp_path: Path) -> None:
    """The run dies at the end of its first epoch; the same command ends at the same losses and tensors."""
    whole_facts, whole = adapt(home, tmp_path / "whole", epochs=3)

    def dies(words: str) -> None:
        if words.startswith("epoch 2"):
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        adapt(home, tmp_path / "out", epochs=3, say=dies)
    assert not (tmp_path / "out").exists()
    (checkpoint,) = (tmp_path / "out.run").glob("checkpoint-*")
    assert not (checkpoint / "model.safetensors").exists()  # what trains alone
    with pytest.raises(ValueError, match=r"training.lr: 0.005 -> 0.001"):
        adapt(home, tmp_path / "out", epochs=3, lr=1e-3)
    said: list[str] = []
    facts, folder = adapt(home, tmp_path / "out", epochs=3, said=said, resume=True)
    assert any(words.startswith("going on from") for words in said)
    assert facts["training"]["epochs"] == whole_facts["training"]["epochs"]
    assert facts["training"]["sessions"] == [0, 5] and same(whole, folder)


@pytest.mark.slow
def test_a_run_that_died_while_writing_only_writes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_facts, whole = adapt(home, tmp_path / "whole")

    def dies(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("rankfold.adapt.job.write_form", dies)
        with pytest.raises(OSError, match="disk full"):
            adapt(home, tmp_path / "out")
    facts, folder = adapt(home, tmp_path / "out")
    assert facts["metrics"] == whole_facts["metrics"] and same(whole, folder)


def test_a_compressed_classifier_is_adapted_beside_its_factors(home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rankfold import factorize_, save
    from rankfold.hosts import hosts

    _, first = adapt(home, tmp_path / "first", "full", epochs=1)
    model = AutoModelForSequenceClassification.from_pretrained(first)
    factorize_(model, recipes.svd, budget=0.8)
    save(model, tmp_path / "small", tokenizer=AutoTokenizer.from_pretrained(first))
    facts, folder = adapt(home, tmp_path / "out", model=str(tmp_path / "small"), epochs=1)
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    kinds = {type(host.weight.base).__name__ for host in hosts(again).values()}  # type: ignore[union-attr]
    assert "LowRank" in kinds and facts["trained"]["others"] == 66
    _, merged = adapt(home, tmp_path / "merged", model=str(tmp_path / "small"), epochs=1, merge=True)
    assert torch.allclose(classify(merged), classify(folder), atol=1e-5)


def test_what_trains_beside_the_adapters(home: Path, tmp_path: Path) -> None:
    more = {"targets": ["*.query"], "keep_trainable": ["*LayerNorm*"], "epochs": 1}
    facts, _ = adapt(home, tmp_path / "out", "lora", **more)
    assert facts["trained"]["adapters"] == 2 * 2 * 64 and facts["trained"]["layers"] == 2
    assert facts["trained"]["others"] == 66 + 5 * 2 * 32
    with pytest.raises(ValueError, match="matches only weights under adapters"):
        adapt(
            home,
            tmp_path / "two",
            "lora",
            **(more | {"keep_trainable": ["*.query.weight.terms.0.full.weight"]}),
        )


def test_recipes_without_a_rank_count_their_own_numbers(home: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"coefficients": 40, "scale": 1.0}
    facts, folder = adapt(home, tmp_path / "one", "waveft", options=options, epochs=1)
    assert (
        facts["trained"]["adapters"] == 13 * 40 and "coefficients 40" in (folder / "report.html").read_text()
    )
    options = {"rank": 2, "core": "diagonal"}
    facts, _ = adapt(home, tmp_path / "two", "wara_tiny", options=options, epochs=1)
    assert facts["trained"]["adapters"] == 13 * 4 * 2


def test_the_folder_says_what_predicting_needs(home: Path, tmp_path: Path) -> None:
    from rankfold.classify import open_classifier

    _, folder = adapt(home, tmp_path / "out", "probe", epochs=1, length=12, check=False)
    assert open_classifier(str(folder), device="cpu").length == 12


def test_an_adapter_alone_becomes_a_lora(home: Path, tmp_path: Path) -> None:
    """Its base, a bare encoder, gets the head that it was trained with."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from rankfold.export_forms import export_lora

    _, whole = adapt(home, tmp_path / "whole", epochs=1, check=False)
    _, alone = adapt(home, tmp_path / "alone", epochs=1, check=False, adapter_only=True)
    export_lora(str(alone), str(tmp_path / "lora"))
    base = AutoModelForSequenceClassification.from_pretrained(home / "base", num_labels=2)
    ids = torch.arange(4, 10)[None]
    with torch.no_grad():
        said = PeftModel.from_pretrained(base, tmp_path / "lora").eval()(input_ids=ids).logits
        want = AutoModelForSequenceClassification.from_pretrained(whole).eval()(input_ids=ids).logits
    assert torch.allclose(said, want, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_is_autocast_over_float32(home: Path, tmp_path: Path) -> None:
    facts, folder = adapt(home, tmp_path / "out", epochs=1, dtype="bfloat16")
    other, _ = adapt(home, tmp_path / "two", epochs=1)
    assert facts["training"]["train"] != other["training"]["train"]
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
