"""The stages of a pre-training run: processes, tokens, the model under training, the folder that is left."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from rankfold.atomic import writing
from rankfold.layers import select
from rankfold.metrics import Progress
from rankfold.pretrain.data import Plan
from rankfold.pretrain.model import build, check_kind, train_tokenizer
from rankfold.pretrain.recipe import Training
from rankfold.pretrain.run import Run
from rankfold.pretrain.settings import Settings
from rankfold.pretrain.tokens import Packed, load_facts, prepare, validation_windows
from rankfold.pretrain.trainer import PretrainTrainer, Watch, arguments, collate
from rankfold.regime import Regime
from rankfold.report import Report
from rankfold.trainer_callback import RegimeCallback, StepInBackwardCallback


def processes(place: str) -> Any:
    """The processes that torchrun started, or the one there is. Raises ValueError for a device that is not
    there, and where Accelerate was told to shard the model."""
    from accelerate import PartialState

    if place not in ("cpu", "cuda"):
        raise ValueError(f"--device {place!r}: cpu or cuda; CUDA_VISIBLE_DEVICES says which")
    if place == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError(
            "rankfold pretrain shares the work by torchrun, with a whole model in every process; to shard "
            "the model (FSDP2), use factorize_ and the Trainer: docs/pretraining.md"
        )
    # The others wait for as long as the first one reads text.
    return PartialState(cpu=place == "cpu", timeout=timedelta(hours=12))


def check_layers(chosen: Training, config: Any) -> None:
    """Raise ValueError where the model is not causal, and where a layer does not take the options, asked of a
    model without weights."""
    check_kind(config)
    layers = select(build(config, 0, "meta"), chosen.targets, chosen.skip)
    if chosen.recipe is None:
        return
    taken = 0
    for name, layer in layers.items():
        try:
            taken += bool(chosen.recipe.method.menu(layer.shape))
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    if not taken:
        smallest = min((layer.shape for layer in layers.values()), key=min)
        raise ValueError(
            f"recipe {chosen.name!r} with these options saves nothing in any of the {len(layers)} layers "
            f"(one is {smallest}), and would train the dense model; lower the rank"
        )


def tokenize(
    run: Run, plan: Plan, given: Any, size: int | None, tell: Progress
) -> tuple[Any, dict[str, Any]]:
    """The tokenizer and the facts of the tokens on disk; what is there already is not made again.

    given  the tokenizer, or None: trained, with `size` entries
    """
    from transformers import AutoTokenizer

    if not run.tokenizer.is_dir():
        if given is None:
            assert size is not None
            tell("tokenizer", 0, 1)
            given = train_tokenizer(plan.training_text(), size)
            tell("tokenizer", 1, 1)
        with writing(run.tokenizer) as beside:
            given.save_pretrained(beside)
    tokenizer = given or AutoTokenizer.from_pretrained(str(run.tokenizer))
    facts = load_facts(run.data)
    return tokenizer, facts if facts is not None else prepare(run.data, plan, tokenizer, tell)


@dataclass
class Started:
    """A model as it starts, and what trains it. `report` is that of `factorize_`, if the recipe is one."""

    net: nn.Module
    trainer: PretrainTrainer
    watch: Watch
    report: Report | None
    regime: Regime | None
    found: dict[str, Any] = field(default_factory=dict)  # what the regime's finish_ returned
    warnings: list[str] = field(default_factory=list)

    def finish_(self) -> nn.Module:
        """The trained model as it is written: its regime ended, nothing of the training around it."""
        # Accelerate keeps mixed precision around the forward pass.
        self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped, keep_fp32_wrapper=False)
        self.net.config.use_cache = True  # type: ignore[union-attr]  # the Trainer turns it off
        if self.regime is not None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.found = dict(self.regime.finish_())
            self.warnings += sorted({str(item.message) for item in caught})
        return self.net.eval()


def start(
    run: Run,
    chosen: Training,
    settings: Settings,
    config: Any,
    facts: dict[str, Any],
    plan: Plan,
    tell: Progress,
    say: Callable[[str], None],
) -> Started:
    net = build(config, settings.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report, regime = chosen.start_(net, settings.steps)
    watch = Watch(tell, say, settings.per_layer)
    callbacks: list[Any] = [RegimeCallback(regime, finish=False)] if regime else []
    callbacks += [StepInBackwardCallback()] if settings.per_layer else []
    watch.trainer = trainer = PretrainTrainer(
        net,
        arguments(run.folder, settings),
        train_dataset=Packed(run.data, facts, settings.windows, settings.seed),
        data_collator=collate,
        callbacks=[*callbacks, watch],
        windows=validation_windows(run.data, facts, plan.most_validation),
    )
    said = sorted({str(item.message) for item in caught})
    return Started(net, trainer, watch, report, regime, warnings=said)
