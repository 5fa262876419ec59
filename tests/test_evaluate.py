"""Quality against values worked out by hand: perplexity, KL, accuracy, and the comparison of two models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_language import TABLE, Bigram, Letters, chain, llama

from rankfold import evaluate


def log_p(table: Tensor, current: int, following: int) -> float:
    row = [float(value) for value in table[current]]
    return row[following] - math.log(sum(math.exp(value) for value in row))


def divergence(one: Tensor, two: Tensor, current: int) -> float:
    terms = ((log_p(one, current, k), log_p(two, current, k)) for k in range(one.shape[1]))
    return sum(math.exp(p) * (p - q) for p, q in terms)


@pytest.mark.parametrize("vocabulary", [2, 7, 1000])
def test_a_uniform_model_has_the_vocabulary_size_as_perplexity(vocabulary: int) -> None:
    model = Bigram(torch.zeros(vocabulary, vocabulary))
    windows = torch.randint(vocabulary, (5, 9))
    assert evaluate.perplexity(model, windows) == pytest.approx(vocabulary, rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 2**22])
def test_perplexity_equals_the_hand_computed_value_whatever_the_chunk(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    windows = torch.tensor([[0, 1, 2, 2], [2, 0, 0, 1], [1, 1, 0, 2]])
    pairs = [(0, 1), (1, 2), (2, 2), (2, 0), (0, 0), (0, 1), (1, 1), (1, 0), (0, 2)]
    expected = math.exp(-sum(log_p(TABLE, *pair) for pair in pairs) / 9)
    for batch_size in (1, 2, 4):
        got = evaluate.perplexity(Bigram(TABLE), windows, batch_size=batch_size)
        assert got == pytest.approx(expected, rel=1e-6)


def test_the_stride_scores_only_the_last_targets_of_later_windows() -> None:
    windows = torch.tensor([[0, 1, 2, 2], [1, 2, 2, 0], [2, 2, 0, 1]])
    pairs = [(0, 1), (1, 2), (2, 2), (2, 0), (0, 1)]
    expected = math.exp(-sum(log_p(TABLE, *pair) for pair in pairs) / 5)
    assert evaluate.perplexity(Bigram(TABLE), windows, stride=1) == pytest.approx(expected, rel=1e-6)
    counts = torch.tensor([3, 1, 1])
    assert evaluate.perplexity(Bigram(TABLE), windows, stride=counts) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("tokens", "length", "stride"),
    [(50, 8, 3), (50, 8, 7), (9, 8, 1), (8, 8, 4), (5, 8, 2), (2, 2, 1), (31, 6, 5)],
)
def test_sliding_scores_every_target_of_a_document_exactly_once(
    tokens: int, length: int, stride: int
) -> None:
    ids = torch.arange(tokens)
    windows, scored = evaluate.sliding(ids, length, stride)
    assert windows.shape == (len(scored), min(length, tokens))
    targets = [int(t) for row, n in zip(windows, scored, strict=True) for t in row[len(row) - int(n) :]]
    assert targets == list(range(1, tokens))
    # A model that looks one token back cannot tell windows from the whole document.
    document = torch.randint(3, (tokens,))
    windows, scored = evaluate.sliding(document, length, stride)
    whole = evaluate.perplexity(Bigram(TABLE), document[None])
    assert evaluate.perplexity(Bigram(TABLE), windows, stride=scored) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "length", "stride"), [((1,), 4, 2), ((3, 3), 4, 2), ((9,), 4, 0), ((9,), 4, 4)]
)
def test_sliding_refuses_what_would_skip_targets(shape: tuple[int, ...], length: int, stride: int) -> None:
    with pytest.raises(ValueError, match=r"sliding needs|stride="):
        evaluate.sliding(torch.zeros(shape, dtype=torch.long), length, stride)


def test_the_window_length_changes_the_value_of_a_model_with_context() -> None:
    model, ids = llama(), torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(1))
    long, short = (evaluate.perplexity(model, ids.view(-1, length)) for length in (32, 8))
    assert long != short


@pytest.mark.parametrize("length", [2, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_short_windows_and_half_precision_are_finite(length: int, dtype: torch.dtype) -> None:
    model, windows = llama().to(dtype), torch.randint(50, (3, length))
    value = evaluate.perplexity(model, windows)
    assert math.isfinite(value) and value > 1
    assert evaluate.kl_to(model, model, windows) == 0


@pytest.mark.parametrize(
    ("windows", "stride", "message"),
    [
        (torch.zeros(3, 1, dtype=torch.long), None, "at least 2"),
        (torch.zeros(0, 4, dtype=torch.long), None, "windows are integer ids"),
        (torch.zeros(4, dtype=torch.long), None, "windows are integer ids"),
        (torch.zeros(2, 4), None, "windows are integer ids"),
        (torch.zeros(2, 4, dtype=torch.long), 0, "between 1 and 3"),
        (torch.zeros(2, 4, dtype=torch.long), 4, "between 1 and 3"),
        (torch.zeros(2, 4, dtype=torch.long), torch.tensor([3]), "each of 2 windows"),
    ],
)
def test_windows_without_targets_are_refused(windows: Tensor, stride: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.perplexity(Bigram(TABLE), windows, stride=stride)


def test_ids_outside_the_vocabulary_and_differing_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 50, the model knows 50"):
        evaluate.perplexity(llama(), torch.tensor([[0, 50]]))
    with pytest.raises(ValueError, match=r"vocabularies differ: \[3, 2\]"):
        evaluate.kl_to(Bigram(TABLE), Bigram(TABLE[:, :2].clone()), torch.tensor([[0, 1]]))


def test_an_encoder_decoder_is_refused() -> None:
    model = Bigram(TABLE)
    model.config = SimpleNamespace(is_encoder_decoder=True)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Bigram is an encoder-decoder"):
        evaluate.perplexity(model, torch.tensor([[0, 1]]))


def test_kl_equals_the_formula_on_tiny_logits() -> None:
    other = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.5, -1.0], [0.0, 0.5, 1.0]])
    windows = torch.tensor([[0, 1, 2], [2, 2, 0]])
    expected = sum(divergence(TABLE, other, current) for current in (0, 1, 2, 2)) / 4
    assert expected > 0
    got = evaluate.kl_to(Bigram(TABLE), Bigram(other), windows)
    assert got == pytest.approx(expected, rel=1e-5)
    assert evaluate.kl_to(Bigram(other), Bigram(TABLE), windows) != pytest.approx(expected)
    assert evaluate.kl_to(Bigram(TABLE), Bigram(TABLE.clone()), windows) == 0


def test_masked_logits_do_not_turn_the_divergence_into_nan() -> None:
    masked = TABLE.clone()
    masked[:, 0] = -math.inf
    windows = torch.tensor([[1, 2, 1]])
    assert evaluate.kl_to(Bigram(masked), Bigram(masked.clone()), windows) == 0
    assert evaluate.kl_to(Bigram(masked), Bigram(TABLE), windows) == pytest.approx(
        -sum(math.log(1 - math.exp(log_p(TABLE, current, 0))) for current in (1, 2)) / 2, rel=1e-5
    )
    assert evaluate.kl_to(Bigram(TABLE), Bigram(masked), windows) == math.inf


def test_a_broken_model_gives_a_value_that_says_so() -> None:
    assert math.isnan(evaluate.perplexity(Bigram(torch.full((3, 3), math.nan)), torch.tensor([[0, 1]])))
    assert evaluate.perplexity(Bigram(torch.eye(3) * 1e4), torch.tensor([[0, 1]])) == math.inf


def test_modes_are_restored_even_after_an_error_and_progress_reaches_the_end() -> None:
    model, seen = Bigram(TABLE), []
    model.train()
    model.dropout.eval()  # a frozen submodule must stay in eval mode
    windows = torch.randint(3, (5, 4))
    evaluate.perplexity(model, windows, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert (model.training, model.dropout.training) == (True, False)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    with pytest.raises(IndexError):
        evaluate.perplexity(model, windows + 3)
    assert (model.training, model.dropout.training) == (True, False)
    model.eval()
    evaluate.kl_to(model, model, windows)
    assert not model.training and torch.is_grad_enabled()


class Head(nn.Module):
    def forward(self, logits: Tensor) -> Any:
        return {"logits": logits}


def test_accuracy_and_its_standard_error() -> None:
    eye = torch.eye(3)
    batches = [
        {"logits": eye[[0, 1, 2]], "labels": torch.tensor([0, 1, 1])},
        {"logits": eye[[2]], "labels": torch.tensor([2])},
        {"logits": eye[[0]], "labels": torch.tensor([-100])},
    ]
    got = evaluate.accuracy(Head(), batches)
    assert got == {"accuracy": 0.75, "n": 4, "standard_error": pytest.approx(math.sqrt(0.75 * 0.25 / 4))}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one labelled"),
        ([{"logits": torch.eye(3)}], "needs 'labels'"),
        ([{"logits": torch.eye(3), "labels": torch.zeros(2)}], "labels"),
        ([{"logits": torch.eye(3), "labels": torch.full((3,), -100)}], "at least one labelled"),
    ],
)
def test_accuracy_refuses_what_it_cannot_count(batches: list[dict[str, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.accuracy(Head(), batches)


def test_compare_runs_each_model_once_a_batch_and_fills_the_schema(tmp_path: Path) -> None:
    other = TABLE.flip(0)
    dense, compressed = Bigram(TABLE.clone()), Bigram(other.clone())
    windows = torch.randint(3, (5, 6))
    got = evaluate.compare(dense, compressed, windows, batch_size=2, data={"spec": "toy", "hash": "abc"})
    scored = [shape for shape in dense.batches if shape != (1, 6)]
    assert (
        scored == [(2, 6), (2, 6)] and len(dense.batches) == 4
    )  # the last two: one window, and the count of MACs
    assert got["dense"]["perplexity"] == evaluate.perplexity(dense, windows)
    assert got["compressed"]["perplexity"] == evaluate.perplexity(compressed, windows)
    assert got["compressed"]["kl"] == pytest.approx(evaluate.kl_to(dense, compressed, windows), rel=1e-12)
    assert got["data"] == {"spec": "toy", "hash": "abc", "windows": 5, "length": 6, "scored_tokens": 25}
    assert got["dense"]["params"] == 9 and "kl" not in got["dense"] and got["warnings"] == []


def test_compare_with_everything(tmp_path: Path) -> None:
    dense, compressed = llama(), llama(num_hidden_layers=1)
    folders = (tmp_path / "a", tmp_path / "b")
    for model, folder in zip((dense, compressed), folders, strict=True):
        model.save_pretrained(folder)
    tokenizer = Letters()
    got = evaluate.compare(
        dense,
        compressed,
        torch.randint(50, (3, 8)),
        tokenizer,
        prompt="123",
        max_new_tokens=8,
        folders=folders,
        timing={"prompt_length": 4, "new_tokens": 2, "repeats": 1, "warmup": 0},
        memory=True,
    )
    for name, model in (("dense", dense), ("compressed", compressed)):
        row = got[name]
        assert row["bytes_on_disk"] == 4 * row["params"] == 4 * evaluate.params(model)
        assert row["peak_memory_bytes"] >= row["bytes_on_disk"]
        assert {"prefill_ms", "decode_ms_per_token", "decode_tokens_per_s", "macs_per_token"} <= set(row)
    assert set(got["generation"]) == {
        "prompt",
        "dense",
        "compressed",
        "repetition_dense",
        "repetition_compressed",
    }
    assert len(got["latency"]["rows"]) == 2
    json.dumps(got, allow_nan=False)


def test_compare_warns_of_a_looping_and_of_a_broken_model() -> None:
    sane, loop = chain(1, 2, 3, 4, 5, 6, 7, 8, 9, 9), chain(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    windows = torch.randint(10, (2, 4))
    got = evaluate.compare(sane, loop, windows, Letters(), prompt="0", max_new_tokens=30)
    assert any("sample loops: 96% repeated 4-grams" in text for text in got["warnings"])
    assert not any("so does" in text for text in got["warnings"])
    broken = Bigram(torch.full((10, 10), math.nan))
    got = evaluate.compare(sane, broken, windows)
    assert any("perplexity of the compressed model is nan" in text for text in got["warnings"])
