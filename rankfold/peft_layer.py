"""WaRA as a layer of PEFT: an ordinary layer, and a wavelet structure for each adapter beside it.

    y = base(x) + Σ active adapters  ΔW x,       ΔW = alpha/r · IDWT({B_s A_s})

Factors and transform compute in float32, also under autocast and beside a 16-bit base; a merge builds ΔW
there and casts once.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from rankfold.hosts import Host, is_conv1d
from rankfold.layers import Layer, why_not
from rankfold.methods.wavelets import WaRA
from rankfold.metric import Metric
from rankfold.structure import Structure


class WaraLayer(nn.Module, BaseTunerLayer):
    """Stands where a Linear, Conv1D, Conv2d or Embedding stood, which is its `base_layer`.

    `wara_delta` holds ΔW of each adapter as a `Wavelet` (out, in), a convolution being (out, in·kh·kw).
    """

    adapter_layer_names = ("wara_delta",)
    other_param_names = ("wara_rank", "wara_scale")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, method: WaRA, size: Any, inference_mode: bool = False
    ) -> None:
        super().__init__()
        _check(base_layer)
        self.base_layer = base_layer
        self.wara_delta = nn.ModuleDict()
        self.wara_rank: dict[str, int] = {}
        self.wara_scale: dict[str, float] = {}
        self.fan_in_fan_out = is_conv1d(base_layer)
        self.out_features, self.in_features = self._layer.shape
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, method, size, inference_mode)

    @property
    def _layer(self) -> Layer:
        return Layer(self.get_base_layer())

    def update_layer(self, adapter_name: str, method: WaRA, size: Any, inference_mode: bool = False) -> None:
        """Add an adapter with zero ΔW. `size` as `WaRA.sized` gives it. Raises ValueError where the layer is
        too small for it."""
        weight = self._layer.matrix()
        # On the CPU the draws are the same for every device; under `low_cpu_mem_usage` this builds on meta.
        delta = method.term((weight.shape[0], weight.shape[1]), size, torch.float32, None)
        with torch.no_grad():
            method.start_(delta, weight)
        self.wara_delta[adapter_name] = delta
        self.wara_rank[adapter_name], self.wara_scale[adapter_name] = method.rank, method.scale
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """To the device only: PEFT would cast to the base's dtype as well, and steps vanish in 16 bits."""
        delta = self.wara_delta[adapter_name] if adapter_name in self.wara_delta else None
        if delta is not None and not any(p.is_meta for p in delta.parameters()):
            delta.to(device if device is not None else self.get_base_layer().weight.device)  # type: ignore[arg-type]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        total = y
        for name in self.active_adapters:
            if name in self.wara_delta:
                total = total + self._change(name, x)
        return total.to(y.dtype)

    def _change(self, adapter_name: str, x: Tensor) -> Tensor:
        """ΔW x in the adapter's dtype."""
        base, delta = self.get_base_layer(), self.wara_delta[adapter_name]
        assert isinstance(delta, Structure)
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(base, nn.Embedding):
                return delta.rows(x)
            x = x.to(delta.dtype)
            if isinstance(base, nn.Conv2d):  # ΔW is small beside the convolution with it
                return base._conv_forward(x, self.get_delta_weight(adapter_name), None)
            return delta(x)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW in the layout of the base layer's weight, in the adapter's dtype."""
        delta = self.wara_delta[adapter_name]
        assert isinstance(delta, Structure)
        with torch.autocast(delta.device.type, enabled=False):
            return self._layer.laid(delta.to_dense())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the active (or named) adapters to the base weight. Raises ValueError where the result is
        not finite, if `safe_merge`."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.wara_delta:
                merged = self._moved(name, 1)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                    )
                self.get_base_layer().weight.data = merged
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract what was merged: the base weight is back up to the rounding of its dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.wara_delta:
                self.get_base_layer().weight.data = self._moved(name, -1)

    @torch.no_grad()
    def _moved(self, adapter_name: str, sign: int) -> Tensor:
        weight: Any = self.get_base_layer().weight.data
        wide = torch.promote_types(weight.dtype, torch.float32)
        moved = weight.to(wide) + sign * self.get_delta_weight(adapter_name).to(wide)
        return moved.to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT converts by the SVD of ΔW, and only Linear; `rankfold.lora.save_as_lora` is exact, and for
        all."""
        return type(self.get_base_layer()) is nn.Linear

    def __repr__(self) -> str:
        return "wara." + super().__repr__()


def size_of(method: WaRA, base_layer: nn.Module) -> Any:
    """The size that a method gives to one layer: the rank, or the ranks of its bands."""
    _check(base_layer)
    return method.sized(Layer(base_layer).matrix(), Metric())


def _check(base_layer: nn.Module) -> None:
    if isinstance(base_layer, Host):
        raise ValueError(
            "it is factorized: put adapters on its factors (target_modules='all-linear'), or beside them "
            "with factorize_(model, recipes.wara)"
        )
    reason = why_not(base_layer)
    if reason is not None:
        raise ValueError(f"WaRA cannot adapt {type(base_layer).__name__}: {reason}")
