"""Optimizers and what they hold: one made before the structure existed trains tensors that are gone.

Nothing fails then: the loss stays flat, and a night is lost. So whoever replaces parameters that are to be
trained asks here first, and whoever is handed an optimizer checks it against the model.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer


def check_unheld(parameters: Mapping[str, Tensor], act: str) -> None:
    """Raise ValueError where a live optimizer of this process holds one of `parameters` {name: tensor}, which
    `act` is about to replace."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for thing in gc.get_objects():
        if not issubclass(type(thing), Optimizer):  # not isinstance: it would wake lazy proxies
            continue
        held = [names[id(p)] for group in thing.param_groups for p in group["params"] if id(p) in names]
        if held:
            raise ValueError(
                f"{act} replaces {len(names)} parameters, and a {type(thing).__name__} made earlier holds "
                f"{len(held)} of them ({held[0]!r}, …): it would go on training tensors that are no longer "
                "in the model. Make the optimizer afterwards, and delete the old one"
            )


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise ValueError where a parameter of `model` that trains is not among those of `optimizer`."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        total = sum(p.requires_grad for p in model.parameters())
        raise ValueError(
            f"the optimizer does not hold {len(missing)} of the model's {total} parameters that train "
            f"({missing[0]!r}, …): was it made before the model was factorized? Make it afterwards"
        )
