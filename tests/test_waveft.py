"""WaveFT: the matrix that PEFT's own makes of the same coefficients, places of each layer, files, hosts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toy_adapters import conv1d_model, convolutions, images, logits, stir_, train
from transformers import AutoModelForCausalLM

import rankfold
from rankfold import recipes
from rankfold.adapted import adapted, parts
from rankfold.adapter_file import load_adapter_, save_adapter
from rankfold.adapters import freeze_, merge_, trainable
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.lora import save_as_lora
from rankfold.methods import WaveFT
from rankfold.metric import Metric
from rankfold.sparse import Sparse
from rankfold.testing import check_method, check_structure
from rankfold.wavelet import Wavelet
from rankfold.wavelet_transform import band_shape, names

# Where PEFT puts the bands in its one matrix of coefficients: (rows, columns) below or above the middle.
QUARTERS = {"LL1": (0, 0), "HL1": (0, 1), "LH1": (1, 0), "HH1": (1, 1)}


def term(model: nn.Module, name: str) -> Wavelet:
    (found,) = parts(adapted(model)[name])[1]
    assert isinstance(found, Wavelet)
    return found


def places(wavelet: Wavelet) -> dict[str, Tensor]:
    return {name: band.places for name, band in wavelet.bands.items()}  # type: ignore[union-attr,misc]


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        (WaveFT(30), (12, 10)),
        (WaveFT(120, scale=2.0), (12, 10)),
        (WaveFT(1), (12, 10)),
        (WaveFT(9, wavelet="db2", levels=2), (7, 10)),
    ],
    ids=str,
)
def test_laws(method: WaveFT, shape: tuple[int, int]) -> None:
    check_method(method, shape, metrics={"": Metric()})
    made = method.fit(torch.randn(shape), Metric(), method.coefficients)
    stir_(made)
    found = made.added[0]
    check_structure(found, compile=shape == (7, 10))
    assert found.params == method.coefficients and found.nbytes == 8 * method.coefficients


@pytest.mark.parametrize(("out", "inner"), [(8, 12), (32, 6)])
def test_the_update_is_that_of_peft(out: int, inner: int) -> None:
    """Same coefficients at the same places, Haar, even sides: the same ΔW, and the same count."""
    waveft = pytest.importorskip("peft.tuners.waveft")
    layer = nn.Linear(inner, out)
    base = nn.Sequential(layer)
    settings = waveft.WaveFTConfig(n_frequency=20, target_modules=["0"], scaling=25.0)
    theirs = waveft.WaveFTModel(copy.deepcopy(base), settings, "default").model[0]
    values = torch.randn(20)
    with torch.no_grad():
        theirs.waveft_spectrum["default"].copy_(values)
    mine = WaveFT(20).fit(layer.weight, Metric(), 20).added[0]
    assert isinstance(mine, Wavelet)
    bands: dict[str, Any] = {}
    rows, columns = theirs.waveft_indices["default"]
    for name, (low, right) in QUARTERS.items():
        here = (rows // (out // 2) == low) & (columns // (inner // 2) == right)
        flat = (rows[here] % (out // 2)) * (inner // 2) + columns[here] % (inner // 2)
        if not len(flat):
            continue  # none fell into this band: absent, zero
        order = flat.argsort()
        bands[name] = Sparse.of(band_shape(name, (out, inner)), values[here][order], flat[order])
    again = Wavelet.of((out, inner), bands, mine.taps, mine.levels, mine.scale)
    torch.testing.assert_close(again.to_dense(), theirs.get_delta_weight("default"))
    x = torch.randn(5, inner)
    torch.testing.assert_close(again(x), theirs(x) - base(x), atol=1e-4, rtol=1e-4)
    assert again.params == theirs.waveft_spectrum["default"].numel() == mine.params
    default = waveft.WaveFTConfig()
    ours = recipes.waveft.method
    assert isinstance(ours, WaveFT)
    assert (default.n_frequency, default.scaling) == (ours.coefficients, ours.scale)
    assert (default.wavelet_family, 1) == (ours.wavelet, ours.levels)


def test_places_are_of_the_whole_transform_and_differ_by_layer() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    factorize_(model, recipes.waveft(coefficients=64))
    found = [places(term(model, str(layer))) for layer in range(3)]
    for one, two in ((0, 1), (1, 2), (0, 2)):
        same = [
            torch.equal(found[one][key], found[two][key]) for key in found[one].keys() & found[two].keys()
        ]
        assert not any(same)
    again = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    state = torch.get_rng_state()
    factorize_(again, recipes.waveft(coefficients=64))
    assert torch.equal(torch.get_rng_state(), state)
    for layer in range(3):
        assert all(
            torch.equal(found[layer][key], got) for key, got in places(term(again, str(layer))).items()
        )
    other = nn.Sequential(nn.Linear(16, 16))
    factorize_(other, recipes.waveft(coefficients=64), seed=1)
    assert not torch.equal(places(term(other, "0"))["LL1"], found[0]["LL1"])
    # Uniform: over many seeds every place of the 256 is taken about equally often.
    taken = torch.zeros(4, 64)
    for seed in range(400):
        for key, where in WaveFT(64, seed=seed).places((16, 16), 64).items():
            taken[names(1).index(key), where] += 1
    assert taken.sum() == 400 * 64 and 60 < taken.min() and taken.max() < 140  # 100 ± 8.7
    every = WaveFT(256).places((16, 16), 256)
    assert all(torch.equal(where, torch.arange(64)) for where in every.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_starts_where_the_model_was_trains_and_reloads(
    dtype: torch.dtype, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny_llama().to(dtype)
    model = copy.deepcopy(base)
    recipe = recipes.waveft(coefficients=50, scale=5.0, wavelet="db2", levels=2)
    report = factorize_(model, recipe, targets=["*.q_proj", "*.down_proj"])
    assert torch.equal(logits(model), logits(base))
    assert report.totals["params_trained"] == 4 * 50 and report.totals["bytes_added"] == 4 * 50 * 8
    assert sum(p.numel() for p in trainable(model).values()) == 4 * 50
    train(model)
    assert not torch.equal(logits(model), logits(base))
    one = load_adapter_(copy.deepcopy(base), save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(logits(one), logits(model)) and set(trainable(one)) == set(trainable(model))
    rankfold.save(model, tmp_path / "model")
    rankfold.verify(model, tmp_path / "model")
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert set(trainable(freeze_(two))) == set(trainable(model))
    for name in adapted(model):
        mine, theirs = places(term(model, name)), places(term(two, name))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), "places are in the file"
        assert term(two, name).dtype == torch.float32
    done = merge_(model)
    assert not hosts(model)
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model), logits(one), rtol=1e-4, atol=1e-4)
    done.undo()
    assert torch.equal(logits(model), logits(one))


def test_on_other_hosts(tmp_path: Path) -> None:
    base = conv1d_model()
    model = copy.deepcopy(base)
    factorize_(model, recipes.waveft(coefficients=40), targets=["*.c_attn", "transformer.wte", "lm_head"])
    assert torch.equal(logits(model), logits(base)) and model.lm_head.weight is model.transformer.wte.weight
    train(model)
    again = load_adapter_(copy.deepcopy(base), save_adapter(model, tmp_path / "gpt"))
    assert torch.equal(logits(again), logits(model))
    dense = rankfold.to_dense_(copy.deepcopy(model))
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-4)
    for conv in ("channel", "spatial"):
        plain = convolutions()
        model = copy.deepcopy(plain)
        factorize_(model, recipes.waveft(coefficients=20), targets=["*"], conv=conv)
        assert torch.equal(model(images()), plain(images())) and len(adapted(model)) == 3
        stir_(model)
        moved = model(images())
        assert not torch.allclose(moved, plain(images()))
        merge_(model)
        torch.testing.assert_close(model(images()), moved, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("wavelet", "levels", "shape"),
    [("db1", 1, (200, 10)), ("db2", 2, (201, 11)), ("sym4", 2, (160, 9)), ("db3", 1, (45, 8))],
)
def test_rows_of_a_table_without_building_it(
    wavelet: str, levels: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = WaveFT(60, wavelet=wavelet, levels=levels)
    made = method.fit(torch.randn(shape, dtype=torch.float64), Metric(), 60)
    stir_(made)
    found, index = made.added[0], torch.tensor([[0, shape[0] - 1], [7, 7]])
    full = found.to_dense().detach()
    monkeypatch.setattr(Wavelet, "to_dense", lambda self: pytest.fail("the whole table was built"))
    rows = found.rows(index)
    torch.testing.assert_close(rows, full[index], rtol=1e-10, atol=1e-10)
    rows.square().sum().backward()
    slopes = [p.grad for p in found.parameters()]
    assert any(slope is not None and slope.any() for slope in slopes)


def test_beside_compressed_layers(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    factorize_(model, recipes.svd, budget=0.7)
    before = logits(model)
    factorize_(model, recipes.waveft(coefficients=30), targets=["*.q_proj"])
    assert torch.equal(logits(model), before)
    stir_(model)
    outputs = logits(model)
    with pytest.raises(ValueError, match=r"an adapter \(wavelet\) beside a structure of kind 'low_rank'"):
        merge_(model)
    rankfold.save(model, tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), outputs)
    merge_(model, size="dense")
    torch.testing.assert_close(logits(model), outputs, rtol=1e-4, atol=1e-4)


def test_it_is_no_lora(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    """60 coefficients in a 64 x 64 matrix: rank far above what LoRA buys for 128 numbers, which is 1."""
    model = tiny_llama()
    factorize_(model, recipes.waveft(coefficients=60), targets=["*.q_proj"])
    stir_(model)
    rank = torch.linalg.matrix_rank(term(model, "model.layers.0.self_attn.q_proj").to_dense().double())
    assert rank > 25
    with pytest.raises(ValueError, match=r"its adapter \(wavelet\) is no product of two thin matrices"):
        save_as_lora(model, tmp_path / "lora")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"coefficients": 0}, r"coefficients=0\): an integer of at least 1"),
        ({"coefficients": 2.5}, r"coefficients=2\.5"),
        ({"coefficients": True}, "coefficients=True"),
        ({"scale": 0}, r"scale=0\): a number above 0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"levels": 0}, "levels=0"),
        ({"seed": "a"}, "seed='a'"),
        ({"wavelet": "bior2.2"}, "is biorthogonal, and an orthogonal one is needed"),
        ({"wavelet": "bd1"}, r"Unknown wavelet 'bd1'\. Did you mean 'db1'"),
        ({"rank": 4}, "recipe 'waveft' has no option 'rank'; its method has .*coefficients"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        recipes.waveft(**options)


def test_layers_that_are_too_small_and_files_that_lie(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    with pytest.raises(
        ValueError, match=r"layer '0': 31 coefficients do not fit a weight \(5, 6\): 5 x 6 has 30"
    ):
        factorize_(model, recipes.waveft(coefficients=31))
    with pytest.raises(ValueError, match=r"levels=4 is too deep for a matrix \(5, 6\)"):
        factorize_(model, recipes.waveft(coefficients=3, levels=4))
    base = copy.deepcopy(model)
    factorize_(model, recipes.waveft(coefficients=30))
    folder = save_adapter(model, tmp_path / "adapter")
    file = folder / "adapter.safetensors"
    state = load_file(file)
    key = next(key for key in state if key.endswith("LL1.places"))
    save_file(state | {key: state[key] + 1000}, file)
    with pytest.raises(ValueError, match=r"layer '0': sparse structure .*places lie between"):
        load_adapter_(base, folder)
    assert type(base[0]) is nn.Linear
