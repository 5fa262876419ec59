"""What is written of a classifier and comes back, in fresh processes too; and that Trainer trains it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from toy_models import classifier, ragged, recurrent, transformer
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

import rankfold
from rankfold import recipes
from rankfold.hosts import hosts
from rankfold.models import PooledForSequenceClassification, RecurrentModel, TransformerModel

IDS, MASK = ragged(5, 1, 7, 0, 3)


def same(one: Any, two: Any) -> None:
    """Bit-equal tensors under the same keys. (Products of tensors that lie elsewhere in memory may differ in
    the last bit.)"""
    mine, theirs = one.state_dict(), two.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())
    with torch.no_grad():
        logits = [model.eval()(IDS, MASK)[0] for model in (one, two)]
    torch.testing.assert_close(*logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooler", ["mean", "additive", "self_attentive", "multihead", "lama"])
def test_every_pooler_comes_back(pooler: str, tmp_path: Path) -> None:
    heads = {"heads": 4} if pooler in ("multihead", "self_attentive", "lama") else {}
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    model = classifier(pooler=pooler, pooler_options=heads, classifier_width=5, **names)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is PooledForSequenceClassification and not again.training
    assert again.config.id2label == {0: "a", 1: "b"} and again.config.pooler_options == heads
    assert again.config.encoder.hidden_size == 6 and again.config.classifier_width == 5
    same(model, again)


@pytest.mark.parametrize("config", [recurrent(), transformer()])
def test_encoders_come_back_alone(config: Any, tmp_path: Path) -> None:
    model = AutoModel.from_config(config)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(model) in (RecurrentModel, TransformerModel)
    same(model, again)


@pytest.mark.parametrize("sharing", ["none", "headwise", "kv", "layerwise"])
@pytest.mark.parametrize("low_rank", [False, True])
def test_position_maps_are_shared_in_the_file_as_in_memory(
    sharing: str, low_rank: bool, tmp_path: Path
) -> None:
    model = classifier(transformer(attention="linformer", sharing=sharing))
    if low_rank:
        rankfold.factorize_(model, recipes.lrt(rank=3))
    maps = {"none": 6, "headwise": 6, "kv": 3, "layerwise": 1}[sharing]
    for write in (model.save_pretrained, lambda folder: rankfold.save(model, folder)):
        folder = tmp_path / str(maps) / getattr(write, "__name__", "saved")
        write(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert len([key for key in file.keys() if key.endswith((".E", ".F"))]) == maps
        again = AutoModelForSequenceClassification.from_pretrained(folder)
        same(model, again)
        held = again.named_parameters(remove_duplicate=False)
        assert len({id(p) for name, p in held if name.endswith((".E", ".F"))}) == maps
        rankfold.verify(model, folder)
    assert len(hosts(again)) == (18 if low_rank else 0)


def test_the_low_rank_transformer_has_the_papers_count() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1}
    encoder = TransformerModel(transformer(**sizes, num_attention_heads=8))
    rankfold.factorize_(encoder, recipes.lrt(rank=64))
    assert sum(p.numel() for p in encoder.layers[0].parameters()) == 596_480


def test_a_trained_classifier_is_factorized_and_comes_back(tmp_path: Path) -> None:
    model = classifier(transformer())
    report = rankfold.factorize_(model, recipes.svd, budget=0.6)
    assert {row.name.partition(".")[0] for row in report.layers} == {"encoder"}  # heads are left alone
    rankfold.factorize_(model, recipes.svd, budget=0.7, targets=["pooler.word_mlp", "dense"])
    assert "pooler.word_mlp" in hosts(model)
    rankfold.save(model, tmp_path / "x", report=report)
    rankfold.verify(model, tmp_path / "x")
    same(model, AutoModelForSequenceClassification.from_pretrained(tmp_path / "x"))


def test_a_factorized_encoder_takes_its_structures_along(tmp_path: Path) -> None:
    encoder = AutoModel.from_config(transformer())
    rankfold.factorize_(encoder, recipes.lrt(rank=3))
    model = PooledForSequenceClassification.from_encoder(encoder, "mean")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())["encoder"]
    same(model, AutoModelForSequenceClassification.from_pretrained(tmp_path))


def test_a_new_head_is_drawn_and_the_rest_loaded(tmp_path: Path) -> None:
    model = classifier(transformer(attention="linformer", sharing="layerwise"))
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    assert again.classifier.out_features == 5 and again.classifier.weight.std() > 0.01
    assert torch.equal(again.pooler.context, model.pooler.context)
    assert torch.equal(again.encoder.layers[2].self_attn.E, model.encoder.layers[0].self_attn.E)


PLAIN = """
import json, sys
from transformers import AutoModelForSequenceClassification, pipeline
quiet = "rankfold.models" not in sys.modules
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
told = pipeline("text-classification", sys.argv[1])(["the water and the war", "", "life " * 50])
print(json.dumps({"quiet": quiet, "kind": type(model).__name__, "told": told}))
"""


def test_plain_transformers_opens_it_and_its_pipeline(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = classifier(recurrent(vocab_size=128, pad_token_id=1))
    rankfold.save(model, tmp_path / "x", tokenizer=tiny_tokenizer)
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "x")], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert (found["quiet"], found["kind"]) == (True, "PooledForSequenceClassification")
    texts = ["the water and the war", "", "life " * 50]
    for text, told in zip(texts, found["told"], strict=True):
        with torch.no_grad():
            logits = model(**tiny_tokenizer(text, return_tensors="pt")).logits
        score, label = logits.softmax(-1).max(-1)
        assert told["label"] == model.config.id2label[int(label)]
        assert told["score"] == pytest.approx(float(score), abs=1e-5)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": IDS[i % 3], "attention_mask": MASK[i % 3], "labels": i % 3}


def train(folder: Path, model: Any, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        learning_rate=0.01,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    return trainer


def test_trainer_accumulates_as_one_large_batch(tmp_path: Path) -> None:
    trained = {}
    for name, options in (
        ("whole", {"per_device_train_batch_size": 8}),
        ("parts", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    ):
        torch.manual_seed(0)
        trained[name] = classifier()
        before = trained[name].classifier.weight.detach().clone()
        trainer = train(tmp_path / name, trained[name], **options)
        assert not torch.equal(before, trained[name].classifier.weight)
    for one, two in zip(trained["whole"].parameters(), trained["parts"].parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-3)
    assert trainer.evaluate()["eval_loss"] < 1.2
    assert trainer.predict(Rows()).predictions.shape == (16, 3)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = classifier(transformer(dropout=0.0)).train()
    labels = torch.tensor([0, 1, 2, 0, 1])
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(IDS, MASK, labels=labels).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(model.parameters()))
    torch.testing.assert_close(grads[0], grads[1])
