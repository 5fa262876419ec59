"""What of a compressed model trains while it heals, in which form, and the way back.

Values stored in 14 or 8 bits train as floats, 16-bit floats as float32; both return to the form that they
had. Places, masks and sizes are no parameters: no step moves them, so the bytes stay what they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.hosts import Host, hosts
from rankfold.manifest import recipe_of, stamp_
from rankfold.masters import Master
from rankfold.sparse_code import SparseCode


@dataclass
class Trainable:
    """A compressed model opened for training, in place; `close_` or `restore_` end it.

    names   of the parameters that train, in the model as it is now
    """

    model: nn.Module
    names: list[str]
    _packed: dict[str, SparseCode] = field(default_factory=dict)  # by path, as they were stored
    _dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    _flags: dict[str, bool] = field(default_factory=dict)
    _values: dict[str, Tensor] = field(default_factory=dict)  # in the dtypes they had

    @classmethod
    def open_(cls, model: nn.Module, *, embeddings: bool = False) -> Trainable:
        """Make every parameter of `model` float32 and trainable, and unpack stored values. Dense embeddings
        and a dense head do not train, unless `embeddings`.

        Raises ValueError where no layer is factorized, and naming a layer that is in training by a regime;
        the model is then unchanged.
        """
        check_compressed(model)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        state = cls(
            model,
            [],
            _dtypes={name: t.dtype for name, t in tensors.items() if t.is_floating_point()},
            _flags={name: p.requires_grad for name, p in model.named_parameters()},
        )
        fixed = set() if embeddings else _embeddings(model)
        state._values = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in fixed}
        model.float()
        for path, code in _codes(model):
            if code.storage != "float":
                state._packed[path] = code
        done: dict[int, SparseCode] = {}  # layers that share one structure go on sharing it
        for path, code in state._packed.items():
            _put_(model, path, done.setdefault(id(code), code.with_storage("float")))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(id(parameter) not in fixed)
            if parameter.requires_grad:
                state.names.append(name)
        stamp_(model, recipe_of(model))
        return state

    def parameters(self) -> dict[str, nn.Parameter]:
        known = dict(self.model.named_parameters())
        return {name: known[name] for name in self.names}

    def close_(self) -> None:
        """Store what was trained in the form it had before. The parameters' `requires_grad` are as before."""
        done: dict[int, SparseCode] = {}
        found: list[tuple[str, SparseCode, SparseCode, Tensor, Tensor]] = []
        for path, was in self._packed.items():
            code = self.model.get_submodule(path)
            assert isinstance(code, SparseCode)
            found.append((path, was, code, code.coefficients().detach(), code.index()))
        self._cast_()  # dictionaries first: the scale of int8 values is worked out in the dtype it is kept in
        for path, was, code, values, index in found:
            if id(code) not in done:
                options: dict[str, Any] = {"orient": was.orient, "storage": was.storage}
                done[id(code)] = SparseCode.of(code.dictionary, values, index, **options)
            _put_(self.model, path, done[id(code)])
        self._end_()

    @torch.no_grad()
    def restore_(self) -> None:
        """Put back every tensor as it was, bit for bit."""
        for path, was in self._packed.items():
            _put_(self.model, path, was)
        self._cast_()
        for was in self._packed.values():
            was.validate()  # what it derived from its tensors in float32 is stale
        known = dict(self.model.named_parameters())
        for name, value in self._values.items():
            known[name].copy_(value)
        self._end_()

    def _cast_(self) -> None:
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if name in self._dtypes:
                tensor.data = tensor.data.to(self._dtypes[name])

    def _end_(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(self._flags.get(name, True))
        stamp_(self.model, recipe_of(self.model))


def check_compressed(model: nn.Module) -> None:
    """Raise ValueError where there is nothing to heal, for PEFT's adapters, and for a layer in training."""
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"{type(model).__name__} has adapters on it: fold them in with merge_and_unload() first"
        )
    held = hosts(model)
    if not held:
        raise ValueError(
            f"{type(model).__name__} has no factorized layer: healing recovers what a compression lost, so "
            "compress the model first"
        )
    for name, host in held.items():
        if any(isinstance(part, Master) for part in host.weight.modules()):
            raise ValueError(f"layer {name!r} is in training by a regime: call its finish_() first")


def nbytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint of the model holds; a shared one counts once."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _embeddings(model: nn.Module) -> set[int]:
    found: set[int] = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, name, lambda: None)()
        if isinstance(module, nn.Module) and not isinstance(module, Host):
            found |= {id(parameter) for parameter in module.parameters()}
    return found


def _codes(model: nn.Module) -> Iterator[tuple[str, SparseCode]]:
    """Every path to a sparse code, also the second one to a structure that is shared."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseCode):
            yield path, module


def _put_(model: nn.Module, path: str, structure: SparseCode) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = structure
