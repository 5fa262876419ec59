"""Lets plain `transformers` load a rankfold folder with no import of ours.

torch loads the entry points of group `torch.backends` at the end of `import torch`; ours calls `install`,
which costs microseconds and imports nothing. When transformers later asks its registry for "rankfold",
`rankfold.hf` is imported and registers itself. Without it, transformers only warns about an unknown quantizer
and returns random weights.

Never raises: an error here would break `import torch`. Off with RANKFOLD_AUTOLOAD=0 (or
TORCH_DEVICE_BACKEND_AUTOLOAD=0): then `import rankfold.hf` before loading.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import sys
from typing import Any

REGISTRY = "transformers.quantizers.auto"
TABLES = ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING")


def install() -> None:
    """Make the registry of transformers know "rankfold", now or when it is imported. Idempotent; never
    raises."""
    try:
        if os.environ.get("RANKFOLD_AUTOLOAD") == "0":
            return
        if REGISTRY in sys.modules:
            _extend(sys.modules[REGISTRY])
        elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception:
        pass


class _Lazy(dict[str, Any]):
    """A registry that imports `rankfold.hf`, which fills in the entry, the first time it is asked for
    "rankfold"."""

    def __contains__(self, key: object) -> bool:
        if key == "rankfold" and not dict.__contains__(self, key):
            importlib.import_module("rankfold.hf")
        return dict.__contains__(self, key)

    def __missing__(self, key: str) -> Any:
        if key in self:
            return dict.__getitem__(self, key)
        raise KeyError(key)


def _extend(module: Any) -> None:
    for name in TABLES:
        table = getattr(module, name, None)
        if isinstance(table, dict) and not isinstance(table, _Lazy):
            setattr(module, name, _Lazy(table))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, once, by asking the other finders, and extends its registry when it has been
    executed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != REGISTRY:
            return None
        try:
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(fullname)
            if spec is None or spec.loader is None:
                return None
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                try:
                    _extend(module)
                except Exception:
                    pass

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec
        except Exception:
            return None
