"""The CPU kernels: `codes.cpp`, compiled for this very processor at first use and called through ctypes.

Compiling takes some seconds, once per user: the library is kept in the user's cache folder, under a name made
of the source, the flags, the compiler's version and the processor, so that none of them changes unnoticed. It
is written under another name and renamed, so that no process ever sees half of it. Without a compiler, or
with one that fails, there is no kernel, and `why_not` says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("codes.cpp")
COMMON = ("-std=c++17", "-O3", "-shared", "-fPIC", "-w")
# The best first: a compiler that knows no OpenMP, or no name for this processor, still makes a kernel.
FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
SECONDS = 120  # a compiler that takes longer is stopped
SLOW = "not done"
TYPES = {torch.float32: 0, torch.bfloat16: 1}
SERIAL = 1 << 16  # multiply-adds that one thread does faster than several

_lock = threading.Lock()
_state: tuple[ctypes.CDLL | None, str | None] | None = None  # the library, or why there is none


def library() -> ctypes.CDLL | None:
    """The compiled kernel, compiling it if need be; None where there can be none. Never raises."""
    return _known()[0]


def why_not() -> str | None:
    """Why there is no CPU kernel, in words; None where there is one."""
    return _known()[1]


def product(
    x: Tensor,
    values: Tensor,
    support: Tensor,
    packing: str,
    layout: Sequence[int],
    transposed: bool,
    dictionary: Tensor | None = None,
) -> Tensor:
    """C x or Cᵀ x; with a dictionary (blocks, atoms, width), C D x or Dᵀ Cᵀ x. x (tokens, ·) -> (tokens, ·).

    Sums in float32. Raises ValueError where the places of a row are damaged, RuntimeError without a kernel.
    """
    kernel, reason = _known()
    if kernel is None:
        raise RuntimeError(f"there is no CPU kernel: {reason}")
    rows, blocks, atoms, nonzeros = layout
    width = 0 if dictionary is None else dictionary.shape[2]
    across = blocks * (width or atoms)
    assert values.numel() == rows * blocks * nonzeros and x.shape[1] == (rows if transposed else across)
    assert dictionary is None or (
        dictionary.shape[:2] == (blocks, atoms) and dictionary.dtype == values.dtype
    )
    y = x.new_empty(len(x), across if transposed else rows)
    x, values, support = x.contiguous(), values.contiguous(), support.contiguous()
    dictionary = None if dictionary is None else dictionary.contiguous()
    work = rows * blocks * nonzeros + blocks * atoms * width
    damaged = kernel.rankfold_codes(
        x.data_ptr(),
        y.data_ptr(),
        TYPES[x.dtype],
        None if dictionary is None else dictionary.data_ptr(),
        width,
        values.data_ptr(),
        TYPES[values.dtype],
        support.data_ptr(),
        support.numel(),
        packing == "index",
        rows,
        blocks,
        atoms,
        nonzeros,
        len(x),
        transposed,
        1 if work * len(x) < SERIAL else torch.get_num_threads(),
    )
    if damaged:
        raise _damage(damaged - 1, layout)
    return y


def convert(
    values: Tensor,
    dense: Tensor,
    support: Tensor,
    packing: str,
    layout: Sequence[int],
    piece: slice,
    *,
    back: bool = False,
) -> None:
    """Write some rows of C, from all its values (rows, count), into `dense` (stop - start, columns); or, if
    `back`, the entries of `dense` at the stored places into the values. Both contiguous, of one dtype."""
    kernel, reason = _known()
    if kernel is None:
        raise RuntimeError(f"there is no CPU kernel: {reason}")
    rows, blocks, atoms, nonzeros = layout
    assert values.is_contiguous() and dense.is_contiguous() and values.dtype == dense.dtype
    assert values.shape == (rows, blocks * nonzeros) and dense.shape == (
        piece.stop - piece.start,
        blocks * atoms,
    )
    support = support.contiguous()
    damaged = kernel.rankfold_convert(
        values.data_ptr(),
        dense.data_ptr(),
        values.element_size(),
        piece.start,
        piece.stop,
        support.data_ptr(),
        support.numel(),
        packing == "index",
        *layout,
        back,
        1 if dense.numel() < SERIAL else torch.get_num_threads(),
    )
    if damaged:
        raise _damage(damaged - 1, layout)


def _damage(row: int, layout: Sequence[int]) -> ValueError:
    _, blocks, atoms, nonzeros = layout
    return ValueError(
        f"the support of row {row} does not name {blocks * nonzeros} of {blocks * atoms} places: "
        "the file is damaged"
    )


def _known() -> tuple[ctypes.CDLL | None, str | None]:
    global _state
    if _state is None:
        with _lock:
            if _state is None:
                try:
                    _state = _find()
                except Exception as error:  # whatever it is, a forward must not fail for want of a kernel
                    _state = None, f"{type(error).__name__}: {error}"
    return _state


def _find() -> tuple[ctypes.CDLL | None, str | None]:
    command = shlex.split(os.environ.get("CXX", ""))
    if not command:
        command = [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not command or not shutil.which(command[0]):
        return None, "no C++ compiler was found (c++, or the one that CXX names)"
    reason = "the compiler failed"
    with tempfile.TemporaryDirectory(prefix="rankfold-") as scratch:
        version = _run([*command, "--version"], Path(scratch))[1]
        for flags in FLAGS:
            kept = _cache(_key(" ".join(command), version, *COMMON, *flags))
            found = _open(kept) if kept is not None else None
            if found is not None:
                return found, None
            built = Path(scratch) / "codes.so"
            worked, said = _run([*command, *COMMON, *flags, str(SOURCE), "-o", str(built)], Path(scratch))
            found = _open(_keep(built, kept)) if worked else None
            if found is not None:
                return found, None
            if said.startswith(SLOW):
                return None, f"{command[0]} was {said}"
            reason = f"{command[0]} failed: {said.strip().splitlines()[-1] if said.strip() else 'in silence'}"
    return None, reason if not worked else "what was compiled does not load, or is wrong"


def _run(command: list[str], folder: Path) -> tuple[bool, str]:
    """Whether it worked, and what it printed. That goes to a file: a pipe held by a grandchild could hang."""
    with open(folder / "said", "w+b") as said:
        try:
            status = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=folder, timeout=SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            return False, f"{SLOW} after {SECONDS} s"
        said.seek(0)
        return status == 0, said.read().decode(errors="replace")


def _key(*parts: str) -> str:
    """A name that changes with the source, the compiler, its flags and the processor."""
    processor = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor += "".join(
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        )
    digest = hashlib.sha256("\0".join([*parts, processor]).encode())
    for path in sorted((*SOURCE.parent.glob("*.cpp"), *SOURCE.parent.glob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _cache(key: str) -> Path | None:
    """Where the library is kept; None where there is no folder that only this user can write."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(root) / "rankfold" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError:
        return None
    mine = not hasattr(os, "getuid") or facts.st_uid == os.getuid()
    shared = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder / f"codes-{key}.so" if mine and not shared else None


def _keep(built: Path, kept: Path | None) -> Path:
    """Copy `built` to `kept` in one step, and say which to open: the cache may be full or read-only."""
    if kept is None:
        return built
    part = kept.with_name(f"{kept.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        shutil.copyfile(built, part)
        os.replace(part, kept)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        return built
    return kept


def _open(path: Path) -> ctypes.CDLL | None:
    """The library, if it loads and multiplies rightly; a file that does not is removed."""
    if not path.exists():
        return None
    with contextlib.suppress(OSError, AttributeError):
        found = ctypes.CDLL(str(path))
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        found.rankfold_codes.argtypes = [
            *(pointer, pointer, integer, pointer, long, pointer, integer, pointer, long, integer),
            *(long, long, long, long, long, integer, integer),
        ]
        found.rankfold_codes.restype = long
        found.rankfold_convert.argtypes = [
            *(pointer, pointer, integer, long, long, pointer, long, integer),
            *(long, long, long, long, integer, integer),
        ]
        found.rankfold_convert.restype = long
        found.rankfold_lanes.restype = ctypes.c_char_p
        if _right(found):
            return found
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def _right(found: ctypes.CDLL) -> bool:
    """C = [[0, 2, 3], [5, 0, 7]] times (1, 10, 100)."""
    values, x, y = (ctypes.c_float * 4)(2, 3, 5, 7), (ctypes.c_float * 3)(1, 10, 100), (ctypes.c_float * 2)()
    support = (ctypes.c_uint8 * 1)(0b101110)
    status = found.rankfold_codes(x, y, 0, None, 0, values, 0, support, 1, 0, 2, 1, 3, 2, 1, 0, 1)
    return status == 0 and list(y) == [320.0, 705.0]
