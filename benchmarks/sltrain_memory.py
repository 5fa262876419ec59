"""Memory and time of one SLTrain training step beside full rank, low rank and SLTrain by plain autograd.

    python benchmarks/sltrain_memory.py --threads 1 --out sltrain.json

The shapes are the paper's smallest model: hidden 512, inner 1376, 8 blocks, rank 128, sparsity 0.03; 4 x 256
tokens, float32, AdamW. "linears": its 56 block linears with products of single numbers between them; "model":
the whole decoder, vocabulary 32,000, with its loss computed a sequence at a time (else the logits are most
of the memory).

Peak: the most bytes of tensors alive at a time in one step, counted at every operator, each form in its own
process. The step is one with gradients and moments in place, as under accumulation. Floor: weights, indices,
gradients, moments, the activations that the forward pass saves, and one dense matrix of the largest linear
layer. Times are of forward and backward, in turns in one process, on that thread's own clock; the median of
the ratios. The last table is worked out, not measured: LLaMA-7B in bfloat16, without activations.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import setting
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from toy_sltrain import Block, by_autograd_, measured  # type: ignore[import-not-found]

from rankfold import factorize_, recipes
from rankfold.layers import select
from rankfold.methods import Scratch

FORMS = ("full rank", "low rank", "SLTrain, plain autograd", "SLTrain")
WHATS = ("linears", "model")
HIDDEN, INNER, BLOCKS, VOCABULARY = 512, 1376, 8, 32_000
BATCH, LENGTH = 4, 256


def decoder(**options: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER}
    return LlamaForCausalLM(
        LlamaConfig(**(config | {"num_hidden_layers": BLOCKS, "num_attention_heads": 8} | options))
    )


def made(what: str, form: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model and its loss on fixed data."""
    torch.manual_seed(0)
    if what == "model":
        model: nn.Module = decoder()
    else:
        model = nn.Sequential(*[Block(HIDDEN, INNER) for _ in range(BLOCKS)])
    if form == "low rank":
        factorize_(model, recipes.low_rank(rank=128))
    elif form != "full rank":
        factorize_(model, recipes.sltrain(rank=128, sparsity=0.03))
    if form == "SLTrain, plain autograd":
        by_autograd_(model)
    if what == "linears":
        x = torch.randn(BATCH * LENGTH, HIDDEN, requires_grad=True)
        return model, lambda: model(x).square().mean()
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH))

    def loss_of(hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(hidden[:-1]), target[1:])

    def loss() -> Tensor:
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
        parts = [checkpoint(loss_of, h, t, use_reentrant=False) for h, t in zip(states, ids, strict=True)]
        return torch.stack(parts).mean()

    return model, loss


def in_its_own_process(what: str, form: str, threads: int) -> dict[str, Any]:
    asked = [sys.executable, __file__, "--threads", str(threads), "--of", what, "--form", form]
    run = subprocess.run(asked, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def step_times(what: str, rounds: int) -> dict[str, float]:
    """{form: median ratio of a step's time to full rank's}, in turns."""
    losses = {form: made(what, form)[1] for form in FORMS}
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(rounds + 1):  # the first round warms up
        for form, loss in losses.items():
            start = time.thread_time()
            loss().backward()
            times[form].append(time.thread_time() - start)
    ratios = {
        form: [t / full for t, full in zip(found, times["full rank"], strict=True)][1:]
        for form, found in times.items()
    }
    return {form: statistics.median(found) for form, found in ratios.items()}


def seven_billion() -> list[tuple[Any, ...]]:
    """Gigabytes of weights, indices, gradients and moments for LLaMA-7B, rank 1024, sparsity 0.05.

    8-bit moments have a float32 for every 256. Per layer: a gradient is freed once its parameter is updated,
    so the largest one alone is counted. torchao leaves the moments of a parameter in float32 where 256 does
    not divide its size, which goes for the values here."""
    with torch.device("meta"):
        model = decoder(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
        )
    layers = select(model).values()
    dense = sum(p.numel() for p in model.parameters())
    fixed = dense - sum(layer.tensor.numel() for layer in layers)
    table = model.get_parameter("lm_head.weight").numel()
    method = Scratch(rank=1024, sparsity=0.05)
    small = [method.empty(layer.shape, *method.menu(layer.shape)) for layer in layers]
    stored, nonzeros = fixed + sum(s.params for s in small), sum(s.terms[1].nonzeros for s in small)
    eight = 2 * (1 + 4 / 256)
    rows = []
    for name, count, index, moments, largest in (
        ("full rank, Adam", dense, 0, 4.0 * dense, dense),
        ("full rank, 8-bit Adam, per layer", dense, 0, eight * dense, table),
        ("SLTrain, Adam", stored, 4, 4.0 * stored, stored),
        ("SLTrain, 8-bit Adam, per layer", stored, 4, eight * stored, table),
        ("the same, int64 indices", stored, 8, eight * stored, table),
        ("the same, int32, moments of torchao", stored, 4, eight * (stored - nonzeros) + 8 * nonzeros, table),
    ):
        parts = [2.0 * count, index * nonzeros, 2.0 * largest, moments]
        change = sum(parts) / (8 * dense) - 1
        rows.append((name, *(round(n / 1e9, 2) for n in (*parts, sum(parts))), f"{100 * change:.1f} %"))
    return rows


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        of={"choices": WHATS, "nargs": "*", "default": list(WHATS), "help": "what to measure"},
        form={"choices": FORMS, "help": "measure the peak of this form only, and print it as JSON"},
        rounds={"type": int, "default": 5, "help": "rounds of the times; 0 for none (default 5)"},
    )
    if chosen.form:
        print(json.dumps(asdict(measured(*made(chosen.of[0], chosen.form)))))
        return
    facts: dict[str, Any] = {"peak": {}, "time": {}}
    texts = []
    for what in chosen.of:
        found = {form: in_its_own_process(what, form, chosen.threads) for form in FORMS}
        times = step_times(what, chosen.rounds) if chosen.rounds else dict.fromkeys(FORMS, float("nan"))
        facts["peak"][what], facts["time"][what] = found, times
        rows = []
        for form, one in found.items():
            floor, mib = one["held"] + one["saved"] + one["transient"], 2**20
            parts = (one["held"], one["saved"], one["peak"])
            rows.append((form, *(n / mib for n in parts), one["peak"] / floor, times[form]))
        headings = (what, "held MiB", "saved MiB", "peak MiB", "peak / its floor", "time / full rank")
        texts.append(setting.table(headings, rows))
        ours, naive, full = (found[form] for form in ("SLTrain", "SLTrain, plain autograd", "full rank"))
        least = ours["held"] + ours["saved"] + ours["transient"]
        good = ours["peak"] < min(naive["peak"], full["peak"]) and ours["peak"] <= 1.15 * least
        facts[f"holds for {what}"] = good
        texts.append(
            f"SLTrain's peak is below both and at most 1.15 times its floor: {'yes' if good else 'NO'}"
        )
    facts["7B"] = seven_billion()
    headings = ("LLaMA-7B, GB, worked out", "weights", "indices", "gradients", "moments", "sum", "change")
    texts.append(setting.table(headings, facts["7B"]))
    texts.append("The paper measured -73 % with activations: 67.4 GB (Adam), 18.3 GB (8-bit, per layer).")
    setting.finish("SLTrain: one training step", facts, "\n\n".join(texts), chosen)


if __name__ == "__main__":
    main()
