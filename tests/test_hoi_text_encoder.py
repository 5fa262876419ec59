"""Text encoders: a CLIP, its text tower alone, and a sentence encoder, each tiny and opened from a folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from rankfold.hoi.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    """A tiny CLIP, its text tower, and a sentence encoder of no projection, each with a tokenizer that ends
    its texts as CLIP's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, CLIPTextModelWithProjection

    tokenizer = copy.deepcopy(tiny_tokenizer)  # the session's
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    tokenizer.model_max_length = 12
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 128, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
    torch.manual_seed(0)
    clip = CLIPModel(
        CLIPConfig(
            text_config=size | ids | {"max_position_embeddings": 12, "projection_dim": 16},
            vision_config=size | {"image_size": 32, "patch_size": 16, "projection_dim": 16},
            projection_dim=16,
        )
    )
    for parameter in clip.parameters():  # the usual start is nearly the same for all texts
        torch.nn.init.normal_(parameter, std=0.3)
    tower = CLIPTextModelWithProjection(clip.config.text_config)
    tower.load_state_dict({k: v for k, v in clip.state_dict().items() if k in tower.state_dict()})
    plain = BertModel(BertConfig(**size, **ids, max_position_embeddings=12), add_pooling_layer=False)
    root, folders = tmp_path_factory.mktemp("towers"), {}
    for name, model in (("clip", clip), ("tower", tower), ("plain", plain)):
        folders[name] = root / name
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


SENTENCES = ["the state of the year", "light", "a page that was made by the world of small models", "light"]


@pytest.mark.parametrize(("name", "width"), [("clip", 16), ("tower", 16), ("plain", 32)])
def test_texts_do_not_depend_on_their_batch(towers: dict[str, Path], name: str, width: int) -> None:
    encoder = TextEncoder.open(str(towers[name]))
    found = encoder(SENTENCES)
    assert found.shape == (4, width) and found.dtype == torch.float32 and not found.requires_grad
    assert torch.equal(found[1], found[3])
    encoder.batch = 1
    for text, row in zip(SENTENCES, found, strict=True):
        assert torch.allclose(encoder([text])[0], row, atol=1e-5)
    assert float((found.norm(dim=1) - 1).abs().min()) > 1e-3  # as they come


def test_a_clip_and_its_tower_agree(towers: dict[str, Path]) -> None:
    both = [TextEncoder.open(str(towers[name])) for name in ("clip", "tower")]
    assert torch.allclose(both[0](SENTENCES), both[1](SENTENCES), atol=1e-5)


def test_long_texts_are_cut_before_their_end_token(towers: dict[str, Path]) -> None:
    encoder = TextEncoder.open(str(towers["clip"]))
    assert encoder.length == 12
    words = ["the"] * 10
    assert torch.allclose(
        encoder([" ".join([*words, "city", "life"])]), encoder([" ".join(words)]), atol=1e-5
    )
    assert not torch.allclose(
        encoder([" ".join(words[:9])]), encoder([" ".join([*words[:9], "city"])]), atol=1e-3
    )


def test_a_mean_is_over_words_alone(towers: dict[str, Path]) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = (
        AutoModel.from_pretrained(towers["plain"]).eval(),
        AutoTokenizer.from_pretrained(towers["plain"]),
    )
    with torch.no_grad():
        expected = model(**tokenizer([SENTENCES[0]], return_tensors="pt")).last_hidden_state[0].mean(0)
    assert torch.allclose(TextEncoder.open(str(towers["plain"]))(SENTENCES)[0], expected, atol=1e-5)


def test_identity_is_of_the_weights(towers: dict[str, Path]) -> None:
    first, second = (TextEncoder.open(str(towers["plain"])) for _ in range(2))
    with torch.no_grad():
        next(second.model.parameters()).view(-1)[0] += 1e-3
    assert first.identity != second.identity
    assert first.identity == TextEncoder.open(str(towers["plain"])).identity


def test_what_is_no_encoder(towers: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match=r"no text encoder '.*nothing': neither a folder"):
        TextEncoder.open(str(tmp_path / "nothing"))
    encoder = TextEncoder.open(str(towers["plain"]))
    for texts in ([], ["a", " "]):
        with pytest.raises(ValueError, match="at least one, none of them empty"):
            encoder(texts)
    weights = load_file(towers["tower"] / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, towers["tower"] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of its model, 'text_projection\.weight' first"):
        TextEncoder.open(str(towers["tower"]))
