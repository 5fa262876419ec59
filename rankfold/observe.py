"""One pass over calibration data: forward hooks, backward hooks, and nothing kept but sums.

    second    E[x xᵀ] (in, in), or token frequencies (vocabulary,) for an embedding; one tensor for layers
              that share an input
    gradient  E[g gᵀ] (out, out) over rows;  energy  E‖g‖²/out
    fisher    Σ_in and Σ_out of the mean over examples of (dL/dW)²

Products are formed in float32 blocks and summed in float64; padding is excluded. Weights need no gradient:
the graph starts at the first selected layer, so a backward pass costs one more forward, not two.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.batches import Batch, as_batches, call, count_examples, count_tokens, differentiate, one_example
from rankfold.layers import Layer
from rankfold.sums import Observation, Sums


def observe(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Batch] | None,
    *,
    input: str | None = None,
    gradient: str | None = None,
    fisher: bool = False,
    labels: str = "sampled",
    seed: int = 0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Observation:
    """Run the model over `batches` in eval mode and sum what is asked: input "gram" | "absolute", gradient
    "scalar" | "matrix", fisher.

    A batch is a mapping of keyword arguments, a tensor, or (inputs, labels); an int tensor (sequences,
    length) given as `batches` is cut into batches of four. `labels` "sampled" draws y ~ p from the model's
    own output; "data" takes the batch's labels, which for a causal language model are its own tokens, shifted
    once. Mode, gradients and requires_grad are restored.

    Raises ValueError when there is no data, the model has no logits to differentiate, or a sum is not finite.
    """
    seen, sums = Observation(calls=dict.fromkeys(layers, 0)), Sums(layers, input, gradient, fisher)
    stream, total = as_batches(model, batches)
    backward = gradient is not None or fisher
    generator = torch.Generator().manual_seed(seed)
    with _quiet(model):
        first = next(stream, None)
        if first is None:
            raise ValueError("calibration needs data, but batches is empty")
        leaders = _leaders(model, layers, first) if input == "gram" else {name: name for name in layers}
        for done, batch in enumerate(itertools.chain([first], stream)):
            if progress:
                progress("calibrate", done, total)
            tokens, masks = count_tokens(batch)
            seen.tokens += tokens
            with _hooked(model, layers, sums, leaders, seen.calls, masks, backward, count_examples(batch)):
                with torch.set_grad_enabled(backward):
                    output = call(model, batch)
                    if backward:
                        differentiate(model, output, batch, labels, generator)
            if done == 0:
                sums.check()
    if progress and total:
        progress("calibrate", total, total)
    sums.check()
    sums.normalise(seen, leaders)
    return seen


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode and no weight gradients; everything is put back as it was."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    for parameter in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def _hooked(
    model: nn.Module,
    layers: Mapping[str, Layer],
    sums: Sums,
    leaders: Mapping[str, str],
    calls: dict[str, int],
    masks: Mapping[torch.Size, Tensor],
    backward: bool,
    examples: int,
) -> Iterator[None]:
    pending: dict[str, int] = dict.fromkeys(layers, 0)
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def before(name: str, x: Tensor) -> None:
        calls[name] += 1
        if sums.input and leaders[name] == name:
            with torch.no_grad():
                sums.on_input(name, x.detach(), masks.get(x.shape[: x.dim() - (not layers[name].lookup)]))

    def after(name: str, x: Tensor, y: Tensor) -> Tensor | None:
        if not backward:
            return None
        # The weights need no gradient, so the first layer's output starts the graph; a clone may be changed
        # in place.
        y = y.clone() if y.requires_grad else y.detach().requires_grad_(True).clone()
        pending[name] += 1
        x = x.detach()

        def arrived(g: Tensor) -> None:
            with torch.no_grad():
                if sums.gradient:
                    sums.on_gradient(name, x, g, masks.get(g.shape[:-1]))
                if sums.fisher:
                    pairs[name].append((x, g.detach()))
                    pending[name] -= 1
                    if not pending[name]:
                        sums.on_example(name, pairs[name], examples)
                        pairs[name] = []

        y.register_hook(arrived)
        return y

    handles = []
    for name, layer in layers.items():
        ahead = lambda m, args, kwargs, name=name: before(name, _input(args, kwargs))  # noqa: E731
        behind = lambda m, args, kwargs, y, name=name: after(name, _input(args, kwargs), y)  # noqa: E731
        handles.append(layer.module.register_forward_pre_hook(ahead, with_kwargs=True))
        handles.append(layer.module.register_forward_hook(behind, with_kwargs=True))
    try:
        yield
        for name, held in pairs.items():
            if held:  # a call that the loss ignores has no gradient, and kept the others waiting
                sums.on_example(name, held, examples)
    finally:
        for handle in handles:
            handle.remove()


def _leaders(model: nn.Module, layers: Mapping[str, Layer], batch: Batch) -> dict[str, str]:
    """{layer: the first layer that is always called on the very same tensors}, found by running one
    example."""
    alive: dict[int, tuple[weakref.ref[Tensor], int]] = {}
    calls: dict[str, list[int]] = {name: [] for name in layers}
    serials = itertools.count()

    def serial(name: str, x: Tensor) -> None:
        known = alive.get(id(x))
        if known is None or known[0]() is not x:
            alive[id(x)] = known = (weakref.ref(x), next(serials))
        calls[name].append(known[1])

    hook = [
        layer.module.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: serial(name, _input(args, kwargs)), with_kwargs=True
        )
        for name, layer in layers.items()
        if layer.host == "Linear"
    ]
    try:
        with torch.no_grad():
            call(model, one_example(batch))
    finally:
        for handle in hook:
            handle.remove()
    first: dict[tuple[int, ...], str] = {}
    return {name: first.setdefault(tuple(calls[name]), name) if calls[name] else name for name in layers}


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))
