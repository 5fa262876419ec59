"""A low-rank adapter from two checkpoints: what fine-tuning changed, as factors on the frozen base.

    Δ = W_tuned - W_base = Σ σᵢ uᵢ vᵢᵀ,     adapter of rank r:  Σ_{i<=r} σᵢ uᵢ vᵢᵀ,     error² = Σ_{i>r} σᵢ²

The singular values are exact, in float64. One rank for all layers, or a budget that an allocator spends over
all spectra: a layer that hardly moved then gets nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.adapters import check_unadapted, check_unmixed, count_
from rankfold.allocate import Allocation, lagrangian
from rankfold.compressed import compressed, exact
from rankfold.factorize import check_weights, tied
from rankfold.layers import Layer, replace_, select
from rankfold.manifest import stamp_
from rankfold.method import Curve
from rankfold.outcome import row_as_is, share_loss_, skipped_of, take_, totals_of
from rankfold.report import LayerRow, Report
from rankfold.structures import Dense, LowRank, Sum

Allocator = Callable[[Mapping[str, Curve], int], Allocation]


def extract_lora_(
    base: nn.Module,
    tuned: nn.Module,
    *,
    rank: int | None = None,
    budget: float | None = None,
    allocator: Allocator = lagrangian,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    take: Sequence[str] = (),
) -> Report:
    """Put on `base`, in place, low-rank adapters that make of it what `tuned` is. `tuned` is not changed.
    Layers of either may be compressed.

    rank       of every layer (at most its smaller side); or
    budget     parameters of all adapters, as a fraction of those of the selected layers, which `allocator`
               spends: `rankfold.allocate.lagrangian` minimises the summed squared error, `energy` loses the
               same share of every layer's change
    targets, skip  which layers (see `select`)
    take       globs of other parameters and buffers ("classifier*", "*.bias"), copied from `tuned` as is

    The base is frozen, the adapters and what was taken are trainable: `save_adapter` writes just those. A
    layer without any change gets no adapter. In the report a row's size is the rank, its relative error is
    that of the *change*, measured after the cast; what differs and is in neither is in
    the warnings. Raises ValueError before anything changes.
    """
    layers, theirs = _pair(base, tuned, targets, skip)
    check_weights(base)
    check_weights(tuned)
    ties = tied(base, layers)
    owners = {members[-1]: members for members in ties.values()}
    _check_ties(base, tuned, theirs, owners.values())
    others = _others(base, tuned, layers, take)
    total = sum(math.prod(layers[name].shape) for name in owners)
    limit = _limit(rank, budget, total)
    spectra = {name: torch.linalg.svdvals(_change(name, layers, theirs)).square() for name in owners}
    moved = {name: values for name, values in spectra.items() if values.any()}
    if not moved and not others[0]:
        raise ValueError("the two models do not differ in any selected layer: there is nothing to extract")
    curves = {name: _curve(layers[name].shape, values, rank) for name, values in moved.items()}
    chosen = allocator(curves, limit) if curves and rank is None else None
    rows, made = [], {}
    for name in owners:
        curve = curves.get(name)
        size = curve.sizes[chosen.index[name] if chosen else 0] if curve else 0
        structure, row = _fit(name, layers, theirs, size, curve.energy if curve else 0.0)
        if structure is not None:
            made[name] = structure
        if len(owners[name]) > 1:
            row.note = f"one matrix, shared with {', '.join(owners[name][:-1])}"
        rows.append(row)
    report = _report(base, rows, layers, made, total, rank, budget, allocator)
    report.warnings += others[1]
    base.requires_grad_(False)
    for name, structure in made.items():
        structure.base.requires_grad_(False)
        for member in owners[name]:
            replace_(base, member, layers[member].wrap(structure))
    _take_(base, others[0])
    count_(report, base)
    stamp_(base, report.recipe)
    return report


def _pair(
    base: nn.Module, tuned: nn.Module, targets: Sequence[str] | None, skip: Sequence[str]
) -> tuple[dict[str, Layer], dict[str, Layer]]:
    layers = select(base, targets, skip, more=compressed(base))
    theirs = select(tuned, targets, skip, more=compressed(tuned))
    check_unadapted(layers)
    check_unmixed(base, takes=False)
    for name, layer in layers.items():
        if name not in theirs:
            raise ValueError(f"layer {name!r} of the base is no such layer of the tuned model; skip it")
        if theirs[name].shape != layer.shape:
            raise ValueError(
                f"layer {name!r} has shape {layer.shape} in the base and {theirs[name].shape} in the tuned "
                "model; skip it, or resize the base"
            )
    return layers, theirs


def _check_ties(
    base: nn.Module, tuned: nn.Module, theirs: Mapping[str, Layer], ties: Iterable[Sequence[str]]
) -> None:
    """Raise ValueError where weights that are one in the base differ in the tuned model: one adapter, or one
    copied tensor, cannot be both."""
    groups: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    given = dict(tuned.named_parameters(remove_duplicate=False))
    loose = [(names, [given[n].detach() for n in names if n in given]) for names in groups.values()]
    inside = [(list(names), [theirs[n].matrix() for n in names]) for names in ties if len(names) > 1]
    for names, (first, *rest) in (pair for pair in (*loose, *inside) if len(pair[1]) > 1):
        if not all(first is t or torch.equal(first, t.to(first)) for t in rest):
            raise ValueError(
                f"{' and '.join(names)} are one weight in the base and differ in the tuned model; open the "
                "base with the weights untied (tie_word_embeddings=False)"
            )


def _limit(rank: int | None, budget: float | None, total: int) -> int:
    if (rank is None) == (budget is None):
        raise ValueError(f"give either a rank or a budget; got rank={rank!r} and budget={budget!r}")
    if rank is not None:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank={rank!r} must be a positive integer")
        return 0
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not 0 < budget <= 1:
        raise ValueError(
            f"budget={budget!r} is the adapters' parameters as a fraction of the layers', above 0, at most 1"
        )
    return math.floor(budget * total + 1e-9)


def _change(name: str, layers: Mapping[str, Layer], theirs: Mapping[str, Layer]) -> Tensor:
    """Δ in float64. Low-precision checkpoints are exact numbers: nothing is lost here."""
    ours = exact(layers[name])
    return exact(theirs[name]).to(ours.device) - ours


def _curve(shape: tuple[int, int], squares: Tensor, rank: int | None) -> Curve:
    """The menu of ranks, none and full included; with `rank` that one alone."""
    full, cost = len(squares), sum(shape)
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]).tolist()
    ranks = [min(rank, full)] if rank is not None else _ranks(full)
    errors = tuple(tails[r] for r in ranks)
    return Curve(tuple(ranks), tuple(r * cost for r in ranks), errors, tails[0], tuple(squares.tolist()))


def _ranks(full: int) -> list[int]:
    """0 … 64 one by one, then in steps of about a twelfth, to the full rank."""
    ranks = list(range(min(full, 64) + 1))
    while ranks[-1] < full:
        ranks.append(min(full, ranks[-1] + ranks[-1] // 12))
    return ranks


def _fit(
    name: str, layers: Mapping[str, Layer], theirs: Mapping[str, Layer], rank: int, energy: float
) -> tuple[Sum | None, LayerRow]:
    layer = layers[name]
    weight = layer.matrix()
    row = row_as_is(name, layer, full_rank=min(layer.shape))
    if rank == 0:
        row.error, row.relative_error = energy, 1.0 if energy else 0.0
        row.note = "no adapter: worth its bytes elsewhere" if energy else "no adapter: it did not change"
        return None, row
    change = _change(name, layers, theirs)
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    half = s[:rank].sqrt()  # in equal parts: neither factor under- or overflows a narrow dtype
    wide = torch.promote_types(weight.dtype, torch.float32)  # as `rankfold.methods.adapter` holds them
    low = LowRank.of((u[:, :rank] * half).to(wide), (half[:, None] * vh[:rank]).to(wide))
    with torch.no_grad():
        lost = change - low.left.weight.double() @ low.right.weight.double()
    row.error = float(lost.square().sum())
    row.relative_error = math.sqrt(row.error / energy)
    structure = layer.join(Sum.of(Dense.of(weight), low, frozen=True))
    assert isinstance(structure, Sum)
    take_(row, structure, rank)
    return structure, row


def _others(
    base: nn.Module, tuned: nn.Module, layers: Mapping[str, Layer], take: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """({name: tensor} to copy, warnings about what differs and stays behind)."""
    if isinstance(take, str):
        raise ValueError("take is a list of globs, e.g. take=['classifier*']")
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    ours = {name: t for name, t in _tensors(base) if id(t) not in inside}
    given = dict(_tensors(tuned))
    for pattern in take:
        if not any(fnmatchcase(name, pattern) for name in ours):
            raise ValueError(f"take: no parameter or buffer outside the selected layers matches {pattern!r}")
    taken, left = {}, []
    for name, tensor in ours.items():
        other = given.get(name)
        wanted = any(fnmatchcase(name, pattern) for pattern in take)
        if other is None or other.shape != tensor.shape:
            what = "is not in the tuned model" if other is None else f"has shape {tuple(other.shape)} there"
            if wanted:
                raise ValueError(f"take: {name!r} {what}, and {tuple(tensor.shape)} in the base")
            left.append(f"{name} ({what})")
        elif wanted:
            taken[name] = other.detach()
        elif not torch.equal(tensor, other.to(tensor.device, tensor.dtype)):
            gap = (other.to(tensor.device).double() - tensor.double()).norm()
            left.append(f"{name} (relative difference {gap / tensor.double().norm().clamp_min(1e-300):.3g})")
    if not left:
        return taken, []
    some = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
    return taken, [
        f"{len(left)} tensors differ and are in no adapter: {some}; take=[…] carries them over, targets=[…] "
        "puts an adapter on them"
    ]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    stored = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def _take_(base: nn.Module, taken: Mapping[str, Tensor]) -> None:
    held = dict(_tensors(base))
    with torch.no_grad():
        for name, value in taken.items():
            held[name].copy_(value)
            if isinstance(held[name], nn.Parameter):
                held[name].requires_grad_(True)


def _report(
    base: nn.Module,
    rows: list[LayerRow],
    layers: Mapping[str, Layer],
    made: Mapping[str, Sum],
    total: int,
    rank: int | None,
    budget: float | None,
    allocator: Any,
) -> Report:
    lost = share_loss_(rows)
    added = sum(term.params for structure in made.values() for term in structure.added)
    parameters = list(base.parameters())
    name = getattr(allocator, "__name__", str(allocator)) if rank is None else "fixed"
    return Report(
        recipe={"name": "extract_lora", "rank": rank, "allocate": name},
        budget=1 + (added / total if budget is None else float(budget)),  # of what the layers had
        reached=1 + added / total,
        unit="params",
        layers=rows,
        skipped=skipped_of(base, layers),
        totals=totals_of(
            rows,
            sum(p.numel() * p.element_size() for p in parameters),
            sum(p.numel() for p in parameters),
        ),
        allocation={"allocator": name, "cost": added, "error": lost},
        dtype=str(next(iter(layers.values())).tensor.dtype).removeprefix("torch."),
    )
