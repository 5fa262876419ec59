"""Files and folders written whole or not at all: beside their place, flushed to disk, and renamed.

For a folder, two renames cannot be one step. A crash between them leaves the old folder under `.<name>.old`,
and the next write puts it back before it looks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_folder(folder: str | os.PathLike[str], overwrite: bool) -> Path:
    """`folder` as a path that may be written. Raises ValueError if it is a file, or not empty without
    `overwrite`."""
    folder = Path(folder)
    _recover(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the path of a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(
            f"{folder} exists and is not empty; pass overwrite=True (--overwrite) or choose another folder"
        )
    return folder


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into; it takes its place when everything is on disk, and vanishes
    otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for path in (*sorted(p for p in beside.rglob("*") if p.is_file()), beside):
            sync(path)
        if folder.exists():
            shutil.rmtree(_old(folder), ignore_errors=True)
            folder.rename(_old(folder))
        beside.rename(folder)
        sync(folder.parent)
        shutil.rmtree(_old(folder), ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        _recover(folder)
        if folder.exists():
            shutil.rmtree(_old(folder), ignore_errors=True)
        raise


@contextmanager
def writing_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write; it takes its place when it is on disk, and vanishes otherwise. The
    folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _recover(folder: Path) -> None:
    """Put the old folder back if a crash came between the two renames."""
    if not folder.exists() and _old(folder).is_dir():
        _old(folder).rename(folder)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
