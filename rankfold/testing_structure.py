"""The laws of structures and hosts. Public through `rankfold.testing`."""

from __future__ import annotations

import copy
import json
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from rankfold.hosts import Host
from rankfold.layers import Layer
from rankfold.structure import Structure, build
from rankfold.structures import Dense, LowRank, Sum

TOLERANCE = 1e-9  # of the largest entry: float64 arithmetic in another order
HALF = {torch.bfloat16: 0.04, torch.float16: 0.006}  # relative, in norm: a few roundings of 8 and 11 bits


def check_structure(structure: Structure, *, compile: bool = False, seed: int = 0) -> None:
    """A structure is its spec plus its state dict, and applies the matrix that `to_dense` shows.

    `structure` may have any dtype and is not changed. `compile` also traces `forward` without graph
    breaks, which is slow.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        name = f"{type(structure).__name__}({structure.extra_repr()})"
        double = copy.deepcopy(structure).double()
        _check_product(double, name)
        _check_state(structure, name)
        _check_hostile_specs(structure, name)
        for dtype, tolerance in HALF.items():
            half = copy.deepcopy(structure).to(dtype)
            require(half.dtype == dtype, f"{name}: after .to({dtype}) its dtype is {half.dtype}")
            x = torch.randn(3, structure.shape[1], dtype=dtype)
            with torch.no_grad():
                y, scale = half(x), float((x.double().abs() @ dense64(half).abs().mT).norm())
                distance = float((y.double() - x.double() @ dense64(half).mT).norm())
            require(y.dtype == dtype, f"{name}: forward of {dtype} gives {y.dtype}")
            require(
                distance <= tolerance * scale + 1e-6,
                f"{name}: forward in {dtype} is off by {distance:.3g} of {scale:.3g}",
            )
        if compile:
            torch._dynamo.reset()
            traced = torch.compile(double, fullgraph=True, backend="eager")
            x = torch.randn(2, 3, double.shape[1], dtype=torch.float64)
            close(traced(x), double(x), f"{name}: the compiled forward differs from the eager one")


def _check_product(structure: Structure, name: str) -> None:
    """forward, rows, factors and their gradients all speak of one matrix."""
    out, inner = structure.shape
    full = structure.to_dense()
    require(
        tuple(full.shape) == (out, inner),
        f"{name}: to_dense has shape {tuple(full.shape)}, not {(out, inner)}",
    )
    for lead in ((), (4,), (2, 3), (0,)):
        x = torch.randn(*lead, inner, dtype=torch.float64)
        y = structure(x)
        require(
            tuple(y.shape) == (*lead, out), f"{name}: forward of {tuple(x.shape)} has shape {tuple(y.shape)}"
        )
        close(y, x @ full.mT, f"{name}: forward(x) is not x @ to_dense().mT for x {tuple(x.shape)}")
    for index in (torch.tensor(out - 1), torch.randint(out, (5,)), torch.randint(out, (2, 3))):
        close(
            structure.rows(index),
            full[index],
            f"{name}: rows(index) is not to_dense()[index], {tuple(index.shape)}",
        )
    factors = structure.factors()
    if factors is not None:
        product = factors[0]
        for factor in factors[1:]:
            product = product @ factor
        close(product, full, f"{name}: the product of factors() is not to_dense()")
    x = torch.randn(4, inner, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(4, out, dtype=torch.float64)
    leaves = {"x": x, **{key: p for key, p in structure.named_parameters() if p.requires_grad}}
    mine = torch.autograd.grad((structure(x) * probe).sum(), list(leaves.values()))
    true = torch.autograd.grad(((x @ structure.to_dense().mT) * probe).sum(), list(leaves.values()))
    for key, one, two in zip(leaves, mine, true, strict=True):
        close(
            one,
            two,
            f"{name}: the gradient of forward with respect to {key} is not that of x @ to_dense().mT",
        )
    require(
        isinstance(structure.macs, int) and structure.macs > 0,
        f"{name}: macs={structure.macs!r} is not a count",
    )


def _check_state(structure: Structure, name: str) -> None:
    """build(spec) and load_state_dict are the identity, also through JSON and by way of meta; bytes "
    "are real bytes."""
    state = structure.state_dict()
    held = {key: t for key, t in (*structure.named_parameters(), *structure.named_buffers())}
    lost = sorted(set(held) - set(state))
    require(
        not lost, f"{name}: buffers {lost} are not persistent, so a model built on meta would never get them"
    )
    ragged = sorted(key for key, tensor in state.items() if not tensor.is_contiguous())
    require(not ragged, f"{name}: tensors {ragged} are not contiguous")
    try:
        spec = json.loads(json.dumps(structure.spec(), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{name}: its spec {structure.spec()!r} is not JSON: {error}") from error
    again = build(spec, dtype=structure.dtype)
    try:
        again.load_state_dict(state)
    except RuntimeError as error:
        raise AssertionError(f"{name}: its state dict does not fit build({spec}): {error}") from error
    empty = build(spec, dtype=structure.dtype, device="meta")
    material = [key for key, tensor in empty.state_dict().items() if not tensor.is_meta]
    require(not material, f"{name}: built on meta, {material} took memory")
    for what in ("shape", "params", "nbytes", "macs", "dtype"):
        mine, theirs = getattr(structure, what), getattr(empty, what)
        require(mine == theirs, f"{name}: {what} is {mine} but {theirs} for its empty copy on meta")
    empty.load_state_dict(state, assign=True)
    for copied, how in ((again, "build"), (empty, "build on meta")):
        require(type(copied) is type(structure), f"{name}: {how} made a {type(copied).__name__}")
        require(copied.spec() == structure.spec(), f"{name}: after {how} the spec is {copied.spec()}")
        with torch.no_grad():
            same = torch.equal(copied.to_dense(), structure.to_dense())
        require(same, f"{name}: {how} and load_state_dict do not give the same matrix back")
    file = safetensors.torch.save(state)
    payload = len(file) - 8 - int.from_bytes(file[:8], "little")
    require(
        payload == structure.nbytes,
        f"{name}: nbytes={structure.nbytes}, but a file of it holds {payload} bytes",
    )


def _check_hostile_specs(structure: Structure, name: str) -> None:
    """A spec comes from a file: damaged sizes raise ValueError before anything is allocated."""
    spec = structure.spec()
    for key, value in spec.items():
        for bad in (-1, 0, True, 1.5, "2", 2**40, None):
            hostile: list[Any] = []
            if type(value) is int:
                hostile = [bad]
            elif isinstance(value, list) and all(type(v) is int for v in value):
                hostile = [[*value[:i], bad, *value[i + 1 :]] for i in range(len(value))]
            for entry in hostile:
                try:
                    build({**spec, key: entry}, device="meta")
                except ValueError:
                    continue
                except Exception as error:
                    raise AssertionError(
                        f"{name}: {key}={entry!r} raises {type(error).__name__}, not ValueError"
                    ) from error
                raise AssertionError(f"{name}: a spec with {key}={entry!r} was accepted")


def check_host(
    module: nn.Module, x: Tensor, *, spatial: bool = False, structure: Structure | None = None
) -> None:
    """A host does what the dense layer with the reconstructed weight does: output, bias, gradient and mode.

    `module` is a dense layer, `x` an input of it; `structure` one more structure to try, of the layer's
    matrix shape.
    """
    layer = Layer(copy.deepcopy(module).double(), spatial)
    x = x.double() if x.is_floating_point() else x
    thin = LowRank(layer.shape, rank=max(1, min(layer.shape) // 2), dtype=torch.float64)
    parts = Sum.of(LowRank(layer.shape, rank=1, dtype=torch.float64), Dense(layer.shape, dtype=torch.float64))
    own = [] if structure is None else [copy.deepcopy(structure).double()]
    for held in (Dense.of(layer.matrix()), thin, parts, *own):
        host: Host = layer.wrap(held)
        where = f"{type(module).__name__} {layer.shape} holding {type(held).__name__}"
        dense = host.to_dense()
        require(host.training == module.training, f"{where}: the mode was not carried over")
        close(host(x), dense(x), f"{where}: the output is not that of the dense layer it stands for")
        if not own and isinstance(held, Dense):
            close(host(x), layer.module(x), f"{where}: the output is not the original layer's")
        if x.is_floating_point():
            slopes = []
            for each in (host, dense):
                leaf = x.clone().requires_grad_(True)
                y = each(leaf)
                slopes.append(torch.autograd.grad(y.square().sum(), leaf)[0])
            close(
                slopes[0],
                slopes[1],
                f"{where}: the gradient with respect to the input is not the dense layer's",
            )


def dense64(structure: Structure) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(structure).double().to_dense()


def close(one: Tensor, two: Tensor, message: str, tolerance: float = TOLERANCE) -> None:
    require(one.shape == two.shape, f"{message}: shapes {tuple(one.shape)} and {tuple(two.shape)}")
    if one.numel():
        distance, scale = float((one - two).detach().abs().max()), float(two.detach().abs().max())
        require(distance <= tolerance * max(scale, 1e-3), f"{message}: off by {distance:.3g} of {scale:.3g}")


def require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
