"""Every paper, one expression each: method x metric x allocator.

    name       metric                       allocator    paper
    svd        none                         uniform      Eckart & Young 1936
    fwsvd      Fisher, input side           uniform      arXiv 2207.00112
    asvd       mean |activation|^½          uniform      arXiv 2312.05821
    svd_llm    E[x xᵀ]                      uniform      arXiv 2403.07378
    basis_sharing   the same, two layers share a basis: arXiv 2410.03765
    weighted   E‖g‖² · E[x xᵀ]              lagrangian   svd_llm in the unit of the loss
    kfac       E[g gᵀ] and E[x xᵀ]          lagrangian   K-FAC-SVD, ICML 2026
    cospadi    E[x xᵀ]                      uniform      arXiv 2509.22075, sparse codes of a dictionary
    cospadi_grouped   the same, two layers share a dictionary
    rocket     E[x xᵀ]                      uniform      arXiv 2602.11008, one shot
    compot     E[x xᵀ]                      uniform      orthonormal dictionary
    codes      E‖g‖² · E[x xᵀ]              lagrangian   cospadi in the unit of the loss
    dsformer   none                         uniform      arXiv 2312.13211, blocks of 64; before tuning
    low_rank   none                         fixed        fresh factors, to train from the first step
    sltrain    none                         fixed        arXiv 2406.02214, fresh factors and a sparse term
    lrt        none                         fixed        arXiv 1910.13923, all projections low rank
    lora       none                         fixed        arXiv 2106.09685, beside the frozen weight
    wara       none                         fixed        arXiv 2506.24092, low rank in each wavelet band
    wara_adaptive   none                    fixed        the same, ranks to the bands where W has its energy
    wara_feature    none                    fixed        the reading of the paper's first figure
    wara_tiny  none                         fixed        the same paper's smallest, as we read it
    waveft     none                         fixed        arXiv 2505.12532, sparse in the wavelet domain
    pissa      none                         fixed        arXiv 2404.02948
    hola       none                         fixed        arXiv 2507.15542, class weights times a basis
    best       what we recommend            -            today codes: the best of these in docs/benchmarks.md

A one-sided metric goes with uniform sizes: its errors are not in the unit of the loss (docs/architecture.md).
Third parties add recipes through the entry-point group `rankfold.recipes`.
"""

from __future__ import annotations

import difflib
import warnings
from dataclasses import replace

from rankfold.allocate import fixed, lagrangian, uniform
from rankfold.groups import Groups
from rankfold.methods import SVD, ClassPCA, Dictionary, LoRA, PiSSA, Scratch, TinyWaRA, WaRA, WaveFT
from rankfold.metrics import KFAC, AbsMean, Activation, Fisher, Frobenius
from rankfold.recipe import Recipe

svd = Recipe("svd", SVD(), Frobenius(), uniform, "Eckart & Young 1936", "plain truncated SVD; needs no data")
fwsvd = Recipe(
    "fwsvd",
    SVD(),
    Fisher(),
    uniform,
    "arXiv 2207.00112",
    "Fisher-weighted SVD, for a model tuned to its task",
)
asvd = Recipe(
    "asvd", SVD(), AbsMean(), uniform, "arXiv 2312.05821", "scaled by the mean size of the activations"
)
svd_llm = Recipe(
    "svd_llm", SVD(), Activation(), uniform, "arXiv 2403.07378", "least squared output error of each layer"
)
# Layers at neighbouring depths share a factor, but for those that write into the residual stream: the paper
# leaves o_proj and down_proj alone, and these are their names in the architectures we know.
PAIRS = Groups(
    size=2,
    private=(
        *(
            "*o_proj",
            "*out_proj",
            "*c_proj",
            "*out_lin",
            "*output.dense",
            "*attention.dense",
            "*self_attn.dense",
        ),
        *("*down_proj", "*fc2", "*lin2", "*dense_4h_to_h", "*.wo", "*.w2"),
    ),
)
basis_sharing = Recipe(
    "basis_sharing",
    SVD(),
    Activation(),
    uniform,
    "arXiv 2410.03765",
    "svd_llm in which pairs of neighbouring layers share a basis",
    groups=PAIRS,
)
kfac = Recipe(
    "kfac",
    SVD(),
    KFAC(),
    lagrangian,
    "ICML 2026 (LEMS, K-FAC-SVD)",
    "least loss to second order, ranks allocated",
)
weighted = Recipe(
    "weighted",
    SVD(),
    Activation(output="scalar"),
    lagrangian,
    "",
    "svd_llm weighed by output-gradient energy, ranks allocated",
)
cospadi = Recipe(
    "cospadi",
    Dictionary(),
    Activation(),
    uniform,
    "arXiv 2509.22075",
    "sparse codes of a learned dictionary, least squared output error",
)
rocket = Recipe(
    "rocket",
    Dictionary(solver="rocket"),
    Activation(),
    uniform,
    "arXiv 2602.11008",
    "sparse codes in one shot: seconds, not minutes",
)
compot = Recipe(
    "compot",
    Dictionary(solver="compot", sweeps=20),
    Activation(),
    uniform,
    "COMPOT",
    "sparse codes of an orthonormal dictionary",
)
cospadi_grouped = replace(
    cospadi,
    name="cospadi_grouped",
    summary="cospadi in which pairs of neighbouring layers share a dictionary",
    groups=PAIRS,
)
codes = Recipe(
    "codes",
    Dictionary(),
    Activation(output="scalar"),
    lagrangian,
    "",
    "cospadi weighed by output-gradient energy, sizes allocated",
)
dsformer = Recipe(
    "dsformer",
    Dictionary(solver="ksvd", width=64, ratio=4.0, sweeps=10),
    Frobenius(),
    uniform,
    "arXiv 2312.13211",
    "sparse codes in blocks of 64, the start of straight-through tuning",
)
low_rank = Recipe(
    "low_rank",
    Scratch(),
    Frobenius(),
    fixed,
    "",
    "for training from scratch: low rank from the first step",
)
# For torch's attention, which has no layers, after `rankfold.attention.unpack_attention_`.
lrt = Recipe(
    "lrt",
    Scratch(init="torch", above="dense"),
    Frobenius(),
    fixed,
    "arXiv 1910.13923",
    "for training from scratch: the Low-Rank Transformer, factors as torch starts its layers",
)
# alpha / rank is the paper's scale: 32 / 128 for its model of 60 M parameters; 16 / 256 at 130 M and 350 M,
# 8 / 512 at 1 B, 8 / 1024 with sparsity 0.05 at 7 B.
sltrain = Recipe(
    "sltrain",
    Scratch(sparsity=0.03, alpha=32.0, init="zero"),
    Frobenius(),
    fixed,
    "arXiv 2406.02214",
    "for training from scratch: low rank plus sparse from the first step",
)
lora = Recipe(
    "lora", LoRA(), Frobenius(), fixed, "arXiv 2106.09685", "adapter: low rank beside the frozen weight"
)
wara = Recipe(
    "wara",
    WaRA(),
    Frobenius(),
    fixed,
    "arXiv 2506.24092",
    "adapter: low rank in every sub-band of a wavelet transform",
)
wara_adaptive = replace(
    wara,
    name="wara_adaptive",
    method=WaRA(bands="energy"),
    summary="wara with as many parameters, given to the bands where the weight has its energy",
)
wara_feature = replace(
    wara,
    name="wara_feature",
    method=WaRA(domain="feature"),
    summary="wara with one pair of factors for all bands of the features: half of lora's parameters",
)
wara_tiny = Recipe(
    "wara_tiny",
    TinyWaRA(),
    Frobenius(),
    fixed,
    "arXiv 2506.24092",
    "experimental: a few coefficients in the singular vectors of each sub-band of the weight; our reading",
)
waveft = Recipe(
    "waveft",
    WaveFT(),
    Frobenius(),
    fixed,
    "arXiv 2505.12532",
    "adapter: sparse coefficients at random places of a wavelet transform",
)
pissa = Recipe(
    "pissa", PiSSA(), Frobenius(), fixed, "arXiv 2404.02948", "adapter: trains the weight's principal part"
)
hola = Recipe(
    "hola",
    ClassPCA(),
    Frobenius(),
    fixed,
    "arXiv 2507.15542",
    "PCA over the classes of a classifier's matrix: the rank that keeps 95 % of the variance, or rank=71",
)
best = replace(codes, name="best", summary="what we recommend today: codes (docs/benchmarks.md)")


def available() -> dict[str, Recipe]:
    """{name: recipe} of this module and of every installed package with an entry point in
    `rankfold.recipes`."""
    from importlib.metadata import entry_points

    ours = {name: item for name, item in globals().items() if isinstance(item, Recipe)}
    theirs = {}
    for entry in entry_points(group="rankfold.recipes"):
        try:
            item = entry.load()
        except Exception as error:  # one broken package must not take the recipes of all others with it
            warnings.warn(f"recipe {entry.name!r} ({entry.value}) does not load: {error!r}", stacklevel=2)
            continue
        if isinstance(item, Recipe):
            theirs[entry.name] = item
    return {**theirs, **ours}


def get(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError with the nearest names."""
    known = available()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"Unknown recipe {name!r}.{hint} Known: {', '.join(sorted(known))}")
    return known[name]
