"""What a HOLa model trains, how many parameters that is, and what its folder and its options keep."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_hoi import D, batch, config, model, table, texts, vision

from rankfold.hoi.accounting import accounting
from rankfold.hoi.config import DEPARTURES, HolaConfig
from rankfold.hoi.model import HolaModel

BACKBONES: dict[str, tuple[int, dict[str, int]]] = {
    "b": (512, {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
          | {"num_attention_heads": 12, "image_size": 224, "patch_size": 16}),
    "l": (768, {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
          | {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}),
}  # fmt: skip
PARTS = (
    "decomposition",
    "image encoder adapters",
    "text adapters",
    "pair adapters",
    "tokens",
    "prior",
    "scales",
    "unused",
)
# From the page's table, and ours without what is never used.
UPSTREAM = {
    "b": (84_568, 1_602_048, 413_568, 611_200, 410_432, 91_072, 2, 812_032),
    "l": (102_744, 4_002_816, 545_152, 841_600, 509_504, 123_840, 2, 1_807_872),
}
DESCRIBED = {
    "b": (84_568, 1_600_512, 306_496, 331_520, 402_112, 91_072, 2, 0),
    "l": (102_744, 3_999_744, 405_312, 463_616, 501_184, 123_840, 2, 0),
}


@cache
def hico() -> str:
    """A table of HICO-DET's sizes: 600 classes of 117 verbs and 80 objects, as JSON."""
    verbs, objects = [f"verb {i}" for i in range(117)], ["person", *(f"object {i}" for i in range(1, 80))]
    pairs = [[i % 117, (i % 117 + i // 117) % 80] for i in range(600)]
    return json.dumps({"verbs": verbs, "objects": objects, "interactions": pairs, "rare": [], "name": ""})


def full_size(backbone: str, **options: Any) -> HolaModel:
    """The model of the paper, without memory."""
    width, sizes = BACKBONES[backbone]
    with torch.device("meta"):
        given = HolaConfig(
            vision=sizes, projection_dim=width, classes=json.loads(hico()), num_guides=[10] * 80, **options
        )
        return HolaModel(given)


@pytest.mark.parametrize("backbone", ["b", "l"])
@pytest.mark.parametrize("upstream", [True, False])
def test_parameters_are_those_of_the_page(backbone: str, upstream: bool) -> None:
    made = full_size(backbone, upstream=upstream)
    expected = (UPSTREAM if upstream else DESCRIBED)[backbone]
    assert accounting(made) == dict(zip(PARTS, expected, strict=True))
    total = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert total == sum(expected) == made.num_parameters(only_trainable=True)
    if upstream:
        used = {"b": 3_212_890, "l": 6_125_658}[backbone]
        assert (total, total - accounting(made)["unused"]) == (
            {"b": 4_024_922, "l": 7_933_530}[backbone],
            used,
        )


@pytest.mark.parametrize("backbone", ["b", "l"])
def test_pieces_of_the_accounting(backbone: str) -> None:
    """W, B and Wa; one adapter of the image encoder; attentions of a decoder layer."""
    made, (width, sizes) = full_size(backbone, upstream=True), BACKBONES[backbone]
    factors = [p.numel() for p in made.language.decomposition.parameters()]
    assert sorted(factors) == sorted([600 * 71, 71 * width, 117 * 48])
    each = {sum(p.numel() for p in adapter.parameters()) for adapter in made.vision.adapters}
    assert each == {{"b": 133_504, "l": 166_784}[backbone]}
    assert len(made.vision.adapters) == sizes["num_hidden_layers"]
    assert made.vision.tower.num_parameters() > 80_000_000


def test_only_what_is_named_trains() -> None:
    """Trap 15: positions, the last norm and the projection of the image encoder stay frozen."""
    made = model()
    frozen = {name for name, p in made.named_parameters() if not p.requires_grad}
    encoder = {name for name, _ in made.named_parameters() if name.startswith("vision.tower.")}
    assert frozen == encoder | {"vision.projection.weight"}
    for part in ("position_embedding.weight", "post_layernorm.weight"):
        assert any(name.endswith(part) for name in frozen)
    trained = {name.split(".")[0] for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {
        "language",
        "vision",
        "prior_mlp",
        "tokens",
        "img_adapter",
        "pair_scale",
        "union_scale",
    }


@pytest.mark.parametrize("upstream", [False, True])
def test_everything_that_trains_gets_a_gradient(upstream: bool) -> None:
    """Trap 5. B's comes from what reconstructs T, not from the task."""
    made = model(upstream=upstream).train()
    out = made(**batch())
    (out.logits.sigmoid() * out.prior).sum().backward()
    decomposition = made.language.decomposition
    assert decomposition.basis.grad is None and decomposition.weights.grad.abs().sum() > 0
    (decomposition.weights.detach() @ decomposition.basis - decomposition.target).square().sum().backward()
    without = {name for name, p in made.named_parameters() if p.requires_grad and p.grad is None}
    used = sum(p.numel() for name, p in made.named_parameters() if p.requires_grad and name not in without)
    assert used == sum(accounting(model()).values())
    assert {name for name in without if name.startswith("unused.")} == {
        name for name, _ in made.named_parameters() if name.startswith("unused.")
    }
    assert bool(without) == upstream


def test_what_is_never_used_changes_nothing() -> None:
    made, given = model(dead=True), batch()
    before = made(**given).logits
    with torch.no_grad():
        for parameter in made.unused.parameters():
            parameter.fill_(7)
    assert torch.equal(made(**given).logits, before)


# --- options -----------------------------------------------------------------------------------------------


def test_upstream_chooses_every_departure_that_is_not_given() -> None:
    for upstream in (False, True):
        given = config(upstream=upstream)
        assert {name: getattr(given, name) for name in DEPARTURES} == {
            name: both[upstream] for name, both in DEPARTURES.items()
        }
    mixed = config(upstream=True, scale_init=1.0)
    assert (mixed.scale_init, mixed.count) == (1.0, "all")
    assert HolaConfig.from_dict(mixed.to_dict()).to_dict() == mixed.to_dict()


def test_actions_use_the_last_two_thirds_of_the_basis() -> None:
    assert HolaConfig().first_action == 23  # of 71: 23 … 70
    assert HolaConfig(rank=10, action_from=0).first_action == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank=0 must be a positive integer"),
        ({"dropout": 1.0}, "dropout=1.0 is a probability"),
        ({"init": "random"}, "init='random' is not one of"),
        ({"count": "some"}, "count='some' is not one of all, seen|count='some' is not one of seen, all"),
        ({"form": "dense"}, "form='dense' is not one of"),
        ({"trains": "x"}, "trains='x' is not one of"),
        ({"action_from": 6}, "action_from=6 leaves actions no row of a basis of 6"),
        ({"action_from": "half"}, "neither 'third' nor a row"),
        ({"roi_sampling": -1}, "roi_sampling=-1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**options)


# --- folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upstream", [False, True])
def test_a_folder_gives_the_same_model(tmp_path: Path, upstream: bool) -> None:
    made, given = model(upstream=upstream), batch()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
        made.save_pretrained(tmp_path)
        opened = HolaModel.from_pretrained(tmp_path)
        a, b = made(**given), opened(**given)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not opened.training and opened.table == table() and opened.table.valid.sum() == 10
    assert accounting(opened) == accounting(made)
    state = dict(opened.named_buffers())
    assert all(torch.equal(value, state[name]) for name, value in made.named_buffers())


def test_auto_classes_know_it(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    model().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), HolaConfig)
    opened = AutoModel.from_pretrained(tmp_path)
    assert isinstance(opened, HolaModel)
    assert not any(p.requires_grad for p in opened.vision.tower.parameters())


def test_a_process_that_imports_nothing_of_ours_opens_it(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoModel; model = AutoModel.from_pretrained(sys.argv[1]); "
        "print(type(model).__name__, model.table.verbs[0])"
    )
    environment = {**os.environ, "RANKFOLD_AUTOLOAD": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=environment
    )
    assert run.stdout.split() == ["HolaModel", "ride"], run.stderr


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    held = load_file(path)
    del held["language.decomposition.action_weights"]
    save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*action_weights"):
        HolaModel.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)


def test_a_new_model_on_the_image_encoder_of_clip(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    text = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text.vocab_size, text.eos_token_id, text.bos_token_id = 20, 2, 1
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision(), projection_dim=D)).eval()
    clip.save_pretrained(tmp_path)
    sizes = {"rank": 6, "bottleneck": 8, "ffn": 12, "context_hidden": 10}
    for source in (clip, str(tmp_path)):
        made = HolaModel.from_clip(source, table(), texts(), isolate_pairs=True, **sizes).eval()
        pixels = batch()["pixel_values"]
        with torch.no_grad():
            expected = clip.visual_projection(
                clip.vision_model.post_layernorm(clip.vision_model(pixels).last_hidden_state[:, 1:])
            )
            nothing = torch.zeros(2, 0, 8)
            got, _ = made.vision(pixels, nothing, nothing[..., 0] > 0, torch.zeros(2, 0, 32), torch.zeros(2))
        torch.testing.assert_close(got.flatten(2).mT, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="width 12, the model's is 16"):
        HolaModel.from_clip(clip, table(), texts(width=12), **sizes)
