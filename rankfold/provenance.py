"""What a number was measured on: hashes of weights, and the versions of everything that takes part."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

PACKAGES = (
    "rankfold",
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "accelerate",
    "datasets",
    "peft",
)


def weights_hash(model: nn.Module) -> str:
    """A BLAKE2b digest (hex, 32 digits) of every tensor of the state dict with its name, shape and dtype."""
    return tensors_hash(model.state_dict())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """The same of any named tensors, in the order of their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """{package: version} of what is installed, and Python's."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = f"{torch.version.cuda} on {torch.cuda.get_device_name()}"
    return found
