"""English texts that install as packages, each a list of documents in a fixed order.

`wikipedia` and `pydoc` come with installed packages (parsed in seconds); `brown`, `sotu`, `moby`, and the
labelled `movie`, `tweets`, `spam`, `sentiment` and `brown_genres` (data_classes) are read from the data
folder: see `fetch`. Nothing is cached on disk.
"""

from __future__ import annotations

import bz2
import html
import importlib.util
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from rankfold.data_classes import (
    CLASSES,
    SPLITS,
    brown_documents,
    class_names,
    detokenize,
    groups,
    labelled,
    rated,
    rows,
)
from rankfold.data_files import fetch, members

__all__ = ["CLASSES", "SPLITS", "TEXTS", "class_names", "fetch", "groups", "labelled", "rows", "texts"]

# Shorter pages are mostly disambiguations ("Aa is the name of a large number of rivers"): lists, not prose.
_SHORTEST_ARTICLE = 2000  # characters after cleaning; 96 articles are at least that long


def texts(name: str, split: str = "all") -> list[str]:
    """The documents of a packaged text in a split (`train`, `test`, `all`), in order. ValueError if the text
    is not installed: how to get it."""
    found = TEXTS[name]()
    return [found[i] for i in rows(name, split)] if name == "brown_genres" else found[SPLITS[split]]


# --- Wikipedia ---------------------------------------------------------------------------------------------


def _wikipedia() -> list[str]:
    spec = importlib.util.find_spec("gensim")  # finds it without importing it: the file is all we need
    roots = list(spec.submodule_search_locations or ()) if spec else []
    pattern = "test/test_data/enwiki-latest-pages-articles1.xml-*-shortened.bz2"
    files = sorted(path for root in roots for path in Path(root).glob(pattern))
    if not files:
        raise ValueError("text 'wikipedia' comes with gensim: pip install --no-deps gensim==4.4.0")
    articles = []
    with bz2.open(files[0]) as stream:
        for _, page in ElementTree.iterparse(stream):
            if not page.tag.endswith("}page"):
                continue
            space = page.tag[: -len("page")]
            if page.findtext(f"{space}ns") == "0" and page.find(f"{space}redirect") is None:
                articles.append(clean_wiki(page.findtext(f"{space}revision/{space}text") or ""))
            page.clear()
    return [text for text in articles if len(text) >= _SHORTEST_ARTICLE]


_DROPPED = "ref|math|gallery|timeline|imagemap|source|syntaxhighlight|score|table|code|pre|nowiki|chem|hiero"
_INNER = r"((?:(?!\{\{|\}\}|\[\[|\]\]).)*?)"  # neither a template nor a link inside
_NESTED = re.compile(rf"\{{\{{{_INNER}\}}\}}|\[\[{_INNER}\]\]", re.DOTALL)
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_TAIL = re.compile(  # the apparatus at the end of an article, up to the next heading of the same level
    r"^==\s*(?:see also|references|notes|footnotes|citations|sources|bibliography|works cited|"
    r"further reading|external links|notes and references|references and notes|gallery)"
    r"\s*==\s*$.*?(?=^==[^=]|\Z)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)


def clean_wiki(source: str) -> str:
    """Wiki markup to plain text: prose, headings and list items stay; templates, tables, notes, images go."""
    text = re.sub(r"<!--.*?-->", "", source, flags=re.DOTALL)
    text = re.sub(r"<ref\b[^<>]*/>", "", text, flags=re.IGNORECASE)
    text = re.sub(rf"<({_DROPPED})\b[^<>]*>.*?</\1\s*>", "", text, flags=re.DOTALL | re.IGNORECASE)
    text = _innermost_first(_NESTED, lambda m: _link(m[2]) if m[1] is None else _template(m[1]), text)
    text = _innermost_first(_TABLE, lambda _: "", text)
    text = re.sub(r"\{\{|\}\}|\[\[|\]\]|^\{\|.*|^\|.*", "", text, flags=re.MULTILINE)  # what was never closed
    text = _TAIL.sub("", text)
    text = re.sub(r"\[(?:https?:)?//[^\s\]]+ *([^\]]*)\]", r"\1", text)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", "", text)).replace("\xa0", " ")
    text = re.sub(r"__[A-Z]+__|'{2,}", "", text)
    text = re.sub(r"^=+\s*(.*?)\s*=+\s*$", r"\n\1\n", text, flags=re.MULTILINE)
    text = re.sub(r"^[*#:;]+\s*", "", text, flags=re.MULTILINE)
    text = re.sub(r"\(\s*[;,]\s*", "(", text)  # what a template left of "({{IPA|...}}; born 1809)"
    text = re.sub(r" *\(\s*\)", "", text)
    text = re.sub(r"[ \t]+([,.;:)\n])|[ \t]+", lambda match: match[1] or " ", text)
    return re.sub(r"\n\s*\n\s*", "\n\n", text).strip() + "\n"


def _innermost_first(pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str], text: str) -> str:
    """Replace until nothing changes: each pass takes the innermost level of a nested construct."""
    count = 1
    while count:
        text, count = pattern.subn(replace, text)
    return text


def _template(source: str) -> str:
    """A template goes, unless it only dresses words that the sentence needs."""
    name, *values = [part.strip() for part in source.split("|")]
    values = [value for value in values if not re.match(r"\w+\s*=", value)]
    name = name.lower()
    if name in {"convert", "cvt"} and len(values) >= 2:
        return f"{values[0]} {values[1]}"
    if name in {"nowrap", "nobr", "abbr", "quote", "small"} and values:
        return values[0]
    return values[-1] if name in {"lang", "transl"} and values else ""


def _link(source: str) -> str:
    """[[page|words]] is its words; files, categories and other languages go."""
    target, _, words = source.partition("|")
    if re.match(r"\s*(?:file|image|category|media|[a-z]{2,3}(?:-[a-z]+)?)\s*:", target, re.IGNORECASE):
        return ""
    return (words or target).rpartition("|")[2].lstrip(":")


# --- the other texts ---------------------------------------------------------------------------------------


def _pydoc() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name].strip() + "\n" for name in sorted(topics)]


def _brown() -> list[str]:
    return [detokenize(tagged) for _, tagged in brown_documents()]


def _sotu() -> list[str]:
    """The 233 State of the Union speeches from 1790 to 2021, in the order of their years."""
    return [text for _, text in sorted(_records("sotu", r"package/data/(\d{4}_\w+)\.json"))]


def _moby() -> list[str]:
    """The 135 chapters of Moby Dick, and its epilogue."""
    chapters = [(int(name), text) for name, text in _records("moby", r"package/data/chapter_(\d+)\.json")]
    return [text for _, text in sorted(chapters)] + [
        text for _, text in _records("moby", r"package/data/(epilogue)\.json")
    ]


def _records(name: str, pattern: str) -> list[tuple[str, str]]:
    """(what the pattern's group matched, "text") of every JSON file of an archive whose path it matches."""
    return [(match[1], json.loads(file)["text"].strip() + "\n") for match, file in members(name, pattern)]


def _texts_of(name: str) -> list[str]:
    return [text + "\n" for text in labelled(name)[0]]


TEXTS: dict[str, Callable[[], list[str]]] = {
    "wikipedia": _wikipedia,
    "pydoc": _pydoc,
    "brown": _brown,
    "movie": lambda: [text + "\n" for _, text in rated("movie")],
    "tweets": lambda: [text + "\n" for _, text in rated("tweets")],
    "spam": partial(_texts_of, "spam"),
    "sentiment": partial(_texts_of, "sentiment"),
    "brown_genres": partial(_texts_of, "brown_genres"),
    "sotu": _sotu,
    "moby": _moby,
}
