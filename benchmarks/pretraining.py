"""A language model from scratch: full rank, pure low rank and SLTrain, in one loop on the same tokens.

    python benchmarks/pretraining.py --stage tune --keep runs    # learning rates; low rank's start and scale
    python benchmarks/pretraining.py --stage final --keep runs   # three seeds at what was best, judged once

Texts: the Brown corpus and Wikipedia (`rankfold.data`), parted by document into training, validation (for
the tuning) and test (for the last table). A byte-level BPE is trained on the training part. Low rank gets the
smallest rank with at least SLTrain's parameters. `--forms galore relora` adds two baselines that train the
full matrix in little memory, by the packages galore-torch (which needs bitsandbytes) and peft. Every run is
one line of `runs.jsonl` in the folder `--keep`: a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import setting
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold import recipes
from rankfold.data_packaged import fetch, texts
from rankfold.factorize import factorize_

VOCABULARY, LENGTH, BATCH = 8192, 128, 4
HIDDEN, INNER, LAYERS, HEADS = 384, 1024, 3, 6
RANK, SPARSITY = 36, 0.10
TUNING_SEED = 100
START = 2e-3  # the learning rate at which the search begins
# "zero" is not among them: every matrix of a block would be zero, and none would ever get a gradient.
INITS = ("torch", "variance_preserving", "svd_of_dense")


def parts() -> dict[str, Tensor]:
    """{train, validation, test: token ids}, parted by document: of every 20, one each for the last two."""
    fetch("brown")
    documents = [*texts("brown"), *texts("wikipedia")]
    split = {
        "train": [text for i, text in enumerate(documents) if i % 20 not in (7, 13)],
        "validation": documents[7::20],
        "test": documents[13::20],
    }
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        split["train"], vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False
    )
    end = bpe.token_to_id("<|end|>")
    ids = {
        name: [token for code in bpe.encode_batch(found) for token in (*code.ids, end)]
        for name, found in split.items()
    }
    return {name: torch.tensor(tokens) for name, tokens in ids.items()}


def built(form: dict[str, Any], seed: int) -> nn.Module:
    """The model of a form. All forms of a seed have the same embeddings, norms and head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    if form["form"] == "sltrain":
        recipe = recipes.sltrain(rank=RANK, sparsity=SPARSITY, alpha=form["scale"] * RANK)
        factorize_(model, recipe, seed=seed)
    elif form["form"] == "low rank":
        rank = equal_rank()
        factorize_(
            model, recipes.low_rank(rank=rank, alpha=form["scale"] * rank, init=form["init"]), seed=seed
        )
    elif form["form"] == "relora":
        from peft import LoraConfig, get_peft_model

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(
            model, LoraConfig(r=equal_rank(), lora_alpha=equal_rank(), target_modules=names)
        )
        for name, parameter in model.named_parameters():  # ReLoRA trains what is no block matrix in full
            parameter.requires_grad_(".base_layer." not in name)
    return model


def optimizer_of(form: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; GaLore's on the matrices of the blocks, with the projection of its authors' scripts."""
    if form["form"] == "galore":
        from galore_torch import GaLoreAdamW

        inside = [p for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
        taken = {id(p) for p in inside}
        others = [p for p in model.parameters() if id(p) not in taken]
        options = {"rank": HIDDEN // 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        return GaLoreAdamW([{"params": others}, {"params": inside, **options}], lr=form["lr"])
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=form["lr"], weight_decay=0.0, fused=True
    )


@torch.no_grad()
def restart_(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """ReLoRA: fold the update into the weight, and begin another with an empty optimizer state."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
            layer.merged_adapters.clear()
            layer.reset_lora_parameters("default", True)
            for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                optimizer.state.pop(factor, None)


def equal_rank() -> int:
    """The smallest rank at which pure low rank has at least SLTrain's parameters."""
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(INNER, HIDDEN)] * 3
    wanted = sum(RANK * (m + n) + int(SPARSITY * (m * n)) for m, n in shapes)
    return math.ceil(wanted / sum(m + n for m, n in shapes))


def trained(
    form: dict[str, Any], seed: int, tokens: int, data: dict[str, Tensor], judged: str
) -> dict[str, Any]:
    """One run: AdamW without decay, clip 1, warm-up, cosine to a tenth of the rate, bf16 autocast."""
    model = built(form, seed)
    steps = tokens // (LENGTH * BATCH)
    optimizer = optimizer_of(form, model)
    warm = steps // 10

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(steps - warm, 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    start, stream, curve = time.perf_counter(), data["train"], []
    for step in range(steps):
        places = torch.randint(len(stream) - LENGTH, (BATCH,), generator=generator)
        ids = torch.stack([stream[place : place + LENGTH] for place in places.tolist()])
        with torch.autocast("cpu", torch.bfloat16):  # products in bfloat16, parameters and states in float32
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if form["form"] == "relora" and (step + 1) % (steps // 4) == 0 and step + 1 < steps:
            restart_(model, optimizer)
        optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            break
        curve.append(loss.item())
    seconds = time.perf_counter() - start
    blocks = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and "norm" not in n)
    return {
        **form,
        "seed": seed,
        "tokens": tokens,
        "judged": judged,
        "perplexity": perplexity(model, data[judged]) if len(curve) == steps else math.nan,
        "train_loss": [statistics.fmean(curve[i : i + 50]) for i in range(0, len(curve), 50)],
        "parameters": sum(p.numel() for p in model.parameters()),
        "block_parameters": blocks,
        "seconds": seconds,
    }


@torch.inference_mode()
def perplexity(model: nn.Module, stream: Tensor, windows: int = 256) -> float:
    """exp of the mean loss a token over evenly spaced windows."""
    model.eval()
    starts = torch.linspace(0, len(stream) - LENGTH, windows).long().tolist()
    rows = torch.stack([stream[start : start + LENGTH] for start in starts]).split(16)
    losses = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in rows]
    return math.exp(sum(losses) / windows)


class Runs:
    """The runs done so far, one line each; `of` makes those that are missing."""

    def __init__(self, folder: Path, data: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.data = folder / "runs.jsonl", data
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = {self.key(run): run for run in map(json.loads, lines)}

    @staticmethod
    def key(run: dict[str, Any]) -> str:
        names = ("form", "lr", "scale", "init", "seed", "tokens", "judged")
        return json.dumps([run.get(name) for name in names])

    def of(self, form: dict[str, Any], seed: int, tokens: int, judged: str) -> dict[str, Any]:
        key = self.key({**form, "seed": seed, "tokens": tokens, "judged": judged})
        if key not in self.done:
            run = trained(form, seed, tokens, self.data, judged)
            with self.file.open("a") as handle:
                handle.write(json.dumps(run) + "\n")
            print(json.dumps(run), flush=True)
            self.done[key] = run
        return self.done[key]

    def judged(self, form: dict[str, Any], tokens: int) -> float:
        """Validation perplexity on the tuning seed."""
        found = self.of(form, TUNING_SEED, tokens, "validation")["perplexity"]
        return math.inf if math.isnan(found) else found

    def walked(self, form: dict[str, Any], key: str, tokens: int) -> dict[str, Any]:
        """Double form[key] for as long as that helps, then halve it from where it was; the better end."""
        ends = []
        for factor in (2.0, 0.5):
            best = form
            while self.judged(step := {**best, key: best[key] * factor}, tokens) < self.judged(best, tokens):
                best = step
            ends.append(best)
        return min(ends, key=lambda end: self.judged(end, tokens))


def tuned(runs: Runs, name: str, tokens: int) -> dict[str, Any]:
    """The learning rate, the scale, and the learning rate once more; of low rank for every start."""
    starts: list[dict[str, Any]] = [{"form": name, "lr": START}]
    if name == "sltrain":
        starts = [{**starts[0], "scale": 1.0}]
    if name == "low rank":
        starts = [{**starts[0], "scale": 1.0, "init": init} for init in INITS]
    found = []
    for best in starts:
        best = runs.walked(best, "lr", tokens)
        if "scale" in best:
            best = runs.walked(runs.walked(best, "scale", tokens), "lr", tokens)
        found.append(best)
    return min(found, key=lambda form: runs.judged(form, tokens))


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        stage={"choices": ["tune", "final"], "default": "final"},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        settings={"nargs": "+", "type": json.loads, "help": "JSON objects, judged as they are: no search"},
        forms={"nargs": "+", "default": ["full rank", "low rank", "sltrain"]},
        keep={"type": Path, "default": Path("runs"), "help": "folder of the runs (default runs)"},
        tune_tokens={"type": int, "default": 150_000, "help": "tokens of a tuning run (default 150,000)"},
        tokens={"type": int, "default": 500_000, "help": "tokens of a final run (default 500,000)"},
    )
    data = parts()
    print({name: len(ids) for name, ids in data.items()}, flush=True)
    runs = Runs(chosen.keep, data)
    best = chosen.settings or [tuned(runs, name, chosen.tune_tokens) for name in chosen.forms]
    if chosen.stage == "tune":
        print(json.dumps(best, indent=1))
        return
    rows, found = [], []
    for form in best:
        done = [runs.of(form, seed, chosen.tokens, "test") for seed in chosen.seeds]
        each = [run["perplexity"] for run in done]
        spread = f"{statistics.fmean(each):.1f}" + (f" ± {statistics.stdev(each):.1f}" if each[1:] else "")
        how = ", ".join(str(form[key]) for key in ("lr", "scale", "init") if key in form)
        rows.append([form["form"], how, done[0]["parameters"], done[0]["block_parameters"], *each, spread])
        found += done
    heads = [
        "form",
        "lr, scale, start",
        "parameters",
        "of the blocks",
        *(f"seed {seed}" for seed in chosen.seeds),
        "mean",
    ]
    facts = {"tokens": chosen.tokens, "tune_tokens": chosen.tune_tokens, "best": best, "runs": found}
    setting.finish(
        "Test perplexity of a language model from scratch", facts, setting.table(heads, rows), chosen
    )


if __name__ == "__main__":
    main()
