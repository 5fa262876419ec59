"""Frozen text encoders: a CLIP text tower with its projection, or any sentence encoder by mean pooling.

Features are given as they come, not normalised: those of objects are used so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.gguf import PACKAGED, packaged_model
from rankfold.masked import masked_mean
from rankfold.provenance import tensors_hash

TOWER = "clip_text_model"  # a model type whose Auto class leaves the projection out


class TextEncoder:
    """Texts to features, with a model in eval mode, on its own device.

    model      of transformers; one with `get_text_features` gives those, one whose output has `text_embeds`
               these, and of any other the last hidden states are averaged over the tokens
    tokenizer  its tokenizer
    name       what files and reports call it
    batch      texts at a time
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, *, batch: int = 64) -> None:
        self.model, self.tokenizer, self.name, self.batch = model.eval(), tokenizer, name, batch

    @classmethod
    def open(cls, name: str, device: torch.device | str = "cpu") -> TextEncoder:
        """`minilm`, the packaged sentence encoder, or a folder or hub id: of a CLIP model, of its text tower,
        or of a sentence encoder. Raises ValueError where there is none, and for one whose file lacks weights,
        which would be random."""
        from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModelWithProjection

        place = str(packaged_model(name)) if name in PACKAGED else name
        try:
            kind = AutoConfig.from_pretrained(place).model_type
            opener: Any = CLIPTextModelWithProjection if kind == TOWER else AutoModel
            model, loaded = opener.from_pretrained(place, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"no text encoder {name!r}: neither a folder with a model and its tokenizer nor packaged, "
                f"and the hub has none or could not be asked ({first})"
            ) from error
        missing = sorted(filter(_read, loaded["missing_keys"]))
        if missing:
            raise ValueError(
                f"text encoder {name!r} lacks {len(missing)} weights of its model, {missing[0]!r} first"
            )
        return cls(model.to(device), tokenizer, name)

    @property
    def identity(self) -> str:
        """The name, and a hash of the weights: features of two encoders never pass for each other."""
        return f"{self.name} {self._hash}"

    @cached_property
    def _hash(self) -> str:
        return tensors_hash({k: t for k, t in self.model.state_dict().items() if _read(k)})

    @property
    def length(self) -> int:
        """The longest text in tokens, start and end included; what is longer is cut. 77 for CLIP."""
        config: Any = self.model.config
        config = getattr(config, "text_config", config)
        return min(int(self.tokenizer.model_max_length), int(config.max_position_embeddings))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), D) in float32, on the CPU. Equal texts are computed once. Raises ValueError for no
        text, and for an empty one."""
        if not texts or not all(text.strip() for text in texts):
            raise ValueError("an encoder takes texts, at least one, none of them empty")
        once = sorted(set(texts), key=lambda text: (len(text), text))  # of like length: little padding
        parts = [self._encoded(once[at : at + self.batch]) for at in range(0, len(once), self.batch)]
        row = {text: i for i, text in enumerate(once)}
        return torch.cat(parts)[[row[text] for text in texts]]

    def _encoded(self, texts: list[str]) -> Tensor:
        model: Any = self.model
        inputs = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(model.device)
        if hasattr(model, "get_text_features"):
            found = model.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
            features = found if isinstance(found, Tensor) else found.pooler_output
        else:
            found = model(**inputs)
            features = getattr(found, "text_embeds", None)
            if features is None:
                features = masked_mean(found.last_hidden_state, inputs.attention_mask.bool())
        return features.float().cpu()


def _read(key: str) -> bool:
    """Whether a weight takes part. A pooler, which sentence encoders often leave out of their files, does
    not: transformers then draws one."""
    return "pooler" not in key
