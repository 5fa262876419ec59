"""The configuration and the tuner of WaRA in PEFT. Import them from `rankfold.peft`, which registers them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, _filter_state_dict_by_key_prefixes
from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes as key_prefixes
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from rankfold.layers import Layer, replace_
from rankfold.manifest import stamp_
from rankfold.methods.wavelets import WaRA
from rankfold.peft_layer import WaraLayer, size_of
from rankfold.structure import Structure
from rankfold.structures import Dense, Sum

FORMAT = 1


@dataclass
class WaraConfig(PeftConfig):
    """What `WaRA` takes, and PEFT's usual choice of layers. Checked when it is made: ValueError.

    r            nominal rank of a band; `wara_alpha` / r scales ΔW, None: 1
    wavelet, levels, domain, bands, init  see `rankfold.methods.WaRA`. With bands="energy" the ranks
                 that the base's weights gave are kept in `band_ranks`, by layer
    seed         with a layer's name, of what is drawn
    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save  as in LoRA. Linear,
                 Conv1D (whose weight is transposed: nothing to set), Conv2d and Embedding can be targets
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    r: int = 8
    wara_alpha: float | None = None
    wavelet: str = "db1"
    levels: int = 1
    domain: str = "weight"
    bands: str | dict[str, int] = "equal"
    init: str = "kaiming"
    seed: int = 0
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    band_ranks: dict[str, dict[str, int]] = field(default_factory=dict)
    wara_format: int = FORMAT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["WARA"]
        if self.wara_format > FORMAT:
            raise ValueError(
                f"the adapter was written by a newer rankfold: its format is version {self.wara_format}, "
                f"this one reads up to {FORMAT}. Upgrade rankfold"
            )
        for name in ("target_modules", "exclude_modules"):
            given: Any = getattr(self, name)
            setattr(self, name, set(given) if isinstance(given, list) else given)
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`, the numbers of the layers")
        self.method()

    def method(self) -> WaRA:
        """The method that puts on these adapters. Raises ValueError for options that it does not take."""
        return WaRA(
            rank=self.r,
            alpha=self.wara_alpha,
            seed=self.seed,
            wavelet=self.wavelet,
            levels=self.levels,
            domain=self.domain,
            bands=self.bands,
            init=self.init,
        )


class WaraModel(BaseTuner):
    """The tuner that PEFT wraps a model in."""

    prefix = "wara_"
    tuner_layer_cls = WaraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.base_layer if isinstance(target, WaraLayer) else target
        try:
            _check_alone(self.model, current_key, base)
            method = peft_config.method().at(current_key, 0)
            size = peft_config.band_ranks.get(current_key)
            if size is None:
                size = size_of(method, base)
                if isinstance(size, dict):
                    peft_config.band_ranks[current_key] = size
            options = {"inference_mode": peft_config.inference_mode}
            if isinstance(target, WaraLayer):
                target.update_layer(adapter_name, method, size, **options)
                return
            layer = WaraLayer(target, adapter_name, method, size, **options)
        except ValueError as error:
            raise ValueError(f"layer {current_key!r}: {error}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the bands' factors of two adapters do not add up to factors of the same rank."""
        raise ValueError(
            "WaRA adapters cannot be combined into one. Several can be active at once, which adds them: "
            "model.base_model.set_adapter(['one', 'two']); or write each with save_as_lora and let PEFT "
            "combine the LoRAs"
        )

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """….wara_delta.NAME.bands.LL1.left.weight without NAME, which PEFT looks for at the end only."""
        return key.replace(f".wara_delta.{adapter_name}.", ".wara_delta.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT does it, but strict: PEFT only warns of what is missing, and would go on with a zero ΔW."""
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        mine = _filter_state_dict_by_key_prefixes(model.state_dict(), key_prefixes(model, adapter_name))
        for key, tensor in mine.items():
            found = state.get(key)
            if found is None or found.shape != tensor.shape:
                what = "lacks it" if found is None else f"has {tuple(found.shape)}"
                raise ValueError(f"adapter tensor {key!r} is {tuple(tensor.shape)}, and the file {what}")
        extra = [key for key in state if ".wara_delta." in key and key not in mine]
        if extra:
            raise ValueError(f"the adapter's file holds tensors of layers that it does not name: {extra[:4]}")
        return state


def as_rankfold(model: Any, adapter_name: str = "default") -> nn.Module:
    """The model under a PEFT model with WaRA, in place: its layers hold the adapter as rankfold does, for
    `save_as_lora`, `save_adapter` and `merge_`. Other adapters are dropped, and PEFT's wrapper is of no more
    use.

    Raises ValueError for an unknown adapter, one of another method, and one that is merged.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, WaraConfig):
        raise ValueError(
            f"no WaRA adapter {adapter_name!r}; the model has {', '.join(map(repr, model.peft_config))}"
        )
    model.set_adapter(adapter_name)
    made: dict[int, nn.Module] = {}
    for layer in [module for module in model.modules() if isinstance(module, WaraLayer)]:
        if layer.merged:
            raise ValueError("an adapter is merged into the weights: unmerge_adapter() first")
        if adapter_name in layer.wara_delta:
            view, delta = Layer(layer.get_base_layer()), layer.wara_delta[adapter_name]
            assert isinstance(delta, Structure)
            base = Dense.of(view.matrix()).requires_grad_(False)
            made[id(view.module)] = view.wrap(Sum.of(base, delta, frozen=True))
    inner = model.unload()
    for name, module in list(inner.named_modules()):
        if id(module) in made:
            replace_(inner, name, made[id(module)])
    stamp_(inner, {"name": "wara", "method": config.method().to_json()})
    return inner


def _check_alone(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise ValueError where a layer's weight is another module's too: a merge would change both."""
    weight = getattr(module, "weight", None)
    for other, held in model.named_modules():
        if held is not module and weight is not None and held._parameters.get("weight") is weight:
            raise ValueError(
                f"it shares its weight with {other!r}, and a merge would change both; leave it out, or use "
                "factorize_ with recipes.wara, where the two share one adapter"
            )
