"""Lets plain `transformers` and PEFT load a rankfold folder with no import of ours.

torch loads the entry points of group `torch.backends` at the end of `import torch`; ours calls `install`,
which costs microseconds and imports nothing. When they later ask a registry for one of our names, the module
that owns the name is imported and registers itself: `rankfold.hf` for factorized weights, without which
transformers only warns about an unknown quantizer and returns random weights, `rankfold.models`,
`rankfold.hoi.model`, and `rankfold.peft`.

Never raises: an error here would break `import torch`. Off with RANKFOLD_AUTOLOAD=0 (or
TORCH_DEVICE_BACKEND_AUTOLOAD=0): then import `rankfold.hf`, `rankfold.models` or `rankfold.peft` before
loading.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import Any, cast

REGISTRY = "transformers.quantizers.auto"
TABLES = ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING")
CONFIGS = "transformers.models.auto.configuration_auto"
OWNERS = {
    "rankfold_gru": "rankfold.models",
    "rankfold_transformer": "rankfold.models",
    "rankfold_classifier": "rankfold.models",
    "rankfold_hola": "rankfold.hoi.model",
}
MODEL_TYPES = tuple(OWNERS)
ADAPTERS = "peft.mapping"
ADAPTER_TABLE = "PEFT_TYPE_TO_CONFIG_MAPPING"


def install() -> None:
    """Make the registries of transformers and PEFT know our names, now or when they are imported. Idempotent;
    never raises."""
    try:
        if os.environ.get("RANKFOLD_AUTOLOAD") == "0":
            return
        for name in (REGISTRY, CONFIGS, ADAPTERS):
            if name in sys.modules:
                # Not PEFT's, once it is there: other modules of PEFT hold that very table.
                if name != ADAPTERS:
                    _extend(sys.modules[name])
            elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
                sys.meta_path.insert(0, _Finder(name))
    except Exception:
        pass


class _Lazy(dict[str, Any]):
    """A registry that imports the module that owns a name, which fills in the entry, the first time it is
    asked for one of the names in `owners`."""

    def __init__(self, table: dict[str, Any], owners: Mapping[str, str]) -> None:
        super().__init__(table)
        self.owners = owners

    def __contains__(self, key: object) -> bool:
        if key in self.owners and not dict.__contains__(self, key):
            importlib.import_module(self.owners[cast(str, key)])
        return dict.__contains__(self, key)

    def __missing__(self, key: str) -> Any:
        if key in self:
            return dict.__getitem__(self, key)
        raise KeyError(key)


def _extend(module: Any) -> None:
    """Put lazy registries into a module of transformers or PEFT that has been executed."""
    if module.__name__ == REGISTRY:
        for name in TABLES:
            _make_lazy(module, name, {"rankfold": "rankfold.hf"})
    elif module.__name__ == ADAPTERS:
        _make_lazy(module, ADAPTER_TABLE, {"WARA": "rankfold.peft"})
    else:  # what third parties register there: model types, and the classes of their configs
        _make_lazy(module.CONFIG_MAPPING, "_extra_content", OWNERS)


def _make_lazy(holder: Any, name: str, owners: Mapping[str, str]) -> None:
    table = getattr(holder, name, None)
    if isinstance(table, dict) and not isinstance(table, _Lazy):
        setattr(holder, name, _Lazy(table, owners))


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
