"""The loss of HOLa: its task's, which pairs of detections are examples of which verb, and all terms together.

    p = prior · σ(z),    log p/(1 − p) = log prior − log(1 − prior + e^(−z))
    L_int = Σ focal(log p/(1 − p), target) / max(1, number of positives),    over entries with prior > 0
    focal(x, 1) = (1 − α) (1 − σ(x))^γ softplus(−x),    focal(x, 0) = α σ(x)^γ softplus(x)

A pair is an example of verb v where some ground truth of v has min(IoU of humans, IoU of objects) ≥ 0.5 with
it (evaluation asks for more than 0.5).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rankfold.hoi.boxes import pair_iou
from rankfold.hoi.decomposition import TextDecomposition
from rankfold.hoi.penalties import actreg, class_sets, class_weights, decomposition_terms, sem
from rankfold.hoi.settings import Losses

MATCH = 0.5  # of training: at least


def bound_logit(logits: Tensor, prior: Tensor) -> Tensor:
    """log p/(1 − p) of p = prior · sigmoid(logits), entry by entry, without forming p; `prior` in (0, 1].

    Finite, with a finite gradient, for logits of any size that a float holds.
    """
    return prior.log() - torch.logaddexp(torch.log1p(-prior), -logits)


def focal(x: Tensor, targets: Tensor, *, alpha: float = 0.5, gamma: float = 0.2) -> Tensor:
    """The focal loss of every entry: x logits, targets 0 or 1 of the same shape.

    The power is taken as e^(γ log σ), whose gradient is finite where σ^γ has none: γ is below 1.
    """
    sign = 1 - 2 * targets  # −x for a positive, x for a negative
    weight = targets * (1 - alpha) + (1 - targets) * alpha
    return weight * torch.exp(gamma * F.logsigmoid(sign * x)) * F.softplus(sign * x)


def match(
    pairs: Tensor,
    boxes: Tensor,
    gt_boxes_h: Tensor,
    gt_boxes_o: Tensor,
    gt_interactions: Tensor,
    verb_of: Tensor,
    verbs: int,
    *,
    threshold: float = MATCH,
) -> Tensor:
    """Targets (B, M, V) of 0 and 1 in the dtype of `boxes`, from pairs of detections and the ground truth.

    pairs            (B, M, 2) int64, rows of `boxes`: human, other; -1 pads
    boxes            (B, n, 4) float, corners
    gt_boxes_h, _o   (B, g, 4) float, corners in the same pixels
    gt_interactions  (B, g) int64, INTERACTION ids (not verbs); -1 pads
    verb_of          (N,) int64, the verb of each interaction

    One pair may be an example of several verbs, and several pairs of one. The object's class is not compared:
    the prior is 0 where object and verb do not go together.
    """
    humans, others = (_rows(boxes, pairs[..., side]) for side in (0, 1))
    near = pair_iou(humans, others, gt_boxes_h, gt_boxes_o) >= threshold  # (B, M, g)
    real, known = (pairs >= 0).all(-1), gt_interactions >= 0
    near &= real.unsqueeze(2) & known.unsqueeze(1)
    verb = F.one_hot(verb_of[gt_interactions.clamp(min=0)], verbs).to(boxes.dtype)  # (B, g, V)
    return (near.to(boxes.dtype) @ verb).clamp(max=1)


def _rows(boxes: Tensor, index: Tensor) -> Tensor:
    """(B, M, 4): the boxes (B, n, 4) that `index` (B, M) names; anything where it is -1, or where n is 0."""
    if not boxes.shape[1]:
        return boxes.new_zeros(*index.shape, 4)
    return boxes.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, 4))


def interaction_loss(
    logits: Tensor,
    prior: Tensor,
    targets: Tensor,
    *,
    alpha: float = 0.5,
    gamma: float = 0.2,
    clamped: bool = True,
) -> Tensor:
    """L_int, a scalar: logits, prior, targets (..., V); what has prior 0 (a pad, a verb that is hidden or
    does not go with the object) takes no part. Where nothing else is there it is 0, with a gradient of 0.

    clamped  the normaliser is at least 1. False, as the public code: with no positive the sum is multiplied
             by their number, 0, so that the negatives of such a batch teach nothing
    """
    there = prior > 0
    dtype = torch.promote_types(logits.dtype, torch.float32)
    x = bound_logit(logits[there].to(dtype), prior[there].to(dtype))
    chosen = targets[there].to(x.dtype)
    total = focal(x, chosen, alpha=alpha, gamma=gamma).sum()
    positives = chosen.sum()
    if clamped:
        return total / positives.clamp(min=1)
    return torch.where(positives < 1, total * positives, total / positives.clamp(min=1))


def output_terms(
    model: Any,
    output: Any,
    batch: dict[str, Tensor],
    losses: Losses,
    *,
    unseen: Collection[int] = (),
    rare: Collection[int] = (),
) -> dict[str, Tensor]:
    """The weighted terms that read what the model said: interaction, sem, actreg.

    output  a `HolaOutput` of the `batch`, which has its ground truth (see `rankfold.hoi.loader.item_of`)
    unseen  INTERACTION ids without examples: what their texts say is kept by sem and actreg
    rare    further ones that actreg treats like unseen ones
    """
    language, place = model.language, output.logits.device
    targets = match(
        output.pairs,
        batch["boxes"],
        batch["gt_boxes_h"],
        batch["gt_boxes_o"],
        batch["gt_interactions"],
        language.verb_of,
        output.logits.shape[-1],
    )
    task = interaction_loss(
        output.logits,
        output.prior,
        targets,
        alpha=losses.alpha,
        gamma=losses.gamma,
        clamped=losses.clamped,
    )
    found = {"interaction": losses.interaction * task}
    decomposed = isinstance(language.decomposition, TextDecomposition)
    if not (losses.sem or (losses.actreg and decomposed)):
        return found
    truth = batch["gt_interactions"]
    hidden = torch.tensor(sorted(unseen), dtype=torch.long, device=place)
    sets = class_sets(truth[truth >= 0], hidden, language.object_of)
    features = output.text, output.pair_text
    if losses.sem:
        images = "last" if losses.last_image else "all"
        found["sem"] = losses.sem * sem(*features, language.decomposition.target, sets, images=images)
    if losses.actreg and decomposed:
        more = torch.tensor(sorted(rare), dtype=torch.long, device=place) if rare else None
        weights = class_weights(sets, len(language.verb_of), seen=losses.seen_weight, rare=more)
        term = actreg(*features, language.decomposition, language.verb_of, weights)
        found["actreg"] = losses.actreg * term
    return found


def parameter_terms(model: Any, losses: Losses) -> dict[str, Tensor]:
    """The weighted terms that read the decomposition alone: recon, sparse, unique, orth, those of actions.
    None where the texts are not decomposed."""
    held = model.language.decomposition
    if not isinstance(held, TextDecomposition):
        return {}
    found = decomposition_terms(held)
    return {name: getattr(losses, name) * term for name, term in found.items() if getattr(losses, name)}


def total(
    model: Any,
    output: Any,
    batch: dict[str, Tensor],
    losses: Losses,
    *,
    unseen: Collection[int] = (),
    rare: Collection[int] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole loss, a scalar, and its weighted terms, detached. See `output_terms`."""
    parts = output_terms(model, output, batch, losses, unseen=unseen, rare=rare)
    parts |= parameter_terms(model, losses)
    return torch.stack(list(parts.values())).sum(), {name: term.detach() for name, term in parts.items()}
