"""Batch norm after its inputs changed: collect the running statistics anew from data.

    mean, var  <-  (1/B) Σ_b  mean, var of batch b          over one pass of B batches, no gradient

Factorizing or cutting a layer shifts what the batch norms after it see, while their running statistics stay
those of the old network. That alone can cost tens of points of accuracy, so no comparison of compressed
networks with batch norm is fair before this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankfold.batches import Batch, as_batches, call

CHUNK = 128  # examples a batch, of a tensor given whole


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[Batch] | Tensor) -> int:
    """Replace the running statistics of every batch norm of `model` by those of one pass over `batches`, in
    place. Returns how many batch norms got new ones; 0, with the model unchanged, where there are none.

    batches  as for `factorize_`: mappings of arguments, tensors, or pairs (inputs, labels). A tensor
             (examples, ...) is cut into equal batches of about 128.

    The average is cumulative: each batch counts the same, whatever its size, and as in training the variance
    is that inside a batch. So another split of the same data gives slightly other numbers: use batches of
    equal size, as large as those of training. All other modules are in eval mode meanwhile (no dropout).
    Modes and momenta are put back, also after an error, and then the statistics too. A batch norm without
    running statistics, or that never ran, stays as it is.

    Raises ValueError where there are no batches, or where they give statistics that are not finite.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    if not norms:
        return 0
    if isinstance(batches, Tensor):
        batches = batches.tensor_split(max(1, math.ceil(len(batches) / CHUNK))) if len(batches) else []
    drawn, _ = as_batches(model, batches)
    first = next(drawn, None)
    if first is None:
        raise ValueError(
            f"recalibrate_ collects the statistics of {len(norms)} batch norms from data, but got 0 batches; "
            "pass some batches of training data"
        )
    with _collecting(model, list(norms.values())) as before:
        for batch in chain([first], drawn):
            call(model, batch)
        for name, norm in norms.items():
            assert norm.running_mean is not None and norm.running_var is not None
            if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
                raise ValueError(
                    f"batch norm {name!r}: its inputs on these batches hold NaN or infinity, or overflow; "
                    "check the data and the weights before it"
                )
        idle = [norm for norm in norms.values() if not norm.num_batches_tracked]
        for norm in idle:
            norm.load_state_dict(before[norm], strict=False)
    return len(norms) - len(idle)


@contextmanager
def _collecting(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[dict[_BatchNorm, dict[str, Tensor]]]:
    """Batch norms reset, averaging and in train mode, all else in eval mode; afterwards modes and momenta as
    they were, and after an error the statistics too. Gives the statistics of before."""
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    before = {norm: {name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms}
    try:
        for module in modes:
            module.training = module in before  # not train(): some models override it to freeze parts
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch: the cumulative average
        yield before
    except BaseException:
        for norm, state in before.items():
            norm.load_state_dict(state, strict=False)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
