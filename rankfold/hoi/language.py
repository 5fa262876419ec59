"""The language branch: text features of all classes, adapted to each image.

    Th  = mem(self(W B) | mean patch feature)        (B, N, D)
    Tho = fuse([a ; o])                              (B, N, 2D)

a is the feature of a class's action, with unit norm, o the embedding of its object, not normalised: side by
side, as the regions [h ; o] of a pair that they are compared with. Adapters add nothing at the start.
[HOLa: arXiv 2507.15542]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankfold.hoi.bottleneck import AdapterBlock
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.decomposition import TextDecomposition, TextTable

if TYPE_CHECKING:
    from rankfold.hoi.text import TextFeatures

FORMS = ("decomposed", "free", "frozen")


class LanguageBranch(nn.Module):
    """See the module.

    config  has projection_dim, rank, first_action, init, trains, form, bottleneck, heads, ffn,
            context_hidden, attend_classes, dead: see `HolaConfig`. form: "decomposed"; or, to compare with
            it, "free", a table that trains, and "frozen", T and Ac as they are
    text    the features; None: of the right shapes, to be filled by a checkpoint
    table   the classes

    `self_adapter` lets classes see each other with `attend_classes` alone, as `ho_fuse`; in `mem_adapter`
    they always do. Raises ValueError for features that are not of this table or width.
    """

    objects: Tensor
    verb_of: Tensor
    object_of: Tensor

    def __init__(self, config: Any, text: TextFeatures | None, table: ClassTable) -> None:
        super().__init__()
        if config.form not in FORMS:
            raise ValueError(f"form={config.form!r}: choose one of {FORMS}")
        width, sizes = config.projection_dim, (len(table), len(table.verbs), config.projection_dim)
        self.decomposition: TextDecomposition | TextTable
        if config.form == "decomposed":
            self.decomposition = TextDecomposition(
                *sizes, rank=config.rank, first_action=config.first_action, trains=config.trains
            )
        else:
            self.decomposition = TextTable(*sizes, trained=config.form == "free")
        options = {
            "bottleneck": config.bottleneck,
            "heads": config.heads,
            "ffn": config.ffn,
            "hidden": config.context_hidden,
            "dead": config.dead,
        }
        attend, dead = config.attend_classes, config.dead
        self.self_adapter = AdapterBlock(width, width if dead else None, attend=attend, **options)
        self.mem_adapter = AdapterBlock(width, width, attend=True, **options)
        self.ho_fuse = AdapterBlock(2 * width, 2 * width if dead else None, attend=attend, **options)
        # Buffers that are stored: a model built on meta is filled from its checkpoint alone.
        self.register_buffer("objects", torch.zeros(len(table.objects) + 1, width))
        self.register_buffer("verb_of", torch.tensor([verb for verb, _ in table.interactions]))
        self.register_buffer("object_of", torch.tensor([thing for _, thing in table.interactions]))
        if text is not None:
            self.start_(text, config.init)

    @torch.no_grad()
    def start_(self, text: TextFeatures, init: str = "reconstructing") -> None:
        """Decompose these features, and take their objects. ValueError for those of another table or width;
        then nothing has changed."""
        if text.objects.shape != self.objects.shape:
            raise ValueError(
                f"object features have shape {tuple(text.objects.shape)}, the model "
                f"{tuple(self.objects.shape)}: they are of another encoder or class table"
            )
        self.decomposition.start_(text.classes, text.actions, init)
        self.objects.copy_(text.objects)

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Th (B, N, D) and Tho (B, N, 2D), by interaction id; Tho, the same for every image, is a view.

        context  (B, D), the mean patch feature of each image in the space of the text features; or
                 (B, K, D), any K vectors of each image
        """
        seen = self.mem_adapter.read  # type: ignore[union-attr]
        assert seen is not None
        keys = seen(context.unsqueeze(1) if context.dim() == 2 else context)
        states = self.self_adapter(self.decomposition.class_features().unsqueeze(0))
        features = self.mem_adapter(states, keys)
        return features, self.pair_features().expand(len(context), -1, -1)

    def pair_features(self) -> Tensor:
        """Tho (1, N, 2D), which depends on no image."""
        actions = self.decomposition.action_features()[self.verb_of]
        return self.ho_fuse(torch.cat([actions, self.objects[self.object_of]], -1).unsqueeze(0))
