"""The bridge to transformers: a quantizer that rebuilds the structures on meta before the weights are loaded.

    AutoModelForCausalLM.from_pretrained("out")          # with rankfold installed; see rankfold/autoload.py

It quantizes nothing: transformers gives out-of-tree weight formats one door, and this is it. The door is
strict: a tensor that is missing, left over, or of another shape or type fails the load, since transformers
alone would warn and go on with random weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors import safe_open
from transformers.quantizers import auto as registry
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankfold.hosts import hosts
from rankfold.layers import replace_
from rankfold.manifest import (
    QUANT_METHOD,
    VERSION,
    check_manifest,
    expected_tensors,
    manifest,
    rebuild_,
    unstamp_,
)

FLOATS = ("F16", "BF16", "F32", "F64")


class RankfoldConfig(QuantizationConfigMixin):
    """The manifest as transformers holds it (`config.quantization_config`); see `rankfold.manifest`."""

    def __init__(
        self,
        structures: Mapping[str, Any] | None = None,
        version: Any = VERSION,
        recipe: Any = None,
        **extra: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.version = version
        self.structures = check_manifest(
            {
                "quant_method": QUANT_METHOD,
                "version": version,
                "structures": {} if structures is None else structures,
            }
        )
        self.recipe = recipe
        unknown = set(extra) - {"quant_method"}
        if unknown:
            raise ValueError(f"config.json: quantization_config has unknown fields {sorted(unknown)}")

    def to_dict(self) -> dict[str, Any]:
        body = {"quant_method": QUANT_METHOD, "version": self.version, "structures": self.structures}
        return body | ({"recipe": self.recipe} if self.recipe else {})

    to_diff_dict = to_dict


class RankfoldQuantizer(HfQuantizer):
    """Rebuilds structures before loading and checks the files against them; trains, compiles and saves like a
    dense model."""

    requires_calibration = False
    quantization_config: RankfoldConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "RankfoldConfig describes a model that is already factorized; to factorize a dense one, "
                "load it and call "
                "rankfold.factorize_(model, recipe, budget=…)"
            )
        structures = self.quantization_config.structures
        check_files(structures, checkpoint_files or [])
        rebuild_(model, structures)
        _make_strict(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Nothing is frozen or packed: .half(), .float(), Trainer and torch.compile must see an ordinary
        # model.
        for module in model.modules():
            if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
                module.config._is_quantized = False
        model.is_quantized = False
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        self.quantization_config.structures = manifest(model)["structures"]
        model.config.quantization_config = self.quantization_config
        return None, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for name, host in hosts(model).items():
            replace_(model, name, host.to_dense())
        unstamp_(model)
        return model

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


def check_files(structures: Mapping[str, Any], files: Iterable[str]) -> None:
    """Compare the headers of safetensors files with the manifest, before anything is loaded.

    Raises ValueError naming the first key that is missing, left over, of another shape, or not floating
    point.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(
                f"{os.path.basename(file)!r} is not a safetensors file; rankfold never unpickles"
            )
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():
                view = handle.get_slice(key)
                found[key] = (tuple(view.get_shape()), view.get_dtype())
    if not found:
        return
    expected = expected_tensors(structures)
    owned = tuple(f"{name}.weight" for name in structures)
    for key, shape in expected.items():
        if key not in found:
            raise ValueError(
                f"the checkpoint lacks tensor {key!r} of shape {shape}, which config.json promises"
            )
        if found[key][0] != shape:
            raise ValueError(
                f"tensor {key!r} has shape {found[key][0]} in the checkpoint, {shape} in config.json"
            )
        if found[key][1] not in FLOATS:
            raise ValueError(
                f"tensor {key!r} is stored as {found[key][1]}; a factor is one of {', '.join(FLOATS)}"
            )
    seconds = {name for name, spec in structures.items() if "same_as" in spec}
    for key in found:
        owner = next((o for o in owned if key == o or key.startswith(f"{o}.")), None)
        if owner is not None and key not in expected and owner.removesuffix(".weight") not in seconds:
            raise ValueError(
                f"the checkpoint has tensor {key!r}, which the structure in config.json does not have"
            )


def _make_strict(model: Any) -> None:
    """Turn what transformers would log about keys into an error, except a head that the checkpoint never
    had."""
    adjust = model._adjust_missing_and_unexpected_keys

    def strict(loading_info: Any) -> Any:
        result = adjust(loading_info)
        del model._adjust_missing_and_unexpected_keys
        own = type(model).__name__ in (getattr(model.config, "architectures", None) or [type(model).__name__])
        prefix = f"{model.base_model_prefix}."
        missing = sorted(key for key in loading_info.missing_keys if own or key.startswith(prefix))
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors of the model: {_few(missing)}")
        unexpected = sorted(loading_info.unexpected_keys)
        if own and unexpected:
            raise ValueError(
                f"the checkpoint has {len(unexpected)} tensors that the model does not: {_few(unexpected)}"
            )
        wrong = sorted(loading_info.mismatched_keys)
        if wrong:
            raise ValueError(
                f"tensors of another shape (key, in the checkpoint, in the model): {_few(wrong)}"
            )
        return result

    model._adjust_missing_and_unexpected_keys = strict


def _few(items: list[Any]) -> str:
    return ", ".join(str(item) for item in items[:3]) + (
        f" and {len(items) - 3} more" if len(items) > 3 else ""
    )


def _register() -> None:
    dict.__setitem__(registry.AUTO_QUANTIZATION_CONFIG_MAPPING, QUANT_METHOD, RankfoldConfig)
    dict.__setitem__(registry.AUTO_QUANTIZER_MAPPING, QUANT_METHOD, RankfoldQuantizer)


_register()

__all__ = ["RankfoldConfig", "RankfoldQuantizer", "check_files"]
