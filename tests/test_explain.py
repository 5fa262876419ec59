"""What the pooling read: sums, bounds, spans, and everything a text can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rankfold.classify.explain import Explanation, explanations, words_of
from rankfold.models.classifier import ClassifierConfig, PooledForSequenceClassification
from rankfold.models.recurrent import RecurrentConfig

TEXTS = [
    "the small house by the water",
    "a",
    "city of light, state of war; unfamiliarest",
    "",
    "year after year " * 12,
    "\n\t ",
    "world 👨‍👩‍👧‍👦 water",
]
NAMES = {0: "bad", 1: "good", 2: "plain"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Word pieces: letters, pairs of letters, and some words. No special tokens."""
    return _wordpiece()


def _wordpiece(framed: bool = False) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters), ",", ";"]
    entries += ["the", "house", "water", "year", "city", "wor", "##ld"]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(entries)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if framed:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=10**30, **names)


@pytest.fixture(scope="module")
def make() -> Callable[..., Any]:
    def build(pooler: str = "lama", **options: Any) -> PooledForSequenceClassification:
        torch.manual_seed(0)
        encoder = RecurrentConfig(vocab_size=80, embedding_size=12, hidden_size=8, pad_token_id=0)
        if pooler in ("lama", "self_attentive", "multihead"):
            options = {"heads": 4} | options
        config = ClassifierConfig(
            encoder=encoder,
            pooler=pooler,
            pooler_options=options,
            id2label=NAMES,
            label2id={name: i for i, name in NAMES.items()},
        )
        model = PooledForSequenceClassification(config)
        with torch.no_grad():  # scores that reach the ends of their range
            for name, parameter in model.named_parameters():
                if name.startswith("pooler") or "embed" in name:
                    parameter.mul_(20)
        return model

    return build


def same(a: Explanation, b: Explanation) -> bool:
    assert (a.text, a.words, a.pieces, a.read, a.length, a.label) == (
        b.text,
        b.words,
        b.pieces,
        b.read,
        b.length,
        b.label,
    )
    assert list(a.probabilities.values()) == pytest.approx(list(b.probabilities.values()), abs=1e-6)
    torch.testing.assert_close(a.elsewhere, b.elsewhere, atol=1e-6, rtol=0)
    torch.testing.assert_close(a.weights, b.weights, atol=1e-6, rtol=0)
    return True


@pytest.mark.parametrize("pooler", ["lama", "additive", "self_attentive", "multihead", "mean"])
@pytest.mark.parametrize("framed", [False, True])
def test_weights_sum_to_one_over_the_words(make: Any, pooler: str, framed: bool) -> None:
    for one in explanations(make(pooler), _wordpiece(framed), TEXTS):
        assert one.weights.shape == (len(one.weights), len(one.words)) and one.weights.dtype == torch.float32
        assert len(one.pieces) == len(one.words) and one.uniform * one.length in (0, 1)
        total = one.weights.sum(1) + one.elsewhere
        torch.testing.assert_close(total, torch.full_like(total, float(one.length > 0)))
        if not framed:
            assert not one.elsewhere.any() and sum(one.pieces) == one.length
        elif one.words:
            assert (one.elsewhere > 0).all() and sum(one.pieces) == one.length - 2


def test_nothing_exceeds_the_bound(make: Any, tokenizer: Any) -> None:
    for temperature in (1.0, 0.5):
        model = make(temperature=temperature)
        found = [one for one in explanations(model, tokenizer, TEXTS) if one.words]
        for one in found:
            e = math.exp(2 / temperature)
            assert one.bound == pytest.approx(e / (e + one.length - 1))
            assert one.ratios.max() <= one.bound * one.length * (1 + 1e-6)
            assert (one.weights <= one.bound * torch.tensor(one.pieces) * (1 + 1e-6)).all()
        assert max(float(one.ratios.max()) for one in found) > 1.2  # not all of it is near uniform
    assert all(one.bound is None for one in explanations(make("self_attentive"), tokenizer, TEXTS))


def test_mean_pooling_reads_all_alike(make: Any, tokenizer: Any) -> None:
    for one in explanations(make("mean"), tokenizer, TEXTS):
        torch.testing.assert_close(one.ratios, torch.ones_like(one.ratios))


@pytest.mark.parametrize("pooler", ["lama", "multihead"])
def test_neither_padding_nor_order_changes_an_explanation(make: Any, tokenizer: Any, pooler: str) -> None:
    model = make(pooler)
    alone = [explanations(model, tokenizer, [text])[0] for text in TEXTS]
    for size in (1, 3, 16):
        assert all(map(same, explanations(model, tokenizer, TEXTS, batch_size=size), alone))
    assert all(map(same, explanations(model, tokenizer, TEXTS[::-1]), alone[::-1]))


def test_a_word_is_the_sum_of_its_pieces(make: Any, tokenizer: Any) -> None:
    model = make().train()
    text = "the world, unfamiliarest"
    one = explanations(model, tokenizer, [text], labels=["good"])[0]
    assert model.training and all(module.training for module in model.modules())
    assert [text[a:b] for a, b in one.words] == ["the", "world", ",", "unfamiliarest"]
    assert one.pieces == (1, 2, 1, 13) and one.truth == "good"
    with torch.no_grad():
        out = model.eval()(**tokenizer([text], return_tensors="pt"), output_attentions=True)
    pieces = out.attentions[0][0].split([1, 2, 1, 13], dim=1)
    torch.testing.assert_close(one.weights, torch.stack([part.sum(1) for part in pieces], 1))
    assert list(one.probabilities) == ["bad", "good", "plain"]
    assert list(one.probabilities.values()) == pytest.approx(out.logits[0].softmax(-1).tolist())
    assert one.label == NAMES[int(out.logits.argmax())]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_tail_beyond_the_maximum_is_not_read(make: Any, side: str) -> None:
    tokenizer = _wordpiece()
    tokenizer.truncation_side = side
    text = " ".join(["house water"] * 20)
    one, short = explanations(make(), tokenizer, [text, "city"], max_length=7)
    assert one.length == len(one.words) == 7 and short.read == (0, 4)
    assert one.read == ((0, one.words[-1][1]) if side == "right" else (one.words[0][0], len(text)))
    assert len(text[slice(*one.read)].split()) == 7
    tokenizer.model_max_length = 5
    assert explanations(make(), tokenizer, [text])[0].length == 5


@pytest.mark.parametrize("texts", [[""], ["", " \n"], ["", "the house"]])
def test_texts_without_words_say_why(make: Any, tokenizer: Any, texts: list[str]) -> None:
    one = explanations(make(), tokenizer, texts)[0]
    assert one.words == () and one.weights.shape == (4, 0) and one.read == (0, 0) and one.bound is None
    assert one.reason.startswith("the text is empty") and one.ratios.shape == (4, 0)
    assert one.label in NAMES.values() and sum(one.probabilities.values()) == pytest.approx(1)
    framed = explanations(make(), _wordpiece(framed=True), texts)[0]
    assert framed.length == 2 and framed.words == () and "frame" in framed.reason
    assert explanations(make(), tokenizer, []) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a 👨‍👩‍👧‍👦 b", ["a", "👨‍👩‍👧‍👦", "b"]),
        ("👍🏽🇫🇷", ["👍🏽", "🇫🇷"]),
        ("e\u0301te\u0301", ["e\u0301", "t", "e\u0301"]),
        ("\r\nab", ["a", "b"]),
        ("क्षि", ["क्षि"]),
    ],
)
def test_no_grapheme_cluster_is_torn(text: str, expected: list[str]) -> None:
    """A tokenizer that makes a word of every character, the hardest case."""
    spans, members = words_of(text, [(i, i + 1) for i in range(len(text))], list(range(len(text))))
    assert [text[a:b] for a, b in spans] == expected
    placed = [piece for pieces in members for piece in pieces]
    assert placed == [i for i, c in enumerate(text) if not c.isspace()]


def test_pieces_with_space_and_bytes() -> None:
    """Offsets of byte-level tokenizers: space belongs to the piece, several pieces have one character."""
    offsets, words = [(0, 0), (0, 2), (2, 5), (5, 6), (6, 7), (6, 7), (0, 0)], [None, 0, 0, 1, 2, 3, None]
    spans, members = words_of("ab cd 😀", offsets, words)
    assert spans == ((0, 5), (6, 7)) and members == [[1, 2], [4, 5]]


def test_a_lone_surrogate_is_read_as_unknown(make: Any, tokenizer: Any) -> None:
    one = explanations(make(), tokenizer, ["the \ud83d house"])[0]
    assert one.text == "the \ud83d house" and [b - a for a, b in one.words] == [3, 1, 5]


def test_labels_are_names_or_numbers(make: Any, tokenizer: Any) -> None:
    found = explanations(make(), tokenizer, ["a", "b"], labels=[2, "bad"])
    assert [one.truth for one in found] == ["plain", "bad"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": ["good"]}, "2 texts have 1 labels"),
        ({"labels": ["good", "ugly"]}, r"label 2 is 'ugly'.*bad, good, plain"),
        ({"labels": [0, 3]}, "label 2 is 3"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_refusals_name_the_option(make: Any, tokenizer: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        explanations(make(), tokenizer, ["a", "b"], **options)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_self_attention_is_not_a_pooling(tokenizer: Any, implementation: str) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=80, max_position_embeddings=16, **sizes)
    config._attn_implementation = implementation
    model = BertForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"Self-attention between words.* is not that"):
        explanations(model, tokenizer, ["the house"])
    with pytest.raises(ValueError, match=r"max_length=17 .*at most 16"):
        explanations(model, tokenizer, ["the house"], max_length=17)


def test_a_slow_tokenizer_has_no_offsets(make: Any) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer"):
        explanations(make(), Slow(), ["a"])
