"""An adapter on a grid of tokens, in the wavelet domain of the image: the second reading of WaRA.

    y = host(x) + s · IDWT( B φ(A C_s) for every band s of C = DWT(x over the grid's rows and columns) )

One pair of factors (A, B) serves all bands. Linear, with all bands and no scales, the transform cancels,
IDWT(B A DWT(x)) = B A x: plain LoRA on the grid's tokens. What makes it more is φ (GELU), a scale for each
band, or leaving bands out; and then it cannot be merged into a weight. [arXiv 2506.24092, v2]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.wavelet_transform import Taps, analyze2, check_levels, filters, names, synthesize2

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, None: nn.Identity}
SPEC = ("rank", "alpha", "wavelet", "taps", "levels", "leading", "grid", "activation", "bands", "scales")
DTYPES = ("float64", "float32", "bfloat16", "float16")
DEEPEST = 30  # levels: a file is not to ask for 2**40 names of bands


class TokenWara(nn.Module):
    """A layer on tokens (batch, tokens, features), frozen, and an adapter beside it.

    host        any module with `in_features` and `out_features` from (B, N, in) to (B, N, out)
    rank, alpha the factors are (rank, in) and (out, rank), times alpha / rank (alpha None: 1)
    leading     tokens before the grid (a class token, registers): they pass, and get nothing added
    grid        (rows, columns) of the other tokens; None: square, of whatever size comes. May be set anew
                between calls
    activation  φ between the factors: "gelu", "relu" or None
    bands       the bands that are adapted, by name ("LL1", …: first letter rows); None: all
    scales      a trained factor for each band, 1 at the start
    seed        of A; B is zero, so that outputs start as they were

    Raises ValueError for options that do not fit; UserWarning where they make it plain LoRA.
    """

    def __init__(
        self,
        host: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        wavelet: str | Taps = "db1",
        levels: int = 1,
        leading: int = 1,
        grid: tuple[int, int] | None = None,
        activation: str | None = "gelu",
        bands: Sequence[str] | None = None,
        scales: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner, out = getattr(host, "in_features", None), getattr(host, "out_features", None)
        if not isinstance(inner, int) or not isinstance(out, int):
            raise ValueError(f"TokenWara: {type(host).__name__} has no in_features and out_features")
        if not _is_int(rank) or not 1 <= rank <= min(inner, out):
            raise ValueError(f"TokenWara(rank={rank!r}): 1 to {min(inner, out)} for a layer {(out, inner)}")
        good = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if alpha is not None and not (good and alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"TokenWara(alpha={alpha!r}): a number above 0; None: scale 1")
        if not isinstance(activation, str | None) or activation not in ACTIVATIONS:
            raise ValueError(f"TokenWara(activation={activation!r}): choose one of 'gelu', 'relu', None")
        if not _is_int(levels) or not 1 <= levels <= DEEPEST:
            raise ValueError(f"TokenWara(levels={levels!r}): an integer of at least 1, at most {DEEPEST}")
        if not _is_int(leading) or leading < 0:
            raise ValueError(f"TokenWara(leading={leading!r}): the number of tokens before the grid")
        if not isinstance(scales, bool):
            raise ValueError(
                f"TokenWara(scales={scales!r}): true for a trained factor of each band, or false"
            )
        self.grid = _checked_grid(grid)
        self.active = tuple(names(levels) if bands is None else bands)
        unknown = [band for band in self.active if band not in names(levels)]
        if unknown or not self.active or len(set(self.active)) < len(self.active):
            raise ValueError(f"TokenWara(bands={bands!r}): each once, out of {', '.join(names(levels))}")
        if activation is None and not scales and len(self.active) == len(names(levels)):
            warnings.warn(
                "TokenWara without activation, with all bands and no scales: the transform cancels, this is "
                "plain LoRA on the grid's tokens (recipes.lora, which can be merged)",
                stacklevel=2,
            )
        self.taps = wavelet if isinstance(wavelet, Taps) else filters(wavelet)
        self.levels, self.leading, self.alpha = levels, leading, alpha
        self.scale = 1.0 if alpha is None else alpha / rank
        self.host = host.requires_grad_(False)
        like = next(host.parameters())
        place: dict = {
            "device": like.device,
            "dtype": dtype or torch.promote_types(like.dtype, torch.float32),
        }
        random = torch.Generator().manual_seed(seed)
        drawn = torch.rand(rank, inner, generator=random, device="cpu").mul_(2).sub_(1).mul_(inner**-0.5)
        self.right = nn.Parameter(drawn.to(**place))
        self.left = nn.Parameter(torch.zeros(out, rank, **place))
        self.phi = activation
        self.activation = ACTIVATIONS[activation]()
        self.scales = nn.Parameter(torch.ones(len(self.active), **place)) if scales else None

    def spec(self) -> dict[str, Any]:
        """Small JSON from which `rebuilt` makes an unfilled copy around another host: with the state, all
        that there is. `dtype` is that of what trains, where it is not the host's."""
        own, base = self.left.dtype, next(self.host.parameters()).dtype
        return {
            "rank": self.left.shape[1],
            "alpha": self.alpha,
            "wavelet": self.taps.name,
            "taps": list(self.taps.low),
            "levels": self.levels,
            "leading": self.leading,
            "grid": None if self.grid is None else list(self.grid),
            "activation": self.phi,
            "bands": list(self.active),
            "scales": self.scales is not None,
        } | ({} if own == base else {"dtype": str(own).removeprefix("torch.")})

    @classmethod
    def rebuilt(cls, host: nn.Module, spec: Mapping[str, Any]) -> TokenWara:
        """An unfilled one from a spec, which is untrusted. What of `host` trains is left as it is. Raises
        ValueError for a spec that is none, or that `host` does not fit."""
        given = {key: spec[key] for key in SPEC if key in spec}
        if len(given) < len(SPEC) or set(spec) - {*SPEC, "dtype"}:
            raise ValueError(
                f"the spec of a TokenWara has {', '.join(SPEC)}; got {', '.join(map(str, spec))}"
            )
        bands = given["bands"]
        if not isinstance(bands, list) or not all(isinstance(band, str) for band in bands):
            raise ValueError(f"TokenWara(bands={bands!r}): a list of names")
        name, taps, dtype = given.pop("wavelet"), given.pop("taps"), spec.get("dtype")
        if not isinstance(name, str) or not isinstance(taps, list):
            raise ValueError(f"a TokenWara has a wavelet's name and taps; got {name!r} and {taps!r}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"a TokenWara's dtype is one of {', '.join(DTYPES)}; got {dtype!r}")
        trains = {p: p.requires_grad for p in host.parameters()}
        like = next((p.dtype for p in trains), None)
        with warnings.catch_warnings():  # said when it was made
            warnings.simplefilter("ignore")
            own = getattr(torch, dtype) if dtype else like
            module = cls(host, wavelet=Taps(name, tuple(taps)), dtype=own, **given)
        for parameter, flag in trains.items():
            parameter.requires_grad_(flag)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """(B, leading + rows·columns, in) to (B, …, out). Raises ValueError for other numbers of tokens."""
        y = self.host(x)
        rows, columns = self._sides(x)
        tokens = x[:, self.leading :].to(self.right.dtype)
        image = tokens.mT.unflatten(-1, (rows, columns))  # (B, in, rows, columns)
        bands = analyze2(image, self.taps, self.levels)
        adapted = {}
        for place, name in enumerate(self.active):
            inside = self.activation(bands[name].movedim(1, -1) @ self.right.mT)
            band = (inside @ self.left.mT).to(tokens.dtype)
            adapted[name] = (band if self.scales is None else band * self.scales[place]).movedim(-1, 1)
        image = synthesize2(adapted, self.taps, self.levels, (rows, columns))
        update = (image.flatten(2).mT * self.scale).to(y.dtype)
        return torch.cat([y[:, : self.leading], y[:, self.leading :] + update], 1)

    def _sides(self, x: Tensor) -> tuple[int, int]:
        if x.dim() != 3:
            raise ValueError(f"TokenWara takes (batch, tokens, features); got {tuple(x.shape)}")
        count = x.shape[1] - self.leading
        if self.grid is None:
            side = math.isqrt(max(count, 0))
            grid, how = (side, side), f"{count} tokens are no square; set grid=(rows, columns)"
        else:
            grid, how = self.grid, f"grid={self.grid} has {self.grid[0] * self.grid[1]} tokens, not {count}"
        if count < 1 or grid[0] * grid[1] != count:
            raise ValueError(f"TokenWara: {x.shape[1]} tokens, {self.leading} of them before the grid: {how}")
        check_levels(self.levels, grid)
        return grid

    def extra_repr(self) -> str:
        return (
            f"rank={self.left.shape[1]}, wavelet={self.taps.name}, bands={self.active}, scale={self.scale:g}"
        )


def token_layers(model: nn.Module) -> dict[str, TokenWara]:
    """{name: TokenWara} of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TokenWara)}


def check_dense(model: nn.Module) -> None:
    """Raise ValueError where no model of ordinary dense layers computes the same: there is a TokenWara."""
    if tokens := next(iter(token_layers(model)), None):
        raise ValueError(
            f"layer {tokens!r} is a TokenWara, which changes activations: no dense layer computes the same"
        )


def own_parameters(layer: TokenWara) -> list[nn.Parameter]:
    """What trains in a TokenWara: all but its host's."""
    return [p for p in (layer.left, layer.right, layer.scales) if p is not None]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_grid(grid: Any) -> tuple[int, int] | None:
    if grid is None:
        return None
    good = isinstance(grid, list | tuple) and len(grid) == 2 and all(_is_int(side) for side in grid)
    if not good or min(grid) < 1:
        raise ValueError(f"TokenWara(grid={grid!r}): (rows, columns), or None for square ones")
    return grid[0], grid[1]
