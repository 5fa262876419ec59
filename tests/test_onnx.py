"""ONNX files: the same numbers at every batch and length, factors that stay factors, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from toy_models import classifier, ragged, recurrent, transformer
from transformers import AutoModel, AutoModelForSequenceClassification, DistilBertConfig
from typer.testing import CliRunner, Result

import rankfold
from rankfold import recipes
from rankfold.cli import app
from rankfold.models import RecurrentModel
from rankfold.models.reading import words_first
from rankfold.onnx import Exported, _compare, _Traced, export_onnx


def sizes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the numbers in a file, by name."""
    graph = onnx.load(path).graph
    return {held.name: numpy_helper.to_array(held).shape for held in graph.initializer}


def agree(model: Any, done: Exported) -> None:
    """onnxruntime and the model on ragged batches, padded left and right, with an empty text."""
    session = onnxruntime.InferenceSession(done.path)
    for lengths in ((3, 9, 0, 1), (12,), (5, 2)):
        for left in (False, True):
            ids, mask = ragged(*lengths, left=left)
            found = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
            with torch.no_grad():
                out = _Traced(model, "attentions" in done.outputs)(ids, mask)
            for mine, theirs in zip(out, found, strict=True):
                theirs = torch.from_numpy(theirs)
                torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_path_without_packing_is_the_packed_one(layers: int) -> None:
    encoder = RecurrentModel(recurrent(num_layers=layers)).eval()
    _, mask = ragged(5, 1, 7, 0, 3, left=True)
    x = torch.randn(*mask.shape, 12)
    order, real = words_first(mask.bool())[1], mask.sum(1)
    x = x.gather(1, order.unsqueeze(-1).expand_as(x))
    words = (torch.arange(7) < real.unsqueeze(1)).unsqueeze(-1)
    with torch.no_grad():
        packed, gathered = encoder._packed(x, real) * words, encoder._gathered(x, real) * words
    torch.testing.assert_close(gathered, packed, atol=1e-6, rtol=0)


def test_a_recurrent_classifier(tmp_path: Path) -> None:
    options = {"heads": 4, "context": "mean"}
    model = classifier(recurrent(num_layers=2), pooler_options=options, id2label={0: "no", 1: "yes"})
    model.train()
    done = export_onnx(model, tmp_path / "new" / "model.onnx", attentions=True)
    assert model.training and done.outputs == ("logits", "attentions")
    assert done.difference is not None and done.difference < 1e-5
    agree(model.eval(), done)
    file = onnx.load(done.path)
    onnx.checker.check_model(file)
    assert [node.op_type for node in file.graph.node].count("GRU") == 4
    assert {held.key: json.loads(held.value) for held in file.metadata_props}["id2label"]["1"] == "yes"
    shapes = [
        [d.dim_param or d.dim_value for d in held.type.tensor_type.shape.dim]
        for held in (*file.graph.input, *file.graph.output)
    ]
    assert shapes == [["batch", "length"]] * 2 + [["batch", 2], ["batch", 4, "length"]]
    assert __file__.rpartition("/")[0].encode() not in done.path.read_bytes()  # no paths of this machine
    assert list(done.path.parent.iterdir()) == [done.path]
    with pytest.raises(ValueError, match="exists; pass overwrite"):
        export_onnx(model, done.path)
    with torch.no_grad():
        model.classifier.bias += 1
    with pytest.raises(ValueError, match="other numbers than the model, by up to 1"):
        _compare(_Traced(model, True), done.path, None)


@pytest.mark.slow
@pytest.mark.parametrize("pooler", ["mean", "additive", "self_attentive", "multihead", "lama"])
def test_every_pooler(pooler: str, tmp_path: Path) -> None:
    heads = {"heads": 4} if pooler in ("multihead", "self_attentive", "lama") else {}
    model = classifier(recurrent(), pooler=pooler, pooler_options=heads)
    agree(model, export_onnx(model, tmp_path / "x.onnx", attentions=True))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"attention": "linformer", "sharing": "none"}])
def test_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    model = AutoModel.from_config(transformer(**options)).eval()
    done = export_onnx(model, tmp_path / "x.onnx")
    assert done.outputs == ("states",)
    agree(model, done)


@pytest.mark.slow
def test_other_classifiers_factorized(tmp_path: Path) -> None:
    config = DistilBertConfig(
        vocab_size=60, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=16
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    rankfold.factorize_(model, recipes.svd, budget=0.6)
    done = export_onnx(model, tmp_path / "x.onnx")
    assert done.difference is not None and done.difference < 1e-5
    stored = sum(torch.Size(shape).numel() for shape in sizes(done.path).values())
    assert stored <= sum(p.numel() for p in model.parameters()) + 100


def test_what_is_refused(tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.onnx"
    for model, options, message in (
        (tiny_llama(), {}, "writes text"),
        (nn.Linear(2, 2), {}, "Linear does not read token ids"),
        (AutoModel.from_config(recurrent()), {"attentions": True}, "no pooler"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(model, path, **options)
    with pytest.raises(ValueError, match="is a folder"):
        export_onnx(classifier(), tmp_path)
    monkeypatch.setattr("rankfold.onnx.LARGEST", 1000)
    with pytest.raises(ValueError, match="bytes; one ONNX file holds 1,000"):
        export_onnx(classifier(), path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"no package onnx and onnxscript.*rankfold\[onnx\]"):
        export_onnx(classifier(), path)
    assert not path.exists()


def command(*words: object) -> Result:
    return CliRunner().invoke(app, ["export", *(str(word) for word in words)])


def test_the_command_and_factors_stay_factors(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "model.onnx"
    config = transformer(attention="linformer", sharing="layerwise", num_hidden_layers=2)
    model = classifier(config, num_labels=5)
    rankfold.factorize_(model, recipes.lrt(rank=3))
    rankfold.save(model, folder)
    for words, message in (
        ([], "give --budget"),
        (["--to", "onnx", "--budget", 0.5], "--budget belongs to a cut"),
        (["--to", "onnx", "--calib", "wikipedia"], "--calib belongs to a cut"),
        (["--to", "gguf"], "choose 'dense', 'peft' or 'onnx'"),
    ):
        said = command(folder, out, *words)
        assert said.exit_code == 2 and message in said.stderr, said.output
    assert not out.exists()
    said = command(folder, out, "--to", "onnx", "--json", "--device", "cpu")
    assert said.exit_code == 0, said.output
    told = json.loads(said.stdout)
    assert told["nbytes"] == out.stat().st_size and told["difference"] < 1e-5
    agree(model, Exported(out, out.stat().st_size, ("logits",), None))
    shapes = list(sizes(out).values())
    # Six layers in each of two blocks, and two factors in each, stored as they are or transposed.
    assert len([shape for shape in shapes if sorted(shape) in ([3, 16], [3, 24])]) == 24
    stored = sum(torch.Size(shape).numel() for shape in shapes)
    assert stored <= sum(p.numel() for p in model.parameters()) + 100
    said = command(folder, out, "--to", "onnx")
    assert said.exit_code == 2 and "--overwrite" in said.stderr
