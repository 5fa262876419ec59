"""The page of explanations: one file, whatever the texts are; colours that mean the same everywhere."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from test_report_pages import EVIL, Page
from toy_explain import explained

from rankfold.classify.page import explain_page
from rankfold.classify.page_style import CSS
from rankfold.report_style import CSS as REPORT_CSS


class Whole(Page):
    VOID = Page.VOID | {"input"}


class Texts(HTMLParser):
    """The text of every paragraph that shows a text, without labels, and the words that are coloured."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.words: list[str] = []
        self.levels: list[dict[str, int]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("meta", "input", "wbr", "br"):
            return
        kind = dict(attrs).get("class") or tag
        self.open.append(kind)
        if kind == "t":
            self.texts.append("")
            assert dict(attrs)["dir"] == "auto"
        if tag == "i" and "t" in self.open:
            self.words.append("")
            pairs = re.findall(r"--(\w+):(-?\d+)", dict(attrs)["style"] or "")
            self.levels.append({key: int(value) for key, value in pairs})

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "t" in self.open and self.open[-1] != "cut":
            self.texts[-1] += data
            if "i" in self.open:
                self.words[-1] += data


def page(*texts: Any, **options: Any) -> str:
    items = [explained(text, **options) if isinstance(text, str) else text for text in texts]
    return explain_page(items, title="What it read", facts={"model": "a/b", "seed": 0, "none": None})


STRANGE = {
    "html": f"{EVIL} <b>bold</b> & \"quotes\" 'single' </p></article> &amp;",
    "right to left": "هذا فيلم رائع جدا، with English inside, وأنا.\nשלא את",
    "emoji": "a 👨‍👩‍👧‍👦 family 🇫🇷🇩🇪 👍🏽 e\u0301te\u0301",
    "lines": "one\n\n\n   two\tthree ",
    "long word": "x" * 5000 + " end",
    "zero width": "a\u200bb \u200b \u200d\u200d z",
    "empty": "",
    "blank": " \n ",
}


@pytest.mark.parametrize("heads", [1, 8, 30])
def test_the_page_is_one_file_that_runs_nothing(heads: int) -> None:
    html = page(*STRANGE.values(), heads=heads)
    html.encode("utf-8")
    found = Whole(html)
    assert found.loads == [] and found.handlers == [] and found.tags["h1"] == 1
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & found.tags.keys()
    assert "default-src 'none'" in html and not re.search(r"url\(|@import", html)
    assert found.tags["article"] == len(STRANGE)
    assert found.tags.get("input", 0) == (heads + 2 if heads > 1 else 0)
    assert "nan" not in html.lower() and "None" not in html


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_a_text_is_shown_as_it_is(text: str) -> None:
    """Colours add nothing to a text and take nothing away, so that its direction and its emoji survive."""
    one = explained(text)
    found = Texts(page(one))
    expected = [text[a:b] for a, b in one.words]
    seen = [word for word in found.words if not word.startswith("U+")]
    assert seen == [word for word in expected if word.strip("\u200b\u200d")]
    if "\u200b" not in text:
        assert "".join(found.texts) == (text if text.strip() else "")


def test_words_that_no_eye_sees_are_named() -> None:
    assert Texts(page("a \u200b b \u200d\u200d")).words == ["a", "U+200B", "b", "U+200D U+200D"]


def test_everything_is_escaped() -> None:
    one = explained(f"{EVIL} word", label=EVIL, truth=EVIL + "2", classes=(EVIL, EVIL + "2", "c"))
    html = explain_page([one, explained("", reason=EVIL)], title=EVIL, facts={EVIL: EVIL})
    assert EVIL not in html and "script" not in Whole(html).tags
    assert html.count("&lt;script&gt;") >= 8
    for bad in ("\u202e", "\x00", "\ud83d", "\x1b"):
        explain_page([explained(f"a {bad} b")], title=bad, facts={bad: bad}).encode("utf-8")
        assert bad not in page(f"a {bad} b")


def test_the_scale_is_the_same_for_all() -> None:
    """A ratio has one colour, however strong the others of its text, head or page are."""
    weak, strong = torch.tensor([[1.1, 0.9], [1.0, 1.0]]), torch.tensor([[1.1, 0.9], [7.0, 0.1]])
    a, b = (explained("one two", ratios=ratios) for ratios in (weak, strong))
    alone, beside = Texts(page(a)).levels, Texts(page(a, b)).levels
    assert alone == beside[:2]
    assert [level["h0"] for level in alone] == [round(100 * math.log2(x) / 3) for x in (1.1, 0.9)]
    assert all(abs(value) <= 6 for level in alone for value in level.values()), "noise has hardly a colour"
    assert all(beside[0]["h0"] == level for level in (beside[2]["h0"], 5)) and beside[2]["h1"] == 94
    far = Texts(page(explained("one two", ratios=torch.tensor([[1e4, 0.0]])))).levels
    assert [level["m"] for level in far] == [100, -100]


def test_agreement_is_the_head_that_departs_least() -> None:
    ratios = torch.tensor([[2.0, 0.5, 4.0, 0.25], [4.0, 0.25, 0.5, 0.5]])
    levels = [level.get("a", 0) for level in Texts(page(explained("a b c d", ratios=ratios))).levels]
    assert levels == [33, -33, 0, -33]


def test_the_legend_says_how_far_ratios_can_go() -> None:
    ratios = torch.tensor([[1.3] + [0.5] * 98 + [2.5]])
    text = " ".join(f"w{i}" for i in range(100))
    html = page(explained(text, ratios=ratios, bound=0.069453))
    for words in (
        "1 = uniform",
        "Largest possible ratio: <b>×6.95</b>, at T = 100 word pieces",
        "Observed, all words of all heads: <b>×0.50 to ×2.50</b>",
        "not why the answer was given",
        "uniform weight of one is 1.00 %",
    ):
        assert words in html, words
    assert "T = 100, all of the weight on one word piece" in page(explained(text, ratios=ratios))


def test_long_texts_are_folded() -> None:
    text = " ".join(f"word{i}" for i in range(10_000))
    html = page(text, heads=8)
    found = Texts(html)
    assert [len(part.split()) for part in found.texts] == [300, 9700] and "9,700 more words" in html
    assert "".join(found.texts) == text and len(html) < 2_000_000
    assert len(Texts(page(" ".join(["word"] * 340))).texts) == 1
    assert "Every word, head by head" not in html and "Every word, head by head" in page("a b c")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("more", [50, 5000])
def test_what_was_not_read_is_grey_and_says_so(side: str, more: int) -> None:
    tail = "x" * more
    text, read = ("a b " + tail, (0, 3)) if side == "right" else (tail + " a b", (more + 1, more + 4))
    html = page(explained(text, read=read))
    assert f"{more + 1:,} of {more + 4:,} characters: the model reads 2 word pieces" in html
    assert html.count('<span class="cut">not read</span>') == 2
    assert re.search(rf'<span class="unread"> ?{tail} ?</span>', html)
    assert "".join(Texts(html).texts) == text
    assert ("characters that were not read</summary>" in html) == (more > 1500)


def test_answers_and_labels() -> None:
    classes = tuple(f"class {i}" for i in range(12))
    chances = [0.3] + [0.07] * 10 + [0.0]
    one = explained("a b", classes=classes, chances=chances, label="class 0", truth="class 11")
    good, open_ = explained("a b", truth="good"), explained("c")
    html = explain_page([one, good, open_], title="x", facts={})
    assert "labelled <bdi>class 11</bdi>" in html and "5 other classes" in html and "class 11" in html
    assert "1 of 2 classified as labelled" in html and "only the 1 wrong" in html
    assert html.count('<article class="wrong">') == 1 and "✓ as labelled" in html
    assert "no finite answer" in page(explained("a", label=None, chances=[math.nan, math.nan]))
    assert "What was read of 0 texts" in explain_page([], title="x", facts={})


def test_explanations_of_two_models_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 4 heads"):
        explain_page([explained("a", heads=2), explained("a", heads=4)], title="x", facts={})


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_the_strongest_colours(dark: bool) -> None:
    """Contrast of at least 4.5 (WCAG 2, AA), in both themes."""
    ink = _hex(re.findall(r"--text:(#\w{6})", REPORT_CSS)[dark])
    for name in ("more", "less"):
        back = [int(x) for x in re.findall(rf"--{name}:(\d+ \d+ \d+)", CSS)[dark].split()]
        a, b = sorted((_luminance(ink), _luminance(back)))
        assert (b + 0.05) / (a + 0.05) >= 4.5, (name, dark)


def _hex(text: str) -> list[int]:
    return [int(text[i : i + 2], 16) for i in (1, 3, 5)]


def _luminance(rgb: list[int]) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
