"""Which layers of a model carry an adapter: hosts of a Sum whose first term is frozen.

W = base + adapter₁ + …        the base is any structure: Dense, or what a compressed layer holds
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from rankfold.hosts import Host, hosts
from rankfold.manifest import recipe_of
from rankfold.structure import Structure
from rankfold.structures import Sum
from rankfold.token_layer import own_parameters, token_layers


def adapted(model: nn.Module) -> dict[str, Host]:
    """{name: host} of the layers with adapters that are matrices. Raises ValueError where there is none."""
    found = {name: host for name, host in hosts(model).items() if is_adapted(host.weight)}
    if not found and getattr(model, "peft_config", None):
        raise ValueError(
            f"{type(model).__name__} has adapters of PEFT: use its save_pretrained, or make WaRA's ours with "
            "rankfold.peft.as_rankfold"
        )
    if not found and (tokens := next(iter(token_layers(model)), None)):
        raise ValueError(
            f"layer {tokens!r} is a TokenWara, which changes activations and is no matrix: it cannot be "
            "merged, and is no LoRA. rankfold.save and save_adapter keep it as it is"
        )
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapters: put some on first, e.g. with recipes.lora")
    return found


def is_adapted(structure: object) -> bool:
    """Is it a frozen base with adapters?"""
    return isinstance(structure, Sum) and structure.frozen


def matrices(model: nn.Module) -> dict[str, Host]:
    """The same as `adapted`, or nothing where all adapters of the model are TokenWaras."""
    found = any(is_adapted(host.weight) for host in hosts(model).values())
    return {} if not found and token_layers(model) else adapted(model)


def parts(host: Host) -> tuple[Structure, list[Structure]]:
    """(base, adapters) of an adapted layer."""
    assert isinstance(host.weight, Sum)
    return host.weight.base, host.weight.added


def bases(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """{layer: {name: parameter}} of the weights under adapters, TokenWaras included; not their biases."""
    found = {name: dict(parts(host)[0].named_parameters()) for name, host in matrices(model).items()}
    for name, layer in token_layers(model).items():
        if f"{name}.host" not in found:
            found[name] = {key: p for key, p in layer.host.named_parameters() if key != "bias"}
    return found


def added(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters. Raises ValueError where there is none."""
    terms = [term for host in matrices(model).values() for term in parts(host)[1]]
    tokens = [p for layer in token_layers(model).values() for p in own_parameters(layer)]
    return [*(p for term in terms for p in term.parameters()), *tokens]


def taken(model: nn.Module) -> str | None:
    """The first layer whose adapter was taken out of its weight (PiSSA), so that the base under it is not the
    one that the model had; None where there is none."""
    method = (recipe_of(model) or {}).get("method")
    everywhere = isinstance(method, Mapping) and method.get("kind") == "pissa"
    for name, host in matrices(model).items():
        if everywhere or any(getattr(term, "taken", False) for term in parts(host)[1]):
            return name
    return None


def kept(model: nn.Module) -> list[str]:
    """The parameters that train and belong to no adapter: a head, norms, biases. Raises ValueError where the
    base of an adapter trains, for then it is no base any more."""
    for name, base in bases(model).items():
        loose = next((key for key, p in base.items() if p.requires_grad), None)
        if loose is not None:
            raise ValueError(
                f"layer {name!r}: the base under its adapter trains ({loose}), and an adapter belongs to a "
                "frozen base; freeze it with rankfold.adapters.freeze_(model)"
            )
    inside = {id(p) for p in added(model)}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
