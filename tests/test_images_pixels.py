"""Pictures: what becomes of every kind, what a model's processor makes of them, what varies in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_images import backbone, blob, photos, picture, read

from rankfold.adapt.pixels import Pixels, Reading, processor_of, vary
from rankfold.data_pictures import checked, decode


def test_every_kind_of_picture_becomes_rgb() -> None:
    pixels = np.zeros((6, 9, 3), np.uint8)
    pixels[:, :4] = (200, 40, 90)
    plain = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(decode(blob(plain))), pixels)
    for kind in ("WEBP", "BMP", "PPM", "TIFF", "GIF"):
        more = {"lossless": True} if kind == "WEBP" else {}
        assert np.array_equal(np.asarray(decode(blob(plain, kind, **more))), pixels), kind
        checked(blob(plain, kind, **more))
    assert np.array_equal(
        np.asarray(decode(blob(plain.convert("P", palette=Image.Palette.ADAPTIVE)))), pixels
    )
    cmyk = np.asarray(decode(blob(plain.convert("CMYK"), "JPEG", quality=100))).astype(int)
    assert abs(cmyk - pixels).mean() < 12
    clear = plain.convert("RGBA")
    clear.putalpha(Image.fromarray((pixels[..., 0] > 0).astype(np.uint8) * 255))
    on_white = np.where(pixels[..., :1] > 0, pixels, 255)
    assert np.array_equal(np.asarray(decode(blob(clear))), on_white)
    palette = plain.quantize(2)
    hidden = palette.getpixel((8, 0))
    assert np.array_equal(np.asarray(decode(blob(palette, transparency=hidden))), on_white)
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(decode(blob(deep), 1)), pixels[..., 0])
    assert np.array_equal(np.asarray(decode(pixels[..., 0])), np.repeat(pixels[..., :1], 3, -1))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held on its side
    assert decode(blob(plain, "JPEG", exif=turned)).size == (6, 9)
    assert decode(blob(plain.convert("1"))).mode == "RGB" and decode(blob(plain.convert("LA")), 1).mode == "L"
    with pytest.raises(ValueError, match="floating-point"):
        decode(blob(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


def test_more_pixels_than_any_model_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="more than 10 pixels"):
        checked(blob(picture(0, 0)))


def test_a_processor_makes_what_was_asked_for(tmp_path: Path) -> None:
    from transformers import AutoConfig

    base = backbone(tmp_path / "base")
    config = AutoConfig.from_pretrained(base)
    found = processor_of(base, config, Reading.of(size=24, mean="0.1,0.2,0.3", std="2"))
    made = found([Image.new("RGB", (5, 9), (255, 255, 255))], return_tensors="pt")["pixel_values"]
    assert made.shape == (1, 3, 24, 24)
    assert torch.allclose(made[0, :, 3, 7], torch.tensor([0.45, 0.4, 0.35]), atol=1e-6)
    bare = backbone(tmp_path / "bare", processor=False)
    with pytest.raises(
        ValueError, match=r"has no preprocessor_config.json, .* or say --image-size 224 --mean"
    ):
        processor_of(bare, config, Reading.of(mean="0.5"))
    own = processor_of(bare, config, Reading.of(mean="0.5", std="0.5"))
    assert own([Image.new("RGB", (5, 9))], return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="--mean: 2 numbers, and images have 3 channels"):
        processor_of(base, config, Reading.of(mean="0.5,0.5"))
    config.num_channels = 4
    with pytest.raises(ValueError, match=r"reads images of 4 channels; 3 \(RGB\) and 1 \(grey\)"):
        processor_of(base, config, Reading())


def test_a_processor_that_keeps_the_shape_of_an_image_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, CLIPImageProcessorPil

    base = backbone(tmp_path / "base", processor=False)
    config = AutoConfig.from_pretrained(base)
    CLIPImageProcessorPil(size={"shortest_edge": 20}, do_center_crop=False).save_pretrained(base)
    with pytest.raises(ValueError, match="gives images of different sizes"):
        processor_of(base, config, Reading())
    CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 10, "width": 10}).save_pretrained(
        base
    )
    found = processor_of(base, config, Reading.of(size=16))
    assert dict(found.size) == {"shortest_edge": 32} and dict(found.crop_size) == {"height": 16, "width": 16}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"augment": "flip,spin"}, r"--augment 'flip,spin': none, or some of flip, crop"),
        ({"size": 0}, "--image-size 0: at least 1 pixel"),
        ({"mean": "a"}, "--mean 'a': a number, or one for each channel"),
        ({"std": "nan"}, "--std 'nan'"),
        ({"std": "0"}, "--std 0: above 0"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reading.of(**given)


def test_what_varies_depends_on_seed_epoch_and_image(tmp_path: Path) -> None:
    import random

    from transformers import AutoConfig

    base = backbone(tmp_path / "base")
    photos(tmp_path / "photos", 8)
    processor = processor_of(base, AutoConfig.from_pretrained(base), Reading())
    data = Pixels(read(tmp_path / "photos"), processor, 3, ("flip", "crop"))
    rows = list(range(16))
    one = data.varied(rows, 3, 1)["pixel_values"]
    assert torch.equal(data.varied(rows[4:6], 3, 1)["pixel_values"], one[4:6])
    assert not torch.equal(data.varied(rows, 3, 2)["pixel_values"], one)
    assert not torch.equal(data.varied(rows, 4, 1)["pixel_values"], one)
    assert torch.equal(
        Pixels(data.images, processor, 3).varied(rows, 3, 1)["pixel_values"], data.batch(rows)["pixel_values"]
    )
    image = picture(0, 0, 40, 30)
    sides = [np.asarray(vary(image, ("flip",), random.Random(draw))) for draw in range(40)]
    mirrored = sum(np.array_equal(side, np.asarray(image)[:, ::-1]) for side in sides)
    assert 8 <= mirrored <= 32 and all(
        np.array_equal(side, np.asarray(image)) or np.array_equal(side, np.asarray(image)[:, ::-1])
        for side in sides
    )
    for draw in range(40):
        cut = vary(image, ("crop",), random.Random(draw))
        assert 0.4 * 1200 <= cut.width * cut.height <= 1200 and 0.7 < cut.width / cut.height * 30 / 40 < 1.4
