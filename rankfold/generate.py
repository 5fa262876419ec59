"""Running a model to look at it: in eval mode, without gradients, greedily, and leaving it as it was found.

A compressed model can have a fair perplexity and still loop when it writes. The check is the share of
repeated 4-grams in a greedy continuation; sampling and repetition penalties would hide the loop, so there are
none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

DEGENERATE = 0.5  # share of repeated 4-grams above which a greedy continuation is called a loop


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every submodule's own training flag restored after, even on an
    error."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs go: the device of the first parameter (CPU for a model without any)."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def accepts(model: nn.Module, option: str) -> bool:
    """Whether the model's forward names `option` (`use_cache`, `logits_to_keep`): plain modules do not."""
    return option in inspect.signature(model.forward).parameters


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, a tuple that starts with it, or a Hugging Face
    output."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return output[0]
    return output["logits"]


def repetition_rate(text_or_ids: str | Sequence[int] | Tensor, n: int = 4) -> float:
    """Share of n-grams that have occurred before: 1 - distinct / all. Words of a text, or token ids.

    0.0 for fewer than n + 1 items. A continuation that loops with period p after its start tends to 1 - p /
    length.
    """
    if n < 1:
        raise ValueError(f"n={n}: n-grams have at least one item")
    items = text_or_ids.split() if isinstance(text_or_ids, str) else [int(item) for item in text_or_ids]
    grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def degenerate(rate: float, threshold: float = DEGENERATE) -> bool:
    """Whether a repetition rate means a loop: more than half of the 4-grams repeat earlier ones."""
    return rate > threshold


def generate_sample(
    model: nn.Module, tokenizer: Any, prompt: str, max_new_tokens: int = 64
) -> dict[str, Any]:
    """A greedy continuation and whether it loops: {"prompt", "text", "tokens", "repetition", "degenerate"}.

    The prompt is encoded as the tokenizer does by default (with its BOS, if it adds one), `text` is the
    continuation alone, `repetition` is measured on its token ids. Stops at the end-of-text token. Uses the
    model's key/value cache if it returns one. No sampling, no penalties: those would hide a degenerate model.
    """
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device_of(model))
    if not ids.numel():
        raise ValueError(f"prompt {prompt!r} has no tokens")
    stops = _stops(model, tokenizer)
    cached = accepts(model, "past_key_values") and accepts(model, "use_cache")
    new: list[int] = []
    with evaluating(model):
        step, options = ids, {"use_cache": True} if cached else {}
        while len(new) < max_new_tokens:
            output = model(step, **options)
            token = logits_of(output)[:, -1].argmax(-1, keepdim=True)
            if int(token) in stops:
                break
            new.append(int(token))
            ids = torch.cat([ids, token], 1)
            cache = getattr(output, "past_key_values", None) if cached else None
            step, options = (
                (ids, {}) if cache is None else (token, {"use_cache": True, "past_key_values": cache})
            )
    rate = repetition_rate(new)
    text = tokenizer.decode(new, skip_special_tokens=True)
    return {
        "prompt": prompt,
        "text": text,
        "tokens": len(new),
        "repetition": rate,
        "degenerate": degenerate(rate),
    }


def _stops(model: nn.Module, tokenizer: Any) -> set[int]:
    """End-of-text ids that the tokenizer, the configuration or the generation configuration names."""
    holders = (tokenizer, getattr(model, "config", None), getattr(model, "generation_config", None))
    found = [getattr(holder, "eos_token_id", None) for holder in holders]
    return {
        int(i) for item in found if item is not None for i in (item if isinstance(item, list) else [item])
    }
