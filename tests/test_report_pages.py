"""The report as text, page and model card: whatever is missing, whoever chose the names."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from toy_report import CASES, make, row

from rankfold.card import card
from rankfold.report import SkippedRow

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a browser would load or run, and whether the tags balance."""

    VOID = frozenset({"meta", "br", "wbr", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.loads += [
            value or "" for key, value in attrs if key in ("src", "href", "data", "action", "srcset")
        ]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()


@pytest.mark.parametrize("name", CASES)
def test_everything_renders(name: str) -> None:
    report = CASES[name]
    html = report.to_html()
    html.encode("utf-8")
    page = Page(html)
    assert page.tags["h1"] == 1 and page.tags["script"] == 1
    assert "None kept" not in html and "nan%" not in html and "inf%" not in html
    for width in (60, 100, None):
        lines = report.to_text(width).splitlines()
        assert lines and max(map(len, lines)) <= (width or 100)
    report.print(console=_console())
    card(report).encode("utf-8")


def _console() -> Any:
    from rich.console import Console

    return Console(file=io.StringIO(), width=90)


@pytest.mark.parametrize("name", CASES)
def test_the_page_is_self_contained(name: str) -> None:
    html = CASES[name].to_html()
    page = Page(html)
    assert page.loads == [] and page.handlers == []
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & page.tags.keys()
    assert not re.search(r"https?://|url\(|@import|//[a-z]", re.sub(r"<pre.*?</pre>", "", html, flags=re.S))
    assert "default-src 'none'" in html


def test_the_policy_names_the_script_of_the_page() -> None:
    import base64
    import hashlib

    html = make().to_html()
    script = re.search(r"<script>(.*)</script>", html, re.S)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


def test_names_and_texts_are_escaped() -> None:
    report = make(
        3,
        layers=[
            row(
                f"l.{b}.{EVIL}.q{b}",
                rank=None if b == 1 else 96,
                note=EVIL,
                structure=EVIL,
                size=EVIL if b else None,
                type=EVIL,
            )
            for b in range(3)
        ]
        + [row(EVIL)],
        model=EVIL,
        skipped=[SkippedRow(name=EVIL, shape=(1, 1), bytes=4, reason=EVIL)],
        recipe={"name": EVIL, "paper": EVIL},
        unit=EVIL,
        dtype=EVIL,
        weights_hash=EVIL,
        data={EVIL: EVIL},
        versions={EVIL: EVIL, "rankfold": EVIL},
        timings={EVIL: 1.0},
        warnings=[EVIL],
        allocation={"allocator": EVIL},
        evaluation={
            "data": {EVIL: EVIL},
            "dense": {EVIL: 1.0},
            "compressed": {EVIL: 2.0},
            "generation": {"prompt": EVIL, "dense": EVIL, "compressed": "</pre>" + EVIL},
        },
    )
    html = report.to_html()
    assert Page(html).tags["script"] == 1
    assert EVIL not in html and html.count("&lt;script&gt;") > 20
    assert EVIL not in re.sub(r"```.*?```", "", card(report), flags=re.S)


def test_a_name_cannot_speak_to_the_terminal() -> None:
    report = make(
        layers=[row("\x1b[2Ja"), row("[bold red]b[/]")], model="\x1b]0;title\x07", warnings=["\x1b[31m"]
    )
    text = report.to_text()
    assert "\x1b" not in text and "\x07" not in text
    assert "[bold red]b[/]" in text
    assert report.to_text(layers=False) != text


def test_text_says_both_fractions_and_what_was_asked() -> None:
    text = make().to_text()
    assert "79.9 % of their bytes kept (asked 80.0 %)" in text
    assert "Whole model: " in text and "of the bytes kept" in text
    assert "decoding is slower, 10 % more time" in text
    assert "names begin with model.layers." in text
    assert "0.self_attn.q_proj" in text


def test_page_says_what_an_engineer_asks() -> None:
    html = make(30).to_html()
    for words in (
        "79.9 % kept",
        "22.9 → 31.4",
        "decoding is slower",
        "What each layer kept",
        "Spectra and cuts",
        "cut at 96",
        "Where the bytes went",
        "Before and after",
        "120 layers",
        "embedding",
        "within 0.50 %",
        "Calibration data".lower(),
        "little data",
        "東京は日本の首都です。",
    ):
        assert words in html, words
    assert len(CASES["500 layers"].to_html()) < 1_500_000


# Two reports


def test_diff_names_the_layers_that_changed() -> None:
    a, b = make(), make(budget=0.6)
    b.layers[1] = row(b.layers[1].name, (192, 576), 64)
    b.layers[2] = row("model.layers.0.mlp.novel")
    found = a.differences(b)
    json.dumps(found, allow_nan=False)
    changed = {item["name"]: item for item in found["layers"]}
    assert set(changed) == {a.layers[1].name, a.layers[2].name, b.layers[2].name}
    assert changed[a.layers[1].name]["after"]["size"] == 64
    assert changed[a.layers[2].name]["after"] is None and changed[b.layers[2].name]["before"] is None
    assert found["settings"]["budget"] == [0.8, 0.6]
    assert found["layers_same"] == len(a.layers) - 2
    console = _console()
    console.print(a.diff(b))
    text = console.file.getvalue()
    assert "0.self_attn.k_proj" in text and "low_rank 64" in text and "not selected" in text
    assert "0.self_attn.q_proj" not in text


@pytest.mark.parametrize("name", CASES)
def test_anything_can_be_compared(name: str) -> None:
    console = _console()
    for pair in ((make(), CASES[name]), (CASES[name], make()), (CASES[name], CASES[name])):
        console.print(pair[0].diff(pair[1]))
        json.dumps(pair[0].differences(pair[1]), allow_nan=False)
    assert CASES[name].differences(CASES[name])["layers"] == []


# The model card


def front_matter(text: str) -> dict[str, Any]:
    import yaml

    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def test_card_is_read_by_the_hub() -> None:
    text = card(make(), license="apache-2.0", pipeline_tag="text-generation", language=["en"])
    assert front_matter(text) == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "base_model": "owner/model",
        "base_model_relation": "quantized",
        "tags": ["rankfold", "compressed", "low_rank"],
    }
    from huggingface_hub import ModelCard

    assert ModelCard(text).data.base_model == "owner/model"


def test_card_tells_how_to_load_and_what_it_cost() -> None:
    text = card(make())
    for words in (
        "pip install",
        "from_pretrained(",
        "import rankfold.hf",
        "| Perplexity | 22.9 | 31.4 |",
        '"svd_llm"',
    ):
        assert words in text, words
    assert "decoding is slower" in text and "Warning" in text and "79.9 %" in text
    assert "load_(" in card(make(), loader="")
    assert "base_model" not in front_matter(card(make(model="./a folder/of mine")))


def test_card_cannot_be_broken_by_a_name() -> None:
    report = make(model='x"\n---\nevil: 1', layers=[row("a|b`c`", type="a|b`c`", structure="s\nevil: 1")])
    assert report.evaluation is not None
    report.evaluation["generation"]["dense"] = "```\n# heading\n````\n"
    text = card(report)
    assert "evil" not in front_matter(text)
    assert "`````text" in text
    assert r"a\|b\`c\`" in text
