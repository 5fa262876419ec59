"""Automatic factorization: one call and one rank for any model.

    auto_(model, 0.4)                      a trained model: the truncated SVD of every layer
    auto_(model, 64, solver="random")      before training: low rank from the first step, all projections

`factorize_` asks for a budget and lets a recipe choose; here the user says the rank, as a count or as a
fraction of a layer's limit, floor(out·in / (out + in)), where a pair of factors is as large as the matrix.
Whatever stays dense is in the report, with its reason. [Greenformers: arXiv 2108.10808]
"""

from __future__ import annotations

import copy
import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rankfold.allocate import fixed
from rankfold.attention import packed_attention, unpack_attention_
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.layers import Layer, excluded, replace_, select, skeleton, why_not
from rankfold.methods.at_ranks import AtRanks
from rankfold.metrics import Frobenius
from rankfold.outcome import skipped_of, totals_of
from rankfold.recipe import Recipe
from rankfold.report import Report

SOLVERS = ("svd", "random")
LIMITS = ("break_even", "channels")


@dataclass(frozen=True)
class Plan:
    """What `auto_` would do: the rank of each layer, why the other chosen layers stay dense, and the
    parameters of the whole model before and after."""

    ranks: dict[str, int]
    shapes: dict[str, tuple[int, int]]  # (out, in) of the layers with a rank
    dense: dict[str, str]
    params_before: int
    params_after: int


def auto_(
    model: nn.Module,
    rank: int | float,
    *,
    solver: str = "svd",
    init: str | None = None,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    limit: str = "break_even",
    seed: int = 0,
) -> Report:
    """Make every layer of `model` low-rank, in place; `nn.MultiheadAttention` is unpacked for it.

    rank     an int: the rank of every layer; a float above 0 and below 1: that fraction of a layer's limit,
             rounded down. A layer whose rank is not below its limit, or rounds to 0, stays dense
    solver   "svd", the best approximation of the weights; "random", new numbers to be trained
    init     of solver "random": "torch" (the default), or another of `methods.scratch.Scratch`
    targets, skip   globs over layer names, as in `factorize_`; by default all but embeddings and heads
    limit    of a convolution: "break_even" counts its kernel, in·kh·kw; "channels" counts in alone

    Layers that are factorized already are left as they are, so that a second call changes nothing. A weight
    that another module shares stays dense unless both are chosen, and they then share one structure. Make the
    optimizer afterwards. Raises ValueError for bad arguments, and as `factorize_` does; the model is then
    unchanged.
    """
    if solver not in SOLVERS:
        hint = ": weights have both signs, so a non-negative factorization is no approximation of them"
        nonnegative = isinstance(solver, str) and "nmf" in solver
        raise ValueError(
            f"solver={solver!r} is not offered{hint if nonnegative else ''}; choose one of {SOLVERS}"
        )
    if init is not None and solver != "random":
        raise ValueError(f"init={init!r} is for solver='random'; solver={solver!r} starts from the weights")
    planned = plan(model, rank, targets=targets, skip=skip, limit=limit)
    method = AtRanks(_by_shape(planned), init=None if solver == "svd" else init or "torch")
    recipe = Recipe("auto", method, Frobenius(), fixed, "arXiv 2108.10808")
    needed = {name.rpartition(".")[0] for name in planned.ranks}
    packed = {name: model.get_submodule(name) for name in packed_attention(model) if name in needed}
    unpack_attention_(model, skip=_exactly(packed_attention(model).keys() - packed.keys()))
    try:
        if planned.ranks:
            report = factorize_(model, recipe, targets=_exactly(planned.ranks), seed=seed)
        else:
            report = _nothing(model, recipe, planned)
    except BaseException:
        for name, module in packed.items():
            replace_(model, name, module)
        raise
    _explain(model, report, planned)
    return report


def auto(model: nn.Module, rank: int | float, **options: Any) -> tuple[nn.Module, Report]:
    """A factorized copy and its report: `auto_` where the original is still needed, or where the model is one
    layer, which has no place to be replaced in. The copy shares no tensor with the original."""
    made = copy.deepcopy(model)
    if why_not(made) is None or type(made) is nn.MultiheadAttention:
        around = nn.Sequential(made)
        report = auto_(around, rank, **options)
        return around[0], report
    return made, auto_(made, rank, **options)


def plan(
    model: nn.Module,
    rank: int | float,
    *,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    limit: str = "break_even",
) -> Plan:
    """What `auto_` would do with these arguments, from shapes alone: `model` may be on the meta device.

    Raises ValueError for a rank that is neither a count nor a fraction, and for globs that match no layer.
    """
    _check_rank(rank)
    if limit not in LIMITS:
        raise ValueError(f"limit={limit!r} is not one of {LIMITS}")
    model = skeleton(model)
    unable = [name for name, reason in packed_attention(model).items() if reason is not None]
    # A transformers model is rebuilt from its config, which knows nothing of other attention modules.
    unpack_attention_(model, skip=["*"] if hasattr(model, "save_pretrained") else _exactly(unable))
    layers = _chosen(model, targets, skip)
    ranks: dict[str, int] = {}
    dense: dict[str, str] = {}
    for name, layer in layers.items():
        resolved = _resolve(rank, layer, limit)
        if isinstance(resolved, str):
            dense[name] = resolved
        else:
            ranks[name] = resolved
    for name, other in _shared_with_dense(model, ranks, layers):
        dense[name] = f"shares its weight with {other!r}, which stays dense"
        del ranks[name]
    before = sum(parameter.numel() for parameter in model.parameters())
    unique = {id(layers[name].tensor): (layers[name], ranks[name]) for name in ranks}
    saved = sum(layer.tensor.numel() - r * sum(layer.shape) for layer, r in unique.values())
    return Plan(ranks, {name: layers[name].shape for name in ranks}, dense, before, before - saved)


def _check_rank(rank: Any) -> None:
    count = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    fraction = isinstance(rank, float) and 0 < rank < 1
    if not count and not fraction:
        raise ValueError(
            f"rank={rank!r} is neither a count, an int of at least 1, nor a fraction of each layer's limit, "
            "a float above 0 and below 1"
        )


def _resolve(rank: int | float, layer: Layer, limit: str) -> int | str:
    """The rank of a layer, or why it has none."""
    out, inner = layer.shape
    largest = (out * inner - 1) // (out + inner)  # the last rank that saves something
    if limit == "channels" and isinstance(layer.module, nn.Conv2d):
        out, inner = layer.module.out_channels, layer.module.in_channels
    top = out * inner // (out + inner)
    largest = min(largest, top - 1) if limit == "channels" else largest
    resolved = rank if isinstance(rank, int) else math.floor(rank * top + 1e-9)
    if resolved < 1:
        return f"the fraction {rank} of its limit {top} is less than one"
    if resolved > largest:
        return f"rank {resolved} saves nothing, the largest that does is {largest}"
    return resolved


def _chosen(model: nn.Module, targets: Sequence[str] | None, skip: Sequence[str]) -> dict[str, Layer]:
    """`select`, for a model of which some layers may be factorized already: none is left after the first
    call, and a glob that names only such layers is no mistake."""
    held = hosts(model)
    if held and not isinstance(targets, str) and not isinstance(skip, str):
        inside = {id(m) for host in held.values() for m in host.modules()}
        able = [n for n, m in model.named_modules() if why_not(m) is None and id(m) not in inside]

        def alive(globs: Sequence[str]) -> list[str]:
            return [g for g in globs if _match(able, [g]) or not _match(held, [g])]

        kept, skip = None if targets is None else alive(targets), alive(skip)
        left = [n for n in able if n not in excluded(model)] if targets is None else _match(able, kept or [])
        if len(_match(left, skip)) == len(left) and (targets is None or not kept):
            return {}
        targets = kept
    return select(model, targets, skip)


def _match(names: Any, globs: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, each) for each in globs)]


def _shared_with_dense(
    model: nn.Module, ranks: Mapping[str, int], layers: Mapping[str, Layer]
) -> list[tuple[str, str]]:
    """(layer, other) for layers with a rank whose weight a module without one holds too."""
    chosen = {id(layers[name].module) for name in ranks}
    holders = {
        id(parameter): name
        for name, module in model.named_modules()
        if id(module) not in chosen
        for parameter in module.parameters(recurse=False)
    }
    return [(name, holders[id(layers[name].tensor)]) for name in ranks if id(layers[name].tensor) in holders]


def _by_shape(planned: Plan) -> tuple[tuple[int, int, int], ...]:
    """(out, in, rank) of each shape, for the method. Raises ValueError where one shape has two ranks, as
    convolutions of different kernels may have under limit="channels"."""
    ranks: dict[tuple[int, int], tuple[int, str]] = {}
    for name, rank in planned.ranks.items():
        shape = planned.shapes[name]
        known, first = ranks.setdefault(shape, (rank, name))
        if rank != known:
            raise ValueError(
                f"limit='channels' gives {first!r} rank {known} and {name!r}, also {shape}, rank {rank}; "
                "factorize them in two calls, with targets"
            )
    return tuple((*shape, rank) for shape, (rank, _) in ranks.items())


def _exactly(names: Iterable[str]) -> list[str]:
    """Globs that match these names alone."""
    return [glob.escape(name) for name in names]


def _nothing(model: nn.Module, recipe: Recipe, planned: Plan) -> Report:
    """The report of a call that found nothing to do."""
    parameters = list(model.parameters())
    nbytes = sum(p.numel() * p.element_size() for p in parameters)
    dtype = str(parameters[0].dtype).removeprefix("torch.") if parameters else ""
    return Report(
        recipe=recipe.to_json(),
        budget=1.0,
        reached=1.0,
        layers=[],
        skipped=skipped_of(model, {}),
        totals=totals_of([], nbytes, planned.params_before),
        dtype=dtype,
    )


def _explain(model: nn.Module, report: Report, planned: Plan) -> None:
    """Write why a chosen layer stays dense; leave out the factors of layers that were factorized before."""
    factors = tuple(f"{name}.weight." for name in hosts(model))
    report.skipped = [row for row in report.skipped if not row.name.startswith(factors)]
    modules = dict(model.named_modules())
    reasons: dict[int, str] = {}
    for name, reason in planned.dense.items():
        # A projection of attention that was not unpacked, as none of its projections has a rank.
        owner = modules[name] if name in modules else modules[name.rpartition(".")[0]]
        reasons |= {id(parameter): reason for parameter in owner.parameters()}
    for row in report.skipped:
        row.reason = reasons.get(id(model.get_parameter(row.name)), row.reason)
