"""What an adaptation says of itself, as lines of (label, words): the terminal and the page share them."""

from __future__ import annotations

from typing import Any

from rankfold.classify.scores import in_words
from rankfold.report_format import count, number, percent, size
from rankfold.report_format import seconds as duration

_FORMS = {
    "model": "the model with what was trained, an ordinary folder",
    "merged": "an ordinary model, the adapters merged into its weights",
    "adapter": "the adapter alone (rankfold.adapter_file.load_adapter_)",
    "lora": "a LoRA folder of PEFT",
}


def title(facts: dict[str, Any]) -> str:
    return f"{facts['model']}, adapted with {facts['recipe']['name']}"


def lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    trained, went, settings = facts["trained"], facts["training"], facts["settings"]
    method = facts["recipe"].get("method", {})
    options = ", ".join(
        f"{key} {value}"
        for key, value in method.items()
        if key in ("rank", "alpha", "coefficients") and value
    )
    parts = f"{trained['adapters']:,} in adapters of {trained['layers']} layers, {trained['others']:,} others"
    found = [
        ("Recipe", facts["recipe"]["name"] + (f", {options}" if options else "")),
        (
            "Trained",
            f"{trained['parameters']:,} parameters, {percent(trained['share'], 2)} of the model's "
            f"{trained['model_parameters']:,}" + (f" ({parts})" if trained["adapters"] else ""),
        ),
        ("Added by adapters", size(trained["bytes_added"])),
        ("Written", f"{size(facts['written']['bytes'])}: {_FORMS[facts['written']['form']]}"),
        *quality(facts),
        ("Training", _steps(facts)),
        *([("Varied at random", ", ".join(settings["augment"]))] if settings.get("augment") else []),
        (
            "Optimizer",
            f"adamw, lr {number(settings['lr'])}, clip {number(settings['clip'])}, {settings['dtype']}, "
            f"{duration(went['seconds'])}",
        ),
    ]
    held, top = facts["memory"]["training"], facts["memory"]["peak"]
    if held:
        each = ", ".join(f"{part} {size(held[part])}" for part in ("weights", "gradients", "optimizer"))
        found.append(("Memory of a step", f"{size(held['total'])} ({each}), without activations"))
    where = "on the device" if "device" in top else "resident, libraries included"
    if top:
        found.append(("Peak, measured", f"{size(top.get('device', top.get('resident')))} {where}"))
    if error := facts["written"].get("merge_error"):
        found.append(("Merged", f"largest relative error of a layer {number(error)}"))
    if len(went["sessions"]) > 1:
        found.append(("Sessions", "resumed after step " + ", ".join(map(str, went["sessions"][1:]))))
    return found


def quality(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Before and after, of every set that was judged."""
    found = []
    for name, row in facts["metrics"].items():
        old, new = row["before"], row["after"]
        if facts["task"] == "classification":
            before = percent(old["accuracy"])
            words = f"{in_words(new)}; before training: accuracy {before}"
        else:
            key = "loss" if "loss" in new else "perplexity"
            unit = " nats a token" if key == "loss" else ""
            words = f"{key} {number(old[key])} → {number(new[key])}{unit}"
        found.append((name[:1].upper() + name[1:], words))
    return found


def _steps(facts: dict[str, Any]) -> str:
    went, data = facts["training"], facts["data"]
    if facts["task"] == "classification":
        early = ", stopped early" if went["stopped_early"] else ""
        epochs = len(went["epochs"])
        seen = f"{epochs} epoch{'' if epochs == 1 else 's'} over {data['train']['n']:,} {facts['of']}s"
        return f"{seen}, {went['steps']:,} steps{early}; epoch {went['best_epoch']} is kept"
    of = f"{count(data['tokens'])} tokens" if "tokens" in data else f"{data['conversations']:,} conversations"
    return f"{went['steps']:,} steps, {of}; the state of step {went['best_step']:,} is kept"
