"""Prompts, the file of descriptions, features, and their file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_hoi
from torch import Tensor
from torch.nn import functional as F

from rankfold.hoi.text import Descriptions, encode, prompts
from rankfold.hoi.text_file import features_of, load_features, read_descriptions, save_features

TABLE = toy_hoi.table()
TOLD = {
    "format": 1,
    "source": "a model",
    "classes": {"ride bicycle": "Sits on the saddle.", "no_interaction cup": ["Near a cup.", "Hands apart."]},
    "actions": {"ride": ["legs astride", "hands ahead"], "no_interaction": "nothing is held"},
    "guides": {"dog": ["a leash", "four legs"]},
}


class Letters:
    """An encoder that counts letters."""

    name, identity, calls = "letters", "letters 1", 0

    def __call__(self, texts: Any) -> Tensor:
        self.calls += 1
        return torch.tensor([[float(t.count(c)) for c in "aeiou "] for t in texts])


# --- prompts -----------------------------------------------------------------------------------------------


def test_templates() -> None:
    texts = prompts(TABLE)
    assert texts.classes[0] == "a photo of a person riding a bicycle"
    assert texts.classes[9] == "a photo of a person and a cup"  # no_interaction
    assert texts.actions[0] == "a photo of a person riding something"
    assert texts.actions[5] == "a photo of a person not interacting with anything"
    assert texts.objects == tuple(
        f"a photo of {x}" for x in ("a bicycle", "a person", "a dog", "a cup", "nothing")
    )
    assert len(texts.guides) == 4 and all("a dog" in text for text in texts.guides[2])


def test_descriptions_follow_the_prompt_and_templates_fill_in() -> None:
    told = read_descriptions(TOLD, TABLE)
    texts, bare = prompts(TABLE, told), prompts(TABLE)
    assert texts.classes[0] == "a photo of a person riding a bicycle: Sits on the saddle."
    assert texts.classes[9] == "a photo of a person and a cup: Near a cup. Hands apart."
    assert texts.classes[1:9] == bare.classes[1:9]
    assert texts.actions[0] == "legs astride; hands ahead" and texts.actions[5] == "nothing is held"
    assert texts.actions[1:5] == bare.actions[1:5]
    assert texts.guides[2] == ("a leash", "four legs") and texts.guides[0] == bare.guides[0]
    assert told.source == "a model"
    assert len({bare.key("x"), bare.key("y"), texts.key("x")}) == 3


def test_descriptions_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(TOLD))
    assert read_descriptions(path, TABLE) == read_descriptions(TOLD, TABLE)
    assert read_descriptions({"format": 1}, TABLE) == Descriptions()
    path.write_text("{")
    with pytest.raises(ValueError, match=r"texts\.json is not JSON"):
        read_descriptions(path, TABLE)
    with pytest.raises(ValueError, match=r"none\.json is no file; descriptions of classes"):
        read_descriptions(tmp_path / "none.json", TABLE)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "'format' is 2; descriptions have format 1"),
        ({"verbs": {}}, "unknown part 'verbs'; there are classes, actions, guides"),
        ({"classes": []}, "'classes' must be an object of texts by name"),
        ({"classes": {"ride bycicle": "x"}}, "'classes' has 'ride bycicle'.*did you mean 'ride bicycle'"),
        ({"classes": {"ride dog": "x"}}, "'classes' has 'ride dog', which the class table has not"),
        ({"actions": {"ride": " "}}, r"actions\['ride'\] must be a text, or a list of texts, none empty"),
        ({"actions": {"ride": []}}, r"actions\['ride'\] must be a text"),
        ({"guides": {"dog": ["x", 3]}}, r"guides\['dog'\] must be a text"),
        (
            {"actions": {"no_interaction": "x", "no interaction": "y"}},
            "'actions' has 'no interaction' twice",
        ),
    ],
)
def test_bad_descriptions(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^descriptions of classes: .*{says}"):
        read_descriptions(TOLD | change, TABLE)


# --- features ----------------------------------------------------------------------------------------------


def test_all_have_unit_rows_but_objects() -> None:
    encoder = Letters()
    told = read_descriptions(TOLD, TABLE)
    text, texts = encode(TABLE, encoder, told), prompts(TABLE, told)
    text.check(TABLE, 6)
    assert encoder.calls == 1
    assert torch.allclose(text.classes, F.normalize(encoder(texts.classes), dim=-1))
    assert torch.allclose(text.actions, F.normalize(encoder(texts.actions), dim=-1))
    assert torch.equal(text.objects, encoder(texts.objects))
    assert [len(guide) for guide in text.guides] == [3, 3, 2, 3]
    assert torch.allclose(text.guides[2], F.normalize(encoder(["a leash", "four legs"]), dim=-1))
    assert text.source == "letters; descriptions: a model" and encode(TABLE, encoder).source == "letters"
    assert text.hash == texts.key("letters 1") and text.table == TABLE.hash


def test_an_encoder_of_zeros() -> None:
    class Deaf(Letters):
        def __call__(self, texts: Any) -> Tensor:
            return super().__call__(texts) * torch.tensor([["dog" not in text] for text in texts])

    with pytest.raises(
        ValueError, match="encoder 'letters' gives zeros for 'a photo of a person hugging a dog'"
    ):
        encode(TABLE, Deaf())


def test_features_are_checked() -> None:
    text = toy_hoi.texts()
    for change, says in (
        ({"actions": text.actions[:, :8]}, r"actions have shape \(6, 8\), the classes \(10, 16\)"),
        ({"classes": text.classes * 1.1}, "classes have unit rows; row . has norm 1.1"),
        ({"objects": text.objects * float("inf")}, "objects .* hold NaN or infinite"),
        ({"guides": (2 * text.guides[0], *text.guides[1:])}, r"guides\[0\] have unit rows"),
        ({"guides": text.guides[1:]}, "5 object features go with guides of 4 objects, .* there are 3"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(text, **change)
    with pytest.raises(ValueError, match="width 16, the model's is 32"):
        text.check(TABLE, 32)
    fewer = replace(TABLE, interactions=TABLE.interactions[:-1])
    with pytest.raises(ValueError, match=r"text features of \(10, 6, 4\) .* the class table has \(9, 6, 4\)"):
        text.check(fewer)
    other = replace(TABLE, verbs=(*TABLE.verbs[:-1], "eat"))
    with pytest.raises(ValueError, match="another class table of the same size"):
        replace(text, table=TABLE.hash).check(other)


# --- the file of features ----------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    text = encode(TABLE, Letters())
    path = save_features(text, tmp_path / "deep" / "text.safetensors")
    back = load_features(path, TABLE, width=6, key=text.hash)
    assert all(torch.equal(getattr(text, n), getattr(back, n)) for n in ("classes", "actions", "objects"))
    assert [len(g) for g in back.guides] == [3, 3, 3, 3]
    assert all(torch.equal(a, b) for a, b in zip(text.guides, back.guides, strict=True))
    assert (back.source, back.hash, back.table) == (text.source, text.hash, text.table)


def test_objects_without_key_points(tmp_path: Path) -> None:
    text = toy_hoi.texts()
    none = replace(text, guides=tuple(guide[:0] for guide in text.guides))
    back = load_features(save_features(none, tmp_path / "text.safetensors"), TABLE)
    assert [tuple(guide.shape) for guide in back.guides] == [(0, 16)] * 4


def test_what_is_not_such_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "text.safetensors"
    with pytest.raises(ValueError, match=r"text\.safetensors is no file"):
        load_features(path)
    good = save_features(toy_hoi.texts(), tmp_path / "good").read_bytes()
    path.write_bytes(good[:-40])
    with pytest.raises(ValueError, match=r"text\.safetensors is damaged"):
        load_features(path)
    save_file({"classes": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"text\.safetensors: it does not hold text features of format 1"):
        load_features(path)
    body = {"format": 1, "guides": [2, 3, 1, 9]}
    text = toy_hoi.texts()
    tensors = {n: getattr(text, n) for n in ("classes", "actions", "objects")}
    for guides, says in (
        (body["guides"], "lists 15 key points and holds 8"),
        ([-1], r"key points are \[-1\]"),
    ):
        meta = {"rankfold": json.dumps(body | {"guides": guides})}
        save_file(tensors | {"guides": torch.cat(text.guides)}, path, metadata=meta)
        with pytest.raises(ValueError, match=says):
            load_features(path)
    save_file(tensors, path, metadata={"rankfold": json.dumps(body)})
    with pytest.raises(ValueError, match=r"text\.safetensors is damaged"):
        load_features(path)
    meta = {"rankfold": json.dumps(body | {"guides": [2, 3, 1, 2]})}
    bent = tensors | {"guides": torch.cat(text.guides), "classes": text.classes * 2}
    save_file(bent, path, metadata=meta)
    with pytest.raises(ValueError, match=r"text\.safetensors: text features classes have unit rows"):
        load_features(path)


def test_features_of_something_else(tmp_path: Path) -> None:
    path = save_features(encode(TABLE, Letters()), tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="holds features of width 6, expected 512"):
        load_features(path, width=512)
    with pytest.raises(ValueError, match=r"made from other texts or by another encoder"):
        load_features(path, key="0")
    with pytest.raises(ValueError, match=r"text\.safetensors: text features of another class table"):
        load_features(path, replace(TABLE, verbs=(*TABLE.verbs[:-1], "eat")))


def test_features_are_encoded_once(tmp_path: Path) -> None:
    encoder, cache, said = Letters(), tmp_path / "text.safetensors", []
    first = features_of(TABLE, encoder, cache=cache, progress=said.append)
    again = features_of(TABLE, encoder, cache=cache, progress=said.append)
    assert encoder.calls == 1 and torch.equal(first.classes, again.classes)
    assert said == ["encoding 33 texts with letters"]
    held = cache.read_bytes()
    encoder.identity = "letters 2"
    with pytest.raises(ValueError, match="another encoder"):
        features_of(TABLE, encoder, cache=cache)
    encoder.identity = "letters 1"
    with pytest.raises(ValueError, match="other texts"):
        features_of(TABLE, encoder, read_descriptions(TOLD, TABLE), cache=cache)
    assert cache.read_bytes() == held
