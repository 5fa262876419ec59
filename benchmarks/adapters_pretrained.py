"""Tasks of adapters.py whose models ship as packages.

Movie     MiniLM -> is a snippet of a film review positive?
Textile   EfficientNet-Lite0 -> is a simulated cloth whole, or is its defect local or global?
Genre     SmolLM2-135M-Instruct -> one genre of the Brown corpus, split by document
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy
import setting
import torch
from adapters_tasks import Part, Task, batches, cut, stored
from efficientnet_lite0 import pretrained
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.data import fetch
from rankfold.data_classes import brown_documents, detokenize
from rankfold.data_packaged import labelled
from rankfold.data_pictures import decode
from rankfold.gguf import packaged_model

KINDS = ("nominal", "local", "global")


class Classifier(nn.Module):
    """The mean of an encoder's states over the words, and a linear layer."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


@dataclass(frozen=True)
class Movie(Task):
    """Snippets are cut at `length` tokens."""

    length: int = 48
    targets = ("encoder.encoder.*",)
    head = ("head.*",)
    pretrained = half = True
    without = ("none", "pissa")  # a new head knows nothing; PiSSA is left to the models from scratch

    def model(self, seed: int) -> nn.Module:
        encoder = copy.deepcopy(minilm()[0])
        torch.manual_seed(seed)
        return Classifier(encoder, encoder.config.hidden_size, 2).eval()

    def logits(self, model: Any, batch: Part) -> Tensor:
        return model(batch["x"], batch["mask"])

    def parts(self, seed: int) -> tuple[Part, Part, Part]:
        fetch("movie")
        rows = sorted(set(zip(*labelled("movie"), strict=True)))
        random.Random(seed).shuffle(rows)
        found, start = [], 0
        for size in (self.train, self.valid, self.test):
            texts = [text for text, _ in rows[start : start + size]]
            coded = minilm()[1](
                texts, truncation=True, max_length=self.length, padding=True, return_tensors="pt"
            )
            labels = torch.tensor([label for _, label in rows[start : start + size]])
            found.append({"x": coded["input_ids"], "mask": coded["attention_mask"], "y": labels})
            start += size
        return found[0], found[1], found[2]


@cache
def minilm() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    folder = packaged_model("minilm")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@dataclass(frozen=True)
class Textile(Task):
    """As many pictures of each of the three kinds, scaled to `side` pixels. Adapters go on the 1 x 1
    convolutions, which hold 93 % of the parameters below the head."""

    side: int = 96
    targets = ("blocks.*expand_conv", "blocks.*project_conv", "conv_head")
    head = ("fc.*",)
    tuned = (0, 1, 2)
    head_rate = 3e-3  # at a probe's best, 0.1, the loss begins by rising to 7
    pretrained = True
    without = ("none", "pissa")

    def model(self, seed: int) -> nn.Module:
        model = pretrained()
        torch.manual_seed(seed)
        model.fc = nn.Linear(model.fc.in_features, len(KINDS))
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def parts(self, seed: int) -> tuple[Part, Part, Part]:
        x, y = pictures(self.side)
        draw = random.Random(seed)
        by_kind = [[row for row in range(len(y)) if y[row] == kind] for kind in range(len(KINDS))]
        for rows in by_kind:
            draw.shuffle(rows)
        order = [rows[i] for i in range(min(map(len, by_kind))) for rows in by_kind]  # balanced everywhere
        train, valid, test = (
            {**part, "x": ((part["x"].float() - 127) / 128).contiguous(memory_format=torch.channels_last)}
            for part in cut(x, y, order, (self.train, self.valid, self.test))
        )
        return train, valid, test


@cache
def pictures(side: int) -> tuple[Tensor, Tensor]:
    """(n, 3, side, side) uint8 and the kinds of all pictures of the package."""
    found = stored("textile", "all")
    images = []
    for row in range(len(found.labels)):
        picture = decode(found.pictures.read(row)).resize((side, side), Image.Resampling.BILINEAR)
        images.append(torch.from_numpy(numpy.array(picture)).permute(2, 0, 1))
    return torch.stack(images), torch.tensor([KINDS.index(label) for label in found.labels])


@dataclass(frozen=True)
class Genre(Task):
    """A window of `length` tokens from each of so many documents; the parts share none. The table of words is
    far too large to be a probe's, so that the head is the last norm."""

    letter: str = "p"  # of the Brown corpus: romance
    length: int = 256
    targets = tuple(f"model.layers.{block}.*" for block in range(15, 30))  # the upper half: half the time
    head = ("model.norm.*",)
    pretrained = half = True
    without = ("pissa",)
    metric = "perplexity"
    sign = -1

    def model(self, seed: int) -> nn.Module:
        return copy.deepcopy(smollm2().model)

    def parts(self, seed: int) -> tuple[Part, Part, Part]:
        documents = [ids for ids in tokens(self.letter) if len(ids) > self.length]
        if len(documents) < self.train + self.valid + self.test:
            raise ValueError(f"genre {self.letter!r} has {len(documents)} documents, too few for {self}")
        draw = random.Random(seed)
        draw.shuffle(documents)
        starts = [draw.randrange(len(ids) - self.length) for ids in documents]
        windows = [ids[at : at + self.length] for ids, at in zip(documents, starts, strict=True)]
        x, none = torch.tensor(windows), torch.zeros(len(windows))
        train, valid, test = cut(x, none, list(range(len(x))), (self.train, self.valid, self.test))
        return train, valid, test

    def logits(self, model: Any, batch: Part) -> Tensor:
        return model(input_ids=batch["x"], use_cache=False).logits

    def loss(self, model: nn.Module, batch: Part) -> Tensor:
        with self.products():
            logits = self.logits(model, batch)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["x"][:, 1:].flatten())

    @torch.no_grad()
    def score(self, model: nn.Module, part: Part) -> float:
        losses = [float(self.loss(model, batch)) for batch in batches(part, 1, None)]
        return math.exp(sum(losses) / len(losses))


@cache
def smollm2() -> Any:
    return setting.open_smollm2()


@cache
def tokens(letter: str) -> list[list[int]]:
    """Of every document of a genre."""
    fetch("brown")
    texts = [detokenize(text) for name, text in brown_documents() if name[1] == letter]
    return smollm2().tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
