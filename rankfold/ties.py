"""Which tensors of a model are one under two names, told to transformers: it saves such a tensor once, and
makes the names one again when it loads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from rankfold.hosts import hosts


def retie_(model: nn.Module) -> None:
    """Tell transformers which factors are one tensor under two names, in place of the dense weights it
    knew; its models inside the model too, each of which can be saved alone."""
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys"):
            _retie_(module)


def _retie_(model: nn.Module) -> None:
    keys = getattr(model, "_tied_weights_keys", None) or {}
    if not isinstance(keys, Mapping):
        return
    held = hosts(model)
    gone = {f"{name}.weight" for name in held}
    kept = {to: source for to, source in keys.items() if to not in gone and source not in gone}
    ours = shared_keys(model)
    # What an earlier call wrote is no longer so where a layer has become dense, or its tensors its own.
    inside = tuple(f"{name}.weight." for name in held)
    kept = {to: source for to, source in kept.items() if not to.startswith(inside)}
    if ours or len(kept) != len(keys):
        model._tied_weights_keys = {**kept, **ours}  # type: ignore[assignment]
        refresh_(model, ours)


def shared_keys(model: nn.Module) -> dict[str, str]:
    """{key: the first key of that tensor} for the tensors that structures hold under several keys."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, host in hosts(model).items():
        for key, tensor in host.weight.state_dict(prefix=f"{name}.weight.", keep_vars=True).items():
            source = first.setdefault(id(tensor), key)
            if source != key:
                found[key] = source
    return found


def refresh_(model: nn.Module, ours: Mapping[str, str] | None = None) -> None:
    """transformers' own ties, which depend on its config, and ours, which do not."""
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    if expand is not None:
        model.all_tied_weights_keys = {**expand(all_submodels=False), **(ours or {})}  # type: ignore[assignment]
