"""What a compression cost, and what it saved: perplexity, divergence, accuracy, bytes, multiply-adds, sanity.

    perplexity = exp(mean of -log p(next token))        KL = mean of Σ p log(p/q), in nats a token

One protocol: windows of token ids exactly as given (no token is added here), every window scored on its
targets after the first token, in float32 log-softmax with float64 sums. Models run in eval mode without
gradients and get their modes back. Greedy samples are in `generate.py`, bytes and multiply-adds in
`footprint.py`, time and memory in `latency.py`; all are offered here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.footprint import bytes_on_disk, macs_per_token, params
from rankfold.generate import (
    DEGENERATE,
    accepts,
    degenerate,
    device_of,
    evaluating,
    generate_sample,
    logits_of,
    repetition_rate,
)
from rankfold.latency import latency, peak_memory

__all__ = [
    "DEGENERATE",
    "accuracy",
    "bytes_on_disk",
    "compare",
    "degenerate",
    "generate_sample",
    "kl_to",
    "latency",
    "macs_per_token",
    "params",
    "peak_memory",
    "perplexity",
    "repetition_rate",
    "sliding",
]

Progress = Callable[[int, int], None]  # (windows done, windows in all)

CHUNK = 2**22  # logits turned into float32 log-probabilities at a time: 16 MiB


def sliding(ids: Tensor, length: int, stride: int) -> tuple[Tensor, Tensor]:
    """A long document as overlapping windows in which every target is scored once, with as much context as
    fits.

    ids: (T,) token ids. Returns windows (N, length) and the targets that each scores, (N,): length - 1 in the
    first, `stride` in those after it, and what is left in the last one, which ends at the end of the
    document. Pass both on: `perplexity(model, windows, stride=scored)`. A document shorter than `length` is
    one window. ValueError for fewer than two tokens, and unless 1 <= stride <= length - 1 (with stride =
    length a window's first token would never be scored).
    """
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"sliding needs one document of at least 2 token ids; got shape {tuple(ids.shape)}")
    if not 1 <= stride < length:
        raise ValueError(f"stride={stride} must be between 1 and length - 1 = {length - 1}")
    length = min(length, len(ids))
    ends = [*range(length, len(ids), stride), len(ids)]
    windows = torch.stack([ids[end - length : end] for end in ends])
    scored = [length - 1, *(end - before for before, end in pairwise(ends))]
    return windows, torch.tensor(scored)


def perplexity(
    model: nn.Module,
    windows: Tensor,
    *,
    batch_size: int = 4,
    stride: int | Tensor | None = None,
    progress: Progress | None = None,
) -> float:
    """Token perplexity of a causal language model (any module from ids (B, L) to logits (B, L, V)).

    windows: (N, L) integer token ids, each scored on its L - 1 targets. `stride` is for windows that overlap:
    a tensor (N,) says how many of its *last* targets each window scores (see `sliding`); an int s is the
    plain case of windows s apart, where the first scores all and the others their last s. Returns inf or nan
    where the model's logits do (a broken model is a result, not a crash). ValueError for windows of fewer
    than two tokens or ids outside the vocabulary.
    """
    (nll,), _, count = _score([model], windows, batch_size, stride, progress)
    return _exp(nll / count)


def kl_to(
    original: nn.Module,
    model: nn.Module,
    windows: Tensor,
    *,
    batch_size: int = 4,
    stride: int | Tensor | None = None,
    progress: Progress | None = None,
) -> float:
    """Mean KL(original ‖ model) in nats a token, over the positions that `perplexity` scores. Zero for equal
    models."""
    _, kl, count = _score([original, model], windows, batch_size, stride, progress)
    return kl / count


def _score(
    models: Sequence[nn.Module],
    windows: Tensor,
    batch_size: int,
    stride: int | Tensor | None,
    progress: Progress | None,
) -> tuple[list[float], float, int]:
    """Summed negative log-likelihoods of each model, summed KL(first ‖ last), number of targets; one pass."""
    scored = _targets(windows, stride)
    for model in models:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder: perplexity needs a causal language model"
            )
    vocabularies = [getattr(getattr(model, "config", None), "vocab_size", None) for model in models]
    for size in vocabularies:
        if size is not None and not 0 <= int(windows.min()) <= int(windows.max()) < size:
            raise ValueError(
                f"token ids run from {int(windows.min())} to {int(windows.max())}, the model knows {size}: "
                f"tokenize with the model's own tokenizer"
            )
    nll, kl = [0.0] * len(models), 0.0
    with evaluating(*models):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            logits = [_logits(model, batch) for model in models]
            if len({item.shape[-1] for item in logits}) > 1:
                raise ValueError(f"vocabularies differ: {[item.shape[-1] for item in logits]} logits a token")
            rows = max(1, CHUNK // logits[0].shape[-1])
            for index, ids in enumerate(batch):
                first = len(ids) - 1 - scored[start + index]
                for low in range(first, len(ids) - 1, rows):
                    high = min(low + rows, len(ids) - 1)
                    targets = ids[low + 1 : high + 1].to(logits[0].device).long()
                    logs = [
                        item[index, low:high].to(targets.device).float().log_softmax(-1) for item in logits
                    ]
                    for which, log in enumerate(logs):
                        nll[which] -= _sum(log.gather(-1, targets[:, None]))
                    if len(logs) > 1:
                        p = logs[0].exp()
                        terms = p * (
                            logs[0] - logs[-1]
                        )  # 0 · log 0 = 0, which masked logits (-inf) need said
                        kl += _sum(terms.masked_fill_(p == 0, 0.0).sum(-1))
            if progress is not None:
                progress(min(start + batch_size, len(windows)), len(windows))
    return nll, kl, sum(scored)


def _targets(windows: Tensor, stride: int | Tensor | None) -> list[int]:
    if windows.dim() != 2 or not len(windows) or windows.is_floating_point():
        raise ValueError(
            f"windows are integer ids of shape (N, L); got {tuple(windows.shape)} {windows.dtype}"
        )
    count, length = windows.shape
    if length < 2:
        raise ValueError(f"windows of {length} token have no target to predict: use at least 2")
    if stride is None:
        return [length - 1] * count
    scored = stride.tolist() if isinstance(stride, Tensor) else [length - 1, *[stride] * (count - 1)]
    if len(scored) != count or not all(1 <= item < length for item in scored):
        raise ValueError(
            f"stride={stride} must score between 1 and {length - 1} targets in each of {count} windows"
        )
    return scored


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    options = {"use_cache": False} if accepts(model, "use_cache") else {}
    return logits_of(model(ids.to(device_of(model)), **options))


def _sum(values: Tensor) -> float:
    return float(values.cpu().double().sum())  # on the CPU: not every accelerator has float64


def _exp(value: float) -> float:
    return math.exp(value) if not value > 709 else math.inf  # math.exp overflows there; nan passes through


def accuracy(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Classification accuracy: {"accuracy", "n", "standard_error"}, the last √(a(1-a)/n).

    batches: dicts of tensors with `labels`, the rest given to the model by name; logits (..., classes) are
    compared to labels (...) by their largest entry, labels below zero are left out. ValueError for no labels,
    or shapes that differ.
    """
    right = n = 0
    with evaluating(model):
        for batch in batches:
            if "labels" not in batch:
                raise ValueError(f"accuracy needs 'labels' in every batch; got {sorted(batch)}")
            inputs = {k: _to(v, device_of(model)) for k, v in batch.items() if k != "labels"}
            best = logits_of(model(**inputs)).argmax(-1).cpu()
            labels = batch["labels"].cpu()
            if best.shape != labels.shape:
                raise ValueError(f"predictions have shape {tuple(best.shape)}, labels {tuple(labels.shape)}")
            right += int(((best == labels) & (labels >= 0)).sum())
            n += int((labels >= 0).sum())
    if n == 0:
        raise ValueError("accuracy needs at least one labelled example; got none")
    share = right / n
    return {"accuracy": share, "n": n, "standard_error": math.sqrt(share * (1 - share) / n)}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def compare(
    dense: nn.Module,
    compressed: nn.Module,
    windows: Tensor,
    tokenizer: Any = None,
    *,
    batch_size: int = 4,
    stride: int | Tensor | None = None,
    data: Mapping[str, Any] | None = None,
    prompt: str = "The history of the city begins",
    max_new_tokens: int = 64,
    folders: tuple[str | Path, str | Path] | None = None,
    labelled: Sequence[Mapping[str, Any]] | None = None,
    timing: Mapping[str, Any] | None = None,
    memory: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The report's `evaluation`: {"data", "dense", "compressed", "generation", "warnings"}, and "latency" if
    timed.

    Perplexity of both and their KL come from one pass, each model once a batch. Optional: greedy samples
    (with a tokenizer), `folders` (dense, compressed) for bytes on disk, `labelled` batches for accuracy,
    `timing` the options of `latency` ({} for its defaults; the metrics hold its first batch size), `memory`
    for peak memory: the weights plus the largest increase of the process (or device) while one batch is
    scored. `data` is copied, with the protocol added.
    """
    (ours, theirs), kl, count = _score([dense, compressed], windows, batch_size, stride, progress)
    rows: dict[str, dict[str, Any]] = {
        "dense": {"perplexity": _exp(ours / count)},
        "compressed": {"perplexity": _exp(theirs / count), "kl": kl / count},
    }
    models = {"dense": dense, "compressed": compressed}
    for position, (name, model) in enumerate(models.items()):
        row = rows[name]
        row |= {"params": params(model), "macs_per_token": macs_per_token(model, example=windows[:1])}
        if folders is not None:
            row["bytes_on_disk"] = bytes_on_disk(folders[position])["payload"]
        if labelled is not None:
            row |= accuracy(model, labelled)
        if memory:
            row["peak_memory_bytes"] = _peak(model, windows[:batch_size])
    warnings = [
        f"the perplexity of the {name} model is {row['perplexity']}: its logits are not finite"
        for name, row in rows.items()
        if not math.isfinite(row["perplexity"])
    ]
    protocol = {"windows": len(windows), "length": windows.shape[1], "scored_tokens": count}
    result: dict[str, Any] = {"data": {**(data or {}), **protocol}, **rows}
    if timing is not None:
        result["latency"] = latency(models, **timing)
        warnings += result["latency"]["notes"]
        for row in result["latency"]["rows"][:2]:
            keys = ("prefill_ms", "decode_ms_per_token", "decode_tokens_per_s")
            rows[row["model"]] |= {key: row[key] for key in keys}
    if tokenizer is not None:
        one, two = (generate_sample(model, tokenizer, prompt, max_new_tokens) for model in models.values())
        result["generation"] = {
            "prompt": prompt,
            "dense": one["text"],
            "compressed": two["text"],
            "repetition_dense": one["repetition"],
            "repetition_compressed": two["repetition"],
        }
        if two["degenerate"]:
            also = "; so does the dense model's" if one["degenerate"] else ""
            warnings.append(
                f"the compressed model's sample loops: {two['repetition']:.0%} repeated 4-grams{also}"
            )
    return {**result, "warnings": warnings}


def _peak(model: nn.Module, windows: Tensor) -> int:
    peak = peak_memory(lambda: perplexity(model, windows, batch_size=len(windows)), device=device_of(model))
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(held.values()) + peak.bytes - peak.before
