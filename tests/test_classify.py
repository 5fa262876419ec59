"""Training classifiers, small: what a run leaves, every model, and that a stopped run goes on the same."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_classify import FAST, GOOD, run, snippets, table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rankfold.classify.encode import Batches, Encoded, encode
from rankfold.classify.settings import Choice, training
from rankfold.classify.trainer import best, exhausted
from rankfold.footprint import bytes_on_disk, params
from rankfold.hosts import hosts
from rankfold.pretrain.trainer import Stopped


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """One finished run of LAMA: its home, what classify.json says, what it said."""
    home, said = tmp_path_factory.mktemp("home"), []
    facts, _ = run(home, said=said, epochs=8, lr=2e-2)
    return home, facts, said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def same(one: Path, two: Path) -> bool:
    left, right = weights(one), weights(two)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_an_ordinary_folder_is_left(done: tuple[Path, dict[str, Any], list[str]]) -> None:
    home, facts, said = done
    model = AutoModelForSequenceClassification.from_pretrained(home / "out")
    tokenizer = AutoTokenizer.from_pretrained(home / "out")
    assert model.config.id2label == {0: "no", 1: "yes"} and model.config.label2id == {"no": 0, "yes": 1}
    logits = model.eval()(**tokenizer(f"the plot is {GOOD[0]}", return_tensors="pt")).logits
    assert logits.argmax() == 1 and facts["metrics"]["test"]["accuracy"] >= 0.9
    assert not (home / "out.run").exists()
    told = [line.split(":")[0] for line in said]
    assert told == ["warning", *(f"epoch {n}" for n in range(1, len(told)))]  # texts of the test occur twice


def test_classify_json_says_what_was_done(done: tuple[Path, dict[str, Any], list[str]]) -> None:
    home, facts, _ = done
    assert json.loads((home / "out/classify.json").read_text()) == json.loads(json.dumps(facts))
    model = AutoModelForSequenceClassification.from_pretrained(home / "out")
    assert facts["model"]["parameters"] == params(model)
    assert facts["model"]["attention_parameters"] == 2 * 16 * 2 + 16  # P, Q and the context
    assert facts["model"]["bytes"] == bytes_on_disk(home / "out")["payload"]
    assert facts["data"]["train"]["n"] + facts["data"]["validation"]["n"] == 40
    went = facts["training"]
    found = [row["validation_accuracy"] for row in went["epochs"]]
    assert facts["metrics"]["validation"]["accuracy"] == found[went["best_epoch"] - 1]
    assert facts["settings"]["seed"] == 0 and facts["versions"]["torch"]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path: Path) -> None:
    torch.manual_seed(5)
    run(tmp_path, "a", epochs=1)
    torch.manual_seed(6)
    run(tmp_path, "b", epochs=1)
    run(tmp_path, "c", epochs=1, seed=1)
    assert same(tmp_path / "a", tmp_path / "b") and not same(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("model", ["gru", "dense", "linformer", "lrt"])
def test_every_model_trains(model: str, tmp_path: Path) -> None:
    facts, folder = run(tmp_path, model=model, epochs=1)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert bool(hosts(loaded)) == (model == "lrt")
    assert facts["model"]["attention_parameters"] == 0 or model != "gru"
    assert facts["model"]["macs"] > 0 and set(facts["metrics"]) == {"validation", "test"}
    if model == "lrt":  # a low-rank folder trains on, as factors
        more, tuned = run(tmp_path, "more", model=str(folder), epochs=1, options={})
        assert hosts(AutoModelForSequenceClassification.from_pretrained(tuned))
        assert more["model"]["parameters"] == facts["model"]["parameters"] and not same(folder, tuned)


def test_a_run_that_is_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    run(tmp_path, "straight", epochs=3)

    def stop(words: str) -> None:
        if words.startswith("epoch 1:"):
            os.kill(os.getpid(), signal.SIGTERM)  # in the middle of the second epoch

    with pytest.raises(Stopped, match="the same command goes on"):
        run(tmp_path, epochs=3, say=stop)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.run/best.safetensors").is_file()
    with pytest.raises(ValueError, match=r"training\.lr: 0\.002 -> 0\.1"):
        run(tmp_path, epochs=3, lr=0.1)
    said: list[str] = []
    facts, folder = run(tmp_path, epochs=3, resume=True, said=said)
    assert any(words.startswith("going on from") for words in said)
    assert len(facts["training"]["sessions"]) == 2
    assert same(tmp_path / "straight", folder)
    with pytest.raises(ValueError, match="there is no run"):
        run(tmp_path, resume=True, overwrite=True)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"diverged: .*Lower --lr"):
        run(tmp_path, lr=1e30, clip=0, epochs=4)
    assert not (tmp_path / "out").exists()


def test_without_validation_the_last_epoch_is_kept(tmp_path: Path) -> None:
    facts, _ = run(tmp_path, held=0)
    assert facts["training"]["best_epoch"] == 2 and set(facts["metrics"]) == {"test"}
    assert facts["data"]["train"]["n"] == 40


def test_which_epoch_is_best_and_when_patience_is_out() -> None:
    pairs = ((0.5, 1.0), (0.7, 0.9), (0.66, 0.8), (0.6, 0.1))
    seen = [{"eval_accuracy": a, "eval_loss": b, "eval_examples": 100} for a, b in pairs]
    assert (best(seen, "accuracy"), best(seen, "loss")) == (2, 3)  # 0.66 is within 0.046 of 0.7
    assert [best(seen[: end + 1], "accuracy") for end in range(4)] == [0, 1, 2, 2]
    chosen = training(Choice(), patience=2)
    assert not exhausted(seen, chosen) and exhausted([*seen, seen[0]], chosen)
    assert not exhausted([], chosen) and not exhausted(seen * 9, training(Choice(), patience=0))


def test_batches_depend_on_the_seed_and_the_place_alone() -> None:
    data = Encoded([[i + 1] * (i % 7 + 1) for i in range(23)], 0, 16, 0)
    one, two = (Batches(data, list(range(23)), 4, 2, seed=3) for _ in range(2))
    order = [one[i]["labels"].tolist() for i in range(len(one))]
    assert [two[i]["labels"].tolist() for i in reversed(range(len(two)))] == order[::-1]
    for epoch in (order[:6], order[6:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(23))
    assert order[:6] != order[6:]
    batch = one[0]
    assert torch.equal(batch["attention_mask"].sum(1), (batch["input_ids"] != 0).sum(1))


def test_texts_that_are_cut_are_counted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    found = encode(tiny_tokenizer, ["the city of the world", "", "the"], 3)
    assert found.cut == 1 and [len(ids) for ids in found.ids] == [3, 0, 1]
    assert found.batch([1])["attention_mask"].tolist() == [[0]]
    said: list[str] = []
    facts, _ = run(tmp_path, length=4, said=said, epochs=1)
    assert facts["data"]["train"]["cut"] > 0 and any("longer than 4 tokens" in words for words in said)


def test_word_vectors_from_a_file(tmp_path: Path) -> None:
    lines = [f"{word} {i}.5 -1 {i} 2" for i, word in enumerate(["the", "fine", "never", "seen", "plot"])]
    (tmp_path / "v.txt").write_text("\n".join(lines) + "\n")
    facts, folder = run(
        tmp_path, options={"vectors": str(tmp_path / "v.txt"), "width": 8, "heads": 2}, epochs=1
    )
    assert facts["model"]["vectors"] == 5 and facts["model"]["vector_size"] == 4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("The fine plot!") == ["the", "fine", "plot", "[UNK]"]


def test_labels_of_the_test_data_that_training_has_not(tmp_path: Path) -> None:
    other = table(tmp_path / "other.csv", [("fine", "yes"), ("dull", "maybe")])
    with pytest.raises(ValueError, match=r"other.csv', line 3: label 'maybe' is none of the 2 classes: 'no'"):
        run(tmp_path, test=other)
    one = table(tmp_path / "one.csv", [(text, "yes") for text, _ in snippets(5)])
    with pytest.raises(ValueError, match="one class only"):
        run(tmp_path, data=one)
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv"} and FAST["epochs"] == 2
