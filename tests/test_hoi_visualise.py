"""Drawn interactions: legible at any size, nothing over the edge; the page: whole, escaped, loads nothing."""

from __future__ import annotations

import base64
import html
import io
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops, ImageDraw
from toy_hoi import table
from toy_hoi_pairs import FAR, H, T, annotations, predicted, random_set, scene

from rankfold.hoi.classes import ClassTable
from rankfold.hoi.confusion import NOTHING, confusions
from rankfold.hoi.evaluation import Predicted, evaluate, matches
from rankfold.hoi.splits import split
from rankfold.hoi.visualise import GROUND, HUMAN, INK, OBJECT, draw, pairs_of, phrase
from rankfold.hoi.visualise_page import Shown, page

GRAY = (128, 128, 128)


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def crowd(width: int, height: int, pairs: int, seed: int = 0) -> Predicted:
    draws = torch.Generator().manual_seed(seed)
    corners = torch.rand(pairs, 2, 2, 2, generator=draws) * torch.tensor([width, height])
    both = torch.cat([corners.amin(2), corners.amax(2)], -1)
    ids = torch.randint(0, 10, (pairs,), generator=draws)
    return Predicted("a", both[:, 0], both[:, 1], ids, torch.rand(pairs, generator=draws))


@dataclass
class Drawn:
    """What was drawn: the places of labels, and texts with theirs."""

    labels: list[Any] = field(default_factory=list)
    texts: list[tuple[str, Any]] = field(default_factory=list)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    found = Drawn()
    boxed, text = ImageDraw.ImageDraw.rounded_rectangle, ImageDraw.ImageDraw.text

    def label(self: Any, xy: Any, *rest: Any, **options: Any) -> None:
        found.labels.append(xy)
        boxed(self, xy, *rest, **options)

    def write(self: Any, xy: Any, words: str, *rest: Any, **options: Any) -> None:
        place = self.textbbox(xy, words, font=options["font"], anchor=options.get("anchor"))
        found.texts.append((words, place))
        text(self, xy, words, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rounded_rectangle", label)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", write)
    return found


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (3000, 2000), (50, 900), (1400, 40), (1, 1)])
def test_labels_neither_overlap_nor_leave_the_picture(size: tuple[int, int], drawn: Drawn) -> None:
    """Every label stands whole, in the image or below it, in letters of at least 11 pixels."""
    one = crowd(*size, pairs=12)
    picture = draw(Image.new("RGB", size, GRAY), one, table(), top=12)
    image = [round(side * min(max(max(size), 720), 1600) / max(size)) for side in size]
    assert picture.height >= image[1] and max(picture.size) >= 720
    labels, texts = drawn.labels, drawn.texts
    for left, top, right, bottom in labels:
        assert left >= 0 and top >= 0 and right < image[0] and bottom < image[1]
    for i, a in enumerate(labels):
        for b in labels[:i]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1]), (a, b)
    for words, (left, top, right, bottom) in texts:
        assert left >= 0 and top >= 0 and right <= picture.width and bottom <= picture.height, words
    named = [words for words, _ in texts if not words.isdigit()]
    assert sorted(named) == sorted(line for pair in pairs_of(one, table(), 12) for line in pair.lines)
    letters = [bottom - top for words, (_, top, _, bottom) in texts if not words.isdigit()]
    assert min(letters) >= 11


@pytest.mark.parametrize("corner", [(0, 0), (90, 0), (0, 90), (90, 90)])
def test_labels_at_the_border_are_moved_inside(corner: tuple[int, int], drawn: Drawn) -> None:
    x, y = corner
    near = (x, y, x + 10, y + 10)
    draw(
        Image.new("RGB", (100, 100), GRAY), predicted("a", *[(near, near, i, 0.9) for i in range(6)]), table()
    )
    ((left, top, right, bottom),) = drawn.labels
    assert left >= 0 and top >= 0 and right < 720 and bottom < 720


def test_boxes_stand_where_they_should() -> None:
    """Scaled with the image: a solid human box, a dashed object box, a line from middle to middle."""
    one = predicted("a", ((10, 10, 30, 50), (50, 20, 90, 60), 0, 0.9))
    picture = draw(Image.new("RGB", (100, 100), GRAY), one, table(), sides=(1000, 1000))
    assert picture.size == (1000, 1000)
    edge = [picture.getpixel((x, 102)) for x in range(110, 290)]
    assert set(edge) == {rgb(HUMAN)}, "solid"
    dashes = Counter(picture.getpixel((x, 202)) for x in range(510, 890))
    assert set(dashes) == {rgb(OBJECT), rgb(INK)} and 0.4 < dashes[rgb(OBJECT)] / 380 < 0.6, "dashed"
    assert picture.getpixel((950, 950)) == GRAY
    assert picture.getpixel((200, 300)) == rgb(HUMAN) and picture.getpixel((700, 400)) == rgb(OBJECT)


def luminance(colour: str) -> float:
    parts = [c / 255 for c in rgb(colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_apart() -> None:
    """Text as WCAG asks at its strictest; the two boxes differ in lightness too, not in hue alone."""
    assert contrast(GROUND, INK) > 7
    assert contrast(HUMAN, INK) > 3 and contrast(HUMAN, OBJECT) > 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_any_mode_and_the_image_is_left_alone(mode: str) -> None:
    image = Image.new(mode, (40, 30))
    before = image.tobytes()
    picture = draw(image, predicted("a", (H, T, 0, 0.9)), table())
    assert picture.mode == "RGB" and image.tobytes() == before


def test_nothing_to_draw_leaves_the_picture_as_it_is() -> None:
    image = Image.new("RGB", (800, 600), GRAY)
    for shown in (predicted("a"), scene("a")):
        assert ImageChops.difference(draw(image, shown, table()), image).getbbox() is None
    assert pairs_of(predicted("a", (H, T, 0, 0.1)), table(), 5, least=0.2) == []


def test_which_triplets_are_shown() -> None:
    rows = [(H, T, 0, 0.2), (H, FAR, 1, 0.9), (H, T, 1, 0.8), (FAR, T, 2, 0.1)]
    first, second = pairs_of(predicted("a", *rows), table(), 3)
    assert first.lines == ("holding a bicycle 90 %",) and first.object == FAR
    assert second.lines == ("holding a bicycle 80 %", "riding a bicycle 20 %")
    assert [pair.lines for pair in pairs_of(scene("a", (H, T, 0), (H, T, 9)), table(), 9)] == [
        ("riding a bicycle", "no interaction with a cup")
    ]
    assert phrase(table(), 0) == "riding a bicycle"


def test_boxes_outside_of_the_image_are_cut() -> None:
    one = predicted("a", ((-500, -500, 5000, 5000), (90, 90, 300, 300), 0, 0.5))
    picture = draw(Image.new("RGB", (100, 100), GRAY), one, table())
    assert picture.size == (720, 720) and picture.getpixel((2, 300)) == rgb(HUMAN)


def test_long_names_are_cut_and_strange_ones_are_harmless(drawn: Drawn) -> None:
    known = table()
    names = ("x" * 300, "person", "dog\u202e", "<b>")
    strange = ClassTable(known.verbs, names, known.interactions)
    one = predicted("a", (H, T, 0, 0.5), (H, FAR, 5, 0.4), (T, H, 7, 0.3))
    picture = draw(Image.new("RGB", (64, 64), GRAY), one, strange)
    assert picture.height > 720, "what is too long stands below, and is cut"
    (cut,) = [place for words, place in drawn.texts if words.endswith("x…")]
    assert 600 < cut[2] <= picture.width
    text = page([Shown(Image.new("RGB", (64, 64)), one)], strange, title="<i>")
    assert "a &lt;b&gt;" in text and "<b>" not in text and "<i>" not in text and "\u202e" not in text


@pytest.mark.parametrize(("options", "message"), [({"top": 0}, "top=0"), ({"sides": (9, 8)}, "sides=")])
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(Image.new("RGB", (9, 9)), predicted("a"), table(), **options)


def test_matches_name_the_pair_as_annotated() -> None:
    truth = scene("a", (FAR, T, 3), (H, T, 0), (H, FAR, 3))
    one = predicted("a", (H, T, 0, 0.5), (H, FAR, 3, 0.9), (H, T, 0, 0.7), (T, T, 3, 0.1))
    assert matches(one, truth, table()).tolist() == [-1, 2, 1, -1]
    assert matches(one, scene("a"), table()).tolist() == [-1] * 4
    assert matches(predicted("a"), truth, table()).tolist() == []
    with pytest.raises(ValueError, match="of b go with the annotations of a"):
        matches(predicted("b"), truth, table())


def test_matches_agree_with_the_evaluation() -> None:
    scenes, predictions = random_set(3)
    truth = annotations(*scenes)
    by_name = {one.filename: one for one in scenes}
    found = sum(int((matches(one, by_name[one.filename], table()) >= 0).sum()) for one in predictions)
    assert found == int(evaluate(predictions, truth).found.sum()) > 0


def test_confusions() -> None:
    """Taken for what is surest on the same boxes; several verbs of a pair are all right."""
    truth = annotations(
        scene("a", (H, T, 0), (H, T, 1), (FAR, T, 2)), scene("b", (H, T, 2)), scene("c", (H, T, 4))
    )
    rows = [
        predicted("a", (H, T, 1, 0.9), (H, T, 0, 0.8), (FAR, T, 0, 0.7), (FAR, T, 2, 0.6)),
        predicted("b", (H, FAR, 2, 0.9)),
        predicted("z", (H, T, 2, 0.9)),
        predicted("c"),
    ]
    assert confusions(rows, truth) == {(0, 0): 1, (1, 1): 1, (2, 0): 1, (2, NOTHING): 1, (4, NOTHING): 1}


def whole_page() -> str:
    hidden = split(table(), "mine", ids=[0, 1, 2])
    truth = annotations(scene("a.png", (H, T, 0), (FAR, T, 3)), scene("b.png", (H, T, 3)))
    rows = [predicted("a.png", (H, T, 0, 0.9), (H, FAR, 3, 0.25)), predicted("b.png", (H, T, 4, 0.5))]
    pictures = [Image.new("RGB", (80, 60), GRAY) for _ in rows]
    return page(
        (Shown(*each) for each in zip(pictures, rows, truth.scenes, strict=True)),
        table(),
        title="Toy",
        facts={"model": "m", "empty": ""},
        scores=evaluate(rows, truth, hidden, detector_saw=[0]),
        split=hidden,
        confused=confusions(rows, truth),
    )


def test_the_page_is_whole_and_loads_nothing() -> None:
    text = whole_page()
    sources = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(sources) == 4 and all(one.startswith("data:image/jpeg;base64,") for one in sources)
    for one in sources:
        assert Image.open(io.BytesIO(base64.b64decode(one.split(",")[1]))).size == (520, 390)
    assert "http:" not in text and "https:" not in text
    assert "default-src 'none'; img-src data:" in text


def test_the_page_says_in_words_what_its_pictures_show() -> None:
    text = html.unescape(whole_page())
    assert 'alt="predicted: riding a bicycle 90 %, hugging a person 25 %"' in text
    assert 'alt="annotated: riding a bicycle, hugging a person"' in text
    assert "1 of 2 shown are true" in text and "0 of 1 shown are true" in text
    assert '<span class="good">true</span>' in text and '<span class="bad">missed</span>' in text
    assert "riding a bicycle <small>unseen</small>" in text and "hugging a person <small>unseen" not in text
    assert "harmonic mean" in text and "8 interactions have no annotated pair here" in text
    assert "The detector was trained on 1 of the 1 unseen objects (bicycle)" in text
    assert "Of 3 annotated pairs 33.3 % had the right interaction" in text
    assert re.findall(r'left">(\w+ \w+)</td><td>([\d.]+ %)', text) == [
        *[("ride bicycle", "100.00 %"), ("hug person", "0.00 %")]
    ]
    assert ">m</td>" in text and "empty" not in text


def test_a_page_without_truth_or_scores() -> None:
    text = page([Shown(Image.new("L", (9, 9)), predicted("a"))], table(), title="Toy")
    assert text.count("<img") == 1 and 'alt="predicted: nothing"' in text
    assert "verdict" not in text and "annotated" not in text and 'tiles"' not in text
