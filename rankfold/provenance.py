"""What a number was measured on: hashes of weights, and the versions of everything that takes part."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

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
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
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
