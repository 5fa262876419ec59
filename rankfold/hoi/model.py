"""HOLa: verbs of human-object pairs, from regions of an image and decomposed texts of all classes.

    logit[m, v] = mean over the classes c of verb v of
                  s_HO/2 · v_ho[m]·Tho[c]  +  s_U/2 · (u[m] + p[m])·Th[c]
    score       = sigmoid(logit) · prior

v_ho are the regions of both boxes, u of their union, p the pair's own token; the scales have no exp. Means
and products change places, which is exact: texts are averaged by verb first, and no (pairs, classes) table is
made. [arXiv 2507.15542]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection, PreTrainedModel

from rankfold.hoi.accounting import Unused
from rankfold.hoi.bottleneck import AdapterBlock, ContextMLP
from rankfold.hoi.boxes import union
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.config import HolaConfig
from rankfold.hoi.language import LanguageBranch
from rankfold.hoi.output import HolaOutput, Triplets
from rankfold.hoi.pairs import build_pairs, of_pairs, pair_prior, spatial_encoding
from rankfold.hoi.roi_align import roi_mean
from rankfold.hoi.tokens import PairTokens
from rankfold.hoi.vision import AdaptedVision

if TYPE_CHECKING:
    from rankfold.hoi.text import TextFeatures


class HolaModel(PreTrainedModel):
    """The model of `HolaConfig`. Images, detections and class texts go in, logits of verbs come out.

    config  says the sizes; its `classes` are needed
    text    features of all classes, which a new model starts from; None only where a checkpoint gives them

    Trains adapters, the texts' factors and two scales; the image encoder is frozen. Raises ValueError without
    texts, and for texts of another table or width.
    """

    interaction_at: Tensor

    config_class = HolaConfig
    base_model_prefix = "hola"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: HolaConfig, text: TextFeatures | None = None) -> None:
        super().__init__(config)
        self.table = config.table()
        width, dead = config.projection_dim, bool(config.dead)
        if text is not None:
            text.check(self.table, width)
            if config.num_guides is None:
                config.num_guides = [len(rows) for rows in text.guides]
        self.language = LanguageBranch(config, text, self.table)
        self.vision = AdaptedVision(config)
        self.prior_mlp = ContextMLP(width + 5, config.context_hidden, config.bottleneck)
        self.tokens = None
        if config.tokens:
            self.tokens = PairTokens(config, len(self.table.objects), self.vision.width)
            if text is not None:
                self.tokens.start_(text.guides)
        self.img_adapter = AdapterBlock(
            2 * width,
            width if dead else None,
            bottleneck=config.bottleneck,
            heads=config.heads,
            ffn=config.ffn,
            hidden=config.context_hidden,
            attend=config.attend_classes and not config.isolate_pairs,
            dead=dead,
        )
        self.pair_scale = nn.Parameter(torch.tensor(config.logit_scale))
        self.union_scale = nn.Parameter(torch.tensor(config.logit_scale))
        self.unused = Unused(width, config.rank - config.first_action) if dead else None
        # Of a table of its own: what it computes while a model is built on meta has no values.
        self.register_buffer("interaction_at", config.table().interaction_at.to(self.pair_scale.device))
        self._hidden: frozenset[int] = frozenset()
        if text is None and self.pair_scale.device.type != "meta":
            raise ValueError("a new model needs the text features of its classes: HolaModel(config, text)")
        for module in self.modules():  # each started itself, and post_init starts what is not marked
            cast(Any, module)._is_hf_initialized = text is not None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: what a checkpoint lacks is an error."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As of transformers. Raises ValueError where the folder lacks weights."""
        opened: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, info = opened
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{args[0]} lacks {len(missing)} weights of a HolaModel, such as {missing[0]}")
        model.freeze_()
        return (model, info) if output_loading_info else model

    @classmethod
    def from_clip(
        cls, clip: str | PreTrainedModel, table: ClassTable, text: TextFeatures, **options: Any
    ) -> HolaModel:
        """A new model on the image encoder of `clip`: a name or folder, or a model with `vision_model` and
        `visual_projection`. `options` are those of `HolaConfig`. Raises ValueError for texts of another
        width."""
        if isinstance(clip, str):
            clip = cast(PreTrainedModel, CLIPVisionModelWithProjection.from_pretrained(clip))
        source = cast(Any, clip)
        width = source.visual_projection.out_features
        vision = getattr(source.config, "vision_config", source.config).to_dict()
        model = cls(HolaConfig(vision=vision, projection_dim=width, classes=table.to_json(), **options), text)
        model.vision.tower.load_state_dict(source.vision_model.state_dict())
        model.vision.projection.load_state_dict(source.visual_projection.state_dict())
        return model

    def freeze_(self) -> HolaModel:
        """Train all but the image encoder."""
        self.requires_grad_(True)
        self.vision.freeze_()
        return self

    def hide_(self, interactions: Iterable[int] = ()) -> HolaModel:
        """While training, act as if these interaction ids were not classes: their prior is 0, and with
        `config.seen_columns` no logit sees their texts. In eval mode every class is there. Raises ValueError
        for an id outside the table, and where nothing is left."""
        hidden = frozenset(int(i) for i in interactions)
        if outside := sorted(i for i in hidden if not 0 <= i < len(self.table)):
            raise ValueError(f"interaction {outside[0]} is outside 0 … {len(self.table) - 1}")
        if len(hidden) == len(self.table):
            raise ValueError(f"all {len(hidden)} interactions are hidden: nothing is left to learn")
        self._hidden = hidden
        return self

    def seen(self) -> Tensor:
        """(N,) bool: the interactions that are there now. All of them in eval mode."""
        seen = torch.ones(len(self.table), dtype=torch.bool)
        if self.training:
            seen[sorted(self._hidden)] = False
        return seen.to(self.pair_scale.device)

    def verb_means(self) -> Tensor:
        """(V, N): times class texts, their mean by verb; zeros for a verb none of whose classes is there."""
        belongs = F.one_hot(self.language.verb_of, len(self.table.verbs)).mT.to(self.pair_scale.dtype)
        entering = belongs * self.seen() if self.config.seen_columns else belongs
        counted = entering if self.config.count == "seen" else belongs
        return entering / counted.sum(1, keepdim=True).clamp(min=1)

    def forward(
        self,
        pixel_values: Tensor,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        queries: Tensor,
        counts: Tensor | None = None,
        **ignored: Any,
    ) -> HolaOutput:
        """Logits and priors of every pair of detections.

        pixel_values  (B, 3, S, S), images resized to the encoder's square
        boxes         (B, n, 4) corners in pixels of that square
        scores        (B, n) of the detector
        labels        (B, n) int64 object ids, -1 at padding
        queries       (B, n, query_width), last states of the detector
        counts        (B,) detections of each image; None: as many as labels that are not -1
        ignored       what a batch holds for the loss

        An image without pairs is fine. Raises ValueError for shapes that do not agree and unknown labels.
        """
        labels = self._checked(pixel_values, boxes, scores, labels, queries, counts)
        present, side = labels >= 0, self.vision.side
        names = self.language.objects[:-1]
        dtype = names.dtype
        place = torch.cat([scores.unsqueeze(-1), boxes / side], -1).to(dtype)
        known = torch.cat([place, names[labels.clamp(min=0)]], -1)
        pairs, lengths = build_pairs(labels, self.table.human)
        x, y = pairs.unbind(-1)
        first, second = of_pairs(boxes, x), of_pairs(boxes, y)
        tokens = names.new_zeros(len(boxes), 0, self.vision.width)
        if self.tokens is not None:
            encoding = spatial_encoding(first, second, (side, side), cast(float, self.config.spatial_eps))
            things = of_pairs(labels, y).clamp(min=0)
            tokens = self.tokens(queries.to(dtype), encoding.to(dtype), pairs, things, names)
        grid, own = self.vision(pixel_values, self.prior_mlp(known), present, tokens, lengths)
        text, pair_text = self.language(grid.mean((-2, -1)))
        regions = self._regions(grid, boxes)
        real = x >= 0
        ends = torch.cat([of_pairs(regions, x), of_pairs(regions, y)], -1)
        both = self.img_adapter(ends, present=real if self.img_adapter.attend else None)
        means = self.verb_means()
        around = self._regions(grid, union(first, second))
        if self.tokens is not None:
            around = around + own
        # Texts of a pair are the same for every image.
        logits = self.pair_scale / 2 * (both @ (means @ pair_text[0]).mT)
        logits = logits + self.union_scale / 2 * (around @ (means @ text).mT)
        at = self.interaction_at
        valid = (at >= 0) & self.seen()[at.clamp(min=0)]
        exponent = self.config.prior_train if self.training else self.config.prior_test
        return HolaOutput(
            logits=logits * real.unsqueeze(-1),
            prior=pair_prior(scores, labels, pairs, valid, exponent),
            pairs=pairs,
            pair_counts=lengths,
            text=text,
            pair_text=pair_text,
        )

    @torch.no_grad()
    def triplets(self, output: HolaOutput, labels: Tensor) -> list[Triplets]:
        """What `output` says of each image, whose detections have the object ids `labels` (B, n): every pair
        with every interaction of its object, best first. No score is left out, however small."""
        scores = output.logits.sigmoid() * output.prior
        things = of_pairs(labels, output.pairs[..., 1]).clamp(min=0)
        image, pair, verb = (output.prior > 0).nonzero(as_tuple=True)
        found = self.interaction_at[things[image, pair], verb]
        values = scores[image, pair, verb]
        result = []
        for b in range(len(labels)):
            mine = (image == b).nonzero().squeeze(1)
            mine = mine[values[mine].argsort(descending=True, stable=True)]
            result.append(Triplets(output.pairs[b, pair[mine]], found[mine], values[mine]))
        return result

    def _regions(self, grid: Tensor, boxes: Tensor) -> Tensor:
        """(B, R, D) of length 1: the mean of the patch features in each box."""
        size, sampling = self.config.roi_size, self.config.roi_sampling
        cells = boxes / self.vision.patch
        return F.normalize(roi_mean(grid, cells, size, sampling, self.config.dropout, self.training), dim=-1)

    def _checked(
        self,
        pixel_values: Tensor,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        queries: Tensor,
        counts: Tensor | None,
    ) -> Tensor:
        """The labels with -1 beyond `counts`; ValueError unless all fits together."""
        shape, side, width = labels.shape, self.vision.side, self.config.query_width
        for name, value, expected in (
            ("pixel_values", pixel_values, (shape[0], 3, side, side)),
            ("boxes", boxes, (*shape, 4)),
            ("scores", scores, tuple(shape)),
            ("queries", queries, (*shape, width)),
        ):
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"{name} have shape {tuple(value.shape)}; with labels {tuple(shape)} this model reads "
                    f"{expected}"
                )
        if counts is not None:
            there = torch.arange(shape[1], device=labels.device) < counts.unsqueeze(1)
            labels = labels.where(there, -1)
        if labels.numel() and (most := int(labels.max())) >= len(self.table.objects):
            raise ValueError(
                f"a detection has object id {most}, but the model's table has {len(self.table.objects)} "
                f"objects, 0 to {len(self.table.objects) - 1}"
            )
        return labels


AutoConfig.register(HolaConfig.model_type, HolaConfig, exist_ok=True)
AutoModel.register(HolaConfig, HolaModel, exist_ok=True)

__all__ = ["HolaModel"]
