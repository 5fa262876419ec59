"""DSFormer's accounting: what the paper page counts by hand, from the structure and the packing."""

from __future__ import annotations

import pytest

from rankfold.packing import index_width, support_bytes
from rankfold.sparse_code import SparseCode


def test_accounting_of_the_paper() -> None:
    """BERT-base: 72 matrices in blocks of 64, fp32 values, indices counted. The structure's own file is
    smaller where a bit mask is."""
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    parameters, layers = 109_482_240, 12
    for (atoms, nonzeros), (ratio, plain, half) in {
        (32, 8): (2.773, 2.895, 2.661),
        (64, 16): (1.988, 2.143, 1.854),
        (16, 4): (3.438, 3.511, 3.368),
    }.items():
        values = places = stored = 0
        for out, across in shapes:
            structure = SparseCode(
                (out, across), atoms=atoms, nonzeros=nonzeros, blocks=across // 64, device="meta"
            )
            values += layers * structure.params
            rows = out * across // 64
            assert structure.params == rows * nonzeros + atoms * across
            places += layers * rows * nonzeros * index_width(atoms)
            stored += layers * structure.nbytes
            assert support_bytes("index", rows, atoms, nonzeros) == rows * nonzeros * index_width(atoms) // 8
        rest = parameters - layers * sum(out * across for out, across in shapes)
        if atoms == 32:
            assert (values, places) == (13_271_040, 53_084_160)
        for bits, index, expected in ((32, places, ratio), (32, 0, plain), (16, places, half)):
            assert parameters * bits / ((rest + values) * bits + index) == pytest.approx(expected, abs=5e-4)
        assert stored <= values * 4 + places // 8
    one = SparseCode((768, 768), atoms=32, nonzeros=8, blocks=12, device="meta")
    assert one.nbytes == 4 * (73_728 + 24_576) + 768 * 12 * 32 // 8
