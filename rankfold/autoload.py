"""Lets plain `transformers` load a rankfold folder with no import of ours.

torch loads the entry points of group `torch.backends` at the end of `import torch`; ours calls `install`,
which costs microseconds and imports nothing. When transformers later asks a registry for one of our names,
the module that owns the name is imported and registers itself: `rankfold.hf` for factorized weights, without
which transformers only warns about an unknown quantizer and returns random weights, and `rankfold.models`.

Never raises: an error here would break `import torch`. Off with RANKFOLD_AUTOLOAD=0 (or
TORCH_DEVICE_BACKEND_AUTOLOAD=0): then import `rankfold.hf` and `rankfold.models` before loading.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Iterable
from typing import Any

REGISTRY = "transformers.quantizers.auto"
TABLES = ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING")
CONFIGS = "transformers.models.auto.configuration_auto"
MODEL_TYPES = ("rankfold_gru", "rankfold_transformer", "rankfold_classifier")


def install() -> None:
    """Make the registries of transformers know our names, now or when they are imported. Idempotent; never
    raises."""
    try:
        if os.environ.get("RANKFOLD_AUTOLOAD") == "0":
            return
        for name in (REGISTRY, CONFIGS):
            if name in sys.modules:
                _extend(sys.modules[name])
            elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
                sys.meta_path.insert(0, _Finder(name))
    except Exception:
        pass


class _Lazy(dict[str, Any]):
    """A registry that imports `owner`, which fills in the entries, the first time it is asked for one of
    `names`."""

    def __init__(self, table: dict[str, Any], owner: str, names: Iterable[str]) -> None:
        super().__init__(table)
        self.owner, self.names = owner, frozenset(names)

    def __contains__(self, key: object) -> bool:
        if key in self.names and not dict.__contains__(self, key):
            importlib.import_module(self.owner)
        return dict.__contains__(self, key)

    def __missing__(self, key: str) -> Any:
        if key in self:
            return dict.__getitem__(self, key)
        raise KeyError(key)


def _extend(module: Any) -> None:
    """Put lazy registries into a module of transformers that has been executed."""
    if module.__name__ == REGISTRY:
        for name in TABLES:
            table = getattr(module, name, None)
            if isinstance(table, dict) and not isinstance(table, _Lazy):
                setattr(module, name, _Lazy(table, "rankfold.hf", ["rankfold"]))
        return
    # What third parties register there: model types, and the classes of their configs.
    mapping = module.CONFIG_MAPPING
    if isinstance(mapping._extra_content, dict) and not isinstance(mapping._extra_content, _Lazy):
        mapping._extra_content = _Lazy(mapping._extra_content, "rankfold.models", MODEL_TYPES)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module `name`, once, by asking the other finders, and extends its registry when it has been
    executed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
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
