"""Layers from one form into another, whatever holds them now, with what that costs said in the report.

    dense              the ordinary layer                                      exact
    low_rank           left right: of a rank, or exact where the layer is      Σ_{i>r} σᵢ²
                       made of thin products (factors, or factors + adapter)
    low_rank_sparse    left right + S: the two are fitted in turn, L to W − S  what neither holds
                       by SVD, S to the largest entries of W − L

To an adapter on a frozen base it is `rankfold.extract`, and from one `rankfold.adapters.merge_`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.compressed import compressed, exact
from rankfold.factorize import check_weights, tied
from rankfold.layers import Layer, replace_, select
from rankfold.low_rank_form import factors_of, truncated
from rankfold.manifest import described, stamp_, unstamp_
from rankfold.outcome import row_as_is, skipped_of, take_, totals_of
from rankfold.report import LayerRow, Report
from rankfold.sparse import Sparse
from rankfold.structure import Structure
from rankfold.structures import Dense, LowRank, Sum

FORMS = ("dense", "low_rank", "low_rank_sparse")
ROUNDS = 10  # of fitting the two parts in turn; each lowers the error


def convert_(
    model: nn.Module,
    to: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = (),
) -> Report:
    """Convert the selected layers of `model`, in place, to one of FORMS.

    rank     of the low-rank part. None, for "low_rank": exactly what the layer is, of the rank that takes
    density  of "low_rank_sparse": the fraction of entries that the sparse part holds, in (0, 1)
    targets, skip  which layers (see `select`), ordinary and structured ones; to "dense" those that are not

    A row's relative error is ‖new − old‖ / ‖old‖ of the matrix, after the cast; its bytes are those before
    and after. Raises ValueError, before anything changes, for an unknown form, a missing or senseless size,
    and a layer that has no exact low-rank form.
    """
    _check(to, rank, density)
    layers = select(model, targets, skip, more=compressed(model))
    if to == "dense":
        layers = {name: layer for name, layer in layers.items() if layer.held is not None}
        if not layers:
            raise ValueError("to='dense': every selected layer is dense already")
    check_weights(model)
    ties = tied(model, layers)
    made: dict[str, Structure] = {}
    rows: list[LayerRow] = []
    for members in ties.values():
        name = members[-1]
        made[name], row = _converted(name, layers[name], to, rank, density)
        row.note = f"one matrix, shared with {', '.join(members[:-1])}" if len(members) > 1 else ""
        rows.append(row)
    report = _report(model, rows, layers, to, rank, density)
    for members in ties.values():
        _replace_(model, members, layers, made[members[-1]])
    if described(model):
        stamp_(model, report.recipe)
    else:
        unstamp_(model)
    return report


def low_rank_sparse(weight: Tensor, rank: int, nonzeros: int) -> tuple[Tensor, Tensor, Tensor]:
    """(left, right, places) in float64 for W (out, in): the sparse part holds W − left right at `places`.

    The two parts are fitted in turn, ROUNDS times or until nothing changes; each step is the best for the
    other part as it is.
    """
    weight = weight.double()
    rest, places = weight, torch.empty(0, dtype=torch.long)
    for _ in range(ROUNDS):
        u, s, vh = torch.linalg.svd(rest, full_matrices=False)
        half = s[:rank].sqrt()
        left, right = u[:, :rank] * half, half[:, None] * vh[:rank]
        lost = weight - left @ right
        found = lost.flatten().abs().topk(nonzeros).indices.sort().values
        done = torch.equal(found, places)
        places = found
        if done:
            break
        rest = weight.flatten().index_add(0, places, -lost.flatten()[places]).view_as(weight)
    return left, right, places


def _check(to: str, rank: int | None, density: float | None) -> None:
    if to not in FORMS:
        raise ValueError(
            f"to={to!r}: choose one of {', '.join(FORMS)}; an adapter on a frozen base is made by "
            "extract_lora_, and folded in by merge_"
        )
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank={rank!r} must be a positive integer")
    if to == "dense" and (rank, density) != (None, None):
        raise ValueError("to='dense' takes neither a rank nor a density")
    if to == "low_rank" and density is not None:
        raise ValueError("density goes with to='low_rank_sparse'")
    if to == "low_rank_sparse":
        good = isinstance(density, int | float) and not isinstance(density, bool) and 0 < density < 1
        if rank is None or not good:
            raise ValueError(
                f"to='low_rank_sparse' needs a rank and a density between 0 and 1; got rank={rank!r} and "
                f"density={density!r}"
            )


def _converted(
    name: str, layer: Layer, to: str, rank: int | None, density: float | None
) -> tuple[Structure, LayerRow]:
    old = exact(layer)
    dtype = layer.tensor.dtype
    structure, size = _made(name, layer, old, to, rank, density)
    structure = structure.to(dtype)
    row = row_as_is(name, layer, full_rank=min(layer.shape))
    if isinstance(structure, Dense):
        entries = old.numel()
        row.bytes_after, row.params_after, row.macs_after = structure.nbytes, entries, entries
    else:
        take_(row, structure, size)
    with torch.no_grad():
        row.error = float((copy.deepcopy(structure).double().to_dense() - old).square().sum())
    energy = float(old.square().sum())
    row.relative_error = math.sqrt(row.error / energy) if energy > 0 else 0.0
    return structure, row


def _made(
    name: str, layer: Layer, old: Tensor, to: str, rank: int | None, density: float | None
) -> tuple[Structure, Any]:
    if to == "dense":
        return Dense.of(old.to(layer.tensor.dtype)), None
    most = min(layer.shape)
    size = most if rank is None else min(rank, most)
    if to == "low_rank_sparse":
        nonzeros = max(1, round((density or 0) * old.numel()))
        left, right, places = low_rank_sparse(old, size, nonzeros)
        dtype = layer.tensor.dtype
        low = LowRank.of(left.to(dtype), right.to(dtype))
        rest = old - (low.left.weight.double() @ low.right.weight.double()).detach()  # of the cast factors
        values = rest.flatten()[places].to(dtype)
        return Sum.of(low, Sparse.of(layer.shape, values, places)), {"rank": size, "nonzeros": nonzeros}
    thin = None if layer.held is None else factors_of(layer.held)
    if rank is None:
        if thin is None or thin[0].shape[1] > layer.shape[1]:
            raise ValueError(
                f"layer {name!r} is no product of two thin matrices, so it has no exact low-rank form; "
                "give a rank, or skip the layer"
            )
        left, right = thin
    elif thin is not None:
        left, right = truncated(*thin, size)
    else:
        u, s, vh = torch.linalg.svd(old, full_matrices=False)
        half = s[:size].sqrt()
        left, right = u[:, :size] * half, half[:, None] * vh[:size]
    return LowRank.of(left, right), left.shape[1]


def _replace_(
    model: nn.Module, members: Sequence[str], layers: Mapping[str, Layer], structure: Structure
) -> None:
    """Put one structure in the place of layers that share it; a dense one as the ordinary layer."""
    structure.requires_grad_(any(p.requires_grad for p in layers[members[-1]].parameters()))
    shared: nn.Parameter | None = None
    for member in members:
        module: Any = layers[member].wrap(structure)
        if isinstance(structure, Dense):
            module = module.to_dense()
            module.weight.requires_grad_(structure.full.weight.requires_grad)
            if shared is not None and shared.shape == module.weight.shape:
                module.weight = shared
            shared = module.weight
        replace_(model, member, module)


def _report(
    model: nn.Module,
    rows: list[LayerRow],
    layers: dict[str, Layer],
    to: str,
    rank: int | None,
    density: float | None,
) -> Report:
    lost = sum(row.error for row in rows)
    for row in rows:
        row.loss_share = row.error / lost if lost > 0 else 0.0
    tensors = {id(p): p for p in model.parameters()}.values()
    reached = sum(row.bytes_after for row in rows) / sum(row.bytes_before for row in rows)
    return Report(
        recipe={"name": "convert", "to": to, "rank": rank, "density": density},
        budget=reached,
        reached=reached,
        layers=rows,
        skipped=skipped_of(model, layers),
        totals=totals_of(
            rows, sum(p.numel() * p.element_size() for p in tensors), sum(p.numel() for p in tensors)
        ),
        allocation={"allocator": "fixed", "error": lost},
        dtype=str(next(iter(layers.values())).tensor.dtype).removeprefix("torch."),
    )
