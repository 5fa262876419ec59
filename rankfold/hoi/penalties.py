"""What is added to the task's loss so that unseen classes stay where their texts are; every term a scalar.

    recon    ‖sg(W) B - T‖²             B only, and with Wa, B[idx], Ac: act recon
    sparse   mean over rows of ‖Wᵢ‖₁    W, Wa
    unique   Σ |cos(W[:, i], W[:, j])|, i ≠ j                         W
    orth     Σ |G Gᵀ|, G = offdiag(cosines between rows)              B; act orth: of the rows of Wa
    sem      KL between class similarities of T and of the adapted features         W, Wa, adapters
    actreg   KL between each class's adapted weights and those of its action        W, Wa, adapters

sg stops the gradient; every B⁺ is a constant. Class ids are interaction ids throughout. [HOLa, step 8]
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rankfold.hoi.decomposition import TextDecomposition

TEMPERATURE = 0.1  # of the softmax over rows, before each KL divergence
SEEN, UNSEEN = 0.2, 0.999  # actreg's weight of a seen class of the batch, and of an unseen one by its objects
WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        "recon": 0.1,
        "sparse": 0.1,
        "act_sparse": 0.1,
        "unique": 0.001,
        "orth": 0.001,
        "act_recon": 0.1,
        "act_orth": 0.001,
        "sem": 150.0,
        "actreg": 50.0,
    }
)


def decomposition_terms(decomposition: TextDecomposition) -> dict[str, Tensor]:
    """The terms that need only the parameters, unweighted, by their names in WEIGHTS."""
    weights, actions, basis = decomposition.weights, decomposition.action_weights, decomposition.basis
    return {
        "recon": recon(weights, basis, decomposition.target),
        "sparse": sparse(weights),
        "act_sparse": sparse(actions),
        "unique": unique(weights),
        "orth": orth(basis),
        "act_recon": recon(actions, decomposition.action_basis, decomposition.action_target),
        "act_orth": orth(actions),
    }


def recon(weights: Tensor, basis: Tensor, target: Tensor) -> Tensor:
    """‖sg(W) B - T‖² for W (n, r), B (r, D), T (n, D): the gradient reaches B alone."""
    return (weights.detach() @ basis - target).square().sum()


def sparse(weights: Tensor) -> Tensor:
    """Mean over rows of the l1 norm of W (n, r)."""
    return weights.abs().sum(-1).mean()


def unique(weights: Tensor) -> Tensor:
    """Sum over pairs i ≠ j, each twice, of |cos| between columns of W (n, r)."""
    return off_diagonal(cosines(weights.mT)).abs().sum()


def orth(rows: Tensor) -> Tensor:
    """Σ |G Gᵀ| with G the cosines between rows (n, d), its diagonal zero; that of G Gᵀ counts."""
    between = off_diagonal(cosines(rows))
    return (between @ between.mT).abs().sum()


# --- terms of adapted features -----------------------------------------------------------------------------


class ClassSets(NamedTuple):
    """Interaction ids, ascending: `seen` in the batch, `unseen` ones with one of their objects, and both."""

    seen: Tensor
    unseen: Tensor
    both: Tensor


def class_sets(present: Tensor, unseen: Tensor, object_of: Tensor) -> ClassSets:
    """The sets of one batch.

    present    interaction ids of the batch's pairs, in any order, repeated or not
    unseen     interaction ids that the split hides; none of them is taken as seen
    object_of  (N,) the object id of each interaction id

    Raises ValueError for ids outside 0 … N-1, of which padding (-1) is one.
    """
    hidden, here = (torch.zeros(len(object_of), dtype=torch.bool, device=object_of.device) for _ in range(2))
    for ids, mask, name in ((unseen, hidden, "unseen"), (present, here, "present")):
        if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < len(object_of)):
            raise ValueError(
                f"{name} interaction ids reach from {int(ids.min())} to {int(ids.max())}, but the table has "
                f"0 to {len(object_of) - 1}"
            )
        mask[ids.to(object_of.device)] = True
    seen = here & ~hidden
    near = hidden & torch.isin(object_of, object_of[seen])
    return ClassSets(*(mask.nonzero().flatten() for mask in (seen, near, seen | near)))


def sem(
    features: Tensor, pair_features: Tensor, target: Tensor, sets: ClassSets, *, images: str = "all"
) -> Tensor:
    """Mean over the class sets that are not empty of KL(cosines of T ‖ cosines of adapted features), for both
    kinds of features averaged, and over images; 0 where all sets are empty.

    features, pair_features  (B, N, D) and (B, N, 2D), what `LanguageBranch` gives
    target                   T (N, D)
    images                   "all", or "last": only the batch's last image, as in the public code, where the
                             term depends on the order of a batch
    """
    if images not in ("all", "last"):
        raise ValueError(f"images={images!r}: 'all', or 'last', which is what the public code reads")
    if not len(sets.both):
        return features.sum() * 0
    terms, goal = [], cosines(target[sets.both])
    for adapted in (features, pair_features):
        few = adapted[-1:] if images == "last" or adapted.stride(0) == 0 else adapted  # 0: one, repeated
        found = cosines(few[:, sets.both])
        for ids in sets:
            at = torch.searchsorted(sets.both, ids)
            if len(ids):
                terms.append(divergence(goal[at][:, at], found[:, at][:, :, at]))
    return torch.stack(terms).mean()


def class_weights(
    sets: ClassSets, count: int, *, seen: float | Tensor = SEEN, rare: Tensor | None = None
) -> Tensor:
    """(N,) weights of the classes in `actreg`; 0 leaves a class out.

    count  N
    seen   weight of the batch's seen classes: a number, or (N,), one for each interaction id
    rare   further interaction ids, weighed as unseen ones: the rare classes, in the setting RF-UC

    Of unseen classes it is 0.999, whatever their share: the public code's formula for it reduces to that.
    """
    held = torch.zeros(count, device=sets.seen.device)
    held[sets.seen] = seen[sets.seen].to(held) if isinstance(seen, Tensor) else seen
    held[sets.unseen] = UNSEEN
    if rare is not None:
        held[rare] = UNSEEN
    return held


def actreg(
    features: Tensor,
    pair_features: Tensor,
    decomposition: TextDecomposition,
    verb_of: Tensor,
    weights: Tensor,
) -> Tensor:
    """KL(Wa of its action ‖ a class's adapted weights), weighed by class, from both kinds of features, added.

    features       (B, N, D): W_ad = their mean over images times B⁺, columns idx
    pair_features  (B, N, 2D): of the mean over images the first half, the action's, times B[idx]⁺
    verb_of        (N,) the verb id of each interaction id
    weights        (N,) of `class_weights`; classes of weight 0 do not count, and 0 is what none gives

    Rows of both sides have unit norm before the softmax.
    """
    ids = weights.nonzero().flatten()
    if not len(ids):
        return features.sum() * 0
    first, width = decomposition.first_action, decomposition.basis.shape[1]
    goal = F.normalize(decomposition.action_weights, dim=-1)[verb_of[ids]]
    inverse = torch.linalg.pinv(decomposition.basis.detach())
    action_inverse = torch.linalg.pinv(decomposition.action_basis.detach())
    total = features.new_zeros(())
    for found in (
        (features.mean(0)[ids] @ inverse)[:, first:],
        pair_features[..., :width].mean(0)[ids] @ action_inverse,
    ):
        total = total + divergence(goal, F.normalize(found, dim=-1), weights[ids])
    return total


def divergence(target: Tensor, prediction: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """KL(target ‖ prediction) of rows (..., n, k) through softmax at TEMPERATURE, over the number of entries
    of `prediction`; leading dimensions broadcast. `row_weights` (n,) multiply the rows."""
    log_target = (target / TEMPERATURE).log_softmax(-1)
    log_prediction = (prediction / TEMPERATURE).log_softmax(-1)
    rows = (log_target.exp() * (log_target - log_prediction)).sum(-1)
    return (rows if row_weights is None else rows * row_weights).sum() / prediction.numel()


def cosines(rows: Tensor) -> Tensor:
    """Cosines between rows (..., n, d): (..., n, n)."""
    unit = F.normalize(rows, dim=-1)
    return unit @ unit.mT


def off_diagonal(square: Tensor) -> Tensor:
    """A square matrix (..., n, n) with zeros on its diagonal."""
    return square - torch.diag_embed(square.diagonal(dim1=-2, dim2=-1))
