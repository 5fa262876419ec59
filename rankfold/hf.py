"""The bridge to transformers: a quantizer that rebuilds the structures on meta before the weights are loaded.

    AutoModelForCausalLM.from_pretrained("out")          # with rankfold installed; see rankfold/autoload.py

It quantizes nothing: transformers gives out-of-tree weight formats one door, and this is it. The door is
strict: a tensor that is missing, left over, or of another shape or type fails the load, since transformers
alone would warn and go on with random weights.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.quantizers import auto as registry
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import rankfold.models  # noqa: F401  our own architectures, for where autoload is off
from rankfold.checkpoint import to_dense_
from rankfold.manifest import (
    QUANT_METHOD,
    check_manifest,
    is_own,
    manifest,
    rebuild_,
    tokens_of,
    validate,
)
from rankfold.ties import shared_keys

FLOATS = ("F16", "BF16", "F32", "F64")  # safetensors' names
INTEGERS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


class RankfoldConfig(QuantizationConfigMixin):
    """The manifest as transformers holds it (`config.quantization_config`); see `rankfold.manifest`."""

    def __init__(
        self,
        structures: Mapping[str, Any] | None = None,
        version: Any = 1,
        recipe: Any = None,
        tokens: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.version = version
        said = {"structures": {} if structures is None else structures, "tokens": tokens or {}}
        said |= {"quant_method": QUANT_METHOD, "version": version}
        self.structures, self.tokens = check_manifest(said), tokens_of(said)
        self.recipe = recipe
        unknown = set(extra) - {"quant_method"}
        if unknown:
            raise ValueError(f"config.json: quantization_config has unknown fields {sorted(unknown)}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """What config.json holds, which must say which structures there are. Raises ValueError."""
        check_manifest(config_dict)
        return super().from_dict(config_dict, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        body = {"quant_method": QUANT_METHOD, "version": self.version, "structures": self.structures}
        body |= {"tokens": self.tokens} if self.tokens else {}
        return body | ({"recipe": self.recipe} if self.recipe else {})

    to_diff_dict = to_dict


class RankfoldQuantizer(HfQuantizer):
    """Rebuilds structures before loading and checks the files against them; trains, compiles and saves like a
    dense model."""

    requires_calibration = False
    quantization_config: RankfoldConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "RankfoldConfig describes a model that is already factorized; to factorize a dense one, "
                "load it and call "
                "rankfold.factorize_(model, recipe, budget=…)"
            )
        structures, tokens = self.quantization_config.structures, self.quantization_config.tokens
        rebuild_(model, structures, tokens)
        check_places(model, device_map)
        check_files(model, checkpoint_files or [])
        _make_strict(model, structures, tokens)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        validate(model)
        # Nothing is frozen or packed: .half(), .float(), Trainer and torch.compile must see an ordinary
        # model.
        for module in model.modules():
            if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
                module.config._is_quantized = False
        model.is_quantized = False
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        said, written = manifest(model), self.quantization_config
        written.version, written.structures = said["version"], said["structures"]
        written.tokens = said.get("tokens", {})
        model.config.quantization_config = self.quantization_config
        return None, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return to_dense_(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def check_places(model: Any, device_map: Any) -> None:
    """Raise ValueError where a device map puts one side of a shared tensor on disk and the other elsewhere:
    what loads the offloaded layer would look for a tensor that no file has under its name."""
    places = (
        {str(key): str(place) for key, place in device_map.items()} if isinstance(device_map, dict) else {}
    )
    if "disk" not in places.values():
        return

    def place(key: str) -> str | None:
        above = [name for name in places if not name or key == name or key.startswith(f"{name}.")]
        return places[max(above, key=len)] if above else None

    for key, source in shared_keys(model).items():
        if place(key) != place(source) and "disk" in (place(key), place(source)):
            raise ValueError(
                f"device_map puts {key!r} on {place(key)} and {source!r} on {place(source)}, but they are "
                "one tensor; offload both layers, or neither"
            )


def check_files(model: Any, files: Iterable[str]) -> None:
    """Look into the headers of checkpoint files before anything is loaded.

    Raises ValueError for a file that is not safetensors, and naming the first tensor that is not floating
    point where the model's are, or of another type than the integers that the model has there: the loader
    would put those numbers into the layer as they are.
    """
    exact = {
        key.rpartition(".")[2]: INTEGERS[t.dtype]
        for key, t in model.state_dict().items()
        if t.dtype in INTEGERS
    }
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(
                f"{os.path.basename(file)!r} is not a safetensors file; rankfold never unpickles"
            )
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():
                dtype = handle.get_slice(key).get_dtype()
                integers = exact.get(key.rpartition(".")[2])
                if integers is None and dtype not in FLOATS:
                    raise ValueError(
                        f"tensor {key!r} is stored as {dtype}; the model has floating-point numbers there "
                        f"({', '.join(FLOATS)})"
                    )
                if integers is not None and dtype != integers:
                    raise ValueError(f"tensor {key!r} is stored as {dtype}; the model has {integers} there")


def _make_strict(model: Any, structures: Mapping[str, Any], tokens: Mapping[str, Any]) -> None:
    """Turn what transformers would log about keys into an error. A checkpoint of another class may lack the
    head of this one, and have one of its own; but it must hold all that its own class has."""
    adjust = model._adjust_missing_and_unexpected_keys
    shared = shared_keys(model)
    _mark_buffers_too(model)

    def strict(loading_info: Any) -> Any:
        result = adjust(loading_info)
        del model._adjust_missing_and_unexpected_keys
        missing, unexpected = set(loading_info.missing_keys), set(loading_info.unexpected_keys)
        wrong = sorted(loading_info.mismatched_keys)
        if not is_own(model) and (missing or unexpected):
            bare = f"{model.base_model_prefix}."
            written = _written_keys(model, structures, tokens)
            missing = {key for key in missing if key.removeprefix(bare) in written}
            unexpected = {key for key in unexpected if key.removeprefix(bare) not in written}
        apart = sorted(shared.keys() - model.all_tied_weights_keys.keys())
        parts = sorted(loading_info.conversion_errors)  # e.g. stacks of experts, stored one by one
        loading_info.mismatched_keys.clear()  # transformers would raise its own error, which names none
        loading_info.conversion_errors.clear()
        if apart:
            raise ValueError(
                f"the checkpoint holds {_few(apart)} and {shared[apart[0]]}, which are one tensor, with "
                "different numbers"
            )
        if parts:
            raise ValueError(f"the checkpoint has not all parts of {_few(parts)}, each of the right shape")
        if wrong:
            raise ValueError(
                f"tensors of another shape (key, in the checkpoint, in the model): {_few(wrong)}"
            )
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors of the model: {_few(missing)}")
        if unexpected:
            raise ValueError(
                f"the checkpoint has {len(unexpected)} tensors that the model does not: {_few(unexpected)}"
            )
        return result

    model._adjust_missing_and_unexpected_keys = strict


def _mark_buffers_too(model: Any) -> None:
    """transformers looks for tied tensors among the parameters only; a structure may share its buffers."""
    mark = model.mark_tied_weights_as_initialized

    def both(loading_info: Any) -> None:
        tied = model.all_tied_weights_keys
        del model.mark_tied_weights_as_initialized
        parameters = dict(model.named_parameters(remove_duplicate=False))
        model.all_tied_weights_keys = {key: source for key, source in tied.items() if key in parameters}
        mark(loading_info)
        model.all_tied_weights_keys = tied
        for key in tied.keys() - parameters.keys():
            model.get_parameter_or_buffer(key)._is_hf_initialized = True

    model.mark_tied_weights_as_initialized = both


def _written_keys(model: Any, structures: Mapping[str, Any], tokens: Mapping[str, Any]) -> set[str]:
    """Every key of the class that the checkpoint was saved from, without the prefix of its base model."""
    name = model.config.architectures[0]
    cls = getattr(transformers, name, None)
    if cls is None or not isinstance(model.config, cls.config_class):
        raise ValueError(
            f"the checkpoint was saved from {name!r}, which is not a class of transformers for "
            f"{type(model.config).__name__}, so it cannot be checked as a {type(model).__name__}; load it as "
            "the class it was saved from"
        )
    with torch.device("meta"):
        original = cls(copy.deepcopy(model.config))
    rebuild_(original, structures, tokens)
    return {key.removeprefix(f"{cls.base_model_prefix}.") for key in original.state_dict()}


def _few(items: Iterable[Any]) -> str:
    items = sorted(items)
    return ", ".join(str(item) for item in items[:3]) + (
        f" and {len(items) - 3} more" if len(items) > 3 else ""
    )


def _register() -> None:
    dict.__setitem__(registry.AUTO_QUANTIZATION_CONFIG_MAPPING, QUANT_METHOD, RankfoldConfig)
    dict.__setitem__(registry.AUTO_QUANTIZER_MAPPING, QUANT_METHOD, RankfoldQuantizer)


_register()

__all__ = ["RankfoldConfig", "RankfoldQuantizer", "check_files"]
