"""The kernels equal their naive twins; getting one never fails, hangs, or leaves half a file."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_codes import LAYOUTS, TOLERANCE, close, dense64, some_codes
from torch import Tensor

from rankfold import kernels
from rankfold.codes import multiply, path_of
from rankfold.kernels import cpu, reference

needs_kernel = pytest.mark.skipif(
    cpu.why_not() is not None, reason=f"the CPU kernel cannot be built here: {cpu.why_not()}"
)
CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As at first use, with an empty cache folder; the real kernel is back afterwards."""
    monkeypatch.setattr(cpu, "_state", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rankfold" / "kernels"


def compiler(folder: Path, script: str) -> str:
    """A program that stands in for the compiler; it only understands what `script` does."""
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return str(path)


@needs_kernel
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packing", ["mask", "index"])
@pytest.mark.parametrize("layout", [*LAYOUTS, (130, 1, 96, 5)], ids=str)
def test_cpu_kernel_equals_the_dense_product(
    layout: tuple[int, int, int, int], packing: str, stored: torch.dtype, given: torch.dtype
) -> None:
    agree(layout, packing, stored, given, ((1, 1), (2, 32), (3, 31), (4, 5), (9, 64)))


@needs_kernel
def test_threads_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SERIAL", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for layout in ((1, 1, 1, 1), (33, 2, 17, 5)):
            agree(layout, "mask", torch.float32, torch.float32, ((2, 20),))
    finally:
        torch.set_num_threads(before)


def agree(
    layout: tuple[int, int, int, int],
    packing: str,
    stored: torch.dtype,
    given: torch.dtype,
    cases: tuple[tuple[int, int], ...],
) -> None:
    """The CPU kernel multiplies (tokens, dictionary width) of each case as the dense matrix does."""
    codes, (_, blocks, atoms, _) = some_codes(layout, packing, stored), layout
    full, rest = dense64(codes), (codes.values, codes.support, packing, codes.layout)
    for tokens, width in cases:
        dictionary = torch.randn(blocks, atoms, width, dtype=stored)
        wide = torch.block_diag(*dictionary.double())
        for transposed, matrix in ((False, full.mT), (True, full)):
            x = torch.randn(tokens, matrix.shape[0], dtype=given)
            y = cpu.product(x, *rest, transposed)
            assert y.dtype == given and close(y, x.double() @ matrix, TOLERANCE[given])
            both = matrix @ wide if transposed else wide.mT @ matrix
            x = torch.randn(tokens, both.shape[0], dtype=given)
            y = cpu.product(x, *rest, transposed, dictionary)
            assert y.dtype == given and close(y, x.double() @ both, TOLERANCE[given])


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("packing", ["mask", "index"])
def test_conversion_equals_its_twin(packing: str, dtype: torch.dtype) -> None:
    codes, piece = some_codes((43, 2, 19, 5), packing, dtype), slice(16, 43)
    rest = (codes.support, packing, codes.layout, piece)
    mine, true = kernels.dense_rows(codes.values, *rest), reference.dense_rows(codes.values, *rest)
    assert torch.equal(mine, true) and torch.equal(true, codes.dense()[piece])
    there, twin = torch.zeros_like(codes.values), torch.zeros_like(codes.values)
    kernels.entries_of(there, mine, *rest)
    reference.entries_of(twin, mine, *rest)
    assert torch.equal(there[piece], codes.values[piece]) and torch.equal(there, twin)
    assert not there[:16].any()


def before_a_wall(tensor: Tensor) -> Tensor:
    """A copy whose last byte is the last before a page that nobody may read."""
    size = tensor.numel() * tensor.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return copy.view(tensor.shape).copy_(tensor)


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="guards memory with mprotect, which Linux has")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packing", ["mask", "index"])
def test_nothing_is_read_out_of_bounds(packing: str, dtype: torch.dtype) -> None:
    """Not from whole tensors and not from damaged ones, which are an error or a wrong number."""
    codes = some_codes((16, 2, 33, 8), packing, dtype)
    values, whole = before_a_wall(codes.values), codes.support
    dictionary, support = before_a_wall(torch.randn(2, 33, 21, dtype=dtype)), before_a_wall(whole)
    sides = {False: (42, 16), True: (16, 42)}
    inputs = {transposed: before_a_wall(torch.randn(2, sides[transposed][0])) for transposed in sides}
    damages = 0
    for attempt in range(200):
        noise = torch.randint(0, 256, whole.shape, dtype=torch.uint8)
        support.copy_(torch.where(torch.rand(whole.shape) < 0.05, noise, whole) if attempt else whole)
        cut = support[int(torch.randint(3, ())) :] if attempt else support  # it may also be too short
        for transposed, x in inputs.items():
            try:
                cpu.product(x, values, cut, packing, codes.layout, transposed, dictionary)
            except ValueError as error:
                assert attempt and "the file is damaged" in str(error)
                damages += 1
        dense = before_a_wall(torch.zeros(8, 66, dtype=dtype))
        with contextlib.suppress(ValueError):
            cpu.convert(values, dense, cut, packing, codes.layout, slice(8, 16))
    assert damages > 100


def test_no_compiler_is_no_error(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    codes = some_codes((8, 1, 16, 8), dtype=torch.float32)
    x = torch.randn(2, 16)
    assert close(multiply(x, codes), x.double() @ dense64(codes).mT, 1e-5)
    assert "no C++ compiler was found" in str(kernels.why_not(CPU))
    assert path_of(codes, 1).endswith(str(cpu.why_not()))
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler was found"):
        multiply(x, codes, path="native")


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for the compiler is a shell script: POSIX only")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo something broke >&2; exit 1", "something broke"),
        ("sleep 60", "not done after 0.2 s"),
        ('while [ "$1" != -o ]; do shift; done; echo no library > "$2"', "does not load, or is wrong"),
        ("exit 0", "does not load, or is wrong"),
    ],
)
def test_a_compiler_that_fails_is_no_error(
    script: str, reason: str, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = '[ "$1" = --version ] && echo fake && exit 0\n'
    monkeypatch.setenv("CXX", compiler(tmp_path, version + script))
    monkeypatch.setattr(cpu, "SECONDS", 0.2 if "sleep" in script else 60)
    assert cpu.library() is None and reason in str(cpu.why_not())
    assert not list(fresh.glob("*")), "a failed compilation left something in the cache"


@needs_kernel
def test_the_cache_is_used_kept_whole_and_mended(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One compilation: then the same file is opened, by several threads at once, unless it is damaged."""
    count, real = tmp_path / "count", os.environ.get("CXX", "c++")
    calls = f'[ "$1" = --version ] || echo x >> {count}\nexec {real} "$@"'
    monkeypatch.setenv("CXX", compiler(tmp_path, calls))
    monkeypatch.setattr(cpu, "COMMON", tuple("-O0" if flag == "-O3" else flag for flag in cpu.COMMON))
    threads = [threading.Thread(target=cpu.library) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cpu.why_not() is None
    (kept,) = fresh.iterdir()  # one library, and no part of one
    assert kept.suffix == ".so" and count.read_text() == "x\n"

    monkeypatch.setattr(cpu, "_state", None)
    assert cpu.library() is not None and count.read_text() == "x\n"
    assert fresh.stat().st_mode & 0o077 == 0

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    other = tmp_path / "other" / "rankfold" / "kernels" / kept.name
    other.parent.mkdir(parents=True, mode=0o700)
    other.write_bytes(b"half a file")
    monkeypatch.setattr(cpu, "_state", None)
    assert cpu.library() is not None and count.read_text() == "x\nx\n"
    assert other.stat().st_size == kept.stat().st_size

    other.parent.chmod(0o777)  # anybody could have put a library there: it is left alone
    monkeypatch.setattr(cpu, "_state", None)
    assert cpu.library() is not None and count.read_text() == "x\nx\nx\n"


@needs_kernel
def test_a_library_that_multiplies_wrongly_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = cpu.library()
    assert isinstance(library, ctypes.CDLL) and cpu._right(library)
    monkeypatch.setattr(cpu, "_right", lambda found: False)
    copy = tmp_path / "copy.so"
    copy.write_bytes(Path(library._name).read_bytes())
    assert cpu._open(copy) is None and not copy.exists()


def test_a_gpu_kernel_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_gpu_failure", None)
    cuda = torch.device("cuda")
    codes = some_codes((8, 1, 16, 8), dtype=torch.float32).values.to("meta")
    assert kernels.product(codes, codes, codes, "mask", [8, 1, 16, 8], False) is None
    assert kernels.why_not(cuda) == kernels._gpu_failure and kernels._gpu_failure is not None
    assert not kernels.takes(1, torch.float32, torch.float32, cuda)


TRITON = """
import torch
from test_codes import close, dense64, some_codes
from rankfold.kernels import triton_codes

SINGLE = [(torch.float32, 1, 1e-5), (torch.float32, 3, 1e-5)]
HALF = [(torch.bfloat16, 2, 0.02), (torch.float16, 5, 0.02)]
for layout in [(17, 2, 13, 6), (7, 1, 150, 70)]:
    for packing in ("mask", "index"):
        for dtype, tokens, tolerance in SINGLE + HALF:
            codes = some_codes(layout, packing, dtype)
            rest = (codes.values, codes.support, packing, codes.layout)
            for transposed, matrix in ((False, dense64(codes).mT), (True, dense64(codes))):
                x = torch.randn(tokens, matrix.shape[0], dtype=dtype)
                y = triton_codes.product(x, *rest, transposed)
                assert y.dtype == dtype and close(y, x.double() @ matrix, tolerance)
print("equal")
"""


def test_triton_kernels_equal_the_dense_product_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(
        [sys.executable, "-c", TRITON], capture_output=True, text=True, timeout=300, env=environment
    )
    assert run.stdout == "equal\n", run.stderr
