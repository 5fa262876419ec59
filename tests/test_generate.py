"""A model that loops is flagged, and the greedy sample is what greedy decoding gives."""

from __future__ import annotations

import pytest
import torch
from toy_language import Letters, chain, llama

from rankfold import evaluate


def test_repetition_rate_by_hand() -> None:
    assert evaluate.repetition_rate([1, 2, 3, 4, 5]) == 0
    assert evaluate.repetition_rate([1, 2]) == 0
    assert evaluate.repetition_rate([7] * 10) == pytest.approx(6 / 7)  # 7 four-grams, one distinct
    assert evaluate.repetition_rate("a b a b a b", n=2) == pytest.approx(3 / 5)
    assert evaluate.repetition_rate(torch.tensor([1, 2, 1, 2]), n=1) == 0.5
    assert evaluate.degenerate(0.51) and not evaluate.degenerate(0.5)
    with pytest.raises(ValueError, match="n=0"):
        evaluate.repetition_rate("a", n=0)


def test_a_looping_model_is_flagged_and_a_sane_one_is_not() -> None:
    loop = evaluate.generate_sample(chain(1, 2, 0, 0, 0, 0, 0, 0, 0, 0), Letters(), "0", max_new_tokens=20)
    assert loop["text"] == "12012012012012012012" and loop["degenerate"]
    assert loop["repetition"] == pytest.approx(1 - 3 / 17)
    sane = evaluate.generate_sample(chain(1, 2, 3, 4, 5, 6, 7, 8, 9, 9), Letters(), "0", max_new_tokens=20)
    assert (sane["text"], sane["tokens"], sane["degenerate"]) == (
        "12345678",
        8,
        False,
    )  # stops at the end of text
    with pytest.raises(ValueError, match="has no tokens"):
        evaluate.generate_sample(chain(*range(10)), Letters(), "")


def test_the_cached_greedy_sample_equals_generate() -> None:
    model = llama()
    prompt = torch.tensor([[1, 2, 3, 4]])
    mask = torch.ones_like(prompt)
    expected = model.generate(
        prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0, 4:]
    tokenizer = Letters()
    tokenizer.decode = lambda ids, **_: " ".join(map(str, ids))  # type: ignore[method-assign]
    tokenizer.eos_token_id = None  # type: ignore[assignment]
    sample = evaluate.generate_sample(model, tokenizer, "1234", max_new_tokens=12)
    assert sample["text"] == " ".join(str(int(i)) for i in expected)
