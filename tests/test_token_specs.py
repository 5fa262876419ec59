"""What a file says of TokenWaras is untrusted: specs and manifests that lie change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from toy_tokens import plain, wrapped

import rankfold
from rankfold.token_layer import TokenWara, token_layers


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 0}, r"rank=0\): 1 to 8"),
        ({"rank": 2**40}, "1 to 8 for a layer"),
        ({"alpha": "2"}, "alpha='2'"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"levels": 2**40}, "at least 1, at most 30"),
        ({"leading": -1}, "leading=-1"),
        ({"grid": [0, 3]}, r"grid=\[0, 3\]"),
        ({"grid": 9}, "grid=9"),
        ({"activation": ["gelu"]}, "choose one of 'gelu'"),
        ({"bands": "LL1"}, "a list of names"),
        ({"bands": ["LL7"]}, "each once, out of"),
        ({"scales": 1}, "scales=1"),
        ({"taps": [1.0, 1.0]}, "is not orthonormal"),
        ({"taps": "db1"}, "a wavelet's name and taps"),
        ({"dtype": "int8"}, "dtype is one of"),
        ({"depth": 3}, "the spec of a TokenWara has rank, alpha"),
    ],
    ids=str,
)
def test_specs_that_lie(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = wrapped(plain(), ["0"])
    spec = model[0].spec()
    host = nn.Linear(8, 12)
    assert TokenWara.rebuilt(host, json.loads(json.dumps(spec))).spec() == spec
    with pytest.raises(ValueError, match=says):
        TokenWara.rebuilt(host, spec | change)
    folder = rankfold.save(model, tmp_path / "model")
    body = json.loads((folder / "rankfold.json").read_text())
    body["tokens"]["0"] |= change
    (folder / "rankfold.json").write_text(json.dumps(body))
    target = plain()
    with pytest.raises(ValueError, match=says):
        rankfold.load_(target, folder)
    assert not token_layers(target) and type(target[0]) is nn.Linear


def test_manifests_that_lie(tmp_path: Path) -> None:
    folder = rankfold.save(wrapped(plain(), ["0"]), tmp_path / "model")
    good = json.loads((folder / "rankfold.json").read_text())
    for change, says in (
        ({"version": 3}, "newer rankfold: its format is version 3, this one reads up to 2"),
        ({"tokens": ["0"]}, "'tokens' must map layer names to specs"),
        ({"tokens": {"nine": good["tokens"]["0"]}}, "names layer 'nine', which Sequential does not have"),
        ({"tokens": {"1": good["tokens"]["0"]}}, "layer '1': .*GELU has no in_features"),
        ({"tokens": {}}, "left-over tensors"),
    ):
        (folder / "rankfold.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=says):
            rankfold.load_(plain(), folder)
    dense = rankfold.save(plain(), tmp_path / "dense")
    assert json.loads((dense / "rankfold.json").read_text())["version"] == 1, "older readers take it"
