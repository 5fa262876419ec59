"""Layers: the dense layers of a model seen as matrices, and how they are found and replaced.

Layer    a dense layer seen as a matrix W (out, in): its rows of inputs, its rows of output gradients
select   {name: Layer} by module type and name glob: no architecture is known by name
replace_ puts a host where the layer was;  left_dense  says what stays dense, and why
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.hosts import GEOMETRY, Conv2d, Embedding, Host, Linear, hosts, is_conv1d, pad
from rankfold.structure import Structure


@dataclass(frozen=True)
class Layer:
    """A dense layer seen as a matrix. `spatial` chooses the second reading of a convolution."""

    module: nn.Module
    spatial: bool = False

    @property
    def lookup(self) -> bool:
        """True where the input is a row index: the inputs are one-hot rows on the *out* side of W
        (vocabulary, dim)."""
        return isinstance(self.module, nn.Embedding)

    @property
    def host(self) -> str:
        return "Embedding" if self.lookup else "Conv2d" if isinstance(self.module, nn.Conv2d) else "Linear"

    @property
    def held(self) -> Structure | None:
        """The structure that the layer holds already; None for a dense one."""
        return None

    @property
    def owner(self) -> object:
        """What layers with one and the same matrix have in common: a parameter, or a structure."""
        return self.tensor

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the matrix."""
        return [self.tensor]

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter that holds the matrix, in the layer's own layout."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def matrix(self) -> Tensor:
        """The weight as W (out, in), detached, in its own dtype."""
        return self.read(self.tensor.detach())

    def read(self, weight: Tensor) -> Tensor:
        """A tensor in the layer's own layout as a matrix (out, in)."""
        if isinstance(self.module, nn.Conv2d):
            return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1) if self.spatial else weight.flatten(1)
        return weight.mT if is_conv1d(self.module) else weight

    def laid(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the layer's own layout: the inverse of `read`."""
        if isinstance(self.module, nn.Conv2d):
            out, inner, kh, kw = self.tensor.shape
            if self.spatial:
                return matrix.reshape(out, kw, inner, kh).permute(0, 2, 3, 1)
            return matrix.reshape(out, inner, kh, kw)
        return matrix.mT if is_conv1d(self.module) else matrix

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix().shape
        return rows, columns

    def inputs(self, x: Tensor) -> Tensor:
        """The rows that W multiplies: (examples, rows, in), or (rows, in) for an input of one dimension
        less."""
        module: Any = self.module
        if self.host == "Conv2d":
            kh, kw = module.kernel_size
            (sh, sw), (dh, dw) = module.stride, module.dilation
            x = pad(x, {key: getattr(module, key) for key in GEOMETRY})
            kernel, stride, dilation = (
                ((kh, 1), (sh, 1), (dh, 1)) if self.spatial else ((kh, kw), (sh, sw), (dh, dw))
            )
            return F.unfold(x, kernel, dilation=dilation, stride=stride).mT
        return x

    def outputs(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient of the rows W produced, aligned with `inputs(x)`: (examples, rows, out)."""
        module: Any = self.module
        if self.host != "Conv2d":
            return gradient
        if not self.spatial:
            return gradient.flatten(2).mT
        (_, kw), (_, sw), (_, dw) = module.kernel_size, module.stride, module.dilation
        padded = pad(x[:1, :1], {key: getattr(module, key) for key in GEOMETRY}).shape[-1]
        n, out, height, width = gradient.shape
        z = gradient.new_zeros(n, out, kw, height, padded)
        for j in range(kw):
            z[:, :, j, :, j * dw : j * dw + (width - 1) * sw + 1 : sw] = gradient
        return z.flatten(1, 2).flatten(2).mT

    def join(self, structure: Structure) -> Structure:
        """What stands for W once a method has made `structure` of it."""
        return structure

    def wrap(self, structure: Structure) -> Host:
        """The host that does this layer's work with `structure`; bias and mode are carried over."""
        if structure.shape != self.shape:
            raise ValueError(
                f"a structure of shape {structure.shape} cannot replace a matrix of shape {self.shape}"
            )
        module = self.module
        if isinstance(module, nn.Embedding):
            host: Host = Embedding(structure, module.padding_idx)
        elif isinstance(module, nn.Conv2d):
            assert module.bias is None or isinstance(module.bias, nn.Parameter)
            host = Conv2d(structure, module.bias, vars(module))
        else:
            bias = module.bias
            assert bias is None or isinstance(bias, nn.Parameter)
            host = Linear(structure, bias, transposed=is_conv1d(module))
        return host.train(module.training)


def why_not(module: nn.Module) -> str | None:
    """Why this module cannot be a `Layer`, or None if it can. Exact types only: a subclass may read its
    weight in its own way (`nn.MultiheadAttention` reads `out_proj.weight` without ever calling
    `out_proj`)."""
    if type(module) is nn.Embedding:
        return "the embedding renormalises its rows (max_norm)" if module.max_norm is not None else None
    if type(module) is nn.Conv2d:
        return f"grouped convolution ({module.groups} groups)" if module.groups != 1 else None
    if type(module) is nn.Linear or is_conv1d(module):
        return None
    return f"{type(module).__name__} is not nn.Linear, Conv1D, nn.Conv2d or nn.Embedding"


def select(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    *,
    conv: str = "channel",
    more: Mapping[str, Layer] | None = None,
) -> dict[str, Layer]:
    """The layers to factorize, by name. `targets` and `skip` are globs over dotted names.

    Without targets: every linear and convolution, except embeddings and heads (whatever lies outside a
    transformers model's base model, and whatever shares its parameter with an embedding). With targets:
    exactly what they match. Layers that share one parameter are all returned; `factorize_` fits them once.
    `conv` is "channel" or "spatial" (see `Conv2d`); `more` are layers that are not dense, to choose from too.

    Raises ValueError for a glob that matches no layer (with the nearest names), and where the model itself is
    the layer.
    """
    if conv not in ("channel", "spatial"):
        raise ValueError(f"conv={conv!r} is not a reading of a convolution; choose 'channel' or 'spatial'")
    if why_not(model) is None:
        raise ValueError(
            "the model is itself a single layer, which cannot be replaced in place; wrap it: "
            "nn.Sequential(layer)"
        )
    if isinstance(targets, str) or isinstance(skip, str):
        raise ValueError("targets and skip are lists of globs, e.g. targets=['*.q_proj']")
    inner = {id(m) for host in hosts(model).values() for m in host.modules()}
    able = {
        name: Layer(module, conv == "spatial")
        for name, module in model.named_modules()
        if why_not(module) is None and id(module) not in inner
    } | dict(more or {})
    refused = {n: r for n, m in model.named_modules() if _has_matrix(m) and (r := why_not(m)) is not None}
    for pattern in (*(targets or ()), *skip):
        if not any(fnmatchcase(name, pattern) for name in able):
            raise ValueError(_no_match(pattern, able, refused))
    if targets is None:
        heads = excluded(model)
        chosen = {name: layer for name, layer in able.items() if name not in heads}
    else:
        chosen = {name: layer for name, layer in able.items() if any(fnmatchcase(name, p) for p in targets)}
    chosen = {name: layer for name, layer in chosen.items() if not any(fnmatchcase(name, p) for p in skip)}
    if not chosen:
        raise ValueError(
            "no layer is left to factorize; the model has " + (_some(able) if able else "no linear layer")
        )
    return chosen


def excluded(model: nn.Module) -> dict[str, str]:
    """{name: reason} of the layers that `select` passes over unless they are named: embeddings and heads."""
    modules = dict(model.named_modules())
    tables = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding | Embedding)}
    base = getattr(model, "base_model", model)
    inside = {id(m) for m in base.modules()} if isinstance(base, nn.Module) else set()
    reasons = {}
    for name, module in modules.items():
        layer = why_not(module) is None or isinstance(module, Host)
        if isinstance(module, nn.Embedding | Embedding):
            reasons[name] = "embedding"
        elif layer and id(module.weight) in tables:
            reasons[name] = "shares its weight with an embedding"
        elif layer and id(module) not in inside:
            reasons[name] = "head"
    return reasons


def left_dense(model: nn.Module, chosen: Mapping[str, Layer]) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Every parameter of two or more dimensions that `chosen` does not hold, with the reason: nothing stays
    dense silently."""
    reasons, modules = excluded(model), dict(model.named_modules())
    taken = {id(parameter) for layer in chosen.values() for parameter in layer.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in taken:
            continue
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        why = why_not(module) if leaf == "weight" else None
        if leaf == "weight" and why is None:
            reason = reasons.get(owner, "not among the targets")
        elif why is not None:
            reason = why
        elif parameter.dim() == 3 and min(parameter.shape) > 1:
            reason = f"a stack of {len(parameter)} matrices (experts) in {type(module).__name__}, not a layer"
        else:
            reason = f"a bare parameter of {type(module).__name__}, not a layer"
        yield name, parameter, reason


def replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is, under every name by which the model holds that same object."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, child_name, module)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device: nothing is allocated, and `model` is not touched."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    return copy.deepcopy(model, memo)


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() >= 2


def _no_match(pattern: str, able: Mapping[str, Layer], refused: Mapping[str, str]) -> str:
    blocked = [f"{name} ({reason})" for name, reason in refused.items() if fnmatchcase(name, pattern)]
    if blocked:
        return f"{pattern!r} matches only layers that cannot be factorized: {', '.join(blocked[:3])}"
    tails = sorted({"*." + name.rpartition(".")[2] if "." in name else name for name in able})
    close = difflib.get_close_matches(pattern, [*tails, *able], n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"No layer matches {pattern!r}.{hint} Layers are e.g. {_some(able)}"


def _some(able: Mapping[str, Layer]) -> str:
    names = list(able)
    return f"{names[:4]} and {len(names) - 4} more" if len(names) > 4 else f"{names}"
