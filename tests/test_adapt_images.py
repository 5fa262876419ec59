"""`rankfold adapt` of an image classifier: what trains, what is written, which head, what a kill leaves."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from toy_adapt import encoder, quiet, run, same
from toy_images import CLASSES, IMAGES, backbone, photos
from typer.testing import CliRunner

from rankfold.adapt import task_of
from rankfold.adapters import trainable
from rankfold.cli import app


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    backbone(home / "base")
    photos(home / "train")
    photos(home / "test", 10, 100, "jpg")
    return home


def adapt(home: Path, out: Path, recipe: str = "lora", **more: Any) -> tuple[dict[str, Any], Path]:
    data = {"data": [str(home / "train")], "test": [str(home / "test")]}
    return run(more.pop("model", str(home / "base")), out, recipe, **{**IMAGES, **data, **more})


def classify(model: Any, home: Path) -> Tensor:
    """Logits of one test picture, as plain transformers reads it."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder = home / "base"
    if isinstance(model, Path):
        folder, model = model, AutoModelForImageClassification.from_pretrained(model)
    with Image.open(home / "test" / "red" / "100.jpg") as image:
        pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**pixels).logits


@pytest.mark.parametrize("recipe", ["lora", "probe", pytest.param("full", marks=pytest.mark.slow)])
def test_every_recipe_learns_and_is_an_ordinary_folder(recipe: str, home: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    facts, folder = adapt(home, tmp_path / "out", recipe, epochs=4, lr=2e-2)
    trained = facts["trained"]
    # Four projections of 32 x 32, two of 32 x 48 in each of two layers, and the patches 32 x 192: rank 2.
    sides = 2 * (4 * 64 + 2 * 80) + 224
    assert trained["adapters"] == (2 * sides if recipe == "lora" else 0)
    assert trained["head"] == ["classifier.weight", "classifier.bias"]
    if recipe != "full":
        assert trained["others"] == 2 * 32 + 2
    found = facts["metrics"]["test"]
    assert found["after"]["accuracy"] >= 0.9 > found["before"]["accuracy"] and found["after"]["n"] == 20
    assert facts["classes"] == list(CLASSES) and facts["data"]["validation"]["n"] == 4
    assert found["after"]["confusion"][0][0] + found["after"]["confusion"][1][1] >= 18
    page = (folder / "report.html").read_text()
    assert "Loss in nats per image" in page and "epochs over 36 images" in page
    assert json.loads((folder / "adapt.json").read_text())["metrics"] == facts["metrics"]
    said = pipeline("image-classification", str(folder))(str(home / "test" / "red" / "100.jpg"))
    assert said[0]["label"] == "red" and not folder.with_name("out.run").exists()


def test_merged_adapter_and_lora_say_the_same(home: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    from rankfold.adapter_file import load_adapter_
    from rankfold.export_forms import export_lora

    options: dict[str, Any] = {"epochs": 1, "check": False}
    _, whole = adapt(home, tmp_path / "whole", "wara", **options)
    want = classify(whole, home)
    facts, merged = adapt(home, tmp_path / "merged", "wara", merge=True, **options)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert facts["written"]["merge_error"] < 1e-6
    assert torch.allclose(classify(merged, home), want, atol=1e-5)

    def base() -> Any:
        return AutoModelForImageClassification.from_pretrained(home / "base", num_labels=2)

    facts, alone = adapt(home, tmp_path / "alone", "wara", adapter_only=True, **options)
    model = load_adapter_(base(), alone)
    assert sum(p.numel() for p in trainable(model).values()) == facts["trained"]["parameters"]
    assert torch.equal(classify(model, home), want)
    _, lora = adapt(home, tmp_path / "lora", "wara", as_lora=True, **options)
    # The adapter alone knows which head its base gets, so that it becomes the same LoRA.
    for name, source in (("from-adapter", alone), ("from-folder", whole)):
        export_lora(str(source), str(tmp_path / name))
    for folder in (lora, tmp_path / "from-adapter", tmp_path / "from-folder"):
        opened = PeftModel.from_pretrained(base(), folder)
        assert torch.allclose(classify(opened, home), want, atol=1e-5), folder


def test_a_kill_changes_nothing(home: Path, tmp_path: Path) -> None:
    """The run dies at the end of its first epoch; the same command ends at the same losses and tensors, with
    what varies at random, and whoever decodes."""
    options: dict[str, Any] = {"epochs": 3, "augment": "flip,crop"}
    whole_facts, whole = adapt(home, tmp_path / "whole", **options)

    def dies(words: str) -> None:
        if words.startswith("epoch 2"):
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        adapt(home, tmp_path / "out", say=dies, **options)
    with pytest.raises(ValueError, match=r"augment: .*flip.*-> \[\]"):
        adapt(home, tmp_path / "out", epochs=3)
    said: list[str] = []
    facts, folder = adapt(home, tmp_path / "out", said=said, resume=True, workers=1, **options)
    assert any(words.startswith("going on from") for words in said)
    assert facts["training"]["epochs"] == whole_facts["training"]["epochs"]
    assert facts["training"]["sessions"] == [0, 5] and same(whole, folder)
    plain, _ = adapt(home, tmp_path / "plain", epochs=3, restart=True, check=False)
    assert plain["training"]["train"] != facts["training"]["train"]


def test_a_compressed_model_is_adapted_beside_its_factors(home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    from rankfold import factorize_, recipes, save
    from rankfold.export_forms import export_dense
    from rankfold.hosts import hosts
    from rankfold.loading import open_model

    opened = open_model(backbone(tmp_path / "three", head=("red", "green", "blue")), device="cpu")
    factorize_(opened.model, recipes.svd, budget=0.8)
    small = str(save(opened.model, tmp_path / "small", tokenizer=opened.reader))
    with pytest.raises(ValueError, match=r"no example of class 'blue', which .*small' knows.*--new-head"):
        adapt(home, tmp_path / "out", model=small)
    facts, folder = adapt(home, tmp_path / "out", model=small, new_head=True, epochs=1)
    again = AutoModelForImageClassification.from_pretrained(folder)
    kinds = {type(host.weight.base).__name__ for host in hosts(again).values()}  # type: ignore[union-attr]
    assert "LowRank" in kinds and facts["trained"]["others"] == 66 and again.classifier.out_features == 2
    _, plain = export_dense(str(folder), str(tmp_path / "plain"), progress=quiet)
    assert torch.allclose(classify(plain, home), classify(folder, home), atol=1e-5)  # its processor is there
    _, merged = adapt(home, tmp_path / "m", model=small, new_head=True, epochs=1, merge=True, check=False)
    assert torch.allclose(classify(merged, home), classify(folder, home), atol=1e-5)


def test_which_head(home: Path, tmp_path: Path) -> None:
    """A head for the same names stays, in its own order; one for others is drawn anew, though as large."""
    from transformers import AutoModelForImageClassification

    def head(folder: Path | str) -> Tensor:
        return AutoModelForImageClassification.from_pretrained(folder).classifier.weight

    options: dict[str, Any] = {"epochs": 1, "lr": 1e-9, "check": False}
    turned = backbone(tmp_path / "turned", head=("red", "green"))
    facts, folder = adapt(home, tmp_path / "a", "probe", model=turned, **options)
    assert facts["classes"] == ["red", "green"] and torch.allclose(head(turned), head(folder), atol=1e-6)
    other = backbone(tmp_path / "other", head=("cat", "dog"))
    said: list[str] = []
    facts, folder = adapt(home, tmp_path / "b", "probe", model=other, said=said, seed=1, **options)
    assert facts["classes"] == ["green", "red"] and any("is replaced" in words for words in said)
    assert not torch.allclose(head(other), head(folder), atol=1e-3)
    unnamed = backbone(tmp_path / "unnamed", head=("LABEL_0", "LABEL_1"))
    facts, folder = adapt(home, tmp_path / "c", "probe", model=unnamed, said=said, **options)
    assert torch.allclose(head(unnamed), head(folder), atol=1e-6) and "have no names" in " ".join(said)
    for names, message in (
        (("red", "blue"), r"'.*green.000\.png': class 'green' is none of"),
        (("red", "Green"), r"\(nearest: 'Green'\)"),
    ):
        odd = backbone(tmp_path / names[1], head=names)
        with pytest.raises(ValueError, match=message):
            adapt(home, tmp_path / "d", model=odd)


def test_images_of_each_class(home: Path, tmp_path: Path) -> None:
    facts, _ = adapt(home, tmp_path / "out", "probe", epochs=1, per_class=3, check=False)
    assert facts["data"]["train"]["n"] == 6 and facts["data"]["validation"]["n"] == 4
    again, _ = adapt(home, tmp_path / "two", "probe", epochs=1, per_class=3, check=False, seed=1)
    assert again["data"]["train"]["hash"] == facts["data"]["train"]["hash"]
    with pytest.raises(ValueError, match=r"--per-class 19: '.*train' has 18 of class 'green'"):
        adapt(home, tmp_path / "three", per_class=19)


def test_a_convolutional_network(home: Path, tmp_path: Path) -> None:
    """Its batch norms move while it trains frozen; the folder and the adapter alone have them."""
    from transformers import AutoModelForImageClassification, ResNetConfig, ResNetModel, ViTImageProcessorPil

    from rankfold.adapter_file import load_adapter_

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(tmp_path / "conv")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "conv")
    options: dict[str, Any] = {"model": str(tmp_path / "conv"), "epochs": 1, "check": False}
    _, folder = adapt(home, tmp_path / "out", **options)
    _, alone = adapt(home, tmp_path / "alone", adapter_only=True, **options)
    whole = AutoModelForImageClassification.from_pretrained(folder).eval()
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "conv", num_labels=2)
    load_adapter_(base, alone)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(whole(pixels).logits, base.eval()(pixels).logits)


def test_the_model_decides_what_it_learns(home: Path, tmp_path: Path, tiny_llama: Any) -> None:
    assert task_of(str(home / "base")) == task_of(backbone(tmp_path / "head", head=("a", "b"))) == "images"
    assert task_of(encoder(tmp_path / "words")) == "classification"
    tiny_llama().save_pretrained(tmp_path / "lm")
    assert task_of(str(tmp_path / "lm")) == "language"


def call(home: Path, model: str, words: str) -> Any:
    for name in ("train", "test", "list.csv"):
        words = words.replace(f" {name}", f" {home / name}")
    arguments = ["adapt", str(home / model), str(home / "bad"), *shlex.split(words), "--device", "cpu"]
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def more(home: Path) -> Path:
    encoder(home / "words")
    (home / "words.csv").write_text("text,label\na,x\nb,y\n")
    (home / "list.csv").write_text("image,label\ntrain/red/000.png,red\nnone.png,green\n")
    backbone(home / "bare", processor=False)
    backbone(home / "grey", num_channels=1)
    photos(home / "blue", 2)
    (home / "blue" / "green").rename(home / "blue" / "blue")
    return home


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("base", "--data train --length 5", "--length: of text classifiers and language models, and"),
        ("base", "--data train --text-column a", "--text-column: of text classifiers, and"),
        ("base", "--data train --tokens 5", "--tokens: of language models"),
        ("words", "--data train", "is a set of images, and"),
        ("words", "--data fashion:train", "is a set of images, and"),
        ("words", "--data words.csv --image-size 5", "--image-size: of image classifiers, and"),
        ("words", "--data words.csv --workers 1", "--workers: of image classifiers, and"),
        ("base", "--data movie:train", "'movie' is text, and the model reads images"),
        ("base", "--data train --data test", "a classifier takes one of them"),
        ("base", "--data train --augment turn", "--augment 'turn': none, or some of flip, crop"),
        ("base", "--data train --image-size 24", "say --image-size"),
        ("base", "--data train --workers -1", "--workers -1: at least 0"),
        ("base", "--data train --per-class 0", "--per-class 0: at least 1"),
        ("base", "--data list.csv", "line 3, 'none.png': there is no such file; mend it, or take it out"),
        ("base", "--data train --test blue", "label 'blue' is none of the 2 classes: 'green', 'red'"),
        ("base", "--data nowhere/", "no folder 'nowhere/'"),
        ("base", "--data nowhere", "no folder 'nowhere', and data set 'nowhere', split 'train' could not be"),
        ("base", "--data train:test", "no folder '"),
        ("bare", "--data train", "has no preprocessor_config.json, which says how images become numbers"),
        ("grey", "--data train", "of 1 channels"),
        ("base", "--data train --targets classif*", "the head, which trains as a whole"),
        ("base", "--data train --coefficients 5", "'lora' has no option --coefficients; it has --rank"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(model: str, words: str, message: str, more: Path) -> None:
    words = words.replace(" blue", f" {more / 'blue'}").replace(" words.csv", f" {more / 'words.csv'}")
    said = call(more, model, f"--recipe lora {words}")
    assert said.exit_code == 2, said.output
    last = said.stderr.strip().split("rankfold: ")[-1]
    assert message in last and "\n" not in last, said.stderr
    assert not (more / "bad").exists() and not (more / "bad.run").exists()


def test_a_run_prints_its_report(more: Path) -> None:
    words = "--recipe lora --rank 2 --data train --test test --epochs 1 --image-size 16 --mean 0.4 --std 0.3"
    said = call(more, "bare", f"{words} --augment flip --overwrite")
    assert said.exit_code == 0, said.output
    assert (
        "1 epoch over 36 images" in said.stdout
        and "Varied at random   flip" in said.stdout
        and "true \\ predicted" in said.stdout
    )
    written = json.loads((more / "bad" / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.4] * 3 and written["size"] == {"height": 16, "width": 16}
    facts = json.loads((more / "bad" / "adapt.json").read_text())
    assert (
        facts["settings"]["augment"] == ["flip"] and facts["settings"]["processor"]["image_std"] == [0.3] * 3
    )


def test_the_page_makes_a_model_that_learns_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_examples import ROOT, fenced

    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    (code,) = fenced(ROOT / "docs" / "adapt.md", "python")
    exec(code, {})
    facts, _ = run(
        "blank", tmp_path / "out", "probe", data=["digits:train"], epochs=1, per_class=2, device="cpu"
    )
    assert facts["trained"]["model_parameters"] == 205_066 and len(facts["classes"]) == 10
