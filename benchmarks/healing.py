"""What healing gives back: a compressed model before and after, beside the dense one, at the same bytes.

    python benchmarks/healing.py --keep FOLDER

SmolLM2 is compressed by `--recipes` at `--budgets` (as `rankfold compress` does, from 64 windows of
`wikipedia:train`), then healed (as `rankfold adapt --heal` does) on `wikipedia:train` and `pydoc:train` in
equal shares, once for every learning rate, share of the text's own loss, and choice of what trains. The state
is chosen on documents held out of these two; perplexities are of the test documents of both, 12 windows of
512 each, seen by nothing else. Folders and runs stay in `--keep`: a benchmark that was stopped goes on.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import setting

from rankfold import journey
from rankfold.evaluate import bytes_on_disk
from rankfold.heal import heal
from rankfold.report import Report
from rankfold.report_healing import closed

DATA = ("wikipedia:train", "pydoc:train")


def compressed(keep: Path, recipe: str, budget: float) -> Path:
    """The folder of the model by that recipe, made if it is not there."""
    folder = keep / f"{recipe}-{budget}"
    if not (folder / "config.json").is_file():
        journey.compress(
            setting.MODEL,
            str(folder),
            recipe=recipe,
            budget=budget,
            unit="nbytes",
            calib=None,
            targets=None,
            skip=(),
            metrics_file=None,
            keep=str(keep / "fits"),
            storage=None,
            batch_size=4,
            seed=0,
            dtype=None,
            device="cpu",
            data=None,
            evaluate=False,
            check=True,
            overwrite=False,
            progress=progress,
        )
    return folder


@contextmanager
def progress() -> Any:
    yield setting.said


def healed(small: Path, tokens: int, options: dict[str, Any]) -> tuple[Report, Path]:
    """The report of a healing and its folder; of one that was done before, if it was."""
    words = "-".join(f"{key}{value:g}" for key, value in options.items())
    folder = small.with_name(f"{small.name}-healed-{tokens}-{words}")
    if (folder / "config.json").is_file():
        return Report.load(folder), folder
    return heal(
        str(small),
        str(folder),
        original=setting.MODEL,
        data=DATA,
        tokens=tokens,
        validation_tokens=4096,
        dtype="bfloat16",
        device="cpu",
        eval_every=max(1, tokens // 1024 // 4),
        progress=progress,
        say=lambda words: print(f"  {words}", flush=True),
        **options,
    )


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        keep={"type": Path, "required": True, "help": "folder for models and runs"},
        recipes={"nargs": "+", "default": ["best"], "help": "default: best"},
        budgets={"nargs": "+", "type": float, "default": [0.7], "help": "bytes kept (default 0.7)"},
        tokens={"type": int, "default": 150_000, "help": "to train on (default 150,000)"},
        lr={"nargs": "+", "type": float, "default": [2e-4], "help": "learning rates (default 2e-4)"},
        lm={
            "nargs": "+",
            "type": float,
            "default": [0.0],
            "help": "shares of the text's own loss (default 0)",
        },
        embeddings={
            "nargs": "+",
            "type": int,
            "choices": (0, 1),
            "default": [0],
            "help": "1: embeddings and head train too (default 0)",
        },
    )
    rows, results = [], []
    for recipe, budget in itertools.product(chosen.recipes, chosen.budgets):
        small = compressed(chosen.keep, recipe, budget)
        for lr, lm, embeddings in itertools.product(chosen.lr, chosen.lm, chosen.embeddings):
            report, folder = healed(
                small, chosen.tokens, {"lr": lr, "lm": lm, "embeddings": bool(embeddings)}
            )
            facts = report.healing
            assert facts is not None
            payload = [bytes_on_disk(path)["payload"] for path in (small, folder)]
            results.append({"recipe": recipe, "budget": budget, "payload": payload, **facts})
            told = [f"{recipe} {budget:g}", lr, lm, "yes" if embeddings else "no", facts["seconds"] / 60]
            kl = f"{facts['kl']['before']:.3f} → {facts['kl']['after']:.3f}"
            texts = [
                f"{row['before']:.1f} → {row['after']:.1f}, dense {row['dense']:.1f} ({closed(row):.0%})"
                for row in facts["perplexity"].values()
            ]
            same = "equal" if payload[0] == payload[1] else f"{payload[0]:,} → {payload[1]:,}"
            rows.append([*told, kl, *texts, same])
            print(rows[-1], flush=True)
    headings = ["model", "lr", "lm", "embeddings", "minutes", "held-out KL", *DATA, "bytes"]
    text = setting.table([h.replace(":train", ":test") for h in headings], rows)
    setting.finish(f"Healing, {chosen.tokens:,} tokens", {"results": results}, text, chosen)


if __name__ == "__main__":
    main()
