"""The recurrent encoder and the classifier: padding, empty texts, counts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import WORDS, classifier, ragged, recurrent, transformer
from transformers import AutoModel, DistilBertConfig

from rankfold.models import (
    PooledForSequenceClassification,
    RecurrentConfig,
    RecurrentModel,
    TransformerConfig,
    TransformerModel,
)
from rankfold.models.reading import moved, words_first

LENGTHS = (5, 1, 7, 0, 3)
ENCODERS: dict[str, Any] = {
    "recurrent": recurrent(num_layers=2),
    "dense": transformer(),
    "linformer": transformer(attention="linformer"),
}


def states(encoder: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    with torch.no_grad():
        return encoder.eval()(ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("kind", ENCODERS)
def test_padding_anywhere_changes_no_state(kind: str) -> None:
    encoder = AutoModel.from_config(ENCODERS[kind])
    ids, mask = ragged(*LENGTHS)
    found = states(encoder, ids, mask)
    alone = [states(encoder, ids[i : i + 1, :n], None)[0] for i, n in enumerate(LENGTHS) if n]
    rows = [i for i, n in enumerate(LENGTHS) if n]
    for i, expected in zip(rows, alone, strict=True):
        torch.testing.assert_close(found[i, : LENGTHS[i]], expected, atol=1e-6, rtol=0)
        assert not found[i, LENGTHS[i] :].any()
    assert not found[3].any()
    for left in (False, True):
        wide, where = ragged(*LENGTHS, width=12, left=left)
        wide = wide.masked_fill(where == 0, 17)  # what stands at padding is not read
        again = states(encoder, wide, where)
        torch.testing.assert_close(again[where.bool()], found[mask.bool()], atol=1e-6, rtol=0)
    holes = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 1]])
    scattered = torch.zeros_like(holes).masked_scatter(holes.bool(), ids[0])
    again = states(encoder, scattered, holes)
    torch.testing.assert_close(again[holes.bool()], found[0, :5], atol=1e-6, rtol=0)


def test_words_first_and_back() -> None:
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    place, order = words_first(mask)
    x = torch.arange(16.0).view(4, 4, 1)
    assert moved(x, order)[0, :, 0].tolist() == [1, 3, 0, 2]
    assert torch.equal(moved(moved(x, order), place), x)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("context", ["learned", "mean"])
def test_padding_changes_nothing_in_the_classifier(kind: str, context: str) -> None:
    model = classifier(ENCODERS[kind], pooler_options={"heads": 4, "context": context})
    ids, mask = ragged(*LENGTHS)
    with torch.no_grad():
        plain = model(ids, mask, output_attentions=True)
        for left in (False, True):
            wide, where = ragged(*LENGTHS, width=13, left=left)
            again = model(wide, where, output_attentions=True)
            torch.testing.assert_close(again.logits, plain.logits, atol=1e-6, rtol=0)
            weights, expected = (out.attentions[0].transpose(1, 2) for out in (again, plain))
            torch.testing.assert_close(weights[where.bool()], expected[mask.bool()], atol=1e-6, rtol=0)
        assert torch.equal(model(ids).logits, plain.logits)  # without a mask, padding is what has its id
    assert plain.attentions[0].shape == (5, 4, 7)
    torch.testing.assert_close(plain.attentions[0].sum(-1)[:3], torch.ones(3, 4))


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_text_without_words_is_no_nan_and_disturbs_nobody(kind: str) -> None:
    model = classifier(ENCODERS[kind]).train()
    ids, mask = ragged(*LENGTHS)
    out = model(ids, mask, labels=torch.tensor([0, 1, 2, 0, 1]), output_attentions=True)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        out = model(ids, mask, output_attentions=True)
        assert model.dense is not None
        nothing = model.classifier(model.dense.bias.relu())
        torch.testing.assert_close(out.logits[3], nothing)
        assert not out.attentions[0][3].any()
        others = [0, 1, 2, 4]
        alone = model(ids[others], mask[others]).logits
        torch.testing.assert_close(alone, out.logits[others], atol=1e-6, rtol=0)
        empty = model(torch.zeros(2, 0), torch.zeros(2, 0)).logits  # as a tokenizer gives two empty texts
        torch.testing.assert_close(empty, nothing.expand(2, 3))


def test_states_are_those_of_torch() -> None:
    encoder = RecurrentModel(recurrent(num_layers=2)).eval()
    ids, _ = ragged(6, 6)
    expected = encoder.rnn(encoder.embeddings(ids))[0]
    torch.testing.assert_close(encoder(ids).last_hidden_state, expected, atol=1e-7, rtol=0)
    assert encoder(ids, return_dict=False)[0].shape == (2, 6, 12)
    assert encoder(torch.zeros(2, 0, dtype=torch.long)).last_hidden_state.shape == (2, 0, 12)
    table = encoder.get_input_embeddings()(ids)
    torch.testing.assert_close(encoder(inputs_embeds=table).last_hidden_state, expected, atol=1e-7, rtol=0)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_counts_are_the_papers() -> None:
    """The table at e=300, h=100, d=200, m=10, k=1."""
    config = RecurrentConfig(vocab_size=50, embedding_size=300, hidden_size=100)
    heads = {"heads": 10}
    for width, wide in ((None, 200), (64, 64)):
        model = classifier(config, pooler_options=heads, num_labels=4, classifier_width=width)
        assert model.dense is not None
        assert count(model.dense) + count(model.classifier) == 2000 * wide + wide + 4 * wide + 4
        assert count(model.encoder.rnn) == 2 * (3 * 100 * 300 + 3 * 100**2 + 6 * 100) == 241_200
        assert model.pooler.attention_params() == 4_000 + 200 and model.pooler.word_mlp_params() == 40_200
        assert count(model.pooler) == 44_400
    linear = classifier(config, pooler_options=heads, classifier_width=0)
    assert linear.dense is None and count(linear.classifier) == 2000 * 3 + 3


def test_counts_of_a_transformer_layer() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1}
    with torch.device("meta"):
        dense = TransformerModel(TransformerConfig(**sizes, num_attention_heads=8))
        mixed = TransformerModel(
            TransformerConfig(
                **sizes, num_attention_heads=8, attention="linformer", max_position_embeddings=2304, k=128
            )
        )
    assert count(dense.layers[0]) == 3_152_384
    assert count(mixed.layers[0]) == 3_152_384 + 589_824


def test_vectors_are_loaded_where_they_belong() -> None:
    model = RecurrentModel(recurrent())
    before = model.embeddings.weight.detach().clone()
    vectors = torch.randn(2, 12, dtype=torch.float64)
    assert model.load_vectors_(vectors, [7, 3]) is model
    torch.testing.assert_close(model.embeddings.weight[[7, 3]], vectors.float())
    rest = [i for i in range(WORDS) if i not in (3, 7)]
    assert torch.equal(model.embeddings.weight[rest], before[rest])
    assert not model.embeddings.weight[0].any() and 0.05 < before.std() < 0.2
    for wrong, ids, message in (
        (vectors[:, :5], [1, 2], r"\(2, 5\).*12 wide"),
        (vectors, [1], "2 vectors for 1 ids"),
        (vectors, [1, WORDS], f"token id {WORDS} .*{WORDS} entries"),
        (vectors * torch.nan, [1, 2], "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_vectors_(wrong, ids)


def test_word_dropout_drops_whole_words_while_training() -> None:
    model = RecurrentModel(recurrent(word_dropout=0.5)).train()
    x = model._words_dropped(torch.ones(50, 8, 12))
    dropped = (x == 0).all(-1)
    assert torch.equal(dropped, (x == 0).any(-1)) and 0.4 < dropped.float().mean() < 0.6
    assert torch.equal(model.eval()._words_dropped(x), x)


def test_embeddings_can_be_the_context() -> None:
    options = {"heads": 2, "context": "mean", "context_of": "embedding"}
    model = classifier(recurrent(), pooler_options=options)
    ids, mask = ragged(*LENGTHS)
    table = model.get_input_embeddings()(ids)
    again = model(inputs_embeds=table, attention_mask=mask)
    torch.testing.assert_close(model(ids, mask).logits, again.logits)


def test_the_loss_is_a_mean_or_the_share_of_a_step() -> None:
    model = classifier()
    ids, mask = ragged(*LENGTHS)
    labels = torch.tensor([0, 1, 2, 0, 1])
    out = model(ids, mask, labels=labels)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, labels))
    share = model(ids, mask, labels=labels, num_items_in_batch=20).loss
    torch.testing.assert_close(share, out.loss / 4)
    loss, logits, weights = model(ids, mask, labels=labels, output_attentions=True, return_dict=False)
    assert loss.shape == () and logits.shape == (5, 3) and weights[0].shape == (5, 4, 7)


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": IDS + WORDS}, f"token id {WORDS + 3} is outside .* {WORDS} entries"),
        ({"input_ids": IDS - 2}, "token id -1"),
        ({"input_ids": IDS, "labels": torch.tensor([7])}, "label 7, but the model has 3 classes"),
        ({"input_ids": IDS, "labels": torch.tensor([-100])}, "label -100"),
        ({"input_ids": IDS, "labels": torch.tensor([0.5])}, "torch.float32"),
        ({"input_ids": IDS, "labels": torch.tensor([0, 1])}, r"\(2,\).*1 texts"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 4)}, r"\(1, 4\).*\(1, 3\)"),
        ({"input_ids": IDS[0]}, r"\(3,\)"),
        ({}, "input_ids or inputs_embeds"),
        ({"input_ids": torch.ones(1, 17, dtype=torch.long)}, "17 positions .* at most 16"),
    ],
)
def test_bad_input_is_named(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier(transformer())(**inputs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classifier(num_labels=1), "one class only"),
        (lambda: classifier(problem_type="multi_label_classification"), "one class"),
        (lambda: classifier(pooler="median"), "'median' is not one of mean, additive"),
        (lambda: classifier(pooler_options={"heads": 1}), "heads=1"),
        (lambda: classifier(pooler="mean", pooler_options={"heads": 2}), "no option 'heads'"),
        (lambda: classifier(classifier_width=-1), "classifier_width=-1"),
        (lambda: classifier(dropout=1.0), "dropout=1.0"),
        (lambda: RecurrentModel(recurrent(hidden_size=0)), "hidden_size=0"),
        (lambda: RecurrentModel(recurrent(word_dropout=-0.5)), "word_dropout=-0.5"),
        (lambda: TransformerModel(transformer(attention="sparse")), "'sparse' is not one of dense"),
        (lambda: TransformerModel(transformer(attention="linformer", sharing="all")), "'all'"),
        (lambda: TransformerModel(transformer(attention="linformer", k=17)), "k=17.*16"),
        (lambda: TransformerModel(transformer(num_attention_heads=3)), "num_heads=3"),
        (lambda: TransformerModel(transformer(is_decoder=True)), "causal"),
        (lambda: PooledForSequenceClassification.from_encoder(classifier()), "AutoModel"),
    ],
)
def test_bad_sizes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pooler_on_a_pretrained_encoder_keeps_its_weights() -> None:
    config = DistilBertConfig(
        vocab_size=WORDS, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=16
    )
    encoder = AutoModel.from_config(config).eval()
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    names = {0: "bad", 1: "good", 2: "so"}
    model = PooledForSequenceClassification.from_encoder(
        encoder, pooler_options={"heads": 4}, id2label=names
    ).eval()
    assert model.encoder is encoder and model.config.label2id == {"bad": 0, "good": 1, "so": 2}
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
    ids, mask = ragged(*LENGTHS)
    wide, where = ragged(*LENGTHS, width=12)
    out = model(ids, mask)
    assert out.logits.shape == (5, 3) and out.logits.isfinite().all()
    torch.testing.assert_close(model(wide, where).logits, out.logits, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"17 positions .* at most 16"):
        model(torch.ones(1, 17, dtype=torch.long))
